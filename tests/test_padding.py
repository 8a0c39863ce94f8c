"""Rows that are padded: what a tokenizer on the model says of them, and what the same rows are without one."""

from types import SimpleNamespace

import pytest
import torch
from transformer_lens import HookedTransformer

from mechgrok import seeds
from mechgrok.config import ModelConfig
from mechgrok.errors import ConfigError
from mechgrok.llc.problem import make_problem
from mechgrok.model import build_model
from mechgrok.tasks.next_token import next_token_examples
from mechgrok.types import Examples, Split

PAD, N_TOKENS, N_PAD = 0, 12, 3


def padded_rows(side: str) -> Examples:
    """Rows of 10 tokens with 3 of padding on one side, which nobody scores."""
    tokens = torch.randint(1, N_TOKENS, (8, 10), generator=seeds.stream(0, "rows"))
    unscored = slice(None, N_PAD) if side == "left" else slice(10 - N_PAD - 1, None)
    tokens[:, :N_PAD] = PAD if side == "left" else tokens[:, :N_PAD]
    tokens[:, 10 - N_PAD :] = PAD if side == "right" else tokens[:, 10 - N_PAD :]
    examples = next_token_examples(tokens)
    weights = examples.weights.clone()
    weights[:, unscored] = 0.0
    return Examples(examples.tokens, examples.targets, weights)


def model_of(examples: Examples, side: str | None) -> HookedTransformer:
    """Two layers, with a tokenizer that pads on this side, as TransformerLens reads it, or with none."""
    shape = ModelConfig(n_layers=2, d_model=16, n_heads=2, d_head=8, d_mlp=16, init_std=0.4)
    model = build_model(shape, Split(examples, examples, tuple(map(str, range(N_TOKENS))), N_TOKENS), 0)
    if side is not None:
        model.tokenizer = SimpleNamespace(padding_side=side, pad_token_id=PAD, bos_token_id=1)
    return model


def own_losses(model: HookedTransformer, examples: Examples) -> torch.Tensor:
    """By the model's logits alone."""
    with torch.no_grad():
        nats = -model(examples.tokens).double().log_softmax(-1).gather(-1, examples.targets[..., None])[..., 0]
    return (nats * examples.weights).sum(1) / examples.weights.sum(1)


@pytest.mark.parametrize("side", ["right", None])
@pytest.mark.parametrize("name", ["model", "L0H1", "L1H0", "L0H0+L1H1", "L1.mlp"])
def test_padding_on_the_right_leaves_the_losses_as_they_are(side: str | None, name: str) -> None:
    examples = padded_rows("right")
    model = model_of(examples, side)
    problem, expected = make_problem(model, examples, name), own_losses(model, examples)
    found = problem.potential.losses(problem.potential.anchor[None], torch.arange(len(examples))[None])[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(problem.init_losses, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["model", "L0H1", "L1.mlp"])
def test_a_tokenizer_that_pads_on_the_left_is_refused(name: str) -> None:
    examples = padded_rows("left")
    with pytest.raises(ConfigError, match="tokenizer pads on the left.*give rows that are padded on the right"):
        make_problem(model_of(examples, "left"), examples, name)


def test_padding_on_the_left_is_text_to_a_model_without_a_tokenizer() -> None:
    """Positions count from the padding on, and it is attended to; on the right it changes nothing."""
    left, right = padded_rows("left"), padded_rows("right")
    masked = own_losses(model_of(left, "left"), left)
    assert float((own_losses(model_of(left, None), left) - masked).abs().max()) > 0.01
    torch.testing.assert_close(own_losses(model_of(right, None), right), own_losses(model_of(right, "right"), right))
