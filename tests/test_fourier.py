"""Fourier measures against a network whose circuit is planted, and against slow formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from analyses import fourier as analysis
from mechgrok import seeds
from mechgrok.config import ModelConfig
from mechgrok.errors import AnalysisError
from mechgrok.measures import fourier
from mechgrok.model import build_model, evaluate
from mechgrok.tasks import make_split
from tests.oracles import planted_fourier_model, tiny_config

P, KEYS = 23, (3, 5, 9)


@pytest.fixture(scope="module")
def planted() -> dict:
    model, split = planted_fourier_model(P, KEYS)
    facts = analysis.prepare(model, split)
    return {"model": model, "split": split, "facts": facts, "row": analysis.measure(model, split, None, facts)}


def test_the_planted_network_adds_and_its_frequencies_are_found(planted) -> None:
    assert evaluate(planted["model"], planted["split"].test)[1] == 1.0
    assert planted["facts"]["key_frequencies"] == KEYS


def test_planted_spectra_lie_on_the_keys_alone(planted) -> None:
    for name in ("embedding_spectrum", "neuron_logit_spectrum"):
        norms = planted["row"][name]
        on = np.isin(np.arange(1, (P - 1) // 2 + 1), KEYS)
        assert norms[~on].max() < 1e-5 * norms[on].min()


def test_planted_neurons_are_single_frequency_each_on_its_own(planted) -> None:
    assert planted["row"]["single_frequency_neurons"] == 1.0
    shares = planted["row"]["neurons_by_frequency"]
    assert {int(k) + 1: round(shares[k], 6) for k in np.flatnonzero(shares)} == {k: round(1 / 3, 6) for k in KEYS}


def test_planted_losses_restricted_keeps_the_rule_and_excluded_loses_it(planted) -> None:
    row = planted["row"]
    assert row["restricted_loss"] < 0.05
    assert row["excluded_loss"] > np.log(P)
    assert row["train_loss"] < 0.05
    # The circle's logits are |cos(w_k (a-b) / 2)| cos(w_k (a+b-c)): the pure wave is most of it.
    assert 0.6 < row["logit_r2"] < 0.95


def test_a_network_of_other_frequencies_fails_the_same_measures(planted) -> None:
    """The control: wrong keys explain nothing, and excluding them costs nothing."""
    row = analysis.measure(planted["model"], planted["split"], None, {"key_frequencies": (1, 2)})
    assert row["logit_r2"] < 1e-6
    assert row["restricted_loss"] > 0.9 * np.log(P)
    assert row["excluded_loss"] == pytest.approx(row["train_loss"], abs=1e-3)


def test_an_untrained_network_has_none_of_it() -> None:
    split = make_split(tiny_config(task={"p": P}).task, 0)
    model = build_model(tiny_config(model={"d_model": 32, "d_head": 16, "d_mlp": 64}).model, split, 0)
    row = analysis.measure(model, split, seeds.stream(0), {"key_frequencies": KEYS})
    assert row["single_frequency_neurons"] == 0.0
    assert row["logit_r2"] < 0.05
    assert row["gini_W_E"] < 0.15


@settings(deadline=None)
@given(st.sampled_from([5, 7, 23]))
def test_the_basis_is_orthonormal_and_in_the_stated_order(p: int) -> None:
    basis = fourier.fourier_basis(p)
    np.testing.assert_allclose(basis @ basis.T, np.eye(p), atol=1e-12)
    k = (p - 1) // 2
    cosine, sine = np.cos(2 * np.pi * k * np.arange(p) / p), np.sin(2 * np.pi * k * np.arange(p) / p)
    np.testing.assert_allclose(basis[2 * k - 1], cosine * np.sqrt(2 / p), atol=1e-12)
    np.testing.assert_allclose(basis[2 * k], sine * np.sqrt(2 / p), atol=1e-12)


@pytest.mark.parametrize("k", [1, 4, 11])
def test_a_pure_wave_in_the_sum_is_all_restricted_and_none_excluded(k: int) -> None:
    a, b, c = np.meshgrid(np.arange(P), np.arange(P), np.arange(P), indexing="ij")
    in_sum = np.cos(2 * np.pi * k * (a + b - c) / P).reshape(P * P, P)
    np.testing.assert_allclose(fourier.restricted_logits(in_sum, (k,)), in_sum, atol=1e-9)
    np.testing.assert_allclose(fourier.excluded_logits(in_sum, (k,)), 0, atol=1e-9)
    assert fourier.logit_r2(in_sum, (k,)) == pytest.approx(1)
    # The controls: a wave in the difference, and another frequency, are left alone.
    for other in (np.cos(2 * np.pi * k * (a - b - c) / P), np.cos(2 * np.pi * (k % 11 + 1) * (a + b - c) / P)):
        other = other.reshape(P * P, P)
        np.testing.assert_allclose(fourier.excluded_logits(other, (k,)), other, atol=1e-9)
        assert fourier.logit_r2(other, (k,)) == pytest.approx(0, abs=1e-12)


def test_restricted_logits_equal_the_slow_two_dimensional_transform() -> None:
    """Keep (cos_k x cos_k - sin_k x sin_k) and (sin_k x cos_k + cos_k x sin_k) in the 2-D DFT, add the mean."""
    rng, p, keys = np.random.default_rng(0), 7, (1, 3)
    logits = rng.normal(size=(p * p, p))
    basis = fourier.fourier_basis(p)
    grid = logits.reshape(p, p, p)
    expected = np.zeros_like(grid) + grid.mean((0, 1))
    for k in keys:
        cos, sin = basis[2 * k - 1], basis[2 * k]
        for pattern in (np.outer(cos, cos) - np.outer(sin, sin), np.outer(sin, cos) + np.outer(cos, sin)):
            pattern = pattern / np.sqrt(2)
            expected += pattern[:, :, None] * np.einsum("ab,abc->c", pattern, grid)
    np.testing.assert_allclose(fourier.restricted_logits(logits, keys), expected.reshape(p * p, p), atol=1e-12)


def test_fve_is_the_r2_of_a_regression_on_the_frequencys_nine_products() -> None:
    rng, p = np.random.default_rng(1), 11
    activations = np.maximum(rng.normal(size=(p * p, 4)), 0)
    fve = fourier.neuron_fve(activations, p)
    basis = fourier.fourier_basis(p)
    for k in range(1, 6):
        rows = basis[[0, 2 * k - 1, 2 * k]]
        design = np.einsum("ia,jb->abij", rows, rows).reshape(p * p, 9)
        for n in range(4):
            y = activations[:, n] - activations[:, n].mean()
            residual = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
            assert fve[n, k - 1] == pytest.approx(1 - residual @ residual / (y @ y), abs=1e-10)
    for constant in (0.0, 0.1, 0.3):
        assert (fourier.neuron_fve(np.full((p * p, 1), constant), p) == 0).all()


def test_logit_r2_is_that_of_least_squares() -> None:
    rng, p, keys = np.random.default_rng(2), 7, (1, 2)
    total = np.add.outer(np.add.outer(np.arange(p), np.arange(p)).ravel(), -np.arange(p))
    logits = rng.normal(size=(p * p, p)) + 2 * np.cos(2 * np.pi * total / p) + rng.normal(size=(p * p, 1))
    y = (logits - logits.mean(1, keepdims=True)).ravel()
    design = np.stack([np.cos(2 * np.pi * k * total / p).ravel() for k in keys], axis=1)
    residual = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    assert fourier.logit_r2(logits, keys) == pytest.approx(1 - residual @ residual / (y @ y), abs=1e-12)


def test_gini_of_equal_single_and_known_values() -> None:
    assert fourier.gini(np.full(5, 3.0)) == pytest.approx(0)
    assert fourier.gini(np.array([0, 0, 0, 2.0])) == pytest.approx(3 / 4)
    assert fourier.gini(np.array([3.0, 1.0])) == pytest.approx(1 / 4)


def test_an_attention_only_model_is_refused() -> None:
    split = make_split(tiny_config().task, 0)
    model = build_model(tiny_config(model={"d_mlp": None}).model, split, 0)
    with pytest.raises(AnalysisError, match="attention-only"):
        analysis.prepare(model, split)


def test_all_pairs_come_in_order_with_their_side() -> None:
    split = make_split(tiny_config().task, 0)
    model = build_model(tiny_config().model, split, 0)
    logits, activations, is_train = analysis._on_all_pairs(model, split)
    assert is_train.sum() == len(split.train)
    for index in (0, 10, 33):
        a, b = divmod(index, 7)
        tokens = torch.tensor([[a, b, 7]])
        np.testing.assert_allclose(logits[index], model(tokens)[0, -1].detach().numpy(), rtol=1e-5, atol=1e-6)
        assert bool((split.train.tokens == tokens).all(1).any()) == bool(is_train[index])
    assert activations.shape == (49, 16)


@pytest.mark.parametrize("n_more", [1, 9])
def test_classes_beyond_the_residues_are_in_the_losses_and_in_no_wave(planted, n_more: int) -> None:
    """A model that may also answer "=": the same circuit, and some logits more."""
    config = ModelConfig(n_layers=1, d_model=12, n_heads=1, d_head=6, d_mlp=27, init_std=0.3, d_vocab_out=P + n_more)
    split = planted["split"]
    model = build_model(config, split, 0)
    own = dict(planted["model"].named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide = name.startswith("unembed")
            parameter[..., :P].copy_(own[name]) if wide else parameter.copy_(own[name])
    facts = analysis.prepare(model, split)
    row = analysis.measure(model, split, None, facts)
    assert facts == planted["facts"]
    for name in ("logit_r2", "neuron_logit_spectrum", "gini_W_L", "embedding_spectrum"):
        np.testing.assert_allclose(row[name], planted["row"][name], rtol=1e-6, atol=1e-9)
    for name, side in (("train_loss", split.train), ("test_loss", split.test)):
        assert row[name] == pytest.approx(evaluate(model, side)[0], rel=1e-6)
        assert row[name] > planted["row"][name]  # what else may be said costs something
    assert row["excluded_loss"] > np.log(P) > 0.05 > row["restricted_loss"]
