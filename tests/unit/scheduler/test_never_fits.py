"""A request that never fits ends with HTTP 500 in vLLM 0.32, so start-up sees to it that hardly any can be one.

An engine starts only if pool, or with long contexts zone and host memory, hold ``max_model_len``. Then whoever vLLM's
front end lets in can run, but for a request longer than the pool that may not be parked (prompt logprobs, sessions).
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from layerkv.config import SloClass
from layerkv.scheduler.controller import Controller
from layerkv.scheduler.engine import EngineShape, EngineState
from layerkv.scheduler.reasons import Reason
from tests.fakes.tiny_scheduler import BLOCK_BYTES, BLOCK_TOKENS, policy, profile

CHAT = SloClass(name="chat", ttft_s=1.0, tpot_s=0.05)


@st.composite
def shapes(draw: st.DrawFn) -> EngineShape:
    """Engines that start."""
    longest_tokens = draw(st.integers(2, 40 * BLOCK_TOKENS))
    longest_blocks = -(-longest_tokens // BLOCK_TOKENS)
    long_contexts = draw(st.booleans())
    most = longest_blocks + 20
    return EngineShape(
        mode=draw(st.sampled_from(("auto", "layered") if long_contexts else ("auto", "layered", "resident"))),
        block_tokens=BLOCK_TOKENS,
        block_bytes=BLOCK_BYTES,
        pool_blocks=draw(st.integers(1 if long_contexts else longest_blocks, most)),
        zone_blocks=draw(st.integers(longest_blocks if long_contexts else 0, most)),
        host_blocks=draw(st.integers(longest_blocks if long_contexts else 0, most)),
        longest_tokens=longest_tokens,
        long_contexts=long_contexts,
    )


def refused(shape: EngineShape, num_tokens: int, max_tokens: int, *, can_layer: bool) -> set[Reason]:
    controller = Controller(policy(), shape, profile(), is_measured=True)
    times = {"now_s": 10.0, "arrival_s": 10.0}
    controller.arrive("a", CHAT, num_tokens=num_tokens, max_tokens=max_tokens, can_layer=can_layer, **times)
    free = (shape.pool_blocks, 0, shape.zone_blocks, shape.host_blocks, 16, 2048)
    _, decision = controller.decide(EngineState(1, (), (), *free), 10.0)
    return {refusal.reason for refusal in decision.refuse}


@given(shapes(), st.data())
def test_whoever_may_be_parked_always_fits(shape: EngineShape, data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(1, shape.longest_tokens - 1))  # vLLM's front end lets no longer one in
    max_tokens = data.draw(st.integers(1, 2 * shape.longest_tokens))
    assert refused(shape, num_tokens, max_tokens, can_layer=True) == set()


@given(shapes(), st.data())
def test_whoever_may_not_fits_unless_it_outgrows_the_pool(shape: EngineShape, data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(1, shape.longest_tokens - 1))
    max_tokens = data.draw(st.integers(1, shape.longest_tokens))
    found = refused(shape, num_tokens, max_tokens, can_layer=False)
    fits = min(num_tokens + max_tokens, shape.longest_tokens) <= shape.pool_blocks * BLOCK_TOKENS
    if fits or not shape.long_contexts:
        assert found == set()
    elif num_tokens >= shape.pool_blocks * BLOCK_TOKENS:
        assert found == {Reason.NEVER_FITS}
