import re
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Literal

import pytest

from qscope_jax.cli.main import VERBS
from qscope_jax.cli.options import Integers, Numbers, Texts, field_docstrings, help_text, parse, positional, read_config
from qscope_jax.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
VERB_OF = {"sae": "train-sae", "eval": "eval-sae", "code_switch": "code-switch", "sasft": "sft"}


@dataclass(frozen=True, kw_only=True)
class Base:
    seed: int = 0
    """Seed of the draws."""


@dataclass(frozen=True, kw_only=True)
class Example(Base):
    """Try every kind of option."""

    texts: Texts = positional(())
    """Text."""
    layer: int
    """Layer."""
    rate: float = 0.5
    """Rate."""
    layers: Integers | None = None
    """Layers."""
    doses: Numbers = (1.0,)
    """Doses."""
    by: Literal["max", "mean"] | None = None
    """Rank."""
    keep: bool = False
    """Keep 50 % of it."""
    name: str = "tiny"
    """Name."""
    stop: Texts | None = None
    """Stops."""


def verb_config(command: str) -> type:
    """The options of a verb, or of a verb's action."""
    verb, _, action = command.partition(" ")
    module = import_module(f"qscope_jax.cli.{verb.replace('-', '_')}")
    return module.ACTIONS[action][0] if action else module.Config


def commands() -> list[str]:
    """Every verb, with each of its actions where it has some."""
    actions = {verb: getattr(import_module(f"qscope_jax.cli.{verb.replace('-', '_')}"), "ACTIONS", {}) for verb in VERBS}
    return [command for verb in VERBS for command in [f"{verb} {action}" for action in actions[verb]] or [verb]]


def filled(*arguments: str) -> Example:
    return parse("example", Example, arguments)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "options.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "options.yaml")

    return write


def test_flags_of_every_kind_are_converted():
    flags = "--layer 3 --rate 1e-3 --layers 2,4-6 --doses -5,20 --by mean --keep --name 7 --stop . 13"
    config = filled("a text", "null", *flags.split())
    expected = Example(
        texts=("a text", "null"), layer=3, rate=1e-3, layers=(2, 4, 5, 6), doses=(-5.0, 20.0), by="mean", keep=True, name="7", stop=(".", "13")
    )
    assert config == expected


def test_a_flag_may_be_spelled_as_its_key():
    assert filled("--layer=3", "--no_keep", "a_text", "--", "--not_a_flag").texts == ("a_text", "--not_a_flag")


def test_defaults_are_the_dataclass_s_own():
    assert filled("--layer", "3") == Example(layer=3)


def test_yaml_fills_every_kind_and_flags_win(yaml_file):
    path = yaml_file("texts: [one, two]\nlayer: 2\nrate: 1e0\nlayers: 3\ndoses: [1, 2.5]\nby: max\nkeep: true\nname: -1\nstop: [., 13]\nseed: 4\n")
    from_file = Example(
        texts=("one", "two"), layer=2, rate=1.0, layers=(3,), doses=(1.0, 2.5), by="max", keep=True, name="-1", stop=(".", "13"), seed=4
    )
    assert filled("--config", path) == from_file
    config = filled("--config", path, "three", "--layer", "0", "--no-keep", "--layers", "all", "--stop", "!")
    assert (config.texts, config.layer, config.keep, config.layers, config.stop, config.seed) == (("three",), 0, False, None, ("!",), 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("layrs: 3", "unknown key 'layrs' for qscope example; did you mean layers?"),
        ("zzz: 3", "unknown key 'zzz' for qscope example; known are texts, layer"),
        ("layer: three", "layer is 'three', expected a whole number"),
        ("layer: '3'", "layer is '3', expected a whole number"),
        ("layer: 1.5", "layer is 1.5, expected a whole number"),
        ("layer: true", "layer is True, expected a whole number"),
        ("layer: null", "layer is None, expected a whole number"),
        ("layer: [1]", "layer is [1], expected a whole number"),
        ("rate: fast", "rate is 'fast', expected a number"),
        ("rate: '0.5'", "rate is '0.5', expected a number"),
        ("keep: 'yes'", "keep is 'yes', expected true or false"),
        ("by: min", "by is 'min', expected max or mean"),
        ("name: [a]", "name is ['a'], expected text"),
        ("texts: abc", "texts is 'abc', expected a list of texts"),
        ("texts: [[a]]", "expected a list of texts"),
        ("layers: 2,x", "layers is '2,x', expected whole numbers such as 3 or 2,4-5, or all"),
        ("doses: {a: 1}", "expected numbers such as 5 or 5,20"),
        ("doses: true", "doses is True, expected numbers"),
        ("- layer", "holds a list"),
        ("", "holds nothing"),
        ("a: [", "is not valid YAML"),
        ("a: \x00", "is not valid YAML"),
    ],
)
def test_bad_yaml_is_refused_with_file_and_key(yaml_file, text, said):
    path = yaml_file(text)
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        filled("--config", path, "--layer", "1")
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_yaml_file_is_refused():
    with pytest.raises(ConfigError, match=r"^nowhere\.yaml: cannot be read \(No such file"):
        filled("--config", "nowhere.yaml", "--layer", "1")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--layer", "x"], "--layer is 'x', expected a whole number"),
        (["--layer"], "argument --layer: expected one argument"),
        (["--layer", "1", "--doses", ""], "--doses is '', expected numbers such as 5 or 5,20"),
        (["--layer", "1", "--layers", "5-2"], "--layers is '5-2', expected whole numbers"),
        (["--layer", "1", "--by", "min"], "--by is 'min', expected max or mean"),
        (["--layer", "1", "--layr", "2"], "unrecognized arguments: --layr; did you mean --layer?"),
        (["--layer", "1", "--lay", "2"], "unrecognized arguments: --lay"),
        ([], "--layer is missing; qscope example needs it"),
    ],
)
def test_bad_flags_are_refused_by_name(flags, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        filled(*flags)


def test_an_inherited_field_has_a_docstring_and_comes_last():
    assert field_docstrings(Example)["seed"] == "Seed of the draws."
    text = help_text("example", Example)
    assert text.index("--stop") < text.index("--seed")
    assert "Keep 50 % of it." in text


@pytest.mark.parametrize("verb", commands())
def test_every_option_has_one_sentence(verb):
    config = verb_config(verb)
    text = " ".join(help_text(verb, config).split())
    for name, sentence in field_docstrings(config).items():
        assert sentence.endswith(".") and sentence in text, name
    assert set(field_docstrings(config)) == {field.name for field in fields(config)}
    assert max(map(len, help_text(verb, config).splitlines())) <= 80


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_yaml_fills_its_verb_and_says_how_to_run_it(path):
    verb = VERB_OF.get(path.parent.name, path.parent.name)
    file = re.escape(str(path.relative_to(CONFIGS)))
    said = re.findall(rf"^#   qscope ({verb}(?: [a-z]+)?) --config configs/{file}", path.read_text("utf-8"), re.MULTILINE)
    assert said
    for command in said:
        parse(command, verb_config(command), ["--config", str(path)])


def test_a_shipped_yaml_keeps_its_values():
    values = read_config(str(CONFIGS / "steer/qwen3_1.7b_layer10.yaml"), "steer", verb_config("steer"))
    assert values["feature"] == (14614,) and values["strength"] == (5.0, 20.0, 100.0) and values["layer"] == 10


def test_defaults_of_options_are_the_library_s():
    from qscope_jax.models.sampling import SamplingConfig
    from qscope_jax.sae.metrics import EvaluationConfig
    from qscope_jax.training.activations import ActivationConfig
    from qscope_jax.training.loop import LoopConfig
    from qscope_jax.training.sae import SAEConfig

    pairs = [("generate", SamplingConfig), ("eval-sae", EvaluationConfig), ("train-sae", ActivationConfig), ("train-sae", LoopConfig),
             ("train-sae", SAEConfig)]  # fmt: skip
    for verb, library in pairs:
        ours = {field.name: field.default for field in fields(verb_config(verb))}
        theirs = {field.name: field.default for field in fields(library)}
        required = {"layers", "num_features", "k", "steps"}
        shared = (set(ours) & set(theirs)) - required
        assert len(shared) >= 2 and {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
