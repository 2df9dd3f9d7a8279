"""Edit every module of the package: what runs again is what the edited code is part of, and nothing for a comment."""

import ast
import shutil
import sys
from pathlib import Path

import pytest

from saeflow.config import ROOT, load_params
from saeflow.jobs import Job, Jobs, code
from saeflow.jobs.code import FOLDER, OUTSIDE, Code, package_code
from saeflow.jobs.syntax import read_module
from saeflow.plan import Plan

CODE = package_code()
MODULES = sorted(CODE.files)


@pytest.fixture(scope="module")
def every() -> list[Job]:
    """One job of each command for each kind of source, of the demo, and one training of each variant."""
    found: dict[object, Job] = {}
    for job in Jobs(Plan(load_params(ROOT / "params.yaml"))).every():
        of_kind = tuple(key for table, key in job.choices if table == "sources.kinds:KINDS")
        found.setdefault((job.command, job.choices if job.command == "train" else of_kind), job)
    return list(found.values())


def text_of(module: str) -> str:
    return CODE.files[module].read_text(encoding="utf-8")


def rerun(edited: Code, jobs: list[Job]) -> set[str]:
    """Commands (with their choices) whose code is another one."""
    return {
        name_of(job)
        for job in jobs
        if CODE.reached(*asked(job)).digest != edited.reached(*asked(job)).digest
    }


def asked(job: Job) -> tuple[list[str], list[tuple[str, str]]]:
    return job.entries


def name_of(job: Job) -> str:
    return " ".join([job.command, *(key for _, key in job.choices)])


def test_a_figure_is_drawn_again_for_its_own_file_only() -> None:
    jobs = Jobs(Plan(load_params(ROOT / "params.yaml")))
    one, other = jobs.figure("fvu_l0"), jobs.figure("training")
    module = "saeflow.figures.plots.fvu_l0"
    edited = CODE.edited(module, text_of(module) + "\nassert True\n")
    assert edited.reached(*one.entries).digest != one.reached.digest
    assert edited.reached(*other.entries).digest == other.reached.digest


def test_the_cache_gives_the_same_and_only_what_changed_is_read_again(
    every: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, read = Code(kept=tmp_path / "code.json"), []
    expected = [first.reached(*job.entries) for job in every]
    first.keep()
    monkeypatch.setattr(
        code, "read_module", lambda source, name, **rest: read.append(name) or read_module(source, name, **rest)
    )  # fmt: skip
    again = Code(kept=tmp_path / "code.json")
    assert [again.reached(*job.entries) for job in every] == expected
    assert not read

    module = "saeflow.operators.sparsemax"
    folder = tmp_path / "saeflow"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    with CODE.files[module].open() as source:
        (folder / "operators/sparsemax.py").write_text(source.read() + "\nassert True\n")
    changed = Code(folder, kept=tmp_path / "code.json")
    digests = [changed.reached(*job.entries).digest for job in every]
    assert set(read) == {module}
    assert digests != [one.digest for one in expected]
    assert digests == [
        CODE.edited(module, text_of(module) + "\nassert True\n").reached(*job.entries).digest
        for job in every
    ]


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"reader": 1}'])
def test_a_cache_that_cannot_be_read_or_written_stops_nothing(
    tmp_path: Path, text: str | None
) -> None:
    kept = tmp_path / "code.json"
    if text is None:
        kept.mkdir()
    else:
        kept.write_text(text)
    asked = ["cli:JOBS"], [("cli:JOBS", "draw")]
    again = Code(kept=kept)
    assert again.reached(*asked) == CODE.reached(*asked)
    again.keep()


@pytest.mark.parametrize("module", MODULES)
def test_a_comment_a_docstring_and_formatting_rerun_nothing(module: str) -> None:
    """Unparsing drops comments, parentheses and line breaks; docstrings are replaced."""
    tree = ast.parse(text_of(module))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            node.body[0] = ast.Expr(ast.Constant("Another docstring."))
    edited = CODE.edited(module, "# a comment\n\n" + ast.unparse(tree))
    assert edited.module(module) == CODE.module(module)


def test_a_statement_reruns_exactly_the_jobs_that_reach_its_module(every: list[Job]) -> None:
    lines = []
    for module in MODULES:
        edited = CODE.edited(module, text_of(module) + "\nassert True\n")
        found = rerun(edited, every)
        reached = {name_of(job) for job in every if module in job.reached.modules}
        assert found == reached, module
        lines.append(
            f"{module.removeprefix('saeflow.')}: {', '.join(sorted(found)) or 'nothing'}\n"
        )
    sys.stdout.writelines(lines)


def commands(module: str, jobs: list[Job]) -> set[str]:
    """Commands that an edit of a module reruns."""
    return {job.command for job in jobs if f"saeflow.{module}" in job.reached.modules}


def test_what_a_reader_expects(every: list[Job]) -> None:
    """Facts from how the package is used, not from its imports."""
    text = [job for job in every if ("sources.kinds:KINDS", "text") in job.choices]
    assert {"prepare", "merge", "clean", "evaluate"} <= {job.command for job in text}
    assert commands("sources.scenes", text) <= {"interpret"}  # which probes what any source knows
    assert commands("figures.plots.fvu_l0", every) <= {"draw"}
    assert commands("saes.jumprelu", [job for job in every if "jumprelu" not in name_of(job)]) <= {
        "import"
    }
    assert commands("training.trainer", every) == {"train"}
    assert "train" in commands("operators.topk", every)
    assert "merge" not in commands("evaluation.reconstruction", every)
    assert "merge" not in commands("saes.base", every)
    for outside in OUTSIDE:
        assert not any(f"saeflow.{outside}" in job.reached.modules for job in every)


def replaced(module: str, old: str, new: str) -> Code:
    text = text_of(f"saeflow.{module}")
    assert old in text, f"{module} has no {old!r} any more: take another place"
    return CODE.edited(f"saeflow.{module}", text.replace(old, new, 1))


def test_a_message_reruns_nothing_and_a_constant_what_uses_it(every: list[Job]) -> None:
    message = "n must be in 1..2^62 - 1, got {n}"
    assert rerun(replaced("stores.permutation", message, "{n} is out of range"), every) == set()
    logged = replaced("sources.gguf_files", 'logger.info("downloading', 'logger.warning("fetching')
    assert rerun(logged, every) == set()
    help_text = replaced("cli.stores", "Parts in all.", "How many parts there are.")
    assert rerun(help_text, every) == set()
    rounds = rerun(replaced("stores.permutation", "_ROUNDS = 16", "_ROUNDS = 15"), every)
    assert {name.split()[0] for name in rounds} == {"merge"}


def test_a_function_that_nothing_reaches_and_an_unused_import_rerun_nothing(
    every: list[Job],
) -> None:
    more = "\nimport colorsys\n\n\ndef never_called() -> int:\n    return 1\n"
    module = "saeflow.stores.merge"
    assert rerun(CODE.edited(module, text_of(module) + more), every) == set()


def test_another_import_under_the_same_name_reruns_its_users(every: list[Job]) -> None:
    other = replaced("stores.permutation", "import math\n", "import cmath as math\n")
    assert {name.split()[0] for name in rerun(other, every)} == {"merge"}


def test_an_edit_on_disk_gives_the_same_digests(every: list[Job], tmp_path: Path) -> None:
    copy = tmp_path / "saeflow"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("__pycache__"))
    module = "saeflow.files"
    text = text_of(module) + "\nassert True\n"
    (copy / "files.py").write_text(text)
    edited, afresh = CODE.edited(module, text), Code(copy)
    for job in every:
        assert afresh.reached(*job.entries) == edited.reached(*job.entries)
