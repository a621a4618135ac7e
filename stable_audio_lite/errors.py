"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """A mistake that the user can fix; its message is the single line that the command line shows.

    The message names the file or the key at fault and says what to do.
    """
