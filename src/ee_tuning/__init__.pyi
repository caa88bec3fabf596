from ee_tuning.api import EarlyExitModel as EarlyExitModel
from ee_tuning.errors import UserError as UserError
from ee_tuning.exit_config import ExitConfig as ExitConfig

__version__: str
__all__ = ["EarlyExitModel", "ExitConfig", "UserError", "__version__"]
