"""The one exception for mistakes that the user can fix."""


class UserError(Exception):
    """A mistake of the user. Its text is one line: what is wrong, in which file or key, and how to fix it.

    Scripts print it without a traceback and exit with status 2. Raise it before anything is written.
    """


class DeviceError(UserError):
    """A mistake that concerns the device of one process. Other processes of the same training may not meet it."""
