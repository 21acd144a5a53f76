"""What every converter does around its work: turn an error into one line and an exit status."""

import sys
from collections.abc import Callable

from qscope_jax.errors import QscopeError


def run(name: str, work: Callable[[], object]) -> int:
    """Do the work; returns the exit status.

    Args:
        name: Of the program, for messages.
        work: What it does.

    Returns:
        0; 2 after a mistake of the user; 130 after an interruption, as shells count it.
    """
    try:
        work()
    except QscopeError as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; what is finished stays, the same command goes on with the rest", file=sys.stderr)
        return 130
    return 0
