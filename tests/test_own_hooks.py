"""Measures of a model with hooks of its owner's: they act in every run, once, and are there afterwards."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from mechgrok import seeds
from mechgrok.errors import MeasureError
from mechgrok.measures.ablation import position_ablations
from mechgrok.measures.attention import attention_scores
from mechgrok.measures.attribution import direct_attributions
from mechgrok.measures.in_context import position_losses, target_losses
from mechgrok.model import evaluate
from mechgrok.plain import is_untouched
from mechgrok.types import Examples
from tests.all_measures import (
    ALL,
    OF_ATTENTION,
    OF_LOSSES,
    OF_PARTS,
    ROWS,
    Measure,
    assert_same,
    other_model,
    scores,
)

Edit = Callable[[HookedTransformer], object]
SHAPES = {"mlp": {}, "LN, attention only": {"normalization_type": "LN", "attn_only": True, "d_mlp": None}}
POINTS = (
    "hook_embed", "blocks.0.hook_resid_pre", "blocks.0.attn.hook_z", "blocks.0.hook_attn_out", "blocks.1.attn.hook_k",
    "blocks.1.hook_resid_post", "blocks.2.attn.hook_pattern", "blocks.2.hook_attn_out", "blocks.2.hook_resid_post",
)  # fmt: skip


def times(factor: float) -> Callable[[Tensor, object], Tensor]:
    return lambda value, hook: value * factor


def hooked(point: str, factor: float, **shape: object) -> HookedTransformer:
    model = other_model(**shape)
    model.add_hook(point, times(factor), is_permanent=True)
    return model


def scaled(model: HookedTransformer, factor: float, *names: str) -> HookedTransformer:
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).mul_(factor)
    return model


def halved_before(layer: int) -> Edit:
    """What enters a layer is half: what is written before is, and the layers before read twice as much of it."""
    before = [f"blocks.{earlier}" for earlier in range(layer)]
    writers, readers = (
        [f"{block}.{name}" for block in before for name in names]
        for names in (
            ("attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out"),
            ("attn.W_Q", "attn.W_K", "attn.W_V", "mlp.W_in"),
        )
    )
    return lambda model: scaled(scaled(model, 0.5, "embed.W_E", "pos_embed.W_pos", *writers), 2.0, *readers)


# A hook, and the model without it that computes the same.
TWINS = {
    "no positions": ("hook_pos_embed", 0.0, lambda m: scaled(m, 0.0, "pos_embed.W_pos")),
    "no first attention": (
        "blocks.0.hook_attn_out", 0.0, lambda m: scaled(m, 0.0, "blocks.0.attn.W_O", "blocks.0.attn.b_O"),
    ),
    "sharper queries": (
        "blocks.2.attn.hook_q", 3.0, lambda m: scaled(m, 3.0, "blocks.2.attn.W_Q", "blocks.2.attn.b_Q"),
    ),
    "other values": (
        "blocks.2.attn.hook_v", -2.0, lambda m: scaled(m, -2.0, "blocks.2.attn.W_V", "blocks.2.attn.b_V"),
    ),
    "no last MLP": ("blocks.2.hook_mlp_out", 0.0, lambda m: scaled(m, 0.0, "blocks.2.mlp.W_out", "blocks.2.mlp.b_out")),
    "half of the stream": ("blocks.1.hook_resid_pre", 0.5, halved_before(1)),
    "half of the stream, late": ("blocks.2.hook_resid_pre", 0.5, halved_before(2)),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("measure", ALL.values(), ids=ALL)
def test_hooks_that_change_nothing_change_no_measure(measure: Measure, shape: dict) -> None:
    """So the whole runs of a hooked model agree with the shorter ones of a plain model."""
    model = other_model(**shape)
    for point in POINTS:
        model.add_hook(point, lambda value, hook: value.clone(), is_permanent=point != "hook_embed")
    model.unembed.register_forward_hook(lambda module, inputs, output: output.clone())
    hooks = [list(module._forward_hooks) for module in model.modules()]
    assert_same(measure(model), measure(other_model(**shape)))
    assert [list(module._forward_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS)
@pytest.mark.parametrize("measure", (OF_ATTENTION | OF_LOSSES).values(), ids=OF_ATTENTION | OF_LOSSES)
def test_a_hooked_model_is_measured_as_the_model_without_hooks_that_computes_the_same(
    measure: Measure, twin: tuple[str, float, Edit]
) -> None:
    point, factor, edit = twin
    plain = other_model()
    edit(plain)
    model = hooked(point, factor)
    torch.testing.assert_close(model(ROWS.tokens), plain(ROWS.tokens), rtol=1e-9, atol=1e-9)
    assert float((model(ROWS.tokens) - other_model()(ROWS.tokens)).detach().abs().max()) > 0.05
    assert_same(measure(model), measure(plain))


def test_attributions_are_right_beside_a_hook_or_refused() -> None:
    (attributions,) = OF_PARTS.values()
    for name in ("no positions", "sharper queries", "no last MLP"):
        point, factor, edit = TWINS[name]
        plain = other_model()
        edit(plain)
        assert_same(attributions(hooked(point, factor)), attributions(plain))
    for name in ("no first attention", "half of the stream"):
        point, factor, _ = TWINS[name]
        with pytest.raises(MeasureError, match="does not add up to this model's logits"):
            direct_attributions(hooked(point, factor), ROWS)


@pytest.mark.parametrize("after", ["blocks.2.hook_mlp_out", "blocks.2.hook_resid_post", "ln_final.hook_normalized"])
def test_a_hook_after_the_last_attention_sees_all_positions(after: str) -> None:
    """It clears the fourth position, which the examples do not score: the ones that they do stay as they are."""
    model = other_model(normalization_type="LN")
    expected, accuracy = position_losses(model, ROWS), evaluate(model, ROWS)

    def clear(value: Tensor, hook: object) -> Tensor:
        assert value.shape[1] == ROWS.tokens.shape[1]
        return value.index_fill(1, torch.tensor([3]), 0.0)

    model.add_hook(after, clear)
    assert not is_untouched(model)
    assert_same(position_losses(model, ROWS), expected)
    assert evaluate(model, ROWS) == pytest.approx(accuracy)


def test_another_forward_is_called_as_it_is() -> None:
    class Doubled(HookedTransformer):
        def forward(self, *args: object, **kwargs: object) -> Tensor:  # type: ignore[override]
            return 2 * super().forward(*args, **kwargs)

    model = other_model()
    expected = target_losses(2 * model(ROWS.tokens)[:, -7:], ROWS.tensors[1]).detach()
    model.__class__ = Doubled
    assert_same(position_losses(model, ROWS), expected)
    zeroed = position_ablations(model, ROWS, "zero", seeds.stream(0))
    logits = model.run_with_hooks(ROWS.tokens, fwd_hooks=[("blocks.1.attn.hook_z", _without_first)])
    assert_same(zeroed[4], (target_losses(logits[:, -7:], ROWS.tensors[1]) - expected).detach())


def _without_first(z: Tensor, hook: object) -> Tensor:
    return z.index_fill(2, torch.tensor([0]), 0.0)


# ---- rows whose padding is masked by hooks that tell one another what the tokens are

PAD, N_LONG = 8, 22
SHORT = Examples(ROWS.tokens % PAD, ROWS.targets % PAD, ROWS.weights)
PADDED = Examples(
    *(
        torch.nn.functional.pad(of, (0, N_LONG - of.shape[1]), value=value)
        for of, value in ((SHORT.tokens, PAD), (SHORT.targets, 0), (SHORT.weights, 0))
    )
)


def masked_model() -> HookedTransformer:
    """Bidirectional; the mask is kept at the tokens, used in every layer and thrown away in the last."""
    model = other_model(attention_dir="bidirectional", use_hook_tokens=True)
    known = model.hook_dict["hook_tokens"].ctx

    def remember(tokens: Tensor, hook: object) -> None:
        known["padding"] = (tokens == PAD)[:, None, None]

    def mask(attention: Tensor, hook: object) -> Tensor:
        masked = torch.where(known["padding"], -1e5, attention)
        if hook.layer() == model.cfg.n_layers - 1:  # type: ignore[attr-defined]
            del known["padding"]
        return masked

    model.add_hook("hook_tokens", remember, is_permanent=True)
    model.add_hook(lambda name: name.endswith("attn_scores"), mask, is_permanent=True)
    return model


@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
def test_padding_that_hooks_mask_is_not_there(kind: str) -> None:
    plain = other_model(attention_dir="bidirectional")
    n_scored, first = SHORT.tensors[1].shape[1], PADDED.tensors[1].shape[1]
    own = slice(-first, -first + n_scored)
    assert_same(position_losses(masked_model(), PADDED)[:, :n_scored], position_losses(plain, SHORT))
    found = position_ablations(masked_model(), PADDED, kind, seeds.stream(0))
    assert own.start < 0
    assert_same(found[..., :n_scored], position_ablations(plain, SHORT, kind, seeds.stream(0)))


def test_chance_counts_what_the_hooks_leave_visible() -> None:
    """Every query sees the 16 short positions; the padding is no earlier equal token of any padding."""
    found, plain = masked_model(), other_model(attention_dir="bidirectional")
    n_short = SHORT.tokens.shape[1]
    padded, short = (attention_scores(m, rows) for m, rows in ((found, PADDED), (plain, SHORT)))
    assert padded["first-token"].chance == pytest.approx(1 / n_short) == short["first-token"].chance
    # The first padding has a previous token that it sees; the others' previous tokens are padding.
    assert padded["previous-token"].chance == pytest.approx(1 / n_short)
    assert padded["duplicate-token"].chance == pytest.approx(short["duplicate-token"].chance)
    assert_same(scores(padded["duplicate-token"]), scores(short["duplicate-token"]))
