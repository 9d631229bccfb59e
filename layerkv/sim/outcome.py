"""What a simulated load came to: per request, and as the figures that are reported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from layerkv.config import SloClass
from layerkv.figures import PERCENTILES, StreamTally, distribution, is_fluid, met_slo, tpot_s

_BIN = math.log(1.005)
"""Width of a bin of gaps, as a logarithm. Derived: a percentile read off bins is wrong by a quarter of a per
cent at most."""
_NOTHING: dict[str, float | None] = dict.fromkeys(("mean", *(name for name, _ in PERCENTILES)))


class RequestOutcome(NamedTuple):
    """One request; times in seconds of the virtual clock, from the start of the load.

    Attributes:
        request_id: The request.
        slo: Its class.
        arrival_s: When it arrived.
        prompt_tokens: Its prompt's length.
        output_tokens: Tokens that came out.
        first_token_s: When the first did; None if it was refused.
        finish_s: When the last did.
        tally: What was counted of its tokens as they came.
        longest_gap_s: Longest time between two of its tokens; 0 with fewer than two.
        num_parks: How often it was parked,
        num_recomputes: and how often its KV was given up.
    """

    request_id: str
    slo: SloClass
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    first_token_s: float | None
    finish_s: float | None
    tally: StreamTally
    longest_gap_s: float = 0.0
    num_parks: int = 0
    num_recomputes: int = 0

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None with fewer than two tokens."""
        if self.first_token_s is None or self.finish_s is None:
            return None
        return tpot_s(self.first_token_s, self.finish_s, self.output_tokens)

    @property
    def met_slo(self) -> bool:
        """Whether it met all objectives of its class."""
        return met_slo(self.slo, self.ttft_s, self.tpot_s, self.longest_gap_s)

    @property
    def is_fluid(self) -> bool:
        """Whether it flowed to its reader; where nobody reads along, whether it met all objectives of its class."""
        if not self.slo.has_reader:
            return self.met_slo
        return is_fluid(self.slo, self.ttft_s, self.tally.reader.lag_s)

    @property
    def lag_s(self) -> float | None:
        """All waits of its reader together; None if nobody reads along, or nothing came."""
        return self.tally.reader.lag_s if self._is_read else None

    @property
    def longest_pause_s(self) -> float | None:
        """The longest single one."""
        return self.tally.reader.longest_pause_s if self._is_read else None

    @property
    def end_to_end_s(self) -> float | None:
        """Arrival to last token."""
        return None if self.finish_s is None else self.finish_s - self.arrival_s

    @property
    def _is_read(self) -> bool:
        return self.slo.has_reader and self.first_token_s is not None


@dataclass(slots=True)
class GapHistogram:
    """Times between tokens, counted in bins of half a per cent: millions of them take no room."""

    counts: dict[int, int] = field(default_factory=dict)
    num: int = 0
    total_s: float = 0.0

    def add(self, gap_s: float, count: int = 1) -> None:
        """Count a gap."""
        at = math.floor(math.log(max(gap_s, 1e-9)) / _BIN)
        self.counts[at] = self.counts.get(at, 0) + count
        self.num += count
        self.total_s += gap_s * count

    def summary(self) -> dict[str, float | None]:
        """Mean and percentiles; None for each if nothing was counted."""
        if not self.num:
            return dict(_NOTHING)
        found: dict[str, float | None] = {"mean": self.total_s / self.num}
        bins = sorted(self.counts.items())
        for name, share in PERCENTILES:
            left = max(math.ceil(share * self.num), 1)
            for at, count in bins:
                left -= count
                if left <= 0:
                    found[name] = math.exp((at + 0.5) * _BIN)
                    break
        return found


@dataclass(frozen=True, slots=True)
class SimOutcome:
    """One policy under one load.

    Attributes:
        requests: All requests, in order of arrival.
        gaps: Times between tokens, over all requests.
        end_s: When the last token came out.
        num_steps: Engine steps.
        preemptions: Requests whose KV was given up and computed again.
        parks: Requests parked.
        fetches: Requests fetched.
        stored_bytes: Bytes stored.
        loaded_bytes: Bytes loaded.
        link_s_per_byte: What a byte takes to be stored, and loaded; 0 if nothing is copied.
        reasons: How often the scheduler gave each reason.
    """

    requests: Sequence[RequestOutcome]
    gaps: GapHistogram
    end_s: float
    num_steps: int
    preemptions: int = 0
    parks: int = 0
    fetches: int = 0
    stored_bytes: int = 0
    loaded_bytes: int = 0
    link_s_per_byte: tuple[float, float] = (0.0, 0.0)
    reasons: dict[str, int] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """The figures of a report, as JSON-ready data. Shares are None of nothing."""
        num = len(self.requests)
        met = sum(r.met_slo for r in self.requests)
        fluid = sum(r.is_fluid for r in self.requests)
        num_tokens = sum(r.output_tokens for r in self.requests)
        span_s = self.end_s - min((r.arrival_s for r in self.requests), default=0.0)
        of_class: dict[str, list[RequestOutcome]] = {}
        for r in self.requests:
            of_class.setdefault(r.slo.name, []).append(r)
        return {
            "ttft_s": distribution(r.ttft_s for r in self.requests) or _NOTHING,
            "second_token_s": distribution(r.tally.second_token_s for r in self.requests) or _NOTHING,
            "tpot_s": distribution(r.tpot_s for r in self.requests) or _NOTHING,
            "time_between_tokens_s": self.gaps.summary(),
            "end_to_end_s": distribution(r.end_to_end_s for r in self.requests) or _NOTHING,
            "fluid": fluid / num if num else None,
            "fluid_goodput_rps": fluid / span_s if span_s > 0 else None,
            "tokens_on_time": sum(r.tally.num_on_time for r in self.requests) / num_tokens if num_tokens else None,
            "lag_s": distribution(r.lag_s for r in self.requests) or _NOTHING,
            "longest_pause_s": distribution(r.longest_pause_s for r in self.requests) or _NOTHING,
            "fluidity_index": (distribution(r.tally.fluidity_index for r in self.requests) or _NOTHING)["mean"],
            "slo_attainment": met / num if num else None,
            "slo_attainment_by_class": {
                name: sum(r.met_slo for r in members) / len(members) for name, members in sorted(of_class.items())
            },
            "goodput_rps": met / span_s if span_s > 0 else None,
            "output_tokens_per_s": num_tokens / span_s if span_s > 0 else None,
            "requests": num,
            "refused": sum(r.first_token_s is None for r in self.requests),
            "preemptions": self.preemptions,
            "parks": self.parks,
            "fetches": self.fetches,
            "stored_bytes": self.stored_bytes,
            "loaded_bytes": self.loaded_bytes,
            "link_utilisation": {
                "store": self.stored_bytes * self.link_s_per_byte[0] / span_s if span_s > 0 else None,
                "load": self.loaded_bytes * self.link_s_per_byte[1] / span_s if span_s > 0 else None,
            },
            "steps": self.num_steps,
            "span_s": span_s,
            "reasons": dict(sorted(self.reasons.items())),
        }
