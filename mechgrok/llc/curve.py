"""LLC curves: one estimate per (checkpoint, component), a pure function of names and seeds."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mechgrok import seeds
from mechgrok.components import expand_names
from mechgrok.config import LLCConfig
from mechgrok.errors import ConfigError, ShapeError
from mechgrok.llc.estimate import estimate_group
from mechgrok.llc.precision import say_if_idle
from mechgrok.llc.problem import groups
from mechgrok.llc.work import estimate_work, loops_pay
from mechgrok.reproducible import reproducible
from mechgrok.schedule import each_result
from mechgrok.types import Examples, LLCCurve, LLCEstimate, Trajectory
from mechgrok.unwrap import unwrapped

if TYPE_CHECKING:
    from transformer_lens import HookedTransformer

Unit = tuple[int, str, LLCConfig]  # (step, component, settings)


def llc_curve(
    trajectory: "Trajectory | Iterable[tuple[int, HookedTransformer]]",
    examples: Examples,
    *,
    components: Sequence[str],
    config: LLCConfig,
    seed: int,
    n_workers: int = 1,
    n_threads: int = 1,
) -> LLCCurve:
    """Every component's LLC at every checkpoint, all with the same settings.

    The heads of a layer are sampled together. The estimate at a step equals `estimate_llc(model, examples,
    component=..., config=config, seed=point_seed(seed, step))`, for heads up to rounding; its bits do not
    depend on the number of workers.

    Args:
        trajectory: a Trajectory, or (step, model) pairs; pairs are sampled in this process.
        components: names; "heads" stands for every head.
        n_threads: torch threads of each estimate, whose bits depend on it.
    """
    if len(set(components)) < len(components):
        raise ShapeError(f"components repeat: {', '.join(components)}; name each once")
    if isinstance(trajectory, Trajectory):
        names = expand_names(trajectory.model_at(trajectory.steps[0]), components)
        units = [(step, name, config) for step in trajectory.steps for name in names]
        loops = curve_loops_pay(trajectory, examples, units)
        found = dict(estimate_units(trajectory, examples, units, seed, n_workers, n_threads, loops=loops))
    else:
        found, names = {}, tuple(components)
        with reproducible(n_threads):
            for pair in trajectory:
                step, model = _checked(pair)
                if any(step == done for done, _, _ in found):
                    raise ShapeError(f"step {step} comes twice in the trajectory; give each step once")
                names = expand_names(model, components)  # a bad one is refused before any sampling
                say_if_idle(config, model, examples)
                for group in groups(model, names):
                    estimates = estimate_group(model, examples, group, config=config, seed=point_seed(seed, step))
                    found |= {(step, one.component, config): one for one in estimates}
    return assemble_curve(found, dict.fromkeys(names, config))


def _checked(pair: Any) -> "tuple[int, HookedTransformer]":
    from transformer_lens import HookedTransformer

    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ShapeError(f"trajectory must be (step, model) pairs, got {type(pair).__name__}; write [(0, model), ...]")
    step, model = pair
    if not isinstance(step, int | np.integer) or step < 0:
        raise ShapeError(f"steps must be whole numbers from 0 on, got {step!r}")
    model = unwrapped(model) if isinstance(model, torch.nn.Module) else model
    if not isinstance(model, HookedTransformer):
        raise ConfigError(
            f"a curve needs HookedTransformers, got {type(model).__name__} at step {step}; call estimate_llc for each "
            "and make an LLCCurve of what it returns"
        )
    return int(step), model


def point_seed(seed: int, step: int) -> int:
    """The root seed of the estimates at one checkpoint, so that errors at two of them are independent."""
    return seeds.derive(seed, "llc", step)


def estimate_units(
    trajectory: Trajectory,
    examples: Examples,
    units: Sequence[Unit],
    seed: int,
    n_workers: int,
    n_threads: int,
    scheduler: str | None = None,
    loops: bool | None = None,
) -> Iterator[tuple[Unit, LLCEstimate]]:
    """The estimates of the units as each ends, in any order, on this machine or on the cluster at `scheduler`.

    Units that go together are one job, and come together.

    loops: whether compiling loops pays (`curve_loops_pay`), None: each job as for itself.
    n_threads: torch threads of one job. It is fixed by the caller, not by the machine, because
    the bits of a sum depend on it.
    """
    for config in dict.fromkeys(config for _, _, config in units if config.precision != "float32"):
        say_if_idle(config, trajectory.model_at(trajectory.steps[0]), examples)
    work = partial(_estimate_units, trajectory, examples, seed, n_threads, loops)
    for estimates in each_result(work, _jobs(trajectory, units), n_workers, scheduler):
        yield from estimates


def curve_loops_pay(trajectory: Trajectory, examples: Examples, units: Sequence[Unit]) -> bool:
    """Whether compiling loops pays for all of these estimates together."""
    if not units:
        return False
    model, configs = trajectory.model_at(trajectory.steps[0]), [config for _, _, config in units]
    return loops_pay((estimate_work(model, examples, config) for config in configs), configs)


def with_company(trajectory: Trajectory, units: Sequence[Unit], missing: Sequence[Unit]) -> list[Unit]:
    """The missing units and all that go together with one: a group's last bits are those of the whole group."""
    if not missing:
        return []
    wanted = {(step, name, config) for step, name, config in missing}
    jobs = [[(step, name, config) for name in names] for step, names, config in _jobs(trajectory, units)]
    return [unit for job in jobs if wanted & set(job) for unit in job]


def _jobs(trajectory: Trajectory, units: Sequence[Unit]) -> list[tuple[int, tuple[str, ...], LLCConfig]]:
    """(step, names that go together, settings), in the order of the units."""
    if not units:
        return []
    model = trajectory.model_at(trajectory.steps[0])
    together: dict[tuple[int, LLCConfig], list[str]] = {}
    for step, name, config in units:
        together.setdefault((step, config), []).append(name)
    return [(step, group, config) for (step, config), names in together.items() for group in groups(model, names)]


def assemble_curve(
    found: Mapping[Unit, LLCEstimate],
    settings: Mapping[str, LLCConfig],
    control: LLCCurve | None = None,
    finer: LLCCurve | None = None,
    refined: Mapping[str, LLCCurve] | None = None,
    elsewhere: bool = False,
) -> LLCCurve:
    """A curve from the estimates of all its units; settings: of each component, in the curve's order.

    elsewhere: the data are others than the model was trained on, so that w* need be no minimum of their loss, and an
    estimate counts as healthy that is `sound`.

    Raises ShapeError if there are none.
    """
    steps = sorted({step for step, name, config in found if settings.get(name) == config})
    if not steps:
        raise ShapeError("a curve needs at least one checkpoint and one component; there are none")

    def grid(read: Callable[[LLCEstimate], float]) -> np.ndarray:
        return np.array([[read(found[step, *of]) for step in steps] for of in settings.items()])

    return LLCCurve(
        steps=np.array(steps),
        components=tuple(settings),
        llc=grid(lambda e: e.llc),
        std_error=grid(lambda e: e.std_error),
        healthy=grid(lambda e: e.health.sound if elsewhere else e.health.healthy),
        saturated=grid(lambda e: e.health.saturated),
        init_loss=grid(lambda e: e.init_loss)[0],
        llc_variance=grid(lambda e: e.llc_variance),
        llc_variance_error=grid(lambda e: e.llc_variance_error),
        gradient_variance=grid(lambda e: e.health.gradient_variance),
        gradient_variance_error=grid(lambda e: e.health.gradient_variance_error),
        settings=settings,
        control=control,
        finer=finer,
        refined=refined or {},
    )


def without_steps(curve: LLCCurve, steps: Collection[int]) -> LLCCurve:
    """The curve with no estimate healthy at these steps, nor in its control, its finer and its refined curves."""

    def without(one: LLCCurve) -> LLCCurve:
        return replace(one, healthy=one.healthy & ~np.isin(one.steps, list(steps)))

    return replace(
        without(curve),
        control=None if curve.control is None else without(curve.control),
        finer=None if curve.finer is None else without(curve.finer),
        refined={name: without(part) for name, part in curve.refined.items()},
    )


def _estimate_units(
    trajectory: Trajectory,
    examples: Examples,
    seed: int,
    n_threads: int,
    loops: bool | None,
    job: tuple[int, tuple[str, ...], LLCConfig],
) -> list[tuple[Unit, LLCEstimate]]:
    step, names, config = job
    with reproducible(n_threads):
        model = trajectory.model_at(step)
        seed = point_seed(seed, step)
        estimates = estimate_group(model, examples, names, config=config, seed=seed, loops=loops)
    return [((step, one.component, config), one) for one in estimates]
