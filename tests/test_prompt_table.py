"""The table of prompts:
what a browser would send arrives in the bank, nothing is lost or overwritten, and foreign text stays text.
"""

import subprocess
import sys

import pytest

from ovss_nb.app.prompt_table import PromptTable, bank_html
from ovss_nb.text.prompt_bank import PromptBank
from ovss_nb.text.prompt_checks import ATTRIBUTES, PromptError
from ovss_nb.core.vocabulary import Vocabulary, load_vocabulary

widgets = pytest.importorskip("ipywidgets", reason="needs the extra `jupyter`")


def type_in(widget, text):
    "What the browser's message does when a field is left."
    widget.set_state({"value": text})


def press(button):
    button._handle_custom_msg({"event": "click"}, [])


def test_typing_reaches_the_bank_and_undo_the_page(tmp_path):
    table = PromptTable("Cityscapes-19", rows=4)
    form, before = table.form, dict(table.bank.classes)
    type_in(form.search, "bus")
    name, field = form.shown[0], form.slots[0].fields["texture_material"]
    assert "bus" in name or "bus" in " ".join(table.texts(name).values()).lower()
    old = field.value
    type_in(field, f"  {old.rstrip('.')},\n with <rust>. ")
    assert (
        table.bank[name]["texture_material"] == f"{old.rstrip('.')}, with <rust>." and form.shown[0] == name
    )
    press(form.slots[0].undo)
    assert field.value == old and table.bank.classes == before
    type_in(form.file, str(tmp_path / "city.json"))
    press(form.keep)
    assert (
        PromptBank.open(tmp_path / "city.json").texts()
        == PromptBank.open("Cityscapes-19", "descriptions").texts()
    )


def test_pages_cover_every_class_once():
    table = PromptTable("ADE-847", kind="subclasses", rows=10)
    form, seen = table.form, []
    while True:
        seen += form.shown
        if form.forward.disabled:
            break
        press(form.forward)
    assert seen == list(load_vocabulary("ADE-847").names) and len(form.slots) == 10
    press(form.forward)  # beyond the last page nothing turns
    assert form.shown == seen[-7:] and form.position.value.startswith("841 to 847 of 847")
    press(form.back)
    assert form.shown == seen[-17:-7]
    type_in(form.search, "no such text")
    assert (
        form.shown == []
        and form.position.value.startswith("nothing found")
        and form.forward.disabled
        and form.back.disabled
    )
    type_in(form.search, "")
    assert form.shown == seen[:10]


def test_a_mended_class_stays_under_the_hand():
    table = PromptTable("VOC-20")
    for name in ("cat", "dog"):
        table.edit(name, table.texts(name) | {"color": f"A {name} has fur."})
    form = table.form
    form.only.set_state({"value": True})
    assert form.shown == ["cat", "dog"]
    type_in(form.slots[0].fields["color"], "A cat is black.")
    assert (
        form.shown == ["cat", "dog"]
        and form.slots[0].problems.value == ""
        and "color names no color" in form.slots[1].problems.value
    )
    assert form.position.value.endswith("1 with problems")


def test_a_sentence_that_two_classes_share_is_marked_at_both_ends_of_an_edit():
    table = PromptTable("VOC-20")
    table.edit("dog", table.texts("dog") | {"color": table.texts("cat")["color"]})
    assert any("also the sentence of cat" in problem for problem in table.problems["dog"])
    table.edit("cat", table.texts("cat") | {"color": "A cat is black."})
    assert not any("also the sentence" in problem for problem in table.problems["dog"])


def test_foreign_text_stays_text():
    words, evil = Vocabulary.of({"<b>cat": ["<b>cat", "<img src=x>"]}), "<script>alert(1)</script>"
    bank = PromptBank.new(words, "descriptions", model=evil)
    bank.fill(words, {"<b>cat": {attribute: f"{attribute} {evil}" for attribute in ATTRIBUTES}})
    table = PromptTable(bank, words)
    shown = [
        table.show().data,
        bank_html(bank, problems=table.problems),
        table.form.slots[0].title.value,
        table.form.slots[0].problems.value,
    ]
    assert not any(tag in page for page in shown for tag in ("<script", "<img", "<b>cat"))
    assert "&lt;img src=x&gt;" in table.form.slots[0].title.value


def test_drafts_are_shown_and_never_saved(tmp_path):
    words = Vocabulary.of(["griffin", "cat"])
    bank = PromptBank.new(words, "descriptions")
    bank.borrow(words)
    table = PromptTable(bank, words)
    table.edit("griffin", {"color": "A griffin is gold."})
    assert table.problems["griffin"] == [
        f"{title} is empty" for title in ("shape, size", "texture, material", "summary")
    ]
    assert "A griffin is gold." in table.show(["griffin"]).data and "griffin" not in bank.classes
    with pytest.raises(
        PromptError, match="not saved: griffin, shape, size and texture, material and summary empty"
    ):
        table.save(tmp_path / "a.json")
    table.edit("griffin", {})
    assert table.problems == {"griffin": ["missing"]} and table.drafts == {}
    assert PromptBank.open(table.save(tmp_path / "a.json")).classes.keys() == {"cat"}
    table.edit("griffin", {attribute: f"A griffin is gold, {attribute}." for attribute in ATTRIBUTES})
    assert list(bank.classes) == ["griffin", "cat"] and table.problems == {}  # the vocabulary's order
    assert PromptBank.open(table.save()).settings["edited"] == ["griffin"]
    subclasses = PromptTable("VOC-20", kind="subclasses")
    subclasses.edit("cat", [])
    assert (
        subclasses.texts("cat") == []
        and subclasses.problems["cat"] == ["the list is empty"]
        and subclasses.bank["cat"]
    )


def test_saving_overwrites_no_other_bank(tmp_path):
    for name in ("one", "two"):
        PromptTable("VOC-20").save(tmp_path / f"{name}.json")
    table = PromptTable(tmp_path / "one.json")
    table.edit("cat", table.texts("cat") | {"color": "A cat is black."})
    with pytest.raises(PromptError, match="two.json exists and is another bank"):
        table.save(tmp_path / "two.json")
    type_in(table.form.file, str(tmp_path / "two.json"))
    press(table.form.keep)
    assert "another bank" in table.form.status.value
    type_in(table.form.file, str(tmp_path / "one.json" / "below.json"))  # a file is no folder
    press(table.form.keep)
    assert "color:#c62828" in table.form.status.value
    assert (
        table.save() == tmp_path / "one.json"
        and PromptBank.open(tmp_path / "one.json")["cat"]["color"] == "A cat is black."
    )


def test_what_cannot_be_shown_says_why(tmp_path):
    own = PromptBank.new(["cat", "dog"], "subclasses")
    for arguments, message in (
        ((own,), "pass its words as vocabulary="),
        ((own, ["cat", "horse"]), "other classes or words"),
        ((tmp_path / "none.json",), "cannot read the bank"),
        (("VOC-20", None, "poems"), "kind must be"),
    ):
        with pytest.raises(PromptError, match=message):
            PromptTable(*arguments)
    with pytest.raises(PromptError, match="rows must be at least 1"):
        PromptTable("VOC-20", rows=0)
    table = PromptTable("VOC-20")
    for act in (table.texts, table.undo, lambda name: table.edit(name, {}), lambda name: table.show([name])):
        with pytest.raises(PromptError, match="no class 'unicorn'"):
            act("unicorn")


def test_without_widgets_the_plain_table_is_left():
    code = (
        "import sys; sys.modules['ipywidgets'] = None\n"
        "from ovss_nb.app.prompt_table import PromptTable\n"
        "table = PromptTable('VOC-20')\n"
        "print(len(table.show(['cat']).data) > 400, 'torch' in sys.modules)\n"
        "try: table.form\n"
        "except ImportError as e: print(e)"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.startswith("True False\n") and "pip install 'ovss_nb[jupyter]'" in out
