"""Runs of blocks as arrays, for code that copies them without Python per block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from layerkv.core.geometry import KVGeometry
from layerkv.core.transfer import BlockRun
from layerkv.errors import TransferError

Form = TypeVar("Form")

RunTable = npt.NDArray[np.int64]
"""``[num_runs, 3]``, C order: device block, host block and number of blocks of each run."""

DEVICE_COLUMN, HOST_COLUMN = 0, 1


class HostStretch(NamedTuple):
    """Consecutive host blocks from ``host_block`` on, and the device blocks that they pair with, in that order."""

    host_block: int
    device_blocks: npt.NDArray[np.int64]


def run_table(runs: Sequence[BlockRun]) -> RunTable:
    """The same runs as an array."""
    return np.array(runs, dtype=np.int64).reshape(-1, 3)


def block_pairs(table: RunTable) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Device block and host block of every single block of the runs."""
    lengths = table[:, 2]
    starts = np.repeat(table[:, :2], lengths, axis=0)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return starts[:, DEVICE_COLUMN] + within, starts[:, HOST_COLUMN] + within


def host_stretches(table: RunTable) -> list[HostStretch]:
    """The same blocks, cut only where host blocks are not consecutive: host memory is handed out in long stretches."""
    device, host = block_pairs(table)
    if not len(host):
        return []
    order = np.argsort(host)
    device, host = device[order], host[order]
    cuts = np.flatnonzero(np.diff(host) != 1) + 1
    firsts = host[np.concatenate(([0], cuts))].tolist()
    return [HostStretch(first, part) for first, part in zip(firsts, np.split(device, cuts), strict=True)]


class RunCache(Generic[Form]):
    """The runs handed over last, in the form that an engine copies by.

    A step hands over the same runs for each layer: they are converted once. They must not change afterwards. Not
    thread-safe.
    """

    def __init__(self, geometry: KVGeometry, num_host_blocks: int, convert: Callable[[RunTable], Form]) -> None:
        self._ends = np.array([geometry.total_blocks, num_host_blocks])
        self._convert = convert
        self._runs: Sequence[BlockRun] = ()
        self._form = convert(run_table(()))

    def of(self, runs: Sequence[BlockRun]) -> Form:
        """The runs in that form.

        Raises:
            TransferError: a run is outside of KV or host memory.
        """
        if runs is not self._runs:
            table = run_table(runs)
            if len(table) and (table.min() < 0 or ((table[:, :2] + table[:, 2:]).max(axis=0) > self._ends).any()):
                raise TransferError(f"a run is outside of KV memory or host memory: {list(runs)}")
            self._runs, self._form = runs, self._convert(table)
        return self._form
