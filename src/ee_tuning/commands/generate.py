"""`ee-tuning generate`: text in the terminal, each token coloured by the layer it left at."""

from __future__ import annotations

from ee_tuning.config import GenerateConfig
from ee_tuning.decode.show import generate_and_show


def generate(config: GenerateConfig) -> None:
    """Print the text.

    Raises:
        UserError, ProcessFailed: see `ee_tuning.decode.show.generate_and_show`.
    """
    generate_and_show(config)
