"""The layers of a stage: as counted, or as long as layers and exits take on this device."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ee_tuning.backbone import slice_config
from ee_tuning.config import TuneConfig
from ee_tuning.exit_config import DRAFT, ExitConfig, ExitSpec
from ee_tuning.losses import Objective
from ee_tuning.model import Network
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.plan.shapes import account_of
from ee_tuning.share import New, Share, load
from ee_tuning.stages import cut_stages
from ee_tuning.tune.setup import prepare
from ee_tuning.tune.step import Tuner


def own_stage(
    shapes: Network,
    config: TuneConfig,
    mesh: Mesh,
    device: torch.device,
    dtype: torch.dtype,
    say: Callable[[str], None],
) -> range | None:
    """The layers of this process's stage, counted from 0; None for all that the exits need.

    shapes: of the model that `config` tunes; may be on the meta device.

    Raises:
        UserError: the backbone cannot be cut into so many stages.
    """
    if config.pp == 1:
        return None
    if config.balance == "measured":
        costs = mesh.on_main(lambda: measured_costs(shapes, config, device, dtype))
    else:
        costs = account_of(shapes, config).tuning(config.loss != "ce", config.runs_whole)
    stages = cut_stages(costs, config.pp, config.stage_layers)
    text = ", ".join(f"{stage.start + 1}–{stage.stop}" for stage in stages)
    say(f"layers of the stages: {text}")
    return stages[mesh.pp_rank]


def measured_costs(
    shapes: Network, config: TuneConfig, device: torch.device, dtype: torch.dtype
) -> list[float]:
    """Seconds of each layer with the exit after it, on a micro-batch: those of `Account.tuning`.

    One layer and one exit of every kind are measured, with random weights, and whole: what ranks
    send each other is left out, and optimizers, as by `ee_tuning.costs`. A draft exit, which needs
    a whole backbone, is taken to be as fast as the last layer, by their FLOP.

    shapes: of the model that `config` tunes; may be on the meta device.
    """
    backbone = shapes.backbone
    types = getattr(backbone.config, "layer_types", None) or [None] * backbone.num_layers
    layers = backbone.layers
    kinds = [(types[k], *(p.shape for p in layer.parameters())) for k, layer in enumerate(layers)]
    specs = {spec.layer: spec for spec in shapes.exit_config.specs(backbone.num_layers)}
    specs.pop(DRAFT, None)
    account = account_of(shapes, config)
    any_exit = specs[max(specs)] if specs else ExitSpec(1, "norm", "shared")
    runs = len(layers) if config.loss != "ce" else account.reach

    @cache
    def measure(layer: int, arch: str, head: str) -> tuple[float, float]:
        small = slice_config(backbone.config, [layer, backbone.num_layers - 1])
        return seconds(small, ExitSpec(1, arch, head), config, device, dtype)

    costs = []
    for layer in range(len(account.tuning(config.loss != "ce", config.runs_whole))):
        spec = specs.get(layer + 1, any_exit)
        forward, work = measure(kinds.index(kinds[layer]), spec.arch, spec.head)
        costs.append((forward if layer < runs else 0.0) + (work if layer + 1 in specs else 0.0))
    if shapes.draft:
        costs[-1] += forward * account.exits[DRAFT].whole.flop / account.layers[-1].forward
    return costs


def seconds(
    small: Any, spec: ExitSpec, config: TuneConfig, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Seconds of the first layer's forward and of an exit's work after it, on a micro-batch.

    small: config of a backbone of two layers, the last one to copy a `layer` exit from.
    """
    alone = dataclasses.replace(
        config, dp=1, tp=1, pp=1, loss="ce", sequence_parallel=False, shard=False,
        shard_backbone=False,
    )  # fmt: skip
    gpus = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus), torch.device(device):
        backbone = AutoModelForCausalLM.from_config(
            small, dtype=dtype, trust_remote_code=config.trust_remote_code
        )
        exits = ExitConfig([1], spec.arch, head=spec.head)
        share = Share(precision=config.backbone_precision)
        model = load(New(backbone, exits), share, Network)
    if config.known_tokens:
        model.reduce_vocabulary(torch.arange(config.known_tokens))
    prepare(model, alone)
    size = (config.micro_batch_size, config.seq_length)
    ids = torch.zeros(size, dtype=torch.int64)
    positions = torch.arange(config.seq_length).expand(size)
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    autocast = None if dtype == torch.float32 else dtype
    objective = Objective(dynamic_weights=config.dynamic_weights)
    tuner = Tuner(model, {}, objective, autocast=autocast)  # whose gradients nobody uses
    placed = tuner.place(batch)
    given = placed["input_ids"], placed["position_ids"], placed.get("boundaries")
    forward = timed(lambda: model.chain.descend(*given).to(1), device)
    return forward, max(0.0, timed(lambda: tuner.step([batch], {1: 1.0}), device) - forward)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """The least seconds of three calls, after one that compiles and warms up."""
    found = []
    for _ in range(4):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found[1:])
