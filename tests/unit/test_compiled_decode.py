"""Compiled passes of decoding give the same tokens as others, and are compiled once."""

import random
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import sympy
import torch
import torch._inductor.config
from helpers.compiling import kinds_met
from helpers.families import tiny
from helpers.lookups import let_texts_draft
from helpers.prompts import padded, prompt
from torch._dynamo.utils import counters
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.sizevars import SizeVarAllocator
from torch._inductor.utils import IndentedBuffer
from torch._inductor.virtualized import V
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from ee_tuning import EarlyExitModel, ExitConfig
from ee_tuning.decode import Engine, Fixed, Full, Request, Speculative, Threshold
from ee_tuning.decode.sampling import Chooser
from ee_tuning.exit_config import DRAFT, LOOKUP
from ee_tuning.passes.compiler import compiled_kernels
from ee_tuning.passes.draws import ALL, NOTHING, TOP_P
from ee_tuning.passes.graphs import SAME_SUMS, Graphs, Sizes
from ee_tuning.passes.warm import to_warm
from ee_tuning.serve.core import WARM

pytestmark = pytest.mark.slow

COMMON = {"max_new_tokens": 20, "eos_token_id": None, "max_pending": 3}
WAYS = [
    {"mode": "threshold", "threshold": 0.02},
    {"mode": "speculative", "threshold": 0.02},
    {"mode": "speculative", "threshold": 0.0},
]


@pytest.fixture(scope="module")
def model():
    """Two segments of one layer each, and an exit with K/V of its own: the fewest graphs."""
    base = tiny("llama", num_hidden_layers=2, max_position_embeddings=256)
    return EarlyExitModel.from_base(base, ExitConfig("1", arch="layer")).eval()


def assert_same(model, inputs, **settings):
    plain, compiled = (
        model.generate(**inputs, compile=compile, **settings) for compile in (False, True)
    )
    assert torch.equal(compiled.sequences, plain.sequences)
    assert torch.equal(compiled.exit_layers, plain.exit_layers)


def test_compiled_passes_give_the_same_tokens_and_compile_once(model):
    """Of one row, for prompts shorter than a chunk, of one and of more."""
    assert model.warm_up(slots=1, capacity=96, compile=True, threshold=0.5, max_pending=3) > 1
    graphs = counters["stats"]["unique_graphs"]
    for length in (2, 5, 64, 65, 67, 70):
        for way in WAYS:
            assert_same(model, {"input_ids": torch.tensor([prompt(length)])}, **way, **COMMON)
    assert counters["stats"]["unique_graphs"] == graphs


def test_passes_of_sampled_texts_are_warmed_up(model, monkeypatch):
    """With the arguments of `generate`, of which greedy ones would not do."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    way = {"threshold": 0.5, "max_pending": 3, "do_sample": True, "temperature": 0.7, "top_k": 0}
    model.warm_up(capacity=96, compile=True, **way)
    graphs = counters["stats"]["unique_graphs"]
    torch.manual_seed(0)
    model.generate(torch.tensor([prompt(5)]), compile=True, max_new_tokens=20, **way)
    assert counters["stats"]["unique_graphs"] == graphs


def test_passes_that_verify_what_a_text_drafts_are_warmed_up(model, monkeypatch):
    """Also where the first segment is the last one."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    way = {"mode": "speculative", "threshold": 1, "lookup": True}
    model.warm_up(capacity=96, compile=True, max_pending=3, **way)
    graphs = counters["stats"]["unique_graphs"]
    let_texts_draft(monkeypatch, most=3)
    ids = torch.tensor([prompt(4) * 5])
    assert_same(model, {"input_ids": ids}, **way, **COMMON)
    assert (model.generate(ids, compile=True, **way, **COMMON).exit_layers == -1).any()
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("exit_layers", [[], [1], [LOOKUP], [1, LOOKUP]])
@pytest.mark.parametrize("slots", [1, 3])
def test_no_length_of_a_prompt_is_met_for_the_first_time(model, exit_layers, slots, monkeypatch):
    met = kinds_met(monkeypatch)
    settings = {"slots": slots, "capacity": 144, "max_pending": 8}
    engine = Engine(model, exit_layers, compile=True, **settings)
    engine.warm_up()
    known, before = {*engine.passes.graphs._kept}, {*met}
    requests = [Request(prompt(n, n), Full(2), n + 3) for n in range(1, 140)]
    assert len([*engine.stream(requests)]) == 3 * len(requests)
    assert {*engine.passes.graphs._kept} == known
    assert met == before


@pytest.mark.parametrize("exit_layers", [[LOOKUP, DRAFT, 2], [2], [LOOKUP, DRAFT]])
@pytest.mark.parametrize("slots", [1, 3])
def test_no_mode_meets_a_size_of_pass_for_the_first_time(exit_layers, slots, monkeypatch):
    """Beside texts of others that come and end, with any number of drafts, sampled or not."""
    met = kinds_met(monkeypatch)
    draw, most = random.Random(0), 4
    monkeypatch.setattr("ee_tuning.decode.limits.plan", lambda *_: draw.randint(0, most))
    base = tiny("llama", max_position_embeddings=256)
    config = ExitConfig("0,2", arch="draft,norm") if DRAFT in exit_layers else ExitConfig("2")
    model, size = EarlyExitModel.from_base(base, config).eval(), {"slots": slots, "capacity": 140}
    engine = Engine(model, exit_layers, max_pending=most, compile=True, drafts=True, **size)
    engine.warm_up(samples=[*WARM.values()])
    known, before = {*engine.passes.graphs._kept}, {*met}
    drafting = partial(Speculative, 4, max_pending=most)
    policies = [Full(4, max_pending=most)]
    if 2 in exit_layers:
        policies += [drafting({2: 0.02}), Threshold(4, {2: 0.02}, max_pending=most)]
        policies += [Fixed(2, max_pending=most)]
    if DRAFT in exit_layers:
        policies += [drafting(bar=0.0), drafting(lookup=True), drafting(bar=0.0, lookup=True)]
    warpers, requests = [TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.9)], []
    for number in range(40):
        length, chosen = draw.randint(1, 100), draw.randint(0, 2)
        chooser = Chooser(warpers[:chosen], chosen > 0, number if chosen else None)
        longest = length + draw.randint(1, 39)
        ids = prompt(length, number)
        requests.append(Request(ids, draw.choice(policies), longest, chooser))
    assert len({request for request, _ in engine.stream(requests)}) == len(requests)
    assert {*engine.passes.graphs._kept} == known
    assert met == before


@pytest.mark.parametrize("tune", [False, True])
def test_every_piece_of_a_pass_is_compiled_for_one_order_of_sums(tune):
    """And not the first alone: tracing sets some of the compiler's settings back."""
    config, seen = torch._inductor.config, []

    def backend(graph, inputs):
        seen.append({name: config.get_config_copy()[name] for name in SAME_SUMS})
        return graph.forward

    before = {name: config.get_config_copy()[name] for name in SAME_SUMS}
    pieces = [torch.compile(lambda x, k=k: x * k, backend=backend, dynamic=False) for k in range(3)]
    Graphs(torch.device("cpu")).run("", lambda: [one(torch.ones(2)) for one in pieces], tune)
    tuned = before | {"coordinate_descent_tuning": True}
    assert seen == [tuned if tune else SAME_SUMS] * 3
    assert SAME_SUMS != before == {name: config.get_config_copy()[name] for name in SAME_SUMS}


@pytest.mark.parametrize("numbers", [576, 1025, 1536, 2048, 2049, 4096])
@pytest.mark.parametrize("hint", [ReductionHint.INNER, ReductionHint.OUTER])
def test_a_block_has_one_sum_of_what_lies_side_by_side(numbers, hint):
    """Where the compiler's own rule says so, and at widths at which it would have two."""
    features = SimpleNamespace(
        reduction_numel=sympy.Integer(numbers), get_reduction_hint=lambda: hint
    )
    graph = SimpleNamespace(sizevars=SizeVarAllocator())

    def whole():
        with V.set_graph_handler(graph):
            return bool(V.choices.should_use_persistent_reduction(features, False))

    usual = whole()
    with compiled_kernels():
        assert whole() == (usual or (hint == ReductionHint.INNER and numbers <= 2048))
    assert whole() == usual == (hint == ReductionHint.INNER and numbers <= 1024)


@pytest.mark.parametrize(("inside", "looped"), [(False, False), (True, False), (True, True)])
def test_a_kernel_of_the_compiler_waits_for_those_before_it_whatever_it_reads(inside, looped):
    """Ahead of a loop, where there is one. Where it cannot begin early it does not wait either."""
    for able in (True, False):
        lines, body = IndentedBuffer(), IndentedBuffer()
        kernel = SimpleNamespace(
            _enable_pdl_codegen=lambda: able,  # noqa: B023
            GDC_WAIT=TritonKernel.GDC_WAIT,
            inside_reduction=inside,
            range_trees=[SimpleNamespace(is_loop=looped)],
            body=body,
        )
        with compiled_kernels():
            TritonKernel._handle_pdl_before_access(kernel, lines, "buf1", consider_reads=True)
        there, elsewhere = (body, lines) if looped else (lines, body)
        assert there.getvalue().split() == [TritonKernel.GDC_WAIT] * able
        assert not elsewhere.getvalue()


def test_passes_of_several_rows_are_traced_once(model, monkeypatch):
    """Three rows, of which a pass may have two and be filled with the third, which is idle.

    Traced as for the compiler, but not translated, which takes ten times as long.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    rows = {"slots": 3, "capacity": 96}
    model.warm_up(**rows, compile=True, threshold=0.5, max_pending=3)
    graphs = counters["stats"]["unique_graphs"]
    ids, mask = padded([prompt(5, 1), prompt(3, 2), prompt(4, 3)])
    for way in WAYS:
        assert_same(model, {"input_ids": ids, "attention_mask": mask}, **way, **COMMON)
    # Two rows go deep while the first one leaves: it is the idle one.
    ways = [{"threshold": 0.0}, {"mode": "full"}, {"mode": "full"}]
    prompts = [{"input_ids": prompt(5, i), **way} for i, way in enumerate(ways)]
    plain, compiled = (
        {number: out.sequences.tolist() for number, out in outputs}
        for outputs in (
            model.generate_batch(prompts, **rows, compile=compile, **COMMON)
            for compile in (False, True)
        )
    )
    assert compiled == plain
    assert counters["stats"]["unique_graphs"] == graphs


def test_an_engine_for_full_depth_compiles_no_passes_of_drafts():
    """64 slots: tokens of 1, 4, 16 and 64 rows, and chunks of prompts, at most four together."""
    base = tiny("llama", num_hidden_layers=2, max_position_embeddings=256)
    model = EarlyExitModel.from_base(base, ExitConfig("1/1", "embedding", head="shared")).eval()
    engine = Engine(model, [LOOKUP], slots=64, capacity=96, compile=True)
    numbers = [
        len(to_warm(engine.passes, ["probability"], kinds, texts))
        for kinds in ([NOTHING], [NOTHING, ALL, ALL | TOP_P])
        for texts in (False, True)
    ]
    # Chunks with and without a token behind them; one token, fed to the next pass or not, each in
    # all ways to choose; and for each number of rows what tells of windows.
    assert numbers == [8 + 8, 15 + 8, 20 + 16, 41 + 16]


def test_half_of_the_drafts_of_several_texts_are_verified_for_less():
    """Those of one text are all verified at once, beside free slots, too."""
    one, two = (Sizes(slots, 96, 7, compile=True, drafts=True) for slots in (1, 2))
    assert [one.windows, two.windows] == [[1, 7], [1, 4, 7]]
    for sizes, texts, lengths in ((one, 1, [7] * 4), (two, 1, [7] * 4), (two, 2, [4, 4, 7, 7])):
        assert [sizes.length(1 + k, texts) for k in (1, 3, 4, 6)] == lengths
        assert sizes.sized([*range(texts)], 2, 9)[1][1] == lengths[0]
    passes = {(rows, length) for _, rows, length, *_ in two.every(1, True, True, drafts=True)}
    assert {*product([1, 2], [1, 4, 7])} - passes == {(1, 4)}


@pytest.mark.parametrize("longest", [1, 2, 7, 64, 65, 100, 127, 128, 130])
def test_what_drafts_ask_for_is_compiled(longest):
    """Also where they, or half of them, are as many as a chunk of a prompt has tokens, or more."""
    sizes = Sizes(17, 512, longest, compile=True, drafts=True, far=True)
    passes = {
        (rows, length)
        for _, rows, length, _, after, _ in sizes.every(1, True, True, drafts=True)
        if after == "each" or length == 1
    }
    every = product((1, 2, 17), range(1, longest + 1))
    asked = {sizes.sized([*range(texts)], tokens, 0)[1][:2] for texts, tokens in every}
    assert asked == passes


def test_sizes_of_layers_that_look_far_are_few():
    """Where products take 16 rows at a time, and attention skips what lies behind a text."""
    sizes = Sizes(64, 4096, 9, compile=True, drafts=True, far=True)
    passes = {(rows, length, reach) for _, rows, length, reach, *_ in sizes.every(1, True, True)}
    tokens, prompts = [1, 16, 64], [1, 4]
    every = [*product(tokens, [1], [1024, 4160]), *product(prompts, [64], [1024, 4160])]
    assert passes == {*every}
    assert sizes.together == 4
    assert len(sizes.filled([3, 5])) == 16
    assert len(sizes.filled([3, 5], 64)) == 4
