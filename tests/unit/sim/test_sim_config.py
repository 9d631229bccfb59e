from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerkv.config import default_policy, load_policy
from layerkv.core.cost import generic_profile
from layerkv.errors import ConfigError
from layerkv.sim.config import POLICIES, load_sim_config
from layerkv.sim.presets import DEVICES, MODELS, derive_profile, kv_memory_bytes
from layerkv.sim.workload import (
    ClassMix,
    FixedLength,
    GammaArrivals,
    LognormalLength,
    PoissonArrivals,
    TraceArrivals,
    UniformArrivals,
    UniformLength,
    make_workload,
)

CONFIGS = Path(__file__).parents[3] / "configs"
SHIPPED = sorted((CONFIGS / "sim").glob("*.yaml"))
TRACE = "arrived_at,num_prefill_tokens,num_decode_tokens\n0,10,5\n1,900,6\n2,30,7\n3,oops,7\n4,50,9\n"
POLICY = {"version": 1, "default_class": "chat", "classes": {"chat": {"ttft": "2s", "tpot": 0.1}}}
ONE_CLASS = {"prompt_tokens": {"fixed": 100}, "output_tokens": {"fixed": 10}}
Write = Callable[..., Path]


def simulation(**changes: Any) -> dict[str, Any]:
    """Return a small good file; a change such as `engine__lanes=3` sets a nested key, None at the top removes one."""
    document: dict[str, Any] = {
        "version": 1,
        "engine": {"device": "L20", "model": "llama-2-7b"},
        "workload": {"requests": 10, "rates": [1.0, 2], "classes": [dict(ONE_CLASS)]},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        place = document
        for step in path:
            place = place[step]
        place[last] = value
        if value is ...:
            del place[last]
    return document


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a simulation into a folder of its own, beside a trace, a policy and profiles, and return its path."""
    (tmp_path / "sims").mkdir()
    (tmp_path / "trace.csv").write_text(TRACE)
    (tmp_path / "slo.yaml").write_text(yaml.safe_dump(POLICY))
    (tmp_path / "profile.json").write_text(generic_profile(1024).to_json())
    (tmp_path / "blind.json").write_text(generic_profile().to_json())
    monkeypatch.chdir(tmp_path)

    def write(**changes: Any) -> Path:
        path = Path("sims/sim.yaml")
        path.write_text(yaml.safe_dump(simulation(**changes)))
        return path

    return write


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_simulation_loads_and_has_requests_that_fit(path: Path) -> None:
    config = load_sim_config(path)
    kv_tokens = config.kv_memory_bytes // config.profile.kv_bytes_per_token
    # With a twentieth for the lane zone.
    assert config.max_model_len < kv_tokens * 0.9
    for rate in config.rates:
        requests = make_workload(config.workload, rate_per_s=rate, seed=config.seeds[0])
        assert len(requests) == config.workload.num_requests
        assert max(request.prompt_tokens + request.max_tokens for request in requests) <= config.max_model_len


def test_a_quickstart_the_cpu_loads_and_the_settings_of_the_paper_are_shipped() -> None:
    names = [
        "cpu_bursts.yaml",
        "cpu_long_prompts.yaml",
        "cpu_two_classes.yaml",
        "fluid_70b_4h100.yaml",
        "fluid_7b_l20.yaml",
        "fluid_8b_a100.yaml",
        "fluid_8b_h100.yaml",
        "fluid_oss_20b_l20.yaml",
        "fluid_v2_lite_l20.yaml",
        "hundred_thousand.yaml",
        "layerkv_paper.yaml",
        "layerkv_paper_34b.yaml",
        "layerkv_paper_70b.yaml",
        "long_tail_8b_h100.yaml",
        "quickstart.yaml",
    ]
    assert [path.name for path in SHIPPED] == names
    quickstart = load_sim_config(CONFIGS / "sim/quickstart.yaml")
    assert quickstart.policies[:2] == ("stock", "layerkv")
    assert set(quickstart.policies) == set(POLICIES)


def test_a_short_file_gets_the_defaults(write: Write) -> None:
    config = load_sim_config(write())
    device, model = DEVICES["L20"], MODELS["llama-2-7b"]
    assert config.profile == derive_profile(device, model, 1)
    assert config.num_layers == 32
    assert config.kv_memory_bytes == kv_memory_bytes(device, model, 1)
    assert config.host_memory_bytes == 4 * config.kv_memory_bytes
    assert (config.block_tokens, config.max_num_batched_tokens, config.max_num_seqs) == (16, 2048, 256)
    assert (config.max_model_len, config.lanes, config.zone_tokens) == (32768, 2, None)
    assert not config.async_scheduling
    assert config.policy == default_policy()
    assert (config.policies, config.seeds, config.rates) == (("stock", "layerkv"), (0,), (1.0, 2.0))
    assert config.workload.num_requests == 10
    assert config.workload.arrivals == PoissonArrivals()
    assert config.workload.classes == (ClassMix(None, 1.0, FixedLength(100), FixedLength(10)),)
    assert config.workload.max_model_len == 32768


def test_every_key_is_read(write: Write) -> None:
    engine = {
        "device": "A100",
        "model": "llama-3.1-70b",
        "tensor_parallel": 4,
        "kv_memory": "10GiB",
        "host_memory": "64GiB",
        "block_tokens": 32,
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 64,
        "max_model_len": 5000,
        "lanes": 1,
        "zone_tokens": 4096,
        "async_scheduling": True,
    }
    lognormal = {"lognormal": {"median": 100, "sigma": 0.5, "most": 400}}
    chat = {"slo_class": "chat", "share": 0.8, "prompt_tokens": {"uniform": [100, 300]}, "output_tokens": lognormal}
    path = write(
        engine=engine,
        policy="../slo.yaml",
        policies=["layerkv-streamed", "stock"],
        seeds=[1, 2],
        workload__arrivals={"gamma": {"cv": 2}},
        workload__classes=[chat],
        workload__max_tokens_factor=2,
    )
    config = load_sim_config(path)
    assert config.profile == derive_profile(DEVICES["A100"], MODELS["llama-3.1-70b"], 4)
    assert (config.num_layers, config.kv_memory_bytes, config.host_memory_bytes) == (80, 10 << 30, 64 << 30)
    assert (config.block_tokens, config.max_num_batched_tokens, config.max_num_seqs) == (32, 8192, 64)
    assert (config.max_model_len, config.lanes, config.zone_tokens, config.async_scheduling) == (5000, 1, 4096, True)
    assert config.policy == load_policy("slo.yaml")
    assert (config.policies, config.seeds) == (("layerkv-streamed", "stock"), (1, 2))
    assert config.workload.arrivals == GammaArrivals(2)
    assert config.workload.classes == (ClassMix("chat", 0.8, UniformLength(100, 300), LognormalLength(100, 0.5, 400)),)
    assert config.workload.max_tokens_factor == 2


def test_a_policy_may_stand_in_the_file_itself(write: Write) -> None:
    assert load_sim_config(write(policy=POLICY)).policy == load_policy("slo.yaml")


def test_a_measured_profile_takes_the_place_of_presets(write: Write) -> None:
    engine = {"profile": "../profile.json", "num_layers": 24, "kv_memory": "1GiB"}
    config = load_sim_config(write(engine=engine))
    assert config.profile == generic_profile(1024)
    assert (config.num_layers, config.kv_memory_bytes, config.host_memory_bytes) == (24, 1 << 30, 4 << 30)


def test_arrivals_may_be_uniform(write: Write) -> None:
    assert load_sim_config(write(workload__arrivals="uniform")).workload.arrivals == UniformArrivals()


def test_a_trace_needs_neither_rates_nor_requests_nor_classes(write: Write) -> None:
    trace = {"path": "../trace.csv", "time_scale": 2.0, "max_prompt_tokens": 500}
    config = load_sim_config(write(workload={"arrivals": {"trace": trace}}))
    assert config.rates == (3 / 8,)
    assert isinstance(config.workload.arrivals, TraceArrivals)
    read = config.workload.arrivals.trace
    assert (read.num_too_long, [row.line for row in read.broken]) == (1, [5])
    requests = make_workload(config.workload, rate_per_s=config.rates[0], seed=0)
    assert [request[1:4] for request in requests] == [(0, 10, 5), (4, 30, 7), (8, 50, 9)]


def test_a_trace_may_be_cut_and_run_at_rates_of_its_own(write: Write) -> None:
    workload = {"requests": 2, "rates": [5.0], "arrivals": {"trace": {"path": "../trace.csv", "limit": 3}}}
    config = load_sim_config(write(workload=workload))
    assert config.rates == (5.0,)
    assert [request.prompt_tokens for request in make_workload(config.workload, rate_per_s=5.0, seed=0)] == [10, 900]


def test_requests_of_a_trace_that_do_not_fit_the_model_are_left_out(write: Write) -> None:
    config = load_sim_config(
        write(engine__max_model_len=500, workload={"arrivals": {"trace": {"path": "../trace.csv"}}})
    )
    assert isinstance(config.workload.arrivals, TraceArrivals)
    assert config.workload.arrivals.trace.num_too_long == 1


PROFILE = {"profile": "../profile.json", "num_layers": 24, "kv_memory": "1GiB"}
LENGTHS = "workload.classes[0].prompt_tokens"


def with_lengths(prompt_tokens: Any) -> dict[str, Any]:
    return {"workload__classes": [{**ONE_CLASS, "prompt_tokens": prompt_tokens}]}


def with_trace(**keys: Any) -> dict[str, Any]:
    return {"workload": {"arrivals": {"trace": keys}}}


@pytest.mark.parametrize(
    ("changes", "where", "complaint"),
    [
        (
            {"vresion": 1},
            "vresion",
            "found an unknown key; expected one of version, engine, workload, policy, policies,",
        ),
        ({"version": 2}, "version", "found 2; expected the number 1; set version to 1"),
        ({"version": ...}, "version", "found nothing; expected the number 1"),
        ({"engine": ...}, "engine", "found nothing; expected a mapping that describes the engine"),
        ({"engine": "L20"}, "engine", "found 'L20'; expected a mapping"),
        ({"workload": ...}, "workload", "found nothing; expected a mapping that describes the requests"),
        ({"policy": 3}, "policy", "found 3; expected the path of an SLO policy file, or what stands in one"),
        ({"policies": []}, "policies", "found [] (list); expected a list of some of stock, stock-watermark, layerkv"),
        ({"policies": "stock"}, "policies", "found 'stock'; expected a list"),
        (
            {"policies": ["stock", "layerkw"]},
            "policies[1]",
            "expected one of stock, stock-watermark, layerkv, layerkv-no",
        ),
        ({"policies": ["stock", "stock"]}, "policies[1]", "found 'stock' a second time; expected it once; remove it"),
        ({"seeds": [-1]}, "seeds", "expected a list of at least one whole number, 0 or more; set seeds to [0]"),
        ({"seeds": [1, 1]}, "seeds[1]", "found 1 a second time"),
        ({"engine__devise": "L20"}, "engine.devise", "found an unknown key; expected one of device, model"),
        (
            {"engine__device": "L21"},
            "engine.device",
            "expected one of the device presets: L20, A100, H100, H200; did you",
        ),
        ({"engine__device": 20}, "engine.device", "found 20; expected one of L20, A100, H100, H200"),
        (
            {"engine__model": "gpt"},
            "engine.model",
            "expected one of the model presets: llama-2-7b, llama-3.1-8b, yi-34b",
        ),
        ({"engine__model": ...}, "engine.model", "found nothing; expected the model that runs on device"),
        (
            {"engine__model": "llama-3.1-70b"},
            "engine.model",
            "found 1 x L20 with 40.5GiB to use; expected room for 131.4",
        ),
        (
            {"engine__tensor_parallel": 0},
            "engine.tensor_parallel",
            "found 0; expected a whole number of GPUs, 1 or more",
        ),
        ({"engine__tensor_parallel": 3}, "engine.tensor_parallel", "found 3; expected a number that divides the heads"),
        ({"engine__num_layers": 32}, "engine.num_layers", "found 32; expected num_layers only beside profile"),
        (
            {"engine__profile": "p.json"},
            "engine",
            "found both device and profile; expected one of them; set device and",
        ),
        ({"engine": {}}, "engine", "found neither device nor profile; expected one of them"),
        ({"engine": {**PROFILE, "model": "yi-34b"}}, "engine.model", "expected model only beside device: a profile"),
        ({"engine": {**PROFILE, "tensor_parallel": 2}}, "engine.tensor_parallel", "only beside device"),
        (
            {"engine": {**PROFILE, "num_layers": None}},
            "engine.num_layers",
            "found nothing; expected the model's layers",
        ),
        (
            {"engine": {**PROFILE, "kv_memory": None}},
            "engine.kv_memory",
            "found nothing; expected the KV memory of all",
        ),
        ({"engine": {**PROFILE, "profile": "../blind.json"}}, "engine.profile", "a profile without kv_bytes_per_token"),
        ({"engine__kv_memory": "10"}, "engine.kv_memory", "found '10' without a unit; expected a number of bytes or a"),
        ({"engine__kv_memory": 0}, "engine.kv_memory", "found 0; expected more than zero; set kv_memory to 8GiB, say"),
        ({"engine__host_memory": "1s"}, "engine.host_memory", "set host_memory to 8GiB, say"),
        ({"engine__block_tokens": 0}, "engine.block_tokens", "found 0; expected a whole number of tokens, 1 or more"),
        (
            {"engine__max_num_batched_tokens": "2K"},
            "engine.max_num_batched_tokens",
            "found '2K'; expected a whole number",
        ),
        ({"engine__max_num_seqs": 1.5}, "engine.max_num_seqs", "found 1.5; expected a whole number of requests"),
        ({"engine__max_model_len": None}, "engine.max_model_len", "found None (NoneType); expected a whole number"),
        ({"engine__lanes": True}, "engine.lanes", "found True (bool); expected a whole number of lanes"),
        ({"engine__zone_tokens": 0}, "engine.zone_tokens", "found 0; expected a whole number of tokens, 1 or more"),
        ({"engine__async_scheduling": 1}, "engine.async_scheduling", "found 1; expected true or false"),
        ({"policy": {**POLICY, "default_class": "x"}}, "policy.default_class", "expected one of the classes: chat"),
        ({"policy": {"classes": {}}}, "policy.version", "found nothing; expected the number 1"),
        (
            {"workload__rate": 1},
            "workload.rate",
            "found an unknown key; expected one of requests, rates, arrivals, classes",
        ),
        (
            {"workload__requests": ...},
            "workload.requests",
            "found nothing; expected requests wherever there is no trace",
        ),
        ({"workload__requests": 0}, "workload.requests", "found 0; expected a whole number of requests, 1 or more"),
        (
            {"workload__rates": ...},
            "workload.rates",
            "found nothing; expected rates wherever there is no trace; set rates",
        ),
        (
            {"workload__rates": []},
            "workload.rates",
            "found [] (list); expected a list of at least one number above zero",
        ),
        (
            {"workload__rates": [1, 0]},
            "workload.rates",
            "found [1, 0] (list); expected a list of at least one number above",
        ),
        ({"workload__rates": [float("inf")]}, "workload.rates", "expected a list of at least one number above zero"),
        ({"workload__rates": [1, 1]}, "workload.rates[1]", "found 1.0 a second time"),
        (
            {"workload__max_tokens_factor": 0.5},
            "workload.max_tokens_factor",
            "found 0.5; expected a number of at least 1",
        ),
        (
            {"workload__arrivals": "posson"},
            "workload.arrivals",
            "found 'posson'; expected poisson, uniform, {gamma: ..} or",
        ),
        ({"workload__arrivals": "gamma"}, "workload.arrivals", "found 'gamma'; expected"),
        ({"workload__arrivals": 3}, "workload.arrivals", "found 3; expected poisson, uniform, {gamma: {cv: 2}} or"),
        ({"workload__arrivals": {}}, "workload.arrivals", "found 0 keys; expected exactly one of gamma, trace"),
        (
            {"workload__arrivals": {"gama": 1}},
            "workload.arrivals.gama",
            "found an unknown key; expected one of gamma, trace",
        ),
        (
            {"workload__arrivals": {"gamma": 2}},
            "workload.arrivals.gamma",
            "found 2; expected a mapping with the keys cv",
        ),
        (
            {"workload__arrivals": {"gamma": {"cv": 0}}},
            "workload.arrivals.gamma.cv",
            "expected a number from 0.01 to 100",
        ),
        (with_trace(), "workload.arrivals.trace.path", "found nothing; expected the path of a trace"),
        (
            with_trace(path="x", time_scale=0),
            "workload.arrivals.trace.time_scale",
            "found 0; expected a number above zero",
        ),
        (
            with_trace(path="x", limit=0),
            "workload.arrivals.trace.limit",
            "found 0; expected a whole number of requests",
        ),
        (with_trace(path="x", max_prompt_tokens=0), "workload.arrivals.trace.max_prompt_tokens", "found 0; expected a"),
        ({"workload__classes": ...}, "workload.classes", "found nothing; expected classes wherever there is no trace"),
        ({"workload__classes": []}, "workload.classes", "found [] (list); expected a list of at least one class"),
        (
            {"workload__classes": [3]},
            "workload.classes[0]",
            "found 3; expected a mapping with the keys slo_class, share",
        ),
        (
            {"workload__classes": [{}]},
            "workload.classes[0].prompt_tokens",
            "found nothing; expected prompt_tokens wherever",
        ),
        (
            {"workload__classes": [{**ONE_CLASS, "slo_class": "chat"}]},
            "workload.classes[0].slo_class",
            "classes: default",
        ),
        (
            {"workload__classes": [ONE_CLASS, {**ONE_CLASS, "share": 0}]},
            "workload.classes[1].share",
            "a number above zero",
        ),
        (with_lengths(100), LENGTHS, "found 100; expected {fixed: 100}, {uniform: [100, 300]} or {lognormal:"),
        (
            with_lengths({"fixed": 1, "uniform": [1, 2]}),
            LENGTHS,
            "found 2 keys; expected exactly one of fixed, uniform",
        ),
        (with_lengths({"unifrom": [1, 2]}), f"{LENGTHS}.unifrom", "did you mean uniform?"),
        (
            with_lengths({"fixed": 0}),
            f"{LENGTHS}.fixed",
            "found 0; expected a whole number of tokens, 1 or more; set fixed",
        ),
        (
            with_lengths({"uniform": [3, 2]}),
            f"{LENGTHS}.uniform",
            "expected [least, most] in whole tokens, 1 <= least <=",
        ),
        (with_lengths({"uniform": 3}), f"{LENGTHS}.uniform", "found 3; expected [least, most]"),
        (
            with_lengths({"lognormal": {"median": 9}}),
            f"{LENGTHS}.lognormal.sigma",
            "found nothing; expected a number above",
        ),
        (
            with_lengths({"lognormal": {"median": 9, "sigma": 1, "most": 5}}),
            f"{LENGTHS}.lognormal.most",
            "found 5; expected at least the median, 9; set most to 36, say",
        ),
        (
            {"engine__max_model_len": 50},
            "workload.classes[0]",
            "found requests of up to 110 tokens; expected at most max_model_len, 50; set shorter prompt_tokens",
        ),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_that_names_the_place(
    write: Write, changes: dict[str, Any], where: str, complaint: str
) -> None:
    path = write(**changes)
    with pytest.raises(ConfigError) as error:
        load_sim_config(path)
    message = str(error.value)
    assert message.startswith(f"{path}: $.{where}: found ")
    assert complaint in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"policy": "../none.yaml"}, "sims/../none.yaml: found no readable file"),
        ({"engine": {**PROFILE, "profile": "none.json"}}, "sims/none.json: found no readable file"),
        ({"engine": {**PROFILE, "profile": "../slo.yaml"}}, "sims/../slo.yaml: found what is not JSON"),
        (with_trace(path="none.csv"), "sims/none.csv: found no readable file"),
        (with_trace(path="../slo.yaml"), "sims/../slo.yaml: found 'classes:' in its first line"),
    ],
)
def test_a_wrong_file_beside_it_is_refused_by_its_own_name(write: Write, changes: dict[str, Any], start: str) -> None:
    path = write(**changes)
    with pytest.raises(ConfigError) as error:
        load_sim_config(path)
    assert str(error.value).startswith(start)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "sim.yaml: $: found None (NoneType); expected a mapping with the keys version, engine, workload"),
        ("version: [", "sim.yaml: line 1, column 11: while parsing a flow node, "),
        ("version: 1\nversion: 1", "sim.yaml: line 2, column 1: found the key 'version' twice"),
        ("version: 2024-99-99", "sim.yaml: found what is not YAML (month must be in 1..12)"),
        ("\0", "sim.yaml: found what is not YAML"),
    ],
)
def test_what_is_no_yaml_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, complaint: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sim.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_sim_config("sim.yaml")
    assert str(error.value).startswith(complaint)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: found no readable file \(No such file or directory\)"):
        load_sim_config("nowhere.yaml")
