"""`save_pruned` takes the state dict of a sparse model, `load_pruned` knows which layers of a model can have masks."""

import copy

import pytest
import torch
from helpers.foreign_formats import Network
from torch import nn

from sparse_adv.masks import Ticket, load_pruned, prune, save_pruned, save_ticket
from sparse_adv.nn import densify, sparsify


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_sparse_models_state_dict_is_written_as_a_dense_ones(tmp_path, suffix):
    model = Network()
    masks = prune(model, 0.4, linear=True)
    dense, path = copy.deepcopy(model), tmp_path / f"a{suffix}"
    sparse = sparsify(model, masks)
    save_pruned(path, masks, sparse.state_dict())
    dense.load_state_dict(load_pruned(path).state_dict)
    save_ticket(tmp_path / "t", Ticket(masks, sparse.state_dict()))
    dense.load_state_dict(load_pruned(tmp_path / "t").state_dict)
    save_pruned(path, masks, sparse.state_dict(), format="prune")
    assert all(load_pruned(path).masks[name].equal(mask) for name, mask in masks.items())
    name = next(iter(masks))
    for other in (masks | {name: ~masks[name]}, {key: mask for key, mask in masks.items() if key != name}):
        with pytest.raises(ValueError, match=r"state_dict has another mask '.*weight_mask' than masks"):
            save_pruned(path, other, sparse.state_dict())


def test_zeros_of_layers_that_cannot_have_masks_stay_in_their_weights(tmp_path, caplog):
    layers = {"tokens": nn.Embedding(50, 8, padding_idx=0), "up": nn.ConvTranspose2d(4, 4, 3), "head": nn.Linear(8, 4)}
    model = nn.ModuleDict(layers)
    kept = prune(model, 0.3, linear=True)
    with torch.no_grad():
        model["up"].weight[0] = 0
    densify(sparsify(model, kept))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    ticket = load_pruned(tmp_path / "a.pt", model=model)
    assert ticket.masks.keys() == kept.keys() and all(ticket.masks[name].equal(mask) for name, mask in kept.items())
    assert ticket.provenance["density"] == pytest.approx(0.3, abs=0.02)
    assert "the zeros in tokens, up stay in the weights" in caplog.text
    sparsify(model, ticket.masks)
    for name, layer in model.items():
        assert ticket.state_dict[f"{name}.weight"].equal(layer.weight)


@pytest.mark.parametrize("format", ["dense", "prune"])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_masks_in_any_memory_format_are_written(tmp_path, name, format):
    model = nn.Sequential(nn.Conv2d(4, 8, 3)).to(memory_format=torch.channels_last)
    masks = {name: mask.to(memory_format=torch.channels_last) for name, mask in prune(model, 0.4).items()}
    save_pruned(tmp_path / name, masks, model.state_dict(), format=format)
    assert load_pruned(tmp_path / name).masks["0"].equal(masks["0"])


def test_a_module_of_two_names_is_written_pruned_under_both(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(2, 4, 3)
            self.b = self.a

    model = Twice()
    kept = prune(model, 0.3)
    for format in ("dense", "prune"):
        save_pruned(tmp_path / "x.pt", kept, model.state_dict(), format=format)
        loaded = load_pruned(tmp_path / "x.pt")
        assert all(loaded.masks[name].equal(kept["a"]) for name in ("a", "b"))
    sparsify(model, kept)
    save_pruned(tmp_path / "x.pt", kept, model.state_dict())
    state = torch.load(tmp_path / "x.pt")
    assert state["b.weight"].count_nonzero() == kept["a"].sum()
