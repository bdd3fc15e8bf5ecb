#!/usr/bin/env python3
"""An OpenAI-compatible server for the Claude Pro/Max subscription you already have.

    python3 claude_max_proxy.py                      # serves http://127.0.0.1:3456
    curl http://localhost:3456/v1/chat/completions \\
      -d '{"model":"sonnet","messages":[{"role":"user","content":"Hello!"}]}'

It runs your logged-in Claude Code CLI (`claude -p`), one process for each answer, and
speaks OpenAI's chat completions: streamed or not, tools, images, structured output.
One file, the standard library only.

The path of a request:

    client ──HTTP──► Handler (a thread for each connection)
                        │ guards, JSON → parse_request() → Ask          pure
                        │ Gate: at most --max-concurrency CLIs at once
                        ▼
                     Claude (a process for each answer)
                        │ stdin:  initialize, the history turn by turn, the last turn
                        │ stdout: Messages API events, a line of JSON each
                        ▼
                     listen(): one selector for the pipes and the client's socket
                        │ Answer: CLI lines → OpenAI deltas             pure
    client ◄──SSE/JSON──┘ each delta leaves as it comes; JSON is the fold of the chunks

The main thread accepts connections and, twice a second, reaps processes that ended.
No other threads. A client that leaves ends its CLI.

Security: it listens on loopback; Host, Origin and Sec-Fetch-Site are checked, so no web
page can spend your quota; nothing of a request reaches argv but a checked model id and
effort level; the CLI runs without tools, settings, hooks, MCP servers and file mentions,
in an empty private directory; prompts are never logged.

Sections: Limits · Errors · Settings · Request · CLI · Response · HTTP · Main

MIT licence. https://github.com/claude-max-proxy/claude_max_proxy
"""
from __future__ import annotations

import argparse
import base64
import binascii
import collections
import contextlib
import errno
import glob
import hashlib
import hmac
import http.server
import io
import ipaddress
import json
import math
import os
import re
import secrets
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
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

__version__ = "1.0.0"

Json = Dict[str, Any]

# ── Limits ─────────────────────────────────────────────────────────────────────────
# Each with its unit and its reason.

MAX_BODY = 32 << 20  # bytes; the Messages API refuses larger requests
MAX_LINE = 64 << 20  # bytes; a CLI line without an end beyond this is nonsense
HEADER_SECONDS = 30  # to send a request's headers and body, however slowly
IDLE_SECONDS = 120  # a kept-alive connection without a request
ALIVE_SECONDS = 10  # of silence before a stream is started and kept alive
TICK_SECONDS = 0.5  # how often ended processes are reaped and waiters look around
TERM_SECONDS = 1.0  # from SIGTERM to SIGKILL
DRAIN_SECONDS = 3.0  # that answers in flight get when the server stops
QUEUE_PER_SLOT = 4  # waiting requests for each of --max-concurrency
MAX_CHOICES = 8  # `n`: one CLI process each
MAX_STOPS = 4  # OpenAI's limit for `stop`
MIN_THINKING_TOKENS = 2048  # max_tokens below leave no room for a thought (API: 1024)
MAX_DESCRIPTION = 2048  # characters; CLIs before 2.1.3 cut a tool description there
MAX_THOUGHTS = 1000  # tool calls whose signed thinking is remembered
OLDEST_CLI = (2, 1, 112)  # shouldQuery and systemPrompt over stdin (measured)
TYPED_TEXT_CLI = (2, 1, 330)  # honours client_composed (measured; 2.1.197 does not)


# ── Errors ─────────────────────────────────────────────────────────────────────────
# APIError may be raised at any depth; Handler.fail() alone renders it. To give another
# status of the Messages API a face, add a row to FAILURES.


class APIError(Exception):
    """An answer in OpenAI's error shape: {"error": {message, type, param, code}}."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        code: Optional[str] = None,
        param: Optional[str] = None,
        retry_after: Optional[float] = None,
        headers: Optional[Dict[str, str]] = None,
    ):
        super().__init__(message)
        self.status = status
        self.body = {
            "error": {"message": message, "type": type, "param": param, "code": code}
        }
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))


class Disconnected(Exception):
    """The client has gone; nobody is left to answer."""


class Failure(NamedTuple):
    """How a failure that the CLI reports looks to an OpenAI client."""

    status: int
    type: str
    code: Optional[str]
    message: str = ""  # instead of the CLI's own text, which speaks of its terminal


LOGIN_CURE = "Claude Code is not logged in. Run `claude auth login` and try again."

FAILURES = {  # by `api_error_status` of the CLI's result line
    400: Failure(400, "invalid_request_error", None),
    401: Failure(401, "authentication_error", "not_logged_in", LOGIN_CURE),
    403: Failure(403, "permission_error", "permission_denied"),
    404: Failure(404, "invalid_request_error", "model_not_found"),
    413: Failure(413, "invalid_request_error", "request_too_large"),
    429: Failure(429, "rate_limit_error", "rate_limit_exceeded"),
    500: Failure(502, "api_error", "upstream_error"),
    503: Failure(503, "overloaded_error", "overloaded"),
    504: Failure(504, "timeout_error", "upstream_timeout"),
    529: Failure(503, "overloaded_error", "overloaded"),
}

CATEGORIES = {  # by `error` of its assistant line, where the status is null
    "authentication_failed": FAILURES[401],
    "billing_error": Failure(429, "insufficient_quota", "insufficient_quota"),
    "invalid_request": FAILURES[400],
    "model_not_found": FAILURES[404],
    "rate_limit": FAILURES[429],
    "overloaded": FAILURES[529],
}


def failure(status: Any, category: Any, text: str, retry: Optional[float]) -> APIError:
    """The APIError for what the CLI told of a failed request; 502 when unknown."""
    found = FAILURES.get(status) or CATEGORIES.get(category) or FAILURES[500]
    message = found.message or text or "The Claude API answered with an error."
    retry = retry if found.status == 429 else None
    return APIError(found.status, message, found.type, found.code, retry_after=retry)


# ── Settings ───────────────────────────────────────────────────────────────────────
# To add an option, add a field to Settings and a row to OPTIONS: flag, environment
# variable and help follow from it.


@dataclass(frozen=True)
class Settings:
    """What the user chose. Seconds for times; `allow_origin` is comma-separated."""

    host: str = "127.0.0.1"
    port: int = 3456
    api_key: str = ""
    allow_origin: str = ""
    claude: str = ""
    max_concurrency: int = 8
    timeout: float = 600.0
    verbose: bool = False


def positive(kind: type) -> Any:
    """An argparse type: a number of `kind` above zero."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError(text)
        return value

    parse.__name__ = "positive " + kind.__name__
    return parse


def port_number(text: str) -> int:
    """An argparse type: a TCP port; 0 lets the system choose one."""
    if not 0 <= int(text) <= 65535:
        raise ValueError(text)
    return int(text)


OPTIONS = {
    "host": (str, "address to listen on; other than loopback needs --api-key"),
    "port": (port_number, "port to listen on"),
    "api_key": (str, "demand this key from clients (Authorization: Bearer KEY)"),
    "allow_origin": (str, "web origins that may ask, comma-separated"),
    "claude": (str, "path of the Claude Code CLI (default: looked for)"),
    "max_concurrency": (positive(int), "CLI processes at once; more requests wait"),
    "timeout": (positive(float), "seconds of silence from the CLI before 504"),
    "verbose": (bool, "also log what the CLI writes to stderr (never prompts)"),
}
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
        epilog=f"Each option can also be set as {ENVIRONMENT}NAME, e.g. "
        f"{ENVIRONMENT}API_KEY (better than a flag: `ps` shows flags to everyone).",
    )
    parser.add_argument("--version", action="version", version=own_version())
    parser.add_argument("--check", action="store_true", help="say what works, and exit")
    for name, (kind, text) in OPTIONS.items():
        flag = "--" + name.replace("_", "-")
        set_by = os.environ.get(ENVIRONMENT + name.upper())
        default = getattr(Settings, name)
        if kind is bool:
            default = (set_by or "") not in ("", "0", "false")
            parser.add_argument(flag, action="store_true", default=default, help=text)
            continue
        shown = f"{text} (default: {default})" if default else text
        value = str(default) if set_by is None else set_by  # argparse converts strings
        parser.add_argument(
            flag, type=kind, default=value, metavar=name.upper(), help=shown
        )
    chosen = vars(parser.parse_args(argv))
    check = chosen.pop("check")
    settings = Settings(**chosen)
    if not is_loopback(settings.host) and not settings.api_key:
        parser.error(f"--host {settings.host} is open to others: give --api-key, too")
    return settings, check


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only mean this machine (RFC 6761, 6.3)."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


# ── Request ────────────────────────────────────────────────────────────────────────
# OpenAI's JSON -> what to ask of the CLI. Pure: no sockets, processes or clock. To
# support a new parameter, add a row to PARAMETERS and read it in parse_request().

MODELS = {  # our id -> the CLI's alias for the newest model of the family
    "claude-opus-4": "opus",
    "claude-sonnet-4": "sonnet",
    "claude-haiku-4": "haiku",
}
MODEL_ID = re.compile(r"claude-[A-Za-z0-9.:_\[\]-]{1,120}")
# Models whose thinking has a budget: in a tool loop they need their signed thinking
# block back (Messages API, "Preserving thinking blocks").
BUDGET_MODEL = re.compile(r"haiku|claude-3|-4-[0-5](-|$)|-4-20\d{6}")
EFFORTS = {
    "none": "",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "xhigh",
    "max": "max",
}

HONOURED, IGNORED, REFUSED = "honoured", "ignored", "refused"
KINDS = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "a boolean",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


class Parameter(NamedTuple):
    """`kinds`: the JSON types it may have; `harmless`: values of a refused one that
    ask for nothing."""

    kinds: Tuple[type, ...]
    use: str
    why: str
    harmless: Tuple[Any, ...] = ()


NO_KNOB = "Claude Code has no such knob"
PARAMETERS = {
    "model": Parameter((str,), HONOURED, "see /v1/models"),
    "messages": Parameter((list,), HONOURED, "turn for turn, in native roles"),
    "stream": Parameter((bool,), HONOURED, "server-sent events"),
    "stream_options": Parameter((dict,), HONOURED, "include_usage"),
    "max_tokens": Parameter((int,), HONOURED, "at least 1"),
    "max_completion_tokens": Parameter((int,), HONOURED, "wins over max_tokens"),
    "stop": Parameter((str, list), HONOURED, "1 to 4 strings, cut by this server"),
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
    "modalities": Parameter((list,), REFUSED, "text is all there is", (["text"],)),
    "audio": Parameter((dict,), REFUSED, "text is all there is"),
    "functions": Parameter((list,), REFUSED, "use tools", ([],)),
    "function_call": Parameter((str, dict), REFUSED, "use tool_choice", ("none",)),
    "web_search_options": Parameter((dict,), REFUSED, "no web search here"),
}


class Spawn(NamedTuple):
    """What a CLI process can only be told at its start."""

    model: str
    effort: str = ""
    thinking: bool = True
    max_tokens: int = 0
    tool_choice: str = ""  # JSON of the Messages API's tool_choice


class Setup(NamedTuple):
    """What its `initialize` tells; a second one does not replace the first."""

    system: str = ""
    tools: Tuple[Json, ...] = ()  # as MCP's tools/list answers
    schema: Optional[Json] = None


@dataclass(frozen=True)
class Ask:
    """All that one request asks: `turns` as Messages API messages, the last a user's;
    `names`: tool name at the API -> the client's."""

    requested: str
    spawn: Spawn
    setup: Setup
    turns: List[Json]
    names: Dict[str, str] = field(default_factory=dict)
    stream: bool = False
    include_usage: bool = False
    stops: Tuple[str, ...] = ()
    n: int = 1


def bad(param: str, message: str, code: Optional[str] = None) -> APIError:
    return APIError(400, message, code=code, param=param)


def check(value: Any, kinds: Tuple[type, ...], param: str) -> Any:
    """`value`, or a 400 naming `param` if it has none of the JSON types `kinds`."""
    if type(value) in kinds:
        return value
    wanted = " or ".join(KINDS[kind] for kind in kinds)
    message = f"Invalid type for '{param}': expected {wanted}, but got {KINDS[type(value)]}."
    raise bad(param, message, "invalid_type")


def get(holder: Json, key: str, kinds: Tuple[type, ...], where: str) -> Any:
    """holder[key], checked; an absent one is None."""
    value = holder.get(key)
    return value if value is None else check(value, kinds, f"{where}.{key}")


def parse_request(body: Any, thoughts: Dict[str, List[Json]]) -> Ask:
    """A chat completion request -> an Ask. `thoughts`: tool call id -> the signed
    thinking blocks before it. Raises APIError 400 or 404."""
    if not isinstance(body, dict):
        raise bad("", "The request body must be a JSON object.")
    check_parameters(body)
    if "model" not in body or "messages" not in body:
        missing = "messages" if "model" in body else "model"
        raise bad(missing, f"Missing required parameter: '{missing}'.")
    model = cli_model(body["model"])
    tools, names = parse_tools(body.get("tools") or [])
    script = Transcript(thoughts)
    for i, message in enumerate(body["messages"]):
        script.add(message, f"messages[{i}]")
    script.finish()
    schema = parse_format(body.get("response_format"))
    choice = parse_choice(body, names)
    if script.called and not tools:  # the API wants every called tool defined
        tools = [mcp_tool(name, "", {}) for name in sorted(script.called)]
        choice = {"type": "none"}
    forced = choice.get("type") in ("any", "tool")
    if forced:
        schema = None  # a tool call it will be, so there is no content to shape
    elif schema:
        choice = structured_choice(choice, bool(names))
        forced = True
    most = token_limit(body)
    effort = parse_effort(body)
    thinking = effort != "none" and not forced
    thinking = thinking and (not most or most >= MIN_THINKING_TOKENS)
    if script.unsigned and BUDGET_MODEL.search(model):
        thinking = False  # the API refuses the loop with thinking and without the block
    return Ask(
        requested=body["model"],
        spawn=Spawn(
            model,
            EFFORTS.get(effort, ""),
            thinking,
            most,
            json.dumps(choice) if choice else "",
        ),
        setup=Setup("\n\n".join(script.system), tuple(tools), schema),
        turns=script.turns,
        names=names,
        stream=bool(body.get("stream")),
        include_usage=bool(parse_stream_options(body).get("include_usage")),
        stops=parse_stops(body.get("stop")),
        n=bounded(body, "n", 1, MAX_CHOICES) or 1,
    )


def check_parameters(body: Json) -> None:
    """The PARAMETERS table applied. `null` means absent; unknown names are ignored."""
    for name in [name for name, value in body.items() if value is None]:
        del body[name]
    for name, value in body.items():
        row = PARAMETERS.get(name)
        if row is None:
            continue
        check(value, row.kinds, name)
        if row.use == REFUSED and value not in row.harmless:
            message = f"'{name}' is not supported: {row.why}."
            raise bad(name, message, "unsupported_parameter")


def cli_model(name: str) -> str:
    """A client's model name -> what the CLI takes for --model; else 404."""
    short = name.rsplit("/", 1)[-1]
    if short in MODELS.values():
        return short
    if short in MODELS:
        return MODELS[short]
    if MODEL_ID.fullmatch(short):
        return short
    known = ", ".join([*MODELS, *MODELS.values()])
    message = (
        f"The model '{name[:100]}' does not exist. "
        f"Use one of {known}, or a full id such as claude-opus-4-1."
    )
    raise APIError(404, message, code="model_not_found", param="model")


def bounded(body: Json, name: str, least: int, most: int) -> int:
    """An integer parameter in its range; 0 when absent."""
    value = body.get(name)
    if value is None:
        return 0
    if not least <= value <= most:
        raise bad(name, f"'{name}' must be between {least} and {most}.")
    return value


def token_limit(body: Json) -> int:
    most = 10**9
    new = bounded(body, "max_completion_tokens", 1, most)
    old = bounded(body, "max_tokens", 1, most)
    return new or old


def parse_stream_options(body: Json) -> Json:
    options = body.get("stream_options") or {}
    get(options, "include_usage", (bool,), "stream_options")
    return options


def parse_stops(value: Any) -> Tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if len(stops) > MAX_STOPS:
        raise bad("stop", f"'stop' takes at most {MAX_STOPS} strings.")
    return tuple(s for i, s in enumerate(stops) if check(s, (str,), f"stop[{i}]"))


def parse_effort(body: Json) -> str:
    effort = body.get("reasoning_effort", "")
    if effort and effort not in EFFORTS:
        known = ", ".join(EFFORTS)
        raise bad("reasoning_effort", f"'reasoning_effort' must be one of {known}.")
    return effort


def parse_format(value: Optional[Json]) -> Optional[Json]:
    """response_format -> the JSON schema that the reply must match, if any."""
    if value is None:
        return None
    kind = check(value.get("type"), (str,), "response_format.type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object", "additionalProperties": True}
    if kind != "json_schema":
        message = "'response_format.type' must be text, json_object or json_schema."
        raise bad("response_format.type", message)
    where = "response_format.json_schema"
    holder = check(value.get("json_schema"), (dict,), where)
    schema = check(holder.get("schema"), (dict,), where + ".schema")
    return object_schema(schema, where + ".schema")


def structured_choice(choice: Json, has_tools: bool) -> Json:
    """The tool_choice under which the reply must be the JSON, or a client's tool."""
    if has_tools and choice.get("type") != "none":
        return dict(choice, type="any")
    return {
        "type": "tool",
        "name": STRUCTURED_OUTPUT,
        "disable_parallel_tool_use": True,
    }


# Tools. The Messages API is strict where clients are not, and the CLI drops *all* tools
# of a server in silence when one schema is not to its taste.

STRUCTURED_OUTPUT = "StructuredOutput"  # the CLI's tool for `jsonSchema`
RESERVED = {STRUCTURED_OUTPUT, "ToolSearch"}  # names that mean something to the CLI
API_NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")


def api_name(name: str) -> str:
    """A tool name or call id that the Messages API accepts; the same for the same."""
    if API_NAME.fullmatch(name) and name not in RESERVED:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
    return re.sub(r"[^a-zA-Z0-9_-]", "_", name)[:100] + "_" + digest


def parse_tools(tools: List[Any]) -> Tuple[List[Json], Dict[str, str]]:
    """OpenAI's tools -> (MCP tools, tool name at the API -> the client's)."""
    found: List[Json] = []
    names: Dict[str, str] = {}
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        check(tool, (dict,), where)
        if tool.get("type", "function") != "function":
            raise bad(f"{where}.type", "Only tools of type 'function' are supported.")
        where += ".function"
        function = check(tool.get("function"), (dict,), where)
        name = check(function.get("name"), (str,), where + ".name")
        if not name or name in names.values():
            problem = "is used twice" if name else "must not be empty"
            raise bad(where + ".name", f"The tool name '{name}' {problem}.")
        names[api_name(name)] = name
        text = get(function, "description", (str,), where) or ""
        schema = get(function, "parameters", (dict,), where) or {}
        schema = object_schema(schema, where + ".parameters")
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
    """`schema` as one the API and the CLI accept: an object at the top, without a
    combinator there. 400 if it can't mean an object."""
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        message = f"'{where}' must be a schema of type 'object' at the top."
        raise bad(where, message, "invalid_schema")
    schema = dict(schema, type="object")
    properties = get(schema, "properties", (dict,), where) or {}
    combined = {k: schema.pop(k) for k in ("anyOf", "oneOf", "allOf") if k in schema}
    for branch in [b for bs in combined.values() if isinstance(bs, list) for b in bs]:
        if isinstance(branch, dict) and isinstance(branch.get("properties"), dict):
            properties = {**branch["properties"], **properties}
    if combined:  # the model reads what the API would not take as a rule
        rule = "The value must also match: " + json.dumps(combined)
        schema["description"] = (schema.get("description", "") + "\n" + rule).strip()
    required = get(schema, "required", (list,), where) or []
    schema["required"] = [check(r, (str,), where + ".required") for r in required]
    schema["properties"] = {
        key: plain_schema(value, f"{where}.properties.{key}")
        for key, value in properties.items()
    }
    return {k: v for k, v in schema.items() if v not in ([], None)}


def plain_schema(schema: Any, where: str) -> Json:
    """A property's schema as an object; JSON Schema's true and false are objects too."""
    if isinstance(schema, bool):
        return {} if schema else {"not": {}}
    return check(schema, (dict,), where)


def parse_choice(body: Json, names: Dict[str, str]) -> Json:
    """tool_choice and parallel_tool_calls -> the Messages API's tool_choice, or {}."""
    choice = body.get("tool_choice", "auto")
    if isinstance(choice, dict):
        function = check(choice.get("function"), (dict,), "tool_choice.function")
        name = check(function.get("name"), (str,), "tool_choice.function.name")
        if name not in names.values():
            raise bad("tool_choice", f"Tool '{name[:100]}' not found in 'tools'.")
        found = {"type": "tool", "name": api_name(name)}
    elif choice not in ("none", "auto", "required"):
        message = "'tool_choice' must be none, auto, required or a function."
        raise bad("tool_choice", message)
    elif choice == "required" and not names:
        message = "'tool_choice' is only allowed when 'tools' are specified."
        raise bad("tool_choice", message)
    else:
        found = {"type": {"required": "any"}.get(choice, choice)}
    if not names:
        return {}
    if body.get("parallel_tool_calls") is False and found["type"] != "none":
        found["disable_parallel_tool_use"] = True
    return {} if found == {"type": "auto"} else found


# Messages.

BEGIN, CONTINUE = "Begin.", "Continue."  # where the API wants a user turn and has none


class Transcript:
    """OpenAI's messages -> `system` texts and `turns`, in the Messages API's roles.

    Neighbours of one role are one turn; texts without a character to see are dropped
    (the API refuses them). `called`: names of the tools in the history; `unsigned`:
    whether a call of the tool loop still going on lacks its signed thinking.
    """

    def __init__(self, thoughts: Dict[str, List[Json]]):
        self.thoughts = thoughts
        self.system: List[str] = []
        self.turns: List[Json] = []
        self.called: set = set()
        self.unsigned = False
        self.waiting: Dict[str, str] = {}  # call id -> where, until it is answered

    def add(self, message: Any, where: str) -> None:
        check(message, (dict,), where)
        role = check(message.get("role"), (str,), where + ".role")
        add = self.ROLES.get(role)
        if add is None:
            known = ", ".join(self.ROLES)
            raise bad(where + ".role", f"'{where}.role' must be one of {known}.")
        if role != "tool":
            self.all_answered()
        add(self, message, where)

    def add_system(self, message: Json, where: str) -> None:
        blocks = parse_content(message, where, ("text",))
        text = "\n".join(block["text"] for block in blocks)
        if not self.turns:
            self.system += [text] if text else []
        elif text:
            text = f"<system>\n{text}\n</system>"
            self.append("user", [{"type": "text", "text": text}])

    def add_user(self, message: Json, where: str) -> None:
        blocks = parse_content(message, where, ("text", "image_url", "file"))
        self.unsigned = self.unsigned and not blocks
        self.append("user", blocks)

    def add_assistant(self, message: Json, where: str) -> None:
        if message.get("audio"):
            raise bad(where + ".audio", "Audio is not supported.")
        blocks = parse_content(message, where, ("text", "refusal"))
        calls = get(message, "tool_calls", (list,), where) or []
        if not calls:
            return self.append("assistant", blocks)
        uses = [self.call(c, f"{where}.tool_calls[{i}]") for i, c in enumerate(calls)]
        thinking = self.thoughts.get(uses[0]["id"], [])
        self.unsigned = self.unsigned or not thinking
        self.append("assistant", thinking + blocks + uses)

    def call(self, call: Any, where: str) -> Json:
        """One of an assistant's tool_calls -> a tool_use block."""
        check(call, (dict,), where)
        name = check(call.get("id"), (str,), where + ".id")
        function = check(call.get("function"), (dict,), where + ".function")
        tool = check(function.get("name"), (str,), where + ".function.name")
        if name in self.waiting:
            raise bad(where + ".id", f"The tool call id '{name[:100]}' is used twice.")
        self.waiting[name] = where
        self.called.add(api_name(tool))
        text = get(function, "arguments", (str,), where + ".function") or ""
        return {
            "type": "tool_use",
            "id": api_name(name),
            "name": api_name(tool),
            "input": parse_arguments_of_call(text),
        }

    def add_tool(self, message: Json, where: str) -> None:
        name = check(message.get("tool_call_id"), (str,), where + ".tool_call_id")
        if self.waiting.pop(name, None) is None:
            message_ = (
                f"'{where}' answers no call: a message with role 'tool' must follow "
                "an assistant message with 'tool_calls' that holds its tool_call_id."
            )
            raise bad(where + ".tool_call_id", message_)
        result: Json = {"type": "tool_result", "tool_use_id": api_name(name)}
        blocks = parse_content(message, where, ("text", "image_url", "file"))
        plain = len(blocks) == 1 and blocks[0].get("text")
        if blocks:
            result["content"] = plain or blocks
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
            self.append("user", [{"type": "text", "text": BEGIN}])
        if self.turns and self.turns[-1]["role"] == role:
            self.turns[-1]["content"] += blocks
        else:
            self.turns.append({"role": role, "content": list(blocks)})

    def all_answered(self) -> None:
        for name, where in self.waiting.items():
            message = (
                "An assistant message with 'tool_calls' must be followed by tool "
                "messages responding to each 'tool_call_id'. The tool_call_id "
                f"'{name[:100]}' has no response."
            )
            raise bad(where, message)

    def finish(self) -> None:
        self.all_answered()
        if not self.turns or self.turns[-1]["role"] == "assistant":
            text = CONTINUE if self.turns else BEGIN
            self.append("user", [{"type": "text", "text": text}])


def parse_arguments_of_call(text: str) -> Json:
    """A call's JSON arguments as the API wants them: an object. A model can be cut
    short in mid-argument; what it wrote is kept as text then."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = text
    return value if isinstance(value, dict) else {"arguments": text}


def parse_content(message: Json, where: str, kinds: Tuple[str, ...]) -> List[Json]:
    """A message's content, string or parts, as Messages API blocks."""
    content = message.get("content")
    where += ".content"
    if content is None:
        return []
    if isinstance(check(content, (str, list), where), str):
        content = [{"type": "text", "text": content}]
    blocks = []
    for i, part in enumerate(content):
        at = f"{where}[{i}]"
        if isinstance(part, str):  # seen from clients that join lists of strings
            part = {"type": "text", "text": part}
        kind = check(check(part, (dict,), at).get("type"), (str,), at + ".type")
        if kind not in kinds or kind not in PARTS:
            message_ = f"Content of type '{kind[:50]}' is not supported here."
            raise bad(at, message_, "unsupported_content")
        block = PARTS[kind](part, at)
        if block["type"] != "text" or block["text"].strip():
            blocks.append(block)
    return blocks


def text_part(part: Json, where: str) -> Json:
    text = check(part.get("text"), (str,), where + ".text")
    return {"type": "text", "text": text}


def refusal_part(part: Json, where: str) -> Json:
    text = check(part.get("refusal"), (str,), where + ".refusal")
    return {"type": "text", "text": text}


IMAGE_TYPES = {"image/png", "image/jpeg", "image/gif", "image/webp"}


def image_part(part: Json, where: str) -> Json:
    where += ".image_url"
    holder = check(part.get("image_url"), (dict, str), where)
    url = holder if isinstance(holder, str) else holder.get("url")
    check(url, (str,), where + ".url")
    if re.match(r"https?://", url):
        return {"type": "image", "source": {"type": "url", "url": url}}
    kind, data = parse_data_url(url, where + ".url")
    kind = "image/jpeg" if kind == "image/jpg" else kind
    if kind not in IMAGE_TYPES:
        known = ", ".join(sorted(IMAGE_TYPES))
        message = f"'{where}' holds {kind[:50]}; the API takes {known}."
        raise bad(where + ".url", message, "unsupported_media_type")
    source = {"type": "base64", "media_type": kind, "data": data}
    return {"type": "image", "source": source}


def file_part(part: Json, where: str) -> Json:
    where += ".file"
    holder = check(part.get("file"), (dict,), where)
    if holder.get("file_data") is None:
        message = "Only 'file_data' is supported: this server stores no files."
        raise bad(where, message, "unsupported_content")
    url = check(holder["file_data"], (str,), where + ".file_data")
    name = get(holder, "filename", (str,), where)
    if not url.startswith("data:"):  # OpenAI takes bare base64 of a PDF, too
        url = "data:application/pdf;base64," + url
    kind, data = parse_data_url(url, where + ".file_data")
    if kind == "application/pdf":
        source = {"type": "base64", "media_type": kind, "data": data}
    elif kind.startswith("text/") or kind in ("application/json", "application/xml"):
        text = base64.b64decode(data).decode("utf-8", "replace")
        source = {"type": "text", "media_type": "text/plain", "data": text}
    else:
        message = f"'{where}' holds {kind[:50]}; PDF and text files are supported."
        raise bad(where + ".file_data", message, "unsupported_media_type")
    return {"type": "document", "source": source, **({"title": name} if name else {})}


def parse_data_url(url: str, where: str) -> Tuple[str, str]:
    """data:TYPE;base64,DATA (RFC 2397) -> (media type, base64)."""
    head, comma, data = url.partition(",")
    if not head.startswith("data:") or not comma or not head.endswith(";base64"):
        raise bad(where, f"'{where}' must be an http(s) or base64 data: URL.")
    data = re.sub(r"\s+", "", data)
    try:
        if not base64.b64decode(data, validate=True):
            raise ValueError("empty")
    except (binascii.Error, ValueError):
        raise bad(where, f"'{where}' holds invalid base64 data.") from None
    return head[len("data:") :].split(";")[0].lower(), data


PARTS = {
    "text": text_part,
    "refusal": refusal_part,
    "image_url": image_part,
    "file": file_part,
}


# ── CLI ────────────────────────────────────────────────────────────────────────────
# `claude -p` driven over stdin: measured on 2.1.112, 2.1.197 and 2.1.330, 2026-11-22.
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
#   > {"type":"user",…}                            the last turn: this asks the model
#   < {"type":"system","subtype":"init",…}         and other kinds, which are skipped
#   < {"type":"stream_event","event":{"type":"message_start",…},…}
#   < {"type":"stream_event","event":{"type":"content_block_delta",…},…}
#   < {"type":"assistant","message":{…}}           the finished block once more
#   < {"type":"stream_event","event":{"type":"message_delta","delta":{"stop_reason":
#      "end_turn"},"usage":{"output_tokens":3}},…}           here the process is ended
#   < {"type":"result",…}
#
# Turns that come before the last one's result are put in another order, and assistant
# turns with one id are merged: hence the waits and the ids. `tools/call` is never
# answered: the client runs its tools, in a request of its own.

SERVER = "c"  # the name of the MCP server that holds the client's tools
ARGV = [
    *"-p --input-format stream-json --output-format stream-json --verbose".split(),
    *"--include-partial-messages --no-session-persistence".split(),
    *("--tools", ""),  # none of the CLI's own tools
    "--strict-mcp-config",  # none of the user's MCP servers
    *("--setting-sources", ""),  # no hooks, plugins and CLAUDE.md
    "--disable-slash-commands",
    *("--allowedTools", f"mcp__{SERVER}"),
    # no reminder how to sign commits where a client names a tool Bash
    *("--settings", '{"attribution":{"commit":"","pr":""},"includeCoAuthoredBy":false}'),
]
CONSTANT_ENVIRONMENT = {
    "CLAUDE_CODE_DISABLE_ATTACHMENTS": "1",  # `@/path` in a prompt would read that file
    "CLAUDE_CODE_DISABLE_FILE_MENTIONS": "1",
    "CLAUDE_AGENT_SDK_MCP_NO_PREFIX": "1",  # tools keep their names
    "CLAUDE_AGENT_SDK_DISABLE_BUILTIN_AGENTS": "1",  # else listed for a tool Agent
    "ENABLE_TOOL_SEARCH": "false",  # else many tools are withheld at first
    "CLAUDE_CODE_MAX_RETRIES": "2",  # of 5xx; the default of 10 takes minutes
    "DISABLE_AUTO_COMPACT": "1",
    "CLAUDE_CODE_DISABLE_REFUSAL_RETRY": "1",
    # All cache marks of a request must have one lifetime, and ours stands before the
    # CLI's: the API wants longer ones first.
    "ENABLE_PROMPT_CACHING_1H": "1",
    "CLAUDE_CODE_SKIP_MCP_DEBUG_LOG_FILES": "1",
    "DISABLE_AUTOUPDATER": "1",
}
CACHE_MARK = {"type": "ephemeral", "ttl": "1h"}
OWN_VARIABLES = (  # set by environment() or not at all
    "CLAUDE_CODE_MAX_OUTPUT_TOKENS",
    "CLAUDE_CODE_DISABLE_THINKING",
    "CLAUDE_CODE_EXTRA_BODY",
    "CLAUDE_CODE_EFFORT_LEVEL",
    "MAX_THINKING_TOKENS",
)
# They would bill per token instead of the subscription, or make the CLI refuse to start
# inside another.
WITHHELD = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "CLAUDECODE")
# After these the CLI is done or waits for us. After all others, and with a schema, it
# may go on with a request of its own.
CALM_STOPS = ("end_turn", "stop_sequence", "tool_use")


def arguments(spawn: Spawn) -> List[str]:
    effort = ["--effort", spawn.effort] if spawn.effort else []
    return [*ARGV, "--model", spawn.model, *effort]


def environment(spawn: Spawn) -> Dict[str, str]:
    """Our environment less what must not reach the CLI, plus what it can only be told
    there."""
    gone = (*WITHHELD, *OWN_VARIABLES)
    env = {k: v for k, v in os.environ.items() if k not in gone}
    env.update(CONSTANT_ENVIRONMENT)
    if spawn.max_tokens:
        env["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] = str(spawn.max_tokens)
    if not spawn.thinking:
        env["CLAUDE_CODE_DISABLE_THINKING"] = "1"
    if spawn.tool_choice:
        env["CLAUDE_CODE_EXTRA_BODY"] = '{"tool_choice":%s}' % spawn.tool_choice
    return env


def initialize_line(setup: Setup) -> Json:
    request: Json = {"subtype": "initialize", "systemPrompt": [setup.system]}
    if setup.tools:
        request["sdkMcpServers"] = [SERVER]
    if setup.schema:
        request["jsonSchema"] = setup.schema
    return {"type": "control_request", "request_id": "1", "request": request}


def turn_line(turn: Json, number: int, version: Tuple[int, ...]) -> Json:
    """An earlier turn of the conversation, as the CLI takes it over stdin."""
    line: Json = {"type": turn["role"], "session_id": "", "parent_tool_use_id": None}
    if turn["role"] == "user":
        content = as_written(turn["content"], version)
        message = {"role": "user", "content": content}
        return {**line, "shouldQuery": False, "client_composed": True, "message": message}
    message = {
        "id": f"msg_{number}",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": turn["content"],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 0, "output_tokens": 0},
    }
    return {**line, "message": message}


def query_line(turn: Json, number: int, version: Tuple[int, ...]) -> Json:
    """The last turn, which starts the model, with the prompt cache's mark on its end:
    without it no conversation would be found again in the cache."""
    line = turn_line(turn, number, version)
    del line["shouldQuery"]
    content = line["message"]["content"]
    marked = {**content[-1], "cache_control": CACHE_MARK}
    line["message"] = {"role": "user", "content": [*content[:-1], marked]}
    return line


def as_written(content: List[Json], version: Tuple[int, ...]) -> List[Json]:
    """User content that the CLI does not take for a typed command.

    Where `client_composed` is unknown, a last text that begins with "/" is a command,
    also in earlier turns. Cut behind its slashes it is none, and reads the same."""
    if version >= TYPED_TEXT_CLI or not content[-1].get("text", "").startswith("/"):
        return content
    text = content[-1]["text"]
    rest = text.lstrip("/")
    slashes = text[: len(text) - len(rest)]
    pieces = [slashes, rest] if rest.strip() else ["\n" + text]
    return content[:-1] + [{"type": "text", "text": piece} for piece in pieces]


class Program(NamedTuple):
    """The CLI as installed: `stamp` changes when it is replaced."""

    path: str
    version: Tuple[int, ...]
    stamp: Tuple[Any, ...]

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))


# Where its installers put it; launchd's and systemd's PATH are short.
PLACES = """
~/.local/bin/claude ~/.claude/local/claude ~/.claude/bin/claude
/opt/homebrew/bin/claude /usr/local/bin/claude /home/linuxbrew/.linuxbrew/bin/claude
~/.npm-global/bin/claude ~/.npm/bin/claude ~/.bun/bin/claude ~/.volta/bin/claude
~/.local/share/pnpm/claude ~/Library/pnpm/claude ~/.yarn/bin/claude ~/n/bin/claude
~/.asdf/shims/claude ~/.local/share/mise/shims/claude ~/.nix-profile/bin/claude
~/.nvm/versions/node/*/bin/claude ~/.fnm/node-versions/*/installation/bin/claude
~/.local/share/fnm/node-versions/*/installation/bin/claude /usr/bin/claude
""".split()
NO_CLI = (
    "Claude Code is not installed (or not found). Install it with "
    "`npm install -g @anthropic-ai/claude-code`, or give its path with --claude."
)


def unavailable(message: str, code: str) -> APIError:
    return APIError(503, message, "service_unavailable", code)


def find_claude(chosen: str) -> str:
    """The CLI's path, or an APIError 503 that says what to do."""
    if chosen:
        path = shutil.which(os.path.expanduser(chosen))
        if path:
            return os.path.abspath(path)
        raise unavailable("The file given with --claude is no program.", "no_cli")
    places = [p for place in PLACES for p in glob.glob(os.path.expanduser(place))]
    for path in [shutil.which("claude"), *reversed_versions(places)]:
        if path and os.access(path, os.X_OK):
            return path
    raise unavailable(NO_CLI, "no_cli")


def reversed_versions(places: List[str]) -> List[str]:
    """nvm's and fnm's directories hold a CLI for each node version: newest first."""
    key = [[int(n) for n in re.findall(r"\d+", p)] if "/node" in p else [] for p in places]
    fixed = [p for p, numbers in zip(places, key) if not numbers]
    rest = sorted(((n, p) for n, p in zip(key, places) if n), reverse=True)
    return fixed + [p for _, p in rest]


def probe_program(path: str) -> Program:
    """Runs `claude --version`; raises APIError 503 where it can't be used."""
    stamp = program_stamp(path)
    out = run_briefly([path, "--version"])
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", out.stdout)
    if not found:
        raise unavailable("`claude --version` does not work. Reinstall it.", "no_cli")
    program = Program(path, tuple(map(int, found.groups())), stamp)
    if program.version < OLDEST_CLI:
        oldest = ".".join(map(str, OLDEST_CLI))
        message = (
            f"Claude Code {program.version_text} is too old: {oldest} or newer is "
            "needed. Run `claude update`."
        )
        raise unavailable(message, "cli_too_old")
    return program


def program_stamp(path: str) -> Tuple[Any, ...]:
    real = os.path.realpath(path)
    with contextlib.suppress(OSError):
        stat = os.stat(real)
        return real, stat.st_mtime_ns, stat.st_size
    return (real,)


def run_briefly(argv: List[str]) -> subprocess.CompletedProcess:
    """A short command of the CLI; what fails to run counts as exit code 1."""
    try:
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=20,
            text=True,
            errors="replace",
            env=environment(Spawn("")),
        )
    except (OSError, subprocess.TimeoutExpired):
        return subprocess.CompletedProcess(argv, 1, "", "")


def logged_in(program: Program) -> bool:
    """What `claude auth status` says."""
    out = run_briefly([program.path, "auth", "status"])
    with contextlib.suppress(ValueError):
        return bool(json.loads(out.stdout).get("loggedIn"))
    return out.returncode == 0


class Claude:
    """One CLI process. Nothing here blocks: listen() reads and writes when it can.

    It is told `todo` line by line; `waiting` while an earlier turn has not been taken
    in. Owned by the thread that answers the request, then by Keeper.
    """

    def __init__(self, program: Program, spawn: Spawn, cwd: str):
        self.version = program.version
        self.tools: Tuple[Json, ...] = ()
        self.todo: collections.deque = collections.deque()
        self.outbox = bytearray()
        self.waiting = False
        self.partial: List[bytes] = []  # of an unfinished line
        self.partial_size = 0
        self.heard = time.monotonic()  # the last sign of life
        self.complaint = b""  # the end of its stderr
        self.stopped = 0.0  # when its group was sent a signal
        self.process = subprocess.Popen(
            [program.path, *arguments(spawn)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env=environment(spawn),
            start_new_session=True,  # a process group of its own, to end it whole
        )
        for pipe in self.pipes:
            os.set_blocking(pipe.fileno(), False)

    @property
    def pipes(self) -> Tuple[Any, Any, Any]:
        return self.process.stdin, self.process.stdout, self.process.stderr

    def tell(self, setup: Setup, turns: List[Json]) -> None:
        """Queue all that a request has to say; the last turn asks the model."""
        self.tools = setup.tools
        self.todo.append(initialize_line(setup))
        for number, turn in enumerate(turns[:-1]):
            self.todo.append(turn_line(turn, number, self.version))
        self.todo.append(query_line(turns[-1], len(turns), self.version))
        self.advance()

    def advance(self) -> None:
        """Put lines into the outbox up to one whose result must be awaited."""
        lines = []
        while self.todo and not self.waiting:
            line = self.todo.popleft()
            self.waiting = "shouldQuery" in line
            lines.append(json.dumps(line))
        if lines:
            self.send("\n".join(lines))

    def send(self, text: str) -> None:
        self.outbox += text.encode() + b"\n"
        self.write()

    def write(self) -> None:
        """Write what the pipe takes. A CLI that is gone shows at its stdout."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self.outbox:
                del self.outbox[: os.write(self.process.stdin.fileno(), self.outbox)]

    def read(self) -> Optional[List[Json]]:
        """The lines that have come, less those answered here; None at the end."""
        data = self.read_pipe(self.process.stdout)
        if not data:
            return None if data == b"" else []
        head, newline, tail = data.rpartition(b"\n")
        if not newline:
            self.partial.append(data)
            self.partial_size += len(data)
            if self.partial_size > MAX_LINE:
                raise nonsense()
            return []
        lines = b"".join([*self.partial, head]).split(b"\n")
        self.partial, self.partial_size = [tail], len(tail)
        parsed = [parse_line(line) for line in lines if line.startswith(b"{")]
        return [line for line in parsed if not self.served(line)]

    def read_pipe(self, pipe: Any) -> Optional[bytes]:
        """Bytes; b"" at the end; None where there are none yet."""
        try:
            return os.read(pipe.fileno(), 1 << 16)
        except BlockingIOError:
            return None

    def read_complaint(self) -> bool:
        """Drain stderr, keeping its end; False at its end."""
        data = self.read_pipe(self.process.stderr)
        self.complaint = (self.complaint + (data or b""))[-2000:]
        return data != b""

    def served(self, line: Json) -> bool:
        """Whether this line is none of the answer; what it asks for is done."""
        kind = line.get("type")
        if kind == "stream_event":
            self.heard = time.monotonic()
            return False
        if kind == "control_request":
            self.serve(line)
            return True
        if kind == "result" and self.waiting and not line.get("is_error"):
            self.waiting = False
            self.heard = time.monotonic()
            self.advance()
            return True
        return False

    def serve(self, line: Json) -> None:
        """The client's tools, as an MCP server (modelcontextprotocol.io)."""
        message = (line.get("request") or {}).get("message") or {}
        method = message.get("method")
        if method == "tools/call":
            return  # the client's part; this process ends with the answer
        result: Json = {}
        if method == "initialize":
            result = {
                "protocolVersion": message["params"]["protocolVersion"],
                "capabilities": {"tools": {}},
                "serverInfo": {"name": SERVER, "version": __version__},
            }
        elif method == "tools/list":
            result = {"tools": self.tools}
        reply = {"jsonrpc": "2.0", "id": message.get("id", 0), "result": result}
        response = {
            "subtype": "success",
            "request_id": line.get("request_id"),
            "response": {"mcp_response": reply},
        }
        self.send(json.dumps({"type": "control_response", "response": response}))

    def stop(self, how: int) -> None:
        """Signal the whole group. SIGTERM lets the CLI take its session file away;
        SIGKILL is for when it would go on with a request of its own."""
        self.stopped = self.stopped or time.monotonic()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, how)

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()

    def reaped(self) -> bool:
        """Whether it is gone, and its group with it; past its time it is killed."""
        if self.process.poll() is None:
            if time.monotonic() - self.stopped > TERM_SECONDS:
                self.stop(signal.SIGKILL)
            return False
        self.stop(signal.SIGKILL)  # what it may have left in its group
        if self.process.returncode == -signal.SIGKILL:
            self.sweep()
        return True

    def sweep(self) -> None:
        """Remove the session files that a killed CLI leaves behind (2.1.330)."""
        home = os.environ.get("CLAUDE_CONFIG_DIR") or os.path.expanduser("~/.claude")
        pattern = f"{glob.escape(home)}/sessions/{self.process.pid}.*"
        for path in glob.glob(pattern):
            with contextlib.suppress(OSError):
                os.unlink(path)


def nonsense() -> APIError:
    return APIError(502, "The Claude CLI printed what is no JSON.", "api_error")


def parse_line(line: bytes) -> Json:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise nonsense() from None


def listen(
    claudes: List[Claude], client: socket.socket, patience: float
) -> Iterator[Tuple[Optional[Claude], Optional[Json]]]:
    """Yield (process, line) for what the CLIs print, (process, None) at the end of
    one, and (None, None) at least twice a second; forget those that were stopped.

    One selector in the request's own thread serves their pipes and watches the
    client's socket, so nothing else is needed to notice that it left. Raises
    Disconnected, or APIError 504 after `patience` seconds without a sign of life.
    """
    with selectors.DefaultSelector() as selector:
        selector.register(client, selectors.EVENT_READ)
        for claude in claudes:
            for pipe in claude.pipes[1:]:
                selector.register(pipe, selectors.EVENT_READ, claude)
        running = list(claudes)
        writing: set = set()
        while running:
            for claude in running:
                if bool(claude.outbox) != (claude in writing):
                    stdin = claude.process.stdin
                    if claude.outbox:
                        selector.register(stdin, selectors.EVENT_WRITE, claude)
                    else:
                        selector.unregister(stdin)
                    writing ^= {claude}
            ready = selector.select(TICK_SECONDS)
            for key, _ in ready:
                claude = key.data
                if claude is None:
                    check_client(client, selector)
                elif claude.stopped:
                    continue
                elif key.fileobj is claude.process.stdin:
                    claude.write()
                elif key.fileobj is claude.process.stderr:
                    if not claude.read_complaint():
                        selector.unregister(key.fileobj)
                else:
                    lines = claude.read()
                    for line in [None] if lines is None else lines:
                        yield claude, line
                        if claude.stopped:
                            break
            for claude in [claude for claude in running if claude.stopped]:
                running.remove(claude)
                for pipe in claude.pipes:
                    with contextlib.suppress(KeyError):
                        selector.unregister(pipe)
            now = time.monotonic()
            if any(now - claude.heard > patience for claude in running):
                message = f"Claude was silent for {patience:g} seconds."
                raise APIError(504, message, "timeout_error", "timeout")
            yield None, None


def check_client(client: socket.socket, selector: Any) -> None:
    """Its socket is readable: it has left, or sends its next request already."""
    try:
        gone = not client.recv(1, socket.MSG_PEEK)
    except OSError:
        gone = True
    if gone:
        raise Disconnected
    selector.unregister(client)


class Keeper:
    """Finds the CLI, starts its processes and sees to it that each one ends.

    `lock` guards `live` and `dying`; it is held for no longer than a set operation, and
    no other lock is taken under it.
    """

    def __init__(self, chosen: str):
        self.chosen = chosen
        self.lock = threading.Lock()
        self.live: set = set()  # answering
        self.dying: List[Claude] = []  # sent a signal, not reaped yet
        self.found: Optional[Program] = None
        self.login: Optional[bool] = None  # None: not known yet
        self.looked = 0.0  # when the login was last asked for
        self.home = tempfile.mkdtemp(prefix="claude-max-proxy-")  # 0700; the CLIs' cwd

    def program(self) -> Program:
        """The installed CLI, probed again when it was replaced. Raises APIError 503."""
        path = self.found.path if self.found else ""
        if not path or not os.access(path, os.X_OK):
            path = find_claude(self.chosen)
        if not self.found or self.found.stamp != program_stamp(path):
            self.found = None
            self.found = probe_program(path)
        return self.found

    def ask_login(self) -> bool:
        """Whether the CLI is logged in; a "no" is asked again every few seconds."""
        if self.login is None or (not self.login and time.monotonic() > self.looked + 5):
            self.login = logged_in(self.program())
            self.looked = time.monotonic()
        return self.login

    def start(self, ask: Ask) -> Claude:
        """A process that has been told all of `ask`. Raises APIError 503."""
        program = self.program()
        try:
            claude = Claude(program, ask.spawn, self.home)
        except OSError as error:
            reason = f"Claude Code can't be started: {os.strerror(error.errno or 0)}."
            raise unavailable(reason, "no_cli") from error
        with self.lock:
            self.live.add(claude)
        claude.tell(ask.setup, ask.turns)
        return claude

    def retire(self, claude: Claude) -> None:
        """End a process, if it was not yet, and leave it to tick()."""
        if not claude.stopped:
            claude.stop(signal.SIGTERM)
        claude.close()
        with self.lock:
            self.live.discard(claude)
            self.dying.append(claude)

    def tick(self) -> None:
        """Reap what has ended. Called by the main thread alone."""
        with self.lock:
            dying, self.dying = self.dying, []
        still = [claude for claude in dying if not claude.reaped()]
        with self.lock:
            self.dying += still

    def stop_all(self, how: int) -> None:
        with self.lock:
            claudes = [*self.live, *self.dying]
        for claude in claudes:
            claude.stop(how)

    def close(self) -> None:
        shutil.rmtree(self.home, ignore_errors=True)


# ── Response ───────────────────────────────────────────────────────────────────────
# CLI lines -> OpenAI chunks. Pure: ids and times are passed in. A new kind of line or
# event is skipped until it has a row in Answer.LINES or Answer.EVENTS.

FINISH_REASONS = {  # the Messages API's stop_reason -> OpenAI's finish_reason
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


class Answer:
    """One choice in the making: feed() takes a CLI line and returns OpenAI deltas.

    `finish_reason` is set when it is complete; `calm` then tells whether the CLI has
    nothing left to do. Where a broken stream is told again from its start, by the CLI's
    retry, only what was not said yet comes out: `said` is what did, by channel
    ("content", "reasoning_content" or the index of a tool call), `again` what is still
    to be skipped.
    """

    def __init__(self, ask: Ask, index: int = 0, now: float = 0.0):
        self.index = index
        self.stops = ask.stops
        self.names = ask.names
        self.structured = bool(ask.setup.schema)
        self.now = now
        self.model = ""
        self.usage: Json = {}
        self.finish_reason: Optional[str] = None
        self.calm = False
        self.calls: List[Json] = []  # {id, name}
        self.thinking: List[Json] = []  # finished blocks, with signature
        self.category: Optional[str] = None  # of a failure to come
        self.resets_at: Optional[float] = None  # of the rate limit, epoch seconds
        self.begun = False
        self.held = ""  # text that may be the beginning of a stop string
        self.said: Dict[Any, List[str]] = {}
        self.again: Dict[Any, str] = {}
        self.block: Json = {}  # the open content block
        self.channel: Any = None  # where its deltas go
        self.call_count = 0  # of the message as it is being told

    def feed(self, line: Json) -> List[Json]:
        """Raises APIError for what the CLI tells of a failure."""
        try:
            handler = self.LINES.get(line["type"])
            return handler(self, line) or [] if handler else []
        except (KeyError, TypeError, AttributeError, IndexError):
            message = "The Claude CLI printed a line of unknown shape."
            raise APIError(502, message, "api_error") from None

    def on_event(self, line: Json) -> Optional[List[Json]]:
        if line.get("parent_tool_use_id"):
            return None
        event = line["event"]
        handler = self.EVENTS.get(event["type"])
        return handler(self, event) if handler else None

    def on_message_start(self, event: Json) -> Optional[List[Json]]:
        message = event["message"]
        self.model = message["model"]
        self.usage = dict(message["usage"])
        self.again = {key: "".join(parts) for key, parts in self.said.items() if parts}
        self.call_count, self.thinking = 0, []
        if self.begun:
            return None
        self.begun = True
        return [{"role": "assistant", "content": ""}]

    def on_block_start(self, event: Json) -> Optional[List[Json]]:
        self.block = block = dict(event["content_block"])
        kind = block["type"]
        self.channel = None
        if kind == "text":
            self.channel = "content"
        elif kind == "thinking":
            self.channel = "reasoning_content"
        elif kind == "tool_use" and self.structured and block["name"] == STRUCTURED_OUTPUT:
            self.channel = "content"
        elif kind == "tool_use":
            return self.call_start(block)
        return None

    def call_start(self, block: Json) -> Optional[List[Json]]:
        index = self.channel = self.call_count
        self.call_count += 1
        name = self.names.get(block["name"], block["name"])
        if index < len(self.calls):  # told again: the first id stands
            if self.calls[index]["name"] != name:
                raise told_differently()
            return None
        self.calls.append({"id": block["id"], "name": name})
        self.said[index] = []
        function = {"name": name, "arguments": ""}
        call = {"id": block["id"], "type": "function", "function": function}
        return [{"tool_calls": [{"index": index, **call}]}]

    def on_block_delta(self, event: Json) -> Optional[List[Json]]:
        delta = event["delta"]
        kind = delta["type"]
        if kind == "text_delta":
            return self.say("content", delta["text"])
        if kind == "input_json_delta":
            self.block["told"] = True
            return self.say(self.channel, delta["partial_json"])
        if kind == "thinking_delta":
            self.block["thinking"] += delta["thinking"]
            return self.say("reasoning_content", delta["thinking"])
        if kind == "signature_delta":
            self.block["signature"] += delta["signature"]
        return None

    def on_block_stop(self, event: Json) -> Optional[List[Json]]:
        kind = self.block.get("type")
        if kind in ("thinking", "redacted_thinking"):
            self.thinking.append(self.block)
        if kind == "tool_use" and not self.block.get("told"):
            return self.say(self.channel, json.dumps(self.block.get("input") or {}))
        return None

    def on_message_delta(self, event: Json) -> Optional[List[Json]]:
        for key, value in (event.get("usage") or {}).items():
            if value is not None:
                self.usage[key] = value
        reason = event["delta"].get("stop_reason")
        return self.finish(reason) if reason else None

    def on_assistant(self, line: Json) -> Optional[List[Json]]:
        """A finished block once more, the text of a failure, or, with a stop_reason of
        its own, an answer that was not streamed."""
        self.category = line.get("error") or self.category
        message = line["message"]
        if self.category or not message.get("stop_reason"):
            return None
        deltas = self.on_message_start({"message": message}) or []
        for block in message["content"]:
            deltas += self.on_block_start({"content_block": block}) or []
            text = block.get("text") or block.get("thinking")
            if text and self.channel is not None:
                deltas += self.say(self.channel, text) or []
            deltas += self.on_block_stop({}) or []
        return deltas + (self.finish(message["stop_reason"]) or [])

    def on_result(self, line: Json) -> None:
        """The end of the turn; an answer would have been complete before."""
        text = str(line.get("result") or "")
        retry = self.resets_at - self.now if self.resets_at else None
        if line.get("is_error"):
            raise failure(line.get("api_error_status"), self.category, text, retry)
        raise APIError(502, "Claude ended without an answer.", "api_error")

    def on_system(self, line: Json) -> None:
        """A retry to come: of use for the API's own troubles, not for a request's."""
        if line.get("subtype") != "api_retry":
            return
        status = line["error_status"]
        if isinstance(status, int) and status < 500:
            text = f"The Claude API answered {status} ({line.get('error')})."
            raise failure(status, line.get("error"), text, line["retry_delay_ms"] / 1000)

    def on_rate_limit(self, line: Json) -> None:
        self.resets_at = line["rate_limit_info"].get("resetsAt")

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

    def say(self, channel: Any, text: str) -> Optional[List[Json]]:
        """The delta for what is new of `text`."""
        if channel in self.again:
            text = self.unsaid(channel, text)
        self.said.setdefault(channel, []).append(text)
        if channel == "content":
            text = self.hold_back(text)
        if not text:
            return None
        if isinstance(channel, int):
            return [{"tool_calls": [{"index": channel, "function": {"arguments": text}}]}]
        return [{channel: text}]

    def unsaid(self, channel: Any, text: str) -> str:
        """What is new of a text that is told again."""
        said = self.again[channel]
        if channel == "reasoning_content":
            return ""  # a second train of thought; the first one stays
        if said.startswith(text):
            self.again[channel] = said[len(text) :]
            return ""
        del self.again[channel]
        if text.startswith(said):
            return text[len(said) :]
        raise told_differently()

    def hold_back(self, text: str) -> str:
        """Cut at a stop string; keep what may become one, and half an emoji."""
        if not (self.stops or self.held or "\ud800" <= text[-1:] <= "\udbff"):
            return text
        text = self.held + text
        self.held = ""
        found = [at for at in map(text.find, self.stops) if at >= 0]
        if found:
            self.finish_reason, self.calm = "stop", True
            return text[: min(found)]
        keep = max((open_end(text, stop) for stop in self.stops), default=0)
        keep = keep or int("\ud800" <= text[-1:] <= "\udbff")
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self, reason: str) -> Optional[List[Json]]:
        """The message is complete: let go of what was held back."""
        if self.finish_reason:  # cut at a stop string before
            return None
        self.finish_reason = FINISH_REASONS.get(reason, "stop")
        if reason == "tool_use" and not self.calls:
            self.finish_reason = "stop"  # the structured output's own tool
        visible = self.calls or any(self.said.get("content", ()))
        self.calm = bool(reason in CALM_STOPS and visible and not self.structured)
        text, self.held = self.held, ""
        return [{"content": text}] if text else None


def told_differently() -> APIError:
    message = "The connection broke, and Claude began another answer."
    return APIError(502, message, "api_error", "stream_interrupted")


def open_end(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


def openai_usage(usages: List[Json]) -> Json:
    """The Messages API's usage of each choice -> OpenAI's, summed. Its input_tokens
    leave out what was read from or written to the prompt cache; OpenAI's do not."""

    def total(*keys: str) -> int:
        return sum(usage.get(key) or 0 for usage in usages for key in keys)

    cached, written = "cache_read_input_tokens", "cache_creation_input_tokens"
    prompt, completion = total("input_tokens", cached, written), total("output_tokens")
    told = [usage.get("output_tokens_details") or {} for usage in usages]
    thought = [details.get("thinking_tokens") for details in told]
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": total(cached)},
    }
    if any(isinstance(tokens, int) for tokens in thought):
        reasoning = sum(tokens or 0 for tokens in thought)
        usage["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return usage


@dataclass
class Reply:
    """What all chunks of a response have in common."""

    id: str
    created: int
    model: str
    with_usage: bool

    def chunk(self, choices: List[Json], usage: Optional[Json] = None) -> Json:
        chunk = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        return {**chunk, "usage": usage} if self.with_usage else chunk

    def delta(self, index: int, delta: Json, finish_reason: Optional[str] = None) -> Json:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason}
        return self.chunk([choice])


def fold(chunks: Iterable[Json]) -> Json:
    """Chunks -> the completion that they would have been without `stream`."""
    chunk: Json = {}
    choices: Dict[int, Json] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            blank = {"texts": {}, "calls": {}, "finish_reason": None}
            choice = choices.setdefault(part["index"], blank)
            choice["finish_reason"] = part["finish_reason"] or choice["finish_reason"]
            gather(choice, part["delta"])
    return {
        **chunk,
        "object": "chat.completion",
        "choices": [
            {
                "index": index,
                "message": message_of(choice),
                "logprobs": None,
                "finish_reason": choice["finish_reason"],
            }
            for index, choice in sorted(choices.items())
        ],
    }


def gather(choice: Json, delta: Json) -> None:
    for key in ("content", "reasoning_content"):
        if delta.get(key):
            choice["texts"].setdefault(key, []).append(delta[key])
    for part in delta.get("tool_calls", ()):
        call = choice["calls"].setdefault(part["index"], {"arguments": []})
        call["arguments"].append(part["function"]["arguments"])
        if "id" in part:
            call.update(id=part["id"], name=part["function"]["name"])


def message_of(choice: Json) -> Json:
    """The assistant message that gather() collected."""
    texts = {key: "".join(parts) for key, parts in choice["texts"].items()}
    content = texts.get("content", None if choice["calls"] else "")
    message: Json = {"role": "assistant", "content": content, "refusal": None}
    if "reasoning_content" in texts:
        message["reasoning_content"] = texts["reasoning_content"]
    if choice["calls"]:
        message["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {
                    "name": call["name"],
                    "arguments": "".join(call["arguments"]),
                },
            }
            for _, call in sorted(choice["calls"].items())
        ]
    return message


# ── HTTP ───────────────────────────────────────────────────────────────────────────
# To add an endpoint, add a method to Handler and a row to Handler.ROUTES. The guards
# stand in one ladder, Handler.guard(), in the order in which they are asked.


class Gate:
    """At most `width` CLI processes at once; who waits is served in order.

    `changed` guards `active` and `queue`, is owned by the Server, and is held only to
    look at them; nothing is waited for under it but itself.
    """

    def __init__(self, width: int):
        self.width = width
        self.active = 0
        self.queue: collections.deque = collections.deque()
        self.changed = threading.Condition()

    def enter(self, places: int, client: socket.socket) -> Iterator[None]:
        """Yield None while waiting. Raises APIError 429, Disconnected."""
        ticket = object()
        if places > self.width:
            raise bad("n", f"'n' must not exceed this server's limit of {self.width}.")
        with self.changed:
            if len(self.queue) >= self.width * QUEUE_PER_SLOT:
                message = "Too many requests are waiting for this server."
                raise APIError(
                    429, message, "rate_limit_error", "queue_full", retry_after=5
                )
            self.queue.append(ticket)
        try:
            while not self.admitted(ticket, places):
                yield None
                if has_left(client):
                    raise Disconnected
        finally:
            with self.changed:
                self.queue.remove(ticket)
                self.changed.notify_all()

    def admitted(self, ticket: object, places: int) -> bool:
        """Whether it is this one's turn now, or within a tick."""
        with self.changed:
            its_turn = self.changed.wait_for(
                lambda: self.queue[0] is ticket and self.active + places <= self.width,
                TICK_SECONDS,
            )
            if its_turn:
                self.active += places
            return its_turn

    def leave(self, places: int) -> None:
        with self.changed:
            self.active -= places
            self.changed.notify_all()

    def idle(self, seconds: float) -> bool:
        """Wait until nothing is active."""
        with self.changed:
            return self.changed.wait_for(lambda: not self.active, seconds)


def has_left(client: socket.socket) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(client, selectors.EVENT_READ)
        with contextlib.suppress(OSError):
            return bool(selector.select(0)) and not client.recv(1, socket.MSG_PEEK)
    return True


class Server(http.server.ThreadingHTTPServer):
    """The shared state: Settings, Gate, Keeper, and what past answers taught."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 512
    timeout = TICK_SECONDS  # of handle_request(), so that serve() looks around

    def __init__(self, settings: Settings):
        self.settings = settings
        self.address_family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        super().__init__((settings.host, settings.port), Handler)
        self.gate = Gate(settings.max_concurrency)
        self.keeper = Keeper(settings.claude)
        self.origins = {o.strip() for o in settings.allow_origin.split(",") if o.strip()}
        self.thoughts: Dict[str, List[Json]] = {}  # tool call id -> thinking blocks
        self.rate_limit: Optional[Json] = None
        self.started = time.monotonic()
        self.stopping = False

    def server_bind(self) -> None:
        """Without HTTPServer's getfqdn(), which can wait for a name server."""
        socketserver_bind = super(http.server.HTTPServer, self).server_bind
        socketserver_bind()
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that vanish are no news; the rest Handler.answer() has logged."""

    def serve(self) -> None:
        while not self.stopping:
            self.handle_request()
            self.keeper.tick()

    def drain(self) -> None:
        """Give answers in flight a moment, then end every process."""
        self.server_close()
        deadline = time.monotonic() + DRAIN_SECONDS
        while not self.gate.idle(TICK_SECONDS / 5) and time.monotonic() < deadline:
            self.keeper.tick()
        self.keeper.stop_all(signal.SIGTERM)
        deadline = time.monotonic() + TERM_SECONDS
        while self.keeper.live or self.keeper.dying:
            if time.monotonic() > deadline:
                self.keeper.stop_all(signal.SIGKILL)
            self.keeper.tick()
            time.sleep(0.01)
        self.keeper.close()

    def chunks(self, ask: Ask, client: socket.socket) -> Iterator[Optional[Json]]:
        """The answer to `ask`, chunk by chunk; None when there is nothing to say yet."""
        yield from self.gate.enter(ask.n, client)
        claudes: List[Claude] = []
        try:
            for _ in range(ask.n):
                claudes.append(self.keeper.start(ask))
            yield from self.converse(ask, claudes, client)
        finally:
            for claude in claudes:
                self.keeper.retire(claude)
            self.gate.leave(ask.n)

    def converse(
        self, ask: Ask, claudes: List[Claude], client: socket.socket
    ) -> Iterator[Optional[Json]]:
        now = time.time()
        reply = Reply(
            id="chatcmpl-" + secrets.token_hex(12),
            created=int(now),
            model=ask.requested,
            with_usage=ask.include_usage or not ask.stream,
        )
        answers = {claude: Answer(ask, i, now) for i, claude in enumerate(claudes)}
        with contextlib.closing(
            listen(claudes, client, self.settings.timeout)
        ) as lines:
            for claude, line in lines:
                if claude is None:
                    yield None
                    continue
                if line is None:
                    raise self.died(claude)
                answer = answers[claude]
                deltas = answer.feed(line)
                if answer.finish_reason:
                    claude.stop(signal.SIGTERM if answer.calm else signal.SIGKILL)
                reply.model = answer.model or reply.model
                for delta in deltas:
                    yield reply.delta(answer.index, delta)
                if answer.finish_reason:
                    self.remember(answer)
                    yield reply.delta(answer.index, {}, answer.finish_reason)
                elif line["type"] == "rate_limit_event":
                    self.rate_limit = line["rate_limit_info"]
        if reply.with_usage:
            usages = [answer.usage for answer in answers.values()]
            yield reply.chunk([], openai_usage(usages))

    def died(self, claude: Claude) -> APIError:
        """The error for a process whose output ended before its answer did."""
        if self.stopping:
            return unavailable("The server is stopping.", "stopping")
        with contextlib.suppress(subprocess.TimeoutExpired):
            claude.process.wait(TICK_SECONDS)
        if self.settings.verbose and claude.complaint:
            log("claude: " + claude.complaint.decode("utf-8", "replace"))
        code = claude.process.returncode
        message = f"The Claude CLI ended (exit code {code}) before its answer did."
        return APIError(502, message, "api_error", "cli_died")

    def remember(self, answer: Answer) -> None:
        """Keep signed thinking for the tool loop's next request."""
        self.keeper.login = True
        if answer.calls:
            self.thoughts[answer.calls[0]["id"]] = answer.thinking
            while len(self.thoughts) > MAX_THOUGHTS:
                with contextlib.suppress(KeyError, RuntimeError):  # another was faster
                    del self.thoughts[next(iter(self.thoughts))]

    def health(self) -> Tuple[int, Json]:
        """-> (status, body) of /health."""
        problem = ""
        program = None
        try:
            program = self.keeper.program()
            problem = "" if self.keeper.ask_login() else LOGIN_CURE
        except APIError as error:
            problem = str(error)
        return (503 if problem else 200), {
            "status": "error" if problem else "ok",
            **({"message": problem} if problem else {}),
            "version": __version__,
            "claude": {
                "path": program.path if program else None,
                "version": program.version_text if program else None,
                "logged_in": self.keeper.login if program else None,
            },
            "active": self.gate.active,
            "waiting": len(self.gate.queue),
            "rate_limit": self.rate_limit,
            "uptime": round(time.monotonic() - self.started),
        }


class TimedReader(io.RawIOBase):
    """A socket for reading with a deadline for the whole request, so that a byte now
    and then does not keep a thread for ever."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.deadline: Optional[float] = None  # None: between requests

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        now = time.monotonic()
        left = IDLE_SECONDS if self.deadline is None else self.deadline - now
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        count = self.connection.recv_into(buffer)
        if self.deadline is None:
            self.deadline = time.monotonic() + HEADER_SECONDS
        return count


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection. Every way out of a request is one of send_json(), stream() and
    fail(); each request is logged once, by answer()."""

    protocol_version = "HTTP/1.1"
    server_version = "claude_max_proxy/" + __version__
    sys_version = ""
    disable_nagle_algorithm = True  # a token must not wait for the next one
    server: Server

    def setup(self) -> None:
        super().setup()
        self.reader = TimedReader(self.connection)
        self.rfile = io.BufferedReader(self.reader)

    def handle_one_request(self) -> None:
        self.reader.deadline = None
        self.body_unread = False
        self.log_fields: Json = {}
        try:
            super().handle_one_request()
        except OSError:  # gone, or too slow: there is nobody to tell
            self.close_connection = True

    def answer(self) -> None:
        """Any method of any path."""
        begun = time.monotonic()
        self.status = 0
        self.body_unread = "Content-Length" in self.headers or self.is_chunked()
        try:
            self.route()
        except APIError as error:
            self.fail(error)
        except (Disconnected, OSError):
            self.status = self.status or 499
            self.close_connection = True
        except Exception as error:  # a bug of ours must not look like a hang-up
            trace = error.__traceback__
            while trace and trace.tb_next:
                trace = trace.tb_next
            line = trace.tb_lineno if trace else 0
            log(f"internal error: {type(error).__name__} in line {line}")
            self.fail(APIError(500, "Internal error of the proxy.", "api_error"))
        self.log_answer(time.monotonic() - begun)
        self.skip_body()

    do_GET = do_HEAD = do_POST = do_OPTIONS = do_PUT = do_PATCH = do_DELETE = answer

    def route(self) -> None:
        self.guard()
        path = urllib.parse.unquote(self.path.split("?")[0]).rstrip("/")
        path = path[len("/v1") :] if path.startswith("/v1/") else path
        if path.startswith("/models/"):
            path, self.model_id = "/models/", path[len("/models/") :]
        allowed = self.ROUTES.get(path)
        if allowed is None:
            message = f"There is no {self.path[:100]} here. Try /v1/chat/completions."
            raise APIError(404, message, code="unknown_url")
        method = "GET" if self.command == "HEAD" else self.command
        if method not in allowed:
            methods = ", ".join([*allowed, *(["HEAD"] if "GET" in allowed else [])])
            message = f"{self.command} is not allowed here; {methods} is."
            raise APIError(405, message, headers={"Allow": methods})
        allowed[method](self)

    def guard(self) -> None:
        """Who may ask: the ladder. Raises APIError, or answers a preflight."""
        host = self.headers.get_all("Host") or []
        if len(host) > 1 or (not host and self.request_version != "HTTP/1.0"):
            raise APIError(400, "A request needs one Host header.")
        if host and not self.is_our_name(host[0]):
            raise APIError(403, "This Host is not served.", "permission_error")
        origin = self.headers.get("Origin")
        if origin is not None and not self.is_allowed_origin(origin):
            message = "This web origin may not ask. See --allow-origin."
            raise APIError(403, message, "permission_error", "origin_not_allowed")
        site = self.headers.get("Sec-Fetch-Site", "none")
        if origin is None and site == "cross-site":
            message = "Web pages of other sites may not ask."
            raise APIError(403, message, "permission_error", "origin_not_allowed")
        if self.server.stopping:
            raise unavailable("The server is stopping.", "stopping")
        key = self.server.settings.api_key
        if key and self.command != "OPTIONS":
            given = self.headers.get("Authorization", "").partition(" ")[2].strip()
            given = given or self.headers.get("X-Api-Key", "")
            if not hmac.compare_digest(given.encode(), key.encode()):
                message = "Incorrect API key: this server was started with --api-key."
                raise APIError(401, message, "authentication_error", "invalid_api_key")

    def is_our_name(self, host: str) -> bool:
        """Against DNS rebinding: a foreign name that was made to mean our address. With
        an API key on all interfaces any name will do; the key guards."""
        name = re.sub(r":\d*$", "", host.strip().lower())
        bound = self.server.settings.host.lower()
        if bound in ("0.0.0.0", "::", ""):
            return True
        return is_loopback(name.strip("[]")) or name.strip("[]") == bound

    def is_allowed_origin(self, origin: str) -> bool:
        """This machine's pages, applications, and what --allow-origin names."""
        if origin in self.server.origins:
            return True
        scheme, _, rest = origin.partition("://")
        if scheme in ("http", "https"):
            return is_loopback(re.sub(r":\d*$", "", rest.lower()).strip("[]"))
        return bool(rest)  # app://, vscode-webview://, …; but not "null"

    def preflight(self) -> None:
        """CORS (Fetch standard, 3.3): what the browser asks before the request."""
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
        models = [model_object(name) for name in MODELS]
        self.send_json(200, {"object": "list", "data": models})

    def get_model(self) -> None:
        cli_model(self.model_id)
        self.send_json(200, model_object(self.model_id))

    def post_chat(self) -> None:
        ask = parse_request(self.read_json(), self.server.thoughts)
        self.log_fields["model"] = ask.requested[:60]
        chunks = self.server.chunks(ask, self.connection)
        with contextlib.closing(self.watched(chunks)) as chunks:
            if ask.stream:
                self.stream(chunks)
            else:
                self.send_json(200, fold(chunk for chunk in chunks if chunk))

    ROUTES = {
        "/health": {"GET": get_health, "OPTIONS": preflight},
        "/models": {"GET": get_models, "OPTIONS": preflight},
        "/models/": {"GET": get_model, "OPTIONS": preflight},
        "/chat/completions": {"POST": post_chat, "OPTIONS": preflight},
    }

    def watched(self, chunks: Iterator[Optional[Json]]) -> Iterator[Optional[Json]]:
        """The chunks as they are; what the log line will say is noted in passing."""
        begun = time.monotonic()
        with contextlib.closing(chunks):
            for chunk in chunks:
                if chunk and "first" not in self.log_fields:
                    self.log_fields["first"] = f"{time.monotonic() - begun:.3f}"
                    self.log_fields["model"] = chunk["model"]
                if chunk and chunk.get("usage"):
                    usage = chunk["usage"]
                    self.log_fields["in"] = usage["prompt_tokens"]
                    details = usage["prompt_tokens_details"]
                    self.log_fields["cached"] = details["cached_tokens"]
                    self.log_fields["out"] = usage["completion_tokens"]
                yield chunk

    # Reading.

    def is_chunked(self) -> bool:
        return "Transfer-Encoding" in self.headers

    def handle_expect_100(self) -> bool:
        """"100 Continue" is sent by read_body(), after the guards."""
        return True

    def read_json(self) -> Any:
        """The request body. Raises APIError 400, 413, 415."""
        browser = "Origin" in self.headers or "Sec-Fetch-Site" in self.headers
        kind = self.headers.get_content_type()
        if browser and kind != "application/json":
            raise APIError(415, "Content-Type must be application/json.")
        raw = self.read_body()
        self.body_unread = False
        try:
            return parse_json(raw)
        except RecursionError:
            raise bad("", "The JSON is nested too deeply.") from None
        except ValueError:
            message = "The request body is not valid JSON in UTF-8."
            raise bad("", message) from None

    def read_body(self) -> bytes:
        """Content-Length or chunked (RFC 9112, 6 and 7.1), never both."""
        lengths = set(self.headers.get_all("Content-Length") or [])
        coding = self.headers.get("Transfer-Encoding", "").strip().lower()
        if (coding and lengths) or coding not in ("", "chunked") or len(lengths) > 1:
            raise self.framing_error("The request body's length is ambiguous.")
        length = lengths.pop() if lengths else "0"
        if not re.fullmatch(r"[0-9]{1,18}", length):
            raise self.framing_error("Content-Length must be a number.")
        if int(length) > MAX_BODY:
            raise too_large()
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        self.reader.deadline = time.monotonic() + HEADER_SECONDS
        raw = self.read_chunked() if coding else self.rfile.read(int(length))
        if len(raw) < int(length):
            raise Disconnected
        return raw

    def read_chunked(self) -> bytes:
        parts, total = [], 0
        while True:
            line = self.rfile.readline(1024)
            size = re.match(rb"([0-9a-fA-F]{1,8})[ \t]*(;.*)?\r?\n", line)
            if not size:
                raise self.framing_error("The chunked body is malformed.")
            count = int(size[1], 16)
            total += count
            if total > MAX_BODY:
                raise too_large()
            if not count:
                break
            parts.append(self.rfile.read(count))
            if len(parts[-1]) < count or self.rfile.readline(3) not in (b"\r\n", b"\n"):
                raise self.framing_error("The chunked body is malformed.")
        for _ in range(100):  # trailers
            if self.rfile.readline(1 << 16) in (b"\r\n", b"\n", b""):
                return b"".join(parts)
        raise self.framing_error("The chunked body has too many trailers.")

    def framing_error(self, message: str) -> APIError:
        self.close_connection = True  # where the next request begins is unknown
        return APIError(400, message)

    def skip_body(self) -> None:
        """An early answer must not be lost in a reset: give the client a moment to
        send the rest, which nobody reads, and hang up."""
        if not self.body_unread:
            return
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.reader.deadline = time.monotonic() + 2
            expects = self.headers.get("Expect")
            while not expects and self.rfile.read1(1 << 16):
                pass

    # Writing.

    def send_json(
        self, status: int, body: Any, headers: Optional[Dict[str, str]] = None
    ) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        head = {"Content-Length": str(len(data)), **(headers or {})}
        if data:
            head["Content-Type"] = "application/json"
        self.start_response(status, head)
        if self.command == "HEAD":
            data = b""
        self.send(self.header_bytes() + data)

    def start_response(self, status: int, headers: Dict[str, str]) -> None:
        self.status = status
        self.send_response_only(status)
        self.send_header("Date", self.date_time_string())
        for name, value in headers.items():
            self.send_header(name, value)
        origin = self.headers.get("Origin") if hasattr(self, "headers") else None
        if origin is not None and self.is_allowed_origin(origin):
            self.send_header("Access-Control-Allow-Origin", origin)
        self.send_header("Vary", "Origin")
        self.send_header("X-Content-Type-Options", "nosniff")
        if self.close_connection or self.body_unread:
            self.send_header("Connection", "close")

    def header_bytes(self) -> bytes:
        """What send_header() gathered, to go out in one packet with the body."""
        data = b"".join(self._headers_buffer) + b"\r\n"
        self._headers_buffer = []
        return data

    def send(self, data: bytes) -> None:
        self.connection.settimeout(HEADER_SECONDS)
        self.connection.sendall(data)

    def stream(self, chunks: Iterator[Optional[Json]]) -> None:
        """Server-sent events. The status line waits for the first sign of life, so that
        a failure before it has its own."""
        self.streaming = False
        alive = time.monotonic() + ALIVE_SECONDS
        try:
            for chunk in chunks:
                if chunk is None:
                    if time.monotonic() < alive:
                        continue
                    chunk = self.still_alive()
                self.event(json.dumps(chunk))
                alive = time.monotonic() + ALIVE_SECONDS
        except APIError as error:
            if not self.streaming:
                raise
            self.status = error.status
            self.event(json.dumps(error.body))
        else:
            self.event("[DONE]")
        if self.chunked:
            self.send(b"0\r\n\r\n")

    def still_alive(self) -> Json:
        """A chunk that changes nothing. (A comment would not reset the watchdogs of
        some clients.)"""
        model = self.log_fields["model"]
        reply = Reply("chatcmpl-0", int(time.time()), model, with_usage=False)
        return reply.delta(0, {"content": ""})

    def event(self, text: str) -> None:
        data = f"data: {text}\n\n".encode()
        if not self.streaming:
            self.start_stream()
        if self.chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self.connection.sendall(data)

    def start_stream(self) -> None:
        self.streaming = True
        self.chunked = self.request_version != "HTTP/1.0"
        headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        if self.chunked:
            headers["Transfer-Encoding"] = "chunked"
        else:
            self.close_connection = True
        self.start_response(200, headers)
        self.send(self.header_bytes())

    def fail(self, error: APIError) -> None:
        """The one renderer of errors."""
        with contextlib.suppress(OSError):
            self.send_json(error.status, error.body, error.headers)

    def send_error(self, code: int, message: Any = None, explain: Any = None) -> None:
        """http.server's own complaints about a malformed request, in our shape."""
        self.close_connection = True
        text = str(message or http.server.BaseHTTPRequestHandler.responses[code][0])
        self.request_version = getattr(self, "request_version", "HTTP/1.0")
        self.command = getattr(self, "command", None) or "-"
        self.fail(APIError(int(code), text[:200]))
        self.log_answer(0.0)

    def log_answer(self, seconds: float) -> None:
        """status method path, then what is known as name=value."""
        path = re.sub(r"[^!-~]", "?", getattr(self, "path", "-").split("?")[0])[:80]
        fields = "".join(f" {k}={v}" for k, v in self.log_fields.items())
        log(f"{self.status} {self.command} {path}{fields} total={seconds:.3f}")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: log_answer() has one line for each request."""


def model_object(name: str) -> Json:
    return {"id": name, "object": "model", "created": 0, "owned_by": "anthropic"}


def too_large() -> APIError:
    message = f"The request body is larger than {MAX_BODY >> 20} MiB."
    return APIError(413, message, code="request_too_large")


LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def parse_json(raw: bytes) -> Any:
    """JSON in UTF-8 (RFC 8259), without NaN and Infinity. A half of a surrogate pair,
    which the API refuses, becomes U+FFFD. Raises ValueError, RecursionError."""

    def refuse(name: str) -> Any:
        raise ValueError(name)

    value = json.loads(raw.decode("utf-8-sig"), parse_constant=refuse)
    if re.search(rb"\\u[dD][89a-fA-F]", raw):
        text = json.dumps(value, ensure_ascii=False)
        value = json.loads(LONE_SURROGATE.sub("\ufffd", text))
    return value


def log(text: str) -> None:
    """A line on stderr. Never prompt text."""
    line = f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text.strip()}\n"
    with contextlib.suppress(OSError, ValueError):  # a closed stderr stops nobody
        sys.stderr.write(line)
        sys.stderr.flush()


# ── Main ───────────────────────────────────────────────────────────────────────────


def raise_file_limit() -> None:
    """macOS gives a process 256 descriptors; each connection and CLI needs some."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def withheld_note() -> str:
    found = [name for name in WITHHELD if os.environ.get(name)]
    return f"{', '.join(found)} is set; it is not handed to Claude Code." if found else ""


def run_checks(settings: Settings) -> int:
    """--check: a line for each thing that must be right -> the exit code."""
    keeper = Keeper(settings.claude)
    try:
        program = keeper.program()
        ok = keeper.ask_login()
        print(f"ok       Claude Code {program.version_text} at {program.path}")
        print("ok       logged in" if ok else f"problem  {LOGIN_CURE}")
    except APIError as error:
        ok = False
        print(f"problem  {error}")
    finally:
        keeper.close()
    try:
        with socket.create_server((settings.host, settings.port)):
            print(f"ok       port {settings.port} is free")
    except OSError as error:
        ok = False
        print(f"problem  {bind_problem(settings, error)}")
    print(f"ok       Python {sys.version.split()[0]}")
    if withheld_note():
        print(f"note     {withheld_note()}")
    return 0 if ok else 1


def bind_problem(settings: Settings, error: OSError) -> str:
    where = f"{settings.host}:{settings.port}"
    if error.errno == errno.EADDRINUSE:
        return f"{where} is in use: stop what listens there, or choose another --port."
    return f"can't listen on {where}: {error.strerror or error}."


def announce(server: Server) -> None:
    """What was found, once, on stderr."""
    host = server.settings.host
    host = "localhost" if is_loopback(host) else host
    log(f"{own_version()} serves http://{host}:{server.server_port}/v1")
    try:
        program = server.keeper.program()
        log(f"Claude Code {program.version_text} at {program.path}")
        if not server.keeper.ask_login():
            log(LOGIN_CURE)
    except APIError as error:
        log(str(error))
    if withheld_note():
        log(withheld_note())


def main(argv: Optional[List[str]] = None) -> int:
    settings, check_only = parse_arguments(sys.argv[1:] if argv is None else argv)
    if check_only:
        return run_checks(settings)
    raise_file_limit()
    try:
        server = Server(settings)
    except OSError as error:
        print(f"claude_max_proxy: {bind_problem(settings, error)}", file=sys.stderr)
        return 2

    def stop(number: int, frame: Any) -> None:
        if server.stopping:  # a second signal: at once
            server.keeper.stop_all(signal.SIGKILL)
            server.keeper.close()
            os._exit(1)
        server.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    announce(server)
    server.serve()
    server.drain()
    return 0


if __name__ == "__main__":
    sys.exit(main())
