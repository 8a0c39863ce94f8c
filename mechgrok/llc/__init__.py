"""Estimates of the learning coefficient of one component, and curves of them over training."""
