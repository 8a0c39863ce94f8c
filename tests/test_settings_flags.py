"""Every argument and flag of the command line is changed; see tests/settings_walk.py."""

import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors.torch import save_file

import mechgrok as mg
from mechgrok import cli, pipeline
from mechgrok.config import RunConfig
from mechgrok.types import Study
from tests.settings_walk import SHORT, Change, assert_effect, bits

COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
FLAGS = [f"{name} {flag.name}" for name, command in COMMANDS.items() for flag in command.params if flag.name != "help"]


class Shell:
    """The command line in this process, over a finished tiny run."""

    def __init__(self, path: Path, folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
        self.path, self.folder, self.capsys, self.monkeypatch = path, folder, capsys, monkeypatch
        self.asked: list[Any] = []
        monkeypatch.setattr(pipeline, "calibrate", self._calibrate)
        self.config, self.other = folder / "short.toml", folder / "other.toml"
        self.config.write_text(SHORT.to_toml())
        self.other.write_text(SHORT.model_copy(update={"seed": 1}).to_toml())
        imported = SHORT.model_dump() | {"train": {"source": "imported", "checkpoints": (0, 2)}}
        imported["model"] = {key: value for key, value in imported["model"].items() if key != "init_std"}
        for name, changes in (("imported", {}), ("fewer", {"train": {"source": "imported", "checkpoints": (2,)}})):
            (folder / f"{name}.toml").write_text(RunConfig.model_validate(imported | changes).to_toml())
        self.n_runs = 0

    def _calibrate(self, *args: Any, n_workers: int, progress: Any, **asked: Any) -> None:
        """Says what it was asked for, in place of an hour's sweep; tests/test_settings_calls.py walks that."""
        self.asked.append((args[1], asked))
        raise typer.Exit(0)

    def __call__(self, arguments: dict[str, Any]) -> Any:
        """What a command prints, but for the names of folders, and the bits of the run that it makes."""
        given = dict(arguments)
        command = given.pop("command")
        if command in ("run", "train", "import") and not {"--out", "--init", "--audit"} & given.keys():
            self.n_runs += 1
            given["--out"] = self.folder / f"out {self.n_runs}"
        words: list[Any] = []
        for key, value in given.items():  # a flag with its value, unless that is True; an argument; nothing for None
            words += [] if value is None else [key] * (key[:2] == "--") + [value] * (value is not True)
        self.monkeypatch.setattr(sys, "argv", ["mechgrok", command, *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = self.capsys.readouterr()
        if stopped.value.code == 2:
            raise mg.MechgrokError(printed.err)
        lines = [line for line in printed.out.splitlines() if str(self.folder) not in line]
        made = Path(given["--out"]) if "--out" in given else None
        whole = made is not None and (made / "llc.nc").exists()
        return lines, pipeline.load_study(made).curve if whole else None, [bits(one) for one in self.asked[-1:]]

    def table(self) -> dict[str, list[Change]]:
        """What each argument and flag does; `command` and what it needs are the base."""
        run, llc = {"command": "run", "source": self.config, "--workers": 1}, {"command": "llc", "run": self.path}
        train, calibrate = {"command": "train", "source": self.config}, {"command": "calibrate", "run": self.path}
        check = {"command": "check", "run": self.path, "--write": self.folder / "baseline.json"}
        imports = {"command": "import", "source": self.folder, "--config": self.folder / "imported.toml"}
        nowhere, elsewhere = self.folder / "nowhere", self.folder / "elsewhere"

        def flag(key: str, value: Any, of: dict[str, Any], effect: Any = "bits") -> Change:
            return Change({key: value}, effect, of)

        return {
            "run source": [flag("source", self.other, run)],
            "run out_dir": [flag("--out", elsewhere, run, "same")],
            "run workers": [flag("--workers", 2, run, "same")],
            "run scheduler": [flag("--scheduler", "nonsense", run, "refused")],
            "run memory": [flag("--memory", 1e-6, run, "rounding"), flag("--memory", -1, run, "refused")],
            "train source": [flag("source", self.other, train)],
            "train out_dir": [flag("--out", self.folder / "trained", train, "same")],
            "import source": [flag("source", nowhere, imports, "refused")],
            "import config": [flag("--config", self.folder / "fewer.toml", imports)],
            "import out_dir": [flag("--out", self.folder / "brought", imports, "same")],
            "import init": [flag("--init", True, imports, "refused")],
            "import audit": [
                flag("--audit", True, imports),
                flag("--audit", True, imports | {"--out": elsewhere}, "refused"),
            ],
            "import expect_loss": [flag("--expect-loss", "0=99", imports, "refused")],
            "llc run_dir": [flag("run", nowhere, llc, "refused")],
            "llc workers": [flag("--workers", 2, llc, "same")],
            "llc scheduler": [flag("--scheduler", "nonsense", llc, "refused")],
            "calibrate run_dir": [flag("run", nowhere, calibrate, "refused")],
            "calibrate sampler": [flag("--sampler", "baoab", calibrate)],
            "calibrate batch_size": [flag("--batch-size", 0, calibrate), flag("--batch-size", 9, calibrate)],
            "calibrate components": [flag("--components", "L0H0", calibrate)],
            "calibrate checkpoints": [flag("--checkpoints", 2, calibrate)],
            "calibrate workers": [flag("--workers", 2, calibrate, "same")],
            "stages run_dir": [flag("run", nowhere, {"command": "stages", "run": self.path}, "refused")],
            "analyse run_dir": [flag("run", nowhere, {"command": "analyse", "run": self.path}, "refused")],
            "analyse names": [flag("name", "ablation", {"command": "analyse", "run": self.path})],
            "report run_dir": [flag("run", nowhere, {"command": "report", "run": self.path}, "refused")],
            "check run_dir": [flag("run", nowhere, check, "refused")],
            "check against": [flag("--against", self.folder / "baseline.json", check, "refused")],
            "check write": [flag("--write", None, check, "refused")],
            "list root": [flag("--root", self.path.parent, {"command": "list", "--root": self.folder / "none"})],
        }


@pytest.fixture
def shell(
    tiny_run: tuple[Path, Study], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Shell:
    made = Shell(tiny_run[0], tmp_path, capsys, monkeypatch)
    study = tiny_run[1]
    for step, name in ((study.trajectory.steps[0], "step-0"), (study.trajectory.steps[-1], "step-2")):
        save_file(study.trajectory.model_at(step).state_dict(), tmp_path / f"{name}.safetensors")
    return made


def test_every_flag_is_in_the_table(shell: Shell) -> None:
    assert sorted(FLAGS) == sorted(shell.table())


@pytest.mark.parametrize("flag", FLAGS)
def test_flags(flag: str, shell: Shell) -> None:
    for change in shell.table()[flag]:
        assert_effect(shell, {}, change)
