"""Ablation of one path: what an earlier head tells one later head, and no other, is replaced.

The three ways in, queries, keys and values, are ablated one by one or together. All else that the later head and
every other part receives is what it is in the clean run; what comes after the later head responds to it. Where heads
share keys and values, the receiver has copies of its own, and those of its group stay as they are.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from mechgrok.errors import ComponentError
from mechgrok.measures.ablation import AblationKind, CleanRun, clean_run, permutation, put_head, replacement
from mechgrok.measures.in_context import position_losses
from mechgrok.measures.streams import changed_inputs, is_plain, ungrouped
from mechgrok.model import FwdHook
from mechgrok.plain import is_untouched
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
    model's settings; here the one head's queries, keys or values are computed and put in place. Where a norm follows
    the heads, or something of the caller's acts on the model, they are those of a run in which only the sender
    changes, else the product of the changed stream with the head's weights (a test holds these equal too).

    Args:
        clean: from `clean_run` on the same model and examples, when many paths are asked about.

    Raises:
        ComponentError: the sender is not in an earlier layer, or a hook sits on keys or values that heads share.
    """
    if not 0 <= sender[0] < receiver[0] < model.cfg.n_layers:
        raise ComponentError(f"a path leads to a later layer, got {sender} to {receiver}; name an earlier head first")
    clean = clean or clean_run(model, examples)
    layer = receiver[0]
    own = clean.z[sender[0]][:, :, sender[1]]
    instead = replacement(kind, own, permutation(kind, len(examples), rng)).expand_as(own)
    plain = is_plain(model)
    resid = clean.resid[layer] + (instead - own) @ model.W_O[sender] if plain else None

    def changed(rows: slice) -> dict[Input, Tensor]:
        if resid is not None:
            return {letter: _head_input(model, receiver, letter, resid[rows]) for letter in inputs}
        change = put_head(f"blocks.{sender[0]}.attn.hook_z", sender[1], instead[rows])
        z = [of[rows] for of in clean.z]
        all_heads = changed_inputs(model, examples.tokens[rows], z, change, sender[0], layer, inputs)
        return {letter: all_heads[letter][:, :, receiver[1]] for letter in inputs}

    def hooks(rows: slice) -> list[FwdHook]:
        return [put_head(f"blocks.{layer}.attn.hook_{letter}", receiver[1], of) for letter, of in changed(rows).items()]

    with ungrouped(model):
        if is_untouched(model):
            return position_losses(model, examples, hooks, clean.resid[layer], layer) - clean.losses
        return position_losses(model, examples, hooks) - clean.losses


def _head_input(model: HookedTransformer, head: Head, letter: Input, resid: Tensor) -> Tensor:
    """The head's queries, keys or values on that residual stream, before any rotation: [example, pos, d_head]."""
    block = model.blocks[head[0]]
    x = block.ln1(resid)
    if model.cfg.positional_embedding_type == "shortformer" and letter != "v":
        x = x + model.W_pos[: x.shape[1]]
    weight, bias = (getattr(block.attn, f"{part}_{letter.upper()}")[head[1]] for part in ("W", "b"))
    return x @ weight + bias
