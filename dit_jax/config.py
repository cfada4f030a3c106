"""What every floor shares: the error for bad input."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input, told in one sentence: what, what was expected, what came, what to do. Commands print it and exit with
    2."""
