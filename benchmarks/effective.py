"""How many draws count: effective samples for each draw of each sampler at one setting, and whether they agree.

    python -m benchmarks.effective [--write docs/effective.md]

The models, data and settings of `benchmarks.speed`; a draw costs the same by any sampler. Effective samples are those
of the mean loss (Vehtari et al. 2021), the mean over the heads sampled, and the LLC is the mean over these heads. For
heads a tenth of the step size, in chains three times as long, is the witness: what a step size or a batch's heat adds
to an estimate is then a tenth of it.
"""

import time

import numpy as np
import torch
from transformer_lens import HookedTransformer

import mechgrok as mg
from benchmarks.speed import SHAPES, heads_of, targets
from benchmarks.tables import asked_target, written
from mechgrok.llc.estimate import estimate_group
from mechgrok.reproducible import reproducible
from mechgrok.types import Examples, LLCEstimate

N_CHAINS, N_DRAWS, N_BURNIN, N_HEADS = 8, 150, 30, 2
SAMPLERS = (("sgld", None), ("baoab", 0.0), ("baoab", 0.5), ("baoab", 0.8))
COLUMNS = ("what", "sampler", "LLC", "effective samples for each draw", "times sgld's")


def sampled(
    model: HookedTransformer,
    data: Examples,
    names: tuple[str, ...],
    sampler: str,
    momentum: float | None,
    settings: dict[str, float],
) -> list[LLCEstimate]:
    """The estimates of these components by a sampler, with its momentum if it has one."""
    given = {"n_chains": N_CHAINS, "n_draws": N_DRAWS, "n_burnin": N_BURNIN, "sampler": sampler} | settings
    config = mg.LLCConfig(**given, **({} if momentum is None else {"momentum": momentum}))
    with reproducible(1):
        return estimate_group(model, data, names, config=config, seed=0)


def mean_and_error(estimates: list[LLCEstimate]) -> tuple[float, float]:
    """Of the LLCs of heads, as if their errors were independent; they share their batches, though not their noise."""
    errors = [one.std_error for one in estimates]
    return float(np.mean([one.llc for one in estimates])), float(np.linalg.norm(errors) / len(errors))


def rows_of(shape_name: str) -> list[list[str]]:
    shape, rows = SHAPES[shape_name], []
    model, data = shape.make(shape.n_train)
    for target in targets(model):
        names = heads_of(model, target)[:N_HEADS]
        fine = {"step_size": shape.settings["step_size"] / 10, "n_draws": 3 * N_DRAWS, "n_burnin": 3 * N_BURNIN}
        asked = [(*sampler, shape.settings) for sampler in SAMPLERS]
        asked += [("baoab", 0.8, shape.settings | fine)] if target != "model" else []
        first = None
        for name, momentum, settings in asked:
            found = sampled(model, data, names, name, momentum, settings)
            share = float(np.mean([one.health.ess / one.losses.size for one in found]))
            first = share if first is None else first
            llc, error = mean_and_error(found)
            told = name if momentum is None else f"{name}, momentum {momentum}"
            told += ", a tenth of the step" if settings is not shape.settings else ""
            rows.append([target, told, f"{llc:.3f} ± {error:.3f}", f"{share:.2f}", f"{share / first:.1f}"])
            print(shape_name, *rows[-1], sep=" | ", flush=True)
    return rows


def main() -> None:
    target = asked_target()
    start = time.time()
    torch.set_num_threads(1)
    shapes = ("small", "modular-addition")  # the paper's would take hours on a core
    sections = [(f"{name}: {SHAPES[name].describe}", COLUMNS, rows_of(name)) for name in shapes]
    written(sections, __doc__ or "", time.time() - start, target)


if __name__ == "__main__":
    main()
