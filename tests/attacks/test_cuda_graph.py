"""Attacks as graphs: what is recorded once and replayed computes what the eager loop does, bit for bit."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.tape import CpuRecorder, TapedGraphs
from helpers.tolerances import assert_equal
from torch import Tensor, nn

from sparse_adv import attacks, masks, sparsify
from sparse_adv.attacks import PGD, TPGD, Graphs, fgsm, fgsm_rs, n_fgsm, pgd, tpgd
from sparse_adv.nn import frozen_weights

STEPS = {"steps": 2, "eps": 0.1, "alpha": 0.04}
ATTACKS = {
    "pgd": lambda *args, **options: pgd(*args, **STEPS, **options),
    "no_start": lambda *args, **options: pgd(*args, random_start=False, **STEPS, **options),
    "l2": lambda *args, **options: pgd(*args, norm="l2", **STEPS, **options),
    "restarts": lambda *args, **options: pgd(*args, restarts=3, **STEPS, **options),
    "targeted": lambda *args, **options: pgd(*args, targeted=True, **STEPS, **options),
    "fgsm": fgsm,
    "fgsm_rs": fgsm_rs,
    "n_fgsm": n_fgsm,
    "tpgd": lambda model, x, y, **options: tpgd(model, x, **STEPS, **options),
}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(8 * 9, 5),
    )
    model(torch.rand(16, 3, 8, 8) * 2)
    return model


@pytest.fixture
def model() -> nn.Sequential:
    return make_model()


def batch(number: int, size: int = 6, device: str = "cpu") -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(number)
    return torch.rand(size, 3, 8, 8, generator=draws).to(device), torch.randint(5, (size,), generator=draws).to(device)


def agree(
    model: nn.Module, graphs: Graphs, attack=ATTACKS["pgd"], numbers=range(5), size=6, device="cpu", **options
) -> None:
    """The same batches, with graphs and without, give the same images and leave the same model."""
    plain, draws, expected = copy.deepcopy(model), torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for number in numbers:
        x, y = batch(number, size, device)
        adv = attack(model, x, y, generator=draws, graphs=graphs, **options)
        assert_equal(adv, attack(plain, x, y, generator=expected, **options))
        assert adv.stride() == x.stride()
    for (name, value), other in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        assert value.equal(other), name


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_graph_computes_what_the_loop_computes(model, attack, sparse):
    if sparse:
        sparsify(model, masks.prune(model, density=0.5))
    graphs = TapedGraphs()
    agree(model.train(), graphs, ATTACKS[attack])
    assert graphs.counts == (1, 3)


@pytest.mark.parametrize("mode", attacks.MODES)
def test_batch_norm_is_updated_once_a_pass_in_train_mode_and_never_else(model, mode):
    agree(model.train(), TapedGraphs(), mode=mode)
    assert model[1].num_batches_tracked == 1 + (10 if mode == "train" else 0)


def test_weights_that_change_between_calls_are_seen(model):
    sparsify(model, masks.prune(model, density=0.5))
    graphs = TapedGraphs()
    for step in range(5):
        agree(model, graphs, numbers=[step])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    assert graphs.counts == (1, 3)


def test_weights_that_autocast_has_cast_before_are_cast_again(model):
    graphs = TapedGraphs()
    for step in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            agree(model, graphs, numbers=[step])
            x, y = batch(step)
            assert F.cross_entropy(model.eval()(x), y).isfinite()  # casts are kept: none may be a recording's
        with torch.no_grad():
            model[0].weight.mul_(1.5)
    assert graphs.counts == (1, 2)
    agree(model, graphs)  # without autocast it is another graph
    assert graphs.counts == (2, 5)


def test_a_mask_that_changes_between_calls_is_seen(model):
    sparsify(model, masks.prune(model, density=0.5))
    graphs = TapedGraphs()
    agree(model, graphs)
    model[3].set_mask(masks.prune(model, density=0.2)["3"])
    agree(model, graphs)
    model[3].weight_mask.copy_(torch.rand(model[3].weight.shape) < 0.5)  # as loading does
    agree(model, graphs, numbers=range(8))
    assert graphs.counts[0] == 3


def test_parameters_that_move_are_found(model):
    graphs = TapedGraphs()
    agree(model, graphs)
    model[0].weight = nn.Parameter(model[0].weight.detach() * 2)
    agree(model, graphs)
    model.to(memory_format=torch.channels_last)
    agree(model, graphs)
    assert graphs.counts == (3, 9)


def test_each_shape_and_each_setting_has_its_own_graph(model):
    graphs = TapedGraphs()
    for round in range(3):
        for size in (6, 2):
            agree(model, graphs, numbers=[round], size=size)
        agree(model, graphs, numbers=[round], mode="batch")
        agree(model, graphs, fgsm, numbers=[round])
        agree(model, graphs, fgsm, numbers=[round], eps=0.2)
    assert graphs.counts == (5, 5)


def test_a_layout_of_its_own(model):
    graphs = TapedGraphs()
    for number in range(4):
        x, y = batch(number)
        x = x.to(memory_format=torch.channels_last)
        adv = pgd(model, x, y, graphs=graphs, generator=torch.Generator().manual_seed(2))
        assert adv.is_contiguous(memory_format=torch.channels_last)
        assert_equal(adv, pgd(model, x, y, generator=torch.Generator().manual_seed(2)))


def test_no_more_graphs_are_kept_than_asked_for(model):
    graphs = TapedGraphs(capacity=2)
    for size in (1, 2, 3):
        agree(model, graphs, size=size)
    assert len(graphs._entries) == 2 and graphs.counts == (3, 9)
    agree(model, graphs, size=3)
    assert graphs.counts == (3, 14)
    agree(model, graphs, size=1)  # recorded anew, and the one least recently used gives way
    agree(model, graphs, size=3)
    assert graphs.counts == (4, 22)
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        Graphs(0)


def test_two_bare_replays_draw_different_numbers_and_a_reset_generator_repeats(model):
    graphs, (x, y) = TapedGraphs(), batch(0)
    attack = PGD(model, generator=torch.Generator().manual_seed(4), graphs=graphs)
    first = [attack(x, y) for _ in range(3)]
    (entry,) = graphs._entries.values()
    replays = [entry.replay().clone() for _ in range(2)]
    assert not replays[0].equal(replays[1]) and not replays[0].equal(first[2])
    attack.settings["generator"].manual_seed(4)
    assert all(attack(x, y).equal(adv) for adv in first)


def test_results_are_the_callers_own(model):
    graphs, kept = TapedGraphs(), []
    for number in range(5):
        x, y = batch(number)
        adv = pgd(model, x, y, graphs=graphs)
        kept.append((adv, adv.clone()))
        assert adv.data_ptr() != x.data_ptr() and not adv.requires_grad
    assert all(adv.equal(then) for adv, then in kept)
    kept[-1][0].zero_()
    agree(model, graphs)


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_any_grad_mode(model, grad_mode):
    graphs, draws = TapedGraphs(), torch.Generator().manual_seed(1)
    with grad_mode():
        found = [ATTACKS["pgd"](model, *batch(number), generator=draws, graphs=graphs) for number in range(4)]
    draws.manual_seed(1)
    for number, adv in enumerate(found):
        assert_equal(adv, ATTACKS["pgd"](model, *batch(number), generator=draws))
        assert not adv.is_inference()
    assert graphs.counts == (1, 2)


def test_values_are_checked_at_each_replay_and_before_it(model):
    graphs = TapedGraphs()
    agree(model, graphs)
    x, y = batch(0)
    for wrong, said in (((x + 1, y), r"x must lie in \[0, 1\]"), ((x, y + 5), r"y must lie in \[0, 4\]")):
        with pytest.raises(ValueError, match=said):
            ATTACKS["pgd"](model, *wrong, graphs=graphs)
    assert graphs.counts == (1, 3)
    agree(model, graphs)
    assert graphs.counts == (1, 8)


class Reads(nn.Module):
    """A model that reads a number back."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :5] * (2.0 if x.sum().item() > 0 else 1.0)


def test_what_cannot_be_recorded_goes_on_eagerly_with_one_sentence(model):
    graphs, failing = TapedGraphs(), nn.Sequential(nn.BatchNorm2d(3), Reads())
    said = r"attacks on this Sequential run step by step and not as a CUDA graph: the host reads what is only recorded"
    with pytest.warns(UserWarning, match=said) as told:
        agree(failing.train(), graphs, mode="train")
    assert len(told) == 1 and failing.training and graphs.counts == (1, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree(failing, graphs, mode="train")
    assert graphs.counts == (1, 0)


def test_a_model_that_waits_is_not_recorded(model, monkeypatch):
    monkeypatch.setattr(CpuRecorder, "waits", True)
    graphs = TapedGraphs()
    with pytest.warns(UserWarning, match="it makes the host wait for the GPU"):
        agree(model, graphs)
    assert graphs.counts == (0, 0)


def test_an_error_in_the_model_is_the_callers(model):
    graphs, failing = TapedGraphs(), nn.Sequential(make_model(), nn.Linear(7, 7))
    for _ in range(3):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            pgd(failing, *batch(0), graphs=graphs)


def test_weights_that_the_caller_holds_constant_are_not_recorded(model):
    sparsify(model, masks.prune(model, density=0.5))
    graphs = TapedGraphs()
    with frozen_weights(model):
        agree(model, graphs)
    assert not graphs._entries


def test_without_cuda_nothing_is_recorded(model):
    graphs = Graphs()
    agree(model, graphs)
    assert not graphs._entries


def test_the_classes_keep_graphs_of_their_own(model):
    for attack in (PGD(model, graph=True), TPGD(model, steps=1, graph=True)):
        assert isinstance(attack.settings["graphs"], Graphs)
        assert attack(*batch(0)).shape == (6, 3, 8, 8)
    assert "graphs=Graphs(capacity=8)" in repr(PGD(model, graph=True))
    assert "graphs" not in PGD(model).settings


def test_a_copy_of_the_graphs_begins_anew(model):
    graphs = TapedGraphs(capacity=3)
    agree(model, graphs)
    for copied in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert copied.capacity == 3 and not copied._entries


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def same_algorithms(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@cuda
@pytest.mark.usefixtures("same_algorithms")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("attack", ATTACKS)
def test_on_a_gpu_a_graph_computes_what_the_loop_computes(model, attack, sparse, dtype):
    model = model.cuda()
    if sparse:
        sparsify(model, masks.prune(model, density=0.5))
    graphs = Graphs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                agree(model, graphs, ATTACKS[attack], range(2), device="cuda")
            with torch.no_grad():
                model[0].weight.mul_(1.1)
    assert all(entry.replay is not None for entry in graphs._entries.values())


@cuda
@pytest.mark.usefixtures("same_algorithms")
@pytest.mark.parametrize("mode", attacks.MODES)
def test_on_a_gpu_batch_norm_is_updated_once_a_pass_in_train_mode_and_never_else(model, mode):
    agree(model.cuda().train(), Graphs(), mode=mode, device="cuda")
    assert model[1].num_batches_tracked == 1 + (10 if mode == "train" else 0)


@cuda
def test_on_a_gpu_two_bare_replays_draw_different_numbers(model):
    graphs, (x, y) = Graphs(), batch(0, device="cuda")
    attack = PGD(model.cuda(), generator=torch.Generator().manual_seed(4), graphs=graphs)
    first = [attack(x, y) for _ in range(3)]
    (entry,) = graphs._entries.values()
    replays = [entry.replay().clone() for _ in range(2)]
    assert not replays[0].equal(replays[1]) and not replays[0].equal(first[2])
    attack.settings["generator"].manual_seed(4)
    attack(x, y), attack(x, y)
    assert attack(x, y).equal(first[2])


@cuda
@pytest.mark.parametrize("found_before", [True, False])
def test_on_a_gpu_what_cannot_be_recorded_goes_on_eagerly_and_the_process_too(model, found_before, monkeypatch):
    if not found_before:  # then the recording fails half-way
        monkeypatch.setattr(attacks.graph.Recorder, "rehearse", lambda recorder, work: (recorder.run(work), False))
    graphs, failing = Graphs(), nn.Sequential(nn.BatchNorm2d(3), Reads()).cuda()
    with pytest.warns(UserWarning, match="run step by step and not as a CUDA graph") as told:
        agree(failing.train(), graphs, mode="train", device="cuda")
    assert len(told) == 1 and failing.training
    assert torch.rand(3, device="cuda").std() > 0  # the generator does not wait for the recording's end
    if found_before:
        agree(model.cuda(), graphs, device="cuda")
        assert [entry.replay is not None for entry in graphs._entries.values()] == [False, True]
