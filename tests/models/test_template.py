# ruff: noqa: E501  (templates)
"""Chat templates: published ones render as in transformers; hostile ones end quickly."""

from __future__ import annotations

import threading
import time

import pytest

from mquant_jax.models import template as sandbox
from mquant_jax.models.template import ChatTemplate, TemplateLimit

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What? <think>"}]},
    {"role": "assistant", "content": "A cat\nand a dog.", "tool_calls": None},
    {"role": "user", "content": "Sure?  "},
]
TEXT = [m for m in CHAT if isinstance(m["content"], str)]
# Modelled on the families' published templates.
PUBLISHED = {
    "qwen2_vl": """{% set image_count = namespace(value=0) %}{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content
or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id
%}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    "llama3": """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content =
'<|start_header_id|>' + message['role'] + '<|end_header_id|>

'+ message['content'] | string | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token +
content %}{% endif %}{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>

' }}""",
    "qwen3": """{%- macro text(c) -%}{%- if c is string -%}{{ c }}{%- else -%}
{%- for p in c -%}{{ p.text | default('') }}{%- endfor -%}{%- endif -%}{%- endmacro -%}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(text(message.content).startswith('x')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = text(message.content) %}
    {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>' ~ '\\n' }}
    {%- if loop.index0 > ns.last_query_index %}{{ 'late' }}{% endif %}
    {%- if loop.last %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "odds": """{{ messages | map(attribute='role') | join(', ') }} {{ messages | tojson(indent=2) }}
{{ "%s of %05.1f" % ('a', 2) }} {{ "{:>6}".format('b') }} {{ 'ab' * 3 }} {{ 2 ** 10 }} {{ [1, 2] + [3] }}
{% for k, v in {'x': 1, 'y': 2}.items() %}{{ k }}={{ v }};{% endfor %}{{ dict(a=1) }} {{ none }}
{% generation %}{% set hidden = 1 %}said{% endgeneration %}{{ hidden }} {{ missing }}{{ 3 is odd }}
{% set body %}{{ bos_token }}-{{ messages[0].role | upper }}{% endset %}{{ body | indent(4) }}|{{ 1.5 }}
{{ range(3) | list }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ ('a', 'b') }}
{{ 'x' | center(5) }}{{ messages[0].content.replace('e', 'EE') }} {{ '-'.join(['p', 'q']) }}{# none #}""",
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_render_as_transformers_does(name) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = TEXT if name == "llama3" else CHAT
    options = {"add_generation_prompt": True, "bos_token": "<s>"}
    chats = [[{k: v for k, v in m.items() if v is not None} for m in chat]]
    expected = render_jinja_template(chats, chat_template=PUBLISHED[name], **options)[0][0]
    assert ChatTemplate(PUBLISHED[name]).render(chat, **options) == expected


ENDLESS = {
    "loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "nested filters": "{% for a in range(9999) %}{{ range(9999) | list | length }}{% endfor %}",
    "output": "{% for a in range(9999) %}{% for b in range(9999) %}xxxxxxxx{% endfor %}{% endfor %}",
    "macro": "{% macro f(n) %}{{ f(n - 1) if n else '' }}{{ f(n - 1) if n else '' }}{% endmacro %}"
             "{{ f(60) }}",
    "recursive loop": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}  # fmt: skip
HUGE = {
    "times": "{{ 'a' * 10000000000 }}",
    "list times": "{{ [0] * 10000000000 }}",
    "times of a variable": "{% set n = 9999 * 9999 * 9999 %}{{ 'a' * n }}",
    "plus": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}"
            "{% endfor %}{{ ns.x }}",
    "tilde": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}"
             "{% endfor %}{{ ns.x }}",
    "captured": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x %}{{ ns.x }}"
                "{{ ns.x }}{% endset %}{% endfor %}",
    "nested lists": "{% set ns = namespace(x=['a']) %}{% for i in range(99) %}"
                    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nested dicts": "{% set ns = namespace(x={}) %}{% for i in range(99) %}"
                    "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x | tojson }}",
    "list plus": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}"
                 "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "power": "{{ 9 ** 99999999 }}",
    "squares": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}"
               "{% endfor %}",
    "center": "{{ 'a' | center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "zfill": "{{ 'a'.zfill(10000000000) }}",
    "expandtabs": "{{ ('\t' * 9999).expandtabs(9999) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10000000000, 1) }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "nested format": "{{ '{:>{w}}'.format(1, w='10000000000') }}",
    "format filter": "{{ '%10000000000d' | format(1) }}",
    "replace": "{% set x = 'a' * 9999 %}{{ x.replace('a', x).replace('a', x) }}",
    "replace filter": "{% set x = 'a' * 9999 %}{{ x | replace('a', x) | replace('a', x) }}",
    "join": "{% set x = 'a' * 99999 %}{{ x.join(range(9999) | map('string')) }}",
    "join filter": "{% set x = 'a' * 99999 %}{{ range(9999) | join(x) }}",
    "indent": "{{ ('a\n' * 99999) | indent(9999) }}",
    "json": "{{ [[1]] | tojson(indent=10000000000) }}",
    "batch": "{{ [1] | batch(10000000000, 0) | list }}",
    "translate": "{{ ('a' * 9999).translate({97: 'b' * 9999}) }}",
    "bytes": "{{ 'a'.encode().ljust(10000000000) }}",
    "to_bytes": "{{ (1).to_bytes(10000000000, 'big') }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "self": "{% set ns = namespace() %}{% set ns.me = [ns] %}{{ ns }}",
}  # fmt: skip
WRONG = {
    "import": "{% import 'os' as os %}{{ os }}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends 'x' %}",
    "zero": "{{ 1 / 0 }}",
    "types": "{{ 1 + 'a' }}",
    "syntax": "{% for x in %}",
    "unclosed": "{% if x %}",
    "filter": "{{ 'x' | nosuch }}",
    "own error": "{{ raise_exception('Only user and assistant roles are supported!') }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "large": "x" * (sandbox.MOST_SOURCE + 1),
    "attribute": "{{ missing.deep.er }}",
}  # fmt: skip
CODE = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "init": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "attr filter": "{{ '' | attr('__class__') | string }}",
    "format": "{{ '{0.__class__}'.format('a') }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "self": "{{ self.__init__.__globals__ }}",
    "append": "{{ messages.append(1) }}",
    "namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "namespace call": "{{ namespace(**{'__class__': 1}) }}",
    "map": "{{ ['x'] | map(attribute='__class__') | list }}",
    "generator": "{{ (messages | map('upper')).gi_frame.f_globals }}",
}


def fails_soon(source: str) -> Exception:
    start = time.monotonic()
    with pytest.raises(Exception) as found:  # noqa: PT011  (any exception)
        ChatTemplate(source).render(CHAT)
    assert time.monotonic() - start < sandbox.MOST_SECONDS + 5
    return found.value


@pytest.mark.parametrize("name", HUGE)
def test_templates_that_make_too_much(name) -> None:
    import tracemalloc

    tracemalloc.start()
    try:
        fails_soon(HUGE[name])
        assert tracemalloc.get_traced_memory()[1] < 300e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ENDLESS)
def test_templates_that_run_for_ever(name, monkeypatch) -> None:
    monkeypatch.setattr(sandbox, "MOST_SECONDS", 1.0)
    start = time.monotonic()
    found = fails_soon(ENDLESS[name])
    assert time.monotonic() - start < 4
    assert isinstance(found, TemplateLimit | RecursionError)


def test_the_step_limit_alone_ends_a_loop(monkeypatch) -> None:
    monkeypatch.setattr(sandbox, "MOST_STEPS", 1000)
    assert "1000 steps" in str(fails_soon(ENDLESS["loops"]))


@pytest.mark.parametrize("name", WRONG)
def test_templates_that_are_wrong(name) -> None:
    fails_soon(WRONG[name])


@pytest.mark.parametrize("name", CODE)
def test_code_is_out_of_reach(name) -> None:
    try:
        text = ChatTemplate(CODE[name]).render(CHAT)
    except Exception:  # noqa: BLE001  (any exception)
        return
    assert "class" not in text and "function" not in text and "module" not in text


def test_limits_hold_in_any_thread() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(fails_soon(HUGE["plus"])))
    thread.start()
    thread.join(30)
    assert isinstance(found[0], TemplateLimit)


def test_long_conversations_are_no_attack() -> None:
    chat = [{"role": "user", "content": "word " * 20_000}] * 50
    text = ChatTemplate(PUBLISHED["qwen3"]).render(chat, add_generation_prompt=True)
    assert len(text) > 5_000_000
