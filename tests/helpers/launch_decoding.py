"""Decodes as several processes would: `main` starts them once, for all cases of a file.

A case is {"name", "tp", "pp", "port", "todo", …}: its ranks call the function `todo` below, and
leave what it gives, or the error, in files named by case and rank.
"""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.distributed_c10d import _resolve_process_group

import ee_tuning.decode.engine as engine
from ee_tuning import EarlyExitModel, UserError, peers
from ee_tuning.commands.generate import generate as generate_command
from ee_tuning.config import GenerateConfig
from ee_tuning.decode.ahead import Ahead
from ee_tuning.decode.arguments import to_requests
from ee_tuning.decode.engines import engine_for, engines_of
from ee_tuning.decode.mail import Mail
from ee_tuning.decode.stage import Stage
from ee_tuning.devices import pick_device
from ee_tuning.parallel.mesh import Mesh
from ee_tuning.parallel.tensor import split_model
from ee_tuning.passes.graphs import Graphs
from ee_tuning.passes.passes import Passes
from ee_tuning.peers import inbox
from ee_tuning.slices import group_of
from helpers.prompts import prompt
from helpers.ranks import become, launch, run_ranks
from helpers.windows import logits, wide

IDS = torch.tensor([[0, 0, 5, 9, 11], [3, 4, 6, 8, 9], [0, 0, 0, 0, 7]])
COMPILE = torch.compile
PROMPTS = [[5, 9, 11], [3, 4, 6, 8, 9], [7], [20, 21], [30, 31, 32, 33]]


def start(cases: list[dict], folder: Path) -> str:
    """Run the cases on ports of their own; what the ranks leave is in `folder`."""
    return launch("helpers.launch_decoding", cases, folder)


def generate(model, calls):
    """Every call of `generate`, with all of `IDS` and, if it says "alone", one of them."""
    found = []
    for call in calls:
        call = dict(call)
        ids = IDS[1:2] if call.pop("alone", False) else IDS
        torch.manual_seed(3)
        out = model.generate(ids, attention_mask=(ids != 0).long(), **call)
        keys = ("sequences", "exit_layers", "confidences")
        found.append({key: out[key].cpu() for key in keys})
    return found


def batch(model, calls):
    """`generate_batch` of prompts that have settings of their own, after it has been given up
    once and has come upon a prompt that is too long."""
    own = [{}, {"mode": "full"}, {"mode": "fixed", "exit_layers": [2]}, {"threshold": 0.0}, {}]
    prompts = [{"input_ids": ids} | more for ids, more in zip(PROMPTS, own, strict=True)]
    common = {"slots": 2, "capacity": 64, "eos_token_id": None, **calls[0]}
    for _ in model.generate_batch(prompts, **common):
        break
    stream = model.generate_batch([PROMPTS[0], [4] * 125], **common)
    assert next(stream)[0] == 0
    with pytest.raises(UserError, match="prompt 1: 131 tokens with the prompt are asked for"):
        next(stream)
    outputs = sorted(model.generate_batch(iter(prompts), **common), key=lambda pair: pair[0])
    return [{"sequences": out.sequences, "exit_layers": out.exit_layers} for _, out in outputs]


def cancel(model, calls):
    """The tokens of two requests, one of which is cancelled after its second token."""
    requests = [r for ids in PROMPTS[:2] for r in to_requests(model, ids, **calls[0])[0]]
    tokens = [[], []]
    with engine_for(model, requests, False) as one:
        for request, token in one.stream(requests):
            tokens[requests.index(request)].append(token.id)
            requests[0].cancelled = len(tokens[0]) == 2
    return tokens


def overlap(model, calls):
    """The last stage begins with the first token only when the first stage has the third one."""
    begun, window, compute = Path(calls[0].pop("file")), [0], Stage.compute
    mesh = engines_of(model).mesh

    def count(self, news):
        window[0] += bool(news)
        if mesh.pp_rank == 0 and window[0] == 3:
            begun.touch()
        while mesh.pp_rank == 1 and not begun.exists():
            assert time.time() < deadline, "the first stage waits"
            time.sleep(0.01)
        compute(self, news)

    deadline = time.time() + 20
    Stage.compute = count
    found = generate(model, calls)
    Stage.compute = compute
    return found


def at_once(model, calls):
    """What this stage did: the layers at which segments that it ran end, 0 for an answer told."""
    log, window, tell = [], Passes.window, Mail.tell_first

    def run(self, i, *args):
        log.append(self.segments[i].stop)
        return window(self, i, *args)

    def told(self, message):
        log.extend([0] * len(message.news))
        tell(self, message)

    Passes.window, Mail.tell_first = run, told
    generate(model, calls)
    Passes.window, Mail.tell_first = window, tell
    return log


def die(model, calls):
    """The last stage dies at its third token, with however many it computes at a time."""
    computed, compute, mesh = [], Stage.compute, engines_of(model).mesh

    def count(self, news):
        computed.extend(news)
        if mesh.pp_rank == 1 and len(computed) >= 3:
            os._exit(0)  # with another status the launcher would end the first stage, too
        compute(self, news)

    Stage.compute = count
    mesh.doing = "decoding"
    return generate(model, calls)


class OnHost:
    """What processes write into each other's memory goes through gloo here."""

    def __init__(self, name):
        self.group = _resolve_process_group(name)

    def gather(self, words):
        parts = [torch.empty_like(words) for _ in range(self.group.size())]
        dist.all_gather(parts, words, self.group)
        return torch.stack(parts)

    def total(self, parts):
        own = parts[0].float()
        for part in parts[1:]:
            own = own + part.float()
        first, second = self.gather(own.flatten().view(torch.int32)).view(torch.float32)
        return (first + second).view(own.shape)


def ahead(model, calls):
    """The device decides alone, as where small sums do not go through NCCL; each token of it."""
    written, go_on = [], Ahead.go_on

    def count(self, *args):
        written.append(go_on(self, *args))
        return written[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inbox, "_inboxes", {})
        patch.setattr(peers, "share", lambda name, _: inbox._inboxes.update({name: OnHost(name)}))
        patch.setattr(Graphs, "branch", True)
        patch.setattr(Ahead, "go_on", count)
        found = generate(model, calls)
    assert sum(map(len, written)) > sum(call["max_new_tokens"] for call in calls) / 2
    return found


def sums(model, calls):
    """Sums and gathers of a group by gloo or NCCL, and by way of `OnHost` or the GPUs' memory."""
    group, device = group_of(model), model.backbone.device
    draw = torch.Generator().manual_seed(int(os.environ["RANK"]))
    parts, found = torch.randn(3, 5, 7, generator=draw).to(device), []
    group.share_memory(device)
    own = inbox._inboxes if device.type == "cuda" else {group.name: OnHost(group.name)}
    assert group.name in own
    for shared in ({}, own):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inbox, "_inboxes", shared)
            half = parts[0].to(torch.bfloat16)
            found.append([
                group.total(parts), group.reduce(half), group.gather(half, -1),
                group.gather(half, 0), group.first(parts.double()), group.first(half),
                group.total(parts.repeat(1, 300, 7)), group.total(parts[:1]),
            ])  # fmt: skip
    return found


def half(model, calls):
    """Logits of a text in half precision by split layers: one token after another, in windows, and
    beside other texts."""
    mesh = engines_of(model).mesh
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 128}
    model = wide("llama", torch.bfloat16, **sizes)
    split_model(model, mesh, teacher=True, gather=True)
    ids = prompt(40, 1)
    return [
        logits(model, ids, cuts, rows)
        for cuts, rows in (([1] * 40, 1), ([5] * 8, 1), ([1] * 40, 3))
    ]


def work(case, path):
    """What `case` asks of this rank."""
    if case["todo"] == "show":
        with path.with_suffix(".txt").open("w") as file:
            console = Console(file=file, quiet=os.environ["RANK"] != "0")
            generate_command(GenerateConfig(**case["settings"]), console)
        return None
    mesh, device = Mesh(1, case["tp"], case["pp"]), pick_device(case.get("device", "cpu"))
    with mesh.connected(device, 60.0, advice="Start it again"):
        load = {"stage_layers": case.get("stage_layers", []), "device": device}
        load["dtype"] = case.get("dtype", "auto")
        model = EarlyExitModel.from_pretrained(case["exits"], mesh=mesh, **load)
        done = globals()[case["todo"]](model, case["calls"])
        return {"stage": list(model.stage), "found": done, "size": size(model)}


def size(model):
    """Values of the backbone in memory."""
    return sum(p.numel() for p in model.model.parameters())


def run(rank: int, cases: list[dict], folder: Path) -> None:
    """Every case that this rank has a part in."""
    torch.set_num_threads(1)
    engine.draft_cost = lambda *_: 0.02  # for many drafts, as in conftest.py
    for case in cases:
        torch.compile = partial(COMPILE, backend=case.get("backend", "inductor"))
        processes = case.get("size", case["tp"] * case["pp"])
        if rank >= processes:
            continue
        become(rank, processes, case["port"])
        path = folder / f"{case['name']}-{rank}"
        try:
            torch.save(work(case, path), path.with_suffix(".pt"))
        except Exception as error:
            path.with_suffix(".error").write_text(f"{type(error).__name__}: {error}")
            if dist.is_initialized():
                dist.destroy_process_group()


def main(path: Path) -> None:
    """Run the ranks, wait for them."""
    cases = json.loads(path.read_text())
    number = max(case["tp"] * case["pp"] for case in cases)
    fresh = any(case.get("device") == "cuda" for case in cases)
    run_ranks(number, run, cases, path.parent, fresh=fresh)
