import builtins
import json
import struct
import sys
from types import ModuleType

import pytest

from qscope_jax.errors import ConfigError
from qscope_jax.training.loop import train
from qscope_jax.training.trackers import check_installed, scalars, trackers
from tests.training.walk import Walk, lines, settings


class Recorded:
    """What a stand-in for a tracking package was told."""

    def __init__(self):
        self.begun, self.scalars, self.closed = [], [], 0

    # tensorboardX.SummaryWriter
    def add_scalar(self, name, value, step):
        self.scalars.append((step, name, value))

    def close(self):
        self.closed += 1

    # wandb.Run
    def log(self, values, step):
        self.scalars += [(step, name, value) for name, value in values.items()]

    def finish(self):
        self.closed += 1


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins for tensorboardX and wandb; what they were told, by name."""
    told = {"tensorboardX": Recorded(), "wandb": Recorded()}

    def begin(name):
        return lambda **options: told[name].begun.append(options) or told[name]

    for name, function in (("tensorboardX", "SummaryWriter"), ("wandb", "init")):
        module = ModuleType(name)
        setattr(module, function, begin(name))
        monkeypatch.setitem(sys.modules, name, module)
    return told


def test_numbers_of_a_list_are_named_by_their_index():
    metrics = {"loss": 2.0, "fvu": [0.5, 0.25], "held_out": True, "tokens": 3, "text": "x", "none": None}
    assert scalars(metrics) == {"loss": 2.0, "fvu/0": 0.5, "fvu/1": 0.25, "tokens": 3.0}


def test_what_is_logged_goes_to_both_with_rates(packages, tmp_path):
    train(Walk(), settings(tmp_path / "run", tensorboard=True, wandb="walks"))
    metrics = [(line["step"], name, value) for line in lines(tmp_path / "run") for name, value in scalars(line).items() if name != "step"]
    for told in packages.values():
        assert [entry for entry in told.scalars if entry[1] != "steps_per_second"] == metrics
        rates = [entry for entry in told.scalars if entry[1] == "steps_per_second"]
        assert [step for step, _, _ in rates] == [2, 4, 6, 8, 10] and all(rate > 0 for _, _, rate in rates)
        assert told.closed == 1
    assert packages["tensorboardX"].begun == [{"logdir": str(tmp_path / "run/tensorboard"), "purge_step": 1}]
    (begun,) = packages["wandb"].begun
    assert (begun["project"], begun["name"], begun["resume"]) == ("walks", "run", "allow") and len(begun["id"]) == 8


def test_a_resumed_run_continues_the_same_records(packages, tmp_path):
    train(Walk(), settings(tmp_path / "run", steps=6, tensorboard=True, wandb="walks"))
    train(Walk(), settings(tmp_path / "run", resume=True, tensorboard=True, wandb="walks"))
    first, second = packages["wandb"].begun
    assert first["id"] == second["id"]
    assert packages["tensorboardX"].begun[1]["purge_step"] == 7
    assert [step for step, name, _ in packages["wandb"].scalars if name == "loss"] == [2, 4, 6, 8, 10]


def test_they_are_closed_when_the_run_fails(packages, tmp_path):
    with pytest.raises(ZeroDivisionError), trackers(tmp_path, tensorboard=True, wandb="walks", first_step=0):
        1 / 0  # noqa: B018
    assert [told.closed for told in packages.values()] == [1, 1]


@pytest.mark.parametrize("option, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_package_that_is_missing_is_named_before_anything_begins(option, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"{option}: the package {package} is not installed; pip install {package}, or leave {option} out"):
        train(Walk(), settings(tmp_path / "run", **{option: "project" if option == "wandb" else True}))
    assert not list(tmp_path.iterdir())


def test_nothing_is_imported_unasked(monkeypatch):
    monkeypatch.setattr(builtins, "__import__", pytest.fail)
    check_installed(tensorboard=False, wandb="")


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs the real package")
    from tensorboardX.proto.event_pb2 import Event

    train(Walk(), settings(tmp_path / "run", tensorboard=True))
    (events,) = (tmp_path / "run/tensorboard").iterdir()
    content, found = events.read_bytes(), {}
    while content:
        (size,) = struct.unpack("<Q", content[:8])  # a record: length, its checksum, the event, its checksum
        event = Event.FromString(content[12 : 12 + size])
        found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        content = content[16 + size :]
    expected = {(line["step"], name): value for line in lines(tmp_path / "run") for name, value in scalars(line).items() if name != "step"}
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-6)
    assert {tag for _, tag in found} > {"loss", "parts/0", "parts/1", "steps_per_second"}
    assert json.dumps(sorted(step for step, tag in found if tag == "loss")) == "[2, 4, 6, 8, 10]"
