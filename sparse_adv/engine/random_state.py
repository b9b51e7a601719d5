"""Restores the global generators of random numbers after the engine has tried a model out."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class KeptGenerators(TorchDispatchMode):
    """A context whose code may draw from the global generators; at the end they are restored.

    A generator that was not used is not written, because other threads may draw from it meanwhile. Draws from PyTorch's
    generators are seen only in this thread. For Python and NumPy the states before and after are compared, so a draw by
    another thread counts too. If the code draws, numbers that another thread drew meanwhile are drawn again later,
    because the whole process shares the generators. Threads whose numbers matter need their own generators.

    Args:
        device: its generator is restored too, besides the CPU's.

    Examples:
        >>> state = torch.get_rng_state()
        >>> with KeptGenerators(torch.device("cpu")) as generators:
        ...     first = torch.rand(2)
        ...     generators.drawn
        True
        >>> torch.get_rng_state().equal(state)
        True
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._gpu = device if device.type == "cuda" else None
        self._torch_drew = False
        self._python, self._numpy, self._cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(self._gpu) if self._gpu else None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: else PyTorch imports torch._dynamo (2.5 s) to keep it from compiling `__torch_dispatch__`."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # With a generator of the caller's own, the global one is not used.
        self._torch_drew |= torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None
        return func(*args, **kwargs)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.rewind()

    @property
    def drawn(self) -> bool:
        """Whether a generator was used since the beginning or the last `rewind`."""
        return self._torch_drew or self._python_drew() or self._numpy_drew()

    def rewind(self) -> None:
        """Restore the generators that were used, so that the same numbers come again."""
        if self._python_drew():
            random.setstate(self._python)
        if self._numpy_drew():
            np.random.set_state(self._numpy)
        if self._torch_drew:
            torch.set_rng_state(self._cpu)
            if self._gpu is not None and self._cuda is not None:
                torch.cuda.set_rng_state(self._cuda, self._gpu)
            self._torch_drew = False

    def _python_drew(self) -> bool:
        return random.getstate() != self._python

    def _numpy_drew(self) -> bool:
        return not all(np.array_equal(a, b) for a, b in zip(self._numpy, np.random.get_state(), strict=True))
