"""The one exception that a user is meant to see.

Every mistake that a person can make and mend (a wrong key, a missing file, an impossible layout) is raised as
`InputError`. The entry points print its message as one line and exit with status 2; anything else is a bug and
keeps its stack trace.
"""


class InputError(Exception):
    """A problem the user can fix. The message says what is wrong, where, and what to do, in one line."""

    on_all_ranks = False
    """Whether every rank raises this very message (`distributed.initialize.agreed`), so that one need print it."""


def first_line(error: BaseException) -> str:
    """What an exception says, on one line and not too long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0].rstrip(".:;") if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
