"""What scripts for torchattacks and the authors' AutoAttack set and call, beyond the attacks themselves."""

from dataclasses import replace

import pytest
import torch
from helpers.attacked import batch, make_model, snapshot
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sparse_adv.attacks as torchattacks
from sparse_adv.attacks import AutoAttack, autoattack

EPS = 0.02


class Flags(nn.Module):
    """A network that notes which of its modules are in training mode in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = make_model(), []

    def forward(self, x):
        self.seen.append([module.training for module in self.net])
        return self.net(x)


@pytest.mark.parametrize(
    ("asked", "norm", "dropout"),
    [((True,), False, False), ((True, True), True, False), ((True, False, True), False, True)],
)
def test_a_model_is_attacked_in_training_mode_where_that_is_asked_for(asked, norm, dropout):
    model, (images, labels) = Flags().eval(), batch()
    before = snapshot(model)
    for attack in (torchattacks.PGD(model, steps=2), torchattacks.APGD(model, steps=2)):
        attack.set_model_training_mode(*asked)
        model.seen.clear()
        attack(images, labels)
        # convolution, BatchNorm, ReLU, the second block, dropout, flattening, the linear layer
        assert model.seen and all(seen == [True, norm, True, True, dropout, True, True] for seen in model.seen)
        assert snapshot(model) == before
        attack.set_model_training_mode(False)
        model.seen.clear()
        attack(images, labels)
        assert not any(map(any, model.seen))


def test_what_is_saved_can_be_loaded(tmp_path):
    model, (images, labels) = make_model().eval(), batch(size=10)
    atk, path = torchattacks.PGD(model, eps=EPS, steps=2, random_start=False), tmp_path / "adv.pt"
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    adv = atk(images, labels)
    atk.save(loader, path, verbose=False, save_predictions=True, save_clean_inputs=True)
    wanted = {"batch_size": 10, "load_predictions": True, "load_clean_inputs": True}
    (found,) = atk.load(load_path=path, **wanted)
    for tensor, expected in zip(found, (adv, labels, model(adv).argmax(1), images), strict=True):
        assert torch.equal(tensor, expected)
    (found,) = torchattacks.Attack.load(path, normalize={"mean": [0.5] * 3, "std": [0.25] * 3}, **wanted)
    torch.testing.assert_close(found[0], (adv - 0.5) / 0.25)
    torch.testing.assert_close(found[3], (images - 0.5) / 0.25)
    assert [len(found) for found, _ in atk.load(path, batch_size=4)] == [4, 4, 2]
    atk.save(loader, path, verbose=False, save_type="int")
    (found,) = atk.load(path)
    assert torch.equal(found[0], (adv * 255).floor() / 255) and torch.equal(found[1], labels)
    with pytest.raises(ValueError, match="no tensor 'preds'"):
        atk.load(path, load_predictions=True)
    torch.save({"adv_inputs": adv, "labels": labels[1:]}, path)
    with pytest.raises(ValueError, match="different lengths"):
        atk.load(path)
    torch.save(model, path)
    with pytest.raises(ValueError, match=r"adv\.pt is no file of adversarial images"):
        atk.load(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"adv\.pt is no file of adversarial images: \w+"):
        atk.load(path)


def test_multi_attack_says_how_much_each_attack_broke(capsys):
    model, (images, _) = make_model().eval(), batch(size=12)
    labels = model(images).argmax(1)
    labels[0] = (labels[0] + 1) % 5
    members = [torchattacks.FGSM(model, eps=EPS / 4), torchattacks.FGSM(model, eps=EPS)]
    attack = torchattacks.MultiAttack(members, verbose=True)
    adv = attack(images, labels)
    after_first = 100 * (model(members[0](images, labels)).argmax(1) != labels).float().mean().item()
    after_both = 100 * (model(adv).argmax(1) != labels).float().mean().item()
    assert capsys.readouterr().out == f"adversarial after each attack: {after_first:.2f} %, {after_both:.2f} %\n"
    loader = DataLoader(TensorDataset(images, labels), batch_size=5)
    accuracy, rates, distance, seconds = attack.save(loader, verbose=False, return_verbose=True)
    assert accuracy == pytest.approx(100 - after_both) and rates == pytest.approx([after_first, after_both])
    assert distance > 0 and seconds > 0 and attack.save(loader, verbose=False) is None


def test_an_attack_says_what_it_is():
    model = make_model()
    atk = torchattacks.APGD(model, norm="L2", eps=0.5)
    assert repr(atk).startswith("APGD(attack_mode=default, norm=L2, eps=0.5, steps=10, n_restarts=1")
    assert (atk.attack, atk.model_name, atk.supported_mode) == ("APGD", "Sequential", ["default", "targeted"])
    assert torchattacks.TPGD(model).supported_mode == ["default"] and atk.normalization_used is None
    atk.set_normalization_used([0.5, 0.4, 0.3], [0.25] * 3)
    assert atk.normalization_used["mean"].flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(atk.inverse_normalize(atk.normalize(images)), images)
    other = make_model().double()
    atk.set_model(other)
    assert atk.model is other and atk(atk.normalize(images.repeat(1, 1, 2, 2).double()), torch.tensor([0, 1])).shape


def test_noise_and_no_attack():
    model, (images, _) = make_model(), batch(size=200)
    assert torch.equal(torchattacks.VANILA(model)(images), images)
    torch.manual_seed(0)
    noise = torchattacks.GN(model, std=0.5, lo=-9.0, hi=9.0)(images) - images
    assert noise.std().item() == pytest.approx(0.5, rel=0.02) and noise.mean().abs() < 0.02
    clamped = torchattacks.GN(model, std=0.5)(images)
    assert clamped.min() == 0 and clamped.max() == 1
    with pytest.raises(ValueError, match="std must be at least 0 and finite, got -1"):
        torchattacks.GN(model, std=-1)


def test_autoattack_is_an_attack_as_in_torchattacks(tmp_path):
    model, (images, _) = make_model().eval(), batch(size=6)
    labels = model(images).argmax(1)

    def made(model=model, **options):
        return AutoAttack(model, eps=EPS, version="custom", attacks_to_run=["square"], seed=0, verbose=False, **options)

    atk = made()
    atk.square.n_queries = 30
    plain = atk(images, labels)
    assert (
        torch.equal(plain, atk.run_standard_evaluation(images, labels, bs=6)) and 0 < atk.result.accuracy["square"] < 1
    )
    normalised = made(lambda x: model(x * 0.25 + 0.5))
    normalised.square.n_queries = 30
    normalised.set_normalization_used([0.5] * 3, [0.25] * 3)
    adv = normalised((images - 0.5) / 0.25, labels)
    torch.testing.assert_close(adv * 0.25 + 0.5, plain)
    assert normalised.result.accuracy == atk.result.accuracy
    first = torchattacks.FGSM(model, eps=EPS / 8)
    both = torchattacks.MultiAttack([first, atk])(images, labels)
    assert (model(both).argmax(1) != labels).sum() >= (model(first(images, labels)).argmax(1) != labels).sum()
    assert atk(images[:0], labels[:0]).shape == (0, 3, 8, 8) and atk.get_mode() == "default"
    assert atk.save([(images, labels)], tmp_path / "a.pt", verbose=False, return_verbose=True)[0] < 100
    with pytest.raises(ValueError, match="AutoAttack has no targeted mode"):
        atk.set_mode_targeted_random()
    assert repr(atk) == "AutoAttack(norm='linf', eps=0.02, version='custom', attacks_to_run=('square',), seed=0)"


@pytest.fixture
def spent(monkeypatch):
    """The settings with which each attack was called; the attacks find nothing."""
    calls = {}
    for name, member in list(autoattack.MEMBERS.items()):

        def attack(model, x, y, name=name, **options):
            calls[name] = options
            return x

        monkeypatch.setitem(autoattack.MEMBERS, name, replace(member, attack=attack))
    return calls


def test_settings_of_the_authors_implementation_are_used_and_printed(spent, capsys):
    model, (images, _) = make_model().eval(), batch(size=3)
    labels = model(images).argmax(1)
    adversary = AutoAttack(model, norm="Linf", eps=EPS, version="custom", seed=0)
    adversary.attacks_to_run = ["apgd-ce", "fab", "apgd-t", "fab-t", "square"]
    assert adversary.apgd.n_restarts == adversary.fab.n_restarts == 5
    adversary.apgd.n_restarts = adversary.fab.n_restarts = 2
    adversary.apgd.rho, adversary.apgd.n_iter = 0.5, 40
    adversary.apgd_targeted.n_target_classes, adversary.apgd_targeted.n_restarts = 3, 2
    adversary.fab.n_target_classes, adversary.fab.eta = 4, 1.1
    adversary.square.n_queries, adversary.square.p_init = 1000, 0.3
    adversary.run_standard_evaluation(images, labels)
    printed = capsys.readouterr().out
    assert printed.startswith(
        'version "custom", which is not the whole AutoAttack: apgd-ce (40 steps, 2 restarts, rho 0.5); fab (100 steps, '
        "2 restarts, eta 1.1); apgd-t (100 steps, 3 targets, 2 restarts); fab-t (100 steps, 4 targets, eta 1.1); "
        "square (1000 queries, p_init 0.3); linf, eps 0.02, 3 images, seed 0\n"
    )
    assert spent["apgd-ce"].items() >= {"steps": 40, "restarts": 2, "rho": 0.5, "eot_iter": 1}.items()
    assert spent["apgd-t"].items() >= {"steps": 100, "restarts": 2, "n_target_classes": 3}.items()
    assert spent["fab"].items() >= {"restarts": 2, "eta": 1.1}.items() and spent["fab-t"]["n_target_classes"] == 4
    assert "restarts" not in spent["fab-t"] and spent["square"]["queries"] == 1000
    assert spent["square"]["p_init"] == 0.3 and not spent["square"]["resc_schedule"]
    for change, error in (
        (lambda: setattr(adversary.apgd, "n_restarts", 0), "n_restarts must be an integer of at least 1, got 0"),
        (lambda: setattr(adversary.square, "p_init", 2), "p_init must lie in"),
        (lambda: setattr(adversary.apgd, "rho", "a"), "rho must"),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            change()
    with pytest.raises(AttributeError):
        adversary.apgd.restarts = 3


def test_other_settings_than_the_standard_ones_are_not_called_autoattack(spent, tmp_path):
    model, (images, _) = make_model().eval(), batch(size=3)
    labels, path = model(images).argmax(1), tmp_path / "state.safetensors"
    names = []
    for change in (lambda a: None, lambda a: setattr(a.square, "n_queries", 6000), lambda a: a.set_version("standard")):
        adversary = AutoAttack(model, eps=EPS, seed=0, verbose=False)
        change(adversary)
        adversary.run_standard_evaluation(images, labels)
        names.append(adversary.result.name)
        adversary.attacks_to_run = ["apgd-ce"]
        adversary.run_standard_evaluation(images, labels)
        assert "not the whole AutoAttack" in adversary.result.name
    assert names == ["AutoAttack", 'version "standard", which is not the whole AutoAttack', "AutoAttack"]
    adversary.run_standard_evaluation(images, labels, state_path=path)
    adversary.apgd.n_iter = 50
    with pytest.raises(ValueError, match="other options"):
        adversary.run_standard_evaluation(images, labels, state_path=path)


def test_each_attack_alone_is_told_and_logged(tmp_path, capsys):
    model, (images, _) = make_model().eval(), batch(size=6)
    labels, log = model(images).argmax(1), tmp_path / "log.txt"
    adversary = AutoAttack(model, eps=EPS, version="custom", attacks_to_run=["square", "apgd-ce"], log_path=log)
    adversary.seed, adversary.square.n_queries, adversary.apgd.n_iter = 1, 20, 5
    found = adversary.run_standard_evaluation_individual(images, labels, return_labels=True)
    for name, (adv, predictions) in found.items():
        assert torch.equal(model(adv).argmax(1), predictions)
        assert f"robust accuracy by {name}: {(predictions == labels).double().mean():.2%}" in log.read_text()
    assert adversary.clean_accuracy(images, labels) == 1 and "clean accuracy 100.00%" in log.read_text()
    printed = capsys.readouterr().out
    assert printed == log.read_text() and "seed 1" in printed
    adversary.verbose = False
    adversary.clean_accuracy(images, labels)
    assert not capsys.readouterr().out
