"""Losses at the draws, and the covariances made of them, against closed forms and devinterp's functions."""

import numpy as np
import pytest
import torch
import xarray as xr

import mechgrok as mg
from mechgrok.components import component
from mechgrok.errors import ConfigError, ShapeError
from mechgrok.llc.head_potential import HeadPotential
from mechgrok.llc.observe import Observation
from mechgrok.llc.problem import make_problem
from mechgrok.model import build_model, model_losses
from mechgrok.sampling.potential import ModulePotential
from mechgrok.tasks import make_split
from tests.oracles import noisy_quadratic, tiny_config

CONFIG = mg.LLCConfig(
    nbeta=30.0, step_size=0.01, localization=5.0, n_chains=16, n_draws=1500, n_burnin=100, sampler="baoab"
)


@pytest.fixture(scope="module")
def gaussian():
    """Draws of w ~ N(0, 1 / a), with six examples observed."""
    module, centres, loss = noisy_quadratic(n_params=5, n_examples=6, seed=1)
    found = mg.observe(module, (centres,), {"all": (centres,)}, config=CONFIG, seed=0, loss_fn=loss)
    return module, centres, loss, found


def test_influences_are_the_covariances_of_the_gaussian_posterior(gaussian) -> None:
    """Cov(l_i, l_j) = sum h^2 v^2 / 2 + h^2 c_i c_j v with v = 1 / (nbeta h + gamma)."""
    module, centres, _, found = gaussian
    h, c = module.curvature.numpy(), centres.numpy()
    v = 1 / (CONFIG.nbeta * h + CONFIG.localization)
    exact = -(np.sum(h**2 * v**2 / 2) + (c * h**2 * v) @ c.T)
    got = mg.influences(found, "all", "all")
    assert (np.abs(got.values - exact) < 4.5 * got.std_error).all()
    assert got.std_error.max() < 0.1 * np.abs(exact).max()
    assert (np.diag(exact) < 0).all() and (exact > 0).any()


def test_observing_does_not_change_the_chains(gaussian) -> None:
    module, centres, loss, found = gaussian
    alone = mg.estimate_llc(module, (centres,), config=CONFIG, seed=0, loss_fn=loss)
    assert np.array_equal(alone.losses, found.estimate.losses)
    np.testing.assert_allclose(found.of("all").mean(2), found.estimate.losses, rtol=1e-10)


def test_observing_a_transformer_that_torch_computes_does_not_change_its_chains() -> None:
    """Its products are made at the precision that is asked for, as an estimate's are."""
    config = tiny_config()
    split = make_split(config.task, 0)
    model = build_model(config.model.model_copy(update={"act_fn": "gelu"}), split, 0)
    sampling = config.llc.sampling
    found = mg.observe(model, split.train, {"test": split.test}, config=sampling, seed=0, component="L0H1")
    alone = mg.estimate_llc(model, split.train, component="L0H1", config=sampling, seed=0)
    assert np.array_equal(alone.losses, found.estimate.losses)


def test_the_same_problem_on_other_data_keeps_precision_and_memory() -> None:
    config = tiny_config()
    split = make_split(config.task, 0)
    model = build_model(config.model, split, 0)
    whole = make_problem(model, split.train, "L0H1", precision="float64", memory_gb=0.5)
    other = whole.on(split.test)
    assert other.potential.anchor.dtype == torch.float64 and other.settings == whole.settings
    assert other.settings == {
        "memory_gb": 0.5, "precision": "float64", "device": "cpu", "path": "auto", "loops": True,
    }  # fmt: skip


def as_devinterp(observation: Observation, names: list[str]) -> xr.DataTree:
    """The arrays that devinterp's functions read, with one token an example."""
    n_chains = len(observation.of(names[0]))
    data = {"init_loss": (("chain", "token_pos"), np.full((n_chains, 1), observation.init_losses[names[0]].mean()))}
    for name in names:
        losses = observation.of(name)[..., None]
        data[f"loss_{name}"] = (("chain", "draw", f"batch_{name}", "token_pos"), losses)
        data[f"input_ids_{name}"] = ((f"batch_{name}", "token"), np.zeros((losses.shape[2], 2), dtype=int))
    return xr.DataTree(xr.Dataset(data))


def test_influences_equal_devinterps(gaussian) -> None:
    from devinterp.slt.bif import compute_bif

    found = gaussian[3]
    theirs = compute_bif(as_devinterp(found, ["all"]), correlation_method="sequence", compute_covariance=True)
    np.testing.assert_allclose(mg.influences(found, "all", "all").values, -theirs.influences.values, rtol=1e-6)


@pytest.fixture(scope="module")
def observed_model(tiny_run):
    study = tiny_run[1]
    model, sets = study.trajectory.model_at(40), {"train": study.split.train, "test": study.split.test}
    config = study.config.llc.sampling
    return {
        name: mg.observe(model, study.split.train, sets, config=config, seed=0, component=name)
        for name in ("model", "L0H1")
    }


def test_susceptibilities_equal_devinterps(observed_model) -> None:
    from devinterp.slt.susceptibilities import compute_susceptibilities

    trees = {"full": "model", "L0H1": "L0H1"}
    theirs = compute_susceptibilities(
        {key: as_devinterp(observed_model[name], ["train", "test"]) for key, name in trees.items()}, "train"
    )
    ours = mg.susceptibilities(observed_model["model"], observed_model["L0H1"], data="train", on="test")
    np.testing.assert_allclose(ours.values, theirs["susceptibilities"].sus.values[:, 0], rtol=1e-6, atol=1e-12)


def test_susceptibilities_refuse_observations_of_other_examples(observed_model) -> None:
    full, head = observed_model["model"], observed_model["L0H1"]
    other = Observation(head.estimate, head.losses, {**head.init_losses, "test": head.init_losses["test"] + 1})
    with pytest.raises(ShapeError, match="same examples under 'test'"):
        mg.susceptibilities(full, other, data="train", on="test")
    with pytest.raises(ConfigError, match="nothing was observed under 'code'"):
        mg.influences(full, "code", "test")


def test_the_jackknife_is_the_textbooks_on_a_mean() -> None:
    """For a mean of chain means the jackknife is sd / sqrt(n)."""
    from mechgrok.llc.observe import _jackknife

    means = np.array([1.0, 2.0, 4.0, 9.0])
    got = _jackknife(lambda chains: means[chains].mean(keepdims=True), 4)
    assert float(got.std_error[0]) == pytest.approx(means.std(ddof=1) / 2)


@pytest.mark.parametrize("kind", ["head", "module"])
def test_losses_alone_equal_those_with_gradients(kind: str, tiny_run) -> None:
    study = tiny_run[1]
    model, train = study.trajectory.model_at(40), study.split.train
    head = component(model, "L0H1")
    if kind == "head":
        potential = HeadPotential(model, train, head)
    else:
        potential = ModulePotential(model, model_losses, train.tensors, head)
    theta = potential.anchor + 0.1 * torch.arange(2)[:, None]
    index = torch.arange(6).expand(2, -1)
    torch.testing.assert_close(potential.losses(theta, index), potential.losses_and_grad(theta, index)[0])


def test_refusals(gaussian) -> None:
    module, centres, loss, _ = gaussian
    with pytest.raises(ConfigError, match="nothing to observe"):
        mg.observe(module, (centres,), {}, config=CONFIG, seed=0, loss_fn=loss)
    with pytest.raises(ConfigError, match='as in {"test": examples}'):
        mg.observe(module, (centres,), [(centres,)], config=CONFIG, seed=0, loss_fn=loss)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="config must be an LLCConfig, got dict"):
        mg.observe(module, (centres,), {"a": (centres,)}, config={}, seed=0, loss_fn=loss)  # type: ignore[arg-type]
    config = mg.LLCConfig(**(CONFIG.model_dump() | {"sampler": "sgld", "engine": "devinterp"}))
    with pytest.raises(ConfigError, match="own engine"):
        mg.observe(module, (centres,), {"a": (centres,)}, config=config, seed=0, loss_fn=loss)
