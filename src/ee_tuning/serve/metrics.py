"""What Prometheus is told, under vLLM's names where the meaning is the same."""

from __future__ import annotations

from collections import Counter as Tokens

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ee_tuning.calibrate.audit import Audit
from ee_tuning.exit_config import exit_name, mean_depth
from ee_tuning.serve.choices import Choice, Delta

P = "ee_tuning:"
FIRST = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
EACH = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2.5)
WHOLE = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, model_name: str, audit: Audit | None = None) -> None:
        """audit: whose risk is to be told."""
        self.registry, self._audit = CollectorRegistry(), audit
        if audit is not None:
            self.risk = self._gauge("audit_risk", "Mean loss of the texts that were verified")
            self.low = self._gauge("audit_risk_low", "What the risk is at least")
            self.texts = self._gauge("audit_texts", "Texts that were verified")
            self.epsilon = self._gauge(
                "audit_epsilon", "What the risk was calibrated to stay below"
            )
        self._name = model_name
        # Tokens by layer, all and those that the counters have: there are many, and few questions.
        self._left, self._told = Tokens[int](), Tokens[int]()
        self.running = self._gauge("num_requests_running", "Texts that are written")
        self.waiting = self._gauge("num_requests_waiting", "Texts that wait for a slot")
        self.mean_depth = self._gauge("mean_depth", "Layers per token, of all tokens so far")
        self.prompt = self._counter("prompt_tokens", "Tokens of prompts")
        self.generated = self._counter("generation_tokens", "Tokens written")
        self.finished = self._counter("request_success", "Texts that ended", "finished_reason")
        self.failed = self._counter("request_failure", "Texts that did not end", "reason")
        self.first = self._times("time_to_first_token_seconds", "From a request to a token", FIRST)
        self.between = self._times(
            "request_time_per_output_token_seconds", "Per token of a text", EACH
        )
        self.whole = self._times("e2e_request_latency_seconds", "From a request to its end", WHOLE)
        self.queued = self._times("request_queue_time_seconds", "Waiting for a slot", FIRST)
        self.drafts = self._counter("spec_decode_num_drafts", "Rounds that had drafts")
        self.drafted = self._counter("spec_decode_num_draft_tokens", "Drafts")
        self.accepted = self._counter("spec_decode_num_accepted_tokens", "Drafts that were kept")
        self.per_place = self._counter(
            "spec_decode_num_accepted_tokens_per_pos", "Kept drafts by place", "position"
        )
        self.layers = self._counter("exit_layer", "Tokens by the layer they left at", "layer")

    def settled(self, delta: Delta) -> None:
        """Tokens came."""
        self._left.update(token.exit_layer for token in delta.tokens)
        for drafts, kept in delta.rounds:
            self.drafts.labels(self._name).inc()
            self.drafted.labels(self._name).inc(drafts)
            self.accepted.labels(self._name).inc(kept)
            for place in range(kept):
                self.per_place.labels(self._name, place).inc()

    def began(self, choice: Choice, submitted: float) -> None:
        """A text got a slot."""
        self.prompt.labels(self._name).inc(len(choice.request.ids))
        self.queued.labels(self._name).observe(choice.started - submitted)

    def said_first(self, choice: Choice, submitted: float) -> None:
        """Its first token came."""
        self.first.labels(self._name).observe(choice.first - submitted)

    def ended(self, choice: Choice, submitted: float) -> None:
        """It came to its end."""
        self.finished.labels(self._name, choice.finish).inc()
        self.whole.labels(self._name).observe(choice.ended - submitted)
        if len(choice.layers) > 1:
            each = (choice.ended - choice.first) / (len(choice.layers) - 1)
            self.between.labels(self._name).observe(each)

    def gave_up(self, reason: str, texts: int = 1) -> None:
        """So many did not."""
        self.failed.labels(self._name, reason).inc(texts)

    def text(self, running: int, waiting: int) -> bytes:
        """All of it, as Prometheus reads it."""
        for layer, number in self._left.items():
            counter = self.layers.labels(self._name, exit_name(layer))
            counter.inc(number - self._told[layer])
            self.generated.labels(self._name).inc(number - self._told[layer])
            self._told[layer] = number
        self.mean_depth.labels(self._name).set(mean_depth(self._told))
        self.running.labels(self._name).set(running)
        self.waiting.labels(self._name).set(waiting)
        if self._audit is not None:
            found = self._audit.found()
            for gauge, value in (
                (self.risk, found.risk), (self.low, found.low), (self.texts, found.texts),
                (self.epsilon, found.epsilon),
            ):  # fmt: skip
                gauge.labels(self._name).set(value)
        return generate_latest(self.registry)

    def _gauge(self, name: str, said: str) -> Gauge:
        return Gauge(P + name, said, ["model_name"], registry=self.registry)

    def _counter(self, name: str, said: str, *labels: str) -> Counter:
        return Counter(P + name, said, ["model_name", *labels], registry=self.registry)

    def _times(self, name: str, said: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(P + name, said, ["model_name"], buckets=buckets, registry=self.registry)
