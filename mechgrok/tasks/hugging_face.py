"""Datasets of the Hugging Face Hub by name, or on disk in a format that `datasets` reads. No code of theirs is run.

Rows are streamed, so that the first documents of a large dataset are all that is downloaded. They are kept
in the cache: a run goes on without the network, and on the same text if the dataset changes.
"""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi

from mechgrok.errors import ConfigError
from mechgrok.store import cached_json
from mechgrok.task_config import DatasetConfig, HuggingFaceConfig
from mechgrok.tasks.documents import Document, text_split
from mechgrok.types import Split

PATIENCE = 10.0  # seconds that the Hub has to answer
_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}


def make_split(config: HuggingFaceConfig, seed: int) -> Split:
    """Rows of tokens of the datasets that `config.sources` names; see `documents.text_split`.

    Raises:
        ConfigError: no such dataset, split or column, no network, or too little text for the settings.
    """
    return text_split({source.label: documents(source) for source in config.sources}, config, seed)


def documents(source: DatasetConfig) -> list[Document]:
    """The first `n_documents` rows of the dataset, a row a document."""
    if source.is_local:
        texts = _texts(source, _open_local(source))
    else:
        key = {"dataset": source.model_dump(exclude={"label"}), "format": 1}
        texts = cached_json(key, lambda: _texts(source, _open_on_hub(source)))
    return [
        Document(f"{source.path}#{source.config_name}#{source.split}#{i:08d}", text) for i, text in enumerate(texts)
    ]


def _open_on_hub(source: DatasetConfig) -> Iterable[dict[str, Any]]:
    # One question first: load_dataset asks again and again for half a minute where there is no network.
    try:
        commit = HfApi().dataset_info(source.path, revision=source.revision, timeout=PATIENCE).sha
    except Exception as error:  # of httpx, requests, or the Hub's own: it depends on the version
        raise ConfigError(
            f"cannot reach the dataset {source.path} on the Hugging Face Hub ({_first_line(error)}); "
            "give the path of a local copy, beginning with / or ./, or use the task text, which needs no network"
        ) from None
    return _load(source, source.path, revision=commit)


def _open_local(source: DatasetConfig) -> Iterable[dict[str, Any]]:
    path = Path(source.path)
    if not path.exists():
        raise ConfigError(f"the dataset {path} does not exist; correct the path")
    if path.is_file():
        if path.suffix not in _READERS:
            raise ConfigError(f"cannot tell the format of {path} from its ending; use one of {', '.join(_READERS)}")
        _refuse(source, "a single file", "config_name", "split")
        return _load(source, _READERS[path.suffix], data_files={source.split: str(path)})
    if not ((path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()):
        return _load(source, str(path))
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # of arrow, json, or datasets: there is no common base
        raise ConfigError(f"cannot read the dataset {path} ({_first_line(error)}); save it again") from None
    _refuse(source, "a dataset that was saved to disk", "config_name")
    if not isinstance(saved, datasets.DatasetDict) and saved.split is None:
        _refuse(source, "a dataset that was saved without a split", "split")
    splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or source.split): saved}
    if source.split not in splits:
        raise ConfigError(f"{path} has no split {source.split!r}; its splits are {', '.join(splits)}")
    return splits[source.split]


def _refuse(source: DatasetConfig, what: str, *keys: str) -> None:
    """Raise ConfigError for a setting that chooses nothing here and is not at its default."""
    for key in keys:
        if getattr(source, key) != source.default(key):
            raise ConfigError(f"{source.path} is {what}, of which {key} chooses nothing; leave {key} out")


def _load(source: DatasetConfig, path: str, **options: Any) -> Iterable[dict[str, Any]]:
    try:
        return datasets.load_dataset(path, name=source.config_name, split=source.split, streaming=True, **options)
    except Exception as error:  # as above
        raise ConfigError(
            f"cannot open the dataset {source.path} with config_name {source.config_name!r} and split "
            f"{source.split!r} ({_first_line(error)}); correct them"
        ) from None


def _texts(source: DatasetConfig, rows: Iterable[dict[str, Any]]) -> list[str]:
    """One column of the first rows; an empty field is an empty text."""
    texts = []
    try:
        for row in islice(rows, source.n_documents):
            if source.column not in row:
                raise ConfigError(
                    f"the dataset {source.path} has no column {source.column!r}; its columns are {', '.join(row)}"
                )
            text = row[source.column]
            if not isinstance(text, str | None):
                raise ConfigError(
                    f"column {source.column!r} of the dataset {source.path} holds {type(text).__name__}, not text; "
                    "name a column of text"
                )
            texts.append(text or "")
    except ConfigError:
        raise
    except Exception as error:  # as above
        raise ConfigError(f"cannot read the dataset {source.path} ({_first_line(error)}); repair that file") from None
    return texts


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
