"""What ends a command otherwise than as asked."""


class InputError(ValueError):
    """The caller's input is wrong: what was given, what was expected and what to do, in one line.

    The command line prints it without a traceback and exits with code 2.
    """


class Preempted(Exception):
    """Training was told to stop, and has saved all that it needs to go on.

    The command line prints it and exits with code 75, EX_TEMPFAIL: try again.
    """
