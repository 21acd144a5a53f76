import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from qscope_jax.errors import ConfigError
from qscope_jax.parallel.mesh import AXES, adopt_mesh, make_mesh


def sizes(spec: str) -> list[int]:
    return list(make_mesh(spec).shape.values())


def test_no_description_means_one_device():
    mesh = make_mesh()
    assert mesh.axis_names == AXES == ("data", "fsdp", "expert", "tensor")
    assert mesh.devices.size == 1 and set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("data=8", [8, 1, 1, 1]),
        ("fsdp=4, data=2", [2, 4, 1, 1]),
        ("tensor=2,expert=2", [1, 1, 2, 2]),
        ("data=2,fsdp=-1", [2, 4, 1, 1]),
        ("tensor=-1", [1, 1, 1, 8]),
    ],
)
def test_a_description_gives_the_axes_their_sizes(spec, expected):
    assert sizes(spec) == expected


def test_tensor_neighbours_are_neighbouring_devices():
    ids = np.vectorize(lambda device: device.id)(make_mesh("data=2,tensor=4").devices)
    assert ids.reshape(2, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_given_devices_are_used():
    devices = jax.devices()[4:]
    assert make_mesh("data=-1", devices).devices.flatten().tolist() == devices


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pipeline=2", "unknown axis 'pipeline', expected some of data, fsdp, expert, tensor"),
        ("data", "'data' should read axis=integer"),
        ("data=two", "'data=two' should read axis=integer"),
        ("data=2,data=4", "names the axis 'data' twice"),
        ("data=0", "sizes must be positive"),
        ("data=-2", "sizes must be positive"),
        ("data=-1,fsdp=-1", "at most one may be -1"),
        ("data=16", "needs 16 devices .* the 8 there are"),
        ("data=3,fsdp=-1", "needs 6 devices in a product that divides the 8"),
        ("data=16,fsdp=-1", "needs 16 devices"),
    ],
)
def test_a_description_that_does_not_fit_is_a_config_error(spec, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(spec)


def test_a_users_mesh_is_adopted_with_our_axes():
    theirs = jax.make_mesh((4, 2), ("tensor", "data"))
    mesh = adopt_mesh(theirs)
    assert mesh.axis_names == AXES and list(mesh.shape.values()) == [2, 1, 1, 4]
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert mesh.devices[1, 0, 0, 2] == theirs.devices[2, 1] and mesh.devices[0, 0, 0, 3] == theirs.devices[3, 0]
    assert adopt_mesh(mesh) == mesh


def test_a_mesh_with_a_foreign_axis_is_refused():
    with pytest.raises(ConfigError, match="the mesh has an axis 'model', expected some of data"):
        adopt_mesh(jax.make_mesh((2,), ("model",)))
