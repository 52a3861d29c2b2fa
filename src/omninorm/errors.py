"""What omninorm raises: every error states the invariant, the value received and the remedy."""


class OmninormError(Exception):
    """Base of all errors that omninorm raises on purpose.

    `str(error)` is one sentence: the invariant that was broken, what came instead, and what to do about it.
    """

    def __init__(self, invariant: str, received: object, remedy: str) -> None:
        super().__init__(invariant, received, remedy)
        self.invariant = invariant
        self.received = received
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.invariant}, but got {self.received}; {self.remedy}"


class ConfigError(OmninormError, ValueError):
    """A setting is unknown, out of range, or does not go with another one."""


class InputError(OmninormError, ValueError):
    """A tensor or an argument of a call has the wrong shape, type or value."""


class DataError(OmninormError, ValueError):
    """A text is missing, empty, too short, or not text."""


class RunError(OmninormError, RuntimeError):
    """A run's folder or a checkpoint can't be written, read or continued."""


class MissingExtraError(OmninormError, ImportError):
    """An optional package is needed for this and is not installed."""
