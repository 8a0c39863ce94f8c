"""canonical-interp's sampler at the same settings, to time beside ours.

It samples whole models alone, all chains in one vmapped, compiled call on one batch. It needs Python 3.12:

    python3.12 -m venv .venv312
    .venv312/bin/pip install -c constraints.txt -e '.[dev]' canonical-interp==0.1.5 torchvision
    .venv312/bin/python -m benchmarks.speed --engines mechgrok canonical-interp
"""

import logging
import time
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformer_lens import HookedTransformer

from mechgrok.config import LLCConfig
from mechgrok.llc.problem import Problem
from mechgrok.sampling.chains import Draws
from mechgrok.types import Examples


def canonical_draws(problem: Problem, data: Examples, config: LLCConfig) -> tuple[Draws, float]:
    """Its draws, and CPU seconds of a step, from step to step: it compiles anew in each call, for much longer than it
    samples. Every scored position must weigh the same, as its loss knows of no weights.
    """
    from canonical_interp.slt import LLCEstimator

    tokens, targets, weights = data.tensors
    if not bool((weights == weights[0, 0]).all()):
        raise ValueError("canonical-interp's loss has no weights, and these differ")
    n_scored = targets.shape[1]

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits[:, -n_scored:].flatten(0, 1), target.flatten())

    clock: list[float] = []

    def unpack(batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        clock.append(time.process_time())
        return batch[0], batch[1]

    for block in cast(HookedTransformer, problem.module).blocks:
        block.attn.attn_scale = float(block.attn.attn_scale)  # a NumPy number, which torch.compile cannot follow
    logging.getLogger("canonical_interp.slt").setLevel(logging.ERROR)  # its advice on settings, and on GPUs
    estimator = LLCEstimator(
        draws=config.n_draws, chains=config.n_chains, burnin_steps=config.n_burnin, steps_bw_draws=1,
        learning_rate=config.step_size, localization=config.localization, nbeta=config.nbeta,
    )  # fmt: skip
    loader = DataLoader(TensorDataset(tokens, targets), batch_size=config.batch_size, shuffle=True, drop_last=True)
    estimator.estimate_llc(problem.module, loader, loss, seed=0, show_progress=False, unpack_fn=unpack)
    losses = estimator.array_log_l.double()
    ones = torch.ones(config.n_chains, dtype=torch.float64)
    draws = Draws(losses=losses, index=None, theta=torch.empty(0), acceptance=ones, observed=[])
    half = config.n_draws // 2  # the first steps compile too
    return draws, (clock[-1] - clock[-1 - half]) / half
