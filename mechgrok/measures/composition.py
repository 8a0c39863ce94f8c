"""K-, Q- and V-composition of pairs of heads, against that of random matrices of the same shapes."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformer_lens import FactoredMatrix, HookedTransformer
from transformer_lens.utilities.matrix import composition_scores as factored_composition

Mode = Literal["K", "Q", "V"]
MODES: tuple[Mode, ...] = ("K", "Q", "V")
N_RANDOM = 200  # random pairs behind a chance level: its mean is then known to 1 % or so


@dataclass(frozen=True)
class CompositionScores:
    """scores: Float64[layer, head, layer, head], earlier head first; NaN unless the first layer is the lower one, for
    pairs with a dead head, whose score is 0 / 0, and throughout where a weight is not finite. chance, spread: mean and
    standard deviation of the score of random matrices of the same shapes.
    """

    scores: Tensor
    chance: float
    spread: float

    @property
    def times_chance(self) -> Tensor:
        """Of the shape of `scores`: 1 for heads that have nothing to do with each other."""
        return self.scores / self.chance


@torch.no_grad()
def composition_scores(model: HookedTransformer, rng: torch.Generator) -> dict[Mode, CompositionScores]:
    """How much of what one head writes a later one reads as its keys, queries and values.

    |OV_1 M|_F / (|OV_1|_F |M|_F) with M = QK_2^T (K), QK_2 (Q), OV_2 (V): Elhage et al. 2021, by
    `HookedTransformer.all_composition_scores`, on the weights as they are. It knows no LayerNorm, no positions and no
    hooks. Heads that share keys and values have each those of their group.
    Chance is close to 1 / sqrt(d_model).
    """
    layer = torch.arange(model.cfg.n_layers)
    earlier = (layer[:, None] < layer)[:, None, :, None]
    writes = _alive(model.OV)
    finite = all(bool(torch.isfinite(weight).all()) for weight in (model.W_Q, model.W_K, model.W_V, model.W_O))
    found = {}
    for mode in MODES:
        reads = writes if mode == "V" else _alive(model.QK)
        meaningful = earlier & writes[:, :, None, None] & reads
        nothing = torch.full(meaningful.shape, float("nan"), dtype=torch.float64)
        scores = model.all_composition_scores(mode).double().where(meaningful, nothing) if finite else nothing
        found[mode] = CompositionScores(scores, *_random_composition(model, rng))
    return found


def _alive(matrix: FactoredMatrix) -> Tensor:
    """Bool[layer, head]: neither factor is zero, as those of a dead head are."""
    left, right = matrix.pair
    return (left.abs().amax((-2, -1)) > 0) & (right.abs().amax((-2, -1)) > 0)


def _random_composition(model: HookedTransformer, rng: torch.Generator) -> tuple[float, float]:
    """Mean and standard deviation of the score of N_RANDOM pairs of factored matrices of standard normals."""
    d_model, d_head = model.cfg.d_model, model.cfg.d_head

    def matrices() -> FactoredMatrix:
        left = torch.randn(N_RANDOM, d_model, d_head, generator=rng)
        return FactoredMatrix(left, torch.randn(N_RANDOM, d_head, d_model, generator=rng))

    scores = factored_composition(matrices(), matrices(), broadcast_dims=False)
    return float(scores.mean()), float(scores.std())
