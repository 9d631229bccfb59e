"""What a server's `/metrics` says of its engines now."""

from __future__ import annotations

import http.client
import math
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from layerkv.errors import ConfigError, LayerKVError
from layerkv.metrics_text import labels_in, samples

MOST_BYTES = 16 << 20
"""Of an answer. Not measured: chosen by judgement: a hundred times what a server with many engines says."""


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # what a proxy keeps is not of this moment


@dataclass(slots=True)
class Figures:
    """One engine of a server. Bytes and tokens count from its start; the others are of this moment."""

    requests: dict[str, int] = field(default_factory=dict)
    """By residency of their KV."""
    num_paused: int = 0
    waits_for: dict[str, int] = field(default_factory=dict)
    """Requests at the heads of the lines, by the resource that they wait for; those that are 0 left out."""
    num_bytes: dict[str, float] = field(default_factory=dict)
    """Copied, by direction."""
    num_on_time: float = 0
    num_late: float = 0


Engine = tuple[str, str]
"""A model's name, and the engine's number within the server."""


def metrics_url(url: str) -> str:
    """Where a server of that address has its metrics.

    Raises:
        ConfigError: it is no address.
    """
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        is_address = False
    if not is_address:
        raise ConfigError(f"--url: found {url!r}; expected the address of a server, such as http://localhost:8000")
    address = url.rstrip("/")
    return address if address.endswith("/metrics") else f"{address}/metrics"


def read_server(url: str, timeout_s: float) -> dict[Engine, Figures]:
    """All engines of the server whose metrics are at that address.

    Raises:
        LayerKVError: it does not answer, or has no layerkv.
    """
    try:
        with _OPENER.open(url, timeout=timeout_s) as answer:
            text = answer.read(MOST_BYTES).decode(errors="replace")
    except urllib.error.HTTPError as error:
        raise LayerKVError(f"{url}: HTTP {error.code}; expected the metrics of `vllm serve`") from None
    except urllib.error.URLError as error:
        raise LayerKVError(f"no server at {url} ({getattr(error.reason, 'strerror', None) or error.reason})") from None
    except TimeoutError:
        raise LayerKVError(f"the server at {url} has not answered for {timeout_s:g} s") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise LayerKVError(f"{url}: {type(error).__name__}: {error}") from None
    engines = read_figures(text)
    if not engines:
        raise LayerKVError(f"the server at {url} runs without layerkv: its metrics have none that begins with layerkv_")
    return engines


def read_figures(text: str) -> dict[Engine, Figures]:
    """All engines of which a text in Prometheus' format tells something of layerkv's."""
    engines: dict[Engine, Figures] = {}
    for name, labels_text, value in samples(text, ("layerkv_",)):
        if not math.isfinite(value):
            continue
        labels = labels_in(labels_text)
        figures = engines.setdefault((labels.get("model_name", ""), labels.get("engine", "0")), Figures())
        if name == "layerkv_requests":
            figures.requests[labels.get("residency", "")] = int(value)
        elif name == "layerkv_paused_requests":
            figures.num_paused = int(value)
        elif name == "layerkv_waiting_requests" and value > 0:
            figures.waits_for[labels.get("resource", "")] = int(value)
        elif name == "layerkv_bytes_total":
            figures.num_bytes[labels.get("direction", "")] = value
        elif name == "layerkv_tokens_on_time_total":
            figures.num_on_time += value
        elif name == "layerkv_tokens_late_total":
            figures.num_late += value
    return engines
