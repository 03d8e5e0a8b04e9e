"""Jinja's sandbox with an end: what a template from a model file costs in steps, time and memory is bounded.

Jinja's own sandbox stops a template from reaching out, not from running for ever or from filling the memory. Here
every loop, macro and block pays for the nodes it runs, and everything that can make a long text or walk a nested value
is asked for its size before it does so. All of it happens in the thread that renders: nothing is left running.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from string import Formatter
from types import BuiltinFunctionType, BuiltinMethodType, MethodType
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator, operators
from jinja2.runtime import str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# Real templates have up to 30,000 characters and take some 50 steps a message.
MAX_SOURCE = 200_000
MAX_STEPS = 1_000_000
STEPS_PER_ITEM = 1_000
# Steps and characters between two looks at the clock.
CLOCK_STEPS, CLOCK_CHARACTERS = 500, 100_000
# Items of one value that is written, compared or sorted.
MAX_ITEMS = 200_000
# Characters made on the way (texts joined, formatted, written), and those of the prompt, beside what was given.
MAX_MADE = 32_000_000
MAX_OUTPUT = 16_000_000
# Seconds of this thread's CPU: a busy machine does not shorten it.
MAX_SECONDS = 10.0
MAX_DEPTH = 100
# A width, an indent or a count beyond this is no chat template's.
MAX_NUMBER = 1_000_000
MAX_BITS = 10_000

_SCALARS = (str, bytes, bool, int, float, type(None))
_HEAVY_TESTS = frozenset(
    (
        "eq",
        "==",
        "equalto",
        "ne",
        "!=",
        "lt",
        "lessthan",
        "<",
        "le",
        "<=",
        "gt",
        "greaterthan",
        ">",
        "ge",
        ">=",
        "in",
    )
)
# Filters that do not walk into the values they are given.
_SHALLOW = frozenset(
    ("length", "count", "first", "last", "default", "d", "map", "select", "reject", "selectattr", "rejectattr",
     "items", "reverse", "list", "attr", "random", "batch", "slice", "float", "int", "round", "abs")
)  # fmt: skip
_ANY_NUMBER = frozenset(("default", "d", "int", "float"))
_CONVERSION = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+))?[a-zA-Z%]")


class Exhausted(Exception):
    """A template asked for more than its limits; the message says of what."""


class Budget:
    """What one rendering may still use; `items` and `characters` are the size of what it was given."""

    def __init__(self, items: int, characters: int) -> None:
        self.steps = self.look = MAX_STEPS + STEPS_PER_ITEM * items
        self.items = MAX_ITEMS + 10 * items
        # Templates that add text to text copy what they have with every message.
        self.made = MAX_MADE + (items + 8) * characters
        self.output = MAX_OUTPUT + 8 * characters
        self.end = time.thread_time() + MAX_SECONDS

    def step(self, count: int = 1) -> None:
        """Pay for `count` evaluated nodes."""
        self.steps -= count
        if self.steps < 0:
            raise Exhausted("it runs too long: does a loop or a macro in it ever end?")
        if self.steps < self.look:
            self.look = self.steps - CLOCK_STEPS
            if time.thread_time() > self.end:
                raise Exhausted(f"it takes more than {MAX_SECONDS:g} s")

    def make(self, characters: int) -> None:
        """Pay for a text or list of that length, before it is made."""
        self.made -= characters
        if self.made < 0:
            raise Exhausted("it makes too long a text")
        self.step(1 + characters * CLOCK_STEPS // CLOCK_CHARACTERS)

    def weigh(self, value: Any) -> int:
        """Characters and items in a value, shared parts counted as often as they occur."""
        if isinstance(value, str | bytes):
            return len(value)
        if isinstance(value, _SCALARS):
            return 1
        total = items = 0
        stack = [(value, 0)]
        while stack:
            item, depth = stack.pop()
            items += 1
            total += len(item) + 1 if isinstance(item, str | bytes) else 1
            inner: Iterable[Any] = ()
            if isinstance(item, Mapping):
                inner = (*item.keys(), *item.values())
            elif isinstance(item, list | tuple | set | frozenset | KeysView | ValuesView | ItemsView):
                inner = item
            elif isinstance(item, Namespace):
                inner = object.__getattribute__(item, "_Namespace__attrs").values()
            elif isinstance(item, int) and item.bit_length() > MAX_BITS:
                raise Exhausted("it counts too far")
            if depth > MAX_DEPTH or items > self.items or total > self.made:
                raise Exhausted(
                    "it nests values too deeply" if depth > MAX_DEPTH else "it makes too large a value"
                )
            stack.extend((part, depth + 1) for part in inner)
        self.step(1 + items // 4)
        return total

    def number(self, value: Any) -> None:
        """Refuse a width, indent or count that no template needs."""
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) > MAX_NUMBER:
            raise Exhausted(f"it asks for a width or count of {'many digits' if value > 10**18 else value}")


_budget: ContextVar[Budget] = ContextVar("budget")


@contextmanager
def limited(items: int, characters: int) -> Iterator[Budget]:
    """Within, templates of this module's environment use one budget."""
    token = _budget.set(Budget(items, characters))
    try:
        yield _budget.get()
    finally:
        _budget.reset(token)


def _text_method(budget: Budget, text: str | bytes, name: str, args: list[Any]) -> None:
    """Pay for a method of a text before it is called; `args` may be changed (an iterator becomes a list)."""
    first: Any = args[0] if args else None
    size = 3 * len(text)  # upper("ß"): no case mapping makes more than three characters of one
    for value in args:
        budget.number(value)
    if name in ("ljust", "rjust", "center", "zfill") and isinstance(first, int):
        size = max(size, first)
    elif name == "expandtabs":
        size += len(text) * (first if isinstance(first, int) else 8)
    elif (
        name == "replace"
        and len(args) > 1
        and isinstance(first, type(text))
        and isinstance(args[1], type(text))
    ):
        found = text.count(first) if first else len(text) + 1  # type: ignore[arg-type]
        size += found * len(args[1])
    elif name == "join" and args:
        if not isinstance(first, str | bytes | Mapping | Sequence):
            args[0] = first = list(first)
        size = budget.weigh(first) + len(text) * len(first)
    elif name == "translate":
        longest = [len(v) for v in first.values() if isinstance(v, str)] if isinstance(first, Mapping) else []
        size *= max(longest, default=1)
    elif name == "encode" and str(first or "utf-8").lower() not in ("utf-8", "utf8", "ascii", "latin-1"):
        size += len(text) ** 2 // 100  # punycode and idna
    budget.make(size)


def _formatted(budget: Budget, widths: Sequence[str | None], parts: int, values: Any, size: int) -> None:
    """Pay for a text made by formatting: its own length, its widths, and each part as long as all values."""
    for width in widths:
        if width and width.isdigit():
            budget.number(int(width) if len(width) < 12 else MAX_NUMBER + 1)
            size += int(width)
        elif width:  # taken from the values
            for value in values if isinstance(values, list | tuple) else [values]:
                budget.number(value)
                size += abs(value) if isinstance(value, int) else 0
    budget.make(size + parts * 6 * budget.weigh(values))


def _percent(budget: Budget, text: str, values: Any) -> None:
    found = _CONVERSION.findall(text)
    _formatted(budget, [w for pair in found for w in pair], len(found), values, len(text))


def _braces(budget: Budget, text: str, values: list[Any]) -> None:
    specs = [spec or "" for _, field, spec, _ in Formatter().parse(text) if field is not None]
    widths = ["*" if "{" in spec else w for spec in specs for w in re.findall(r"\d+", spec) or ["0"]]
    _formatted(budget, widths, len(specs), values, len(text))


def _filter(budget: Budget, name: str, args: list[Any], options: dict[str, Any]) -> None:
    """Pay for a filter before it is called."""
    value: Any = args[0] if args else None
    more = [*args[1:], *options.values()]
    if name not in _ANY_NUMBER:
        for number in more:
            budget.number(number)
    if name in _SHALLOW:
        sizes = [n for n in more if isinstance(n, int)] if name in ("batch", "slice") else []
        budget.make(sum([*sizes, len(value) if isinstance(value, list | tuple | str) else 0]))
        return
    if name in ("join", "sum", "sort", "unique", "groupby", "string", "max", "min") and isinstance(
        value, Iterator
    ):
        args[0] = value = list(value)
    size = budget.weigh(value) + sum(budget.weigh(m) for m in more)
    if name == "format":
        _percent(budget, str(value), tuple(more))
    elif name == "replace" and len(args) > 2:
        _text_method(budget, str(value), "replace", [str(args[1]), str(args[2])])
    elif name in ("urlize", "striptags") and size > 10_000:
        raise Exhausted(f"{name} takes up to 10,000 characters")
    elif name in ("tojson", "indent", "center", "wordwrap", "xmlattr", "pprint", "join"):
        # Each item, or each line, may get each of the widths and texts that were given.
        given = sum(m if isinstance(m, int) else len(m) for m in more if isinstance(m, int | str | tuple))
        lines = str(value).count("\n") + 1 if name in ("indent", "center") else size
        size += lines * min(given, 10**9) * (MAX_DEPTH if name == "tojson" and given > 100 else 1)
    elif name == "sum" and any(isinstance(m, list | tuple) for m in more):
        size += len(value) ** 2
    budget.make(6 * size)


def _wrapped(name: str, function: Any, pay: Callable[[Budget, str, list[Any], dict[str, Any]], None]) -> Any:
    """A filter or test that pays first. It takes the context, so that nothing is computed while compiling."""
    wants = getattr(getattr(function, "jinja_pass_arg", None), "name", None)

    @pass_context
    def run(context: Any, *args: Any, **options: Any) -> Any:
        given = list(args)
        pay(_budget.get(), name, given, options)
        before = {
            "context": [context], "eval_context": [context.eval_ctx], "environment": [context.environment]
        }  # fmt: skip
        return function(*before.get(wants or "", []), *given, **options)

    return run


def _test(budget: Budget, name: str, args: list[Any], options: dict[str, Any]) -> None:
    for value in args:
        budget.weigh(value)


class _Generator(CodeGenerator):
    """Jinja's compiler, with values weighed where Python would walk them by itself."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def _weighed(self, node: nodes.Node, frame: Any) -> None:
        if isinstance(node, nodes.Const):
            self.visit(node, frame)
            return
        self.write("environment.weighed(")
        self.visit(node, frame)
        self.write(")")

    def visit_Compare(self, node: nodes.Compare, frame: Any) -> None:
        self.write("(")
        self._weighed(node.expr, frame)
        for operand in node.ops:
            self.visit(operand, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Any) -> None:
        self.write(f" {operators[node.op]} ")
        self._weighed(node.expr, frame)

    def visit_Pair(self, node: nodes.Pair, frame: Any) -> None:
        self._weighed(node.key, frame)
        self.write(": ")
        self.visit(node.value, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        self.write("{")
        for number, pair in enumerate(node.items):
            self.write(", " if number else "")
            self.visit_Pair(pair, frame)
        self.write("}")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox in which templates pay for what they do, from the budget of `limited`."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))
    code_generator_class = _Generator

    def __init__(self, filters: dict[str, Any], functions: dict[str, Any], **options: Any) -> None:
        super().__init__(optimized=False, finalize=self._written, **options)
        self.tick = self._tick
        self.filters = {name: _wrapped(name, f, _filter) for name, f in (self.filters | filters).items()}
        self.tests = {
            name: _wrapped(name, t, _test) if name in _HEAVY_TESTS else t for name, t in self.tests.items()
        }
        self.globals.update(functions)
        self.globals.pop("lipsum", None)  # random text has no place in a prompt

    def _tick(self, count: int) -> bool:
        _budget.get().step(count)
        return True

    @staticmethod
    @pass_context
    def _written(context: Any, value: Any) -> Any:
        budget = _budget.get()
        budget.make(budget.weigh(value) * (1 if isinstance(value, str) else 4))
        return value

    def concat(self, parts: Iterable[str]) -> str:  # type: ignore[override]
        """Join what a block or the template has written."""
        pieces = list(parts)
        _budget.get().make(sum(map(len, pieces)))
        return "".join(pieces)

    def joined(self, values: Sequence[Any]) -> str:
        """The `~` operator."""
        budget = _budget.get()
        budget.make(sum(budget.weigh(v) * (1 if isinstance(v, str) else 4) for v in values))
        return str_join(values)

    def weighed(self, value: Any) -> Any:
        """A value that is about to be compared or hashed."""
        if not isinstance(value, _SCALARS):
            _budget.get().weigh(value)
        return value

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, self.weighed(argument) if isinstance(argument, tuple) else argument)

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> Any:
        for node in list(source.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block))):
            body: list[nodes.Node] = node.body  # type: ignore[attr-defined]
            cost = nodes.Const(1 + sum(1 for part in body for _ in part.find_all(nodes.Node)))
            pay = nodes.Call(nodes.EnvironmentAttribute("tick"), [cost], [], None, None)
            body.insert(0, nodes.ExprStmt(pay, lineno=node.lineno))
            if isinstance(node, nodes.For) and node.test is not None:
                node.test = nodes.And(pay, node.test)
        source.set_environment(self)
        return super()._generate(source, *args, **options)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        budget.step()
        sized: list[Any] = [v for v in (left, right) if isinstance(v, str | bytes | list | tuple)]
        whole: list[int] = [v for v in (left, right) if isinstance(v, int)]
        if operator == "*" and sized and whole:
            budget.make(len(sized[0]) * max(0, min(whole[0], 10**12)))
        elif operator == "+" and sized:
            budget.make(sum(map(len, sized)))
        elif operator == "%" and isinstance(left, str):
            _percent(budget, left, right)
        elif operator in "**" and len(whole) == 2:
            bits = (
                left.bit_length() * max(0, right) if operator == "**" else sum(v.bit_length() for v in whole)
            )
            if bits > MAX_BITS and abs(left) > 1:
                raise Exhausted("it counts too far")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        inner = super().wrap_str_format(value)
        if inner is None:
            return None

        def run(*args: Any, **options: Any) -> str:
            _braces(_budget.get(), str(value.__self__), [*args, *options.values()])
            text: str = inner(*args, **options)
            return text

        return run

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if __obj is __self.tick:
            return __self._tick(*args)
        budget, given = _budget.get(), list(args)
        budget.step()
        if isinstance(__obj, BuiltinFunctionType | BuiltinMethodType | MethodType) or __obj is dict:
            own = getattr(__obj, "__self__", None)
            if isinstance(own, str | bytes):
                _text_method(budget, own, __obj.__name__, given)
            else:
                for value in (*given, *kwargs.values()):
                    budget.weigh(value)
                    if isinstance(own, int):
                        budget.number(value)
                if isinstance(own, list | tuple):
                    budget.weigh(own)
        return super().call(__context, __obj, *given, **kwargs)
