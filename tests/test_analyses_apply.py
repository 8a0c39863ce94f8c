"""Every analysis on every legal shape of model and data: a report, or one sentence before any work."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from transformer_lens import HookedTransformer

import analyses
from analyses import contract
from mechgrok.components import head_names
from mechgrok.config import ModelConfig, RunConfig
from mechgrok.errors import AnalysisError, MechgrokError, ShapeError
from mechgrok.model import build_model
from mechgrok.task_config import TextConfig
from mechgrok.tasks import make_split
from mechgrok.types import CheckpointMetrics, LLCCurve, Study, Trajectory
from tests.conftest import mechgrok
from tests.oracles import tiny_config
from tests.planted import A_STAGE, RATES, language_config, language_run_config

STEPS = (0, 10, 100)
BASE = {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_head": 8, "d_mlp": 16, "init_std": 0.25}
MODELS = {
    "one layer": {},
    "attention only": {"d_mlp": None},
    "three layers": {"n_layers": 3, "d_mlp": None, "normalization_type": "LN"},
    "one head": {"n_heads": 1, "n_layers": 2},
    "nine heads": {"n_heads": 9},
    "ones": {"d_model": 1, "d_head": 1, "d_mlp": 1, "n_heads": 1},
    "more tokens and classes": {"d_vocab": 40},
    "more classes": {"d_vocab_out": 40},
    "more positions": {"n_ctx": 50},
    "rotary": {"positional_embedding_type": "rotary", "n_layers": 2},
    "shortformer": {"positional_embedding_type": "shortformer", "normalization_type": "LN", "n_layers": 2},
    "alibi": {"positional_embedding_type": "alibi", "normalization_type": "LNPre"},
    "RMS": {"normalization_type": "RMS"},
    "final RMS": {"normalization_type": "LN", "final_rms": True},
    "parallel": {"parallel_attn_mlp": True, "normalization_type": "RMSPre", "n_layers": 2},
    "solu_ln": {"act_fn": "solu_ln"},
}  # fmt: skip
ADDITIONS = {
    "one pair to train on": {"p": 5, "train_fraction": 0.07},
    "one pair to test on": {"p": 5, "train_fraction": 0.95, "split": "ordered"},
}
SILENT = RATES.model_copy(update=dict.fromkeys(("ngram", "repeat", "open", "close", "skip_open", "skip_close"), 0.0))
LANGUAGES = {
    "short rows": {"n_ctx": 9},
    "one row to test on": {"n_test": 1},
    "one row to train on": {"n_train": 1, "n_test": 2},
    "bigrams alone": {"rates": SILENT, "distributions": {}},
    "few tokens": {"n_plain": 8, "n_ngrams": 1, "ngram_length": 3, "n_brackets": 1, "n_skips": 1, "n_successors": 1},
}


def addition(model: dict[str, Any], task: dict[str, Any] | None = None) -> RunConfig:
    return tiny_config(model=BASE | model, task=task or {})


def language(model: dict[str, Any], task: dict[str, Any] | None = None) -> RunConfig:
    base = language_run_config()
    own = language_config(
        **{"n_ctx": 16, "n_test": 16, "n_refined": 4, "distributions": {"ngram-heavy": RATES}, **(task or {})}
    )
    return base.model_copy(update={"task": own, "model": ModelConfig.model_validate(BASE | model)})


CONFIGS = {
    **{f"addition, {name}": addition(model) for name, model in MODELS.items()},
    **{f"addition, {name}": addition({}, task) for name, task in ADDITIONS.items()},
    **{f"language, {name}": language(model) for name, model in MODELS.items()},
    **{f"language, {name}": language({"n_layers": 2}, task) for name, task in LANGUAGES.items()},
}


def study_of(config: RunConfig) -> Study:
    """Three untrained models and random curves, on every distribution of the task too."""
    split = make_split(config.task, config.seed)
    models = {step: build_model(config.model, split, step) for step in STEPS}
    names, rng = ("model", *head_names(models[0])), np.random.default_rng(0)

    def curve() -> LLCCurve:
        llc = 5 + rng.normal(size=(len(names), len(STEPS)))
        return LLCCurve(steps=np.array(STEPS), components=names, llc=llc, std_error=np.full(llc.shape, 0.1))

    refined = {name: curve() for name in (*split.distributions, "reference")}
    whole = replace(curve(), control=curve(), refined=refined)
    metrics = tuple(CheckpointMetrics(step, 1.0, 1.0, 0.5, 0.5) for step in STEPS)
    return Study(config, split, Trajectory(config, metrics, models.__getitem__), whole, ())


def applicable(config: RunConfig) -> Iterator[str]:
    return (name for name in analyses.REGISTRY if config.task.name in contract.load(name).TASKS)


def assert_reported(name: str, study: Study) -> None:
    """Claims under no stage and under two invented ones, tables and figures, without a warning."""
    report, analysis = analyses.run(name, study), contract.load(name)
    series = {"step": report.steps, **report.series, **report.derived}
    stages = (A_STAGE, replace(A_STAGE, name="S2", direction="falling", start=A_STAGE.end, end=100.0))
    staged = analysis.conclude(series, stages, study.curve)
    assert [one.text for one in staged] == [one.text for one in report.claims]
    for titles, rows in getattr(analysis, "tables", lambda report: {})(report).values():
        assert all(len(row) == len(titles) for row in rows)
    assert analysis.plot(report, study)
    plt.close("all")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_analysis_reports_or_is_refused_before_any_work(config: RunConfig) -> None:
    """pytest makes errors of warnings, so a mean of nothing would show."""
    study = study_of(config)
    for name in applicable(config):
        try:
            contract.check([name], config)
        except MechgrokError as error:
            with pytest.raises(type(error)):
                analyses.run(name, study)
        else:
            assert_reported(name, study)


def fill(value: float) -> Any:
    def change(model: HookedTransformer) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)

    return change


@pytest.mark.parametrize("value", [0.0, float("nan")], ids=["all zero", "not a number"])
@pytest.mark.parametrize("config", [addition({}), language({"n_layers": 2})], ids=["addition", "language"])
def test_a_checkpoint_that_died_is_reported(config: RunConfig, value: float) -> None:
    study = study_of(config)
    for step in STEPS:
        fill(value)(study.trajectory.model_at(step))
    for name in applicable(config):
        assert_reported(name, study)


# ---- refused before training


@pytest.fixture
def short_text(tmp_path: Path) -> RunConfig:
    """Rows of four tokens, which hold no repeat; `prepare` of an analysis does not look for any."""
    words = [f"the {one} saw a {other}, {i}\n" for i in range(200) for one, other in (("cat", "dog"), ("bird", "fish"))]
    (tmp_path / "corpus.txt").write_text("".join(words))
    task = TextConfig(
        name="text", sources=(str(tmp_path / "corpus.txt"),), n_ctx=4, n_train=8, n_test=4, test_fraction=0.3,
        mixture=(1.0,), vocabulary=260,
    )  # fmt: skip
    return language({}).model_copy(update={"task": task})


def test_rows_too_short_for_what_an_analysis_measures_are_refused(short_text: RunConfig) -> None:
    contract.check(["multigram_circuit"], short_text)
    with pytest.raises(ShapeError, match="a context of 5, got 259 and 4; use a task with longer rows"):
        contract.check(["mechanisms"], short_text)


def test_the_command_line_refuses_with_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(tiny_config(model={"d_mlp": None}).to_toml())
    done = mechgrok("run", path, "--out", tmp_path / "run")
    assert done.returncode == 2 and "this model is attention-only; give it an MLP" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_of_several_analyses_none_is_made_if_one_does_not_apply(
    tiny_run: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mechgrok import cli

    monkeypatch.setattr(analyses, "run", lambda *_: pytest.fail("an analysis was made"))
    with pytest.raises(AnalysisError, match="'mechanisms' applies to planted-language"):
        cli._analyse(tiny_run[1], ["grokking", "mechanisms"], lambda *_: None)
