"""llc_variance against exact long-run values, its error bar, and what the slope at w* adds to it."""

import math

import numpy as np
import pytest
import torch

import mechgrok as mg
from mechgrok.model import build_model
from mechgrok.sampling.chains import sample
from mechgrok.sampling.diagnostics import summarize
from mechgrok.sampling.motion import Start, gradient_at_start
from mechgrok.sampling.potential import ModulePotential
from mechgrok.sampling.variance import variance_llc
from mechgrok.tasks import make_split
from mechgrok.types import Component
from tests.oracles import (
    Quadratic,
    Slope,
    noisy_quadratic,
    quadratic_loss,
    slope_loss,
    stationary_llc,
    stationary_variance_llc,
    tiny_config,
)

CURVATURE = torch.logspace(-1, 1, 20, dtype=torch.float64)
X = torch.zeros(1, dtype=torch.float64)


def config(**changes) -> mg.LLCConfig:
    values = {"nbeta": 30.0, "step_size": 0.005, "localization": 5.0, "n_chains": 4, "n_draws": 400, "n_burnin": 200}
    return mg.LLCConfig(**(values | changes))


@pytest.mark.parametrize("localization", [0.5, 5.0, 50.0, 500.0])
@pytest.mark.parametrize("sampler", ["sgld", "baoab"])
def test_mean_and_variance_are_their_closed_forms_and_so_is_the_ratio(localization: float, sampler: str) -> None:
    """1/2 sum r and 1/2 sum r^2, with the bias of sgld's step, which enters the variance twice, where it has one."""
    step_size = 0.2 / (300 + localization)
    settings = config(
        localization=localization, sampler=sampler, step_size=step_size, n_chains=100, n_draws=2000,
        n_burnin=math.ceil(10 / (step_size * (3 + localization))),
    )  # fmt: skip
    found = mg.estimate_llc(Quadratic(CURVATURE), (X,), loss_fn=quadratic_loss, config=settings, seed=0)
    exact = stationary_variance_llc(CURVATURE.numpy(), settings)
    assert found.llc_variance_error < 0.05 * exact
    assert abs(found.llc_variance - exact) < 3 * found.llc_variance_error
    ratio = exact / stationary_llc(CURVATURE.numpy(), settings)
    assert found.health.variance_ratio == pytest.approx(ratio, rel=0.05)
    assert found.health.saturated == (ratio < 0.5) == (localization == 500.0)
    r = 30 * CURVATURE.numpy() / (30 * CURVATURE.numpy() + localization)
    if sampler == "baoab":
        assert exact == pytest.approx(0.5 * (r**2).sum())
    else:
        assert exact > 0.5 * (r**2).sum()


def test_the_ratio_is_how_the_estimate_moves_with_nbeta_and_with_the_localization() -> None:
    """What `ChainHealth` says of it: 1 - d log llc / d log nbeta, and 1 + d log llc / d log localization."""

    def slope(key: str) -> float:
        value = getattr(config(sampler="baoab"), key)
        ends = [config(sampler="baoab", **{key: value * factor}) for factor in (1 / 1.01, 1.01)]
        low, high = (math.log(stationary_llc(CURVATURE.numpy(), end)) for end in ends)
        return (high - low) / (2 * math.log(1.01))

    of = (CURVATURE.numpy(), config(sampler="baoab"))
    ratio = stationary_variance_llc(*of) / stationary_llc(*of)
    assert 1 - slope("nbeta") == pytest.approx(ratio, abs=1e-4)
    assert 1 + slope("localization") == pytest.approx(ratio, abs=1e-4)


@pytest.mark.parametrize("localization", [5.0, 50.0, 500.0])
def test_the_interval_covers_the_exact_value_as_often_as_it_promises(localization: float) -> None:
    """600 runs of four chains; chains draw the same alone or among others."""
    n_runs = 600
    settings = config(localization=localization, step_size=0.3 / (300 + localization), n_chains=4 * n_runs)
    settings = settings.model_copy(update={"n_burnin": math.ceil(6 / (settings.step_size * (3 + localization)))})
    potential = ModulePotential(Quadratic(CURVATURE), quadratic_loss, (X,), Component("model", {"w": None}, 20))
    losses = sample(potential, settings, 0, ("variance",)).losses.numpy().reshape(n_runs, 4, -1)
    exact = stationary_variance_llc(CURVATURE.numpy(), settings)
    found = np.array([variance_llc(run, np.zeros_like(run), settings.nbeta) for run in losses])
    assert 0.91 <= np.mean(np.abs(found[:, 0] - exact) < 1.96 * found[:, 1]) <= 0.98
    assert abs(found[:, 0].mean() - exact) < 3 * found[:, 0].std() / math.sqrt(n_runs)  # no bias of the few draws
    naive = [settings.nbeta**2 * ((run - run.mean()) ** 2).std() / math.sqrt(run.size) for run in losses]
    assert np.mean(np.abs(found[:, 0] - exact) < 1.96 * np.array(naive)) < 0.85  # the control: no autocorrelation


def stationary_covariance(module: Quadratic, centres: torch.Tensor, settings: mg.LLCConfig) -> np.ndarray:
    """Of w under sgld with batches: S = (1 - e A / 2) S (1 - e A / 2) + e + e^2 / 4 nbeta^2 Cov(grad) / batch."""
    h, e = module.curvature.numpy(), settings.step_size
    c = 1 - e * (settings.nbeta * h + settings.localization) / 2
    force = settings.nbeta**2 * np.cov((module.curvature * centres).numpy().T, bias=True) / settings.batch_size
    return (e * np.eye(len(h)) + e**2 / 4 * force) / (1 - np.outer(c, c))


@pytest.mark.parametrize("paired", [0, 1])
def test_the_noise_of_batches_is_taken_off_plain_and_paired(paired: int) -> None:
    """Exact: nbeta^2 / 2 tr(H S H S) with the heat of the batches in S; the noise alone would add far more."""
    n_runs = 300
    module, centres, loss = noisy_quadratic(n_params=20, n_examples=64, seed=0)
    settings = config(batch_size=4, n_chains=4 * n_runs)
    potential = ModulePotential(module, loss, (centres,), Component("model", {"w": None}, 20))
    start = Start(loss(module, centres).detach(), gradient_at_start(potential))
    draws = sample(potential, settings, 0, ("noisy",), start=start)
    losses = draws.losses - paired * (start.losses[draws.index].mean(-1) - start.losses.mean())
    runs = zip(*(part.numpy().reshape(n_runs, 4, -1) for part in (losses, draws.noise[paired])), strict=True)
    found = np.array([variance_llc(run, noise, settings.nbeta) for run, noise in runs])
    between = np.diag(module.curvature.numpy()) @ stationary_covariance(module, centres, settings)
    exact = settings.nbeta**2 / 2 * np.trace(between @ between)
    assert (
        abs(found[:, 0].mean() - exact)
        < 3.5 * found[:, 0].std() / math.sqrt(n_runs)
        < (0.05 if paired else 0.25) * exact
    )
    assert 0.91 <= np.mean(np.abs(found[:, 0] - exact) < 1.96 * found[:, 1]) <= 0.985
    assert settings.nbeta**2 * float(draws.noise[paired].mean()) > (20 if paired == 0 else 0.3) * exact


def test_it_is_not_clamped() -> None:
    """Where batches make nearly all of the variance, what is left is noise around little, and may be negative."""
    module, centres, loss = noisy_quadratic(n_params=20, n_examples=64, seed=0)
    settings = config(batch_size=2, nbeta=1.0, localization=5000.0, step_size=1e-4, n_draws=50, n_burnin=50)
    found = [mg.estimate_llc(module, (centres,), loss_fn=loss, config=settings, seed=seed) for seed in range(12)]
    negative = [one for one in found if one.llc_variance < 0]
    assert negative and all(math.isnan(one.health.variance_ratio) for one in negative)
    assert all(abs(one.llc_variance) < 4 * one.llc_variance_error for one in found)


def test_where_the_noise_is_not_known_nothing_is_said() -> None:
    module, centres, loss = noisy_quadratic(n_params=20, n_examples=64, seed=0)
    found = mg.estimate_llc(module, (centres,), loss_fn=loss, config=config(batch_size=1, n_draws=50), seed=0)
    assert math.isnan(found.llc_variance) and math.isnan(found.llc_variance_error) and math.isfinite(found.llc)
    assert all(map(math.isnan, variance_llc(np.full((2, 8), np.nan), np.zeros((2, 8)), 1.0)))
    assert variance_llc(np.ones((2, 8)), np.zeros((2, 8)), 3.0) == (0.0, 0.0)


# ---- what the slope at w* adds


@pytest.mark.parametrize("localization", [5.0, 300.0])
def test_the_slopes_part_of_both_estimates_is_what_a_quadratic_has(localization: float) -> None:
    gradient = torch.linspace(0.02, 0.2, 20, dtype=torch.float64)
    settings = config(
        localization=localization, sampler="baoab", step_size=0.5 / (300 + localization), n_chains=400, n_draws=1000
    )
    found = mg.estimate_llc(Slope(gradient, CURVATURE), (X,), loss_fn=slope_loss, config=settings, seed=0)
    h, g, nbeta = CURVATURE.numpy(), gradient.numpy(), settings.nbeta
    a = nbeta * h + localization
    descent = nbeta**2 * (g**2 / a).sum()
    assert found.health.descent == pytest.approx(descent, rel=0.05)
    r = nbeta * h / a
    llc = 0.5 * r.sum() - (nbeta**2 * g**2 / a * (1 - r / 2)).sum()
    assert abs(found.llc - llc) < 3.5 * found.std_error
    slope = nbeta**2 * localization**2 * (g**2 / a**3).sum()
    assert abs(found.llc_variance - 0.5 * (r**2).sum() - slope) < 3.5 * found.llc_variance_error
    at_most = nbeta**2 * localization * (g**2 / a**2).sum()
    assert found.health.gradient_variance_error < 0.3 * at_most
    assert abs(found.health.gradient_variance - at_most) < 3.5 * found.health.gradient_variance_error
    assert slope < at_most < min(descent, nbeta**2 * (g**2).sum() / localization)


def test_at_an_untrained_checkpoint_it_stands_where_the_mean_does_not() -> None:
    """A model before training: llc says how far the chains ran down, llc_variance and the slope's part are there."""
    settings = tiny_config()
    split = make_split(settings.task, 0)
    models = [(0, build_model(settings.model, split, 0))]
    sampling = mg.LLCConfig(
        nbeta=100.0,
        step_size=1e-3,
        localization=100.0,
        n_chains=16,
        n_draws=300,
        n_burnin=100,
        batch_size=16,
        sampler="baoab",
    )
    curve = mg.llc_curve(models, split.train, components=["model"], config=sampling, seed=0)
    assert curve.llc[0, 0] < -3 * curve.std_error[0, 0] and not curve.healthy[0, 0]
    assert curve.llc_variance[0, 0] > 3 * curve.llc_variance_error[0, 0]
    assert 0 < curve.gradient_variance[0, 0] < math.inf and math.isnan(curve.variance_ratio[0, 0])
    data = curve.to_dataset()
    assert data.llc_variance.dims == ("component", "checkpoint")
    assert float(data.llc_variance[0, 0]) == curve.llc_variance[0, 0]


def test_a_curve_from_outside_needs_none_of_it() -> None:
    curve = mg.LLCCurve(steps=[0, 1], components=("model",), llc=[[1.0, 2.0]], std_error=[[0.1, 0.1]])
    assert np.isnan(curve.llc_variance).all() and curve.llc_variance.shape == (1, 2)
    assert np.isnan(curve.variance_ratio).all()
    told = mg.LLCCurve(
        steps=[0, 1], components=("model",), llc=[[1.0, -2.0]], std_error=[[0.1, 0.1]], llc_variance=[[0.5, 0.5]]
    )
    np.testing.assert_array_equal(told.variance_ratio, [[0.5, np.nan]])


def test_the_mean_and_its_error_are_as_they_were() -> None:
    """Nothing of this changes a draw: with and without a start the losses are the same, to the bit."""
    module, centres, loss = noisy_quadratic(n_params=20, n_examples=64, seed=0)
    potential = ModulePotential(module, loss, (centres,), Component("model", {"w": None}, 20))
    start = Start(loss(module, centres).detach(), gradient_at_start(potential))
    settings = config(batch_size=4, n_draws=30)
    with_start, without = (sample(potential, settings, 0, ("a",), start=one) for one in (start, None))
    assert torch.equal(with_start.losses, without.losses)
    assert summarize(with_start.losses.numpy()) == summarize(without.losses.numpy())
