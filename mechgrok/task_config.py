"""The settings of the tasks."""

import math
import os.path
import re
from pathlib import PurePath
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from mechgrok.config import Fraction, Settings

STANDARD_LIBRARY = ("code", "prose")
SMALLEST_VOCABULARY = 257


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

    n_ctx: Annotated[int, Field(ge=2)]
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
