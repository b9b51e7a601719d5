"""A search, and the training of its ticket, that the tests of several commands read."""

import pytest
from helpers.digit_runs import NETWORK, QUICK

from sparse_adv import runs
from sparse_adv.__main__ import main


@pytest.fixture(scope="session")
def searched(tmp_path_factory):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    out = tmp_path_factory.mktemp("runs") / "search"
    assert main(["search", *NETWORK, *QUICK, "--density", "0.3", "--block", "2,1", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def trained(searched):
    """On the CPU, where an evaluation repeats to the last image."""
    out = searched.parent / "train"
    ticket = ("--ticket", str(searched / runs.TICKET), "--device", "cpu")
    assert main(["train", *ticket, "--limit", "200", *QUICK, "--name", "a ticket", "--out", str(out)]) == 0
    return out
