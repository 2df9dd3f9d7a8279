import pytest

from saeflow.operators import native


@pytest.fixture(autouse=True, params=["native", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on the compiled kernels, where they serve, and on plain torch; Triton's: in gpu/."""
    monkeypatch.setattr(native, "is_on", request.param == "native")
    return request.param
