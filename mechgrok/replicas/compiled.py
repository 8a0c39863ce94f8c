"""`passes` as a function that torch differentiates: weights are packed, records filled, gradients given back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechgrok.config import Precision
from mechgrok.loops.kept import flat, serves
from mechgrok.loops.lanes import HAS_AMX, HAS_VNNI, WIDTH
from mechgrok.replicas import passes
from mechgrok.replicas.cross_entropy import nats_of
from mechgrok.replicas.distinct import Beginnings
from mechgrok.replicas.loss import IN_FIRST_CACHE
from mechgrok.replicas.network import Network, Norm, Parameters
from mechgrok.replicas.packing import Linear, Packed, fill
from mechgrok.replicas.pairs import PANEL, row_of_pairs, rows_of_pairs
from mechgrok.reproducible import without_denormals

ROWS = 96  # of the residual stream at once, or those of one example if it has more
# Logits at once: with as many weights they stay in a core's second cache. Not a power of two: the columns of 128 rows
# of 256 would fall on the same few lines of the first.
LOGITS = 30720
LARGEST = 2**22  # numbers that a block may have of one kind: more would not stay in a processor's last cache


@dataclass(frozen=True)
class Layer:
    """What a layer computes with, heads side by side as in `network.Reads`. out: W_O and b_O. scale: of the scores."""

    norm: Norm
    q: Linear | None
    rest: Linear
    out: Linear
    n_heads: int
    scale: float
    mlp_norm: Norm | None = None
    mlp_in: Linear | None = None
    mlp_out: Linear | None = None


@dataclass(frozen=True)
class Heads:
    """Where heads of the first layer stand in for the model's own.

    normalized: what they read, Float[chain, row, d_model]. z: of the model's own, Float[replica, row, d_head].
    before: -W_O of those, Float[head, d_head, d_model].

    What reads the residual stream next sees a head through its own rank: the MLP of the layer, or q, k, v of the next,
    or the readout. read: W by which it reads, None where the rank is of no use; before_read: -W_O W before.

    kept: where that is the readout, the logits of resid but for their bias, Float[example, scored, padded n_classes],
    of some examples; index: which of those the batch has, Int[chain, example].
    """

    normalized: Tensor
    z: Tensor
    before: Linear
    read: Linear | None = None
    before_read: Linear | None = None
    kept: Tensor | None = None
    index: Tensor | None = None


@dataclass(frozen=True)
class Direct:
    """The same where neurons and logits read heads of a last layer and no norm stands before them; see `direct`.

    read, logits: W_in and W_U. kept: what is read besides, but for the logits' bias, of
    each head and some examples, Float[head, example, scored, padded d_mlp + padded n_classes]. index: which of those
    the batch has, Int[chain, example]. The readout that goes with it reads the neurons.
    """

    normalized: Tensor
    read: Linear
    logits: Linear
    kept: Tensor
    index: Tensor


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
    if not serves(net.frozen["embed.W_E"]):
        return "not float32 on the CPU"
    if precision == "bfloat16" and HAS_AMX:
        return "bfloat16's products are torch's on this processor"
    if cfg.positional_embedding_type not in ("standard", "shortformer"):
        return f"positional_embedding_type = {cfg.positional_embedding_type!r}"
    if not cfg.attn_only and cfg.act_fn != "relu":
        return f"act_fn = {cfg.act_fn!r}"
    return (
        None if largest <= LARGEST else f"{largest} logits, attention weights or neurons at once, of {LARGEST} at most"
    )


LINEARS = ("q", "rest", "out", "mlp_in", "mlp_out")


class Passes:
    """Runs the passes of one network; keeps what it has packed of it, and the room for what lies between.

    With precision "int16" the products of a pass that is differentiated are of int16s, but for attention's own, if the
    processor is fast at them; a loss that is only evaluated, as the baseline is, has float32's.
    """

    def __init__(self, net: Network, precision: Precision = "float32"):
        self.net, self.precision = net, precision
        self._still = {half: Packed([]) for half in (False, True)}
        self._room = torch.zeros(0)

    def __call__(
        self,
        layers: Sequence[Layer],
        readout: Linear,
        resid: Tensor,
        heads: Heads | Direct | None,
        n_replicas: int,
        targets: Tensor,
        weights: Tensor,
        begun: Beginnings | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(nats, total) as `cross_entropy` returns them, of every replica at the end of these layers.

        Args:
            resid: Float[chain or replica, row, d_model] before the first layer; with `heads` after its attention, at
                the positions that are read afterwards. Of no use where these are `Direct`.
            targets, weights: [chain, row], at the scored positions.
            begun: where rows begin alike, as which. Then what heads read, or else resid, of which each replica has its
                own in a chain of its own, are the distinct ones, Float[chain, distinct row, d_model].
        """
        job = _Job(self, tuple(layers), readout, resid, heads, n_replicas, targets, weights, begun)
        moving = [part for linear in job.linears() if linear.moves for part in (linear.weight, linear.bias)]
        return _Run.apply(job, resid, *moving)

    def still(self, linears: list[Linear], half: bool) -> Packed:
        """What does not move, packed at the first call."""
        if not self._still[half].holds(linears):
            self._still[half] = Packed(linears, half=half)
        return self._still[half]

    def room(self, size: int) -> Tensor:
        """At least so many numbers, all of them finite or once computed from what was not."""
        if len(self._room) < size:
            self._room = torch.zeros(size)
        return self._room


@dataclass(frozen=True)
class _Job:
    """One call of `Passes`."""

    by: Passes
    layers: tuple[Layer, ...]
    readout: Linear
    resid: Tensor
    heads: Heads | Direct | None
    n_replicas: int
    targets: Tensor
    weights: Tensor
    begun: Beginnings | None

    def linears(self) -> list[Linear]:
        """Each that is there, once."""
        found = [getattr(layer, name) for layer in self.layers for name in LINEARS] + [self.readout]
        if isinstance(self.heads, Heads):
            found += [self.heads.before, self.heads.before_read]
        if isinstance(self.heads, Direct):
            found += [self.heads.read, self.heads.logits]
        return [linear for linear in found if linear is not None]

    def composed(self) -> dict[str, Linear]:
        """W_O W for each W that reads heads through their rank, by its name in `passes.PASS`."""
        heads = self.heads
        if isinstance(heads, Direct):
            return {"own_read": self._made(1, heads.read), "own_logits": self._made(1, heads.logits)}
        if heads is None or heads.read is None:
            return {}
        return {"own_read": self._made(1, heads.read), "both": self._made(2, heads.read, back=False)}

    def _made(self, n: int, reads: Linear, back: bool = True) -> Linear:
        """Such a matrix, or n of them above one another."""
        shape = self.n_replicas, n * self.layers[0].out.weight.shape[1], reads.weight.shape[2]
        return Linear(torch.empty(shape, device="meta"), moves=True, back=back, made=True)


class _Run(torch.autograd.Function):
    """The gradients are made with the losses, while what they need is in the cache."""

    @staticmethod
    def forward(ctx: Any, job: _Job, resid: Tensor, *moving: Tensor | None) -> tuple[Tensor, Tensor]:
        n_chains = len(job.weights)
        nats, ctx.gradients = _run(job, moving, ctx.needs_input_grad[1:])
        ctx.mark_non_differentiable(nats)
        return nats, (nats.unflatten(0, (-1, n_chains)) * job.weights).sum(2).flatten()

    @staticmethod
    def backward(ctx: Any, _: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        if bool((dtotal == 1).all()):  # as in sampling, where copies of what is as large as all weights would count
            # Views of their own: torch takes what it is given as its own, and has ended in a crash with what ctx holds.
            return None, *(None if one is None else one.view_as(one) for one in ctx.gradients)
        by = dtotal[:, None, None]
        return None, *(None if gradient is None else gradient * by for gradient in ctx.gradients)


def _run(job: _Job, moving: Sequence[Tensor | None], wanted: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
    """(nats, the gradients by resid and by each moving part, None where it is not wanted)."""
    net, heads, n_replicas = job.by.net, job.heads, job.n_replicas
    linears, composed = job.linears(), job.composed()
    moves = [linear for linear in linears if linear.moves]
    half = any(wanted) and job.by.precision == "int16" and HAS_VNNI
    still = job.by.still([linear for linear in linears if not linear.moves], half)
    own = Packed([*moves, *composed.values()], n_replicas, half)
    # Gradients lie one after another, in the order of what moves.
    shapes = [
        torch.Size((n_replicas, *part.shape[1:])) if want and part is not None else torch.Size((0,))
        for part, want in zip(moving, wanted[1:], strict=True)
    ]
    shapes += [linear.weight.shape if any(wanted) and linear.back else torch.Size((0,)) for linear in composed.values()]
    sizes = [shape.numel() for shape in shapes]
    begins = iter(at if size else -1 for at, size in zip(np.cumsum([0, *sizes]).tolist(), sizes, strict=False))
    for linear in moves:
        own.places[id(linear)].update(dweight=next(begins), dbias=next(begins))
    for linear in composed.values():
        own.places[id(linear)]["dweight"] = next(begins)
    gradients = torch.empty(sum(sizes))
    dresid = torch.empty((n_replicas, *job.resid.shape[1:]) if wanted[0] else 0)
    # Of heads that are read directly only the scored rows are wide.
    n_wide = len(net.scored) if isinstance(heads, Direct) else net.n_pos
    room = _Room(_at_once(n_wide), net)
    most = max(room.rows, net.cfg.d_head)
    widest = max(max(linear.weight.shape[1:]) for linear in linears)
    spare = room.put(2 * max(rows_of_pairs(most) * widest, most * row_of_pairs(widest)) if half else 0)
    places = {linear: place | {"spare": spare} for linear, place in (still.places | own.places).items()}
    layers = np.array([_layer(layer, places, room) for layer in job.layers], passes.LAYER)
    record = _pass(job, composed, places, room, half)
    record["backward"], record["back_to_start"] = any(wanted), wanted[0]
    space = job.by.room(room.size)
    found = n_replicas, job.targets.shape[1]
    others, away = torch.empty(found), torch.empty(found)
    nothing = torch.empty(0)
    x = nothing if heads is None else heads.normalized
    z = heads.z if isinstance(heads, Heads) else nothing
    kept = nothing if heads is None or heads.kept is None else heads.kept
    index = torch.empty(0, dtype=torch.int64) if heads is None or heads.index is None else heads.index
    keys = (net.n_keys(layer).float() for layer in (0, net.cfg.n_layers - 1))
    which = torch.empty(0, dtype=torch.int64) if job.begun is None else job.begun.which
    tensors = (
        net.scored, net.every, *keys, still.flat, own.flat, x, job.resid, which, z, kept, index,
        job.targets, job.weights, space, others, away, gradients,
    )  # fmt: skip
    with without_denormals():
        passes.run(record[()], layers, *flat(*tensors), dresid.view(-1).numpy())
    parts = gradients.split(sizes) if sizes else ()
    each = [part.view(shape) if len(part) else None for part, shape in zip(parts, shapes, strict=True)][: len(moving)]
    return nats_of(others, away), [dresid if wanted[0] else None, *each]


def _at_once(n_pos: int) -> int:
    """How many examples make up `ROWS`; a multiple of 8 if many, as products take eight rows at a time."""
    n = max(1, round(ROWS / n_pos))
    return n if n < 8 else n // 8 * 8


class _Room:
    """Places for arrays behind one another, each with sixteen numbers to spare; how many rows a block has."""

    def __init__(self, at_once: int, net: Network):
        self.at_once, self.net, self.size = at_once, net, 0
        self.rows = at_once * net.n_pos

    def put(self, n: int) -> int:
        at = self.size
        self.size += (n // WIDTH + 2) * WIDTH
        return at

    def fill(self, record: Any, **sizes: int) -> None:
        for name, n in sizes.items():
            record[name] = self.put(n)


def _layer(layer: Layer, places: Mapping[int, dict[str, int]], room: _Room) -> Any:
    """A record of `passes.LAYER`, with places for its activations."""
    cfg, rows = room.net.cfg, room.rows
    record = np.zeros((), passes.LAYER)
    _norm(record["norm"], layer.norm)
    _norm(record["mlp_norm"], layer.mlp_norm)
    for name in LINEARS:
        fill(record[name], getattr(layer, name), places)
    record["n_heads"], record["d_head"], record["scale"] = layer.n_heads, cfg.d_head, layer.scale
    record["some"] = layer.q is not None
    width, blocks = layer.n_heads * cfg.d_head, -(-room.net.n_pos // WIDTH)
    room.fill(
        record, hat=rows * cfg.d_model, inverse=rows, q_at=rows * width, rest_at=3 * rows * width,
        pattern=room.at_once * layer.n_heads * blocks * WIDTH * room.net.n_pos, z=rows * width,
        mid=rows * cfg.d_model, mid_inverse=rows, active=rows * (cfg.d_mlp or 0),
    )  # fmt: skip
    return record


def _pass(
    job: _Job, composed: Mapping[str, Linear], places: Mapping[int, dict[str, int]], room: _Room, half: bool
) -> Any:
    """The record of `passes.PASS`."""
    net, rows, heads, first = job.by.net, room.rows, job.heads, job.layers[0] if job.layers else None
    cfg, n_pos = net.cfg, net.n_pos
    record = np.zeros((), passes.PASS)
    _norm(record["final_norm"], net.norm("ln_final", net.frozen))
    fill(record["readout"], job.readout, places)
    for name in ("own_read", "both", "own_logits"):
        fill(record[name], composed.get(name), places)
    if isinstance(heads, Direct):
        fill(record["reads"], heads.read, places)
        fill(record["reads_logits"], heads.logits, places)
        record["low"] = passes.DIRECT
    if isinstance(heads, Heads):
        fill(record["before"], heads.before, places)
        fill(record["before_read"], heads.before_read, places)
        if heads.read is not None:
            fill(record["reads"], heads.read, places)
            last = passes.READOUT if len(job.layers) == 1 else passes.NEXT
            record["low"] = last if job.layers[0].mlp_in is None else passes.MLP
    if heads is not None and heads.kept is not None:
        record["n_kept"] = heads.kept.shape[-3]
    n_classes, width = job.readout.weight.shape[2], cfg.n_heads * cfg.d_head
    classes = min(PANEL if half else max(WIDTH, LOGITS // rows // WIDTH * WIDTH), n_classes)
    together = max(8, IN_FIRST_CACHE // classes // 8 * 8)
    given = {
        "n_replicas": job.n_replicas, "n_chains": len(job.targets), "n_pos": n_pos, "n_scored": len(net.scored),
        "n_examples": job.targets.shape[1] // len(net.scored), "at_once": room.at_once,
        "d_model": cfg.d_model, "n_classes": n_classes, "classes": classes, "together": together,
        "given": heads is not None,
    }  # fmt: skip
    for name, value in given.items():
        record[name] = value
    if job.begun is not None and first is not None:
        record["beginnings"]["n"] = n = job.begun.rows.shape[1]
        record["beginnings"]["asking"] = job.begun.asking
        every = n * job.n_replicas // len(job.targets)  # of all replicas in a chain
        n_read, n_asked = (0 if one is None else every * one.weight.shape[2] for one in (first.rest, first.q))
        room.fill(
            record["beginnings"], hat=n * cfg.d_model, inverse=n, dhat=n * cfg.d_model, dresid=n * cfg.d_model,
            read=n_read, dread=n_read, asked=n_asked, dasked=n_asked,
        )  # fmt: skip
    widest, read = max(n_classes, 3 * width, cfg.d_mlp or 0), max(cfg.d_model, 2 * cfg.d_head, cfg.d_mlp or 0)
    room.fill(
        record, resid=rows * cfg.d_model, hat=rows * cfg.d_model, inverse=rows, logits=together * classes,
        exponentials=rows * max(n_classes, -(-n_classes // classes) * row_of_pairs(classes)),
        base=rows * widest, dz=rows * cfg.d_head, narrow=rows * max(cfg.d_model, width), wide=rows * (widest + width),
        turned=WIDTH * cfg.d_head, dscores=WIDTH * n_pos,
        scaled=rows * read, ready=max(rows * row_of_pairs(read), rows_of_pairs(rows) * (read + 1)) if half else 0,
        ready_head=rows * row_of_pairs(cfg.d_head) if half else 0, scale=rows,
        origin=rows, target=rows, others=rows, along=rows, factor=rows,
        rest=rows * WIDTH, inner=rows * WIDTH, spot=WIDTH,
        made=2 * cfg.d_head * widest, zs=2 * rows * cfg.d_head, write=cfg.d_head * cfg.d_model, square=WIDTH * PANEL,
    )  # fmt: skip
    return record


def _norm(record: Any, norm: Norm | None) -> None:
    if norm is not None:
        record["centred"], record["scaled"], record["eps"] = norm.centred, norm.scaled, norm.eps
