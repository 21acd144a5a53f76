"""Rewards: functions by name or import path, each with a weight; called for a batch of completions and checked.

A function is called as TRL calls one: with `prompts`, `completions` and `completion_ids`, a list each, and the columns of the data rows as further
lists, all of them by keyword. It returns a number for each completion, or None where it does not apply. Functions that are written without
`**kwargs` get what they name.
"""

import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Float

from qscope_jax.data.texts import first_line
from qscope_jax.errors import ConfigError, InputError, QscopeError
from qscope_jax.training.dapo.shipped_rewards import SHIPPED

_OWN = ("prompts", "completions", "completion_ids")
_SAID = 200


class RewardFunction(Protocol):
    """Scores completions."""

    def __call__(
        self, *, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **columns: list[Any]
    ) -> Sequence[float | None]:
        """A number for each completion; None where the function does not apply."""
        ...


@dataclass(frozen=True)
class RewardInputs:
    """What N completions are scored by.

    Attributes:
        prompts: Prompt of each.
        completions: Their texts, without stop tokens.
        token_ids: Their tokens, stop tokens included.
        columns: Columns of the data row of each, such as `answer`.

    Raises:
        InputError: lists of different lengths, or a column whose name is taken.
    """

    prompts: Sequence[str]
    completions: Sequence[str]
    token_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self):
        """Check that there is one of each for every completion."""
        lists = {"prompts": self.prompts, "token_ids": self.token_ids, **self.columns}
        if wrong := [name for name, values in lists.items() if len(values) != len(self.completions)]:
            raise InputError(f"{len(lists[wrong[0]])} {wrong[0]} for {len(self.completions)} completions; give one for each")
        if taken := [name for name in _OWN if name in self.columns]:
            raise InputError(f"the data have a column {taken[0]!r}, which reward functions get from the run; rename it")

    def keywords(self) -> dict[str, list[Any]]:
        """Arguments of a call: copies, so that a function may change them."""
        own = (list(self.prompts), list(self.completions), [list(ids) for ids in self.token_ids])
        return {**dict(zip(_OWN, own, strict=True)), **{name: list(values) for name, values in self.columns.items()}}


@dataclass(frozen=True)
class Reward:
    """A reward function with its name and weight."""

    name: str
    weight: float
    function: Callable[..., Any]

    def missing(self, columns: Sequence[str]) -> list[str]:
        """Arguments that the function demands and that neither the run nor the given columns have."""
        named = [one for one in _parameters(self.function) if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)]
        demanded = [one.name for one in named if one.default is one.empty]
        return [name for name in (*demanded, *getattr(self.function, "columns", ())) if name not in (*_OWN, *columns)]

    def arguments(self, keywords: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Those that the function takes."""
        parameters = _parameters(self.function)
        if any(one.kind is one.VAR_KEYWORD for one in parameters):
            return keywords
        names = {one.name for one in parameters}
        return {name: values for name, values in keywords.items() if name in names}


class Scores(NamedTuple):
    """Rewards of N completions.

    Attributes:
        totals_N: Weighted sums over functions; NaN where a completion cannot be scored.
        components: By name what each function gave, unweighted; NaN where it gave nothing.
        errors: By name what a function said that failed; none of this batch's completions can be scored then.
        unscorable: By name the completions for which a function gave NaN or infinity, or failed.
    """

    totals_N: Float[np.ndarray, " N"]
    components: Mapping[str, Float[np.ndarray, " N"]]
    errors: Mapping[str, str]
    unscorable: Mapping[str, int]


def load_rewards(spec: Mapping[str, Any], *, max_completion_len: int | None = None) -> list[Reward]:
    """Find reward functions, before anything runs.

    Args:
        spec: Name of a shipped function (see `shipped_rewards`), or `package.module:function`, with its weight; or with a mapping that has the
            `weight` (1 if left out; what weighs 0 is logged alone) and options: settings of a shipped function, or arguments of a function at
            the import path that makes the reward function.
        max_completion_len: Longest completion of the run, for `length` where its options do not say another.

    Raises:
        ConfigError: no function, an unknown one, one that cannot be imported or called, options it does not have, a weight that is no number,
            weights that are all 0, or a package that is not installed.
    """
    if not spec:
        raise ConfigError(f"no reward is given; name one or more, with weights: {', '.join(SHIPPED)}, or package.module:function")
    rewards = [_loaded(name, given, max_completion_len) for name, given in spec.items()]
    if not any(reward.weight for reward in rewards):
        raise ConfigError(f"rewards {', '.join(spec)} all weigh 0; give one of them a weight")
    return rewards


def check_columns(rewards: Sequence[Reward], columns: Sequence[str]) -> None:
    """Check that the data have what the functions ask for, before anything runs.

    Raises:
        InputError: a column is missing; those that there are are named.
    """
    for reward in rewards:
        if missing := reward.missing(columns):
            there = f"the data have {', '.join(map(repr, columns))}" if columns else "the data have none"
            raise InputError(f"reward {reward.name} asks for a column {missing[0]!r}; {there}: rename a column, or choose another reward")


def score(rewards: Sequence[Reward], inputs: RewardInputs) -> Scores:
    """Call every function once for all completions.

    What a function does not apply to (None) adds nothing, so that tasks may be mixed; a completion that no function applies to cannot be scored.
    NaN or infinity makes a completion unscorable, and a function that fails makes all of them so: the rest of the reward alone would teach
    something else.

    Raises:
        InputError: a column is missing, or a function gives another number of rewards than there are completions, or something that is no number.
    """
    check_columns(rewards, list(inputs.columns))
    count = len(inputs.completions)
    totals_N, applied_N = np.zeros(count), np.zeros(count, bool)
    components, errors, unscorable = {}, {}, {}
    for reward in rewards:
        try:
            result = _listed(reward.function(**reward.arguments(inputs.keywords())))
        except Exception as error:  # the function's own, whatever it is
            errors[reward.name] = f"{type(error).__name__}: {first_line(error)}"[:_SAID]
            result = [np.nan] * count
        values_N, applies_N = _checked(reward.name, result, count)
        unscorable[reward.name] = int((applies_N & ~np.isfinite(values_N)).sum())
        components[reward.name] = values_N
        if reward.weight:  # others are logged alone
            totals_N += np.where(applies_N, reward.weight * np.where(np.isfinite(values_N), values_N, np.nan), 0)
            applied_N |= applies_N
    return Scores(np.where(applied_N, totals_N, np.nan), components, errors, unscorable)


def _loaded(name: str, given: Any, max_completion_len: int | None) -> Reward:
    options = dict(given) if isinstance(given, Mapping) else {"weight": given}
    weight = options.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not np.isfinite(float(weight)):
        raise ConfigError(f"reward {name}: its weight is {weight!r}, expected a number")
    shipped = name in SHIPPED
    if name == "length" and max_completion_len is not None:
        options.setdefault("max_completion_len", max_completion_len)
    function = SHIPPED[name] if shipped else _imported(name)
    if shipped or options:
        try:
            inspect.signature(function).bind(**options)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"reward {name}: {first_line(error)}; its options are {', '.join(_names(function)) or 'none'}") from error
        function = _made(name, function, options)
        if not callable(function):
            raise ConfigError(f"reward {name}: makes {type(function).__name__} of its options, expected a function")
    return Reward(name, float(weight), function)


def _imported(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"reward {name!r} is not known; expected one of {', '.join(SHIPPED)}, or package.module:function")
    try:
        function = import_module(module_name)
        for part in attribute.split("."):
            function = getattr(function, part)
    except Exception as error:  # whatever the module does when it is imported
        said = f"{type(error).__name__}: {first_line(error)}"[:_SAID]
        raise ConfigError(f"reward {name}: cannot be imported ({said}); mend the path, or put the module's folder on PYTHONPATH") from error
    if not callable(function):
        raise ConfigError(f"reward {name}: is {type(function).__name__}, expected a function")
    return function


def _made(name: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    try:
        return factory(**options)
    except QscopeError as error:
        raise ConfigError(f"reward {name}: {error}") from error
    except Exception as error:  # a factory at an import path
        raise ConfigError(f"reward {name}: refuses its options ({type(error).__name__}: {first_line(error)})"[:_SAID]) from error


def _names(function: Callable[..., Any]) -> list[str]:
    return [one.name for one in _parameters(function)]


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # written in C: it gets everything
        return [inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)]


def _listed(result: Any) -> Any:
    """What a function gave, as a list if it is something like one; a generator may fail only here."""
    values = result.tolist() if hasattr(result, "tolist") else result  # arrays and tensors
    if isinstance(values, str | bytes | Mapping | set) or not hasattr(values, "__iter__"):
        return values
    return [value.item() if hasattr(value, "item") else value for value in values]


def _checked(name: str, values: Any, count: int) -> tuple[Float[np.ndarray, " N"], Bool[np.ndarray, " N"]]:
    """Rewards with NaN for None, and where the function applies."""
    if not isinstance(values, list):
        raise InputError(f"reward {name} gave {type(values).__name__}, expected a list of {count} numbers, one for each completion")
    if len(values) != count:
        raise InputError(f"reward {name} gave {len(values)} rewards for {count} completions; it must give one for each, None where it does not apply")
    for index, value in enumerate(values):
        if value is not None and not isinstance(value, numbers.Real):
            raise InputError(f"reward {name} gave {str(value)[:40]!r} ({type(value).__name__}) for completion {index}, expected a number or None")
    applies_N = np.array([value is not None for value in values], bool)
    return np.array([np.nan if value is None else float(value) for value in values], np.float64), applies_N
