"""Frozen layers kept by torchao or bitsandbytes, as transformers' quantisation configs say.

transformers applies such a config while it reads a checkpoint. Here it is applied layer by layer to
a model that was read in full precision, with the same functions, after the exits were copied from
it: exits start from the checkpoint's own values, and the fingerprint is that of the checkpoint.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from ee_tuning.errors import UserError

PACKAGES = {
    "torchao-int8": "torchao",
    "bnb-8bit": "bitsandbytes",
    "bnb-4bit": "bitsandbytes",
}
# Bytes that a weight takes, its scales included: one per row, for nf4 one in fp32 per 64 weights.
BYTES = {"fp8": 1.0, "torchao-int8": 1.0, "bnb-8bit": 1.0, "bnb-4bit": 0.5 + 4 / 64}


def check_installed(precision: str) -> None:
    """Refuse a precision that is unknown, or whose package is missing.

    Raises:
        UserError: which there are, or what to install.
    """
    if precision not in ("same", *BYTES):
        raise UserError(
            f"backbone_precision {precision!r} is unknown: use one of same, {', '.join(BYTES)}"
        )
    if precision in PACKAGES:
        check_package(PACKAGES[precision], f"--backbone-precision {precision}")


def check_package(package: str, what: str) -> None:
    """Refuse what needs a package that is missing, `what` being a flag and its value.

    Raises:
        UserError: what to install.
    """
    if find_spec(package) is None:
        raise UserError(f"{what} needs: pip install {package}")


def nothing_to_quantise(model: nn.Module, precision: str) -> UserError:
    """What is wrong where no layer of `model` has an `nn.Linear`."""
    return UserError(
        f"the layers of {type(model).__name__} have no linear matrices that could be "
        f"kept in {precision}: leave --backbone-precision at same"
    )


def compiles(precision: str) -> bool:
    """Whether layers in `precision` can be compiled: bitsandbytes' products look at values."""
    return PACKAGES.get(precision) != "bitsandbytes"


def quantisation_config(precision: str, dtype: torch.dtype) -> TorchAoConfig | BitsAndBytesConfig:
    """transformers' config for `precision`; products with 4-bit weights are computed in `dtype`."""
    if precision == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        # Its inductor settings are for decoding, and would hold for the whole process.
        return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    if precision == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def quantise_layer(layer: nn.Module, precision: str, dtype: torch.dtype) -> int:
    """Keep the weight of every `nn.Linear` in `layer` in `precision`, in place; gives their number.

    In 4 bits only matrices of whole blocks, since bitsandbytes multiplies no others on every CPU;
    those of real models are.

    The package has to be there, see `check_installed`.
    """
    config = quantisation_config(precision, dtype)
    linears = [m for m in layer.modules() if type(m) is nn.Linear and _can_be(m, precision)]
    if isinstance(config, TorchAoConfig):
        from torchao.quantization import quantize_

        kinds = config.get_apply_tensor_subclass()
        quantize_(layer, kinds, filter_fn=lambda module, _: type(module) is nn.Linear)
        for linear in linears:
            linear.__class__ = Int8Linear
    else:
        for linear in linears:
            _to_bitsandbytes(linear, config)
    return len(linears)


class Int8Linear(nn.Linear):
    """A linear layer whose weight torchao keeps in int8, which is converted before the product.

    torchao's own product does both at once: compiled for a GPU, that is a kernel for a few tokens,
    slow for the thousands of a tuning step.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (…, K) to (…, N)."""
        weight: Any = self.weight
        return nn.functional.linear(x, weight.dequantize(x.dtype), self.bias)


def _can_be(linear: nn.Linear, precision: str) -> bool:
    whole = linear.in_features % 64 == 0 and linear.out_features % 32 == 0
    return precision != "bnb-4bit" or whole


def _to_bitsandbytes(linear: nn.Linear, config: BitsAndBytesConfig) -> None:
    """Make `linear` a module of bitsandbytes, in place: twins of its layer hold the same object."""
    from transformers.integrations import replace_with_bnb_linear

    holder = nn.ModuleDict({"linear": linear})
    replace_with_bnb_linear(holder, [], config)
    found: Any = holder["linear"]
    kind, settings = type(found.weight), vars(found.weight)
    # Moving such a parameter to a device is what quantises it.
    weight = kind(linear.weight.detach(), requires_grad=False, **settings)
    found.weight = weight.to(linear.weight.device)
    found.bias = linear.bias
    linear.__class__, linear.__dict__ = type(found), vars(found)
