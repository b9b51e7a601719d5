"""AutoAttack: only survivors are attacked, examples are verified, interrupted runs end alike, names are honest."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.attacked import batch, make_model, snapshot

from sparse_adv.attacks import AutoAttack, autoattack, autoattack_state, square

EPS = 0.012
CUSTOM = {"eps": EPS, "version": "custom", "attacks_to_run": ["apgd-ce", "apgd-t"], "seed": 3, "verbose": False}


def one_start(model, **options) -> AutoAttack:
    evaluator = AutoAttack(model, **options)
    evaluator.apgd.n_restarts = 1
    return evaluator


def plant(monkeypatch, name, attack) -> None:
    """Put another function in the place of one of the attacks."""
    monkeypatch.setitem(autoattack.MEMBERS, name, replace(autoattack.MEMBERS[name], attack=attack))


@pytest.fixture
def attacked():
    model, (images, _) = make_model().eval(), batch(size=12)
    labels = model(images).argmax(1)
    labels[0] = (labels[0] + 1) % 5
    return model, images, labels


def test_examples_are_misclassified_and_lie_in_ball_and_box_without_slack(attacked):
    model, images, labels = attacked
    for norm, eps in (("Linf", EPS), ("L2", 0.15)):
        evaluator = one_start(model, **{**CUSTOM, "norm": norm, "eps": eps})
        adv, predictions = evaluator.run_standard_evaluation(images, labels, bs=5, return_labels=True)
        result = evaluator.result
        distance = (adv - images).flatten(1).norm(dim=1, p=2 if norm == "L2" else torch.inf)
        assert distance.max() <= torch.tensor(eps) and adv.min() >= 0 and adv.max() <= 1
        assert torch.equal(model(adv).argmax(1), predictions)
        assert torch.equal(result.robust, predictions == labels) and torch.equal(adv[0], images[0])
        values = list(result.accuracy.values())
        assert values == sorted(values, reverse=True) and values[0] == pytest.approx(11 / 12)
        assert 0 < values[-1] < values[0] and values[-1] == pytest.approx(result.robust.double().mean().item())
        assert len(repr(result)) < 1000  # without the tensors


def test_each_attack_sees_the_survivors_only(attacked, monkeypatch):
    model, images, labels = attacked
    seen = []
    for name, member in list(autoattack.MEMBERS.items()):

        def attack(model, x, y, name=name, member=member, **options):
            seen.append((name, len(x)))
            return member.attack(model, x, y, **options)

        plant(monkeypatch, name, attack)
    evaluator = one_start(model, **CUSTOM)
    evaluator.run_standard_evaluation(images, labels)
    survivors = round(12 * evaluator.result.accuracy["apgd-ce"])
    assert seen == [("apgd-ce", 11), ("apgd-t", survivors)] and survivors < 11
    seen.clear()
    found = evaluator.run_standard_evaluation_individual(images, labels)
    assert seen == [("apgd-ce", 11), ("apgd-t", 11)] and list(found) == ["apgd-ce", "apgd-t"]


def test_an_interrupted_run_ends_like_one_that_was_not(attacked, tmp_path, monkeypatch):
    model, images, labels = attacked
    whole = one_start(model, **CUSTOM)
    expected = whole.run_standard_evaluation(images, labels, bs=4)
    write, writes = autoattack_state.State.write, []
    path = tmp_path / "state.safetensors"

    def interrupted(state, path):
        write(state, path)
        writes.append(path)
        if len(writes) in (1, 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(autoattack_state.State, "write", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            one_start(model, **CUSTOM).run_standard_evaluation(images, labels, bs=4, state_path=path)
    continued = one_start(model, **CUSTOM)
    adv = continued.run_standard_evaluation(images, labels, bs=4, state_path=path)
    assert torch.equal(adv, expected) and continued.result.accuracy == whole.result.accuracy
    assert whole.result.seconds > 0 and continued.result.seconds > 0
    with pytest.raises(ValueError, match="is of another model, other images or other options"):
        one_start(model, **{**CUSTOM, "eps": 0.1}).run_standard_evaluation(images, labels, state_path=path)
    path.write_bytes(b"no state")
    with pytest.raises(ValueError, match="is no state of AutoAttack"):
        one_start(model, **CUSTOM).run_standard_evaluation(images, labels, state_path=path)


def test_every_attack_and_batch_draws_numbers_of_its_own_and_the_seed_decides_them(attacked, monkeypatch):
    model, images, labels = attacked
    seen = []

    def attack(model, x, y, *, generator, **options):
        seen.append(generator.initial_seed())
        return x

    for name in list(autoattack.MEMBERS):
        plant(monkeypatch, name, attack)
    for seed in (3, 3, 4):
        AutoAttack(model, **{**CUSTOM, "seed": seed}).run_standard_evaluation(images, labels, bs=4)
    first, again, other = (seen[at : at + 6] for at in (0, 6, 12))  # two attacks on three batches
    assert first == again and len(seen) == 18 and len({*first, *other}) == 12


@pytest.mark.parametrize("gradients_find", [False, True])
def test_square_that_finds_more_than_gradients_is_a_sign(attacked, monkeypatch, gradients_find):
    model, images, labels = attacked

    def strong(model, x, y, *, generator, eps, norm, lo, hi, **_):
        return square(model, x, y, queries=50, generator=generator, eps=eps, norm=norm, lo=lo, hi=hi)

    def weak(model, x, y, **_):
        return x

    plant(monkeypatch, "apgd-ce", strong if gradients_find else weak)
    plant(monkeypatch, "square", weak if gradients_find else strong)
    evaluator = AutoAttack(model, **{**CUSTOM, "eps": 0.1, "attacks_to_run": ["apgd-ce", "square"]})
    evaluator.run_standard_evaluation(images, labels)
    assert any("needs no gradients, found" in sign for sign in evaluator.result.signs) is not gradients_find


def test_what_runs_is_printed_with_its_budget_and_its_true_name(attacked, capsys, tmp_path):
    model, images, labels = attacked
    log = tmp_path / "log.txt"
    one_start(model, **{**CUSTOM, "verbose": True}, log_path=log).run_standard_evaluation(images, labels)
    printed = capsys.readouterr().out
    assert 'version "custom", which is not the whole AutoAttack: apgd-ce (100 steps, 1 restart); apgd-t' in printed
    assert "after apgd-t: robust accuracy" in printed and "0 examples unconfirmed in float32" in printed
    assert log.read_text() == printed


def test_claims_that_verification_does_not_confirm_are_counted(attacked, monkeypatch):
    model, images, labels = attacked
    plant(monkeypatch, "apgd-ce", lambda model, x, y, **_: torch.rand_like(x))
    evaluator = one_start(model, **{**CUSTOM, "eps": 1e-6, "attacks_to_run": ["apgd-ce"]})
    evaluator.run_standard_evaluation(images, labels)
    assert evaluator.result.unconfirmed["apgd-ce"] > 0 and evaluator.result.accuracy["apgd-ce"] == pytest.approx(
        11 / 12
    )


def test_an_image_whose_example_holds_in_half_precision_only_is_attacked_again(attacked, monkeypatch):
    model, images, labels = attacked
    calls = []

    def attack(model, x, y, **options):
        calls.append((len(x), torch.is_autocast_enabled("cpu"), options["engine"]))
        return torch.rand_like(x) if len(calls) == 1 else x + (y[:, None, None, None] + 1) * 0.01

    plant(monkeypatch, "apgd-ce", attack)
    evaluator = one_start(model, **{**CUSTOM, "eps": 1e-6, "attacks_to_run": ["apgd-ce"]})
    with torch.autocast("cpu", torch.bfloat16):
        evaluator.run_standard_evaluation(images, labels)
    unconfirmed = evaluator.result.unconfirmed["apgd-ce"]
    assert unconfirmed > 0 and calls == [(11, True, True), (unconfirmed, False, False)]


def test_attacks_may_be_chosen_after_the_constructor(attacked):
    model, images, labels = attacked
    evaluator = one_start(model, eps=EPS, version="custom", seed=3, verbose=False)
    with pytest.raises(ValueError, match="must name at least one"):
        evaluator.run_standard_evaluation(images, labels)
    evaluator.attacks_to_run = ["apgd-ce"]
    evaluator.run_standard_evaluation(images, labels)
    assert list(evaluator.result.accuracy) == ["clean", "apgd-ce"]
    with pytest.raises(ValueError, match="got 'apgd'"):
        evaluator.attacks_to_run = ["apgd"]


@pytest.mark.parametrize("wrong", [None, 3, "square", b"square", np.zeros(2), torch.zeros(2), {"square"}, np.bool_(1)])
def test_names_of_attacks_of_another_type_are_refused_and_nothing_changes(attacked, wrong):
    evaluator = AutoAttack(attacked[0], **CUSTOM)
    before = evaluator.version, evaluator.settings, evaluator.attacks_to_run
    for give in (
        lambda: AutoAttack(attacked[0], **{**CUSTOM, "attacks_to_run": wrong}),
        lambda: evaluator.set_version("custom", wrong),
        lambda: setattr(evaluator, "attacks_to_run", wrong),
    ):
        with pytest.raises(TypeError, match="attacks_to_run must be a sequence of names, got"):
            give()
    with pytest.raises(ValueError, match=r"custom\" only, got \['square'\] with 'standard'"):
        evaluator.set_version("standard", ["square"])
    assert (evaluator.version, evaluator.settings, evaluator.attacks_to_run) == before


def test_a_seed_of_numpy_is_the_same_seed(attacked, tmp_path):
    model, images, labels = attacked
    path, options = tmp_path / "state.safetensors", {**CUSTOM, "attacks_to_run": ["apgd-ce"]}
    expected = one_start(model, **options).run_standard_evaluation(images, labels, state_path=path)
    evaluator = one_start(model, **{**options, "seed": np.int64(3)})
    assert evaluator.run_standard_evaluation(images, labels).equal(expected)
    assert evaluator.run_standard_evaluation(images, labels, state_path=path).equal(expected)
    with pytest.raises(TypeError, match=r"seed must be an integer, got 1\.5"):
        evaluator.seed = 1.5


def test_nan_is_never_robust(attacked):
    _, images, labels = attacked
    evaluator = one_start(lambda x: x.flatten(1)[:, :5] * torch.nan, **CUSTOM)
    evaluator.run_standard_evaluation(images, torch.zeros_like(labels))
    assert evaluator.result.accuracy == {"clean": 0, "apgd-ce": 0, "apgd-t": 0}
    assert evaluator.clean_accuracy(images, torch.zeros_like(labels)) == 0
    assert any("NaN" in sign for sign in evaluator.result.signs)


def test_rand_averages_gradients(attacked, capsys):
    model, images, labels = attacked
    noisy = AutoAttack(lambda x: model(x + 1e-3 * torch.randn_like(x)), eps=EPS, version="rand", seed=1)
    noisy.run_standard_evaluation(images[:3], labels[:3])
    assert "averaged over 20" in capsys.readouterr().out and not noisy.result.signs


def test_rand_attacks_each_image_once_and_one_pass_decides(attacked, monkeypatch):
    """A misclassification that another pass does not confirm is chance, not rounding."""
    _, images, _ = attacked
    calls = []

    def guess(x):
        return torch.randn(len(x), 5)

    for name in ("apgd-ce", "apgd-dlr"):
        plant(monkeypatch, name, lambda model, x, y, **options: calls.append(len(x)) or x)
    evaluator = AutoAttack(guess, eps=EPS, version="rand", seed=0, verbose=False)
    evaluator.run_standard_evaluation(images.repeat(20, 1, 1, 1), torch.zeros(240, dtype=torch.int64))
    left = [round(240 * accuracy) for accuracy in evaluator.result.accuracy.values()]
    assert calls == left[:2] and left[0] > left[1] > left[2]
    assert evaluator.result.unconfirmed == {"apgd-ce": 0, "apgd-dlr": 0}


def test_plus_restarts_what_has_no_targets(attacked, monkeypatch, capsys):
    model, images, labels = attacked
    seen = {}
    for name in list(autoattack.MEMBERS):

        def attack(model, x, y, name=name, **options):
            seen[name] = options.get("restarts", 1)
            return x

        plant(monkeypatch, name, attack)
    AutoAttack(model, eps=EPS, version="plus", seed=0).run_standard_evaluation(images, labels)
    assert list(seen.items()) == [
        ("apgd-ce", 5),
        ("apgd-dlr", 5),
        ("fab", 5),
        ("square", 1),
        ("apgd-t", 1),
        ("fab-t", 1),
    ]
    printed = capsys.readouterr().out
    assert "fab (100 steps, 5 restarts)" in printed and "not the whole AutoAttack" in printed


def test_model_and_random_state_are_as_found(attacked):
    model, images, labels = attacked
    model.train()
    before, random_state = snapshot(model), torch.get_rng_state()
    with torch.inference_mode():
        one_start(model, **CUSTOM)(images, labels)
    assert snapshot(model) == before and torch.equal(torch.get_rng_state(), random_state)


def test_options_and_batches_that_do_not_fit_are_refused(attacked):
    model, images, labels = attacked
    for wrong, message in ((labels + 5, r"labels must lie in \[0, 4\]"), (labels[:3], "one label per image")):
        with pytest.raises(ValueError, match=message):
            one_start(model, **CUSTOM).run_standard_evaluation(images, wrong)
    with pytest.raises(TypeError, match=r"model must return logits .* got a tuple"):
        one_start(lambda x: (x, x), **CUSTOM).run_standard_evaluation(images, labels)
    for options, message in (
        ({"version": "more"}, "version must be"),
        ({"attacks_to_run": ["square"]}, 'is for version "custom" only'),
        ({"version": "custom", "attacks_to_run": ["pgd"]}, "got 'pgd'"),
        ({"norm": "L1"}, "norm must be"),
        ({"version": "custom", "attacks_to_run": ["square"] * 2}, r"each attack once, got \['square', 'square'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            one_start(model, **options)
    with pytest.raises(ValueError, match="at least one image"):
        one_start(model, **CUSTOM).run_standard_evaluation(images[:0], labels[:0])
    with pytest.raises(ValueError, match="images must have pixels, got shape"):
        one_start(model, **CUSTOM).run_standard_evaluation(images[:, :, :0], labels)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_radii_of_each_image_go_with_the_images_that_stand(attacked, norm, capsys):
    model, images, labels = attacked
    eps = torch.tensor([0.0, 0.01, 0.02, 0.4]).repeat(3) * (1 if norm == "linf" else 10)
    options = {**CUSTOM, "norm": norm, "lo": torch.tensor([0.0, -0.1, 0.0]), "hi": torch.ones(3)}
    evaluator = one_start(model, **{**options, "eps": eps, "verbose": True})
    adv = evaluator.run_standard_evaluation(images, labels, bs=5)
    assert f"{norm}, eps 0 to {'0.4' if norm == 'linf' else '4'}, 12 images" in capsys.readouterr().out
    assert ((adv - images).flatten(1).norm(dim=1, p=torch.inf if norm == "linf" else 2) <= eps).all()
    assert (adv.amin((0, 2, 3)) >= options["lo"]).all() and adv.max() <= 1
    robust = evaluator.result.robust
    assert adv[::4].equal(images[::4]) and robust[4] and robust[8] and not robust[3::4].any()


def test_equal_radii_give_what_a_number_gives(attacked):
    model, images, labels = attacked
    number = one_start(model, **{**CUSTOM, "eps": 1 / 64}).run_standard_evaluation(images, labels, bs=5)
    values = {"eps": torch.full((12,), 1 / 64), "lo": torch.zeros(3), "hi": torch.ones(3)}
    adv = one_start(model, **{**CUSTOM, **values}).run_standard_evaluation(images, labels, bs=5)
    torch.testing.assert_close(adv, number, rtol=0, atol=1e-6)


def test_a_state_is_that_of_the_same_radii_and_options(attacked, tmp_path):
    model, images, labels = attacked
    path, eps = tmp_path / "state.safetensors", torch.linspace(0, 0.02, 12)
    options = {**CUSTOM, "eps": eps, "attacks_to_run": ["apgd-ce"]}
    adv = one_start(model, **options).run_standard_evaluation(images, labels, state_path=path)
    assert one_start(model, **options).run_standard_evaluation(images, labels, state_path=path).equal(adv)
    more = ({"seed": 8}, {"seed": None}, {"norm": "l2"}, {"attacks_to_run": ["square"]})
    for other in ({"eps": eps.flip(0)}, {"eps": 0.02}, {"lo": torch.zeros(3)}, *more):
        with pytest.raises(ValueError, match="other options"):
            one_start(model, **{**options, **other}).run_standard_evaluation(images, labels, state_path=path)
    with pytest.raises(ValueError, match=r"eps must have one value for each image, shape \[11\], got \[12\]"):
        one_start(model, **options).run_standard_evaluation(images[1:], labels[1:])


def test_the_standard_sequence_alone_is_called_autoattack(attacked, capsys, monkeypatch):
    model, images, labels = attacked
    plant(monkeypatch, "square", lambda *args, **options: square(*args, **options | {"queries": 20}))
    evaluator = AutoAttack(model, eps=EPS, seed=0)
    evaluator.run_standard_evaluation(images[:6], labels[:6])
    assert list(evaluator.result.accuracy) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert evaluator.result.name == "AutoAttack" and capsys.readouterr().out.startswith(
        "AutoAttack: apgd-ce (100 steps, 1 restart); apgd-t (100 steps, 4 targets); fab-t (100 steps, 4 targets); "
        "square (5000 queries); linf, eps 0.012, 6 images, seed 0"
    )


@pytest.mark.parametrize(("classes", "targets"), [(5, 4), (12, 9)])
def test_the_budget_names_as_many_targets_as_there_are(classes, targets, capsys):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, classes))
    images = torch.rand(3, 3, 2, 2)
    one_start(model, **CUSTOM | {"attacks_to_run": ["apgd-t"], "verbose": True}).run_standard_evaluation(
        images, model(images).argmax(1)
    )
    assert f"steps, {targets} targets)" in capsys.readouterr().out


def test_a_state_is_of_one_function_whatever_its_parameters(attacked, tmp_path):
    model, images, labels = attacked
    path = tmp_path / "state.safetensors"
    options = CUSTOM | {"attacks_to_run": ["apgd-ce"]}

    def run(function, **more):
        return one_start(function, **options).run_standard_evaluation(images, labels, state_path=path, **more)

    first = run(lambda x: model(x))
    for rounded in (lambda x: model(x), lambda x: model(x) * (1 + 1e-5)):  # as on another device
        assert run(rounded, bs=5).equal(first)
    for other in (lambda x: model(1 - x), lambda x: model(x).roll(1, 1)):
        with pytest.raises(ValueError, match=r"state\.safetensors is of another model"):
            run(other)


@pytest.mark.parametrize(("version", "classes", "name"), [("standard", 3, "apgd-t"), ("rand", 2, "apgd-dlr")])
def test_too_few_classes_for_one_attack_are_refused_before_the_first(version, classes, name):
    model, calls = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, classes)), []
    model.register_forward_hook(lambda *call: calls.append(call))
    evaluator = AutoAttack(model, eps=EPS, version=version, seed=0, verbose=False)
    with pytest.raises(ValueError, match=f"{name} needs at least . classes, the model has {classes}: take version"):
        evaluator.run_standard_evaluation(torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0]))
    assert len(calls) == 1
