"""Small jobs never wait for a compiler; what is compiled is told from sizes alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mechgrok.compiling import compile_ahead, worth_compiling
from mechgrok.config import LLCConfig, load_config
from mechgrok.llc.curve import curve_loops_pay
from mechgrok.llc.work import estimate_work, loops_pay
from mechgrok.pipeline import loops_ahead
from mechgrok.plan import component_names, plan_units
from mechgrok.store import RunDirectory
from mechgrok.tasks import make_split
from mechgrok.train import planned_steps
from tests.oracles import tiny_config
from tests.test_replicas import CONFIG, build, examples

TOY = """
import time, torch, mechgrok as mg, warnings
warnings.simplefilter("ignore")
from transformer_lens import HookedTransformer, HookedTransformerConfig
mg.estimate_llc
model = HookedTransformer(HookedTransformerConfig(
    n_layers=1, d_model=32, d_head=16, n_heads=2, n_ctx=8, d_vocab=20, d_mlp=64, act_fn="relu", normalization_type=None,
    seed=0, device="cpu"))
tokens = torch.randint(0, 20, (256, 8), generator=torch.Generator().manual_seed(0))
data = mg.Examples(tokens, tokens.roll(-1, 1), torch.ones(256, 8))
config = mg.LLCConfig(nbeta=30.0, step_size=1e-4, localization=300.0, batch_size=64 PATH)
start = time.process_time()
estimate = mg.estimate_llc(model, data, component="L0H1", config=config, seed=0)
print(estimate.path, time.process_time() - start)
"""


def toy(cache: Path, path: str = "") -> tuple[str, float, str]:
    """(path, CPU seconds, stderr) of a toy's first estimate in a process with an empty cache."""
    given = os.environ | {"MECHGROK_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    code = TOY.replace(" PATH", path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=given)
    served, seconds = done.stdout.split()[-2:]
    return served, float(seconds), done.stderr


def test_a_toys_first_number_waits_for_no_compiler(tmp_path: Path) -> None:
    path, seconds, stderr = toy(tmp_path)
    assert path == "torch" and seconds < 3 and "compiling" not in stderr
    assert not list(tmp_path.rglob("*.nbc"))


@pytest.mark.long
def test_who_asks_for_compiled_loops_is_told_that_they_take_time_once(tmp_path: Path) -> None:
    path, _, stderr = toy(tmp_path, ', path="compiled"')
    assert path == "compiled" and stderr.count("mechgrok: compiling loops") == 1
    path, seconds, stderr = toy(tmp_path, ', path="compiled"')
    assert path == "compiled" and "compiling" not in stderr and seconds < 3


@pytest.mark.parametrize(("preset", "pays"), [("modular-addition-quick", False), ("modular-addition", True)])
def test_the_quick_preset_is_left_to_torch_and_the_main_job_is_not(preset: str, pays: bool) -> None:
    config = load_config(preset)
    split = make_split(config.task, config.seed)
    plan = plan_units(config, component_names(config, split), split, planned_steps(config.train))
    assert worth_compiling(config, split, plan) is pays


def test_work_grows_with_all_that_makes_it() -> None:
    model, config = build(d_mlp=7), CONFIG.model_copy(update={"batch_size": 4})
    data = examples(model)
    one = estimate_work(model, data, config)
    weights = 2 * (4 * 8 * 2 * 4 + 2 * 6 * 2 * 4 + 2 * 8 * 7) * 6 + 6 * 8 * 9  # by hand: layers, positions, readout
    assert one == 6 * weights * 4 * 40 * 3
    for change in ({"batch_size": 8}, {"n_chains": 6}, {"n_draws": 70}):
        assert estimate_work(model, data, config.model_copy(update=change)) == 2 * one
    assert estimate_work(model, data, config, 3) == 3 * one
    assert estimate_work(model, data.tensors, config) == 0


def test_a_setting_forces_either_and_a_curve_counts_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LLCConfig(nbeta=1.0, step_size=1.0, localization=1.0)
    assert loops_pay([3e12], [config]) and not loops_pay([1e12], [config])
    assert not loops_pay([3e12], [config.model_copy(update={"path": "torch"})])
    assert loops_pay([1.0], [config.model_copy(update={"path": "compiled"})])
    assert loops_pay([1.0], [config.model_copy(update={"precision": "int16"})])  # of which there are only loops

    class Three:
        steps = (0, 1, 2)

        def model_at(self, step: int) -> object:
            return build()

    units = [(step, "model", CONFIG) for step in Three.steps]
    one = estimate_work(build(), examples(build()), CONFIG)
    monkeypatch.setattr("mechgrok.llc.work.PAYS", 2.5 * one)
    assert curve_loops_pay(Three(), examples(build()), units)
    assert not curve_loops_pay(Three(), examples(build()), units[:2])


def test_loops_are_compiled_while_the_model_trains_where_they_pay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    split = make_split(config.task, 0)
    directory, names = RunDirectory.create(tmp_path / "run", config), component_names(config, split)
    assert loops_ahead(directory, split, names) == []
    monkeypatch.setattr("mechgrok.llc.work.PAYS", 1.0)
    (ahead,) = loops_ahead(directory, split, names)
    assert ahead.func is compile_ahead
    ahead()
