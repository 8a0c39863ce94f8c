"""Ablation of single heads at hook_z: how much the loss grows when a head's output is replaced."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from mechgrok.measures.in_context import Hooks, position_losses
from mechgrok.model import FwdHook, shares
from mechgrok.types import Examples

AblationKind = Literal["zero", "mean", "resample"]
AnyAblation = Literal["zero", "mean", "resample", "pattern-preserving"]
ABLATION_KINDS: tuple[AblationKind, ...] = ("zero", "mean", "resample")


@torch.no_grad()
def head_ablations(model: HookedTransformer, examples: Examples, kind: AnyAblation, rng: torch.Generator) -> Tensor:
    """Increase of every example's loss when one head is ablated, nats: Float64[layer * head, example].

    At every position the head's z is replaced: by 0 ("zero"), by its mean over `examples` at that
    position ("mean"), or by its value on another example, one permutation of the examples for each
    head ("resample"). The kinds answer different questions and differ by up to a factor of 2 in
    practice, so the kind belongs to the number (Wang et al. 2024 use resample).

    "pattern-preserving" is Olsson et al.'s (2022): z is 0, and the attention patterns of all heads stay those of the
    clean run. It sees what a head does to values and logits, and hides what it does to later heads' queries and keys.
    """
    _, _, weights = examples.tensors
    return (position_ablations(model, examples, kind, rng) * weights).sum(-1) / weights.sum(-1)


@torch.no_grad()
def position_ablations(model: HookedTransformer, examples: Examples, kind: AnyAblation, rng: torch.Generator) -> Tensor:
    """`head_ablations` position by position, unweighted, nats: Float64[layer * head, example, scored].

    Where the weight is 0 the target has no meaning, and so has the increase.
    """
    unharmed = position_losses(model, examples)
    increases = []
    for layer in range(model.cfg.n_layers):
        z = _head_outputs(model, examples, layer)
        for head in range(model.cfg.n_heads):
            own = z[:, :, head]
            instead = replacement(kind, own, permutation(kind, len(examples), rng)).expand_as(own)
            hooks = _without(model, examples, kind, layer, head, instead)
            increases.append(position_losses(model, examples, hooks) - unharmed)
    return torch.stack(increases)


def permutation(kind: AnyAblation, n_examples: int, rng: torch.Generator) -> Tensor | None:
    """Which other example's value each example gets, Int[example]; drawn for "resample" only."""
    return torch.randperm(n_examples, generator=rng) if kind == "resample" else None


def replacement(kind: AnyAblation, own: Tensor, others: Tensor | None) -> Tensor:
    """What stands in for one head's z: [example, pos, d_head], or of an example axis of 1 that broadcasts."""
    if kind == "mean":
        return own.mean(0, keepdim=True)
    return torch.zeros_like(own) if others is None else own[others]


def put_head(point: str, head: int, value: Tensor) -> FwdHook:
    """A hook that puts a value in the place of one head's, where heads are the third axis: [example, pos, d_head]."""

    def hook_fn(all_heads: Tensor, hook: HookPoint) -> Tensor:
        all_heads = all_heads.clone()
        all_heads[:, :, head] = value
        return all_heads

    return point, hook_fn


def _head_outputs(model: HookedTransformer, examples: Examples, layer: int) -> Tensor:
    """The clean z of one layer: [example, pos, head, d_head]. Of all rows, as each may stand in for any other."""
    name = f"blocks.{layer}.attn.hook_z"
    return torch.cat([_clean(model, examples.tokens[rows], [name], layer)[name] for rows in shares(model, examples)])


def _without(
    model: HookedTransformer, examples: Examples, kind: AnyAblation, layer: int, head: int, instead: Tensor
) -> Hooks:
    """The hooks that put something in place of one head's z: [example, pos, d_head]."""
    last, frozen = model.cfg.n_layers - 1, list[str]()
    if kind == "pattern-preserving":  # a head's ablation changes no pattern before the next layer's
        frozen = [f"blocks.{later}.attn.hook_pattern" for later in range(layer + 1, last + 1)]

    def hooks(rows: slice) -> list[FwdHook]:
        patterns = _clean(model, examples.tokens[rows], frozen, last) if frozen else {}
        of_head = put_head(f"blocks.{layer}.attn.hook_z", head, instead[rows])
        return [of_head, *((name, _put(pattern)) for name, pattern in patterns.items())]

    return hooks


def _put(instead: Tensor) -> Callable[[Tensor, HookPoint], Tensor]:
    return lambda _, hook: instead


def _clean(model: HookedTransformer, tokens: Tensor, names: Sequence[str], layer: int) -> dict[str, Tensor]:
    """These hooks of the unharmed run, by name; it ends with this layer."""
    _, cache = model.run_with_cache(tokens, names_filter=list(names), stop_at_layer=layer + 1)
    return {name: cache[name] for name in names}
