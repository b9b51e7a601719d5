"""The README's example runs as typed, and what it names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs_as_typed_in_fifteen_lines(capsys):
    (example,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    assert len(example.splitlines()) <= 15
    exec(compile(example, "README.md", "exec"), {})
    assert "conv2" in capsys.readouterr().out


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^(?:.*`)?make ([a-z]+)", README, flags=re.MULTILINE))))
def test_every_make_target_that_it_names_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_every_path_of_the_tree_exists():
    tree = README.split("## The tree")[1].split("```")[1]
    paths = [line.split()[0] for line in tree.strip().splitlines()]
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []
