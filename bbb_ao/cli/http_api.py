"""A subset of OpenAI's completion API over the standard library's HTTP server.

Requests are checked as they arrive and answered one after another: one generation keeps a device busy.
"""

import json
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from bbb_ao.cli.completion import Completion, Request, Writer
from bbb_ao.cli.entry import escape, explain
from bbb_ao.errors import BitByBitError, ResourceError

MOST_BYTES = 2**20  # of a request's body
MOST_WAITING = 16  # requests, the one that is answered included
SOCKET_SECONDS = 30  # that a client may take to send or to read
CLOSING_SECONDS = 10  # that the answer under way may take to end

COMPLETIONS, CHAT, MODELS = "/v1/completions", "/v1/chat/completions", "/v1/models"
METHODS = {COMPLETIONS: "POST", CHAT: "POST", MODELS: "GET"}


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Field(NamedTuple):
    """What a field of the body may hold, in words and as a test, and the attribute of `Request` that it sets."""

    expected: str
    holds: Callable[[Any], bool]
    sets: str | None = None


def _number(low: float, high: float, *types: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, types) and not isinstance(value, bool) and low <= value <= high


def _messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and item.keys() == {"role", "content"} for item in value)
        and all(isinstance(text, str) for item in value for text in item.values())
    )


TOKENS = Field("a whole number of at least 1", _number(1, 2**31, int), "max_new_tokens")
FIELDS = {
    "model": Field("text", lambda value: isinstance(value, str)),
    "user": Field("text", lambda value: isinstance(value, str)),
    "n": Field("1", lambda value: value == 1 and not isinstance(value, bool)),
    "stream": Field("true or false", lambda value: isinstance(value, bool)),
    "max_tokens": TOKENS,
    "temperature": Field("a number from 0 to 100", _number(0, 100, int, float), "temperature"),
    "seed": Field("a whole number from 0 to 2**63 - 1", _number(0, 2**63 - 1, int), "seed"),
    "bits": Field("a whole number", _number(0, 2**31, int), "bits"),
    "draft_bits": Field("a whole number", _number(0, 2**31, int), "draft_bits"),
    "draft_tokens": Field("a whole number from 1 to 64", _number(1, 64, int), "draft_tokens"),
}
PROMPTS = {
    COMPLETIONS: {"prompt": Field("text", lambda value: isinstance(value, str), "prompt")},
    CHAT: {
        "messages": Field("a list of objects with role and content, both text", _messages, "prompt"),
        "max_completion_tokens": TOKENS,
    },
}


def parse(path: str, body: bytes) -> tuple[Request, bool]:
    """A request's body as (what to write, whether to stream it).

    Raises:
        Refusal: 400, in words that name the field.
    """

    def refuse(field: str, expected: str, got: str) -> Refusal:
        return Refusal(HTTPStatus.BAD_REQUEST, f"{field}: expected {expected}, got {got}")

    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise refuse("body", "JSON", "something else") from None
    if not isinstance(data, dict):
        raise refuse("body", "a JSON object", type(data).__name__)
    fields = FIELDS | PROMPTS[path]
    needed = next(iter(PROMPTS[path]))
    if needed not in data:
        raise refuse(needed, fields[needed].expected, "none")
    settings: dict[str, Any] = {}
    for name, value in data.items():
        if name not in fields:
            raise refuse(f"{name[:80]!r}", f"one of {', '.join(fields)}", "an unknown field")
        # null is what is left out.
        if value is None and name != needed:
            continue
        if not fields[name].holds(value):
            raise refuse(name, fields[name].expected, json.dumps(value)[:80])
        if sets := fields[name].sets:
            settings[sets] = value
    return Request(**settings), bool(data.get("stream"))


class CompletionServer(ThreadingHTTPServer):
    """One `Writer` behind HTTP.

    Attributes:
        writer: used by one request at a time; name: of the model.
    """

    daemon_threads = True

    def __init__(self, writer: Writer, name: str, address: tuple[str, int]) -> None:
        self.writer, self.name = writer, name
        self._turn = threading.Lock()
        self._waiting = threading.BoundedSemaphore(MOST_WAITING)
        super().__init__(address, Handler)

    @contextmanager
    def turn(self) -> Iterator[Writer]:
        """The writer, for one request at a time.

        Raises:
            Refusal: 503, too many wait, or the server is about to stop.
        """
        waiting = self._waiting  # what is acquired is released, whatever stands there then
        if not waiting.acquire(blocking=False):
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, f"requests: expected at most {MOST_WAITING}, got more")
        try:
            with self._turn:
                if self.writer.closing.is_set():
                    raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "server: expected it to run, got it stopping")
                yield self.writer
        finally:
            waiting.release()

    def finish(self) -> None:
        """End the answer that is being written with its next token, and wait until it is sent."""
        self.writer.closing.set()
        if self._turn.acquire(timeout=CLOSING_SECONDS):
            self._turn.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One line where a connection breaks."""
        sys.stderr.write(f"{client_address[0]}: {escape(repr(sys.exception()))}\n")


def listen(writer: Writer, directory: str, host: str, port: int) -> CompletionServer:
    """A server that is bound to its address; `serve_forever` answers.

    Raises:
        ResourceError: the address is taken, or none of this machine.
    """
    try:
        return CompletionServer(writer, Path(directory).resolve().name, (host, port))
    except OSError as error:
        reason = f"expected a free one of this machine, got: {error.strerror}"
        raise ResourceError(f"{host}:{port}: address: {reason}; fix: change --port") from None


class Handler(BaseHTTPRequestHandler):
    """One request; every failure is a JSON error with its status."""

    server: CompletionServer  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version = "bbb-ao"
    sys_version = ""
    timeout = SOCKET_SECONDS
    streaming = False
    number = ""  # of the completion, the same in all of its pieces

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = do_GET

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class finds wrong with a request's first lines."""
        self._error(HTTPStatus(code), message or HTTPStatus(code).phrase)

    def _answer(self) -> None:
        try:
            # Read first: a connection that is closed on unread bytes loses its answer.
            self._route(self._body())
        except Refusal as refusal:
            self._error(refusal.status, str(refusal))
        except (ConnectionError, TimeoutError):
            # The client left.
            raise
        except BitByBitError as error:
            self._error(HTTPStatus.BAD_REQUEST, str(error))
        except Exception as error:  # noqa: BLE001  the outermost door of a request
            self._error(HTTPStatus.INTERNAL_SERVER_ERROR, explain(error)[1])

    def _route(self, body: bytes | None) -> None:
        path = self.path.partition("?")[0]
        if path not in METHODS:
            raise Refusal(HTTPStatus.NOT_FOUND, f"path: expected one of {', '.join(METHODS)}, got {path[:80]!r}")
        if self.command != METHODS[path]:
            raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, f"method: expected {METHODS[path]}, got {self.command}")
        if path == MODELS:
            entry = {"id": self.server.name, "object": "model", "bits": self.server.writer.widths}
            self._json(HTTPStatus.OK, {"object": "list", "data": [entry]})
            return
        if body is None:
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "Content-Length: expected a number of bytes, got none")
        request, stream = parse(path, body)
        # Refused before it waits for its turn.
        self.server.writer.prepare(request)
        chat = path == CHAT
        self.number = f"{'chat' * chat}cmpl-{uuid.uuid4().hex}"
        with self.server.turn() as writer:
            if not stream:
                done = writer.write(request, lambda text: None)
                self._json(HTTPStatus.OK, self._completion(chat, done.text, done))
                return
            self.streaming = True
            self._head(HTTPStatus.OK, "text/event-stream")
            done = writer.write(request, lambda text: self._event(self._completion(chat, text, None)))
            self._event(self._completion(chat, "", done))
            self.wfile.write(b"data: [DONE]\n\n")

    def _body(self) -> bytes | None:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or len(length) > 12:
            return None
        if int(length) > MOST_BYTES:
            for _ in range(min(int(length), 16 * MOST_BYTES) // MOST_BYTES):
                self.rfile.read(MOST_BYTES)
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"body: expected at most {MOST_BYTES} bytes, got more")
        return self.rfile.read(int(length))

    def _completion(self, chat: bool, text: str, done: Completion | None) -> dict[str, Any]:
        """An answer, or a piece of one; `done` is None before its end."""
        kind = "chat.completion" if chat else "text_completion"
        choice: dict[str, Any] = {"index": 0, "finish_reason": done and done.finish}
        if chat:
            choice["delta" if self.streaming else "message"] = {"role": "assistant", "content": text}
            kind += ".chunk" * self.streaming
        else:
            choice["text"] = text
        answer: dict[str, Any] = {"id": self.number, "object": kind, "created": int(time.time())}
        answer |= {"model": self.server.name, "choices": [choice]}
        if done:
            total = done.prompt_tokens + done.tokens
            used = {"prompt_tokens": done.prompt_tokens, "completion_tokens": done.tokens, "total_tokens": total}
            answer |= {"usage": used, "summary": done.summary}
        return answer

    def _error(self, status: HTTPStatus, message: str) -> None:
        kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        error = {"error": {"message": escape(message), "type": kind, "code": status.value}}
        if self.streaming:
            self._event(error)
        else:
            self._json(status, error)

    def _json(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self._head(status, "application/json", len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _event(self, content: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")

    def _head(self, status: HTTPStatus, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
