"""`train`: adversarial training, dense, from a ticket or sparse from the first step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparse_adv import experiment, models
from sparse_adv.commands import networks
from sparse_adv.commands.options import AFTER_A_STOP, check_training
from sparse_adv.commands.out_folder import check_config, write_config
from sparse_adv.commands.output import Output
from sparse_adv.config import DataConfig, MethodConfig, TrainConfig
from sparse_adv.config.checks import refuse_unused
from sparse_adv.experiment import TrainRun
from sparse_adv.json_files import to_json
from sparse_adv.memory import keep_freed_memory
from sparse_adv.training import deterministic, distributed

CONFIGURABLE = True


@dataclass(frozen=True)
class Options:
    """Train a network adversarially, dense, from a ticket or sparse from the first step, and test it once, at the end.

    After an interruption the same command continues after the last whole epoch; on a CPU, and on a GPU with
    --deterministic, it ends with the same weights, bit for bit. Under torchrun --nproc-per-node N the N processes share
    each batch and exchange only the gradients of the weights that the masks keep; each takes a GPU of its own, or all
    take the one that --device names.

    Args:
        out: folder of the run.
        name: name of the run in reports; the default is the name of the folder.
        ticket: ticket, pruned weights of a run, or pruned checkpoint of another tool; the default is dense training, or
            that of --method.
        reinit: control: the mask of the ticket with fresh initial weights.
        shuffle: control: a random mask with the density of the ticket in each layer.
        arch: name of an architecture of `sparse_adv.models`, needed without --ticket; the default is the one of the
            ticket.
        width: channels of the first stage; the default is the one of the ticket, or the published number.
        normalize: mean and standard deviation for a checkpoint of another tool that has none: of cifar10, cifar100,
            mnist, fashion_mnist or digits, or none for images in [0, 1] as they are.
        device: cpu, cuda, one GPU such as cuda:0, or auto, which is cuda where there is a GPU.
        deterministic: deterministic algorithms only: a GPU gives the same bits again, more slowly.
        keep_freed_memory: keep freed memory in the process instead of returning it to the system, which saves time.
        json: print JSON lines instead of text; the default is text on a terminal and JSON in a pipe.
    """

    out: Path
    name: str | None = None
    ticket: Path | None = None
    reinit: bool = False
    shuffle: bool = False
    arch: str | None = None
    width: int | None = None
    normalize: str | None = None
    device: str = "auto"
    deterministic: bool = False
    keep_freed_memory: bool = True
    json: bool | None = None
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    method: MethodConfig = MethodConfig()

    after_a_stop = AFTER_A_STOP

    def __post_init__(self) -> None:
        if self.ticket is None and (self.reinit or self.shuffle):
            raise ValueError("--reinit and --shuffle are controls of a ticket: name it with --ticket")
        if self.ticket is None and self.normalize is not None:
            raise ValueError(f"--normalize is for the checkpoint of --ticket, which is missing, got {self.normalize}")
        changed = [name for name, value in vars(self.method).items() if value != getattr(MethodConfig(), name)]
        self._check_method(changed)
        if self.ticket is not None and self.method.method != "none":
            raise ValueError(f"--method {self.method.method} makes its own masks: leave out --ticket")
        check_training(self.train, Options.train)
        refuse_unused(self.method, Options.method, self.method.without_effect())

    def check_flags(self, flags: set[str]) -> None:
        """Refuse flags of a method if no method is given, even with default values: the run would be dense."""
        self._check_method(
            [name for name in vars(self.method) if {f"--{(flag := name.replace('_', '-'))}", f"--no-{flag}"} & flags]
        )

    def _check_method(self, given: list[str]) -> None:
        others = [name for name in given if name != "method"]
        if others and self.method.method == "none":
            raise ValueError(f"--{others[0].replace('_', '-')} is a setting of a method: name one with --method")


def run(options: Options) -> int:
    check_config(options.out)
    if options.keep_freed_memory:
        keep_freed_memory()
    with deterministic(options.deterministic), distributed.group(options.device) as device:
        output = Output(options.json)
        dataset = experiment.load_data(options.data, options.train.seed, device)
        ticket = None
        if options.ticket:
            ticket = experiment.ticket_to_train(options.ticket, reinit=options.reinit, shuffle=options.shuffle)
        known = ticket[0].provenance if ticket is not None else {}
        network = networks.agreed(options.arch, options.width, known, str(options.ticket or "a run without --ticket"))
        if ticket is not None:
            fitted = models.fit_ticket(ticket[0], network.arch, normalize=options.normalize, width=network.width)
            networks.check_images(fitted, network.arch, dataset, options.data.data, str(options.ticket))
            ticket = fitted, ticket[1]
            if not options.reinit:
                networks.warn_of_trained_images(fitted, options.data, options.train.seed, str(options.ticket))
        run = TrainRun(
            options.out,
            options.train,
            options.data,
            network,
            dataset,
            device,
            ticket=ticket,
            method=options.method if options.method.method != "none" else None,
            name=options.name,
        )
        write_config(options.out, options)
        with output.progress(run.updates) as step:
            for record in run.epochs(step):
                output.epoch(record)
        result = run.finish()
        tested = ", ".join(f"{attack} {accuracy:.1%}" for attack, accuracy in (result.test or {}).items())
        output.print(
            f"{options.out}: test accuracy {tested}; {result.total.seconds:.1f} s of training and search",
            {"run": str(options.out), **to_json(result)},
        )
    return 0
