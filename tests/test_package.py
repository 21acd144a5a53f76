import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qscope_jax

ROOT = Path(qscope_jax.__file__).parent
HEAVY = ("jax", "jaxlib", "flax", "torch", "transformers", "datasets", "numpy", "plotly")
# Lowest first; a module imports from its own floor or from those below.
FLOORS = (
    {"errors", "__version__"},
    {"parallel", "data"},
    {"models"},
    {"sae"},
    {"features"},
    {"training"},
    {"report", "demo", "cli"},
)


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, qscope_jax; print(*[name for name in {HEAVY} if name in sys.modules]); print(len(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy, count = done.stdout.splitlines()
    assert heavy == "" and int(count) < 300


def test_every_public_name_is_there_and_says_what_it_is():
    for name in qscope_jax.__all__:
        assert getattr(qscope_jax, name).__doc__, name
    assert qscope_jax.__all__ == sorted(set(qscope_jax.__all__)) and set(qscope_jax.__all__) <= set(dir(qscope_jax))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        qscope_jax.nothing  # noqa: B018


def test_type_checkers_see_the_names_that_are_there():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {(node.module, alias.name) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == {(module, name) for module, names in qscope_jax._HOMES.items() for name in names}


def modules() -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def imported(path: Path) -> set[str]:
    """First components below `qscope_jax` of everything that a module imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            # `from qscope_jax import sae` and `from qscope_jax.sae import qwen_scope` alike.
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("qscope_jax.")}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_from_its_own_floor_or_below(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    (floor,) = [i for i, names in enumerate(FLOORS) if part in names]
    reachable = set().union(*FLOORS[: floor + 1])
    assert not imported(path) - reachable


def test_the_library_never_imports_torch():
    for path in modules():
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        assert "torch" not in {name.split(".")[0] for name in names}, path
