"""Pages of the documentation's site from outside of docs/, which mkdocs.yml runs as a hook.

README, CONTRIBUTING, CHANGELOG and the benchmarks' tables stand where a repository has them. The site has them beside the
pages of docs/, so links between both are written as they are there. The tutorial's notebook becomes a page.
"""

import importlib.util
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FROM_ROOT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
RESULTS = ROOT / "benchmarks/results"
NOTEBOOK, TUTORIAL = "docs/tutorial.ipynb", "tutorial.md"
LINK = re.compile(r"(\]\()([^)#:\s]+)(#[^)\s]*)?(?=\))")


def on_config(config: Any) -> Any:
    """Add a section with the benchmarks' tables, each by its heading."""
    pages = [
        {
            path.read_text(encoding="utf-8")
            .partition("\n")[0]
            .removeprefix("# "): path.relative_to(ROOT).as_posix()
        }
        for path in sorted(RESULTS.glob("*.md"))
    ]
    config["nav"].insert(-1, {"Benchmarks": pages})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside of docs/, and the pictures that they show."""
    from mkdocs.structure.files import File

    results = [path for end in ("md", "svg") for path in sorted(RESULTS.glob(f"*.{end}"))]
    for path in [*map(ROOT.joinpath, FROM_ROOT), *results]:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, FROM_ROOT.get(name, name), abs_src_path=str(path)))
    files.append(File.generated(config, TUTORIAL, content=tutorial()))
    return files


def tutorial() -> str:
    """Return the notebook as a page; MkDocs runs this file by its path, so that its neighbour is loaded by its own."""
    spec = importlib.util.spec_from_file_location("notebook", ROOT / "docs/notebook.py")
    assert spec is not None
    assert spec.loader is not None
    notebook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(notebook)
    page: str = notebook.markdown(notebook.read())
    return page


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Write links between the repository's files as links between the site's pages."""
    uri = page.file.src_uri
    own = {page: name for name, page in FROM_ROOT.items()}.get(uri)
    place = own or (uri if uri.startswith("benchmarks/") else f"docs/{uri}")

    def on_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), link[2]))
        target = {**FROM_ROOT, NOTEBOOK: TUTORIAL}.get(target, target.removeprefix("docs/"))
        written = posixpath.relpath(target, posixpath.dirname(uri) or ".")
        return f"{link[1]}{written}{link[3] or ''}"

    return LINK.sub(on_site, markdown)
