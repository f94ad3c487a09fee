"""What stops a run."""


class RunError(RuntimeError):
    """A fault of the system (disk, model, cluster) or of how the run was asked for; the message is for the user."""
