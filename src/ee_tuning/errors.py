"""Errors a user can cause. Everything else that goes wrong is a defect and keeps its traceback."""


class UserError(ValueError):
    """A mistake in what the user gave: one line saying what is wrong, where, and what to do.

    The command line prints the message alone and exits with status 2.
    """
