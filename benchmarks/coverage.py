"""How often the 95 % interval holds the exact stationary value of its sampler, over many independent runs."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from joblib import Parallel, delayed

import mechgrok as mg
from mechgrok import seeds
from mechgrok.reproducible import reproducible
from mechgrok.sampling.chains import sample
from mechgrok.sampling.diagnostics import summarize
from mechgrok.sampling.potential import LossFn, ModulePotential
from mechgrok.sampling.variance import variance_llc
from mechgrok.types import Component
from tests.oracles import (
    Quadratic,
    QuarticWell,
    noisy_quadratic,
    quadratic_loss,
    quartic_llc,
    quartic_loss,
    stationary_llc,
    stationary_variance_llc,
)
from tests.truth import Monomial, monomial_loss, normal_crossing_llc

N_RUNS, N_CHAINS = 400, 4
N_RUNS_WITH_BATCHES = 200
CURVATURE = torch.logspace(-1, 1, 30, dtype=torch.float64)
X = torch.zeros(1, dtype=torch.float64)
COLUMNS = ("sampler", "case", "runs", "effective draws", "covered", "without autocorrelation", "mean error / error bar")


def coverage_table() -> tuple[Sequence[str], list[list[str]]]:
    """(columns, rows), two cases at a time."""
    jobs = [
        *((_quadratic, sampler, momentum, draws) for draws in (150, 600) for sampler, momentum in _SAMPLERS),
        (_quartic, "mala", 0.0, 600),
        (_crossing, "mala", 0.0, 1500),
        (_with_batches, "sgld", 0.0, 300),
        (_with_batches, "baoab", 0.0, 300),
        *((_variance, "baoab", localization, 600) for localization in (0.1, 5.0, 50.0, 500.0)),
    ]
    return COLUMNS, Parallel(n_jobs=2)(delayed(job[0])(*job[1:]) for job in jobs)


_SAMPLERS = (("sgld", 0.0), ("rmsprop_sgld", 0.0), ("sgnht", 0.5), ("baoab", 0.0), ("baoab", 0.9), ("mala", 0.0))


def _settings(sampler: str, momentum: float, n_draws: int, **changes: object) -> mg.LLCConfig:
    values = {
        "nbeta": 30.0, "localization": 5.0, "step_size": 0.003, "n_chains": N_CHAINS * N_RUNS,
        "n_draws": n_draws, "n_burnin": 600, "sampler": sampler, "momentum": momentum,
    }  # fmt: skip
    return mg.LLCConfig(**(values | changes))


def _quadratic(sampler: str, momentum: float, n_draws: int) -> list[str]:
    config = _settings(sampler, momentum, n_draws, step_size=0.001 if sampler == "rmsprop_sgld" else 0.003)
    if sampler == "rmsprop_sgld":
        exact = _rmsprop_reference(config)
    else:  # sgnht's friction rests at what exact gradients need, so its law is baoab's
        known = config.model_copy(update={"sampler": "baoab"}) if sampler == "sgnht" else config
        exact = stationary_llc(CURVATURE.numpy(), known)
    return _row(
        f"{sampler}, momentum {momentum:g}",
        "regular, 30 parameters",
        Quadratic(CURVATURE),
        quadratic_loss,
        config,
        exact,
    )


def _variance(sampler: str, localization: float, n_draws: int) -> list[str]:
    """llc_variance, whose exact value is 1/2 sum r^2, and beside it its ratio to the exact llc."""
    settings = {"localization": localization, "step_size": min(0.003, 1 / (300 + localization)), "n_burnin": 1500}
    config = _settings(sampler, 0.0, n_draws, **settings)
    exact = stationary_variance_llc(CURVATURE.numpy(), config)
    component = Component("model", {"w": None}, len(CURVATURE))
    potential = ModulePotential(Quadratic(CURVATURE), quadratic_loss, (X,), component)
    with reproducible(1):
        losses = sample(potential, config, 0, ("coverage", "variance")).losses.numpy()
    runs = losses.reshape(N_RUNS, N_CHAINS, -1)
    found = np.array([variance_llc(run, np.zeros_like(run), config.nbeta) for run in runs])
    naive = [config.nbeta**2 * ((run - run.mean()) ** 2).std() / math.sqrt(run.size) for run in runs]
    ess = np.mean([summarize(run).ess for run in runs])
    share = exact / stationary_llc(CURVATURE.numpy(), config)
    case = f"llc_variance, localization {localization:g}: {share:.3f} of llc"
    return _verdict(f"{sampler}, momentum 0", case, found[:, 0], found[:, 1], exact, float(ess), np.array(naive))


def _quartic(sampler: str, momentum: float, n_draws: int) -> list[str]:
    config = _settings(sampler, momentum, n_draws, nbeta=50.0, localization=1.0, step_size=0.05)
    return _row(sampler, "w^4 (singular)", QuarticWell(), quartic_loss, config, quartic_llc(config))


def _crossing(sampler: str, momentum: float, n_draws: int) -> list[str]:
    config = _settings(sampler, momentum, n_draws, nbeta=100.0, localization=4.0, step_size=0.02)
    exact = normal_crossing_llc((2, 2), config.nbeta, config.localization)
    module = Monomial((2, 2), (0.0, 0.0)).double()
    return _row(sampler, "w1^2 w2^2 (singular)", module, monomial_loss, config, exact)


def _row(
    name: str, case: str, module: torch.nn.Module, loss_fn: LossFn, config: mg.LLCConfig, exact: float
) -> list[str]:
    """All runs at once: a chain draws the same alone or among others, so groups of four are independent runs."""
    component = Component("model", dict.fromkeys(dict(module.named_parameters())), 1)
    with reproducible(1):
        losses = sample(ModulePotential(module, loss_fn, (X,), component), config, 0, ("coverage", name)).losses.numpy()
    runs = [summarize(run) for run in losses.reshape(N_RUNS, N_CHAINS, -1)]
    spread = losses.reshape(N_RUNS, -1).std(axis=1)
    means = np.array([run.mean for run in runs])
    errors = np.array([run.std_error for run in runs])
    ess = float(np.mean([run.ess for run in runs]))
    return _verdict(name, case, config.nbeta * means, config.nbeta * errors, exact, ess,
                    config.nbeta * spread / math.sqrt(N_CHAINS * config.n_draws))  # fmt: skip


def _with_batches(sampler: str, momentum: float, n_draws: int) -> list[str]:
    """Through `estimate_llc`, with gradient noise, which the exact value holds too, irreducible loss and pairing."""
    module, centres, loss = noisy_quadratic(n_params=20, n_examples=64, seed=0)
    config = _settings(sampler, momentum, n_draws, n_chains=N_CHAINS, batch_size=4, n_burnin=300, step_size=0.01)
    h = module.get_buffer("curvature").numpy()
    a = config.nbeta * h + config.localization
    e = config.step_size
    noise = config.nbeta**2 * 0.3**2 / 4 * np.ones_like(h)  # variance of the force: h^2 (.3 / h)^2 / batch
    if sampler == "sgld":
        variance = (e + e**2 / 4 * noise) / (1 - (1 - e * a / 2) ** 2)
    else:
        variance = _limit_method_variance(a, e, noise)
    exact = float(0.5 * config.nbeta * np.sum(h * variance))
    with reproducible(1):
        found = [
            mg.estimate_llc(module, (centres,), loss_fn=loss, config=config, seed=seeds.derive(0, "run", run))
            for run in range(N_RUNS_WITH_BATCHES)
        ]
    llc, error = np.array([one.llc for one in found]), np.array([one.std_error for one in found])
    naive = np.array([config.nbeta * one.losses.std() / math.sqrt(one.losses.size) for one in found])
    return _verdict(
        f"{sampler}, batches of 4",
        "regular, irreducible loss",
        llc,
        error,
        exact,
        np.mean([one.health.ess for one in found]),
        naive,
    )


def _limit_method_variance(a: np.ndarray, step_size: float, noise: np.ndarray) -> np.ndarray:
    """Stationary variance of theta' = theta - e/2 (a theta + s eta) + sqrt(e)/2 (xi + xi'), baoab without momentum.

    With c = 1 - e a / 2 and Cov(theta, xi) = sqrt(e) / 2: var (1 - c^2) = e^2 s^2 / 4 + e / 2 + 2 c e / 4.
    """
    c = 1 - step_size * a / 2
    return (step_size**2 / 4 * noise + step_size / 2 * (1 + c)) / (1 - c**2)


def _rmsprop_reference(config: mg.LLCConfig) -> float:
    """By simulation: it has no closed form. Coordinates are independent, so each is 4,000 chains in NumPy."""
    rng = np.random.default_rng(0)
    h = CURVATURE.numpy()
    w, v, total, n_steps = np.zeros((4000, len(h))), np.zeros((4000, len(h))), 0.0, 1500
    for step in range(2 * n_steps):
        grad = h * w
        v = config.rmsprop_decay * v + (1 - config.rmsprop_decay) * grad**2
        g = 1 / (config.rmsprop_stability + np.sqrt(v))
        if step >= n_steps:
            total += np.sum(0.5 * h * (w**2).mean(0)) / n_steps
        force = config.nbeta * grad + config.localization * w
        w = w - config.step_size / 2 * g * force + np.sqrt(config.step_size * g) * rng.normal(size=w.shape)
    return config.nbeta * total


def _verdict(
    name: str, case: str, llc: np.ndarray, error: np.ndarray, exact: float, ess: float, naive: np.ndarray
) -> list[str]:
    covered = np.mean(np.abs(llc - exact) < 1.96 * error)
    short = np.mean(np.abs(llc - exact) < 1.96 * naive)
    return [
        name,
        case,
        f"{len(llc)}",
        f"{ess:.0f}",
        f"{covered:.1%}",
        f"{short:.1%}",
        f"{llc.std() / error.mean():.2f}",
    ]
