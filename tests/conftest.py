"""What every test runs under (strict dtypes, eight virtual devices), and the fixtures that several packages share."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jaxtyping
import pytest

from qscope_jax.models.config import ModelConfig
from tests.small_config import small_config
from tests.support import SupportTable

# Tests run tiny programs a few times, and most of their time would go into making them fast: LLVM optimises little, and XLA emits a program's
# fusions by its older emitters, not each as a module of its own. In the environment, for the programs that tests start; what is set there already
# stays: JAX_DISABLE_MOST_OPTIMIZATIONS=0 XLA_FLAGS=--xla_cpu_use_fusion_emitters=true runs the tests on what users run.
_QUICK = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1").lower() in ("1", "true")
jax.config.update("jax_disable_most_optimizations", _QUICK)
if jax.__version_info__ < (0, 11):  # XLA ends a process that names a flag it does not know
    os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}"  # the last one counts

# Before the first use of a device. Eight virtual ones cost the suite nothing; a mesh takes those it names.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the option that compares README with what ran."""
    parser.addoption("--support", choices=("check", "write"), help="compare README's table of support with the tests that ran, or write it")


def pytest_configure(config: pytest.Config) -> None:
    """Collect the results behind that table."""
    if mode := config.getoption("--support"):
        config.pluginmanager.register(SupportTable(mode))


# Modules that take longest by themselves: they begin first, so that no core waits for them at the end.
_FIRST = (
    "test_families", "test_sae_processes", "test_sae_step", "test_side_by_side", "test_tour", "test_orbax_folder", "test_two_processes",
    "test_killed",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest modules first; the order inside a module stays."""
    items.sort(key=lambda item: _FIRST.index(item.path.stem) if item.path.stem in _FIRST else len(_FIRST))


_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module", autouse=True)
def forget_programs() -> Iterator[None]:
    """Free compiled programs now and then: each takes several memory maps, of which Linux grants a process 65,530; LLVM crashes beyond."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture
def optimised() -> Iterator[None]:
    """Let LLVM optimise after all, for a test whose time goes into running."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", _QUICK)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ModelConfig]:
    """Factory of Qwen3 configs that compile in about a second; keywords replace fields.

    The head width is unlike D/H, the vocabulary no power of two, and nothing equals anything else, so that mixed-up axes show.
    """
    return small_config


@pytest.fixture(scope="session")
def abstract_arrays() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Context manager without type checks, for `jax.eval_shape` and `lower`, whose pytrees hold descriptions in the place of arrays."""

    @contextlib.contextmanager
    def unchecked() -> Iterator[None]:
        jaxtyping.config.update("jaxtyping_disable", True)
        try:
            yield
        finally:
            jaxtyping.config.update("jaxtyping_disable", False)

    return unchecked


class Compilations:
    """Programs that XLA compiled inside a `count_compilations` block."""

    def __init__(self) -> None:
        self.count = 0


@pytest.fixture(scope="session")
def count_compilations() -> Callable[[], contextlib.AbstractContextManager[Compilations]]:
    """Context manager whose `count` is the number of programs compiled inside it, those of single eager operations included."""

    @contextlib.contextmanager
    def counting() -> Iterator[Compilations]:
        compilations = Compilations()

        def note(event: str, duration_secs: float, **attributes: str | int) -> None:
            compilations.count += event == _COMPILE_EVENT

        jax.monitoring.register_event_duration_secs_listener(note)
        try:
            yield compilations
        finally:
            jax.monitoring.unregister_event_duration_listener(note)

    return counting
