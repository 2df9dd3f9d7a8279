"""Tests of saeflow.device."""

import logging

import pytest
import torch

from saeflow.device import has_gpu, label, resolve
from saeflow.errors import UserError


def test_auto_is_a_gpu_where_one_works_else_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "saeflow")
    found = resolve("auto")
    assert found == ("cuda" if torch.cuda.is_available() else "cpu")
    assert f"device: {found}" in caplog.text
    torch.ones(1, device=found)  # it works


def test_the_cpu_is_never_replaced() -> None:
    assert resolve("cpu") == "cpu"
    assert label("cpu") == "cpu"


@pytest.mark.parametrize("asked", ["cuda:99", "cuda:63"])
def test_a_gpu_that_is_not_there_is_refused_in_one_line(asked: str) -> None:
    with pytest.raises(UserError) as refused:
        resolve(asked)
    message = str(refused.value)
    assert message.startswith(f"runtime.device: expected a GPU for {asked}, found none that works")
    assert "\n" not in message


def test_a_hidden_gpu_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not has_gpu()


@pytest.mark.gpu
def test_records_name_the_card() -> None:
    assert label("cuda") == f"cuda ({torch.cuda.get_device_name()})"
