"""Thresholds with a guarantee: what they lose, proven on prompts, and watched while decoding.

`prompts` are read once each, `risks` and `tasks` give each a loss for any threshold, `walk` orders
thresholds and tests them, with the tests in `bounds`; `run` is all of it, and `audit` looks on.
"""
