"A language model behind a real local server that misbehaves on purpose: nothing lost, nothing paid for twice."
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
from ovss_nb.language_model import BudgetSpent, LanguageModel, LanguageModelError, Question
from ovss_nb.prompts import DESCRIPTION_SCHEMA, PromptBank, description_question, write_descriptions, write_subclasses
from ovss_nb.vocabulary import load_vocabulary

TESTS = Path(__file__).parent
STUFF = load_vocabulary("COCO-Stuff-171")


def model(server, tmp_path, **kw):
    return LanguageModel("test", server.url, **dict(timeout=30, backoff=0.01, journal=tmp_path/"journal.jsonl") | kw)


def question(text): return Question([{"role": "user", "content": text}], {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"], "additionalProperties": False})


def echo(messages): return json.dumps({"word": messages[-1]["content"]})


def unnamed(text): return re.sub(r"A [\w -]+? (is|has) ", r"It \1 ", text)


def test_all_classes_of_coco_stuff_complete_with_30_percent_faults(tmp_path):
    with ChatServer(describe, faults=0.3, spoil=unnamed) as server:
        asker = model(server, tmp_path, timeout=server.delay - 1)
        bank = write_descriptions(asker, STUFF, progress=False)
        assert not bank.failed and list(bank.classes) == list(STUFF.names) and len(bank) == 171
        assert set(FAULTS) | {"rules"} == set(server.faults)   # each kind of fault came up
        assert sum(server.faults.values()) > 0.2*asker.calls
        assert max(server.answered.values()) == 1   # no answer was paid for twice
        assert not bank.problems(STUFF)
        calls = sum(server.asked.values())
        again = write_descriptions(model(server, tmp_path), STUFF, progress=False)
        assert again.classes == bank.classes and sum(server.asked.values()) == calls


def test_subclasses_complete_as_plain_text(tmp_path):
    with ChatServer(describe, faults=0.3, spoil=lambda text: text.replace("old", "red")) as server:
        bank = write_subclasses(model(server, tmp_path, timeout=server.delay - 1), STUFF, progress=False)
        assert not bank.failed and len(bank) == 171 and all(len(o) == 10 for o in bank.texts(STUFF).values())
        assert max(server.answered.values()) == 1


def test_kill_9_loses_no_answer_and_repeats_none(tmp_path):
    answers = 60
    program = ("import sys; from ovss_nb.language_model import LanguageModel; from ovss_nb.prompts import write_descriptions; from ovss_nb.vocabulary import load_vocabulary\n"
               "write_descriptions(LanguageModel('test', sys.argv[1], timeout=20, backoff=0.01, journal=sys.argv[2]), load_vocabulary('COCO-Stuff-171'), guidance='Say what can be seen.', progress=False)")
    with ChatServer(describe, hold=answers) as server:
        process = subprocess.Popen([sys.executable, "-c", program, server.url, tmp_path/"journal.jsonl"])
        journal, end = tmp_path/"journal.jsonl", time.monotonic() + 30
        # The server answers so many calls and leaves the rest hanging: all that was answered must be on disk when the process dies.
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= answers):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL); process.wait()
        assert sum(server.answered.values()) == answers
        server.hold = None; server.release.set()
        with open(journal, "a") as file: file.write('{"key": "half a li')   # as a crash in the middle of writing leaves it
        bank = write_descriptions(model(server, tmp_path, timeout=5), STUFF, guidance="Say what can be seen.", progress=False)
        assert len(bank) == 171 and not bank.failed
        assert len(server.answered) == 171 and set(server.answered.values()) == {1}
        assert sum(1 for line in journal.read_text().splitlines() if line.startswith('{"key"') and line.endswith("}")) == 171


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
        assert asker.ask_all({"a": question("one"), "b": question("two")}, progress=False) == {"a": {"word": "one"}, "b": {"word": "two"}}
        assert asker.calls == 4 - len(formats)   # what worked is remembered


def test_retry_after_is_honoured(tmp_path, monkeypatch):
    waits = []
    with ChatServer(echo) as server:
        server.handle = lambda request, asked: reply(request, *((429, {"error": {"message": "busy"}}, {"retry-after": "3"}) if len(waits) < 2 else (200, completion(echo(asked["messages"])))))
        asker = model(server, tmp_path)
        monkeypatch.setattr(asker._stop, "wait", waits.append)
        assert asker.ask_all({"a": question("one")}, progress=False)["a"] == {"word": "one"} and waits == [3, 3]
        server.handle = lambda request, asked: reply(request, 429, {"error": {"message": "come back tomorrow"}}, {"retry-after": "86400"})
        with pytest.raises(LanguageModelError, match="86400 s of patience"): asker.ask_all({"b": question("two")}, progress=False)


def test_budget_of_calls_ends_in_one_error_and_goes_on_later(tmp_path):
    questions = {n: question(f"word {n}") for n in range(20)}
    with ChatServer(echo) as server:
        with pytest.raises(BudgetSpent, match=r"budget of 7 calls is spent: 7 of 20 questions .* larger limit"):
            model(server, tmp_path, max_calls=7).ask_all(questions, progress=False)
        assert sum(server.asked.values()) == 7
        assert len(model(server, tmp_path, max_calls=13).ask_all(questions, progress=False)) == 20
        assert set(server.answered.values()) == {1}


def test_budget_of_tokens(tmp_path):
    with ChatServer(echo) as server:   # each answer takes 100
        asker = model(server, tmp_path, max_tokens=450, concurrency=2)
        with pytest.raises(BudgetSpent, match="budget of 450 tokens"): asker.ask_all({n: question(f"word {n}") for n in range(20)}, progress=False)
        assert 450 <= asker.tokens <= 450 + 2*100


def test_estimate_makes_no_call_and_needs_no_key(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with ChatServer(describe) as server:
        asker = model(server, tmp_path)
        bank = write_descriptions(asker, STUFF, dry_run=True, prices=(1, 10))
        assert not server.asked and asker.calls == 0 and len(bank) == 0
    said = capsys.readouterr().out
    assert "172 calls for 172 questions" in said and "characters / 4" in said and "cost about" in said   # 171 classes and the guidance


@pytest.mark.parametrize("status, body", [(401, {"error": {"message": "Incorrect API key"}}), (404, {"error": {"message": "The model does not exist"}}),
                                          (429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}})])
def test_what_waiting_cannot_mend_stops_at_once(status, body, tmp_path):
    with ChatServer(echo) as server:
        server.handle = lambda request, asked: (server.asked.update("x"), reply(request, status, body))
        with pytest.raises(LanguageModelError, match=body["error"]["message"].split()[0]):
            model(server, tmp_path, concurrency=2).ask_all({n: question(f"word {n}") for n in range(50)}, progress=False)
        assert server.asked["x"] <= 3


def test_a_dead_server_is_given_up_after_the_first_question(tmp_path):
    with ChatServer(echo) as server: pass
    asker = model(server, tmp_path)
    with pytest.raises(LanguageModelError, match="has answered nothing yet.*no connection"): asker.ask_all({n: question(f"word {n}") for n in range(100)}, progress=False)
    assert asker.calls <= 4*asker.concurrency


def test_a_stubborn_answer_is_refused_with_the_reason_and_reported(tmp_path):
    seen = []
    def answer(messages):
        seen.append([o["content"] for o in messages])
        return echo([{"content": "fine" if "good" in messages[0]["content"] else "bad"}])
    with ChatServer(answer) as server:
        answers = model(server, tmp_path, concurrency=1).ask_all({"a": question("stubborn"), "b": question("good")}, lambda key, o: "it is bad" if o["word"] == "bad" else None, progress=False)
        assert answers == {"b": {"word": "fine"}} and "3 answers were refused" in answers.failed["a"] and answers.refused == {"a"}
        assert [len(o) for o in seen] == [1, 3, 5, 1] and "it is bad" in seen[1][-1]


def test_declined_and_failing_questions_do_not_stop_the_others(tmp_path):
    def handle(request, asked):
        text = asked["messages"][-1]["content"]
        if text == "declined": return reply(request, 200, completion("", "content_filter"))
        if text == "filtered": return reply(request, 400, {"error": {"message": "policy", "code": "content_filter"}})
        if text == "broken": return reply(request, 500, {"error": {"message": "broken"}})
        reply(request, 200, completion(echo(asked["messages"])))
    with ChatServer(echo) as server:
        server.handle = handle
        answers = model(server, tmp_path, concurrency=1, attempts=2).ask_all({o: question(o) for o in ("fine", "declined", "filtered", "broken", "last")}, progress=False)
    assert list(answers) == ["fine", "last"] and answers.refused == {"declined", "filtered"} and "status 500" in answers.failed["broken"]


def test_the_key_comes_from_the_environment_or_is_missed(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    with ChatServer(echo) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        LanguageModel("test", journal=tmp_path/"a.jsonl").ask_all({"a": question("one")}, progress=False)
        assert server.key == "Bearer from-the-environment"
        monkeypatch.delenv("OPENAI_API_KEY")
        with pytest.raises(LanguageModelError, match="OPENAI_API_KEY"): LanguageModel("test", journal=tmp_path/"b.jsonl").ask_all({"a": question("one")}, progress=False)
        LanguageModel("test", server.url, journal=tmp_path/"c.jsonl").ask_all({"a": question("one")}, progress=False)   # a local server needs none


def test_the_journal_tells_models_and_settings_apart(tmp_path):
    with ChatServer(echo) as server:
        for kw in ({}, {"temperature": 0.7}, {"temperature": None}): model(server, tmp_path, **kw).ask_all({"a": question("one")}, progress=False)
        assert sum(server.asked.values()) == 3
        LanguageModel("other", server.url, journal=tmp_path/"journal.jsonl").ask_all({"a": question("one")}, progress=False)
        assert sum(server.asked.values()) == 4 and len((tmp_path/"journal.jsonl").read_text().splitlines()) == 4


def test_limits_are_checked():
    with pytest.raises(LanguageModelError, match="concurrency must be at least 1"): LanguageModel("test", concurrency=0)


def test_questions_have_the_published_form():
    asked = description_question("wall-brick", "Be plain.", ("wall-brick", "brick wall"))
    assert "also called brick wall" in asked.messages[0]["content"] and asked.schema is DESCRIPTION_SCHEMA
    assert PromptBank.new(STUFF, "descriptions").missing(STUFF) == list(STUFF.names)
