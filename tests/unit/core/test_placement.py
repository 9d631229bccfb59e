from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerkv.core.placement import Device, Placement, Tenant, place
from layerkv.errors import ConfigError


def devices(*sizes: int) -> list[Device]:
    return [Device(f"gpu{i}", size) for i, size in enumerate(sizes)]


def test_the_model_of_highest_pressure_goes_where_the_ratio_is_lowest() -> None:
    found = place(devices(100, 100), [Tenant("a", 40, 5, 9.0), Tenant("b", 40, 5, 5.0), Tenant("c", 20, 5, 3.0)])
    assert found.devices_of == {"a": ("gpu0",), "b": ("gpu1",), "c": ("gpu1",)}
    assert found.shared_bytes == {"gpu0": 60, "gpu1": 40}
    assert found.pressure_ratio("gpu1") == (5 + 3) / 40


def test_a_larger_device_takes_more_of_it() -> None:
    found = place(devices(50, 200), [Tenant(name, 10, 5, 1.0) for name in "abcde"])
    assert len(found.tenants_on["gpu1"]) == 4, "with one its ratio is 1 / 40, that of the other with five 5 / 150"
    assert found.devices_of["d"] == ("gpu0",), "as good as 4 / 160, and it comes first"


def test_shards_of_a_model_and_its_replicas_stand_apart() -> None:
    found = place(devices(50, 50, 50), [Tenant("big", 60, 20, 1.0, ranks=2), Tenant("a", 5, 1, 9.0)])
    assert found.devices_of == {"a": ("gpu0",), "big": ("gpu1", "gpu2")}
    twins = [Tenant(f"a-{i}", 5, 1, 1.0, model="a") for i in range(3)]
    assert sorted(place(devices(50, 50, 50), twins).devices_of.values()) == [("gpu0",), ("gpu1",), ("gpu2",)]
    with pytest.raises(ConfigError, match=r"^a-2: does not fit: .* and there are 0 without another replica of a"):
        place(devices(50, 50), twins)


def test_what_does_not_share_counts_its_whole_floor_and_presses_on_nobody() -> None:
    found = place(devices(100), [Tenant("own", 20, 30, 9.0, shares=False), Tenant("a", 10, 5, 2.0)])
    assert found.shared_bytes == {"gpu0": 40}
    assert found.pressure_ratio("gpu0") == 2.0 / 40


def test_a_large_model_of_little_pressure_is_not_left_out_for_small_ones() -> None:
    small = [Tenant("a", 30, 5, 9.0), Tenant("b", 30, 5, 8.0)]
    found = place(devices(100, 100), [*small, Tenant("large", 90, 5, 0.1)])
    assert found.devices_of["large"] not in (found.devices_of["a"], found.devices_of["b"])


@pytest.mark.parametrize(
    ("tenants", "message"),
    [
        (
            [Tenant("a", 120, 8, 1.0)],
            "a: does not fit: .* need 128B on each of 1 device; found 100B left on gpu0, .* 28B short",
        ),
        ([Tenant("a", 30, 8, 1.0, ranks=3)], "a: does not fit: .* on each of 3 devices, and there are 2; add devices"),
        ([Tenant(n, 60, 8, 1.0) for n in "abc"], "c: does not fit: .* found 32B left on gpu0, which is 36B short"),
    ],
)
def test_what_does_not_fit_is_named_with_what_is_missing(tenants: list[Tenant], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place(devices(100, 100), tenants)


TENANTS = st.lists(
    st.builds(
        Tenant,
        name=st.uuids().map(str),
        weight_bytes=st.integers(0, 60),
        floor_bytes=st.integers(0, 30),
        pressure=st.floats(0, 1e6),
        ranks=st.integers(1, 3),
        model=st.sampled_from(["", "", "x", "y"]),
        shares=st.booleans(),
    ),
    max_size=12,
    unique_by=lambda tenant: tenant.name,
)


@given(st.lists(st.integers(1, 120), min_size=1, max_size=5), TENANTS)
def test_no_device_is_overfilled_and_nobody_stands_beside_its_like(sizes: list[int], tenants: list[Tenant]) -> None:
    try:
        found = place(devices(*sizes), tenants)
    except ConfigError:
        return
    _check(found, devices(*sizes), tenants)


def _check(found: Placement, all_devices: Sequence[Device], tenants: Sequence[Tenant]) -> None:
    assert {name: len(on) for name, on in found.devices_of.items()} == {t.name: t.ranks for t in tenants}
    for device in all_devices:
        members = found.tenants_on[device.name]
        assert sum(t.needed_bytes for t in members) <= device.num_bytes
        assert sum(t.rank_floor_bytes for t in members if t.shares) <= found.shared_bytes[device.name]
        models = [t.model or t.name for t in members]
        assert len(models) == len(set(models))
        assert all(device.name in found.devices_of[t.name] for t in members)
