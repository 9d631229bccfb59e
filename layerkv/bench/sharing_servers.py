"""Real servers of several ways to have the same memory, started together and loaded one way at a time.

Runs in the command's process. Only the servers of one way work at once; the others are idle meanwhile, so that ways
can be compared seed by seed and each server is started once. Invariant: when `started` is left, in whatever way,
nothing that it started is running.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from layerkv.bench.load import PlannedRequest
from layerkv.bench.priorities import Priorities, allowed_here, prioritise
from layerkv.bench.records import EngineFailure, LoadRun, read_json, write_json
from layerkv.bench.sharing_load import Setting, engine_case
from layerkv.bench.suite.engines import SERVED_NAME, serve_command
from layerkv.bench.suite.generator import GeneratorRun
from layerkv.bench.suite.load_run import load_run
from layerkv.bench.suite.plan import LoadPlan, warm_up_requests
from layerkv.bench.suite.run import GENERATOR, QUIET_ENV, SAMPLE_INTERVAL_S, TINY_MODEL_ENV
from layerkv.bench.suite.server import Server, free_port
from layerkv.bench.supervise import child_env, end_child, ended_badly, log_tail, run_child
from layerkv.bench.tiny_model import make_tiny_model
from layerkv.errors import LayerKVError

BROKER = (sys.executable, "-c", "import sys; from layerkv.cli import main; sys.exit(main())", "broker")
WARM_UP_S = 6.0
"""From the start of load generators to that of their loads: they warm their servers up before."""
MOST_LATE_S = 0.1
"""Loads of engines that share memory must begin together."""
STALL_LIMIT_S = 90.0
"""Without a token for so long, a server hangs: no load here keeps a request waiting for half of that."""
BROKER_LIMIT_S = 60.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Way:
    """One way of having the memory.

    Attributes:
        name: Of the way.
        engine: What its engines are, as the suite calls it.
        kv_bytes: KV memory that each is started with.
        broker_bytes: What a broker before them divides; None: there is none.
        options: Of the connector, besides those that every engine of a case has.
    """

    name: str
    engine: str
    kv_bytes: int
    broker_bytes: int | None = None
    options: Mapping[str, object] = field(default_factory=dict)


def split(name: str, engine: str, setting: Setting, num_engines: int) -> Way:
    """Each engine has its part of the memory."""
    return Way(name, engine, setting.capacity_bytes // num_engines)


def shared(name: str, setting: Setting, num_engines: int, **options: object) -> Way:
    """layerkv's engines with a floor each; a broker says who has the rest."""
    ceiling_bytes = setting.ceiling_bytes or setting.capacity_bytes - (num_engines - 1) * setting.floor_bytes
    sizes = {"kv_floor": setting.floor_bytes, "kv_ceiling": ceiling_bytes}
    return Way(name, "layerkv", setting.floor_bytes, setting.capacity_bytes, {**sizes, **options})


class Loaded(NamedTuple):
    """One load through one server, and when it began on the machine's monotonic clock."""

    run: LoadRun
    start_s: float


@dataclass(frozen=True, slots=True)
class Group:
    """The servers of one way."""

    way: Way
    setting: Setting
    servers: Sequence[Server]
    folders: Sequence[Path]
    priorities: Priorities
    socket: Path | None = None
    broker: subprocess.Popen[bytes] | None = None

    def run(self, loads: Sequence[Sequence[PlannedRequest]], seed: int) -> dict[int, Loaded]:
        """Each server gets its load, all at the same moment; by engine. With fewer loads the last servers get none.

        Raises:
            LayerKVError: a server, the broker or a request failed, or a server hangs: the message has the last lines of
                its log. No server of this way runs any more.
        """
        not_before_s = time.monotonic() + WARM_UP_S
        with ThreadPoolExecutor(len(self.servers)) as pool:
            try:
                runs = [
                    pool.submit(self._load, engine, requests, seed, not_before_s)
                    for engine, requests in enumerate(loads)
                ]
                wait(runs, return_when=FIRST_EXCEPTION)
                for run in runs:
                    if run.done():
                        run.result()
                loaded = {engine: run.result() for engine, run in enumerate(runs)}
                self.check()
            except BaseException:  # the other load generators end when their servers do
                stop_all(self.servers)
                raise
        return loaded

    def check(self) -> None:
        """All of it runs.

        Raises:
            LayerKVError: a server or the broker has ended.
        """
        for engine, server in enumerate(self.servers):
            self.check_for(server.failure(), engine)
        if self.broker is not None and (status := self.broker.poll()) is not None:
            assert self.socket is not None
            failure = ended_badly(status, _broker_log(self.socket))
            raise LayerKVError(_told(f"{self.way.name}: the broker {failure.reason}", failure.log_tail))

    def check_for(self, failure: EngineFailure | None, engine: int) -> None:
        """Raises what a server's failure is to this command."""
        if failure is not None:
            raise LayerKVError(_told(f"{self.way.name}: engine {engine} {failure.reason}", failure.log_tail))

    def _load(self, engine: int, requests: Sequence[PlannedRequest], seed: int, not_before_s: float) -> Loaded:
        case, server, folder = engine_case(self.setting, self.way.kv_bytes), self.servers[engine], self.folders[engine]
        block_bytes = self.setting.kv_bytes_per_token * case.settings.block_tokens
        plan = LoadPlan(
            url=server.url,
            model=SERVED_NAME,
            requests=list(requests),
            warm_up=warm_up_requests(case),
            names_classes=False,
            sample_interval_s=SAMPLE_INTERVAL_S,
            kv_memory_bytes=self.way.kv_bytes,
            block_bytes=block_bytes,
            priorities=self.priorities,
            not_before_s=not_before_s,
        )
        plan_path, run_path = folder / "plan.json", folder / "run.json"
        write_json(plan, plan_path)
        cpu_before, _ = server.observe()
        failure = run_child(
            [*GENERATOR, str(plan_path), str(run_path)],
            env=child_env(QUIET_ENV),
            log_path=folder / "generator.log",
            on_progress=lambda _: None,
            stall_limit_s=STALL_LIMIT_S,
        )
        self.check_for(server.failure(within_s=0.0 if failure is None else 1.0), engine)
        if failure is not None:
            told = [*failure.log_tail, "its server:", *log_tail(folder / "server.log")]
            raise LayerKVError(_told(f"{self.way.name}: the load of engine {engine} {failure.reason}", told))
        run = read_json(run_path, GeneratorRun)
        if run.start_s > not_before_s + MOST_LATE_S:
            late_s = run.start_s - not_before_s
            raise LayerKVError(f"{self.way.name}: the load of engine {engine} began {late_s:.1f} s late; try again")
        cpu_after, peak_rss_bytes = server.observe()
        if lost := [request for request in run.requests if request.error is not None]:
            raise LayerKVError(f"{self.way.name}: engine {engine}: {lost[0].request_id} failed: {lost[0].error}")
        record = load_run(
            run,
            engine=self.way.engine,
            name=self.way.name,
            point=f"{engine}",
            seed=seed,
            cpu=(cpu_before, cpu_after),
            times=(None, None),
            peak_rss_bytes=peak_rss_bytes,
            block_bytes=block_bytes,
        )
        return Loaded(record, run.start_s)


@contextlib.contextmanager
def started(ways: Sequence[Way], setting: Setting, num_engines: int, folder: Path) -> Iterator[dict[str, Group]]:
    """So many servers of each way, all ready; by the way's name. Logs and models are in `folder`.

    Raises:
        LayerKVError: a server or a broker does not start; the message has the last lines of its log.
    """
    model = make_tiny_model(setting.model, folder / "models")
    priorities = allowed_here()
    with ExitStack() as stack:
        sockets = {way.name: folder / f"{way.name}.sock" for way in ways if way.broker_bytes is not None}
        brokers = {
            way.name: stack.enter_context(_broker(sockets[way.name], way.broker_bytes))
            for way in ways
            if way.broker_bytes is not None
        }
        servers: list[Server] = []
        stack.callback(stop_all, servers)  # before the brokers end
        groups: dict[str, Group] = {}
        for way in ways:
            folders = [folder / f"{way.name}-{engine}" for engine in range(num_engines)]
            socket = sockets.get(way.name)
            for own_folder in folders:
                servers.append(_server(way, setting, model, socket, own_folder))
            its = servers[-num_engines:]
            groups[way.name] = Group(way, setting, its, folders, priorities, socket, brokers.get(way.name))
        for group in groups.values():
            for engine, server in enumerate(group.servers):
                group.check_for(server.wait_until_ready(), engine)
                server.prioritise(priorities)
            if group.broker is not None:  # needs as little as a front end, and would starve as they do
                prioritise(group.broker.pid, priorities)
        yield groups


def stop_all(servers: Sequence[Server]) -> None:
    """End servers side by side: each takes seconds."""
    with ThreadPoolExecutor(max(len(servers), 1)) as pool:
        for _ in pool.map(Server.stop, servers):
            pass


def _server(way: Way, setting: Setting, model: Path, socket: Path | None, folder: Path) -> Server:
    folder.mkdir()
    port = free_port()
    command = serve_command(
        engine_case(setting, way.kv_bytes),
        way.engine,
        model=str(model),
        port=port,
        kv_memory=way.kv_bytes,
        folder=folder,
        connector_options={**way.options, **({} if socket is None else {"broker": str(socket)})},
    )
    env = child_env(QUIET_ENV | TINY_MODEL_ENV)
    return Server(command, env=env, port=port, log_path=folder / "server.log")


@contextlib.contextmanager
def _broker(socket: Path, capacity_bytes: int) -> Iterator[subprocess.Popen[bytes]]:
    log_path = _broker_log(socket)
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [*BROKER, "--socket", str(socket), "--capacity", f"{capacity_bytes >> 20}MiB"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=child_env(),
            start_new_session=True,
        )
    try:
        end_s = time.monotonic() + BROKER_LIMIT_S
        while not socket.exists():
            if process.poll() is not None:
                raise LayerKVError(_told("the broker ended at once", log_tail(log_path)))
            if time.monotonic() > end_s:
                told = _told(f"the broker was not ready after {BROKER_LIMIT_S:g} s", log_tail(log_path))
                raise LayerKVError(told)
            time.sleep(POLL_S)
        yield process
    finally:
        end_child(process)


def _broker_log(socket: Path) -> Path:
    return socket.with_suffix(".log")


def _told(what: str, lines: Sequence[str]) -> str:
    return f"{what}: " + "\n".join(lines)
