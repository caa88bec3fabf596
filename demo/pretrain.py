"""Pre-train the demo's backbone: a small Llama for Python code, with its own tokenizer.

The text is the Python source installed on the machine that runs the script (see `corpus.py`); the
held-out part of the standard library goes to ``--data-out`` for the demo to tune on.

    python demo/pretrain.py --minutes 6
    python demo/pretrain.py --steps 20 --layers 2 --max-files 200 --batch-tokens 4096 --evals 0
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
import transformers
from corpus import CONTEXT, VOCABULARY, build_corpus, encode, train_tokenizer, write_data
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

START = time.perf_counter()


def batches(tokens: torch.Tensor, rows: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of windows (inputs and shifted targets): every epoch, a new cut and order."""
    reach = torch.arange(CONTEXT + 1, device=tokens.device)
    draw = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(CONTEXT, (), generator=draw))
        count = (len(tokens) - offset - 1) // CONTEXT
        order = torch.randperm(count, generator=draw).to(tokens.device) * CONTEXT + offset
        for starts in order[: count - count % rows].view(-1, rows):
            yield tokens[starts[:, None] + reach].long()


def loss_of(model: LlamaForCausalLM, rows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Next-token cross-entropy, attention reaching over document borders; targets < 0 are left."""
    logits = model(input_ids=rows[:, :-1].clamp(min=0), use_cache=False).logits
    targets = rows[:, 1:].flatten()
    return functional.cross_entropy(
        logits.float().flatten(0, 1), targets, ignore_index=-100, reduction=reduction
    )


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: torch.Tensor, size: int) -> dict[str, float]:
    """Loss on the packed held-out texts of `size` bytes: nats per token and bits per byte."""
    inputs = functional.pad(tokens.long(), (1, -len(tokens) % CONTEXT), value=-100)
    inputs[0] = 0
    rows = inputs.unfold(0, CONTEXT + 1, CONTEXT)
    with torch.compiler.set_stance("force_eager"):
        nats = sum(loss_of(model, part, "sum").item() for part in rows.split(16))
    return {"nats_per_token": nats / len(tokens), "bits_per_byte": nats / math.log(2) / size}


def train(
    model: LlamaForCausalLM,
    tokens: torch.Tensor,
    held: tuple[torch.Tensor, int],
    args: argparse.Namespace,
) -> dict:
    """Train until the step or the time budget is spent; return steps, speed and loss curves."""
    device, cuda = tokens.device, tokens.is_cuda
    rows = batches(tokens, args.batch_tokens // CONTEXT, args.seed)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [{"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, *others], lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=cuda
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cuda)
    if cuda if args.compile is None else args.compile:
        for layer in model.model.layers:  # one graph for all layers: quick to compile
            layer.compile(dynamic=False)
    with autocast:  # compile before the clock of the schedule starts
        loss_of(model, next(rows)).backward()
    optimizer.zero_grad()
    begin = logged = time.perf_counter()
    budget = max(args.minutes * 60 - (begin - START), 30.0)
    record: dict = {"steps": 0, "curve": [], "held_out_curve": []}
    step, recent, next_eval = 0, torch.zeros((), device=device), 1
    while (done := step / args.steps if args.steps else (logged - begin) / budget) < 1:
        now = done if args.steps else (time.perf_counter() - begin) / budget
        scale = now / 0.02 if now < 0.02 else 0.55 + 0.45 * math.cos(math.pi * (now - 0.02) / 0.98)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * max(scale, 1e-3)
        with autocast:
            loss = loss_of(model, next(rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent += loss.detach()
        step += 1
        if step % args.log_every == 0 or step == args.steps:
            count = (step - 1) % args.log_every + 1
            mean, previous = recent.item() / count, logged
            logged = time.perf_counter()
            speed = count * args.batch_tokens / (logged - previous)
            record["curve"].append([step, round(mean, 4)])
            print(f"step {step} loss {mean:.4f} tokens/s {speed:,.0f} ({done:.0%})", flush=True)
            recent.zero_()
            if done * args.evals >= next_eval and args.evals:
                with autocast:
                    point = held_out_loss(model, *held)
                record["held_out_curve"].append([step, round(point["nats_per_token"], 4)])
                print(f"step {step} held-out {point}", flush=True)
                next_eval += 1
                logged = time.perf_counter()  # so that the speed is that of training alone
    seconds, seen = time.perf_counter() - begin, step * args.batch_tokens
    record |= {"steps": step, "tokens": seen, "epochs": round(seen / len(tokens), 2)}
    return record | {"train_seconds": round(seconds, 1), "tokens_per_second": round(seen / seconds)}


CARD = """# Demo backbone: a {parameters:,}-parameter Llama for Python code

Made by `demo/pretrain.py` so that the early-exit demo has something small to tune. For the demo and
for tests only: it completes Python-looking text, knows no facts, follows no instructions, was not
checked for safety, and its output may repeat lines of its training text.

| | |
| --- | --- |
| Architecture | Llama, {layers} layers, hidden {hidden_size}, MLP {intermediate_size}, tied |
| Heads | {heads}, half as many for keys and values |
| Context, vocabulary | 1024 tokens, {vocabulary} byte-level BPE tokens trained on the same text |
| Training text | {train_files:,} files, {train_bytes:,} bytes, {corpus_tokens:,} tokens |
| Training | {steps:,} steps of {batch_tokens:,} tokens: {tokens:,} tokens, {epochs} epochs |
| Optimizer | AdamW, peak rate {lr}, 2% warm-up, cosine to 10%, weight decay 0.1, clip 1.0 |
| Last training loss | {last_loss} nats per token |
| Held-out loss | {nats_per_token:.4f} nats per token, {bits_per_byte:.4f} bits per byte |
| Ran on | {hardware}: {train_seconds} s of training, {wall_seconds} s in all |
| Versions | {versions} |

**Data and licences.** Python files of the standard library and of installed distributions whose
stated licence is permissive; `licences.json` names each with its version and licence. Vendored
folders and files that mention the GPL in their head are left out.

**Held out.** {held_out_files} files of the standard library ({holdout:.0%}, chosen by the SHA-256
of their path; not tests, IDLE, `encodings` or `pydoc_data`) were never trained on, nor were
{dropped_as_near_copies} files of which over 20% of the longer lines occur in them (listed in
`training.json`). Those up to 40 kB ({held_out_bytes:,} bytes) are the demo's data. The held-out
loss is that of the saved bf16 weights on all of them, packed, end tokens included. It steered no
choice in the run. Tests of and code that calls held-out modules may be in the training text.

**Packing.** Files are joined with `<|endoftext|>` and cut into windows of 1024 tokens; attention is
causal over the whole window and is not stopped at a file's border.
"""


def main() -> None:
    """Collect, train the tokenizer and the model, evaluate what was saved, write the records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo/model"))
    parser.add_argument("--data-out", type=Path, default=Path("demo/data"))
    parser.add_argument("--minutes", type=float, default=6.0, help="from start to end of training")
    parser.add_argument("--steps", type=int, help="train for so many steps instead")
    parser.add_argument("--batch-tokens", type=int, default=131072)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8, help="twice as many as key-value heads")
    parser.add_argument("--holdout", type=float, default=0.4, help="share of the standard library")
    parser.add_argument("--max-files", type=int, help="train on at most so many files")
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--evals", type=int, default=10, help="held-out evaluations on the way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - START:6.1f} s] {what}", flush=True)

    corpus, held, facts = build_corpus(args.holdout, args.max_files, args.seed)
    write_data(args.data_out, held)
    (args.out / "licences.json").write_text(json.dumps(facts.pop("licences"), indent=1) + "\n")
    say(f"collected {facts['train_files']:,} files, {facts['train_bytes']:,} bytes")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    texts = list(corpus.values())
    tokenizer = train_tokenizer(texts, args.out)
    say(f"tokenizer of {tokenizer.get_vocab_size()} tokens")
    tokens = encode(tokenizer, texts).to(device)
    held_size = sum(len(t.encode()) for t in held.values())
    held_tokens = encode(tokenizer, list(held.values())).to(device), held_size
    say(f"{len(tokens):,} tokens to train on, {len(held_tokens[0]):,} held out")

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=args.hidden_size,
            intermediate_size=args.intermediate_size,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.heads // 2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            rms_norm_eps=1e-5,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    ).to(device)
    record = train(model, tokens, held_tokens, args)
    model.to(torch.bfloat16).save_pretrained(args.out)
    saved = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(device).eval()
    final = held_out_loss(saved, *held_tokens)
    say(f"saved; held out: {final}")

    packages = (torch, transformers, tokenizers)
    versions = [f"{p.__name__} {p.__version__}" for p in packages]
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU {os.cpu_count()}"
    record |= {**facts, **final}
    record |= {
        "parameters": model.num_parameters(),
        "layers": args.layers,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.intermediate_size,
        "heads": args.heads,
        "vocabulary": VOCABULARY,
        "corpus_tokens": len(tokens),
        "held_out_tokens": len(held_tokens[0]),
        "lr": args.lr,
        "held_out_bytes": held_size,
        "holdout": args.holdout,
        "batch_tokens": args.batch_tokens,
        "seed": args.seed,
        "last_loss": record["curve"][-1][1],
        "hardware": hardware,
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "wall_seconds": round(time.perf_counter() - START, 1),
    }
    (args.out / "training.json").write_text(json.dumps(record) + "\n")
    (args.out / "README.md").write_text(CARD.format(**record))


if __name__ == "__main__":
    main()
