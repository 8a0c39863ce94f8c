"""Names to components: "model", "L1", "L1H3", "L0.attn", "L0.mlp", "embed", "unembed", "L0H1+L1H3".

`embed`, the layers and `unembed` partition the parameters; so do a component and its complement.
A head is its slices of W_Q, W_K, W_V, W_O, b_Q, b_K, b_V; b_O belongs to no head, as all share it.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from mechgrok.errors import ComponentError
from mechgrok.types import Component

HEAD_PARAMETERS = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V")
_INDEX = "(0|[1-9][0-9]{0,8})"
HEAD_NAME = re.compile(f"L{_INDEX}H{_INDEX}")
_PREFIXES = {"embed": ("embed.", "pos_embed."), "unembed": ("ln_final.", "unembed.")}

Masks = dict[str, Tensor | None]
FwdHook = tuple[str, Callable[[Tensor, HookPoint], Tensor | None]]


def head_of(name: str) -> tuple[int, int]:
    """The (layer, head) of a name, (3, 1) of "L3H1". Raises ComponentError for another text."""
    match = HEAD_NAME.fullmatch(name)
    if match is None:
        raise ComponentError(f'a head reads "L0H3", got {name!r}; name its layer and its place there')
    return int(match[1]), int(match[2])


def head_layer(name: str) -> int:
    """The layer of a head by name."""
    return head_of(name)[0]


def component(model: HookedTransformer, name: str) -> Component:
    """The component that `name` means on this model.

    Raises:
        ComponentError: the model is no HookedTransformer; the name is malformed, names what the model lacks, repeats
            itself, or names a head of a model whose heads share keys and values (grouped-query attention).
    """
    if not isinstance(model, HookedTransformer):
        raise ComponentError(f"names such as {name!r} need a HookedTransformer, got {type(model).__name__}")
    masks: Masks = {}
    parts = name.split("+")
    heads = [(int(head[1]), int(head[2])) for head in map(HEAD_NAME.fullmatch, parts) if head]
    for part in parts:
        for at, mask in _part(model, part).items():
            masks[at] = _union(name, at, masks[at], mask) if at in masks else mask
    own = dict(model.named_parameters())
    n_params = sum(own[key].numel() if mask is None else int(mask.sum()) for key, mask in masks.items())
    return Component(name, masks, n_params, tuple(heads) if len(heads) == len(parts) else ())


def complement(model: HookedTransformer, of: Component) -> Component:
    """Every parameter entry that is not in `of`."""
    masks: Masks = {}
    for name, _parameter in model.named_parameters():
        if name not in of.masks:
            masks[name] = None
        elif (mask := of.masks[name]) is not None and not bool(mask.all()):
            masks[name] = ~mask
    n_params = sum(parameter.numel() for parameter in model.parameters()) - of.n_params
    return Component(f"not({of.name})", masks, n_params)


def head_names(model: HookedTransformer) -> list[str]:
    """Every head, layer by layer: the order of all head axes."""
    return [f"L{layer}H{head}" for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]


def expand_names(model: HookedTransformer, names: Sequence[str]) -> tuple[str, ...]:
    """The names with "heads" replaced by every head, each checked against the model."""
    if isinstance(names, str):
        raise ComponentError(f"components must be a sequence of names; for a single one write [{names!r}]")
    expanded = [one for name in names for one in (head_names(model) if name == "heads" else [name])]
    for name in expanded:
        component(model, name)
    return tuple(dict.fromkeys(expanded))


def head_hooks(model: HookedTransformer, of: Component, parameters: Mapping[str, Tensor]) -> list[FwdHook]:
    """Hooks for `model.run_with_hooks` that run the heads of `of` at other parameters.

    What the parameters change is *added* to the model's own activations: q += x (W_Q' - W_Q) +
    (b_Q' - b_Q), likewise k and v, and attn_out += z (W_O' - W_O). So at the model's own
    parameters the hooked logits equal the plain ones exactly, and a gradient reaches the heads
    alone. x is what the attention layer was given, after LayerNorm and positions.

    Args:
        parameters: full-size tensors by parameter name, as from `sampling.potential.inserter`, either
            of the model's own shapes or with a leading replica axis; then the batch that is run
            must be the replicas' batches, concatenated in order.

    Raises:
        ComponentError: `of` is not made of heads, or the architecture has no such hook points.
    """
    if not of.heads:
        raise ComponentError(f"hooks evaluate heads and unions of heads, not {of.name!r}")
    if model.cfg.use_split_qkv_input or model.cfg.use_attn_in or model.cfg.use_normalization_before_and_after:
        raise ComponentError("hooks need the plain attention input: unset use_split_qkv_input and use_attn_in")
    hooks: list[FwdHook] = []
    for layer in sorted({layer for layer, _ in of.heads}):
        hooks += _layer_hooks(model, layer, [h for at, h in of.heads if at == layer], parameters)
    return hooks


def _layer_hooks(
    model: HookedTransformer, layer: int, heads: list[int], parameters: Mapping[str, Tensor]
) -> list[FwdHook]:
    prefix = f"blocks.{layer}.attn"
    own = {name: model.get_parameter(f"{prefix}.{name}").detach() for name in HEAD_PARAMETERS}

    def delta(name: str) -> Tensor:
        """[replica, head, ...]: by how much the parameters differ from the model's."""
        given = parameters[f"{prefix}.{name}"]
        given = given if given.ndim > own[name].ndim else given.unsqueeze(0)
        return given[:, heads] - own[name][heads]

    seen: dict[str, Tensor] = {}

    def keep_input(resid: Tensor, hook: HookPoint) -> None:
        normalized = model.blocks[layer].ln1(resid)
        seen["v"] = normalized
        seen["q"] = seen["k"] = (
            normalized
            if model.cfg.positional_embedding_type != "shortformer"
            else (normalized + _shortformer_positions(model, normalized))
        )

    def moved(letter: str) -> Callable[[Tensor, HookPoint], Tensor]:
        weight, bias = delta(f"W_{letter.upper()}"), delta(f"b_{letter.upper()}")

        def hook_fn(own_value: Tensor, hook: HookPoint) -> Tensor:
            x = _by_replica(seen[letter], weight.shape[0])
            change = torch.einsum("rbpd,rhde->rbphe", x, weight) + bias[:, None, None]
            return own_value.index_add(2, torch.tensor(heads), change.flatten(0, 1))

        return hook_fn

    def keep_z(z: Tensor, hook: HookPoint) -> None:
        seen["z"] = z[:, :, heads]

    def move_out(attn_out: Tensor, hook: HookPoint) -> Tensor:
        weight = delta("W_O")
        z = _by_replica(seen["z"], weight.shape[0])
        return attn_out + torch.einsum("rbphe,rhed->rbpd", z, weight).flatten(0, 1)

    return [
        (f"blocks.{layer}.hook_resid_pre", keep_input),
        *((f"{prefix}.hook_{letter}", moved(letter)) for letter in "qkv"),
        (f"{prefix}.hook_z", keep_z),
        (f"blocks.{layer}.hook_attn_out", move_out),
    ]


def _by_replica(value: Tensor, n_replicas: int) -> Tensor:
    return value.reshape(n_replicas, -1, *value.shape[1:])


def _shortformer_positions(model: HookedTransformer, like: Tensor) -> Tensor:
    return model.pos_embed.W_pos[: like.shape[1]].detach()


def _part(model: HookedTransformer, part: str) -> Masks:
    names = [name for name, _ in model.named_parameters()]
    if part == "model":
        return dict.fromkeys(names)
    if part in _PREFIXES:
        return {name: None for name in names if name.startswith(_PREFIXES[part])}
    if head := HEAD_NAME.fullmatch(part):
        return _head(model, part, int(head[1]), int(head[2]))
    if layer := re.fullmatch(rf"L{_INDEX}(?:\.(attn|mlp))?", part):
        _check_index(part, "layer", int(layer[1]), model.cfg.n_layers)
        inside = {"attn": ("attn.", "ln1"), "mlp": ("mlp.", "ln2"), None: ("",)}[layer[2]]
        prefixes = tuple(f"blocks.{int(layer[1])}.{start}" for start in inside)
        selected: Masks = {name: None for name in names if name.startswith(prefixes)}
        if not selected:
            raise ComponentError(f"component {part!r} selects no parameter: this model is attention-only")
        return selected
    raise ComponentError(
        f"unknown component {part[:40]!r}; use model, embed, unembed, L0, L0.attn, L0.mlp, L0H1, or several joined by +"
    )


def _head(model: HookedTransformer, part: str, layer: int, head: int) -> Masks:
    cfg = model.cfg
    _check_index(part, "layer", layer, cfg.n_layers)
    _check_index(part, "head", head, cfg.n_heads)
    if cfg.n_key_value_heads is not None and cfg.n_key_value_heads != cfg.n_heads:
        raise ComponentError(
            f"{part!r}: this model's {cfg.n_heads} heads share {cfg.n_key_value_heads} keys and values "
            f"(grouped-query attention), so a head has no parameters of its own; use L{layer}.attn"
        )
    masks: Masks = {}
    for leaf in HEAD_PARAMETERS:
        name = f"blocks.{layer}.attn.{leaf}"
        mask = torch.zeros_like(model.get_parameter(name), dtype=torch.bool)
        mask[head] = True
        masks[name] = mask
    return masks


def _check_index(part: str, kind: str, index: int, count: int) -> None:
    if index >= count:
        raise ComponentError(f"{part!r}: the model has {count} {kind}s, numbered from 0 to {count - 1}")


def _union(name: str, parameter: str, first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None or bool((first & second).any()):
        raise ComponentError(f"the parts of {name!r} overlap in {parameter}; name each parameter once")
    return first | second
