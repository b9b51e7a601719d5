"""Ticket files: what is saved is loaded again, and damaged files raise one sentence."""

import json
import os

import pytest
import torch
from safetensors import safe_open
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
    save_ticket(path, Ticket(prune(model, 0.3), model.state_dict(), {"seed": 7}))
    return path


def test_a_loaded_ticket_equals_the_saved_one(model, path):
    ticket = load_ticket(path)
    expected = prune(model, 0.3)
    assert list(ticket.masks) == list(expected)
    assert all(torch.equal(mask, expected[name]) for name, mask in ticket.masks.items())
    weights = model.state_dict()
    assert ticket.state_dict.keys() == weights.keys()
    assert all(
        torch.equal(value, weights[k]) and value.dtype == weights[k].dtype for k, value in ticket.state_dict.items()
    )


def test_the_provenance_has_the_given_entries_and_those_of_the_library(path):
    provenance = load_ticket(path).provenance
    assert provenance["seed"] == 7
    assert provenance["density"] == pytest.approx(0.3, abs=0.002)
    assert provenance["torch"] == torch.__version__
    assert provenance["blocks"] == {"0": [1, 1, 1, 1], "2": [1, 1, 1, 1]}
    assert {"sparse_adv", "date"} <= provenance.keys()


def test_what_the_provenance_says_of_the_ticket_stays_when_it_is_written_again(path, tmp_path):
    ticket = load_ticket(path)
    said = ticket.provenance | {"date": "2024-05-06T07:08:09+00:00", "torch": "2.10.0", "blocks": {"0": [2, 1, 1, 1]}}
    save_ticket(tmp_path / "again", Ticket(ticket.masks, ticket.state_dict, said))
    assert load_ticket(tmp_path / "again").provenance == said


def test_masks_of_linear_layers_are_saved_too(model, tmp_path):
    expected = prune(model, 0.3) | {"3": torch.tensor([[True, False, True, False]] * 2)}
    save_ticket(tmp_path / "t", Ticket(expected, model.state_dict()))
    ticket = load_ticket(tmp_path / "t")
    assert list(ticket.masks) == ["0", "2", "3"]
    assert all(torch.equal(mask, expected[name]) for name, mask in ticket.masks.items())
    assert ticket.provenance["blocks"]["3"] == [4, 1, 1, 1]


def test_masks_take_one_bit_per_weight(tmp_path):
    conv = nn.Conv2d(64, 64, 3)
    for name, masks in (("with", prune(conv, 0.5)), ("without", {})):
        save_ticket(tmp_path / name, Ticket(masks, conv.state_dict()))
    extra = (tmp_path / "with").stat().st_size - (tmp_path / "without").stat().st_size
    assert extra < 64 * 64 * 9 / 8 + 500


def test_a_model_that_is_one_convolution_or_has_shared_weights_can_be_saved(tmp_path):
    conv = nn.Conv2d(2, 2, 3)
    tied = nn.Sequential(conv, nn.Conv2d(2, 2, 3))
    tied[1].weight = conv.weight
    for network in (conv, tied):
        save_ticket(tmp_path / "t", Ticket(prune(network, 0.5), network.state_dict()))
        assert load_ticket(tmp_path / "t").state_dict.keys() == network.state_dict().keys()


def test_a_damaged_file_raises_one_sentence_that_names_it(path):
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[-3] ^= 1
    for damaged in (b"", content[:100], content[:-5], bytes(flipped), b"PK" + content[2:], os.urandom(200)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"ticket\.safetensors' is not a readable ticket file: ") as error:
            load_ticket(path)
        assert "\n" not in str(error.value)


def test_a_safetensors_file_that_is_not_a_ticket_raises(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"its format is None, not 'sparse_adv ticket 1'"):
        load_ticket(tmp_path / "weights.safetensors")


def test_error_names_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no ticket file '.*absent'"):
        load_ticket(tmp_path / "absent")


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_file(model, path, monkeypatch):
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_ticket(path, Ticket(prune(model, 0.5), model.state_dict()))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_an_invalid_ticket_raises_and_no_file_is_written(model, tmp_path):
    masks = prune(model, 0.3)
    with pytest.raises(ValueError, match=r"state_dict must have '0.weight' for the mask of '0', but has no such"):
        save_ticket(tmp_path / "t", Ticket(masks, {}))
    with pytest.raises(ValueError, match=r"'0.weight' of the mask's shape \(7, 3, 3, 3\), got \(7, 3, 3\)"):
        save_ticket(tmp_path / "t", Ticket(masks, {"0.weight": model[0].weight[..., 0]}))
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        save_ticket(tmp_path / "t", Ticket({"0": model[0].weight}, model.state_dict()))
    with pytest.raises(ValueError, match=r"provenance must be JSON data: .*Tensor"):
        save_ticket(tmp_path / "t", Ticket(masks, model.state_dict(), {"lr": torch.ones(1)}))
    assert not list(tmp_path.iterdir())


def test_the_provenance_is_json_in_the_metadata_of_the_file(path):
    header = path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")]
    assert json.loads(json.loads(header)["__metadata__"]["provenance"])["seed"] == 7


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mask_shapes", '{"0": [8589934584]}'),
        ("mask_shapes", '{"0": [-1, 1, 3, 3]}'),
        ("mask_shapes", '{"0": [4.0, 3, 3, 3]}'),
        ("mask_shapes", '{"0": "4"}'),
        ("mask_shapes", "[1]"),
        ("mask_shapes", "{}"),
        ("mask_shapes", "[" * 100_000),
        ("provenance", "[]"),
        ("provenance", "[" * 100_000),
    ],
    ids=range(9),
)
def test_metadata_of_another_form_are_refused(path, key, value):
    """They are not part of the checksum; a size in them must not be allocated."""
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata | {key: value})
    with pytest.raises(ValueError, match="is not a readable ticket file"):
        load_ticket(path)


def test_masks_without_elements_are_saved_and_other_state_is_named(tmp_path):
    layer = nn.Linear(0, 4)
    save_ticket(tmp_path / "t", Ticket({"": torch.ones(4, 0, dtype=torch.bool)}, layer.state_dict()))
    loaded = load_ticket(tmp_path / "t")
    assert loaded.masks[""].shape == (4, 0) and loaded.provenance["density"] is None
    with pytest.raises(ValueError, match=r"state_dict must hold tensors alone, got 'x._extra_state', a dict"):
        save_ticket(tmp_path / "t", Ticket({}, {"x._extra_state": {}}))
