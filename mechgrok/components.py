"""Names to components: "model", "L1", "L1H3", "L0.attn", "L0.mlp", "embed", "unembed", "L0H1+L1H3".

`embed`, the layers and `unembed` partition the parameters; so do a component and its complement. A parameter that is in
two places counts to the first of them, and moves in both.
A head is its slices of W_Q, W_K, W_V, W_O, b_Q, b_K, b_V; b_O belongs to no head, as all share it. Where heads share
keys and values (grouped-query attention), these belong to no head either: a head is its W_Q, b_Q and W_O.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from mechgrok.errors import ComponentError
from mechgrok.types import Component

HEAD_PARAMETERS = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V")
_INDEX = "(0|[1-9][0-9]{0,8})"
HEAD_NAME = re.compile(f"L{_INDEX}H{_INDEX}")
_PREFIXES = {"embed": ("embed.", "pos_embed."), "unembed": ("ln_final.", "unembed.")}

Masks = dict[str, Tensor | None]


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
            itself, or names what has no parameters of its own: a head, say, whose W_Q is that of another layer.
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
            raise ComponentError(f"component {part!r} selects no parameter: {_why_empty(model, prefixes)}")
        return selected
    raise ComponentError(
        f"unknown component {part[:40]!r}; use model, embed, unembed, L0, L0.attn, L0.mlp, L0H1, or several joined by +"
    )


def own_parameters(model: HookedTransformer, layer: int) -> dict[str, str]:
    """The parameters of which each head of a layer has a slice of its own, part -> full name: "W_K" -> "..._W_K".

    Grouped-query attention calls its keys and values _W_K and so on; where heads share them, no head owns any.
    """
    cfg, shared = model.cfg, ("W_K", "W_V", "b_K", "b_V")
    grouped = cfg.n_key_value_heads is not None
    owned = [part for part in HEAD_PARAMETERS if cfg.n_key_value_heads in (None, cfg.n_heads) or part not in shared]
    return {part: f"blocks.{layer}.attn.{'_' if grouped and part in shared else ''}{part}" for part in owned}


def _head(model: HookedTransformer, part: str, layer: int, head: int) -> Masks:
    cfg, own = model.cfg, dict(model.named_parameters())
    _check_index(part, "layer", layer, cfg.n_layers)
    _check_index(part, "head", head, cfg.n_heads)
    masks: Masks = {}
    for name in own_parameters(model, layer).values():
        if name not in own:
            raise ComponentError(
                f"{part!r} has no {name} of its own: it is shared with another part of the model, is made of other "
                "parameters, or is not there; give the parameters that you mean as a dict of masks"
            )
        if len(own[name]) != cfg.n_heads:
            raise ComponentError(f"{part!r}: {name} has {len(own[name])} slices, and the model {cfg.n_heads} heads")
        mask = torch.zeros_like(own[name], dtype=torch.bool)
        mask[head] = True
        masks[name] = mask
    return masks


def _why_empty(model: HookedTransformer, prefixes: tuple[str, ...]) -> str:
    every = dict(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    if shared := [name for name in every if name.startswith(prefixes)]:
        return f"{shared[0]} is {first[id(every[shared[0]])]}, and so on; name the part that they are counted to"
    return "this model is attention-only" if model.cfg.attn_only else "it has none"


def _check_index(part: str, kind: str, index: int, count: int) -> None:
    if index >= count:
        raise ComponentError(f"{part!r}: the model has {count} {kind}s, numbered from 0 to {count - 1}")


def _union(name: str, parameter: str, first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None or bool((first & second).any()):
        raise ComponentError(f"the parts of {name!r} overlap in {parameter}; name each parameter once")
    return first | second
