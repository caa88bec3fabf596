from ee_tuning.api import EarlyExitModel as EarlyExitModel
from ee_tuning.config import ExitConfig as ExitConfig
from ee_tuning.errors import UserError as UserError

__version__: str
__all__ = ["EarlyExitModel", "ExitConfig", "UserError", "__version__"]
