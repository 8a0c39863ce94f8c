"""Rows of tokens as examples of language: each token but the last is scored on the one that follows."""

import torch
from torch import Tensor

from mechgrok.types import Examples


def next_token_examples(tokens: Tensor) -> Examples:
    """Rows as examples: the target at position i is token i + 1; the last position is not scored."""
    targets, weights = torch.zeros_like(tokens), torch.ones(tokens.shape)
    targets[:, :-1] = tokens[:, 1:]
    weights[:, -1] = 0.0
    return Examples(tokens, targets, weights)
