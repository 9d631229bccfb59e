"""Notices a request body with ``"slo_class"`` at its top level, where vLLM ignores it without a word.

vLLM hands none of its public hooks the fields that it ignores, so this looks at bodies in our middleware, which users
switch on (:class:`~layerkv.vllm_plugin.overload.RetryAfter`). It warns once per API server, and looks no more then.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


class _Body(msgspec.Struct):
    """What is read of a body; everything else is skipped."""

    slo_class: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    vllm_xargs: Any = None


class StrayClassWatch:
    """Sees request bodies pass; one per process."""

    def __init__(self) -> None:
        self._has_warned = False

    def watched(self, scope: Message, receive: Receive) -> Receive:
        """``receive``, whose messages pass unchanged and are looked at when the body is whole."""
        if self._has_warned or scope["type"] != "http" or scope.get("method") != "POST":
            return receive
        parts: list[bytes] = []

        async def receive_and_look() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                parts.append(message.get("body", b""))
                if not message.get("more_body", False):
                    self._look(b"".join(parts), scope.get("path", ""))
                    parts.clear()
            return message

        return receive_and_look

    def _look(self, body: bytes, path: str) -> None:
        if self._has_warned or b'"slo_class"' not in body:
            return
        try:
            found = msgspec.json.decode(body, type=_Body)
        except msgspec.MsgspecError:  # vLLM says what is wrong with it
            return
        is_elsewhere = isinstance(found.vllm_xargs, dict) and "slo_class" in found.vllm_xargs
        if found.slo_class is msgspec.UNSET or is_elsewhere:
            return
        self._has_warned = True
        logger.warning(
            'a request to %s has "slo_class": %s at the top level of its body, where vLLM ignores it: it is served by '
            'the default class; put it into "vllm_xargs": {"slo_class": ...} (further ones are not reported)',
            path,
            bytes(found.slo_class).decode(errors="replace")[:80],
        )
