"""How well each position is predicted: by where it stands, by its bigram, and by what made its target.

All losses are in nats. Positions are those of `Examples.tensors`: the last ones, from the first that is scored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from mechgrok.errors import ShapeError
from mechgrok.measures.needs import check_causal, check_fits
from mechgrok.model import FwdHook, scored_logits, shares
from mechgrok.types import Examples

COUNTED = 4096  # rows at once
Window = tuple[int, int]  # positions [start, end), counted from the start of the row
Hooks = Callable[[slice], Sequence[FwdHook]]  # rows of the examples -> the hooks under which they run


@torch.no_grad()
def position_losses(
    model: HookedTransformer,
    examples: Examples,
    hooks: Hooks = lambda rows: (),
    resid: Tensor | None = None,
    start_at_layer: int | None = None,
) -> Tensor:
    """Cross-entropy of every scored position, unweighted, nats: Float64[example, scored].

    Where the weight is 0 the target has no meaning, and so has the loss. The model runs on `model.at_once` examples at
    a time, and of their logits the losses alone are kept: those of all rows would not fit the memory.

    Args:
        hooks: those of the run of some rows; they see the activations of these rows only.
        resid: [example, pos, d_model], what enters `start_at_layer`, where the run does not begin with the tokens.

    Raises:
        ShapeError: the model cannot read the tokens, or has no class for a target.
    """
    check_fits(model, examples)
    tokens, targets, _ = examples.tensors
    inputs = tokens if resid is None else resid
    losses = []
    for rows in shares(model, examples):
        logits = scored_logits(model, inputs[rows], targets.shape[1], hooks(rows), start_at_layer)
        losses.append(target_losses(logits, targets[rows]))
    return torch.cat(losses)


def target_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] in float64: [example, scored, class], [example, scored] -> [example, scored]."""
    return -logits.double().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def in_context_score(model: HookedTransformer, examples: Examples, early: Window, late: Window) -> float:
    """In-context learning score: mean loss over the late positions less that over the early ones, nats.

    Negative is good: the model predicts better with more context. Olsson et al. 2022 take single positions,
    the 500th less the 50th; the windows are ours, for short rows. Each mean is weighted by the examples' weights.

    Raises:
        ShapeError: a window is empty, leaves the row, or holds no scored position.
        MeasureError: positions see later ones, so that all have the same context.
    """
    check_causal(model, examples, "the in-context score")
    n_pos = examples.tokens.shape[1]
    _, targets, weights = examples.tensors
    losses, first = position_losses(model, examples), n_pos - targets.shape[1]

    def mean(window: Window) -> float:
        start, end = (max(position - first, 0) for position in window)
        inside = weights[:, start:end].double()
        if not 0 <= window[0] < window[1] <= n_pos or float(inside.sum()) == 0:
            raise ShapeError(f"no scored position in window {window} of rows of {n_pos}; choose one that has some")
        return float((losses[:, start:end] * inside).sum() / inside.sum())

    return mean(late) - mean(early)


@dataclass(frozen=True)
class BigramScore:
    """nats: mean cross-entropy between bigram rows and the model; floor: the entropy of those rows, its least value."""

    nats: float
    floor: float

    @property
    def excess(self) -> float:
        """KL divergence of the model from the bigram rows, nats: 0 for a pure bigram model."""
        return self.nats - self.floor


def bigram_table(examples: Examples, n_tokens: int, n_classes: int) -> Tensor:
    """How often each class followed each token where the examples score it: Float64[token, class], rows sum to 1.

    The row of a token that was never followed by anything is 0. Weights are taken as counts.
    """
    _, targets, weights = examples.tensors
    tokens = examples.tokens[:, -targets.shape[1] :]
    counts = torch.zeros(n_tokens * n_classes, dtype=torch.float64)
    for now, following, by in zip(*(of.split(COUNTED) for of in (tokens, targets, weights)), strict=True):
        counts.index_add_(0, (now * n_classes + following).flatten(), by.double().flatten())
    counts = counts.view(n_tokens, n_classes)
    return counts / counts.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


@torch.no_grad()
def bigram_score(model: HookedTransformer, examples: Examples, table: Tensor) -> BigramScore:
    """Mean over scored positions of -sum_c table[token, c] log p(c), with its floor -sum_c table log table.

    Hoogland et al. 2024 (arXiv 2402.02364) take one random position of each row; here every scored one counts,
    by its weight. Tokens without a row in the table are left out.
    """
    tokens, targets, weights = examples.tensors
    n_scored = targets.shape[1]
    seen = tokens[:, -n_scored:]
    known = weights.double() * (table.sum(1) > 0)[seen]
    entropy = -torch.special.xlogy(table, table).sum(1)
    nats = torch.cat(
        [
            -(table[seen[rows]] * scored_logits(model, tokens[rows], n_scored).double().log_softmax(-1)).sum(-1)
            for rows in shares(model, examples)
        ]
    )
    total = known.sum()
    return BigramScore(float((nats * known).sum() / total), float((entropy[seen] * known).sum() / total))


def losses_by_kind(
    model: HookedTransformer, examples: Examples, kinds: Tensor, kind_names: Sequence[str]
) -> dict[str, float]:
    """Mean loss of the targets of each kind, nats, NaN for a kind that never occurs: the n-gram score.

    Hoogland et al. divide the loss by that on the last token of an n-gram; where data are planted, the loss of each
    kind has a known floor and is reported as it is.

    Args:
        kinds: Int[example, pos], an index into `kind_names` for the target of every position.

    Raises:
        ShapeError: `kinds` has not the shape of the examples.
    """
    if kinds.shape != examples.tokens.shape:
        raise ShapeError(
            f"kinds must have the shape of tokens {tuple(examples.tokens.shape)}, got {tuple(kinds.shape)}"
        )
    losses = position_losses(model, examples)
    n_scored = losses.shape[1]
    weights, kinds = examples.weights[:, -n_scored:].double(), kinds[:, -n_scored:]
    means = {}
    for index, name in enumerate(kind_names):
        mine = weights * (kinds == index)
        means[name] = float((losses * mine).sum() / mine.sum())
    return means
