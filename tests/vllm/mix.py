"""Random mixes of requests for the exactness tests, as data: both the engine process and the test build them."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

NUM_REQUESTS = 14
VOCABULARY = range(3, 500)
NUM_IMAGES = 5


@dataclass(frozen=True, slots=True)
class MixRequest:
    """One request of a mix.

    Attributes:
        prompt: Token ids.
        max_tokens: Output length (EOS is ignored).
        arrive_step: Engine step before which it is added.
        abort_step: Engine step before which it is aborted, or None.
        images: Images in the prompt: behind which token, and the seed of each.
        adapter: Number of its LoRA adapter, from 1 on; 0 for the model as it is.
        is_embedded: Its prompt is given as embeddings.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    arrive_step: int
    abort_step: int | None
    images: tuple[tuple[int, int], ...] = ()
    adapter: int = 0
    is_embedded: bool = False


def make_mix(
    seed: int,
    *,
    max_prompt: int = 300,
    sharing: bool = False,
    aborts: bool = False,
    unaborted: bool = False,
    images: bool = False,
    adapters: int = 0,
    embeds: bool = False,
    repeats: bool = False,
) -> list[MixRequest]:
    """Requests of random lengths that arrive over some steps; some share a prefix, some are aborted at random.

    With ``unaborted`` they are the same requests, and none is aborted. With ``images`` two in three prompts have one or
    two; with ``adapters`` nearly all use one of so many; with ``embeds`` every other is given as embeddings; with
    ``repeats`` prompts say a few words again and again.
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
    more = random.Random(f"{seed} more")
    if images:
        requests = [replace(each, images=_images(each.prompt, more.random(), sharing=sharing)) for each in requests]
    if adapters:
        requests = [
            replace(each, adapter=more.randint(1, adapters) if more.random() < 0.85 else 0) for each in requests
        ]
    if embeds:
        requests = [replace(each, is_embedded=number % 2 == 0) for number, each in enumerate(requests)]
    if repeats:
        requests = [replace(each, prompt=_repeating(more, each.prompt)) for each in requests]
    if unaborted:
        return [replace(request, abort_step=None) for request in requests]
    return requests


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.choice(VOCABULARY) for _ in range(count)]


def _images(prompt: tuple[int, ...], drawn: float, *, sharing: bool) -> tuple[tuple[int, int], ...]:
    """Few different ones, so that they meet again in the encoder's cache. Prompts that begin alike have the same."""
    rng = random.Random(f"{prompt[:20]}" if sharing else drawn)
    places = [rng.randrange(min(len(prompt), 20) if sharing else len(prompt)) for _ in range(rng.randrange(3))]
    return tuple((place, rng.randrange(NUM_IMAGES)) for place in sorted(places))


def _repeating(rng: random.Random, prompt: tuple[int, ...]) -> tuple[int, ...]:
    length = rng.randrange(2, 9)
    return tuple(prompt[place % length] for place in range(len(prompt)))
