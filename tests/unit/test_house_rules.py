import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import layerkv

ROOT = Path(__file__).parents[2]
LINT_IMPORTS = "from importlinter.cli import lint_imports_command; lint_imports_command()"
PURE = ("layerkv.core", "layerkv.scheduler", "layerkv.sim", "layerkv.broker")


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter over the package in `root`, whatever is installed."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", LINT_IMPORTS, "--no-cache"]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def test_every_module_imports_only_what_its_folder_may() -> None:
    run = lint_imports(ROOT)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        (
            "core/bad.py",
            "from layerkv.scheduler import policy",
            "A module imports only from rows below its own",
        ),
        (
            "units.py",
            "from layerkv.errors import ConfigError",
            "A module imports only from rows below its own",
        ),
        ("device/bad.py", "import layerkv.vllm_plugin", "A module imports only from rows below its own"),
        ("new_folder.py", "", "A module imports only from rows below its own"),
        ("device/bad.py", "import vllm", "Only the adapter and the commands import vLLM"),
        (
            "scheduler/bad.py",
            "def f():\n    import torch.cuda",
            "Bookkeeping and decisions never import torch",
        ),
        ("sim/__init__.py", "import torch", "Bookkeeping and decisions never import torch"),
        ("device/bad.py", "import triton.language", "Only kernels import Triton"),
    ],
)
def test_a_module_that_breaks_a_house_rule_is_caught(tmp_path: Path, module: str, line: str, contract: str) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "layerkv", tmp_path / "layerkv", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "layerkv" / module
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(f"\n{line}\n")
    run = lint_imports(tmp_path)
    assert run.returncode != 0
    assert f"{contract} BROKEN" in run.stdout, run.stdout + run.stderr


def test_bookkeeping_and_decisions_load_neither_torch_nor_vllm() -> None:
    names = [module.name for module in pkgutil.walk_packages(layerkv.__path__, "layerkv.", onerror=lambda _: None)]
    pure = [name for name in names if name.startswith(PURE)]
    assert {"layerkv.core", "layerkv.scheduler"} <= set(pure)
    light = ["layerkv", "layerkv.errors", "layerkv.units", "layerkv.config", "layerkv.metrics", "layerkv.cli"]
    program = (
        "import importlib, sys\n"
        f"for name in {light + pure!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'vllm', 'triton'} & set(sys.modules)\n"
        "    assert not heavy, (name, heavy)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
