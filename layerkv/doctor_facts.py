"""What a checkpoint means here, as data: its KV-cache groups, what a request takes, the division into pool and zone.

Pure: :mod:`layerkv.doctor_model` asks vLLM and fills it in; :mod:`layerkv.doctor` prints it. Sizes are of one worker.
Invariant: whatever is wrong with what was asked is a `ConfigError` of one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, Final

from layerkv.strict_yaml import above_zero, wrong
from layerkv.units import format_bytes, parse_bytes

__all__ = [
    "Drafter",
    "Group",
    "ModelFacts",
    "Question",
    "Sizes",
    "check_checkpoint",
    "groups_table",
    "kind_of",
    "model_rows",
    "one_line",
    "read_question",
]

EXAMPLE_TOKENS: Final = 1000
_CONFIGS: Final = ("config.json", "params.json")  # params.json: a checkpoint in Mistral's own format
_LONGEST_LINE: Final = 400
_SPLIT: Final = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What `layerkv doctor --model` is asked.

    Attributes:
        folder: The checkpoint's.
        kv_memory_bytes: KV memory to divide; None: nothing is divided.
        max_model_len: The longest request; None: what vLLM takes from the checkpoint.
        engine_args: What else vLLM would be started with.
    """

    folder: Path
    kv_memory_bytes: int | None = None
    max_model_len: int | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)


def read_question(
    folder: str, *, kv_memory: str | None, max_model_len: int | None, engine_args: Mapping[str, Any]
) -> Question:
    """Check what the command line says.

    Raises:
        ConfigError: a size that is none, a length below 1, or an engine that is more than one worker.
    """
    kv_memory_bytes = None
    if kv_memory is not None:
        kv_memory_bytes = above_zero(parse_bytes, _number(kv_memory), where="--kv-memory", example="8GiB")
    if max_model_len is not None and max_model_len < 1:
        raise wrong("--max-model-len", f"found {max_model_len}; expected 1 or more", "set it to 32768, say")
    for name in _SPLIT:
        if (found := engine_args.get(name, 1)) != 1:
            problem = f"found {name} {found!r}; expected an engine of one worker"
            raise wrong("--engine-args", problem, f"leave {name} out, and give --kv-memory for all workers together")
    return Question(
        folder=Path(folder), kv_memory_bytes=kv_memory_bytes, max_model_len=max_model_len, engine_args=engine_args
    )


def _number(size: str) -> str | int:
    """A command line knows text only; a plain number is bytes, as everywhere."""
    return int(size) if size.isdecimal() else size


def check_checkpoint(folder: Path) -> Path:
    """The checkpoint's configuration, which is a JSON object.

    Raises:
        ConfigError: there is none; with what was found, and what to set.
    """
    where = str(folder)
    fix = "set --model to the folder of a checkpoint (a name is not looked up: download the checkpoint first)"
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing there"
        raise wrong(where, f"found {found}; expected the folder of a checkpoint, with its config.json", fix)
    path = next((folder / name for name in _CONFIGS if (folder / name).is_file()), None)
    if path is None:
        there = sorted(each.name for each in folder.iterdir())
        found = (
            f"{', '.join(there[:3])}{' and more' if len(there) > 3 else ''}, but no config.json"
            if there
            else "an empty folder"
        )
        raise wrong(where, f"found {found}; expected the folder of a checkpoint, with its config.json", fix)
    again = "download it again"
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise wrong(str(path), f"found no readable file ({error.strerror}); expected a JSON object", again) from None
    except (ValueError, RecursionError) as error:
        raise wrong(str(path), f"found what is not JSON ({error}); expected a JSON object", again) from None
    if not isinstance(document, dict):
        raise wrong(str(path), f"found JSON of another kind ({type(document).__name__}); expected an object", again)
    return path


def one_line(error: BaseException) -> str:
    """What an exception of vLLM's or transformers' says, without what surrounds it, on one line of bounded length."""
    text = str(error)
    if "Value error, " in text:  # pydantic's: a heading before it, and what it looked at behind
        text = text.partition("Value error, ")[2].partition(" [type=")[0]
    text = " ".join(text.partition(" Supported architectures:")[0].split()) or type(error).__name__
    return text if len(text) <= _LONGEST_LINE else f"{text[: _LONGEST_LINE - 3]}..."


# What a layer keeps ---------------------------------------------------------------------------------------------------


def kind_of(spec: Any) -> tuple[str, int | None]:
    """What a KV-cache spec of vLLM's keeps, in words, and of how many tokens it keeps it; None: of all.

    By the names of its classes, of which ours have vLLM's among their bases.
    """
    classes = {each.__name__ for each in type(spec).__mro__}
    latent = ", latent (MLA)" if any("MLA" in name for name in classes) else ""
    window: int | None = getattr(spec, "sliding_window", None)
    chunk: int | None = getattr(spec, "attention_chunk_size", None)
    if "MambaSpec" in classes:
        kind = getattr(spec.mamba_type, "name", spec.mamba_type)
        return f"state ({str(kind).lower()})", 0
    if "SlidingWindowSpec" in classes:
        assert window is not None
        return f"window of {window:,}{latent}", window
    if "ChunkedLocalAttentionSpec" in classes:
        assert chunk is not None
        return f"chunks of {chunk:,}", chunk
    if "CrossAttentionSpec" in classes:
        return "cross-attention", None
    if "FullAttentionSpec" not in classes:
        return type(spec).__name__, None
    narrower = (
        f", computed in a window of {window:,}" if window else f", computed in chunks of {chunk:,}" if chunk else ""
    )
    return f"full{latent}{narrower}", None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Layers that share a block table.

    Attributes:
        kind: What they keep, in words.
        num_layers: How many they are.
        block_tokens: Tokens of a block.
        page_bytes: Of a block in one layer; several where its layers differ.
        kept_tokens: A layer keeps no more than so many of a request's last tokens; None: all; 0: a state.
        state_blocks: Blocks of a request's state, in a group of states.
    """

    kind: str
    num_layers: int
    block_tokens: int
    page_bytes: tuple[int, ...]
    kept_tokens: int | None = None
    state_blocks: int = 0

    @property
    def layer_bytes(self) -> int:
        """Of a block in all of its layers."""
        return self.num_layers * self.page_bytes[0] if len(self.page_bytes) == 1 else sum(self.page_bytes)

    @property
    def token_bytes(self) -> float:
        """KV bytes that one more token takes, while it is kept."""
        return 0.0 if self.kept_tokens == 0 else self.layer_bytes / self.block_tokens

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks of a request that has so many tokens, and decodes."""
        if self.kept_tokens == 0:
            return self.state_blocks
        blocks = -(-num_tokens // self.block_tokens)
        if self.kept_tokens is None:
            return blocks
        return min(blocks, ceil(max(self.kept_tokens - 1, 1) / self.block_tokens) + 1)  # it need not begin with a block


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafter:
    """What drafts.

    Attributes:
        method: vLLM's name of the way.
        keeps_kv: Whether layers of its own keep KV.
        not_counted: Why those are not counted among the model's; "": they are, or there are none.
    """

    method: str
    keeps_kv: bool = True
    not_counted: str = ""

    def __str__(self) -> str:
        if not self.keeps_kv:
            return f"{self.method}, which keeps no KV"
        if self.not_counted:
            return f"{self.method}, whose layers and KV are not counted here: {self.not_counted}"
        return f"{self.method}, its layers counted with the model's"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What becomes of the KV memory with layerkv, and of host memory beside it.

    Attributes:
        kv_bytes: KV memory of the worker.
        pool_blocks: Blocks with memory of their own.
        zone_blocks: Blocks of the lane zone, over all groups.
        zone_bytes: What its lanes take of the KV memory.
        block_tokens: Tokens of a block; None where groups differ.
        host_blocks: Blocks of host memory.
        host_bytes: What those take.
    """

    kv_bytes: int
    pool_blocks: int
    zone_blocks: int
    zone_bytes: int
    block_tokens: int | None
    host_blocks: int
    host_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What vLLM makes of a checkpoint here, and whether layerkv serves it.

    Attributes:
        folder: The checkpoint's.
        architectures: As its configuration names them.
        model_class: vLLM's, in words.
        features: What else vLLM knows of it: hybrid, multimodal and the like.
        dtype: Of activations, and of KV where nothing else was asked for.
        kv_dtype: Of KV.
        max_model_len: Longest request.
        num_layers: Decoder layers, by the configuration.
        most_token_bytes: KV bytes of a token by the configuration, if every decoder layer kept all; None: unknown.
        weight_bytes: Of all parameters; None where the model could not be made.
        drafter: What drafts; None: nothing does.
        block_bytes: Of one block in the pool: as many layers as the largest group has.
        groups: Its KV-cache groups, as vLLM divides the layers; empty where they could not be asked.
        by_config: Why the layers could not be asked, so that nothing but the configuration speaks; "": they were.
        refused: Why layerkv does not serve it, and what to set; "": it does.
        sizes: The division of the KV memory that was asked about.
        too_small: Why that memory does not do, and what to set; "": it does.
    """

    folder: str
    architectures: tuple[str, ...]
    model_class: str
    features: tuple[str, ...]
    dtype: str
    kv_dtype: str
    max_model_len: int
    num_layers: int
    most_token_bytes: int | None = None
    weight_bytes: int | None = None
    drafter: Drafter | None = None
    block_bytes: int = 0
    groups: tuple[Group, ...] = ()
    by_config: str = ""
    refused: str = ""
    sizes: Sizes | None = None
    too_small: str = ""

    @property
    def problems(self) -> list[str]:
        """What stands in the way of a start with layerkv, each with what to set."""
        unknown = ""
        if self.by_config and not self.refused:
            unknown = f"{self.folder}: whether its layers can be served is not known before a start ({self.by_config})"
            unknown += "; start vLLM with layerkv: it refuses what it cannot serve, with the reason"
        return [each for each in (self.refused, self.too_small, unknown) if each]

    @property
    def num_kv_layers(self) -> int:
        """Layers with a KV cache, states included."""
        return sum(group.num_layers for group in self.groups)

    def request_bytes(self, num_tokens: int) -> int:
        """KV memory of a request that has so many tokens and decodes, in whole blocks."""
        return self.block_bytes * sum(group.num_blocks(num_tokens) for group in self.groups)

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON-ready data."""
        counts = sorted({EXAMPLE_TOKENS, self.max_model_len})
        return {
            **asdict(self),
            "drafter": "" if self.drafter is None else str(self.drafter),
            "groups": [{**asdict(group), "token_bytes": group.token_bytes} for group in self.groups],
            "kv_layers": self.num_kv_layers,
            "request_bytes": {str(count): self.request_bytes(count) for count in counts} if self.groups else {},
            "supported": not self.refused and not self.by_config,
        }


# How it is told -------------------------------------------------------------------------------------------------------


def model_rows(facts: ModelFacts) -> list[tuple[str, str]]:
    """What is said of a model, a subject and what was found of each."""
    rows = [("architecture", _architecture(facts))]
    if facts.weight_bytes is not None:
        rows.append(("weights", format_bytes(facts.weight_bytes)))
    kv_layers = f", {facts.num_kv_layers} with a KV cache or state" if facts.groups else ""
    rows.append(("layers", f"{facts.num_layers} decoder layers by the configuration{kv_layers}"))
    if facts.drafter is not None:
        rows.append(("drafter", str(facts.drafter)))
    if facts.by_config:
        rows.append(("groups", f"by the configuration only: {facts.by_config}"))
        if facts.most_token_bytes is not None:
            most = format_bytes(facts.most_token_bytes)
            rows.append(("KV", f"{most} per token by the configuration, if every layer keeps all tokens"))
    if facts.groups:
        rows += [("KV", _kv_of_token(facts)), ("a request", _requests(facts))]
    if facts.sizes is not None:
        rows += _size_rows(facts, facts.sizes)
    elif facts.groups and not facts.problems:
        rows.append(("pool and zone", "give --kv-memory SIZE to see them"))
    rows.append(("with layerkv", _verdict(facts)))
    return rows


def _verdict(facts: ModelFacts) -> str:
    if facts.refused:
        return "refused"
    if facts.by_config:
        return "not known before a start"
    return "yes, but not in this KV memory" if facts.too_small else "yes"


def _architecture(facts: ModelFacts) -> str:
    named = ", ".join(facts.architectures) or "none named"
    made = "" if facts.model_class in facts.architectures else f" (as {facts.model_class})"
    features = "".join(f", {feature}" for feature in facts.features)
    return f"{named}{made}{features}, KV in {facts.kv_dtype}, requests of up to {facts.max_model_len:,} tokens"


def _kv_of_token(facts: ModelFacts) -> str:
    grows = sum(group.token_bytes for group in facts.groups if group.kept_tokens is None)
    parts = [f"{format_bytes(grows)} per token"] if grows else []
    for kept in sorted({group.kept_tokens for group in facts.groups if group.kept_tokens}):
        more = sum(group.token_bytes for group in facts.groups if group.kept_tokens == kept)
        parts.append(f"{format_bytes(more)} for each of the last {kept:,}")
    if any(group.kept_tokens == 0 for group in facts.groups):
        states = sum(group.state_blocks for group in facts.groups if group.kept_tokens == 0)
        parts.append(f"{format_bytes(states * facts.block_bytes)} of state per request")
    return ", ".join(parts)


def _requests(facts: ModelFacts) -> str:
    told = [
        f"{format_bytes(facts.request_bytes(count))} of KV memory with {count:,} tokens"
        for count in sorted({min(EXAMPLE_TOKENS, facts.max_model_len), facts.max_model_len})
    ]
    return f"{', '.join(told)}, in whole blocks of {format_bytes(facts.block_bytes)}"


def _size_rows(facts: ModelFacts, sizes: Sizes) -> Iterable[tuple[str, str]]:
    per_request = sum(group.num_blocks(facts.max_model_len) for group in facts.groups)
    usable = sizes.pool_blocks - 1  # vLLM keeps one block as its null block
    tokens = "" if sizes.block_tokens is None else f", {usable * sizes.block_tokens:,} tokens"
    share = sizes.zone_bytes / sizes.kv_bytes
    zone_tokens = "" if sizes.block_tokens is None else f", {sizes.zone_blocks * sizes.block_tokens:,} tokens"
    yield "pool", f"{usable:,} blocks{tokens}: {usable / per_request:.1f} requests of {facts.max_model_len:,} tokens"
    yield "lane zone", f"{sizes.zone_blocks:,} blocks{zone_tokens}, in {format_bytes(sizes.zone_bytes)} ({share:.1%})"
    few = ", less than such a request: set host_memory" if sizes.host_blocks < per_request else ""
    yield "host memory", f"{sizes.host_blocks:,} blocks, {format_bytes(sizes.host_bytes)}{few}"


def groups_table(facts: ModelFacts) -> list[tuple[str, ...]]:
    """The groups, a row each: number, kind, layers, tokens of a block, bytes of its page in a layer, KV of a token."""
    return [
        (
            str(number),
            group.kind,
            str(group.num_layers),
            f"{group.block_tokens:,}",
            " or ".join(format_bytes(size) for size in sorted(set(group.page_bytes))),
            format_bytes(group.token_bytes) if group.token_bytes else "",
        )
        for number, group in enumerate(facts.groups)
    ]
