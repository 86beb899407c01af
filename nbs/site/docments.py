"""Comments beside parameters, which nbdev calls docments, and methods that `patch` adds to a class, for
mkdocstrings.
"""

import ast

import griffe


def comment(line, end):
    "What a comment says that follows on the same line."
    rest = line[end:].lstrip(" ,):=")
    return rest.lstrip("# ").strip() if rest.startswith("#") else ""


class Docments(griffe.Extension):
    def on_function_instance(self, *, node, func, **kw):
        if not isinstance(node, ast.FunctionDef):
            return
        lines = func.filepath.read_text(encoding="utf-8").splitlines()
        arguments = [
            *node.args.posonlyargs,
            *node.args.args,
            *node.args.kwonlyargs,
            *(o for o in (node.args.vararg, node.args.kwarg) if o),
        ]
        defaults = {}
        for args, values in (
            (node.args.posonlyargs + node.args.args, node.args.defaults),
            (node.args.kwonlyargs, node.args.kw_defaults),
        ):
            for o, value in zip(args[len(args) - len(values) :], values):
                if value is not None:
                    defaults[o.arg] = value
        on_line = {}
        for o in arguments:
            on_line.setdefault((defaults.get(o.arg) or o).end_lineno, []).append(o)
        told = {}
        for number, there in on_line.items():
            if number == node.lineno:
                continue  # a comment on the first line is about what is returned
            said = (
                lines[number - 1].partition("#")[2].strip()
                if "#" in lines[number - 1][(defaults.get(there[-1].arg) or there[-1]).end_col_offset :]
                else ""
            )
            for o in there:
                if said:
                    told[o.arg] = said
        last = max([node.lineno, *on_line]) if node.returns is None else node.returns.end_lineno
        returned = comment(lines[last - 1], node.returns.end_col_offset) if node.returns is not None else ""
        text = func.docstring.value if func.docstring else ""
        if told:
            text += "\n\nArgs:\n" + "\n".join(f"    {name}: {said}" for name, said in told.items())
        if returned:
            text += f"\n\nReturns:\n    {returned}"
        if func.docstring:
            func.docstring.value = text
        elif text:
            func.docstring = griffe.Docstring(
                text, parent=func, lineno=func.lineno, parser="google", parser_options=dict(warnings=False)
            )

    def on_attribute_instance(self, *, node, attr, **kw):
        if not isinstance(node, ast.AnnAssign) or attr.docstring or not attr.parent.is_class:
            return
        said = comment(
            attr.filepath.read_text(encoding="utf-8").splitlines()[node.end_lineno - 1], node.end_col_offset
        )
        if said:
            attr.docstring = griffe.Docstring(
                said, parent=attr, lineno=attr.lineno, parser="google", parser_options=dict(warnings=False)
            )

    def on_module_members(self, *, node, mod, **kw):
        "Move what `patch` adds into its class."
        for o in node.body if isinstance(node, ast.Module) else ():
            if not isinstance(o, ast.FunctionDef) or not any(
                ast.unparse(d).startswith("patch") for d in o.decorator_list
            ):
                continue
            owner = o.args.args and o.args.args[0].annotation
            owner = mod.members.get(ast.unparse(owner)) if owner is not None else None
            function = mod.members.get(o.name)
            if owner is None or function is None or not owner.is_class:
                continue
            mod.del_member(o.name)
            owner.set_member(o.name, function)
