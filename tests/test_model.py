import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechgrok.config import ModelConfig
from mechgrok.errors import CheckpointError, ConfigError
from mechgrok.model import build_model, chance_loss, evaluate, example_losses, model_from_parameters, scored_logits
from mechgrok.tasks import make_split
from mechgrok.types import Examples
from tests.oracles import tiny_config

SPLIT = make_split(tiny_config().task, 0)


def config(**changes) -> ModelConfig:
    return tiny_config(model=changes).model


@settings(deadline=None, max_examples=25)
@given(
    n_layers=st.integers(1, 2),
    d_mlp=st.sampled_from([None, 16]),
    norm=st.sampled_from([None, "LN", "LNPre"]),
    positions=st.sampled_from(["standard", "rotary", "shortformer"]),
)
def test_rebuilt_model_gives_the_same_bits_and_scored_logits_are_the_last(n_layers, d_mlp, norm, positions) -> None:
    shape = config(n_layers=n_layers, d_mlp=d_mlp, normalization_type=norm, positional_embedding_type=positions)
    model = build_model(shape, SPLIT, 1)
    again = model_from_parameters(shape, SPLIT, {name: q.clone() for name, q in model.named_parameters()})
    tokens = SPLIT.train.tokens
    assert torch.equal(model(tokens), again(tokens))
    for n_scored in (1, 2, 3):
        torch.testing.assert_close(scored_logits(model, tokens, n_scored), model(tokens)[:, -n_scored:])


def test_weights_have_the_stated_spread_and_do_not_depend_on_what_else_there_is() -> None:
    model = build_model(config(d_model=64, n_heads=4, d_head=16, d_mlp=128, init_std=0.125), SPLIT, 0)
    assert abs(float(model.W_in.detach().std()) - 0.125) < 0.005
    assert all((q == 0).all() for name, q in model.named_parameters() if ".b_" in name)
    attention_only = build_model(config(d_model=64, n_heads=4, d_head=16, d_mlp=None, init_std=0.125), SPLIT, 0)
    assert torch.equal(model.W_Q, attention_only.W_Q)
    assert not torch.equal(model.W_Q, build_model(config(d_model=64, n_heads=4, d_head=16), SPLIT, 1).W_Q)


def test_parameters_that_do_not_fit_are_refused_by_name() -> None:
    model = build_model(config(), SPLIT, 0)
    good = dict(model.named_parameters())
    with pytest.raises(CheckpointError, match=r"missing \['unembed.b_U'\], unknown \['intruder'\]"):
        model_from_parameters(
            config(), SPLIT, {n: q for n, q in good.items() if n != "unembed.b_U"} | {"intruder": good["unembed.b_U"]}
        )
    with pytest.raises(CheckpointError, match="unembed.b_U has shape"):
        model_from_parameters(config(), SPLIT, good | {"unembed.b_U": torch.zeros(3)})
    with pytest.raises(ConfigError, match="even d_head"):
        build_model(config(positional_embedding_type="rotary", d_head=7), SPLIT, 0)


def test_example_loss_is_the_weighted_cross_entropy_in_float64() -> None:
    rng = np.random.default_rng(0)
    logits, targets, weights = rng.normal(size=(4, 3, 5)), rng.integers(0, 5, (4, 3)), rng.uniform(size=(4, 3))
    expected = []
    for i in range(4):
        nats = [math.log(np.exp(logits[i, j]).sum()) - logits[i, j, targets[i, j]] for j in range(3)]
        expected.append(np.dot(weights[i], nats) / weights[i].sum())
    got = example_losses(torch.from_numpy(logits), torch.from_numpy(targets), torch.from_numpy(weights))
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    # Float32 would stop at about 1.2e-7: the true loss of a margin of 30 is e^-30.
    confident = torch.tensor([[[30.0, 0.0]]])
    loss = example_losses(confident, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    assert loss.item() == pytest.approx(math.exp(-30), rel=1e-3)


def test_only_scored_positions_reach_the_loss() -> None:
    model = build_model(config(), SPLIT, 0)
    train = SPLIT.train
    spoiled = train.targets.clone()
    spoiled[:, :-1] = 3
    assert evaluate(model, Examples(train.tokens, spoiled, train.weights)) == evaluate(model, train)
    assert train.tensors[1].shape == (len(train), 1)


def test_a_uniform_model_has_the_chance_loss() -> None:
    model = build_model(config(), SPLIT, 0)
    silent = model_from_parameters(config(), SPLIT, {n: torch.zeros_like(q) for n, q in model.named_parameters()})
    assert evaluate(silent, SPLIT.train)[0] == pytest.approx(math.log(7), rel=1e-12)
    assert chance_loss(model) == pytest.approx(math.log(7))
