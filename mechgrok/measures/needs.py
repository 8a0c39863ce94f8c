"""What a measure needs of a model and of data; each is refused in one sentence where it is not there."""

from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from mechgrok.errors import MeasureError, ShapeError
from mechgrok.types import Examples

HIDDEN = -1e3  # an attention score up to which a position counts as masked: exp(-1000) is 0 beside any other


@torch.no_grad()
def visible_positions(model: HookedTransformer, tokens: Tensor) -> Tensor:
    """Which positions each one can attend to: Bool[row, query, key].

    Asked of the model itself: with queries of 0 every score is 0 but for what masks it, so that causal, bidirectional
    and windowed attention, and masks that hooks put on hook_attn_scores, are seen as they are. Ours.

    Raises:
        MeasureError: heads differ in what they see, as layers with and without a window do.
    """
    seen: list[Tensor] = []

    def ask_nothing(queries: Tensor, hook: HookPoint) -> Tensor:
        return torch.zeros_like(queries)

    def keep(scores: Tensor, hook: HookPoint) -> None:
        seen.append(~(scores <= HIDDEN))

    attn = [f"blocks.{layer}.attn" for layer in range(model.cfg.n_layers)]
    asked: list[Any] = [(f"{at}.hook_q", ask_nothing) for at in attn]
    read: list[Any] = [(f"{at}.hook_attn_scores", keep) for at in attn]
    model.run_with_hooks(tokens, stop_at_layer=model.cfg.n_layers, fwd_hooks=asked + read)
    visible = seen[0][:, 0]
    for at, of in zip(attn, seen, strict=True):
        if not bool((of == visible[:, None]).all()):
            raise MeasureError(
                f"the heads of {at} do not all see the positions that the model's first head sees, so attention has "
                "no one chance level; use rows no longer than the window, or remove the hook that masks single heads"
            )
    return visible


def check_fits(model: HookedTransformer, examples: Examples) -> None:
    """Raise ShapeError if the model cannot read the tokens or has no class for a target."""
    cfg, targets = model.cfg, examples.tensors[1]
    limits = (
        ("positions in a row", examples.tokens.shape[1], cfg.n_ctx),
        ("tokens", int(examples.tokens.max()) + 1, cfg.d_vocab),
        ("classes", int(targets.max()) + 1, cfg.d_vocab_out),
    )
    for what, needed, there in limits:
        if needed > there:
            raise ShapeError(f"these examples need {needed} {what} and the model has {there}; give those of its task")


def check_causal(model: HookedTransformer, examples: Examples, what: str) -> None:
    """Raise MeasureError if positions see later ones: then what comes next is no prediction."""
    if bool(visible_positions(model, examples.tokens[:1]).triu(1).any()):
        raise MeasureError(
            f"{what} asks how well tokens are predicted from those before them, and in this model positions see later "
            f"ones (attention_dir {model.cfg.attention_dir!r}); use attention scores, ablations or attributions"
        )


def check_next_tokens(examples: Examples, what: str) -> None:
    """Raise MeasureError unless every scored target is the token that comes next: then classes are tokens.

    The last position's target has no token to be compared with.
    """
    scored = examples.weights[:, :-1] > 0
    same = (examples.targets[:, :-1] == examples.tokens[:, 1:])[scored]
    if not (len(same) and bool(same.all())):
        raise MeasureError(
            f"{what} takes class i for token i, and the targets of these examples are not the tokens that come next; "
            "use it where a model predicts tokens"
        )
