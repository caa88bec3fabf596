"""The engine equals a slow decoder of one sequence, and that equals recomputing everything."""

import sys
from dataclasses import dataclass, field

import pytest
import torch
from helpers.families import FAMILIES, MOE, tiny
from helpers.memory import kept_each_time
from helpers.models import DEPTH, early_exit, logits_from_scratch, long_model
from helpers.prompts import padded, prompt
from helpers.slow_decoder import Decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding

from ee_tuning import EarlyExitModel, ExitConfig, UserError
from ee_tuning.decode import Chooser, Engine, Fixed, Full, Policy, Request, Speculative, Threshold
from ee_tuning.decode.engines import engines_of
from ee_tuning.losses import confidence
from ee_tuning.passes.cache import SlotLayer, check_room, places_in
from ee_tuning.passes.passes import Passes
from ee_tuning.passes.prompts import read as read_prompts
from ee_tuning.passes.wanted import Prediction, Wanted, Window

# Tiny windows of 6 tokens: the rings of these families are written over several times.
MIXED = ["llama", "mistral", "gemma2", "gemma3", "opt", "gpt2", "falcon", "granite", "phi"]


@dataclass
class Forced(Policy):
    """The n-th token after the prompt's own may leave from the n-th layer of `pattern` on."""

    pattern: list[int] = field(default_factory=list)
    prompt: int = 0
    final: bool = True

    def leaves(self, layer, found, ids):
        return layer >= self.pattern[len(ids) - self.prompt - 1]


class Told(Chooser):
    """Takes the tokens it is told, and keeps the logits it was shown."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.seen = list(tokens), []

    def choose(self, found):
        self.seen.append(found.logits.clone())
        return self.tokens[len(self.seen) - 1]


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(MIXED),
    rows=st.lists(
        st.tuples(
            st.integers(1, 20),
            st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=14),
            st.integers(0, 4),
            st.sampled_from([DEPTH, DEPTH, 1, 2, 3]),
        ),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 1000),
)
def test_any_pattern_of_exits_gives_what_recomputing_everything_gives(family, rows, seed):
    """Rows of different prompts, patterns and pending bounds in one batch, some of mode fixed: at
    every token, the logits of the exit where the slow decoder's token leaves, from scratch.

    Tolerance: a window of several tokens sums in another order.
    """
    model = early_exit(family)
    generator = torch.Generator().manual_seed(seed)
    requests, given_tokens = [], []
    for length, pattern, bound, end in rows:
        tokens = torch.randint(3, 96, (len(pattern) + 1,), generator=generator).tolist()
        inner = dict.fromkeys([1, 2, 3], 0.5) if end == DEPTH else {}
        policy = Forced(
            end, inner, max_pending=bound, pattern=pattern, prompt=length, final=end == DEPTH
        )
        total = length + len(tokens)
        requests.append(Request(prompt(length, seed), policy, total, Told(tokens)))
        given_tokens.append(tokens)
    engine = Engine(model, [1, 2, 3], slots=len(rows), capacity=64, max_pending=4)
    left = {id(request): [] for request in requests}
    for request, token in engine.stream(requests):
        left[id(request)].append(token.exit_layer)
    for request, tokens in zip(requests, given_tokens, strict=True):
        expected = slow_layers(model, request, tokens)
        assert left[id(request)] == expected
        ids = list(request.ids)
        for layer, logits, token in zip(expected, request.chooser.seen, tokens, strict=True):
            wanted = logits_from_scratch(model, torch.tensor([ids]), layer)[0]
            torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
            ids.append(token)


def slow_layers(model, request, tokens):
    """Where the tokens of a request leave in the slow decoder."""
    settled = []
    policy = request.policy
    decoder = Decoder(
        model, policy.exit_layers, policy.end, policy.max_pending,
        lambda layer, _: layer >= policy.pattern[len(settled) - 1],
    )  # fmt: skip
    settled.append(decoder.prefill(torch.tensor([request.ids])).exit_layer)
    for token in tokens[:-1]:
        settled.append(decoder.step(torch.tensor([[token]])).exit_layer)
    return settled


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [1, 2, 3])
def test_fixed_mode_equals_the_exit_from_scratch(family, layer):
    """Every token of mode fixed is what exit `layer` alone predicts, the first one included."""
    model = early_exit(family)
    ids = torch.tensor([[5, 9, 11, 40]])
    out = model.generate(
        ids, mode="fixed", exit_layers=[layer], max_new_tokens=8, eos_token_id=None
    )
    for i in range(8):
        expected = logits_from_scratch(model, out.sequences[:, : 4 + i], layer).argmax()
        assert expected == out.sequences[0, 4 + i]
    assert (out.exit_layers == layer).all()


def test_an_exit_that_has_nothing_of_its_own_is_asked():
    """Neither a norm nor a head."""
    config = ExitConfig("2", arch="embedding", head="shared")
    model = EarlyExitModel.from_base(tiny("llama"), config).eval()
    assert not list(model.exit(2).parameters())
    ids = torch.tensor([[5, 9, 11, 40]])
    out = model.generate(ids, threshold=0.0, max_new_tokens=4, eos_token_id=None)
    assert out.exit_layers[0].tolist() == [4, 2, 2, 2]
    for i in range(1, 4):
        expected = logits_from_scratch(model, out.sequences[:, : 4 + i], 2).argmax()
        assert expected == out.sequences[0, 4 + i]


@pytest.mark.parametrize("family", [*MIXED, *MOE])
@pytest.mark.parametrize("mode", ["full", "fixed", "threshold", "speculative"])
def test_a_row_does_not_depend_on_its_neighbours(family, mode):
    model = early_exit(family, "norm,layer,norm")
    prompts = [prompt(n, n) for n in (3, 19, 5, 1)]
    ids, mask = padded(prompts)
    common = {
        "mode": mode, "threshold": 0.02, "max_new_tokens": 12, "eos_token_id": None,
        "exit_layers": [2] if mode == "fixed" else None,
    }  # fmt: skip
    out = model.generate(ids, attention_mask=mask, **common)
    for row, own in enumerate(prompts):
        alone = model.generate(torch.tensor([own]), **common)
        assert torch.equal(out.sequences[row, ids.shape[1] :], alone.sequences[0, len(own) :])
        assert torch.equal(out.exit_layers[row], alone.exit_layers[0])
    if mode == "full":
        expected = model.backbone.model.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert torch.equal(out.sequences, expected)


def test_every_request_of_a_batch_may_decode_in_its_own_way():
    model = early_exit()
    policies = [
        Full(DEPTH),
        Fixed(2),
        Threshold(DEPTH, {1: 0.001, 3: 0.002}, "margin", max_pending=3),
        Speculative(DEPTH, {2: 0.0}, max_pending=4),
        Threshold(DEPTH, {1: 0.03}, "entropy"),
        Fixed(3),
    ]

    def run(slots, chosen):
        engine = Engine(model, [1, 2, 3], slots=slots, capacity=64)
        requests = [Request(prompt(4 + i, i), policies[i], 24 + i) for i in chosen]
        found = {i: [] for i in chosen}
        for request, token in engine.stream(requests):
            found[chosen[requests.index(request)]].append((token.id, token.exit_layer))
        assert all(request.finished for request in requests)
        return found

    together, few = run(6, list(range(6))), run(2, list(range(6)))
    assert together == few
    for i in range(6):
        assert run(1, [i])[i] == together[i]
        assert len(together[i]) == 20
    assert len({layer for _, layer in together[2]}) > 1


def test_a_text_that_ends_frees_its_slot_for_the_next_prompt():
    """Prompts are asked for one by one; outputs come as texts end, and equal single ones."""
    model = early_exit()
    engines_of(model).kept.clear()  # one with more slots, of another test, would be taken
    asked, ended = [], []

    def prompts():
        for i in range(9):
            asked.append(i)
            yield {"input_ids": prompt(3 + i % 4, i), "max_new_tokens": 3 + 5 * (i % 3)}

    common = {"threshold": 0.02, "eos_token_id": None}
    for number, out in model.generate_batch(prompts(), slots=3, capacity=64, **common):
        ended.append(number)
        assert len(asked) <= len(ended) + 3
        own = torch.tensor([prompt(3 + number % 4, number)])
        alone = model.generate(own, max_new_tokens=3 + 5 * (number % 3), **common)
        assert torch.equal(out.sequences, alone.sequences)
    assert sorted(ended) == list(range(9))
    assert ended != list(range(9))


def test_giving_up_a_stream_frees_its_slots():
    model = early_exit()
    engine = Engine(model, [1], slots=2, capacity=64)

    def requests():
        return [Request(prompt(4, i), Full(DEPTH), 40) for i in range(3)]

    stream = engine.stream(requests())
    for _ in range(5):
        next(stream)
    assert len(engine.sequences.live) == 2
    stream.close()
    assert not engine.busy

    first, second, third = requests()
    texts = {id(r): 0 for r in (first, second, third)}
    for request, _ in engine.stream([first, second, third]):
        texts[id(request)] += 1
        if texts[id(first)] == 3:
            first.cancelled = True
    assert texts == {id(first): 3, id(second): 36, id(third): 36}

    def stop(row, token):
        raise KeyboardInterrupt

    ids = torch.tensor([[5, 9, 11]])
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=5, on_token=stop)
    assert model.generate(ids, max_new_tokens=5, eos_token_id=None).sequences.shape == (1, 8)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_prompts_that_are_read_together_give_what_each_gives_alone(family, monkeypatch):
    """In chunks of several prompts, padded, beside rows in progress, of all kinds; what compiling
    makes of the passes is left out, their sizes are those of compiled ones."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = long_model(family)
    lengths = [70, 5, 64, 130, 1, 65, 128, 3]
    own = [{}, {"mode": "full"}, {"mode": "fixed", "exit_layers": [1]}, {"mode": "speculative"}]
    rows = [{"input_ids": prompt(n, n), **own[i % 4]} for i, n in enumerate(lengths)]
    common = {"max_new_tokens": 9, "eos_token_id": None, "threshold": 0.02, "exit_layers": [1, 3]}
    expected = {
        number: model.generate(torch.tensor([row.pop("input_ids")]), **common | row)
        for number, row in enumerate(map(dict, rows))
    }
    found = dict(model.generate_batch(rows, slots=3, capacity=200, compile=True, **common))
    assert found.keys() == expected.keys()
    for number, out in found.items():
        assert torch.equal(out.sequences, expected[number].sequences)
        assert torch.equal(out.exit_layers, expected[number].exit_layers)


def test_prompts_that_are_read_together_go_on_at_the_next_stage(monkeypatch):
    """Two stages, each with its own passes, give what all layers give, to the order of sums."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model, given = long_model(), {1: prompt(70, 1), 0: prompt(5, 2)}
    wanted, nothing = Wanted("last", True), Wanted("nothing", False)

    def passes(stage):
        model.stage = stage
        settings = {"slots": 2, "capacity": 90, "longest": 4, "compile": True}
        return Passes(model, [1, 3], **settings, stage=stage)

    def read(one, given, wanted):
        last = len(one.segments) - 1
        return {r.slot: (r.found, r.hidden)
                for reads in read_prompts(one, given, last, wanted, lambda i: [0, 0])
                for r in reads}  # fmt: skip

    expected = {slot: found.token for slot, (found, _) in
                read(passes(range(4)), given, wanted).items()}  # fmt: skip
    states = read(passes(range(2)), given, nothing)
    assert [states[slot][1].shape for slot in (1, 0)] == [(70, 32), (5, 32)]
    there = {slot: hidden.clone() for slot, (_, hidden) in states.items()}
    found = read(passes(range(2, 4)), there, wanted)
    assert {slot: one.token for slot, (one, _) in found.items()} == expected


def test_there_is_nothing_to_warm_up_where_nothing_compiles():
    assert long_model().warm_up(mode="speculative", compile=False) < 1


def test_padding_writes_over_nothing_that_is_known():
    """Padding to a compiled size leaves the K/V of every settled token as they are, bit for bit."""
    passes = Engine(early_exit("llama"), [1, 3], slots=3, capacity=64).passes
    lengths = [5, 9, 4]
    given = {slot: prompt(length, slot) for slot, length in enumerate(lengths)}
    last = len(passes.segments) - 1
    reads = read_prompts(passes, given, last, Wanted("last", True), lambda i: [0] * 3)
    assert sum(map(len, reads)) == 3
    passes.compile = True  # for the sizes: nothing has been compiled

    def known():
        return [
            [layer.keys[slot, :, :length].clone()
             for layer in passes.caches[0].slot_layers + passes.caches[1].slot_layers]
            for slot, length in enumerate(lengths)
        ]  # fmt: skip

    before = known()
    nothing = Wanted("nothing", False)
    passes.window(0, [Window(0, 1, [7]), Window(2, 1, [8])], lengths, nothing)
    passes.window(1, [Window(2, 2)], lengths, nothing)
    for rows, others in zip(known(), before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(rows, others, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_over_1000_requests():
    model = early_exit()

    def serve():
        prompts = ({"input_ids": prompt(2 + i % 5, i)} for i in range(1000))
        settings = {"threshold": 0.02, "max_new_tokens": 4, "eos_token_id": None}
        texts = model.generate_batch(prompts, slots=8, capacity=32, **settings)
        assert sum(1 for _ in texts) == 1000

    serve()  # what is kept for good has come by then
    assert kept_each_time(serve) < 1000  # KiB: one of each request


def test_layer_exit_uses_positions_in_training_and_decoding_alike():
    """The block's logits depend on order, and are the same with caches and in one pass."""
    model = early_exit(arch="layer")
    tokens = [40, 7, 8, 3]
    request = Request([5, 9, 11], Fixed(2), 7, Told(tokens))
    engine = Engine(model, [2], capacity=16)
    assert [token.exit_layer for _, token in engine.stream([request])] == [2] * 4
    ids = [*request.ids, *tokens]
    for i, logits in enumerate(request.chooser.seen):
        expected = logits_from_scratch(model, torch.tensor([ids[: 3 + i]]), 2)[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    swapped = logits_from_scratch(model, torch.tensor([[9, 5, 11, *tokens[:3]]]), 2)[0]
    assert not torch.allclose(logits, swapped, atol=1e-3)


def test_threshold_lets_confident_tokens_leave_at_the_first_exit_that_is_sure():
    model = early_exit()
    ids = torch.tensor([[5, 9, 11]])
    common = {"max_new_tokens": 30, "eos_token_id": None}
    out = model.generate(ids, threshold=0.02, **common)
    layers, sure = out.exit_layers[0], out.confidences[0]
    assert layers[0] == DEPTH
    assert (sure[layers < DEPTH] >= 0.02).all()
    assert len(set(layers.tolist())) > 1
    always = model.generate(ids, threshold=0.0, max_pending=100, max_new_tokens=9)
    assert always.exit_layers[0].tolist() == [DEPTH] + [1] * 8
    each = model.generate(ids, threshold={1: 1.0, 2: 0.0, 3: 0.5}, max_pending=100, **common)
    assert each.exit_layers[0].tolist() == [DEPTH] + [2] * 29
    deep = model.generate(ids, threshold=0.0, min_depth=3, max_pending=100, **common)
    assert deep.exit_layers[0].tolist() == [DEPTH] + [3] * 29


def test_a_token_leaves_at_its_threshold_and_never_at_1():
    """A probability that rounding makes 1 does not leave either."""
    sure = Prediction(7, 0.5, None, 0, 0)
    assert Threshold(DEPTH, {1: 0.5}).leaves(1, sure, [5, 9])
    model = EarlyExitModel.from_base(tiny("llama"), ExitConfig("1", arch="norm")).eval()
    model.exit(1).head.weight.data.mul_(1e4)
    common = {"max_new_tokens": 8, "eos_token_id": None}
    sure = model.generate(torch.tensor([[5, 9]]), threshold=0.999, max_pending=9, **common)
    assert (sure.confidences[0][sure.exit_layers[0] == 1] == 1).any()
    never = model.generate(torch.tensor([[5, 9]]), threshold=1.0, **common)
    assert (never.exit_layers == DEPTH).all()


def test_pending_bound_forces_a_full_pass():
    model = early_exit()
    out = model.generate(
        torch.tensor([[5, 9]]), threshold=0.0, max_pending=2, max_new_tokens=10, eos_token_id=None
    )
    assert out.exit_layers[0].tolist() == [4, 1, 1, 4, 1, 1, 4, 1, 1, 4]


def test_measures_of_confidence():
    logits = torch.randn(3, 5, 17) * 3
    p = logits.softmax(-1)
    ordered = p.sort(-1, descending=True).values
    entropy = -(p * p.log()).sum(-1) / torch.tensor(17.0).log()
    torch.testing.assert_close(confidence(logits), ordered[..., 0])
    torch.testing.assert_close(confidence(logits, "margin"), ordered[..., 0] - ordered[..., 1])
    torch.testing.assert_close(confidence(logits, "entropy"), 1 - entropy)
    for measure in ("probability", "margin", "entropy"):
        certain = torch.tensor([0.0, -torch.inf, -torch.inf])
        assert confidence(certain, measure) == 1


def test_a_ring_holds_what_a_window_sees():
    """Size, mask and content of a sliding layer, against positions written down one by one."""
    layer = SlotLayer(window=4, slots=1, capacity=100, longest=3)
    assert layer.size == 7
    from ee_tuning.passes.cache import Place

    written = {}
    start = 0
    for count in (2, 3, 1, 3, 3, 2):
        positions = torch.arange(start, start + count)[None]
        layer.put(Place(torch.tensor([0]), positions, reach=start + count, in_order=True))
        values = positions[:, None, :, None].float()
        keys, _ = layer.update(values, values)
        written |= {int(p): float(p) for p in positions[0]}
        mask = layer.mask(torch.float32)[0, 0]
        for row, query in enumerate(positions[0].tolist()):
            seen = keys[0, 0, mask[row] == 0, 0].tolist()
            assert sorted(seen) == [p for p in range(query - 3, query + 1) if p >= 0]
        start += count


def test_caches_that_do_not_fit_are_refused_with_their_size():
    small = SlotLayer(None, 1, 1, 1)
    small.lazy_initialization(torch.zeros(1, 8, 1, 128), torch.zeros(1, 8, 1, 128))
    large = SlotLayer(None, 4096, 2**20, 1)
    with pytest.raises(
        UserError, match=r"K/V of 4096 sequences of 1048576 tokens need 32768\.0 GiB"
    ):
        check_room([(small, large)], torch.device("cpu"))


@pytest.mark.parametrize(("short", "fits"), [(0, True), (1, False)])
def test_caches_may_take_all_that_is_free(short, fits, monkeypatch):
    """K and V of 3 sequences of 100 tokens, 2 heads of 4 in fp32."""
    small, large = SlotLayer(None, 1, 1, 1), SlotLayer(None, 3, 100, 1)
    small.lazy_initialization(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4))
    needed = 2 * 3 * 100 * 2 * 4 * 4
    monkeypatch.setattr("ee_tuning.passes.cache.free_memory", lambda _: needed - short)
    if fits:
        check_room([(small, large)], torch.device("cpu"))
    else:
        with pytest.raises(UserError, match="K/V of 3 sequences of 100 tokens"):
            check_room([(small, large)], torch.device("cpu"))


BAD: list[tuple] = [
    ([[]], {}, "prompt is empty"),
    ([[1] * 65], {}, "context is 64"),
    (1, {}, r"prompts of shape \(B, P\)"),
    (torch.zeros(0, 3), {}, r"prompts of shape \(B, P\), not \(0, 3\)"),
    ([[1]], {"threshold": 1.5}, r"outside \[0, 1\]"),
    ([[1]], {"threshold": -0.1}, r"outside \[0, 1\]"),
    ([[1]], {"threshold": None}, "None is no number: give one from 0 to 1, or one per exit"),
    ([[1]], {"threshold": [0.5]}, r"\[0\.5\] is no number: give one from 0 to 1, or one per exit"),
    ([[1]], {"threshold": True}, "True is no number: give one from 0 to 1, or one per exit"),
    ([[1]], {"threshold": {1: 0.5}}, "no threshold for the exit at layer 2"),
    ([[1]], {"threshold": {1: 0.5, 2: 0.5, 3: 0.5, 9: 0.5}}, "threshold for layer 9"),
    ([[1]], {"mode": "fast"}, "use one of full, fixed, threshold, speculative"),
    ([[1]], {"measure": "luck"}, "use one of probability, margin, entropy"),
    ([[1]], {"mode": "fixed"}, "needs one exit"),
    ([[1]], {"exit_layers": [4]}, "no exit at layer 4"),
    ([[1]], {"exit_layers": [9]}, "exit layer 9 does not exist"),
    ([[1]], {"max_pending": -1}, "whole number from 1"),
    ([[1]], {"max_pending": 0}, "max_pending 0 is not possible: .*, or use mode full"),
    ([[1]], {"max_pending": 0, "mode": "speculative"}, "max_pending 0 is not possible"),
    ([[1]], {"num_beams": 2}, "beam search"),
    ([[1, 1], [1, 0]], {"attention_mask": torch.tensor([[1, 1], [1, 0]])}, "padded on its right"),
    ([[1], [2]], {"streamer": object()}, "a streamer takes one text"),
    ([[96]], {}, "outside the vocabulary of 96"),
    ([[1, 2]], {"attention_mask": torch.ones(1, 3)}, r"attention_mask has shape \(1, 3\)"),
    ([[1]], {"assistant_model": object()}, "assistant_model cannot be had with early exits"),
    ([[1]], {"past_key_values": object()}, "past_key_values cannot be had"),
    ([[1]], {"cache": object()}, "cache cannot be had"),
    ([[1]], {"prompt_lookup_num_tokens": 3}, "assisted generation is not possible"),
    ([[1]], {"guidance_scale": 2.0}, "guidance_scale is not possible"),
    ([[1]], {"do_sample": True, "temperature": 0.0}, "strictly positive float"),
    ([[1]], {"do_sample": True, "top_p": 3.0}, "top_p is 3: it must be above 0 and at most 1"),
    ([[1]], {"do_sample": True, "top_p": 0.0}, "top_p is 0: it must be above 0 and at most 1"),
    ([[1]], {"do_sample": True, "top_p": float("nan")}, "top_p is nan: it must be a finite"),
    ([[1]], {"do_sample": True, "min_p": 2.0}, "min_p is 2: it must be at least 0 and at most 1"),
    ([[1]], {"treshold": 0.5}, "not used by the model"),
    ([[1]], {"stop_strings": "a"}, "stop_strings need the tokenizer"),
]


@pytest.mark.parametrize(("ids", "kwargs", "message"), BAD)
def test_bad_calls(ids, kwargs, message):
    ids = torch.as_tensor(ids, dtype=torch.long)
    with pytest.raises(UserError, match=message):
        early_exit().generate(ids, max_new_tokens=2, **kwargs)


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        (None, "NoneType"),
        ([[1]], "list"),
        (BatchEncoding({}), "BatchEncoding"),
        ("a text", "str"),
        (torch.ones(1, 2), r"\(1, 2\) of torch.float32"),
    ],
)
def test_prompts_that_are_no_table_of_ids(ids, found):
    with pytest.raises(UserError, match=rf"prompts of shape \(B, P\), not {found}.*tokenizer\("):
        early_exit().generate(ids)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_texts_end_where_learned_positions_do(family):
    """Every position may be taken, and none beyond."""
    model, ids = early_exit(family), torch.tensor([prompt(60)])
    common = {"mode": "full", "eos_token_id": None}
    assert model.generate(ids, max_new_tokens=4, **common).sequences.shape == (1, 64)
    with pytest.raises(UserError, match="65 tokens with the prompt are asked for"):
        model.generate(ids, max_new_tokens=5, **common)


def test_requests_that_do_not_fit_an_engine_are_refused():
    engine = Engine(early_exit(), [1], capacity=16, max_pending=2)
    for request, message in [
        (
            Request([1], Full(DEPTH), 17),
            "17 tokens .* there is room for 16: ask for fewer, or raise capacity",
        ),
        (
            Request([1], Fixed(2), 9),
            "exit at layer 2 is not among those of all prompts",
        ),
        (
            Request([1], Full(DEPTH, max_pending=3), 9),
            "max_pending 3 is above that of all prompts, 2",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            list(engine.stream([request]))
        assert not engine.busy


def test_no_tokens_are_in_no_places():
    """As where all texts have ended that a stage hands on."""
    ring = torch.rand(3, 4, 5)
    assert ring[places_in(ring, [], [])].shape == (0, 5)
    assert ring[places_in(ring, [2], [6])].equal(ring[2, 2][None])
