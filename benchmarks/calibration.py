"""Does `calibrate` recommend sane settings unaided? Four kinds of problem, one call each, nothing tuned between them.

    python -m benchmarks.calibration [--write docs/calibration.md]     # make bench-calibration

The small models are trained here, on three checkpoints each. Every recommendation is then held against something
that chose nothing: devinterp's sampler at the same settings where it has the sampler, and the known coefficient
of the deep linear network.
"""

import argparse
import time
from collections.abc import Sequence

import numpy as np
import torch

import mechgrok as mg
from benchmarks.tables import written
from mechgrok import seeds
from mechgrok.config import ModelConfig, load_config
from mechgrok.model import build_model, model_losses
from mechgrok.reproducible import reproducible
from mechgrok.tasks import make_split
from mechgrok.types import Examples, Split
from tests.truth import deep_linear_case

Checkpoints = list[tuple[int, torch.nn.Module]]


def next_token(tokens: torch.Tensor, scored_from: int = 0) -> Examples:
    """Every position from `scored_from` on predicts the next one."""
    weights = torch.ones(tokens.shape[0], tokens.shape[1] - 1)
    weights[:, :scored_from] = 0.0
    return Examples(tokens[:, :-1], tokens[:, 1:], weights)


def planted_sequences() -> Examples:
    """A sparse bigram chain over 24 tokens whose second half repeats the first: bigrams, then induction."""
    rng = seeds.stream(0, "planted")
    follow = torch.stack([torch.randperm(24, generator=rng)[:4] for _ in range(24)])
    tokens = torch.randint(24, (512, 1), generator=rng)
    for _ in range(15):
        pick = torch.randint(4, (512, 1), generator=rng)
        tokens = torch.cat([tokens, follow[tokens[:, -1]].gather(1, pick)], dim=1)
    return next_token(torch.cat([tokens, tokens], dim=1))


def sorting() -> Examples:
    """Five of 20 numbers without repeats, a separator, and the same in order; the sorted part is scored."""
    order = torch.rand(1024, 20, generator=seeds.stream(0, "sorting")).argsort(1)[:, :5]
    separator = torch.full((1024, 1), 20)
    return next_token(torch.cat([order, separator, order.sort(1).values], dim=1), scored_from=5)


def trained(examples: Examples, n_layers: int, n_heads: int, n_classes: int, steps: Sequence[int]) -> Checkpoints:
    """An attention-only transformer with LayerNorm at the given steps of AdamW."""
    shape = ModelConfig(
        n_layers=n_layers, d_model=32, n_heads=n_heads, d_head=32 // n_heads, normalization_type="LN", init_std=0.15
    )
    split = Split(examples, examples, tuple(map(str, range(n_classes))), n_classes)
    model, found = build_model(shape, split, 0), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    rng = seeds.stream(0, "batches")
    with reproducible(1):
        for step in range(max(steps) + 1):
            if step in steps:
                copy = build_model(shape, split, 0)
                copy.load_state_dict(model.state_dict())
                found.append((step, copy))
            batch = torch.randint(len(examples), (128,), generator=rng)
            optimizer.zero_grad()
            model_losses(model, *(tensor[batch] for tensor in examples.tensors)).mean().backward()
            optimizer.step()
    return found


def modular_addition() -> tuple[Checkpoints, Examples]:
    """The quick preset's model, in memory."""
    config = load_config("modular-addition-quick")
    split = make_split(config.task, config.seed)
    model, found = build_model(config.model, split, config.seed), []
    train = config.train
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=train.learning_rate, weight_decay=train.weight_decay, betas=train.betas
    )
    steps = (30, 120, train.n_steps)
    with reproducible(1):
        for step in range(train.n_steps + 1):
            if step in steps:
                copy = build_model(config.model, split, config.seed)
                copy.load_state_dict(model.state_dict())
                found.append((step, copy))
            optimizer.zero_grad()
            model_losses(model, *split.train.tensors).mean().backward()
            optimizer.step()
    return found, split.train


def line(
    name: str,
    models: Checkpoints,
    data: object,
    batch_size: int | None,
    sampler: str,
    truth: float | None,
    **more: object,
) -> list[str]:
    start = time.time()
    found = mg.calibrate(models, data, seed=0, sampler=sampler, batch_size=batch_size, n_workers=2, **more)
    setting = found.recommended
    llcs = ", ".join(f"{trial.estimate.llc:.3g} ± {trial.estimate.std_error:.2g}" for trial in found.final)
    if truth is not None:
        against = f"known: {truth:g}"
    else:
        last = found.final[-1].estimate
        theirs = mg.estimate_llc(
            models[-1][1], data, seed=1, config=mg.LLCConfig(**(setting.model_dump() | {"engine": "devinterp"}))
        )
        apart = abs(theirs.llc - last.llc) / np.hypot(theirs.std_error, last.std_error)
        against = f"devinterp: {theirs.llc:.3g} ± {theirs.std_error:.2g} ({apart:.1f} standard errors)"
    print(f"{name}: {setting}\n  " + "\n  ".join([*found.reasons, llcs, against]), flush=True)
    return [
        name,
        sampler,
        f"{batch_size or 'all'}",
        f"{setting.nbeta:g}",
        f"{setting.localization:g}",
        f"{setting.step_size:.2g}",
        f"{setting.n_burnin} + {setting.n_draws}",
        "yes" if found.sound else "**no**",
        llcs,
        against,
        "<br>".join(found.reasons),
        f"{time.time() - start:.0f}",
    ]


COLUMNS = (
    "problem", "sampler", "batch", "nbeta", "localization", "step size", "burn-in + draws", "sound",
    "LLC at the checkpoints", "held against", "reasons", "s",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", help="also write the table to this Markdown file")
    target = parser.parse_args().write
    start = time.time()
    torch.set_num_threads(1)
    models, train = modular_addition()
    planted, sorter = planted_sequences(), sorting()
    linear = deep_linear_case((12, 16, 20, 14), 8)
    rows = [
        line(
            "deep linear network 12-16-20-14, rank 8", [(0, linear.module)], linear.tensors, None, "baoab", linear.lam,
            loss_fn=linear.loss_fn,
        ),
        line("modular addition (quick preset)", models, train, 64, "sgld", None),
        line("planted sequences, 2 layers", trained(planted, 2, 4, 24, (50, 300, 1000)), planted, 64, "sgld", None),
        line("sorter, 1 layer", trained(sorter, 1, 2, 21, (50, 300, 1000)), sorter, 64, "sgld", None),
    ]  # fmt: skip
    written([("What was recommended", COLUMNS, rows)], __doc__ or "", time.time() - start, target)


if __name__ == "__main__":
    main()
