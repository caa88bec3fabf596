"""Decoding with early exits.

`engine` says which sequence goes through which segment next, `passes` runs the segments, `cache`
keeps their K/V, `policy` says when a token leaves, `speculative` how drafts are verified,
`arguments` what a call comes to, and `generate` is the way in. On several processes `parts` gives
each its part of the model, `pipeline` is an engine cut into stages and `mail` what these tell each
other.
"""

from ee_tuning.decode.engine import Engine, Request
from ee_tuning.decode.generate import GenerateOutput, generate, generate_batch, warm_up
from ee_tuning.decode.parts import load_part
from ee_tuning.decode.policy import Policy
from ee_tuning.decode.speculative import Chooser, Token

__all__ = [
    "Chooser",
    "Engine",
    "GenerateOutput",
    "Policy",
    "Request",
    "Token",
    "generate",
    "generate_batch",
    "load_part",
    "warm_up",
]
