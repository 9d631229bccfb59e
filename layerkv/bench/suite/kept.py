"""The records of a case's runs, kept so that figures can be computed again, or others that nobody thought of.

In the case's folder: `result.json`, `policy.yaml` (the objectives that requests are judged by), and `runs/` with one
`ENGINE.POINT.seedN.json.gz` for each load, a :class:`layerkv.bench.records.LoadRun` as JSON with the times of all
tokens. The demo's folder has its `result.json` and, for each engine, NAME.json (an `EngineRun`). Invariant: the runs in
a folder are those of the result beside them.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import msgspec
from rich.console import Console

from layerkv.bench.policy_file import write_policy
from layerkv.bench.records import LoadRun, read_json, write_json
from layerkv.bench.suite.outcome import with_figures
from layerkv.bench.suite.report import write_report
from layerkv.bench.suite.result import CaseResult
from layerkv.bench.suite.terminal import print_result
from layerkv.config import SloPolicy, load_policy
from layerkv.errors import ConfigError

T = TypeVar("T")
RESULT, REPORT, POLICY, RUNS = "result.json", "report.html", "policy.yaml", "runs"


def forget(folder: Path) -> None:
    """Removes what an earlier run of a case has left in its folder to compute figures from."""
    for path in (folder / RUNS).glob("*.json.gz"):
        path.unlink()


def keep(folder: Path, result: CaseResult, runs: Sequence[LoadRun], policy: SloPolicy) -> None:
    """Writes what is not there yet, and the result as it is now.

    Raises:
        OSError: the disk is full, say.
    """
    (folder / RUNS).mkdir(exist_ok=True)
    write_policy(policy, folder / POLICY)
    for run in runs:
        path = folder / RUNS / f"{run.engine}.{quote(run.point, safe='')}.seed{run.seed}.json.gz"
        if not path.exists():
            draft = path.with_suffix(".draft")
            draft.write_bytes(gzip.compress(msgspec.json.encode(run), mtime=0))
            draft.replace(path)
    write_json(result, folder / RESULT)


def read_runs(folder: Path) -> list[LoadRun]:
    """All runs of a case's folder, seed by seed.

    Raises:
        ConfigError: one of them is not such a file.
    """
    runs = []
    for path in sorted((folder / RUNS).glob("*.json.gz")):
        try:
            runs.append(msgspec.json.decode(gzip.decompress(path.read_bytes()), type=LoadRun))
        except (OSError, EOFError, msgspec.DecodeError) as error:
            problem = f"found no records of a run ({error}); expected what `layerkv bench run` writes"
            raise ConfigError(f"{path}: {problem}; remove it, or run the case again") from None
    return sorted(runs, key=lambda run: run.seed)


def run_figures(folder: Path, *, json_path: Path | None = None, html_path: Path | None = None) -> int:
    """Computes the result of a case, or of the demo, again from the records in its folder; prints and writes it.

    Raises:
        ConfigError: the folder is not one of a case or of the demo.
    """
    json_path, html_path = json_path or folder / RESULT, html_path or folder / REPORT
    if not (folder / POLICY).exists():
        from layerkv.bench.demo import recompute  # which needs this package

        case, runs, policy = recompute(folder, json_path)
    else:
        policy, runs = load_policy(folder / POLICY), read_runs(folder)
        case = with_figures(read_result(folder / RESULT, CaseResult), runs, policy)
        write_json(case, json_path)
    write_report(case, runs, html_path, policy)
    print_result(case, Console())
    return 0


def read_result(path: Path, of_type: type[T]) -> T:
    """A result that lies beside the records it was computed from.

    Raises:
        ConfigError: there is none.
    """
    try:
        return read_json(path, of_type)
    except (OSError, msgspec.DecodeError) as error:
        problem = f"found no result ({error}); expected a folder that `layerkv bench run` or `layerkv demo` has filled"
        raise ConfigError(f"{path}: {problem}") from None
