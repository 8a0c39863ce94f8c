"""How loops are compiled, where the result is kept, and which numbers they take."""

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import __version__ as numba_version
from numba import config, njit
from numba.core.caching import FunctionCache, NullCache

from mechgrok.store import compiled_folder

# Without _nrt no references to arrays are counted, which takes a locked addition whenever one loop calls another.
OPTIONS: dict[str, Any] = {"_nrt": False, "nogil": True, "error_model": "numpy", "fastmath": {"contract"}}

numba_settings: Any = config


def serves(like: torch.Tensor) -> bool:
    """Whether loops take such numbers."""
    return like.dtype == torch.float32 and like.device.type == "cpu"


def flat(*each: torch.Tensor) -> list[np.ndarray]:
    """All numbers of each: in place if they lie one after another, as what is written to must, else of a copy."""
    return [one.detach().contiguous().view(-1).numpy() for one in each]


def named(loop: Callable[..., Any]) -> Callable[..., Any]:
    """The same loop.

    Raises ValueError if it was made in a function and still has the `__qualname__` of there. Where two share name and
    kinds of arguments, numba tells them apart by a number that every process counts from one: once files that several
    processes have kept meet in one, that would run one in place of the other.
    """
    if "<locals>" in loop.__qualname__:
        raise ValueError(f"{loop.__qualname__} needs a __qualname__ that no other in its module has")
    return loop


def keeper(*folders: Path) -> Callable[[Callable[..., Any]], Any]:
    """What compiles a loop, and keeps the result on disk where that can be written; folders: of all that it calls.

    numba by itself would take a loop from the cache if only files have changed that it calls, so each state of these
    folders and of this one has a place of its own. What compiles raises what `named` does.
    """
    place = compiled_folder(Path(__file__).parent, *folders)

    def kept(loop: Callable[..., Any]) -> Any:
        compiled = njit(**OPTIONS)(named(loop))
        if place is not None:
            compiled._cache = _Overloads(loop, place)  # where njit(cache=True) puts a FunctionCache
        return compiled

    return kept


@cache
def _say_that_it_takes_time() -> None:
    """Once a process, on stderr where the caller has no log handlers, as nobody waits a minute without a word."""
    logging.getLogger("mechgrok").warning(
        "mechgrok: compiling loops for this processor; this takes 20 to 100 seconds of one core, and is kept "
        '(LLCConfig(path="torch") does without)'
    )


class _Overloads(NullCache):
    """What is kept of one loop: a cache of numba's for each signature, processor and version, in a folder of its own.

    numba's cache numbers the files of all signatures by an index that it reads and writes without a lock. Two processes
    that compile two signatures at once both take the first free number, and whoever reads that index later runs the
    code of one signature on the other's numbers. Where a folder has one signature, both write the same.
    """

    def __init__(self, loop: Callable[..., Any], place: Path) -> None:
        self._loop, self._place = loop, place

    def load_overload(self, signature: Any, target: Any) -> Any:
        kept = self._of(signature, target.codegen())
        try:
            found = kept.load_overload(signature, target)
        except Exception:  # whatever is wrong with what lies there, it is compiled anew
            with suppress(OSError):
                kept.flush()
            found = None
        if found is None:
            _say_that_it_takes_time()
        return found

    def save_overload(self, signature: Any, compiled: Any) -> None:
        with suppress(OSError):  # a full disk costs the next process the time of compiling, nothing else
            self._of(signature, compiled.codegen).save_overload(signature, compiled)

    def _of(self, signature: Any, codegen: Any) -> Any:
        key = repr((signature, codegen.magic_tuple(), numba_version, bool(numba_settings.BOUNDSCHECK)))
        folder = self._place / sha256(key.encode()).hexdigest()[:16]
        before, numba_settings.CACHE_DIR = numba_settings.CACHE_DIR, str(folder)  # one thread compiles at a time
        try:
            cache = FunctionCache(self._loop)
        except RuntimeError:  # numba found no place for it
            return NullCache()
        finally:
            numba_settings.CACHE_DIR = before
        # Where that folder cannot be written numba takes another, which does not know what the loop calls.
        return cache if Path(cache.cache_path).is_relative_to(folder) else NullCache()
