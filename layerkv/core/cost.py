"""What steps and copies cost, as measured curves: the :class:`CostProfile`, its JSON form, and its predictions.

A profile is data. It comes from ``layerkv profile`` (measured), from :mod:`layerkv.sim.presets` (derived from
published hardware figures), or is :func:`generic_profile` (shape only, for an engine that has none). Times are
seconds, sizes bytes, and every prediction is a sum of terms that are linear or piecewise linear in what a step does:

    step = fixed + per request + curve(tokens) + curve(context read by decodes) + pairs attended by prefill
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from layerkv.errors import ConfigError

SCHEMA = 1
CURE = "measure a new one with `layerkv profile`"


class Curve:
    """A piecewise linear function through points of growing x, continued with its last slope. Never negative.

    Immutable. One point ``(x, y)`` stands for the line through it and the origin; none for zero.
    """

    __slots__ = ("_slopes", "_xs", "_ys", "points")

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        self.points = tuple((float(x), float(y)) for x, y in points)
        if len(self.points) == 1:
            self.points = ((0.0, 0.0), *self.points)
        self._xs = [x for x, _ in self.points]
        self._ys = [y for _, y in self.points]
        pairs = zip(self.points, self.points[1:], strict=False)
        self._slopes = [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in pairs]

    def __call__(self, x: float) -> float:
        """The value at ``x``; before the first point the first slope holds, behind the last one the last."""
        if not self._slopes:
            return 0.0
        at, last = bisect_right(self._xs, x) - 1, len(self._slopes) - 1
        # asked many times for each decision: no calls
        at = 0 if at < 0 else last if at > last else at
        y = self._ys[at] + self._slopes[at] * (x - self._xs[at])
        return y if y > 0.0 else 0.0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Curve) and self.points == other.points

    def __hash__(self) -> int:
        return hash(self.points)

    def __repr__(self) -> str:
        return f"Curve({list(self.points)!r})"


class StepWork(NamedTuple):
    """What one engine step does.

    Attributes:
        num_decodes: Requests that make one token each.
        decode_context: KV tokens that those read, over all of them.
        prefill_tokens: Prompt tokens computed.
        prefill_pairs: Query-key pairs that those attend: for a chunk of ``c`` tokens behind ``p`` others,
            ``c * p + c * (c + 1) / 2``.
        num_prefills: Requests that those tokens belong to.
        stored_bytes: Bytes stored layer by layer during the step (layered requests).
        loaded_bytes: Bytes loaded layer by layer during the step.
        is_layered: Whether a layered request computes in the step.
        parked_bytes: Bytes stored that compute waits for: parks, and prefixes of requests that ended.
        hit_bytes: Bytes of cached prefixes loaded that it waits for.
    """

    num_decodes: int = 0
    decode_context: int = 0
    prefill_tokens: int = 0
    prefill_pairs: float = 0.0
    num_prefills: int = 0
    stored_bytes: int = 0
    loaded_bytes: int = 0
    is_layered: bool = False
    parked_bytes: int = 0
    hit_bytes: int = 0


def chunk_pairs(chunk_tokens: int, num_computed: int) -> float:
    """Query-key pairs of a causal prefill chunk of ``chunk_tokens`` behind ``num_computed`` tokens."""
    return chunk_tokens * (num_computed + (chunk_tokens + 1) / 2)


@dataclass(frozen=True, slots=True)
class CostProfile:
    """Measured or derived costs of one model on one engine. Immutable.

    Attributes:
        name: What it was made for, in words.
        step_s: Fixed cost of a step.
        request_s: Cost of each request in a step, whatever it computes.
        tokens: Tokens computed in a step -> seconds (the matrix products).
        decode_context: KV tokens read by decodes -> seconds (their attention).
        pair_s: Seconds per query-key pair of prefill attention.
        store: Bytes of one store -> seconds.
        load: Bytes of one load -> seconds.
        layered_step_s: What layer hooks add to a step with layered requests.
        exposed_share: Share of layered copy time that compute does not hide, 0 to 1.
        kv_bytes_per_token: KV bytes of one token over all layers; 0 if unknown. With tensor parallelism of one rank or
            of all, as long as the copy curves are of the same bytes (ranks copy side by side).
        made: How it was made: command, date, versions, machine (text by name).
    """

    name: str
    step_s: float
    request_s: float
    tokens: Curve
    decode_context: Curve
    pair_s: float
    store: Curve
    load: Curve
    layered_step_s: float = 0.0
    exposed_share: float = 0.0
    kv_bytes_per_token: int = 0
    made: Mapping[str, str] = field(default_factory=dict)

    def decode_part_s(self, work: StepWork) -> float:
        """Seconds of the step if it computed no prompt token."""
        return (
            self.step_s
            + self.request_s * work.num_decodes
            + self.tokens(work.num_decodes)
            + self.decode_context(work.decode_context)
        )

    def prefill_part_s(self, work: StepWork) -> float:
        """Seconds that the step's prompt tokens add to it."""
        if not work.prefill_tokens:
            return 0.0
        linear = self.tokens(work.num_decodes + work.prefill_tokens) - self.tokens(work.num_decodes)
        return max(linear, 0.0) + self.request_s * work.num_prefills + self.pair_s * work.prefill_pairs

    def layered_part_s(self, work: StepWork, compute_s: float) -> float:
        """Seconds that layer-wise copies add to a step whose compute takes ``compute_s``.

        Stores and loads run beside compute, each direction on its own: what is longer than compute is exposed, and
        so is ``exposed_share`` of what is not (LayerKV Eq. 4 asks that the former be nothing).
        """
        if not work.is_layered:
            return 0.0
        copy_s = max(self.store(work.stored_bytes), self.load(work.loaded_bytes))
        return self.layered_step_s + max(copy_s - compute_s, 0.0) + self.exposed_share * min(copy_s, compute_s)

    def to_json(self) -> str:
        """The profile as JSON text; :func:`parse_profile` reads it."""
        return json.dumps(
            {
                "schema": SCHEMA,
                "name": self.name,
                "made": dict(self.made),
                "kv_bytes_per_token": self.kv_bytes_per_token,
                "step": {
                    "fixed_s": self.step_s,
                    "request_s": self.request_s,
                    "tokens_s": self.tokens.points,
                    "decode_context_s": self.decode_context.points,
                    "prefill_pair_s": self.pair_s,
                    "layered_s": self.layered_step_s,
                    "exposed_share": self.exposed_share,
                },
                "link": {"store_s": self.store.points, "load_s": self.load.points},
            },
            indent=1,
        )


class CostView(NamedTuple):
    """A profile with its online corrections, as a value: what a decision reckons with.

    Attributes:
        profile: The profile.
        decode_factor: Observed over predicted time of steps without prefill.
        prefill_factor: The same for what prompt tokens add to a step.
    """

    profile: CostProfile
    decode_factor: float = 1.0
    prefill_factor: float = 1.0

    def step_s(self, work: StepWork) -> float:
        """Predicted seconds of a step."""
        profile = self.profile
        compute_s = (
            profile.decode_part_s(work) * self.decode_factor + profile.prefill_part_s(work) * self.prefill_factor
        )
        return compute_s + profile.layered_part_s(work, compute_s)

    def prefill_s(self, num_tokens: int, num_computed: int = 0) -> float:
        """Predicted seconds that ``num_tokens`` prompt tokens behind ``num_computed`` add to a step."""
        work = StepWork(prefill_tokens=num_tokens, prefill_pairs=chunk_pairs(num_tokens, num_computed), num_prefills=1)
        return self.profile.prefill_part_s(work) * self.prefill_factor

    def store_s(self, num_bytes: int) -> float:
        """Predicted seconds of one store."""
        return self.profile.store(num_bytes)

    def load_s(self, num_bytes: int) -> float:
        """Predicted seconds of one load."""
        return self.profile.load(num_bytes)

    def load_bytes_in(self, seconds: float) -> int:
        """Bytes that the link loads in ``seconds``, latency left out (the link budget of streamed decode)."""
        per_byte = seconds_per_byte(self.profile.load)
        return int(max(seconds, 0.0) / per_byte) if per_byte > 0 else 1 << 62


def seconds_per_byte(copy: Curve) -> float:
    """What a further byte adds to a copy of many (bytes to seconds): the link's bandwidth, latency left out."""
    probe_bytes = 1 << 30
    return (copy(2 * probe_bytes) - copy(probe_bytes)) / probe_bytes


def generic_profile(kv_bytes_per_token: int = 0) -> CostProfile:
    """A profile of plausible shape and unknown scale, for an engine without one: online correction scales it.

    Prefill is 1/100 of a decode step per token; copies run at 8 GB/s.
    """
    link = Curve([(0, 20e-6), (1 << 30, 20e-6 + (1 << 30) / 8e9)])
    return CostProfile(
        name="generic",
        step_s=0.01,
        request_s=2e-5,
        tokens=Curve([(0, 0.0), (1000, 0.1)]),
        decode_context=Curve([(0, 0.0), (100_000, 0.005)]),
        pair_s=2e-9,
        store=link,
        load=link,
        exposed_share=0.1,
        kv_bytes_per_token=kv_bytes_per_token,
    )


def load_profile(path: str | Path) -> CostProfile:
    """Read and check a profile.

    Raises:
        ConfigError: the file is unreadable or does not hold a profile; the message names the place and the cure.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: found no readable file ({reason}); expected a cost profile; {CURE}") from None
    return parse_profile(text, where=str(path))


def parse_profile(text: str, *, where: str) -> CostProfile:
    """Read a profile from JSON text.

    Args:
        text: What :meth:`CostProfile.to_json` wrote.
        where: The file's name, for messages.

    Raises:
        ConfigError: see :func:`load_profile`.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: found what is not JSON ({error}); expected a cost profile; {CURE}") from None
    reader = _Reader(where)
    top = reader.mapping(document, "$")
    if top.get("schema") != SCHEMA:
        raise reader.wrong("$.schema", top.get("schema"), f"the number {SCHEMA}")
    step, link = reader.mapping(top.get("step"), "$.step"), reader.mapping(top.get("link"), "$.link")
    made = reader.mapping(top.get("made", {}), "$.made")
    name = top.get("name")
    if not isinstance(name, str):
        raise reader.wrong("$.name", name, "text")
    exposed_share = reader.number(step.get("exposed_share", 0.0), "$.step.exposed_share")
    if exposed_share > 1:
        raise reader.wrong("$.step.exposed_share", exposed_share, "a number from 0 to 1")
    return CostProfile(
        name=name,
        step_s=reader.number(step.get("fixed_s"), "$.step.fixed_s"),
        request_s=reader.number(step.get("request_s"), "$.step.request_s"),
        tokens=reader.curve(step.get("tokens_s"), "$.step.tokens_s"),
        decode_context=reader.curve(step.get("decode_context_s"), "$.step.decode_context_s"),
        pair_s=reader.number(step.get("prefill_pair_s"), "$.step.prefill_pair_s"),
        store=reader.curve(link.get("store_s"), "$.link.store_s"),
        load=reader.curve(link.get("load_s"), "$.link.load_s"),
        layered_step_s=reader.number(step.get("layered_s", 0.0), "$.step.layered_s"),
        exposed_share=exposed_share,
        kv_bytes_per_token=int(reader.number(top.get("kv_bytes_per_token", 0), "$.kv_bytes_per_token")),
        made={str(key): str(value) for key, value in made.items()},
    )


class _Reader:
    """Checks values of a document and says where one is wrong."""

    def __init__(self, where: str) -> None:
        self._where = where

    def wrong(self, path: str, found: object, expected: str) -> ConfigError:
        """The error for a value at ``path``."""
        shown = "nothing" if found is None else repr(found)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        return ConfigError(f"{self._where}: {path}: found {shown}; expected {expected}; {CURE}")

    def mapping(self, value: object, path: str) -> Mapping[str, Any]:
        """``value`` if it is a mapping."""
        if not isinstance(value, dict):
            raise self.wrong(path, value, "a mapping")
        return value

    def number(self, value: object, path: str) -> float:
        """``value`` if it is a finite number of at least 0."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise self.wrong(path, value, "a finite number, 0 or more")
        return float(value)

    def curve(self, value: object, path: str) -> Curve:
        """``value`` if it is a list of points of growing x and falling nowhere."""
        if not isinstance(value, list) or not value:
            raise self.wrong(path, value, "a list of at least one [x, seconds] pair")
        points: list[tuple[float, float]] = []
        for i, point in enumerate(value):
            if not isinstance(point, list) or len(point) != 2:
                raise self.wrong(f"{path}[{i}]", point, "a pair [x, seconds]")
            x, y = (self.number(number, f"{path}[{i}][{j}]") for j, number in enumerate(point))
            if points and (x <= points[-1][0] or y < points[-1][1]):
                raise self.wrong(f"{path}[{i}]", point, "x above the last point's and seconds not below its")
            points.append((x, y))
        if len(points) == 1 and points[0][0] <= 0:
            raise self.wrong(f"{path}[0]", value[0], "an only point with x above 0")
        return Curve(points)
