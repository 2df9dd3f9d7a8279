"""The one exception for mistakes a user can mend; the command line turns it into exit code 2."""


class UserError(ValueError):
    """A mistake in the user's input: one line says what was expected, found, where, what to do."""
