"""SAE formats of other projects, told apart by their files and tensor names so that an error can name them.

Sources: SAELens 6.54, eai-sparsify 1.3, dictionary_learning (2025), openai/sparse_autoencoder, Llamascopium 2.0 and the published
checkpoints of Gemma Scope, Llama Scope, Goodfire and DeepSeek-R1-Distill SAEs.
"""

from collections.abc import Collection, Mapping

from qscope_jax.data.files import read_json
from qscope_jax.data.hub import Source

_FILES: Mapping[str, tuple[str, ...]] = {
    "SAELens": ("sae_weights.safetensors", "cfg.json"),
    "sparsify": ("sae.safetensors", "cfg.json"),
    "dictionary_learning": ("ae.pt",),
    "Llama Scope": ("hyperparams.json", "checkpoints/final.safetensors"),
    "Gemma Scope": ("params.npz",),
    "Gemma Scope 2": ("params.safetensors",),
    "Llama Scope R1": ("sae_weights.safetensors", "config.json"),
}
"""Format -> files that lie together, relative to some folder of the source."""

_CONFIG_KEYS = {"sae_type": "Llamascopium", "dict_class": "dictionary_learning", "dict_size": "zactheaipm/qwenscope"}
"""Key of a `config.json` -> the format that it belongs to, where files alone do not tell."""

_TENSORS: tuple[tuple[str, frozenset[str]], ...] = (
    ("dictionary_learning, as an interrupted run leaves it", frozenset({"ae", "optimizer"})),
    ("OpenAI sparse_autoencoder", frozenset({"pre_bias", "latent_bias", "encoder.weight"})),
    ("Goodfire", frozenset({"encoder_linear.weight", "decoder_linear.weight"})),
    ("sparsify", frozenset({"encoder.weight", "encoder.bias", "W_dec", "b_dec"})),
    ("dictionary_learning (TopK or BatchTopK)", frozenset({"encoder.weight", "encoder.bias", "decoder.weight", "b_dec"})),
    ("dictionary_learning (Gated)", frozenset({"encoder.weight", "decoder.weight", "gate_bias"})),
    ("dictionary_learning (Standard)", frozenset({"encoder.weight", "encoder.bias", "decoder.weight", "bias"})),
    ("dictionary_learning (Matryoshka)", frozenset({"W_enc", "W_dec", "b_enc", "b_dec", "group_sizes"})),
    ("Llama Scope R1", frozenset({"encoder.weight", "decoder.weight", "log_jumprelu_threshold"})),
    ("Llama Scope, DeepSeek-R1-Distill or dictionary_learning", frozenset({"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"})),
    ("SAELens or dictionary_learning (JumpReLU)", frozenset({"W_enc", "W_dec", "b_enc", "b_dec", "threshold"})),
    ("SAELens (Gated)", frozenset({"W_enc", "W_dec", "b_gate", "r_mag"})),
    ("Gemma Scope", frozenset({"w_enc", "w_dec", "b_enc", "b_dec"})),
    ("Llamascopium", frozenset({"W_E", "W_D"})),
)


def foreign_folder(source: Source, files: Collection[str]) -> str | None:
    """Name of the foreign format that a source is in; None where it is none of them.

    Reads at most one small JSON file.

    Args:
        source: The folder or repository.
        files: Its files, as `source_files` lists them.
    """
    known = set(files)
    for name, (first, *others) in _FILES.items():
        for file in sorted(known):
            base = file.removesuffix(first)
            if base != file and (not base or base.endswith("/")) and all(base + other in known for other in others):
                return _by_config(source, f"{base}config.json", known) or name
    return _by_config(source, "config.json", known)


def foreign_tensors(names: Collection[str]) -> str | None:
    """Name of the foreign format whose tensors a single file holds; None where it is none of them."""
    return next((format_name for format_name, needed in _TENSORS if needed <= set(names)), None)


def _by_config(source: Source, file: str, known: Collection[str]) -> str | None:
    if file not in known:
        return None
    config = read_json(source.path(file))
    if config.get("architecture") == "jump_relu":
        return "Gemma Scope 2"
    keys = set(config) | set(config["trainer"] if isinstance(config.get("trainer"), dict) else ())
    return next((name for key, name in _CONFIG_KEYS.items() if key in keys), None)
