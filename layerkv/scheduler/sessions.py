"""Sessions whose clients send their input piece by piece: each turn is a stream of its own to whoever reads it.

Between two turns a session keeps its KV, and the engine waits for its client: no objective counts, and nobody's figures
do.
"""

from __future__ import annotations

from layerkv.scheduler.books import RequestBooks
from layerkv.scheduler.reasons import End


def turn_ended(books: RequestBooks, request_id: str, now_s: float) -> None:
    """A session has answered, after all of the turn's tokens were told, and waits for its client's next input.

    The turn counts as a request: fluid or not, its reader's waits, its length.
    """
    books.catch_up_with(request_id)
    tracked = books.tracked.get(request_id)
    if tracked is None or tracked.awaits_input:
        return
    tracked.awaits_input = True
    num_output = tracked.reader.num_tokens
    if num_output:
        books.lengths.observe(tracked.slo.name, num_output, is_bound=False)
    pause = books.streams.ended(tracked, End.FINISHED, now_s)
    books.journal.tell_end(now_s, request_id, tracked, num_output, End.FINISHED, pause)


def turn_begins(
    books: RequestBooks, request_id: str, *, arrival_s: float, now_s: float, num_tokens: int, max_tokens: int
) -> None:
    """The next input of a session that waited for it has come; of any other session, nothing.

    Args:
        books: Those that it is in.
        request_id: The session.
        arrival_s: When the input came to the server; the turn's objectives count from there.
        now_s: Current time.
        num_tokens: Tokens that are to be computed.
        max_tokens: Output tokens that the turn may have.
    """
    tracked = books.tracked.get(request_id)
    if tracked is None or not tracked.awaits_input:
        return
    tracked.begin_turn(arrival_s, max_tokens)
    books.journal.tell_arrival(now_s, request_id, tracked.slo, num_tokens)
