"""What prompts of a trace have in common: Mooncake's ``hash_ids``, one for each 512 tokens of a prompt.

Equal ids stand for equal tokens after equal beginnings. Invariant: scaled to other lengths, blocks are scaled with the
prompts, so that prompts begin alike as far as their ids do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from layerkv.strict_yaml import show

HASH_BLOCK_TOKENS = 512


class PromptBlock(NamedTuple):
    """Some tokens of a prompt, the same in all prompts: those of ``hash_id``, from the first one on."""

    hash_id: int
    num_tokens: int


def read_hash_ids(found: object, prompt_tokens: int) -> tuple[int, ...]:
    """The ids of a row of a trace; none if it has none.

    Raises:
        ValueError: they are not one for each block, where the one of a last block that is not whole may be left out.
    """
    if found is None:
        return ()
    if not isinstance(found, list) or not all(type(each) is int and each >= 0 for each in found):
        raise ValueError(f"found {show(found)} as hash_ids; expected a list of whole numbers, 0 or more")
    least, most = prompt_tokens // HASH_BLOCK_TOKENS, -(-prompt_tokens // HASH_BLOCK_TOKENS)
    if not least <= len(found) <= most:
        raise ValueError(
            f"found {len(found)} hash_ids for {prompt_tokens} tokens; expected {most}, one for each {HASH_BLOCK_TOKENS}"
        )
    return tuple(found)


def prompt_blocks(hash_ids: Iterable[int], prompt_tokens: int, token_scale: float) -> tuple[PromptBlock, ...]:
    """The blocks of a prompt that is ``prompt_tokens`` long after scaling; what comes after them is its own."""
    block_tokens = HASH_BLOCK_TOKENS * token_scale
    blocks = []
    for index, hash_id in enumerate(hash_ids):
        start, end = round(index * block_tokens), min(round((index + 1) * block_tokens), prompt_tokens)
        if end > start:
            blocks.append(PromptBlock(hash_id, end - start))
    return tuple(blocks)


def repeated_share(prompts: Iterable[tuple[int, tuple[PromptBlock, ...]]]) -> float:
    """Which share of all prompt tokens an earlier prompt began with: what endless prefix caches would save.

    Args:
        prompts: Length and blocks of each, in order of arrival.
    """
    seen: dict[tuple[int, int], int] = {}
    num_tokens = num_repeated = 0
    for prompt_tokens, blocks in prompts:
        num_tokens += prompt_tokens
        is_repeated, before = True, -1
        for hash_id, length in blocks:
            key = (before, hash_id)  # an id stands for what is before it too
            known = seen.get(key, 0)
            if is_repeated:
                num_repeated += min(length, known)
                is_repeated = known >= length
            seen[key] = max(length, known)
            before = hash_id
    return num_repeated / num_tokens if num_tokens else 0.0
