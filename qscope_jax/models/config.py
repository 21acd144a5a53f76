"""What distinguishes one decoder from another, as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qscope_jax.errors import ArchitectureError, ConfigError

MIXERS = ("full_attention",)
FEED_FORWARDS = ("dense",)
DTYPES = ("float32", "bfloat16", "float16")
ATTENTIONS = ("auto", "reference", "cudnn")


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
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    qk_norm: bool = True
    """RMS norm on every query and key head before rotary positions (Qwen3)."""
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
        for name, known in (("dtype", DTYPES), ("attention", ATTENTIONS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"model config: {name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"model config: {self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise ConfigError(f"model config: head_dim is {self.head_dim}; rotary positions need an even width")
        if self.period == 0:
            object.__setattr__(self, "period", _smallest_period(tuple(zip(self.mixers, self.feed_forwards, strict=True))))
        if self.period < 1 or self.num_layers % self.period:
            raise ConfigError(f"model config: a period of {self.period} layers does not divide {self.num_layers} layers")

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.mixers)

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
        family = config.get("model_type")
        if family not in _READERS:
            raise ArchitectureError(f"config.json: model_type is {family!r}; implemented: {', '.join(sorted(_READERS))}")
        try:
            return _READERS[family](config)
        except KeyError as error:
            raise ConfigError(f"config.json ({family}): required key {error} is missing") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"config.json ({family}): {error}; the file does not look like a {family} config") from error

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face `config.json` of this decoder; keys read with it and not interpreted here are kept."""
        return {**self.hf, **_WRITERS[self.family](self)}


def _read_qwen3(config: Mapping[str, Any]) -> ModelConfig:
    _refuse(config, "attention_bias", (False, None))
    _refuse(config, "hidden_act", ("silu", None))
    _refuse(config, "use_sliding_window", (False, None))
    _refuse(config, "quantization_config", (None,))
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ArchitectureError(f"config.json (qwen3): rotary scaling {rope!r} is not implemented, only plain rotary positions are")
    num_layers = int(config["num_hidden_layers"])
    if (kinds := config.get("layer_types")) is not None and list(kinds) != ["full_attention"] * num_layers:
        raise ArchitectureError(f"config.json (qwen3): layer_types={kinds!r}, expected {num_layers} times full_attention")
    heads = int(config["num_attention_heads"])
    eos = config.get("eos_token_id")
    return ModelConfig(
        family="qwen3",
        vocab_size=int(config["vocab_size"]),
        d_model=int(config["hidden_size"]),
        d_ff=int(config["intermediate_size"]),
        num_heads=heads,
        # The defaults are those of transformers, where an absent key is not the same as a null one.
        num_kv_heads=int(config.get("num_key_value_heads", 32) or heads),
        head_dim=int(config.get("head_dim", 128) or int(config["hidden_size"]) // heads),
        mixers=("full_attention",) * num_layers,
        feed_forwards=("dense",) * num_layers,
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 1e4))),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_positions=int(config.get("max_position_embeddings", 32768)),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        eos_token_ids=() if eos is None else (int(eos),) if isinstance(eos, int) else tuple(int(i) for i in eos),
        bos_token_id=config.get("bos_token_id"),
        hf=dict(config),
    )


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    eos = config.eos_token_ids
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
        "hidden_act": "silu",
        "attention_bias": False,
        "dtype": config.dtype,
        "torch_dtype": config.dtype,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "bos_token_id": config.bos_token_id,
    }


_READERS = {"qwen3": _read_qwen3}
_WRITERS = {"qwen3": _write_qwen3}


def _refuse(config: Mapping[str, Any], key: str, allowed: tuple[Any, ...]) -> None:
    if config.get(key) not in allowed:
        raise ArchitectureError(f"config.json ({config['model_type']}): {key}={config[key]!r} is not implemented, expected {allowed[0]!r}")


def _smallest_period(pattern: tuple[Any, ...]) -> int:
    length = len(pattern)
    return next(p for p in range(1, length + 1) if length % p == 0 and pattern == pattern[:p] * (length // p))
