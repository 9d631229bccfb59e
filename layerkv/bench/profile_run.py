"""Measures steps and copies of one vLLM engine: `python -m layerkv.bench.profile_run SPEC.json OUT.json`.

A fresh process with the engine inside it, started with `engine_run.ENGINE_ENV`. Reads a `ProfileSpec`, writes a
`ProfileRun`; standard output carries `Progress` lines and nothing else. Every prompt runs layered that can, so that
one process takes both kinds of prompt in turn: those that skip reading the prefix cache stay resident.

Every round does the same steps with other tokens: a step's repeats lie as far apart as rounds do, and what disturbs
the machine for a while does not hit all of them. What a step did is read from the scheduler, not assumed.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from layerkv.bench.child import ReportProgress, run_spec
from layerkv.bench.load import FIRST_ORDINARY_TOKEN_ID
from layerkv.core.cost import StepWork, chunk_pairs
from layerkv.core.geometry import KVGeometry
from layerkv.core.transfer import BlockRun, StepPlan, num_blocks
from layerkv.device.base import COPY_TIMEOUT_S, Direction
from layerkv.device.mechanism import ALIGNMENT_BYTES, make_mechanism
from layerkv.errors import ConfigError, TransferError

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.request import Request

POOL_SHARE = 0.75
# Beyond these, costs go on as they did, and measuring would take long.
MOST_POPULATION_TOKENS = 24_576
MOST_MODEL_TOKENS = 8192
POPULATION_OUTPUT_TOKENS = 640
COPY_ARENA_BYTES = 256 << 20
REPORT_INTERVAL_S = 0.5
WARM_UP_PROMPTS = 6
CHECK_SEED = 20


class ProfileSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The engine to measure, and how much.

    `engine_args` are keyword arguments of vLLM's `EngineArgs` and select layerkv with every prompt layered. `contexts`
    and `longest_prompt` are shares of `max_model_len`; a context has at least 64 tokens. `check_steps` are steps of a
    random load in each round, which are not fitted but predicted.
    """

    engine_args: dict[str, Any]
    rounds: int
    contexts: tuple[float, ...] = (0.015, 0.1, 0.33, 0.85)
    longest_prompt: float = 1.0
    batches: tuple[int, ...] = (32, 16, 8, 4, 2, 1)
    decode_steps: int = 4
    check_steps: int = 150
    copy_repeats: int = 9


class StepSample(msgspec.Struct, frozen=True, array_like=True):
    """One step: what it did, the seconds it took, and whether it belongs to the load that is not fitted."""

    work: StepWork
    seconds: float
    is_check: bool


class CopySample(msgspec.Struct, frozen=True, array_like=True):
    """One copy of all layers of some blocks."""

    direction: Direction
    num_bytes: int
    seconds: float


class ProfileRun(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured. `engine` says with which settings, as text by name."""

    steps: list[StepSample]
    copies: list[CopySample]
    kv_bytes_per_token: int
    engine: dict[str, str]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine has room for."""

    model_tokens: int
    step_tokens: int
    batch: int
    pool_tokens: int
    zone_tokens: int


@dataclass(frozen=True, slots=True)
class Population:
    """Requests of about one length that decode together, fewer and fewer, while prompts come by."""

    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    visitor_chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CheckStep:
    """One step of the random load: a prompt that arrives before it, if any, and its share of prompt tokens."""

    prompt_tokens: int
    output_tokens: int
    layered: bool
    chunk_tokens: int


@dataclass(frozen=True, slots=True)
class Round:
    """What each round measures. The lone prompts run with nobody beside them, resident and layered."""

    populations: tuple[Population, ...]
    lone_chunks: tuple[tuple[int, ...], ...]
    check: tuple[CheckStep, ...]

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens of the round: its length, for the progress bar."""
        visits = sum(2 * len(p.batches) * sum(p.visitor_chunks) for p in self.populations)
        lone = 2 * sum(map(sum, self.lone_chunks))
        return sum(sum(p.lengths) for p in self.populations) + visits + lone + sum(s.prompt_tokens for s in self.check)


def plan_round(spec: ProfileSpec, limits: Limits) -> Round:
    """The steps of a round, within what the engine has room for."""
    model_tokens = int(spec.longest_prompt * limits.model_tokens)
    longest_prompt = max(min(limits.zone_tokens, limits.pool_tokens, model_tokens) - 8, 16)
    contexts = sorted({max(int(share * limits.model_tokens), 64) for share in spec.contexts})
    return Round(
        populations=tuple(_population(spec, limits, context) for context in contexts),
        lone_chunks=tuple(_lone_chunks(limits.step_tokens, longest_prompt)),
        check=tuple(_check_steps(spec, limits, longest_prompt)),
    )


def _population(spec: ProfileSpec, limits: Limits, context: int) -> Population:
    room = min(int(POOL_SHARE * limits.pool_tokens), MOST_POPULATION_TOKENS)
    most = max(min(max(spec.batches), limits.batch - 1, room // context), 1)
    spread = np.linspace(0.9, 1.1, most) if most > 1 else [1.0]
    return Population(
        lengths=tuple(int(context * share) for share in spread),
        batches=tuple(sorted({min(batch, most) for batch in spec.batches}, reverse=True)),
        visitor_chunks=tuple(c for c in (128, 16, 256) if c <= limits.step_tokens // 2),
    )


def chunk_cycle(step_tokens: int) -> tuple[int, ...]:
    """Chunk sizes in powers of two, in an order that puts small ones behind long and short prefixes alike."""
    sizes = [2**n for n in range(4, int(math.log2(step_tokens)) + 1)]
    return tuple(itertools.chain.from_iterable(zip(sizes, sizes[::-1], strict=True)))


def _lone_chunks(step_tokens: int, longest: int) -> Iterator[tuple[int, ...]]:
    """A prompt in chunks of every size, and one in the largest chunks that there are."""
    chunks: list[int] = []
    for size in chunk_cycle(step_tokens):
        if sum(chunks) + size <= longest:
            chunks.append(size)
    yield tuple(chunks)
    size = min(step_tokens, longest)
    yield (size,) * (longest // size)
    yield (max(size // 3, 16),) * 3


def _check_steps(spec: ProfileSpec, limits: Limits, longest_prompt: int) -> Iterator[CheckStep]:
    """A load that has nothing to do with the grid: lengths, outputs, order and chunks are drawn."""
    rng = np.random.default_rng(CHECK_SEED)
    for _ in range(spec.check_steps):
        arrives = rng.random() < 0.3
        length = int(math.exp(rng.uniform(math.log(20), math.log(max(longest_prompt * 0.6, 21)))))
        yield CheckStep(
            prompt_tokens=length if arrives else 0,
            output_tokens=int(rng.integers(5, 80)),
            layered=bool(rng.random() < 0.25),
            chunk_tokens=int(math.exp(rng.uniform(math.log(8), math.log(limits.step_tokens)))),
        )


class StepDriver:
    """Puts requests into an engine and runs steps of chosen size, keeping what each did and took."""

    def __init__(self, engine: LLMEngine) -> None:
        core: Any = engine.engine_core
        self._engine = engine
        self._scheduler = core.engine_core.scheduler
        side = self._scheduler.connector.scheduler_side
        if side is None:
            raise ConfigError("layerkv is off for this engine (passthrough), so there is nothing to measure")
        self.geometry: KVGeometry = side.geometry
        self.samples: list[StepSample] = []
        self.num_prompt_tokens = 0
        self._vocab_size = engine.model_config.get_vocab_size()
        self._tokens = np.random.default_rng(0)  # never the same prompt twice: no prefix-cache hits
        self._numbers = itertools.count()
        self._step_tokens: int = self._scheduler.max_num_scheduled_tokens
        self._schedule = self._scheduler.schedule
        self._scheduler.schedule = self._watched_schedule
        self._works: list[StepWork] = []  # of the step under way: one, or none that can be used

    def limits(self) -> Limits:
        """What the engine has room for."""
        return Limits(
            model_tokens=min(self._scheduler.max_model_len, MOST_MODEL_TOKENS),
            step_tokens=self._step_tokens,
            batch=self._scheduler.max_num_running_reqs,
            pool_tokens=(self.geometry.pool_blocks - 1) * self.geometry.block_tokens,
            zone_tokens=self.geometry.zone_blocks * self.geometry.block_tokens,
        )

    def add(self, num_tokens: int, *, max_tokens: int, layered: bool = False) -> str:
        """Hand over a prompt of random tokens; returns vLLM's id for it."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input

        params = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            skip_reading_prefix_cache=not layered,
        )
        tokens = self._tokens.integers(FIRST_ORDINARY_TOKEN_ID, self._vocab_size, size=num_tokens).tolist()
        return self._engine.add_request(f"profile-{next(self._numbers)}", tokens_input(prompt_token_ids=tokens), params)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End these requests."""
        self._engine.abort_request(list(request_ids), internal=True)

    @property
    def requests(self) -> Sequence[Request]:
        """Those that have not ended."""
        return list(self._scheduler.requests.values())

    @property
    def is_prefilling(self) -> bool:
        """Whether a prompt is not computed yet."""
        return any(request.num_computed_tokens < request.num_prompt_tokens for request in self.requests)

    def step(self, chunk_tokens: int = 0, *, is_check: bool = False) -> None:
        """Run one step in which prompts get `chunk_tokens`, or what is left of the engine's own limit."""
        decodes = sum(request.num_computed_tokens >= request.num_prompt_tokens for request in self._scheduler.running)
        self._scheduler.max_num_scheduled_tokens = min(max(decodes + chunk_tokens, 1), self._step_tokens)
        self._works.clear()
        began_s = time.perf_counter()
        self._engine.step()
        took_s = time.perf_counter() - began_s
        self._scheduler.max_num_scheduled_tokens = self._step_tokens
        self.samples += [StepSample(work, took_s, is_check) for work in self._works]

    def _watched_schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = self._schedule(*args, **kwargs)
        work = step_work(output, self._scheduler.requests, self.geometry.block_bytes)
        if work is not None:
            self._works.append(work)
            self.num_prompt_tokens += work.prefill_tokens
        return output


def step_work(output: SchedulerOutput, requests: dict[str, Request], block_bytes: int) -> StepWork | None:
    """What a scheduled step does; None for one that computes nothing, parks, fetches or stores ahead."""
    metadata: Any = output.kv_connector_metadata
    plan: StepPlan = StepPlan() if metadata is None else metadata.plan
    copies_whole_blocks = plan.parks or plan.hits or plan.fetches or plan.ahead or plan.settle
    if not output.total_num_scheduled_tokens or copies_whole_blocks:
        return None
    work = StepWork(
        stored_bytes=num_blocks(plan.stores) * block_bytes,
        loaded_bytes=num_blocks(plan.loads) * block_bytes,
        is_layered=plan.is_layered,
    )
    for request_id, num_tokens in output.num_scheduled_tokens.items():
        request = requests[request_id]
        num_computed = request.num_computed_tokens - num_tokens  # vLLM has counted this step's already
        if num_computed < request.num_prompt_tokens:
            work = work._replace(
                prefill_tokens=work.prefill_tokens + num_tokens,
                prefill_pairs=work.prefill_pairs + chunk_pairs(num_tokens, num_computed),
                num_prefills=work.num_prefills + 1,
            )
        else:
            work = work._replace(
                num_decodes=work.num_decodes + 1, decode_context=work.decode_context + num_computed + num_tokens
            )
    return work


def run_profile_engine(spec: ProfileSpec, report_progress: ReportProgress) -> ProfileRun:
    """Build the engine in this process and measure it. The process must have been started with `ENGINE_ENV`."""
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    engine = LLMEngine.from_engine_args(EngineArgs(**spec.engine_args, disable_log_stats=False))
    driver = StepDriver(engine)
    limits = driver.limits()
    _warm_up(driver, limits)
    plan = plan_round(spec, limits)
    progress = _Progress(driver, spec.rounds * plan.num_prompt_tokens, report_progress)
    for _ in range(spec.rounds):
        for population in plan.populations:
            _run_population(driver, population, limits, spec.decode_steps, progress)
        for chunks in plan.lone_chunks:
            for layered in (False, True):
                _run_prompt(driver, chunks, progress, layered=layered)
        _run_check(driver, plan.check, limits, progress)
    report_progress(progress.total, progress.total)
    copies = measure_copies(engine.vllm_config.device_config.device_type, driver.geometry, spec.copy_repeats)
    return ProfileRun(
        steps=driver.samples,
        copies=copies,
        kv_bytes_per_token=driver.geometry.block_bytes // driver.geometry.block_tokens,
        engine=_settings(engine, limits),
    )


class _Progress:
    """Reports prompt tokens at most twice per second."""

    def __init__(self, driver: StepDriver, num_total: int, report: ReportProgress) -> None:
        self.total = num_total
        self._driver, self._report = driver, report
        self._began = driver.num_prompt_tokens
        self._next_s = 0.0

    def __call__(self) -> None:
        if time.monotonic() >= self._next_s:
            self._report(min(self._driver.num_prompt_tokens - self._began, self.total), self.total)
            self._next_s = time.monotonic() + REPORT_INTERVAL_S


def _warm_up(driver: StepDriver, limits: Limits) -> None:
    """First steps build caches and touch memory; nobody wants to know what they take."""
    length = min(limits.step_tokens, limits.zone_tokens, limits.model_tokens // 2)
    for index in range(WARM_UP_PROMPTS):
        driver.add(length // (1 + index), max_tokens=1 if index % 2 else 8, layered=index % 2 == 1)
    while driver.requests:
        driver.step(limits.step_tokens // 2)
    driver.samples.clear()


def _run_population(
    driver: StepDriver, population: Population, limits: Limits, decode_steps: int, progress: _Progress
) -> None:
    longest = max(population.lengths)
    # far more than the steps below, and little enough that the scheduler lets them all in
    max_tokens = min(limits.model_tokens - longest, POPULATION_OUTPUT_TOKENS)
    ids = [driver.add(length, max_tokens=max_tokens) for length in population.lengths]
    chunks = itertools.cycle(chunk_cycle(limits.step_tokens))
    while driver.is_prefilling:
        driver.step(next(chunks))
        progress()
    for batch in population.batches:
        driver.abort(ids[batch:])
        ids = ids[:batch]
        for _ in range(decode_steps):
            driver.step()
        for layered in (False, True):
            _run_prompt(driver, population.visitor_chunks, progress, layered=layered)
    driver.abort(ids)


def _run_prompt(driver: StepDriver, chunks: Sequence[int], progress: _Progress, *, layered: bool) -> None:
    """One prompt in these chunks, beside whoever decodes. It ends with its first token: nothing is parked."""
    driver.add(sum(chunks), max_tokens=1, layered=layered)
    for chunk in itertools.chain(chunks, itertools.repeat(chunks[-1])):
        if not driver.is_prefilling:
            break
        driver.step(chunk)
        progress()


def _run_check(driver: StepDriver, steps: Sequence[CheckStep], limits: Limits, progress: _Progress) -> None:
    room = int(POOL_SHARE * limits.pool_tokens)
    for step in steps:
        running = driver.requests
        held = sum(request.num_prompt_tokens + request.max_tokens for request in running)
        wanted = step.prompt_tokens + step.output_tokens
        if step.prompt_tokens and len(running) + 1 < limits.batch and held + wanted <= room:
            driver.add(step.prompt_tokens, max_tokens=1 if step.layered else step.output_tokens, layered=step.layered)
        if driver.requests:
            driver.step(step.chunk_tokens, is_check=True)
        progress()
    driver.abort([request.request_id for request in driver.requests])


def measure_copies(device_type: str, geometry: KVGeometry, repeats: int) -> list[CopySample]:
    """Time copies of the engine's page size between memory of their own, with nothing running beside them."""
    unit = ALIGNMENT_BYTES[device_type] // math.gcd(ALIGNMENT_BYTES[device_type], geometry.page_bytes)
    most = max(COPY_ARENA_BYTES // geometry.block_bytes // unit, 2) * unit
    arena_geometry = replace(geometry, pool_blocks=most, zone_blocks=0)
    engine = make_mechanism(device_type, arena_geometry, most).engine
    sizes = [4**n for n in range(12) if 4**n < most] + [most]
    samples: list[CopySample] = []
    try:
        for repeat in range(-1, repeats):
            for size, direction in itertools.product(sizes, Direction):
                first = (max(repeat, 0) * size) % (most - size + 1)  # not the blocks that caches still hold
                run = BlockRun(first, first, size)
                began_s = time.perf_counter()
                event = engine.submit(direction, range(geometry.num_layers), [run])
                if not engine.wait_host(event, COPY_TIMEOUT_S) or event.error is not None:
                    raise TransferError(f"a copy of {size} blocks failed: {event.error}")
                if repeat >= 0:  # before that, host memory is touched for the first time
                    took_s = time.perf_counter() - began_s
                    samples.append(CopySample(direction, size * geometry.block_bytes, took_s))
    finally:
        engine.close()
    return samples


def _settings(engine: LLMEngine, limits: Limits) -> dict[str, str]:
    import torch

    config = engine.vllm_config
    settings = {
        "device": config.device_config.device_type,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "kv_cache_dtype": config.cache_config.cache_dtype,
        "block_size": config.cache_config.block_size,
        "enforce_eager": config.model_config.enforce_eager,
        "max_model_len": config.model_config.max_model_len,
        "max_num_batched_tokens": limits.step_tokens,
        "max_num_seqs": limits.batch,
        "threads": torch.get_num_threads(),
    }
    return {name: str(value) for name, value in settings.items()}


def main(argv: list[str]) -> int:
    """Run the spec file `argv[0]` and write the outcome to `argv[1]`; returns the exit status."""
    return run_spec(argv, "layerkv.bench.profile_run", ProfileSpec, run_profile_engine)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
