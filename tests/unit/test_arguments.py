"""What transformers makes of arguments is kept while nothing that it follows from has changed."""

import numpy as np
import pytest
import torch
from helpers.families import tiny
from helpers.prompts import prompt
from transformers import GenerationConfig, MaxLengthCriteria, RepetitionPenaltyLogitsProcessor

from ee_tuning import EarlyExitModel, ExitConfig, UserError
from ee_tuning.decode.arguments import MOST, to_requests

IDS = prompt(7)


@pytest.fixture
def model():
    return EarlyExitModel.from_base(tiny("llama"), ExitConfig("2", arch="norm")).eval()


@pytest.fixture
def asked(model, monkeypatch):
    """With how many ids transformers was asked."""
    calls, generate = [], type(model.backbone.model).generate

    def counted(self, prompt, **kwargs):
        calls.append(prompt.shape[1])
        return generate(self, prompt, **kwargs)

    monkeypatch.setattr(type(model.backbone.model), "generate", counted)
    return calls


def requests(model, number=9, length=7, **kwargs):
    """What there is to the requests of a prompt."""
    found, padding = to_requests(model, IDS[:length], max_new_tokens=number, **kwargs)
    return padding, [
        (
            one.ids, one.max_length, one.chooser.sample, one.chooser.warp,
            [token for token in range(96) if one.stops([*IDS, token], len(IDS) + 1)],
        )
        for one in found
    ]  # fmt: skip


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
        {"num_return_sequences": 3, "do_sample": True},
        {"eos_token_id": 5, "pad_token_id": 6},
    ],
)
def test_the_same_arguments_are_asked_about_once(kwargs, model, asked):
    """For prompts and texts of any length."""
    for number, length in ((9, 7), (9, 7), (4, 3)):
        found = requests(model, number, length, **kwargs)
        again = requests(model, number, length, stopping_criteria=[], **kwargs)  # asked each time
        assert found == again
        assert all(one[:2] == (IDS[:length], length + number) for one in found[1])
    assert asked == [7, 7, 7, 3]
    assert len(found[1]) == kwargs.get("num_return_sequences", 1)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 3},
        {"max_time": 60.0},
        {"generation_config": GenerationConfig(do_sample=False)},
        {"logits_processor": [RepetitionPenaltyLogitsProcessor(1.3)]},
        {"stopping_criteria": [MaxLengthCriteria(10)]},
        {"eos_token_id": torch.tensor([5])},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_what_may_mean_something_else_for_another_prompt_is_asked_again(kwargs, model, asked):
    for _ in range(2):
        to_requests(model, IDS, max_new_tokens=9, **kwargs)
    assert len(asked) == 2


def test_without_a_number_of_new_tokens_transformers_is_asked(model, asked):
    lengths = [to_requests(model, IDS[:n])[0][0].max_length - n for n in (7, 7, 3)]
    assert len(asked) == len(lengths) == 3


def test_the_models_own_config_may_change_meanwhile(model, asked):
    """Where it is, or as a whole."""
    own = model.backbone.model.generation_config
    own.eos_token_id = [5]
    assert requests(model)[1][0][-1] == [5]
    own.eos_token_id.append(9)
    assert requests(model)[1][0][-1] == [5, 9]
    own.eos_token_id = 11
    assert requests(model)[1][0][-1] == [11]
    model.backbone.model.generation_config = GenerationConfig(eos_token_id=7, do_sample=True)
    (_, _, sample, _, ends) = requests(model)[1][0]
    assert (sample, ends) == (True, [7])
    assert len(asked) == 4
    requests(model)
    assert len(asked) == 4


def test_a_mistake_is_one_each_time(model, asked):
    for _ in range(2):
        with pytest.raises(UserError, match="top_p is 2"):
            to_requests(model, IDS, max_new_tokens=9, do_sample=True, top_p=2.0)
        with pytest.raises(UserError, match="max_new_tokens"):
            to_requests(model, IDS, max_new_tokens=-1)
    requests(model)
    with pytest.raises(UserError, match="max_new_tokens"):
        to_requests(model, IDS, max_new_tokens=-1)


@pytest.mark.parametrize("number", [np.int64(3), torch.tensor(3)])
def test_a_length_may_be_any_whole_number(model, number):
    """As with transformers; a request's is one of Python's, which engines ask for."""
    for kwargs in (
        {"max_new_tokens": number},
        {"generation_config": GenerationConfig(max_new_tokens=number)},
    ):
        (request,), _ = to_requests(model, IDS, **kwargs)
        assert (request.max_length, type(request.max_length)) == (len(IDS) + 3, int)


@pytest.mark.parametrize("name", ["max_length", "max_new_tokens", "min_length", "min_new_tokens"])
@pytest.mark.parametrize("number", [2.5, "4", torch.tensor(2.5)])
def test_a_length_that_is_no_whole_number_is_refused_by_its_name(model, name, number):
    with pytest.raises(UserError, match=f"{name} is .*: give a whole number"):
        to_requests(model, IDS, padded=1, **{name: number})


def test_no_more_than_so_many_are_kept(model, asked):
    for seed in range(2 * MOST):
        requests(model, pad_token_id=seed % 90 + 1, do_sample=True, temperature=1 + seed / 100)
    assert len(asked) == 2 * MOST
    requests(model, pad_token_id=(2 * MOST - 1) % 90 + 1, do_sample=True, temperature=1 + 1.27)
    assert len(asked) == 2 * MOST
