"""What compiled loops are entered with: they check nothing, so all that they index is looked at before each call."""

import numpy as np
import torch

Numbers = np.ndarray | torch.Tensor


class LoopError(RuntimeError):
    """A compiled loop would have gone beyond an array: a mistake of whoever calls it, and nothing was run."""


def holds(loop: str, **arrays: tuple[Numbers, int]) -> None:
    """Raise LoopError if an array has fewer numbers than the loop will index: name -> (array, how many)."""
    for name, (array, n) in arrays.items():
        size = array.numel() if isinstance(array, torch.Tensor) else array.size
        if size < n:
            raise LoopError(f"{loop}: {name} has {size} numbers where {n} will be indexed")


def below(loop: str, **indices: tuple[torch.Tensor, int]) -> None:
    """Raise LoopError if an index is negative or not below its limit: name -> (indices, limit)."""
    for name, (index, limit) in indices.items():
        if not index.numel():
            continue
        least, most = (int(end) for end in index.aminmax())
        if least < 0 or most >= limit:
            raise LoopError(f"{loop}: {name} has {least} ... {most} where there are {limit}")
