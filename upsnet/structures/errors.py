"""Errors that a user can mend: one clear sentence each (what, where, what to do).

The commands print the sentence and exit with a non-zero code, without a traceback. Everything else that escapes is a
bug of ours and keeps its traceback.
"""


class UserError(Exception):
    """Base of all errors whose message is meant for the user.

    told: the user has read it already, so that it is not printed once more.
    """

    told = False


class RecipeError(UserError):
    """A recipe (yaml or override) holds an unknown key, a wrong type or an impossible value."""


class DataError(UserError):
    """Photos or annotations are missing, damaged or contradict each other."""


class WeightsError(UserError):
    """A weight file is missing, unreadable or does not fit the network."""


class PlaceError(UserError):
    """A path cannot be read or written, or a disk is full."""


class Stopped(Exception):
    """A command was asked to stop by a signal and did so in good order. It has told the user how to go on."""
