"""Triton kernels that move KV blocks."""
