"""The decision log: one JSON line for each change in what happens to a request, for ``layerkv explain``.

The first line is a header. Lines are buffered and written about once per second while the engine steps; what it
wrote last before it fell idle stays in the buffer until its next step. Writing must never disturb the
scheduler: what the disk refuses ends the log, with one message.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from layerkv.errors import ConfigError
from layerkv.scheduler.reasons import Event, LogEntry, Reason

FORMAT = "layerkv_decision_log"
VERSION = 1
FLUSH_INTERVAL_S = 1.0
"""What was written less long ago may be lost when the process is killed. Not measured: chosen by judgement."""
MAX_BYTES = 256 << 20
"""Size at which a log is begun anew: with the one before it, a log takes twice that. Not measured: chosen by
judgement."""


class DecisionLog:
    """Appends to a file, which is begun anew (the old one kept as ``.1``) when it grows past ``max_bytes``.

    Not thread-safe. Lifetime: until :meth:`close`; afterwards, or after an error, writing does nothing.
    """

    def __init__(
        self, path: str | Path, *, on_error: Callable[[str], None] | None = None, max_bytes: int = MAX_BYTES
    ) -> None:
        """Open the file.

        Raises:
            ConfigError: it cannot be written.
        """
        self._path = Path(path)
        self._on_error = on_error
        self._max_bytes = max_bytes
        self._flushed_s = float("-inf")
        try:
            self._file: TextIO | None = self._begin()
        except OSError as error:
            raise _unwritable(self._path, error) from None

    def write(self, entries: Iterable[LogEntry], now_s: float | None = None) -> None:
        """Append entries, if there are any.

        What is buffered reaches the disk with the first call a second or more after the last time, or at once without
        ``now_s``.
        """
        if self._file is None:
            return
        try:
            for entry in entries:
                self._file.write(_line(entry))
            if now_s is None or now_s - self._flushed_s >= FLUSH_INTERVAL_S:
                self._flush(now_s)
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Write what is buffered and close the file. Idempotent."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._give_up(error)
            self._file = None

    def _flush(self, now_s: float | None) -> None:
        assert self._file is not None
        self._file.flush()
        if now_s is not None:
            self._flushed_s = now_s
        if self._file.tell() > self._max_bytes:
            self._file.close()
            os.replace(self._path, self._path.with_name(f"{self._path.name}.1"))
            self._file = self._begin()

    def _begin(self) -> TextIO:
        last = self._last_byte()
        file = self._path.open("a", encoding="utf-8")
        if last not in (b"", b"\n"):  # an earlier process was killed in the middle of a line
            file.write("\n")
        file.write(json.dumps({FORMAT: VERSION}) + "\n")
        return file

    def _last_byte(self) -> bytes:
        """The last byte of the log that is there.

        Raises:
            OSError: it cannot be read, or is no decision log.
        """
        if not self._path.is_file() or not self._path.stat().st_size:
            return b""
        with self._path.open("rb") as file:
            if not _is_header(file.readline()):
                raise FileExistsError(errno.EEXIST, "another file is there")
            file.seek(-1, os.SEEK_END)
            return file.read(1)

    def _give_up(self, error: OSError) -> None:
        self._file = None
        if self._on_error is not None:
            self._on_error(f"the decision log {self._path} ends here: {error}")


def require_writable(path: str | Path) -> None:
    """Check, and change nothing, whether a log can begin or go on there.

    Raises:
        ConfigError: it cannot.
    """
    path = Path(path)
    try:
        if path.exists():
            path.open("ab").close()
            with path.open("rb") as file:
                if (first := file.readline()) and not _is_header(first):
                    raise FileExistsError(errno.EEXIST, "another file is there")
        elif not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        elif not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"decision_log: found {str(path)!r}, which cannot be written ({error.strerror}); expected the "
        "path of a file; set it to one in a folder that exists, or leave it out"
    )


def read_log(path: str | Path) -> Iterator[LogEntry]:
    """Read a log, entry by entry; a line cut off (the engine is writing it, or was killed in it) is left out.

    Raises:
        ConfigError: the file is unreadable or holds something else; the message names the line.
    """
    try:
        with Path(path).open(encoding="utf-8") as file:
            header = file.readline()
            if not _is_header(header):
                raise _foreign(path, 1, header)
            cut: ConfigError | None = None
            for number, line in enumerate(file, 2):
                if _is_header(line):  # the engine was started again, and may have been killed in the line before
                    cut = None
                    continue
                if cut is not None:
                    raise cut
                if not line.endswith("\n"):
                    return
                try:
                    entry = _entry(json.loads(line))
                except (ValueError, KeyError, TypeError):
                    cut = _foreign(path, number, line)
                    continue
                yield entry
            if cut is not None:
                raise cut
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: found no readable file ({reason}); expected a decision log; name one") from None


def _line(entry: LogEntry) -> str:
    fields: dict[str, Any] = {
        "time_s": round(entry.time_s, 6),
        "request_id": entry.request_id,
        "event": entry.event.value,
    }
    if entry.reason is not None:
        fields["reason"] = entry.reason.value
    if entry.facts:
        fields["facts"] = entry.facts
    return json.dumps(fields) + "\n"


def _entry(fields: dict[str, Any]) -> LogEntry:
    reason = fields.get("reason")
    return LogEntry(
        time_s=float(fields["time_s"]),
        request_id=str(fields["request_id"]),
        event=Event(fields["event"]),
        reason=None if reason is None else Reason(reason),
        facts=dict(fields.get("facts", {})),
    )


def _is_header(line: str | bytes) -> bool:
    try:
        document = json.loads(line)
    except ValueError:
        return False
    return isinstance(document, dict) and document.get(FORMAT) == VERSION


def _foreign(path: str | Path, number: int, line: str) -> ConfigError:
    shown = line.strip()[:60]
    return ConfigError(
        f"{path}: line {number}: found {shown!r}; expected a decision log; write one with decision_log in "
        "kv_connector_extra_config, or with `layerkv simulate --log`"
    )
