"""Write the annotated tree of docs/architecture.md from the first sentence of every file."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/architecture.md"
PATTERNS = (
    "Snakefile", "dvc.yaml", "params.yaml", "workflow/Snakefile", "workflow/**/*.smk", "workflow/**/*.yaml", "profiles/**/*.yaml",
    "src/saeflow/**/*.py", "src/saeflow/**/*.j2", "src/saeflow/**/*.yaml", "benchmarks/*.py",
)  # fmt: skip
START, END = "<!-- tree: made by docs/tree.py -->", "<!-- end of tree -->"


def first_sentence(path: Path) -> str:
    """Return the first sentence of a file's docstring or of its first comment.

    Raises:
        SystemExit: the file has neither.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        docstring = ast.get_docstring(ast.parse(text)) or ""
    elif text.startswith('"""'):
        docstring = text[3 : text.index('"""', 3)]
    elif comment := re.match(r"\{#(.*?)#\}", text, re.DOTALL):
        docstring = comment[1].strip()
    else:
        lines = []
        for line in text.splitlines():
            if not line.startswith("#"):
                break
            lines.append(line.removeprefix("#").strip())
        docstring = "\n".join(lines)
    if not docstring.strip():
        sys.exit(f"{path}: expected a docstring or a first comment that says what the file is for")
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[a-z)`\d])\. (?=[A-Z`])", paragraph)[0].rstrip(".")


def tree() -> str:
    """Return one table per folder: each file with its first sentence."""
    paths = {p for pattern in PATTERNS for p in ROOT.glob(pattern) if p.is_file()}
    folders: dict[str, list[Path]] = {}
    for path in sorted(paths):
        folders.setdefault(path.parent.relative_to(ROOT).as_posix(), []).append(path)
    lines = []
    for folder, files in folders.items():
        lines += [
            f"`{folder}/`" if folder != "." else "At the top",
            "",
            "| file | content |",
            "|---|---|",
        ]
        cells = ((f.name, first_sentence(f).replace("|", "\\|")) for f in files)
        lines += [*(f"| `{name}` | {sentence} |" for name, sentence in cells), ""]
    return "\n".join(lines)


def page() -> str:
    """Return docs/architecture.md with the tree of the files that are there."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    return f"{before}{START}\n\n{tree()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
