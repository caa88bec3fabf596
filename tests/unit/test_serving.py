"""What serving is made of, without a server."""

import math
import socket
import time
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from helpers.commands import fails
from helpers.models import DEPTH, long_model
from helpers.prompts import prompt
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ee_tuning.commands.serve import _is_loopback, _listening
from ee_tuning.decode import Engine, Full, Request, Token
from ee_tuning.decode.settings import Speculative, Threshold
from ee_tuning.decode.text import TextStream
from ee_tuning.errors import UserError
from ee_tuning.serve.choices import Choice, Stops, joined
from ee_tuning.serve.config import ServeConfig, check_settings
from ee_tuning.serve.core import Core
from ee_tuning.serve.messages import Answer, Begun, Call, Heard, Text
from ee_tuning.serve.pieces import Pieces
from ee_tuning.serve.processors import Bias, NotYet, Penalties, Seen


def first_stop(text: str, stops: list[str]) -> int:
    """Where the text ends: the stop that is whole first, and of these the one that begins first."""
    for end in range(len(text) + 1):
        places = [text[:end].find(stop) for stop in stops]
        if found := [place for place in places if place >= 0]:
            return min(found)
    return -1


@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_is_shown_up_to_a_stop_string_and_never_taken_back(pieces, stops):
    """Whatever pieces it comes in, one character at a time or many."""
    for parts in ("".join(pieces), pieces):
        held, shown, ended = Stops(stops), "", False
        for piece in parts:
            new, ended = held.put(piece)
            shown += new
            if ended:
                break
        whole = "".join(pieces)
        if not ended:
            assert not any(stop in whole for stop in stops)
            assert shown + held.rest() == whole
            continue
        assert not any(stop in shown for stop in stops)
        assert any(whole[len(shown) :].startswith(stop) for stop in stops)
        if parts is not pieces:
            assert len(shown) == first_stop(whole, stops)


def test_what_may_begin_a_stop_string_alone_is_held_back():
    held = Stops(["END", "\n\n"])
    assert held.put("the E") == ("the ", False)
    assert held.put("N") == ("", False)
    assert held.put("T\n") == ("ENT", False)
    assert held.put("x") == ("\nx", False)
    assert held.put("END", ends=False) == ("END", False)
    assert held.put("a\n\nb") == ("a", True)


def test_penalties_and_bias_are_openais():
    ids, scores = torch.tensor([[3, 3, 5, 5, 6]]), torch.zeros(1, 9)
    found = Penalties(2, presence=0.5, frequency=0.25)(ids, scores)[0].tolist()
    counts = Counter([5, 5, 6])  # what the prompt has does not count
    assert found == [-(0.5 + 0.25 * counts[i]) if i in counts else 0 for i in range(9)]
    assert torch.equal(Penalties(5, 1, 1)(ids, scores), scores)
    biased = Bias({2: 1.5, 4: -100})(ids, scores)[0].tolist()
    assert biased == [0, 0, 1.5, 0, -100, 0, 0, 0, 0]
    early = NotYet(6, [1, 2])(ids, scores)[0]
    assert [i for i in range(9) if early[i] == -math.inf] == [1, 2]
    assert torch.equal(NotYet(5, [1])(ids, scores), scores)


def test_the_last_that_was_said_of_a_place_counts():
    """A draft's distribution makes way for what the end says."""
    seen, ids = Seen(2), torch.zeros(1, 4, dtype=torch.int64)
    for row in ([5.0, 0, 0], [0, 1.0, 2.0]):
        seen(ids, torch.tensor([row]))
    found = seen.take(4, 1)
    expected = torch.tensor([0, 1.0, 2.0]).log_softmax(-1)
    assert found.logprob == pytest.approx(expected[1].item())
    assert [token for token, _ in found.top] == [2, 1]


def test_tokens_have_their_bytes(tokenizer: PreTrainedTokenizerBase):
    text = "def ünï(🎉): 日本"
    ids, pieces = tokenizer(text).input_ids, Pieces(tokenizer)
    assert b"".join(map(pieces.bytes, ids)) == text.encode()
    torn = [token for token in ids if pieces.text(token).startswith("bytes:\\x")]
    assert torn
    assert len({pieces.text(token) for token in torn}) == len(set(torn))
    assert pieces.text(tokenizer.eos_token_id) == "<eos>"


@pytest.fixture(scope="module")
def by_pieces():
    """A tokenizer as sentencepiece's: a text's first space is dropped, characters may be bytes."""
    names = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["\u2581", "a", "\u2581a", "b", "n", "n\u2581"]
    pairs = [("\u2581", "a"), ("n", "\u2581")]
    found = Tokenizer(BPE({name: i for i, name in enumerate(names)}, pairs, byte_fallback=True))
    found.pre_tokenizer, first = pre_tokenizers.Metaspace(split=False), decoders.Strip(" ", 1, 0)
    steps = decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), first
    found.decoder = decoders.Sequence([*steps])
    return PreTrainedTokenizerFast(tokenizer_object=found, unk_token="<unk>", eos_token="<eos>")


@given(st.lists(st.text("ab n日🎉é") | st.just("<eos>"), max_size=12), st.data())
@pytest.mark.parametrize("kind", ["by bytes", "by pieces"])
def test_a_stream_says_what_the_whole_text_is(tokenizer, by_pieces, kind, texts, data):
    """Wherever the prompt before it ends, and however many tokens come at once, also behind many
    that are left out: what is whole comes at once, and what is not comes when it is."""
    tokenizer = tokenizer if kind == "by bytes" else by_pieces
    ids = tokenizer("".join(text * 7 if text == "<eos>" else text for text in texts)).input_ids

    def whole(number):
        return tokenizer.decode(ids[:number], skip_special_tokens=True).rstrip("\ufffd")

    cut = data.draw(st.integers(0, len(ids)))
    stream, said = TextStream(tokenizer, skip_special_tokens=True, after=ids[:cut]), whole(cut)
    while cut < len(ids):
        number = data.draw(st.integers(1, 9))
        said, cut = said + stream.put(ids[cut : cut + number]), cut + number
        assert len(said) >= len(whole(cut))
    assert said + stream.end() == whole(len(ids))


@pytest.mark.parametrize("stops", [(), ("n 🎉",), ("never there",)])
@pytest.mark.parametrize("ends", ["by length", "by a token"])
@pytest.mark.parametrize("kind", [Threshold, Speculative])
def test_tokens_that_come_together_say_what_they_say_one_by_one(tokenizer, stops, ends, kind):
    """Whatever ends the text, and where in a step that is."""
    ids = tokenizer("for ünï in 🎉 of 日本:\n    return x").input_ids
    ids.append(tokenizer.eos_token_id)
    stop_ids = frozenset({ids[-1]} if ends == "by a token" else ())

    def said(each):
        request = Request([5, 6], kind(4, {2: 0.5}), 99)
        choice = Choice(0, request, tokenizer, stops=stops, stop_ids=stop_ids)
        tokens = [Token(token, 2 if at % 3 else 4, 0.5) for at, token in enumerate(ids)]
        tokens[-1].ends = ends == "by length"
        deltas = []
        for at in range(0, len(tokens), each):
            settled = choice.text.settle(tokens[at : at + each], 1.0)
            deltas.append(choice.put(settled))
            if settled.ended or choice.finish is not None:
                break
        whole = joined(deltas)
        return whole.text, whole.tokens, whole.rounds, whole.finish, whole.ee, choice.layers

    alone = said(1)
    assert alone[3] == ("length" if ends == "by length" and stops != ("n 🎉",) else "stop")
    assert all(said(each) == alone for each in (2, 4, len(ids)))


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "nothing to serve: name exits with --exits, or a backbone with --model"),
        (["--model", "BASE", "--mode", "threshold"], "mode threshold needs exits"),
        (["--model", "BASE", "--slots", "0"], "slots is 0: give 1 or more"),
        (["--model", "BASE", "--port", "70000"], "port is 70000: give 65535 or less"),
        (["--model", "BASE", "--capacity", "1"], "capacity is 1: give 2 or more"),
        (["--model", "BASE", "--deadline", "0"], "deadline and grace are seconds"),
        (["--model", "BASE", "--capacity", "129"], "the backbone's context 128: give that or less"),
        (
            ["--model", "BASE", "--lookup", "--threshold", "2"],
            "ee-tuning: threshold 2.0 is outside",
        ),
        (["--model", "BASE", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1:0"),
    ],
)
def test_settings_that_cannot_work_are_refused(base, capsys, flags, said):
    given = [base if flag == "BASE" else flag for flag in flags]
    assert said in fails(capsys, "serve", "--port", "0", *given)


@pytest.mark.parametrize(
    ("name", "value"), [("threshold", 0.5), ("exit_layers", "2"), ("min_depth", 2)]
)
def test_settings_of_exits_are_refused_for_a_backbone_alone(name, value):
    check_settings(ServeConfig(exits="exits", **{name: value}))
    with pytest.raises(UserError, match=f"{name} needs exits: give them with --exits"):
        check_settings(ServeConfig(model="base", **{name: value}))


def test_a_port_that_is_taken_is_said_before_a_model_is_loaded(base, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = fails(capsys, "serve", "--model", base, "--port", port)
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in said


def test_of_two_servers_that_start_at_once_one_has_the_port():
    with _listening(ServeConfig(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}"):
            _listening(ServeConfig(port=port))


@pytest.mark.parametrize(
    ("host", "local"), [("localhost", True), ("::1", True), ("127.3.2.1", True), ("0.0.0.0", False)]
)
def test_what_others_reach_is_known(host, local):
    assert _is_loopback(host) is local


def test_one_call_is_answered_between_two_steps():
    core, said = Core(None, None, None, None), []
    core._say = said.append
    for number in range(3):
        core._take(Call(number, lambda model, x: 2 * x, (number,)))
    core._answer()
    assert said == [Answer(0, 0)]
    core._answer()
    assert said[1:] == [Answer(1, 2)]


class SlowLane:
    """Where a prompt is read for as many steps as `left` says."""

    left = 0

    @contextmanager
    def work(self):
        self.left = 30
        yield

    @property
    def over(self):
        self.left -= 1
        return self.left < 0

    def wait(self):
        pass


def test_texts_begin_when_there_is_a_slot_for_each():
    """Not whenever the engine is stepped while it reads the prompt of one."""
    engine, begun = Engine(long_model(), [1, 2, 3], slots=4, capacity=250), []
    engine._lane = SlowLane()
    core = Core(engine, long_model(), None, lambda: None)
    core._say = lambda one: begun.extend(one.numbers) if isinstance(one, Begun) else None

    def give(number):
        text = Text(Request(prompt(5, number), Full(DEPTH), 200))
        text.number = number
        core._take(text)

    give(0)
    while not core._live or engine._reading:
        core._step()
    give(1)
    core._step()
    for number in range(2, 20):
        give(number)
    for _ in range(9):
        core._step()
    assert engine._reading is not None
    assert begun == [0, 1, 2, 3]


@pytest.mark.parametrize(("texts", "pause"), [(0, 0.005), (1, 0.005), (4, 0.01), (64, 0.04)])
def test_the_more_texts_there_are_the_longer_clients_wait_for_more(texts, pause):
    core = Core(None, None, None, None)
    core._texts = dict.fromkeys(range(texts))
    core._next = math.inf
    before = time.perf_counter()
    core._take(Heard())
    assert before + pause <= core._next <= time.perf_counter() + pause
