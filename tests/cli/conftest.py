"""A small random model with a tokenizer, and random SAEs for it, as folders that verbs open by path."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from qscope_jax.cli.main import main
from qscope_jax.data.hub import open_source
from qscope_jax.demo.recipe import MODEL, make_tokenizer
from qscope_jax.models.config import ModelConfig
from qscope_jax.models.decoder import Decoder
from qscope_jax.models.weights import save_decoder
from qscope_jax.sae.arrays import SAEArrays
from qscope_jax.sae.formats.own_format import write_folder

SENTENCE = "My grandmother made tea in the garden. 奶奶在花园里泡茶。 "
WIDTH, FEATURES, LAYERS = 16, 40, 3


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """Folder of a Qwen3 of three layers, 16 wide, with a tokenizer of some 300 tokens; it continues with varied tokens."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    scratch = folder.parent / "tokenizer"
    make_tokenizer(scratch, [SENTENCE] * 2)
    size = dict(hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=LAYERS, head_dim=8, vocab_size=320, max_position_embeddings=128)
    save_decoder(_random_decoder(ModelConfig.from_hf(MODEL | size)), folder, carry_from=open_source(scratch))
    return str(folder)


@pytest.fixture(scope="session")
def saes(model) -> str:
    """Folder of random SAEs for every layer: 40 features, 4 of them active at a token."""
    return _write_saes(Path(model).parent / "saes", WIDTH)


@pytest.fixture(scope="session")
def wide_saes(model) -> str:
    """The same for a model twice as wide."""
    return _write_saes(Path(model).parent / "wide", 2 * WIDTH)


class Answer(NamedTuple):
    """What a run of the program gave."""

    status: int
    out: str
    err: str


@pytest.fixture
def qscope(capsys) -> Callable[..., Answer]:
    """Run the program in this process."""

    def run(*arguments: object) -> Answer:
        status = main([str(argument) for argument in arguments])
        return Answer(status, *capsys.readouterr())

    return run


@pytest.fixture
def refused(qscope) -> Callable[..., str]:
    """Run the program, which must refuse in one line with status 2; the line."""

    def run(*arguments: object) -> str:
        answer = qscope(*arguments)
        lines = answer.err.splitlines()
        assert answer.status == 2 and len(lines) == 1, answer
        assert lines[0].startswith("qscope: error: ")
        return lines[0]

    return run


def _write_saes(folder: Path, width: int) -> str:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    arrays = {
        layer: SAEArrays(draw(FEATURES, width), draw(FEATURES, width), draw(FEATURES), draw(width), 4, "topk", False, None, {"layer": layer})
        for layer in range(LAYERS)
    }
    write_folder(folder, arrays)
    return str(folder)


def _random_decoder(config: ModelConfig) -> Decoder:
    """Weights large enough that its next token depends on the prompt; drawn by NumPy, which compiles nothing."""
    rng = np.random.default_rng(1)

    def draw(path, leaf) -> np.ndarray:
        gain = "norm" in jax.tree_util.keystr(path)
        return np.asarray(gain + (0.1 if gain else 0.4) * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: Decoder(config, jax.random.key(0))))
