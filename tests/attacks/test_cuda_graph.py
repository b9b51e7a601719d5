"""Attacks as CUDA graphs: a replay computes what the loop computes, bit for bit.

Most tests capture on the CPU (helpers/cpu_graphs.py); those at the end need a GPU.
"""

import copy
import gc
import pickle
import warnings
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from helpers.attacked import batch, make_model
from helpers.cpu_graphs import CpuCapturer, CpuGraphs
from helpers.tolerances import assert_equal
from torch import Tensor, nn

from sparse_adv import attacks, masks, sparsify
from sparse_adv.attacks import PGD, Graphs, fgsm, fgsm_rs, n_fgsm, pgd, tpgd
from sparse_adv.nn import frozen_weights
from sparse_adv.ops.cuda_graph import Capturer

OPTIONS = {"steps": 2, "eps": 0.1, "alpha": 0.04}
ATTACKS = {
    "pgd": lambda *args, **options: pgd(*args, **OPTIONS, **options),
    "no_start": lambda *args, **options: pgd(*args, random_start=False, **OPTIONS, **options),
    "l2": lambda *args, **options: pgd(*args, norm="l2", **OPTIONS, **options),
    "restarts": lambda *args, **options: pgd(*args, restarts=3, **OPTIONS, **options),
    "targeted": lambda *args, **options: pgd(*args, targeted=True, **OPTIONS, **options),
    "fgsm": fgsm,
    "fgsm_rs": fgsm_rs,
    "n_fgsm": n_fgsm,
    "tpgd": lambda model, images, labels, **options: tpgd(model, images, **OPTIONS, **options),
}


@pytest.fixture
def model() -> nn.Sequential:
    return make_model()


def assert_graphs_change_nothing(
    model: nn.Module, graphs: Graphs, attack=ATTACKS["pgd"], seeds=range(5), size=6, device="cpu", **options
) -> None:
    """Attack the batches of these seeds with and without graphs: images and model must be equal afterwards."""
    plain, generator, other = copy.deepcopy(model), torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for seed in seeds:
        images, labels = batch(seed, size, device)
        adv = attack(model, images, labels, generator=generator, graphs=graphs, **options)
        assert_equal(adv, attack(plain, images, labels, generator=other, **options))
        assert adv.stride() == images.stride()
    for (name, value), expected in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert value.equal(expected), name


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_replay_computes_what_the_loop_computes(model, attack, sparse):
    if sparse:
        sparsify(model, masks.prune(model, density=0.5))
    graphs = CpuGraphs()
    assert_graphs_change_nothing(model.train(), graphs, ATTACKS[attack])
    assert graphs.counts == (1, 3)


@pytest.mark.parametrize("mode", attacks.BN_MODES)
def test_running_statistics_are_updated_once_per_step_in_train_mode_only(model, mode):
    assert_graphs_change_nothing(model.train(), CpuGraphs(), bn_mode=mode)
    assert model[1].num_batches_tracked == 3 + (10 if mode == "train" else 0)


def test_a_replay_uses_the_current_weights(model):
    sparsify(model, masks.prune(model, density=0.5))
    graphs = CpuGraphs()
    for step in range(5):
        assert_graphs_change_nothing(model, graphs, seeds=[step])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    assert graphs.counts == (1, 3)


def test_a_replay_casts_the_current_weights_under_autocast(model):
    graphs = CpuGraphs()
    for step in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            assert_graphs_change_nothing(model, graphs, seeds=[step])
            images, labels = batch(step)
            # Autocast caches casts: none may come from a capture, in which nothing is computed.
            assert F.cross_entropy(model.eval()(images), labels).isfinite()
        with torch.no_grad():
            model[0].weight.mul_(1.5)
    assert graphs.counts == (1, 2)
    assert_graphs_change_nothing(model, graphs)  # without autocast another graph is captured
    assert graphs.counts == (2, 5)


def test_a_new_mask_gets_a_new_graph(model):
    sparsify(model, masks.prune(model, density=0.5))
    graphs = CpuGraphs()
    assert_graphs_change_nothing(model, graphs)
    model[0].set_mask(masks.prune(model, density=0.2)["0"])
    assert_graphs_change_nothing(model, graphs)
    model[0].weight_mask.copy_(torch.rand(model[0].weight.shape) < 0.5)  # as load_state_dict does
    assert_graphs_change_nothing(model, graphs, seeds=range(8))
    assert graphs.counts[0] == 3


def test_weights_with_a_new_address_or_layout_get_a_new_graph(model):
    graphs = CpuGraphs()
    assert_graphs_change_nothing(model, graphs)
    model[0].weight = nn.Parameter(model[0].weight.detach() * 2)
    assert_graphs_change_nothing(model, graphs)
    model.to(memory_format=torch.channels_last)
    assert_graphs_change_nothing(model, graphs)
    assert graphs.counts == (3, 9)


def test_each_batch_shape_and_each_option_has_its_own_graph(model):
    graphs = CpuGraphs()
    for round in range(3):
        for size in (6, 2):
            assert_graphs_change_nothing(model, graphs, seeds=[round], size=size)
        assert_graphs_change_nothing(model, graphs, seeds=[round], bn_mode="batch")
        assert_graphs_change_nothing(model, graphs, fgsm, seeds=[round])
        assert_graphs_change_nothing(model, graphs, fgsm, seeds=[round], eps=0.2)
    assert graphs.counts == (5, 5)


def test_channels_last_images_give_channels_last_results(model):
    graphs = CpuGraphs()
    for number in range(4):
        images, labels = batch(number)
        images = images.to(memory_format=torch.channels_last)
        adv = pgd(model, images, labels, graphs=graphs, generator=torch.Generator().manual_seed(2))
        assert adv.is_contiguous(memory_format=torch.channels_last)
        assert_equal(adv, pgd(model, images, labels, generator=torch.Generator().manual_seed(2)))


def test_the_least_recently_used_graph_is_deleted_beyond_the_capacity(model):
    graphs = CpuGraphs(capacity=2)
    for size in (1, 2, 3):
        assert_graphs_change_nothing(model, graphs, size=size)
    assert len(graphs.cache.calls) == 2 and graphs.counts == (3, 9)
    assert_graphs_change_nothing(model, graphs, size=3)
    assert graphs.counts == (3, 14)
    assert_graphs_change_nothing(model, graphs, size=1)  # captured again; the least recently used graph is deleted
    assert_graphs_change_nothing(model, graphs, size=3)
    assert graphs.counts == (4, 22)
    with pytest.raises(ValueError, match="capacity must be an integer of at least 1, got 0"):
        Graphs(0)


def test_two_replays_draw_different_numbers_and_a_reset_generator_repeats_them(model):
    graphs, (images, labels) = CpuGraphs(), batch(0)
    attack = PGD(model, generator=torch.Generator().manual_seed(4), graphs=graphs)
    first = [attack(images, labels) for _ in range(3)]
    (call,) = graphs.cache.calls.values()
    replays = [call.replays["attack"]().clone() for _ in range(2)]
    assert not replays[0].equal(replays[1]) and not replays[0].equal(first[2])
    attack.options.generator.manual_seed(4)
    assert all(attack(images, labels).equal(adv) for adv in first)


@pytest.mark.parametrize("graphs", [None, CpuGraphs()])
def test_key_and_offset_may_be_given_in_place_of_a_generator_and_are_not_changed(model, graphs):
    state, other = torch.tensor([4, 0]), torch.tensor([5, 0])
    images, labels = batch(0)
    first = pgd(model, images, labels, generator=state, graphs=graphs)
    assert not first.equal(pgd(model, images, labels, generator=other, graphs=graphs))
    assert all(first.equal(pgd(model, images, labels, generator=state, graphs=graphs)) for _ in range(3))
    assert state.tolist() == [4, 0]


def test_a_result_is_not_overwritten_by_later_replays(model):
    graphs, results = CpuGraphs(), []
    for number in range(5):
        images, labels = batch(number)
        adv = pgd(model, images, labels, graphs=graphs)
        results.append((adv, adv.clone()))
        assert adv.data_ptr() != images.data_ptr() and not adv.requires_grad
    assert all(adv.equal(copied) for adv, copied in results)
    results[-1][0].zero_()
    assert_graphs_change_nothing(model, graphs)


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_graphs_work_in_no_grad_and_inference_mode(model, grad_mode):
    graphs, draws = CpuGraphs(), torch.Generator().manual_seed(1)
    with grad_mode():
        results = [ATTACKS["pgd"](model, *batch(number), generator=draws, graphs=graphs) for number in range(4)]
    draws.manual_seed(1)
    for number, adv in enumerate(results):
        assert_equal(adv, ATTACKS["pgd"](model, *batch(number), generator=draws))
        assert not adv.is_inference()
    assert graphs.counts == (1, 2)


def test_values_are_checked_before_each_replay(model):
    graphs = CpuGraphs()
    assert_graphs_change_nothing(model, graphs)
    images, labels = batch(0)
    for invalid, message in (
        ((images + 1, labels), r"images must lie in \[0, 1\]"),
        ((images, labels + 5), r"labels must lie in \[0, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ATTACKS["pgd"](model, *invalid, graphs=graphs)
    assert graphs.counts == (1, 3)
    assert_graphs_change_nothing(model, graphs)
    assert graphs.counts == (1, 8)


class Synchronising(nn.Module):
    """A model that reads a number back from the device."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :5] * (2.0 if x.sum().item() > 0 else 1.0)


def test_a_model_that_cannot_be_captured_is_attacked_step_by_step_with_one_warning(model):
    graphs, failing = CpuGraphs(), nn.Sequential(nn.BatchNorm2d(3), Synchronising())
    message = (
        r"attacks on this Sequential run step by step and not as a CUDA graph: the host reads a value that is only"
    )
    with pytest.warns(UserWarning, match=message) as warned:
        assert_graphs_change_nothing(failing.train(), graphs, bn_mode="train")
    assert len(warned) == 1 and failing.training and graphs.counts == (1, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_graphs_change_nothing(failing, graphs, bn_mode="train")
    assert graphs.counts == (1, 0)


def test_a_model_that_synchronises_in_the_warm_up_is_not_captured(model, monkeypatch):
    monkeypatch.setattr(CpuCapturer, "synchronises", True)
    graphs = CpuGraphs()
    with pytest.warns(UserWarning, match="it synchronises with the GPU"):
        assert_graphs_change_nothing(model, graphs)
    assert graphs.counts == (0, 0)


def test_a_model_that_synchronises_in_its_first_warm_up_alone_is_captured_in_the_second(model, monkeypatch):
    """The engine may check a model whose state is new to it."""
    waits = iter([True, False])
    monkeypatch.setattr(CpuCapturer, "warm_up", lambda capturer, call: (call(), next(waits)))
    graphs = CpuGraphs()
    assert_graphs_change_nothing(model, graphs)
    assert graphs.counts == (1, 2)


def test_a_capture_that_fails_makes_all_graphs_be_captured_again(model, monkeypatch):
    """It leaves them a state of the generator from which no replay can draw."""
    graphs, failing = CpuGraphs(), nn.Sequential(nn.BatchNorm2d(3), Synchronising())
    assert_graphs_change_nothing(model, graphs)
    with pytest.warns(UserWarning, match="run step by step"):
        assert_graphs_change_nothing(failing, graphs)
    assert graphs.counts == (2, 3)
    gpu = SimpleNamespace(device=SimpleNamespace(index=0))
    mocks = {"Stream": lambda device: gpu, "stream": nullcontext, "graph": lambda *args, **options: nullcontext()}
    mocks |= {"CUDAGraph": MagicMock, "graph_pool_handle": object, "default_generators": [MagicMock()]}
    for name, mock in mocks.items():
        monkeypatch.setattr(torch.cuda, name, mock)
    with pytest.raises(ZeroDivisionError):
        Capturer().capture(lambda: 1 // 0)
    (call,) = graphs.cache.calls.values()
    assert call.reason
    assert_graphs_change_nothing(failing, graphs)
    assert_graphs_change_nothing(model, graphs)
    assert graphs.counts == (3, 6)


def test_an_error_in_the_model_is_raised_unchanged(model):
    graphs, failing = CpuGraphs(), nn.Sequential(make_model(), nn.Linear(7, 7))
    for _ in range(3):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            pgd(failing, *batch(0), graphs=graphs)


def test_attacks_within_frozen_weights_are_not_captured(model):
    sparsify(model, masks.prune(model, density=0.5))
    graphs = CpuGraphs()
    with frozen_weights(model):
        assert_graphs_change_nothing(model, graphs)
    assert not graphs.cache.calls


def test_on_a_cpu_nothing_is_captured(model):
    graphs = Graphs()
    assert_graphs_change_nothing(model, graphs)
    assert not graphs.cache.calls


def test_a_copied_or_pickled_cache_is_empty(model):
    graphs = CpuGraphs(capacity=3)
    assert_graphs_change_nothing(model, graphs)
    for copied in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert copied.cache.capacity == 3 and not copied.cache.calls


def test_a_cache_is_freed_with_its_last_reference(model):
    graphs = CpuGraphs()
    assert_graphs_change_nothing(model, graphs)
    reference = weakref.ref(graphs)
    gc.disable()
    try:
        del graphs
        assert reference() is None
    finally:
        gc.enable()


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def deterministic_cudnn(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@cuda
@pytest.mark.usefixtures("deterministic_cudnn")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("attack", ATTACKS)
def test_on_a_gpu_a_replay_computes_what_the_loop_computes(model, attack, sparse, dtype):
    model = model.cuda()
    if sparse:
        sparsify(model, masks.prune(model, density=0.5))
    graphs = Graphs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                assert_graphs_change_nothing(model, graphs, ATTACKS[attack], range(2), device="cuda")
            with torch.no_grad():
                model[0].weight.mul_(1.1)
    assert all(call.replays for call in graphs.cache.calls.values())


@cuda
@pytest.mark.usefixtures("deterministic_cudnn")
@pytest.mark.parametrize("mode", attacks.BN_MODES)
def test_on_a_gpu_running_statistics_are_updated_once_per_step_in_train_mode_only(model, mode):
    assert_graphs_change_nothing(model.cuda().train(), Graphs(), bn_mode=mode, device="cuda")
    assert model[1].num_batches_tracked == 3 + (10 if mode == "train" else 0)


@cuda
def test_on_a_gpu_two_replays_draw_different_numbers(model):
    graphs, (images, labels) = Graphs(), batch(0, device="cuda")
    attack = PGD(model.cuda(), generator=torch.Generator().manual_seed(4), graphs=graphs)
    first = [attack(images, labels) for _ in range(3)]
    (call,) = graphs.cache.calls.values()
    replays = [call.replays["attack"]().clone() for _ in range(2)]
    assert not replays[0].equal(replays[1]) and not replays[0].equal(first[2])
    attack.options.generator.manual_seed(4)
    attack(images, labels), attack(images, labels)
    assert attack(images, labels).equal(first[2])


@cuda
def test_on_a_gpu_graphs_are_captured_again_after_all_were_deleted(model):
    graphs = Graphs()
    assert_graphs_change_nothing(model.cuda(), graphs, device="cuda")
    (call,) = graphs.cache.calls.values()
    in_the_pool = call.replays["attack"]()
    del call
    graphs.cache.clear()
    assert_graphs_change_nothing(model, graphs, device="cuda")
    (call,) = graphs.cache.calls.values()
    assert call.replays and not call.reason and in_the_pool.isfinite().all()


@cuda
@pytest.mark.parametrize("detected_in_warm_up", [True, False])
def test_on_a_gpu_a_model_that_cannot_be_captured_is_attacked_step_by_step_and_the_process_goes_on(
    model, detected_in_warm_up, monkeypatch
):
    if not detected_in_warm_up:  # then the capture fails half-way
        monkeypatch.setattr(Capturer, "warm_up", lambda capturer, call: (capturer.run(call), False))
    graphs, failing = Graphs(), nn.Sequential(nn.BatchNorm2d(3), Synchronising()).cuda()
    with pytest.warns(UserWarning, match="run step by step and not as a CUDA graph") as warned:
        assert_graphs_change_nothing(failing.train(), graphs, bn_mode="train", device="cuda")
    assert len(warned) == 1 and failing.training
    assert torch.rand(3, device="cuda").std() > 0  # the generator has left the capture state
    if detected_in_warm_up:
        assert_graphs_change_nothing(model.cuda(), graphs, device="cuda")
        assert [bool(call.replays) for call in graphs.cache.calls.values()] == [False, True]
