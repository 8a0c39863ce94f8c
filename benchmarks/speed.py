"""Seconds per draw, beside devinterp: the same model, data and settings, one thread each.

    python -m benchmarks.speed [--shapes small modular-addition paper] [--engines mechgrok "plain path"]
        [--write docs/speed.md]     # part of make bench

CPU seconds of the sampling alone, for one replica and one step of it ("draw"), without what does not grow with the
draws. Every row is measured in a process of its own, which also tells the largest memory; the model is trained before,
in another. mechgrok samples all heads of a layer together, devinterp one head, as it shares nothing between heads.
`apart`: how many standard errors lie between an engine's estimate of the first head and devinterp's. devinterp runs
without observables and with one baseline batch.

"mechgrok, baoab" is the sampler of the presets at the same nbeta, step size, localization, batches, chains and draws:
its draws cost the same and forget each other faster, with a momentum of .8 for heads. Whole models get none, as batches
heat their sharpest directions with it. Effective samples are those of the first head alone, of longer chains after a
burn-in, in which the estimate is made too.

"mechgrok" is the compiled path, "mechgrok, torch" the same without compiled loops, "plain path" the module as it is.
"AVX2": as on a processor without AVX512, devinterp too (NUMBA_CPU_NAME=haswell, ATEN_CPU_CAPABILITY=avx2 and so on);
those rows are held against that devinterp.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformer

import mechgrok as mg
from benchmarks.canonical_interp import canonical_draws
from benchmarks.small_models import attention_only, modular_addition, planted_sequences
from benchmarks.tables import written
from mechgrok.config import LLCPath, Precision
from mechgrok.llc.estimate import estimate_group, estimates_of
from mechgrok.llc.problem import make_problem
from mechgrok.reproducible import reproducible
from mechgrok.types import Examples


@dataclass(frozen=True)
class Shape:
    """A model with its data, the sampling settings, how many draws of four chains are timed, and how often: a machine
    that others use too is slow at times, so the least of several times is taken. n_long: draws of the estimate.
    """

    describe: str
    make: Callable[[int], tuple[HookedTransformer, Examples]]  # (training steps) -> ...
    n_train: int
    settings: dict[str, float]
    n_draws: int
    n_long: int
    n_times: int = 3


def language(n_tokens: int, n_pos: int, n_examples: int, **shape: object) -> Callable:
    def make(n_train: int) -> tuple[HookedTransformer, Examples]:
        data = planted_sequences(n_examples, n_tokens, n_pos)
        return attention_only(data, n_tokens, (n_train,), **shape)[0][1], data

    return make


def modular(n_train: int) -> tuple[HookedTransformer, Examples]:
    models, data = modular_addition("modular-addition-113", (n_train,))
    return models[0][1], data


PUBLISHED = {"nbeta": 30.0, "localization": 200.0, "step_size": 1e-3, "batch_size": 32}
SHAPES = {
    "small": Shape(
        "2 layers, attention only, d_model 64, 4 heads, vocabulary 128, context 64, batch 32",
        language(128, 64, 1024, n_layers=2, d_model=64, n_heads=4, d_head=16), 200, PUBLISHED, 50, 200,
    ),
    "modular-addition": Shape(
        "p = 113, 1 layer with MLP, d_model 128, 4 heads, batch 128",
        modular, 200, {"nbeta": 300.0, "localization": 500.0, "step_size": 1e-4, "batch_size": 128}, 100, 200,
    ),
    "paper": Shape(
        "2 layers, attention only, d_model 256, 8 heads, vocabulary 5000, context 128, batch 32",
        language(5000, 128, 128, n_layers=2, d_model=256, n_heads=8, d_head=32), 2, PUBLISHED, 8, 40, n_times=2,
    ),
}  # fmt: skip
TOY = Shape(  # to try the benchmark, not the engines
    "1 layer, attention only, d_model 8, 2 heads, vocabulary 24, context 8, batch 4",
    language(24, 8, 32, n_layers=1, d_model=8, n_heads=2, d_head=4), 2, PUBLISHED | {"batch_size": 4}, 8, 8, n_times=1,
)  # fmt: skip
AVX2 = {
    "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}  # fmt: skip
ENGINES = (
    "mechgrok", "mechgrok, baoab", "mechgrok, int16", "mechgrok, baoab, int16", "mechgrok, bfloat16",
    "mechgrok, torch", "mechgrok, AVX2", "mechgrok, torch, AVX2", "plain path", "canonical-interp", "devinterp",
    "devinterp, AVX2",
)  # fmt: skip
N_BURNIN = 25


def shape_of(name: str) -> Shape:
    """The shape of this name, the toy among them."""
    return (SHAPES | {"toy": TOY})[name]


def targets(model: HookedTransformer) -> list[str]:
    return [*(f"heads of layer {layer}" for layer in reversed(range(model.cfg.n_layers))), "model"]


def measure(shape: Shape, model: HookedTransformer, data: Examples, target: str, engine: str) -> dict[str, float]:
    """One row: few draws, to know what does not grow with them, and many, in turns, after a first time."""
    few, first = 8, target if target == "model" else f"L{target[-1]}H0"
    names = heads_of(model, target) if engine.startswith("mechgrok") else (first,)

    def settings(n_draws: int, n_burnin: int = N_BURNIN) -> mg.LLCConfig:
        baoab = {"sampler": "baoab", "momentum": 0.0 if target == "model" else 0.8} if "baoab" in engine else {}
        return mg.LLCConfig(
            **shape.settings, n_chains=4, n_draws=n_draws, n_burnin=n_burnin,
            engine="devinterp" if engine.startswith("devinterp") else "mechgrok", path=path_of(engine),
            precision=next((each for each in get_args(Precision) if each in engine), "float32"), **baoab,
        )  # fmt: skip

    def seconds(n_draws: int) -> float:
        start = time.process_time()
        with reproducible(1):
            estimate_group(model, data, names, config=settings(n_draws, n_burnin=0), seed=0)
        return time.process_time() - start

    if engine == "canonical-interp":
        problem, config = make_problem(model, data, None), settings(shape.n_long)
        draws, per_step = canonical_draws(problem, data, config)
        (estimate,), per_draw = estimates_of(problem, config, draws, seed=0), per_step / 4
    else:
        seconds(few)
        times = [(seconds(few), seconds(few + shape.n_draws)) for _ in range(shape.n_times)]
        least = [min(each) for each in zip(*times, strict=True)]
        per_draw = (least[1] - least[0]) / (4 * shape.n_draws * len(names))
        with reproducible(1):
            (estimate,) = estimate_group(model, data, (first,), config=settings(shape.n_long), seed=0)
    return {
        "per draw": per_draw,
        "per effective": per_draw * estimate.losses.size / estimate.health.ess,
        "llc": estimate.llc,
        "error": estimate.std_error,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def heads_of(model: HookedTransformer, target: str) -> tuple[str, ...]:
    """The components that a target names."""
    if target == "model":
        return ("model",)
    return tuple(f"L{target[-1]}H{head}" for head in range(model.cfg.n_heads))


def offered(engine: str, target: str) -> bool:
    """canonical-interp has no way to sample a head."""
    return engine != "canonical-interp" or target == "model"


def path_of(engine: str) -> LLCPath:
    """What evaluates the losses; devinterp has its own way."""
    if engine == "plain path":
        return "module"
    return "auto" if engine.startswith("devinterp") else "torch" if "torch" in engine else "compiled"


def reference_of(engine: str) -> str:
    """devinterp on the same processor."""
    return "devinterp, AVX2" if engine.endswith("AVX2") else "devinterp"


def in_its_own_process(arguments: list[str]) -> dict[str, float] | None:
    command = [sys.executable, "-m", "benchmarks.speed", *arguments]
    processor = AVX2 if any(part.endswith("AVX2") for part in arguments) else {}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | processor)
    if done.returncode == -signal.SIGKILL and "canonical-interp" in arguments:
        return None  # out of memory: it vmaps whole models, and the rest of the table is of use without it
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def table(name: str, engines: list[str]) -> list[list[str]]:
    shape, rows = shape_of(name), []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.safetensors")
        model, _ = shape.make(shape.n_train)
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
        for target in targets(model):
            found = {
                engine: in_its_own_process(["--row", name, target, engine, "--model", path])
                for engine in engines
                if offered(engine, target)
            }
            for engine, row in found.items():
                theirs = found[reference_of(engine)]
                assert theirs is not None
                if row is None:
                    rows.append([target, engine, "killed: out of memory", *[""] * (len(COLUMNS) - 3)])
                    continue
                apart = abs(row["llc"] - theirs["llc"]) / np.hypot(row["error"], theirs["error"])
                rows.append([
                    target, engine, f"{1e3 * row['per draw']:.2f}", f"{1e3 * row['per effective']:.1f}",
                    f"{theirs['per draw'] / row['per draw']:.1f}",
                    f"{theirs['per effective'] / row['per effective']:.1f}",
                    f"{row['llc']:.2f} ± {row['error']:.2f}", f"{apart:.1f}", f"{row['memory']:.2f}",
                ])  # fmt: skip
                print(name, *rows[-1], sep=" | ", flush=True)
    return rows


COLUMNS = (
    "what", "engine", "ms per draw", "ms per effective sample", "times faster per draw", "per effective sample",
    "LLC of the first", "apart", "GB",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", help="also write the tables to this Markdown file")
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, "toy"], default=list(SHAPES))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["mechgrok"], help="beside devinterp")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.row:
        name, target, engine = given.row
        model, data = shape_of(name).make(0)
        model.load_state_dict(load_file(given.model))
        print(json.dumps(measure(shape_of(name), model, data, target, engine)))
        return
    start = time.time()
    engines = list(dict.fromkeys([*given.engines, *map(reference_of, given.engines), "devinterp"]))
    tables = [(f"{name}: {shape_of(name).describe}", COLUMNS, table(name, engines)) for name in given.shapes]
    written(tables, __doc__ or "", time.time() - start, given.write)


if __name__ == "__main__":
    main()
