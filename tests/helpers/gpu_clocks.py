"""GPUs whose streams have clocks of their own, without a GPU: what is timed shows whose clock was read."""

from collections import Counter

import pytest
import torch


class GpuClocks(Counter):
    """Milliseconds by device, which a test advances; takes the place of `torch.cuda`'s events and streams.

    GPU 0 is the current one.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        clocks = self
        self.waited_for: list[torch.device] = []
        current = torch.device("cuda", 0)

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: torch.device = current) -> None:
                self.at = clocks[stream]

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: "Event") -> float:
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=current: device)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=current: self.waited_for.append(device))
