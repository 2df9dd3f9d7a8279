"""Run docs/tutorial.ipynb from its first cell to its last, and show it as a page of the site.

    python -m docs.notebook FOLDER

runs it in FOLDER, where its own run stays, and writes what its cells print and draw into the notebook.
"""

import base64
import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("tutorial.ipynb")
DPI = 80


def execute(sources: list[str], names: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Run code cells in one namespace, in the working directory.

    Args:
        sources: of the code cells, in order.
        names: the namespace.

    Yields:
        The outputs of each cell in the notebook's format: what it printed, then the figures that it left open.
    """
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    for number, source in enumerate(sources):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, f"<cell {number}>", "exec"), names)
        outputs: list[dict[str, Any]] = []
        if text := printed.getvalue():
            outputs.append(
                {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
            )
        for open_one in map(plt.figure, plt.get_fignums()):
            held = io.BytesIO()
            open_one.savefig(held, format="png", dpi=DPI, metadata={"Software": None})
            picture = base64.b64encode(held.getvalue()).decode()
            outputs.append(
                {"data": {"image/png": picture}, "metadata": {}, "output_type": "display_data"}
            )
        plt.close("all")
        yield outputs


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the cells that hold code."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def markdown(notebook: dict[str, Any]) -> str:
    """The notebook as a page: text, code, and below each cell what it gave."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            else:
                parts.append(f"![figure](data:image/png;base64,{output['data']['image/png']})")
    return "\n\n".join(parts) + "\n"


def read() -> dict[str, Any]:
    """Return the notebook."""
    notebook: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    return notebook


def main(folder: Path) -> None:
    """Run the notebook in a folder, and write it with its outputs."""
    notebook = read()
    cells = code_cells(notebook)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.chdir(folder):
        made = list(execute(["".join(cell["source"]) for cell in cells], {}))
    for number, (cell, outputs) in enumerate(zip(cells, made, strict=True), 1):
        cell |= {"execution_count": number, "outputs": outputs}
    text = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    PATH.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    main(Path(sys.argv[1]))
