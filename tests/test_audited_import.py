"""An import holds its checkpoints against each other: the broken are refused, the doubtful kept out of the stages."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import analyses
from analyses import render
from mechgrok import cli, pipeline
from mechgrok.config import RunConfig
from mechgrok.errors import CheckpointError, ConfigError, RunDirectoryError
from mechgrok.llc.curve import without_steps
from mechgrok.outside.expected import ExpectedLoss
from mechgrok.store import RunDirectory
from mechgrok.types import LLCCurve, Trajectory
from tests.oracles import tiny_config
from tests.outside_models import SHAPES, checkout, neox, outside_config, state_dicts

FEW = {
    "train": {"n_steps": 60, "n_checkpoints": 10},
    "llc": {"components": ("model", "L0H0"), "checks_every": 3},
    "stages": {"n_posterior": 20},
    "analyses": {"names": ("ablation",), "n_null": 3},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trajectory, RunConfig]:
    """A trajectory of this package's, and the settings of a run that imports it."""
    config = tiny_config(**FEW)
    trajectory = pipeline.train_only(config, tmp_path_factory.mktemp("trained") / "run")
    train = {"source": "imported", "checkpoints": trajectory.steps}
    model = config.model_dump(exclude={"model": {"init_std"}})["model"]  # which acts on what is trained here alone
    return trajectory, RunConfig.model_validate(config.model_dump() | {"train": train, "model": model})


@pytest.fixture
def folder(trained: tuple[Trajectory, RunConfig], tmp_path: Path) -> Path:
    """Its checkpoints as files, and my.toml beside the folder."""
    path = tmp_path / "elsewhere"
    path.mkdir()
    for step, model in trained[0]:
        save_file(model.state_dict(), path / f"step-{step}.safetensors")
    (tmp_path / "my.toml").write_text(trained[1].to_toml())
    return path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[str, str]]:
    """The command line in this process: (stdout, stderr)."""

    def run(*arguments: object, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["mechgrok", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        assert (stopped.value.code or 0) == code, printed
        return printed.out, printed.err

    return run


def test_named_steps_are_kept_out_of_the_stages_and_the_report_says_so(
    trained: tuple[Trajectory, RunConfig],
    folder: Path,
    call: Callable[..., tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last weights at an early step: their LLC is sampled, and rests in no stage."""
    trajectory, config = trained
    wrong, last = trajectory.steps[3], trajectory.steps[-1]
    save_file(load_file(folder / f"step-{last}.safetensors"), folder / f"step-{wrong}.safetensors")
    out = folder.parent / "run"
    _, told = call("import", folder, "--config", folder.parent / "my.toml", "--out", out)
    sentence = f"step {wrong} has the weights of the last step, {last}"
    assert f"note: {sentence}; kept out of the stages and the analyses" in told
    study = pipeline.run(config, out, n_workers=1)
    assert study.suspicious == {wrong: f"has the weights of the last step, {last}"}
    (out / "audit.json").rename(out / "kept.json")
    unaware = pipeline.load_study(out).curve
    assert unaware.healthy[:, 3].all()
    (out / "kept.json").rename(out / "audit.json")
    again = pipeline.load_study(out)
    assert again.suspicious == study.suspicious and again.stages == study.stages
    for one in (study.curve, again.curve):
        for name in ("", "control", "finer"):
            curve, plain = (getattr(of, name) if name else of for of in (one, unaware))
            assert wrong in curve.steps and np.array_equal(curve.llc, plain.llc)
            assert np.array_equal(curve.healthy, plain.healthy & (plain.steps != wrong))
    # No analysis and no landmark looks at it either.
    report = analyses.run("ablation", study)
    assert report.steps.tolist() == [step for step in trajectory.steps if step != wrong]
    perfect = replace(study, trajectory=replace(study.trajectory, metrics=tuple(
        replace(row, train_accuracy=float(row.step in (wrong, last))) for row in study.trajectory.metrics
    )))  # fmt: skip
    assert render.landmarks_of(perfect)["memorized"] == last
    swept = []
    monkeypatch.setattr(pipeline, "calibrate", lambda of, *arguments, **settings: swept.append(of.steps) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipeline.calibrate_run(out, {})
    assert swept == [tuple(step for step in trajectory.steps if step != wrong)]
    visible = f"One imported checkpoint is kept out of the stages and the analyses: {sentence}."
    assert f"**{visible}**" in render.to_markdown(study, [])
    assert f'<p class="fails">{visible}</p>' in render.to_html(study, [])
    assert render.to_json(study, [])["suspicious"] == {str(wrong): study.suspicious[wrong]}
    for command in ("stages", "llc"):
        assert visible in call(command, out)[1]
    (out / "audit.json").write_text("{")
    with pytest.raises(RunDirectoryError, match="audit.json is damaged; run `mechgrok import` again"):
        pipeline.load_study(out)


def test_a_curve_without_steps_is_without_them_in_all_its_parts() -> None:
    part = LLCCurve(np.array([1, 4]), ("model",), np.ones((1, 2)), np.ones((1, 2)))
    curve = LLCCurve(
        np.array([1, 2, 4]), ("model", "L0H0"), np.ones((2, 3)), np.ones((2, 3)),
        control=part, finer=part, refined={"other": part},
    )  # fmt: skip
    found = without_steps(curve, [2, 4])
    assert found.healthy.tolist() == [[True, False, False]] * 2
    for one in (found.control, found.finer, found.refined["other"]):
        assert one is not None and one.healthy.tolist() == [[True, False]]
    assert without_steps(curve, []).healthy.all()


def test_stages_are_those_of_a_curve_without_the_steps() -> None:
    """A rise of the LLC with one step far off it, as the last step's estimate at an early one is."""
    steps = np.array([0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048])
    rise = 40 / (1 + np.exp(-3 * (np.log1p(steps) - 4)))
    wrong = np.where(steps == 4, 40.0, rise)

    def curve(steps: np.ndarray, llc: np.ndarray) -> LLCCurve:
        return LLCCurve(steps, ("model",), llc[None], np.full((1, len(steps)), 0.5))

    config = tiny_config(stages={"n_posterior": 200})
    kept = steps != 4
    expected = pipeline.find_stages(curve(steps[kept], rise[kept]), config)
    assert [stage.direction for stage in expected].count("rising") == 1
    assert pipeline.find_stages(without_steps(curve(steps, wrong), [4]), config) == expected
    assert pipeline.find_stages(curve(steps, wrong), config) != expected


def test_an_honest_import_names_nothing(
    trained: tuple[Trajectory, RunConfig], folder: Path, call: Callable[..., tuple[str, str]]
) -> None:
    out = folder.parent / "run"
    told = call("import", folder, "--config", folder.parent / "my.toml", "--out", out)[1]
    assert "note:" not in told
    assert json.loads((out / "audit.json").read_text()) == {"named": {}}
    assert not RunDirectory.open(out).suspicious()
    printed = call("import", folder, "--audit")[0]
    assert f"none of {len(trained[0].steps)} steps named; neighbouring steps lie 0." in printed


def test_an_audit_alone_writes_nothing_and_lists_every_step(
    trained: tuple[Trajectory, RunConfig], folder: Path, call: Callable[..., tuple[str, str]]
) -> None:
    steps = trained[0].steps
    state = load_file(folder / f"step-{steps[-1]}.safetensors")
    save_file(state, folder / f"step-{steps[2]}.safetensors")
    broken = load_file(folder / f"step-{steps[5]}.safetensors")
    broken["blocks.0.attn.W_Q"][0, 0, 0] = float("nan")
    save_file(broken, folder / f"step-{steps[5]}.safetensors")
    before = sorted(folder.parent.rglob("*"))
    expected = (
        f"step {steps[2]}: has the weights of the last step, {steps[-1]}\n"
        f"step {steps[5]}: is not finite: blocks.0.attn.W_Q[0, 0, 0] is nan\n"
        f"2 of {len(steps)} steps named; neighbouring"
    )
    for config in ((), ("--config", folder.parent / "my.toml")):
        assert call("import", folder, "--audit", *config, code=1)[0].startswith(expected)
    assert sorted(folder.parent.rglob("*")) == before
    for arguments, message in (
        (("--audit", "--init"), "give either --config my.toml to import"),
        (("--audit", "--out", folder.parent / "run"), "--audit makes no run directory; leave --out out"),
        (("--audit", "--expect-loss", "0=1.2"), "--expect-loss needs --config my.toml"),
        (("--init", "--expect-loss", "0=1.2"), "--expect-loss needs --config my.toml"),
    ):
        assert message in call("import", folder, *arguments, code=2)[1]


@pytest.mark.parametrize("source", ["state dicts", "Hugging Face"])
def test_what_is_not_finite_is_refused_before_anything_is_written(source: str, tmp_path: Path) -> None:
    """The loss of these is finite: TransformerLens makes zeros of NaN attention."""
    if source == "state dicts":
        shape, name, where = tiny_config().model, "blocks.0.attn.W_Q", "step_002000.safetensors"
        state_dicts(tmp_path / "out", shape)
    else:
        checkout(tmp_path / "out", neox)
        shape = pipeline.import_template(str(tmp_path / "out")).model
        name, where = "gpt_neox.layers.1.attention.dense.weight", "step2000/model.safetensors"
    state = load_file(tmp_path / "out" / where)
    state[name].view(-1)[0] = float("nan")
    save_file(state, tmp_path / "out" / where, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"at step 2000 is not finite: {name}.* is nan; leave that step out of"):
        pipeline.import_run(str(tmp_path / "out"), outside_config(shape), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- a loss that is known


def test_how_exact_an_expected_loss_is_is_how_it_is_written() -> None:
    for text, loss, within in (
        ("20=1.5", 1.5, 0.05),
        ("0=2", 2.0, 0.5),
        ("7=.123", 0.123, 5e-4),
        ("7=3.0000", 3, 5e-5),
    ):
        one = ExpectedLoss.parse(text)
        assert one.nats == loss and one.within == pytest.approx(within)
        assert one.against(loss + 0.99 * within) is None and one.against(loss - 0.99 * within) is None
        assert one.against(loss + 1.01 * within) is not None and one.against(float("nan")) is not None
    assert ExpectedLoss.parse("3=2.0000000000").within == pytest.approx(2e-5)
    for text in ("1.5", "x=1", "3=-1", "3=nan", "-3=1", "3=1e3", "3=", "=2"):
        with pytest.raises(ConfigError, match="--expect-loss reads STEP=NATS, such as 2000=1.234, got"):
            ExpectedLoss.parse(text)


@pytest.mark.parametrize(
    "wrong", [{"eps": 1e-2}, {"act_fn": "relu"}, {"rotary_base": 10000.0}, {"rotary_adjacent_pairs": False}, {}]
)
def test_a_wrong_setting_that_no_parameter_shows_is_seen_in_the_loss(
    wrong: dict, tmp_path: Path, call: Callable[..., tuple[str, str]]
) -> None:
    """Without config.json and without saved tables every shape fits; the loss that the owner knows does not."""
    shape = tiny_config(model=SHAPES["rotary"] | {"init_std": 0.5}).model
    state_dicts(tmp_path / "out", shape)
    (tmp_path / "out" / "config.json").unlink()
    for path in (tmp_path / "out").iterdir():
        save_file({name: tensor for name, tensor in load_file(path).items() if "rotary" not in name}, path)
    right = pipeline.import_run(str(tmp_path / "out"), outside_config(shape), tmp_path / "right")
    known = f"2000={right.column('train_loss')[-1]:.4f}"
    (tmp_path / "my.toml").write_text(outside_config(shape.model_copy(update=wrong)).to_toml())
    arguments = ("import", tmp_path / "out", "--config", tmp_path / "my.toml", "--expect-loss", known)
    if not wrong:
        call(*arguments, "--audit")
        call(*arguments, "--out", tmp_path / "run")
        assert "at step 5, which is none of [train] checkpoints" in call(*arguments, "--expect-loss", "5=1", code=2)[1]
        return
    pipeline.import_run(str(tmp_path / "out"), str(tmp_path / "my.toml"), tmp_path / "unnoticed")
    assert "step 2000: has a train loss of" in call(*arguments, "--audit", code=1)[0]
    message = call(*arguments, "--out", tmp_path / "run", code=2)[1]
    assert "at step 2000 has a train loss of" in message and "eps, act_fn or the rotary settings of [model]" in message
    assert not (tmp_path / "run").exists()


def test_what_is_said_of_a_source_is_printed_once(tmp_path: Path, call: Callable[..., tuple[str, str]]) -> None:
    folder = tmp_path / "out"
    state_dicts(folder, tiny_config().model)
    for path in folder.glob("*.safetensors"):
        state = {f"_orig_mod.{name}": tensor for name, tensor in load_file(path).items()}
        torch.save({"model": state}, path.with_suffix(".pt"))
        path.unlink()
    (tmp_path / "my.toml").write_text(outside_config(tiny_config().model).to_toml())
    for arguments in (("--audit",), ("--config", tmp_path / "my.toml", "--out", tmp_path / "run")):
        told = call("import", folder, *arguments)[1]
        assert told.count("note: of each file the state dict under 'model' is read") == 1
        assert told.count("note: `_orig_mod.`, which torch.compile puts into names of parameters, is left out") == 1
