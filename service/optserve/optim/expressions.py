"""Learning-rate expressions and tables: what a caller may write where torch takes a function.

``"0.95 ** epoch"`` is parsed once, checked node by node against a short list, and then evaluated by
simpleeval with float names, float constants and float results only. So no step can build a large
integer or a long string, and the cost of one evaluation is bounded by the length of the text.
For every whole number below 2**53 the floats are exactly what Python's own lambda would give.
"""

from __future__ import annotations

import ast
import json
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from simpleeval import SimpleEval  # type: ignore[import-untyped]

from optserve_client.errors import Invalid, SchedulerFailed

#: Longest expression, in characters.
LENGTH_LIMIT = 1000
#: Deepest nesting; also bounds the recursion of the evaluator. A long sum nests once per term.
DEPTH_LIMIT = 64
#: Most values in one table.
TABLE_LIMIT = 100_000

CONSTANTS: Mapping[str, float] = {"pi": math.pi, "e": math.e, "tau": math.tau}


def _power(base: float, exponent: float) -> float:
    result = base**exponent
    if isinstance(result, complex):
        raise ValueError("a negative number has no real fractional power")
    return float(result)


#: Functions by name, with the smallest and largest number of arguments.
FUNCTIONS: Mapping[str, tuple[Callable[..., float], int, int]] = {
    "abs": (abs, 1, 1),
    "ceil": (lambda x: float(math.ceil(x)), 1, 1),
    "cos": (math.cos, 1, 1),
    "exp": (math.exp, 1, 1),
    "floor": (lambda x: float(math.floor(x)), 1, 1),
    "int": (lambda x: float(math.trunc(x)), 1, 1),
    "log": (math.log, 1, 2),
    "log10": (math.log10, 1, 1),
    "log2": (math.log2, 1, 1),
    "max": (max, 2, 100),
    "min": (min, 2, 100),
    "pow": (_power, 2, 2),
    "round": (lambda x: float(round(x)), 1, 1),
    "sin": (math.sin, 1, 1),
    "sqrt": (math.sqrt, 1, 1),
    "tan": (math.tan, 1, 1),
    "tanh": (math.tanh, 1, 1),
}

# Comparisons give 1.0 or 0.0, which multiply as Python's bools do but never become integers.
_OPERATORS: Mapping[type[ast.AST], Callable[..., float]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.Pow: _power,
    ast.UAdd: lambda a: a,
    ast.USub: lambda a: -a,
    ast.Not: lambda a: float(not a),
    ast.Lt: lambda a, b: float(a < b),
    ast.LtE: lambda a, b: float(a <= b),
    ast.Gt: lambda a, b: float(a > b),
    ast.GtE: lambda a, b: float(a >= b),
    ast.Eq: lambda a, b: float(a == b),
    ast.NotEq: lambda a, b: float(a != b),
}

_STRUCTURE = (ast.Expr, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Call)
_LEAVES = (ast.Name, ast.Constant)
_WORDLESS = (ast.Load, ast.And, ast.Or)  # parts of other nodes, never evaluated by themselves

# SimpleEval's constructor suspends the process-wide warning filters; two at once could lose them.
_CONSTRUCTION = threading.Lock()

# A number, a word or an operator. Anything else never reaches Python's parser, so it can neither
# warn ("1if x") nor meet a string, an attribute, a comprehension or an assignment.
_TOKEN = re.compile(
    r"\s+|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.])|[A-Za-z]\w*"
    r"|\*\*|//|<=|>=|==|!=|[-+*/%<>(),]",
    re.ASCII,
)


def shown(value: Any, limit: int = 60) -> str:
    """Return ``value`` as JSON for a sentence; what is long is cut or only counted."""
    if isinstance(value, list | tuple | dict) and len(value) > 10:
        return f"{len(value)} {'keys' if isinstance(value, dict) else 'values'}"
    try:
        text = json.dumps(value[:limit] if isinstance(value, str) else value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}..."


def number(value: Any, where: str) -> float:
    """Return ``value`` as a finite float, or raise Invalid; booleans and text are not numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Invalid(f"{where} must be a number, got {shown(value)}", field=where)
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise Invalid(f"{where} must be a finite number, got {shown(value)}", field=where)
    return result


def sentence(exc: Exception) -> str:
    """Return what an exception says, without the number in front as in ``(34, "out of range")``."""
    if isinstance(exc, KeyError):
        return f"there is no {exc}"
    return str(exc.args[-1]) if exc.args and str(exc.args[-1]) else type(exc).__name__


class Expression:
    """A function of one number, written as text; ``variable`` is its name there.

    Calling it gives a finite float, or SchedulerFailed with the text, the number and what came out.
    """

    def __init__(self, text: str, variable: str, where: str) -> None:
        """Parse ``text``; raise Invalid with ``where`` in the sentence if it is not one of ours."""
        self.text, self.variable, self.where = text, variable, where
        self._node = self._parse(text)
        self._check(self._node)
        with _CONSTRUCTION:
            evaluator = SimpleEval(
                operators=dict(_OPERATORS),
                functions={name: function for name, (function, _, _) in FUNCTIONS.items()},
            )
        allowed = (*_STRUCTURE, *_LEAVES)
        evaluator.nodes = {t: handler for t, handler in evaluator.nodes.items() if t in allowed}
        self._evaluator = evaluator
        self._last = (math.nan, math.nan)

    def __call__(self, at: float) -> float:
        """Return the value at ``at``; torch asks once for each group."""
        if at == self._last[0]:
            return self._last[1]
        self._evaluator.names = {**CONSTANTS, self.variable: float(at)}
        try:
            value = self._evaluator.eval(self.text, previously_parsed=self._node)
        except Exception as exc:
            raise self._failed(at, sentence(exc)) from exc
        if type(value) is not float or not math.isfinite(value):
            raise self._failed(at, f"the result is {value}, not a finite number")
        self._last = (at, value)
        return value

    def _failed(self, at: float, why: str) -> SchedulerFailed:
        text = shown(self.text)
        return SchedulerFailed(
            f"{self.where} {text} at {self.variable} = {at}: {why}", field=self.where
        )

    def _invalid(self, why: str) -> Invalid:
        return Invalid(f"{self.where} {shown(self.text)}: {why}", field=self.where)

    def _parse(self, text: str) -> ast.Expr:
        if not text.strip():
            raise Invalid(f"{self.where} must not be empty", field=self.where)
        if len(text) > LENGTH_LIMIT:
            raise Invalid(
                f"{self.where} must have at most {LENGTH_LIMIT} characters, got {len(text)}; "
                'write a long schedule as {"table": [...]}',
                field=self.where,
            )
        at = 0
        while at < len(text):
            token = _TOKEN.match(text, at)
            if token is None:
                raise self._invalid(f"unexpected {shown(text[at])} at character {at + 1}")
            at = token.end()
        try:
            # One line: a newline inside would end the expression.
            body = ast.parse(" ".join(text.split())).body
        except SyntaxError as exc:
            raise self._invalid(f"cannot be read: {exc.msg}") from exc
        except (ValueError, RecursionError, MemoryError) as exc:
            raise self._invalid("cannot be read: it is nested too deeply") from exc
        if len(body) != 1 or not isinstance(body[0], ast.Expr):
            raise self._invalid("is not an expression")
        return body[0]

    def _check(self, root: ast.Expr) -> None:
        """Walk without recursion; turn every constant into a float."""
        todo: list[tuple[ast.AST, int]] = [(root, 0)]
        while todo:
            node, depth = todo.pop()
            if depth > DEPTH_LIMIT:
                raise self._invalid(f"is nested more than {DEPTH_LIMIT} deep")
            skip: ast.AST | None = None
            if isinstance(node, ast.Constant):
                self._check_constant(node)
            elif isinstance(node, ast.Name):
                self._check_name(node)
            elif isinstance(node, ast.Call):
                self._check_call(node)
                skip = node.func
            elif not isinstance(node, (*_STRUCTURE, *_WORDLESS)) and type(node) not in _OPERATORS:
                raise self._invalid(f"{type(node).__name__} is not available")
            todo += [(c, depth + 1) for c in ast.iter_child_nodes(node) if c is not skip]

    def _check_constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool) or not isinstance(node.value, int | float):
            raise self._invalid(f"{node.value!r} is not a number")
        try:
            node.value = float(node.value)
        except OverflowError as exc:
            raise self._invalid("a number is too large") from exc
        if not math.isfinite(node.value):
            raise self._invalid("a number is too large")

    def _check_name(self, node: ast.Name) -> None:
        names = [self.variable, *CONSTANTS]
        if node.id in FUNCTIONS:
            raise self._invalid(f"{node.id} is a function: write {node.id}(...)")
        if node.id not in names:
            raise self._invalid(
                f"unknown name {shown(node.id)}; names are {', '.join(names)}, "
                f"functions are {', '.join(FUNCTIONS)}"
            )

    def _check_call(self, node: ast.Call) -> None:
        if not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS:
            name = node.func.id if isinstance(node.func, ast.Name) else "that"
            raise self._invalid(
                f"{shown(name)} is not a function; functions are {', '.join(FUNCTIONS)}"
            )
        _, least, most = FUNCTIONS[node.func.id]
        if node.keywords or not least <= len(node.args) <= most:
            bound = str(least) if least == most else f"{least} to {most}"
            words = f"{bound} number{'' if bound == '1' else 's'}"
            raise self._invalid(f"{node.func.id} takes {words}, got {len(node.args)}")


class Table:
    """A function of a whole number: ``values[n]``, and the last value from there on."""

    def __init__(self, values: Sequence[float], where: str) -> None:
        self.values, self.where = tuple(values), where

    def __call__(self, at: float) -> float:
        """Return the value at ``at``, which torch counts from 0 (a CyclicLR's cycles from 1)."""
        return self.values[min(max(math.floor(at), 0), len(self.values) - 1)]


Function = Expression | Table


def check(value: Any, variable: str, where: str) -> Any:
    """Return the normalised JSON of an expression or table, or raise Invalid."""
    if isinstance(value, str):
        Expression(value, variable, where)
        return value.strip()
    if not isinstance(value, Mapping):
        raise Invalid(
            f'{where} must be text in {variable} or {{"table": [...]}}, got {shown(value)}',
            field=where,
        )
    if set(value) != {"table"}:
        raise Invalid(f"{where} must have the one key table, got {shown(list(value))}", field=where)
    table = value["table"]
    if not isinstance(table, Sequence) or isinstance(table, str) or not table:
        raise Invalid(f"{where}.table must be a list of numbers, got {shown(table)}", field=where)
    if len(table) > TABLE_LIMIT:
        raise Invalid(
            f"{where}.table must have at most {TABLE_LIMIT} values, got {len(table)}", field=where
        )
    return {"table": [number(v, f"{where}.table[{i}]") for i, v in enumerate(table)]}


def make(value: Any, variable: str, where: str) -> Function:
    """Return the function that normalised JSON stands for."""
    if isinstance(value, str):
        return Expression(value, variable, where)
    return Table(value["table"], where)
