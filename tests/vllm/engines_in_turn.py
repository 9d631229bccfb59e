"""Engines one after the other: `python -m tests.vllm.engines_in_turn CASES.json OUT.json`.

They have vLLM's imports from :mod:`tests.vllm.forked`. The caller's environment says whether vLLM loads plugins.
"""

from __future__ import annotations

import gc
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from layerkv.bench.tiny_model import SHAPES, SPECIAL_TOKENS
from tests.vllm.forked import ROOT, Forks, run_module

__all__ = ["ROOT", "Case", "Outcome", "Turns", "flag", "prompt", "run_in_turn"]

LIMIT_S = 300


def flag(**extra_config: Any) -> dict[str, Any]:
    """The value of the one flag that turns layerkv on."""
    return {"kv_connector": "LayerKVConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra_config}


def prompt(num_tokens: int, *, seed: int) -> list[int]:
    """Random token ids of the tiny model. Different seeds share no prefix worth caching."""
    choose = random.Random(seed)
    return [choose.randrange(len(SPECIAL_TOKENS), SHAPES["test"].vocab_size) for _ in range(num_tokens)]


@dataclass(frozen=True)
class Case:
    """One engine, and the calls of `LLM.generate` that it gets: prompts, and `extra_args` of their parameters.

    With `register`, layerkv's plugin entry point is called before it starts.
    """

    name: str
    engine: dict[str, Any]
    calls: list[tuple[list[list[int]], dict[str, Any]]] = field(default_factory=list)
    max_tokens: int = 16
    register: bool = False


@dataclass
class Outcome:
    """What became of a case.

    Attributes:
        failure: The last line that a user would see, if the engine did not start.
        calls: For each call its outputs (tokens, finish reason, stop reason), or the last line of its exception.
        worker, scheduler: The classes that ran.
        num_gates: Logits processors of the worker's configuration.
        connector_active: Whether layerkv's connector worked, or None without connector.
        is_wrapped: Whether `create_engine_config` was layerkv's.
        parks: How many requests were parked.
    """

    failure: str | None = None
    calls: list[Any] = field(default_factory=list)
    worker: str = ""
    scheduler: str = ""
    num_gates: int | None = None
    connector_active: bool | None = None
    is_wrapped: bool = False
    parks: int = 0


@dataclass
class Turns:
    """The outcomes by case, and all that the processes printed."""

    outcomes: dict[str, Outcome]
    log: str

    def __getitem__(self, name: str) -> Outcome:
        return self.outcomes[name]


def run_in_turn(forks: Forks, cases: Sequence[Case], folder: Path, **environment: str) -> Turns:
    """Run the first half of the cases in a process of their own, and the others in another, beside it if it may."""
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **environment}
    program, middle = run_module("tests.vllm.engines_in_turn"), -(-len(cases) // 2)
    running = []
    for name, half in (("first", cases[:middle]), ("second", cases[middle:])):
        given, taken = folder / f"{name}-cases.json", folder / f"{name}-outcomes.json"
        given.write_text(json.dumps([asdict(case) for case in half]))
        log_path = folder / f"{name}.log"
        ended = forks.start(program, str(given), str(taken), log_path=log_path, limit_s=LIMIT_S, **environment)
        running.append((ended, taken))
    turns = Turns({}, "")
    for ended, taken in running:
        run = ended.result()
        assert run.returncode == 0, run.stdout[-6000:]
        turns.outcomes |= {name: Outcome(**outcome) for name, outcome in json.loads(taken.read_text()).items()}
        turns.log += run.stdout
    return turns


def _last_line(error: Exception) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}: {error}"


def _run(case: Case) -> Outcome:
    from vllm import LLM

    outcome = Outcome()
    try:
        llm = LLM(**case.engine, disable_log_stats=True)
    except Exception as error:  # what a user sees is what is tested
        outcome.failure = _last_line(error)
        return outcome
    try:
        _look(llm, outcome)
        outcome.calls = [_generate(llm, case.max_tokens, prompts, extra) for prompts, extra in case.calls]
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        assert scheduler.kv_cache_manager.usage == 0
        if outcome.connector_active:
            scheduler._ledger.check()
            assert scheduler._ledger.num_host_blocks_used == 0
            outcome.parks = scheduler._ledger.counters.parks
    finally:
        llm.llm_engine.engine_core.shutdown()
    return outcome


def _look(llm: Any, outcome: Outcome) -> None:
    from vllm.engine.arg_utils import EngineArgs

    core = llm.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    outcome.worker, outcome.scheduler = type(worker).__name__, type(core.scheduler).__name__
    outcome.num_gates = len(worker.vllm_config.model_config.logits_processors or ())
    connector = core.scheduler.connector
    outcome.connector_active = None if connector is None else connector.scheduler_side is not None
    outcome.is_wrapped = hasattr(EngineArgs.create_engine_config, "wrapped_by_layerkv")


def _generate(llm: Any, max_tokens: int, prompts: list[list[int]], extra_args: dict[str, Any]) -> Any:
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens, min_tokens=max_tokens, ignore_eos=True, temperature=0, extra_args=extra_args
    )
    try:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    except Exception as error:
        return _last_line(error)
    firsts = [output.outputs[0] for output in outputs]
    return [[list(first.token_ids), first.finish_reason, first.stop_reason] for first in firsts]


def main() -> None:
    from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    given, taken = map(Path, sys.argv[1:])
    outcomes = {}
    for raw in json.loads(given.read_text()):
        case = Case(**raw)
        if case.register:
            from layerkv.vllm_plugin import register

            register()
        print(f"case {case.name}", flush=True)
        outcomes[case.name] = asdict(_run(case))
        gc.collect()
        ensure_kv_transfer_shutdown()
        cleanup_dist_env_and_memory()
    taken.write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
