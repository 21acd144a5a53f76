"""The program `qscope`: find the verb, read its options, run it, and turn what a user can mend into one line and exit status 2."""

import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, TextIO

from qscope_jax import __version__
from qscope_jax.errors import ConfigError, QscopeError

VERBS = {
    "demo": "take the guided tour of the embedded model's features",
    "models": "list the models and SAEs that there are, and their sizes",
    "generate": "continue prompts",
    "features": "show which features texts light up, and at which tokens",
    "compare": "find the features that tell two texts or files apart",
    "steer": "continue prompts with features added, clamped or removed",
    "train-sae": "train sparse autoencoders on a model's residual streams",
    "cache-activations": "write residual streams to disk, to train on them many times",
    "eval-sae": "measure how faithful sparse autoencoders are",
    "store": "write a corpus' features to disk, for the verbs below",
    "explain": "show what features stand for: contexts, words, neighbours",
    "classify": "tell classes of texts apart by the features that fire",
    "benchmarks": "find what benchmarks measure, and which to keep",
    "cover": "find the features that a data set fires, and those it misses",
    "sft": "fine-tune on conversations, with features held down",
    "dapo": "learn from rewards, with rollouts steered into repetition",
    "synthesize": "write texts for the missing ones; mix and score them",
    "code-switch": "count unwanted switches of language, trace and ablate them",
}
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `qscope` with the given arguments (default: the program's) and return the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _prepare()
    try:
        _run(arguments)
        sys.stdout.flush()
    except QscopeError as error:
        print(f"qscope: error: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has gone; without this Python would complain when it closes the stream at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _run(arguments: list[str]) -> None:
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        print(_help())
    elif verb == "--version":
        print(f"qscope {__version__}")
    elif verb not in VERBS:
        raise ConfigError(f"unknown verb {verb!r}; verbs are {', '.join(VERBS)}")
    else:
        from qscope_jax.cli.options import help_text, parse

        module = import_module(f"qscope_jax.cli.{verb.replace('-', '_')}")
        rest, config, run = arguments[1:], getattr(module, "Config", None), getattr(module, "run", None)
        actions = getattr(module, "ACTIONS", None)
        if actions:
            if not rest or rest[0] in ("-h", "--help"):
                print(_actions_help(verb, actions))
                return
            if rest[0] not in actions:
                raise ConfigError(f"unknown action {rest[0]!r}; qscope {verb} has {', '.join(actions)}")
            verb, (config, run), rest = f"{verb} {rest[0]}", actions[rest[0]], rest[1:]
        assert config is not None and run is not None
        if "-h" in rest or "--help" in rest:
            print(help_text(verb, config))
        else:
            run(parse(verb, config, rest))


def _help() -> str:
    """What `qscope --help` prints; it fits a terminal of 24 lines and 80 columns."""
    verbs = "\n".join(f"  {name:<17} {sentence}" for name, sentence in VERBS.items())
    return (
        "usage: qscope VERB [OPTIONS]    (start with: qscope demo)\n\n"
        f"{verbs}\n\n"
        "Models and SAEs are folders or hub ids; `tiny` is the embedded pair.\n"
        "qscope VERB --help lists options, which --config FILE.yaml can set too;\n"
        "qscope --version prints the version."
    )


def _actions_help(verb: str, actions: dict[str, tuple[type, Any]]) -> str:
    """What `qscope VERB --help` prints for a verb that has actions, each with options of its own."""
    lines = "\n".join(f"  {name:<17} {(config.__doc__ or '').splitlines()[0]}" for name, (config, _) in actions.items())
    return f"usage: qscope {verb} ACTION [OPTIONS]\n\nactions:\n{lines}\n\nqscope {verb} ACTION --help lists an action's options."


def _prepare() -> None:
    """Keep libraries from writing advice to stderr, and a terminal that lacks a character from ending the program."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    out: TextIO = sys.stdout
    reconfigure = getattr(out, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")


def _one_line(text: str) -> str:
    return re.sub(r"\s*[\r\n]+\s*", " ", text).strip()


if __name__ == "__main__":
    sys.exit(main())
