import importlib.util

import jax
import pytest

from qscope_jax.errors import ConfigError
from tpu_scripts.chips import CHIPS, Chip, Slice, as_if_there, describe

libtpu_only = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def test_a_rehearsal_takes_virtual_devices():
    where = describe("cpu:2x3")
    assert len(where.devices) == where.num_chips == 6 and where.memory_gib is None and where.accelerator == ""


def test_more_virtual_devices_than_there_are_is_an_error():
    with pytest.raises(ConfigError, match="topology cpu:200: only 8 virtual devices"):
        describe("cpu:200")


@pytest.mark.parametrize("topology", ["v9:2x2", "v5p", "v5p:", "v5p:2x2x2x2", "2x2", "v5e:2x2 "])
def test_an_unknown_topology_is_an_error_that_shows_known_ones(topology):
    with pytest.raises(ConfigError, match="expected a chip and its grid, such as v5e:4x4"):
        describe(topology)


def test_without_libtpu_the_error_says_how_to_get_it(monkeypatch):
    from jax.experimental import topologies

    def missing(**_):
        raise RuntimeError("no libtpu\nand more")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(ConfigError, match=r"topology v5p:2x2x2: cannot be described \(no libtpu\).*pip install libtpu"):
        describe("v5p:2x2x2")


def test_sizes_of_a_slice_follow_its_chips_and_cores(monkeypatch):
    from jax.experimental import topologies

    class Description:
        def __init__(self, topology_name: str, **_):
            self.devices = list(range(16 if topology_name.startswith("v4") else 8))

    monkeypatch.setattr(topologies, "get_topology_desc", Description)
    monkeypatch.setitem(CHIPS, "v4", Chip(30, 200, "v4-{}", 2))
    monkeypatch.setitem(CHIPS, "v5p", Chip(90, 400, "v5p-{}", 2))
    megacore, two_cores = describe("v5p:2x2x2"), describe("v4:2x2x2")
    assert (megacore.num_chips, megacore.memory_gib, megacore.tflops, megacore.accelerator) == (8, 90, 400, "v5p-16")
    # A v4 chip shows its two cores as two devices, each with half of everything.
    assert (two_cores.num_chips, two_cores.memory_gib, two_cores.tflops, two_cores.accelerator) == (8, 15, 100, "v4-16")


def test_the_library_chooses_as_on_the_slice_and_afterwards_as_here():
    backend = jax.default_backend()
    with as_if_there(Slice("v5p:2x2x1", [], 4, 95, 459, "v5p-8")):
        assert jax.default_backend() == "tpu"
    assert jax.default_backend() == backend
    with as_if_there(Slice("cpu:4", [], 4, None, None, "")):
        assert jax.default_backend() == backend


@libtpu_only
def test_libtpu_describes_slices_that_are_not_there():
    assert len(describe("v5e:4x4").devices) == 16 and len(describe("v5e:1x1").devices) == 1
