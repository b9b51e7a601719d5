"""A few cases of each kind, and that the campaign sees what a case must not do."""

import importlib
import random
import re

import pytest

from fuzz import __main__ as campaign
from fuzz.case import REFUSALS, Wrong, check_refusal
from fuzz.child import KINDS
from fuzz.op_makers import MAKERS
from sparse_adv import ops


def test_every_op_is_called():
    without_arguments = {"build_facts", "cpu_capability", "cuda_ops"}
    functions = {name for name in ops.__all__ if callable(getattr(ops, name)) and name[0].islower()}
    assert set(MAKERS) == functions - without_arguments


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_cases(kind, tmp_path):
    case = importlib.import_module(KINDS[kind]).case
    for number in range(40):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert case(random.Random(f"{kind}:{number}"), folder)


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (KeyError("eps"), "another type of exception"),
        (ValueError("eps is wrong\nand more"), "not one sentence"),
        (ValueError(""), "not one sentence"),
        (ValueError("steps is wrong"), "names none of eps"),
        (RuntimeError("eps: DefaultCPUAllocator: can't allocate memory"), "was not checked"),
    ],
)
def test_unclear_refusals_are_failures(error, what):
    check_refusal(ValueError("eps must not be negative, got -1"), REFUSALS, ["eps"])
    with pytest.raises(Wrong, match=what):
        check_refusal(error, REFUSALS, ["eps"])


CASES = {
    "crash": ("import os; os.abort()", "the process ended with -6"),
    "hang": ("import time; time.sleep(60)", "it took more than 1 s"),
    "memory": ("x = b'x' * (1200 << 20)", r"it used 1[12]\d\d MiB"),
}


def test_a_module_of_cases_that_cannot_be_imported_is_reported_with_the_reason(monkeypatch):
    monkeypatch.setattr(campaign, "command", lambda *_: [campaign.sys.executable, "-c", "import no_such_module"])
    run = campaign.Campaign()
    assert run.run("broken", range(5, 6), 120)[0] == 6
    (failure,) = run.failures
    assert "the process ended with 1 between cases" in failure
    assert "No module named 'no_such_module'" in failure


@pytest.mark.parametrize("name", CASES)
def test_a_case_that_crashes_hangs_or_fills_the_memory_is_reported(name, tmp_path, monkeypatch, capsys):
    statement, what = CASES[name]
    (tmp_path / "broken.py").write_text(f"def case(rng, folder):\n    {statement}\n    return 'done'\n")
    start = "from fuzz import child; child.KINDS['broken'] = 'broken'; child.run('broken', range(5, 6))"
    monkeypatch.setattr(campaign, "SECONDS", 1.0 if name == "hang" else 30.0)
    monkeypatch.setattr(campaign, "command", lambda kind, numbers: [campaign.sys.executable, "-c", start])
    monkeypatch.setenv("PYTHONPATH", f"tests:{tmp_path}", prepend=":")
    run = campaign.Campaign()
    assert run.run("broken", range(5, 6), 120)[0] == 6
    assert "FAILED: make fuzz CASE=broken:5" in capsys.readouterr().out
    (failure,) = run.failures
    assert re.search(what, failure)
