"""The sampler against functions with known answers; it never sees a model here but a quadratic."""

import math

import numpy as np
import pytest
import torch

from mechgrok import LLCConfig, estimate_llc
from mechgrok.sampling.chains import sample
from mechgrok.sampling.diagnostics import summarize
from mechgrok.sampling.potential import ModulePotential
from mechgrok.sampling.verdict import health
from mechgrok.types import Component
from tests.oracles import Quadratic, quadratic_loss, stationary_llc

CURVATURE = torch.tensor([0.0, 0.3, 1.0, 2.0, 5.0, 0.1, 1.5, 3.0], dtype=torch.float64)
X = torch.zeros(4, dtype=torch.float64)


def config(**changes) -> LLCConfig:
    values = {"nbeta": 30.0, "step_size": 0.01, "localization": 5.0, "n_chains": 64, "n_draws": 600, "n_burnin": 200}
    return LLCConfig(**(values | changes))


@pytest.mark.parametrize("step_size", [0.004, 0.02])
@pytest.mark.parametrize("masked", [False, True])
def test_sgld_reaches_its_exact_stationary_value_on_a_quadratic(step_size: float, masked: bool) -> None:
    mask = (
        torch.tensor([True, True, False, True, False, True, True, False]) if masked else torch.ones(8, dtype=torch.bool)
    )
    settings = config(step_size=step_size, n_draws=3000)
    estimate = estimate_llc(
        Quadratic(CURVATURE), (X,), loss_fn=quadratic_loss, config=settings, component={"w": mask}, seed=1
    )
    exact = stationary_llc(CURVATURE[mask].numpy(), settings)
    assert estimate.n_params == int(mask.sum())
    assert estimate.std_error < 0.02 * exact
    assert abs(estimate.llc - exact) < 3 * estimate.std_error
    assert estimate.health.healthy, estimate.health.reasons


def test_the_mask_and_the_step_size_matter_to_the_exact_value() -> None:
    """The controls of the test above: wrong answers would be far outside its tolerance."""
    exact = stationary_llc(CURVATURE.numpy(), config(step_size=0.02))
    assert abs(stationary_llc(CURVATURE[:4].numpy(), config(step_size=0.02)) / exact - 1) > 0.2
    assert abs(stationary_llc(CURVATURE.numpy(), config(step_size=1e-9)) / exact - 1) > 0.1


def test_a_flat_loss_has_llc_zero_with_no_error() -> None:
    estimate = estimate_llc(
        Quadratic(torch.zeros(3)), (X,), loss_fn=quadratic_loss, config=config(n_chains=4, n_draws=50), seed=0
    )
    assert (estimate.llc, estimate.std_error) == (0.0, 0.0)
    assert estimate.health.healthy


def test_with_no_gradient_the_weights_are_the_localizing_gaussian() -> None:
    """nbeta = 0: pure diffusion, stationary variance 1 / (gamma (1 - eps gamma / 4))."""
    settings = config(nbeta=0.0, n_chains=2000, n_draws=8, n_burnin=400, localization=20.0)
    potential = ModulePotential(Quadratic(CURVATURE), quadratic_loss, (X,), Component("model", {"w": None}, 8))
    theta = sample(potential, settings, 0, ("flat",)).theta
    exact = 1 / (20.0 * (1 - 0.01 * 20.0 / 4))
    relative_error = math.sqrt(2 / theta.numel())
    assert abs(float(theta.var()) / exact - 1) < 4 * relative_error


@pytest.mark.parametrize(
    ("sampler", "momentum"), [("sgld", 0.0), ("rmsprop_sgld", 0.0), ("sgnht", 0.5), ("baoab", 0.5), ("mala", 0.0)]
)
def test_chains_draw_the_same_alone_or_among_others(sampler: str, momentum: float) -> None:
    potential = ModulePotential(
        Quadratic(CURVATURE), quadratic_loss, (torch.arange(9, dtype=torch.float64),), Component("m", {"w": None}, 8)
    )
    shape = {"n_draws": 20, "batch_size": None if sampler == "mala" else 3, "sampler": sampler, "momentum": momentum}
    few = sample(potential, config(n_chains=2, **shape), 5, ("a",))
    many = sample(potential, config(n_chains=6, **shape), 5, ("a",))
    torch.testing.assert_close(many.losses[:2], few.losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(many.theta[:2], few.theta, rtol=1e-12, atol=0)
    other = sample(potential, config(n_chains=2, **shape), 5, ("b",))
    assert not torch.isclose(other.losses[:, 1:], few.losses[:, 1:]).all(1).any()


def test_masked_sampling_equals_an_independent_slow_sampler() -> None:
    """A loop over full-size weights with `where`, one chain after the other, and the same noise."""
    from mechgrok import seeds

    mask = torch.tensor([True, False, True, True, False, False, True, False])
    settings = config(n_chains=3, n_draws=30, n_burnin=5)
    potential = ModulePotential(Quadratic(CURVATURE), quadratic_loss, (X,), Component("m", {"w": mask}, 4))
    draws = sample(potential, settings, 7, ("slow",))
    losses, theta = draws.losses, draws.theta
    for chain in range(3):
        rng = seeds.stream(7, "slow", "model", "noise", chain)
        w = torch.zeros(8, dtype=torch.float64)
        for step in range(35):
            if step >= 5:
                assert float(losses[chain, step - 5]) == pytest.approx(float(0.5 * (CURVATURE * w**2).sum()), rel=1e-12)
            noise = torch.zeros(8, dtype=torch.float64)
            noise[mask] = torch.randn(4, generator=rng, dtype=torch.float64)
            drift = settings.nbeta * CURVATURE * w + settings.localization * w
            w = torch.where(mask, w - 0.5 * settings.step_size * drift + settings.step_size**0.5 * noise, w)
        assert torch.equal(w[~mask], torch.zeros(4, dtype=torch.float64))
        torch.testing.assert_close(theta[chain], w[mask])


class Cliff(torch.nn.Module):
    """L = w^2 / 2, infinite beyond |w| > 2: some chains fall, others do not."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))


def cliff_loss(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.where(module.w.abs() > 2.0, torch.inf, 0.5 * module.w**2) + 0.0 * x


def test_a_diverged_chain_neither_poisons_the_others_nor_vanishes() -> None:
    settings = config(nbeta=1.0, localization=0.0, n_chains=40, n_draws=100, n_burnin=0, step_size=0.02)
    estimate = estimate_llc(Cliff(), (X,), loss_fn=cliff_loss, config=settings, seed=0)
    fallen = ~np.isfinite(estimate.losses).all(axis=1)
    assert 0 < fallen.sum() < 40
    assert estimate.health.diverged == pytest.approx(fallen.mean())
    assert not estimate.health.healthy
    assert "diverged" in estimate.health.reasons[0]
    assert estimate.llc == pytest.approx(estimate.losses[~fallen].mean())
    first_nan = np.isnan(estimate.losses[fallen]).argmax(axis=1)
    for row, at in zip(estimate.losses[fallen], first_nan, strict=True):
        assert np.isnan(row[at:]).all()


def test_when_all_chains_diverge_the_estimate_is_nan_and_unhealthy() -> None:
    estimate = estimate_llc(
        Quadratic(CURVATURE), (X,), loss_fn=quadratic_loss, config=config(step_size=100.0, n_chains=2), seed=0
    )
    assert math.isnan(estimate.llc) and math.isnan(estimate.std_error)
    assert estimate.health.diverged == 1.0 and not estimate.health.healthy


def autoregressive(rho: float, n_chains: int, n_draws: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n_chains, n_draws)) * np.sqrt(1 - rho**2)
    x[:, 0] /= np.sqrt(1 - rho**2)
    for t in range(1, n_draws):
        x[:, t] += rho * x[:, t - 1]
    return x


def test_standard_error_covers_the_mean_of_correlated_chains() -> None:
    """AR(1) of known mean 0: the 95 % interval covers it about 95 % of the time; the naive one does not."""
    covered, naive = [], []
    for seed in range(300):
        x = autoregressive(0.9, 4, 400, seed)
        summary = summarize(x)
        covered.append(abs(summary.mean) < 1.96 * summary.std_error)
        naive.append(abs(summary.mean) < 1.96 * x.std() / np.sqrt(x.size))
    assert 0.91 < np.mean(covered) < 0.985
    assert np.mean(naive) < 0.6


def test_effective_sample_size_of_an_ar1_chain_is_the_known_one() -> None:
    rho = 0.8
    got = np.mean([summarize(autoregressive(rho, 4, 2000, seed)).ess for seed in range(10)])
    assert got == pytest.approx(8000 * (1 - rho) / (1 + rho), rel=0.1)


def test_health_tells_each_trouble_and_a_good_chain_has_none() -> None:
    good = autoregressive(0.3, 4, 400, 0) + 10
    assert health(summarize(good), config(), 9.0).healthy
    apart = good + np.array([0, 0, 0, 5.0])[:, None]
    assert "R-hat" in health(summarize(apart), config(), 9.0).reasons[0]
    drifting = good + np.linspace(0, 4, 400)
    assert any("drifts" in reason for reason in health(summarize(drifting), config(), 9.0).reasons)
    slow = autoregressive(0.995, 4, 400, 1) + 10
    assert any("effective sample size" in reason for reason in health(summarize(slow), config(), 9.0).reasons)


@pytest.mark.parametrize(
    ("init_loss", "sampled", "escaped"),
    [
        (0.0, 1.0, False),  # learned ln 7 = 1.95, lost 1
        (0.0, 2.5, True),  # lost everything
        (1.93, 2.1, False),  # nothing was learned, so nothing can be lost
    ],
)
def test_escaped_means_that_all_that_was_learned_is_lost(init_loss: float, sampled: float, escaped: bool) -> None:
    losses = sampled + 0.01 * autoregressive(0.0, 4, 100, 0)
    got = health(summarize(losses), config(), init_loss, math.log(7))
    assert got.escaped == escaped
    assert any("left the basin" in reason for reason in got.reasons) == escaped
