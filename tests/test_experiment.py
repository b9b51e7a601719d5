"""Runs from configurations: every setting reaches its use, controls change one thing, costs and densities are whole."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from sparse_adv import data, experiment, masks, methods, models, runs, tickets, training
from sparse_adv.config import DataConfig, MethodConfig, NetworkConfig, PruneConfig, TrainConfig
from sparse_adv.nn import mac_density
from sparse_adv.runs import Cost, TicketSource
from sparse_adv.training.update import updates_of

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

CPU = torch.device("cpu")
IMAGES = DataConfig("digits", limit=90, validation=30.0, batch_size=20)
NETWORK = NetworkConfig("digits_cnn", width=4)
TRAIN = TrainConfig("natural", epochs=2, lr=0.1, eps=0.1, evaluation_steps=1, seed=3)


@pytest.fixture(scope="module")
def dataset():
    return experiment.load_data(IMAGES, TRAIN.seed, CPU)


@pytest.fixture(scope="module")
def ticket():
    model = models.build("digits_cnn", width=4, seed=3)
    found = masks.Ticket(masks.prune(model, 0.25), model.state_dict(), {"cost": {"seconds": 7.0, "macs": 5000}})
    return found, TicketSource("sha")


def test_every_setting_of_the_images_reaches_the_loader(monkeypatch):
    config = DataConfig("elsewhere", limit=5, validation=0.25, share=0.5)
    monkeypatch.setattr(data, "load", lambda source, **settings: (source, settings))
    settings = {"limit": 5, "validation": 0.25, "share": 0.5, "seed": 3, "device": CPU}
    assert experiment.load_data(config, 3, CPU) == ("elsewhere", settings)


@pytest.mark.parametrize(("size", "channels", "augments"), [(32, 3, True), (32, 1, False), (8, 3, False)])
def test_batches_have_the_settings_and_augment_what_cifar_would_be(size, channels, augments):
    split = data.Split(torch.zeros(40, channels, size, size), torch.zeros(40, dtype=torch.int64))
    dataset = data.Dataset(split, split, split, 1, "made up")
    for asked in (None, True, False):
        made = experiment.make_batches(replace(IMAGES, augment=asked), dataset, 3)
        assert made.augment == (augments if asked is None else asked)
        assert (made.batch_size, made.seed, made.rank, made.world_size, made.shuffle) == (20, 3, 0, 1, True)
        assert made.split is split


def test_every_setting_of_a_network_reaches_its_architecture(dataset, ticket):
    for seed in (3, 4):
        built = experiment.build_network(NETWORK, dataset, seed, CPU)
        expected = models.build("digits_cnn", seed, width=4, data="digits")
        assert all(value.equal(expected.state_dict()[name]) for name, value in built.state_dict().items())
        assert built.conv1.weight.equal(ticket[0].state_dict["conv1.weight"]) == (seed == 3)
    colour = data.Split(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64))
    other = data.Dataset(colour, colour, colour, 5, "cifar10")
    built = experiment.build_network(NETWORK, other, 0, CPU)
    assert built(torch.rand(1, 3, 8, 8)).shape == (1, 5) and built.conv1.out_channels == 4
    assert built.normalize.mean.flatten()[0].item() == pytest.approx(0.4914)


def test_every_setting_of_a_checkpoint_reaches_its_network(dataset, ticket):
    found, _ = ticket
    five = replace(found, state_dict=found.state_dict | {"fc.weight": torch.rand(5, 8), "fc.bias": torch.rand(5)})
    loaded = experiment.load_network(NETWORK, dataset._replace(classes=5), five)
    assert loaded(torch.rand(1, 1, 8, 8)).shape == (1, 5) and not loaded.training
    assert loaded.normalize.mean.item() == pytest.approx(0.305)
    bare = {name: value for name, value in found.state_dict.items() if not name.startswith("normalize")}
    loaded = experiment.load_network(NETWORK, dataset, replace(found, state_dict=bare), "mnist")
    assert loaded.normalize.mean.item() == pytest.approx(0.1307)
    with pytest.raises(ValueError, match="does not fit"):
        experiment.load_network(NetworkConfig("digits_cnn", 8), dataset, found)


def test_a_search_counts_its_updates_and_describes_its_ticket(tmp_path, dataset):
    prune = PruneConfig(density=0.25, rounds=2, linear=False)
    run = experiment.SearchRun(tmp_path, TRAIN, prune, IMAGES, NETWORK, dataset, CPU)
    steps = []
    result = run.run(on_step=steps.append)
    assert run.updates == len(steps) == 2 * TRAIN.epochs * len(run.batches)
    found = masks.load_ticket(tmp_path / runs.TICKET)
    about = {"arch": "digits_cnn", "width": 4, "data": "digits", "seed": 3, "input_shape": [1, 8, 8]}
    assert found.provenance.items() >= about.items()
    assert result.density.weights == masks.density(found.masks) == pytest.approx(0.25, abs=0.01)
    assert result.density.macs == mac_density(run.model, found.masks, (1, 1, 8, 8)) != result.density.weights
    assert result.total == tickets.cost_of(found) and runs.read(tmp_path).result == result


def test_a_run_records_where_its_images_are_from_anywhere(tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    images = replace(IMAGES, data="images")
    experiment.TrainRun(tmp_path / "train", TRAIN, images, NETWORK, dataset, CPU)
    search = experiment.SearchRun(tmp_path / "search", TRAIN, PruneConfig(density=0.25), images, NETWORK, dataset, CPU)
    search.run()
    expected = str(tmp_path / "images")
    assert [runs.read(tmp_path / name).info.data.data for name in ("train", "search")] == [expected] * 2
    assert masks.load_ticket(tmp_path / "search" / runs.TICKET).provenance["data"] == expected


def test_free_training_counts_each_replay(dataset):
    made = experiment.make_batches(IMAGES, dataset, 0)
    assert updates_of(replace(TRAIN, objective="free", replays=3), made) == 3 * 2 * len(made)
    assert updates_of(replace(TRAIN, replays=3), made) == 2 * len(made)


@pytest.mark.parametrize("control", ["none", "reinit", "shuffle"])
def test_a_ticket_brings_its_cost_and_a_control_changes_one_thing(tmp_path, dataset, ticket, control):
    found, source = ticket
    source = source if control == "none" else replace(source, **{control: True})
    run = experiment.TrainRun(tmp_path, TRAIN, IMAGES, NETWORK, dataset, CPU, ticket=(found, source))
    info = runs.read(tmp_path).info
    assert info.before == run.training.total == Cost(7.0, 5000) and info.ticket == source
    assert info.density.weights == masks.density(found.masks)
    own = {name: run.model.get_submodule(name).weight_mask for name in found.masks}
    assert all(own[name].equal(run.masks[name]) for name in found.masks)
    assert all(own[name].equal(mask) for name, mask in found.masks.items()) == (control != "shuffle")
    kept = own["conv2"] & found.masks["conv2"]
    same_weights = run.model.conv2.weight[kept].equal(found.state_dict["conv2.weight"][kept])
    assert same_weights == (control != "reinit")
    if control == "shuffle":
        other = experiment.TrainRun(
            tmp_path / "b", replace(TRAIN, seed=4), IMAGES, NETWORK, dataset, CPU, ticket=(found, source)
        )
        assert not all(own[name].equal(mask) for name, mask in other.masks.items())


def test_a_shuffled_ticket_keeps_the_block_of_its_search(tmp_path, dataset):
    prune, folder = PruneConfig(density=0.4, block=(3, 1), scope="uniform"), tmp_path / "search"
    experiment.SearchRun(folder, replace(TRAIN, epochs=1), prune, IMAGES, NETWORK, dataset, CPU).run()
    ticket = experiment.ticket_to_train(folder / runs.TICKET, shuffle=True)
    run = experiment.TrainRun(tmp_path / "train", TRAIN, IMAGES, NETWORK, dataset, CPU, ticket=ticket)
    for name, mask in run.masks.items():
        assert masks.largest_block(mask, [(3, 1)]) == (3, 1, 1, 1)
        assert mask.sum() == ticket[0].masks[name].sum()
    assert not run.masks["conv2"].equal(ticket[0].masks["conv2"])


@pytest.mark.parametrize("trains", ["a method", "a ticket", "a shuffled ticket", "a hook in Python"])
def test_shuffled_masks_of_a_run_have_the_block_that_it_trained(tmp_path, dataset, ticket, trains):
    """(3, 1) is no block that the masks would be recognised by."""
    one, out = replace(TRAIN, epochs=1), tmp_path / "run"
    method = MethodConfig("static", density=0.4, block=(3, 1), scope="uniform")
    if trains == "a method":
        list(experiment.TrainRun(out, one, IMAGES, NETWORK, dataset, CPU, method=method).epochs())
    elif trains == "a hook in Python":
        model, batches = models.build("digits_cnn", width=4), experiment.make_batches(IMAGES, dataset, 3)
        training.train(model, batches, one, folder=out, hook=methods.SparseTraining(method))
    else:
        pruned = masks.prune(models.build("digits_cnn", width=4, seed=3), 0.4, (3, 1), scope="uniform")
        found = replace(ticket[0], masks=pruned, provenance={"prune": {"block": [3, 1]}})
        source = TicketSource("sha", shuffle=trains == "a shuffled ticket")
        list(experiment.TrainRun(out, one, IMAGES, NETWORK, dataset, CPU, ticket=(found, source)).epochs())
    again = experiment.ticket_to_train(out / runs.LAST, shuffle=True)
    run = experiment.TrainRun(tmp_path / "shuffled", one, IMAGES, NETWORK, dataset, CPU, ticket=again)
    assert not run.masks["conv2"].equal(again[0].masks["conv2"])
    for name, mask in run.masks.items():
        assert masks.largest_block(mask, [(3, 1)]) == (3, 1, 1, 1) and mask.sum() == again[0].masks[name].sum()


def test_a_run_of_an_earlier_version_continues_and_notes_its_block(tmp_path, dataset):
    method = MethodConfig("static", density=0.4, block=(3, 1))
    run = experiment.TrainRun(tmp_path, TRAIN, IMAGES, NETWORK, dataset, CPU, method=method)
    next(run.epochs())
    del run
    begun = json.loads((tmp_path / runs.INFO).read_text())
    del begun["block"]
    (tmp_path / runs.INFO).write_text(json.dumps(begun))
    assert runs.read(tmp_path).info.block is None
    run = experiment.TrainRun(tmp_path, TRAIN, IMAGES, NETWORK, dataset, CPU, method=method)
    assert len(run.training.records) == 1 and runs.read(tmp_path).info.block == (3, 1)


@pytest.mark.parametrize("seed", [TRAIN.seed - 1, TRAIN.seed, TRAIN.seed + 1])
def test_reinitialised_weights_are_those_of_no_seed_near_that_of_the_run(tmp_path, dataset, seed):
    model = models.build("digits_cnn", width=4, seed=seed)
    found = masks.Ticket(masks.prune(model, 0.25), copy.deepcopy(model.state_dict()))
    run = experiment.TrainRun(
        tmp_path, TRAIN, IMAGES, NETWORK, dataset, CPU, ticket=(found, TicketSource("sha", reinit=True))
    )
    for name, mask in found.masks.items():
        assert not (run.model.get_submodule(name).weight == model.get_submodule(name).weight)[mask].any()
    again = experiment.TrainRun(
        tmp_path / "again", TRAIN, IMAGES, NETWORK, dataset, CPU, ticket=(found, TicketSource("sha", reinit=True))
    )
    assert again.model.conv2.weight.equal(run.model.conv2.weight)


def test_a_run_is_tested_on_the_test_images_once_after_its_last_epoch(tmp_path, dataset, monkeypatch):
    run = experiment.TrainRun(tmp_path, TRAIN, IMAGES, NETWORK, dataset, CPU, name="mine")
    assert run.updates == 2 * len(run.batches) and runs.read(tmp_path).info.density == runs.DENSE
    for _ in run.epochs():
        pass
    tested = []

    def final_test(model, folder, records, config, test, checks):
        tested.append((folder, config, test, checks.pruned_weights_zero, len(records)))

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "final_test", final_test)
        run.finish()
    assert tested == [(tmp_path, TRAIN, dataset.test, True, 2)]
    result = run.finish()
    monkeypatch.setattr(experiment, "final_test", None)
    assert run.finish() == result == runs.read(tmp_path).result and runs.read(tmp_path).name == "mine"


def test_a_finished_run_without_its_state_returns_its_records_and_result(tmp_path, dataset, monkeypatch):
    run = experiment.TrainRun(tmp_path, TRAIN, IMAGES, NETWORK, dataset, CPU)
    records, result = list(run.epochs()), run.finish()
    (tmp_path / runs.STATE).unlink()
    run = experiment.TrainRun(tmp_path, TRAIN, IMAGES, NETWORK, dataset, CPU)
    assert list(run.epochs()) == records and run.finish() == result
    with pytest.raises(FileNotFoundError, match=r"not the state\.pt"):
        experiment.TrainRun(tmp_path, replace(TRAIN, epochs=TRAIN.epochs + 1), IMAGES, NETWORK, dataset, CPU)
    assert runs.read(tmp_path).result == result and runs.read(tmp_path).info.train == TRAIN


def test_a_finished_run_whose_weights_are_damaged_is_not_called_done(tmp_path, dataset):
    run = experiment.TrainRun(tmp_path, TRAIN, IMAGES, NETWORK, dataset, CPU)
    list(run.epochs())
    name = runs.BEST if run.finish().tested == "best" else runs.LAST
    (tmp_path / runs.STATE).unlink()  # from which the last epoch's weights would be written again
    weights = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=rf"{name}' is not a readable file of weights"):
        experiment.TrainRun(tmp_path, TRAIN, IMAGES, NETWORK, dataset, CPU).finish()


def test_a_refused_extension_leaves_a_finished_run_as_it_was(tmp_path, dataset):
    run = experiment.TrainRun(tmp_path, TRAIN, IMAGES, NETWORK, dataset, CPU)
    list(run.epochs())
    result = run.finish()
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    longer = replace(TRAIN, epochs=4)
    other = dataset._replace(train=dataset.train._replace(labels=dataset.train.labels.flip(0)))
    with pytest.raises(ValueError, match="other training images"):
        experiment.TrainRun(tmp_path, longer, IMAGES, NETWORK, other, CPU, name="other")
    assert files == {file: file.read_bytes() for file in tmp_path.iterdir()}
    run = experiment.TrainRun(tmp_path, TRAIN, IMAGES, NETWORK, dataset, CPU, name="mine")
    assert run.finish() == result and runs.read(tmp_path).name == "mine"
    run = experiment.TrainRun(tmp_path, longer, IMAGES, NETWORK, dataset, CPU)
    assert run.result is None and runs.read(tmp_path).name == "mine"
    assert [record.epoch for record in run.epochs()] == [1, 2, 3, 4] and run.finish() == runs.read(tmp_path).result


def test_searches_and_runs_train_and_validate_on_the_images_meant_for_it(tmp_path, dataset, monkeypatch):
    run = experiment.TrainRun(tmp_path / "run", TRAIN, IMAGES, NETWORK, dataset, CPU)
    assert run.training.validation is dataset.validation and run.batches.split is dataset.train
    search = experiment.SearchRun(tmp_path / "search", TRAIN, PruneConfig(), IMAGES, NETWORK, dataset, CPU)
    given = []

    def found(model, batches, train, prune, *, validation, **_):
        given.append((model, batches.split, train, prune, validation))
        raise InterruptedError

    monkeypatch.setattr(tickets, "search", found)
    with pytest.raises(InterruptedError):
        search.run()
    assert given == [(search.model, dataset.train, TRAIN, PruneConfig(), dataset.validation)]


def test_a_run_whose_pruned_weights_are_not_zero_has_no_result(tmp_path, dataset, ticket):
    run = experiment.TrainRun(tmp_path, TRAIN, IMAGES, NETWORK, dataset, CPU, ticket=ticket)
    with torch.no_grad():
        run.model.conv2.weight.fill_(1.0)
    with pytest.raises(tickets.TicketInvariantError, match="pruned weights of 'conv2' are not zero"):
        run.finish()
    assert not (tmp_path / runs.RESULT).exists()


def test_a_method_says_at_which_density_it_begins(tmp_path, dataset):
    method = MethodConfig("set", density=0.25, scope="uniform")
    run = experiment.TrainRun(tmp_path, TRAIN, IMAGES, NETWORK, dataset, CPU, method=method)
    info = runs.read(tmp_path).info
    assert info.method == method and info.density.weights == pytest.approx(0.25, abs=0.01)
    assert masks.density(run.masks) == info.density.weights and run.training.hook.config == method
    attacked = MethodConfig("flying-bird-plus")
    with pytest.raises(ValueError, match="objective must have an attack"):
        experiment.TrainRun(tmp_path / "b", TRAIN, IMAGES, NETWORK, dataset, CPU, method=attacked)


@pytest.mark.parametrize("kind", ["train", "search"])
@pytest.mark.parametrize("known", ["digests", "paths alone"])
def test_the_images_of_a_run_may_lie_elsewhere_if_they_are_the_same(tmp_path, dataset, monkeypatch, kind, known):
    monkeypatch.chdir(tmp_path)

    def begin(source, images=dataset):
        settings = replace(IMAGES, data=source)
        if kind == "train":
            return experiment.TrainRun(tmp_path / "run", TRAIN, settings, NETWORK, images, CPU)
        return experiment.SearchRun(tmp_path / "run", TRAIN, PruneConfig(0.5), settings, NETWORK, images, CPU)

    def end(run):
        if kind == "search":
            return run.run()
        list(run.epochs())
        return run.finish()

    result = end(begin("images"))
    if known == "paths alone":
        for name in (runs.STATE, runs.IDENTITY):
            (tmp_path / "run" / name).unlink(missing_ok=True)
    if known == "digests" or kind == "train":
        assert end(begin("./images/")) == end(begin(f"{tmp_path}/images")) == result
    if known == "digests":
        assert end(begin("/elsewhere")) == result
        assert runs.read(tmp_path / "run").info.data.data == "/elsewhere"  # where `evaluate` finds them
        other = dataset._replace(train=dataset.train._replace(labels=dataset.train.labels.flip(0)))
        with pytest.raises(ValueError, match="other training images"):
            end(begin("/elsewhere", other))
    else:
        for elsewhere in ("/elsewhere", "digits"):
            with pytest.raises(ValueError, match=r"other settings \(data\.data '"):
                begin(elsewhere)


def test_weights_are_told_with_the_epoch_that_they_are_of(tmp_path, dataset):
    """A run may have been killed between its records and its weights."""
    list(experiment.TrainRun(tmp_path, TRAIN, IMAGES, NETWORK, dataset, CPU).epochs())
    for name in (runs.LAST, runs.BEST):
        weights, metadata = training.checkpoint.read_weights(tmp_path / name)
        training.checkpoint.write_weights(tmp_path / name, weights, {**metadata, "epoch": 1})
        told = experiment.read_pruned(tmp_path / name, dense=True).provenance
        assert told["epoch"] == 1
        assert told["cost"]["seconds"] == runs.read(tmp_path).records[0].total.seconds
