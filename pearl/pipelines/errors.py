"""What stops a run."""

from pearl.errors import PearlError


class ConfigError(PearlError, ValueError):
    """Settings that do not fit together."""


class RunError(PearlError, RuntimeError):
    """A fault of the system (disk, model, cluster) or of how the run was asked for; the message is for the user."""
