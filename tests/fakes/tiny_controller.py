"""A controller for a small engine, and the engine as it stands before a step."""

from __future__ import annotations

from typing import Any

from layerkv.config import SloClass
from layerkv.scheduler.controller import Controller
from layerkv.scheduler.engine import EngineShape, EngineState, Running
from tests.fakes.tiny_scheduler import BLOCK_BYTES, BLOCK_TOKENS, policy, profile

CHAT = SloClass(name="chat", ttft_s=1.0, tpot_s=0.05)
SHAPE = EngineShape("auto", BLOCK_TOKENS, BLOCK_BYTES, pool_blocks=100, zone_blocks=40, host_blocks=120)


def controller(*, is_measured: bool = True, keep_log: bool = False, **switches: Any) -> Controller:
    return Controller(policy(**switches), SHAPE, profile(), is_measured=is_measured, keep_log=keep_log)


def arrive(c: Controller, *names: str, num_tokens: int = 160, at_s: float = 10.0, slo: SloClass = CHAT) -> None:
    for name in names:
        c.arrive(name, slo, now_s=at_s, arrival_s=at_s, num_tokens=num_tokens, max_tokens=50)


def engine(*running: Running, step: int = 1, **changes: Any) -> EngineState:
    free = EngineState(step, running, (), 100, 0, 40, 120, 16, 2048)
    return free._replace(**changes)


def decoding(name: str, num_output: int = 5, num_tokens: int = 165, **changes: Any) -> Running:
    running = Running(name, num_tokens, num_tokens - 1, num_output, False, -(-num_tokens // BLOCK_TOKENS))
    return running._replace(**changes)
