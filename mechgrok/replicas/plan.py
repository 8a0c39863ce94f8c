"""Where a call of the compiled passes has its numbers: the same in all calls of one shape, so it is told once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from mechgrok.loops.lanes import WIDTH
from mechgrok.replicas import passes
from mechgrok.replicas.calls import LINEARS, Call, Direct, Heads, Layer
from mechgrok.replicas.distinct import Beginnings
from mechgrok.replicas.loss import IN_FIRST_CACHE
from mechgrok.replicas.network import Network, Norm
from mechgrok.replicas.packing import Layout, Linear, fill, laid_out
from mechgrok.replicas.pairs import PANEL, row_of_pairs, rows_of_pairs

ROWS = 96  # of the residual stream at once, or those of one example if it has more
# Logits at once: with as many weights they stay in a core's second cache. Not a power of two: the columns of 128 rows
# of 256 would fall on the same few lines of the first.
LOGITS = 30720

Places = Mapping[int, Mapping[str, int]]


@dataclass(frozen=True)
class Plan:
    """Where all lies in calls of one shape.

    still, own: the linears that do not move, and those that do, with room for what the passes make. sizes: of the
    gradients by each part of the latter, one after another in one array, 0 where it is not wanted, and then of what the
    passes make; shapes: of the parts'. room: numbers that the passes work in. record, layers: of `passes.PASS` and
    `passes.LAYER`.
    """

    still: Layout
    own: Layout
    sizes: list[int]
    shapes: list[torch.Size]
    room: int
    record: Any
    layers: np.ndarray

    def record_of(self, begun: Beginnings | None) -> Any:
        """With this batch's distinct rows."""
        if begun is None:
            return self.record[()]
        record = self.record.copy()
        record["beginnings"]["n"], record["beginnings"]["asking"] = begun.rows.shape[1], begun.asking
        return record[()]


def most_distinct(begun: Beginnings | None) -> int:
    """For how many distinct rows of a batch there is to be room: few different numbers over many batches."""
    return 0 if begun is None else -(-begun.rows.shape[1] // 64) * 64


def make_plan(net: Network, call: Call, wanted: Sequence[bool], half: bool) -> Plan:
    """The plan of calls shaped like this one.

    Args:
        wanted: which gradients are: by `resid`, and by weight and bias of each linear that moves.
        half: whether products are of int16s.
    """
    linears, composed = call.linears(), _composed(call)
    still_ones, moving = ([one for one in linears if one.moves == moves] for moves in (False, True))
    still, own = laid_out(still_ones, half=half), laid_out(moving, call.n_replicas, half)
    made = laid_out(list(composed.values()), half=half, after=own.size)
    each = zip([*still_ones, *moving, *composed.values()], [*still.places, *own.places, *made.places], strict=True)
    places: dict[int, dict[str, int]] = {id(linear): dict(place) for linear, place in each}
    parts = [part for linear in moving for part in (linear.weight, linear.bias)]
    shapes = [
        torch.Size((call.n_replicas, *part.shape[1:])) if want and part is not None else torch.Size((0,))
        for part, want in zip(parts, wanted[1:], strict=True)
    ]
    shapes += [one.weight.shape if any(wanted) and one.back else torch.Size((0,)) for one in composed.values()]
    sizes = [shape.numel() for shape in shapes]
    begins = iter(at if size else -1 for at, size in zip(accumulate(sizes, initial=0), sizes, strict=False))
    for linear in moving:
        places[id(linear)].update(dweight=next(begins), dbias=next(begins))
    for linear in composed.values():
        places[id(linear)].update(dweight=next(begins))
    # Of heads that are read directly only the scored rows are wide.
    room = _Room(_at_once(len(net.scored) if isinstance(call.heads, Direct) else net.n_pos), net)
    most, widest = max(room.rows, net.cfg.d_head), max(max(linear.weight.shape[1:]) for linear in linears)
    spare = room.put(2 * max(rows_of_pairs(most) * widest, most * row_of_pairs(widest)) if half else 0)
    for place in places.values():
        place["spare"] = spare
    layers = np.array([_layer(layer, places, room) for layer in call.layers], passes.LAYER)
    record = _pass(net, call, composed, places, room, half)
    record["backward"], record["back_to_start"] = any(wanted), wanted[0]
    return Plan(still, replace(own, size=made.size), sizes, shapes[: len(parts)], room.size, record, layers)


def _composed(call: Call) -> dict[str, Linear]:
    """W_O W of a chain's heads, for each W that reads them through their rank, by its name in `passes.PASS`: numbers
    that these make.
    """

    def made(n: int, reads: Linear, back: bool = True) -> Linear:
        """Such a matrix, or n of them above one another."""
        shape = call.n_replicas // len(call.targets), n * call.layers[0].out.weight.shape[1], reads.weight.shape[2]
        return Linear(torch.empty(shape, device="meta"), moves=True, back=back)

    if isinstance(call.heads, Direct):
        return {"own_read": made(1, call.heads.read), "own_logits": made(1, call.heads.logits)}
    if call.heads is None or call.heads.read is None:
        return {}
    return {"own_read": made(1, call.heads.read), "both": made(2, call.heads.read, back=False)}


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


def _layer(layer: Layer, places: Places, room: _Room) -> Any:
    """A record of `passes.LAYER`, with places for its activations."""
    cfg, rows = room.net.cfg, room.rows
    record = np.zeros((), passes.LAYER)
    _norm(record["norm"], layer.norm)
    _norm(record["mlp_norm"], layer.mlp_norm)
    for name in LINEARS:
        _matrix(record[name], getattr(layer, name), places)
    record["n_heads"], record["d_head"], record["scale"] = layer.n_heads, cfg.d_head, layer.scale
    record["some"] = layer.q is not None
    width, blocks = layer.n_heads * cfg.d_head, -(-room.net.n_pos // WIDTH)
    room.fill(
        record, hat=rows * cfg.d_model, inverse=rows, q_at=rows * width, rest_at=3 * rows * width,
        pattern=room.at_once * layer.n_heads * blocks * WIDTH * room.net.n_pos, z=rows * width,
        mid=rows * cfg.d_model, mid_inverse=rows, active=rows * (cfg.d_mlp or 0),
    )  # fmt: skip
    return record


def _pass(net: Network, call: Call, composed: Mapping[str, Linear], places: Places, room: _Room, half: bool) -> Any:
    """The record of `passes.PASS`."""
    rows, heads, first = room.rows, call.heads, call.layers[0] if call.layers else None
    cfg, n_pos = net.cfg, net.n_pos
    record = np.zeros((), passes.PASS)
    _norm(record["final_norm"], net.norm("ln_final", net.frozen))
    _matrix(record["readout"], call.readout, places)
    for name in ("own_read", "both", "own_logits"):
        _matrix(record[name], composed.get(name), places)
    if isinstance(heads, Direct):
        _matrix(record["reads"], heads.read, places)
        _matrix(record["reads_logits"], heads.logits, places)
        record["low"] = passes.DIRECT
    if isinstance(heads, Heads):
        _matrix(record["before"], heads.before, places)
        _matrix(record["before_read"], heads.before_read, places)
        if heads.read is not None:
            _matrix(record["reads"], heads.read, places)
            last = passes.READOUT if len(call.layers) == 1 else passes.NEXT
            record["low"] = last if call.layers[0].mlp_in is None else passes.MLP
    if heads is not None:
        record["n_kept"] = heads.n_kept()
    n_classes, width = call.readout.weight.shape[2], cfg.n_heads * cfg.d_head
    classes = min(PANEL if half else max(WIDTH, LOGITS // rows // WIDTH * WIDTH), n_classes)
    together = max(8, IN_FIRST_CACHE // classes // 8 * 8)
    given = {
        "n_replicas": call.n_replicas, "n_chains": len(call.targets), "n_pos": n_pos, "n_scored": len(net.scored),
        "n_examples": call.targets.shape[1] // len(net.scored), "at_once": room.at_once,
        "d_model": cfg.d_model, "n_classes": n_classes, "classes": classes, "together": together,
        "given": heads is not None,
    }  # fmt: skip
    for name, value in given.items():
        record[name] = value
    if call.begun is not None and first is not None:
        n = most_distinct(call.begun)
        every = n * call.n_replicas // len(call.targets)  # of all replicas in a chain
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
        still=rows * cfg.d_model, former=rows * cfg.d_head, rest=rows * WIDTH, inner=rows * WIDTH, spot=WIDTH,
        made=2 * cfg.d_head * widest, zs=2 * rows * cfg.d_head, write=cfg.d_head * cfg.d_model, square=WIDTH * PANEL,
    )  # fmt: skip
    return record


def _matrix(record: Any, linear: Linear | None, places: Places) -> None:
    """A record of `linear.MATRIX`; all zeros, and no gradient, for None."""
    record["dweight"] = record["dbias"] = -1
    if linear is not None:
        fill(record, linear, places[id(linear)])


def _norm(record: Any, norm: Norm | None) -> None:
    if norm is not None:
        record["centred"], record["scaled"], record["eps"] = norm.centred, norm.scaled, norm.eps
