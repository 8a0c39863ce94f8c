"""Heads sampled at settings of their own, `[llc.head_sampling]`."""

from pathlib import Path

import pytest
import torch
import xarray as xr

import mechgrok as mg
from analyses.render import summary
from mechgrok.config import parse_config
from mechgrok.errors import ConfigError
from mechgrok.llc.curve import point_seed
from mechgrok.plan import check_data, sampled_examples
from mechgrok.train import planned_steps
from mechgrok.types import Study
from tests.planted import language_run_config

CONFIG = language_run_config()
STEPS = planned_steps(CONFIG.train)
HEADS = tuple(f"L{layer}H{head}" for layer in range(2) for head in range(4))


def test_heads_have_settings_of_their_own(language_run: tuple[Path, Study]) -> None:
    """Those alone reach their estimates, also on other data; the files and the report tell both."""
    path, study = language_run
    sampling, own = CONFIG.llc.sampling, CONFIG.llc.head_sampling
    curve = study.curve
    assert curve.settings == {"model": sampling} | dict.fromkeys(HEADS, own)
    assert curve.refined["reference"].settings == dict.fromkeys(HEADS, own)
    head = curve.row("L1H2")
    model, seed = study.trajectory.model_at(STEPS[2]), point_seed(study.config.seed, STEPS[2])
    examples = sampled_examples(study.config, study.split)
    alone = mg.estimate_llc(model, examples, component="L1H2", config=own, seed=seed)
    other = mg.estimate_llc(model, examples, component="L1H2", config=sampling, seed=seed)
    assert curve.llc[head, 2] == pytest.approx(alone.llc, rel=1e-4) and abs(other.llc / alone.llc - 1) > 0.01
    with xr.open_dataset(path / "llc.nc") as data:
        assert data.localization.sel(component=["model", "L1H2"]).values.tolist() == [200.0, 100.0]
        assert data.attrs["nbeta"] == 30.0 and "nbeta" not in data.coords
    with xr.open_dataset(path / "repeat-heavy.nc") as data:
        assert data.attrs["localization"] == 100.0
    assert "localization 200, 2 chains" in summary(study) and "of heads: SGLD" in summary(study)


def test_settings_of_heads_that_do_not_fit_are_refused_by_name(language_run: tuple[Path, Study]) -> None:
    own = CONFIG.llc.head_sampling
    assert own is not None
    large = CONFIG.model_copy(
        update={"llc": CONFIG.llc.model_copy(update={"head_sampling": own.model_copy(update={"batch_size": 33})})}
    )
    with pytest.raises(ConfigError, match="batch_size"):
        check_data(large, language_run[1].split)
    text = CONFIG.to_toml().replace("[llc.head_sampling]", "[llc.head_sampling]\nnbetta = 3")
    with pytest.raises(ConfigError, match="unknown key 'llc.head_sampling.nbetta'"):
        parse_config(text, "my.toml")
    without = CONFIG.model_copy(update={"llc": CONFIG.llc.model_copy(update={"head_sampling": None})})
    assert "llc.head_sampling.localization: None -> 100.0" in CONFIG.changes_from(without)
    assert "llc.head_sampling.localization: 100.0 -> None" in without.changes_from(CONFIG)
    assert CONFIG.with_memory(0.5).llc.sampling_of("L0H0").memory_gb == 0.5
    assert CONFIG.with_sampling(own).llc.sampling_of("L0H0") == own == CONFIG.with_sampling(own).llc.sampling
    kept = CONFIG.with_sampling(own, heads=False).llc
    assert kept.sampling == own and kept.sampling_of("L0H0") == CONFIG.llc.head_sampling


def test_a_device_of_heads_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    own = CONFIG.llc.head_sampling
    assert own is not None
    llc = CONFIG.llc.model_copy(update={"head_sampling": own.model_copy(update={"device": "cuda"})})
    with pytest.raises(ConfigError, match="llc.head_sampling.device is cuda"):
        mg.run(CONFIG.model_copy(update={"llc": llc}), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
