"""Errors a user can cause.

Every one says what was read, what was expected and what to do, in one line. The command line prints that line and exits with status 2;
anything that is not a `QscopeError` is a defect of ours and keeps its traceback.
"""


class QscopeError(Exception):
    """Base of every error that a user can cause and mend."""


class SourceError(QscopeError):
    """A file, folder or hub repository is missing, truncated, unreadable or not what its name says."""


class UnsafeFileError(SourceError):
    """A file asks for something outside the short list that a checkpoint may contain; nothing in it was executed."""


class ArchitectureError(QscopeError):
    """A model or SAE is of a kind, or has a setting, that is not implemented here."""


class ShapeError(QscopeError):
    """Tensors do not have the shapes that their config, their names or their partner demand."""


class ConfigError(QscopeError):
    """A configuration key is unknown, ill-typed or out of range."""


class InputError(QscopeError):
    """An argument (text, layer, feature, strength, position) is empty or out of range."""
