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

from docments import field_remarks, parameter_remarks  # noqa: E402
from layout import MEANING, chapter, chapters, draw  # noqa: E402

log = logging.getLogger("mkdocs.hooks.ovss_nb")  # below `mkdocs`, so that --strict counts its warnings
styles, targets = {}, set()  # style sheets that notebooks share; pages and files of the site
GUIDE = ("install", "cli", "results", "speed")
ABOUT_SYSTEMS = ["site/pages/notation.md", "site/pages/provenance.md"]
WITH_EQUATIONS = tuple(
    f"site/pages/{part}" for part in ("systems/", "training_free/", "notation", "provenance")
)
SYSTEMS = (
    "maskclip",
    "simseg",
    "llm_supervised",
    "pnp_ovss",
    "filtered",
    "catseg",
    "lmseg",
    "san",
    "ebseg",
    "mrovseg",
)
TRAINING_FREE = ("index", "clearclip", "sclip", "naclip", "scclip", "proxyclip", "corrclip", "others")


# ---- order of the pages


def titled(config, folder):
    "The notebooks of a folder as entries of the navigation."
    notebooks = Path(config.docs_dir)
    paths = sorted((notebooks / folder).glob("*.ipynb"))
    return [{chapter(path)[0]: path.relative_to(notebooks).as_posix()} for path in paths]


def on_config(config):
    of_folders = chapters(config.docs_dir)
    library = [
        {folder: [{module: f"api/{module}.md"} for *_, module in entries]}
        for folder, entries in of_folders.items()
    ]
    config.nav = [
        {"Home": "index.md"},
        {"Guide": [f"site/pages/{page}.md" for page in GUIDE]},
        {"Tutorials": titled(config, "tutorials")},
        {
            "Systems": [f"site/pages/systems/{system}.md" for system in SYSTEMS]
            + [{"Training-free": [f"site/pages/training_free/{page}.md" for page in TRAINING_FREE]}]
            + ABOUT_SYSTEMS
        },
        {"Chapters": [{folder: titled(config, folder)} for folder in of_folders]},
        {"Experiments": titled(config, "experiments")},
        {"Library": library},
        {"Contributing": "site/pages/contributing.md"},
    ]
    return config


def on_files(files, config):
    of_folders = chapters(config.docs_dir)
    index = (SITE / "pages" / "index.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=index))
    for folder, entries in of_folders.items():
        for path, title, _, module in entries:
            notebook = path.relative_to(config.docs_dir).as_posix()
            content = (
                f"# ovss_nb.{module}\n\nFolder {folder}: {MEANING[folder]}. "
                f"Developed in [{title}](../{notebook}).\n\n::: ovss_nb.{module}\n"
            )
            files.append(File.generated(config, f"api/{module}.md", content=content))
    if draw(of_folders) != (SITE / "layout.svg").read_text(encoding="utf-8"):
        log.warning("nbs/site/layout.svg is not the layout as it is: run python nbs/site/layout.py")
    targets.clear()
    targets.update(file.src_uri for file in files)
    return files


# ---- options


@lru_cache(None)
def written_fields(cls):
    "{field: (type, comment)} as one class writes them down."
    source = inspect.getsource(cls)
    return field_remarks(source, ast.parse(source).body[0])


@lru_cache(None)
def written_remarks(component):
    "{name: comment} of the fields of a class and the parameters of a function or of a class's methods."
    source = inspect.getsource(component)
    said = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            said = parameter_remarks(source, node) | said
        elif isinstance(node, ast.ClassDef):
            said = {name: text for name, (_, text) in field_remarks(source, node).items() if text} | said
    return said


def component_named(name):
    "A class or function of the library, from whichever loaded module has it; or None."
    for key, module in list(sys.modules.items()):
        if key.startswith("ovss_nb.") and hasattr(module, name):
            return getattr(module, name)
    return None


def meaning(cls, name, components):
    """The comment at an option.

    Without one, what a class that it overrides says, or a component that a comment above it names.
    """
    for base in cls.__mro__:
        if dataclasses.is_dataclass(base) and written_fields(base).get(name, ("", ""))[1]:
            return written_fields(base)[name][1]
    for component in components:
        named = component_named(component)
        said = written_remarks(named) if named else {}
        for known in (name, name.partition("_")[2]):
            if known in said:
                return said[known]
    return f"see `{components[0]}`" if components else "see the chapter"


def options(where):
    "A Markdown table of a configuration, read from the class: `module:Class`."
    module, _, name = where.partition(":")
    cls = getattr(import_module(module), name)
    groups, components = {}, []
    for field in dataclasses.fields(cls):
        bases = (base for base in cls.__mro__ if dataclasses.is_dataclass(base))
        owner = next(base for base in bases if field.name in written_fields(base))
        kind, comment = written_fields(owner)[field.name]
        if "see `" in comment:
            components = re.findall(r"`([A-Z]\w+)`", comment)
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        cells = [f"<code>{html.escape(word)}</code>" for word in (field.name, repr(default), kind)]
        cells.append(meaning(cls, field.name, components))
        row = " | ".join(cell.replace("|", "&#124;") for cell in cells)
        groups.setdefault(owner, []).append(f"| {row} |")
    system = where.split(".")[-1].split(":")[0]
    called = repr(system) if system in SYSTEMS else "NAME"  # one class, several names
    parts = [f"`create({called}, ...)` takes {len(dataclasses.fields(cls))} options, as `{name}` has them."]
    for owner in sorted(groups, key=cls.__mro__.index):
        title = "Its own" if owner is cls else f"From `{owner.__name__}`"
        rows = "\n".join(groups[owner])
        parts.append(f"{title}:\n\n| option | default | type | |\n| --- | --- | --- | --- |\n{rows}")
    return "\n\n".join(parts)


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
    text = re.sub(r"\$\$(.+?)\$\$", lambda tex: f"\n\n{drawn(plain(tex[1]))}\n\n", text, flags=re.S)
    within_a_line = r"(?<![\\$\w])\$(?=[^\s$])([^$\n]*?[^\s$\\])\$(?![\w$])"
    return re.sub(within_a_line, lambda tex: convert(plain(tex[1])), text)


def on_page_markdown(markdown, page, config, files):
    source = page.file.src_uri
    if not source.startswith(("site/pages/", "index")):
        return markdown
    markdown = re.sub(r"<!-- options: (\S+) -->", lambda match: options(match[1]), markdown)
    if "<!-- options" in markdown:
        log.warning("%s has a table of options that cannot be read", source)
    return equations(markdown) if source.startswith(WITH_EQUATIONS) else markdown


# ---- notebooks

MATHJAX = r"<!-- Load mathjax -->.*?<!-- End of mathjax configuration -->"  # equations are MathML here
MERMAID = (
    r"<script(?:(?!</script>).)*?mermaid(?:(?!</script>).)*</script>"  # loaded from elsewhere, never needed
)
PROSE = r'(<div class="jp-RenderedHTMLCommon jp-RenderedMarkdown[^>]*>)(.*?)(</div>)'
LINK = r'(<a[^>]* href=")([^"#:]*)(#[^"]*)?(")'


def on_page_content(content, page, config, files):
    if not page.file.src_uri.endswith(".ipynb"):
        return content

    def shared(style):
        "A long style sheet, which all notebooks carry, becomes one file."
        if len(style[1]) <= 2000:
            return style[0]
        name = "notebook-" + hashlib.sha256(style[0].encode()).hexdigest()[:12] + ".css"
        styles[name] = style[1]
        href = posixpath.relpath("assets/" + name, posixpath.dirname(page.url) or ".")
        return f'<link rel="stylesheet" href="{href}">'

    content = re.sub(MATHJAX, "", content, flags=re.S)
    content = re.sub(MERMAID, "", content, flags=re.S)
    content = re.sub(r"<style[^>]*>(.*?)</style>", shared, content, flags=re.S)
    content = re.sub(PROSE, lambda cell: cell[1] + math(cell[2]) + cell[3], content, flags=re.S)
    return re.sub(LINK, lambda a: a[1] + linked(a[2], page) + (a[3] or "") + a[4], content)


def math(text):
    "The equations of a rendered cell, but not what looks like one in its code."
    parts = re.split(r"(<(?:code|pre)\b.*?</(?:code|pre)>)", text, flags=re.S)
    parts[::2] = [equations(prose, without_html) for prose in parts[::2]]
    return "".join(parts)


def without_html(text):
    return html.unescape(re.sub(r"<[^>]+>", "", text))


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
