"""HookedTransformer's layers as functions of parameters that may differ from replica to replica.

Every parameter is Float[replica or 1, ...]: with a leading 1 it is frozen and shared by all replicas,
never copied. Activations are Float[replica, row, ...], rows being an example's positions, one example
after another. LayerNorm's centring and gain are folded into the weights that read it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.components import LayerNorm, LayerNormPre
from transformer_lens.components.abstract_attention import AbstractAttention

from mechgrok.loops.kept import serves
from mechgrok.plain import why_not_plain
from mechgrok.replicas.attention import attend
from mechgrok.types import Examples

NEARLY_ALL = 0.9  # of the positions scored: the rest cost less than queries of their own, and count with a weight of 0
Parameters = Mapping[str, Tensor]  # full name -> Float[replica or 1, ...]

PLAIN = {
    "parallel_attn_mlp": False, "use_normalization_before_and_after": False, "use_qk_norm": False,
    "use_attention_sinks": False, "use_logn_attn": False, "use_local_attn": False, "use_dynamic_ntk_rope": False,
    "post_embedding_ln": False, "gated_mlp": False, "num_experts": None, "clip_qkv": None, "n_key_value_heads": None,
    "load_in_4bit": False, "output_logits_soft_cap": -1.0, "attn_scores_soft_cap": -1.0,
}  # fmt: skip


def why_not(model: HookedTransformer) -> str | None:
    """What in this model is not computed here, or None if all of it is: of its `cfg`, or besides (`mechgrok.plain`).

    Flags that only expose activations to hooks (`use_attn_result`, `use_split_qkv_input`, `use_attn_in`,
    `use_hook_mlp_in`) change nothing, as there are no hooks.
    """
    cfg = model.cfg
    for name, plain in PLAIN.items():
        if (value := getattr(cfg, name, plain)) != plain:
            return f"{name} = {value!r}"
    if cfg.positional_embedding_type not in ("standard", "rotary", "shortformer", "alibi"):
        return f"positional_embedding_type = {cfg.positional_embedding_type!r}"
    if cfg.is_layer_norm_activation():
        return f"act_fn = {cfg.act_fn!r}"
    if wrong := {own.dtype for own in model.parameters()} - {model.W_E.dtype} | {cfg.dtype} - {model.W_E.dtype}:
        return f"dtype = {min(map(str, wrong))} beside {model.W_E.dtype}"
    if str(cfg.original_architecture).startswith("Olmo"):  # norms at other places
        return f"original_architecture = {cfg.original_architecture!r}"
    if model.tokenizer is not None and model.tokenizer.padding_side == "left":  # masks of its own
        return "a tokenizer that pads on the left"
    return why_not_plain(model)


@dataclass(frozen=True)
class Norm:
    """What a normalization does: subtract the mean or not, divide by the root mean square or not, gain, offset."""

    centred: bool
    scaled: bool
    eps: float
    gain: Tensor | None
    offset: Tensor | None

    def kind(self) -> tuple[bool, bool, float]:
        """All but gain and offset."""
        return self.centred, self.scaled, self.eps

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """(weight, bias) that read the normalized activation as they read gain times it plus offset.

        weight: Float[replica or 1, d_model, m]; bias: Float[replica or 1, m].
        """
        if self.offset is not None:
            bias = bias + torch.matmul(self.offset[:, None], weight).squeeze(1)
        return (weight if self.gain is None else self.gain[:, :, None] * weight), bias

    def fold_heads(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The same for Float[replica or 1, head, d_model, d_head] and Float[replica or 1, pos or 1, head, d_head]."""
        if self.offset is not None:
            bias = bias + torch.einsum("rd,rhde->rhe", self.offset, weight)[:, None]
        return (weight if self.gain is None else self.gain[:, None, :, None] * weight), bias

    def inverse_rms(self, resid: Tensor) -> Tensor | None:
        """1 / root mean square of each row, Float[replica, row], of a residual stream that is centred already."""
        return (resid.square().mean(-1) + self.eps).rsqrt() if self.scaled else None

    def __call__(self, resid: Tensor) -> Tensor:
        """The normalized residual stream, without gain and offset."""
        if self.centred:
            return torch.nn.functional.layer_norm(resid, resid.shape[-1:], eps=self.eps)
        inverse = self.inverse_rms(resid)
        return resid if inverse is None else resid * inverse[..., None]


@dataclass(frozen=True)
class Reads:
    """(weight, bias) by which heads read the normalized residual stream, side by side: part, then head, then d_head.

    Float[replica or 1, d_model, m] and Float[replica or 1, pos or 1, m]. q is None where all positions are
    queries: then `rest` holds q, k and v, else k and v.
    """

    q: tuple[Tensor, Tensor] | None
    rest: tuple[Tensor, Tensor]


class Network:
    """The layers of one model on sequences whose losses are scored at some positions only.

    loops: whether compiled loops are used where they take the model's numbers, or torch's operations alone.
    """

    def __init__(self, model: HookedTransformer, examples: Examples, loops: bool = True):
        self.model, self.cfg = model, model.cfg
        self.n_pos = examples.tokens.shape[1]
        self.every = torch.arange(self.n_pos, device=examples.tokens.device)
        # The positions that any example scores; the last layer runs on no others, unless they are few.
        scored = (examples.weights > 0).any(0).nonzero().squeeze(1)
        self.scored = self.every if len(scored) > NEARLY_ALL * self.n_pos else scored
        self.frozen: Parameters = {name: value.detach()[None] for name, value in model.named_parameters()}
        self._modules = dict(model.named_modules())
        self.loops = loops and serves(self.frozen["embed.W_E"])
        self.keeps_patterns = not self.loops or self.cfg.positional_embedding_type == "alibi"
        self._frozen_qkv: dict[int, Reads] = {}

    def queries(self, layer: int) -> Tensor:
        """The positions that anything reads after this layer's attention."""
        return self.scored if layer == self.cfg.n_layers - 1 else self.every

    def norm(self, name: str, parameters: Parameters) -> Norm:
        module = self._modules.get(name, torch.nn.Identity())  # a model without norms has no ln_final at all
        return Norm(
            centred=isinstance(module, LayerNorm | LayerNormPre),
            scaled=not isinstance(module, torch.nn.Identity),
            eps=float(getattr(module, "eps", 0.0)),
            gain=parameters.get(f"{name}.w"),
            offset=parameters.get(f"{name}.b"),
        )

    def embed(self, tokens: Tensor, parameters: Parameters) -> Tensor:
        """The residual stream before the first layer, of tokens Int[replica, example, pos]."""
        resid = rows_of(parameters["embed.W_E"], tokens.flatten(1))
        if self.cfg.positional_embedding_type == "standard":
            resid = resid.unflatten(1, (-1, self.n_pos)) + parameters["pos_embed.W_pos"][:, None, : self.n_pos]
            return resid.flatten(1, 2)
        return resid

    def heads(self, layer: int, rows: Tensor, reads: Reads, which: Sequence[int] | None = None) -> Tensor:
        """z of heads that read these rows, Float[replica, row, d_model].

        Args:
            which: the heads' numbers, None for all of the layer.

        Returns:
            Float[replica, row, head * d_head] of all heads, Float[head, replica, row, d_head] of some.
        """
        apart, shape = which is not None, (self.cfg.n_heads if which is None else len(which), self.cfg.d_head)
        rest, q = linear(rows, *reads.rest).view(-1, self.n_pos, 3 if reads.q is None else 2, *shape), None
        if reads.q is not None:
            q = linear(self._at_queries(rows, layer), *reads.q).view(-1, len(self.scored), *shape)
        if self.cfg.positional_embedding_type == "rotary":
            q = None if q is None else self._rotate(q, layer, self.queries(layer))
            rest = torch.cat([self._rotate(rest[:, :, :-1], layer, self.every), rest[:, :, -1:]], dim=2)
        z = attend(q, rest, self.n_keys(layer), self.scale(layer), self._bias(layer, which, rest), apart, self.loops)
        if apart:
            return z.unflatten(1, (len(rows), -1)).flatten(2, 3)
        return z.flatten(2).unflatten(0, (len(rows), -1)).flatten(1, 2)

    def qkv(self, layer: int, parameters: Parameters) -> Reads:
        """How the model's own heads read, with the norm folded in."""
        if parameters is self.frozen and layer in self._frozen_qkv:
            return self._frozen_qkv[layer]
        norm, weights, biases = self.norm(f"blocks.{layer}.ln1", parameters), {}, {}
        for letter in "QKV":
            weight = parameters[f"blocks.{layer}.attn.W_{letter}"]
            bias = parameters[f"blocks.{layer}.attn.b_{letter}"][:, None]
            bias = bias + self.positions(layer, letter, weight, parameters)
            weights[letter], biases[letter] = norm.fold_heads(weight, bias)
        reads = self.reads(layer, weights, biases)
        if parameters is self.frozen:
            self._frozen_qkv[layer] = reads
        return reads

    def reads(self, layer: int, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor]) -> Reads:
        """Of Q, K, V -> Float[replica or 1, head, d_model, d_head] and Float[replica or 1, pos or 1, head, d_head]."""

        def side_by_side(letters: str) -> tuple[Tensor, Tensor]:
            weight = torch.stack(torch.broadcast_tensors(*(weights[letter] for letter in letters)), dim=1)
            bias = torch.stack(torch.broadcast_tensors(*(biases[letter] for letter in letters)), dim=2)
            return weight.permute(0, 3, 1, 2, 4).flatten(2), bias.flatten(2)

        if len(self.queries(layer)) == self.n_pos:
            return Reads(None, side_by_side("QKV"))
        return Reads(side_by_side("Q"), side_by_side("KV"))

    def positions(self, layer: int, letter: str, weight: Tensor, parameters: Parameters) -> Tensor | float:
        """What shortformer's positions add to queries and keys, Float[replica or 1, pos, head, d_head]; 0 elsewhere."""
        if self.cfg.positional_embedding_type != "shortformer" or letter == "V":
            return 0.0
        at = self.queries(layer) if letter == "Q" else self.every
        return torch.einsum("rpd,rhde->rphe", parameters["pos_embed.W_pos"][:, at], weight)

    def _rotate(self, split: Tensor, layer: int, at: Tensor) -> Tensor:
        """Float[example, pos, ..., head, d_head], turned by position."""
        cfg, attention = self.cfg, self._attention(layer)
        turned, rest = split.split([cfg.rotary_dim or 0, cfg.d_head - (cfg.rotary_dim or 0)], dim=-1)
        over_heads = (len(at), *[1] * (split.ndim - 3), -1)
        cos, sin = attention.rotary_cos[at].view(over_heads), attention.rotary_sin[at].view(over_heads)
        return torch.cat([turned * cos + attention.rotate_every_two(turned) * sin, rest], dim=-1)

    def scale(self, layer: int) -> float:
        """What scores are multiplied by."""
        return 1 / float(self._attention(layer).attn_scale)

    def n_keys(self, layer: int) -> Tensor:
        """How many keys each query sees, from the first on: Int[query]."""
        at = self.queries(layer)
        return at + 1 if self.cfg.attention_dir == "causal" else torch.full_like(at, self.n_pos)

    def _bias(self, layer: int, which: Sequence[int] | None, like: Tensor) -> Tensor | None:
        """What is added to the scores, Float[head, query, key]."""
        if self.cfg.positional_embedding_type != "alibi":
            return None
        bias = AbstractAttention.create_alibi_bias(self.cfg.n_heads, self.n_pos, "cpu").to(like)
        return bias[:, self.queries(layer)] if which is None else bias[list(which)][:, self.queries(layer)]

    def layer(self, layer: int, resid: Tensor, parameters: Parameters) -> Tensor:
        """The residual stream after a layer; after the last one at the scored positions only."""
        normalized = self.norm(f"blocks.{layer}.ln1", parameters)(resid)
        z = self.heads(layer, normalized, self.qkv(layer, parameters))
        resid = resid if len(self.queries(layer)) == self.n_pos else self._at_queries(resid, layer)
        prefix = f"blocks.{layer}.attn."
        resid = resid + linear(z, parameters[f"{prefix}W_O"].flatten(1, 2), parameters[f"{prefix}b_O"][:, None])
        return self.mlp(layer, resid, parameters)

    def mlp(self, layer: int, resid: Tensor, parameters: Parameters) -> Tensor:
        """The residual stream with what the MLP adds to it, if there is one."""
        if self.cfg.attn_only:
            return resid
        prefix, (weight, bias) = f"blocks.{layer}.mlp.", self.mlp_read(layer, parameters)
        normalized = self.norm(f"blocks.{layer}.ln2", parameters)(resid)
        active = self.model.blocks[layer].mlp.act_fn(linear(normalized, weight, bias[:, None]))
        return resid + linear(active, parameters[f"{prefix}W_out"], parameters[f"{prefix}b_out"][:, None])

    def mlp_read(self, layer: int, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """(W_in, b_in) as they read the normalized residual stream."""
        prefix = f"blocks.{layer}.mlp."
        norm = self.norm(f"blocks.{layer}.ln2", parameters)
        return norm.fold(parameters[f"{prefix}W_in"], parameters[f"{prefix}b_in"])

    def readout(self, parameters: Parameters) -> tuple[Tensor, Tensor]:
        """(W_U, b_U) as they read the normalized residual stream."""
        return self.norm("ln_final", parameters).fold(parameters["unembed.W_U"], parameters["unembed.b_U"])

    def _at_queries(self, rows: Tensor, layer: int) -> Tensor:
        return rows.unflatten(1, (-1, self.n_pos))[:, :, self.queries(layer)].flatten(1, 2)

    def _attention(self, layer: int) -> AbstractAttention:
        return self.model.blocks[layer].attn


def rows_of(table: Tensor, which: Tensor) -> Tensor:
    """Rows Int[replica, n] of Float[replica or 1, row, d]: Float[replica, n, d]."""
    first = torch.arange(len(which), device=which.device)[:, None] * (table.shape[1] if len(table) > 1 else 0)
    return torch.nn.functional.embedding(which + first, table.flatten(0, 1))


def linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """rows Float[replica, row, k] weight Float[replica or 1, k, m] + bias Float[replica or 1, pos or 1, m]."""
    return _Linear.apply(rows, weight, bias)


class _Linear(torch.autograd.Function):
    """The bias goes into the product's own memory, which torch's backward pass would answer with copies of it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.bias = bias.shape
        out = _product(rows, weight)
        out.view(len(out), -1, *bias.shape[1:]).add_(bias[:, None])
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        drows = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            drows = _product(dout, weight.transpose(1, 2))
        if ctx.needs_input_grad[1]:
            dweight = torch.bmm(rows.transpose(1, 2), dout)
        if ctx.needs_input_grad[2]:
            dbias = dout.unflatten(1, (-1, ctx.bias[1])).sum(1)
        return drows, *(_shared(part, n) for part, n in ((dweight, len(weight)), (dbias, ctx.bias[0])))


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    return torch.matmul(rows, weight[0]) if len(weight) == 1 else torch.bmm(rows, weight)


def _shared(gradient: Tensor | None, n: int) -> Tensor | None:
    """Of what all replicas share, the sum over them."""
    return gradient if gradient is None or len(gradient) == n else gradient.sum(0, keepdim=True)
