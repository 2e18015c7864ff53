"""The embedded model's tokenizer and chat template equal those of transformers on the same file."""

import random
from pathlib import Path

import pytest

from appliance.text.load import load_text
from appliance.text.tokenizer import decode

SAMPLES = [
    "What is the capital of France?",
    "  leading and trailing  ",
    "In 1984, 3.14159 x 2 = 6.28318; it's 12:30 a.m.",
    "\n\n 1\n  2\n   3",
    "def f(x):\n\treturn x**2  # comment\n",
    "Grüße, naïve café — “quotes” … €",
    "日本語テキスト と 한국어 и русский текст",
    "🎉👩‍👩‍👧‍👦 emoji",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|im_start|><|im_end|><|endoftext|><repo_name>x<file_sep>",
    "a" * 1000 + " " * 50,
    "\u0000\u200b\ufeff\u00a0",
]


@pytest.fixture(scope="module")
def oracle(embedded_model):
    """transformers' tokenizer of the embedded model."""
    from transformers import AutoTokenizer

    path = Path(embedded_model)
    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


@pytest.fixture(scope="module")
def text(embedded_model):
    """Ours."""
    return load_text(str(embedded_model))


@pytest.mark.parametrize("sample", SAMPLES)
def test_ids_equal_transformers(oracle, text, sample):
    """The same text gives the same ids and reads back as the same text."""
    ids = text.tokenizer.encode(sample, add_special_tokens=True)
    assert ids == oracle(sample).input_ids
    assert decode(text.tokenizer, ids, skip_special=False) == sample


def test_ids_equal_transformers_on_random_text(oracle, text):
    """200 random strings over scripts, digits, spaces and controls."""
    choose = random.Random(0)
    alphabet = "abcXYZ 0123456789\n\t'.,!?-_()[]{}éüßñ日本語한русский🎉\u200d\u00a0" + "  " * 3
    for _ in range(200):
        sample = "".join(choose.choice(alphabet) for _ in range(choose.randint(1, 80)))
        assert text.tokenizer.encode(sample, add_special_tokens=True) == oracle(sample).input_ids, repr(sample)


def test_every_id_reads_as_in_transformers(oracle, text):
    """All 49,152 tokens decode to the same text, alone."""
    for token_id in range(len(oracle)):
        assert decode(text.tokenizer, [token_id], skip_special=False) == oracle.decode([token_id], clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_prompts_equal_transformers(oracle, text, add_generation_prompt):
    """The chat template renders the same prompts."""
    conversations = [
        [{"role": "user", "content": "What is the capital of France?"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
        [{"role": "user", "content": "<b>&'\"\n{{ x }}"}],
    ]
    for messages in conversations:
        expected = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert text.chat_template.render(messages, add_generation_prompt=add_generation_prompt) == expected


def test_special_ids(text):
    """EOS ends a reply; BOS exists but is not added."""
    assert (text.tokenizer.bos_id, text.tokenizer.eos_id, text.eos_ids, text.tokenizer.add_bos) == (1, 2, (2,), False)
