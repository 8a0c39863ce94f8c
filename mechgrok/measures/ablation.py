"""Ablation of single heads at hook_z: how much the loss grows when a head's output is replaced."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from mechgrok.model import example_losses, model_losses, scored_logits
from mechgrok.types import Examples

AblationKind = Literal["zero", "mean", "resample"]
ABLATION_KINDS: tuple[AblationKind, ...] = ("zero", "mean", "resample")


@torch.no_grad()
def head_ablations(model: HookedTransformer, examples: Examples, kind: AblationKind, rng: torch.Generator) -> Tensor:
    """Increase of every example's loss when one head is ablated, nats: Float64[layer * head, example].

    At every position the head's z is replaced: by 0 ("zero"), by its mean over `examples` at that
    position ("mean"), or by its value on another example, one permutation of the examples for each
    head ("resample"). The kinds answer different questions and differ by up to a factor of 2 in
    practice, so the kind belongs to the number (Wang et al. 2024 use resample).
    """
    tokens, targets, weights = examples.tensors
    unharmed = model_losses(model, tokens, targets, weights)
    rows = []
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            hook = (f"blocks.{layer}.attn.hook_z", _replace(kind, head, len(examples), rng))
            losses = example_losses(scored_logits(model, tokens, targets.shape[1], [hook]), targets, weights)
            rows.append(losses - unharmed)
    return torch.stack(rows)


def _replace(
    kind: AblationKind, head: int, n_examples: int, rng: torch.Generator
) -> Callable[[Tensor, HookPoint], Tensor]:
    others = torch.randperm(n_examples, generator=rng) if kind == "resample" else None

    def hook_fn(z: Tensor, hook: HookPoint) -> Tensor:
        own = z[:, :, head]
        z = z.clone()
        if kind == "zero":
            z[:, :, head] = 0.0
        elif kind == "mean":
            z[:, :, head] = own.mean(0, keepdim=True)
        else:
            z[:, :, head] = own[others]
        return z

    return hook_fn
