"""What the processes of a run send each other, read and wait for."""

import json

import pytest


@pytest.fixture(scope="module")
def runs(new_runs):
    runs = new_runs()
    runs.add("sends-sequence", 4, tp=2, pp=2, sequence_parallel=True, count=True)
    runs.add("sends", 2, pp=2, count=True, trace=True)
    # Exits with so little to tune that micro-batches go down one after another.
    few = {"arch": "norm", "head": "shared", "loss": "kl", "init": "copy"}
    runs.add("sends-ends", 2, pp=2, count=True, layers="1,2,5", stage_layers=[3, 2], **few)
    runs.add("sends-sources", 2, pp=2, count=True, layers="0,1", arch="draft,norm",
        head="shared", draft_sources="1,2,5", stage_layers=[3, 2], init="copy")  # fmt: skip
    runs.add("ahead", 2, pp=2, ahead=True)
    runs.add("sums", 2, dp=2, count=True, trace=True)
    runs.add("sums-shard", 2, dp=2, shard=True, shard_backbone=True, count=True)
    runs.start()
    return runs


def in_steps(runs, name, rank):
    """What a rank sends and receives in each of the three steps: (operation, bytes, rank)."""
    found = runs.traffic(name, rank)
    return [[tuple(what) for number, *what in found if number == step] for step in (1, 2, 3)]


def test_stages_send_activations_forward_and_nothing_back(runs):
    """A global batch of 5 is 2 + 2 + 1 sequences of 32 tokens, 32 fp32 values each."""
    row = 32 * 32 * 4
    sent = [("send", rows * row, 1) for rows in (2, 2, 1)]
    received = [("recv", nbytes, 0) for _, nbytes, _ in sent]
    assert in_steps(runs, "sends", 0) == [sent] * 3
    assert in_steps(runs, "sends", 1) == [received] * 3
    # So it is in validation; else there are only numbers and hashes, from host to host.
    for rank, operation in enumerate(["send", "recv"]):
        outside = [what for number, *what in runs.traffic("sends", rank) if number == 0]
        stages = [what for what in outside if what[0] in ("send", "recv")]
        assert {what[0] for what in stages} == {operation}
        assert sum(nbytes for name, nbytes, _ in outside if name == "allreduce") < row


def test_the_last_stage_sends_back_what_exits_are_compared_with(runs):
    """Of as many micro-batches, after the first stage has sent the next one on."""
    row = 32 * 32 * 4
    sizes = [rows * row for rows in (2, 2, 1)]
    order = [("send", 0), ("send", 1), ("recv", 0), ("send", 2), ("recv", 1), ("recv", 2)]
    first = [(operation, sizes[m], 1) for operation, m in order]
    last = [(operation, nbytes, 0) for nbytes in sizes for operation in ("recv", "send")]
    assert in_steps(runs, "sends-ends", 0) == [first] * 3
    assert in_steps(runs, "sends-ends", 1) == [last] * 3
    # Validation compares exits with the data alone.
    outside = [name for number, name, *_ in runs.traffic("sends-ends", 0) if number == 0]
    assert "send" in outside
    assert "recv" not in outside


def test_what_a_draft_exit_reads_of_other_stages_goes_forward(runs):
    """Of the first stage's three layers two sources, besides the state after them."""
    row = 32 * 32 * 4
    sent = [("send", rows * row, 1) for rows in (2, 2, 1) for _ in range(3)]
    assert in_steps(runs, "sends-sources", 0) == [sent] * 3


def test_with_sequence_parallelism_a_rank_sends_its_positions_alone(runs):
    whole = in_steps(runs, "sends", 0)
    for rank in (0, 1):
        steps = in_steps(runs, "sends-sequence", rank)
        sent = [[what for what in step if what[0] == "send"] for step in steps]
        assert sent == [[("send", n // 2, rank + 2) for _, n, _ in step] for step in whole]


def has_read(runs, name, rank):
    """Parameters of the backbone that a rank has, and whether a part of them: see `is_part`."""
    return json.loads((runs.root / f"{name}.traffic-{rank}.read").read_text())


def test_a_tensor_parallel_rank_reads_its_part_of_matrices_alone(runs):
    for rank in range(4):
        parts = [
            part for part in has_read(runs, "sends-sequence", rank).values() if part is not None
        ]
        assert len(parts) > 7  # matrices of attention and MLP, in two layers at least
        assert all(parts)


def test_a_stage_reads_its_own_layers_alone(runs):
    first, second = (has_read(runs, "sends", rank) for rank in (0, 1))
    assert "model.embed_tokens.weight" in first
    # Exits of both are made from the final norm, and from the head.
    assert first.keys() & second.keys() == {"model.norm.weight", "lm_head.weight"}
    layers = {name.split(".")[2] for name in first | second if ".layers." in name}
    assert layers == set("01234")


def test_a_stage_sends_on_before_it_works_on_its_exits(runs):
    """The first stage's exit work, which waits for that, would never begin."""
    assert runs.error("ahead") is runs.error("ahead", 1) is None
    assert (runs.root / "ahead.ahead").exists()


def test_the_timeline_of_a_step(runs):
    """Each stage's forward of a micro-batch begins after the one before ended; a chart is drawn."""
    events = json.loads((runs.root / "sends/trace.json").read_text())
    assert list(events) == ["rank 0 (pp 0, dp 0, tp 0)", "rank 1 (pp 1, dp 0, tp 0)"]
    first, second = events.values()
    assert {what for what, _, _ in first} <= {"forward", "exit work", "waiting"}
    assert {"forward", "exit work", "waiting"} == {what for what, _, _ in second}
    received = [stop for what, _, stop in second if what == "waiting"]
    forward = [stop for what, _, stop in first if what == "forward"]
    assert min(forward) < max(received)
    assert min(start for what, start, _ in second if what == "forward") > min(forward)
    # The last stage runs a micro-batch's layers before it waits for the next one.
    order = [what for what, *_ in second if what != "exit work"]
    assert order[:7] == ["waiting"] + 2 * ["waiting", "forward", "forward"]
    waits = [what for own in events.values() for what, _, _ in own if what == "waiting"]
    assert len(waits) == 2 + 3 + 4  # for what was sent, three micro-batches, four exits' sums
    assert (runs.root / "sends/trace.png").read_bytes()[:4] == b"\x89PNG"


def test_data_parallel_ranks_exchange_gradients_of_exits(runs):
    """Each once a step, however many micro-batches; before them, the number of labels."""
    sizes = [value.nbytes for value in runs.tensors("sums", "exits.safetensors").values()]
    for rank in (0, 1):
        for (*count,), *sums in in_steps(runs, "sums", rank):
            assert count == ["allreduce", 8, 2]
            assert {(operation, ranks) for operation, _, ranks in sums} == {("allreduce", 2)}
            assert sorted(nbytes for _, nbytes, _ in sums) == sorted(sizes)


def test_with_shard_ranks_exchange_gradients_of_exits_once(runs):
    """All of them have a first dim that two ranks divide; norms' rows too."""
    sizes = [value.nbytes for value in runs.tensors("sums", "exits.safetensors").values()]
    for rank in (0, 1):
        for step in in_steps(runs, "sums-shard", rank):
            parts = sorted(nbytes for name, nbytes, _ in step if "reduce_scatter" in name)
            assert parts == sorted(nbytes // 2 for nbytes in sizes)


def test_with_shard_backbone_layers_are_gathered_for_every_micro_batch(runs):
    """Five layers of as many values; of two micro-batches rank 1 has one without labels."""
    for rank in (0, 1):
        for step in in_steps(runs, "sums-shard", rank):
            gathered = [nbytes for name, nbytes, _ in step if "gather" in name]
            assert len(gathered) == 5 * 2
            assert len(set(gathered)) == 1


def test_a_sum_of_gradients_goes_on_beside_the_next_exit(runs):
    """The last two exits' sums are waited for once all exits' losses are back-propagated."""
    events = json.loads((runs.root / "sums/trace.json").read_text())
    for own in events.values():
        work = [what for what, _, _ in sorted(own, key=lambda e: e[1]) if what != "forward"]
        assert work[-4:] == ["waiting", "exit work"] * 2
        assert work[-5] == "exit work"
