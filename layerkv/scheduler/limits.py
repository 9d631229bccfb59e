"""The constants of the policy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PolicyLimits:
    """Constants of the policy. All constants of the package are listed in docs/constants.md.

    Attributes:
        headroom_tokens: Tokens that every resident request can still make before the pool runs short, kept free
            when one more is let in, whatever the forecast says. Hysteresis: a fetch that would be parked again at
            once is not worth its copies. Not measured: chosen by simulated loads (2026-11-29, no result file).
        min_resident_steps: A request fetched or admitted less long ago is parked only if no other of its rank, or
            of a worse one, can be. Not measured: chosen by judgement.
        max_overtakes: In how many steps one of those left behind may be overtaken. Not measured: chosen by judgement.
        min_prefill_tokens: Prompt tokens computed although decodes have no slack. Not measured: chosen by judgement.
        max_idle_steps: So many steps without any prompt tokens come before those. Not measured: chosen by judgement.
        scan: How many waiting prompts are looked at in one step. Not measured: chosen by judgement; with it a decision
            of policy slo took 0.30 ms (median, 1,000 waiting; Intel Xeon with 2 cores, 2026-11-21,
            benchmarks/results/2026-11-21-decide.json).
        scan_parked: How many parked requests are. Not measured: chosen by simulated loads (2026-11-28, no result
            file).
        look_steps: A decision stands for so many steps at most, and as often somebody to copy to host memory is looked
            for. Not measured: chosen by judgement; rules that act in time look as many steps ahead.
        ahead_steps: The forecast's horizon: shortages that near are prepared for by storing ahead. Not measured: chosen
            by judgement.
        overcommit: How many times the pool the forecast may fill it. A wrong guess costs a park, which was stored
            ahead; a tenth of the pool kept empty costs throughput in every step. Not measured: chosen by one run of the
            simulated demo (2026-11-21, no result file; figures in docs/decisions.md).
        rescue_steps: A request whose latest time to go on is nearer than so many steps may have room made for it. Not
            measured: chosen by judgement.
    """

    headroom_tokens: int = 4
    min_resident_steps: int = 32
    max_overtakes: int = 64
    min_prefill_tokens: int = 256
    max_idle_steps: int = 8
    scan: int = 64
    scan_parked: int = 64
    look_steps: int = 4
    ahead_steps: int = 64
    rescue_steps: int = 4
    overcommit: float = 1.1
