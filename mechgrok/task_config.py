"""The settings of every task. Frozen, unknown keys refused; `config.RunConfig` holds one of them."""

import math
import os.path
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationInfo, field_validator, model_validator

MAX_P = 1000
PRIMES = tuple(p for p in range(5, MAX_P + 1) if all(p % k for k in range(2, int(p**0.5) + 1)))
MAX_CONTEXT = 2**16
LARGEST = 1e18  # float32 holds its square too
STANDARD_LIBRARY = ("code", "prose")
SMALLEST_VOCABULARY = 257
STORED = "stored"  # the context in which the settings of a run that is there already are read

Fraction = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, le=LARGEST)]
NotNegative = Annotated[float, Field(ge=0, le=LARGEST)]
Size = Annotated[int, Field(ge=1, le=2**20)]


class Settings(BaseModel):
    """Frozen, no unknown keys, no NaN or infinity, no silent conversions between kinds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    def acts(self) -> Mapping[str, tuple[bool, str]]:
        """Of each setting that not every choice of the others lets act: whether it does here, and where it would."""
        return {}

    def refuse_idle(self, acts: Mapping[str, tuple[bool, str]]) -> None:
        """Raise ValueError for a setting that does not act and yet is not at its default.

        At its default it is no mistake, as the file that a run writes states every setting.
        """
        for key, (here, where) in acts.items():
            if not here and getattr(self, key) != self.default(key):
                raise ValueError(
                    f"{key} = {getattr(self, key)!r} changes nothing, as it acts {where} only; leave it out"
                )

    @model_validator(mode="after")
    def _every_setting_acts(self, info: ValidationInfo) -> Self:
        if info.context != STORED:
            self.refuse_idle(self.acts())
        return self

    def without_idle(self) -> Self:
        """The same with every setting that does not act at its default."""
        return self.model_copy(update={key: self.default(key) for key, (here, _) in self.acts().items() if not here})

    @classmethod
    def default(cls, key: str) -> Any:
        """What a setting is where it is not stated."""
        return cls.model_fields[key].default


class ModularAdditionConfig(Settings):
    """(a, b, =) -> (a + b) mod p. `split` says what stays on one side of train and test."""

    name: Literal["modular-addition"]
    p: PositiveInt
    train_fraction: Fraction
    split: Literal["unordered", "ordered"]

    @model_validator(mode="after")
    def _p_is_usable(self) -> Self:
        if self.p > MAX_P:
            raise ValueError(
                f"p must be at most {MAX_P}, as all p^2 pairs are used in every step, got {self.p}; try {PRIMES[-1]}"
            )
        if self.p not in PRIMES:
            # An even p has a Nyquist row and a composite p has frequencies that do not tell all
            # residues apart; the Fourier measures assume neither.
            near = next((prime for prime in PRIMES if prime >= self.p), PRIMES[-1])
            raise ValueError(f"p must be a prime of at least 5, got {self.p}; try {near}")
        return self


class MechanismRates(Settings):
    """How often each mechanism of the planted language begins, as probabilities at a position that is free.

    The rest is the bigram chain. repeat_length: the shortest and the longest segment that is copied.
    """

    ngram: Rate
    repeat: Rate
    open: Rate
    close: Rate
    skip_open: Rate
    skip_close: Rate
    repeat_length: tuple[PositiveInt, PositiveInt]

    @model_validator(mode="after")
    def _rates_fit(self) -> Self:
        total = self.ngram + self.repeat + self.open + self.close + self.skip_open + self.skip_close
        if total > 1:
            raise ValueError(f"the rates are probabilities of one draw and must sum to at most 1, got {total:g}")
        if self.repeat_length[0] > self.repeat_length[1]:
            raise ValueError(f"repeat_length must be (shortest, longest), got {self.repeat_length}")
        return self


class PlantedLanguageConfig(Settings):
    """A language with planted bigrams, n-grams, skip n-grams, brackets and repeats; see its task module.

    distributions: other rates by name, for data refinement, with n_refined rows each.
    """

    name: Literal["planted-language"]
    n_ctx: Annotated[int, Field(ge=8, le=MAX_CONTEXT)]
    n_train: PositiveInt
    n_test: PositiveInt
    n_refined: PositiveInt
    n_plain: Annotated[int, Field(ge=8)]
    n_brackets: Annotated[int, Field(ge=1, le=4)]
    n_skips: PositiveInt
    n_ngrams: PositiveInt
    ngram_length: Annotated[int, Field(ge=3)]
    n_successors: PositiveInt
    noise: Rate
    rates: MechanismRates
    distributions: dict[str, MechanismRates] = {}

    @model_validator(mode="after")
    def _tables_fit(self) -> Self:
        if self.n_successors > self.n_plain or self.n_skips > self.n_plain or self.ngram_length > self.n_plain:
            raise ValueError("n_successors, n_skips and ngram_length must not exceed n_plain")
        # Neighbours occur in one n-gram only; beyond half of all pairs, drawing such n-grams takes for ever.
        if self.n_ngrams * (self.ngram_length - 1) > self.n_plain * (self.n_plain - 1) // 2:
            raise ValueError(f"{self.n_ngrams} n-grams need more distinct pairs than {self.n_plain} plain tokens give")
        sides = {"train", "test"} & self.distributions.keys()
        if sides:
            raise ValueError(f"a distribution cannot be called {min(sides)}: its rows would be those of the split")
        longest = max(rates.repeat_length[1] for rates in (self.rates, *self.distributions.values()))
        if longest >= self.n_ctx:
            raise ValueError(f"repeat_length {longest} does not fit n_ctx {self.n_ctx}")
        return self


def _absolute(path: str) -> str:
    """So that a run means the same file from every working directory."""
    return os.path.abspath(os.path.expanduser(path))


class _LanguageSettings(Settings):
    """What all tasks of real text share.

    n_ctx: tokens of a row. vocabulary: tokens of the byte-level BPE tokenizer that is trained on the text;
    tokenizer: the path of a tokenizer.json to use instead, which has bos_token, the token of row beginnings.
    mixture: the share of each source in the rows of train and test. test_fraction: the share of the documents
    that is held out. distributions_from: whether the rows of the named distributions come from documents that
    are held out ("test") or trained on ("train").
    """

    n_ctx: Annotated[int, Field(ge=2, le=MAX_CONTEXT)]
    n_train: PositiveInt
    n_test: PositiveInt
    test_fraction: Fraction
    mixture: tuple[Annotated[float, Field(ge=0)], ...]
    distributions_from: Literal["test", "train"] = "test"
    vocabulary: PositiveInt | None = None
    tokenizer: str | None = None
    bos_token: Annotated[str, Field(min_length=1)] = "<|endoftext|>"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sources, in the order of `mixture`."""
        raise NotImplementedError

    @field_validator("tokenizer")
    @classmethod
    def _tokenizer_is_absolute(cls, path: str | None) -> str | None:
        return None if path is None else _absolute(path)

    @model_validator(mode="after")
    def _sources_and_tokenizer_fit(self) -> Self:
        if not self.names or len(self.mixture) != len(self.names):
            raise ValueError(
                f"mixture has {len(self.mixture)} shares for {len(self.names)} sources; give at least one source "
                "and one share for each"
            )
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"sources must have different names, got {', '.join(self.names)}; rename or drop one")
        if not math.isclose(sum(self.mixture), 1.0, abs_tol=1e-9):
            raise ValueError(f"the shares of mixture must add up to 1, got {sum(self.mixture)!r}")
        if (self.vocabulary is None) == (self.tokenizer is None):
            raise ValueError("give either vocabulary, to train a tokenizer, or tokenizer, the path of a tokenizer.json")
        if self.vocabulary is not None and self.vocabulary < SMALLEST_VOCABULARY:
            raise ValueError(
                f"vocabulary must be at least {SMALLEST_VOCABULARY}, the 256 bytes and the beginning of a row, "
                f"got {self.vocabulary}"
            )
        return self


class TextConfig(_LanguageSettings):
    """Real text without a download.

    sources: "code" and "prose" of Python's standard library, or paths of UTF-8 text files or folders of them;
    a path's name is its last part without the ending. A file in the working directory called code is "./code".
    """

    name: Literal["text"]
    sources: tuple[Annotated[str, Field(min_length=1)], ...]

    @field_validator("sources")
    @classmethod
    def _paths_are_absolute(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(source if source in STANDARD_LIBRARY else _absolute(source) for source in sources)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(
            source
            if source in STANDARD_LIBRARY
            else re.sub(r"[^\w.-]+", "-", PurePath(source).stem).strip("-.") or "text"
            for source in self.sources
        )


class DatasetConfig(Settings):
    """One dataset: the first n_documents of a split, or all if there are fewer; a row's `column` is one document.

    label: what it is called here. path: its name on the Hugging Face Hub, or a local file or folder; a path
    begins with /, ., or ~. revision: a commit, tag or branch on the Hub.
    """

    label: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    path: Annotated[str, Field(min_length=1)]
    n_documents: Annotated[int, Field(ge=2)]
    config_name: str = "default"
    split: str = "train"
    column: str = "text"
    revision: str = "main"

    @field_validator("path")
    @classmethod
    def _local_paths_are_absolute(cls, path: str) -> str:
        return _absolute(path) if path[:1] in (".", "~") else path

    def acts(self) -> Mapping[str, tuple[bool, str]]:
        return {"revision": (not self.is_local, "on a dataset of the Hub")}

    @property
    def is_local(self) -> bool:
        return os.path.isabs(self.path)


class HuggingFaceConfig(_LanguageSettings):
    """Datasets of the Hugging Face Hub, or of this format on disk."""

    name: Literal["hugging-face"]
    sources: tuple[DatasetConfig, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(source.label for source in self.sources)


TaskConfig = Annotated[
    ModularAdditionConfig | PlantedLanguageConfig | TextConfig | HuggingFaceConfig, Field(discriminator="name")
]
TASKS = tuple(get_args(kind.model_fields["name"].annotation)[0] for kind in get_args(get_args(TaskConfig)[0]))
