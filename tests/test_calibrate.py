"""Calibration on problems whose good settings are known, and on some that have none."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import mechgrok as mg
from mechgrok.config import load_config
from mechgrok.errors import ConfigError
from mechgrok.llc.step_size import allowed_step_size, sharpness
from mechgrok.sampling.potential import ModulePotential
from mechgrok.types import Component
from tests.conftest import mechgrok
from tests.oracles import Quadratic, noisy_quadratic, quadratic_loss
from tests.truth import deep_linear_case, reduced_rank_case

X = torch.zeros(1, dtype=torch.float64)
SMALL = {"nbetas": (10.0, 100.0, 1000.0), "localizations": (1.0, 10.0, 100.0)}


def potential(curvature: torch.Tensor) -> ModulePotential:
    return ModulePotential(Quadratic(curvature), quadratic_loss, (X,), Component("model", {"w": None}, len(curvature)))


def test_sharpness_is_the_largest_curvature() -> None:
    curvature = torch.tensor([0.1, 2.0, 7.0, 0.5], dtype=torch.float64)
    assert sharpness(potential(curvature), torch.zeros(4).double(), 0) == pytest.approx(7.0, rel=1e-6)
    assert sharpness(potential(curvature), torch.ones(4).double(), 0) == pytest.approx(7.0, rel=1e-6)
    case = deep_linear_case((4, 5, 6, 5), 3)  # three layers, singular values 1: each adds one
    problem = ModulePotential(
        case.module, case.loss_fn, case.tensors, Component("m", dict.fromkeys(["layers.0", "layers.1", "layers.2"]), 1)
    )
    assert sharpness(problem, problem.anchor, 0) == pytest.approx(3.0, rel=0.02)


@pytest.mark.parametrize(("sampler", "stiffness"), [("sgld", 0.2), ("baoab", 1.0)])
def test_the_allowed_step_size_is_the_stiffness_over_the_curvature_of_u(sampler: str, stiffness: float) -> None:
    config = mg.LLCConfig(nbeta=30.0, localization=5.0, step_size=99.0, sampler=sampler)
    found = allowed_step_size(potential(torch.tensor([0.5, 4.0], dtype=torch.float64)), config, 0)
    assert found == pytest.approx(stiffness / (30 * 4 + 5), rel=1e-4)


def test_the_pilot_sees_walls_that_the_minimum_does_not() -> None:
    """w^4: no curvature at w*, plenty where the chain goes."""
    from tests.oracles import QuarticWell, quartic_loss

    well = ModulePotential(QuarticWell(), quartic_loss, (X,), Component("model", {"w": None}, 1))
    config = mg.LLCConfig(nbeta=1e4, localization=1.0, step_size=1.0)
    assert sharpness(well, well.anchor, 0) < 1e-3
    assert allowed_step_size(well, config, 0) < 0.02 * 0.2 / config.localization


@pytest.fixture(scope="module")
def linear() -> mg.Calibration:
    case = reduced_rank_case(6, 6, 6, 4)
    return mg.calibrate([(0, case.module)], case.tensors, loss_fn=case.loss_fn, seed=0, sampler="baoab", n_workers=1)


def test_on_reduced_rank_regression_it_recommends_what_finds_the_known_coefficient(linear: mg.Calibration) -> None:
    truth = reduced_rank_case(6, 6, 6, 4).lam
    assert linear.sound, linear.reasons
    (final,) = linear.final
    assert final.estimate.config == linear.recommended
    assert final.estimate.llc == pytest.approx(truth, rel=0.12)
    # The control: most of the grid is far from the truth, so picking a cell blindly would not do.
    wrong = [abs(trial.estimate.llc / truth - 1) > 0.25 for trial in linear.grid]
    assert np.mean(wrong) > 0.4


def test_the_nbeta_0_control_rises_as_the_prior_alone_does(linear: mg.Calibration) -> None:
    (control,), (final,) = linear.control, linear.final
    assert control.estimate.config.nbeta == 0.0
    assert final.rise / control.rise == pytest.approx(final.estimate.health.saturation, rel=0.5)
    assert any("control with nbeta 0" in reason for reason in linear.reasons)
    assert linear.acceptance is not None and 0 <= linear.acceptance <= 1


def test_saturated_cells_are_sensitive_ones(linear: mg.Calibration) -> None:
    saturated = {}
    for trial in linear.grid:
        cell = trial.estimate.config.nbeta, trial.estimate.config.localization
        if trial.estimate.health.saturation > 0.6 and np.isfinite(linear.sensitivity[cell]):
            saturated[cell] = linear.sensitivity[cell]
    assert len(saturated) > 3
    chosen = linear.sensitivity[linear.recommended.nbeta, linear.recommended.localization]
    assert min(saturated.values()) > 0.45 > 2 * chosen


def test_where_every_cell_saturates_it_says_so_and_is_not_sound() -> None:
    found = mg.calibrate(
        [(0, Quadratic(torch.full((10,), 1e-4)))], (torch.zeros(1),), loss_fn=quadratic_loss, seed=0,
        nbetas=(10.0, 30.0), localizations=(10.0, 100.0),
    )  # fmt: skip
    assert not found.sound
    assert "no plateau" in found.reasons[0]


def test_where_no_chain_settles_it_says_so_and_is_not_sound() -> None:
    """A slope without a minimum: every chain runs away downhill."""
    slope = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.ones(3))})
    found = mg.calibrate(
        [(0, slope)], (torch.zeros(1),), loss_fn=lambda m, x: 100 * m["w"].sum() + 0 * x, seed=0,
        nbetas=(10.0, 30.0), localizations=(10.0, 100.0),
    )  # fmt: skip
    assert not found.sound
    assert "no cell of the grid is usable" in found.reasons[0]
    assert "w* is no minimum of this data's loss" in found.reasons[2]


def test_gradient_noise_makes_it_take_a_smaller_step_than_it_takes_without() -> None:
    module, centres, loss = noisy_quadratic(n_params=20, n_examples=64, seed=0)
    clean, noisy = (
        mg.calibrate(
            [(0, module)], (centres,), loss_fn=loss, seed=0, sampler="baoab", batch_size=batch_size,
            nbetas=(300.0, 1000.0), localizations=(10.0, 100.0),
        )
        for batch_size in (None, 2)
    )  # fmt: skip
    relative = [found.recommended.step_size * found.recommended.nbeta for found in (clean, noisy)]
    assert relative[1] < 0.6 * relative[0]


@pytest.mark.long
def test_the_result_does_not_depend_on_the_number_of_workers() -> None:
    case = reduced_rank_case(3, 3, 2, 1)
    one, two = (
        mg.calibrate([(0, case.module)], case.tensors, loss_fn=case.loss_fn, seed=0, n_workers=n, **SMALL)
        for n in (1, 2)
    )
    assert one.recommended == two.recommended
    assert [trial.estimate.llc for trial in one.grid] == [trial.estimate.llc for trial in two.grid]


def test_nothing_to_calibrate_on_is_refused() -> None:
    for arguments in ({"models": []}, {"nbetas": ()}, {"components": ()}):
        models = arguments.pop("models", [(0, Quadratic(torch.ones(2)))])
        with pytest.raises(ConfigError, match="nothing to calibrate on"):
            mg.calibrate(models, (torch.zeros(1),), loss_fn=quadratic_loss, seed=0, **arguments)
    with pytest.raises(ConfigError, match="exceeds the 1 examples"):
        mg.calibrate([(0, Quadratic(torch.ones(2)))], (torch.zeros(1),), loss_fn=quadratic_loss, seed=0, batch_size=3)


@pytest.mark.long
def test_the_command_writes_a_figure_the_numbers_and_a_config_that_runs(tiny_run: tuple, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(tiny_run[0], run)
    process = mechgrok("calibrate", run, "--sampler", "baoab", "--batch-size", 0, "--checkpoints", 1)
    assert process.returncode in (0, 1), process.stderr
    record = json.loads((run / "calibration.json").read_text())
    assert process.returncode == (0 if record["sound"] else 1)
    for reason in record["reasons"]:
        assert reason in process.stdout
    calibrated = load_config(run / "calibrated.toml")
    assert calibrated.llc.sampling.model_dump() == record["recommended"]
    assert calibrated.llc.sampling.batch_size is None and calibrated.llc.sampling.sampler == "baoab"
    svg = (run / "calibration.svg").read_text()
    assert svg.count('<g id="axes_') == 3
    refused = mechgrok("calibrate", run, "--sampler", "gibbs")
    assert refused.returncode == 2 and "sampler" in refused.stderr
