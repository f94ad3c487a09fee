"""What every error of the project that a user can mend derives from."""


class PearlError(Exception):
    """Its message is for the user: the command lines print it without a traceback."""
