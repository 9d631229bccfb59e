"""A placement as a Ray Serve LLM application: the text of a Python file. Ray is not needed to write it.

For devices of kind cpu it starts, each engine behind its device's broker: `tests/vllm/server/test_ray_app.py` does so
with Ray 2.60. For GPUs it is a sketch to read, compiled and never run: unless it is told of processors, Ray Serve LLM
sets vLLM's executor to `ray` and takes no other (its `engines/vllm/vllm_models.py`), and layerkv refuses that one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pprint import pformat
from typing import Any

from layerkv.core.placement import Placement, Tenant
from layerkv.sim.fleet_config import Fleet, FleetModel

CONNECTOR = "LayerKVConnector"
DEVICE_SHARE = 0.001
"""Of a device's own resource, what a shard asks for: that binds it to the device, and never uses it up."""
GPU_SHARE = 0.01
"""Of a GPU, as Ray counts: what a model may take of one is the placement's affair and the broker's, not Ray's."""
CPU_SHARE = 0.01
"""Of a processor, as Ray counts, on devices of kind cpu: Ray would start no more engines than there are processors."""

RUN_IN_SHELL = "RUN=${XDG_RUNTIME_DIR:+$XDG_RUNTIME_DIR/layerkv}; RUN=${RUN:-${TMPDIR:-/tmp}/layerkv-$(id -u)}"
"""Says in a shell where a broker is by default, as :func:`layerkv.runtime.runtime_dir` does."""
_RUN = "@RUN@/"
_HEAD = '''\
"""Models that share devices, as `layerkv place --emit ray` placed them.

{what_it_is}

    {run}
{commands}

then `RAY_ADDRESS=auto serve run MODULE:app` (importing the app asks Ray, which without that variable may start another
one). Engines find their broker by its path in RUN, which must be the same folder here and there: they run on its host,
as its user. The floor holds the longest request: `max_model_len` says how long that is, and without it the model does.
"""

from layerkv.runtime import runtime_dir
from ray.serve.llm import LLMConfig, LLMServingArgs, build_openai_app

RUN = f"{{runtime_dir()}}/"

llm_configs = [
'''
_ON_GPUS = """\
A sketch to read, which cannot start today: in GPU mode Ray Serve LLM sets vLLM's executor to `ray`, takes no other, and
layerkv refuses that one; on CUDA it also refuses broker, kv_floor and kv_ceiling, unless allow_untested_elastic_cuda is
set. `layerkv place --emit shell` has the same engines without Ray. Each device would be a Ray node of its own, with a
resource of its name, and a broker:"""
_ON_CPUS = """\
For vLLM's CPU build. Engines take the environment that Ray was started in. A machine has its devices as resources of
their names, and a broker for each, started first; where one machine has all devices:"""
_TAIL = """\
]

app = build_openai_app(LLMServingArgs(llm_configs=llm_configs))
"""


def ray_application(fleet: Fleet, placement: Placement) -> str:
    """The file's text: `app` is one OpenAI-compatible application of all models.

    Each replica is a model to Ray, with a name of its own, since each has a broker of its own. A model over several
    devices gets no broker, and its floor as KV memory.
    """
    on_gpus = fleet.kind == "gpu"
    commands = _gpu_commands(fleet, placement) if on_gpus else _cpu_commands(fleet, placement)
    text = _HEAD.format(what_it_is=_ON_GPUS if on_gpus else _ON_CPUS, run=RUN_IN_SHELL, commands="\n".join(commands))
    for model in fleet.models:
        for tenant in model.tenants:
            devices = placement.devices_of[tenant.name]
            config = _llm_config(model, tenant, devices, placement.shared_bytes[devices[0]])
            config |= _on_gpus(devices) if on_gpus else _on_cpus(devices)
            body = pformat(config, width=100, sort_dicts=False).replace("\n", "\n          ")
            text += f"    LLMConfig(\n        **{body}\n    ),\n".replace(f"'{_RUN}", "RUN + '")
    return text + _TAIL


def _gpu_commands(fleet: Fleet, placement: Placement) -> Iterator[str]:
    for number, device in enumerate(fleet.devices):
        resource = f"'{{\"{device.name}\": 1}}'"
        yield f"    CUDA_VISIBLE_DEVICES={number} ray start --address HEAD --num-gpus 1 --resources {resource}"
        yield from _broker_command(device.name, placement)


def _cpu_commands(fleet: Fleet, placement: Placement) -> Iterator[str]:
    for device in fleet.devices:
        yield from _broker_command(device.name, placement)
    resources = json.dumps({device.name: 1 for device in fleet.devices})
    yield f"    ray start --head --resources '{resources}'"


def _broker_command(device: str, placement: Placement) -> Iterator[str]:
    if any(tenant.shares for tenant in placement.tenants_on[device]):
        yield f"    layerkv broker --socket $RUN/{broker_socket(device)} --capacity {placement.shared_bytes[device]}B &"


def broker_socket(device: str) -> str:
    """Name of the socket of that device's broker."""
    return f"broker-{device}.sock"


def transfer_config(
    model: FleetModel, tenant: Tenant, devices: tuple[str, ...], shared_bytes: int, *, folder: str
) -> dict[str, Any]:
    """vLLM's ``kv_transfer_config`` of one replica, its device's broker in `folder`; no options where it shares
    nothing."""
    config: dict[str, Any] = {"kv_connector": CONNECTOR, "kv_role": "kv_both"}
    if tenant.shares:
        config["kv_connector_extra_config"] = {
            "broker": folder + broker_socket(devices[0]),
            "kv_floor": f"{model.kv_floor_bytes}B",
            "kv_ceiling": f"{min(model.kv_ceiling_bytes or shared_bytes, shared_bytes)}B",
            "weight": model.weight,
        }
    return config


def _llm_config(model: FleetModel, tenant: Tenant, devices: tuple[str, ...], shared_bytes: int) -> dict[str, Any]:
    engine: dict[str, Any] = {"tensor_parallel_size": tenant.ranks}
    if model.max_model_len is not None:
        engine["max_model_len"] = model.max_model_len
    if not tenant.shares:
        engine["kv_cache_memory_bytes"] = tenant.rank_floor_bytes
    engine["kv_transfer_config"] = transfer_config(model, tenant, devices, shared_bytes, folder=_RUN)
    return {
        "model_loading_config": {"model_id": tenant.name, "model_source": model.source},
        "engine_kwargs": engine,
        "deployment_config": {"num_replicas": 1},
    }


def _on_gpus(devices: tuple[str, ...]) -> dict[str, Any]:
    return {
        "placement_group_config": {
            "bundles": [{"CPU": 1, "GPU": GPU_SHARE, device: DEVICE_SHARE} for device in devices],
        },
        "runtime_env": {"env_vars": {"VLLM_RAY_PER_WORKER_GPUS": str(GPU_SHARE)}},
    }


def _on_cpus(devices: tuple[str, ...]) -> dict[str, Any]:
    """Ray then has vLLM start the workers by itself, beside the engine: all devices of a model are one machine's."""
    return {
        "accelerator_config": {"kind": "cpu"},
        "placement_group_config": {
            "bundles": [{"CPU": CPU_SHARE, device: DEVICE_SHARE} for device in devices],
            "strategy": "STRICT_PACK",
        },
        "deployment_config": {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0}},
    }
