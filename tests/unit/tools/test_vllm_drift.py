"""Two made-up releases: what is gone, moved, takes other parameters, is new or changed is told, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.tools.test_vllm_tree import write
from tools import vllm_drift
from tools.vllm_drift import compare, main, report
from tools.vllm_tree import VLLMTree

OLD = {
    "vllm/sched.py": (
        "class Scheduler:\n"
        "    def __init__(self):\n"
        "        self.running = []\n"
        "        self.paused = False\n"
        "    def schedule(self, throttle):\n"
        "        return 1\n"
        "    def free(self, request):\n"
        '        """Give it back."""\n'
        "        return request  # nothing else\n"
    ),
    "vllm/queue.py": "class Queue:\n    def popleft(self): ...\n",
    "vllm/hash.py": "def hashes(blocks): ...\n",
}
NEW = {
    "vllm/sched.py": (
        "from vllm.planning import hashes\n"
        "class Scheduler:\n"
        "    def __init__(self):\n"
        "        self.running = []\n"
        "    def schedule(self, throttle, budget=None):\n"
        "        return 2\n"
        "    def free(self, request):\n"
        '        """Give it back, as ever."""\n'
        "        return request\n"
    ),
    "vllm/queue.py": "class Queue:\n    def popleft(self): ...\n"
    "    def popright(self): ...\n    def _hidden(self): ...\n",
    "vllm/planning.py": "def hashes(blocks): ...\n",
    "vllm/hash.py": "from vllm.planning import hashes\n",
}


@pytest.fixture
def trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[VLLMTree, VLLMTree]:
    monkeypatch.setattr(vllm_drift, "NAMES", {"vllm.hash": "hashes", "vllm.sched": "Scheduler"})
    monkeypatch.setattr(vllm_drift, "MEMBERS", {"vllm.sched.Scheduler": "running paused schedule", "vllm.no": "never"})
    monkeypatch.setattr(vllm_drift, "PARAMETERS", {"vllm.sched.Scheduler.schedule": "throttle"})
    monkeypatch.setattr(vllm_drift, "READ_TOO", {"vllm.sched.Scheduler.free": "who frees"})
    monkeypatch.setattr(vllm_drift, "REPLACED", ("vllm.queue.Queue",))
    return VLLMTree(write(tmp_path / "old", OLD)), VLLMTree(write(tmp_path / "new", NEW))


def test_what_became_of_what_is_relied_on_is_told(trees: tuple[VLLMTree, VLLMTree]) -> None:
    drift = compare(*trees)
    assert drift.unknown == ["vllm.no.never"]
    assert drift.gone == ["vllm.sched.Scheduler.paused"]
    assert drift.moved == {"vllm.hash.hashes": "vllm.planning"}
    assert drift.parameters == {"vllm.sched.Scheduler.schedule": ("self, throttle", "self, throttle, budget")}
    assert drift.added == ["vllm.queue.Queue.popright"]
    assert list(drift.changed) == ["vllm.sched.Scheduler.schedule"]
    assert drift.num_compared == 3  # schedule, hashes, and free, of which only words have changed
    text = "\n".join(report(drift))
    assert "not compared: vllm.no.never, which the old release has not" in text
    for line in ("gone: vllm.sched.Scheduler.paused", "-    return 1", "+    return 2", "1 of 3 functions changed"):
        assert line in text


def test_a_release_against_itself_has_not_drifted(trees: tuple[VLLMTree, VLLMTree]) -> None:
    drift = compare(trees[0], trees[0])
    assert [*drift.gone, *drift.moved, *drift.parameters, *drift.added, *drift.changed] == []
    assert drift.num_compared == 3


def test_the_status_says_whether_something_is_gone(
    trees: tuple[VLLMTree, VLLMTree], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = (str(tree.root) for tree in trees)
    for args, status in (([old, new, "--brief"], 1), ([old, old], 0)):
        monkeypatch.setattr("sys.argv", ["vllm_drift", *args])
        assert main() == status
    told = capsys.readouterr().out
    assert "gone: vllm.sched.Scheduler.paused" in told
    assert "return 2" not in told
