"""A language model behind a real local server that misbehaves on purpose:
nothing lost, nothing paid for twice.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("openai", reason="needs the extra `llm`")
from chat_server import FAULTS, ChatServer, completion, describe, reply
from ovss_nb.text.language_model import BudgetExceeded, LanguageModel, LanguageModelError, Question
from ovss_nb.text.prompt_bank import PromptBank
from ovss_nb.text.prompt_writer import (
    DESCRIPTION_SCHEMA,
    description_question,
    write_descriptions,
    write_subclasses,
)
from ovss_nb.core.vocabulary import load_vocabulary

TESTS = Path(__file__).parent
STUFF = load_vocabulary("COCO-Stuff-171")


def model(server, tmp_path, **kw):
    return LanguageModel(
        "test", server.url, **dict(timeout=30, backoff=0.01, journal=tmp_path / "journal.jsonl") | kw
    )


def question(text):
    return Question(
        [{"role": "user", "content": text}],
        {
            "type": "object",
            "properties": {"word": {"type": "string"}},
            "required": ["word"],
            "additionalProperties": False,
        },
    )


def echo(messages):
    return json.dumps({"word": messages[-1]["content"]})


def unnamed(text):
    return re.sub(r"A [\w -]+? (is|has) ", r"It \1 ", text)


def test_all_classes_of_coco_stuff_complete_with_30_percent_faults(tmp_path):
    with ChatServer(describe, faults=0.3, spoil=unnamed) as server:
        asker = model(server, tmp_path, timeout=server.delay - 1)
        bank = write_descriptions(asker, STUFF, progress=False)
        assert not bank.failed and list(bank.classes) == list(STUFF.names) and len(bank) == 171
        assert set(FAULTS) | {"rules"} == set(server.faults)  # each kind of fault came up
        assert sum(server.faults.values()) > 0.2 * asker.calls
        assert max(server.answered.values()) == 1  # no answer was paid for twice
        assert not bank.problems(STUFF)
        calls = sum(server.asked.values())
        again = write_descriptions(model(server, tmp_path), STUFF, progress=False)
        assert again.classes == bank.classes and sum(server.asked.values()) == calls


def test_subclasses_complete_as_plain_text(tmp_path):
    with ChatServer(describe, faults=0.3, spoil=lambda text: text.replace("old", "red")) as server:
        bank = write_subclasses(model(server, tmp_path, timeout=server.delay - 1), STUFF, progress=False)
        assert (
            not bank.failed
            and len(bank) == 171
            and all(len(kinds) == 10 for kinds in bank.texts(STUFF).values())
        )
        assert max(server.answered.values()) == 1


def test_kill_9_loses_no_answer_and_repeats_none(tmp_path):
    answers = 60
    program = (
        "import sys; from ovss_nb.text.language_model import LanguageModel; from ovss_nb.text.prompt_writer"
        " import write_descriptions; from ovss_nb.core.vocabulary import"
        " load_vocabulary\nwrite_descriptions(LanguageModel('test', sys.argv[1], timeout=20, backoff=0.01,"
        " journal=sys.argv[2]), load_vocabulary('COCO-Stuff-171'), guidance='Say what can be seen.',"
        " progress=False)"
    )
    with ChatServer(describe, hold=answers) as server:
        process = subprocess.Popen([sys.executable, "-c", program, server.url, tmp_path / "journal.jsonl"])
        journal, end = tmp_path / "journal.jsonl", time.monotonic() + 30
        # The server answers so many calls and leaves the rest hanging: all that was answered must be on disk
        # when the process dies.
        # Eight calls are under way then; one that came later would be answered to nobody, and counted.
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= answers and server.held == 8):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert sum(server.answered.values()) == answers
        server.hold = None
        server.release.set()
        # as a crash in the middle of writing leaves it
        with open(journal, "a") as file:
            file.write('{"key": "half a li')
        bank = write_descriptions(
            model(server, tmp_path, timeout=5), STUFF, guidance="Say what can be seen.", progress=False
        )
        assert len(bank) == 171 and not bank.failed
        assert len(server.answered) == 171 and set(server.answered.values()) == {1}
        assert (
            sum(
                1
                for line in journal.read_text().splitlines()
                if line.startswith('{"key"') and line.endswith("}")
            )
            == 171
        )


def test_one_question_under_two_keys_is_asked_once(tmp_path):
    with ChatServer(echo) as server:
        answers = model(server, tmp_path).ask_all({n: question("same") for n in range(8)}, progress=False)
        assert len(answers) == 8 and sum(server.asked.values()) == 1


@pytest.mark.parametrize("formats", [("json_schema", "json_object"), ("json_object",), ()])
def test_servers_without_structured_output_are_asked_in_words(formats, tmp_path):
    def answer(messages):
        assert formats[:1] == ("json_schema",) or "JSON schema" in messages[0]["content"]
        return "Of course! " + echo(messages) if not formats else echo(messages)

    with ChatServer(answer, formats=formats) as server:
        asker = model(server, tmp_path, concurrency=1)
        assert asker.ask_all({"a": question("one"), "b": question("two")}, progress=False) == {
            "a": {"word": "one"},
            "b": {"word": "two"},
        }
        assert asker.calls == 4 - len(formats)  # what worked is remembered


def test_retry_after_is_honoured(tmp_path, monkeypatch):
    waits = []
    with ChatServer(echo) as server:
        server.handle = lambda request, asked: reply(
            request,
            *(
                (429, {"error": {"message": "busy"}}, {"retry-after": "3"})
                if len(waits) < 2
                else (200, completion(echo(asked["messages"])))
            ),
        )
        asker = model(server, tmp_path)
        monkeypatch.setattr(asker._stop, "wait", waits.append)
        assert asker.ask_all({"a": question("one")}, progress=False)["a"] == {"word": "one"} and waits == [
            3,
            3,
        ]
        server.handle = lambda request, asked: reply(
            request, 429, {"error": {"message": "come back tomorrow"}}, {"retry-after": "86400"}
        )
        with pytest.raises(LanguageModelError, match="86400 s of patience"):
            asker.ask_all({"b": question("two")}, progress=False)


def test_budget_of_calls_ends_in_one_error_and_goes_on_later(tmp_path):
    questions = {n: question(f"word {n}") for n in range(20)}
    with ChatServer(echo) as server:
        with pytest.raises(
            BudgetExceeded, match=r"budget of 7 calls is spent: 7 of 20 questions .* larger limit"
        ):
            model(server, tmp_path, max_calls=7).ask_all(questions, progress=False)
        assert sum(server.asked.values()) == 7
        assert len(model(server, tmp_path, max_calls=13).ask_all(questions, progress=False)) == 20
        assert set(server.answered.values()) == {1}


def test_budget_of_tokens(tmp_path):
    with ChatServer(echo) as server:  # each answer takes 100
        asker = model(server, tmp_path, max_tokens=450, concurrency=2)
        with pytest.raises(BudgetExceeded, match="budget of 450 tokens"):
            asker.ask_all({n: question(f"word {n}") for n in range(20)}, progress=False)
        assert 450 <= asker.tokens <= 450 + 2 * 100


def test_estimate_makes_no_call_and_needs_no_key(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ChatServer(describe) as server:
        asker = model(server, tmp_path)
        bank = write_descriptions(asker, STUFF, dry_run=True, prices=(1, 10))
        assert not server.asked and asker.calls == 0 and len(bank) == 0
    said = capsys.readouterr().out
    # 171 classes and the guidance
    assert "172 calls for 172 questions" in said and "characters / 4" in said and "cost about" in said


@pytest.mark.parametrize(
    "status, body",
    [
        (401, {"error": {"message": "Incorrect API key"}}),
        (404, {"error": {"message": "The model does not exist"}}),
        (429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}),
    ],
)
def test_what_waiting_cannot_mend_stops_at_once(status, body, tmp_path):
    with ChatServer(echo) as server:
        server.handle = lambda request, asked: (server.asked.update("x"), reply(request, status, body))
        with pytest.raises(LanguageModelError, match=body["error"]["message"].split()[0]):
            model(server, tmp_path, concurrency=2).ask_all(
                {n: question(f"word {n}") for n in range(50)}, progress=False
            )
        assert server.asked["x"] <= 3


def test_a_dead_server_is_given_up_after_the_first_question(tmp_path):
    with ChatServer(echo) as server:
        pass
    asker = model(server, tmp_path)
    with pytest.raises(LanguageModelError, match="has answered nothing yet.*no connection"):
        asker.ask_all({n: question(f"word {n}") for n in range(100)}, progress=False)
    assert asker.calls <= 4 * asker.concurrency


def test_a_stubborn_answer_is_refused_with_the_reason_and_reported(tmp_path):
    seen = []

    def answer(messages):
        seen.append([turn["content"] for turn in messages])
        return echo([{"content": "fine" if "good" in messages[0]["content"] else "bad"}])

    with ChatServer(answer) as server:
        answers = model(server, tmp_path, concurrency=1).ask_all(
            {"a": question("stubborn"), "b": question("good")},
            lambda key, answer: "it is bad" if answer["word"] == "bad" else None,
            progress=False,
        )
        assert (
            answers == {"b": {"word": "fine"}}
            and "3 answers were refused" in answers.failed["a"]
            and answers.refused == {"a"}
        )
        assert [len(turns) for turns in seen] == [1, 3, 5, 1] and "it is bad" in seen[1][-1]


def test_declined_and_failing_questions_do_not_stop_the_others(tmp_path):
    def handle(request, asked):
        text = asked["messages"][-1]["content"]
        if text == "declined":
            return reply(request, 200, completion("", "content_filter"))
        if text == "filtered":
            return reply(request, 400, {"error": {"message": "policy", "code": "content_filter"}})
        if text == "broken":
            return reply(request, 500, {"error": {"message": "broken"}})
        reply(request, 200, completion(echo(asked["messages"])))

    with ChatServer(echo) as server:
        server.handle = handle
        answers = model(server, tmp_path, concurrency=1, attempts=2).ask_all(
            {name: question(name) for name in ("fine", "declined", "filtered", "broken", "last")},
            progress=False,
        )
    assert (
        list(answers) == ["fine", "last"]
        and answers.refused == {"declined", "filtered"}
        and "status 500" in answers.failed["broken"]
    )


def test_the_key_comes_from_the_environment_or_is_missed(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    with ChatServer(echo) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        LanguageModel("test", journal=tmp_path / "a.jsonl").ask_all({"a": question("one")}, progress=False)
        assert server.key == "Bearer from-the-environment"
        monkeypatch.delenv("OPENAI_API_KEY")
        with pytest.raises(LanguageModelError, match="OPENAI_API_KEY"):
            LanguageModel("test", journal=tmp_path / "b.jsonl").ask_all(
                {"a": question("one")}, progress=False
            )
        # a local server needs none
        LanguageModel("test", server.url, journal=tmp_path / "c.jsonl").ask_all(
            {"a": question("one")}, progress=False
        )


def test_the_journal_tells_models_and_settings_apart(tmp_path):
    with ChatServer(echo) as server:
        for kw in ({}, {"temperature": 0.7}, {"temperature": None}):
            model(server, tmp_path, **kw).ask_all({"a": question("one")}, progress=False)
        assert sum(server.asked.values()) == 3
        LanguageModel("other", server.url, journal=tmp_path / "journal.jsonl").ask_all(
            {"a": question("one")}, progress=False
        )
        assert (
            sum(server.asked.values()) == 4
            and len((tmp_path / "journal.jsonl").read_text().splitlines()) == 4
        )


def test_limits_are_checked():
    with pytest.raises(LanguageModelError, match="concurrency must be a whole number from 1 up"):
        LanguageModel("test", concurrency=0)


def test_questions_have_the_published_form():
    asked = description_question("wall-brick", "Be plain.", ("wall-brick", "brick wall"))
    assert "also called brick wall" in asked.messages[0]["content"] and asked.schema is DESCRIPTION_SCHEMA
    assert PromptBank.new(STUFF, "descriptions").missing(STUFF) == list(STUFF.names)


# ---- answers that are paid for are kept (issue 18, number 11)


def unwritable(tmp_path, kind):
    "Places where no journal can be: root may write where permissions say no, so these are of other kinds."
    (tmp_path / "file").write_text("in the way")
    return {
        "below a file": tmp_path / "file" / "journal.jsonl",
        "a folder": tmp_path,
        "a device": Path(os.devnull),
        "no such disk": Path("/proc/ovss/journal.jsonl"),
        "a name too long": tmp_path / ("j" * 300),
    }[kind]


@pytest.mark.parametrize("kind", ["below a file", "a folder", "a device", "no such disk", "a name too long"])
def test_a_journal_that_cannot_be_written_is_found_before_the_first_call(kind, tmp_path):
    with ChatServer(echo) as server:
        asker = model(server, tmp_path, journal=unwritable(tmp_path, kind))
        with pytest.raises(LanguageModelError, match=r"journal.*cannot be (written|read).*journal="):
            asker.ask_all({n: question(f"word {n}") for n in range(8)}, progress=False)
        assert not server.asked and asker.calls == 0


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{\x00}\x00", b"\x89PNG\r\n\x1a\n", b"cat,dog\n", b'{"name": "cat"}\n', b'["a"]\n']
)
def test_a_file_that_is_no_journal_is_neither_read_nor_added_to(content, tmp_path):
    (tmp_path / "journal.jsonl").write_bytes(content)
    with ChatServer(echo) as server:
        with pytest.raises(LanguageModelError, match="is no journal of answers"):
            model(server, tmp_path).ask_all({"a": question("one")}, progress=False)
        assert not server.asked and (tmp_path / "journal.jsonl").read_bytes() == content


def test_bytes_that_a_crash_leaves_in_a_journal_do_no_harm(tmp_path):
    with ChatServer(echo) as server:
        model(server, tmp_path).ask_all({"a": question("one")}, progress=False)
        line = (tmp_path / "journal.jsonl").read_bytes()
        (tmp_path / "journal.jsonl").write_bytes(
            b"\xef\xbb\xbf" + line.replace(b"\n", b"\r\n") + b"\n" + bytes(50) + b'\n{"key": "caf\xc3'
        )
        again = model(server, tmp_path)
        assert (
            again.ask_all({"a": question("one"), "b": question("two")}, progress=False)
            == {"a": {"word": "one"}, "b": {"word": "two"}}
            and again.calls == 1
        )
        assert model(server, tmp_path).recall(question("two")) == {"word": "two"}


@pytest.fixture
def small_disk(tmp_path):
    "A disk of its own of 24 KiB, where this is allowed."
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24k", "none", disk], capture_output=True
    ).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fills_up_ends_the_asking_and_loses_no_answer(small_disk, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    questions = {n: question(f"word {n}" + "x" * 1500) for n in range(40)}
    with ChatServer(echo) as server:
        asker = model(server, tmp_path, journal=small_disk / "journal.jsonl", concurrency=4)
        with pytest.raises(
            LanguageModelError,
            match="cannot be written any more.*No space left.*cat .* no answer is paid for twice",
        ) as e:
            asker.ask_all(questions, progress=False)
        assert 4 < sum(server.answered.values()) == asker.answered < 40
        rescued = Path(re.search(r"cat (\S+) >>", str(e.value))[1])
        whole = tmp_path / "whole.jsonl"  # as on a larger disk
        # which may have half a line between them
        whole.write_bytes((small_disk / "journal.jsonl").read_bytes() + rescued.read_bytes())
        assert len(model(server, tmp_path, journal=whole).ask_all(questions, progress=False)) == 40
        assert set(server.answered.values()) == {1}


def test_a_full_disk_is_found_before_the_first_call(small_disk, tmp_path):
    (small_disk / "big").write_bytes(bytes(24 * 1024))
    with ChatServer(echo) as server:
        with pytest.raises(LanguageModelError, match="No space left"):
            model(server, tmp_path, journal=small_disk / "journal.jsonl").ask_all(
                {"a": question("one")}, progress=False
            )
        assert not server.asked


def test_two_processes_on_one_journal_share_their_answers(tmp_path):
    program = (
        "import sys; from ovss_nb.text.language_model import LanguageModel; from ovss_nb.text.prompt_writer"
        " import write_subclasses; from ovss_nb.core.vocabulary import load_vocabulary\nbank ="
        " write_subclasses(LanguageModel('test', sys.argv[1], timeout=20, backoff=0.01, journal=sys.argv[2],"
        " concurrency=2), load_vocabulary('COCO-Stuff-171'), progress=False)\nsys.exit(len(bank) != 171)"
    )
    with ChatServer(describe) as server:
        processes = [
            subprocess.Popen([sys.executable, "-c", program, server.url, tmp_path / "journal.jsonl"])
            for _ in range(2)
        ]
        assert [process.wait(120) for process in processes] == [0, 0]
        # Who looks while the other writes may add an empty line, which readers pass over.
        answers = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines() if line]
        assert all(answer["text"] for answer in answers) and len({answer["key"] for answer in answers}) == 171
        asker = model(server, tmp_path)
        assert len(write_subclasses(asker, STUFF, progress=False)) == 171 and asker.calls == 0


def test_what_another_process_adds_is_not_asked_again(tmp_path):
    with ChatServer(echo) as server:
        one, two = model(server, tmp_path), model(server, tmp_path)
        one.ask_all({"a": question("one")}, progress=False)
        two.ask_all({"a": question("one"), "b": question("two")}, progress=False)
        one.ask_all({"b": question("two")}, progress=False)
        assert sum(server.asked.values()) == 2


@pytest.mark.parametrize("bank", ["file/bank.json", "/proc/ovss/bank.json", "x" * 250 + ".json"])
def test_a_bank_that_cannot_be_saved_is_found_before_the_first_call(bank, tmp_path, capsys):
    from ovss_nb.app.cli import main

    (tmp_path / "file").write_text("in the way")
    with ChatServer(describe) as server:
        assert (
            main(
                [
                    "prompts",
                    "make",
                    "--vocabulary",
                    "cat,dog",
                    "--bank",
                    str(tmp_path / bank),
                    "--model",
                    "test",
                    "--base-url",
                    server.url,
                ]
            )
            == 2
        )
        said = capsys.readouterr().err
        assert "cannot be written" in said and "--bank" in said and said.count("\n") == 1 and not server.asked


# ---- thinking, messy answers and servers that refuse (number 12)


def ask(server, tmp_path, **kw):
    return model(server, tmp_path, concurrency=1, **kw).ask_all(
        {"a": question("one"), "b": question("two")}, progress=False
    )


BOTH = {"a": {"word": "one"}, "b": {"word": "two"}}
DRAFT = '{"word": "draft"}'
THOUGHTS = {
    "think": "<think>Perhaps {0}?</think>\n{1}",
    "only its end": "Perhaps {0}?\n</think>\n{1}",
    "thinking": "<thinking>{0}</thinking>{1}",
    "kimi": "◁think▷{0}◁/think▷{1}",
    "mistral": "[THINK]{0}[/THINK]{1}",
    "seed": "<seed:think>{0}</seed:think>{1}",
    "twice": "<think>{0}</think> <think>or {0}</think> {1}",
    "nested": "<think>a <think>{0}</think> b {0}</think> {1}",
    "after": "{1}\n<think>Not {0}.</think>",
    "harmony": (
        "<|channel|>analysis<|message|>{0}<|end|><|start|>assistant<|channel|>final<|message|>{1}<|return|>"
    ),
    "harmony json": (
        "<|channel|>analysis<|message|>{0}<|end|><|start|>assistant<|channel|>final"
        " <|constrain|>json<|message|>{1}"
    ),
    "lost marks": "analysis{0} is a draft.assistantfinal{1}",
    "answer tag": "<think>{0}</think><answer>{1}</answer>",
    "react": "Thought: {0} may do.\nFinal answer: {1}",
    "bold": "Let me think: {0}.\n\n**Final Answer:**\n\n{1}",
    "cohere": "<|START_THINKING|>{0}<|END_THINKING|><|START_RESPONSE|>{1}<|END_RESPONSE|>",
    "fence": "First {0}.\n```json\n{1}\n```",
    "braces": "I use {{braces}} and {{}} here: {1}",
    "broken braces": "In set notation {{x | x > 2: {1}",
    "doubled": "{{{1}}}",
    "wrapped": '{{"answer": {1}}}',
    "list": "[{1}]",
}


@pytest.mark.parametrize("form", THOUGHTS)
@pytest.mark.parametrize("formats", [("json_schema", "json_object"), ()])
def test_thinking_is_no_answer(form, formats, tmp_path):
    with ChatServer(lambda messages: THOUGHTS[form].format(DRAFT, echo(messages)), formats=formats) as server:
        assert ask(server, tmp_path) == BOTH
        assert max(server.answered.values()) == 1 and (
            form == "fence" or "draft" not in (tmp_path / "journal.jsonl").read_text()
        )


@pytest.mark.parametrize(
    "form",
    [
        "think",
        "only its end",
        "thinking",
        "kimi",
        "mistral",
        "harmony",
        "lost marks",
        "answer tag",
        "react",
        "bold",
    ],
)
def test_thinking_is_no_subclass(form, tmp_path):
    with ChatServer(lambda messages: THOUGHTS[form].format("wrong, draft", describe(messages))) as server:
        bank = write_subclasses(model(server, tmp_path), ["dog", "tree"], progress=False)
        assert (
            not bank.failed
            and bank["dog"][:2] == ["red dog", "old dog"]
            and not {"wrong", "draft"} & {*bank["dog"], *bank["tree"]}
        )


@pytest.mark.parametrize(
    "text",
    [
        "<think>The user wants red dog, old dog, wooden dog",
        "<think>red dog</think>",
        "◁think▷ red dog, old dog",
        "<|channel|>analysis<|message|>red dog, old dog<|end|>",
        "Thought: red dog, old dog, small dog",
    ],
)
def test_thinking_that_never_ends_is_a_failure_not_an_answer(text, tmp_path):
    with ChatServer(
        lambda messages: describe(messages) if "tree" in messages[0]["content"] else text
    ) as server:
        bank = write_subclasses(
            model(server, tmp_path, attempts=2, concurrency=1), ["tree", "dog"], n=2, progress=False
        )
        assert list(bank.classes) == ["tree"] and "thinking" in bank.failed["dog"]


SAID = {
    "parts": lambda text: {"content": [{"type": "text", "text": text}]},
    "thoughts among parts": lambda text: {
        "content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": DRAFT}]},
            {"type": "reasoning", "text": DRAFT},
            {"type": "text", "text": text},
        ]
    },
    "pieces": lambda text: {
        "content": [{"type": "text", "text": text[:5]}, {"type": "text", "text": text[5:]}]
    },
    "strings": lambda text: {"content": [text]},
    "parsed": lambda text: {"content": json.loads(text)},
    "reasoning_content": lambda text: {"content": text, "reasoning_content": f"Perhaps {DRAFT}"},
    "reasoning": lambda text: {"content": text, "reasoning": f"Perhaps {DRAFT}", "reasoning_details": []},
}


@pytest.mark.parametrize("form", SAID)
def test_messages_of_other_forms(form, tmp_path):
    with ChatServer(echo, dress=lambda text: {"message": {"role": "assistant"} | SAID[form](text)}) as server:
        assert ask(server, tmp_path) == BOTH


@pytest.mark.parametrize(
    "choice",
    [
        {"message": None},
        {"message": {}},
        {"message": {"role": "assistant", "content": None}},
        {"message": {"role": "assistant", "content": []}},
        {"message": 3},
        {"message": {"role": "assistant", "content": None, "reasoning_content": DRAFT}},
        {"message": {"role": "assistant", "content": 5}},
    ],
)
def test_a_message_without_text_is_asked_again(choice, tmp_path):
    with ChatServer(echo) as server:
        server.dress = lambda text: choice if len(server.requests) == 1 else {}
        assert ask(server, tmp_path) == BOTH
        server.dress = lambda text: choice
        answers = model(server, tmp_path, attempts=2, journal=tmp_path / "other.jsonl")
        with pytest.raises(LanguageModelError, match="has answered nothing yet.*attempts failed"):
            answers.ask_all({"a": question("one")}, progress=False)


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "upstream is busy"}},
        {"choices": []},
        {"choices": [None]},
        {"choices": {}},
        [],
        None,
        "text",
        3,
    ],
)
def test_a_reply_without_a_choice_is_asked_again(body, tmp_path):
    with ChatServer(echo) as server:
        handle, seen = server.handle, []
        server.handle = lambda request, asked: (
            seen.append(1),
            reply(request, 200, json.dumps(body)) if len(seen) == 1 else handle(request, asked),
        )
        assert ask(server, tmp_path) == BOTH and len(seen) == 3


@pytest.mark.parametrize("status", [400, 404, 405, 415, 422, 500, 501, 502])
@pytest.mark.parametrize("words", ["response_format is not supported", "Internal error"])
def test_a_server_that_refuses_or_breaks_at_structured_output_is_asked_in_words(status, words, tmp_path):
    with ChatServer(
        echo, refuse=lambda asked: (status, words) if "response_format" in asked else None
    ) as server:
        asker = model(server, tmp_path, attempts=3)
        assert len(asker.ask_all({n: question(f"word {n}") for n in range(12)}, progress=False)) == 12
        assert asker.calls - 12 == (4 if status in (500, 502) else 2)  # found out once, then remembered


@pytest.mark.parametrize("empty", ["", "{}", "null", "I cannot write JSON."])
def test_structured_output_that_yields_nothing_is_given_up(empty, tmp_path):
    "Thinking models behind some servers answer nothing at all in JSON mode."
    with ChatServer(
        echo,
        dress=lambda text: {
            "message": {
                "role": "assistant",
                "content": empty if "response_format" in server.requests[-1] else text,
            }
        },
    ) as server:
        assert ask(server, tmp_path, attempts=3) == BOTH


GEMMA = "System role not supported"


@pytest.mark.parametrize(
    "status, words",
    [
        (400, GEMMA),
        (500, GEMMA),
        (422, "Template error: " + GEMMA),
        (400, "Conversation roles must alternate user/assistant"),
        (500, "Internal error"),
        (400, "Bad request"),
    ],
)
@pytest.mark.parametrize("formats", [("json_schema", "json_object"), ()])
def test_a_model_without_a_system_turn_is_told_by_the_user(status, words, formats, tmp_path):
    refuse = lambda asked: (
        (status, words) if any(turn["role"] == "system" for turn in asked["messages"]) else None
    )
    seen = []

    def answer(messages):
        seen.append(messages)
        return json.dumps({"word": messages[-1]["content"].split("\n\n")[-1]})

    with ChatServer(answer, formats=formats, refuse=refuse) as server:
        assert ask(server, tmp_path) == BOTH
        bank = write_subclasses(
            model(server, tmp_path, revisions=0), ["dog"], n=1, context="photographs of parks", progress=False
        )
    assert (
        all(len(turns) == 1 and turns[0]["role"] == "user" for turns in seen)
        and "photographs of parks" in seen[-1][0]["content"]
    )
    assert ("JSON schema" in seen[0][0]["content"]) is not bool(formats)


def test_a_model_that_takes_no_temperature_is_asked_without(tmp_path):
    refuse = lambda asked: (
        (400, "Unsupported value: 'temperature' does not support 0 with this model.")
        if "temperature" in asked
        else None
    )
    with ChatServer(echo, refuse=refuse) as server, pytest.warns(UserWarning, match="takes no temperature=0"):
        assert ask(server, tmp_path) == BOTH and len(server.requests) == 3


def test_a_refusal_of_one_question_is_not_a_refusal_of_the_format(tmp_path):
    refuse = lambda asked: (400, "too long") if "long" in asked["messages"][-1]["content"] else None
    with ChatServer(echo, refuse=refuse) as server:
        answers = model(server, tmp_path, concurrency=1).ask_all(
            {name: question(name) for name in ("one", "long", "two")}, progress=False
        )
        assert (
            list(answers) == ["one", "two"]
            and "too long" in answers.failed["long"]
            and "response_format" in server.requests[-1]
        )


JUNK = {
    "descriptions": "1. **Labrador**: a friendly dog\n2. **Poodle**: a curly dog",
    "plain descriptions": "Labrador: a friendly dog\nPoodle: a curly dog",
    "dashes": "- Labrador - a friendly dog\n- Poodle – a curly dog",
    "table": "| Breed | Coat |\n|---|---|\n| Labrador | short |\n| Poodle | curly |",
    "open table": "Labrador | short\nPoodle | curly",
    "tabs": "Labrador\tshort\nPoodle\tcurly",
    "sentences": "Labradors are friendly dogs.\nPoodles have curly hair, which is soft.",
    "bold beginnings": "**Labrador** friendly\n**Poodle** curly",
    "headings": "### Labrador\nA friendly dog.\n### Poodle\nA curly dog.",
    "html": "<ul><li>Labrador</li><li>Poodle</li></ul>",
    "brackets": "Labrador (friendly)\nPoodle (curly)",
    "an excuse": "I'm sorry, but I cannot help with that.",
    "an offer": "Sure! I can list them, just say the word.",
    "latex": "\\textbf{Labrador}, \\textbf{Poodle}",
    "links": "[Labrador](a.html), [Poodle](b.html)",
}


@pytest.mark.parametrize("form", JUNK)
def test_junk_is_asked_again_with_the_reason_and_never_stored(form, tmp_path):
    with ChatServer(
        lambda messages: "labrador, poodle" if "cannot be used" in messages[-1]["content"] else JUNK[form]
    ) as server:
        bank = write_subclasses(model(server, tmp_path), ["dog"], n=2, progress=False)
        assert not bank.failed and bank["dog"] == ["labrador", "poodle"]
        assert "cannot be used" in server.requests[-1]["messages"][-1]["content"]
    with ChatServer(lambda messages: JUNK[form]) as server:  # stubborn
        bank = write_subclasses(
            model(server, tmp_path, journal=tmp_path / "other.jsonl"), ["dog"], n=2, progress=False
        )
        assert not bank.classes and "3 answers were refused" in bank.failed["dog"]


LISTS = {
    "bullets": "- Labrador\n- Poodle",
    "numbers": "1. Labrador\n2. Poodle",
    "bold": "* **Labrador**\n* **Poodle**",
    "bold numbers": "**1. Labrador**\n\n**2. Poodle**",
    "fence": "```\nlabrador\npoodle\n```",
    "json": '["Labrador", "Poodle"]',
    "json object": '```json\n{"subclasses": ["Labrador", "Poodle"]}\n```',
    "python": "['labrador', 'poodle']",
    "talk around it": "Here are 2 kinds of dogs\n\n1. Labrador\n2. Poodle\n\nLet me know if you need more!",
    "heading": "## Dogs\n- Labrador\n- Poodle",
    "one line": "Here are 2 commonly seen subclasses of dogs: Labrador, Poodle.",
    "details below": "1. **Labrador**\n   - friendly\n2. **Poodle**\n   - curly",
    "emoji": "🐕 Labrador\n🐩 Poodle",
    "quotes": "“Labrador”, “Poodle”",
    "letters": "a) Labrador\nb) Poodle",
    "boxes": "- [ ] Labrador\n- [x] Poodle",
}


@pytest.mark.parametrize("form", LISTS)
def test_ornament_is_mended_at_once(form, tmp_path):
    with ChatServer(lambda messages: LISTS[form]) as server:
        bank = write_subclasses(model(server, tmp_path), ["dog"], n=2, progress=False)
        assert bank["dog"] == ["labrador", "poodle"] and len(server.requests) == 1
