"""From a folder of images to a leaderboard entry: the library under the stages."""


class InputError(ValueError):
    """A mistake that the user can mend: shown as one line (or one report), never as a traceback."""
