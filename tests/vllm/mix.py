"""Random mixes of requests for the exactness tests, as data: both the engine process and the test build them."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

NUM_REQUESTS = 14
VOCABULARY = range(3, 500)


@dataclass(frozen=True, slots=True)
class MixRequest:
    """One request of a mix.

    Attributes:
        prompt: Token ids.
        max_tokens: Output length (EOS is ignored).
        arrive_step: Engine step before which it is added.
        abort_step: Engine step before which it is aborted, or None.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    arrive_step: int
    abort_step: int | None


def make_mix(
    seed: int, *, max_prompt: int = 300, sharing: bool = False, aborts: bool = False, unaborted: bool = False
) -> list[MixRequest]:
    """Requests of random lengths that arrive over some steps; some share a prefix, some are aborted at random.

    With ``unaborted`` they are the same requests, and none is aborted.
    """
    rng = random.Random(f"{seed} {max_prompt} {sharing} {aborts}")
    prefixes = [_tokens(rng, rng.randrange(33, 150)) for _ in range(2)]
    spread = rng.choice((0, 0, 10, 40))  # all at once, or over some steps
    requests = []
    for _ in range(NUM_REQUESTS):
        shared = rng.choice(prefixes) if sharing and rng.random() < 0.7 else []
        own = _tokens(rng, rng.randrange(1, max_prompt - len(shared)))
        requests.append(
            MixRequest(
                prompt=(*shared, *own),
                max_tokens=rng.choice((1, 2, rng.randrange(3, 110), rng.randrange(3, 110))),
                arrive_step=rng.randint(0, spread),
                abort_step=rng.randrange(1, 60) if aborts and rng.random() < 0.4 else None,
            )
        )
    if unaborted:
        return [replace(request, abort_step=None) for request in requests]
    return requests


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.choice(VOCABULARY) for _ in range(count)]
