"""A HookedTransformer's losses and gradients at many parameter settings at once, computing only what moves."""
