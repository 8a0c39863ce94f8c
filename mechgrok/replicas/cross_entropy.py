"""Cross-entropy and its gradient from what the logits are made of; they are never all there at once."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 2**19  # logits at once: smaller blocks read the readout too often
TINY = 1e-30  # a probability whose logarithm is taken from the logits instead


@dataclass(frozen=True)
class Frozen:
    """Logits that do not move: base readout - before before_readout, the first shared by a chain's replicas.

    base: Float[chain, row, d_model]; readout: Float[d_model, class].
    before: Float[replica, row, rank]; before_readout: Float[member, rank, class].
    """

    base: Tensor
    readout: Tensor
    before: Tensor
    before_readout: Tensor


def cross_entropy(x: Tensor, readout: Tensor, bias: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(nats Float[replica, row], total Float[replica]) of the logits x readout + bias.

    total = sum over rows of weights nats, differentiable by x, readout and bias; nats are not. Where the
    target has most of the probability, its loss is -log1p(-p) with p the summed probability of all
    others, which float32 holds to its last digit however small it is.

    Args:
        x: Float[replica, row, d_model]; readout: Float[replica or 1, d_model, class]; bias: Float[replica or 1, class].
        targets: Int[chain, row]; weights: Float[chain, row]. Replicas are member-major: row m * n_chains + c.
    """
    return _CrossEntropy.apply(x, readout, bias, targets, weights)


def low_rank_cross_entropy(
    z: Tensor, readout: Tensor, scale: Tensor | None, bias: Tensor, frozen: Frozen, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The same of the logits scale (frozen + z readout) + bias, differentiable by z, readout and scale.

    Args:
        z: Float[replica, row, rank]; readout: Float[replica, rank, class]; scale: Float[replica, row], None for 1.
        bias: Float[class], which does not move.
    """
    scale = z.new_ones(z.shape[:2]) if scale is None else scale
    return _LowRank.apply(z, readout, scale, bias, frozen, targets, weights)


class _CrossEntropy(torch.autograd.Function):
    """The gradient is made in the forward pass, block by block, while the block's logits are in the cache."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, readout: Tensor, bias: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        n_chains, n_rows = targets.shape
        n_classes = readout.shape[-1]
        nats, dx = x.new_empty(x.shape[:2]), torch.empty_like(x)
        moving = len(readout) > 1, len(bias) > 1
        dreadout = torch.zeros_like(readout) if ctx.needs_input_grad[1] else None
        dbias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        buffers = x.new_empty(2, min(n_rows, _rows(n_classes)) * n_classes)
        for replica in range(len(x)):
            matrix, offset = readout[replica * moving[0]], bias[replica * moving[1]]
            for rows in _slices(n_rows, _rows(n_classes)):
                own = x[replica, rows]
                logits, grad = buffers[:, : len(own) * n_classes].view(2, len(own), n_classes)
                torch.mm(own, matrix, out=logits).add_(offset)
                nats[replica, rows] = _softmax(logits, targets[replica % n_chains, rows, None], grad)
                if not any(ctx.needs_input_grad[:3]):
                    continue
                each = weights[replica % n_chains, rows, None]
                torch.mm(grad, matrix.T, out=dx[replica, rows]).mul_(each)
                if dreadout is not None:
                    dreadout[replica * moving[0]].addmm_((own * each).T, grad)
                if dbias is not None:
                    dbias[replica * moving[1]] += each[:, 0] @ grad
        ctx.gradients = (dx, dreadout, dbias)
        ctx.mark_non_differentiable(nats)
        return nats, (nats.unflatten(0, (-1, n_chains)) * weights).sum(2).flatten()

    @staticmethod
    def backward(ctx: Any, _: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        return *(_times(gradient, dtotal) for gradient in ctx.gradients), None, None


class _LowRank(torch.autograd.Function):
    """All in one product: [z, 1 / scale, -before] [readout; bias; before_readout] beside what the replicas share."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        readout: Tensor,
        scale: Tensor,
        bias: Tensor,
        frozen: Frozen,
        targets: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        n_chains, n_rows = targets.shape
        n_classes, rank = readout.shape[-1], z.shape[-1]
        # [member, chain, ...]
        inner = torch.cat([z, 1 / scale[..., None], -frozen.before], dim=2).unflatten(0, (-1, n_chains))
        z4, readout4, scale4 = (part.unflatten(0, (-1, n_chains)) for part in (z, readout, scale))
        nats, dz = z.new_empty(z4.shape[:3]), torch.empty_like(z4)
        dreadout, dscale = torch.zeros_like(readout4), torch.empty_like(scale4)
        n_members = len(z4)
        n_at_once = min(n_rows, _rows(n_classes))
        many = max(1, min(BLOCK // (n_classes * n_at_once), n_members))
        buffers = z.new_empty(2, many * n_at_once * n_classes)
        same = bias.expand(n_members, 1, -1)
        for chain in range(n_chains):
            outer = torch.cat([readout4[:, chain], same, frozen.before_readout], dim=1)
            for rows in _slices(n_rows, n_at_once):
                shared = frozen.base[chain, rows] @ frozen.readout
                for who in _slices(n_members, many):
                    own, matrix = inner[who, chain, rows], outer[who]
                    shape = (*own.shape[:2], n_classes)
                    logits, grad = buffers[:, : math.prod(shape)].view(2, *shape)
                    by = scale4[who, chain, rows, None]
                    torch.baddbmm(shared, own, matrix, out=logits).mul_(by)
                    target = targets[chain, rows].expand(shape[:2]).unsqueeze(-1)
                    nats[who, chain, rows] = _softmax(logits, target, grad)
                    if not any(ctx.needs_input_grad[:3]):
                        continue
                    # Rows are scaled where they are narrow, not where they are as wide as the vocabulary.
                    each = weights[chain, rows, None] * by
                    back = torch.bmm(grad, matrix[:, : rank + 1].transpose(1, 2))
                    dz[who, chain, rows] = back[..., :rank] * each
                    dreadout[who, chain] += torch.bmm((own[..., :rank] * each).transpose(1, 2), grad)
                    # d total / d scale is the sum over classes of grad (logits - bias) / scale; back ends in grad bias.
                    change = logits.mul_(grad).sum(-1) - back[..., rank]
                    dscale[who, chain, rows] = change * weights[chain, rows] / by[..., 0]
        ctx.gradients = tuple(part.flatten(0, 1) for part in (dz, dreadout, dscale))
        nats = nats.flatten(0, 1)
        ctx.mark_non_differentiable(nats)
        return nats, (nats.unflatten(0, (-1, n_chains)) * weights).sum(2).flatten()

    @staticmethod
    def backward(ctx: Any, _: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        return *(_times(gradient, dtotal) for gradient in ctx.gradients), None, None, None, None


def _softmax(logits: Tensor, target: Tensor, grad: Tensor) -> Tensor:
    """nats Float[..., row]; `grad` becomes softmax(logits) - onehot(target)."""
    torch.softmax(logits, -1, out=grad)
    own = grad.gather(-1, target).squeeze(-1)
    grad.scatter_(-1, target, 0.0)
    others = grad.sum(-1)
    far = -own.log()
    if own.is_cuda or bool((own < TINY).any()):  # a look that costs a GPU more than the sum that it spares
        log_z = logits.logsumexp(-1)
        far = torch.where(own < TINY, log_z - logits.gather(-1, target).squeeze(-1), far)
    grad.scatter_(-1, target, -others.unsqueeze(-1))
    return torch.where(own > 0.5, -torch.log1p(-others), far)


def _rows(n_classes: int) -> int:
    return max(1, BLOCK // n_classes)


def _slices(n: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _times(gradient: Tensor | None, dtotal: Tensor) -> Tensor | None:
    """The gradient of a sum over replicas of dtotal total; shared parameters have none."""
    return None if gradient is None else gradient * dtotal.view(-1, *[1] * (gradient.ndim - 1))
