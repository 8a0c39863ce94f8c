"""What an estimate says of its own error: the standard error, the pairing, the step size's bias, saturation."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import mechgrok as mg
from mechgrok.llc.bias import step_size_bias
from mechgrok.sampling.chains import sample
from mechgrok.sampling.diagnostics import summarize
from mechgrok.sampling.potential import ModulePotential
from mechgrok.sampling.verdict import health
from mechgrok.types import Component
from tests.oracles import Quadratic, noisy_quadratic, quadratic_loss, stationary_llc

CURVATURE = torch.tensor([0.0, 0.3, 1.0, 2.0, 5.0, 0.1, 1.5, 3.0], dtype=torch.float64)
X = torch.zeros(1, dtype=torch.float64)


def config(**changes) -> mg.LLCConfig:
    values = {"nbeta": 30.0, "step_size": 0.01, "localization": 5.0, "n_chains": 4, "n_draws": 400, "n_burnin": 100}
    return mg.LLCConfig(**(values | changes))


def estimate(**changes) -> mg.LLCEstimate:
    return mg.estimate_llc(Quadratic(CURVATURE), (X,), loss_fn=quadratic_loss, config=config(**changes), seed=0)


# ---- coverage: many runs, a known answer


@pytest.mark.long
@pytest.mark.parametrize(("sampler", "momentum"), [("sgld", 0.0), ("baoab", 0.0), ("baoab", 0.8), ("mala", 0.0)])
def test_the_interval_covers_the_exact_stationary_value_as_often_as_it_promises(sampler: str, momentum: float) -> None:
    """2000 runs of four chains, which `test_chains_draw_the_same_alone_or_among_others` lets run together."""
    n_runs = 2000
    settings = config(sampler=sampler, momentum=momentum, n_chains=4 * n_runs)
    potential = ModulePotential(Quadratic(CURVATURE), quadratic_loss, (X,), Component("model", {"w": None}, 8))
    losses = sample(potential, settings, 0, ("coverage",)).losses.numpy().reshape(n_runs, 4, -1)
    exact = stationary_llc(CURVATURE.numpy(), settings) / settings.nbeta
    runs = [summarize(run) for run in losses]
    covered = np.mean([abs(run.mean - exact) < 1.96 * run.std_error for run in runs])
    naive = np.mean([abs(run.mean() - exact) < 1.96 * run.std() / math.sqrt(run.size) for run in losses])
    assert 0.92 <= covered <= 0.98
    assert naive < 0.85  # the control: without autocorrelation the bars are too short


# ---- the pairing


def test_pairing_takes_the_irreducible_loss_out_of_the_error_and_leaves_the_mean() -> None:
    module, centres, loss = noisy_quadratic(n_params=20, n_examples=64, seed=0)
    settings = config(step_size=1e-2, batch_size=4, sampler="baoab", n_draws=1000)
    found = mg.estimate_llc(module, (centres,), loss_fn=loss, config=settings, seed=0)
    assert found.paired
    draws = sample(ModulePotential(module, loss, (centres,), Component("m", {"w": None}, 20)), settings, 0, ("x",))
    plain = summarize(draws.losses.numpy())
    assert found.std_error < 0.7 * settings.nbeta * plain.std_error
    error = settings.nbeta * math.hypot(plain.std_error, found.std_error / settings.nbeta)
    assert abs(found.llc - settings.nbeta * (plain.mean - found.init_loss)) < 3 * error


def test_where_batches_have_no_luck_nothing_is_paired() -> None:
    data = (torch.zeros(50, dtype=torch.float64),)
    found = mg.estimate_llc(Quadratic(CURVATURE), data, loss_fn=quadratic_loss, config=config(batch_size=5), seed=0)
    assert not found.paired


def test_losses_less_the_baseline_are_the_estimate_paired_or_not() -> None:
    module, centres, loss = noisy_quadratic(n_params=20, n_examples=64, seed=0)
    for batch_size in (None, 4):
        settings = config(step_size=1e-3, batch_size=batch_size)
        found = mg.estimate_llc(module, (centres,), loss_fn=loss, config=settings, seed=0)
        assert found.llc == pytest.approx(settings.nbeta * (found.losses.mean() - found.init_loss), rel=1e-12)


# ---- what the estimate must not depend on


@pytest.mark.parametrize("changes", [{"n_chains": 2}, {"n_chains": 16}, {"n_draws": 100}, {"n_draws": 3000}])
def test_the_estimate_moves_with_chains_and_draws_by_no_more_than_its_error(changes: dict) -> None:
    found = estimate(sampler="baoab", **changes)
    assert abs(found.llc - stationary_llc(CURVATURE.numpy(), config(sampler="baoab"))) < 3.5 * found.std_error


def test_the_order_of_chains_and_the_seed_of_others_do_not_matter() -> None:
    few, many = estimate(n_chains=4), estimate(n_chains=8)
    np.testing.assert_array_equal(few.losses, many.losses[:4])
    assert few.init_loss == many.init_loss
    shuffled = summarize(many.losses[[5, 0, 7, 2, 1, 6, 3, 4]])
    assert shuffled.mean == pytest.approx(summarize(many.losses).mean, rel=1e-13)
    assert shuffled.std_error == pytest.approx(summarize(many.losses).std_error, rel=1e-9)


# ---- the bias of the step size


@pytest.mark.parametrize("sampler", ["sgld", "baoab"])
def test_the_bias_is_what_the_two_exact_values_extrapolate_to(sampler: str) -> None:
    settings = config(sampler=sampler, n_chains=32, n_draws=3000, step_size=0.01)
    found = mg.estimate_llc(Quadratic(CURVATURE), (X,), loss_fn=quadratic_loss, config=settings, seed=0, bias=True)
    curvature = CURVATURE.numpy()
    exact = 2 * (stationary_llc(curvature, settings) - stationary_llc(curvature, settings.halved()))
    assert abs(found.bias - exact) < 3 * found.bias_error
    assert found.bias_error < 0.05 * found.llc
    if sampler == "sgld":  # and that is most of the true bias, 1.9 of 4.1 (1 / (1 - x) is no straight line)
        true = stationary_llc(curvature, settings) - stationary_llc(curvature, config(sampler="mala"))
        assert found.bias == pytest.approx(true, rel=0.2)
        assert found.bias > 5 * found.bias_error


def test_the_bias_is_reported_apart() -> None:
    plain, with_bias = estimate(), None
    with_bias = mg.estimate_llc(Quadratic(CURVATURE), (X,), loss_fn=quadratic_loss, config=config(), seed=0, bias=True)
    assert (plain.bias, plain.bias_error) == (None, None)
    assert (with_bias.llc, with_bias.std_error) == (plain.llc, plain.std_error)


def test_extrapolation_is_exact_on_a_straight_line() -> None:
    coarse, fine = (dataclasses.replace(estimate(), llc=llc, std_error=se) for llc, se in ((7.0, 0.3), (6.0, 0.4)))
    assert step_size_bias(coarse, fine) == (pytest.approx(2.0), pytest.approx(1.0))


# ---- saturation


@pytest.mark.parametrize(("nbeta", "localization"), [(30.0, 5.0), (1.0, 200.0)])
def test_saturation_is_the_share_of_the_priors_rise(nbeta: float, localization: float) -> None:
    found = estimate(nbeta=nbeta, localization=localization, step_size=0.002, sampler="baoab", n_chains=200)
    h = CURVATURE.numpy()
    exact = np.sum(h / (nbeta * h + localization)) / np.sum(h / localization)
    assert found.health.saturation == pytest.approx(exact, rel=0.1)
    assert bool(found.health.cautions) == found.health.saturated == (exact > 0.5) == (nbeta == 1.0)
    assert found.health.healthy == (exact < 0.95)


def test_a_saturated_estimate_is_proportional_to_nbeta_and_a_healthy_one_is_not() -> None:
    """What the flag claims: three times the nbeta, and the estimate."""
    for localization, flagged in ((2000.0, True), (1.0, False)):
        settings = {"localization": localization, "sampler": "baoab", "step_size": 4e-4, "n_draws": 3000}
        low, high = (estimate(nbeta=nbeta, **settings) for nbeta in (30.0, 90.0))
        assert low.health.saturated == flagged
        assert (high.llc / low.llc > 2.4) == flagged


def test_without_localization_nothing_can_saturate() -> None:
    assert estimate(localization=0.0).health.saturation == 0.0
    flat = mg.estimate_llc(
        Quadratic(torch.zeros(3)), (torch.zeros(1),), loss_fn=quadratic_loss, config=config(), seed=0
    )
    assert math.isnan(flat.health.saturation) and not flat.health.saturated and flat.health.healthy


def test_health_against_full_arviz_numbers() -> None:
    """R-hat and ESS are the library's; the verdict is on them."""
    from arviz_stats.base import array_stats

    found = estimate()
    assert found.health.ess == pytest.approx(
        float(array_stats.ess(found.losses, chain_axis=0, draw_axis=1, method="mean"))
    )
    assert found.health.r_hat == pytest.approx(
        float(array_stats.rhat(found.losses, chain_axis=0, draw_axis=1, method="rank"))
    )
    assert health(summarize(found.losses), config(), 0.0).r_hat == found.health.r_hat
