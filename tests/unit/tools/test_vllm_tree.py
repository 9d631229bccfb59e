"""A release of vLLM read as source: whatever a dotted path names is found where it is defined."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tools import vllm_tree
from tools.vllm_tree import VLLMTree

FILES = {
    "vllm/__init__.py": 'PLACES = {"LLM": ".entrypoints.llm:LLM"}\n\ndef __getattr__(name):\n    ...\n',
    "vllm/entrypoints/__init__.py": "",
    "vllm/entrypoints/llm.py": "class LLM:\n    def generate(self): ...\n",
    "vllm/config/__init__.py": "from vllm.config.vllm import VllmConfig\nfrom .cache import CacheConfig as Cache\n",
    "vllm/config/cache.py": "class CacheConfig:\n    block_size: int = 16\n",
    "vllm/config/vllm.py": "class VllmConfig:\n    cache_config: object\n",
    "vllm/base.py": "class Base:\n    def __init__(self):\n        self.held = 1\n\n    def run(self, n): ...\n",
    "vllm/derived.py": (
        "import sys\n"
        "if sys.platform:\n"
        "    from .base import Base\n"
        "else:\n"
        "    Base = object\n"
        "class Derived(Base):\n"
        '    """A docstring."""\n'
        "    def walk(self):\n"
        '        """Another."""\n'
        "        return 1  # so\n"
        "def function(): ...\n"
    ),
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture(params=["folder", "wheel"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> VLLMTree:
    folder = write(tmp_path, FILES)
    if request.param == "folder":
        return VLLMTree(folder)
    wheel = tmp_path / "vllm-0.99.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)
    return VLLMTree(wheel)


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("vllm.base.Base", "vllm.base"),
        ("vllm.base.Base.run", "vllm.base"),
        ("vllm.base.Base.held", "vllm.base"),
        ("vllm.derived.function", "vllm.derived"),
        ("vllm.derived.Derived.walk", "vllm.derived"),
        ("vllm.derived.Derived.run", "vllm.base"),
        ("vllm.derived.Derived.held", "vllm.base"),
        ("vllm.config.VllmConfig.cache_config", "vllm.config.vllm"),
        ("vllm.config.Cache.block_size", "vllm.config.cache"),
        ("vllm.LLM.generate", "vllm.entrypoints.llm"),
    ],
)
def test_what_a_path_names_is_found_at_its_home(tree: VLLMTree, path: str, module: str) -> None:
    found = tree.find(path)
    assert found is not None
    assert found.module.name == module


@pytest.mark.parametrize(
    "path", ["vllm.gone.Base", "vllm.base.Gone", "vllm.base.Base.gone", "vllm.derived.Derived.gone"]
)
def test_what_is_not_there_is_not_found(tree: VLLMTree, path: str) -> None:
    assert tree.find(path) is None


def test_comments_and_docstrings_are_no_source(tree: VLLMTree) -> None:
    found = tree.find("vllm.derived.Derived.walk")
    assert found is not None
    assert found.source == "def walk(self):\n    return 1"


def test_which_vllm_would_be_imported_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here, other = write(tmp_path / "here", FILES), tmp_path / "other"
    monkeypatch.setattr(VLLMTree, "installed", lambda: VLLMTree(here))
    for folder, status in ((here, 0), (other, 1)):
        monkeypatch.setattr("sys.argv", ["vllm_tree", str(folder)])
        assert vllm_tree.main() == status
    assert capsys.readouterr().err == f"the vLLM that would be imported is in {here}, not in {other}\n"
