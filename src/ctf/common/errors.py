"""The two ways in which a command ends early without a traceback."""


class UserError(Exception):
    """A mistake that the user can fix: what was got, what was expected, what to do (exit code 2).

    One or two lines. If several processes make the same mistake, only the first has a message.
    """


class Stopped(BaseException):
    """Work that was stopped on request and can be resumed; the message says how (exit code 0).

    Not an Exception, since a signal may raise it inside a block that catches those.
    """
