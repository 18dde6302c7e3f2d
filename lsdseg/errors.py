"""The one exception for mistakes that the user can mend."""


class UserError(Exception):
    """Bad input: one line that says what is wrong, in which file or key, and what to do.

    Scripts print it without a traceback and end with exit status 2. Whoever raises it has written nothing yet.
    """


class DeviceError(UserError):
    """What the device of one process does not have; others that train together may not meet it."""
