"""Decoding with early exits. `decoder` is the whole mechanism, `generate` the way in."""

from ee_tuning.decode.decoder import Decoder, Token
from ee_tuning.decode.generate import GenerateOutput, generate

__all__ = ["Decoder", "GenerateOutput", "Token", "generate"]
