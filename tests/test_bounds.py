"""The compiled passes once under numba's bounds checking, which also looks at loads and stores of sixteen numbers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BEYOND = """
import numpy as np
from mechgrok.loops.kept import keeper
from mechgrok.loops.lanes import load, number, store

@keeper()
def shifted(x, by):
    store(x, by, 16, load(x, 0, 16, number(0)))

shifted(np.zeros(32, np.float32), 16)
print("inside", flush=True)
shifted(np.zeros(32, np.float32), 17)
print("not stopped", flush=True)
"""
PASSES = """
import torch
from mechgrok.components import component
from mechgrok.replicas.heads import LayerHeads
from mechgrok.replicas.whole import NetworkPotential
from tests.test_replicas import build, examples

shapes = [  # each also with products of int16s, where the processor has them
    {"d_mlp": 7},
    {"normalization_type": "RMS"},
    {"d_mlp": 7, "normalization_type": None, "n_layers": 1},
    {"positional_embedding_type": "shortformer", "d_mlp": 20, "n_heads": 3},
]
for shape in shapes:
    model = build(**shape)
    for scored in ("all", "last", "some"):
        data, layers, n_heads = examples(model, scored), range(model.cfg.n_layers), range(model.cfg.n_heads)
        how = [(1e9, "float32"), (1e9, "int16"), (0.0, "float32")]  # and without room to keep anything
        heads = [LayerHeads(model, data, layer, n_heads, *one) for layer in layers for one in how]
        whole = [NetworkPotential(model, data, component(model, "model"), *one) for one in how]
        for potential in (*heads, *whole):
            assert potential._compiled is not None
            theta = potential.anchor.reshape(-1, potential.anchor.shape[-1]).repeat_interleave(3, 0)
            index = torch.arange(12).view(3, 4) % len(data)
            losses, gradient = potential.losses_and_grad(theta, index)
            assert losses.isfinite().all() and gradient.isfinite().all() and gradient.abs().sum() > 0
print("inside", flush=True)
"""


def checked(code: str, cache: Path) -> subprocess.CompletedProcess[str]:
    given = os.environ | {"NUMBA_BOUNDSCHECK": "1", "MECHGROK_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=given, cwd=root)


def test_a_store_beyond_an_array_stops_the_process(tmp_path: Path) -> None:
    done = checked(BEYOND, tmp_path)
    assert done.stdout.split() == ["inside"] and done.returncode != 0, done.stderr


@pytest.mark.long
def test_the_passes_stay_within_their_arrays(tmp_path: Path) -> None:
    done = checked(PASSES, tmp_path)
    assert done.stdout.split() == ["inside"] and done.returncode == 0, done.stderr
