"""What a user holds: decoder, tokenizer and mesh together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.data.batches import TokenBatch, pad_batch
from qscope_jax.data.buckets import bucket_length
from qscope_jax.data.hub import Source, open_source
from qscope_jax.errors import InputError, SourceError
from qscope_jax.models.config import DTYPES, ModelConfig
from qscope_jax.models.conversion import left_out
from qscope_jax.models.decoder import Decoder, DecoderOutput
from qscope_jax.models.edits import Edit
from qscope_jax.models.generation import GenerationState, decode, prefill
from qscope_jax.models.orbax_folder import is_orbax_folder, load_orbax, save_orbax
from qscope_jax.models.sampling import Sampler, SamplingConfig
from qscope_jax.models.weights import load_decoder, read_config, save_decoder
from qscope_jax.parallel.mesh import adopt_mesh, make_mesh


@dataclass(frozen=True)
class Completion:
    """One continued prompt: its text, its tokens (stop token included) and whether it met a stop token."""

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    stopped: bool


@dataclass(frozen=True)
class Residuals:
    """Residual streams of a batch of texts.

    Attributes:
        values: One stream for each layer asked for, in that order.
        tokens: Token ids, 0 at padding.
        mask: True at tokens, False at padding (on the right).
    """

    values: Float[Array, "M B T D"]
    tokens: Int[np.ndarray, "B T"]
    mask: Bool[np.ndarray, "B T"]


@partial(jax.jit, static_argnames=("stop_after", "logits"))
def forward(
    decoder: Decoder,
    tokens_BT: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    edits: tuple[Edit, ...] = (),
    taps: Int[Array, " M"] | None = None,
    *,
    stop_after: int | None = None,
    logits: Literal["all", "last"] = "all",
) -> DecoderOutput:
    """The decoder's forward pass, jitted once for all models of a shape; see `Decoder.__call__`."""
    return decoder(tokens_BT, segment_ids=segment_ids, edits=edits, taps=taps, stop_after=stop_after, logits=logits)


class LanguageModel:
    """A decoder with its tokenizer and mesh."""

    def __init__(self, decoder: Decoder, source: Source | None = None, mesh: Mesh | None = None, tokenizer: Any = None):
        """Hold a decoder.

        Args:
            decoder: Parameters, on `mesh`.
            source: Where it came from; the tokenizer is read from there when first needed.
            mesh: Its mesh; default one device.
            tokenizer: A Hugging Face tokenizer, if not the source's.
        """
        self.decoder = decoder
        self.source = source
        self.mesh = make_mesh() if mesh is None else mesh
        if tokenizer is not None:
            self.tokenizer = tokenizer

    @property
    def config(self) -> ModelConfig:
        """The decoder's config."""
        return self.decoder.config

    @property
    def name(self) -> str:
        """What the model was loaded from."""
        return self.source.name if self.source else "in memory"

    @cached_property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer; transformers is imported when it is first needed.

        Raises:
            SourceError: the source has no tokenizer.
        """
        if self.source is None:
            raise SourceError("this model was made in memory; pass tokenizer= to LanguageModel")
        # Where no file of it exists, transformers makes an empty tokenizer of the model's type, whose every text has no tokens.
        if not any(self.source.has(file) for file in ("tokenizer.json", "vocab.json")):
            raise SourceError(f"{self.source.name}: has no tokenizer; put tokenizer.json and tokenizer_config.json there")
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.source.folder or self.source.name, revision=self.source.revision)
        except (OSError, ValueError) as error:
            raise SourceError(f"{self.source.name}: its tokenizer cannot be read; mend tokenizer.json and tokenizer_config.json") from error

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text.

        Qwen tokenizers add no begin-of-sequence token. A text that begins with one, as chat templates of Gemma and Llama write it, gets no second.

        Raises:
            InputError: no text, or a text without a single token.
        """
        if isinstance(texts, str) or not len(texts):
            raise InputError("expected a non-empty list of texts")
        ids = self.tokenizer(list(texts), add_special_tokens=True)["input_ids"]
        bos, bos_id = getattr(self.tokenizer, "bos_token", None), getattr(self.tokenizer, "bos_token_id", None)
        for index, text in enumerate(texts):
            if bos and text.startswith(bos) and ids[index][:2] == [bos_id, bos_id]:
                ids[index] = ids[index][1:]
        if empty := [index for index, row in enumerate(ids) if not row]:
            raise InputError(f"text {empty[0]} is empty; every text needs at least one token")
        return ids

    def batch(self, texts: Sequence[str], side: Literal["left", "right"] = "right") -> TokenBatch:
        """Tokenise and pad to a bucketed length, so that new lengths rarely compile.

        Raises:
            InputError: an empty text, or one of more tokens than the model has positions.
        """
        ids = self.tokenize(texts)
        longest = max(range(len(ids)), key=lambda row: len(ids[row]))
        if len(ids[longest]) > self.config.max_positions:
            raise InputError(f"text {longest} has {len(ids[longest])} tokens; {self.name} has {self.config.max_positions} positions, cut the text")
        return pad_batch(ids, length=bucket_length(max(map(len, ids))), side=side)

    def check_layer(self, layer: int) -> int:
        """The layer, if the model has it.

        Raises:
            InputError: it has not.
        """
        if not 0 <= layer < self.config.num_layers:
            raise InputError(f"layer {layer} is out of range; {self.name} has layers 0 to {self.config.num_layers - 1}")
        return layer

    def residuals(self, texts: Sequence[str], layers: Sequence[int], *, edits: Sequence[Edit] = ()) -> Residuals:
        """Residual streams after the given layers (after both residual adds, before the final norm); nothing above is computed.

        Raises:
            InputError: a layer out of range or given twice, or an empty text.
        """
        if len(set(layers)) != len(layers) or not layers:
            raise InputError(f"layers {list(layers)}: give one or more, none of them twice")
        highest = max(self.check_layer(layer) for layer in layers)
        batch = self.batch(texts)
        out = self._forward(batch, edits, layers, stop_after=highest)
        assert out.residuals is not None
        return Residuals(out.residuals, batch.tokens_BT, batch.segment_ids_BT > 0)

    def logits(self, texts: Sequence[str], *, edits: Sequence[Edit] = ()) -> tuple[Float[Array, "B T V"], Bool[np.ndarray, "B T"]]:
        """Scores over the vocabulary at every position, and the mask of tokens (padding is on the right)."""
        batch = self.batch(texts)
        out = self._forward(batch, edits, None)
        assert out.logits is not None
        return out.logits, batch.segment_ids_BT > 0

    def generate(
        self,
        prompts: Sequence[str],
        config: SamplingConfig | None = None,
        *,
        edits: Sequence[Edit] = (),
        chat: bool = False,
        row_seeds: Sequence[int] | None = None,
        on_tokens: Callable[[list[list[int]]], None] | None = None,
        **settings: Any,
    ) -> list[Completion]:
        """Continue every prompt.

        Args:
            prompts: Texts, or user turns with `chat=True` (the tokenizer's chat template is applied).
            config: How to draw; greedy by default.
            edits: Interventions on the residual stream, see `qscope_jax.steer`.
            chat: Wrap each prompt as a user's turn.
            row_seeds: What each row folds into the seed; default its number. Rows of equal prompt and row seed draw alike.
            on_tokens: Called every few steps with the tokens generated so far in each row, for streaming.
            **settings: Fields of `SamplingConfig` that replace those of `config`.

        Raises:
            InputError: an empty prompt, one that does not fit the model's context, or a setting out of range.
        """
        try:
            config = replace(config or SamplingConfig(), **settings)
        except TypeError as error:
            raise InputError(f"unknown generation setting ({error}); known are the fields of SamplingConfig") from error
        texts = [self._chat(prompt) for prompt in prompts] if chat and not isinstance(prompts, str) else prompts
        batch = self.batch(texts, side="left")
        room = bucket_length(config.max_new_tokens)
        longest = int((batch.segment_ids_BT > 0).sum(axis=1).max())
        if longest + config.max_new_tokens > self.config.max_positions:
            raise InputError(f"{longest} prompt tokens and {config.max_new_tokens} new ones exceed the model's {self.config.max_positions} positions")
        self._check_edits(edits, len(texts))
        sampler = Sampler.make(config, self.config.eos_token_ids, len(texts), row_seeds)
        with jax.set_mesh(self.mesh):
            state = prefill(self.decoder, batch.tokens_BT, batch.segment_ids_BT, sampler, tuple(edits), new_tokens=room)
            stride = config.max_new_tokens if on_tokens is None else 4
            for limit in (*range(1, config.max_new_tokens, stride), config.max_new_tokens):
                state = decode(self.decoder, state, sampler, tuple(edits), jnp.int32(limit))
                if on_tokens is not None:
                    on_tokens(_rows(state))
                    if bool(jnp.all(state.done_B)):
                        break
        stopped = np.asarray(state.done_B).tolist()
        return [
            Completion(prompt, self._decode(ids, stop), tuple(ids), stop) for prompt, ids, stop in zip(prompts, _rows(state), stopped, strict=True)
        ]

    def save(self, path: str | Path, format: str = "hf") -> None:
        """Write a Hugging Face (`hf`) or Orbax (`orbax`) folder, weights bit for bit as they are here.

        The source's tokenizer files, and those of its tensors that the decoder leaves out, go with them.

        Raises:
            InputError: an unknown format.
            SourceError: `path` holds something else than a model, or cannot be written.
        """
        if format not in ("hf", "orbax"):
            raise InputError(f"format {format!r} is not one that a model is saved in; expected hf or orbax")
        save = save_orbax if format == "orbax" else save_decoder
        save(self.decoder, Path(path), carry_from=self.source, carried=left_out(self.source, self.config))

    def left_out(self) -> list[str]:
        """Names of the source's tensors that this decoder knowingly leaves out (vision tower, multi-token prediction); a save carries them."""
        return [tensor.name for tensor in left_out(self.source, self.config)]

    def _forward(self, batch: TokenBatch, edits: Sequence[Edit], layers: Sequence[int] | None, stop_after: int | None = None) -> DecoderOutput:
        self._check_edits(edits, len(batch.tokens_BT))
        taps = None if layers is None else jnp.asarray(layers, jnp.int32)
        with jax.set_mesh(self.mesh):
            return forward(self.decoder, batch.tokens_BT, batch.segment_ids_BT, tuple(edits), taps, stop_after=stop_after)

    def _check_edits(self, edits: Sequence[Edit], rows: int) -> None:
        for edit in edits:
            edit.check(self.config.num_layers, self.config.d_model, rows)

    def _chat(self, prompt: str) -> str:
        try:
            return self.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        except ValueError as error:
            raise InputError(f"{self.name}: its tokenizer has no chat template; generate without chat") from error

    def _decode(self, ids: list[int], stopped: bool) -> str:
        return self.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=False)


def load_model(
    source: str | Path, *, dtype: str | None = None, mesh: Mesh | str | None = None, revision: str | None = None, scan: bool | None = None
) -> LanguageModel:
    """Load a model from a Hugging Face folder, an Orbax folder (see `models/orbax_folder.py`) or a hub id.

    Args:
        source: Folder or `owner/name`.
        dtype: `float32`, `bfloat16` or `float16`; default the checkpoint's own, tensor by tensor.
        mesh: A mesh, or its description such as `data=2,tensor=4`; default one device.
        revision: Branch, tag or commit on the hub.
        scan: Scan over layers (compile time independent of depth). Default: on accelerators yes, on a CPU no, where a scan would copy
            every layer's weights at each step.

    Raises:
        QscopeError: what is wrong with the source, in one line.
    """
    where = open_source(source, revision)
    config = read_config(where)
    if dtype is not None:
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r} is not one that a model can have; expected {', '.join(DTYPES)}")
        config = replace(config, dtype=dtype)
    if scan is False or (scan is None and jax.default_backend() == "cpu"):
        config = config.unrolled()
    mesh = adopt_mesh(mesh) if isinstance(mesh, Mesh) else make_mesh(mesh or "")
    load = load_orbax if is_orbax_folder(where) else load_decoder
    return LanguageModel(load(where, config, mesh, keep_dtypes=dtype is None), where, mesh)


def _rows(state: GenerationState) -> list[list[int]]:
    tokens, counts = np.asarray(state.tokens_BT), np.asarray(state.counts_B)
    return [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]
