"""A placement as a shell script: the brokers of its devices, and the servers of its models."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator

from layerkv.core.placement import Placement, Tenant
from layerkv.place_ray import RUN_IN_SHELL, broker_socket, transfer_config
from layerkv.sim.fleet_config import Fleet, FleetModel

FIRST_PORT = 8000
"""Of the servers, one after the other. vLLM's default."""

_RUN = "@RUN@/"
_BACKGROUND = '& PIDS="$PIDS $!"'
_HEAD = """\
#!/bin/sh
# What `layerkv place --emit shell` placed: a broker for each device that models share, and a server for each replica.
@NOTE@
set -e
SERVE=${SERVE:-@SERVE@}
# Where a broker is by default. An environment variable means nothing inside JSON: the shell has to put it there.
@RUN_IN_SHELL@
PIDS=
trap 'kill $PIDS 2>/dev/null || :' EXIT
trap exit INT TERM

"""

_SERVE = {"gpu": "vllm serve", "cpu": "python -m vllm.entrypoints.openai.api_server --model"}
_NOTE = {
    "gpu": """\
# On CUDA layerkv refuses broker, kv_floor and kv_ceiling, which have never run on a GPU, unless
# allow_untested_elastic_cuda is set beside them.""",
    "cpu": """\
# For vLLM's CPU build, whose command `vllm` ends at once.""",
}


def shell_script(fleet: Fleet, placement: Placement) -> str:
    """The script's text. It starts everything on this machine, ports from 8000 on, and waits for it.

    A model over several devices gets no broker, and its floor as KV memory.
    """
    head = _HEAD.replace("@NOTE@", _NOTE[fleet.kind]).replace("@SERVE@", _SERVE[fleet.kind])
    head = head.replace("@RUN_IN_SHELL@", RUN_IN_SHELL)
    return head + "".join(f"{line}\n" for line in (*_brokers(fleet, placement), *_servers(fleet, placement), "wait"))


def _brokers(fleet: Fleet, placement: Placement) -> Iterator[str]:
    for device in fleet.devices:
        if any(tenant.shares for tenant in placement.tenants_on[device.name]):
            socket = f'"$RUN/{broker_socket(device.name)}"'
            yield f"layerkv broker --socket {socket} --capacity {placement.shared_bytes[device.name]} {_BACKGROUND}"
            yield f"until [ -S {socket} ]; do sleep 0.1; done  # engines do not start without it"
    yield ""


def _servers(fleet: Fleet, placement: Placement) -> Iterator[str]:
    numbers = {device.name: number for number, device in enumerate(fleet.devices)}
    placed = [(model, tenant) for model in fleet.models for tenant in model.tenants]
    for port, (model, tenant) in enumerate(placed, FIRST_PORT):
        devices = placement.devices_of[tenant.name]
        visible = ",".join(str(numbers[device]) for device in devices)
        where = f"CUDA_VISIBLE_DEVICES={visible} " if fleet.kind == "gpu" else ""
        flags = " ".join(_flags(model, tenant, devices, placement.shared_bytes[devices[0]]))
        yield f"{where}$SERVE {shlex.quote(model.source)} --port {port} {flags} {_BACKGROUND}"
    yield ""


def _flags(model: FleetModel, tenant: Tenant, devices: tuple[str, ...], shared_bytes: int) -> Iterator[str]:
    yield f"--served-model-name {shlex.quote(tenant.name)}"
    if tenant.ranks > 1:
        yield f"--tensor-parallel-size {tenant.ranks}"
    if model.max_model_len is not None:
        yield f"--max-model-len {model.max_model_len}"
    if not tenant.shares:
        yield f"--kv-cache-memory-bytes {tenant.rank_floor_bytes}"
    config = json.dumps(transfer_config(model, tenant, devices, shared_bytes, folder=_RUN), separators=(",", ":"))
    yield "--kv-transfer-config " + shlex.quote(config).replace(_RUN, "'\"$RUN\"'/")
