import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from layerkv import __version__, doctor
from layerkv.cli import main
from layerkv.doctor_facts import Group, ModelFacts, Question
from layerkv.errors import CapacityError, ConfigError
from layerkv.vllm_plugin import compat

POLICY = """
version: 1
default_class: chat
classes: {chat: {ttft: 500ms, tpot: 50ms}, batch: {ttft: 3m, tpot: 1s, max_stall: 2s, overload: reject}}
"""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stand in for the modules behind the commands, and write down how they are called."""
    calls: list[tuple[Any, ...]] = []
    demo, overhead = ModuleType("layerkv.bench.demo"), ModuleType("layerkv.bench.overhead")
    demo.run_demo = lambda out, *, seed, quick: calls.append((out, seed, quick))  # type: ignore[attr-defined]
    overhead.run_overhead = (  # type: ignore[attr-defined]
        lambda json, *, rounds, only, model: calls.append((json, rounds, only, model))
    )
    sharing = ModuleType("layerkv.bench.sharing")
    sharing.run_sharing = (  # type: ignore[attr-defined]
        lambda json, *, num_engines, burst_requests, period_s, num_seeds, only: calls.append(
            (json, num_engines, burst_requests, period_s, num_seeds, only)
        )
    )
    profile = ModuleType("layerkv.bench.profile")
    profile.run_profile = (  # type: ignore[attr-defined]
        lambda model, out, *, engine_args, quick: calls.append((model, out, engine_args, quick))
    )
    monkeypatch.setitem(sys.modules, "layerkv.bench.demo", demo)
    monkeypatch.setitem(sys.modules, "layerkv.bench.overhead", overhead)
    monkeypatch.setitem(sys.modules, "layerkv.bench.sharing", sharing)
    monkeypatch.setitem(sys.modules, "layerkv.bench.profile", profile)
    return calls


def demo_that_raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run_demo(*_: Any, **__: Any) -> None:
        raise error

    module = ModuleType("layerkv.bench.demo")
    module.run_demo = run_demo  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "layerkv.bench.demo", module)


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        (["demo"], (Path("out/demo"), 0, False)),
        (["demo", "--out", "x", "--seed", "7", "--quick"], (Path("x"), 7, True)),
        (["profile"], (None, Path("profile.json"), None, False)),
        (
            ["profile", "--model", "m", "--out", "p.json", "--engine-args", "{}", "--quick"],
            ("m", Path("p.json"), "{}", True),
        ),
        (["bench", "overhead"], (None, 3, None, None)),
        (
            ["bench", "overhead", "--json", "o.json", "--only", "slots", "--model", "test", "--rounds", "1"],
            (Path("o.json"), 1, "slots", "test"),
        ),
        (["bench", "sharing", "--burst", "8", "--period", "9", "--seeds", "1"], (None, 2, 8, 9.0, 1, [])),
        (
            ["bench", "sharing", "--json", "s.json", "--engines", "3", "--only", "give", "--only", "idle,resize"],
            (Path("s.json"), 3, 12, 5.0, 3, ["give", "idle,resize"]),
        ),
    ],
)
def test_a_command_hands_its_options_over(
    calls: list[tuple[Any, ...]], arguments: list[str], call: tuple[Any, ...]
) -> None:
    assert main(arguments) == 0
    assert calls == [call]


@pytest.mark.parametrize("by_flag", [True, False])
def test_the_environment_of_lmcache_is_named_by_flag_or_by_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, by_flag: bool
) -> None:
    monkeypatch.setenv("LAYERKV_LMCACHE_PYTHON", "/none" if by_flag else "/none/python")
    flags = ["--lmcache-python", "/none/python"] if by_flag else []
    assert main(["bench", "run", "case.yaml", *flags]) == 2
    assert "--lmcache-python: /none/python: found nothing that runs as Python" in capsys.readouterr().err


def test_the_commands_and_their_options_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    surface = {
        (): ["demo", "doctor", "profile", "bench", "--version"],
        ("demo",): ["--out DIR", "--seed SEED", "--quick"],
        ("doctor",): [
            "--policy FILE",
            "--model PATH",
            "--kv-memory SIZE",
            "--max-model-len N",
            "--engine-args JSON",
            "--json",
        ],
        ("profile",): ["--model MODEL", "--out FILE", "--engine-args JSON", "--quick"],
        ("bench", "overhead"): ["--json FILE", "--only", "--model", "--rounds N"],
        ("bench", "sharing"): ["--only PART,..", "--engines N", "--burst N", "--period S", "--seeds N", "--json FILE"],
        ("bench", "run"): ["--size", "--seeds N", "--engines A,B,..", "--trace FILE", "--lmcache-python PYTHON"],
    }
    for command, options in surface.items():
        with pytest.raises(SystemExit) as end:
            main([*command, "--help"])
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert all(option in text for option in options), command


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"layerkv {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["dmeo"], ["bench"], ["demo", "--seed", "x"], ["doctor", "--plicy", "f"]])
def test_a_wrong_command_line_ends_with_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("slo.yaml: $.version: found 2"), 2, "layerkv: slo.yaml: $.version: found 2\n"),
        (CapacityError("no memory"), 1, "layerkv: no memory\n"),
        (
            ModuleNotFoundError("No module named 'jinja2.ext'", name="jinja2.ext"),
            1,
            "layerkv: jinja2.ext is not installed; from layerkv's folder: pip install '.[cpu,bench]'\n",
        ),
        (KeyboardInterrupt(), 130, "layerkv: interrupted\n"),
    ],
)
def test_an_expected_error_is_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    line: str,
) -> None:
    demo_that_raises(monkeypatch, error)
    assert main(["demo"]) == status
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("error", [KeyError("x"), ModuleNotFoundError("no", name="layerkv.bench.dmeo")])
def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    demo_that_raises(monkeypatch, error)
    with pytest.raises(type(error)):
        main(["demo"])


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "from layerkv.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'vllm', 'numpy', 'rich', 'msgspec', 'yaml', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[doctor.Check]:
    """Stand in for what is installed here: importing vLLM takes a while."""
    checks = [doctor.Check(subject="vLLM", found="0.32.0")]
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    return checks


def diagnose(policy_path: str | None = None) -> tuple[int, str]:
    console = Console(width=100, record=True, color_system=None, quiet=False)
    with console.capture() as captured:
        status = doctor.run_doctor(policy_path, console=console)
    return status, captured.get()


def test_the_doctor_is_content_when_every_check_is(checks: list[doctor.Check]) -> None:
    checks.append(doctor.Check(subject="CUDA device", found="none visible", verdict="note"))
    status, report = diagnose()
    assert status == 0
    assert "none visible" in report
    assert "Everything is all right." in report


def test_the_doctor_says_what_to_do_about_a_problem(checks: list[doctor.Check]) -> None:
    checks.append(doctor.Check(subject="torch", found="[none]", verdict="problem", advice="install [cpu] it"))
    status, report = diagnose()
    assert status == 1
    assert "[none]" in report
    assert "torch: install [cpu] it" in report


@pytest.mark.usefixtures("checks")
def test_the_doctor_shows_the_classes_of_a_policy(tmp_path: Path) -> None:
    path = tmp_path / "slo.yaml"
    path.write_text(POLICY)
    status, report = diagnose(str(path))
    assert status == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in report.splitlines() if "│" in line]
    assert ["chat (default)", "500ms", "50ms", "1s", "1", "", "queue"] in rows
    assert ["batch", "3m", "1s", "1s", "1", "2s", "reject"] in rows


@pytest.mark.usefixtures("checks")
def test_the_doctor_says_what_a_class_that_asks_for_smooth_streams_needs(tmp_path: Path) -> None:
    path = tmp_path / "slo.yaml"
    path.write_text(POLICY)
    assert "smooth" not in diagnose(str(path))[1]
    path.write_text(POLICY.replace("tpot: 50ms", "tpot: 50ms, smooth: true"))
    status, report = diagnose(str(path))
    assert status == 0
    told = " ".join(line.split("│")[2].strip() for line in report.splitlines() if line.count("│") > 2)
    assert "asked for by chat: give `vllm serve` --middleware layerkv.vllm_plugin.pace.SmoothStream" in told


@pytest.mark.usefixtures("checks")
def test_the_doctor_points_into_a_wrong_policy(tmp_path: Path) -> None:
    path = tmp_path / "slo.yaml"
    path.write_text(POLICY.replace("tpot: 50ms", "tpot: 50 parsec"))
    status, report = diagnose(str(path))
    assert status == 1
    assert f"policy: {path}: $.classes.chat.tpot: found '50 parsec' with the unknown unit" in report
    assert "SLO classes" not in report


def asked_of_a_model(monkeypatch: pytest.MonkeyPatch, answer: ModelFacts | Exception) -> list[Question]:
    """Stand in for what asks vLLM."""
    asked: list[Question] = []

    def examine_model(question: Question) -> ModelFacts:
        asked.append(question)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("layerkv.doctor_model.examine_model", examine_model)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return asked


FACTS = ModelFacts(
    folder="/models/x",
    architectures=("XForCausalLM",),
    model_class="XForCausalLM",
    features=(),
    dtype="float32",
    kv_dtype="float32",
    max_model_len=4096,
    num_layers=2,
    block_bytes=2048,
    groups=(Group(kind="full", num_layers=2, block_tokens=16, page_bytes=(1024,)),),
)


@pytest.mark.usefixtures("checks")
def test_the_doctor_hands_a_question_over_and_tells_the_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = asked_of_a_model(monkeypatch, FACTS)
    flags = ["--kv-memory", "1GiB", "--max-model-len", "4096", "--engine-args", '{"block_size": 16}']
    assert main(["doctor", "--model", "/models/x", *flags]) == 0
    expected = {"folder": Path("/models/x"), "kv_memory_bytes": 1 << 30, "max_model_len": 4096}
    assert asked == [Question(**expected, engine_args={"block_size": 16})]
    report = capsys.readouterr().out
    assert "XForCausalLM" in report
    assert "KV-cache groups" in report
    assert "Everything is all right." in report


@pytest.mark.usefixtures("checks")
def test_the_doctor_prints_json_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked_of_a_model(monkeypatch, replace(FACTS, refused="its layers are odd; use others"))
    assert main(["doctor", "--model", "/models/x", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["model"]["refused"] == "its layers are odd; use others"
    [model] = [check for check in document["checks"] if check["subject"] == "model"]
    assert (model["verdict"], model["advice"]) == ("problem", "its layers are odd; use others")


@pytest.mark.usefixtures("checks")
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("/models/x: found nothing there; set --model"), "model: /models/x: found nothing there;"),
        (KeyError("odd"), "model: KeyError: 'odd'; start vLLM with this model to see more"),
    ],
)
def test_a_checkpoint_that_cannot_be_asked_about_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    asked_of_a_model(monkeypatch, error)
    assert main(["doctor", "--model", "/models/x"]) == 1
    assert line in capsys.readouterr().out


def test_no_model_is_looked_at_where_vllm_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checks: list[doctor.Check]
) -> None:
    asked = asked_of_a_model(monkeypatch, FACTS)
    checks.append(doctor.Check(subject="torch", found="none", verdict="problem", advice="install it"))
    assert main(["doctor", "--model", "/models/x"]) == 1
    assert asked == []
    assert "model: mend torch first: it is vLLM that is asked" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--kv-memory", "1GiB"], ["--max-model-len", "9"], ["--engine-args", "{}"]])
def test_what_is_asked_about_a_model_needs_one(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    assert main(["doctor", *flags]) == 2
    assert f"{flags[0]}: found without --model" in capsys.readouterr().err


def test_a_check_that_breaks_is_a_problem_and_not_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_check_torch", lambda _: 1 / 0)
    monkeypatch.setattr(doctor, "_check_vllm", lambda _: [])
    broken = {check.subject: check for check in doctor.examine()}["torch"]
    assert broken.verdict == "problem"
    assert "ZeroDivisionError" in broken.found


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stand in for vLLM's platform and surfaces, all of them as they should be."""
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(device_type="cpu")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setattr(compat, "check_surfaces", list)
    return platforms


def verdicts(checks: list[doctor.Check]) -> dict[str, str]:
    return {check.subject: check.verdict for check in checks}


@pytest.mark.usefixtures("vllm")
def test_a_supported_vllm_is_all_right() -> None:
    found = doctor._check_vllm(compat.SUPPORTED_VLLM[-1])
    assert verdicts(found) == {"vLLM": "ok", "vLLM platform": "ok", "vLLM surfaces": "ok"}


@pytest.mark.parametrize("version", ["not installed", "0.0.1"])
def test_an_absent_or_unsupported_vllm_is_a_problem_before_it_is_imported(version: str) -> None:
    [check] = doctor._check_vllm(version)
    assert (check.verdict, check.found) == ("problem", version)
    assert "install" in check.advice


@pytest.mark.usefixtures("vllm")
def test_a_vllm_that_was_not_tested_is_noted_and_looked_at() -> None:
    found = doctor._check_vllm("0.99.0")
    assert verdicts(found) == {"vLLM": "note", "vLLM platform": "ok", "vLLM surfaces": "ok"}
    assert "set allow_untested_vllm" in found[0].found


def test_a_platform_without_a_worker_of_ours_is_a_problem(vllm: ModuleType) -> None:
    vllm.current_platform = SimpleNamespace(device_type="tpu")  # type: ignore[attr-defined]
    found = doctor._check_vllm(compat.SUPPORTED_VLLM[-1])
    assert verdicts(found) == {"vLLM": "ok", "vLLM platform": "problem", "vLLM surfaces": "ok"}


@pytest.mark.usefixtures("vllm")
def test_a_surface_that_changed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = compat.SurfaceProblem("vllm.v1.Scheduler.schedule", "no longer takes x")
    monkeypatch.setattr(compat, "check_surfaces", lambda: [changed])
    found = doctor._check_vllm(compat.SUPPORTED_VLLM[-1])
    assert verdicts(found)["vLLM surfaces"] == "problem"
    assert "vllm.v1.Scheduler.schedule no longer takes x" in found[-1].advice


@pytest.mark.parametrize("times", [0, 2])
def test_a_plugin_that_is_not_registered_once_is_a_problem(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    monkeypatch.setattr(doctor.metadata, "entry_points", lambda **_: [object()] * times)
    [check] = doctor._check_plugin()
    assert check.verdict == "problem"


def test_a_plugin_that_vllm_was_told_to_leave_out_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "entry_points", lambda **_: [object()])
    monkeypatch.setenv("VLLM_PLUGINS", "other,lora")
    [check] = doctor._check_plugin()
    assert check.verdict == "problem"
    monkeypatch.setenv("VLLM_PLUGINS", "other,layerkv")
    [check] = doctor._check_plugin()
    assert check.verdict == "ok"


def test_this_machine_can_alias_a_lane() -> None:
    [check] = doctor._check_aliasing()
    assert check.verdict == "ok"
