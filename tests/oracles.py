"""Cases with exact answers, and small hand-built models whose inside is known."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from mechgrok import seeds
from mechgrok.config import LLCConfig, ModelConfig, RunConfig
from mechgrok.model import model_from_parameters
from mechgrok.tasks import make_split
from mechgrok.types import Split


def stationary_llc(curvature: np.ndarray, config: LLCConfig) -> float:
    """Long-run estimate on L = 1/2 sum h_i w_i^2 with full gradients, for samplers where it is exact.

    1/2 sum nbeta h_i var_i with var = 1 / (a (1 - step_size a / 4)) for sgld, its step-size bias included,
    and 1 / a for baoab and mala; a_i = nbeta h_i + localization.
    """
    a = config.nbeta * curvature + config.localization
    shrink = {"sgld": 1 - config.step_size * a / 4, "baoab": 1.0, "mala": 1.0}[config.sampler]
    return float(0.5 * np.sum(config.nbeta * curvature / (a * shrink)))


def stationary_variance_llc(curvature: np.ndarray, config: LLCConfig) -> float:
    """Long-run llc_variance on the same: nbeta^2 Var L = 1/2 sum (nbeta h_i var_i)^2, as L is of Gaussian w."""
    a = config.nbeta * curvature + config.localization
    shrink = {"sgld": 1 - config.step_size * a / 4, "baoab": 1.0, "mala": 1.0}[config.sampler]
    return float(0.5 * np.sum((config.nbeta * curvature / (a * shrink)) ** 2))


class Slope(torch.nn.Module):
    """L = g . w + 1/2 sum h_i w_i^2 + above, seen from w* = 0, where its gradient is g; the same for every example."""

    def __init__(self, gradient: Tensor, curvature: Tensor, above: float = 1.0):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros_like(curvature))
        self.gradient, self.curvature, self.above = gradient, curvature, above


def slope_loss(module: torch.nn.Module, x: Tensor) -> Tensor:
    return module.above + (module.w * (module.gradient + 0.5 * module.curvature * module.w)).sum() + 0.0 * x


class Quadratic(torch.nn.Module):
    """L = 1/2 sum h_i w_i^2 at its minimum, the same for every example."""

    def __init__(self, curvature: Tensor):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros_like(curvature))
        self.register_buffer("curvature", curvature)


def quadratic_loss(module: torch.nn.Module, x: Tensor) -> Tensor:
    return 0.5 * (module.curvature * module.w**2).sum() + 0.0 * x


def noisy_quadratic(n_params: int, n_examples: int, seed: int) -> tuple[Quadratic, Tensor, Callable[..., Tensor]]:
    """(module, centres, loss): L_i = 1/2 sum h_j (w_j - c_ij)^2, with gradient noise alike in every direction.

    The centres of each coordinate have mean 0 and variance (.3 / h_j)^2, so the mean loss is the
    Quadratic's plus an irreducible constant.
    """
    curvature = torch.logspace(-1, 1, n_params, dtype=torch.float64)
    centres = torch.randn(n_examples, n_params, generator=seeds.stream(seed, "centres"), dtype=torch.float64)
    centres = (centres - centres.mean(0)) / centres.std(0, correction=0) * 0.3 / curvature

    def loss(module: torch.nn.Module, centre: Tensor) -> Tensor:
        return 0.5 * (module.curvature * (module.w - centre) ** 2).sum(-1)

    return Quadratic(curvature), centres, loss


class QuarticWell(torch.nn.Module):
    """L = w^4 at its minimum: singular, with learning coefficient 1/4."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))


def quartic_loss(module: torch.nn.Module, x: Tensor) -> Tensor:
    return module.w**4 + 0.0 * x


def quartic_llc(config: LLCConfig) -> float:
    """nbeta E[w^4] under exp(-nbeta w^4 - localization / 2 w^2), by quadrature."""
    w = np.linspace(-3, 3, 200_001)
    density = np.exp(-config.nbeta * w**4 - config.localization / 2 * w**2)
    return float(config.nbeta * np.sum(w**4 * density) / np.sum(density))


def tiny_config(**changes: dict) -> RunConfig:
    """The whole path in a few seconds. Sections are updated key by key."""
    sections = {
        "task": {"name": "modular-addition", "p": 7, "train_fraction": 0.7, "split": "unordered"},
        "model": {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_head": 8, "d_mlp": 16, "init_std": 0.25},
        "train": {
            "n_steps": 40, "learning_rate": 5e-3, "weight_decay": 1.0, "betas": (0.9, 0.98),
            "n_checkpoints": 8, "n_threads": 1,
        },
        "llc": {
            "components": ("model", "heads"), "control_localization": 400.0, "n_threads": 1,
            "sampling": {
                "nbeta": 10.0, "step_size": 1e-3, "localization": 200.0,
                "n_chains": 2, "n_draws": 32, "n_burnin": 8, "batch_size": 8,
            },
        },
        "stages": {"n_posterior": 50},
        "analyses": {"names": ("grokking", "fourier", "ablation"), "n_null": 10},
    }  # fmt: skip
    for name, values in changes.items():
        sections[name] |= values
    return RunConfig.model_validate({"name": "tiny", "seed": 0, **sections})


def planted_fourier_model(p: int, keys: tuple[int, ...], n_phases: int = 9) -> tuple[HookedTransformer, Split]:
    """A HookedTransformer that adds mod p by the circle algorithm on the given frequencies.

    Attention is uniform and copies cos and sin of w_k a and w_k b to the last position; `n_phases`
    ReLU neurons per frequency read phase n theta and write phase 2 n theta (theta = 2 pi /
    n_phases); W_U reads cos and sin of w_k c. Exact for odd p and odd n_phases of 5 or more.
    """
    config = ModelConfig(
        n_layers=1, d_model=4 * len(keys), n_heads=1, d_head=2 * len(keys), d_mlp=n_phases * len(keys), init_std=1.0
    )
    task = tiny_config(task={"p": p}).task
    split = make_split(task, 0)
    model_shape = _zeros(config, split)
    residues = np.arange(p)
    theta = 2 * np.pi * np.arange(n_phases) / n_phases
    for i, k in enumerate(keys):
        wave = np.stack([np.cos(2 * np.pi * k * residues / p), np.sin(2 * np.pi * k * residues / p)])
        read, write = slice(4 * i, 4 * i + 2), slice(4 * i + 2, 4 * i + 4)
        neurons = slice(n_phases * i, n_phases * (i + 1))
        _put(model_shape["embed.W_E"][:p, read], wave.T)
        copied = torch.eye(2)
        model_shape["blocks.0.attn.W_V"][0, read, 2 * i : 2 * i + 2] = copied
        model_shape["blocks.0.attn.W_O"][0, 2 * i : 2 * i + 2, read] = copied
        _put(model_shape["blocks.0.mlp.W_in"][read, neurons], np.stack([np.cos(theta), np.sin(theta)]))
        _put(model_shape["blocks.0.mlp.W_out"][neurons, write], 20 * np.stack([np.cos(2 * theta), np.sin(2 * theta)]).T)
        _put(model_shape["unembed.W_U"][write, :], wave)
    return model_from_parameters(config, split, model_shape), split


def _zeros(config: ModelConfig, split: Split) -> dict[str, Tensor]:
    from mechgrok.model import build_model

    return {name: torch.zeros_like(q) for name, q in build_model(config, split, 0).named_parameters()}


def _put(target: Tensor, values: np.ndarray) -> None:
    target.copy_(torch.from_numpy(values).float())
