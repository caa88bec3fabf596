"""The draft round: exits draft, the layers behind them verify, what the end agrees with is kept.

Self-speculation as in LayerSkip (arXiv 2404.16710): a draft's layers up to its exit are computed
once, and verification goes on from their K/V and hidden states. In other modes a round is the same
without verification: what leaves at an exit is settled there.
"""

from __future__ import annotations

from collections.abc import Sequence

from ee_tuning.decode.passes import Prediction
from ee_tuning.decode.sampling import Token
from ee_tuning.decode.sequences import Row, Sequences

Settled = tuple[Row, list[Token]]


def draft_round(sequences: Sequences, rows: Sequence[Row]) -> list[Settled]:
    """Let `rows` go down until some of them have tokens that are settled; these, by row.

    A row whose own processors fail has none, but its request's `error`.
    """
    settled: list[Settled] = []
    while not settled:
        # The shallowest door first: so all draft until each needs depth, then go deep together.
        door = min(row.door for row in rows)
        standing = [row for row in rows if row.door == door]
        for row, found in sequences.advance(door, standing):
            layer, chooser, drafts = sequences.stops[door], row.request.chooser, row.drafts
            try:
                # Draft: at an exit that is sure enough, the token leaves, and the next one begins.
                if not row.is_last(door):
                    if row.policy.leaves(layer, found, row.ids):
                        id, q = chooser.choose(row.ids, found)
                        token = Token(id, layer, found.confidence, probabilities=q)
                        row.leave(token)
                        if not row.policy.verifies:
                            settled.append((row, [token]))
                    continue
                # Verify: what the end says to each of the drafts, and to what follows them.
                said = [found.earlier(back) for back in range(len(drafts), -1, -1)]
                kept, own = chooser.verify(row.ids, said, drafts)
                # Keep: the drafts that it agrees with, and its own token after these.
                row.keep(kept, own)
                token = Token(own, layer, said[kept].confidence)
                settled.append((row, [*drafts[:kept], token]))
                if row.pace is not None:
                    row.pace.learn(len(drafts), kept)
                    row.limit = row.pace.drafts(row.left)
            except Exception as error:  # of what the request brought with it: it ends alone
                row.request.error = error
                settled.append((row, []))
    return settled


def first_token(row: Row, found: Prediction | None) -> Settled:
    """The token that follows a prompt, which has gone to the end; errors as in `draft_round`."""
    assert found is not None
    try:
        own, _ = row.request.chooser.choose(row.ids, found)
    except Exception as error:
        row.request.error = error
        return row, []
    row.keep(0, own)
    if row.pace is not None:
        row.limit = row.pace.drafts(row.left)
    return row, [Token(own, row.policy.end, found.confidence)]
