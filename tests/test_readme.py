"""The README stays short enough to be read, and what it says to type and to follow is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIGURE, VIEWER = "nbs/tutorials/first_masks.jpg", "nbs/app/viewer.png"


def test_short():
    assert len(README.splitlines()) <= 120
    assert len(README.split()) <= 1000


def test_one_figure_and_the_viewer():
    assert re.findall(r"!\[[^]]*\]\(([^)]+)\)", README) == [FIGURE, VIEWER]
    assert (ROOT / FIGURE).stat().st_size < 300_000


def test_the_marked_command_runs_the_tests():
    "`.ci/run` runs the line after the marker."
    (block,) = re.findall(r"^<!-- test -->\n```bash\n(.*?)\n```$", README, re.M | re.S)
    assert "\n" not in block and block.endswith("pytest -n 2 --dist loadgroup")


def test_links_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert len(targets) > 15
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_a_stranger_can_type_all_of_it():
    assert "../" not in README


def test_every_system_is_in_the_table():
    from ovss_nb.systems.registry import SYSTEMS

    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", README, re.M)
    assert set(re.findall(r"\w+", " ".join(rows))) == set(SYSTEMS)
