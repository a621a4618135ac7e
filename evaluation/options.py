"""Old names of `evaluation.run`, for as long as the library's command line imports them."""

from evaluation.run import ABOUT, add_arguments, options_of

__all__ = ["ABOUT", "add_arguments", "options_of"]
