"""Do the checkpoints of a trajectory belong where they are said to? Read from their parameters alone.

Published trajectories have served the final weights at intermediate steps, the first file of the final model at two
of them, and the first step of another seed. All of these load, and all have a finite loss.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mechgrok import seeds
from mechgrok.errors import CheckpointError
from mechgrok.outside.continuity import discontinuous, relative_distances

SKETCH = 1021  # a prime, so that no row of a weight falls into the same numbers again and again
SHARE = 0.01  # of the trained parameters: fewer that are equal at two steps are no mark of a file that was served twice
AT_REST = 3  # steps in a row: a tensor that is the same over as many was not trained there
Kind = Literal["not finite", "equal", "partly equal", "distance", "loss"]


@dataclass(frozen=True)
class Finding:
    """What speaks against the checkpoint of a step, in words."""

    step: int
    kind: Kind
    why: str


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    untrained: parameters that are the same at every step. typical_distance: the median of the relative distances of
    neighbouring steps, without those that are named; NaN where fewer than two are left.
    """

    steps: tuple[int, ...]
    findings: tuple[Finding, ...]
    untrained: tuple[str, ...]
    typical_distance: float

    @property
    def named(self) -> dict[int, str]:
        """Why each step that something was found at is not to be trusted."""
        found: dict[int, list[str]] = {}
        for one in self.findings:
            found.setdefault(one.step, []).append(one.why)
        return {step: "; ".join(found[step]) for step in sorted(found)}


def audit(checkpoints: Iterable[tuple[int, Mapping[str, Tensor]]]) -> Audit:
    """Hold the checkpoints of a trajectory against each other; one is in memory at a time.

    Each step is named at most once, by the first of these that it meets:
    1. not finite: an entry of any parameter is NaN or infinite.
    2. equal: every trained parameter (one that is not the same at all steps) equals that of another step, bit by bit
       but for the sign of zeros. Of steps that equal the last, all but the last are named; of neighbouring steps all
       but the first; of others all, as training does not return to the bit, and which is right cannot be told.
    3. partly equal: trained tensors with at least SHARE of the parameters are those of a step from which others,
       where they differ, lie between; or those of the last step, at the step before it alone. A tensor whose entries
       are all alike says nothing, and one that stands still over AT_REST steps or more in a row was frozen there.
    4. distance: `continuity.discontinuous` on the steps that are left.

    Distances come from a random projection of the weights to SKETCH numbers, each the sum of every SKETCHth entry with
    a random sign: |difference of two projections|^2 has the mean |w_s - w_t|^2 and, where that is spread over many
    entries, a standard deviation of sqrt(2 / SKETCH), 4 %, of it (Alon, Matias and Szegedy 1996).

    Raises:
        CheckpointError: a step has other parameters, or of other shapes, than the first.
    """
    prints = sorted((_print(step, tensors) for step, tensors in checkpoints), key=lambda one: one.step)
    for one in prints[1:]:
        if one.shapes != prints[0].shapes:
            name = min(dict(one.shapes.items() ^ prints[0].shapes.items()))
            raise CheckpointError(
                f"steps {prints[0].step} and {one.step} are no checkpoints of one model: {name} is "
                f"{_shape(prints[0], name)} at the one and {_shape(one, name)} at the other; move one of them away"
            )
    findings = [Finding(one.step, "not finite", f"is not finite: {one.not_finite}") for one in prints if one.not_finite]
    left = [one for one in prints if not one.not_finite]
    changing = {name for name in (left[0].digests if left else ()) if len({one.digests[name] for one in left}) > 1}
    untrained = tuple(sorted(set(left[0].digests) - changing)) if left else ()
    trained = sorted(changing or untrained)
    for find in (_equal, _partly_equal):
        found = find(left, trained)
        findings += found
        left = [one for one in left if one.step not in {finding.step for finding in found}]
    distances = relative_distances(
        np.array([one.sketch for one in left]), np.array([sum(one.squares[n] for n in trained) for one in left])
    )
    apart = discontinuous(np.array([one.step for one in left]), distances)
    findings += [Finding(step, "distance", why) for step, why in apart.items()]
    kept = [at for at, one in enumerate(left) if one.step not in apart]
    gaps = distances[kept[:-1], kept[1:]]
    return Audit(
        steps=tuple(one.step for one in prints),
        findings=tuple(sorted(findings, key=lambda finding: finding.step)),
        untrained=untrained if changing else (),
        typical_distance=float(np.median(gaps)) if len(gaps) else float("nan"),
    )


@dataclass(frozen=True)
class _Print:
    """What is kept of a checkpoint. uniform: tensors whose entries are all alike; squares: their squared norms."""

    step: int
    shapes: dict[str, tuple[int, ...]]
    digests: dict[str, str]
    uniform: frozenset[str]
    squares: dict[str, float]
    sketch: np.ndarray
    not_finite: str


@torch.no_grad()
def _print(step: int, tensors: Mapping[str, Tensor]) -> _Print:
    sketch = torch.zeros(SKETCH, dtype=torch.float64)
    digests, squares, uniform, not_finite = {}, {}, set(), []
    for name in sorted(tensors):
        flat = tensors[name].detach().float().flatten() + 0.0  # which has no negative zeros
        if not bool(flat.isfinite().all()):
            not_finite.append(_where_not_finite(name, tensors[name]))
            continue
        digests[name] = hashlib.blake2b(flat.numpy().tobytes(), digest_size=16).hexdigest()
        squares[name] = float(flat.double().square().sum())
        if len(flat) and bool((flat == flat[0]).all()):
            uniform.add(name)
        signs = 2.0 * torch.randint(2, flat.shape, generator=seeds.stream(0, "audit", name)) - 1
        padded = torch.nn.functional.pad(flat.double() * signs, (0, -len(flat) % SKETCH))
        sketch += padded.view(-1, SKETCH).sum(0)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return _Print(step, shapes, digests, frozenset(uniform), squares, sketch.numpy(), "; ".join(not_finite))


def _where_not_finite(name: str, tensor: Tensor) -> str:
    bad = ~tensor.detach().float().isfinite()
    first = bad.nonzero()[0].tolist()
    value = float(tensor[tuple(first)])
    return f"{name}{first if first else ''} is {value:g}" + (f", and {n - 1} more" if (n := int(bad.sum())) > 1 else "")


def _shape(one: _Print, name: str) -> str:
    return f"of shape {one.shapes[name]}" if name in one.shapes else "missing"


def _equal(prints: list[_Print], trained: list[str]) -> list[Finding]:
    found, groups = [], dict[tuple[str, ...], list[int]]()
    for at, one in enumerate(prints):
        groups.setdefault(tuple(one.digests[name] for name in trained), []).append(at)
    for group in groups.values():
        last, neighbours = group[-1] == len(prints) - 1, group[-1] - group[0] == len(group) - 1
        for at in group if len(group) > 1 else ():
            if last and at != group[-1]:
                why = f"has the weights of the last step, {prints[-1].step}"
            elif not last and not (neighbours and at == group[0]):
                others = ", ".join(str(prints[other].step) for other in group if other != at)
                why = f"has the weights of step {others}"
            else:
                continue
            found.append(Finding(prints[at].step, "equal", why))
    return found


def _partly_equal(prints: list[_Print], trained: list[str]) -> list[Finding]:
    shared: dict[int, dict[str, set[int]]] = {}  # place -> tensor -> the places that have the same
    for name in trained:
        runs = dict[str, list[list[int]]]()  # digest -> runs of neighbouring places that have it
        for at, one in enumerate(prints):
            mine = runs.setdefault(one.digests[name], [])
            if mine and mine[-1][-1] == at - 1:
                mine[-1].append(at)
            else:
                mine.append([at])
        for own in runs.values():
            places = {at for run in own for at in run}
            served_twice = len(own) > 1 or (len(own[0]) == 2 and own[0][-1] == len(prints) - 1 > 1)
            if not served_twice or name in prints[own[0][0]].uniform:
                continue
            for at in (at for run in own if len(run) < AT_REST for at in run if at != len(prints) - 1):
                shared.setdefault(at, {})[name] = places - {at}
    size = {name: int(np.prod(prints[0].shapes[name])) for name in trained}
    found = []
    for at, names in sorted(shared.items()):
        if sum(size[name] for name in names) < SHARE * sum(size.values()):
            continue
        steps = sorted({prints[other].step for others in names.values() for other in others})
        of = f"the last step, {steps[-1]}" if steps[-1] == prints[-1].step else f"step {', '.join(map(str, steps))}"
        first = max(names, key=lambda name: size[name])
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        found.append(
            Finding(prints[at].step, "partly equal", f"has {first}{more} of its {len(trained)} tensors from {of}")
        )
    return found
