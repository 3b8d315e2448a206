"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """Bad input or configuration: one clear sentence that names the thing and the remedy.

    Entry points print it alone and exit with status 2.
    """
