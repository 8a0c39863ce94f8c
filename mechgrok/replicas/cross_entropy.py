"""Cross-entropy and its gradient from what the logits are made of; they are never all there at once."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechgrok.loops.entry import below, holds
from mechgrok.loops.kept import serves
from mechgrok.replicas import fused
from mechgrok.reproducible import without_denormals

BLOCK = 2**19  # logits at once: smaller blocks read the readout too often
FAR = -69.0  # a target whose logit lies further below the highest has next to none of the sum of all


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


def cross_entropy(
    x: Tensor, readout: Tensor, bias: Tensor, targets: Tensor, weights: Tensor, loops: bool = True
) -> tuple[Tensor, Tensor]:
    """(nats Float[replica, row], total Float[replica]) of the logits x readout + bias.

    total = sum over rows of weights nats, differentiable by x, readout and bias; nats are not. Where the
    target has most of the probability, its loss is -log1p(-p) with p the summed probability of all
    others, which float32 holds to its last digit however small it is.

    Args:
        x: Float[replica, row, d_model]; readout: Float[replica or 1, d_model, class]; bias: Float[replica or 1, class].
        targets: Int[chain, row]; weights: Float[chain, row]. Replicas are member-major: row m * n_chains + c.
        loops: whether compiled ones may be used.
    """
    return _CrossEntropy.apply(x, readout, bias, targets, weights, loops)


def low_rank_cross_entropy(
    z: Tensor,
    readout: Tensor,
    scale: Tensor | None,
    bias: Tensor,
    frozen: Frozen,
    targets: Tensor,
    weights: Tensor,
    loops: bool = True,
) -> tuple[Tensor, Tensor]:
    """The same of the logits scale (frozen + z readout) + bias, differentiable by z, readout and scale.

    Args:
        z: Float[replica, row, rank]; readout: Float[replica, rank, class]; scale: Float[replica, row], None for 1.
        bias: Float[class], which does not move.
    """
    scale = z.new_ones(z.shape[:2]) if scale is None else scale
    return _LowRank.apply(z, readout, scale, bias, frozen, targets, weights, loops)


class _CrossEntropy(torch.autograd.Function):
    """The gradient is made in the forward pass, block by block, while the block's logits are in the cache."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, readout: Tensor, bias: Tensor, targets: Tensor, weights: Tensor, loops: bool
    ) -> tuple[Tensor, Tensor]:
        shape, n_classes = x.shape, readout.shape[-1]
        moving = len(readout) > 1, len(bias) > 1
        every_weight = weights.repeat(len(x) // len(weights), 1)
        if not any(moving):  # one readout serves all replicas, so their rows are those of one, in long products
            targets = targets.repeat(len(x) // len(targets), 1).view(1, -1)
            x, weights = x.flatten(0, 1)[None], every_weight.view(1, -1)
        n_chains, n_rows = targets.shape
        nats, dx = x.new_empty(x.shape[:2]), torch.empty_like(x)
        dreadout = torch.zeros_like(readout) if ctx.needs_input_grad[1] else None
        dbias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        buffer = x.new_empty(min(n_rows, _rows(n_classes)) * n_classes)
        same = x.new_ones(n_rows)
        for replica in range(len(x)):
            matrix, offset = readout[replica * moving[0]], bias[replica * moving[1]]
            for rows in _slices(n_rows, _rows(n_classes)):
                own = x[replica, rows]
                grad = torch.mm(own, matrix, out=buffer[: len(own) * n_classes].view(len(own), n_classes))
                target, each = (part[replica % n_chains, rows] for part in (targets, weights))
                nats[replica, rows], _ = _softmax(grad, same[rows], offset, target, each, loops)
                if not any(ctx.needs_input_grad[:3]):
                    continue
                torch.mm(grad, matrix.T, out=dx[replica, rows])
                if dreadout is not None:
                    dreadout[replica * moving[0]].addmm_(own.T, grad)
                if dbias is not None:
                    dbias[replica * moving[1]] += grad.sum(0)
        ctx.gradients = (dx.view(shape), dreadout, dbias)
        nats = nats.view(shape[:2])
        ctx.mark_non_differentiable(nats)
        return nats, (nats * every_weight).sum(1)

    @staticmethod
    def backward(ctx: Any, _: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        return *(_times(gradient, dtotal) for gradient in ctx.gradients), None, None, None


class _LowRank(torch.autograd.Function):
    """One product: [z, -before] [readout; before_readout], beside what the replicas share."""

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
        loops: bool,
    ) -> tuple[Tensor, Tensor]:
        n_chains, n_rows = targets.shape
        n_classes, rank = readout.shape[-1], z.shape[-1]
        # [member, chain, ...]
        inner = torch.cat([z, -frozen.before], dim=2).unflatten(0, (-1, n_chains))
        z4, readout4, scale4 = (part.unflatten(0, (-1, n_chains)) for part in (z, readout, scale))
        nats, dz = z.new_empty(z4.shape[:3]), torch.empty_like(z4)
        dreadout, dscale = torch.zeros_like(readout4), torch.empty_like(scale4)
        n_members = len(z4)
        n_at_once = min(n_rows, _rows(n_classes))
        many = max(1, min(BLOCK // (n_classes * n_at_once), n_members))
        buffer = z.new_empty(many * n_at_once * n_classes)
        for chain in range(n_chains):
            outer = torch.cat([readout4[:, chain], frozen.before_readout], dim=1)
            for rows in _slices(n_rows, n_at_once):
                shared = frozen.base[chain, rows] @ frozen.readout
                for who in _slices(n_members, many):
                    own, matrix, by = inner[who, chain, rows], outer[who], scale4[who, chain, rows]
                    shape = (*own.shape[:2], n_classes)
                    grad = torch.baddbmm(shared, own, matrix, out=buffer[: math.prod(shape)].view(shape))
                    target = targets[chain, rows].expand(shape[:2])
                    factor = weights[chain, rows] * by
                    nats[who, chain, rows], along = _softmax(grad, by, bias[0], target, factor, loops)
                    if not any(ctx.needs_input_grad[:3]):
                        continue
                    dz[who, chain, rows] = torch.bmm(grad, matrix[:, :rank].transpose(1, 2))
                    dreadout[who, chain] += torch.bmm(own[..., :rank].transpose(1, 2), grad)
                    dscale[who, chain, rows] = along * weights[chain, rows]
        ctx.gradients = tuple(part.flatten(0, 1) for part in (dz, dreadout, dscale))
        nats = nats.flatten(0, 1)
        ctx.mark_non_differentiable(nats)
        return nats, (nats.unflatten(0, (-1, n_chains)) * weights).sum(2).flatten()

    @staticmethod
    def backward(ctx: Any, _: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        return *(_times(gradient, dtotal) for gradient in ctx.gradients), None, None, None, None, None


def _softmax(
    logits: Tensor, scale: Tensor, bias: Tensor, target: Tensor, factor: Tensor, loops: bool
) -> tuple[Tensor, Tensor]:
    """(nats, their derivative by scale), both Float[..., row], of the logits y = scale x + bias.

    `logits`, Float[..., row, class] and contiguous, holds x, and factor (softmax(y) - onehot(target)) afterwards.
    """
    if loops and serves(logits):
        others, away, along = (logits.new_empty(target.shape) for _ in range(3))
        given = (
            logits,
            scale.contiguous(),
            bias.contiguous(),
            target.contiguous(),
            factor.contiguous(),
            others,
            away,
            along,
        )
        n_rows, n_classes = target.numel(), bias.numel()
        holds("softmax", scale=(scale, n_rows), factor=(factor, n_rows), logits=(logits, n_rows * n_classes))
        below("softmax", target=(target, n_classes))
        with without_denormals():
            fused.softmax(*(part.detach().view(-1).numpy() for part in given))
    else:
        y = logits * scale[..., None] + bias
        at, top = target[..., None], y.amax(-1, keepdim=True)
        away = (y.gather(-1, at) - top)[..., 0]
        each = (y - top).exp_().scatter_(-1, at, 0.0)
        others = each.sum(-1)
        grad = each.scatter_(-1, at, -others[..., None]).mul_((1 / (others + away.exp()))[..., None])
        along = (logits * grad).sum(-1)
        torch.mul(grad, factor[..., None], out=logits)
    return nats_of(others, away), along


def nats_of(others: Tensor, away: Tensor) -> Tensor:
    """The loss, of the sum over all classes but the target of exp(y - top), and y - top of the target.

    Where the target has most of the probability this is log1p of something small, exact however small it is.
    """
    return torch.where(away > FAR, torch.log1p(others / away.exp()), others.log() - away)


def _rows(n_classes: int) -> int:
    return max(1, BLOCK // n_classes)


def _slices(n: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _times(gradient: Tensor | None, dtotal: Tensor) -> Tensor | None:
    """The gradient of a sum over replicas of dtotal total; shared parameters have none."""
    return None if gradient is None else gradient * dtotal.view(-1, *[1] * (gradient.ndim - 1))
