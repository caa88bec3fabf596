"""Decoding in which the numbers of a token depend on its text alone, in every dtype.

A product or an attention picks its kernel by how much there is to do, and another kernel adds up in
another order. So a token that is verified together with drafts, or decoded beside other texts,
comes out a little different in half precision, now and then as another token. Here the products of
frozen layers and their attention are computed in one order, however many tokens share a pass.
"""

from ee_tuning.invariant.layers import Invariant

__all__ = ["Invariant"]
