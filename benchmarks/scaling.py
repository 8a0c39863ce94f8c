"""How cost grows: heads of a layer, processes of a machine, and the floor that the arithmetic sets.

    python -m benchmarks.scaling [--write docs/scaling.md]     # part of make bench

CPU seconds on one torch thread. The floor of a head's step is its necessary floating-point operations at the rate
of a 96 x 64 x 5000 product, plus one exponential for each logit and score, both measured here. Necessary is what
depends on the head's parameters and the batch, as if all else were kept for all examples. Below the last layer
a head moves all that the later layers' heads see, so its cost grows with their number.
"""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from numba import njit
from transformer_lens import HookedTransformer

from benchmarks.small_models import attention_only, planted_sequences
from benchmarks.speed import SHAPES
from benchmarks.tables import asked_target, written
from mechgrok.llc.problem import GROUP
from mechgrok.loops.kept import OPTIONS
from mechgrok.loops.lanes import WIDTH, exp, load, store
from mechgrok.replicas.heads import LayerHeads
from mechgrok.reproducible import matmul_precision
from mechgrok.types import Examples

N_CHAINS, BATCH = 4, 32
N_HEADS = (4, 8, 16, 32, 64)
DEEP = {"n_layers": 12, "n_heads": 12, "d_model": 96, "d_head": 8}
DURATION = 15.0  # seconds by the clock


def model(n_heads: int, n_layers: int = 2, d_model: int = 64, d_head: int = 16) -> tuple[HookedTransformer, Examples]:
    data = planted_sequences(256, n_tokens=128, n_pos=64)
    shape = {"n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, "d_head": d_head}
    return attention_only(data, 128, (0,), **shape)[0][1], data


def seconds(work: Callable[[], object], repeats: int = 8) -> float:
    """The least CPU seconds of several calls, after one to warm up."""
    work()
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def per_head(network: HookedTransformer, data: Examples, layer: int, batch: int = BATCH) -> tuple[float, float]:
    """(CPU seconds, the floor) of one head's step in one chain."""
    n_heads = network.cfg.n_heads  # of which as many are sampled together as a run does
    potential = LayerHeads(network, data, layer, range(min(n_heads, GROUP)), memory=2e9)
    theta = potential.anchor.repeat_interleave(N_CHAINS, 0)
    index = torch.randint(len(data), (N_CHAINS, batch), generator=torch.Generator().manual_seed(0))
    with matmul_precision("float32"):
        spent = seconds(lambda: potential.losses_and_grad(theta, index)) / len(theta)
        return spent, floor(network, data, layer, index)


def floor(network: HookedTransformer, data: Examples, layer: int, index: torch.Tensor) -> float:
    """Of attention-only models, and of models with one layer."""
    cfg, batch, n_later = network.cfg, index.shape[1], network.cfg.n_layers - 1 - layer
    wide, rank = cfg.n_heads * cfg.d_head, cfg.d_head
    d_mlp, n_classes, normed = int(cfg.d_mlp or 0), cfg.d_vocab_out, cfg.normalization_type is not None
    scored_at = (data.weights > 0).any(0).nonzero().squeeze(1)
    asking = scored_at if n_later == 0 else torch.arange(data.tokens.shape[1])
    seen = torch.arange(int(asking.max()) + 1)
    rows, queries, scored = batch * len(seen), batch * len(asking), batch * len(scored_at)
    scores = batch * int((asking + 1).sum())  # causality allows no more

    def inputs(at: torch.Tensor) -> float:
        """How many rows there are to read: in the first layer those of one token and position are the same."""
        if layer > 0:
            return batch * len(at)
        alike = (data.tokens[index][:, :, at] + cfg.d_vocab * at).flatten(1)
        return sum(len(each.unique()) for each in alike) / len(index)

    def read(n_rows: int, width: int) -> float:
        """What reads the head, forwards and back, all else being kept: through the residual stream; or W_O W reads z,
        and there are the gradients by both.
        """
        return n_rows * width * min(2 * cfg.d_model, 3 * rank)

    write = rank * cfg.d_model  # a row of z W_O; the gradients by z and by W_O take as much each
    macs = 2 * cfg.d_model * rank * (inputs(asking) + 2 * inputs(seen)) + 6 * scores * rank  # q, k, v, their weights
    exponentials = scores * (1 + n_later * cfg.n_heads) + scored * n_classes
    readout = 2 * scored * cfg.d_model * n_classes
    if not cfg.attn_only:
        by_stream = 3 * queries * write + 2 * queries * d_mlp * cfg.d_model + readout
        by_both = 2 * queries * d_mlp * n_classes + read(scored, n_classes)  # W_out W_U, and the head beside the MLP
        macs += read(queries, d_mlp) + (by_stream if normed else min(by_stream, by_both))
    elif n_later == 0:
        macs += read(scored, n_classes) + (2 * scored * write if normed else 0)  # the norm, by inner products
    else:
        macs += read(rows, 3 * wide) + 3 * rows * write + 2 * rows * wide * cfg.d_model + readout
        macs += (n_later - 1) * 2 * rows * 4 * wide * cfg.d_model + n_later * 6 * scores * wide
    return 2 * macs / product_rate() + exponentials * exponential_time()


def product_rate() -> float:
    """Floating-point operations per second of a matrix product in the cache."""
    a, b, out = torch.randn(96, 64), torch.randn(64, 5000), torch.empty(96, 5000)
    return 2 * 96 * 64 * 5000 / seconds(lambda: torch.mm(a, b, out=out), 50)


@njit(**OPTIONS)
def _exponentials(x: np.ndarray, out: np.ndarray) -> None:
    for at in range(0, len(x), WIDTH):
        store(out, at, WIDTH, exp(load(x, at, WIDTH, np.float32(0))))


def exponential_time() -> float:
    """Seconds of one, by the passes' own, which is faster than torch's, of numbers in the first cache."""
    x, times = torch.randn(2**12).numpy(), 100
    out = np.empty_like(x)
    return seconds(lambda: [_exponentials(x, out) for _ in range(times)], 50) / len(x) / times


def steps_done(duration: float) -> int:
    """Steps of the last layer's heads within a time by the clock."""
    torch.set_num_threads(1)
    network, data = model(n_heads=4)
    potential = LayerHeads(network, data, 1, range(4), memory=2e9)
    theta = potential.anchor.repeat_interleave(N_CHAINS, 0)
    index = torch.randint(len(data), (N_CHAINS, BATCH), generator=torch.Generator().manual_seed(0))
    potential.losses_and_grad(theta, index)
    end, done = time.perf_counter() + duration, 0
    while time.perf_counter() < end:
        potential.losses_and_grad(theta, index)
        done += 1
    return done


COLUMNS = ("heads in a layer", "layer", "ms per head and step", "floor", "times the floor")


def row(network: HookedTransformer, data: Examples, layer: int, batch: int = BATCH) -> list[str]:
    spent, least = per_head(network, data, layer, batch)
    found = [str(network.cfg.n_heads), str(layer), f"{1e3 * spent:.2f}", f"{1e3 * least:.2f}", f"{spent / least:.1f}"]
    print(*found, flush=True)
    return found


def main() -> None:
    target = asked_target()
    start = time.time()
    torch.set_num_threads(1)
    rows = [row(*model(n_heads=n_heads), 1) for n_heads in N_HEADS]
    rows += [row(*model(n_heads=n_heads), 0) for n_heads in N_HEADS[:3:2]]
    layers = [row(*model(**DEEP), layer) for layer in (0, DEEP["n_layers"] // 2 - 1, DEEP["n_layers"] - 1)]
    addition = [row(*SHAPES["modular-addition"].make(0), 0, int(SHAPES["modular-addition"].settings["batch_size"]))]
    paper = [row(*SHAPES["paper"].make(0), layer) for layer in (1, 0)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        alone = sum(pool.map(steps_done, [DURATION]))
        together = sum(pool.map(steps_done, [DURATION, DURATION]))
    sections = [
        (
            "Heads: 2 layers, attention only, d_model 64, d_head 16, vocabulary 128, context 64, batch 32",
            COLUMNS,
            rows,
        ),
        (
            "Layers: 12 of 12 heads, attention only, d_model 96, d_head 8, vocabulary 128, context 64, batch 32",
            COLUMNS,
            layers,
        ),
        (SHAPES["modular-addition"].describe, COLUMNS, addition),
        (SHAPES["paper"].describe, COLUMNS, paper),
        (
            "Processes",
            ("processes", f"steps in {DURATION:g} s", "times one"),
            [["1", str(alone), "1"], ["2", str(together), f"{together / alone:.2f}"]],
        ),
    ]
    written(sections, __doc__ or "", time.time() - start, target)


if __name__ == "__main__":
    main()
