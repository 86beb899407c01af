"""A chat server on this machine for tests:
speaks /v1/chat/completions over real HTTP, counts, and misbehaves on purpose.
"""

import hashlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# of the service; `rules` is an answer that is whole but breaks the rules
FAULTS = ("busy", "error", "overloaded", "timeout", "cut", "html", "malformed", "half")


class ChatServer:
    """`answer(messages)` makes the text of a good answer, `spoil(text)` one that breaks the rules.

    A fault depends on the question and on how often it was asked, not on the order of calls: a test does
    the same each time.
    `refuse(request)` gives a status and words for a request that the server does not take, or None;
    `dress(text)` the message around an answer.
    `answered` counts whole answers per question, `faults` what went wrong. A call that shall time out
    hangs `delay` seconds. From the `hold`-th answer on no call is answered until `release` is set; `held`
    counts these.

    """

    def __init__(
        self,
        answer,
        faults=0.0,
        spoil=None,
        hold=None,
        formats=("json_schema", "json_object"),
        delay=3,
        refuse=None,
        dress=None,
    ):
        self.answer, self.share, self.spoil, self.hold, self.formats, self.delay = (
            answer,
            faults,
            spoil,
            hold,
            formats,
            delay,
        )
        self.refuse, self.dress, self.requests = refuse, dress, []
        self.asked, self.answered, self.faults = Counter(), Counter(), Counter()
        self.lock, self.release, self.key, self.served = threading.Lock(), threading.Event(), None, 0
        self.held = 0

    def __enter__(self):
        chat = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                chat.key = self.headers["Authorization"]
                chat.handle(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.release.set()
        self.http.shutdown()
        self.http.server_close()

    def handle(self, request, asked):
        question = hashlib.sha256(json.dumps(asked["messages"]).encode()).hexdigest()
        with self.lock:
            self.requests.append(asked)
        if refused := self.refuse and self.refuse(asked):
            return reply(request, refused[0], {"error": {"message": refused[1]}})
        wanted = asked.get("response_format", {}).get("type", "plain")
        if wanted not in (*self.formats, "plain"):
            return reply(request, 400, {"error": {"message": f"response_format {wanted} is not supported"}})
        with self.lock:
            self.asked[question] += 1
            draw = int(hashlib.sha256(f"{question}{self.asked[question]}".encode()).hexdigest(), 16)
        fault = None
        if draw % 1000 < 1000 * self.share:
            fault = (*FAULTS, *(["rules"] if self.spoil else []))[
                draw // 1000 % (len(FAULTS) + bool(self.spoil))
            ]
            with self.lock:
                self.faults[fault] += 1
        if fault == "busy":
            return reply(request, 429, {"error": {"message": "busy"}}, {"retry-after": "0.02"})
        if fault == "error":
            return reply(request, 500, {"error": {"message": "broken"}})
        if fault == "overloaded":
            return reply(request, 503, {"error": {"message": "overloaded"}})
        if fault == "html":
            return reply(request, 200, "<html>gateway</html>", {"Content-Type": "text/html"})
        if fault == "timeout":
            time.sleep(self.delay)
            return  # the client has gone by then
        text = self.answer(asked["messages"])
        if fault == "rules":
            text = self.spoil(text)
        if fault == "malformed":
            text = text.replace('"', "'").replace("{", "{{") if "{" in text else ""
        body = completion(
            text[: len(text) // 2] if fault == "half" else text, "length" if fault == "half" else "stop"
        )
        if fault is None and self.dress:
            body["choices"][0] |= self.dress(text)
        if fault == "cut":
            return reply(request, 200, json.dumps(body)[:80], {"Content-Length": "4000"})
        if fault in (None, "rules"):
            with self.lock:
                held = self.hold is not None and self.served >= self.hold
                self.held += held
                self.served += not held
            if held:
                self.release.wait(30)
                return
            with self.lock:
                self.answered[question] += 1
        reply(request, 200, body)


def completion(text, finish="stop"):
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "test",
        "usage": {"prompt_tokens": 60, "completion_tokens": 40, "total_tokens": 100},
        "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}],
    }


def reply(request, status, body, headers={}):
    data = (body if isinstance(body, str) else json.dumps(body)).encode()
    try:
        request.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(data)), "Connection": "close"}
            | headers
        ).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(data)
    except OSError:
        pass  # the client has hung up
    request.close_connection = True


def describe(messages):
    "A good answer to LMSeg's two steps and to the subclass prompts, about the class that the question names."
    first = next(message["content"] for message in messages if message["role"] == "user")
    if "How should such a text" in first:
        return "Name the class first, and say only what can be seen."
    if "subclasses of" in first:
        name = first.rsplit("subclasses of ", 1)[1].rstrip(":")
        return ", ".join(
            f"{kind} {name}"
            for kind in (
                "red",
                "old",
                "wooden",
                "small",
                "large",
                "striped",
                "painted",
                "broken",
                "shiny",
                "folded",
            )
        )
    name = first.split('category "')[1].split('"')[0]
    return json.dumps(
        {
            "color": f"A {name} is mostly grey and brown.",
            "shape_size": f"A {name} has a clear outline and is of middle size.",
            "texture_material": f"A {name} has a rough surface.",
            "summary": f"A {name} is a grey and brown thing with a rough surface.",
        }
    )
