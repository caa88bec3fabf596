from ee_tuning.config import ExitConfig as ExitConfig
from ee_tuning.errors import UserError as UserError
from ee_tuning.model import EarlyExitModel as EarlyExitModel

__version__: str
__all__ = ["EarlyExitModel", "ExitConfig", "UserError", "__version__"]
