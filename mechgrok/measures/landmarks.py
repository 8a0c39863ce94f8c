"""Landmarks of the loss, to stand beside the stages of the LLC. No stage is made from them."""

import numpy as np

SOLVED = 0.99


def landmarks(steps: np.ndarray, train_accuracy: np.ndarray, test_accuracy: np.ndarray) -> dict[str, float]:
    """{"memorized", "generalized"}: steps, NaN where it never comes. All arguments are [checkpoint].

    memorized: the first checkpoint with train accuracy >= .99; generalized: the first from which
    test accuracy stays >= .99.
    """
    memorized = steps[train_accuracy >= SOLVED]
    failing = steps[test_accuracy < SOLVED]
    generalized = steps[steps > failing[-1]] if len(failing) else steps
    return {
        "memorized": float(memorized[0]) if len(memorized) else float("nan"),
        "generalized": float(generalized[0]) if len(generalized) else float("nan"),
    }
