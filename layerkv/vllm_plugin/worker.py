"""What our workers have in common: they tell vLLM how many block ids to hand out, so that pool and zone fit memory.

Each device's worker has a module of its own: vLLM's CPU worker puts CPU buffers in the place of the GPU's as soon as it
is imported.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec, MambaSpec, UniformTypeKVCacheSpecs

from layerkv.core.geometry import GeometryRequest, geometry_for_memory
from layerkv.errors import ConfigError
from layerkv.vllm_plugin.drafts import num_drafting_layers
from layerkv.vllm_plugin.elastic_setup import ElasticSizes, elastic_sizes, told_kv_bytes
from layerkv.vllm_plugin.host_memory import WorkerMemory, host_blocks_per_worker
from layerkv.vllm_plugin.kv_groups import as_full_attention, grouped, is_uniform, our_groups, zeroes_blocks
from layerkv.vllm_plugin.setup import (
    engine_config,
    request_for_groups,
    require_room_for_one,
    unsupported_with_groups,
)
from layerkv.vllm_plugin.slo_gate import without_gates
from layerkv.vllm_plugin.spec import OUR_SPECS, is_supported, ours

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

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
        self._layerkv_specs: dict[str, Any] | None = None
        self._zeroes_blocks = False

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """vLLM's specs, each as ours, so that our managers hand out the blocks."""
        specs: dict[str, KVCacheSpec] = super().get_kv_cache_spec()  # type: ignore[misc]
        if self.vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
            specs = as_full_attention(specs)
        problem = self._unsupported_layers(specs) or self.unsupported_drafter(specs)
        if problem is None and not all(isinstance(spec, FullAttentionSpec) for spec in specs.values()):
            problem = unsupported_with_groups(self.vllm_config, self._layerkv)  # vLLM will make such of these layers
        if problem is not None:
            if self._layerkv.on_unsupported == "error":
                raise ConfigError(
                    f'{problem}, or set "on_unsupported": "passthrough" in kv_connector_extra_config to run '
                    "without layerkv"
                )
            logger.warning("layerkv is off, vLLM runs as without it: %s", problem)
            return specs
        memory = self.memory_before_kv()
        self._layerkv_specs = {name: ours(spec, memory) for name, spec in specs.items()}
        self._zeroes_blocks = zeroes_blocks(self._layerkv_specs.values())
        if self._layerkv.is_elastic:
            segments = self._elastic_sizes().plan
            self._layerkv_specs = {
                name: replace(spec, segments=segments)  # type: ignore[call-arg]
                for name, spec in self._layerkv_specs.items()
            }
        return dict(self._layerkv_specs)

    def memory_before_kv(self) -> WorkerMemory:
        """What this process has of memory: the weights are loaded, the KV cache is not made yet."""
        return WorkerMemory.here()

    def unsupported_drafter(self, specs: dict[str, KVCacheSpec]) -> str | None:
        """Why what drafts cannot be served beside these layers, its own among them; None if it can, or nothing does."""
        if num_drafting_layers(self.vllm_config, names := list(specs)) is not None:
            return None
        return (
            f"speculative decoding by {self.vllm_config.speculative_config.method} is not supported by layerkv with "
            "this model, because the names of the layers with KV do not tell which are of what drafts (they are "
            f"{names[0]} to {names[-1]}): leave out --speculative-config"
        )

    def determine_available_memory(self) -> int:
        """The *virtual* size of the KV range whose physical memory fits what vLLM found available."""
        if self._layerkv_specs is not None and self._layerkv.is_elastic:
            return self._elastic_virtual_bytes()
        available_bytes: int = super().determine_available_memory()  # type: ignore[misc]
        if self._layerkv_specs is None:
            return available_bytes
        geometry = geometry_for_memory(self._geometry_request(), available_bytes)
        memory = self._memory()
        if self.vllm_config.cache_config.num_gpu_blocks_override is None:
            require_room_for_one(self.vllm_config, self._layerkv, geometry, memory)
            host_blocks_per_worker(self.vllm_config, self._layerkv, geometry, memory)
        return geometry.virtual_bytes

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """vLLM's step. Where it zeroes blocks before the connector hears of the step, that hears of it sooner."""
        if self._zeroes_blocks:
            get_kv_transfer_group().bind_before_zeroing(scheduler_output.kv_connector_metadata)
        return super().execute_model(scheduler_output)  # type: ignore[misc]

    def _memory(self) -> WorkerMemory:
        assert self._layerkv_specs is not None
        memory = next(spec.memory for spec in self._layerkv_specs.values() if isinstance(spec, OUR_SPECS))
        assert memory is not None
        return memory

    def _geometry_request(self) -> GeometryRequest:
        assert self._layerkv_specs is not None
        groups = grouped(self.vllm_config, self._layerkv_specs)
        own = our_groups(self.vllm_config, groups)
        assert own is not None
        return request_for_groups(self.vllm_config, self._layerkv, groups, own)

    def _elastic_virtual_bytes(self) -> int:
        """Of the ceiling, which no memory stands for yet: for vLLM, what there must be is the floor."""
        sizes = self._elastic_sizes()
        with told_kv_bytes(self.vllm_config, sizes.floor_bytes):
            super().determine_available_memory()  # type: ignore[misc]
        host_blocks_per_worker(self.vllm_config, self._layerkv, sizes.geometry_to_fit, self._memory())
        return sizes.geometry.virtual_bytes

    def _elastic_sizes(self) -> ElasticSizes:
        return elastic_sizes(self.vllm_config, self._layerkv, self._geometry_request())

    def _unsupported_layers(self, specs: dict[str, KVCacheSpec]) -> str | None:
        if not specs:
            return "a model without KV cache is not supported by layerkv: there is nothing to offload"
        for name, spec in specs.items():
            if not is_supported(spec):
                return (
                    f"layer {name} has a {type(spec).__name__}, and layerkv supports only full attention, sliding "
                    "windows, chunked local attention and Mamba-like states yet: use a model without compressed or "
                    "cross attention"
                )
            if vars(spec).get("non_causal"):  # not in all releases
                return (
                    f"layer {name} reads tokens that come later, and layerkv computes a prompt in chunks, in order: "
                    "use a model with causal attention"
                )
        if all(isinstance(spec, MambaSpec) for spec in specs.values()):
            return "a model without attention is not supported by layerkv: its states do not grow with the context"
        has_states = any(isinstance(spec, MambaSpec) for spec in specs.values())
        if has_states and self.vllm_config.cache_config.mamba_cache_mode != "none":
            return (
                "prefix caching in a model with states is not supported by layerkv yet, because states are parked as "
                "the one of the last token: leave out --enable-prefix-caching"
            )
        if zeroes_blocks(spec for spec in specs.values() if isinstance(spec, AttentionSpec)):
            return (
                "attention layers that keep KV in different number formats are not supported by layerkv yet, because "
                "vLLM zeroes blocks between them, and layers of a lane would read each other's: leave out what sets a "
                "format for some layers"
            )
        if (shapes := _mixed_shapes(specs)) is not None:
            return shapes
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        if any(getattr(layer, "kv_sharing_target_layer_name", None) for layer in layers):  # not all layers have KV
            return (
                "layers that share another layer's KV are not supported by layerkv yet, because that layer's lane is "
                "written anew before they run: use another model"
            )
        return None


def _mixed_shapes(specs: dict[str, KVCacheSpec]) -> str | None:
    """vLLM puts layers of one kind that differ in shape into one group, whose pages then differ in size."""
    if is_uniform(specs) or not UniformTypeKVCacheSpecs.is_uniform_type(specs):
        return None
    (one, first), *others = specs.items()
    other = next(name for name, spec in others if spec != first)
    return (
        f"the model's attention layers differ in KV shape ({one} from {other}), and those of a lane must not: "
        "use another model"
    )
