"""What vLLM, and layerkv in it, make of a checkpoint's configuration. Reads no weights, and asks no network.

Runs in the command's process, once: it makes a process group of one, and goes the way of a start as far as that needs
no weights. vLLM's configuration and layerkv's activation; the model, on torch's meta device, as vLLM itself makes one
whose weights come from elsewhere; the answers of layerkv's worker; vLLM's groups; the division of memory that scheduler
and workers agree on. So there is no table of models here, and what a later release supports shows by itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from layerkv.bench.engine_args import layerkv_connector
from layerkv.doctor_facts import (
    Drafter,
    Group,
    ModelFacts,
    Question,
    Sizes,
    check_checkpoint,
    kind_of,
    one_line,
)
from layerkv.errors import ConfigError, LayerKVError
from layerkv.strict_yaml import wrong
from layerkv.units import format_bytes

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheSpec

__all__ = ["examine_model"]

_TRANSFER = "kv_transfer_config"


def examine_model(question: Question) -> ModelFacts:
    """What a start would make of it, as far as that needs no weights.

    Raises:
        ConfigError: the folder holds no checkpoint, or vLLM itself does not take it; with what to set.
    """
    config_path = check_checkpoint(question.folder)
    config = _stock_config(question, config_path)
    facts = _facts_of(config, question)
    try:
        config = _our_config(question)
    except LayerKVError as error:
        facts = replace(facts, refused=str(error))
    with _alone(config):
        try:
            weight_bytes, drafter = _make_layers(config)
            facts = replace(facts, weight_bytes=weight_bytes, drafter=drafter)
            specs = _stock_worker()(config).get_kv_cache_spec()
            _resolve_layout(config, specs)
            groups = _groups_of(config, specs)
        except Exception as error:  # models are many, and what their making needs is theirs
            return replace(facts, by_config=f"vLLM could not make it without weights: {one_line(error)}")
        facts = replace(facts, **_groups_told(config, groups))
        return _with_sizes(facts, config, specs)


def _with_sizes(facts: ModelFacts, config: VllmConfig, specs: dict[str, KVCacheSpec]) -> ModelFacts:
    """What layerkv's worker says of the layers, and how memory would be divided, if some was asked about."""
    kv_bytes: int | None = config.cache_config.kv_cache_memory_bytes
    worker: Any = None
    if not facts.refused:
        worker = _our_worker(facts)(config)
        try:
            specs = worker.get_kv_cache_spec()
        except LayerKVError as error:
            facts = replace(facts, refused=str(error))
    if kv_bytes is None:
        return facts
    try:
        if facts.refused:  # then what vLLM would say by itself
            _configs_of(config, specs, kv_bytes)
            return facts
        return replace(facts, sizes=_sizes_of(config, specs, kv_bytes, worker.determine_available_memory()))
    except LayerKVError as error:
        return replace(facts, too_small=f"{facts.folder}: {error}")
    except (ValueError, NotImplementedError) as error:
        found = f"found {format_bytes(kv_bytes)} of KV memory, with which vLLM does not start ({one_line(error)})"
        fix = "set a larger --kv-memory or a smaller --max-model-len"
        return replace(facts, too_small=f"{facts.folder}: {found}; {fix}")


# vLLM's configuration -------------------------------------------------------------------------------------------------


def _stock_config(question: Question, config_path: Path) -> VllmConfig:
    """vLLM's own.

    Raises:
        ConfigError: it does not take the checkpoint, or one of the engine arguments.
    """
    try:
        return _config(question, None)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise _refused_by_vllm(config_path, error) from error
        problem = f"found an argument that vLLM does not have ({one_line(error)}); expected those of its EngineArgs"
        raise wrong("--engine-args", problem, "leave it out") from None
    except Exception as error:  # vLLM's own checks raise whatever they like
        raise _refused_by_vllm(config_path, error) from error


def _refused_by_vllm(config_path: Path, error: Exception) -> ConfigError:
    from vllm import __version__

    problem = f"found what vLLM {__version__} does not take ({one_line(error)}); expected a model that it serves here"
    fix = "set --model to another checkpoint, or in --engine-args what vLLM asks for"
    return wrong(str(config_path), problem, fix)


def _our_config(question: Question) -> VllmConfig:
    """The same with layerkv turned on.

    Raises:
        LayerKVError: layerkv refuses it.
    """
    from layerkv.vllm_plugin import register

    register()
    given = dict(question.engine_args.get(_TRANSFER) or layerkv_connector())
    extra_config = {**(given.get("kv_connector_extra_config") or {}), "on_unsupported": "error"}  # to hear the reason
    return _config(question, {**given, "kv_connector_extra_config": extra_config})


def _config(question: Question, transfer: dict[str, Any] | None) -> VllmConfig:
    from vllm.engine.arg_utils import EngineArgs

    args = {"skip_tokenizer_init": True, **question.engine_args, "model": str(question.folder), _TRANSFER: transfer}
    if question.kv_memory_bytes is not None:
        args["kv_cache_memory_bytes"] = question.kv_memory_bytes
    if question.max_model_len is not None:
        args["max_model_len"] = question.max_model_len
    config: VllmConfig = EngineArgs(**args).create_engine_config()
    return config


def _facts_of(config: VllmConfig, question: Question) -> ModelFacts:
    model, cache_dtype = config.model_config, config.cache_config.cache_dtype
    known = {
        "hybrid": model.is_hybrid,
        "without attention": model.is_attention_free,
        "latent attention (MLA)": model.use_mla,
        "multimodal": model.is_multimodal_model,
        "encoder-decoder": model.is_encoder_decoder,
        f"for {model.runner_type}": model.runner_type != "generate",
    }
    dtype = str(model.dtype).removeprefix("torch.")
    num_layers = model.get_num_layers(config.parallel_config)
    return ModelFacts(
        folder=str(question.folder),
        architectures=tuple(model.architectures),
        model_class=model.architecture,
        features=tuple(name for name, is_so in known.items() if is_so),
        dtype=dtype,
        kv_dtype=dtype if cache_dtype == "auto" else cache_dtype,
        max_model_len=model.max_model_len,
        num_layers=num_layers,
        most_token_bytes=_most_token_bytes(config, num_layers),
    )


def _most_token_bytes(config: VllmConfig, num_layers: int) -> int | None:
    model = config.model_config
    if config.cache_config.cache_dtype != "auto":
        return None
    try:
        elements = model.get_num_kv_heads(config.parallel_config) * model.get_head_size() * (1 if model.use_mla else 2)
    except Exception:  # a configuration that has no such figures
        return None
    return num_layers * elements * model.dtype.itemsize


# The model without weights --------------------------------------------------------------------------------------------


@contextmanager
def _alone(config: VllmConfig) -> Iterator[None]:
    """vLLM's process groups, of this process alone, with the configuration as the current one."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import (
        destroy_distributed_environment,
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    with tempfile.TemporaryDirectory(prefix="layerkv-doctor-") as folder, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/group", 0, "gloo")
        try:
            ensure_model_parallel_initialized(1, 1)
            yield
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


def _make_layers(config: VllmConfig) -> tuple[int, Drafter | None]:
    """Make the layers of the model, and of what drafts, which the configuration then knows, and choose block sizes.

    Layers with which a checkpoint could draft by itself (MTP) are made where speculation asks for them, as in vLLM: in
    an engine without, they have no KV.

    Returns:
        The bytes of all weights, as if a drafter shared none with the model; and the drafter, if there is one.
    """
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform

    weight_bytes = _bytes_of(config.model_config, lambda: initialize_model(config))
    drafter_bytes, drafter = _make_drafter(config)
    current_platform.update_block_size_for_backend(config)
    config.validate_block_size()
    return weight_bytes + drafter_bytes, drafter


def _make_drafter(config: VllmConfig) -> tuple[int, Drafter | None]:
    """As :func:`_make_layers`, of what drafts: as vLLM's proposers would make it."""
    from vllm.config.utils import replace as changed
    from vllm.model_executor.model_loader.utils import initialize_model

    from layerkv.vllm_plugin.drafts import DRAFTS_WITH_KV, DRAFTS_WITHOUT_KV

    speculation = config.speculative_config
    if speculation is None:
        return 0, None
    method, model_config = speculation.method, speculation.draft_model_config
    if method in DRAFTS_WITHOUT_KV:
        return 0, Drafter(method=method, keeps_kv=False)
    if method not in DRAFTS_WITH_KV:
        return 0, Drafter(method=method, not_counted="layerkv does not serve it")

    def make() -> Any:
        backend, cache_dtype = speculation.attention_backend, speculation.kv_cache_dtype
        own: dict[str, Any] = {"attention_config": changed(config.attention_config, backend=backend)}
        if cache_dtype is not None:
            own["cache_config"] = changed(config.cache_config, cache_dtype=cache_dtype)
        if method != "draft_model":
            return initialize_model(changed(config, **own), model_config=model_config)
        own |= {"model_config": model_config, "parallel_config": speculation.draft_parallel_config}
        return initialize_model(changed(config, **own, quant_config=None), prefix=method)

    layers = config.compilation_config.static_forward_context
    of_model = set(layers)
    try:
        drafter_bytes = _bytes_of(model_config, make)
    except Exception as error:  # as with models
        for name in set(layers) - of_model:
            del layers[name]
        why = f"vLLM could not make it without weights ({one_line(error)})"
        return 0, Drafter(method=method, not_counted=why)
    return drafter_bytes, Drafter(method=method)


def _bytes_of(model_config: Any, make: Callable[[], Any]) -> int:
    """Make a model without weights; the bytes that they would take."""
    import torch
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_default_torch_dtype(model_config.dtype), torch.device("meta"):
        model = make()
    return sum(each.numel() * each.element_size() for each in model.parameters())


def _stock_worker() -> type[Any]:
    """vLLM's worker, as far as it can be asked without a device."""
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

    class Worker:
        def __init__(self, vllm_config: VllmConfig) -> None:
            self.vllm_config = vllm_config

        def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
            return get_kv_cache_spec(self.vllm_config)

        def determine_available_memory(self) -> int:
            return self.vllm_config.cache_config.kv_cache_memory_bytes or 0

    return Worker


def _our_worker(facts: ModelFacts) -> type[Any]:
    """layerkv's worker over that one, as if it had loaded its weights."""
    from layerkv.vllm_plugin.host_memory import WorkerMemory
    from layerkv.vllm_plugin.worker import LayerKVWorkerMixin

    has_all_layers = facts.drafter is None or not facts.drafter.not_counted

    class Worker(LayerKVWorkerMixin, _stock_worker()):  # type: ignore[misc]
        def memory_before_kv(self) -> WorkerMemory:
            here = super().memory_before_kv()
            is_in_it = self.vllm_config.device_config.device_type == "cpu"
            return replace(here, held_bytes=here.held_bytes + (facts.weight_bytes or 0)) if is_in_it else here

        def unsupported_drafter(self, specs: dict[str, KVCacheSpec]) -> str | None:
            """Nothing is said of what drafts where its layers could not be made."""
            return super().unsupported_drafter(specs) if has_all_layers else None

    return Worker


# Groups and memory ----------------------------------------------------------------------------------------------------


def _resolve_layout(config: VllmConfig, specs: dict[str, KVCacheSpec]) -> None:
    """As the engine core does before it looks at memory."""
    from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
    from vllm.v1.worker.worker_base import WorkerBase

    layouts = WorkerBase.get_supported_kv_cache_layouts(_stock_worker()(config))
    resolve_kv_cache_layout(config, [layouts], specs.values())


def _planning() -> ModuleType:
    """Where vLLM plans KV memory: since 0.33 in a module of its own."""
    from vllm.v1.core import kv_cache_utils

    name = "vllm.v1.core.kv_cache_planning"
    return importlib.import_module(name) if importlib.util.find_spec(name) is not None else kv_cache_utils


def _groups_of(config: VllmConfig, specs: dict[str, KVCacheSpec]) -> list[KVCacheGroupSpec]:
    planning = _planning()
    groups: list[KVCacheGroupSpec]
    if hasattr(planning, "get_global_kv_cache_groups"):  # since 0.33
        groups = planning.get_global_kv_cache_groups(config, [dict(specs)])
    else:
        groups = planning.get_kv_cache_groups(config, dict(specs))
    return groups


def _groups_told(config: VllmConfig, groups: list[KVCacheGroupSpec]) -> dict[str, Any]:
    told = tuple(_group_told(config, group) for group in groups)
    return {"groups": told, "block_bytes": max((group.layer_bytes for group in told), default=0)}


def _group_told(config: VllmConfig, group: KVCacheGroupSpec) -> Group:
    spec: Any = group.kv_cache_spec
    layers = list(getattr(spec, "kv_cache_specs", {}).values()) or [spec]  # layers of one kind and several sizes
    kind, kept_tokens = kind_of(layers[0])
    state_blocks = -(-spec.max_memory_usage_bytes(config) // spec.page_size_bytes) if kept_tokens == 0 else 0
    pages = tuple(layer.page_size_bytes for layer in layers)
    return Group(
        kind=kind,
        num_layers=len(group.layer_names),
        block_tokens=spec.block_size,
        page_bytes=pages[:1] if len(set(pages)) == 1 else pages,
        kept_tokens=kept_tokens,
        state_blocks=state_blocks,
    )


def _configs_of(config: VllmConfig, specs: dict[str, KVCacheSpec], available_bytes: int) -> list[Any]:
    """What vLLM's engine core makes of memory.

    Raises:
        ValueError: it holds no request of ``max_model_len``.
    """
    planning = _planning()
    takes_groups = hasattr(planning, "get_global_kv_cache_groups")
    more = [_groups_of(config, specs)] if takes_groups else []
    configs: list[Any] = planning.get_kv_cache_configs(config, [dict(specs)], [available_bytes], *more)
    return configs


def _sizes_of(config: VllmConfig, specs: dict[str, KVCacheSpec], kv_bytes: int, virtual_bytes: int) -> Sizes:
    """What scheduler and workers agree on.

    Raises:
        ConfigError: memory does not do for ``max_model_len``, or host memory does not.
    """
    from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config

    from layerkv.vllm_plugin.setup import engine_config, setup_of

    kv_cache_config = generate_scheduler_kv_cache_config(_configs_of(config, specs, virtual_bytes))
    setup = setup_of(config, engine_config(config), kv_cache_config)
    assert setup is not None, "the specs are ours"
    geometry = setup.geometry
    return Sizes(
        kv_bytes=kv_bytes,
        pool_blocks=geometry.pool_blocks,
        zone_blocks=geometry.total_blocks - geometry.pool_blocks,
        zone_bytes=geometry.num_lanes * geometry.lane_bytes,
        block_tokens=geometry.block_tokens if len(kv_cache_config.kv_cache_groups) == 1 else None,
        host_blocks=setup.host_blocks,
        host_bytes=setup.host_blocks * geometry.block_bytes,
    )
