"""Where units of work run: processes of this machine, or the workers of a Dask cluster."""

import asyncio
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from mechgrok.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from distributed import Client
    from joblib import Parallel

T = TypeVar("T")
R = TypeVar("R")

ANSWER_WITHIN = 10  # seconds


def each_result(
    function: Callable[[T], R], items: Sequence[T], n_workers: int = 1, scheduler: str | None = None
) -> Iterator[R]:
    """function(item) of every item, in any order, as each ends.

    Args:
        function: what all items share is bound to it by `functools.partial`, and sent once to each worker.
        n_workers: processes of this machine; one is this very process.
        scheduler: "tcp://host:port" of a Dask cluster that takes their place.

    Raises:
        ConfigError: as `check_scheduler`. ClusterError: the cluster cannot do the work.
        Whatever `function` raises.
    """
    if scheduler is not None:
        yield from _on_cluster(function, items, scheduler)
        return
    from joblib import delayed

    with warnings.catch_warnings():
        # joblib takes a worker that has grown by 300 MB for a leak, and replaces it between two units: nothing is lost.
        warnings.filterwarnings("ignore", "A worker stopped while some jobs were given", UserWarning)
        yield from _processes(min(n_workers, max(1, len(items))))(delayed(function)(item) for item in items)


def _processes(n: int) -> "Parallel":
    """What calls functions in so many processes, one call after the other, and gives back what ends first."""
    from joblib import Parallel

    return Parallel(n_jobs=n, return_as="generator_unordered", batch_size=1)


@contextmanager
def alongside(functions: Sequence[Callable[[], None]], n_workers: int) -> Iterator[None]:
    """Have other processes of this machine call these while the block runs, and wait for them at its end.

    With one worker none is called: who needs what they leave behind makes it then. Raises whatever they raise.
    """
    if not functions or n_workers == 1:
        yield
        return
    from joblib import delayed

    calls = _processes(n_workers)(delayed(function)() for function in functions)  # they begin here
    yield
    for _ in calls:
        pass


def check_scheduler(address: str) -> None:
    """Raise ConfigError if Dask is not installed, `address` is none, or no Dask scheduler answers there in time."""
    if not _is_address(address):
        raise ConfigError(f"scheduler {address!r} is no address; give tcp://host:port, as `dask scheduler` prints it")
    try:
        with ThreadPoolExecutor(1) as thread:  # in Jupyter this one runs a loop already
            kind = thread.submit(asyncio.run, _kind_of_server(address)).result()
    except ImportError:
        raise ConfigError("a scheduler needs Dask, which is not installed; pip install -e '.[cluster]'") from None
    except OSError:
        raise ConfigError(
            f"no Dask scheduler answers at {address} within {ANSWER_WITHIN} s; start one with `dask scheduler`, "
            "or give the address that it prints"
        ) from None
    except TypeError as error:
        raise ConfigError(f"{address} needs Dask's settings for TLS: {error}; see docs/cluster.md") from None
    if kind != "Scheduler":
        raise ConfigError(f"a Dask {kind.lower()} answers at {address}; give the address of the scheduler")


async def _kind_of_server(address: str) -> str:
    from distributed import Security
    from distributed.core import rpc

    async def ask() -> str:
        async with rpc(address, connection_args=Security().get_connection_args("client")) as server:
            return (await server.identity())["type"]

    # Client's own timeout never ends for a server of another kind, such as the scheduler's dashboard.
    return await asyncio.wait_for(ask(), ANSWER_WITHIN)


def _on_cluster(function: Callable[[T], R], items: Sequence[T], scheduler: str) -> Iterator[R]:
    # Not through joblib's own Dask backend: a unit that Dask gives up on never ends there (joblib 1.6.0 does not
    # hear of it), no more units are sent than the workers present at the start can do, and what it scatters is
    # lost with the worker that holds it. Here what all units share is a task too, so Dask makes it again.
    check_scheduler(scheduler)
    from distributed import Client, KilledWorker, as_completed

    with Client(scheduler, timeout=ANSWER_WITHIN, set_as_default=False) as client:
        _check_imports(client, scheduler)
        shared = client.submit(_itself, function, pure=False)
        work = as_completed(
            client.map(_on_worker, items, function=shared, pure=False, key="unit"), loop=client.loop, with_results=True
        )
        try:
            for future, result in work:
                if future.cancelled():  # then `result` is no result
                    raise ClusterError(
                        f"the scheduler at {scheduler} ended before the work did; start it and run this again: "
                        "what is on disk is not done again"
                    )
                yield result
        except KilledWorker as error:
            raise ClusterError(
                f"every worker died that was given one of the units, the last of them {error.last_worker.address}; "
                "see its log, and give each worker more memory if it ran out"
            ) from None


def _check_imports(client: "Client", scheduler: str) -> None:
    """Raise ClusterError if the scheduler or a worker cannot import this module: work sent to it would end it."""
    try:
        client.run_on_scheduler(import_module, __name__)
        client.run(import_module, __name__)
    except ImportError as error:
        raise ClusterError(
            f"the scheduler at {scheduler} or one of its workers cannot import mechgrok ({error}); "
            "install there what is installed here, in the same versions"
        ) from None


def _itself(function: Callable[[T], R]) -> Callable[[T], R]:
    return function


def _on_worker(item: T, function: Callable[[T], R]) -> R:
    from distributed import get_worker

    worker = get_worker()
    if worker.state.nthreads > 1:  # torch's number of threads and its determinism are global to a process
        raise ClusterError(
            f"the worker at {worker.address} takes {worker.state.nthreads} units at once in one process; "
            "start workers with --nthreads 1, as many as there are to be units at once"
        )
    return function(item)


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        known = parts.scheme in ("tcp", "tls") and bool(parts.hostname) and bool(parts.port)
    except ValueError:  # the port is no number, or none that there is
        return False
    return known and text == f"{parts.scheme}://{parts.netloc}"
