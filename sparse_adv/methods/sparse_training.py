"""`SparseTraining`: the update hook that changes the masks of a model while `training.train` trains it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from sparse_adv.argument_types import checks_types
from sparse_adv.config import MethodConfig, TrainConfig
from sparse_adv.masks import density
from sparse_adv.masks.allocation import targets_of
from sparse_adv.masks.blocks import block_sizes, block_sums, conv_shape
from sparse_adv.masks.dependency_graph import check_traceable, dependency_groups
from sparse_adv.masks.layers import listed, naming, owners
from sparse_adv.methods import selection
from sparse_adv.methods.adaptation import Adaptation
from sparse_adv.methods.permutation import permute_before_pruning
from sparse_adv.methods.schedule import Schedule
from sparse_adv.methods.start import check_method, start
from sparse_adv.nn import revive_dead_channels, sparsify
from sparse_adv.nn.masked_layer import masked_layers
from sparse_adv.ops.masked_conv2d_mask import block_grid, check_block, check_obeys, expand_blocks
from sparse_adv.runs import EpochRecord
from sparse_adv.training import distributed
from sparse_adv.training.hook import UpdateHook
from sparse_adv.training.random_numbers import Stream, generator
from sparse_adv.training.update import Updater

LARGEST_MISS = 0.1
"""Masks may miss their density by this fraction of it without a warning."""

log = logging.getLogger(__name__)


class SparseTraining(UpdateHook):
    """Makes a model sparse before its first update, and changes the masks as a method says.

    A change drops the kept blocks of smallest magnitude, the mean |w| over the block, and grows as many pruned ones:
    those with the largest mean |dL/dw| on the adversarial images of the update before, or random ones. Blocks are
    ranked within a layer, or with scope "global" over all layers. If the block does not divide a layer, the layer's
    last blocks are smaller, so its number of kept weights may change a little. gmp only drops; it counts weights, not
    blocks.

    Where a mask newly prunes, weight, momentum and moving average become 0; where it newly keeps, they start at 0. A
    block that a change drops and grows again keeps them. The gradients of pruned weights are computed only in the one
    update before a change that grows by gradient.

    flying-bird-plus is Flying Bird for the fraction `adapt_from` of the updates; after that, `methods.Adaptation`
    decides how many blocks a change drops and grows. At least one block is kept, and a layer that has become dense
    stays dense.

    With `permute_channels` the channels are permuted once, before the first pruning of dense weights (gmp,
    `dense_epochs`), with their BatchNorm, momentum and moving average, see `masks.permute_channels`.

    A model that already has masks, such as the network of a ticket, starts from those, whatever density is configured;
    its other layers stay dense. `tickets.restore` keeps BatchNorm channels at 0 if their filter has no weight; these
    are trained again if the method may grow weights there.

    Args:
        config: of the method.

    Raises:
        ValueError: if the configuration has no method; in `training.train`, if masks of the model disobey the block,
            flying-bird-plus has no validation images or an objective without attack, `dense_epochs` are all epochs, or
            channels are to be permuted in a model that has masks or that torch.fx cannot trace.

    Source: Chen et al., "Sparsity winning twice" (ICLR 2022), section 3 (Flying Bird, Flying Bird+); Evci et al.,
    "Rigging the lottery" (ICML 2020), section 3 (RigL); Mocanu et al., "Scalable training of artificial neural networks
    with adaptive sparse connectivity" (Nature Communications 2018; SET); Zhu and Gupta, "To prune, or not to prune"
    (arXiv 1710.01878; gmp). There, blocks are single weights.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from sparse_adv import data, training
        >>> images = data.Split(torch.rand(8, 1, 4, 4), torch.arange(8) % 2)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> method = SparseTraining(MethodConfig("rigl", density=0.25, interval=2))
        >>> config = training.TrainConfig("fgsm-rs", epochs=4, eps=0.1)
        >>> records = training.train(model, data.Batches(images, 4), config, hook=method)
        >>> round(records[-1].density.weights, 2), method.changes
        (0.25, 2)
    """

    reads_gradients = False
    config: MethodConfig
    schedule: Schedule

    @checks_types
    def __init__(self, config: MethodConfig) -> None:
        check_method(config)
        self.config, self.block = config, check_block(config.block)
        self.wants_robust_loss = config.method == "flying-bird-plus"
        self._reset()

    def _reset(self) -> None:
        self.step = 0
        """Updates so far."""
        self.changes = 0
        """Changes of the masks so far."""
        self.adaptation = Adaptation() if self.wants_robust_loss else None
        self.retained: tuple[float, float] | None = None
        """Fraction of the squared weights in kept blocks, before and after channels were permuted; None if they were
        not."""

    def check_training(self, config: TrainConfig) -> None:
        """Raise ValueError if the method needs an attack and the objective has none, or a run would end dense."""
        if self.wants_robust_loss and config.objective == "natural":
            raise ValueError("objective must have an attack for method 'flying-bird-plus', got 'natural'")
        if self.config.dense_epochs >= config.epochs:
            raise ValueError(
                f"dense_epochs must be less than the {config.epochs} epochs of the run, so that the pruned network is "
                f"trained, got {self.config.dense_epochs:g}"
            )

    def begin(self, updater: Updater) -> None:
        self.check_training(updater.config)
        self._reset()
        self.updater, self.model = updater, updater.model
        if self.config.permute_channels:
            check_traceable(self.model)
        self.chose_masks = not masked_layers(self.model)
        """Whether this method made the first masks; False if they are a ticket's."""
        if self.chose_masks:
            start(self.model, self.config, updater.config.seed)
        elif "growth" not in self.config.without_effect():
            revive_dead_channels(self.model)
        self.layers = masked_layers(self.model)
        for name, layer in self.layers.items():
            with naming(name):
                check_obeys(layer.weight_mask, self.block)
        self.owner = owners(self.layers)
        """The owner of each layer's weight: the first layer with the same weight; only owners are ranked."""
        self.shapes = {name: self.layers[name].weight.shape for name in dict.fromkeys(self.owner.values())}
        self.schedule = Schedule(self.config, updater.config.epochs, updater.steps_per_epoch)
        self._warn_of_no_change(updater.config.epochs * updater.steps_per_epoch)
        self.is_pruned = not self.schedule.pruned
        """Whether the last pruning is done. An extended run may have pruned before its new schedule says so."""
        if self.is_pruned:
            self._warn_of_density()

    def wants_dense_gradients(self, step: int) -> bool:
        if self.config.resolved().growth != "gradient" or self._prunes(step + 1):
            return False
        return self.schedule.is_due(self.step, step + 1)

    def after_update(self, step: int, gradients: Mapping[str, Tensor]) -> bool:
        before, self.step = self.step, step
        if before == 0 and self.config.permute_channels:  # refuse now, not epochs later
            assert self.updater.image_shape is not None
            if not all(bool(mask.all()) for mask in self.masks().values()):
                raise ValueError("permute_channels needs a model without masks, got one that has masks")
            dependency_groups(self.model, self.updater.image_shape)
        if not self.schedule.is_due(before, step):
            return False
        prunes = self._prunes(step, before)
        if prunes and self.config.permute_channels and self.retained is None:
            self.retained = permute_before_pruning(self.updater, self.config)
        grids = {name: self._grid(self.layers[name].weight_mask) for name in self.shapes}
        magnitudes = {name: self._means(self.layers[name].weight) for name in self.shapes}
        if prunes:
            new = selection.prune(grids, magnitudes, self._sizes(), self._targets(step))
            empty = [name for name, grid in new.items() if not grid.any()]
            if empty and self.config.density > 0:
                log.warning("%s keeps no weight of %s, whose output is constant", self.config.method, listed(empty))
        else:
            new = selection.drop_and_grow(
                grids,
                magnitudes,
                lambda: self._growth_scores(grids, gradients, step),
                list(self._targets(step)),
                self.schedule.drop_fraction(step),
                *self._more(step),
            )
        if new:
            distributed.broadcast([grid.view(torch.uint8) for grid in new.values()])
            self._apply(new)
            self.changes += 1
        if before < self.schedule.pruned <= step:
            self.is_pruned = True
            self._warn_of_density()
        return bool(new)

    def may_be_result(self) -> bool:
        return self.is_pruned

    def after_epoch(self, record: EpochRecord) -> None:
        if self.adaptation is not None:
            self.adaptation.observe(record)

    def masks(self) -> dict[str, Tensor]:
        """Return the present masks by module name."""
        return {name: layer.weight_mask for name, layer in self.layers.items()}

    def state_dict(self) -> dict[str, Any]:
        names = "step", "changes", "retained", "is_pruned"
        own = {"method": asdict(self.config), **{name: getattr(self, name) for name in names}}
        return own if self.adaptation is None else own | {"adaptation": self.adaptation.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["method"] != asdict(self.config):
            raise ValueError("the state is that of a run with another method: take another folder, or delete it")
        self.step, self.changes, self.retained = state["step"], state["changes"], state["retained"]
        self.is_pruned = state["is_pruned"]
        if self.adaptation is not None:
            self.adaptation.load_state_dict(state["adaptation"])

    def _warn_of_no_change(self, updates: int) -> None:
        """Log a warning if the masks will never change in a run of this many updates, although the method should change
        them."""
        first, last = self.schedule.first, self.schedule.last
        if self.config.method in ("static", "gmp") or self.schedule.is_due(first, updates):
            return
        between = max(0, last - first - 1)
        log.warning(
            "%s will keep its first masks, as static does: they may change in %d of the %d updates, interval is %d; %s",
            self.config.method,
            between,
            updates,
            self.config.interval,
            "lower interval" if between or self.config.interval >= updates else "raise change_until",
        )

    def _warn_of_density(self) -> None:
        """Log a warning if the masks keep far more or fewer weights than the configuration asks for."""
        asked, got = self.config.density, density(self.masks(), self.model)
        if self.chose_masks and abs(got - asked) > LARGEST_MISS * asked:
            log.warning(
                "%s keeps %.3g of the weights, density asks for %.3g: layers have few blocks of %s, take smaller ones",
                self.config.method,
                got,
                asked,
                ",".join(map(str, self.config.block)),
            )

    def _prunes(self, step: int, before: int | None = None) -> bool:
        """Whether a change after this update only drops blocks."""
        before = self.step if before is None else before
        return self.config.method == "gmp" or before < self.schedule.first <= step

    def _more(self, step: int) -> tuple[float, float]:
        """Additional blocks that a change after this update drops and grows, as fractions of those it replaces."""
        if self.adaptation is None or not self.schedule.adapts(step):
            return 0.0, 0.0
        return self.adaptation.more_dropped, self.adaptation.more_grown

    def _targets(self, step: int) -> dict[tuple[str, ...], int]:
        """The number of weights that a pruning keeps, for each set of layers that is ranked together."""
        scope = self.config.resolved().scope
        assert scope is not None
        return targets_of(self.shapes, self.schedule.density(step), scope)

    def _sizes(self) -> dict[str, Tensor]:
        """The number of weights of each block."""
        return {
            name: block_sizes(conv_shape(shape), self.block).to(self.layers[name].weight.device)
            for name, shape in self.shapes.items()
        }

    def _growth_scores(
        self, grids: Mapping[str, Tensor], gradients: Mapping[str, Tensor], step: int
    ) -> dict[str, Tensor]:
        if self.config.resolved().growth == "random":
            random = generator(self.updater.config.seed, Stream.GROWTH, step)
            return {
                name: torch.rand(grid.shape, generator=random, device="cpu").to(grid.device)
                for name, grid in grids.items()
            }
        total: dict[str, Tensor] = {}
        for name, owner in self.owner.items():
            # A weight without a gradient was not used in the update, or is frozen.
            own = gradients.get(name, torch.zeros_like(self.layers[name].weight))
            total[owner] = total[owner] + own if owner in total else own.contiguous()
        distributed.average_each(list(total.values()))
        return {name: self._means(gradient) for name, gradient in total.items()}

    def _apply(self, new: Mapping[str, Tensor]) -> None:
        masks = {}
        for name, owner in self.owner.items():
            if owner in new:
                shape = self.layers[name].weight.shape
                masks[name] = expand_blocks(new[owner], self.block, conv_shape(shape)).reshape(shape)
        sparsify(self.model, masks, self.block, self.updater.optimizer)
        if self.updater.ema is not None:
            averages = masked_layers(self.updater.ema.module)
            for name, mask in masks.items():
                averages[name].set_mask(mask)

    def _grid(self, mask: Tensor) -> Tensor:
        return block_grid(mask.reshape(conv_shape(mask.shape)), self.block).clone()

    def _means(self, values: Tensor) -> Tensor:
        """The mean of absolute values over each block. With sums, the smaller blocks at an edge would always lose."""
        values = values.detach().abs().reshape(conv_shape(values.shape))
        sums = block_sums(values, self.block)
        return sums / block_sizes(values.shape, self.block).to(sums.device)
