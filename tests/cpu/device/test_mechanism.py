"""A worker's memory as a whole: all of it or nothing, and nothing left of a worker that was killed."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from layerkv.core.geometry import KVGeometry
from layerkv.core.transfer import BlockRun
from layerkv.device.base import Direction
from layerkv.device.mechanism import ALIGNMENT_BYTES, make_mechanism

GEOMETRY = KVGeometry(num_layers=4, page_bytes=4096, block_tokens=16, pool_blocks=64, zone_blocks=32, lanes=2)

KILLED_WORKER = """
import ctypes, sys, time
from layerkv.core.geometry import KVGeometry
from layerkv.core.transfer import BlockRun
from layerkv.device.base import Direction
from layerkv.device.mechanism import make_mechanism

geometry = KVGeometry(num_layers=4, page_bytes=1 << 20, block_tokens=16, pool_blocks=64, zone_blocks=32, lanes=2)
mechanism = make_mechanism("cpu", geometry, 64)
print("ready", flush=True)
while True:
    mechanism.engine.submit(Direction.STORE, range(4), [BlockRun(0, 0, 64)])
    mechanism.engine.submit(Direction.LOAD, range(4), [BlockRun(0, 0, 64)])
    time.sleep(0.01)
"""


def num_lane_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("layerkv-lanes")


def test_host_memory_that_cannot_be_had_leaves_no_kv_memory_behind_either() -> None:
    gc.collect()
    mappings, threads = num_lane_mappings(), threading.active_count()
    with pytest.raises(MemoryError, match="cannot map"):
        make_mechanism("cpu", GEOMETRY, (1 << 62) // GEOMETRY.block_bytes)
    gc.collect()
    assert num_lane_mappings() == mappings
    assert threading.active_count() == threads


def test_shutting_down_with_copies_under_way_finishes_them() -> None:
    mechanism = make_mechanism("cpu", GEOMETRY, 64)
    mechanism.arena.tensor().view(4, 96, 4096)[:, :64] = 5
    stored = mechanism.engine.submit(Direction.STORE, range(4), [BlockRun(0, 0, 64)])
    mechanism.engine.close()
    assert stored.is_done()
    assert stored.error is None
    assert (mechanism.host.tensor() == 5).all()  # type: ignore[attr-defined]


def test_a_worker_has_no_named_memory_and_no_files_that_could_outlive_it() -> None:
    """The kernel takes anonymous memory back with the process, however that ends: no name means no leftover."""
    worker = subprocess.Popen([sys.executable, "-c", KILLED_WORKER], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    opened = [os.readlink(link) for link in Path(f"/proc/{worker.pid}/fd").iterdir()]
    mapped = Path(f"/proc/{worker.pid}/maps").read_text()
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert mapped.count("/memfd:layerkv-lanes (deleted)") == 4
    assert "/dev/shm/" not in mapped
    assert not [target for target in opened if target.startswith(("/memfd", "/dev/shm"))]


def test_every_device_has_an_alignment_that_pages_of_the_kernel_divide() -> None:
    assert all(alignment % os.sysconf("SC_PAGE_SIZE") == 0 for alignment in ALIGNMENT_BYTES.values())
