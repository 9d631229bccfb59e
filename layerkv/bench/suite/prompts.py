"""What the prompts of a load say: random tokens, but for blocks that a trace has several prompts share."""

from __future__ import annotations

from random import Random

from layerkv.sim.prompt_blocks import PromptBlock
from layerkv.sim.workload import SimRequest


class Prompts:
    """Writes prompts, one after the other. Invariant: they follow from seed, name and requests alone.

    A block's tokens follow from its id, so prompts are equal as far as their ids are. Its first tokens spell the id, so
    that two blocks differ that are long enough for that: ids that are not far apart differ in the first token.
    """

    def __init__(self, seed: int, name: str, ordinary: range) -> None:
        """``name`` of the point: another one has other prompts, which no cache knows from before."""
        self._rng = Random(f"{seed}: prompts of {name}")
        self._of_block = f"{seed}: prompts of {name}: block"
        self._ordinary = ordinary
        self._written: dict[int, list[int]] = {}

    @property
    def rng(self) -> Random:
        """Where tokens come from that nobody shares."""
        return self._rng

    def write(self, request: SimRequest) -> list[int]:
        """The token ids of the next prompt."""
        prompt = [token for block in request.blocks for token in self._block(block)]
        return prompt + self._rng.choices(self._ordinary, k=request.prompt_tokens - len(prompt))

    def _block(self, block: PromptBlock) -> list[int]:
        tokens = self._written.get(block.hash_id, [])
        if len(tokens) < block.num_tokens:
            spelt = _digits(block.hash_id, self._ordinary)
            more = Random(f"{self._of_block} {block.hash_id}").choices(self._ordinary, k=block.num_tokens)
            tokens = self._written[block.hash_id] = (spelt + more)[: block.num_tokens]
        return tokens[: block.num_tokens]


def _digits(number: int, ordinary: range) -> list[int]:
    """A number below 2^64 in as many digits as there are tokens, the lowest digit first."""
    digits, base, rest = [], len(ordinary), 1 << 64
    while rest > 0:
        number, digit = divmod(number, base)
        digits.append(ordinary[digit])
        rest //= base
    return digits
