"""Every setting of a run is changed: that changes bits, or is refused. A setting that is new has to be told here."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

import mechgrok as mg
from mechgrok.config import ImportedConfig, ModelConfig, RunConfig
from mechgrok.model import build_model, model_losses
from mechgrok.store import RunDirectory
from mechgrok.task_config import HuggingFaceConfig, TextConfig
from mechgrok.tasks import make_split
from mechgrok.tasks.tokenizer import train_tokenizer
from mechgrok.train import train
from tests.planted import RATES, language_config
from tests.settings_table import TABLE, of
from tests.settings_walk import TINY, Change, assert_effect, keys_of, run_config, settings_classes, validated


def test_every_setting_is_in_the_table() -> None:
    keys = {key for kind in settings_classes().values() for key in keys_of(kind)}
    keys -= {key for key in keys if key.endswith("Config.name") and not key.startswith("RunConfig")}  # which task it is
    assert keys == TABLE.keys()
    assert len(keys) > 100


# ---- tasks


@pytest.mark.parametrize("change", of("ModularAdditionConfig"))
def test_modular_addition(change: Change) -> None:
    assert_effect(lambda task: make_split(run_config(task=task).task, 0), TINY["task"], change)


@pytest.mark.parametrize("change", of("PlantedLanguageConfig"))
def test_planted_language(change: Change) -> None:
    base = language_config(distributions={"again": RATES}).model_dump()
    assert_effect(lambda task: make_split(run_config(task=task).task, 0), base, change)


@pytest.mark.parametrize("change", of("MechanismRates"))
def test_rates(change: Change) -> None:
    base = language_config().model_dump()
    assert_effect(
        lambda rates: make_split(run_config(task=base | {"rates": rates}).task, 0), RATES.model_dump(), change
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two sources as text and as datasets, of letters of their own, and a tokenizer."""
    monkeypatch.setenv("MECHGROK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()
    every = {}
    for name, first in (("a", "a"), ("b", "k")):
        texts = [" ".join(chr(ord(first) + i % 10) * (1 + (i + j) % 5) for j in range(290 + i)) for i in range(20)]
        Path(name).mkdir()
        for i, one in enumerate(texts):
            (Path(name) / f"{i:02}.txt").write_text(one)
        rows = datasets.Dataset.from_dict({"text": texts, "title": [one.upper() for one in texts]})
        splits = {"train": rows, "other": rows.select(range(5, 20))}
        datasets.DatasetDict(splits).save_to_disk(f"{name}.data")
        rows.to_json(f"{name}.jsonl")
        named = [{"config_name": one, "data_files": f"{one}.jsonl"} for one in ("one", "other")]
        Path(f"{name}.configs").mkdir()
        Path(f"{name}.configs/README.md").write_text(f"---\nconfigs: {json.dumps(named)}\n---\n")
        rows.to_json(f"{name}.configs/one.jsonl")
        rows.select(range(5, 20)).to_json(f"{name}.configs/other.jsonl")
        every[name] = texts
    train_tokenizer(sum(every.values(), []), 270, "<|endoftext|>").save("tokenizer.json")
    yield tmp_path


TEXT = {
    "name": "text", "n_ctx": 16, "n_train": 40, "n_test": 10, "test_fraction": 0.25, "vocabulary": 280,
    "sources": ("a", "b"), "mixture": (0.5, 0.5),
}  # fmt: skip


def split_of_text(settings: dict[str, Any]) -> Any:
    return make_split(validated(TextConfig, settings), 0)


def split_of_datasets(settings: dict[str, Any]) -> Any:
    sources = tuple({"label": one, "path": f"./{one}.data", "n_documents": 20} for one in settings["sources"])
    return make_split(validated(HuggingFaceConfig, settings | {"name": "hugging-face", "sources": sources}), 0)


@pytest.mark.parametrize("result", [split_of_text, split_of_datasets])
@pytest.mark.parametrize("change", [*of("_LanguageSettings"), *of("TextConfig")])
def test_text(change: Change, result: Callable[[dict[str, Any]], Any], folder: Path) -> None:
    assert_effect(result, TEXT, change)


@pytest.mark.parametrize("change", of("DatasetConfig"))
def test_datasets(change: Change, folder: Path) -> None:
    def result(source: dict[str, Any]) -> Any:
        sources = (source | {"path": f"./{source['path']}"},)
        return make_split(
            validated(HuggingFaceConfig, TEXT | {"name": "hugging-face", "sources": sources, "mixture": (1.0,)}), 0
        )

    assert_effect(result, {"label": "letters", "path": "a.data", "n_documents": 20}, change)


# ---- model and training


@pytest.mark.parametrize("change", of("ModelConfig"))
def test_model(change: Change) -> None:
    def result(model: dict[str, Any]) -> Any:
        config = run_config(model=model)
        split = make_split(config.task, 0)
        made = build_model(config.model, split, 0)
        return dict(made.named_parameters()), model_losses(made, *split.train.tensors)

    assert_effect(result, TINY["model"], change)


@pytest.mark.parametrize("change", of("TrainConfig"))
def test_training(change: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made: list[RunConfig] = []

    def result(values: dict[str, Any]) -> Any:
        made.append(run_config(train=values))
        run = RunDirectory.create(tmp_path / str(len(made)), made[-1])
        return train(run, make_split(made[-1].task, 0)).metrics

    assert_effect(result, TINY["train"] | {"n_steps": 12, "n_checkpoints": 3}, change)
    assert len({config.digest() for config in made}) == len(made)  # a run of other settings is another run


def test_the_weights_of_an_import_are_not_drawn() -> None:
    imported = ImportedConfig(source="imported", checkpoints=(0, 1)).model_dump()
    model = TINY["model"] | {"init_std": ModelConfig.default("init_std")}
    assert run_config(train=imported, model=model).model.init_std == 0.02
    with pytest.raises(
        mg.MechgrokError, match="init_std = 0.25 changes nothing, as it acts on models that are trained"
    ):
        run_config(train=imported)
