"""Whole runs, from configurations to a run folder, as the commands `search` and `train` and the demo make them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sparse_adv import data, json_files, masks, methods, models, runs, tickets
from sparse_adv.config import DataConfig, MethodConfig, NetworkConfig, PruneConfig, TrainConfig
from sparse_adv.json_files import JSONObject
from sparse_adv.masks.interchange.formats import GivenDensity
from sparse_adv.nn import mac_density
from sparse_adv.runs import Density, EpochRecord, RunInfo, SearchResult, TicketChecks, TicketSource, TrainResult
from sparse_adv.training import Training, distributed, final_test
from sparse_adv.training.checkpoint import read_metadata, read_weights
from sparse_adv.training.random_numbers import Stream, seed_of
from sparse_adv.training.run_files import begin, resume
from sparse_adv.training.update import updates_of

_CHOICE_OF_IMAGES = ("data", "limit", "validation", "share")
"""The fields of `DataConfig` that say which images are for training and which for validation."""


def load_data(config: DataConfig, seed: int, device: torch.device) -> data.Dataset:
    """Read the images of a configuration onto a device; the seed chooses those for validation and for training.

    Examples:
        >>> len(load_data(DataConfig("digits", limit=100, validation=20), 0, torch.device("cpu")).train.labels)
        80
    """
    return data.load(
        config.data,
        validation=config.validation,
        limit=config.limit,
        share=config.share,
        seed=seed,
        device=device,
    )


def make_batches(config: DataConfig, dataset: data.Dataset, seed: int) -> data.Batches:
    """Return the training batches of this process, which has its share of each batch.

    Examples:
        >>> config = DataConfig("digits", limit=100, validation=20, batch_size=32)
        >>> len(make_batches(config, load_data(config, 0, torch.device("cpu")), seed=0))
        3
    """
    augment = dataset.input_shape == (3, 32, 32) if config.augment is None else config.augment
    return data.Batches(
        dataset.train,
        config.batch_size,
        augment=augment,
        seed=seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def build_network(config: NetworkConfig, dataset: data.Dataset, seed: int, device: torch.device) -> nn.Module:
    """Return a dense network with fresh weights for the images of a data set.

    Examples:
        >>> cpu = torch.device("cpu")
        >>> dataset = load_data(DataConfig("digits", limit=100), 0, cpu)
        >>> build_network(NetworkConfig("digits_cnn", width=4), dataset, 0, cpu).fc.out_features
        10
    """
    model = models.build(
        config.arch,
        seed,
        width=config.width,
        classes=dataset.classes,
        input_shape=dataset.input_shape,
        data=dataset.name,
    )
    return model.to(device)


def load_network(
    config: NetworkConfig, dataset: data.Dataset, pruned: masks.Ticket, normalize: str | None = None
) -> nn.Module:
    """Return the network of a checkpoint for the images of a data set, in eval mode, see `models.load_checkpoint`."""
    return models.load_checkpoint(
        pruned,
        config.arch,
        normalize=normalize,
        width=config.width,
        classes=dataset.classes,
        input_shape=dataset.input_shape,
    )


def read_pruned(
    path: Path,
    mask_path: Path | None = None,
    *,
    model: nn.Module | None = None,
    density: GivenDensity = None,
    format: str | None = None,
    dense: bool = False,
) -> masks.Ticket:
    """Read masks and weights as `masks.load_pruned` does. If a run wrote the file, add its settings to the provenance.

    The keys are those of a search's ticket, such as network, images, training and cost, and also the epoch and the
    block of the masks.

    Args:
        path, mask_path, model, density, format, dense: as in `masks.load_pruned`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or of an unknown format.

    Examples:
        >>> read_pruned(Path("nowhere.safetensors"))
        Traceback (most recent call last):
        ...
        FileNotFoundError: no file 'nowhere.safetensors'
    """
    pruned = masks.load_pruned(path, mask_path, model=model, density=density, format=format, dense=dense)
    run = runs.of_weights(path)
    if run is None:
        return pruned
    info = run.info
    about = _origin(info)
    about |= {name: value for name, value in json_files.to_json(info).items() if name in ("train", "block") and value}
    epoch = read_metadata(path).get("epoch")  # if the run was killed, it may be older than the last record
    record = next((record for record in run.records if record.epoch == epoch), None)
    if record is not None:
        about |= {"epoch": record.epoch, "cost": json_files.to_json(record.total)}
    return replace(pruned, provenance=pruned.provenance | about)


def images_of(pruned: masks.Ticket, source: str) -> DataConfig | None:
    """Return the data configuration of the search or run that wrote a ticket or weights; None if it is not recorded.

    Args:
        pruned: from `read_pruned`.
        source: name of the ticket or the run, for errors.

    Raises:
        ValueError: if the provenance has impossible values.

    Examples:
        >>> ticket = masks.Ticket({}, {}, {"data": "digits", "limit": 500, "seed": 1})
        >>> images_of(ticket, "a ticket")
        DataConfig(data='digits', limit=500, validation=None, share=1.0, batch_size=128, augment=None)
    """
    known = {name: pruned.provenance[name] for name in _CHOICE_OF_IMAGES if name in pruned.provenance}
    return json_files.from_json(DataConfig, known, source) if isinstance(known.get("data"), str) else None


def ticket_to_train(path: Path, *, reinit: bool = False, shuffle: bool = False) -> tuple[masks.Ticket, TicketSource]:
    """Read a ticket, or a pruned checkpoint of another tool, to be trained by a `TrainRun`.

    Args:
        path: of the file.
        reinit: train the masks with freshly initialised weights, as a control.
        shuffle: permute the masks of each layer at random, as a control.

    Returns:
        The ticket as it is in the file, and the description of what is to be trained.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or of an unknown format.
    """
    return read_pruned(path), TicketSource(hashlib.sha256(path.read_bytes()).hexdigest(), reinit, shuffle)


class SearchRun:
    """A ticket search in a run folder. A search that was stopped continues, a finished one only returns its result.

    Args:
        folder: of the run.
        train, prune, images, network: the configurations.
        dataset: the images, from `load_data`.
        device: of the network.

    Raises:
        BlockingIOError: if another process or thread writes to the folder.
        ValueError: if the folder holds another run, or a configuration does not fit the images.

    Examples:
        >>> import tempfile
        >>> folder, cpu = Path(tempfile.mkdtemp()), torch.device("cpu")
        >>> train = TrainConfig("fgsm-rs", epochs=1, eps=0.1, schedule="constant", evaluation_steps=1)
        >>> images, network = DataConfig("digits", limit=100), NetworkConfig("digits_cnn", width=4)
        >>> dataset = load_data(images, train.seed, cpu)
        >>> search = SearchRun(folder, train, PruneConfig(density=0.5), images, network, dataset, cpu)
        >>> round(search.run().density.weights, 2)
        0.5
        >>> sorted(path.name for path in folder.glob("*.json*"))
        ['epochs.jsonl', 'result.json', 'run.json']
    """

    def __init__(
        self,
        folder: Path,
        train: TrainConfig,
        prune: PruneConfig,
        images: DataConfig,
        network: NetworkConfig,
        dataset: data.Dataset,
        device: torch.device,
    ) -> None:
        self.folder, self.train, self.prune = folder, train, prune
        self.network, self.dataset = network, dataset
        self.model = build_network(network, dataset, train.seed, device)
        self.batches = make_batches(images, dataset, train.seed)
        tickets.check_fits(self.model, self.batches, train, prune)
        self.info = RunInfo(
            "search",
            train,
            prune.named(),
            images.located(),
            network,
            world_size=distributed.world_size(),
            input_shape=dataset.input_shape,
            class_names=dataset.class_names,
        )
        self.lock = begin(folder, self.info)

    @property
    def updates(self) -> int:
        """Upper bound of the number of updates, for a progress bar."""
        return self.prune.rounds * updates_of(self.train, self.batches)

    def run(
        self,
        on_epoch: Callable[[EpochRecord], object] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> SearchResult:
        """Search and return the result, see `tickets.search`, whose callbacks these are."""
        tickets.search(
            self.model,
            self.batches,
            self.train,
            self.prune,
            validation=self.dataset.validation,
            folder=self.folder,
            metadata=_origin(self.info),
            on_epoch=on_epoch,
            on_step=on_step,
        )
        resume(self.folder, self.info)
        return json_files.read(SearchResult, self.folder / runs.RESULT)


class TrainRun:
    """A training run in a run folder, dense, of a ticket or of a method. A run that was stopped continues.

    Args:
        folder: of the run.
        train, images, network: the configurations.
        dataset: the images, from `load_data`.
        device: of the network.
        ticket: a ticket and its description, from `ticket_to_train`; None to start from a dense network.
        method: makes and changes masks during training; None for no method.
        name: of the run in reports; None for the folder's name.

    Raises:
        BlockingIOError: if another process or thread writes to the folder.
        FileNotFoundError: if the folder has epochs of an unfinished run, but not the state to continue from.
        ValueError: if the folder holds another run, or the ticket does not fit the network.

    Examples:
        >>> import tempfile
        >>> folder, cpu = Path(tempfile.mkdtemp()), torch.device("cpu")
        >>> train = TrainConfig("fgsm-rs", epochs=2, eps=0.1, evaluation_steps=1)
        >>> images, network = DataConfig("digits", limit=100), NetworkConfig("digits_cnn", width=4)
        >>> run = TrainRun(folder, train, images, network, load_data(images, train.seed, cpu), cpu)
        >>> [record.epoch for record in run.epochs()]
        [1, 2]
        >>> sorted(run.finish().test)
        ['clean', 'fgsm', 'pgd-20']
    """

    def __init__(
        self,
        folder: Path,
        train: TrainConfig,
        images: DataConfig,
        network: NetworkConfig,
        dataset: data.Dataset,
        device: torch.device,
        *,
        ticket: tuple[masks.Ticket, TicketSource] | None = None,
        method: MethodConfig | None = None,
        name: str | None = None,
    ) -> None:
        self.folder, self.train, self.dataset = folder, train, dataset
        self.masks: dict[str, torch.Tensor] = {}
        hook = None if method is None else methods.SparseTraining(method)
        if hook is not None:
            hook.check_training(train)
        if ticket is None:
            self.model = build_network(network, dataset, train.seed, device)
            source, block, density, before = None, None, runs.DENSE, runs.NO_COST
        else:
            start, source = ticket
            block = tickets.block_of(start)
            seed = seed_of(train.seed, Stream.REINIT) if source.reinit else train.seed
            self.model = build_network(network, dataset, seed, device)
            self.masks = start.masks
            if source.shuffle:
                self.masks = tickets.shuffle(start.masks, train.seed, block, self.model)
            start = replace(start, masks=self.masks)
            tickets.restore(self.model, start, (1, *dataset.input_shape), weights=not source.reinit)
            density, before = density_of(self.model, self.masks, dataset), tickets.cost_of(start)
        if method is not None:
            block = method.block
            density = density_of(self.model, methods.random_masks(self.model, method, train.seed), dataset)
        self.batches = make_batches(images, dataset, train.seed)
        info = RunInfo(
            "train",
            train,
            method=method,
            data=images.located(),
            network=network,
            ticket=source,
            world_size=distributed.world_size(),
            name=name,
            density=density,
            before=before,
            input_shape=dataset.input_shape,
            class_names=dataset.class_names,
            block=block,
        )
        self.lock = begin(folder, info)
        path = folder / runs.RESULT
        self.training: Training | None = None
        """None for a finished run that has lost its state: its result is returned, but its weights are not restored."""
        if (folder / runs.STATE).exists() or not path.exists():
            self.training = Training(
                self.model, self.batches, train, validation=dataset.validation, folder=folder, before=before, hook=hook
            )
            if hook is not None:
                self.masks = hook.masks()
        resume(folder, info)
        self.result = json_files.read(TrainResult, path) if path.exists() else None
        """None for an unfinished run. A result file that appears later in its folder belongs to another run."""

    @property
    def updates(self) -> int:
        """Number of updates, for a progress bar."""
        return updates_of(self.train, self.batches)

    def epochs(self, on_step: Callable[[int], None] | None = None) -> Iterator[EpochRecord]:
        """Train, and yield each epoch's record once it is written; records of an earlier call come first."""
        return iter(runs.read(self.folder).records) if self.training is None else self.training.epochs(on_step)

    def finish(self) -> TrainResult:
        """Test the best weights on the test images and write `result.json`; a finished run has it already.

        Raises:
            ValueError: if the file of the weights that a finished run has tested is damaged.
        """
        self.lock.check()
        if self.result is not None:
            tested = self.folder / (runs.BEST if self.result.tested == "best" else runs.LAST)
            if tested.exists():  # it may have been deleted to save space
                read_weights(tested)
            return self.result
        assert self.training is not None
        tickets.check_pruned_weights(self.model, self.masks)
        checks = TicketChecks(pruned_weights_zero=True)
        records = self.training.records
        self.result = final_test(self.model, self.folder, records, self.train, self.dataset.test, checks)
        return self.result


def density_of(model: nn.Module, ticket_masks: dict[str, torch.Tensor], dataset: data.Dataset) -> Density:
    """Return the densities of weights and MACs of a model under masks."""
    macs = mac_density(model, ticket_masks, (1, *dataset.input_shape))
    return Density(masks.density(ticket_masks, model), macs)


def _origin(info: RunInfo) -> JSONObject:
    """The provenance entries that describe a run; unknown facts have no entry."""
    network, images = info.network, info.data
    about: JSONObject = {} if network is None else {"arch": network.arch, "width": network.width}
    about |= {} if images is None else {name: getattr(images, name) for name in _CHOICE_OF_IMAGES}
    about |= {} if info.input_shape is None else {"input_shape": list(info.input_shape)}
    about |= {} if info.class_names is None else {"class_names": list(info.class_names)}
    return about | {"seed": info.train.seed}
