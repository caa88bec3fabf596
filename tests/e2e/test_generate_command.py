"""`ee-tuning generate`: conversations, system prompts, empty prompts, penalties."""

from __future__ import annotations

import io
import shutil
import warnings

import pytest
from helpers.lookups import let_texts_draft
from transformers import AutoModelForCausalLM, AutoTokenizer

from ee_tuning.cli import main
from ee_tuning.errors import Notice

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> str:
    """A file with a chat template."""
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(TEMPLATE)
    return str(path)


@pytest.fixture(scope="module")
def exits(tmp_path_factory, base) -> str:
    """Exits of a backbone whose tokenizer has a BOS token, which it does not add."""
    folder = tmp_path_factory.mktemp("conversation")
    shutil.copytree(base, folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.bos_token = "<bos>"
    tokenizer.save_pretrained(folder / "base")
    main(["init", "--model", str(folder / "base"), "--layers", "2", "--out", str(folder / "e")])
    return str(folder / "e")


def run(exits: str, *args: str) -> list[str]:
    return ["generate", "--exits", exits, "--mode", "full", "--max-new-tokens", "6", *args]


def greedy(exits: str, prompt: str, **more) -> str:
    """What transformers' own ``generate`` makes of a prompt."""
    base = exits.removesuffix("e") + "base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = tokenizer(prompt or "<bos>", return_tensors="pt").input_ids
    out = model.generate(ids, do_sample=False, max_new_tokens=6, **more)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_conversation_keeps_what_was_said(exits, template, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("def a\n\nprint(b)\n"))
    chat = ("--chat", "--chat-template", template, "--system", "Be brief.")
    main(run(exits, *chat))
    printed = capsys.readouterr().out
    prompt = "[system] Be brief.\n[user] def a\n[assistant] "
    first = greedy(exits, prompt)
    second = greedy(exits, f"{prompt}{first.strip()}\n[user] print(b)\n[assistant] ")
    assert "[user]" not in printed
    assert printed.count("left at layer") == 2
    for reply in (first, second):
        assert reply.strip() in printed


def test_one_turn_of_a_chat_is_printed_with_its_prompt(exits, template, capsys):
    main(run(exits, "--chat", "--chat-template", template, "--prompt", "def a"))
    prompt = "[user] def a\n[assistant] "
    assert prompt + greedy(exits, prompt) in capsys.readouterr().out


def test_an_empty_prompt_begins_with_bos(exits, capsys):
    main(run(exits, "--prompt", ""))
    assert greedy(exits, "").strip() in capsys.readouterr().out


def test_an_empty_prompt_without_bos_is_refused(base, tmp_path, capsys):
    main(["init", "--model", base, "--layers", "2", "--out", str(tmp_path / "e")])
    with pytest.raises(SystemExit):
        main(run(str(tmp_path / "e"), "--prompt", ""))
    assert "the prompt is empty, and the tokenizer has no BOS token" in capsys.readouterr().err


def test_repetition_penalty(exits, capsys):
    expected = greedy(exits, "def a", repetition_penalty=5.0)
    assert expected != greedy(exits, "def a")
    main(run(exits, "--prompt", "def a", "--repetition-penalty", "5"))
    assert "def a" + expected in capsys.readouterr().out


def test_min_p_of_one_is_greedy(exits, capsys):
    main(run(exits, "--prompt", "def a", "--do-sample", "--top-k", "0", "--min-p", "1"))
    assert "def a" + greedy(exits, "def a") in capsys.readouterr().out


@pytest.mark.parametrize("threshold", ["1", "0.01"])
def test_a_text_drafts_for_itself(exits, threshold, monkeypatch, capsys):
    """Whether that pays or not: the text is full depth's, the legend says what was looked up."""
    let_texts_draft(monkeypatch, most=3)
    long = ["--prompt", "def a def a def a", "--max-new-tokens", "60"]
    main(run(exits, *long))
    full = capsys.readouterr().out.split("left at layer")[0]
    main(run(exits, *long, "--mode", "speculative", "--threshold", threshold, "--lookup"))
    text, legend = capsys.readouterr().out.split("left at layer")
    assert text == full
    assert "lookup (" in legend


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", "x", "--lookup"], "lookup is not possible with mode full"),
        (["--prompt", "x", "--lookup", "--mode", "threshold"], "lookup is not possible with mode"),
        (["--prompt", "x", "--system", "s"], "give --chat"),
        (["--prompt", "x", "--do-sample", "--min-p", "2"], "min_p is 2: it must be"),
        (["--prompt", "x", "--repetition-penalty", "0"], "penalty"),
    ],
)
def test_what_makes_no_sense_is_refused(exits, args, message, capsys):
    with pytest.raises(SystemExit):
        main(run(exits, *args))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("ee-tuning: ")
    assert message in line


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], ""),
        (["--threshold", "0.5"], "threshold"),
        (["--exit-layers", "2", "--min-depth", "1"], "exit_layers and min_depth"),
        (["--max-pending", "3", "--measure", "margin"], "max_pending and measure"),
    ],
)
def test_settings_that_the_mode_ignores_are_named(exits, flags, named, capsys):
    """And they change nothing."""

    def said(*args):
        with warnings.catch_warnings(record=True) as warned:
            main(run(exits, "--prompt", "def a", *args))
        text = capsys.readouterr().out.rpartition(",")[0]  # the speed is behind it
        return text, [str(one.message) for one in warned if one.category is Notice]

    assert said(*flags) == (said()[0], [f"mode full ignores {named}"] * bool(named))
    fixed = "--mode", "fixed"
    named = named if "exit_layers" not in named else ""
    assert said(*fixed, *flags) == (said(*fixed)[0], [f"mode fixed ignores {named}"] * bool(named))


def test_where_rounding_may_change_a_speculative_text_it_is_said(exits, monkeypatch, capsys):
    args = run(exits, "--prompt", "def a", "--mode", "speculative")
    main(args)
    assert "rounding" not in capsys.readouterr().out
    monkeypatch.setattr("ee_tuning.invariant.layers.can_multiply", lambda *_: False)
    main(args)
    said = " ".join(capsys.readouterr().out.split())
    assert "but for rounding: torch.float32 on this cpu has no product of one order" in said
