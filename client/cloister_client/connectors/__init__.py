"""Readers of a hospital's own records: each one ``describe()`` and ``rows()``, nothing more."""
