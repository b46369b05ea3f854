"""Expressions and tables: Python's own numbers, and nothing else that Python can do."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from optserve.optim import expressions
from optserve.optim.expressions import Expression, Table
from optserve_client.errors import Invalid, OptserveError, SchedulerFailed

SAME: list[tuple[str, Callable[[int], float]]] = [
    ("0.95 ** epoch", lambda epoch: 0.95**epoch),
    ("epoch // 30", lambda epoch: epoch // 30),
    ("epoch % 7 / 3", lambda epoch: epoch % 7 / 3),
    ("-epoch + 2 * 3 - 4 / 5", lambda epoch: -epoch + 2 * 3 - 4 / 5),
    ("+epoch * 1e-3", lambda epoch: +epoch * 1e-3),
    (".5 ** (epoch // 10)", lambda epoch: 0.5 ** (epoch // 10)),
    ("2 ** -epoch", lambda epoch: 2**-epoch),
    ("2 ** 3 ** 2 - epoch", lambda epoch: 2**3**2 - epoch),
    ("min(1, (epoch + 1) / 10)", lambda epoch: min(1, (epoch + 1) / 10)),
    ("max(0.1, 1 - epoch / 100, 0.2)", lambda epoch: max(0.1, 1 - epoch / 100, 0.2)),
    ("0.5 * (1 + cos(pi * epoch / 50))", lambda e: 0.5 * (1 + math.cos(math.pi * e / 50))),
    ("1 if epoch < 5 else 0.1", lambda epoch: 1 if epoch < 5 else 0.1),
    ("(epoch < 5) * 0.5 + (epoch >= 5) * 0.1", lambda e: (e < 5) * 0.5 + (e >= 5) * 0.1),
    ("0.1 if 3 <= epoch < 9 and not epoch == 5 else 1", lambda e: [1, 0.1][e in (3, 4, 6, 7, 8)]),
    ("0.1 if epoch != 3 or epoch > 3 else 1", lambda e: 0.1 if e != 3 or e > 3 else 1),
    ("epoch <= 8", lambda epoch: epoch <= 8),
    ("sqrt(epoch + 1) + abs(-epoch)", lambda epoch: math.sqrt(epoch + 1) + abs(-epoch)),
    ("exp(-epoch / 10) + log(epoch + 1)", lambda e: math.exp(-e / 10) + math.log(e + 1)),
    ("log(epoch + 1, 3)", lambda epoch: math.log(epoch + 1, 3)),
    ("log2(epoch + 1) + log10(epoch + 1)", lambda e: math.log2(e + 1) + math.log10(e + 1)),
    ("sin(epoch) + tan(epoch) + tanh(epoch)", lambda x: math.sin(x) + math.tan(x) + math.tanh(x)),
    ("floor(epoch / 3) + ceil(epoch / 7)", lambda e: math.floor(e / 3) + math.ceil(e / 7)),
    ("int(-epoch / 3) + round(epoch / 2)", lambda e: int(-e / 3) + round(e / 2)),
    ("pow(0.9, epoch) * e ** -1 * tau", lambda epoch: pow(0.9, epoch) * math.e**-1 * math.tau),
    ("(\n 1 +\n epoch\n)", lambda epoch: 1 + epoch),
]  # fmt: skip


@pytest.mark.parametrize(("text", "function"), SAME, ids=lambda v: v if isinstance(v, str) else "")
def test_values_equal_pythons_exactly(text: str, function: Callable[[int], float]) -> None:
    expression = Expression(text, "epoch", "lr_lambda")
    for epoch in (*range(130), 999, 1000):
        value = expression(epoch)
        assert type(value) is float
        assert value == function(epoch), f"at epoch {epoch}"


def test_values_do_not_depend_on_the_order_in_which_they_are_asked_for() -> None:
    expression = Expression("0.95 ** epoch", "epoch", "lr_lambda")
    epochs = [random.Random(1).randrange(100) for _ in range(300)]
    assert [expression(epoch) for epoch in epochs] == [0.95**epoch for epoch in epochs]


NOT_OURS = [
    "__import__('os').system('true')",
    "__import__",
    "__builtins__",
    "().__class__",
    "().__class__.__bases__[0].__subclasses__()",
    "epoch.__class__",
    "epoch . real",
    "epoch.real",
    "1.0.real",
    "1..hex()",
    "eval(1)",
    "exec(1)",
    "open(1)",
    "print(1)",
    "globals()",
    "lambda: 1",
    "lambda epoch: epoch",
    "(lambda: 1)()",
    '"a" * 10 ** 9',
    "'a' * 10 ** 9",
    "f'{epoch}'",
    "b'a'",
    "[1] * 10 ** 9",
    "[e for e in epoch]",
    "{1: 2}",
    "{1}",
    "(1, 2)",
    "max(*epoch)",
    "min(1, 2, key=abs)",
    "(epoch := 3)",
    "epoch = 3",
    "epoch; epoch",
    "epoch == 1 == 2; 3",
    "import os",
    "del epoch",
    "yield 1",
    "await epoch",
    "epoch is epoch",
    "epoch in epoch",
    "epoch & 1",
    "1 << 100",
    "1 << epoch",
    "~epoch",
    "epoch @ epoch",
    "epoch[0]",
    "...",
    "None",
    "True",
    "not None",
    "1j",
    "0x10",
    "1_000",
    "1if epoch else 2",
    "1.e400",
    "9" * 400,
    "abs",
    "abs + 1",
    "abs()",
    "abs(1, 2)",
    "min(1)",
    "log(1, 2, 3)",
    "round(1, 2)",
    "foo(epoch)",
    "sin(epoch)(epoch)",
    "foo",
    "x",
    "e" * 1000,
    "e" * 1001,
    "",
    "  ",
    "1 +",
    ")(",
    "epoch epoch",
    "# comment",
    "1 # comment",
    "epoch\\\n",
    "ε",
    "ｅｐｏｃｈ",
    "\x00",
    "(" * 400 + "1" + ")" * 400,
    "(" * 90 + "1" + ")" * 90 + "+" + "-" * 100 + "1",
    "-" * 999 + "1",
    "not " * 200 + "1",
    "+".join(["1"] * 400),
    "abs(" * 120 + "1" + ")" * 120,
    "1 if " * 80 + "1" + " else 1" * 80,
]


@pytest.mark.parametrize("text", NOT_OURS, ids=lambda text: text[:40])
def test_what_is_not_an_expression_of_numbers_is_refused_quickly(text: str) -> None:
    started = time.perf_counter()
    with pytest.raises(Invalid) as caught:
        Expression(text, "epoch", "scheduler.lr_lambda")
    assert time.perf_counter() - started < 0.1
    assert caught.value.detail.startswith("scheduler.lr_lambda ")
    assert caught.value.extra == {"field": "scheduler.lr_lambda"}
    assert len(caught.value.detail) < 400


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("epoch * 'a'", 'lr_lambda "epoch * \'a\'": unexpected "\'" at character 9'),
        ("epoch.real", 'lr_lambda "epoch.real": unexpected "." at character 6'),
        ("1 +", 'lr_lambda "1 +": cannot be read: invalid syntax'),
        ("1j", 'lr_lambda "1j": unexpected "1" at character 1'),
        ("abs(1, 2)", 'lr_lambda "abs(1, 2)": abs takes 1 number, got 2'),
        ("foo(1)", 'lr_lambda "foo(1)": "foo" is not a function; functions are abs, ceil, cos'),
        ("log()", 'lr_lambda "log()": log takes 1 to 2 numbers, got 0'),
        ("abs", 'lr_lambda "abs": abs is a function: write abs(...)'),
        ("(1, 2)", 'lr_lambda "(1, 2)": Tuple is not available'),
        ("-" * 99 + "1", f'lr_lambda "{"-" * 59}...: is nested more than 64 deep'),
        ("", "lr_lambda must not be empty"),
        ("1" * 1001, "lr_lambda must have at most 1000 characters, got 1001; write a long"),
    ],
)
def test_a_refusal_says_what_and_where(text: str, sentence: str) -> None:
    with pytest.raises(Invalid) as caught:
        Expression(text, "epoch", "lr_lambda")
    assert caught.value.detail[: len(sentence)] == sentence


@pytest.mark.parametrize(
    ("text", "epoch", "sentence"),
    [
        ("1 / (epoch - 3)", 3, "float division by zero"),
        ("epoch % 0", 1, "float modulo"),
        ("0 ** -epoch", 1, "0.0 cannot be raised to a negative power"),
        ("(0 - 8) ** (1 / 3)", 0, "a negative number has no real fractional power"),
        ("pow(0 - epoch, 0.5)", 2, "a negative number has no real fractional power"),
        ("9 ** 9 ** 9", 0, "Numerical result out of range"),
        ("10 ** (epoch * 100)", 4, "Numerical result out of range"),
        ("1e300 * 1e300", 0, "the result is inf, not a finite number"),
        ("1e300 * 1e300 * 0", 0, "the result is nan, not a finite number"),
        ("floor(1e300 * 1e300)", 0, "cannot convert float infinity to integer"),
        ("log(epoch)", 0, "math domain error"),
        ("sqrt(-1)", 0, "math domain error"),
        ("exp(1000)", 0, "math range error"),
    ],
)
def test_what_cannot_be_computed_names_expression_epoch_and_result(
    text: str, epoch: int, sentence: str
) -> None:
    expression = Expression(text, "epoch", "scheduler.lr_lambda")
    started = time.perf_counter()
    with pytest.raises(SchedulerFailed) as caught:
        expression(epoch)
    assert time.perf_counter() - started < 0.1
    expected = f'scheduler.lr_lambda "{text}" at epoch = {epoch}: {sentence}'
    assert caught.value.detail == expected


def test_comparisons_never_make_integers_that_could_grow() -> None:
    nine = "(" + "+".join(["(1<2)"] * 9) + ")"
    expression = Expression(f"{nine} ** {nine} ** {nine}", "epoch", "lr_lambda")
    with pytest.raises(SchedulerFailed, match="Numerical result out of range"):
        expression(0)


def test_the_dearest_expression_is_cheap() -> None:
    text = "max(" + ",".join(["epoch**epoch"] * 70) + ")"
    expression = Expression(text, "epoch", "lr_lambda")
    started = time.perf_counter()
    assert expression(100) == 1e200
    assert time.perf_counter() - started < 0.05


def test_names_and_functions_cannot_be_changed_by_an_expression() -> None:
    first = Expression("sin(epoch)", "epoch", "lr_lambda")
    assert first(0) == 0.0
    second = Expression("cos(x)", "x", "scale_fn")
    assert (second(0), first(1)) == (1.0, math.sin(1))
    with pytest.raises(Invalid, match='unknown name "epoch"; names are x, pi, e, tau'):
        Expression("epoch", "x", "scale_fn")


def test_a_table_holds_its_last_value() -> None:
    table = Table([1.0, 0.5, 0.25], "lr_lambda")
    assert [table(epoch) for epoch in range(6)] == [1.0, 0.5, 0.25, 0.25, 0.25, 0.25]
    assert table(1.9) == 0.5
    assert table(1e300) == 0.25


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (None, 'lr_lambda must be text in epoch or {"table": [...]}, got null'),
        (["1"], 'lr_lambda must be text in epoch or {"table": [...]}, got ["1"]'),
        ({}, "lr_lambda must have the one key table, got []"),
        ({"table": [1], "x": 1}, 'lr_lambda must have the one key table, got ["table", "x"]'),
        ({"table": "abc"}, 'lr_lambda.table must be a list of numbers, got "abc"'),
        ({"table": [True]}, "lr_lambda.table[0] must be a number, got true"),
        ({"table": [math.inf]}, "lr_lambda.table[0] must be a finite number, got Infinity"),
        ({"table": [0] * 100_001}, "lr_lambda.table must have at most 100000 values, got 100001"),
    ],
)
def test_a_bad_table_is_refused(value: Any, sentence: str) -> None:
    with pytest.raises(OptserveError) as caught:
        expressions.check(value, "epoch", "lr_lambda")
    assert caught.value.detail == sentence


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", '"a"'),
        ("a" * 10**7, '"' + "a" * 59 + "..."),
        ([0] * 10**6, "1000000 values"),
        ({str(i): i for i in range(11)}, "11 keys"),
        (3j, "a complex"),
        ([[0] * 30] * 3, "[[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0..."),
    ],
)
def test_values_in_sentences_are_short(value: Any, text: str) -> None:
    assert expressions.shown(value) == text
