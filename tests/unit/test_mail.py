"""What stages tell each other: `Mail` over real connections, each stage in a thread."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ee_tuning.decode.mail import Fate, Kind, Mail, Message, News
from ee_tuning.parallel import sockets
from ee_tuning.parallel.mesh import Mesh

LIKE = torch.empty(0, 3, dtype=torch.bfloat16)


class Threads(Mesh):
    """A mesh whose processes are threads."""

    def __init__(self, rank, stages, shared):
        super().__init__(pp=stages)
        self.rank, self.shared, self.patience = rank, shared, 5.0

    def gather_on_host(self, value):
        told, barrier = self.shared
        told[self.rank] = value
        barrier.wait(10)
        found = [told[rank] for rank in range(self.size)]
        barrier.wait(10)
        return found

    def on_main(self, function):
        return self.gather_on_host(function())[0]


@pytest.fixture
def mails(monkeypatch):
    """Makes the mails of so many stages, open."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")

    def make(stages):
        shared = {}, threading.Barrier(stages)
        with ThreadPoolExecutor(stages) as pool:
            found = list(
                pool.map(lambda rank: Mail(Threads(rank, stages, shared), 4, LIKE), range(stages))
            )
        for mail in found:
            mail.open()
        return found

    return make


def tokens(*places, states=1):
    """News of tokens of row 0 with hidden states of random bits."""
    news = [News(0, 7 * p, p, 2, p / 3, Fate.GOES_ON, True, states) for p in places]
    hidden = torch.randn(len(places) * states, 3).to(torch.bfloat16)
    return Message(Kind.TOKENS, news, hidden)


def test_messages_of_tokens_that_wait_are_read_as_one(mails):
    """Up to as many news as make one, 4; hidden states and confidences to the last bit."""
    first, second = mails(2)
    said = [tokens(1, 2), tokens(3, states=0), tokens(4), tokens(5), tokens(6)]
    for message in said:
        first.tell_next(message)
    for parts in (said[:3], said[3:]):
        read = second.read()
        assert read.news == [item for part in parts for item in part.news]
        assert torch.equal(read.hidden, torch.cat([part.hidden for part in parts]))
        assert read.hidden.dtype == torch.bfloat16


def test_a_prompt_is_read_by_itself(mails):
    first, second = mails(2)
    prompt = Message(Kind.PROMPT, [News(3, states=2)], torch.ones(2, 3, dtype=torch.bfloat16))
    for message in (tokens(1), prompt, tokens(2)):
        first.tell_next(message)
    assert [second.read().kind for _ in range(3)] == [Kind.TOKENS, Kind.PROMPT, Kind.TOKENS]


def test_the_first_stage_hears_of_all_others_and_waits_if_it_is_to(mails):
    first, second, third = mails(3)
    assert first.answers(wait=False) == []
    second.tell_first(Message(Kind.TOKENS, []))  # alive, no more
    timer = threading.Timer(0.05, third.tell_first, [Message(Kind.TOKENS, [News(1, 9)])])
    timer.start()
    assert first.answers(wait=True) == [News(1, 9)]
    with ThreadPoolExecutor(3) as pool:  # each waits until the others have said the same
        list(pool.map(Mail.close, (first, second, third)))


def test_a_stage_that_is_silent_or_gone_is_named(mails):
    first, second = mails(2)
    first.mesh.patience = 0.05
    with pytest.raises(TimeoutError, match=r"no word for 0\.05 seconds"):
        first.answers(wait=True)
    for connection in second._to.values():
        connection.close()
    with pytest.raises(ConnectionError, match="rank 1 has closed its connection"):
        first.answers(wait=True)


def test_strangers_are_not_listened_to(mails, monkeypatch):
    """One says nothing we know, one nothing at all, and both come first."""
    call, sent = sockets._call, []

    def later(address, key, own, patience):
        for words in (b"\0\0\0\5hello", b""):
            with socket.create_connection(address) as stranger:
                stranger.sendall(words)
                sent.append(words)
        return call(address, key, own, patience)

    monkeypatch.setattr(sockets, "_call", later)
    first, second = mails(2)
    assert len(sent) == 4
    message = tokens(1)
    first.tell_next(message)
    assert torch.equal(second.read().hidden, message.hidden)
