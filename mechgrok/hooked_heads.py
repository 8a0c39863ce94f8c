"""Heads of a HookedTransformer at other parameters than its own, supplied by hooks, beside the hooks that it has."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.components import Attention, GroupedQueryAttention

from mechgrok.components import own_parameters
from mechgrok.errors import ComponentError
from mechgrok.plain import tied
from mechgrok.types import Component

Heads = tuple[tuple[int, int], ...]


def why_not_hooked(model: HookedTransformer, of: Component) -> str | None:
    """What keeps hooks from supplying this component; None if nothing does."""
    if not of.heads:
        return f"hooks supply heads and unions of heads, not {of.name!r}"
    for layer, _ in of.heads:
        if type(attn := model.blocks[layer].attn) not in (Attention, GroupedQueryAttention):
            return f"the attention of layer {layer} is a {type(attn).__name__}"
        if "forward" in vars(attn) or "calculate_qkv_matrices" in vars(attn):
            return f"the attention of layer {layer} has a forward of its own"
    return tied(model)


@contextmanager
def heads_at(model: HookedTransformer, of: Component, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block the model runs the heads of `of` at these parameters.

    What they change is *added* to the model's own activations: q += x (W_Q' - W_Q) + (b_Q' - b_Q), likewise k and v
    where a head has its own, and the attention's output += z (W_O' - W_O). So at the model's own parameters the logits
    equal the plain ones exactly, and a gradient reaches the heads alone. x is what the attention is given, after the
    norm, positions and all hooks that come before it.

    The user's hooks stay where they are, and each fires once in a run of the model: what is added to q, k, v and the
    output (or to `hook_result`, where `use_attn_result` is set) comes before theirs, z is read after theirs.

    Args:
        of: heads. With grouped queries a head is its W_Q, b_Q and W_O: keys and values belong to no head.
        parameters: full-size tensors by parameter name, as from `sampling.potential.inserter`, either
            of the model's own shapes or with a leading replica axis; then the batch that is run
            must be the replicas' batches, concatenated in order.

    Raises:
        ComponentError: `why_not_hooked`.
    """
    if (refusal := why_not_hooked(model, of)) is not None:
        raise ComponentError(f"{of.name!r} cannot be supplied by hooks: {refusal}")
    with ExitStack() as stack:
        for layer in sorted({layer for layer, _ in of.heads}):
            for handle in _hook_layer(model, layer, [head for at, head in of.heads if at == layer], parameters):
                stack.callback(handle.remove)
        yield


def _hook_layer(model: HookedTransformer, layer: int, heads: list[int], parameters: Mapping[str, Tensor]) -> list[Any]:
    """The handles of the hooks that supply these heads of a layer."""
    attn: Any = model.blocks[layer].attn
    change = {}  # by how much the parameters differ from the model's, Float[replica or 1, head, ...]
    for part, name in own_parameters(model, layer).items():
        own, given = model.get_parameter(name).detach(), parameters[name]
        change[part] = (given if given.ndim > own.ndim else given[None])[:, heads] - own[heads]
    at = torch.tensor(heads, device=attn.W_Q.device)
    seen: dict[str, Tensor] = {}

    def keep_inputs(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = dict(zip(("query_input", "key_input", "value_input"), args, strict=False)) | kwargs
        for letter, name in (("Q", "query_input"), ("K", "key_input"), ("V", "value_input")):
            seen[letter] = inputs[name]

    def move_read(letter: str) -> Callable[..., Tensor]:
        weight, bias = change[f"W_{letter}"], change[f"b_{letter}"]

        def hook(module: Any, args: Any, value: Tensor) -> Tensor:
            x = seen[letter]
            if x.ndim == 4:  # an input of its own for each head
                moved = torch.einsum("rbphd,rhde->rbphe", _by_replica(x[:, :, at], len(weight)), weight)
            else:
                moved = torch.einsum("rbpd,rhde->rbphe", _by_replica(x, len(weight)), weight)
            return value.index_add(2, at, (moved + bias[:, None, None]).flatten(0, 1))

        return hook

    def keep_z(module: Any, args: Any, z: Tensor) -> None:
        seen["z"] = _by_replica(z[:, :, at], len(change["W_O"]))

    def move_out(module: Any, args: Any, out: Tensor) -> Tensor:
        return out + torch.einsum("rbphe,rhed->rbpd", seen["z"], change["W_O"]).flatten(0, 1)

    def move_result(module: Any, args: Any, result: Tensor) -> Tensor:
        return result.index_add(2, at, torch.einsum("rbphe,rhed->rbphd", seen["z"], change["W_O"]).flatten(0, 1))

    handles = [
        attn.register_forward_pre_hook(keep_inputs, with_kwargs=True),
        attn.hook_z.register_forward_hook(keep_z),
        attn.hook_result.register_forward_hook(move_result, prepend=True)
        if model.cfg.use_attn_result
        else attn.register_forward_hook(move_out, prepend=True),
    ]
    for letter in "QKV":
        if f"W_{letter}" in change:
            point = getattr(attn, f"hook_{letter.lower()}")
            handles.append(point.register_forward_hook(move_read(letter), prepend=True))
    return handles


def _by_replica(value: Tensor, n_replicas: int) -> Tensor:
    return value.reshape(n_replicas, -1, *value.shape[1:])
