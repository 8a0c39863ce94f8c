"""The heads of a layer, all at once: what they do not move is computed once and shared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from mechgrok.components import HEAD_PARAMETERS
from mechgrok.config import Precision
from mechgrok.replicas import compiled
from mechgrok.replicas.blockwise import AT_ONCE, Blockwise, numbers_of_a_layer
from mechgrok.replicas.compiled import Passes
from mechgrok.replicas.cross_entropy import Frozen, cross_entropy, low_rank_cross_entropy
from mechgrok.replicas.network import Reads
from mechgrok.replicas.packing import Linear
from mechgrok.types import Examples


@dataclass(frozen=True)
class _Inputs:
    """What no head moves, for some examples of every chain, Float[chain, row, d_model].

    normalized: what the layer's attention reads, at all positions. resid: the residual stream after that
    attention, centred where LayerNorm centres it anyway, and z, Float[head, chain, row, d_head]: what each
    head put into it; both at the positions that are read afterwards. square, Float[head, chain, row]: the
    squared norm of the residual stream without that.
    """

    normalized: Tensor
    resid: Tensor
    z: Tensor
    square: Tensor


@dataclass(frozen=True)
class _Compiled:
    """The compiled passes and what is the same in each of their calls."""

    passes: Passes
    mlp: dict[str, Any]
    later: Sequence[compiled.Layer]
    readout: Linear
    before: Linear
    read: Linear | None
    before_read: Linear | None


class LayerHeads(Blockwise):
    """Losses and gradients of heads of one layer, for many chains, in one batch.

    Replicas are head-major: row h * n_chains + c of theta is the h-th head in chain c, and the heads of a
    chain share its batch. Frozen weights are shared, not copied, and only what lies downstream of a head
    is computed. A head of the last layer without MLP moves the logits through its own rank:
    base W_U + z (W_O W_U), with base W_U shared by all heads of a chain.

    Equal to `ModulePotential`, head by head, up to float32 rounding.

    Args:
        heads: numbers of heads in `layer`. memory: bytes; what is frozen is kept for all examples if that
            fits into half of it, and computed for each batch anew otherwise.
    """

    def __init__(
        self,
        model: HookedTransformer,
        examples: Examples,
        layer: int,
        heads: Sequence[int],
        memory: float,
        precision: Precision = "float32",
    ):
        super().__init__(model, examples, memory)
        self._layer, self._heads = layer, list(heads)
        own = {
            part: model.get_parameter(f"blocks.{layer}.attn.{part}").detach()[self._heads] for part in HEAD_PARAMETERS
        }
        self._shapes = [own[part].shape[1:] for part in HEAD_PARAMETERS]
        self.anchor = torch.cat([own[part].flatten(1) for part in HEAD_PARAMETERS], dim=1)
        self.anchor = self.anchor if len(self._heads) > 1 else self.anchor[0]
        self._before = self._centred(own["W_O"])
        self._ends_here = layer == model.cfg.n_layers - 1 and bool(model.cfg.attn_only)
        self._readout, self._bias = self._net.readout(self._net.frozen)
        self._before_readout = torch.matmul(self._before, self._readout) if self._ends_here else None
        self._compiled = self._compile(precision) if compiled.why_not(self._net, precision) is None else None
        cfg, n_queries = model.cfg, len(self._net.queries(layer))
        kept = self._net.n_pos * cfg.d_model + n_queries * (cfg.d_model + len(heads) * cfg.d_head)
        fits = self.n_examples * kept <= self._memory
        self._kept = self._run(self._all()) if fits else None

    def _compile(self, precision: Precision) -> "_Compiled":
        net, layers = self._net, range(self._layer + 1, self._net.cfg.n_layers)
        mlp = compiled.mlp_of(net, self._layer, net.frozen, moves=False)
        later = [compiled.layer_of(net, layer, net.frozen, moves=False) for layer in layers]
        readout = compiled.readout_of(net, net.frozen, moves=False)
        # What reads the residual stream next, if one map reads all its rows.
        read = mlp["mlp_in"] if mlp else (later[0].rest if later[0].q is None else None) if later else readout
        before = None if read is None else Linear(-torch.matmul(self._before, read.weight), back=False)
        return _Compiled(Passes(net, precision), mlp, later, readout, Linear(-self._before, back=False), read, before)

    def _numbers(self) -> int:
        if self._compiled is not None:  # activations take none
            return self._net.n_pos * (2 * self._net.cfg.d_model + self._net.cfg.d_head)
        n_later = self._net.cfg.n_layers - 1 - self._layer
        return numbers_of_a_layer(self._net, 1) + n_later * numbers_of_a_layer(self._net, self._net.cfg.n_heads)

    def _nats(self, theta: Tensor, index: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        net, layer, frozen = self._net, self._layer, self._net.frozen
        given = self._inputs(index)
        sizes = [shape.numel() for shape in self._shapes]
        parts = theta.view(len(self._heads), len(index), -1).split(sizes, dim=2)
        own = {
            name: part.unflatten(2, shape)
            for name, part, shape in zip(HEAD_PARAMETERS, parts, self._shapes, strict=True)
        }
        if self._compiled is not None:
            return self._compiled_nats(self._compiled, own, given, targets, weights)
        reads = self._reads({name: part.transpose(0, 1) for name, part in own.items()})
        z = net.heads(layer, given.normalized, reads, self._heads).flatten(0, 1)
        out = self._centred(own["W_O"]).flatten(0, 1)
        norm, readout, bias = net.norm("ln_final", frozen), self._readout, self._bias
        if self._before_readout is not None:
            scale = (self._square(z, out, given) / net.cfg.d_model + norm.eps).rsqrt() if norm.scaled else None
            still = Frozen(given.resid, readout[0], given.z.flatten(0, 1), self._before_readout)
            return low_rank_cross_entropy(z, torch.matmul(out, readout), scale, bias, still, targets, weights)
        resid = net.mlp(layer, torch.baddbmm(self._others(given).flatten(0, 1), z, out), frozen)
        for later in range(layer + 1, net.cfg.n_layers):
            resid = net.layer(later, resid, frozen)
        return cross_entropy(norm(resid), readout, bias, targets, weights)

    def _compiled_nats(
        self, by: "_Compiled", own: Mapping[str, Tensor], given: _Inputs, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        net, layer = self._net, self._layer
        each = {name: part.flatten(0, 1)[:, None] for name, part in own.items()}  # [replica, head, ...], one head each
        read = self._reads(each)
        out = self._centred(each["W_O"].squeeze(1))
        first = compiled.Layer(
            norm=net.norm(f"blocks.{layer}.ln1", net.frozen),
            q=None if read.q is None else Linear(*read.q, moves=True, back=False),
            rest=Linear(*read.rest, moves=True, back=False),
            out=Linear(out, moves=True),
            n_heads=1,
            scale=net.scale(layer),
            **by.mlp,
        )
        own_read = before_read = None
        if by.read is not None and self._rank_pays(given.z.shape[2]):
            # One product of all replicas' rows: torch would make one for each, and lay W out for each anew.
            through = torch.mm(out.flatten(0, 1), by.read.weight[0]).unflatten(0, out.shape[:2])
            own_read, before_read = Linear(through, moves=True), by.before_read
        heads = compiled.Heads(given.normalized, given.z.flatten(0, 1), by.before, own_read, before_read)
        return by.passes((first, *by.later), by.readout, given.resid, heads, len(out), targets, weights)

    def _reads(self, own: Mapping[str, Tensor]) -> Reads:
        """Of the heads' parameters, Float[replica, head, ...]."""
        net, layer = self._net, self._layer
        weights = {letter: own[f"W_{letter}"] for letter in "QKV"}
        biases = {
            letter: own[f"b_{letter}"][:, None] + net.positions(layer, letter, weight, net.frozen)
            for letter, weight in weights.items()
        }
        return net.reads(layer, weights, biases)

    def _rank_pays(self, n_rows: int) -> bool:
        """Whether reading a head through its rank saves more on these rows than W_O W and its gradient cost."""
        d_head, d_model = self._net.cfg.d_head, self._net.cfg.d_model
        return n_rows * (2 * d_model - 4 * d_head - d_model / len(self._heads)) > 8 * d_head * d_model

    def _others(self, given: _Inputs) -> Tensor:
        """The residual stream without a head's own former output, Float[head, chain, row, d_model]."""
        return given.resid - torch.matmul(given.z, self._before[:, None])

    def _square(self, z: Tensor, out: Tensor, given: _Inputs) -> Tensor:
        """|others + z W_O|^2, Float[replica, row], from products as narrow as a head.

        |others|^2 + z . (2 (resid W_O^T - z_before (W_O_before W_O^T)) + z (W_O W_O^T)).
        """
        per_head = out.unflatten(0, (len(self._heads), -1)).transpose(2, 3)  # [head, chain, d_model, d_head]
        along = torch.cat([torch.bmm(given.resid, own) for own in per_head])
        before = torch.matmul(given.z, torch.matmul(self._before[:, None], per_head)).flatten(0, 1)
        own = torch.bmm(z, torch.bmm(out, out.transpose(1, 2)))
        return given.square.flatten(0, 1) + (z * (2 * (along - before) + own)).sum(-1)

    def _centred(self, write: Tensor) -> Tensor:
        """Without the mean over d_model, if a LayerNorm stands before all that reads it."""
        return write - write.mean(-1, keepdim=True) if self._net.norm("ln_final", self._net.frozen).centred else write

    def _inputs(self, index: Tensor) -> _Inputs:
        if self._kept is None:
            return self._run(index)

        def rows(kept: Tensor) -> Tensor:
            """Float[1, row, d] of all examples -> Float[chain, row, d] of these."""
            return kept.view(self.n_examples, -1, kept.shape[-1])[index].flatten(1, 2)

        def of_heads(kept: Tensor) -> Tensor:
            return kept.view(len(self._heads), self.n_examples, -1, kept.shape[-1])[:, index].flatten(2, 3)

        return _Inputs(
            rows(self._kept.normalized),
            rows(self._kept.resid),
            of_heads(self._kept.z),
            of_heads(self._kept.square[..., None])[..., 0] if self._compiled is None else self._kept.square,
        )

    @torch.no_grad()
    def _run(self, index: Tensor) -> _Inputs:
        """The model itself on these examples, up to the end of the layer's attention."""
        net, block = self._net, f"blocks.{self._layer}"
        after = f"{block}.hook_resid_post" if net.cfg.attn_only else f"{block}.hook_resid_mid"
        found: dict[str, list[Tensor]] = {f"{block}.hook_resid_pre": [], f"{block}.attn.hook_z": [], after: []}

        def keep(value: Tensor, hook: HookPoint) -> None:
            found[str(hook.name)].append(value)

        for tokens in self._tokens[index.flatten()].split(AT_ONCE):
            net.model.run_with_hooks(tokens, stop_at_layer=self._layer + 1, fwd_hooks=[(name, keep) for name in found])
        before, z, resid = (torch.cat(values) for values in found.values())
        at, n_chains = net.queries(self._layer), len(index)
        z = z[:, at][:, :, self._heads].permute(2, 0, 1, 3).unflatten(1, (n_chains, -1))
        normalized = net.model.blocks[self._layer].ln1(before).unflatten(0, (n_chains, -1)).flatten(1, 2)
        resid, z = self._centred(resid[:, at]).unflatten(0, (n_chains, -1)).flatten(1, 2), z.flatten(2, 3).contiguous()
        square = z.new_zeros(z.shape[:3])  # of use where the network ends with this layer's heads
        if self._ends_here:
            for head, (own, before_head) in enumerate(zip(z, self._before, strict=True)):
                square[head] = (resid - torch.matmul(own, before_head)).square().sum(-1)
        return _Inputs(normalized, resid, z, square)
