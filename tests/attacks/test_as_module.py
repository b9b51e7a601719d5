"""Models as attacks take them: wrappers and functions that only call a module count as that module."""

from functools import partial

import pytest
import torch
from helpers.attacked import make_model
from torch import nn
from torch.nn.modules import module as torch_module
from torch.optim.swa_utils import AveragedModel

from sparse_adv.attacks import pgd
from sparse_adv.attacks.as_module import as_module

WRAPPERS = {
    "AveragedModel": AveragedModel,
    "DataParallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(AveragedModel(model)),
}
IMAGES, LABELS = torch.rand(2, 3, 8, 8), torch.tensor([0, 4])


@pytest.mark.usefixtures("data_parallel_without_devices")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_that_only_calls_its_module_is_attacked_like_it(wrap):
    model = wrap(make_model())
    module = next(inner for inner in model.modules() if isinstance(inner, nn.Sequential))
    assert as_module(model) == (module, True)
    adv = pgd(model, IMAGES, LABELS, steps=2, random_start=False)
    assert torch.equal(adv, pgd(module, IMAGES, LABELS, steps=2, random_start=False))


@pytest.mark.usefixtures("data_parallel_without_devices")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_that_does_more_is_attacked_itself(wrap):
    class Doubled(type(wrap(make_model()))):
        def forward(self, x):
            return 2 * super().forward(x)

    hooked = wrap(make_model())
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    assert as_module(hooked) == (hooked, True)
    doubled = Doubled(make_model())
    assert as_module(doubled) == (doubled, True)


def test_functions_that_only_call_a_module_are_attacked_like_it():
    module = make_model()
    for called in (module.forward, module.__call__, partial(module), partial(partial(module.forward))):
        assert as_module(called) == (module, True)
        adv = pgd(called, IMAGES, LABELS, steps=2, random_start=False)
        assert torch.equal(adv, pgd(module, IMAGES, LABELS, steps=2, random_start=False))


@pytest.mark.parametrize("table", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_the_forward_of_a_module_with_hooks_runs_without_them(table, everywhere):
    module, runs = make_model(), []
    hook = f"register_module_{table}_hook" if everywhere else f"register_{table}_hook"
    handle = getattr(torch_module if everywhere else module, hook)(lambda *given: runs.append(given[0] is module))
    try:
        assert not as_module(module.forward)[1] and as_module(module.__call__) == (module, True)
        pgd(module.forward, IMAGES, LABELS, steps=1)
        assert True not in runs
        pgd(module.__call__, IMAGES, LABELS, steps=1)
        assert True in runs
    finally:
        handle.remove()
    assert as_module(module.forward) == (module, True)


def test_functions_that_do_more_than_call_a_module_are_attacked_themselves():
    class Scaled(nn.Flatten):
        def forward(self, input, by=1.0):
            return super().forward(input) * by

        def other(self, input):
            return -self(input)

    module = Scaled()
    own = module.forward
    module.forward = partial(own, by=2.0)  # as accelerate sets it
    functions = (lambda x: module(x), module.other, partial(module, by=3.0), partial(module.other), own, module.forward)
    for called, factor in zip(functions, (2, -2, 3, -2, 1, 2), strict=True):
        function, traceable = as_module(called)
        assert not traceable and torch.equal(function(IMAGES), factor * IMAGES.flatten(1))
