"""lm-eval by way of the server says what it says of the model in this process."""

import pytest
from helpers.serving import in_a_thread

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")


@pytest.mark.slow
def test_local_completions_says_what_the_model_says(base, tiny_exits):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    pairs = [("def function_1(value):\n", "    total = 1\n"), ("print(", "function_2([1, 2])"),
             ("    for item in", " value:"), ("return", " total\n\n\nprint")]  # fmt: skip
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    alone = HFLM(pretrained=base, device="cpu", batch_size=1, dtype="float32")
    with in_a_thread(exits=tiny_exits, mode="full") as running:
        served = LocalCompletionsAPI(
            model=tiny_exits,
            base_url=f"{running.url}/v1/completions",
            tokenizer=base,
            tokenizer_backend="huggingface",
            max_length=128,
        )
        found = served.loglikelihood(asked, disable_tqdm=True)
    for (ours, greedy), (theirs, expected) in zip(
        found, alone.loglikelihood(asked, disable_tqdm=True), strict=True
    ):
        assert ours == pytest.approx(theirs, abs=1e-3)
        assert greedy == expected
