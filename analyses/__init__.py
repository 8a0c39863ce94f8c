"""Analyses of a study, each tied to its stages: `analyses.run("fourier", study)`.

An analysis is a plain module with NAME, TASKS, `measure`, `conclude` and `plot` (and `prepare`, where
something is fixed from the final model). To add one, write it and name it in `REGISTRY`.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mechgrok.types import Report, Study

REGISTRY = (
    "grokking", "fourier", "ablation", "mechanisms", "head_types", "head_clusters", "induction_circuit", "multigrams",
    "multigram_circuit", "specialization",
)  # fmt: skip


def run(name: str, study: "Study", n_workers: int = 1) -> "Report":
    """See `analyses.contract.run`."""
    from analyses import contract  # it imports TransformerLens, which takes seconds

    return contract.run(name, study, n_workers)
