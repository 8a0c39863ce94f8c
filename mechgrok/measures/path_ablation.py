"""Ablation of one path: what an earlier head tells one later head, and no other, is replaced.

The three ways in, queries, keys and values, are ablated one by one or together. All else that the later head and
every other part receives is what it is in the clean run; what comes after the later head responds to it.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from mechgrok.errors import ComponentError
from mechgrok.measures.ablation import AblationKind, CleanRun, clean_run, permutation, put_head, replacement
from mechgrok.measures.in_context import position_losses
from mechgrok.model import FwdHook
from mechgrok.types import Examples

Head = tuple[int, int]  # layer, head
Input = Literal["q", "k", "v"]
INPUTS: tuple[Input, ...] = ("q", "k", "v")


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
    layer = receiver[0]
    own = clean.z[sender[0]][:, :, sender[1]]
    replaced = replacement(kind, own, permutation(kind, len(examples), rng))
    resid = clean.resid[layer] + (replaced - own) @ model.W_O[sender]

    def hooks(rows: slice) -> list[FwdHook]:
        changed = {letter: _head_input(model, receiver, letter, resid[rows]) for letter in inputs}
        return [put_head(f"blocks.{layer}.attn.hook_{letter}", receiver[1], of) for letter, of in changed.items()]

    return position_losses(model, examples, hooks, clean.resid[layer], layer) - clean.losses


def _head_input(model: HookedTransformer, head: Head, letter: Input, resid: Tensor) -> Tensor:
    """The head's queries, keys or values on that residual stream, before any rotation: [example, pos, d_head]."""
    block = model.blocks[head[0]]
    x = block.ln1(resid)
    if model.cfg.positional_embedding_type == "shortformer" and letter != "v":
        x = x + model.W_pos[: x.shape[1]]
    weight, bias = (getattr(block.attn, f"{part}_{letter.upper()}")[head[1]] for part in ("W", "b"))
    return x @ weight + bias
