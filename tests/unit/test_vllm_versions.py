"""Which version of vLLM is supported, which may be tried, and which is refused."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from layerkv.errors import IncompatibleVLLMError
from layerkv.vllm_plugin.compat import Standing, check_version, error_of_output, standing_of

SUPPORTED = ["0.31.0", "0.31.7", "0.32.0", "0.32.0+cpu", "0.32.1.post1", "0.33.0", "0.33.2+cu130", "0.33"]
UNTESTED = ["0.34.0", "1.0.0", "0.33.1rc1", "0.32.0.dev12+g1a2b3c", "0.1.dev1+g1a2b3c", "dev", "0.31.0rc2+cpu", "0.40"]
OLDER = ["0.30.2", "0.9.1", "0.30.0+cpu", "0.30.1.dev3", "0.1.0", "0.0.1"]


@pytest.mark.parametrize(
    ("version", "standing"),
    [
        *((version, Standing.SUPPORTED) for version in SUPPORTED),
        *((version, Standing.UNTESTED) for version in UNTESTED),
        *((version, Standing.OLDER) for version in OLDER),
    ],
)
def test_a_version_stands_in_before_or_behind_the_window(version: str, standing: Standing) -> None:
    assert standing_of(version) is standing


@pytest.mark.parametrize("allow_untested", [False, True])
def test_a_release_of_the_window_needs_no_permission(allow_untested: bool) -> None:
    assert all(check_version(version, allow_untested=allow_untested) is None for version in SUPPORTED)


@pytest.mark.parametrize("version", UNTESTED)
def test_an_untested_version_is_refused_unless_it_is_allowed(version: str) -> None:
    with pytest.raises(IncompatibleVLLMError) as refused:
        check_version(version)
    for part in (
        f"vLLM {version} is installed",
        "0.31 to 0.33",
        "install vllm>=0.31,<0.34",
        'set "allow_untested_vllm": true',
        '"on_unsupported": "passthrough"',
    ):
        assert part in str(refused.value)
    warning = check_version(version, allow_untested=True)
    assert warning is not None
    assert warning.startswith(f"vLLM {version} was not tested with this layerkv")


@pytest.mark.parametrize("allow_untested", [False, True])
@pytest.mark.parametrize("version", OLDER)
def test_an_older_version_is_refused_whatever_is_allowed(version: str, allow_untested: bool) -> None:
    with pytest.raises(IncompatibleVLLMError) as refused:
        check_version(version, allow_untested=allow_untested)
    assert f"vLLM {version} is installed, which is older" in str(refused.value)
    assert "allow_untested_vllm" not in str(refused.value)


def fake_vllm(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    """A vLLM whose outputs have these fields; it has errors of requests."""
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.outputs", "vllm.v1", "vllm.v1.engine")}
    modules["vllm.outputs"].RequestError = SimpleNamespace  # type: ignore[attr-defined]
    modules["vllm.v1.engine"].EngineCoreOutput = type("EngineCoreOutput", (), fields)  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(("can_retry", "code"), [(True, "service_unavailable"), (False, "validation_error")])
def test_a_refusal_says_what_its_client_gets(monkeypatch: pytest.MonkeyPatch, can_retry: bool, code: str) -> None:
    fake_vllm(monkeypatch, error=None)
    told: dict[str, Any] = error_of_output("no room", can_retry=can_retry)
    assert vars(told["error"]) == {"code": code, "message": "no room", "retryable": can_retry}


def test_a_vllm_whose_outputs_carry_no_error_is_told_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: 0.32 has errors of requests, and an output that is given one ends the engine."""
    fake_vllm(monkeypatch)
    assert error_of_output("no room", can_retry=True) == {}
