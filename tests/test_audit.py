"""Checkpoints that are not what their names say are named, and honest ones are not."""

import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from mechgrok.config import RunConfig
from mechgrok.errors import CheckpointError
from mechgrok.model import build_model
from mechgrok.outside.audit import SKETCH, audit
from mechgrok.outside.continuity import discontinuous, relative_distances
from mechgrok.pipeline import train_only
from mechgrok.tasks import make_split
from tests.oracles import tiny_config

Checkpoints = dict[int, dict[str, Tensor]]
TRAINING = {
    "log steps": {},
    "more of them": {"n_steps": 400, "n_checkpoints": 20},
    "linear steps": {"n_checkpoints": None, "checkpoints": tuple(range(0, 41, 2))},
    "small batches": {"n_steps": 400, "n_checkpoints": 20, "batch_size": 4, "learning_rate": 1e-2},
    "no decay": {"n_steps": 400, "n_checkpoints": 20, "weight_decay": 0.0},
    "large steps": {"n_steps": 300, "n_checkpoints": 20, "learning_rate": 0.1},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Checkpoints]:
    """Trajectories that this package trained, by kind and seed."""
    found = {}
    for kind, changes in TRAINING.items():
        for seed in (0, 1) if kind in ("log steps", "more of them") else (0,):
            config = RunConfig.model_validate(tiny_config(train=changes).model_dump() | {"seed": seed})
            trajectory = train_only(config, tmp_path_factory.mktemp("audit") / "run")
            found[kind, seed] = {step: dict(model.named_parameters()) for step, model in trajectory}
    return found


def named(checkpoints: Checkpoints) -> dict[int, str]:
    return audit(checkpoints.items()).named


def test_nothing_is_named_in_a_trajectory_that_was_trained(trained: dict[tuple[str, int], Checkpoints]) -> None:
    for (kind, seed), checkpoints in trained.items():
        found = audit(checkpoints.items())
        assert not found.findings, (kind, seed, found.named)
        assert found.steps == tuple(checkpoints) and 0.01 < found.typical_distance < 0.6
        assert not found.untrained


def test_a_step_of_another_seed_is_named_wherever_it_stands(trained: dict[tuple[str, int], Checkpoints]) -> None:
    """With log steps each single one, the first and the last too, and it alone."""
    for kind in ("log steps", "more of them"):
        own, other = trained[kind, 0], trained[kind, 1]
        for step in own:
            found = named(own | {step: other[step]})
            assert list(found) == [step] and "relative distance" in found[step], (kind, step, found)
        for pair in list(zip(own, list(own)[1:], strict=False)):
            assert list(named(own | {step: other[step] for step in pair})) == list(pair), (kind, pair)


def test_what_a_long_first_gap_holds_is_not_judged(trained: dict[tuple[str, int], Checkpoints]) -> None:
    """From step 0 to 20 of 40 anything can happen, so neither an honest nor another step 0 is named."""
    own, other = trained["linear steps", 0], trained["log steps", 1]
    few = {step: weights for step, weights in own.items() if step == 0 or step >= 20}
    assert not named(few) and not named(few | {0: other[0]})
    assert list(named(own | {20: other[0]})) == [20]


def paths(kind: str, steps: np.ndarray, rng: np.random.Generator, n_directions: int = 10) -> np.ndarray:
    """An honest trajectory [step, weight] that moves in ten of a thousand directions."""
    origin = rng.standard_normal(1000)
    directions = rng.standard_normal((n_directions, 1000))
    log, shape = np.log1p(steps) / np.log1p(steps[-1]), (len(steps), n_directions)
    if kind == "walk":
        along = np.cumsum(rng.standard_normal(shape) * np.sqrt(np.diff(steps, prepend=0) / steps[-1])[:, None], 0)
    elif kind == "scatter":
        along = 0.3 * rng.standard_normal(shape)
    else:
        way = {"in steps": steps / steps[-1], "in log steps": log, "ends early": 1 - np.exp(-100 * steps / steps[-1])}
        along = np.outer(way[kind], rng.standard_normal(n_directions))
    return origin + along @ directions / np.sqrt(n_directions)


@pytest.mark.parametrize("kind", ["walk", "scatter", "in steps", "in log steps", "ends early"])
def test_honest_paths_are_hardly_ever_named(kind: str) -> None:
    """At most 2 % of trajectories, on any schedule of steps, though their distances are large."""
    rng = np.random.default_rng(0)
    schedules = (
        np.unique(np.rint(np.expm1(np.linspace(0, np.log(1e4), 30)))),
        np.arange(0, 10001, 250.0),
        np.array([0, 1, 10, 100, 1000, 10000.0]),
        np.concatenate([[0], 2.0 ** np.arange(10), np.arange(1000, 20001, 1000)]),
        np.arange(5000, 10001, 250.0),
    )
    alarms, largest = [], []
    for steps in schedules:
        for _ in range(40):
            weights = paths(kind, steps, rng)
            distances = relative_distances(weights, (weights**2).sum(1))
            alarms.append(bool(discontinuous(steps, distances)))
            largest.append(distances.max())
    assert np.mean(alarms) <= 0.02 and np.median(largest) > 0.3


def test_weights_of_the_last_step_are_named(trained: dict[tuple[str, int], Checkpoints]) -> None:
    """At most steps even; the last itself is not."""
    own = trained["more of them", 0]
    steps = list(own)
    for wrong in ([steps[3]], steps[:11], steps[2:19:2], [steps[-2]], steps[:-1]):
        found = named(own | {step: own[steps[-1]] for step in wrong})
        assert list(found) == wrong and set(found.values()) == {f"has the weights of the last step, {steps[-1]}"}
    # -0 is 0: such files have been published.
    zero = {name: torch.where(tensor.abs() < 1e-3, -0.0, tensor) for name, tensor in own[steps[-1]].items()}
    last = {name: tensor.clone().masked_fill(tensor == 0, 0.0) for name, tensor in zero.items()}
    assert any(bool((tensor == 0).any()) for tensor in last.values())
    assert list(named(own | {steps[3]: zero, steps[-1]: last})) == [steps[3]]


def test_the_same_weights_at_two_other_steps_are_named(trained: dict[tuple[str, int], Checkpoints]) -> None:
    own = trained["more of them", 0]
    steps = list(own)
    assert named(own | {steps[9]: own[steps[4]]}) == {
        steps[4]: f"has the weights of step {steps[9]}",
        steps[9]: f"has the weights of step {steps[4]}",
    }
    # Neighbours: nothing was trained between them, or one was served twice; one of them is right.
    assert named(own | {steps[1]: own[steps[0]]}) == {steps[1]: f"has the weights of step {steps[0]}"}


def parts(own: Checkpoints, names: Sequence[str]) -> set[str]:
    return {name for name in next(iter(own.values())) if name.startswith(tuple(names))}


def test_a_part_of_another_steps_weights_is_named(trained: dict[tuple[str, int], Checkpoints]) -> None:
    """The first file of the final model at two steps, at the last but one, and of another step."""
    own = trained["more of them", 0]
    steps = list(own)
    shard = parts(own, ["embed", "pos_embed", "blocks.0.attn"])
    for wrong, of in (([steps[7], steps[12]], steps[-1]), ([steps[-2]], steps[-1]), ([steps[1]], steps[-1])):
        mixed = {step: own[step] | {name: own[of][name] for name in shard} for step in wrong}
        found = named(own | mixed)
        assert list(found) == wrong
        pattern = rf"has blocks\.0\.attn\.W_. and {len(shard) - 1} more of its \d+ tensors from the last step, {of}"
        assert all(re.fullmatch(pattern, why) for why in found.values()), found
    mixed = own | {steps[12]: own[steps[12]] | {name: own[steps[3]][name] for name in shard}}
    assert list(named(mixed)) == [steps[3], steps[12]]


def test_parameters_that_stand_still_are_no_mark(trained: dict[tuple[str, int], Checkpoints]) -> None:
    own = trained["more of them", 0]
    steps, shard = list(own), parts(own, ["embed", "unembed"])

    def frozen(at: Sequence[int], to: int) -> Checkpoints:
        return own | {step: own[step] | {name: own[to][name] for name in shard} for step in at}

    never = audit(frozen(steps, steps[0]).items())
    assert not never.findings and set(never.untrained) == shard
    assert not named(frozen(steps[:4], steps[4])) and not named(frozen(steps[-4:], steps[-1]))
    # A bias that is zero here and there tells nothing.
    zero = {"unembed.b_U": torch.zeros_like(own[0]["unembed.b_U"])}
    assert not named(own | {step: own[step] | zero for step in (steps[0], steps[5], steps[9])})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_single_number_that_is_not_finite_is_named_with_its_parameter(value: float) -> None:
    split = make_split(tiny_config().task, 0)
    checkpoints = {step: dict(build_model(tiny_config().model, split, step).named_parameters()) for step in (0, 3, 9)}
    spoiled = checkpoints[3]["blocks.0.attn.W_Q"].detach().clone()
    spoiled[0, 0, 0] = value
    checkpoints[3] = checkpoints[3] | {"blocks.0.attn.W_Q": spoiled}
    (finding,) = audit(checkpoints.items()).findings
    assert (finding.step, finding.kind) == (3, "not finite")
    assert finding.why == f"is not finite: blocks.0.attn.W_Q[0, 0, 0] is {value:g}"


def test_distances_are_those_of_the_weights() -> None:
    """Of models of more weights than the projection has numbers, within four of its standard deviations."""
    rng = np.random.default_rng(0)
    weights = [{"a": torch.tensor(rng.standard_normal((64, 512))), "b": torch.full((512,), 3.0)} for _ in range(2)]
    moved = {
        name: tensor + 1e-4 * torch.tensor(rng.standard_normal(tensor.shape)) for name, tensor in weights[0].items()
    }
    for other in (weights[1], moved):
        exact = [torch.cat([one["a"].flatten(), one["b"]]) for one in (weights[0], other)]
        expected = (exact[0] - exact[1]).norm() / (exact[0].norm() * exact[1].norm()).sqrt()
        found = audit([(0, weights[0]), (1, other)]).typical_distance
        assert abs(found / float(expected) - 1) < 4 / np.sqrt(2 * SKETCH)


def test_steps_of_two_models_are_refused() -> None:
    one, other = {"w": torch.ones(3)}, {"w": torch.ones(4)}
    with pytest.raises(
        CheckpointError, match=r"steps 0 and 1 are no checkpoints of one model: w is of shape \(3,\) at"
    ):
        audit([(0, one), (1, other)])
    with pytest.raises(CheckpointError, match=r"v is missing at the one and of shape \(3,\) at the other"):
        audit([(0, one), (1, one | {"v": torch.ones(3)})])
    assert not audit([(5, one)]).findings and not audit([]).findings
