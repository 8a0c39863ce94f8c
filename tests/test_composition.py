"""Composition on the hand-built model, and against random matrices."""

import math

import pytest
import torch

from mechgrok import seeds
from mechgrok.config import ModelConfig
from mechgrok.measures.composition import MODES, composition_scores
from mechgrok.model import build_model
from tests import hand_built

SPLIT = hand_built.SPLIT


def test_the_previous_token_head_composes_through_keys_alone() -> None:
    """OV_1 and QK_2^T are identities between nine dimensions each: |9 ones| / (3 * 3) = 1/3."""
    found = composition_scores(hand_built.hand_built_model(), seeds.stream(0))
    into = {mode: found[mode].scores[0, 0, 1, :3].tolist() for mode in MODES}
    assert into["K"] == pytest.approx([1 / 3] * 3, abs=1e-5)
    assert into["Q"] == into["V"] == pytest.approx([0.0] * 3, abs=1e-6)
    assert found["K"].scores[0, 2, 1, :3].tolist() == pytest.approx([0.0] * 3, abs=1e-6)  # junk is not read
    assert found["K"].times_chance[0, 0, 1, 0] > 2


def test_pairs_that_mean_nothing_have_no_score() -> None:
    """Dead heads are 0 / 0; a head cannot read one of its own or a later layer."""
    scores = composition_scores(hand_built.hand_built_model(), seeds.stream(0))["K"].scores
    assert scores[0, [1, 3], 1].isnan().all() and scores[0, :, 1, 3].isnan().all()
    assert scores[0, :, 0].isnan().all() and scores[1].isnan().all()
    assert int((~scores.isnan()).sum()) == 2 * 3


@pytest.mark.parametrize("mode", MODES)
def test_a_score_is_its_formula_written_out(mode: str) -> None:
    config = ModelConfig(n_layers=3, d_model=20, n_heads=2, d_head=6, init_std=0.3)
    model = build_model(config, SPLIT, 0)
    scores = composition_scores(model, seeds.stream(0))[mode].scores
    with torch.no_grad():
        writes = model.W_V[0, 1] @ model.W_O[0, 1]
        query_key = model.W_Q[2, 0] @ model.W_K[2, 0].T
        reads = {"Q": query_key, "K": query_key.T, "V": model.W_V[2, 0] @ model.W_O[2, 0]}[mode]
        expected = (writes @ reads).norm() / (writes.norm() * reads.norm())
    assert float(scores[0, 1, 2, 0]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("normalization", [None, "LN"])
def test_an_untrained_model_composes_as_chance_says(normalization: str | None) -> None:
    config = ModelConfig(
        n_layers=2, d_model=48, n_heads=6, d_head=8, init_std=0.02,
        normalization_type=normalization, positional_embedding_type="shortformer",
    )  # fmt: skip
    for of in composition_scores(build_model(config, SPLIT, 0), seeds.stream(0)).values():
        scores = of.scores[~of.scores.isnan()]
        assert len(scores) == 36
        assert float(scores.mean()) == pytest.approx(of.chance, abs=4 * of.spread / 6)
        assert float(scores.std()) == pytest.approx(of.spread, rel=0.4)
        assert of.chance == pytest.approx(1 / math.sqrt(48), rel=0.05)


def test_the_chance_level_is_drawn_from_the_given_generator() -> None:
    model = hand_built.hand_built_model()
    state = torch.random.get_rng_state()
    one, same, other = (composition_scores(model, seeds.stream(seed))["K"].chance for seed in (0, 0, 1))
    assert one == same != other
    assert torch.equal(torch.random.get_rng_state(), state)
