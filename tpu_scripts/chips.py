"""TPU slices: their chips, what a chip holds and computes, and their devices as libtpu describes them without the hardware."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import jax

from qscope_jax.errors import ConfigError


@dataclass(frozen=True)
class Chip:
    """One kind of chip.

    Attributes:
        memory_gib: Memory that a program may use; what the runtime keeps for itself is taken off.
        tflops: Peak rate in bfloat16, 10^12 FLOPs a second.
        accelerator: Accelerator type of a slice on Google Cloud, with its size in chips or cores.
        cores: What that size counts: cores a chip, or 1.
    """

    memory_gib: float
    tflops: float
    accelerator: str
    cores: int


CHIPS = {
    "v4": Chip(30.5, 275, "v4-{}", 2),
    "v5e": Chip(15.75, 197, "v5litepod-{}", 1),
    "v5p": Chip(95.74, 459, "v5p-{}", 2),
    "v6e": Chip(31.25, 918, "v6e-{}", 1),
}
"""Chips by the first part of libtpu's topology names; the memory is what libtpu 0.0.42 says is available when a program asks for more."""

# Without these libtpu looks for a machine with a TPU around it, logs that there is none, and lets one process at a time compile.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_TOPOLOGY = re.compile(r"(v4|v5e|v5p|v6e|cpu):(\d{1,3}(?:x\d{1,3}){0,2})", re.ASCII)


@dataclass(frozen=True)
class Slice:
    """A slice to plan for.

    Attributes:
        topology: Its name, such as `v5p:2x2x2`.
        devices: JAX devices, described or (for `cpu`) virtual.
        num_chips: Chips.
        memory_gib: Memory of a device; None where nothing is known of it.
        tflops: Peak rate of a device in bfloat16; None as well.
        accelerator: Accelerator type on Google Cloud; empty for `cpu`.
    """

    topology: str
    devices: Sequence[Any]
    num_chips: int
    memory_gib: float | None
    tflops: float | None
    accelerator: str


def describe(topology: str) -> Slice:
    """Describe a slice; `cpu:4` or `cpu:2x2` is a rehearsal on as many virtual devices.

    Raises:
        ConfigError: there is no such topology, or libtpu is missing.
    """
    match = _TOPOLOGY.fullmatch(topology)
    if not match:
        raise ConfigError(f"topology {topology!r}: expected a chip and its grid, such as v5e:4x4, v5p:2x2x2, v6e:4x4, v4:2x2x2, or cpu:4")
    count = math.prod(map(int, match[2].split("x")))
    if match[1] == "cpu":
        return Slice(topology, _virtual(count), count, None, None, "")
    from jax.experimental import topologies

    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        # A machine has four chips or more, but one of them may be had alone.
        bounds = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **bounds).devices
    except Exception as error:  # libtpu raises plain RuntimeErrors of several kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"topology {topology}: cannot be described ({reason}); is libtpu installed (pip install libtpu)?") from error
    chip, cores = CHIPS[match[1]], len(devices) // count  # v4 shows its two cores as two devices
    name = chip.accelerator.format(count * chip.cores)
    return Slice(topology, devices, count, chip.memory_gib / cores, chip.tflops / cores, name)


@contextmanager
def as_if_there(where: Slice) -> Iterator[None]:
    """Let the library choose its forms (of attention, experts, top-k, sparse products) as it does on the slice's own machines.

    It asks `jax.default_backend()`, which here is the CPU that compiles.
    """
    real = jax.default_backend
    try:
        if not where.topology.startswith("cpu"):
            jax.default_backend = lambda: "tpu"
        yield
    finally:
        jax.default_backend = real


def _virtual(count: int) -> Sequence[Any]:
    if jax.config.jax_num_cpu_devices < count:  # pyright: ignore[reportAttributeAccessIssue]
        with suppress(RuntimeError):  # JAX has begun already; there may be enough
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(f"topology cpu:{count}: only {len(devices)} virtual devices can be had in this process; run the program by itself")
    return devices[:count]
