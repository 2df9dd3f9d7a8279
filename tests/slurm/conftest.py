"""The workflow on a real SLURM: the cluster, and projects that submit to it."""

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..workflow.conftest import ROOT, SYNTHETIC
from .cluster import Cluster, why_not

PROFILE = ROOT / "workflow" / "profiles" / "slurm" / "config.yaml"
PREFIXES = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SACCT_")  # the commands' defaults


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster of one node, where REQUIRE_SLURM is set; fails with the reason where none can be had."""
    if not os.environ.get("REQUIRE_SLURM"):
        pytest.skip("SLURM: set REQUIRE_SLURM=1 to start one and run these")
    if reason := why_not():
        pytest.fail(f"SLURM: {reason}")
    for name in [name for name in os.environ if name.startswith(PREFIXES)]:
        del os.environ[name]
    with Cluster() as started:
        yield started


def edited_profile(folder: Path, rules: dict[str, dict[str, Any]] | None = None) -> Path:
    """The profile of the project, edited as docs/cluster.md says: sizes of this machine, short waits."""
    profile = yaml.safe_load(PROFILE.read_text())
    profile["default-resources"] |= {
        "mem_mb": "1500 * attempt", "runtime": "5 * attempt", "slurm_account": "none"
    }  # fmt: skip
    profile.pop("set-resources")
    if rules:
        profile["set-resources"] = rules
    profile |= {"jobs": 2, "latency-wait": 10, "slurm-init-seconds-before-status-checks": 8}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(profile))
    return folder


def small(tokens: int = 131_072) -> dict[str, Any]:
    """Parameters of a few jobs: one SAE, one figure."""
    params = copy.deepcopy(SYNTHETIC)
    params["saes"] = {"topk": params["saes"]["topk"]}
    params["complexity"] = {}
    params["training"]["tokens"] = tokens
    params["figures"]["names"] = ["fvu_l0"]
    return params
