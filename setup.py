"""Put the workflow's own files into a built package, so that `saeflow run` needs no checkout; pyproject.toml says the rest."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PROJECT = (
    "Snakefile", "requirements.lock", "params.yaml", "workflow", "profiles", "envs", "presets",
    "benchmarks/results/rates.yaml", "benchmarks/results/rates-h200.yaml",
)  # fmt: skip


class BuildWithWorkflow(build_py):
    """Build the package, with PROJECT in its folder `_project` (saeflow.config.ROOT)."""

    def run(self) -> None:
        """Build."""
        super().run()
        if self.editable_mode:  # a checkout has the files themselves
            return
        for name in PROJECT:
            source, place = ROOT / name, Path(self.build_lib, "saeflow", "_project", name)
            place.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, place, dirs_exist_ok=True)
            else:
                shutil.copyfile(source, place)


setup(cmdclass={"build_py": BuildWithWorkflow})
