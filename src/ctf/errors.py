"""The one exception that is the user's to mend: shown without a traceback, exit code 2."""


class UserError(Exception):
    """What was got, what was expected, what to do: one or two lines."""
