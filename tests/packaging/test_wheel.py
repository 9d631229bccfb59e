"""The wheel works by itself: built, looked into, installed beside vLLM, run where no checkout is in reach."""

import configparser
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from layerkv import __version__

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.packaging


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    # Elsewhere than in the checkout: a build/ folder there would be taken for the module of that name.
    subprocess.run(command, cwd=out, check=True, stdout=subprocess.DEVNULL)
    [wheel] = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the `bin` folder of a fresh environment that holds the wheel, and vLLM."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    # Copying torch and vLLM would take minutes and a gigabyte, so the current ones are lent: a line in a
    # .pth file adds just that one folder, behind the environment's own. --system-site-packages would not do:
    # what it lends is the Python below .venv, which has no vLLM. And .pth files inside an added folder are
    # not read, so the checkout's editable install stays out of reach.
    Path(paths["purelib"], "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install"]
    subprocess.run([*pip, "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    return folder / "bin"


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command with no trace of the checkout in its environment."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "layerkv").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"layerkv/py.typed", "layerkv/__init__.py"} <= package
    assert any(name.startswith("layerkv/bench/templates/") for name in package)
    assert {name for name in names if ".dist-info/" not in name} == package
    assert f"layerkv-{__version__}.dist-info/licenses/LICENSE" in names


def test_the_wheel_says_what_it_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = Parser().parsestr(archive.read(f"layerkv-{__version__}.dist-info/METADATA").decode())
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra", [])) == {"cpu", "cuda", "bench", "test"}
    always = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    # The plugin works with the vLLM and torch that are there; it must never replace them.
    assert not [line for line in always if line.startswith(("vllm", "torch", "triton", "numpy"))]


def test_the_wheel_declares_the_command_and_the_plugin(wheel: Path) -> None:
    entry_points = configparser.ConfigParser()
    entry_points.read_string(zipfile.ZipFile(wheel).read(f"layerkv-{__version__}.dist-info/entry_points.txt").decode())
    assert dict(entry_points["console_scripts"]) == {"layerkv": "layerkv.cli:main"}
    assert dict(entry_points["vllm.general_plugins"]) == {"layerkv": "layerkv.vllm_plugin:register"}


def test_the_installed_command_answers(installed: Path, tmp_path: Path) -> None:
    version = run([str(installed / "layerkv"), "--version"], tmp_path)
    assert (version.returncode, version.stdout) == (0, f"layerkv {__version__}\n"), version.stderr


@pytest.mark.vllm
@pytest.mark.slow
def test_the_doctor_finds_nothing_wrong_with_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "slo.yaml").write_text("version: 1\ndefault_class: chat\nclasses: {chat: {ttft: 1s, tpot: 50ms}}\n")
    report = run([str(installed / "layerkv"), "doctor", "--policy", "slo.yaml"], tmp_path)
    assert report.returncode == 0, report.stdout + report.stderr
    assert "chat (default)" in report.stdout


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_finds_the_installed_plugin_exactly_once(installed: Path, tmp_path: Path) -> None:
    program = (
        "import json, layerkv\n"
        "from importlib.metadata import entry_points\n"
        "from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_plugins_by_group\n"
        "loaded = load_plugins_by_group(DEFAULT_PLUGINS_GROUP)['layerkv']\n"
        "found = entry_points(group=DEFAULT_PLUGINS_GROUP, name='layerkv')\n"
        "print(json.dumps([layerkv.__file__, len(found), loaded.__module__, loaded.__name__]))\n"
    )
    answer = run([str(installed / "python"), "-c", program], tmp_path)
    assert answer.returncode == 0, answer.stderr
    file, times_found, module, name = json.loads(answer.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(installed.parent)
    assert (times_found, module, name) == (1, "layerkv.vllm_plugin", "register")
