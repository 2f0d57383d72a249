"""What goes wrong when objects are written as data or read back."""


class StorageError(ValueError):
    """An object that cannot be stored as data, or a file that is none; the message says which part and what to do."""
