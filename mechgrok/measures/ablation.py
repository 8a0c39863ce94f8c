"""Ablation of single heads at hook_z: how much the loss grows when a head's output is replaced.

A hook of the caller's on the model acts in every run, once, and at hook_z before the replacement. Heads that share keys
and values have outputs of their own, so grouped queries change nothing here.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from mechgrok.measures.in_context import position_losses
from mechgrok.measures.streams import is_plain, put
from mechgrok.model import FwdHook
from mechgrok.plain import is_untouched
from mechgrok.types import Examples

AblationKind = Literal["zero", "mean", "resample"]
AnyAblation = Literal["zero", "mean", "resample", "pattern-preserving"]
ABLATION_KINDS: tuple[AblationKind, ...] = ("zero", "mean", "resample")


@dataclass(frozen=True)
class CleanRun:
    """One unharmed run, shared by the ablations of many heads or paths.

    resid: what enters each layer, and what leaves the last, [example, pos, d_model]. z: by layer, [example, pos, head,
    d_head]. losses: Float64[example, scored].
    """

    resid: tuple[Tensor, ...]
    z: tuple[Tensor, ...]
    losses: Tensor


@torch.no_grad()
def clean_run(model: HookedTransformer, examples: Examples) -> CleanRun:
    """What ablations need of the model as it is, of all rows, as each may stand in for any other."""
    kept: dict[str, list[Tensor]] = defaultdict(list)

    def keep(value: Tensor, hook: HookPoint) -> None:
        kept[str(hook.name)].append(value)

    layers = range(model.cfg.n_layers)
    resid = [*(f"blocks.{layer}.hook_resid_pre" for layer in layers), f"blocks.{layers[-1]}.hook_resid_post"]
    z = [f"blocks.{layer}.attn.hook_z" for layer in layers]
    losses = position_losses(model, examples, lambda rows: [(name, keep) for name in (*resid, *z)])
    together = {name: torch.cat(kept.pop(name)) for name in (*resid, *z)}
    return CleanRun(tuple(together[name] for name in resid), tuple(together[name] for name in z), losses)


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
    clean = clean_run(model, examples)
    increases = []
    for layer, z in enumerate(clean.z):
        for head in range(model.cfg.n_heads):
            own = z[:, :, head]
            instead = replacement(kind, own, permutation(kind, len(examples), rng)).expand_as(own)
            increases.append(_losses_with(model, examples, clean, kind, layer, head, instead) - clean.losses)
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


def _losses_with(
    model: HookedTransformer,
    examples: Examples,
    clean: CleanRun,
    kind: AnyAblation,
    layer: int,
    head: int,
    instead: Tensor,
) -> Tensor:
    """Every position's loss with something in place of one head's z, [example, pos, d_head].

    Only what comes after is run: the next layer on, where the head's output is added to what leaves its own, else its
    own layer on; all of it, where something of the caller's acts on the model.
    """
    cfg, frozen = model.cfg, list[str]()
    if kind == "pattern-preserving":  # a head's ablation changes no pattern before the next layer's
        frozen = [f"blocks.{later}.attn.hook_pattern" for later in range(layer + 1, cfg.n_layers)]

    def patterns(rows: slice) -> list[FwdHook]:
        found = _clean(model, examples.tokens[rows], frozen, cfg.n_layers - 1) if frozen else {}
        return [(name, put(pattern)) for name, pattern in found.items()]

    if cfg.attn_only and is_plain(model):
        change = (instead - clean.z[layer][:, :, head]) @ model.W_O[layer, head]
        return position_losses(model, examples, patterns, clean.resid[layer + 1] + change, layer + 1)
    point = f"blocks.{layer}.attn.hook_z"

    def hooks(rows: slice) -> list[FwdHook]:
        return [put_head(point, head, instead[rows]), *patterns(rows)]

    if not is_untouched(model):
        return position_losses(model, examples, hooks)
    return position_losses(model, examples, hooks, clean.resid[layer], layer)


def _clean(model: HookedTransformer, tokens: Tensor, names: Sequence[str], layer: int) -> dict[str, Tensor]:
    """These hooks of the unharmed run, by name; it ends with this layer."""
    _, cache = model.run_with_cache(tokens, names_filter=list(names), stop_at_layer=layer + 1)
    return {name: cache[name] for name in names}
