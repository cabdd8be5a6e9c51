"""Chat templates: the text is transformers', and no template and no messages take long or make much."""

import jinja2
import pytest

from apt_jax.serve.openai.bodies.chat_requests import MAX_MESSAGES
from apt_jax.serve.openai.templates.sandbox import (
    MAX_CHARS,
    MAX_STEPS,
    TemplateTooCostly,
    _Budget,
    _steps_of,
    render_template,
)
from apt_jax.tokenization.tokenizer import no_advice

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{{ message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALTERNATING = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}{{ ' ' + content.strip() + eos_token }}"
    "{% endif %}{% endfor %}"
)
EVERYTHING = """
{%- set ns = namespace(n=0, s='') -%}
{% macro f(x, k=2) %}<{{ x|upper ~ k ~ missing }}>{% endmacro %}
{% macro around() %}[{{ caller() }}]{% endmacro %}
{% for m in messages %}
  {% if loop.last %}{% break %}{% endif %}
  {% set ns.n = ns.n + 1 %}
  {{- f(m.content) }}{{ m|tojson }}{{ m|tojson(indent=2) }} {{ loop.length }} {{ loop.revindex }}
  {{ loop.nextitem.role }}
{% else %}none{% endfor %}
{{ ns.n }} {{ '%05.1f|%s' % (1.5, 'a') }} {{ '{:>5}'.format('x') }} {{ 'ab' * 3 }} {{ 2 ** 10 }} {{ [1] + [2] }}
{{ dict(a=1) }} {{ messages|map(attribute='role')|join(', ') }} {{ 'x'.join(['a', 'b']) }} {{ range(4)|list }}
{{ messages|selectattr('role', 'equalto', 'user')|list|length }} {{ 'a-b'.replace('-', '+') }} {{ 'a'|center(9) }}
{% generation %}marked{% endgeneration %}{% call around() %}in{% endcall %}{% filter upper %}abc{% endfilter %}
{% set x %}block{% endset %}{{ x ~ ('b' ~ 'c')|upper }} {{ tools is none }} {{ documents }}
{% for m in [['a', ['b', ['c']]]] recursive %}
  {% if m is string %}{{ m }}{% else %}({{ loop(m) }}){% endif %}
{% endfor %}
"""
CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": ' h\u00e9 "q" '},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "bye"},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("template", [CHATML, ALTERNATING, EVERYTHING])
@pytest.mark.parametrize("generate", [True, False])
def test_the_text_is_that_of_transformers(template, generate):
    with no_advice():
        from transformers.utils.chat_template_utils import render_jinja_template
    variables = {"add_generation_prompt": generate, **TOKENS}
    ((text,), _) = render_jinja_template(conversations=[CHAT], chat_template=template, **variables)
    assert render_template(template, CHAT, **variables) == text


def test_a_template_may_refuse_and_reach_nothing_of_python():
    for template in (
        "{{ raise_exception('no') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
    ):
        with pytest.raises(jinja2.TemplateError):
            render_template(template, CHAT)


NAMESPACE = "{% set ns = namespace(s='x' * 1000) %}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in messages %}{% for b in messages %}{% endfor %}{% endfor %}",
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{% for a in messages %}{% set x = messages|map(attribute='role')|list %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% for a in messages recursive %}{% if loop.depth < 3 %}{{ loop(messages) }}{% endif %}{% endfor %}",
        "{% for a in range(90000) %}" + "y" * 2000 + "{% endfor %}",
        NAMESPACE + "{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
        NAMESPACE + "{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        NAMESPACE + "{% for i in range(90000) %}{% set ns.s = ns.s + 'y' * 99 %}{% endfor %}{{ ns.s }}",
        "{{ 'x' * 10**9 }}",
        "{{ ('x' * 8000000) * 1000 }}",
        "{{ 10**1000 ** 1000000 }}",
        "{{ 'x'|center(999999999) }}",
        "{{ 'x'.ljust(999999999) }}",
        "{{ ('\n' * 9000)|indent(9000) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '%999999999d'|format(1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=999999999) }}",
        "{{ ('x' * 1000000).replace('', 'y' * 1000000) }}",
        "{{ ('x' * 1000000)|replace('x', 'y' * 1000000) }}",
        "{{ ([('x' * 1000000)] * 100000)|join }}",
        "{{ ('x' * 1000000).join(['a'] * 100000) }}",
        "{{ ''.join([('x' * 1000000)] * 100000) }}",
    ],
)
def test_a_template_that_would_take_long_or_make_much_is_stopped(template):
    with pytest.raises(TemplateTooCostly, match=r"steps|entries|bits|width"):
        render_template(template, [{"role": "user", "content": "x"}] * MAX_MESSAGES)


def test_the_most_messages_fit_into_the_budget():
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * (MAX_MESSAGES // 2)
    for template in (CHATML, ALTERNATING):
        assert render_template(template, chat, add_generation_prompt=True, **TOKENS).count("y") >= MAX_MESSAGES // 2


def most(expression):
    """A template that makes a text or list and says how long it is."""
    return "{{ (" + expression + ")|length }}"


@pytest.mark.parametrize(
    ("expression", "good", "length"),
    [
        ("'x' * {}", MAX_CHARS, MAX_CHARS),
        ("{} * 'xy'", MAX_CHARS // 2, MAX_CHARS),
        ("'x' ~ ([0] * {})[0]", MAX_CHARS, 2),
        ("'x'|center({})", MAX_CHARS, MAX_CHARS),
        ("'x'.ljust({})", MAX_CHARS, MAX_CHARS),
        ("'a\nb'|indent({}, first=true)", MAX_CHARS // 2, MAX_CHARS + 3),
        ("('x' * 4).replace('xx', 'y' * {})", MAX_CHARS // 3, MAX_CHARS // 3 * 2),
        ("'y' * {} + 'yy'", MAX_CHARS - 2, MAX_CHARS),
        ("'y' * {} ~ 1", MAX_CHARS - 1, MAX_CHARS),
        ("['ab', 'c']|join('y' * {})", (MAX_CHARS - 3) // 2 - 1, (MAX_CHARS - 3) // 2 + 2),
    ],
)
def test_a_text_or_list_may_have_exactly_so_many_entries(expression, good, length):
    assert render_template(most(expression.format(good)), []) == str(length)
    with pytest.raises(TemplateTooCostly, match=f"more than {MAX_CHARS} entries"):
        render_template(most(expression.format(good + 2)), [])


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("2 ** 1024", str(2**1024)),
        ("2 ** -1024", str(2.0**-1024)),
        ("(2 ** 1023) ** 2", str(2**2046)),
        ("1.5 ** 2", "2.25"),
    ],
)
def test_powers_up_to_1024_bits(expression, text):
    assert render_template("{{ " + expression + " }}", []) == text
    for costly in ("2 ** 1025", "2 ** -1025", "(2 ** 1024) ** 1"):
        with pytest.raises(TemplateTooCostly, match="larger than 1024 bits"):
            render_template("{{ " + costly + " }}", [])


def test_a_width_has_four_digits_at_most():
    assert len(render_template("{{ '%9999d' % 1 }}{{ '{:>9999}'.format(1) }}{{ '%9999d'|format(1) }}", [])) == 3 * 9999
    for costly in ("'%10000d' % 1", "'{:>10000}'.format(1)", "'%10000d'|format(1)", "'{:>10000}'.format_map({})"):
        with pytest.raises(TemplateTooCostly, match="more than four digits"):
            render_template("{{ " + costly + " }}", [])


def test_what_steps_cost():
    assert [_steps_of("x" * n) for n in (0, 1023, 1024, 2048)] == [1, 1, 2, 3]
    assert [_steps_of(value) for value in ([0] * 5, {}, 7, None)] == [6, 1, 1, 1]
    budget = _Budget()
    budget.spend(MAX_STEPS - 1)
    budget.spend(1)
    with pytest.raises(TemplateTooCostly, match="steps"):
        budget.spend(1)


def test_a_namespace_keeps_what_a_template_sets():
    template = "{% set ns = namespace(a=1) %}{% set ns.b = 2 %}{{ ns.a }}{{ ns.b }}"
    assert render_template(template, []) == "12"
    for bad in ("{{ namespace(_a=1) }}", "{% set ns = namespace() %}{% set ns._b = 1 %}", "{{ namespace({'_c': 1}) }}"):
        with pytest.raises(jinja2.TemplateError, match=r"cannot have the attribute '_[abc]'; leave out the first _"):
            render_template(bad, [])


def test_a_join_of_operands_that_are_short_enough_each():
    """`*` lets either through; together they are one character too many."""
    assert render_template(most(f"'y' * {MAX_CHARS - 2} ~ 'zz'"), []) == str(MAX_CHARS)
    with pytest.raises(TemplateTooCostly, match=f"more than {MAX_CHARS} entries"):
        render_template(most(f"'y' * {MAX_CHARS - 1} ~ 'zz'"), [])
