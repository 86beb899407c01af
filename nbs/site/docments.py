"""Comments at parameters and fields, which nbdev calls docments, for mkdocstrings and the tables of options.

A comment stands behind what it explains, or on lines of its own above it.
"""

import ast
import io
import tokenize
from functools import lru_cache
from pathlib import Path

import griffe


@lru_cache(None)
def comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    "{line: comment} of those behind code and of those on lines of their own."
    behind, alone = {}, {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            kind = behind if token.line[: token.start[1]].strip() else alone
            kind[token.start[0]] = token.string.lstrip("# ").strip()
    return behind, alone


def remark(source: str, first: int, last: int) -> str:
    "What is said about the code from line `first` to line `last`."
    behind, alone = comments(source)
    if last in behind:
        return behind[last]
    lines = []
    while first - 1 in alone:
        first -= 1
        lines.insert(0, alone[first])
    return " ".join(lines)


def parameters(function: ast.FunctionDef) -> dict[str, tuple[int, int]]:
    "{name: first and last line} of a function's parameters, their defaults included."
    positional = [*function.args.posonlyargs, *function.args.args]
    defaults = [None] * (len(positional) - len(function.args.defaults)) + function.args.defaults
    pairs = [*zip(positional, defaults), *zip(function.args.kwonlyargs, function.args.kw_defaults)]
    pairs += [(argument, None) for argument in (function.args.vararg, function.args.kwarg) if argument]
    return {argument.arg: (argument.lineno, (default or argument).end_lineno) for argument, default in pairs}


def parameter_remarks(source: str, function: ast.FunctionDef) -> dict[str, str]:
    "{name: remark} of the parameters that have one. What stands on the line of `def` is about the result."
    spans = parameters(function)
    said = {name: remark(source, *lines) for name, lines in spans.items() if lines[1] != function.lineno}
    return {name: text for name, text in said.items() if text}


def result_remark(source: str, function: ast.FunctionDef) -> str:
    "What is said about what a function returns: at its `-> type`."
    if function.returns is None:
        return ""
    behind, alone = comments(source)
    last = function.returns.end_lineno
    ends = [end for _, end in parameters(function).values()]
    if last in behind and (last not in ends or last == function.lineno):
        return behind[last]
    return remark(source, function.returns.lineno, last) if last - 1 in alone else ""


def field_remarks(source: str, cls: ast.ClassDef) -> dict[str, tuple[str, str]]:
    "{name: (annotation, remark)} of the annotated fields of a class."
    return {
        node.target.id: (ast.unparse(node.annotation), remark(source, node.lineno, node.end_lineno))
        for node in cls.body
        if isinstance(node, ast.AnnAssign)
    }


@lru_cache(None)
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def docstring(text: str, owner: griffe.Object) -> griffe.Docstring:
    options = {"warnings": False}
    return griffe.Docstring(text, parent=owner, lineno=owner.lineno, parser="google", parser_options=options)


class Docments(griffe.Extension):
    "Adds the remarks to docstrings, as mkdocstrings reads them."

    def on_function_instance(self, *, node, func, **kw):
        if not isinstance(node, ast.FunctionDef):
            return
        source = text_of(func.filepath)
        text = func.docstring.value if func.docstring else ""
        if said := parameter_remarks(source, node):
            text += "\n\nArgs:\n" + "\n".join(f"    {name}: {remark}" for name, remark in said.items())
        if returned := result_remark(source, node):
            text += f"\n\nReturns:\n    {returned}"
        if func.docstring:
            func.docstring.value = text
        elif text:
            func.docstring = docstring(text, func)

    def on_attribute_instance(self, *, node, attr, **kw):
        if not isinstance(node, ast.AnnAssign) or attr.docstring or not attr.parent.is_class:
            return
        if said := remark(text_of(attr.filepath), node.lineno, node.end_lineno):
            attr.docstring = docstring(said, attr)
