"""Bookkeeping without torch and without vLLM: what is where, and what must be copied.

Everything here is plain data and arithmetic, so that the simulator and the tests run exactly the
code that runs in production.
"""
