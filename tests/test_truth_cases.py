"""The cases of tests/truth.py: each stands at its optimum, and moves the parameters that it says it moves."""

import math
from collections import Counter

import torch
from torch import Tensor
from torch.func import functional_call

from mechgrok import seeds
from mechgrok.llc.problem import make_problem
from tests import truth
from tests.test_truth import CASES, LEARNING, MASKED, OTHER, by_name, hessian_rank, wishart_exponents


@by_name([case for case in CASES if case.regime.startswith(("tanh teacher", "relu teacher")) or ", layer" in case.name])
def test_regular_network_cases_have_half_the_rank_of_their_hessian(case: truth.Case) -> None:
    assert (case.lam, case.multiplicity) == (hessian_rank(case) / 2, 1)


@by_name([case for case in LEARNING if case.d < 300])
def test_linear_cases_have_the_regular_directions_of_their_rank(case: truth.Case) -> None:
    n_in, n_out = case.tensors[0].shape[1], case.tensors[1].shape[1]
    rank = int(case.name.rsplit(maxsplit=1)[1])
    assert hessian_rank(case) == rank * (n_in + n_out - rank)
    assert case.lam >= hessian_rank(case) / 2


@by_name(CASES)
def test_case_is_at_its_optimum_and_counts_its_parameters(case: truth.Case) -> None:
    problem = make_problem(case.module, case.tensors, case.component, loss_fn=case.loss_fn)
    assert problem.init_losses.shape == (len(case.tensors[0]),)
    assert problem.init_losses.abs().max() < 1e-10
    assert problem.component.n_params == case.d == len(problem.potential.anchor)
    assert 0 < case.lam <= case.d / 2
    assert all(tensor.dtype == torch.float32 for tensor in (*case.tensors, *case.module.parameters()))
    index = torch.arange(8)[None]
    losses, gradient = problem.potential.losses_and_grad(problem.potential.anchor[None], index)
    assert losses.shape == (1, 8) and float(losses.abs().max()) < 1e-10
    assert gradient.shape == (1, case.d) and float(gradient.abs().max()) < 1e-5


def moved(case: truth.Case, size: float) -> dict[str, Tensor]:
    rng = seeds.stream(0, "moved", case.name)
    own = {name: parameter.detach() for name, parameter in case.module.named_parameters()}
    return {name: q + size * torch.randn(q.shape, generator=rng) for name, q in own.items()}


@by_name([case for case in LEARNING if case.d < 2000])
def test_linear_losses_are_half_the_squared_distance_of_the_maps(case: truth.Case) -> None:
    x = case.tensors[0]
    assert len(x) >= 4 * x.shape[1] and len(x).bit_count() == 1
    torch.testing.assert_close(x.T @ x / len(x), torch.eye(x.shape[1]), atol=2e-6, rtol=0)
    parameters = moved(case, 0.3)
    product, own = torch.eye(x.shape[1]), torch.eye(x.shape[1])
    for name, weight in parameters.items():
        product, own = weight @ product, case.module.get_parameter(name).detach() @ own
    rank = int(case.name.rsplit(maxsplit=1)[1])
    diagonal = torch.zeros_like(own)
    diagonal[range(rank), range(rank)] = 1
    assert torch.equal(own, diagonal)
    with torch.no_grad():
        loss = case.loss_fn(lambda batch: functional_call(case.module, parameters, (batch,)), *case.tensors).mean()
    torch.testing.assert_close(loss, 0.5 * ((product - own) ** 2).sum(), rtol=1e-5, atol=0)


def test_frozen_crossing_is_one_variable_to_its_power() -> None:
    for k, frozen in (((2, 2), 0.7), ((4, 2), 0.7), ((6, 2), -1.5)):
        case = truth.crossing_case(k, frozen)
        problem = make_problem(case.module, case.tensors, case.component, loss_fn=case.loss_fn)
        w = torch.linspace(-1, 1, 21)[:, None]
        losses = problem.potential.losses(w, torch.zeros(21, 1, dtype=torch.int64))
        torch.testing.assert_close(losses, frozen ** k[1] * w ** k[0])
        assert (case.lam, case.multiplicity, case.d) == (1 / k[0], 1, 1)


def test_spare_units_are_a_regression_of_their_own() -> None:
    case = truth.reduced_rank_case(5, 5, 4, 1, spare_only=True)
    problem = make_problem(case.module, case.tensors, case.component, loss_fn=case.loss_fn)
    theta = torch.randn(1, case.d, generator=seeds.stream(0, "spare"))
    first, second = theta[0, :15].reshape(3, 5), theta[0, 15:].reshape(5, 3)
    loss = problem.potential.losses(theta, torch.arange(len(case.tensors[0]))[None]).mean()
    torch.testing.assert_close(loss, 0.5 * ((second @ first) ** 2).sum(), rtol=1e-5, atol=0)
    assert (case.lam, case.multiplicity) == wishart_exponents(5, 5, 3)


def test_the_cases_cover_what_they_should() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert len(LEARNING) >= 36
    shallow = Counter(case.regime for case in LEARNING if case.regime.startswith("reduced-rank"))
    assert set(shallow) == {f"reduced-rank {regime}" for regime in ("1 even", "1 odd", "2", "3", "4")}
    assert min(shallow.values()) >= 5
    deep = [case for case in LEARNING if case.regime.startswith("deep linear")]
    assert len(deep) >= 12 and {len(list(case.module.parameters())) for case in deep} == {3, 4, 5}
    decades = Counter(round(math.log10(case.d)) for case in deep)
    assert decades[2] == 3 and decades[6] == 2 and min(decades[power] for power in (3, 4, 5)) >= 3
    assert max(case.lam for case in deep) / min(case.lam for case in deep) > 1e3
    kinds = {"regular", "crossing", "reduced-rank", "deep linear", "tanh zero", "tanh teacher", "relu teacher"}
    for kind in kinds:
        assert any(case.regime.startswith(kind) and case.component is None for case in CASES), kind
        assert any(case.regime.startswith(kind) and case.regime.endswith("masked") for case in MASKED), kind
    assert all(case.component is not None for case in MASKED)
    assert all(case.component is None for case in (*LEARNING, *OTHER))
