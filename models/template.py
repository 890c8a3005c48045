"""Chat templates of model folders, rendered in a sandbox that bounds time, steps and memory.

A template is an untrusted program. Jinja's sandbox keeps it from code and files. Here every loop,
call, operator and output also counts against a budget, so that no template runs forever or produces
more text than a prompt can hold. No signals or processes are used: it works in any thread.
"""

from __future__ import annotations

import contextvars
import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MOST_SECONDS = 10.0
MOST_STEPS = 2_000_000
MOST_CHARS = 4 << 20  # characters of output, plus eight times the conversation's own
MOST_SOURCE = 256 << 10  # characters of a template; published ones have at most 30,000
_MOST_ITEMS = 100_000  # in a list or dictionary, nested ones included
_MOST_WIDTH = 10_000  # of padding, and other numbers passed to a call
_MOST_BITS = 4096
_FILTERS = """
    abs attr batch capitalize center count d default dictsort e escape first float format groupby
    indent int items join last length list lower map max min reject rejectattr replace reverse round
    safe select selectattr slice sort string sum title tojson trim truncate unique upper wordcount
""".split()
_STRING_METHODS = frozenset(
    """
    capitalize casefold center count endswith find format format_map index isalnum isalpha isascii
    isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust
    lower lstrip partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit
    rstrip split splitlines startswith strip swapcase title upper zfill
    """.split()
)
# Widths in a format that are long, an argument, or computed.
_WIDE = re.compile(r"\d{5,}|%[^a-zA-Z%]*\*|\{[^{}]+\{")


class TemplateLimit(Exception):
    """The template would take too long or produce too much."""


class _Budget:
    """The remaining budget of one rendering."""

    def __init__(self, chars: int):
        self.chars, self.most = chars, chars
        self.steps = MOST_STEPS
        self.deadline = time.monotonic() + MOST_SECONDS

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise TemplateLimit(f"it takes more than {MOST_STEPS} steps")
        if time.monotonic() > self.deadline:
            raise TemplateLimit(f"it takes more than {MOST_SECONDS:g} seconds")

    def write(self, count: int) -> None:
        self.chars -= count
        if self.chars < 0:
            self.too_long()

    def check_text(self, length: int) -> None:
        if length > self.most:
            self.too_long()

    def too_long(self) -> None:
        raise TemplateLimit(f"it produces more than {self.most} characters")


_BUDGET: contextvars.ContextVar[_Budget] = contextvars.ContextVar("template_budget")


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja, as Hugging Face's chat templates are written.

    Raises:
        TemplateLimit: longer than :data:`MOST_SOURCE`.
        Exception: not a valid template; jinja2 raises many types.
    """

    def __init__(self, source: str):
        if len(source) > MOST_SOURCE:
            raise TemplateLimit(f"it is longer than {MOST_SOURCE} characters")
        env = _Environment()
        code = env.compile(_Counted().visit(env.parse(source)))
        self.template = env.template_class.from_code(env, code, env.make_globals(None))

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Return the text of a chat.

        Raises:
            TemplateLimit: it takes too long or produces too much.
            Exception: anything the template raises.
        """
        messages = plain(messages)
        budget = _Budget(MOST_CHARS + 8 * _chars(messages))
        token = _BUDGET.set(budget)
        try:
            return "".join(self.template.generate(messages=messages, **plain(variables)))
        finally:
            _BUDGET.reset(token)


def plain(value: Any) -> Any:
    """Rebuild JSON-like data from plain types; anything else becomes the name of its type."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {plain(k): plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str.__str__(value) if isinstance(value, str) else f"<{type(value).__name__}>"


def _chars(value: Any) -> int:
    """Count the characters of all texts in plain data."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_chars, value.values()))
    return sum(map(_chars, value)) if isinstance(value, list) else 0


def sized(value: Any) -> Any:
    """Return the value after checking that its size is bounded, including its content."""
    budget = _BUDGET.get()
    budget.step()
    if isinstance(value, str):
        budget.check_text(len(value))
    elif isinstance(value, int):
        if value.bit_length() > _MOST_BITS:
            raise TemplateLimit(f"it produces a number of more than {_MOST_BITS} bits")
    elif isinstance(value, list | tuple | set | dict | Namespace):
        _check_items(value, budget)
    return value


def _check_items(value: Any, budget: _Budget) -> None:
    todo, items, chars = [value], 0, 0
    while todo:
        part = todo.pop()
        if isinstance(part, Namespace):
            part = part._Namespace__attrs
        if isinstance(part, str):
            chars += len(part)
            budget.check_text(chars)
        elif isinstance(part, dict):
            todo += [*part, *part.values()]
        elif isinstance(part, list | tuple | set):
            todo += part
        items += 1
        if items + len(todo) > _MOST_ITEMS:
            raise TemplateLimit(f"it makes lists of more than {_MOST_ITEMS} items")


def _steps(iterable: Iterable[Any]) -> Iterator[Any]:
    """Iterate over a loop's items; each item counts as a step."""
    budget = _BUDGET.get()
    for item in iterable:
        budget.step()
        yield item


def _joined(parts: list[Any], sep: str = "") -> str:
    """Join the texts of some values."""
    texts = [str(sized(part)) for part in parts]
    _BUDGET.get().check_text(sum(map(len, texts)) + len(sep) * len(texts))
    return sep.join(texts)


class _Counted(NodeTransformer):
    """Inserts the counting into a template's syntax tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _through("_steps", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through("_joined", nodes.List(node.nodes, lineno=node.lineno))

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.Const(node.data, lineno=node.lineno)  # a constant counts as output

    def visit_NSRef(self, node: nodes.NSRef) -> nodes.Node:
        _check_names([node.attr])
        return node

    def _literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else _through("_sized", node)

    visit_List = visit_Tuple = visit_Dict = _literal


def _through(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _check_names(names: Iterable[Any]) -> None:
    for name in names:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace has no attribute {name!r}")


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's text for training; it has no effect here."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


@pass_context
def _written(context: Any, value: Any) -> str:
    """Return an output's text, counted."""
    text = str(sized(value))
    _BUDGET.get().write(len(text))
    return text


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox in which chat templates run, with the names that transformers provides."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        extensions = [_Generation, "jinja2.ext.loopcontrols"]
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions, optimized=False,
            finalize=_written,
        )  # fmt: skip
        self.filters = {name: _bounded(name, self.filters[name]) for name in _FILTERS}
        self.filters |= {
            "tojson": _to_json, "join": _join_filter, "_steps": _steps, "_joined": _joined,
            "_sized": sized,
        }  # fmt: skip
        self.globals.pop("lipsum")
        self.globals |= {
            "raise_exception": _raise, "strftime_now": _now, "dict": dict, "namespace": _namespace,
        }  # fmt: skip

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_product(left, right)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            sized(1 << min(abs(left).bit_length() * abs(right), _MOST_BITS + 1))
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        return sized(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        _BUDGET.get().step()
        owner = getattr(__obj, "__self__", getattr(getattr(__obj, "__wrapped__", 0), "__self__", 0))
        if isinstance(owner, str):
            args = _check_method(owner, __obj.__name__, args)
        if not isinstance(__obj, Macro):
            _check_numbers(args, kwargs)
        return sized(super().call(__context, __obj, *args, **kwargs))


def _check_product(left: Any, right: Any) -> None:
    for text, count in ((left, right), (right, left)):
        if isinstance(text, str) and isinstance(count, int):
            _BUDGET.get().check_text(len(text) * max(count, 0))
        elif isinstance(text, list | tuple) and isinstance(count, int):
            if len(text) * count > _MOST_ITEMS:
                raise TemplateLimit(f"it makes lists of more than {_MOST_ITEMS} items")


def _check_format(text: str) -> None:
    if _WIDE.search(text):
        raise TemplateLimit("it formats to a width that is too large, or computed")


def _check_numbers(args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > _MOST_WIDTH:
            raise TemplateLimit(f"it calls something with a number beyond {_MOST_WIDTH}")


def _check_method(text: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of a string method after checking that its result is of bounded size."""
    if name not in _STRING_METHODS:
        raise SecurityError(f"the method {name!r} of a text is not available")
    if name in ("format", "format_map"):
        _check_format(text)
    if name == "replace":
        _check_replace(text, *args)
    if name == "join" and args:
        items = list(_steps(args[0]))
        _joined(items, text)
        return (items,)
    return args


def _check_replace(text: Any, old: Any = "", new: Any = "", *_: Any) -> None:
    old, new = str(old), str(new)
    if len(new) > len(old):
        found = str(text).count(old)
        _BUDGET.get().check_text(len(str(text)) + found * (len(new) - len(old)))


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter so that its arguments and result are of bounded size."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        _BUDGET.get().step()
        _check_numbers(args[1:], kwargs)
        texts = [a for a in args if isinstance(a, str)]
        if name == "format" and texts:
            _check_format(texts[0])
        if name == "replace":
            words = [a for a in (*args, *kwargs.values()) if isinstance(a, str)]
            _check_replace(*words)
        if name == "indent" and texts:
            width = max((len(v) if isinstance(v, str) else int(v)
                         for v in (*args[1:], *kwargs.values())), default=4)  # fmt: skip
            _BUDGET.get().check_text((texts[0].count("\n") + 1) * width)
        return sized(function(*args, **kwargs))

    return run


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    wide = [len(x) if isinstance(x, str) else x for x in (indent, *(separators or ()))]
    if any(isinstance(x, int) and x > 16 for x in wide):
        raise TemplateLimit("it writes JSON with wide indents or separators")
    return sized(
        json.dumps(
            sized(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators,
            sort_keys=sort_keys,
        )
    )  # fmt: skip


def _join_filter(value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    items = list(_steps(value))
    if attribute is not None:
        items = [item[attribute] if isinstance(item, Mapping) else "" for item in items]
    return _joined(items, str(d))


def _raise(message: Any) -> None:
    raise TemplateError(str(message)[:500])


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    attrs = dict(*args, **kwargs)
    _check_names(attrs)
    return Namespace(attrs)
