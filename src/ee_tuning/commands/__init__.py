"""The commands, one file and one function of the same name each.

They alone print and claim folders; what they call computes. `ee_tuning.cli` imports a command
when it is asked for.
"""
