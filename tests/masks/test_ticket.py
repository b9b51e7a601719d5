import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sparse_adv.masks import Ticket, load_ticket, prune, save_ticket


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.Conv2d(7, 5, 3, bias=False), nn.Linear(4, 2))


@pytest.fixture
def path(model, tmp_path):
    path = tmp_path / "ticket.safetensors"
    save_ticket(path, prune(model, 0.3), model.state_dict(), {"seed": 7})
    return path


def test_a_ticket_comes_back_as_it_was(model, path):
    ticket = load_ticket(path)
    assert isinstance(ticket, Ticket)
    expected = prune(model, 0.3)
    assert list(ticket.masks) == list(expected)
    assert all(torch.equal(mask, expected[name]) for name, mask in ticket.masks.items())
    weights = model.state_dict()
    assert ticket.state_dict.keys() == weights.keys()
    assert all(
        torch.equal(value, weights[k]) and value.dtype == weights[k].dtype for k, value in ticket.state_dict.items()
    )


def test_a_ticket_says_where_it_comes_from(path):
    provenance = load_ticket(path).provenance
    assert provenance["seed"] == 7
    assert provenance["density"] == pytest.approx(0.3, abs=0.002)
    assert provenance["torch"] == torch.__version__
    assert provenance["blocks"] == {"0": [1, 1, 1, 1], "2": [1, 1, 1, 1]}
    assert {"sparse_adv", "date"} <= provenance.keys()


def test_masks_of_linear_layers_come_back_too(model, tmp_path):
    expected = prune(model, 0.3) | {"3": torch.tensor([[True, False, True, False]] * 2)}
    save_ticket(tmp_path / "t", expected, model.state_dict(), {})
    ticket = load_ticket(tmp_path / "t")
    assert list(ticket.masks) == ["0", "2", "3"]
    assert all(torch.equal(mask, expected[name]) for name, mask in ticket.masks.items())
    assert ticket.provenance["blocks"]["3"] == [4, 1, 1, 1]


def test_masks_take_one_bit_per_weight(tmp_path):
    conv = nn.Conv2d(64, 64, 3)
    for name, masks in (("with", prune(conv, 0.5)), ("without", {})):
        save_ticket(tmp_path / name, masks, conv.state_dict(), {})
    extra = (tmp_path / "with").stat().st_size - (tmp_path / "without").stat().st_size
    assert extra < 64 * 64 * 9 / 8 + 500


def test_a_ticket_of_a_model_that_is_one_convolution_or_has_tied_weights(tmp_path):
    conv = nn.Conv2d(2, 2, 3)
    tied = nn.Sequential(conv, nn.Conv2d(2, 2, 3))
    tied[1].weight = conv.weight
    for network in (conv, tied):
        save_ticket(tmp_path / "t", prune(network, 0.5), network.state_dict(), {})
        assert load_ticket(tmp_path / "t").state_dict.keys() == network.state_dict().keys()


def test_every_kind_of_damage_is_one_sentence_naming_the_file(path):
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-3] ^= 1
    for damaged in (b"", content[:100], content[:-5], bytes(flipped), b"PK" + content[2:], os.urandom(200)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"ticket\.safetensors' is no readable ticket file: ") as error:
            load_ticket(path)
        assert "\n" not in str(error.value)


def test_another_safetensors_file_is_refused(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"its format is None, not 'sparse_adv ticket 1'"):
        load_ticket(tmp_path / "weights.safetensors")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no ticket file '.*absent'"):
        load_ticket(tmp_path / "absent")


def test_a_failed_write_leaves_the_old_ticket_and_no_litter(model, path, monkeypatch):
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_ticket(path, prune(model, 0.5), model.state_dict(), {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_what_does_not_fit_together_is_not_saved(model, tmp_path):
    masks = prune(model, 0.3)
    with pytest.raises(ValueError, match=r"state_dict must hold '0.weight' of the mask's shape .*found nothing"):
        save_ticket(tmp_path / "t", masks, {}, {})
    with pytest.raises(ValueError, match=r"provenance must be JSON data: .*Tensor"):
        save_ticket(tmp_path / "t", masks, model.state_dict(), {"lr": torch.ones(1)})
    assert not list(tmp_path.iterdir())


def test_the_provenance_is_plain_json_in_the_file(path):
    header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    assert json.loads(json.loads(header)["__metadata__"]["provenance"])["seed"] == 7
