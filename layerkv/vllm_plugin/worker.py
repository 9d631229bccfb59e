"""What our workers have in common: they tell vLLM how many block ids to hand out, so that pool and zone fit memory.

Each device's worker has a module of its own: vLLM's CPU worker puts CPU buffers in the place of the GPU's as soon as it
is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from layerkv.core.geometry import geometry_for_memory
from layerkv.errors import ConfigError
from layerkv.vllm_plugin.host_memory import WorkerMemory, host_blocks_per_worker
from layerkv.vllm_plugin.segment_setup import at_ceiling, geometry_at_start
from layerkv.vllm_plugin.setup import engine_config, geometry_request, require_room_for_one
from layerkv.vllm_plugin.slo_gate import without_gates
from layerkv.vllm_plugin.spec import LayerKVSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(f"vllm.{__name__}")


if TYPE_CHECKING:
    _VLLMWorker = Any  # a checker sees vLLM as Any: its methods and attributes are found there at run time
else:
    _VLLMWorker = object


class LayerKVWorkerMixin(_VLLMWorker):
    """Over any of vLLM's workers. Its methods are vLLM's, in the order in which the engine calls them."""

    vllm_config: VllmConfig
    model_runner: Any

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        self._layerkv = engine_config(vllm_config)
        model_config = vllm_config.model_config
        model_config.logits_processors = without_gates(model_config.logits_processors)
        super().__init__(vllm_config, *args, **kwargs)
        self._layerkv_specs: dict[str, LayerKVSpec] | None = None

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """vLLM's specs, each as ours, so that our manager hands out the blocks."""
        specs: dict[str, KVCacheSpec] = super().get_kv_cache_spec()  # type: ignore[misc]
        if (problem := self._unsupported_layers(specs)) is not None:
            if self._layerkv.on_unsupported == "error":
                raise ConfigError(
                    f'{problem}, or set "on_unsupported": "passthrough" in kv_connector_extra_config to run '
                    "without layerkv"
                )
            logger.warning("layerkv is off, vLLM runs as without it: %s", problem)
            return specs
        memory = WorkerMemory.here()  # the weights are loaded, the KV cache is not made yet
        self._layerkv_specs = {name: LayerKVSpec.of(spec, memory) for name, spec in specs.items()}  # type: ignore[arg-type]
        return dict(self._layerkv_specs)

    def determine_available_memory(self) -> int:
        """The *virtual* size of the KV range whose physical memory fits what vLLM found available."""
        available_bytes: int = super().determine_available_memory()  # type: ignore[misc]
        if self._layerkv_specs is None:
            return available_bytes
        spec = next(iter(self._layerkv_specs.values()))
        request = geometry_request(self.vllm_config, self._layerkv, spec, len(self._layerkv_specs))
        geometry = geometry_for_memory(request, available_bytes)
        if spec.segments is not None:
            geometry = geometry_at_start(geometry, spec.segments, available_bytes)
        assert spec.memory is not None
        if self.vllm_config.cache_config.num_gpu_blocks_override is None:
            require_room_for_one(self.vllm_config, self._layerkv, geometry, spec.memory)
            host_blocks_per_worker(self.vllm_config, self._layerkv, geometry, spec.memory)
        return geometry.virtual_bytes if spec.segments is None else at_ceiling(geometry, spec.segments).virtual_bytes

    def _unsupported_layers(self, specs: dict[str, KVCacheSpec]) -> str | None:
        if not specs:
            return "a model without KV cache is not supported by layerkv: there is nothing to offload"
        for name, spec in specs.items():
            if type(spec) is not FullAttentionSpec:
                return (
                    f"layer {name} has a {type(spec).__name__}, and layerkv supports only full attention in every "
                    "layer yet: use a model without sliding-window, linear or compressed attention"
                )
        if len(set(specs.values())) > 1:
            return (
                "the model's attention layers differ in KV shape, which layerkv does not support yet: use another model"
            )
        if getattr(self.model_runner, "shared_kv_cache_layers", None):
            return "layers that share another layer's KV are not supported by layerkv yet: use another model"
        return None
