"""Mechanism in the worker process: memory arenas, host memory, transfer engines, and the order of copies.

No decisions are made here, and nothing here knows vLLM.
"""
