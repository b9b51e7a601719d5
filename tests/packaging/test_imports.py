"""What importing the package costs, and that one module alone loads native code; `lint-imports` checks the layers."""

import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import sparse_adv
from sparse_adv.facts import software

PACKAGE = Path(__file__).resolve().parents[2] / "sparse_adv"


def test_only_one_module_touches_the_native_files():
    """So that there is one place where loading can fail, with one message."""
    native = re.compile(r"\b(_host|_ops_cpu|_ops_cuda)\b")
    touching = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if native.search(path.read_text())}
    assert touching == {"ops/_library.py"}


def as_in_a_terminal() -> None:
    """Called in a new process: Ctrl-C ends it, although jobs in the background of a shell ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def in_a_new_process(code: str, before: Callable[[], object] = as_in_a_terminal) -> tuple[int, str, str]:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=before)
    return run.returncode, run.stdout, run.stderr


@pytest.mark.parametrize(
    "use",
    [
        "",
        "model, images, labels = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten()), "
        "torch.rand(2, 3, 4, 4), torch.arange(2)\n"
        "sparse_adv.sparsify(model, sparse_adv.masks.prune(model, 0.5))\n"
        "sparse_adv.attacks.pgd(model.eval(), images, labels)\n",
    ],
    ids=["import", "attack"],
)
def test_the_package_and_a_first_attack_load_nothing_heavy_and_print_nothing(use):
    code = (
        "import sys, torch; before = set(sys.modules); import sparse_adv\n"
        f"{use}"
        "heavy = {'matplotlib', 'sklearn', 'tqdm', 'rich', 'scipy', 'pandas', 'torch._inductor', 'torch._dynamo'}\n"
        "heavy |= {'sparse_adv.training', 'sparse_adv.models', 'sparse_adv.config'}\n"
        "found = heavy & (set(sys.modules) - before)\n"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    assert in_a_new_process(code) == (0, "", "")


def test_every_public_name_is_reachable_from_the_package_alone():
    code = (
        "import sparse_adv\n"
        "for name in sparse_adv.__all__: assert name in dir(sparse_adv) and getattr(sparse_adv, name)\n"
        "assert sparse_adv.training.train and sparse_adv.sparsify is sparse_adv.nn.sparsify\n"
        "assert not hasattr(sparse_adv, 'no_such_name')"
    )
    assert in_a_new_process(code) == (0, "", "")


def test_the_version_is_the_one_that_pyproject_names():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    assert sparse_adv.__version__ == software().sparse_adv == project["version"]


@pytest.mark.parametrize("start", ["module", "script"])
def test_ctrl_c_during_the_imports_of_the_command_line_ends_it_with_one_line(start, tmp_path):
    """They take over a second; an exception in their midst printed a traceback, or another error in its place."""
    script = tmp_path / "sparse-adv"  # as pip writes it
    script.write_text("import sys\nfrom sparse_adv.__main__ import main\nsys.exit(main())\n")
    started = ["-m", "sparse_adv"] if start == "module" else [str(script)]
    command = [sys.executable, "-X", "importtime", *started, "doctor"]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=as_in_a_terminal
    ) as process:
        assert any("torch" in line for line in process.stderr)  # a part of torch has been imported
        process.send_signal(signal.SIGINT)
        *_, last = process.stderr
    assert (process.returncode, last) == (130, "sparse-adv: stopped\n")


def test_ctrl_c_ends_the_imports_where_nobody_reads_the_message():
    code = "import os; from sparse_adv import interruption; os.close(2); interruption._end_at_once(2, None)"
    assert in_a_new_process(code)[0] == 130


def test_ctrl_c_stays_as_it_is_for_other_programs_that_import_the_package():
    code = "import signal, sparse_adv; assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    assert in_a_new_process(code) == (0, "", "")


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it():
    code = (
        "import signal, sys; sys.orig_argv = sys.argv = ['sparse-adv']; import sparse_adv\n"
        "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN"
    )
    ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    assert in_a_new_process(code, ignore) == (0, "", "")
