"""The shape of torchattacks: targeted modes, normalised images, saved results, functions as models."""

import pytest
import torch
from helpers.attacked import batch, generator, make_model
from helpers.searched import linear_problem
from torch import nn

import sparse_adv.attacks as torchattacks
from sparse_adv.attacks import apgd, apgd_t, pgd

EPS = 0.1


def test_an_ordinary_torchattacks_script_runs(tmp_path):
    model, (images, labels) = make_model(), batch()
    atk = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=4, random_start=True)
    atk.set_normalization_used(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])
    adv = atk((images - 0.5) / 0.25, labels.to(torch.uint8))
    assert ((adv * 0.25 + 0.5) - images).abs().max() <= EPS + 1e-6
    for attack in (
        torchattacks.FGSM(model, eps=EPS),
        torchattacks.FFGSM(model, eps=EPS, alpha=EPS),
        torchattacks.PGDL2(model, eps=1.0, alpha=0.2, steps=2, random_start=True, eps_for_division=1e-10),
        torchattacks.TPGD(model, eps=EPS, alpha=EPS / 4, steps=2),
        torchattacks.APGD(model, norm="Linf", eps=EPS, steps=3, n_restarts=1, seed=0, loss="ce", eot_iter=1, rho=0.75),
        torchattacks.APGDT(model, norm="L2", eps=EPS, steps=3, n_restarts=1, seed=0, n_classes=5),
    ):
        assert attack(images, labels).shape == images.shape


def test_normalised_images_are_attacked_like_the_model_with_a_normalising_layer():
    class Normalized(nn.Module):
        def forward(self, x):
            return model((x - 0.5) / 0.25)

    model, (images, labels) = make_model().eval(), batch()
    options = {"eps": EPS, "alpha": EPS / 4, "steps": 3}
    atk = torchattacks.PGD(model, random_start=False, **options)
    atk.set_normalization_used([0.5] * 3, [0.25] * 3)
    for targeted in (False, True):
        if targeted:
            atk.set_mode_targeted_by_label(quiet=True)
        found = atk((images - 0.5) / 0.25, labels)
        expected = pgd(Normalized(), images, labels, random_start=False, targeted=targeted, **options)
        torch.testing.assert_close(found * 0.25 + 0.5, expected)


def test_targets_are_chosen_by_the_normalised_images_that_the_model_gets():
    model, (images, labels) = make_model().eval(), batch()
    normalised, seen = (images - 0.5) / 0.25, []
    atk = torchattacks.PGD(model, eps=EPS, steps=3, random_start=False)
    atk.set_normalization_used([0.5] * 3, [0.25] * 3)
    atk.set_mode_targeted_by_function(lambda x, y: seen.append((x, y)) or (y + 1) % 5)
    atk(normalised, labels)
    assert seen[0][0].equal(normalised) and seen[0][1].equal(labels)
    atk.set_mode_targeted_least_likely(quiet=True)
    least_likely = atk(normalised, labels)
    atk.set_mode_targeted_by_label(quiet=True)
    targets = model(normalised).scatter(1, labels[:, None], torch.inf).argmin(1)
    torch.testing.assert_close(least_likely, atk(normalised, targets))


def test_targeted_modes():
    model, (images, labels) = make_model().eval(), batch()
    options = {"steps": 5, "random_start": False}
    logits = model(images).detach()
    least = logits.scatter(1, labels[:, None], torch.inf).argmin(1)
    atk = torchattacks.PGD(model, **options)
    for setter, targets in (
        (lambda: atk.set_mode_targeted_by_function(lambda x, y: (y + 1) % 5), (labels + 1) % 5),
        (lambda: atk.set_mode_targeted_by_label(quiet=True), labels),
        (lambda: atk.set_mode_targeted_least_likely(kth_min=1), least),
    ):
        setter()
        assert torch.equal(atk(images, labels), pgd(model, images, targets, targeted=True, **options))
        assert atk.get_mode().startswith("targeted(")
    atk.set_mode_targeted_random()
    assert not torch.equal(atk(images, labels), images)
    atk.set_mode_default()
    assert torch.equal(atk(images, labels), pgd(model, images, labels, **options))
    with pytest.raises(ValueError, match="TPGD has no targeted mode"):
        torchattacks.TPGD(model).set_mode_targeted_by_label()
    for name in ("DeepFool", "APGDT", "TPGD", "AutoAttack"):
        attack = getattr(torchattacks, name)(model)
        attack.targeted = True
        with pytest.raises(ValueError, match=f"{name} has no targeted mode"):
            attack(images, labels)
    with pytest.raises(ValueError, match="kth_min must be an integer of at least 1, got 0"):
        atk.set_mode_targeted_least_likely(0)


def test_apgd_objects_compute_what_the_functions_compute():
    model, (images, labels) = make_model(), batch()
    options = {"eps": EPS, "steps": 4}
    noise = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert torch.equal(
        torchattacks.APGD(model, "L2", seed=3, loss="dlr", **options)(images, labels),
        apgd(model, images, labels, norm="l2", loss="dlr", generator=noise[0], **options),
    )
    assert torch.equal(
        torchattacks.APGDT(model, seed=3, n_classes=5, **options)(images, labels),
        apgd_t(model, images, labels, n_target_classes=4, generator=noise[1], **options),
    )


def test_save_writes_what_was_found(tmp_path):
    model, (images, labels) = make_model().eval(), batch()
    atk = torchattacks.PGD(model, steps=2, generator=generator())
    path = tmp_path / "adv.pt"
    batches = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    result = atk.save(batches, path, verbose=False, return_verbose=True, save_predictions=True, save_clean_inputs=True)
    saved = torch.load(path)
    assert torch.equal(saved["clean_inputs"], images) and torch.equal(saved["labels"], labels)
    assert torch.equal(saved["preds"], model(saved["adv_inputs"]).argmax(1))
    assert result[0] == pytest.approx(100 * (saved["preds"] == labels).float().mean().item())
    atk.save(batches, path, verbose=False, save_type="int")
    assert torch.load(path)["adv_inputs"].dtype == torch.uint8 and set(torch.load(path)) == {
        "adv_inputs",
        "labels",
        "save_type",
    }


def test_signs_of_masking_are_named():
    model, (images, labels) = make_model().eval(), batch()
    signs = torchattacks.signs_of_masking
    assert signs(model, images, labels) == []
    for masked, words in (
        (lambda x: model(x).softmax(1), "probabilities"),
        (lambda x: model(x) + torch.rand(6, 5), "differ between two calls"),
        (lambda x: model((x * 8).round() / 8), "gradient is zero at 6 of 6 images"),
        (lambda x: model(x) * (torch.arange(6) > 1)[:, None], "gradient is zero at 2 of 6 images"),
        (lambda x: model(x) * torch.nan, "6 of 6 images are NaN"),
        (lambda x: model(x) / (torch.arange(6) > 3)[:, None], "4 of 6 images are infinite"),
        (lambda x: model(x) + torch.zeros(6, 5).index_fill(0, torch.tensor(2), torch.nan), "1 of 6 images are NaN"),
        (lambda x: model(x).sigmoid(), "before the sigmoid"),
        (lambda x: model(x.detach()), "outputs have no gradient"),
        (lambda x: model((x > 0.5).float()), "outputs have no gradient"),
        (lambda x: nn.functional.one_hot(model(x).argmax(1), 5).float(), "outputs have no gradient"),
    ):
        assert any(words in sign for sign in signs(masked, images, labels))
    for not_finite in (torch.nan, torch.inf):  # which differ from themselves, or not: it is one sign
        named = signs(lambda x, value=not_finite: model(x) + value, images, labels)
        assert not any("differ between two calls" in sign for sign in named)
    saturated = signs(lambda x: model(x) * 1e6, images, model(images).argmax(1))
    assert any("gradient is zero at" in sign for sign in saturated)
    with pytest.raises(TypeError, match="got a tuple"):
        signs(lambda x: (model(x),), images, labels)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 0\]"):
        signs(lambda x: model(x)[:, :1], images, labels)
    for attack in (torchattacks.PGD, torchattacks.APGD, torchattacks.FAB, torchattacks.DeepFool):
        with pytest.raises(ValueError, match="the loss has no gradient of the images"):
            attack(lambda x: model(x.detach()))(images, model(images).argmax(1))


@pytest.mark.parametrize("eps", [torch.inf, torch.tensor([0.1] * 5 + [torch.inf])], ids=["number", "tensor"])
def test_an_infinite_radius_of_the_attacks_that_look_for_signs_is_refused_by_its_name(eps):
    with pytest.raises(ValueError, match="eps must be finite, got inf"):
        torchattacks.signs_of_masking(make_model(), *batch(), eps=eps)


def test_what_random_noise_breaks_and_gradients_do_not_is_named():
    """Gradients lead to the wrong side: with a slope against them, the class changes 0.3 away in any direction."""
    images, labels = torch.rand(20, 3, 4, 4) * 0.2 + 0.4, torch.zeros(20, dtype=torch.int64)

    class Deceiving(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 1 - (x - images).flatten(1).abs().mean(1) * 50

        @staticmethod
        def backward(ctx, gradient):
            return gradient[:, None, None, None] * (torch.arange(48).view(3, 4, 4) == 0)

    def model(x):
        margin = Deceiving.apply(x)
        return torch.stack([margin, torch.zeros_like(margin)], 1)

    signs = torchattacks.signs_of_masking(model, images, labels, eps=0.05)
    assert any("random noise breaks 20 of 20 images" in sign for sign in signs)


def test_what_random_noise_breaks_and_gradients_break_too_is_no_sign():
    model, images, labels = linear_problem(20)
    assert not any("random noise" in sign for sign in torchattacks.signs_of_masking(model, images, labels, eps=0.4))
    noisy = images + 0.4 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).sign()
    assert (model(noisy).argmax(1) != labels).any()


def test_the_loss_that_does_not_rise_and_robustness_that_rises_with_eps_are_named():
    labels = torch.zeros(40, dtype=torch.int64)
    images = torch.rand(40, 3, 4, 4) * 0.2 + 0.4

    for count in (40, 3, 2):  # a rise of 2 in 40 may be chance

        def walled(x, count=count):
            """Misclassified where the mean pixel has risen by 0.03 to 0.06, and `count` of the images robust beyond."""
            rise = (x - images).flatten(1).mean(1)
            margin = (1 - 33 * rise).where((rise < 0.06) | (torch.arange(40) >= count), 2 - rise)
            return torch.stack([margin, torch.zeros_like(margin)], 1)

        signs = torchattacks.signs_of_masking(walled, images, labels, eps=0.05)
        assert any(f"leaves 0 of 40 images robust, and {count} where" in sign for sign in signs) == (count > 2)

    def hollow(x):
        """A loss that falls again where steps go on."""
        change = (x - images).flatten(1).abs().amax(1)
        slope = (x - images).flatten(1).sum(1)
        margin = 1 - slope + (change > 0.02) * (5 + slope)
        return torch.stack([margin, torch.zeros_like(margin)], 1)

    signs = torchattacks.signs_of_masking(hollow, images, labels, eps=0.05)
    assert any("does not rise with its steps" in sign for sign in signs)


def test_options_may_be_set_between_calls():
    model, (images, labels) = make_model().eval(), batch()
    others = {"eps": 0.02, "alpha": 0.005, "steps": 1, "random_start": False, "norm": "l2"}
    for name, other in others.items():
        atk = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=3, generator=generator())
        setattr(atk, name, other)
        assert getattr(atk, name) == other
        options = {"eps": EPS, "alpha": EPS / 4, "steps": 3, "random_start": True, name: other}
        assert torch.equal(atk(images, labels), pgd(model, images, labels, generator=generator(), **options))
    for attack, made in (
        (torchattacks.FGSM(model, eps=EPS), torchattacks.FGSM(model, eps=0.02)),
        (torchattacks.TPGD(model, eps=EPS), torchattacks.TPGD(model, eps=0.0005)),
    ):
        attack.eps = made.eps
        assert attack.options == made.options
    with pytest.raises(ValueError, match="steps must be"):
        atk.steps = -1


def test_what_the_objects_cannot_do_is_refused_in_one_sentence():
    model, (images, labels) = make_model(), batch()
    with pytest.raises(TypeError, match="labels must be an integer tensor, APGD needs them, got None"):
        torchattacks.APGD(model)(images)
    with pytest.raises(TypeError, match="images must be"):
        torchattacks.PGD(model)(images.numpy(), labels)
    with pytest.raises(TypeError, match="unexpected keyword argument 'low'"):
        torchattacks.CW(model, low=0.0)


def test_searches_take_the_range_of_pixels():
    model, (images, labels) = make_model().eval(), batch()
    attacks = torchattacks.RFGSM, torchattacks.MIFGSM, torchattacks.EOTPGD, torchattacks.APGD, torchattacks.APGDT
    attacks += torchattacks.FABT, torchattacks.Square, torchattacks.CW, torchattacks.DeepFool, torchattacks.FMN
    for attack in attacks:
        own = {"n_queries": 5} if attack is torchattacks.Square else {"steps": 3}
        adv = attack(model, lo=-1.0, hi=2.0, **own)(2 * images - 0.5, labels)
        assert adv.min() >= -1 and adv.max() <= 2
        with pytest.raises(ValueError, match="images must lie"):
            attack(model, **own)(2 * images - 0.5, labels)


def test_labels_of_any_integer_dtype():
    model, (images, labels) = make_model().eval(), batch()
    expected = torchattacks.FGSM(model)(images, labels)
    for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32):
        assert torch.equal(torchattacks.FGSM(model)(images, labels.to(dtype)), expected)


def test_a_normalised_function_is_called_and_not_traced():
    model, (images, labels) = make_model().eval(), batch()
    calls = []

    def function(x):
        calls.append(len(x))
        return model(x)

    atk = torchattacks.PGD(function, steps=3, random_start=False)
    atk.set_normalization_used([0.5] * 3, [0.25] * 3)
    atk((images - 0.5) / 0.25, labels)
    assert len(calls) == 3


def test_searches_call_a_function_in_each_step():
    """The engine could trace this one; what else it does would then happen only once."""
    (images, _), calls = batch(), []

    def function(x):
        calls.append("called")
        return 3 * x.flatten(1)[:, :5]

    labels, counts = function(images).argmax(1), []
    for engine in (True, False):
        calls.clear()
        apgd(function, images, labels, eps=1e-4, steps=3, engine=engine)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 3


def test_rounding_takes_no_pixel_out_of_its_range():
    images = torch.tensor([0.0, 1.0]).repeat(12).view(2, 3, 2, 2)
    model, left = nn.Flatten(), 0
    for _ in range(50):
        mean, std = torch.rand(3), torch.rand(3) + 0.1
        atk = torchattacks.VANILA(model)
        atk.set_normalization_used(mean.tolist(), std.tolist())
        normal = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        assert atk.normalize(images).equal(normal)
        pixels = atk.inverse_normalize(normal)
        assert pixels.min() >= 0 and pixels.max() <= 1
        unclamped = normal * std.view(3, 1, 1) + mean.view(3, 1, 1)
        left += bool(unclamped.min() < 0 or unclamped.max() > 1)
    assert left  # without a clamp some do


def test_random_targets_are_all_the_wrong_classes_and_the_kth_least_likely_is_the_kth():
    model, (images, labels) = make_model().eval(), batch(size=200)
    reached = []

    class Reached(torchattacks.Attack):
        def forward(self, model, images, labels, targeted):
            assert targeted
            reached.append(labels)
            return images

    atk = Reached(model)
    for given, true in ((labels, labels), (None, model(images).argmax(1))):
        atk.set_mode_targeted_random(quiet=True)
        atk(images, given)
        for label in true.unique():
            assert reached[-1][true == label].unique().tolist() == [k for k in range(5) if k != label]
        ranked = model(images).argsort(1)
        for kth in (1, 2, 4):
            atk.set_mode_targeted_least_likely(kth, quiet=True)
            atk(images, given)
            wrong = torch.stack([row[row != label] for row, label in zip(ranked, true, strict=True)])
            assert reached[-1].equal(wrong[:, kth - 1])
    atk.set_mode_targeted_least_likely(5, quiet=True)
    with pytest.raises(ValueError, match="kth_min must be less than the number of classes, 5, got 5"):
        atk(images, labels)


def test_save_says_how_far_the_images_that_fell_were_moved(capsys):
    """Half of the images fall, and are moved by 0.25 at each of 192 values; the others are moved by 0.5."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    with torch.no_grad():
        model[1].weight[0], model[1].weight[1], model[1].bias[:] = 1.0, -1.0, 0.0
    images = torch.full((8, 3, 8, 8), -0.125)
    labels = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0])
    images[4:] = 0.25

    class Shifted(torchattacks.Attack):
        def forward(self, model, images, labels, targeted):
            return images + torch.where(labels == 1, 0.25, 0.5)[:, None, None, None]

    atk = Shifted(model)
    loader = [(images[k::3], labels[k::3]) for k in range(3)]
    accuracy, distance, seconds = atk.save(loader, return_verbose=True)
    assert accuracy == 50 and distance == pytest.approx(0.25 * 192**0.5) and seconds > 0
    assert capsys.readouterr().out.startswith("robust accuracy 50.00 %, l2 3.46410, ")
    assert atk.save(loader, verbose=False) is None and not capsys.readouterr().out


def test_saved_distances_of_normalised_images_are_those_of_their_pixels():
    model, (images, _) = make_model().eval(), batch()
    loader, options = [(images, model(images).argmax(1))], {"verbose": False, "return_verbose": True}
    plain = torchattacks.FGSM(model, eps=EPS).save(loader, **options)
    atk = torchattacks.FGSM(lambda x: model(x * 0.5 + 0.25), eps=EPS)
    atk.set_normalization_used([0.25] * 3, [0.5] * 3)
    found = atk.save([((images - 0.25) / 0.5, labels) for images, labels in loader], **options)
    assert found[:2] == pytest.approx(plain[:2], rel=1e-3) and plain[1] > 0


def test_save_as_bytes_rounds_the_pixels_down(tmp_path):
    model, images = make_model().eval(), torch.linspace(0, 1, 192).reshape(1, 3, 8, 8)
    atk = torchattacks.PGD(model, eps=0.0, steps=1, random_start=False)
    atk.save([(images, torch.tensor([0]))], tmp_path / "adv.pt", save_type="int", save_clean_inputs=True, verbose=False)
    saved = torch.load(tmp_path / "adv.pt")
    for name in ("adv_inputs", "clean_inputs"):
        assert saved[name].equal((images * 255).floor().to(torch.uint8))
    assert saved["save_type"] == "int"


def test_mean_and_std_of_other_channels_are_refused():
    atk = torchattacks.PGD(make_model(), steps=1)
    with pytest.raises(ValueError, match="mean and std must have one value for each channel, got 3 and 2"):
        atk.set_normalization_used([0.5] * 3, [0.5] * 2)
    with pytest.raises(TypeError, match="mean must be numbers, one for each channel, got 'x'"):
        atk.set_normalization_used("x", [1.0])
    atk.set_normalization_used([0.5] * 4, [0.5])
    with pytest.raises(ValueError, match=r"images must have 4 channels, as mean and std have, got shape \(6, 3"):
        atk(*batch())


@pytest.mark.parametrize("std", [[0.5, 0.0, 0.5], [0.5, 0.5, float("nan")], [-1.0]])
def test_a_standard_deviation_that_divides_by_nothing_is_refused(std):
    with pytest.raises(ValueError, match="std must be positive and finite, got"):
        torchattacks.PGD(make_model()).set_normalization_used([0.5] * 3, std)


def test_images_stay_where_they_are_for_a_model_without_tensors():
    assert torchattacks.PGD(nn.Flatten()).device is None and torchattacks.PGD(nn.Linear(2, 2)).device == torch.device(
        "cpu"
    )
