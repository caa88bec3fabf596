"""Early exits for any Hugging Face language model: add them, tune only those, decode faster."""

from ee_tuning.config import ExitConfig
from ee_tuning.errors import UserError
from ee_tuning.model import EarlyExitModel

__version__ = "0.1.0"
__all__ = ["EarlyExitModel", "ExitConfig", "UserError", "__version__"]
