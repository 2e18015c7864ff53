"""Chat templates: what the sandbox offers, what it forbids, how a refusal reads."""

import json

import pytest

from appliance.errors import InvalidRequest, ModelError
from appliance.text.chat_template import ChatTemplate

USER = [{"role": "user", "content": "hi"}]


def render(source, messages=None, special=None, **options):
    """`source` rendered for one user message or `messages`."""
    return ChatTemplate(source, special or {}).render(messages or USER, **options)


def test_a_template_sees_messages_tokens_and_the_generation_prompt():
    """Messages, special tokens and add_generation_prompt are variables."""
    source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    assert render(source, special={"bos_token": "<s>"}) == "<s>[user]hi[assistant]"
    assert render(source, special={"bos_token": "<s>"}, add_generation_prompt=False) == "<s>[user]hi"


def test_blocks_leave_no_blank_lines():
    """trim_blocks and lstrip_blocks are on, as templates are written for."""
    assert render("{% if true %}\n  {% set x = 1 %}\na\n{% endif %}\nb") == "a\nb"


def test_loop_controls_work():
    """break and continue are there."""
    source = "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(source) == "02"


def test_tojson_is_plain_json():
    """tojson escapes no HTML and no accents, and takes an indent."""
    assert render("{{ x | tojson }}", extra={"x": {"a": "<é'>"}}) == '{"a": "<é\'>"}'
    assert json.loads(render("{{ x | tojson(indent=2) }}", extra={"x": [1]})) == [1]


def test_a_template_may_refuse():
    """raise_exception becomes a 400 with the template's words."""
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    ["{{ messages[0].content + 5 }}", "{{ messages[7].content }}", "{{ none.x.y }}", "{{ 1 // 0 }}", "{{ messages.nope() }}", "{{ 'x'.index('y') }}"],
)
def test_a_template_that_fails_on_messages_is_a_400(source):
    """Whatever a template stumbles over is a refusal of the request, not a fault of the server."""
    with pytest.raises(InvalidRequest):
        render(source)


@pytest.mark.parametrize("source", ["{{ messages.append(1) }}", "{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__subclasses__() }}{{ x.y.z }}"])
def test_the_sandbox_holds(source):
    """Templates can neither change their input nor reach Python's inside."""
    with pytest.raises(InvalidRequest):
        render(source)


def test_a_template_that_is_no_jinja_stops_the_start():
    """A syntax error names its origin and line."""
    with pytest.raises(ModelError, match=r"model\.gguf does not compile: line 2"):
        ChatTemplate("a\n{% if %}", {}, origin="model.gguf")


def test_extra_variables_cannot_replace_the_conversation():
    """chat_template_kwargs set switches, but neither messages, prompts nor special tokens."""
    source = "{{ messages[0].content }}{{ eos_token }}{{ enable_thinking }}{{ add_generation_prompt }}"
    extra = {"messages": [{"content": "evil"}], "eos_token": "evil", "enable_thinking": "yes", "add_generation_prompt": "evil"}
    assert render(source, special={"eos_token": "</s>"}, extra=extra) == "hi</s>yesTrue"


def test_absent_content_reads_as_empty():
    """A message with null content, as tool calls have, can be concatenated."""
    assert render("{{ '>' + messages[0].content }}", [{"role": "assistant", "content": None}]) == ">"


def test_developer_reads_as_system_unless_the_template_knows_it():
    """Templates that know only system still get the developer's message."""
    message = [{"role": "developer", "content": "x"}]
    assert render("{{ messages[0].role }}", message) == "system"
    assert render("{% if messages[0].role == 'developer' %}D{% endif %}", message) == "D"


def test_the_final_message_is_continued():
    """The prompt ends with the last message's text; a template that changes it is told so."""
    messages = [*USER, {"role": "assistant", "content": "It is "}]
    source = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    assert render(source, messages, continue_final_message=True) == "<hi><It is"
    with pytest.raises(InvalidRequest, match="continue_final_message"):
        render("{{ messages[0].content }}", messages, continue_final_message=True)


def test_generation_blocks_are_transparent():
    """{% generation %} marks training spans and changes nothing."""
    assert render("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "ahib"


def test_strftime_now_prints_today():
    """Templates may print the date."""
    assert render("{{ strftime_now('%Y') }}").isdigit()
