"""The benchmark suite end to end: the main case in its small size, on real `vllm serve` processes."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from layerkv.bench.suite.compare import compare
from layerkv.bench.suite.result import CaseResult

# Disturbed loads are run again, three times in all: this ends a hang.
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(2000)]

ROOT = Path(__file__).parents[2]
MAIN = "import sys; from layerkv.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The command's own output, and the folder with its files."""
    folder = tmp_path_factory.mktemp("suite")
    files = ["--json", str(folder / "result.json"), "--html", str(folder / "report.html"), "--out", str(folder)]
    case = str(ROOT / "benchmarks" / "cases" / "rate_sweep.yaml")
    command = [sys.executable, "-c", MAIN, "bench", "run", case, "--size", "ci", "--seeds", "1", *files]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False), folder


@pytest.fixture(scope="module")
def result(finished: tuple[subprocess.CompletedProcess[str], Path]) -> CaseResult:
    process, folder = finished
    assert process.returncode == 0, process.stdout + process.stderr
    return msgspec.json.decode((folder / "result.json").read_bytes(), type=CaseResult)


def test_every_engine_serves_every_request(result: CaseResult) -> None:
    assert result.complete
    assert result.engines.keys() == {"stock", "layerkv", "oracle"}
    for figures in result.engines.values():
        assert figures.num_failed.median == 0
        assert figures.num_requests.median == 20
        assert figures.ttft_s.mean.median > 0
        assert figures.output_tokens_per_s.median > 0


def test_tokens_are_equal(result: CaseResult) -> None:
    assert result.tokens_equal is True


def test_what_only_the_server_knows_was_read(result: CaseResult) -> None:
    for figures in result.engines.values():
        assert figures.prompt_tokens.median > 0
        assert figures.peak_device_kv_bytes.median > 0
        assert figures.peak_rss_bytes.median > 100 << 20
        assert figures.engine_cpu_s.median > 0
        assert figures.front_end_cpu_s.median > 0
        assert figures.scheduler_s_per_step is not None
        assert figures.scheduler_s_per_step.median > 0


def test_the_oracle_has_more_kv_memory_than_the_others(result: CaseResult) -> None:
    memory = result.kv_cache_memory_bytes
    assert memory["stock"] == memory["layerkv"] < memory["oracle"]


def test_the_report_and_the_terminal_say_the_same(
    finished: tuple[subprocess.CompletedProcess[str], Path], result: CaseResult
) -> None:
    process, folder = finished
    page = (folder / "report.html").read_text()
    assert "<svg" in page
    assert result.question in page
    assert "TTFT mean" in process.stdout
    assert "exactly the same tokens" in " ".join(process.stdout.split())


def test_a_result_compares_with_itself(result: CaseResult) -> None:
    assert {change.verdict for change in compare(result, result).changes} == {"same"}
