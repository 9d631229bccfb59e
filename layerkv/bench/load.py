"""The open-loop load of a benchmark run, as data: requests to send, and a spec that a random load follows from.

Pure functions of a `LoadSpec`: every process that holds the same spec builds the same requests, so only the
spec travels between the demo and its engine processes. Invariant: two engines given one spec see the same
prompts, lengths and arrival times.
"""

from __future__ import annotations

import msgspec
import numpy as np

from layerkv.errors import ConfigError

# The tiny models' first ids are <s>, </s> and <pad>; random prompts leave them out.
FIRST_ORDINARY_TOKEN_ID = 3


class LoadSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Poisson arrivals with uniformly distributed prompt and output lengths.

    Lengths are inclusive ranges (least, most). Outputs are meant to be generated with `ignore_eos`, so that
    they have exactly the length asked for.
    """

    num_requests: int
    rate_per_s: float
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    vocab_size: int
    seed: int = 0
    slo_class: str | None = None

    def __post_init__(self) -> None:
        if self.num_requests < 1:
            raise ConfigError(f"num_requests is {self.num_requests}; expected at least 1")
        if not self.rate_per_s > 0:
            raise ConfigError(f"rate_per_s is {self.rate_per_s}; expected a rate above 0")
        if self.vocab_size <= FIRST_ORDINARY_TOKEN_ID:
            raise ConfigError(f"vocab_size is {self.vocab_size}; expected over {FIRST_ORDINARY_TOKEN_ID}")
        for name in ("prompt_tokens", "output_tokens"):
            least, most = getattr(self, name)
            if not 1 <= least <= most:
                raise ConfigError(f"{name} is ({least}, {most}); expected 1 <= least <= most")

    @property
    def mean_context_tokens(self) -> float:
        """Expected prompt plus output tokens of one request."""
        return (sum(self.prompt_tokens) + sum(self.output_tokens)) / 2

    @property
    def max_context_tokens(self) -> int:
        """Prompt plus output tokens of the longest request that the ranges allow."""
        return self.prompt_tokens[1] + self.output_tokens[1]


class PlannedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request to send.

    Attributes:
        request_id: Unique in its load.
        arrival_s: When it is due, in seconds after the start; for a later turn, after the end of the turn before.
        prompt: Token ids; with `history`, those of a later turn follow all that was said before.
        output_tokens: Tokens to generate, whatever the model would rather do; with `stop`, at most.
        max_tokens: Tokens that its client asks for at most, if that is more: then the generator hangs up after
            `output_tokens`, and no engine can know the length before.
        stop: Strings that end the answer where its text contains one.
        slo_class: Its SLO class; None is the policy's default.
        after: The request whose answer this one waits for.
        history: Whether a later turn says again all that was said before it.
    """

    request_id: str
    arrival_s: float
    prompt: list[int]
    output_tokens: int
    max_tokens: int | None = None
    stop: list[str] = []
    slo_class: str | None = None
    after: str | None = None
    history: bool = True


def make_load(spec: LoadSpec) -> list[PlannedRequest]:
    """The requests of `spec` in order of arrival. Equal specs give equal requests, on every machine."""
    rng = np.random.default_rng(spec.seed)
    arrivals_s = np.cumsum(rng.exponential(1 / spec.rate_per_s, spec.num_requests))
    prompt_lengths = rng.integers(*spec.prompt_tokens, size=spec.num_requests, endpoint=True)
    output_lengths = rng.integers(*spec.output_tokens, size=spec.num_requests, endpoint=True)
    return [
        PlannedRequest(
            request_id=f"request-{index:03d}",
            arrival_s=float(arrival_s),
            prompt=rng.integers(FIRST_ORDINARY_TOKEN_ID, spec.vocab_size, size=prompt_length).tolist(),
            output_tokens=int(output_tokens),
            slo_class=spec.slo_class,
        )
        for index, (arrival_s, prompt_length, output_tokens) in enumerate(
            zip(arrivals_s, prompt_lengths, output_lengths, strict=True)
        )
    ]
