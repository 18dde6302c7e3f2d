"""The one exception for mistakes that the user can fix."""

import re
import reprlib

# Longer messages lose their middle: what is wrong stands at the beginning, what to do at the end.
MOST_CHARACTERS = 600
# User and password in a URI with or without a scheme, unless they are only the words for them.
_CREDENTIALS = re.compile(r"(?s)(?<=://)(?!USER:PASSWORD@).*@|(?<![^\s'\"/])(?!USER:PASSWORD@)[^\s/@'\"]+:[^\s'\"]*@")
# Options of a URI of MongoDB that hold secrets.
_SECRET = r"\b\w*(?:mechanismproperties|passw|secret|token)\w*=[^&\s'\"]*"
SECRET_OPTIONS = re.compile(f"&{_SECRET}|{_SECRET}&?", re.IGNORECASE)


class UserError(Exception):
    """A mistake of the user. Its text is one line: what is wrong, in which file or key, and how to fix it.

    Scripts print it without a traceback and exit with status 2. Raise it before anything is written. Values of the user
    stand in the text, whatever they are: line breaks, credentials and what makes the text too long are taken out.

    Args:
        message: the text.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


class DeviceError(UserError):
    """A mistake that concerns the device of one process. Other processes of the same training may not meet it."""


class DamagedError(UserError):
    """Stored data is damaged in one place. Blocks that do not read it can be done."""


def without_secrets(text: str) -> str:
    """Return a text without what may be a password or a token in a URI in it."""
    return SECRET_OPTIONS.sub("", _CREDENTIALS.sub("", text))


def quoted(value: object) -> str:
    """Return a value as a message shows it, however large it is and whatever it consists of."""
    try:
        return repr(value[:200]) if isinstance(value, str) else _QUOTES.repr(value)
    except Exception:  # some integers have too many digits, and a value of a Python file may be anything
        return f"something of type {type(value).__name__}"


_QUOTES = reprlib.Repr()
_QUOTES.maxstring = _QUOTES.maxother = 200


def _one_line(message: str) -> str:
    # Looking for secrets takes long in long texts.
    return _shortened(" ".join(without_secrets(_shortened(message, 10 * MOST_CHARACTERS)).split()), MOST_CHARACTERS)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"
