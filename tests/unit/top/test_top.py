from __future__ import annotations

import io
import itertools
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from layerkv.broker.messages import MOST_BYTES, State, Terms, Usage, encode
from layerkv.cli import main
from layerkv.errors import ConfigError, LayerKVError
from layerkv.top.command import run_top
from layerkv.top.servers import Figures, metrics_url, read_figures
from tests.fakes.forked_engine import connect, hello
from tests.fakes.metrics_server import serving

WAIT_S = 60.0
MIB = 1 << 20
PROGRAM = [sys.executable, "-c", "import sys; from layerkv.cli import main; sys.exit(main(sys.argv[1:]))"]

TEXT = """\
# HELP layerkv_requests Requests by residency of their KV.
# TYPE layerkv_requests gauge
layerkv_requests{engine="0",model_name="tiny",residency="resident"} 12.0
layerkv_requests{engine="0",model_name="tiny",residency="parked"} 3.0
layerkv_requests{engine="0",model_name="tiny",residency="fetching"} 1.0
layerkv_requests{engine="0",model_name="tiny",residency="layered"} 2.0
layerkv_requests{engine="0",model_name="tiny",residency="waiting"} 7.0
layerkv_paused_requests{engine="0",model_name="tiny"} 4.0
layerkv_waiting_requests{engine="0",model_name="tiny",resource="pool"} 2.0
layerkv_waiting_requests{engine="0",model_name="tiny",resource="zone"} 5.0
layerkv_waiting_requests{engine="0",model_name="tiny",resource="link"} 0.0
"""


def text(stored: float = 0, loaded: float = 0, on_time: float = 0, late: float = 0) -> str:
    return TEXT + "".join(
        f'{name}{{engine="0",model_name="tiny",{label}}} {value}\n'
        for name, label, value in (
            ("layerkv_bytes_total", 'direction="store"', stored),
            ("layerkv_bytes_total", 'direction="load"', loaded),
            ("layerkv_tokens_on_time_total", 'slo_class="chat"', on_time / 2),
            ("layerkv_tokens_on_time_total", 'slo_class="batch"', on_time / 2),
            ("layerkv_tokens_late_total", 'slo_class="chat"', late),
        )
    )


@contextmanager
def broker(path: Path) -> Iterator[None]:
    """A real one, with an engine titled `tiny` that holds 64 MiB."""
    arguments = ["broker", "--socket", str(path), "--capacity", "1GiB", "--host-capacity", "2GiB"]
    with subprocess.Popen([*PROGRAM, *arguments], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            with connect(path) as connection:
                connection.settimeout(WAIT_S)
                terms = Terms(segment_bytes=16 * MIB, floor=64 * MIB, ceiling=512 * MIB)
                connection.send(encode(hello("engine 1", title="tiny", device=terms)))
                for _ in range(2):
                    connection.recv(MOST_BYTES)
                usage = Usage(revision=2, held=64 * MIB, need=90 * MIB, like=90 * MIB)
                connection.send(encode(State(device=usage)))
                connection.recv(MOST_BYTES)
                yield
        finally:
            process.send_signal(signal.SIGTERM)


def shown(socket: Path | None, *urls: str, as_json: bool = False) -> tuple[int, str]:
    out = io.StringIO()
    return run_top(socket, urls, once=True, as_json=as_json, out=out, every_s=0.001), out.getvalue()


def test_broker_and_server_of_one_model_are_one_row(tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"
    with broker(path), serving(lambda: text(on_time=30, late=10)) as url:
        status, table = shown(path, url)
        assert status == 0
        first, head, row = table.splitlines()
        assert first == f"broker at {path}: device 96MiB of 1GiB given; host 0B of 2GiB given"
        assert " ".join(head.split()) == (
            "ENGINE MODEL SEGMENTS DEVICE HELD/NEED/LIMIT RUNNING LAYERED PARKED WAITING STORED LOADED ON TIME"
            " WAITS FOR"
        )
        assert " ".join(row.split()) == ("engine 1 tiny 4 64MiB/90MiB/96MiB 12 2 4 7 0B/s 0B/s 75.0% zone 5, pool 2")
        status, whole = shown(path, url, as_json=True)
        assert status == 0
        found = json.loads(whole)
        assert found["schema"] == 1
        assert found["broker"] == {
            "socket": str(path),
            "device": {"capacity": 1024 * MIB, "committed": 96 * MIB},
            "host": {"capacity": 2048 * MIB, "committed": 0},
        }
        assert found["errors"] == []
        assert found["engines"] == [
            {
                "engine": "engine 1",
                "title": "tiny",
                "url": f"{url}/metrics",
                "pids": [os.getpid()],
                "is_connected": True,
                "device": {
                    "segments": 4,
                    "segment_bytes": 16 * MIB,
                    "held": 64 * MIB,
                    "need": 90 * MIB,
                    "like": 90 * MIB,
                    "limit": 96 * MIB,
                    "floor": 64 * MIB,
                    "ceiling": 512 * MIB,
                },
                "host": None,
                "requests": {"resident": 12, "parked": 3, "fetching": 1, "layered": 2, "waiting": 7},
                "paused": 4,
                "waits_for": {"pool": 2, "zone": 5},
                "bytes_per_second": {"store": 0.0, "load": 0.0},
                "tokens": {"on_time": 30, "late": 10, "on_time_share": 0.75, "on_time_share_now": None},
            }
        ]
        with serving(lambda: text()) as twin:
            _, table = shown(path, url, twin)
            assert [line.split()[0] for line in table.splitlines()[2:]] == ["engine", "tiny/0", "tiny/0"], (
                "which is it?"
            )


def test_rates_are_of_the_time_between_two_readings() -> None:
    counts = itertools.count()

    def growing() -> str:
        number = next(counts)
        return text(stored=number * 1000, loaded=number * 500, on_time=100 + 10 * number, late=30 * number)

    with serving(growing) as url:
        engine = json.loads(shown(None, url, as_json=True)[1])["engines"][0]
        whole = json.loads(shown(None, url, as_json=True)[1])
    assert engine["tokens"] == {"on_time": 110, "late": 30, "on_time_share": 110 / 140, "on_time_share_now": 0.25}
    assert engine["bytes_per_second"]["store"] == 2 * engine["bytes_per_second"]["load"] > 0
    rates = whole["engines"][0]["bytes_per_second"]
    assert rates["store"] * whole["interval_s"] == pytest.approx(1000)


def test_a_server_that_has_begun_anew_has_no_rate_yet() -> None:
    counts = itertools.count(5, -1)
    with serving(lambda: text(stored=next(counts))) as url:
        assert json.loads(shown(None, url, as_json=True)[1])["engines"][0]["bytes_per_second"] is None


@pytest.mark.parametrize(
    ("status", "said", "reason"),
    [
        (200, "vllm:num_requests_running 1.0\n# HELP layerkv_requests x\n", "runs without layerkv"),
        (200, "<html>", "runs without layerkv"),
        (503, "", "HTTP 503; expected the metrics of `vllm serve`"),
    ],
)
def test_what_is_no_server_with_layerkv_is_one_line(status: int, said: str, reason: str) -> None:
    with serving(lambda: said, status) as url, pytest.raises(LayerKVError, match=reason) as error:
        shown(None, url)
    assert "\n" not in str(error.value)


def test_commands_that_find_nobody_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", "--once", "--socket", str(tmp_path / "none.sock")]) == 1
    assert f"layerkv: no memory broker at {tmp_path}/none.sock (No such file" in capsys.readouterr().err
    assert main(["top", "--once", "--url", "http://127.0.0.1:1"]) == 1
    assert capsys.readouterr().err == "layerkv: no server at http://127.0.0.1:1/metrics (Connection refused)\n"
    assert main(["top", "--once", "--url", "localhost:8000"]) == 2
    assert "--url: found 'localhost:8000'; expected the address of a server" in capsys.readouterr().err


def test_of_several_sources_those_that_answer_are_shown_and_the_others_named(tmp_path: Path) -> None:
    with serving(text) as url:
        status, table = shown(tmp_path / "none.sock", url)
        assert status == 1
        assert "tiny/0" in table
        assert table.splitlines()[-1].startswith("error: no memory broker at")
        status, whole = shown(None, url, "http://127.0.0.1:1", as_json=True)
    assert status == 1
    assert [failure["source"] for failure in json.loads(whole)["errors"]] == ["http://127.0.0.1:1/metrics"]


@pytest.mark.parametrize("url", ["", "host", "ftp://host", "http://", "http://host:port", "http://host:99999"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="expected the address of a server"):
        metrics_url(url)


def test_labels_and_values_as_prometheus_writes_them() -> None:
    engines = read_figures(
        'layerkv_requests{engine="1",model_name="a \\"b\\"\\\\ \\n}, c=",residency="parked"} 1e+01 1700000000\n'
        'layerkv_requests{engine="1",model_name="x",residency="parked"} NaN\n'
        "layerkv_requests{ 5\nlayerkv_paused_requests 3\n"
    )
    assert engines == {
        ('a "b"\\ \n}, c=', "1"): Figures(requests={"parked": 10}),
        ("", "0"): Figures(num_paused=3),
    }


def test_a_name_cannot_move_the_cursor() -> None:
    hostile = text().replace("tiny", "ti\x1b[2Jny")
    with serving(lambda: hostile) as url:
        assert "\x1b" not in shown(None, url)[1]


def test_in_a_terminal_it_is_drawn_again_until_the_user_ends_it() -> None:
    ours, its = pty.openpty()
    counts = itertools.count()
    with (
        serving(lambda: text(stored=next(counts) * 1e9)) as url,
        subprocess.Popen([*PROGRAM, "top", "--url", url], stdout=its, stderr=its) as process,
    ):
        os.close(its)
        screen = b""
        while screen.count(b"\x1b[H") < 2:
            assert select.select([ours], [], [], WAIT_S)[0]
            screen += os.read(ours, 1 << 16)
        process.send_signal(signal.SIGINT)
        while not screen.endswith(b"\x1b[?25h"):
            assert select.select([ours], [], [], WAIT_S)[0]
            screen += os.read(ours, 1 << 16)
        assert process.wait(WAIT_S) == 0
    os.close(ours)
    assert screen.startswith(b"\x1b[?25l\x1b[H")
    assert b"Traceback" not in screen
