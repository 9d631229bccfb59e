"""Refuses requests in the API server: HTTP 400 for an SLO class the policy does not have, 429 under overload.

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

from layerkv.config import SloPolicy, asks_for_smooth, slo_class_of
from layerkv.errors import ConfigError
from layerkv.vllm_plugin.overload import refuse_if_late
from layerkv.vllm_plugin.pace import tell_if_not_paced
from layerkv.vllm_plugin.reload import follow_policy

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams


class _GateMeta(ABCMeta):
    """The type of gates: each knows its policy, so a gate is pickled as the call that makes it."""

    policy: SloPolicy
    policy_path: str | None
    for_v2: bool


class _Gate:
    """What gates of both runners' interfaces have in common."""

    policy: ClassVar[SloPolicy]
    policy_path: ClassVar[str | None]

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError (vLLM answers HTTP 400) if what the request says of its SLO class or pace is wrong.

        Raises:
            OverloadedError: (HTTP 429) its class asks to be refused when late, and it would be.
        """
        policy = follow_policy(cls.policy_path, cls.policy).policy
        slo = slo_class_of(sampling_params.extra_args, policy)
        if asks_for_smooth(sampling_params.extra_args, slo):
            tell_if_not_paced(slo, sampling_params)
        refuse_if_late(slo, num_answers=sampling_params.n)


def slo_gate(policy: SloPolicy, policy_path: str | None, *, for_v2: bool) -> _GateMeta:
    """A logits-processor class that checks requests against the policy in force and does nothing else."""
    base = V2LogitsProcessor if for_v2 else V1LogitsProcessor
    return _GateMeta("SloGate", (_Gate, base), {"policy": policy, "policy_path": policy_path, "for_v2": for_v2})


class _Ungated(list[Any]):
    """The processors of an engine whose front end has a gate, which a worker in this process took out."""


def without_gates(processors: list[Any] | None) -> list[Any] | None:
    """The processors that do process logits."""
    if not _has_gate(processors):
        return processors
    return _Ungated(processor for processor in processors or () if not isinstance(processor, _GateMeta))


def _has_gate(processors: list[Any] | None) -> bool:
    return isinstance(processors, _Ungated) or any(isinstance(p, _GateMeta) for p in processors or ())


def require_gate(policy: SloPolicy, processors: list[Any] | None) -> None:
    """Refuse a policy that the front end was to keep, and does not know of.

    Raises:
        ConfigError: a class is to be refused under overload, and there is no gate.
    """
    rejecting = [slo.name for slo in policy.classes.values() if slo.overload == "reject"]
    if rejecting and not _has_gate(processors):
        raise ConfigError(
            f"overload: reject (class {', '.join(rejecting)}): found no gate in the front end, which refuses requests; "
            "let vLLM load the plugin layerkv (see VLLM_PLUGINS), or set overload to queue"
        )


def add_gate(vllm_config: VllmConfig, policy: SloPolicy, policy_path: str | None) -> None:
    """Have every request of this engine checked at the front."""
    gate = slo_gate(policy, policy_path, for_v2=vllm_config.use_v2_model_runner)
    model_config = vllm_config.model_config
    model_config.logits_processors = [*(model_config.logits_processors or ()), gate]


def _rebuild(policy: SloPolicy, policy_path: str | None, for_v2: bool) -> _GateMeta:  # noqa: FBT001 (pickle's)
    return slo_gate(policy, policy_path, for_v2=for_v2)


copyreg.pickle(_GateMeta, lambda gate: (_rebuild, (gate.policy, gate.policy_path, gate.for_v2)))  # type: ignore[arg-type]
