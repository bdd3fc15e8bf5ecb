#!/usr/bin/env python3
"""An OpenAI-compatible server for the Claude Pro/Max subscription you already have.

    python3 claude_max_proxy.py                      # serves http://127.0.0.1:3456
    curl http://localhost:3456/v1/chat/completions \\
      -d '{"model":"sonnet","messages":[{"role":"user","content":"Hello!"}]}'

It runs your logged-in Claude Code CLI (`claude -p`), one process for each answer, and
speaks OpenAI's chat completions and Responses: streamed or not, tools, images,
structured output. One file, the standard library only.

The way of a request:

    client ──HTTP──► Handler.serve()      one thread for each connection
                        │ guard(), read_json()
                        │ parse_chat() or parse_response() → Ask           (pure)
                        ▼
                     Backend.deltas()     one generator for one response
                        │ Gate.enter():    waits for a place
                        │ Keeper.start():  a spare process, or a new one
                        │    stdin:  initialize, the earlier turns, the last turn
                        │    stdout: Messages API events, one JSON line each
                        │ listen():        one selector, for pipes and client
                        │ Answer.feed():   CLI line → deltas               (pure)
                        ▼
    client ◄──SSE─── Handler.stream()     one event for each delta, or
    client ◄──JSON── Reply.completion()   what the deltas add up to; ResponseReply
                                          writes the same for /v1/responses

The main thread runs Server.run(): it accepts connections and looks after the spare
processes. There are no other threads.

Security: the server listens on loopback. It checks Host, Origin and Sec-Fetch-Site, so
that no web page can spend your quota. Only a checked model id reaches argv. The CLI
runs in an empty private directory, without tools, settings, hooks, MCP servers or file
mentions. Prompts are never logged. A client that leaves ends its CLI, and so does the
end of the server.

Sections: Limits · Errors · Settings · Request · Protocol · Installation · Process ·
Spares · Response · One answer · HTTP · Main

MIT licence.
"""
from __future__ import annotations  # SyntaxError? Python 3.9 or newer is needed.

import argparse, base64, binascii, collections, contextlib, glob, hashlib, hmac, io
import ipaddress, json, math, os, re, resource, selectors, shutil, signal, socket
import subprocess, sys, tempfile, threading, time, traceback
import http.client, http.server, urllib.parse
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Set, Tuple

__version__ = "1.0.0"

Json = Dict[str, Any]

# ── Limits ─────────────────────────────────────────────────────────────────────────
# Each with its unit and its reason.

MAX_BODY = 32 << 20  # bytes; the Messages API refuses larger requests
MAX_AHEAD = 1 << 16  # bytes that a client may send before it has its answer
MAX_LINE = 64 << 20  # bytes of one CLI line
REQUEST_SECONDS = 30  # to send the headers, and again to send the body
IDLE_SECONDS = 120  # that a kept-alive connection may wait for its next request
WRITE_SECONDS = 60  # that one write to a client may take
ALIVE_SECONDS = 10  # of silence before a stream is started and kept alive
TICK_SECONDS = 0.5  # the longest wait of the main thread, and of a request
TERM_SECONDS = 1.0  # from SIGTERM to SIGKILL
DRAIN_SECONDS = 2.0  # that running answers get when the server stops
SPARE_SECONDS = 600  # after which an unused spare is replaced
STARTED_SECONDS = 3  # after which a CLI is up, on a slow machine, too
PAUSE_SECONDS = 60  # without a request, after which a conversation gives up its spare
REST_SECONDS = 3600  # without any request, after which spares are not replaced
LIMIT_SECONDS = 60  # until a limit ends, above which it is the plan's
LOGIN_SECONDS = 5  # from one look for a login to the next
REFUSED_SECONDS = 60  # to report "not logged in" after a 401 without asking the CLI
PROBE_SECONDS = 20  # for `claude --version` and `claude auth status`
MAX_WAITING = 500  # requests in the queue; each holds a thread and its body
MAX_CHOICES = 8  # `n`: one CLI process each
MAX_TOKENS = 10**9  # the CLI lowers it to what the model can do
MIN_THINKING_TOKENS = 2048  # a smaller max_tokens leaves no room for a thought
MIN_BUDGET_TOKENS = 4096  # the same for BUDGET_MODEL, whose thoughts take all but one
MAX_DESCRIPTION = 2048  # characters; older CLIs cut a tool's description there
MAX_MEMORY = 2000  # thoughts and texts of answers that are kept
OLDEST_CLI = (2, 1, 112)  # takes shouldQuery and a late system prompt (measured)
UNTYPED_TEXT_CLI = (2, 1, 330)  # honours text_not_typed (measured; 2.1.197 does not)
LATE_MODEL_CLI = (2, 1, 329)  # takes another model before the first turn (measured)


# ── Errors ─────────────────────────────────────────────────────────────────────────
# Code at any depth may raise APIError; Handler.fail() or Reply.fail() writes it. To map
# another failure of the CLI, add its word to FAILURES.

TYPES = {  # the error type for a code, else for a status, else invalid_request_error
    401: "authentication_error", 403: "permission_error", 429: "rate_limit_error",
    500: "api_error", 502: "api_error", 503: "service_unavailable",
    504: "timeout_error", "server_is_overloaded": "overloaded_error",
    "insufficient_quota": "insufficient_quota",
}  # fmt: skip


class APIError(Exception):
    """An error in OpenAI's shape: {"error": {message, type, param, code}}."""

    def __init__(
        self, status: int, message: str, code: Optional[str] = None,
        param: Optional[str] = None, headers: Optional[Dict[str, str]] = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        type = TYPES.get(code) or TYPES.get(status, "invalid_request_error")
        self.error = {"message": message, "type": type, "param": param, "code": code}


class Disconnected(Exception):
    """The client has gone; nobody is left to answer."""


LOGIN_CURE = "Claude Code is not logged in: run `claude auth login`, then try again. "
LOGIN_CURE += "(If CLAUDE_CODE_OAUTH_TOKEN is set, renew it with `claude setup-token`.)"
NO_MODEL = "The model does not exist, or your plan does not include it; see /v1/models."
CURES = {"not_logged_in": LOGIN_CURE, "model_not_found": NO_MODEL}  # by code

# What the CLI says of a failure -> our status and code. It says the API's status, the
# terminal_reason of its result line, and the `error` of its assistant line.
FAILURES = {
    word: (status, code)
    for status, code, *words in [
        (400, None, 400, "invalid_request"),
        (400, "context_length_exceeded", "prompt_too_long", "blocking_limit"),
        (401, "not_logged_in", 401, "authentication_failed"),
        (403, "permission_denied", 403),
        (404, "model_not_found", 404, "model_not_found"),
        (413, "request_too_large", 413),
        (429, "rate_limit_exceeded", 429, "rate_limit"),
        (429, "insufficient_quota", "billing_error"),
        (502, "upstream_error", 500),
        (503, "server_is_overloaded", 503, 529, "overloaded"),
        (504, "upstream_timeout", 504),
    ]
    for word in words
}


def failure(words: List[Any], text: str, wait: float, now: float) -> APIError:
    """The APIError for a failure that the CLI reports. Of `words` the first one that is
    in FAILURES counts; without any it is a 502. `wait`: seconds until a limit ends (0:
    unknown)."""
    status, code = next((FAILURES[w] for w in words if w in FAILURES), FAILURES[500])
    text = CURES.get(code) or text or "The Claude API answered with an error."
    error = APIError(status, text, code, "model" if status == 404 else None)
    if status == 429 and wait > 0:
        error.headers["Retry-After"] = str(math.ceil(wait))
        if wait > LIMIT_SECONDS:  # Codex would wait for it
            error.error.update(type="usage_limit_reached", resets_at=int(now + wait))
    return error


def strange_line() -> APIError:
    return APIError(502, "The Claude CLI printed a strange line.")


# What code that reads a CLI line raises when the line has not the shape we know.
STRANGE = (
    LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError,
)  # fmt: skip


def printable(text: str) -> str:
    """`text` as one word of a log line."""
    return re.sub(r"[^!-~]", "?", text)


def log(text: str) -> None:
    """Write a line on stderr, of words that a terminal can show. Never prompt text."""
    words = [time.strftime("%Y-%m-%dT%H:%M:%S"), *map(printable, text.split())]
    with contextlib.suppress(OSError, ValueError):  # a closed stderr stops nobody
        print(*words, file=sys.stderr, flush=True)


# ── Settings ───────────────────────────────────────────────────────────────────────
# To add an option, add a row to OPTIONS: its flag, environment variable, default and
# help follow from it.


def number(kind: type, least: float, most: float) -> Any:
    """An argparse type: a number from `least` to `most`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:
            raise ValueError(text)
        return value

    parse.__name__ = f"number from {least} to {most}"  # argparse complains with it
    return parse


class Option(NamedTuple):
    default: Any
    help: str
    kind: Any = str


OPTIONS = {
    "host": Option("127.0.0.1", "address to listen on; beyond loopback needs a key"),
    "port": Option(3456, "port to listen on", number(int, 0, 65535)),
    "api_key": Option("", "demand this key from clients (as `Bearer KEY`)"),
    "allow_origin": Option("", "web origins that may send requests, comma-separated"),
    "claude": Option("", "path of the Claude Code CLI, if it is not found"),
    "max_concurrency": Option(8, "CLI processes at once", number(int, 1, 1000)),
    "spares": Option(2, "processes started ahead, 155 MB each", number(int, 0, 100)),
    "timeout": Option(600.0, "seconds of silence before a 504", number(float, .1, 1e6)),
    "verbose": Option(False, "also log what a failed CLI wrote to stderr", bool),
}
DEFAULTS = [row.default for row in OPTIONS.values()]
Settings = collections.namedtuple("Settings", OPTIONS, defaults=DEFAULTS)
ENVIRONMENT = "CLAUDE_MAX_PROXY_"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """One line, without the usage that would hide it."""
        self.exit(2, f"claude_max_proxy: {message}\n")


def own_version() -> str:
    """The version and this file's hash: a copied file still says which one it is."""
    with open(__file__, "rb") as source:
        digest = hashlib.sha256(source.read()).hexdigest()
    return f"claude_max_proxy {__version__} ({digest[:12]})"


def parse_arguments(argv: List[str]) -> Tuple[Settings, bool]:
    """Flags over environment over defaults -> (settings, whether --check was given)."""
    parser = Parser(
        prog="claude_max_proxy.py",
        description="OpenAI-compatible server for your Claude subscription.",
        epilog=f"Each option can be set as {ENVIRONMENT}NAME, too: API_KEY better be, "
        "for `ps` shows flags to everyone.",
    )
    parser.add_argument("--version", action="version", version=own_version())
    parser.add_argument("--check", action="store_true", help="say what works, and exit")
    for name, (default, text, kind) in OPTIONS.items():
        given = os.environ.get(ENVIRONMENT + name.upper()) or str(default)
        if kind is bool:
            on = given not in ("False", "0", "false")
            rest: Json = {"action": "store_true", "default": on}
        else:  # argparse converts a default that is a string
            rest = {"type": kind, "default": given, "metavar": name.upper()}
            text += f" (default: {default})" if default else ""
        parser.add_argument("--" + name.replace("_", "-"), help=text, **rest)
    chosen = vars(parser.parse_args(argv))
    check_only = chosen.pop("check")
    settings = Settings(**chosen)
    if not is_loopback(settings.host) and not settings.api_key:
        parser.error(f"--host {settings.host} is open to others: give --api-key, too")
    return settings, check_only


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only mean this machine (RFC 6761, 6.3)."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


# ── Request ────────────────────────────────────────────────────────────────────────
# OpenAI's JSON -> an Ask. Pure: no sockets, processes or clock. To support a new
# parameter, add a row to PARAMETERS or RESPONSE_PARAMETERS, and read it in parse_chat()
# or parse_response(). To support a new kind of content, add a row to PARTS.

# Our id -> the CLI's alias for the newest model of the family.
MODELS = {f"claude-{alias}-4": alias for alias in ("opus", "sonnet", "haiku")}
KNOWN_MODELS = [*MODELS, *MODELS.values()]
MODEL_ID = re.compile(r"claude-[A-Za-z0-9.:_\[\]-]{1,120}")
# Models whose thinking has a budget. In a tool loop the API wants their signed thinking
# block back (Messages API, "Preserving thinking blocks").
BUDGET_MODEL = re.compile(r"haiku|claude-3|-4-[0-5](?!\d)|-4-20\d{6}")
# OpenAI's words for the CLI's effort.
EFFORTS = {None: "", "": "", "none": "", "minimal": "low"}
EFFORTS.update((word, word) for word in ("low", "medium", "high", "xhigh", "max"))

HONOURED, IGNORED, REFUSED = "honoured", "ignored", "refused"
HARMLESS = (False, 0, [], ["text"])  # values of a refused parameter that want nothing


class Row(NamedTuple):
    """What is done with a parameter, a tool or an item, and why; the JSON types that a
    parameter may have."""

    use: str
    why: str
    kinds: Tuple[type, ...] = ()
    code: str = "unsupported_parameter"  # if it is refused


def table(*rows: Any) -> Dict[str, Row]:
    """Rows that begin with the names that they are for."""
    return {name: Row(*row) for names, *row in rows for name in names.split()}


STRING, INTEGER, NUMBER, BOOLEAN = (str,), (int,), (int, float), (bool,)
ARRAY, OBJECT = (list,), (dict,)
NO_KNOB, NO_STORE = "Claude Code has no such knob", "nothing is stored"
PARAMETERS = table(
    ("model", HONOURED, "see Models", STRING),
    ("messages", HONOURED, "turn for turn, in their native roles", ARRAY),
    ("stream", HONOURED, "server-sent events", BOOLEAN),
    ("stream_options", HONOURED, "include_usage", OBJECT),
    ("max_tokens max_completion_tokens", HONOURED, "from 1; the second wins", INTEGER),
    ("stop", HONOURED, "1 to 4 strings; the CLI ends at a match", (str, list)),
    ("n", HONOURED, "1 to 8, one CLI process each", INTEGER),
    ("tools", HONOURED, "functions; the client runs them", ARRAY),
    ("tool_choice", HONOURED, "none, auto, required, a function", (str, dict)),
    ("parallel_tool_calls", HONOURED, "false: one call at a time", BOOLEAN),
    ("response_format", HONOURED, "text, json_object, json_schema", OBJECT),
    ("reasoning_effort", HONOURED, "none to max", STRING),
    ("temperature top_p", IGNORED, NO_KNOB, NUMBER),
    ("presence_penalty frequency_penalty", IGNORED, NO_KNOB, NUMBER),
    ("seed", IGNORED, NO_KNOB, INTEGER),
    ("logit_bias", IGNORED, NO_KNOB, OBJECT),
    ("user", IGNORED, NO_KNOB, STRING),
    ("metadata", IGNORED, NO_STORE, OBJECT),
    ("store", IGNORED, NO_STORE, BOOLEAN),
    ("logprobs top_logprobs", REFUSED, "Claude gives none", (bool, int)),
    ("modalities audio", REFUSED, "answers are text", (list, dict)),
    ("functions function_call", REFUSED, "use tools", (list, str, dict)),
    ("web_search_options", REFUSED, "there is no web search here", OBJECT),
)
SHARED = """
model stream tools tool_choice parallel_tool_calls temperature top_p user metadata store
top_logprobs
""".split()
RESPONSE_PARAMETERS = table(
    ("input", HONOURED, "a text, or items turn for turn", (str, list)),
    ("instructions", HONOURED, "the first system text", STRING),
    ("text", HONOURED, "format: text, json_object, json_schema", OBJECT),
    ("reasoning", HONOURED, "effort; summary: shows the thoughts", OBJECT),
    ("max_output_tokens", HONOURED, "at least 1", INTEGER),
    ("include", IGNORED, NO_KNOB, ARRAY),
    ("max_tool_calls", IGNORED, NO_KNOB, INTEGER),
    ("prompt_cache_key safety_identifier", IGNORED, NO_KNOB, STRING),
    ("service_tier truncation", IGNORED, NO_KNOB, STRING),
    ("stream_options", IGNORED, "usage is always sent", OBJECT),
    ("previous_response_id", REFUSED, NO_STORE, STRING, "previous_response_not_found"),
    ("conversation prompt", REFUSED, NO_STORE, (str, dict)),
    ("background", REFUSED, NO_STORE, BOOLEAN),
)
RESPONSE_PARAMETERS.update({name: PARAMETERS[name] for name in SHARED})
TOOL_TYPES = table(  # of /v1/responses; all others are refused
    ("function", HONOURED, "the client runs them"),
    ("custom", HONOURED, "one text as input; a grammar is not enforced"),
    ("namespace", HONOURED, "functions with a common prefix, such as MCP servers"),
    ("web_search tool_search", IGNORED, "Codex offers them; Claude has none here"),
)
ITEM_TYPES = table(  # of /v1/responses; all others are refused
    ("message", HONOURED, "turn for turn, in their native roles"),
    ("function_call custom_tool_call", HONOURED, "a call in the assistant's turn"),
    ("function_call_output custom_tool_call_output", HONOURED, "text, images, files"),
    ("item_reference", HONOURED, "if one of the last answers held the item"),
    ("reasoning", IGNORED, "signed thinking is kept here, by the id of the call"),
)
ECHO: Json = {  # what a response repeats of its request, and the defaults
    "instructions": None, "max_output_tokens": None, "metadata": {},
    "parallel_tool_calls": True, "reasoning": None, "temperature": None,
    "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [],
    "top_p": None, "truncation": "disabled", "previous_response_id": None,
}  # fmt: skip


class QueryOptions(NamedTuple):
    """What a process is sent with the last turn. `tool_choice` is the Messages API's,
    as JSON. "" and 0 leave the CLI its default."""

    effort: str = ""
    thinking: bool = True
    max_tokens: int = 0
    tool_choice: str = ""


class Setup(NamedTuple):
    """What `initialize` gives a process, once: a second one would not replace it."""

    system: str = ""
    tools: Tuple[Json, ...] = ()  # as MCP lists them


Names = Dict[str, str]  # a name at the API -> the client's


class Ask(NamedTuple):
    """All that one request asks for. `requested` is the client's name of the model,
    `model` the CLI's. `turns` are Messages API messages, the last one a user's. `names`
    are those of the tools, `wrapped` those (at the API) whose input is in WRAPPED. For
    /v1/responses: `summary`, whether to show thoughts; `origins`, the fields of a
    call's item by the tool's name; `echo`, see ECHO.
    """

    requested: str
    model: str
    options: QueryOptions
    setup: Setup
    turns: List[Json]
    names: Names = {}
    wrapped: Set[str] = set()
    stream: bool = False
    include_usage: bool = False
    stops: Tuple[str, ...] = ()
    n: int = 1
    summary: bool = False
    origins: Dict[str, Json] = {}
    echo: Json = {}

    @property
    def goes_on(self) -> bool:
        """Whether a next turn is likely: of a chat, or of an agent's tool loop."""
        return self.n == 1 and (len(self.turns) > 1 or bool(self.setup.tools))


class Thought(NamedTuple):
    """An answer with tool calls: the model that was asked for, the one that signed the
    thinking (it is good for that one alone), and all blocks in their order."""

    model: str
    signer: str
    blocks: List[Json]


# What is kept of the last answers: a Thought by the id of the answer's first tool call;
# a text by the id of its item of /v1/responses.
Memory = Dict[str, Any]


def parse_json(raw: bytes) -> Any:
    """JSON in UTF-8 (RFC 8259), without NaN and numbers beyond a float. Half of a
    surrogate pair becomes U+FFFD, for the API refuses it. Raises APIError 400, and
    RecursionError if it is nested too deeply."""

    def finite(digits: str) -> float:
        if math.isfinite(float(digits)):
            return float(digits)
        raise ValueError(digits)

    try:
        text = raw.decode("utf-8-sig")
        value = json.loads(text, parse_constant=finite, parse_float=finite)
    except ValueError:
        raise APIError(400, "The request body is not valid JSON in UTF-8.") from None
    if re.search(rb"\\u[dD][89a-fA-F]", raw):
        text = json.dumps(value, ensure_ascii=False)
        value = json.loads(re.sub("[\ud800-\udfff]", "\ufffd", text))
    return value


KINDS = {
    str: "a string", int: "an integer", float: "a number", bool: "a boolean",
    list: "an array", dict: "an object", type(None): "null",
}  # fmt: skip


class Field:
    """A value in the request, and its path there: what an error calls `param`."""

    def __init__(self, value: Any, path: str = ""):
        self.value, self.path = value, path

    def __getitem__(self, key: str) -> Field:
        """A member of an object; null if it, or the object, is absent or null."""
        path = f"{self.path}.{key}" if self.path else key
        return Field((self.may(dict) or {}).get(key), path)

    def __iter__(self) -> Iterator[Field]:
        """The elements of an array; none if it is null."""
        for i, value in enumerate(self.may(list) or ()):
            yield Field(value, f"{self.path}[{i}]")

    def want(self, *kinds: type) -> Any:
        """The value, checked. Raises APIError 400 if it has none of these types."""
        if type(self.value) in kinds:
            return self.value
        wanted, got = " or ".join(map(KINDS.get, kinds)), KINDS[type(self.value)]
        raise self.error(f"must be {wanted}, not {got}.", "invalid_type")

    def may(self, *kinds: type) -> Any:
        """The same; None if it is null."""
        return None if self.value is None else self.want(*kinds)

    def error(self, problem: str, code: Optional[str] = None) -> APIError:
        return APIError(400, f"'{self.path}' {problem}", code, self.path)


def type_of(holder: Field, known: Iterable[str], default: str = "") -> str:
    """The member `type`. Raises APIError 400 if it is not in `known`."""
    kind = holder["type"].may(str) or default
    if kind not in known:
        problem = f"must be one of {', '.join(known)}, not '{kind[:50]}'."
        raise holder["type"].error(problem, "unsupported_type")
    return kind


def parse_chat(raw: Any, memory: Memory) -> Ask:
    """A chat completion request -> Ask. Raises APIError 400 or 404."""
    body = parse_parameters(raw, PARAMETERS, "messages")
    script = Transcript()
    for message in body["messages"]:
        script.add_message(message)
    for tool in body["tools"]:
        type_of(tool, ("function",), "function")
    return make_ask(
        body, script, memory,
        functions=[tool["function"] for tool in body["tools"]],
        schema=format_schema(body["response_format"]),
        effort=body["reasoning_effort"],
        tokens=bounded(body["max_completion_tokens"]) or bounded(body["max_tokens"]),
    )._replace(
        include_usage=bool(body["stream_options"]["include_usage"].may(bool)),
        stops=parse_stops(body["stop"]),
        n=bounded(body["n"], MAX_CHOICES) or 1,
    )  # fmt: skip


def parse_parameters(raw: Any, rows: Dict[str, Row], needed: str) -> Field:
    """The request's body, checked against `rows`. Other names are ignored.
    Raises APIError 400, and 404 for the model."""
    if type(raw) is not dict:
        raise APIError(400, "The request body must be a JSON object.")
    body = Field(raw)
    for name in raw.keys() & rows.keys():
        row, field = rows[name], body[name]
        if field.may(*row.kinds) not in (None, *HARMLESS) and row.use == REFUSED:
            raise field.error(f"is not supported: {row.why}.", row.code)
    cli_model(body["model"].want(str))
    if not raw.get(needed):
        raise body[needed].error("is missing, or empty.")
    return body


def parse_response(raw: Any, memory: Memory) -> Ask:
    """A request of /v1/responses -> Ask. Raises APIError 400 or 404."""
    body = parse_parameters(raw, RESPONSE_PARAMETERS, "input")
    echo = {k: v if raw.get(k) is None else raw[k] for k, v in ECHO.items()}
    script, items = Transcript(), body["input"]
    if body["instructions"].value is not None:
        script.add_system(parse_parts(body["instructions"], TEXT))
    if type(items.value) is str:
        items = Field([{"role": "user", "content": items.value}], "input")
    for item in items:
        add_item(script, item, memory)
    functions, origins = response_functions(body["tools"])
    return make_ask(
        body, script, memory, functions,
        schema=format_schema(body["text"]["format"]),
        effort=body["reasoning"]["effort"],
        tokens=bounded(body["max_output_tokens"]),
    )._replace(
        summary=bool(body["reasoning"]["summary"].may(str)), origins=origins, echo=echo,
    )  # fmt: skip


def make_ask(
    body: Field, script: Transcript, memory: Memory, functions: List[Field],
    schema: Optional[Schema], effort: Field, tokens: int,
) -> Ask:  # fmt: skip
    """The Ask of either endpoint. `schema`: what the answer must match, if anything;
    `effort`: OpenAI's word; `tokens`: the most it may take, or 0."""
    model = cli_model(body["model"].value)
    tools, names, wrapped = parse_tools(functions)
    choice = parse_choice(body, names)
    called = [] if tools else script.called()
    if called:  # the API wants every called tool defined
        tools, choice = [mcp_tool(name, "", {}) for name in called], {"type": "none"}
    if schema is not None and choice.get("type") not in ("any", "tool"):
        tools.append(mcp_tool(STRUCTURED_OUTPUT, STRUCTURED_TEXT, schema[0]))
        wrapped.update({STRUCTURED_OUTPUT} if schema[1] else ())
        only = {"type": "tool", "name": STRUCTURED_OUTPUT}
        choice = {"type": "any"} if names and choice.get("type") != "none" else only
        choice["disable_parallel_tool_use"] = True
    script.recall(memory, model, wrapped)
    script.finish()
    options = parse_options(model, choice, effort, tokens, is_unsigned(script.turns))
    return Ask(
        body["model"].value, model, options,
        Setup("\n\n".join(script.system), tuple(tools)), script.turns,
        names, wrapped, stream=bool(body["stream"].value),
    )  # fmt: skip


def parse_options(
    model: str, choice: Json, effort: Field, tokens: int, unsigned: bool
) -> QueryOptions:
    """`choice` is the Messages API's tool_choice; `unsigned`: see is_unsigned()."""
    if effort.may(str) not in EFFORTS:
        raise effort.error(f"must be one of {', '.join(filter(None, EFFORTS))}.")
    thinking = not (
        effort.value == "none"
        or choice.get("type") in ("any", "tool")  # the API refuses both together
        or 0 < tokens < MIN_THINKING_TOKENS
        or (BUDGET_MODEL.search(model) and (unsigned or 0 < tokens < MIN_BUDGET_TOKENS))
    )
    as_json = json.dumps(choice) if choice else ""
    return QueryOptions(EFFORTS[effort.value], thinking, tokens, as_json)


def cli_model(name: str) -> str:
    """A client's model name -> what the CLI takes for --model. Raises APIError 404."""
    short = name.rsplit("/", 1)[-1]  # openai/…, anthropic/…: routers' prefixes
    model = MODELS.get(short, short)
    if model in MODELS.values() or MODEL_ID.fullmatch(model):
        return model
    message = f"No model '{name[:100]}': use {', '.join(KNOWN_MODELS)} or a full id."
    raise APIError(404, message, "model_not_found", "model")


def bounded(field: Field, most: int = MAX_TOKENS) -> int:
    """An integer from 1 to `most`; 0 if it is null."""
    if field.value is not None and not 1 <= field.value <= most:
        raise field.error(f"must be between 1 and {most}.")
    return field.value or 0


def parse_stops(field: Field) -> Tuple[str, ...]:
    stops = [field] if type(field.value) is str else list(field)
    if len(stops) > 4:  # OpenAI's limit
        raise field.error("may hold at most 4 strings.")
    return tuple(stop.value for stop in stops if stop.want(str))  # "" matches anywhere


def format_schema(form: Field) -> Optional[Schema]:
    """A format -> the JSON schema that the answer must match, if any."""
    if form.value is None:
        return None
    kind = type_of(form, ("text", "json_object", "json_schema"))
    if kind == "json_schema":
        holder = form if form.path == "text.format" else form["json_schema"]
        holder["schema"].want(dict)
        return object_schema(holder["schema"])
    return ({"additionalProperties": True}, False) if kind == "json_object" else None


# Tools. The Messages API is strict where clients are not. The CLI drops *all* tools of
# a server in silence if it does not like one schema.

# Our tool whose arguments are the answer's content, where no call of a client's tool is
# forced. (The CLI has its own, for `jsonSchema`. It drops that in silence for a schema
# with a keyword that it does not know.)
STRUCTURED_OUTPUT = "StructuredOutput"
STRUCTURED_TEXT = "Give your final response as the arguments of this tool."
# Names that mean something to the CLI. It edits inputs of the last two in the history.
RESERVED = {STRUCTURED_OUTPUT, "ToolSearch", "ExitPlanMode", "Edit"}
API_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
API_PROPERTY = re.compile(r"[a-zA-Z0-9_.-]{1,64}")  # at the top of a schema
# The property that holds the whole input of a tool whose own schema can't stand at the
# top, or is a text. It is put around the inputs in the history, and taken off a call
# where the model has put it.
WRAPPED = "input"

Schema = Tuple[Json, bool]  # a JSON schema, and whether it is that of a wrapped input


def api_name(name: str) -> str:
    """The name that the Messages API accepts for a tool or call id."""
    if API_NAME.fullmatch(name) and name not in RESERVED:
        return name
    digest = binascii.crc32(name.encode("utf-8", "replace"))
    return re.sub(r"[^a-zA-Z0-9_-]", "_", name)[:50] + f"_{digest:08x}"


def response_functions(tools: Field) -> Tuple[List[Field], Dict[str, Json]]:
    """The tools of /v1/responses -> functions, and Ask.origins."""
    functions, origins = [], {}
    for tool in tools:
        kind, name = type_of(tool, TOOL_TYPES), tool["name"].may(str)
        if kind == "function":
            functions.append(tool)
        elif kind == "custom":
            text = {"type": "string", "description": json.dumps(tool["format"].value)}
            functions.append(Field({**tool.value, "parameters": wrap(text)}, tool.path))
            origins[name] = {"type": "custom_tool_call", "name": name}
        for inner in tool["tools"] if kind == "namespace" else ():
            own, space = inner["name"].want(str), tool["name"].want(str)
            whole = {**inner.value, "name": f"{space}__{own}", "type": "function"}
            functions.append(Field(whole, inner.path))
            origins[whole["name"]] = {"name": own, "namespace": space}
    return functions, origins


def parse_tools(functions: List[Field]) -> Tuple[List[Json], Names, Set[str]]:
    """Functions: {name, description?, parameters?} -> (the tools as MCP lists them,
    their names, the wrapped ones)."""
    tools, names, wrapped = [], {}, set()
    for function in functions:
        name = function["name"].want(str)
        if not name or name in names.values():
            raise function["name"].error(f"is empty or used twice: '{name[:100]}'.")
        names[api_name(name)] = name
        text = function["description"].may(str) or ""
        schema, wraps = object_schema(function["parameters"])
        tools.append(mcp_tool(api_name(name), text, schema))
        if wraps or function["type"].value == "custom":
            wrapped.add(api_name(name))
    return tools, names, wrapped


def mcp_tool(name: str, text: str, schema: Json) -> Json:
    """A tool as MCP lists it. A long description moves into the schema, where no CLI
    cuts it."""
    schema = {"type": "object", **schema}
    if len(text) > MAX_DESCRIPTION:
        whole = filter(None, (text, schema.get("description")))
        schema["description"] = "\n\n".join(map(str, whole))
        text = text[:200] + "… (the whole description is in the input schema)"
    return {"name": name, "description": text, "inputSchema": schema}


COMBINATORS = ("anyOf", "oneOf", "allOf")
NUMERIC = re.compile("m(in|ax)imum|exclusiveM(in|ax)imum|multipleOf|m(in|ax)[A-Z].*")
JSON_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


def object_schema(field: Field) -> Schema:
    """A schema as the API and the CLI accept it: an object, with no combinator and no
    odd name of a property at the top. One that has any is wrapped.
    Raises APIError 400 for what can't mean an object."""
    kind = (field.may(dict) or {}).get("type")
    if kind not in (None, "object") and not (type(kind) is list and "object" in kind):
        raise field.error("must be a schema of type 'object'.", "invalid_schema")
    schema = {**modern(Field(field.value or {}, field.path)), "type": "object"}
    schema.pop("$schema", None)
    names = schema.get("properties", {})
    if all(map(API_PROPERTY.fullmatch, names)) and not schema.keys() & {*COMBINATORS}:
        return schema, False
    outer = {k: schema.pop(k) for k in ("$defs", "definitions") if k in schema}
    here, there = r'"\$ref": "#(?!/\$defs/|/definitions/)', '"$ref": "#/properties/'
    moved = re.sub(here, there + WRAPPED, json.dumps([schema, outer]))
    schema, outer = json.loads(moved)
    return {**outer, **wrap(schema)}, True


def wrap(schema: Json) -> Json:
    return {"type": "object", "properties": {WRAPPED: schema}, "required": [WRAPPED]}


# The keywords of a schema that hold schemas: by name, in an array, and alone.
BY_NAME = {"properties", "patternProperties", "$defs", "definitions"}
IN_ARRAY = {*COMBINATORS, "prefixItems"}
ALONE = {"items", "additionalProperties", "not"}


def modern(field: Field) -> Json:
    """A schema of any draft as one of JSON Schema 2020-12, at every depth: the
    CLI drops a tool with any other. Raises APIError 400 where it means nothing."""
    if type(field.value) is bool:
        return {} if field.value else {"not": {}}
    for name in field["required"]:
        name.want(str)
    schema = dict(field.want(dict))
    if type(schema.get("items")) is list:  # draft 7
        new = {"items": "prefixItems", "additionalItems": "items"}
        schema = {new.get(key, key): value for key, value in schema.items()}
    schema = {key: mended(key, value) for key, value in schema.items()}
    schema = {key: value for key, value in schema.items() if value is not None}
    field = Field(schema, field.path)
    for key in schema.keys() & BY_NAME:
        schema[key] = {k: modern(field[key][k]) for k in field[key].want(dict)}
    for key in schema.keys() & IN_ARRAY:
        schema[key] = [modern(inner) for inner in field[key]]
    for key in schema.keys() & ALONE:
        if type(schema[key]) is dict:
            schema[key] = modern(field[key])
    return schema


def mended(key: str, value: Any) -> Any:
    """The value of a keyword, as 2020-12 has it; None if it has no meaning there."""
    kinds = value if type(value) is list else [value]
    if key == "type" and any(kind not in JSON_TYPES for kind in kinds):
        return None  # "any", "file": no JSON type
    if key in ("type", "required") and type(value) is list:
        return list(dict.fromkeys(value))  # each once
    if NUMERIC.fullmatch(key) and type(value) not in (int, float):
        return None
    if key == "additionalProperties" and type(value) not in (bool, dict):
        return None
    if key == "$id" or (value == [] and key in IN_ARRAY | ALONE):
        return None  # nothing refers to an $id, and the CLI refuses "#x"
    return value


def parse_choice(body: Field, names: Names) -> Json:
    """tool_choice and parallel_tool_calls -> the Messages API's tool_choice; {} for its
    default."""
    field = body["tool_choice"]
    choice: Any = "auto" if field.value is None else field.value
    if type(choice) is dict:
        type_of(field, ("function", "custom"), "function")
        holder = field if "name" in choice else field["function"]
        name = holder["name"].want(str)
        if name not in names.values():
            raise field.error(f"names '{name[:100]}', which is not in 'tools'.")
        found = {"type": "tool", "name": api_name(name)}
    elif choice not in ("none", "auto", "required"):
        raise field.error("must be none, auto, required or a function.")
    elif not names and choice == "required":
        raise field.error("is only allowed with 'tools'.")
    else:
        found = {"type": "any" if choice == "required" else choice}
    if body["parallel_tool_calls"].value is False and choice != "none":
        found["disable_parallel_tool_use"] = True
    return found if names and found != {"type": "auto"} else {}


# Messages.

BEGIN, CONTINUE = "Begin.", "Continue."  # where the API wants a user turn and has none


def text_block(text: str) -> Json:
    return {"type": "text", "text": text}


class Transcript:
    """A conversation in the making: `system` texts, and `turns` in the Messages API's
    roles.

    Neighbours of one role are one turn. Texts without a visible character are dropped,
    for the API refuses them. A call id must be unique in a conversation, or the CLI
    drops the call: one that comes again gets a new one. (To the CLI `x_1` is the same
    as `x`; `x-1` is not.)
    """

    def __init__(self) -> None:
        self.turns: List[Json] = []
        self.system: List[str] = []
        self.ids: Set[str] = set()  # of calls, at the API
        self.open: Dict[str, Tuple[Field, str]] = {}  # client's id -> (call, API's id)

    def add_message(self, message: Field) -> None:
        """A message of chat completions."""
        role, content = message["role"].want(str), message["content"]
        if role == "tool":
            self.add_result(message["tool_call_id"], parse_parts(content, MEDIA))
        elif role in ("system", "developer"):
            self.add_system(parse_parts(content, TEXT))
        elif role == "user":
            self.add("user", parse_parts(content, MEDIA))
        elif role == "assistant":
            if message["audio"].value:
                raise message["audio"].error("is not supported.")
            if content.value is not None:  # it may have calls alone
                self.add("assistant", parse_parts(content, (*TEXT, "refusal")))
            for call in message["tool_calls"]:
                function = call["function"]
                self.add_call(call["id"], function, call_input(function))
        else:
            known = "system, developer, user, assistant, tool"
            raise message["role"].error(f"must be one of {known}.")

    def add_system(self, blocks: List[Json]) -> None:
        text = "\n".join(block["text"] for block in blocks)
        if text and self.turns:
            self.add("user", [text_block(f"<system>\n{text}\n</system>")])
        elif text:
            self.system.append(text)

    def add_call(self, id: Field, function: Field, value: Any) -> None:
        """A call of `function`: {name}. `value` is its input."""
        name = api_name(function["name"].want(str))
        if id.want(str) in self.open:
            raise function.error(f"has an id used before: '{id.value[:100]}'.")
        fresh = api_name(id.value)
        while fresh in self.ids:  # some clients count from 0 in each answer
            fresh = f"{api_name(id.value)}-{len(self.ids)}"
        self.ids.add(fresh)
        use = {"type": "tool_use", "id": fresh, "name": name, "input": value}
        self.add("assistant", [use])
        self.open[id.value] = function, fresh

    def add_result(self, id: Field, blocks: List[Json]) -> None:
        """The result of the call with that id."""
        if id.want(str) not in self.open:
            raise id.error("must be the id of a tool call without a response.")
        result = {"type": "tool_result", "tool_use_id": self.open.pop(id.value)[1]}
        if blocks:
            alone = len(blocks) == 1 and blocks[0].get("text")
            result["content"] = alone or blocks
        self.add("user", [result])

    def add(self, role: str, blocks: List[Json]) -> None:
        if not blocks:
            return
        same = bool(self.turns) and self.turns[-1]["role"] == role
        if blocks[0]["type"] != "tool_result" and not (same and role == "assistant"):
            self.expect_no_open_call()
        if not self.turns and role == "assistant":
            self.add("user", [text_block(BEGIN)])
        if same:
            self.turns[-1]["content"] += blocks  # in place: there may be many
        else:
            self.turns.append({"role": role, "content": blocks})

    def expect_no_open_call(self) -> None:
        for id, (call, _) in self.open.items():
            raise call.error(f"has no response: tool call '{id[:100]}'.")

    def called(self) -> List[str]:
        """The names of the tools in the conversation."""
        blocks = [block for turn in self.turns for block in turn["content"]]
        return sorted({b["name"] for b in blocks if b["type"] == "tool_use"})

    def recall(self, memory: Memory, model: str, wrapped: Set[str]) -> None:
        """Put back what the client does not know: signed thinking, and WRAPPED. In a
        turn, calls stand last."""
        for turn in self.turns:
            turn["content"].sort(key=lambda block: block["type"] == "tool_use")
            uses = [block for block in turn["content"] if block["type"] == "tool_use"]
            thought = memory.get(uses[0]["id"]) if uses else None
            for use in uses:
                if use["name"] in wrapped or type(use["input"]) is str:
                    use["input"] = {WRAPPED: use["input"]}
            if isinstance(thought, Thought) and thought.model == model:
                turn.update(content=in_order(thought.blocks, turn["content"], uses))
                turn.update(model=thought.signer)

    def finish(self) -> None:
        self.expect_no_open_call()
        if not self.turns or self.turns[-1]["role"] == "assistant":
            self.add("user", [text_block(CONTINUE if self.turns else BEGIN)])


def add_item(script: Transcript, item: Field, memory: Memory) -> None:
    """Add an item of `input`."""
    kind = type_of(item, ITEM_TYPES, "message")
    if kind == "message":
        script.add_message(item)
    elif kind == "item_reference":
        id = item["id"].want(str)
        text = memory.get(id)
        if type(text) is not str and not id.startswith("rs_"):
            message = f"Item '{id[:100]}' not found: set `store: false`, or send it."
            raise APIError(404, message, "item_not_found", item["id"].path)
        script.add("assistant", [text_block(text)] if text else [])
    elif kind.endswith("_output"):
        script.add_result(item["call_id"], parse_parts(item["output"], MEDIA))
    elif kind != "reasoning":  # that comes back by the id of the call, see Memory
        custom, space = kind == "custom_tool_call", item["namespace"].may(str)
        if space:
            item.value = {**item.value, "name": f"{space}__{item['name'].value}"}
        value = item["input"].want(str) if custom else call_input(item)
        script.add_call(item["call_id"], item, value)


def in_order(signed: List[Json], content: List[Json], uses: List[Json]) -> List[Json]:
    """An answer of tool calls with its thinking. `content` is what the client sent
    back, `uses` the calls in it, `signed` what the model said. Their order is the
    model's if both hold the same; else all thinking comes first."""
    texts = ["".join(b.get("text", "") for b in blocks) for blocks in (signed, content)]
    by_id = {use["id"]: use for use in uses}
    ids = [block["id"] for block in signed if block["type"] == "tool_use"]
    if texts[0] == texts[1] and sorted(ids) == sorted(by_id):
        return [by_id.get(block.get("id"), block) for block in signed]
    return [block for block in signed if "thinking" in block["type"]] + content


def is_unsigned(turns: List[Json]) -> bool:
    """Whether the last turn belongs to a tool loop with a call whose signed thinking is
    not known. (A turn with a result belongs to the loop, also with a text in it.)"""
    for turn in reversed(turns):
        kinds = [block["type"] for block in turn["content"]]
        if turn["role"] == "user" and "tool_result" not in kinds:
            return False
        if "tool_use" in kinds and "thinking" not in kinds[0]:
            return True
    return False


def call_input(call: Field) -> Json:
    """The `arguments` of a call, as the API wants them: an object. Any other text, such
    as what a model said that was cut short, becomes {"arguments": text}."""
    text = call["arguments"].may(str) or "{}"
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        if type(value) is dict:
            return value
    return {"arguments": text}


# The kinds of content, in chat completions and in /v1/responses.
TEXT = ("text", "input_text", "output_text")
MEDIA = (*TEXT, "image_url", "input_image", "file", "input_file")
IMAGES = re.compile("image/(png|jpeg|gif|webp)")
FILES = re.compile("application/(pdf|json)|text/.*")


def parse_parts(content: Field, kinds: Tuple[str, ...]) -> List[Json]:
    """A string, or an array of parts of the given kinds, as API blocks."""
    blocks = []
    for part in [content] if type(content.want(str, list)) is str else content:
        if type(part.value) is str:  # some clients send bare strings in an array, too
            block = text_block(part.value)
        else:
            block = PARTS[type_of(part, kinds)](part)
        if block["type"] != "text" or block["text"].strip():
            blocks.append(block)
    return blocks


def image_part(part: Field) -> Json:
    field = part["image_url"]
    field = field["url"] if type(field.want(dict, str)) is dict else field
    source: Json = {"type": "url", "url": field.want(str)}
    if not re.match(r"https?://", field.value):
        source = data_source(field, field.value, IMAGES)
    return {"type": "image", "source": source}


def file_part(holder: Field) -> Json:
    """`holder`: {file_data, filename?}."""
    field = holder["file_data"]
    if field.value is None:
        raise holder.error("needs 'file_data', not an id.", "unsupported_content")
    bare = not field.want(str).startswith("data:")  # OpenAI takes that of a PDF
    url = ("data:application/pdf;base64," if bare else "") + field.value
    source = data_source(field, url, FILES)
    if source["media_type"] != "application/pdf":
        text = base64.b64decode(source["data"]).decode("utf-8", "replace")
        source = {"type": "text", "media_type": "text/plain", "data": text}
    title = holder["filename"].may(str)
    return {"type": "document", "source": source, **({"title": title} if title else {})}


def data_source(field: Field, url: str, kinds: re.Pattern) -> Json:
    """data:TYPE;base64,DATA (RFC 2397) -> the source of a block, of one of `kinds`."""
    head, _, data = url.partition(",")
    kind = head[len("data:") :].split(";")[0].lower().replace("image/jpg", "image/jpeg")
    data = re.sub(r"\s+", "", data)
    if not head.startswith("data:") or not head.endswith(";base64"):
        raise field.error("must be an http(s) or a base64 data: URL.")
    if not kinds.fullmatch(kind):
        problem = f"holds {kind[:50]}, not {kinds.pattern}."
        raise field.error(problem, "unsupported_media_type")
    with contextlib.suppress(ValueError):
        if base64.b64decode(data, validate=True):
            return {"type": "base64", "media_type": kind, "data": data}
    raise field.error("holds invalid base64 data.")


PARTS = {
    **dict.fromkeys(TEXT, lambda part: text_block(part["text"].want(str))),
    "refusal": lambda part: text_block(part["refusal"].want(str)),
    "image_url": image_part,
    "input_image": image_part,
    "file": lambda part: file_part(part["file"]),
    "input_file": file_part,
}


# ── Protocol ───────────────────────────────────────────────────────────────────────
# How `claude -p` is driven over stdin: argv, environment and lines. Pure. Measured on
# 2.1.112, 2.1.197 and 2.1.330, 2026-11-22. A conversation with it, trimmed (> we write,
# < it prints; one JSON object a line):
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
#      "end_turn"},"usage":{"output_tokens":3}},…}           here we end the process
#   < {"type":"result",…}
#
# Turns that are sent before the last one's result change their order, and assistant
# turns with one id are merged: hence the waits and the ids. We never answer
# `tools/call`: the client runs its tools, and sends the result in its next request.

SERVER = "c"  # the MCP server that holds the client's tools
ARGV = [
    *"-p --input-format stream-json --output-format stream-json --verbose".split(),
    *"--include-partial-messages --no-session-persistence".split(),
    *("--tools", ""),  # none of the CLI's own tools
    "--strict-mcp-config",  # none of the user's MCP servers
    *("--setting-sources", ""),  # no hooks, plugins and CLAUDE.md
    "--disable-slash-commands",
    *("--allowedTools", f"mcp__{SERVER}"),
    "--settings",  # no reminder how to sign commits if a client's tool is named Bash
    '{"attribution":{"commit":"","pr":""},"includeCoAuthoredBy":false}',
]
VARIABLES = {
    "CLAUDE_CODE_DISABLE_ATTACHMENTS": "1",  # `@/path` in a text would read that file
    "CLAUDE_CODE_DISABLE_FILE_MENTIONS": "1",
    "CLAUDE_AGENT_SDK_MCP_NO_PREFIX": "1",  # tools keep their names
    "CLAUDE_AGENT_SDK_DISABLE_BUILTIN_AGENTS": "1",  # a tool Agent would list them
    "ENABLE_TOOL_SEARCH": "false",  # it would withhold some of many tools at first
    "CLAUDE_CODE_MAX_RETRIES": "2",  # after a 5xx; the default of 10 takes minutes
    "CLAUDE_CODE_DISABLE_REFUSAL_RETRY": "1",
    "DISABLE_AUTO_COMPACT": "1",
    "CLAUDE_CODE_BLOCKING_LIMIT_OVERRIDE": "100000000",  # the API knows its own limit
    # All cache marks of a request must have one lifetime: the API wants longer ones
    # first, and ours stands before the CLI's.
    "ENABLE_PROMPT_CACHING_1H": "1",
    "CLAUDE_CODE_SKIP_MCP_DEBUG_LOG_FILES": "1",
    "DISABLE_AUTOUPDATER": "1",
}
CWD = "cwd"  # of every CLI, empty: its name stands before the cached turns (2.1.330)
CACHE_MARK = {"type": "ephemeral", "ttl": "1h"}
ASSISTANT: Json = {"type": "message", "stop_reason": None, "stop_sequence": None}
ASSISTANT["usage"] = {"input_tokens": 0, "output_tokens": 0}
# With these the CLI would bill by the token instead of the subscription.
BILLED = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")
# CLAUDECODE keeps the CLI from starting; query_lines() sets the others.
WITHHELD = """
CLAUDECODE MAX_THINKING_TOKENS CLAUDE_CODE_MAX_OUTPUT_TOKENS CLAUDE_CODE_EXTRA_BODY
CLAUDE_CODE_DISABLE_THINKING CLAUDE_CODE_EFFORT_LEVEL
""".split()

Version = Tuple[int, ...]


def environment(program: str) -> Dict[str, str]:
    """Our environment without what must not reach the CLI, plus VARIABLES. The CLI's
    directory is at the end of PATH: under nvm npm's `claude` looks for `node` there,
    and launchd's PATH does not have it."""
    gone = {*BILLED, *WITHHELD, *(ENVIRONMENT + name.upper() for name in OPTIONS)}
    env = {name: text for name, text in os.environ.items() if name not in gone}
    places = env.get("PATH") or os.defpath, os.path.dirname(program)
    return {**env, **VARIABLES, "PATH": os.pathsep.join(places)}


def control_line(subtype: str, **fields: Any) -> Json:
    request = {"subtype": subtype, **fields}
    return {"type": "control_request", "request_id": "1", "request": request}


def settings_line(**settings: Any) -> Json:
    """Changes a running process up to its query. The variables of `env`: 2.1.112 and
    newer. The `model`: LATE_MODEL_CLI, and only before the first turn."""
    return control_line("apply_flag_settings", settings=settings)


def initialize_line(setup: Setup) -> Json:
    servers = {"sdkMcpServers": [SERVER]} if setup.tools else {}
    return control_line("initialize", systemPrompt=[setup.system], **servers)


def turn_line(turn: Json, place: int, version: Version) -> Json:
    """An earlier turn of the conversation; `place` makes an assistant's id unique."""
    message = {"role": turn["role"], "content": turn["content"]}
    line = {"type": turn["role"], "session_id": "", "parent_tool_use_id": None}
    if turn["role"] == "user":
        message["content"] = untyped(turn["content"], version)
        line.update(shouldQuery=False, text_not_typed=True)
    else:
        model = turn.get("model", "m")  # the CLI drops the thinking of another one
        message.update(ASSISTANT, id=f"msg_{place}", model=model)
    return {**line, "message": message}


def query_lines(ask: Ask, version: Version) -> List[Json]:
    """The options of this request, if it has any (reading them takes 10 ms), and the
    last turn, which starts the model."""
    options = ask.options
    choice = '{"tool_choice":%s}' % options.tool_choice
    env = {
        "CLAUDE_CODE_EFFORT_LEVEL": options.effort,
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(options.max_tokens or ""),
        "CLAUDE_CODE_DISABLE_THINKING": "" if options.thinking else "1",
        "CLAUDE_CODE_EXTRA_BODY": choice if options.tool_choice else "",
    }
    env = {name: text for name, text in env.items() if text}
    last = query_line(ask.turns[-1], version)
    return [settings_line(env=env), last] if env else [last]


def query_line(turn: Json, version: Version) -> Json:
    """The last turn. Its end has a mark for the prompt cache, which would not find the
    conversation again without it."""
    line = turn_line(turn, 0, version)
    del line["shouldQuery"]
    content = list(line["message"]["content"])
    places = (i for i, block in enumerate(content) if block["type"] != "image")
    last = max(places, default=-1)  # 2.1.330 loses a mark on an image
    content[last] = {**content[last], "cache_control": CACHE_MARK}
    return {**line, "message": {"role": "user", "content": content}}


def untyped(content: List[Json], version: Version) -> List[Json]:
    """User content that the CLI does not take for typed input. If it does not know
    `text_not_typed`, a last text that begins with "/" is a command to it. Cut behind
    the slashes the text is none, and reads the same."""
    text = content[-1].get("text", "")
    if version >= UNTYPED_TEXT_CLI or not text.startswith("/"):
        return content
    rest = text.lstrip("/")
    pieces = [text[: len(text) - len(rest)], rest] if rest.strip() else ["\n" + text]
    return content[:-1] + [text_block(piece) for piece in pieces]


class Conversation(NamedTuple):
    """What a process has been sent, or is to be sent, before its query: the model, its
    Setup (None: not yet) and the turns. As JSON: to Python, true and 1 are equal."""

    model: str
    setup: Optional[str] = None
    turns: List[str] = []


def conversation(ask: Ask, turns: List[Json], version: Version) -> Conversation:
    """The conversation of `ask` with these turns. Raises RecursionError for JSON that
    is nested too deeply."""
    lines = [turn_line(turn, place, version) for place, turn in enumerate(turns)]
    return Conversation(ask.model, json.dumps(ask.setup), list(map(json.dumps, lines)))


def mcp_line(line: Json, setup: str) -> Optional[Json]:
    """What an MCP server with the tools of a Setup, as JSON, answers to a
    control_request. None to `tools/call`: that is the client's part, and this process
    ends with the answer."""
    message = line["request"].get("message") or {}
    method, params = message.get("method"), message.get("params") or {}
    if method == "tools/call":
        return None
    result = {"tools": json.loads(setup)[1]} if method == "tools/list" else {}
    if method == "initialize":
        result.update(protocolVersion=params.get("protocolVersion"))
        result.update(serverInfo={"name": SERVER, "version": __version__})
        result.update(capabilities={"tools": {}})
    inner = {"jsonrpc": "2.0", "id": message.get("id", 0), "result": result}
    response = {"subtype": "success", "request_id": line["request_id"]}
    response["response"] = {"mcp_response": inner}
    return {"type": "control_response", "response": response}


def parse_lines(lines: Iterable[bytes]) -> Iterator[Json]:
    """The lines that are JSON objects. The CLI also prints noise."""
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
            if type(value) is dict:
                yield value


# ── Installation ───────────────────────────────────────────────────────────────────
# Which CLI there is, and whether it is logged in.

# Where its installers put it; launchd's and systemd's PATH are short.
PLACES = """
~/.local/bin ~/.claude/local ~/.claude/bin /opt/homebrew/bin /usr/local/bin /usr/bin
/home/linuxbrew/.linuxbrew/bin ~/.npm-global/bin ~/.npm/bin ~/.bun/bin ~/.volta/bin
~/.local/share/pnpm ~/Library/pnpm ~/.yarn/bin ~/n/bin ~/.asdf/shims
~/.local/share/mise/shims ~/.nix-profile/bin ~/.nvm/versions/node/*/bin
~/.fnm/node-versions/*/installation/bin
~/.local/share/fnm/node-versions/*/installation/bin
""".split()
NO_CLI = "Claude Code was not found. Install it (`npm install -g @anthropic-ai/claude-"
NO_CLI += "code`), or give its path with --claude."


class Program(NamedTuple):
    """The CLI as installed; `stamp` changes when it is replaced."""

    path: str
    version: Version
    stamp: Tuple[int, ...]


def dotted(version: Version) -> str:
    return ".".join(map(str, version))


def find_claude(chosen: str) -> str:
    """The CLI's path. Raises APIError 503 that says what to do."""
    if chosen:
        path = os.path.expanduser(chosen)
        program = shutil.which(path)
        if program:
            return os.path.abspath(program)
        problem = "needs chmod +x" if os.path.isfile(path) else "is no file"
        raise APIError(503, f"The program given with --claude {problem}.", "no_cli")
    places = [os.path.expanduser(place) + "/claude" for place in PLACES]
    found = [path for place in places for path in newest_first(glob.glob(place))]
    for path in [shutil.which("claude"), *found]:
        if path and os.access(path, os.X_OK):
            return os.path.abspath(path)  # the CLI runs in another directory
    raise APIError(503, NO_CLI, "no_cli")


def newest_first(paths: List[str]) -> List[str]:
    """By the versions of node in them."""
    return sorted(paths, key=lambda p: [int(d) for d in re.findall(r"\d+", p)])[::-1]


def stamp_of(path: str) -> Tuple[int, ...]:
    with contextlib.suppress(OSError):
        stat = os.stat(path)
        return stat.st_ino, stat.st_mtime_ns, stat.st_size
    return ()


def probe(path: str) -> Program:
    """Run `claude --version`. Raises APIError 503 if the CLI can't be used."""
    stamp = stamp_of(path)
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", run_briefly(path, "--version").stdout)
    if not found:
        raise APIError(503, "The `claude` here does not tell its --version.", "no_cli")
    version = tuple(map(int, found.groups()))
    if version < OLDEST_CLI:
        message = f"Claude Code {dotted(version)} is too old; {dotted(OLDEST_CLI)} is "
        raise APIError(503, message + "needed: `claude update`.", "cli_too_old")
    return Program(path, version, stamp)


def run_briefly(*argv: str) -> subprocess.CompletedProcess:
    """A short command of the CLI; one that can't run or hangs has exit code 1."""
    try:
        return subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", env=environment(argv[0]), timeout=PROBE_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return subprocess.CompletedProcess(argv, 1, "", "")


class Installation:
    """The CLI that is installed, and its login.

    `probing` guards the fields for writers. It is held while the CLI is asked, and no
    other lock is taken under it, so it can't deadlock. Readers of one field need no
    lock.
    """

    def __init__(self, chosen: str = ""):
        self.chosen = chosen
        self.probing = threading.Lock()
        self.found: Optional[Program] = None
        self.login: Optional[bool] = None  # None: not known
        self.look_at = 0.0  # when to look again for a login

    def current(self) -> Optional[Program]:
        """The CLI as it was probed, if it was and has not been replaced."""
        found = self.found
        return found if found and found.stamp == stamp_of(found.path) else None

    def program(self) -> Program:
        """The installed CLI, probed again if it was replaced. Raises APIError 503."""
        found = self.current()
        if not found:
            with self.probing:
                found = self.found = self.current() or probe(find_claude(self.chosen))
        return found

    def look(self) -> Tuple[Optional[Program], str]:
        """-> (the CLI, if it can be used; what is wrong with it or its login). A login
        that is there is believed; one that is not is looked for again."""
        try:
            program = self.program()
        except APIError as error:
            return None, str(error)
        with self.probing:
            if not self.login and time.monotonic() > self.look_at:
                status = run_briefly(program.path, "auth", "status")
                self.login = status.returncode == 0
                self.look_at = time.monotonic() + LOGIN_SECONDS
            return program, "" if self.login else LOGIN_CURE

    def note_login(self, works: bool) -> None:
        """What the API says of the login. (`claude auth status` only knows that there
        is one.)"""
        with self.probing:
            self.login, self.look_at = works, time.monotonic() + REFUSED_SECONDS


# ── Process ────────────────────────────────────────────────────────────────────────
# One running CLI, and what a request waits for: its output, and the client leaving.


Selector = selectors.BaseSelector


class Claude:
    """One CLI process. No method blocks: the owner reads and writes when the pipes are
    ready. The owner is Keeper, then the thread of a request, then Keeper again, which
    reaps the process.

    `todo` holds the lines that are not sent yet. `waiting` is set while the result of
    an earlier turn is missing. `conversation` is what it was sent, counting `todo`.
    `home` is a directory that holds CWD. The CLI gets a directory for its temporary
    files there, which is removed with the process.
    """

    def __init__(self, program: Program, model: str, home: str):
        self.program = program
        self.conversation = Conversation(model)
        self.todo: collections.deque = collections.deque()  # (line, whether to wait)
        self.outbox = bytearray()
        self.inbox = bytearray()  # a line without its end
        self.waiting = False
        self.ended = False  # its output
        self.alive_at = self.born = time.monotonic()  # the last sign of life
        self.stopped = 0.0  # when it was sent a signal
        self.scratch = tempfile.mkdtemp(dir=home)
        self.stderr = os.path.join(self.scratch, "stderr")  # a file need not be read
        with open(self.stderr, "wb") as stderr:
            self.process = subprocess.Popen(
                [program.path, *ARGV, "--model", model],
                bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                cwd=os.path.join(home, CWD),
                env={**environment(program.path), "CLAUDE_CODE_TMPDIR": self.scratch},
                start_new_session=True,  # a process group of its own, to end it whole
            )  # fmt: skip
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        for pipe in (self.stdin, self.stdout):
            os.set_blocking(pipe.fileno(), False)

    def fits(self, wanted: Conversation) -> bool:
        """Whether all that it has been sent is the beginning of `wanted`. The model may
        differ up to the first turn: later the change shows in the conversation."""
        model, setup, turns = self.conversation
        late = not turns and self.program.version >= LATE_MODEL_CLI
        same = (late or model == wanted.model) and turns == wanted.turns[: len(turns)]
        return same and setup in (None, wanted.setup)

    def readiness(self) -> Tuple[int, bool, float]:
        """A sort key: the longest conversation, then the oldest process."""
        _, setup, turns = self.conversation
        return len(turns), setup is not None, -self.born

    def tell(self, wanted: Conversation, query: Iterable[str] = ()) -> None:
        """Send what is missing of `wanted`, which it fits, then `query`."""
        has, before = self.conversation, []
        if has.model != wanted.model:
            before.append(settings_line(model=wanted.model))
        if has.setup is None and wanted.setup:
            before.append(initialize_line(Setup(*json.loads(wanted.setup))))
        turns = wanted.turns[len(has.turns) :]
        self.todo.extend((json.dumps(line), False) for line in before)
        self.todo.extend((turn, turn.startswith('{"type": "user"')) for turn in turns)
        self.todo.extend((line, False) for line in query)
        self.conversation, self.alive_at = wanted, time.monotonic()
        self.advance()

    def advance(self) -> None:
        """Send the lines of `todo` up to one whose result must be awaited."""
        while self.todo and not self.waiting:
            line, self.waiting = self.todo.popleft()
            self.outbox += line.encode() + b"\n"
        self.write()

    def write(self) -> None:
        """Write what the pipe takes. If the CLI is gone, its stdout shows it."""
        count: Optional[int] = 1
        try:
            while self.outbox and count:
                count = self.stdin.write(self.outbox)  # None: there is no room yet
                del self.outbox[: count or 0]
        except BrokenPipeError:
            self.outbox.clear()

    def read(self) -> List[Json]:
        """The lines that have come, less those for settle(). Raises APIError 502."""
        data = self.stdout.read(1 << 16)  # None: there is nothing yet
        self.ended = data == b""
        self.inbox += data or b""
        if b"\n" not in (data or b""):
            if len(self.inbox) > MAX_LINE:
                raise APIError(502, "The Claude CLI printed a line without an end.")
            return []
        *lines, self.inbox = self.inbox.split(b"\n")
        try:
            return [line for line in parse_lines(lines) if not self.settle(line)]
        except STRANGE:
            raise strange_line() from None

    def settle(self, line: Json) -> bool:
        """Do what a line asks of us; False if it belongs to the answer."""
        kind = line.get("type")
        if kind == "stream_event":
            self.alive_at = time.monotonic()
        elif kind == "control_request":
            reply = mcp_line(line, self.conversation.setup)
            self.outbox += json.dumps(reply).encode() + b"\n" if reply else b""
            self.write()
            return True
        elif kind == "result" and self.waiting and not line.get("is_error"):
            self.waiting, self.alive_at = False, time.monotonic()
            self.advance()
            return True
        return False

    def stop(self, how: int = signal.SIGTERM) -> None:
        """Signal the whole group. After SIGTERM the CLI removes its session file;
        SIGKILL is for one that would make another request."""
        self.stopped = self.stopped or time.monotonic()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, how)

    def is_gone(self) -> bool:
        """Whether it has ended and is cleaned up. It is killed if it takes too long."""
        if self.process.poll() is None:
            if time.monotonic() - self.stopped > TERM_SECONDS:
                self.stop(signal.SIGKILL)
            return False
        self.stop(signal.SIGKILL)  # what it may have left in its group
        self.stdin.close()
        self.stdout.close()
        self.remove_session_files()
        shutil.rmtree(self.scratch, ignore_errors=True)
        return True

    def remove_session_files(self) -> None:
        """The CLI leaves them if it was killed, or was not up yet (2.1.330)."""
        home = os.environ.get("CLAUDE_CONFIG_DIR") or os.path.expanduser("~/.claude")
        sessions = os.path.join(home, "sessions")
        with contextlib.suppress(OSError):
            for name in os.listdir(sessions):  # glob() would cache a pattern for each
                if name.startswith(f"{self.process.pid}."):
                    os.unlink(os.path.join(sessions, name))


class TimedReader(io.RawIOBase):
    """The client's socket. Reading has a deadline for a whole request, so that a byte
    now and then does not hold a thread for ever. `poke` writes something meaningless to
    the client, or raises OSError."""

    def __init__(self, connection: socket.socket, poke: Any):
        self.connection, self.poke = connection, poke
        self.ended = False  # the client will send no more
        self.poke_at = 0.0  # when listens() pokes again
        self.deadline: Optional[float] = None  # None: between requests
        self.ahead = bytearray()  # came while the last request was being answered

    def readable(self) -> bool:
        return True

    def has_left(self) -> bool:
        """Whether the client is gone. What it sends meanwhile is kept."""
        if self.is_full():
            return False  # the end can't be seen behind so much
        if not self.ended:
            self.connection.setblocking(False)  # who reads or writes sets a time-out
            try:
                data = self.connection.recv(MAX_AHEAD)
            except BlockingIOError:
                return False
            except OSError:
                return True
            self.ahead += data
            self.ended = not data
        return self.ended and not self.listens()

    def listens(self) -> bool:
        """Whether a client that sends no more still waits for its answer (RFC 9112,
        9.6). A closed socket answers a write with a reset, and fails the next one."""
        if time.monotonic() < self.poke_at:
            return True
        try:
            self.poke()
            time.sleep(0.02)
            self.poke()
        except OSError:
            return False
        self.poke_at = time.monotonic() + TICK_SECONDS
        return True

    def is_full(self) -> bool:
        return len(self.ahead) >= MAX_AHEAD

    def readinto(self, buffer: Any) -> int:
        if self.ahead:
            count = min(len(buffer), len(self.ahead))
            buffer[:count] = self.ahead[:count]
            del self.ahead[:count]
            return count
        now = time.monotonic()
        left = IDLE_SECONDS if self.deadline is None else self.deadline - now
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        count = self.connection.recv_into(buffer)
        if self.deadline is None:
            self.deadline = time.monotonic() + REQUEST_SECONDS
        return count


def listen(
    claudes: List[Claude], client: TimedReader, patience: float
) -> Iterator[Optional[Tuple[Claude, Json]]]:
    """Yield (process, line) for what the CLIs print, and None when there is no more for
    now, at least every TICK_SECONDS, until all have been stopped.

    One selector waits for the pipes and for the client, so that no thread is needed to
    notice that it left. Raises Disconnected; APIError 502 if a CLI ends, 504 after
    `patience` seconds without a sign of life.
    """
    with selectors.DefaultSelector() as selector:
        selector.register(client.connection, selectors.EVENT_READ, client)
        for claude in claudes:
            selector.register(claude.stdout, selectors.EVENT_READ, claude)
        while claudes:
            for claude in claudes:
                watch_stdin(selector, claude)
            for key, _ in selector.select(TICK_SECONDS):
                claude, lines = key.data, handle_ready(selector, key)
                # What comes behind the answer is nobody's.
                yield from ((claude, line) for line in lines if not claude.stopped)
            if client.ended and client.has_left():
                raise Disconnected
            claudes = [c for c in claudes if still_runs(selector, c, patience)]
            yield None


def still_runs(selector: Selector, claude: Claude, patience: float) -> bool:
    """Whether its answer is to come; see listen()."""
    if claude.stopped:
        unwatch(selector, claude)
    elif claude.ended:
        raise APIError(502, "The Claude CLI ended before its answer did.", "cli_died")
    elif time.monotonic() - claude.alive_at > patience:
        raise APIError(504, f"Claude was silent for {patience:g} seconds.", "timeout")
    return not claude.stopped


def handle_ready(selector: Selector, key: Any) -> List[Json]:
    """Read or write what is ready -> the lines that came. (A client that is ready has
    left, or sends its next request already.)"""
    claude = key.data
    if isinstance(claude, TimedReader):
        if claude.has_left():
            raise Disconnected
        if claude.is_full() or claude.ended:
            selector.unregister(key.fileobj)
    elif key.fileobj is claude.stdout:
        return claude.read()
    else:
        claude.write()
    return []


def watch_stdin(selector: Selector, claude: Claude) -> None:
    """Wait for room in its stdin while there is something to write, and only then."""
    watched = claude.stdin in selector.get_map()
    if claude.outbox and not watched:
        selector.register(claude.stdin, selectors.EVENT_WRITE, claude)
    elif watched and not claude.outbox:
        selector.unregister(claude.stdin)


def unwatch(selector: Selector, claude: Claude) -> None:
    for pipe in (claude.stdin, claude.stdout):
        with contextlib.suppress(KeyError):
            selector.unregister(pipe)


# ── Spares ─────────────────────────────────────────────────────────────────────────
# Processes that are started before they are needed, and the end of every process.


class Keeper:
    """Starts the CLI's processes, keeps spare ones, and ends each one.

    A spare is usable if everything already sent to it is a prefix of what the request
    needs. The longest prefix wins; only the remainder is sent. So there are blank
    spares, initialized ones (system prompt and tools) and primed ones (also a
    conversation's turns). A process that has answered is never used again.

    When an answer begins, a spare is sent the conversation so far, and a new process
    takes the spare's place. When the answer is out, it is sent, too. If all spares have
    a conversation, the one used least gives way to a blank one as soon as its
    conversation pauses. Old spares are replaced one at a time. After REST_SECONDS
    without a request they are not replaced any more.

    The main thread does all this in tick() and feed(), because it has nothing else to
    do. `lock` guards every field that other threads use. Nothing is waited for under
    it, so it can't deadlock, and a signal handler may take it again. The main thread
    waits for `selector`, where the spares' pipes are. The thread that takes a spare
    unregisters it there, which epoll and kqueue allow during a wait.
    """

    def __init__(self, installation: Installation, most: int = 0):
        self.installation, self.most = installation, most
        self.lock = threading.RLock()
        self.live: Set[Claude] = set()  # answering
        self.dying: List[Claude] = []  # sent a signal, not reaped yet
        self.spares: List[Claude] = []  # the one used least recently first
        self.wishes: collections.deque = collections.deque(maxlen=8)  # see expect()
        self.filling = False  # whether to start spares
        self.setups: collections.deque = collections.deque(maxlen=8)  # asked for before
        self.model = "sonnet"  # of the last request
        self.asked_at = time.monotonic()
        self.home = ""  # see directory()
        self.selector = selectors.DefaultSelector()
        self.woken, self.waker = socket.socketpair()  # ends the main thread's wait
        self.woken.setblocking(False)
        self.waker.setblocking(False)
        self.selector.register(self.woken, selectors.EVENT_READ)

    def directory(self) -> str:
        """The CLIs' home (0700), made again if something removed it. Raises OSError."""
        with self.lock:
            if not os.path.isdir(self.home):
                self.home = tempfile.mkdtemp(prefix="claude-max-")
            os.makedirs(os.path.join(self.home, CWD), 0o700, exist_ok=True)
            return self.home

    def start(self, ask: Ask) -> Claude:
        """A process that has been sent all of `ask`. Raises APIError 503, and
        RecursionError for JSON that is nested too deeply."""
        program = self.installation.program()
        wanted = conversation(ask, ask.turns[:-1], program.version)
        query = [json.dumps(line) for line in query_lines(ask, program.version)]
        claude = self.take(wanted, program) or self.spawn(program, ask.model)
        with self.lock:
            self.live.add(claude)
            self.asked_at, self.model = time.monotonic(), ask.model
        claude.tell(wanted, query)
        return claude

    def take(self, wanted: Conversation, program: Program) -> Optional[Claude]:
        """The best usable spare, if any, which is the caller's from now on."""
        with self.lock:
            usable = [
                c for c in self.spares
                if c.program == program and c.process.poll() is None and c.fits(wanted)
            ]  # fmt: skip
            best = max(usable, key=Claude.readiness, default=None)
            return best and self.release(best)

    def spawn(self, program: Program, model: str) -> Claude:
        try:
            return Claude(program, model, self.directory())
        except OSError as error:
            problem = f"Claude Code can't be started: {error.strerror}."
            raise APIError(503, problem, "no_cli")

    def release(self, claude: Claude) -> Claude:
        """Take a spare away from the main thread. The caller holds the lock."""
        self.spares.remove(claude)
        unwatch(self.selector, claude)
        return claude

    def retire(self, claude: Claude) -> None:
        """End a process. tick() closes its pipes when it has ended: a CLI that lost its
        tools before would ask the model what to do."""
        if not claude.stopped:
            claude.stop()
        with self.lock:
            self.live.discard(claude)
            self.dying.append(claude)

    def expect(self, ask: Ask, turns: List[Json]) -> None:
        """Have tick() prepare a spare for a request like `ask` whose turns begin with
        `turns`. Without turns it is for another conversation: blank the first time,
        initialized when the same system prompt and tools come again."""
        if self.most:
            self.wishes.append((ask, turns))
            self.filling = True
        self.wake()

    def wake(self) -> None:
        """Have the main thread call tick() now."""
        with contextlib.suppress(OSError):
            self.waker.send(b"\0")

    def tick(self) -> None:
        """Reap processes that have ended; prepare and replace spares."""
        for claude in self.dying[:]:
            if claude.is_gone():
                with self.lock:
                    self.dying.remove(claude)
        program = self.installation.current()
        self.drop([c for c in self.spares if c.program != program])
        if not (program and self.most):
            self.wishes.clear()
        while self.wishes:
            with contextlib.suppress(APIError, RecursionError):
                self.prepare(*self.wishes.popleft(), program)
        self.replace_old()
        if program and self.filling:
            self.filling = False
            with contextlib.suppress(APIError):  # the next request reports it
                while len(self.spares) < self.most:
                    claude = self.spawn(program, self.model)
                    self.add(claude, claude.conversation)

    def prepare(self, ask: Ask, turns: List[Json], program: Program) -> None:
        wanted = conversation(ask, turns, program.version)
        if not turns and wanted.setup not in self.setups:
            self.setups.append(wanted.setup)
            wanted = Conversation(ask.model)
        claude = self.take(wanted, program)
        if not claude:
            self.drop(self.spares[: max(0, len(self.spares) - self.most + 1)])
            claude = self.spawn(program, ask.model)
        self.add(claude, wanted)

    def replace_old(self) -> None:
        """Drop a spare that is too old or, if no spare is blank, one whose conversation
        pauses; tick() starts another. One at a time: the newest must be up."""
        now, by_age = time.monotonic(), sorted(self.spares, key=lambda c: c.born)
        old = [c for c in by_age if c.born < now - SPARE_SECONDS]
        if all(c.conversation.setup for c in self.spares):
            old += [c for c in self.spares[:-1] if c.alive_at < now - PAUSE_SECONDS]
        if old and by_age[-1].born < now - STARTED_SECONDS:
            self.drop(old[:1])
            self.filling = now < self.asked_at + REST_SECONDS

    def add(self, claude: Claude, wanted: Conversation) -> None:
        """Make it a spare, and send it what is missing of `wanted`."""
        with self.lock:
            self.spares.append(claude)
            self.selector.register(claude.stdout, selectors.EVENT_READ, claude)
            claude.tell(wanted)
            watch_stdin(self.selector, claude)

    def feed(self, key: Any) -> None:
        """Something is ready: wake() was called, or a pipe of a spare has more. A spare
        that fails or ends is dropped."""
        with self.lock:
            if key.fileobj is self.woken:
                self.woken.recv(4096)
            if key.data in self.spares:  # else it was taken in this very moment
                try:
                    lines = handle_ready(self.selector, key)
                except APIError:
                    lines = [{"is_error": True}]
                watch_stdin(self.selector, key.data)
                if key.data.ended or any(line.get("is_error") for line in lines):
                    self.drop([key.data])

    def drop(self, claudes: Iterable[Claude]) -> None:
        """Retire those of `claudes` that are spares."""
        with self.lock:
            for claude in [c for c in claudes if c in self.spares]:
                self.retire(self.release(claude))

    def stop_all(self, how: int) -> None:
        with self.lock:
            for claude in [*self.live, *self.dying, *self.spares]:
                claude.stop(how)

    def close(self) -> None:
        for resource in (self.selector, self.woken, self.waker):
            resource.close()
        shutil.rmtree(self.home, ignore_errors=True)


# ── Response ───────────────────────────────────────────────────────────────────────
# CLI lines -> (Answer) deltas -> (Reply) chunks, or what they add up to. Pure: ids and
# times are passed in. A kind of line or event is skipped until it has a row in
# Answer.LINES or Answer.EVENTS.

# The Messages API's stop_reason -> OpenAI's finish_reason; all others are "stop".
FINISH_REASONS = {
    "max_tokens": "length", "model_context_window_exceeded": "length",
    "tool_use": "tool_calls", "refusal": "content_filter",
}  # fmt: skip
# After these stop reasons the CLI makes no further API request, unless the answer was
# empty. After any other it may, even during shutdown, so it is killed.
CALM_STOPS = ("end_turn", "stop_sequence")
CHANNELS = {"text": "content", "thinking": "reasoning_content"}  # by a block's type
DELTAS = {"text": "text", "thinking": "thinking", "input_json": "partial_json"}


class Delta(NamedTuple):
    """What is new of the answer `index`: a text of a channel (see Answer), or the
    finish_reason. A call begins with an empty text; else such a text adds nothing."""

    index: int
    channel: Any = None
    text: str = ""
    finish_reason: Optional[str] = None


Deltas = Optional[Iterator[Delta]]


class Answer:
    """One answer of the model: feed() takes a CLI line and returns deltas.

    `sent` holds what the client has got, in pieces, by channel: "content",
    "reasoning_content", or the index of a tool call. `finish_reason` is set when the
    answer is complete; `calm`: whether the CLI would make no further request.

    If the stream breaks, the CLI restarts the answer; `repeated` is then the part of
    each channel that is still to be skipped.
    """

    def __init__(self, ask: Ask, index: int = 0, now: float = 0.0):
        self.ask, self.index, self.now = ask, index, now
        self.model = ""
        self.usage: Dict[str, int] = {}
        self.finish_reason: Optional[str] = None
        self.calm = False
        self.sent: Dict[Any, List[str]] = collections.defaultdict(list)
        self.calls: List[Json] = []  # {id, name}
        self.blocks: List[Json] = []  # the finished ones, with their signatures
        self.category: Any = None  # of a failure to come
        self.failed_before = ""  # the text of a failure of the CLI's own
        self.rate_limit: Json = {}  # what the CLI says of the plan's limit
        self.repeated: Dict[Any, str] = {}
        self.held = ""  # text that may be the beginning of a stop string
        self.block: Json = {}  # the open content block
        self.pieces: List[str] = []  # of its text, or of its arguments
        self.channel: Any = None  # where they go
        self.call_count = 0  # since the answer was started or restarted

    def feed(self, line: Json) -> List[Delta]:
        """Raises APIError for a failure that the CLI reports, and 502 for a line of a
        known kind in a shape that is not known."""
        try:
            handler = self.LINES.get(line["type"])
            if not handler or self.finish_reason:
                return []
            deltas = list(handler(self, line) or ())
        except STRANGE:
            raise strange_line() from None
        if self.finish_reason:
            deltas.append(Delta(self.index, finish_reason=self.finish_reason))
        return deltas

    def on_event(self, line: Json) -> Deltas:
        event = line["event"]
        handler = self.EVENTS.get(event["type"])
        nested = line.get("parent_tool_use_id")
        return handler(self, event) if handler and not nested else None

    def on_message_start(self, event: Json) -> Deltas:
        first, message = not self.model, event["message"]
        self.model = string(message["model"])
        self.count(message["usage"])
        self.repeated = {key: self.text(key) for key in self.sent if self.text(key)}
        self.call_count, self.blocks = 0, []
        if first:
            yield Delta(self.index, "content")  # a sign of life

    def on_block_start(self, event: Json) -> Deltas:
        self.block = block = dict(event["content_block"])
        self.pieces, self.channel = [], CHANNELS.get(block["type"])
        if block["type"] == "tool_use":
            if block["name"] != STRUCTURED_OUTPUT:
                yield from self.on_call(block)
            elif all(known.get("name") != STRUCTURED_OUTPUT for known in self.blocks):
                self.channel = "content"  # that of a second call is no part of it

    def on_call(self, block: Json) -> Deltas:
        index = self.channel = self.call_count
        self.call_count += 1
        name = string(self.ask.names.get(block["name"], block["name"]))
        if index == len(self.calls):
            self.calls.append({"id": string(block["id"]), "name": name})
            yield Delta(self.index, index)
        elif self.calls[index]["name"] != name:  # repeated; the first id stands
            raise interrupted()

    def on_block_delta(self, event: Json) -> Deltas:
        delta = event["delta"]
        kind = delta["type"][: -len("_delta")]
        if kind == "signature":
            self.block["signature"] += delta["signature"]
        elif kind in DELTAS:
            text = string(delta[DELTAS[kind]])
            self.pieces.append(text)
            if self.block.get("name") not in self.ask.wrapped:
                yield from self.say(text)

    def on_block_stop(self, event: Json) -> Deltas:
        block, text = self.block, "".join(self.pieces)
        if block["type"] in CHANNELS:
            block[block["type"]] += text
        if block["type"] != "text" or block["text"].strip():
            self.blocks.append(block)  # the API refuses an empty text
        wrapped = block.get("name") in self.ask.wrapped
        if block["type"] == "tool_use" and (wrapped or not text):  # not said in pieces
            value = call_input(Field({"arguments": text})) if text else block["input"]
            if wrapped:  # not if it was cut, or the model did not do so
                value = value[WRAPPED] if value.keys() == {WRAPPED} else text or value
            if type(value) is not str:  # as a custom tool's is
                value = json.dumps(value, ensure_ascii=False)
            yield from self.say(value)

    def on_message_delta(self, event: Json) -> Deltas:
        self.count(event.get("usage") or {})
        if event["delta"].get("stop_reason"):
            yield from self.finish(event["delta"]["stop_reason"])

    def count(self, usage: Json) -> None:
        """The newest numbers stand: a message's end counts on from its start."""
        details = usage.get("output_tokens_details") or {}
        for key, value in {**usage, **details}.items():
            if type(value) is int:
                self.usage[key] = value

    def on_assistant(self, line: Json) -> Deltas:
        """A finished block once more; or the text of a failure; or, with a stop_reason
        of its own, an answer that was not streamed."""
        message = line["message"]
        self.category = line.get("error") or self.category
        if message.get("model") == "<synthetic>":  # a failure of the CLI's own
            texts = [block.get("text", "") for block in message["content"]]
            self.failed_before = "\n".join(texts)
        elif message.get("stop_reason") and not self.category:
            yield from self.on_message_start({"message": message})
            for block in message["content"]:
                yield from self.on_block_start({"content_block": block})
                if block["type"] in CHANNELS:
                    yield from self.say(block[block["type"]])
                yield from self.on_block_stop({})
            if not self.finish_reason:  # else it was cut at a stop string
                yield from self.finish(message["stop_reason"])

    def on_result(self, line: Json) -> Deltas:
        """The end of the turn. An answer would have been complete before."""
        status, reason = line.get("api_error_status"), line.get("terminal_reason")
        if not line.get("is_error"):
            if not self.failed_before:
                raise APIError(502, "Claude ended without an answer.")
            status = 400  # 2.1.112 refuses an image by itself so
        words = [reason, status, self.category]
        if self.category == "authentication_failed":  # also with a 403
            words = [self.category]
        text = str(line.get("result") or self.failed_before)
        wait = (self.rate_limit.get("resetsAt") or 0) - self.now
        raise failure(words, text, wait, self.now)

    def on_system(self, line: Json) -> Deltas:
        """The tools that the CLI took: it drops one in silence if it does not like the
        schema. Or a retry to come: it only helps against failures of the API's own."""
        if line.get("subtype") == "init":
            taken = line.get("tools") or []
            taken = [*taken, "Agent"] if "Task" in taken else taken  # one name for both
            for tool in self.ask.setup.tools:
                if tool["name"] not in taken:
                    name = self.ask.names.get(tool["name"], tool["name"])
                    message = f"Claude Code does not take the schema of '{name}'."
                    raise APIError(400, message, "invalid_schema", "tools")
        elif line.get("subtype") == "api_retry":
            status, category = line["error_status"] or 0, line.get("error")
            if 400 <= status < 500:
                text = f"The Claude API answered {status} ({category})."
                wait = line["retry_delay_ms"] / 1000
                raise failure([status, category], text, wait, self.now)

    def on_rate_limit(self, line: Json) -> None:
        self.rate_limit = dict(line["rate_limit_info"])

    EVENTS = {
        "message_start": on_message_start, "content_block_start": on_block_start,
        "content_block_delta": on_block_delta, "content_block_stop": on_block_stop,
        "message_delta": on_message_delta,
    }  # fmt: skip
    LINES = {
        "stream_event": on_event, "assistant": on_assistant, "result": on_result,
        "system": on_system, "rate_limit_event": on_rate_limit,
    }  # fmt: skip

    def say(self, text: str) -> Deltas:
        """The delta for what is new of a text of the open block."""
        channel = self.channel
        if channel is None or self.finish_reason:  # the answer was cut at a stop string
            return
        if channel in self.repeated:
            text = self.skip_repeated(channel, text)
        self.sent[channel].append(text)
        text = self.hold_back(text) if channel == "content" else text
        if text:
            yield Delta(self.index, channel, text)

    def skip_repeated(self, channel: Any, text: str) -> str:
        """What is new of a text of a restarted answer."""
        if channel == "reasoning_content":
            return ""  # a second train of thought; the first one stands
        before = self.repeated.pop(channel)
        if text.startswith(before):
            return text[len(before) :]
        if not before.startswith(text):
            raise interrupted()
        self.repeated[channel] = before[len(text) :]  # never "", see above
        return ""

    def hold_back(self, text: str) -> str:
        """Cut at a stop string; keep what may become one, and half an emoji."""
        half = "\ud800" <= text[-1:] <= "\udbff"
        if not (self.ask.stops or self.held or half):
            return text
        text = self.held + text
        found = [place for place in map(text.find, self.ask.stops) if place >= 0]
        if found:
            self.sent["content"] = [self.text("content")[: min(found) - len(text)]]
            self.held, self.finish_reason, self.calm = "", "stop", True
            return text[: min(found)]
        keep = max([open_end(text, stop) for stop in self.ask.stops] + [int(half)])
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self, reason: str) -> Deltas:
        """The message is complete: release what was held back."""
        missing = self.repeated.keys() - {"reasoning_content"}
        if missing or self.call_count < len(self.calls):
            raise interrupted()
        ours = reason == "tool_use" and not self.calls  # it was STRUCTURED_OUTPUT
        self.finish_reason = "stop" if ours else FINISH_REASONS.get(reason, "stop")
        self.calm = reason in CALM_STOPS and bool(self.text("content"))
        yield Delta(self.index, "content", self.held)

    def text(self, channel: Any) -> str:
        return "".join(self.sent.get(channel, ()))

    def message(self) -> Json:
        """The message of chat completions that the deltas add up to."""
        calls = [call_of(c, self.text(i)) for i, c in enumerate(self.calls)]
        content = self.text("content") or (None if calls else "")
        message = {"role": "assistant", "content": content, "refusal": None}
        if self.text("reasoning_content"):
            message["reasoning_content"] = self.text("reasoning_content")
        return {**message, "tool_calls": calls} if calls else message


def call_of(call: Json, arguments: str) -> Json:
    """An element of `tool_calls`."""
    function = {"name": call["name"], "arguments": arguments}
    return {"id": call["id"], "type": "function", "function": function}


def string(value: Any) -> str:
    if type(value) is not str:
        raise TypeError
    return value


def interrupted() -> APIError:
    message = "The connection broke, and Claude began another answer."
    return APIError(502, message, "stream_interrupted")


def open_end(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


class Reply:
    """A chat completion: its answers, and how they are written, streamed or not."""

    prefix = "chatcmpl-"

    def __init__(self, ask: Ask, id: str, created: int):
        self.ask, self.id, self.created = ask, self.prefix + id, created
        self.answers = [Answer(ask, index, created) for index in range(ask.n)]
        self.first: Optional[float] = None  # seconds until its first token
        self.texts: Memory = {}  # to be kept
        self.begun: Set[int] = set()  # answers that have sent a role

    @property
    def model(self) -> str:
        """The API's own name for it, as soon as it is known."""
        return self.answers[0].model or self.ask.requested

    @property
    def is_complete(self) -> bool:
        return all(answer.finish_reason for answer in self.answers)

    def usage(self, input: str = "prompt", output: str = "completion") -> Json:
        """The Messages API's usage of each answer as OpenAI's, summed. Its input_tokens
        leave out what was read from, or written to, the prompt cache."""
        sums: Dict[str, int] = collections.Counter()
        for answer in self.answers:
            sums.update(answer.usage)
        cached, made = sums["cache_read_input_tokens"], sums["output_tokens"]
        read = sums["input_tokens"] + sums["cache_creation_input_tokens"] + cached
        return {
            f"{input}_tokens": read, f"{output}_tokens": made,
            "total_tokens": read + made,
            f"{input}_tokens_details": {"cached_tokens": cached},
            f"{output}_tokens_details": {"reasoning_tokens": sums["thinking_tokens"]},
        }  # fmt: skip

    def chunk(self, choices: List[Json], usage: Optional[Json] = None) -> str:
        chunk = {"id": self.id, "object": "chat.completion.chunk"}
        chunk.update(created=self.created, model=self.model, choices=choices)
        if self.ask.include_usage:
            chunk["usage"] = usage
        return f"data: {json.dumps(chunk)}\n\n"

    def event(self, delta: Delta) -> str:
        """A delta as server-sent events; "" if it adds nothing."""
        index, channel, text, reason = delta
        fields = {} if index in self.begun else {"role": "assistant", "content": ""}
        self.begun.add(index)
        if type(channel) is int:
            call = {"index": channel, "function": {"arguments": text}}
            if not text:
                call.update(call_of(self.answers[index].calls[channel], ""))
            fields["tool_calls"] = [call]
        elif text:
            fields[channel] = text
        choice = {"index": index, "delta": fields, "finish_reason": reason}
        return self.chunk([choice]) if fields or reason else ""

    def alive(self) -> str:
        """An event that changes nothing."""
        choice = {"index": 0, "delta": {"content": ""}, "finish_reason": None}
        return self.event(Delta(0)) or self.chunk([choice])

    def end(self) -> str:
        usage = self.chunk([], self.usage()) if self.ask.include_usage else ""
        return usage + "data: [DONE]\n\n"

    def fail(self, error: APIError) -> str:
        """The end of a stream that has begun."""
        return f"data: {json.dumps({'error': error.error})}\n\n"

    def completion(self) -> Json:
        """What the deltas add up to."""
        keys = "index", "message", "logprobs", "finish_reason"
        rows = [(a.index, a.message(), None, a.finish_reason) for a in self.answers]
        choices = [dict(zip(keys, row)) for row in rows]
        head = {"id": self.id, "object": "chat.completion", "created": self.created}
        return {**head, "model": self.model, "choices": choices, "usage": self.usage()}

    def add_to(self, script: Transcript) -> None:
        """Add the answer as a client sends it back."""
        script.add_message(Field(self.answers[0].message()))

    def notes(self) -> Json:
        """What the log says of it."""
        notes: Json = {"model": printable(self.model)[:60]}
        if self.first is not None:
            notes["first"] = f"{self.first:.3f}"
        if self.is_complete:
            read, made, _, cached, _ = self.usage().values()
            notes.update({"in": read, "cached": cached["cached_tokens"], "out": made})
        return notes


REFUSAL = "Claude refused to answer this request."
# The type of an item -> its event of text, and the field that holds the text in it.
TEXT_EVENTS = {
    "message": ("output_text", "text"),
    "reasoning": ("reasoning_summary_text", "text"),
    "function_call": ("function_call_arguments", "arguments"),
    "custom_tool_call": ("custom_tool_call_input", "input"),
}
# Where the text is a part: the field of the parts, their event, index, and empty part.
TEXT_PART = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
THOUGHT_PART = {"type": "summary_text", "text": ""}
PART_EVENTS = {
    "message": ("content", "content_part", "content_index", TEXT_PART),
    "reasoning": ("summary", "reasoning_summary_part", "summary_index", THOUGHT_PART),
}


class ResponseReply(Reply):
    """A response of /v1/responses: one item after another, each with its events.

    `output` holds the items, `channel` that of the open one (see Answer), `pieces` its
    text so far, `events` what is to be sent.
    """

    prefix = "resp_"

    def __init__(self, ask: Ask, id: str, created: int):
        super().__init__(ask, id, created)
        self.output: List[Json] = []
        self.channel: Any = None
        self.pieces: List[str] = []
        self.events: List[str] = []
        self.sequence = 0
        self.failed: Optional[Json] = None  # {code, message}

    def emit(self, type: str, **fields: Any) -> None:
        event = {"type": type, "sequence_number": self.sequence, **fields}
        self.sequence += 1
        self.events.append(f"event: {type}\ndata: {json.dumps(event)}\n\n")

    def emit_inside(self, event: str, **fields: Any) -> None:
        """An event of the open item."""
        item, place = self.output[-1], {"output_index": len(self.output) - 1}
        if "item" not in fields:
            place["item_id"] = item["id"]
            if item["type"] in PART_EVENTS:
                place[PART_EVENTS[item["type"]][2]] = 0
        self.emit(f"response.{event}", **place, **fields)

    def flush(self) -> str:
        events, self.events = "".join(self.events), []
        return events

    def event(self, delta: Delta) -> str:
        _, channel, text, reason = delta
        begun = "" if self.sequence else self.alive()
        hidden = channel == "reasoning_content" and not self.ask.summary
        if (text or type(channel) is int) and not hidden:
            self.add(channel, text)
        if reason:
            self.close("incomplete" if reason == "length" else "completed")
        if reason == "content_filter":
            self.failed = {"code": "invalid_prompt", "message": REFUSAL}
        return begun + self.flush()

    def alive(self) -> str:
        if not self.sequence:
            self.emit("response.created", response=self.completion())
        self.emit("response.in_progress", response=self.completion())
        return self.flush()

    def add(self, channel: Any, text: str) -> None:
        if channel != self.channel:
            if type(channel) is int and text:  # closed: a restart had more before it
                raise interrupted()
            self.close("completed")
            self.open(channel)
        self.pieces.append(text)
        kind = self.output[-1]["type"]
        if text:
            extra = {"logprobs": []} if kind == "message" else {}
            self.emit_inside(TEXT_EVENTS[kind][0] + ".delta", delta=text, **extra)

    def open(self, channel: Any) -> None:
        """Begin an item."""
        self.channel, self.pieces = channel, []
        id = f"{self.id[len(self.prefix) :]}{len(self.output)}"
        if channel == "content":
            item = {"type": "message", "id": f"msg_{id}", "role": "assistant"}
            item.update(status="in_progress", content=[])
        elif channel == "reasoning_content":
            item = {"type": "reasoning", "id": f"rs_{id}", "summary": []}
        else:
            call_id, name = self.answers[0].calls[channel].values()
            item = {"type": "function_call", "id": f"fc_{id}", "call_id": call_id}
            item.update(self.ask.origins.get(name, {"name": name}))
            item.update({TEXT_EVENTS[item["type"]][1]: "", "status": "in_progress"})
        self.output.append(item)
        self.emit_inside("output_item.added", item=item)
        if item["type"] in PART_EVENTS:
            _, event, _, part = PART_EVENTS[item["type"]]
            self.emit_inside(event + ".added", part=part)

    def close(self, status: str) -> None:
        """End the open item, if any."""
        if self.channel is None:
            return
        item, text, self.channel = self.output[-1], "".join(self.pieces), None
        event, field = TEXT_EVENTS[item["type"]]
        name = {"name": item["name"]} if "name" in item else {}
        self.emit_inside(event + ".done", **{field: text}, **name)
        if item["type"] in PART_EVENTS:
            parts, event, _, part = PART_EVENTS[item["type"]]
            item[parts] = [{**part, "text": text}]
            self.emit_inside(event + ".done", part=item[parts][0])
        else:
            item[field] = text
        item.update({"status": status} if "status" in item else {})
        self.texts.update({item["id"]: text} if item["type"] == "message" else {})
        self.emit_inside("output_item.done", item=item)

    def end(self) -> str:
        if self.failed:
            return self.fail(APIError(400, REFUSAL, "invalid_prompt"))
        response = self.completion()
        self.emit(f"response.{response['status']}", response=response)
        return self.flush()

    def fail(self, error: APIError) -> str:
        code = "invalid_prompt" if error.status == 400 else "server_error"
        code = error.error["code"] or code
        self.failed = {"code": code, "message": error.error["message"]}
        self.emit("error", error=error.error)
        self.emit("response.failed", response=self.completion())
        return self.flush()

    def add_to(self, script: Transcript) -> None:
        for item in self.output:
            add_item(script, Field(item), {})

    def completion(self) -> Json:
        """The response as it is now."""
        reason = self.answers[0].finish_reason
        cut = {"reason": "max_output_tokens"} if reason == "length" else None
        ended = "incomplete" if cut else "completed" if reason else "in_progress"
        status = "failed" if self.failed else ended
        response = {"id": self.id, "object": "response", "created_at": self.created}
        response.update(status=status, model=self.model, error=self.failed)
        response.update(incomplete_details=cut, output=self.output)
        response.update(usage=self.usage("input", "output") if reason else None)
        return {**response, **self.ask.echo, "store": False}


# ── One answer ─────────────────────────────────────────────────────────────────────
# From an Ask to deltas: a place in the queue, a process for each answer, and what is
# learnt from the response.


class Gate:
    """At most `width` CLI processes at once; requests wait for a place in order.

    `changed` guards `active` and `queue`. No other lock is taken under it, so it can't
    deadlock.
    """

    def __init__(self, width: int):
        self.width = width
        self.active = 0
        self.queue: collections.deque = collections.deque()
        self.changed = threading.Condition()

    def enter(self, places: int, client: TimedReader) -> Iterator[None]:
        """Yield None while waiting. Raises APIError 400, 429, Disconnected."""
        if places > self.width:
            raise APIError(400, f"'n' exceeds this server's {self.width}.", None, "n")
        ticket = object()

        def is_next() -> bool:
            return self.queue[0] is ticket and self.active + places <= self.width

        with self.changed:
            if len(self.queue) >= MAX_WAITING:
                wait = {"Retry-After": "5"}
                raise APIError(429, "Too many requests wait.", "queue_full", None, wait)
            self.queue.append(ticket)
        try:
            while True:
                with self.changed:
                    if self.changed.wait_for(is_next, TICK_SECONDS):
                        self.active += places
                        return
                yield None
                if client.has_left():
                    raise Disconnected
        finally:
            with self.changed:
                self.queue.remove(ticket)
                self.changed.notify_all()

    def leave(self, places: int) -> None:
        with self.changed:
            self.active -= places
            self.changed.notify_all()


STOPPING = "The server is stopping."


class Backend:
    """What all requests share: the gate, the processes, and what past answers taught.

    Each use of `memory` and `rate_limit` is one operation, which needs no lock.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.gate = Gate(settings.max_concurrency)
        self.installation = Installation(settings.claude)
        self.keeper = Keeper(self.installation, settings.spares)
        self.memory: Memory = {}
        self.rate_limit: Optional[Json] = None
        self.started = time.monotonic()
        self.stopping = False

    def deltas(self, reply: Reply, client: TimedReader) -> Iterator[Optional[Delta]]:
        """The deltas of one response, until its processes have ended. None means that
        there is no more for now. Raises APIError, Disconnected."""
        ask, begun, expecting = reply.ask, time.monotonic(), False
        yield from self.gate.enter(ask.n, client)
        answers: Dict[Claude, Answer] = {}
        try:
            self.refuse_when_stopping()
            for answer in reply.answers:
                answers[self.keeper.start(ask)] = answer
            with contextlib.closing(
                listen(list(answers), client, self.settings.timeout)
            ) as lines:
                for found in lines:
                    if found is None:
                        yield None
                        continue
                    claude, line = found
                    answer = answers[claude]
                    deltas = answer.feed(line)
                    if answer.finish_reason:
                        claude.stop(signal.SIGTERM if answer.calm else signal.SIGKILL)
                    if deltas and not expecting:
                        expecting = True
                        self.keeper.expect(ask, ask.turns if ask.goes_on else [])
                    if reply.first is None and (answer.pieces or answer.sent):
                        reply.first = time.monotonic() - begun
                    yield from deltas
            if not reply.is_complete:
                raise APIError(503, STOPPING, "stopping")
            self.learn(reply)
        except APIError as error:
            self.note_failure(error, answers)
            raise
        finally:
            for claude, answer in answers.items():
                self.keeper.retire(claude)
                self.note_limit(answer.rate_limit)
            self.gate.leave(ask.n)

    def refuse_when_stopping(self) -> None:
        if self.stopping:
            raise APIError(503, STOPPING, "stopping")

    def learn(self, reply: Reply) -> None:
        """The response is complete: the login works, and a tool loop needs the signed
        thinking again."""
        self.installation.note_login(True)
        for answer in reply.answers:
            if answer.calls and any("thinking" in b["type"] for b in answer.blocks):
                thought = Thought(reply.ask.model, answer.model, answer.blocks)
                self.memory[answer.calls[0]["id"]] = thought
        self.memory.update(reply.texts)
        while len(self.memory) > MAX_MEMORY:
            self.memory.pop(next(iter(list(self.memory))), None)

    def note_failure(self, error: APIError, claudes: Iterable[Claude]) -> None:
        self.refuse_when_stopping()
        if error.status == 401:
            self.installation.note_login(False)
            self.keeper.drop(self.keeper.spares)  # they know the old login
        for claude in claudes if self.settings.verbose else ():
            with contextlib.suppress(OSError), open(claude.stderr, "rb") as file:
                file.seek(max(0, os.path.getsize(claude.stderr) - 2000))
                log("claude: " + file.read().decode("utf-8", "replace"))

    def note_limit(self, info: Json) -> None:
        """Keep what the CLI says of the plan's limit, for /health. Log it if it is new
        and not plainly "allowed"."""
        before = (self.rate_limit or {}).get("status")
        if info and info.get("status") not in ("allowed", before):
            log("limit " + " ".join(f"{key}={value}" for key, value in info.items()))
        self.rate_limit = info or self.rate_limit

    def expect_next_turn(self, reply: Reply) -> None:
        """The response is out: have a spare ready for the turn that follows it."""
        ask, script = reply.ask, Transcript()
        if reply.is_complete and ask.goes_on:
            with contextlib.suppress(APIError):  # two calls of one id
                reply.add_to(script)
                script.recall(self.memory, ask.model, ask.wrapped)
                # The script put BEGIN before the answer, if that said anything.
                self.keeper.expect(ask, ask.turns + script.turns[1:])

    def health(self) -> Tuple[int, Json]:
        """-> (status, body) of /health."""
        program, problem = self.installation.look()
        path, version, _ = program or (None, (), ())
        login = self.installation.login if program else None
        claude = {"path": path, "version": dotted(version) or None, "logged_in": login}
        body = {"status": "error" if problem else "ok", "version": __version__}
        body.update({"message": problem} if problem else {}, claude=claude)
        body.update(active=self.gate.active, waiting=len(self.gate.queue))
        body.update(spares=len(self.keeper.spares), rate_limit=self.rate_limit)
        body.update(uptime=round(time.monotonic() - self.started))
        return (503 if problem else 200), body


# ── HTTP ───────────────────────────────────────────────────────────────────────────
# To add an endpoint, add a method to Handler and a row to Handler.ROUTES. All access
# checks are in Handler.guard(), in order.


class Server(http.server.ThreadingHTTPServer):
    """Accepts connections, each with a Handler in a thread of its own, and stops."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def __init__(self, settings: Settings):
        self.settings = settings
        if ":" in settings.host:
            self.address_family = socket.AF_INET6
        super().__init__((settings.host, settings.port), Handler)
        self.socket.setblocking(False)  # BSD: a client may leave before accept()
        self.backend = Backend(settings)
        self.origins = set(re.findall(r"[^\s,]+", settings.allow_origin))
        self.busy: Set[Handler] = set()  # whose request is not answered yet

    def server_bind(self) -> None:
        """Without HTTPServer's getfqdn(), which can wait for a name server."""
        super(http.server.HTTPServer, self).server_bind()
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: Handler.serve() logs bugs, and the rest are lost clients."""

    def run(self) -> None:
        """The main thread's part: accept, feed the spares, reap; until stopping."""
        keeper = self.backend.keeper
        keeper.selector.register(self.socket, selectors.EVENT_READ)
        while not self.backend.stopping:
            keeper.tick()
            for key, _ in keeper.selector.select(TICK_SECONDS):
                if key.fileobj is self.socket:
                    self.accept()
                else:
                    keeper.feed(key)

    def accept(self) -> None:
        try:
            connection, address = self.get_request()
        except OSError:  # it was gone again; or no descriptor is left
            return time.sleep(0.01)
        try:
            self.process_request(connection, address)
        except RuntimeError:  # no thread is left
            self.shutdown_request(connection)

    def drain(self) -> None:
        """Give running answers a moment, then end every process. A client that does
        not read is waited for no longer."""
        self.server_close()
        keeper = self.backend.keeper
        keeper.most = 0
        keeper.drop(keeper.spares)
        for how in (None, signal.SIGTERM, signal.SIGKILL):
            if how:
                keeper.stop_all(how)
            end = time.monotonic() + (TERM_SECONDS if how else DRAIN_SECONDS)
            while (self.busy or keeper.dying) and time.monotonic() < end:
                keeper.tick()
                time.sleep(0.002)
        keeper.close()


GO_ON = b"HTTP/1.1 100 Continue\r\n\r\n"


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection. serve() is the way of each request; it is logged there, once."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a token must not wait for the next one
    server: Server

    def setup(self) -> None:
        super().setup()
        self.backend = self.server.backend
        self.reader = TimedReader(self.connection, self.poke)
        self.rfile = io.BufferedReader(self.reader)

    def handle_one_request(self) -> None:
        self.reader.deadline = None
        self.reply: Optional[Reply] = None
        self.headers = None  # of the request before
        self.status = 0  # until the status line is out
        self.body_unread = False
        try:
            super().handle_one_request()
        except OSError:  # gone, or too slow: there is nobody to tell
            self.close_connection = True

    def parse_request(self) -> bool:
        """http.server's, and what it leaves out of RFC 9112."""
        if self.raw_requestline in (b"\r\n", b"\n"):
            self.close_connection = False  # an empty line is skipped (2.2)
            return False
        if not super().parse_request():
            return False
        words = re.split(r"[\s,]+", self.headers.get("Connection", "").lower())
        if "close" in words or self.request_version == "HTTP/1.0":
            self.close_connection = True  # keep-alive is not offered to the old version
        absolute = re.match("(?i)https?://([^/?]*)(.*)", self.path)
        if absolute and len(self.headers.get_all("Host", ())) == 1:  # it counts (3.2.2)
            self.headers.replace_header("Host", absolute[1])
        self.path = absolute[2] if absolute else self.path
        sizes = self.headers.get_all("Content-Length", ["0"])
        has_body = sizes != ["0"] or "Transfer-Encoding" in self.headers
        self.body_unread = has_body or self.is_malformed()
        return True

    def is_malformed(self) -> bool:
        """Whether a header is folded or broken: who knows where the body begins."""
        folded = any(re.search(r"[\r\n]", text) for text in self.headers.values())
        return folded or bool(self.headers.defects)

    def serve(self) -> None:
        """Any method of any path."""
        begun = time.monotonic()
        self.server.busy.add(self)
        try:
            self.guard()
            self.route()
        except APIError as error:
            self.fail(error)
        except RecursionError:
            self.fail(APIError(400, "The JSON is nested too deeply."))
        except (Disconnected, OSError):
            self.status = 499  # nginx's word for a client that left
            self.close_connection = True
        except Exception as error:  # a bug of ours must not look like a hang-up
            line = traceback.extract_tb(error.__traceback__)[-1].lineno
            log(f"internal error: {type(error).__name__}, line {line}")  # no text
            self.fail(APIError(500, "Internal error of the proxy."))
        self.server.busy.discard(self)
        self.log_answer(time.monotonic() - begun)
        self.skip_body()

    do_GET = do_HEAD = do_POST = do_OPTIONS = serve  # others: see send_error()

    def guard(self) -> None:
        """All access checks. Raises APIError 400, 401, 403, 503."""
        if self.is_malformed():
            raise APIError(400, "A header is malformed.")
        hosts = self.headers.get_all("Host") or []
        if len(hosts) > 1 or (not hosts and self.request_version != "HTTP/1.0"):
            raise APIError(400, "A request needs one Host header.")
        if hosts and not self.is_our_name(hosts[0]):
            raise forbidden("This server does not answer to this Host; see --host.")
        origin = self.headers.get("Origin")
        if origin is not None and not self.is_allowed_origin(origin):
            raise forbidden("This web origin is not allowed; see --allow-origin.")
        if origin is None and self.headers.get("Sec-Fetch-Site") == "cross-site":
            raise forbidden("Web pages of other sites are not allowed.")
        if self.server.settings.api_key and self.command != "OPTIONS":
            self.check_key(self.server.settings.api_key)
        self.backend.refuse_when_stopping()

    def check_key(self, key: str) -> None:
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = self.headers.get("X-Api-Key", "")
        given = given.strip().encode("latin-1", "replace")
        if not hmac.compare_digest(given, key.encode()):
            raise APIError(401, "Incorrect API key provided.", "invalid_api_key")

    def is_our_name(self, host: str) -> bool:
        """Against DNS rebinding, where a foreign name is made to mean our address. On
        all interfaces the key guards, which is required there."""
        name = re.sub(r":\d*$", "", host.strip().lower()).strip("[]")
        bound = self.server.settings.host.lower()
        return bound in ("0.0.0.0", "::") or is_loopback(name) or name == bound

    def is_allowed_origin(self, origin: str) -> bool:
        """This machine's pages, applications, and what --allow-origin names."""
        scheme, _, rest = origin.lower().partition("://")
        own = is_loopback(re.sub(r":\d*$", "", rest).strip("[]"))
        # app://…, vscode-webview://…; but not "null" and "file://"
        is_app = scheme not in ("http", "https") and bool(rest)
        return own or is_app or origin in self.server.origins

    def route(self) -> None:
        path = urllib.parse.unquote(self.path.split("?")[0]).rstrip("/")
        path = path[len("/v1") :] if path.startswith("/v1/") else path
        model = re.fullmatch("/models/(.+)", path)
        methods, handler = self.ROUTES.get("/models/" if model else path, ("", None))
        if not handler:
            message = f"There is no {self.path[:100]} here. Try /v1/chat/completions."
            raise APIError(404, message, "unknown_url")
        if "websocket" in self.headers.get("Upgrade", "").lower():
            headers = {"Upgrade": "HTTP/1.1"}  # Codex uses POST then
            raise APIError(426, "Use POST, not a WebSocket.", headers=headers)
        if self.command not in methods.split(", "):
            raise APIError(405, f"Use {methods} here.", headers={"Allow": methods})
        if self.command == "OPTIONS":
            return self.preflight()
        handler(self, *(model.groups() if model else ()))

    def preflight(self) -> None:
        """CORS (Fetch standard, 3.3): what a browser asks before the request."""
        asked = self.headers.get("Access-Control-Request-Headers", "*")
        headers = {"Access-Control-Allow-Methods": "GET, POST"}
        headers["Access-Control-Allow-Headers"] = re.sub(r"[^\w*, -]", "", asked)
        headers["Access-Control-Max-Age"] = "600"
        self.send_json(204, None, headers)

    def get_health(self) -> None:
        self.send_json(*self.backend.health())

    def get_models(self) -> None:
        self.send_json(200, {"object": "list", "data": [*map(model_of, KNOWN_MODELS)]})

    def get_model(self, model: str) -> None:
        cli_model(model)
        self.send_json(200, model_of(model))

    def post_chat(self) -> None:
        self.respond(Reply, parse_chat(self.read_json(), self.backend.memory))

    def post_response(self) -> None:
        memory = self.backend.memory
        self.respond(ResponseReply, parse_response(self.read_json(), memory))

    def respond(self, kind: Any, ask: Ask) -> None:
        """`kind`: Reply, or a subclass."""
        reply = self.reply = kind(ask, os.urandom(12).hex(), int(time.time()))
        try:
            with contextlib.closing(self.backend.deltas(reply, self.reader)) as deltas:
                if ask.stream:
                    return self.stream(deltas)
                for delta in filter(None, deltas):
                    reply.event(delta)
            self.send_json(200, reply.completion())
        finally:
            self.backend.expect_next_turn(reply)

    ROUTES = {  # the methods that are allowed, and what answers them
        "/health": ("GET, HEAD, OPTIONS", get_health),
        "/models": ("GET, HEAD, OPTIONS", get_models),
        "/models/": ("GET, HEAD, OPTIONS", get_model),
        "/chat/completions": ("POST, OPTIONS", post_chat),
        "/responses": ("POST, OPTIONS", post_response),
    }

    # Reading.

    def handle_expect_100(self) -> bool:
        """Leave "100 Continue" to read_body(): it comes after the access checks."""
        return True

    def read_json(self) -> Any:
        """The request body. Raises APIError 400, 413, 415."""
        browser = "Origin" in self.headers or "Sec-Fetch-Site" in self.headers
        if browser and self.headers.get_content_type() != "application/json":
            raise APIError(415, "Content-Type must be application/json.")
        raw = self.read_body()
        self.body_unread = False
        return parse_json(raw)

    def read_body(self) -> bytes:
        """By Content-Length or chunked (RFC 9112, 6 and 7.1), never both."""
        lengths = self.headers.get_all("Content-Length") or []
        codings = self.headers.get_all("Transfer-Encoding") or []
        chunked = [coding.strip().lower() for coding in codings] == ["chunked"]
        length = lengths[0].strip() if lengths else "0"
        if len(lengths) + len(codings) > 1 or bool(codings) is not chunked:
            raise APIError(400, "The length of the request body is ambiguous.")
        if not re.fullmatch(r"[0-9]{1,18}", length):
            raise APIError(400, "Content-Length must be a number.")
        if int(length) > MAX_BODY:
            raise too_large()
        expects = self.headers.get("Expect", "").strip().lower() == "100-continue"
        if expects and self.request_version != "HTTP/1.0":
            self.send(GO_ON)
        self.reader.deadline = time.monotonic() + REQUEST_SECONDS
        raw = self.read_chunked() if chunked else self.rfile.read(int(length))
        if len(raw) < int(length):
            raise Disconnected
        return raw

    def read_chunked(self) -> bytes:
        malformed = APIError(400, "The chunked request body is malformed.")
        body, count = bytearray(), -1
        while count:
            line = self.rfile.readline(1024)
            size = re.match(rb"([0-9a-fA-F]{1,8})[ \t]*(;.*)?\r?\n", line)
            if not size:
                raise malformed
            count = int(size[1], 16)
            if len(body) + count > MAX_BODY:
                raise too_large()
            body += self.rfile.read(count)
            if count and self.rfile.readline(2) not in (b"\r\n", b"\n"):
                raise malformed
        while self.rfile.readline(1 << 16) not in (b"\r\n", b"\n", b""):
            pass  # trailers
        return bytes(body)

    def skip_body(self) -> None:
        """A reset would take an early answer from the client: read what it still sends
        for a moment, then hang up."""
        if self.body_unread:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)
                self.reader.deadline = time.monotonic() + 2
                while "Expect" not in self.headers and self.rfile.read1(1 << 16):
                    pass

    # Writing.

    def send_json(self, status: int, body: Any, headers: Optional[Json] = None) -> None:
        data = b"" if body is None else json.dumps(body).encode() + b"\n"
        about = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        about = {} if body is None else about  # a 204 has no length (RFC 9110, 8.6)
        head = self.head(status, {**about, **(headers or {})})
        self.send(head + (b"" if self.command == "HEAD" else data))

    def head(self, status: int, headers: Json) -> bytes:
        """Status line and headers, to be sent in one piece with what follows."""
        self.status = status
        common = {"Date": self.date_time_string(), "Vary": "Origin"}
        origin = self.headers.get("Origin") if self.headers else None
        if origin is not None and self.is_allowed_origin(origin):
            common["Access-Control-Allow-Origin"] = origin
        if self.close_connection or self.body_unread:
            common["Connection"] = "close"
        lines = [f"{self.protocol_version} {status} {self.responses[status][0]}"]
        lines += [f"{name}: {text}" for name, text in {**common, **headers}.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")

    def send(self, data: bytes) -> None:
        self.connection.settimeout(WRITE_SECONDS)
        self.connection.sendall(data)

    def stream(self, deltas: Iterator[Optional[Delta]]) -> None:
        """Send events. The status line waits for the first one: a failure before it has
        a status of its own. In silence an event that changes nothing is sent. (A
        comment would not reset the watchdogs of some clients.)"""
        reply, spoke = self.reply, time.monotonic()
        try:
            for delta in deltas:
                silent = time.monotonic() > spoke + ALIVE_SECONDS
                text = reply.event(delta) if delta else reply.alive() if silent else ""
                if text:
                    self.event(text)
                    spoke = time.monotonic()
            text = reply.end()
        except APIError as error:
            if not self.status:
                raise
            self.status, text = error.status, reply.fail(error)
        self.event(text, b"0\r\n\r\n")

    def event(self, text: str, end: bytes = b"") -> None:
        """Send an event, the first one with the head; `end` is the last chunk."""
        head, data = b"", text.encode()
        chunked = self.request_version != "HTTP/1.0"
        if not self.status:
            headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
            headers.update({"Transfer-Encoding": "chunked"} if chunked else {})
            head = self.head(200, headers)
        if chunked:
            data = b"%x\r\n%b\r\n%b" % (len(data), data, end)
        self.send(head + data)

    def poke(self) -> None:
        """Write what means nothing: an interim response (RFC 9110, 15.2), or a comment
        in a stream. Raises OSError if nobody is there, or neither is allowed."""
        if self.status:
            self.event(":\n\n")
        elif self.request_version == "HTTP/1.0":
            raise OSError
        else:
            self.send(GO_ON)

    def fail(self, error: APIError) -> None:
        """Answer with an error."""
        if self.status:  # a bug of ours; a second head would be part of the answer
            self.close_connection = True
            return
        with contextlib.suppress(OSError):
            self.send_json(error.status, {"error": error.error}, error.headers)

    def send_error(self, code: int, message: Any = None, explain: Any = None) -> None:
        """http.server's own complaints about a malformed request, in our shape."""
        if code == 501:  # there is no do_METHOD; route() knows what is allowed
            return self.serve()
        self.close_connection = True
        self.fail(APIError(int(code), str(message or self.responses[code][0])[:200]))
        self.log_answer(0.0)

    def log_answer(self, seconds: float) -> None:
        """Time, status, method, path; then what is known, as name=value."""
        path = printable(getattr(self, "path", "?").split("?")[0])[:80]
        words = [str(self.status), self.command or "?", path]
        for name, value in self.reply.notes().items() if self.reply else ():
            words.append(f"{name}={value}")
        log(" ".join([*words, f"total={seconds:.3f}"]))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: log_answer() writes one line for each request."""


def model_of(name: str) -> Json:
    return {"id": name, "object": "model", "created": 0, "owned_by": "anthropic"}


def forbidden(message: str) -> APIError:
    return APIError(403, message, "origin_not_allowed")


def too_large() -> APIError:
    return APIError(413, f"The body exceeds {MAX_BODY >> 20} MiB.", "request_too_large")


# ── Main ───────────────────────────────────────────────────────────────────────────


def findings(installation: Installation) -> Iterator[Tuple[str, str]]:
    """What is right or wrong with this machine: ("ok", "problem" or "note", text)."""
    program, problem = installation.look()
    if program:
        yield "ok", f"Claude Code {dotted(program.version)} at {program.path}"
    yield ("problem", problem) if problem else ("ok", "logged in")
    try:
        tempfile.gettempdir()
    except OSError:
        yield "problem", "There is no usable directory for temporary files: set TMPDIR."
    billed = ", ".join(name for name in BILLED if os.environ.get(name))
    if billed:
        yield "note", f"{billed} is kept from Claude Code: it would bill by the token."


def bind_problem(settings: Settings, error: OSError) -> str:
    where = f"{settings.host}:{settings.port} ({error.strerror or error})"
    return f"can't listen on {where}: choose another --port, or stop what listens there"


def check_port(settings: Settings) -> Tuple[str, str]:
    """A finding. This server may have the port already."""
    try:
        with socket.create_server((settings.host, settings.port)):
            return "ok", f"port {settings.port} is free"
    except OSError as error:
        problem = bind_problem(settings, error)
    client = http.client.HTTPConnection(settings.host, settings.port, PROBE_SECONDS)
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        client.request("GET", "/health", headers={"X-Api-Key": settings.api_key})
        if "spares" in json.load(client.getresponse()):
            return "ok", f"claude_max_proxy serves on port {settings.port} already"
    return "problem", problem


def run_checks(settings: Settings) -> int:
    """--check: a line for each thing that must be right -> the exit code."""
    found = [("ok", f"Python {sys.version.split()[0]}")]
    found += [*findings(Installation(settings.claude)), check_port(settings)]
    for kind, text in found:
        print(f"{kind:8} {text}")
    return int(any(kind == "problem" for kind, _ in found))


def announce(server: Server) -> None:
    """Where it is, what was found, what to try: once, on stderr."""
    settings = server.settings
    host = "localhost" if is_loopback(settings.host) else settings.host
    url = f"http://{host}:{server.server_port}/v1"
    found = list(findings(server.backend.installation))
    server.backend.keeper.filling = ("ok", "logged in") in found
    key = ' -H "Authorization: Bearer $KEY"' if settings.api_key else ""
    body = '{"model":"sonnet","messages":[{"role":"user","content":"Hello!"}]}'
    lines = [f"claude_max_proxy {__version__} serves {url}"]
    lines += [text if kind == "ok" else f"{kind}: {text}" for kind, text in found]
    lines += ["models: " + ", ".join(KNOWN_MODELS)]
    lines += [f"try: curl {url}/chat/completions{key} -d '{body}'"]
    with contextlib.suppress(OSError):
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def main() -> int:
    sys.stderr = sys.stderr or open(os.devnull, "w")  # it was closed: no log
    if sys.version_info < (3, 9):  # 3.7 can read this file, but not run it
        sys.exit(f"claude_max_proxy: Python 3.9 is needed, not {sys.version[:6]}.")
    settings, check_only = parse_arguments(sys.argv[1:])
    if check_only:
        return run_checks(settings)
    with contextlib.suppress(ValueError, OSError):  # macOS gives 256 descriptors
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    try:
        server = Server(settings)
    except OSError as error:
        print(f"claude_max_proxy: {bind_problem(settings, error)}", file=sys.stderr)
        return 2
    backend, keeper, running = server.backend, server.backend.keeper, False

    def stop(number: int, frame: Any) -> None:
        if backend.stopping:  # the second signal: at once
            keeper.stop_all(signal.SIGKILL)
            keeper.close()
            os._exit(1)
        backend.stopping = True
        keeper.wake()
        if not running:
            raise SystemExit  # and end the CLI that announce() runs

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, stop)
    try:
        announce(server)
        running = True
        server.run()
    finally:
        server.drain()
    return 0


if __name__ == "__main__":
    sys.exit(main())
