"""How a program ends early: by a mistake that a person can mend, or by an interruption that it can go on after."""


class UserError(Exception):
    """A mistake in what the user gave. The message names the file or field and what was expected of it.

    Command lines print the message without a traceback and exit with code 2 (see `cdit.cli`).
    """


class DataError(UserError):
    """A dataset on disk is missing, malformed or too small. The message names the file."""


class Interrupted(Exception):
    """Something outside ended a run that can go on: a signal, a killed worker, other processes that are gone.

    There is nothing to mend; the message says how to continue. Command lines exit with code 75, "try again".
    """
