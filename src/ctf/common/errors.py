"""What ends a command without a traceback: the user's to mend (exit code 2), or done as asked."""


class UserError(Exception):
    """What was got, what was expected, what to do: one or two lines.

    Where several processes find the same, the first one speaks, and the others' are empty.
    """


class Stopped(BaseException):
    """Work that was asked to end and can go on later: what to say, or "" as above.

    Not an Exception, since a signal may raise it within anything that expects those.
    """
