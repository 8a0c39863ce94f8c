"""Settings to trust: sweeps of nbeta, localization and step size on a few checkpoints, read for a plateau.

1. Grid: at every (nbeta, localization), the estimate at each checkpoint, at a step size that the curvature
   where the chain goes allows, after a burn-in of the slowest relaxation, 2 / (step_size localization)
   steps. A cell is usable if that is affordable and every chain stays finite, in its basin and settled, and
   finds no loss surely below that of w* (there w* is no minimum at the chain's scale). Of the usable ones
   the least sensitive comes first: smallest |d log llc / d log nbeta|, checkpoints weighted by their LLC.
   At 1 an estimate is saturated. The slope along localization is told but does not choose: it says at
   which scale one looks, and where it is smallest is the largest localization, which sees least.
2. Step sizes, each with the same time to mix: a line through the estimates of that cell; the largest step
   that adds at most MAX_BIAS to the estimate by that line, at every checkpoint.
3. Length: twice the relaxation as burn-in; twice the draws, up to twice, until the chains are healthy. If
   they do not become so, the next cell's turn comes, for up to MAX_CANDIDATES of them.
4. Witnesses, which choose nothing: the control with nbeta = 0, which diffuses in the localizing prior
   alone, and the acceptance of mala at the same step size.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from mechgrok import seeds
from mechgrok.calibration import Calibration, Cell, Trial
from mechgrok.config import LLCConfig, SamplerName
from mechgrok.errors import ConfigError
from mechgrok.llc.estimate import as_set, estimate_problem
from mechgrok.llc.precision import say_if_idle
from mechgrok.llc.problem import ComponentLike, Data, Problem, check_batch_size, make_problem
from mechgrok.llc.step_size import allowed_step_size, sharpness
from mechgrok.llc.work import estimate_work, loops_pay
from mechgrok.reproducible import reproducible
from mechgrok.sampling.chains import sample
from mechgrok.sampling.potential import LossFn
from mechgrok.sampling.samplers import SAMPLERS
from mechgrok.types import LLCEstimate, Trajectory

Progress = Callable[[str, int, int], None]

NBETAS = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0)
LOCALIZATIONS = (1.0, 10.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0)
STEP_FACTORS = (1 / 4, 1 / 2, 1.0, 2.0)
MAX_RELAXATION = 500  # steps; a cell that needs more is not affordable
MAX_BIAS = 0.05
MAX_GROWTH = 0.5  # |d log llc / d log nbeta|; at 1 the estimate is proportional to nbeta
MAX_CANDIDATES = 3
SMALL = 0.2  # of the largest LLC among the cases
SETTLED_R_HAT = 1.3
N_DRAWS = 100
N_CHECKPOINTS = 3
MAX_DOUBLINGS = 2
KEPT = ("precision", "device", "memory_gb")
RMSPROP = ("rmsprop_decay", "rmsprop_stability")
MALA_EXAMPLES = 5000  # beyond which full gradients are not affordable for a witness


@dataclass(frozen=True)
class _Case:
    """A component at a checkpoint."""

    step: int
    problem: Problem

    def run(self, config: LLCConfig, seed: int, what: str) -> Trial:
        with reproducible(1):
            return Trial(self.step, estimate_problem(self.problem, config, seeds.derive(seed, what, self.step)))

    def curvature(self, seed: int) -> float:
        with reproducible(1):
            return sharpness(self.problem.potential, self.problem.potential.anchor, seed)

    def allowed(self, config: LLCConfig, seed: int, curvature: float) -> float:
        with reproducible(1):
            return allowed_step_size(self.problem.potential, config, seed, curvature)


def calibrate(
    models: "Trajectory | Iterable[tuple[int, torch.nn.Module]]",
    data: Data,
    *,
    seed: int,
    components: Sequence[ComponentLike] = (None,),
    sampler: SamplerName = "baoab",
    momentum: float = 0.0,
    batch_size: int | None = None,
    n_chains: int = 4,
    canonicalize: bool = False,
    like: LLCConfig | None = None,
    n_checkpoints: int | None = None,
    loss_fn: LossFn | None = None,
    chance_loss: float | None = None,
    nbetas: Sequence[float] = NBETAS,
    localizations: Sequence[float] = LOCALIZATIONS,
    n_workers: int = 1,
    progress: Progress = lambda what, done, total: None,
) -> Calibration:
    """Recommend one setting for all checkpoints and components of a trajectory.

    Args:
        models: a Trajectory, of which the sharpest checkpoint, the last, and others in between on
            log steps are used, n_checkpoints in all (None: 3, or all if there are fewer); or (step, model) pairs,
            all of which are used.
        data, components, loss_fn, chance_loss: as `estimate_llc` has them.
        sampler, momentum, batch_size, n_chains, canonicalize: kept in the recommended setting.
        like: of its settings those that are said nowhere else are kept too: device, precision, memory, and rmsprop's
            for that sampler.
        n_workers: processes; the result does not depend on it.

    Raises:
        ComponentError, ConfigError, ShapeError: before any sampling.
    """
    if like is not None and like.engine != "mechgrok":
        raise ConfigError("calibration samples with mechgrok's own engine; leave engine out of like")
    kept = (*KEPT, *RMSPROP) if sampler == "rmsprop_sgld" else KEPT
    others = {} if like is None else {key: getattr(like, key) for key in kept}

    def settings(nbeta: float, localization: float, step_size: float, n_draws: int, n_burnin: int) -> LLCConfig:
        return LLCConfig(
            nbeta=nbeta, localization=localization, step_size=step_size, n_draws=n_draws, n_burnin=n_burnin,
            sampler=sampler, momentum=momentum, batch_size=batch_size, n_chains=n_chains, canonicalize=canonicalize,
            **others,
        )  # fmt: skip

    any_setting = settings(1.0, 1.0, 1.0, N_DRAWS, 0)  # bad settings are refused before any work
    if isinstance(models, Trajectory):
        pairs = _chosen(models, data, n_checkpoints, seed)
    elif n_checkpoints is not None:
        raise ConfigError("n_checkpoints chooses from a Trajectory, and all of the pairs given are used; leave it out")
    else:
        pairs = list(models)
    if not pairs or not components or not nbetas or not localizations:
        raise ConfigError("nothing to calibrate on; give at least one model, component, nbeta and localization")
    how = {"loss_fn": loss_fn, "chance_loss": chance_loss, **as_set(any_setting)}
    n_estimates = len(pairs) * len(components) * len(nbetas) * len(localizations)
    loops = loops_pay([n_estimates * estimate_work(pairs[0][1], data, any_setting)], [any_setting])
    how["loops"] = loops
    cases = [_Case(step, make_problem(model, data, one, **how)) for step, model in pairs for one in components]
    check_batch_size(any_setting, len(cases[0].problem.init_losses))
    say_if_idle(any_setting, cases[0].problem.module, data)

    def everywhere(what: str, configs: Sequence[LLCConfig]) -> list[list[Trial]]:
        """Every setting at every case, as [setting][case]."""
        jobs = [(_Case.run, case, config, seed, what) for config in configs for case in cases]
        trials = _parallel(jobs, n_workers, what, progress)
        return [trials[i : i + len(cases)] for i in range(0, len(trials), len(cases))]

    every_cell = list(product(sorted(nbetas), sorted(localizations)))
    curvatures = _parallel([(_Case.curvature, case, seed) for case in cases], n_workers, "curvature", progress)
    stiffness = SAMPLERS[sampler].stiffness(any_setting)

    def least_relaxation(cell: Cell) -> float:
        """Steps to relax if the loss is nowhere sharper than at w*."""
        return 2 * (cell[0] * max(curvatures) + cell[1]) / (stiffness * cell[1])

    cells = [cell for cell in every_cell if least_relaxation(cell) <= MAX_RELAXATION]
    cells = cells or [min(every_cell, key=least_relaxation)]
    sharp = list(zip(cases, curvatures, strict=True))
    pilots = [(_Case.allowed, case, settings(*cell, 1.0, N_DRAWS, 0), seed, c) for cell in cells for case, c in sharp]
    scales = _parallel(pilots, n_workers, "pilot chains", progress)
    # One step size for all cases, so the sharpest decides.
    step_size = {cell: min(scales[i * len(cases) : (i + 1) * len(cases)]) for i, cell in enumerate(cells)}
    relaxation = {(nbeta, gamma): math.ceil(2 / (step_size[nbeta, gamma] * gamma)) for nbeta, gamma in cells}
    affordable = [cell for cell in cells if relaxation[cell] <= MAX_RELAXATION] or [
        min(cells, key=relaxation.__getitem__)
    ]
    swept = everywhere("grid", [settings(*cell, step_size[cell], N_DRAWS, relaxation[cell]) for cell in affordable])
    grid = dict(zip(affordable, swept, strict=True))
    sensitivity = {cell: _slope(grid, cell, axis=0) for cell in affordable}
    usable = [cell for cell in affordable if math.isfinite(sensitivity[cell]) and not _troubles(grid[cell])]
    # Where no cell is usable the one with the fewest troubles is shown for what it is.
    candidates = sorted(usable, key=sensitivity.__getitem__) or [min(affordable, key=lambda c: _troubles(grid[c]))]

    tried = []
    for chosen in candidates[:MAX_CANDIDATES]:
        start, slowest = step_size[chosen], relaxation[chosen]
        lengths = [(f, int(N_DRAWS * max(STEP_FACTORS) / f), math.ceil(slowest / f)) for f in STEP_FACTORS]
        steps = everywhere("step sizes", [settings(*chosen, f * start, *length) for f, *length in lengths])
        best_step, bias = _largest_unbiased(steps)
        n_burnin, n_draws = max(50, 2 * math.ceil(2 / (best_step * chosen[1]))), 2 * N_DRAWS
        for _ in range(MAX_DOUBLINGS + 1):
            recommended = settings(*chosen, best_step, n_draws, n_burnin)
            (final,) = everywhere("final", [recommended])
            if not _sick(final):
                break
            n_draws *= 2
        tried.append((len(_sick(final)), chosen, bias, recommended, steps, final))
        if not _sick(final):
            break
    _, chosen, bias, recommended, steps, final = min(tried, key=lambda attempt: attempt[0])
    (control,) = everywhere("control", [recommended.model_copy(update={"nbeta": 0.0})])
    acceptance = _mala_acceptance(cases, recommended, seed)
    slopes = sensitivity[chosen], _slope(grid, chosen, axis=1)
    sound, reasons = _verdict(recommended, bool(usable), slopes, bias, final, control, acceptance)
    return Calibration(
        recommended=recommended,
        sound=sound,
        reasons=reasons,
        sensitivity={cell: sensitivity[cell] if cell in usable else math.nan for cell in every_cell},
        grid=tuple(trial for trials in swept for trial in trials),
        steps=tuple(trial for trials in steps for trial in trials),
        final=tuple(final),
        control=tuple(control),
        acceptance=acceptance,
    )


def _parallel(jobs: Sequence[tuple], n_workers: int, what: str, progress: Progress) -> list:
    """The results of (function, *arguments), in order."""
    from joblib import Parallel, delayed

    results = []
    for result in Parallel(n_jobs=min(n_workers, len(jobs)), return_as="generator")(
        delayed(job[0])(*job[1:]) for job in jobs
    ):
        results.append(result)
        progress(what, len(results), len(jobs))
    return results


def _chosen(trajectory: Trajectory, data: Data, asked: int | None, seed: int) -> list[tuple[int, torch.nn.Module]]:
    """The sharpest checkpoint, the last, and the ones that split the log steps between them most evenly."""
    there = len(trajectory.steps)
    if asked is not None and not 1 <= asked <= there:
        raise ConfigError(f"n_checkpoints must lie in 1 ... {there}, the checkpoints there are, got {asked}")
    n = min(N_CHECKPOINTS, there) if asked is None else asked
    models = [(step, trajectory.model_at(step)) for step in trajectory.steps]
    problems = [make_problem(model, data) for _, model in models]
    curvature = [sharpness(problem.potential, problem.potential.anchor, seed, 6) for problem in problems]
    at = np.log1p([step for step, _ in models])
    picked = list(dict.fromkeys([int(np.argmax(curvature)), len(models) - 1]))
    while len(picked) < n:
        picked.append(int(np.argmax(np.abs(at[:, None] - at[picked]).min(axis=1))))
    return [models[i] for i in sorted(picked[:n])]


def _troubles(trials: Sequence[Trial]) -> int:
    """How many of these short runs show that their cell is no place to sample: what more draws would not mend.

    Saturation is not among them: it is what the sensitivity measures, weighted by how much LLC there is.
    """
    bad = 0
    for estimate in (trial.estimate for trial in trials):
        health = estimate.health
        unsettled = not health.r_hat <= SETTLED_R_HAT or health.drifting
        bad += health.diverged > 0 or health.escaped or unsettled or _below(estimate)
    return bad


def _below(estimate: LLCEstimate) -> bool:
    """Whether the chain surely found losses below that of w*."""
    return estimate.llc < -3 * estimate.std_error


def _sick(trials: Sequence[Trial]) -> list[str]:
    """Why the runs of one setting cannot be trusted, a sentence for each that cannot.

    A case with little of the LLC may be saturated: its estimate says that it is small, and is flagged.
    """
    found, largest = [], max(trial.estimate.llc for trial in trials)
    for trial in trials:
        estimate = trial.estimate
        flat = estimate.health.saturated and estimate.llc >= SMALL * largest
        reasons = [*estimate.health.reasons, *(estimate.health.cautions if flat else ())]
        if reasons:
            found.append(f"{estimate.component} at step {trial.step}: {reasons[0]}")
    return found


def _slope(grid: Mapping[Cell, Sequence[Trial]], cell: Cell, axis: int) -> float:
    """|d log llc / d log setting| along nbeta (axis 0) or localization (1), from the cell's neighbours.

    Each case counts by its share of the LLC, so that checkpoints with hardly any do not decide; one whose
    estimate is not told from 0 does not count. NaN where no neighbour can be compared with.
    """
    line = sorted(other for other in grid if other[1 - axis] == cell[1 - axis])
    at = line.index(cell)
    around = line[max(at - 1, 0) : at + 2]
    slopes, weights = [], []
    for case, trial in enumerate(grid[cell]):
        found = [(other[axis], grid[other][case].estimate) for other in around]
        points = [(math.log(x), math.log(e.llc)) for x, e in found if e.llc > 2 * e.std_error]
        if len(points) > 1 and trial.estimate.llc > 0:
            slopes.append(abs((points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])))
            weights.append(trial.estimate.llc)
    return float(np.average(slopes, weights=weights)) if slopes else math.nan


def _largest_unbiased(trials: Sequence[Sequence[Trial]]) -> tuple[float, float]:
    """(step size, its worst relative bias) from [setting][case]: a line llc_0 + slope step_size each case."""
    sizes = np.array([row[0].estimate.config.step_size for row in trials])
    worst = np.zeros(len(sizes))
    for case in zip(*trials, strict=True):
        llc = np.array([trial.estimate.llc for trial in case])
        error = np.array([trial.estimate.std_error for trial in case])
        at = np.flatnonzero(np.isfinite(llc) & (error > 0))
        if len(at) >= 2:
            slope, start = np.polyfit(sizes[at], llc[at], 1, w=1 / error[at])
            if start > 2 * error[at].min():  # an estimate that is not told from 0 has no relative bias
                worst = np.maximum(worst, np.abs(slope * sizes / start))
        worst[~np.isfinite(llc)] = math.inf
    allowed = np.flatnonzero(worst <= MAX_BIAS)
    best = int(allowed[-1]) if len(allowed) else 0
    return float(sizes[best]), float(worst[best])


def _mala_acceptance(cases: Sequence[_Case], recommended: LLCConfig, seed: int) -> float | None:
    """Share of steps of this size that a Metropolis test takes, at the worst case, on all of the data."""
    if len(cases[0].problem.init_losses) > MALA_EXAMPLES:
        return None
    config = recommended.model_copy(update={"sampler": "mala", "batch_size": None, "n_draws": 40, "n_burnin": 0})
    return min(float(sample(case.problem.potential, config, seed, ("mala",)).acceptance.mean()) for case in cases)


def _verdict(
    config: LLCConfig,
    any_usable: bool,
    slopes: tuple[float, float],
    bias: float,
    final: Sequence[Trial],
    control: Sequence[Trial],
    acceptance: float | None,
) -> tuple[bool, tuple[str, ...]]:
    """Whether all that is asked holds, and the reasons in words."""
    plateau = any_usable and slopes[0] < MAX_GROWTH
    unhealthy = _sick(final)
    place = f"nbeta {config.nbeta:g}, localization {config.localization:g}: "
    if not any_usable:
        place += "no cell of the grid is usable at every checkpoint; this one has the fewest troubles"
    else:
        place += f"of the usable cells one where the estimate moves little with nbeta, by the power {slopes[0]:.2f}"
        place += "" if plateau else ", which is no plateau (1 would be proportional)"
        place += f"; by {slopes[1]:.2f} with localization"
    size = f"step_size {config.step_size:.2g}: "
    size += "the largest tried that" if bias <= MAX_BIAS else "the smallest tried, and yet it"
    size += f" adds {bias:.0%} to the estimate at the worst checkpoint"
    size += "" if bias <= MAX_BIAS or config.batch_size is None else "; raise batch_size"
    length = f"n_burnin {config.n_burnin}, n_draws {config.n_draws}: "
    length += "; ".join(unhealthy) if unhealthy else "with them the chains are healthy at every checkpoint"
    reasons = [place, size, length]
    ratios = [loss.rise / none.rise for loss, none in zip(final, control, strict=True) if none.rise > 0]
    if ratios:
        share = f"{min(ratios):.2g} to {max(ratios):.2g}"
        reasons.append(f"control with nbeta 0: with the loss's pull the sampled loss rises {share} times as much")
    if acceptance is not None:
        reasons.append(f"witness: mala takes {acceptance:.0%} of such steps on all of the data at the worst checkpoint")
    return plateau and bias <= MAX_BIAS and not unhealthy, tuple(reasons)
