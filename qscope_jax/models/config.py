"""What distinguishes one decoder from another, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qscope_jax.errors import ArchitectureError, ConfigError

MIXERS = ("full_attention", "sliding_attention", "gated_delta")
FEED_FORWARDS = ("dense", "moe")
DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("silu", "gelu_tanh")
ATTENTIONS = ("auto", "reference", "cudnn")


@dataclass(frozen=True)
class Llama3Scaling:
    """Rotary frequencies of Llama 3.1: long wavelengths are stretched, short ones kept, those between interpolated."""

    factor: float
    """By how much the longest wavelengths are stretched."""
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int
    """Positions of the first training; wavelengths are measured by it."""

    def __post_init__(self):
        """Check ranges."""
        if not 0 < self.low_freq_factor < self.high_freq_factor or self.factor < 1 or self.original_max_positions < 1:
            raise ConfigError(f"rotary scaling {self}: expected factor at least 1 and low_freq_factor below high_freq_factor")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape and the choices that make it one family or another.

    Hashable, so it may be a static argument of `jax.jit`. The per-layer tuples name a mixer and a feed-forward module for each
    layer: a new family adds names to `MIXERS` or `FEED_FORWARDS` and fields here, never a second decoder.
    """

    family: str
    """`model_type` of the Hugging Face config: selects the table of weight names."""
    vocab_size: int
    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mixers: tuple[str, ...]
    """Mixer of each layer, one of `MIXERS`; its length is the number of layers."""
    feed_forwards: tuple[str, ...]
    """Feed-forward of each layer, one of `FEED_FORWARDS`."""
    num_experts: int = 0
    """E; experts of each `moe` feed-forward."""
    experts_per_token: int = 0
    """Experts that each token goes through."""
    d_expert: int = 0
    """Hidden width of an expert."""
    norm_expert_weights: bool = False
    """Whether the chosen experts' probabilities are scaled to sum to 1."""
    d_shared_expert: int = 0
    """Hidden width of the gated expert that every token goes through as well (Qwen3.5-MoE); 0 is none."""
    fused_experts: bool = False
    """Whether the checkpoint holds all experts of a layer in one tensor; says nothing about the computation."""
    delta_key_heads: int = 0
    """Heads of `gated_delta` that queries and keys have; each serves as many value heads as there are a key head."""
    delta_value_heads: int = 0
    delta_key_dim: int = 0
    """Width of a query or key of `gated_delta`."""
    delta_value_dim: int = 0
    delta_conv: int = 4
    """Tokens that the short convolution of `gated_delta` sees, its own included."""
    delta_chunk: int = 64
    """Tokens that the chunked form of `gated_delta` takes at once; changes rounding only."""
    rope_theta: float = 1e6
    rope_scaling: Llama3Scaling | None = None
    rotary_dim: int = 0
    """Leading channels of a head that are rotated (Qwen3.5: a quarter); 0 is all."""
    norm_eps: float = 1e-6
    qk_norm: bool = True
    """RMS norm on every query and key head before rotary positions (Qwen3)."""
    unit_offset_norms: bool = False
    """Norms multiply by 1 + w, in float32, instead of by w (Gemma, Qwen3.5)."""
    output_norms: bool = False
    """Further norms on what mixer and feed-forward add to the residual stream (Gemma-2)."""
    activation: str = "silu"
    """Of the gated feed-forward: `silu`, or `gelu_tanh` (GELU by its tanh approximation)."""
    scale_embeddings: bool = False
    """Multiply embeddings by sqrt(D) (Gemma)."""
    sliding_window: int = 0
    """Tokens that a query of `sliding_attention` sees, itself included."""
    attention_gate: bool = False
    """Attention's output times the sigmoid of a gate that the query projection computes beside each head's query (Qwen3.5)."""
    attention_scale: float = 0.0
    """What scores are multiplied by; 0 is 1 / sqrt(head_dim)."""
    attention_softcap: float = 0.0
    """Scores become cap * tanh(score / cap); 0 leaves them."""
    logit_softcap: float = 0.0
    """The same for the scores over the vocabulary."""
    tie_embeddings: bool = False
    max_positions: int = 32768
    dtype: str = "bfloat16"
    """Dtype of weights and activations; norms, softmax and rotary angles are float32 whatever it is."""
    remat: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    period: int = 0
    """Layers in one scanned block. 0: the smallest repeating period of the layer pattern, so that compile time does not grow with
    depth. `num_layers`: no scan at all, which spares the CPU a copy of every layer's weights."""
    attention: str = "auto"
    """`reference`, `cudnn`, or `auto` (chosen by backend and dtype in `models/attention.py`)."""
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    hf: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The Hugging Face config as read, so that an export keeps what we do not interpret."""

    def __post_init__(self):
        """Check that the sizes fit each other."""
        if not self.mixers or len(self.mixers) != len(self.feed_forwards):
            raise ConfigError(f"a decoder needs one mixer and one feed-forward a layer, got {len(self.mixers)} and {len(self.feed_forwards)}")
        if unknown := set(self.mixers) - set(MIXERS) | set(self.feed_forwards) - set(FEED_FORWARDS):
            raise ArchitectureError(f"layer kinds {sorted(unknown)} are not implemented; known: {', '.join(MIXERS + FEED_FORWARDS)}")
        for name in ("vocab_size", "d_model", "d_ff", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model config: {name} is {getattr(self, name)}, expected a positive integer")
        for name, known in (("dtype", DTYPES), ("activation", ACTIVATIONS), ("attention", ATTENTIONS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"model config: {name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"model config: {self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly")
        if "moe" in self.feed_forwards and not (1 <= self.experts_per_token <= self.num_experts and self.d_expert >= 1):
            raise ConfigError(f"model config: {self.experts_per_token} of {self.num_experts} experts, {self.d_expert} wide, are none or too many")
        if "sliding_attention" in self.mixers and self.sliding_window < 1:
            raise ConfigError(f"model config: sliding_window is {self.sliding_window}, expected a positive integer")
        if "gated_delta" in self.mixers:
            sizes = (self.delta_key_heads, self.delta_value_heads, self.delta_key_dim, self.delta_value_dim, self.delta_conv, self.delta_chunk)
            if min(sizes) < 1 or self.delta_value_heads % self.delta_key_heads:
                raise ConfigError(f"model config: gated_delta has sizes {sizes}, expected positive ones, with value heads a multiple of key heads")
        if self.rotary_width % 2 or not 2 <= self.rotary_width <= self.head_dim:
            raise ConfigError(f"model config: head_dim is {self.head_dim}, of which {self.rotary_width} are rotary; expected an even number of them")
        if self.period == 0:
            object.__setattr__(self, "period", _smallest_period(tuple(zip(self.mixers, self.feed_forwards, strict=True))))
        if self.period < 1 or self.num_layers % self.period:
            raise ConfigError(f"model config: a period of {self.period} layers does not divide {self.num_layers} layers")

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.mixers)

    @property
    def rotary_width(self) -> int:
        """Channels of a head that are rotated."""
        return self.rotary_dim or self.head_dim

    @property
    def repeats(self) -> int:
        """How often the period repeats: the length of the scan."""
        return self.num_layers // self.period

    def unrolled(self) -> "ModelConfig":
        """The same decoder without a scan over layers."""
        return replace(self, period=self.num_layers)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read a Hugging Face `config.json`.

        Raises:
            ArchitectureError: a family, or a variant of one, that is not implemented (named, never approximated).
            ConfigError: a required key is missing or of the wrong type.
        """
        from qscope_jax.models.hf_config import read_hf  # which builds on this module

        return read_hf(config)

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face `config.json` of this decoder; keys read with it and not interpreted here are kept."""
        from qscope_jax.models.hf_config import write_hf

        return {**self.hf, **write_hf(self)}


def _smallest_period(pattern: tuple[Any, ...]) -> int:
    length = len(pattern)
    return next(p for p in range(1, length + 1) if length % p == 0 and pattern == pattern[:p] * (length // p))
