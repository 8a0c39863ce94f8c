"""The same bits each time: fixed torch threads, and no kernel whose sums depend on who comes first."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def reproducible(n_threads: int) -> Iterator[None]:
    """Run the block on `n_threads` torch threads with deterministic kernels, then restore what was set.

    With two threads the gradient of an embedding otherwise differs from run to run in its last bits,
    which training then amplifies. A kernel that has no deterministic form raises RuntimeError.
    """
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(n_threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
