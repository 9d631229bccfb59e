"""Write the tables of README.md and docs/ anew from the result files that they name: `python benchmarks/tables.py`.

A table stands between `<!-- table: KIND FILE... -->` and `<!-- /table -->`. Files are names in benchmarks/results/:
results of the suite, or those of a demo by seed. Cells are medians over seeds; in brackets the least and the most,
where they differ in print.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from layerkv.bench.words import format_duration

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
ENGINES = ("stock", "vllm-cpu-offload", "lmcache", "layerkv", "layerkv-no-slo", "oracle")
NAMES = {"vllm-cpu-offload": "CPU offload", "layerkv-no-slo": "layerkv, no SLOs", "lmcache": "LMCache"}

Figures: TypeAlias = Mapping[str, Any]
Values: TypeAlias = Sequence[float]
Point: TypeAlias = tuple[str, Mapping[str, Figures]]  # its name, figures by engine
_TABLE = re.compile(r"(<!-- table: (?P<kind>\S+) (?P<files>[^>]*?) -->\n).*?(<!-- /table -->)", re.DOTALL)


def render(page: str, results: Path = ROOT / "benchmarks" / "results") -> str:
    """The page with its tables as the result files have them."""

    def table(match: re.Match[str]) -> str:
        files = [json.loads((results / name).read_text()) for name in match["files"].split()]
        header, *rows = _KINDS[match["kind"]](_points(files))
        lines = [header, ["---"] * len(header), *rows]
        return match[1] + "".join(f"| {' | '.join(line)} |\n" for line in lines) + match[4]

    return _TABLE.sub(table, page)


def _points(files: Sequence[Figures]) -> list[Point]:
    """The points of a suite's files, one file's after the other's; or a demo's only one, its values those of all."""
    first = files[0]
    if "points" in first:
        return [(point["name"], point["engines"]) for file in files for point in file["points"]]
    return [("", {name: _joined([file["engines"][name] for file in files]) for name in first["engines"]})]


def _joined(seeds: Sequence[Any]) -> Any:
    if isinstance(seeds[0], dict):
        return {key: _joined([seed[key] for seed in seeds]) for key in seeds[0]}
    return {"values": seeds}


def _values(figures: Figures, path: str) -> Values:
    for key in path.split("."):
        figures = figures[key]
    values: Values = figures["values"]
    return values


def _cell(values: Values, form: Callable[[float], str]) -> str:
    middle, least, most = (form(pick(values)) for pick in (median, min, max))
    return middle if least == most else f"{middle} ({least} - {most})"


def _duration(values: Values) -> str:
    return _cell(values, format_duration)


def _percent(values: Values) -> str:
    return _cell(values, lambda share: f"{share * 100:.0f} %")


def _number(values: Values, decimals: int = 2) -> str:
    return _cell(values, lambda number: f"{number:.{decimals}f}")


def _over_stock(engines: Mapping[str, Figures], name: str, path: str) -> str:
    pairs = zip(_values(engines[name], path), _values(engines["stock"], path), strict=True)
    return _number([mine / stocks if stocks else float("nan") for mine, stocks in pairs])


def _rows(points: Sequence[Point]) -> list[tuple[str, Mapping[str, Figures], str]]:
    """Each engine at each point: what the row is called, the point's engines, which of them."""
    return [
        (", ".join(part for part in (point, NAMES.get(name, name)) if part), engines, name)
        for point, engines in points
        for name in ENGINES
        if name in engines
    ]


def streams(points: Sequence[Point]) -> list[list[str]]:
    """What readers got, a row for each engine and point."""
    table = [
        [
            *("", "fluid", "TTFT mean", "TTFT p99", "second token, p99", "lag, mean", "longest pause, p99"),
            *("end to end, mean", "fluid per second", "tokens per second", "of stock's"),
        ]
    ]
    for title, engines, name in _rows(points):
        mine = engines[name]
        table.append(
            [title, _percent(_values(mine, "fluid"))]
            + [_duration(_values(mine, path)) for path in ("ttft_s.mean", "ttft_s.p99", "second_token_s.p99")]
            + [_duration(_values(mine, path)) for path in ("lag_s.mean", "longest_pause_s.p99", "end_to_end_s.mean")]
            + [_number(_values(mine, "fluid_goodput_rps")), _number(_values(mine, "output_tokens_per_s"), 0)]
            + [_over_stock(engines, name, "output_tokens_per_s") if "stock" in engines else ""]
        )
    return table


def classes(points: Sequence[Point]) -> list[list[str]]:
    """First tokens and objectives by SLO class, a row for each engine and point."""
    names = list(next(iter(points[0][1].values()))["ttft_mean_s_by_class"])
    table = [["", *(f"TTFT mean, {name}" for name in names), *(f"SLOs met, {name}" for name in names)]]
    for title, engines, engine in _rows(points):
        ttfts = [_values(engines[engine], f"ttft_mean_s_by_class.{name}") for name in names]
        shares = [_values(engines[engine], f"slo_attainment_by_class.{name}") for name in names]
        table.append([title, *map(_duration, ttfts), *map(_percent, shares)])
    return table


def rates(points: Sequence[Point]) -> list[list[str]]:
    """Stock, layerkv and the oracle side by side, medians only, a row for each point."""
    trio = ("stock", "layerkv", "oracle")
    columns = (
        ("fluid requests", "fluid", lambda share: f"{share * 100:.0f} %"),
        ("TTFT mean", "ttft_s.mean", format_duration),
        ("second token, p99", "second_token_s.p99", format_duration),
        ("longest pause, p99", "longest_pause_s.p99", format_duration),
        ("end to end, mean", "end_to_end_s.mean", format_duration),
        ("tokens per second", "output_tokens_per_s", lambda number: f"{number:.0f}"),
    )
    table = [["requests per second", *(title for title, _, _ in columns)]]
    for point, engines in points:
        cells = [" / ".join(form(median(_values(engines[name], path))) for name in trio) for _, path, form in columns]
        table.append([point, *cells])
    return table


_KINDS: Mapping[str, Callable[[Sequence[Point]], list[list[str]]]] = {
    "streams": streams,
    "classes": classes,
    "rates": rates,
}


def main() -> None:
    """Write every page whose tables are not those of the files, and name it."""
    for page in PAGES:
        before = page.read_text()
        if (after := render(before)) != before:
            page.write_text(after)
            print(page.relative_to(ROOT), file=sys.stderr)


if __name__ == "__main__":
    main()
