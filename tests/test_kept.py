"""Compiled loops that are kept on disk: right whoever wrote them, and whatever became of the files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Sums numbers of each kind, and prints how many it had to compile for.
PROGRAM = """
import sys
import numpy as np
from mechgrok.loops.kept import keeper

@keeper()
def total(x):
    s = 0.0
    for i in range(x.size):
        s += x[i]
    return s

for kind in sys.argv[1].split(","):
    assert total(np.arange(5).astype(kind)) == 10, kind
print(sum(total.stats.cache_misses.values()))
"""

# Before it: two processes read numba's index at once, and the first to write its index is the last to write its code.
IN_STEP = """
import sys, time
from pathlib import Path
from numba.core.caching import IndexDataCacheFile

STEPS, FIRST = Path(sys.argv[2]), sys.argv[3] == "first"
STARTED = time.time()

def in_step(self, read=IndexDataCacheFile._load_index):
    index = read(self)
    STEPS.joinpath(f"{FIRST}_{time.time_ns()}").touch()
    mine = len(list(STEPS.glob(f"{FIRST}_*")))
    while len(list(STEPS.glob(f"{not FIRST}_*"))) < mine and time.time() < STARTED + 60:
        time.sleep(0.001)
    time.sleep(0 if FIRST else 0.5)
    return index

def late(self, name, data, write=IndexDataCacheFile._save_data):
    time.sleep(1 if FIRST else 0)
    write(self, name, data)

IndexDataCacheFile._load_index, IndexDataCacheFile._save_data = in_step, late
"""


# Two kinds of matrix products, made of loops that one function makes for both.
PRODUCTS = """
import sys
import numpy as np
from mechgrok.loops.kept import keeper
from mechgrok.replicas.products import _any_terms, product_of_pairs

@keeper()
def floats(out, a, x):
    _any_terms(out, 0, 20, False, 0, a, 0, 3, 1, x, 0, 16, 48, 3, 9, 20)

@keeper()
def pairs(out, a, x):
    product_of_pairs(out, 0, 20, False, 0, a, 0, 4, 1, x, 0, 16, 64, 3, 9, 20)

def in_lanes(x):
    return np.ascontiguousarray(x.reshape(len(x), 2, 16).swapaxes(0, 1)).reshape(-1)

def with_scale(ints, scale):
    paired = np.ascontiguousarray(ints, np.int16).view(np.float32)
    return np.concatenate([paired, np.full((len(ints), 1), scale, np.float32)], axis=1)

a, x = np.arange(54).reshape(9, 6) - 27, np.arange(192).reshape(6, 32) % 23 - 11
out = np.zeros(180, np.float32)
for name in sys.argv[1].split(","):
    if name == "floats":
        floats(out, a[:, :3].astype(np.float32).reshape(-1), in_lanes(x[:3].astype(np.float32)))
        assert (out.reshape(9, 20) == a[:, :3] @ x[:3, :20]).all(), name
    else:
        pairs(out, with_scale(a, 0.5).reshape(-1), in_lanes(with_scale(x.T, 0.25).T))
        assert (out.reshape(9, 20) == a @ x[:, :20] / 8).all(), name
print(sum(sum(each.stats.cache_misses.values()) for each in (floats, pairs)))
"""


def written(code: str, folder: Path) -> Path:
    path = folder / "program.py"
    path.write_text(code)
    return path


@pytest.fixture
def program(tmp_path: Path) -> Path:
    return written(PROGRAM, tmp_path)


def started(program: Path, kinds: str, *more: str, before: str = "") -> subprocess.Popen[str]:
    code = f"{before}\nimport runpy; runpy.run_path({str(program)!r})"
    command = [sys.executable, "-c", code, kinds, *more]
    environment = os.environ | {"MECHGROK_CACHE": str(program.parent / "cache")}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def misses(process: subprocess.Popen[str]) -> int:
    """How many signatures the process had to compile."""
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return int(out)


def test_processes_that_compile_at_once_leave_what_a_later_one_can_trust(program: Path, tmp_path: Path) -> None:
    """In one folder numba would keep the code for i8 as that for f8."""
    (tmp_path / "steps").mkdir()
    kinds = {"first": "i8", "second": "f8"}
    both = [started(program, kinds[one], str(tmp_path / "steps"), one, before=IN_STEP) for one in kinds]
    assert [misses(one) for one in both] == [1, 1]
    assert misses(started(program, "i8,f8")) == 0


@pytest.mark.parametrize("later", ["floats,pairs", "pairs,floats"])
def test_what_several_processes_compiled_goes_together(later: str, tmp_path: Path) -> None:
    """Each of the first two counts what it compiles from one, so what they make is told apart by its name alone."""
    program = written(PRODUCTS, tmp_path)
    assert [misses(started(program, one)) for one in ("floats", "pairs")] == [1, 1]
    assert misses(started(program, later)) == 0


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"", lambda data: b"x" * len(data)])
def test_damaged_files_are_compiled_anew(program: Path, damage) -> None:
    assert misses(started(program, "i8,f8")) == 2
    for path in (program.parent / "cache").rglob("*.nb[ic]"):
        path.write_bytes(damage(path.read_bytes()))
    assert misses(started(program, "i8,f8")) == 2
    assert misses(started(program, "i8,f8")) == 0


def test_without_a_place_to_write_every_process_compiles(program: Path) -> None:
    """Beside the loop's file, where numba would keep it then, nobody sees what the loop calls change."""
    (program.parent / "cache").write_text("a file")
    for _ in range(2):
        assert misses(started(program, "f8")) == 1
    assert not list(program.parent.rglob("*.nb[ic]"))


@pytest.mark.skipif(os.name != "posix", reason="limits of another kind")
def test_a_full_disk_costs_the_time_of_compiling_alone(program: Path) -> None:
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))"
    assert [misses(started(program, "f8", before=before)) for before in (full, "", full)] == [1, 1, 0]
