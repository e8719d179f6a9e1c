"""`bbb-ao serve` over real HTTP: answers at the asked width, streams, and errors that are JSON with their status."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from bbb_ao.cli import http_api
from bbb_ao.cli.completion import Request, Writer
from bbb_ao.cli.http_api import CompletionServer, listen

PROMPT = "a prompt"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Answer(NamedTuple):
    status: int
    kind: str
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)

    @property
    def events(self) -> list[dict[str, Any]]:
        *pieces, last, end = self.body.decode().split("\n\n")
        assert (last, end) == ("data: [DONE]", "")
        return [json.loads(piece.removeprefix("data: ")) for piece in pieces]


@pytest.fixture(scope="module")
def server(packed_model: Path) -> Iterator[CompletionServer]:
    with listen(Writer.open(str(packed_model), "cpu", None), str(packed_model), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def send(server: CompletionServer):
    def call(path: str, body: Any = None, method: str = "POST", **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, content, headers)
        response = connection.getresponse()
        return Answer(response.status, response.getheader("Content-Type", ""), response.read())

    return call


def ask(**fields: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": 10, **fields}


def test_each_request_is_answered_at_its_width(server: CompletionServer, send) -> None:
    for bits in (8, 2, 3):
        expected = server.writer.write(Request(PROMPT, bits, max_new_tokens=10), lambda text: None)
        answer = send(COMPLETIONS, ask(bits=bits))
        assert (answer.status, answer.kind) == (200, "application/json")
        (choice,) = answer.json["choices"]
        assert choice == {"index": 0, "finish_reason": "length", "text": expected.text}
        assert answer.json["usage"] == {"prompt_tokens": 8, "completion_tokens": 10, "total_tokens": 18}
    texts = {send(COMPLETIONS, ask(bits=bits)).json["choices"][0]["text"] for bits in (2, 8)}
    assert len(texts) == 2
    assert send(COMPLETIONS, ask()).json["choices"][0]["text"] == expected_text(server, 2)


def expected_text(server: CompletionServer, bits: int) -> str:
    return server.writer.write(Request(PROMPT, bits, max_new_tokens=10), lambda text: None).text


def test_drafts_give_the_text_of_the_wide_model(server: CompletionServer, send) -> None:
    answer = send(COMPLETIONS, ask(bits=8, draft_bits=2, draft_tokens=3)).json
    assert answer["choices"][0]["text"] == expected_text(server, 8)
    assert "drafted tokens (" in answer["summary"]


def test_requests_at_once_are_answered_in_turn(server: CompletionServer, send) -> None:
    expected = {bits: expected_text(server, bits) for bits in (2, 4, 8)}
    found: list[tuple[int, str]] = []

    def call(bits: int) -> None:
        found.append((bits, send(COMPLETIONS, ask(bits=bits)).json["choices"][0]["text"]))

    threads = [threading.Thread(target=call, args=(bits,)) for bits in (2, 8, 4, 8, 2, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert all(text == expected[bits] for bits, text in found)


def test_streams_are_events_that_add_up(server: CompletionServer, send) -> None:
    answer = send(COMPLETIONS, ask(bits=8, stream=True))
    assert (answer.status, answer.kind) == (200, "text/event-stream")
    *pieces, last = answer.events
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == expected_text(server, 8)
    assert all(piece["choices"][0]["finish_reason"] is None for piece in pieces)
    assert last["choices"][0]["finish_reason"] == "length"
    assert last["usage"]["completion_tokens"] == 10
    (number,) = {event["id"] for event in answer.events}
    assert number.startswith("cmpl-")
    assert send(COMPLETIONS, ask()).json["id"] != number, "each answer has its own"


def test_chats_go_through_the_template(server: CompletionServer, send) -> None:
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_completion_tokens": 10, "bits": 8}
    expected = server.writer.write(Request(f"[{PROMPT}]", 8, max_new_tokens=10), lambda text: None).text
    answer = send(CHAT, body)
    assert answer.json["object"] == "chat.completion"
    assert answer.json["id"].startswith("chatcmpl-")
    assert answer.json["choices"][0]["message"] == {"role": "assistant", "content": expected}
    events = send(CHAT, body | {"stream": True}).events
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == expected


def test_models_and_their_widths_are_listed(send) -> None:
    answer = send("/v1/models?x=1", method="GET")
    assert answer.status == 200
    assert answer.json["data"] == [{"id": "model", "object": "model", "bits": [2, 3, 4, 5, 6, 7, 8]}]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "body: expected JSON"),
        (b"{", "body: expected JSON"),
        (b"\xff\xfe", "body: expected JSON"),
        (b"[" * 100_000, "body: expected JSON"),
        (b"[]", "expected a JSON object, got list"),
        ({}, "prompt: expected text, got none"),
        ({"prompt": None}, "prompt: expected text, got null"),
        ({"prompt": ["a"]}, "prompt: expected text"),
        ({"prompt": ""}, "at least one token"),
        ({"prompt": "\ud800"}, "lone surrogate"),
        ({"prompt": "x" * 70}, "got a context of 64"),
        (ask(bits=9), "bits: expected one of 2, 3, 4, 5, 6, 7, 8, got 9"),
        (ask(bits="2"), "bits: expected a whole number"),
        (ask(bits=True), "bits: expected a whole number"),
        (ask(bits=2, draft_bits=2), "draft_bits: expected fewer than 2"),
        (ask(draft_bits=2, temperature=1), "temperature: expected 0"),
        (ask(temperature=float("nan")), "temperature"),
        (ask(temperature=-1), "temperature"),
        (ask(max_tokens=0), "max_tokens: expected a whole number of at least 1"),
        (ask(max_tokens=57), "got a context of 64"),
        (ask(max_tokens=10**400), "max_tokens"),
        (ask(seed=-1), "seed"),
        (ask(n=2), "n: expected 1"),
        (ask(stop="x"), "'stop': expected one of model, user"),
        (ask(stream="yes"), "stream: expected true or false"),
    ],
)
def test_bad_requests_get_400(send, body: object, words: str) -> None:
    answered(send(COMPLETIONS, body), 400, words)


def answered(answer: Answer, status: int, words: str) -> None:
    assert answer.status == status
    assert answer.kind == "application/json"
    error = answer.json["error"]
    assert words in error["message"]
    assert error["code"] == status
    assert "Traceback" not in error["message"]
    assert error["message"].isprintable()


@pytest.mark.parametrize("messages", [[], "hello", [{}], [{"role": "user"}], [{"role": "user", "content": [1]}]])
def test_bad_messages_get_400(send, messages: object) -> None:
    answered(send(CHAT, {"messages": messages}), 400, "messages: expected a list of objects with role and content")


def test_a_bad_request_is_refused_before_its_turn_and_its_stream(server: CompletionServer, send) -> None:
    with server.turn():
        answered(send(COMPLETIONS, ask(bits=9, stream=True)), 400, "bits: expected one of")


def test_messages_that_the_template_refuses_get_400(send) -> None:
    answered(send(CHAT, {"messages": [{"role": "system", "content": "x"}]}), 400, "no system")


def test_other_statuses(server: CompletionServer, send) -> None:
    answered(send("/", method="GET"), 404, "path: expected one of /v1/completions")
    answered(send("/v1/completions/%00", ask()), 404, "path")
    answered(send(COMPLETIONS, method="GET"), 405, "method: expected POST, got GET")
    answered(send("/v1/models", {}), 405, "method: expected GET")
    answered(send(COMPLETIONS, b"x" * (http_api.MOST_BYTES + 1)), 413, "body: expected at most")
    answered(send(COMPLETIONS, method="BREW"), 501, "BREW")
    assert send(COMPLETIONS, method="HEAD").body == b""
    for length in ("", "-1", "x", "1" * 20):
        with socket.create_connection(("127.0.0.1", server.server_port), 60) as client:
            client.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode())
            assert b" 411 " in client.makefile("rb").readline()


def test_failures_get_500_and_the_server_goes_on(server: CompletionServer, send, monkeypatch) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError("a\n\x1b[2J")

    with monkeypatch.context() as patch:
        patch.setattr(server.writer, "write", fail)
        answered(send(COMPLETIONS, ask()), 500, r"unexpected ZeroDivisionError: a\n\x1b[2J")
        stream = send(COMPLETIONS, ask(stream=True))
        assert stream.status == 200
        assert json.loads(stream.body.removeprefix(b"data: "))["error"]["type"] == "server_error"
    assert send(COMPLETIONS, ask()).status == 200


def test_a_full_queue_gets_503(server: CompletionServer, send, monkeypatch) -> None:
    monkeypatch.setattr(server, "_waiting", threading.BoundedSemaphore(1))
    with server.turn():
        answered(send(COMPLETIONS, ask()), 503, "requests: expected at most")
    assert send(COMPLETIONS, ask()).status == 200


def test_a_client_that_leaves_ends_its_answer(server: CompletionServer, send, capsys) -> None:
    body = json.dumps(ask(stream=True, max_tokens=50)).encode()
    with socket.create_connection(("127.0.0.1", server.server_port), 60) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    assert send(COMPLETIONS, ask()).status == 200
    assert "Traceback" not in capsys.readouterr().err


def test_a_client_that_stops_sending_is_let_go(server: CompletionServer, monkeypatch, capsys) -> None:
    assert http_api.Handler.timeout == http_api.SOCKET_SECONDS
    monkeypatch.setattr(http_api.Handler, "timeout", 0.1)
    with socket.create_connection(("127.0.0.1", server.server_port), 20) as client:
        client.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nContent-Length: 9\r\n\r\n{{".encode())
        assert client.recv(100) == b""
    assert "Traceback" not in capsys.readouterr().err


def test_sigterm_ends_it_after_the_answer_under_way(packed_model: Path) -> None:
    command = [sys.executable, "-m", "bbb_ao", "serve", str(packed_model), "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split("//")[1].split("/")[0]
        connection = http.client.HTTPConnection(address, timeout=60)
        connection.request("POST", COMPLETIONS, json.dumps(ask(max_tokens=56, draft_bits=2, draft_tokens=1)))
        time.sleep(0.2)
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        response = connection.getresponse()
        assert response.status == 200
        assert json.loads(response.read())["choices"]
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert time.monotonic() - start < http_api.CLOSING_SECONDS
    assert out == "stopped\n"
    assert "Traceback" not in err


def test_addresses_that_are_taken_are_refused(server: CompletionServer, refused, packed_model: Path) -> None:
    assert "address: expected a free one" in refused(5, "serve", packed_model, "--port", server.server_port)
    assert "expected a directory" in refused(3, "serve", packed_model / "config.json")
