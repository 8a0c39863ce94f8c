"""`passes` as a function that torch differentiates: weights are packed, gradients given back."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from mechgrok.config import Precision
from mechgrok.loops.entry import below, holds
from mechgrok.loops.kept import flat, serves
from mechgrok.loops.lanes import HAS_AMX, HAS_VNNI
from mechgrok.replicas import passes
from mechgrok.replicas.calls import Call, Heads, Layer
from mechgrok.replicas.cross_entropy import nats_of
from mechgrok.replicas.distinct import Beginnings
from mechgrok.replicas.network import Network, Parameters
from mechgrok.replicas.packing import Layout, Linear
from mechgrok.replicas.plan import ROWS, Plan, make_plan, most_distinct
from mechgrok.replicas.products import padded
from mechgrok.reproducible import without_denormals

LARGEST = 2**22  # numbers that a block may have of one kind: more would not stay in a processor's last cache


def layer_of(net: Network, layer: int, parameters: Parameters, moves: bool) -> Layer:
    """A layer of the model at these parameters."""
    reads, prefix, cfg = net.qkv(layer, parameters), f"blocks.{layer}", net.cfg
    bias = parameters[f"{prefix}.attn.b_O"][:, None]
    return Layer(
        norm=net.norm(f"{prefix}.ln1", parameters),
        q=None if reads.q is None else Linear(*reads.q, moves),
        rest=Linear(*reads.rest, moves),
        out=Linear(parameters[f"{prefix}.attn.W_O"].flatten(1, 2), bias, moves),
        n_heads=cfg.n_heads,
        scale=net.scale(layer),
        **mlp_of(net, layer, parameters, moves),
    )


def readout_of(net: Network, parameters: Parameters, moves: bool) -> Linear:
    """W_U and b_U."""
    weight, bias = net.readout(parameters)
    return Linear(weight, bias[:, None], moves)


def mlp_of(net: Network, layer: int, parameters: Parameters, moves: bool) -> dict[str, Any]:
    """The MLP of a layer, as `Layer` takes it."""
    if net.cfg.attn_only:
        return {}
    prefix = f"blocks.{layer}.mlp"
    weight, bias = net.mlp_read(layer, parameters)
    return {
        "mlp_norm": net.norm(f"blocks.{layer}.ln2", parameters),
        "mlp_in": Linear(weight, bias[:, None], moves),
        "mlp_out": Linear(parameters[f"{prefix}.W_out"], parameters[f"{prefix}.b_out"][:, None], moves),
    }


def why_not(net: Network, precision: Precision = "float32") -> str | None:
    """What keeps this network, or its numbers, from the compiled passes; None if nothing does."""
    cfg = net.cfg
    largest = max(ROWS, net.n_pos) * max(cfg.d_vocab_out, cfg.n_heads * net.n_pos, cfg.d_mlp or 0)
    if not net.loops:
        return "loops are not wanted" if serves(net.frozen["embed.W_E"]) else "not float32 on the CPU"
    if precision == "bfloat16" and HAS_AMX:
        return "bfloat16's products are torch's on this processor"
    if cfg.positional_embedding_type not in ("standard", "shortformer"):
        return f"positional_embedding_type = {cfg.positional_embedding_type!r}"
    if not cfg.attn_only and cfg.act_fn != "relu":
        return f"act_fn = {cfg.act_fn!r}"
    return (
        None if largest <= LARGEST else f"{largest} logits, attention weights or neurons at once, of {LARGEST} at most"
    )


class Passes:
    """Runs the passes of one network; keeps what it has packed of it, and the room for what lies between.

    With precision "int16" the products of a pass that is differentiated are of int16s, but for attention's own, if the
    processor is fast at them; a loss that is only evaluated, as the baseline is, has float32's.
    """

    def __init__(self, net: Network, precision: Precision = "float32"):
        self.net, self.precision = net, precision
        self._plans: dict[Hashable, Plan] = {}
        self._still: dict[bool, tuple[list[Linear], Tensor]] = {}
        self._room = torch.zeros(0, dtype=torch.float32)
        self._n_keys = [net.n_keys(layer).float() for layer in (0, net.cfg.n_layers - 1)]

    def __call__(
        self,
        layers: Sequence[Layer],
        readout: Linear,
        resid: Tensor,
        n_replicas: int,
        targets: Tensor,
        weights: Tensor,
        begun: Beginnings | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(nats, total) as `cross_entropy` returns them, of every replica at the end of these layers.

        Args:
            resid: Float[chain or replica, row, d_model] before the first layer.
            targets, weights: [chain, row], at the scored positions.
            begun: where rows begin alike, as which. Then resid, of which each replica has its own in a chain of its
                own, is of the distinct ones, Float[replica, distinct row, d_model].
        """
        call = Call(tuple(layers), readout, resid, None, n_replicas, targets, weights, begun)
        moving = [part for linear in call.linears() if linear.moves for part in (linear.weight, linear.bias)]
        return _Run.apply(self, call, resid, *moving)

    def run(self, call: Call, wanted: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        """(nats, the gradients by resid and by weight and bias of each linear that moves, None where it is not wanted).

        They are of the sum of nats with the call's weights.
        """
        net, heads, begun = self.net, call.heads, call.begun
        linears, plan = call.linears(), self._plan(call, wanted)
        still = self._packed([linear for linear in linears if not linear.moves], plan.still)
        own = plan.own.pack([linear for linear in linears if linear.moves])
        gradients = torch.empty(sum(plan.sizes), dtype=torch.float32)
        dresid = gradients.new_empty((call.n_replicas, *call.resid.shape[1:]) if wanted[0] else 0)
        others, away = gradients.new_empty(2, call.n_replicas, call.targets.shape[1])
        nothing, none = gradients.new_empty(0), torch.empty(0, dtype=torch.int64)
        tensors = (
            net.scored, net.every, *self._n_keys, still, own,
            nothing if heads is None else heads.normalized, call.resid, none if begun is None else begun.which,
            heads.z if isinstance(heads, Heads) else nothing,
            nothing if heads is None or heads.kept is None else heads.kept, none if heads is None else heads.index,
            call.targets, call.weights, self._room_of(plan.room), others, away, gradients,
        )  # fmt: skip
        _check(call, plan, wanted, still, own, gradients, dresid)
        with without_denormals():
            passes.run(plan.record_of(begun), plan.layers, *flat(*tensors), dresid.view(-1).numpy())
        parts = zip(gradients.split(plan.sizes) if plan.sizes else (), plan.shapes, strict=False)
        each = [part.view(shape) if len(part) else None for part, shape in parts]
        return nats_of(others, away), [dresid if wanted[0] else None, *each]

    def _plan(self, call: Call, wanted: Sequence[bool]) -> Plan:
        """Made at the first call of a shape."""
        half = any(wanted) and self.precision == "int16" and HAS_VNNI
        shape = call.shape(), tuple(wanted), half, most_distinct(call.begun)
        if shape not in self._plans:
            self._plans[shape] = make_plan(self.net, call, wanted, half)
        return self._plans[shape]

    def _packed(self, linears: list[Linear], layout: Layout) -> Tensor:
        """What does not move, packed at the first call."""
        before, packed = self._still.get(layout.half, ([], None))
        if packed is None or [id(one) for one in before] != [id(one) for one in linears]:
            packed = layout.pack(linears)
            self._still[layout.half] = linears, packed
        return packed

    def _room_of(self, size: int) -> Tensor:
        """At least so many numbers, all of them finite or once computed from what was not."""
        if len(self._room) < size:
            self._room = torch.zeros(size, dtype=torch.float32)
        return self._room


def _check(
    call: Call, plan: Plan, wanted: Sequence[bool], still: Tensor, own: Tensor, gradients: Tensor, dresid: Tensor
) -> None:
    """Of what `passes.run` indexes, all that a call brings; see there for the shapes."""
    heads, begun, record, p = call.heads, call.begun, plan.record, "passes"
    n_chains, n_replicas, d_model = len(call.targets), call.n_replicas, int(record["d_model"])
    n_examples, n_pos, n_scored = (int(record[name]) for name in ("n_examples", "n_pos", "n_scored"))
    given, some = heads is not None, bool(call.layers) and call.layers[0].q is not None
    first_rows = n_scored if not call.layers or (given and some) else n_pos
    holds(p, still=(still, plan.still.size), own=(own, plan.own.size), gradients=(gradients, sum(plan.sizes)))
    scored = n_chains * n_examples * n_scored
    holds(p, targets=(call.targets, scored), weights=(call.weights, scored))
    below(p, targets=(call.targets, int(record["n_classes"])))
    if begun is not None:
        n = begun.rows.shape[1]
        rows = heads.normalized if heads is not None else call.resid
        holds(p, which=(begun.which, n_chains * n_examples * n_pos))
        holds(p, distinct=(rows, (n_chains if given else n_replicas) * n * d_model))
        below(p, which=(begun.which, n))
    if heads is not None:
        n_kept = heads.n_kept()
        holds(p, index=(heads.index, n_chains * n_examples))
        below(p, index=(heads.index, n_kept))
        if begun is None:
            holds(p, normalized=(heads.normalized, n_kept * n_pos * d_model))
        if isinstance(heads, Heads):
            n_rows, n_members = n_kept * first_rows, n_replicas // n_chains
            holds(p, z=(heads.z, n_members * n_rows * call.layers[0].out.weight.shape[1]))
            holds(p, resid=(call.resid, n_rows * d_model))
            if heads.kept is not None:
                holds(p, kept=(heads.kept, n_kept * n_scored * padded(int(record["n_classes"]))))
        else:
            width = padded(heads.read.weight.shape[2]) + padded(int(record["n_classes"]))
            holds(p, kept=(heads.kept, n_replicas // n_chains * n_kept * n_scored * width))
    elif begun is None:
        holds(p, resid=(call.resid, n_chains * n_examples * first_rows * d_model))
    if any(wanted) and not given and (wanted[0] or begun is not None):  # a distinct row's gradient is always written
        rows_back = begun.rows.shape[1] if begun is not None else n_examples * first_rows
        holds(p, dresid=(dresid, n_replicas * rows_back * d_model))


class _Run(torch.autograd.Function):
    """The gradients are made with the losses, while what they need is in the cache."""

    @staticmethod
    def forward(ctx: Any, by: Passes, call: Call, resid: Tensor, *moving: Tensor | None) -> tuple[Tensor, Tensor]:
        nats, ctx.gradients = by.run(call, ctx.needs_input_grad[2:])
        ctx.mark_non_differentiable(nats)
        return nats, (nats.unflatten(0, (-1, len(call.weights))) * call.weights).sum(2).flatten()

    @staticmethod
    def backward(ctx: Any, _: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        if bool((dtotal == 1).all()):  # as in sampling, where copies of what is as large as all weights would count
            # Views of their own: torch takes what it is given as its own, and has ended in a crash with what ctx holds.
            return None, None, *(None if one is None else one.view_as(one) for one in ctx.gradients)
        by = dtotal[:, None, None]
        return None, None, *(None if gradient is None else gradient * by for gradient in ctx.gradients)
