"""Ablation of one path: what an earlier head tells one later head, and no other, is replaced.

The three ways in, queries, keys and values, are ablated one by one or together. All else that the later head and
every other part receives is what it is in the clean run; what comes after the later head responds to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from mechgrok.errors import ComponentError
from mechgrok.measures.ablation import AblationKind, permutation, put_head, replacement
from mechgrok.measures.in_context import target_losses
from mechgrok.model import scored_logits
from mechgrok.types import Examples

Head = tuple[int, int]  # layer, head
Input = Literal["q", "k", "v"]
INPUTS: tuple[Input, ...] = ("q", "k", "v")


@dataclass(frozen=True)
class CleanRun:
    """One unharmed run, shared by the ablations of many paths.

    resid_pre, z: by layer, [example, pos, d_model] and [example, pos, head, d_head]. losses: Float64[example, scored].
    """

    resid_pre: tuple[Tensor, ...]
    z: tuple[Tensor, ...]
    losses: Tensor


@torch.no_grad()
def clean_run(model: HookedTransformer, examples: Examples) -> CleanRun:
    """What `path_ablation` needs of the model as it is."""
    hooks = ("hook_resid_pre", "attn.hook_z")
    output, cache = model.run_with_cache(examples.tokens, names_filter=lambda name: name.endswith(hooks))
    logits = cast(Tensor, output)
    resid_pre, z = (tuple(cache[f"blocks.{i}.{hook}"] for i in range(model.cfg.n_layers)) for hook in hooks)
    targets = examples.tensors[1]
    return CleanRun(resid_pre, z, target_losses(logits[:, -targets.shape[1] :], targets))


@torch.no_grad()
def path_ablation(
    model: HookedTransformer,
    examples: Examples,
    sender: Head,
    receiver: Head,
    inputs: Sequence[Input],
    kind: AblationKind,
    rng: torch.Generator,
    clean: CleanRun | None = None,
) -> Tensor:
    """Increase of every position's loss when the path is ablated, unweighted, nats: Float64[example, scored].

    The sender's z is replaced as in `head_ablations`. By as much as that changes what it writes, the residual stream
    is changed that the receiver alone reads for the named inputs. The receiver's LayerNorm sees the changed stream.
    This is the path patching of Wang et al. 2022 along one edge, towards the examples' mean or other examples.

    It equals adding the change at TransformerLens's hook_q_input, hook_k_input, hook_v_input under
    `use_split_qkv_input` (a test holds them equal). That copies the stream for every head and changes the
    model's settings; here the one head's queries, keys or values are computed and put in place.

    Args:
        clean: from `clean_run` on the same model and examples, when many paths are asked about.

    Raises:
        ComponentError: the sender is not in an earlier layer, or heads share keys and values.
    """
    if not 0 <= sender[0] < receiver[0] < model.cfg.n_layers:
        raise ComponentError(f"a path leads to a later layer, got {sender} to {receiver}; name an earlier head first")
    if model.cfg.n_key_value_heads not in (None, model.cfg.n_heads):
        raise ComponentError("heads share keys and values (grouped-query attention), so no path leads into one alone")
    clean = clean or clean_run(model, examples)
    layer, n_scored = receiver[0], clean.losses.shape[1]

    own = clean.z[sender[0]][:, :, sender[1]]
    replaced = replacement(kind, own, permutation(kind, len(examples), rng))
    resid = clean.resid_pre[layer] + (replaced - own) @ model.W_O[sender]
    hooks = [
        put_head(f"blocks.{layer}.attn.hook_{letter}", receiver[1], _head_input(model, receiver, letter, resid))
        for letter in inputs
    ]
    if model.cfg.positional_embedding_type == "shortformer":  # whose later layers need the positions of the first
        logits = scored_logits(model, examples.tokens, n_scored, hooks)
    else:
        logits = scored_logits(model, clean.resid_pre[layer], n_scored, hooks, start_at_layer=layer)
    return target_losses(logits, examples.tensors[1]) - clean.losses


def _head_input(model: HookedTransformer, head: Head, letter: Input, resid: Tensor) -> Tensor:
    """The head's queries, keys or values on that residual stream, before any rotation: [example, pos, d_head]."""
    block = model.blocks[head[0]]
    x = block.ln1(resid)
    if model.cfg.positional_embedding_type == "shortformer" and letter != "v":
        x = x + model.W_pos[: x.shape[1]]
    weight, bias = (getattr(block.attn, f"{part}_{letter.upper()}")[head[1]] for part in ("W", "b"))
    return x @ weight + bias
