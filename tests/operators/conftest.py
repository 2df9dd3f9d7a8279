import os

import pytest

from saeflow.operators import gpu, native

os.environ["TRITON_INTERPRET"] = "1"  # when the kernels are imported
has_triton = gpu._kernels() is not None
del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True, params=["native", "plain", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on the compiled kernels, where they serve, on plain torch, and on Triton's.

    Triton's run in its interpreter, which is no stand-in for a GPU's speed but computes the same.
    """
    monkeypatch.setattr(native, "is_on", request.param == "native")
    if request.param == "triton":
        assert has_triton
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return request.param
