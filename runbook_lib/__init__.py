"""Moves the search of an existing PostgreSQL table to pgvector, one proved phase at a time.

The notebooks call these modules; each changing module offers ``plan``, ``apply``, ``verify`` and ``undo``.
"""

from importlib.metadata import version

__version__ = version("pgvector-runbook")
