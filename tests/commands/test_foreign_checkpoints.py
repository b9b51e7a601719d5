"""Checkpoints whose modules other code has named, given to `convert` and `train`."""

import pytest
import torch
from helpers.refusal import refused

from sparse_adv import masks, models, runs
from sparse_adv.__main__ import main
from sparse_adv.training import checkpoint

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.mark.parametrize("has_normalization", [True, False])
def test_a_checkpoint_of_other_code_is_converted_and_trained_under_the_names_here(tmp_path, capsys, has_normalization):
    model = models.build("digits_cnn", width=4)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("normalize")}
    theirs = {f"1.module.{name}": value for name, value in state.items()}
    if has_normalization:
        theirs |= {"0.mean": torch.tensor([0.25]), "0.std": torch.tensor([0.5])}
    masks.save_pruned(tmp_path / "a.pt", {"1.module.conv2": torch.rand(8, 4, 3, 3) < 0.5}, theirs)
    flags = ["--arch", "digits_cnn", "--width", "4", *([] if has_normalization else ["--normalize", "none"])]
    assert main(["convert", str(tmp_path / "a.pt"), str(tmp_path / "b.safetensors"), *flags]) == 0
    ticket = masks.load_ticket(tmp_path / "b.safetensors")
    assert list(ticket.masks) == ["conv2"] and ticket.state_dict.keys() == model.state_dict().keys()
    assert ticket.state_dict["normalize.mean"].item() == (0.25 if has_normalization else 0)
    run = ["train", "--objective", "natural", "--epochs", "1", "--evaluation-steps", "1", "--device", "cpu"]
    ends = []
    for name, more in (("a.pt", flags), ("b.safetensors", [])):
        out = tmp_path / f"run_{name}"
        assert main([*run, "--ticket", str(tmp_path / name), "--out", str(out), *more]) == 0
        ends.append(checkpoint.read_weights(out / runs.LAST)[0])
    assert all(ends[0][name].equal(value) for name, value in ends[1].items())


def test_masks_alone_are_refused_before_any_question_about_a_network(tmp_path, capsys):
    model = models.build("digits_cnn", width=4)
    kept = {f"{name}.weight": mask for name, mask in masks.prune(model, 0.5).items()}
    torch.save(kept, tmp_path / "masks.pt")
    flags = ("--arch", "digits_cnn", "--reinit", "--out", str(tmp_path / "run"))
    said = refused(capsys, "train", "--ticket", str(tmp_path / "masks.pt"), *flags)
    assert f"'{tmp_path / 'masks.pt'}': there are masks, but no weights: combine masks with their weights by" in said
