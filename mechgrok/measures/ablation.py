"""Ablation of single heads at hook_z: how much the loss grows when a head's output is replaced."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from mechgrok.measures.in_context import target_losses
from mechgrok.model import FwdHook, at_once, example_losses, model_losses, scored_logits
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
    n_scored, tokens = examples.tensors[1].shape[1], examples.tokens
    shares = torch.arange(len(tokens)).split(at_once(model, examples))
    what = ("z", "pattern") if kind == "pattern-preserving" else ("z",)
    # A head's ablation changes neither its own z nor a pattern before the next layer's.
    clean = _clean(model, tokens, what, shares)
    for layer in range(model.cfg.n_layers):
        frozen = [name for name in clean if name.endswith("hook_pattern") and int(name.split(".")[1]) > layer]
        for head in range(model.cfg.n_heads):
            point = f"blocks.{layer}.attn.hook_z"
            own = clean[point][:, :, head]
            instead = replacement(kind, own, permutation(kind, len(examples), rng)).expand_as(own)
            logits = [
                scored_logits(
                    model, tokens[share], n_scored,
                    [put_head(point, head, instead[share]), *((name, _put(clean[name][share])) for name in frozen)],
                )
                for share in shares
            ]  # fmt: skip
            yield torch.cat(logits)


def put_head(point: str, head: int, value: Tensor) -> FwdHook:
    """A hook that puts a value in the place of one head's, where heads are the third axis: [example, pos, d_head]."""

    def hook_fn(all_heads: Tensor, hook: HookPoint) -> Tensor:
        all_heads = all_heads.clone()
        all_heads[:, :, head] = value
        return all_heads

    return point, hook_fn


def _put(instead: Tensor) -> Callable[[Tensor, HookPoint], Tensor]:
    return lambda _, hook: instead


def _clean(
    model: HookedTransformer, tokens: Tensor, what: Sequence[str], shares: Sequence[Tensor]
) -> dict[str, Tensor]:
    """These hooks of every layer's attention in the unharmed run, by name."""
    names = [f"blocks.{layer}.attn.hook_{one}" for layer in range(model.cfg.n_layers) for one in what]
    caches = [model.run_with_cache(tokens[share], names_filter=names)[1] for share in shares]
    return {name: torch.cat([cache[name] for cache in caches]) for name in names}
