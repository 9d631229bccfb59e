"""The child's side of `supervise`: a spec file comes in, progress goes to standard output, an outcome file goes out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias, TypeVar

import msgspec

from layerkv.bench.records import Progress, read_json, write_json

Spec = TypeVar("Spec")
ReportProgress: TypeAlias = Callable[[int, int], None]
"""Takes how much is done, and of how much in all."""


def run_spec(
    argv: list[str], module: str, of_type: type[Spec], run: Callable[[Spec, ReportProgress], msgspec.Struct]
) -> int:
    """Runs the spec file `argv[0]` and writes the outcome to `argv[1]`; returns the process's exit status.

    Standard output carries progress lines alone: what else is printed goes to standard error.
    """
    if len(argv) != 2:
        print(f"usage: python -m {module} SPEC.json OUT.json", file=sys.stderr)
        return 2
    stream = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def report_progress(num_done: int, num_total: int) -> None:
        print(msgspec.json.encode(Progress(num_done, num_total)).decode(), file=stream)

    write_json(run(read_json(Path(argv[0]), of_type), report_progress), Path(argv[1]))
    return 0
