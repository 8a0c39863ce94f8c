"""How numbers are computed: the same bits each time, products of a precision, and nothing too small to be normal."""

import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from importlib import metadata
from typing import Any

import torch

from mechgrok import seeds

PACKAGES = (
    "mechgrok",
    "torch",
    "transformer-lens",
    "numpy",
    "numba",
    "scikit-learn",
    "arviz-stats",
    "safetensors",
    "circuitsvis",
)
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def made_with() -> dict[str, str]:
    """The versions and the machine that the numbers of this process are made with."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}", **versions}


@contextmanager
def reproducible(n_threads: int) -> Iterator[None]:
    """Run the block on `n_threads` torch threads with deterministic kernels, then restore what was set.

    With two threads the gradient of an embedding otherwise differs from run to run in its last bits,
    which training then amplifies. A kernel that has no deterministic form raises RuntimeError. One thread also takes
    denormals as zero; of several torch would tell but the first, so that bits would hang on who computes what.
    """
    workspace = os.environ.get(WORKSPACE)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    os.environ.setdefault(WORKSPACE, ":4096:8")  # without it CUDA's products refuse to be deterministic
    torch.set_num_threads(n_threads)
    torch.use_deterministic_algorithms(True)
    # torch would write NaN into whatever is allocated before it is computed: a tenth of the time of a sampling step.
    memory.fill_uninitialized_memory = False
    try:
        with without_denormals() if n_threads == 1 else nullcontext():
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        memory.fill_uninitialized_memory = filled
        if workspace is None:
            os.environ.pop(WORKSPACE, None)


@contextmanager
def without_denormals() -> Iterator[None]:
    """Run the block, on this thread, with float32 numbers below 1.2e-38 taken as zero, then restore what was set.

    A softmax makes such numbers of whatever is far below its largest, and some processors (Intel's) take over a hundred
    cycles for an operation on one: attention to masked positions made sampling three to four times slower.
    """
    before = bool(torch.tensor(1e-40) * 1 == 0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


@contextmanager
def differentiable() -> Iterator[None]:
    """Run the block with gradients on, and inference mode and autocast off, then restore what was set.

    Notebooks are often under `torch.no_grad()`; a sampler needs gradients wherever it is called from.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Run the block with matrix products in a `precision` of `LLCConfig`, then restore what was set.

    "bfloat16" lets oneDNN make float32 products in bfloat16 and CUDA in TF32, where the hardware can. On a CPU
    that cannot, oneDNN then makes them in float32, by kernels that are up to twice as fast as those which torch
    takes by default (MKL's on AMD): so "float32" asks for them too, if a test shows them to be exact; and so does
    "int16", as torch's products are never that.
    """
    backends: Any = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    if name == "bfloat16":
        backends[0].fp32_precision, backends[1].fp32_precision = "bf16", "tf32"
    elif name in ("float32", "int16") and onednn_keeps_float32():
        backends[0].fp32_precision = "bf16"
    try:
        yield
    finally:
        for backend, own in zip(backends, before, strict=True):
            backend.fp32_precision = own


@cache
def onednn_keeps_float32() -> bool:
    """Whether oneDNN, allowed to use bfloat16, has float32's precision here, in products of several shapes."""
    rng = seeds.stream(0, "products")
    shapes = [((2048, 64), (64, 192)), ((96, 256), (256, 5000)), ((32, 64, 16), (32, 16, 64))]
    with matmul_precision("bfloat16"):
        for left, right in shapes:
            a, b = torch.randn(left, generator=rng), torch.randn(right, generator=rng)
            if float((a @ b - a.double() @ b.double()).abs().max()) > 1e-3:  # bfloat16 is off by .1
                return False
    return True
