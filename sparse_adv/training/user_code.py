"""The user's classes that decide the result of a run, as `run.json` describes and compares them."""

from __future__ import annotations

import json
from dataclasses import asdict, is_dataclass

from sparse_adv.argument_types import shortened
from sparse_adv.runs import UserCode


def described(name: str, code: object, settings: object) -> UserCode:
    """Return the class of a user's object, and its settings as JSON data.

    Args:
        name: of the settings, for errors.
        code: the object.
        settings: a dataclass or a dict; None for none.

    Raises:
        TypeError: if the settings are anything else.
        ValueError: if they hold values that JSON cannot.

    Examples:
        >>> from sparse_adv.training import UpdateHook
        >>> described("hook.config", UpdateHook(), {"every": 50})
        UserCode(name='UpdateHook', settings={'every': 50})
    """
    if settings is not None and not isinstance(settings, dict):
        if not is_dataclass(settings) or isinstance(settings, type):
            raise TypeError(f"{name} must be a dataclass or a dict, got {shortened(settings)}")
        settings = asdict(settings)
    try:
        plain = json.loads(json.dumps(settings or {}, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} must hold only what run.json can: {error}") from error
    return UserCode(type(code).__qualname__, plain)
