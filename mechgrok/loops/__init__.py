"""Loops that numba compiles, and the processor's vectors in them."""
