"""A random model whose exit says what its end says, as often as is wanted.

The exit has the end's norm and head, and the layers behind it give so little that the end mostly
agrees. Values alone change: a pass takes as long as before.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ee_tuning import EarlyExitModel
from ee_tuning.backbone import WRITES_BACK
from ee_tuning.decode.engines import engines_of

TEXTS, LENGTH = 4, 512  # random tokens by which the share is set
PROMPTS = 32  # to choose from
TRIED = 10  # shares that are looked at, each half as far away as the one before


@torch.no_grad()
def let_agree(model: EarlyExitModel, layer: int, share: float) -> float:
    """Change the exit at `layer`, and the layers behind, so that the end agrees with that share of
    what the exit says; gives the share that it is."""
    _say_as_the_end(model, layer)
    outputs = _outputs(list(model.backbone.layers)[layer:])
    draw = torch.Generator().manual_seed(2)
    texts = torch.randint(model.backbone.config.vocab_size, (TEXTS, LENGTH), generator=draw)
    least, most = 0.0, 1.0
    for _ in range(TRIED):
        factor = (least + most) / 2
        with ExitStack() as stack:
            for one in outputs:
                hook = one.register_forward_hook(lambda *call: call[-1] * factor)  # noqa: B023
                stack.callback(hook.remove)
            enough = _agreed(model, layer, texts).mean() > share
        least, most = (factor, most) if enough else (least, factor)
    for p in {p for one in outputs for p in one.parameters()}:
        p.mul_(factor)  # in place: another 7B model would not fit beside this one
    return float(_agreed(model, layer, texts).mean())


@torch.no_grad()
def prompt_that_agrees(
    model: EarlyExitModel, layer: int, share: float, length: int, number: int
) -> list[int]:
    """A prompt of that length: of some, the one with the share nearest to that among the next
    `number` tokens. A random model's greedy text goes through few tokens, more or less often."""
    draw = torch.Generator().manual_seed(3)
    prompts = torch.randint(model.backbone.config.vocab_size, (PROMPTS, length), generator=draw)
    greedy = {"mode": "full", "max_new_tokens": number, "eos_token_id": None, "compile": False}
    found = model.generate(prompts.to(model.device), **greedy)
    engines_of(model).clear()
    shares = _agreed(model, layer, found.sequences[:, :-1])[:, length - 1 :].mean(1)
    return prompts[int((shares - share).abs().argmin())].tolist()


def _say_as_the_end(model: EarlyExitModel, layer: int) -> None:
    """Let an exit say what the end would say of the hidden states there."""
    exit, backbone = model.exit(layer), model.backbone
    exit.norm.load_state_dict(backbone.norm.state_dict())
    if exit.spec.head == "own":
        exit.head.load_state_dict(backbone.head.state_dict())
    for name, mlp in getattr(exit, "mlp", {}).items():
        mlp.load_state_dict(backbone.layers[layer - 1].get_submodule(name).state_dict())
    if exit.segment is not None:
        for p in (p for one in _outputs([exit]) for p in one.parameters()):
            p.zero_()


def _outputs(modules: list[nn.Module]) -> list[nn.Module]:
    """Those whose products are added to the hidden states."""
    every = (named for module in modules for named in module.named_modules())
    return [one for name, one in every if name.rpartition(".")[2] in WRITES_BACK]


def _agreed(model: EarlyExitModel, layer: int, texts: Tensor) -> Tensor:
    """1 where the end agrees with an exit about what follows a token of texts (n, T), else 0."""
    rows = []
    for text in texts.to(model.device):
        out = model(text[None], output_exit_logits=True, output_logits=True)
        rows.append(out.logits[0].argmax(-1) == out.exit_logits[layer][0].argmax(-1))
    return torch.stack(rows).float()
