"""`python -m saeflow.tables FILE` writes docs/tables.md."""

import sys
from pathlib import Path

from saeflow.tables.document import document
from saeflow.tables.files import write_text

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m saeflow.tables FILE")
    write_text(Path(sys.argv[1]), document())
