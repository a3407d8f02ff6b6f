"""Finding a place in a Python file by its syntax, whatever its line numbers, spacing and quotes are.

An anchor is a function from a syntax tree to all nodes that fit a description; `edits.py` wants exactly one. The
descriptions name only what upstream cannot change without changing what the edit is about.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from typing import Union

Found = list[ast.AST]
Finder = Callable[[ast.Module], Found]
Function = Union[ast.FunctionDef, ast.AsyncFunctionDef]  # noqa: UP007  evaluated when this is imported


def imports(*, module: str, name: str) -> Finder:
    """`from <module> import <name>` at the top level; of a relative import the dots do not count."""

    def find(tree: ast.Module) -> Found:
        return [
            node
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            and node.module == module
            and name in {alias.name for alias in node.names}
        ]

    return find


def class_with_base(*, name: str, base: str) -> Finder:
    """A class of that name at the top level whose only base is `base`; the node is that base."""

    def find(tree: ast.Module) -> Found:
        return [
            node.bases[0]
            for node in tree.body
            if isinstance(node, ast.ClassDef) and node.name == name and [ast.unparse(b) for b in node.bases] == [base]
        ]

    return find


def method(*, cls: str, name: str) -> Finder:
    """A method of a class at the top level."""

    def find(tree: ast.Module) -> Found:
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls]
        return [node for found in classes for node in found.body if _is_function(node, name)]

    return find


def first_statement(*, function: str, arguments: tuple[str, ...]) -> Finder:
    """The first statement of a function at the top level that has these leading arguments."""

    def find(tree: ast.Module) -> Found:
        found: Found = []
        for node in _functions(tree, function):
            names = tuple(argument.arg for argument in node.args.args)
            if names[: len(arguments)] == arguments:
                start = 1 if ast.get_docstring(node) is not None and len(node.body) > 1 else 0
                found.append(node.body[start])
        return found

    return find


def assignment(*, function: str, target: str, call: str) -> Finder:
    """`<target> = <call>(...)` anywhere in a function; `target` with several names is written `a, b`."""

    def find(tree: ast.Module) -> Found:
        return [
            node
            for outer in _functions(tree, function)
            for node in ast.walk(outer)
            if isinstance(node, ast.Assign)
            and [ast.unparse(t).strip("()") for t in node.targets] == [target]
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.value.func) == call
        ]

    return find


def statement(*, function: str, call: str) -> Finder:
    """A call `<call>(...)` that is a statement by itself, anywhere in a function."""

    def find(tree: ast.Module) -> Found:
        return [
            node
            for outer in _functions(tree, function)
            for node in ast.walk(outer)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == call
        ]

    return find


def branch_that_assigns(*, function: str, test: str, target: str) -> Finder:
    """`if <test>:` anywhere in a function, with an assignment to `target` directly in its body."""

    def find(tree: ast.Module) -> Found:
        return [
            node
            for outer in _functions(tree, function)
            for node in ast.walk(outer)
            if isinstance(node, ast.If)
            and ast.unparse(node.test) == test
            and any(isinstance(inner, ast.Assign) and ast.unparse(inner.targets[0]) == target for inner in node.body)
        ]

    return find


def branch(*, function: str, word: str, given: str) -> Finder:
    """`if '<word>' in ... and <given> is not None:` anywhere in a function, its two halves in any order."""

    def find(tree: ast.Module) -> Found:
        return [
            node
            for outer in _functions(tree, function)
            for node in ast.walk(outer)
            if isinstance(node, ast.If) and _asks_for(node.test, word, given)
        ]

    return find


def _asks_for(test: ast.expr, word: str, given: str) -> bool:
    if not (isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) and len(test.values) == 2):
        return False
    halves = [half for half in test.values if isinstance(half, ast.Compare) and len(half.ops) == 1]
    has_word = [
        half
        for half in halves
        if isinstance(half.ops[0], ast.In) and isinstance(half.left, ast.Constant) and half.left.value == word
    ]
    is_given = [half for half in halves if ast.unparse(half) == f"{given} is not None"]
    return len(has_word) == len(is_given) == 1


def _functions(tree: ast.Module, name: str) -> Iterator[Function]:
    return (node for node in tree.body if _is_function(node, name))  # type: ignore[misc]


def _is_function(node: ast.AST, name: str) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name
