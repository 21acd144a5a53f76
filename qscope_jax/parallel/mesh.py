"""The one mesh: axes `data`, `fsdp`, `expert`, `tensor`, all of kind Auto."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from qscope_jax.errors import ConfigError

AXES = ("data", "fsdp", "expert", "tensor")


def make_mesh(spec: str = "", devices: Sequence[Any] | None = None) -> Mesh:
    """Build the mesh from a string such as `data=2,fsdp=4`.

    Axes that are not named have size 1; one axis may be -1 and takes the devices that are left. An empty string means one
    device. Axes are Auto: XLA's partitioner decides, led by the shardings of the arguments.

    Raises:
        ConfigError: an unknown axis, a size that is no integer, or a product that does not fit the devices.
    """
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    named: set[str] = set()
    for part in filter(None, (p.strip() for p in spec.split(","))):
        name, _, size = part.partition("=")
        if name in named:
            raise ConfigError(f"mesh '{spec}': names the axis '{name}' twice")
        named.add(name)
        if name not in sizes:
            raise ConfigError(f"mesh '{spec}': unknown axis '{name}', expected some of {', '.join(AXES)}")
        try:
            sizes[name] = int(size)
        except ValueError:
            raise ConfigError(f"mesh '{spec}': '{part}' should read axis=integer, for example data=2") from None
    available = jax.devices() if devices is None else devices
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ConfigError(f"mesh '{spec}': sizes must be positive, and at most one may be -1")
    if free:
        sizes[free[0]] = max(len(available) // fixed, 1)
    count = math.prod(sizes.values())
    if count > len(available) or (free and count != len(available)):
        raise ConfigError(f"mesh '{spec}': needs {count} devices in a product that divides the {len(available)} there are")
    grid = np.asarray(available[:count]).reshape(tuple(sizes.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def adopt_mesh(mesh: Mesh) -> Mesh:
    """A user's mesh as one of ours: its devices and sizes, the axes it lacks of size 1, all of kind Auto.

    `jax.make_mesh` gives Explicit axes, whose arrays cannot meet those of an Auto mesh in one program.

    Raises:
        ConfigError: it has an axis that is not one of ours.
    """
    if unknown := [name for name in mesh.axis_names if name not in AXES]:
        raise ConfigError(f"the mesh has an axis '{unknown[0]}', expected some of {', '.join(AXES)}")
    order = [mesh.axis_names.index(name) for name in AXES if name in mesh.axis_names]
    grid = mesh.devices.transpose(order).reshape([mesh.shape.get(name, 1) for name in AXES])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
