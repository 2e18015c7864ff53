"""GGUF headers and the tokenizers in them."""

import array
import struct

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from appliance.errors import ModelError
from appliance.text.gguf_metadata import read_gguf_metadata
from appliance.text.gguf_tokenizer import adds_bos, build_tokenizer
from appliance.text.load import load_text
from appliance.text.tokenizer import VocabularyTokenizer, decode

SAMPLES = [
    "",
    " ",
    "Hello, world! It's 1234 o'clock.",
    "  two  spaces\n\n\nand newlines\r\n\ttabs",
    "don't WE'LL I'M they're",
    "Grüße, naïve café — “quotes”",
    "日本語テキスト と 한국어",
    "🎉👩‍👩‍👧‍👦 emoji",
    "for i in range(10):\n    print(f'{i:03d}')\n",
    "\u0000\u200b\ufeff",
    "a" * 300,
]


def string(text):
    """A GGUF string."""
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def value(item):
    """(type, bytes) of a GGUF value."""
    if isinstance(item, bool):
        return 7, struct.pack("<?", item)
    if isinstance(item, str):
        return 8, string(item)
    if isinstance(item, int):
        return 5, struct.pack("<i", item)
    if isinstance(item, float):
        return 6, struct.pack("<f", item)
    kind = value(item[0])[0]
    return 9, struct.pack("<IQ", kind, len(item)) + b"".join(value(entry)[1] for entry in item)


def header(pairs, version=3):
    """The bytes of a GGUF file without tensors."""
    body = b"".join(string(key) + struct.pack("<I", value(item)[0]) + value(item)[1] for key, item in pairs.items())
    return b"GGUF" + struct.pack("<IQQ", version, 0, len(pairs)) + body


def metadata_of(backend, tokens, **extra):
    """The metadata with which a converter would write a trained byte-level BPE."""
    import json

    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in json.loads(backend.to_str())["model"]["merges"]]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges, **extra}


@pytest.fixture(scope="module")
def trained():
    """A small byte-level BPE in the plain GPT-2 manner."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(SAMPLES, trainer)
    return backend


def tokens_of(backend):
    """The vocabulary in order of ids."""
    return [token for token, _ in sorted(backend.get_vocab().items(), key=lambda entry: entry[1])]


def test_every_type_is_read(tmp_path):
    """Scalars, strings and arrays come back as they were written; bytes that are no UTF-8 survive."""
    pairs = {"a": 5, "b": 1.5, "c": True, "d": "é", "e": ["x", "yy", ""], "f": [1, -2], "g": [True, False], "h": "\udcff", "i": [0.5]}
    file = tmp_path / "m.gguf"
    file.write_bytes(header(pairs))
    assert read_gguf_metadata(file) == pairs


def test_numbers_of_every_width_are_read(tmp_path):
    """8 to 64 bits, signed and unsigned, and both floats."""
    kinds = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
    body = b"".join(string(code) + struct.pack("<I" + code, kind, 7) for kind, code in kinds.items())
    body += b"".join(
        string(code * 2) + struct.pack("<IIQ", 9, kind, 3) + array.array(code, [1, 2, 3]).tobytes() for kind, code in kinds.items() if kind
    )
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 2, 0, 2 * len(kinds) - 1) + body)
    read = read_gguf_metadata(file)
    assert all(read[code] == 7 for code in kinds.values())
    assert all(read[code * 2] == [1, 2, 3] for kind, code in kinds.items() if kind)


def test_every_cut_is_noticed(tmp_path):
    """A file cut anywhere, or with lengths that lie, is a ModelError and never a crash or a wait."""
    whole = header({"a": 5, "tokens": ["x", "yy"], "ids": [1, 2, 3], "s": "text"})
    file = tmp_path / "m.gguf"
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"m\.gguf"):
            read_gguf_metadata(file)
    for huge in (1 << 62, (1 << 64) - 1):
        file.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, huge))
        with pytest.raises(ModelError):
            read_gguf_metadata(file)
        for kind in (8, 5, 7):
            file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<IIQ", 9, kind, huge))
            with pytest.raises(ModelError):
                read_gguf_metadata(file)


@pytest.mark.parametrize("data", [b"GGML" + b"\0" * 40, b"GGUF" + struct.pack("<IQQ", 9, 0, 0), b"PK\x03\x04" + b"\0" * 40])
def test_other_files_are_refused(tmp_path, data):
    """Wrong magic and unknown versions are named."""
    file = tmp_path / "m.gguf"
    file.write_bytes(data)
    with pytest.raises(ModelError):
        read_gguf_metadata(file)


def test_a_byte_level_vocabulary_round_trips(trained):
    """The tokenizer rebuilt from metadata gives the ids of the one that was written, and its bytes give the text back."""
    rebuilt = VocabularyTokenizer.from_gguf(metadata_of(trained, tokens_of(trained)))
    for sample in SAMPLES:
        ids = rebuilt.encode(sample, add_special_tokens=False)
        assert ids == trained.encode(sample).ids
        assert decode(rebuilt, ids, skip_special=True) == sample


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("llama-bpe", "It'S 12345 ok\n\n x", ["It", "'S", " ", "123", "45", " ok", "\n\n", " x"]),
        ("qwen2", "It's 123 ok", ["It", "'s", " ", "1", "2", "3", " ok"]),
        ("tekken", "HelloWorld 12", ["Hello", "World", " ", "1", "2"]),
        ("gpt-2", "It's 123  ok", ["It", "'s", " 123", " ", " ok"]),
        ("starcoder", "ab 12", ["ab", " ", "1", "2"]),
    ],
)
def test_the_pre_tokenizer_follows_its_name(trained, pre, text, pieces):
    """tokenizer.ggml.pre chooses how text is split before merging."""
    backend = build_tokenizer(metadata_of(trained, tokens_of(trained), **{"tokenizer.ggml.pre": pre}))
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    got = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert got == [letters.pre_tokenize_str(piece)[0][0] for piece in pieces]


def test_special_and_user_defined_tokens_match_whole(trained):
    """Control tokens are special and skipped in text; user-defined ones match whole and are text."""
    tokens = [*tokens_of(trained), "<|ctl|>", "<think>"]
    kinds = [1] * (len(tokens) - 2) + [3, 4]
    tokenizer = VocabularyTokenizer.from_gguf(
        metadata_of(trained, tokens, **{"tokenizer.ggml.token_type": kinds, "tokenizer.ggml.eos_token_id": len(tokens) - 2})
    )
    control, user = len(tokens) - 2, len(tokens) - 1
    ids = tokenizer.encode("a<|ctl|><think>b", add_special_tokens=False)
    assert ids[1:3] == [control, user]
    assert decode(tokenizer, ids, skip_special=True) == "a<think>b"
    assert decode(tokenizer, ids, skip_special=False) == "a<|ctl|><think>b"
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (control, len(tokens))


def test_lone_surrogates_are_replaced(trained):
    """Text that is no Unicode is tokenized with U+FFFD in its place; proper pairs stay."""
    tokenizer = VocabularyTokenizer.from_gguf(metadata_of(trained, tokens_of(trained)))
    ids = tokenizer.encode("a\ud800b\ud83c\udf89", add_special_tokens=False)
    assert decode(tokenizer, ids, skip_special=True) == "a\ufffdb🎉"


def sentencepiece_metadata():
    """A sentencepiece vocabulary by hand: byte tokens, letters, and merges that follow from scores."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "e", "l", "o", "▁h", "el", "lo", "▁hel", "▁hello"]
    scores = [0.0] * (len(tokens) - 10) + [-20.0, -21.0, -22.0, -23.0, -24.0, -1.0, -2.0, -3.0, -4.0, -5.0]
    kinds = [2, 3, 3] + [6] * 256 + [1] * 10
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_a_sentencepiece_vocabulary_works():
    """Merges come from scores, BOS is added by default, unknown characters become bytes and read back."""
    tokenizer = VocabularyTokenizer.from_gguf(sentencepiece_metadata())
    names = [tokenizer.token_name(token_id) for token_id in tokenizer.encode("hello", add_special_tokens=True)]
    assert names == ["<s>", "▁hello"]
    ids = tokenizer.encode("hé", add_special_tokens=False)
    assert [tokenizer.token_name(token_id) for token_id in ids] == ["▁h", "<0xC3>", "<0xA9>"]
    assert decode(tokenizer, ids, skip_special=True) == " hé"


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ({"tokenizer.ggml.model": "gpt2"}, False),
        ({"tokenizer.ggml.model": "llama"}, True),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe"}, True),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_bos_token": False}, False),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.add_bos_token": True}, True),
    ],
)
def test_bos_is_what_the_file_says(pairs, expected):
    """add_bos_token decides; where it is absent, what llama.cpp assumes."""
    assert adds_bos(pairs) is expected


@pytest.mark.parametrize(
    "pairs",
    [
        {},
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a"]},
        {"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a"]},
        {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a"]},
    ],
)
def test_a_vocabulary_that_cannot_be_built_says_why(pairs):
    """Missing merges or scores, and other kinds of tokenizer, are named."""
    with pytest.raises(ModelError, match="tokenizer"):
        build_tokenizer(pairs)


def test_end_ids_include_the_turns_end(tmp_path, trained):
    """EOS, EOT and the token with which the chat template ends a turn all end a reply."""
    tokens = [*tokens_of(trained), "<|eot_id|>", "<|im_end|>"]
    kinds = [1] * (len(tokens) - 2) + [3, 3]
    template = "{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}"
    extra = {"tokenizer.ggml.token_type": kinds, "tokenizer.ggml.eos_token_id": 0, "tokenizer.chat_template": template}
    file = tmp_path / "m.gguf"
    file.write_bytes(header(metadata_of(trained, tokens, **extra)))
    text = load_text(str(file))
    assert text.eos_ids == (0, len(tokens) - 2)
    assert text.chat_template.render([{"role": "user", "content": "x"}]) == "x<|eot_id|>"


def test_a_template_file_replaces_the_models(tmp_path, trained):
    """The operator's template wins; a path that cannot be read stops the start."""
    file = tmp_path / "m.gguf"
    file.write_bytes(header(metadata_of(trained, tokens_of(trained))))
    assert load_text(str(file)).chat_template is None
    template = tmp_path / "t.jinja"
    template.write_text("own {{ messages[0].content }}")
    assert load_text(str(file), template).chat_template.render([{"role": "user", "content": "x"}]) == "own x"
    with pytest.raises(ModelError, match="missing"):
        load_text(str(file), tmp_path / "missing.jinja")
