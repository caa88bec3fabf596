"""Frozen layers in fewer bits: `fp8` by torch itself, `packages` by torchao and bitsandbytes."""
