"""How loops are compiled, where the result is kept, and which numbers they take."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import config, njit

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


def keeper(*folders: Path) -> Callable[[Callable[..., Any]], Any]:
    """What compiles a loop, and keeps the result on disk where that can be written; folders: of all that it calls.

    numba by itself would take a loop from the cache if only files have changed that it calls, so each state of these
    folders and of this one has a place of its own.
    """
    place = compiled_folder(Path(__file__).parent, *folders)

    def kept(loop: Callable[..., Any]) -> Any:
        if place is None:
            return njit(**OPTIONS)(loop)
        before, numba_settings.CACHE_DIR = numba_settings.CACHE_DIR, str(place)
        try:
            return njit(cache=True, **OPTIONS)(loop)
        except RuntimeError:  # numba found no place for it
            return njit(**OPTIONS)(loop)
        finally:
            numba_settings.CACHE_DIR = before

    return kept
