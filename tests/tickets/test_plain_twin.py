"""A ticket search is a plain loop of training, pruning and rewinding: the same masks, weights, records and costs."""

import copy
from dataclasses import replace

import pytest
from helpers.small_runs import VALIDATION, WITH_ENGINE, batches, equal_states, network

from sparse_adv import masks, runs, tickets, training
from sparse_adv.nn import densify, sparsify
from sparse_adv.runs import Cost
from sparse_adv.tickets import PruneConfig

CONFIG = replace(WITH_ENGINE, objective="fgsm-rs", epochs=2, lr=0.05, schedule="cosine", seed=3)
SHAPE = (1, 1, 6, 6)
BLOCKS = {"density": 0.2, "block": (2, 2), "scope": "uniform", "score": "magnitude", "linear": False}


def twin(pruning: PruneConfig):
    """Masks and weights of the ticket, for each epoch its record and the distance of its mask, and scores retained."""
    model = network(channels=8)
    initial = begin = copy.deepcopy(model.state_dict())
    kept, epochs, retained = {}, [], None
    how = {"scope": pruning.scope, "score": pruning.score, "linear": pruning.linear}
    for number in range(1, pruning.rounds + 1):
        density = pruning.density ** (number / pruning.rounds)
        seen, drawn = {}, []
        model.load_state_dict(initial if number == 1 else begin)
        sparsify(model, kept).train()

        def after_epoch(record, number=number, density=density, drawn=drawn):
            mask = masks.prune(model, density, pruning.block, **how)
            distance = max((masks.distance(mask, other) for other in drawn[-5:]), default=1.0)
            drawn.append(mask)
            epochs.append((number, record, distance))

        def after_update(step, seen=seen):
            seen[step] = copy.deepcopy(model.state_dict())

        options = {"validation": VALIDATION, "on_epoch": after_epoch, "on_step": after_update}
        training.train(model, batches(), CONFIG, **options)
        if number == 1 and pruning.rewind_step:
            begin = seen[pruning.rewind_step]
        if number == 1 and pruning.permute_channels:
            order = masks.permute_channels(model, pruning.density, pruning.block, SHAPE, **how)
            order.apply(model)
            retained = order.retained
            begin = order.permute_state_dict(begin)
        kept = masks.prune(model, density, pruning.block, **how)
        densify(model)
    return kept, begin, epochs, retained


@pytest.mark.parametrize(
    "pruning",
    [
        {"density": 0.3, "rounds": 2, "early_stop_distance": 0.0},
        {"density": 0.3, "rounds": 2, "rewind_step": 4},
        {**BLOCKS, "rounds": 3, "permute_channels": True},
        {**BLOCKS, "rounds": 2, "permute_channels": True, "rewind_step": 2},
    ],
    ids=str,
)
def test_a_search_in_rounds_is_a_plain_loop(tmp_path, pruning):
    pruning = PruneConfig(**pruning)
    kept, begin, epochs, retained = twin(pruning)
    ticket = tickets.search(
        network(channels=8), batches(), CONFIG, pruning, validation=VALIDATION, folder=tmp_path, metadata={"arch": "a"}
    )
    assert equal_states(ticket.masks, kept) and equal_states(ticket.state_dict, begin)
    assert ticket.provenance["arch"] == "a"
    record = tickets.record_of(ticket)
    assert record.epochs == runs.read(tmp_path).records and len(record.epochs) == len(epochs)
    before = Cost()
    for count, (found, (number, plain, distance)) in enumerate(zip(record.epochs, epochs, strict=True), 1):
        expected = replace(
            plain,
            epoch=count,
            round=number,
            mask_distance=None if pruning.early_stop_distance is None else distance,
            attack=replace(plain.attack, seconds=found.attack.seconds),
            update=replace(plain.update, seconds=found.update.seconds),
            evaluation=replace(plain.evaluation, seconds=found.evaluation.seconds),
            total=found.total,
        )
        assert found == expected
        spent = found.attack + found.update
        assert found.total.macs == before.macs + spent.macs
        assert found.total.seconds >= before.seconds + spent.seconds - 1e-9
        before = found.total
    assert record.cost.macs == before.macs and record.cost.seconds > before.seconds
    assert record.checks.reset and record.checks.nested and record.checks.pruned_weights_zero
    assert record.checks.retained == retained and (retained is None or retained[0] < retained[1])
    assert record.checks.weights_requested == round(pruning.density * record.checks.weights)
    assert record.checks.weights == sum(mask.numel() for mask in kept.values())
    assert record.checks.weights_kept == sum(int(mask.count_nonzero()) for mask in kept.values())
