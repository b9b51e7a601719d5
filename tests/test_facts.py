"""Facts about software and machine."""

import shutil

import pytest

from sparse_adv import facts


def test_the_commit_of_the_environment_wins_over_git(monkeypatch):
    monkeypatch.setenv("COMMIT", "0123abc")
    assert facts.commit() == "0123abc" and facts.software().commit == "0123abc"


@pytest.mark.skipif(not (facts.ROOT / ".git").exists() or shutil.which("git") is None, reason="no git checkout")
def test_the_commit_of_a_checkout_is_that_of_git(monkeypatch):
    monkeypatch.delenv("COMMIT", raising=False)
    commit = facts.commit()
    assert commit is not None and int(commit.removesuffix("-dirty"), 16) > 0


def test_a_package_inside_another_repository_has_no_commit(monkeypatch, tmp_path):
    (tmp_path / ".git").mkdir()
    monkeypatch.delenv("COMMIT", raising=False)
    monkeypatch.setattr(facts, "ROOT", tmp_path / "site-packages")
    assert facts.commit() is None


def test_the_processor_has_a_name():
    assert facts.cpu_name() and facts.machine().cpu == facts.cpu_name()
