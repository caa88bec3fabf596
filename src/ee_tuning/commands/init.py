"""`ee-tuning init`: exits on a backbone, untuned."""

from __future__ import annotations

from ee_tuning.api import EarlyExitModel
from ee_tuning.config import InitConfig
from ee_tuning.errors import UserError
from ee_tuning.exit_config import exit_name
from ee_tuning.folders import claim


def init(config: InitConfig) -> None:
    """Save untuned exits to ``config.out``.

    Raises:
        UserError: a backbone or exits that cannot be, or a folder that is taken.
    """
    if config.init == "fitted":
        raise UserError("init fitted needs data to fit to: give it to ee-tuning tune")
    output = claim(config.out, config.overwrite, reads=[config.model])
    model = EarlyExitModel.from_base(
        config.model,
        config.exit_config(),
        whole=False,
        trust_remote_code=config.trust_remote_code,
    )
    with output.filled() as folder:
        model.save_pretrained(folder)
    names = ", ".join(map(exit_name, model.exit_layers))
    print(f"exits after layers [{names}] saved in {config.out}")
