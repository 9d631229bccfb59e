"""Where in ``--kv-transfer-config`` layerkv is asked for, and what is left of it without layerkv."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from layerkv.vllm_plugin.our_classes import CONNECTOR

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig

MULTI = "MultiConnector"
_CHILDREN = "connectors"
_EXTRA = "kv_connector_extra_config"
_OF_OFFLOADING = "cpu_bytes_to_use"


def extra_config_for_us(transfer: KVTransferConfig | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Our part of what a user asked for, also where another connector is to hold ours; None if nobody asked."""
    if transfer is None:
        return None
    raw: Mapping[str, Any] = transfer if isinstance(transfer, Mapping) else vars(transfer)
    extra_config: dict[str, Any] = raw.get(_EXTRA) or {}
    if raw.get("kv_connector") == CONNECTOR:
        return extra_config
    children = extra_config.get(_CHILDREN, ()) if raw.get("kv_connector") == MULTI else ()
    return next((found for child in children if (found := extra_config_for_us(child)) is not None), None)


def always_recompute(transfer: KVTransferConfig) -> str | None:
    """A request whose KV cannot be loaded is computed again; what was to become of it, if that was something else.

    vLLM's default is to fail it, and cannot be told from a wish.
    """
    found: str = transfer.kv_load_failure_policy
    transfer.kv_load_failure_policy = "recompute"
    return None if found == "recompute" else found


def without_us(transfer: KVTransferConfig | None) -> KVTransferConfig | None:
    """What vLLM would have been told without layerkv: other connectors, if there are any."""
    if transfer is None or transfer.kv_connector == CONNECTOR:
        return None
    extra_config = transfer.kv_connector_extra_config
    if transfer.kv_connector == MULTI:
        children = _others(extra_config.get(_CHILDREN, ()))
        return replace(transfer, kv_connector_extra_config={**extra_config, _CHILDREN: children}) if children else None
    # vLLM put the connector of --kv-offloading-size in our place, and its size among our keys.
    kept = {key: value for key, value in extra_config.items() if key == _OF_OFFLOADING}
    return replace(transfer, kv_connector_extra_config=kept)


def _others(children: Any) -> list[dict[str, Any]]:
    kept = []
    for child in children:
        if child.get("kv_connector") == MULTI:
            inner = _others((child.get(_EXTRA) or {}).get(_CHILDREN, ()))
            if inner:
                kept.append({**child, _EXTRA: {**child[_EXTRA], _CHILDREN: inner}})
        elif child.get("kv_connector") != CONNECTOR:
            kept.append(child)
    return kept
