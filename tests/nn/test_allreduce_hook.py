"""The masked all-reduce hook on two processes: gradients equal those of plain DistributedDataParallel."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers.process_group import PROCESSES, results_by_rank
from helpers.tolerances import assert_close, assert_equal
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from sparse_adv.masks import prune
from sparse_adv.nn import MaskedConv2d, register_masked_allreduce_hook, sparsify
from sparse_adv.training import TrainConfig, train

BATCH = 4
PROBLEM = "the processes have different masks for '2.weight'; give all of them the same"


class LooselyMasked(nn.Linear):
    """Has a mask, but computes gradients of pruned weights too."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.register_buffer("weight_mask", torch.rand(outputs, inputs) < 0.25)


def network(density=0.1, last=nn.Linear):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        last(64, 10),
    )
    if density == 1:
        return model
    masks = prune(model, density, scope="uniform")
    return sparsify(model, {name: masks[name] for name in ("0", "2")}, block=(1, 1))


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(PROCESSES * BATCH, 3, 6, 6, generator=generator).to(dtype)
    return images, torch.randint(10, (PROCESSES * BATCH,), generator=generator)


def gradients(model, step, rows=slice(None)):
    model.zero_grad()
    images, labels = (tensor[rows] for tensor in batch(step, next(model.parameters()).dtype))
    F.cross_entropy(model(images).float(), labels).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def counts(stats):
    return [stats.steps, stats.bytes_sent, stats.bytes_dense]


def other_masks(model):
    """Masks with one more weight kept in each layer than it has."""
    masks = {n: m.weight_mask.clone() for n, m in model.named_modules() if isinstance(m, MaskedConv2d)}
    for mask in masks.values():
        mask.flatten()[(~mask.flatten()).nonzero()[0]] = True
    return masks


def averages(rank, make, **ddp):
    """Gradients of three steps with the hook, and with plain DistributedDataParallel."""
    own = slice(rank * BATCH, (rank + 1) * BATCH)
    ours, plain = (DistributedDataParallel(make(), **ddp) for _ in range(2))
    stats = register_masked_allreduce_hook(ours)
    return {
        "ours": [gradients(ours, step, own) for step in range(3)],
        "plain": [gradients(plain, step, own) for step in range(3)],
        "buckets": len(ours.reducer._get_zeros_like_grad_buckets()),
        "counts": counts(stats),
    }


def masks_that_change(rank):
    """Gradients before, after new masks in the same layers, and after layers became masked."""
    own = slice(rank * BATCH, (rank + 1) * BATCH)
    model = network()
    ours = DistributedDataParallel(model)
    stats = register_masked_allreduce_hook(ours)
    steps = [gradients(ours, 0, own)]
    sparsify(model, other_masks(model))
    steps.append(gradients(ours, 1, own))
    after_two = counts(stats)
    torch.manual_seed(1)
    model[6].register_buffer("weight_mask", torch.rand(10, 64) < 0.5)
    steps.append(gradients(ours, 2, own))
    return {"ours": steps, "counts": [after_two, counts(stats)], "mask": model[6].weight_mask}


def masks_that_differ(rank, changed_on):
    """The error if one process has another mask than the other, from the second step on."""
    model = network()
    ours = DistributedDataParallel(model)
    register_masked_allreduce_hook(ours)
    gradients(ours, 0)
    if rank == changed_on:
        sparsify(model, {"2": other_masks(model)["2"]})
    try:
        gradients(ours, 1)
    except ValueError as error:
        return str(error)


def plain_with_masks_that_differ(rank, wrapped_first):
    """The first pass of DistributedDataParallel without the hook, where each process has pruned for itself."""
    model = network(density=1)
    ours = DistributedDataParallel(model) if wrapped_first else None
    masks = {n: m.weight_mask for n, m in network().named_modules() if isinstance(m, MaskedConv2d)}
    sparsify(model, other_masks(network()) if rank == 1 else masks)
    try:
        (ours or DistributedDataParallel(model))(batch(0)[0])
    except ValueError as error:
        return str(error)


def passes_of_one_process(rank):
    """Whether rank 0 alone can run the model without gradients, and without exchanging them, before the first step."""
    ours = DistributedDataParallel(network())
    if rank == 0:
        with torch.no_grad():
            ours(batch(0)[0])
        with ours.no_sync():
            ours(batch(0)[0])
    dist.barrier()
    return [gradients(ours, 0), gradients(network(), 0)]


def a_mask_on_one_process_only(rank):
    ours = DistributedDataParallel(network(0.1 if rank else 1))
    try:
        register_masked_allreduce_hook(ours)
    except ValueError as error:
        return str(error)


def training_with_a_mask_on_one_process_only(rank):
    images, labels = batch(0)
    own = [(images[rank::PROCESSES], labels[rank::PROCESSES])]
    try:
        train(network(1 if rank else 0.1), own, TrainConfig("natural", epochs=1, lr=0.01))
    except ValueError as error:
        return str(error)


def a_second_hook(rank):
    ours = DistributedDataParallel(network())
    register_masked_allreduce_hook(ours)
    try:
        register_masked_allreduce_hook(ours)
    except ValueError as error:
        return str(error)


def accumulated(rank):
    """Two half batches, the first under `no_sync`."""
    ours = DistributedDataParallel(network())
    stats = register_masked_allreduce_hook(ours)
    images, labels = batch(0)
    for half in range(2):
        rows = slice((2 * rank + half) * BATCH // 2, (2 * rank + half + 1) * BATCH // 2)
        ours.require_backward_grad_sync = half == 1
        (F.cross_entropy(ours(images[rows]), labels[rows]) / 2).backward()
    return {"ours": [parameter.grad for parameter in ours.parameters()], "counts": counts(stats)}


AVERAGES = {
    "as it comes": partial(averages, make=network),
    "views of buckets": partial(averages, make=network, gradient_as_bucket_view=True),
    "many buckets": partial(averages, make=network, bucket_cap_mb=0.001),
    "many views": partial(averages, make=network, bucket_cap_mb=0.001, gradient_as_bucket_view=True),
    "unused parameters": partial(averages, make=network, find_unused_parameters=True),
    "bfloat16": partial(averages, make=lambda: network().to(torch.bfloat16)),
    "channels_last": partial(averages, make=lambda: network().to(memory_format=torch.channels_last)),
    "dense": partial(averages, make=partial(network, density=1)),
    "nothing kept": partial(averages, make=partial(network, density=0.0)),
}
SCENARIOS = {
    **AVERAGES,
    "loose": partial(averages, make=partial(network, last=LooselyMasked)),
    "changing": masks_that_change,
    "differing, rank 0": partial(masks_that_differ, changed_on=0),
    "differing, rank 1": partial(masks_that_differ, changed_on=1),
    "differing without the hook": partial(plain_with_masks_that_differ, wrapped_first=False),
    "differing without the hook, wrapped first": partial(plain_with_masks_that_differ, wrapped_first=True),
    "passes of one process": passes_of_one_process,
    "mask on one process": a_mask_on_one_process_only,
    "training, mask on one process": training_with_a_mask_on_one_process_only,
    "second hook": a_second_hook,
    "accumulated": accumulated,
}


def work(rank, folder):
    return {name: scenario(rank) for name, scenario in SCENARIOS.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of the processes, by rank; the processes are started once, for all scenarios."""
    return results_by_rank(work, tmp_path_factory.mktemp("two"))


def of(results, scenario):
    return [of_rank[scenario] for of_rank in results]


def kept_bytes(model):
    """Bytes of gradients in one step: of kept weights, and of all."""
    masks = {m.weight: m.weight_mask for m in model.modules() if hasattr(m, "weight_mask")}
    kept = sum(int(masks[p].count_nonzero()) if p in masks else p.numel() for p in model.parameters())
    return 4 * kept, 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("scenario", AVERAGES)
def test_averages_equal_those_of_plain_ddp(results, scenario):
    for result in of(results, scenario):
        for ours, plain in zip(result["ours"], result["plain"], strict=True):
            for actual, expected in zip(ours, plain, strict=True):
                assert_equal(actual, expected)


def test_averages_equal_those_of_the_whole_batch_in_one_process(results):
    model = network()
    for result in of(results, "as it comes"):
        for step, ours in enumerate(result["ours"]):
            for actual, expected in zip(ours, gradients(model, step), strict=True):
                assert_close(actual, expected)


@pytest.mark.parametrize("scenario", ["many buckets", "many views"])
def test_small_buckets_are_more_than_one(results, scenario):
    assert all(result["buckets"] > 1 for result in of(results, scenario))


@pytest.mark.parametrize(("scenario", "density"), [("as it comes", 0.1), ("many views", 0.1), ("nothing kept", 0.0)])
def test_only_gradients_of_kept_weights_are_sent(results, scenario, density):
    sent, dense = kept_bytes(network(density))
    assert [result["counts"] for result in of(results, scenario)] == [[3, 3 * sent, 3 * dense]] * PROCESSES


def test_at_a_tenth_of_the_weights_a_tenth_of_their_bytes_is_sent():
    model = network(0.1)
    masked = 4 * (model[0].weight.numel() + model[2].weight.numel())
    sent, dense = kept_bytes(model)
    assert (sent - (dense - masked)) / masked == pytest.approx(0.1, abs=1e-3)


def test_bfloat16_sends_half_the_bytes(results):
    sent, dense = kept_bytes(network())
    assert of(results, "bfloat16")[0]["counts"] == [3, 3 * sent // 2, 3 * dense // 2]


def test_a_dense_model_sends_everything(results):
    _, dense = kept_bytes(network(1))
    assert of(results, "dense")[0]["counts"] == [3, 3 * dense, 3 * dense]


def test_gradients_of_pruned_weights_become_zero_even_if_the_layer_computes_them(results):
    mask = network(last=LooselyMasked)[6].weight_mask
    for result in of(results, "loose"):
        for ours, plain in zip(result["ours"], result["plain"], strict=True):
            assert plain[3][~mask].any()
            assert_equal(ours[3], plain[3] * mask)


def test_masks_may_change_between_steps(results):
    model = network()
    expected = [gradients(model, 0)]
    bytes_before, dense = kept_bytes(model)
    sparsify(model, other_masks(model))
    expected += [gradients(model, step) for step in (1, 2)]
    bytes_after, _ = kept_bytes(model)
    assert bytes_after == bytes_before + 8  # one weight in each of two layers
    for result in of(results, "changing"):
        model[6].register_buffer("weight_mask", result["mask"])
        bytes_last, _ = kept_bytes(model)
        assert result["counts"][0] == [2, bytes_before + bytes_after, 2 * dense]
        assert result["counts"][1] == [3, bytes_before + bytes_after + bytes_last, 3 * dense]
        expected[2][3] *= result["mask"]
        for ours, wanted in zip(result["ours"], expected, strict=True):
            for actual, value in zip(ours, wanted, strict=True):
                assert_close(actual, value)


@pytest.mark.parametrize("changed_on", range(PROCESSES))
def test_masks_that_differ_are_refused_on_every_process(results, changed_on):
    assert of(results, f"differing, rank {changed_on}") == [PROBLEM] * PROCESSES


@pytest.mark.parametrize("wrapped", ["", ", wrapped first"])
def test_masks_that_differ_are_refused_in_the_first_pass_without_the_hook(results, wrapped):
    assert (
        of(results, f"differing without the hook{wrapped}") == [PROBLEM.replace("'2.weight'", "'0.weight'")] * PROCESSES
    )


def test_a_process_may_run_a_wrapped_model_alone_before_training(results):
    for ours, expected in of(results, "passes of one process"):
        for actual, value in zip(ours, expected, strict=True):
            assert_close(actual, value)


@pytest.mark.parametrize("scenario", ["mask on one process", "training, mask on one process"])
def test_a_process_whose_model_is_dense_is_told_like_the_others(results, scenario):
    assert of(results, scenario) == [PROBLEM.replace("'2.weight'", "'0.weight'")] * PROCESSES


def test_a_second_hook_is_refused(results):
    assert set(of(results, "second hook")) == {
        "model has a communication hook already, and DistributedDataParallel takes one"
    }


def test_steps_under_no_sync_send_nothing(results):
    sent, dense = kept_bytes(network())
    expected = gradients(network(), 0)
    for result in of(results, "accumulated"):
        assert result["counts"] == [1, sent, dense]
        for actual, value in zip(result["ours"], expected, strict=True):
            assert_close(actual, value)


def test_a_model_without_ddp_is_refused():
    with pytest.raises(TypeError, match="model must be wrapped in DistributedDataParallel, got Sequential"):
        register_masked_allreduce_hook(network())
