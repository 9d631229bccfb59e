"""The requests of a simulated run, as data: drawn from distributions, or read from a published trace.

Pure functions of a spec, a rate and a seed. Invariants: equal arguments give equal requests on every machine; the
n-th request of a seed has the same class and lengths at every rate, so that rates differ in nothing but arrivals.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Final, NamedTuple, TypeAlias

from layerkv.sim.prompt_blocks import PromptBlock, prompt_blocks, read_hash_ids, repeated_share
from layerkv.strict_yaml import show, wrong

# One way of writing refusals for all of layerkv: the helpers of the configuration, private to the package.

__all__ = [
    "Arrivals",
    "BrokenRow",
    "ClassMix",
    "FixedLength",
    "GammaArrivals",
    "Lengths",
    "LognormalLength",
    "PoissonArrivals",
    "SimRequest",
    "Trace",
    "TraceArrivals",
    "TraceRow",
    "UniformArrivals",
    "UniformLength",
    "WorkloadSpec",
    "make_workload",
    "read_trace",
]


class SimRequest(NamedTuple):
    """One request of a simulated run.

    Attributes:
        request_id: Unique in the run; ids sort in order of arrival.
        arrival_s: When the user sends it, in seconds after the start.
        prompt_tokens: Length of its prompt.
        output_tokens: Tokens that it will make.
        max_tokens: Tokens that its client asked for at most; the scheduler sees this and not `output_tokens`.
        slo_class: The SLO class that it names; None for the policy's default class.
        blocks: What its prompt begins with, if a trace says what prompts have in common.
    """

    request_id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    slo_class: str | None
    blocks: tuple[PromptBlock, ...] = ()


@dataclass(frozen=True, slots=True)
class FixedLength:
    """Always `tokens`."""

    tokens: int

    @property
    def most(self) -> int:
        """The greatest length that can be drawn."""
        return self.tokens

    def draw(self, rng: Random) -> int:
        """One length."""
        return self.tokens


@dataclass(frozen=True, slots=True)
class UniformLength:
    """Every whole number from `least` to `most`, both included, is equally likely."""

    least: int
    most: int

    def draw(self, rng: Random) -> int:
        """One length."""
        return self.least + int(rng.random() * (self.most - self.least + 1))


@dataclass(frozen=True, slots=True)
class LognormalLength:
    """Half of the lengths are below `median`, `sigma` is the deviation of their logarithm, `most` cuts the tail."""

    median: float
    sigma: float
    most: int

    def draw(self, rng: Random) -> int:
        """One length."""
        return max(1, round(min(self.median * math.exp(self.sigma * rng.gauss(0.0, 1.0)), self.most)))


Lengths: TypeAlias = FixedLength | UniformLength | LognormalLength


@dataclass(frozen=True, slots=True)
class PoissonArrivals:
    """Independent users: gaps between arrivals are exponential."""


@dataclass(frozen=True, slots=True)
class GammaArrivals:
    """Gaps are gamma distributed with coefficient of variation `cv`: 1 is Poisson, above it comes in bursts."""

    cv: float


@dataclass(frozen=True, slots=True)
class UniformArrivals:
    """All gaps are equal."""


@dataclass(frozen=True, slots=True)
class TraceArrivals:
    """Arrivals of a trace, and its lengths for every class that draws none of its own."""

    trace: Trace


Arrivals: TypeAlias = PoissonArrivals | GammaArrivals | UniformArrivals | TraceArrivals


@dataclass(frozen=True, slots=True)
class ClassMix:
    """One class of requests in the mix.

    Attributes:
        slo_class: The SLO class that its requests name; None for the policy's default class.
        share: How many requests are of this class, in proportion to the shares of the others.
        prompt_tokens: Lengths of prompts; None takes them from the trace.
        output_tokens: Lengths of outputs; None takes them from the trace.
    """

    slo_class: str | None = None
    share: float = 1.0
    prompt_tokens: Lengths | None = None
    output_tokens: Lengths | None = None


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """What arrives in a run, all but its rate.

    Attributes:
        num_requests: How many requests; a trace ends earlier if it holds fewer.
        arrivals: When they come.
        classes: What they are. Without a trace, each has lengths of its own.
        max_tokens_factor: `max_tokens` as a multiple of the output, 1 or more: clients ask for more than they get.
        max_model_len: Limit to prompt and `max_tokens` together, as vLLM cuts the latter; None for no limit.
    """

    num_requests: int
    arrivals: Arrivals = PoissonArrivals()
    classes: tuple[ClassMix, ...] = (ClassMix(),)
    max_tokens_factor: float = 1.0
    max_model_len: int | None = None


class TraceRow(NamedTuple):
    """One request of a trace; the first one arrives at 0.

    Its lengths are scaled by ``token_scale``, and so are the blocks that ``hash_ids`` stand for.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()
    token_scale: float = 1.0

    @property
    def blocks(self) -> tuple[PromptBlock, ...]:
        """What the prompt has in common with others that have these ids."""
        return prompt_blocks(self.hash_ids, self.prompt_tokens, self.token_scale)


class BrokenRow(NamedTuple):
    """A row that is no request: its line, counted from 1, and what is wrong with it."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class Trace:
    """What was read from a trace file.

    Attributes:
        layout: Which of the known layouts the file has.
        requests: Its good rows in order of arrival.
        broken: Rows that could not be understood.
        num_failed: Rows of requests that failed when the trace was recorded: they have no output.
        num_too_long: Rows left out because they are longer than was asked for.
    """

    layout: str
    requests: tuple[TraceRow, ...]
    broken: tuple[BrokenRow, ...] = ()
    num_failed: int = 0
    num_too_long: int = 0

    @property
    def rate_per_s(self) -> float:
        """Mean rate of arrivals; that of a second if all arrive at once."""
        return len(self.requests) / (self.requests[-1].arrival_s or 1.0)

    @property
    def repeated_share(self) -> float | None:
        """Share of prompt tokens that an earlier prompt began with; None if the trace does not say."""
        if not any(row.hash_ids for row in self.requests):
            return None
        return repeated_share((row.prompt_tokens, row.blocks) for row in self.requests)


def make_workload(spec: WorkloadSpec, *, rate_per_s: float, seed: int) -> list[SimRequest]:
    """The requests of a run in order of arrival.

    Of a trace, each seed replays the rows behind those of the seed before, as long as there are any, stretched or
    squeezed to the rate; at the trace's own `rate_per_s` they come as recorded.
    """
    rows = _trace_rows(spec.arrivals.trace, spec.num_requests, seed) if isinstance(spec.arrivals, TraceArrivals) else ()
    arrivals_s = _arrivals_s(spec, rows, rate_per_s, Random(f"{seed}: arrivals"))
    num_requests = len(arrivals_s)
    shares = [mix.share for mix in spec.classes]
    mixes = Random(f"{seed}: classes").choices(spec.classes, shares, k=num_requests)
    rng = Random(f"{seed}: lengths")
    digits = len(str(max(num_requests - 1, 0)))
    most = spec.max_model_len or math.inf
    requests = []
    for i, (arrival_s, mix) in enumerate(zip(arrivals_s, mixes, strict=True)):
        prompt = mix.prompt_tokens.draw(rng) if mix.prompt_tokens else rows[i].prompt_tokens
        output = mix.output_tokens.draw(rng) if mix.output_tokens else rows[i].output_tokens
        # Rounded first: 100 * 1.1 is a little more than 110.
        asked = math.ceil(round(output * spec.max_tokens_factor, 6))
        max_tokens = int(min(asked, most - prompt))
        output = min(output, max_tokens)
        # Only where a class mixes its own lengths with a trace's; vLLM would refuse such a request.
        if output >= 1:
            blocks = rows[i].blocks if rows and not mix.prompt_tokens else ()
            requests.append(
                SimRequest(f"r{i:0{digits}d}", arrival_s, prompt, output, max_tokens, mix.slo_class, blocks)
            )
    return requests


def _trace_rows(trace: Trace, count: int, seed: int) -> tuple[TraceRow, ...]:
    start = seed * count % max(len(trace.requests) - count + 1, 1)
    return trace.requests[start : start + count]


def _arrivals_s(spec: WorkloadSpec, rows: Sequence[TraceRow], rate_per_s: float, rng: Random) -> list[float]:
    count = spec.num_requests
    match spec.arrivals:
        case TraceArrivals(trace):
            first_s, last_s = rows[0].arrival_s, rows[-1].arrival_s
            is_as_recorded = rate_per_s == trace.rate_per_s
            stretch = 1.0 if is_as_recorded else len(rows) / (last_s - first_s or 1.0) / rate_per_s
            return [(row.arrival_s - first_s) * stretch for row in rows]
        case UniformArrivals():
            return [i / rate_per_s for i in range(count)]
        case GammaArrivals(cv):
            shape = 1 / cv**2
            gaps = (rng.gammavariate(shape, 1 / shape) for _ in range(count))
        case PoissonArrivals():
            gaps = (rng.expovariate(1.0) for _ in range(count))
    return [at / rate_per_s for at in accumulate(gaps)]


def read_trace(
    path: str | Path,
    *,
    time_scale: float = 1.0,
    token_scale: float = 1.0,
    limit: int | None = None,
    max_prompt_tokens: int | None = None,
    max_total_tokens: int | None = None,
) -> Trace:
    """Read a trace of a layout that its first line tells: Mooncake JSONL, or Azure or BurstGPT CSV.

    Broken rows are named by line in the result, and are not fatal while any row is good.

    Args:
        path: The file.
        time_scale: Factor to all arrival times: 2 makes the trace twice as long and half as dense.
        token_scale: Factor to all lengths, to replay a large model's trace on a small one; no length gets below 1.
            What prompts have in common is scaled with them.
        limit: Read on until this many good rows; the rest of the file is not looked at.
        max_prompt_tokens: Leave prompts out that are longer, after scaling.
        max_total_tokens: Leave out requests whose prompt and output together are longer, after scaling.

    Raises:
        ConfigError: the file is unreadable, of an unknown layout, or without a good row.
    """
    where = str(path)
    parse, layout, lines = _detect(_read_lines(path), where=where)
    most_prompt = math.inf if max_prompt_tokens is None else max_prompt_tokens
    most_total = math.inf if max_total_tokens is None else max_total_tokens
    rows: list[TraceRow] = []
    broken: list[BrokenRow] = []
    num_failed = num_too_long = 0
    for number, line in lines:
        if len(rows) == limit:
            break
        try:
            row = parse(line)
        except ValueError as error:
            broken.append(BrokenRow(number, str(error)))
            continue
        if row.output_tokens == 0:
            num_failed += 1
            continue
        row = row._replace(
            prompt_tokens=max(1, round(row.prompt_tokens * token_scale)),
            output_tokens=max(1, round(row.output_tokens * token_scale)),
            token_scale=token_scale,
        )
        if row.prompt_tokens > most_prompt or row.prompt_tokens + row.output_tokens > most_total:
            num_too_long += 1
        else:
            rows.append(row)
    if not rows:
        problem = f"found no good row ({len(broken)} broken, {num_failed} failed, {num_too_long} too long)"
        example = f"; line {broken[0].line}: {broken[0].reason}" if broken else ""
        raise wrong(
            where, f"{problem}{example}; expected at least one", "set path to another trace, or raise its limits"
        )
    rows.sort(key=lambda row: row.arrival_s)
    first_s = rows[0].arrival_s
    requests = tuple(row._replace(arrival_s=(row.arrival_s - first_s) * time_scale) for row in rows)
    return Trace(layout, requests, tuple(broken), num_failed, num_too_long)


_NumberedLine: TypeAlias = tuple[int, str]
_ParseRow: TypeAlias = Callable[[str], TraceRow]


class _CsvLayout(NamedTuple):
    """Names of the columns that matter in one kind of CSV file, and how its times are written."""

    name: str
    arrival: str
    prompt: str
    output: str
    to_seconds: Callable[[str], float]


def _read_lines(path: str | Path) -> list[_NumberedLine]:
    """The lines that are not blank, with their numbers."""
    try:
        # A byte that is no UTF-8 spoils its own row only.
        text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise wrong(str(path), f"found no readable file ({reason}); expected a trace", "set path to one") from None
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _detect(lines: list[_NumberedLine], *, where: str) -> tuple[_ParseRow, str, Iterable[_NumberedLine]]:
    """How to parse a row, what the layout is called, and the lines that hold rows."""
    first = lines[0][1].strip() if lines else ""
    if first.startswith("{"):
        return _parse_mooncake, "Mooncake JSONL", lines
    header = [name.strip() for name in first.split(",")]
    for layout in _CSV_LAYOUTS:
        if {layout.arrival, layout.prompt, layout.output} <= set(header):
            return partial(_parse_csv, layout=layout, header=header), layout.name, lines[1:]
    headers = "; ".join(
        f"{layout.arrival},..,{layout.prompt},{layout.output} ({layout.name})" for layout in _CSV_LAYOUTS
    )
    problem = f"found {show(first)} in its first line; expected JSON (Mooncake) or one of the headers {headers}"
    raise wrong(where, problem, "set path to a trace of one of these layouts")


def _parse_mooncake(line: str) -> TraceRow:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"found {show(row)}; expected a JSON object")
    prompt_tokens = _tokens(row.get("input_length"), "input_length", least=1)
    return TraceRow(
        arrival_s=_seconds(row.get("timestamp")) / 1e3,
        prompt_tokens=prompt_tokens,
        output_tokens=_tokens(row.get("output_length"), "output_length", least=0),
        hash_ids=read_hash_ids(row.get("hash_ids"), prompt_tokens),
    )


def _parse_csv(line: str, *, layout: _CsvLayout, header: list[str]) -> TraceRow:
    # Line by line, so that a quote that nobody closed cannot swallow the rest of the file.
    try:
        cells = next(csv.reader((line,)))
    except csv.Error as error:
        raise ValueError(f"not CSV ({error})") from None
    if len(cells) != len(header):
        raise ValueError(f"found {len(cells)} cells; expected {len(header)}")
    row = dict(zip(header, cells, strict=True))
    return TraceRow(
        arrival_s=layout.to_seconds(row[layout.arrival]),
        prompt_tokens=_tokens(row[layout.prompt], layout.prompt, least=1),
        output_tokens=_tokens(row[layout.output], layout.output, least=0),
    )


def _number(value: object) -> float:
    """A finite number out of JSON or a CSV cell; NaN for anything else."""
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _seconds(value: object) -> float:
    number = _number(value)
    if math.isnan(number):
        raise ValueError(f"found {show(value)} as its time; expected a number")
    return number


def _seconds_of_date(text: str) -> float:
    try:
        date = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(f"found {show(text)} as its time; expected a date such as 2023-11-16 18:15:46.68") from None
    # A date without a zone must not depend on the zone of the machine.
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def _tokens(value: object, name: str, *, least: int) -> int:
    number = _number(value)
    if not number >= least or number != int(number):
        raise ValueError(f"found {show(value)} as {name}; expected a whole number, {least} or more")
    return int(number)


_CSV_LAYOUTS: Final = (
    _CsvLayout("Azure CSV of Vidur", "arrived_at", "num_prefill_tokens", "num_decode_tokens", _seconds),
    _CsvLayout("Azure CSV", "TIMESTAMP", "ContextTokens", "GeneratedTokens", _seconds_of_date),
    _CsvLayout("BurstGPT CSV", "Timestamp", "Request tokens", "Response tokens", _seconds),
)
