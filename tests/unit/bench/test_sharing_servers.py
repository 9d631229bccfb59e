"""Servers of several ways to have memory: loaded one way at a time, and none is left whatever happens."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from layerkv.bench import sharing_servers
from layerkv.bench.load import PlannedRequest
from layerkv.bench.sharing_load import BURSTS
from layerkv.bench.sharing_servers import shared, split, started
from layerkv.errors import LayerKVError

TOY = Path(__file__).parents[2] / "fakes" / "toy_server.py"
STATIC, SHARED = split("static", "layerkv", BURSTS, 2), shared("shared", BURSTS, 2)


@pytest.fixture
def behaviours(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Toy servers in the place of real ones; by the name of a server's folder, what it does on this bad day."""
    behaviours: dict[str, str] = {}

    def serve_command(*_: object, port: int, folder: Path, **__: object) -> list[str]:
        return [sys.executable, str(TOY), str(port), behaviours.get(folder.name, "")]

    monkeypatch.setattr(sharing_servers, "serve_command", serve_command)
    monkeypatch.setattr(sharing_servers, "make_tiny_model", lambda name, folder: folder / name)
    monkeypatch.setattr(sharing_servers, "WARM_UP_S", 0.5)
    monkeypatch.setattr(sharing_servers, "MOST_LATE_S", 600.0)  # no test is about how fast this machine is
    return behaviours


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[psutil.Process]:
    """All that were started."""
    begun: list[psutil.Process] = []
    start = subprocess.Popen.__init__

    def noted(self: subprocess.Popen[bytes], *args: object, **kwargs: object) -> None:
        start(self, *args, **kwargs)  # type: ignore[call-overload]
        begun.append(psutil.Process(self.pid))

    monkeypatch.setattr(subprocess.Popen, "__init__", noted)
    return begun


def load(num_requests: int = 8) -> list[PlannedRequest]:
    return [
        PlannedRequest(request_id=f"r{i}", arrival_s=0.01 * i, prompt=[7 + i] * 5, output_tokens=6)
        for i in range(num_requests)
    ]


def none_is_left(processes: list[psutil.Process]) -> bool:
    return bool(processes) and not any(process.is_running() for process in processes)


def test_each_way_gets_its_loads_in_turn_and_nothing_is_left_afterwards(
    tmp_path: Path, behaviours: Mapping[str, str], processes: list[psutil.Process]
) -> None:
    del behaviours
    with started([STATIC, SHARED], BURSTS, 2, tmp_path) as groups:
        assert groups["static"].socket is None
        assert groups["shared"].socket == tmp_path / "shared.sock"
        found = {name: group.run([load(), load(4)], seed=1) for name, group in groups.items()}
        assert sum(process.is_running() for process in processes) == 5, "four servers and a broker"
    assert none_is_left(processes)
    for name, loaded in found.items():
        assert [len(loaded[engine].run.requests) for engine in (0, 1)] == [8, 4]
        assert (loaded[0].run.engine, loaded[0].run.point, loaded[1].run.point) == (name, "0", "1")
        assert all(request.error is None for engine in (0, 1) for request in loaded[engine].run.requests)
        assert loaded[0].start_s < time.monotonic()


def test_a_server_that_dies_ends_the_load_of_the_others_too(
    tmp_path: Path, behaviours: dict[str, str], processes: list[psutil.Process]
) -> None:
    behaviours["static-1"], behaviours["static-0"] = "dies", "stalls"
    begun_s = time.monotonic()
    with (
        pytest.raises(LayerKVError, match="static: engine 1 ended with exit status 7"),
        started([STATIC], BURSTS, 2, tmp_path) as groups,
    ):
        groups["static"].run([load(), load()], seed=0)
    assert time.monotonic() - begun_s < sharing_servers.STALL_LIMIT_S, "nobody waited for the one that stalls"
    assert none_is_left(processes)


def test_a_server_that_hangs_is_told_of_with_the_last_it_said(
    tmp_path: Path, behaviours: dict[str, str], processes: list[psutil.Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    behaviours["static-0"] = "stalls"
    monkeypatch.setattr(sharing_servers, "STALL_LIMIT_S", 3.0)
    with (
        pytest.raises(LayerKVError, match="static: the load of engine 0 made no progress for 3 s"),
        started([STATIC], BURSTS, 1, tmp_path) as groups,
    ):
        groups["static"].run([load()], seed=0)
    assert none_is_left(processes)


def test_a_server_that_does_not_start_says_why(
    tmp_path: Path, behaviours: dict[str, str], processes: list[psutil.Process]
) -> None:
    behaviours["shared-1"] = "broken"
    with (
        pytest.raises(LayerKVError, match=r"shared: engine 1 ended with exit status 1 .*no such device: toy"),
        started([STATIC, SHARED], BURSTS, 2, tmp_path),
    ):
        pytest.fail("not all are ready")
    assert none_is_left(processes)


def test_a_request_that_fails_is_an_error_and_no_figure(
    tmp_path: Path, behaviours: dict[str, str], processes: list[psutil.Process]
) -> None:
    behaviours["static-0"] = "aborts"
    with (
        pytest.raises(LayerKVError, match="tokens"),
        started([STATIC], BURSTS, 1, tmp_path) as groups,
    ):
        groups["static"].run([load()], seed=0)
    assert none_is_left(processes)


def test_a_broker_that_has_gone_is_noticed(
    tmp_path: Path, behaviours: Mapping[str, str], processes: list[psutil.Process]
) -> None:
    del behaviours
    with started([SHARED], BURSTS, 1, tmp_path) as groups:
        broker = groups["shared"].broker
        assert broker is not None
        broker.send_signal(signal.SIGKILL)
        broker.wait()
        with pytest.raises(LayerKVError, match="shared: the broker was killed by SIGKILL"):
            groups["shared"].check()
    assert none_is_left(processes)
