"""The vocabulary: every record that crosses a file boundary. All frozen, shapes checked on construction.

Axis names are singular: chain, draw, component, checkpoint, pos, head. Losses are in nats.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from mechgrok.config import LLCConfig, RunConfig
from mechgrok.errors import ComponentError, ShapeError
from mechgrok.health import ChainHealth
from mechgrok.task_config import TaskConfig

if TYPE_CHECKING:
    import xarray as xr
    from transformer_lens import HookedTransformer


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ShapeError(message)


@dataclass(frozen=True)
class Examples:
    """tokens, targets: Int[example, pos]; weights: Float[example, pos], 0 where a position is not scored.

    An example's loss is the weighted mean of its positions' cross-entropies, in nats.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        for name in ("tokens", "targets", "weights"):
            kind = type(getattr(self, name))
            _expect(issubclass(kind, Tensor), f"{name} must be a torch.Tensor, got {kind.__name__}; convert it")
        shape = self.tokens.shape
        _expect(len(shape) == 2 and shape[0] > 0, f"tokens must be [example, pos] and not empty, got {tuple(shape)}")
        for name, part in (("targets", self.targets), ("weights", self.weights)):
            _expect(
                part.shape == shape, f"{name} must have the shape of tokens {tuple(shape)}, got {tuple(part.shape)}"
            )
        for name, part in (("tokens", self.tokens), ("targets", self.targets)):
            _expect(part.dtype == torch.int64, f"{name} must be int64, got {part.dtype}")
        _expect(
            bool((self.weights.isfinite() & (self.weights >= 0)).all()),
            "weights must be finite and not negative; a position that is not scored has weight 0",
        )
        _expect(bool((self.weights.sum(1) > 0).all()), "every example needs a position of positive weight")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, targets, weights), the columns that a batch is drawn from.

        Targets and weights begin at the first position that any example scores: [example, scored];
        the logits before it are never needed.
        """
        first = int((self.weights > 0).any(0).nonzero()[0])
        return self.tokens, self.targets[:, first:], self.weights[:, first:]

    def first(self, n: int) -> "Examples":
        """The first n examples, or all if there are fewer."""
        return self.at(slice(n))

    def at(self, rows: Tensor | slice) -> "Examples":
        """The examples of these numbers, Int[row]."""
        return Examples(self.tokens[rows], self.targets[rows], self.weights[rows])

    def __add__(self, other: "Examples") -> "Examples":
        parts = ("tokens", "targets", "weights")
        return Examples(*(torch.cat([getattr(self, part), getattr(other, part)]) for part in parts))


@dataclass(frozen=True)
class Split:
    """The examples of a task; `labels` are the printable names of its tokens.

    distributions: other data by name, for data-refined LLCs. bos: the token that every row begins with.
    plain: tokens that random sequences may be made of; empty for all. kinds: Int[example, pos] of `test`,
    what made each target, as an index of `kind_names`, where the task knows it. floors: Float[example, pos] of
    `test`, the nats that each target costs who knows the planted truth. language: that truth, where there is one.
    """

    train: Examples
    test: Examples
    labels: tuple[str, ...]
    n_classes: int
    distributions: Mapping[str, Examples] = field(default_factory=dict)
    bos: int | None = None
    plain: tuple[int, ...] = ()
    kinds: Tensor | None = None
    kind_names: tuple[str, ...] = ()
    floors: Tensor | None = None
    language: Any = None

    def __post_init__(self) -> None:
        expected = self.test.tokens.shape
        for name, values in (("kinds", self.kinds), ("floors", self.floors)):
            got = expected if values is None else values.shape
            _expect(got == expected, f"{name} must have the test tokens' shape {tuple(expected)}, got {tuple(got)}")

    def first(self, n: int) -> "Split":
        """The split with the first n rows of each kind of data."""
        others = {name: examples.first(n) for name, examples in self.distributions.items()}
        kinds, floors = (None if known is None else known[:n] for known in (self.kinds, self.floors))
        train, test = self.train.first(n), self.test.first(n)
        return replace(self, train=train, test=test, distributions=others, kinds=kinds, floors=floors)


@dataclass(frozen=True)
class Component:
    """A named subset of a model's parameters.

    masks: parameter name -> bool mask of the parameter's shape, or None for all of it.
    heads: the (layer, head) pairs, where the component is one head or a union of heads.
    """

    name: str
    masks: Mapping[str, Tensor | None]
    n_params: int
    heads: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.n_params <= 0:
            raise ComponentError(f"component {self.name!r} selects no parameter; name one that the model has")


@dataclass(frozen=True)
class CheckpointMetrics:
    """Loss (nats) and accuracy on both sides of the split at one checkpoint."""

    step: int
    train_loss: float
    test_loss: float
    train_accuracy: float
    test_accuracy: float


@dataclass(frozen=True)
class Trajectory:
    """A trained model through its checkpoints; `model_at` builds each model when it is asked for."""

    config: RunConfig
    metrics: tuple[CheckpointMetrics, ...]
    load: "Callable[[int], HookedTransformer]" = field(repr=False)

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(row.step for row in self.metrics)

    def model_at(self, step: int) -> "HookedTransformer":
        _expect(step in self.steps, f"no checkpoint at step {step}; checkpoints are {self.steps}")
        return self.load(step)

    def __iter__(self) -> "Iterator[tuple[int, HookedTransformer]]":
        return ((step, self.load(step)) for step in self.steps)

    def column(self, name: str) -> np.ndarray:
        """One field of the metrics over checkpoints, e.g. "test_loss": Float[checkpoint]."""
        return np.array([getattr(row, name) for row in self.metrics])


@dataclass(frozen=True)
class LLCEstimate:
    """llc = nbeta * (mean of `losses` - init_loss); std_error includes init_loss_error.

    init_loss_error is 0 where the baseline is the mean over all of the sampled data.

    losses: Float[chain, draw], nats, burn-in left out; NaN from where a chain diverged. Where `paired`,
    each is L_b(w) - L_b(w*) + L_n(w*), the loss on the draw's batch b less that batch's own luck.
    bias, bias_error: what the finite step size adds to llc, with its standard error; None where it was
    not asked for. It is not subtracted from llc and not part of std_error.
    path: what evaluated the losses (see `LLCConfig`); why_not_faster: why nothing faster did, in words.
    llc_variance, llc_variance_error: the same coefficient from how much the sampled loss varies, nbeta^2 (Var L - noise
    of the batches), with its standard error; see `sampling.variance`. It needs no init_loss, so it stands where w* is
    no minimum, and it may be negative. NaN where the noise of the batches is not known: batches of one example.
    """

    component: str
    llc: float
    std_error: float
    losses: np.ndarray
    init_loss: float
    init_loss_error: float
    n_params: int
    config: LLCConfig
    health: ChainHealth
    paired: bool = False
    bias: float | None = None
    bias_error: float | None = None
    path: str = ""
    why_not_faster: str | None = None
    llc_variance: float = math.nan
    llc_variance_error: float = math.nan

    def __post_init__(self) -> None:
        expected = (self.config.n_chains, self.config.n_draws)
        _expect(self.losses.shape == expected, f"losses must be [chain, draw] {expected}, got {self.losses.shape}")


VARIANCES = ("llc_variance", "llc_variance_error", "gradient_variance", "gradient_variance_error")  # of a curve


@dataclass(frozen=True)
class LLCCurve:
    """Estimates over training: llc, std_error, healthy, saturated are [component, checkpoint].

    init_loss: Float[checkpoint], the loss at each checkpoint, if known. settings: of each component, if known.
    llc_variance, gradient_variance: [component, checkpoint], as `LLCEstimate` and its health have them, with their
    standard errors; NaN where they are not known.
    control: the model's curve under another localization, never drawn on this one's axis. finer: the model's at half
    the step size, which tells the bias of this one. Both may have fewer checkpoints. refined: curves sampled on other
    distributions, by name, maybe of fewer components and checkpoints.
    """

    steps: np.ndarray
    components: tuple[str, ...]
    llc: np.ndarray
    std_error: np.ndarray
    healthy: np.ndarray = field(default_factory=lambda: np.array(True))
    saturated: np.ndarray = field(default_factory=lambda: np.array(False))
    init_loss: np.ndarray | None = None
    llc_variance: np.ndarray = field(default_factory=lambda: np.array(np.nan))
    llc_variance_error: np.ndarray = field(default_factory=lambda: np.array(np.nan))
    gradient_variance: np.ndarray = field(default_factory=lambda: np.array(np.nan))
    gradient_variance_error: np.ndarray = field(default_factory=lambda: np.array(np.nan))
    settings: Mapping[str, LLCConfig] = field(default_factory=dict)
    control: "LLCCurve | None" = None
    finer: "LLCCurve | None" = None
    refined: "Mapping[str, LLCCurve]" = field(default_factory=dict)

    @property
    def variance_ratio(self) -> np.ndarray:
        """llc_variance / llc, [component, checkpoint]; NaN where one of them is not positive."""
        both = np.where(self.llc_variance > 0, self.llc_variance, np.nan), np.where(self.llc > 0, self.llc, np.nan)
        return both[0] / both[1]

    @property
    def bias(self) -> tuple[np.ndarray, np.ndarray] | None:
        """What the step size adds to the model's LLC, with its standard error, at the steps of `finer`.

        2 (llc - finer.llc), as in `llc.bias`; None where there is no finer curve.
        """
        if self.finer is None:
            return None
        mine, other = self.row("model"), self.finer.row("model")
        shared = np.searchsorted(self.steps, self.finer.steps)
        error = np.hypot(self.std_error[mine][shared], self.finer.std_error[other])
        return 2 * (self.llc[mine][shared] - self.finer.llc[other]), 2 * error

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        _expect(not isinstance(self.components, str), f"components must be names; write ({self.components!r},)")
        set_field(self, "components", tuple(self.components))
        set_field(self, "steps", np.asarray(self.steps))
        shape = (len(self.components), len(self.steps))
        for name in ("llc", "std_error"):
            set_field(self, name, np.asarray(getattr(self, name), dtype=float))
        for names, kind in ((("healthy", "saturated"), bool), (VARIANCES, float)):
            for name in names:
                values = np.asarray(getattr(self, name), dtype=kind)
                set_field(self, name, np.full(shape, values) if values.ndim == 0 else values)
        for name in ("llc", "std_error", "healthy", "saturated", *VARIANCES):
            got = getattr(self, name).shape
            _expect(got == shape, f"{name} must be [component, checkpoint] {shape}, got {got}")
        increasing = self.steps.ndim == 1 and self.steps.size > 0 and bool(np.all(np.diff(self.steps) > 0))
        increasing = increasing and self.steps[0] >= 0 and self.steps[-1] < np.inf
        _expect(bool(increasing), f"steps must be finite and increase from 0 or more, got {self.steps}")
        _expect(len(set(self.components)) == len(self.components), f"components repeat: {self.components}")
        _expect(not bool(np.any(self.std_error < 0)), "std_error must not be negative")
        if self.init_loss is not None:
            set_field(self, "init_loss", np.asarray(self.init_loss, dtype=float))
            _expect(self.init_loss.shape == self.steps.shape, "init_loss must be [checkpoint]")

    def row(self, component: str) -> int:
        """The index of a component; ComponentError if the curve does not follow it."""
        if component not in self.components:
            raise ComponentError(f"the curve has no component {component!r}; it has {', '.join(self.components)}")
        return self.components.index(component)

    def to_dataset(self) -> "xr.Dataset":
        """An xarray Dataset [component, checkpoint]; settings are attributes, or coordinates where they differ."""
        import xarray as xr

        dims = ("component", "checkpoint")
        names = ("llc", "std_error", "healthy", "saturated", *VARIANCES)
        values = {name: (dims, getattr(self, name)) for name in names}
        data = xr.Dataset(values, {"component": list(self.components), "checkpoint": self.steps})
        each = [self.settings[name].model_dump() for name in self.components if name in self.settings]
        for key, value in each[0].items() if each else ():
            if any(one[key] != value for one in each):
                own = [np.nan if one[key] is None else one[key] for one in each]
                data = data.assign_coords({key: ("component", own)})
            elif value is not None:
                data.attrs[key] = value
        return data if self.init_loss is None else data.assign(init_loss=("checkpoint", self.init_loss))


Direction = Literal["rising", "falling", "plateau"]


@dataclass(frozen=True)
class Stage:
    """Steps [start, end) between two critical points of the LLC curve.

    start_interval, end_interval: credible intervals of the boundaries, None at the run's own ends.
    delta_llc: change of the smoothed LLC over the stage; delta_loss: change of the loss, nats
    (None where the curve does not know the loss).
    """

    name: str
    direction: Direction
    start: float
    end: float
    start_interval: tuple[float, float] | None
    end_interval: tuple[float, float] | None
    delta_llc: float
    delta_loss: float | None


@dataclass(frozen=True)
class Claim:
    """A number, what it is held against, and how often a random placement of the stages does as well.

    null_quantile: share of random placements whose value is less in favour of the claim, ties
    counted half; .5 when the value does not depend on where the stages lie; None before scoring,
    and where there is nothing to compare.
    chance: how probable it is, where that is known, that the claim holds where there is nothing to find: the level of a
    test, one in so many of a first rank, or a share of all orders.
    """

    text: str
    stage: str
    value: float
    threshold: float
    relation: Literal[">=", "<="] = ">="
    null_quantile: float | None = None
    chance: float | None = None

    @property
    def holds(self) -> bool:
        """False for NaN: a claim that cannot be evaluated does not hold."""
        return self.value >= self.threshold if self.relation == ">=" else self.value <= self.threshold


@dataclass(frozen=True)
class Report:
    """What an analysis found: series [checkpoint, ...] on `steps`, and claims scored against chance."""

    analysis: str
    steps: np.ndarray
    series: Mapping[str, np.ndarray]
    claims: tuple[Claim, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)  # e.g. the key frequencies
    derived: Mapping[str, Any] = field(default_factory=dict)  # what was made of all checkpoints together

    def __post_init__(self) -> None:
        for name, values in self.series.items():
            _expect(len(values) == len(self.steps), f"series {name!r} must have one entry per checkpoint")


@dataclass(frozen=True)
class Study:
    """A trajectory with its LLC curve and stages: what an analysis is given."""

    config: RunConfig
    split: Split
    trajectory: Trajectory
    curve: LLCCurve
    stages: tuple[Stage, ...]
    made_with: Mapping[str, Sequence[Mapping[str, str]]] = field(default_factory=dict)  # "training", "sampling"
    suspicious: Mapping[int, str] = field(default_factory=dict)  # steps that the audit of an import names, and why

    @property
    def task(self) -> TaskConfig:
        """The task's settings."""
        return self.config.task
