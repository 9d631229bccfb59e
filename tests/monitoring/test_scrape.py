"""A real Prometheus scrapes a real server with layerkv that parks under load: rules and dashboard find their data.

Its memory grows and shrinks, by a broker, so that the metrics of such engines are there too."""

from __future__ import annotations

import math
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from layerkv.bench.tiny_model import make_tiny_model
from layerkv.broker.server import Broker
from tests.monitoring import shipped
from tests.vllm.engines_in_turn import prompt
from tests.vllm.server.served import (
    BLOCK_BYTES,
    KV_BLOCKS,
    LANES,
    POLL_LIMIT_S,
    POLL_S,
    SHAPE,
    STOP_LIMIT_S,
    Samples,
    Server,
    body,
    free_port,
    is_idle,
    top_once,
)

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

POLICY = """
version: 1
default_class: patient
classes:
  patient: {ttft: 10m, tpot: 1s, overload: reject}
  hasty: {ttft: 1ms, tpot: 1s}
"""
"""One class that is always on time, with a backlog to report, and one that is always late: every series appears, and
no recording rule and no query is excepted from having data."""

NUM_REQUESTS = 24
NUM_BURSTS = 2
WINDOW = "5m"


class Prometheus:
    """A Prometheus with the shipped rules, scraping one server every second."""

    def __init__(self, binary: str, target: str, folder: Path) -> None:
        self._log_path = folder / "prometheus.log"
        port = free_port()
        config = yaml.safe_load(shipped.CONFIG.read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
        config_path = folder / "prometheus.yml"
        config_path.write_text(yaml.safe_dump(config))
        for name in config["rule_files"]:
            shutil.copy(shipped.PROMETHEUS / name, folder)
        command = [
            *(binary, f"--config.file={config_path}", f"--storage.tsdb.path={folder / 'data'}"),
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=POLL_LIMIT_S, trust_env=False)
        try:
            self.wait_for(self._is_ready, "Prometheus is ready")
        except BaseException:
            self.kill()
            raise

    def get(self, path: str, **parameters: str) -> Any:
        """The data of an answer of the HTTP API."""
        response = self._client.get(f"/api/v1/{path}", params=parameters)
        answer = response.json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series of an instant query."""
        data = self.get("query", query=expression)
        assert data["resultType"] == "vector", data
        return [(series["metric"], float(series["value"][1])) for series in data["result"]]

    def has_data(self, expression: str) -> bool:
        """Whether a query gives a number."""
        return any(not math.isnan(value) for _, value in self.query(expression))

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Poll until ``condition`` holds.

        Raises:
            AssertionError: it did not come to hold, or Prometheus has ended.
        """
        end_s = time.monotonic() + POLL_LIMIT_S
        while not condition():
            log = self._log_path.read_text(errors="replace")
            assert self._process.poll() is None, log
            assert time.monotonic() < end_s, f"not so after {POLL_LIMIT_S:g} s: {what}\n{log[-2000:]}"
            time.sleep(POLL_S)

    def kill(self) -> None:
        """End the process, whatever state it is in."""
        self._client.close()
        self._process.terminate()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _is_ready(self) -> bool:
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False


@dataclass(frozen=True)
class Monitored:
    """The server after a load under which it parked, all of it scraped."""

    broker: Path
    server: Server
    prometheus: Prometheus
    samples: Samples


@pytest.fixture(scope="module")
def monitored(prometheus_binary: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    folder = tmp_path_factory.mktemp("monitored")
    policy_path = folder / "slo.yaml"
    policy_path.write_text(POLICY)
    sizes = {"kv_floor": f"{KV_BLOCKS // 2 * BLOCK_BYTES}B", "kv_ceiling": f"{KV_BLOCKS * BLOCK_BYTES}B"}
    model = make_tiny_model("test", folder / "models")
    with ExitStack() as stack:
        broker = stack.enter_context(running_broker(folder / "broker.sock"))
        server = Server(model, folder / "server.log", policy=policy_path, broker=str(broker), **sizes)
        stack.callback(server.kill)
        prometheus = Prometheus(prometheus_binary, f"127.0.0.1:{server.client.base_url.port}", folder)
        stack.callback(prometheus.kill)
        for burst in range(NUM_BURSTS):
            samples = press(server, first_seed=NUM_REQUESTS * burst)
            # A series that appears with its first event gives a rate only after another: so one burst is scraped to its
            # end before the next begins.
            wait_until_scraped(prometheus, samples)
        yield Monitored(broker, server, prometheus, samples)


@contextmanager
def running_broker(path: Path) -> Iterator[Path]:
    """One that has more device memory than the server needs, and leaves it its own host memory.

    Where host memory is divided too, a request that runs out of blocks before the broker has answered is computed
    again, as happens on a busy machine: here no preemption is to be real.
    """
    broker, is_over = Broker(path, 1 << 30), threading.Event()
    thread = threading.Thread(target=broker.run, args=(is_over.is_set,))
    thread.start()
    try:
        yield path
    finally:
        is_over.set()
        thread.join()
        broker.close()


def press(server: Server, first_seed: int) -> Samples:
    """Requests for several times the KV memory, half of them of each class, and one that is a client's error."""
    classes = ("patient", "hasty")
    requests = [
        body(prompt(300, seed=seed), 40 + 10 * (seed % 7), vllm_xargs={"slo_class": classes[seed % 2]})
        for seed in range(first_seed, first_seed + NUM_REQUESTS)
    ]
    server.stream(requests)
    assert server.post(body(prompt(10, seed=1), 2, vllm_xargs={"slo_class": "no such class"})).status_code == 400
    return server.wait_until_idle()


def wait_until_scraped(prometheus: Prometheus, samples: Samples) -> None:
    """Wait until Prometheus has what the server says now that it is idle."""
    for name in ("layerkv_parks_total", "layerkv_fetches_total", "vllm:num_preemptions_total"):
        prometheus.wait_for(
            lambda name=name: [value for _, value in prometheus.query(name)] == [samples(name)],
            f"{name} is {samples(name)}",
        )
    for status in ("2xx", "4xx"):
        query = f'http_requests_total{{handler="/v1/completions", status="{status}"}}'
        prometheus.wait_for(lambda query=query: prometheus.has_data(query), query)


def substituted(expression: str) -> str:
    """A dashboard query as Grafana sends it, with everything chosen."""
    for variable, value in (("$__rate_interval", WINDOW), ("$model_name", ".*"), ("$engine", ".*")):
        expression = expression.replace(variable, value)
    assert "$" not in expression, expression
    return expression


def test_the_server_parked_under_this_load(monitored: Monitored) -> None:
    assert monitored.samples("layerkv_parks_total") > 0
    assert monitored.samples("layerkv_fetches_total") > 0


def test_the_target_is_up_under_the_name_that_the_alerts_look_for(monitored: Monitored) -> None:
    def health() -> list[tuple[str, str]]:
        targets = monitored.prometheus.get("targets")["activeTargets"]
        return [(target["health"], target["lastError"]) for target in targets]

    monitored.prometheus.wait_for(lambda: health() == [("up", "")], "the only target is up")
    monitored.prometheus.wait_for(
        lambda: [value for _, value in monitored.prometheus.query('up{job="vllm"}')] == [1.0], "it is up"
    )
    [(labels, _)] = monitored.prometheus.query('up{job="vllm"}')
    assert f":{monitored.server.client.base_url.port}" in labels["instance"]


def test_every_rule_is_loaded_and_evaluated_without_an_error(monitored: Monitored) -> None:
    def loaded() -> list[dict[str, Any]]:
        return [rule for group in monitored.prometheus.get("rules")["groups"] for rule in group["rules"]]

    monitored.prometheus.wait_for(
        lambda: all(rule["health"] != "unknown" for rule in loaded()), "every rule was evaluated"
    )
    expected = [rule["record"] for rule in shipped.rules(shipped.RULES)]
    expected += [rule["alert"] for rule in shipped.rules(shipped.ALERTS)]
    assert sorted(rule["name"] for rule in loaded()) == sorted(expected)
    assert {rule["name"]: rule.get("lastError") for rule in loaded() if rule["health"] != "ok"} == {}


@pytest.mark.parametrize("name", sorted(shipped.recorded_names()))
def test_a_recording_rule_has_data_after_the_load(monitored: Monitored, name: str) -> None:
    monitored.prometheus.wait_for(lambda: monitored.prometheus.has_data(name), f"{name} has data")


@pytest.mark.parametrize(
    ("name", "expression"), [pytest.param(*each, id=each[0]) for each in shipped.dashboard_queries()]
)
def test_a_query_of_the_dashboard_has_data_after_the_load(monitored: Monitored, name: str, expression: str) -> None:
    query = substituted(expression)
    monitored.prometheus.wait_for(lambda: monitored.prometheus.has_data(query), f"{name} has data")


@pytest.mark.parametrize("label", ["model_name", "engine"])
def test_what_can_be_chosen_on_the_dashboard_is_there(monitored: Monitored, label: str) -> None:
    values = monitored.prometheus.get(f"label/{label}/values", **{"match[]": "vllm:num_requests_running"})
    assert len(values) == 1


def test_attainment_is_one_for_the_class_that_is_on_time_and_zero_for_the_late_one(monitored: Monitored) -> None:
    def attainment() -> dict[str, float]:
        found = monitored.prometheus.query("model_class:layerkv_ttft_slo_met:ratio_rate5m")
        return {labels["slo_class"]: value for labels, value in found}

    monitored.prometheus.wait_for(lambda: attainment() == {"patient": 1.0, "hasty": 0.0}, "attainment by class")


def test_no_preemption_was_real_and_the_difference_to_vllms_count_is_none_once_idle(monitored: Monitored) -> None:
    samples = monitored.samples
    assert samples("layerkv_recomputes_total") == 0
    assert samples("vllm:num_preemptions_total") == samples("layerkv_parks_total")
    assert monitored.prometheus.query('ALERTS{alertname="LayerKVRealPreemptions"}') == []


def test_every_foreign_metric_on_the_list_is_exported_by_the_server(monitored: Monitored) -> None:
    exported = {name for name, _ in monitored.server.metrics().values}
    assert shipped.foreign_names() <= exported


def test_every_metric_of_layerkv_is_scraped(monitored: Monitored) -> None:
    scraped = set(monitored.prometheus.get("label/__name__/values"))
    assert shipped.layerkv_names() <= scraped


def test_layerkv_top_shows_what_broker_and_server_tell_of_one_engine_in_one_row(monitored: Monitored) -> None:
    server = monitored.server
    samples = server.wait_for(lambda samples: is_idle(samples) and holds_one_segment(samples))
    picture = top_once("--socket", str(monitored.broker), "--url", server.url)
    assert picture["errors"] == []
    [row] = picture["engines"]
    assert row["title"] == server.client.get("/v1/models").json()["data"][0]["id"]
    assert row["url"] == f"{server.url}/metrics"
    assert row["is_connected"]
    assert set(row["pids"]) <= {process.pid for process in server.processes()}
    assert row["requests"] == samples.residencies()
    assert row["tokens"]["on_time"] + row["tokens"]["late"] > 0
    device = row["device"]
    assert device["segments"] * device["segment_bytes"] == device["held"]
    assert device["limit"] <= picture["broker"]["device"]["committed"] <= picture["broker"]["device"]["capacity"]
    assert samples("layerkv_kv_bytes", "held") == device["segment_bytes"]
    zone_bytes = samples("layerkv_zone_blocks") * BLOCK_BYTES * LANES / SHAPE.num_layers
    assert device["segments"] == 1 + math.ceil(zone_bytes / device["segment_bytes"])
    assert device["need"] == device["held"]
    assert row["host"] is None


def holds_one_segment(samples: Samples) -> bool:
    """Whether the pool has given back all but vLLM's null block, as when it has been idle for a while, and says so."""
    needed = samples("layerkv_kv_bytes", "need")  # told once more by an engine that then falls silent
    return samples("layerkv_pool_blocks") == 0 and needed == samples("layerkv_kv_bytes", "held")


def test_a_park_whose_request_is_aborted_is_never_counted_by_vllm(monitored: Monitored) -> None:
    """Why rules take `layerkv_recomputes_total` for real preemptions, and not vLLM's count less the parks."""
    server = monitored.server
    requests = [body(prompt(300, seed=seed), 500) for seed in range(500, 500 + NUM_REQUESTS)]
    server.stream(requests, lambda _: wait_until_several_are_parked(server))
    samples = server.wait_until_idle()
    assert samples("layerkv_recomputes_total") == 0
    assert samples("vllm:num_preemptions_total") < samples("layerkv_parks_total")


def wait_until_several_are_parked(server: Server) -> None:
    """Wait until several requests are parked, more than may be fetched before the clients hang up."""
    server.wait_for(lambda samples: samples("layerkv_requests", "parked") >= NUM_REQUESTS // 4)
