"""Compiled kernels that cannot be had: plain torch does their work, and one warning says so."""

import subprocess
import sys

import pytest

CODE = """
import logging, sys
logging.basicConfig(format="%(message)s")
{before}
import torch
from saeflow.operators import keep_topk, native, sparsemax
x = torch.randn(600, 64, generator=torch.Generator().manual_seed(0))
assert not native.serves(x)
kept = keep_topk(x.relu(), 4)
assert torch.equal(kept.topk(5).values[:, :4], x.topk(4).values)
assert not kept.topk(5).values[:, 4].any()
torch.testing.assert_close(sparsemax(x).sum(1), torch.ones(600))
"""
BROKEN = {
    # numba's own error where no folder can be written: the package's, the user's cache, NUMBA_CACHE_DIR
    "no place for its cache": (
        "from numba.core import caching; (caching.CacheImpl if hasattr(caching, 'CacheImpl') else caching._CacheImpl)._locator_classes = []",
        "no locator available",
    ),
    "a numpy that numba refuses": (
        "import numba; del numba.njit", "cannot import name 'njit'"
    ),
}  # fmt: skip


def run(before: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(before=before)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("fault", BROKEN)
def test_kernels_that_cannot_be_compiled_are_done_without(fault: str) -> None:
    before, reason = BROKEN[fault]
    said = run(before)
    assert said.count("compiled CPU kernels cannot be used") == 1
    assert reason in said


def test_without_numba_nothing_is_said() -> None:
    assert run("sys.modules['numba'] = None") == ""
