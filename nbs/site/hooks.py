"""What MkDocs cannot know by itself:

the order of the notebooks, the options of the systems, equations without a script, one page for each module.
"""

import ast
import dataclasses
import hashlib
import html
import inspect
import logging
import posixpath
import re
import sys
from functools import lru_cache
from importlib import import_module
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

SITE = Path(__file__).resolve().parent
ROOT = SITE.parents[1]
sys.path[:0] = [str(SITE), str(ROOT)]

from layout import MEANING, chapter, chapters, draw  # noqa: E402

log = logging.getLogger("mkdocs.hooks.ovss_nb")  # below `mkdocs`, so that --strict counts its warnings
styles, targets = {}, set()  # style sheets that notebooks share; pages and files of the site
SYSTEMS = ("maskclip", "simseg", "llm_supervised", "pnp_ovss", "catseg", "lmseg", "san", "ebseg", "mrovseg")


# ---- order of the pages


def on_config(config):
    notebooks = Path(config.docs_dir)

    def listed(folder):
        return [
            {chapter(o)[0]: o.relative_to(notebooks).as_posix()}
            for o in sorted((notebooks / folder).glob("*.ipynb"))
        ]

    found = chapters(notebooks)
    folders = [
        {folder: [{title: path.relative_to(notebooks).as_posix()} for path, title, *_ in of_folder]}
        for folder, of_folder in found.items()
    ]
    library = [{module: f"api/{module}.md"} for of_folder in found.values() for *_, module in of_folder]
    config.nav = [
        {"Home": "index.md"},
        {"Tutorials": listed("tutorials")},
        {"Systems": [f"site/pages/systems/{o}.md" for o in SYSTEMS]},
        {"Chapters": folders},
        {"Experiments": listed("experiments")},
        {"Library": library},
        {"Contributing": "site/pages/contributing.md"},
    ]
    return config


def on_files(files, config):
    found = chapters(config.docs_dir)
    files.append(
        File.generated(config, "index.md", content=(SITE / "pages" / "index.md").read_text(encoding="utf-8"))
    )
    for folder, of_folder in found.items():
        for path, title, _, module in of_folder:
            notebook = path.relative_to(config.docs_dir).as_posix()
            content = (
                f"# ovss_nb.{module}\n\nFolder {folder}: {MEANING[folder]}. "
                f"Developed in [{title}](../{notebook}).\n\n::: ovss_nb.{module}\n"
            )
            files.append(File.generated(config, f"api/{module}.md", content=content))
    if draw(found) != (SITE / "layout.svg").read_text(encoding="utf-8"):
        log.warning("nbs/site/layout.svg is not the layout as it is: run python nbs/site/layout.py")
    targets.clear()
    targets.update(o.src_uri for o in files)
    return files


# ---- options


@lru_cache(None)
def comments(cls):
    "{field: (type, comment)} as one class writes them down."
    lines, found = inspect.getsource(cls).splitlines(), {}
    for node in ast.parse("\n".join(lines)).body[0].body:
        if isinstance(node, ast.AnnAssign):
            found[node.target.id] = (
                ast.unparse(node.annotation),
                lines[node.end_lineno - 1][node.end_col_offset :].strip().lstrip("# "),
            )
    return found


def meaning(cls, name, components):
    """The comment beside a option;

    without one, what a class that it overrides says, or a component that a comment above it names.
    """
    for base in cls.__mro__:
        if dataclasses.is_dataclass(base) and comments(base).get(name, ("", ""))[1]:
            return comments(base)[name][1]
    for component in components:
        found = next(
            (
                getattr(o, component)
                for key, o in list(sys.modules.items())
                if key.startswith("ovss_nb.") and hasattr(o, component)
            ),
            None,
        )
        for known in (name, name.partition("_")[2]):
            said = (
                found
                and known
                and re.search(rf"^\s+{known}\s*[:=].*?#\s*(.+)$", inspect.getsource(found), re.M)
            )
            if said:
                return said[1]
    return f"see `{components[0]}`" if components else "see the chapter"


def options(where):
    "A Markdown table of a configuration, read from the class: `module:Class`."
    module, _, name = where.partition(":")
    cls = getattr(import_module(module), name)
    groups, see = {}, []
    for o in dataclasses.fields(cls):
        owner = next(
            base for base in cls.__mro__ if dataclasses.is_dataclass(base) and o.name in comments(base)
        )
        kind, comment = comments(owner)[o.name]
        if "see `" in comment:
            see = re.findall(r"`([A-Z]\w+)`", comment)
        default = o.default if o.default is not dataclasses.MISSING else o.default_factory()
        cells = (
            *(f"<code>{html.escape(word)}</code>" for word in (o.name, repr(default), kind)),
            meaning(cls, o.name, see),
        )
        groups.setdefault(owner, []).append(
            "| " + " | ".join(cell.replace("|", "&#124;") for cell in cells) + " |"
        )
    tables = [
        f"{'Its own' if owner is cls else f'From `{owner.__name__}`'}:\n\n| option | default | type | |\n| ---"
        " | --- | --- | --- |\n" + "\n".join(rows)
        for owner, rows in sorted(groups.items(), key=lambda o: cls.__mro__.index(o[0]))
    ]
    return (
        f"`create({where.split('.')[-1].split(':')[0]!r}, ...)` takes {len(dataclasses.fields(cls))} options,"
        f" as `{name}` has them.\n\n" + "\n\n".join(tables)
    )


# ---- equations


def drawn(tex):
    "A displayed equation; `\\tag{...}` becomes its number."
    tag, tex = re.search(r"\\tag\{([^}]*)\}", tex), re.sub(r"\\tag\{[^}]*\}", "", tex).strip()
    return (
        f'<div class="equation">{convert(tex, display="block")}'
        + (f"<span>({tag[1]})</span>" if tag else "")
        + "</div>"
    )


def equations(text, plain=str):
    "TeX between dollar signs as MathML, which browsers draw themselves. `plain` takes the HTML out of it."
    text = re.sub(r"\$\$(.+?)\$\$", lambda o: f"\n\n{drawn(plain(o[1]))}\n\n", text, flags=re.S)
    return re.sub(
        r"(?<![\\$\w])\$(?=[^\s$])([^$\n]*?[^\s$\\])\$(?![\w$])", lambda o: convert(plain(o[1])), text
    )


def on_page_markdown(markdown, page, config, files):
    if not page.file.src_uri.startswith(("site/pages/", "index")):
        return markdown
    markdown = re.sub(r"<!-- options: (\S+) -->", lambda o: options(o[1]), markdown)
    if "<!-- options" in markdown:
        log.warning("%s has a table of options that cannot be read", page.file.src_uri)
    return equations(markdown) if page.file.src_uri.startswith("site/pages/systems/") else markdown


# ---- notebooks


def on_page_content(content, page, config, files):
    if not page.file.src_uri.endswith(".ipynb"):
        return content
    # equations are MathML here
    content = re.sub(
        r"<!-- Load mathjax -->.*?<!-- End of mathjax configuration -->", "", content, flags=re.S
    )
    # a script from elsewhere, and there are no such diagrams
    content = re.sub(
        r"<script(?:(?!</script>).)*?mermaid(?:(?!</script>).)*</script>", "", content, flags=re.S
    )

    def shared(found):
        name = "notebook-" + hashlib.sha256(found[0].encode()).hexdigest()[:12] + ".css"
        styles[name] = found[1]
        return (
            '<link rel="stylesheet"'
            f' href="{posixpath.relpath("assets/" + name, posixpath.dirname(page.url) or ".")}">'
        )

    content = re.sub(
        r"<style[^>]*>(.*?)</style>", lambda o: shared(o) if len(o[1]) > 2000 else o[0], content, flags=re.S
    )

    content = re.sub(
        r'(<div class="jp-RenderedHTMLCommon jp-RenderedMarkdown[^>]*>)(.*?)(</div>)',
        lambda o: o[1] + math(o[2]) + o[3],
        content,
        flags=re.S,
    )
    return re.sub(
        r'(<a[^>]* href=")([^"#:]*)(#[^"]*)?(")',
        lambda o: o[1] + linked(o[2], page) + (o[3] or "") + o[4],
        content,
    )


def math(text):
    "The equations of a rendered cell, but not what looks like one in its code."
    parts = re.split(r"(<(?:code|pre)\b.*?</(?:code|pre)>)", text, flags=re.S)
    parts[::2] = [equations(o, lambda tex: html.unescape(re.sub(r"<[^>]+>", "", tex))) for o in parts[::2]]
    return "".join(parts)


def linked(href, page):
    "A link between sources as one between pages; one that leads nowhere is a warning."
    if not href:
        return href
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), href))
    if target not in targets:
        log.warning("%s links to %s, which is not part of the site", page.file.src_uri, href)
    return re.sub(r"\.(ipynb|md)$", ".html", href)


def on_post_build(config):
    for name, text in styles.items():
        path = Path(config.site_dir) / "assets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
