"""Turns ``--kv-transfer-config '{"kv_connector": "LayerKVConnector", ...}'`` into a running layerkv.

vLLM chooses worker and scheduler classes by other flags. So that one flag is enough, :func:`install` wraps the one
method that builds the engine's configuration. This is the only patch in the project; without the connector's name
the wrapper returns vLLM's configuration untouched.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.usage.usage_lib import UsageContext

from layerkv.config import EngineConfig
from layerkv.errors import LayerKVError
from layerkv.vllm_plugin.our_classes import (
    CONNECTOR,
    OUR_ASYNC_SCHEDULER,
    OUR_SCHEDULER,
    OUR_WORKERS,
    VLLM_WORKERS,
    is_our_scheduler,
)
from layerkv.vllm_plugin.support import require_heard, require_supported
from layerkv.vllm_plugin.transfer import always_recompute, extra_config_for_us, without_us

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(f"vllm.{__name__}")  # under vLLM's name, so that vLLM's log configuration applies


@functools.cache  # vLLM loads a plugin more than once, and knows a name once
def register_connector() -> None:
    """Make the connector's name known. Re-entrant."""
    with suppress(ValueError):  # it is known already: a plugin of somebody's own has made it so
        KVConnectorFactory.register_connector(CONNECTOR, "layerkv.vllm_plugin.connector", CONNECTOR)


def install() -> None:
    """Wrap ``EngineArgs.create_engine_config``. Re-entrant."""
    original = EngineArgs.create_engine_config
    if getattr(original, "wrapped_by_layerkv", False):
        return

    @functools.wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        extra_config = extra_config_for_us(self.kv_transfer_config)  # now: vLLM may put another connector there
        vllm_config = original(self, *args, **kwargs)
        if extra_config is not None:
            is_offline = UsageContext.LLM_CLASS in (*args, *kwargs.values())
            _activate(vllm_config, extra_config, has_metrics=not self.disable_log_stats, is_offline=is_offline)
        return vllm_config

    create_engine_config.wrapped_by_layerkv = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config  # type: ignore[method-assign]


def _activate(vllm_config: VllmConfig, extra_config: Mapping[str, Any], *, has_metrics: bool, is_offline: bool) -> None:
    """Select our worker and scheduler, or pass through if the configuration cannot be served and may be.

    Raises:
        LayerKVError: the configuration is wrong, or cannot be served.
    """
    from layerkv.vllm_plugin.compat import require_compatible

    config = EngineConfig.from_extra_config(extra_config)
    policy = config.read_policy()
    try:
        untested = require_compatible(allow_untested=config.allow_untested_vllm)
    except LayerKVError as error:
        _pass_through_or_raise(vllm_config, config, error)
        return

    # not before: what these import of vLLM may be what another release lacks
    from layerkv.vllm_plugin.host_memory import require_host_memory
    from layerkv.vllm_plugin.reload import follow_policy
    from layerkv.vllm_plugin.setup import require_usable
    from layerkv.vllm_plugin.slo_gate import add_gate

    require_host_memory(vllm_config, config)
    require_usable(vllm_config, config)
    try:
        require_supported(vllm_config)
        if not is_offline:  # where all prompts are there at once, nobody is refused anyway
            require_heard(policy, has_metrics=has_metrics)
    except LayerKVError as error:
        _pass_through_or_raise(vllm_config, config, error)
        return
    if untested is not None:
        logger.warning("%s", untested)
    transfer = vllm_config.kv_transfer_config
    assert transfer is not None
    vllm_config.parallel_config.worker_cls = OUR_WORKERS[vllm_config.device_config.device_type]
    scheduler_config = vllm_config.scheduler_config
    if scheduler_config.scheduler_cls in (None, OUR_SCHEDULER, OUR_ASYNC_SCHEDULER):  # else one derived from ours
        use_async = scheduler_config.async_scheduling
        scheduler_config.scheduler_cls = OUR_ASYNC_SCHEDULER if use_async else OUR_SCHEDULER
    if (found := always_recompute(transfer)) is not None:
        logger.info(
            'kv_load_failure_policy: found "%s", but with layerkv it is always "recompute": a request whose KV cannot '
            "be loaded from host memory is computed again and does not fail",
            found,
        )
    add_gate(vllm_config, policy, config.policy_path)
    source = follow_policy(config.policy_path, policy)
    source.put(policy)  # the file as it is now
    source.require = functools.partial(require_heard, has_metrics=has_metrics)


def _pass_through_or_raise(vllm_config: VllmConfig, config: EngineConfig, error: LayerKVError) -> None:
    if config.on_unsupported == "error":
        raise error
    logger.warning("layerkv is off, vLLM runs as without it: %s", error)
    _pass_through(vllm_config)


def _pass_through(vllm_config: VllmConfig) -> None:
    """Make the configuration what it would be without layerkv."""
    vllm_config.kv_transfer_config = without_us(vllm_config.kv_transfer_config)
    if vllm_config.parallel_config.worker_cls in OUR_WORKERS.values():  # given by explicit flags
        vllm_config.parallel_config.worker_cls = VLLM_WORKERS[vllm_config.device_config.device_type]
    if is_our_scheduler(vllm_config.scheduler_config.scheduler_cls):
        vllm_config.scheduler_config.scheduler_cls = None
