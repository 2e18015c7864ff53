"""Incremental detokenization of one sequence: bytes in, whole characters out, stop strings found across token borders.

A token costs one dict lookup; a push of plain ASCII one call in C, any other one call of the incremental decoder. Nothing is decoded twice.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import lru_cache

from appliance.text.tokenizer import Tokenizer

_new_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """The text of one sequence, as it grows. One owner, not thread-safe.

    Text is held back while it may still become a stop string, and bytes while they may still become a character. Where a text is cut does not
    depend on how its tokens were grouped: the stop string that ends first wins; of those that end together, the one that starts first.
    """

    __slots__ = ("_decoder", "_held", "_include_stop", "_prefixes", "_stops", "_table", "_unfinished", "num_tokens", "stop_reason")

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), include_stop: bool = False, skip_special: bool = True) -> None:
        self._table = tokenizer.token_bytes(skip_special=skip_special)
        self._decoder = _new_decoder("replace")
        self._stops = tuple(stop)
        # Proper prefixes of the stop strings, longest first by length: what a text may end with and still become one.
        self._prefixes = _prefixes_by_length(self._stops)
        self._include_stop = include_stop
        self._unfinished = False  # the decoder holds the beginning of a character
        self._held = ""
        self.num_tokens = 0  # pushed; once stopped, up to and including the one that completed the stop string
        self.stop_reason: str | None = None  # the stop string that was found

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now. After a stop string was found, "" for ever."""
        if self.stop_reason is not None:
            return ""
        if not self._stops:
            self.num_tokens += len(token_ids)
            table = self._table
            data = table[token_ids[0]] if len(token_ids) == 1 else b"".join([table[token_id] for token_id in token_ids])
            if not self._unfinished and data.isascii():
                return data.decode()
            text = self._decoder.decode(data)
            self._unfinished = self._decoder.getstate()[0] != b""
            return text
        parts: list[str] = []
        for token_id in token_ids:
            self.num_tokens += 1
            if text := self._decoder.decode(self._table[token_id]):
                parts.append(self._search(text))
                if self.stop_reason is not None:
                    break
        return "".join(parts)

    def flush(self) -> str:
        """What was held back, at the end of the sequence. An unfinished character is dropped: it never was text."""
        held, self._held = self._held, ""
        return held

    def _search(self, text: str) -> str:
        """The part of held + `text` that is certain; sets `stop_reason` when a stop string is complete."""
        text = self._held + text
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        if best is not None:
            end, start, self.stop_reason = best
            self._held = ""
            return text[: end if self._include_stop else start]
        keep = self._suffix_that_may_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _suffix_that_may_stop(self, text: str) -> int:
        """Length of the longest proper prefix of a stop string with which `text` ends."""
        for last, prefix in self._prefixes:
            if text[-1] == last and text.endswith(prefix):
                return len(prefix)
        return 0


@lru_cache(maxsize=256)
def _prefixes_by_length(stops: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """(last character, prefix) of every proper prefix, longest first."""
    prefixes = {stop[:length] for stop in stops for length in range(1, len(stop))}
    return tuple((prefix[-1], prefix) for prefix in sorted(prefixes, key=len, reverse=True))
