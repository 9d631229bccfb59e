"""CUDA graphs are left out in steps that copy layer by layer: layer hooks do not run when a full graph is replayed.

vLLM chooses a graph by the shape of the batch: prompts of one last token look like decodes to it. What it knows of
graphs at all is one flag of the model runner's; while that is down, it runs the compiled model without.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from layerkv.errors import IncompatibleVLLMError

_FLAGS = (("cudagraph_manager", "_graphs_captured"), ("cudagraph_dispatcher", "keys_initialized"))
"""Of the V2 and the V1 model runner: who chooses graphs, and its word for having any."""


@contextmanager
def without_graphs(model_runner: Any) -> Iterator[None]:
    """While entered, the model runner replays no CUDA graph.

    Raises:
        IncompatibleVLLMError: the model runner has neither of the flags.
    """
    for owner_name, flag in _FLAGS:
        if not hasattr(model_runner, owner_name):
            continue
        owner = getattr(model_runner, owner_name)
        if owner is None:  # eager execution
            yield
            return
        if not hasattr(owner, flag):
            break
        had_graphs = getattr(owner, flag)
        setattr(owner, flag, False)
        try:
            yield
        finally:
            setattr(owner, flag, had_graphs)
        return
    raise IncompatibleVLLMError(
        f"{type(model_runner).__name__} does not say whether it has CUDA graphs the way layerkv expects; use the vLLM "
        "version that layerkv supports, or set --enforce-eager"
    )
