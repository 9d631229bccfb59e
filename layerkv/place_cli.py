"""`layerkv place`: which models of a fleet stand on which devices, and the commands that start them there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from layerkv.core.placement import Placement, place
from layerkv.errors import ConfigError
from layerkv.place_ray import ray_application
from layerkv.place_shell import shell_script
from layerkv.sim.fleet_config import Fleet, load_fleet
from layerkv.units import format_bytes

SCHEMA = 1


def run_place(
    fleet_path: Path, *, json_path: Path | None = None, emit: str | None = None, console: Console | None = None
) -> int:
    """Place a fleet, and print where everything stands, or with `emit` (`ray`, `shell`) a file that starts it so.

    Raises:
        ConfigError: the file is wrong, a model does not fit, or the output cannot be written.
    """
    console = console or Console()
    fleet = load_fleet(fleet_path)
    try:
        placement = place(fleet.devices, [tenant for model in fleet.models for tenant in model.tenants])
    except ConfigError as error:
        raise ConfigError(f"{fleet_path}: $.models: {error}") from None
    if json_path is not None:
        text = json.dumps(placement_report(fleet, placement), indent=1) + "\n"
        try:
            json_path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json: cannot write {json_path} ({error.strerror}); name another file") from None
    if emit is not None:
        print({"ray": ray_application, "shell": shell_script}[emit](fleet, placement), end="")
    else:
        console.print(_table(fleet, placement))
    return 0


def placement_report(fleet: Fleet, placement: Placement) -> dict[str, Any]:
    """The placement as JSON-ready data. ``shared_bytes`` is what a device's broker is given as its capacity."""
    return {
        "schema": SCHEMA,
        "devices": {
            device.name: {
                "usable_bytes": device.num_bytes,
                "shared_bytes": placement.shared_bytes[device.name],
                "kvpr": placement.pressure_ratio(device.name),
                "models": [tenant.name for tenant in placement.tenants_on[device.name]],
            }
            for device in fleet.devices
        },
        "models": {
            tenant.name: {
                "devices": list(placement.devices_of[tenant.name]),
                "weights_and_activations_bytes": tenant.weight_bytes,
                "kv_floor_bytes": tenant.floor_bytes,
                "pressure": tenant.pressure,
                "shares": tenant.shares,
            }
            for model in fleet.models
            for tenant in model.tenants
        },
    }


def _table(fleet: Fleet, placement: Placement) -> Table:
    table = Table(caption="KVPR: pressure over shared KV memory", box=SIMPLE, pad_edge=False, padding=(0, 1))
    for heading in ("device", "usable", "taken", "shared KV", "KVPR"):
        table.add_column(heading, justify="left" if heading == "device" else "right", no_wrap=True)
    table.add_column("models")
    for device in fleet.devices:
        members = placement.tenants_on[device.name]
        table.add_row(
            device.name,
            format_bytes(device.num_bytes),
            format_bytes(sum(tenant.own_bytes for tenant in members)),
            format_bytes(placement.shared_bytes[device.name]),
            f"{placement.pressure_ratio(device.name):.3g}",
            ", ".join(tenant.name for tenant in members) or "-",
        )
    return table
