from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from layerkv.broker.messages import Limit, Terms, encode, from_broker
from layerkv.cli import main
from tests.fakes.forked_engine import connect, hello


def test_the_command_serves_until_a_signal_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "broker.sock"
    program = [sys.executable, "-c", "import sys; from layerkv.cli import main; sys.exit(main(sys.argv[1:]))"]
    arguments = ["broker", "--socket", str(path), "--capacity", "4GiB"]
    with subprocess.Popen([*program, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"broker at {path}: 4GiB of device memory\n"
        with connect(path) as connection:
            connection.settimeout(60)
            terms = Terms(segment_bytes=1 << 20, floor=1 << 30, ceiling=2 << 30)
            connection.send(encode(hello("a", device=terms)))
            assert from_broker(connection.recv(4096)) == Limit(resource="device", revision=1, num_bytes=0)
            assert from_broker(connection.recv(4096)) == Limit(resource="device", revision=2, num_bytes=1 << 30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert not path.exists()


def test_it_serves_on_when_nobody_reads_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"
    program = [sys.executable, "-c", "import sys; from layerkv.cli import main; sys.exit(main(sys.argv[1:]))"]
    arguments = ["broker", "--socket", str(path), "--capacity", "4GiB"]
    with subprocess.Popen([*program, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with connect(path) as connection:
            connection.settimeout(60)
            connection.send(encode(hello("a", title="a \x1b[31mtitle\nof two lines")))
            connection.recv(4096)
            assert process.stdout.readline() == "a (a ?[31mtitle?of two lines): here with 1 processes\n"
        process.stdout.close()
        for engine in "bcd":
            with connect(path) as connection:
                connection.settimeout(60)
                connection.send(encode(hello(engine)))
                assert isinstance(from_broker(connection.recv(4096)), Limit)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_plain_number_is_bytes(tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"
    program = [sys.executable, "-c", "import sys; from layerkv.cli import main; sys.exit(main(sys.argv[1:]))"]
    arguments = ["broker", "--socket", str(path), "--capacity", "4294967296", "--host-capacity", "1073741824"]
    with subprocess.Popen([*program, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"broker at {path}: 4GiB of device memory and 1GiB of host memory\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.parametrize(("flag", "others"), [("--capacity", []), ("--host-capacity", ["--capacity", "1GiB"])])
def test_a_wrong_size_is_named(flag: str, others: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["broker", *others, flag, "4 gigs"]) == 2
    assert f"{flag}: found '4 gigs' with the unknown unit" in capsys.readouterr().err
    for nothing in ("0GiB", "0"):
        assert main(["broker", *others, flag, nothing]) == 2
        assert f"{flag}: found '{nothing}'; expected more than nothing" in capsys.readouterr().err
