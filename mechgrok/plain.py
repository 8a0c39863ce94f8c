"""Does a HookedTransformer compute what its weights and `cfg` say, and nothing else? Whoever relies on it asks here.

A model may carry hooks, a forward of its own, another MLP, a parameter in two places. All of that is the user's model,
and whoever reads weights and `cfg` alone would compute another function.
"""

from collections.abc import Iterator

import torch
from torch.nn.modules import module as torch_module
from transformer_lens import HookedTransformer, components
from transformer_lens.components.mlps.gated_mlp import GatedMLP
from transformer_lens.components.mlps.mlp import MLP
from transformer_lens.factories.activation_function_factory import ActivationFunctionFactory
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.typed_module_list import TypedModuleList

# Exact types, and the parameters that each has by itself.
_PARAMETERS: dict[type[torch.nn.Module], frozenset[str]] = {
    HookedTransformer: frozenset(),
    TypedModuleList: frozenset(),
    torch.nn.Identity: frozenset(),
    HookPoint: frozenset(),
    components.TransformerBlock: frozenset(),
    components.Embed: frozenset({"W_E"}),
    components.PosEmbed: frozenset({"W_pos"}),
    components.Unembed: frozenset({"W_U", "b_U"}),
    components.Attention: frozenset({"W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"}),
    components.GroupedQueryAttention: frozenset({"W_Q", "_W_K", "_W_V", "W_O", "b_Q", "_b_K", "_b_V", "b_O"}),
    MLP: frozenset({"W_in", "b_in", "W_out", "b_out"}),
    GatedMLP: frozenset({"W_gate", "W_in", "b_in", "W_out", "b_out"}),
    components.LayerNorm: frozenset({"w", "b"}),
    components.LayerNormPre: frozenset(),
    components.RMSNorm: frozenset({"w"}),
    components.RMSNormPre: frozenset(),
}
_NORMS = (
    components.LayerNorm, components.LayerNormPre, components.RMSNorm, components.RMSNormPre, torch.nn.Identity,
)  # fmt: skip
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def why_not_plain(model: torch.nn.Module) -> str | None:
    """What makes this model more, or other, than its weights and `cfg`; None if nothing does.

    Held against exact types, as a subclass may compute anything: no hooks but those that expose activations, no forward
    or other method replaced on an object, every part and every parameter where it belongs and there alone.
    """
    if type(model) not in _PARAMETERS or not isinstance(model, HookedTransformer):
        return f"it is a {type(model).__name__}, not a HookedTransformer itself"
    return next(_misplaced(model), None) or next(_oddities(model), None) or tied(model)


def is_untouched(model: torch.nn.Module) -> bool:
    """Whether all parts are of known types, with their own forward and without hooks: a quick look, for each call."""
    if any(getattr(torch_module, f"_global{kind}") for kind in _HOOKS):
        return False
    for part in model.modules():
        own = vars(part)
        if type(part) not in _PARAMETERS or "forward" in own or any(own[kind] for kind in _HOOKS):
            return False
    return True


def tied(module: torch.nn.Module) -> str | None:
    """The first parameter that is in two places, in words; None if each is in one."""
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            return f"{name} is {first[id(parameter)]}"
        first[id(parameter)] = name
    return None


def _hooked(model: torch.nn.Module) -> Iterator[str]:
    for kind in _HOOKS:
        if getattr(torch_module, f"_global{kind}"):
            yield "hooks on all modules"
    for name, part in model.named_modules():
        if any(vars(part)[kind] for kind in _HOOKS):
            yield f"hooks on {name or 'the model'}"


def _misplaced(model: HookedTransformer) -> Iterator[str]:
    """Parts that are of another type than their place is for."""
    cfg, grouped = model.cfg, model.cfg.n_key_value_heads is not None
    attention = components.GroupedQueryAttention if grouped else components.Attention
    places: dict[str, tuple[type[torch.nn.Module], ...]]
    places = {"embed": (components.Embed,), "pos_embed": (components.PosEmbed,), "unembed": (components.Unembed,)}
    places |= {"ln_final": _NORMS, "blocks": (TypedModuleList,)}
    for layer in range(cfg.n_layers):
        block = f"blocks.{layer}"
        places |= {block: (components.TransformerBlock,), f"{block}.attn": (attention,), f"{block}.ln1": _NORMS}
        if not cfg.attn_only:
            places |= {f"{block}.mlp": (GatedMLP if cfg.gated_mlp else MLP,), f"{block}.ln2": _NORMS}
            if cfg.is_layer_norm_activation():
                places[f"{block}.mlp.ln"] = _NORMS
    parts = {name: part for name, part in model.named_modules(remove_duplicate=False) if name}
    for name, part in parts.items():
        if name in places and type(part) not in places[name]:
            yield f"{name} is a {type(part).__name__}"
        if name not in places and type(part) is not HookPoint:
            yield f"{name} is a {type(part).__name__} that `cfg` does not tell of"
    optional = {"ln_final"} | ({"pos_embed"} if cfg.positional_embedding_type in ("rotary", "alibi") else set())
    for name in places.keys() - parts.keys() - optional:
        yield f"{name} is missing"


def _oddities(model: HookedTransformer) -> Iterator[str]:
    """What does not show in the types of the parts."""
    yield from _hooked(model)
    act_fn = None if model.cfg.attn_only else ActivationFunctionFactory.pick_activation_function(model.cfg)
    for name, part in model.named_modules():
        at = name or "the model"
        if replaced := [key for key in vars(part) if callable(getattr(type(part), key, None))]:
            yield f"{at} has a {replaced[0]} of its own"
        if vars(part)["_parameters"].keys() != _PARAMETERS[type(part)]:
            yield f"{at} has other parameters than a {type(part).__name__}"
        if isinstance(part, MLP | GatedMLP) and part.act_fn is not act_fn:
            yield f"{at} has another act_fn than {model.cfg.act_fn}"
        if isinstance(part, components.AbstractAttention) and part._attention_dir_override not in (
            None, model.cfg.attention_dir,
        ):  # fmt: skip
            yield f"{at} attends in another direction than {model.cfg.attention_dir}"
