import json
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from qscope_jax.errors import ConfigError, InputError, SourceError
from qscope_jax.features.generation import endpoint as module
from qscope_jax.features.generation.endpoint import EndpointGenerator
from qscope_jax.features.generation.generators import Message, Reply

KEY = "sk-do-not-tell"


def ask(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def completion(text: str) -> tuple[int, str]:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]})


class Server:
    """An endpoint on this machine that answers by a function of the request and of how often it was asked before."""

    def __init__(self) -> None:
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.behaviour: Callable[[dict, int], tuple] = lambda request, times: completion(request["messages"][-1]["content"].upper())
        self._lock = threading.Lock()
        self.under_way = self.most_under_way = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # noqa: N802
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    times = sum(old == request for old in outer.asked)
                    outer.asked.append(request)
                    outer.keys.append(self.headers.get("Authorization"))
                    outer.paths.append(self.path)
                    outer.under_way += 1
                    outer.most_under_way = max(outer.most_under_way, outer.under_way)
                status, body, *headers = outer.behaviour(request, times)
                with outer._lock:
                    outer.under_way -= 1
                try:
                    self.send_response(status)
                    for name, value in headers:
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body.encode())
                except OSError:
                    pass  # the client has gone

            def log_message(self, format: str, *rest: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    found = Server()
    thread = threading.Thread(target=found.http.serve_forever, args=(0.01,))
    thread.start()
    yield found
    found.http.shutdown()
    thread.join()
    found.http.server_close()


def connect(server: Server, **settings) -> EndpointGenerator:
    return EndpointGenerator(server.url, model="m", **{"first_wait": 0.001, "timeout": 5.0, **settings})


def test_conversations_are_answered_in_order_with_the_settings_of_the_call(server):
    generate = connect(server, extra={"top_p": 0.5})
    replies = generate([ask(f"text {i}") for i in range(9)], max_tokens=7, temperature=0.5, seed=3)
    assert replies == [Reply(f"TEXT {i}") for i in range(9)]
    assert {(r["model"], r["max_tokens"], r["temperature"], r["seed"], r["top_p"]) for r in server.asked} == {("m", 7, 0.5, 3, 0.5)}
    assert set(server.paths) == {"/v1/chat/completions"} and set(server.keys) == {f"Bearer {KEY}"}
    assert generate.name == f"m at {server.url[7:-3]}"


def test_so_many_requests_are_under_way_as_asked_for(server):
    def slow(request: dict, times: int) -> tuple[int, str]:
        time.sleep(0.05)
        return completion("x")

    server.behaviour = slow
    connect(server, concurrency=3)([ask(str(i)) for i in range(9)])
    assert server.most_under_way == 3


def test_equal_conversations_have_seeds_of_their_own_whatever_stands_between_them(server):
    generate = connect(server)
    generate([ask("a"), ask("a"), ask("b")], seed=5)
    generate([ask("a"), ask("b"), ask("a")], seed=5)
    assert sorted((r["messages"][0]["content"], r["seed"]) for r in server.asked) == sorted([("a", 5), ("a", 6), ("b", 5)] * 2)


@pytest.mark.parametrize("failure", [(429, "slow down"), (500, "{}"), (503, ""), (408, ""), (200, "<html>"), (200, '{"choices": []}')])
def test_what_may_pass_is_tried_again(server, failure):
    server.behaviour = lambda request, times: failure if times < 2 else completion("at last")
    assert connect(server)([ask("a")]) == [Reply("at last")]
    assert len(server.asked) == 3


def test_waits_double_and_retry_after_is_obeyed(server, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(module.threading.Event, "wait", lambda self, seconds=None: waits.append(seconds))
    monkeypatch.setattr(module.random, "random", lambda: 0.0)
    headers = [(), (("Retry-After", "9"),), (("Retry-After", "never"),), (("Retry-After", "999"),), (("Retry-After", formatdate(time.time() + 30)),)]
    server.behaviour = lambda request, times: (429, "", *headers[min(times, 4)])
    generate = connect(server, first_wait=1.0)
    (reply,) = generate([ask("a")])
    assert reply.text == "" and "HTTP 429" in reply.error and "(6 tries)" in reply.error
    told = [wait for wait in waits if wait is not None and wait >= 1]
    assert told[:4] == [1, 9, 4, 60] and 28 < told[4] <= 30


def test_what_fails_for_good_is_reported_and_the_others_are_answered(server):
    refusal = (400, json.dumps({"error": {"message": "no\nway"}}))
    server.behaviour = lambda request, times: refusal if "b" in str(request["messages"]) else completion("fine")
    first, second = connect(server)([ask("a"), ask("b")])
    assert first == Reply("fine") and second.text == "" and second.error.endswith("HTTP 400: no way")
    assert len(server.asked) == 2


def test_a_silent_endpoint_and_one_that_is_not_there_are_reported(server):
    def sleeps(request: dict, times: int) -> tuple[int, str]:
        time.sleep(0.3)
        return completion("late")

    server.behaviour = sleeps
    assert "no answer within 0.05 s (2 tries)" in connect(server, timeout=0.05, retries=1)([ask("a")])[0].error
    nowhere = EndpointGenerator("http://127.0.0.1:9/v1", model="m", retries=0)
    assert "ConnectionRefusedError" in nowhere([ask("a")])[0].error


def test_an_empty_answer_says_why_it_ended(server):
    server.behaviour = lambda request, times: (200, json.dumps({"choices": [{"message": {"content": None}, "finish_reason": "length"}]}))
    assert "ended by length" in connect(server)([ask("a")])[0].error


def test_an_endpoint_that_only_fails_is_not_asked_for_ever(server):
    server.behaviour = lambda request, times: (401, "who are you")
    replies = connect(server, concurrency=1)([ask(str(i)) for i in range(30)])
    assert len(server.asked) == module.FAILURES_IN_A_ROW
    assert all("401" in reply.error for reply in replies) and "not asked" in replies[-1].error


def test_the_key_appears_in_no_error_and_no_file(server, tmp_path):
    server.behaviour = lambda request, times: (403, f"your key {KEY} is bad") if request["messages"][0]["content"] == "a" else completion("b")
    generate = connect(server, cache=tmp_path / "replies.jsonl")
    replies = generate([ask("a"), ask("b")])
    assert "your key *** is bad" in replies[0].error
    assert KEY not in (tmp_path / "replies.jsonl").read_text() and KEY not in repr(vars(generate)) and KEY not in generate.name


def test_no_key_is_sent_where_none_is_set(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    connect(server)([ask("a")])
    connect(server, key_variable="")([ask("b")])
    assert server.keys == [None, None]


def test_finished_replies_are_kept_and_failed_ones_asked_again(server, tmp_path):
    cache = tmp_path / "folder" / "replies.jsonl"
    server.behaviour = lambda request, times: completion("a") if request["messages"][0]["content"] == "a" else (400, "")
    connect(server, cache=cache)([ask("a"), ask("b")])
    server.behaviour = lambda request, times: completion("new")
    assert connect(server, cache=cache)([ask("b"), ask("a")]) == [Reply("new"), Reply("a")]
    assert len(server.asked) == 3
    assert connect(server, cache=cache)([ask("a")], seed=1) == [Reply("new")]


def test_what_makes_no_sense_is_refused(tmp_path, monkeypatch, server):
    (tmp_path / "texts.jsonl").write_text('{"text": "not a reply"}\n{}\n')
    monkeypatch.setenv("BAD_KEY", "a\nb")
    cases = [
        (InputError, "is no address", lambda: EndpointGenerator("localhost:80", model="m")),
        (InputError, "is no address", lambda: EndpointGenerator("http://", model="m")),
        (InputError, "is no address", lambda: EndpointGenerator("http://a:port/v1", model="m")),
        (InputError, "endpoint at a has more than", lambda: EndpointGenerator("http://me:secret@a/v1", model="m")),
        (InputError, "name of a model", lambda: EndpointGenerator("http://a", model="")),
        (InputError, "concurrency 0", lambda: EndpointGenerator("http://a", model="m", concurrency=0)),
        (SourceError, "line 1: is no finished reply", lambda: EndpointGenerator("http://a", model="m", cache=tmp_path / "texts.jsonl")),
        (SourceError, "cannot be read", lambda: EndpointGenerator("http://a", model="m", cache=tmp_path)),
        (ConfigError, "key in BAD_KEY", lambda: connect(server, key_variable="BAD_KEY")([ask("a")])),
    ]
    for kind, line, call in cases:
        with pytest.raises(kind, match=line):
            call()
