"""What divides tuning, and makes it fast and small: applied to a model from outside, in order."""

from __future__ import annotations

import torch

from ee_tuning import varlen
from ee_tuning.config import TuneConfig
from ee_tuning.devices import check_fp8
from ee_tuning.model import EarlyExitModel
from ee_tuning.parallel.data import shard_exits
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.parallel.tensor import split_model
from ee_tuning.quantise.fp8 import tune_in_fp8
from ee_tuning.quantise.packages import compiles

ONE_PROCESS = Mesh()


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
        # Else a step of a shared head in fp8 would take as much memory as the logits.
        for layer in model.exit_layers:
            model.exit(layer).output.fuse(model.backbone)
    if config.shard:
        shard_exits(model, mesh)
    return model.train()
