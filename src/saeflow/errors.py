"""The one exception for mistakes a user can fix; the command line turns it into exit code 2."""

_LONGEST = 1500
"""Characters."""


class UserError(ValueError):
    """Mistakes in the user's input: a line each says what was expected, found, where, what to do.

    The middle of a long line is cut out: what was found may be a whole file. Its start says where, its end what
    to do.

    Attributes:
        lines: a line for each mistake; the error's own text is the first.
    """

    def __init__(self, *lines: str) -> None:
        self.lines = tuple(map(_shortened, lines))
        super().__init__(self.lines[0])

    def within(self, place: object) -> "UserError":
        """The same mistakes, each line headed by the place where they are."""
        return UserError(*(f"{place}: {line}" for line in self.lines))


def _shortened(line: str) -> str:
    if len(line) <= _LONGEST:
        return line
    return f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 3 :]}"
