"""Strict reading of what users write: YAML files and mappings, each mistake one `ConfigError` on one line.

A message says where the mistake is (`slo.yaml: $.classes.chat.ttft`), what was found, what was expected, and what to
set. Keys are described by msgspec structs whose fields are `Annotated[type, Meta(description=..., examples=[...])]`:
`description` completes "expected ...", `examples[0]` completes "set <key> to ...".
"""

from __future__ import annotations

import difflib
import json
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec
import yaml
from msgspec import Meta

from layerkv.errors import ConfigError

_Keys = TypeVar("_Keys", bound=msgspec.Struct)
_Number = TypeVar("_Number", int, float)


def read_keys(raw: Any, keys_type: type[_Keys], *, where: str) -> _Keys:
    """Turn a mapping into `keys_type`, field by field, so that every message names the whole path.

    Raises:
        ConfigError: `raw` is no mapping, has an unknown key, lacks a required one, or has a wrong type in it.
    """
    fields = {field.name: field for field in msgspec.structs.fields(keys_type)}
    if not isinstance(raw, Mapping):
        raise wrong(where, f"found {show(raw)}; expected a mapping with the keys {', '.join(fields)}")
    for key in raw:
        if key not in fields:
            problem = f"found an unknown key; expected one of {', '.join(fields)}"
            raise wrong(join_path(where, key), problem, did_you_mean(key, fields))
    values = {}
    for name, field in fields.items():
        meta: Meta = get_args(field.type)[-1]
        assert meta.examples, field
        fix = f"set {name} to {json.dumps(meta.examples[0])}, say"
        if name in raw:
            try:
                values[name] = msgspec.convert(raw[name], field.type)
            except msgspec.ValidationError:
                problem = f"found {show(raw[name])}; expected {meta.description}"
                raise wrong(f"{where}.{name}", problem, fix) from None
        elif field.required:
            raise wrong(f"{where}.{name}", f"found nothing; expected {meta.description}", fix)
    return keys_type(**values)


def above_zero(parse: Callable[[Any], _Number], value: object, *, where: str, example: str) -> _Number:
    """Parse a size or a duration that must not be zero, adding to the parser's message where it stands."""
    quantity = at_least_zero(parse, value, where=where, example=example)
    if not quantity:
        raise wrong(where, f"found {show(value)}; expected more than zero", _fix(where, example))
    return quantity


def at_least_zero(parse: Callable[[Any], _Number], value: object, *, where: str, example: str) -> _Number:
    """Parse a size or a duration, adding to the parser's message where it stands."""
    try:
        return parse(value)
    except ValueError as error:
        raise wrong(where, str(error), _fix(where, example)) from None


def _fix(where: str, example: str) -> str:
    return f"set {where.rpartition('.')[2]} to {example}, say"


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys in silence; a policy that says two things is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        seen = set()
        for key, _ in node.value:
            # Only text: `<<` may repeat, and a key of any other type is refused by name later.
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    problem = f"found the key {key.value!r} twice; expected it once"
                    raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def load_yaml(path: str | Path, *, what: str, fix: str) -> Any:
    """Return what the YAML file holds, with duplicate keys refused; `what` it is and how to `fix` it are for messages.

    Raises:
        ConfigError: the file is unreadable, empty, or not YAML.
    """
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise wrong(str(path), f"found no readable file ({reason}); expected {what} in YAML", fix) from None
    try:
        document = yaml.load(content, Loader=_UniqueKeyLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}: line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise wrong(where, problem, "mend the YAML there") from None
    # Values that only look like a date or a number end in ValueError, endless brackets in RecursionError.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise wrong(str(path), f"found what is not YAML ({reason}); expected {what}") from None
    return document


def join_path(where: str, key: object) -> str:
    """Append a key to a path such as `slo.yaml: $.classes`."""
    return f"{where}.{key}" if isinstance(key, str) and key.isidentifier() else f"{where}[{show(key)}]"


def show(value: object) -> str:
    """`repr` cut to one short line, with the type where the text alone would puzzle (`yes` is a bool)."""
    text = reprlib.repr(value)
    return text if type(value) in (str, int, float) else f"{text} ({type(value).__name__})"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return a hint such as `did you mean ttft?`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1) if isinstance(name, str) else []
    return f"did you mean {close[0]}?" if close else ""


def wrong(where: str, problem: str, fix: str = "") -> ConfigError:
    """One line: where, what was found and expected, what to set."""
    return ConfigError("; ".join(part for part in (f"{where}: {problem}", fix) if part))
