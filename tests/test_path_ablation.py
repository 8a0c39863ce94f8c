"""Ablation of one path: the hand-built model, models that lack the path, TransformerLens's own hooks."""

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from mechgrok import seeds
from mechgrok.errors import ComponentError
from mechgrok.measures.ablation import ABLATION_KINDS, clean_run, position_ablations
from mechgrok.measures.in_context import position_losses, target_losses
from mechgrok.measures.path_ablation import INPUTS, Head, Input, path_ablation
from tests.hand_built import hand_built_model
from tests.test_attention_measures import ARCHITECTURES, TWICE, random_model


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return hand_built_model()


def ablate(model: HookedTransformer, sender: Head, receiver: Head, inputs: tuple[Input, ...], kind: str) -> Tensor:
    return path_ablation(model, TWICE, sender, receiver, inputs, kind, seeds.stream(0))


@pytest.mark.parametrize("kind", ABLATION_KINDS)
def test_the_previous_token_head_reaches_a_twin_through_its_keys_alone(model, kind) -> None:
    through = {letter: ablate(model, (0, 0), (1, 0), (letter,), kind) for letter in INPUTS}
    assert through["k"].shape == (64, 7) and float(through["k"].mean()) > 0.1
    assert float(through["q"].abs().max()) == float(through["v"].abs().max()) == 0.0
    assert torch.equal(ablate(model, (0, 0), (1, 0), INPUTS, kind), through["k"])


def test_without_the_path_a_twin_attends_to_everything_alike(model) -> None:
    """Zero keys: what the other twin says stays, as in a model in which this twin reads no keys."""
    lacking = hand_built_model()
    with torch.no_grad():
        lacking.blocks[1].attn.W_K[0] = 0.0
    expected = position_losses(lacking, TWICE) - position_losses(model, TWICE)
    torch.testing.assert_close(ablate(model, (0, 0), (1, 0), ("k",), "zero"), expected, atol=1e-6, rtol=1e-5)
    assert float(expected.mean()) < float(position_ablations(model, TWICE, "zero", seeds.stream(0))[0].mean()) / 2


@pytest.mark.parametrize("kind", ABLATION_KINDS)
@pytest.mark.parametrize(
    ("sender", "receiver"), [((0, 0), (1, 2)), ((0, 0), (1, 3)), ((0, 2), (1, 0)), ((0, 1), (1, 0))]
)
def test_paths_into_the_decoy_or_from_junk_or_of_dead_heads_cost_nothing(model, sender, receiver, kind) -> None:
    assert float(ablate(model, sender, receiver, INPUTS, kind).abs().max()) == 0.0


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("inputs", [("q",), ("k",), ("v",), INPUTS])
def test_it_equals_a_change_at_the_split_inputs_of_transformer_lens(changes, inputs) -> None:
    """In three layers: others see the clean sender, and what comes later the receiver's answer."""
    model = random_model(n_layers=3, **changes).to(torch.float64)
    tokens, targets, _ = TWICE.tensors
    clean = clean_run(model, TWICE)
    own = clean.z[0][:, :, 1]
    change = (own.mean(0, keepdim=True) - own) @ model.W_O[0, 1]

    def add(x: Tensor, hook: object) -> Tensor:
        x = x.clone()
        x[:, :, 2] += change
        return x

    model.set_use_split_qkv_input(True)
    hooks = [(f"blocks.1.hook_{letter}_input", add) for letter in inputs]
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)[:, -targets.shape[1] :]
    model.set_use_split_qkv_input(False)
    expected = target_losses(logits, targets) - clean.losses
    found = path_ablation(model, TWICE, (0, 1), (1, 2), inputs, "mean", seeds.stream(0), clean)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    assert float(found.abs().max()) > 1e-3


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_clean_path_costs_nothing_and_nothing_is_left_behind(changes, monkeypatch) -> None:
    model = random_model(**changes)
    before, settings = model(TWICE.tokens), model.cfg.to_dict()
    monkeypatch.setattr("mechgrok.measures.path_ablation.replacement", lambda kind, own, others: own)
    assert float(ablate(model, (0, 1), (1, 2), INPUTS, "mean").abs().max()) < 1e-5
    assert torch.equal(model(TWICE.tokens), before) and model.cfg.to_dict() == settings
    assert not any(hook.fwd_hooks for hook in model.hook_dict.values())


def test_a_path_that_leads_nowhere_is_refused(model) -> None:
    for sender, receiver in (((1, 0), (0, 0)), ((1, 0), (1, 1)), ((0, 0), (2, 0))):
        with pytest.raises(ComponentError, match="a path leads to a later layer"):
            ablate(model, sender, receiver, ("k",), "mean")


def test_resampling_draws_from_the_given_generator(model) -> None:
    one, same, other = (
        path_ablation(model, TWICE, (0, 0), (1, 0), ("k",), "resample", seeds.stream(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
