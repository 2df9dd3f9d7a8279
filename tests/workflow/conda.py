"""Stand-in for the program `conda`: the calls that Snakemake makes of it.

An environment is a venv of this interpreter, into which pip installs the `pip:` section of the file. The packages
`python` and `pip` of the file come with the venv; what conda-forge holds for them is not tried.
"""

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path

import yaml

PREFIX = Path(__file__).resolve().parents[1]


def create(file: Path, prefix: Path) -> None:
    """`conda env create`: a venv with the pinned packages."""
    *conda, pip = yaml.safe_load(file.read_text())["dependencies"]
    version = f"python={sys.version_info.major}.{sys.version_info.minor}"
    if conda != [version, "pip"]:
        sys.exit(f"expected {version} and pip, found {conda}")
    venv.create(prefix, with_pip=True, symlinks=True)
    install = [prefix / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps"]
    subprocess.run([*install, *pip["pip"]], check=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    parser.add_argument("--version", action="store_true")
    for flag in ("--json", "--quiet", "--no-default-packages", "-y", "--tarballs"):
        parser.add_argument(flag, action="store_true")
    for option in ("--get", "--file", "--prefix"):
        parser.add_argument(option)
    chosen = parser.parse_args()
    with (PREFIX / "calls.log").open("a") as log:
        log.write(" ".join(sys.argv[1:]) + "\n")
    match chosen.words:
        case [] if chosen.version:
            print("conda 26.1.0")
        case ["info"]:
            print(json.dumps({"conda_prefix": str(PREFIX), "platform": "linux-64"}))
        case ["config"]:
            print(json.dumps({"get": {chosen.get: "strict"}}))
        case ["env", "create"]:
            create(Path(chosen.file), Path(chosen.prefix))
        case ["clean"]:
            pass  # pip keeps its own cache
        case _:
            sys.exit(f"not known here: conda {' '.join(sys.argv[1:])}")


if __name__ == "__main__":
    main()
