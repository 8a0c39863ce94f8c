"""A wrapped module is sampled as the module that it holds."""

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch

import mechgrok as mg
from mechgrok.errors import ConfigError
from mechgrok.model import build_model
from mechgrok.tasks import make_split
from mechgrok.unwrap import unwrapped
from tests.oracles import Quadratic, quadratic_loss, tiny_config

SHORT = {"nbeta": 10.0, "step_size": 1e-3, "localization": 200.0, "n_chains": 2, "n_draws": 8, "n_burnin": 2}
CONFIG = mg.LLCConfig(**SHORT, batch_size=8)
SPLIT = make_split(tiny_config().task, 0)


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch warns of itself when its compiler is imported
        return torch.compile(model)


WRAPPERS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "compiled": compiled,
    "parallel": torch.nn.DataParallel,
    "both": lambda model: torch.nn.DataParallel(compiled(model)),
}


@pytest.mark.parametrize("how", WRAPPERS)
def test_a_wrapped_module_gives_the_estimate_of_the_module_inside(how: str) -> None:
    model = build_model(tiny_config().model, SPLIT, 0)
    wrapped = WRAPPERS[how](model)
    for component in ("model", "L0H1"):
        expected = mg.estimate_llc(model, SPLIT.train, component=component, config=CONFIG, seed=0)
        found = mg.estimate_llc(wrapped, SPLIT.train, component=component, config=CONFIG, seed=0)
        assert np.array_equal(found.losses, expected.losses) and found.n_params == expected.n_params
    both = [
        mg.llc_curve([(0, one)], SPLIT.train, components=["model", "heads"], config=CONFIG, seed=0)
        for one in (model, wrapped)
    ]
    assert both[0].components == both[1].components and np.array_equal(both[0].llc, both[1].llc)


@pytest.mark.parametrize("how", WRAPPERS)
def test_a_wrapped_module_with_its_own_loss_and_masks(how: str) -> None:
    module = Quadratic(torch.logspace(-1, 1, 6))
    data, half = (torch.zeros(16),), {"w": torch.arange(6) < 3}
    estimates = [
        mg.estimate_llc(one, data, component=half, loss_fn=quadratic_loss, config=CONFIG, seed=0)
        for one in (module, WRAPPERS[how](module))
    ]
    assert np.array_equal(estimates[0].losses, estimates[1].losses)
    assert estimates[1].n_params == 3


@pytest.mark.parametrize(("how", "attribute"), [("compiled", "_orig_mod"), ("parallel", "module")])
def test_hooks_of_a_wrapper_are_not_passed_over(how: str, attribute: str) -> None:
    wrapped = WRAPPERS[how](build_model(tiny_config().model, SPLIT, 0))
    wrapped.register_forward_hook(lambda module, inputs, logits: 0 * logits)
    for call in (
        lambda: mg.estimate_llc(wrapped, SPLIT.train, config=CONFIG, seed=0),
        lambda: mg.llc_curve([(0, wrapped)], SPLIT.train, components=["model"], config=CONFIG, seed=0),
    ):
        with pytest.raises(ConfigError, match=f"has hooks, .* put them on its .{attribute} and pass that"):
            call()


def test_what_wraps_nothing_is_left_as_it_is() -> None:
    inner = torch.nn.Linear(2, 2)
    holder = torch.nn.Sequential(inner)
    holder.module = inner  # a name alone makes no wrapper
    assert unwrapped(holder) is holder and unwrapped(inner) is inner
