import pytest
import torch

from saeflow.operators import native

PATHS = ["native", "plain"] if torch.cuda.is_available() else ["native", "plain", "triton"]


@pytest.fixture(autouse=True, params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on the compiled kernels, where they serve, on plain torch, and on Triton's.

    Triton's run in its interpreter, which is no stand-in for a GPU's speed but computes the same.
    """
    monkeypatch.setattr(native, "is_on", request.param == "native")
    if request.param == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return request.param
