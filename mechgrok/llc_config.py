"""The settings of the sampler, and of the curves that are made with it: [llc] of a run."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, ValidationError, model_validator

from mechgrok.errors import ConfigError
from mechgrok.setting_errors import one_sentence
from mechgrok.task_config import Fraction, NotNegative, Positive, Settings, Size

MEMORY_GB = 2.0

SamplerName = Literal["sgld", "rmsprop_sgld", "sgnht", "baoab", "mala"]
MOVING: tuple[SamplerName, ...] = ("baoab", "sgnht")  # those with a velocity
Precision = Literal["float32", "int16", "bfloat16", "float64"]
LLCPath = Literal["auto", "compiled", "torch", "hooks", "module"]


class LLCConfig(Settings):
    """One setting of the sampler; estimates of different settings are not comparable.

    nbeta: n times the inverse temperature beta. localization: gamma, the strength of the pull to
    w*. step_size: epsilon. batch_size: examples per step, or None for all (no gradient noise).
    momentum: the share of its velocity that sgnht or baoab keeps over one step. rmsprop_decay,
    rmsprop_stability: of rmsprop_sgld. canonicalize: sample the model in its canonical gauge.
    engine: "devinterp" runs devinterp's own sampler, to check against; it offers sgld and rmsprop_sgld.
    precision: of matrix products; weights, noise, softmax and baseline stay in float32. "int16" lets them be
    made of whole numbers, to 1e-5 or so of the vectors' lengths, where the processor is faster at these and
    compiled passes run; "bfloat16" in bfloat16, where torch is (AMX, CUDA). "float64" is for checks.
    device: where the chains run; "cuda" draws other normals than "cpu", so bits differ between the two.
    path: what evaluates the losses: "compiled" loops or "torch"'s operations compute the layers themselves, "hooks" run
    the model with its heads supplied by hooks, "module" runs it as it is; "auto": the first that is shown to compute
    the model, with loops where there is work enough for compiling them to pay.
    memory_gb: what the activations of one estimate may take. More is kept rather than computed anew;
    the last bits of a result depend on it, which is why it is a setting.
    """

    nbeta: NotNegative
    step_size: Positive
    localization: NotNegative
    n_chains: Annotated[int, Field(ge=2, le=2**20)] = 4
    n_draws: Annotated[int, Field(ge=8, le=10**7)] = 200
    n_burnin: Annotated[int, Field(ge=0, le=10**7)] = 100
    batch_size: Size | None = None
    sampler: SamplerName = "sgld"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rmsprop_decay: Fraction = 0.99
    rmsprop_stability: Positive = 0.1
    canonicalize: bool = False
    engine: Literal["mechgrok", "devinterp"] = "mechgrok"
    precision: Precision = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    memory_gb: Positive = MEMORY_GB
    path: LLCPath = "auto"

    @model_validator(mode="after")
    def _sampler_fits(self) -> Self:
        if self.sampler == "mala" and self.batch_size is not None:
            raise ValueError(f"sampler mala needs exact gradients, got batch_size {self.batch_size}; leave it out")
        if self.sampler == "sgnht" and self.momentum == 0:
            raise ValueError("sgnht needs a velocity to measure: set momentum above 0, or use baoab")
        if self.engine == "devinterp" and self.sampler not in ("sgld", "rmsprop_sgld"):
            raise ValueError(f"devinterp has no sound {self.sampler}; use sgld or rmsprop_sgld, or engine mechgrok")
        if self.engine == "devinterp" and self.device != "cpu":
            raise ValueError(
                "engine devinterp is run on the cpu here, as it is there to check against; leave device out"
            )
        if self.n_chains * self.n_draws > 10**9:
            raise ValueError(
                f"n_chains * n_draws must be at most 10^9, got {self.n_chains} * {self.n_draws}; lower one"
            )
        return self

    def acts(self) -> Mapping[str, tuple[bool, str]]:
        rmsprop = self.sampler == "rmsprop_sgld", "in rmsprop_sgld"
        return {
            "momentum": (self.sampler in MOVING, f"in {' and '.join(MOVING)}"),
            "rmsprop_decay": rmsprop,
            "rmsprop_stability": rmsprop,
            "path": (self.engine == "mechgrok", "in mechgrok's own engine"),
            "precision": (self.engine == "mechgrok" or self.precision == "float64", "in mechgrok's own engine"),
        }

    def halved(self) -> Self:
        """Half the step size for twice as many steps: the same time, so the same mixing."""
        changes = {"step_size": self.step_size / 2, "n_draws": 2 * self.n_draws, "n_burnin": 2 * self.n_burnin}
        return self.model_copy(update=changes)

    def __init__(self, **values: Any) -> None:
        # The one settings model that users build by hand: they get our error, not pydantic's.
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(f"LLCConfig: {one_sentence(error)}") from None

    # So that pydantic does not call it for the [llc.sampling] of a file, whose errors bear the whole path.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


REFERENCE = "reference"  # the distribution whose targets a reference model has drawn


class RefinementConfig(Settings):
    """Components that are sampled on another distribution of the task too, at every `every`-th checkpoint.

    The distribution "reference" holds training inputs with targets drawn from a shallower model, trained alike,
    with `reference_layers` layers: the loss is then, up to a constant, the Kullback-Leibler divergence to it.
    """

    distribution: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    components: Annotated[tuple[str, ...], Field(min_length=1)]
    every: PositiveInt = 1
    reference_layers: PositiveInt | None = None

    @model_validator(mode="after")
    def _reference_is_told(self) -> Self:
        if (self.distribution == REFERENCE) != (self.reference_layers is not None):
            raise ValueError(f"reference_layers goes with the distribution {REFERENCE!r}, and it needs it")
        return self


class CurveConfig(Settings):
    """Which components are followed, and the second localization under which signs must hold.

    n_examples: the sampled data are the first so many training examples; None: all.
    checks_every: the model's controls (the other localization, half the step) at every so many checkpoints.
    head_sampling: settings of everything but the model, where they are others.
    """

    components: tuple[str, ...]  # "heads" stands for every head of the model
    control_localization: Positive
    n_threads: PositiveInt  # torch threads of one unit of work
    n_examples: PositiveInt | None = None
    checks_every: PositiveInt = 1
    sampling: LLCConfig
    head_sampling: LLCConfig | None = None
    refinements: tuple[RefinementConfig, ...] = ()

    @property
    def control(self) -> LLCConfig:
        """The sampling settings at the other localization."""
        return self.sampling.model_copy(update={"localization": self.control_localization})

    @property
    def each_sampling(self) -> dict[str, LLCConfig]:
        """The sampling settings there are, by key."""
        return {"sampling": self.sampling} | ({"head_sampling": self.head_sampling} if self.head_sampling else {})

    def sampling_of(self, component: str) -> LLCConfig:
        """The settings that a component is sampled with."""
        return self.sampling if component == "model" or self.head_sampling is None else self.head_sampling

    @model_validator(mode="after")
    def _model_is_followed(self) -> Self:
        if "model" not in self.components:
            raise ValueError('components must hold "model": the stages are found from its curve')
        if self.control_localization == self.sampling.localization:
            raise ValueError("control_localization must differ from sampling.localization")
        names = [refinement.distribution for refinement in self.refinements]
        if len(set(names)) < len(names):
            raise ValueError(f"refinements name a distribution twice: {', '.join(names)}")
        return self
