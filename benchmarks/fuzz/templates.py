"""Chat templates that attack their renderer, and damaged good ones."""

from __future__ import annotations

from random import Random

from benchmarks.fuzz.damage import damaged_bytes

_PIECES = (
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}", "{{ ('x' * 9999) * 9999 }}", "{{ [[0] * 999] * 99999 }}",
    "{{ 1 / 0 }}", "{{ 2 ** 2 ** 2 ** 30 }}", "{{ 10 ** 9999 }}", "{{ 0.1 ** -9999 }}",
    "{% import 'os' as os %}", "{% include 'x' %}", "{% extends 'x' %}", "{% from 'a' import b %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.__class__ }}",
    "{{ ''['__class__'] }}", "{{ ''|attr('__class__') }}", "{{ range.__init__.__globals__ }}",
    "{{ '{0.__class__}'.format(1) }}", "{{ '{0.x.y[z]}'.format(messages) }}",
    "{{ messages[99].content }}", "{{ messages[0]['content'][0].text.x.y }}", 
    "{{ nothing.at.all }}",
    "{{ raise_exception('no\nway\u2028') }}", "{{ raise_exception(messages * 1000) }}",
    "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(f) }}{{ f() }}{{ f(1, 2, 3) }}",
    "{% set ns = namespace(a=[1]) %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}"
    "{% endfor %}{{ ns.a }}",
    "{% set ns = namespace(a='x') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}"
    "{% endfor %}{{ ns.a }}",
    "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}{{ ns | tojson }}{{ [ns] | tojson }}",
    "{% set ns.x = 1 %}", "{{ messages.append(messages) }}", "{{ dict(messages) }}",
    "{{ strftime_now('%' * 999) }}", "{{ strftime_now('\ud800') }}", "{{ strftime_now(3) }}",
    "{{ strftime_now('%Y\0') }}", "{{ '%9999999d' % 1 }}", "{{ '%*d' % (99999999, 1) }}",
    "{{ '%s' % messages }}", "{{ '{:9999999}'.format(1) }}", "{{ '%d' % 'x' }}",
    "{{ messages | sum }}", "{{ messages | map('upper') | list }}", "{{ messages | join(3) }}",
    "{{ messages | sort(attribute='x') | first }}", "{{ messages | groupby('role') | tojson }}",
    "{{ messages | tojson(indent=99999) }}", "{{ range(9) | tojson }}", "{{ f | tojson }}",
    "{{ 'x' | indent(999999) }}", "{{ 'x' | center(99999999) }}", "{{ 'x' | replace('', 'y') }}",
    "{{ 'x' | batch(0) | list }}", "{{ [1] | slice(0) | list }}", "{{ [] | max }}",
    "{{ [1, 'x', none] | sort }}", "{{ [1, 'x'] | max }}", "{{ {} | dictsort(by='q') }}",
    "{{ 'x' | int(base=99) }}", "{{ '\u0663' | int }}", "{{ 'nan' | float | int }}",
    "{{ 'inf' | float | round | int }}", "{{ 1e999 | int }}", "{{ 'x' | unknown }}",
    "{{ 1 is unknown }}", "{{ 1 is divisibleby(0) }}", "{{ 'x' | truncate(-9) }}",
    "{{ 'x' | wordcount(3) }}", "{{ 'a'.split('') }}", "{{ 'a'.join(messages) }}",
    "{{ 'a'.ljust(10**12) }}", "{{ 'a'.translate({}) }}", "{{ 'a'.encode('utf-16') }}",
    "{{ messages | selectattr('role', 'in', 3) | list }}", "{{ messages[::0] }}",
    "{{ messages['x':] }}", "{{ -messages }}", "{{ messages + 1 }}", "{{ {[]: 1} }}",
    "{% for a, b, c in messages %}{% endfor %}", "{% for x in 3 %}{% endfor %}",
    "{% for x in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% for x in messages %}{{ loop.cycle() }}{% endfor %}", "{{ loop.index }}",
    "{% for x in messages %}{{ loop.changed(x) }}{% break %}{% endfor %}", "{% break %}",
    "{% call f() %}{% endcall %}", "{% filter upper %}x{% endfilter %}", 
    "{% block a %}{% endblock %}",
    "{% generation %}x{% endgeneration %}", "{% set x %}{{ x }}{% endset %}", 
    "{% raw %}{{{% endraw %}",
    "{% autoescape true %}{{ '<' }}{% endautoescape %}", "{% debug %}", 
    "{% trans %}x{% endtrans %}",
    "{{ cycler() }}", "{{ joiner(3)() }}", "{{ cycler(1, 2).next() }}", "{{ lipsum(n=99) }}",
    "{{ self }}", "{{ self._TemplateReference__context }}", "{{ caller() }}", "{{ varargs }}",
    "{{ '\ud800' }}", "{{ '\0' }}", "\ud800", "\0", "{#", "{{", "{%", "}}", "{{ }}", "{{ ( }}",
    "{{ 1_0 }}", "{{ " + "9" * 5000 + " }}", "{{ " + "(" * 3000 + ")" * 3000 + " }}",
    "{{ " + "[" * 3000 + "]" * 3000 + " }}", "{{ " + "-" * 3000 + "1 }}",
    "{{ " + "not " * 3000 + "1 }}", "{{ 1" + " + 1" * 5000 + " }}", "{{ a" + ".b" * 5000 + " }}",
    "{{ 1" + " | abs" * 5000 + " }}", "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "{% for x in [1, 2] %}" * 30 + "{% endfor %}" * 30, "{% if 1 %}" + "{% elif 1 %}" * 5000,
    "{{ 1" + " if 1 else 1" * 3000 + " }}", "x" * 300_000,
)  # fmt: skip


def hostile_template(rng: Random, good: str) -> str:
    """Return hostile pieces alone, pieces inserted in a good template, or a damaged good
    template."""
    choice = rng.random()
    pieces = rng.sample(_PIECES, rng.choice((1, 1, 2, 3)))
    if choice < 0.4:
        return "".join(pieces)
    if choice < 0.7:
        at = rng.choice([i + 2 for i in range(len(good)) if good[i : i + 2] in ("%}", "}}")])
        return good[:at] + "".join(pieces) + good[at:]
    if choice < 0.85:
        return damaged_bytes(rng, good.encode())[1].decode("utf-8", "replace")
    words = good.split(" ")
    for _ in range(rng.randint(1, 4)):
        words[rng.randrange(len(words))] = rng.choice((*words, *pieces, "none", "3", "(", "'"))
    return " ".join(words)
