"""Options of a verb: one frozen dataclass, filled from `--config FILE.yaml` and flags, of which flags win.

The dataclass says everything: a field's name is the key in YAML and, with dashes, the flag; its annotation is the type; the docstring
below it is the help. jsonargparse reads the flags and checks every value.
"""

import ast
import dataclasses
import difflib
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser, DefaultHelpFormatter

from qscope_jax.errors import ConfigError

T = TypeVar("T")
Integers = tuple[int, ...]
Numbers = tuple[float, ...]
Texts = tuple[str, ...]

_POSITIONAL = "positional"
_PATHS = ("out", "page", "file", "norm_file", "text")
_LONG_RANGE = 100_000


def positional(default: Any = MISSING) -> Any:
    """A field that is given without a flag, such as a prompt."""
    return field(default=default, metadata={_POSITIONAL: True})


def same_named(settings: Any, config: Any) -> dict[str, Any]:
    """The options of a verb that a dataclass of the library has too, under the same names."""
    names = {item.name for item in dataclasses.fields(config)}
    return {item.name: getattr(config, item.name) for item in dataclasses.fields(settings) if item.name in names}


def parse(verb: str, config: type[T], arguments: Sequence[str]) -> T:
    """Fill a verb's dataclass.

    Args:
        verb: Its name, for messages.
        config: The dataclass.
        arguments: What follows the verb on the command line.

    Raises:
        ConfigError: an unknown, ill-typed or missing option, named with its file where it came from one.
    """
    parser = _parser(verb, config)
    try:
        given = dict(vars(parser.parse_args(_joined(arguments), defaults=False)))
    except ArgumentError as error:
        raise ConfigError(f"{_flag_problem(str(error), config)} (see qscope {verb} --help)") from error
    path = given.pop("config", None)
    # A positional that was not given is there all the same, empty.
    flags = {key: _frozen(value) for key, value in given.items() if value not in ((), []) and not (value is None and key in _positionals(config))}
    values = {**(read_config(path, verb, config) if path else {}), **flags}
    if missing := [f for f in _fields(config) if f.name not in values and f.default is MISSING]:
        name = missing[0].name.upper() if missing[0].metadata.get(_POSITIONAL) else _flag(missing[0])
        raise ConfigError(f"{name} is missing; qscope {verb} needs it (see qscope {verb} --help)")
    return config(**values)


def read_config(path: str, verb: str, config: type) -> dict[str, Any]:
    """The checked values of a YAML file, for a verb's dataclass.

    Raises:
        ConfigError: the file is missing, unreadable or no mapping, or one of its keys is unknown or ill-typed; both are named.
    """
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}); expected a YAML file of options for qscope {verb}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not valid YAML ({error}); mend it") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: holds {_kind(loaded)}, expected lines such as `seed: 0`")
    fields = {f.name: f for f in _fields(config)}
    return {key: _checked(path, verb, fields, key, value) for key, value in loaded.items()}


def check_at_least(config: Any, least: int, *names: str) -> None:
    """Check that whole numbers are large enough; None is.

    Raises:
        ConfigError: one of them is not.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}, expected {least} or more")


def help_text(verb: str, config: type) -> str:
    """What `qscope VERB --help` prints."""
    return _parser(verb, config).format_help().rstrip()


def field_docstrings(config: type) -> dict[str, str]:
    """The docstring below each field of a dataclass and of the dataclasses it builds on."""
    found: dict[str, str] = {}
    for owner in config.__mro__:
        if not dataclasses.is_dataclass(owner):
            continue
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]).body
        for statement, following in zip(body, body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and isinstance(following, ast.Expr):
                found.setdefault(statement.target.id, inspect.cleandoc(str(ast.literal_eval(following.value))).replace("\n", " "))
    return found


class _Help(DefaultHelpFormatter):
    """A sentence for each option, with its default where that says something."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **{**settings, "max_help_position": 28, "width": 80})

    def _get_help_string(self, action: Any) -> str:
        default = action.default
        silent = default in (None, "", (), False, "==SUPPRESS==") or (default is True)
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        return (action.help or "") + ("" if silent else f" Default {shown}.").replace("%", "%%")


def _parser(verb: str, config: type) -> ArgumentParser:
    about = inspect.cleandoc(config.__doc__ or "")
    parser = ArgumentParser(prog=f"qscope {verb}", description=about, formatter_class=_Help, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", type=str, metavar="FILE", help="YAML file of options; flags override it.")
    docstrings = field_docstrings(config)
    for item in _fields(config):
        default = None if item.default is MISSING else item.default
        common: dict[str, Any] = {"help": docstrings[item.name], "default": default}
        inner = _inner(item)
        if inner is bool:
            parser.add_argument(_flag(item), action=ActionYesNo(no_prefix="no-"), **common)
        elif item.metadata.get(_POSITIONAL):
            # Never required here, because --config can give it; jsonargparse allows positionals no default.
            name, nargs = item.name.upper(), "*" if inner == Texts else "?"
            parser.add_argument(item.name, type=_converter(item), metavar=name.removesuffix("S"), nargs=nargs, help=docstrings[item.name])
        else:
            many = {"nargs": "+"} if inner == Texts else {}
            parser.add_argument(_flag(item), type=_converter(item), metavar=_metavar(item), **many, **common)
    return parser


def _fields(config: type) -> list[Field[Any]]:
    """Fields of a dataclass, its own before those it inherits."""
    order = [name for owner in config.__mro__ for name in owner.__dict__.get("__annotations__", {})]
    return sorted(dataclasses.fields(config), key=lambda item: order.index(item.name))


def _positionals(config: type) -> set[str]:
    return {item.name for item in _fields(config) if item.metadata.get(_POSITIONAL)}


def _flag(item: Field[Any]) -> str:
    return "--" + item.name.replace("_", "-")


def _inner(item: Field[Any]) -> Any:
    """The annotation without `| None`."""
    return next(kind for kind in typing.get_args(item.type) if kind is not types.NoneType) if _optional(item) else item.type


def _optional(item: Field[Any]) -> bool:
    return typing.get_origin(item.type) in (types.UnionType, typing.Union)


def _metavar(item: Field[Any]) -> str:
    kind = _inner(item)
    if typing.get_origin(kind) is Literal:
        return "|".join(typing.get_args(kind))
    return {int: "N", float: "X", Integers: "N,N", Numbers: "X,X"}.get(kind, "PATH" if item.name in _PATHS else "TEXT")


def _converter(item: Field[Any]) -> Any:
    """What jsonargparse converts and checks a value with: lists have a short form, all else is as annotated."""
    integers = read_integers if _optional(item) else _some_integers
    short: dict[Any, Callable[[Any], Any]] = {Integers: integers, Numbers: read_numbers, Texts: _text, str: _text}
    return short.get(_inner(item), item.type)


def read_integers(value: Any) -> Integers | None:
    """Whole numbers: 3, "2,4-5", [2, 4, 5], or None for "all"."""
    if value is None or value == "all":
        return None
    found: list[int] = []
    for part in _parts(value):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part, re.ASCII)
        if not match or int(match[2] or match[1]) - int(match[1]) not in range(_LONG_RANGE):
            raise ValueError("not a list of whole numbers")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(found)


def _some_integers(value: Any) -> Integers:
    found = read_integers(value)
    if found is None:
        raise ValueError("not a list of whole numbers")
    return found


def read_numbers(value: Any) -> Numbers:
    """Numbers: 5, "5,20" or [5, 20]."""
    return tuple(float(part) for part in _parts(value))


def _parts(value: Any) -> list[str]:
    items = list(value) if isinstance(value, list | tuple) else str(value).split(",")
    if any(isinstance(item, bool) for item in [value, *items]):
        raise ValueError("not a list of numbers")
    return [str(item).strip() for item in items]


def _text(value: Any) -> str:
    """Text; YAML reads a bare -1 or 10 as a number, which is text all the same where text is expected."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("not text")
    return str(value)


def _checked(path: str, verb: str, fields: dict[str, Field[Any]], key: Any, value: Any) -> Any:
    """One value of a YAML file, converted."""
    if key not in fields:
        near = difflib.get_close_matches(str(key), fields, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(fields)}"
        raise ConfigError(f"{path}: unknown key {key!r} for qscope {verb}; {hint}")
    item = fields[key]
    kind = _inner(item)
    # jsonargparse reads "3" as 3 and "yes" as true; in a file, whose values have types of their own, neither is meant. But 1e-3 is text in YAML.
    quoted = isinstance(value, str) and not (kind is float and re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value))
    doubtful = (kind in (int, float) and quoted) or (kind is bool and not isinstance(value, bool))
    try:
        if value is None and _optional(item):
            return None
        if value is None or doubtful or (kind == Texts and not isinstance(value, list)):
            raise ValueError("of another type")
        return tuple(_text(text) for text in typing.cast(list[Any], value)) if kind == Texts else _convert(item, value)
    except (ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {key} is {value!r}, expected {_expected(item)}") from error


def _convert(item: Field[Any], value: Any) -> Any:
    """A value as the field's type, converted and checked by jsonargparse."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=_converter(item))
    return parser.parse_object({"value": value}).value


def _flag_problem(message: str, config: type) -> str:
    """What is wrong with a flag, in our words where jsonargparse names the option."""
    match = re.search(r'Parser key "(\w+)"', message) or re.match(r"argument (?:--)?([\w-]+): invalid", message)
    item = next((f for f in _fields(config) if match and f.name == match[1].replace("-", "_")), None)
    if item is None:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], [_flag(f) for f in _fields(config)], 1) if unknown else []
        return re.sub(r"\s+", " ", message) + (f"; did you mean {near[0]}?" if near else "")
    # argparse quotes the value, jsonargparse does not.
    value = re.search(r"invalid \w+ value: (.*)", message) or re.search(r"(?:Got|Given) value: (.*)", message)
    shown = "unreadable" if value is None else value[1] if "invalid" in value[0] else repr(value[1])
    return f"{_flag(item)} is {shown}, expected {_expected(item)}"


def _expected(item: Field[Any]) -> str:
    kind = _inner(item)
    if typing.get_origin(kind) is Literal:
        return " or ".join(typing.get_args(kind))
    names = {
        int: "a whole number", float: "a number", bool: "true or false", str: "text", Texts: "a list of texts",
        Integers: "whole numbers such as 3 or 2,4-5" + (", or all" if _optional(item) else ""),
        Numbers: "numbers such as 5 or 5,20",
    }  # fmt: skip
    return names[kind]


def _joined(arguments: Sequence[str]) -> list[str]:
    """Arguments with `--flag -5,5` as `--flag=-5,5`, which argparse would take for two flags, and with `--a_flag`, YAML's name, as `--a-flag`."""
    joined: list[str] = []
    for argument in arguments:
        if "--" not in joined and (spelled := re.match(r"--\w+(?==|$)", argument)):
            argument = spelled[0].replace("_", "-") + argument[spelled.end() :]
        if joined and re.match(r"-[\d.]", argument) and joined[-1].startswith("--") and "=" not in joined[-1] and joined[-1] != "--":
            joined[-1] += "=" + argument
        else:
            joined.append(argument)
    return joined


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
