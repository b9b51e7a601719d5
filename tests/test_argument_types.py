"""Public functions name the argument of a wrong type, and its value."""

import inspect

import pytest
import torch
from torch import nn

from sparse_adv import argument_types, attacks, data, engine, masks, methods, models, runs, tickets, training
from sparse_adv import nn as masked

MODULES = (masks, masked, training, tickets, methods, data, models, engine, runs)
DECORATED = {
    f"{function.__module__}.{name}": function
    for module in MODULES
    for name in module.__all__
    for function in [getattr(module, name)]
    if hasattr(function, "__wrapped__") and inspect.isfunction(function)
    if function.__code__.co_filename == argument_types.__file__
}


class Other:
    """An object of no use."""

    def __repr__(self) -> str:
        return "Other"


@pytest.mark.parametrize("name", DECORATED)
def test_an_argument_of_a_wrong_type_is_named_with_its_value(name):
    function = DECORATED[name]
    signature, classes = argument_types._of(function.__wrapped__)
    assert any(classes.values()), "the annotations say nothing"
    required = {
        each.name: Other()
        for each in signature.parameters.values()
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    }
    first = next(each for each in signature.parameters if classes.get(each))
    for value, told in ((Other(), "Other"), (3.5, "3.5"), (b"a", "b'a'"), (10**400, "1000")):
        with pytest.raises(TypeError, match=f"^{first} must be of type .*, got .*{told}"):
            function(**required | {first: value})


def test_the_functions_that_take_a_model_or_masks_are_checked():
    wanted = {
        "prune",
        "density",
        "sparsify",
        "densify",
        "shrink",
        "explain",
        "tune",
        "train",
        "search",
        "restore",
        "build",
        "frozen_weights",
        "dense_gradients",
        "fuse_for_training",
        "input_gradients",
        "of_weights",
        "load_checkpoint",
        "final_test",
    }
    assert wanted <= {name.rpartition(".")[2] for name in DECORATED}


def test_what_a_model_is_run_on_once_has_one_name_and_type():
    annotations = {name: inspect.get_annotations(function.__wrapped__) for name, function in DECORATED.items()}
    taken = {
        (argument, hint.removesuffix(" | None"))
        for hints in annotations.values()
        for argument, hint in hints.items()
        if argument == "example_input" or "Sequence[int] | Tensor" in hint
    }
    assert taken == {("example_input", "Sequence[int] | Tensor")}
    takers = {name.rpartition(".")[2] for name, hints in annotations.items() if "example_input" in hints}
    assert takers >= {"explain", "tune", "shrink", "count_macs", "prune", "restore", "permute_channels"}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: masks.prune(nn.Identity(), densty=0.5), r"prune\(\) got an unexpected keyword argument 'densty'$"),
        (lambda: attacks.MultiAttack([], foo=1), r"MultiAttack.__init__\(\) got an unexpected keyword argument 'foo'$"),
        (lambda: training.train(nn.Identity()), r"train\(\) missing a required argument: 'batches'$"),
        (lambda: masks.prune("a", 0.5), "model must be of type Module, got 'a'"),
        (lambda: masks.density([1]), r"masks must be of type Mapping, got \[1\]"),
        (
            lambda: masks.dependency_groups(nn.Identity(), "abcd"),
            "example_input must be of type Sequence or Tensor, got",
        ),
        (lambda: training.train(nn.Identity(), [], {}), "config must be of type TrainConfig, got {}"),
        (lambda: methods.SparseTraining("rigl"), "config must be of type MethodConfig, got 'rigl'"),
        (lambda: data.Batches([torch.zeros(1)], 2), "split must be of type Split, got"),
        (lambda: models.build(3), "name must be of type str, got 3"),
        (lambda: tickets.shuffle({}, "1"), "seed must be of type int, got '1'"),
        (lambda: tickets.shuffle({}, True), "seed must be of type int, got True"),
        (lambda: tickets.shuffle(None, 0), "ticket_masks must be of type Mapping, got None"),
        (
            lambda: masked.sparsify(nn.Identity(), masks.from_state_dict({"a.weight": torch.eye(2)})),
            r"masks must be of type Mapping, got "
            r"\({'a': a tensor of shape \(2, 2\)}, {'a.weight': a tensor of shape \(2, 2\)}\)$",
        ),
    ],
)
def test_the_message_names_argument_type_and_value(call, said):
    with pytest.raises(TypeError, match=f"^{said}"):
        call()
