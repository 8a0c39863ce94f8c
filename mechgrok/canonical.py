"""One gauge for a transformer: the same function at fixed scales.

The localization of the sampler, gamma / 2 |w - w*|^2, is isotropic in the weights, so scales that the
function does not see would change its LLC.
"""

import copy
import re
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from mechgrok.errors import ConfigError
from mechgrok.plain import why_not_plain

_KNOWN = re.compile(
    r"embed\.W_E|pos_embed\.W_pos|ln_final\.[wb]|unembed\.[Wb]_U"
    r"|blocks\.\d+\.(ln[12]\.[wb]|attn\._?[Wb]_[QKVO]|mlp\.(W_gate|[Wb]_in|[Wb]_out))"
)
_NORM = re.compile(r"ln_final|blocks\.\d+\.ln[12]")
_WRITER = re.compile(r"embed\.W_E|blocks\.\d+\.(attn\.[Wb]_O|mlp\.[Wb]_out)")
# The two sides of each product inside a head.
_BALANCED = ((("W_Q", "b_Q"), ("W_K", "b_K")), (("W_V", "b_V"), ("W_O",)))

Values = dict[str, Tensor]
Readers = dict[str, list[str]]  # the norm's name -> the weights that read it


@torch.no_grad()
def canonicalize(model: HookedTransformer) -> HookedTransformer:
    """A copy of the model that computes the same function at fixed scales; the model itself is not touched.

    In this order, in float64:
    1. The gain w and bias b of each norm go into its readers: b_W <- b_W + b W, W <- diag(w) W; then
       w = 1, b = 0. With shortformer positions ln1 stays as it is, so its scale against W_pos is not fixed.
    2. Whatever writes to the residual stream is multiplied by s = 1 / rms of the row norms of W_E, and the
       eps of every norm by s^2; without norms the weights that read the stream are divided by s.
    3. In each head (W_Q, b_Q) and (W_K, b_K) get the same Frobenius norm, their geometric mean; so do
       (W_V, b_V) and W_O. A head with a zero on one side is left alone. Heads that share keys and values have one
       scale together, so there the queries, and the W_O, of all heads of a group are one side.

    Names, shapes and dtype stay, so component masks stay valid; running it again changes only rounding.
    eps is no parameter, so weights saved from the copy do not carry it. Only these scales are fixed: not, say,
    a ReLU neuron's W_in against its W_out, nor W_E's mean over d_model, which LayerNorm does not see.

    Raises:
        ConfigError: the model is no HookedTransformer, W_E is zero or not finite, or the steps do not fit a parameter
            or setting of the model.

    Source: ours.
    """
    _check(model)
    # Not TransformerLens' fold_ln: it changes the norm's type and drops its parameters.
    result = copy.deepcopy(model)
    values = {name: parameter.detach().double() for name, parameter in result.named_parameters()}
    readers = _readers(result, values)
    for norm, weights in readers.items():
        # Shortformer adds W_pos between ln1 and W_Q, W_K. All layers share it, so no gain can move past it.
        if not (norm.endswith("ln1") and result.cfg.positional_embedding_type == "shortformer"):
            _fold(values, norm, weights)
    _scale_residual_stream(result, values, readers)
    for layer in range(result.cfg.n_layers):
        for one, other in _BALANCED:
            sides = [[_in_attention(values, layer, leaf) for leaf in side] for side in (one, other)]
            _balance(values, *sides)
    for name, parameter in result.named_parameters():
        parameter.copy_(values[name])
    return result


def _check(model: HookedTransformer) -> None:
    if not isinstance(model, HookedTransformer):
        raise ConfigError(f"the canonical gauge is that of a HookedTransformer, got {type(model).__name__}")
    cfg = model.cfg
    wrong = [f"the parameter {name!r}" for name, _ in model.named_parameters() if not _KNOWN.fullmatch(name)]
    if cfg.is_layer_norm_activation():  # a norm inside the MLP
        wrong.append(f"act_fn {cfg.act_fn!r}")
    if cfg.clip_qkv is not None:  # clips q and k one by one, so their scales matter
        wrong.append("clip_qkv")
    if cfg.gated_mlp and cfg.normalization_type == "LN":  # the gate has no bias that could take up ln2's
        wrong.append("gated_mlp with LayerNorm biases")
    if (more := why_not_plain(model)) is not None:  # the gauge leaves the function of weights and cfg alone as it was
        wrong.append(f"more to it than weights and cfg: {more}")
    norms = [type(part) for name, part in model.named_modules() if _NORM.fullmatch(name)]
    if any((norm is torch.nn.Identity) == (cfg.normalization_type is not None) for norm in norms):
        wrong.append("norms at some places only")
    if wrong:
        raise ConfigError(f"there is no canonical gauge for a model with {wrong[0]}; leave canonicalize out")
    size = float(model.embed.W_E.double().norm())
    if not 0 < size < torch.inf:
        raise ConfigError(f"W_E has norm {size}, so it cannot set the scale of the model; leave canonicalize out")


def _in_attention(values: Values, layer: int, leaf: str) -> str:
    """The parameter's name; keys and values that heads share bear an underscore in TransformerLens."""
    shared = f"blocks.{layer}.attn._{leaf}"
    return shared if shared in values else f"blocks.{layer}.attn.{leaf}"


def _readers(model: HookedTransformer, values: Values) -> Readers:
    readers: Readers = {"ln_final": ["unembed.W_U"]}
    for layer in range(model.cfg.n_layers):
        block = f"blocks.{layer}"
        readers[f"{block}.ln1"] = [_in_attention(values, layer, f"W_{x}") for x in "QKV"]
        if not model.cfg.attn_only:
            readers[f"{block}.ln2"] = [f"{block}.mlp.W_{x}" for x in ["in"] + ["gate"] * model.cfg.gated_mlp]
    return readers


def _fold(values: Values, norm: str, weights: list[str]) -> None:
    if (bias := values.get(f"{norm}.b")) is not None:  # first, as the norm adds it after its gain
        for weight in weights:
            to = weight.replace("W_", "b_")
            values[to] = values[to] + bias @ values[weight]
        values[f"{norm}.b"] = torch.zeros_like(bias)
    if (gain := values.get(f"{norm}.w")) is not None:
        for weight in weights:
            values[weight] = gain[:, None] * values[weight]
        values[f"{norm}.w"] = torch.ones_like(gain)


def _scale_residual_stream(model: HookedTransformer, values: Values, readers: Readers) -> None:
    cfg = model.cfg
    s = float(values["embed.W_E"].square().sum(-1).mean().rsqrt())
    # Shortformer adds W_pos to what ln1 gives, which scales with the stream only if there is no norm.
    w_pos_scales = cfg.positional_embedding_type != "shortformer" or cfg.normalization_type is None
    for name in values:
        if _WRITER.fullmatch(name) or (name == "pos_embed.W_pos" and w_pos_scales):
            values[name] = s * values[name]
    if cfg.normalization_type is None:
        for weight in sum(readers.values(), []):
            values[weight] = values[weight] / s
        return
    norms: list[Any] = [model.get_submodule(norm) for norm in readers]
    for owner in [*norms, cfg]:
        owner.eps *= s**2  # x / sqrt(var x + eps) is unchanged by x -> s x exactly when eps -> s^2 eps


def _balance(values: Values, one: list[str], other: list[str]) -> None:
    n_groups = min(len(values[name]) for name in (*one, *other))  # heads, or what they share keys and values in
    first, second = (
        torch.cat([values[name].flatten(1) for name in side], 1).reshape(n_groups, -1).norm(dim=1)
        for side in (one, other)
    )
    factor = torch.where((first > 0) & (second > 0), (second / first).sqrt(), 1.0)
    for side, by in ((one, factor), (other, 1 / factor)):
        for name in side:
            of_heads = by.repeat_interleave(len(values[name]) // n_groups)
            values[name] = of_heads.view(-1, *[1] * (values[name].ndim - 1)) * values[name]
