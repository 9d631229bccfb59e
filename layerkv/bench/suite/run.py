"""`layerkv bench run`: a case, or a suite of cases, on real servers, side by side.

Runs in the command's process; each server and each load has processes of its own. For every seed, each engine is
started afresh and driven through all points of the case; the order of engines rotates from seed to seed, so that a
machine that drifts hits all alike. Invariant: what was measured is kept when something fails or the run is
interrupted, and the result says so.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import msgspec
from rich.console import Console

from layerkv.bench.board import SuiteBoard
from layerkv.bench.load import PlannedRequest
from layerkv.bench.priorities import allowed_here
from layerkv.bench.records import PROBE_LIMIT_S, EngineFailure, LoadRun, Progress, read_json, write_json
from layerkv.bench.suite.case import ENGINE_NAMES, Case, Point, load_case, load_suite
from layerkv.bench.suite.engines import (
    KEEPERS,
    SERVED_NAME,
    is_layerkv,
    kv_memory_bytes,
    serve_command,
)
from layerkv.bench.suite.generator import GeneratorRun
from layerkv.bench.suite.health_probe import Probe
from layerkv.bench.suite.kept import forget, keep
from layerkv.bench.suite.lmcache_peer import Lmcache, lmcache_env, running_cache_server
from layerkv.bench.suite.load_run import load_run, longest_probe
from layerkv.bench.suite.outcome import Outcome, case_result
from layerkv.bench.suite.plan import LoadPlan, plan_requests, warm_up_requests
from layerkv.bench.suite.report import write_report
from layerkv.bench.suite.result import CaseResult
from layerkv.bench.suite.room_for_one import check_room_for_one
from layerkv.bench.suite.scheduler_probe import TIMES_VARIABLE, SchedulerTimes, probe_options, read_scheduler_times
from layerkv.bench.suite.server import CpuTimes, Server, free_port
from layerkv.bench.suite.stretch import stretched
from layerkv.bench.suite.terminal import print_result
from layerkv.bench.supervise import child_env, run_child
from layerkv.bench.tiny_model import make_tiny_model
from layerkv.errors import ConfigError, LayerKVError
from layerkv.units import format_bytes

ServeCommand: TypeAlias = Callable[..., list[str]]

EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130
GENERATOR = (sys.executable, "-m", "layerkv.bench.suite.generator")
# A server that gives no token for so long while requests wait is given up.
STALL_LIMIT_S = 240.0
DEATH_LIMIT_S = 10.0
# A load in which the server is starved of CPU is run again, so many times in all.
MAX_TRIES = 3
SAMPLE_INTERVAL_S = 0.5
LEAST_FREE_BYTES = 256 << 20

# One thread, unbound: with vLLM's defaults, step times of a tiny model jump 20-fold as soon as anything else runs. The
# last one keeps the CPU worker in the engine core's process, as a GPU's is: in one of its own, the engine core spins on
# a second core while it waits, which starves everybody else on a machine with two.
TINY_MODEL_ENV = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
QUIET_ENV = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What the command line says beside the case; None leaves the choice to the case.

    Without an environment with LMCache, that engine is skipped.
    """

    size: str = "full"
    num_seeds: int | None = None
    engines: tuple[str, ...] | None = None
    json_path: Path | None = None
    html_path: Path | None = None
    out_dir: Path = Path("out/bench")
    port: int | None = None
    trace_path: Path | None = None
    stretch: float = 1.0
    lmcache: Lmcache | None = None


def run_suite(path: Path, options: RunOptions, *, serve: ServeCommand = serve_command) -> int:
    """Runs a case, or the cases of a suite one after the other; returns the exit status.

    0: all engines finished and tokens were equal where they must be. 1: an engine failed that the case does not expect
    to, or a request to layerkv did, or tokens differ.
    130: interrupted; what was measured is kept. For a suite, `json_path` and `html_path` are folders. `serve` gives
    the command line of an engine's server.

    Raises:
        ConfigError: a file or an option is wrong; nothing has been started then.
        LayerKVError: a result could not be written.
    """
    case_paths = load_suite(path)
    if case_paths is None:
        return _run_case(_load(path, options), options, Console(), serve)
    cases = [_load(case_path, options) for case_path in case_paths]
    worst = EXIT_OK
    for case in cases:
        try:
            status = _run_case(case, _options_of(case, options), Console(), serve)
        except LayerKVError as error:
            print(f"layerkv: {case.name}: {error}", file=sys.stderr)
            status = EXIT_FAILED
        worst = max(worst, status)
        if status == EXIT_INTERRUPTED:
            break
    return worst


def _load(path: Path, options: RunOptions) -> Case:
    case = stretched(load_case(path, options.size, trace_path=options.trace_path), options.stretch)
    chosen = options.engines or case.engines
    for name in chosen:
        if name not in ENGINE_NAMES:
            raise ConfigError(f"--engines: found {name}; expected some of {', '.join(ENGINE_NAMES)}")
    if len(set(chosen)) != len(chosen):
        raise ConfigError(f"--engines: found {', '.join(chosen)}; expected each once")
    num_seeds = case.num_seeds if options.num_seeds is None else options.num_seeds
    if num_seeds < 1:
        raise ConfigError(f"--seeds: found {num_seeds}; expected 1 or more; set it to 3, say")
    case = replace(case, engines=tuple(chosen), num_seeds=num_seeds)
    if "lmcache" in chosen:
        case = _settle_lmcache(case, options.lmcache)
    kv_memory = {engine: kv_memory_bytes(case, engine, list(range(num_seeds))) for engine in case.engines}
    return replace(case, notes=(*case.notes, *check_room_for_one(case, kv_memory, where=str(path))))


def _settle_lmcache(case: Case, lmcache: Lmcache | None) -> Case:
    """The case with a word on LMCache: which one runs, or that it is skipped, which is no failure."""
    if lmcache is not None:
        note = f"LMCache {lmcache.version} ran in an environment of its own."
        return replace(case, notes=(*case.notes, note))
    engines = tuple(name for name in case.engines if name != "lmcache")
    if not engines:
        problem = "found lmcache alone, and no environment for it; expected another engine, or such an environment"
        raise ConfigError(f"--engines: {problem}; set --lmcache-python to the Python of one (benchmarks/README.md)")
    note = "LMCache was skipped: no environment with it was named (--lmcache-python)."
    return replace(case, engines=engines, notes=(*case.notes, note))


def _options_of(case: Case, options: RunOptions) -> RunOptions:
    """In a suite every case has files of its own."""
    return replace(
        options,
        json_path=options.json_path and options.json_path / f"{case.name}.json",
        html_path=options.html_path and options.html_path / f"{case.name}.html",
    )


def _run_case(case: Case, options: RunOptions, console: Console, serve: ServeCommand) -> int:
    folder = options.out_dir / case.name
    files = _Files(
        json_path=options.json_path or folder / "result.json", html_path=options.html_path or folder / "report.html"
    )
    _prepare(folder, files)
    forget(folder)
    free_port(options.port)  # so that a port in use is found before anything is measured
    console.print(f"\n[bold]{case.name}[/] ({case.size}): {case.question}", highlight=False)
    for note in case.notes:
        console.print(f"- {note}", highlight=False, markup=False)
    outcome = Outcome(priorities=allowed_here())
    try:
        _CaseRun(case, options, folder, console, outcome, files, serve).run()
    except KeyboardInterrupt:
        outcome.interrupted = True
        console.print("- interrupted: what was measured before is kept")
    result = case_result(case, outcome)
    print_result(result, console)
    _save(case, result, outcome, folder, files)
    console.print(f"\nresult  {files.json_path}\nreport  {files.html_path}\nlogs    {folder}", highlight=False)
    if outcome.interrupted:
        return EXIT_INTERRUPTED
    has_failed = any(
        request.error is not None for run in outcome.runs if is_layerkv(run.engine) for request in run.requests
    )
    return EXIT_OK if result.complete and result.tokens_equal is not False and not has_failed else EXIT_FAILED


@dataclass(frozen=True, slots=True)
class _Files:
    json_path: Path
    html_path: Path


def _prepare(folder: Path, files: _Files) -> None:
    """Makes the folders, and finds out now whether results can be written later.

    Raises:
        ConfigError: they cannot.
    """
    for wanted in (folder, files.json_path.parent, files.html_path.parent):
        try:
            wanted.mkdir(parents=True, exist_ok=True)
            free_bytes = shutil.disk_usage(wanted).free
            probe = wanted / ".layerkv-probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"{wanted}: found no folder that can be written to ({error.strerror}); set another one with --out, "
                "--json or --html"
            ) from None
        if free_bytes < LEAST_FREE_BYTES:
            raise ConfigError(
                f"{wanted}: found {format_bytes(free_bytes)} of free space; expected at least "
                f"{format_bytes(LEAST_FREE_BYTES)} for logs and records; free some, or set --out to another disk"
            )


class _CaseRun:
    """One case on its way; fills `outcome`."""

    def __init__(
        self,
        case: Case,
        options: RunOptions,
        folder: Path,
        console: Console,
        outcome: Outcome,
        files: _Files,
        serve: ServeCommand,
    ) -> None:
        self._case = case
        self._serve = serve
        self._options = options
        self._folder = folder
        self._console = console
        self._outcome = outcome
        self._files = files
        self._seeds = list(range(case.num_seeds))
        self._plans = {
            (point.name, seed): plan_requests(case, point, seed) for point in case.points for seed in self._seeds
        }
        self._kv_memory = {engine: kv_memory_bytes(case, engine, self._seeds) for engine in case.engines}

    def run(self) -> None:
        """Every engine at every point with every seed, as far as nothing fails."""
        with self._console.status("making a tiny random model"):
            model = self._model()
        tokens = {key: sum(r.output_tokens for r in plan) for key, plan in self._plans.items()}
        total = sum(tokens.values()) * len(self._case.engines)
        with SuiteBoard(total, len(self._seeds), self._console) as board:
            for seed in self._seeds:
                for engine in rotated(self._case.engines, seed):
                    seed_tokens = sum(tokens[point.name, seed] for point in self._case.points)
                    board.starts(engine, seed)
                    if engine not in self._outcome.failures:
                        try:
                            self._run_engine(engine, seed, model, board)
                        except (OSError, msgspec.DecodeError, RuntimeError, ConfigError) as error:
                            reason = f"could not be measured ({type(error).__name__}: {error})"
                            self._fail(engine, EngineFailure(reason=reason, log_tail=[]), None, board)
                    board.ends(seed_tokens)
                    self._keep_partial(board)

    def _model(self) -> str:
        settings = self._case.settings
        if settings.shape is None:
            return settings.model
        return str(make_tiny_model(settings.model, self._options.out_dir / "models"))

    def _run_engine(self, engine: str, seed: int, model: str, board: SuiteBoard) -> None:
        """All points; after a disturbed load a fresh server has that point, and those after it, again.

        The same server would not do: it has the prompts in its prefix cache.
        """
        points = list(self._case.points)
        tries: list[LoadRun] = []
        num_servers = 0
        try:
            while points:
                num_servers += 1
                with ExitStack() as started:
                    server = self._started(engine, seed, model, started, num_servers)
                    if isinstance(server, EngineFailure):
                        self._fail(engine, server, None, board)
                        return
                    while points:
                        outcome = self._run_point(engine, points[0], seed, server, board)
                        if isinstance(outcome, EngineFailure):
                            self._fail(engine, outcome, points[0].name, board)
                            return
                        run, probe = outcome
                        tries.append(run)
                        if run.is_disturbed and self._tell_disturbed(run, probe, len(tries), board):
                            break
                        self._keep_best(tries)
                        points.pop(0)
        finally:
            self._keep_best(tries)  # whatever ended this, what was measured is kept

    def _tell_disturbed(self, run: LoadRun, probe: Probe, num_tries: int, board: SuiteBoard) -> bool:
        """Says what was seen and what follows; whether the load is to be run again."""
        again = num_tries < MAX_TRIES
        what = "run again on a fresh server" if again else "the least disturbed try is kept, and marked"
        board.note(
            f"{run.engine} at {run.point}, seed {run.seed}, try {num_tries} of {MAX_TRIES}: /health took "
            f"{probe.took_s:.2f} s, {probe.at_s:.1f} s into the load; expected at most {PROBE_LIMIT_S:g} s; {what}"
        )
        if again:
            board.repeats()
        return again

    def _keep_best(self, tries: list[LoadRun]) -> None:
        """The try that was disturbed least, judged by nothing else; forgets the others."""
        if tries:
            self._outcome.runs.append(min(tries, key=lambda run: run.longest_probe_s or 0.0))
            tries.clear()

    def _started(self, engine: str, seed: int, model: str, started: ExitStack, number: int) -> Server | EngineFailure:
        """The engine's server, ready and with its priorities set; `started` ends it, and what it works with."""
        self._times_path().unlink(missing_ok=True)
        log_name = f"seed{seed}.log" if number == 1 else f"seed{seed}.server{number}.log"
        cache_server = helper = failure = None
        if engine == "lmcache" and self._options.lmcache is not None:
            cache_server, helper = started.enter_context(
                running_cache_server(
                    self._options.lmcache,
                    host_bytes=self._case.settings.host_memory_bytes,
                    defaults=self._defaults(),
                    log_path=self._folder / f"{engine}-cache.{log_name}",
                )
            )
            failure = helper.wait_until_ready()
        if failure is not None:
            return failure
        port = free_port(self._options.port)
        command = self._serve(
            self._case,
            engine,
            model=model,
            port=port,
            kv_memory=self._kv_memory[engine],
            folder=self._folder.resolve(),
            cache_server=cache_server,
            # A probe is layerkv's, which is not in LMCache's environment.
            extra=() if cache_server else probe_options(engine_is_layerkv=is_layerkv(engine)),
        )
        env = lmcache_env(self._defaults()) if cache_server else self._env()
        env[TIMES_VARIABLE] = str(self._times_path())
        log_path = self._folder / f"{engine}.{log_name}"
        server = started.enter_context(Server(command, env=env, port=port, log_path=log_path, helper=helper))
        failure = server.wait_until_ready()
        if failure is not None:
            return failure
        server.prioritise(self._outcome.priorities)
        return server

    def _run_point(
        self, engine: str, point: Point, seed: int, server: Server, board: SuiteBoard
    ) -> tuple[LoadRun, Probe] | EngineFailure:
        """One load, and the slowest answer to `/health` in it."""
        requests = self._plans[point.name, seed]
        board.loads(point.name)
        plan = LoadPlan(
            url=server.url,
            model=SERVED_NAME,
            requests=requests,
            warm_up=warm_up_requests(self._case),
            names_classes=is_layerkv(engine),
            sample_interval_s=SAMPLE_INTERVAL_S,
            kv_memory_bytes=self._kv_memory[engine],
            block_bytes=self._block_bytes(),
            tells_host_memory=engine not in KEEPERS,
            priorities=self._outcome.priorities,
        )
        plan_path, run_path = self._folder / "plan.json", self._folder / "run.json"
        write_json(plan, plan_path)
        run_path.unlink(missing_ok=True)
        server.forget_peak()
        started: list[tuple[CpuTimes, SchedulerTimes | None]] = []

        def advance(line: Progress) -> None:
            cpu_times, _ = server.observe()
            if not started:  # the generator's first word comes after its warm-up
                started.append((cpu_times, read_scheduler_times(self._times_path())))
                server.prioritise(self._outcome.priorities)  # threads that the warm-up has made
            board.advances(line)

        failure = run_child(
            [*GENERATOR, str(plan_path), str(run_path)],
            env=self._env(),
            log_path=self._folder / "generator.log",
            on_progress=advance,
            stall_limit_s=STALL_LIMIT_S + _longest_pause_s(requests),
        )
        (cpu_after, peak_rss_bytes), times_after = server.observe(), read_scheduler_times(self._times_path())
        run = read_json(run_path, GeneratorRun) if failure is None else None
        # A front end notices only after some seconds that its engine is gone, and ends then.
        is_suspect = run is None or any(request.error is not None for request in run.requests)
        died = server.failure(within_s=DEATH_LIMIT_S if is_suspect else 0.0)
        if died is not None:
            return died
        if run is None:
            assert failure is not None
            return EngineFailure(
                reason=f"had no answer: the load generator {failure.reason}", log_tail=failure.log_tail
            )
        cpu_before, times_before = started[0]
        load = load_run(
            run,
            engine=engine,
            name=engine,
            point=point.name,
            seed=seed,
            cpu=(cpu_before, cpu_after),
            times=(times_before, times_after),
            peak_rss_bytes=peak_rss_bytes,
            block_bytes=self._block_bytes(),
        )
        return load, longest_probe(run)

    def _times_path(self) -> Path:
        return self._folder.resolve() / "scheduler-times"

    def _block_bytes(self) -> int | None:
        shape = self._case.settings.shape
        if shape is None or shape.layers != "full":  # a block of a model with several groups is of some layers only
            return None
        return shape.kv_bytes_per_token * self._case.settings.block_tokens

    def _fail(self, engine: str, failure: EngineFailure, point: str | None, board: SuiteBoard) -> None:
        self._outcome.fail(engine, failure, point)
        board.note(f"{engine} {failure.reason}; the others go on")

    def _keep_partial(self, board: SuiteBoard) -> None:
        """So that not even a power cut takes what has been measured."""
        try:
            result = case_result(self._case, self._outcome)
            write_json(result, self._files.json_path)
            keep(self._folder, result, self._outcome.runs, self._case.policy)
        except OSError as error:
            board.note(f"{self._files.json_path}: could not be written yet ({error.strerror})")

    def _env(self) -> dict[str, str]:
        return child_env(self._defaults())

    def _defaults(self) -> dict[str, str]:
        return QUIET_ENV if self._case.settings.shape is None else QUIET_ENV | TINY_MODEL_ENV


def rotated(engines: Sequence[str], seed: int) -> list[str]:
    """The engines in the order of this seed's round.

    Every second round is the one before it backwards, so that each engine comes before each other one as often as
    after it; every two rounds begin with another engine.
    """
    start = seed // 2 % len(engines)
    order = [*engines[start:], *engines[:start]]
    return order if seed % 2 == 0 else order[::-1]


def _longest_pause_s(requests: Sequence[PlannedRequest]) -> float:
    """The longest time in which no request may be due."""
    due = [0.0, *sorted(r.arrival_s for r in requests if r.after is None)]
    thinking = max((r.arrival_s for r in requests if r.after is not None), default=0.0)
    return max((later - earlier for earlier, later in pairwise(due)), default=0.0) + thinking


def _save(case: Case, result: CaseResult, outcome: Outcome, folder: Path, files: _Files) -> None:
    try:
        write_json(result, files.json_path)
        keep(folder, result, outcome.runs, case.policy)
        write_report(result, outcome.runs, files.html_path, case.policy)
    except OSError as error:
        raise LayerKVError(
            f"{error.filename or files.json_path}: could not be written ({error.strerror}); the figures are above; "
            "free some space, or set --json and --html to another disk"
        ) from None
