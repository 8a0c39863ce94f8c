"""Does a potential compute what the module computes? Held against it at w* and away from it, before any draw."""

from collections.abc import Callable

import torch
from torch import Tensor

from mechgrok import seeds
from mechgrok.sampling.potential import Potential

N_ROWS = 4
ROUNDING = 1000  # units in the last place that two orders of the same sums may differ by, of losses of order 1
FELT = 10  # times the tolerance: a smaller change of the loss would not show whether the component is moved at all
STILL = 0.02  # how far a component is moved whose parameters are all zero
N_TRIES = 4

Losses = Callable[[Tensor], Tensor]  # theta Float[replica, param] -> the losses of a few examples, Float[replica, row]


def few_rows(n_examples: int) -> Tensor:
    """Numbers of a few examples, from first to last: Int[row]."""
    return torch.linspace(0, n_examples - 1, min(N_ROWS, n_examples)).long()


def tolerance(losses: Tensor, dtype: torch.dtype) -> float:
    """Nats by which two computations of these losses may differ in numbers of this kind."""
    return ROUNDING * torch.finfo(dtype).eps * max(1.0, float(losses.abs().max()))


@torch.no_grad()
def disagreement(potential: Potential, reference: Losses, rows: Tensor, name: str) -> str | None:
    """How the potential's losses of these examples differ from the reference's, in words; None but for rounding.

    At w* and at w* + s noise, for each member, with noise from the stream (0, "verify", name) and s the root mean
    square of its parameters: four times that and more where the loss does not feel it, a quarter and less where it
    leaves the finite numbers.
    """
    members = potential.anchor.reshape(-1, potential.anchor.shape[-1])
    rng = seeds.stream(0, "verify", name)
    noise = torch.randn(members.shape, generator=rng, dtype=torch.float64).to(members)
    size = members.square().mean(1, keepdim=True).sqrt()
    noise *= torch.where(size > 0, size, STILL)
    by, smaller = 1.0, False
    for _ in range(N_TRIES):
        theta = torch.stack([members, members + by * noise], dim=1).flatten(0, 1)
        wanted = reference(theta).double().unflatten(0, (-1, 2))
        finite = bool(wanted.isfinite().all())
        allowed = tolerance(wanted, members.dtype) if finite else 0.0
        if finite and (smaller or float((wanted[:, 1] - wanted[:, 0]).abs().amax(1).min()) > FELT * allowed):
            break
        smaller = smaller or not finite
        by *= 0.25 if smaller else 4.0
    if not finite:
        return "its losses leave the finite numbers near w*"
    index = rows.to(members.device).expand(2, -1)
    found = potential.losses(theta, index).double().unflatten(0, (-1, 2))
    away = (found - wanted).abs().amax((0, 2))
    for where, difference in (("w*", float(away[0])), ("a perturbed w", float(away[1]))):
        if not difference <= allowed:
            return f"its losses differ from the module's by {difference:.2g} nats at {where}"
    return None
