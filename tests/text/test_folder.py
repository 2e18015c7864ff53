"""Hugging Face folders, and folders without a tokenizer."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from appliance.errors import ModelError
from appliance.text.load import load_text
from appliance.text.tokenizer import decode


def write(folder, *, bos=False, tokenizer_config=None, **files):
    """A folder with a byte-level tokenizer of single bytes, <s> and </s>, and further JSON files."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}, **(tokenizer_config or {})}))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


def test_a_folder_gives_tokenizer_and_special_tokens(tmp_path):
    """Special tokens are read in both spellings, and text round-trips."""
    text = load_text(write(tmp_path))
    assert (text.tokenizer.bos_id, text.tokenizer.eos_id, text.eos_ids) == (256, 257, (257,))
    ids = text.tokenizer.encode("héllo 🎉", add_special_tokens=True)
    assert decode(text.tokenizer, ids, skip_special=True) == "héllo 🎉"
    assert 256 not in ids


@pytest.mark.parametrize(("bos", "config"), [(True, {}), (True, {"add_bos_token": True}), (False, {"add_bos_token": True})])
def test_bos_is_added_once(tmp_path, bos, config):
    """Whether the post-processor or the configuration asks for BOS, it comes exactly once, and only with special tokens."""
    text = load_text(write(tmp_path, bos=bos, tokenizer_config=config))
    assert text.tokenizer.encode("a", add_special_tokens=True).count(256) == 1
    assert 256 not in text.tokenizer.encode("a", add_special_tokens=False)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [257, 300]}}, (257, 300)),
        ({"generation_config": {"eos_token_id": 301}}, (257, 301)),
        ({"config": {"eos_token_id": 302}}, (257, 302)),
        ({"config": {"eos_token_id": None}}, (257,)),
        ({"generation_config": {"eos_token_id": True}}, (257,)),
    ],
)
def test_generation_config_ends_count(tmp_path, files, expected):
    """Every id that generation_config.json or config.json names ends a reply."""
    assert load_text(write(tmp_path, **files)).eos_ids == expected


def test_templates_are_found_in_every_place(tmp_path):
    """chat_template.jinja wins over tokenizer_config.json, where a list of named templates gives its default."""
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D{{ eos_token }}"}]
    folder = write(tmp_path, tokenizer_config={"chat_template": named})
    messages = [{"role": "user", "content": "x"}]
    assert load_text(folder).chat_template.render(messages) == "D</s>"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert load_text(folder).chat_template.render(messages) == "J"


def test_a_dummy_folder_without_files_takes_ids_and_bytes(tmp_path):
    """`dummy:` works with a config.json alone: text is bytes, any id reads as something."""
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    text = load_text(f"dummy:{tmp_path}")
    ids = text.tokenizer.encode("hé\ud800", add_special_tokens=True)
    assert decode(text.tokenizer, [*ids, 5000], skip_special=True) == "hé\ufffd<token_5000>"
    assert text.chat_template is None
    assert text.eos_ids == (2,)


def test_a_dummy_folder_with_a_tokenizer_uses_it(tmp_path):
    """Whatever tokenizer files are there are used."""
    assert load_text("dummy:" + write(tmp_path)).tokenizer.eos_id == 257


@pytest.mark.parametrize(("name", "content"), [("tokenizer.json", "{"), ("tokenizer_config.json", "{"), ("tokenizer_config.json", "[]")])
def test_broken_files_are_named(tmp_path, name, content):
    """A file that does not parse stops the start with its name."""
    folder = write(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        load_text(folder)


def test_a_path_without_a_tokenizer_says_what_to_do(tmp_path):
    """A missing path, and a folder with weights alone, are errors that help."""
    with pytest.raises(ModelError, match="neither"):
        load_text(str(tmp_path / "none"))
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        load_text(str(tmp_path))
