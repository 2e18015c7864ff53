"""Incremental detokenization: whole characters, stop strings across tokens, the same text however tokens are grouped."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.text.detokenizer import Detokenizer
from appliance.text.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
TEXTS = st.text(alphabet=st.sampled_from("ab€🎉é \n"), max_size=30)
STOPS = st.lists(st.text(alphabet=st.sampled_from("ab€🎉é \n"), min_size=1, max_size=4), max_size=3)


def run(text, cuts, **options):
    """(text, num_tokens, stop_reason) with the bytes of `text` pushed in groups that end at `cuts`; checks every chunk on the way."""
    detokenizer = Detokenizer(BYTES, **options)
    ids = list(text.encode())
    borders = sorted({cut % (len(ids) + 1) for cut in cuts} | {0, len(ids)})
    parts = []
    for start, end in itertools.pairwise(borders):
        parts.append(detokenizer.push(ids[start:end]))
        if detokenizer.stop_reason is not None:
            break
    parts.append(detokenizer.flush())
    assert all("\ufffd" not in part for part in parts)
    return "".join(parts), detokenizer.num_tokens, detokenizer.stop_reason


def expected(text, stops, include):
    """The slow truth: the shortest prefix that holds a stop string ends the text."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[:end] if include else text[: end - len(stop)], len(text[:end].encode()), stop
    return text, len(text.encode()), None


@given(text=TEXTS, stops=STOPS, include=st.booleans(), cuts=st.lists(st.integers(0, 200)))
def test_text_and_cut_do_not_depend_on_grouping(text, stops, include, cuts):
    """However the tokens are grouped, text, count and reason equal those of a search that starts over at every character."""
    assert run(text, cuts, stop=stops, include_stop=include) == expected(text, stops, include)


@given(text=TEXTS, stops=STOPS)
def test_no_text_is_held_longer_than_it_must(text, stops):
    """After each token only a proper prefix of a stop string, or an unfinished character, is held back."""
    detokenizer = Detokenizer(BYTES, stop=stops)
    raw, given_so_far = text.encode(), ""
    for index, byte in enumerate(raw):
        given_so_far += detokenizer.push([byte])
        if detokenizer.stop_reason is not None:
            return
        whole = raw[: index + 1].decode("utf-8", "ignore")
        held = whole[len(given_so_far) :]
        assert whole.startswith(given_so_far)
        assert not held or any(stop.startswith(held) for stop in stops)


def test_half_a_character_is_never_shown():
    """A sequence that ends inside a character ends before it; no U+FFFD appears."""
    assert run("a🎉", [])[0] == "a🎉"
    detokenizer = Detokenizer(BYTES)
    assert detokenizer.push(list("a🎉".encode())[:-1]) == "a"
    assert detokenizer.flush() == ""


def test_bytes_that_are_no_text_become_replacement_characters():
    """Bytes that can never become a character are shown as U+FFFD, at once, and what follows is intact."""
    detokenizer = Detokenizer(BYTES)
    assert detokenizer.push([0xFF]) == "\ufffd"
    assert detokenizer.push([0xE2, 0x41]) == "\ufffdA"


def test_ids_beyond_the_vocabulary_stream_something():
    """An id without a token reads as its number, in streams and with stop strings."""
    assert Detokenizer(BYTES).push([65, 151_900, 66]) == "A<token_151900>B"
    assert Detokenizer(BYTES, stop=["zz"]).push([-5]) == "<token_-5>"


def test_unknown_ids_take_no_memory():
    """Looking up ids beyond the vocabulary does not grow the cache."""
    table = BYTES.token_bytes(skip_special=True)
    size = len(table)
    for token_id in range(1_000_000, 1_001_000):
        assert table[token_id] == b"<token_%d>" % token_id
    assert len(table) == size


@pytest.mark.parametrize(("include", "text"), [(False, "one "), (True, "one END")])
def test_after_a_stop_string_nothing_comes(include, text):
    """Once stopped, further tokens and the flush give nothing, and the count stays."""
    detokenizer = Detokenizer(BYTES, stop=["END"], include_stop=include)
    assert detokenizer.push(list(b"one END two")) == text
    assert detokenizer.push(list(b"more END")) == ""
    assert detokenizer.flush() == ""
    assert (detokenizer.num_tokens, detokenizer.stop_reason) == (7, "END")


def test_a_prefix_of_a_stop_string_is_released_at_the_end():
    """Text that might have become a stop string is given out by the flush."""
    detokenizer = Detokenizer(BYTES, stop=["END"])
    assert detokenizer.push(list(b"the EN")) == "the "
    assert detokenizer.flush() == "EN"
