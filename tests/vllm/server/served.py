"""A real ``vllm serve`` in a subprocess, and a client for it: what the tests in this folder share."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from layerkv.bench.suite.vllm_build import vllm_command
from layerkv.bench.tiny_model import SHAPES
from tests.vllm.engines_in_turn import flag

if TYPE_CHECKING:
    import psutil

ROOT = Path(__file__).parents[3]
POLICY = ROOT / "configs" / "slo" / "chat-and-batch.yaml"
CLASSES = ("chat", "batch")
SHAPE = SHAPES["test"]
BLOCK_TOKENS = 32
BLOCK_BYTES = BLOCK_TOKENS * SHAPE.kv_bytes_per_token
MAX_MODEL_LEN = 1024
KV_BLOCKS = 72
"""Device memory for two of the longest requests, or for five to six of those that the pressure tests send."""
LANES = 2
LAYERKV = [sys.executable, "-c", "import sys; from layerkv.cli import main; sys.exit(main(sys.argv[1:]))"]
"""layerkv's command, of this environment."""
PATIENT_TOP = [*LAYERKV, "top"]
PATIENT_TOP[2] = f"from layerkv.top import command; command.TIMEOUT_S = 60.0; {LAYERKV[2]}"
"""`layerkv top`, which waits for a front end for as long as that takes on a busy machine."""

# All are limits for what should take a fraction of them: they end a hang, they measure nothing.
START_LIMIT_S = 180.0
STOP_LIMIT_S = 60.0
REQUEST_LIMIT_S = 120.0
POLL_LIMIT_S = 60.0
POLL_S = 0.05


def vllm_serve(model: Path, *options: str) -> list[str]:
    """The command line of a small, eager, float32 server."""
    return [
        *vllm_command(),
        *("serve", str(model), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"),
        *("--block-size", str(BLOCK_TOKENS), "--max-model-len", str(MAX_MODEL_LEN)),
        *("--max-num-batched-tokens", "512", "--kv-cache-memory-bytes", str(KV_BLOCKS * BLOCK_BYTES)),
        *options,
    ]


def kv_transfer_config(**extra_config: Any) -> str:
    """The one flag's value."""
    return json.dumps(flag(**extra_config))


def top_once(*arguments: str) -> dict[str, Any]:
    """The picture that a `layerkv top` of its own process gives now."""
    command = [*PATIENT_TOP, "--once", "--json", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=POLL_LIMIT_S, check=False)
    assert (run.returncode, run.stderr) == (0, ""), run
    picture: dict[str, Any] = json.loads(run.stdout)
    return picture


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Samples:
    """One reading of ``/metrics``."""

    values: dict[tuple[str, str], float]
    helps: dict[str, str]
    kinds: dict[str, str]

    def __call__(self, name: str, label: str = "") -> float:
        """The value of a sample whose only label besides vLLM's own has this value; 0 if there is none yet."""
        return self.values.get((name, label), 0.0)

    def residencies(self) -> dict[str, float]:
        """Requests by residency."""
        return {label: value for (name, label), value in self.values.items() if name == "layerkv_requests"}


def is_idle(samples: Samples) -> bool:
    """Whether no request is known and no block is taken, by vLLM's gauges and by layerkv's."""
    gauges = (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "layerkv_host_blocks_used",
        "layerkv_zone_blocks_used",
    )
    return not any(samples.residencies().values()) and not any(samples.values[gauge, ""] for gauge in gauges)


_VLLM_LABELS = ("engine", "model_name")


def read_metrics(text: str) -> Samples:
    """Parse the text that Prometheus scrapes."""
    from prometheus_client.parser import text_string_to_metric_families

    samples = Samples({}, {}, {})
    for family in text_string_to_metric_families(text):
        samples.helps[family.name] = family.documentation
        samples.kinds[family.name] = family.type
        for sample in family.samples:
            label = ",".join(value for key, value in sample.labels.items() if key not in _VLLM_LABELS)
            samples.values[sample.name, label] = sample.value
    return samples


@dataclass
class Completion:
    """What one request has returned so far."""

    is_open: bool = False
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    num_chunks: int = 0
    finish_reason: str | None = None

    def add(self, event: Mapping[str, Any]) -> None:
        """Take in one answer, whole or in part.

        Raises:
            AssertionError: the server sent an error instead.
        """
        assert "error" not in event, event
        (choice,) = event["choices"]
        self.num_chunks += 1
        self.token_ids += choice["token_ids"] or ()
        self.text += choice["text"]
        self.finish_reason = choice["finish_reason"] or self.finish_reason


def body(prompt: Sequence[int], max_tokens: int, **more: Any) -> dict[str, Any]:
    """A greedy completion request for exactly ``max_tokens`` tokens."""
    exactly = {"max_tokens": max_tokens, "min_tokens": max_tokens, "ignore_eos": True}
    return {"prompt": list(prompt), **exactly, "temperature": 0.0, "return_token_ids": True, **more}


_CLIENT_OPTIONS: dict[str, Any] = {
    "timeout": REQUEST_LIMIT_S,
    # Less than the server's 5 s: it may close a connection in the very moment in which it is used again.
    "limits": httpx.Limits(max_connections=None, keepalive_expiry=1.0),
    "trust_env": False,
}


class Server:
    """A ``vllm serve`` with layerkv, ready for requests."""

    def __init__(
        self, model: Path, log_path: Path, *more_options: str, policy: Path = POLICY, **extra_config: Any
    ) -> None:
        self.log_path = log_path
        self.is_told_to_stop = False
        port = free_port()
        flag = kv_transfer_config(policy=str(policy), host_memory="512MiB", **extra_config)
        options = ("--port", str(port), "--enable-log-requests", "--max-log-len", "0", "--kv-transfer-config", flag)
        command = vllm_serve(model, *options, *more_options)
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, **_CLIENT_OPTIONS)
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def log(self) -> str:
        """Everything the server has printed."""
        return self.log_path.read_text(errors="replace")

    def num_logged(self, text: str) -> int:
        """How many lines of the log have this text."""
        return sum(text in line for line in self.log().splitlines())

    def metrics(self) -> Samples:
        """What ``/metrics`` says now."""
        response = self.client.get("/metrics")
        assert response.status_code == 200
        return read_metrics(response.text)

    def wait_for(self, condition: Callable[[Samples], bool]) -> Samples:
        """Poll ``/metrics`` until ``condition`` holds, and return that reading.

        Raises:
            AssertionError: it did not come to hold.
        """
        end_s = time.monotonic() + POLL_LIMIT_S
        while not condition(samples := self.metrics()):
            if time.monotonic() > end_s:
                ours = {
                    key: value
                    for key, value in samples.values.items()
                    if key[0].startswith(("layerkv_", "vllm:num_requests"))
                }
                raise AssertionError(f"not so after {POLL_LIMIT_S:g} s; the metrics say {ours}")
            time.sleep(POLL_S)
        return samples

    def wait_until_idle(self) -> Samples:
        """Wait until every block is reported free and every request gone.

        Raises:
            AssertionError: something stays taken, or is said to.
        """
        return self.wait_for(is_idle)

    def complete(self, prompt: Sequence[int], max_tokens: int, **more: Any) -> Completion:
        """Send a request and wait for the whole answer."""
        response = self.post(body(prompt, max_tokens, **more))
        assert response.status_code == 200, response.text
        completion = Completion()
        completion.add(response.json())
        return completion

    def stream(
        self, requests: Sequence[Mapping[str, Any]], until: Callable[[list[Completion]], None] | None = None
    ) -> list[Completion]:
        """Send all requests at once and read their streams to the end.

        If ``until`` is given, the client closes all connections when that returns, wherever the requests are. If the
        server was told to stop by then, streams may have ended with an error.
        """
        return asyncio.run(self._stream(requests, until))

    async def _stream(
        self, requests: Sequence[Mapping[str, Any]], until: Callable[[list[Completion]], None] | None
    ) -> list[Completion]:
        completions = [Completion() for _ in requests]
        async with httpx.AsyncClient(base_url=self.client.base_url, **_CLIENT_OPTIONS) as client:

            async def read(request: Mapping[str, Any], completion: Completion) -> None:
                body = {**request, "stream": True}
                async with client.stream("POST", "/v1/completions", json=body) as response:
                    assert response.status_code == 200, await response.aread()
                    completion.is_open = True
                    async for line in response.aiter_lines():
                        if line.startswith("data: ") and line != "data: [DONE]":
                            completion.add(json.loads(line.removeprefix("data: ")))

            readers = [asyncio.create_task(read(*both)) for both in zip(requests, completions, strict=True)]
            if until is None:
                await asyncio.gather(*readers)
                return completions
            try:
                await asyncio.to_thread(until, completions)
            finally:
                for reader in readers:
                    reader.cancel()
                outcomes = await asyncio.gather(*readers, return_exceptions=True)
            failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
            assert self.is_told_to_stop or not failures, failures
        return completions

    def post(self, request: Mapping[str, Any]) -> httpx.Response:
        """Send a request as it is."""
        return self.client.post("/v1/completions", json=dict(request))

    def processes(self) -> list[psutil.Process]:
        """The server's process and everything it has started."""
        import psutil

        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def terminate(self) -> None:
        """Ask the server to stop, as an operator does."""
        self.is_told_to_stop = True
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the server and all it started, whatever state they are in."""
        self.client.close()
        self.terminate()  # killed at once, vLLM would leave shared memory behind
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_LIMIT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _wait_until_ready(self) -> None:
        end_s = time.monotonic() + START_LIMIT_S
        while time.monotonic() < end_s:
            if self.process.poll() is not None:
                raise AssertionError(f"vllm serve ended with {self.process.returncode}:\n{self.log()[-4000:]}")
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/health").status_code == 200:
                    return
            time.sleep(0.25)
        raise AssertionError(f"vllm serve is not ready after {START_LIMIT_S:g} s:\n{self.log()[-4000:]}")
