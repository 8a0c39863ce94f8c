"""Every keyword of the public face is changed; see tests/settings_walk.py."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mechgrok as mg
from mechgrok.types import Examples, Study
from tests.settings_walk import SAMPLING, SHORT, Change, assert_effect, is_
from tests.test_stages import X, curve, hump

CONFIG = mg.LLCConfig(**SAMPLING)
HOTTER = CONFIG.model_copy(update={"nbeta": 11.0})


class Face:
    """What the public functions are called with, of a finished tiny run."""

    def __init__(self, path: Path, study: Study, folder: Path):
        self.path, self.study, self.folder = path, study, folder
        self.steps = study.trajectory.steps
        self.model, self.early = (study.trajectory.model_at(step) for step in (self.steps[-1], self.steps[-2]))
        self.train, self.test = study.split.train, study.split.test
        sets = {"train": self.train.first(6), "test": self.test.first(6), "more": self.test.first(5)}
        self.seen = self.observed(sets, None)
        self.seen_head = self.observed(sets, "L0H1")
        self.other = self.observed(sets, "L0H0")
        self.n_runs = 0

    def observed(self, sets: dict[str, Examples], component: str | None) -> Any:
        return mg.observe(self.model, self.train, sets, config=CONFIG, seed=0, component=component)

    def bases(self) -> dict[str, dict[str, Any]]:
        """The arguments of each function before any is changed."""
        sampled = {"config": CONFIG, "seed": 0}
        return {
            "estimate_llc": {"model": self.model, "data": self.train, **sampled},
            "observe": {"model": self.model, "data": self.train, "observed": {"test": self.test}, **sampled},
            "llc_curve": {
                "trajectory": self.study.trajectory, "examples": self.train, "components": ("L0H0",), **sampled
            },
            "calibrate": {
                "models": [(self.steps[-1], self.model)], "data": self.train, "seed": 0, "nbetas": (10.0,),
                "localizations": (1e4,), "n_chains": 2,
            },
            "influences": {"observation": self.seen, "of": "train", "on": "test"},
            "susceptibilities": {"full": self.seen, "restricted": self.seen_head, "data": "train", "on": "test"},
            "detect_stages": {"curve": curve(hump(X), 6.0, 0)},
            "canonicalize": {"model": self.model},
            "component": {"model": self.model, "name": "L0H0"},
            "load_config": {"source": "modular-addition"},
            "load_study": {"path": self.path},
            "preset_names": {},
            "run": {"source": SHORT, "n_workers": 1},
        }  # fmt: skip

    def table(self) -> dict[str, list[Change]]:
        """What a change of each of their arguments does."""
        shaken = Examples(self.train.tokens, self.train.targets.roll(1, 0), self.train.weights)
        two = mg.LLCCurve(
            steps=X.searchsorted(X),
            components=("model", "L0H0"),
            llc=[hump(X), hump(X)[::-1]],
            std_error=[[6.0] * 33] * 2,
        )
        sick = mg.LLCCurve(
            steps=two.steps, components=("model",), llc=two.llc[:1], std_error=two.std_error[:1],
            healthy=[[True] * 30 + [False] * 3],
        )  # fmt: skip
        pairs = [(step, self.study.trajectory.model_at(step)) for step in self.steps]
        linear, x = torch.nn.Linear(2, 1).requires_grad_(), torch.linspace(-1, 1, 16).view(8, 2)
        tensors = {"model": linear, "data": (x,), "loss_fn": lambda module, rows: module(rows)[:, 0] ** 2}
        of_a_run = {"models": self.study.trajectory, "n_checkpoints": 1}
        steeper = {"loss_fn": lambda module, rows: 2 * module(rows)[:, 0] ** 2}
        wide = CONFIG.model_copy(update={"nbeta": 1e-3, "localization": 1.0, "step_size": 0.1})
        sampled = {
            "model": [is_("model", self.early)],
            "config": [is_("config", HOTTER)],
            "seed": [is_("seed", 1)],
            "component": [is_("component", "L0H1")],
        }
        refused = Change(steeper, "refused")  # Examples carry their own loss
        tables: dict[str, dict[str, list[Change]]] = {
            "estimate_llc": {
                **sampled, "data": [is_("data", shaken)], "bias": [is_("bias", True)],
                "chance_loss": [is_("chance_loss", 1e9, config=wide)],
                "loss_fn": [Change(steeper, of=tensors), refused],
            },
            "observe": {
                **sampled, "data": [is_("data", shaken)], "observed": [is_("observed", {"test": self.train})],
                "loss_fn": [Change(steeper, of=tensors | {"observed": {"test": (x[:3],)}}), refused],
            },
            "llc_curve": {
                "trajectory": [is_("trajectory", pairs[:2])], "examples": [is_("examples", shaken)],
                "components": [is_("components", ("L0H1",)), is_("components", ("L0H0", "L0H0"), "refused")],
                "config": sampled["config"], "seed": sampled["seed"], "n_workers": [is_("n_workers", 2, "same")],
                "n_threads": [is_("n_threads", 2, "rounding")],
            },
            "calibrate": {
                "models": [is_("models", pairs[:1])],
                "data": [is_("data", shaken)], "seed": [is_("seed", 1)], "components": [is_("components", ("L0H0",))],
                "sampler": [is_("sampler", "sgld"), is_("sampler", "mala")],
                "momentum": [is_("momentum", 0.5), is_("momentum", 0.5, "refused", sampler="sgld")],
                "batch_size": [is_("batch_size", 8), is_("batch_size", 99, "refused")],
                "n_chains": [is_("n_chains", 3)], "canonicalize": [is_("canonicalize", True)],
                "like": [
                    is_("like", CONFIG.model_copy(update={"precision": "float64"})),
                    is_("like", CONFIG.model_copy(update={"engine": "devinterp"}), "refused"),
                ],
                "n_checkpoints": [
                    Change({"n_checkpoints": 2}, of=of_a_run), Change({"n_checkpoints": 0}, "refused", of_a_run),
                    Change({"n_checkpoints": 99}, "refused", of_a_run), is_("n_checkpoints", 1, "refused"),
                ],
                "loss_fn": [Change(steeper, of=tensors | {"models": [(0, linear)]}), refused],
                "chance_loss": [is_("chance_loss", 1e9, nbetas=(1e-3,), localizations=(1.0,))],
                "nbetas": [is_("nbetas", (11.0,))], "localizations": [is_("localizations", (2e4,))],
                "n_workers": [is_("n_workers", 2, "same")],
                "progress": [is_("progress", lambda what, done, total: None, "same")],
            },
            "influences": {
                "observation": [is_("observation", self.other)], "of": [is_("of", "more")], "on": [is_("on", "more")]
            },
            "susceptibilities": {
                "full": [is_("full", self.other)], "restricted": [is_("restricted", self.other)],
                "data": [is_("data", "more")], "on": [is_("on", "more")],
            },
            "detect_stages": {
                "curve": [is_("curve", curve(hump(X), 6.0, 1))],
                "config": [is_("config", mg.StageConfig(plateau=0.3))],
                "component": [is_("component", "L0H0", curve=two)],
                "drop_unhealthy": [is_("drop_unhealthy", False, "refused", curve=sick, drop_unhealthy=True)],
                "seed": [is_("seed", 1)],
            },
            "canonicalize": {"model": [is_("model", self.early)]},
            "component": {"model": [is_("model", torch.nn.Linear(1, 1), "refused")], "name": [is_("name", "L0H1")]},
            "load_config": {"source": [is_("source", "modular-addition-113")]},
            "load_study": {"path": [is_("path", self.folder, "refused")]},
            "preset_names": {},
            "run": {
                "source": [is_("source", SHORT.model_copy(update={"seed": 1}))],
                "out": [is_("out", self.folder / "elsewhere", "same")],
                "n_workers": [is_("n_workers", 2, "same")],
                "progress": [is_("progress", lambda what, done, total: None, "same")],
                "scheduler": [is_("scheduler", "nonsense", "refused")],  # on a real one: tests/test_cluster.py
            },
        }  # fmt: skip
        return {f"{name}.{key}": changes for name, table in tables.items() for key, changes in table.items()}

    def called(self, name: str) -> Callable[[dict[str, Any]], Any]:
        """The function, whose mistakes are MechgrokErrors; a run gets a folder of its own."""

        def call(arguments: dict[str, Any]) -> Any:
            if name == "calibrate":
                arguments = {key: value for key, value in arguments.items() if key != "model"}
            if name == "run":
                self.n_runs += 1
                arguments = {"out": self.folder / f"run {self.n_runs}"} | arguments
                study = mg.run(**arguments)
                return study.curve, study.stages, study.trajectory.metrics
            if name == "load_config":
                return mg.load_config(**arguments).digest()
            return getattr(mg, name)(**arguments)

        return call


FUNCTIONS = [name for name in mg.__all__ if inspect.isfunction(getattr(mg, name))]
KEYWORDS = [f"{name}.{key}" for name in FUNCTIONS for key in inspect.signature(getattr(mg, name)).parameters]


@pytest.fixture(scope="module")
def face(tiny_run: tuple[Path, Study], tmp_path_factory: pytest.TempPathFactory) -> Face:
    return Face(*tiny_run, tmp_path_factory.mktemp("calls"))


def test_every_keyword_is_in_the_table(face: Face) -> None:
    assert sorted(KEYWORDS) == sorted(face.table())
    # What is no function holds what it is given (records) or has a walk of its own (settings).
    classes = {name for name in mg.__all__ if inspect.isclass(getattr(mg, name))}
    assert classes | set(FUNCTIONS) == set(mg.__all__)


@pytest.mark.parametrize("keyword", KEYWORDS)
def test_keywords(keyword: str, face: Face, monkeypatch: pytest.MonkeyPatch) -> None:
    for size, value in {"N_DRAWS": 8, "MAX_DOUBLINGS": 0, "STEP_FACTORS": (1.0,)}.items():  # of sweeps
        monkeypatch.setattr(f"mechgrok.llc.calibrate.{size}", value)
    name = keyword.split(".")[0]
    for change in face.table()[keyword]:
        assert_effect(face.called(name), face.bases()[name], change)
