"""Checkpoints that were trained elsewhere."""
