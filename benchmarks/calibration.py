"""Does `calibrate` recommend sane settings unaided? Four kinds of problem, one call each, nothing tuned between them.

    python -m benchmarks.calibration [--write docs/calibration.md]     # make bench-calibration

The small models are trained here, on three checkpoints each. Every recommendation is then held against something that
chose nothing: the known coefficient of the deep linear network, in the limit that no finite nbeta reaches, and
elsewhere devinterp's sgld at the same settings and the last checkpoint. It has no baoab, and sgld is hotter, by
1 / (1 - step_size a / 4) along a curvature a of U, which counts where the step size is the largest that baoab allows.
mala, a witness of sgld's kernel, then rejects nearly all steps.
"""

import time
from collections.abc import Sequence

import numpy as np
import torch

import mechgrok as mg
from benchmarks.small_models import attention_only, modular_addition, planted_sequences, sorting
from benchmarks.tables import asked_target, written
from tests.truth import deep_linear_case


def line(
    name: str,
    models: Sequence[tuple[int, torch.nn.Module]],
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
        # devinterp has no baoab; its sgld is hotter at curvature a of U, by 1 / (1 - step_size a / 4).
        other = {"sampler": "sgld", "n_draws": 200, "engine": "devinterp"}
        config = mg.LLCConfig(**(setting.model_dump() | other))
        theirs = mg.estimate_llc(models[-1][1], data, seed=1, config=config)
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


STEPS = (50, 300, 1000)
COLUMNS = (
    "problem", "sampler", "batch", "nbeta", "localization", "step size", "burn-in + draws", "sound",
    "LLC at the checkpoints", "held against", "reasons", "s",
)  # fmt: skip


def main() -> None:
    target = asked_target()
    start = time.time()
    torch.set_num_threads(1)
    models, train = modular_addition("modular-addition-quick", (30, 120, 400))
    planted, sorter = planted_sequences(), sorting()
    two_layers = attention_only(planted, 24, STEPS, n_layers=2, d_model=32, n_heads=4, d_head=8)
    one_layer = attention_only(sorter, 21, STEPS, n_layers=1, d_model=32, n_heads=2, d_head=16)
    linear = deep_linear_case((12, 16, 20, 14), 8)
    rows = [
        line(
            "deep linear network 12-16-20-14, rank 8", [(0, linear.module)], linear.tensors, None, "baoab", linear.lam,
            loss_fn=linear.loss_fn,
        ),
        line("modular addition (quick preset)", models, train, 64, "baoab", None),
        line("planted sequences, 2 layers", two_layers, planted, 64, "baoab", None),
        line("sorter, 1 layer", one_layer, sorter, 64, "baoab", None),
    ]  # fmt: skip
    written([("What was recommended", COLUMNS, rows)], __doc__ or "", time.time() - start, target)


if __name__ == "__main__":
    main()
