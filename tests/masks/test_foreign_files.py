"""Checkpoints of others that are not what they seem: read, or refused in one sentence that says what to do."""

import argparse
import copy
import re
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sparse_adv import tickets
from sparse_adv.masks import Ticket, load_pruned, prune, save_ticket


@pytest.fixture
def model():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 20))


@pytest.fixture
def pruned(model):
    state = model.state_dict()
    return state | {f"{name}.weight": state[f"{name}.weight"] * mask for name, mask in prune(model, 0.5).items()}


def written(folder, content):
    torch.save(content, folder / "model.pt")
    return folder / "model.pt"


def test_settings_and_numbers_beside_the_weights_are_read(pruned, tmp_path):
    extra = {"args": argparse.Namespace(lr=0.1), "best": np.float64(0.5), "epoch": np.int64(3), "data": Path("a/b")}
    ticket = load_pruned(written(tmp_path, {"state_dict": pruned, **extra}))
    assert ticket.state_dict.keys() == pruned.keys()


def test_averaged_weights_are_read_for_the_model(model, pruned, tmp_path):
    model.load_state_dict(pruned)
    ticket = load_pruned(written(tmp_path, AveragedModel(model).state_dict()), model=model)
    assert ticket.state_dict.keys() == pruned.keys()
    assert all(torch.equal(ticket.masks[name], pruned[f"{name}.weight"] != 0) for name in ticket.masks)


@pytest.mark.parametrize("of", [lambda model: model, lambda model: {**model.state_dict(), "name": np.str_("a")}])
def test_other_objects_are_refused_with_the_remedy(model, tmp_path, of):
    with pytest.raises(ValueError, match=r"torch\.save\(model\.state_dict\(\), path\)"):
        load_pruned(written(tmp_path, of(model)))


def test_archives_of_others_are_named(model, tmp_path):
    torch.jit.save(torch.jit.script(model), tmp_path / "model.pt")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    for name, said in (("model.pt", "it is a TorchScript program"), ("arrays.npz", r"it is a NumPy archive \(\.npz\)")):
        with pytest.raises(ValueError, match=f"{name}.*{said}"):
            load_pruned(tmp_path / name)


def test_a_list_of_masks_without_elements_is_refused_at_once(model, tmp_path):
    value = [0]
    for _ in range(28):
        value = [value, value]
    shared = np.empty(1, object)
    shared[0] = value
    np.save(tmp_path / "masks.npy", shared, allow_pickle=True)
    with pytest.raises(ValueError, match=r"masks\.npy.* contains an object so often"):
        load_pruned(written(tmp_path, model.state_dict()), tmp_path / "masks.npy", model=model)
    np.save(tmp_path / "masks.npy", np.zeros((2**40, 0), bool))
    with pytest.raises(ValueError, match=r"masks\.npy.* it holds 1099511627776 masks, more than"):
        load_pruned(written(tmp_path, model.state_dict()), tmp_path / "masks.npy", model=model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weight: weight.to_sparse(), "'2.weight' is sparse"),
        (lambda weight: weight.to("meta"), "'2.weight' is on the meta device"),
        (lambda weight: weight.to(torch.complex64), "'2.weight' is complex"),
        (lambda weight: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "'2.weight' is nested"),
        (lambda weight: torch.zeros(1).expand(2**20, 2**20), "'2.weight' repeats its elements"),
    ],
)
def test_weights_that_are_not_dense_numbers_are_refused(pruned, tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        load_pruned(written(tmp_path, pruned | {"2.weight": change(pruned["2.weight"])}))


def test_a_name_that_is_no_text_is_refused(pruned, tmp_path):
    with pytest.raises(ValueError, match=r"model\.pt.*ud800' is no text"):
        load_pruned(written(tmp_path, pruned | {"\ud800": torch.zeros(1)}))


def test_a_checkpoint_that_contains_itself_is_refused(tmp_path):
    checkpoint: dict = {}
    checkpoint["state_dict"] = {"model": checkpoint}
    with pytest.raises(ValueError, match="contains itself"):
        load_pruned(written(tmp_path, checkpoint))


def test_a_checkpoint_of_many_levels_takes_no_longer_than_it_is_long(tmp_path):
    levels = b"".join(b"}X\x05\x00\x00\x00model" for _ in range(50_000))
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + levels + b"}" + b"s" * 50_000 + b".")
        archive.writestr("archive/version", "3")
        archive.writestr("archive/byteorder", "little")
    begin = time.process_time()
    with pytest.raises(ValueError, match="there is no state dict, only an empty one"):
        load_pruned(tmp_path / "a.pt")
    assert time.process_time() - begin < 10


def test_numbers_of_half_a_byte_are_refused(tmp_path):
    header = b'{"a.weight":{"dtype":"F4","shape":[2,2],"data_offsets":[0,2]}}'
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(2))
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        load_pruned(tmp_path / "a.safetensors")


def test_what_a_file_does_not_need_is_refused(model, pruned, tmp_path):
    path = written(tmp_path, pruned)
    with pytest.raises(ValueError, match="density is for the format 'popup_scores', got the format 'zeros'"):
        load_pruned(path, density=0.5)
    ticket = load_pruned(path)
    save_ticket(tmp_path / "a.safetensors", ticket)
    for argument, value in (("mask_path", path), ("density", 0.5)):
        with pytest.raises(ValueError, match=f"{argument} is not for a ticket, which has its own masks"):
            load_pruned(tmp_path / "a.safetensors", **{argument: value})


def test_a_compressed_archive_is_refused(pruned, tmp_path):
    path = written(tmp_path, pruned | {"large": torch.zeros(1 << 20)})
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in content.items():
            archive.writestr(name, part)
    with pytest.raises(ValueError, match="it is compressed"):
        load_pruned(path)


def test_a_chance_zero_makes_no_ticket_of_a_dense_model(model, tmp_path):
    state = model.state_dict()
    state["2.weight"][0, 0] = 0
    path = written(tmp_path, state)
    with pytest.raises(ValueError, match="only 1 of 2916 weights are zero"):
        load_pruned(path)
    assert load_pruned(path, dense=True).provenance["format"] == "dense"
    assert list(load_pruned(path, format="zeros").masks) == ["2"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("2.bias"), r"unlike the model it lacks '2\.bias'"),
        (lambda state: state.update(extra=torch.zeros(1)), "unlike the model it has 'extra'"),
        (
            lambda state: state.update({"2.bias": torch.ones(5)}),
            r"'2\.bias' has shape \(5,\), in the model it has \(20,\)",
        ),
    ],
)
def test_a_state_dict_with_other_keys_or_shapes_than_the_model_is_refused(model, pruned, tmp_path, change, said):
    change(pruned)
    with pytest.raises(ValueError, match=said):
        load_pruned(written(tmp_path, pruned), model=model)


@pytest.mark.parametrize("key", ["network", "weights", "state_dict_ema"])
def test_the_only_dict_of_tensors_is_the_state_dict_whatever_its_name(model, pruned, tmp_path, key):
    """Beside it are the counters and the nested state of an optimiser, which are none."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.rand(1, 1, 8, 8)).sum().backward()
    optimizer.step()
    others = {"epoch": 3, "optimizer": optimizer.state_dict(), "scaler": {"scale": 65536.0}}
    assert others["optimizer"]["state"][0]["momentum_buffer"].any()
    ticket = load_pruned(written(tmp_path, {**others, key: pruned}), model=model)
    assert all(ticket.state_dict[name].equal(value) for name, value in pruned.items())


def test_of_several_dicts_of_tensors_none_is_guessed(pruned, tmp_path):
    path = written(tmp_path, {"generator": pruned, "network": pruned})
    with pytest.raises(ValueError, match="several state dicts, generator, network: save the one that is meant alone"):
        load_pruned(path)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
@pytest.mark.parametrize("content", ["<!DOCTYPE html>", "version https://git-lfs.github.com/spec/v1\n"])
def test_text_in_place_of_a_file_of_tensors_is_told_as_such(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}' is not a readable .*: it is text that begins with '{content[:5]}"):
        load_pruned(tmp_path / name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(model, tmp_path, value):
    """NaN is not zero: a mask was lost, and a training that started from such a file blamed the learning rate."""
    path, state = tmp_path / "a.pt", {key: tensor.clone() for key, tensor in model.state_dict().items()}
    name = next(key for key, tensor in state.items() if tensor.dim() == 4).removesuffix(".weight")
    weight = state[f"{name}.weight"]
    weight[0], weight[1] = 0, value
    torch.save(state, path)
    said = re.escape(f"{str(path)!r}: '{name}.weight' has values that are not finite")
    for dense in (False, True):
        with pytest.raises(ValueError, match=said):
            load_pruned(path, dense=dense)
    ticket = Ticket({name: torch.ones_like(weight, dtype=torch.bool)}, state)
    save_ticket(path, ticket)
    with pytest.raises(ValueError, match=said):
        load_pruned(path)
    with pytest.raises(ValueError, match=f"'{name}.weight' has values that are not finite"):
        tickets.restore(copy.deepcopy(model), ticket, (1, 1, 8, 8))
    ticket.masks[name][1] = False  # what is pruned may have any value
    save_ticket(path, ticket)
    assert load_pruned(path).masks[name].equal(ticket.masks[name])


def test_a_bias_of_several_dimensions_may_hold_infinities(pruned, tmp_path):
    """A causal mask of an attention does."""
    causal = torch.full((4, 4), -torch.inf).triu(1)
    assert load_pruned(written(tmp_path, dict(pruned) | {"attention.bias": causal}), dense=True).masks


def test_a_mask_is_for_the_parameter_of_its_own_name_first(tmp_path):
    state = {f"{name}.weight": torch.rand(4, 4) + 1 for name in ("head", "mask_head")}
    masks_file = tmp_path / "masks.pt"
    torch.save({"mask_head.weight": torch.eye(4)}, masks_file)
    assert set(load_pruned(written(tmp_path, state), mask_path=masks_file).masks) == {"mask_head"}


def test_weights_of_a_byte_are_read(pruned, tmp_path):
    state = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in pruned.items()}
    assert set(load_pruned(written(tmp_path, state)).masks) == {"0", "2"}


@pytest.mark.parametrize("style", ["{}", "{}.weight", "{}.mask", "{}.weight_mask", "mask_{}___weight"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_without_weights_are_told_as_such_and_combined_with_weights(model, tmp_path, style, dtype):
    kept = prune(model, 0.3, linear=True)
    path = written(tmp_path, {style.format(name): mask.to(dtype) for name, mask in kept.items()})
    for dense in (False, True):
        with pytest.raises(ValueError, match=r"there are masks, but no weights: combine .*sparse-adv convert WEIGHTS"):
            load_pruned(path, dense=dense)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    combined = load_pruned(tmp_path / "weights.pt", path)
    assert all(combined.masks[name].equal(mask) for name, mask in kept.items())
