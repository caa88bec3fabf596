"""Data, tensor and pipeline parallelism, applied to a run from outside, in a visible order.

`mesh` says which process does what, `pipeline` which layers a stage has and how hidden states
come and go, `tensor` and `split` how matrices are split, `data` how gradients are summed.
"""
