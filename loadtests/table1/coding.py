"""The family `code`: one-line Python functions from a one-sentence description, checked by running them.

What a policy writes is run only after its syntax tree has been read: one function of one argument that returns an
expression of a few harmless kinds. Called by `tasks`.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

import numpy as np

from loadtests.table1.task import Family, Task
from router_core.demo.draft import pick

FUNCTIONS = ("solve", "apply", "run", "helper", "func")
NUMBERS = ("n", "x", "value")
SEQUENCES = ("items", "data", "rows")
_REQUESTS = (
    "Write a Python function {f} ( {v} ) that returns {d} .",
    "Implement {f} ( {v} ) in Python : it returns {d} .",
    "Define the Python function {f} ( {v} ) returning {d} .",
)
_ALLOWED = (
    ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Return, ast.BinOp, ast.Compare, ast.Call, ast.Name,
    ast.Load, ast.Constant, ast.Subscript, ast.UnaryOp, ast.USub, ast.Add, ast.Sub, ast.Mult, ast.Mod, ast.FloorDiv,
    ast.Gt, ast.Lt, ast.GtE, ast.LtE, ast.Eq, ast.Slice,
)  # fmt: skip
_BUILTINS = {"len": len, "sum": sum, "max": max, "min": min, "sorted": sorted}
_CASES: dict[tuple[str, ...], tuple[object, ...]] = {
    NUMBERS: (0, 1, 7, 12, 40, -3),
    SEQUENCES: ([3, 1, 2], [5, 4, 9, 8, 7, 6], [2, 2, 11, 1], [10, -4, 3, 0, 6]),
}


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a function should do; `{v}` its argument, `{k}` a constant, `{j}` the constant after it."""

    arguments: tuple[str, ...]
    description: str
    right: str
    wrong: tuple[str, ...]


_KINDS = (
    _Kind(NUMBERS, "{v} plus {k}", "{v} + {k}", ("{v} - {k}", "{v} * {k}", "{v} + {j}")),
    _Kind(NUMBERS, "{v} minus {k}", "{v} - {k}", ("{v} + {k}", "{v} // {k}", "{v} - {j}")),
    _Kind(NUMBERS, "{v} times {k}", "{v} * {k}", ("{v} + {k}", "{v} % {k}", "{v} * {j}")),
    _Kind(NUMBERS, "the remainder of {v} divided by {k}", "{v} % {k}", ("{v} // {k}", "{v} % {j}")),
    _Kind(NUMBERS, "the whole quotient of {v} and {k}", "{v} // {k}", ("{v} % {k}", "{v} // {j}")),
    _Kind(NUMBERS, "whether {v} is above {k}", "{v} > {k}", ("{v} < {k}", "{v} >= {k}")),
    _Kind(NUMBERS, "whether {v} is below {k}", "{v} < {k}", ("{v} > {k}", "{v} <= {k}")),
    _Kind(NUMBERS, "whether {v} is at least {k}", "{v} >= {k}", ("{v} > {k}", "{v} <= {k}")),
    _Kind(NUMBERS, "whether {v} is at most {k}", "{v} <= {k}", ("{v} < {k}", "{v} >= {k}")),
    _Kind(SEQUENCES, "the first element of {v} plus {k}", "{v} [ 0 ] + {k}", ("{v} [ 1 ] + {k}", "{v} [ 0 ] + {j}")),
    _Kind(SEQUENCES, "the last element of {v} plus {k}", "{v} [ - 1 ] + {k}", ("{v} [ 0 ] + {k}", "{v} [ - 1 ] * {k}")),
    _Kind(SEQUENCES, "the largest of {v} times {k}", "max ( {v} ) * {k}", ("min ( {v} ) * {k}", "max ( {v} ) + {k}")),
    _Kind(SEQUENCES, "the smallest of {v} minus {k}", "min ( {v} ) - {k}", ("max ( {v} ) - {k}", "min ( {v} ) - {j}")),
    _Kind(SEQUENCES, "the sum of {v} plus {k}", "sum ( {v} ) + {k}", ("len ( {v} ) + {k}", "sum ( {v} ) - {k}")),
    _Kind(SEQUENCES, "the length of {v} times {k}", "len ( {v} ) * {k}", ("sum ( {v} ) * {k}", "len ( {v} ) * {j}")),
)


def _draw(rng: np.random.Generator) -> Task:
    number = int(rng.integers(len(_KINDS)))
    kind, k, function = _KINDS[number], int(rng.integers(2, 20)), pick(rng, FUNCTIONS)
    argument = pick(rng, kind.arguments)
    description = kind.description.format(v=argument, k=k)
    prompt = pick(rng, _REQUESTS).format(f=function, v=argument, d=description)
    return Task("code", prompt, (number, function, argument, k))


def _write(task: Task, expression: str) -> str:
    _, function, argument, k = task.facts
    assert isinstance(k, int)
    return f"def {function} ( {argument} ) : return {expression.format(v=argument, k=k, j=k + 1)}"


def _kind(task: Task) -> _Kind:
    number = task.facts[0]
    assert isinstance(number, int)
    return _KINDS[number]


def _right(task: Task, rng: np.random.Generator) -> str:
    return _write(task, _kind(task).right)


def _wrong(task: Task, rng: np.random.Generator) -> str:
    return _write(task, pick(rng, _kind(task).wrong))


def _check(task: Task, response: str) -> bool:
    """Return True if the function has the right name and argument and agrees with the right one on all cases."""
    cases = _CASES[_kind(task).arguments]
    wanted = _run(task, _write(task, _kind(task).right), cases)
    return _run(task, response, cases) == wanted


def _run(task: Task, source: str, cases: tuple[object, ...]) -> list[object] | None:
    """Results on the cases; None where the source is not such a function or fails."""
    _, function, argument, _ = task.facts
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None
    if not _harmless(tree, str(function), str(argument)):
        return None
    scope: dict[str, object] = {"__builtins__": dict(_BUILTINS)}
    try:
        exec(compile(tree, "<response>", "exec"), scope)  # a function definition of allowed nodes only
        return [scope[str(function)](case) for case in cases]  # type: ignore[operator]
    except (ArithmeticError, TypeError, LookupError, ValueError, NameError, AttributeError):
        return None


def _harmless(tree: ast.Module, function: str, argument: str) -> bool:
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        return False
    definition = tree.body[0]
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return (
        definition.name == function
        and [arg.arg for arg in definition.args.args] == [argument]
        and len(list(ast.walk(definition.args))) == 2
        and not definition.decorator_list
        and len(definition.body) == 1
        and isinstance(definition.body[0], ast.Return)
        and all(isinstance(node, _ALLOWED) for node in ast.walk(tree))
        and names <= {argument, *_BUILTINS}
        and all(isinstance(value, int) for value in constants)
        and sum(1 for _ in ast.walk(tree)) < 40
    )


CODE = Family("code", _draw, _right, _wrong, _check)
