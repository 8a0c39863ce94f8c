"""Against devinterp 2 behind the same call: another implementation, other noise, the same settings."""

import random

import numpy as np
import pytest
import torch

import mechgrok as mg
from mechgrok import seeds
from mechgrok.config import ModelConfig
from mechgrok.errors import ConfigError
from mechgrok.model import build_model, model_losses
from mechgrok.types import Split
from tests.oracles import Quadratic, quadratic_loss, stationary_llc

CONFIG = mg.LLCConfig(nbeta=300.0, step_size=5e-4, localization=1000.0, n_chains=4, n_draws=400, n_burnin=50)


def by(engine: str, config: mg.LLCConfig) -> mg.LLCConfig:
    return config.model_copy(update={"engine": engine})


def agree(ours: mg.LLCEstimate, theirs: mg.LLCEstimate, relative_error: float) -> None:
    error = np.hypot(ours.std_error, theirs.std_error)
    # Tight enough to tell a wrong factor of two, or a wrong gamma.
    assert error < relative_error * abs(theirs.llc), (ours.llc, theirs.llc, error)
    assert abs(ours.llc - theirs.llc) < 3.5 * error, (ours.llc, theirs.llc, error)
    assert theirs.init_loss == ours.init_loss
    assert theirs.losses.shape == ours.losses.shape


@pytest.mark.parametrize("batch_size", [None, 8])
def test_the_llc_of_a_hooked_transformer_agrees(batch_size: int | None, tiny_run: tuple) -> None:
    study = tiny_run[1]
    model, train = study.trajectory.model_at(40), study.split.train
    config = CONFIG.model_copy(update={"batch_size": batch_size, "n_draws": 400 if batch_size is None else 800})
    ours, theirs = (
        mg.estimate_llc(model, train, config=by(engine, config), seed=0) for engine in ("mechgrok", "devinterp")
    )
    agree(ours, theirs, 0.1 if batch_size is None else 0.15)
    assert not np.allclose(ours.losses, theirs.losses)


def test_rmsprop_agrees(tiny_run: tuple) -> None:
    study = tiny_run[1]
    model, train = study.trajectory.model_at(40), study.split.train
    config = CONFIG.model_copy(update={"sampler": "rmsprop_sgld", "step_size": 5e-5})
    ours, theirs = (
        mg.estimate_llc(model, train, config=by(engine, config), seed=0) for engine in ("mechgrok", "devinterp")
    )
    agree(ours, theirs, 0.1)


@pytest.mark.long
def test_a_language_like_model_with_layernorm_agrees_in_full_and_per_head() -> None:
    """Two layers, attention only, every position scored; trained a little on repeated sequences."""
    tokens = torch.randint(1, 12, (64, 6), generator=seeds.stream(0, "tokens"))
    tokens = torch.cat([tokens, tokens], dim=1)
    targets = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1)
    weights = torch.ones(tokens.shape)
    weights[:, -1] = 0.0
    examples = mg.Examples(tokens, targets, weights)
    shape = ModelConfig(n_layers=2, d_model=16, n_heads=2, d_head=8, normalization_type="LN", init_std=0.2)
    model = build_model(shape, Split(examples, examples, tuple("abcdefghijkl"), 12), 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        model_losses(model, *examples.tensors).mean().backward()
        optimizer.step()
    config = mg.LLCConfig(
        nbeta=100.0, step_size=5e-4, localization=300.0, n_chains=4, n_draws=200, n_burnin=50, batch_size=16
    )
    for name in ("model", "L1H1"):
        ours, theirs = (
            mg.estimate_llc(model, examples, component=name, config=by(engine, config), seed=0)
            for engine in ("mechgrok", "devinterp")
        )
        agree(ours, theirs, 0.15)


def test_burn_in_is_left_out_and_localization_is_told() -> None:
    """On a quadratic with a known answer; both habits would move it far beyond the error."""
    curvature = torch.tensor([1.0, 3.0, 10.0] * 8)
    config = mg.LLCConfig(nbeta=30.0, step_size=3e-4, localization=60.0, n_chains=4, n_draws=1500, n_burnin=500)
    estimate = mg.estimate_llc(
        Quadratic(curvature), (torch.zeros(4),), loss_fn=quadratic_loss, config=by("devinterp", config), seed=0
    )
    exact = stationary_llc(curvature.numpy(), config)
    assert abs(estimate.llc - exact) < 3 * estimate.std_error < 0.1 * exact
    unlocalized = stationary_llc(curvature.numpy(), config.model_copy(update={"localization": 0.0}))
    assert unlocalized - exact > 5 * estimate.std_error


def test_the_callers_generators_are_left_alone() -> None:
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    config = by("devinterp", CONFIG.model_copy(update={"n_draws": 8, "n_burnin": 0, "n_chains": 2}))
    mg.estimate_llc(Quadratic(torch.ones(3)), (torch.zeros(4),), loss_fn=quadratic_loss, config=config, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_a_diverged_chain_of_devinterps_is_a_value_with_a_reason() -> None:
    config = by("devinterp", CONFIG.model_copy(update={"step_size": 100.0, "n_draws": 50, "n_chains": 2}))
    with pytest.warns(UserWarning, match="Chain failed"):
        estimate = mg.estimate_llc(
            Quadratic(torch.ones(3)), (torch.zeros(4),), loss_fn=quadratic_loss, config=config, seed=0
        )
    assert np.isnan(estimate.llc)
    assert "diverged" in estimate.health.reasons[0]


def test_what_devinterp_cannot_do_soundly_is_refused() -> None:
    for sampler, momentum in {"sgnht": 0.5, "baoab": 0.5, "mala": 0.0}.items():
        with pytest.raises(ConfigError, match=f"no sound {sampler}"):
            mg.LLCConfig(**(CONFIG.model_dump() | {"sampler": sampler, "momentum": momentum, "engine": "devinterp"}))
    module = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Dropout(0.5)).eval()
    with pytest.raises(ConfigError, match="train mode"):
        mg.estimate_llc(
            module,
            (torch.zeros(4, 1),),
            loss_fn=lambda m, x: m(x).square().sum(-1),
            config=by("devinterp", CONFIG),
            seed=0,
        )
