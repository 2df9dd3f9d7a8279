"""One line for a mistake stays one that can be read."""

import os
import subprocess
import sys
from pathlib import Path

from saeflow.errors import UserError


def test_a_long_message_keeps_its_start_and_its_end() -> None:
    said = str(UserError(f"a.json: k: expected a number, found {'x' * 10**6!r}. Export it again."))
    assert said.startswith("a.json: k: expected a number, found 'xxx")
    assert said.endswith("xxx'. Export it again.")
    assert len(said) < 2000


def test_other_messages_are_left_alone() -> None:
    assert str(UserError("a.json: no such file.")) == "a.json: no such file."


def test_a_place_without_the_right_to_write_is_one_line(tmp_path: Path) -> None:
    """Run as a user whose rights count, which those of root do not by themselves."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    bound = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    command = [sys.executable, "-m", "saeflow", "import", str(tmp_path), "--library", "saelens"]
    done = subprocess.run(
        [*(bound if os.geteuid() == 0 else ()), *command, "--store", "a/b", "--out", str(closed / "new")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: {closed}/new.partial: permission denied. Change its permissions, or name another place."
    )
    assert not list(closed.iterdir())
