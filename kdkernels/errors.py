"""The one exception that a run raises for something its user can put right."""

from __future__ import annotations


class UserError(ValueError):
    """Wrong input: the text names the argument, its value, what is allowed and what to do.

    The command line prints it as one line and exits with 2; a traceback would only hide it.
    """
