"""What stops a run, and what rejects a sample."""

from pearl.errors import PearlError


class ConfigError(PearlError, ValueError):
    """Settings that do not fit together."""


class RunError(PearlError, RuntimeError):
    """A fault of the system (disk, model, cluster) or of how the run was asked for; the message is for the user."""


class Rejected(Exception):
    """This sample gives no trajectory. `reason` is what is counted, `detail` what is recorded beside it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


class Unsolvable(Rejected):
    """The allowed tools, or the annotations, do not suffice for this question."""


class Contradiction(Rejected):
    """What a tool showed does not agree with the annotated answer."""
