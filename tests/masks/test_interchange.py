"""Files of other tools: each format, written as its tool writes it, is read correctly and can be written again."""

import copy
import io
import os

import numpy as np
import pytest
import torch
from helpers.foreign_formats import (
    WRITERS,
    Multiplied,
    Network,
    as_masked,
    as_npy,
    as_parametrize,
    as_prune,
    edge_popup_mask,
    pruned_by_torch,
)
from safetensors.torch import save_file
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from sparse_adv.masks import Ticket, density, from_state_dict, load_pruned, prune, save_pruned, save_ticket

MASKED = ("conv1", "block.conv2", "fc")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    network = Network()
    nn.init.normal_(network.block.norm.bias)
    return network


@pytest.fixture
def masks(model):
    masks = prune(model, 0.4, linear=True)
    masks["block.conv2"][0] = False  # a filter that is pruned as a whole
    return masks


@pytest.fixture
def weights(model, masks):
    """The dense state dict with zeros where pruned."""
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    for name, mask in masks.items():
        weights[f"{name}.weight"].mul_(mask)
    return weights


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pth"


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype and torch.equal(actual[key], value), key


@pytest.mark.parametrize("tool", WRITERS)
@pytest.mark.parametrize("container", ["torch", "old torch", "safetensors", "parallel", "checkpoint"])
def test_every_format_gives_masks_and_dense_state_dict_in_every_container(model, masks, weights, path, tool, container):
    state = WRITERS[tool](copy.deepcopy(model), masks)
    if container == "safetensors":
        save_file(state, path)
    elif container == "parallel":
        torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    elif container == "checkpoint":
        torch.save({"net": state, "optimizer": {"state": {}, "lr": 0.1}}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=container == "torch")
    loaded = load_pruned(path, model=model)
    assert_same(loaded.masks, masks)
    assert_same(loaded.state_dict, weights)
    model.load_state_dict(loaded.state_dict)
    assert loaded.provenance == {"format": tool, "file": str(path), "density": density(masks)}
    assert_same(load_pruned(path, format=tool).masks, masks)
    assert_same(from_state_dict(torch.load(path) if container == "checkpoint" else state)[1], weights)


def test_a_ticket_file_is_read_with_its_provenance(model, masks, path):
    save_ticket(path, Ticket(masks, model.state_dict(), {"seed": 7}))
    loaded = load_pruned(path, model=model)
    assert_same(loaded.masks, masks)
    assert_same(loaded.state_dict, model.state_dict())
    assert (loaded.provenance["format"], loaded.provenance["seed"]) == ("ticket", 7)


def test_a_ticket_that_begins_like_a_pickle_is_a_ticket(model, masks, path):
    """Its first byte is the lowest of its header's length, a multiple of eight."""
    for padding in range(0, 256, 8):
        save_ticket(path, Ticket(masks, model.state_dict(), {"note": "x" * padding}))
        if path.read_bytes().startswith(b"\x80"):
            break
    assert path.read_bytes().startswith(b"\x80")
    assert load_pruned(path).provenance["format"] == "ticket"


def test_the_result_can_be_saved_as_a_ticket(model, masks, weights, path, tmp_path):
    torch.save(as_prune(model, masks), path)
    save_ticket(tmp_path / "t", load_pruned(path))
    again = load_pruned(tmp_path / "t")
    assert_same(again.masks, masks)
    assert_same(again.state_dict, weights)
    assert again.provenance.items() >= {"format": "prune", "file": f"{tmp_path}/t", "converted_from": f"{path}"}.items()


@pytest.mark.parametrize("merged_names", [True, False])
def test_masks_of_open_lth_may_be_in_another_file(model, masks, weights, path, tmp_path, merged_names):
    torch.save(model.state_dict(), path)
    names = {name: f"{name}.weight" for name in masks}
    if merged_names:
        names = {name: "mask_" + key.replace(".", "___") for name, key in names.items()}
    torch.save({names[name]: mask.int() for name, mask in masks.items()}, tmp_path / "mask.pth")
    loaded = load_pruned(path, tmp_path / "mask.pth")
    assert_same(loaded.masks, masks)
    assert_same(loaded.state_dict, weights)
    assert loaded.provenance["mask_file"] == str(tmp_path / "mask.pth")
    torch.save(as_prune(model, masks), path)
    with pytest.raises(
        ValueError, match=r"the weights already contain masks in the format 'prune': do not pass mask_path"
    ):
        load_pruned(path, tmp_path / "mask.pth")


@pytest.mark.parametrize("kind", ["one density", "by layer", "harp", "harp by layer"])
def test_the_highest_scores_of_each_layer_are_kept(model, path, kind):
    """Densities that are given by layer win over those that HARP learned."""
    state, rates = model.state_dict(), dict(zip(MASKED, (0.1, 0.37, 0.5), strict=True))
    expected = {}
    for name in MASKED:
        scores = state[f"{name}.popup_scores"] = torch.randn_like(state[f"{name}.weight"])
        rate = torch.randn(())
        if kind.startswith("harp"):
            state[f"{name}.k_score"] = rate
        learned = torch.sigmoid(rate) * (1 - 0.037) + 0.037
        k = {"one density": 0.37, "harp": learned}.get(kind, rates[name])
        expected[name] = edge_popup_mask(scores, k)
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "best": 1.5}, path)
    loaded = load_pruned(path, model=model, density=rates if kind.endswith("by layer") else 0.37)
    assert_same(loaded.masks, expected)
    assert loaded.state_dict.keys() == model.state_dict().keys()
    assert torch.equal(loaded.state_dict["fc.weight"], state["fc.weight"] * expected["fc"])


@pytest.mark.parametrize(("density", "value"), [(None, "None"), (1.5, "1.5"), ({"conv1": 0.1}, "None"), ("a", "'a'")])
def test_scores_without_a_valid_density_raise(model, path, density, value):
    state = model.state_dict()
    torch.save(state | {"fc.popup_scores": state["fc.weight"]}, path)
    with pytest.raises(ValueError, match=rf"density must give the fraction of 'fc' to keep, in \[0, 1\], got {value}"):
        load_pruned(path, density=density)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_list_of_masks_is_assigned_in_the_order_of_the_modules(model, masks, weights, path, tmp_path, wrapped):
    channels = masks["block.conv2"].flatten(1).any(1)
    as_npy(tmp_path / "mask.npy", [masks["conv1"].float(), masks["block.conv2"], channels.float(), masks["fc"].float()])
    prefix, expected_model = "", model
    if wrapped:
        prefix, expected_model = "model.", nn.ModuleDict({"model": model})
    torch.save({prefix + key: value for key, value in model.state_dict().items()}, path)
    loaded = load_pruned(path, tmp_path / "mask.npy", model=expected_model)
    weights["block.norm.weight"].mul_(channels)
    weights["block.norm.bias"].mul_(channels)
    assert not channels.all()
    assert_same(loaded.masks, {prefix + name: mask for name, mask in masks.items()})
    assert_same(loaded.state_dict, {prefix + key: value for key, value in weights.items()})
    assert loaded.provenance["format"] == "mask_list"


def test_a_list_of_masks_that_does_not_fit_the_model_raises(model, masks, path, tmp_path):
    torch.save(model.state_dict(), path)
    as_npy(tmp_path / "mask.npy", list(masks.values()))
    with pytest.raises(ValueError, match=r"there are 3 masks, but the model has 4 Conv2d, Linear and BatchNorm layers"):
        load_pruned(path, tmp_path / "mask.npy", model=model)
    with pytest.raises(ValueError, match=r"mask\.npy': the masks have no names, so that the model must be given"):
        load_pruned(path, tmp_path / "mask.npy")
    with pytest.raises(ValueError, match=r"mask\.npy' is a NumPy file: combine masks with their weights"):
        load_pruned(tmp_path / "mask.npy")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch evidence",)


def test_no_code_in_a_file_is_executed(model, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entries = np.empty(1, dtype=object)
    entries[0] = Malicious()
    np.save(tmp_path / "mask.npy", entries, allow_pickle=True)
    torch.save(model.state_dict(), path)
    with pytest.raises(ValueError, match=r"mask\.npy' is not a readable file of tensors: .*it asks for posix\.system"):
        load_pruned(path, tmp_path / "mask.npy", model=model)
    torch.save({"state_dict": model.state_dict(), "args": Malicious()}, path)
    with pytest.raises(ValueError, match=r"model\.pth' is not a readable file of tensors: it contains \w+\.system"):
        load_pruned(path)
    torch.save(model, path)
    with pytest.raises(ValueError, match=r"it contains \S+Network, which is neither .*torch\.save\(model\.state_dict"):
        load_pruned(path)
    assert not (tmp_path / "evidence").exists()


def contents(model) -> dict[str, bytes]:
    torch_file, numpy_file = io.BytesIO(), io.BytesIO()
    torch.save(model.state_dict(), torch_file)
    np.save(numpy_file, np.ones(3))
    return {"torch": torch_file.getvalue(), "numpy": numpy_file.getvalue()}


def test_a_damaged_file_raises_one_sentence_that_names_it(model, path, tmp_path):
    torch_file, numpy_file = contents(model).values()
    good = tmp_path / "good.pth"
    good.write_bytes(torch_file)
    cases = [
        b"",
        torch_file[:100],
        torch_file[:-50],
        b"\x80\x02junk",
        b"\x08" + bytes(7) + b"{junk}  ",
        os.urandom(200),
    ]
    for damaged in cases:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.pth' is not a readable file of tensors: ") as error:
            load_pruned(path)
        assert "\n" not in str(error.value)
    for damaged in (numpy_file[:20], numpy_file[:-9], numpy_file[:6] + b"\x09" + numpy_file[7:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.pth' is not a readable file of tensors: ") as error:
            load_pruned(good, path, model=model)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"no file '.*absent'"):
        load_pruned(tmp_path / "absent")


def test_a_file_without_state_dict_or_masks_raises(model, path):
    for content, message in (
        ([1, 2], "there is no state dict, but a list"),
        ({"epoch": 3, "arch": "vgg"}, "there is no state dict, only epoch, arch"),
        ({}, "there is no state dict, only an empty one"),
        (model.state_dict(), "there are no masks, and no zeros that could be masks among 10 tensors"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=rf"model\.pth': {message}"):
            load_pruned(path)
    with pytest.raises(ValueError, match=r"format must be one of parametrize, prune, .* got 'pruned'"):
        load_pruned(path, format="pruned")
    with pytest.raises(ValueError, match=r"there are no masks of the format 'turboprune'"):
        load_pruned(path, format="turboprune")


def test_masks_that_do_not_fit_the_weights_raise():
    weight = torch.ones(2, 1, 1, 1)
    for state, message in (
        ({"a.weight_mask": weight}, "there is a mask for 'a.weight', but no tensor of that name"),
        ({"weight_mask": weight[:1], "weight": weight}, r"mask of 'weight' must have shape \(2, 1, 1, 1\), got \(1, 1"),
        (
            {"weight_mask": weight / 2, "weight": weight},
            "the mask of 'weight' must have no values but 0 and 1, got 0.5",
        ),
        ({"bias_orig": weight[0], "bias_mask": weight[0]}, "only bias have masks, but no weight of a convolution"),
        ({"parametrizations.weight.original": weight}, "the parametrization of 'weight' has no mask"),
        ({"parametrizations.weight.original0": weight}, "belongs to a parametrization that is not a mask"),
    ):
        with pytest.raises(ValueError, match=message):
            from_state_dict(state)


def test_masks_that_do_not_fit_the_model_raise(model, masks, path):
    torch.save(as_prune(model, masks), path)
    other = Network()
    other.conv = other.conv1
    del other.conv1
    with pytest.raises(ValueError, match=r"does not fit the model: model has no module 'conv1'; did you mean 'conv'\?"):
        load_pruned(path, model=other)
    other = Network()
    other.fc = nn.Linear(6, 7)
    with pytest.raises(ValueError, match=r"does not fit the model: 'fc' has a weight of shape \(7, 6\), its mask has"):
        load_pruned(path, model=other)
    other.fc = nn.ReLU()
    with pytest.raises(ValueError, match=r"does not fit the model: 'fc' has no weight, its mask has \(5, 6\)"):
        load_pruned(path, model=other)


def test_a_prefix_that_the_model_has_itself_is_not_removed(model, masks, path):
    wrapped = nn.ModuleDict({"model": model})
    torch.save({f"module.{key}": value for key, value in as_masked(wrapped, with_prefix(masks)).items()}, path)
    assert list(load_pruned(path, model=wrapped).masks) == [f"model.{name}" for name in masks]
    assert list(load_pruned(path).masks) == list(masks)


def with_prefix(masks):
    return {f"model.{name}": mask for name, mask in masks.items()}


def test_masks_of_torch_ao_must_be_made_permanent_first(model, masks):
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model, [{"tensor_fqn": f"{name}.weight"} for name in masks])
    for name, mask in masks.items():
        model.get_submodule(name).parametrizations.weight[0].mask.copy_(mask)
    with pytest.raises(ValueError, match=r"'conv1.weight' has no mask: .*\(torch.ao.pruning: squash_mask\)"):
        from_state_dict(model.state_dict())
    sparsifier.squash_mask()
    assert_same(from_state_dict(model.state_dict())[0], masks)


def test_biases_may_be_pruned_too(model, masks):
    pruned = pruned_by_torch(model, masks)
    torch_prune.l1_unstructured(pruned.fc, "bias", amount=0.5)
    loaded, dense = from_state_dict(pruned.state_dict())
    assert_same(loaded, masks)
    assert torch.equal(dense["fc.bias"], pruned.fc.bias)
    parametrize.register_parametrization(model.fc, "bias", Multiplied(pruned.fc.bias_mask))
    _, dense = from_state_dict(as_parametrize(model, masks))
    assert torch.equal(dense["fc.bias"], pruned.fc.bias)


def test_a_chain_of_masks_keeps_what_all_of_them_keep(model, masks):
    state = as_parametrize(model, masks)
    second = torch.rand(5, 6).round()
    state["fc.parametrizations.weight.1.mask"] = second
    assert torch.equal(from_state_dict(state)[0]["fc"], masks["fc"] & (second != 0))


def test_pruned_weights_that_are_not_finite_become_zero():
    mask = torch.ones(7, 3, 3, 3)
    mask[0] = 0
    weight = torch.where(mask == 0, float("nan"), 1.0)
    _, dense = from_state_dict({"weight_orig": weight, "weight_mask": mask})
    assert torch.equal(dense["weight"], mask)


def test_zeros_are_masks_only_in_weights_of_convolutions_and_linear_layers(model, masks):
    with torch.no_grad():
        model.conv1.weight[0] = 0
        model.conv1.bias[0] = model.block.norm.weight[0] = 0
    loaded, dense = from_state_dict(model.state_dict())
    assert list(loaded) == ["conv1"] and torch.equal(loaded["conv1"], model.conv1.weight != 0)
    assert_same(dense, model.state_dict())
    # If there are other masks, zeros are ordinary weights.
    assert "conv1" not in from_state_dict(as_prune(model, {"fc": masks["fc"]}))[0]


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("format", ["dense", "prune"])
def test_a_written_file_is_read_back(model, masks, weights, tmp_path, suffix, format):
    path = tmp_path / f"model{suffix}"
    save_pruned(path, masks, model.state_dict(), format)
    loaded = load_pruned(path, model=model)
    assert loaded.provenance["format"] == ("zeros" if format == "dense" else "prune")
    assert_same(loaded.masks, masks)
    assert_same(loaded.state_dict, weights)
    save_pruned(tmp_path / "again.pt", loaded.masks, loaded.state_dict, format)
    assert_same(load_pruned(tmp_path / "again.pt").state_dict, weights)


def test_the_dense_file_loads_into_the_plain_model(model, masks, weights, path):
    save_pruned(path, masks, model.state_dict())
    other = Network()
    other.load_state_dict(torch.load(path), strict=True)
    assert_same(other.state_dict(), weights)


def test_the_prune_file_loads_into_a_model_pruned_by_torch(model, masks, path):
    save_pruned(path, masks, model.state_dict(), format="prune")
    other = pruned_by_torch(Network(), {name: torch.ones_like(mask) for name, mask in masks.items()})
    assert str(other.load_state_dict(torch.load(path), strict=True)) == "<All keys matched successfully>"
    x = torch.rand(2, 6)
    assert torch.equal(other.fc(x), pruned_by_torch(model, masks).fc(x))
    assert other.fc.weight_mask.dtype == torch.float32


def test_invalid_arguments_raise_and_no_file_is_written(model, masks, tmp_path):
    for name, format, state, message in (
        ("model.bin", "dense", model.state_dict(), "path must end in .safetensors, .pt or .pth, got 'model.bin'"),
        ("model.pt", "onnx", model.state_dict(), "format must be one of dense, prune, got 'onnx'"),
        ("model.pt", "dense", {}, "state_dict must have 'conv1.weight' for the mask of 'conv1', but has no such"),
    ):
        with pytest.raises(ValueError, match=message):
            save_pruned(tmp_path / name, masks, state, format)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_one_convolution_or_has_shared_weights_can_be_written(tmp_path):
    layer = nn.Conv2d(2, 2, 3)
    tied = nn.Sequential(layer, nn.Conv2d(2, 2, 3))
    tied[1].weight = layer.weight
    for network in (layer, tied):
        masks = prune(network, 0.5)
        for format in ("dense", "prune"):
            save_pruned(tmp_path / "t.safetensors", masks, network.state_dict(), format)
            assert_same(load_pruned(tmp_path / "t.safetensors", model=network).masks, masks)
