"""What the loops take the processor for, and that they are compiled for that one."""

import os
import subprocess
import sys

import pytest

from mechgrok.loops import lanes

# Prints what is known of the processor, and whether a loop of ours is compiled with registers of 512 bits.
PROGRAM = """
import numpy as np
from numba import njit
from mechgrok.loops import lanes
from mechgrok.loops.kept import OPTIONS
from mechgrok.loops.lanes import WIDTH, exp, load, store

@njit(**OPTIONS)
def loop(x, out):
    store(out, 0, WIDTH, exp(load(x, 0, WIDTH, np.float32(0))))

out = np.empty(WIDTH, np.float32)
loop(np.zeros(WIDTH, np.float32), out)
assert (out == 1).all()
(assembly,) = loop.inspect_asm().values()
print(lanes.HAS_VNNI, lanes._HAS_PERMUTE, lanes.HAS_AMX, "zmm" in assembly)
"""


def seen(**environment: str) -> list[bool]:
    """(VNNI, AVX512, AMX, whether wide registers are used) in a process with these environment variables."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("NUMBA_CPU")}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True)
    return [word == "True" for word in done.stdout.split()]


def test_without_avx512_nothing_is_taken_for_there() -> None:
    assert seen(NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="") == [False] * 4


def test_a_name_alone_assumes_nothing() -> None:
    """numba then compiles with this processor's features all the same, so wide registers may be used."""
    assert seen(NUMBA_CPU_NAME="haswell")[:3] == [False] * 3


def test_listed_features_are_believed() -> None:
    listed = "+avx2,+fma,+avx512vnni,-avx512f" if lanes._HAS_PERMUTE else "+avx2,+fma"
    vnni, wide, amx, _ = seen(NUMBA_CPU_FEATURES=listed)
    assert (vnni, wide, amx) == ("avx512vnni" in listed, False, False)


@pytest.mark.skipif(not lanes._HAS_PERMUTE, reason="this processor, or the one that numba is told of, has no AVX512")
def test_wide_registers_are_used_where_there_are_some() -> None:
    assert seen()[1] and seen()[3]
