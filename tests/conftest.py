"""Settings before any test is imported, the mark of heavy tests, and a check that none is skipped unnoticed."""

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

# Where SLURM is installed and does not run, each start of Snakemake waits 10 s for `scontrol`, which its plugin calls;
# with an empty configuration that ends at once. The fixture `cluster` takes this away.
os.environ.setdefault("SLURM_CONF", os.devnull)

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

HEAVY_FIXTURES = {"foreign", "cluster"}
"""Environments of other libraries, and a SLURM of its own: what uses them is heavy."""
NO_GPU = ("gpu", "cuda")
"""Words of the only reason for which a test may be skipped where REQUIRE_TESTS is set."""


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests as heavy by the fixtures that they use, and skip what is marked `gpu` where there is none.

    `make bench-gpu` runs those where there is one.
    """
    has_gpu = torch.cuda.is_available()
    for item in items:
        if not has_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))
        if HEAVY_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.heavy)
    # Files that take minutes come first: at the end no worker waits for the other's.
    items.sort(key=lambda item: item.get_closest_marker("workflow") is None)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run where REQUIRE_TESTS is set and a test was skipped for another reason than a missing GPU."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("REQUIRE_TESTS") or reporter is None:  # a worker of xdist has no terminal
        return
    for report in reporter.stats.get("skipped", ()):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        if not any(word in reason.lower() for word in NO_GPU):
            reporter.write_line(f"REQUIRE_TESTS: {report.nodeid} was skipped: {reason}", red=True)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
