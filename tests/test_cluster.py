"""A real Dask scheduler and two workers on the loopback: the same bits, whoever dies, and refusals in one sentence."""

import operator
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from mechgrok import cli, schedule
from mechgrok.errors import ClusterError, RunDirectoryError
from mechgrok.schedule import each_result
from mechgrok.store import RunDirectory
from mechgrok.types import Study
from tests.oracles import tiny_config

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@contextmanager
def running(*command: object, **environment: str) -> Iterator[subprocess.Popen]:
    """A process of Dask, in a directory that is not the client's; killed at the end, whatever happens."""
    here = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT / "docs", env=os.environ | here, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def cluster(n_workers: int = 1, n_threads: int = 1, **environment: str) -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """The address of a scheduler, and its workers; n_threads: the units that one of them takes at once."""
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    quiet = ("--host", "127.0.0.1", "--no-dashboard")
    with ExitStack() as stack:
        stack.enter_context(running("distributed.cli.dask_scheduler", "--port", port, *quiet, **environment))
        worker = ("distributed.cli.dask_worker", address, "--no-nanny", "--nthreads", n_threads, *quiet)
        workers = [stack.enter_context(running(*worker)) for _ in range(n_workers)]
        yield address, workers


def results(run: Path) -> dict[str, bytes]:
    """Every checkpoint and estimate, by name; all else is made of them."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*.safetensors")}


def estimates(run: Path) -> int:
    return len(list(run.glob("llc/*/*/*.safetensors")))


@pytest.mark.long
def test_a_worker_killed_in_the_midst_of_a_run_changes_no_bit(tiny_run: tuple[Path, Study], tmp_path: Path) -> None:
    serial, run = tiny_run[0], tmp_path / "run"
    (tmp_path / "c.toml").write_text(tiny_config().to_toml())
    with cluster(n_workers=2) as (address, workers):
        command = [sys.executable, "-m", "mechgrok.cli", "run", "c.toml", "--out", "run", "--scheduler", address]
        with (tmp_path / "errors").open("w") as errors:
            client = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            wait_until(lambda: estimates(run) >= 3 or client.poll() is not None)
            workers[0].kill()
            assert 3 <= estimates(run) < estimates(serial) - 3
            assert client.wait(timeout=60) == 0, (tmp_path / "errors").read_text()
        finally:
            client.kill()
            client.wait()
        assert workers[0].wait() != 0 and workers[1].poll() is None
        assert results(run) == results(serial)

        # The worker that is left is asked for a run directory that it does not see.
        moved = RunDirectory.open(run)
        shutil.move(run, tmp_path / "elsewhere")
        with pytest.raises(RunDirectoryError, match="does not see the run directory .*; keep it on a filesystem that"):
            list(each_result(moved.read_checkpoint, [0], scheduler=address))


def test_results_and_exceptions_come_back_and_no_worker_takes_two_units_at_once() -> None:
    with cluster() as (address, _):
        assert sorted(each_result(partial(operator.add, 1), range(20), scheduler=address)) == list(range(1, 21))
        with pytest.raises(ZeroDivisionError):
            list(each_result(partial(operator.truediv, 1), [1, 0], scheduler=address))
    with cluster(n_threads=2) as (address, _), pytest.raises(ClusterError, match="2 units at once.*--nthreads 1"):
        list(each_result(abs, [1], scheduler=address))


def test_a_unit_that_kills_its_workers_is_an_error_and_no_endless_wait() -> None:
    with (
        cluster(DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES="0") as (address, _),
        pytest.raises(ClusterError, match="every worker died that was given one of the units"),
    ):
        list(each_result(os._exit, [1], scheduler=address))


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[[str], str]:
    """What `mechgrok run --scheduler` says as it refuses an address, before any work."""

    def call(address: str) -> str:
        command = ["mechgrok", "run", "modular-addition-quick", "--out", str(tmp_path / "run"), "--scheduler", address]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(schedule, "ANSWER_WITHIN", 1)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2 and not (tmp_path / "run").exists()
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        return line

    return call


def test_no_scheduler_there_is_one_sentence(refused: Callable[[str], str]) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    assert f"no Dask scheduler answers at {address} within 1 s; start one with" in refused(address)


def test_a_server_of_another_kind_is_no_scheduler(refused: Callable[[str], str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "no Dask scheduler answers" in refused(f"tcp://127.0.0.1:{silent.getsockname()[1]}")


def test_no_dask_here_is_one_sentence(refused: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert "needs Dask, which is not installed; pip install -e '.[cluster]'" in refused("tcp://127.0.0.1:8786")


@pytest.mark.parametrize(
    "address", ["localhost:8786", "tcp://localhost", "tcp://localhost:x", "tcp://localhost:99999", "http://a:80", ""]
)
def test_a_malformed_address_is_refused(address: str, refused: Callable[[str], str]) -> None:
    assert f"scheduler {address!r} is no address; give tcp://host:port" in refused(address)
