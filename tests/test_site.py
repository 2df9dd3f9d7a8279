"""The documentation's site: its pages, its reference, and links between files of the repository and pages of the site."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from docs.notebook import code_cells, read
from docs.site import FROM_ROOT, TUTORIAL, on_config, on_page_markdown

import saeflow
from saeflow.config import check_params, expand_runs

ROOT = Path(__file__).parents[1]
SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def in_nav(part: object) -> list[str]:
    match part:
        case list():
            return [page for one in part for page in in_nav(one)]
        case dict():
            return [page for one in part.values() for page in in_nav(one)]
    return [str(part)]


def test_the_nav_names_each_page_once() -> None:
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    results = [path.relative_to(ROOT).as_posix() for path in ROOT.glob("benchmarks/results/*.md")]
    whole = on_config({"nav": [*SITE["nav"]]})["nav"]
    assert sorted(in_nav(whole)) == sorted([*pages, *results, *FROM_ROOT.values(), TUTORIAL])


def test_the_reference_holds_every_public_name() -> None:
    named = {
        name.rsplit(".", 1)[1]
        for name in re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    }
    assert set(saeflow.__all__) - {"__version__"} <= named


@pytest.mark.parametrize(
    ("uri", "written", "expected"),
    [
        ("index.md", "[a](docs/models.md)", "[a](models.md)"),
        ("index.md", "![a](docs/pictures/b.svg)", "![a](pictures/b.svg)"),
        ("index.md", "[a](benchmarks/results/gpu.md)", "[a](benchmarks/results/gpu.md)"),
        ("performance.md", "[a](../benchmarks/results/gpu.md#b)", "[a](benchmarks/results/gpu.md#b)"),
        ("running.md", "[a](../README.md), [b](keys.md#c)", "[a](index.md), [b](keys.md#c)"),
        ("benchmarks/results/gpu.md", "[a](gpu.csv) [b](../../docs/keys.md)", "[a](gpu.csv) [b](../../keys.md)"),
        ("index.md", "[a](docs/tutorial.ipynb)", "[a](tutorial.md)"),
        ("keys.md", "[a](https://arxiv.org/abs/1) [b](#c)", "[a](https://arxiv.org/abs/1) [b](#c)"),
    ],
)  # fmt: skip
def test_links_lead_to_the_pages_of_the_site(uri: str, written: str, expected: str) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri=uri))
    assert on_page_markdown(written, page) == expected


def test_the_tutorials_own_run_is_valid() -> None:
    first = code_cells(read())[0]
    (written,) = re.findall(r'PARAMS = """\n(.*?)"""', "".join(first["source"]), re.DOTALL)
    runs = expand_runs(check_params(yaml.safe_load(written), ["params.yaml"]))
    assert len(runs) == 3


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "mkdocs.yml"):
        shutil.copy(ROOT / name, folder)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("docs", "benchmarks/results", "src"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    return folder


def make_site(checkout: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["make", "site"], cwd=checkout, env=os.environ, capture_output=True, text=True, timeout=600
    )


@pytest.mark.heavy
def test_the_site_is_built_and_a_broken_link_is_an_error(checkout: Path) -> None:
    done = make_site(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (checkout / "site/api/index.html").read_text()
    assert 'id="saeflow.saes.edits.ablate"' in reference
    assert "Set some latents to 0 at every position." in reference
    assert not re.findall(r'(?:src|href)="https?://[^"]+\.(?:js|css)"', reference)
    with (checkout / "docs/keys.md").open("a") as page:
        page.write("\n[nothing](nowhere.md)\n")
    done = make_site(checkout)
    assert done.returncode != 0
    assert "nowhere.md" in done.stdout + done.stderr
