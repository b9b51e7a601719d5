"""Runs the loop of an attack by replaying its CUDA graph, where it can be captured; else step by step."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from sparse_adv.attacks.checks import LabelRange, check_label_range
from sparse_adv.attacks.cuda_graph import Graphs, is_frozen, key_of_batch, key_of_model
from sparse_adv.attacks.loop import PGDLoop
from sparse_adv.ops.cuda_graph import inside_a_call


def run_captured(
    graphs: Graphs,
    loop: PGDLoop,
    images: Tensor,
    labels: Any,
    philox_state: Tensor | None,
    label_range: LabelRange = None,
) -> Tensor:
    """Return what `loop.run` returns, by replaying a graph if possible; the result is always a new tensor."""
    if not _can_capture(graphs, loop, images, labels):
        return loop.run(images, labels, philox_state, label_range)
    call = graphs.cache.find(*_key(loop, images, labels, label_range))
    if call.replays and call.facts is not None:
        check_label_range(label_range, call.facts)
    result: Tensor = graphs.cache.run(
        call,
        f"attacks on this {type(loop.model).__name__}",
        {"attack": lambda images, labels, philox_state: loop.run(images, labels, philox_state, label_range)},
        (images, labels, philox_state),
        images.device,
    )
    if loop.classes is not None:
        call.facts = loop.classes
    return result


def _can_capture(graphs: Graphs, loop: PGDLoop, images: Tensor, labels: Any) -> bool:
    if not graphs.cache.captures_on(images.device) or inside_a_call() or is_frozen(loop.model):
        return False
    return labels is None or (isinstance(labels, Tensor) and labels.device == images.device)


def _key(loop: PGDLoop, images: Tensor, labels: Tensor | None, label_range: LabelRange) -> tuple[Hashable, object]:
    """Return the key of an attack, and the objects that must stay alive while it is in use."""
    options = loop.options
    of_model, keep_alive = key_of_model(loop.model, images.device.type)
    key = (
        (options.start, options.ball, options.alpha, options.steps, options.restarts, options.bn_mode, options.engine),
        (options.loss if isinstance(options.loss, str) else id(options.loss), options.targeted, options.early_stop),
        label_range is None,
        key_of_batch(images, labels),
        of_model,
    )
    # Not the loop: its options refer to the Graphs object, which would then live until the garbage collector runs.
    return key, (options.loss, keep_alive)
