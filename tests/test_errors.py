"""One line for a mistake stays one that can be read."""

from saeflow.errors import UserError


def test_a_long_message_keeps_its_start_and_its_end() -> None:
    said = str(UserError(f"a.json: k: expected a number, found {'x' * 10**6!r}. Export it again."))
    assert said.startswith("a.json: k: expected a number, found 'xxx")
    assert said.endswith("xxx'. Export it again.")
    assert len(said) < 2000


def test_other_messages_are_left_alone() -> None:
    assert str(UserError("a.json: no such file.")) == "a.json: no such file."
