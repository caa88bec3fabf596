"""`generate` follows transformers' conventions."""

import io
import threading
import warnings

import numpy
import pytest
import torch
import transformers
from helpers.families import tiny
from helpers.models import early_exit, logits_from_scratch
from helpers.prompts import padded, prompt
from packaging.version import Version
from rich.console import Console
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)
from transformers.utils import logging

from ee_tuning import EarlyExitModel, ExitConfig, UserError
from ee_tuning.commands.generate import DepthStreamer
from ee_tuning.decode.engines import engines_of
from ee_tuning.decode.sequences import Sequences
from ee_tuning.decode.text import TextStream
from ee_tuning.errors import Notice
from ee_tuning.loading import load_tokenizer


class Streamer:
    def __init__(self):
        self.seen = []

    def put(self, ids):
        self.seen.extend(ids.flatten().tolist())

    def end(self):
        self.seen.append("end")


def test_streaming_and_callbacks_see_every_token():
    model, seen, streamer = early_exit(), [], Streamer()
    ids = torch.tensor([[5, 9, 11]])
    out = model.generate(
        ids, threshold=0.02, max_new_tokens=6, streamer=streamer,
        on_token=lambda row, token: seen.append((row, token.exit_layer)),
    )  # fmt: skip
    assert streamer.seen == [*out.sequences[0].tolist(), "end"]
    assert seen == [(0, layer) for layer in out.exit_layers[0].tolist()]


def test_a_streamer_is_read_while_a_thread_generates(base, tokenizer):
    model = EarlyExitModel.from_base(base, ExitConfig("2", arch="norm"))
    inputs = tokenizer("def function", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    settings = {"mode": "full", "max_new_tokens": 8, "eos_token_id": None}
    thread = threading.Thread(
        target=model.generate, kwargs={**inputs, **settings, "streamer": streamer}
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(model.generate(**inputs, **settings).sequences[0])


class Counted(list):
    """Counts the items of it that are copied."""

    copied = 0

    def __getitem__(self, key):
        found = super().__getitem__(key)
        self.copied += len(found) if isinstance(key, slice) else 0
        return found

    def __iter__(self):
        self.copied += len(self)
        return super().__iter__()


@pytest.mark.parametrize("mode", ["full", "threshold", "speculative"])
@pytest.mark.parametrize("stop", [None, "no such words"])
def test_a_long_text_is_not_copied_for_each_of_its_tokens(tokenizer, monkeypatch, mode, stop):
    """To look whether it ends there: the second half of a text has as many copied as the first."""
    base = tiny("llama", vocab_size=300, max_position_embeddings=256)
    model = EarlyExitModel.from_base(base, ExitConfig("2,3", arch="norm")).eval()
    rows, enter = [], Sequences.enter

    def counted(self, *args):
        row = enter(self, *args)
        row.ids = Counted(row.ids)
        rows.append(row)
        return row

    monkeypatch.setattr(Sequences, "enter", counted)
    stops = {"stop_strings": [stop], "tokenizer": tokenizer} if stop else {}
    for number in (100, 200):
        model.generate(
            torch.tensor([prompt(5)]), mode=mode, threshold=0.0, max_pending=3,
            max_new_tokens=number, eos_token_id=None, **stops,
        )  # fmt: skip
    short, long = (row.ids.copied for row in rows)
    assert long <= 2.2 * short  # at full depth nothing is


def test_end_token_and_stop_strings_end_generation(base, tokenizer):
    model = EarlyExitModel.from_base(base, ExitConfig("2", arch="norm"))
    ids = tokenizer("def function", return_tensors="pt").input_ids
    free = model.generate(ids, mode="full", max_new_tokens=8, eos_token_id=None).sequences[0]
    new = free[ids.shape[1] :]
    stopped = model.generate(ids, mode="full", max_new_tokens=8, eos_token_id=new[2].item())
    assert stopped.sequences.shape[1] <= ids.shape[1] + 3
    text = tokenizer.decode(new[1:3])  # spans two tokens
    for mode in ("full", "speculative"):
        out = model.generate(
            ids, mode=mode, threshold=0.0, max_new_tokens=8, stop_strings=[text],
            tokenizer=tokenizer,
        )  # fmt: skip
        assert text in tokenizer.decode(out.sequences[0, ids.shape[1] :])
        assert text not in tokenizer.decode(out.sequences[0, ids.shape[1] : -1])
        config = GenerationConfig(max_new_tokens=8, stop_strings=[text])
        same = model.generate(ids, config, mode=mode, threshold=0.0, tokenizer=tokenizer)
        assert torch.equal(same.sequences, out.sequences)


def test_rows_that_end_are_padded():
    model = early_exit()
    prompts = [prompt(4, 1), prompt(6, 2)]
    ids, mask = padded(prompts)
    free = model.generate(
        ids, attention_mask=mask, mode="full", max_new_tokens=9, eos_token_id=None
    )
    row = free.sequences[0, 6:].tolist()
    end = next(token for token in row if token not in free.sequences[1, 6:].tolist())
    length = row.index(end) + 1
    given = {"attention_mask": mask, "max_new_tokens": 9, "eos_token_id": end, "pad_token_id": 77}
    out = model.generate(ids, mode="full", **given)
    expected = model.backbone.model.generate(ids, do_sample=False, **given)
    assert torch.equal(out.sequences, expected)
    assert (out.sequences[0, 6 + length :] == 77).all()
    assert (out.exit_layers[0, length:] == 0).all()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"max_new_tokens": 7},
        {"max_new_tokens": 7, "eos_token_id": []},
        {"max_length": 17},
        {"generation_config": GenerationConfig(max_new_tokens=5, repetition_penalty=1.8)},
        {"max_new_tokens": 9, "min_new_tokens": 6, "eos_token_id": [7, 40, 41, 42, 43]},
        {"max_new_tokens": 8, "no_repeat_ngram_size": 1},
        {"max_length": 12, "forced_eos_token_id": 33},
        {"max_new_tokens": 20, "stopping_criteria": [MaxLengthCriteria(9)]},
        {"max_length": 14, "min_length": 11, "eos_token_id": list(range(3, 60))},
        {"generation_config": GenerationConfig(max_length=12, forced_eos_token_id=33)},
    ],
)
def test_transformers_arguments_mean_what_they_mean_there(kwargs):
    model = early_exit()
    ids, mask = padded([prompt(4, 1), prompt(6, 2)])
    common = {"eos_token_id": None, **kwargs}
    out = model.generate(ids, attention_mask=mask, mode="full", **common)
    expected = model.backbone.model.generate(ids, attention_mask=mask, do_sample=False, **common)
    assert torch.equal(out.sequences, expected)


def test_a_generation_config_is_all_there_is_to_say(monkeypatch):
    """Ends, padding and the kind of output are taken from it, without a warning."""
    model = early_exit()
    ids, mask = padded([prompt(4, 1), prompt(6, 2)])
    free = model.generate(
        ids, attention_mask=mask, mode="full", max_new_tokens=9, eos_token_id=None
    )
    end = free.sequences[0, 8].item()
    settings = {"max_new_tokens": 9, "eos_token_id": end, "pad_token_id": 77}
    config = GenerationConfig(**settings, return_dict_in_generate=False)
    warned = []
    monkeypatch.setattr(logging.get_logger("transformers"), "handle", warned.append)
    monkeypatch.setattr(
        logging.get_logger("transformers.generation.utils"), "handle", warned.append
    )
    out = model.generate(ids, config, attention_mask=mask, mode="full")
    assert not warned
    expected = model.backbone.model.generate(
        ids, GenerationConfig(**settings, do_sample=False), attention_mask=mask
    )
    assert torch.equal(out, expected)
    assert torch.equal(
        model.generate(inputs=ids, attention_mask=mask, mode="full", **settings).sequences, expected
    )


def test_torchs_seed_says_which_samples_there_are():
    model = early_exit()
    ids = torch.tensor([[5, 9, 11]])
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 9, "max_new_tokens": 12}

    def text(seed):
        torch.manual_seed(seed)
        return model.generate(ids, mode="full", **sampling).sequences.tolist()

    assert text(3) == text(3)
    assert text(3) != text(4)


def test_samples_of_a_row_depend_neither_on_other_rows_nor_on_the_stream_before():
    model, prompts = early_exit(), [prompt(length, length) for length in (3, 5, 4)]
    common = {"do_sample": True, "max_new_tokens": 6, "eos_token_id": None, "capacity": 32}

    def texts(slots, threshold):
        found = model.generate_batch(prompts, slots=slots, threshold=threshold, **common)
        return {number: out.sequences.tolist() for number, out in found}

    torch.manual_seed(5)
    first, second = texts(1, 1.0), texts(1, 1.0)
    assert all(first[number] != second[number] for number in first)
    torch.manual_seed(5)
    assert texts(3, 1.0) == first


def test_a_batch_of_what_a_tokenizer_gives(base, tokenizer):
    model = EarlyExitModel.from_base(base, ExitConfig("2", arch="norm"))
    texts, settings = ["def function", "import"], {"max_new_tokens": 4, "eos_token_id": None}
    found = dict(model.generate_batch((tokenizer(text) for text in texts), **settings))
    for number, text in enumerate(texts):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), **settings)
        assert torch.equal(found[number].sequences, alone.sequences)
    with pytest.raises(UserError, match="streamer cannot be had"):
        list(model.generate_batch([[5, 9]], streamer=Streamer()))


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([5, 9], {"slots": 0}, "slots is 0: give a whole number from 1"),
        ([5, 9], {"slots": 2.5}, "slots is 2.5: give a whole number from 1"),
        ({"threshold": 0.5}, {}, "token ids, as input_ids or alone, not nothing"),
        ("def f", {}, "token ids, as input_ids or alone, not str"),
        ([5.0, 9.0], {}, "generate takes token ids"),
        ([5, 9], {"threshold": {"a": 0.5}}, r"layers must be numbers, not \['a'\]"),
        ([5, 9], {"threshold": {None: 0.5}}, r"layers must be numbers, not \[None\]"),
        ([5, 9], {"exit_layers": []}, "no exit layers given"),
        ([5, 9], {"max_pending": 2.5}, "max_pending 2.5 is not possible"),
        ([5, 9], {"min_depth": 4, "threshold": {1: 0.5}}, "min_depth 4 leaves no exit active"),
        ([5, 9], {"min_depth": 4, "mode": "fixed"}, "min_depth 4 leaves no exit active"),
        ([5, 9], {"min_depth": -1}, "min_depth -1 is not possible"),
        ([5, 9], {"threshold": "8:x"}, "threshold '8:x' is not understood"),
        ([5, 9], {"compile": "off"}, "compile is True, False or None, not 'off'"),
        ([5, 9], {"capacity": -1}, "capacity is -1: give a whole number from 1"),
        ([], {}, "the prompt is empty"),
        ([5, 9], {"capacity": 8, "max_new_tokens": 63}, "there is room for 8: .*capacity"),
        ([[5, 6], [7, 8]], {}, r"not of shape \(2, 2\): give several prompts one by one"),
        ({"input_ids": [5, 6], "attention_mask": 1}, {}, r"not of shape \(\)"),
        ([True, False], {}, "generate takes token ids.*bool"),
    ],
)
def test_prompts_of_a_batch_that_are_none(prompt, settings, message):
    with pytest.raises(UserError, match=message):
        list(early_exit().generate_batch([prompt], **settings))


def test_texts_in_progress_end_before_a_prompt_is_refused():
    """Its number is said, and no further prompt is asked for."""
    model, asked = early_exit(), []

    def prompts():
        for ids in ([5, 9], [4], [96], [7]):
            asked.append(ids)
            yield ids

    stream = model.generate_batch(prompts(), slots=4, max_new_tokens=5, eos_token_id=None)
    assert sorted(number for number, _ in (next(stream), next(stream))) == [0, 1]
    with pytest.raises(UserError, match=r"prompt 2: .* outside the vocabulary of 96"):
        next(stream)
    assert asked == [[5, 9], [4], [96]]


def test_thresholds_as_the_command_takes_them():
    model, ids = early_exit(), torch.tensor([[5, 9]])
    common = {"max_new_tokens": 5, "eos_token_id": None}
    a, b = (
        model.generate(ids, threshold=threshold, exit_layers=[1, 3], **common)
        for threshold in ("1:0.02,3:0.03", {1: 0.02, 3: 0.03})
    )
    assert torch.equal(a.exit_layers, b.exit_layers)
    with pytest.raises(UserError, match="both inputs and input_ids"):
        model.generate(ids, input_ids=ids)


def test_several_sequences_per_prompt_and_plain_tensors():
    model = early_exit()
    ids = torch.tensor([[5, 9, 11], [4, 6, 8]])
    found = model.generate(
        ids, do_sample=True, num_return_sequences=3, max_new_tokens=4, eos_token_id=None,
        return_dict_in_generate=False,
    )  # fmt: skip
    assert found.shape == (6, 7)
    assert torch.equal(found[:, :3], ids.repeat_interleave(3, 0))


def test_stopping_criteria_of_the_caller_are_asked():
    class Third(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= 6] * len(input_ids))

    out = early_exit().generate(
        torch.tensor([[5, 9, 11]]), mode="full", max_new_tokens=9, eos_token_id=None,
        stopping_criteria=StoppingCriteriaList([Third()]),
    )  # fmt: skip
    assert out.sequences.shape == (1, 6)


def test_what_is_not_given_is_said():
    for given in (
        {"max_new_tokens": 1, "output_scores": True},
        {
            "generation_config": GenerationConfig(
                max_new_tokens=1, output_scores=True, return_dict_in_generate=True
            )
        },
    ):
        with pytest.warns(UserWarning, match="output_scores is ignored") as warned:
            early_exit().generate(torch.tensor([[5, 9]]), **given)
        assert warned[0].filename == __file__


def test_settings_that_the_mode_ignores_are_named_in_python():
    ids, how = torch.tensor([[5, 9]]), {"threshold": 0.5, "max_new_tokens": 1}
    with pytest.warns(UserWarning, match="^mode full ignores threshold$") as warned:
        early_exit().generate(ids, mode="full", **how)
    assert warned[0].filename == __file__
    with warnings.catch_warnings(record=True) as warned:
        early_exit().generate(ids, mode="speculative", **how)
    assert not any("ignores" in str(one.message) for one in warned)


def test_in_a_pipeline(base, data, monkeypatch):
    """Text generation of transformers' own, alone and in batches."""
    errors = []
    monkeypatch.setattr(logging.get_logger("transformers.pipelines.base"), "error", errors.append)
    tokenizer = load_tokenizer(base)
    model = EarlyExitModel.from_base(base, ExitConfig("2", arch="norm")).eval()
    tokenizer.padding_side = "left"
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert generator.model.config is model.backbone.model.config
    assert not errors
    prompts = ["def function", "print(", "for item in value"]
    common = {"max_new_tokens": 5, "do_sample": False, "mode": "threshold", "threshold": 0.004}
    alone = [generator(text, **common)[0]["generated_text"] for text in prompts]
    assert all(text.startswith(start) for text, start in zip(alone, prompts, strict=True))
    kinds = [{"return_dict_in_generate": False}]
    if Version(transformers.__version__) >= Version("5.23"):  # before, it fails for any ModelOutput
        kinds.append({})
    for kind in kinds:
        together = generator(prompts, batch_size=3, **kind, **common)
        assert [found[0]["generated_text"] for found in together] == alone
    ids = tokenizer(prompts[0], return_tensors="pt").input_ids
    out = model.generate(ids, **common)
    assert tokenizer.decode(out.sequences[0], skip_special_tokens=True) == alone[0]


def test_engines_are_kept_and_given_up():
    """One per way to decode, a few at most; other weights want another one."""
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("1,2", arch="norm")).eval()
    ids = torch.tensor([[5, 9]])
    common = {"max_new_tokens": 2, "eos_token_id": None}
    model.generate(ids, mode="full", **common)
    (engine,) = engines_of(model).kept.values()
    model.generate(ids, mode="full", **common)
    assert list(engines_of(model).kept.values()) == [engine]
    before = model.generate(ids, mode="fixed", exit_layers=[1], **common).sequences
    with torch.no_grad():
        model.exit(1).head.weight.copy_(-model.exit(1).head.weight)
    after = model.generate(ids, mode="fixed", exit_layers=[1], **common).sequences
    assert not torch.equal(before, after)
    for bound in range(2, 9):
        model.generate(ids, max_pending=bound, **common)
    assert len(engines_of(model).kept) <= 4


def test_texts_with_drafts_have_an_engine_of_their_own_where_it_is_cut_otherwise(monkeypatch):
    """Only there: two engines take twice the K/V, and compile twice."""
    ids, common = torch.tensor([[5, 9]]), {"max_new_tokens": 2, "eos_token_id": None}
    for cuts, number in (([], 1), ([3], 2)):
        monkeypatch.setattr("ee_tuning.decode.engines.cuts_beside", lambda *_, cuts=cuts: cuts)
        model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("1,2", arch="norm")).eval()
        for mode in ("threshold", "speculative"):
            model.generate(ids, mode=mode, **common)
        assert len(engines_of(model).kept) == number


def test_calls_of_two_sizes_in_turns_keep_their_engines():
    """And one that is large enough for both takes their place."""
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("1,2", arch="norm")).eval()
    common = {"max_new_tokens": 2, "eos_token_id": None, "mode": "full"}
    short, long = torch.full((4, 3), 5), torch.full((1, 300), 5)

    def sizes():
        return [(one.passes.slots, one.passes.capacity) for one in engines_of(model).kept.values()]

    model.backbone.config.max_position_embeddings = 1024
    model.generate(short, **common)
    model.generate(long, **common)
    assert sizes() == [(4, 256), (1, 512)]
    kept = set(map(id, engines_of(model).kept.values()))
    model.generate(short, **common)
    model.generate(long[:, :290], **common)
    assert set(map(id, engines_of(model).kept.values())) == kept
    model.generate(long.repeat(4, 1), **common)
    assert sizes() == [(4, 512)]
    model.backbone.config.max_position_embeddings = 512
    for more in (600, 601, 602):  # beyond the context, too
        with pytest.warns(Notice, match=f"has {more} tokens, the backbone's context is 512"):
            model.generate(torch.full((1, 10), 5), max_length=more, min_length=more, mode="full")
        assert sizes() == [(4, 512), (1, 768)]


def test_streams_that_run_in_turns_have_engines_of_their_own():
    """Also where all rows of one have just ended."""
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("1,2", arch="norm")).eval()
    prompts = [[5, 9, 11], [5, 6], [7, 8], [9, 4]]
    common = {"slots": 2, "max_new_tokens": 6, "eos_token_id": None}
    expected = [out.sequences for _, out in model.generate_batch(prompts, **common)]
    one, other = model.generate_batch(prompts, **common), model.generate_batch(prompts, **common)
    found = [[next(one), next(one)], [next(other)]]
    found[0] += one
    found[1] += other
    for outputs in found:
        assert len(outputs) == 4
        for a, (_, b) in zip(expected, outputs, strict=True):
            assert torch.equal(a, b.sequences)


def test_making_a_model_draws_no_random_number():
    base = tiny("llama")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    EarlyExitModel.from_base(base, ExitConfig("1,2", arch="norm"))
    assert torch.equal(torch.rand(3), expected)


def test_autocast_has_engines_of_its_own():
    model = early_exit()
    ids = torch.tensor([[5, 9, 11]])
    common = {"max_new_tokens": 4, "eos_token_id": None, "mode": "full"}
    plain = model.generate(ids, **common).sequences
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.backbone.model.generate(
            ids, max_new_tokens=4, eos_token_id=None, do_sample=False
        )
        assert torch.equal(model.generate(ids, **common).sequences, expected)
    assert torch.equal(model.generate(ids, **common).sequences, plain)


class InPlace(LogitsProcessor):
    """Bans tokens in the tensor that it is given."""

    def __call__(self, input_ids, scores):
        scores[:, 5:50] = -torch.inf
        return scores


class NoNumbers(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores * torch.nan


@pytest.mark.parametrize("mode", ["full", "threshold", "speculative"])
def test_processors_may_write_into_the_logits(mode):
    model = early_exit()
    ids = torch.tensor([[5, 9, 11]])
    common = {"logits_processor": [InPlace()], "max_new_tokens": 9, "eos_token_id": None}
    expected = model.backbone.model.generate(ids, do_sample=False, **common)
    out = model.generate(ids, mode=mode, threshold=0.0, **common).sequences
    assert not ((out[:, 3:] >= 5) & (out[:, 3:] < 50)).any()
    if mode != "threshold":
        assert torch.equal(out, expected)


@pytest.mark.parametrize("kwargs", [{}, {"logits_processor": [NoNumbers()]}])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("measure", ["probability", "margin", "entropy"])
def test_no_token_is_made_up(kwargs, do_sample, measure):
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("1,2", arch="norm")).eval()
    if not kwargs:
        model.backbone.norm.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="no token to choose"):
        model.generate(torch.tensor([[5, 9]]), do_sample=do_sample, measure=measure, **kwargs)


def test_a_token_may_be_forced_by_infinity():
    class Forced(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, 7] = torch.inf
            return scores

    out = early_exit().generate(
        torch.tensor([[5, 9]]), logits_processor=[Forced()], max_new_tokens=4
    )
    assert out.sequences[0, 2:].tolist() == [7] * 4


@pytest.mark.parametrize(
    "kwargs",
    [
        {}, {"pad_token_id": 3}, {"eos_token_id": [0, 2]}, {"eos_token_id": None},
        {"eos_token_id": torch.tensor([0, 2])},
    ],
)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 2])
def test_padding_without_a_mask_is_what_transformers_takes_for_it(kwargs, rows):
    model = early_exit("gpt2")
    ids = torch.tensor([[0, 0, 5, 9, 11], [3, 3, 4, 6, 8]])
    common = {"max_new_tokens": 6} | kwargs
    for prompts in ids[:rows], ids[-rows:]:
        expected = model.backbone.model.generate(prompts, do_sample=False, **common)
        out = model.generate(prompts, mode="full", **common).sequences
        assert torch.equal(out, expected)


def test_what_is_no_padding_stays():
    """A text may begin with the token for padding, and a list has none of it."""
    model = early_exit("gpt2")
    start = torch.tensor([[0]])
    common = {"max_new_tokens": 5, "mode": "full"}
    assert model.generate(start, **common).sequences[0, 0] == 0
    ((_, out),) = model.generate_batch([[0, 5, 9]], **common)
    assert out.sequences[0, :3].tolist() == [0, 5, 9]


def test_the_models_own_greatest_length_counts_padding(monkeypatch):
    model = early_exit("gpt2")
    monkeypatch.setattr(model.model.generation_config, "max_length", 9)
    ids = torch.tensor([[0, 0, 5, 9, 11]])
    expected = model.backbone.model.generate(ids, do_sample=False, eos_token_id=None)
    out = model.generate(ids, mode="full", eos_token_id=None).sequences
    assert torch.equal(out, expected)


def test_a_callers_greatest_length_counts():
    ids = torch.tensor([[5, 9, 11]])
    common = {"stopping_criteria": [MaxLengthCriteria(8)], "eos_token_id": None}
    out = early_exit().generate(ids, max_new_tokens=12, **common)
    assert out.sequences.shape == (1, 8)


def test_a_bound_beyond_the_text_takes_no_room():
    model = early_exit()
    model.generate(torch.tensor([[5, 9]]), max_pending=10**6, max_new_tokens=4)
    assert list(engines_of(model).kept.values())[-1].passes.sizes.places <= 128


def test_a_fixed_depth_takes_any_bound():
    model = early_exit()
    ((_, out),) = model.generate_batch(
        [[5, 9]], mode="fixed", exit_layers=[2], max_pending=2, max_new_tokens=4
    )
    assert set(out.exit_layers.flatten().tolist()) <= {0, 2}


LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    "attention_factor": 1.2, "original_max_position_embeddings": 16, "rope_theta": 1e4,
}  # fmt: skip


def phi3(**rope):
    rope = LONGROPE | rope
    original = rope["original_max_position_embeddings"]
    base = tiny(
        "phi3", rope_parameters=rope, original_max_position_embeddings=original,
        max_position_embeddings=256,
    )  # fmt: skip
    return EarlyExitModel.from_base(base, ExitConfig("1,2,3", arch="mlp,norm,layer")).eval()


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_rotary_frequencies_that_change_with_the_length_end_a_text(family):
    """Up to there it is that of transformers; beyond, the K/V that are kept would not fit."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    base = tiny("llama", rope_parameters=rope)
    model = EarlyExitModel.from_base(base, ExitConfig("2", arch="norm")).eval()
    end, message = 64, "positions go on for 64 alone"
    if family == "phi3":
        model, end, message = phi3(), 16, "begins with up to 16 ends there"
    base = model.backbone.model
    ids = torch.tensor([[5, 9, 11]])
    common = {"max_new_tokens": end - 3, "eos_token_id": None}
    base(torch.ones(1, 80, dtype=torch.int64))  # frequencies of a longer text are not kept
    out = model.generate(ids, mode="full", **common).sequences
    assert torch.equal(out, base.generate(ids, do_sample=False, **common))
    with pytest.raises(UserError, match=message):
        model.generate(ids, max_new_tokens=end)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "threshold", "speculative"])
@pytest.mark.parametrize("compile", [False, True])
def test_long_texts_have_the_frequencies_of_long_ones_throughout(mode, compile, monkeypatch):
    """Each token is what one pass over all before it gives, and transformers' own where deep.

    With `compile`, prompts are read in chunks and windows are padded as for compiled passes.
    """
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = phi3(original_max_position_embeddings=70)
    ids, mask = padded([prompt(74, 1), prompt(100, 2)])
    common = {"max_new_tokens": 12, "eos_token_id": None, "attention_mask": mask}
    model.generate(ids[:, -9:], mode=mode, max_new_tokens=3, compile=compile)  # short ones before
    out = model.generate(ids, mode=mode, threshold=0.03, compile=compile, **common)
    for row, start in enumerate((26, 0)):
        text = out.sequences[row, start:]
        for i, layer in enumerate(out.exit_layers[row].tolist()):
            seen = text[: len(text) - 12 + i]
            deep = 4 if mode == "speculative" else layer
            assert logits_from_scratch(model, seen[None], deep).argmax() == text[len(seen)]
            sure = logits_from_scratch(model, seen[None], layer).softmax(-1).max().item()
            assert out.confidences[row, i].item() == pytest.approx(sure, abs=1e-5)  # sums' order
    if mode == "threshold":
        assert len(out.exit_layers.unique()) > 1
    else:
        expected = model.backbone.model.generate(ids, do_sample=False, **common)
        assert torch.equal(out.sequences, expected)
    ids, mask = padded([prompt(70), prompt(71)])
    with pytest.raises(UserError, match="in calls of their own"):
        model.generate(ids, attention_mask=mask, max_new_tokens=1)


def test_room_for_long_texts_makes_all_of_a_stream_long():
    """Short prompts too: the frequencies are those of a model that has no others."""
    prompts = [prompt(4, 1), prompt(20, 2)]
    common = {"max_new_tokens": 20, "eos_token_id": None, "mode": "threshold", "threshold": 0.03}
    always = phi3(short_factor=LONGROPE["long_factor"], original_max_position_embeddings=63)
    found, expected = (
        {number: out.sequences for number, out in model.generate_batch(prompts, **kind, **common)}
        for model, kind in ((phi3(), {"capacity": 40}), (always, {}))
    )
    assert all(torch.equal(found[number], expected[number]) for number in (0, 1))
    with pytest.raises(UserError, match="there is room for 16"):
        list(phi3().generate_batch(prompts, **common))


def test_layers_that_were_left_out_are_asked_for(base):
    model = EarlyExitModel.from_base(base, ExitConfig("1", arch="norm"), whole=False)
    with pytest.raises(UserError, match="layer 2 is not in memory: load the whole backbone"):
        model.generate(torch.tensor([[5, 9]]))


def test_text_is_printed_as_it_is(base, tokenizer):
    """Tabs stay tabs, and what an unfinished character held back comes at the end."""
    written = io.StringIO()
    streamer = DepthStreamer(tokenizer, Console(file=written), 4)
    for text in ("if x:\n\treturn y", "\r\n", "ü"):
        ids = tokenizer(text).input_ids
        for token in ids if text != "ü" else ids[:1]:
            streamer.put(torch.tensor([token]))
    streamer.end()
    assert written.getvalue().startswith("if x:\n\treturn y\r\n\ufffd")


def test_text_comes_in_whole_characters_from_any_tokenizer(tokenizer):
    """Also from one that is written in Python, and has nothing but `decode`."""

    class Plain:
        def decode(self, ids, skip_special_tokens=False):
            return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    ids = tokenizer("für x\tin <eos>y: 日本").input_ids
    for one in (tokenizer, Plain()):
        for skips in (False, True):
            stream = TextStream(one, skip_special_tokens=skips)
            pieces = [stream.put([token]) for token in ids[:-1]]
            assert not any("\ufffd" in piece for piece in pieces)
            whole = tokenizer.decode(ids[:-1], skip_special_tokens=skips)
            assert "".join(pieces) + stream.end() == whole
            assert whole.endswith("\ufffd")


def test_any_real_number_is_a_threshold():
    ids = torch.tensor([[5, 9]])
    outputs = [
        early_exit().generate(ids, threshold=kind(0.02), max_new_tokens=8)
        for kind in (float, numpy.float32)
    ]
    assert torch.equal(outputs[0].exit_layers, outputs[1].exit_layers)
