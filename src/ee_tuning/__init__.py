"""Early exits for any Hugging Face language model: add them, tune only those, decode faster."""

from typing import Any

from ee_tuning.errors import UserError
from ee_tuning.exit_config import ExitConfig
from ee_tuning.version import __version__

__all__ = ["EarlyExitModel", "ExitConfig", "UserError", "__version__"]


def __getattr__(name: str) -> Any:
    """`EarlyExitModel`, imported when it is asked for: it brings torch, which takes seconds.

    `__init__.pyi` tells type checkers and editors the same.
    """
    if name == "EarlyExitModel":
        from ee_tuning.api import EarlyExitModel

        return EarlyExitModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
