"""The import rule: inside the package, imports point down, never up or sideways.

Each layer then works without those above it: the ops are usable with no masks, the masked layers with no attacks, and
`training` runs unchanged on a dense model, which makes every baseline free. `data`, `models` and `report` know nothing
of the rest but how files are written, so that whoever brings their own needs none of ours. Only `ops/_library.py`
touches the native files, so that there is one place where loading can fail, with one message.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "sparse_adv"

# From the bottom up. "" is the package itself, which re-exports the public names of what lies below it.
FILES = ("files", "runs")
BELOW = ("kernels", "ops", "masks", "nn", "attacks")
ABOVE = ("data", "models", "report", "training", "tickets", "demo", "doctor", "commands", "__main__")
LAYERS = (*FILES, *BELOW, "", *ABOVE)
STANDING_ALONE = {"data", "models", "report"}
NATIVE = ("_host", "_ops_cpu", "_ops_cuda")


def layer_of(module: str) -> str:
    """The layer of a dotted name: "sparse_adv.ops.pgd_step" -> "ops"."""
    return ([*module.split("."), ""])[1]


def imported_modules(source: str, module: str, is_package: bool) -> Iterator[str]:
    """The modules of this package that a source imports, wherever in the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: None if is_package else -1]
            prefix = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (prefix, node.module) if part)
            # `from sparse_adv import nn` imports the module nn, `from sparse_adv import sparsify` the package itself.
            found = [
                f"{base}.{alias.name}" if base == "sparse_adv" and alias.name in (*LAYERS, *NATIVE) else base
                for alias in node.names
            ]
        else:
            continue
        yield from (name for name in found if name.split(".")[0] == "sparse_adv")


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What the source of `module` imports against the rule."""
    own = layer_of(module)
    if own not in LAYERS:
        return [f"{module}: layer {own!r} has no place in the order {LAYERS}; give it one"]
    found = []
    for name in imported_modules(source, module, is_package):
        layer = layer_of(name)
        if layer in NATIVE:
            allowed = module == "sparse_adv.ops._library"
        elif layer == own and own != "":
            allowed = True
        elif own in STANDING_ALONE | {"kernels"}:
            allowed = layer in FILES
        else:
            allowed = layer in LAYERS and LAYERS.index(layer) < LAYERS.index(own)
        if not allowed:
            found.append(f"{module} imports {name}")
    return found


def sources() -> dict[str, Path]:
    files = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ("sparse_adv", *path.relative_to(PACKAGE).with_suffix("").parts)
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


@pytest.mark.parametrize("module", sorted(sources()))
def test_imports_point_down(module):
    path = sources()[module]
    assert violations(path.read_text(), module, path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sparse_adv.ops.pgd_step", "import sparse_adv.nn"),
        ("sparse_adv.ops.pgd_step", "def f():\n    from sparse_adv import attacks"),
        ("sparse_adv.masks.pruning", "from ..nn import sparsify"),
        ("sparse_adv.masks.pruning", "from sparse_adv import __version__"),
        ("sparse_adv.attacks", "from sparse_adv import sparsify"),
        ("sparse_adv.data", "from sparse_adv import ops"),
        ("sparse_adv.nn.tuning", "from sparse_adv import _host"),
        ("sparse_adv.nn.tuning", "from sparse_adv.novelty import thing"),
        ("sparse_adv.novelty", "import torch"),
    ],
)
def test_a_planted_violation_is_found(module, source):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("sparse_adv.nn.tuning", "from sparse_adv.masks import prune\nfrom . import conversion\nimport torch"),
        ("sparse_adv.training", "import sparse_adv\nfrom sparse_adv import data, attacks"),
        ("sparse_adv.data.cifar", "from sparse_adv.files import unpickle_arrays"),
        ("sparse_adv.ops._library", "from sparse_adv import _host as host"),
    ],
)
def test_what_points_down_is_allowed(module, source):
    assert violations(source, module) == []


def test_importing_the_package_loads_nothing_heavy_and_prints_nothing():
    code = (
        "import sys, torch; before = set(sys.modules); import sparse_adv\n"
        "heavy = {'matplotlib', 'sklearn', 'tqdm', 'rich', 'scipy', 'pandas', 'torch._inductor', 'torch._dynamo'}\n"
        "found = heavy & (set(sys.modules) - before)\n"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_the_public_names_are_reachable_from_the_package():
    import sparse_adv

    assert sparse_adv.nn.MaskedConv2d and sparse_adv.ops.pgd_step and sparse_adv.attacks.pgd and sparse_adv.masks.prune
    assert sparse_adv.sparsify is sparse_adv.nn.sparsify
    assert sparse_adv.__version__ == metadata.version("sparse_adv")
