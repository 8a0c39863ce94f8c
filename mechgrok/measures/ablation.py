"""Ablation of single heads at hook_z: how much the loss grows when a head's output is replaced."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from mechgrok.measures.in_context import target_losses
from mechgrok.model import FwdHook, example_losses, model_losses, scored_logits
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
    tokens, targets, weights = examples.tensors
    unharmed = model_losses(model, tokens, targets, weights)
    ablated = _ablated_logits(model, examples, kind, rng)
    return torch.stack([example_losses(logits, targets, weights) - unharmed for logits in ablated])


@torch.no_grad()
def position_ablations(model: HookedTransformer, examples: Examples, kind: AnyAblation, rng: torch.Generator) -> Tensor:
    """`head_ablations` position by position, unweighted, nats: Float64[layer * head, example, scored].

    Where the weight is 0 the target has no meaning, and so has the increase.
    """
    tokens, targets, _ = examples.tensors
    unharmed = target_losses(scored_logits(model, tokens, targets.shape[1]), targets)
    ablated = _ablated_logits(model, examples, kind, rng)
    return torch.stack([target_losses(logits, targets) - unharmed for logits in ablated])


def permutation(kind: AnyAblation, n_examples: int, rng: torch.Generator) -> Tensor | None:
    """Which other example's value each example gets, Int[example]; drawn for "resample" only."""
    return torch.randperm(n_examples, generator=rng) if kind == "resample" else None


def replacement(kind: AnyAblation, own: Tensor, others: Tensor | None) -> Tensor:
    """What stands in for one head's z: [example, pos, d_head], or of an example axis of 1 that broadcasts."""
    if kind == "mean":
        return own.mean(0, keepdim=True)
    return torch.zeros_like(own) if others is None else own[others]


def _ablated_logits(
    model: HookedTransformer, examples: Examples, kind: AnyAblation, rng: torch.Generator
) -> Iterator[Tensor]:
    """The logits of the scored positions without each head in turn."""
    n_scored = examples.tensors[1].shape[1]
    frozen = _clean_patterns(model, examples.tokens) if kind == "pattern-preserving" else []
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            ablate = (f"blocks.{layer}.attn.hook_z", _replace(kind, head, permutation(kind, len(examples), rng)))
            # A head changes no pattern before the next layer's.
            yield scored_logits(model, examples.tokens, n_scored, [ablate, *frozen[layer + 1 :]])


def _replace(kind: AnyAblation, head: int, others: Tensor | None) -> Callable[[Tensor, HookPoint], Tensor]:
    def hook_fn(z: Tensor, hook: HookPoint) -> Tensor:
        own = z[:, :, head]
        z = z.clone()
        z[:, :, head] = replacement(kind, own, others)
        return z

    return hook_fn


def _clean_patterns(model: HookedTransformer, tokens: Tensor) -> list[FwdHook]:
    """Hooks, one a layer, that put the attention patterns of the unharmed run in place."""
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    _, cache = model.run_with_cache(tokens, names_filter=names)

    def put(pattern: Tensor) -> Callable[[Tensor, HookPoint], Tensor]:
        return lambda _, hook: pattern

    return [(name, put(cache[name])) for name in names]
