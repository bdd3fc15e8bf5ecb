#!/usr/bin/env python3
"""An OpenAI-compatible server for the Claude Pro/Max subscription you already have.

    python3 claude_max_proxy.py                      # serves http://127.0.0.1:3456
    curl http://localhost:3456/v1/chat/completions \\
      -d '{"model":"sonnet","messages":[{"role":"user","content":"Hello!"}]}'

It runs your logged-in Claude Code CLI (`claude -p`), one process for each answer, and
speaks OpenAI's chat completions: streamed or not, tools, images, structured output.
One file, the standard library only.

The path of a request, and who runs where:

    client ──HTTP──► Handler                   a thread for each connection
                        │ guard(), JSON → parse_request() → Ask            (pure)
                        │ Gate: at most --max-concurrency CLIs at once
                        ▼
                     Claude                    a process for each answer
                        │ stdin:  initialize, the history turn by turn, the last turn
                        │ stdout: Messages API events, a line of JSON each
                        ▼
                     listen()                  in the Handler's thread: one selector
                        │                      for the pipes and the client's socket
                        │ Answer: CLI lines → OpenAI deltas                (pure)
    client ◄──SSE/JSON──┘ Reply: each delta leaves as it comes; JSON is their fold

    main thread: Server.serve() accepts connections; when an answer begins, Keeper
                 starts the process for the next request, tells it the conversation
                 while the answer streams, and reaps the ended ones. There are no other
                 threads.

Security: it listens on loopback; Host, Origin and Sec-Fetch-Site are checked, so no web
page can spend your quota; nothing of a request reaches argv but a checked model id; the
CLI runs without tools, settings, hooks, MCP servers or file mentions, in an empty
private directory; prompts are never logged. A client that leaves ends its CLI, and so
does the server when it ends.

Sections: Limits · Errors · Settings · Request · CLI · Response · HTTP · Main

MIT licence.
"""
from __future__ import annotations  # SyntaxError? Python 3.9 or newer is needed.

import argparse
import base64
import binascii
import collections
import contextlib
import errno
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
import re
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Set, Tuple

__version__ = "1.0.0"

Json = Dict[str, Any]

# ── Limits ─────────────────────────────────────────────────────────────────────────
# Each with its unit and its reason.

MAX_BODY = 32 << 20  # bytes; the Messages API refuses larger requests
MAX_AHEAD = 1 << 16  # bytes a client may send before it has its answer
MAX_LINE = 64 << 20  # bytes; a CLI line that goes on beyond this is nonsense
REQUEST_SECONDS = 30  # to send the headers, and again for the body, however slowly
IDLE_SECONDS = 120  # a kept-alive connection without a request
WRITE_SECONDS = 60  # for a client to take a write that does not fit its buffers
ALIVE_SECONDS = 10  # of silence before a stream is started and kept alive
TICK_SECONDS = 0.5  # how often the main thread, and a request that waits, look around
TERM_SECONDS = 1.0  # from SIGTERM to SIGKILL
DRAIN_SECONDS = 2.0  # that answers in flight get when the server stops
SPARE_SECONDS = 600  # after which an unused spare is renewed
STARTED_SECONDS = 3  # after which a CLI surely is up, also on a slow machine
PAUSE_SECONDS = 60  # in a conversation, after which its spare may make room
REST_SECONDS = 3600  # without a request, after which no spare is renewed
LOGIN_SECONDS = 5  # between two looks whether somebody has logged in
REFUSED_SECONDS = 60  # that a login which the API refused counts as none, unasked
PROBE_SECONDS = 20  # for `claude --version` and `claude auth status`
MAX_WAITING = 500  # requests in the queue; each holds a thread and its body
MAX_CHOICES = 8  # `n`: one CLI process each
MAX_STOPS = 4  # OpenAI's limit for `stop`
MAX_TOKENS = 10**9  # the CLI lowers it to what the model can do
MIN_THINKING_TOKENS = 2048  # max_tokens below leave no room for a thought (API: 1024)
MIN_BUDGET_TOKENS = 4096  # where a thought may take all of max_tokens but one
MAX_DESCRIPTION = 2048  # characters; older CLIs cut a tool's description there
MAX_THOUGHTS = 1000  # tool calls whose signed thinking is remembered
OLDEST_PYTHON = (3, 9)
OLDEST_CLI = (2, 1, 112)  # takes shouldQuery and a late system prompt (measured)
UNTYPED_TEXT_CLI = (2, 1, 330)  # honours text_not_typed (measured; 2.1.197 does not)
LATE_MODEL_CLI = (2, 1, 329)  # takes another model before the first turn (measured)


# ── Errors ─────────────────────────────────────────────────────────────────────────
# APIError may be raised at any depth; Handler.fail() alone renders it. To give another
# failure of the CLI a face, add a row to FAILURES or CATEGORIES.


class APIError(Exception):
    """An answer in OpenAI's error shape: {"error": {message, type, param, code}}."""

    def __init__(
        self, status: int, message: str, type: str = "invalid_request_error",
        code: Optional[str] = None, param: Optional[str] = None, **headers: str,
    ):
        super().__init__(message)
        self.status = status
        error = {"message": message, "type": type, "param": param, "code": code}
        self.body = {"error": error}
        self.headers = {name.replace("_", "-"): text for name, text in headers.items()}


class Disconnected(Exception):
    """The client has gone; nobody is left to answer."""


class Failure(NamedTuple):
    """How a failure that the CLI reports looks to an OpenAI client. `message` stands
    instead of the CLI's own text where that speaks of its terminal."""

    status: int
    type: str
    code: Optional[str] = None
    message: str = ""
    param: Optional[str] = None


HAS_TOKEN = bool(os.environ.get("CLAUDE_CODE_OAUTH_TOKEN"))  # it wins over a login
LOGIN_CURE = (
    "CLAUDE_CODE_OAUTH_TOKEN is refused: get a new one with `claude setup-token`."
    if HAS_TOKEN
    else "Claude Code is not logged in. Run `claude auth login`, then try again."
)
NO_MODEL = "The model does not exist, or your plan does not include it; see /v1/models."
TOO_LONG = Failure(400, "invalid_request_error", "context_length_exceeded")

FAILURES = {  # by `api_error_status` of the CLI's result line
    400: Failure(400, "invalid_request_error"),
    401: Failure(401, "authentication_error", "not_logged_in", LOGIN_CURE),
    403: Failure(403, "permission_error", "permission_denied"),
    404: Failure(404, "invalid_request_error", "model_not_found", NO_MODEL, "model"),
    413: Failure(413, "invalid_request_error", "request_too_large"),
    429: Failure(429, "rate_limit_error", "rate_limit_exceeded"),
    500: Failure(502, "api_error", "upstream_error"),
    503: Failure(503, "overloaded_error", "overloaded"),
    504: Failure(504, "timeout_error", "upstream_timeout"),
    529: Failure(503, "overloaded_error", "overloaded"),
}
CATEGORIES = {  # by its `terminal_reason`, and by `error` of its assistant line
    "prompt_too_long": TOO_LONG,
    "blocking_limit": TOO_LONG,
    "authentication_failed": FAILURES[401],
    "billing_error": Failure(429, "insufficient_quota", "insufficient_quota"),
    "invalid_request": FAILURES[400],
    "model_not_found": FAILURES[404],
    "rate_limit": FAILURES[429],
    "overloaded": FAILURES[529],
}


def failure(status: Any, words: Tuple[Any, Any], text: str, wait: float) -> APIError:
    """The APIError for what the CLI tells of a failed request: the API's status, its
    terminal_reason and category, its text, and seconds until a limit ends (0: unknown).
    502 for what is in no table."""
    reason, category = words
    found = CATEGORIES.get(reason) or FAILURES.get(status) or CATEGORIES.get(category)
    if category == "authentication_failed":  # whatever its status: 403, too
        found = FAILURES[401]
    found = found or FAILURES[500]
    message = found.message or text or "The Claude API answered with an error."
    error = APIError(found.status, message, found.type, found.code, found.param)
    if found.status == 429 and wait > 0:
        error.headers["Retry-After"] = str(math.ceil(wait))
    return error


def bad(param: str, message: str, code: Optional[str] = None) -> APIError:
    return APIError(400, message, code=code, param=param or None)


def bad_gateway(message: str, code: Optional[str] = None) -> APIError:
    return APIError(502, message, "api_error", code)


def unavailable(message: str, code: str) -> APIError:
    return APIError(503, message, "service_unavailable", code)


# ── Settings ───────────────────────────────────────────────────────────────────────
# One table. To add an option, add a row: its flag, environment variable, default and
# help follow from it.


def number(kind: type, least: float, most: float = math.inf) -> Any:
    """An argparse type: a number from `least` to `most`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most or value == math.inf:
            raise ValueError(text)
        return value

    most_text = "" if most == math.inf else f" to {most}"
    parse.__name__ = f"number from {least}{most_text}"  # argparse complains with it
    return parse


class Option(NamedTuple):
    default: Any
    help: str
    kind: Any = str


OPTIONS = {
    "host": Option("127.0.0.1", "address to listen on; beyond loopback needs a key"),
    "port": Option(3456, "port to listen on", number(int, 0, 65535)),
    "api_key": Option("", "demand this key from clients (as `Bearer KEY`)"),
    "allow_origin": Option("", "web origins that may ask, comma-separated"),
    "claude": Option("", "path of the Claude Code CLI, where it is not found"),
    "max_concurrency": Option(8, "CLI processes at once", number(int, 1, 1000)),
    "spares": Option(2, "processes started ahead, 155 MB each", number(int, 0, 100)),
    "timeout": Option(600.0, "seconds of silence before 504", number(float, 0.01)),
    "verbose": Option(False, "also log what a failed CLI wrote to stderr", bool),
}
Settings = collections.namedtuple(
    "Settings", OPTIONS, defaults=[row.default for row in OPTIONS.values()]
)
ENVIRONMENT = "CLAUDE_MAX_PROXY_"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """One line, without the usage that would hide it."""
        self.exit(2, f"claude_max_proxy: {message}\n")


def own_version() -> str:
    """The version, and this file's hash: a copied file still says which one it is."""
    with open(__file__, "rb") as source:
        digest = hashlib.sha256(source.read()).hexdigest()
    return f"claude_max_proxy {__version__} ({digest[:12]})"


def parse_arguments(argv: List[str]) -> Tuple[Settings, bool]:
    """Flags over environment over defaults -> (settings, whether --check was given)."""
    parser = Parser(
        prog="claude_max_proxy.py",
        description="OpenAI-compatible server for your Claude subscription.",
        epilog=f"Each option can also be set as {ENVIRONMENT}NAME, such as "
        f"{ENVIRONMENT}API_KEY: better than the flag, which `ps` shows to everyone.",
    )
    parser.add_argument("--version", action="store_true", help="say which, and exit")
    parser.add_argument("--check", action="store_true", help="say what works, and exit")
    for name, (default, text, kind) in OPTIONS.items():
        flag, caps = "--" + name.replace("_", "-"), name.upper()
        given = os.environ.get(ENVIRONMENT + caps)
        if kind is bool:
            on = given not in (None, "", "0", "false")
            parser.add_argument(flag, action="store_true", default=on, help=text)
            continue
        text += f" (default: {default})" if default else ""
        given = str(default) if given is None else given  # a string is converted
        parser.add_argument(flag, type=kind, default=given, metavar=caps, help=text)
    chosen = vars(parser.parse_args(argv))
    check_only = chosen.pop("check")
    if chosen.pop("version"):
        print(own_version())
        parser.exit()
    settings = Settings(**chosen)
    if not is_loopback(settings.host) and not settings.api_key:
        parser.error(f"--host {settings.host} is open to others: give --api-key, too")
    return settings, check_only


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only mean this machine (RFC 6761, 6.3)."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


# ── Request ────────────────────────────────────────────────────────────────────────
# OpenAI's JSON -> what to ask of the CLI. Pure: no sockets, processes or clock. To
# support a new parameter, add a row to PARAMETERS and read it in parse_request(); a new
# kind of content is a row in PARTS.

MODELS = {  # our id -> the CLI's alias for the newest model of the family
    "claude-opus-4": "opus",
    "claude-sonnet-4": "sonnet",
    "claude-haiku-4": "haiku",
}
KNOWN_MODELS = [*MODELS, *MODELS.values()]
MODEL_ID = re.compile(r"claude-[A-Za-z0-9.:_\[\]-]{1,120}")
# Models whose thinking has a budget: in a tool loop the API wants their signed thinking
# block back (Messages API, "Preserving thinking blocks").
BUDGET_MODEL = re.compile(r"haiku|claude-3|-4-[0-5](?!\d)|-4-20\d{6}")
EFFORTS = {"none": "", "minimal": "low"}  # OpenAI's words for the CLI's --effort
EFFORTS.update((word, word) for word in ("low", "medium", "high", "xhigh", "max"))

HONOURED, IGNORED, REFUSED = "honoured", "ignored", "refused"
KINDS = {
    str: "a string", int: "an integer", float: "a number", bool: "a boolean",
    list: "an array", dict: "an object", type(None): "null",
}  # fmt: skip


class Parameter(NamedTuple):
    """`harmless`: values of a refused parameter that ask for nothing."""

    kinds: Tuple[type, ...]
    use: str
    why: str
    harmless: Tuple[Any, ...] = ()


NO_KNOB = "Claude Code has no such knob"
PARAMETERS = {
    "model": Parameter((str,), HONOURED, "see Models"),
    "messages": Parameter((list,), HONOURED, "turn for turn, in their native roles"),
    "stream": Parameter((bool,), HONOURED, "server-sent events"),
    "stream_options": Parameter((dict,), HONOURED, "include_usage"),
    "max_tokens": Parameter((int,), HONOURED, "at least 1"),
    "max_completion_tokens": Parameter((int,), HONOURED, "wins over max_tokens"),
    "stop": Parameter((str, list), HONOURED, "1 to 4 strings; the CLI ends at a match"),
    "n": Parameter((int,), HONOURED, "1 to 8, one CLI process each"),
    "tools": Parameter((list,), HONOURED, "functions; the client runs them"),
    "tool_choice": Parameter((str, dict), HONOURED, "none, auto, required, a function"),
    "parallel_tool_calls": Parameter((bool,), HONOURED, "false: one call at a time"),
    "response_format": Parameter((dict,), HONOURED, "text, json_object, json_schema"),
    "reasoning_effort": Parameter((str,), HONOURED, "none to max"),
    "temperature": Parameter((int, float), IGNORED, NO_KNOB),
    "top_p": Parameter((int, float), IGNORED, NO_KNOB),
    "presence_penalty": Parameter((int, float), IGNORED, NO_KNOB),
    "frequency_penalty": Parameter((int, float), IGNORED, NO_KNOB),
    "seed": Parameter((int,), IGNORED, NO_KNOB),
    "logit_bias": Parameter((dict,), IGNORED, NO_KNOB),
    "user": Parameter((str,), IGNORED, "there is one user: you"),
    "metadata": Parameter((dict,), IGNORED, "nothing is stored"),
    "store": Parameter((bool,), IGNORED, "nothing is stored"),
    "logprobs": Parameter((bool,), REFUSED, "Claude gives none", (False,)),
    "top_logprobs": Parameter((int,), REFUSED, "Claude gives none", (0,)),
    "modalities": Parameter((list,), REFUSED, "answers are text", (["text"],)),
    "audio": Parameter((dict,), REFUSED, "answers are text"),
    "functions": Parameter((list,), REFUSED, "use tools", ([],)),
    "function_call": Parameter((str, dict), REFUSED, "use tool_choice", ("none",)),
    "web_search_options": Parameter((dict,), REFUSED, "there is no web search here"),
}


class QueryOptions(NamedTuple):
    """What a process is told with the last turn. `tool_choice` is the Messages API's,
    as JSON; "" and 0 leave the CLI its default."""

    effort: str = ""
    thinking: bool = True
    max_tokens: int = 0
    tool_choice: str = ""


class Setup(NamedTuple):
    """What `initialize` tells a process; a second one would not replace the first."""

    system: str = ""
    tools: Tuple[Json, ...] = ()  # as MCP lists them


class Ask(NamedTuple):
    """All that one request asks. `requested` is the client's name of the model, `model`
    the CLI's. `turns` are Messages API messages, the last one a user's; `names` gives
    the client's name for a tool's name at the API, `properties` the same for the
    properties of each tool; `structured`: the arguments of STRUCTURED_OUTPUT are the
    answer's content."""

    requested: str
    model: str
    options: QueryOptions
    setup: Setup
    turns: List[Json]
    names: Dict[str, str] = {}
    properties: Dict[str, Dict[str, str]] = {}
    structured: bool = False
    stream: bool = False
    include_usage: bool = False
    stops: Tuple[str, ...] = ()
    n: int = 1

    @property
    def goes_on(self) -> bool:
        """Whether a next turn is likely: of a chat, or of an agent's tool loop."""
        return self.n == 1 and (len(self.turns) > 1 or bool(self.setup.tools))


def check(value: Any, kinds: Tuple[type, ...], param: str) -> Any:
    """`value`, or a 400 that names `param` if it has none of the JSON types `kinds`."""
    if type(value) in kinds:
        return value
    wanted, got = " or ".join(KINDS[kind] for kind in kinds), KINDS[type(value)]
    message = f"Invalid type for '{param}': expected {wanted}, but got {got} instead."
    raise bad(param, message, "invalid_type")


def want(holder: Json, key: str, kinds: Tuple[type, ...], where: str) -> Any:
    """holder[key], checked."""
    return check(holder.get(key), kinds, f"{where}.{key}")


def may(holder: Json, key: str, kinds: Tuple[type, ...], where: str) -> Any:
    """holder[key], checked; None where it is null or absent."""
    return None if holder.get(key) is None else want(holder, key, kinds, where)


class Thought(NamedTuple):
    """An answer with tool calls: the model that was asked, the one that signed the
    thinking, which is good for it alone, and all blocks in their order."""

    model: str
    signer: str
    blocks: List[Json]


Thoughts = Dict[str, Thought]  # by the id of the tool call


def parse_request(body: Any, thoughts: Thoughts) -> Ask:
    """A chat completion request -> Ask. Raises APIError 400 or 404."""
    body = parse_parameters(body)
    tools, names = parse_tools(body.get("tools", []))
    model = cli_model(body["model"])
    properties = {t["name"]: rename_properties(t["inputSchema"]) for t in tools}
    script = Transcript(thoughts, model, properties)
    for i, message in enumerate(body["messages"]):
        script.add(message, f"messages[{i}]")
    script.finish()
    choice, schema = parse_choice(body, names), parse_format(body)
    if script.called and not tools:  # the API wants every called tool defined
        tools = [mcp_tool(name, "", {}) for name in sorted(script.called)]
        choice = {"type": "none"}
    structured = schema is not None and choice.get("type") not in ("any", "tool")
    if structured:  # where a call is forced, there is no content to shape
        tools.append(mcp_tool(STRUCTURED_OUTPUT, STRUCTURED_TEXT, schema))
        renamed = rename_properties(tools[-1]["inputSchema"])
        properties[STRUCTURED_OUTPUT] = renamed
        choice = structured_choice(choice, names)
    return Ask(
        requested=body["model"],
        model=model,
        options=parse_options(body, model, choice, is_unsigned(script.turns)),
        setup=Setup("\n\n".join(script.system), tuple(tools)),
        turns=script.turns,
        names=names,
        properties=properties,
        structured=structured,
        stream=body.get("stream", False),
        include_usage=parse_include_usage(body),
        stops=parse_stops(body.get("stop", [])),
        n=bounded(body, "n", MAX_CHOICES) or 1,
    )


def parse_parameters(body: Any) -> Json:
    """PARAMETERS applied: the body without its nulls, types checked. Unknown names are
    left alone."""
    if not isinstance(body, dict):
        raise bad("", "The request body must be a JSON object.")
    body = {name: value for name, value in body.items() if value is not None}
    for name in body.keys() & PARAMETERS.keys():
        row = PARAMETERS[name]
        check(body[name], row.kinds, name)
        if row.use == REFUSED and body[name] not in row.harmless:
            message = f"'{name}' is not supported: {row.why}."
            raise bad(name, message, "unsupported_parameter")
    for name in ("model", "messages"):
        if name not in body:
            raise bad(name, f"Missing required parameter: '{name}'.")
    if not body["messages"]:
        raise bad("messages", "'messages' must hold at least one message.")
    return body


def parse_options(
    body: Json, model: str, choice: Json, unsigned: bool
) -> QueryOptions:
    """`unsigned`: see is_unsigned()."""
    effort = body.get("reasoning_effort", "")
    if effort and effort not in EFFORTS:
        known = ", ".join(EFFORTS)
        raise bad("reasoning_effort", f"'reasoning_effort' must be one of {known}.")
    tokens = bounded(body, "max_tokens", MAX_TOKENS)
    tokens = bounded(body, "max_completion_tokens", MAX_TOKENS) or tokens
    thinking = not (
        effort == "none"
        or choice.get("type") in ("any", "tool")  # the API refuses both together
        or 0 < tokens < MIN_THINKING_TOKENS
        or (BUDGET_MODEL.search(model) and (unsigned or 0 < tokens < MIN_BUDGET_TOKENS))
    )
    as_json = json.dumps(choice) if choice else ""
    return QueryOptions(EFFORTS.get(effort, ""), thinking, tokens, as_json)


def cli_model(name: str) -> str:
    """A client's model name -> what the CLI takes for --model; else 404."""
    short = name.rsplit("/", 1)[-1]  # openai/…, anthropic/…: routers' prefixes
    model = MODELS.get(short, short)
    if model in MODELS.values() or MODEL_ID.fullmatch(model):
        return model
    known = ", ".join(KNOWN_MODELS)
    message = f"There is no model '{name[:100]}'. Use {known} or a full Claude id."
    raise APIError(404, message, code="model_not_found", param="model")


def bounded(body: Json, name: str, most: int) -> int:
    """An integer from 1 to `most`; 0 when absent."""
    value = body.get(name, 0)
    if name in body and not 1 <= value <= most:
        raise bad(name, f"'{name}' must be between 1 and {most}.")
    return value


def parse_include_usage(body: Json) -> bool:
    options = body.get("stream_options", {})
    return bool(may(options, "include_usage", (bool,), "stream_options"))


def parse_stops(value: Any) -> Tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if len(stops) > MAX_STOPS:
        raise bad("stop", f"'stop' takes at most {MAX_STOPS} strings.")
    for i, stop in enumerate(stops):
        check(stop, (str,), f"stop[{i}]")
    return tuple(filter(None, stops))  # "" would match everywhere


def parse_format(body: Json) -> Optional[Json]:
    """response_format -> the JSON schema that the reply must match, if any."""
    value = body.get("response_format", {"type": "text"})
    kind = want(value, "type", (str,), "response_format")
    if kind == "json_schema":
        holder = want(value, "json_schema", (dict,), "response_format")
        where = "response_format.json_schema"
        return object_schema(want(holder, "schema", (dict,), where), where + ".schema")
    if kind not in ("text", "json_object"):
        message = "'response_format.type' must be text, json_object or json_schema."
        raise bad("response_format.type", message)
    return {"type": "object", "additionalProperties": True} if kind != "text" else None


# Tools. The Messages API is strict where clients are not, and the CLI drops *all* tools
# of a server in silence when one schema is not to its taste.

# Our tool whose arguments are the reply. (The CLI has its own, for `jsonSchema`; it
# drops it in silence for a schema with a keyword that it does not know.)
STRUCTURED_OUTPUT = "StructuredOutput"
STRUCTURED_TEXT = "Give your final response as the arguments of this tool."
# Names that mean something to the CLI: it edits inputs of the last two in the history.
RESERVED = {STRUCTURED_OUTPUT, "ToolSearch", "ExitPlanMode", "Edit"}
API_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
API_PROPERTY = re.compile(r"[a-zA-Z0-9_.-]{1,64}")  # at the top of a schema (2.1.330)


def api_name(name: str, accepted: Any = API_NAME) -> str:
    """A tool name, call id or property that the Messages API accepts; the same for the
    same."""
    if accepted.fullmatch(name) and (accepted is API_PROPERTY or name not in RESERVED):
        return name
    digest = binascii.crc32(name.encode("utf-8", "replace"))
    return re.sub(r"[^a-zA-Z0-9_-]", "_", name)[:50] + f"_{digest:08x}"


def api_property(name: str) -> str:
    return api_name(name, API_PROPERTY)


def rename_properties(schema: Json) -> Dict[str, str]:
    """Give the top properties names that the CLI takes: for others it drops the tool in
    silence. -> name at the API -> the client's, where they differ."""
    names = schema.get("properties", {})
    if names:
        schema["properties"] = {api_property(name): v for name, v in names.items()}
    if "required" in schema:
        schema["required"] = [api_property(name) for name in schema["required"]]
    return {api_property(name): name for name in names if api_property(name) != name}


def parse_tools(tools: List[Any]) -> Tuple[List[Json], Dict[str, str]]:
    """OpenAI's tools -> (MCP tools, tool name at the API -> the client's)."""
    found: List[Json] = []
    names: Dict[str, str] = {}
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        if check(tool, (dict,), where).get("type", "function") != "function":
            raise bad(f"{where}.type", "Only tools of type 'function' are supported.")
        function = want(tool, "function", (dict,), where)
        where += ".function"
        name = want(function, "name", (str,), where)
        if not name or name in names.values():
            problem = "is used twice" if name else "must not be empty"
            raise bad(where + ".name", f"The tool name '{name[:100]}' {problem}.")
        names[api_name(name)] = name
        schema = may(function, "parameters", (dict,), where) or {}
        schema = object_schema(schema, where + ".parameters")
        text = may(function, "description", (str,), where) or ""
        found.append(mcp_tool(api_name(name), text, schema))
    return found, names


def mcp_tool(name: str, text: str, schema: Json) -> Json:
    """A long description moves into the schema, where no CLI cuts it."""
    schema = {"type": "object", **schema}
    if len(text) > MAX_DESCRIPTION:
        inner = schema.get("description")
        schema["description"] = f"{text}\n\n{inner}" if inner else text
        text = text[:200] + "… (the whole description is in the input schema)"
    return {"name": name, "description": text, "inputSchema": schema}


def object_schema(schema: Json, where: str) -> Json:
    """`schema` as the API and the CLI accept it: an object at the top, no combinator
    there (it moves to where the model reads it), each property an object. 400 for what
    can't mean an object."""
    kind = "object" if schema.get("type") is None else schema["type"]
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        message = f"'{where}' must be a schema of type 'object' at the top."
        raise bad(where, message, "invalid_schema")
    schema = {k: v for k, v in modern(schema, where).items() if k != "$schema"}
    combined = {k: schema.pop(k) for k in COMBINATORS if k in schema}
    schema["type"] = "object"
    properties = union([b for branches in combined.values() for b in branches])
    properties.update(schema.get("properties", {}))
    if properties:
        schema["properties"] = properties
    if combined:
        rule = "The value must also match: " + json.dumps(combined)
        text = may(schema, "description", (str,), where)
        schema["description"] = f"{text}\n{rule}" if text else rule
    return schema


def union(branches: List[Json]) -> Json:
    """The properties of all branches; one that differs is the anyOf of its schemas."""
    found: Dict[str, Dict[str, Json]] = {}  # by name, then by their JSON
    for branch in branches:
        for name, schema in branch.get("properties", {}).items():
            found.setdefault(name, {})[json.dumps(schema)] = schema
    lists = {name: list(kinds.values()) for name, kinds in found.items()}
    return {k: {"anyOf": v} if len(v) > 1 else v[0] for k, v in lists.items()}


COMBINATORS = ("anyOf", "oneOf", "allOf")
NUMERIC = re.compile("m(in|ax)imum|exclusiveM(in|ax)imum|multipleOf|m(in|ax)[A-Z].*")
JSON_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


def mend(schema: Json) -> None:
    """Take out, or put right, what has no meaning in 2020-12."""
    schema.pop("$id", None)  # nobody refers to it, and "#x" is none
    kind = schema.get("type", [])
    if any(k not in JSON_TYPES for k in (kind if isinstance(kind, list) else [kind])):
        del schema["type"]  # "any", "file": no JSON type
    for key in ("required", "type"):
        if isinstance(schema.get(key), list):
            schema[key] = list(dict.fromkeys(schema[key]))  # each once
    for key in filter(NUMERIC.fullmatch, list(schema)):
        if isinstance(schema[key], str):  # "0" for 0
            with contextlib.suppress(ValueError):
                schema[key] = parse_json(schema[key].encode())
        if type(schema[key]) not in (int, float):
            del schema[key]
    if schema.get("additionalProperties") in ("true", "false"):
        schema["additionalProperties"] = schema["additionalProperties"] == "true"
    for key in (*COMBINATORS, "items", "prefixItems"):
        if schema.get(key) == []:
            del schema[key]


def modern(schema: Any, where: str) -> Json:
    """A schema of any draft as one of JSON Schema 2020-12, all through: for one that is
    not, the CLI drops the tool. Raises APIError 400 where it means nothing."""
    if isinstance(schema, bool):
        return {} if schema else {"not": {}}
    schema = {k: v for k, v in check(schema, (dict,), where).items() if v is not None}
    for name in may(schema, "required", (list,), where) or []:
        check(name, (str,), where + ".required")
    for key, end in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if type(schema.get(key)) is bool and schema.pop(key) and end in schema:
            schema[key] = schema.pop(end)  # draft 4
    mend(schema)
    if type(schema.get("items")) is list:  # draft 7
        schema["prefixItems"] = schema.pop("items")
        if "additionalItems" in schema:
            schema["items"] = schema.pop("additionalItems")
    for key in ("properties", "patternProperties", "$defs", "definitions"):
        if key in schema:
            inner, at = want(schema, key, (dict,), where), f"{where}.{key}"
            schema[key] = {name: modern(v, f"{at}.{name}") for name, v in inner.items()}
    for key in (*COMBINATORS, "prefixItems"):
        if key in schema:
            inner, at = want(schema, key, (list,), where), f"{where}.{key}"
            schema[key] = [modern(v, f"{at}[{i}]") for i, v in enumerate(inner)]
    for key in ("items", "additionalProperties", "not"):
        if isinstance(schema.get(key), dict):
            schema[key] = modern(schema[key], f"{where}.{key}")
    return schema


def parse_choice(body: Json, names: Dict[str, str]) -> Json:
    """tool_choice and parallel_tool_calls -> the Messages API's tool_choice; {} for its
    default."""
    choice = body.get("tool_choice", "auto")
    if isinstance(choice, dict):
        if choice.get("type", "function") != "function":
            raise bad("tool_choice.type", "'tool_choice.type' must be function.")
        function = want(choice, "function", (dict,), "tool_choice")
        name = want(function, "name", (str,), "tool_choice.function")
        if name not in names.values():
            raise bad("tool_choice", f"The tool '{name[:100]}' is not in 'tools'.")
        found = {"type": "tool", "name": api_name(name)}
    elif choice not in ("none", "auto", "required"):
        message = "'tool_choice' must be none, auto, required or a function."
        raise bad("tool_choice", message)
    else:
        found = {"type": "any" if choice == "required" else choice}
    if not names:
        if choice == "required":
            raise bad("tool_choice", "'tool_choice' is only allowed with 'tools'.")
        return {}
    if body.get("parallel_tool_calls") is False and found["type"] != "none":
        found["disable_parallel_tool_use"] = True
    return {} if found == {"type": "auto"} else found


def structured_choice(choice: Json, names: Dict[str, str]) -> Json:
    """The tool_choice that leaves no answer but the JSON, or a client's tool call."""
    if names and choice.get("type") != "none":
        forced: Json = {"type": "any"}
    else:
        forced = {"type": "tool", "name": STRUCTURED_OUTPUT}
    return {**forced, "disable_parallel_tool_use": True}


# Messages.

BEGIN, CONTINUE = "Begin.", "Continue."  # where the API wants a user turn and has none


def text_block(text: str) -> Json:
    return {"type": "text", "text": text}


class Transcript:
    """OpenAI's messages -> `system` texts and `turns`, in the Messages API's roles.

    Neighbours of one role are one turn; texts without a character to see are dropped,
    for the API refuses them. `called`: names of the tools in the history; `properties`
    as in Ask. Call ids are the API's in `ids`: each once in a conversation, or the CLI
    drops the call. (For it `x_1` is the same as `x`; `x-1` is not.)
    """

    def __init__(
        self, thoughts: Thoughts, model: str,
        properties: Dict[str, Dict[str, str]], turns: Iterable[Json] = (),
    ):  # fmt: skip
        self.thoughts, self.model, self.properties = thoughts, model, properties
        self.turns = list(turns)
        self.system: List[str] = []
        self.called: Set[str] = set()
        self.ids = {b.get("id") for turn in self.turns for b in turn["content"]}
        self.open: Dict[str, Tuple[str, str]] = {}  # unanswered: id -> (where, API's)

    def add(self, message: Any, where: str) -> None:
        role = want(check(message, (dict,), where), "role", (str,), where)
        if role not in self.ROLES:
            known = ", ".join(self.ROLES)
            raise bad(where + ".role", f"'{where}.role' must be one of {known}.")
        if role != "tool":
            self.expect_no_open_call()
        self.ROLES[role](self, message, where)

    def add_system(self, message: Json, where: str) -> None:
        blocks = parse_content(message, where, ("text",))
        text = "\n".join(block["text"] for block in blocks)
        if text and self.turns:
            self.append("user", [text_block(f"<system>\n{text}\n</system>")])
        elif text:
            self.system.append(text)

    def add_user(self, message: Json, where: str) -> None:
        blocks = parse_content(message, where, ("text", "image_url", "file"))
        self.append("user", blocks)

    def add_assistant(self, message: Json, where: str) -> None:
        if message.get("audio"):
            raise bad(where + ".audio", "Audio is not supported.")
        blocks = parse_content(message, where, ("text", "refusal"))
        calls = may(message, "tool_calls", (list,), where) or []
        uses = [self.use(c, f"{where}.tool_calls[{i}]") for i, c in enumerate(calls)]
        if self.turns and self.turns[-1]["role"] == "assistant":  # a text before
            blocks = self.turns.pop()["content"] + blocks
        thought = self.thoughts.get(uses[0]["id"]) if uses else None
        if thought and thought.model == self.model:
            self.append("assistant", in_order(thought.blocks, blocks, uses))
            self.turns[-1]["model"] = thought.signer
        else:
            self.append("assistant", blocks + uses)

    def use(self, call: Any, where: str) -> Json:
        """One of an assistant's tool_calls -> a tool_use block."""
        name = want(check(call, (dict,), where), "id", (str,), where)
        function = want(call, "function", (dict,), where)
        where += ".function"
        tool = api_name(want(function, "name", (str,), where))
        if name in self.open:
            raise bad(where, f"The tool call id '{name[:100]}' is used twice.")
        fresh = api_name(name)
        while fresh in self.ids:  # some clients count from 0 in each answer
            fresh = f"{api_name(name)}-{len(self.ids)}"
        self.ids.add(fresh)
        self.open[name] = where, fresh
        self.called.add(tool)
        value = parse_arguments_of_call(may(function, "arguments", (str,), where) or "")
        known = {ours: api for api, ours in self.properties.get(tool, {}).items()}
        value = {known.get(key, key): item for key, item in value.items()}
        return {"type": "tool_use", "id": fresh, "name": tool, "input": value}

    def add_tool(self, message: Json, where: str) -> None:
        name = want(message, "tool_call_id", (str,), where)
        if name not in self.open:
            text = f"'{where}' must follow an assistant message with that tool call."
            raise bad(where + ".tool_call_id", text)
        result: Json = {"type": "tool_result", "tool_use_id": self.open.pop(name)[1]}
        blocks = parse_content(message, where, ("text", "image_url", "file"))
        if blocks:
            alone = len(blocks) == 1 and blocks[0].get("text")
            result["content"] = alone or blocks
        self.append("user", [result])

    ROLES = {
        "system": add_system,
        "developer": add_system,
        "user": add_user,
        "assistant": add_assistant,
        "tool": add_tool,
    }

    def append(self, role: str, blocks: List[Json]) -> None:
        if not blocks:
            return
        if not self.turns and role == "assistant":
            self.append("user", [text_block(BEGIN)])
        if self.turns and self.turns[-1]["role"] == role:
            self.turns[-1]["content"] += blocks  # in place: there may be many
        else:
            self.turns.append({"role": role, "content": blocks})

    def expect_no_open_call(self) -> None:
        for name, (where, _) in self.open.items():
            message = f"The tool call '{name[:100]}' has no response: 'tool_calls' "
            raise bad(where, message + "must be followed by a tool message for each.")

    def finish(self) -> None:
        self.expect_no_open_call()
        if not self.turns or self.turns[-1]["role"] == "assistant":
            self.append("user", [text_block(CONTINUE if self.turns else BEGIN)])


def in_order(told: List[Json], said: List[Json], uses: List[Json]) -> List[Json]:
    """An answer with tool calls, as the client has it, with its thinking: in the order
    of `told`, as it came, where both are the same; else behind all thinking."""
    texts = ["".join(b.get("text", "") for b in blocks) for blocks in (told, said)]
    by_id = {use["id"]: use for use in uses}
    ids = [block["id"] for block in told if block["type"] == "tool_use"]
    if texts[0] == texts[1] and sorted(ids) == sorted(by_id):
        return [by_id.get(block.get("id"), block) for block in told]
    return [block for block in told if "thinking" in block["type"]] + said + uses


def is_unsigned(turns: List[Json]) -> bool:
    """Whether a tool loop goes on, up to the last turn, whose signed thinking is not
    known. (A turn with a result belongs to the loop, also with a text behind it.)"""
    for turn in reversed(turns):
        kinds = [block["type"] for block in turn["content"]]
        if turn["role"] == "user" and "tool_result" not in kinds:
            return False
        if "tool_use" in kinds and "thinking" not in kinds[0]:
            return True
    return False


def parse_arguments_of_call(text: str) -> Json:
    """A call's JSON arguments as the API wants them: an object. What is none, from a
    model cut short in mid-argument, is kept as text."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": text}


def parse_content(message: Json, where: str, kinds: Tuple[str, ...]) -> List[Json]:
    """A message's content, a string or parts of the given kinds, as API blocks."""
    answer = message["role"] == "assistant"  # of calls alone it has no content
    content = (may if answer else want)(message, "content", (str, list), where) or []
    where += ".content"
    blocks = []
    for i, part in enumerate([content] if isinstance(content, str) else content):
        at = f"{where}[{i}]"
        if isinstance(part, str):  # bare strings in a list are seen, too
            part = {"type": "text", "text": part}
        kind = want(check(part, (dict,), at), "type", (str,), at)
        if kind not in kinds:
            known = ", ".join(kinds)
            text = f"Content of type '{kind[:50]}' is not supported here; {known} is."
            raise bad(at, text, "unsupported_content")
        block = PARTS[kind](part, at)
        if block["type"] != "text" or block["text"].strip():
            blocks.append(block)
    return blocks


def image_part(part: Json, where: str) -> Json:
    where += ".image_url"
    holder = check(part.get("image_url"), (dict, str), where)
    url = holder if isinstance(holder, str) else want(holder, "url", (str,), where)
    if re.match(r"https?://", url):
        return {"type": "image", "source": {"type": "url", "url": url}}
    kind, data = parse_data_url(url, where + ".url")
    kind = "image/jpeg" if kind == "image/jpg" else kind
    if kind not in ("image/png", "image/jpeg", "image/gif", "image/webp"):
        message = f"'{where}' holds {kind[:50]}; the API takes PNG, JPEG, GIF and WebP."
        raise bad(where + ".url", message, "unsupported_media_type")
    return {"type": "image", "source": base64_source(kind, data)}


def file_part(part: Json, where: str) -> Json:
    holder = want(part, "file", (dict,), where)
    where += ".file"
    if holder.get("file_data") is None:
        message = "Only 'file_data' is supported: this server stores no files."
        raise bad(where, message, "unsupported_content")
    url = want(holder, "file_data", (str,), where)
    if not url.startswith("data:"):  # OpenAI takes the bare base64 of a PDF, too
        url = "data:application/pdf;base64," + url
    kind, data = parse_data_url(url, where + ".file_data")
    if kind == "application/pdf":
        source = base64_source(kind, data)
    elif kind.startswith("text/") or kind == "application/json":
        text = base64.b64decode(data).decode("utf-8", "replace")
        source = {"type": "text", "media_type": "text/plain", "data": text}
    else:
        message = f"'{where}' holds {kind[:50]}; PDF and text files are supported."
        raise bad(where + ".file_data", message, "unsupported_media_type")
    name = may(holder, "filename", (str,), where)
    return {"type": "document", "source": source, **({"title": name} if name else {})}


def parse_data_url(url: str, where: str) -> Tuple[str, str]:
    """data:TYPE;base64,DATA (RFC 2397) -> (media type, base64)."""
    head, _, data = url.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64"):
        raise bad(where, f"'{where}' must be an http(s) or a base64 data: URL.")
    data = re.sub(r"\s+", "", data)
    with contextlib.suppress(binascii.Error, ValueError):
        if base64.b64decode(data, validate=True):
            return head[len("data:") :].split(";")[0].lower(), data
    raise bad(where, f"'{where}' holds invalid base64 data.")


def base64_source(kind: str, data: str) -> Json:
    return {"type": "base64", "media_type": kind, "data": data}


PARTS = {
    "text": lambda part, where: text_block(want(part, "text", (str,), where)),
    "refusal": lambda part, where: text_block(want(part, "refusal", (str,), where)),
    "image_url": image_part,
    "file": file_part,
}


# ── CLI ────────────────────────────────────────────────────────────────────────────
# `claude -p` driven over stdin; measured on 2.1.112, 2.1.197 and 2.1.330, 2026-11-22.
# A conversation with it, trimmed (> we write, < it prints; one JSON object a line):
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
#   > {"type":"control_request","request_id":"0","request":{"subtype":
#      "apply_flag_settings","settings":{"env":{"CLAUDE_CODE_EFFORT_LEVEL":"low"}}}}
#   > {"type":"user",…}                            the last turn: this asks the model
#   < {"type":"system","subtype":"init",…}         and other kinds, which are skipped
#   < {"type":"stream_event","event":{"type":"message_start",…},…}
#   < {"type":"stream_event","event":{"type":"content_block_delta",…},…}
#   < {"type":"assistant","message":{…}}           the finished block once more
#   < {"type":"stream_event","event":{"type":"message_delta","delta":{"stop_reason":
#      "end_turn"},"usage":{"output_tokens":3}},…}           here the process is ended
#   < {"type":"result",…}
#
# Turns sent before the last one's result change their order, and assistant turns with
# one id are merged: hence the waits and the ids. `tools/call` is never answered: the
# client runs its tools, and tells of it in a request of its own.

SERVER = "c"  # the MCP server that holds the client's tools
ARGV = [
    *"-p --input-format stream-json --output-format stream-json --verbose".split(),
    *"--include-partial-messages --no-session-persistence".split(),
    *("--tools", ""),  # none of the CLI's own tools
    "--strict-mcp-config",  # none of the user's MCP servers
    *("--setting-sources", ""),  # no hooks, plugins and CLAUDE.md
    "--disable-slash-commands",
    *("--allowedTools", f"mcp__{SERVER}"),
    "--settings",  # no reminder how to sign commits where a client names a tool Bash
    '{"attribution":{"commit":"","pr":""},"includeCoAuthoredBy":false}',
]
VARIABLES = {
    "CLAUDE_CODE_DISABLE_ATTACHMENTS": "1",  # `@/path` in a text would read that file
    "CLAUDE_CODE_DISABLE_FILE_MENTIONS": "1",
    "CLAUDE_AGENT_SDK_MCP_NO_PREFIX": "1",  # tools keep their names
    "CLAUDE_AGENT_SDK_DISABLE_BUILTIN_AGENTS": "1",  # else listed for a tool Agent
    "ENABLE_TOOL_SEARCH": "false",  # else many tools are withheld at first
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
# They would bill by the token instead of the subscription; the last one keeps the CLI
# from starting inside another.
BILLED = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")
WITHHELD = (*BILLED, "CLAUDECODE")
OPTION_VARIABLES = (  # told by query_lines() or not at all
    "CLAUDE_CODE_MAX_OUTPUT_TOKENS", "CLAUDE_CODE_DISABLE_THINKING",
    "CLAUDE_CODE_EXTRA_BODY", "CLAUDE_CODE_EFFORT_LEVEL", "MAX_THINKING_TOKENS",
)  # fmt: skip


def environment(program: str) -> Dict[str, str]:
    """Ours, less what must not reach the CLI, plus VARIABLES. Its own directory is at
    the end of PATH: npm's `claude` under nvm asks for the `node` there, which launchd's
    PATH lacks."""
    own = [ENVIRONMENT + name.upper() for name in OPTIONS]
    gone = {*WITHHELD, *OPTION_VARIABLES, *own}
    env = {name: text for name, text in os.environ.items() if name not in gone}
    places = env.get("PATH") or os.defpath, os.path.dirname(program)
    return {**env, **VARIABLES, "PATH": os.pathsep.join(places)}


def settings_line(settings: Json) -> Json:
    """Changes a process that runs, up to its query (CLAUDE_CODE_EFFORT_LEVEL and the
    like: 2.1.112 and newer; the model: LATE_MODEL_CLI, before the first turn)."""
    request = {"subtype": "apply_flag_settings", "settings": settings}
    return {"type": "control_request", "request_id": "0", "request": request}


def query_lines(ask: Ask, version: Tuple[int, ...]) -> List[Json]:
    """The options of this request, where it has any (reading them takes the CLI 10 ms),
    and the last turn, which starts the model."""
    options, env = ask.options, {}
    if options.effort:
        env["CLAUDE_CODE_EFFORT_LEVEL"] = options.effort
    if options.max_tokens:
        env["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] = str(options.max_tokens)
    if not options.thinking:
        env["CLAUDE_CODE_DISABLE_THINKING"] = "1"
    if options.tool_choice:
        env["CLAUDE_CODE_EXTRA_BODY"] = '{"tool_choice":%s}' % options.tool_choice
    last = query_line(ask.turns[-1], version)
    return [settings_line({"env": env}), last] if env else [last]


def initialize_line(setup: Setup) -> Json:
    request: Json = {"subtype": "initialize", "systemPrompt": [setup.system]}
    if setup.tools:
        request["sdkMcpServers"] = [SERVER]
    return {"type": "control_request", "request_id": "1", "request": request}


def turn_line(turn: Json, place: int, version: Tuple[int, ...]) -> Json:
    """An earlier turn of the conversation; `place` makes an assistant's id unique."""
    message = {"role": turn["role"], "content": turn["content"]}
    line = {"type": turn["role"], "session_id": "", "parent_tool_use_id": None}
    if turn["role"] == "user":
        message["content"] = untyped(turn["content"], version)
        line.update(shouldQuery=False, text_not_typed=True)
    else:
        usage = {"input_tokens": 0, "output_tokens": 0}
        message.update(id=f"msg_{place}", type="message", usage=usage)
        message.update(model=turn.get("model", "m"))  # another's thinking is left out
        message.update(stop_reason=None, stop_sequence=None)
    return {**line, "message": message}


def query_line(turn: Json, version: Tuple[int, ...]) -> Json:
    """The last turn, which starts the model. Its end has a mark for the prompt cache:
    without it no conversation would be found there again."""
    line = turn_line(turn, 0, version)
    del line["shouldQuery"]
    content = list(line["message"]["content"])
    places = [i for i, block in enumerate(content) if block["type"] != "image"]
    last = places[-1] if places else -1  # 2.1.330 loses a mark on an image
    content[last] = {**content[last], "cache_control": CACHE_MARK}
    return {**line, "message": {"role": "user", "content": content}}


def untyped(content: List[Json], version: Tuple[int, ...]) -> List[Json]:
    """User content that the CLI does not take for typed input. Where it does not know
    `text_not_typed`, a last text that begins with "/" is a command, in earlier turns,
    too. Cut behind the slashes it is none, and reads the same."""
    text = content[-1].get("text", "")
    if version >= UNTYPED_TEXT_CLI or not text.startswith("/"):
        return content
    rest = text.lstrip("/")
    pieces = [text[: len(text) - len(rest)], rest] if rest.strip() else ["\n" + text]
    return content[:-1] + [text_block(piece) for piece in pieces]


class Conversation(NamedTuple):
    """What a process has been told, or is to be told, before its query: the model, its
    Setup (None: not yet), the turns. As JSON: to Python, true and 1 would be equal."""

    model: str
    setup: Optional[str] = None
    turns: List[str] = []


def conversation(
    ask: Ask, turns: List[Json], version: Tuple[int, ...]
) -> Conversation:
    """The conversation of `ask` with these turns. Raises RecursionError for JSON that
    is nested too deeply."""
    lines = [turn_line(turn, place, version) for place, turn in enumerate(turns)]
    return Conversation(ask.model, json.dumps(ask.setup), list(map(json.dumps, lines)))


# Finding it.

# Where its installers put it; launchd's and systemd's PATH are short.
PLACES = """
~/.local/bin ~/.claude/local ~/.claude/bin /opt/homebrew/bin /usr/local/bin /usr/bin
/home/linuxbrew/.linuxbrew/bin ~/.npm-global/bin ~/.npm/bin ~/.bun/bin ~/.volta/bin
~/.local/share/pnpm ~/Library/pnpm ~/.yarn/bin ~/n/bin ~/.asdf/shims
~/.local/share/mise/shims ~/.nix-profile/bin ~/.nvm/versions/node/*/bin
~/.fnm/node-versions/*/installation/bin
~/.local/share/fnm/node-versions/*/installation/bin
""".split()
NO_CLI = (
    "Claude Code was not found. Install it with `npm install -g "
    "@anthropic-ai/claude-code`, or give its path with --claude."
)


class Program(NamedTuple):
    """The CLI as installed; `stamp` changes when it is replaced."""

    path: str
    version: Tuple[int, ...]
    stamp: Tuple[Any, ...]

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))


def find_claude(chosen: str) -> str:
    """The CLI's path. Raises APIError 503 that says what to do."""
    if chosen:
        path = os.path.expanduser(chosen)
        program = shutil.which(path)
        if program:
            return os.path.abspath(program)
        problem = "can't be executed: chmod +x"
        if not os.path.isfile(path):
            problem = "is no file" if os.path.exists(path) else "does not exist"
        raise unavailable(f"The program given with --claude {problem}.", "no_cli")
    found = [shutil.which("claude")]
    for place in PLACES:
        matches = glob.glob(os.path.expanduser(place) + "/claude")
        found += sorted(matches, key=numbers_in, reverse=True)  # the newest node first
    for path in found:
        if path and os.access(path, os.X_OK):
            return os.path.abspath(path)  # the CLI runs in another directory
    raise unavailable(NO_CLI, "no_cli")


def numbers_in(path: str) -> List[int]:
    return [int(digits) for digits in re.findall(r"\d+", path)]


def stamp_of(path: str) -> Tuple[Any, ...]:
    real = os.path.realpath(path)
    with contextlib.suppress(OSError):
        stat = os.stat(real)
        return real, stat.st_mtime_ns, stat.st_size
    return (real,)


def probe(path: str) -> Program:
    """Run `claude --version`. Raises APIError 503 where the CLI can't be used."""
    stamp = stamp_of(path)
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", run_briefly(path, "--version").stdout)
    if not found:
        message = "What was found as `claude` does not tell its --version."
        raise unavailable(message, "no_cli")
    program = Program(path, tuple(map(int, found.groups())), stamp)
    if program.version < OLDEST_CLI:
        oldest, own = ".".join(map(str, OLDEST_CLI)), program.version_text
        message = f"Claude Code {own} is too old; {oldest} is needed: `claude update`."
        raise unavailable(message, "cli_too_old")
    return program


def is_logged_in(path: str) -> bool:
    """What `claude auth status` says."""
    out = run_briefly(path, "auth", "status")
    with contextlib.suppress(ValueError, AttributeError):
        return bool(json.loads(out.stdout).get("loggedIn"))
    return out.returncode == 0


def run_briefly(*argv: str) -> subprocess.CompletedProcess:
    """A short command of the CLI; one that can't run or hangs has exit code 1."""
    options: Json = {"stdin": subprocess.DEVNULL, "capture_output": True}
    options.update(text=True, errors="replace", env=environment(argv[0]))
    try:
        return subprocess.run(argv, timeout=PROBE_SECONDS, **options)
    except (OSError, subprocess.TimeoutExpired):
        return subprocess.CompletedProcess(argv, 1, "", "")


# Running it.


class Claude:
    """One CLI process. No method blocks; who owns it reads and writes when it can be.

    It is told the lines of `todo` one by one; `waiting` while an earlier turn has not
    been taken in. `conversation` is what it has been told, or will be when `todo` is
    empty. Owned by Keeper, then by the thread of the request that takes it, then by
    Keeper again until it is reaped. `home` is a directory that holds CWD; the CLI gets
    one there for its temporary files, too, which is removed when it is reaped.
    """

    def __init__(self, program: Program, model: str, home: str):
        self.program = program
        self.conversation = Conversation(model)
        self.tools: List[Json] = []
        self.todo: collections.deque = collections.deque()  # (line, whether to wait)
        self.outbox = bytearray()
        self.stdin_watched = False  # by the selector of the owner
        self.waiting = False
        self.partial: List[bytes] = []  # of a line without its end
        self.alive_at = self.born = time.monotonic()  # the last sign of life
        self.complaint = b""  # the end of its stderr
        self.stopped = 0.0  # when it was sent a signal
        self.scratch = tempfile.mkdtemp(dir=home)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [program.path, *ARGV, "--model", model],
            bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe,
            cwd=os.path.join(home, CWD),
            env={**environment(program.path), "CLAUDE_CODE_TMPDIR": self.scratch},
            start_new_session=True,  # a process group of its own, to end it whole
        )  # fmt: skip
        self.stdin, self.stdout, self.stderr = self.pipes = (
            self.process.stdin, self.process.stdout, self.process.stderr,
        )  # fmt: skip
        for pipe in self.pipes:
            os.set_blocking(pipe.fileno(), False)

    def is_usable(self, program: Program) -> bool:
        """Whether it is alive, and of the CLI that is installed now."""
        return self.program == program and self.process.poll() is None

    def fits(self, wanted: Conversation) -> bool:
        """Whether all that it has been told is the beginning of `wanted`. Another model
        is late when a turn was told: the CLI puts it into the conversation."""
        told = self.conversation
        if told.setup not in (None, wanted.setup):
            return False
        if told.turns or self.program.version < LATE_MODEL_CLI:
            count = len(told.turns)
            return told.model == wanted.model and told.turns == wanted.turns[:count]
        return True

    def readiness(self) -> Tuple[int, bool, float]:
        """What has been told most is ready first; of equals, what is up for longer."""
        told = self.conversation
        return len(told.turns), told.setup is not None, -self.born

    def tell(self, wanted: Conversation, query: Iterable[str] = ()) -> None:
        """Queue what it has not been told of `wanted`, which it fits, and `query`."""
        told, lines = self.conversation, []
        if told.model != wanted.model:
            lines.append(json.dumps(settings_line({"model": wanted.model})))
        if told.setup is None and wanted.setup:
            setup = Setup(*json.loads(wanted.setup))
            self.tools = setup.tools
            lines.append(json.dumps(initialize_line(setup)))
        turns = wanted.turns[len(told.turns) :]
        waits = [turn.startswith('{"type": "user"') for turn in turns]
        self.todo.extend((line, False) for line in lines)
        self.todo.extend(zip(turns, waits))
        self.todo.extend((line, False) for line in query)
        self.conversation, self.alive_at = wanted, time.monotonic()
        self.advance()

    def advance(self) -> None:
        """Send lines up to one whose result must be awaited."""
        lines = []
        while self.todo and not self.waiting:
            line, self.waiting = self.todo.popleft()
            lines.append(line)
        if lines:
            self.send("\n".join(lines))

    def send(self, text: str) -> None:
        self.outbox += text.encode() + b"\n"
        self.write()

    def write(self) -> None:
        """Write what the pipe takes. A CLI that is gone shows at its stdout."""
        try:
            while self.outbox:
                del self.outbox[: os.write(self.stdin.fileno(), self.outbox)]
        except BlockingIOError:
            return  # the rest when there is room
        except BrokenPipeError:
            self.outbox.clear()

    def read(self) -> Optional[List[Json]]:
        """The lines that have come, less those settled here; None at the end. Raises
        APIError 502 for what is no JSON."""
        data = read_some(self.stdout)
        if not data:
            return None if data == b"" else []
        head, newline, tail = data.rpartition(b"\n")
        if not newline:
            self.partial.append(data)
            if sum(map(len, self.partial)) > MAX_LINE:
                raise bad_gateway("The Claude CLI printed a line without an end.")
            return []
        lines = b"".join([*self.partial, head]).split(b"\n")
        self.partial = [tail]
        parsed = [parse_line(line) for line in lines if matters(line)]
        try:
            return [line for line in parsed if line and not self.settle(line)]
        except STRANGE:
            raise strange_line() from None

    def read_complaint(self) -> bool:
        """Drain stderr, keeping its end; False when there will be no more."""
        data = read_some(self.stderr)
        self.complaint = (self.complaint + (data or b""))[-2000:]
        return data != b""

    def settle(self, line: Json) -> bool:
        """Whether this line is none of the answer; what it asks for is done then."""
        kind = line.get("type")
        if kind == "stream_event":
            self.alive_at = time.monotonic()
        elif kind == "control_request":
            self.serve(line)
            return True
        elif kind == "result" and self.waiting and not line.get("is_error"):
            self.waiting, self.alive_at = False, time.monotonic()
            self.advance()
            return True
        return False

    def serve(self, line: Json) -> None:
        """Hold the client's tools, as an MCP server does."""
        message = line.get("request", {}).get("message", {})
        method, params = message.get("method"), message.get("params") or {}
        if method == "tools/call":
            return  # the client's part; this process ends with the answer
        result: Json = {}
        if method == "initialize":
            result = {"protocolVersion": params.get("protocolVersion")}
            result.update(capabilities={"tools": {}})
            result.update(serverInfo={"name": SERVER, "version": __version__})
        elif method == "tools/list":
            result = {"tools": self.tools}
        reply = {"jsonrpc": "2.0", "id": message.get("id", 0), "result": result}
        response = {"subtype": "success", "request_id": line.get("request_id")}
        response["response"] = {"mcp_response": reply}
        self.send(json.dumps({"type": "control_response", "response": response}))

    def stop(self, how: int = signal.SIGTERM) -> None:
        """Signal the whole group. After SIGTERM the CLI takes its session file away;
        SIGKILL is for one that would go on with a request of its own."""
        self.stopped = self.stopped or time.monotonic()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, how)

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()

    def is_gone(self) -> bool:
        """Whether it was reaped, its group killed; past its time it is killed here."""
        if self.process.poll() is None:
            if time.monotonic() - self.stopped > TERM_SECONDS:
                self.stop(signal.SIGKILL)
            return False
        self.stop(signal.SIGKILL)  # what it may have left in its group
        self.close()
        self.sweep()
        shutil.rmtree(self.scratch, ignore_errors=True)
        return True

    def sweep(self) -> None:
        """Remove the session files that it leaves behind if it was killed, or ended
        before it was ready to (2.1.330)."""
        home = os.environ.get("CLAUDE_CONFIG_DIR") or os.path.expanduser("~/.claude")
        sessions = os.path.join(home, "sessions")
        with contextlib.suppress(OSError):
            for name in os.listdir(sessions):  # glob() would keep each pattern
                if name.startswith(f"{self.process.pid}."):
                    os.unlink(os.path.join(sessions, name))


def read_some(pipe: Any) -> Optional[bytes]:
    """What is there; b"" at the end; None where there is nothing yet."""
    try:
        return os.read(pipe.fileno(), 1 << 16)
    except BlockingIOError:
        return None


def matters(line: bytes) -> bool:
    """Whether a line is worth parsing. There is a line of no use for each thought, and
    each finished block comes once more (its message has no stop_reason of its own; in a
    text the quotes would be escaped)."""
    if line.startswith(b'{"type":"system"'):
        return b'"subtype":"init"' in line or b'"api_retry"' in line
    if line.startswith(b'{"type":"assistant"'):
        return b'"stop_reason":null' not in line[:500]
    return line.startswith(b"{")


# What code that reads a line meets where the line is not of the shape we know.
STRANGE = (
    LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RecursionError,
)  # fmt: skip


def strange_line() -> APIError:
    return bad_gateway("The Claude CLI printed a strange line.")


def parse_line(line: bytes) -> Optional[Json]:
    """None for what is no JSON: other noise on stdout is skipped, too."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


Event = Tuple[Optional[Claude], Optional[Json]]


def listen(
    claudes: List[Claude], client: TimedReader, patience: float
) -> Iterator[Event]:
    """Yield (process, line) for what the CLIs print, (process, None) at the end of one,
    and (None, None) when there is no more for now, at least every tick, until all have
    been stopped.

    One selector serves their pipes and watches the client, so that nobody else is
    needed to notice that it left. Raises Disconnected, and APIError 504 after
    `patience` seconds without a sign of life.
    """
    running = list(claudes)
    with selectors.DefaultSelector() as selector:
        selector.register(client, selectors.EVENT_READ)
        for claude in claudes:
            selector.register(claude.stdout, selectors.EVENT_READ, claude)
            selector.register(claude.stderr, selectors.EVENT_READ, claude)
        while running:
            for claude in running:
                watch_stdin(selector, claude)
            for key, _ in selector.select(TICK_SECONDS):
                for line in serve_pipe(selector, key):
                    yield key.data, line
            if client.ended and client.has_left():
                raise Disconnected
            for claude in running[:]:
                if claude.stopped:
                    running.remove(claude)
                    forget(selector, claude)
                elif time.monotonic() - claude.alive_at > patience:
                    message = f"Claude was silent for {patience:g} seconds."
                    raise APIError(504, message, "timeout_error", "timeout")
            yield None, None


def serve_pipe(selector: selectors.BaseSelector, key: Any) -> List[Optional[Json]]:
    """Serve what is ready -> the lines that came; [None] at their end. (A client that
    is ready has left, or sends its next request already.)"""
    claude = key.data
    if claude is None:
        if key.fileobj.has_left():
            raise Disconnected
        if key.fileobj.is_full() or key.fileobj.ended:
            selector.unregister(key.fileobj)
    elif key.fileobj is claude.stdin:
        claude.write()
    elif key.fileobj is claude.stderr:
        if not claude.read_complaint():
            selector.unregister(key.fileobj)
    else:
        lines = claude.read()
        return [None] if lines is None else lines
    return []


def watch_stdin(selector: selectors.BaseSelector, claude: Claude) -> None:
    """Wait for room in its stdin while there is something to write, and only then."""
    if bool(claude.outbox) is claude.stdin_watched:
        return
    claude.stdin_watched = not claude.stdin_watched
    if claude.stdin_watched:
        selector.register(claude.stdin, selectors.EVENT_WRITE, claude)
    else:
        selector.unregister(claude.stdin)


def forget(selector: selectors.BaseSelector, claude: Claude) -> None:
    claude.stdin_watched = False
    for pipe in claude.pipes:
        with contextlib.suppress(KeyError):
            selector.unregister(pipe)


class Installation:
    """The CLI that is installed, and its login.

    `probing` guards all of it, and is held while the CLI is asked; nothing else is
    waited for meanwhile, so it can't deadlock. Single values are read without it.
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
        """The installed CLI, probed again when it was replaced. Raises APIError 503."""
        found = self.current()
        if not found:
            with self.probing:
                found = self.found = self.current() or probe(find_claude(self.chosen))
        return found

    def has_login(self) -> bool:
        """Whether the CLI is logged in; a "no" is doubted again, not too often."""
        path = self.program().path
        with self.probing:
            if not self.login and time.monotonic() > self.look_at:
                self.login = is_logged_in(path)
                self.look_at = time.monotonic() + LOGIN_SECONDS
            return bool(self.login)

    def look(self) -> Tuple[Optional[Program], str]:
        """-> (the CLI, if it can be used; what is wrong with it or its login)."""
        try:
            program = self.program()
            return program, "" if self.has_login() else LOGIN_CURE
        except APIError as error:
            return None, str(error)

    def login_works(self) -> None:
        with self.probing:
            self.login = True

    def login_refused(self) -> None:
        """The API says so; `claude auth status` only knows that there is a login."""
        with self.probing:
            self.login, self.look_at = False, time.monotonic() + REFUSED_SECONDS


class Keeper:
    """Starts the CLI's processes, keeps spare ones, sees that each one ends.

    A spare fits a request when all that it has been told is the beginning of what the
    request needs; the one that has been told most wins, and only the rest is sent. So
    there are blank ones, initialized ones (system prompt and tools) and primed ones (a
    conversation's turns). A process that was asked is never used again.

    When an answer begins, a spare is told the conversation so far, and a new process
    starts in its place; when the answer is out, the spare is told that, too. Where all
    are told, the one used least makes room for a blank one as soon as its conversation
    pauses. An old one is renewed, one at a time, so that another is there meanwhile; a
    server that nobody asks for REST_SECONDS lets its spares go.

    The main thread does all this: it has nothing else to do, so no thread is needed for
    it, and no token waits for it. `lock` guards all fields and the spares, and is held
    for no wait, so it can't deadlock; a signal's handler may take it again. `selector`,
    where the spares' pipes are, is waited for by the main thread; who takes a spare
    unregisters it there, which epoll and kqueue allow meanwhile.
    """

    def __init__(self, installation: Installation, most: int = 0):
        self.installation, self.most = installation, most
        self.lock = threading.RLock()
        self.live: Set[Claude] = set()  # answering
        self.dying: List[Claude] = []  # sent a signal, not reaped yet
        self.spares: List[Claude] = []  # the one used least recently first
        self.wishes: List[Tuple[Ask, List[Json]]] = []  # see expect()
        self.filling = False  # whether spares are to be started
        self.setups: collections.deque = collections.deque(maxlen=8)  # asked for before
        self.model = "sonnet"  # of the last request
        self.asked_at = time.monotonic()
        self.selector = selectors.DefaultSelector()
        self.home = ""  # see directory()

    def directory(self) -> str:
        """The CLIs' home (0700), made anew where a cleaner took it. Raises OSError."""
        with self.lock:
            if not os.path.isdir(self.home):
                self.home = tempfile.mkdtemp(prefix="claude-max-")
            os.makedirs(os.path.join(self.home, CWD), 0o700, exist_ok=True)
            return self.home

    def start(self, ask: Ask) -> Claude:
        """A process that has been told all of `ask`. Raises APIError 400, 503."""
        program = self.installation.program()
        try:
            wanted = conversation(ask, ask.turns[:-1], program.version)
            query = [json.dumps(line) for line in query_lines(ask, program.version)]
        except RecursionError:
            raise too_deep() from None
        claude = self.take(wanted, program) or self.spawn(program, ask.model)
        with self.lock:
            self.live.add(claude)
            self.asked_at, self.model = time.monotonic(), ask.model
        claude.tell(wanted, query)
        return claude

    def take(self, wanted: Conversation, program: Program) -> Optional[Claude]:
        """The spare that fits best, if any: nobody else's from here on."""
        with self.lock:
            usable = [c for c in self.spares if c.is_usable(program) and c.fits(wanted)]
            best = max(usable, key=Claude.readiness, default=None)
            return best and self.release(best)

    def spawn(self, program: Program, model: str) -> Claude:
        try:
            return Claude(program, model, self.directory())
        except OSError as error:
            reason = f"Claude Code can't be started: {error.strerror}."
            raise unavailable(reason, "no_cli") from error

    def release(self, claude: Claude) -> Claude:
        """Take a spare out of the main thread's hands. Needs the lock."""
        self.spares.remove(claude)
        forget(self.selector, claude)
        return claude

    def retire(self, claude: Claude) -> None:
        """End a process, if it was not yet; tick() reaps it, and closes its pipes: a
        CLI that lost its tools while it ends would ask the model what to do."""
        if not claude.stopped:
            claude.stop()
        with self.lock:
            self.live.discard(claude)
            self.dying.append(claude)

    def expect(self, ask: Ask, turns: List[Json]) -> None:
        """Have tick() prepare a spare for a request like `ask`, with these turns behind
        it. Without turns it is one for another conversation: blank at first, then,
        when the same system prompt and tools come again, initialized."""
        with self.lock:
            if self.most:
                self.wishes.append((ask, turns))
                self.filling = True

    def tick(self) -> None:
        """Reap what has ended, prepare and renew spares. The main thread's part."""
        self.reap()
        program = self.installation.current()
        self.drop([c for c in self.spares if c.program != program])
        with self.lock:
            wishes, self.wishes = self.wishes, []
        for ask, turns in wishes if program else ():
            with contextlib.suppress(APIError, RecursionError):
                self.prepare(ask, turns, program)
        self.renew()
        if program and self.filling:
            self.fill(program)

    def reap(self) -> None:
        for claude in self.dying[:]:
            if claude.is_gone():
                with self.lock:
                    self.dying.remove(claude)

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

    def fill(self, program: Program) -> None:
        self.filling = False
        with contextlib.suppress(APIError):  # the next request says what is wrong
            while len(self.spares) < self.most:
                claude = self.spawn(program, self.model)
                self.add(claude, claude.conversation)

    def renew(self) -> None:
        """Drop a spare that is too old, or the one of a conversation that pauses where
        no spare is blank; fill() starts another."""
        now, by_age = time.monotonic(), sorted(self.spares, key=lambda c: c.born)
        if not by_age or by_age[-1].born > now - STARTED_SECONDS:
            return  # one at a time
        old = [c for c in by_age if c.born < now - SPARE_SECONDS]
        if all(c.conversation.setup for c in self.spares):
            old += [c for c in self.spares[:-1] if c.alive_at < now - PAUSE_SECONDS]
        if old:
            self.drop(old[:1])
            self.filling = now < self.asked_at + REST_SECONDS

    def add(self, claude: Claude, wanted: Conversation) -> None:
        """A spare, to be told what it has not been told of `wanted`."""
        with self.lock:
            self.spares.append(claude)
            self.selector.register(claude.stdout, selectors.EVENT_READ, claude)
            self.selector.register(claude.stderr, selectors.EVENT_READ, claude)
            claude.tell(wanted)
            watch_stdin(self.selector, claude)

    def feed(self, key: Any) -> None:
        """A pipe of a spare is ready: let it take in what it is told. One that fails or
        ends is dropped."""
        with self.lock:
            if key.data not in self.spares:
                return  # it was taken in this very moment
            try:
                lines = serve_pipe(self.selector, key)
                failed = any(line is None or line.get("is_error") for line in lines)
            except APIError:
                failed = True
            if failed:
                self.drop([key.data])
            else:
                watch_stdin(self.selector, key.data)

    def drop(self, claudes: List[Claude]) -> None:
        """Retire these, as far as they are spares."""
        with self.lock:
            for claude in [c for c in claudes if c in self.spares]:
                self.retire(self.release(claude))

    def spare_no_more(self) -> None:
        with self.lock:
            self.most = 0
            self.wishes.clear()
            self.drop(self.spares[:])

    def stop_all(self, how: int) -> None:
        with self.lock:
            claudes = [*self.live, *self.dying, *self.spares]
        for claude in claudes:
            claude.stop(how)

    def close(self) -> None:
        self.selector.close()
        shutil.rmtree(self.home, ignore_errors=True)


# ── Response ───────────────────────────────────────────────────────────────────────
# CLI lines -> (Answer) deltas -> (Reply) chunks or a completion. Pure: ids and times
# are passed in. A kind of line or event is skipped until it has a row in Answer.LINES
# or Answer.EVENTS.

FINISH_REASONS = {  # the Messages API's stop_reason -> OpenAI's finish_reason
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
# After these the CLI is done, unless it has nothing to show; after all others it may go
# on with a request of its own, also while it ends.
CALM_STOPS = ("end_turn", "stop_sequence")
Deltas = Optional[List[Json]]


class Answer:
    """One choice in the making: feed() takes a CLI line and returns OpenAI deltas.

    `finish_reason` is set when it is complete; `calm` tells whether the CLI would now
    keep still. When a stream breaks, the CLI has the answer told again from its start,
    and only what is new comes out: `said` is what was told, by channel ("content",
    "reasoning_content" or the index of a tool call), `again` what is still to be
    skipped of it.
    """

    def __init__(self, ask: Ask, index: int = 0, now: float = 0.0):
        self.index, self.now = index, now
        self.stops, self.names, self.properties = ask.stops, ask.names, ask.properties
        self.tools = [tool["name"] for tool in ask.setup.tools]
        self.structured = ask.structured
        self.model = ""
        self.usage: Dict[str, int] = {}
        self.finish_reason: Optional[str] = None
        self.calm = False
        self.calls: List[Json] = []  # {id, name}
        self.blocks: List[Json] = []  # the finished ones, with their signatures
        self.category: Any = None  # of a failure to come
        self.failed_before = ""  # the text of a failure of the CLI's own
        self.resets_at = 0.0  # when the rate limit ends, epoch seconds
        self.said: Dict[Any, List[str]] = {}
        self.again: Dict[Any, str] = {}
        self.held = ""  # text that may be the beginning of a stop string
        self.block: Json = {}  # the open content block
        self.channel: Any = None  # where its deltas go
        self.call_count = 0  # in the message as it is being told
        self.pieces: List[str] = []  # of the arguments of the open block

    def feed(self, line: Json) -> List[Json]:
        """Raises APIError for a failure that the CLI tells of, 502 for a line of a
        known kind whose shape is not."""
        try:
            handler = self.LINES.get(line["type"])
            return (handler(self, line) if handler else None) or []
        except STRANGE:
            raise strange_line() from None

    def on_event(self, line: Json) -> Deltas:
        event = line["event"]
        handler = self.EVENTS.get(event["type"])
        if handler is None or line.get("parent_tool_use_id"):
            return None
        return handler(self, event)

    def on_message_start(self, event: Json) -> Deltas:
        first, message = not self.model, event["message"]
        self.model = string(message["model"])
        self.count(message["usage"])
        self.again = {key: "".join(parts) for key, parts in self.said.items() if parts}
        self.call_count, self.blocks = 0, []
        return [{"content": ""}] if first else None  # a sign of life

    def on_block_start(self, event: Json) -> Deltas:
        self.block = block = dict(event["content_block"])
        kind = block["type"]
        if kind != "tool_use":
            channels = {"text": "content", "thinking": "reasoning_content"}
            self.channel = channels.get(kind)
            return None
        self.pieces = []
        if not (self.structured and block["name"] == STRUCTURED_OUTPUT):
            return self.on_call(block)
        first = all(known["name"] != STRUCTURED_OUTPUT for known in self.blocks
                    if known["type"] == "tool_use")  # fmt: skip
        self.channel = "content" if first else None  # a second one is never told
        return None

    def on_call(self, block: Json) -> Deltas:
        index = self.channel = self.call_count
        self.call_count += 1
        name = self.names.get(block["name"], block["name"])
        if index < len(self.calls):  # told again; the first id stands
            if self.calls[index]["name"] != name:
                raise told_differently()
            return None
        call_id = string(block["id"])
        self.calls.append({"id": call_id, "name": name})
        function = {"name": string(name), "arguments": ""}
        call = {"id": call_id, "type": "function", "function": function}
        return [{"tool_calls": [{"index": index, **call}]}]

    def on_block_delta(self, event: Json) -> Deltas:
        delta = event["delta"]
        kind = delta["type"]
        if kind == "text_delta":
            self.block["text"] += delta["text"]
            return self.say("content", delta["text"])
        if kind == "input_json_delta":
            self.pieces.append(string(delta["partial_json"]))
            if self.properties.get(self.block.get("name")):
                return None  # told as a whole, by the client's names
            return self.say(self.channel, delta["partial_json"])
        if kind == "thinking_delta":
            self.block["thinking"] += delta["thinking"]
            return self.say("reasoning_content", delta["thinking"])
        if kind == "signature_delta":
            self.block["signature"] += delta["signature"]
        return None

    def on_block_stop(self, event: Json) -> Deltas:
        block, text = self.block, "".join(self.pieces)
        if block["type"] != "text" or block["text"].strip():
            self.blocks.append(block)  # the API refuses an empty text
        if block["type"] != "tool_use":
            return None
        names = self.properties.get(block["name"])
        if text and not names:
            return None  # it was told piece by piece
        value = json.loads(text) if text else block["input"]
        value = {(names or {}).get(key, key): item for key, item in value.items()}
        return self.say(self.channel, json.dumps(value, ensure_ascii=False))

    def on_message_delta(self, event: Json) -> Deltas:
        self.count(event.get("usage") or {})
        reason = event["delta"].get("stop_reason")
        return self.finish(reason) if reason else None

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
            return None
        if self.category or not message.get("stop_reason"):
            return None
        deltas = self.on_message_start({"message": message}) or []
        for block in message["content"]:
            deltas += self.on_block_start({"content_block": block}) or []
            if block["type"] in ("text", "thinking"):
                deltas += self.say(self.channel, block[block["type"]]) or []
            deltas += self.on_block_stop({}) or []
        return deltas + (self.finish(message["stop_reason"]) or [])

    def on_result(self, line: Json) -> Deltas:
        """The end of the turn. An answer would have been complete before."""
        if not line.get("is_error") and not self.failed_before:
            raise bad_gateway("Claude ended without an answer.")
        words = line.get("terminal_reason"), self.category
        text = str(line.get("result") or self.failed_before)
        status = line.get("api_error_status")
        if not line.get("is_error"):  # 2.1.112 refuses an image by itself so
            status = 400
        raise failure(status, words, text, self.resets_at - self.now)

    def on_system(self, line: Json) -> Deltas:
        """The tools that the CLI took, or a retry to come: it helps against the API's
        own troubles alone."""
        if line.get("subtype") == "init":
            self.expect_tools(line.get("tools") or [])
        if line.get("subtype") != "api_retry":
            return None
        status, category = line["error_status"] or 0, line.get("error")
        if 400 <= status < 500:
            text = f"The Claude API answered {status} ({category})."
            raise failure(status, (None, category), text, line["retry_delay_ms"] / 1000)
        return None

    def expect_tools(self, taken: List[str]) -> None:
        """The CLI drops a tool whose schema it does not like, in silence."""
        taken = [*taken, *(["Agent"] if "Task" in taken else [])]  # shown as one name
        lost = [self.names.get(t, t) for t in self.tools if t not in taken]
        if lost:
            message = f"Claude Code does not take the schema of '{lost[0]}'."
            raise bad("tools", message, "invalid_schema")

    def on_rate_limit(self, line: Json) -> Deltas:
        self.resets_at = line["rate_limit_info"].get("resetsAt") or 0.0
        return None

    EVENTS = {
        "message_start": on_message_start,
        "content_block_start": on_block_start,
        "content_block_delta": on_block_delta,
        "content_block_stop": on_block_stop,
        "message_delta": on_message_delta,
    }
    LINES = {
        "stream_event": on_event,
        "assistant": on_assistant,
        "result": on_result,
        "system": on_system,
        "rate_limit_event": on_rate_limit,
    }

    def say(self, channel: Any, text: str) -> Deltas:
        """The delta for what is new of `text`."""
        text = string(text)
        if channel is None:
            return None
        if channel in self.again:
            text = self.unsaid(channel, text)
        self.said.setdefault(channel, []).append(text)
        if channel == "content":
            text = self.hold_back(text)
        if not text:
            return None
        if isinstance(channel, int):
            part = {"index": channel, "function": {"arguments": text}}
            return [{"tool_calls": [part]}]
        return [{channel: text}]

    def unsaid(self, channel: Any, text: str) -> str:
        """What is new of a text that is told again."""
        if channel == "reasoning_content":
            return ""  # a second train of thought; the first one stands
        said = self.again.pop(channel)
        if text.startswith(said):
            return text[len(said) :]
        if not said.startswith(text):
            raise told_differently()
        self.again[channel] = said[len(text) :]  # never "", see above
        return ""

    def hold_back(self, text: str) -> str:
        """Cut at a stop string; keep what may become one, and half an emoji."""
        half = "\ud800" <= text[-1:] <= "\udbff"
        if not (self.stops or self.held or half):
            return text
        text = self.held + text
        found = [place for place in map(text.find, self.stops) if place >= 0]
        if found:
            self.held, self.finish_reason, self.calm = "", "stop", True
            return text[: min(found)]
        keep = max([open_end(text, stop) for stop in self.stops] + [int(half)])
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self, reason: str) -> Deltas:
        """The message is complete: let go of what was held back."""
        if self.finish_reason:
            return None  # it was cut at a stop string
        untold = self.again.keys() - {"reasoning_content"}
        if untold or self.call_count < len(self.calls):
            raise told_differently()
        self.finish_reason = FINISH_REASONS.get(reason, "stop")
        if reason == "tool_use" and not self.calls:
            self.finish_reason = "stop"  # it was the structured output's own tool
        self.calm = reason in CALM_STOPS and any(self.said.get("content", ()))
        return [{"content": self.held}] if self.held else None


def string(value: Any) -> str:
    if type(value) is not str:
        raise TypeError
    return value


def printable(text: str) -> str:
    """As one word of a log line."""
    return re.sub(r"[^!-~]", "?", text)


def told_differently() -> APIError:
    message = "The connection broke, and Claude began another answer."
    return bad_gateway(message, "stream_interrupted")


def open_end(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def tells(delta: Delta) -> bool:
    """Whether it brings something of the answer, not just a sign of life."""
    _, told, reason = delta
    return bool(reason or told.get("content") or len(told.keys() - {"role", "content"}))


def openai_usage(usages: List[Dict[str, int]]) -> Json:
    """The Messages API's usage of each choice -> OpenAI's, summed. Its input_tokens
    leave out what was read from, or written to, the prompt cache."""

    def total(*keys: str) -> int:
        return sum(usage.get(key, 0) for usage in usages for key in keys)

    cached, written = "cache_read_input_tokens", "cache_creation_input_tokens"
    prompt, completion = total("input_tokens", cached, written), total("output_tokens")
    usage: Json = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": total(cached)},
    }
    if any("thinking_tokens" in usage for usage in usages):
        reasoning = {"reasoning_tokens": total("thinking_tokens")}
        usage["completion_tokens_details"] = reasoning
    return usage


Delta = Tuple[int, Json, Optional[str]]  # index of the choice, delta, finish_reason


class Choice:
    """One choice's deltas, put together again. Its texts are kept by channel, as in
    Answer."""

    def __init__(self) -> None:
        self.finish_reason: Optional[str] = None
        self.texts: Dict[Any, List[str]] = collections.defaultdict(list)
        self.calls: List[Json] = []  # as they began

    def add(self, delta: Json) -> None:
        for channel, told in delta.items():
            if channel == "tool_calls":
                call = told[0]
                if "id" in call:
                    self.calls.append(call)
                channel, told = call["index"], call["function"]["arguments"]
            self.texts[channel].append(told)

    def message(self) -> Json:
        def text(channel: Any) -> str:
            return "".join(self.texts[channel])

        content, reasoning = text("content"), text("reasoning_content")
        empty = None if self.calls else ""
        message = {"role": "assistant", "content": content or empty, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        calls = []
        for call in self.calls:
            function = {**call["function"], "arguments": text(call["index"])}
            calls.append({"id": call["id"], "type": "function", "function": function})
        return {**message, "tool_calls": calls} if calls else message


class Reply:
    """One response: its deltas as chunks, and folded into the completion that they
    would have been without `stream`."""

    def __init__(self, ask: Ask, id: str, created: int):
        self.ask, self.id, self.created = ask, id, created
        self.model = ask.requested  # until the API tells its own name for it
        self.choices: Dict[int, Choice] = {}
        self.usage: Optional[Json] = None
        self.first: Optional[float] = None  # seconds until its first token

    def add(self, index: int, delta: Json, reason: Optional[str] = None) -> Delta:
        """The first one of each choice tells the role."""
        choice = self.choices.get(index)
        if choice is None:
            choice = self.choices[index] = Choice()
            delta = {"role": "assistant", "content": "", **delta}
        choice.add(delta)
        choice.finish_reason = reason or choice.finish_reason
        return index, delta, reason

    def chunk(self, delta: Optional[Delta], usage: Optional[Json] = None) -> str:
        """A chunk as JSON; the one of the usage has no delta."""
        keys = "index", "delta", "finish_reason"
        choices = [dict(zip(keys, delta))] if delta else []
        chunk = {"id": self.id, "object": "chat.completion.chunk"}
        chunk.update(created=self.created, model=self.model, choices=choices)
        if self.ask.include_usage:
            chunk["usage"] = usage
        return json.dumps(chunk)

    def notes(self) -> Json:
        """What the log says of it."""
        notes: Json = {"model": printable(self.model)[:60]}
        if self.first is not None:
            notes["first"] = f"{self.first:.3f}"
        if self.usage:
            cached = self.usage["prompt_tokens_details"]["cached_tokens"]
            notes.update({"in": self.usage["prompt_tokens"], "cached": cached})
            notes["out"] = self.usage["completion_tokens"]
        return notes

    def completion(self) -> Json:
        choices = [
            {"index": i, "message": choice.message(), "logprobs": None,
             "finish_reason": choice.finish_reason}
            for i, choice in sorted(self.choices.items())
        ]  # fmt: skip
        head = {"id": self.id, "object": "chat.completion", "created": self.created}
        return {**head, "model": self.model, "choices": choices, "usage": self.usage}


# ── HTTP ───────────────────────────────────────────────────────────────────────────
# To add an endpoint, add a method to Handler and a row to Handler.ROUTES. Who may ask
# is one ladder, Handler.guard().


class Gate:
    """At most `width` CLI processes at once; who waits is served in order.

    `changed` guards `active` and `queue`. Only waits for itself to change happen under
    it, and no other lock is taken, so it can't deadlock.
    """

    def __init__(self, width: int):
        self.width = width
        self.active = 0
        self.queue: collections.deque = collections.deque()
        self.changed = threading.Condition()

    def enter(self, places: int, client: TimedReader) -> Iterator[None]:
        """Yield while waiting. Raises APIError 429, Disconnected."""
        ticket = object()
        if places > self.width:
            raise bad("n", f"'n' must not exceed this server's limit of {self.width}.")
        with self.changed:
            if len(self.queue) >= MAX_WAITING:
                message = "Too many requests are waiting for this server."
                code = "queue_full"
                raise APIError(429, message, "rate_limit_error", code, Retry_After="5")
            self.queue.append(ticket)
        try:
            while not self.admitted(ticket, places):
                yield None
                if client.has_left():
                    raise Disconnected
        finally:
            with self.changed:
                self.queue.remove(ticket)
                self.changed.notify_all()

    def admitted(self, ticket: object, places: int) -> bool:
        """Whether it is this one's turn, now or within a tick."""

        def is_next() -> bool:
            return self.queue[0] is ticket and self.active + places <= self.width

        with self.changed:
            its_turn = self.changed.wait_for(is_next, TICK_SECONDS)
            self.active += places if its_turn else 0
            return its_turn

    def leave(self, places: int) -> None:
        with self.changed:
            self.active -= places
            self.changed.notify_all()


class Server(http.server.ThreadingHTTPServer):
    """The shared state: Settings, Gate, Keeper, and what past answers taught.

    Its other attributes are single values or dicts that threads set and read whole,
    which needs no lock.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 512

    def __init__(self, settings: Settings):
        self.settings = settings
        is_v6 = ":" in settings.host
        self.address_family = socket.AF_INET6 if is_v6 else socket.AF_INET
        super().__init__((settings.host, settings.port), Handler)
        self.socket.setblocking(False)  # BSD: a client may leave before accept()
        self.gate = Gate(settings.max_concurrency)
        self.installation = Installation(settings.claude)
        self.keeper = Keeper(self.installation, settings.spares)
        self.origins = set(re.findall(r"[^\s,]+", settings.allow_origin))
        self.thoughts: Thoughts = {}
        self.rate_limit: Optional[Json] = None
        self.limit_told: Tuple[Any, Any] = (None, None)  # its type and status
        self.started = time.monotonic()
        self.stopping = False
        self.busy: Set[Handler] = set()  # whose request is not answered yet
        self.woken, self.waker = socket.socketpair()  # ends the main thread's wait
        for end in (self.woken, self.waker):
            end.setblocking(False)

    def server_bind(self) -> None:
        """Without HTTPServer's getfqdn(), which can wait for a name server."""
        super(http.server.HTTPServer, self).server_bind()
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Handler.answer() has logged what is worth it; the rest are lost clients."""

    def wake(self) -> None:
        with contextlib.suppress(OSError):
            self.waker.send(b"\0")

    def was_woken(self) -> None:
        self.woken.recv(4096)

    def serve(self) -> None:
        """The main thread's life: accept, feed the spares, reap; until `stopping`."""
        selector = self.keeper.selector
        selector.register(self.socket, selectors.EVENT_READ, self.accept)
        selector.register(self.woken, selectors.EVENT_READ, self.was_woken)
        while not self.stopping:
            self.keeper.tick()
            for key, _ in selector.select(TICK_SECONDS):
                if isinstance(key.data, Claude):
                    self.keeper.feed(key)
                else:
                    key.data()

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
        """Give answers in flight a moment, then end every process."""
        self.server_close()
        self.keeper.spare_no_more()
        deadline = time.monotonic() + DRAIN_SECONDS
        while self.busy and time.monotonic() < deadline:
            self.keeper.tick()
            time.sleep(0.01)
        self.keeper.stop_all(signal.SIGTERM)
        while self.busy or self.keeper.dying:
            if time.monotonic() > deadline + TERM_SECONDS:
                self.keeper.stop_all(signal.SIGKILL)
                self.busy.clear()  # whoever does not read is not waited for
            self.keeper.tick()
            time.sleep(0.01)
        self.keeper.close()
        self.woken.close()
        self.waker.close()

    def answer(self, reply: Reply, client: TimedReader) -> Iterator[Optional[Delta]]:
        """The deltas of one response, from its place in the queue to the end of its
        processes, one for each choice; None when there is no more for now."""
        ask, begun = reply.ask, time.monotonic()
        yield from self.gate.enter(ask.n, client)
        claudes: List[Claude] = []
        try:
            self.refuse_when_stopping()
            for _ in range(ask.n):
                claudes.append(self.keeper.start(ask))
            with contextlib.closing(self.converse(reply, claudes, client)) as deltas:
                for delta in deltas:
                    if reply.first is None and delta and tells(delta):
                        reply.first = time.monotonic() - begun
                    yield delta
        except APIError as error:
            if error.status == 401:
                self.installation.login_refused()
                self.keeper.drop(self.keeper.spares[:])  # they know the old login
            raise
        finally:
            for claude in claudes:
                self.keeper.retire(claude)
            self.gate.leave(ask.n)

    def converse(
        self, reply: Reply, claudes: List[Claude], client: TimedReader
    ) -> Iterator[Optional[Delta]]:
        ask, now, begun = reply.ask, time.time(), False
        answers = {claude: Answer(ask, i, now) for i, claude in enumerate(claudes)}
        lines = listen(claudes, client, self.settings.timeout)
        with contextlib.closing(lines):
            for claude, line in lines:
                if claude is None:
                    yield None
                    continue
                if claude.stopped:
                    continue  # what came behind its answer, or behind our signal
                if line is None:
                    raise self.died(claude)
                answer = answers[claude]
                deltas = answer.feed(line)
                if answer.finish_reason:
                    claude.stop(signal.SIGTERM if answer.calm else signal.SIGKILL)
                reply.model = answer.model or reply.model
                if deltas and not begun:
                    begun = True
                    self.expect(ask, ask.turns if ask.goes_on else [])
                for delta in deltas:
                    yield reply.add(answer.index, delta)
                if answer.finish_reason:
                    yield reply.add(answer.index, {}, answer.finish_reason)
                elif line["type"] == "rate_limit_event":
                    self.note_limit(line["rate_limit_info"])
        if not all(answer.finish_reason for answer in answers.values()):
            raise unavailable("The server is stopping.", "stopping")
        reply.usage = openai_usage([answer.usage for answer in answers.values()])
        self.learn(ask, answers.values())

    def note_limit(self, info: Json) -> None:
        """Keep what the CLI tells of the plan's limit, for /health; log it when it
        begins to warn."""
        told = info.get("rateLimitType"), info.get("status")
        if told != self.limit_told and "allowed" != told[1]:
            shown = ("rateLimitType", "status", "utilization", "resetsAt")
            log(" ".join(["limit", *(f"{k}={info[k]}" for k in shown if k in info)]))
        self.rate_limit, self.limit_told = info, told

    def refuse_when_stopping(self) -> None:
        if self.stopping:
            raise unavailable("The server is stopping.", "stopping")

    def died(self, claude: Claude) -> APIError:
        """The error for a process whose output ended before its answer did."""
        self.refuse_when_stopping()
        with contextlib.suppress(subprocess.TimeoutExpired):
            claude.process.wait(TICK_SECONDS)
        if self.settings.verbose and claude.complaint:
            log("claude: " + claude.complaint.decode("utf-8", "replace"))
        code = claude.process.returncode
        message = f"The Claude CLI ended (exit code {code}) before its answer did."
        return bad_gateway(message, "cli_died")

    def learn(self, ask: Ask, answers: Iterable[Answer]) -> None:
        """An answer is complete: keep its signed thinking for the next request of its
        tool loop."""
        self.installation.login_works()
        for answer in answers:
            if answer.calls and any("thinking" in b["type"] for b in answer.blocks):
                thought = Thought(ask.model, answer.model, answer.blocks)
                self.thoughts[answer.calls[0]["id"]] = thought
        while len(self.thoughts) > MAX_THOUGHTS:
            self.thoughts.pop(next(iter(list(self.thoughts))), None)

    def expect(self, ask: Ask, turns: List[Json]) -> None:
        """An answer begins, or is out: let the main thread have a process ready for the
        next request."""
        self.keeper.expect(ask, turns)
        self.wake()

    def expect_next_turn(self, reply: Reply) -> None:
        ask, message = reply.ask, reply.choices[0].message()
        script = Transcript(self.thoughts, ask.model, ask.properties, ask.turns)
        with contextlib.suppress(APIError):  # two calls of one id
            script.add(message, "answer")
            self.expect(ask, script.turns)

    def health(self) -> Tuple[int, Json]:
        """-> (status, body) of /health."""
        program, problem = self.installation.look()
        claude = {
            "path": program.path if program else None,
            "version": program.version_text if program else None,
            "logged_in": self.installation.login if program else None,
        }
        body = {"status": "error" if problem else "ok", "version": __version__}
        body.update({"message": problem} if problem else {}, claude=claude)
        body.update(active=self.gate.active, waiting=len(self.gate.queue))
        body.update(spares=len(self.keeper.spares), rate_limit=self.rate_limit)
        body.update(uptime=round(time.monotonic() - self.started))
        return (503 if problem else 200), body


class TimedReader(io.RawIOBase):
    """A socket to read from, with a deadline for a whole request, so that a byte now
    and then does not keep a thread for ever."""

    def __init__(self, connection: socket.socket, poke: Any):
        self.connection, self.poke = connection, poke
        self.ended = False  # the client will send no more
        self.poke_at = 0.0
        self.deadline: Optional[float] = None  # None: between requests
        self.ahead = bytearray()  # came while the last request was being answered

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.connection.fileno()

    def has_left(self) -> bool:
        """Whether the client is gone. What it sends instead is kept."""
        if self.is_full():
            return False  # not to be seen behind so much
        if self.ended:
            return not self.listens()
        self.connection.setblocking(False)  # who reads or writes sets its own time-out
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
        9.6): a closed socket answers a write with a reset, and fails the next one."""
        if time.monotonic() < self.poke_at:
            return True
        try:
            for pause in (0.02, 0.0):
                self.poke()
                time.sleep(pause)
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


GO_ON = b"HTTP/1.1 100 Continue\r\n\r\n"


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection. A request leaves by send_json() or stream(), a refused one by
    fail(); answer() logs each one, once."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a token must not wait for the next one
    server: Server

    def setup(self) -> None:
        super().setup()
        self.reader = TimedReader(self.connection, self.poke)
        self.rfile = io.BufferedReader(self.reader)

    def handle_one_request(self) -> None:
        self.reader.deadline = None
        self.reply: Optional[Reply] = None
        self.headers = None  # of the request before
        self.opening = b""  # of a stream: goes out with the first event
        self.status = 0
        self.body_unread = self.streaming = self.chunked = False
        self.pending: List[str] = []  # events to be sent
        try:
            super().handle_one_request()
        except OSError:  # gone, or too slow: there is nobody to tell
            self.close_connection = True

    def answer(self) -> None:
        """Any method of any path."""
        begun = time.monotonic()
        self.server.busy.add(self)
        try:
            self.route()
        except APIError as error:
            self.fail(error)
        except (Disconnected, OSError):
            self.status = 499  # nginx's word for a client that left
            self.close_connection = True
        except Exception as error:  # a bug of ours must not look like a hang-up
            trace = error.__traceback__
            while trace and trace.tb_next:
                trace = trace.tb_next
            where = f"line {trace.tb_lineno}" if trace else "?"
            log(f"internal error: {type(error).__name__}, {where}")  # no prompt text
            self.fail(APIError(500, "Internal error of the proxy.", "api_error"))
        self.server.busy.discard(self)
        self.log_answer(time.monotonic() - begun)
        self.skip_body()

    def __getattr__(self, name: str) -> Any:
        """http.server asks for do_GET and so on: route() knows what is allowed."""
        if name.startswith("do_"):
            return self.answer
        raise AttributeError(name)

    def route(self) -> None:
        self.guard()
        path = urllib.parse.unquote(self.path.split("?")[0]).rstrip("/")
        path = path[len("/v1") :] if path.startswith("/v1/") else path
        if path.startswith("/models/"):
            path, self.model_id = "/models/", path[len("/models/") :]
        methods = self.ROUTES.get(path)
        if methods is None:
            message = f"There is no {self.path[:100]} here. Try /v1/chat/completions."
            raise APIError(404, message, code="unknown_url")
        method = "GET" if self.command == "HEAD" else self.command
        if method not in methods:
            allowed = ", ".join([*methods, *(["HEAD"] if "GET" in methods else [])])
            message = f"{self.command} is not allowed here; {allowed} is."
            raise APIError(405, message, Allow=allowed)
        methods[method](self)

    def guard(self) -> None:
        """Who may ask. Raises APIError 400, 401, 403, 503."""
        self.body_unread = any(
            self.headers.get(name, "0") != "0"
            for name in ("Content-Length", "Transfer-Encoding")
        )
        if "close" in re.split(r"[\s,]+", self.headers.get("Connection", "").lower()):
            self.close_connection = True
        folded = any(re.search(r"[\r\n]", text) for text in self.headers.values())
        if folded or self.headers.defects:
            self.body_unread = True  # who knows what else was meant as a header
            raise APIError(400, "A header is malformed.")
        hosts = self.headers.get_all("Host") or []
        if len(hosts) > 1 or (not hosts and self.request_version != "HTTP/1.0"):
            raise APIError(400, "A request needs one Host header.")
        absolute = re.match("(?i)https?://([^/?]*)(.*)", self.path)
        if absolute:  # its host stands instead of the header's (RFC 9112, 3.2.2)
            hosts, self.path = [absolute[1]], absolute[2]
        if hosts and not self.is_our_name(hosts[0]):
            raise forbidden("This Host is not served; see --host.")
        origin = self.headers.get("Origin")
        if origin is not None and not self.is_allowed_origin(origin):
            raise forbidden("This web origin may not ask; see --allow-origin.")
        if origin is None and self.headers.get("Sec-Fetch-Site") == "cross-site":
            raise forbidden("Web pages of other sites may not ask.")
        if self.server.settings.api_key and self.command != "OPTIONS":
            self.check_key(self.server.settings.api_key)
        self.server.refuse_when_stopping()

    def check_key(self, key: str) -> None:
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = self.headers.get("X-Api-Key", "")
        given = given.strip().encode("latin-1", "replace")
        if not hmac.compare_digest(given, key.encode()):
            message, code = "Incorrect API key provided.", "invalid_api_key"
            raise APIError(401, message, "authentication_error", code)

    def is_our_name(self, host: str) -> bool:
        """Against DNS rebinding: a foreign name that was made to mean our address. On
        all interfaces, where a key is a must, the key guards."""
        name = re.sub(r":\d*$", "", host.strip().lower()).strip("[]")
        bound = self.server.settings.host.lower()
        return bound in ("0.0.0.0", "::") or is_loopback(name) or name == bound

    def is_allowed_origin(self, origin: str) -> bool:
        """This machine's pages, applications, and what --allow-origin names."""
        scheme, _, rest = origin.lower().partition("://")
        if origin in self.server.origins:
            return True
        if scheme not in ("http", "https"):
            return bool(rest)  # app://, vscode-webview://, …; not "null", "file://"
        return is_loopback(re.sub(r":\d*$", "", rest).strip("[]"))

    def preflight(self) -> None:
        """CORS (Fetch standard, 3.3): what a browser asks before the request."""
        asked = self.headers.get("Access-Control-Request-Headers", "*")
        headers = {
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": re.sub(r"[^\w*, -]", "", asked),
            "Access-Control-Max-Age": "600",
        }
        if self.headers.get("Access-Control-Request-Private-Network"):
            headers["Access-Control-Allow-Private-Network"] = "true"
        self.send_json(204, None, headers)

    def get_health(self) -> None:
        self.send_json(*self.server.health())

    def get_models(self) -> None:
        models = [model_object(name) for name in KNOWN_MODELS]
        self.send_json(200, {"object": "list", "data": models})

    def get_model(self) -> None:
        cli_model(self.model_id)
        self.send_json(200, model_object(self.model_id))

    def post_chat(self) -> None:
        try:
            ask = parse_request(self.read_json(), self.server.thoughts)
        except RecursionError:
            raise too_deep() from None
        name, now = "chatcmpl-" + os.urandom(12).hex(), int(time.time())
        self.reply = Reply(ask, name, now)
        deltas = self.server.answer(self.reply, self.reader)
        try:
            with contextlib.closing(deltas):
                if ask.stream:
                    return self.stream(deltas)
                collections.deque(deltas, maxlen=0)
            self.send_json(200, self.reply.completion())
        finally:
            if self.reply.usage and ask.goes_on:
                self.server.expect_next_turn(self.reply)

    ROUTES = {
        "/health": {"GET": get_health, "OPTIONS": preflight},
        "/models": {"GET": get_models, "OPTIONS": preflight},
        "/models/": {"GET": get_model, "OPTIONS": preflight},
        "/chat/completions": {"POST": post_chat, "OPTIONS": preflight},
    }

    # Reading.

    def parse_request(self) -> bool:
        if self.raw_requestline in (b"\r\n", b"\n"):
            self.close_connection = False  # skipped (RFC 9112, 2.2)
            return False
        return super().parse_request()

    def handle_expect_100(self) -> bool:
        """Leave "100 Continue" to read_body(): it comes after the guards."""
        return True

    def read_json(self) -> Any:
        """The request body. Raises APIError 400, 413, 415."""
        browser = "Origin" in self.headers or "Sec-Fetch-Site" in self.headers
        if browser and self.headers.get_content_type() != "application/json":
            raise APIError(415, "Content-Type must be application/json.")
        raw = self.read_body()
        self.body_unread = False
        try:
            return parse_json(raw)
        except ValueError:
            raise bad("", "The request body is not valid JSON in UTF-8.") from None

    def read_body(self) -> bytes:
        """By Content-Length or chunked (RFC 9112, 6 and 7.1), never both."""
        lengths = self.headers.get_all("Content-Length") or []
        codings = self.headers.get_all("Transfer-Encoding") or []
        chunked = [coding.strip().lower() for coding in codings] == ["chunked"]
        if len(lengths) + len(codings) > 1 or bool(codings) is not chunked:
            raise bad("", "The length of the request body is ambiguous.")
        length = lengths[0].strip() if lengths else "0"
        if not re.fullmatch(r"[0-9]{1,18}", length):
            raise bad("", "Content-Length must be a number.")
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
        body = bytearray()
        while True:
            line = self.rfile.readline(1024)
            size = re.match(rb"([0-9a-fA-F]{1,8})[ \t]*(;.*)?\r?\n", line)
            if not size:
                raise bad("", "The chunked request body is malformed.")
            count = int(size[1], 16)
            if len(body) + count > MAX_BODY:
                raise too_large()
            if not count:
                break
            body += self.rfile.read(count)
            if self.rfile.readline(2) not in (b"\r\n", b"\n"):
                raise bad("", "The chunked request body is malformed.")
        for _ in range(100):  # trailers
            if self.rfile.readline(1 << 16) in (b"\r\n", b"\n", b""):
                return bytes(body)
        raise bad("", "The chunked request body has too many trailers.")

    def skip_body(self) -> None:
        """An early answer must not be lost in a reset: let the client send the rest for
        a moment, which nobody reads, and hang up."""
        if not self.body_unread:
            return
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.reader.deadline = time.monotonic() + 2
            while "Expect" not in self.headers and self.rfile.read1(1 << 16):
                pass

    # Writing.

    def send_json(self, status: int, body: Any, headers: Optional[Json] = None) -> None:
        data = b"" if body is None else json.dumps(body).encode() + b"\n"
        head = dict(headers or {})
        if body is not None:  # a 204 has no length (RFC 9110, 8.6)
            head.update({"Content-Type": "application/json"})
            head.update({"Content-Length": str(len(data))})
        self.send(self.head(status, head) + (b"" if self.command == "HEAD" else data))

    def head(self, status: int, headers: Json) -> bytes:
        """Status line and headers, to go out in one piece with what follows."""
        self.status = status
        common = {"Date": self.date_time_string(), "Vary": "Origin"}
        origin = self.headers.get("Origin") if self.headers else None
        if origin is not None and self.is_allowed_origin(origin):
            common["Access-Control-Allow-Origin"] = origin
        if self.close_connection or self.body_unread:
            common["Connection"] = "close"
        elif self.request_version == "HTTP/1.0":
            common["Connection"] = "keep-alive"  # as it was asked for
        reason = self.responses[status][0] if status in self.responses else ""
        lines = [f"{self.protocol_version} {status} {reason}"]
        lines += [f"{name}: {text}" for name, text in {**common, **headers}.items()]
        return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")

    def send(self, data: bytes) -> None:
        self.connection.settimeout(WRITE_SECONDS)
        self.connection.sendall(data)

    def stream(self, deltas: Iterator[Optional[Delta]]) -> None:
        """Server-sent events; those that came together leave together. The status line
        waits for the first one, so that a failure before it has a status of its own.
        After some silence comes one that changes nothing. (A comment would not reset
        the watchdogs of some clients.)"""
        reply, spoke = self.reply, time.monotonic()
        try:
            for delta in deltas:
                if delta is None and time.monotonic() > spoke + ALIVE_SECONDS:
                    delta = reply.add(0, {"content": ""})
                if delta is not None:
                    self.event(reply.chunk(delta))
                    spoke = time.monotonic()
                elif self.pending:
                    self.flush()
        except APIError as error:
            if not self.streaming:
                raise
            self.status = error.status
            self.event(json.dumps(error.body))
        else:
            if reply.ask.include_usage:
                self.event(reply.chunk(None, reply.usage))
            self.event("[DONE]")
        self.flush(b"0\r\n\r\n" if self.chunked else b"")

    def event(self, text: str) -> None:
        if not self.streaming:
            self.start_stream()
        self.pending.append(f"data: {text}\n\n")

    def start_stream(self) -> None:
        self.streaming = True
        self.chunked = self.request_version != "HTTP/1.0"
        self.close_connection = self.close_connection or not self.chunked
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        headers.update({"Transfer-Encoding": "chunked"} if self.chunked else {})
        self.opening = self.head(200, headers)

    def flush(self, end: bytes = b"") -> None:
        data = "".join(self.pending).encode()
        self.pending.clear()
        if self.chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data) + end
        self.send(self.opening + data)
        self.opening = b""

    def poke(self) -> None:
        """Write what means nothing: an interim response (RFC 9110, 15.2), or a comment
        in a stream. Raises OSError where nobody is there, or neither is allowed."""
        if self.streaming:
            self.pending.append(":\n\n")
            self.flush()
        elif self.request_version == "HTTP/1.0":
            raise OSError
        else:
            self.send(GO_ON)

    def fail(self, error: APIError) -> None:
        """The one renderer of errors, but for those in the middle of a stream."""
        if self.status:  # a bug of ours; a second head would be part of the answer
            self.close_connection = True
            return
        with contextlib.suppress(OSError):
            self.send_json(error.status, error.body, error.headers)

    def send_error(self, code: int, message: Any = None, explain: Any = None) -> None:
        """http.server's own complaints about a malformed request, in our shape."""
        self.close_connection = True
        self.fail(APIError(int(code), str(message or self.responses[code][0])[:200]))
        self.log_answer(0.0)

    def log_answer(self, seconds: float) -> None:
        """Time, status, method, path; then what is known, as name=value."""
        path = printable(getattr(self, "path", "?").split("?")[0])[:80]
        told = self.reply.notes() if self.reply else {}
        notes = "".join(f" {name}={value}" for name, value in told.items())
        log(f"{self.status} {self.command or '?'} {path}{notes} total={seconds:.3f}")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: log_answer() has one line for each request."""


def model_object(name: str) -> Json:
    return {"id": name, "object": "model", "created": 0, "owned_by": "anthropic"}


def forbidden(message: str) -> APIError:
    return APIError(403, message, "permission_error", "origin_not_allowed")


def too_deep() -> APIError:
    return bad("", "The JSON is nested too deeply.")


def too_large() -> APIError:
    message = f"The request body is larger than {MAX_BODY >> 20} MiB."
    return APIError(413, message, code="request_too_large")


LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_json(raw: bytes) -> Any:
    """JSON in UTF-8 (RFC 8259), so without NaN and 1e999. Half a surrogate pair, which
    the API refuses, becomes U+FFFD. Raises ValueError, RecursionError."""

    def refuse(name: str) -> Any:
        raise ValueError(name)

    def finite(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse(digits)

    text = raw.decode("utf-8-sig")
    value = json.loads(text, parse_constant=refuse, parse_float=finite)
    if re.search(rb"\\u[dD][89a-fA-F]", raw):
        text = json.dumps(value, ensure_ascii=False)
        value = json.loads(LONE_SURROGATE.sub("\ufffd", text))
    return value


def log(text: str) -> None:
    """A line on stderr, of words that a terminal can show. Never prompt text."""
    words = [time.strftime("%Y-%m-%dT%H:%M:%S"), *map(printable, text.split())]
    with contextlib.suppress(OSError, ValueError):  # a closed stderr stops nobody
        sys.stderr.write(" ".join(words) + "\n")
        sys.stderr.flush()


# ── Main ───────────────────────────────────────────────────────────────────────────


def check_python() -> None:
    """Exit where it is too old. (3.7 and 3.8 can read this file, but not run it.)"""
    if sys.version_info < OLDEST_PYTHON:
        needed, own = ".".join(map(str, OLDEST_PYTHON)), sys.version.split()[0]
        sys.exit(f"claude_max_proxy: Python {own} is too old; {needed} is needed.")


def raise_file_limit() -> None:
    """macOS gives a process 256 descriptors; each connection and CLI needs some."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def temporary_problem() -> str:
    """What is wrong with the directory for temporary files, which the CLI needs."""
    try:
        tempfile.gettempdir()
    except OSError:
        return "There is no usable directory for temporary files: set TMPDIR."
    return ""


def withheld_notes() -> List[str]:
    found = ", ".join(name for name in BILLED if os.environ.get(name))
    why = "is set, and kept from Claude Code: it would bill you by the token."
    return [f"{found} {why}"] if found else []


def bind_problem(settings: Settings, error: OSError) -> str:
    where = f"{settings.host}:{settings.port}"
    if error.errno == errno.EADDRINUSE:
        return f"{where} is in use: stop what listens there, or choose another --port."
    return f"can't listen on {where}: {error.strerror or error}."


def run_checks(settings: Settings) -> int:
    """--check: a line for each thing that must be right -> the exit code."""
    problems = []

    def say(problem: str, fine: str) -> None:
        problems.extend([problem] if problem else [])
        print(f"problem  {problem}" if problem else f"ok       {fine}")

    say("", f"Python {sys.version.split()[0]}")
    program, problem = Installation(settings.claude).look()
    if program:
        say("", f"Claude Code {program.version_text} at {program.path}")
    say(problem, "logged in")
    if temporary_problem():
        say(temporary_problem(), "")
    try:
        with socket.create_server((settings.host, settings.port)):
            say("", f"port {settings.port} is free")
    except OSError as error:
        here = serves_there(settings)
        fine = f"claude_max_proxy serves on port {settings.port} already"
        say("" if here else bind_problem(settings, error), fine)
    for note in withheld_notes():
        print(f"note     {note}")
    return 1 if problems else 0


def serves_there(settings: Settings) -> bool:
    """Whether what has the port is this server."""
    address = settings.host, settings.port
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        connection = http.client.HTTPConnection(*address, timeout=PROBE_SECONDS)
        with contextlib.closing(connection):
            key = {"X-Api-Key": settings.api_key}
            connection.request("GET", "/health", headers=key)
            return "spares" in json.load(connection.getresponse())
    return False


def announce(server: Server) -> None:
    """Where it is, what was found, what to try: once, on stderr."""
    settings = server.settings
    host = "localhost" if is_loopback(settings.host) else settings.host
    url = f"http://{host}:{server.server_port}/v1"
    lines = [f"claude_max_proxy {__version__} serves {url}"]
    program, problem = server.installation.look()
    server.keeper.filling = not problem
    if program:
        lines.append(f"Claude Code {program.version_text} at {program.path}")
    lines.append(f"problem: {problem}" if problem else "logged in")
    if temporary_problem():
        lines.append(f"problem: {temporary_problem()}")
    lines += [f"note: {note}" for note in withheld_notes()]
    lines.append("models: " + ", ".join(KNOWN_MODELS))
    key = ' -H "Authorization: Bearer $KEY"' if settings.api_key else ""
    body = '{"model":"sonnet","messages":[{"role":"user","content":"Hello!"}]}'
    lines.append(f"try: curl {url}/chat/completions{key} -d '{body}'")
    with contextlib.suppress(OSError):
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def main() -> int:
    sys.stderr = sys.stderr or open(os.devnull, "w")  # it was closed: no log
    check_python()
    settings, check_only = parse_arguments(sys.argv[1:])
    if check_only:
        return run_checks(settings)
    raise_file_limit()
    try:
        server = Server(settings)
    except OSError as error:
        print(f"claude_max_proxy: {bind_problem(settings, error)}", file=sys.stderr)
        return 2

    serving = False

    def stop(number: int, frame: Any) -> None:
        if server.stopping:  # the second signal: at once
            server.keeper.stop_all(signal.SIGKILL)
            server.keeper.close()
            os._exit(1)
        server.stopping = True
        server.wake()
        if not serving:
            raise SystemExit  # and end the CLI that announce() asks

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, stop)
    try:
        announce(server)
        serving = True
        server.serve()
    finally:
        server.drain()
    return 0


if __name__ == "__main__":
    sys.exit(main())
