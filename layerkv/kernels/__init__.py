"""Triton kernels that move KV blocks, and their definition in plain torch (:mod:`layerkv.kernels.reference`)."""
