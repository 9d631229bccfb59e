"""The broker: one process per device that says how much memory each engine may hold, and the engines' side of it."""
