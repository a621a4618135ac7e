"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """A mistake that the user can mend; its message is the single line that the command line shows.

    The message names the file or the key at fault and says what to do.
    """
