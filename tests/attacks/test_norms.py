"""The norms of each attack: those that docs/guide/attacks.md lists are taken, in both spellings."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from helpers.attacked import batch, make_model

from sparse_adv import attacks

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "guide" / "attacks.md").read_text(encoding="utf-8")
TABLE = GUIDE.split("## Which attacks there are")[1].split("\n## ")[0]
NORMS = {
    name: re.findall(r"\b(?:linf|l2)\b", row.split("|")[2])
    for row in re.findall(r"^\| `.*", TABLE, flags=re.MULTILINE)
    for name in re.findall(r"`(\w+)`", row.split("|")[1])
}
CHEAP = {"steps": 2, "queries": 5, "n_queries": 5, "n_classes": 5, "n_target_classes": 4, "seed": 0}


def examples(name: str, **options: object) -> torch.Tensor:
    """What the function or the class finds in few steps, always from the same random numbers."""
    attack, (images, labels) = getattr(attacks, name), batch()
    parameters = inspect.signature(attack).parameters
    options |= {option: value for option, value in CHEAP.items() if option in parameters}
    torch.manual_seed(0)
    if name == "AutoAttack":
        options |= {"version": "custom", "attacks_to_run": ["apgd-ce"], "verbose": False}
    if isinstance(attack, type):
        return attack(make_model().eval(), **options)(images, labels)
    return attack(make_model().eval(), images, *([labels] if "labels" in parameters else []), **options)


def test_the_guide_lists_every_attack():
    public = {name: getattr(attacks, name) for name in attacks.__all__}
    objects = {name for name, each in public.items() if isinstance(each, type) and issubclass(each, attacks.Attack)}
    assert objects - {"Attack", "VANILA"} <= set(NORMS)


@pytest.mark.parametrize("name", [name for name, norms in NORMS.items() if len(norms) > 1])
def test_every_norm_of_the_guide_is_taken_in_both_spellings(name):
    for norm in NORMS[name]:
        found = examples(name, norm=norm)
        assert found.shape == batch()[0].shape
        assert torch.equal(examples(name, norm=norm.capitalize()), found)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_distances_take_both_spellings(norm):
    model, (images, labels), adversarial = make_model().eval(), batch(), batch(seed=2)[0]
    found = attacks.distances(model, adversarial, images, labels, norm=norm)
    assert torch.equal(attacks.distances(model, adversarial, images, labels, norm=norm.capitalize()), found)


@pytest.mark.parametrize("name", [name for name, norms in NORMS.items() if len(norms) == 1])
def test_an_attack_of_one_norm_has_no_argument_for_it(name):
    with pytest.raises(TypeError, match="norm"):
        examples(name, norm=NORMS[name][0])


@pytest.mark.parametrize("name", ["BIM", "MIFGSM", "EOTPGD", "RFGSM"])
def test_objects_take_the_options_of_the_functions(name):
    options = {"loss": "margin", "targeted": True, "alpha": 0.01}
    assert torch.equal(examples(name, **options), examples(name.lower(), **options))
