"""The heads of a layer, all at once: what they do not move is computed once and shared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from mechgrok.components import HEAD_PARAMETERS
from mechgrok.config import Precision
from mechgrok.replicas import compiled
from mechgrok.replicas.blockwise import AT_ONCE, Blockwise, numbers_of_a_layer
from mechgrok.replicas.calls import Call, Direct, Heads, Layer
from mechgrok.replicas.compiled import Passes
from mechgrok.replicas.cross_entropy import Frozen, cross_entropy, low_rank_cross_entropy
from mechgrok.replicas.distinct import Distinct
from mechgrok.replicas.network import Norm, Reads
from mechgrok.replicas.packing import Linear
from mechgrok.replicas.products import padded
from mechgrok.replicas.side_by_side import Group, one_after_another, side_by_side
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
    norm: Norm
    scale: float
    mlp: dict[str, Any]
    later: Sequence[Layer]
    readout: Linear
    before: Linear
    read: Linear | None
    before_read: Linear | None


@dataclass(frozen=True)
class _Direct:
    """Of heads of a last layer with an MLP and no norms after them; see `calls.Direct`.

    neurons: W_out W_U, by which the logits read the neurons, with b_U + b_out W_U. kept: of all examples, if it fits.
    """

    neurons: Linear
    kept: Tensor | None


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
        loops: bool = True,
    ):
        super().__init__(model, examples, memory, loops)
        self._layer, self._heads = layer, list(heads)
        own = {
            part: model.get_parameter(f"blocks.{layer}.attn.{part}").detach()[self._heads] for part in HEAD_PARAMETERS
        }
        self._shapes = [own[part].shape[1:] for part in HEAD_PARAMETERS]
        self.anchor = torch.cat([own[part].flatten(1) for part in HEAD_PARAMETERS], dim=1)
        self.anchor = self.anchor if len(self._heads) > 1 else self.anchor[0]
        self._final = self._net.norm("ln_final", self._net.frozen)
        self._before = self._centred(own["W_O"])
        self._ends_here = layer == model.cfg.n_layers - 1 and bool(model.cfg.attn_only)
        self._readout, self._bias = self._net.readout(self._net.frozen)
        self._before_readout = torch.matmul(self._before, self._readout) if self._ends_here else None
        self._compiled = self._compile(precision) if compiled.why_not(self._net, precision) is None else None
        self._groups = ("QKV",) if len(self._net.queries(layer)) == self._net.n_pos else ("Q", "KV")
        self._shortformer = model.cfg.positional_embedding_type == "shortformer"
        alike = self._compiled is not None and layer == 0
        self._distinct = Distinct(self._net, self._tokens) if alike else None
        if self._distinct is not None:
            with torch.no_grad():
                self._begun_as = model.blocks[layer].ln1(self._distinct.embed(self._net.frozen))[0]
        cfg, n_queries = model.cfg, len(self._net.queries(layer))
        neurons = self._neurons()
        kept = self._net.n_pos * cfg.d_model + n_queries * (cfg.d_model + len(heads) * cfg.d_head)
        kept += 0 if neurons is None else n_queries * len(heads) * sum(self._widths())
        fits = self.n_examples * kept <= self._memory
        self._kept = self._run(self._all()) if fits else None
        if neurons is not None:
            self._direct: _Direct | None = _Direct(neurons, None if self._kept is None else self._besides(self._kept))
        else:
            self._direct = None
        self._logits = self._frozen_logits(self.n_examples * kept)

    def _compile(self, precision: Precision) -> "_Compiled":
        net, layers = self._net, range(self._layer + 1, self._net.cfg.n_layers)
        mlp = compiled.mlp_of(net, self._layer, net.frozen, moves=False)
        later = [compiled.layer_of(net, layer, net.frozen, moves=False) for layer in layers]
        readout = compiled.readout_of(net, net.frozen, moves=False)
        # What reads the residual stream next, if one map reads all its rows.
        read = mlp["mlp_in"] if mlp else (later[0].rest if later[0].q is None else None) if later else readout
        before = None if read is None else Linear(-torch.matmul(self._before, read.weight), back=False, plain=True)
        still = Linear(-self._before, back=False)
        norm, scale = net.norm(f"blocks.{self._layer}.ln1", net.frozen), net.scale(self._layer)
        return _Compiled(Passes(net, precision), norm, scale, mlp, later, readout, still, read, before)

    def _numbers(self) -> int:
        if self._compiled is not None:  # activations take none, and the residual stream is the same for all heads
            if self._kept is not None:
                return 6 * len(self._net.scored)  # losses, in float64 as well
            besides = 0 if self._direct is None else sum(self._widths())
            shared = 2 * self._net.cfg.d_model // len(self._heads)
            return self._net.n_pos * (shared + self._net.cfg.d_head + besides)
        n_later = self._net.cfg.n_layers - 1 - self._layer
        return numbers_of_a_layer(self._net, 1) + n_later * numbers_of_a_layer(self._net, self._net.cfg.n_heads)

    def _nats(self, theta: Tensor, index: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        if self._compiled is not None:
            nats, _ = self._passed(self._compiled, theta, index, targets, weights, back=False)
            return nats, nats.sum(1)  # of which nobody takes the gradient
        net, layer, frozen = self._net, self._layer, self._net.frozen
        sizes = [shape.numel() for shape in self._shapes]
        parts = theta.view(len(self._heads), len(index), -1).split(sizes, dim=2)
        own = {
            name: part.unflatten(2, shape)
            for name, part, shape in zip(HEAD_PARAMETERS, parts, self._shapes, strict=True)
        }
        given = self._inputs(index)
        reads = self._reads({name: part.transpose(0, 1) for name, part in own.items()})
        z = net.heads(layer, given.normalized, reads, self._heads).flatten(0, 1)
        out = self._centred(own["W_O"]).flatten(0, 1)
        norm, readout, bias = self._final, self._readout, self._bias
        if self._before_readout is not None:
            scale = (self._square(z, out, given) / net.cfg.d_model + norm.eps).rsqrt() if norm.scaled else None
            still = Frozen(given.resid, readout[0], given.z.flatten(0, 1), self._before_readout)
            readouts = torch.matmul(out, readout)
            return low_rank_cross_entropy(z, readouts, scale, bias, still, targets, weights, net.loops)
        resid = net.mlp(layer, torch.baddbmm(self._others(given).flatten(0, 1), z, out), frozen)
        for later in range(layer + 1, net.cfg.n_layers):
            resid = net.layer(later, resid, frozen)
        return cross_entropy(norm(resid), readout, bias, targets, weights, net.loops)

    def _differentiated(self, theta: Tensor, index: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        if self._compiled is None:
            return super()._differentiated(theta, index, targets, weights)
        nats, gradient = self._passed(self._compiled, theta, index, targets, weights, back=True)
        assert gradient is not None
        return nats, gradient

    @torch.no_grad()
    def _passed(
        self, by: "_Compiled", theta: Tensor, index: Tensor, targets: Tensor, weights: Tensor, back: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(nats, the gradient by theta if `back`) by the compiled passes, without torch's graph: for what is small its
        nodes take as long as what they do.
        """
        begun = None if self._distinct is None else self._distinct.of(index)
        pays = self._rank_pays(targets.shape[1])
        each, out = side_by_side(theta, self._net.cfg.d_model, self._net.cfg.d_head, self._groups)
        if self._shortformer:
            each = [self._placed(*group) for group in zip(self._groups, each, strict=True)]
        *q, rest = (Linear(*part, moves=True, back=False) for part in each)
        write = Linear(self._centred(out), moves=True, plain=True)
        first = Layer(by.norm, q[0] if q else None, rest, write, n_heads=1, scale=by.scale, **by.mlp)
        given, which = self._kept, index
        if given is None:
            given, which = self._run(index), torch.arange(index.numel()).view(index.shape)
        normalized = given.normalized if begun is None else self._begun_as[begun.rows]
        if self._direct is not None and pays:  # neurons and logits read the heads of this layer themselves
            kept = self._besides(given) if self._direct.kept is None else self._direct.kept
            write = replace(write, forward=False, back=False)
            layers: tuple[Layer, ...] = (replace(first, out=write, mlp_in=None, mlp_out=None),)
            readout = self._direct.neurons
            heads: Heads | Direct = Direct(normalized, by.mlp["mlp_in"], by.readout, kept, which)
        else:
            low = (by.read, by.before_read, self._logits) if pays else ()
            z = given.z.unflatten(2, (-1, len(self._net.queries(self._layer)))).flatten(1, 2)
            layers, readout, heads = (first, *by.later), by.readout, Heads(normalized, z, which, by.before, *low)
        call = Call(layers, readout, given.resid, heads, len(out), targets, weights, begun)
        nats, found = by.passes.run(call, [False] + [back] * 2 * (len(each) + 1))
        if not back:
            return nats, None
        *parts, dout = (part for part in found if part is not None)
        reads = list(zip(parts[::2], parts[1::2], strict=True))
        if self._shortformer:
            reads = [self._placed_back(*group) for group in zip(self._groups, reads, strict=True)]
        return nats, one_after_another(reads, self._centred(dout), self._groups)

    def _neurons(self) -> Linear | None:
        """W_out W_U with b_U + b_out W_U, if logits are to read neurons by them: no norm is in the way, and it is less
        than to go by the residual stream.
        """
        net, cfg = self._net, self._net.cfg
        if self._compiled is None or self._compiled.later or not self._compiled.mlp:
            return None
        if net.norm(f"blocks.{self._layer}.ln2", net.frozen).scaled or self._final.scaled:
            return None
        n_neurons, n_classes = self._compiled.mlp["mlp_in"].weight.shape[2], self._readout.shape[2]
        if n_neurons * n_classes > cfg.d_model * (n_neurons + n_classes):
            return None
        out, readout = self._compiled.mlp["mlp_out"], self._compiled.readout
        assert out.bias is not None and readout.bias is not None
        bias = torch.matmul(out.bias, readout.weight) + readout.bias
        return Linear(torch.matmul(out.weight, readout.weight), bias)

    def _frozen_logits(self, taken: int) -> Tensor | None:
        """What all heads share of the logits, of all examples, as `calls.Heads` has it: base W_U, if they read the
        heads next and it fits beside the numbers that are `taken`.
        """
        if self._compiled is None or not self._ends_here or self._kept is None:
            return None
        resid, width = self._kept.resid[0], padded(self._readout.shape[2])
        if taken + len(resid) * width > self._memory:
            return None
        logits = resid.new_zeros(len(resid), width)
        torch.mm(resid, self._readout[0], out=logits[:, : self._readout.shape[2]])
        return logits.unflatten(0, (self.n_examples, -1))

    def _widths(self) -> tuple[int, int]:
        """Of what is kept of a row: neurons and logits, padded."""
        return padded(self._net.cfg.d_mlp or 0), padded(self._readout.shape[2])

    def _besides(self, given: _Inputs) -> Tensor:
        """What neurons and logits read but for each head's output, Float[head, example, row, padded both]."""
        n_rows, by = len(self._net.queries(self._layer)), self._compiled
        n_neurons, n_logits = self._widths()
        assert by is not None
        kept = given.z.new_zeros(len(self._heads), given.resid.shape[0] * given.resid.shape[1], n_neurons + n_logits)
        bias = by.mlp["mlp_in"].bias[0]
        for reads, add, at in ((by.mlp["mlp_in"], bias, 0), (by.readout, 0.0, n_neurons)):
            shared = torch.matmul(given.resid.flatten(0, 1), reads.weight[0]) + add
            for head, before in enumerate(self._before):
                place = kept[head, :, at : at + shared.shape[1]]
                torch.sub(shared, torch.mm(given.z[head].flatten(0, 1), before @ reads.weight[0]), out=place)
        return kept.unflatten(1, (-1, n_rows))

    def _places(self, letters: str) -> tuple[Tensor, int]:
        """(shortformer's positions, which queries and keys read but not values; how many columns these are)."""
        at = self._net.queries(self._layer) if letters == "Q" else self._net.every
        return self._net.frozen["pos_embed.W_pos"][:, at], len(letters.rstrip("V")) * self._net.cfg.d_head

    def _placed(self, letters: str, group: Group) -> Group:
        """(weight, bias) with what they read of positions."""
        (positions, n), (weight, bias) = self._places(letters), group
        read = torch.matmul(positions, weight[..., :n])
        return weight, bias + torch.nn.functional.pad(read, (0, weight.shape[2] - n))

    def _placed_back(self, letters: str, gradients: Group) -> Group:
        """The gradients by weight and bias of `_placed` from those by its result."""
        (positions, n), (weight, bias) = self._places(letters), gradients
        weight[..., :n] += torch.matmul(positions.transpose(1, 2), bias[..., :n])
        return weight, bias.sum(1, keepdim=True)

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
        if self._direct is not None:
            return n_rows * (2 * d_model - 3 * d_head) > 2 * d_head * d_model
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
        return write - write.mean(-1, keepdim=True) if self._final.centred else write

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
            of_heads(self._kept.square[..., None])[..., 0],
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
