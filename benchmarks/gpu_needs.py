"""Packages that `benchmarks/gpu.py` needs beside torch, and their wheels."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

NEEDED = {
    "numpy": "numpy", "pandas": "pandas", "zarr": "zarr", "numcodecs": "numcodecs", "donfig": "donfig",
    "google_crc32c": "google-crc32c", "safetensors": "safetensors", "yaml": "pyyaml", "jsonschema": "jsonschema",
    "transformers": "transformers", "tqdm": "tqdm", "scipy": "scipy", "sklearn": "scikit-learn", "typer": "typer",
}  # fmt: skip


def missing(modules: dict[str, str]) -> list[str]:
    """Return the packages whose modules are not installed."""
    return [
        package for module, package in modules.items() if importlib.util.find_spec(module) is None
    ]


def install(wheels: Path, target: Path) -> None:
    """Unpack wheels of a folder beside the machine's own packages."""
    found = sorted(str(path) for path in wheels.glob("*.whl"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--target",
        str(target),
    ]
    subprocess.run([*command, *found], check=True)
    sys.path.append(str(target))
    importlib.invalidate_caches()
