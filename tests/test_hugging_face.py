"""Datasets on disk as a test makes them, and what happens without a network."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from huggingface_hub import HfApi
from pydantic import ValidationError

from mechgrok.errors import ConfigError
from mechgrok.task_config import HuggingFaceConfig
from mechgrok.tasks import hugging_face
from mechgrok.tasks.hugging_face import make_split
from mechgrok.tasks.tokenizer import train_tokenizer

datasets.disable_progress_bars()
TEXTS = [" ".join(chr(ord("a") + i) * (1 + j % 5) for j in range(200)) for i in range(20)]
DATASET = datasets.Dataset.from_dict({"text": TEXTS, "title": [text.upper() for text in TEXTS], "n": list(range(20))})


def config(path: object, **changes: object) -> HuggingFaceConfig:
    source = {"label": "letters", "path": str(path), "n_documents": 20}
    settings = {
        "name": "hugging-face", "n_ctx": 16, "n_train": 40, "n_test": 10, "test_fraction": 0.25, "vocabulary": 300,
        "sources": (source | {key: changes.pop(key) for key in list(changes) if key in ("split", "column", "label")},),
        "mixture": (1.0,),
    }  # fmt: skip
    return HuggingFaceConfig.model_validate(settings | changes)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MECHGROK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def saved(path: Path) -> Path:
    DATASET.save_to_disk(path)
    return path


def saved_splits(path: Path) -> Path:
    datasets.DatasetDict({"train": DATASET, "other": DATASET.select([0, 1])}).save_to_disk(path)
    return path


def parquet_folder(path: Path) -> Path:
    path.mkdir()
    DATASET.to_parquet(path / "train.parquet")
    DATASET.select([0, 1]).to_parquet(path / "test.parquet")
    return path


def jsonl_folder(path: Path) -> Path:
    path.mkdir()
    DATASET.select(range(12)).to_json(path / "1.jsonl")
    DATASET.select(range(12, 20)).to_json(path / "2.jsonl")
    return path


def jsonl_file(path: Path) -> Path:
    DATASET.to_json(path.with_suffix(".jsonl"))
    return path.with_suffix(".jsonl")


@pytest.mark.parametrize("write", [saved, saved_splits, parquet_folder, jsonl_folder, jsonl_file])
def test_a_local_dataset_gives_its_rows_as_documents(write: Callable[[Path], Path], tmp_path: Path) -> None:
    made = config(write(tmp_path / "data"))
    [source] = made.sources
    assert [document.text for document in hugging_face.documents(source)] == TEXTS
    few = source.model_copy(update={"n_documents": 3})
    assert [document.text for document in hugging_face.documents(few)] == TEXTS[:3]
    split = make_split(made, 0)
    assert list(split.distributions) == ["letters"] and split.train.tokens.shape == (40, 16)
    letters = [
        {split.labels[i][-1] for i in examples.tokens.unique().tolist() if i} - {"Ġ"}
        for examples in (split.train, split.test)
    ]
    assert len(letters[0]) > 9 and letters[1] and letters[0].isdisjoint(letters[1])
    assert torch.equal(make_split(made, 0).train.tokens, split.train.tokens)


def test_another_column_and_split_can_be_named(tmp_path: Path) -> None:
    [source] = config(parquet_folder(tmp_path / "data"), column="title", split="test").sources
    assert [document.text for document in hugging_face.documents(source)] == [text.upper() for text in TEXTS[:2]]


@pytest.mark.parametrize(
    ("write", "changes", "message"),
    [
        (saved, {"column": "body"}, "has no column 'body'; its columns are text, title, n"),
        (jsonl_folder, {"column": "body"}, "has no column 'body'; its columns are text, title, n"),
        (parquet_folder, {"column": "n"}, "column 'n' of the dataset .* holds int, not text"),
        (saved_splits, {"split": "test"}, "has no split 'test'; its splits are train, other"),
        (saved, {"n_train": 4000}, "rows of 16 tokens for train, and 4000 are asked for"),
        (parquet_folder, {"split": "dev"}, "split 'dev' .*correct them"),
        (jsonl_folder, {"split": "test"}, "split 'test' .*correct them"),
        (jsonl_file, {"vocabulary": 9000}, "vocabulary 9000 is more than the text allows"),
        (lambda path: path, {}, "data does not exist; correct the path"),
        (lambda path: path.mkdir() or path, {}, "doesn't contain any data files"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(
    write: Callable[[Path], Path], changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_split(config(write(tmp_path / "data"), **changes), 0)


def test_files_that_are_no_dataset_are_named(tmp_path: Path) -> None:
    broken, picture, info = tmp_path / "broken.jsonl", tmp_path / "a.png", tmp_path / "saved" / "dataset_info.json"
    broken.write_text('{"text": "a"}\n{"te')
    picture.write_bytes(b"\x89PNG")
    info.parent.mkdir()
    info.write_text("{")
    with pytest.raises(ConfigError, match="cannot read the dataset .*broken.jsonl"):
        make_split(config(broken), 0)
    with pytest.raises(ConfigError, match="cannot tell the format of .*a.png from its ending; use one of .parquet"):
        make_split(config(picture), 0)
    with pytest.raises(ConfigError, match="cannot read the dataset .*saved"):
        make_split(config(info.parent), 0)


def test_a_datasets_own_code_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ConfigError, match="cannot open the dataset"):
        make_split(config(tmp_path / "data"), 0)
    assert not (tmp_path / "ran").exists()


def test_without_a_network_a_name_fails_at_once_and_says_what_to_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hugging_face, "HfApi", partial(HfApi, endpoint="http://127.0.0.1:9"))  # nobody listens there
    start = time.monotonic()
    with pytest.raises(ConfigError, match="cannot reach the dataset some/body .*give the path of a local copy"):
        make_split(config("some/body"), 0)
    assert time.monotonic() - start < 5


def test_a_dataset_of_the_hub_is_pinned_streamed_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, **options: object) -> object:
        asked.append((path, options))
        return ({"text": text} for text in [*TEXTS, None])

    hub = SimpleNamespace(dataset_info=lambda name, revision, timeout: SimpleNamespace(sha=f"commit of {revision}"))
    monkeypatch.setattr(hugging_face, "HfApi", lambda: hub)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    first = make_split(config("some/body"), 0)
    options = {"name": "default", "split": "train", "streaming": True, "revision": "commit of main"}
    assert asked == [("some/body", options)]
    monkeypatch.setattr(hugging_face, "HfApi", lambda: pytest.fail("the network was asked again"))
    again = make_split(config("some/body", label="another-name"), 0)
    assert again.labels == first.labels and len(asked) == 1


def test_a_tokenizer_of_ones_own_is_used(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(train_tokenizer(TEXTS, 270, "<s>").to_str())
    data = saved(tmp_path / "data")
    split = make_split(config(data, tokenizer=str(path), vocabulary=None, bos_token="<s>"), 0)
    assert split.n_classes == 270 and split.labels[split.bos] == "<s>" and split.plain == tuple(range(1, 270))
    with pytest.raises(ConfigError, match=r"no token '<\|endoftext\|>'; set bos_token .*<s>"):
        make_split(config(data, tokenizer=str(path), vocabulary=None), 0)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="tokenizer.json is no tokenizer of the tokenizers library"):
        make_split(config(data, tokenizer=str(path), vocabulary=None), 0)
    with pytest.raises(ConfigError, match="cannot read the tokenizer .*nowhere.json"):
        make_split(config(data, tokenizer=str(tmp_path / "nowhere.json"), vocabulary=None), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"label": "../x"}, "label"), ({"mixture": (0.5, 0.5)}, "mixture has 2 shares for 1 sources"), ({"q": 1}, "q")],
)
def test_a_bad_setting_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config("some/body", **changes)


def test_a_name_is_told_from_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert [config(path).sources[0].path for path in ("some/body", "./some/body")] == [
        "some/body",
        str(tmp_path / "some/body"),
    ]
