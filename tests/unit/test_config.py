import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerkv.config import (
    EngineConfig,
    PolicyName,
    SloClass,
    SloPolicy,
    asks_for_smooth,
    default_policy,
    experimental_keys,
    load_policy,
    slo_class_of,
)
from layerkv.errors import ConfigError

SHIPPED_POLICIES = sorted((Path(__file__).parents[2] / "configs/slo").glob("*.yaml"))
WriteFile = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteFile:
    """Write a policy file and return its path, relative as users write it."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        Path("slo.yaml").write_text(text)
        return Path("slo.yaml")

    return write


def one_class(promises: str) -> str:
    return f"version: 1\ndefault_class: chat\nclasses:\n  chat: {promises}\n"


def two_classes() -> SloPolicy:
    chat = SloClass(name="chat", ttft_s=0.5, tpot_s=0.05, weight=4.0)
    batch = SloClass(name="batch", ttft_s=30.0, tpot_s=0.2)
    return SloPolicy(classes={"chat": chat, "batch": batch}, default_class="chat")


def test_the_policy_of_the_readme_is_read_in_seconds(write: WriteFile) -> None:
    path = write(
        "version: 1\n"
        "default_class: chat\n"
        "classes:\n"
        "  chat:  {ttft: 500ms, tpot: 50ms, weight: 4}\n"
        "  batch: {ttft: 30s, tpot: 0.2}\n"
    )
    assert load_policy(path) == two_classes()


def test_streamed_decode_is_off_unless_it_is_set(write: WriteFile) -> None:
    text = one_class("{ttft: 1s, tpot: 1s}")
    assert not load_policy(write(text)).streamed_decode
    assert load_policy(write(text + "streamed_decode: true\n")).streamed_decode


def test_what_is_compared_with_stands_under_one_key(write: WriteFile) -> None:
    text = one_class("{ttft: 1s, tpot: 1s}")
    stands = load_policy(write(text))
    assert (stands.policy, stands.length_prediction, stands.slo_scheduling) == ("fluid", "quantile", True)
    compared = load_policy(write(text + "compare: {policy: arrival, length_prediction: none}\n"))
    assert (compared.policy, compared.length_prediction, compared.slo_scheduling) == ("arrival", "none", False)
    assert load_policy(write(text + "compare: {length_prediction: none}\n")).policy == "fluid"


def test_every_policy_to_compare_with_is_named_in_the_refusal_of_an_unknown_one(write: WriteFile) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_policy(write(one_class("{ttft: 1s, tpot: 1s}") + "compare: {policy: fifo}\n"))
    names = get_args(PolicyName)
    assert len(names) > 1
    assert f"expected {', '.join(names[:-1])} or {names[-1]}; " in str(refusal.value)


def test_streams_are_smooth_where_the_class_says_so_unless_the_request_says_otherwise(write: WriteFile) -> None:
    plain = load_policy(write(one_class("{ttft: 1s, tpot: 1s}"))).classes["chat"]
    smooth = load_policy(write(one_class("{ttft: 1s, tpot: 1s, smooth: true}"))).classes["chat"]
    for extra_args in (None, {}, {"slo_class": "chat"}, {"smooth": None}):
        assert not asks_for_smooth(extra_args, plain)
        assert asks_for_smooth(extra_args, smooth)
    for yes, no in ((True, False), (1, 0), (1.0, 0.0)):
        assert asks_for_smooth({"smooth": yes}, plain)
        assert not asks_for_smooth({"smooth": no}, smooth)


@pytest.mark.parametrize(
    ("asked", "found"), [("yes", "'yes'"), (2, "2"), ([True], "[True] (list)"), ("", "''"), ({}, "{} (dict)")]
)
def test_a_request_that_asks_for_a_smooth_stream_in_other_words_is_told_how(asked: object, found: str) -> None:
    slo = SloClass(name="chat", ttft_s=1.0, tpot_s=1.0)
    with pytest.raises(ConfigError) as error:
        asks_for_smooth({"smooth": asked}, slo)
    assert str(error.value) == f"smooth: found {found}; expected true or false; leave it out for what class chat says"


@pytest.mark.parametrize("path", SHIPPED_POLICIES, ids=lambda path: path.name)
def test_every_shipped_policy_loads(path: Path) -> None:
    assert load_policy(path).classes


def test_three_policies_are_shipped() -> None:
    assert [path.name for path in SHIPPED_POLICIES] == ["chat-and-batch.yaml", "demo.yaml", "overload.yaml"]


def test_a_class_says_how_much_its_readers_may_wait_or_that_nobody_reads(write: WriteFile) -> None:
    def read(promises: str) -> SloClass:
        return load_policy(write(one_class(promises))).classes["chat"]

    assert read("{ttft: 1s, tpot: 50ms}").max_lag_s == 1.0
    assert read("{ttft: 1s, tpot: 50ms, max_lag: 0}").max_lag_s == 0.0
    assert read("{ttft: 1s, tpot: 50ms, max_lag: 250ms}").max_lag_s == 0.25
    assert read("{ttft: 1s, tpot: 50ms}").has_reader
    for nobody in (read("{ttft: 1s}"), read("{ttft: 1s, tpot: 50ms, stream: false}")):
        assert not nobody.has_reader
        assert nobody.pace_s == math.inf


@pytest.mark.parametrize(
    ("text", "where", "complaint"),
    [
        pytest.param(
            one_class("{tfft: 1s, tpot: 1s}"),
            "$.classes.chat.tfft",
            "found an unknown key; expected one of ttft, tpot, weight, max_stall, max_lag, stream, overload, smooth; "
            "did you mean ttft?",
            id="mistyped key",
        ),
        pytest.param("vresion: 1", "$.vresion", "did you mean version?", id="mistyped key at the top"),
        pytest.param(one_class("{1: 2}"), "$.classes.chat[1]", "found an unknown key", id="key that is no text"),
        pytest.param(
            one_class("{ttft: 5 parsec, tpot: 1s}"),
            "$.classes.chat.ttft",
            "found '5 parsec' with the unknown unit 'parsec'; expected a number of seconds or a duration",
            id="wrong unit",
        ),
        pytest.param(
            one_class("{ttft: 8GiB, tpot: 1s}"),
            "$.classes.chat.ttft",
            "set ttft to 500ms",
            id="unit of a size",
        ),
        pytest.param(one_class("{ttft: '500', tpot: 1s}"), "$.classes.chat.ttft", "without a unit", id="no unit"),
        pytest.param(one_class("{ttft: 1s, tpot: -1s}"), "$.classes.chat.tpot", "negative", id="negative"),
        pytest.param(one_class("{ttft: -1, tpot: 1s}"), "$.classes.chat.ttft", "negative", id="negative number"),
        pytest.param(one_class("{ttft: 0, tpot: 1s}"), "$.classes.chat.ttft", "expected more than zero", id="zero"),
        pytest.param(
            one_class("{ttft: 1s, tpot: 0ms}"),
            "$.classes.chat.tpot",
            "set tpot to 50ms",
            id="zero with a unit",
        ),
        pytest.param(
            one_class("{ttft: yes, tpot: 1s}"),
            "$.classes.chat.ttft",
            "found True (bool); expected a duration above zero",
            id="bool as duration",
        ),
        pytest.param(one_class("{ttft: .nan, tpot: 1s}"), "$.classes.chat.ttft", "not finite", id="nan"),
        pytest.param(one_class("{ttft: , tpot: 1s}"), "$.classes.chat.ttft", "found None", id="key without a value"),
        pytest.param(
            one_class("{tpot: 1s}"),
            "$.classes.chat.ttft",
            "found nothing; expected a duration",
            id="missing key",
        ),
        pytest.param(
            one_class("{ttft: 1s, tpot: 1s, max_lag: -1}"), "$.classes.chat.max_lag", "negative", id="negative lag"
        ),
        pytest.param(
            one_class("{ttft: 1s, tpot: 1s, weight: 0}"),
            "$.classes.chat.weight",
            "found 0; expected a finite number above zero; set weight to 1",
            id="weight of zero",
        ),
        pytest.param(
            one_class("{ttft: 1s, tpot: 1s, weight: -2}"),
            "$.classes.chat.weight",
            "found -2",
            id="negative weight",
        ),
        pytest.param(
            one_class("{ttft: 1s, tpot: 1s, weight: .inf}"),
            "$.classes.chat.weight",
            "found inf",
            id="endless weight",
        ),
        pytest.param(
            one_class("{ttft: 1s, tpot: 1s, weight: .nan}"),
            "$.classes.chat.weight",
            "found nan",
            id="nan weight",
        ),
        pytest.param(
            one_class("{ttft: 1s, tpot: 1s, weight: true}"),
            "$.classes.chat.weight",
            "found True (bool)",
            id="bool as weight",
        ),
        pytest.param(
            one_class("{ttft: 1s, tpot: 1s, weight: '4'}"),
            "$.classes.chat.weight",
            "found '4'",
            id="text as weight",
        ),
        pytest.param(one_class("fast"), "$.classes.chat", "expected a mapping with the keys ttft", id="no mapping"),
        pytest.param(
            "version: 1\ndefault_class: a b\nclasses: {a b: {ttft: 1s, tpot: x}}",
            "$.classes['a b'].tpot",
            "found 'x'",
            id="class name with a blank",
        ),
        pytest.param(
            "version: 1\ndefault_class: chta\nclasses: {chat: {ttft: 1s, tpot: 1s}}",
            "$.default_class",
            "found 'chta'; expected one of the classes: chat; did you mean chat?",
            id="default class that is none of them",
        ),
        pytest.param("version: 1\ndefault_class: a\nclasses: {}", "$.classes", "at least one class", id="no classes"),
        pytest.param("version: 1\ndefault_class: a", "$.classes", "found nothing", id="classes missing"),
        pytest.param("version: 1\ndefault_class: a\nclasses: [a]", "$.classes", "found ['a'] (list)", id="class list"),
        pytest.param(
            "version: 1\ndefault_class: a\nclasses: {no: {ttft: 1s, tpot: 1s}}",
            "$.classes",
            "as text",
            id="bool name",
        ),
        pytest.param(
            "version: 1\ndefault_class: no\nclasses: {a: {ttft: 1s, tpot: 1s}}",
            "$.default_class",
            "found False (bool)",
            id="bool as default class",
        ),
        pytest.param("version: 2", "$.version", "found 2; expected the number 1", id="wrong version"),
        pytest.param("version: true", "$.version", "found True (bool)", id="bool as version"),
        pytest.param("default_class: a", "$.version", "found nothing", id="version missing"),
        pytest.param("- version: 1", "$", "expected a mapping with the keys version", id="list at the top"),
        pytest.param(
            one_class("{ttft: 1s, tpot: 1s}") + "streamed_decode: 1",
            "$.streamed_decode",
            "found 1; expected true or false",
            id="number as switch",
        ),
        pytest.param(
            one_class("{ttft: 1s, tpot: 1s}") + "slo_scheduling: false",
            "$.slo_scheduling",
            "expected it under compare; set compare: {policy: arrival} instead",
            id="objectives off at the top",
        ),
        pytest.param(
            one_class("{ttft: 1s, tpot: 1s}") + "slo_scheduling: true",
            "$.slo_scheduling",
            "expected it under compare; leave it out",
            id="objectives on at the top",
        ),
        pytest.param(
            one_class("{ttft: 1s, tpot: 1s}") + "length_prediction: none",
            "$.length_prediction",
            "expected it under compare; set compare: {length_prediction: none} instead",
            id="no lengths at the top",
        ),
        pytest.param(
            one_class("{ttft: 1s, tpot: 1s}") + "length_prediction: quantile",
            "$.length_prediction",
            "expected it under compare; leave it out",
            id="lengths at the top",
        ),
        pytest.param(
            one_class("{ttft: 1s, tpot: 1s}") + "compare: {mode: layered}",
            "$.compare.mode",
            "found an unknown key; expected one of policy, length_prediction",
            id="the flag's comparison in the policy",
        ),
        pytest.param(
            one_class("{ttft: 1s, tpot: 1s}") + "compare:",
            "$.compare",
            "found None (NoneType); expected a mapping with the keys policy, length_prediction",
            id="empty comparison",
        ),
        pytest.param("", "", "found an empty file", id="empty file"),
        pytest.param("# nothing\n", "", "found an empty file", id="only a comment"),
        pytest.param(
            one_class("{ttft: 1s, ttft: 2s, tpot: 1s}"),
            "line 4, column 20",
            "found the key 'ttft' twice",
            id="duplicate key",
        ),
        pytest.param(
            "version: 1\ndefault_class: a\nclasses:\n  a: {ttft: 1s, tpot: 1s}\n  a: {ttft: 2s, tpot: 1s}",
            "line 5, column 3",
            "found the key 'a' twice",
            id="duplicate class",
        ),
        pytest.param("version: [1", "line 1, column 12", "mend the YAML there", id="not YAML"),
        pytest.param("\tversion: 1", "line 1, column 1", "mend the YAML there", id="tab"),
        pytest.param("version: 1\n---\nversion: 1", "line 2, column 1", "another document", id="two documents"),
        pytest.param("version: !!python/name:os.system x", "line 1", "could not determine", id="code"),
        pytest.param("version: 2024-99-99", "", "found what is not YAML", id="impossible date"),
        pytest.param("[" * 5000, "", "found what is not YAML", id="endless brackets"),
        pytest.param("\x07", "", "found what is not YAML", id="control character"),
        pytest.param(
            "version: 1\ndefault_class: &a {b: *a}",
            "$.default_class",
            "expected the name",
            id="endless alias",
        ),
    ],
)
def test_a_wrong_policy_is_refused_by_path(write: WriteFile, text: str, where: str, complaint: str) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as refusal:
        load_policy(path)
    message = str(refusal.value)
    assert message.startswith(f"slo.yaml: {where}" if where else "slo.yaml: found")
    if where.startswith("$"):
        assert message.startswith(f"slo.yaml: {where}: ")
    assert complaint in message
    assert "\n" not in message


def test_anchors_and_merges_are_yaml_and_stay_allowed(write: WriteFile) -> None:
    path = write(
        "version: 1\ndefault_class: a\nclasses:\n  a: &base {ttft: 1s, tpot: 100ms}\n  b: {<<: *base, ttft: 2s}\n"
    )
    assert load_policy(path).classes["b"] == SloClass(name="b", ttft_s=2.0, tpot_s=0.1)


@pytest.mark.parametrize("name", ["missing.yaml", ".", "nul\0byte"])
def test_a_file_that_cannot_be_read_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="found no readable file") as refusal:
        load_policy(name)
    assert str(refusal.value).startswith(f"{name}: ")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
        ),
    )
)
def test_any_value_in_the_flag_is_refused_or_read_and_never_crashes(value: Any) -> None:
    for key in ("host_memory", "lanes", "zone_tokens", "mode", "on_unsupported"):
        complaint = ""
        try:
            EngineConfig.from_extra_config({key: value})
        except ConfigError as refusal:
            complaint = str(refusal)
        assert not complaint or complaint.startswith(f"kv_connector_extra_config.{key}: found ")


def test_an_empty_flag_means_defaults() -> None:
    assert EngineConfig.from_extra_config({}) == EngineConfig()
    assert EngineConfig().read_policy() == default_policy()


def test_the_default_policy_has_one_class() -> None:
    only = SloClass(name="default", ttft_s=2.0, tpot_s=0.2, weight=1.0)
    assert default_policy() == SloPolicy(classes={"default": only}, default_class="default")


def test_every_key_of_the_flag_is_read(write: WriteFile) -> None:
    path = write(one_class("{ttft: 1s, tpot: 1s}"))
    config = EngineConfig.from_extra_config(
        {
            "policy": str(path),
            "host_memory": "8GiB",
            "lanes": 2,
            "zone_tokens": 4096,
            "kv_floor": "1GiB",
            "kv_ceiling": "4GiB",
            "idle_after": "500ms",
            "broker": "broker.sock",
            "weight": 2,
            "allow_untested_elastic_cuda": True,
            "compare": {"mode": "layered", "give": "wait"},
            "on_unsupported": "passthrough",
        }
    )
    assert config == EngineConfig(
        policy_path="slo.yaml",
        host_memory_bytes=8 << 30,
        lanes=2,
        zone_tokens=4096,
        kv_floor_bytes=1 << 30,
        kv_ceiling_bytes=4 << 30,
        idle_after_s=0.5,
        broker="broker.sock",
        weight=2,
        allow_untested_elastic_cuda=True,
        mode="layered",
        give="wait",
        on_unsupported="passthrough",
    )
    assert config.read_policy() == load_policy(path)


def test_a_policy_that_is_broken_since_ends_nobody_who_needs_none() -> None:
    config = EngineConfig.from_extra_config({"policy": "nowhere.yaml"})
    with pytest.raises(ConfigError, match="found no readable file"):
        config.read_policy()


@pytest.mark.parametrize(
    ("flag", "streamed", "experimental"),
    [
        ({}, False, ()),
        ({"retained_layers": 1}, False, ("retained_layers",)),
        ({}, True, ("streamed_decode",)),
        ({"retained_layers": 2}, True, ("retained_layers", "streamed_decode")),
        ({"retained_layers": 2, "long_contexts": True}, True, ()),
    ],
)
def test_decoding_in_the_zone_is_experimental_unless_the_pool_is_too_short(
    flag: dict[str, Any], streamed: bool, experimental: tuple[str, ...]
) -> None:
    policy = msgspec.structs.replace(default_policy(), streamed_decode=streamed)
    assert experimental_keys(EngineConfig.from_extra_config(flag), policy) == experimental


@pytest.mark.parametrize("key", ["policy", "host_memory", "lanes", "zone_tokens"])
def test_null_leaves_the_choice_to_layerkv(key: str) -> None:
    assert EngineConfig.from_extra_config({key: None}) == EngineConfig.from_extra_config({})


@pytest.mark.parametrize(
    ("extra_config", "message"),
    [
        (
            {"lane": 1},
            ".lane: found an unknown key; expected one of policy, host_memory, lanes, retained_layers, zone_tokens, "
            "mode, on_unsupported, allow_untested_vllm, cost_profile, decision_log, host_prefix_cache, long_contexts, "
            "kv_floor, kv_ceiling, idle_after, broker, weight, allow_untested_elastic_cuda, compare; did you mean "
            "lanes?",
        ),
        (
            {"host-memory": 1},
            "['host-memory']: found an unknown key; expected one of policy, host_memory, lanes, "
            "retained_layers, zone_tokens, mode, on_unsupported, allow_untested_vllm, cost_profile, decision_log, "
            "host_prefix_cache, long_contexts, kv_floor, kv_ceiling, idle_after, broker, weight, "
            "allow_untested_elastic_cuda, compare; did you mean host_memory?",
        ),
        ({"lanes": 0}, ".lanes: found 0; expected a whole number of lanes, 1 or more; set lanes to 1, say"),
        (
            {"lanes": 2.0},
            ".lanes: found 2.0; expected a whole number of lanes, 1 or more; set lanes to 1, say",
        ),
        (
            {"lanes": True},
            ".lanes: found True (bool); expected a whole number of lanes, 1 or more; set lanes to 1, say",
        ),
        (
            {"zone_tokens": 0},
            ".zone_tokens: found 0; expected a whole number of tokens, 1 or more; set zone_tokens to 8192, say",
        ),
        (
            {"zone_tokens": "4k"},
            ".zone_tokens: found '4k'; expected a whole number of tokens, 1 or more; set zone_tokens to 8192, say",
        ),
        (
            {"host_memory": 8},
            ".host_memory: found 8, which is 8B, less than any block of KV takes; expected a size above zero such as "
            '8GiB; set host_memory to "8GiB", say',
        ),
        (
            {"host_memory": 64_000},
            ".host_memory: found 64000, which is 62.5KiB, less than any block of KV takes; expected a size above zero "
            'such as 8GiB; set host_memory to "8GiB", say',
        ),
        ({"host_memory": 0}, ".host_memory: found 0; expected more than zero; set host_memory to 8GiB, say"),
        (
            {"host_memory": 1.5},
            '.host_memory: found 1.5; expected a size above zero such as 8GiB; set host_memory to "8GiB", say',
        ),
        (
            {"kv_floor": 8},
            ".kv_floor: found 8, which is 8B, less than any block of KV takes; expected a size above zero "
            'such as 8GiB; set kv_floor to "8GiB", say',
        ),
        ({"idle_after": 0}, ".idle_after: found 0; expected more than zero; set idle_after to 2s, say"),
        (
            {"mode": "Auto"},
            ".mode: found 'Auto'; expected auto or resident; set mode to \"auto\", say",
        ),
        (
            {"mode": "layered"},
            ".mode: found 'layered', which exists to compare with; expected auto or resident here; "
            'set compare to {"mode": "layered"} instead',
        ),
        (
            {"compare": {"mode": "auto"}},
            ".compare.mode: found 'auto'; expected layered; set mode to \"layered\", say",
        ),
        (
            {"compare": {"give": "lend"}},
            ".compare.give: found 'lend'; expected park, wait or recompute; set give to \"wait\", say",
        ),
        (
            {"compare": {"policy": "arrival"}},
            ".compare.policy: found an unknown key; expected one of mode, give",
        ),
        (
            {"compare": "layered"},
            ".compare: found 'layered'; expected a mapping with the keys mode, give; set compare to "
            '{"mode": "layered"}, say',
        ),
        (
            {"mode": "resident", "compare": {"mode": "layered"}},
            ".compare.mode: found 'layered' beside mode: resident; expected one of them; leave compare.mode or mode "
            "out",
        ),
        (
            {"on_unsupported": None},
            '.on_unsupported: found None (NoneType); expected error or passthrough; set on_unsupported to "error", say',
        ),
        (
            {"policy": {}},
            '.policy: found {} (dict); expected the path of an SLO policy file; set policy to "slo.yaml", say',
        ),
        (
            "slo.yaml",
            ": found 'slo.yaml'; expected a mapping with the keys policy, host_memory, lanes, retained_layers, "
            "zone_tokens, mode, on_unsupported, allow_untested_vllm, cost_profile, decision_log, host_prefix_cache, "
            "long_contexts, kv_floor, kv_ceiling, idle_after, broker, weight, allow_untested_elastic_cuda, compare",
        ),
    ],
)
def test_a_wrong_flag_is_refused_with_where_what_and_fix(extra_config: Any, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        EngineConfig.from_extra_config(extra_config)
    assert str(refusal.value) == f"kv_connector_extra_config{message}"


def test_a_size_without_a_unit_says_what_units_there_are() -> None:
    with pytest.raises(ConfigError, match=r"host_memory: found '8' without a unit.*GiB.*set host_memory to 8GiB"):
        EngineConfig.from_extra_config({"host_memory": "8"})


def test_a_wrong_policy_behind_the_flag_is_named_by_its_file(write: WriteFile) -> None:
    path = write(one_class("{ttft: 1s, tpto: 1s}"))
    with pytest.raises(ConfigError, match=r"^slo\.yaml: \$\.classes\.chat\.tpto: "):
        EngineConfig.from_extra_config({"policy": str(path)}).read_policy()


@pytest.mark.parametrize("extra_args", [None, {}, {"slo_class": None}, {"other": 1}])
def test_a_request_that_names_no_class_gets_the_default(extra_args: dict[str, Any] | None) -> None:
    assert slo_class_of(extra_args, two_classes()).name == "chat"


def test_a_request_gets_the_class_it_names() -> None:
    assert slo_class_of({"slo_class": "batch"}, two_classes()).name == "batch"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("batsh", "slo_class: found 'batsh'; expected one of the classes: chat, batch; did you mean batch?"),
        (
            "zzz",
            "slo_class: found 'zzz'; expected one of the classes: chat, batch; "
            "set one of them, or leave it out for chat",
        ),
        (
            5,
            "slo_class: found 5; expected one of the classes: chat, batch; set one of them, or leave it out for chat",
        ),
        (
            ["chat"],
            "slo_class: found ['chat'] (list); expected one of the classes: chat, batch; "
            "set one of them, or leave it out for chat",
        ),
        ("x" * 5000, None),
    ],
)
def test_a_request_that_names_an_unknown_class_is_told_the_known_ones(name: object, message: str | None) -> None:
    with pytest.raises(ConfigError) as refusal:
        slo_class_of({"slo_class": name}, two_classes())
    assert message is None or str(refusal.value) == message
    assert len(str(refusal.value)) < 200
