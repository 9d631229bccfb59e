"""vLLM's queue of waiting requests, showing it only those that the policy chose for this step.

vLLM's scheduling scan takes requests from the front until one does not fit: order and visibility decide everything.
Everybody else stays in the queue and counts as waiting, at no cost per step however many they are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from vllm.v1.core.sched.request_queue import RequestQueue
from vllm.v1.request import Request


class WaitingQueue(RequestQueue):
    """See the module. Its length counts everybody; its truth value says whether vLLM's scan finds anybody."""

    def __init__(self) -> None:
        self._all: dict[str, Request] = {}
        self._visible: deque[Request] = deque()

    def show(self, requests: Iterable[Request]) -> None:
        """From now on vLLM finds exactly these, in this order. All must be in the queue."""
        self._visible = deque(requests)
        assert all(request.request_id in self._all for request in self._visible)

    def add_request(self, request: Request) -> None:
        """Enter, unseen until shown."""
        self._all[request.request_id] = request

    def pop_request(self) -> Request:
        """Take the first visible one out."""
        request = self._visible.popleft()
        del self._all[request.request_id]
        return request

    def peek_request(self) -> Request:
        """The first visible one."""
        return self._visible[0]

    def prepend_request(self, request: Request) -> None:
        """Enter (after a preemption), unseen until shown."""
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Enter (skipped by vLLM's scan), unseen until shown."""
        for request in requests:
            self.add_request(request)

    def remove_request(self, request: Request) -> None:
        """Leave."""
        self.remove_requests((request,))

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Leave; those that are not here are left out, as vLLM expects."""
        leaving = {request.request_id for request in requests}
        for request_id in leaving:
            self._all.pop(request_id, None)
        if any(request.request_id in leaving for request in self._visible):
            self._visible = deque(r for r in self._visible if r.request_id not in leaving)

    def __bool__(self) -> bool:
        return bool(self._visible)

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._all.values())
