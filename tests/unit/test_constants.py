"""Every number that was chosen says where it comes from, in its docstring and in docs/constants.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from layerkv.scheduler.limits import PolicyLimits

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "layerkv"
FOLDERS = ("broker", "core", "device", "kernels", "scheduler", "sim", "vllm_plugin")
LIMITS = "scheduler/limits.py"
ORIGINS = re.compile(r"\b(Measured:|Derived\b|Not measured: (chosen by|taken from) )")
ROW = re.compile(
    r"^\| `(?P<path>[\w/]+\.py)` \| `(?P<name>\w+)` \| `(?P<value>[^`]+)` \| (?P<origin>.+) \|$", re.MULTILINE
)

FACTS = {
    "broker/members.py": {"_FORMAT"},
    "broker/messages.py": {"VERSION"},
    "core/cost.py": {"SCHEMA"},
    "core/groups.py": {"NULL_BLOCK"},
    "device/cuda_arena.py": {"GRANULARITY_BYTES"},
    "device/cuda_driver.py": {"_BATCH_SINCE", "_IN_STREAM_ORDER", "_PORTABLE_AND_MAPPED"},
    "device/libc.py": {
        "_MAP_FIXED",
        "_MAP_NORESERVE",
        "_MADV_DONTNEED",
        "_MADV_HUGEPAGE",
        "_MADV_NOHUGEPAGE",
        "_FAILED",
        "HUGE_PAGE_BYTES",
    },
    "device/mmap_arena.py": {"PAGE_BYTES"},
    "kernels/block_copy.py": {"_WORD_TYPES"},
    "scheduler/admission.py": {"_NOTHING"},
    "scheduler/decision_log.py": {"VERSION"},
    "scheduler/lengths.py": {"_ROUNDING"},
    "sim/capacity.py": {"SCHEMA"},
    "sim/config.py": {"_NOT_EMPTY"},
    "sim/prompt_blocks.py": {"HASH_BLOCK_TOKENS"},
    "sim/presets.py": {"FP16_BYTES", "_SAMPLED_TOKENS", "_FEW_TOKENS", "_GIB"},
    "sim/run.py": {"SCHEMA"},
    "sim/sharing_run.py": {"SCHEMA"},
    "sim/workload_config.py": {"_NOT_EMPTY"},
    "vllm_plugin/compat.py": {"_WITHOUT_TAGS"},
    "vllm_plugin/kv_events.py": {"_GROUP"},
    "vllm_plugin/prefix_hits.py": {"_GROUP"},
}
"""Numbers that nobody tuned: versions of formats, flags and sizes of kernel and driver, identifiers, a paper's rule,
what absorbs rounding, where a curve is sampled."""


@dataclass(frozen=True)
class Chosen:
    """A number that somebody chose: where, what it is in the source's words, and what is said of it."""

    path: str
    name: str
    value: str
    said: str

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"


def chosen_in(source: str, path: str) -> Iterator[Chosen]:
    """The numbers in capitals at the top of a module, but for facts."""
    body = ast.parse(source).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        value = getattr(node, "value", None)
        if not isinstance(target, ast.Name) or not isinstance(value, ast.expr) or not target.id.strip("_").isupper():
            continue
        leaves = [leaf.value for leaf in ast.walk(value) if isinstance(leaf, ast.Constant)]
        has_numbers = any(isinstance(leaf, int | float) and not isinstance(leaf, bool) for leaf in leaves)
        if not has_numbers or any(isinstance(leaf, str) for leaf in leaves) or target.id in FACTS.get(path, ()):
            continue
        said = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
        yield Chosen(path, target.id, ast.get_source_segment(source, value) or "", str(said))


def limits() -> Iterator[Chosen]:
    """The fields of the policy's limits, each with its own part of the class's docstring."""
    assert PolicyLimits.__doc__ is not None
    names = PolicyLimits.__dataclass_fields__
    parts = re.split(rf"^ *({'|'.join(names)}): ", PolicyLimits.__doc__, flags=re.MULTILINE)
    said = dict(zip(parts[1::2], parts[2::2], strict=True))
    for name, field in names.items():
        yield Chosen(LIMITS, name, repr(field.default), said.get(name, ""))


def all_chosen() -> list[Chosen]:
    found = [*limits()]
    for folder in FOLDERS:
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            found += chosen_in(path.read_text(), path.relative_to(PACKAGE).as_posix())
    return found


CHOSEN = all_chosen()
TABLE = ROW.findall((ROOT / "docs/constants.md").read_text())


@pytest.mark.parametrize("constant", CHOSEN, ids=str)
def test_every_chosen_number_says_where_it_comes_from(constant: Chosen) -> None:
    said = " ".join(constant.said.split())
    assert ORIGINS.search(said), (
        f"say in the docstring of {constant} what it was measured on, when and in which result file ('Measured: ...'), "
        "how it follows from others ('Derived: ...'), or 'Not measured: chosen by ...' (or 'taken from ...'); a number "
        "that nobody tuned belongs to FACTS of this test"
    )


def test_every_chosen_number_is_in_the_table_with_its_value_and_nothing_else_is() -> None:
    assert {(path, name): value for path, name, value, _ in TABLE} == {(c.path, c.name): c.value for c in CHOSEN}
    assert len(TABLE) == len(CHOSEN)


def test_the_table_says_of_each_number_what_its_docstring_says() -> None:
    said = {(c.path, c.name): " ".join(c.said.split()) for c in CHOSEN}
    assert [f"{path}:{name}" for path, name, _, origin in TABLE if origin not in said[path, name]] == []


def test_what_is_called_measured_names_a_result_file_that_exists() -> None:
    texts = [(str(c), " ".join(c.said.split())) for c in CHOSEN]
    for name, said in texts:
        files = re.findall(r"benchmarks/results/[\w.-]+\.json", said)
        assert files or "Measured:" not in said, name
        assert all((ROOT / file).is_file() for file in files), name


def test_a_number_that_is_new_is_noticed() -> None:
    source = 'NEW_S: Final = 1 << 3\n"""What."""\n_TWO = (1, 2.0)\nNAME = "x"\nUSES = A + B\nIS_ON = True\nlower = 3\n'
    assert [(c.name, c.value, c.said) for c in chosen_in(source, "core/new.py")] == [
        ("NEW_S", "1 << 3", "What."),
        ("_TWO", "(1, 2.0)", ""),
    ]
