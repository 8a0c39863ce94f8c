"""LLC curve to developmental stages, with uncertainty.

The curve is smoothed by Gaussian-process regression on log(1 + step): constant * Matern 5/2 + white noise,
beside the standard errors of the points, hyperparameters by marginal likelihood. A boundary is a
critical point of the smooth curve: its slope changes sign, falls to a plateau (|slope| below `plateau` of its
largest) or leaves one, or dips between two rises (or two falls). Stages are what lies between. Each boundary is
located in every draw from the posterior: it is the median of these places, and their quantiles are its interval.

The criterion (critical points of the LLC over log time) is that of Hoogland et al. 2024
(arXiv:2402.02364), whose first boundary is such a dip: the slope falls to a twentieth and grows again. The white
noise, the test against a constant curve, the merging of uncertain segments, the test of dips and the intervals are
ours.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from mechgrok import seeds
from mechgrok.config import StageConfig
from mechgrok.errors import ConfigError, ShapeError, UnhealthyEstimateError
from mechgrok.types import Direction, LLCCurve, Stage

N_GRID = 400
DEFAULTS = StageConfig()
MIN_POINTS = 6
# A change that rests on fewer estimates cannot be told from an outlier; at the ends of the run, where
# nothing supports an estimate from the other side, one more is asked for.
MIN_STAGE_POINTS = 2
MIN_WIDTH = 1 / 20  # of the run in log time: a shorter flat stretch is the turning point itself
DIP = 0.5  # of the rate before and after
DOWNHILL = 3.0
_DIRECTION: dict[int, Direction] = {1: "rising", -1: "falling", 0: "plateau"}


@dataclass(frozen=True)
class SmoothCurve:
    """The posterior on a grid of x = log(1 + step): mean and sd [grid], draws [draw, grid].

    points: x of the estimates it was fitted to.

    evidence: log marginal likelihood in nats over that of a constant curve with white noise.
    plateau: the share of its range below which a change counts as none.
    """

    x: np.ndarray
    points: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    draws: np.ndarray
    evidence: float
    plateau: float

    @property
    def steps(self) -> np.ndarray:
        return np.expm1(self.x)

    def at(self, step: float) -> float:
        """The mean at a step."""
        return float(np.interp(np.log1p(step), self.x, self.mean))


def usable_points(curve: LLCCurve, component: str = "model") -> np.ndarray:
    """Which checkpoints have a healthy estimate of finite values: bool[checkpoint]."""
    row = curve.row(component)
    return curve.healthy[row] & np.isfinite(curve.llc[row]) & np.isfinite(curve.std_error[row])


def stage_points(curve: LLCCurve, component: str = "model") -> np.ndarray:
    """The usable points that stages rest on, those not surely negative: bool[checkpoint].

    An LLC below zero by more than DOWNHILL standard errors says that the chain ran downhill from w*, as from an
    untrained model: there is no minimum whose degeneracy it could measure. It is reported, and no stage rests on it.
    """
    row = curve.row(component)
    return usable_points(curve, component) & (curve.llc[row] >= -DOWNHILL * curve.std_error[row])


def smooth(curve: LLCCurve, config: StageConfig = DEFAULTS, component: str = "model", seed: int = 0) -> SmoothCurve:
    """Gaussian-process posterior of one component's curve from its healthy points.

    Raises:
        ShapeError: fewer than 6 healthy points with finite values.
    """
    row, usable = curve.row(component), stage_points(curve, component)
    llc, std_error = curve.llc[row], curve.std_error[row]
    if usable.sum() < MIN_POINTS:
        raise ShapeError(
            f"stages of {component!r} need at least {MIN_POINTS} healthy points, there are {int(usable.sum())}; "
            "use more checkpoints or healthier settings"
        )
    x, y, error = np.log1p(curve.steps[usable].astype(float)), llc[usable], std_error[usable]
    centre, scale = y.mean(), y.std() or 1.0
    y, noise = (y - centre) / scale, (error / scale) ** 2 + 1e-10

    span = x[-1] - x[0]
    shortest = 2 * np.median(np.diff(x))  # anything that bends faster than two points is noise
    signal = ConstantKernel(1.0, (1e-3, 1e3)) * Matern(span / 5, (shortest, 10 * span), nu=2.5)
    fitted = _fit(signal + WhiteKernel(0.01, (1e-8, 10.0)), x, y, noise)
    constant = _fit(ConstantKernel(1.0, (1e-3, 1e3)) + WhiteKernel(0.1, (1e-8, 10.0)), x, y, noise)

    grid = np.linspace(x[0], x[-1], N_GRID)
    latent = GaussianProcessRegressor(fitted.kernel_.k1, alpha=noise + fitted.kernel_.k2.noise_level, optimizer=None)
    latent.fit(x[:, None], y)
    mean, covariance = latent.predict(grid[:, None], return_cov=True)
    normal = np.random.default_rng(seeds.derive(seed, "stages", component)).standard_normal(
        (config.n_posterior, N_GRID)
    )
    values, vectors = np.linalg.eigh(covariance)
    draws = mean + normal @ (vectors * np.sqrt(np.clip(values, 0, None))).T
    return SmoothCurve(
        x=grid,
        points=x,
        mean=mean * scale + centre,
        sd=np.sqrt(np.clip(np.diag(covariance), 0, None)) * scale,
        draws=draws * scale + centre,
        plateau=config.plateau,
        evidence=float(fitted.log_marginal_likelihood_value_ - constant.log_marginal_likelihood_value_),
    )


def detect_stages(
    curve: LLCCurve,
    config: StageConfig = DEFAULTS,
    *,
    component: str = "model",
    drop_unhealthy: bool = False,
    seed: int = 0,
) -> tuple[Stage, ...]:
    """The stages of a component's LLC curve, in order, from the first to the last point that they rest on; none if the
    curve is flat.

    A curve counts as flat unless the smooth curve beats a constant by `config.min_evidence` nats.
    A stage is kept if it holds at least 2 estimates (3 at an end of the run) and, with posterior probability
    `config.credible`, the curve changes over it in the stage's direction and by at least
    `config.plateau` of the curve's range; other segments are merged with their neighbours.

    Args:
        drop_unhealthy: find the stages from the healthy points alone, rather than raise.

    Raises:
        UnhealthyEstimateError: an estimate is unhealthy and `drop_unhealthy` is False.
        ComponentError, ShapeError: the curve lacks the component, or has too few points.
    """
    if not isinstance(curve, LLCCurve):
        raise ShapeError(f"curve must be an LLCCurve, got {type(curve).__name__}; write LLCCurve(steps=..., ...)")
    if not isinstance(config, StageConfig):
        raise ConfigError(f"config must be a StageConfig, got {type(config).__name__}; write StageConfig(plateau=...)")
    usable = usable_points(curve, component)
    if not drop_unhealthy and not usable.all():
        bad = curve.steps[~usable]
        raise UnhealthyEstimateError(
            f"estimates of {component!r} at steps {', '.join(map(str, bad))} are unhealthy or not finite; "
            "sample them better, or pass drop_unhealthy=True to leave them out"
        )
    fit = smooth(curve, config, component, seed)
    if fit.evidence < config.min_evidence:
        return ()
    segments = [part for segment in _segments(fit, config) for part in _split_at_dips(fit, segment, config)]
    if len(segments) == 1 and segments[0][2] == 0:
        return ()
    located = [_locate(fit, *pair, config) for pair in pairwise(segments)]
    placed = place_stages(curve, fit, [middle for _, middle, _ in located])
    bounds = [None, *((low, high) for low, _, high in located), None]
    return tuple(
        replace(stage, direction=_DIRECTION[sign], start_interval=bounds[i], end_interval=bounds[i + 1])
        for i, (stage, (_, _, sign)) in enumerate(zip(placed, segments, strict=True))
    )


def place_stages(curve: LLCCurve, fit: SmoothCurve, boundaries: Sequence[float]) -> tuple[Stage, ...]:
    """Stages between given boundaries (steps), with the changes of LLC and loss over each.

    Detected stages come through here, and so do the randomly placed ones that claims are scored
    by. A stage's direction is that of the smooth curve's change over it; below `fit.plateau` of the
    curve's range it is a plateau. Where nothing could be measured, at either end of the run, there is no stage.
    """
    stages = []
    smallest = fit.plateau * np.ptp(fit.mean)
    x = np.log1p(curve.steps)
    first, last = (float(curve.steps[np.abs(x - fit.points[end]).argmin()]) for end in (0, -1))
    edges = [first, *boundaries, last]
    for i, (start, end) in enumerate(pairwise(edges)):
        change = fit.at(end) - fit.at(start)
        delta_loss = None
        if curve.init_loss is not None:
            losses = np.interp(np.log1p([start, end]), np.log1p(curve.steps), curve.init_loss)
            delta_loss = float(losses[1] - losses[0])
        direction = _DIRECTION[int(np.sign(change)) if abs(change) >= smallest else 0]
        stages.append(Stage(f"S{i + 1}", direction, start, end, None, None, change, delta_loss))
    return tuple(stages)


Segment = tuple[int, int, int]  # first grid index, last grid index, sign of the slope


def _segments(fit: SmoothCurve, config: StageConfig) -> list[Segment]:
    """Maximal runs of one slope sign on the grid, with runs that are not credible merged away."""
    slope = np.gradient(fit.mean, fit.x)
    sign = np.where(np.abs(slope) <= config.plateau * np.abs(slope).max(), 0, np.sign(slope)).astype(int)
    cuts = [0, *(np.flatnonzero(np.diff(sign)) + 1).tolist(), len(sign)]
    segments = [(a, b - 1, int(sign[a])) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    while len(segments) > 1:
        doubts = [_doubt(fit, segment, config) for segment in segments]
        worst = int(np.argmax(doubts))
        if doubts[worst] <= 0:
            break
        segments = _merge(fit, segments, worst)
    return segments


def _split_at_dips(fit: SmoothCurve, segment: Segment, config: StageConfig) -> list[Segment]:
    """The segment, cut where it moves at less than DIP of the rate before and after, if that is credible.

    The rate at a point is the mean slope over the narrowest stretch that could be a plateau. A dip is a minimum of the
    mean curve's rate; it is held against the highest rates of the segment before and after it. It is credible if the
    rate there is below DIP times the lower of these with posterior probability `config.credible`, and if both parts
    would be stages by themselves.
    """
    first, last, sign = segment
    half = _half_width(fit)
    at = np.arange(first + half, last - half + 1)
    if sign == 0 or len(at) < 3:
        return [segment]

    def rates(values: np.ndarray) -> np.ndarray:
        return sign * (values[..., at + half] - values[..., at - half])

    mean, draws = rates(fit.mean), rates(fit.draws)
    minima = np.flatnonzero((mean[1:-1] < mean[:-2]) & (mean[1:-1] <= mean[2:])) + 1
    for dip in sorted(minima.tolist(), key=lambda dip: mean[dip] / min(mean[:dip].max(), mean[dip:].max())):
        before, after = int(mean[:dip].argmax()), dip + int(mean[dip:].argmax())
        slow = draws[:, dip] < DIP * np.minimum(draws[:, before], draws[:, after])
        parts = [(first, int(at[dip]), sign), (int(at[dip]) + 1, last, sign)]
        if np.mean(slow) >= config.credible and all(_doubt(fit, part, config) <= 0 for part in parts):
            return [cut for part in parts for cut in _split_at_dips(fit, part, config)]
    return [segment]


def _half_width(fit: SmoothCurve) -> int:
    """Half the narrowest stretch that could be a plateau, in points of the grid."""
    return max(1, round(len(fit.x) * MIN_WIDTH / 2))


def _doubt(fit: SmoothCurve, segment: Segment, config: StageConfig) -> float:
    """Positive if the segment is no stage; the larger, the less credible."""
    first, last, sign = segment
    if sign == 0:
        return 1 - (fit.x[last] - fit.x[first]) / (MIN_WIDTH * (fit.x[-1] - fit.x[0]))
    at_an_end = first == 0 or last == len(fit.x) - 1
    if np.sum((fit.points >= fit.x[first]) & (fit.points <= fit.x[last])) < MIN_STAGE_POINTS + at_an_end:
        return 1.0
    change = sign * (fit.draws[:, last] - fit.draws[:, first])
    return config.credible - float(np.mean(change > config.plateau * np.ptp(fit.mean)))


def _merge(fit: SmoothCurve, segments: list[Segment], at: int) -> list[Segment]:
    """Dissolve segment `at` into its neighbours.

    Between neighbours of one sign the three become one; between others the boundary lies where the
    smooth curve is most extreme (opposite signs) or in the middle (one of them flat).
    """
    first, last, _ = segments[at]
    before = segments[at - 1] if at > 0 else None
    after = segments[at + 1] if at + 1 < len(segments) else None
    if before is None and after is not None:
        return [(first, after[1], after[2]), *segments[2:]]
    if after is None and before is not None:
        return [*segments[:-2], (before[0], last, before[2])]
    assert before is not None and after is not None
    if before[2] == after[2]:
        middle = [(before[0], after[1], before[2])]
    else:
        if before[2] * after[2] < 0:
            split = first + int(np.argmax(before[2] * fit.mean[first : last + 1]))
        else:
            split = last if before[2] == 0 else first
        middle = [(before[0], max(split - 1, before[0]), before[2]), (split, after[1], after[2])]
    return [*segments[: at - 1], *middle, *segments[at + 2 :]]


def _locate(fit: SmoothCurve, before: Segment, after: Segment, config: StageConfig) -> tuple[float, float, float]:
    """Lower end of the credible interval, median and upper end of the boundary between two segments, in steps.

    In every posterior draw the boundary is sought between the middles of its segments: the extreme
    point where the slope changes sign; the slowest one between two segments of one sign; else, going
    from the middle of the moving segment towards the flat one, the first point where the slope is below
    the plateau level.
    """
    low, high, half = (before[0] + before[1]) // 2, (after[0] + after[1]) // 2 + 1, _half_width(fit)
    window = fit.draws[:, low:high]
    if before[2] * after[2] < 0:
        found = np.argmax(before[2] * window, axis=1)
    elif before[2] == after[2]:
        found = half + np.argmin(before[2] * (window[:, 2 * half :] - window[:, : -2 * half]), axis=1)
    else:
        moving = before[2] or after[2]
        level = config.plateau * np.abs(np.gradient(fit.mean, fit.x)).max()
        is_moving = moving * np.gradient(window, fit.x[low:high], axis=1) > level
        if before[2] == 0:
            still = ~is_moving[:, ::-1]
            found = window.shape[1] - np.where(still.any(1), np.argmax(still, axis=1), window.shape[1])
        else:
            found = np.where(is_moving.all(1), window.shape[1] - 1, np.argmin(is_moving, axis=1))
    tail = (1 - config.credible) / 2
    left, middle, right = np.expm1(np.quantile(fit.x[np.minimum(low + found, high - 1)], [tail, 0.5, 1 - tail]))
    return float(left), float(middle), float(right)


def _fit(kernel: Any, x: np.ndarray, y: np.ndarray, noise: np.ndarray) -> GaussianProcessRegressor:
    model = GaussianProcessRegressor(kernel, alpha=noise, n_restarts_optimizer=4, random_state=0)
    with warnings.catch_warnings():
        # A hyperparameter at its bound is an answer here: "no white noise", "as good as constant".
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x[:, None], y)
