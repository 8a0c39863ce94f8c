"""Which steps of a trajectory lie apart from the path of the others? From the distances of its steps alone."""

from collections.abc import Iterator

import numpy as np

DETOUR = 2.0  # times the way past it: an honest path goes by at most about 1
BREAK = 3.0  # times the distance that the steps on either side let expect
UNRELATED = 1.0  # a relative distance that weights of one norm reach at a cosine of 1/2; those of two seeds have 1.4


def relative_distances(weights: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """|w_s - w_t| / sqrt(|w_s| |w_t|): Float64[step, step].

    Args:
        weights: [step, entry], or projections that keep distances. squares: |w|^2 of each step.
    """
    norms = np.sqrt(squares)
    apart = np.array([np.linalg.norm(weights - one, axis=1) for one in weights]).reshape(len(norms), len(norms))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(apart == 0, 0.0, apart / np.sqrt(np.outer(norms, norms)))


def discontinuous(steps: np.ndarray, distances: np.ndarray) -> dict[int, str]:
    """The steps that lie apart from the path of the others, and why.

    Two rules, d being relative distances:

    Detours. A block of neighbouring steps i ... j, shorter than half of all, with a before and b after it, is named if
        min(d(a, i), d(j, b)) > DETOUR max(d(a, b), min(d(a', a), d(b, b')), m),
    a' before a, b' after b, and m the lower median of the distances of neighbours with the block left out. Going by
    the block is then much longer than going past it. On a straight path min / d(a, b) is at most 1/2, on a random walk
    1 / sqrt(2), among independent draws around one place about 1; the other two terms keep a and b that are close by
    accident from being the measure. Shortest blocks first, and the steps that are named no longer count.

    Breaks. Ends have no other side. Between neighbours a and b that are left lies a break if d(a, b) >= UNRELATED and
        d(a, b) > BREAK d(b, c)  and  d(a, b) > BREAK d(c', a) (b - a) / (a - c'),
    c the first step after b, c' the last before a, with at least as much log(1 + step) between as from a to b. What
    moves at most as fast per step as before, and makes as much way per log step as after, has both below 1. A side
    without such a step is not asked, and one must have it: what a long first gap holds cannot be told. The side with
    fewer steps is named, of equal ones the earlier.
    """
    kept, named = list(range(len(steps))), dict[int, str]()
    while (found := next(_detours(kept, distances), None)) is not None:
        block, way, usual = found
        for at in block:
            named[int(steps[at])] = (
                f"lies {way:.3g} (relative distance) from the steps around it, where {usual:.3g} is to be expected"
            )
        kept = [at for at in kept if at not in block]
    while (found := next(_breaks(kept, steps.astype(float), distances), None)) is not None:
        block, way, usual = found
        for at in block:
            named[int(steps[at])] = (
                f"belongs to no path with the other steps: across the gap lie {way:.3g} (relative distance), where "
                f"{usual:.3g} is to be expected"
            )
        kept = [at for at in kept if at not in block]
    return named


Apart = tuple[list[int], float, float]  # places, distance from the others, distance to be expected


def _detours(kept: list[int], d: np.ndarray) -> Iterator[Apart]:
    """The worst block of the shortest length that has any."""
    for length in range(1, (len(kept) + 1) // 2):
        found = []
        for first in range(1, len(kept) - length):
            block, others = kept[first : first + length], kept[:first] + kept[first + length :]
            a, b = kept[first - 1], kept[first + length]
            way = min(d[a, block[0]], d[block[-1], b])
            beside = [d[one, other] for one, other in _beside(kept, first - 1, first + length)]
            gaps = sorted(d[others[:-1], others[1:]])
            usual = max(d[a, b], min(beside, default=0.0), gaps[(len(gaps) - 1) // 2])
            if way > DETOUR * usual:
                found.append((block, float(way), float(usual)))
        if found:
            yield max(found, key=lambda one: one[1] / max(one[2], np.finfo(float).tiny))
            return


def _beside(kept: list[int], before: int, after: int) -> list[tuple[int, int]]:
    pairs = [(kept[before - 1], kept[before])] if before > 0 else []
    return pairs + ([(kept[after], kept[after + 1])] if after + 1 < len(kept) else [])


def _breaks(kept: list[int], steps: np.ndarray, d: np.ndarray) -> Iterator[Apart]:
    """The break with the fewest steps on one side."""
    x, found = np.log1p(steps), []
    for n_before in range(1, len(kept)):
        a, b = kept[n_before - 1], kept[n_before]
        before = next((at for at in reversed(kept[: n_before - 1]) if x[a] - x[at] >= x[b] - x[a]), None)
        after = next((at for at in kept[n_before + 1 :] if x[at] - x[b] >= x[b] - x[a]), None)
        ways = [] if after is None else [d[b, after]]
        ways += [] if before is None else [d[before, a] * (steps[b] - steps[a]) / (steps[a] - steps[before])]
        if ways and d[a, b] >= UNRELATED and d[a, b] > BREAK * max(ways):
            side = kept[:n_before] if 2 * n_before <= len(kept) else kept[n_before:]
            found.append((side, float(d[a, b]), float(max(ways))))
    if found:
        yield min(found, key=lambda one: len(one[0]))
