"""The demo: its runs have the settings that it was given, and its sentences follow from the numbers of its runs."""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.run_folders import epoch_record

from sparse_adv import demo, experiment, masks, runs
from sparse_adv.config import DataConfig, NetworkConfig, PruneConfig, TrainConfig
from sparse_adv.runs import DENSE, NO_COST, Cost, Density, Run, RunInfo, TicketChecks, TrainResult

IMAGES, NETWORK = DataConfig("digits", limit=100, validation=30, batch_size=50), NetworkConfig("digits_cnn", width=4)


def made_up(name: str, robust: float, seconds: float, density: Density) -> Run:
    info = RunInfo("train", TrainConfig(), name=name, density=density)
    records = [
        epoch_record(epoch, attack=Cost(seconds - 1 + extra), update=Cost(1.0))
        for epoch, extra in enumerate((0.0, 0.0, 9.0), 1)
    ]
    result = TrainResult(NO_COST, TicketChecks(), "best", 1, robust, {"pgd-20": robust})
    return Run(Path(name), info, records, result)


def test_the_sentences_have_the_cost_of_an_epoch_and_the_uncertainty_of_the_accuracies():
    ticket = made_up("ticket", 0.9, 2.0, Density(0.1, 0.2))
    costs, noise = demo.findings([ticket, made_up("dense", 0.5, 6.0, DENSE)], 300)
    assert "ticket 2.00 s (3.00x), dense 6.00 s (1.00x)" in costs  # medians: one slow epoch does not change them
    assert "300 test images, differences under 5 points" in noise  # 8 points by the accuracy of dense


def test_images_and_network_are_those_of_the_published_table():
    images, network = demo.IMAGES, demo.NETWORK
    assert images == DataConfig("digits", validation=300, batch_size=64) and network == NetworkConfig("digits_cnn")


def test_the_demo_trains_the_ticket_and_its_controls_with_its_settings(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    monkeypatch.setattr(demo, "IMAGES", IMAGES)
    monkeypatch.setattr(demo, "NETWORK", NETWORK)
    load, loaded = experiment.load_data, []
    monkeypatch.setattr(experiment, "load_data", lambda *given: loaded.append(given) or load(*given))
    told = demo.run(tmp_path, epochs=2, search_epochs=1, density=0.25, block=[2, 1], seed=11)
    search, *trained = (runs.read(tmp_path / name) for name in ("search", "ticket", "reinitialised", "dense"))
    assert [given[:2] for given in loaded] == [(IMAGES, 11)]
    assert search.info.train == replace(demo.SEARCH, epochs=1, evaluate_every=1, seed=11)
    assert search.info.prune == PruneConfig(density=0.25, block=(2, 1), linear=False)
    for run in (search, *trained):
        assert run.info.data == IMAGES and run.info.network == NETWORK and run.result is not None
    for run in trained:
        assert run.info.train == replace(demo.TRAINING, epochs=2, warmup_epochs=2, seed=11) and len(run.records) == 2
    ticket, reinitialised, dense = (run.info for run in trained)
    assert ticket.before == reinitialised.before == search.result.total and dense.before == NO_COST
    assert (ticket.ticket.reinit, reinitialised.ticket.reinit, dense.ticket) == (False, True, None)
    assert ticket.ticket.sha256 == reinitialised.ticket.sha256 and not ticket.ticket.shuffle
    density = masks.density(masks.load_ticket(search.folder / runs.TICKET).masks)
    assert ticket.density == reinitialised.density and ticket.density.weights == density < 0.3
    for name in ("ticket", "same mask, re-initialised", "dense"):
        assert f"| {name}" in told and f"{name} " in told.splitlines()[-3]
    assert str(tmp_path / "report.md") in told and (tmp_path / "report.md").exists()
