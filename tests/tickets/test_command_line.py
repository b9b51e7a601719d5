"""`sparse-adv search` with its cheaper searches, and `train --ticket` of what they find."""

import pytest

from sparse_adv import masks, runs
from sparse_adv.__main__ import main
from sparse_adv.training import checkpoint

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
Image = pytest.importorskip("PIL.Image", reason="Pillow writes the images")

FLAGS = ("--limit", "300", "--validation", "60", "--eps", "0.1", "--evaluation-steps", "1", "--device", "cpu")
CHEAP = ("--share", "0.5", "--half-resolution", "--objective", "natural", "--epochs", "2")
NETWORK = ("--arch", "digits_cnn", "--width", "4")


def test_a_cheap_search_finds_a_ticket_for_training_on_all_images(tmp_path):
    found, out = tmp_path / "search", tmp_path / "train"
    assert main(["search", *NETWORK, *FLAGS, *CHEAP, "--keep-weights", "--density", "0.3", "--out", str(found)]) == 0
    search = runs.read(found)
    assert search.info.data.share == 0.5 and search.info.prune.half_resolution and search.info.prune.keep_weights
    assert search.records[0].images == pytest.approx(120, abs=5)
    ticket = masks.load_ticket(found / runs.TICKET)
    assert ticket.provenance["input_shape"] == [1, 8, 8] and ticket.provenance["prune"]["keep_weights"]
    arguments = ["--ticket", str(found / runs.TICKET), "--objective", "fgsm-rs", "--epochs", "1", "--lr", "0"]
    assert main(["train", *FLAGS, *arguments, "--out", str(out)]) == 0
    train = runs.read(out)
    assert train.records[0].images == 240 and train.info.before == search.result.total
    weights, _ = checkpoint.read_weights(out / runs.LAST)
    for name, mask in ticket.masks.items():
        assert weights[f"{name}.weight"].equal(ticket.state_dict[f"{name}.weight"] * mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--density", "0"], "density must be in (0, 1], got 0.0"),
        (["--density", "2"], "density must be in (0, 1], got 2.0"),
        (["--keep-weights", "--rewind-step", "2"], "--rewind-step must be 0 with keep_weights"),
        (["--epochs", "2", "--rewind-step", "5"], "must be an update of the first round, which has 4, got 5"),
        (["--share", "1.5"], "share must be in (0, 1], got 1.5"),
    ],
)
def test_wrong_settings_are_refused_and_no_folder_is_made(tmp_path, capsys, arguments, message):
    assert main(["search", *NETWORK, *FLAGS, *arguments, "--out", str(tmp_path / "run")]) != 0
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_network_that_halves_images_too_often_is_refused(tmp_path, capsys):
    """Five times, with images of 32 x 32 pixels: at half resolution nothing is left."""
    images = tmp_path / "images"
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (images / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (32, 32), (60 * number, 0, 9)).save(images / name / f"{number}.png")
    arguments = [
        "--data",
        str(images),
        "--arch",
        "vgg16_kuangliu",
        "--width",
        "2",
        "--half-resolution",
        "--epochs",
        "1",
    ]
    assert main(["search", *arguments, "--batch-size", "2", "--device", "cpu", "--out", str(tmp_path / "run")]) != 0
    assert "half_resolution does not fit the model for images of 16 x 16 pixels" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
