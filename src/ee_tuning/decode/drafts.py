"""The draft round: exits draft, the layers behind them verify, what the end agrees with is kept.

Self-speculation as in LayerSkip (arXiv 2404.16710): a draft's layers up to its exit are computed
once, and verification goes on from their K/V and hidden states. In other modes a round is the same
without verification: what leaves at an exit is settled there.
"""

from __future__ import annotations

from collections.abc import Sequence

from ee_tuning.decode.sampling import Asked, Choice, Token, choose
from ee_tuning.decode.sequences import Row, Sequences

Settled = tuple[Row, list[Token]]


def draft_round(sequences: Sequences, rows: Sequence[Row]) -> list[Settled]:
    """Let `rows` go down until some of them have tokens that are settled; these, by row.

    A row for which no token could be chosen has none, but its request's `error`.
    """
    settled: list[Settled] = []
    while not settled:
        # The shallowest door first: so all draft until each needs depth, then go deep together.
        door = min(row.door for row in rows)
        layer, standing = sequences.stops[door], [row for row in rows if row.door == door]
        for answers in sequences.advance(door, standing):
            # Draft: at an exit that is sure enough, the token leaves, and the next one begins.
            leaving = [
                (row, found)
                for row, found in answers
                if not row.is_last(door) and row.policy.leaves(layer, found, row.ids)
            ]
            asked = [Asked(row.request.chooser, row.ids, [found]) for row, found in leaving]
            for (row, found), choice in zip(leaving, choose(asked), strict=True):
                token = Token(choice.token, layer, found.confidence)
                token.probabilities = choice.probabilities
                row.leave(token)
                if choice.error is not None or not row.policy.verifies:
                    settled.append(_settled(row, choice, [token]))
            # Verify: what the end says to each of the drafts, and to what follows them.
            ending = [
                (row, [found.earlier(back) for back in range(len(row.drafts), -1, -1)])
                for row, found in answers
                if row.is_last(door)
            ]
            asked = [Asked(row.request.chooser, row.ids, said, row.drafts) for row, said in ending]
            # Keep: the drafts that it agrees with, and its own token after these.
            for (row, said), choice in zip(ending, choose(asked), strict=True):
                drafts, kept = row.drafts, choice.kept
                row.keep(kept, choice.token)
                own = Token(choice.token, layer, said[kept].confidence)
                settled.append(_settled(row, choice, [*drafts[:kept], own]))
                if row.pace is not None:
                    row.pace.learn(len(drafts), kept)
                    row.limit = row.pace.drafts(row.left)
    return settled


def first_tokens(sequences: Sequences, rows: Sequence[Row]) -> list[Settled]:
    """The tokens that follow the prompts of new rows, which go to the end; as `draft_round`."""
    settled: list[Settled] = []
    for reads in sequences.read(rows):
        found = [(row, read.found) for row, read in reads if read.found is not None]
        asked = [Asked(row.request.chooser, row.ids, [said]) for row, said in found]
        for (row, said), choice in zip(found, choose(asked), strict=True):
            row.keep(0, choice.token)
            token = Token(choice.token, row.policy.end, said.confidence)
            settled.append(_settled(row, choice, [token]))
            if row.pace is not None:
                row.limit = row.pace.drafts(row.left)
    return settled


def _settled(row: Row, choice: Choice, tokens: list[Token]) -> Settled:
    row.request.error = choice.error
    return row, tokens if choice.error is None else []
