"""Hands an arena's tensor to code that would allocate one itself with ``torch.zeros``."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from layerkv.device.base import Arena
from layerkv.errors import IncompatibleVLLMError


class ArenaAllocation(TorchFunctionMode):
    """While entered, the one ``torch.zeros(virtual_bytes, dtype=torch.int8)`` returns the arena's tensor.

    Raises:
        IncompatibleVLLMError: on leaving, if no such allocation was made: KV memory would not be ours.
    """

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self._arena = arena
        self._used = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros and self._is_kv_allocation(args, kwargs):
            self._used = True
            return self._arena.tensor()
        return func(*args, **kwargs)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(exc_type, exc, traceback)
        if exc is None and not self._used:
            raise IncompatibleVLLMError(
                f"vLLM did not allocate its KV cache as one int8 tensor of {self._arena.geometry.virtual_bytes} bytes, "
                "which layerkv replaces by its arena; use the vLLM version that layerkv supports"
            )

    def _is_kv_allocation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        size = args[0] if len(args) == 1 else None
        return size == self._arena.geometry.virtual_bytes and kwargs.get("dtype") is torch.int8
