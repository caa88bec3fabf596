"""What divides tuning, and makes it fast and small: applied to a model from outside, in order."""

from __future__ import annotations

from typing import Any

import torch

from ee_tuning import varlen
from ee_tuning.config import TuneConfig
from ee_tuning.devices import check_fp8
from ee_tuning.model import EarlyExitModel
from ee_tuning.parallel.data import shard_exits
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.parallel.tensor import split_model
from ee_tuning.quantise.fp8 import Fp8Linear, tune_in_fp8
from ee_tuning.quantise.packages import compiles

ONE_PROCESS = Mesh()


def use_plain_head(model: EarlyExitModel, native_only: bool = True) -> None:
    """Let exits that share a head in fp8 compute loss and gradient in one go, where they may.

    That is where the model does nothing to the head's products (no scaling, no soft-capping), which
    is tried out.
    """
    head: Any = model.backbone.head
    if type(head) is not Fp8Linear or head.bias is not None or not (head.native or not native_only):
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, head.in_features, generator=generator)
    x = 100 * x.to(model.backbone.device, model.backbone.dtype)
    if not torch.equal(model.backbone.logits(x), head(x)):
        return
    for layer in model.exit_layers:
        exit = model.exit(layer)
        if exit.spec.head == "shared" and exit.tokens is None:
            exit._frozen["plain_head"] = head


def prepare(model: EarlyExitModel, config: TuneConfig, mesh: Mesh = ONE_PROCESS) -> EarlyExitModel:
    """`model`, on its device, as `config` wants it tuned on this process of a connected `mesh`.

    The backbone is in its precision, and of a pipeline only this process's stage is there.

    Raises:
        UserError: see `split_model` and `check_fp8`.
    """
    split_model(model, mesh, teacher=config.loss != "ce", sequence=config.sequence_parallel)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.master_weights]
    for p in model.exits.parameters():
        if p.requires_grad:
            p.data = p.data.to(dtype)
    if config.exit_precision == "fp8":
        check_fp8("--exit-precision", model.backbone.device)
        tune_in_fp8(model.exits)
    if varlen.can_use(model.model):
        varlen.use_varlen(model)
        model.chain.takes_boundaries = True
    on_gpu = model.backbone.device.type == "cuda"
    if config.compile == "on" or (config.compile == "auto" and on_gpu and config.tp == 1):
        model.chain.compile(layers=compiles(config.backbone_precision))
        use_plain_head(model)  # else its steps would each take as much memory as the logits
    if config.shard:
        shard_exits(model, mesh)
    return model.train()
