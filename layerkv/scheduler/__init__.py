"""Decisions: pure functions from a snapshot of the engine to a decision. No torch, no vLLM, no clock."""
