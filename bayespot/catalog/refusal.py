"""The error of every catalogue that cannot be used."""


class CatalogError(ValueError):
    """A catalogue that cannot be used; the message names the column, row or file and the remedy."""
