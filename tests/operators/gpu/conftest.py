import pytest
import torch

from saeflow.operators import native
from saeflow.operators.gpu import selection

ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
PATHS = ["cpu", ON_GPU if torch.cuda.is_available() else "triton"]


@pytest.fixture(autouse=True, params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device: every test runs on plain torch and on Triton's kernels, on a GPU or interpreted."""
    monkeypatch.setattr(native, "is_on", False)
    if request.param == "triton":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(selection, "AT_ONCE", 4096)  # each block is a step of the interpreter,
        monkeypatch.setattr(selection, "SPARE_TIMES", 2)  # which sorts slowly
    return "cuda" if request.param == "cuda" else "cpu"
