"""`ee-tuning init`: exits on a backbone, untuned."""

from __future__ import annotations

from ee_tuning.api import EarlyExitModel
from ee_tuning.config import InitConfig
from ee_tuning.errors import UserError
from ee_tuning.exit_config import DRAFT
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
    layers = [layer for layer in model.exit_layers if layer != DRAFT]
    made = [f"exits after layers {layers}"] if layers else []
    made += ["a draft exit"] if model.draft else []
    print(f"{' and '.join(made)} saved in {config.out}")
