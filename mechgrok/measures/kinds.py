"""What could predict each target, where the task does not know: what the data themselves show."""

from dataclasses import replace

import numpy as np
import torch

from mechgrok.measures.multigrams import associated, closing_brackets, places
from mechgrok.types import Split

KINDS = ("other", "close", "ngram")


def with_kinds(split: Split) -> Split:
    """The split with a kind for every test target; as it is if it has them already.

    "close": closing brackets. "ngram": the target of an n-gram (source, token -> target) that the test data hold, by
    `measures.multigrams.associated`, where nothing earlier in the row repeats it. "other": all the rest. Ours.
    """
    if split.kinds is not None or not split.labels:
        return split
    seen = places(split.test, split.labels)
    inside = np.flatnonzero(seen.previous >= 0)
    found = associated(seen.previous[inside], seen.token[inside], seen.target[inside], contiguous=True)
    kinds = closing_brackets(split.labels)[split.test.targets].long() * KINDS.index("close")
    for where in found.values():
        at = inside[where]
        kinds[torch.from_numpy(seen.example[at]), torch.from_numpy(seen.pos[at])] = KINDS.index("ngram")
    return replace(split, kinds=kinds, kind_names=KINDS)
