"""Cases whose learning coefficient is known: the formulas, and modules at w* to estimate it on.

L(w*) = 0 in all of them. Under exp(-nbeta L - localization / 2 |w - w*|^2) with large nbeta,
-log Z = lam log nbeta - (m - 1) log log nbeta + O(1) and nbeta E[L] = lam - (m - 1) / log nbeta + ...,
where lam is the learning coefficient and m its multiplicity.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor
from torch.nn import Module

from mechgrok import seeds
from mechgrok.sampling.potential import LossFn
from tests.oracles import Quadratic, quadratic_loss

Masks = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Learning:
    """A learning coefficient, its multiplicity m, and which branch of the formula gave them."""

    lam: float
    multiplicity: int
    regime: str


def reduced_rank_regression(n_in: int, n_out: int, n_hidden: int, rank: int) -> Learning:
    """W2 W1 against a true map of rank r: M inputs, N outputs, H hidden units, r <= min(M, N, H).

    1. N + r <= M + H, M + r <= N + H, H + r <= M + N:
       lam = (-(H + r)^2 - M^2 - N^2 + 2 (H + r)(M + N) + 2 M N) / 8 and m = 1 where M + H + N + r is even;
       the same with + 1 inside the bracket and m = 2 where it is odd.
    m = 1 in 2. M + H < N + r: (HM - Hr + Nr) / 2; 3. N + H < M + r: (HN - Hr + Mr) / 2; 4. M + N < H + r: MN / 2.
    Aoyagi & Watanabe 2005, Stochastic complexities of reduced rank regression, Neural Networks 18:924, main theorem.
    """
    m, n, h, r = n_in, n_out, n_hidden, rank
    assert 0 <= r <= min(m, n, h)
    if m + h < n + r:
        return Learning((h * m - h * r + n * r) / 2, 1, "2")
    if n + h < m + r:
        return Learning((h * n - h * r + m * r) / 2, 1, "3")
    if m + n < h + r:
        return Learning(m * n / 2, 1, "4")
    odd = (m + h + n + r) % 2
    bracket = -((h + r) ** 2) - m**2 - n**2 + 2 * (h + r) * (m + n) + 2 * m * n + odd
    return Learning(bracket / 8, 1 + odd, "1 odd" if odd else "1 even")


def deep_linear(widths: Sequence[int], rank: int) -> Learning:
    """W_L ... W_1 against a true map of rank r; widths H_1 (input), ..., H_{L+1} (output). Regime: "l=" and l.

    M_i = H_i - r. Sigma holds l + 1 of the widths, with max M in Sigma < min M outside, sum M >= l max M and
    sum M < l min M outside, sums over Sigma. With a = sum M - (ceil(sum M / l) - 1) l,
    lam = (r (H_1 + H_{L+1}) - r^2) / 2 + a (l - a) / (4 l) - (l - 1) / (4 l) (sum M)^2 + 1/2 sum_{i<j} M_i M_j
    and m = a (l - a) + 1.
    Sigma is the longest prefix of the sorted M with sum >= l max: over the k + 1 smallest, sum - k max starts at
    min M (k = 1) and falls by k times the gap to the next M, so it turns negative once, and never inside a tie.
    Aoyagi 2024, Consideration on the learning efficiency of ... linear units, Neural Networks 172:106132, theorem 1.
    """
    assert len(widths) >= 2 and 0 <= rank <= min(widths)
    spare = sorted(width - rank for width in widths)
    n_layers = max(k for k in range(1, len(spare)) if sum(spare[: k + 1]) >= k * spare[k])
    inside, total = spare[: n_layers + 1], sum(spare[: n_layers + 1])
    a = total - (-(-total // n_layers) - 1) * n_layers
    regular = (rank * (widths[0] + widths[-1]) - rank**2) / 2
    pairs = (total**2 - sum(size**2 for size in inside)) / 4
    lam = regular + (a * (n_layers - a) - (n_layers - 1) * total**2) / (4 * n_layers) + pairs
    return Learning(lam, a * (n_layers - a) + 1, f"l={n_layers}")


def normal_crossing(k: Sequence[int]) -> Learning:
    """L = prod_j w_j^k_j, k even, at 0: lam = 1 / max k, and m is how many attain it. Watanabe 2009, chapter 2."""
    return Learning(1 / max(k), list(k).count(max(k)), "crossing")


def normal_crossing_llc(k: tuple[int, int], nbeta: float, localization: float) -> float:
    """nbeta E[L] under exp(-nbeta w1^k1 w2^k2 - localization / 2 |w|^2): what a perfect sampler finds.

    In u = log |w| the integrand is analytic and falls off exponentially (left) and faster (right), where the
    trapezoid rule converges exponentially; the left end is 40 below anything that matters.
    """
    right = 0.5 * math.log(1500 / localization)
    left = min(right, -(math.log(nbeta) + right * (sum(k) - min(k))) / min(k)) - 40
    u1, u2 = np.meshgrid(*[np.arange(left, right, 0.05)] * 2, sparse=True)
    scaled_loss = np.exp(np.minimum(math.log(nbeta) + k[0] * u1 + k[1] * u2, 50))
    log_density = u1 + u2 - scaled_loss - localization / 2 * (np.exp(2 * u1) + np.exp(2 * u2))
    return float((scaled_loss * softmax(log_density)).sum())


def tanh_zero_teacher(n_hidden: int) -> Learning:
    """sum_h a_h tanh(b_h x) with one input and output, no biases, true function 0, at a = b = 0.

    lam = (p + i^2 + i) / (4 i + 2) with i = floor(sqrt p), m = 2 where i^2 = p and 1 elsewhere.
    The loss is equivalent to sum_{k < p} (sum_h a_h b_h^(2k+1))^2.
    Aoyagi & Watanabe 2005, Resolution of singularities and the generalization error, IEICE Trans. J88-D-II:2112.
    """
    i = math.isqrt(n_hidden)
    return Learning((n_hidden + i**2 + i) / (4 * i + 2), 2 if i**2 == n_hidden else 1, "tanh zero")


def relu_teacher_lam(n_in: int, n_hidden: int, n_out: int) -> float:
    """A ReLU network without biases that is its own generic teacher, n_in >= 2: H (n_in + n_out - 1) / 2, m = 1.

    Near w* no example crosses a kink and the optima are the scalings (c b_h, a_h / c); across them the Hessian is
    regular: in sum_h C_h x 1[b_h x > 0] = 0 the jump at b_h x = 0 forces C_h = v b_h^T, the kinks then v = 0.
    """
    return n_hidden * (n_in + n_out - 1) / 2


def tanh_teacher_lam(n_in: int, n_hidden: int, n_out: int) -> float:
    """A tanh network without biases that is its own generic teacher: identifiable up to signs, d / 2, m = 1."""
    return n_hidden * (n_in + n_out) / 2


@dataclass(frozen=True)
class Case:
    """A module at w*, its data and loss per example; component: masks of the d sampled parameters, None for all."""

    name: str
    regime: str
    module: Module
    tensors: tuple[Tensor, ...]
    loss_fn: LossFn
    component: Masks | None
    lam: float
    multiplicity: int
    d: int


class DeepLinear(Module):
    """W_L ... W_1 x, each layer the identity on the first `rank` coordinates and 0 elsewhere."""

    def __init__(self, widths: Sequence[int], rank: int):
        super().__init__()
        kept = [torch.eye(after, before) * (torch.arange(before) < rank) for before, after in pairwise(widths)]
        self.layers = torch.nn.ParameterList(kept)

    def forward(self, x: Tensor) -> Tensor:
        return reduce(lambda x, weight: x @ weight.T, self.layers, x)


class TwoLayer(Module):
    """second @ activation(first @ x), no biases."""

    def __init__(self, first: Tensor, second: Tensor, activation: Callable[[Tensor], Tensor]):
        super().__init__()
        self.first, self.second = torch.nn.Parameter(first), torch.nn.Parameter(second)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x @ self.first.T) @ self.second.T


class Monomial(Module):
    """prod_j w_j^k_j."""

    def __init__(self, k: Sequence[int], at: Sequence[float]):
        super().__init__()
        self.k, self.w = tuple(k), torch.nn.Parameter(torch.tensor(at))

    def forward(self) -> Tensor:
        return math.prod(self.w[j] ** power for j, power in enumerate(self.k))


def squared_error(module: Module, x: Tensor, y: Tensor) -> Tensor:
    """1/2 |f(x) - y|^2 per example."""
    return 0.5 * ((module(x) - y) ** 2).sum(-1)


def monomial_loss(module: Module, x: Tensor) -> Tensor:
    """The monomial, the same for every example."""
    return module() + 0.0 * x


def whitened(n_in: int) -> Tensor:
    """x: Float[example, n_in] with x^T x / n = 1, so that mean 1/2 |W x|^2 is 1/2 |W|_F^2; n = 2^j >= 4 n_in."""
    n = max(64, 2 ** math.ceil(math.log2(4 * n_in)))
    gaussian = torch.randn(n, n_in, generator=seeds.stream(0, "whitened", n_in), dtype=torch.float64)
    return (torch.linalg.qr(gaussian).Q * math.sqrt(n)).float()


def regular(curvatures: Sequence[float], first: int | None = None) -> Case:
    """L = 1/2 sum h_i w_i^2, lam = d / 2; `first`: only so many of the coordinates move."""
    n, module = len(curvatures), Quadratic(torch.tensor(curvatures))
    case = _case(f"regular {n}", Learning(n / 2, 1, "regular"), module, (torch.zeros(256),), quadratic_loss)
    return case if first is None else _masked(case, f"first {first}", first / 2, {"w": torch.arange(n) < first})


def crossing_case(k: Sequence[int], frozen: float | None = None) -> Case:
    """L = prod w_j^k_j at 0. Where `frozen` is given all but w_0 are held there, and lam = 1 / k_0."""
    name, module = f"crossing {'-'.join(map(str, k))}", Monomial(k, [0.0] + [frozen or 0.0] * (len(k) - 1))
    case = _case(name, normal_crossing(k), module, (torch.zeros(256),), monomial_loss)
    return case if frozen is None else _masked(case, f"rest at {frozen}", 1 / k[0], {"w": torch.arange(len(k)) == 0})


def deep_linear_case(widths: Sequence[int], rank: int, layer: int | None = None) -> Case:
    """A deep linear network at the most singular of its optima, so that the local coefficient is the formula's.

    Around w* the first r coordinates make r (H_1 + H_{L+1} - r) regular directions (a Schur complement removes
    them); what is left is the product of the spare blocks, homogeneous in each and 0 at w*. Scaling them moves any
    optimum into every neighbourhood of w* with its coefficient unchanged, so none has a smaller one.
    `layer` samples that one alone: L = 1/2 |A (W_j - W_j*) B|^2 with A the layers after it and B those before, so
    lam = rank A rank B / 2, where a rank is r, or the full output or input width where there are no such layers.
    """
    case = _linear("deep linear", widths, rank, deep_linear(widths, rank))
    if layer is None:
        return case
    before = widths[0] if layer == 0 else rank
    after = widths[-1] if layer == len(widths) - 2 else rank
    return _masked(case, f"layer {layer}", before * after / 2, {f"layers.{layer}": None})


def reduced_rank_case(n_in: int, n_out: int, n_hidden: int, rank: int, spare_only: bool = False) -> Case:
    """Reduced-rank regression at its most singular optimum, as in `deep_linear_case`.

    `spare_only` samples the H - r hidden units that w* does not use, by masks that cut through both tensors: a
    reduced-rank regression with true map 0.
    """
    formula = reduced_rank_regression
    case = _linear("reduced-rank", (n_in, n_hidden, n_out), rank, formula(n_in, n_out, n_hidden, rank))
    if not spare_only:
        return case
    spare, rest = torch.arange(n_hidden) >= rank, formula(n_in, n_out, n_hidden - rank, 0)
    masks = {"layers.0": spare[:, None].repeat(1, n_in), "layers.1": spare.repeat(n_out, 1)}
    return _masked(case, "spare units", rest.lam, masks, rest.multiplicity)


def tanh_zero_case(n_hidden: int, units: int | None = None) -> Case:
    """The zero function learned by tanh units with one input, at 0; `units`: sample only the first so many."""
    module = TwoLayer(torch.zeros(n_hidden, 1), torch.zeros(1, n_hidden), torch.tanh)
    data = (torch.linspace(-3, 3, 64)[:, None], torch.zeros(64, 1))
    case = _case(f"tanh zero {n_hidden}", tanh_zero_teacher(n_hidden), module, data, squared_error)
    if units is None:
        return case
    sampled, fewer = torch.arange(n_hidden) < units, tanh_zero_teacher(units)
    masks = {"first": sampled[:, None], "second": sampled[None]}
    return _masked(case, f"first {units}", fewer.lam, masks, fewer.multiplicity)


def tanh_case(*sizes: int, layer: str | None = None) -> Case:
    """A tanh network at its own weights: inputs, hidden units, outputs; `layer` "first" or "second": that one alone."""
    return _teacher("tanh", tanh_teacher_lam(*sizes), sizes, layer)


def relu_case(*sizes: int, layer: str | None = None) -> Case:
    """A ReLU network, otherwise as `tanh_case`; one layer alone has no scaling left, so lam = d / 2."""
    return _teacher("relu", relu_teacher_lam(*sizes), sizes, layer)


def learning_cases() -> list[Case]:
    """Linear networks: five reduced-rank regressions in each regime, and deep ones of 90 to a million parameters."""
    shallow = [
        *((4, 4, 4, 0), (6, 6, 6, 2), (10, 8, 8, 4), (16, 12, 10, 2), (24, 20, 16, 4)),  # 1 even
        *((3, 2, 2, 0), (5, 5, 4, 1), (8, 9, 7, 3), (14, 11, 12, 6), (22, 24, 18, 1)),  # 1 odd
        *((2, 8, 3, 1), (3, 12, 4, 2), (4, 16, 6, 3), (5, 24, 8, 0), (8, 20, 6, 6)),  # 2
        *((9, 2, 3, 1), (14, 4, 5, 0), (18, 3, 6, 3), (20, 6, 8, 5), (24, 8, 10, 2)),  # 3
        *((2, 2, 6, 0), (3, 4, 9, 1), (4, 4, 14, 2), (5, 7, 20, 3), (6, 8, 24, 6)),  # 4
    ]
    deep = [
        *(((5, 6, 5, 6), 2), ((4, 5, 6, 5, 4), 1), ((2, 6, 5, 4, 4, 3), 0)),  # 1e2 parameters
        *(((12, 16, 20, 14), 4), ((15, 18, 15, 18, 15), 0), ((10, 20, 15, 15, 20, 10), 10), ((4, 24, 30, 8), 1)),  # 1e3
        *(((40, 60, 70, 50), 10), ((50, 50, 50, 50, 50), 0), ((32, 60, 40, 60, 60, 32), 24)),  # 1e4
        *(((64, 256, 200, 128), 20), ((100, 160, 150, 160, 200), 100), ((16, 128, 256, 128, 128, 16), 2)),  # 1e5
        *(((32, 600, 700, 800), 8), ((64, 560, 560, 560, 560), 48)),  # 1e6
    ]
    return [*(reduced_rank_case(*sizes) for sizes in shallow), *(deep_linear_case(*sizes) for sizes in deep)]


def other_cases() -> list[Case]:
    """Regular models, normal crossings, and networks with a nonlinearity."""
    return [
        *(regular([1.0]), regular([0.1, 0.3, 1.0, 3.0, 10.0]), regular([1.0] * 100)),
        *(crossing_case(k) for k in ((2, 2), (2, 4), (4, 2), (2, 6))),
        *(tanh_zero_case(p) for p in (1, 2, 3)),
        *(tanh_case(3, 2, 2), tanh_case(6, 4, 4), relu_case(3, 2, 2), relu_case(6, 4, 3), relu_case(12, 10, 8)),
    ]


def masked_cases() -> list[Case]:
    """Each kind with a part of its parameters sampled."""
    return [
        *(regular([0.1, 0.3, 1.0, 3.0, 10.0], 3), crossing_case((2, 2), 0.7)),
        *(crossing_case((4, 2), 0.7), crossing_case((6, 2), -1.5)),
        *(reduced_rank_case(*sizes, spare_only=True) for sizes in ((6, 6, 6, 2), (5, 5, 4, 1), (14, 4, 5, 2))),
        *(deep_linear_case((8, 6, 10), 3, layer) for layer in (0, 1)),
        *(deep_linear_case((12, 16, 20, 14), 4, layer) for layer in (0, 1, 2)),
        *(tanh_zero_case(4, 1), tanh_zero_case(4, 2)),
        *(case(6, 4, 3, layer=layer) for case in (tanh_case, relu_case) for layer in ("first", "second")),
    ]


def _case(name: str, learning: Learning, module: Module, tensors: tuple[Tensor, ...], loss_fn: LossFn) -> Case:
    d = sum(parameter.numel() for parameter in module.parameters())
    return Case(name, learning.regime, module, tensors, loss_fn, None, learning.lam, learning.multiplicity, d)


def _masked(case: Case, part: str, lam: float, masks: Masks, multiplicity: int = 1) -> Case:
    sizes = [case.module.get_parameter(key).numel() if mask is None else int(mask.sum()) for key, mask in masks.items()]
    names = {"name": f"{case.name}, {part}", "regime": f"{case.regime} masked"}
    return replace(case, **names, component=masks, lam=lam, multiplicity=multiplicity, d=sum(sizes))


def _linear(kind: str, widths: Sequence[int], rank: int, learning: Learning) -> Case:
    module, x = DeepLinear(widths, rank), whitened(widths[0])
    learning, name = replace(learning, regime=f"{kind} {learning.regime}"), f"{kind} {'-'.join(map(str, widths))}"
    return _case(f"{name} rank {rank}", learning, module, (x, module(x).detach()), squared_error)


def _teacher(activation: str, lam: float, sizes: tuple[int, ...], layer: str | None) -> Case:
    """Orthogonal input and output weights, as far as the sizes allow, for a well-conditioned Hessian."""
    (n_in, n_hidden, n_out), rng = sizes, seeds.stream(0, "teacher", *sizes)
    first = 1.5 * torch.nn.init.orthogonal_(torch.empty(n_hidden, n_in), generator=rng)
    second = torch.nn.init.orthogonal_(torch.empty(n_out, n_hidden), generator=rng) * math.sqrt(n_hidden / n_out)
    module, x = TwoLayer(first, second, getattr(torch, activation)), torch.randn(256, n_in, generator=rng)
    regime, data = f"{activation} teacher", (x, module(x).detach())
    case = _case(f"{regime} {'-'.join(map(str, sizes))}", Learning(lam, 1, regime), module, data, squared_error)
    if layer is None:
        return case
    return _masked(case, f"{layer} layer", module.get_parameter(layer).numel() / 2, {layer: None})
