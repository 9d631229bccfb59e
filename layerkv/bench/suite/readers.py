"""What the answer to each request was to whoever reads it: one record and its class's objectives, judged.

Pure functions: what the words mean is in :mod:`layerkv.figures`. Invariant: token times are those at which the client
had them.
"""

from __future__ import annotations

from dataclasses import dataclass

from layerkv import figures
from layerkv.bench.records import RequestRecord, tpot_s, ttft_s
from layerkv.config import SloClass, SloPolicy


@dataclass(frozen=True, slots=True)
class Reading:
    """One request's answer; what only a reader can tell is None where nobody reads along, or nothing came.

    Attributes:
        met_slo: It finished and met all objectives of its class, TPOT on the mean.
        is_fluid: It finished and flowed; where nobody reads, that is `met_slo`.
        lag_s: All waits of its reader together.
        longest_pause_s: The longest of them.
        num_on_time: Tokens that came when due, whoever reads them.
        fluidity_index: Etalon's; None without tokens.
    """

    met_slo: bool
    is_fluid: bool
    lag_s: float | None = None
    longest_pause_s: float | None = None
    num_on_time: int = 0
    fluidity_index: float | None = None


def slo_of(request: RequestRecord, policy: SloPolicy) -> SloClass:
    """The class whose objectives hold for it."""
    return policy.classes[request.slo_class or policy.default_class]


def reading_of(request: RequestRecord, policy: SloPolicy) -> Reading:
    """Judges one request by its class."""
    slo, times_s = slo_of(request, policy), request.token_times_s
    is_whole = request.error is None
    met_slo = is_whole and figures.met_slo(slo, ttft_s(request), tpot_s(request), max(request.gaps_s, default=0.0))
    reader = figures.reader_of(slo, times_s)
    is_read = slo.has_reader and bool(times_s)
    return Reading(
        met_slo,
        is_whole and figures.is_fluid(slo, ttft_s(request), reader.lag_s) if slo.has_reader else met_slo,
        reader.lag_s if is_read else None,
        reader.longest_pause_s if is_read else None,
        figures.num_on_time(slo, request.arrival_s, times_s),
        figures.fluidity_index(slo, request.arrival_s, times_s),
    )
