"""Several processes as one run: each calls `join_processes` before anything else of JAX, and then sees every device of all of them."""

import os

from qscope_jax.errors import ConfigError

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join_processes() -> None:
    """Join the other processes of the run.

    On TPU pods, Slurm, Open MPI and GKE JAX finds them by itself. Elsewhere the environment must have JAX_COORDINATOR_ADDRESS (host:port of the
    first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID, from 0.

    Raises:
        ConfigError: the variables are wrong, or the others cannot be found.
    """
    import jax

    given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    if given and len(given) < len(_VARIABLES):
        missing = ", ".join(name for name in _VARIABLES if name not in given)
        raise ConfigError(f"{', '.join(given)} set, but not {missing}: set all three, or none where the cluster tells JAX")
    try:
        if given:
            address, count, index = (given[name] for name in _VARIABLES)
            if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
                raise ConfigError(f"JAX_NUM_PROCESSES is {count} and JAX_PROCESS_ID {index}, expected a number of processes and one below it")
            jax.distributed.initialize(address, int(count), int(index))
        else:
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"the other processes cannot be joined ({reason}); set {', '.join(_VARIABLES)}, or leave --distributed out") from error
