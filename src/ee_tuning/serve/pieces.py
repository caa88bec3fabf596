"""What single tokens are as text and bytes."""

from __future__ import annotations

from functools import lru_cache

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPACE = "\u2581"  # of sentencepiece


class Pieces:
    """The tokens of a tokenizer, one by one.

    longest: characters of the longest one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._by_bytes = "ByteLevel" in repr(getattr(backend, "decoder", None))
        self._special = set(tokenizer.all_special_ids)
        self._byte_of = {sign: byte for byte, sign in bytes_to_unicode().items()}
        self.longest = max(map(len, tokenizer.get_vocab()), default=1)
        self.bytes = lru_cache(maxsize=65_536)(self._bytes)
        self.text = lru_cache(maxsize=65_536)(self._text)

    def _bytes(self, token: int) -> bytes:
        """Of a token; none of one that the tokenizer has no text for."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return b""
        if token in self._special:
            return piece.encode()
        if self._by_bytes and all(sign in self._byte_of for sign in piece):
            return bytes(self._byte_of[sign] for sign in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        if SPACE in piece:
            return piece.replace(SPACE, " ").encode()
        return str(self._tokenizer.decode([token])).encode()

    def _text(self, token: int) -> str:
        """Of a token; as OpenAI writes them, ``bytes:\\xf0\\x9f``, where it is no whole text."""
        found: bytes = self.bytes(token)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)
