"""More epochs extend a run that is finished, whose earlier result is kept."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.small_runs import QUICK, VALIDATION, batches, network

from sparse_adv import runs, training
from sparse_adv.config import OBJECTIVES

CONFIG = replace(QUICK, epochs=2)


def run(folder, config=CONFIG, model=None):
    model = network() if model is None else model
    return training.train(model, batches(), config, validation=VALIDATION, folder=folder)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_more_epochs_extend_a_run(tmp_path, schedule):
    config = replace(CONFIG, schedule=schedule)
    run(tmp_path, config)
    (tmp_path / runs.RESULT).write_text("the result of two epochs")
    records = run(tmp_path, replace(config, epochs=4))
    assert [record.epoch for record in records] == [1, 2, 3, 4]
    info = runs.read(tmp_path).info
    assert info.train.epochs == 4 and info.extended == (2,)
    assert not (tmp_path / runs.RESULT).exists() and (tmp_path / "result_2.json").read_text().startswith("the result")
    if schedule == "constant":  # then the same as a run that had four epochs from the beginning
        whole = run(tmp_path / "whole", replace(config, epochs=4))
        assert [record.loss for record in whole] == [record.loss for record in records]
    else:
        assert records[-1].learning_rate == config.lr * (1 + np.cos(np.pi * 11 / 12)) / 2
    with pytest.raises(ValueError, match=r"train\.epochs 4, now 2"):
        run(tmp_path, config)
    run(tmp_path, replace(config, epochs=5))
    assert runs.read(tmp_path).info.extended == (2, 4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_with_a_constant_rate_an_extended_run_is_one_of_all_epochs(tmp_path, objective):
    """But for two objectives, whose second term depends on the number of epochs; that of fgsm-rs-cs begins later."""
    config = replace(CONFIG, objective=objective, overfitting_monitor=False, replays=2)
    run(tmp_path / "extended", config)
    extended = run(tmp_path / "extended", replace(config, epochs=4))
    whole = run(tmp_path / "whole", replace(config, epochs=4))
    is_same = [record.loss for record in extended] == [record.loss for record in whole]
    assert is_same == (objective != "nu-at")


def test_a_refused_extension_changes_nothing(tmp_path):
    run(tmp_path, CONFIG)
    (tmp_path / runs.RESULT).write_text("the result of two epochs")
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="other network"):
        run(tmp_path, replace(CONFIG, epochs=4), network(channels=8))
    assert files == {file: file.read_bytes() for file in tmp_path.iterdir()}


def test_a_run_that_has_not_ended_is_not_shortened(tmp_path):
    def begin(epochs):
        own = replace(CONFIG, epochs=epochs)
        return training.Training(network(), batches(), own, validation=VALIDATION, folder=tmp_path)

    next(begin(4).epochs())
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        begin(3)
    assert len(begin(4).records) == len(begin(5).records) == 1
