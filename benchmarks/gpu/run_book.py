"""The GPU run book: is it correct on this device, and how fast? `python benchmarks/gpu/run_book.py` (see README.md).

Runs the steps one after the other, each in processes of its own, and writes the JSON file again after each of them: a
step that fails is recorded with its reason and the next one goes on. With `--device cpu` the same steps run on the CPU
engine with tiny sizes: that tests this script, and says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))

from layerkv.bench.load import LoadSpec  # noqa: E402 - the path first
from layerkv.bench.machine import Machine, installed_versions, this_command, utc_now  # noqa: E402
from layerkv.bench.metrics import differing_requests, engine_figures, engine_ratios  # noqa: E402
from layerkv.bench.records import EngineRun, EngineSpec  # noqa: E402
from layerkv.bench.supervise import run_engine  # noqa: E402
from layerkv.bench.tiny_model import SHAPES, ModelShape, make_tiny_model  # noqa: E402


@dataclass(frozen=True)
class Size:
    """What is run on a kind of device: token ranges (least, most) of the large model's loads."""

    pressure_prompts: tuple[int, int]
    pressure_outputs: tuple[int, int]
    pressure_requests: int
    pressure_rate: float
    plentiful_rate: float
    lone_prompts: tuple[int, ...]
    block_tokens: int
    exact_model: str
    exact_requests: int
    exact_kv_tokens: int
    long_tokens: int


SIZES = {
    "cuda": Size((4096, 32_000), (150, 250), 24, 1.2, 4.0, (4096, 16_384, 32_000), 16, "wide", 32, 2048, 8000),
    "cpu": Size((100, 300), (20, 40), 8, 20.0, 20.0, (100, 300), 32, "test", 16, 1000, 4096),
}
KV_REQUESTS = 4
"""KV memory under pressure, in requests of mean length."""


@dataclass
class Context:
    """Where things are, and on what."""

    device: str
    size: Size
    out: Path

    @property
    def exact_shape(self) -> ModelShape:
        """The model whose tokens are compared. Mappings of 2 MiB want one with wide KV."""
        return SHAPES[self.size.exact_model]

    def folder(self, name: str) -> Path:
        """A folder of that name under the output."""
        folder = self.out / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def run(self, name: str, engine_args: dict[str, Any], load: LoadSpec) -> EngineRun:
        """One engine in a process of its own."""
        print(f"  {name}", flush=True)
        return run_engine(EngineSpec(name=name, engine_args=engine_args, load=load), self.folder(name), _ignore)


def _ignore(progress: object) -> None:
    pass


# Correctness ------------------------------------------------------------------------------------------------------


def ordering(context: Context) -> dict[str, Any]:
    """Every scenario of the ordering tests over the device's real streams, and aliasing of its memory."""
    from tests.cpu.device.scenarios import SCENARIOS
    from tests.cpu.device.segment_scenarios import SEGMENT_SCENARIOS
    from tests.fakes.torch_model import device_server, segment_device_server

    wrong: dict[str, int] = {}
    num_checked = 0
    kinds = (
        (device_server, SCENARIOS),
        (segment_device_server, SEGMENT_SCENARIOS),
    )  # in a fixed pool, and in one that moves
    for shape in ((3, 1, 0), (5, 2, 0), (6, 2, 2)):
        for make_server, scenarios in kinds:
            for scenario in scenarios:
                server = make_server(context.device, *shape, 18)
                scenario(server)
                num_checked += server.model.num_checked
                if found := server.model.num_wrong:
                    wrong[f"{scenario.__name__} {shape}"] = found
    return {"ok": not wrong, "tokens_checked": num_checked, "wrong": wrong}


def kernels(context: Context) -> dict[str, Any]:
    """Gather and scatter kernels against their definition, between device memory and pinned host memory."""
    import torch

    from layerkv.kernels import block_copy
    from layerkv.kernels.layout import BlockLayout
    from tests.fakes import block_copies as reference

    if context.device != "cuda":
        return {"ok": True, "skipped": "kernels run on a GPU, or in the interpreter (tests/cpu/kernels)"}
    wrong = []
    for layout in (BlockLayout.contiguous(16 << 10), BlockLayout(8192, 256, 16, 512), BlockLayout(1000, 123, 3, 301)):
        host = torch.randint(-128, 128, (reference.end_of(layout, 64),), dtype=torch.int8).pin_memory()
        blocks = torch.randperm(64)[:40]
        for source in (host, host.cuda()):
            staged = torch.full((40 * reference.payload_bytes(layout),), 77, dtype=torch.int8, device="cuda")
            reference.gather(block_copy.copy_blocks, source, layout, blocks.cuda(), staged)
            expected = torch.empty(staged.shape, dtype=torch.int8)
            reference.gather(reference.copy_blocks, host, layout, blocks, expected)
            back = torch.full_like(host, 5).pin_memory()
            reference.scatter(block_copy.copy_blocks, staged, back, layout, blocks.cuda())
            torch.cuda.synchronize()
            reference.scatter(reference.copy_blocks, expected, again := torch.full_like(host, 5), layout, blocks)
            if not torch.equal(staged.cpu(), expected) or not torch.equal(back, again):
                wrong.append(f"{layout} from {source.device}")
    return {"ok": not wrong, "wrong": wrong}


def exact(context: Context) -> dict[str, Any]:
    """Tokens with layerkv on against off, float32: scarce memory, two lanes, retained layers, streamed decode."""
    load = LoadSpec(
        num_requests=context.size.exact_requests,
        rate_per_s=1000.0,
        prompt_tokens=(20, 300),
        output_tokens=(20, 90),
        vocab_size=context.exact_shape.vocab_size,
    )
    common = _exact_args(context, "float32", max_model_len=400)
    reference = context.run("exact-stock", {**common, "kv_cache_memory_bytes": 512 << 20}, load)
    scarce = context.size.exact_kv_tokens * context.exact_shape.kv_bytes_per_token
    settings: dict[str, dict[str, Any]] = {
        "one lane": {"lanes": 1, "zone_tokens": 320},
        "always layered": {"compare": {"mode": "layered"}, "zone_tokens": 640},
        "streamed": {"zone_tokens": 640, "retained_layers": 1, "policy": _streamed_policy(context)},
    }
    return _compare_tokens(context, common, load, reference, settings, scarce)


def exact_bfloat16(context: Context) -> dict[str, Any]:
    """The same in bfloat16, one request at a time: batches are then composed alike."""
    load = LoadSpec(
        num_requests=6,
        rate_per_s=1000.0,
        prompt_tokens=(20, 300),
        output_tokens=(20, 60),
        vocab_size=context.exact_shape.vocab_size,
    )
    common = {**_exact_args(context, "bfloat16", max_model_len=400), "max_num_seqs": 1, "max_num_batched_tokens": 512}
    reference = context.run("bf16-stock", {**common, "kv_cache_memory_bytes": 256 << 20}, load)
    settings = {"always layered, bf16": {"compare": {"mode": "layered"}, "zone_tokens": 640}}
    return _compare_tokens(context, common, load, reference, settings, 256 << 20)


def exact_elastic(context: Context) -> dict[str, Any]:
    """Tokens in a pool that grows for requests and gives all but a segment back between them, float32."""
    load = LoadSpec(
        num_requests=context.size.exact_requests,
        rate_per_s=4.0,
        prompt_tokens=(20, 300),
        output_tokens=(20, 90),
        vocab_size=context.exact_shape.vocab_size,
    )
    common = _exact_args(context, "float32", max_model_len=400)
    reference = context.run("elastic-stock", {**common, "kv_cache_memory_bytes": 512 << 20}, load)
    most = 4 * context.size.exact_kv_tokens * context.exact_shape.kv_bytes_per_token
    extra = {"zone_tokens": 320, "idle_after": "20ms", "kv_ceiling": f"{most}B", "allow_untested_elastic_cuda": True}
    return _compare_tokens(context, common, load, reference, {"elastic": extra}, most)


def long_context(context: Context) -> dict[str, Any]:
    """A context four times as long as device KV memory, by streamed decode, exact in float32."""
    tokens = context.size.long_tokens
    load = LoadSpec(
        num_requests=2,
        rate_per_s=1000.0,
        prompt_tokens=(tokens, tokens),
        output_tokens=(24, 24),
        vocab_size=context.exact_shape.vocab_size,
    )
    common = {**_exact_args(context, "float32", max_model_len=tokens + 32), "max_num_batched_tokens": 2048}
    reference = context.run("long-stock", {**common, "kv_cache_memory_bytes": 1 << 30}, load)
    scarce = tokens // 4 * context.exact_shape.kv_bytes_per_token
    extra = {"lanes": 1, "zone_tokens": tokens + 32, "long_contexts": True}
    return {
        "context_over_kv_memory": tokens * context.exact_shape.kv_bytes_per_token / scarce,
        **_compare_tokens(context, common, load, reference, {"long context": extra}, scarce),
    }


def sanitizer(context: Context) -> dict[str, Any]:
    """The ordering scenarios under compute-sanitizer, where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if context.device != "cuda" or tool is None:
        return {"ok": True, "skipped": "no compute-sanitizer here"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *_own_command("ordering", context)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return {"ok": done.returncode == 0, "output": done.stdout[-2000:]}


# Figures ----------------------------------------------------------------------------------------------------------


def transfer(context: Context) -> dict[str, Any]:
    """Copies beside the raw link, and what compute hides of them (`layerkv bench transfer`)."""
    from layerkv.bench.transfer import run_transfer

    path = context.out / "transfer.json"
    run_transfer(path, quick=context.device == "cpu")
    return {"ok": True, **json.loads(path.read_text())}


def kernel_or_copy_engine(context: Context) -> dict[str, Any]:
    """The same copies by kernel and by copy engine: where one overtakes the other is the engine's threshold."""
    if context.device != "cuda":
        return {"ok": True, "skipped": "there is one way only"}
    from layerkv.bench.transfer import measure_rates
    from layerkv.device import cuda_engine

    rows = []
    for below, method in ((0, "copy engine"), (1 << 40, "kernel")):
        cuda_engine.KERNEL_BELOW_BYTES = below
        for fragment in (4, 8, 16, 32, 64, 128):
            rows += [{"method": method, **row} for row in measure_rates("cuda", fragment << 10, rounds=5)]
    return {"ok": True, "rows": rows, "threshold_bytes_now": 28 << 10}


def lone_prompts(context: Context) -> dict[str, Any]:
    """Time to first token of a prompt alone, layered over resident: what streaming all layers costs."""
    figures: dict[str, Any] = {}
    for tokens in context.size.lone_prompts:
        load = LoadSpec(
            num_requests=4, rate_per_s=0.4, prompt_tokens=(tokens, tokens), output_tokens=(1, 1),
            vocab_size=_vocabulary(context),
        )  # fmt: skip
        args = _large_args(context, _kv_bytes(context, _large_kv_bytes(context), 4 * max(context.size.lone_prompts)))
        modes: dict[str, dict[str, Any]] = {
            "resident": {"mode": "resident"}, "layered": {"compare": {"mode": "layered"}},
        }  # fmt: skip
        runs = {
            mode: engine_figures(context.run(f"lone-{mode}-{tokens}", _with_layerkv(args, keys), load))
            for mode, keys in modes.items()
        }
        medians = {mode: run.ttft_s.p50 for mode, run in runs.items()}
        figures[str(tokens)] = {**medians, "layered_over_resident": medians["layered"] / medians["resident"]}
    return {"ok": True, "ttft_p50_s": figures}


def pressure(context: Context) -> dict[str, Any]:
    """Stock, layerkv and the oracle with KV memory for a few of many long prompts."""
    size = context.size
    load = LoadSpec(
        num_requests=size.pressure_requests,
        rate_per_s=size.pressure_rate,
        prompt_tokens=size.pressure_prompts,
        output_tokens=size.pressure_outputs,
        vocab_size=_vocabulary(context),
    )
    scarce = _kv_bytes(context, _large_kv_bytes(context), int(KV_REQUESTS * load.mean_context_tokens))
    scarce = max(scarce, _kv_bytes(context, _large_kv_bytes(context), int(1.2 * load.max_context_tokens)))
    plentiful = _kv_bytes(context, _large_kv_bytes(context), int((load.num_requests + 2) * load.mean_context_tokens))
    return _side_by_side(
        context,
        load,
        {
            "stock": _large_args(context, scarce),
            "layerkv": _with_layerkv(_large_args(context, scarce), {}),
            "oracle": _large_args(context, plentiful),
        },
    )


def plentiful(context: Context) -> dict[str, Any]:
    """Stock and layerkv with KV memory for everything: the overhead."""
    size = context.size
    prompts = (size.pressure_prompts[0] // 4, size.pressure_prompts[0])
    load = LoadSpec(
        num_requests=3 * size.pressure_requests,
        rate_per_s=size.plentiful_rate,
        prompt_tokens=prompts,
        output_tokens=size.pressure_outputs,
        vocab_size=_vocabulary(context),
    )
    args = _large_args(context, _kv_bytes(context, _large_kv_bytes(context), load.num_requests * prompts[1] * 2))
    return _side_by_side(context, load, {"stock": args, "layerkv": _with_layerkv(args, {})})


# Engines ----------------------------------------------------------------------------------------------------------


def _exact_args(context: Context, dtype: str, max_model_len: int) -> dict[str, Any]:
    args = {
        "model": str(make_tiny_model(context.size.exact_model, context.out / "models")),
        "dtype": dtype,
        "enforce_eager": True,
        "block_size": context.size.block_tokens,
        "max_model_len": max_model_len,
        "max_num_batched_tokens": 160,
        "max_num_seqs": 16,
        "seed": 0,
    }
    if context.device == "cuda" and dtype == "float32":
        args["attention_backend"] = "TRITON_ATTN"  # FlashAttention has no float32
    return args


def _large_args(context: Context, kv_bytes: int) -> dict[str, Any]:
    longest = context.size.pressure_prompts[1] + context.size.pressure_outputs[1]
    args: dict[str, Any] = {
        "max_model_len": -(-longest // 512) * 512,
        "kv_cache_memory_bytes": kv_bytes,
        "block_size": context.size.block_tokens,
        "seed": 0,
    }
    if context.device == "cpu":
        return {**args, "model": str(make_tiny_model("test", context.out / "models")), "dtype": "float32",
                "enforce_eager": True}  # fmt: skip
    return {**args, "model": str(_shape_8b(context)), "dtype": "bfloat16", "load_format": "dummy",
            "skip_tokenizer_init": True}  # fmt: skip


def _shape_8b(context: Context) -> Path:
    """A model of the shape of Llama 3 8B; its weights are made up by vLLM."""
    folder = context.out / "models" / "8b"
    if not folder.exists():
        from transformers import LlamaConfig

        config = LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=32_000,
            max_position_embeddings=131_072,
            architectures=["LlamaForCausalLM"],
        )
        config.save_pretrained(folder)
    return folder


def _vocabulary(context: Context) -> int:
    return context.exact_shape.vocab_size if context.device == "cpu" else 32_000


def _large_kv_bytes(context: Context) -> int:
    return context.exact_shape.kv_bytes_per_token if context.device == "cpu" else 32 * 2 * 8 * 128 * 2


def _kv_bytes(context: Context, bytes_per_token: int, tokens: int) -> int:
    """KV memory for so many tokens, and never less than a few units of mapping in each layer."""
    least = 64 << 20 if context.device == "cuda" else 0
    return max(-(-tokens // 64) * 64 * bytes_per_token, least)


def _with_layerkv(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    host = {"host_memory": "48GiB" if "skip_tokenizer_init" in args else "1GiB"}
    extra = {key: value for key, value in {**host, **extra}.items() if value is not None}
    connector = {"kv_connector": "LayerKVConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return {**args, "kv_transfer_config": connector}


def _streamed_policy(context: Context) -> str:
    path = context.out / "streamed.yaml"
    path.write_text("version: 1\ndefault_class: all\nstreamed_decode: true\nclasses:\n  all: {ttft: 1s, tpot: 100ms}\n")
    return str(path)


def _compare_tokens(
    context: Context,
    common: dict[str, Any],
    load: LoadSpec,
    reference: EngineRun,
    settings: dict[str, dict[str, Any]],
    kv_bytes: int,
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, extra in settings.items():
        args = _with_layerkv({**common, "kv_cache_memory_bytes": kv_bytes}, extra)
        run = context.run(name.replace(" ", "-"), args, load)
        found[name] = {
            "differing_requests": differing_requests(run, reference),
            "requests": len(run.requests),
            "parks": run.parks,
            "bytes_stored": run.bytes_stored,
            "bytes_loaded": run.bytes_loaded,
        }
    was_used = all(setting["bytes_stored"] > 0 for setting in found.values())
    return {"ok": was_used and not any(s["differing_requests"] for s in found.values()), "settings": found}


def _side_by_side(context: Context, load: LoadSpec, engines: dict[str, dict[str, Any]]) -> dict[str, Any]:
    import msgspec

    figures: dict[str, list[Any]] = {name: [] for name in engines}
    for seed in range(2):  # there and back again: drift hits all alike
        for name in sorted(engines, reverse=bool(seed)):
            run = context.run(f"{name}-{seed}", engines[name], msgspec.structs.replace(load, seed=seed))
            figures[name].append(engine_figures(run))
    seeds = [{name: runs[seed] for name, runs in figures.items()} for seed in range(2)]
    return {
        "ok": True,
        "load": msgspec.to_builtins(load),
        "kv_cache_memory_bytes": {name: args["kv_cache_memory_bytes"] for name, args in engines.items()},
        "by_seed": [msgspec.to_builtins(runs) for runs in seeds],
        "ratios_by_seed": [msgspec.to_builtins(engine_ratios(runs)) for runs in seeds],
    }


# The book ---------------------------------------------------------------------------------------------------------

Step = Callable[[Context], dict[str, Any]]
IN_PROCESS: tuple[Step, ...] = (ordering, kernels, transfer, kernel_or_copy_engine)
"""Steps that use the device themselves: each in a fresh process of this script."""
STEPS: tuple[Step, ...] = (
    ordering,
    kernels,
    exact,
    exact_bfloat16,
    exact_elastic,
    long_context,
    transfer,
    kernel_or_copy_engine,
    lone_prompts,
    pressure,
    plentiful,
    sanitizer,
)


def _own_command(step: str, context: Context) -> list[str]:
    return [sys.executable, str(Path(__file__)), "--only", step, "--out", str(context.out), "--device", context.device]


def run_step(step: Step, context: Context) -> dict[str, Any]:
    """The outcome of a step; why, if it failed."""
    begun = time.monotonic()
    try:
        if step in IN_PROCESS:
            path = context.out / f"{step.__name__}.json"
            path.unlink(missing_ok=True)
            done = subprocess.run(_own_command(step.__name__, context), capture_output=True, text=True, timeout=600)
            failed = {"ok": False, "error": (done.stdout + done.stderr)[-3000:]}
            outcome = json.loads(path.read_text()) if path.exists() else failed
        else:
            outcome = step(context)
    except Exception:
        outcome = {"ok": False, "error": traceback.format_exc()[-3000:]}
    return {**outcome, "wall_s": round(time.monotonic() - begun, 1)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps asked for; the exit status is 0 if all of them are all right."""
    names = [step.__name__ for step in STEPS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", default=",".join(names), metavar="A,B,..", help=f"some of {', '.join(names)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the outcomes go (OUT/gpu.json)")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), metavar="DIR", help="logs, models (%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cpu: a dry run with tiny sizes")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    device = arguments.device or "cuda"
    if device == "cuda" and not _has_gpu():
        print("no CUDA device is visible; --device cpu is a dry run of this script", file=sys.stderr)
        return 2
    context = Context(device, SIZES[device], arguments.out.resolve())
    context.out.mkdir(parents=True, exist_ok=True)
    if arguments.only is not None:
        outcome = STEPS[names.index(arguments.only)](context)
        (context.out / f"{arguments.only}.json").write_text(json.dumps(outcome))
        return 0 if outcome["ok"] else 1
    path = arguments.json or context.out / "gpu.json"
    book: dict[str, Any] = {
        "schema": 1,
        "command": this_command(),
        "date": utc_now(),
        "machine": _machine(device),
        "versions": installed_versions(),
        "device": device,
        "steps": {},
    }
    for name in arguments.steps.split(","):
        print(f"{name} ...", flush=True)
        outcome = run_step(STEPS[names.index(name)], context)
        book["steps"][name] = outcome
        path.write_text(json.dumps(book, indent=1) + "\n")
        told = outcome.get("skipped") or outcome.get("error") or ""
        print(f"{name}: {'ok' if outcome['ok'] else 'FAILED'} in {outcome['wall_s']} s {told}", flush=True)
    return 0 if all(outcome["ok"] for outcome in book["steps"].values()) else 1


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _machine(device: str) -> dict[str, Any]:
    import msgspec
    import torch

    machine = msgspec.to_builtins(Machine.here())
    if device == "cuda":
        machine |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return machine


if __name__ == "__main__":
    sys.exit(main())
