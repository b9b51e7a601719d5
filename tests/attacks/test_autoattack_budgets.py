"""AutoAttack spends the budgets that it prints, tells what was found without gradients, and follows its seed."""

from dataclasses import replace

import pytest
import torch
from helpers.attacked import batch, interrupted_at_its_first_state, make_model
from torch import nn

from sparse_adv.attacks import AutoAttack, autoattack

SPENT = {
    # attack: (passes with a gradient, passes without) on an image that never falls, less the few of the clean image
    "standard": {"apgd-ce": (100, 0), "apgd-t": (9 * 100, 0), "fab-t": (9 * 100, 9 * 100), "square": (0, 5000)},
    "plus": {"apgd-ce": (5 * 100, 0), "apgd-dlr": (5 * 100, 0), "fab": (5 * 100, 5 * 100)},
    "rand": {"apgd-ce": (20 * 100, 0), "apgd-dlr": (20 * 100, 0)},
}


class Robust(nn.Module):
    """A linear model of ten classes, with one far ahead of the others, that counts its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 10)
        with torch.no_grad():
            self.fc.bias[0] = 50.0
        self.with_gradient = self.without = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.with_gradient += x.requires_grad
        self.without += not x.requires_grad
        return self.fc(x.flatten(1))


@pytest.mark.parametrize("version", SPENT)
def test_each_attack_spends_its_whole_budget_on_an_image_that_stands(version, monkeypatch):
    model, spent = Robust(), {}
    for name, member in autoattack.MEMBERS.items():

        def attack(*args, name=name, member=member, **options):
            if name not in SPENT[version]:
                return args[1]
            before = model.with_gradient, model.without
            adv = member.attack(*args, **options)
            spent[name] = model.with_gradient - before[0], model.without - before[1]
            return adv

        monkeypatch.setitem(autoattack.MEMBERS, name, replace(member, attack=attack))
    evaluator = AutoAttack(model, eps=0.01, version=version, seed=0, verbose=False, engine=False)
    evaluator.run_standard_evaluation(torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]))
    assert evaluator.result.robust.all() and spent.keys() == SPENT[version].keys()
    for name, (with_gradient, without) in SPENT[version].items():
        starts = max(with_gradient // 100, 1)  # each start may look at its end, and FAB thrice on its way back
        assert spent[name][0] == with_gradient and 0 <= spent[name][1] - without <= 1 + 3 * starts, name


@pytest.mark.parametrize(
    ("names", "breaks", "warned"),
    [
        (["apgd-ce", "square"], {"square"}, True),
        (["apgd-ce", "square"], {"apgd-ce"}, False),
        (["apgd-ce", "square"], set(), False),
        (["square"], {"square"}, False),
        (["square", "apgd-ce"], {"square"}, False),
        (["square", "apgd-ce"], {"apgd-ce"}, False),
    ],
)
def test_what_only_square_broke_is_a_sign_of_masked_gradients(names, breaks, warned, monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    images = torch.rand(6, 1, 2, 2)
    labels = model(images).argmax(1)
    across = torch.where(labels.bool(), 1.0, -1.0)[:, None] * (model[1].weight[0] - model[1].weight[1]).detach()

    def found(model, x, y, name, **options):
        return (x + 9 * across[: len(x)].view_as(x)).clamp(0, 1) if name in breaks else x

    for name in names:

        def attack(*args, name=name, **options):
            return found(*args, name=name, **options)

        monkeypatch.setitem(autoattack.MEMBERS, name, replace(autoattack.MEMBERS[name], attack=attack))
    evaluator = AutoAttack(model, eps=1.0, version="custom", attacks_to_run=names, verbose=False)
    evaluator.run_standard_evaluation(images, labels)
    assert evaluator.result.accuracy[names[-1]] == (0 if breaks else 1)
    assert any("square, which needs no gradients" in sign for sign in evaluator.result.signs) == warned


@pytest.mark.parametrize("name", ["apgd-ce", "square"])
def test_two_seeds_differ_and_one_repeats(name):
    model, (images, _) = make_model().eval(), batch(size=8)
    labels = model(images).argmax(1)
    options = {"eps": 0.1, "version": "custom", "attacks_to_run": [name], "verbose": False}

    def run(seed):
        evaluator = AutoAttack(model, seed=seed, **options)
        evaluator.apgd.n_restarts, evaluator.square.n_queries = 1, 200
        return evaluator.run_standard_evaluation(images, labels, bs=4)

    assert run(1).equal(run(1)) and not run(1).equal(run(2))
    found = []
    for seed in (3, 3, 4):  # without a seed it is drawn from PyTorch's generator
        torch.manual_seed(seed)
        found.append(run(None))
    assert found[0].equal(found[1]) and not found[0].equal(found[2])


def test_a_run_that_drew_its_seed_continues_with_it(tmp_path, capsys):
    model, (images, _) = make_model().eval(), batch(size=12)
    labels, path = model(images).argmax(1), tmp_path / "state.safetensors"
    options = {"eps": 0.012, "version": "custom", "attacks_to_run": ["apgd-ce", "apgd-t"]}

    def run(**more):
        attack = AutoAttack(model, **options, **more)
        attack.apgd.n_restarts = 1
        return attack

    with interrupted_at_its_first_state():
        run().run_standard_evaluation(images, labels, bs=4, state_path=path)
    continued = run().run_standard_evaluation(images, labels, bs=4, state_path=path)
    seeds = {line.rpartition("seed ")[2] for line in capsys.readouterr().out.splitlines() if ", seed " in line}
    assert len(seeds) == 1
    whole = run(seed=int(seeds.pop())).run_standard_evaluation(images, labels, bs=4)
    assert whole.equal(continued)


@pytest.mark.parametrize("run", ["run_standard_evaluation", "run_standard_evaluation_individual"])
def test_images_without_rows_and_columns_are_refused_before_the_first_attack(run):
    calls = []

    def model(images):
        calls.append(images)
        return images.flatten(1)[:, :5]

    evaluator = AutoAttack(model, seed=0, verbose=False)
    with pytest.raises(
        ValueError, match=r"images must be \[N, channels, height, width\] for square, got shape \(3, 8\)"
    ):
        getattr(evaluator, run)(torch.rand(3, 8), torch.tensor([0, 1, 0]))
    assert not calls


def test_a_model_of_one_class_is_told_without_advice():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 1))
    evaluator = AutoAttack(model, version="custom", attacks_to_run=["square"], seed=0, verbose=False)
    with pytest.raises(ValueError, match=r"square needs at least 2 classes, the model has 1$"):
        evaluator.run_standard_evaluation(torch.rand(3, 1, 2, 2), torch.tensor([0, 0, 0]))
