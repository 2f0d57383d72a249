"""Models and states of fits as data: tensors and a description by class names of a list; nothing is unpickled."""

from bayespot.storage.decode import NotTrusted, Reader, read
from bayespot.storage.encode import Written, describe, write
from bayespot.storage.errors import StorageError

__all__ = ["NotTrusted", "Reader", "StorageError", "Written", "describe", "read", "write"]
