"""The one exception a user is meant to read."""


class UserError(Exception):
    """Bad input or a broken file: one line that names the thing and the fix; exit code 2."""
