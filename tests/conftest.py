"""What all tests share: the devices, the seed, and how hypothesis searches."""

import importlib
import os

# cuBLAS reads it at its first use in a process; tests of deterministic algorithms may come later.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("helpers")

# These need Triton's interpreter, which is chosen before the import: test_interpreted.py runs them.
collect_ignore = [] if "TRITON_INTERPRET" in os.environ else ["kernels/interpreted"]

DEVICES = (
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
)


@pytest.fixture(params=DEVICES, scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that there is: what is shown on one must hold on all."""
    return torch.device(request.param)


# Every run tries the same examples; HYPOTHESIS_PROFILE=search tries many new ones, and few is for slow processes.
settings.register_profile("same", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("few", derandomize=True, deadline=None, max_examples=15)
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def data_parallel_without_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets PyTorch make DataParallel as where there is no GPU: it then only calls its module."""
    module = importlib.import_module("torch.nn.parallel.data_parallel")
    monkeypatch.setattr(module, "_get_available_device_type", lambda: None)
