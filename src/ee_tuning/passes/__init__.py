"""The forward passes of decoding: what runs on the device, for many sequences at a time.

`passes` runs the segments and `prompts` reads with them; `wanted` is what they are told and give,
`cache` keeps their K/V, `sources` and `chains` are those of a draft exit. `draws` chooses tokens,
with samples from `noise`. `graphs` compiles and captures passes, `branches` lets the device choose
among them, `warm` does both ahead, and `compiler` is what CUDA's compiler is asked for.
"""
