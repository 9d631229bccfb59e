"""The models and features that people serve: layerkv's greedy tokens are stock vLLM's, family by family.

As :mod:`tests.vllm.test_exact`: random mixes of requests through real engines, parked, layered, with fetches that fail
and host memory that is too small; the reference is stock vLLM with KV memory for everything. Where stock's own tokens
depend on what shares a batch, the family says what is compared instead.

With ``LAYERKV_WRITE_FAMILIES`` set, what ran is written to ``docs/families.json``, from which
``tools/families.py --write`` makes the table of ``docs/models.md``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import pytest

from tests.vllm.forked import ROOT, Forks
from tests.vllm.mix import MixRequest
from tests.vllm.test_exact import PLENTIFUL_BYTES, SCARCE_BYTES, Setting, engine_args, require_same, run_engine
from tests.vllm.tiny_families import make_adapter, make_draft_model, make_eagle_head

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

FAMILIES_JSON = ROOT / "docs" / "families.json"
MIXES: list[dict[str, Any]] = [{"seed": 0, "sharing": True}, {"seed": 1}, {"seed": 2, "sharing": True, "aborts": True}]
NUM_ADAPTERS = 3

SCARCE = Setting("scarce", {"zone_tokens": 320})
AHEAD = Setting(
    "ahead-failing-fetches", {"zone_tokens": 320}, ahead=True, fail_every=2, must_move=("fetches", "recomputes")
)
FAILING = Setting("failing-fetches", {"zone_tokens": 320}, fail_every=2, must_move=("fetches", "recomputes"))
HOST_SMALL = Setting(
    "host-memory-too-small",
    {"zone_tokens": 64, "host_memory": "1MiB"},
    {"kv_cache_memory_bytes": 3 << 20},
    must_move=("recomputes",),
)
TWO_RANKS = Setting(
    "tensor-parallel-2",
    {"zone_tokens": 320},
    {"tensor_parallel_size": 2, "kv_cache_memory_bytes": SCARCE_BYTES // 2},
    alone=True,
)


@dataclass(frozen=True)
class Family:
    """Models of one kind, or one feature.

    Attributes:
        name: In the tests' names.
        title: In the table of the docs.
        recipe: Its model's, in :mod:`tests.vllm.tiny_families`; None for the tiny Llama.
        mix: What its requests have that others have not.
        engine: Arguments of its engines, stock ones too.
        spec: What else :mod:`tests.vllm.mix_engine` is told.
        settings: What is tried.
        is_compared: Whether a request's tokens are the same however stock vLLM came by them, given whether it was
            computed again.
        ranks_differ: Whether stock's tokens change with tensor parallelism: then the reference has as many ranks.
        remark: What the table says of it.
    """

    name: str
    title: str
    recipe: str | None = None
    mix: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)
    settings: tuple[Setting, ...] = (SCARCE, AHEAD, HOST_SMALL)
    is_compared: Callable[[MixRequest, bool], bool] = lambda request, was_recomputed: True
    ranks_differ: bool = False
    remark: str = ""


def sized(setting: Setting, **changes: Any) -> Setting:
    """The setting with other engine arguments."""
    return replace(setting, engine={**setting.engine, **changes})


SEEING = {"mix": {"images": True, "max_prompt": 200}, "spec": {"sees": True}}
LIMITS = {"limit_mm_per_prompt": {"image": 2, "video": 0}, "mm_processor_cache_gb": 0}
# MLA on a CPU: blocks of 16 tokens and 216 KiB, prompts in one chunk, no prefix caching; tokens change with the batch.
LATENT = {
    "block_size": 16,
    "max_num_seqs": 1,
    "enable_prefix_caching": False,
    "kv_cache_memory_bytes": 10 << 20,
    "attention_backend": "CPU_MLA",  # where there is AMX vLLM prefers a backend that takes no float32
}
LATENT_HOST_SMALL = replace(
    sized(HOST_SMALL, kv_cache_memory_bytes=9 << 20), extra={"zone_tokens": 64, "host_memory": "2MiB"}
)
DRAFTED = ("accepted_drafts", "rejected_drafts")
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}

FAMILIES = [
    Family("qwen3-moe", "Qwen3-MoE", "qwen3_moe", settings=(SCARCE, AHEAD, HOST_SMALL, TWO_RANKS)),
    Family("mixtral", "Mixtral", "mixtral"),
    Family("qwen2.5-vl", "Qwen2.5-VL, with images", "qwen2_5_vl", engine=LIMITS, **SEEING),
    Family(
        "qwen3-vl",
        "Qwen3-VL, with images",
        "qwen3_vl",
        mix=SEEING["mix"],
        engine=LIMITS,
        spec={**SEEING["spec"], "encoder_cache": 40},
        remark="with an encoder cache of about one image",
    ),
    *(
        Family(
            name,
            title,
            name.replace("-", "_"),
            engine=LATENT,
            is_compared=lambda request, was_recomputed: not was_recomputed,
            ranks_differ=True,
            settings=(SCARCE, AHEAD, LATENT_HOST_SMALL, *others),
            remark="a request a step, and none that was computed again: on a CPU, stock's tokens change with the batch",
        )
        for name, title, others in (
            ("deepseek-v2", "DeepSeek V2 (MLA)", (sized(TWO_RANKS, kv_cache_memory_bytes=10 << 20),)),
            ("deepseek-v3", "DeepSeek V3 (MLA)", ()),
        )
    ),
    *(
        Family(
            name,
            title,
            name.replace("-", "_"),
            engine={"disable_hybrid_kv_cache_manager": True},
            remark="with `--disable-hybrid-kv-cache-manager`",
        )
        for name, title in (("gpt-oss", "gpt-oss"), ("gemma3", "Gemma 3"))
    ),
    Family(
        "ngram",
        "n-gram speculation",
        mix={"repeats": True},
        engine={"speculative_config": NGRAM},
        settings=tuple(
            # with numba in its process, vLLM starts no second engine there
            replace(setting, must_move=(*setting.must_move, *DRAFTED), alone=True)
            for setting in (SCARCE, FAILING, HOST_SMALL)
        ),
    ),
    *(
        Family(
            name,
            title,
            spec={"drafter": method},
            engine={"kv_cache_memory_bytes": scarce},
            settings=tuple(
                replace(setting, must_move=(*setting.must_move, *DRAFTED))
                for setting in (
                    SCARCE,
                    FAILING,
                    replace(
                        sized(HOST_SMALL, kv_cache_memory_bytes=scarce // 2),
                        extra={"zone_tokens": 64, "host_memory": "1500KiB"},
                    ),
                )
            ),
            remark=remark,
        )
        for name, title, method, scarce, remark in (
            ("eagle", "EAGLE", "eagle", 9 << 20, "a head of three layers"),
            ("draft-model", "a draft model", "draft_model", 10 << 20, "of four layers of six"),
        )
    ),
    Family(
        "lora",
        "LoRA, several adapters",
        mix={"adapters": NUM_ADAPTERS},
        engine={"enable_lora": True, "max_loras": 1, "max_lora_rank": 8, "max_cpu_loras": NUM_ADAPTERS},
        spec={"adapters": None},
        is_compared=lambda request, was_recomputed: request.adapter > 0,
        remark="`--max-loras 1`; of requests with an adapter: on a CPU, stock's tokens of others change with the batch",
    ),
    Family("embeds", "prompt embeddings", mix={"embeds": True}, engine={"enable_prompt_embeds": True}),
    Family(
        "fp8",
        "FP8 KV cache",
        engine={"kv_cache_dtype": "fp8", "kv_cache_memory_bytes": SCARCE_BYTES // 4},
        settings=(
            SCARCE,
            AHEAD,
            replace(
                sized(HOST_SMALL, kv_cache_memory_bytes=3 << 18), extra={"zone_tokens": 64, "host_memory": "256KiB"}
            ),
        ),
    ),
]
CASES = [(family, setting) for family in FAMILIES for setting in family.settings]


def mixes_of(family: Family) -> list[dict[str, Any]]:
    return [{**mix, **family.mix} for mix in MIXES]


class Runs:
    """What the engines of the families did that this session asks for, a family to a process, two at a time."""

    def __init__(self, forks: Forks, tiny_model: Path, folder: Path, cases: Sequence[tuple[Family, Setting]]) -> None:
        self._forks, self._tiny_model, self._folder = forks, tiny_model, folder
        self.requests: dict[str, dict[str, Any]] = {}
        self._makes_model = Lock()
        self._pool = ThreadPoolExecutor(2)
        self._outcomes: dict[tuple[str, str], Future[dict[str, Any]]] = {}
        for family in {family.name: family for family, _ in cases}.values():
            asked = [setting for each, setting in cases if each is family]
            together = [setting for setting in asked if not setting.alone]
            future = self._pool.submit(self._run, family, together, has_reference=True)
            names = ("reference", *(setting.name for setting in together))
            self._outcomes |= {(family.name, name): future for name in names}
        for family, setting in cases:  # engines of several processes come last
            if setting.alone:
                own = family.ranks_differ and "tensor_parallel_size" in setting.engine
                future = self._pool.submit(self._run, family, [setting], has_reference=own)
                self._outcomes[family.name, setting.name] = future
                if own:
                    self._outcomes[family.name, f"reference of {setting.name}"] = future

    def of(self, family: Family, name: str) -> list[dict[str, Any]]:
        """What each mix gave in one of its engines."""
        return _results(self._outcomes[family.name, name].result()[name])

    def reference(self, family: Family, setting: Setting) -> list[list[list[int]]]:
        """The tokens that each request of each mix would have, had it not been aborted."""
        own = self._outcomes.get((family.name, f"reference of {setting.name}"))
        future = own or self._outcomes[family.name, "reference"]
        return [result["tokens"] for result in _results(future.result()["reference"])]

    def close(self) -> None:
        """Start no more of them."""
        self._pool.shutdown(cancel_futures=True)

    def _run(self, family: Family, settings: Sequence[Setting], *, has_reference: bool) -> dict[str, Any]:
        folder = self._folder / f"{family.name}-{settings[0].name if settings else 'reference'}"
        folder.mkdir()
        model = self._tiny_model if family.recipe is None else self._model(family.recipe)
        more = {**family.spec, "mixes": mixes_of(family)}
        stock = {**engine_args(model), **family.engine}
        if family.mix.get("adapters"):
            more["adapters"] = [str(make_adapter(folder / f"adapter-{i}", i)) for i in range(NUM_ADAPTERS)]
        if method := family.spec.get("drafter"):
            make = make_eagle_head if method == "eagle" else make_draft_model
            drafter = str(make(model, folder / "drafter"))
            stock["speculative_config"] = {"method": method, "model": drafter, "num_speculative_tokens": 3}
        if family.mix.get("embeds"):
            more["embeds_of"] = str(model)
        specs: dict[str, Any] = {}
        if has_reference:
            unaborted = [{**mix, "unaborted": True} for mix in more["mixes"]]
            ranks = settings[0].engine.get("tensor_parallel_size", 1) if settings else 1
            engine = {**stock, "kv_cache_memory_bytes": PLENTIFUL_BYTES, "tensor_parallel_size": ranks}
            specs["reference"] = {**more, "engine_args": engine, "mixes": unaborted}
        for setting in settings:
            extra = {"host_memory": "64MiB", **setting.extra}
            connector = {"kv_connector": "LayerKVConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
            specs[setting.name] = {
                **more,
                "engine_args": {**stock, **setting.engine, "kv_transfer_config": connector},
                "ahead": setting.ahead,
                "fail_every": setting.fail_every,
            }
        return run_engine(self._forks, folder, specs)

    def _model(self, recipe: str) -> Path:
        folder = self._folder / recipe
        with self._makes_model:
            if not folder.exists():
                made = self._forks.run(MAKE_FAMILY, recipe, str(self._tiny_model), str(folder))
                assert made.returncode == 0, made.stderr[-4000:]
        return folder


def _results(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    assert "error" not in outcome, outcome["error"]
    return outcome["results"]


MAKE_FAMILY = """
import sys
from pathlib import Path
from tests.vllm.tiny_families import make_family
make_family(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, forks: Forks, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    items = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    cases = [(item.callspec.params["family"], item.callspec.params["setting"]) for item in items]
    found = Runs(forks, tiny_model, tmp_path_factory.mktemp("families"), cases)
    yield found
    found.close()
    if os.environ.get("LAYERKV_WRITE_FAMILIES"):
        write_down(found.requests)


def write_down(ran: dict[str, dict[str, Any]]) -> None:
    """What ran, in the place of what stood there of the same families; only where all of a family's settings did."""
    import vllm

    known = json.loads(FAMILIES_JSON.read_text()) if FAMILIES_JSON.exists() else {}
    for family in FAMILIES:
        if len(ran.get(family.name, {}).get("settings", ())) == len(family.settings):
            known[family.name] = {"title": family.title, "remark": family.remark, **ran[family.name]}
            known[family.name]["vllm"] = vllm.__version__
    in_order = {family.name: known[family.name] for family in FAMILIES if family.name in known}
    FAMILIES_JSON.write_text(json.dumps(in_order, indent=2) + "\n")


@pytest.mark.parametrize(("family", "setting"), CASES, ids=lambda value: value.name)
def test_tokens_are_stock_vllms_and_every_block_comes_back(family: Family, setting: Setting, runs: Runs) -> None:
    reference, found = runs.reference(family, setting), runs.of(family, setting.name)
    moves = found[-1]["books"]["moves"]
    num_compared = require_same(setting, mixes_of(family), reference, found, family.is_compared)
    counts = {"requests": num_compared, "parks": moves["parks"], "fetches": moves["fetches"]}
    counts |= {"layered_prefills": moves["layered_admissions"], "recomputes": moves["recomputes"], "wrong_tokens": 0}
    told = runs.requests.setdefault(family.name, {"settings": [], **dict.fromkeys(counts, 0)})
    told["settings"].append(setting.name)
    for name, count in counts.items():
        told[name] += count
