"""From an engine's sizes and its flag to what makes its memory grow and shrink, and to whom it asks for that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from layerkv.vllm_plugin.elasticity import Elasticity
from layerkv.vllm_plugin.host_elasticity import HostElasticity
from layerkv.vllm_plugin.memory_share import BrokerShare, HostTerms, OwnShare, Share
from layerkv.vllm_plugin.scheduler_view import SchedulerView

if TYPE_CHECKING:
    from layerkv.scheduler.controller import Controller
    from layerkv.scheduler.desk import Desk
    from layerkv.vllm_plugin.block_managers import BlockManagers
    from layerkv.vllm_plugin.connector_scheduler import SchedulerSide


def elasticity_for(
    scheduler: SchedulerView, side: SchedulerSide, managers: BlockManagers, controller: Controller, desk: Desk
) -> Elasticity | None:
    """What makes this engine's memory grow and shrink; None where it does neither. Waits for a broker if there is one.

    Raises:
        BrokerError: the broker does not answer, or has not this engine's floors to give.
    """
    sizes, config = side.sizes, side.config
    if sizes is None:
        return None
    num_ranks = scheduler.vllm_config.parallel_config.tensor_parallel_size
    share: Share = OwnShare(sizes.plan.layout.num_segments)
    host: HostElasticity | None = None
    if config.broker is not None:
        host_sizes = side.host_sizes
        share = of_broker = BrokerShare(  # all ranks' memory is one machine's
            Path(config.broker),
            title=scheduler.vllm_config.model_config.served_model_name or scheduler.vllm_config.model_config.model,
            segment_bytes=sizes.segment_bytes * num_ranks,
            zone_bytes=sizes.zone_bytes * num_ranks,
            floor=sizes.floor,
            ceiling=sizes.plan.layout.num_segments,
            held=sizes.plan.num_mapped,
            token_bytes=max(sizes.geometry.block_bytes // sizes.geometry.block_tokens, 1) * num_ranks,
            weight=config.weight,
            host=None
            if host_sizes is None
            else HostTerms(
                segment_bytes=host_sizes.segment_bytes * num_ranks,
                floor=host_sizes.floor,
                ceiling=host_sizes.layout.num_segments,
            ),
        )
        if of_broker.host is not None:
            host = HostElasticity(scheduler, side, managers, controller, desk, of_broker.host, num_ranks=num_ranks)
    return Elasticity(
        scheduler,
        side,
        managers,
        controller,
        share,
        num_ranks=num_ranks,
        idle_after_s=config.idle_after_s,
        waits=config.give == "wait",
        host=host,
    )
