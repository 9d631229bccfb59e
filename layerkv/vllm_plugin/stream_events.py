"""What is read of vLLM's token streams: server-sent events, cut out of a response's body and looked at one by one.

Nothing is changed: the bytes of all events, in order, are the bytes of the body.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import msgspec

_BLANK_LINE = re.compile(rb"\r\n\r\n|\n\n|\r\r")


class EventSplitter:
    """Cuts a body that comes in parts into events. A part may hold a piece of one, or several."""

    def __init__(self) -> None:
        self._begun = b""

    def feed(self, part: bytes) -> list[bytes]:
        """The events that end in this part, each with the blank line that ends it."""
        text, start, events = self._begun + part, 0, []
        for end in _BLANK_LINE.finditer(text, max(len(self._begun) - 3, 0)):
            events.append(text[start : end.end()])
            start = end.end()
        self._begun = text[start:]
        return events

    def rest(self) -> bytes:
        """What has begun and not ended; it is forgotten then."""
        begun, self._begun = self._begun, b""
        return begun


class _Logprobs(msgspec.Struct):
    content: list[msgspec.Raw] | None = None
    tokens: list[msgspec.Raw] | None = None


class _Delta(msgspec.Struct):
    role: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(_Chunk)


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """What an event says.

    `choice` is None if it is of none, or of several. `num_tokens` is how many tokens it gives the choice's reader.
    """

    choice: int | None = None
    num_tokens: int = 0
    ends_choice: bool = False
    is_error: bool = False
    is_done: bool = False
    is_comment: bool = False


class EventReader:
    """Reads the events of one response.

    Tokens are counted where the event says how many it has: ``token_ids``, the continuous usage, log-probabilities.
    Else an event of a text counts as one token, which is what vLLM sends unless it lags, speculates or has a
    ``--stream-interval``. A count that is too small makes what follows due too early, never too late.
    """

    def __init__(self) -> None:
        self._num_tokens: dict[int, int] = {}
        """So many tokens of each choice have come."""

    def read(self, event: bytes) -> StreamEvent:
        """Never raises: what cannot be read is an event of no choice."""
        data = [line[5:] for line in event.splitlines() if line.startswith(b"data:")]
        if not data:
            return StreamEvent(is_comment=True)
        text = b"\n".join(data).strip()
        if text == b"[DONE]":
            return StreamEvent(is_done=True)
        try:
            chunk = _DECODER.decode(text)
        except msgspec.MsgspecError:
            return StreamEvent()
        if chunk.error is not None:
            return StreamEvent(is_error=True)
        if len(chunk.choices) != 1:
            return StreamEvent()
        [choice] = chunk.choices
        num_tokens = self._count(choice, chunk.usage)
        return StreamEvent(choice.index, num_tokens, ends_choice=choice.finish_reason is not None)

    def _count(self, choice: _Choice, usage: _Usage | None) -> int:
        before = self._num_tokens.get(choice.index, 0)
        if choice.token_ids is not None:
            num_tokens = len(choice.token_ids)
        elif usage is not None:
            num_tokens = max(usage.completion_tokens - before, 0)
        elif choice.delta is not None and choice.delta.role is not None:  # what opens a chat's answer
            num_tokens = 0
        elif before and choice.logprobs is not None:  # the first event may echo the prompt's, too
            num_tokens = len(choice.logprobs.tokens or choice.logprobs.content or ())
        else:
            num_tokens = 1
        self._num_tokens[choice.index] = before + num_tokens
        is_for_reader = choice.delta is None or not choice.delta.tool_calls  # a program takes tool calls
        return num_tokens if is_for_reader else 0
