"""LMCache itself as an engine of the suite; only where LAYERKV_LMCACHE_PYTHON names an environment that has it."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from layerkv.bench.suite.lmcache_peer import PYTHON_VARIABLE
from layerkv.bench.suite.result import CaseResult

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON_VARIABLE not in os.environ, reason=f"{PYTHON_VARIABLE} names no Python with LMCache"),
]

ROOT = Path(__file__).parents[2]
MAIN = "import sys; from layerkv.cli import main; sys.exit(main())"

# Four conversations of up to 1,260 tokens each, and room for 2,048 tokens.
CASE = """
version: 1
case: made
question: Is history that left the device found in LMCache's server?
axis: sessions per second
engine: {model: test, kv_memory: 12MiB, host_memory: 256MiB, max_model_len: 1536}
workload:
  sessions: {turns: {fixed: 3}, think: 1s}
  classes: [{prompt_tokens: {uniform: [300, 400]}, output_tokens: {fixed: 20}}]
points: [{rate: 2.0, requests: 4}]
engines: [lmcache]
sizes: {full: {seeds: 1}}
"""


def test_lmcache_serves_conversations_out_of_host_memory_and_leaves_nothing_behind(tmp_path: Path) -> None:
    case = tmp_path / "made.yaml"
    case.write_text(CASE)
    files = ["--json", str(tmp_path / "result.json"), "--out", str(tmp_path)]
    command = [sys.executable, "-c", MAIN, "bench", "run", str(case), *files]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = msgspec.json.decode((tmp_path / "result.json").read_bytes(), type=CaseResult)
    figures = result.engines["lmcache"]
    assert figures.num_failed.median == 0
    assert figures.host_hit_tokens.median > 0
    assert "Retrieved" in (tmp_path / "made" / "lmcache-cache.seed0.log").read_text()
    assert not list(Path("/dev/shm").glob("lmcache_l1_pool_layerkv_bench_*"))
    python = os.environ[PYTHON_VARIABLE]
    left = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if python in (p.info["cmdline"] or [])]
    assert not left
