"""MultiAttack: each attack gets the images that still stand, and what it breaks is kept."""

import pytest
import torch
from helpers.attacked import snapshot
from helpers.searched import broken, classified

from sparse_adv.attacks import BIM, EOTPGD, FFGSM, FGSM, MIFGSM, PGD, RFGSM, TPGD, MultiAttack, Square, distances


def test_each_attack_gets_what_still_stands():
    model, images, labels = classified(32)
    labels[:4] = (labels[:4] + 1) % 5
    sizes = []

    class Counted(FGSM):
        def forward(self, model, images, labels, targeted):
            sizes.append(len(images))
            return super().forward(model, images, labels, targeted)

    small, large = Counted(model, eps=0.01), Counted(model, eps=0.3)
    before = snapshot(model)
    adv = MultiAttack([small, large])(images, labels.int())
    assert snapshot(model) == before
    first, second = FGSM(model, eps=0.01)(images, labels), FGSM(model, eps=0.3)(images, labels)
    by_first, by_second = broken(model, first, labels), broken(model, second, labels)
    wrong = broken(model, images, labels)
    expected = images.clone()
    for found, which in ((second, by_second), (first, by_first), (images, wrong)):
        expected[which] = found[which]
    assert torch.equal(adv, expected)
    assert sizes == [int((~wrong).sum()), int((~wrong & ~by_first).sum())]
    assert sizes[0] == 28 and 0 < sizes[1] < 28


def test_normalised_images_go_through_all_attacks():
    model, images, labels = classified(16)

    def of_normalised(x):
        return model(x * 0.5 + 0.25)

    plain = MultiAttack([PGD(model, 0.05, random_start=False), FGSM(model, 0.1)])(images, labels)
    attack = MultiAttack([PGD(of_normalised, 0.05, random_start=False), FGSM(of_normalised, 0.1)])
    attack.set_normalization_used([0.25] * 3, [0.5] * 3)
    adv = attack((images - 0.25) / 0.5, labels)
    assert torch.allclose(adv * 0.5 + 0.25, plain, atol=1e-5)


def test_images_are_normalised_as_by_every_attack():
    attack, images = MultiAttack([FGSM(model := classified()[0]), PGD(model)]), torch.rand(2, 3, 4, 4)
    assert attack.normalization_used is None and attack.normalize(images).equal(images)
    attack.set_normalization_used([0.25] * 3, [0.5] * 3)
    assert attack.normalization_used["mean"].unique() == 0.25 and attack.normalization_used["std"].unique() == 0.5
    torch.testing.assert_close(attack.normalize(images), (images - 0.25) / 0.5)
    torch.testing.assert_close(attack.inverse_normalize(attack.normalize(images)), images)


def test_device_and_model_are_those_of_every_attack():
    members = [FGSM(model := classified()[0]), PGD(model), Square(model)]
    attack, other = MultiAttack(members), classified()[0]
    attack.set_model(other)  # and to its device
    attack.set_device("meta")
    assert all(each.device == torch.device("meta") and each.model is other for each in (attack, *members))


def test_training_modes_are_those_of_every_attack():
    members = [FGSM(model := classified()[0]), PGD(model)]
    for modes in ((True, True, False), (True, False, True), (True, False, False), (False, False, False)):
        alone = FGSM(model)
        alone.set_model_training_mode(*modes)
        MultiAttack(members).set_model_training_mode(*modes)
        assert all(member._training == alone._training for member in members)


def test_an_empty_batch_and_wrong_attacks():
    model, images, labels = classified()
    attack = MultiAttack([FGSM(model), Square(model, n_queries=3)])
    assert attack(images[:0], labels[:0]).shape == (0, 3, 8, 8)
    with pytest.raises(ValueError, match="MultiAttack has no targeted mode"):
        attack.set_mode_targeted_random()
    with pytest.raises(ValueError, match="attacks must be at least two, got 1"):
        MultiAttack([FGSM(model)])
    with pytest.raises(ValueError, match="attacks must all have the same model"):
        MultiAttack([FGSM(model), FGSM(classified()[0])])


def test_each_image_keeps_its_own_radius_when_the_batch_gets_smaller():
    model, images, labels = classified(16)
    eps = torch.linspace(0.01, 0.3, 16)
    members = [FGSM(model, eps=eps / 3), PGD(model, eps=eps, alpha=eps / 4, random_start=False)]
    inner = MultiAttack([Square(model, eps=eps, n_queries=5), PGD(model, eps=eps, alpha=eps / 4, random_start=False)])
    for attack in (MultiAttack(members), MultiAttack([members[0], inner])):
        adv = attack(images, labels)
        assert ((adv - images).flatten(1).abs().amax(1) <= eps).all()
        strongest = PGD(model, eps=eps, alpha=eps / 4, random_start=False)(images, labels)
        assert 0 < broken(model, FGSM(model, eps=eps / 3)(images, labels), labels).sum() < 16
        assert (broken(model, adv, labels) >= broken(model, strongest, labels)).all()


@pytest.mark.parametrize("kind", [PGD, BIM, FFGSM, MIFGSM, RFGSM, EOTPGD, TPGD])
def test_every_attack_takes_the_radii_and_steps_of_the_images_that_stand(kind):
    model, images, labels = classified(16)
    eps = torch.linspace(0.01, 0.1, 16)
    attack = MultiAttack([FGSM(model, eps=eps / 2), kind(model, eps=eps, alpha=eps / 4)])
    adv = attack(images, labels)
    fallen = broken(model, FGSM(model, eps=eps / 2)(images, labels), labels)
    assert 0 < fallen.sum() < 16 and (broken(model, adv, labels) >= fallen).all()
    assert ((adv - images).flatten(1).abs().amax(1) <= eps).all()


def test_the_rates_of_a_saved_evaluation_are_those_of_its_images_alone():
    model, images, labels = classified(32)
    attack = MultiAttack([FGSM(model, eps=0.01), FGSM(model, eps=0.1)])

    def rates(count):
        return attack.save([(images[:count], labels[:count])], verbose=False, return_verbose=True)[1]

    expected = rates(8), rates(32)
    attack(images, labels)  # an attack that nobody saves does not count
    assert (rates(8), rates(32)) == expected and expected[0] != expected[1]


def test_saved_images_are_pixels_where_images_are_normalised(tmp_path):
    model, images, labels = classified(16)

    def of_normalised(x):
        return model(x * 0.25 + 0.5)

    attack = MultiAttack([FGSM(of_normalised, eps=0.1), FGSM(of_normalised, eps=0.2)])
    attack.set_normalization_used([0.5], [0.25])
    attack.save([((images - 0.5) / 0.25, labels)], tmp_path / "saved.pt", verbose=False, save_clean_inputs=True)
    saved = torch.load(tmp_path / "saved.pt")
    torch.testing.assert_close(saved["clean_inputs"], images)
    assert saved["adv_inputs"].min() >= 0 and saved["adv_inputs"].max() <= 1


def by_label(attack):
    attack.set_mode_targeted_by_label(quiet=True)


def by_attribute(attack):
    attack.targeted = True


@pytest.mark.parametrize("target", [by_label, by_attribute])
@pytest.mark.parametrize("kind", [PGD, MIFGSM])
def test_attacks_for_which_labels_are_targets_are_refused_before_and_in_a_call(kind, target):
    model, images, labels = classified()
    members = [FGSM(model), kind(model, steps=1)]
    attack = MultiAttack(members)
    target(members[1])
    for call in (lambda: MultiAttack(members), lambda: attack(images, labels)):
        with pytest.raises(ValueError, match=rf"they are targets for attacks\[1\], {kind.__name__}$"):
            call()


def test_attacks_that_choose_targets_for_true_labels_are_members_like_others():
    model, images, labels = classified(16)
    members = [FGSM(model, eps=0.01), PGD(model, eps=0.1, alpha=0.02, random_start=False)]
    members[1].set_mode_targeted_least_likely(quiet=True)
    fallen = broken(model, MultiAttack(members)(images, labels), labels)
    assert fallen.sum() > broken(model, members[0](images, labels), labels).sum()


def test_attacks_of_other_normalisations_are_refused_before_and_in_a_call():
    model, images, labels = classified()
    members = [FGSM(model), PGD(model, steps=1)]
    attack = MultiAttack(members)
    for mean, std in ([0.5], [0.25]), ([0.5] * 3, [0.5] * 3), ([0.4] * 3, [0.25] * 3), ([0.5] * 2, [0.25] * 2):
        members[0].set_normalization_used(mean, std)
        for call in (lambda: MultiAttack(members), lambda: attack(images, labels)):
            with pytest.raises(ValueError, match="attacks must all have the same normalisation"):
                call()
        members[1].set_normalization_used([0.5] * 3, [0.25] * 3)


def test_one_mean_and_std_of_all_channels_is_the_same_normalisation_as_one_for_each():
    model, images, labels = classified(16)
    members = [FGSM(model, eps=0.01), FGSM(model, eps=0.1)]
    members[0].set_normalization_used([0.5], [0.25])
    members[1].set_normalization_used([0.5] * 3, [0.25] * 3)
    labels = model((images - 0.5) / 0.25).argmax(1)
    assert broken(model, MultiAttack(members)((images - 0.5) / 0.25, labels), labels).any()


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_that_are_no_classes_are_refused(label):
    model, images, labels = classified()
    labels[2] = label
    attack = MultiAttack([PGD(model, steps=1), FGSM(model)])
    for call in (lambda: attack(images, labels), lambda: distances(model, images, images, labels)):
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 4\], the model's classes"):
            call()
