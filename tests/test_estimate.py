"""The estimator on real models: baselines, components, refusals, curves."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mechgrok as mg
from mechgrok import seeds
from mechgrok.components import complement, component
from mechgrok.errors import ComponentError, ConfigError, ShapeError
from mechgrok.llc.curve import llc_curve, point_seed, with_company
from mechgrok.llc.head_potential import HeadPotential
from mechgrok.model import build_model, evaluate, model_losses
from mechgrok.sampling.chains import sample
from mechgrok.sampling.potential import ModulePotential
from mechgrok.tasks import make_split
from mechgrok.types import Examples
from tests.oracles import Quadratic, quadratic_loss, tiny_config

SPLIT = make_split(tiny_config().task, 0)
CONFIG = tiny_config().llc.sampling


def build(**changes):
    return build_model(tiny_config(model=changes).model, SPLIT, 0)


@settings(deadline=None, max_examples=20)
@given(
    n_layers=st.integers(1, 2),
    d_mlp=st.sampled_from([None, 16]),
    norm=st.sampled_from([None, "LN", "LNPre"]),
    positions=st.sampled_from(["standard", "rotary", "shortformer", "alibi"]),
    name=st.sampled_from(["L0H1", "L0H0+L0H1"]),
)
def test_the_hooked_path_for_heads_equals_the_plain_one(n_layers, d_mlp, norm, positions, name) -> None:
    model = build(n_layers=n_layers, d_mlp=d_mlp, normalization_type=norm, positional_embedding_type=positions)
    head = component(model, name)
    hooked = HeadPotential(model, SPLIT.train, head)
    plain = ModulePotential(model, model_losses, SPLIT.train.tensors, head)
    theta = plain.anchor + 0.3 * torch.randn(3, head.n_params, generator=seeds.stream(0, "theta"))
    index = torch.randint(len(SPLIT.train), (3, 5), generator=seeds.stream(0, "index"))
    losses, grad = hooked.losses_and_grad(theta, index)
    expected_losses, expected_grad = plain.losses_and_grad(theta, index)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_that_of_the_mean_loss() -> None:
    """Finite differences in float64, as an independent check of both paths' derivative."""
    model = build().double()
    head = component(model, "L0H1")
    plain = ModulePotential(model, model_losses, SPLIT.train.tensors, head)
    index = torch.arange(6)[None]
    theta = plain.anchor[None].clone()
    grad = plain.losses_and_grad(theta, index)[1][0]
    for at in range(0, head.n_params, 97):
        bump = torch.zeros_like(theta)
        bump[0, at] = 1e-6
        up, down = (plain.losses_and_grad(theta + sign * bump, index)[0].mean() for sign in (1, -1))
        assert float(grad[at]) == pytest.approx(float((up - down) / 2e-6), abs=1e-7)


@pytest.mark.parametrize("name", ["model", "L0H1", "L0.mlp", "embed"])
def test_sampling_leaves_the_model_and_all_else_alone(name: str) -> None:
    model = build()
    before = {key: q.detach().clone() for key, q in model.named_parameters()}
    state = torch.random.get_rng_state()
    estimate = mg.estimate_llc(model, SPLIT.train, component=name, config=CONFIG, seed=0)
    assert estimate.losses.std() > 0
    assert all(torch.equal(q, before[key]) for key, q in model.named_parameters())
    assert all(q.grad is None for q in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_is_outside_a_component_keeps_its_bits_in_every_replica() -> None:
    from mechgrok.sampling.potential import inserter

    model = build()
    head = component(model, "L0H1")
    own = {name: q.detach() for name, q in model.named_parameters()}
    theta = sample(HeadPotential(model, SPLIT.train, head), CONFIG, 0, ("x",)).theta
    rest = complement(model, head)
    for replica in theta:
        moved = inserter(head, own)(replica)
        for name, mask in rest.masks.items():
            keep = torch.ones_like(own[name], dtype=torch.bool) if mask is None else mask
            assert torch.equal(moved[name][keep], own[name][keep])
        assert not any(torch.equal(moved[name], own[name]) for name in head.masks)


def test_the_baseline_is_the_loss_on_all_data_whatever_the_chains() -> None:
    model = build()
    loss = evaluate(model, SPLIT.train)[0]
    for changes in ({"n_chains": 2}, {"n_chains": 5}, {"n_draws": 30}, {"batch_size": 3}, {"batch_size": None}):
        config = CONFIG.model_copy(update=changes)
        estimate = mg.estimate_llc(model, SPLIT.train, config=config, seed=0)
        assert estimate.init_loss == pytest.approx(loss, rel=1e-6)  # in float32, and not by TransformerLens
        assert estimate.llc == pytest.approx(config.nbeta * (estimate.losses.mean() - estimate.init_loss), rel=1e-12)
        assert estimate.losses.shape == (config.n_chains, config.n_draws)


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    model = build()
    first, again, other = (mg.estimate_llc(model, SPLIT.train, config=CONFIG, seed=s) for s in (0, 0, 1))
    assert np.array_equal(first.losses, again.losses)
    assert not np.array_equal(first.losses, other.losses)


def test_other_data_gives_the_data_refined_estimate_with_its_own_baseline() -> None:
    model = build()
    estimate = mg.estimate_llc(model, SPLIT.test, config=CONFIG, seed=0)
    assert estimate.init_loss == pytest.approx(evaluate(model, SPLIT.test)[0])


def test_a_negative_estimate_is_reported_as_it_is() -> None:
    """At no minimum: L falls along the gradient, so the sampled loss is lower than the loss at w*."""

    def slope(module, x):
        return module.w.sum() + 0.0 * x

    config = mg.LLCConfig(nbeta=10.0, step_size=1e-3, localization=10.0, n_chains=4, n_draws=6000, n_burnin=400)
    estimate = mg.estimate_llc(Quadratic(torch.zeros(2)), (torch.zeros(2),), loss_fn=slope, config=config, seed=0)
    # Stationary mean of each weight: -nbeta / localization = -1, so llc = nbeta * 2 * -1.
    assert estimate.llc == pytest.approx(-20.0, abs=5 * estimate.std_error)
    assert estimate.std_error < 2.0


BAD = [
    ({"data": (torch.zeros(3), torch.zeros(4))}, ShapeError, "common first axis"),
    ({"data": ()}, ShapeError, "common first axis"),
    ({"data": torch.zeros(8)}, ShapeError, r"write \(x,\)"),
    ({"data": (torch.tensor(1.0),)}, ShapeError, "common first axis"),
    ({"data": {"x": torch.zeros(8)}}, ShapeError, "a sequence of torch tensors, got dict"),
    ({"data": (np.zeros(8), torch.zeros(8))}, ShapeError, "got Tensor, ndarray; of arrays make tensors"),
    ({"model": lambda x: x}, ConfigError, "HookedTransformer or another torch module, got function"),
    ({"model": torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout())}, ConfigError, "call module.eval"),
    ({"model": torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1))}, ConfigError, "call module.eval"),
    ({"loss_fn": None}, ConfigError, "loss_fn"),
    ({"loss_fn": "mse"}, ConfigError, "loss_fn must be a function .*got 'mse'"),
    ({"loss_fn": lambda module, x: quadratic_loss(module, x).detach()}, ConfigError, "has no gradient"),
    ({"loss_fn": lambda module, x: x + 1.0}, ConfigError, "has no gradient"),
    ({"loss_fn": lambda module, x: None}, ShapeError, "one loss per example .*got NoneType"),
    ({"component": ["L0H1"]}, ComponentError, r"a name, a Component or a dict of masks, got \['L0H1'\]"),
    ({"component": ("L0H0", "L0H1")}, ComponentError, "one component at a time"),
    ({"config": {"nbeta": 3}}, ConfigError, "config must be an LLCConfig, got dict"),
    ({"loss_fn": lambda module, x: module.w.sum()}, ShapeError, "one loss per example"),
    ({"component": "L0H1"}, ComponentError, "need a HookedTransformer"),
    ({"component": {"v": None}}, ComponentError, "no parameter 'v'"),
    ({"component": {"w": torch.ones(3)}}, ComponentError, "None, for all of it, or a bool tensor"),
    ({"component": {"w": True}}, ComponentError, "or a bool tensor of shape .*, got True"),
    ({"component": {"w": torch.ones(4, dtype=torch.bool)}}, ComponentError, "of shape"),
    ({"component": {"w": torch.zeros(3, dtype=torch.bool)}}, ComponentError, "selects no parameter"),
    ({"component": {}}, ComponentError, "selects no parameter"),
    ({"config": CONFIG.model_copy(update={"batch_size": 99})}, ConfigError, "batch_size 99 exceeds"),
    ({"loss_fn": lambda module, x: module.w.sum() + x / 0}, ConfigError, "not finite"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_arguments_are_refused_before_any_sampling(changes, error, message, monkeypatch) -> None:
    def never(*_):
        raise AssertionError("sampled")

    monkeypatch.setattr("mechgrok.llc.estimate.sample", never)
    arguments = {
        "model": Quadratic(torch.ones(3)), "data": (torch.zeros(8),), "loss_fn": quadratic_loss,
        "config": CONFIG, "seed": 0,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        mg.estimate_llc(**(arguments | changes))


def test_examples_go_with_hooked_transformers_and_without_loss_fn() -> None:
    with pytest.raises(ConfigError, match="HookedTransformer, got Quadratic"):
        mg.estimate_llc(Quadratic(torch.ones(3)), SPLIT.train, config=CONFIG, seed=0)
    with pytest.raises(ConfigError, match="leave one of them out"):
        mg.estimate_llc(build(), SPLIT.train, loss_fn=quadratic_loss, config=CONFIG, seed=0)


def test_a_curve_is_its_estimates_at_every_checkpoint() -> None:
    models = [(0, build()), (5, build_model(tiny_config().model, SPLIT, 9))]
    curve = llc_curve(models, SPLIT.train, components=["model", "L0H0"], config=CONFIG, seed=3)
    assert curve.llc.shape == (2, 2)
    alone = mg.estimate_llc(models[1][1], SPLIT.train, component="L0H0", config=CONFIG, seed=point_seed(3, 5))
    assert curve.llc[1, 1] == alone.llc and curve.std_error[1, 1] == alone.std_error
    assert curve.init_loss[0] == pytest.approx(evaluate(models[0][1], SPLIT.train)[0])
    data = curve.to_dataset()
    assert float(data.llc.sel(component="L0H0", checkpoint=5)) == alone.llc
    assert data.attrs["nbeta"] == CONFIG.nbeta


def test_two_workers_give_the_bits_of_one(tiny_run) -> None:
    study = tiny_run[1]
    names = study.curve.components
    curve = llc_curve(study.trajectory, study.split.train, components=names, config=CONFIG, seed=0, n_workers=2)
    assert np.array_equal(curve.llc, study.curve.llc)
    assert np.array_equal(curve.std_error, study.curve.std_error)


def test_a_unit_that_is_missing_brings_those_that_it_was_sampled_with(tiny_run) -> None:
    """A head's last bits are those of its whole group, so a resumed run samples the group again."""
    trajectory = tiny_run[1].trajectory
    units = [(step, name, CONFIG) for step in (0, 4) for name in ("model", "L0H0", "L0H1")]
    assert with_company(trajectory, units, []) == []
    assert with_company(trajectory, units, [units[0]]) == [units[0]]
    assert with_company(trajectory, units, [units[5], units[3]]) == units[3:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llc": np.zeros((2, 3))}, r"llc must be \[component, checkpoint\] \(1, 3\)"),
        ({"steps": [0, 5, 5]}, "increase from 0 or more"),
        ({"steps": []}, "increase from 0|llc must be"),
        ({"steps": [0, 5, np.inf]}, "steps must be finite"),
        ({"steps": [-1, 5, 9]}, "increase from 0 or more"),
        ({"std_error": [[0.1, -0.1, 0.1]]}, "must not be negative"),
        ({"components": ("a", "a"), "llc": np.zeros((2, 3)), "std_error": np.zeros((2, 3))}, "components repeat"),
        ({"healthy": [[True, False]]}, "healthy must be"),
        ({"components": "model"}, r"write \('model',\)"),
    ],
)
def test_a_curve_from_outside_arrays_is_checked(changes, message) -> None:
    arguments = {"steps": [0, 5, 9], "components": ("model",), "llc": [[1.0, 2, 3]], "std_error": [[0.1, 0.1, 0.1]]}
    assert mg.LLCCurve(**arguments).healthy.all()
    with pytest.raises(ShapeError, match=message):
        mg.LLCCurve(**(arguments | changes))


def test_tokens_and_targets_outside_the_vocabulary_are_refused() -> None:
    train = SPLIT.train
    for bad in (
        Examples(train.tokens + 1, train.targets, train.weights),
        Examples(train.tokens, train.targets - 1, train.weights),
    ):
        with pytest.raises(ShapeError, match="must lie in 0"):
            mg.estimate_llc(build(), bad, config=CONFIG, seed=0)


def test_rows_longer_than_the_context_are_refused() -> None:
    train, n_ctx = SPLIT.train, build().cfg.n_ctx
    twice = Examples(*(torch.cat([part, part], 1) for part in (train.tokens, train.targets, train.weights)))
    with pytest.raises(ShapeError, match=f"a context of {n_ctx}, got rows of {twice.tokens.shape[1]} tokens"):
        mg.estimate_llc(build(), twice, config=CONFIG, seed=0)


@pytest.mark.parametrize(
    ("models", "error", "message"),
    [
        ([build()], ShapeError, r"\(step, model\) pairs, got HookedTransformer"),
        ([(0.5, build())], ShapeError, "whole numbers from 0 on, got 0.5"),
        ([("0", build())], ShapeError, "whole numbers from 0 on, got '0'"),
        ([(-1, build())], ShapeError, "whole numbers from 0 on, got -1"),
        ([(0, Quadratic(torch.ones(3)))], ConfigError, "needs HookedTransformers, got Quadratic at step 0"),
    ],
)
def test_a_trajectory_of_something_else_is_refused_before_any_sampling(models, error, message, monkeypatch) -> None:
    monkeypatch.setattr("mechgrok.llc.curve.estimate_group", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises(error, match=message):
        llc_curve(models, SPLIT.train, components=["model"], config=CONFIG, seed=0)


def test_one_name_is_no_sequence_of_names() -> None:
    with pytest.raises(ComponentError, match=r"write \['model'\]"):
        llc_curve([(0, build())], SPLIT.train, components="model", config=CONFIG, seed=0)


def test_a_module_whose_parameters_are_frozen_is_sampled_all_the_same() -> None:
    module, config = Quadratic(torch.ones(3)), CONFIG.model_copy(update={"batch_size": None})
    module.requires_grad_(False)
    frozen = mg.estimate_llc(module, (torch.zeros(8),), loss_fn=quadratic_loss, config=config, seed=0)
    moving = mg.estimate_llc(Quadratic(torch.ones(3)), (torch.zeros(8),), loss_fn=quadratic_loss, config=config, seed=0)
    assert frozen.llc == moving.llc


def test_a_curve_refuses_repeated_steps_and_components_and_bad_names() -> None:
    model = build()
    for models, names, error in (
        ([(0, model), (0, model)], ["L0H0"], ShapeError),
        ([(0, model)], ["model", "model"], ShapeError),
        ([(0, model)], ["L0H0", "L9H9"], ComponentError),
    ):
        with pytest.raises(error):
            llc_curve(models, SPLIT.train, components=names, config=CONFIG, seed=0)
    curve = llc_curve([(np.int64(5), model)], SPLIT.train, components=["heads"], config=CONFIG, seed=0)
    assert curve.components == ("L0H0", "L0H1")
    alone = llc_curve([(5, model)], SPLIT.train, components=["L0H0"], config=CONFIG, seed=0)
    assert curve.llc[0, 0] == pytest.approx(alone.llc[0, 0], rel=1e-5)


def test_examples_are_checked() -> None:
    tokens, weights = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3)
    for bad in (
        {"targets": torch.zeros(2, 2, dtype=torch.int64)},
        {"weights": torch.zeros(2, 3)},
        {"tokens": torch.zeros(2, 3)},
        {"tokens": torch.zeros(0, 3, dtype=torch.int64)},
        {"tokens": [[0, 0, 0], [0, 0, 0]]},
        {"targets": np.zeros((2, 3), dtype=np.int64)},
        {"weights": torch.tensor([[1.0, 1.0, -0.5], [1.0, 1.0, 1.0]])},
        {"weights": torch.tensor([[1.0, 1.0, torch.inf], [1.0, 1.0, 1.0]])},
    ):
        with pytest.raises(ShapeError):
            Examples(**({"tokens": tokens, "targets": tokens, "weights": weights} | bad))
