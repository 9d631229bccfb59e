"""`layerkv place`, as a user runs it."""

import ast
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from layerkv.cli import main
from layerkv.units import parse_bytes

EXAMPLE = Path(__file__).parents[2] / "configs/fleet/example.yaml"


def fleet(**changes: Any) -> dict[str, Any]:
    model = {"weights": "8GiB", "kv_bytes_per_token": "128KiB", "token_rate": 100, "tpot": "50ms", "kv_floor": "1GiB"}
    document = {
        "version": 1,
        "devices": [{"count": 2, "memory": "20GiB", "utilization": 1.0}],
        "models": {"a": dict(model), "b": dict(model), "c": dict(model)},
    }
    for path, value in changes.items():
        part: Any = document
        *parents, last = path.split("__")
        for key in parents:
            part = part[int(key) if key.isdigit() else key]
        if value is None:
            del part[last]
        else:
            part[last] = value
    return document


def place(tmp_path: Path, document: dict[str, Any], *flags: str) -> int:
    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump(document))
    return main(["place", str(path), *flags])


def test_a_placement_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights and 2 GiB of activations each: with two there is no room for a third."""
    out = tmp_path / "placement.json"
    document = fleet(models__a__token_rate=900, models__c=None)
    assert place(tmp_path, document, "--json", str(out)) == 0
    assert "gpu1" in capsys.readouterr().out
    placement = json.loads(out.read_text())
    assert placement["devices"]["gpu0"]["models"] == ["a"]
    assert placement["devices"]["gpu0"]["shared_bytes"] == 10 << 30
    assert placement["devices"]["gpu0"]["kvpr"] == pytest.approx(900 * (128 << 10) / 0.05 / (10 << 30))
    assert placement["models"]["b"]["devices"] == ["gpu1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "of KV memory need 11GiB on each of 1 device; found 9GiB left on gpu0, which is 2GiB short"),
        (
            {"models__a__tensor_parallel": 3},
            "a: does not fit: its weights and its floor of KV memory need 5GiB on each of 3",
        ),
        ({"models__a__kv_flor": 1}, "$.models.a.kv_flor: found an unknown key; expected one of token_rate"),
        ({"node": 1}, "$.node: found an unknown key; expected one of version, devices, models"),
        ({"devices__0__size": 1}, "$.devices[0].size: found an unknown key"),
        ({"devices__0__memory": None}, "$.devices[0]: found neither preset nor memory; expected one of them"),
        ({"devices__0__preset": "H100"}, "$.devices[0]: found both preset and memory"),
        ({"devices": [{"preset": "H10"}]}, "$.devices[0].preset: found 'H10'; expected one of L20, A100, H100, H200"),
        ({"models__a__weights": None}, "$.models.a.weights: found nothing; expected weights where there is no preset"),
        ({"models__a__preset": "llama"}, "$.models.a.preset: found 'llama'; expected one of"),
        ({"models__a__kv_floor": None}, "$.models.a.kv_floor: found nothing; expected a size"),
        ({"models__a__kv_ceiling": "1MiB"}, "$.models.a.kv_ceiling: found '1MiB'; expected at least kv_floor, '1GiB'"),
        ({"models__a__tpot": "0s"}, "$.models.a.tpot: found '0s'; expected more than zero"),
        ({"devices": [{"memory": "9GiB"}, {"memory": "9GiB"}]}, "$.devices: found two devices named gpu"),
    ],
)
def test_what_is_wrong_with_a_fleet_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert place(tmp_path, fleet(**changes)) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_the_ray_application_is_python_that_names_each_models_broker(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "placement.json"
    assert main(["place", str(EXAMPLE), "--emit", "ray", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    placement = json.loads(out.read_text())
    configs = run_with_a_made_up_ray(text, monkeypatch)
    assert [c["model_loading_config"]["model_id"] for c in configs] == list(placement["models"])
    assert "broker-gpu0.sock --capacity" in (ast.get_docstring(ast.parse(text)) or "")
    for config in configs:
        model = placement["models"][config["model_loading_config"]["model_id"]]
        engine = config["engine_kwargs"]
        bundles = config["placement_group_config"]["bundles"]
        assert engine["kv_transfer_config"]["kv_connector"] == "LayerKVConnector"
        assert [device for bundle in bundles for device in bundle if device not in ("CPU", "GPU")] == model["devices"]
        assert len(bundles) == engine["tensor_parallel_size"]
        options = engine["kv_transfer_config"].get("kv_connector_extra_config")
        if not model["shares"]:
            assert options is None
            assert engine["kv_cache_memory_bytes"] * len(bundles) == model["kv_floor_bytes"]
            continue
        (device,) = model["devices"]
        assert options["broker"] == f"/run/me/layerkv/broker-{device}.sock"
        assert parse_bytes(options["kv_floor"]) == model["kv_floor_bytes"]
        shared = placement["devices"][device]["shared_bytes"]
        assert model["kv_floor_bytes"] <= parse_bytes(options["kv_ceiling"]) <= shared
        assert options["weight"] == (2.0 if config["model_loading_config"]["model_id"] == "rarely" else 1.0)
    for device in placement["devices"]:
        asked = [
            bundle["GPU"] for c in configs for bundle in c["placement_group_config"]["bundles"] if device in bundle
        ]
        assert sum(asked) <= 1


def run_with_a_made_up_ray(text: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Run the file where `ray.serve.llm` only takes down what it is given."""
    made_up = ModuleType("ray.serve.llm")
    made_up.LLMConfig = dict  # type: ignore[attr-defined]
    made_up.LLMServingArgs = dict  # type: ignore[attr-defined]
    made_up.build_openai_app = lambda arguments: arguments["llm_configs"]  # type: ignore[attr-defined]
    for name in ("ray", "ray.serve"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "ray.serve.llm", made_up)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/me")
    module: dict[str, Any] = {}
    exec(compile(text, "app.py", "exec"), module)
    app: list[dict[str, Any]] = module["app"]
    return app
