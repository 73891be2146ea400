"""A vision model behind an OpenAI-compatible endpoint, over the standard library's HTTP.

Whatever the endpoint does, a comparison ends: in time, with a verdict that says what went wrong. The key goes nowhere but
into the header of the requests.
"""

import base64
import email.utils
import http.client
import io
import json
import os
import queue
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from time import sleep, time
from typing import Any, TypeVar, cast

from PIL.Image import Image

from ..errors import UserError
from . import Verdict, wording

T = TypeVar("T")

URL, KEY = "OPENAI_BASE_URL", "OPENAI_API_KEY"
MODEL = "Qwen/Qwen2.5-VL-72B-Instruct"
"""The paper's judge; it found the model of 7B parameters too unreliable."""
LARGEST_ANSWER = 1 << 20
"""Bytes of an answer that are read; a verdict has a few hundred."""
LONGEST_PROBE = 15.0
BROKEN = (OSError, http.client.HTTPException, ValueError)
"""What connections, protocols and texts fail with. URLError is an OSError, broken JSON and UTF-8 are ValueErrors."""


class Failure(Exception):
    """A request that gave nothing usable."""

    def __init__(self, reason: str, *, again: bool, wait: float | None = None, status: int | None = None):
        super().__init__(reason)
        self.again = again
        """Whether the same request may succeed later."""
        self.wait = wait
        """Seconds that the server asked to wait."""
        self.status = status


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would carry key and pictures to another host."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class Http:
    """Asks an endpoint. ``open`` makes one from the environment."""

    base: str
    """URL before ``/chat/completions``."""
    model: str
    key: str = field(default="", repr=False)
    timeout: float = 60.0
    """Seconds that one request may take, whole."""
    tries: int = 3
    pause: float = 1.0
    """Seconds before the second try; twice as many before the third."""
    longest_pause: float = 30.0
    """Also where the server asks for more."""

    @property
    def name(self) -> str:
        return f"http {self.model}"

    @classmethod
    def open(cls, *, model: str | None = None, timeout: float = 60.0) -> "Http":
        """The endpoint that the environment names, if it is there and takes the key.

        Raises:
            UserError: no URL, an unusable one, no answer, or a refused key.
        """
        base, key = os.environ.get(URL, "").strip(), os.environ.get(KEY, "").strip()
        if not base:
            raise UserError(
                f"judge=http: set {URL} to an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1, and {KEY} to"
                " its key if it wants one"
            )
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise UserError(f"judge=http: {KEY} holds characters that no key has; copy it again")
        judge = cls(base=_checked(base), key=key, model=model or MODEL, timeout=timeout)
        judge.probe()
        return judge

    def probe(self) -> None:
        """Ask for the list of models, which costs nothing; an endpoint that has none is fine.

        Raises:
            UserError: nothing answers at the URL, or the key is refused.
        """
        try:
            self._send("/models", None, min(self.timeout, LONGEST_PROBE))
        except Failure as failure:
            if failure.status in (401, 403):
                having = f"the key in {KEY}" if self.key else f"requests without a key ({KEY} is not set)"
                raise UserError(f"judge=http: {self._host} refuses {having}: {failure}") from failure
            if failure.status is None and failure.again:
                raise UserError(f"judge=http: {failure}; check {URL}, and that the server runs") from failure

    def compare(self, source: Image, first: Image, second: Image, instruction: str) -> Verdict:
        """Ask which candidate is better; once more if the answer names none."""
        messages = _messages(source, first, second, instruction)
        raw = ""
        for _ in range(2):
            try:
                raw = self._hidden(self._ask(messages))
            except Failure as failure:
                return Verdict(choice=None, reason=str(failure), raw=raw)
            answer = wording.read(raw)
            if answer is not None:
                return Verdict(choice=answer[0], reason=answer[1], raw=raw)
            messages = [*messages, _said("assistant", raw or "..."), _said("user", wording.AGAIN)]
        return Verdict(choice=None, reason=f"the answer names neither candidate: {raw[:200]!r}", raw=raw)

    def _ask(self, messages: list[dict[str, Any]]) -> str:
        """The model's text, after as many tries as are allowed."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": 512,
        }
        for number in range(1, self.tries + 1):
            try:
                return _content(self._send("/chat/completions", body, self.timeout))
            except Failure as failure:
                if failure.status == 400 and "temperature" in body:
                    # Models that think before they answer refuse these; with the defaults they answer.
                    del body["temperature"], body["max_tokens"]
                elif not failure.again or number == self.tries:
                    tried = f" ({number} tries)" if number > 1 else ""
                    raise Failure(f"{failure}{tried}", again=False) from failure
                else:
                    sleep(self._wait(failure, number))
        raise Failure("the endpoint refused the request", again=False, status=400)

    def _wait(self, failure: Failure, number: int) -> float:
        wanted = self.pause * 2 ** (number - 1) if failure.wait is None else failure.wait
        return max(0.0, min(self.longest_pause, wanted))

    def _send(self, path: str, body: dict[str, Any] | None, seconds: float) -> bytes:
        """The answer of one request; ``Failure`` for everything else."""
        headers = {
            "Accept": "application/json",
            "Content-Type": "application/json",
            "User-Agent": "pentimento",
        }
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, headers)

        try:
            status, answered, answer = _within(seconds, lambda: _exchange(request, seconds))
        except TimeoutError as error:
            raise Failure(f"{self._host} did not answer within {seconds:g} s", again=True) from error
        except BROKEN as error:
            said = str(getattr(error, "reason", "") or error) or type(error).__name__
            raise Failure(f"{self._host}: {self._hidden(said)}", again=True) from error
        if status != 200:
            raise self._refusal(status, answered, answer)
        if len(answer) > LARGEST_ANSWER:
            raise Failure(f"{self._host} sent over {LARGEST_ANSWER} bytes", again=False, status=status)
        return answer

    def _refusal(self, status: int, headers: Message, answer: bytes) -> Failure:
        phrase = http.client.responses.get(status, "")
        said = _error_message(answer)
        if 300 <= status < 400 and headers["Location"]:
            said = f"it redirects to {headers['Location']}; set {URL} to where it leads"
        reason = f"{self._host} answered {status} {phrase}".strip() + (f": {said}" if said else "")
        again = status in (408, 409, 425, 429) or status >= 500
        return Failure(self._hidden(reason), again=again, wait=_retry_after(headers), status=status)

    @property
    def _host(self) -> str:
        parts = urllib.parse.urlsplit(self.base)
        return f"{parts.scheme}://{parts.netloc}"

    def _hidden(self, text: str) -> str:
        """Without the key, which some endpoints repeat when they refuse it."""
        return text.replace(self.key, "***") if self.key else text


def _checked(base: str) -> str:
    try:
        parts = urllib.parse.urlsplit(base)
        usable = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and (parts.port is None or parts.port > 0)
        )
    except ValueError:  # a port that is no number
        usable = False
    if not usable or parts.username or parts.query or parts.fragment:
        raise UserError(
            f"judge=http: {URL} should be an address such as http://127.0.0.1:8000/v1, without user, password and"
            " parameters; the key belongs into OPENAI_API_KEY"
        )
    return base.rstrip("/").removesuffix("/chat/completions")


def _exchange(request: urllib.request.Request, seconds: float) -> tuple[int, Message, bytes]:
    """Status, headers and the beginning of the body, whatever the status is."""
    opener = urllib.request.build_opener(_Stay())
    try:
        with opener.open(request, timeout=seconds) as response:
            return response.status, response.headers, response.read(LARGEST_ANSWER + 1)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read(LARGEST_ANSWER)


def _within(seconds: float, work: Callable[[], T]) -> T:
    """The result of ``work``, or ``TimeoutError``: a socket's own limit starts anew with every byte that drips in."""
    results: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((work(), None))
        except BROKEN as error:
            results.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        # urllib wraps a time-out while connecting, and only that.
        if isinstance(error, urllib.error.URLError) and isinstance(error.reason, TimeoutError):
            raise TimeoutError from error
        raise error
    return cast(T, value)


def _retry_after(headers: Message) -> float | None:
    """Seconds that the server asks to wait: a number, or a date."""
    value = headers["Retry-After"]
    if value is None:
        return None
    try:
        return float(value)
    except ValueError:
        try:
            return email.utils.parsedate_to_datetime(value).timestamp() - time()
        except ValueError:
            return None


def _error_message(answer: bytes) -> str:
    """What an endpoint says of its refusal, if it says it as OpenAI does."""
    try:
        error = json.loads(answer)["error"]
        return " ".join(str(error["message"] if isinstance(error, dict) else error).split())[:200]
    except (ValueError, KeyError, TypeError):
        return ""


def _content(answer: bytes) -> str:
    """The text of a chat completion."""
    try:
        content = json.loads(answer)["choices"][0]["message"]["content"]
        if isinstance(content, list):
            content = " ".join(part["text"] for part in content if part.get("type") == "text")
        if isinstance(content, str):
            return content
        reason = f"its message holds {type(content).__name__} instead of text"
    except ValueError:
        reason = f"it is {_kind(answer)}"
    except (KeyError, IndexError, TypeError, AttributeError):
        reason = _error_message(answer) or "it lacks choices[0].message.content"
    raise Failure(f"the answer is no chat completion: {reason}", again=True, status=200)


def _kind(answer: bytes) -> str:
    start = answer.lstrip()[:16].lower()
    if start.startswith((b"\x89png", b"\xff\xd8", b"gif8", b"riff")):
        return "a picture"
    if start.startswith(b"<"):
        return "a web page"
    return "broken JSON" if start.startswith((b"{", b"[")) else "text without JSON" if start else "empty"


def _said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _messages(source: Image, first: Image, second: Image, instruction: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for caption, picture in zip(wording.ORDER, (first, second, source), strict=True):
        parts.append({"type": "text", "text": caption})
        parts.append({"type": "image_url", "image_url": {"url": _data_url(picture)}})
    parts.append({"type": "text", "text": wording.question(instruction)})
    return [_said("system", wording.ROLE), _said("user", parts)]


def _data_url(picture: Image) -> str:
    buffer = io.BytesIO()
    wording.shown(picture).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
