"""Samplers that know no model: kernels, potentials, chains, diagnostics."""
