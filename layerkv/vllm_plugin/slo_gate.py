"""Refuses, in the API server and with HTTP 400, a request that names an SLO class the policy does not have.

vLLM validates every request with the ``validate_params`` of the custom logits processors; that is the one public
hook that runs before a request reaches the engine. The gate processes no logits, and our worker takes it out of
the list before the sampler is built, so it costs nothing per step.
"""

from __future__ import annotations

import copyreg
from abc import ABCMeta
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2LogitsProcessor

from layerkv.config import SloPolicy, slo_class_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams


class _GateMeta(ABCMeta):
    """The type of gates: each knows its policy, so a gate is pickled as the call that makes it."""

    policy: SloPolicy
    for_v2: bool


class _Gate:
    """What gates of both runners' interfaces have in common."""

    policy: ClassVar[SloPolicy]

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError (vLLM answers HTTP 400) if the request names an unknown SLO class."""
        slo_class_of(sampling_params.extra_args, cls.policy)


def slo_gate(policy: SloPolicy, *, for_v2: bool) -> _GateMeta:
    """A logits-processor class that checks requests against ``policy`` and does nothing else."""
    base = V2LogitsProcessor if for_v2 else V1LogitsProcessor
    return _GateMeta("SloGate", (_Gate, base), {"policy": policy, "for_v2": for_v2})


def without_gates(processors: list[Any] | None) -> list[Any] | None:
    """The processors that do process logits."""
    kept = [processor for processor in processors or () if not isinstance(processor, _GateMeta)]
    return kept or None


def add_gate(vllm_config: VllmConfig, policy: SloPolicy) -> None:
    """Have every request of this engine checked at the front."""
    gate = slo_gate(policy, for_v2=vllm_config.use_v2_model_runner)
    model_config = vllm_config.model_config
    model_config.logits_processors = [*(model_config.logits_processors or ()), gate]


def _rebuild(policy: SloPolicy, for_v2: bool) -> _GateMeta:  # noqa: FBT001 (pickle passes arguments by position)
    return slo_gate(policy, for_v2=for_v2)


copyreg.pickle(_GateMeta, lambda gate: (_rebuild, (gate.policy, gate.for_v2)))  # type: ignore[arg-type]
