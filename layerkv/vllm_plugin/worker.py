"""What our workers have in common: they tell vLLM how many block ids to hand out, so that pool and zone fit memory.

Each device's worker has a module of its own: vLLM's CPU worker puts CPU buffers in the place of the GPU's as soon as it
is imported.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import unify_hybrid_kv_cache_specs
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from layerkv.core.geometry import geometry_for_memory
from layerkv.errors import ConfigError
from layerkv.vllm_plugin.elastic_setup import ElasticSizes, elastic_sizes, told_kv_bytes
from layerkv.vllm_plugin.host_memory import WorkerMemory, host_blocks_per_worker
from layerkv.vllm_plugin.setup import engine_config, geometry_request, require_room_for_one
from layerkv.vllm_plugin.slo_gate import without_gates
from layerkv.vllm_plugin.spec import OURS, LayerKVSpec, place_of_kv

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
        is_elastic, floor_bytes = self._layerkv.is_elastic, self._layerkv.kv_floor_bytes or 1  # any size will do here
        with told_kv_bytes(vllm_config, floor_bytes) if is_elastic else nullcontext():
            super().__init__(vllm_config, *args, **kwargs)
        self._layerkv_specs: dict[str, LayerKVSpec] | None = None

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """vLLM's specs, each as ours, so that our manager hands out the blocks."""
        specs: dict[str, KVCacheSpec] = super().get_kv_cache_spec()  # type: ignore[misc]
        if self.vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
            unify_hybrid_kv_cache_specs(specs)  # the engine core does it next, and would not keep what is ours
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
        if self._layerkv.is_elastic:
            segments = self._elastic_sizes().plan
            self._layerkv_specs = {name: replace(spec, segments=segments) for name, spec in self._layerkv_specs.items()}
        return dict(self._layerkv_specs)

    def determine_available_memory(self) -> int:
        """The *virtual* size of the KV range whose physical memory fits what vLLM found available."""
        if self._layerkv_specs is not None and self._layerkv.is_elastic:
            return self._elastic_virtual_bytes()
        available_bytes: int = super().determine_available_memory()  # type: ignore[misc]
        if self._layerkv_specs is None:
            return available_bytes
        spec = next(iter(self._layerkv_specs.values()))
        request = geometry_request(self.vllm_config, self._layerkv, spec, len(self._layerkv_specs))
        geometry = geometry_for_memory(request, available_bytes)
        assert spec.memory is not None
        if self.vllm_config.cache_config.num_gpu_blocks_override is None:
            require_room_for_one(self.vllm_config, self._layerkv, geometry, spec.memory)
            host_blocks_per_worker(self.vllm_config, self._layerkv, geometry, spec.memory)
        return geometry.virtual_bytes

    def _elastic_virtual_bytes(self) -> int:
        """Of the ceiling, which no memory stands for yet: for vLLM, what there must be is the floor."""
        sizes = self._elastic_sizes()
        with told_kv_bytes(self.vllm_config, sizes.floor_bytes):
            super().determine_available_memory()  # type: ignore[misc]
        assert self._layerkv_specs is not None
        memory = next(iter(self._layerkv_specs.values())).memory
        assert memory is not None
        host_blocks_per_worker(self.vllm_config, self._layerkv, sizes.geometry_to_fit, memory)
        return sizes.geometry.virtual_bytes

    def _elastic_sizes(self) -> ElasticSizes:
        assert self._layerkv_specs is not None
        spec = next(iter(self._layerkv_specs.values()))
        request = geometry_request(self.vllm_config, self._layerkv, spec, len(self._layerkv_specs))
        return elastic_sizes(self.vllm_config, self._layerkv, request)

    def _unsupported_layers(self, specs: dict[str, KVCacheSpec]) -> str | None:
        if not specs:
            return "a model without KV cache is not supported by layerkv: there is nothing to offload"
        for name, spec in specs.items():
            if type(spec) not in OURS:
                return (
                    f"layer {name} has a {type(spec).__name__}, and layerkv supports only full attention in every "
                    f"layer yet: {_instead_of(specs)}"
                )
            if vars(spec).get("non_causal"):  # not in all releases
                return (
                    f"layer {name} reads tokens that come later, and layerkv computes a prompt in chunks, in order: "
                    "use a model with causal attention"
                )
        # a window does not change what lies where
        layer_of = {place_of_kv(spec): n for n, spec in specs.items()}
        if len(layer_of) > 1:
            one, other = list(layer_of.values())[:2]
            return (
                f"the model's attention layers differ in KV shape ({one} from {other}), and those of a lane must not: "
                "use another model"
            )
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        if any(getattr(layer, "kv_sharing_target_layer_name", None) for layer in layers):  # not all layers have KV
            return (
                "layers that share another layer's KV are not supported by layerkv yet, because that layer's lane is "
                "written anew before they run: use another model"
            )
        return None


def _instead_of(specs: dict[str, KVCacheSpec]) -> str:
    """What to set where some layer has no full attention."""
    if any(type(spec) in OURS for spec in specs.values()) and all(isinstance(s, AttentionSpec) for s in specs.values()):
        return "set --disable-hybrid-kv-cache-manager, which keeps the KV of all tokens in every layer"
    return "use a model without sliding-window, linear or compressed attention"
