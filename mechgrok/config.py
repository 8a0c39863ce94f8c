"""Every setting of a run, as frozen models that read from and write to TOML. Unknown keys are refused.

nbeta, step size and localization have no defaults, and a preset states every number.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import Discriminator, Field, PositiveInt, Tag, ValidationError, ValidationInfo, model_validator

from mechgrok.errors import ConfigError
from mechgrok.llc_config import (  # noqa: F401  # all settings can be had from here
    MEMORY_GB,
    MOVING,
    REFERENCE,
    CurveConfig,
    LLCConfig,
    LLCPath,
    Precision,
    RefinementConfig,
    SamplerName,
)
from mechgrok.setting_errors import one_sentence
from mechgrok.task_config import STORED, Fraction, NotNegative, Positive, Settings, Size, TaskConfig
from mechgrok.toml_values import flat, tuples, without_none

MAX_MODEL_GB = 70.0


class ModelConfig(Settings):
    """The shape of a HookedTransformer, under the names of its config.

    d_vocab, d_vocab_out, n_ctx: None: the task's (d_vocab_out: d_vocab where that is told). A model from elsewhere
    may have more than the task needs. rotary_dim: None: all of d_head. The settings that follow d_vocab_out are of
    use for models from elsewhere.
    """

    n_layers: Size
    d_model: Size
    n_heads: Size
    d_head: Size
    d_mlp: Size | None = None  # None: attention only
    act_fn: Literal[
        "relu", "gelu", "silu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "solu", "solu_ln"
    ] = "relu"  # fmt: skip
    normalization_type: Literal["LN", "LNPre", "RMS", "RMSPre"] | None = None
    positional_embedding_type: Literal["standard", "rotary", "shortformer", "alibi"] = "standard"
    init_std: Positive = 0.02  # weights ~ N(0, init_std^2); biases start at 0, LayerNorm gains at 1
    n_ctx: Size | None = None
    d_vocab: Size | None = None
    d_vocab_out: Size | None = None
    eps: Positive = 1e-5  # of the normalization
    final_rms: bool = False
    parallel_attn_mlp: bool = False
    scale_attn_by_inverse_layer_idx: bool = False
    rotary_dim: Size | None = None
    rotary_base: Positive = 10000.0
    rotary_adjacent_pairs: bool = False

    def acts(self) -> Mapping[str, tuple[bool, str]]:
        rotary = self.positional_embedding_type == "rotary", "on rotary positions"
        return {
            "act_fn": (self.d_mlp is not None, "in an MLP, which d_mlp gives,"),
            "eps": (self.normalization_type is not None, "in a normalization"),
            "final_rms": (self.normalization_type in ("LN", "LNPre"), "where normalization_type is LN or LNPre"),
            "scale_attn_by_inverse_layer_idx": (self.n_layers > 1, "from the second layer on"),
            "rotary_dim": rotary,
            "rotary_base": rotary,
            "rotary_adjacent_pairs": rotary,
        }

    @model_validator(mode="after")
    def _model_can_be_built(self) -> Self:
        if self.parallel_attn_mlp and self.d_mlp is None:
            raise ValueError("parallel_attn_mlp needs an MLP beside the attention: give d_mlp, or leave it out")
        n_ctx = self.n_ctx or 0
        layer = 4 * self.d_model * (4 * self.n_heads * self.d_head + 2 * (self.d_mlp or 0)) + n_ctx**2  # with a mask
        embeddings = 4 * self.d_model * ((self.d_vocab or 0) + (self.d_vocab_out or self.d_vocab or 0) + n_ctx)
        if (size := (self.n_layers * layer + embeddings) / 1e9) > MAX_MODEL_GB:
            raise ValueError(
                f"a model of these sizes takes {size:,.0f} GB, more than {MAX_MODEL_GB:g}; make it smaller"
            )
        return self


class TrainConfig(Settings):
    """AdamW. Weight decay is decoupled and multiplied by the learning rate, as in torch.

    batch_size: rows of a step, each drawn uniformly from the training examples; None: all of them, in every step.
    max_grad_norm: gradients longer than this are shortened to it; None: never.
    n_checkpoints: that many, evenly spaced on log(1 + step); or checkpoints: these steps.
    device: where steps and metrics are computed. Batches hold the same rows on both; the bits of the losses differ.
    """

    n_steps: PositiveInt
    learning_rate: Positive
    weight_decay: NotNegative
    betas: tuple[Fraction, Fraction]
    batch_size: Size | None = None
    max_grad_norm: Positive | None = None
    n_checkpoints: Annotated[int, Field(ge=2, le=2**20)] | None = None
    checkpoints: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    n_threads: PositiveInt  # part of the config because the bits of a sum depend on it
    device: Literal["cpu", "cuda"] = "cpu"

    @model_validator(mode="after")
    def _checkpoints_are_told(self) -> Self:
        if (self.n_checkpoints is None) == (self.checkpoints is None):
            raise ValueError("give either n_checkpoints, how many, or checkpoints, the steps themselves")
        steps = self.checkpoints
        if steps is not None and (len(steps) < 2 or list(steps) != sorted(set(steps)) or steps[-1] != self.n_steps):
            raise ValueError(f"checkpoints must increase, be two or more, and end at n_steps {self.n_steps}")
        return self

    @model_validator(mode="after")
    def _there_are_so_many_steps(self, info: ValidationInfo) -> Self:
        if info.context != STORED and (self.n_checkpoints or 0) > self.n_steps + 1:
            raise ValueError(
                f"n_checkpoints {self.n_checkpoints} exceeds the {self.n_steps + 1} steps there are, 0 to n_steps; "
                "lower it"
            )
        return self


class ImportedConfig(Settings):
    """Checkpoints at these steps, trained elsewhere: `mechgrok import` brings them in, and nothing is trained."""

    source: Literal["imported"]
    checkpoints: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _steps_increase(self) -> Self:
        if list(self.checkpoints) != sorted(set(self.checkpoints)):
            raise ValueError(f"checkpoints must increase, got {self.checkpoints}")
        return self


def _origin(train: Any) -> str:
    told = isinstance(train, ImportedConfig) or (isinstance(train, dict) and "source" in train)
    return "imported" if told else "trained"


class StageConfig(Settings):
    """How stages are read off a curve; see `mechgrok.stages` for what each number does."""

    plateau: Fraction = 0.05  # a slope below this share of the largest counts as flat
    credible: Fraction = 0.95  # mass of the boundary intervals, and certainty asked of a stage
    min_evidence: Positive = 3.0  # nats of marginal likelihood over a constant curve
    n_posterior: Size = 400  # posterior draws


class AnalysesConfig(Settings):
    """Which analyses a run makes, and how many random placements of the stages score a claim."""

    names: tuple[str, ...]
    n_null: Size


READ_LATER = ("stages", "analyses")  # sections that say how a run is read: they can change on what is there


class RunConfig(Settings):
    """One whole experiment: what a preset file holds."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0)]
    task: TaskConfig
    model: ModelConfig
    train: Annotated[
        Annotated[TrainConfig, Tag("trained")] | Annotated[ImportedConfig, Tag("imported")], Discriminator(_origin)
    ]
    llc: CurveConfig
    stages: StageConfig
    analyses: AnalysesConfig

    @model_validator(mode="after")
    def _reference_can_be_trained(self) -> Self:
        if isinstance(self.train, ImportedConfig) and any(one.reference_layers for one in self.llc.refinements):
            raise ValueError(f"an imported run trains nothing, so remove the refinement {REFERENCE!r}")
        return self

    @model_validator(mode="after")
    def _weights_are_drawn_where_they_are_trained(self, info: ValidationInfo) -> Self:
        if isinstance(self.train, ImportedConfig) and info.context != STORED:
            self.model.refuse_idle({"init_std": (False, "on models that are trained here")})
        return self

    def with_sampling(self, sampling: LLCConfig, heads: bool = True) -> "RunConfig":
        """The same experiment with other sampling settings; the control localization moves along.

        heads: for every component; otherwise what has settings of its own keeps them.
        """
        own = self.llc.sampling.localization
        ratio = self.llc.control_localization / own if own else 2.0
        control = ratio * sampling.localization
        own_of_heads = None if heads else self.llc.head_sampling
        curve = {"sampling": sampling, "head_sampling": own_of_heads, "control_localization": control}
        return self.model_copy(update={"name": f"{self.name}-calibrated", "llc": self.llc.model_copy(update=curve)})

    def as_reference(self, n_layers: int) -> "RunConfig":
        """The same training of a model with so many layers, of which only the end is kept."""
        assert isinstance(self.train, TrainConfig)  # an imported run has no reference
        train = self.train.model_copy(update={"n_checkpoints": None, "checkpoints": (0, self.train.n_steps)})
        changes = {"name": f"{self.name}-reference", "model": self.model.model_copy(update={"n_layers": n_layers})}
        curve = self.llc.model_copy(update={"components": ("model",), "refinements": ()})
        return self.model_copy(update=changes | {"train": train, "llc": curve})

    def with_memory(self, memory_gb: float) -> "RunConfig":
        """The same experiment with another budget for the activations of one estimate."""
        limited = {
            key: LLCConfig(**(own.model_dump() | {"memory_gb": memory_gb}))
            for key, own in self.llc.each_sampling.items()
        }
        return self.model_copy(update={"llc": self.llc.model_copy(update=limited)})

    def digest(self) -> str:
        """SHA-256 of what checkpoints and estimates depend on, in canonical JSON: all settings but READ_LATER.

        Defaults are left out, so that a version which adds a setting, with a default that does what was done before,
        keeps the runs of older ones.
        """
        text = json.dumps(self.model_dump(mode="json", exclude_defaults=True, exclude=set(READ_LATER)), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_toml(self) -> str:
        return tomli_w.dumps(without_none(self.model_dump(mode="json")))

    def changes_from(self, other: "RunConfig") -> list[str]:
        """The settings that differ, each as `key: other -> self`."""
        ours, theirs = dict(flat(self.model_dump())), dict(flat(other.model_dump()))
        each = {key: (theirs.get(key), ours.get(key)) for key in (*ours, *theirs)}
        return [f"{key}: {before!r} -> {now!r}" for key, (before, now) in each.items() if before != now]


def preset_names() -> list[str]:
    """The presets that come with the package, sorted."""
    files = resources.files("mechgrok.presets").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load_config(source: "str | Path | RunConfig") -> RunConfig:
    """A preset by name, a TOML file by path, or a RunConfig as it is.

    Raises:
        ConfigError: no such preset or file, no TOML, an unknown key, a value out of range.
    """
    if isinstance(source, RunConfig):
        return source
    if str(source) in preset_names():
        return parse_config((resources.files("mechgrok.presets") / f"{source}.toml").read_text(), str(source))
    if not isinstance(source, str | Path):
        raise ConfigError(f"give a preset, the path of a .toml file, or a RunConfig, got {type(source).__name__}")
    path = Path(source)
    if path.suffix != ".toml":
        raise ConfigError(
            f"unknown preset {str(source)!r}; presets are {', '.join(preset_names())}; "
            "to use a file of your own, give a path that ends in .toml"
        )
    try:
        return parse_config(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from None


def parse_config(text: str, source: str, stored: bool = False) -> RunConfig:
    """A RunConfig from TOML text; `source` names it in errors.

    stored: of a run that is there already. In any other a setting that changes nothing is refused.
    """
    try:
        return RunConfig.model_validate(tuples(tomllib.loads(text)), context=STORED if stored else None)
    except ValidationError as error:
        raise ConfigError(f"{source}: {one_sentence(error)}") from None
    except ValueError as error:  # a number of thousands of digits is no TOMLDecodeError
        raise ConfigError(f"{source} is not valid TOML: {error}") from None
