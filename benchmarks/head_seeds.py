"""Three seeds of heads-planted, each beside its control.

    python -m benchmarks.head_seeds [--write docs/heads-seeds.md]

A seed sets language, rows, weights and batches. Runs lie in runs/, and what is there already is not done again: about
14 minutes a seed on two cores, and 4 a control. A claim is made of the preset only if it holds for every seed, and not
by luck: where it is known how probable that is for one seed, for all of them it must be at most .05.
The control is the same training on a language in which segments hardly ever repeat. It has no induction, so its LLC is
read over the same steps, those between which induction forms in the seed's main run. "Holds by chance" is how probable
it is that a claim that no stage enters holds for a seed where nothing is to be found.
"""

import math
import time
from pathlib import Path

import numpy as np

import analyses
import mechgrok as mg
from analyses.contract import llc_at
from analyses.render import claim_row
from benchmarks.tables import Section, asked_target, written
from mechgrok.config import load_config
from mechgrok.types import Report, Study

SEEDS = (0, 1, 2)
N_WORKERS = 2


def finished(preset: str, seed: int, names: tuple[str, ...] = ()) -> tuple[Study, dict[str, Report]]:
    """The study, and the reports of these analyses, by default all of the preset's."""
    config = load_config(preset).model_copy(update={"seed": seed})
    study = mg.run(config, out=Path("runs") / f"{preset}-seed-{seed}", n_workers=N_WORKERS)
    return study, {name: analyses.run(name, study, N_WORKERS) for name in names or config.analyses.names}


def claims(seeds: list[dict[str, Report]]) -> Section:
    """Every claim with its value for each seed, and for how many it holds."""
    rows = []
    for name, first in seeds[0].items():
        for place, claim in enumerate(first.claims):
            each = [seed[name].claims[place] for seed in seeds]
            held = sum(one.holds for one in each)
            values = [f"{one.value:.3g}" if np.isfinite(one.value) else "–" for one in each]
            chances = dict.fromkeys(claim_row(one)["chance"] for one in each)
            threshold = f"{'≥' if claim.relation == '>=' else '≤'} {claim.threshold:.3g}"
            known = [one.chance for one in each if one.chance is not None]
            luck = math.prod(known) if len(known) == len(each) else 0.0
            verdict = "**claimed**"
            if held < len(each):
                verdict = f"holds for {held} of {len(each)}: not claimed"
            elif luck > 0.05:
                verdict = f"holds for all, by luck with probability {luck:.2g}: not claimed"
            # A head's name may stand in the text, so the first seed's stands for all.
            rows.append([name, claim.text, *values, threshold, ", ".join(chances), verdict])
    titles = ("analysis", "claim", *(f"seed {seed}" for seed in SEEDS), "threshold", "holds by chance", "")
    return ("Claims", titles, rows)


def dates(seeds: list[dict[str, Report]]) -> Section:
    """When the mechanisms come, with the two checkpoints around."""
    names = [key for key in seeds[0]["mechanisms"].derived if key.startswith("date of ")]

    def cell(report: Report, name: str) -> str:
        step, before, after = report.derived[name]
        return f"{step:.0f} [{before:.0f}, {after:.0f}]" if np.isfinite(step) else "never"

    rows = [[name.removeprefix("date of "), *(cell(seed["mechanisms"], name) for seed in seeds)] for name in names]
    return ("Dates of the mechanisms, in steps", ("mechanism", *(f"seed {seed}" for seed in SEEDS)), rows)


def against_control(studies: list[Study], reports: list[dict[str, Report]], controls: list[Study]) -> Section:
    """The model's LLC at both ends of the steps between which induction forms, here and in the control."""
    rows = []
    for seed, study, report, control in zip(SEEDS, studies, reports, controls, strict=True):
        start, end = report["mechanisms"].derived["induction window"]
        for name, of in (("heads-planted", study), ("control", control)):
            (before, error), (after, other) = llc_at(of.curve, "model", start), llc_at(of.curve, "model", end)
            change = f"{after - before:+.1f} ± {np.hypot(error, other):.1f}"
            rows.append([str(seed), f"{start:.0f} – {end:.0f}", name, f"{before:.1f}", f"{after:.1f}", change])
    return ("LLC of the model while induction forms", ("seed", "steps", "run", "LLC before", "after", "change"), rows)


def main() -> None:
    began = time.time()
    target = asked_target()
    main_runs = [finished("heads-planted", seed) for seed in SEEDS]
    control_runs = [finished("heads-planted-control", seed, ("mechanisms",)) for seed in SEEDS]
    studies, reports = [study for study, _ in main_runs], [report for _, report in main_runs]
    controls = [study for study, _ in control_runs]
    of_control = [report for _, report in control_runs]
    title, columns, rows = dates(of_control)
    sections = [
        dates(reports), (f"{title}: the control", columns, rows), against_control(studies, reports, controls),
        claims(reports),
    ]  # fmt: skip
    written(sections, __doc__ or "", time.time() - began, target)


if __name__ == "__main__":
    main()
