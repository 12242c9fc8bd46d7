"""Warnings of the libraries underneath that a user of a run can do nothing about, kept off the terminal."""

from __future__ import annotations

import sys
import warnings

_NOT_THE_USERS = (
    # (category, the module that it names as its origin)
    (Warning, r"megatron\.core(\.|$)"),  # its deprecations and its hints about settings that this project makes
    (Warning, r"transformer_engine(\.|$)"),
    (FutureWarning, r"torch\.distributed(\.|$)"),  # collectives that Megatron-Core calls by their former names
)


def silence_known_warnings() -> None:
    """Ignore these warnings in the whole process; the entry points call it. With `-W` or PYTHONWARNINGS all show."""
    if sys.warnoptions:
        return
    for category, module in _NOT_THE_USERS:
        warnings.filterwarnings("ignore", category=category, module=module)
