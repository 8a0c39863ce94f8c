"""The same bits each time: fixed torch threads, and no kernel whose sums depend on who comes first."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def reproducible(n_threads: int) -> Iterator[None]:
    """Run the block on `n_threads` torch threads with deterministic kernels, then restore what was set.

    With two threads the gradient of an embedding otherwise differs from run to run in its last bits,
    which training then amplifies. A kernel that has no deterministic form raises RuntimeError.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA's products refuse to be deterministic
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(n_threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Run the block with float32 matrix products made in bfloat16 where the hardware has it, if that is the name."""
    backends: Any = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    if name == "bfloat16":
        for backend, own in zip(backends, ("bf16", "tf32"), strict=True):
            backend.fp32_precision = own
    try:
        yield
    finally:
        for backend, own in zip(backends, before, strict=True):
            backend.fp32_precision = own
