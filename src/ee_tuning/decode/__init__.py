"""Decoding with early exits.

`settings` says where a token may leave; `engine` which sequence goes through which segment next,
`drafts` what a round of it is, `pace` how many drafts it has, `lookup` those a text has itself.
`sequences` keeps what each has computed, and lets it go through `ee_tuning.passes`; `sampling`
chooses tokens. Where a text is alone, `ahead` lets the device decide by what it knows (`alone`),
and `rounds` lets it draft. `engines` has what a model decodes with, `arguments` reads a call,
`text` writes it, and `generate` is the way in.
On several processes `load` gives each its part of the model, `stage` is an engine cut into stages
and `mail` what these tell each other.
"""

from ee_tuning.decode.engine import Engine
from ee_tuning.decode.engines import engines_of
from ee_tuning.decode.generate import GenerateOutput, generate, generate_batch, warm_up
from ee_tuning.decode.load import load_part
from ee_tuning.decode.sampling import Chooser, Token
from ee_tuning.decode.sequences import Request
from ee_tuning.decode.settings import Fixed, Full, Policy, Speculative, Threshold

__all__ = [
    "Chooser",
    "Engine",
    "Fixed",
    "Full",
    "GenerateOutput",
    "Policy",
    "Request",
    "Speculative",
    "Threshold",
    "Token",
    "engines_of",
    "generate",
    "generate_batch",
    "load_part",
    "warm_up",
]
