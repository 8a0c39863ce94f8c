"""Does the main preset grok with a clean plateau? python -m benchmarks.grokking_seeds [n_seeds] [preset]

Trains the preset with seeds 0, 1, ... (split, weights and all) and prints when each memorizes, how
well it does on the test pairs then, and when it generalizes. About 100 CPU-seconds a seed.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from analyses.grokking import landmarks
from mechgrok.config import TrainConfig, load_config
from mechgrok.store import RunDirectory
from mechgrok.tasks import make_split
from mechgrok.train import train


def main(n_seeds: int = 10, preset: str = "modular-addition") -> None:
    base = load_config(preset)
    assert isinstance(base.train, TrainConfig)
    fine = base.train.model_copy(update={"n_checkpoints": 80, "n_threads": 1})
    print("seed  memorized  test accuracy then  generalized  final test accuracy")
    for seed in range(n_seeds):
        config = base.model_copy(update={"seed": seed, "train": fine})
        with tempfile.TemporaryDirectory() as folder:
            run = RunDirectory.create(Path(folder) / "run", config)
            trajectory = train(run, make_split(config.task, seed))
        names = ("train_accuracy", "test_accuracy")
        steps, (on_train, on_test) = np.array(trajectory.steps), map(trajectory.column, names)
        marks = landmarks(steps, on_train, on_test)
        then, final = np.interp(marks["memorized"], steps, on_test), on_test[-1]
        print(
            f"{seed:4}  {marks['memorized']:9.0f}  {then:18.3f}  {marks['generalized']:11.0f}  {final:19.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main(int((sys.argv[1:] or ["10"])[0]), (sys.argv[2:] or ["modular-addition"])[0])
