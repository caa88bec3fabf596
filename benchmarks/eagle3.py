"""Whether the package `speculators` computes what an exported draft exit does, logit for logit.

python benchmarks/eagle3.py --out benchmarks/results/eagle3-speculators.json

An exit of arch eagle3 on a real model, with random weights and a reduced vocabulary, is exported in
both forms. `speculators` 0.9.0, which wants older transformers, reads them in an environment of its
own (made in a temporary folder, or given with --python) and drafts chains from every token of a
text; its logits are held against the exit's own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
FORMS = ("speculators", "sglang")
STEPS, KNOWN = 3, 2000
TEXT = 129  # tokens; less the first, a block of the masks that speculators makes
NEEDS = ["speculators==0.9.0", "transformers<=5.19", "datasets<=5.1"]
TOLERANCE = 1e-3  # of logits in fp32: sums in another order


def export(folder: Path, base: str) -> None:
    """An exit on `base`, in both forms, and what it says to a text: inputs and logits."""
    from ee_tuning import EarlyExitModel, ExitConfig
    from ee_tuning.data import load_packed
    from ee_tuning.export import save_eagle3
    from ee_tuning.loading import load_tokenizer

    tokenizer = load_tokenizer(base)
    model = EarlyExitModel.from_base(base, ExitConfig("", "eagle3"), dtype=torch.float32)
    draft, draw = model.draft, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in draft.parameters():
            p += 0.5 * p.std() * torch.randn(p.shape, generator=draw) + 0.01
        size = model.config.vocab_size
        model.reduce_vocabulary(torch.randperm(size, generator=draw)[: min(KNOWN, size // 2)])
        draft.steps = STEPS
        rows = load_packed([str(ROOT / "demo/data/validation.jsonl[:3]")], tokenizer, TEXT, 0)
        ids = rows[0]["input_ids"][None]
        state = model.chain.descend(ids).to(0)
        logits = [draft.logits(features) for features in draft.predictions(state)]
    found = {"ids": ids, "states": torch.cat(state.sources, dim=-1)}
    found |= {f"logits.{step}": one.contiguous() for step, one in enumerate(logits)}
    save_file(found, folder / "expected.safetensors")
    for form in FORMS:
        save_eagle3(model, tokenizer, folder / form, str(Path(base).resolve()), form)


def check(folder: Path, base: str) -> dict[str, Any]:
    """What `speculators` makes of both forms, as it is installed here."""
    from speculators import SpeculatorModel

    expected = load_file(folder / "expected.safetensors")
    ids, states = expected["ids"], expected["states"]
    result: dict[str, Any] = {
        "versions": {name: version(name) for name in ("speculators", "transformers", "torch")},
        "tokens": ids.shape[1],
        "drafts_of_a_chain": STEPS,
        "tolerance": TOLERANCE,
        "forms": {},
    }
    for form in FORMS:
        place = folder / form if form == "speculators" else _converted(folder / form, base)
        model = SpeculatorModel.from_pretrained(str(place)).float().eval()
        model.load_verifier_weights()
        said: list[torch.Tensor] = []
        model.lm_head.register_forward_hook(lambda _, __, out, said=said: said.append(out))
        with torch.no_grad():
            model.forward(
                hidden_states=states[:, :-1],
                input_ids=ids[:, 1:],
                document_ids=torch.zeros_like(ids[:, 1:]),
                ttt_steps=STEPS,
            )
        result["forms"][form] = [_compare(model, said[k], expected, k) for k in range(STEPS)]
    worst = max(row["largest_difference"] for rows in result["forms"].values() for row in rows)
    result["largest_difference"] = worst
    result["equal"] = worst <= TOLERANCE
    return result


def _converted(folder: Path, base: str) -> Path:
    """The authors' form made into that of speculators by its own converter."""
    from speculators.convert.eagle.eagle3_converter import Eagle3Converter

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    place = folder.parent / "converted"
    counted = [layer + 1 for layer in layers]  # as hidden states
    given = {"validate": False, "eagle_aux_hidden_state_layer_ids": counted}
    Eagle3Converter().convert(str(folder), str(place), base, **given)
    return place


def _compare(model: Any, known: torch.Tensor, expected: Any, step: int) -> dict[str, Any]:
    """A step's logits (1, T − 1, N) and those of the exit, (1, T, V), by the layout's maps.

    The chain that begins at token i + 1 has its step j at token i + 1 + j.
    """
    tokens = torch.arange(known.shape[-1]) + model.d2t
    ours = expected[f"logits.{step}"]
    theirs = torch.full_like(ours, float("-inf"))[:, 1 + step :]
    theirs = theirs.index_copy(-1, tokens, known[:, : theirs.shape[1]])
    ours = ours[:, 1 + step :]
    assert torch.equal(theirs.isfinite(), ours.isfinite())
    assert torch.equal(model.t2d.nonzero().flatten(), tokens.sort().values)
    difference = (theirs - ours)[ours.isfinite()].abs().max().item()
    return {
        "places": ours.shape[1],
        "largest_difference": difference,
        "same_draft": (theirs.argmax(-1) == ours.argmax(-1)).float().mean().item(),
        "spread_of_logits": ours[ours.isfinite()].std().item(),
    }


def main() -> None:
    """Export here, check there, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "demo/model"))
    parser.add_argument("--python", help="of an environment that has speculators 0.9.0")
    parser.add_argument("--check", type=Path, help="a folder that was exported: run inside")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.check:
        print(json.dumps(check(args.check, args.model)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export(folder, args.model)
        python = args.python
        if not python:
            venv.create(folder / "venv", with_pip=True)
            python = str(folder / "venv/bin/python")
            subprocess.run([python, "-m", "pip", "install", "--quiet", *NEEDS], check=True)
        command = [python, __file__, "--check", str(folder), "--model", args.model]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    result["model"] = Path(args.model).name
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(not result["equal"])


if __name__ == "__main__":
    main()
