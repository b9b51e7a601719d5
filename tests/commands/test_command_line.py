"""The command line: what it prints, what it writes, and how it speaks of wrong input."""

import importlib
import json
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers.refusal import refused

import sparse_adv
from sparse_adv import data, doctor, masks, models, runs, tickets
from sparse_adv.__main__ import main
from sparse_adv.commands import output
from sparse_adv.models.normalize import STATISTICS
from sparse_adv.runs import Cost


@pytest.fixture
def few_digits(monkeypatch):
    """The demo's data, cut down to what a test can wait for."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    whole = data.load("digits")
    parts = {name: data.Split(*(x[:64] for x in getattr(whole, name))) for name in ("train", "validation", "test")}
    monkeypatch.setattr(data, "load", lambda *_, **__: whole._replace(**parts))


@pytest.fixture
def ticket_file(tmp_path):
    model = models.build("digits_cnn")
    kept = masks.prune(model, density=0.2, block=(4, 1), scope="uniform")
    path = tmp_path / "ticket.safetensors"
    masks.save_ticket(path, masks.Ticket(kept, model.state_dict(), {"arch": "digits_cnn"}))
    return path


def test_the_demo_compares_three_runs_and_reports(few_digits, tmp_path, capsys):
    out = tmp_path / "new" / "demo"
    demo = ["demo", "--out", str(out), "--epochs", "1", "--search-epochs", "1", "--block", "4,1"]
    assert main(demo) == 0
    assert {folder.name for folder in out.iterdir() if folder.is_dir()} == {
        "search",
        "ticket",
        "reinitialised",
        "dense",
    }
    assert {"report.md", "report.csv", "accuracy.png", "accuracy.svg"} <= {file.name for file in out.iterdir()}
    search, ticket, dense = (runs.read(out / name) for name in ("search", "ticket", "dense"))
    control = runs.read(out / "reinitialised")
    assert control.info.ticket == replace(ticket.info.ticket, reinit=True) and not ticket.info.ticket.reinit
    assert dense.info.ticket is None and control.info.train == ticket.info.train == dense.info.train
    assert ticket.info.before == search.result.total and dense.info.before == Cost()
    assert ticket.records[0].total.seconds > search.result.total.seconds
    assert ticket.info.density.weights == pytest.approx(0.1, abs=0.01)
    assert ticket.result.test.keys() == {"clean", "fgsm", "pgd-20"} and ticket.result.checks.pruned_weights_zero
    printed = capsys.readouterr().out
    assert "same mask, re-initialised" in printed and "speed-up over dense" in printed
    written = (out / "ticket" / runs.EPOCHS).read_text()
    assert main(demo) == 0  # a finished demo only reports again
    assert (out / "ticket" / runs.EPOCHS).read_text() == written
    found = masks.load_ticket(out / "search" / runs.TICKET)
    start = models.build("digits_cnn", seed=0).state_dict()
    assert all(torch.equal(start[key], value) for key, value in found.state_dict.items())
    assert masks.density(found.masks) == pytest.approx(0.1, abs=0.01)
    assert tickets.record_of(found).train.objective == "fgsm-rs"
    assert main(["explain", str(out / "search" / runs.TICKET)]) == 0


def test_explain_lists_every_masked_layer(ticket_file, capsys):
    assert main(["explain", str(ticket_file), "--no-json"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("conv1", "conv2", "conv3", "4x1x1x1"))
    assert main(["explain", str(ticket_file)]) == 0  # in a pipe
    *rows, total = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [row["layer"] for row in rows] == ["conv1", "conv2", "conv3", "fc"] and 0 < total["density"] < 1


def test_explain_counts_for_the_images_that_a_ticket_is_for(ticket_file, capsys):
    ticket, macs = masks.load_ticket(ticket_file), []
    for provenance in (ticket.provenance, ticket.provenance | {"input_shape": [1, 16, 16]}):
        masks.save_ticket(ticket_file, masks.Ticket(ticket.masks, ticket.state_dict, provenance))
        assert main(["explain", str(ticket_file)]) == 0
        macs.append(json.loads(capsys.readouterr().out.splitlines()[0])["macs"])
    assert macs[1] == [4 * count for count in macs[0]]  # the architecture's own images are 8 x 8


def test_explain_says_which_images_it_assumes(ticket_file, capsys):
    ticket = masks.load_ticket(ticket_file)
    named = ("--input-shape", "1,16,16")
    for about, flags, shape in (
        ({"input_shape": [1, 12, 12]}, (), [1, 12, 12]),
        ({}, (), [1, 8, 8]),
        ({}, named, [1, 16, 16]),
    ):
        about = {"arch": "digits_cnn"} | about
        masks.save_ticket(ticket_file, masks.Ticket(ticket.masks, ticket.state_dict, about))
        assert main(["explain", str(ticket_file), *flags]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["input_shape"] == shape
        assert main(["explain", str(ticket_file), "--no-json", *flags]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert f"for 128 images of shape {shape}" in last and ("assumed" in last) == (shape == [1, 8, 8])
    assert "must have the 1 channels" in refused(capsys, "explain", str(ticket_file), "--input-shape", "3,8,8")
    for wrong in ("8,8", "1,8,0"):
        assert "--input-shape must be 3 numbers" in refused(capsys, "explain", str(ticket_file), "--input-shape", wrong)


def test_explain_finds_the_classes_in_the_last_of_several_linear_layers(ticket_file, capsys):
    model = models.build("vgg16", width=4, classes=7)
    masks.save_ticket(ticket_file, masks.Ticket({}, model.state_dict(), {"arch": "vgg16", "width": 4}))
    assert main(["explain", str(ticket_file)]) == 0
    *_, last, _ = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (last["layer"], last["weight_shape"]) == ("classifier.3", [7, 32])


def test_explain_finds_the_channels_of_images_in_the_first_convolution(tmp_path, capsys):
    """Of a checkpoint of other code, which does not say what its images are."""
    model = models.build("resnet18", width=4, input_shape=(1, 32, 32))
    ticket = masks.Ticket(masks.prune(model, density=0.5), model.state_dict(), {"arch": "resnet18", "width": 4})
    masks.save_ticket(tmp_path / "grey.safetensors", ticket)
    assert main(["explain", str(tmp_path / "grey.safetensors"), "--json"]) == 0
    assert '"weight_shape": [4, 1, 3, 3]' in capsys.readouterr().out


def test_a_folder_in_place_of_a_file_is_told_as_such(tmp_path, capsys):
    assert "is a folder: name a file in it" in refused(
        capsys, "convert", str(tmp_path), str(tmp_path / "a.safetensors")
    )


def test_explain_speaks_of_wrong_files_in_one_sentence(ticket_file, tmp_path, capsys):
    assert "nowhere" in refused(capsys, "explain", str(tmp_path / "nowhere"))
    assert "does not fit" in refused(capsys, "explain", str(ticket_file), "--arch", "resnet18")
    ticket_file.write_bytes(ticket_file.read_bytes()[:100])
    assert "ticket.safetensors" in refused(capsys, "explain", str(ticket_file))


@pytest.mark.parametrize(
    ("claimed", "said"),
    [
        ({"width": 200_000}, "mask has shape"),
        ({"width": 10**9}, "cannot be built"),
        ({"input_shape": 5}, "input_shape must be of type Sequence or None, got 5"),
        ({"input_shape": [1, 4000, 4000]}, "take a smaller one"),
    ],
)
def test_explain_takes_no_memory_for_sizes_that_a_file_only_claims(ticket_file, claimed, said, capsys):
    ticket = masks.load_ticket(ticket_file)
    masks.save_ticket(ticket_file, masks.Ticket(ticket.masks, ticket.state_dict, ticket.provenance | claimed))
    assert said in refused(capsys, "explain", str(ticket_file))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epochs", "0"], "--epochs must be an integer of at least 1, got 0"),
        (["--search-epochs", "-1"], "--search-epochs must be an integer of at least 1, got -1"),
        (["--density", "1.5"], "1.5"),
        (["--block", "4,x"], "4,x"),
        (["--block", "0,1"], "(0, 1)"),
        (["--epochs", "many"], "many"),
    ],
)
def test_the_demo_refuses_impossible_numbers(few_digits, tmp_path, capsys, arguments, said):
    message = refused(capsys, "demo", "--out", str(tmp_path), "--search-epochs", "1", *arguments)
    assert said in message
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "x"}, "the environment variable RANK must be a number, as torchrun sets it, got 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE must be a number, as torchrun sets it, got 'two'"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "demo runs in one process, got 2"),
    ],
)
def test_the_demo_names_what_is_wrong_with_the_processes(monkeypatch, capsys, tmp_path, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert said in refused(capsys, "demo", "--out", str(tmp_path / "demo"))


def test_variables_of_the_environment_that_are_empty_do_not_count(monkeypatch, tmp_path, capsys):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    assert "--epochs must" in refused(capsys, "demo", "--out", str(tmp_path / "demo"), "--epochs", "0")


def test_a_folder_that_cannot_be_made_is_named(few_digits, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "file" in refused(capsys, "demo", "--out", str(tmp_path / "file" / "demo"))


def test_the_doctor_finds_this_installation_healthy(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "SUCCESS"
    assert torch.__version__ in printed and sparse_adv.__version__ in printed
    assert all(op in printed for op in ("masked_conv2d", "pgd_step", "random_start"))


def test_the_doctor_reports_a_wrong_op_and_a_broken_one(monkeypatch, capsys):
    monkeypatch.setattr(doctor.ops, "pgd_step", lambda adv, *_: adv)
    monkeypatch.setattr(doctor.ops, "random_start", None)
    assert main(["doctor"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("FAILURE") and "pgd_step linf" in last and "random_start l2" in last
    assert "masked_conv2d" not in last


def test_the_doctor_takes_nan_for_wrong(monkeypatch, capsys):
    monkeypatch.setattr(doctor.ops, "random_start", lambda clean, *_: clean * torch.nan)
    assert main(["doctor"]) == 1


def test_help_names_every_command():
    run = subprocess.run([sys.executable, "-m", "sparse_adv", "--help"], capture_output=True, text=True, check=True)
    assert all(
        command in run.stdout
        for command in ("search", "train", "evaluate", "report", "explain", "convert", "demo", "doctor")
    )


@pytest.mark.parametrize("command", ["train", "evaluate", "convert", "benchmark"])
def test_help_names_the_data_sets_whose_normalisation_is_known(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = capsys.readouterr().out.rpartition("--normalize NORMALIZE")[2][:400]
    assert all(name in said for name in STATISTICS)


@pytest.mark.parametrize(("command", "takes"), [("search", True), ("train", True), ("evaluate", False)])
def test_help_names_the_recipes_where_they_can_be_used(command, takes, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = capsys.readouterr().out
    assert "--config" in said and ("recipe:" in said) == takes


def test_no_command_is_wrong_input(capsys):
    assert "COMMAND" in refused(capsys)


def test_an_error_of_all_processes_is_printed_once(tmp_path, monkeypatch, capsys):
    for rank in (0, 1, 2):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        output.print_error("error: no such file")
        output.print_error(f"error: rank {rank} lost another process", consequence=True)
    output.print_error("error: something else")
    assert capsys.readouterr().err == "sparse-adv: error: no such file\nsparse-adv: error: something else\n"


@pytest.mark.parametrize("folder", ["attempt_0", "gone"])
def test_a_lost_process_is_an_error_if_no_process_has_printed_one(tmp_path, monkeypatch, capsys, folder):
    (tmp_path / "attempt_0").mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / folder / "1" / "error.json"))
    output.print_error("error: rank 1 lost another process", consequence=True)
    assert capsys.readouterr().err == "sparse-adv: error: rank 1 lost another process\n"


def test_an_error_of_the_command_itself_is_one_sentence(capsys):
    said = refused(capsys, "trian")
    assert said.count("\n") == 1 and "invalid choice: 'trian'" in said and "usage" not in said


CONTINUES = "; start the same command again, it continues "
IMAGES = ("--structure", "weights", "--sparsity", "90", "--data", "digits", "--out", "a")


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        (["search", "--out", "a"], f"{CONTINUES}after the last whole epoch"),
        (["train", "--out", "a"], f"{CONTINUES}after the last whole epoch"),
        (["demo"], f"{CONTINUES}after the last whole epoch"),
        (["benchmark", "a", *IMAGES], f"{CONTINUES}from its states in --out"),
        (["evaluate", "a", "--attack", "autoattack", "--state", "b"], f"{CONTINUES}from b"),
        (["evaluate", "a", "--attack", "autoattack"], "; give --state, from which the same command could continue"),
        (["evaluate", "a"], ""),
        (["report", "a"], ""),
        (["explain", "a"], ""),
        (["convert", "a", "b.safetensors"], ""),
        (["doctor"], ""),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_a_stopped_command_says_how_to_continue_where_it_can(command, advice, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    def lose(*_):
        raise ConnectionError("rank 1 was ended")

    module = doctor if command[0] == "doctor" else importlib.import_module(f"sparse_adv.commands.{command[0]}")
    for end, code, said in ((stop, 130, "stopped"), (lose, 2, "error: rank 1 was ended")):
        monkeypatch.setattr(module, "run", end)
        assert main(command) == code
        assert capsys.readouterr().err == f"sparse-adv: {said}{advice}\n"


def test_what_nobody_foresaw_is_a_sentence_too(monkeypatch, capsys):
    def fail():
        raise RuntimeError("a defect\nwith a second line")

    monkeypatch.setattr(doctor, "run", fail)
    assert refused(capsys, "doctor").startswith(
        "sparse-adv: error: RuntimeError: a defect with a second line (sparse-adv -v"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--objective", "x" * 5000, "--out", "run"],
        ["explain", "x" * 5000],
        ["x" * 5000],
        ["doctor", "x" * 5000],
    ],
    ids=lambda arguments: arguments[0][:9],
)
def test_a_long_value_is_shortened(capsys, arguments):
    said = refused(capsys, *arguments, "x" * 5000)
    assert len(said) < 400 and "characters)" in said and said.count("\n") == 1


def run_in_a_shell(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command with "sparse-adv" in it, and what reached the outputs that it left open."""
    line = command.replace("sparse-adv", shlex.join([sys.executable, "-m", "sparse_adv"]))
    return subprocess.run(["bash", "-c", line, "bash", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_no_error(ticket_file, closed):
    told = run_in_a_shell(f'sparse-adv explain "$1" {closed}', str(ticket_file))
    assert told.returncode == 0 and not told.stderr and bool(told.stdout) == (closed == "2>&-")
    told = run_in_a_shell(f"sparse-adv explain nowhere {closed}")
    assert told.returncode == 2 and not told.stdout and ("nowhere" in told.stderr) == (closed == ">&-")


def test_a_reader_that_has_ended_ends_the_command_without_a_word(ticket_file):
    told = run_in_a_shell('sparse-adv explain "$1" | true; echo ${PIPESTATUS[0]}', str(ticket_file))
    assert told.stdout.strip() in ("0", "141") and not told.stderr  # 0: all was written before the reader ended


def test_a_full_standard_output_is_named(ticket_file):
    told = run_in_a_shell('sparse-adv explain "$1" >/dev/full', str(ticket_file))
    assert (told.returncode, told.stderr) == (2, "sparse-adv: error: No space left on device: the standard output\n")
    assert run_in_a_shell("sparse-adv explain nowhere 2>/dev/full").returncode == 2


def test_what_a_terminal_cannot_show_is_escaped(ticket_file, tmp_path):
    named = str(ticket_file.rename(tmp_path / "\N{GREEK SMALL LETTER ALPHA}.safetensors"))
    told = run_in_a_shell('PYTHONIOENCODING=ascii sparse-adv convert "$1" "$1.pt" --to dense --no-json', named)
    assert told.returncode == 0 and "\\u03b1.safetensors.pt: 3 masks" in told.stdout
    assert "a\\x1b[31mb" in run_in_a_shell("sparse-adv explain $'a\\e[31mb'").stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\n", "has the alias *a"),
        ("[" * 5000, "nested more than 20 levels deep"),
        ("name: " + "x" * 100_000, "must have at most 64 KiB"),
        ("name: &a [*a]\n", "has the alias *a"),
        ("\x00", "run.yaml is not YAML"),
        ("epochs: " + "9" * 5000, "epochs must be a whole number, got"),
        ('"a b": 3\n', "run.yaml: there is no option 'a b'"),
        ("lr: 0.1\nlr: 0.2\n", "run.yaml has the key 'lr' twice: keep one"),
        ("batch-size: 3\nbatch_size: 4\n", "has the key 'batch_size' twice"),
    ],
    ids=range(9),
)
def test_a_hostile_config_is_refused(tmp_path, capsys, content, said):
    (tmp_path / "run.yaml").write_text(content)
    message = refused(capsys, "train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"))
    assert said in message


@pytest.mark.parametrize(
    "content",
    [
        '{"settings": [1]}',
        "[" * 100_000,
        '{"kind": "train", "train": []}',
        '{"kind": "train", "train": {"epochs": NaN}}',
        '{"kind": "train", "train": {"milestones": 5}}',
        '{"kind": "train", "train": {"objective": []}}',
        '{"kind": 5}',
        "1" * 5000,
    ],
    ids=range(8),
)
def test_a_run_folder_of_another_form_is_refused(tmp_path, capsys, content):
    (tmp_path / "run.json").write_text(content)
    assert "run.json" in refused(capsys, "report", str(tmp_path), "--out", str(tmp_path / "report"))
