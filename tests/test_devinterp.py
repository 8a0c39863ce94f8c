"""Against devinterp's own SGLD: another implementation, other noise, the same settings."""

import copy

import numpy as np
import pytest
import torch
from devinterp.optim import SGMCMC

import mechgrok as mg
from mechgrok import seeds
from mechgrok.model import model_losses
from mechgrok.sampling.diagnostics import summarize
from mechgrok.types import Component

CONFIG = mg.LLCConfig(nbeta=300.0, step_size=5e-4, localization=1000.0, n_chains=4, n_draws=400, n_burnin=50)


def devinterp_losses(model: torch.nn.Module, examples: mg.Examples, names: list[str]) -> np.ndarray:
    """Losses [chain, draw] of devinterp's optimizer, burn-in left out, one chain after the other."""
    losses = np.empty((CONFIG.n_chains, CONFIG.n_draws))
    for chain in range(CONFIG.n_chains):
        replica = copy.deepcopy(model)
        moving = [replica.get_parameter(name) for name in names]
        sampler = SGMCMC.sgld(moving, lr=CONFIG.step_size, nbeta=CONFIG.nbeta, localization=CONFIG.localization)
        noise = seeds.stream(99, chain)
        for step in range(CONFIG.n_burnin + CONFIG.n_draws):
            sampler.zero_grad()
            loss = model_losses(replica, *examples.tensors).mean()
            loss.backward()
            if step >= CONFIG.n_burnin:
                losses[chain, step - CONFIG.n_burnin] = loss.item()
            sampler.step(noise_generator=noise)
    return losses


@pytest.mark.parametrize("names", [None, ["blocks.0.mlp.W_in", "unembed.W_U"]], ids=["model", "two matrices"])
def test_llc_agrees_with_devinterps_sampler(names: list[str] | None, tiny_run: tuple) -> None:
    study = tiny_run[1]
    model, train = study.trajectory.model_at(40), study.split.train
    every = [name for name, _ in model.named_parameters()]
    chosen = names or every
    component = Component("chosen", dict.fromkeys(chosen), sum(model.get_parameter(n).numel() for n in chosen))
    ours = mg.estimate_llc(model, train, component=component, config=CONFIG, seed=0)
    theirs = summarize(devinterp_losses(model, train, chosen))
    llc, error = CONFIG.nbeta * (theirs.mean - ours.init_loss), CONFIG.nbeta * theirs.std_error
    assert max(error, ours.std_error) < 0.1 * abs(llc)  # tight enough to tell a wrong factor of two, or a wrong gamma
    assert abs(ours.llc - llc) < 3.5 * np.hypot(error, ours.std_error)
