"""Fourier measures of a network for (a + b) mod p, p odd.

Basis F, [p, p], orthonormal: row 0 constant, rows 2k-1 and 2k the cosine and sine of frequency
k = 1 ... (p-1)/2, w_k = 2 pi k / p. All arrays over inputs are in the order a * p + b. The first p classes are the
residues; a model may have more, which no Fourier sum runs over. Formulas: Nanda et al. 2023 (arXiv:2301.05217); where
its text leaves a choice, it is named here.
"""

from math import isqrt

import numpy as np

FVE_CLUSTERED = 0.85  # a neuron above it counts as of one frequency (Nanda et al.)
KEY_SHARE = 0.25  # a key frequency has at least this share of the largest norm in W_L


def fourier_basis(p: int) -> np.ndarray:
    """F, [p, p]."""
    angle = 2 * np.pi * np.outer(np.arange(1, (p - 1) // 2 + 1), np.arange(p)) / p
    rows = np.stack([np.cos(angle), np.sin(angle)], axis=1).reshape(p - 1, p) * np.sqrt(2 / p)
    return np.vstack([np.full((1, p), 1 / np.sqrt(p)), rows])


def component_norms(matrix: np.ndarray) -> np.ndarray:
    """Norms of the p Fourier components of a map from residues, [p, d] -> [p]."""
    return np.linalg.norm(fourier_basis(len(matrix)) @ matrix, axis=1)


def frequency_norms(matrix: np.ndarray) -> np.ndarray:
    """Norms of the frequencies, cosine and sine together, constant left out: [p, d] -> [(p-1)/2]."""
    return np.linalg.norm(component_norms(matrix)[1:].reshape(-1, 2), axis=1)


def gini(values: np.ndarray) -> float:
    """Gini coefficient sum_i (2i - n - 1) x_(i) / (n sum x), x ascending, i from 1; NaN if all are 0.

    0 for equal values, 1 - 1/n for a single non-zero one (Hurley & Rickard 2009). Applied to the
    norms of all p components; whether the paper leaves the constant out is not published.
    """
    x = np.sort(values)
    n, total = len(x), float(x.sum())
    return float(np.sum((2 * np.arange(1, n + 1) - n - 1) * x)) / (n * total) if total > 0 else float("nan")


def key_frequencies(W_L: np.ndarray) -> tuple[int, ...]:
    """Frequencies whose norm in W_L [p, d_mlp] exceeds KEY_SHARE of the largest. The rule is ours.

    Take them from the final checkpoint for all: early ones have no frequencies of their own.
    """
    norms = frequency_norms(W_L)
    return tuple(int(k) + 1 for k in np.flatnonzero(norms > KEY_SHARE * norms.max()))


def neuron_fve(activations: np.ndarray, p: int) -> np.ndarray:
    """Fraction of each neuron's variance over inputs explained by each frequency: [p^2, neuron] -> [neuron, freq].

    Of the centred activations' 2-D Fourier coefficients, the squared sum over
    {const, cos k, sin k} x {const, cos k, sin k} by the squared sum over all. 0 for a constant neuron.
    """
    basis = fourier_basis(p)
    grid = (activations - activations.mean(0)).reshape(p, p, -1)
    power = np.einsum("fa,abn,gb->fgn", basis, grid, basis, optimize=True) ** 2
    total = power.sum((0, 1))
    blocks = [
        power[np.ix_([0, 2 * k - 1, 2 * k], [0, 2 * k - 1, 2 * k])].sum((0, 1)) for k in range(1, (p - 1) // 2 + 1)
    ]
    varies = total > 1e-12 * np.sum(activations**2, axis=0)  # beyond the rounding of a constant
    return np.where(varies[:, None], np.stack(blocks, axis=1) / np.where(varies, total, 1.0)[:, None], 0.0)


def sum_directions(key_freqs: tuple[int, ...], p: int) -> np.ndarray:
    """The 2 * n_keys orthonormal directions over inputs, cos and sin of w_k (a + b): [2 * n_keys, p^2].

    cos w_k(a+b) is (cos_k x cos_k - sin_k x sin_k) / sqrt 2, sin w_k(a+b) is
    (sin_k x cos_k + cos_k x sin_k) / sqrt 2, in the rows of F.
    """
    total = np.add.outer(np.arange(p), np.arange(p)).flatten()
    angle = 2 * np.pi * np.outer(key_freqs, total) / p
    return np.concatenate([np.cos(angle), np.sin(angle)]) * np.sqrt(2) / p


def restricted_logits(logits: np.ndarray, key_freqs: tuple[int, ...]) -> np.ndarray:
    """Only what the key frequencies say: P_S L + mean over inputs of L. logits: [p^2, class], of any classes."""
    directions = sum_directions(key_freqs, isqrt(len(logits)))
    return directions.T @ (directions @ logits) + logits.mean(0)


def excluded_logits(logits: np.ndarray, key_freqs: tuple[int, ...]) -> np.ndarray:
    """All but what the key frequencies say: L - P_S L, all keys at once. logits: [p^2, class], of any classes."""
    directions = sum_directions(key_freqs, isqrt(len(logits)))
    return logits - directions.T @ (directions @ logits)


def logit_r2(logits: np.ndarray, key_freqs: tuple[int, ...]) -> float:
    """R^2 of the least-squares fit of the logits on cos(w_k (a + b - c)), k in key_freqs.

    The logits of each input are centred over the residues c first, as the softmax does not see their
    mean and no cosine has one. The regressors are orthogonal, so each coefficient stands by itself. NaN where the
    logits of every input are all alike.

    Args:
        logits: [p^2, class]; those of the residues, the first p, are fitted.
    """
    p = isqrt(len(logits))
    centred = logits[:, :p] - logits[:, :p].mean(1, keepdims=True)
    total = np.add.outer(np.add.outer(np.arange(p), np.arange(p)).flatten(), -np.arange(p))
    explained = 0.0
    for k in key_freqs:
        wave = np.cos(2 * np.pi * k * total / p)
        explained += np.sum(wave * centred) ** 2 / np.sum(wave**2)
    total_square = float(np.sum(centred**2))
    return float(explained / total_square) if total_square > 0 else float("nan")


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Nats per input: [n, class], [n] -> [n]."""
    shifted = logits - logits.max(1, keepdims=True)
    return np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(targets)), targets]
