"""Put the tables of benchmarks/results into the docs and the README.

python benchmarks/table.py
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import speeds

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- {}: begin -->", "<!-- {}: end -->"
PLAIN = {
    "arch": "mlp", "micro_batch_size": "4", "head": "own", "backbone_precision": "same",
    "exit_precision": "same", "exit_vocab": "0", "optimizer": "adamw", "master_weights": "fp32",
}  # fmt: skip


def steps() -> str:
    """Speed, memory and parts of every measured tuning step."""
    lines = [
        "| GPU | shape | exits | flags | tokens/s (min–max) | peak GiB | of the bf16 ceiling | "
        "backbone (TFLOP/s) | exits (TFLOP/s) | heads (TFLOP/s) | optimizer |",
        "|---" * 11 + "|",
    ]
    machines, profiles = set(), []
    for path in sorted(RESULTS.glob("*.json")):
        result: dict[str, Any] = json.loads(path.read_text())
        if "flop_per_token" not in result:
            continue
        given, rate = result["settings"], result["tokens_per_second"]
        flags = [
            f"`--{k.replace('_', '-')} {given[k]}`"
            for k, v in PLAIN.items()
            if given.get(k, v) != v
        ]
        flop, top = result["flop_per_token"]["sum"], result["matmul_tflops"]
        share = flop * rate["median"] / top / 1e12
        tokens = int(given["global_batch_size"]) * int(given["seq_length"])
        parts = list(result["seconds_per_step"].values())
        backbone, exits, heads = (
            f"{v:.2f} s ({result['flop_per_token'][name] * tokens / v / 1e12:.0f})"
            for name, v in (("backbone", parts[0]), ("exits", parts[1]), ("head", parts[3]))
        )
        gpu = result["hardware"].split()[1]
        begin = f"| {gpu} | {given['shape']} | {given['layers'].count(',') + 1} | "
        lines.append(
            f"{begin}{' '.join(flags) or '–'} | {_rate(result)} | {result['peak_gib']} | "
            f"{share:.0%} of {top} TFLOP/s | {backbone} | {exits} | {heads} | {parts[2]:.2f} s |"
        )
        given_steps = f"median of {given['steps']} steps"
        machines.add(f"{result['hardware']}; {result['versions']}; {given_steps}")
        if "seconds_on_gpu" in result:
            seconds = ", ".join(f"{k} {v:.2f}" for k, v in result["seconds_on_gpu"].items())
            profiles.append(
                f"GPU seconds of a step of {given['shape']} with {' '.join(flags)}, by operation: "
                f"{seconds}; fp8 products run at {result['fp8_matmul_tflops']:,} TFLOP/s alone."
            )
        if "baseline" in result:
            plain = result["baseline"]
            lines.append(
                f"{begin}plain PyTorch | {_rate(plain)} | {plain['peak_gib']} |" + " – |" * 5
            )
    return "\n\n".join(["\n".join(lines), *sorted(machines), *profiles])


def losses(runs: dict[str, Any]) -> str:
    """Final losses per exit, and how far each is from the first run's."""
    plain = next(iter(runs.values()))["after"]
    lines = [
        "| tuned with | " + " | ".join(f"exit {layer}" for layer in plain) + " |",
        "|---" * (len(plain) + 1) + "|",
    ]
    for name, run in runs.items():
        cells = [f"{v:.4f} ({v / plain[k] - 1:+.2%})" for k, v in run["after"].items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def pre_trained(base: dict[str, Any]) -> str:
    """What a backbone of `savings.pretrain` is."""
    return (
        f"Backbone: {base['parameters']:,} parameters, {base['layers']} layers, pre-trained for "
        f"{base['train_seconds']:.0f} s ({base['tokens']:,} tokens), its own held-out loss "
        f"{base['nats_per_token']:.2f}"
    )


def savings(name: str = "savings") -> str:
    """Final losses of the same exits tuned with each saving."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    runs = result["runs"]
    given = next(iter(runs.values()))["settings"]
    return "\n".join(
        [
            losses(runs),
            "",
            f"{result['hardware']}; {result['versions']}. {pre_trained(result['backbone'])}. "
            f"{given['steps']} steps of {given['global_batch_size']} × {given['seq_length']} "
            f"tokens, `{given['arch']}` exits with own heads, one run each; nats per token.",
        ]
    )


def decoding() -> str:
    """Speed of every way to decode, and transformers' in the same run."""
    lines = [
        "| shape | way | tokens/s (min–max) | ms per token of a row | of the copy bandwidth | "
        "first token |",
        "|---" * 6 + "|",
    ]
    notes = []
    for path in sorted(RESULTS.glob("decode-*.json")):
        result: dict[str, Any] = json.loads(path.read_text())
        shape, arch = result["settings"]["shape"], result["settings"]["arch"]
        shape += "" if arch == "mlp" else f", `{arch}` exits"
        for name, found in result["decoding"].items():
            share = f"{found['of_copy']:.0%}" if "of_copy" in found else "–"
            if "drafts_kept" in found:  # what was aimed at is in the name
                name = f"{name.rpartition(', ')[0]}, {found['drafts_kept']:.0%} kept"
            lines.append(
                f"| {shape} | {name} | {_rate(found)} | {found['ms_per_step']:.2f} | {share} "
                f"| {found['first_token_ms']:.1f} ms |"
            )
        for name, found in result.get("transformers", {}).items():
            lines.append(f"| {shape} | transformers, {name} | {_rate(found)} | – | – | – |")
        note = (
            f"{shape}: {result['hardware']}; {result['versions']}; bf16, greedy, prompts of "
            f"{result['settings']['prompt_length']} tokens, {result['settings']['new_tokens']} new "
            f"ones each, {result['settings']['rounds']} rounds. A copy reaches "
            f"{result['copy_gb_per_second']:,} GB/s there, bytes read and written."
        )
        if "prefill" in result:
            long = result["prefill"]
            note += (
                f" A prompt of {long['prompt_tokens']:,} tokens takes {long['ms']:.1f} ms, "
                f"{long['share_of_transformers_speed']:.0%} of transformers' speed."
            )
        notes.append(note)
    return "\n\n".join(["\n".join(lines), *notes])


def speedup() -> str:
    """What tuned exits bring to decoding on a real model, and what they cost."""
    result = json.loads((RESULTS / "speedup.json").read_text())
    lines = [
        "| exit | way | tokens/s | against full depth (min–max) | mean depth "
        "| texts identical | tokens identical |",
        "|---" * 7 + "|",
    ]
    for arch, run in result["runs"].items():
        for name, row in run["ways"].items():
            same, agrees = row.get("identical_texts"), row.get("text_agreement")
            texts = "–" if same is None else f"{same} of {run['prompts']}"
            tokens = "–" if agrees is None else f"{agrees:.1%}"
            low, high = row["spread"]
            lines.append(
                f"| `{arch}` | {name} | {row['tokens_per_second']:,.0f} "
                f"| {row['speedup']:.2f}× ({low:.2f}–{high:.2f}) | {row['mean_layer']:.1f} "
                f"| {texts} | {tokens} |"
            )
    given = result["settings"]
    return "\n".join(
        [
            *lines,
            "",
            f"{result['hardware']}; {result['versions']}. {pre_trained(result['backbone'])}; one "
            f"exit, at layer {given['layers']}, tuned {given['steps']} steps. bf16, batch 1, "
            f"{given['prompts']} held-out prompts of 64 tokens, {given['new_tokens']} new ones "
            f"each; the spread is that of {given['groups']} groups of prompts.",
        ]
    )


def _rate(found: dict[str, Any]) -> str:
    rate = found["tokens_per_second"]
    return f"{rate['median']:,.0f} ({rate['min']:,.0f}–{rate['max']:,.0f})"


def parallel(*names: str) -> str:
    """The step in several layouts of processes, against one process; of files of one machine."""
    files = [json.loads((RESULTS / f"{name}.json").read_text()) for name in names]
    result, found_in = files[0], {}
    for one in files:
        found_in |= one["layouts"]
    lines = [
        "| layout | tokens/s | against one process | peak GiB of a rank | idle | ideal "
        "| losses differ by | norms by |",
        "|---" * 8 + "|",
    ]
    for layout, found in found_in.items():
        if "speedup" not in found:
            from parallel import compare  # takes longer to import than all else here

            compare(found, found_in["one"], len(found["peak_gib"]))
        idle, differ = found["idle"], [found[f"{v}_differ_by"] for v in ("losses", "norms")]
        peak = f"{max(found['peak_gib']):.1f}" if any(found["peak_gib"]) else "–"
        lines.append(
            f"| `{layout}` | {_rate(found)} | {found['speedup']:.2f} × | {peak} | "
            f"{idle['measured']:.1%} | {idle['ideal']:.1%} | {differ[0]:.1g} | {differ[1]:.1g} |"
        )
    given = result["settings"]
    backend = "gloo" if result["hardware"].startswith("CPU") else "NCCL"
    return "\n".join(
        [
            *lines,
            "",
            f"{result['hardware']}; {result['versions']}; {backend}. Shape {given['shape']}, "
            f"{given['precision'].replace('auto', 'bf16')}, {given['layers'].count(',') + 1} "
            f"exits, steps of {given['global_batch_size']} × {given['seq_length']} tokens; "
            f"{given['steps']} of {len(result['layouts']['one']['losses'])} steps timed.",
        ]
    )


def planned() -> str:
    """Layouts of several GPUs against what `ee-tuning plan` and the simulator say of them."""
    lines = [
        "| shape | layout | tokens/s | `plan` | GiB of the fullest GPU | `plan` "
        "| idle, a step by itself | simulated | its seconds | simulated |",
        "|---" * 10 + "|",
    ]
    runs = []
    for path in sorted(RESULTS.glob("parallel-four*.json")):
        result = json.loads(path.read_text())
        rows = {name: found for name, found in result["layouts"].items() if name != "one"}
        runs += [(result["settings"]["shape"], *row) for row in rows.items()]
    for shape, layout, found in sorted(runs, key=lambda run: (len(run[0]), run[0])):
        plan, idle = found["plan"], found["idle"]
        rate, most = found["tokens_per_second"]["median"], max(found["peak_gib"])
        rate_off, gib_off = plan["tokens_per_second"] / rate - 1, plan["gib"] / most - 1
        off = idle["simulated_seconds"] / idle["seconds"] - 1
        lines.append(
            f"| {shape} | `{layout}` | {rate:,} | {plan['tokens_per_second']:,} ({rate_off:+.0%}) "
            f"| {most:.1f} | {plan['gib']:.1f} ({gib_off:+.0%}) | {idle['measured']:.1%} "
            f"| {idle['ideal']:.1%} | {idle['seconds']:.2f} "
            f"| {idle['simulated_seconds']:.2f} ({off:+.0%}) |"
        )
    return "\n".join(lines)


def pipeline() -> str:
    """One step of two CPU stages, against the simulator fed with its parts."""
    lines = [
        "| exits | stages balanced by | micro-batches | seconds | simulated | idle | simulated |",
        "|---" * 7 + "|",
    ]
    for path in sorted(RESULTS.glob("pipeline-cpu-*.json"), reverse=True):
        result = json.loads(path.read_text())
        given = result["settings"]
        for name, found in result["layouts"].items():
            balance, idle = "seconds" if "measured" in name else "FLOP", found["idle"]
            lines.append(
                f"| `--layers {given['layers']} --head {given['head']}` | {balance} "
                f"| {name.partition('batch')[2]} | {idle['seconds']:.2f} "
                f"| {idle['simulated_seconds']:.2f} "
                f"| {idle['measured']:.1%} | {idle['ideal']:.1%} |"
            )
    return "\n".join([*lines, "", f"{result['hardware']}; {result['versions']}."])


def layouts() -> str:
    """The best layouts of a large run, by simulation."""
    from scaling import table  # takes longer to import than all else here

    return table(best=3)


def calibration() -> str:
    """Every few steps of a calibration's walk, and what it found."""
    result = json.loads((RESULTS / "calibrate-cpu.json").read_text())
    found, settings = result["calibration"], result["settings"]
    lines = [
        "| threshold | mean depth | mean loss | p | Hoeffding–Bentkus |",
        "|---" * 5 + "|",
    ]
    steps, few = found["path"], max(1, len(found["path"]) // 8)
    for step in [*steps[:-2:few], *steps[-2:]]:
        threshold = ", ".join(f"{value:.3f}" for value in step["thresholds"].values())
        figures = f"{step['risk']:.4f} | {step['p']:.4f} | {step['hoeffding-bentkus']:.4f}"
        lines.append(f"| {threshold} | {step['depth']:.1f} | {figures} |")
    report = found["report"]
    answer = ", ".join(f"{value:.3f}" for value in found["thresholds"].values())
    lines += [
        "",
        f"Risk `{found['risk']}`, epsilon {found['epsilon']:g}, delta {found['delta']:g}, "
        f"{found['n']} of {settings['prompts']:,} prompts test: the answer is {answer}. On "
        f"{report['n']} prompts that had no part in it the risk is {report['risk']:.4f} "
        f"({report['low']:.4f}–{report['high']:.4f}), the mean depth {report['depth']:.1f}. "
        f"{found['machine']}; {found['max_new_tokens']} new tokens each; loading included it took "
        f"{result['seconds']:.0f} s by the clock, "
        f"{result['seconds_of_cores']:.0f} of a core's time.",
    ]
    return "\n".join(lines)


def written(name: str) -> str:
    """What `experiments.py` or `quality.py` wrote."""
    text = (RESULTS / name).read_text(encoding="utf-8")
    return text.replace("## ", "### ").strip()


TABLES = {
    "../README.md": {"real": speeds.table},
    "experiments.md": {
        "quality": partial(written, "quality-smollm2/quality.md"),
        "tables": partial(written, "experiments-smollm2/tables.md"),
    },
    "calibration.md": {"calibration": calibration},
    "efficiency.md": {
        "steps": steps,
        "savings": savings,
        "savings-cpu": partial(savings, "savings-cpu"),
    },
    "decoding.md": {"speed": decoding, "speedup": speedup},
    "scaling.md": {
        "parallel": partial(parallel, "parallel-cpu"),
        "parallel-gpu": partial(parallel, "parallel-gpu"),
        "parallel-gpu-pp": partial(parallel, "parallel-gpu-pp"),
        "parallel-gpu-check": partial(parallel, "parallel-gpu-check"),
        "parallel-four": partial(
            parallel, "parallel-four-one", "parallel-four-two", "parallel-four"
        ),
        "planned": planned,
        "pipeline": pipeline,
        "layouts": layouts,
    },
}


def updated(text: str, doc: str) -> str:
    """`text` of a doc with its tables between their marks."""
    for name, table in TABLES[doc].items():
        begin, end = BEGIN.format(name), END.format(name)
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{table()}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for name in TABLES:
        (DOCS / name).write_text(updated((DOCS / name).read_text(), name))
