"""The one exception for mistakes a person can mend: a wrong value, a broken file, an empty folder."""


class UserError(Exception):
    """A mistake in what the user gave. The message names the file or field and what was expected of it.

    Command lines print the message without a traceback and exit with code 2 (see `cdit.cli`).
    """


class DataError(UserError):
    """A dataset on disk is missing, malformed or too small. The message names the file."""
