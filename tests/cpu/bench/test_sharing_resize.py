"""How fast memory comes and goes, on the real arena: that all of it moves, not how fast it does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

from layerkv.bench import sharing_resize
from layerkv.bench.sharing_resize import measure_arena
from layerkv.errors import LayerKVError

MIB = 1 << 20


def test_every_second_segment_moves_in_each_round() -> None:
    found = measure_arena(rounds=2, num_segments=6)
    assert (found.moves, found.move_bytes) == (2, 3 * 48 * MIB)
    assert 0 < found.shrink.p50 <= found.shrink.p99
    assert found.first_touch.p50 > 0
    assert (found.p50, found.p99) == (found.shrink.p50, found.shrink.p99)


def test_a_machine_without_the_memory_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing_resize.psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * MIB))
    with pytest.raises(LayerKVError, match=r"100MiB of memory are available; expected twice .* leave resize out"):
        measure_arena()
