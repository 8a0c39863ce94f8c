"""Every setting of sampling, curves, stages and analyses is changed; see tests/settings_table.py."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import analyses
import mechgrok as mg
from analyses import render
from mechgrok import pipeline, seeds
from mechgrok.config import ImportedConfig, Precision, RunConfig, StageConfig
from mechgrok.llc import precision as precisions
from mechgrok.model import build_model
from mechgrok.tasks import make_split
from mechgrok.types import Study
from tests.planted import language_run_config
from tests.settings_table import ROTARY, of
from tests.settings_walk import SAMPLING, TINY, Change, assert_effect, bits, digest, run_config, validated
from tests.test_stages import X, curve, hump


@pytest.mark.parametrize("change", [*of("LLCConfig")])
def test_sampling(change: Change, tiny_run: tuple[Path, Study], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    study = tiny_run[1]
    model = study.trajectory.model_at(study.trajectory.steps[-1])

    def result(settings: dict[str, Any]) -> Any:
        config = mg.LLCConfig(**settings)
        return mg.estimate_llc(model, study.split.train, config=config, seed=0)

    assert_effect(result, SAMPLING, change)


@pytest.mark.parametrize("precision", ["int16", "bfloat16"])
@pytest.mark.parametrize("shape", [{}, ROTARY])
def test_a_precision_changes_bits_or_is_said_to_change_none(
    precision: Precision, shape: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """On any processor, for a model that compiled passes serve and for one that they do not."""
    config = run_config(model=TINY["model"] | shape)
    split = make_split(config.task, 0)
    model = build_model(config.model, split, 0)
    precisions._say_once.cache_clear()
    each = [
        mg.LLCConfig(**SAMPLING | {"precision": one, "path": "compiled"}) for one in ("float32", precision, precision)
    ]
    found = [mg.estimate_llc(model, split.train, config=config, seed=0) for config in each]
    said = [record.message for record in caplog.records if record.message.startswith("precision ")]
    same = digest(bits(found[0])) == digest(bits(found[1]))
    assert len(said) == same  # once, not for each estimate
    assert all(f'precision "{precision}" changes nothing here: ' in line for line in said)


@pytest.mark.parametrize(
    ("precision", "vnni", "keeps", "shape", "reason"),
    [
        ("float32", False, True, {}, None),
        ("float64", False, True, ROTARY, None),
        ("int16", True, True, {}, None),
        ("int16", False, True, {}, "the processor has no AVX512_VNNI"),
        ("int16", True, True, ROTARY, "positional_embedding_type = 'rotary'"),
        ("bfloat16", True, True, ROTARY, "the processor has no products in bfloat16"),
        ("bfloat16", True, False, ROTARY, None),
    ],
)
def test_what_is_said_of_a_precision(
    precision: Precision, vnni: bool, keeps: bool, shape: dict, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precisions, "HAS_VNNI", vnni)
    monkeypatch.setattr(precisions, "onednn_keeps_float32", lambda: keeps)
    config = run_config(model=TINY["model"] | shape)
    split = make_split(config.task, 0)
    found = precisions.why_idle(precision, build_model(config.model, split, 0), split.train)
    assert found is None if reason is None else reason in str(found)


def test_settings_of_a_hooked_transformer_are_refused_for_tensors() -> None:
    module, x = torch.nn.Linear(2, 1), torch.randn(8, 2, generator=seeds.stream(0, "x"))
    for key, value in {"precision": "int16", "memory_gb": 1.0, "canonicalize": True, "device": "cuda"}.items():
        config = mg.LLCConfig(**SAMPLING | {key: value})
        with pytest.raises(mg.MechgrokError):
            mg.estimate_llc(module, (x,), loss_fn=lambda m, rows: m(rows)[:, 0] ** 2, config=config, seed=0)


# ---- curves


LANGUAGE = language_run_config(train={"n_steps": 12, "n_checkpoints": 3}).model_dump()
CURVE = LANGUAGE["llc"] | {
    "components": ("model", "L0H0"), "checks_every": 2, "n_examples": 32,
    "refinements": ({"distribution": "ngram-heavy", "components": ("L0H0",)},),
}  # fmt: skip
ANALYSES = {"names": (), "n_null": 1}


@pytest.fixture(scope="module")
def of_curve(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The curve of a run with these settings of curves, each made once."""
    folder, made = tmp_path_factory.mktemp("curves"), {}

    def result(llc: dict[str, Any]) -> mg.LLCCurve:
        config = validated(RunConfig, LANGUAGE | {"llc": llc, "analyses": ANALYSES})
        if config.digest() not in made:
            made[config.digest()] = pipeline.run(config, folder / str(len(made)), n_workers=1).curve
        return made[config.digest()]

    return result


@pytest.mark.parametrize("change", of("CurveConfig"))
def test_curves(change: Change, of_curve: Any) -> None:
    assert_effect(of_curve, CURVE, change)


@pytest.mark.parametrize("change", of("RefinementConfig"))
def test_refinements(change: Change, of_curve: Any) -> None:
    base = CURVE["refinements"][0]
    assert_effect(lambda refinement: of_curve(CURVE | {"refinements": (refinement,)}), base, change)


@pytest.mark.parametrize("change", of("ImportedConfig"))
def test_imports(change: Change, tiny_run: tuple[Path, Study], tmp_path: Path) -> None:
    for step, model in tiny_run[1].trajectory:
        save_file(model.state_dict(), tmp_path / f"step-{step}.safetensors")
    runs = iter("ab")

    def result(train: dict[str, Any]) -> Any:
        model = {key: value for key, value in TINY["model"].items() if key != "init_std"}
        config = run_config(train=validated(ImportedConfig, train).model_dump(), model=model)
        return pipeline.import_run(str(tmp_path), config, tmp_path / next(runs)).metrics

    assert_effect(result, {"source": "imported", "checkpoints": tiny_run[1].trajectory.steps}, change)


# ---- what is made of curves


@pytest.mark.parametrize("change", of("StageConfig"))
def test_stages(change: Change) -> None:
    noisy = curve(hump(X), 6.0, 0)
    assert_effect(
        lambda stages: mg.detect_stages(noisy, validated(StageConfig, stages)), StageConfig().model_dump(), change
    )


@pytest.mark.parametrize("change", of("AnalysesConfig"))
def test_analyses(change: Change, tiny_run: tuple[Path, Study]) -> None:
    """On stages that are given, as the tiny run has none to place at random."""
    study = tiny_run[1]
    end = study.trajectory.steps[-1]
    stages = tuple(
        mg.Stage(f"S{i}", way, start, stop, None, None, 1.0, None)
        for i, (way, start, stop) in enumerate([("rising", 0.0, 5.0), ("falling", 5.0, float(end))])
    )

    def result(settings: dict[str, Any]) -> Any:
        healthy = replace(study.curve, healthy=np.array(True))
        asked = replace(study, config=run_config(analyses=settings), stages=stages, curve=healthy)
        reports = [analyses.run(name, asked) for name in asked.config.analyses.names]
        whole = render.to_json(asked, reports)
        del whole["config"]  # that the report tells a setting is not yet a use of it
        return whole

    assert_effect(result, {"names": ("grokking", "ablation"), "n_null": 10}, change)


@pytest.mark.parametrize("change", of("RunConfig"))
def test_runs(change: Change, tiny_run: tuple[Path, Study], tmp_path: Path) -> None:
    runs = iter("ab")

    def result(top: dict[str, Any]) -> Any:
        config = run_config(analyses=ANALYSES, train=TINY["train"] | {"n_steps": 2, "n_checkpoints": 2}, **top)
        study = pipeline.run(config, tmp_path / next(runs), n_workers=1)
        return study.curve, render.to_json(study, [])["name"]

    assert_effect(result, {"name": "tiny", "seed": 0}, change)
