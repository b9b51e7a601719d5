"""Published training recipes as config files of the command line: `sparse-adv train --config recipe:NAME`."""

from __future__ import annotations

from pathlib import Path

PREFIX = "recipe:"


def names() -> list[str]:
    """Return the names of the recipes, sorted.

    Examples:
        >>> "fastat-n-fgsm" in names()
        True
    """
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def path(name: str) -> Path:
    """Return the YAML file of a recipe.

    Args:
        name: one of `names()`.

    Raises:
        ValueError: if there is no recipe of this name.

    Examples:
        >>> path("fastat-n-fgsm").name
        'fastat-n-fgsm.yaml'
    """
    if name not in names():
        raise ValueError(f"recipe must be one of {', '.join(names())}, got {name!r}")
    return Path(__file__).parent / f"{name}.yaml"
