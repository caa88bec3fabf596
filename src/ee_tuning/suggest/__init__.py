"""Which exits promise most speed for a backbone on this machine, before any is tuned for good.

`probes` are exits tuned for a minute, `rounds` what decoding costs with them, `predict` what
follows for whole texts, and `run` tries one after another.
"""
