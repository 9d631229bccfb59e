"""`layerkv place`, as a user runs it."""

import ast
import json
import os
import subprocess
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
        ({"models__a__kv_floor": 4}, "$.models.a.kv_floor: found 4, which is 4B; expected a size such as 8GiB"),
        ({"devices__0__memory": 80}, "$.devices[0].memory: found 80, which is 80B; expected a size such as 8GiB"),
        (
            {"models__a__max_model_len": 8193},
            "$.models.a.kv_floor: found '1GiB'; expected at least 1GiB, which a request of max_model_len (8193) tokens",
        ),
        ({"models__a__max_model_len": 0}, "$.models.a.max_model_len: found 0; expected tokens of the longest request"),
        ({"models__a__tpot": 50}, "$.models.a.tpot: found 50; expected at most 10s for a token"),
        ({"models__a__tpot": "0s"}, "$.models.a.tpot: found '0s'; expected more than zero"),
        ({"devices": [{"memory": "9GiB"}, {"memory": "9GiB"}]}, "$.devices: found two devices named gpu"),
        ({"devices__0__kind": "tpu"}, "$.devices[0].kind: found 'tpu'; expected gpu or cpu"),
        (
            {"devices": [{"memory": "9GiB"}, {"name": "ram", "kind": "cpu", "memory": "9GiB"}]},
            "$.devices: found both kinds, gpu and cpu; expected one",
        ),
        (
            {"devices": [{"kind": "cpu", "preset": "H100"}]},
            "$.devices[0].preset: found a GPU, but kind is cpu; expected memory",
        ),
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
        name = config["model_loading_config"]["model_id"]
        assert engine.get("max_model_len") == {"chat-0": 16384, "chat-1": 16384, "documents": 32768}.get(name)
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
    assert "cannot start today" in text
    for device in placement["devices"]:
        asked = [
            bundle["GPU"] for c in configs for bundle in c["placement_group_config"]["bundles"] if device in bundle
        ]
        assert sum(asked) <= 1


def test_on_processors_the_ray_application_says_so_and_has_each_device_as_a_resource(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray's accelerator is what decides about vLLM's executor; the model over both devices has its workers together."""
    document = fleet(models__c__tensor_parallel=2, models__c__weights="1GiB", models__c__activations="1GiB")
    document["devices"] = [{"name": "ram", "kind": "cpu", "count": 2, "memory": "20GiB"}]
    assert place(tmp_path, document, "--emit", "ray") == 0
    text = capsys.readouterr().out
    a, b, c = run_with_a_made_up_ray(text, monkeypatch)
    said = ast.get_docstring(ast.parse(text)) or ""
    assert 'ray start --head --resources \'{"ram0": 1, "ram1": 1}\'' in said
    assert said.count("layerkv broker --socket $RUN/broker-ram") == 2
    assert "CUDA" not in text
    assert "GPU" not in text
    assert all(config["accelerator_config"] == {"kind": "cpu"} for config in (a, b, c))
    assert {len(config["placement_group_config"]["bundles"]) for config in (a, b)} == {1}
    assert [name for bundle in c["placement_group_config"]["bundles"] for name in bundle if name != "CPU"] == [
        "ram0",
        "ram1",
    ]
    assert c["placement_group_config"]["strategy"] == "STRICT_PACK"
    asked = sum(bundle["CPU"] for config in (a, b, c) for bundle in config["placement_group_config"]["bundles"])
    assert asked < 1, "as many engines as the memory holds, on however few processors"


def test_on_processors_the_shell_script_hides_no_gpus_and_knows_the_cpu_builds_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    document = fleet()
    document["devices"] = [{"name": "ram", "kind": "cpu", "count": 3, "memory": "20GiB"}]
    assert place(tmp_path, document, "--emit", "shell") == 0
    script = capsys.readouterr().out
    assert "CUDA" not in script
    assert "SERVE=${SERVE:-python -m vllm.entrypoints.openai.api_server --model}" in script
    assert script.count("\n$SERVE ") == 3


def test_the_shell_script_starts_brokers_then_servers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Run it with a broker that only makes its socket, and a server that only takes down its arguments."""
    out = tmp_path / "placement.json"
    assert main(["place", str(EXAMPLE), "--emit", "shell", "--json", str(out)]) == 0
    placement = json.loads(out.read_text())
    script = tmp_path / "fleet.sh"
    script.write_text(capsys.readouterr().out)
    take_down = f"#!{sys.executable}\nimport json, os, socket, sys\nwho = sys.argv[0].rsplit('/', 1)[1]\n"
    take_down += "if who == 'layerkv':\n    socket.socket(socket.AF_UNIX).bind(sys.argv[3])\n"
    take_down += "devices = os.environ.get('CUDA_VISIBLE_DEVICES')\n"
    take_down += f"with open({str(tmp_path / 'taken')!r}, 'a') as f:\n"
    take_down += "    f.write(json.dumps([who, devices, *sys.argv[1:]]) + '\\n')\n"
    for name in ("layerkv", "serve"):
        (tmp_path / name).write_text(take_down)
        (tmp_path / name).chmod(0o755)
    run = tmp_path / "a folder" / "layerkv"
    run.mkdir(parents=True)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SERVE": "serve"}
    environment["XDG_RUNTIME_DIR"] = str(run.parent)
    subprocess.run(["/bin/sh", str(script)], check=True, env=environment, timeout=60)
    taken = [json.loads(line) for line in (tmp_path / "taken").read_text().splitlines()]
    brokers = {line[4]: line[6] for line in taken if line[0] == "layerkv"}
    assert brokers == {
        str(run / f"broker-{name}.sock"): str(device["shared_bytes"]) for name, device in placement["devices"].items()
    }
    numbers = {name: str(number) for number, name in enumerate(placement["devices"])}
    servers = {line[line.index("--served-model-name") + 1]: line for line in taken if line[0] == "serve"}
    assert servers.keys() == placement["models"].keys()
    assert len({line[line.index("--port") + 1] for line in servers.values()}) == len(servers)
    for name, line in servers.items():
        model = placement["models"][name]
        assert line[1] == ",".join(numbers[device] for device in model["devices"])
        options = json.loads(line[line.index("--kv-transfer-config") + 1]).get("kv_connector_extra_config")
        if model["shares"]:
            assert options["broker"] in brokers
            assert parse_bytes(options["kv_floor"]) == model["kv_floor_bytes"]
        else:
            assert options is None
            ranks = int(line[line.index("--tensor-parallel-size") + 1])
            assert int(line[line.index("--kv-cache-memory-bytes") + 1]) * ranks == model["kv_floor_bytes"]
    documents = servers["documents"]
    assert documents[documents.index("--max-model-len") + 1] == "32768"


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
