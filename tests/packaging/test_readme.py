"""What README.md and docs/ show runs as typed, and what they name exists."""

import re
import runpy
import statistics
from pathlib import Path

import pytest
import torch
from helpers.convolution_cases import block_mask

from sparse_adv import masks, ops

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def python_blocks(page: Path) -> list[str]:
    """Those that a page shows itself; a file of examples/ that it includes is run below."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [block for block in blocks if not re.fullmatch(r'--8<-- "examples/\w+\.py"\n', block)]


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 120


@pytest.mark.skipif(ops.cpu_capability() == "portable", reason="the limits are those of the kernels for AVX")
@pytest.mark.parametrize(
    ("block", "sentence"), [((1, 1), r"above about ([\d.]+)"), ((4, 4), r"\(([\d.]+) with blocks \(4, 4\)")]
)
def test_the_density_from_which_on_the_dense_kernel_is_taken_is_that_of_the_plan(block, sentence):
    """The layers of a CIFAR ResNet-18 at batch 64, all passes: the median of the lowest densities that run dense."""
    densities = [percent / 100 for percent in range(30, 94, 2)]
    limits = []
    for channels, size in ((64, 32), (128, 16), (256, 8), (512, 4)):
        images = torch.empty(64, channels, size, size, memory_format=torch.channels_last)
        masks = [block_mask((channels, channels, 3, 3), block, density) for density in densities]
        plans = [ops.plan(ops.compile_pattern(mask, block), images, padding=1) for mask in masks]
        limits += [densities[[each.kernel for each in passes].index("dense")] for passes in zip(*plans, strict=True)]
    assert abs(statistics.median(limits) - float(re.search(sentence, README)[1])) < 0.05


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.stem)
def test_python_in_a_page_runs_as_typed(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it may write files
    for block in python_blocks(page):
        exec(compile(block, str(page), "exec"), {})


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_an_example_runs(example, capsys):
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out


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


def test_the_tree_shows_every_part_of_the_package_and_only_what_exists():
    tree = (ROOT / "docs" / "design" / "architecture.md").read_text().split("## The tree")[1].split("```")[1]
    paths = {ROOT / line.split()[0] for line in tree.strip().splitlines()}
    assert [path for path in paths if not path.exists()] == []
    parts = {init.parent for init in ROOT.glob("sparse_adv/*/__init__.py")} | set(ROOT.glob("sparse_adv/[a-z]*.py"))
    assert parts - paths == set()


def test_the_home_page_links_to_every_page_of_the_guide():
    home, guide = (ROOT / "docs" / "index.md").read_text(), sorted((ROOT / "docs" / "guide").glob("*.md"))
    assert guide
    assert [page.name for page in guide if f"](guide/{page.name})" not in home] == []


def test_the_page_on_blocks_lists_those_that_have_kernels():
    page = (ROOT / "docs" / "guide" / "blocks.md").read_text()
    assert [block for block in masks.SUPPORTED_BLOCKS if f"({', '.join(map(str, block))})" not in page] == []
