"""`search`: find a ticket, write it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparse_adv import experiment, runs
from sparse_adv.commands.options import AFTER_A_STOP, check_training
from sparse_adv.commands.out_folder import check_config, write_config
from sparse_adv.commands.output import Output
from sparse_adv.config import DataConfig, NetworkConfig, PruneConfig, TrainConfig
from sparse_adv.config.checks import refuse_unused
from sparse_adv.experiment import SearchRun
from sparse_adv.json_files import to_json
from sparse_adv.memory import keep_freed_memory
from sparse_adv.training import deterministic, distributed

CONFIGURABLE = True


@dataclass(frozen=True)
class Options:
    """Train a dense network with a cheap objective, prune it, and write the mask with the weights to start from.

    The ticket is OUT/ticket.safetensors. After an interruption the same command continues after the last whole epoch.
    The defaults are those of Li et al. 2020 (arXiv 2003.05733), section 3.1: a small constant learning rate without
    warm-up, and the initial weights. With --keep-weights the ticket has the trained weights.

    Args:
        out: folder of the run, for the ticket and its records.
        device: cpu, cuda, one GPU such as cuda:0, or auto, which is cuda where there is a GPU.
        deterministic: deterministic algorithms only: a GPU gives the same bits again, more slowly.
        keep_freed_memory: keep freed memory in the process instead of returning it to the system, which saves time.
        json: print JSON lines instead of text; the default is text on a terminal and JSON in a pipe.
    """

    out: Path
    device: str = "auto"
    deterministic: bool = False
    keep_freed_memory: bool = True
    json: bool | None = None
    data: DataConfig = DataConfig()
    network: NetworkConfig = NetworkConfig("resnet18")
    train: TrainConfig = TrainConfig(objective="fgsm-rs", epochs=20, lr=0.05, schedule="constant", weight_decay=1e-4)
    prune: PruneConfig = PruneConfig()

    after_a_stop = AFTER_A_STOP

    def __post_init__(self) -> None:
        check_training(self.train, Options.train)
        refuse_unused(self.prune, Options.prune, self.prune.without_effect())


def run(options: Options) -> int:
    check_config(options.out)
    if options.keep_freed_memory:
        keep_freed_memory()
    with deterministic(options.deterministic), distributed.group(options.device) as device:
        output = Output(options.json)
        dataset = experiment.load_data(options.data, options.train.seed, device)
        search = SearchRun(options.out, options.train, options.prune, options.data, options.network, dataset, device)
        if not (options.out / runs.CONFIG).exists():
            write_config(options.out, options)
        with output.progress(search.updates) as step:
            result = search.run(on_epoch=output.epoch, on_step=step)
        write_config(options.out, options)  # not earlier: the search may refuse options that differ from the run's
        path, density = options.out / runs.TICKET, result.density
        output.print(
            f"{path}: keeps {density.weights:.1%} of the weights and {density.macs:.1%} of the multiply-adds; found in "
            f"{result.total.seconds:.1f} s",
            {"ticket": str(path), **to_json(result)},
        )
    return 0
