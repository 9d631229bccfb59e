"""What `layerkv bench fidelity` finds wrong before it starts an engine."""

from pathlib import Path

import pytest

from layerkv.bench import fidelity
from layerkv.errors import ConfigError

CONFIG = Path(__file__).parents[3] / "configs" / "sim" / "cpu_two_classes.yaml"


def test_kv_memory_for_less_than_one_request_is_named_before_an_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(fidelity, "run_engine", start)
    lines = CONFIG.read_text().splitlines()
    changed = ["  kv_memory: 1MiB" if line.strip().startswith("kv_memory:") else line for line in lines]
    assert changed != lines
    path = tmp_path / "small.yaml"
    path.write_text("\n".join(changed).replace("../", f"{CONFIG.parents[1]}/"))
    with pytest.raises(ConfigError, match=r"\$\.engine\.kv_memory: found 1MiB; expected room for one request of max_"):
        fidelity.run_fidelity(path, None)
