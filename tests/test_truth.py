"""The known coefficients of `tests.truth` against truths that do not share its formulas."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import linprog
from scipy.special import logsumexp
from torch.func import functional_call, jacrev

from tests import truth

LEARNING, OTHER, MASKED = truth.learning_cases(), truth.other_cases(), truth.masked_cases()
CASES = [*LEARNING, *OTHER, *MASKED]


def by_name(cases: Sequence[truth.Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


# Independent routes to lam and m: the partition function itself, and a count of its exponents.


def from_partition(log_z: Callable[[float], float], lowest: float = 40, highest: float = 200) -> tuple[float, float]:
    """(lam, m) fitted to log Z at log nbeta = T: -lam T + (m - 1) log T + a power series in 1 / T."""
    at = np.linspace(lowest, highest, 20)
    design = np.stack([at, np.log(at), *((lowest / at) ** j for j in range(6))], axis=1)
    scale = np.abs(design).max(0)
    fit = np.linalg.lstsq(design / scale, np.array([log_z(t) for t in at]), rcond=None)[0] / scale
    return -fit[0], fit[1] + 1


def product_partition(factors: Sequence[tuple[int, int]]) -> Callable[[float], float]:
    """log E exp(-e^T prod_j |g_j|^k_j) for standard Gaussians g_j in n_j dimensions, factors (n_j, k_j).

    The densities of k_j log |g_j| are convolved on a grid; all are analytic, so the trapezoid rule is exact.
    """
    step = 0.25
    v = np.arange(-500, 30, step)
    densities = [np.exp(n * v / k - np.exp(2 * v / k) / 2) for n, k in factors]
    total = densities[0]
    for density in densities[1:]:
        total = np.convolve(total, density) * step
    grid = len(factors) * v[0] + step * np.arange(len(total))
    return lambda t: math.log(total @ np.exp(-np.exp(np.minimum(t + grid, 50))))


def from_exponents(
    cost: Sequence[float], at_most: Sequence[tuple[Sequence[float], float]], n_free: int
) -> tuple[float, int]:
    """(lam, m) of the integral of nbeta^(-cost . v) dv over {row . v <= bound}, with v in units of log nbeta.

    lam is the least cost, and each dimension of the face that attains it gives a factor log nbeta. Of v, the first
    `n_free` are integrated over; the rest are bounds that the cost presses against their limits.
    """
    rows, bounds = np.array([row for row, _ in at_most], float), np.array([bound for _, bound in at_most], float)
    best = linprog(cost, rows, bounds, bounds=(None, None))
    spread: list[np.ndarray] = []
    rng = np.random.default_rng(0)
    while len(spread) < n_free:
        ahead = rng.normal(size=n_free)
        if spread:
            ahead -= np.linalg.pinv(spread) @ (np.array(spread) @ ahead)
        ahead = np.append(ahead, np.zeros(len(cost) - n_free))
        ends = [linprog(s * ahead, rows, bounds, [cost], [best.fun], (None, None)).x[:n_free] for s in (1, -1)]
        if ahead[:n_free] @ (ends[1] - ends[0]) < 1e-6:
            break
        spread.append(ends[1] - ends[0])
    return best.fun, 1 + len(spread)


def wishart_exponents(m: int, n: int, h: int) -> tuple[float, int]:
    """(lam, m) of reduced-rank regression with true map 0, from eigenvalues x_i = nbeta^-v_i of a Wishart matrix.

    One layer integrated out leaves E prod_i (1 + nbeta x_i)^(-M/2), the x_i with density
    prod x_i^((|N - H| - 1) / 2) prod_{i<j} |x_i - x_j|: v_i <= 1 costs (|N - H| + 1) / 2 + (how many x are smaller)
    and saves M / 2, each on its own.
    """
    costs = [abs(n - h) + 1 + 2 * n_smaller for n_smaller in range(min(n, h))]
    return sum(min(m, cost) for cost in costs) / 2, 1 + costs.count(m)


def narrow_exponents(widths: Sequence[int]) -> tuple[float, int]:
    """(lam, m) of a deep linear network of input width 2, all others at least 2, with true map 0.

    A layer with n rows acts on singular values s_1 >= s_2 as Q R diag(s), R a triangle of chi_n, Gaussian and
    chi_{n-1} entries: det = r_11 r_22 s_1 s_2, and the largest singular value is the largest of r_11 s_1, r_12 s_2
    and r_22 s_2 up to a bounded factor. Which one that is makes a polyhedron of exponents for each hidden layer.
    """
    n_layers = len(widths) - 1
    unit = np.eye(3 * n_layers)
    cost = np.concatenate([[n, 1, n - 1] for n in widths[1:]])
    charts = []
    for largest in itertools.product(range(3), repeat=n_layers - 1):
        at_most = [(-row, 0.0) for row in unit]
        v1 = v2 = np.zeros(3 * n_layers)
        for layer in range(n_layers):
            r11, r12, r22 = unit[3 * layer : 3 * layer + 3]
            entries = [r11 + v1, r12 + v2, r22 + v2]
            if layer == n_layers - 1:
                at_most += [(-entry, -0.5) for entry in entries]
                break
            at_most += [(entries[largest[layer]] - entry, 0.0) for entry in entries]
            v1, v2 = entries[largest[layer]], r11 + r22 + v1 + v2 - entries[largest[layer]]
        charts.append((at_most, linprog(cost, *map(np.array, zip(*at_most, strict=True)), bounds=(None, None)).fun))
    least = min(value for _, value in charts if value is not None)
    best = [at_most for at_most, value in charts if value is not None and value < least + 1e-9]
    return least, max(from_exponents(cost, at_most, len(cost))[1] for at_most in best)


def tanh_exponents(p: int) -> tuple[float, int]:
    """(lam, m) of sum_{k < p} (sum_h a_h b_h^(2k+1))^2, from the exponents x of b_j = nbeta^-x_1 + ... + nbeta^-x_j.

    With a integrated out det(1 + nbeta K)^(-1/2) is left, and by Cauchy-Binet its largest terms are
    nbeta^|J| prod_J b_j^2 prod_{i<j in J} (b_j - b_i)^2 (b_j + b_i)^2, products of sums of positive terms.
    """
    pairs = list(itertools.combinations(range(p + 1), 2))  # (i, j): b_j - b_i, where b_0 = 0
    n = p + len(pairs) + 1
    unit = np.eye(n)
    floor = {pair: unit[p + at] for at, pair in enumerate(pairs)}  # the exponent of b_j - b_i, bounded from above
    at_most = [(-unit[at], 0.0) for at in (*range(p), n - 1)]
    at_most += [(floor[i, j] - unit[at], 0.0) for i, j in pairs for at in range(i, j)]
    for size in range(1, p + 1):
        for subset in itertools.combinations(range(1, p + 1), size):
            minor = sum(floor[0, j] for j in subset)
            minor = minor + sum(floor[i, j] + floor[0, j] for i, j in itertools.combinations(subset, 2))
            at_most.append((-2 * minor - unit[n - 1], -float(size)))
    return from_exponents(unit[:p].sum(0) + unit[n - 1] / 2, at_most, p)


def hessian_rank(case: truth.Case) -> int:
    """The rank of J^T J, J the outputs' Jacobian in the sampled parameters, in float64."""
    own = {name: parameter.detach().double() for name, parameter in case.module.named_parameters()}
    x = case.tensors[0].double()
    sampled = dict.fromkeys(own) if case.component is None else case.component
    jacobian = jacrev(lambda parameters: functional_call(case.module, {**own, **parameters}, (x,)).flatten())(
        {name: own[name] for name in sampled}
    )
    flat = torch.cat(
        [jacobian[name].flatten(1) if mask is None else jacobian[name][:, mask] for name, mask in sampled.items()], 1
    )
    values = torch.linalg.eigvalsh(flat.T @ flat)
    large = values > 1e-7 * values[-1]
    assert (values[~large].abs() <= 1e-12 * values[-1]).all()  # no doubt about which are 0
    return int(large.sum())


# The formulas.


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 1), (3, 3, 1), (5, 2, 1), (2, 1, 6)])
def test_reduced_rank_regression_is_the_limit_of_its_partition_function(sizes: tuple[int, int, int]) -> None:
    # One hidden unit: |w2 w1^T|^2 = |w2|^2 |w1|^2. One output: |w2 W1|^2 = |w2|^2 chi^2 in the inputs' dimensions.
    m, n, h = sizes
    factors = [(m, 2), (n, 2)] if h == 1 else [(m, 2), (h, 2)]
    expected = truth.reduced_rank_regression(m, n, h, 0)
    assert from_partition(product_partition(factors)) == pytest.approx((expected.lam, expected.multiplicity), abs=1e-3)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 2, 2), (4, 2, 3), (5, 2, 3), (1, 4, 2)])
def test_reduced_rank_regression_of_two_hidden_units_is_the_limit_of_its_partition_function(
    sizes: tuple[int, int, int],
) -> None:
    m, n, h = sizes
    assert min(n, h) == 2
    step = 0.5
    u, s = np.meshgrid(np.arange(-260, 6, step), np.arange(-260, 40, step), sparse=True)
    log_z, log_rest = -np.logaddexp(0, -s), -np.logaddexp(0, s)  # eigenvalues e^u and e^u z, z = 1 / (1 + e^-s)
    measure = (max(n, h) - 3) / 2 * (2 * u + log_z) + 3 * u + log_z + 2 * log_rest - np.exp(u) * (1 + np.exp(log_z)) / 2

    def log_partition(t: float) -> float:
        return float(logsumexp(measure - m / 2 * (np.logaddexp(0, t + u) + np.logaddexp(0, t + u + log_z))))

    expected = truth.reduced_rank_regression(m, n, h, 0)
    assert from_partition(log_partition, 30, 120) == pytest.approx((expected.lam, expected.multiplicity), abs=3e-3)


def test_reduced_rank_regression_counts_the_eigenvalues_exponents() -> None:
    regimes = Counter()
    for m, n, h in itertools.product(range(1, 10), repeat=3):
        for r in range(min(m, n, h) + 1):
            lam, multiplicity = wishart_exponents(m - r, n - r, h - r)
            found = truth.reduced_rank_regression(m, n, h, r)
            assert (found.lam, found.multiplicity) == (r * (m + n - r) / 2 + lam, multiplicity)
            regimes[found.regime] += 1
    assert min(regimes.values()) > 100 and set(regimes) == {"1 even", "1 odd", "2", "3", "4"}


def test_reduced_rank_regression_by_hand() -> None:
    found = truth.reduced_rank_regression(1, 1, 1, 0)  # (w1 w2)^2
    assert found == truth.Learning(0.5, 2, "1 odd")
    assert truth.reduced_rank_regression(1, 1, 1, 1).lam == 0.5  # a hyperbola in the plane
    assert truth.reduced_rank_regression(1, 1, 2, 0) == truth.Learning(0.5, 1, "1 even")  # a quadric's cone
    assert truth.reduced_rank_regression(3, 5, 9, 0) == truth.Learning(7.5, 1, "4")  # the map itself is the parameter
    assert truth.reduced_rank_regression(2, 3, 2, 2).lam == 3.0  # every map of this shape: M N / 2


def test_deep_linear_with_one_hidden_layer_is_reduced_rank_regression() -> None:
    for m, n, h in itertools.product(range(1, 13), repeat=3):
        for r in range(min(m, n, h) + 1):
            deep, shallow = truth.deep_linear((m, h, n), r), truth.reduced_rank_regression(m, n, h, r)
            assert (deep.lam, deep.multiplicity) == (shallow.lam, shallow.multiplicity)


def test_deep_linear_of_scalars_and_of_one_matrix() -> None:
    for n_layers in range(1, 9):
        scalars = truth.deep_linear([1] * (n_layers + 1), 0)
        assert (scalars.lam, scalars.multiplicity) == (0.5, n_layers)
        scalars = truth.deep_linear([1] * (n_layers + 1), 1)
        assert (scalars.lam, scalars.multiplicity) == (0.5, 1)
    for m, n in itertools.product(range(1, 9), repeat=2):
        for r in range(min(m, n) + 1):
            assert truth.deep_linear((m, n), r) == truth.Learning(m * n / 2, 1, "l=1")


def test_deep_linear_through_one_unit_is_a_product_of_chi_squares() -> None:
    # |W_L ... W_1|^2 has the law of a product of independent chi^2 in the dimensions of the other widths.
    for n_widths in (3, 4, 5):
        for widths in itertools.product(range(1, 5), repeat=n_widths):
            if 1 in widths:
                rest = sorted(widths)[1:]
                found = truth.deep_linear(widths, 0)
                assert (found.lam, found.multiplicity) == (pytest.approx(min(rest) / 2), rest.count(min(rest)))


@pytest.mark.parametrize("widths", [(1, 1, 1, 1), (1, 1, 1, 1, 1), (2, 1, 3, 2), (3, 1, 3, 3), (1, 2, 4, 2, 3)])
def test_deep_linear_is_the_limit_of_its_partition_function(widths: tuple[int, ...]) -> None:
    expected = truth.deep_linear(widths, 0)
    log_z = product_partition([(n, 2) for n in sorted(widths)[1:]])
    assert from_partition(log_z) == pytest.approx((expected.lam, expected.multiplicity), abs=2e-2)


@pytest.mark.parametrize(
    "widths",
    [
        *((2, 2, 2), (2, 3, 4), (2, 2, 2, 2), (2, 3, 2, 2), (2, 2, 3, 2), (2, 2, 2, 3), (2, 2, 3, 3), (2, 3, 3, 3)),
        *((2, 3, 4, 3), (2, 4, 3, 5), (2, 2, 2, 2, 2), (2, 3, 2, 3, 4), (2, 3, 3, 3, 3)),
    ],
)
def test_deep_linear_counts_the_singular_values_exponents(widths: tuple[int, ...]) -> None:
    expected = truth.deep_linear(widths, 0)
    assert narrow_exponents(widths) == (pytest.approx(expected.lam), expected.multiplicity)


def test_normal_crossing() -> None:
    assert truth.normal_crossing((2, 2)) == truth.Learning(0.5, 2, "crossing")
    assert truth.normal_crossing((4, 2)) == truth.Learning(0.25, 1, "crossing")
    for k in ((2, 2), (2, 4), (4, 4, 4), (6, 2)):
        expected = truth.normal_crossing(k)
        log_z = product_partition([(1, power) for power in k])
        assert from_partition(log_z) == pytest.approx((expected.lam, expected.multiplicity), abs=5e-3)


@pytest.mark.parametrize("nbeta, localization", [(0.1, 1.0), (30.0, 1.0), (1e4, 10.0), (1e6, 300.0), (1e7, 0.01)])
@pytest.mark.parametrize("power", [2, 4, 6])
def test_normal_crossing_llc_against_adaptive_quadrature(power: int, nbeta: float, localization: float) -> None:
    def inner(u: float, moment: int) -> float:  # w1 integrated out: a Gaussian of precision localization + 2 nbeta y
        y = math.exp(power * u)
        precision = localization + 2 * nbeta * y
        return (
            (nbeta * y / precision) ** moment / math.sqrt(precision) * math.exp(u - localization / 2 * math.exp(2 * u))
        )

    ends = (-60.0, 0.5 * math.log(1400 / localization))
    cuts = np.linspace(*ends, 40)
    first, zeroth = (
        sum(quad(inner, a, b, (moment,), epsabs=0, epsrel=1e-10)[0] for a, b in itertools.pairwise(cuts))
        for moment in (1, 0)
    )
    for k in ((2, power), (power, 2)):
        assert truth.normal_crossing_llc(k, nbeta, localization) == pytest.approx(first / zeroth, rel=1e-7)


def test_normal_crossing_llc_on_a_plain_grid_and_in_the_limit() -> None:
    w = np.linspace(-9, 9, 1801)
    loss = 10 * np.outer(w**4, w**4)
    density = np.exp(-loss - 0.5 * (w[:, None] ** 2 + w**2))
    assert truth.normal_crossing_llc((4, 4), 10.0, 1.0) == pytest.approx(
        (loss * density).sum() / density.sum(), rel=1e-6
    )
    assert truth.normal_crossing_llc((2, 6), 1e30, 1.0) == pytest.approx(1 / 6, abs=1e-6)
    slow = [0.5 - truth.normal_crossing_llc((2, 2), nbeta, 1.0) for nbeta in (1e6, 1e12, 1e24)]
    assert [slow[0] / slow[1], slow[1] / slow[2]] == pytest.approx([2, 2], rel=0.15)  # (m - 1) / log nbeta


def test_tanh_zero_teacher() -> None:
    assert [truth.tanh_zero_teacher(p).lam for p in (1, 2, 3, 4, 9)] == pytest.approx([1 / 2, 2 / 3, 5 / 6, 1, 3 / 2])
    for p in range(1, 10):
        expected = truth.tanh_zero_teacher(p)
        assert tanh_exponents(p) == (pytest.approx(expected.lam), expected.multiplicity)


def test_tanh_zero_teacher_of_one_unit_is_the_limit_of_its_partition_function() -> None:
    x = truth.tanh_zero_case(1).tensors[0].double().numpy()
    u = np.arange(-260, 4, 0.1)
    log_mean = np.log((np.tanh(np.exp(u) * x) ** 2).mean(0))

    def log_z(t: float) -> float:
        return float(logsumexp(u - np.exp(2 * u) / 2 - 0.5 * np.logaddexp(0, t + log_mean)))

    assert from_partition(log_z) == pytest.approx((0.5, 2), abs=1e-2)


@pytest.mark.parametrize("sizes", [(2, 1, 1), (3, 2, 2), (4, 3, 1), (6, 4, 3), (3, 5, 2)])
def test_teachers_have_regular_directions_but_for_the_scalings(sizes: tuple[int, int, int]) -> None:
    assert truth.tanh_teacher_lam(*sizes) == hessian_rank(truth.tanh_case(*sizes)) / 2
    assert truth.relu_teacher_lam(*sizes) == hessian_rank(truth.relu_case(*sizes)) / 2
