"""Checkpoints that were trained elsewhere, described and read. No code of theirs runs.

Hugging Face weights go through TransformerLens's own conversion, unprocessed: no norm is folded and nothing is
centred, as the LLC belongs to the parameters that were trained. Each converted model is held to its source's logits.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens import loading_from_pretrained as loading

from mechgrok.config import ModelConfig
from mechgrok.errors import CheckpointError, ConfigError, MechgrokError, first_line
from mechgrok.model import build_model, fitted, model_from_parameters, shape_of
from mechgrok.outside.tensor_files import read_tensors
from mechgrok.types import Split

BUFFER = re.compile(r"blocks\.\d+\.attn\.(mask|IGNORE|rotary_sin|rotary_cos)")  # no parameters
LOGIT_TOLERANCE = 1e-3  # of the largest logit
TABLE_TOLERANCE = 1e-2  # tables may have been saved in bfloat16


@dataclass(frozen=True)
class _Noting:
    """Something that was chosen or left out on the way, each told once."""

    notes: list[str] = field(default_factory=list, init=False, compare=False)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True)
class StateDicts(_Noting):
    """HookedTransformer state dicts by step. settings: the model's config as a dictionary, if it is known."""

    name: str
    files: Mapping[int, Path]
    settings: Mapping[str, Any] | None

    kind = "HookedTransformer state dicts"

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(sorted(self.files))

    def shape(self, step: int) -> ModelConfig | None:
        """The shape that config.json tells, None without one."""
        return None if self.settings is None else shape_of(self.settings)

    def model_at(self, step: int, config: ModelConfig, split: Split) -> HookedTransformer:
        """The model at a step, in float32. Raises CheckpointError for a file that does not fit the config."""
        path, state = self.files[step], self._state(step)
        try:
            model = model_from_parameters(config, split, _parameters(state))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}; correct [model] of the config and choose another --out") from None
        for name, buffer in model.named_buffers():
            if "rotary" not in name or name not in state:
                continue
            n_pos = min(len(buffer), len(state[name]))  # a table begins alike for every length
            if not _agree(buffer[:n_pos], state[name][:n_pos], TABLE_TOLERANCE):
                raise CheckpointError(
                    f"{path}: {name} is another table; correct the rotary settings of [model] and choose another --out"
                )
        return model

    def parameters_at(self, step: int, model: ModelConfig | None, split: Split | None) -> dict[str, Tensor]:
        """The parameters at a step, where a model is given those that fit it. Raises CheckpointError as `model_at`."""
        if model is None or split is None:
            return _parameters(self._state(step))
        return dict(self.model_at(step, model, split).named_parameters())

    def _state(self, step: int) -> dict[str, Tensor]:
        path = self.files[step]
        state = read_tensors(path, self.note)
        for name, tensor in _parameters(state).items():
            if not tensor.is_floating_point():
                raise CheckpointError(
                    f"{path}: {name} is {tensor.dtype}, which is no kind of weight; save it as float32"
                )
        return state


@dataclass(frozen=True)
class HuggingFace(_Noting):
    """Models of transformers by step: (folder or name, what tells transformers which and where)."""

    name: str
    where: Mapping[int, tuple[str, Mapping[str, Any]]]
    kind: str

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(sorted(self.where))

    def shape(self, step: int) -> ModelConfig:
        """The shape of the HookedTransformer that TransformerLens makes of the model at a step."""
        return self._described(step)[1]

    def model_at(self, step: int, config: ModelConfig, split: Split) -> HookedTransformer:
        """The converted model at a step, in float32.

        Raises:
            CheckpointError: the files are damaged or incomplete, or the converted model has other logits.
        """
        source, _ = self.where[step]
        settings, _ = self._described(step)
        with _foreign(self._at(step)):
            theirs = self._loaded(step)
            converted = loading.get_pretrained_state_dict(source, settings, theirs)
            complete = loading.fill_missing_keys(build_model(config, split, 0), converted)
            model = model_from_parameters(config, split, _parameters(complete))
            tokens = split.test.tokens[:4]
            with torch.no_grad():
                same = _agree(model(tokens), theirs(tokens).logits, LOGIT_TOLERANCE)
        if not same:
            raise CheckpointError(
                f"{self._at(step)}: TransformerLens converts this {type(theirs).__name__} into a model with other "
                "logits; save HookedTransformer state dicts that are right and import those"
            )
        return model

    def parameters_at(self, step: int, model: ModelConfig | None, split: Split | None) -> dict[str, Tensor]:
        """The parameters at a step under their source's names. Raises CheckpointError for damaged files."""
        with _foreign(self._at(step)):
            return {name: parameter.detach() for name, parameter in self._loaded(step).named_parameters()}

    def _loaded(self, step: int) -> Any:
        from transformers import AutoModelForCausalLM

        source, options = self.where[step]
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            **options,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="eager",  # config.json could name one that is code to download
            output_loading_info=True,
        )
        theirs, report = loaded
        # transformers would draw what is missing at random.
        absent = sorted(report["missing_keys"]) + sorted(k for k in report["unexpected_keys"] if "weight" in k)
        if absent:
            raise CheckpointError(f"{self._at(step)} does not fit its config.json: {', '.join(absent[:4])}")
        return theirs

    def _described(self, step: int) -> tuple[Any, ModelConfig]:
        """(TransformerLens's config, our shape) of the model at a step."""
        from transformers import AutoConfig

        source, options = self.where[step]
        with _foreign(self._at(step)):
            theirs = AutoConfig.from_pretrained(source, **options, trust_remote_code=False)
            settings = loading.get_pretrained_model_config(source, device="cpu", **options)
            rope = getattr(theirs, "rope_parameters", None) or {}
            if settings.positional_embedding_type == "rotary":  # TransformerLens 3.9 reads neither for NeoX
                settings.rotary_base = float(rope.get("rope_theta", settings.rotary_base))
                if rope.get("rope_type", "default") != "default":
                    raise ConfigError(f"{self._at(step)} scales its rotary positions, which is not supported")
            return settings, shape_of(vars(settings))

    def _at(self, step: int) -> str:
        source, options = self.where[step]
        return f"{source} at {options['revision']}" if "revision" in options else source


Source = StateDicts | HuggingFace


def check_fits(source: Source, config: ModelConfig, split: Split, steps: Sequence[int]) -> None:
    """Raise ConfigError, before anything is written, for a step that is not there or a shape that differs."""
    missing = sorted(set(steps) - set(source.steps))
    if missing:
        raise ConfigError(f"{source.name} has no checkpoint at step {_few(missing)}; it has {_few(source.steps)}")
    ours = fitted(config, split)
    for step in steps:
        shape = source.shape(step)
        wrong = [
            f"{name} = {theirs!r}, not {getattr(ours, name)!r}"
            for name, theirs in (shape or ours)
            if name != "init_std" and theirs != getattr(ours, name)
        ]
        if wrong:
            raise ConfigError(
                f"{source.name} at step {step} has {', '.join(wrong)}; correct [model] of the config, "
                "or take the one that `mechgrok import --init` prints"
            )


def _parameters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not BUFFER.fullmatch(name)}


def _agree(ours: Tensor, theirs: Tensor, within: float) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= within * theirs.abs().max())


def _few(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) if len(steps) <= 8 else f"{', '.join(map(str, steps[:3]))}, ..., {steps[-1]}"


@contextmanager
def _foreign(what: str) -> Iterator[None]:
    """Any error of transformers or TransformerLens as one sentence of ours, without their bars and notes."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    except MechgrokError:
        raise
    except Exception as error:  # what a damaged or hostile file can raise in there is not to be listed
        raise CheckpointError(f"{what} cannot be read as a model: {first_line(error)}") from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
