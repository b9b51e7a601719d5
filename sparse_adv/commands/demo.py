"""`demo`: search, training, controls and report on real digits, in 3 minutes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparse_adv import demo
from sparse_adv.argument_types import check_count
from sparse_adv.commands.options import AFTER_A_STOP
from sparse_adv.commands.out_folder import check_folder
from sparse_adv.memory import keep_freed_memory
from sparse_adv.training import distributed


@dataclass(frozen=True)
class Options:
    """Search a ticket on real digits, train it and its controls, compare.

    Searches a ticket on scikit-learn's digits, then trains the ticket, the same mask with fresh weights and the dense
    network with PGD-10 at eps 0.2; writes a run folder for each and a report of tables and plots. 3 minutes on two
    cores.

    Args:
        out: folder for the runs and the report.
        epochs: epochs of adversarial training, for each run, at least 1.
        search_epochs: epochs of the search, at least 1.
        density: fraction of the weights that the ticket keeps.
        block: block shape of the mask, BO,BI or BO,BI,BR,BS.
        seed: seed of split, weights, order of images and attacks.
    """

    out: Path = Path("runs/demo")
    epochs: int = demo.TRAINING.epochs
    search_epochs: int = demo.SEARCH.epochs
    density: float = 0.1
    block: tuple[int, ...] = (1, 1)
    seed: int = 0

    after_a_stop = AFTER_A_STOP

    def __post_init__(self) -> None:
        check_count("--epochs", self.epochs, least=1)
        check_count("--search-epochs", self.search_epochs, least=1)


def run(options: Options) -> int:
    if distributed.launched_processes() > 1:
        raise ValueError(f"demo runs in one process, got {distributed.launched_processes()}")
    check_folder(options.out)
    keep_freed_memory()
    print(
        demo.run(
            options.out,
            epochs=options.epochs,
            search_epochs=options.search_epochs,
            density=options.density,
            block=options.block,
            seed=options.seed,
        )
    )
    return 0
