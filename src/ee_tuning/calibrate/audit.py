"""While texts are decoded with calibrated thresholds: is the risk still what it was?"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, fields
from weakref import WeakKeyDictionary

import numpy as np

from ee_tuning.calibrate.bounds import running_bound
from ee_tuning.certificate import Certificate
from ee_tuning.decode.sampling import Token
from ee_tuning.decode.sequences import Request
from ee_tuning.decode.settings import Audited, Policy, Threshold
from ee_tuning.errors import UserError


@dataclass(frozen=True)
class Finding:
    """What an audit has found so far.

    texts: that were audited. risk: their mean loss. low: what the risk is at least, or has come to
    be, with probability 1 − delta at all times at once. drifted: that is more than the
    certificate's epsilon: texts are of another kind than those of the calibration.
    """

    texts: int
    risk: float
    low: float
    epsilon: float
    drifted: bool


class Audit:
    """Decodes one text in so many in mode `speculative` with the same thresholds.

    Such a text is full depth's. Its drafts are the tokens that would have left, and those that are
    rejected are places at which the token would have been another: their share of the text is the
    loss of the risk ``next-token``. It costs no more than verifying.
    """

    def __init__(self, found: Certificate | None, every: int, seed: int = 0) -> None:
        """found: a model's `calibration`. every: one text in so many, drawn by `seed`.

        Raises:
            UserError: the model was not calibrated, or for another risk.
        """
        if not isinstance(every, int) or every < 1:
            raise UserError(
                f"an audit of one text in {every!r} is not possible: give a whole number from 1"
            )
        if found is None or found.risk != "next-token":
            what = "were not calibrated" if found is None else f"were calibrated for {found.risk}"
            raise UserError(
                f"an audit is of the risk next-token, and the exits {what}: run ee-tuning "
                "calibrate --risk next-token"
            )
        self.certificate = found
        self.every, self._draw = every, random.Random(seed)
        self._losses: list[float] = []
        self._counts: WeakKeyDictionary[Request, tuple[int, int]] = WeakKeyDictionary()
        self._lock = threading.Lock()  # requests may come from several threads

    def policy(self, policy: Policy) -> Policy:
        """That of a new request: now and then one that is audited in its place.

        What does not leave by the calibrated thresholds is left as it is.
        """
        own = {k: t for k, t in self.certificate.thresholds.items() if t < 1}
        with self._lock:
            drawn = self._draw.random() * self.every < 1
        if not drawn or type(policy) is not Threshold or {**policy.thresholds} != own or not own:
            return policy
        return Audited(**{one.name: getattr(policy, one.name) for one in fields(policy)})

    def take(self, request: Request, token: Token) -> None:
        """Take in a settled token of any request."""
        if not isinstance(request.policy, Audited):
            return
        wrong, places = self._counts.get(request, (0, 0))
        wrong, places = wrong + bool(token.rejected), places + 1
        self._counts[request] = wrong, places
        if token.ends:
            del self._counts[request]
            with self._lock:
                self._losses.append(wrong / places)

    def found(self) -> Finding:
        """What all texts that have ended show."""
        with self._lock:
            losses = np.array(self._losses)
        epsilon, delta = self.certificate.epsilon, self.certificate.delta
        low = running_bound(losses, delta)
        risk = float(losses.mean()) if len(losses) else 0.0
        return Finding(len(losses), risk, low, epsilon, low > epsilon)
