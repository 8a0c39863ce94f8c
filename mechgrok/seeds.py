"""Named randomness: (root seed, names...) -> torch.Generator. Nothing here touches global state.

A stream depends on its names alone, so a chain draws the same numbers alone or among others, in
any order of work and on any number of workers.
"""

import hashlib
import operator

import torch

Name = str | int


def derive(seed: int, *names: Name) -> int:
    """A 63-bit seed from a root seed and names: the first 8 bytes of BLAKE2b, top bit cleared.

    The names are joined with their types and lengths, so ("a", "bc") and ("ab", "c"), or 1 and
    "1", give different seeds. NumPy's integers count as Python's.
    """
    plain = (name if isinstance(name, str) else operator.index(name) for name in (seed, *names))
    text = "".join(f"{type(name).__name__}{len(str(name))}:{name};" for name in plain)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & 0x7FFF_FFFF_FFFF_FFFF


def stream(seed: int, *names: Name, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded with `derive(seed, *names)`; one of another device gives other numbers."""
    return torch.Generator(device).manual_seed(derive(seed, *names))
