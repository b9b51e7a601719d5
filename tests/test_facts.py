"""Facts about software and machine."""

import shutil
import subprocess

import pytest

from sparse_adv import facts


@pytest.mark.skipif(shutil.which("git") is None, reason="git, which tells the commit, is not installed")
def test_the_commit_is_that_of_the_own_repository_and_not_of_one_around_it(tmp_path, monkeypatch):
    project = tmp_path / "project"
    (project / "sparse_adv").mkdir(parents=True)
    (project / "sparse_adv" / "__init__.py").touch()
    monkeypatch.setattr(facts, "ROOT", project)
    monkeypatch.delenv("COMMIT", raising=False)

    def make_repository(folder) -> str:
        git = ["git", "-C", folder, "-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
            subprocess.run([*git, *command], check=True)
        return subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()

    make_repository(tmp_path)
    assert facts.commit() is None
    head = make_repository(project)
    assert facts.commit() == head[:12]
    (project / "sparse_adv" / "__init__.py").write_text("changed")
    assert facts.commit() == f"{head[:12]}-dirty"


def test_the_commit_of_the_environment_wins_over_git(monkeypatch):
    monkeypatch.setenv("COMMIT", "1a48e42, one word changed")
    assert facts.commit() == "1a48e42, one word changed"
    assert facts.software().commit == "1a48e42, one word changed"


def test_the_processor_has_a_name():
    assert facts.cpu_name() and facts.machine().cpu == facts.cpu_name()
