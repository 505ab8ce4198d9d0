"""The one error a user can cause."""


class InputError(ValueError):
    """The caller's input is wrong: what was given, what was expected and what to do, in one line.

    The command line prints it without a traceback and exits with code 2.
    """
