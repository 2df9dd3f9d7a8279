"""The one exception for mistakes a user can fix; the command line turns it into exit code 2."""

_LONGEST = 1500
"""Characters."""


class UserError(ValueError):
    """A mistake in the user's input: one line says what was expected, found, where, what to do.

    The middle of a long message is cut out: what was found may be a whole file. Its start says where, its end what
    to do.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 3 :]}"
        super().__init__(message)
