#!/usr/bin/env python3
"""An OpenAI-compatible server for the Claude Pro/Max subscription you already have.

    python3 claude_max_proxy.py                      # serves http://127.0.0.1:3456
    curl http://localhost:3456/v1/chat/completions \\
      -d '{"model":"sonnet","messages":[{"role":"user","content":"Hello!"}]}'

It runs your logged-in Claude Code CLI (`claude -p`), one process for each answer, and
offers OpenAI's Chat Completions and Responses APIs: streamed or not, with tools, images
and structured output. It is one file, and needs only the standard library.

How a request is handled:

    client ──HTTP──► Handler.handle_request()     one thread for each connection
                        │ check_access(), read_json()
                        │ parse_chat() or parse_response() → Request
                        ▼
                     Generation.events()          one for each request
                        │ RequestQueue: waits for a free place
                        │ ProcessPool:  takes a spare process, or starts one
                        │    stdin:  initialize, the earlier turns, the last turn
                        │    stdout: events of the Messages API, one JSON line each
                        │ OutputReader: waits for the CLI's pipes and the client
                        │ AnswerDecoder: CLI line → events, and the Answer
                        ▼
    client ◄──SSE─── Handler.stream()             ChatWriter or ResponseWriter:
    client ◄──JSON── Handler.answer_request()     events → chunks, or one body

Threads: the main thread runs Server.run(). It accepts connections and manages the
processes that are not answering: it starts spare ones, sends them conversations that
will probably go on, and reaps those that have ended. Each connection has a thread of
its own. One more thread checks the installation when the server starts.

Security: the server listens on loopback. It checks Host, Origin and Sec-Fetch-Site, so
that pages of other sites cannot spend your plan. Only a checked model id of a request
reaches the command line. The CLI runs in an empty private directory, without its own
tools, and without your settings, hooks and MCP servers; `@file` in a prompt is not
expanded. Prompts are never logged. When a client disconnects, its CLI is stopped; when
the server stops, all of them are.

Sections: Limits · Errors · Logging · Settings · JSON values · Tool schemas ·
Answer cache · Models · Request parsing · Tools and tool choice · Conversation ·
Content · CLI protocol · Decoding · Writers · Installation · CLI process ·
Process pool · Generation · Plan and usage · Service · HTTP · Main · Page

MIT license, see LICENSE.
"""

from __future__ import annotations  # a SyntaxError here: Python 3.9 or newer is needed

import argparse
import base64
import binascii
import collections
import contextlib
import dataclasses
import fcntl
import functools
import glob
import hashlib
import hmac
import http.client
import http.server
import io
import ipaddress
import json
import math
import os
import py_compile
import re
import resource
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from types import FrameType
from typing import Any, NamedTuple, Union

if sys.version_info < (3, 9):  # noqa: UP036  (an older Python must be told)
    sys.exit(
        "claude_max_proxy: Python 3.9 or newer is required; "
        f"this is {sys.version.split()[0]}"
    )

__version__ = "1.1.0"

Json = dict[str, Any]

# ── Limits ───────────────────────────────────────────────────────────────────────
# Sizes are in bytes, tokens or characters, as their names say; times are in seconds.

MAX_BODY_BYTES = 32 << 20  # the Messages API refuses larger requests
MAX_READ_AHEAD_BYTES = 1 << 16  # read from a client while it waits for its answer
MAX_CLI_LINE_BYTES = 64 << 20  # a longer line from the CLI is an error
MAX_REMEMBERED_BYTES = 64 << 20  # size of AnswerCache
REQUEST_SECONDS = 30  # a client has this long for its headers, and again for its body
IDLE_CONNECTION_SECONDS = 120  # an idle keep-alive connection is closed after this
WRITE_SECONDS = 60  # timeout of one write to a client
KEEPALIVE_SECONDS = 10  # a silent stream gets an event that changes nothing this often
POLL_SECONDS = 0.5  # the longest wait of the main loop and of a waiting request
TERMINATE_SECONDS = 1.0  # from SIGTERM to SIGKILL
DRAIN_SECONDS = 2.0  # grace period for running answers when the server stops
SPARE_SECONDS = 600  # a spare process is replaced when it is older than this
STARTUP_SECONDS = 3  # a CLI older than this has started, even on a slow machine
NEW_SPARE_SECONDS = 1.0  # a spare younger than this is probably still starting
SPARE_SILENCE_SECONDS = 10  # a spare that prints nothing after it got a query is dead
IDLE_CONVERSATION_SECONDS = 60  # an idle conversation loses its spare after this
NO_REQUEST_SECONDS = 3600  # without any request for this long, spares are not renewed
RESTART_SECONDS = 60  # the longest pause between two starts of a CLI that keeps dying
PLAN_LIMIT_SECONDS = 60  # a 429 with a longer wait is the plan's limit, not throttling
RATE_LIMIT_EVENT_SECONDS = 0.1  # how long to wait for this event after an answer
PROBE_SECONDS = 1  # pause between two searches for a CLI that can't be used
LOGIN_CHECK_SECONDS = 5  # pause between two checks of the login while logged out
LOGIN_REFUSED_SECONDS = 60  # after a 401, report "not logged in" without a new check
MODELS_SECONDS = 10  # how long the banner and --check wait for the CLI's models
CLI_COMMAND_SECONDS = 20  # timeout of a short question to the CLI, or to /health
MAX_WAITING = 500  # requests in the queue; each holds a thread and its body
MAX_CHOICES = 8  # maximum of `n`; each choice needs a CLI process
MAX_TOKENS = 10**9  # the CLI lowers it to the model's own maximum
MIN_THINKING_TOKENS = 2048  # a smaller max_tokens leaves no room for thinking
MIN_BUDGET_TOKENS = 4096  # the same for models with a thinking budget (BUDGET_MODEL)
MAX_DESCRIPTION_LENGTH = 2048  # CLIs up to 2.1.197 truncate longer tool descriptions
MAX_KNOWN_CONVERSATIONS = 2000  # remembered by their hash, to recognize a next turn
OLDEST_CLI = (2, 1, 112)  # the first with shouldQuery and initialize.systemPrompt
CLI_WITH_TEXT_NOT_TYPED = (2, 1, 330)  # older ones ignore `text_not_typed`
CLI_WITH_LATE_MODEL = (2, 1, 329)  # the model can be changed after the start


# ── Errors ───────────────────────────────────────────────────────────────────────
# Any code may raise APIError; Handler sends it to the client. To map another failure of
# the CLI, add its status or name to one of the FAILURES tables.

ERROR_TYPES_BY_STATUS = {  # all others are "invalid_request_error"
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "api_error",
    502: "api_error",
    503: "service_unavailable",
    504: "timeout_error",
}
ERROR_TYPES_BY_CODE = {  # these take precedence
    "server_is_overloaded": "overloaded_error",
    "insufficient_quota": "insufficient_quota",
}


class APIError(Exception):
    """An error that the client gets, in the form of OpenAI's errors.

    `param` is the path of the parameter at fault. `headers` are added to the HTTP
    response. `resets_at` (epoch seconds) is set if a limit of the plan is used up.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers: dict[str, str] = {}
        if headers is not None:
            self.headers.update(headers)
        self.resets_at: int | None = None

    @property
    def type(self) -> str:
        if self.resets_at is not None:
            return "usage_limit_reached"  # Codex stops at this type; else it waits
        if self.code in ERROR_TYPES_BY_CODE:
            return ERROR_TYPES_BY_CODE[self.code]
        return ERROR_TYPES_BY_STATUS.get(self.status, "invalid_request_error")

    def to_json(self) -> Json:
        """The value of "error" in the response."""
        error: Json = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        if self.resets_at is not None:
            error["resets_at"] = self.resets_at
        return error


class DisconnectedError(Exception):
    """The client has closed the connection."""


class Failure(NamedTuple):
    """The HTTP status and the error code for a failure of the CLI or the API."""

    status: int
    code: str | None


INVALID_REQUEST = Failure(400, None)
CONTEXT_TOO_LONG = Failure(400, "context_length_exceeded")
NOT_LOGGED_IN = Failure(401, "not_logged_in")
MODEL_NOT_FOUND = Failure(404, "model_not_found")
RATE_LIMITED = Failure(429, "rate_limit_exceeded")
OVERLOADED = Failure(503, "server_is_overloaded")
UPSTREAM_ERROR = Failure(502, "upstream_error")

FAILURES_BY_REASON = {  # the `terminal_reason` of a result line
    "prompt_too_long": CONTEXT_TOO_LONG,
    "blocking_limit": CONTEXT_TOO_LONG,
}
FAILURES_BY_STATUS = {  # the HTTP status of the Messages API
    400: INVALID_REQUEST,
    401: NOT_LOGGED_IN,
    403: Failure(403, "permission_denied"),
    404: MODEL_NOT_FOUND,
    413: Failure(413, "request_too_large"),
    429: RATE_LIMITED,
    500: UPSTREAM_ERROR,
    503: OVERLOADED,
    504: Failure(504, "upstream_timeout"),
    529: OVERLOADED,
}
FAILURES_BY_CATEGORY = {  # the `error` of an assistant line
    "invalid_request": INVALID_REQUEST,
    "authentication_failed": NOT_LOGGED_IN,
    "model_not_found": MODEL_NOT_FOUND,
    "rate_limit": RATE_LIMITED,
    "billing_error": Failure(429, "insufficient_quota"),
    "overloaded": OVERLOADED,
}

LOGIN_REMEDY = (
    "Claude Code is not logged in: run `claude auth login`, then try again. "
    "(If CLAUDE_CODE_OAUTH_TOKEN is set, renew it with `claude setup-token`.)"
)
MODEL_REMEDY = (
    "The model does not exist, or your plan does not include it. "
    "GET /v1/models lists the models that you can use."
)


def upstream_error(
    reason: Any, api_status: Any, category: Any, text: str, wait: float, now: float
) -> APIError:
    """Make the APIError for a failure that the CLI reports.

    `reason`, `api_status` and `category` are keys of the FAILURES tables, in this order
    of precedence, except that a failed authentication comes first. `text` is the CLI's
    own message. `wait` is the number of
    seconds until a limit ends (0 if it is not known), `now` is the time in epoch
    seconds.
    """
    failure = UPSTREAM_ERROR
    if category == "authentication_failed":  # the API may answer it with a 403
        failure = NOT_LOGGED_IN
    elif reason in FAILURES_BY_REASON:
        failure = FAILURES_BY_REASON[reason]
    elif api_status in FAILURES_BY_STATUS:
        failure = FAILURES_BY_STATUS[api_status]
    elif category in FAILURES_BY_CATEGORY:
        failure = FAILURES_BY_CATEGORY[category]
    error = APIError(failure.status, text, failure.code)
    if failure is NOT_LOGGED_IN:
        error.message = login_message(api_status, text)
    elif failure is MODEL_NOT_FOUND:
        error.message = MODEL_REMEDY
        error.param = "model"
    elif not text:
        error.message = "The Claude API answered with an error."
    if failure.status == 429 and wait > 0:
        error.headers["Retry-After"] = str(math.ceil(wait))
        if wait > PLAN_LIMIT_SECONDS:
            error.resets_at = int(now + wait)
    return error


def login_message(api_status: Any, text: str) -> str:
    """The message for a refused login. A 403 has its own reasons, such as a disabled
    organization or a missing scope. The CLI's text names them."""
    if api_status == 403:
        return (
            f"The Claude API refused this login: {text} "
            "If it is not the login you want, run `claude auth login`."
        )
    return LOGIN_REMEDY


def unexpected_line_error() -> APIError:
    message = "Claude Code printed a line in a format that this server does not know."
    return APIError(502, message, "unexpected_line")


# Exceptions raised by code that reads a CLI line of unexpected shape.
MALFORMED_LINE_ERRORS = (
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
    ArithmeticError,
    RecursionError,
)


# ── Logging ──────────────────────────────────────────────────────────────────────
# Everything goes to stderr. Callers must not pass a request's text.


def ascii_only(text: str) -> str:
    """Replace spaces and all but printable ASCII by "?", so that `text` stays one field
    of a log line."""
    return re.sub(r"[^!-~]", "?", text)


def log(text: str) -> None:
    """Write one sanitized line to stderr. Callers must not pass prompt text."""
    words = [time.strftime("%Y-%m-%dT%H:%M:%S")]
    words += [ascii_only(word) for word in text.split()]
    print_to_stderr(" ".join(words))


def print_to_stderr(text: str) -> None:
    """Print to stderr, or give up on it: it may be closed, or on a full disk. A stderr
    that fails is replaced by /dev/null, because Python would fail to flush it at the
    end, and exit with 120."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        sys.stderr = open(os.devnull, "w")


def log_exception(error: BaseException) -> None:
    """Log the type and the place of an exception, but not its message, which may hold
    prompt text."""
    place = "unknown place"
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == log_exception.__code__.co_filename:  # it is in this file
            place = f"{frame.name}, line {frame.lineno}"
    log(f"internal error: {type(error).__name__} in {place}")


# ── Settings ─────────────────────────────────────────────────────────────────────
# To add an option, add a field to Settings: its flag, environment variable, default and
# help text follow from it.

ENVIRONMENT_PREFIX = "CLAUDE_MAX_PROXY_"


def number_in_range(kind: type, minimum: float, maximum: float) -> Callable[[str], Any]:
    """A parser for an option: a number from `minimum` to `maximum`."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if minimum <= value <= maximum:
                return value
        number = "an integer" if kind is int else "a number"
        message = f"must be {number} from {minimum:g} to {maximum:.10g}, not '{text}'"
        raise argparse.ArgumentTypeError(message)

    return parse


def yes_or_no(text: str) -> bool:
    """A parser for a switch that is set by an environment variable."""
    word = text.strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"must be yes or no, not '{text}'")


def option(default: Any, description: str, parse: Callable[[str], Any] = str) -> Any:
    metadata = {"help": description, "parse": parse}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of the command line. The names of the fields are those of the flags
    (`--api-key`) and of the environment variables (`CLAUDE_MAX_PROXY_API_KEY`)."""

    host: str = option(
        "127.0.0.1",
        "address to listen on; any address but loopback requires --api-key",
    )
    port: int = option(3456, "port to listen on", number_in_range(int, 0, 65535))
    api_key: str = option(
        "", "require this key from clients (`Authorization: Bearer KEY`)"
    )
    allow_origin: str = option(
        "", "additional web origins that may send requests, separated by commas"
    )
    allow_host: str = option(
        "",
        "additional host names of this server, separated by commas; needs --api-key",
    )
    claude: str = option(
        "", "path of the `claude` command, if it is not found automatically"
    )
    max_concurrency: int = option(
        8,
        "maximum number of answers generated at once (one CLI process each)",
        number_in_range(int, 1, 1000),
    )
    spares: int = option(
        3,
        "idle CLI processes kept ready (about 150 MB each)",
        number_in_range(int, 0, 100),
    )
    timeout: float = option(
        600.0,
        "seconds without output from Claude before a request fails with 504",
        number_in_range(float, 0.1, 1e6),
    )
    plan_limit: float = option(
        100.0,
        "refuse requests when this percentage of a plan limit is used; 0: never",
        number_in_range(float, 0, 100),
    )
    verbose: bool = option(False, "also log how a failed CLI ended", yes_or_no)


OPTIONS = {field.name: field for field in dataclasses.fields(Settings)}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> Any:
        """Print only the error; the long usage text would hide it."""
        print_to_stderr(f"claude_max_proxy: {message}")
        sys.exit(2)


def version_and_hash() -> str:
    """The version, and a part of this file's hash, to identify a copied file."""
    with open(__file__, "rb") as source:
        digest = hashlib.sha256(source.read()).hexdigest()
    return f"claude_max_proxy {__version__} ({digest[:12]})"


def make_parser() -> Parser:
    parser = Parser(
        prog="claude_max_proxy.py",
        description="OpenAI-compatible server for your Claude subscription.",
        epilog="Every option can also be set as an environment variable, "
        f"{ENVIRONMENT_PREFIX}NAME. Set the API key that way: `ps` shows command lines "
        "to other users.",
    )
    parser.add_argument("--version", action="version", version=version_and_hash())
    parser.add_argument(
        "--check", action="store_true", help="check the installation and exit"
    )
    for name, field in OPTIONS.items():
        add_option(parser, "--" + name.replace("_", "-"), field)
    return parser


def add_option(parser: Parser, flag: str, field: dataclasses.Field[Any]) -> None:
    """Add the flag. Its default is None, so that parse_options() can tell that it was
    not given, and take the environment's value."""
    description = field.metadata["help"]
    if field.default is False:
        parser.add_argument(flag, action="store_true", default=None, help=description)
        return
    if field.default != "":
        description = (
            f"{description} (default: {field.default:g})"
            if isinstance(field.default, (int, float))
            else f"{description} (default: {field.default})"
        )
    parser.add_argument(
        flag,
        type=field.metadata["parse"],
        metavar=field.name.upper(),
        help=description,
    )


def parse_options(argv: list[str]) -> tuple[Settings, bool]:
    """Flags override environment variables, which override defaults.

    Returns the settings, and whether --check was given. Exits with 2 if they are wrong.
    """
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    values = {}
    for name, field in OPTIONS.items():
        variable = ENVIRONMENT_PREFIX + name.upper()
        text = os.environ.get(variable)
        if given[name] is not None:
            values[name] = given[name]
        elif text:
            try:
                values[name] = field.metadata["parse"](text)
            except argparse.ArgumentTypeError as error:
                parser.error(f"{variable} {error}")
    settings = Settings(**values)
    if not settings.api_key:
        if not is_loopback(settings.host):
            parser.error(
                f"--host {settings.host} can be reached from other machines; "
                "--api-key is required"
            )
        if settings.allow_host:
            parser.error("--allow-host requires --api-key")
    return settings, given["check"]


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only mean this machine (RFC 6761, 6.3)."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return re.fullmatch(r"([a-z0-9-]+\.)*localhost\.?", host.lower()) is not None


# ── JSON values ──────────────────────────────────────────────────────────────────
# Parsing JSON, and reading its values with checks. Pure: no sockets, processes or
# clock.

JSON_TYPE_NAMES = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "a boolean",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


class JsonValue:
    """A JSON value of the request with its path, which errors report as `param`."""

    def __init__(self, value: Any, path: str = "") -> None:
        self.value = value
        self.path = path

    def get(self, key: str) -> JsonValue:
        """The member `key`; null if it is missing, or if this value is null. Raises
        APIError 400 if this value is neither an object nor null."""
        members = self.optional(dict)
        path = f"{self.path}.{key}" if self.path else key
        if members is None:
            return JsonValue(None, path)
        return JsonValue(members.get(key), path)

    def items(self) -> Iterator[JsonValue]:
        """The elements of this array; none if it is null. Raises APIError 400 if it is
        neither."""
        elements = self.optional(list)
        if elements is not None:
            for i, element in enumerate(elements):
                yield JsonValue(element, f"{self.path}[{i}]")

    def require(self, *types: type) -> Any:
        """The value. Raises APIError 400 if it has none of these types. A float without
        a fraction is an integer, too (JSON Schema 2020-12, 6.1.1)."""
        if type(self.value) in types:
            return self.value
        if int in types and type(self.value) is float and self.value.is_integer():
            return int(self.value)
        expected = " or ".join(JSON_TYPE_NAMES[kind] for kind in types)
        actual = JSON_TYPE_NAMES[type(self.value)]
        raise self.error(f"must be {expected}, not {actual}.", "invalid_type")

    def optional(self, *types: type) -> Any:
        """Like require(), but null is allowed, and returned as None."""
        if self.value is None:
            return None
        return self.require(*types)

    def error(self, problem: str, code: str | None = None) -> APIError:
        return APIError(400, f"'{self.path}' {problem}", code, self.path)


def finite_number(digits: str) -> float:
    """Parse a number. Raises ValueError for NaN, Infinity, and what overflows a
    float."""
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(digits)
    return value


def finite_integer(digits: str) -> int:
    """Parse an integer. Raises ValueError if it is too large for a float: the CLI,
    which is written in JavaScript, would turn it into Infinity."""
    value = int(digits)
    try:
        float(value)
    except OverflowError:
        raise ValueError(digits) from None
    return value


def load_json(text: str) -> Any:
    """Parse JSON. Lone surrogates become U+FFFD, because the API rejects them. Raises
    ValueError, also for NaN, Infinity and numbers too large for a float, which Python's
    parser accepts; and RecursionError if it is nested too deeply."""
    value = json.loads(
        text,
        parse_constant=finite_number,
        parse_float=finite_number,
        parse_int=finite_integer,
    )
    if re.search(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]", text):
        return without_lone_surrogates(value)
    return value


def without_lone_surrogates(value: Any) -> Any:
    """The JSON value with U+FFFD for each half of a surrogate pair in its strings."""
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\ufffd", value)
    if isinstance(value, list):
        return [without_lone_surrogates(element) for element in value]
    if isinstance(value, dict):
        return {
            without_lone_surrogates(key): without_lone_surrogates(member)
            for key, member in value.items()
        }
    return value


def parse_body(raw: bytes) -> Any:
    """The JSON of a request body, in UTF-8 (RFC 8259). Raises APIError 400, and
    RecursionError if it is nested too deeply."""
    try:
        return load_json(raw.decode("utf-8-sig"))
    except ValueError:
        problem = "is not valid JSON in UTF-8." if raw else "is empty."
        raise APIError(400, f"The request body {problem}") from None


def checked_type(holder: JsonValue, known: Iterable[str], default: str = "") -> str:
    """The member `type`, or `default`. Raises APIError 400 if it is not in `known`."""
    member = holder.get("type")
    name: str = default if member.value is None else member.require(str)
    if name not in known:
        if not name:
            raise member.error(f"is missing; use one of: {', '.join(known)}.")
        raise unsupported_type_error(member, known)
    return name


def unsupported_type_error(member: JsonValue, known: Iterable[str]) -> APIError:
    problem = f"is '{member.value[:50]}'. Supported: {', '.join(known)}."
    return member.error(problem, "unsupported_type")


# ── Tool schemas ─────────────────────────────────────────────────────────────────
# Converts a client's tool schema, of any draft of JSON Schema, to one that the Messages
# API and every CLI accept. Pure. To support another keyword, add a row to KEYWORDS.
#
# The API requires JSON Schema 2020-12, and an object at the top level. Claude Code
# 2.1.332 checks this itself, against the meta-schema of 2020-12, and silently drops a
# tool that fails. Keywords that 2020-12 does not know are not checked. 2.1.112 only
# checks the top level; if it rejects one tool there, it drops all of them.

# Some inputs can't be sent as they are: their schema is not allowed at the top level,
# or they are plain text. Such an input is wrapped as {"input": …}.
WRAPPER_KEY = "input"

# What the API accepts as a name in the top level's `properties`.
API_PROPERTY = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
# 2.1.112 takes `properties` with this name for a class instance, and rejects the tool.
UNSAFE_PROPERTY = "constructor"
# Keywords that the API rejects at the top level.
COMBINATORS = ("anyOf", "oneOf", "allOf")
# The keywords that hold what `$ref` refers to. They stay at the top level.
DEFINITION_KEYWORDS = ("$defs", "definitions")

JSON_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
# Draft 2019-09 and older: `items` may be a list. 2020-12 renamed it and its companion.
TUPLE_KEYWORDS = {"items": "prefixItems", "additionalItems": "items"}


class ToolSchema(NamedTuple):
    """An input schema as the API gets it, and whether it wraps the client's."""

    json: Json
    is_wrapped: bool


def to_tool_schema(schema: JsonValue) -> ToolSchema:
    """Convert a tool's `parameters` to what the API and every CLI accept. A schema that
    is not allowed at the top level is wrapped. Null means an object with any members.
    Raises APIError 400 if it does not describe an object."""
    if schema.optional(dict) is None:
        return ToolSchema({"type": "object"}, False)
    if not allows_object(type_value(schema.get("type"))):
        raise schema.error("must have the type 'object'.", "invalid_schema")
    converted = to_2020_12(schema)
    converted["type"] = "object"
    converted.pop("$schema", None)
    if not needs_wrapping(converted):
        return ToolSchema(converted, False)
    definitions: Json = {}
    for keyword in DEFINITION_KEYWORDS:
        if keyword in converted:
            definitions[keyword] = converted.pop(keyword)
    wrapped = {**definitions, **wrap_schema(converted)}
    move_references(wrapped)
    return ToolSchema(wrapped, True)


def allows_object(schema_type: Any) -> bool:
    """Whether a schema with this `type` allows an object; LEFT_OUT: it has none."""
    if schema_type is LEFT_OUT:
        return True
    if isinstance(schema_type, list):
        return "object" in schema_type
    return bool(schema_type == "object")


def needs_wrapping(schema: Json) -> bool:
    for keyword in COMBINATORS:
        if keyword in schema:
            return True
    for name in schema.get("properties", {}):
        if name == UNSAFE_PROPERTY or not API_PROPERTY.fullmatch(name):
            return True
    return False


def wrap_schema(schema: Json) -> Json:
    return {
        "type": "object",
        "properties": {WRAPPER_KEY: schema},
        "required": [WRAPPER_KEY],
    }


def move_references(schema: Json) -> None:
    """Make every `$ref` in `schema`, which has just been wrapped, point to the new
    place of its target. Changes `schema`."""
    if "$ref" in schema:
        schema["$ref"] = moved_reference(schema["$ref"])
    for subschema in subschemas(schema):
        move_references(subschema)


def moved_reference(reference: str) -> str:
    if reference != "#" and not reference.startswith("#/"):
        return reference  # another document, or an $anchor
    for keyword in DEFINITION_KEYWORDS:
        if reference.startswith(f"#/{keyword}/"):
            return reference
    return f"#/properties/{WRAPPER_KEY}{reference[1:]}"


def subschemas(schema: Json) -> Iterator[Json]:
    """The schemas one level below a converted schema, without booleans."""
    for keyword, value in schema.items():
        convert = KEYWORDS.get(keyword)
        members: Iterable[Any] = ()
        if convert is schema_value:
            members = [value]
        elif convert is schema_list:
            members = value
        elif convert in (schema_map, dependency_map):
            members = value.values()
        for member in members:
            if isinstance(member, dict):
                yield member


def to_2020_12(schema: JsonValue) -> Json:
    """Convert a schema of any draft to JSON Schema 2020-12, at every depth. A keyword
    whose value has the wrong type is left out; unknown keywords stay as they are.
    Raises APIError 400 if it is no schema: neither an object nor a boolean."""
    if schema.require(dict, bool) is True:
        return {}
    if schema.value is False:
        return {"not": {}}
    is_tuple = isinstance(schema.value.get("items"), list)
    converted: Json = {}
    for name in schema.value:
        keyword = TUPLE_KEYWORDS.get(name, name) if is_tuple else name
        convert = KEYWORDS.get(keyword, any_value)
        value = convert(schema.get(name))
        if value is not LEFT_OUT:
            converted[keyword] = value
    return converted


# What the value of a keyword may be. Each function returns the value in 2020-12 form,
# or LEFT_OUT if it does not fit.

LEFT_OUT: Any = object()
Converter = Callable[[JsonValue], Any]


def of_type(*types: type) -> Converter:
    def convert(value: JsonValue) -> Any:
        return value.value if type(value.value) in types else LEFT_OUT

    return convert


string_value = of_type(str)
number_value = of_type(int, float)
boolean_value = of_type(bool)
array_value = of_type(list)


def any_value(value: JsonValue) -> Any:
    return value.value


def no_value(value: JsonValue) -> Any:
    return LEFT_OUT


def positive_number(value: JsonValue) -> Any:
    number = number_value(value)
    return number if number is not LEFT_OUT and number > 0 else LEFT_OUT


def non_negative_integer(value: JsonValue) -> Any:
    """5.0 is an integer, too (JSON Schema Validation 2020-12, 6.1.1)."""
    number = number_value(value)
    if number is LEFT_OUT or number < 0 or number % 1 != 0:
        return LEFT_OUT
    return number


def anchor_value(value: JsonValue) -> Any:
    """A name. A boolean, as in draft 2019-09 (`"$recursiveAnchor": true`), is left
    out."""
    name = string_value(value)
    if name is LEFT_OUT or not re.fullmatch(r"[A-Za-z_][-A-Za-z0-9._]*", name):
        return LEFT_OUT
    return name


def type_value(value: JsonValue) -> Any:
    """Gemini's clients write types in capitals: "STRING"."""
    is_list = isinstance(value.value, list)
    names = value.value if is_list else [value.value]
    types = []
    for name in names:
        if not isinstance(name, str) or name.lower() not in JSON_TYPES:
            return LEFT_OUT
        types.append(name.lower())
    if not types:
        return LEFT_OUT
    return list(dict.fromkeys(types)) if is_list else types[0]


def unique_strings(value: JsonValue) -> Any:
    if not isinstance(value.value, list):
        return LEFT_OUT
    if not all(isinstance(name, str) for name in value.value):
        return LEFT_OUT
    return list(dict.fromkeys(value.value))


def schema_value(value: JsonValue) -> Any:
    if isinstance(value.value, dict):
        return to_2020_12(value)
    return boolean_value(value)


def schema_member(value: JsonValue) -> Json:
    """A member of a list or map of schemas. One that is no schema becomes {}, which
    allows anything, so that the other members keep their places, and `required` and
    `$ref` their targets. A boolean becomes an object, because 2.1.112 takes nothing
    else in `properties`."""
    if isinstance(value.value, (dict, bool)):
        return to_2020_12(value)
    return {}


def schema_list(value: JsonValue) -> Any:
    if not isinstance(value.value, list) or not value.value:
        return LEFT_OUT
    return [schema_member(member) for member in value.items()]


def map_of(convert: Converter, value: JsonValue) -> Any:
    """An object, each member converted."""
    if not isinstance(value.value, dict):
        return LEFT_OUT
    members: Json = {}
    for name in value.value:
        member = convert(value.get(name))
        if member is not LEFT_OUT:
            members[name] = member
    return members


def schema_map(value: JsonValue) -> Any:
    return map_of(schema_member, value)


def string_list_map(value: JsonValue) -> Any:
    return map_of(unique_strings, value)


def boolean_map(value: JsonValue) -> Any:
    return map_of(boolean_value, value)


def dependency_map(value: JsonValue) -> Any:
    """Draft 7: each member is a list of property names, or a schema."""
    return map_of(dependency_value, value)


def dependency_value(value: JsonValue) -> Any:
    names = unique_strings(value)
    return schema_value(value) if names is LEFT_OUT else names


# All keywords of JSON Schema 2020-12 (https://json-schema.org/draft/2020-12) by
# vocabulary, each with what its value must be.
KEYWORDS: dict[str, Converter] = {
    # Core. An $id is dropped: 2020-12 does not allow draft 7's "#name" (an anchor). A
    # $ref to another $id would not work anyway: the API loads no other schema.
    "$id": no_value,
    "$schema": string_value,
    "$ref": string_value,
    "$anchor": anchor_value,
    "$dynamicRef": string_value,
    "$dynamicAnchor": anchor_value,
    "$vocabulary": boolean_map,
    "$comment": string_value,
    "$defs": schema_map,
    # Applicator
    "prefixItems": schema_list,
    "items": schema_value,
    "contains": schema_value,
    "additionalProperties": schema_value,
    "properties": schema_map,
    "patternProperties": schema_map,
    "dependentSchemas": schema_map,
    "propertyNames": schema_value,
    "if": schema_value,
    "then": schema_value,
    "else": schema_value,
    "allOf": schema_list,
    "anyOf": schema_list,
    "oneOf": schema_list,
    "not": schema_value,
    # Unevaluated
    "unevaluatedItems": schema_value,
    "unevaluatedProperties": schema_value,
    # Validation. exclusiveMinimum and -Maximum were booleans in draft 4, and `required`
    # was one in draft 3.
    "type": type_value,
    "const": any_value,
    "enum": array_value,
    "multipleOf": positive_number,
    "maximum": number_value,
    "exclusiveMaximum": number_value,
    "minimum": number_value,
    "exclusiveMinimum": number_value,
    "maxLength": non_negative_integer,
    "minLength": non_negative_integer,
    "pattern": string_value,
    "maxItems": non_negative_integer,
    "minItems": non_negative_integer,
    "uniqueItems": boolean_value,
    "maxContains": non_negative_integer,
    "minContains": non_negative_integer,
    "maxProperties": non_negative_integer,
    "minProperties": non_negative_integer,
    "required": unique_strings,
    "dependentRequired": string_list_map,
    # Meta-data
    "title": string_value,
    "description": string_value,
    "default": any_value,
    "deprecated": boolean_value,
    "readOnly": boolean_value,
    "writeOnly": boolean_value,
    "examples": array_value,
    # Format and content
    "format": string_value,
    "contentEncoding": string_value,
    "contentMediaType": string_value,
    "contentSchema": schema_value,
    # Replaced by others, but still in the meta-schema
    "definitions": schema_map,
    "dependencies": dependency_map,
    "$recursiveAnchor": anchor_value,
    "$recursiveRef": string_value,
}


# ── Answer cache ─────────────────────────────────────────────────────────────────
# What later requests need of past answers, in memory.


class SignedAnswer(NamedTuple):
    """The blocks of an answer with tool calls. The API requires its thinking blocks to
    be sent back unchanged. Their signature is valid only for the model that made it,
    `signed_by`. `model` is the CLI's name of the model that was asked for."""

    model: str
    signed_by: str
    blocks: list[Json]


class StoredResponse(NamedTuple):
    """What a response added to its conversation: the items of the request and of the
    answer. `previous_id` is the id of the response that it continues."""

    previous_id: str | None
    items: str  # as JSON


class AnswerCache:
    """Remembers what later requests need of past answers. Only in memory.

    There are three tables: signed answers by the id of each of their calls, the texts
    of items by the item's id, and responses by their id. Together they hold about
    `max_bytes`; the oldest entries are dropped first. `lock` guards all fields.
    """

    def __init__(self, max_bytes: int = MAX_REMEMBERED_BYTES) -> None:
        self.max_bytes = max_bytes
        self.lock = threading.Lock()
        self.signed_answers: dict[str, SignedAnswer] = {}
        self.item_texts: dict[str, str] = {}
        self.responses: dict[str, StoredResponse] = {}
        self.entries: collections.deque[tuple[dict[str, Any], list[str], int]]
        self.entries = collections.deque()  # (table, keys, size), the oldest first
        self.size = 0

    def add_signed_answer(self, call_ids: list[str], answer: SignedAnswer) -> None:
        size = len(json.dumps(answer.blocks))
        self.add(self.signed_answers, call_ids, answer, size)

    def add_item_text(self, item_id: str, text: str) -> None:
        size = len(text.encode("utf-8", "surrogatepass"))
        self.add(self.item_texts, [item_id], text, size)

    def add_response(self, response_id: str, response: StoredResponse) -> None:
        size = len(response.items)
        self.add(self.responses, [response_id], response, size)

    def add(
        self, table: dict[str, Any], keys: list[str], value: Any, size: int
    ) -> None:
        """Store `value` under each of `keys`, and forget the oldest entries."""
        with self.lock:
            for key in keys:
                table[key] = value
            self.entries.append((table, keys, size))
            self.size += size
            while self.size > self.max_bytes:
                old_table, old_keys, old_size = self.entries.popleft()
                for key in old_keys:
                    old_table.pop(key, None)
                self.size -= old_size

    def find_signed_answer(self, call_ids: Iterable[str]) -> SignedAnswer | None:
        with self.lock:
            for call_id in call_ids:
                if call_id in self.signed_answers:
                    return self.signed_answers[call_id]
        return None

    def find_item_text(self, item_id: str) -> str | None:
        with self.lock:
            return self.item_texts.get(item_id)

    def find_conversation(self, response_id: str) -> list[Json] | None:
        """All items of the conversation up to this response, the oldest first; None if
        one of its responses is not known."""
        parts: list[list[Json]] = []
        next_id: str | None = response_id
        with self.lock:
            while next_id is not None:
                response = self.responses.get(next_id)
                if response is None:
                    return None
                parts.append(json.loads(response.items))
                next_id = response.previous_id
        return [item for part in reversed(parts) for item in part]


# ── Models ───────────────────────────────────────────────────────────────────────
# The models that a client may ask for, and their names. Pure: no sockets, processes or
# clock.


class Model(NamedTuple):
    """A model that a client may ask for. `cli_name` is what `--model` takes."""

    id: str
    cli_name: str
    display_name: str
    description: str
    full_id: str = ""  # if the CLI tells it

    def to_json(self) -> Json:
        """OpenAI's model object, and what the Messages API's has."""
        return {
            "id": self.id,
            "object": "model",
            "created": 0,
            "owned_by": "anthropic",
            "display_name": self.display_name,
            "description": self.description,
        }


FAMILIES = ("opus", "sonnet", "haiku")  # the CLI's aliases for the newest of each
FAMILY_MODELS = [
    Model(
        f"claude-{family}-4",
        family,
        f"Claude {family.capitalize()}",
        f"The newest {family.capitalize()} model, whatever its version",
    )
    for family in FAMILIES
]
FAMILY_ALIASES = [
    Model(model.cli_name, model.cli_name, model.display_name, model.description)
    for model in FAMILY_MODELS
]
FULL_MODEL_ID = re.compile(r"claude-[A-Za-z0-9.:_\[\]-]{1,120}")
MODEL_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:_\[\]-]{0,120}")


class ModelCatalog:
    """The models that clients may ask for: this server's own names, then the models
    that the CLI offers this login. Until the CLI has listed them, its three well-known
    aliases stand in for them."""

    def __init__(self, offered: Iterable[Model] = ()) -> None:
        self.models = list(FAMILY_MODELS)
        known = {model.id for model in self.models}
        for model in list(offered) or FAMILY_ALIASES:
            if model.id not in known:
                known.add(model.id)
                self.models.append(model)

    def parse_name(self, name: JsonValue) -> Model:
        """The model that the parameter `model` names. Raises APIError 400 or 404."""
        return self.find(name.require(str))

    def find(self, name: str) -> Model:
        """The model that a client calls `name`. Raises APIError 404.

        A provider prefix, such as openai/, is dropped. Any full Claude model id is
        passed on to the CLI, which knows more of them than it lists.
        """
        short_name = name.rsplit("/", 1)[-1]
        for model in [*self.models, *FAMILY_ALIASES]:
            if short_name == model.id:
                return model
        if FULL_MODEL_ID.fullmatch(short_name):
            return Model(short_name, short_name, short_name, "A Claude model")
        known = ", ".join(model.id for model in self.models)
        message = (
            f"Unknown model '{name[:100]}'. Use a full Claude model id, or {known}."
        )
        raise APIError(404, message, "model_not_found", "model")


def offered_models(initialize_answer: Json) -> list[Model]:
    """The models in the CLI's answer to `initialize`: each alias, then its full id.
    Raises one of MALFORMED_LINE_ERRORS."""
    models = []
    for entry in initialize_answer["models"]:
        alias = require_str(entry["value"])
        title = str(entry.get("displayName") or alias)
        description = str(entry.get("description") or "")
        full_id = optional_str(entry.get("resolvedModel"))
        if full_id is None or not FULL_MODEL_ID.fullmatch(full_id):
            full_id = ""
        if MODEL_ALIAS.fullmatch(alias):
            models.append(Model(alias, alias, title, description, full_id))
        if full_id:
            models.append(Model(full_id, full_id, title, description, full_id))
    return models


# ── Request parsing ──────────────────────────────────────────────────────────────
# From the JSON of a request to a Request. Without I/O; the only state is AnswerCache,
# which the parser reads. To support a new parameter, add a row to CHAT_PARAMETERS or
# RESPONSE_PARAMETERS, and read it in parse_chat() or parse_response(). To support a new
# kind of content, add a row to CONTENT_PARTS.

# Models whose thinking has a budget. In a tool loop the API requires their signed
# thinking block to be sent back (Messages API, "Preserving thinking blocks").
BUDGET_MODEL = re.compile(r"haiku|claude-3|-4-[0-5](?!\d)|-4-20\d{6}")

EFFORT_LEVELS = {  # OpenAI's reasoning_effort -> the CLI's effort level
    "": "",
    "none": "",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "xhigh",
    "max": "max",
}

HONOURED = "honoured"
IGNORED = "ignored"
REFUSED = "refused"
# Values that ask for the default behaviour. They are accepted although the parameter is
# not supported.
DEFAULT_VALUES: tuple[Any, ...] = (False, 0, [], ["text"], "none")


class Row(NamedTuple):
    """How a parameter, tool type or item type is treated, a note on that for the user,
    and the JSON types that a parameter accepts."""

    treatment: str
    reason: str
    types: tuple[type, ...] = ()


STRING = (str,)
INTEGER = (int,)
NUMBER = (int, float)
BOOLEAN = (bool,)
ARRAY = (list,)
OBJECT = (dict,)
NO_SUCH_SETTING = "Claude Code has no such setting"
NOT_STORED = "it is not stored"

CHAT_PARAMETERS = {
    "model": Row(HONOURED, "see Models", STRING),
    "messages": Row(HONOURED, "turn for turn, in their native roles", ARRAY),
    "stream": Row(HONOURED, "server-sent events", BOOLEAN),
    "stream_options": Row(HONOURED, "`include_usage`", OBJECT),
    "max_tokens": Row(HONOURED, "at least 1", INTEGER),
    "max_completion_tokens": Row(
        HONOURED, "at least 1; takes precedence over `max_tokens`", INTEGER
    ),
    "stop": Row(
        HONOURED, "1 to 4 strings; the answer ends at the first match", (str, list)
    ),
    "n": Row(HONOURED, "1 to 8; each choice needs a CLI process", INTEGER),
    "tools": Row(HONOURED, "functions; the client runs them", ARRAY),
    "tool_choice": Row(
        HONOURED, "none, auto, required, one function, allowed_tools", (str, dict)
    ),
    "parallel_tool_calls": Row(HONOURED, "false: at most one call", BOOLEAN),
    "response_format": Row(HONOURED, "text, json_object, json_schema", OBJECT),
    "reasoning_effort": Row(HONOURED, "none to max", STRING),
    "temperature": Row(IGNORED, NO_SUCH_SETTING, NUMBER),
    "top_p": Row(IGNORED, NO_SUCH_SETTING, NUMBER),
    "presence_penalty": Row(IGNORED, NO_SUCH_SETTING, NUMBER),
    "frequency_penalty": Row(IGNORED, NO_SUCH_SETTING, NUMBER),
    "seed": Row(IGNORED, NO_SUCH_SETTING, INTEGER),
    "logit_bias": Row(IGNORED, NO_SUCH_SETTING, OBJECT),
    "user": Row(IGNORED, NO_SUCH_SETTING, STRING),
    "metadata": Row(IGNORED, NOT_STORED, OBJECT),
    "store": Row(IGNORED, "chat completions are not stored", BOOLEAN),
    "logprobs": Row(REFUSED, "Claude returns no log probabilities", (bool, int)),
    "top_logprobs": Row(REFUSED, "Claude returns no log probabilities", (bool, int)),
    "modalities": Row(REFUSED, "answers are text", (list, dict)),
    "audio": Row(REFUSED, "answers are text", (list, dict)),
    "functions": Row(REFUSED, "use `tools`", (list, str, dict)),
    "function_call": Row(REFUSED, "use `tool_choice`", (list, str, dict)),
    "web_search_options": Row(REFUSED, "this server has no web search", OBJECT),
}
SHARED_PARAMETERS = [
    "model",
    "stream",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "temperature",
    "top_p",
    "user",
    "metadata",
    "top_logprobs",
]
RESPONSE_PARAMETERS = {
    "input": Row(HONOURED, "a text, or items turn for turn", (str, list)),
    "instructions": Row(HONOURED, "the first system text", STRING),
    "previous_response_id": Row(
        HONOURED, "continues a recent response; see Limitations", STRING
    ),
    "store": Row(HONOURED, "false: the response can't be continued by id", BOOLEAN),
    "text": Row(HONOURED, "`format`: text, json_object, json_schema", OBJECT),
    "reasoning": Row(
        HONOURED, "`effort`; any `summary` returns Claude's thinking", OBJECT
    ),
    "max_output_tokens": Row(HONOURED, "at least 1", INTEGER),
    "include": Row(IGNORED, NO_SUCH_SETTING, ARRAY),
    "max_tool_calls": Row(IGNORED, NO_SUCH_SETTING, INTEGER),
    "prompt_cache_key": Row(IGNORED, NO_SUCH_SETTING, STRING),
    "safety_identifier": Row(IGNORED, NO_SUCH_SETTING, STRING),
    "service_tier": Row(IGNORED, NO_SUCH_SETTING, STRING),
    "truncation": Row(IGNORED, NO_SUCH_SETTING, STRING),
    "stream_options": Row(IGNORED, "usage is always sent", OBJECT),
    "conversation": Row(REFUSED, "use `previous_response_id`", (str, dict)),
    "prompt": Row(REFUSED, "this server stores no prompts", (str, dict)),
    "background": Row(REFUSED, "responses are answered at once", BOOLEAN),
    **{name: CHAT_PARAMETERS[name] for name in SHARED_PARAMETERS},
}
TOOL_TYPES = {  # of /v1/responses; all others are refused
    "function": Row(HONOURED, "the client runs them"),
    "custom": Row(HONOURED, "one text as input; a grammar is not enforced"),
    "namespace": Row(HONOURED, "functions with a common prefix, such as MCP servers"),
    "web_search": Row(IGNORED, "accepted because Codex sends it; there is no search"),
    "tool_search": Row(
        IGNORED, "accepted because Codex sends it; all tools are offered"
    ),
}
ITEM_TYPES = {  # of /v1/responses; all others are left out, as `reasoning` is
    "message": Row(HONOURED, "turn for turn, in their native roles"),
    "agent_message": Row(HONOURED, "a text for the user's turn, from another agent"),
    "function_call": Row(HONOURED, "a call in the assistant's turn"),
    "custom_tool_call": Row(HONOURED, "a call in the assistant's turn"),
    "function_call_output": Row(HONOURED, "text, images, files"),
    "custom_tool_call_output": Row(HONOURED, "text, images, files"),
    "item_reference": Row(HONOURED, "if the item is from a recent answer"),
    "reasoning": Row(IGNORED, "the server remembers signed thinking itself"),
    "compaction_trigger": Row(REFUSED, "this server has no compaction"),
}
# Request fields that a response repeats, with their defaults.
ECHOED_FIELDS: Json = {
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "reasoning": {},
    "safety_identifier": None,
    "temperature": 1.0,
    "text": {},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "truncation": "disabled",
}


@dataclasses.dataclass(frozen=True)
class QueryOptions:
    """Settings that are sent together with the last turn. `tool_choice` is the
    Messages API's. The CLI's default applies where a field is empty or 0."""

    effort: str = ""
    thinking: bool = True
    max_tokens: int = 0
    tool_choice: Json = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is sent to the CLI. `turns` are messages of the Messages API; the last one
    is the user's. `tools` have the form of MCP's tools/list."""

    model: str
    system: str
    tools: list[Json]
    turns: list[Json]
    options: QueryOptions


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What is needed to read the CLI's output. `tool_names` maps the API's tool names
    to the client's. The input of a tool in `wrapped_tools` is wrapped in WRAPPER_KEY.
    The tools in `text_tools`, which are all wrapped, take a plain text. `stop` holds
    the stop strings."""

    tool_names: dict[str, str] = dataclasses.field(default_factory=dict)
    wrapped_tools: frozenset[str] = frozenset()
    text_tools: frozenset[str] = frozenset()
    stop: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Output:
    """What the client wants back.

    `model` is the client's name for it; `choices` is `n`. `ignored_kinds` are kinds of
    content in the history that were left out. For /v1/responses: `show_reasoning`,
    whether to return Claude's thinking; `call_fields`, the fields of a call's item, by
    the tool's name; `echo`, the fields of the response that repeat the request;
    `store`, whether the response may be continued by its id; `input_items`, what the
    request added to the conversation.
    """

    model: str
    stream: bool = False
    choices: int = 1
    include_usage: bool = False
    ignored_kinds: tuple[str, ...] = ()
    show_reasoning: bool = False
    call_fields: dict[str, Json] = dataclasses.field(default_factory=dict)
    echo: Json = dataclasses.field(default_factory=dict)
    store: bool = False
    input_items: list[Json] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Request:
    """A parsed request of either endpoint."""

    model: Model
    prompt: Prompt
    decoding: Decoding
    output: Output


# Parses one parameter of a request. Raises APIError 400 or 404.
ParameterParser = Callable[[JsonValue], Any]


class Context(NamedTuple):
    """What the parser needs besides the body of the request."""

    models: ModelCatalog
    cache: AnswerCache


def parse_chat(raw: Any, context: Context) -> Request:
    """Parse a chat completion request. Raises APIError 400 or 404."""
    parsers: dict[str, ParameterParser] = {
        "model": context.models.parse_name,
        "messages": parse_messages,
        "tools": parse_chat_tools,
        "response_format": parse_response_format,
        "reasoning_effort": parse_effort,
        "max_tokens": positive_int,
        "max_completion_tokens": positive_int,
        "n": parse_choice_count,
        "stop": parse_stop,
        "stream_options": parse_include_usage,
    }
    values = parse_parameters(raw, CHAT_PARAMETERS, parsers)
    body = JsonValue(raw)
    builder: ConversationBuilder = values["messages"]
    parts = RequestParts(
        body=body,
        builder=builder,
        tools=values["tools"],
        answer_schema=values["response_format"],
        effort=values["reasoning_effort"],
        max_tokens=values["max_completion_tokens"] or values["max_tokens"],
        stop=values["stop"],
    )
    output = Output(
        model=body.get("model").value,
        stream=bool(body.get("stream").value),
        choices=values["n"],
        include_usage=values["stream_options"],
        ignored_kinds=tuple(builder.ignored_kinds),
    )
    return build_request(parts, output, context)


def parse_response(raw: Any, context: Context) -> Request:
    """Parse a request of /v1/responses. Raises APIError 400 or 404."""
    parsers: dict[str, ParameterParser] = {
        "model": context.models.parse_name,
        "instructions": parse_instructions,
        "previous_response_id": functools.partial(find_previous_items, context.cache),
        "input": functools.partial(parse_input, raw, context.cache),
        "tools": response_functions,
        "text": parse_text_format,
        "reasoning": parse_reasoning,
        "max_output_tokens": positive_int,
    }
    values = parse_parameters(raw, RESPONSE_PARAMETERS, parsers)
    body = JsonValue(raw)
    builder: ConversationBuilder = values["input"]
    functions, call_fields = values["tools"]
    effort, show_reasoning = values["reasoning"]
    parts = RequestParts(
        body=body,
        builder=builder,
        tools=parse_functions(functions),
        answer_schema=values["text"],
        effort=effort,
        max_tokens=values["max_output_tokens"],
    )
    output = Output(
        model=body.get("model").value,
        stream=bool(body.get("stream").value),
        ignored_kinds=tuple(builder.ignored_kinds),
        show_reasoning=show_reasoning,
        call_fields=call_fields,
        echo=echoed_fields(raw),
        store=body.get("store").value is not False,
        input_items=input_items(body.get("input").value),
    )
    return build_request(parts, output, context)


def parse_parameters(
    raw: Any, rows: dict[str, Row], parsers: dict[str, ParameterParser]
) -> dict[str, Any]:
    """Check the parameters of a request, and call the parser of each that has one.

    This is done in the order of the body, so that of several bad parameters the first
    one is reported; those that are absent come last, as null. Unknown parameters are
    ignored. Returns the parsers' results by name. Raises APIError 400 or 404.
    """
    if type(raw) is not dict:
        raise APIError(400, "The request body must be a JSON object.")
    body = JsonValue(raw)
    absent = [name for name in parsers if name not in raw]
    results = {}
    for name in [*raw, *absent]:
        parameter = body.get(name)
        if name in rows:
            check_parameter(parameter, rows[name])
        if name in parsers:
            results[name] = parsers[name](parameter)
    return results


def check_parameter(parameter: JsonValue, row: Row) -> None:
    """Raises APIError 400 for a value of the wrong type, or one that asks for something
    that is not supported."""
    value = parameter.optional(*row.types)
    if value is None or value in DEFAULT_VALUES:
        return
    if row.treatment == REFUSED:
        problem = f"is not supported: {row.reason}."
        raise parameter.error(problem, "unsupported_parameter")


def parse_messages(messages: JsonValue) -> ConversationBuilder:
    if not messages.value:
        raise messages.error("must have at least one message.")
    builder = ConversationBuilder()
    for message in messages.items():
        builder.add_message(message)
    builder.finish()
    return builder


def parse_input(
    raw: Json, cache: AnswerCache, input_value: JsonValue
) -> ConversationBuilder:
    """The conversation of a Responses request: its instructions, the responses that it
    continues, and its own input."""
    if input_value.value is None:
        raise input_value.error("is missing.")
    body = JsonValue(raw)
    builder = ConversationBuilder()
    builder.add_system(parse_instructions(body.get("instructions")))
    previous_items = find_previous_items(cache, body.get("previous_response_id"))
    for item in JsonValue(previous_items, "previous_response_id").items():
        add_item(builder, item, cache)
    for item in JsonValue(input_items(input_value.value), "input").items():
        add_item(builder, item, cache)
    builder.finish()
    return builder


def input_items(value: Any) -> Any:
    """The `input` of a Responses request as items: a text is a message of the user."""
    if type(value) is str:
        return [{"role": "user", "content": value}]
    return value


def parse_instructions(instructions: JsonValue) -> list[Json]:
    if instructions.value is None:
        return []
    return parse_content(instructions, TEXT_PARTS)


def parse_choice_count(value: JsonValue) -> int:
    count = positive_int(value, MAX_CHOICES)
    return count if count else 1


def parse_include_usage(stream_options: JsonValue) -> bool:
    return bool(stream_options.get("include_usage").optional(bool))


def parse_reasoning(reasoning: JsonValue) -> tuple[str, bool]:
    """Returns the effort, and whether to return Claude's thinking."""
    effort = parse_effort(reasoning.get("effort"))
    show_reasoning = bool(reasoning.get("summary").optional(str))
    return effort, show_reasoning


def parse_effort(effort: JsonValue) -> str:
    """OpenAI's reasoning_effort; "" if it is absent. Raises APIError 400."""
    if effort.value is None:
        return ""
    name: str = effort.require(str)
    if name not in EFFORT_LEVELS:
        choices = ", ".join(level for level in EFFORT_LEVELS if level)
        raise effort.error(f"must be one of {choices}.")
    return name


def positive_int(value: JsonValue, maximum: int = MAX_TOKENS) -> int:
    """An integer from 1 to `maximum`; 0 if it is null. Raises APIError 400."""
    number = value.optional(int)
    if number is None:
        return 0
    if not 1 <= number <= maximum:
        raise value.error(f"must be between 1 and {maximum}.")
    return int(number)


def parse_stop(value: JsonValue) -> tuple[str, ...]:
    """The stop strings. An empty one is dropped: it would match everywhere."""
    if type(value.value) is str:
        strings = [value]
    else:
        strings = list(value.items())
    if len(strings) > 4:  # OpenAI's limit
        raise value.error("must not have more than 4 strings.")
    return tuple(string.value for string in strings if string.require(str))


def find_previous_items(cache: AnswerCache, response_id: JsonValue) -> list[Json]:
    """The conversation that `previous_response_id` continues. Raises APIError 400."""
    if response_id.value is None:
        return []
    items = cache.find_conversation(response_id.require(str))
    if items is None:
        message = (
            f"Previous response with id '{response_id.value[:100]}' not found. The "
            "server keeps recent responses in memory only: send the whole conversation "
            "as `input`, without `previous_response_id`."
        )
        code = "previous_response_not_found"
        raise APIError(400, message, code, "previous_response_id")
    return items


def echoed_fields(raw: Json) -> Json:
    """The fields of a response that repeat its request, completed by their defaults as
    OpenAI's are."""
    echo = dict(ECHOED_FIELDS)
    for name in echo:
        if raw.get(name) is not None:
            echo[name] = raw[name]
            row = RESPONSE_PARAMETERS[name]
            if row.types == INTEGER:
                echo[name] = int(raw[name])  # it may be written as 64.0
    echo["text"] = {"format": {"type": "text"}, **echo["text"]}
    if echo["text"]["format"] is None:
        echo["text"]["format"] = {"type": "text"}
    echo["reasoning"] = {"effort": None, "summary": None, **echo["reasoning"]}
    echo["tools"] = [echoed_tool(tool) for tool in echo["tools"]]
    return echo


def echoed_tool(tool: Json) -> Json:
    if tool.get("type") != "function":
        return tool
    return {"description": None, "parameters": None, "strict": False, **tool}


def parse_response_format(response_format: JsonValue) -> ToolSchema | None:
    """`response_format` of chat completions: the schema is in its `json_schema`."""
    holder = response_format.get("json_schema")
    return parse_answer_format(response_format, holder)


def parse_text_format(text: JsonValue) -> ToolSchema | None:
    """`text` of /v1/responses: the schema is a member of its `format`."""
    text_format = text.get("format")
    return parse_answer_format(text_format, text_format)


def parse_answer_format(
    answer_format: JsonValue, schema_holder: JsonValue
) -> ToolSchema | None:
    """The JSON schema that the answer must match; None for a text."""
    if answer_format.value is None:
        return None
    format_type = checked_type(answer_format, ("text", "json_object", "json_schema"))
    if format_type == "json_schema":
        schema = schema_holder.get("schema")
        schema.require(dict)
        return to_tool_schema(schema)
    if format_type == "json_object":
        return ToolSchema({"additionalProperties": True}, False)
    return None


class RequestParts(NamedTuple):
    """The parts of a request that both endpoints have, before they are put together."""

    body: JsonValue
    builder: ConversationBuilder
    tools: ToolSet
    answer_schema: ToolSchema | None
    effort: str  # OpenAI's; "" if it is absent
    max_tokens: int  # 0: no limit
    stop: tuple[str, ...] = ()


def build_request(parts: RequestParts, output: Output, context: Context) -> Request:
    """Put a request together. Raises APIError 400."""
    chosen_model = context.models.find(output.model)
    model = chosen_model.cli_name
    tools = parts.tools
    tool_choice = parse_tool_choice(parts.body, tools)
    called_tools = parts.builder.called_tool_names()
    if called_tools and not tools.mcp_tools:
        # The API requires a definition of every tool that the history calls.
        for name in called_tools:
            tools.add_uncallable(name)
        tool_choice = {"type": "none"}
    if parts.answer_schema is not None:
        tool_choice = add_structured_output(tools, parts.answer_schema, tool_choice)
    turns = parts.builder.turns
    prepare_history(turns, tools.wrapped, model, context.cache)
    options = QueryOptions(
        effort=EFFORT_LEVELS[parts.effort],
        thinking=allows_thinking(
            model, parts.effort, parts.max_tokens, tool_choice, turns
        ),
        max_tokens=parts.max_tokens,
        tool_choice=tool_choice,
    )
    prompt = Prompt(
        model=model,
        system="\n\n".join(parts.builder.system),
        tools=tools.mcp_tools,
        turns=turns,
        options=options,
    )
    decoding = Decoding(
        tool_names=tools.names,
        wrapped_tools=frozenset(tools.wrapped),
        text_tools=frozenset(tools.text_tools),
        stop=parts.stop,
    )
    return Request(chosen_model, prompt, decoding, output)


def allows_thinking(
    model: str, effort: str, max_tokens: int, tool_choice: Json, turns: list[Json]
) -> bool:
    """Whether the model may think before it answers."""
    if effort == "none":
        return False
    if tool_choice.get("type") in ("any", "tool"):
        return False  # the API refuses thinking together with a forced tool call
    if 0 < max_tokens < MIN_THINKING_TOKENS:
        return False
    if BUDGET_MODEL.search(model):
        if 0 < max_tokens < MIN_BUDGET_TOKENS:
            return False  # the CLI would give thinking all tokens but one
        if continues_unsigned_loop(turns):
            return False
    return True


# ── Tools and tool choice ────────────────────────────────────────────────────────
# The tools of a request, as MCP lists them to the CLI. Pure.

# Structured output: we add this tool and make the model call it; its arguments are the
# answer. (The CLI's own `jsonSchema` silently ignores schemas with keywords that it
# does not know.)
STRUCTURED_OUTPUT = "StructuredOutput"
STRUCTURED_OUTPUT_DESCRIPTION = (
    "Give your final response as the arguments of this tool."
)
# Tool names that the CLI treats specially. It edits the inputs of the last two in the
# history.
RESERVED_TOOL_NAMES = {STRUCTURED_OUTPUT, "ToolSearch", "ExitPlanMode", "Edit"}
API_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")


def api_name(name: str) -> str:
    """The name for a tool, or the id for a call, that the Messages API accepts."""
    if API_NAME.fullmatch(name) and name not in RESERVED_TOOL_NAMES:
        return name
    checksum = binascii.crc32(name.encode("utf-8", "replace"))
    return re.sub(r"[^a-zA-Z0-9_-]", "_", name)[:50] + f"_{checksum:08x}"


@dataclasses.dataclass
class ToolSet:
    """The tools of a request: as MCP lists them, and the fields of Decoding."""

    mcp_tools: list[Json] = dataclasses.field(default_factory=list)
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    wrapped: set[str] = dataclasses.field(default_factory=set)
    text_tools: set[str] = dataclasses.field(default_factory=set)

    def add_function(self, function: JsonValue, is_text: bool = False) -> None:
        """Add {name, description?, parameters?}. One that is declared twice alike
        counts once. Raises APIError 400."""
        client_name = function.get("name").require(str)
        if not client_name:
            raise function.get("name").error("must not be empty.")
        name = api_name(client_name)
        description = function.get("description").optional(str)
        schema = to_tool_schema(function.get("parameters"))
        tool = mcp_tool(name, description or "", schema.json)
        if name in self.names:
            if tool in self.mcp_tools:
                return
            raise function.get("name").error(f"is used twice: '{client_name[:100]}'.")
        self.names[name] = client_name
        self.mcp_tools.append(tool)
        if schema.is_wrapped:
            self.wrapped.add(name)
        if is_text:
            self.wrapped.add(name)
            self.text_tools.add(name)

    def add_uncallable(self, name: str) -> None:
        """Add a tool that the history calls, but the request does not offer."""
        self.mcp_tools.append(mcp_tool(name, "", {}))

    def keep_only(self, names: set[str]) -> None:
        """Offer only these tools, by their names at the API."""
        self.mcp_tools = [tool for tool in self.mcp_tools if tool["name"] in names]


def parse_chat_tools(tools: JsonValue) -> ToolSet:
    """`tools` of chat completions."""
    tool_set = ToolSet()
    for tool in tools.items():
        checked_type(tool, ("function",), "function")
        tool_set.add_function(tool.get("function"))
    return tool_set


def parse_functions(functions: list[tuple[JsonValue, bool]]) -> ToolSet:
    """The functions of /v1/responses, each with whether its input is a text."""
    tool_set = ToolSet()
    for function, is_text in functions:
        tool_set.add_function(function, is_text)
    return tool_set


def mcp_tool(name: str, description: str, schema: Json) -> Json:
    """A tool as MCP lists it. A long description is moved into the schema, where the
    CLI does not truncate it."""
    schema = {"type": "object", **schema}
    if len(description) > MAX_DESCRIPTION_LENGTH:
        texts = [description]
        if schema.get("description"):
            texts.append(str(schema["description"]))
        schema["description"] = "\n\n".join(texts)
        description = description[:200]
        description += "… (the whole description is in the input schema)"
    return {"name": name, "description": description, "inputSchema": schema}


def add_structured_output(
    tools: ToolSet, schema: ToolSchema, tool_choice: Json
) -> Json:
    """Add the tool for structured output, and return the tool_choice that makes the
    model use it. If the client forces a call of one of its tools, nothing is added."""
    if tool_choice.get("type") in ("any", "tool"):
        return tool_choice
    tools.mcp_tools.append(
        mcp_tool(STRUCTURED_OUTPUT, STRUCTURED_OUTPUT_DESCRIPTION, schema.json)
    )
    if schema.is_wrapped:
        tools.wrapped.add(STRUCTURED_OUTPUT)
    if tools.names and tool_choice.get("type") != "none":
        choice: Json = {"type": "any"}
    else:
        choice = {"type": "tool", "name": STRUCTURED_OUTPUT}
    choice["disable_parallel_tool_use"] = True
    return choice


def tool_type_name(name: str) -> str:
    """The type of a tool without "_preview" and a date, such as
    web_search_2025_08_26."""
    return re.sub(r"(_preview)?(_\d{4}_\d{2}_\d{2})?$", "", name)


def response_functions(
    tools: JsonValue,
) -> tuple[list[tuple[JsonValue, bool]], dict[str, Json]]:
    """The tools of /v1/responses as functions, and Output.call_fields."""
    functions = []
    call_fields: dict[str, Json] = {}
    for tool in tools.items():
        member = tool.get("type")
        tool_type = tool_type_name(member.require(str))
        if tool_type not in TOOL_TYPES:
            raise unsupported_type_error(member, TOOL_TYPES)
        if tool_type == "function":
            functions.append((tool, False))
        elif tool_type == "custom":
            functions.append((custom_tool_function(tool), True))
            name = tool.get("name").require(str)
            call_fields[name] = {"type": "custom_tool_call", "name": name}
        elif tool_type == "namespace":
            namespace = tool.get("name").require(str)
            for inner in tool.get("tools").items():
                function = namespace_function(inner, namespace)
                functions.append((function, False))
                call_fields[function.value["name"]] = {
                    "name": inner.value["name"],
                    "namespace": namespace,
                }
    return functions, call_fields


def custom_tool_function(tool: JsonValue) -> JsonValue:
    """A custom tool as a function whose input is one text. The model is told the
    grammar, if there is one."""
    text_schema = {
        "type": "string",
        "description": json.dumps(tool.get("format").value),
    }
    function = {**tool.value, "parameters": wrap_schema(text_schema)}
    return JsonValue(function, tool.path)


def namespace_function(tool: JsonValue, namespace: str) -> JsonValue:
    """A function of a namespace, under its full name."""
    name = tool.get("name").require(str)
    function = {**tool.value, "name": namespaced(namespace, name), "type": "function"}
    return JsonValue(function, tool.path)


def namespaced(namespace: str, name: str) -> str:
    return f"{namespace}__{name}"


def parse_tool_choice(body: JsonValue, tools: ToolSet) -> Json:
    """tool_choice and parallel_tool_calls as the Messages API's tool_choice; {} for its
    default. Tools that `allowed_tools` leaves out are removed from `tools`. Raises
    APIError 400."""
    parameter = body.get("tool_choice")
    value = parameter.value
    if value is None:
        value = "auto"
    if type(value) is dict:
        choice = parse_tool_choice_object(parameter, tools)
    else:
        choice = parse_tool_choice_mode(parameter, value, tools)
    if not tools.names:
        return {}
    if body.get("parallel_tool_calls").value is False and choice["type"] != "none":
        choice["disable_parallel_tool_use"] = True
    if choice == {"type": "auto"}:
        return {}
    return choice


def parse_tool_choice_mode(parameter: JsonValue, mode: Any, tools: ToolSet) -> Json:
    if mode not in ("none", "auto", "required"):
        raise parameter.error("must be 'none', 'auto' or 'required'.")
    if mode == "required":
        if not tools.names:
            raise parameter.error("is only allowed with 'tools'.")
        return {"type": "any"}
    return {"type": mode}


def parse_tool_choice_object(parameter: JsonValue, tools: ToolSet) -> Json:
    known_types = ("function", "custom", "allowed_tools")
    choice_type = checked_type(parameter, known_types, "function")
    if choice_type != "allowed_tools":
        return {"type": "tool", "name": chosen_tool(parameter, tools)}
    allowed = parameter
    if parameter.get("allowed_tools").value is not None:  # chat completions nest it
        allowed = parameter.get("allowed_tools")
    mode = allowed.get("mode").optional(str)
    names = {chosen_tool(tool, tools) for tool in allowed.get("tools").items()}
    if not names:
        raise allowed.get("tools").error("must have at least one tool.")
    tools.keep_only(names)
    return parse_tool_choice_mode(allowed.get("mode"), mode or "auto", tools)


def chosen_tool(choice: JsonValue, tools: ToolSet) -> str:
    """The name at the API of the tool that `choice` names: {name, namespace?}, or
    {function: {name}}. Raises APIError 400."""
    holder = choice
    for key in ("function", "custom"):
        if choice.get(key).value is not None:
            holder = choice.get(key)
    name = holder.get("name").require(str)
    namespace = choice.get("namespace").optional(str)
    if namespace:
        name = namespaced(namespace, name)
    if name not in tools.names.values():
        raise choice.error(f"names '{name[:100]}', which is not in 'tools'.")
    return api_name(name)


# ── Conversation ─────────────────────────────────────────────────────────────────
# A client's messages or items -> turns of the Messages API. Pure, but for what it looks
# up in the AnswerCache. To support a new type of item, add a row to ITEM_TYPES, and a
# function to ITEM_PARSERS.

PLACEHOLDER_FIRST_TURN = "Begin."  # where the API requires a user turn
PLACEHOLDER_LAST_TURN = "Continue."


def text_block(text: str) -> Json:
    return {"type": "text", "text": text}


class OpenCall(NamedTuple):
    """A tool call whose result has not come yet: its place in the request, and its id
    at the API."""

    function: JsonValue
    api_id: str


class ConversationBuilder:
    """Builds a conversation from a client's messages: `system` texts, and `turns` in
    the Messages API's roles.

    Consecutive messages of one role become one turn. Blank texts are dropped, because
    the API refuses them. Calls and results are paired by id. The API wants the results
    of a turn's calls in the very next turn, so messages between a call and its result
    are moved behind the result. A call id must be unique in a conversation, or the CLI
    drops the call, so a repeated id is replaced by a new one. (By `x-1`, not `x_1`: the
    CLI treats `x_1` as `x`.)
    """

    def __init__(self) -> None:
        self.system: list[str] = []
        self.turns: list[Json] = []
        self.ignored_kinds: set[str] = set()  # of content that was left out
        self.ignored_call_ids: set[str] = set()  # of calls that were left out
        self.api_ids: set[str] = set()  # of calls
        self.open_calls: dict[str, OpenCall] = {}  # by the client's id
        self.calling_turn: Json = {}  # the assistant turn that holds the open calls
        self.waiting: list[tuple[str, list[Json]]] = []  # (role, blocks), see above

    def add_message(self, message: JsonValue) -> None:
        """Add a message of chat completions. Raises APIError 400."""
        role = message.get("role").require(str)
        content = message.get("content")
        if role == "tool":
            blocks = parse_content(content, MEDIA_PARTS)
            self.add_result(message.get("tool_call_id"), blocks)
        elif role in ("system", "developer"):
            self.add_system(parse_content(content, MEDIA_PARTS))
        elif role == "user":
            self.add_blocks("user", parse_content(content, MEDIA_PARTS))
        elif role == "assistant":
            if content.value is not None:  # null is allowed with tool calls
                self.add_blocks("assistant", self.parse_assistant_content(content))
            for call in message.get("tool_calls").items():
                function = call.get("function")
                arguments = parse_arguments(function.get("arguments"))
                self.add_call(call.get("id"), function, arguments)
        else:
            known = "system, developer, user, assistant, tool"
            raise message.get("role").error(f"must be one of {known}.")

    def parse_assistant_content(self, content: JsonValue) -> list[Json]:
        """The texts of an assistant message. Other parts, such as the thinking of
        another model, are past and ask for nothing: they are left out."""
        blocks = []
        for part in content_parts(content):
            if type(part.value) is not str:
                kind = part.get("type").require(str)
                if kind not in ASSISTANT_PARTS:
                    self.ignored_kinds.add(kind)
                    continue
            blocks += parse_part(part, ASSISTANT_PARTS)
        return blocks

    def add_system(self, blocks: list[Json]) -> None:
        """Add a system message. The text of the first ones becomes the system prompt.
        After other messages it becomes a part of the user's turn, and so do images and
        files, which a system prompt can't hold."""
        text = "\n".join(block["text"] for block in blocks if block["type"] == "text")
        media = [block for block in blocks if block["type"] != "text"]
        if text and (self.turns or self.waiting):
            media.insert(0, text_block(f"<system>\n{text}\n</system>"))
        elif text:
            self.system.append(text)
        self.add_blocks("user", media)

    def add_call(self, call_id: JsonValue, function: JsonValue, arguments: Any) -> None:
        """Add a call of `function`: {name}."""
        name = api_name(function.get("name").require(str))
        client_id = call_id.require(str)
        if client_id in self.open_calls:
            problem = (
                f"repeats the id '{client_id[:100]}' of a call that has no result yet."
            )
            raise call_id.error(problem)
        api_id = api_name(client_id)
        number = len(self.api_ids)
        while api_id in self.api_ids:  # some clients number their calls in each answer
            api_id = f"{api_name(client_id)}-{number}"
            number += 1
        self.api_ids.add(api_id)
        use = {"type": "tool_use", "id": api_id, "name": name, "input": arguments}
        if self.open_calls:  # a parallel call
            self.calling_turn["content"].append(use)
        else:
            self.append("assistant", [use])
            self.calling_turn = self.turns[-1]
        self.open_calls[client_id] = OpenCall(function, api_id)

    def add_result(self, call_id: JsonValue, blocks: list[Json]) -> None:
        """Add the result of the call with that id."""
        client_id = call_id.require(str)
        if client_id not in self.open_calls:
            raise call_id.error("is not the id of an earlier call without a result.")
        call = self.open_calls.pop(client_id)
        result: Json = {"type": "tool_result", "tool_use_id": call.api_id}
        if len(blocks) == 1 and blocks[0]["type"] == "text":
            result["content"] = blocks[0]["text"]
        elif blocks:
            result["content"] = blocks
        self.append("user", [result])
        if not self.open_calls:
            for role, waiting_blocks in self.waiting:
                self.append(role, waiting_blocks)
            self.waiting = []

    def add_blocks(self, role: str, blocks: list[Json]) -> None:
        """Add what is neither a call nor a result."""
        if not blocks:
            return
        if self.open_calls and not self.continues_calling_turn(role):
            self.waiting.append((role, blocks))
        else:
            self.append(role, blocks)

    def continues_calling_turn(self, role: str) -> bool:
        """Whether blocks of this role can be added to the turn of the open calls."""
        in_last_turn = self.turns[-1] is self.calling_turn
        return role == "assistant" and in_last_turn and not self.waiting

    def append(self, role: str, blocks: list[Json]) -> None:
        if not self.turns and role == "assistant":
            self.turns.append(
                {"role": "user", "content": [text_block(PLACEHOLDER_FIRST_TURN)]}
            )
        if self.turns and self.turns[-1]["role"] == role:
            self.turns[-1]["content"] += blocks  # in place; copying would be quadratic
        else:
            self.turns.append({"role": role, "content": blocks})

    def called_tool_names(self) -> list[str]:
        """The names at the API of all tools that the conversation calls."""
        names = set()
        for turn in self.turns:
            for block in turn["content"]:
                if block["type"] == "tool_use":
                    names.add(block["name"])
        return sorted(names)

    def require_all_calls_answered(self) -> None:
        """Raises APIError 400 for the first call without a result."""
        if not self.open_calls:
            return
        client_id, call = next(iter(self.open_calls.items()))
        message = (
            f"The tool call '{client_id[:100]}' has no result. Send the result of "
            "every call, with the id of the call."
        )
        raise APIError(400, message, None, call.function.path)

    def finish(self) -> None:
        """The turns. The last one is the user's, as the API requires."""
        self.require_all_calls_answered()
        if not self.turns:
            self.append("user", [text_block(PLACEHOLDER_FIRST_TURN)])
        elif self.turns[-1]["role"] == "assistant":
            self.append("user", [text_block(PLACEHOLDER_LAST_TURN)])


def add_item(builder: ConversationBuilder, item: JsonValue, cache: AnswerCache) -> None:
    """Add an item of `input`. Items that are past and ask for nothing, such as the
    searches of another provider, are left out. Raises APIError 400 or 404."""
    item_type = item.get("type").optional(str)
    if item_type is None:
        item_type = "message"
    row = ITEM_TYPES.get(item_type)
    if row is None:
        builder.ignored_kinds.add(item_type)
        call_id = item.get("call_id").value
        if type(call_id) is str:
            builder.ignored_call_ids.add(call_id)
    elif row.treatment == REFUSED:
        problem = f"'{item_type}' is not supported: {row.reason}."
        raise item.get("type").error(problem, "unsupported_type")
    elif item_type in ITEM_PARSERS:
        ITEM_PARSERS[item_type](builder, item, cache)


def add_message_item(
    builder: ConversationBuilder, item: JsonValue, cache: AnswerCache
) -> None:
    builder.add_message(item)


def add_agent_message_item(
    builder: ConversationBuilder, item: JsonValue, cache: AnswerCache
) -> None:
    builder.add_blocks("user", parse_agent_message(item))


def add_function_call_item(
    builder: ConversationBuilder, item: JsonValue, cache: AnswerCache
) -> None:
    add_call_item(builder, item, parse_arguments(item.get("arguments")))


def add_custom_call_item(
    builder: ConversationBuilder, item: JsonValue, cache: AnswerCache
) -> None:
    add_call_item(builder, item, item.get("input").require(str))


def add_output_item(
    builder: ConversationBuilder, item: JsonValue, cache: AnswerCache
) -> None:
    call_id = item.get("call_id")
    if call_id.require(str) in builder.ignored_call_ids:
        return  # Codex answers a local_shell_call with a function_call_output
    blocks = parse_content(item.get("output"), MEDIA_PARTS)
    builder.add_result(call_id, blocks)


def add_call_item(
    builder: ConversationBuilder, item: JsonValue, arguments: Any
) -> None:
    function = item
    namespace = item.get("namespace").optional(str)
    if namespace:
        function = namespace_function(item, namespace)
    builder.add_call(item.get("call_id"), function, arguments)


def add_item_reference(
    builder: ConversationBuilder, item: JsonValue, cache: AnswerCache
) -> None:
    """Add the text of a message of a recent answer. A reasoning item is left out:
    signed thinking is found by the id of the call that followed it."""
    item_id = item.get("id")
    name = item_id.require(str)
    if name.startswith(REASONING_ID_PREFIX):
        return
    text = cache.find_item_text(name)
    if text is None:
        message = (
            f"Item with id '{name[:100]}' not found. Send the item itself; "
            "`store: false` makes most clients do so."
        )
        raise APIError(404, message, "item_not_found", item_id.path)
    if text:
        builder.add_blocks("assistant", [text_block(text)])


# How a text that OpenAI encrypted begins: base64 of Fernet's version byte, 0x80.
REASONING_ID_PREFIX = "rs_"  # of the ids of reasoning items
OPENAI_CIPHERTEXT_PREFIX = "gAAAA"


def parse_agent_message(item: JsonValue) -> list[Json]:
    """A message from one of Codex's agents to another. If Claude wrote it, its
    `encrypted_content` is plain text. What OpenAI encrypted is left out, because only
    OpenAI can read it."""
    blocks = []
    for part in item.get("content").items():
        if part.get("type").value == "encrypted_content":
            text = part.get("encrypted_content").optional(str) or ""
            if not text.startswith(OPENAI_CIPHERTEXT_PREFIX) and text.strip():
                blocks.append(text_block(text))
        else:
            blocks += parse_part(part, MEDIA_PARTS)
    return blocks


def parse_arguments(arguments: JsonValue) -> Json:
    """The `arguments` of a call as the API requires them: an object. Any other text
    becomes {"arguments": text}: truncated JSON, for example, or JSON with NaN, at which
    the CLI fails."""
    text = arguments.optional(str)
    if not text:
        return {}
    with contextlib.suppress(ValueError, RecursionError):
        value = load_json(text)
        if type(value) is dict:
            return value
    return {"arguments": without_lone_surrogates(text)}


ITEM_PARSERS: dict[
    str, Callable[[ConversationBuilder, JsonValue, AnswerCache], None]
] = {
    "message": add_message_item,
    "agent_message": add_agent_message_item,
    "function_call": add_function_call_item,
    "custom_tool_call": add_custom_call_item,
    "function_call_output": add_output_item,
    "custom_tool_call_output": add_output_item,
    "item_reference": add_item_reference,
}


def prepare_history(
    turns: list[Json], wrapped: set[str], model: str, cache: AnswerCache
) -> None:
    """Turn the client's history into what the API saw. Moves calls to the end of their
    turn, wraps the inputs of wrapped tools, and restores the signed thinking, which
    clients do not send back. Changes `turns`."""
    for turn in turns:
        turn["content"].sort(key=lambda block: bool(block["type"] == "tool_use"))
        calls = [block for block in turn["content"] if block["type"] == "tool_use"]
        for call in calls:
            if call["name"] in wrapped or type(call["input"]) is str:
                call["input"] = {WRAPPER_KEY: call["input"]}
        answer = cache.find_signed_answer(call["id"] for call in calls)
        if answer is not None and answer.model == model:
            turn["content"] = merge_signed_blocks(answer.blocks, turn["content"])
            turn["model"] = answer.signed_by


def merge_signed_blocks(signed: list[Json], content: list[Json]) -> list[Json]:
    """Merge the client's copy of an answer with the signed original. If both have the
    same text and calls, use the original order; otherwise put the thinking first."""
    calls = {block["id"]: block for block in content if block["type"] == "tool_use"}
    signed_ids = [block["id"] for block in signed if block["type"] == "tool_use"]
    same_calls = sorted(signed_ids) == sorted(calls)
    if same_calls and joined_text(signed) == joined_text(content):
        return [calls.get(block.get("id", ""), block) for block in signed]
    thinking = [block for block in signed if is_thinking(block)]
    return thinking + content


def joined_text(blocks: list[Json]) -> str:
    return "".join(block["text"] for block in blocks if block["type"] == "text")


def is_thinking(block: Json) -> bool:
    return block["type"] in ("thinking", "redacted_thinking")


def continues_unsigned_loop(turns: list[Json]) -> bool:
    """Whether the last turn continues a tool loop with a call whose signed thinking is
    not known any more. (A user's turn that holds a tool result and a text still belongs
    to the loop.)"""
    for turn in reversed(turns):
        kinds = [block["type"] for block in turn["content"]]
        if turn["role"] == "user" and "tool_result" not in kinds:
            return False
        if "tool_use" in kinds and not is_thinking(turn["content"][0]):
            return True
    return False


def chat_answer_turns(
    request: Request, message: Json, cache: AnswerCache
) -> list[Json]:
    """The turns by which the conversation will have grown if the client sends this
    answer back unchanged. Raises APIError."""
    builder = ConversationBuilder()
    builder.add_message(JsonValue(message))
    return answer_turns(request, builder, cache)


def response_answer_turns(
    request: Request, items: list[Json], cache: AnswerCache
) -> list[Json]:
    """The same for the items of a response."""
    builder = ConversationBuilder()
    for item in JsonValue(items).items():
        add_item(builder, item, cache)
    return answer_turns(request, builder, cache)


def answer_turns(
    request: Request, builder: ConversationBuilder, cache: AnswerCache
) -> list[Json]:
    """The turns in `builder` without the first one. That is PLACEHOLDER_FIRST_TURN,
    because an answer begins with the assistant's turn."""
    wrapped = set(request.decoding.wrapped_tools)
    prepare_history(builder.turns, wrapped, request.prompt.model, cache)
    return builder.turns[1:]


# ── Content ──────────────────────────────────────────────────────────────────────
# Parts of messages -> content blocks of the Messages API. Pure. To support a new kind
# of part, add a function to CONTENT_PARTS.

TEXT_PARTS = ("text", "input_text", "output_text")
ASSISTANT_PARTS = (*TEXT_PARTS, "refusal")
MEDIA_PARTS = (*TEXT_PARTS, "image_url", "input_image", "file", "input_file")
IMAGE_TYPES = re.compile("image/(png|jpeg|gif|webp)")
FILE_TYPES = re.compile("application/(pdf|json)|text/.*")


def parse_content(content: JsonValue, kinds: tuple[str, ...]) -> list[Json]:
    """A string, or an array of parts of the given kinds, as blocks of the Messages API.
    Raises APIError 400."""
    blocks = []
    for part in content_parts(content):
        blocks += parse_part(part, kinds)
    return blocks


def content_parts(content: JsonValue) -> list[JsonValue]:
    """The parts of a message's content. A string counts as one part."""
    if type(content.require(str, list)) is str:
        return [content]
    return list(content.items())


def parse_part(part: JsonValue, kinds: tuple[str, ...]) -> list[Json]:
    """The block for a part, if any: blank texts are dropped. Raises APIError 400."""
    if type(part.value) is str:  # some clients put bare strings into an array
        block = text_block(part.value)
    else:
        block = CONTENT_PARTS[checked_type(part, kinds)](part)
    if block["type"] == "text" and not block["text"].strip():
        return []
    return [block]


def text_part(part: JsonValue) -> Json:
    return text_block(part.get("text").require(str))


def refusal_part(part: JsonValue) -> Json:
    return text_block(part.get("refusal").require(str))


def image_part(part: JsonValue) -> Json:
    """{image_url: URL}, or {image_url: {url: URL}}."""
    url = part.get("image_url")
    if type(url.require(dict, str)) is dict:
        url = url.get("url")
    url.require(str)
    if is_web_url(url.value):
        return {"type": "image", "source": {"type": "url", "url": url.value}}
    supported = "PNG, JPEG, GIF and WebP"
    source = data_source(url, url.value, IMAGE_TYPES, supported)
    return {"type": "image", "source": source}


def is_web_url(url: str) -> bool:
    return re.match(r"https?://", url) is not None


def chat_file_part(part: JsonValue) -> Json:
    return file_part(part.get("file"))


def file_part(holder: JsonValue) -> Json:
    """{file_data, filename?}, or {file_url}, as a document."""
    file_url = holder.get("file_url").optional(str)
    file_data = holder.get("file_data")
    if file_url is not None and file_data.value is None:
        if not is_web_url(file_url):
            raise holder.get("file_url").error("must be an http(s) URL.")
        source: Json = {"type": "url", "url": file_url}
    elif file_data.value is None:
        raise holder.error(
            "must have 'file_data' or 'file_url'. (A 'file_id' is not supported.)",
            "unsupported_content",
        )
    else:
        source = file_source(file_data)
    block: Json = {"type": "document", "source": source}
    title = holder.get("filename").optional(str)
    if title:
        block["title"] = title
    return block


def file_source(file_data: JsonValue) -> Json:
    """The source of a document. OpenAI takes bare base64 for a PDF."""
    url = file_data.require(str)
    if not url.startswith("data:"):
        url = "data:application/pdf;base64," + url
    supported = "PDF, JSON and text"
    source = data_source(file_data, url, FILE_TYPES, supported)
    if source["media_type"] == "application/pdf":
        return source
    text = base64.b64decode(source["data"]).decode("utf-8", "replace")
    return {"type": "text", "media_type": "text/plain", "data": text}


def data_source(
    value: JsonValue, url: str, media_types: re.Pattern[str], supported: str
) -> Json:
    """Convert data:TYPE;base64,DATA (RFC 2397) to the source of a block. Raises
    APIError 400 at `value`. `supported` names the media types for the error message."""
    head, _, data = url.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64"):
        raise value.error("must be an http(s) URL or a base64 data: URL.")
    media_type = head[len("data:") :].split(";")[0].lower()
    if media_type == "image/jpg":
        media_type = "image/jpeg"
    if not media_types.fullmatch(media_type):
        problem = f"has the media type '{media_type[:50]}'. Supported are {supported}."
        raise value.error(problem, "unsupported_media_type")
    data = re.sub(r"\s+", "", data)
    with contextlib.suppress(ValueError):
        if base64.b64decode(data, validate=True):
            return {"type": "base64", "media_type": media_type, "data": data}
    raise value.error("has data that is empty, or is not valid base64.")


CONTENT_PARTS: dict[str, Callable[[JsonValue], Json]] = {
    "text": text_part,
    "input_text": text_part,
    "output_text": text_part,
    "refusal": refusal_part,
    "image_url": image_part,
    "input_image": image_part,
    "file": chat_file_part,
    "input_file": file_part,
}


# ── CLI protocol ─────────────────────────────────────────────────────────────────
# How `claude -p` is driven over stdin: its arguments, environment and lines. Pure, but
# for cli_environment(), which reads os.environ. Measured on 2.1.112, 2.1.197, 2.1.330
# and 2.1.332, 2026-11-25. An example, shortened (> what we write, < what it prints;
# each is one JSON object on one line):
#
#   > {"type":"control_request","request_id":"1","request":{"subtype":"initialize",
#      "systemPrompt":["You are terse."],"sdkMcpServers":["c"]}}
#   < {"type":"control_request","request_id":"ab","request":{"subtype":"mcp_message",
#      "server_name":"c","message":{"method":"tools/list","jsonrpc":"2.0","id":1}}}
#   > {"type":"control_response","response":{"subtype":"success","request_id":"ab",
#      "response":{"mcp_response":{"jsonrpc":"2.0","id":1,"result":{"tools":[…]}}}}}
#   < {"type":"control_response","response":{"subtype":"success","request_id":"1",…}}
#   > {"type":"user","shouldQuery":false,…}        an earlier turn: wait for its result
#   < {"type":"result","num_turns":0,…}
#   > {"type":"assistant","message":{"id":"msg_1",…},…}      no answer to wait for
#   > {"type":"control_request","request_id":"1","request":{"subtype":
#      "apply_flag_settings","settings":{"env":{"CLAUDE_CODE_EFFORT_LEVEL":"low"}}}}
#   > {"type":"user",…}                            the last turn: this asks the model
#   < {"type":"system","subtype":"init",…}         and other kinds, which are skipped
#   < {"type":"stream_event","event":{"type":"message_start",…},…}
#   < {"type":"stream_event","event":{"type":"content_block_delta",…},…}
#   < {"type":"assistant","message":{…}}           the finished block once more
#   < {"type":"stream_event","event":{"type":"message_delta","delta":{"stop_reason":
#      "end_turn"},"usage":{"output_tokens":3}},…}           the answer is complete
#   < {"type":"rate_limit_event","rate_limit_info":{…}}      here we end the process
#   < {"type":"result",…}
#
# If a turn is sent before the result of the one before it has come, the CLI reorders
# them, and it merges assistant turns that have one id: hence the waits and the ids. We
# never answer `tools/call`: the client runs its tools, and sends the result in its next
# request.

MCP_SERVER_NAME = "c"  # of the MCP server that holds the client's tools
CLI_ARGUMENTS = [
    "-p",
    "--input-format",
    "stream-json",
    "--output-format",
    "stream-json",
    "--verbose",
    "--include-partial-messages",
    "--no-session-persistence",
    "--tools",
    "",  # none of the CLI's own tools
    "--strict-mcp-config",  # none of the user's MCP servers
    "--setting-sources",
    "",  # no hooks, plugins and CLAUDE.md
    "--disable-slash-commands",
    "--allowedTools",
    f"mcp__{MCP_SERVER_NAME}",
    "--settings",  # for a client's tool named Bash, the CLI would explain commits
    '{"attribution":{"commit":"","pr":""},"includeCoAuthoredBy":false}',
]
CLI_VARIABLES = {
    # `@/path` in a text would make the CLI read that file.
    "CLAUDE_CODE_DISABLE_ATTACHMENTS": "1",
    "CLAUDE_CODE_DISABLE_FILE_MENTIONS": "1",
    # The client's tools keep their names.
    "CLAUDE_AGENT_SDK_MCP_NO_PREFIX": "1",
    # With a tool named Agent, the CLI would describe its own agents.
    "CLAUDE_AGENT_SDK_DISABLE_BUILTIN_AGENTS": "1",
    # With many tools, the CLI would hide some at first.
    "ENABLE_TOOL_SEARCH": "false",
    # After a 5xx. The default of 10 retries takes minutes.
    "CLAUDE_CODE_MAX_RETRIES": "2",
    "CLAUDE_CODE_DISABLE_REFUSAL_RETRY": "1",
    "DISABLE_AUTO_COMPACT": "1",
    # The API enforces the context limit.
    "CLAUDE_CODE_BLOCKING_LIMIT_OVERRIDE": "100000000",
    # The API refuses a cache mark of one hour behind one of five minutes. Ours lasts an
    # hour, so the CLI's must, too.
    "ENABLE_PROMPT_CACHING_1H": "1",
    "CLAUDE_CODE_SKIP_MCP_DEBUG_LOG_FILES": "1",
    "DISABLE_AUTOUPDATER": "1",
}
# The working directory of every CLI, below the server's own directory. It is empty, and
# always the same: 2.1.330 puts its path into the prompt, before the cached turns.
CLI_WORKDIR = "cwd"
CACHE_MARK = {"type": "ephemeral", "ttl": "1h"}
# With one of these set, the CLI would use another account than the subscription's.
BILLING_VARIABLES = [
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_AUTH_TOKEN",
    "CLAUDE_CODE_USE_BEDROCK",
    "CLAUDE_CODE_USE_VERTEX",
    "CLAUDE_CODE_USE_FOUNDRY",
    "CLAUDE_CODE_USE_MANTLE",
    "CLAUDE_CODE_USE_ANTHROPIC_AWS",
    "CLAUDE_CODE_USE_ANTHROPIC_GOOGLE_CLOUD",
    "CLAUDE_CODE_USE_GATEWAY",
]
# With CLAUDECODE set, the CLI refuses to start. The others would change every request;
# query_lines() sets what a request asks for.
REMOVED_VARIABLES = [
    "CLAUDECODE",
    "MAX_THINKING_TOKENS",
    "CLAUDE_CODE_MAX_OUTPUT_TOKENS",
    "CLAUDE_CODE_EXTRA_BODY",
    "CLAUDE_CODE_DISABLE_THINKING",
    "CLAUDE_CODE_EFFORT_LEVEL",
]

Version = tuple[int, ...]


def cli_environment(path: str) -> dict[str, str]:
    """The environment for the CLI at `path`.

    The CLI's own directory is added to the end of PATH: under nvm, npm's `claude` finds
    `node` there, and launchd's PATH does not have it.
    """
    removed = {*BILLING_VARIABLES, *REMOVED_VARIABLES}
    removed.update(ENVIRONMENT_PREFIX + name.upper() for name in OPTIONS)
    environment = {
        name: value for name, value in os.environ.items() if name not in removed
    }
    environment.update(CLI_VARIABLES)
    search_path = os.environ.get("PATH") or os.defpath
    environment["PATH"] = os.pathsep.join([search_path, os.path.dirname(path)])
    return environment


class CliLine(NamedTuple):
    """A line for the CLI, without its newline. If `needs_result` is set, nothing more
    may be sent until the CLI has printed a result line."""

    text: str
    needs_result: bool = False


def control_line(subtype: str, **fields: Any) -> CliLine:
    """A control request. They share one id: only the answer to `initialize` is used,
    and it is recognized by its content."""
    request = {"subtype": subtype, **fields}
    line = {"type": "control_request", "request_id": "1", "request": request}
    return CliLine(json.dumps(line))


def settings_line(**settings: Any) -> CliLine:
    """A line that changes the settings of a running CLI, before the query is sent. All
    versions take `env`; from CLI_WITH_LATE_MODEL on also `model`, before the first
    turn."""
    return control_line("apply_flag_settings", settings=settings)


@dataclasses.dataclass(frozen=True)
class InitializeOptions:
    """What is sent with `initialize`, which a CLI takes only once. `tools_json` is
    compared instead of `tools`, because to Python True and 1 are equal."""

    system: str
    tools: list[Json] = dataclasses.field(compare=False)  # as MCP lists them
    tools_json: str

    def line(self) -> CliLine:
        fields: Json = {"systemPrompt": [self.system]}
        if self.tools:
            fields["sdkMcpServers"] = [MCP_SERVER_NAME]
        return control_line("initialize", **fields)


def initialize_options(system: str, tools: list[Json]) -> InitializeOptions:
    return InitializeOptions(system, tools, json.dumps(tools))


def turn_message(turn: Json, position: int, version: Version) -> Json:
    """The line for a turn, as JSON. `position` makes the id of an assistant turn
    unique."""
    line: Json = {"type": turn["role"], "session_id": "", "parent_tool_use_id": None}
    message: Json = {"role": turn["role"], "content": turn["content"]}
    if turn["role"] == "user":
        message["content"] = protect_slash_commands(turn["content"], version)
        line["text_not_typed"] = True
    else:
        message["type"] = "message"
        message["id"] = f"msg_{position}"
        # The CLI drops thinking blocks that another model signed.
        message["model"] = turn.get("model", "m")
        message["stop_reason"] = None
        message["stop_sequence"] = None
        message["usage"] = {"input_tokens": 0, "output_tokens": 0}
    line["message"] = message
    return line


def history_line(turn: Json, position: int, version: Version) -> CliLine:
    """The line for an earlier turn of the conversation."""
    line = turn_message(turn, position, version)
    if turn["role"] == "assistant":
        return CliLine(json.dumps(line))
    line["shouldQuery"] = False
    return CliLine(json.dumps(line), needs_result=True)


def query_line(turn: Json, version: Version) -> CliLine:
    """The line for the last turn, which starts the model.

    A cache mark is put on its last block: without it, the next turn would not find this
    one in the prompt cache. 2.1.330 drops a mark on an image, so the last block that is
    not an image gets it, if there is one.
    """
    line = turn_message(turn, 0, version)
    content = list(line["message"]["content"])
    marked = len(content) - 1
    for i, block in enumerate(content):
        if block["type"] != "image":
            marked = i
    content[marked] = {**content[marked], "cache_control": CACHE_MARK}
    line["message"]["content"] = content
    return CliLine(json.dumps(line))


def query_lines(prompt: Prompt, version: Version) -> list[CliLine]:
    """The lines that make the CLI answer: the request's settings and its last turn. The
    settings take the CLI 10 ms, and are left out if there are none."""
    options = prompt.options
    variables = {}
    if options.effort:
        variables["CLAUDE_CODE_EFFORT_LEVEL"] = options.effort
    if options.max_tokens:
        variables["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] = str(options.max_tokens)
    if not options.thinking:
        variables["CLAUDE_CODE_DISABLE_THINKING"] = "1"
    if options.tool_choice:
        extra_body = {"tool_choice": options.tool_choice}
        variables["CLAUDE_CODE_EXTRA_BODY"] = json.dumps(extra_body)
    lines = [query_line(prompt.turns[-1], version)]
    if variables:
        lines.insert(0, settings_line(env=variables))
    return lines


def protect_slash_commands(content: list[Json], version: Version) -> list[Json]:
    """Keep the CLI from reading user content as a typed command.

    Versions that do not know `text_not_typed` read a last text that begins with "/" as
    a command, unless it is split after the slashes. The model sees the same text.
    """
    text = content[-1].get("text", "")
    if version >= CLI_WITH_TEXT_NOT_TYPED or not text.startswith("/"):
        return content
    rest = text.lstrip("/")
    if rest.strip():
        slashes = text[: len(text) - len(rest)]
        return [*content[:-1], text_block(slashes), text_block(rest)]
    return [*content[:-1], text_block("\n" + text)]  # the API refuses a blank block


class SentState(NamedTuple):
    """What a process has been sent, or is to be sent, before its query: the model, the
    options of `initialize` (None: not sent yet), and the earlier turns."""

    model: str
    initialize: InitializeOptions | None = None
    turns: tuple[CliLine, ...] = ()

    def conversation_hash(self) -> bytes:
        """A hash of the conversation up to this point, without the model."""
        digest = hashlib.sha256()
        if self.initialize is not None:
            digest.update(self.initialize.system.encode("utf-8", "surrogatepass"))
            digest.update(self.initialize.tools_json.encode())
        for line in self.turns:
            digest.update(line.text.encode())
        return digest.digest()


def state_before_query(prompt: Prompt, version: Version) -> SentState:
    """The state of a process that has been sent all but the last turn. Raises
    RecursionError for JSON that is nested too deeply."""
    initialize = initialize_options(prompt.system, prompt.tools)
    state = SentState(prompt.model, initialize)
    return state_with_turns(state, prompt.turns[:-1], version)


def state_with_turns(
    state: SentState, turns: list[Json], version: Version
) -> SentState:
    """The state after further turns. Raises RecursionError."""
    lines = list(state.turns)
    for turn in turns:
        lines.append(history_line(turn, len(lines), version))
    return SentState(state.model, state.initialize, tuple(lines))


def mcp_reply(line: Json, tools: list[Json]) -> CliLine | None:
    """The answer of an MCP server with these tools to a control request of the CLI.

    None for `tools/call`, which is never answered: the client runs the tool, and the
    CLI is stopped at the end of its answer. Raises one of MALFORMED_LINE_ERRORS.
    """
    message = line["request"].get("message") or {}
    method = message.get("method")
    result: Json = {}
    if method == "tools/call":
        return None
    if method == "tools/list":
        result["tools"] = tools
    elif method == "initialize":
        parameters = message.get("params") or {}
        result["protocolVersion"] = parameters.get("protocolVersion")
        result["serverInfo"] = {"name": MCP_SERVER_NAME, "version": __version__}
        result["capabilities"] = {"tools": {}}
    reply = {"jsonrpc": "2.0", "id": message.get("id", 0), "result": result}
    response = {
        "subtype": "success",
        "request_id": line["request_id"],
        "response": {"mcp_response": reply},
    }
    return CliLine(json.dumps({"type": "control_response", "response": response}))


def parse_cli_line(text: bytes) -> Json | None:
    """Parse a line that the CLI printed. None if it is not a JSON object: such lines
    are skipped."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if type(value) is dict else None


# ── Decoding ─────────────────────────────────────────────────────────────────────
# From the CLI's lines to events, and to the Answer that they build up. Without I/O.
# Only the kinds of lines in LINE_HANDLERS, and the events of the Messages API in
# EVENT_HANDLERS, are read; all others are skipped.


class MessageStarted(NamedTuple):
    """The API has begun to answer: the first sign of life."""


class TextDelta(NamedTuple):
    """A piece of the answer's text."""

    text: str


class ReasoningDelta(NamedTuple):
    """A piece of the model's thinking."""

    text: str


class ToolCallStarted(NamedTuple):
    """A call of the answer begins."""

    call_index: int
    call_id: str
    name: str


class ToolCallDelta(NamedTuple):
    """A piece of the arguments of a call."""

    call_index: int
    arguments: str


class MessageFinished(NamedTuple):
    """The answer is complete."""

    finish_reason: str


Event = Union[
    MessageStarted,
    TextDelta,
    ReasoningDelta,
    ToolCallStarted,
    ToolCallDelta,
    MessageFinished,
]

FINISH_REASONS = {  # the Messages API's stop_reason -> OpenAI's finish_reason
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}  # all others are "stop"
# After these stop reasons the CLI sends no further request to the API, unless the
# answer was empty. After any other one it may, even while it shuts down.
FINAL_STOP_REASONS = ("end_turn", "stop_sequence")


class RepeatableText:
    """A text that arrives in pieces, and may start again from its beginning.

    If the connection to the API breaks, the CLI asks again, and the answer is repeated.
    After restart(), add() skips what is already known.
    """

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.to_skip = ""

    def __str__(self) -> str:
        return "".join(self.pieces)

    def restart(self) -> None:
        self.to_skip = str(self)

    def add(self, piece: str) -> str:
        """Returns what is new of it. Raises APIError 502 if the repetition differs."""
        if self.to_skip:
            piece = self.skip_known(piece)
        self.pieces.append(piece)
        return piece

    def skip_known(self, piece: str) -> str:
        if piece.startswith(self.to_skip):
            new = piece[len(self.to_skip) :]
            self.to_skip = ""
            return new
        if not self.to_skip.startswith(piece):
            raise interrupted_error()
        self.to_skip = self.to_skip[len(piece) :]
        return ""

    def truncate(self, length: int) -> None:
        self.pieces = [str(self)[:length]]


class StopFilter:
    """Finds stop strings in a text that arrives in pieces.

    It holds back the end of the text as long as that may be the beginning of a stop
    string, or is the first half of a surrogate pair.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.stop = stop
        self.withheld = ""
        self.sent_length = 0
        self.matched = False

    def add(self, piece: str) -> str:
        """Returns what can be sent. Sets `matched` at a stop string."""
        ends_in_half = "\ud800" <= piece[-1:] <= "\udbff"
        if not self.stop and not self.withheld and not ends_in_half:
            return piece
        text = self.withheld + piece
        positions = [text.find(string) for string in self.stop if string in text]
        if positions:
            self.matched = True
            sent = text[: min(positions)]
            self.withheld = ""
        else:
            withheld_length = 1 if ends_in_half else 0
            for string in self.stop:
                length = partial_match_length(text, string)
                withheld_length = max(withheld_length, length)
            sent = text[: len(text) - withheld_length]
            self.withheld = text[len(sent) :]
        self.sent_length += len(sent)
        return sent

    def flush(self) -> str:
        """The text is complete: returns what was withheld."""
        text = self.withheld
        self.withheld = ""
        return text


def partial_match_length(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class ToolCall:
    """A tool call of an answer. `arguments` are JSON, or the text of a custom tool."""

    def __init__(self, index: int, call_id: str, name: str) -> None:
        self.index = index
        self.id = call_id
        self.name = name
        self.arguments = RepeatableText()

    def to_json(self) -> Json:
        """An element of `tool_calls` of chat completions."""
        function = {"name": self.name, "arguments": str(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


class Answer:
    """One answer of the model, as far as it has come.

    `blocks` are the finished blocks with their signatures, but without the inputs of
    streamed calls. `has_output` is set when the first token arrives, `finish_reason`
    when the answer is complete. If `will_stop` is set, the CLI will not send another
    request to the API by itself. `stop_reason` is the Messages API's. It stays None if
    the answer ended at a stop string.
    """

    def __init__(self) -> None:
        self.model = ""
        self.content = RepeatableText()
        self.reasoning = RepeatableText()
        self.calls: list[ToolCall] = []
        self.blocks: list[Json] = []
        self.usage: dict[str, int] = {}
        self.finish_reason: str | None = None
        self.stop_reason: str | None = None
        self.will_stop = False
        self.has_output = False

    def message(self) -> Json:
        """The message of chat completions."""
        content: str | None = str(self.content)
        if not content and self.calls:
            content = None
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if str(self.reasoning):
            message["reasoning_content"] = str(self.reasoning)
        if self.calls:
            message["tool_calls"] = [call.to_json() for call in self.calls]
        return message

    def update_usage(self, usage: Json) -> None:
        """Later counts replace earlier ones; those of message_delta are cumulative."""
        details = usage.get("output_tokens_details") or {}
        for counts in (usage, details):
            for name, value in counts.items():
                if type(value) is int:
                    self.usage[name] = value


class OpenBlock:
    """The content block that is arriving. `emit` is called with each piece of its text.
    It is None for a block that the client does not get."""

    def __init__(self, block: Json) -> None:
        self.block = block
        self.pieces: list[str] = []
        self.emit: Callable[[str], None] | None = None
        self.call: ToolCall | None = None


DELTA_FIELDS = {  # the types of deltas that hold a text, and its name
    "text_delta": "text",
    "thinking_delta": "thinking",
    "input_json_delta": "partial_json",
}


class AnswerDecoder:
    """Reads the lines that the CLI prints for one request, and builds an Answer.

    `now` is the time in epoch seconds. `call_count` is the number of calls since the
    answer last started.
    """

    def __init__(self, request: Request, answer: Answer, now: float) -> None:
        self.request = request
        self.decoding = request.decoding
        self.answer = answer
        self.now = now
        self.events: list[Event] = []  # of the line that is being decoded
        self.open_block = OpenBlock({"type": ""})
        self.stop_filter = StopFilter(request.decoding.stop)
        self.skips_reasoning = False  # of a restarted answer
        self.call_count = 0
        self.failure_category: Any = None  # reported before the result line
        self.failure_text = ""
        self.rate_limit: Json = {}  # the CLI's last rate_limit_info

    def decode(self, line: Json) -> list[Event]:
        """Raises APIError for a failure that the CLI reports, and 502 for a line of a
        known kind in an unknown format."""
        self.events = []
        kind = line.get("type")
        handler = LINE_HANDLERS.get(kind) if type(kind) is str else None
        is_open = self.answer.finish_reason is None or kind == "rate_limit_event"
        if handler is not None and is_open:
            try:
                handler(self, line)
            except MALFORMED_LINE_ERRORS:
                raise unexpected_line_error() from None
        return self.events

    # Lines of the CLI.

    def on_stream_event(self, line: Json) -> None:
        event = line["event"]
        handler = EVENT_HANDLERS.get(event["type"])
        if handler is not None and not line.get("parent_tool_use_id"):
            handler(self, event)

    def on_assistant(self, line: Json) -> None:
        """Such a line repeats a finished block, which is skipped. It may also hold the
        text of a failure, or, with a stop_reason, an answer that was not streamed."""
        message = line["message"]
        if line.get("error"):
            self.failure_category = line["error"]
        if message.get("model") == "<synthetic>":  # a failure of the CLI's own
            texts = [block.get("text", "") for block in message["content"]]
            self.failure_text = "\n".join(texts)
        elif message.get("stop_reason") and not self.failure_category:
            self.add_whole_message(message)

    def on_result(self, line: Json) -> None:
        """The end of the turn. A complete answer would not be read this far, so this is
        a failure. Always raises APIError."""
        api_status = line.get("api_error_status")
        if not line.get("is_error"):
            if not self.failure_text:
                message = "Claude Code ended its turn without an answer."
                raise APIError(502, message, "upstream_error")
            api_status = 400  # 2.1.112 reports an image that it rejects in this way
        text = line.get("result")
        if not text:
            text = self.failure_text
        wait = self.seconds_to_reset()
        raise upstream_error(
            line.get("terminal_reason"),
            api_status,
            self.failure_category,
            str(text),
            wait,
            self.now,
        )

    def seconds_to_reset(self) -> float:
        """Until the limit ends that the API has refused the request for; 0 if it is not
        known, or is not one of the plan's."""
        reset_time = self.rate_limit.get("resetsAt")
        if self.rate_limit.get("status") == "allowed":
            return 0.0
        if reset_time is None or type(reset_time) not in (int, float):
            return 0.0
        return float(reset_time - self.now)

    def on_system(self, line: Json) -> None:
        subtype = line.get("subtype")
        if subtype == "init":
            self.check_tools(line.get("tools") or [])
        elif subtype == "api_retry":
            self.check_retry(line)

    def on_rate_limit(self, line: Json) -> None:
        info = line.get("rate_limit_info")
        if type(info) is dict:
            self.rate_limit = info

    def check_tools(self, cli_tools: list[str]) -> None:
        """Raises APIError 400 if a tool is missing from the CLI's list: the CLI drops a
        tool silently if it rejects the schema. (It lists a tool named Agent as
        Task.)"""
        known = set(cli_tools)
        if "Task" in known:
            known.add("Agent")
        for tool in self.request.prompt.tools:
            if tool["name"] in known:
                continue
            if tool["name"] == STRUCTURED_OUTPUT:
                message = "Claude Code rejected the JSON schema of the answer."
                raise APIError(400, message, "invalid_schema")
            name = self.decoding.tool_names.get(tool["name"], tool["name"])
            message = f"Claude Code rejected the input schema of tool '{name}'."
            raise APIError(400, message, "invalid_schema", "tools")

    def check_retry(self, line: Json) -> None:
        """The CLI announces that it will repeat its request. That only helps against an
        error of the API's own (5xx). Raises APIError for any other."""
        api_status = line["error_status"] or 0
        category = line.get("error")
        if 400 <= api_status < 500:
            text = f"The Claude API answered {api_status} ({category})."
            wait = line["retry_delay_ms"] / 1000
            raise upstream_error(None, api_status, category, text, wait, self.now)

    # Events of the Messages API.

    def on_message_start(self, event: Json) -> None:
        self.start_message(event["message"])

    def on_block_start(self, event: Json) -> None:
        self.start_block(event["content_block"])

    def on_block_delta(self, event: Json) -> None:
        delta = event["delta"]
        field = DELTA_FIELDS.get(delta["type"])
        if field is not None:
            self.add_text(require_str(delta[field]))
        elif delta["type"] == "signature_delta":
            self.open_block.block["signature"] += delta["signature"]

    def on_block_stop(self, event: Json) -> None:
        self.finish_block()

    def on_message_delta(self, event: Json) -> None:
        self.answer.update_usage(event.get("usage") or {})
        stop_reason = event["delta"].get("stop_reason")
        if stop_reason:
            self.finish_message(stop_reason)

    # Building the answer, from a stream or from a whole message.

    def add_whole_message(self, message: Json) -> None:
        self.start_message(message)
        self.answer.has_output = True
        for block in message["content"]:
            self.start_block(block)
            if block["type"] in ("text", "thinking") and self.open_block.emit:
                self.open_block.emit(block[block["type"]])
            self.finish_block()
            if self.answer.finish_reason is not None:  # there was a stop string
                return
        self.finish_message(message["stop_reason"])

    def start_message(self, message: Json) -> None:
        """A second one means that the connection to the API broke: the CLI repeats the
        answer."""
        is_first = not self.answer.model
        self.answer.model = require_str(message["model"])
        self.answer.update_usage(message["usage"])
        self.answer.blocks = []
        self.call_count = 0
        self.answer.content.restart()
        for call in self.answer.calls:
            call.arguments.restart()
        if str(self.answer.reasoning):
            # The retry thinks anew. Only the first thinking is shown.
            self.skips_reasoning = True
        if is_first:
            self.events.append(MessageStarted())

    def start_block(self, content_block: Json) -> None:
        block = OpenBlock(dict(content_block))
        self.open_block = block
        if content_block["type"] == "text":
            block.emit = self.emit_text
        elif content_block["type"] == "thinking":
            block.emit = self.emit_reasoning
        elif content_block["type"] == "tool_use":
            if content_block["name"] != STRUCTURED_OUTPUT:
                block.call = self.start_call(content_block)
                block.emit = functools.partial(self.emit_arguments, block.call)
            elif not self.has_structured_output():
                block.emit = self.emit_text  # only the first one is the answer

    def has_structured_output(self) -> bool:
        names = [block.get("name") for block in self.answer.blocks]
        return STRUCTURED_OUTPUT in names

    def start_call(self, block: Json) -> ToolCall:
        index = self.call_count
        self.call_count += 1
        name = self.decoding.tool_names.get(block["name"], block["name"])
        if index == len(self.answer.calls):
            call = ToolCall(index, require_str(block["id"]), require_str(name))
            self.answer.calls.append(call)
            self.events.append(ToolCallStarted(index, call.id, call.name))
        elif self.answer.calls[index].name != name:
            raise interrupted_error()
        return self.answer.calls[index]  # the id of a repeated call is the first one's

    def add_text(self, text: str) -> None:
        """Add a piece of the open block's text."""
        block = self.open_block
        block.pieces.append(text)
        self.answer.has_output = True
        if block.emit is not None and not self.is_wrapped(block.block):
            block.emit(text)

    def is_wrapped(self, block: Json) -> bool:
        return block.get("name") in self.decoding.wrapped_tools

    def finish_block(self) -> None:
        """Keep the block with its text and signature, and emit the input of a call that
        was not emitted in pieces."""
        block = self.open_block.block
        text = "".join(self.open_block.pieces)
        if block["type"] in ("text", "thinking"):
            block[block["type"]] += text
        if block["type"] != "text" or block["text"].strip():  # the API refuses a blank
            self.answer.blocks.append(block)
        if block["type"] == "tool_use" and self.open_block.emit is not None:
            if self.is_wrapped(block):
                self.open_block.emit(self.unwrapped_input(block, text))
            elif not text:
                self.open_block.emit(compact_json(block["input"]))

    def unwrapped_input(self, block: Json, text: str) -> str:
        """The input of a call of a wrapped tool, without the wrapping: JSON, or the
        text of a custom tool. An input that the model did not wrap, and truncated JSON,
        are returned unchanged. Of a truncated text, the part that arrived is returned.
        """
        value = block["input"]
        if text:
            try:
                value = load_json(text)
            except (ValueError, RecursionError):
                if block["name"] in self.decoding.text_tools:
                    return truncated_text(text)
                return text
        if type(value) is dict and value.keys() == {WRAPPER_KEY}:
            value = value[WRAPPER_KEY]
        elif text:
            return text
        if type(value) is str:
            return value
        return compact_json(value)

    def finish_message(self, stop_reason: str) -> None:
        self.check_repetition()
        withheld = self.stop_filter.flush()
        if withheld:
            self.events.append(TextDelta(withheld))
        finish_reason = FINISH_REASONS.get(stop_reason, "stop")
        if stop_reason == "tool_use" and not self.answer.calls:
            finish_reason = "stop"  # it was STRUCTURED_OUTPUT
        is_final = stop_reason in FINAL_STOP_REASONS
        self.answer.stop_reason = stop_reason
        self.answer.will_stop = is_final and bool(str(self.answer.content))
        self.finish(finish_reason)

    def check_repetition(self) -> None:
        """Raises APIError 502 if a repeated answer ended before the first one did."""
        texts = [self.answer.content]
        texts += [call.arguments for call in self.answer.calls]
        if any(text.to_skip for text in texts):
            raise interrupted_error()
        if self.call_count < len(self.answer.calls):
            raise interrupted_error()

    def finish(self, finish_reason: str) -> None:
        self.answer.finish_reason = finish_reason
        self.events.append(MessageFinished(finish_reason))

    def emit_text(self, piece: str) -> None:
        """Emit what is new of the answer's text, up to a stop string."""
        if self.answer.finish_reason is not None:  # there was a stop string before
            return
        text = self.stop_filter.add(self.answer.content.add(piece))
        if text:
            self.events.append(TextDelta(text))
        if self.stop_filter.matched:
            self.answer.content.truncate(self.stop_filter.sent_length)
            self.answer.will_stop = True  # the CLI has not finished its only request
            self.finish("stop")

    def emit_reasoning(self, piece: str) -> None:
        if piece and not self.skips_reasoning and self.answer.finish_reason is None:
            self.answer.reasoning.add(piece)
            self.events.append(ReasoningDelta(piece))

    def emit_arguments(self, call: ToolCall, piece: str) -> None:
        text = call.arguments.add(piece)
        if text and self.answer.finish_reason is None:
            self.events.append(ToolCallDelta(call.index, text))


EVENT_HANDLERS: dict[str, Callable[[AnswerDecoder, Json], None]] = {
    "message_start": AnswerDecoder.on_message_start,
    "content_block_start": AnswerDecoder.on_block_start,
    "content_block_delta": AnswerDecoder.on_block_delta,
    "content_block_stop": AnswerDecoder.on_block_stop,
    "message_delta": AnswerDecoder.on_message_delta,
}
LINE_HANDLERS: dict[str, Callable[[AnswerDecoder, Json], None]] = {
    "stream_event": AnswerDecoder.on_stream_event,
    "assistant": AnswerDecoder.on_assistant,
    "result": AnswerDecoder.on_result,
    "system": AnswerDecoder.on_system,
    "rate_limit_event": AnswerDecoder.on_rate_limit,
}


def require_str(value: Any) -> str:
    if type(value) is not str:
        raise TypeError
    return value


def compact_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def truncated_text(text: str) -> str:
    """The part that arrived of the string in '{"input": "…', whose end is missing."""
    opening = f'{{"{WRAPPER_KEY}":"'
    if opening.startswith(re.sub(r"\s", "", text)):
        return ""  # nothing of the string itself
    start = re.match(rf'\s*{{\s*"{WRAPPER_KEY}"\s*:\s*"', text)
    if start is None:
        return text
    rest = text[start.end() :]
    for length in range(len(rest), max(-1, len(rest) - 6), -1):  # an escape may be cut
        with contextlib.suppress(ValueError):
            return require_str(json.loads(f'"{rest[:length]}"'))
    return text


def interrupted_error() -> APIError:
    message = (
        "The connection to the Claude API broke, and the retry gave another answer."
    )
    return APIError(502, message, "stream_interrupted")


# ── Writers ──────────────────────────────────────────────────────────────────────
# From events to what the client gets: chunks of chat completions, events of Responses,
# or one JSON body. Without I/O: ids and the clock are passed in. A writer also reads
# the Answer that the decoder fills: its model, its usage and its finish reason.
# ChatWriter and ResponseWriter have the same methods.


class TokenCounts(NamedTuple):
    """The usage of a response in tokens. `input` includes what was read from and
    written to the prompt cache."""

    input: int
    cached: int
    cache_write: int
    output: int
    reasoning: int


def count_tokens(answers: list[Answer]) -> TokenCounts:
    """The Messages API's usage of each answer, summed up. Its `input_tokens` leave out
    what was read from, or written to, the prompt cache."""
    sums: collections.Counter[str] = collections.Counter()
    for answer in answers:
        sums.update(answer.usage)
    cached = sums["cache_read_input_tokens"]
    written = sums["cache_creation_input_tokens"]
    return TokenCounts(
        input=sums["input_tokens"] + cached + written,
        cached=cached,
        cache_write=written,
        output=sums["output_tokens"],
        reasoning=sums["thinking_tokens"],
    )


def sse_event(data: Json, name: str = "") -> str:
    """A server-sent event (HTML standard, 9.2)."""
    text = f"data: {json.dumps(data)}\n\n"
    if name:
        return f"event: {name}\n{text}"
    return text


class ChatWriter:
    """Writes a chat completion. `started` holds the indexes of the choices whose role
    has been sent."""

    def __init__(
        self,
        request: Request,
        answers: list[Answer],
        unique_id: str,
        clock: Callable[[], float],
    ) -> None:
        self.request = request
        self.answers = answers
        self.id = f"chatcmpl-{unique_id}"
        self.created = int(clock())
        self.started: set[int] = set()

    @property
    def model(self) -> str:
        """The API's own name for it, as soon as that is known."""
        return self.answers[0].model or self.request.output.model

    def usage(self) -> Json:
        counts = count_tokens(self.answers)
        return {
            "prompt_tokens": counts.input,
            "completion_tokens": counts.output,
            "total_tokens": counts.input + counts.output,
            "prompt_tokens_details": {"cached_tokens": counts.cached},
            "completion_tokens_details": {"reasoning_tokens": counts.reasoning},
        }

    def record(self, index: int, event: Event) -> None:
        """Take an event of a response that is not streamed. Nothing to do: body() reads
        the answers."""

    def write(self, index: int, event: Event) -> str:
        """The chunk for an event of the choice `index`."""
        delta: Json = {}
        finish_reason = None
        if index not in self.started:
            self.started.add(index)
            delta["role"] = "assistant"
            delta["content"] = ""
        if isinstance(event, TextDelta):
            delta["content"] = event.text
        elif isinstance(event, ReasoningDelta):
            delta["reasoning_content"] = event.text
        elif isinstance(event, ToolCallStarted):
            function = {"name": event.name, "arguments": ""}
            call = {"id": event.call_id, "type": "function", "function": function}
            delta["tool_calls"] = [{"index": event.call_index, **call}]
        elif isinstance(event, ToolCallDelta):
            function = {"arguments": event.arguments}
            delta["tool_calls"] = [{"index": event.call_index, "function": function}]
        elif isinstance(event, MessageFinished):
            finish_reason = event.finish_reason
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason}
        return self.chunk([choice])

    def chunk(self, choices: list[Json], usage: Json | None = None) -> str:
        chunk = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        if self.request.output.include_usage:
            chunk["usage"] = usage
        return sse_event(chunk)

    def keep_alive(self) -> str:
        """A chunk that changes nothing. (A comment would not reset the watchdogs of
        some clients.)"""
        if not self.started:
            self.started.add(0)
            delta = {"role": "assistant", "content": ""}
            choice = {"index": 0, "delta": delta, "finish_reason": None}
            return self.chunk([choice])
        choice = {"index": 0, "delta": {"content": ""}, "finish_reason": None}
        return self.chunk([choice])

    def end(self) -> str:
        """The end of a complete stream."""
        text = "data: [DONE]\n\n"
        if self.request.output.include_usage:
            text = self.chunk([], self.usage()) + text
        return text

    def error(self, error: APIError) -> str:
        """The end of a stream that fails after it has begun."""
        return sse_event({"error": error.to_json()})

    def body(self) -> Json:
        """The response that is not streamed."""
        choices = [
            {
                "index": index,
                "message": answer.message(),
                "logprobs": None,
                "finish_reason": answer.finish_reason,
            }
            for index, answer in enumerate(self.answers)
        ]
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": self.usage(),
        }

    def answer_turns(self, cache: AnswerCache) -> list[Json]:
        """The turns that the answer adds, if the client sends it back as it is."""
        return chat_answer_turns(self.request, self.answers[0].message(), cache)

    def remember(self, cache: AnswerCache) -> None:
        """Chat completions are not stored: clients send the whole conversation."""


REFUSAL_MESSAGE = "Claude refused to answer this request."


class PartKind(NamedTuple):
    """How the parts of an item are streamed: the item's field that lists them, the
    names of their events and of their index, and an empty part."""

    list_field: str
    event: str
    index_field: str
    empty: Json


class ItemKind(NamedTuple):
    """How the text of an item is streamed: the name of its events, the field that holds
    it, and the kind of part that contains it, if any."""

    text_event: str
    text_field: str
    part: PartKind | None = None


ITEM_KINDS = {
    "message": ItemKind(
        "output_text",
        "text",
        PartKind(
            "content",
            "content_part",
            "content_index",
            {"type": "output_text", "text": "", "annotations": [], "logprobs": []},
        ),
    ),
    "reasoning": ItemKind(
        "reasoning_summary_text",
        "text",
        PartKind(
            "summary",
            "reasoning_summary_part",
            "summary_index",
            {"type": "summary_text", "text": ""},
        ),
    ),
    "function_call": ItemKind("function_call_arguments", "arguments"),
    "custom_tool_call": ItemKind("custom_tool_call_input", "input"),
}
# The codes that OpenAI's schema allows in response.failed, and server_is_overloaded,
# which Codex knows. At any other code, Codex repeats the request six times.
FAILED_RESPONSE_CODES = {
    "server_error",
    "rate_limit_exceeded",
    "invalid_prompt",
    "context_length_exceeded",
    "insufficient_quota",
    "server_is_overloaded",
}


def failed_response_code(error: APIError) -> str:
    if error.code in FAILED_RESPONSE_CODES:
        return str(error.code)
    if error.status < 500 and error.status != 429:
        return "invalid_prompt"
    return "server_error"


class ResponseWriter:
    """Writes a response of /v1/responses: one item after another, each with its events.

    `items` are the items of the output. While `open_source` is set, the last one is
    still being written: it is "message" or "reasoning", or the index of a call.
    `pieces` is its text so far.
    """

    def __init__(
        self,
        request: Request,
        answers: list[Answer],
        unique_id: str,
        clock: Callable[[], float],
    ) -> None:
        self.request = request
        self.answer = answers[0]
        self.unique_id = unique_id
        self.id = f"resp_{unique_id}"
        self.clock = clock
        self.created = int(clock())
        self.completed_at: int | None = None
        self.items: list[Json] = []
        self.open_type: str | None = None  # "message" or "reasoning"
        self.open_call: int | None = None  # the index of a call
        self.pieces: list[str] = []
        self.failure: Json | None = None  # {code, message}
        self.unsent: list[str] = []  # events as text
        self.sequence_number = 0

    @property
    def model(self) -> str:
        """The API's own name for it, as soon as that is known."""
        return self.answer.model or self.request.output.model

    def record(self, index: int, event: Event) -> None:
        """An event of a response that is not streamed."""
        self.write(index, event)

    def write(self, index: int, event: Event) -> str:
        """The server-sent events for an event of the answer."""
        if not self.sequence_number:
            self.add_created_event()
        if isinstance(event, TextDelta):
            self.add_text("message", event.text)
        elif isinstance(event, ReasoningDelta):
            if self.request.output.show_reasoning:
                self.add_text("reasoning", event.text)
        elif isinstance(event, ToolCallStarted):
            self.close_item("completed")
            self.open_call_item(event)
        elif isinstance(event, ToolCallDelta):
            self.add_arguments(event)
        elif isinstance(event, MessageFinished):
            is_cut = event.finish_reason == "length"
            self.close_item("incomplete" if is_cut else "completed")
            self.completed_at = int(self.clock())
            if event.finish_reason == "content_filter":
                self.failure = {"code": "invalid_prompt", "message": REFUSAL_MESSAGE}
        return self.take_unsent()

    def keep_alive(self) -> str:
        """An event that changes nothing."""
        if not self.sequence_number:
            self.add_created_event()
        else:
            self.add_event("response.in_progress", response=self.body())
        return self.take_unsent()

    def end(self) -> str:
        """The end of a complete stream."""
        if self.failure is not None:
            return self.error(APIError(400, REFUSAL_MESSAGE, "invalid_prompt"))
        response = self.body()
        self.add_event(f"response.{response['status']}", response=response)
        return self.take_unsent()

    def error(self, error: APIError) -> str:
        """The end of a stream that fails after it has begun. OpenAI's schema has the
        fields of the `error` event at its top; most SDKs read them from an object."""
        body = error.to_json()
        self.failure = {
            "code": failed_response_code(error),
            "message": error.message,
        }
        self.add_event(
            "error",
            error=body,
            message=error.message,
            code=error.code,
            param=error.param,
        )
        self.add_event("response.failed", response=self.body())
        return self.take_unsent()

    def body(self) -> Json:
        """The response as far as it has come."""
        finish_reason = self.answer.finish_reason
        usage = None
        status = "in_progress"
        incomplete_details = None
        if finish_reason is not None:
            usage = self.usage()
            status = "completed"
        if finish_reason == "length":
            status = "incomplete"
            incomplete_details = {"reason": "max_output_tokens"}
        if self.failure is not None:
            status = "failed"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": self.completed_at if status == "completed" else None,
            "status": status,
            "model": self.model,
            "error": self.failure,
            "incomplete_details": incomplete_details,
            "output": self.items,
            "usage": usage,
            **self.request.output.echo,
            "store": self.request.output.store,
            "access_programs": None,
            "background": False,
            "service_tier": "default",
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "top_logprobs": 0,
        }

    def usage(self) -> Json:
        counts = count_tokens([self.answer])
        return {
            "input_tokens": counts.input,
            "input_tokens_details": {
                "cached_tokens": counts.cached,
                "cache_write_tokens": counts.cache_write,
            },
            "output_tokens": counts.output,
            "output_tokens_details": {"reasoning_tokens": counts.reasoning},
            "total_tokens": counts.input + counts.output,
        }

    def answer_turns(self, cache: AnswerCache) -> list[Json]:
        """The turns that the answer adds, if the client sends it back as it is."""
        return response_answer_turns(self.request, self.items, cache)

    def remember(self, cache: AnswerCache) -> None:
        """Keep what later requests may refer to by an id: the texts of the items, and
        the response itself unless the client forbids it."""
        for item in self.items:
            if item["type"] == "message":
                cache.add_item_text(item["id"], item["content"][0]["text"])
        output = self.request.output
        if output.store:
            previous_id = output.echo["previous_response_id"]
            items = json.dumps(output.input_items + self.items)
            cache.add_response(self.id, StoredResponse(previous_id, items))

    # Events.

    def add_created_event(self) -> None:
        self.add_event("response.created", response=self.body())
        self.add_event("response.in_progress", response=self.body())

    def add_event(self, event_type: str, **fields: Any) -> None:
        event = {
            "type": event_type,
            "sequence_number": self.sequence_number,
            **fields,
        }
        self.sequence_number += 1
        self.unsent.append(sse_event(event, event_type))

    def add_item_event(self, event_name: str, **fields: Any) -> None:
        """An event within the open item."""
        item = self.items[-1]
        position: Json = {
            "output_index": len(self.items) - 1,
            "item_id": item["id"],
        }
        part = ITEM_KINDS[item["type"]].part
        if part is not None:
            position[part.index_field] = 0
        self.add_event(f"response.{event_name}", **position, **fields)

    def add_output_item_event(self, name: str) -> None:
        """The beginning or the end of the open item."""
        index = len(self.items) - 1
        event_type = f"response.output_item.{name}"
        self.add_event(event_type, output_index=index, item=self.items[-1])

    def take_unsent(self) -> str:
        text = "".join(self.unsent)
        self.unsent = []
        return text

    # Items.

    def add_text(self, item_type: str, text: str) -> None:
        """Add to the open message or reasoning, or open one."""
        if self.open_type != item_type:
            self.close_item("completed")
            self.open_text_item(item_type)
        self.add_delta(text)

    def add_arguments(self, event: ToolCallDelta) -> None:
        if self.open_call != event.call_index:
            raise interrupted_error()  # the retry put more text before this call
        self.add_delta(event.arguments)

    def add_delta(self, text: str) -> None:
        self.pieces.append(text)
        item_type = self.items[-1]["type"]
        name = f"{ITEM_KINDS[item_type].text_event}.delta"
        if item_type == "message":
            self.add_item_event(name, delta=text, logprobs=[])
        else:
            self.add_item_event(name, delta=text)

    def item_id(self, prefix: str) -> str:
        return f"{prefix}_{self.unique_id}{len(self.items)}"

    def open_text_item(self, item_type: str) -> None:
        self.open_type = item_type
        self.pieces = []
        if item_type == "message":
            item = {
                "type": "message",
                "id": self.item_id("msg"),
                "role": "assistant",
                "status": "in_progress",
                "content": [],
            }
        else:
            item = {
                "type": "reasoning",
                "id": f"{REASONING_ID_PREFIX}{self.unique_id}{len(self.items)}",
                "summary": [],
            }
        self.items.append(item)
        self.add_output_item_event("added")
        part = ITEM_KINDS[item_type].part
        if part is not None:
            self.add_item_event(f"{part.event}.added", part=part.empty)

    def open_call_item(self, event: ToolCallStarted) -> None:
        self.open_call = event.call_index
        self.pieces = []
        item = {
            "type": "function_call",
            "id": self.item_id("fc"),
            "call_id": event.call_id,
        }
        fields = self.request.output.call_fields.get(event.name)
        if fields is None:
            fields = {"name": event.name}
        item.update(fields)
        item[ITEM_KINDS[item["type"]].text_field] = ""
        item["status"] = "in_progress"
        self.items.append(item)
        self.add_output_item_event("added")

    def close_item(self, status: str) -> None:
        """End the open item, if any."""
        if self.open_type is None and self.open_call is None:
            return
        self.open_type = None
        self.open_call = None
        item = self.items[-1]
        text = "".join(self.pieces)
        kind = ITEM_KINDS[item["type"]]
        done: Json = {kind.text_field: text}
        if item["type"] == "message":
            done["logprobs"] = []
        if "name" in item:
            done["name"] = item["name"]
        self.add_item_event(f"{kind.text_event}.done", **done)
        if kind.part is None:
            item[kind.text_field] = text
        else:
            part = {**kind.part.empty, "text": text}
            item[kind.part.list_field] = [part]
            self.add_item_event(f"{kind.part.event}.done", part=part)
        if "status" in item:
            item["status"] = status
        self.add_output_item_event("done")


Writer = Union[ChatWriter, ResponseWriter]


# ── Installation ─────────────────────────────────────────────────────────────────
# Which CLI there is, and whether and how it is logged in.

# Where the installers of the CLI put it. The PATH of launchd and systemd is short.
CLI_INSTALL_DIRECTORIES = [
    "~/.local/bin",
    "~/.claude/local",
    "~/.claude/bin",
    "/opt/homebrew/bin",
    "/usr/local/bin",
    "/usr/bin",
    "/home/linuxbrew/.linuxbrew/bin",
    "~/.npm-global/bin",
    "~/.npm/bin",
    "~/.bun/bin",
    "~/.volta/bin",
    "~/.local/share/pnpm",
    "~/Library/pnpm",
    "~/.yarn/bin",
    "~/n/bin",
    "~/.asdf/shims",
    "~/.local/share/mise/shims",
    "~/.nix-profile/bin",
    "~/.nvm/versions/node/*/bin",
    "~/.fnm/node-versions/*/installation/bin",
    "~/.local/share/fnm/node-versions/*/installation/bin",
]
NO_CLI_MESSAGE = (
    "Claude Code was not found. Install it "
    "(`npm install -g @anthropic-ai/claude-code`), or give its path with --claude."
)
BILLED_LOGIN_METHODS = ("api_key", "third_party")
BILLED_LOGIN_MESSAGE = (
    "Claude Code is logged in with an API key or a cloud account, so every token is "
    "billed. To use your subscription, run `claude auth logout`, then "
    "`claude auth login`, and choose it."
)


class CliBinary(NamedTuple):
    """The CLI as installed. `signature` changes when the file is replaced."""

    path: str
    version: Version
    signature: tuple[int, ...]


class Login(NamedTuple):
    """The output of `claude auth status`. `method` is claude.ai, oauth_token, api_key,
    third_party or none; `plan` is, for example, "max", and `tier` "max_20x". Values
    that an old CLI does not print are None."""

    is_logged_in: bool
    method: str | None = None
    plan: str | None = None
    tier: str | None = None

    def problem(self) -> str:
        """What is wrong with this login, and what to do; empty if nothing is wrong."""
        if not self.is_logged_in:
            return LOGIN_REMEDY
        if self.method in BILLED_LOGIN_METHODS:
            return BILLED_LOGIN_MESSAGE
        return ""


def version_text(version: Version) -> str:
    return ".".join(str(number) for number in version)


def find_cli(chosen_path: str) -> str:
    """The CLI's absolute path. Raises APIError 503 that says what to do."""
    if chosen_path:
        path = os.path.expanduser(chosen_path)
        program = shutil.which(path)
        if program is not None:
            return os.path.abspath(program)
        message = "--claude: there is no such file."
        if os.path.isfile(path):
            message = "--claude: the file is not executable; run `chmod +x` on it."
        raise APIError(503, message, "no_cli")
    candidates = []
    on_path = shutil.which("claude")
    if on_path is not None:
        candidates.append(on_path)
    for directory in CLI_INSTALL_DIRECTORIES:
        pattern = os.path.join(os.path.expanduser(directory), "claude")
        candidates += sorted(glob.glob(pattern), key=numbers_in, reverse=True)
    for path in candidates:
        if os.access(path, os.X_OK):
            return os.path.abspath(path)  # the CLI runs in another directory
    raise APIError(503, NO_CLI_MESSAGE, "no_cli")


def numbers_in(path: str) -> list[int]:
    """A sort key: the versions of node in a path."""
    return [int(digits) for digits in re.findall(r"\d+", path)]


def file_signature(path: str) -> tuple[int, ...]:
    try:
        stat = os.stat(path)
    except OSError:
        return ()
    return (stat.st_ino, stat.st_mtime_ns, stat.st_size)


class Installation:
    """The CLI that is installed, and its login.

    `asking` is held while a command of the CLI runs, which may take seconds, so that
    the other threads wait for its result instead of running it, too. `lock` guards the
    other fields, and is held only for a moment. `lock` may be taken while `asking` is
    held, never the other way round.
    """

    def __init__(self, chosen_path: str = "") -> None:
        self.chosen_path = chosen_path
        self.asking = threading.Lock()
        self.lock = threading.Lock()
        self.binary: CliBinary | None = None
        self.probe_failure: APIError | None = None  # guarded by `asking`
        self.next_probe = 0.0  # guarded by `asking`
        self.login: Login | None = None  # None: not known
        self.next_login_check = 0.0
        self.is_accepted = False  # by the API
        self.is_refused = False  # by the API, since the last check
        self.refusals = 0
        self.running_command: subprocess.Popen[str] | None = None
        self.is_closed = False

    def known_binary(self) -> CliBinary | None:
        """The CLI, if its version is known and it has not been replaced since."""
        with self.lock:
            binary = self.binary
        if binary is None or binary.signature != file_signature(binary.path):
            return None
        return binary

    def find_binary(self) -> CliBinary:
        """The CLI; it is asked for its version if it is new. Raises APIError 503."""
        binary = self.known_binary()
        if binary is not None:
            return binary
        with self.asking:
            binary = self.known_binary()
            if binary is None:
                binary = self.probe()
        return binary

    def probe(self) -> CliBinary:
        """Look for the CLI, and ask it for its version. A failure is remembered for a
        moment, so that many requests do not wait for a CLI that hangs, one after the
        other. Raises APIError 503."""
        failure = self.probe_failure
        if failure is not None and time.monotonic() < self.next_probe:
            raise APIError(failure.status, failure.message, failure.code)
        try:
            binary = self.read_version(find_cli(self.chosen_path))
        except APIError as error:
            self.probe_failure = error
            self.next_probe = time.monotonic() + PROBE_SECONDS
            raise
        self.probe_failure = None
        with self.lock:
            self.binary = binary
        return binary

    def read_version(self, path: str) -> CliBinary:
        """Run `claude --version`. Raises APIError 503 if the CLI can't be used."""
        signature = file_signature(path)
        output, _ = self.run_command(path, "--version")
        match = re.search(r"(\d+)\.(\d+)\.(\d+)", output)
        if match is None:
            message = "`claude --version` printed no version; is this Claude Code?"
            raise APIError(503, message, "no_cli")
        version = tuple(int(number) for number in match.groups())
        if version < OLDEST_CLI:
            message = (
                f"Claude Code {version_text(version)} is too old; "
                f"{version_text(OLDEST_CLI)} or newer is required. Run `claude update`."
            )
            raise APIError(503, message, "cli_too_old")
        return CliBinary(path, version, signature)

    def check(self) -> tuple[CliBinary | None, str]:
        """Returns the CLI, if it can be used, and what is wrong with it or its login.

        A login that was found once is not looked for again; a missing one is.
        """
        try:
            binary = self.find_binary()
        except APIError as error:
            return None, error.message
        with self.asking:
            if self.needs_login_check():
                login = self.read_login(binary.path)
                with self.lock:
                    self.login = login
                    self.is_refused = False
                    self.next_login_check = time.monotonic() + LOGIN_CHECK_SECONDS
        login = self.known_login()
        return binary, login.problem()

    def needs_login_check(self) -> bool:
        with self.lock:
            is_good = self.login is not None and not self.login.problem()
            if is_good and not self.is_refused:
                return False
            return time.monotonic() > self.next_login_check

    def known_login(self) -> Login:
        """The login as far as it is known. One that the API refused is none."""
        with self.lock:
            if self.is_refused:
                return Login(is_logged_in=False)
            if self.login is None:
                return Login(is_logged_in=self.is_accepted)
            return self.login

    def login_key(self) -> tuple[Login, int] | None:
        """A value that changes when the login changes. None while nobody is logged
        in."""
        login = self.known_login()
        return (login, self.refusals) if login.is_logged_in else None

    def read_login(self, path: str) -> Login:
        """Run `claude auth status`."""
        output, exit_code = self.run_command(path, "auth", "status")
        status: Json = {}
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(output)
            if type(value) is dict:
                status = value
        return Login(
            is_logged_in=exit_code == 0,
            method=optional_str(status.get("authMethod")),
            plan=optional_str(status.get("subscriptionType")),
            tier=optional_str(status.get("planTier")),
        )

    def record_accepted_login(self) -> None:
        """The API accepted the login. (`claude auth status` only knows that there is
        one.) If there was none before, check() asks the CLI what it is."""
        with self.lock:
            if self.login is None or not self.login.is_logged_in:
                self.login = None
                self.next_login_check = 0.0
            self.is_accepted = True
            self.is_refused = False

    def record_refused_login(self) -> None:
        """The API refused the login. This is reported for a while without asking the
        CLI, which would still say that it is logged in."""
        with self.lock:
            self.is_accepted = False
            self.is_refused = True
            self.refusals += 1
            self.next_login_check = time.monotonic() + LOGIN_REFUSED_SECONDS

    def run_command(self, path: str, *arguments: str) -> tuple[str, int]:
        """Run a short command of the CLI. Returns its output and its exit code: "" and
        1 if it can't be started, or hangs."""
        try:
            process = subprocess.Popen(
                [path, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                errors="replace",
                env=cli_environment(path),
                start_new_session=True,
            )
        except OSError:
            return "", 1
        with process:
            with self.lock:
                self.running_command = process
                if self.is_closed:
                    kill_group(process)
            try:
                output, _ = process.communicate(timeout=CLI_COMMAND_SECONDS)
            except subprocess.TimeoutExpired:
                kill_group(process)
                return "", 1
            finally:
                with self.lock:
                    self.running_command = None
        return output, process.returncode

    def close(self) -> None:
        """Kill the command that is running, and all that follow. The server stops."""
        with self.lock:
            self.is_closed = True
            if self.running_command is not None:
                kill_group(self.running_command)


def kill_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process and the rest of its process group, which it leads."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def optional_str(value: Any) -> str | None:
    return value if type(value) is str else None


# ── CLI process ──────────────────────────────────────────────────────────────────
# One running CLI.


class CliProcess:
    """One CLI process, in a process group of its own.

    Reading and writing never block: the owner reads or writes when the pipe is ready.
    The owner is the pool, then the thread of a request, then the pool again, which
    reaps the process. Only stop() may be called by any thread.

    `sent` is what it has been sent, including `unsent`, the lines that are still to be
    written. `awaits_result` is set while the CLI works on an earlier turn.
    `has_printed` is set when anything has come since the last send(). The process has a
    directory for its temporary files below `server_directory`. reap() removes it.
    """

    def __init__(self, binary: CliBinary, model: str, server_directory: str) -> None:
        """Start the process. Raises OSError."""
        self.binary = binary
        self.sent = SentState(model)
        self.unsent: collections.deque[CliLine] = collections.deque()
        self.write_buffer = bytearray()
        self.read_buffer = bytearray()  # a line without its end
        self.awaits_result = False
        self.has_printed = False
        self.has_ended = False  # its output
        self.was_spare = False
        self.born = time.monotonic()
        self.last_activity = self.born
        self.stopped_at: float | None = None  # when it was first sent a signal
        self.initialize_answer: Json | None = None
        self.directory = tempfile.mkdtemp(dir=server_directory)
        try:
            self.process = self.start(model, server_directory)
        except OSError:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin = self.process.stdin
        self.stdout = self.process.stdout
        os.set_blocking(self.stdin.fileno(), False)
        os.set_blocking(self.stdout.fileno(), False)

    def start(self, model: str, server_directory: str) -> subprocess.Popen[bytes]:
        """Raises OSError."""
        environment = cli_environment(self.binary.path)
        environment["CLAUDE_CODE_TMPDIR"] = self.directory
        # A file, because the CLI blocks on a pipe that nobody reads.
        with open(os.path.join(self.directory, "stderr"), "wb") as stderr:
            return subprocess.Popen(
                [self.binary.path, *CLI_ARGUMENTS, "--model", model],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=os.path.join(server_directory, CLI_WORKDIR),
                env=environment,
                start_new_session=True,  # so that its children can be ended with it
            )

    def fits(self, wanted: SentState) -> bool:
        """Whether everything that it has been sent is the beginning of `wanted`. Before
        the first turn, the model may differ: the CLI can still change it without a
        trace in the conversation."""
        if self.sent.model != wanted.model:
            takes_late_model = self.binary.version >= CLI_WITH_LATE_MODEL
            if self.sent.turns or not takes_late_model:
                return False
        if self.sent.initialize is not None:
            if self.sent.initialize != wanted.initialize:
                return False
        return wanted.turns[: len(self.sent.turns)] == self.sent.turns

    def send(self, wanted: SentState, query: Iterable[CliLine] = ()) -> None:
        """Send the rest of `wanted`, which it must fit, then `query`."""
        if self.sent.model != wanted.model:
            self.unsent.append(settings_line(model=wanted.model))
        if self.sent.initialize is None and wanted.initialize is not None:
            self.unsent.append(wanted.initialize.line())
        self.unsent.extend(wanted.turns[len(self.sent.turns) :])
        self.unsent.extend(query)
        self.sent = wanted
        self.has_printed = False
        self.last_activity = time.monotonic()
        self.send_next()

    def send_next(self) -> None:
        """Send lines up to one whose result must be awaited."""
        while self.unsent and not self.awaits_result:
            line = self.unsent.popleft()
            self.write_buffer += line.text.encode() + b"\n"
            self.awaits_result = line.needs_result
        self.write()

    def write(self) -> None:
        """Write as much as the pipe takes. If the CLI has ended, read() will notice."""
        try:
            while self.write_buffer:
                count = self.stdin.write(self.write_buffer)
                if count is None:  # the pipe is full
                    return
                del self.write_buffer[:count]
        except BrokenPipeError:
            self.write_buffer.clear()

    def read(self) -> list[Json]:
        """Read what has come, do what the control lines ask for, and return the other
        lines. Raises APIError 502."""
        data = self.stdout.read(1 << 16)
        if data is None:  # nothing has come
            return []
        if data == b"":
            self.has_ended = True
            return []
        self.has_printed = True
        self.read_buffer += data
        if b"\n" not in data:
            if len(self.read_buffer) > MAX_CLI_LINE_BYTES:
                message = "Claude Code printed a line that is too long."
                raise APIError(502, message, "unexpected_line")
            return []
        *texts, self.read_buffer = self.read_buffer.split(b"\n")
        lines = []
        for text in texts:
            line = parse_cli_line(bytes(text))
            if line is not None and not self.handle_control_line(line):
                lines.append(line)
        return lines

    def handle_control_line(self, line: Json) -> bool:
        """Handle a line that is addressed to us. Returns False if it is for the
        decoder."""
        kind = line.get("type")
        if kind == "stream_event":
            self.last_activity = time.monotonic()
            return False
        if kind == "control_request":
            self.answer_control_request(line)
            return True
        if kind == "control_response":
            self.keep_initialize_answer(line)
            return True
        if kind == "result" and self.awaits_result and not line.get("is_error"):
            self.last_activity = time.monotonic()
            self.awaits_result = False
            self.send_next()
            return True
        return False

    def answer_control_request(self, line: Json) -> None:
        tools: list[Json] = []
        if self.sent.initialize is not None:
            tools = self.sent.initialize.tools
        try:
            reply = mcp_reply(line, tools)
        except MALFORMED_LINE_ERRORS:
            raise unexpected_line_error() from None
        if reply is not None:
            self.write_buffer += reply.text.encode() + b"\n"
            self.write()

    def keep_initialize_answer(self, line: Json) -> None:
        """The answer to `initialize` lists the models; those to settings are empty."""
        with contextlib.suppress(*MALFORMED_LINE_ERRORS):
            answer = line["response"]["response"]
            if "models" in answer:
                self.initialize_answer = answer

    def stop(self, signal_number: int) -> None:
        """Signal the whole group. After SIGTERM the CLI removes its session file; but
        one that might still send a request to the API needs SIGKILL."""
        if self.stopped_at is None:
            self.stopped_at = time.monotonic()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal_number)

    def reap(self) -> bool:
        """Clean up if the process has ended, and kill it if that takes too long.
        Returns whether it has ended."""
        if self.process.poll() is None:
            if self.stopped_at is None:
                self.stop(signal.SIGTERM)
            elif time.monotonic() - self.stopped_at > TERMINATE_SECONDS:
                self.stop(signal.SIGKILL)
            return False
        self.stop(signal.SIGKILL)  # children that outlived it
        self.stdin.close()
        self.stdout.close()
        self.remove_session_files()
        shutil.rmtree(self.directory, ignore_errors=True)
        return True

    def remove_session_files(self) -> None:
        """Remove what the CLI leaves in ~/.claude/sessions if it was killed, or was
        stopped while it started (2.1.330)."""
        home = os.environ.get("CLAUDE_CONFIG_DIR") or os.path.expanduser("~/.claude")
        sessions = os.path.join(home, "sessions")
        with contextlib.suppress(OSError):
            # Not glob(): that would keep a compiled pattern for each process id.
            for name in os.listdir(sessions):
                if name.startswith(f"{self.process.pid}."):
                    os.unlink(os.path.join(sessions, name))

    def stderr_size(self) -> int:
        """The number of bytes that it has written to stderr."""
        try:
            return os.path.getsize(os.path.join(self.directory, "stderr"))
        except OSError:
            return 0


def update_write_interest(
    selector: selectors.BaseSelector, process: CliProcess
) -> None:
    """Wait for room in its stdin while there is something to write, and only then."""
    is_registered = process.stdin in selector.get_map()
    if process.write_buffer and not is_registered:
        selector.register(process.stdin, selectors.EVENT_WRITE, process)
    elif is_registered and not process.write_buffer:
        selector.unregister(process.stdin)


def unregister(selector: selectors.BaseSelector, process: CliProcess) -> None:
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(KeyError):
            selector.unregister(pipe)


DIRECTORY_PREFIX = "claude-max-"
LOCK_FILE = "server.lock"  # locked while the server runs; the system unlocks it
NO_TEMP_MESSAGE = "There is no usable directory for temporary files: set TMPDIR."


def make_server_directory() -> str:
    """Make a private directory, and return its path. If the directory for temporary
    files is gone, another one is used. Raises OSError."""
    try:
        return tempfile.mkdtemp(prefix=DIRECTORY_PREFIX)
    except FileNotFoundError:
        tempfile.tempdir = None  # forget the one that tempfile has chosen before
        return tempfile.mkdtemp(prefix=DIRECTORY_PREFIX)


def lock_directory(directory: str) -> int:
    """Lock the directory's file until this process ends, and return its descriptor.
    Raises OSError: BlockingIOError if another process has locked it."""
    path = os.path.join(directory, LOCK_FILE)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def remove_stale_directories() -> None:
    """Remove the directories of servers that were killed: those of this user whose file
    nobody has locked."""
    with contextlib.suppress(OSError):
        parent = tempfile.gettempdir()
        for name in os.listdir(parent):
            if name.startswith(DIRECTORY_PREFIX):
                remove_if_stale(os.path.join(parent, name))


def remove_if_stale(directory: str) -> None:
    with contextlib.suppress(OSError):
        is_own = os.lstat(directory).st_uid == os.getuid()
        if is_own and os.path.isfile(os.path.join(directory, LOCK_FILE)):
            descriptor = lock_directory(directory)
            shutil.rmtree(directory, ignore_errors=True)
            os.close(descriptor)


class ServerDirectory:
    """The directory of the CLI processes, below the one for temporary files.

    It is locked while the server runs, so that another server can tell that it is in
    use. `lock` guards all fields; no other lock is taken while it is held.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.path = ""
        self.lock_descriptor = -1  # of LOCK_FILE in it

    def ensure(self) -> str:
        """Returns its path. It is made, with mode 0700, if it does not exist, or does
        not exist any more. Raises APIError 503 if that fails."""
        with self.lock:
            try:
                if not self.path or not os.path.isdir(self.path):
                    self.close_lock()
                    path = make_server_directory()
                    self.lock_descriptor = lock_directory(path)
                    self.path = path
                workdir = os.path.join(self.path, CLI_WORKDIR)
                os.makedirs(workdir, 0o700, exist_ok=True)
            except OSError:
                raise APIError(503, NO_TEMP_MESSAGE, "no_temporary_directory") from None
            return self.path

    def close_lock(self) -> None:
        """The caller holds `lock`."""
        if self.lock_descriptor >= 0:
            os.close(self.lock_descriptor)
            self.lock_descriptor = -1

    def remove(self) -> None:
        with self.lock:
            shutil.rmtree(self.path, ignore_errors=True)
            self.close_lock()


# ── Process pool ─────────────────────────────────────────────────────────────────
# Processes that are started before they are needed, and the end of every process.
# SparePool holds the rules and does nothing; ProcessPool starts, feeds and reaps.

# How long the steps take after which a process can take a query, measured on two cores.
# Only their ratios matter.
START_COST = 0.6  # seconds until a new process reads its first line
INITIALIZE_COST = 0.02  # seconds for `initialize`, with the tools
TURN_COST = 0.01  # seconds for an earlier turn of the conversation


class SparePool:
    """The idle processes, and the rules by which they are kept and chosen.

    A spare fits a request if everything it has been sent is the beginning of what the
    request needs. Of those that fit, the one that will be ready first is taken, and is
    sent the rest. One spare is kept without a conversation, for a request that is
    unlike the last ones; each of the others may hold a conversation. A process that has
    answered is never used again.

    Without I/O: in a test, any objects with the attributes and the fits() of CliProcess
    will do. ProcessPool adds and removes them. The process that was used least recently
    comes first.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.processes: list[CliProcess] = []

    def choose(
        self, binary: CliBinary, wanted: SentState, now: float
    ) -> CliProcess | None:
        """The spare for a request, if any fits."""
        best = None
        best_cost = math.inf
        for process in self.processes:
            if process.binary == binary and process.fits(wanted):
                cost = self.seconds_until_ready(process, wanted, now)
                if cost < best_cost:
                    best = process
                    best_cost = cost
        return best

    def seconds_until_ready(
        self, process: CliProcess, wanted: SentState, now: float
    ) -> float:
        """An estimate of when the process could take the query."""
        start = max(0.0, process.born + START_COST - now)
        turns = len(wanted.turns) - len(process.sent.turns) + len(process.unsent)
        cost = start + turns * TURN_COST
        if process.sent.initialize is None:
            cost += INITIALIZE_COST
        return cost

    def choose_for_conversation(
        self, binary: CliBinary, wanted: SentState, now: float
    ) -> CliProcess | None:
        """The spare that may be sent this conversation ahead, if any: one that has been
        sent a part of it, or one of several without a conversation."""
        process = self.choose_to_extend(binary, wanted)
        if process is None and self.count_without_conversation() > 1:
            process = self.choose(binary, wanted, now)
        return process

    def choose_to_extend(
        self, binary: CliBinary, wanted: SentState
    ) -> CliProcess | None:
        """The spare that has been sent the longest part of this conversation, if
        any."""
        best = None
        best_length = 0
        for process in self.processes:
            length = len(process.sent.turns)
            is_longer = length > best_length
            if is_longer and process.binary == binary and process.fits(wanted):
                best = process
                best_length = length
        return best

    def count_without_conversation(self) -> int:
        return sum(1 for process in self.processes if not process.sent.turns)

    def choose_to_give_up(self) -> CliProcess | None:
        """The spare that makes room for another conversation: the one with a
        conversation that was used least recently. None if no room is needed."""
        with_conversation = [spare for spare in self.processes if spare.sent.turns]
        if len(with_conversation) < max(1, self.capacity - 1):
            return None
        return with_conversation[0]

    def may_hold_conversations(self) -> bool:
        return self.capacity > 1

    def count_missing(self) -> int:
        return max(0, self.capacity - len(self.processes))

    def choose_expired(self, now: float) -> CliProcess | None:
        """The spare to be replaced next, if any: one that is too old, or whose
        conversation is idle. None while the newest spare may still be starting."""
        newest = max((spare.born for spare in self.processes), default=now)
        if newest > now - STARTUP_SECONDS:
            return None
        for spare in sorted(self.processes, key=lambda spare: spare.born):
            if spare.born < now - SPARE_SECONDS:
                return spare
        for spare in self.processes:
            is_idle = spare.last_activity < now - IDLE_CONVERSATION_SECONDS
            if spare.sent.turns and is_idle:
                return spare
        return None


class SpareRequest(NamedTuple):
    """A conversation that is to be sent to a spare; if `only_extend` is set, only to a
    spare that has already been sent its beginning."""

    wanted: SentState
    only_extend: bool


class Watch(NamedTuple):
    """How the main thread reads from a process that has no request: it calls `is_done`
    with the lines that have come, until that returns True or `deadline` has passed.
    Then it sends the process `signal_number`."""

    is_done: Callable[[CliProcess, list[Json]], bool]
    deadline: float
    signal_number: int


class ProcessPool:
    """Starts the CLI's processes, keeps spare ones ready, and ends each one.

    The main thread calls tick() and on_ready(), request threads call start(), retire()
    and request_spare(). `lock` guards all fields but `selector`, on which the main
    thread waits without it: epoll and kqueue allow other threads to
    change what is registered during a wait. The lock is reentrant, because a signal
    handler of the main thread takes it, too. While it is held, the locks of Plan and
    Service may be taken (by Watch.is_done), never the other way round.

    A process is in one of four places: `live` (it is answering), `spares`, `watched`
    (see Watch), or `dying` (it was sent a signal, and is not reaped yet). While it is
    moved from one place to another by start() or add_spare(), it is in none of them.
    """

    def __init__(self, installation: Installation, capacity: int = 0) -> None:
        self.installation = installation
        self.lock = threading.RLock()
        self.spares = SparePool(capacity)
        self.live: set[CliProcess] = set()
        self.watched: dict[CliProcess, Watch] = {}
        self.dying: list[CliProcess] = []
        self.requested: collections.deque[SpareRequest] = collections.deque(maxlen=8)
        self.refill_is_due = False
        self.model = "sonnet"  # of the last request; a new spare is started with it
        self.last_request_at = time.monotonic()
        self.early_deaths = 0  # of spares, since the last answer
        self.next_start_at = 0.0
        self.directory = ServerDirectory()
        self.selector = selectors.DefaultSelector()
        self.wake_receiver, self.wake_sender = socket.socketpair()
        self.wake_receiver.setblocking(False)
        self.wake_sender.setblocking(False)
        self.selector.register(self.wake_receiver, selectors.EVENT_READ)

    # Called by request threads.

    def start(
        self,
        binary: CliBinary,
        wanted: SentState,
        query: list[CliLine],
        may_be_spare: bool = True,
    ) -> CliProcess:
        """Take a spare or start a process, and send it `wanted` and `query`. Raises
        APIError 503."""
        process = None
        if may_be_spare:
            process = self.take(binary, wanted)
        if process is None:
            process = self.spawn(binary, wanted.model)
        with self.lock:
            self.live.add(process)
            self.last_request_at = time.monotonic()
            self.model = wanted.model
        process.send(wanted, query)
        return process

    def take(self, binary: CliBinary, wanted: SentState) -> CliProcess | None:
        """Take the best spare out of the pool, if any fits."""
        with self.lock:
            process = self.spares.choose(binary, wanted, time.monotonic())
            if process is not None:
                self.remove_spare(process)
            return process

    def spawn(self, binary: CliBinary, model: str) -> CliProcess:
        """Start a process. Raises APIError 503."""
        try:
            return CliProcess(binary, model, self.directory.ensure())
        except OSError as error:
            message = f"Claude Code can't be started: {error.strerror}."
            raise APIError(503, message, "no_cli") from None

    def request_spare(self, wanted: SentState, only_extend: bool) -> None:
        """Have the main thread send this conversation to a spare."""
        with self.lock:
            if self.spares.may_hold_conversations():
                self.requested.append(SpareRequest(wanted, only_extend))
        self.request_refill()

    def request_refill(self) -> None:
        """Have the main thread start the spares that are missing."""
        with self.lock:
            if self.spares.capacity:
                self.refill_is_due = True
        self.wake()

    def retire(self, process: CliProcess, signal_number: int) -> None:
        """Stop a process, and have the main thread reap it. Its pipes stay open until
        then: if they were closed earlier, the CLI would tell the model that its tools
        are gone, in another request to the API."""
        if process.stopped_at is None:
            process.stop(signal_number)
        with self.lock:
            self.live.discard(process)
            self.dying.append(process)

    def watch(self, process: CliProcess, watch: Watch) -> None:
        """Have the main thread read on from a process, and then stop it."""
        with self.lock:
            self.live.discard(process)
            self.watched[process] = watch
            self.selector.register(process.stdout, selectors.EVENT_READ, process)
        self.wake()

    def record_answer(self) -> None:
        """A process has answered: the CLI works."""
        with self.lock:
            self.early_deaths = 0
            self.next_start_at = 0.0

    def retire_spares(self) -> None:
        """End all spares, for example because they use an old login."""
        with self.lock:
            for process in list(self.spares.processes):
                self.retire_spare(process)

    def wake(self) -> None:
        """Have the main thread call tick() now."""
        with contextlib.suppress(OSError):
            self.wake_sender.send(b"\0")

    def is_starting(self, now: float) -> bool:
        """Whether a spare is probably still starting, which takes a whole core."""
        with self.lock:
            newest = max((spare.born for spare in self.spares.processes), default=0.0)
        return newest > now - NEW_SPARE_SECONDS

    def counts(self) -> tuple[int, int]:
        """The numbers of spares, and of processes that have not been reaped yet."""
        with self.lock:
            unreaped = len(self.live) + len(self.watched) + len(self.dying)
            return len(self.spares.processes), unreaped

    # Called by the main thread.

    def tick(self) -> None:
        """Reap processes that have ended; prepare and replace spares."""
        self.reap()
        self.end_expired_watches()
        binary = self.installation.known_binary()
        self.retire_other_binaries(binary)
        if binary is not None:
            self.prepare_requested(binary)
            self.replace_expired()
            self.refill(binary)

    def seconds_to_next_tick(self) -> float:
        """How long the main thread may wait for its selector."""
        now = time.monotonic()
        with self.lock:
            deadlines = [watch.deadline for watch in self.watched.values()]
        nearest = min(deadlines, default=now + POLL_SECONDS)
        return max(0.0, min(POLL_SECONDS, nearest - now))

    def reap(self) -> None:
        with self.lock:
            dying = list(self.dying)
        for process in dying:
            if process.reap():
                with self.lock:
                    self.dying.remove(process)

    def end_expired_watches(self) -> None:
        now = time.monotonic()
        with self.lock:
            for process, watch in list(self.watched.items()):
                if watch.deadline <= now:
                    self.end_watch(process)

    def end_watch(self, process: CliProcess) -> None:
        """The caller holds the lock."""
        watch = self.watched.pop(process)
        unregister(self.selector, process)
        self.retire(process, watch.signal_number)

    def retire_other_binaries(self, binary: CliBinary | None) -> None:
        """Stop the spares of a CLI that has been replaced or removed."""
        with self.lock:
            for process in list(self.spares.processes):
                if process.binary != binary:
                    self.retire_spare(process)
                    self.refill_is_due = True

    def prepare_requested(self, binary: CliBinary) -> None:
        """Send the requested conversations to spares."""
        while True:
            with self.lock:
                if not self.requested:
                    return
                request = self.requested.popleft()
            if request.only_extend:
                self.extend_spare(binary, request.wanted)
            elif not self.prepare_spare(binary, request.wanted):
                with contextlib.suppress(APIError):  # the next request reports it
                    self.start_prepared(binary, request.wanted)

    def extend_spare(self, binary: CliBinary, wanted: SentState) -> None:
        """Send the rest of `wanted` to the spare that has the beginning, if any."""
        with self.lock:
            process = self.spares.choose_to_extend(binary, wanted)
            if process is not None:
                self.remove_spare(process)
                self.add_spare(process, wanted)

    def prepare_spare(self, binary: CliBinary, wanted: SentState) -> bool:
        """Send `wanted` to a spare. Returns False if none may be used for it."""
        with self.lock:
            now = time.monotonic()
            process = self.spares.choose_for_conversation(binary, wanted, now)
            if process is None:
                return False
            self.remove_spare(process)
            self.add_spare(process, wanted)
            return True

    def start_prepared(self, binary: CliBinary, wanted: SentState) -> None:
        """Send `wanted` to a new process. Not while there is no spare without a
        conversation: that one is started first. Raises APIError 503."""
        with self.lock:
            if not self.spares.count_without_conversation():
                return
            given_up = self.spares.choose_to_give_up()
            if given_up is not None:
                self.retire_spare(given_up)
            if not self.spares.count_missing():
                return
        self.add_spare(self.spawn(binary, wanted.model), wanted)

    def add_spare(self, process: CliProcess, wanted: SentState) -> None:
        """Make the process a spare that has been sent `wanted`."""
        with self.lock:
            process.was_spare = True
            self.spares.processes.append(process)
            self.selector.register(process.stdout, selectors.EVENT_READ, process)
            process.send(wanted)
            update_write_interest(self.selector, process)

    def remove_spare(self, process: CliProcess) -> None:
        """Take a spare out of the pool, and stop waiting for its pipes. The caller
        holds the lock."""
        self.spares.processes.remove(process)
        unregister(self.selector, process)

    def retire_spare(self, process: CliProcess) -> None:
        """The caller holds the lock."""
        self.remove_spare(process)
        self.retire(process, signal.SIGTERM)

    def replace_expired(self) -> None:
        now = time.monotonic()
        with self.lock:
            process = self.spares.choose_expired(now)
            if process is None:
                return
            self.retire_spare(process)
            if now < self.last_request_at + NO_REQUEST_SECONDS:
                self.refill_is_due = True

    def refill(self, binary: CliBinary) -> None:
        """Start the spares that are missing."""
        now = time.monotonic()
        with self.lock:
            if not self.refill_is_due or now < self.next_start_at:
                return
            if not self.installation.known_login().is_logged_in:
                return  # it would not answer
            self.refill_is_due = False
            missing = self.spares.count_missing()
            model = self.model
        for _ in range(missing):
            try:
                process = self.spawn(binary, model)
            except APIError:  # the next request reports it
                return
            self.add_spare(process, SentState(model))

    def on_ready(self, key: selectors.SelectorKey) -> None:
        """Serve what the selector found ready: a call of wake(), or a process's
        pipe."""
        if key.fileobj is self.wake_receiver:
            with contextlib.suppress(BlockingIOError):
                self.wake_receiver.recv(4096)
            return
        with self.lock:
            watch = self.watched.get(key.data)
            if watch is None and key.data in self.spares.processes:
                self.serve_spare(key)
            # Otherwise a request has taken the process meanwhile.
        if watch is not None:
            self.read_watched(key.data, watch)

    def read_watched(self, process: CliProcess, watch: Watch) -> None:
        """The lock is not held, because is_done() may log."""
        try:
            lines = process.read()
        except APIError:
            lines = []
            process.has_ended = True
        if watch.is_done(process, lines) or process.has_ended:
            with self.lock:
                self.end_watch(process)

    def serve_spare(self, key: selectors.SelectorKey) -> None:
        """Read from a spare or write to it. One that fails or ends is replaced. The
        caller holds the lock."""
        process: CliProcess = key.data
        failed = False
        if key.fileobj is process.stdout:
            try:
                lines = process.read()
            except APIError:
                failed = True
            else:
                failed = any(line.get("is_error") for line in lines)
        else:
            process.write()
        update_write_interest(self.selector, process)
        if failed or process.has_ended:
            self.retire_spare(process)
            self.record_death(process)

    def record_death(self, process: CliProcess) -> None:
        """A spare has ended by itself. If it was young, the CLI may be unable to start,
        so the pause before the next start is doubled. The caller holds the lock."""
        now = time.monotonic()
        self.refill_is_due = True
        if now - process.born < STARTUP_SECONDS:
            self.early_deaths += 1
            pause = min(RESTART_SECONDS, 2.0 ** min(self.early_deaths, 10))
            self.next_start_at = now + pause

    def stop_all(self, signal_number: int) -> None:
        """Signal every process that is left."""
        with self.lock:
            processes = [*self.live, *self.dying, *self.watched]
            for process in processes + self.spares.processes:
                process.stop(signal_number)

    def close_spares(self) -> None:
        """Stop the spares and the watched processes, and start no others."""
        with self.lock:
            self.spares.capacity = 0
            self.requested.clear()
            self.refill_is_due = False
            for process in list(self.watched):
                self.end_watch(process)
        self.retire_spares()

    def close(self) -> None:
        self.selector.close()
        self.wake_receiver.close()
        self.wake_sender.close()
        self.directory.remove()


# ── Generation ───────────────────────────────────────────────────────────────────
# From a Request to the events of its answers: a place in the queue, a process for each
# choice, and what later requests need of them.


class RequestQueue:
    """Lets at most `capacity` answers be generated at once. Requests wait in order.

    `changed` guards `active` and `waiting`. No other lock is taken under it.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.active = 0  # processes
        self.waiting: collections.deque[object] = collections.deque()
        self.changed = threading.Condition()

    def join(self, count: int) -> object:
        """Wait in line for `count` places. Returns a ticket for try_acquire() and
        leave(). Raises APIError 400 or 429."""
        if count > self.capacity:
            message = (
                f"'n' must not exceed --max-concurrency, which is {self.capacity}."
            )
            raise APIError(400, message, None, "n")
        ticket = object()
        with self.changed:
            if len(self.waiting) >= MAX_WAITING:
                headers = {"Retry-After": "5"}
                message = "Too many requests are queued."
                raise APIError(429, message, "queue_full", None, headers)
            self.waiting.append(ticket)
        return ticket

    def try_acquire(self, ticket: object, count: int) -> bool:
        """Wait for at most POLL_SECONDS until it is this ticket's turn. Returns whether
        the places are taken now."""

        def is_next() -> bool:
            has_room = self.active + count <= self.capacity
            return has_room and self.waiting[0] is ticket

        with self.changed:
            if not self.changed.wait_for(is_next, POLL_SECONDS):
                return False
            self.active += count
            return True

    def leave(self, ticket: object) -> None:
        """Leave the line, with or without the places."""
        with self.changed:
            self.waiting.remove(ticket)
            self.changed.notify_all()

    def release(self, count: int) -> None:
        with self.changed:
            self.active -= count
            self.changed.notify_all()

    def counts(self) -> tuple[int, int]:
        """The numbers of active processes, and of waiting requests."""
        with self.changed:
            return self.active, len(self.waiting)


class OutputReader:
    """Waits for the output of several CLI processes, and notices meanwhile when the
    client leaves, in a single thread."""

    def __init__(self, client: ClientConnection) -> None:
        self.client = client
        self.processes: list[CliProcess] = []
        self.selector = selectors.DefaultSelector()
        self.selector.register(client.connection, selectors.EVENT_READ)

    def add(self, process: CliProcess) -> None:
        self.processes.append(process)
        self.selector.register(process.stdout, selectors.EVENT_READ, process)

    def remove(self, process: CliProcess) -> None:
        self.processes.remove(process)
        unregister(self.selector, process)

    def read(self) -> list[tuple[CliProcess, Json]]:
        """Wait for at most POLL_SECONDS, and return the lines that have come. Raises
        APIError 502, and DisconnectedError."""
        for process in self.processes:
            update_write_interest(self.selector, process)
        lines = []
        for key, _ in self.selector.select(POLL_SECONDS):
            process = key.data
            if process is None:
                self.check_client()
            elif key.fileobj is process.stdout:
                lines += [(process, line) for line in process.read()]
            else:
                process.write()
        if self.client.input_has_ended:
            self.client.check_connected()
        return lines

    def check_client(self) -> None:
        """The client has left, or has sent its next request already. Stop watching it
        when nothing more can be learned from its socket."""
        self.client.check_connected()
        if self.client.is_full() or self.client.input_has_ended:
            self.selector.unregister(self.client.connection)

    def close(self) -> None:
        self.selector.close()


class Choice:
    """One answer of a generation, and the process that gives it. `process` is None
    before it is started, and when the pool has it back."""

    def __init__(self, index: int, request: Request, now: float) -> None:
        self.index = index
        self.answer = Answer()
        self.decoder = AnswerDecoder(request, self.answer, now)
        self.process: CliProcess | None = None
        self.was_replaced = False


class Generation:
    """A request that is being answered. Used by one thread.

    `conversation` is what a process is sent before the query. `is_prepared` is set when
    a spare has been requested for the turn that follows.
    """

    def __init__(self, service: Service, request: Request, client: ClientConnection):
        self.service = service
        self.request = request
        self.client = client
        now = time.time()
        count = request.output.choices
        self.choices = [Choice(index, request, now) for index in range(count)]
        self.answers = [choice.answer for choice in self.choices]
        self.started_at = time.monotonic()
        self.first_token_seconds: float | None = None
        self.version: Version = ()
        self.conversation = SentState("")
        self.answer_has_begun = False
        self.is_prepared = False
        self.postponed_error: APIError | None = None

    def is_complete(self) -> bool:
        return all(answer.finish_reason is not None for answer in self.answers)

    def events(self) -> Generator[list[tuple[int, Event]], None, None]:
        """Generate the answers. Yields their events, each with the index of its choice,
        in lists; an empty list if nothing has come for POLL_SECONDS. Raises APIError
        and DisconnectedError."""
        queue = self.service.queue
        count = len(self.choices)
        ticket = queue.join(count)
        try:
            while not queue.try_acquire(ticket, count):
                self.client.check_connected()
                yield []
        finally:
            queue.leave(ticket)
        try:
            with contextlib.closing(OutputReader(self.client)) as reader:
                self.start(reader)
                while not self.is_complete():
                    yield self.read_events(reader)
            self.service.record_success(self)
        except APIError as error:
            self.service.refuse_when_stopping()
            self.service.record_failure(error, self)
            raise
        finally:
            self.retire_processes()
            self.service.pool.request_refill()
            queue.release(count)

    def start(self, reader: OutputReader) -> None:
        """Start a process for each choice. Raises APIError 503."""
        self.service.refuse_when_stopping()
        self.service.check_plan(self.request)  # answers before this one have used of it
        binary = self.service.installation.find_binary()
        self.version = binary.version
        self.conversation = state_before_query(self.request.prompt, self.version)
        for choice in self.choices:
            self.start_process(choice, binary, reader, may_be_spare=True)

    def start_process(
        self,
        choice: Choice,
        binary: CliBinary,
        reader: OutputReader,
        may_be_spare: bool,
    ) -> None:
        query = query_lines(self.request.prompt, binary.version)
        pool = self.service.pool
        choice.process = pool.start(binary, self.conversation, query, may_be_spare)
        reader.add(choice.process)

    def read_events(self, reader: OutputReader) -> list[tuple[int, Event]]:
        """The next batch. A process that ends or is silent is replaced or reported."""
        if self.postponed_error is not None:
            raise self.postponed_error
        lines = reader.read()
        events: list[tuple[int, Event]] = []
        try:
            for choice in self.choices:
                for line in lines_of(choice.process, lines):
                    new_events = choice.decoder.decode(line)
                    events += [(choice.index, event) for event in new_events]
                if choice.process is not None:
                    self.check_process(choice, choice.process, reader)
        except APIError as error:
            if not events:
                raise
            self.postponed_error = error  # the client gets what came before it
        self.note_first_token()
        if events:
            self.prepare_spares(events)
        return events

    def note_first_token(self) -> None:
        if self.first_token_seconds is None:
            if any(answer.has_output for answer in self.answers):
                self.first_token_seconds = time.monotonic() - self.started_at

    def prepare_spares(self, events: list[tuple[int, Event]]) -> None:
        """When the answer begins, have the spares that are missing started. Prepare the
        next turn as soon as there is a reason to."""
        if not self.answer_has_begun:
            self.answer_has_begun = True
            if self.service.conversations.contains(self.conversation):
                self.prepare_next_turn()
            self.service.pool.request_refill()
        if not self.is_prepared:
            if any(isinstance(event, ToolCallStarted) for _, event in events):
                self.prepare_next_turn()

    def prepare_next_turn(self) -> None:
        """Have a spare sent the conversation up to this request: an agent's next step
        follows within milliseconds of the answer.

        That is worth a process only if the conversation goes on. It will if the answer
        calls a tool, and it probably will if this server gave the previous answer. A
        history alone is no sign: a batch of single requests may begin with examples.
        """
        if len(self.choices) == 1:
            self.is_prepared = True
            wanted = self.state_after_query()
            self.service.pool.request_spare(wanted, only_extend=False)

    def state_after_query(self) -> SentState:
        last_turn = self.request.prompt.turns[-1:]
        return state_with_turns(self.conversation, last_turn, self.version)

    def check_process(
        self, choice: Choice, process: CliProcess, reader: OutputReader
    ) -> None:
        """Hand back a process that has answered. Replace one that never printed
        anything. Raises APIError for any other end, and for silence."""
        silence = time.monotonic() - process.last_activity
        never_printed = not process.has_printed and not choice.was_replaced
        is_dead_spare = process.was_spare and silence > SPARE_SILENCE_SECONDS
        if choice.answer.finish_reason is not None:
            reader.remove(process)
            choice.process = None
            knows_limits = bool(choice.decoder.rate_limit)
            self.service.end_process(process, choice.answer, knows_limits)
        elif process.stopped_at is not None:
            raise stopping_error()
        elif never_printed and (process.has_ended or is_dead_spare):
            reader.remove(process)
            choice.was_replaced = True
            choice.process = None
            self.service.pool.retire(process, signal.SIGKILL)
            self.start_process(choice, process.binary, reader, may_be_spare=False)
        elif process.has_ended:
            message = "Claude Code ended before the answer was complete."
            raise APIError(502, message, "cli_died")
        elif silence > self.service.settings.timeout:
            seconds = self.service.settings.timeout
            message = f"Claude sent nothing for {seconds:g} seconds; see --timeout."
            raise APIError(504, message, "timeout")

    def retire_processes(self) -> None:
        """End what is still running: the request failed, or the client left."""
        for choice in self.choices:
            if choice.process is not None:
                self.service.pool.retire(choice.process, signal.SIGTERM)
                choice.process = None


def lines_of(
    process: CliProcess | None, lines: list[tuple[CliProcess, Json]]
) -> list[Json]:
    """Those of the lines that this process has printed."""
    return [line for source, line in lines if source is process]


def stopping_error() -> APIError:
    return APIError(503, "The server is stopping.", "stopping")


# ── Plan and usage ───────────────────────────────────────────────────────────────
# How much of the plan is used, as the CLI tells, and what the last requests used.


class PlanWindow(NamedTuple):
    """A limit of the plan: the part of it that is used (0 to 1), when it is reset
    (epoch seconds), and the CLI's word for its state. None: the CLI did not say."""

    used: float | None
    resets_at: int | None
    status: str | None

    def is_used_up(self, percent: float, now: float) -> bool:
        """Whether `percent` of it are known to be used, and it has not been reset."""
        if self.used is None or self.resets_at is None:
            return False
        return round(self.used * 100, 6) >= percent and self.resets_at > now


CODEX_WINDOWS = {  # name -> (Codex's name for it, its length in minutes)
    "five_hour": ("primary", 300),
    "seven_day": ("secondary", 10080),
}
WINDOW_NAMES = {"five_hour": "5-hour", "seven_day": "weekly"}
MODEL_WINDOW_PREFIX = "seven_day_"  # a window of one model family: seven_day_opus


class Plan:
    """The plan's limits, as far as the CLI has reported them in a rate_limit_event.

    `lock` guards all fields. No other lock is taken under it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.windows: dict[str, PlanWindow] = {}
        self.status: str | None = None  # the CLI's word for all windows together
        self.extra_usage: bool | None = None  # whether it is being drawn on
        self.updated_at: float | None = None

    def record(self, info: Json, now: float) -> None:
        """Record a rate_limit_info. From 2.1.332 on it lists all windows. Older CLIs
        report one window, and how much of it is used only when little is left."""
        windows = {}
        try:
            unified = info.get("unifiedWindows") or {}
            for name, window in unified.items():
                windows[name] = plan_window(window)
            name = optional_str(info.get("rateLimitType"))
            if not windows and name is not None:
                windows[name] = plan_window(info)
        except MALFORMED_LINE_ERRORS:
            log("plan: Claude Code reported the limits in an unknown format")
            return
        status = optional_str(info.get("status"))
        with self.lock:
            was_extra = self.extra_usage
            has_changed = status != self.status
            self.windows.update(windows)
            self.status = status
            if type(info.get("isUsingOverage")) is bool:
                self.extra_usage = info["isUsingOverage"]
            self.updated_at = now
            is_extra = self.extra_usage
        if has_changed and status != "allowed":
            log(
                f"plan: status={status} window={name} used={self.used_percentages(now)}"
            )
        if is_extra and not was_extra:
            log("plan: extra usage is in use, and is billed")

    def check(self, limit: float, model: str, now: float) -> None:
        """Raises APIError 429 while `limit` percent of a window are used."""
        if limit <= 0:
            return
        with self.lock:
            windows = dict(self.windows)
        for name, window in windows.items():
            if applies_to(name, model) and window.is_used_up(limit, now):
                raise plan_limit_error(name, window, limit, now)

    def current_window(self, name: str, now: float) -> PlanWindow | None:
        """A window whose use is known, and which has not ended. The caller holds
        `lock`."""
        window = self.windows.get(name)
        if window is None or window.used is None:
            return None
        if window.resets_at is not None and window.resets_at <= now:
            return None
        return window

    def used_percentages(self, now: float) -> str:
        """For the log: the windows of five hours and of a week, such as "37%/12%";
        empty if neither is known."""
        texts = []
        with self.lock:
            for name in CODEX_WINDOWS:
                window = self.current_window(name, now)
                if window is None or window.used is None:
                    texts.append("?")
                else:
                    texts.append(f"{window.used * 100:.0f}%")
        return "" if texts == ["?", "?"] else "/".join(texts)

    def headers(self, now: float) -> dict[str, str]:
        """Response headers from which Codex shows the limits in its /status (0.169)."""
        headers = {}
        with self.lock:
            for name, (codex_name, minutes) in CODEX_WINDOWS.items():
                window = self.current_window(name, now)
                if window is None or window.used is None:
                    continue
                prefix = f"x-codex-{codex_name}"
                headers[f"{prefix}-used-percent"] = f"{window.used * 100:g}"
                headers[f"{prefix}-window-minutes"] = str(minutes)
                if window.resets_at is not None:
                    headers[f"{prefix}-reset-at"] = str(window.resets_at)
        return headers

    def to_json(self) -> Json:
        with self.lock:
            windows = {name: w._asdict() for name, w in self.windows.items()}
            body: Json = {"windows": windows}
            body["extra_usage"] = self.extra_usage
            body["updated_at"] = self.updated_at
            return body


def plan_window(window: Json) -> PlanWindow:
    """Raises one of MALFORMED_LINE_ERRORS."""
    used = window.get("utilization")
    resets_at = window.get("resetsAt")
    return PlanWindow(
        used=None if used is None else float(used),
        resets_at=None if resets_at is None else int(resets_at),
        status=optional_str(window.get("status")),
    )


def applies_to(window_name: str, model: str) -> bool:
    """Whether a window limits this model. Other windows, such as the one of extra
    usage, do not belong to the plan."""
    if window_name in CODEX_WINDOWS:
        return True
    if window_name.startswith(MODEL_WINDOW_PREFIX):
        return window_name[len(MODEL_WINDOW_PREFIX) :] in model
    return False


def window_title(name: str) -> str:
    return WINDOW_NAMES.get(name, name.replace("_", " "))


def plan_limit_error(
    name: str, window: PlanWindow, limit: float, now: float
) -> APIError:
    used = (window.used or 0) * 100
    window_text = window_title(name)
    message = (
        f"{used:.0f}% of the plan's {window_text} limit is used. This server stops at "
        f"{limit:g}%; see --plan-limit."
    )
    error = APIError(429, message, "rate_limit_exceeded")
    error.resets_at = window.resets_at
    wait = max(1, math.ceil((window.resets_at or 0) - now))
    error.headers["Retry-After"] = str(wait)
    return error


MAX_RECENT_REQUESTS = 50
USAGE_HOURS = 24
USAGE_COUNTS = ("input_tokens", "cached_tokens", "output_tokens")
MAX_USAGE_ROWS = 500  # hours times models; the oldest are forgotten first


class UsageHistory:
    """The last requests, and the tokens of the last 24 hours by hour and model. It
    never holds a request's text. `lock` guards all fields; no other lock is taken under
    it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.requests: collections.deque[Json] = collections.deque(
            maxlen=MAX_RECENT_REQUESTS
        )
        self.hours: dict[tuple[int, str], Json] = {}

    def add(self, record: Json) -> None:
        """Add a request. `record` is made by Handler.request_record()."""
        with self.lock:
            self.requests.appendleft(record)
            if record["output_tokens"] is not None:
                self.add_to_hour(record)

    def add_to_hour(self, record: Json) -> None:
        start = int(record["time"]) // 3600 * 3600
        key = (start, record["model"])
        if key not in self.hours:
            new_row: Json = {"start": start, "model": record["model"], "requests": 0}
            new_row.update(dict.fromkeys(USAGE_COUNTS, 0))
            self.hours[key] = new_row
        row = self.hours[key]
        row["requests"] += 1
        for name in USAGE_COUNTS:
            row[name] += record[name]
        oldest = start - (USAGE_HOURS - 1) * 3600
        for old_key in [key for key in self.hours if key[0] < oldest]:
            del self.hours[old_key]
        while len(self.hours) > MAX_USAGE_ROWS:
            del self.hours[min(self.hours)]

    def to_json(self, now: float) -> Json:
        oldest = int(now) // 3600 * 3600 - (USAGE_HOURS - 1) * 3600
        with self.lock:
            hours = [dict(row) for key, row in sorted(self.hours.items())]
            requests = list(self.requests)
        recent = [row for row in hours if row["start"] >= oldest]
        return {"hours": recent, "requests": requests}


# ── Service ──────────────────────────────────────────────────────────────────────
# What all requests share, and what is recorded of them.


class KnownConversations:
    """The conversations whose last answer this server gave, by a hash. `lock` guards
    `hashes`; no other lock is taken while it is held."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.hashes: dict[bytes, None] = {}  # the oldest first

    def contains(self, conversation: SentState) -> bool:
        key = conversation.conversation_hash()
        with self.lock:
            return key in self.hashes

    def add(self, conversation: SentState) -> None:
        key = conversation.conversation_hash()
        with self.lock:
            self.hashes[key] = None
            if len(self.hashes) > MAX_KNOWN_CONVERSATIONS:
                oldest = next(iter(self.hashes))
                del self.hashes[oldest]


class KnownModels:
    """The models that the CLI offers this login. It is asked once for a CLI and a
    login.

    `lock` guards `catalog` and `source`; no other lock is taken while it is held. Only
    the main thread uses `next_query`.
    """

    def __init__(self, installation: Installation, pool: ProcessPool) -> None:
        self.installation = installation
        self.pool = pool
        self.lock = threading.Lock()
        self.catalog = ModelCatalog()
        self.source: Any = None  # the CLI and the login that the catalog is of
        self.next_query = 0.0

    def get(self) -> ModelCatalog:
        with self.lock:
            return self.catalog

    def are_known(self) -> bool:
        """Whether the CLI has said which models this login may use."""
        with self.lock:
            return self.source is not None

    def update(self) -> None:
        """Ask the CLI in a process of its own, which sends no request to the API, if
        the CLI or the login is new."""
        binary = self.installation.known_binary()
        login = self.installation.login_key()
        now = time.monotonic()
        if binary is None or login is None or now < self.next_query:
            return
        source = (binary, login)
        with self.lock:
            if source == self.source:
                return
        self.next_query = now + RESTART_SECONDS
        with contextlib.suppress(APIError):  # the next request reports it
            process = self.pool.spawn(binary, "sonnet")
            process.send(SentState("sonnet", initialize_options("", [])))
            is_done = functools.partial(self.record, source)
            deadline = now + CLI_COMMAND_SECONDS
            self.pool.watch(process, Watch(is_done, deadline, signal.SIGTERM))

    def record(self, source: Any, process: CliProcess, lines: list[Json]) -> bool:
        """Record the models from the answer to `initialize`. Returns whether it has
        come."""
        if process.initialize_answer is None:
            return False
        try:
            offered = offered_models(process.initialize_answer)
        except MALFORMED_LINE_ERRORS:
            log("models: Claude Code listed them in an unknown format")
            offered = []
        with self.lock:
            self.catalog = ModelCatalog(offered)
            self.source = source
        return True


class Service:
    """What all requests share. Its parts have locks of their own. Only the main thread
    sets `is_stopping`, once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.queue = RequestQueue(settings.max_concurrency)
        self.installation = Installation(settings.claude)
        self.pool = ProcessPool(self.installation, settings.spares)
        self.cache = AnswerCache()
        self.plan = Plan()
        self.history = UsageHistory()
        self.started_at = time.monotonic()
        self.is_stopping = False
        self.conversations = KnownConversations()
        self.models = KnownModels(self.installation, self.pool)

    def context(self) -> Context:
        """What parsing a request may refer to."""
        return Context(self.models.get(), self.cache)

    def check_plan(self, request: Request) -> None:
        """Raises APIError 429 if the plan is used up to --plan-limit."""
        # Some windows are for one family of models, which an alias may hide.
        names = f"{request.model.cli_name} {request.model.full_id}"
        self.plan.check(self.settings.plan_limit, names, time.time())

    def refuse_when_stopping(self) -> None:
        if self.is_stopping:
            raise stopping_error()

    def end_process(
        self, process: CliProcess, answer: Answer, knows_limits: bool
    ) -> None:
        """Stop a process whose answer is complete. Before that, the main thread waits a
        moment for its rate_limit_event, unless the CLI might send another request to
        the API meanwhile."""
        signal_number = signal.SIGTERM if answer.will_stop else signal.SIGKILL
        reads_on = answer.stop_reason in (*FINAL_STOP_REASONS, "tool_use")
        is_empty = answer.stop_reason != "tool_use" and not str(answer.content)
        if reads_on and not is_empty and not knows_limits:
            deadline = time.monotonic() + RATE_LIMIT_EVENT_SECONDS
            self.pool.watch(process, Watch(self.record_plan, deadline, signal_number))
        else:
            self.pool.retire(process, signal_number)

    def record_plan(self, process: CliProcess, lines: list[Json]) -> bool:
        """Record the plan's limits from the lines. Returns whether there were any."""
        found = False
        for line in lines:
            info = line.get("rate_limit_info")
            if line.get("type") == "rate_limit_event" and type(info) is dict:
                self.plan.record(info, time.time())
                found = True
        return found

    def manage_processes(self, listener: socket.socket | None = None) -> bool:
        """One round of the main loop: manage the processes, wait, and serve their
        pipes. Returns whether a client is waiting at `listener`, which is registered
        with the pool's selector."""
        client_waits = False
        self.pool.tick()
        active, _ = self.queue.counts()
        if not active and not self.pool.is_starting(time.monotonic()):
            self.models.update()  # not while others need the machine
        seconds = self.pool.seconds_to_next_tick()
        for key, _ in self.pool.selector.select(seconds):
            if listener is not None and key.fileobj is listener:
                client_waits = True
            else:
                self.pool.on_ready(key)
        return client_waits

    def record_success(self, generation: Generation) -> None:
        """Record what complete answers show: the login and the CLI work. Remember their
        signed thinking, which the next step of a tool loop needs."""
        self.installation.record_accepted_login()
        self.pool.record_answer()
        for choice in generation.choices:
            answer = choice.answer
            if answer.calls and any(is_thinking(block) for block in answer.blocks):
                model = generation.request.prompt.model
                signed = SignedAnswer(model, answer.model, answer.blocks)
                call_ids = [api_name(call.id) for call in answer.calls]
                self.cache.add_signed_answer(call_ids, signed)
        self.record_limits(generation)

    def record_failure(self, error: APIError, generation: Generation) -> None:
        """Record what a failure shows: that the login was refused, for example."""
        self.record_limits(generation)
        if error.status == 401:
            self.installation.record_refused_login()
            self.pool.retire_spares()  # they use the old login
        if self.settings.verbose:
            for choice in generation.choices:
                if choice.process is not None:
                    log_failed_process(error, choice.process)

    def record_limits(self, generation: Generation) -> None:
        """A rate_limit_event may also come before the end of an answer."""
        for choice in generation.choices:
            if choice.decoder.rate_limit:
                self.plan.record(choice.decoder.rate_limit, time.time())

    def finish(self, generation: Generation, writer: Writer) -> None:
        """Remember a complete answer, and prepare for the turn that follows it. Called
        when the response has been sent, or the client has left."""
        if len(generation.choices) > 1:
            return
        try:
            turns = writer.answer_turns(self.cache)
        except APIError:  # the answer has two calls of one id
            return
        conversation = state_with_turns(
            generation.state_after_query(), turns, generation.version
        )
        self.conversations.add(conversation)
        if generation.is_prepared:
            # A spare that was prepared longer ago has been given up meanwhile.
            seconds = time.monotonic() - generation.started_at
            is_recent = seconds < IDLE_CONVERSATION_SECONDS
            self.pool.request_spare(conversation, only_extend=is_recent)

    def close(self, is_busy: Callable[[], bool]) -> None:
        """Stop every process, after a moment for the answers that are being written.
        `is_busy` returns whether there are any."""
        self.installation.close()
        self.pool.close_spares()
        self.wait_until_idle(is_busy, DRAIN_SECONDS)
        self.pool.stop_all(signal.SIGTERM)
        self.wait_until_idle(is_busy, TERMINATE_SECONDS)
        self.pool.stop_all(signal.SIGKILL)
        self.wait_until_idle(is_busy, TERMINATE_SECONDS)
        self.pool.close()

    def wait_until_idle(self, is_busy: Callable[[], bool], seconds: float) -> None:
        """Wait until all requests are answered and all processes are reaped, or until
        `seconds` have passed: a client may not read its answer."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.pool.end_expired_watches()
            self.pool.reap()
            _, unreaped = self.pool.counts()
            if not unreaped and not is_busy():
                return
            time.sleep(0.002)

    def check(self) -> tuple[CliBinary | None, str]:
        """The CLI, and what is wrong with the installation, if anything."""
        binary, problem = self.installation.check()
        if not problem:
            try:
                self.pool.directory.ensure()
            except APIError as error:
                problem = error.message
        return binary, problem

    def health(self) -> tuple[int, Json]:
        """The status and the body of /health."""
        binary, problem = self.check()
        body = self.state_json(binary, problem)
        if problem:
            body["message"] = problem
        active, waiting = self.queue.counts()
        spares, _ = self.pool.counts()
        body["active"] = active
        body["waiting"] = waiting
        body["spares"] = spares
        return (503 if problem else 200), body

    def status(self) -> Json:
        """The data of the page. Values that are not known are None; times are in epoch
        seconds. It never holds a request's text."""
        binary, problem = self.check()
        now = time.time()
        active, waiting = self.queue.counts()
        spares, _ = self.pool.counts()
        processes = {
            "running": active,
            "waiting": waiting,
            "spares": spares,
            "max_concurrency": self.settings.max_concurrency,
        }
        models = [model.to_json() for model in self.context().models.models]
        return {
            "object": "status",
            **self.state_json(binary, problem),
            "message": problem or None,
            "now": now,
            "processes": processes,
            "models": models,
            **self.history.to_json(now),
        }

    def state_json(self, binary: CliBinary | None, problem: str) -> Json:
        """What /health and /status have in common."""
        return {
            "status": "error" if problem else "ok",
            "version": __version__,
            "uptime": round(time.monotonic() - self.started_at),
            "claude": self.cli_json(binary),
            "plan": self.plan_json(),
        }

    def cli_json(self, binary: CliBinary | None) -> Json:
        if binary is None:
            return {"path": None, "version": None, "logged_in": None}
        return {
            "path": binary.path,
            "version": version_text(binary.version),
            "logged_in": self.installation.known_login().is_logged_in,
        }

    def plan_json(self) -> Json:
        login = self.installation.known_login()
        return {
            "type": login.plan,
            "tier": login.tier,
            **self.plan.to_json(),
            "limit_percent": self.settings.plan_limit,
        }


def no_request() -> bool:
    """For Service.close(): without a server there are no requests."""
    return False


def log_failed_process(error: APIError, process: CliProcess) -> None:
    """Log how a CLI failed, but nothing that it printed, which may hold prompts."""
    exit_code = process.process.poll()
    ending = "running" if exit_code is None else f"exit={exit_code}"
    size = process.stderr_size()
    log(f"claude: status={error.status} code={error.code} {ending} stderr={size}_bytes")


# ── HTTP ─────────────────────────────────────────────────────────────────────────
# To add an endpoint, add a method to Handler and a row to ROUTES. The access checks are
# in Handler.check_access(), in order; read_json() also checks the content type of what
# browsers send.

CONTINUE_RESPONSE = b"HTTP/1.1 100 Continue\r\n\r\n"  # an interim one (RFC 9110, 15.2)


class ClientConnection(io.RawIOBase):
    """The client's socket: reads with a deadline, writes, and notices that it left.

    `deadline` is for all headers of a request together, and then for its body, so that
    a client that sends slowly can't hold a thread forever. `read_ahead` is what the
    client sent while it waited for its answer. `ignored_bytes` are bytes that a client
    skips at this point of the response. They are sent to find out whether a client that
    has closed its sending side still reads. None: there are no such bytes.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.deadline: float | None = None  # None: between requests
        self.read_ahead = bytearray()
        self.input_has_ended = False  # the client has closed its sending side
        self.ignored_bytes: bytes | None = None
        self.next_probe = 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Called by io.BufferedReader. Raises DisconnectedError, also for a client that
        is too slow."""
        if self.read_ahead:
            count = min(len(buffer), len(self.read_ahead))
            buffer[:count] = self.read_ahead[:count]
            del self.read_ahead[:count]
            return count
        remaining: float = IDLE_CONNECTION_SECONDS
        if self.deadline is not None:
            remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise DisconnectedError
        try:
            self.connection.settimeout(remaining)
            count = self.connection.recv_into(buffer)
        except OSError:
            raise DisconnectedError from None
        if self.deadline is None:
            self.deadline = time.monotonic() + REQUEST_SECONDS
        return count

    def send(self, data: bytes) -> None:
        """Raises DisconnectedError, also for a client that does not read."""
        try:
            self.connection.settimeout(WRITE_SECONDS)
            self.connection.sendall(data)
        except OSError:
            raise DisconnectedError from None

    def is_full(self) -> bool:
        """Whether `read_ahead` is full. Then we read no further, and can't notice that
        the client leaves."""
        return len(self.read_ahead) >= MAX_READ_AHEAD_BYTES

    def check_connected(self) -> None:
        """Raises DisconnectedError if the client has left. Reads from the socket into
        `read_ahead`, and may write `ignored_bytes`."""
        if self.is_full():
            return
        if not self.input_has_ended:
            self.read_available()
        if self.input_has_ended:
            self.probe()

    def read_available(self) -> None:
        self.connection.setblocking(False)  # reading and writing set their own timeout
        try:
            data = self.connection.recv(MAX_READ_AHEAD_BYTES)
        except BlockingIOError:
            return
        except OSError:
            raise DisconnectedError from None
        self.read_ahead += data
        self.input_has_ended = data == b""

    def probe(self) -> None:
        """Write twice to find out whether the client, which has closed its sending
        side, still reads (RFC 9112, 9.6). If it does not, the first write is answered
        with a reset, and the second one fails."""
        if time.monotonic() < self.next_probe:
            return
        if self.ignored_bytes is None:
            raise DisconnectedError
        self.send(self.ignored_bytes)
        time.sleep(0.02)
        self.send(self.ignored_bytes)
        self.next_probe = time.monotonic() + POLL_SECONDS


class RecordingReader(io.BufferedReader):
    """A BufferedReader that also appends each line to `record`, if that is set: the
    headers that http.server has parsed no longer show the bytes between them."""

    record: bytearray | None = None

    def readline(self, size: int | None = -1) -> bytes:
        line = super().readline(size)
        if self.record is not None:
            self.record += line
        return line


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections, each with a Handler in a thread of its own, and stops.

    `lock` guards `busy`, the handlers whose request is not answered yet.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def __init__(self, settings: Settings) -> None:
        """Listen. Raises OSError."""
        self.settings = settings
        if ":" in settings.host:
            self.address_family = socket.AF_INET6
        super().__init__((settings.host, settings.port), Handler)
        self.socket.setblocking(False)  # BSD: a client may leave before accept()
        self.service = Service(settings)
        self.allowed_origins = set(re.findall(r"[^\s,]+", settings.allow_origin))
        hosts = re.findall(r"[^\s,]+", settings.allow_host)
        self.allowed_hosts = {host_name(host) for host in hosts}
        self.lock = threading.Lock()
        self.busy: set[Handler] = set()

    def server_bind(self) -> None:
        """As in HTTPServer, but without getfqdn(), which may wait for a name server."""
        super(http.server.HTTPServer, self).server_bind()
        host, port = self.server_address[:2]
        self.server_name = str(host)
        self.server_port = int(port)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log an exception from outside Handler.handle_request()."""
        error = sys.exc_info()[1]
        if error is not None:
            log_exception(error)

    def run(self) -> None:
        """The main loop: accept connections and manage the processes, until a
        signal."""
        self.service.pool.selector.register(self.socket, selectors.EVENT_READ)
        while not self.service.is_stopping:
            try:
                self.run_once()
            except Exception as error:  # a bug must not end the server
                log_exception(error)
                time.sleep(POLL_SECONDS)

    def run_once(self) -> None:
        if self.service.manage_processes(self.socket):
            self.accept()

    def accept(self) -> None:
        try:
            connection, address = self.get_request()
        except OSError:  # the client left, or we are out of file descriptors
            time.sleep(0.01)
            return
        try:
            self.process_request(connection, address)
        except RuntimeError:  # no further thread can be started
            self.shutdown_request(connection)

    def set_busy(self, handler: Handler, is_busy: bool) -> None:
        with self.lock:
            if is_busy:
                self.busy.add(handler)
            else:
                self.busy.discard(handler)

    def is_busy(self) -> bool:
        with self.lock:
            return bool(self.busy)

    def drain(self) -> None:
        """Stop: give running answers a moment, then end every process."""
        self.server_close()
        self.service.close(self.is_busy)


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection. Every request goes through handle_request(), which logs it
    once."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a token must not wait for the next one
    server: Server
    rfile: RecordingReader

    def setup(self) -> None:
        super().setup()
        self.service = self.server.service
        self.client = ClientConnection(self.connection)
        self.rfile = RecordingReader(self.client)

    def handle_one_request(self) -> None:
        """Read a request and answer it. The method of http.server would look for a
        do_GET(), do_POST() and so on."""
        self.start_request()
        try:
            self.raw_requestline = self.rfile.readline(65537)
            if len(self.raw_requestline) > 65536:
                self.requestline = ""
                self.request_version = ""
                self.command = ""
                self.send_error(414)
            elif not self.raw_requestline:
                self.close_connection = True
            elif self.parse_request():
                self.handle_request()
        except DisconnectedError:
            self.close_connection = True

    def start_request(self) -> None:
        """Forget the previous request of this connection."""
        self.client.deadline = None
        self.client.ignored_bytes = None
        self.generation: Generation | None = None
        self.writer: Writer | None = None
        self.headers = http.client.HTTPMessage()
        self.raw_head = bytearray()  # the request line and the headers
        self.path = "?"
        self.is_generation = False  # it asks the model
        self.is_answered = False  # all events of the answer have come
        self.status = 0  # until the status line has been sent
        self.body_is_unread = False
        self.started_at = time.monotonic()

    # Parsing.

    def parse_request(self) -> bool:
        """Parse with http.server, and add what it lacks. Section numbers are those of
        RFC 9112."""
        if self.raw_requestline in (b"\r\n", b"\n"):
            self.close_connection = False  # an empty line is skipped (2.2)
            return False
        self.rfile.record = self.raw_head = bytearray(self.raw_requestline)
        is_complete = super().parse_request()
        self.rfile.record = None
        if not is_complete:
            return False
        self.started_at = time.monotonic()
        tokens = re.split(r"[\s,]+", self.headers.get("Connection", "").lower())
        if "close" in tokens or self.request_version == "HTTP/1.0":
            self.close_connection = True  # keep-alive is not offered to HTTP/1.0
        self.accept_absolute_url()
        sizes = self.headers.get_all("Content-Length", ["0"])
        has_body = sizes != ["0"] or "Transfer-Encoding" in self.headers
        self.body_is_unread = has_body or self.is_malformed()
        if self.request_version != "HTTP/1.0":
            self.client.ignored_bytes = CONTINUE_RESPONSE
        return True

    def accept_absolute_url(self) -> None:
        """Use the host of an absolute URL instead of the Host header (RFC 9112,
        3.2.2)."""
        match = re.match("(?i)https?://([^/?]*)(.*)", self.path)
        if match is not None:
            if len(self.headers.get_all("Host", [])) == 1:
                self.headers.replace_header("Host", match[1])
            self.path = match[2]

    def is_malformed(self) -> bool:
        """Whether a header is folded or broken, or holds a control character, such as a
        bare CR. A proxy in front may read it differently (RFC 9112, 2.2, 5.1, 5.2)."""
        is_bad = re.search(rb"\r(?!\n)|\n[ \t]|[^\t\r\n -~\x80-\xff]", self.raw_head)
        return is_bad is not None or bool(self.headers.defects)

    def handle_request(self) -> None:
        """Answer a request whose head has been parsed, and log it."""
        self.server.set_busy(self, True)
        try:
            self.check_access()
            self.route()
        except APIError as error:
            self.answer_error(error)
        except RecursionError:
            self.answer_error(APIError(400, "The JSON is nested too deeply."))
        except DisconnectedError:
            self.status = 499  # nginx's status for "client closed request"
            self.close_connection = True
        except Exception as error:  # the client must get an answer in any case
            log_exception(error)
            self.answer_error(APIError(500, "Internal error of the proxy."))
        finally:
            self.server.set_busy(self, False)
        self.log_request_line(time.monotonic() - self.started_at)
        self.skip_body()

    def check_access(self) -> None:
        """Refuse a request that may come from another site, has no key, or comes while
        the server is stopping. Raises APIError 400, 401, 403 or 503."""
        if self.is_malformed():
            message = "A header is folded, or holds a character that is not allowed."
            raise APIError(400, message)
        self.check_host()
        self.check_origin()
        key = self.server.settings.api_key
        if key and self.command != "OPTIONS" and not self.asks_for_page():
            self.check_key(key)
        self.service.refuse_when_stopping()

    def asks_for_page(self) -> bool:
        """Whether this asks for the page, which needs no key: it holds no data, and
        asks the user for the key of /status."""
        return normalized_path(self.path) == ""

    def check_host(self) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) > 1:
            raise APIError(400, "A request must have only one Host header.")
        if hosts:
            if not self.is_own_host(hosts[0]):
                raise forbidden_error(
                    "The Host header does not name this server; see --allow-host."
                )
        elif self.request_version != "HTTP/1.0":
            raise APIError(400, "A request must have a Host header.")

    def is_own_host(self, host: str) -> bool:
        """Protection against DNS rebinding, where a foreign name resolves to our
        address. When listening on all interfaces any name is allowed: a key is required
        then."""
        name = host_name(host)
        bound = self.server.settings.host.lower()
        if bound in ("0.0.0.0", "::") or name == bound:
            return True
        is_allowed = name in self.server.allowed_hosts
        return is_loopback(name) or name in CONTAINER_HOSTS or is_allowed

    def check_origin(self) -> None:
        origins = self.headers.get_all("Origin", [])
        if len(origins) > 1:
            raise APIError(400, "A request must have only one Origin header.")
        if origins:
            if not self.is_allowed_origin(origins[0]):
                raise forbidden_error(
                    "This web origin is not allowed; see --allow-origin."
                )
        elif self.headers.get("Sec-Fetch-Site") == "cross-site":
            raise forbidden_error("Web pages of other sites are not allowed.")

    def is_allowed_origin(self, origin: str) -> bool:
        """Pages of this machine, applications (app://…, vscode-webview://…), and what
        --allow-origin names; neither "null" nor "file://"."""
        if origin in self.server.allowed_origins:
            return True
        match = re.fullmatch(r"([a-z][a-z0-9+.-]*)://([^/?#@\\]+)", origin.lower())
        if match is None:
            return False
        scheme, authority = match.groups()
        if scheme in ("http", "https"):
            return is_loopback(host_name(authority))
        return scheme not in ("file", "ftp", "ws", "wss")

    def check_key(self, key: str) -> None:
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = self.headers.get("X-Api-Key", "")
        # http.server decodes headers as Latin-1; an environment variable may hold bytes
        # that the locale can't decode.
        given_bytes = given.strip(" \t").encode("latin-1", "replace")
        if not hmac.compare_digest(given_bytes, key.encode("utf-8", "surrogateescape")):
            raise APIError(401, "Incorrect API key provided.", "invalid_api_key")

    def route(self) -> None:
        path = normalized_path(self.path)
        if path.startswith(MODEL_PATH):
            path = MODEL_PATH
        route = ROUTES.get(path)
        if route is None:
            message = (
                f"Unknown URL {self.path.split('?')[0][:100]}. "
                "Try /v1/chat/completions."
            )
            raise APIError(404, message, "unknown_url")
        if "websocket" in self.headers.get("Upgrade", "").lower():
            # Codex then falls back to POST.
            headers = {"Upgrade": "HTTP/1.1"}
            raise APIError(426, "Use POST, not a WebSocket.", headers=headers)
        if self.command not in route.methods:
            allowed = ", ".join(route.methods)
            message = f"{self.command} is not allowed here. Use {allowed}."
            raise APIError(405, message, headers={"Allow": allowed})
        if self.command == "OPTIONS":
            self.answer_preflight()
        else:
            route.handler(self)

    # Endpoints.

    def answer_preflight(self) -> None:
        """Answer the request that a browser sends before another one, to ask whether it
        is allowed (CORS, Fetch standard, 3.3)."""
        requested = self.headers.get("Access-Control-Request-Headers", "*")
        headers = {
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": re.sub(r"[^\w*, -]", "", requested),
            "Access-Control-Max-Age": "600",
        }
        self.send_response_bytes(204, headers, b"")

    def get_page(self) -> None:
        data = PAGE.encode()
        headers = {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Length": str(len(data)),
            "Content-Security-Policy": page_policy(PAGE),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        self.send_response_bytes(200, headers, data)

    def get_status(self) -> None:
        self.send_json(200, self.service.status())

    def get_health(self) -> None:
        status, body = self.service.health()
        self.send_json(status, body)

    def get_models(self) -> None:
        models = self.service.context().models.models
        data = [model.to_json() for model in models]
        self.send_json(200, {"object": "list", "data": data})

    def get_model(self) -> None:
        name = normalized_path(self.path)[len(MODEL_PATH) :]
        model = self.service.context().models.find(name)
        self.send_json(200, {**model.to_json(), "id": name})

    def post_chat(self) -> None:
        self.is_generation = True
        request = parse_chat(self.read_json(), self.service.context())
        self.answer_request(request, ChatWriter)

    def post_response(self) -> None:
        self.is_generation = True
        request = parse_response(self.read_json(), self.service.context())
        self.answer_request(request, ResponseWriter)

    def answer_request(
        self,
        request: Request,
        writer_class: type[ChatWriter] | type[ResponseWriter],
    ) -> None:
        """Answer a parsed request, streamed or not."""
        self.service.check_plan(request)
        generation = Generation(self.service, request, self.client)
        unique_id = os.urandom(12).hex()
        writer = writer_class(request, generation.answers, unique_id, time.time)
        self.generation = generation
        self.writer = writer
        try:
            with contextlib.closing(generation.events()) as batches:
                if request.output.stream:
                    self.stream(batches, writer)
                    return
                for batch in batches:
                    for index, event in batch:
                        writer.record(index, event)
            self.is_answered = True
            writer.remember(self.service.cache)  # before the client can refer to it
            self.send_json(200, writer.body(), self.service.plan.headers(time.time()))
        finally:
            if self.is_answered:
                self.service.finish(generation, writer)

    # Reading.

    def handle_expect_100(self) -> bool:
        """Leave "100 Continue" to read_body(): it comes after the access checks."""
        return True

    def read_json(self) -> Any:
        """The JSON of the request body. Raises APIError 400, 413 or 415.

        The content type is only checked if a browser sent the request. Without a
        preflight, a page of another site can send JSON only with another content type.
        """
        from_browser = "Origin" in self.headers or "Sec-Fetch-Site" in self.headers
        if from_browser and self.headers.get_content_type() != "application/json":
            raise APIError(415, "Content-Type must be application/json.")
        codings = self.content_codings()
        raw = self.read_body()
        self.body_is_unread = False
        for coding in reversed(codings):
            raw = decompress(raw, coding)
        return parse_body(raw)

    def content_codings(self) -> list[str]:
        """The codings of the body, in the order in which they were applied (RFC 9110,
        8.4). Raises APIError 415."""
        values = self.headers.get_all("Content-Encoding", [])
        codings = []
        for name in ",".join(values).split(","):
            coding = name.strip().lower()
            if coding in ("", "identity"):
                continue
            if coding not in CONTENT_CODINGS:
                message = (
                    f"Content-Encoding '{coding[:50]}' is not supported. "
                    "Use gzip, deflate or none."
                )
                headers = {"Accept-Encoding": "gzip, deflate"}
                raise APIError(415, message, headers=headers)
            codings.append(coding)
        return codings

    def read_body(self) -> bytes:
        """Read the body: with a Content-Length, or chunked (RFC 9112, 6 and 7.1), never
        both. Raises APIError 400 or 413, and DisconnectedError."""
        lengths = self.headers.get_all("Content-Length", [])
        codings = self.headers.get_all("Transfer-Encoding", [])
        if len(lengths) + len(codings) > 1:
            raise ambiguous_length_error()
        if codings and codings[0].strip(" \t").lower() != "chunked":
            raise ambiguous_length_error()
        length = lengths[0].strip(" \t") if lengths else "0"
        if not re.fullmatch(r"[0-9]{1,18}", length):
            raise APIError(400, "The Content-Length header must be a whole number.")
        if int(length) > MAX_BODY_BYTES:
            raise too_large_error()
        expectation = self.headers.get("Expect", "").strip().lower()
        if expectation == "100-continue" and self.request_version != "HTTP/1.0":
            self.client.send(CONTINUE_RESPONSE)
        self.client.deadline = time.monotonic() + REQUEST_SECONDS
        if codings:
            return self.read_chunked()
        raw = self.rfile.read(int(length))
        if len(raw) < int(length):
            raise DisconnectedError
        return raw

    def read_chunked(self) -> bytes:
        body = bytearray()
        while True:
            line = self.rfile.readline(1024)
            size = re.match(rb"([0-9a-fA-F]{1,8})[ \t]*(;.*)?\r?\n", line)
            if size is None:
                raise malformed_chunks_error()
            count = int(size[1], 16)
            if len(body) + count > MAX_BODY_BYTES:
                raise too_large_error()
            if count == 0:
                break
            body += self.rfile.read(count)
            if self.rfile.readline(2) not in (b"\r\n", b"\n"):
                raise malformed_chunks_error()
        while self.rfile.readline(1 << 16) not in (b"\r\n", b"\n", b""):
            pass  # trailers
        return bytes(body)

    def skip_body(self) -> None:
        """If the body was not read, read what comes for up to two seconds, and have the
        connection closed. Closing it with unread data would send a reset, by which the
        client could lose our answer."""
        if self.body_is_unread:
            self.close_connection = True
            with contextlib.suppress(OSError, DisconnectedError):
                self.connection.shutdown(socket.SHUT_WR)
                self.client.deadline = time.monotonic() + 2
                while "Expect" not in self.headers and self.rfile.read1(1 << 16):
                    pass

    # Writing.

    def send_json(
        self, status: int, body: Any, headers: dict[str, str] | None = None
    ) -> None:
        data = json.dumps(body).encode() + b"\n"
        all_headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
        }
        if headers is not None:
            all_headers.update(headers)
        self.send_response_bytes(status, all_headers, data)

    def send_response_bytes(
        self, status: int, headers: dict[str, str], data: bytes
    ) -> None:
        """Send a whole response in one piece."""
        if self.command == "HEAD":
            data = b""
        self.client.send(self.format_head(status, headers) + data)

    def format_head(self, status: int, headers: dict[str, str]) -> bytes:
        """The status line and the headers, as bytes. Sets `status`, because they are
        about to be sent."""
        self.status = status
        all_headers = {"Date": self.date_time_string(), "Vary": "Origin"}
        origin = self.headers.get("Origin")
        if origin is not None and self.is_allowed_origin(origin):
            all_headers["Access-Control-Allow-Origin"] = origin
        if self.close_connection or self.body_is_unread:
            all_headers["Connection"] = "close"
        all_headers.update(headers)
        lines = [f"{self.protocol_version} {status} {self.responses[status][0]}"]
        lines += [f"{name}: {value}" for name, value in all_headers.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")

    def stream(
        self, batches: Iterator[list[tuple[int, Event]]], writer: Writer
    ) -> None:
        """Send the events. The status line is sent with the first one, so that an
        earlier failure can still have its own status."""
        last_sent = time.monotonic()
        try:
            for batch in batches:
                for index, event in batch:
                    text = writer.write(index, event)
                    if text:
                        self.send_event(text)
                        last_sent = time.monotonic()
                if time.monotonic() > last_sent + KEEPALIVE_SECONDS:
                    self.send_event(writer.keep_alive())
                    last_sent = time.monotonic()
            self.is_answered = True
            writer.remember(self.service.cache)  # before the client can refer to it
            text = writer.end()
        except APIError as error:
            if not self.status:
                raise
            text = writer.error(error)
            self.send_event(text, is_last=True)
            self.status = error.status
            return
        self.send_event(text, is_last=True)

    def send_event(self, text: str, is_last: bool = False) -> None:
        """Send events of a stream, the first ones with the head."""
        head = b""
        data = text.encode()
        is_chunked = self.request_version != "HTTP/1.0"
        if not self.status:
            head = self.format_head(200, self.stream_headers(is_chunked))
            if is_chunked:
                self.client.ignored_bytes = format_chunk(b":\n\n")  # a comment
            else:
                self.client.ignored_bytes = b":\n\n"
        if is_chunked:
            data = format_chunk(data)
            if is_last:
                data += b"0\r\n\r\n"
        self.client.send(head + data)

    def stream_headers(self, is_chunked: bool) -> dict[str, str]:
        headers = {
            "Content-Type": "text/event-stream",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",  # nginx would hold the events back
        }
        if is_chunked:
            headers["Transfer-Encoding"] = "chunked"
        headers.update(self.service.plan.headers(time.time()))
        return headers

    def answer_error(self, error: APIError) -> None:
        """Send an error. If the response has begun, close the connection instead."""
        if self.status:
            self.close_connection = True
            return
        with contextlib.suppress(DisconnectedError):
            self.send_json(error.status, {"error": error.to_json()}, error.headers)

    def send_error(
        self, code: int, message: str | None = None, explain: str | None = None
    ) -> None:
        """Called by http.server for a malformed request: answer in the form of our
        other errors."""
        self.close_connection = True
        text = str(message or self.responses[code][0])
        self.answer_error(APIError(int(code), text[:200]))
        self.log_request_line(0.0)

    # Logging.

    def log_request_line(self, seconds: float) -> None:
        """Log the request: time, status, method and path, then name=value fields. Add a
        request for an answer to the history, too."""
        record = self.request_record(seconds)
        path = ascii_only(record["endpoint"])
        fields = [str(self.status), self.command or "?", path]
        if self.generation is not None:
            fields += self.generation_fields(record)
        if self.is_generation:
            self.service.history.add(record)
        log(" ".join([*fields, f"total={seconds:.3f}"]))

    def generation_fields(self, record: Json) -> list[str]:
        fields = [f"model={ascii_only(record['model'])[:60]}"]
        if record["first_token_seconds"] is not None:
            fields.append(f"first={record['first_token_seconds']:.3f}")
        if record["output_tokens"] is not None:
            fields.append(f"in={record['input_tokens']}")
            fields.append(f"cached={record['cached_tokens']}")
            fields.append(f"out={record['output_tokens']}")
        if self.generation is not None:
            ignored = self.generation.request.output.ignored_kinds
            if ignored:
                names = ",".join(sorted(ascii_only(kind)[:40] for kind in ignored))
                fields.append(f"ignored={names[:200]}")
        plan = self.service.plan.used_percentages(time.time())
        if plan:
            fields.append(f"plan={plan}")
        return fields

    def request_record(self, seconds: float) -> Json:
        """What the log and the page show of a request. Unknown values are None."""
        record: Json = {
            "time": time.time(),
            "endpoint": (self.path.split("?")[0] or "?")[:80],
            "model": None,
            "status": self.status,
            "first_token_seconds": None,
            "total_seconds": round(seconds, 3),
            "input_tokens": None,
            "cached_tokens": None,
            "output_tokens": None,
        }
        if self.generation is not None and self.writer is not None:
            record["model"] = self.writer.model[:100]
            record["first_token_seconds"] = self.generation.first_token_seconds
            if self.generation.is_complete():
                counts = count_tokens(self.generation.answers)
                record["input_tokens"] = counts.input
                record["cached_tokens"] = counts.cached
                record["output_tokens"] = counts.output
        return record

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (inherited)
        """Nothing: log_request_line() writes one line for each request."""


class Route(NamedTuple):
    """The methods that are allowed for a path, and what answers them."""

    methods: tuple[str, ...]
    handler: Callable[[Handler], None]


MODEL_PATH = "/models/"  # the id of a model follows
READ_METHODS = ("GET", "HEAD", "OPTIONS")
WRITE_METHODS = ("POST", "OPTIONS")
ROUTES = {  # the paths are without /v1
    "": Route(READ_METHODS, Handler.get_page),
    "/status": Route(READ_METHODS, Handler.get_status),
    "/health": Route(READ_METHODS, Handler.get_health),
    "/models": Route(READ_METHODS, Handler.get_models),
    MODEL_PATH: Route(READ_METHODS, Handler.get_model),
    "/chat/completions": Route(WRITE_METHODS, Handler.post_chat),
    "/responses": Route(WRITE_METHODS, Handler.post_response),
}
# The names under which containers of Docker and Podman reach their host. No one can
# register a name in .internal (ICANN, 2024).
CONTAINER_HOSTS = ("host.docker.internal", "host.containers.internal")
CONTENT_CODINGS = ("gzip", "x-gzip", "deflate")


def normalized_path(url: str) -> str:
    """The path of a URL, without /v1 and without the double slashes or the second /v1
    that a wrong base URL leads to."""
    path = urllib.parse.unquote(url.split("?")[0])
    path = re.sub("/+", "/", path).rstrip("/")
    return re.sub("^(/v1)+(?=/)", "", path)


def host_name(authority: str) -> str:
    """The host of "host:port", in lower case, without the brackets of IPv6."""
    return re.sub(r":\d*$", "", authority.strip().lower()).strip("[]")


def format_chunk(data: bytes) -> bytes:
    """A chunk of a chunked body (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def decompress(data: bytes, coding: str) -> bytes:
    """Undo a content coding. Raises APIError 400 or 413."""
    result = bytearray()
    try:
        while data:
            decompressor = zlib.decompressobj(window_bits(data, coding))
            limit = MAX_BODY_BYTES - len(result) + 1
            result += decompressor.decompress(data, limit)
            if len(result) > MAX_BODY_BYTES:
                raise too_large_error()
            if not decompressor.eof:
                raise zlib.error
            data = decompressor.unused_data  # gzip may have several members (RFC 1952)
    except zlib.error:
        raise APIError(400, f"The request body is not valid {coding}.") from None
    return bytes(result)


def window_bits(data: bytes, coding: str) -> int:
    """The format for zlib.decompressobj(). Some clients send deflate without the header
    of zlib (RFC 9110, 8.4.1.2), whose first two bytes are a multiple of 31 (RFC
    1950)."""
    if coding != "deflate":
        return 16 + zlib.MAX_WBITS
    has_header = int.from_bytes(data[:2], "big") % 31 == 0
    return zlib.MAX_WBITS if has_header else -zlib.MAX_WBITS


def forbidden_error(message: str) -> APIError:
    return APIError(403, message, "origin_not_allowed")


def too_large_error() -> APIError:
    message = f"The request body exceeds {MAX_BODY_BYTES >> 20} MiB."
    return APIError(413, message, "request_too_large")


def ambiguous_length_error() -> APIError:
    message = "Give the body's length once: Content-Length, or chunked encoding."
    return APIError(400, message)


def malformed_chunks_error() -> APIError:
    return APIError(400, "The chunked request body is malformed.")


# ── Main ─────────────────────────────────────────────────────────────────────────


class Finding(NamedTuple):
    """One line of --check. `kind` is ok, problem or note."""

    kind: str
    text: str


def check_installation(service: Service) -> list[Finding]:
    """Check the CLI, its login and the environment. This runs the CLI, which takes
    seconds."""
    findings = []
    binary, problem = service.check()
    if binary is not None:
        version = version_text(binary.version)
        findings.append(Finding("ok", f"Claude Code {version} at {binary.path}"))
    if problem:
        findings.append(Finding("problem", problem))
    else:
        login = service.installation.known_login()
        names = [name for name in (login.method, login.tier or login.plan) if name]
        details = f" ({', '.join(names)})" if names else ""
        findings.append(Finding("ok", f"logged in{details}"))
    billing = [name for name in BILLING_VARIABLES if os.environ.get(name)]
    if billing:
        text = (
            "not passed on to Claude Code, because usage would be billed per token: "
            f"{', '.join(billing)}"
        )
        findings.append(Finding("note", text))
    return findings


def bind_problem(settings: Settings, error: OSError) -> str:
    address = f"{settings.host}:{settings.port}"
    reason = error.strerror or str(error)
    return (
        f"can't listen on {address}: {reason}. Choose another --host or --port, or "
        "stop the program that uses it."
    )


def check_port(settings: Settings) -> Finding:
    """Whether the server could listen. It may be running already."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        with socket.create_server((settings.host, settings.port), family=family):
            return Finding("ok", f"port {settings.port} is free")
    except OSError as error:
        problem = bind_problem(settings, error)
    health = running_server_health(settings)
    if health is None:
        return Finding("problem", problem)
    text = f"claude_max_proxy is already running on port {settings.port}"
    plan = plan_text(health.get("plan"))
    if plan:
        text = f"{text}; {plan}"
    return Finding("ok", text)


def running_server_health(settings: Settings) -> Json | None:
    """The /health of the server that uses the port; None if it is not this program."""
    connection = http.client.HTTPConnection(
        settings.host, settings.port, timeout=CLI_COMMAND_SECONDS
    )
    headers = {"X-Api-Key": settings.api_key.encode("utf-8", "surrogateescape")}
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/health", headers=headers)
            body = json.load(connection.getresponse())
        except (OSError, http.client.HTTPException, ValueError):
            return None
    return body if type(body) is dict and "spares" in body else None


def plan_text(plan: Any) -> str:
    """What is used of the plan, in words; empty if nothing is known."""
    if type(plan) is not dict or type(plan.get("windows")) is not dict:
        return ""
    texts = []
    for name, window in plan["windows"].items():
        if window["used"] is not None:
            window_text = window_title(name)
            text = f"{window['used']:.0%} of the {window_text} limit used"
            if window["resets_at"] is not None:
                reset = time.strftime("%a %H:%M", time.localtime(window["resets_at"]))
                text = f"{text} until {reset}"
            texts.append(text)
    if plan.get("extra_usage"):
        texts.append("extra usage is in use, and is billed")
    return ", ".join(texts)


def run_checks(settings: Settings) -> int:
    """--check: print a line for each finding, and return the exit code."""
    service = Service(dataclasses.replace(settings, spares=0))
    findings = [Finding("ok", f"Python {sys.version.split()[0]}")]
    try:
        findings += check_installation(service)
        findings.append(check_port(settings))
        if service.installation.known_login().is_logged_in:
            findings.append(check_models(service))
    except KeyboardInterrupt:
        return 130
    finally:
        service.close(no_request)
    for finding in findings:
        print(f"{finding.kind:8} {finding.text}")
    return int(any(finding.kind == "problem" for finding in findings))


def check_models(service: Service) -> Finding:
    """The models that the CLI offers this login. Takes a second: the CLI is asked."""
    end = time.monotonic() + MODELS_SECONDS
    while time.monotonic() < end:
        service.manage_processes()
        if service.models.are_known():
            return Finding("ok", models_text(service))
    return Finding("note", "Claude Code did not say which models this login may use.")


def models_text(service: Service) -> str:
    models = service.context().models.models
    return "models: " + ", ".join(model.id for model in models)


def print_banner(settings: Settings, port: int, findings: list[Finding]) -> None:
    """Print the server's address, the findings, and a command to try, on stderr."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    if settings.host in ("127.0.0.1", "::1"):
        host = "localhost"
    url = f"http://{host}:{port}"
    key = ' -H "Authorization: Bearer $KEY"' if settings.api_key else ""
    body = '{"model":"sonnet","messages":[{"role":"user","content":"Hello!"}]}'
    lines = [f"claude_max_proxy {__version__} is listening on {url}/v1"]
    for finding in findings:
        is_ok = finding.kind == "ok"
        lines.append(finding.text if is_ok else f"{finding.kind}: {finding.text}")
    lines.append(f"status page: {url}/")
    lines.append(f"try: curl {url}/v1/chat/completions{key} -d '{body}'")
    print_to_stderr("\n".join(lines))


def announce(server: Server) -> None:
    """Check the installation, print the banner, have the spares started, and print the
    models. This runs in a thread of its own, because a CLI that hangs must not keep
    requests waiting."""
    try:
        findings = check_installation(server.service)
        print_banner(server.settings, server.server_port, findings)
        if all(finding.kind != "problem" for finding in findings):
            server.service.pool.request_refill()
            end = time.monotonic() + MODELS_SECONDS
            while not server.service.models.are_known() and time.monotonic() < end:
                time.sleep(0.05)
        print_to_stderr(models_text(server.service))
    except Exception as error:
        log_exception(error)


def raise_descriptor_limit() -> None:
    """macOS allows 256 open files; each answer needs a few."""
    with contextlib.suppress(ValueError, OSError):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = 8192
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


def handle_signals(service: Service) -> None:
    """SIGTERM, SIGINT and SIGHUP stop the server; a second one stops it at once."""

    def stop(signal_number: int, frame: FrameType | None) -> None:
        if service.is_stopping:
            service.pool.stop_all(signal.SIGKILL)
            service.pool.close()
            os._exit(1)
        service.is_stopping = True
        service.pool.wake()

    for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(signal_number) is not signal.SIG_IGN:
            # nohup ignores SIGHUP; leave that alone.
            signal.signal(signal_number, stop)


def restart_from_bytecode() -> None:
    """Replace this process by one that runs the same code from bytecode.

    While Python runs a script, it keeps the script's syntax tree in memory: 12 MB for
    this one. The bytecode is kept in the user's cache directory.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    source = os.path.abspath(__file__)
    name = f"{binascii.crc32(os.fsencode(source)):08x}.{sys.implementation.cache_tag}"
    path = os.path.join(cache, "claude_max_proxy", f"server-{name}.pyc")
    try:
        py_compile.compile(source, cfile=path, doraise=True)
        os.execv(sys.executable, [sys.executable, path, *sys.argv[1:]])
    except (OSError, py_compile.PyCompileError):
        return  # then it goes on as a script


def main() -> int:
    if sys.stderr is None:  # the process was started with stderr closed
        sys.stderr = open(os.devnull, "w")
    settings, only_check = parse_options(sys.argv[1:])
    if only_check:
        return run_checks(settings)
    if __name__ == "__main__" and __file__.endswith(".py"):
        restart_from_bytecode()
    raise_descriptor_limit()
    try:
        server = Server(settings)
    except OSError as error:
        print_to_stderr(f"claude_max_proxy: {bind_problem(settings, error)}")
        return 2
    remove_stale_directories()
    handle_signals(server.service)
    threading.Thread(target=announce, args=[server], daemon=True).start()
    try:
        server.run()
    finally:
        server.drain()
    return 0


# ── Page ─────────────────────────────────────────────────────────────────────────


def page_policy(page: str) -> str:
    """Return the Content-Security-Policy that allows only the page's own parts."""
    hashes = {}
    for tag in ("style", "script"):
        content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = hashlib.sha256(content.encode()).digest()
        hashes[tag] = f"'sha256-{base64.b64encode(digest).decode()}'"
    return (
        f"default-src 'none'; script-src {hashes['script']}; "
        f"style-src {hashes['style']}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


# The answer to GET /. The page asks for /status every five seconds while it is visible.
# It inserts what it gets as text, never as markup: a model may have any name.
PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>claude_max_proxy</title>
<style>
:root { color-scheme: light dark }
body { max-width: 72rem; margin: auto; padding: 1rem }
body, button, input { font: 1rem/1.5 system-ui, sans-serif }
main { display: grid; gap: 0 2.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)) }
section { min-width: 0; overflow-wrap: anywhere }
section.wide { grid-column: 1 / -1 }
#state { font-weight: bold }
h2 { margin: 1.5rem 0 .5rem; font-size: 1.2rem; border-bottom: 1px solid #8888 }
p, dl, dd { margin: .25rem 0 }
dl { display: grid; grid-template-columns: 8rem 1fr; align-items: baseline }
.ok, .allowed { color: light-dark(#1a7f37, #57ab5a) }
.warning, .allowed_warning { color: light-dark(#9a6700, #d29922) }
.error, .rejected { color: light-dark(#c62828, #ff7b72) }
.stale { filter: grayscale(1) }
.bar { width: 100%; height: .75rem; background: #8884; fill: currentColor }
.chart { width: 100%; height: 12rem; font-size: .8rem; fill: currentColor }
.swatch { width: .8rem; height: .8rem; margin-right: .5rem }
line { stroke: CanvasText; stroke-width: 2 }
.scroll { overflow: auto; max-height: 24rem; white-space: nowrap }
caption, th, td { padding-right: 1rem; text-align: left; vertical-align: top }
#hours tr > :nth-child(n + 3), #requests tr > :nth-child(n + 4) { text-align: right }
[hidden] { display: none }
</style>
<header>
  <h1>claude_max_proxy</h1>
  <noscript>This page needs JavaScript to ask the server for its status.</noscript>
  <div id="state" role="status"></div>
  <form hidden>
    <label for="key">API key:</label>
    <input id="key" type="password" autocomplete="off" pattern="[ -~]+" required>
    <button>Show the status</button>
  </form>
</header>
<main hidden>
  <section><h2>Plan</h2><div id="plan"></div></section>
  <section><h2>Server</h2><div id="server"></div></section>
  <section><h2>Connect a client</h2><div id="client"></div>
    <p id="copied" role="status"></p></section>
  <section><h2>Models</h2><div id="models"></div></section>
  <section class="wide"><h2>Tokens of the last 24 hours</h2><div id="chart"></div>
    <details><summary>As a table</summary>
      <div id="hours" class="scroll" tabindex="0" role="region" aria-label="Tokens">
      </div></details></section>
  <section class="wide"><h2>Requests</h2>
    <div id="requests" class="scroll" tabindex="0" role="region" aria-label="Requests">
    </div></section>
</main>
<script>
"use strict";
const COLOURS = ["#3b7dd8", "#d9730d", "#2e9e5b", "#c2559d", "#1f9aa8", "#8b6fd6"];
const WINDOWS = { five_hour: "5-hour window", seven_day: "Week" };
const USAGE = { input_tokens: "Input", cached_tokens: "Cached",
  output_tokens: "Output" };
const HOURS = { start: "Hour", model: "Model", requests: "Requests", ...USAGE };
const REQUESTS = { time: "Time", endpoint: "Endpoint", model: "Model", status: "Status",
  first_token_seconds: "First token (s)", total_seconds: "Total (s)", ...USAGE };
const HOUR = { hour: "2-digit", minute: "2-digit" };
const MINUTE = { weekday: "short", month: "short", day: "numeric", ...HOUR };
const SECOND = { month: "short", day: "numeric", second: "2-digit", ...HOUR };
const UNKNOWN = "not known yet";
const main = document.querySelector("main");
const form = document.querySelector("form");
let key = sessionStorage.getItem("key");
let lastUpdate = "";

function element(tag, attributes, ...children) {
  const isSVG = ["svg", "rect", "line", "text", "title"].includes(tag);
  const namespace = `http://www.w3.org/${isSVG ? "2000/svg" : "1999/xhtml"}`;
  const node = document.createElementNS(namespace, tag);
  for (const name in attributes) node.setAttribute(name, attributes[name]);
  node.append(...children); // a string becomes a text node
  return node;
}

function update(id, ...children) {
  const part = document.getElementById(id);
  const fresh = part.cloneNode();
  fresh.append(...children);
  // What has not changed stays, and with it focus and selection.
  if (!fresh.isEqualNode(part)) part.replaceChildren(...fresh.childNodes);
}

function facts(values) {
  const pairs = Object.entries(values).map(([name, value]) =>
    [element("dt", {}, name), element("dd", {}, value ?? UNKNOWN)]);
  return element("dl", {}, ...pairs.flat());
}

function table(caption, columns, rows) {
  const heads = Object.values(columns).map((text) =>
    element("th", { scope: "col" }, text));
  const body = rows.map((row) => {
    const cells = Object.keys(columns).map((name) =>
      element("td", {}, row[name]?.toLocaleString() ?? "–"));
    return element("tr", { class: row.status >= 400 ? "error" : "" }, ...cells);
  });
  return element("table", {},
    element("caption", {}, rows.length > 0 ? caption : "None yet"),
    element("thead", {}, element("tr", {}, ...heads)),
    element("tbody", {}, ...body));
}

function formatTime(seconds, style) {
  return seconds && new Date(1000 * seconds).toLocaleString([], style);
}

function planWindow(name, { used, resets_at, status }, limit, now) {
  const title = WINDOWS[name] ?? name.replaceAll("_", " ");
  const ended = resets_at !== null && resets_at <= now;
  const known = used !== null && !ended;
  const percent = known ? Math.round(100 * used) : 0;
  const stopped = known && limit > 0 && 100 * used >= limit - 1e-6;
  let text = known ? `${percent}% used` : UNKNOWN;
  if (stopped) text += ", requests are refused";
  if (resets_at) text += `, reset: ${formatTime(resets_at, MINUTE)}`;
  const bar = element("svg", { class: `bar ${stopped ? "rejected" : status}`,
    role: "meter", "aria-label": title, "aria-valuenow": Math.min(percent, 100),
    "aria-valuetext": text });
  bar.append(element("rect", { width: `${percent}%`, height: "100%" }));
  if (limit > 0 && limit < 100) {
    bar.append(element("line", { x1: `${limit}%`, x2: `${limit}%`, y2: "100%" }));
  }
  return [element("p", {}, `${title}: ${text}`), bar];
}

function showPlan(plan, now) {
  const limit = plan.limit_percent;
  const bars = Object.entries(plan.windows).map(([name, data]) =>
    planWindow(name, data, limit, now));
  update("plan", ...bars.flat(), facts({
    "Plan": (plan.tier ?? plan.type)?.replaceAll("_", " "),
    "Limits as of": formatTime(plan.updated_at, MINUTE),
    "Requests stop": limit > 0 ? `at ${limit}% of a limit` : "never",
    "Extra usage": { true: "in use", false: "not in use" }[plan.extra_usage],
  }));
}

function showTokens(hours, now) {
  const tokens = (row) => row.input_tokens + row.output_tokens;
  const sum = (column, value) => hours.filter((row) => row[column] === value)
    .reduce((total, row) => total + tokens(row), 0);
  const models = [...new Set(hours.map((row) => row.model))].sort();
  const colour = (model) => COLOURS[models.indexOf(model) % COLOURS.length];
  const highest = Math.max(0, ...hours.map((row) => sum("start", row.start)));
  const label = `Most in an hour: ${highest.toLocaleString()} tokens`;
  const chart = element("svg", { class: "chart", role: "img",
    "aria-label": `Tokens by hour and model. ${label}` },
    element("text", { y: "1em" }, label),
    element("line", { x2: "100%", y1: "90%", y2: "90%" }));
  const first = now - (now % 3600) - 23 * 3600;
  const x = (start) => `${(100 * (start - first)) / (24 * 3600)}%`;
  const tops = {}; // of each hour's bar so far, in percent from above
  for (const row of hours.filter((row) => tokens(row) > 0)) {
    const height = (80 * tokens(row)) / highest;
    tops[row.start] = (tops[row.start] ?? 90) - height;
    const text = `${row.model}: ${tokens(row).toLocaleString()} tokens`;
    chart.append(element("rect", { x: x(row.start), y: `${tops[row.start]}%`,
      width: "3.5%", height: `${height}%`, fill: colour(row.model) },
      element("title", {}, text)));
  }
  for (let start = first; start < now; start += 6 * 3600) {
    chart.append(element("text", { x: x(start), y: "99%" }, formatTime(start, HOUR)));
  }
  const legend = models.map((model) => element("div", {},
    element("svg", { class: "swatch", "aria-hidden": "true" },
      element("rect", { width: "100%", height: "100%", fill: colour(model) })),
    `${model}: ${sum("model", model).toLocaleString()} tokens`));
  update("chart", chart, ...legend);
  const rows = hours.map((row) => ({ ...row, start: formatTime(row.start, MINUTE) }));
  update("hours", table("Tokens by hour and model", HOURS, rows));
}

function copyable(text) {
  const attributes = { value: text, "aria-label": `Copy ${text}` };
  return element("span", {}, element("code", {}, text), " ",
    element("button", attributes, "Copy"));
}

function show({ version, now, uptime, status, message, ...data }) {
  const { claude, plan, processes, models, hours, requests } = data;
  lastUpdate = formatTime(now, SECOND);
  form.hidden = true;
  main.hidden = false;
  main.classList.remove("stale");
  if (key) sessionStorage.setItem("key", key);
  const extra = "Extra usage is in use. It is billed in addition to your plan.";
  update("state", element("p", { class: status }, message ?? "Ready"),
    element("p", { class: "warning" }, plan.extra_usage ? extra : ""));
  showPlan(plan, now);
  update("server", facts({
    "Version": version,
    "Running since": formatTime(now - uptime, MINUTE),
    "Claude Code": claude.version && `${claude.version} at ${claude.path}`,
    "Logged in": { true: "yes", false: "no" }[claude.logged_in],
    "Processes": `${processes.running} running (at most ${processes.max_concurrency})` +
      `, ${processes.waiting} waiting, ${processes.spares} spare`,
  }));
  update("client", facts({
    "Base URL": copyable(`${location.origin}/v1`),
    "API key": key ? "the key you started the server with" : copyable("any-text"),
    "Model": copyable("claude-sonnet-4"),
  }));
  update("models", ...models.map(({ id, display_name, description }) => {
    const text = [display_name, description].filter(Boolean).join(": ");
    return element("p", {}, element("code", {}, id), ` ${text}`);
  }));
  showTokens(hours, now);
  const rows = requests.map((row) => ({ ...row, time: formatTime(row.time, SECOND) }));
  update("requests", table("The last 50, newest first", REQUESTS, rows));
}

function showProblem(text) {
  const stale = lastUpdate && ` What you see below is from ${lastUpdate}.`;
  update("state", element("p", { class: "error" }, text + stale));
  main.classList.add("stale");
}

async function refresh() {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  let response;
  let data;
  try {
    response = await fetch("status", { headers, signal: AbortSignal.timeout(4000) });
    data = await response.json();
  } catch {
    return showProblem("The server does not answer.");
  }
  if (response.ok) return show(data);
  form.hidden = response.status !== 401;
  const keyIsMissing = response.status === 401 && !key;
  showProblem(keyIsMissing ? "Enter the server's API key." : data.error.message);
}

function refreshIfVisible() {
  if (!document.hidden && form.hidden) refresh();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  key = form.querySelector("input").value;
  refresh();
});
main.addEventListener("click", async ({ target }) => {
  if (!target.value) return;
  // Over plain http, only a page from localhost may write to the clipboard.
  await navigator.clipboard?.writeText(target.value);
  update("copied", navigator.clipboard ? `Copied ${target.value}` : "Copy it by hand");
});
document.addEventListener("visibilitychange", refreshIfVisible);
setInterval(refreshIfVisible, 5000);
refresh();
</script>
"""

if __name__ == "__main__":
    sys.exit(main())
