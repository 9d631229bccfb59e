"""Why a process ended, out of what it printed. Pure functions of a log's lines.

vLLM is several processes: the one that fails first prints its traceback, and the one that an operator started ends
many lines later with an error that says only "See root cause above".
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# What vLLM puts before each line: whose it is, and what its logger adds.
_PREFIX = re.compile(r"^(\(\w+[^)]* pid=\d+\) ?)?((DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d [\d:]+ \[[^\]]*\] ?)?")
_RAISED = re.compile(r"^(\w+\.)*\w*(Error|Exception|Exit|Interrupt|Warning): \S|^Exception: \S|^\S+( \S+)?: error: \S")
_ELSEWHERE = re.compile(r"root cause|see (the )?(stack ?trace|log|error)s? .*above", re.IGNORECASE)
_GOES_ON = re.compile(r"validation errors? for ")


def cause_of(lines: Sequence[str], *, num_last: int) -> str | None:
    """The error that ended a process, in one line; None if the log has none.

    It is the last one raised before the first that points to it, wherever that stands; where none does, it is among
    the `num_last` last lines, since an error further up was survived.
    """
    plain = [_PREFIX.sub("", line).rstrip() for line in lines]
    raised = [index for index, line in enumerate(plain) if _RAISED.match(line)]
    pointing = [index for index in raised if _ELSEWHERE.search(plain[index])]
    causes = [index for index in raised if index not in pointing]
    if pointing:
        before = [index for index in causes if index < pointing[0]]
        # Processes share a log, and the first to speak need not be the first to fail.
        found = before[-1:] or causes[:1]
    else:
        found = [index for index in causes if index >= len(plain) - num_last][-1:]
    if not found:
        return None
    cause = plain[found[0]]
    following = plain[found[0] + 1].strip() if found[0] + 1 < len(plain) else ""
    return f"{cause}: {following}" if _GOES_ON.search(cause) and following else cause
