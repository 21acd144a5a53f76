"""`qscope generate`: continue prompts."""

import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qscope_jax.cli.options import Texts, positional
from qscope_jax.cli.results import check_writable, write_result
from qscope_jax.cli.sources import ModelOptions, SamplingOptions, check_texts, open_model, sampling_config, with_stops
from qscope_jax.cli.streaming import TextStream

if TYPE_CHECKING:
    from qscope_jax.models.language_model import Completion, LanguageModel
    from qscope_jax.models.sampling import SamplingConfig


@dataclass(frozen=True, kw_only=True)
class Config(SamplingOptions, ModelOptions):
    """Continue one or several prompts, all of them in one batch."""

    prompts: Texts = positional(())
    """Text to continue."""
    chat: bool = False
    """Wrap each prompt as a user's turn in the tokenizer's chat template."""
    stream: bool = True
    """Show tokens as they come, where there is one prompt and a terminal."""
    out: str = ""
    """JSON file for the completions."""


def run(config: Config) -> dict[str, Any]:
    """Continue the prompts; returns the completions."""
    prompts = check_texts(config.prompts, "prompt")
    check_writable(config.out)
    sampling = sampling_config(config)
    model = open_model(config.model, config.dtype, config.mesh)
    sampling = with_stops(sampling, config.stop, model)
    if config.stream and len(prompts) == 1 and sys.stdout.isatty():
        completions = _stream(model, prompts, sampling, config.chat)
    else:
        completions = model.generate(prompts, sampling, chat=config.chat)
        _show(completions)
    result = {"completions": [asdict(completion) for completion in completions]}
    write_result(config.out, "generate", config, result)
    return result


def _stream(model: "LanguageModel", prompts: list[str], sampling: "SamplingConfig", chat: bool) -> "list[Completion]":
    stops = model.config.eos_token_ids if sampling.stop_token_ids is None else sampling.stop_token_ids
    stream = TextStream(model.tokenizer.decode, lambda piece: print(piece, end="", flush=True), stops)
    print(prompts[0], end="\n" if chat else "", flush=True)
    completions = model.generate(prompts, sampling, chat=chat, on_tokens=lambda rows: stream.update(rows[0]))
    stream.finish(completions[0].token_ids)
    print()
    return completions


def _show(completions: "list[Completion]") -> None:
    from qscope_jax.report.terminal import print_table

    print_table(("prompt", "continuation", "tokens"), [(c.prompt, c.text, len(c.token_ids)) for c in completions])
