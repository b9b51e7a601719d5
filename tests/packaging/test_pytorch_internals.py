"""`docs/design/pytorch_internals.md` names all that the library uses of PyTorch's internals, and all of it is there."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "design" / "pytorch_internals.md").read_text()
NAMED = set(re.findall(r"`(torch\.[\w.]+\b(?:\._?\w+)*)`", "\n".join(re.findall(r"^\| (`torch.*?) \|", PAGE, re.M))))


def imports_of(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The name in a file, and the full name, of each import from torch."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for each in node.names:
                package = each.name.partition(".")[0]
                yield (each.asname, each.name) if each.asname else (package, package)
        elif isinstance(node, ast.ImportFrom):
            for each in node.names:
                yield each.asname or each.name, f"{node.module}.{each.name}"


def names_of(tree: ast.AST) -> Iterator[str]:
    """The full names of all that a file uses of torch."""
    known = {name: full for name, full in imports_of(tree) if full.partition(".")[0] == "torch"}
    yield from known.values()
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            name = ast.unparse(node)
            root, _, rest = name.partition(".")
            if root in known and re.fullmatch(r"[\w.]+", name):
                yield f"{known[root]}.{rest}"


def used() -> set[str]:
    """The full names with a part that begins with "_", as far as the last such part."""
    found = set()
    for path in (ROOT / "sparse_adv").rglob("*.py"):
        for name in names_of(ast.parse(path.read_text())):
            parts = name.split(".")
            private = [number for number, part in enumerate(parts) if part[0] == "_" and part[1] != "_"]
            if private:
                last = len(parts) if parts[private[-1]] in ("_C", "_python_dispatch", "_pytree") else private[-1] + 1
                found.add(".".join(parts[:last]))
    return found


def test_the_page_names_all_of_them_and_no_others():
    assert used() == NAMED


@pytest.mark.parametrize("name", sorted(NAMED))
def test_this_torch_has(name):
    importlib.import_module("torch.nn.parallel")
    found = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part)


@pytest.mark.parametrize("name", re.findall(r"`(_\w+)`", PAGE))
def test_objects_of_this_torch_have(name):
    assert any(hasattr(owner, name) for owner in (nn.Conv2d(1, 1, 1), torch.zeros(1), torch.autograd.Function))
