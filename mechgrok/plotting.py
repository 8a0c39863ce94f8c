"""Figures over training with the stages shaded. Functions return figures or draw on axes; none shows one."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mechgrok.calibration import Calibration, Trial
from mechgrok.types import LLCCurve, Stage, Trajectory

INK = "#1f3b57"
STAGE_COLORS = {"rising": "#f3d9b1", "falling": "#cfe3d4", "plateau": "#ececec"}
LANDMARK = "#9c3848"


def panels(n: int, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure with n axes side by side; no global pyplot state."""
    fig = Figure(figsize=(5.2 * n if n > 1 else 8.0, height), layout="constrained")
    return fig, list(np.atleast_1d(fig.subplots(1, n)))


def developmental_axis(ax: Axes, stages: Sequence[Stage], ylabel: str) -> None:
    """log(1 + step) on the x axis over all that is drawn, stages as shaded bands, boundary intervals as brackets below.

    There may be more than stages cover: at either end of a run there are none where no LLC could be measured.
    """
    ax.set_xscale("function", functions=(np.log1p, np.expm1))
    drawn = [*ax.dataLim.intervalx, *(edge for stage in stages for edge in (stage.start, stage.end))]
    drawn = [edge for edge in drawn if np.isfinite(edge)] or [0.0, 1.0]
    low, high = max(min(drawn), 0.0), max(drawn)
    ax.set_xlim(low, high)
    ax.set_xticks([tick for tick in (0, 1, 10, 100, 1000, 10_000, 100_000) if low <= tick <= high])
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlabel("step")
    ax.set_ylabel(ylabel)
    ax.spines[["top", "right"]].set_visible(False)
    for stage in stages:
        ax.axvspan(stage.start, stage.end, color=STAGE_COLORS[stage.direction], lw=0, zorder=0)
        middle = np.expm1((np.log1p(stage.start) + np.log1p(stage.end)) / 2)
        ax.text(middle, 1.01, stage.name, transform=ax.get_xaxis_transform(), ha="center", fontsize=8)
        if stage.end_interval is not None:
            ax.axvline(stage.end, color=INK, lw=0.8, ls=":")  # two rises have one colour
            ax.plot(stage.end_interval, [0.015, 0.015], transform=ax.get_xaxis_transform(), color=INK, lw=2.5)


def mark_steps(ax: Axes, landmarks: Mapping[str, float]) -> None:
    """Dashed lines for landmarks that are no stages, such as those of the loss."""
    for i, (name, step) in enumerate((name, step) for name, step in landmarks.items() if np.isfinite(step)):
        ax.axvline(step, color=LANDMARK, ls="--", lw=1)
        ax.text(step, 0.5 + 0.1 * i, f" {name}", transform=ax.get_xaxis_transform(), color=LANDMARK, fontsize=8)


def llc_figure(
    curve: LLCCurve, stages: Sequence[Stage], smooth: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
) -> Figure:
    """The model's LLC: estimates with 95 % intervals and, if given, the smooth curve.

    smooth: (steps, mean, sd), drawn as mean +- 1.96 sd.
    Where the curve has a control, that stands in a panel of its own with an axis of its own.
    """
    fig, axes = panels(1 if curve.control is None else 2, height=3.8)
    if smooth is not None:
        steps, mean, sd = smooth
        axes[0].fill_between(steps, mean - 1.96 * sd, mean + 1.96 * sd, color=INK, alpha=0.25, lw=0)
        axes[0].plot(steps, mean, color=INK, lw=1.5)
    for ax, of in zip(axes, (curve, curve.control), strict=False):
        assert of is not None
        _points(ax, of, "model", INK)
        gamma = f", localization {of.settings['model'].localization:g}" if of.settings else ""
        developmental_axis(ax, stages, f"LLC of the model{gamma}")
    if curve.finer is not None:
        mine, other = curve.row("model"), curve.finer.row("model")
        shared = np.searchsorted(curve.steps, curve.finer.steps)
        at = 2 * curve.finer.llc[other] - curve.llc[mine][shared]
        error = np.hypot(2 * curve.finer.std_error[other], curve.std_error[mine][shared])
        style: dict[str, Any] = {"fmt": "o", "color": INK, "mfc": "none", "alpha": 0.5, "markersize": 4, "lw": 1}
        axes[0].errorbar(curve.finer.steps, at, 1.96 * error, label="extrapolated to step size 0", **style)
        axes[0].legend(frameon=False, fontsize=8)
    return fig


def training_figure(trajectory: Trajectory, stages: Sequence[Stage], landmarks: Mapping[str, float]) -> Figure:
    """Train and test loss (log scale, nats) and accuracy, with the landmarks of the loss."""
    fig, axes = panels(2)
    for ax, name, unit in zip(axes, ("loss", "accuracy"), ("nats", "share"), strict=True):
        for side in ("train", "test"):
            ax.plot(trajectory.steps, trajectory.column(f"{side}_{name}"), label=side)
        developmental_axis(ax, stages, f"{name} ({unit})")
        mark_steps(ax, landmarks)
        ax.legend(frameon=False)
    axes[0].set_yscale("log")
    return fig


def components_figure(curve: LLCCurve, stages: Sequence[Stage]) -> Figure:
    """One line per component that is not the whole model, the heads of each layer in a panel of their own."""
    names = [name for name in curve.components if name != "model"]
    rows = list(dict.fromkeys(_panel(name) for name in names)) or [""]
    fig, axes = panels(len(rows), height=3.8)
    for ax, row in zip(axes, rows, strict=True):
        for name in names:
            if _panel(name) == row:
                (line,) = ax.plot(curve.steps, curve.llc[curve.row(name)], lw=1, label=name)
                _points(ax, curve, name, line.get_color())
        developmental_axis(ax, stages, f"wrLLC{row and ', ' + row}")
        ax.legend(frameon=False, fontsize=8)
    return fig


def _panel(name: str) -> str:
    """ "layer 0" for "L0H3", "" for what is no single head."""
    head = re.fullmatch(r"L(\d+)H\d+", name)
    return f"layer {head[1]}" if head else ""


def calibration_figure(found: Calibration) -> Figure:
    """One row a checkpoint and component: the grid as a heat map, the step-size sweep, and the traces.

    Heat map: the LLC; a frame marks the recommended cell, a cross those that no setting should use.
    Traces: the sampled loss, nats, averaged over chains, with the loss (dark) and with nbeta = 0 (red).
    """
    rows = [(trial.step, trial.estimate.component) for trial in found.final]
    fig = Figure(figsize=(13, 3.4 * len(rows)), layout="constrained")
    axes = np.atleast_2d(fig.subplots(len(rows), 3))
    for line, (step, name) in zip(axes, rows, strict=True):

        def mine(trials: Sequence[Trial], step: int = step, name: str = name) -> list[Trial]:
            return [trial for trial in trials if (trial.step, trial.estimate.component) == (step, name)]

        _heat_map(line[0], mine(found.grid), found)
        line[0].set_title(f"{name} at step {step}: LLC", loc="left", fontsize=10)
        sweep = [trial.estimate for trial in mine(found.steps)]
        sizes = [estimate.config.step_size for estimate in sweep]
        line[1].errorbar(sizes, [e.llc for e in sweep], [1.96 * e.std_error for e in sweep], fmt="o-", color=INK)
        line[1].axvline(found.recommended.step_size, color=LANDMARK, ls="--", lw=1)
        line[1].set(xscale="log", xlabel="step size", ylabel="LLC")
        line[1].set_xticks(sizes, [f"{size:.2g}" for size in sizes])
        line[1].set_xticks([], minor=True)
        for trial, color, label in (
            (mine(found.final)[0], INK, "sampled"),
            (mine(found.control)[0], LANDMARK, "nbeta 0"),
        ):
            line[2].plot(trial.estimate.losses.mean(axis=0), color=color, lw=1, label=label)
        line[2].axhline(mine(found.final)[0].estimate.init_loss, color="gray", lw=1, label="loss at w*")
        line[2].set(xlabel="draw", ylabel="loss (nats)")
        line[2].legend(frameon=False, fontsize=8)
    return fig


def _heat_map(ax: Axes, trials: Sequence[Trial], found: Calibration) -> None:
    nbetas, gammas = (sorted({cell[axis] for cell in found.sensitivity}) for axis in (0, 1))
    values = np.full((len(gammas), len(nbetas)), np.nan)
    for trial in trials:
        config = trial.estimate.config
        values[gammas.index(config.localization), nbetas.index(config.nbeta)] = trial.estimate.llc
    ax.imshow(values, origin="lower", aspect="auto", cmap="viridis")
    bright = np.nanmin(values) + 0.6 * np.ptp(values[np.isfinite(values)])
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            usable = np.isfinite(found.sensitivity[nbetas[column], gammas[row]])
            ax.text(
                column,
                row,
                f"{value:.3g}" if usable else f"× {value:.3g}",
                ha="center",
                va="center",
                color="k" if value > bright else "w",
                fontsize=7,
            )
    best = (nbetas.index(found.recommended.nbeta) - 0.5, gammas.index(found.recommended.localization) - 0.5)
    ax.add_patch(Rectangle(best, 1, 1, fill=False, edgecolor=LANDMARK, lw=2.5))
    ax.set_xticks(range(len(nbetas)), [f"{nbeta:g}" for nbeta in nbetas])
    ax.set_yticks(range(len(gammas)), [f"{gamma:g}" for gamma in gammas])
    ax.set(xlabel="nbeta", ylabel="localization")


def to_svg(fig: Figure) -> str:
    """The figure as SVG text, the same bytes for the same figure: no date, no random ids."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "mechgrok"}):
        fig.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _points(ax: Axes, curve: LLCCurve, component: str, color: Any) -> None:
    """Estimates with 95 % intervals; saturated ones as open squares, unhealthy ones as black crosses."""
    row = curve.row(component)
    healthy, saturated = curve.healthy[row], curve.saturated[row]
    for mask, style in (
        (healthy & ~saturated, {"fmt": "o", "color": color}),
        (healthy & saturated, {"fmt": "s", "color": color, "mfc": "white"}),
        (~healthy, {"fmt": "x", "color": "black"}),
    ):
        if mask.any():
            error = 1.96 * curve.std_error[row][mask]
            ax.errorbar(curve.steps[mask], curve.llc[row][mask], error, markersize=4, lw=1, zorder=3, **style)
