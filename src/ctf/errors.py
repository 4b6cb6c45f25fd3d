"""What ends a command without a traceback: the user's to mend (exit code 2), or done as asked."""


class UserError(Exception):
    """What was got, what was expected, what to do: one or two lines.

    Where several processes find the same, the first one speaks, and the others' are empty.
    """


class Stopped(Exception):
    """A training that was asked to end and has saved its state: what to say, or "" as above."""
