"""Cost profiles derived from published figures of devices and models, for simulations without a measured one.

The derivation is a roofline: a step takes as long as its matrix products need, or as long as reading the weights
takes, whichever is more; attention and tensor-parallel communication come on top. Published peaks are cut down by
the constants below. What comes out is plausible to some ten percent, which is enough to compare policies with each
other and too little to promise latencies: for that, measure with `layerkv profile`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd, pow
from types import MappingProxyType
from typing import Final, TypeVar

from layerkv.core.cost import CostProfile, Curve

# One way of writing refusals for all of layerkv: the helpers of the configuration, private to the package.
from layerkv.strict_yaml import did_you_mean, show, wrong
from layerkv.units import format_bytes

__all__ = ["DEVICES", "MODELS", "Device", "Model", "Preset", "derive_profile", "kv_memory_bytes", "preset"]

COMPUTE_EFFICIENCY: Final = 0.55
"""Share of the peak FLOP/s that prefill reaches (large fp16 GEMMs, FlashAttention). Not measured: chosen by assumption
(docs/simulator.md)."""

BANDWIDTH_EFFICIENCY: Final = 0.8
"""Share of the peak memory bandwidth that reading weights and KV reaches. Not measured: chosen by assumption
(docs/simulator.md)."""

STEP_S: Final = 2.5e-3
"""Fixed cost of a step: scheduling, input preparation, kernel launch, sampling, output. Not measured: chosen by
assumption (docs/simulator.md)."""

REQUEST_S: Final = 20e-6
"""What each request of a step adds on the CPU. Not measured: chosen by assumption (docs/simulator.md)."""

ALL_REDUCE_LATENCY_S: Final = 10e-6
"""What an all-reduce takes whatever its size. 8 us over NVLink, up to 20 us over PCIe. Not measured: chosen by
assumption (docs/simulator.md)."""

LAYER_HOOK_S: Final = 20e-6
"""What submitting the copies of one layer adds to a step with layered requests. Not measured: chosen by assumption
(docs/simulator.md)."""

EXPOSED_SHARE: Final = 0.1
"""Share of overlapped copy time that shows all the same: copies and compute share memory bandwidth. Not measured:
chosen by assumption (docs/simulator.md)."""

LINK_LATENCY_S: Final = 20e-6
"""What a copy over the host link takes whatever its size. Not measured: chosen by assumption (docs/simulator.md)."""

ACTIVATION_BYTES: Final = 2 << 30
"""What each GPU keeps for activations, CUDA graphs and workspaces beside weights and KV. Not measured: chosen by
assumption (docs/simulator.md)."""

FP16_BYTES: Final = 2

# Where the curve over tokens is sampled; the corner of the roofline is added to them.
_SAMPLED_TOKENS: Final = (1, 8, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
# And for mixtures of experts, of which few tokens read few.
_FEW_TOKENS: Final = (2, 4, 16, 48, 96)

_GIB: Final = 1 << 30
_Named = TypeVar("_Named")


@dataclass(frozen=True, slots=True)
class Device:
    """Published figures of one GPU and its links.

    Attributes:
        name: The preset's name.
        flops_per_s: Peak dense fp16/bf16 tensor-core FLOP/s (fp32 accumulation, no sparsity).
        memory_bytes_per_s: Peak memory bandwidth.
        memory_bytes: Memory that the driver reports.
        host_link_bytes_per_s: What a pinned copy reaches per direction. Each GPU is taken to have a link of its own.
        all_reduce_bytes_per_s: Bus bandwidth of an all-reduce between the GPUs of one host (nccl-tests' `busbw`).
        source: Where the figures come from.
    """

    name: str
    flops_per_s: float
    memory_bytes_per_s: float
    memory_bytes: int
    host_link_bytes_per_s: float
    all_reduce_bytes_per_s: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Mixtures of experts in the place of the dense MLP, in all layers but the first ones. Immutable.

    Attributes:
        num_routed: Experts of a layer of which each token chooses some.
        num_chosen: How many it chooses; every expert is taken to be as likely as the others.
        width: Of an expert's MLP.
        num_shared: Experts that compute every token.
        num_dense_layers: First layers, which have the dense MLP.
        weight_bits: Of a parameter in a routed expert's matrices.
    """

    num_routed: int
    num_chosen: int
    width: int
    num_shared: int = 0
    num_dense_layers: int = 0
    weight_bits: float = 8.0 * FP16_BYTES

    def num_read(self, num_tokens: float) -> float:
        """Routed experts of a layer that so many tokens choose, on average."""
        return self.num_routed * (1 - pow(1 - self.num_chosen / self.num_routed, num_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """Multi-head latent attention (MLA): one vector for all heads is what a layer keeps of a token. Immutable.

    Attributes:
        rank: Width of the latent vector.
        rope_dim: Width of the part with positions, of that vector and of each query head.
        nope_dim: Width of the rest of a query head.
        value_dim: Width of a value head.
    """

    rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Sliding-window layers, which attend to the last tokens only. Immutable.

    Attributes:
        num_layers: How many of the model's layers.
        num_tokens: How far they look back.
    """

    num_layers: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Model:
    """Shape of a decoder with gated MLP and untied embeddings, in fp16: dense with grouped-query attention, unless the
    last attributes say otherwise.

    Attributes:
        name: The preset's name.
        num_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the dense MLP.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; 1 with latent attention.
        head_dim: Width of a head.
        vocab_size: Rows of the embedding.
        source: Where the figures come from.
        experts: Its mixtures of experts.
        latent: Its latent attention.
        window: Its sliding-window layers. What they keep is not counted: see `kv_bytes_per_token`.
        has_biases: Whether its matrices have biases, and its heads sinks (gpt-oss).
    """

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    source: str
    experts: Experts | None = None
    latent: Latent | None = None
    window: Window | None = None
    has_biases: bool = False

    @property
    def num_full_layers(self) -> int:
        """Layers that attend to all tokens, and keep KV of all."""
        return self.num_layers - (self.window.num_layers if self.window is not None else 0)

    @property
    def layer_parameters(self) -> int:
        """Parameters of all decoder layers."""
        return self._parameters_without_routed() + self._routed_parameters()

    @property
    def token_parameters(self) -> int:
        """Parameters of all decoder layers that compute a token: each costs two FLOPs."""
        routed = self._routed_parameters()
        if self.experts is not None:
            routed = routed * self.experts.num_chosen // self.experts.num_routed
        return self._parameters_without_routed() + routed

    @property
    def parameters(self) -> int:
        """All parameters: layers, embedding, output head and the last norm."""
        return self.layer_parameters + 2 * self.vocab_size * self.hidden_size + self.hidden_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights over all ranks."""
        routed = self._routed_parameters()
        return (self.parameters - routed) * FP16_BYTES + self._routed_bytes()

    @property
    def step_weight_bytes(self) -> int:
        """Bytes of the weights that a step of many tokens reads: all but the embedding, of which it reads rows."""
        return self.weight_bytes - self.vocab_size * self.hidden_size * FP16_BYTES

    def read_weight_bytes(self, num_tokens: float) -> float:
        """Bytes of the weights that a step of so many tokens reads: not of experts that no token has chosen."""
        if self.experts is None:
            return self.step_weight_bytes
        share = self.experts.num_read(num_tokens) / self.experts.num_routed
        return self.step_weight_bytes - (1 - share) * self._routed_bytes()

    @property
    def kv_elements(self) -> int:
        """What one layer keeps of one token."""
        if self.latent is not None:
            return self.latent.rank + self.latent.rope_dim
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def kv_bytes_per_token(self) -> int:
        """KV bytes of one token over all ranks and all layers that keep all tokens.

        What sliding-window layers keep does not grow with the request beyond their window; it is left out of blocks.
        """
        return self.num_full_layers * self.kv_elements * FP16_BYTES

    @property
    def pair_flops(self) -> int:
        """FLOPs of one query-key pair in one layer: a product and a weighted sum, two FLOPs per element of each head.

        Of latent attention in a prefill, where vLLM makes keys and values of the latent vectors first.
        """
        key_and_value = 2 * self.head_dim
        if self.latent is not None:
            key_and_value = self.latent.nope_dim + self.latent.rope_dim + self.latent.value_dim
        return 2 * self.num_heads * key_and_value

    @property
    def decode_pair_flops(self) -> int:
        """The same in a decode, where latent attention works on the latent vectors themselves."""
        if self.latent is None:
            return self.pair_flops
        return 2 * self.num_heads * (2 * self.latent.rank + self.latent.rope_dim)

    def _parameters_without_routed(self) -> int:
        num_dense, shared, router = self.num_layers, 0, 0
        if (experts := self.experts) is not None:
            num_dense = experts.num_dense_layers
            shared = experts.num_shared * 3 * self.hidden_size * experts.width
            router = experts.num_routed * (self.hidden_size + self.has_biases)
        dense = 3 * self.hidden_size * self.intermediate_size
        norms = 2 * self.hidden_size
        mlps = num_dense * dense + (self.num_layers - num_dense) * (shared + router)
        return self.num_layers * (self._attention_parameters() + norms) + mlps

    def _attention_parameters(self) -> int:
        if (latent := self.latent) is not None:
            queries = self.hidden_size * self.num_heads * (latent.nope_dim + latent.rope_dim)
            down = self.hidden_size * (latent.rank + latent.rope_dim) + latent.rank  # and the vector's norm
            up = latent.rank * self.num_heads * (latent.nope_dim + latent.value_dim)
            return queries + down + up + self.num_heads * latent.value_dim * self.hidden_size
        matrices = 2 * self.hidden_size * (self.num_heads + self.num_kv_heads) * self.head_dim
        if not self.has_biases:
            return matrices
        sinks = self.num_heads
        return matrices + (self.num_heads + 2 * self.num_kv_heads) * self.head_dim + self.hidden_size + sinks

    def _routed_parameters(self) -> int:
        return self._num_routed_experts() * (self._matrices_of_expert() + self._biases_of_expert())

    def _routed_bytes(self) -> int:
        if self.experts is None:
            return 0
        matrix_bytes = self._matrices_of_expert() * self.experts.weight_bits / 8
        return self._num_routed_experts() * int(matrix_bytes + self._biases_of_expert() * FP16_BYTES)

    def _num_routed_experts(self) -> int:
        if self.experts is None:
            return 0
        return (self.num_layers - self.experts.num_dense_layers) * self.experts.num_routed

    def _matrices_of_expert(self) -> int:
        return 3 * self.hidden_size * self.experts.width if self.experts is not None else 0

    def _biases_of_expert(self) -> int:
        return 2 * self.experts.width + self.hidden_size if self.experts is not None and self.has_biases else 0


@dataclass(frozen=True, slots=True)
class Preset:
    """A model on some GPUs of one kind, with the profile derived for them."""

    device: Device
    model: Model
    tensor_parallel: int
    profile: CostProfile


_PCIE4: Final = "host link: assumed, about 75 % of PCIe Gen4 x16 (31.5 GB/s)"
_PCIE5: Final = "host link: assumed, about 82 % of PCIe Gen5 x16 (63 GB/s)"
_MEMORY: Final = "memory size: nvidia-smi memory.total"

_DEVICES: Final = (
    Device(
        name="L20",
        flops_per_s=119.5e12,
        memory_bytes_per_s=864e9,
        memory_bytes=46068 << 20,
        host_link_bytes_per_s=24e9,
        all_reduce_bytes_per_s=20e9,
        source=f"NVIDIA L20 data sheet (2023); {_MEMORY}; {_PCIE4}; all-reduce: assumed, PCIe, no NVLink",
    ),
    Device(
        name="A100",
        flops_per_s=312e12,
        memory_bytes_per_s=2039e9,
        memory_bytes=81920 << 20,
        host_link_bytes_per_s=24e9,
        all_reduce_bytes_per_s=230e9,
        source=f"NVIDIA A100 80GB SXM data sheet (2021); {_MEMORY}; {_PCIE4}; all-reduce: usual in nccl-tests",
    ),
    Device(
        name="H100",
        flops_per_s=989.4e12,
        memory_bytes_per_s=3350e9,
        memory_bytes=81559 << 20,
        host_link_bytes_per_s=52e9,
        all_reduce_bytes_per_s=360e9,
        source=f"NVIDIA H100 SXM data sheet (2023); {_MEMORY}; {_PCIE5}; all-reduce: assumed, 80 % of NVLink 4",
    ),
    Device(
        name="H200",
        flops_per_s=989.4e12,
        memory_bytes_per_s=4800e9,
        memory_bytes=143771 << 20,
        host_link_bytes_per_s=52e9,
        all_reduce_bytes_per_s=360e9,
        source=f"NVIDIA H200 SXM data sheet (2024); {_MEMORY}; {_PCIE5}; all-reduce: assumed, 80 % of NVLink 4",
    ),
)

DEVICES: Final[Mapping[str, Device]] = MappingProxyType({device.name: device for device in _DEVICES})
"""GPUs by preset name. A100 is the 80 GB SXM, H100 and H200 are SXM."""

_MODELS: Final = (
    Model(
        name="llama-2-7b",
        num_layers=32,
        hidden_size=4096,
        intermediate_size=11008,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        vocab_size=32000,
        source="meta-llama/Llama-2-7b-hf config.json",
    ),
    Model(
        name="llama-3.1-8b",
        num_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        source="meta-llama/Llama-3.1-8B config.json",
    ),
    Model(
        name="yi-34b",
        num_layers=60,
        hidden_size=7168,
        intermediate_size=20480,
        num_heads=56,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=64000,
        source="01-ai/Yi-34B config.json",
    ),
    Model(
        name="llama-3.1-70b",
        num_layers=80,
        hidden_size=8192,
        intermediate_size=28672,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=128256,
        source="meta-llama/Llama-3.1-70B config.json",
    ),
    Model(
        name="deepseek-v2-lite",
        num_layers=27,
        hidden_size=2048,
        intermediate_size=10944,
        num_heads=16,
        num_kv_heads=1,
        head_dim=192,
        vocab_size=102400,
        source="deepseek-ai/DeepSeek-V2-Lite config.json",
        experts=Experts(num_routed=64, num_chosen=6, width=1408, num_shared=2, num_dense_layers=1),
        latent=Latent(rank=512, rope_dim=64, nope_dim=128, value_dim=128),
    ),
    Model(
        name="gpt-oss-20b",
        num_layers=24,
        hidden_size=2880,
        intermediate_size=2880,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=201088,
        source="openai/gpt-oss-20b config.json; experts in MXFP4: 4 bits, and 8 for each 32 parameters",
        experts=Experts(num_routed=32, num_chosen=4, width=2880, weight_bits=4.25),
        window=Window(num_layers=12, num_tokens=128),
        has_biases=True,
    ),
)

MODELS: Final[Mapping[str, Model]] = MappingProxyType({model.name: model for model in _MODELS})
"""Models by preset name."""


def preset(device_name: str, model_name: str, tp: int, *, where: str = "preset") -> Preset:
    """Look up a device and a model and derive their profile; `where` is the path of their keys in messages.

    Raises:
        ConfigError: an unknown name, or a `tp` that does not divide the model's heads.
    """
    device = _look_up(device_name, DEVICES, where=f"{where}.device", kind="device")
    model = _look_up(model_name, MODELS, where=f"{where}.model", kind="model")
    # A rank holds whole KV heads: vLLM would copy them to more ranks, and KV would not be split evenly.
    heads = gcd(model.num_heads, model.num_kv_heads)
    if tp < 1 or heads % tp:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        problem = f"found {show(tp)}; expected a number that divides the heads of {model.name}: {divisors}"
        raise wrong(f"{where}.tensor_parallel", problem, "set tensor_parallel to one of them")
    return Preset(device=device, model=model, tensor_parallel=tp, profile=derive_profile(device, model, tp))


def derive_profile(device: Device, model: Model, tensor_parallel: int) -> CostProfile:
    """The roofline profile of `model` split evenly over `tensor_parallel` GPUs of one host."""
    flops_per_s = device.flops_per_s * COMPUTE_EFFICIENCY * tensor_parallel
    memory_bytes_per_s = device.memory_bytes_per_s * BANDWIDTH_EFFICIENCY * tensor_parallel
    link = _link_curve(device, tensor_parallel)
    read_s = 100_000 * model.kv_bytes_per_token / memory_bytes_per_s
    computed_s = 100_000 * model.num_full_layers * model.decode_pair_flops / flops_per_s  # more with latent attention
    # A request is taken to be longer than the window.
    window_tokens = model.window.num_layers * model.window.num_tokens if model.window is not None else 0
    window_bytes = window_tokens * model.kv_elements * FP16_BYTES
    return CostProfile(
        name=f"{model.name} on {tensor_parallel} x {device.name} (derived)",
        step_s=STEP_S,
        request_s=REQUEST_S + window_bytes / memory_bytes_per_s,
        tokens=_tokens_curve(device, model, tensor_parallel),
        decode_context=Curve([(0, 0.0), (100_000, max(read_s, computed_s))]),
        pair_s=model.num_full_layers * model.pair_flops / flops_per_s,
        store=link,
        load=link,
        layered_step_s=LAYER_HOOK_S * model.num_layers,
        exposed_share=EXPOSED_SHARE,
        kv_bytes_per_token=model.kv_bytes_per_token,
        made={
            "by": "layerkv.sim.presets, a roofline and not a measurement",
            "device": device.source,
            "model": model.source,
            "efficiency": f"compute {COMPUTE_EFFICIENCY}, memory bandwidth {BANDWIDTH_EFFICIENCY}",
        },
    )


def kv_memory_bytes(
    device: Device, model: Model, tensor_parallel: int, utilization: float = 0.9, *, where: str = "preset"
) -> int:
    """What weights and activations leave for KV, over all GPUs; `utilization` is `--gpu-memory-utilization`.

    Raises:
        ConfigError: nothing is left.
    """
    usable = int(device.memory_bytes * utilization) * tensor_parallel
    left = usable - model.weight_bytes - ACTIVATION_BYTES * tensor_parallel
    if left < model.kv_bytes_per_token:
        needed = (
            f"{model.weight_bytes / _GIB:.1f}GiB of weights and {format_bytes(ACTIVATION_BYTES)} per GPU beside them"
        )
        problem = (
            f"found {tensor_parallel} x {device.name} with {usable / _GIB:.1f}GiB to use; expected room for {needed}"
        )
        raise wrong(f"{where}.model", problem, "set a larger tensor_parallel, a smaller model or a larger device")
    return left


def _tokens_curve(device: Device, model: Model, tensor_parallel: int) -> Curve:
    """Tokens of a step -> seconds of its matrix products and all-reduces; nothing for a step without tokens."""
    flops_per_s = device.flops_per_s * COMPUTE_EFFICIENCY * tensor_parallel
    memory_bytes_per_s = device.memory_bytes_per_s * BANDWIDTH_EFFICIENCY * tensor_parallel
    # The output head is left out: it runs once per request, and where it counts the step is bound by reading anyway.
    token_flops = 2 * model.token_parameters
    if model.window is not None:  # each token attends to the window behind it, whatever the context
        token_flops += model.window.num_layers * model.window.num_tokens * model.pair_flops
    token_s = token_flops / flops_per_s
    reduce_s, reduce_token_s = _all_reduce_s(device, model, tensor_parallel)
    few = _FEW_TOKENS if model.experts is not None else ()
    corner = model.step_weight_bytes / memory_bytes_per_s / token_s
    return Curve(
        [
            (0, 0.0),
            *(
                (n, max(model.read_weight_bytes(n) / memory_bytes_per_s, n * token_s) + reduce_s + n * reduce_token_s)
                for n in sorted({*map(float, (*few, *_SAMPLED_TOKENS)), corner})
            ),
        ]
    )


def _all_reduce_s(device: Device, model: Model, tensor_parallel: int) -> tuple[float, float]:
    """Seconds of all-reduces per step and per token: one behind attention and one behind the MLP of each layer."""
    if tensor_parallel == 1:
        return 0.0, 0.0
    num_reduces = 2 * model.num_layers
    ring = 2 * (tensor_parallel - 1) / tensor_parallel
    token_s = ring * model.hidden_size * FP16_BYTES / device.all_reduce_bytes_per_s
    return num_reduces * ALL_REDUCE_LATENCY_S, num_reduces * token_s


def _link_curve(device: Device, tensor_parallel: int) -> Curve:
    """Bytes over all ranks -> seconds: KV is split evenly, and every GPU copies its part over its own link."""
    bytes_per_s = device.host_link_bytes_per_s * tensor_parallel
    return Curve([(0, LINK_LATENCY_S), (_GIB, LINK_LATENCY_S + _GIB / bytes_per_s)])


def _look_up(name: str, known: Mapping[str, _Named], *, where: str, kind: str) -> _Named:
    if name in known:
        return known[name]
    problem = f"found {show(name)}; expected one of the {kind} presets: {', '.join(known)}"
    by_lower_case = {other.lower(): other for other in known}
    same = by_lower_case.get(name.lower())
    hint = f"did you mean {same}?" if same else did_you_mean(name, known)
    raise wrong(where, problem, hint or "set one of them, or give a cost profile of your own with profile")
