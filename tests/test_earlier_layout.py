"""Tickets and run folders of the layout before `RunInfo` and `SearchRecord`: they are refused by name."""

import json

import pytest
import torch
from helpers.refusal import refused
from torch import nn

from sparse_adv import data, masks, models, runs, tickets, training
from sparse_adv.config import PruneConfig, TrainConfig
from sparse_adv.training.checkpoint import write_state, write_weights

NETWORK = ("--arch", "digits_cnn", "--width", "4")
QUICK = ("--limit", "64", "--objective", "fgsm-rs", "--epochs", "1", "--evaluation-steps", "1")
SETTINGS = {"objective": "fgsm-rs", "epochs": 2, "lr": 0.1, "drops": [0.5, 0.75], "clip": 0.0, "guard": True}
COST = {"seconds": 7.5, "multiply_adds": 3_031_159_488}
RECORD = {"epoch": 1, "step": 11, "loss": 2.3, "attack_seconds": 0.1, "guard_accuracy": 0.1, "density": 1.0, **COST}
RUN = {
    "settings": {"command": "train", "data": "digits", "seed": 0, **SETTINGS, "processes": 1},
    "network": {"arch": "digits_cnn", "width": 4},
    "densities": {"weights": 1.0, "multiply_adds": 1.0},
    "before": COST,
    "versions": {"sparse_adv": "0.1.0"},
    "commit": "1a48e42f4860",
}
RESULT = {**COST, "tested": "best", "best_epoch": 1, "best_robust_accuracy": 0.2, "test": {"clean": 0.3}}
MODEL = models.build("digits_cnn", width=4)


@pytest.fixture
def ticket(tmp_path):
    """A ticket file; its provenance has another search record than today's tickets."""
    provenance = {"arch": "digits_cnn", "width": 4, "data": "digits", "seed": 0, "input_shape": [1, 8, 8]}
    provenance |= {"recipe": SETTINGS, "rule": {"density": 0.5, "gather": False}, "epochs": [RECORD], **COST}
    path = tmp_path / "old" / runs.TICKET
    masks.save_ticket(path, masks.Ticket(masks.prune(MODEL, 0.5), MODEL.state_dict(), provenance))
    return path


@pytest.fixture
def folder(tmp_path):
    """A finished training run."""
    folder = tmp_path / "old_run"
    write_weights(folder / runs.BEST, MODEL.state_dict(), {})
    (folder / runs.INFO).write_text(json.dumps(RUN))
    (folder / runs.EPOCHS).write_text(json.dumps(RECORD) + "\n")
    (folder / runs.RESULT).write_text(json.dumps(RESULT))
    state = {"recipe": SETTINGS, "records": [RECORD], "best": 0, "totals": COST, "guard": None, "step": 11}
    write_state(folder / runs.STATE, state | {"model": MODEL.state_dict()})
    return folder


def test_a_search_does_not_continue_from_an_earlier_ticket(ticket):
    batches = data.Batches(data.Split(torch.rand(4, 1, 8, 8), torch.arange(4)), 2)
    with pytest.raises(ValueError, match=r"^the provenance of .*old.ticket\.safetensors lacks the key 'train'$"):
        tickets.search(MODEL, batches, TrainConfig(), PruneConfig(density=0.5), folder=ticket.parent)


def test_a_run_is_refused_with_its_file(folder, tmp_path, capsys):
    reason = f"{folder / runs.INFO} has the unknown key 'commit': another version of sparse_adv wrote it"
    for arguments in (
        ["report", str(folder), "--out", str(tmp_path / "report")],
        ["evaluate", str(folder)],
        ["train", *NETWORK, *QUICK, "--out", str(folder)],
        ["search", *NETWORK, *QUICK, "--out", str(folder)],
    ):
        assert refused(capsys, *arguments).strip() == f"sparse-adv: error: {reason}"


def test_a_state_is_refused_with_the_key_that_it_lacks(folder):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    batches = data.Batches(data.Split(torch.rand(4, 1, 8, 8), torch.arange(4)), 2)
    (folder / "run.json").unlink()  # which would be refused first
    with pytest.raises(ValueError, match=r"state\.pt' lacks the key 'config', another version of sparse_adv wrote it"):
        training.train(model, batches, TrainConfig("fgsm-rs", epochs=2), folder=folder)


def test_a_config_file_is_refused_with_its_name(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("drops: [0.5, 0.75]\n")
    told = refused(capsys, "train", *NETWORK, "--config", str(config), "--out", str(tmp_path / "run"))
    assert told.strip() == f"sparse-adv: error: {config}: there is no option 'drops'"
