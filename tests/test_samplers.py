"""Each sampler against its formula, its exact stationary law, and what it must and must not do."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import solve_discrete_lyapunov

from mechgrok import LLCConfig, estimate_llc, seeds
from mechgrok.config import SamplerName
from mechgrok.errors import ConfigError
from mechgrok.sampling import kernels
from mechgrok.sampling.samplers import SAMPLERS, Slope, State
from tests.oracles import (
    Quadratic,
    QuarticWell,
    noisy_quadratic,
    quadratic_loss,
    quartic_llc,
    quartic_loss,
    stationary_llc,
)

CURVATURE = torch.tensor([0.0, 0.3, 1.0, 2.0, 5.0, 0.1, 1.5, 3.0], dtype=torch.float64)
X = torch.zeros(1, dtype=torch.float64)
ONE = torch.ones(1, 1, dtype=torch.float64)


def config(**changes) -> LLCConfig:
    values = {"nbeta": 30.0, "step_size": 0.01, "localization": 5.0, "n_chains": 32, "n_draws": 2000, "n_burnin": 200}
    return LLCConfig(**(values | changes))


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


# ---- the formulas, by hand


def test_sgld_is_its_formula() -> None:
    got = kernels.sgld(row(1.0, 2.0), row(5.0, -7.0), row(0.1, 0.2), step_size=0.04)
    torch.testing.assert_close(got, row(1 - 0.02 * 5 + 0.2 * 0.1, 2 + 0.02 * 7 + 0.2 * 0.2))


def test_rmsprop_sgld_is_its_formula() -> None:
    theta, moment = kernels.rmsprop_sgld(
        row(1.0), row(0.5), row(2.0), row(5.0), row(0.1), step_size=0.04, decay=0.9, stability=0.3
    )
    v = 0.9 * 0.5 + 0.1 * 4
    g = 1 / (0.3 + v**0.5)
    torch.testing.assert_close(moment, row(v))
    torch.testing.assert_close(theta, row(1 - 0.02 * g * 5 + (0.04 * g) ** 0.5 * 0.1))


def test_baoab_is_its_formula() -> None:
    theta, v = kernels.baoab(row(1.0), row(0.5), row(5.0), row(0.1), step_size=0.04, momentum=0.6)
    kicked = 0.5 - 0.2 * 5
    new = 0.6 * kicked + 0.8 * 0.1
    torch.testing.assert_close(v, row(new))
    torch.testing.assert_close(theta, row(1 + 0.1 * kicked + 0.1 * new))


def test_sgnht_is_its_formula() -> None:
    theta, v, x = kernels.sgnht(
        row(1.0, 1.0), row(0.5, 2.0), row(0.4), row(5.0, 0.0), row(0.1, -0.1), step_size=0.04, momentum=0.6
    )
    kicked = np.array([0.5 - 0.2 * 5, 2.0])
    half = 0.4 + 0.05 * ((kicked**2).mean() - 1)
    new = np.exp(-half) * kicked + np.sqrt(-math.log(0.6) * (1 - np.exp(-2 * half)) / half) * np.array([0.1, -0.1])
    np.testing.assert_allclose(v[0], new)
    np.testing.assert_allclose(x[0], [half + 0.05 * ((new**2).mean() - 1)])
    np.testing.assert_allclose(theta[0], 1 + 0.1 * kicked + 0.1 * new)


def test_sgnht_with_its_friction_at_rest_is_baoab() -> None:
    """A velocity of mean square 1 leaves the friction alone until the O step, which is then BAOAB's."""
    noise, force = torch.randn(1, 6, generator=seeds.stream(0, "n"), dtype=torch.float64), torch.zeros(1, 6).double()
    velocity = row(1.0, -1.0, 1.0, 1.0, -1.0, 1.0)
    at, friction = torch.zeros(1, 6).double(), row(-math.log(0.7))
    ours = kernels.sgnht(at, velocity, friction, force, noise, step_size=0.04, momentum=0.7)
    expected = kernels.baoab(at, velocity, force, noise, step_size=0.04, momentum=0.7)
    torch.testing.assert_close(ours[0], expected[0])
    torch.testing.assert_close(ours[1], expected[1])


def test_without_friction_the_thermostats_noise_is_the_limit_of_its_formula() -> None:
    args = (row(0.0), row(1.0))
    rest = (row(0.0), row(1.0))
    at_zero = kernels.sgnht(*args, row(0.0), *rest, step_size=0.04, momentum=0.6)
    near_zero = kernels.sgnht(*args, row(1e-5), *rest, step_size=0.04, momentum=0.6)
    torch.testing.assert_close(at_zero[1], near_zero[1], rtol=1e-4, atol=0)


def test_mala_log_acceptance_is_metropolis_hastings() -> None:
    """Against torch.distributions, and detailed balance: the two directions cancel."""
    old, new, force_old, force_new = (
        torch.randn(3, 4, generator=seeds.stream(i), dtype=torch.float64) for i in range(4)
    )
    u_old, u_new = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1.5, 0.5, 3.0]).double()
    eps = 0.3

    def log_q(to, at, force):
        return torch.distributions.Normal(at - eps / 2 * force, eps**0.5).log_prob(to).sum(1)

    expected = u_old - u_new + log_q(old, new, force_new) - log_q(new, old, force_old)
    got = kernels.mala_log_acceptance(old, new, u_old, u_new, force_old, force_new, eps)
    torch.testing.assert_close(got, expected)
    back = kernels.mala_log_acceptance(new, old, u_new, u_old, force_new, force_old, eps)
    torch.testing.assert_close(back, -got)


# ---- the stationary laws on a quadratic, exactly: a kernel is a linear map, Lyapunov's equation gives its variance


def stationary_variance(kernel: str, a: float, step_size: float, momentum: float = 0.0, noise: float = 0.0) -> float:
    """Variance of theta under U = a theta^2 / 2, with Gaussian noise of that standard deviation in the force."""

    def step(theta: float, v: float, xi: float, eta: float) -> np.ndarray:
        force = ONE * (a * theta + noise * eta)
        if kernel == "sgld":
            return np.array([float(kernels.sgld(ONE * theta, force, ONE * xi, step_size=step_size)), 0.0])
        out = kernels.baoab(ONE * theta, ONE * v, force, ONE * xi, step_size=step_size, momentum=momentum)
        return np.array([float(out[0]), float(out[1])])

    transition = np.stack([step(1, 0, 0, 0), step(0, 1, 0, 0)], axis=1)
    kicks = np.stack([step(0, 0, 1, 0), step(0, 0, 0, 1)], axis=1)
    return float(solve_discrete_lyapunov(transition, kicks @ kicks.T)[0, 0])


@pytest.mark.parametrize("a", [0.5, 3.0, 60.0])
@pytest.mark.parametrize("step_size", [1e-4, 1e-2, 6e-2])
def test_sgld_has_the_variance_that_its_file_states(a: float, step_size: float) -> None:
    assert stationary_variance("sgld", a, step_size) == pytest.approx(1 / (a * (1 - step_size * a / 4)), rel=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("step_size", [1e-4, 1e-2, 6e-2])
def test_baoab_has_no_bias_on_a_quadratic_at_any_stable_step(momentum: float, step_size: float) -> None:
    for a in (0.5, 3.0, 60.0):
        assert stationary_variance("baoab", a, step_size, momentum) == pytest.approx(1 / a, rel=1e-9)


@pytest.mark.parametrize(("kernel", "momentum"), [("sgld", 0.0), ("baoab", 0.0), ("baoab", 0.5), ("baoab", 0.9)])
def test_gradient_noise_heats_as_its_file_states(kernel: str, momentum: float) -> None:
    a, step_size, noise = 1.0, 1e-4, 30.0
    clean = stationary_variance(kernel, a, step_size, momentum)
    heated = stationary_variance(kernel, a, step_size, momentum, noise)
    factor = (1 + momentum) / (1 - momentum) if kernel == "baoab" else 1.0
    assert heated / clean - 1 == pytest.approx(factor * step_size * noise**2 / 4, rel=0.01)


# ---- the same through the estimator


@pytest.mark.parametrize(
    ("sampler", "momentum", "step_size"),
    [("sgld", 0.0, 0.02), ("baoab", 0.0, 0.02), ("baoab", 0.5, 0.02), ("baoab", 0.9, 0.01), ("mala", 0.0, 0.005)],
)
def test_the_estimate_is_the_exact_stationary_value(sampler: str, momentum: float, step_size: float) -> None:
    settings = config(sampler=sampler, momentum=momentum, step_size=step_size)
    estimate = estimate_llc(Quadratic(CURVATURE), (X,), loss_fn=quadratic_loss, config=settings, seed=3)
    exact = stationary_llc(CURVATURE.numpy(), settings)
    assert estimate.std_error < 0.02 * exact
    assert abs(estimate.llc - exact) < 3 * estimate.std_error
    assert estimate.health.healthy, estimate.health.reasons
    control = stationary_llc(CURVATURE.numpy(), config(sampler="sgld", step_size=0.02))
    if sampler != "sgld":  # the step size at which SGLD is off is one at which this one is not
        assert control - exact > 5 * estimate.std_error


def test_sgnht_takes_uniform_gradient_noise_out_and_baoab_does_not() -> None:
    module, centres, loss = noisy_quadratic(n_params=60, n_examples=64, seed=0)
    exact = stationary_llc(module.curvature.numpy(), config(sampler="mala"))
    found = {}
    for sampler in ("sgnht", "baoab"):
        settings = config(sampler=sampler, momentum=0.9, step_size=1e-3, batch_size=4, n_chains=16, n_burnin=500)
        found[sampler] = estimate_llc(module, (centres,), loss_fn=loss, config=settings, seed=0)
    assert abs(found["sgnht"].llc - exact) < 3 * found["sgnht"].std_error < 0.03 * exact
    assert found["baoab"].llc - exact > 10 * found["baoab"].std_error


def test_rmsprop_sgld_is_off_by_what_an_independent_simulation_says() -> None:
    """One coordinate, 20,000 chains in NumPy; and off from the target, which the kernel's file admits."""
    settings = config(sampler="rmsprop_sgld", nbeta=10.0, localization=0.1, step_size=1e-3)
    rng = np.random.default_rng(0)
    w, v, total = np.zeros(20_000), np.zeros(20_000), []
    for step in range(3000):
        grad = w
        v = 0.99 * v + 0.01 * grad**2
        g = 1 / (0.1 + np.sqrt(v))
        if step >= 1000:
            total.append(np.mean(w**2) / 2)
        w = w - 5e-4 * g * (10 * grad + 0.1 * w) + np.sqrt(1e-3 * g) * rng.normal(size=w.shape)
    reference = 64 * 10 * np.mean(total)
    estimate = estimate_llc(
        Quadratic(torch.ones(64, dtype=torch.float64)), (X,), loss_fn=quadratic_loss, config=settings, seed=0
    )
    assert abs(estimate.llc - reference) < 3 * estimate.std_error < 0.04 * reference
    target = stationary_llc(np.ones(64), config(sampler="mala", nbeta=10.0, localization=0.1))
    assert 1.18 < reference / target < 1.26


def test_mala_is_exact_where_no_quadratic_is_and_sgld_at_that_step_is_not() -> None:
    settings = config(sampler="mala", nbeta=50.0, localization=1.0, step_size=0.02, n_chains=64)
    exact = quartic_llc(settings)
    mala = estimate_llc(QuarticWell(), (X,), loss_fn=quartic_loss, config=settings, seed=0)
    sgld = estimate_llc(
        QuarticWell(), (X,), loss_fn=quartic_loss, config=settings.model_copy(update={"sampler": "sgld"}), seed=0
    )
    assert 0.5 < mala.health.acceptance < 0.99
    assert abs(mala.llc - exact) < 3 * mala.std_error < 0.06 * exact
    assert abs(sgld.llc - exact) > 4 * sgld.std_error


def test_mala_refuses_batches_and_says_when_it_stands_still() -> None:
    with pytest.raises(ConfigError, match="exact gradients"):
        config(sampler="mala", batch_size=4)
    stuck = estimate_llc(
        Quadratic(CURVATURE), (X,), loss_fn=quadratic_loss, config=config(sampler="mala", step_size=0.1), seed=0
    )
    assert stuck.health.acceptance < 0.2
    assert any("proposals accepted" in reason for reason in stuck.health.reasons)


def test_sgnht_refuses_no_momentum() -> None:
    with pytest.raises(ConfigError, match="momentum above 0"):
        config(sampler="sgnht", momentum=0.0)


STEPPERS = {
    "sgld": LLCConfig(sampler="sgld", nbeta=40, localization=7, step_size=3e-3),
    "baoab": LLCConfig(sampler="baoab", momentum=0.6, nbeta=40, localization=7, step_size=3e-3),
}


@pytest.mark.parametrize("name", STEPPERS)
@settings(deadline=None)  # the first step compiles
@given(shape=st.tuples(st.integers(1, 5), st.integers(1, 70)), seed=st.integers(0, 2**20))
def test_a_step_in_one_pass_is_that_of_the_kernels(name: SamplerName, shape: tuple[int, int], seed: int) -> None:
    """The same step by torch in float64 is the truth; one replica that has left the numbers takes no other along."""
    config, rng = STEPPERS[name], seeds.stream(seed, "steps")
    theta, velocity, grad, anchor, noise = torch.randn(5, *shape, generator=rng).unbind()
    lost = seed % shape[0]
    grad[lost] = torch.nan
    carried = (velocity,) if name == "baoab" else ()
    exact = SAMPLERS[name].step(
        State(theta.double(), tuple(part.double() for part in carried)),
        Slope(grad.double(), anchor.double()), noise.double(), config,
    )  # fmt: skip
    found = SAMPLERS[name].step(State(theta, carried), Slope(grad, anchor), noise, config)
    for ours, wanted in zip((found.theta, *found.carried), (exact.theta, *exact.carried), strict=True):
        assert ours.dtype == torch.float32 and bool(ours[lost].isnan().all())
        torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=2e-6, equal_nan=True)
