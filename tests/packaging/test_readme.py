"""What README.md and docs/ show runs as typed, and what they name exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_the_readme_fits_a_screen_and_its_example_fifteen_lines():
    assert len(README.splitlines()) <= 120
    (example,) = python_blocks(ROOT / "README.md")
    assert len(example.splitlines()) <= 15


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.stem)
def test_python_in_a_page_runs_as_typed(page):
    for block in python_blocks(page):
        exec(compile(block, str(page), "exec"), {})


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_an_example_runs(example):
    run = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0 and run.stdout, run.stderr


def test_there_are_three_examples():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_that_a_page_names_exists(page):
    targets = re.findall(r"^(?:.*`)?make ([a-z-]+)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert [name for name in targets if not re.search(rf"^{name}:", makefile, flags=re.MULTILINE)] == []


def test_links_of_the_readme_exist():
    """Those between the pages of docs/ are checked by `make docs`."""
    links = re.findall(r"\]\(([^)#]+)", README)
    assert len(links) > 10
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_every_path_of_the_tree_exists():
    tree = (ROOT / "docs" / "design" / "architecture.md").read_text().split("## The tree")[1].split("```")[1]
    paths = [line.split()[0] for line in tree.strip().splitlines()]
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []
