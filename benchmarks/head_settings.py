"""Do the heads of heads-planted keep their order at other sampling settings?

    python -m benchmarks.head_settings [--write docs/heads-settings.md]

All heads' wrLLCs of the preset's seed 0, which lies in runs/ or is run first, at some checkpoints, at the settings
that the preset has for heads and at others: three times nbeta, twice the localization, half the step size; and at
the model's, ten times the localization. An LLC that measures the loss, and not the localization, keeps its value;
where the loss hardly shapes the draws (saturation near 1, flagged from .5 on) it grows with nbeta. What clusters,
ranks and circuits read is the order of heads within a layer: the second table has it for the strongest induction
head of the final model, whose wdrLLC should be the first of its layer on rows full of repeats, and not on rows full
of n-grams. Where the model is no minimum chains run downhill, and an LLC is negative.
"""

import time
from collections.abc import Mapping

import numpy as np
from scipy.stats import spearmanr

from analyses import specialization
from benchmarks.head_seeds import N_WORKERS, finished
from benchmarks.tables import Section, asked_target, written
from mechgrok.components import head_layer, head_names
from mechgrok.config import LLCConfig
from mechgrok.llc.curve import estimate_units
from mechgrok.plan import sampled_examples
from mechgrok.types import Study

STEPS = (200, 1000, 2000, 3500)


def ranks(study: Study, settings: Mapping[str, LLCConfig]) -> Section:
    """Where the induction head's wdrLLC stands in its layer at the end, on other data."""
    step, config = STEPS[-1], study.config
    model = study.trajectory.model_at(step)
    (induction,) = specialization.prepare(model, study.split)["induction head"]
    rivals = [head for head in head_names(model) if head_layer(head) == head_layer(induction)]
    units = [(step, head, setting) for setting in settings.values() for head in rivals]
    rows = []
    for name in (specialization.REPEATS, specialization.NGRAMS):
        data = study.split.distributions[name]
        found = dict(estimate_units(study.trajectory, data, units, config.seed, N_WORKERS, config.llc.n_threads))
        for told, setting in settings.items():
            each = {head: found[step, head, setting] for head in rivals}
            order = [head for _, head in sorted((-one.llc, head) for head, one in each.items())]
            best = next(head for head in order if head != induction)
            llc, other = (f"{each[head].llc:.1f} ± {each[head].std_error:.1f}" for head in (induction, best))
            rows.append([name, told, induction, llc, str(1 + order.index(induction)), f"{best}: {other}"])
    columns = ("data", "settings", "head", "wdrLLC", f"rank of {len(rivals)}", "first of the others")
    return f"The induction head at step {step}, on other data", columns, rows


def main() -> None:
    began, target = time.time(), asked_target()
    study, _ = finished("heads-planted", 0, ("mechanisms",))
    own = study.config.llc.sampling_of("heads")
    settings: dict[str, LLCConfig] = {
        "the preset's": own,
        "three times nbeta": own.model_copy(update={"nbeta": 3 * own.nbeta}),
        "twice the localization": own.model_copy(update={"localization": 2 * own.localization}),
        "half the step": own.halved(),
        "the model's": study.config.llc.sampling,
    }
    heads = head_names(study.trajectory.model_at(STEPS[-1]))
    layer = np.array([head_layer(head) for head in heads])
    units = [(step, head, setting) for step in STEPS for setting in settings.values() for head in heads]
    examples = sampled_examples(study.config, study.split)
    work = estimate_units(study.trajectory, examples, units, study.config.seed, N_WORKERS, study.config.llc.n_threads)
    found = dict(work)
    rows = []
    for step in STEPS:
        before = np.array([found[step, head, own].llc for head in heads])
        for name, setting in settings.items():
            each = [found[step, head, setting] for head in heads]
            llc = np.array([one.llc for one in each])
            orders = [spearmanr(before[layer == at], llc[layer == at]).statistic for at in np.unique(layer)]
            rows.append(
                [
                    str(step), name, f"{np.median(llc / before):.2f}",
                    f"{np.median([one.std_error / one.llc for one in each]):.2f}",
                    f"{np.median([one.health.saturation for one in each]):.2f}",
                    f"{sum(one.health.saturated for one in each)} of {len(each)}",
                    *(f"{order:.2f}" for order in orders),
                ]
            )  # fmt: skip
    columns = (
        "step", "settings", "wrLLC, times the preset's (median head)", "relative standard error", "saturation",
        "saturated heads", *(f"rank correlation with the preset's, layer {at}" for at in np.unique(layer)),
    )  # fmt: skip
    tables = [("All heads on the training data", columns, rows), ranks(study, settings)]
    written(tables, __doc__ or "", time.time() - began, target)


if __name__ == "__main__":
    main()
