"""LLCs on other distributions within a run, targets that a reference model draws, and training on minibatches."""

import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformer_lens import HookedTransformer

from mechgrok import model as model_module
from mechgrok import pipeline, seeds, train
from mechgrok.config import ModelConfig, RunConfig, parse_config
from mechgrok.errors import ConfigError, MechgrokError, RunDirectoryError
from mechgrok.model import build_model, evaluate, scored_logits, with_drawn_targets
from mechgrok.plan import plan_units
from mechgrok.store import RunDirectory
from mechgrok.tasks import make_split
from mechgrok.types import Examples, LLCCurve, Study
from tests.oracles import tiny_config
from tests.planted import language_config, language_run_config

CONFIG = language_run_config()
STEPS = train.planned_steps(CONFIG.train)
HEADS = tuple(f"L{layer}H{head}" for layer in range(2) for head in range(4))


def numbers(curve: LLCCurve) -> list[np.ndarray]:
    """All numbers of a curve and of the curves in it, in a fixed order."""
    assert curve.init_loss is not None
    inner = [curve.control, curve.finer, *(curve.refined[name] for name in sorted(curve.refined))]
    mine = [curve.steps, curve.llc, curve.std_error, curve.healthy, curve.saturated, curve.init_loss]
    return mine + [array for one in inner if one is not None for array in numbers(one)]


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*.safetensors")}


# ---- the curves of a run


def test_every_refinement_has_its_components_at_its_checkpoints(language_run: tuple[Path, Study]) -> None:
    curve = language_run[1].curve
    assert (curve.components, curve.steps.tolist()) == (("model", *HEADS), list(STEPS))
    assert set(curve.refined) == {"ngram-heavy", "repeat-heavy", "reference"}
    for name, every in (("ngram-heavy", 2), ("repeat-heavy", 2), ("reference", 4)):
        assert curve.refined[name].components == HEADS
        assert curve.refined[name].steps.tolist() == list(STEPS[::every])
        assert np.isfinite(curve.refined[name].llc).all()
    assert curve.control is not None and curve.finer is not None
    assert curve.control.steps.tolist() == curve.finer.steps.tolist() == list(STEPS[::2])


def test_each_curve_is_sampled_on_its_own_data(language_run: tuple[Path, Study]) -> None:
    """The baseline of an estimate is the loss at the checkpoint on the very examples that are sampled."""
    study: Study = language_run[1]
    data = {name: (study.curve.refined[name], study.split.distributions[name]) for name in study.curve.refined}
    data["the first training examples"] = study.curve, study.split.train.first(32)
    for curve, examples in data.values():
        assert curve.init_loss is not None
        for step, loss in zip(curve.steps.tolist(), curve.init_loss, strict=True):
            assert evaluate(study.trajectory.model_at(step), examples)[0] == pytest.approx(loss, abs=1e-4)
    assert len({round(curve.init_loss[-1], 3) for curve, _ in data.values()}) == len(data)


def test_loading_gives_the_same_bits(language_run: tuple[Path, Study]) -> None:
    path, study = language_run
    loaded = pipeline.load_study(path)
    for mine, again in zip(numbers(study.curve), numbers(loaded.curve), strict=True):
        np.testing.assert_array_equal(mine, again)
    assert loaded.split.distributions.keys() == study.split.distributions.keys()
    for name, examples in study.split.distributions.items():
        assert torch.equal(examples.targets, loaded.split.distributions[name].targets)


def test_what_was_deleted_is_made_again_to_the_same_bits(language_run: tuple[Path, Study], tmp_path: Path) -> None:
    """Two heads of a refinement, which are sampled with their layer, one of the model's, and the whole reference."""
    path = tmp_path / "run"
    shutil.copytree(language_run[0], path)
    whole = files(path)
    gone = [
        file
        for name in ("repeat-heavy/*/L0H1", "repeat-heavy/*/L1H3", "reference/*/L1H0")
        for file in sorted(path.glob(f"refined/{name}/*.safetensors"))[:1]
    ]
    gone += sorted(path.glob("llc/*/model/*.safetensors"))[:1]
    assert len(gone) == 4
    for file in gone:
        file.unlink()
    total = len([name for name in whole if name.startswith(("llc/", "refined/"))])
    with pytest.raises(RunDirectoryError, match=f"has {total - 4} of {total} estimates; run `mechgrok run` again"):
        pipeline.load_study(path)
    shutil.rmtree(path / "reference")
    with pytest.raises(MechgrokError, match="mechgrok run"):
        pipeline.load_study(path)
    pipeline.run(CONFIG, path, n_workers=1)
    assert files(path) == whole


def test_refinements_and_checks_leave_the_curve_on_the_training_data_alone(
    language_run: tuple[Path, Study], tmp_path: Path
) -> None:
    plain = language_run_config(
        train={"n_checkpoints": None, "checkpoints": (0, 40)}, llc={"refinements": (), "checks_every": 2}
    )
    curve = pipeline.run(plain, tmp_path / "run", n_workers=1).curve
    np.testing.assert_array_equal(curve.llc, language_run[1].curve.llc[:, [0, -1]])
    assert not curve.refined and not (tmp_path / "run" / "reference").exists()
    assert curve.control is not None and curve.control.steps.tolist() == [0]


def test_units_are_planned_once_each_and_the_dearest_first() -> None:
    split = make_split(CONFIG.task, CONFIG.seed)
    plan = plan_units(CONFIG, ("model", *HEADS), split, STEPS)
    assert list(plan) == ["", "ngram-heavy", "repeat-heavy", "reference"]
    sampling, own, control = CONFIG.llc.sampling, CONFIG.llc.head_sampling, CONFIG.llc.control
    assert own is not None and own != sampling
    assert plan[""][0] == (STEPS[0], "model", sampling.halved())
    expected = {(step, "model", sampling) for step in STEPS} | {(step, head, own) for step in STEPS for head in HEADS}
    expected |= {(step, "model", setting) for step in STEPS[::2] for setting in (sampling.halved(), control)}
    assert set(plan[""]) == expected
    assert set(plan["reference"]) == {(step, head, own) for step in STEPS[::4] for head in HEADS}
    assert all(len(set(units)) == len(units) for units in plan.values())


def test_doubtful_estimates_name_their_distribution(language_run: tuple[Path, Study]) -> None:
    """Eight draws are too few for nearly all."""
    doubtful = pipeline.doubtful_estimates(language_run[0])
    assert {data for data, *_ in doubtful} == {"", "ngram-heavy", "repeat-heavy", "reference"}
    assert all(estimate.component == name for (_, _, name, _), estimate in doubtful.items())


# ---- what is refused


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('distribution = "repeat-heavy"', 'distribution = "repeat-havy"',
         "the task has no distribution 'repeat-havy' to refine the LLC with; it has ngram-heavy, repeat-heavy"),
        ('distribution = "repeat-heavy"', 'distribution = "ngram-heavy"', "refinements name a distribution twice"),
        ("reference_layers = 1", "", "reference_layers goes with the distribution 'reference', and it needs it"),
        ('distribution = "reference"', 'distribution = "other"', "reference_layers goes with the distribution"),
        ("reference_layers = 1", "reference_layers = 0", "greater than 0"),
        ('"heads",\n]\nevery = 4', '"L5H0",\n]\nevery = 4', "L5"),
        ("every = 4", "every = 0", "greater than 0"),
        ("every = 4", "often = 4", "unknown key 'llc.refinements.2.often'"),
        ("checks_every = 2", "checks_every = 0", "greater than 0"),
        ("n_examples = 32", "n_examples = 3", "batch_size 4 exceeds the 3 examples"),
        ("n_refined = 32", "n_refined = 3", "batch_size 4 exceeds the 3 examples"),
        ("n_checkpoints = 8", "", "give either n_checkpoints, how many, or checkpoints, the steps themselves"),
        ("n_checkpoints = 8", "n_checkpoints = 8\ncheckpoints = [0, 40]", "give either n_checkpoints, how many"),
        ("n_checkpoints = 8", "checkpoints = [0, 9, 9, 40]", "checkpoints must increase"),
        ("n_checkpoints = 8", "checkpoints = [0, 20]", "end at n_steps 40"),
        ("n_checkpoints = 8", "n_checkpoints = 8\nmax_grad_norm = 0.0", "greater than 0"),
        ("[task.distributions.repeat-heavy]", "[task.distributions.test]",
         "a distribution cannot be called test: its rows would be those of the split"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_before_any_work(old: str, new: str, message: str, tmp_path: Path) -> None:
    text = CONFIG.to_toml()
    assert text.count(old) == 1 and parse_config(text, "again") == CONFIG
    (tmp_path / "my.toml").write_text(text.replace(old, new))
    with pytest.raises(MechgrokError) as error:
        pipeline.run(tmp_path / "my.toml", tmp_path / "run", n_workers=1)
    assert message in str(error.value)
    assert str(error.value).count(". ") == 0 and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["llc", "reference", "main", "control", "finer"])
def test_names_that_the_run_needs_itself_are_refused_for_distributions(name: str, tmp_path: Path) -> None:
    task = CONFIG.task.model_copy(update={"distributions": {name: CONFIG.task.rates}})
    first, _, last = CONFIG.llc.refinements
    refinement = last if name == "reference" else first.model_copy(update={"distribution": name})
    llc = CONFIG.llc.model_copy(update={"refinements": (refinement,)})
    config = CONFIG.model_copy(update={"task": task, "llc": llc})
    with pytest.raises(ConfigError, match=f"the task's distribution '{name}' has a name that the run needs itself"):
        pipeline.run(config, tmp_path / "run", n_workers=1)
    assert not (tmp_path / "run").exists()


# ---- targets that a model draws


def random_model(seed: int) -> HookedTransformer:
    split = make_split(language_config(n_plain=8, n_ngrams=2), seed=0)
    shape = ModelConfig(n_layers=1, d_model=16, n_heads=2, d_head=8, init_std=0.5)
    return build_model(shape, split, seed)


def log_probabilities(model: HookedTransformer, examples: Examples) -> Tensor:
    return scored_logits(model, examples.tokens, examples.tensors[1].shape[1]).detach().double().log_softmax(-1)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few examples at once, the last block smaller than the rest."""
    monkeypatch.setattr(model_module, "BLOCK", 300 * 32 * 20)


def rows_of_one(n: int) -> Examples:
    one = make_split(language_config(n_plain=8, n_ngrams=2), seed=0).train.first(1)
    return Examples(one.tokens.repeat(n, 1), one.targets.repeat(n, 1), one.weights.repeat(n, 1))


@pytest.mark.usefixtures("small_blocks")
def test_drawn_targets_are_as_frequent_as_the_model_says() -> None:
    model, examples = random_model(0), rows_of_one(2000)
    drawn = with_drawn_targets(model, examples, seeds.stream(0, "x"))
    probabilities = log_probabilities(model, examples.first(1))[0].exp().numpy()
    p_values = []
    for position in range(31):
        expected = 2000 * probabilities[position]
        counts = np.bincount(drawn.targets[:, position], minlength=len(expected))
        rare = expected < 5
        merged = [np.append(of[~rare], of[rare].sum()) for of in (counts, expected)]
        p_values.append(chisquare(*(of[merged[1] > 0] for of in merged)).pvalue)
    assert min(p_values) > 0.01 / len(p_values)
    shuffled = chisquare(np.bincount(drawn.targets[:, 5], minlength=len(probabilities[6])), 2000 * probabilities[6])
    assert shuffled.pvalue < 1e-6  # the positions are told apart
    assert len(drawn.targets[:, :31].unique(dim=0)) > 1990  # rows are drawn apart


@pytest.mark.usefixtures("small_blocks")
def test_on_drawn_targets_the_loss_is_the_entropy_and_anothers_exceeds_it_by_the_divergence() -> None:
    split = make_split(language_config(n_plain=8, n_ngrams=2, n_train=2000), seed=0)
    mine, other = random_model(0), random_model(1)
    drawn = with_drawn_targets(mine, split.train, seeds.stream(0, "x"))
    log_p, log_q = (log_probabilities(of, split.train)[:, :31] for of in (mine, other))
    surprise = -log_p.gather(-1, drawn.targets[:, :31, None])
    error = float(surprise.std()) / math.sqrt(surprise.numel())
    entropy = float(-(log_p.exp() * log_p).sum(-1).mean())
    assert error < 0.01
    assert evaluate(mine, drawn)[0] == pytest.approx(entropy, abs=4 * error)
    ratio = (log_p - log_q).gather(-1, drawn.targets[:, :31, None])
    error = float(ratio.std()) / math.sqrt(ratio.numel())
    divergence = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert divergence > 0.5
    assert evaluate(other, drawn)[0] - evaluate(mine, drawn)[0] == pytest.approx(divergence, abs=4 * error)
    # On the language's own targets neither is so.
    assert abs(evaluate(mine, split.train)[0] - entropy) > 0.5


def test_only_scored_targets_are_drawn_and_a_stream_always_draws_the_same() -> None:
    split = make_split(tiny_config().task, seed=0)
    model = build_model(tiny_config().model, split, seed=0)
    before = split.train.targets.clone()
    drawn, again, other = (with_drawn_targets(model, split.train, seeds.stream(0, name)) for name in "xxy")
    assert torch.equal(drawn.targets, again.targets) and not torch.equal(drawn.targets, other.targets)
    assert torch.equal(drawn.targets[:, :-1], before[:, :-1]) and not torch.equal(drawn.targets[:, -1], before[:, -1])
    assert torch.equal(drawn.tokens, split.train.tokens) and torch.equal(drawn.weights, split.train.weights)
    assert torch.equal(split.train.targets, before)


def test_the_reference_is_a_shallower_model_trained_alike(language_run: tuple[Path, Study]) -> None:
    path, study = language_run
    own = RunDirectory.open(path / "reference")
    assert own.config.model.n_layers == 1 and not own.config.llc.refinements
    assert own.config.train.model_copy(update={"checkpoints": None, "n_checkpoints": 8}) == CONFIG.train
    reference = train.load_trajectory(own, study.split)
    assert reference.steps == (0, 40)
    drawn, sampled = study.split.distributions["reference"], study.split.train.first(32)
    assert torch.equal(drawn.tokens, sampled.tokens)
    assert not torch.equal(drawn.targets, sampled.targets)
    log_p = log_probabilities(reference.model_at(40), drawn)[:, :31]
    entropy = float(-(log_p.exp() * log_p).sum(-1).mean())
    surprise = -log_p.gather(-1, drawn.targets[:, :31, None])
    error = float(surprise.std()) / math.sqrt(surprise.numel())
    assert evaluate(reference.model_at(40), drawn)[0] == pytest.approx(entropy, abs=4 * error)


# ---- training on minibatches


def trained(path: Path, config: RunConfig = CONFIG) -> RunDirectory:
    run = RunDirectory.create(path, config)
    train.train(run, make_split(config.task, config.seed))
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return files(trained(tmp_path_factory.mktemp("whole") / "run").path)


@pytest.mark.parametrize("every", [1, 7, 13])
def test_training_that_is_stopped_at_any_step_ends_in_the_same_bits(
    every: int, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time so many steps after it began, until what is left takes fewer."""
    losses, left, stops = train.batch_loss, [0], 0

    def stopping(*arguments: Any) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise InterruptedError
        return losses(*arguments)

    monkeypatch.setattr(train, "batch_loss", stopping)
    while not (tmp_path / "run/checkpoints/step-00000040.safetensors").exists():
        # Where checkpoints lie further apart than that, stopping so soon would never end.
        left[0] = every if stops < 3 else 20
        try:
            trained(tmp_path / "run")
        except InterruptedError:
            stops += 1
        assert stops < 50
    assert stops >= 2
    assert files(tmp_path / "run") == whole


KILLED = """
import os, signal, sys
from pathlib import Path
from mechgrok import train
from tests.test_refined_run import trained

losses, calls = train.batch_loss, []

def killing(*arguments):
    calls.append(1)
    if len(calls) == 25:
        os.kill(os.getpid(), signal.SIGKILL)
    return losses(*arguments)

train.batch_loss = killing
trained(Path(sys.argv[1]))
"""


def test_training_that_is_killed_ends_in_the_same_bits(whole: dict[str, bytes], tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run")]
    process = subprocess.run(command, cwd=Path(__file__).parent.parent, check=False)
    assert process.returncode == -signal.SIGKILL
    assert 0 < len(files(tmp_path / "run")) < len(whole)
    assert files(trained(tmp_path / "run").path) == whole


def test_a_step_sees_the_rows_that_its_stream_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, seen = train.batch_loss, []

    def watching(model: HookedTransformer, *batch: Tensor) -> Tensor:
        seen.append(batch)
        return losses(model, *batch)

    monkeypatch.setattr(train, "batch_loss", watching)
    trained(tmp_path / "run")
    examples = make_split(CONFIG.task, CONFIG.seed).train
    assert len(seen) == 40
    for step, batch in enumerate(seen):
        rows = torch.randint(len(examples), (8,), generator=seeds.stream(CONFIG.seed, "batch", step))
        assert all(torch.equal(mine, of[rows]) for mine, of in zip(batch, examples.tensors, strict=True))


def test_checkpoints_are_those_that_are_listed_and_on_the_way_of_any_others(tmp_path: Path) -> None:
    listed = language_run_config(train={"n_checkpoints": None, "checkpoints": (0, STEPS[3], 17, 40)})
    run, other = trained(tmp_path / "run", listed), trained(tmp_path / "other")
    assert train.load_trajectory(run, make_split(listed.task, 0)).steps == (0, STEPS[3], 17, 40)
    assert len(list(run.path.glob("checkpoints/*"))) == 4
    for step in (0, STEPS[3], 40):
        mine, its = run.read_checkpoint(step)[0], other.read_checkpoint(step)[0]
        assert all(torch.equal(mine[name], its[name]) for name in mine)
    assert 17 not in STEPS and not other.has_checkpoint(17)


def first_gradient(path: Path, **changes: Any) -> Tensor:
    """The gradient that AdamW was given in the first step, from its first moment."""
    config = language_run_config(train={"n_steps": 1, "n_checkpoints": 2, **changes})
    state = trained(path, config).read_training_state()
    assert state is not None and state[0] == 1
    moments = [tensor.flatten() for name, tensor in sorted(state[1].items()) if name.startswith("exp_avg/")]
    return torch.cat(moments) / (1 - config.train.betas[0])


def test_a_gradient_that_is_too_long_is_shortened_and_no_other(tmp_path: Path) -> None:
    plain = first_gradient(tmp_path / "plain")
    norm = float(plain.norm())
    clipped = first_gradient(tmp_path / "clipped", max_grad_norm=norm / 4)
    assert float(clipped.norm()) == pytest.approx(norm / 4, rel=1e-4)
    torch.testing.assert_close(4 * clipped, plain, rtol=1e-4, atol=1e-6)
    assert torch.equal(first_gradient(tmp_path / "long", max_grad_norm=2 * norm), plain)


def test_the_losses_on_record_are_of_as_many_training_rows_as_there_are_test_rows(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"task": CONFIG.task.model_copy(update={"n_test": 16})})
    split = make_split(config.task, config.seed)
    trajectory = train.load_trajectory(trained(tmp_path / "run", config), split)
    model, metrics = trajectory.model_at(40), trajectory.metrics[-1]
    assert metrics.test_loss == pytest.approx(evaluate(model, split.test)[0], rel=1e-5)
    assert metrics.train_loss == pytest.approx(evaluate(model, split.train.first(16))[0], rel=1e-5)
    assert metrics.train_loss != pytest.approx(evaluate(model, split.train)[0], rel=1e-5)
