"""Clustering on curves whose groups are planted, and the permutation test against its nominal level."""

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.metrics import adjusted_rand_score

from mechgrok.measures.clustering import (
    MIN_POINTS,
    agreement,
    cluster,
    perturbed,
    resample,
    standardize,
    types_test,
)

STEPS = np.array([0, 1, 3, 7, 15, 31, 63, 127, 255, 511])  # log2(1 + step) = 0 ... 9
X = np.log2(1.0 + STEPS)
ONE = np.zeros(8, int)
TRUTH = np.array([0, 0, 0, 1, 1, 1, 1, 0])


def two_groups(noise: float = 0.05) -> np.ndarray:
    """Rising and rising-then-falling curves, by TRUTH."""
    curves = np.where(TRUTH[:, None] == 0, X, 9 - 2 * np.abs(X - 4.5))
    return curves + noise * np.random.default_rng(0).normal(size=curves.shape)


def everywhere(values: np.ndarray) -> np.ndarray:
    return np.ones(values.shape, bool)


def test_resampling_is_linear_in_log_steps_and_steps_over_unhealthy_points() -> None:
    values = np.stack([X, 2 * X])
    usable = everywhere(values)
    values[1, 4], usable[1, 4] = 1e9, False
    features = resample(STEPS, values, usable, n_grid=19)
    np.testing.assert_allclose(features, np.outer([1, 2], np.linspace(0, 9, 19)))


def test_resampling_extrapolates_nothing_and_leaves_out_heads_of_too_few_points() -> None:
    values = np.tile(X, (3, 1))
    usable = everywhere(values)
    usable[0, :2] = usable[1, -1] = False
    usable[2, : len(X) - MIN_POINTS + 1] = False  # one point less than is asked for, and all of them late
    features = resample(STEPS, values, usable, n_grid=7)
    np.testing.assert_allclose(features[:2], np.tile(np.linspace(2, 8, 7), (2, 1)))
    assert np.isnan(features[2]).all()
    assert np.isnan(resample(STEPS, values, ~everywhere(values))).all()


def test_standardizing_leaves_the_shape_alone() -> None:
    shape = standardize(np.stack([X, 7 - 3 * X, 5 + 0.1 * X, np.ones(10)]))
    np.testing.assert_allclose(shape[:3].std(1), 1)
    np.testing.assert_allclose(shape[0], -shape[1])
    np.testing.assert_allclose(shape[0], shape[2])
    assert (shape[3] == 0).all()


@pytest.mark.parametrize("method", ["K-means", "agglomerative"])
def test_two_planted_groups_are_found_as_two(method) -> None:
    features = resample(STEPS, two_groups(), everywhere(two_groups()))
    labels, silhouette = cluster(features, ONE, method, np.random.default_rng(0))
    assert labels.tolist() == TRUTH.tolist()  # numbered as they first occur
    assert (silhouette > 0.9).all()


@pytest.mark.parametrize("method", ["K-means", "agglomerative"])
def test_without_groups_the_silhouette_is_low(method) -> None:
    noise = np.random.default_rng(1).normal(size=(8, 50))
    assert cluster(noise, ONE, method, np.random.default_rng(0))[1].max() < 0.15


def test_groups_are_clustered_apart_and_one_of_few_heads_not_at_all() -> None:
    features = np.concatenate([two_groups(), two_groups() + 100, two_groups()[:3]])
    features[0] = np.nan
    groups = np.repeat([0, 1, 2], [8, 8, 3])
    labels, _ = cluster(features, groups, "K-means", np.random.default_rng(0))
    assert np.isnan(labels[0]) and np.isnan(labels[16:]).all()
    assert adjusted_rand_score(TRUTH[1:], labels[1:8]) == 1
    assert adjusted_rand_score(TRUTH, labels[8:16]) == 1


def test_heads_that_are_all_alike_are_in_no_cluster_and_two_kinds_of_them_are_in_two() -> None:
    assert np.isnan(cluster(np.ones((8, 5)), ONE, "K-means", np.random.default_rng(0))[0]).all()
    twice = np.repeat([[0.0, 1.0], [1.0, 0.0]], 4, axis=0)
    for method in ("K-means", "agglomerative"):
        labels, silhouette = cluster(twice, ONE, method, np.random.default_rng(0))
        assert len(set(labels)) == 2 and silhouette[0] == 1


def test_agreement_is_the_mean_over_groups_of_what_both_labellings_know() -> None:
    groups = np.repeat([0, 1], 4)
    ours = np.array([0, 0, 1, 1, 0, 0, 1, 1.0])
    other = np.array([1, 1, 0, 0, 0, 1, 0, 1.0])
    assert agreement(ours, ours, groups) == 1
    assert agreement(ours, other, groups) == pytest.approx((1 + adjusted_rand_score(ours[4:], other[4:])) / 2)
    other[4:] = np.nan
    assert agreement(ours, other, groups) == 1
    assert np.isnan(agreement(ours, np.full(8, np.nan), groups))


def test_stability_falls_as_the_errors_grow() -> None:
    curves = two_groups()
    rng = np.random.default_rng(2)

    def found(values: np.ndarray) -> np.ndarray:
        return cluster(resample(STEPS, values, everywhere(values)), ONE, "K-means", rng)[0]

    labels = found(curves)

    def stability(error: float) -> float:
        draws = perturbed(curves, np.full(curves.shape, error), 10, rng)
        return float(np.mean([agreement(found(draw), labels, ONE) for draw in draws]))

    none, small, large = (stability(error) for error in (0.0, 0.2, 20.0))
    assert none == small == 1
    assert large < 0.4


def test_the_index_is_scikit_learns_and_the_p_value_that_of_all_permutations() -> None:
    """Two pairs in four heads: of the 24 orders of the types, 8 give the same partition, so p is near 1/3."""
    labels, types = np.array([0, 0, 1, 1.0]), np.array([1, 1, 0, 0.0])
    index, _, p_value = types_test(labels, types, np.zeros(4), np.zeros(4), np.random.default_rng(0), 4000)
    assert index == 1
    assert p_value == pytest.approx(1 / 3, abs=0.03)
    rng = np.random.default_rng(3)
    for _ in range(20):
        labels, types = rng.integers(0, 3, (2, 12)).astype(float)
        index = types_test(labels, types, np.zeros(12), np.zeros(12), rng, 9)[0]
        assert index == pytest.approx(adjusted_rand_score(labels, types))


def test_types_that_are_permuted_are_found_at_the_nominal_rate() -> None:
    """400 tests at .2 and .05 on permuted types, within 99.9 % of the binomial; planted types are always found."""
    rng = np.random.default_rng(4)
    labels = np.repeat([0, 1, 2, 0, 1], 6).astype(float)
    strata = np.repeat([0, 1], 15)
    p_values = []
    for _ in range(400):
        types = rng.permutation(np.repeat([0, 1, 2], 10)).astype(float)
        p_values.append(types_test(labels, types, np.zeros(30), strata, rng, 199)[2])
    for level in (0.05, 0.2):
        low, high = binom.ppf([0.0005, 0.9995], 400, level) / 400
        assert low <= np.mean(np.array(p_values) <= level) <= high
    for seed in range(5):
        assert types_test(labels, labels, np.zeros(30), strata, np.random.default_rng(seed), 199)[2] == 1 / 200


def test_clusters_that_only_tell_the_layer_agree_with_types_that_only_tell_the_layer_no_more_than_chance() -> None:
    layers = np.repeat([0, 1], 8)
    labels = layers.astype(float)
    types = labels.copy()
    types[[3, 12]] = 2
    index, null_95, p_value = types_test(labels, types, np.zeros(16), layers, np.random.default_rng(0))
    assert index > 0.6 and null_95 == pytest.approx(index) and p_value == 1
    assert types_test(labels, types, np.zeros(16), np.zeros(16), np.random.default_rng(0))[2] < 0.01


def test_heads_of_unknown_type_do_not_count_and_too_few_heads_or_types_give_nan() -> None:
    labels, types = np.repeat([0.0, 1.0], 4), np.repeat([0.0, 1.0], 4)
    types[0] = np.nan
    zeros, rng = np.zeros(8), np.random.default_rng(0)
    assert types_test(labels, types, zeros, zeros, rng)[0] == 1
    types[1:5] = np.nan
    assert np.isnan(types_test(labels, types, zeros, zeros, rng)).all()  # three heads
    assert np.isnan(types_test(labels, zeros, zeros, zeros, rng)).all()  # one type
    assert np.isnan(types_test(zeros * np.nan, labels, zeros, zeros, rng)).all()  # no cluster
