"""The bundled English is prose of this Python, the same each time, and nothing is executed for it."""

import asyncio
import inspect
import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

from saeflow.sources import english, external_digest


def test_it_holds_the_language_reference_and_the_librarys_docstrings() -> None:
    documents = english.documents()
    for name in ("lambda", "exceptions", "specialnames"):
        assert pydoc_data.topics.topics[name].strip() in documents
    assert inspect.getdoc(asyncio.gather) in "\n".join(documents)


def test_there_is_enough_for_a_small_demonstration() -> None:
    documents = english.documents()
    assert len(documents) > 300
    assert sum(map(len, documents)) > 1_500_000
    assert min(map(len, english.documents()[-200:])) >= english.MIN_CHARACTERS


def test_it_leaves_out_tests_and_installed_packages() -> None:
    text = "\n".join(english.documents())
    assert "Base class for all neural network modules" not in text  # torch
    assert "A test case that checks the IDLE" not in text


def test_another_process_reads_the_same_and_imports_none_of_it() -> None:
    code = (
        "import sys; from saeflow.sources import english; print(english.digest());"
        "sys.exit('turtle' in sys.modules or 'pydoc_data.topics' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "PYTHONHASHSEED": "7"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == english.digest() == external_digest("bundled:english")


def test_the_library_s_source_is_a_text_too() -> None:
    sources = english.documents("python")
    assert len(sources) > 300
    assert sum(
        text.startswith(("#", '"""', "import", "from", 'r"""')) for text in sources
    ) > 0.8 * len(sources)
    assert any("def get_docstring(" in text for text in sources)  # ast.py itself
    assert external_digest("bundled:python") == english.digest("python") != english.digest()
