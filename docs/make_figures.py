"""The docs' pictures from a finished run: python docs/make_figures.py runs/modular-addition [name of the pictures]"""

import sys
from dataclasses import replace

from mechgrok import load_study, plotting
from mechgrok.stages import MIN_POINTS, smooth, stage_points


def main(path: str, name: str = "") -> None:
    """Draw the LLC of the model and of every head, with the stages."""
    study = load_study(path)
    enough = stage_points(study.curve).sum() >= MIN_POINTS
    fit = smooth(study.curve, study.config.stages, seed=study.config.seed) if enough else None
    curve = replace(study.curve, control=None)
    figures = {
        "llc": plotting.llc_figure(curve, study.stages, fit and (fit.steps, fit.mean, fit.sd)),
        "heads": plotting.components_figure(curve, study.stages),
    }
    for what, figure in figures.items():
        figure.savefig(f"docs/images/{name and name + '-'}{what}.png", dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
