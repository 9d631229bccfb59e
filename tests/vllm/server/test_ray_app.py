"""What `layerkv place --emit ray` writes for a machine's memory starts: two models behind a broker and one endpoint.

Ray is not among layerkv's requirements: `make ray` fetches it and runs this.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib.util
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import pytest
import yaml

from layerkv.bench.tiny_model import make_tiny_model
from layerkv.broker.watch import read_roster
from layerkv.cli import main
from tests.vllm.engines_in_turn import prompt
from tests.vllm.server.served import (
    LAYERKV,
    POLL_LIMIT_S,
    POLL_S,
    REQUEST_LIMIT_S,
    SHAPE,
    STOP_LIMIT_S,
    body,
    free_port,
)

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

START_LIMIT_S = 600.0
"""Of everything: about a minute on two idle cores."""
MIB = 1 << 20
FLOOR = 24 * MIB
CAPACITY = 120 * MIB
MODELS = ("chat", "summaries")

DRIVER = """
import json, sys
import ray
from ray import serve

folder, port, resources = sys.argv[1:]
ray.init(
    num_cpus=2, resources=json.loads(resources), object_store_memory=80 << 20, include_dashboard=False,
    _node_ip_address="127.0.0.1", _temp_dir=folder,
)
serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
from fleet_app import app
serve.run(app)
print("READY", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""


def require_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        if os.environ.get("LAYERKV_REQUIRE_RAY") == "1":
            pytest.fail("LAYERKV_REQUIRE_RAY=1, but Ray is not installed")
        pytest.skip("Ray is not installed (`make ray` fetches it)")


def fleet(models: Path) -> dict[str, Any]:
    """Two models in one memory, whose weights and activations leave `CAPACITY` to share."""
    model = {
        "weights": "16MiB",
        "activations": "16MiB",
        "kv_bytes_per_token": SHAPE.kv_bytes_per_token,
        "token_rate": 100,
        "tpot": "50ms",
        "kv_floor": f"{FLOOR}B",
        "max_model_len": 1024,
    }
    return {
        "version": 1,
        "devices": [{"name": "ram", "kind": "cpu", "memory": f"{CAPACITY + 64 * MIB}B", "utilization": 1.0}],
        "models": {
            name: model | {"source": str(make_tiny_model("test", models, seed=seed))}
            for seed, name in enumerate(MODELS)
        },
    }


def broker_and_resources(application: str) -> tuple[list[str], str]:
    """How the file says that its broker and Ray are started: the first one's arguments, the other one's resources."""
    lines = [line.strip() for line in (ast.get_docstring(ast.parse(application)) or "").splitlines()]
    [broker] = [shlex.split(line.removesuffix("&")) for line in lines if line.startswith("layerkv ")]
    [ray] = [shlex.split(line) for line in lines if line.startswith("ray start ")]
    return broker[1:], ray[ray.index("--resources") + 1]


@dataclass
class RayServe:
    """A broker, and the application beside it."""

    socket: Path
    url: str
    broker: subprocess.Popen[bytes]
    driver: subprocess.Popen[bytes]
    log_path: Path

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_until_ready(self) -> None:
        end_s = time.monotonic() + START_LIMIT_S
        while "\nREADY\n" not in self.log():
            assert self.driver.poll() is None, f"ended with {self.driver.returncode}:\n{self.log()[-8000:]}"
            assert time.monotonic() < end_s, f"not ready after {START_LIMIT_S:g} s:\n{self.log()[-8000:]}"
            time.sleep(0.25)

    def held(self) -> dict[str, int]:
        """What each engine holds, by its model; it is checked that all of it is there."""
        roster = read_roster(self.socket, POLL_LIMIT_S)
        held = {entry.title: entry.device.held for entry in roster.engines if entry.device is not None}
        assert sum(held.values()) <= roster.device.committed <= roster.device.capacity == CAPACITY
        return held

    async def ask(self, *requests: dict[str, Any]) -> list[list[int]]:
        """The tokens of each request; all are sent at once."""
        async with httpx.AsyncClient(base_url=self.url, timeout=REQUEST_LIMIT_S, trust_env=False) as client:
            answers = await asyncio.gather(*(client.post("/v1/completions", json=request) for request in requests))
        for answer in answers:
            assert answer.status_code == 200, answer.text
        return [answer.json()["choices"][0]["token_ids"] for answer in answers]

    def processes(self) -> list[Any]:
        """All that the driver has started, also what it has left alone: they stay in its session."""
        import psutil

        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError):
                if process.pid != self.driver.pid and os.getsid(process.pid) == self.driver.pid:
                    found.append(process)
        return found

    def end(self) -> list[Any]:
        """Stop Ray as its driver does, then the broker; the processes that are left, which are killed."""
        import psutil

        with contextlib.suppress(subprocess.TimeoutExpired):
            self.driver.communicate(timeout=STOP_LIMIT_S)  # closes its input
        _, left = psutil.wait_procs(self.processes(), STOP_LIMIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.driver.pid, signal.SIGKILL)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.driver.wait()
        self.broker.send_signal(signal.SIGTERM)
        self.broker.wait(STOP_LIMIT_S)
        return left


def start(command: list[str], log: IO[bytes], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path: Ray's sockets lie deep in it."""
    path = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def served(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[RayServe]:
    require_ray()
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump(fleet(tmp_path / "models")))
    assert main(["place", str(path), "--emit", "ray"]) == 0
    application = capsys.readouterr().out
    arguments, resources = broker_and_resources(application)
    # As written, but for the engines: exact, and not compiled, which would take most of the time.
    anchor = "'tensor_parallel_size': 1"
    assert application.count(anchor) == len(MODELS)
    exactly = application.replace(anchor, f"'dtype': 'float32', 'enforce_eager': True, {anchor}")
    (tmp_path / "fleet_app.py").write_text(exactly)

    environment = os.environ | {"XDG_RUNTIME_DIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    environment["RAY_AUTH_TOKEN"] = secrets.token_hex()  # or Ray writes one into the home folder
    environment.pop("RAY_ADDRESS", None)
    ours = [str(tmp_path), str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(part for part in ours if part)
    port = free_port()
    arguments = [argument.replace("$RUN", str(folder / "layerkv")) for argument in arguments]
    socket = Path(arguments[arguments.index("--socket") + 1])
    with (tmp_path / "broker.log").open("wb") as broker_log, (tmp_path / "ray.log").open("wb") as ray_log:
        broker = start([*LAYERKV, *arguments], broker_log, environment)
        driver = start([sys.executable, "-c", DRIVER, str(folder / "ray"), str(port), resources], ray_log, environment)
    its = RayServe(socket, f"http://127.0.0.1:{port}", broker, driver, tmp_path / "ray.log")
    try:
        its.wait_until_ready()
        yield its
    finally:
        left = its.end()
    assert left == [], "Ray left processes behind"


async def crowd(served: RayServe, requests: list[dict[str, Any]]) -> tuple[list[list[int]], list[dict[str, int]]]:
    """Answers to all at once, and what the engines held meanwhile."""
    asking = asyncio.create_task(served.ask(*requests))
    looks = []
    while not asking.done():
        looks.append(await asyncio.to_thread(served.held))
        await asyncio.sleep(POLL_S)
    return await asking, looks


def test_two_models_behind_one_broker_answer_over_one_endpoint(
    served: RayServe, capsys: pytest.CaptureFixture[str]
) -> None:
    """One has a crowd, grows beyond its floor, and answers as it does each alone. At the end nothing is left."""
    names = [process.name() for process in served.processes()]
    assert "raylet" in names
    assert names.count("VLLM::EngineCore") == len(MODELS)
    listed = httpx.get(f"{served.url}/v1/models", timeout=REQUEST_LIMIT_S, trust_env=False).json()
    assert {model["id"] for model in listed["data"]} == set(MODELS)
    assert main(["top", "--socket", str(served.socket), "--once", "--json"]) == 0
    picture = json.loads(capsys.readouterr().out)
    assert {engine["title"] for engine in picture["engines"]} == set(MODELS)
    for engine in picture["engines"]:
        assert engine["is_connected"]
        assert engine["device"]["floor"] == FLOOR
        assert 0 < engine["device"]["held"] <= engine["device"]["limit"]

    requests = [body(prompt(400, seed=seed), 60, model=MODELS[0]) for seed in range(20)]
    chat, summaries = (
        asyncio.run(served.ask(requests[0] | {"model": name}, requests[1] | {"model": name})) for name in MODELS
    )
    assert chat != summaries
    assert all(len(tokens) == 60 for tokens in chat + summaries)
    together, looks = asyncio.run(crowd(served, requests))
    assert together[:2] == chat
    assert max(look[MODELS[0]] for look in looks) > FLOOR
