"""The documentation site:
built by MkDocs without a network, strictly, with every page and link but few notebooks in full; those take a
second each.
"""

import ast
import dataclasses
import html
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SITE = ROOT / "nbs" / "site"
# one that is plain, one with equations, one with links and a picture
IN_FULL = ("03_maps.ipynb", "12_san.ipynb", "00_index.ipynb")


def pages_of(folder):
    "Names of the pages in a folder."
    return sorted(path.stem for path in (SITE / "pages" / folder).glob("*.md"))


def plain_page(convert):
    "Stands in for nbconvert: the prose of a notebook alone, so that its links and equations are still seen."
    import markdown

    def page(path, **options):
        if Path(path).name in IN_FULL:
            return convert(path, **options)
        prose = (
            "".join(cell["source"])
            for cell in json.loads(Path(path).read_text())["cells"]
            if cell["cell_type"] == "markdown"
        )
        return "".join(
            '<div class="jp-RenderedHTMLCommon'
            f' jp-RenderedMarkdown">{markdown.markdown(text, extensions=["tables", "fenced_code"])}</div>'
            for text in prose
        )

    return page


def no_network(*arguments, **options):
    raise AssertionError(f"the build asked for an address: {arguments}")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "Folder of the built site, and the warnings of the build."
    pytest.importorskip("material", reason="needs the extra docs")
    import logging
    import socket
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    import mkdocs_jupyter.convert
    import mkdocs_jupyter.plugin

    target = tmp_path_factory.mktemp("site")
    patch = pytest.MonkeyPatch()
    patch.setattr(mkdocs_jupyter.convert, "nb2html", plain_page(mkdocs_jupyter.convert.nb2html))
    patch.setattr(
        mkdocs_jupyter.plugin,
        "_get_nb_toc_tokens",
        lambda path, depth: (
            [],
            "".join(json.loads(Path(path).read_text())["cells"][0]["source"]).splitlines()[0].lstrip("# "),
        ),
    )
    patch.setattr(socket, "getaddrinfo", no_network)
    patch.setattr(socket.socket, "connect", no_network)
    warnings = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("mkdocs").addHandler(listener)
    before = sys.path[:]
    try:
        build(load_config(str(SITE / "mkdocs.yml"), site_dir=str(target), strict=True))
    except SystemExit:
        pass  # how MkDocs says that there were warnings
    except BaseException as e:
        if not warnings:
            raise
        warnings.append(repr(e))
    finally:
        logging.getLogger("mkdocs").removeHandler(listener)
        patch.undo()
        sys.path[:] = before
    return target, warnings


@pytest.fixture
def site(built):
    return built[0]


def text(path):
    return path.read_text(encoding="utf-8")


def test_built_strictly(built):
    assert not built[1], "\n".join(built[1])


def test_every_notebook_has_a_page(site):
    notebooks = [
        path.relative_to(ROOT / "nbs")
        for path in (ROOT / "nbs").rglob("*.ipynb")
        if ".ipynb_checkpoints" not in path.parts
    ]
    assert len(notebooks) > 60
    assert not [str(path) for path in notebooks if not (site / path).with_suffix(".html").is_file()]


def test_nothing_is_loaded_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    loaded = re.compile(
        r"<(?:script|img|iframe|source)[^>]*\bsrc=[\"']?(?:https?:)?//[^\"'"
        r" >]+|<link[^>]*\brel=[\"']?(?:stylesheet|preconnect|icon)[^>]*\bhref=[\"']?(?:https?:)?//[^\"' >]+"
    )
    assert len(pages) > 100
    found = {path.relative_to(site).as_posix(): loaded.findall(text(path)) for path in pages}
    assert not {path: addresses[:2] for path, addresses in found.items() if addresses}
    assert not [
        path.name
        for path in site.rglob("*.css")
        if re.search(r"@import[^;]*https?:|url\([\"']?(?:https?:)?//", text(path))
    ]


def test_links_lead_somewhere(site):
    broken = []
    for path in site.rglob("*.html"):
        for href in re.findall(r"<(?:a|img|link|script)\b[^>]*\b(?:href|src)=\"([^\"#?]+)", text(path)):
            if re.match(r"[a-z]+:|//|/", href) or path.name == "404.html":
                continue
            if not (path.parent / html.unescape(href)).exists():
                broken.append(f"{path.relative_to(site)}: {href}")
    assert not broken, broken[:10]


@pytest.mark.parametrize("system", pages_of("systems"))
def test_system_page_has_every_option(site, system):
    from ovss_nb.systems.registry import system_class

    page = html.unescape(text(site / "site" / "pages" / "systems" / f"{system}.html"))
    cell = r"<td><code>{}</code></td>\s*"
    for field in dataclasses.fields(system_class(system).config_class):
        start = cell.format(field.name) + cell.format(re.escape(repr(field.default)))
        row = re.search(start + r"<td><code>.+?</code></td>\s*<td>(.*?)</td>", page, re.S)
        assert row, field.name
        assert row[1].strip() and "see the chapter" not in row[1], f"{field.name} has no comment"
    assert "<math" in page and "$$" not in page and "Faithful, and ours" in page


def test_the_training_free_family_has_every_option(site):
    from ovss_nb.systems.training_free import TrainingFreeConfig

    page = html.unescape(text(site / "site" / "pages" / "training_free" / "index.html"))
    for field in dataclasses.fields(TrainingFreeConfig):
        row = re.search(rf"<td><code>{field.name}</code></td>(\s*<td>.*?</td>){{3}}", page, re.S)
        assert row and "see the chapter" not in row[0], field.name


def test_all_systems_have_a_page():
    from ovss_nb.systems.registry import SYSTEMS

    own = {path.stem for path in (SITE / "pages" / "systems").glob("*.md")}
    family = {path.stem for path in (SITE / "pages" / "training_free").glob("*.md")}
    others = re.findall(r"^## (.+)$", text(SITE / "pages" / "training_free" / "others.md"), re.M)
    assert own <= set(SYSTEMS) <= own | family | {re.sub(r"\W", "", name.lower()) for name in others}


@pytest.mark.parametrize("recipe", pages_of("training_free"))
def test_pages_of_the_training_free_family(site, recipe):
    page = html.unescape(text(site / "site" / "pages" / "training_free" / f"{recipe}.html"))
    prose = re.sub(r"<(code|script)\b.*?</\1>", "", page, flags=re.S)
    assert "<math" in prose and "$" not in prose
    assert "published" in prose and ("Faithful, and ours" in prose) == (recipe not in ("index", "others"))


def test_comments_at_parameters_are_shown(site):
    page = html.unescape(text(site / "api" / "systems.registry.html"))
    assert re.search(r"<code>resize</code>.{0,800}?how the image is seen, see", page, re.S)
    assert "Args:" not in page
    methods = html.unescape(text(site / "api" / "core.segmentation.html"))
    assert "of the colors over the photo, 0..1" in methods
    assert "ovss_nb.core.segmentation.Segmentation.overlay" in methods


EXAMPLE = """
def mix(
    clip,  # beside
    # above, on
    # two lines
    sam="#",
    *,
    plain=None,
    # above the result
) -> int:
    pass


def short(a, b=1) -> int:  # of a line
    pass


class Config:
    size: int = 4  # pixels
    # above the field
    name: str = "x"
    bare: bool = True
"""


def test_where_comments_may_stand(monkeypatch):
    monkeypatch.syspath_prepend(str(SITE))
    docments = pytest.importorskip("docments", reason="needs the extra docs")
    mix, short, config = ast.parse(EXAMPLE).body
    assert docments.parameter_remarks(EXAMPLE, mix) == {"clip": "beside", "sam": "above, on two lines"}
    assert docments.result_remark(EXAMPLE, mix) == "above the result"
    assert docments.parameter_remarks(EXAMPLE, short) == {}
    assert docments.result_remark(EXAMPLE, short) == "of a line"
    assert docments.field_remarks(EXAMPLE, config) == {
        "size": ("int", "pixels"),
        "name": ("str", "above the field"),
        "bare": ("bool", ""),
    }


def test_equations_of_a_notebook_are_drawn(site):
    page = text(site / "systems" / "12_san.html")
    assert (
        "<math" in page
        and "mathjax" not in page.casefold()
        and "mermaid.initialize" not in page
        and r"\mathrm{MLP}_q(q)\cdot" not in page
    )
