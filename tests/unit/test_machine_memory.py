"""What this process may use: the machine's memory, and the limit of every control group above the process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from layerkv.machine_memory import MemoryLimit, held_bytes, memory_limit

GIB = 1 << 30
V2_MOUNT = "31 23 0:28 {root} /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
V1_UNLIMITED = "9223372036854771712\n"


def fake(
    folder: Path, *, cgroup: str, mounts: tuple[str, ...], limits: dict[str, str], machine_bytes: int = 64 * GIB
) -> Path:
    """A root folder with what the kernel says there; `limits` are files under `/sys/fs/cgroup`."""
    process = folder / "proc" / "self"
    process.mkdir(parents=True)
    (folder / "proc" / "meminfo").write_text(f"MemTotal:       {machine_bytes // 1024} kB\nMemFree: 12 kB\n")
    (process / "cgroup").write_text(cgroup)
    (process / "mountinfo").write_text("\n".join(("22 1 0:20 / /proc rw - proc proc rw", *mounts)) + "\n")
    for name, text in limits.items():
        file = folder / "sys" / "fs" / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def v2(folder: Path, group: str, limits: dict[str, str], *, root: str = "/") -> Path:
    return fake(folder, cgroup=f"0::{group}\n", mounts=(V2_MOUNT.format(root=root),), limits=limits)


def v1(folder: Path, group: str, limits: dict[str, str], *, root: str = "/") -> Path:
    cgroup = f"5:devices:/\n4:cpuacct,memory:{group}\n0::/\n"
    return fake(folder, cgroup=cgroup, mounts=(V1_MOUNT.format(root=root),), limits=limits)


def test_without_control_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    root = fake(tmp_path, cgroup="", mounts=(), limits={})
    assert memory_limit(root) == MemoryLimit(64 * GIB, "this machine")


def test_where_control_groups_cannot_be_read_the_machine_is_the_limit(tmp_path: Path) -> None:
    root = fake(tmp_path, cgroup="", mounts=(), limits={})
    (root / "proc" / "self" / "cgroup").unlink()
    assert memory_limit(root).owner == "this machine"


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"a/b/memory.max": f"{3 * GIB}\n"}, MemoryLimit(3 * GIB, "control group /a/b (memory.max)")),
        (
            {"a/b/memory.max": "max\n", "a/memory.max": f"{5 * GIB}\n"},
            MemoryLimit(5 * GIB, "control group /a (memory.max)"),
        ),
        (
            {"a/b/memory.max": f"{6 * GIB}\n", "a/memory.max": f"{5 * GIB}\n"},
            MemoryLimit(5 * GIB, "control group /a (memory.max)"),
        ),
        (
            {"a/b/memory.max": f"{6 * GIB}\n", "a/b/memory.high": f"{4 * GIB}\n"},
            MemoryLimit(4 * GIB, "control group /a/b (memory.high)"),
        ),
        ({"memory.max": f"{2 * GIB}\n"}, MemoryLimit(2 * GIB, "control group / (memory.max)")),
        ({"a/b/memory.max": f"{99 * GIB}\n"}, MemoryLimit(64 * GIB, "this machine")),
        ({"a/b/c/memory.max": f"{GIB}\n", "b/memory.max": f"{GIB}\n"}, MemoryLimit(64 * GIB, "this machine")),
    ],
)
def test_the_smallest_limit_from_the_process_upwards_holds(
    tmp_path: Path, limits: dict[str, str], expected: MemoryLimit
) -> None:
    assert memory_limit(v2(tmp_path, "/a/b", limits)) == expected


def test_version_1_limits_are_read_upwards_too(tmp_path: Path) -> None:
    limits = {
        "memory/pods/one/memory.limit_in_bytes": V1_UNLIMITED,
        "memory/pods/memory.limit_in_bytes": f"{7 * GIB}\n",
        "memory/memory.limit_in_bytes": V1_UNLIMITED,
    }
    assert memory_limit(v1(tmp_path, "/pods/one", limits)) == MemoryLimit(
        7 * GIB, "control group /pods (memory.limit_in_bytes)"
    )


def test_a_hybrid_machine_counts_both_hierarchies(tmp_path: Path) -> None:
    unified = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    root = fake(
        tmp_path,
        cgroup="4:memory:/x\n0::/y\n",
        mounts=(V1_MOUNT.format(root="/"), unified),
        limits={"memory/x/memory.limit_in_bytes": f"{9 * GIB}\n", "unified/y/memory.max": f"{8 * GIB}\n"},
    )
    assert memory_limit(root) == MemoryLimit(8 * GIB, "control group /y (memory.max)")


def test_inside_a_container_the_group_is_found_below_what_is_mounted(tmp_path: Path) -> None:
    limits = {"memory.max": f"{3 * GIB}\n", "inner/memory.max": "max\n", "docker/id/inner/memory.max": "1\n"}
    root = v2(tmp_path, "/docker/id/inner", limits, root="/docker/id")
    assert memory_limit(root) == MemoryLimit(3 * GIB, "control group / (memory.max)")


def test_a_group_outside_of_what_is_mounted_leaves_the_top_of_that(tmp_path: Path) -> None:
    root = v2(tmp_path, "/../other", {"memory.max": f"{3 * GIB}\n"})
    assert memory_limit(root).size_bytes == 3 * GIB


def test_a_mount_point_may_have_a_blank_in_its_name(tmp_path: Path) -> None:
    mount = r"31 23 0:28 / /sys/fs/c\040g rw - cgroup2 cgroup2 rw"
    root = fake(tmp_path, cgroup="0::/a\n", mounts=(mount,), limits={"../c g/a/memory.max": f"{GIB}\n"})
    assert memory_limit(root).size_bytes == GIB


def test_what_a_process_holds_is_what_no_file_gives_back(tmp_path: Path) -> None:
    root = fake(tmp_path, cgroup="", mounts=(), limits={})
    status = "VmRSS:\t 900 kB\nRssAnon:\t     500 kB\nRssFile:\t 300 kB\nRssShmem:\t     100 kB\n"
    (root / "proc" / "self" / "status").write_text(status)
    assert held_bytes(root) == 600 * 1024


def test_this_process_has_a_limit_and_grows() -> None:
    machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < memory_limit().size_bytes <= machine_bytes
    before = held_bytes()
    block = bytearray(b"x") * (64 << 20)
    assert held_bytes() - before > len(block) // 2
