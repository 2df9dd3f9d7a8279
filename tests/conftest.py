"""What must be settled before any test is imported."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():  # with a GPU, operators/test_gpu.py runs the kernels there
    os.environ["TRITON_INTERPRET"] = "1"  # what Triton's own functions become is decided once
    import triton.language  # noqa: F401

    from saeflow.operators import gpu

    for module in gpu.MODULES:
        gpu.load(module)
    del os.environ["TRITON_INTERPRET"]

# The same examples at every run; FUZZ_EXAMPLES draws as many new ones.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))
settings.register_profile(
    "saeflow",
    max_examples=EXAMPLES or 100,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("saeflow")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none; `make bench-gpu` runs it where there is one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))
