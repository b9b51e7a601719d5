"""An objective of the user: it trains as one of the library does, and belongs to the run as a hook does."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.small_runs import QUICK, VALIDATION, batches, equal_states, network

from sparse_adv import attacks, report, runs, training
from sparse_adv.training.overfitting import OverfittingMonitor

CONFIG = replace(QUICK, objective="fgsm-rs", epochs=3)


class OwnFGSMRS(training.TrainingObjective):
    """Written by a user who has the public functions alone."""

    passes = training.Passes(attack_forward=1, attack_backward=1)

    def draws(self, x):
        return True

    def craft(self, model, x, y, noise):
        own = self.config
        return attacks.fgsm_rs(model, x, y, eps=own.eps, alpha=own.step_size, generator=noise, check=self.check)


class Mixed(OwnFGSMRS):
    """Has a setting, and a state: the number of updates."""

    def __init__(self, *arguments, share=0.5):
        super().__init__(*arguments)
        self.settings, self.made = {"share": share}, torch.zeros(())

    def loss(self, model, x, adv, y):
        share = self.settings["share"]
        return share * super().loss(model, x, x, y) + (1 - share) * super().loss(model, x, adv, y)

    def after_update(self):
        self.made += 1

    def state_dict(self):
        return {"made": self.made}

    def load_state_dict(self, state):
        self.made.copy_(state["made"])


def train(folder=None, objective=Mixed, config=CONFIG, **options):
    model = network()
    records = training.train(model, batches(), config, folder=folder, objective=objective, **options)
    return model, records


def test_an_objective_of_the_user_trains_as_the_same_one_of_the_library():
    (own, records), (model, expected) = train(objective=OwnFGSMRS), train(objective=None)
    assert equal_states(own.state_dict(), model.state_dict())
    assert [(each.loss, each.total.macs) for each in records] == [(each.loss, each.total.macs) for each in expected]


def test_a_stopped_run_continues_with_its_objective_only(tmp_path):
    train(tmp_path, on_epoch=lambda record: record.epoch == 2)
    for objective, said in (
        (None, r"objective\.name 'Mixed', now None"),
        (OwnFGSMRS, r"objective\.name 'Mixed', now 'OwnFGSMRS'"),
        (partial(Mixed, share=0.25), r"objective\.settings\.share 0\.5, now 0\.25"),
    ):
        with pytest.raises(ValueError, match=said):
            train(tmp_path, objective)
    assert equal_states(train(tmp_path)[0].state_dict(), train()[0].state_dict())
    assert "train, Mixed" in report.summary([runs.read(tmp_path)])


def test_a_run_of_the_library_s_objective_is_not_continued_with_another(tmp_path):
    train(tmp_path, None, on_epoch=lambda record: True)
    with pytest.raises(ValueError, match=r"objective\.name None, now 'OwnFGSMRS'"):
        train(tmp_path, OwnFGSMRS)


def test_an_undone_epoch_is_undone_for_the_objective_too(monkeypatch):
    accuracies, built = iter([0.5, 0.0, 0.5, 0.5]), []
    measure = OverfittingMonitor.measure
    monkeypatch.setattr(
        OverfittingMonitor, "measure", lambda self, model: replace(measure(self, model), fraction=next(accuracies))
    )
    train(objective=lambda *arguments: built.append(Mixed(*arguments)) or built[-1], validation=VALIDATION)
    (objective,) = built
    assert objective.made == 6  # the second of three epochs was trained with PGD


class NotOnCrafted(training.TrainingObjective):
    def loss(self, model, x, adv, y):
        return self.cross_entropy(model(x + 0), y)


class Counting(OwnFGSMRS):
    def state_dict(self):
        return {"made": 3}


@pytest.mark.parametrize(
    ("objective", "error", "said"),
    [
        (Counting, TypeError, r"objective.state_dict\(\) must hold tensors, got 3 for 'made'"),
        ("pgd", TypeError, "objective must be of type Callable or None, got 'pgd'"),
        (OwnFGSMRS(CONFIG), TypeError, "objective must be of type Callable or None, got <"),
        (lambda *arguments: "pgd", TypeError, "objective must make a TrainingObjective, got 'pgd'"),
        (partial(Mixed, share=torch.ones(2)), ValueError, "objective.settings must hold only what run.json can"),
        (NotOnCrafted, ValueError, r"loss must call model\(adv\), from whose logits the accuracy is counted"),
    ],
)
def test_what_is_no_objective_is_refused_in_a_sentence(tmp_path, objective, error, said):
    with pytest.raises(error, match=said):
        train(tmp_path, objective)
