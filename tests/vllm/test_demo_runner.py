"""The demo, quick, with real engines: one run of all three that every test here looks at."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from layerkv.bench import metrics, records
from layerkv.bench.demo import run_demo
from layerkv.bench.load import make_load
from layerkv.bench.plan import ENGINE_NAMES
from layerkv.bench.tiny_model import SHAPES, make_tiny_model
from layerkv.errors import ConfigError

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@dataclass(frozen=True)
class QuickDemo:
    out_dir: Path
    exit_code: int
    result: metrics.DemoResult
    runs: dict[str, records.EngineRun]


@pytest.fixture(scope="module")
def quick_demo(tmp_path_factory: pytest.TempPathFactory) -> QuickDemo:
    pytest.importorskip("vllm")
    out_dir = tmp_path_factory.mktemp("demo")
    exit_code = run_demo(out_dir, seed=1, quick=True)
    runs = {name: records.read_json(out_dir / f"{name}.json", records.EngineRun) for name in ENGINE_NAMES}
    return QuickDemo(out_dir, exit_code, records.read_json(out_dir / "result.json", metrics.DemoResult), runs)


def test_the_quick_demo_succeeds_and_leaves_result_and_report(quick_demo: QuickDemo) -> None:
    assert quick_demo.exit_code == 0
    assert quick_demo.result.complete
    assert quick_demo.result.tokens_equal
    assert json.loads((quick_demo.out_dir / "result.json").read_bytes())["schema"] == 1
    assert "<h2>Requests" in (quick_demo.out_dir / "report.html").read_text()


def test_every_request_gets_exactly_the_tokens_asked_for(quick_demo: QuickDemo) -> None:
    asked = {request.request_id: request.output_tokens for request in make_load(quick_demo.result.load)}
    for run in quick_demo.runs.values():
        got = {request.request_id: len(request.token_ids) for request in run.requests}
        assert got == asked


def test_all_engines_give_the_same_tokens_and_requests_differ_from_each_other(quick_demo: QuickDemo) -> None:
    stock, oracle = quick_demo.runs["stock"], quick_demo.runs["oracle"]
    assert metrics.differing_requests(stock, oracle) == []
    outputs = {tuple(request.token_ids) for request in stock.requests}
    assert len(outputs) == len(stock.requests)
    assert all(len(set(output)) > 10 for output in outputs)  # not one token over and over


def test_the_times_of_every_request_are_in_order(quick_demo: QuickDemo) -> None:
    for run in quick_demo.runs.values():
        for request in run.requests:
            assert request.first_scheduled_s is not None
            moments_s = [request.arrival_s, request.first_scheduled_s, *request.token_times_s, run.wall_s]
            assert moments_s == sorted(moments_s)


def test_moves_between_states_are_known_for_every_request(quick_demo: QuickDemo) -> None:
    for run in quick_demo.runs.values():
        for request in run.requests:
            states = [move.state for move in request.states]
            assert states[-1] == "gone"
            assert {"resident", "layered"} & set(states)


def test_the_scarce_engines_ran_short_of_kv_memory_and_the_oracle_did_not(quick_demo: QuickDemo) -> None:
    queued_s = {name: figures.queue_s.mean for name, figures in quick_demo.result.engines.items()}
    assert queued_s["stock"] > queued_s["oracle"]
    assert quick_demo.runs["oracle"].preemptions == 0


def test_layerkv_parked_and_fetched_and_its_bytes_are_counted(quick_demo: QuickDemo) -> None:
    run = quick_demo.runs["layerkv"]
    assert run.parks > 0
    assert run.parks >= run.fetches > 0
    assert run.bytes_stored > 0
    assert run.bytes_loaded > 0
    assert any(move.state == "parked" for request in run.requests for move in request.states)
    for name in ("stock", "oracle"):
        assert (quick_demo.runs[name].bytes_stored, quick_demo.runs[name].parks) == (0, 0)


def test_steps_are_counted_and_host_time_is_a_part_of_each(quick_demo: QuickDemo) -> None:
    for run in quick_demo.runs.values():
        assert run.num_steps >= max(len(request.token_ids) for request in run.requests)
        assert 0 < run.host_s_per_step < run.step_s


def test_a_model_is_made_once_and_is_the_same_wherever_it_is_made(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    first = make_tiny_model("test", tmp_path / "a")
    made_at_ns = (first / "model.safetensors").stat().st_mtime_ns
    assert make_tiny_model("test", tmp_path / "a") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == made_at_ns
    again = make_tiny_model("test", tmp_path / "b")
    assert again.name == first.name
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == [first.name]


def test_a_models_tokenizer_has_a_token_for_every_id_and_every_byte(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = make_tiny_model("test", tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == SHAPES["test"].vocab_size
    text = "Größe: 42 €\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_unknown_model_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"no model shape 'huge'; expected one of {', '.join(sorted(SHAPES))}$"):
        make_tiny_model("huge", tmp_path)
