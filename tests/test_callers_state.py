"""Wherever the estimator is called from, and whatever numbers the model is in, the estimate is the same."""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import mechgrok as mg
from mechgrok.llc.problem import make_problem
from mechgrok.loops import entry
from mechgrok.loops.entry import LoopError
from mechgrok.replicas.whole import NetworkPotential
from mechgrok.types import Examples
from tests.oracles import Quadratic, quadratic_loss, stationary_llc
from tests.test_replicas import CONFIG, build, examples


@contextmanager
def default_dtype(kind: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CALLERS: dict[str, Callable[[], AbstractContextManager]] = {
    "no_grad": torch.no_grad,
    "set_grad_enabled(False)": lambda: torch.set_grad_enabled(False),
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64 by default": lambda: default_dtype(torch.float64),
}
SHAPES = {
    "relu": {"d_mlp": 7},
    "gelu and rotary": {"d_mlp": 7, "act_fn": "gelu", "positional_embedding_type": "rotary"},
    "no norms, tokens that repeat": {"d_mlp": 7, "normalization_type": None},
}


@pytest.mark.parametrize("path", ["compiled", "torch", "module"])
@pytest.mark.parametrize("name", ["model", "L1", "L0H1"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("caller", CALLERS)
def test_the_estimate_has_the_same_bits_wherever_it_is_called_from(
    caller: str, shape: str, name: str, path: str
) -> None:
    model = build(**SHAPES[shape])
    one = examples(model)
    data = Examples(*(torch.cat([part] * 4) for part in one.tensors)) if shape != "relu" else one
    config = CONFIG.model_copy(update={"path": path, "n_draws": 10})
    expected = mg.estimate_llc(model, data, component=name, config=config, seed=0)
    with CALLERS[caller]():
        found = mg.estimate_llc(model, data, component=name, config=config, seed=0)
    assert np.array_equal(found.losses, expected.losses) and found.path == path
    assert found.init_loss == expected.init_loss


@pytest.mark.parametrize("caller", CALLERS)
def test_potentials_and_plain_modules_too(caller: str) -> None:
    model = build(d_mlp=7)
    config = mg.LLCConfig(nbeta=10.0, step_size=1e-2, localization=1.0, n_draws=20)
    for name in ("model", "L1", "L0H0"):
        potential = make_problem(model, examples(model), name).potential
        theta, index = potential.anchor.repeat(4, 1), torch.arange(8).expand(4, -1)
        losses, gradient = potential.losses_and_grad(theta, index)
        with CALLERS[caller]():
            again = potential.losses_and_grad(theta, index)
        assert torch.equal(again[0], losses) and torch.equal(again[1], gradient) and gradient.abs().sum() > 0
    net, x = Quadratic(torch.ones(3)), torch.zeros(8)
    expected = mg.estimate_llc(net, (x,), loss_fn=quadratic_loss, config=config, seed=0)
    with CALLERS[caller]():
        assert mg.estimate_llc(net, (x,), loss_fn=quadratic_loss, config=config, seed=0).llc == expected.llc


def test_a_model_that_was_made_in_inference_mode_is_sampled() -> None:
    with torch.inference_mode():
        model, data = build(d_mlp=7), examples(build(d_mlp=7))
    assert model.W_E.is_inference()
    usual = build(d_mlp=7)
    for path in ("torch", "module"):
        config = CONFIG.model_copy(update={"path": path})
        found = mg.estimate_llc(model, data, config=config, seed=0)
        assert np.array_equal(found.losses, mg.estimate_llc(usual, examples(usual), config=config, seed=0).losses)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("curvature", [1.0, 1e4])
def test_a_step_below_the_spacing_of_half_precision_does_not_vanish(kind: torch.dtype, curvature: float) -> None:
    """100 directions at w = 1, where bfloat16's spacing is 2^-7 and a step's noise sqrt(step_size) far below it."""
    net = Quadratic(torch.full((100,), curvature)).to(kind)
    net.w.data += 1.0

    def loss(module: Quadratic, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * (module.curvature * (module.w - 1) ** 2).sum() + 0.0 * x

    step_size = 0.2 / (100 * curvature + 1)
    config = mg.LLCConfig(nbeta=100.0, step_size=step_size, localization=1.0, n_draws=2000, n_burnin=500)
    estimate = mg.estimate_llc(net, (torch.zeros(4, dtype=kind),), loss_fn=loss, config=config, seed=0)
    expected = stationary_llc(np.full(100, float(net.curvature[0])), config)
    assert estimate.llc == pytest.approx(expected, abs=4 * estimate.std_error) and estimate.std_error < 1
    assert net.w.dtype == kind


@pytest.mark.parametrize("path", ["torch", "module"])
def test_a_transformer_in_half_precision_is_sampled_in_float32(path: str) -> None:
    config = CONFIG.model_copy(update={"path": path})
    stale, exact = build(d_mlp=7).half(), build(d_mlp=7)
    assert stale.cfg.dtype == torch.float32  # TransformerLens does not say so in `cfg`
    exact.load_state_dict({name: value.float() for name, value in stale.state_dict().items()})
    for model in (stale, build(d_mlp=7).to(torch.float16)):
        found = mg.estimate_llc(model, examples(model), config=config, seed=0)
        expected = mg.estimate_llc(exact, examples(exact), config=config, seed=0)
        assert np.array_equal(found.losses, expected.losses) and found.path == path
        assert model.W_E.dtype == torch.float16


def test_numbers_of_several_kinds_are_sampled_in_the_widest() -> None:
    model = build(d_mlp=7)
    model.unembed.to(torch.float64)
    problem = make_problem(model, examples(model))
    assert problem.potential.anchor.dtype == torch.float64 and model.W_E.dtype == torch.float32


# No loop is entered with an array that is too small for it.


def test_a_pass_without_the_gradient_that_it_writes_is_not_run() -> None:
    """As the potential was entered under no_grad once: only W_O and W_out then asked for a gradient."""
    model = build(d_mlp=7, normalization_type=None)
    data = Examples(*(torch.cat([part] * 8) for part in examples(model).tensors))
    potential = make_problem(model, data, "model").potential
    assert isinstance(potential, NetworkPotential)
    entered = NetworkPotential.losses_and_grad.__wrapped__
    with torch.no_grad(), pytest.raises(LoopError, match="dresid has 0 numbers"):
        entered(potential, potential.anchor.repeat(4, 1), torch.arange(64).expand(4, -1))


def test_sizes_and_indices_are_looked_at() -> None:
    entry.holds("loop", a=(torch.zeros(3), 3), b=(np.zeros((2, 2)), 4))
    with pytest.raises(LoopError, match="loop: b has 4 numbers where 5 will be indexed"):
        entry.holds("loop", a=(torch.zeros(3), 3), b=(np.zeros((2, 2)), 5))
    entry.below("loop", index=(torch.tensor([0, 4]), 5), none=(torch.zeros(0), 0))
    for wrong in ([0, 5], [-1, 2]):
        with pytest.raises(LoopError, match=f"loop: index has {min(wrong)} ... {max(wrong)} where there are 5"):
            entry.below("loop", index=(torch.tensor(wrong), 5))


def test_every_kept_loop_is_called_where_its_arrays_are_checked() -> None:
    """Each file that enters a compiled loop checks sizes; see `loops/kept.py` for what makes one."""
    root = Path(entry.__file__).parent.parent
    entering = {"loops/steps.py", "loops/normals.py", "replicas/attention.py", "replicas/cross_entropy.py",
                "replicas/compiled.py", "replicas/packing.py", "replicas/distinct.py"}  # fmt: skip
    for name in entering:
        assert "holds(" in (root / name).read_text(), name
    made = {path.relative_to(root).as_posix() for path in root.rglob("*.py") if "@kept\n" in path.read_text()}
    assert made == {"loops/steps.py", "loops/normals.py", "replicas/fused.py", "replicas/passes.py",
                    "replicas/packing.py", "replicas/distinct.py"}  # fmt: skip
