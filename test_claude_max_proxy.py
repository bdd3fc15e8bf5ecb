#!/usr/bin/env python3
"""Tests of claude_max_proxy, its stand-in CLI, and its benchmark, in one file.

    python3 test_claude_max_proxy.py            run the tests (brings its own pytest)
    python3 test_claude_max_proxy.py -k tools   …some of them: pytest's arguments work
    python3 test_claude_max_proxy.py --bench [--claude PATH]
                                                measure it beside the bare CLI
    python3 claude_max_proxy.py --claude ./test_claude_max_proxy.py
                                                try the server without a subscription

Two doubles. The stand-in CLI is this file, executed as `claude`: it speaks the control
protocol and answers as the last user text asks, in words of the form mock:KEY=VALUE
(see `events`, `misbehave`); mock:show says back all that it was told. The small
Messages API (`MessagesAPI`) is for the tests of the contract with the REAL CLI: they
run when a real `claude` is on PATH, or when CLAUDE_CLIS names some (paths, separated
like PATH).
"""

import json
import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))


# ── What a model would say ─────────────────────────────────────────────────────────


def wishes(text):
    """The mock: words of a text; a word without "=" is wished for with ""."""
    words = [part.split()[0] for part in text.split("mock:")[1:]]
    return dict(word.partition("=")[::2] for word in words)


def events(wish, tools=(), model="claude-mock-1", prompt=(10, 0, 0)):
    """Yield the Messages API's stream events as `wish` asks for them:

    tokens=N  text deltas (5)      gap_ms=N  between them       delay_ms=N  before all
    say=TEXT  the text ("~" is a space)      json=TEXT  pieces of a JSON string each
    think=N  thinking deltas       stop=REASON                  notext=  no text
    tool=NAME  a call, or several: A,B       input=JSON  its arguments
    """
    time.sleep(float(wish.get("delay_ms", 0)) / 1000)
    fresh, read, written = prompt
    usage = {"input_tokens": fresh, "cache_read_input_tokens": read}
    usage.update(cache_creation_input_tokens=written, output_tokens=1)
    message = {"id": f"msg_{time.time_ns()}", "type": "message", "role": "assistant"}
    message.update(model=model, content=[], stop_reason=None, usage=usage)
    yield {"type": "message_start", "message": message}
    blocks = []
    if "think" in wish:
        thoughts = [f"thought{i} " for i in range(int(wish["think"]))]
        blocks.append(({"type": "thinking", "thinking": "", "signature": ""}, thoughts))
    calls = wish.get("tool", "").split(",") if wish.get("tool") else []
    if "StructuredOutput" in tools and "tool" not in wish:
        calls = ["StructuredOutput"]
    elif "notext" not in wish:
        words = [f"tok{i} " for i in range(int(wish.get("tokens", 5)))]
        if "say" in wish:
            words = [wish["say"].replace("~", " ")]
        if "json" in wish:
            words = json.loads(wish["json"])
        blocks.append(({"type": "text", "text": ""}, words))
    for i, name in enumerate(calls):
        use = {"type": "tool_use", "id": f"toolu_{time.time_ns()}{i}", "name": name}
        text = wish.get("input", '{"city":"Paris"}')
        pieces = [""]  # as the API begins
        if text != "none":
            pieces += [text[k : k + 7] for k in range(0, len(text), 7)]
        blocks.append(({**use, "input": {}}, pieces))
    count = 0
    keys = {"text": "text", "thinking": "thinking", "tool_use": "partial_json"}
    kinds = {"text": "text", "thinking": "thinking", "tool_use": "input_json"}
    for index, (block, pieces) in enumerate(blocks):
        yield {"type": "content_block_start", "index": index, "content_block": block}
        deltas = [{"type": kinds[block["type"]] + "_delta", keys[block["type"]]: p} for p in pieces]
        if block["type"] == "thinking":
            deltas.append({"type": "signature_delta", "signature": "c2lnbmVk"})
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
            count += 1
            time.sleep(float(wish.get("gap_ms", 0)) / 1000)
        yield {"type": "content_block_stop", "index": index}
    stop = wish.get("stop") or ("tool_use" if calls else "end_turn")
    delta = {"stop_reason": stop, "stop_sequence": None}
    yield {"type": "message_delta", "delta": delta, "usage": {"output_tokens": count}}
    yield {"type": "message_stop"}


# ── The stand-in CLI ───────────────────────────────────────────────────────────────

SHOWN_VARIABLES = ("CLAUDE", "ANTHROPIC", "DISABLE", "ENABLE", "MAX_")


class StandIn:
    """`claude -p` as the server drives it. Faults are wished for with mock: words."""

    def __init__(self, argv):
        env = {k: v for k, v in os.environ.items() if k.startswith(SHOWN_VARIABLES)}
        self.told = {"argv": argv, "env": env, "cwd": os.getcwd(), "turns": []}
        self.told["settings"] = []
        self.tools = []
        self.backlog = []  # lines that came while an answer was awaited
        self.in_halves = False

    def lines(self):
        while True:
            raw = self.backlog.pop(0) if self.backlog else sys.stdin.readline()
            if not raw:
                return
            yield raw

    def emit(self, line):
        text = (line if isinstance(line, str) else json.dumps(line)) + "\n"
        for half in (text[:40], text[40:]) if self.in_halves else [text]:
            sys.stdout.write(half)
            sys.stdout.flush()
            time.sleep(0.005 * self.in_halves)

    def result(self, text="", error=False, status=None, turns=1, reason="completed"):
        line = {"type": "result", "subtype": "success", "is_error": error, "result": text}
        line.update(api_error_status=status, num_turns=turns, terminal_reason=reason)
        self.emit(line)

    def run(self):
        for raw in self.lines():
            line = json.loads(raw)
            kind = line["type"]
            if kind == "control_request":
                if line["request"]["subtype"] == "initialize":
                    self.initialize(line)
                else:
                    settings = line["request"]["settings"]
                    self.told["settings"].append(settings)
                    self.told["env"].update(settings.get("env", {}))
            elif kind in ("user", "assistant"):
                self.told["turns"].append(line["message"])
                self.told.setdefault("lines", []).append(
                    {k: v for k, v in line.items() if k != "message"}
                )
                if kind == "user" and line.get("shouldQuery", True):
                    self.answer(line["message"])
                elif kind == "user":
                    if "mock:deaf" in raw:
                        time.sleep(60)
                    self.result(turns=0)

    def initialize(self, line):
        self.told["initialize"] = line["request"]
        if line["request"].get("sdkMcpServers"):
            params = {"protocolVersion": "2025-11-25", "capabilities": {}}
            self.mcp("initialize", params)
            self.mcp("notifications/initialized")
            self.tools = self.mcp("tools/list")["tools"]
            self.told["tools"] = self.tools
        response = {"subtype": "success", "request_id": line["request_id"]}
        self.emit({"type": "control_response", "response": {**response, "response": {}}})

    def mcp(self, method, params=None):
        message = {"jsonrpc": "2.0", "method": method, "params": params or {}}
        if "/init" not in method:
            message["id"] = 1
        request = {"subtype": "mcp_message", "server_name": "c", "message": message}
        self.emit({"type": "control_request", "request_id": "r1", "request": request})
        while method != "tools/call":
            raw = sys.stdin.readline()
            if '"mcp_response"' in raw:
                reply = json.loads(raw)["response"]["response"]
                return reply["mcp_response"]["result"]
            self.backlog.append(raw)

    def answer(self, message):
        content = message["content"]
        text = " ".join(b.get("text", "") for b in content if b["type"] == "text")
        for block in content:
            if block["type"] == "tool_result":
                content = block.get("content")
                text += " " + (content if isinstance(content, str) else json.dumps(content))
        wish = wishes(text)
        if not wish:
            wish = {"json": json.dumps([w + " " for w in f"You said: {text}".split()])}
        if "show" in wish:
            wish["json"] = json.dumps([json.dumps(self.told)])
        names = [tool["name"] for tool in self.tools if "dropped" not in str(tool)]
        self.emit({"type": "system", "subtype": "init", "tools": names})
        misbehave(self, wish)
        self.stream(wish, names)
        if "stop" in wish:
            self.go_on(names)
        self.result("done")

    def go_on(self, names):
        """As the real one after most stop reasons: by itself, until it is killed."""
        while True:
            self.stream({"say": "AFTER"}, names)
            time.sleep(0.01)

    def stream(self, wish, names):
        block, told, cut = {}, "", int(wish.get("cut") or 0)
        model = self.told["argv"][self.told["argv"].index("--model") + 1]
        for settings in self.told["settings"]:
            model = settings.get("model", model)
        for event in events(wish, names, f"claude-{model}-mock"):
            if event["type"] == "content_block_start":
                block, told = dict(event["content_block"]), ""
            if event["type"] == "content_block_delta":
                told += event["delta"].get("text", "")
            if event["type"] == "content_block_stop":
                said = {"content": [block], "model": model, "stop_reason": None}
                self.emit({"type": "assistant", "message": said})
                if block["type"] == "tool_use" and block["name"] in names:
                    self.mcp("tools/call", {"name": block["name"]})
            self.emit({"type": "stream_event", "event": event, "parent_tool_use_id": None})
            if cut and told and event["type"] == "content_block_delta":
                cut -= 1
                if not cut:
                    return self.again(wish)

    def again(self, wish):
        """The stream broke: tell the answer again, streamed or whole."""
        wish = {k: v for k, v in wish.items() if k != "cut"}
        if wish.pop("whole", None) is None:
            if "else" in wish:
                wish["say"] = wish["else"]
            return self.stream(wish, [])
        text = "".join(e["delta"].get("text", "") for e in events(wish) if "delta" in e)
        usage = {"input_tokens": 10, "output_tokens": 5}
        message = {"model": "claude-mock-1", "usage": usage, "stop_reason": "end_turn"}
        message["content"] = [{"type": "text", "text": text}]
        self.emit({"type": "assistant", "message": message})


def misbehave(cli, wish):
    """The faults. status=N / category=X: an API failure; retry=N: an api_retry line, or
    retries=N of them; exit=N, hang, garbage, shape, empty, bytes=HEX: instead of an
    answer; line=N, stderr=N: N bytes at once; halves: each line in two pieces;
    stubborn: SIGTERM is ignored; child: so does a child process."""
    import signal  # here, for it takes time to load

    if "stubborn" in wish:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "child" in wish:
        child = os.fork()
        if not child:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
            os._exit(0)
        wish["json"] = json.dumps([str(child)])
    if "limit" in wish:
        info = {"status": "rejected", "resetsAt": time.time() + int(wish["limit"])}
        cli.emit({"type": "rate_limit_event", "rate_limit_info": info})
    if "retry" in wish:
        retry = {"type": "system", "subtype": "api_retry", "error": "rate_limit"}
        retry.update(error_status=json.loads(wish["retry"]), retry_delay_ms=7100)
        for _ in range(int(wish.get("retries", 0))):
            cli.emit(retry)
            time.sleep(0.1)
        cli.emit(retry)
        time.sleep(float(wish.get("pause", 60)))
    if "status" in wish or "category" in wish:
        category = wish.get("category", "unknown")
        said = {"model": "<synthetic>", "content": [], "stop_reason": "stop_sequence"}
        cli.emit({"type": "assistant", "error": category, "message": said})
        status = json.loads(wish.get("status", "null"))
        cli.result("API Error: mock failure", True, status, reason=wish.get("reason"))
        sys.exit(1)
    if "stderr" in wish:
        sys.stderr.write("x" * int(wish["stderr"]))
        sys.stderr.flush()
    if "line" in wish:
        cli.emit({"type": "system", "subtype": "x", "pad": "x" * int(wish["line"])})
    if "garbage" in wish:
        cli.emit("plain words\n\xff\xfe")
        cli.emit('{"type": no json')
    if "bytes" in wish:
        os.write(1, bytes.fromhex(wish["bytes"]))
    cli.in_halves = "halves" in wish
    if "shape" in wish:
        cli.emit({"type": "stream_event", "event": {"type": "message_start"}})
    if "empty" in wish:
        cli.result("a command")
    if "exit" in wish:
        sys.exit(int(wish["exit"]))
    if "hang" in wish:
        time.sleep(60)


def stand_in(argv):
    version = os.environ.get("STAND_IN_VERSION", "2.1.330")
    if argv[0] == "--version":
        return print(f"{version} (stand-in)")
    if argv[0] == "auth":
        login = os.environ.get("STAND_IN_LOGIN", "yes") == "yes"
        print(json.dumps({"loggedIn": login}))
        return sys.exit(not login)
    return StandIn(argv).run()


if __name__ == "__main__" and sys.argv[1:2] in (["-p"], ["--version"], ["auth"]):
    stand_in(sys.argv[1:])
    sys.exit()


import ast  # noqa: E402
import atexit  # noqa: E402
import collections  # noqa: E402
import concurrent.futures  # noqa: E402
import contextlib  # noqa: E402
import glob  # noqa: E402
import hashlib  # noqa: E402
import http.client  # noqa: E402
import http.server  # noqa: E402
import importlib.util  # noqa: E402
import io  # noqa: E402
import plistlib  # noqa: E402
import py_compile  # noqa: E402
import random  # noqa: E402
import re  # noqa: E402
import select  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import subprocess  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402

# ── The small Messages API ─────────────────────────────────────────────────────────


def api_blocks(message):
    content = message.get("content")
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def said_blocks(message):
    """Its blocks, those within tool results among them."""
    for block in api_blocks(message):
        yield from [block] if block["type"] == "text" else []
        if block["type"] == "tool_result":
            yield from api_blocks({"content": block.get("content") or []})


def violations(body):
    """Yield what the real API would answer 400 for."""
    thinking = (body.get("thinking") or {}).get("type", "disabled")
    choice = (body.get("tool_choice") or {}).get("type")
    names = [tool["name"] for tool in body.get("tools") or []]
    messages = [m for m in body["messages"] if m["role"] != "system"]
    if thinking != "disabled" and choice in ("any", "tool"):
        yield "Thinking may not be enabled when tool_choice forces tool use."
    budget = (body.get("thinking") or {}).get("budget_tokens", 0)
    if thinking == "enabled" and not 1024 <= budget < body["max_tokens"]:
        yield f"thinking.budget_tokens: {budget} of {body['max_tokens']}"
    if len(set(names)) != len(names):
        yield "tools: Tool names must be unique."
    for tool in body.get("tools") or []:
        schema = tool["input_schema"]
        if not re.fullmatch("[a-zA-Z0-9_-]{1,128}", tool["name"]):
            yield f"tools.name: {tool['name']}"
        if schema.get("type") != "object" or {"anyOf", "oneOf", "allOf"} & set(schema):
            yield f"tools.input_schema: {schema}"
    marked = [b for m in messages for b in api_blocks(m)] + list(body.get("system") or [])
    if sum("cache_control" in block for block in marked) > 4:
        yield "A maximum of 4 blocks with cache_control may be provided."
    if not messages or messages[0]["role"] != "user":
        yield "messages: first message must use the user role"
    calls, looping = [], False
    for i, message in enumerate(messages):
        blocks = api_blocks(message)
        results = [b["tool_use_id"] for b in blocks if b["type"] == "tool_result"]
        if sorted(results) != sorted(calls):
            yield f"messages.{i}: tool_result {results} for tool_use {calls}"
        if (any(b["type"] == "text" and not b["text"].strip() for b in blocks) or not blocks):
            yield f"messages.{i}: text content blocks must be non-empty"
        calls = [b["id"] for b in blocks if b["type"] == "tool_use"]
        if not all(re.fullmatch("[a-zA-Z0-9_-]+", call) for call in calls):
            yield f"messages.{i}: tool_use.id {calls}"
        if message["role"] == "user":
            looping = bool(results)
        later = [api_blocks(m) for m in messages[i + 1 :] if m["role"] == "user"]
        results_only = all(any(b["type"] == "tool_result" for b in m) for m in later)
        last_loop = calls and results_only
        if thinking == "enabled" and last_loop and "thinking" not in blocks[0]["type"]:
            yield f"messages.{i}: Expected `thinking`, but found `{blocks[0]['type']}`"
    if (calls or looping) and not names:
        yield "Requests which include tool_use or tool_result blocks must define tools"


class PromptCache:
    """The API's rules: entries are written at cache_control marks; a read takes the
    longest entry at a mark, or up to 20 blocks before one. Tokens of 4 characters."""

    def __init__(self):
        self.entries = set()

    def account(self, body):
        """-> (uncached, read, written) tokens."""
        parts = [("tool", tool) for tool in body.get("tools") or []]
        parts += [("system", block) for block in body.get("system") or []]
        parts += [(m["role"], b) for m in body["messages"] for b in api_blocks(m)]
        digest = hashlib.sha256(repr([body["model"], body.get("tool_choice")]).encode())
        prefixes, sizes, marks, size = [], [], [], 0
        for number, (role, block) in enumerate(parts):
            if "cache_control" in block:
                marks.append(number)
            plain = {k: v for k, v in block.items() if k != "cache_control"}
            text = json.dumps([role, plain], sort_keys=True)
            size += max(1, len(text) // 4)
            digest.update(text.encode())
            prefixes.append(digest.hexdigest())
            sizes.append(size)
        near = {k for mark in marks for k in range(max(0, mark - 20), mark + 1)}
        read = max([sizes[k] for k in near if prefixes[k] in self.entries], default=0)
        written = max([sizes[mark] for mark in marks], default=0)
        self.entries |= {prefixes[mark] for mark in marks}
        return size - max(read, written), read, max(0, written - read)


class APIHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.reply(200, {"data": []})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "messages" not in body or "count_tokens" in self.path:
            return self.reply(200, {"input_tokens": 7})
        wrong = list(violations(body))
        usage = self.server.cache.account(body)
        self.server.log.append({"body": body, "wrong": wrong, "usage": usage})
        users = [m for m in body["messages"] if m["role"] == "user"]
        texts = [b.get("text", "") for b in said_blocks(users[-1])]
        wish = wishes(" ".join(t for t in texts if not t.startswith("<system-reminder>")))
        if wrong or "status" in wish:
            status = 400 if wrong else int(wish["status"])
            kinds = {401: "authentication_error", 429: "rate_limit_error"}
            kind = kinds.get(status, "invalid_request_error")
            error = {"type": kind, "message": str(wrong or "mock failure")}
            return self.reply(status, {"type": "error", "error": error})
        names = [tool["name"] for tool in body.get("tools") or []]
        told = events(wish, names, body["model"], usage)
        told = told if "gap_ms" in wish else list(told)
        if body.get("stream"):
            with contextlib.suppress(OSError):
                self.stream(told, int(wish.get("cut") or 0))
            return
        message = {**told[0]["message"], "stop_reason": told[-2]["delta"]["stop_reason"]}
        said = [e["delta"].get("text", "") for e in told if "delta" in e]
        message["content"] = [{"type": "text", "text": "".join(said)}]
        self.reply(200, message)

    def stream(self, told, cut):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in told:
            data = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
            if cut and event["type"] == "content_block_delta":
                cut -= 1
                if not cut:
                    self.close_connection = True
                    return
        self.wfile.write(b"0\r\n\r\n")


class MessagesAPI(http.server.ThreadingHTTPServer):
    """A strict Messages API on loopback, for the real CLI."""

    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), APIHandler)
        self.log, self.cache = [], PromptCache()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self.thread.start()

    def handle_error(self, request, client_address):
        """A CLI that was killed is nobody's error."""

    def close(self):
        self.shutdown()
        self.thread.join()
        self.server_close()

    def environment(self, home):
        """With which a CLI asks this API, and nobody else."""
        return {
            "HOME": str(home),
            "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{self.server_port}",
            "CLAUDE_CODE_ASSUME_FIRST_PARTY_BASE_URL": "1",
            "CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-mock",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_TELEMETRY": "1",
        }


# ── Running the tests ──────────────────────────────────────────────────────────────


def run_tests():
    """With the pytest that is there, or one in a venv under the user's cache."""
    try:
        import pytest
    except ImportError:
        import venv

        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        name = "venv-%d.%d" % sys.version_info[:2]
        home = os.path.join(cache, "claude_max_proxy", name)
        python = os.path.join(home, "bin", "python")
        probe = [python, "-c", "import pytest"]
        if not os.path.exists(python) or subprocess.run(probe, stderr=-3).returncode:
            venv.create(home, with_pip=True, clear=True)
            subprocess.check_call([python, "-m", "pip", "-q", "install", "pytest"])
        os.execv(python, [python, *sys.argv])
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", HERE]
    sys.exit(pytest.main([__file__, *options, *sys.argv[1:]]))


if __name__ == "__main__" and "--bench" not in sys.argv:
    sys.dont_write_bytecode = True
    run_tests()

# ── A client ───────────────────────────────────────────────────────────────────────


def fold(chunks):
    """The choices that the chunks of a chat completion add up to."""
    choices = {}
    for piece in (piece for chunk in chunks for piece in chunk["choices"]):
        choice = choices.setdefault(piece["index"], {"message": {}})
        choice.update(index=piece["index"], finish_reason=piece["finish_reason"])
        for key, new in piece["delta"].items():
            if key == "tool_calls":
                fold_calls(choice["message"].setdefault(key, []), new)
            else:
                choice["message"][key] = choice["message"].get(key, "") + new
    return [choices[index] for index in sorted(choices)]


def fold_calls(calls, deltas):
    for delta in deltas:
        if delta["index"] == len(calls):
            calls.append({**delta, "function": {**delta["function"], "arguments": ""}})
        calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]


# ── The benchmark ──────────────────────────────────────────────────────────────────
# The real CLI, a Messages API on loopback that answers at once, and the server as a
# process of its own: what is measured is what stands between a client and the API.

RUNS = 5  # of each measurement; the median counts, the first comes after a warm-up
API_MS, GAP_MS, PAUSE = 500, 20, 0.05  # an agent's step: to the first token, between
STEP = f"mock:delay_ms={API_MS} mock:gap_ms={GAP_MS} mock:tokens=40"
TOOL = {"name": "look", "description": "", "inputSchema": {"type": "object"}}
SERVER_INFO = {"name": "c", "version": "1"}


class ByHand:
    """A CLI without a server: up before it is asked, and never started again."""

    def __init__(self, bench, tools=()):
        self.proxy, self.tools = bench.proxy, tools
        argv = [bench.claude, *self.proxy.ARGV, "--model", "sonnet"]
        options = {"env": self.proxy.environment(bench.claude), "cwd": bench.home}
        options.update(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process = subprocess.Popen(argv, **options)
        time.sleep(1.5)

    def write(self, *lines):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def until(self, wanted):
        """Read up to a line that has one of these words; serve the tools meanwhile."""
        for raw in self.process.stdout:
            line = json.loads(raw)
            if line["type"] == "control_request":
                message = line["request"]["message"]
                if message["method"] == "tools/call":
                    self.call = line
                else:
                    version = message.get("params", {}).get("protocolVersion")
                    result = {"protocolVersion": version, "tools": self.tools}
                    result.update(capabilities={"tools": {}}, serverInfo=SERVER_INFO)
                    self.write(self.reply(line, result))
            if any(word in raw for word in wanted):
                return

    def reply(self, line, result):
        reply = {"jsonrpc": "2.0", "id": line["request"]["message"].get("id", 0)}
        response = {"subtype": "success", "request_id": line["request_id"]}
        response["response"] = {"mcp_response": {**reply, "result": result}}
        return {"type": "control_response", "response": response}

    def initialize(self, system):
        setup = self.proxy.Setup(system, self.tools)
        return self.proxy.initialize_line(setup)

    def query(self, text):
        turn = {"role": "user", "content": [{"type": "text", "text": text}]}
        line = self.proxy.query_line(turn, (2, 1, 330))
        del line["message"]["content"][-1]["cache_control"]  # the API takes four
        return line

    def first_text(self, *lines):
        """Seconds from these lines to the first text."""
        begun = time.perf_counter()
        self.write(*lines)
        self.until([b'"text_delta"'])
        return time.perf_counter() - begun

    def steps(self):
        """-> seconds of each step of an agent, less the API's."""
        seconds = []
        text = STEP + " mock:tool=look" * bool(self.tools)
        self.write(self.initialize("agent"))
        for number in range(RUNS + 1):
            line = self.query(text)
            if number and self.tools:
                line = self.reply(self.call, {"content": [{"type": "text", "text": text}]})
            seconds.append(self.first_text(line) - API_MS / 1000)
            self.until([b'"tools/call"' if self.tools else b'"type":"result"'])
            time.sleep(PAUSE)
        return seconds[1:]

    def close(self):
        self.process.kill()
        self.process.communicate()


class Bench:
    def __init__(self, claude):
        sys.path.insert(0, HERE)
        import statistics

        import claude_max_proxy

        self.proxy, self.median = claude_max_proxy, statistics.median
        self.claude, self.api = claude, MessagesAPI()
        self.home = tempfile.mkdtemp()
        os.environ.update(self.api.environment(self.home))
        for name in claude_max_proxy.WITHHELD:
            os.environ.pop(name, None)

    def close(self):
        self.api.close()
        shutil.rmtree(self.home, ignore_errors=True)

    @contextlib.contextmanager
    def server(self, *arguments):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        argv = [sys.executable, self.proxy.__file__, "--port", str(self.port)]
        argv += ["--claude", self.claude, *arguments]
        process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
        self.pid = process.pid
        try:
            while socket.socket().connect_ex(("127.0.0.1", self.port)):
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            process.wait()

    def ask(self, messages, **parameters):
        """-> (seconds to the first text, the message)."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        body = {"model": "sonnet", "messages": messages, "stream": True, **parameters}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.connect()
            chunks, self.tokens_at, begun = [], [], time.perf_counter()
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            for line in connection.getresponse():
                if line.startswith(b"data: {"):
                    chunks.append(json.loads(line[6:]))
                    if chunks[-1]["choices"][0]["delta"].get("content"):
                        self.tokens_at.append(time.perf_counter())
        return self.tokens_at[0] - begun, fold(chunks)[0]["message"]

    def bare(self):
        """`claude -p` as a user would run it -> first text."""
        argv = [self.claude, "-p", "hi", "--output-format", "stream-json", "--verbose"]
        argv += ["--include-partial-messages", "--model", "sonnet"]
        begun, null, pipe = time.perf_counter(), subprocess.DEVNULL, subprocess.PIPE
        with subprocess.Popen(argv, stdin=null, stdout=pipe, cwd=self.home) as cli:
            first = [time.perf_counter() for line in cli.stdout if b'"text_delta"' in line][0]
        return first - begun

    def by_hand(self):
        """A CLI that is already up, told all it needs in one write -> first text."""
        one = ByHand(self)
        seconds = one.first_text(one.initialize(f"{time.time()}"), one.query("hi"))
        one.close()
        return seconds

    def by_turns(self, measure, pause=0.0):
        """By turns with a CLI fed by hand, for this machine's other work changes what
        both take (and spares get ready meanwhile) -> (median, median by hand)."""
        values, by_hand = [], []
        for number in range(RUNS):
            by_hand.append(self.by_hand())
            time.sleep(pause)
            values.append(measure(number))
        return self.median(values), self.median(by_hand)

    def fresh(self, number):
        """The first request of a server that has been up for a while -> first text."""
        with self.server():
            time.sleep(2.5)
            return self.ask(f"first {number}")[0]

    def next_turn(self):
        """The next turn of a conversation of 10 -> as by_turns()."""
        history = []
        for i in range(10):
            history += [{"role": "user", "content": f"text {i}"}]
            history += [{"role": "assistant", "content": f"answer {i}"}]

        def ask(text):
            history.append({"role": "user", "content": text})
            first, message = self.ask(history)
            history.append(message)
            return first

        ask("and now")
        return self.by_turns(lambda number: ask(f"next {number}"), pause=0.6)

    def steps(self, tools):
        """An agent's steps -> (median through the server, by hand), less the API's."""
        one = ByHand(self, [TOOL] if tools else [])
        by_hand = one.steps()
        one.close()
        function = {"name": "look", "description": "", "parameters": {}}
        extra = {"tools": [{"type": "function", "function": function}]} if tools else {}
        text = STEP + " mock:tool=look" * bool(tools)
        history, seconds = [{"role": "user", "content": text}], []
        for _ in range(RUNS + 2):
            first, message = self.ask(history, **extra)
            seconds.append(first - API_MS / 1000)
            history.append(message)
            for call in message.get("tool_calls", ()):
                history.append({"role": "tool", "tool_call_id": call["id"]})
            history += [] if tools else [{"role": "user"}]
            history[-1]["content"] = text
            time.sleep(PAUSE)
        return self.median(seconds[2:]), self.median(by_hand)

    def of_process(self, column):
        """What `ps` says of the server."""
        argv = ["ps", "-o", f"{column}=", "-p", str(self.pid)]
        return subprocess.check_output(argv).decode().strip()

    def cpu(self):
        """User and system seconds of the server."""
        with contextlib.suppress(OSError), open(f"/proc/{self.pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        minutes, _, seconds = self.of_process("time").rpartition(":")
        return int(minutes or 0) * 60 + float(seconds)

    def paid(self):
        """A conversation of 10 turns -> (tokens paid for, share read from the cache)."""
        del self.api.log[:]
        history = [{"role": "system", "content": "system " * 285}]
        for number in range(10):
            history.append({"role": "user", "content": f"{number} " + "word " * 400})
            history.append(self.ask(history)[1])
        usages = [entry["usage"] for entry in self.api.log]
        fresh, read, written = (sum(column) for column in zip(*usages))
        return fresh + written, read / (fresh + read + written)

    def run(self):
        version = subprocess.check_output([self.claude, "--version"]).decode().split()[0]
        print(f"Claude Code {version}, Python {sys.version.split()[0]}, "
              f"{time.strftime('%Y-%m-%d')}, medians of {RUNS}")  # fmt: skip
        print(f"{'to the first text':44} {'':10}  {'/ bare':>6}  {'/ up':>6}")
        self.bare()
        bare = self.median([self.bare() for _ in range(RUNS)])

        def row(name, seconds, up=None):
            ratios = [f"{seconds / x:6.2f}" if x else "" for x in (bare, up)]
            print(f"{name:44} {seconds * 1000:7.0f} ms  {'  '.join(ratios)}", flush=True)

        row("bare `claude -p`", bare)
        with self.server("--spares", "0"):
            self.ask("warm up")
            cold, up = self.by_turns(lambda number: self.ask(f"cold {number}")[0])
        row("a CLI already up, fed by hand", up, up)
        row("server, cold", cold, up)
        row("first request of a fresh server", *self.by_turns(self.fresh))
        with self.server():
            self.ask("warm up")
            row("next turn of a conversation of 10", *self.next_turn())
            row("step of a chat, less the API's time", *self.steps(tools=False))
            row("step of an agent with a tool, the same", *self.steps(tools=True))
            gaps = [b - a for a, b in zip(self.tokens_at, self.tokens_at[1:])]
            print(f"longest gap between two tokens of it, {GAP_MS} ms apart: "
                  f"{max(gaps) * 1000:.0f} ms")  # fmt: skip
            tokens, before = 20000, self.cpu()
            self.ask(f"mock:tokens={tokens}")
            used = (self.cpu() - before) / tokens * 1000
            print(f"server CPU per 1,000 tokens {used * 1000:.1f} ms; "
                  f"RSS {int(self.of_process('rss')) / 1024:.1f} MB")  # fmt: skip
            time.sleep(2)
            paid, share = self.paid()
        print(f"10 turns of 2,000 characters: {paid} input tokens paid for, "
              f"{share:.0%} read from the cache")  # fmt: skip


if __name__ == "__main__":
    named = sys.argv[sys.argv.index("--claude") + 1] if "--claude" in sys.argv else "claude"
    bench = Bench(shutil.which(named) or sys.exit("--bench needs a real `claude`."))
    try:
        bench.run()
    finally:
        bench.close()
    sys.exit()


import pytest  # noqa: E402

sys.path.insert(0, HERE)
import claude_max_proxy as proxy  # noqa: E402

LOG = proxy.log  # for tests it is replaced
SHORT = {"TICK_SECONDS": 0.05, "TERM_SECONDS": 0.3, "DRAIN_SECONDS": 0.1}
vars(proxy).update(SHORT)  # in this process, and in those of running()

# ── Harness ────────────────────────────────────────────────────────────────────────


def until(condition, seconds=30.0):
    """Wait for a condition; its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.001)
    raise AssertionError(f"not within {seconds} s: {condition}")


def read_all(connection):
    """What comes up to the end of a connection."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def read_until(connection, pattern):
    """What comes up to something that matches -> the match."""
    seen = b""
    while not re.search(pattern, seen):
        seen += connection.recv(65536) or pytest.fail(f"only {seen}")
    return re.search(pattern, seen)


def in_threads(*functions):
    """Call each in a thread of its own -> their results."""
    with concurrent.futures.ThreadPoolExecutor(len(functions)) as pool:
        return [one.result() for one in [pool.submit(function) for function in functions]]


class Result:
    """A response: status, headers, json, and for a stream its chunks."""

    def __init__(self, status, headers, raw):
        self.status, self.headers, self.raw = status, headers, raw
        self.text = raw.decode()
        self.json, self.chunks, self.done = None, [], False
        if "event-stream" in headers.get("Content-Type", ""):
            lines = [block.split("\n")[-1] for block in self.text.split("\n\n") if block]
            assert all(line.startswith("data: ") for line in lines), self.text
            self.done = lines[-1] == "data: [DONE]"
            self.chunks = [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]
        elif raw:
            self.json = json.loads(raw)

    @property
    def error(self):
        return (self.json or self.chunks[-1])["error"]

    @property
    def choices(self):
        return self.json["choices"] if self.json else fold(self.chunks)

    @property
    def message(self):
        return self.choices[0]["message"]

    @property
    def content(self):
        return self.message["content"]

    @property
    def finish(self):
        return self.choices[0]["finish_reason"]

    @property
    def calls(self):
        return [(c["id"], c["function"]) for c in self.message.get("tool_calls", ())]


def result_of(connection):
    """The response to what an HTTPConnection has asked."""
    response = connection.getresponse()
    return Result(response.status, response.headers, response.read())


FAST_JSON = """
import _json
class Rules:
    strict, object_hook, object_pairs_hook = True, None, None
    parse_float, parse_int, parse_constant = float, int, float
scan = _json.make_scanner(Rules)
encode = _json.make_encoder(
    None, None, _json.encode_basestring_ascii, None, ": ", ", ", False, False, True)
loads = lambda text: scan(text, 0)[0]
dumps = lambda value: "".join(encode(value, 0))
"""
FAST_CLAUDE = """#!/bin/sh
[ "$1" = --version ] && exec echo "${STAND_IN_VERSION:-2.1.330} (stand-in)"
exec %s -S -E %s/stand_in.pyc "$@"
"""


def make_stand_in():
    """The stand-in as a program that starts fast: only its part of this file, compiled,
    without site, and with a json that does without `re` -> its path."""
    home = tempfile.mkdtemp(prefix="stand-in-")
    atexit.register(shutil.rmtree, home)
    with open(__file__, encoding="utf-8") as file:
        parts = {"stand_in": file.read().partition("\nimport ast")[0]}
    if json.scanner.c_make_scanner and json.encoder.c_make_encoder:
        parts["json"] = FAST_JSON
    for name, source in parts.items():
        path = os.path.join(home, name)
        with open(path + ".py", "w", encoding="utf-8") as file:
            file.write(source)
        py_compile.compile(path + ".py", cfile=path + ".pyc")
        os.remove(path + ".py")
    return script(os.path.join(home, "claude"), FAST_CLAUDE % (sys.executable, home))


def script(path, text):
    """Make a program of a text -> its path."""
    with open(path, "w") as file:
        file.write(text)
    os.chmod(path, 0o755)
    return str(path)


STAND_IN = make_stand_in()


class Proxy:
    """A server in this process, on a port of its own."""

    def __init__(self, **settings):
        settings = {"port": 0, "claude": STAND_IN, "spares": 0, **settings}
        self.server = proxy.Server(proxy.Settings(**settings))
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()

    def close(self):
        if not self.server.backend.stopping:
            self.server.backend.stopping = True
            self.server.backend.keeper.wake()
            self.thread.join()
            self.server.drain()

    def request(self, method, path, body=None, headers=None, timeout=30):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            return result_of(connection)

    def post(self, body, path="/v1/chat/completions", headers=None):
        raw = body if isinstance(body, (bytes, str)) else json.dumps(body)
        headers = {"Content-Type": "application/json", **(headers or {})}
        return self.request("POST", path, raw, headers)

    def chat(self, messages="hi", model="sonnet", **parameters):
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return self.post({"model": model, "messages": messages, **parameters})

    def respond(self, input="hi", **parameters):
        body = {"model": "sonnet", "input": input, **parameters}
        return self.post(body, "/v1/responses")

    def told(self, messages, **parameters):
        """What the stand-in CLI was told for these messages."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        last = {"role": "user", "content": [{"type": "text", "text": "mock:show"}]}
        reply = self.chat([*messages, last], **parameters)
        assert reply.status == 200, reply.text
        return json.loads(reply.content)

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def raw(self, data):
        """Send bytes, read to the end of the connection -> bytes."""
        with self.connect() as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return read_all(connection)

    def quiet(self):
        server, keeper = self.server, self.server.backend.keeper
        keeper.wake()
        return not (server.busy or server.backend.gate.active or keeper.live or keeper.dying)


@pytest.fixture(scope="module")
def shared():
    running = Proxy()
    yield running
    running.close()


@pytest.fixture
def server(shared):
    yield shared
    until(shared.quiet)


@pytest.fixture
def make(monkeypatch):
    """Start servers with settings of their own."""
    running = []

    def start(**settings):
        running.append(Proxy(**settings))
        return running[-1]

    yield start
    for one in running:
        one.close()


def children(pid=None):
    """The child processes of a process, by default ours: pid -> command."""
    out = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True)
    rows = [line.split(None, 2) for line in out.stdout.splitlines()]
    parent = str(pid or os.getpid())
    return {int(r[0]): r[2] for r in rows if r[1] == parent and "ps -A" not in r[2]}


@pytest.fixture(autouse=True)
def logged():
    """The lines logged. (The last ones may come when the test is over.)"""
    lines = []
    proxy.log = lines.append
    return lines


@pytest.fixture(autouse=True)
def no_process_left():
    """After each test; without waitid() only at the end, see nothing_left()."""
    yield
    until(lambda: not (hasattr(os, "waitid") and has_children()))


def has_children():
    """Whether this process has any child, be it a zombie."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


@pytest.fixture(autouse=True, scope="module")
def nothing_left(tmp_path_factory):
    """At the end no child process, thread, or temporary directory more than before."""
    before = set(threading.enumerate())
    home = tmp_path_factory.mktemp("tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(home))
        patch.setenv("TMPDIR", str(home))
        yield
    until(lambda: set(threading.enumerate()) <= before)
    assert not children()
    assert not list(home.glob("claude-max-*"))


POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
LAST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def ask_of(messages="hi", **parameters):
    messages = [user(messages)] if isinstance(messages, str) else messages
    return proxy.parse_chat({"model": "sonnet", "messages": messages, **parameters}, {})


def turns_of(*messages):
    return [(t["role"], t["content"]) for t in ask_of(list(messages)).turns]


def text_blocks(*texts):
    return [{"type": "text", "text": text} for text in texts]


def error_of(parse, *arguments, **parameters):
    """The error body of a request that is refused, and its status."""
    with pytest.raises(proxy.APIError) as caught:
        parse(*arguments, **parameters)
    return {"status": caught.value.status, **caught.value.error}


def fault(parse, *arguments, **parameters):
    """Of a request that is refused -> (status, the parameter at fault)."""
    error = error_of(parse, *arguments, **parameters)
    return error["status"], error["param"]


def refused(messages="hi", **parameters):
    return error_of(ask_of, messages, **parameters)


# What a CLI prints goes through Answer and Reply without a process, and without HTTP.


class Printer(StandIn):
    """The stand-in within this process."""

    def __init__(self, tools):
        super().__init__(["--model", "sonnet"])
        self.tools, self.printed = [{"name": name} for name in tools], []

    def emit(self, line):
        self.printed.append(line)

    def go_on(self, names):
        self.stream({"say": "AFTER"}, names)


def printed(text, tools=()):
    """The lines that a CLI prints for a text of mock: words."""
    printer = Printer(tools)
    with contextlib.suppress(SystemExit):
        printer.answer(user(text_blocks(text)))
    return printer.printed


def transcript(text, tools=()):
    """The same without the first line, which lists the tools, and without the result."""
    return printed(text, tools)[1:-1]


def streamed(text, **parameters):
    """What a client gets for what a CLI prints -> the stream, the Reply."""
    ask = ask_of(stream=True, **parameters)
    reply = proxy.Reply(ask, "id", time.time())
    lines = printed(text, [tool["name"] for tool in ask.setup.tools])
    sent = [reply.event(delta) for line in lines for delta in reply.answers[0].feed(line)]
    events = "".join(sent) + reply.end()
    return Result(200, {"Content-Type": "text/event-stream"}, events.encode()), reply


def answered(text, **parameters):
    """The completion of what a CLI prints; its stream must fold into the same."""
    stream, reply = streamed(text, **parameters)
    whole = Result(200, {}, json.dumps(reply.completion()).encode())
    assert (stream.content or None, stream.calls) == (whole.content or None, whole.calls)
    thoughts = [result.message.get("reasoning_content") for result in (stream, whole)]
    assert thoughts[0] == thoughts[1] and stream.finish == whole.finish and stream.done
    return whole


def failed(text, **parameters):
    """The APIError that is made of what a CLI prints."""
    with pytest.raises(proxy.APIError) as caught:
        streamed(text, **parameters)
    return caught.value


# ── Endpoints ──────────────────────────────────────────────────────────────────────


def test_completion(server):
    reply = server.chat("mock:tokens=2")
    assert reply.status == 200
    body = reply.json
    assert re.fullmatch("chatcmpl-[0-9a-f]{24}", body["id"])
    assert body["object"] == "chat.completion" and abs(body["created"] - time.time()) < 60
    assert body["model"] == "claude-sonnet-mock"
    message = {"role": "assistant", "content": "tok0 tok1 ", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    assert body["choices"] == [choice]
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
    usage["prompt_tokens_details"] = {"cached_tokens": 0}
    usage["completion_tokens_details"] = {"reasoning_tokens": 0}
    assert body["usage"] == usage


def test_stream(server):
    reply = server.chat("mock:tokens=2", stream=True)
    assert reply.status == 200 and reply.done
    assert reply.headers["Content-Type"] == "text/event-stream"
    assert len({(c["id"], c["created"], c["model"]) for c in reply.chunks}) == 1
    choices = [c["choices"][0] for c in reply.chunks]
    deltas = [choice["delta"] for choice in choices]
    first = {"role": "assistant", "content": ""}
    assert deltas == [first, {"content": "tok0 "}, {"content": "tok1 "}, {}]
    assert [choice["finish_reason"] for choice in choices] == [None] * 3 + ["stop"]
    assert all("usage" not in chunk for chunk in reply.chunks)


def test_include_usage(server):
    reply = server.chat("hi", stream=True, stream_options={"include_usage": True})
    assert [c["usage"] for c in reply.chunks[:-1]] == [None] * (len(reply.chunks) - 1)
    assert reply.chunks[-1]["choices"] == []
    assert reply.chunks[-1]["usage"]["prompt_tokens"] == 10


def test_streamed_tokens_leave_as_they_come(server):
    wish = "mock:tokens=2 mock:gap_ms=600000"
    with send_request(server.port, wish, True) as connection:
        read_until(connection, b"tok0")  # the second comes in ten minutes


@pytest.mark.parametrize("path", ["/v1/models", "/models", "/v1/models/", "/models?x=1"])
def test_models(server, path):
    body = server.request("GET", path).json
    assert body["object"] == "list"
    assert [m["id"] for m in body["data"]] == proxy.KNOWN_MODELS
    assert {m["object"] for m in body["data"]} == {"model"}


@pytest.mark.parametrize("name", ["claude-opus-4", "sonnet", "claude-opus-4-1", "openai/haiku"])
def test_model(server, name):
    assert server.request("GET", f"/v1/models/{name}").json["id"] == name


def test_model_unknown(server):
    reply = server.request("GET", "/v1/models/gpt-4")
    assert reply.status == 404 and reply.error["code"] == "model_not_found"


def test_health(server):
    body = server.request("GET", "/health").json
    assert body["status"] == "ok" and body["version"] == proxy.__version__
    assert body["claude"]["version"] == "2.1.330" and body["claude"]["logged_in"] is True
    assert body["active"] == 0 and body["uptime"] >= 0


@pytest.mark.parametrize("path", [
    "/chat/completions",
    "/v1/chat/completions/",
    "/v1/chat/completions?api-version=1",
])  # fmt: skip
def test_paths_of_chat(server, path):
    assert server.post({"model": "sonnet", "messages": [user("x")]}, path).status == 200


def test_not_found_and_not_allowed(server):
    assert server.request("GET", "/foo/models/opus").status == 404
    reply = server.request("GET", "/v1/embeddings")
    assert reply.status == 404 and "/v1/embeddings" in reply.error["message"]
    reply = server.request("GET", "/v1/chat/completions")
    assert reply.status == 405 and reply.headers["Allow"] == "POST, OPTIONS"
    reply = server.request("DELETE", "/v1/models")
    assert reply.status == 405 and "HEAD" in reply.headers["Allow"]
    assert server.request("BREW", "/v1/models").status == 405


def test_head(server):
    reply = server.request("HEAD", "/health")
    assert reply.status == 200 and int(reply.headers["Content-Length"]) > 10
    assert reply.raw == b""


def test_keep_alive_serves_one_request_after_another(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with contextlib.closing(connection):
        for stream in (False, True, False):
            body = json.dumps({"model": "sonnet", "stream": stream, "messages": [user("x")]})
            connection.request("POST", "/v1/chat/completions", body)
            assert result_of(connection).content == "You said: x "


def test_json_ends_with_a_newline(server):
    reply = server.request("GET", "/v1/models")
    assert reply.text.endswith("}\n")
    assert int(reply.headers["Content-Length"]) == len(reply.raw)


def test_http_1_0_gets_no_chunked_body(server):
    body = json.dumps({"model": "sonnet", "stream": True, "messages": [user("x")]})
    head = "POST /v1/chat/completions HTTP/1.0\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n{body}"
    with server.connect() as connection:
        connection.sendall(request.encode())
        reply = read_all(connection)
    head, _, rest = reply.partition(b"\r\n\r\n")
    assert b"Transfer-Encoding" not in head and rest.startswith(b"data: {")
    assert rest.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("asked", ["Keep-Alive", ""])
def test_http_1_0_is_told_that_its_connection_is_not_kept(server, asked):
    request = f"GET /health HTTP/1.0\r\nConnection: {asked}\r\n\r\n".encode()
    head = server.raw(request).partition(b"\r\n\r\n")[0]
    assert b"\r\nConnection: close" in head


# ── Models and parameters ──────────────────────────────────────────────────────────


@pytest.mark.parametrize("name, cli", [
    ("claude-opus-4", "opus"),
    ("claude-sonnet-4", "sonnet"),
    ("haiku", "haiku"),
    ("claude-opus-4-1-20250805", "claude-opus-4-1-20250805"),
    ("claude-sonnet-4-5[1m]", "claude-sonnet-4-5[1m]"),
    ("claude-max/claude-opus-4", "opus"),
    ("a/b/sonnet", "sonnet"),
])  # fmt: skip
def test_model_names(name, cli):
    assert proxy.cli_model(name) == cli


@pytest.mark.parametrize("name", [
    "gpt-4o", "", "-p", "claude-x y", "claude-\n", "claude-;ls", "--model", "x/",
    "claude-" + "x" * 200,
])  # fmt: skip
def test_model_names_refused(name):
    error = refused(model=name)
    assert error["status"] == 404 and error["code"] == "model_not_found"
    assert "claude-opus-4" in error["message"] and error["param"] == "model"


WRONG = {str: 5, int: "5", float: "x", bool: "yes", list: {}, dict: []}
RIGHT = {str: "auto", int: 1, float: 0.5, bool: False, list: [], dict: {}}


@pytest.mark.parametrize("name", list(proxy.PARAMETERS))
def test_each_parameter_has_its_types(name):
    row = proxy.PARAMETERS[name]
    assert row.why and row.use in (proxy.HONOURED, proxy.IGNORED, proxy.REFUSED)
    wrong = next(value for kind, value in WRONG.items() if type(value) not in row.kinds)
    error = refused(**{name: wrong}) if name != "messages" else refused(wrong)
    assert (error["status"], error["param"]) == (400, name)
    assert error["code"] == "invalid_type"


@pytest.mark.parametrize("name", [n for n, p in proxy.PARAMETERS.items() if p.use == proxy.IGNORED])
def test_ignored_parameters_change_nothing(name):
    value = RIGHT[proxy.PARAMETERS[name].kinds[0]]
    assert ask_of(**{name: value}) == ask_of() == ask_of(**{name: None}, unheard_of=1)


REFUSED = {"logprobs": True, "top_logprobs": 2, "modalities": ["text", "audio"], "audio": {}}
REFUSED.update(functions=[{}], function_call="auto", web_search_options={})


@pytest.mark.parametrize("name", [n for n, p in proxy.PARAMETERS.items() if p.use == proxy.REFUSED])
def test_refused_parameters(name):
    error = refused(**{name: REFUSED[name]})
    assert (error["status"], error["param"]) == (400, name)
    assert error["code"] == "unsupported_parameter"
    for value in proxy.HARMLESS:
        if type(value) in proxy.PARAMETERS[name].kinds:
            assert ask_of(**{name: value}) == ask_of()


@pytest.mark.parametrize("name", ["model", "messages"])
def test_required_parameters(name):
    body = {"model": "sonnet", "messages": [user("x")]}
    del body[name]
    with pytest.raises(proxy.APIError) as caught:
        proxy.parse_chat(body, {})
    assert (caught.value.status, caught.value.error["param"]) == (400, name)


@pytest.mark.parametrize("body", [
    "[]", "5", '"x"', "null", "{", "", "{'a':1}", '{"a":NaN}', "[" * 100000,
    '{"a":"\xff"}'.encode("latin-1"),
])  # fmt: skip
def test_bodies_that_are_no_request(server, body):
    reply = server.post(body)
    assert reply.status == 400 and reply.error["type"] == "invalid_request_error"


# A request with something at every place that is looked at, and what is taken there
# besides a value of the same JSON type: null, bool, int, float, str, list, dict by
# their first letters, "*" for a place that nobody looks at.
WHOLE = {
    "model": "sonnet", "stream": True, "stream_options": {"include_usage": True},
    "max_tokens": 5, "max_completion_tokens": 5, "stop": ["a"], "n": 1,
    "parallel_tool_calls": True, "reasoning_effort": "low", "temperature": 1, "seed": 1,
    "logit_bias": {"1": 1}, "user": "u", "metadata": {"a": "b"}, "store": False,
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "tools": [{"type": "function", "function": {
        "name": "f", "description": "d", "strict": True, "parameters": {
            "type": "object", "required": ["a"],
            "properties": {"a": {"type": "string"}},
        }}}],
    "response_format": {"type": "json_schema", "json_schema": {
        "name": "n", "strict": True, "schema": {
            "type": "object", "properties": {"b": {"anyOf": [{"type": "string"}]}},
        }}},
    "messages": [
        {"role": "system", "name": "n", "content": [{"type": "text", "text": "s"}]},
        {"role": "user", "content": [
            {"type": "text", "text": "t"},
            {"type": "image_url", "image_url": {"url": "https://x/y", "detail": "low"}},
            {"type": "file", "file": {"filename": "a", "file_data": "AAAA"}},
        ]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": [
            {"id": "i", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        ]},
        {"role": "tool", "tool_call_id": "i", "content": "r"},
    ],
}  # fmt: skip
TAKEN = {
    "stop": "ns", "temperature": "nf", "tool_choice": "n", "response_format": "n",
    "tools[].function.description": "n", "tools[].function.strict": "*",
    "tools[].function.parameters": "n", "tools[].function.parameters.required": "n",
    "tools[].function.parameters.properties": "n",
    "tools[].function.parameters.type": "n",
    "response_format.json_schema.schema.type": "n",
    "tools[].function.parameters.properties.a": "b",
    "tools[].function.parameters.properties.a.type": "*",
    "response_format.json_schema.name": "*", "response_format.json_schema.strict": "*",
    "response_format.json_schema.schema.properties": "n",
    "response_format.json_schema.schema.properties.b": "b",
    "response_format.json_schema.schema.properties.b.anyOf": "n",
    "response_format.json_schema.schema.properties.b.anyOf[]": "b",
    "response_format.json_schema.schema.properties.b.anyOf[].type": "*",
    "logit_bias.1": "*", "metadata.a": "*", "messages[].name": "*",
    "messages[].content": "nsl", "messages[].content[]": "s",
    "messages[].content[].image_url": "s", "messages[].content[].image_url.detail": "*",
    "messages[].content[].file.filename": "n", "messages[].refusal": "*",
    "messages[].tool_calls[].type": "*", "tools[].type": "n", "tool_choice.type": "n",
    "messages[].tool_calls[].function.arguments": "n",
}  # fmt: skip
OPTIONAL = "stream stream_options stream_options.include_usage max_tokens n seed user".split()
OPTIONAL += "max_completion_tokens parallel_tool_calls reasoning_effort store".split()
TAKEN.update(dict.fromkeys([*OPTIONAL, "logit_bias", "metadata"], "n"))
# (The call after `messages[].tool_calls: null` is answered, but was not made.)
SAMPLES = {"n": None, "b": True, "i": 7, "f": 1.5, "s": "https://x", "l": [[]], "d": {}}
TYPES = {bool: "b", int: "i", float: "f", str: "s", list: "l", dict: "d", type(None): "n"}


def places(value, path=()):
    """The paths of all values in a JSON value, its own first."""
    yield path
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


def written(path, index="[%d]"):
    words = [index.replace("%d", str(k)) if isinstance(k, int) else "." + k for k in path]
    return "".join(words).lstrip(".")


@pytest.mark.parametrize("path", list(places(WHOLE))[1:], ids=written)
def test_wrong_types_are_refused_at_every_place(path):
    taken = TAKEN.get(written(path, "[]"), "")
    for kind, sample in SAMPLES.items():
        if kind in taken or taken == "*" or kind == TYPES[type(at(WHOLE, path))]:
            continue
        body = json.loads(json.dumps(WHOLE))
        at(body, path[:-1])[path[-1]] = sample
        with pytest.raises(proxy.APIError) as caught:
            proxy.parse_chat(body, {})
        assert caught.value.status == 400
        head = caught.value.error["param"].split(".")[0].split("[")[0]
        assert head == path[0] or (head, path[0]) == ("tool_choice", "tools")


def test_odd_numbers_and_keys(server):
    body = '{"model":"x","model":"sonnet","messages":[{"role":"user","content":"x"}],%s}'
    assert server.post(body % '"user":"u"').status == 200  # the last one counts
    assert server.post(body % '"temperature":1e999').status == 400
    assert server.post(body % ('"max_tokens":' + "9" * 400)).status == 400
    assert server.post(body % ('"max_tokens":' + "9" * 9999)).status == 400
    assert server.post(body % ('"seed":' + "9" * 400)).status == 200
    assert server.post(body % ('"metadata":' + "[" * 10000 + "]" * 10000)).status == 400
    reply = server.post((body % '"user":"u"').replace('"content":"x"', '"content":"a\\ud800b"'))
    assert reply.content == "You said: a\ufffdb "


def test_max_tokens(server):
    told = server.told("x", max_tokens=5000)
    assert told["env"]["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == "5000"
    assert "CLAUDE_CODE_DISABLE_THINKING" not in told["env"]
    told = server.told("x", max_completion_tokens=100, max_tokens=5000)
    assert told["env"]["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == "100"
    assert told["env"]["CLAUDE_CODE_DISABLE_THINKING"] == "1"
    assert refused(max_tokens=0)["param"] == "max_tokens"


@pytest.mark.parametrize("effort, flag", [("minimal", "low"), ("low", "low"), ("max", "max")])
def test_reasoning_effort(server, effort, flag):
    told = server.told("x", reasoning_effort=effort)
    assert told["env"]["CLAUDE_CODE_EFFORT_LEVEL"] == flag


def test_reasoning_effort_none(server):
    told = server.told("x", reasoning_effort="none")
    assert told["env"]["CLAUDE_CODE_DISABLE_THINKING"] == "1"
    assert "--effort" not in told["argv"]
    assert refused(reasoning_effort="enormous")["param"] == "reasoning_effort"


# ── Messages ───────────────────────────────────────────────────────────────────────


def test_head_system_texts_are_the_system_prompt():
    ask = ask_of([system("a"), {"role": "developer", "content": text_blocks("b")}, user("c")])
    assert ask.setup.system == "a\n\nb" and len(ask.turns) == 1


@pytest.mark.parametrize("messages, turns", [
    ([user("a"), assistant("b"), user("c")],
     [("user", ["a"]), ("assistant", ["b"]), ("user", ["c"])]),
    ([user("a"), user("b")], [("user", ["a", "b"])]),
    ([user("a"), assistant("b"), assistant("c"), user("d")],
     [("user", ["a"]), ("assistant", ["b", "c"]), ("user", ["d"])]),
    ([user(text_blocks("a", "", " \n", "b"))], [("user", ["a", "b"])]),
    ([user("a"), assistant(""), user("b")], [("user", ["a", "b"])]),
    ([assistant("a"), user("b")], [("user", ["Begin."]), ("assistant", ["a"]), ("user", ["b"])]),
    ([user("a"), assistant("b")], [("user", ["a"]), ("assistant", ["b"]), ("user", ["Continue."])]),
    ([user("a"), system("be nice"), user("b")],
     [("user", ["a", "<system>\nbe nice\n</system>", "b"])]),
    ([user(["a", "b"])], [("user", ["a", "b"])]),
    ([system("a")], [("user", ["Begin."])]),
    ([user("")], [("user", ["Begin."])]),
    ([user("a"), assistant([{"type": "refusal", "refusal": "no"}]), user("b")],
     [("user", ["a"]), ("assistant", ["no"]), ("user", ["b"])]),
])  # fmt: skip
def test_turns(messages, turns):
    assert turns_of(*messages) == [(role, text_blocks(*texts)) for role, texts in turns]


@pytest.mark.parametrize("message, param", [
    (5, "messages[0]"),
    ({}, "messages[0].role"),
    ({"role": "wizard"}, "messages[0].role"),
    ({"role": "function", "name": "f", "content": "x"}, "messages[0].role"),
    ({"role": "user", "content": 5}, "messages[0].content"),
    ({"role": "user", "content": [5]}, "messages[0].content[0]"),
    ({"role": "user", "content": [{}]}, "messages[0].content[0].type"),
    ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
    ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[0].content[0].type"),
    ({"role": "system", "content": [{"type": "image_url"}]}, "messages[0].content[0].type"),
    ({"role": "assistant", "audio": {"id": "a"}}, "messages[0].audio"),
    ({"role": "assistant", "tool_calls": 5}, "messages[0].tool_calls"),
    ({"role": "assistant", "tool_calls": [5]}, "messages[0].tool_calls[0]"),
    ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "messages[0].tool_calls[0].function.name"),
    ({"role": "tool", "content": "x"}, "messages[0].tool_call_id"),
    ({"role": "user"}, "messages[0].content"),
    ({"role": "user", "content": None}, "messages[0].content"),
    ({"role": "system", "content": None}, "messages[0].content"),
    ({"role": "developer"}, "messages[0].content"),
])  # fmt: skip
def test_messages_refused(message, param):
    assert fault(ask_of, [message]) == (400, param)


def test_a_tool_result_needs_content_and_a_call_does_not():
    call = {"id": "a", "type": "function", "function": {"name": "f"}}
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "a", "content": None}
    assert refused([user("x"), called, result])["param"] == "messages[2].content"
    assert len(turns_of(user("x"), called, {**result, "content": ""})) == 3


def test_neighbours_are_joined_in_place():
    script = proxy.Transcript()
    script.add_message(proxy.Field(user("a")))
    blocks = script.turns[0]["content"]
    script.add_message(proxy.Field(user("b")))
    assert script.turns[0]["content"] is blocks and blocks == text_blocks("a", "b")


def test_history_reaches_the_cli_turn_for_turn(server):
    told = server.told([system("s"), user("a"), assistant("b"), user("c"), assistant("d")])
    assert told["initialize"]["systemPrompt"] == ["s"]
    turns = [(turn["role"], turn["content"]) for turn in told["turns"][:-1]]
    assert turns == list(zip(["user", "assistant"] * 2, map(text_blocks, "abcd")))
    assert [line.get("shouldQuery") for line in told["lines"]] == [False, None, False, None, None]
    ids = [t["id"] for t in told["turns"] if t["role"] == "assistant"]
    assert len(set(ids)) == 2
    marked = told["turns"][-1]["content"][-1]
    assert marked == {"type": "text", "text": "mock:show", "cache_control": proxy.CACHE_MARK}


def test_nothing_of_a_request_is_in_argv(server):
    told = server.told([system("SECRET"), user("SECRET"), assistant("SECRET")], user="SECRET")
    assert "SECRET" not in json.dumps([told["argv"], told["env"]])
    assert told["argv"][:3] == ["-p", "--input-format", "stream-json"]


def test_the_environment_is_closed(make, monkeypatch):
    own = "CLAUDE_MAX_PROXY_API_KEY"
    for name in (own, *proxy.WITHHELD):
        monkeypatch.setenv(name, "LEAK")
    monkeypatch.setenv("CLAUDE_CODE_OAUTH_TOKEN", "kept")
    told = make().told("x")
    assert "LEAK" not in told["env"].values()
    assert told["env"]["CLAUDE_CODE_OAUTH_TOKEN"] == "kept"
    assert told["env"]["CLAUDE_CODE_DISABLE_ATTACHMENTS"] == "1"


def test_the_working_directory_is_empty_and_private(make):
    one = make()
    cwd = one.told("x")["cwd"]
    assert os.listdir(cwd) == [] and os.stat(cwd).st_mode & 0o777 == 0o700
    one.close()
    assert not os.path.exists(cwd)


@pytest.mark.parametrize("text, old, new", [
    ("/clear", ["/", "clear"], ["/clear"]),
    ("//a", ["//", "a"], ["//a"]),
    ("/", ["\n/"], ["/"]),
    ("a/b", ["a/b"], ["a/b"]),
    ("@/etc/passwd", ["@/etc/passwd"], ["@/etc/passwd"]),
])  # fmt: skip
def test_typed_commands_are_text(text, old, new):
    content = text_blocks("first", text)
    assert proxy.untyped(content, (2, 1, 197)) == text_blocks("first", *old)
    assert proxy.untyped(content, (2, 1, 330)) == text_blocks("first", *new)
    assert proxy.turn_line({"role": "user", "content": content}, 0, (2, 1, 330))["text_not_typed"]


def test_long_prompts(server):
    told = server.told([system("s" * 300000), user("u" * 1000000), assistant("ok")])
    assert len(told["initialize"]["systemPrompt"][0]) == 300000
    assert len(told["turns"][0]["content"][0]["text"]) == 1000000


def test_unicode(server):
    text = "emoji 😀 nul \x00 crlf \r\n sep \u2028 end"
    told = server.told([user(text), assistant("ok")])
    assert told["turns"][0]["content"][0]["text"] == text
    text = r'"a\ud800b \ud83d\ude00"'
    body = '{"model":"opus","messages":[{"role":"user","content":%s}]}' % text
    assert server.post(body).content == "You said: a\ufffdb 😀 "


# ── Answers ────────────────────────────────────────────────────────────────────────


REASONS = {**proxy.FINISH_REASONS, "new_reason": "stop"}
del REASONS["tool_use"]


@pytest.mark.parametrize("reason, finish", list(REASONS.items()))
def test_finish_reasons(reason, finish):
    reply = answered(f"mock:stop={reason} mock:tokens=1")
    assert reply.finish == finish
    assert reply.content == "tok0 "  # and nothing of what the CLI does afterwards


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_cli_does_after_the_answer_is_not_told(server, stream):
    reply = server.chat("mock:stop=max_tokens mock:tokens=1", stream=stream)
    assert (reply.content, reply.finish) == ("tok0 ", "length")


def test_reasoning():
    reply = answered("mock:think=2 mock:tokens=1")
    assert reply.message["reasoning_content"] == "thought0 thought1 "
    assert reply.content == "tok0 "


@pytest.mark.parametrize("wish", ["mock:cut=2", "mock:cut=2 mock:whole", "mock:cut=5"])
def test_a_broken_stream_is_completed(wish):
    reply = answered(f"{wish} mock:tokens=6")
    assert reply.content == "".join(f"tok{i} " for i in range(6))


def test_a_broken_stream_that_goes_on_otherwise_is_an_error(server):
    reply = server.chat("mock:cut=1 mock:else=Other", stream=True)
    assert reply.status == 200 and not reply.done
    assert reply.error["code"] == "stream_interrupted"
    assert all(not c["choices"][0]["finish_reason"] for c in reply.chunks[:-1])


@pytest.mark.parametrize("first, again", [
    ("mock:tool=f,g", "mock:tool=f"),
    ("mock:tokens=5", "mock:tokens=3"),
    ("mock:tokens=5", "mock:tool=f mock:notext"),
])  # fmt: skip
def test_an_answer_told_again_must_tell_all_that_was_said(first, again):
    with pytest.raises(proxy.APIError, match="began another answer"):
        answer_to(*transcript(first)[:-3], *transcript(again))


def test_large_answers_are_the_same_streamed_and_not(server):
    wish = "mock:say=" + "x" * 500_000
    one, other = server.chat(wish), server.chat(wish, stream=True)
    assert one.content == other.content == "x" * 500_000
    words = "".join(f"tok{i} " for i in range(500))
    assert answered("mock:tokens=500").content == words


def test_a_split_emoji_is_joined():
    wish = pieces("a\ud83d", "\ude00b", "\ud83d")
    deltas = [c["choices"][0]["delta"].get("content") for c in streamed(wish)[0].chunks]
    assert deltas == ["", "a", "😀b", "\ud83d", None]
    assert answered(wish).content == "a😀b\ud83d"


def test_usage_counts_what_was_cached():
    usage = {"input_tokens": 1, "cache_read_input_tokens": 20, "output_tokens": 5}
    usage.update(cache_creation_input_tokens=300, output_tokens_details={"thinking_tokens": 4})
    reply = proxy.Reply(ask_of(n=2), "id", 0)
    answer = reply.answers[0]
    reply.answers[1].count({"input_tokens": 0})
    answer.count({"output_tokens": 1})
    answer.count({**usage, "input_tokens": 1001})
    answer.count({"output_tokens": None})
    assert reply.usage() == {
        "prompt_tokens": 1321,
        "completion_tokens": 5,
        "total_tokens": 1326,
        "prompt_tokens_details": {"cached_tokens": 20},
        "completion_tokens_details": {"reasoning_tokens": 4},
    }


# ── Failures ───────────────────────────────────────────────────────────────────────

STATUSES = [(400, 400), (401, 401), (403, 403), (404, 404), (413, 413), (429, 429)]
STATUSES += [(500, 502), (503, 503), (504, 504), (529, 503), (418, 502)]


@pytest.mark.parametrize("api, ours", STATUSES)
def test_failures_have_their_status(api, ours):
    assert failed(f"mock:status={api}").status == ours


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_an_answer(server, stream):
    reply = server.chat("mock:status=529", stream=stream)
    assert (reply.status, reply.error["code"]) == (503, "server_is_overloaded")
    assert set(reply.error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("wish, status, code", [
    ("mock:category=authentication_failed", 401, "not_logged_in"),
    ("mock:category=billing_error", 429, "insufficient_quota"),
    ("mock:category=model_not_found", 404, "model_not_found"),
    ("mock:category=overloaded", 503, "server_is_overloaded"),
    ("mock:category=news", 502, "upstream_error"),
    ("mock:status=400 mock:reason=prompt_too_long", 400, "context_length_exceeded"),
    ("mock:retry=401 mock:pause=0", 401, "not_logged_in"),
    ("mock:retry=429 mock:pause=0", 429, "rate_limit_exceeded"),
    ("mock:shape", 502, None),
    ("mock:empty", 502, None),
])  # fmt: skip
def test_other_failures(wish, status, code):
    error = failed(wish)
    assert (error.status, error.error["code"]) == (status, code)


BEGINNING = b'{"type":"stream_ev'.hex()
REQUEST = b'{"type":"control_request","request":[]}\n'.hex()
LIMIT = b'{"type":"rate_limit_event"}\n'.hex()


@pytest.mark.parametrize("stream, wish, status, code", [
    (True, "mock:exit=3", 502, "cli_died"),
    (False, "mock:exit=0", 502, "cli_died"),
    (True, f"mock:bytes={BEGINNING} mock:exit=0", 502, "cli_died"),
    (True, f"mock:bytes={REQUEST}", 502, None),
    (False, f"mock:bytes={LIMIT}", 502, None),
    (True, "mock:retry=429", 429, "rate_limit_exceeded"),  # while the CLI waits
])  # fmt: skip
def test_a_cli_that_fails(server, stream, wish, status, code):
    reply = server.chat(wish, stream=stream)
    assert (reply.status, reply.error["code"]) == (status, code)


def test_login_cure():
    assert "claude auth login" in str(failed("mock:status=401"))


def test_retry_after(server):
    assert server.chat("mock:retry=429").headers["Retry-After"] == "8"
    seconds = failed("mock:limit=300 mock:status=429").headers["Retry-After"]
    assert 290 <= int(seconds) <= 310
    assert "Retry-After" not in failed("mock:status=429").headers


@pytest.mark.parametrize("status", ["529", "null"])
def test_the_apis_own_troubles_are_waited_for(status):
    assert answered(f"mock:retry={status} mock:pause=0 mock:tokens=1").content == "tok0 "


def test_silence_is_504(make):
    one = make(timeout=0.3)
    wish = "mock:tokens=2 mock:gap_ms=60000"
    late = in_threads(
        lambda: one.chat("mock:hang"),
        lambda: one.chat("mock:retry=529 mock:retries=99"),
        lambda: one.chat(wish, stream=True),
    )
    assert [reply.status for reply in late] == [504, 504, 200]
    assert late[2].error["code"] == "timeout"


@pytest.fixture
def silent(server, monkeypatch):
    """A server that says that a stream is alive after 20 ms of silence."""
    monkeypatch.setattr(proxy, "ALIVE_SECONDS", 0.02)
    monkeypatch.setattr(proxy, "TICK_SECONDS", 0.02)
    return server


def test_a_silent_stream_is_kept_alive(silent):
    reply = silent.chat("mock:delay_ms=200 mock:tokens=1", stream=True)
    choices = [c["choices"][0]["delta"] for c in reply.chunks]
    assert len({(c["id"], c["created"]) for c in reply.chunks}) == 1
    assert choices[1] == {"content": ""} and len(choices) > 4
    assert [c for c in choices if "role" in c] == [{"role": "assistant", "content": ""}]
    assert "role" in choices[0]
    assert reply.content == "tok0 "


@pytest.mark.parametrize(
    "wish",
    ["mock:line=5000000", "mock:stderr=2000000", "mock:halves", "mock:garbage",
     "mock:bytes=" + b'{"type":"result","result":"\xff"}\n'.hex()],
)  # fmt: skip
def test_much_noise_is_no_fault(server, wish):
    assert server.chat(wish).content == "tok0 tok1 tok2 tok3 tok4 "


# ── Processes ──────────────────────────────────────────────────────────────────────


def send_request(port, text, stream, before=()):
    """A request on a connection of its own, unread."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    return ask_on(connection, text, stream, before)


def ask_on(connection, text, stream, before=()):
    messages = [*before, user(text)]
    body = json.dumps({"model": "opus", "stream": stream, "messages": messages})
    connection.sendall(POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body.encode()))
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wish", ["mock:hang", "mock:tokens=99 mock:gap_ms=60000"])
@pytest.mark.parametrize("early", [b"", b"\r\n"])
def test_a_client_that_leaves_ends_its_cli(server, stream, wish, early, monkeypatch):
    monkeypatch.setattr(proxy, "TICK_SECONDS", 60)  # so that no tick can notice it
    connection = send_request(server.port, wish, stream)
    connection.sendall(early)
    claude = until(lambda: [c for c in server.server.backend.keeper.live if c.process.pid])[0]
    until(lambda: not claude.todo and not claude.outbox)
    connection.close()
    until(lambda: claude.process.poll() is not None, 5)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wish", ["mock:delay_ms=60", "mock:gap_ms=15"])
def test_a_client_that_says_no_more_gets_its_answer(server, stream, wish, monkeypatch):
    monkeypatch.setattr(proxy, "TICK_SECONDS", 0.01)
    with send_request(server.port, wish, stream) as connection:
        connection.shutdown(socket.SHUT_WR)
        seen = read_all(connection)
    assert b" 200 OK" in seen and b"tok4 " in seen
    assert seen.endswith(b"[DONE]\n\n\r\n0\r\n\r\n" if stream else b"}\n")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wish", ["mock:hang", "mock:tokens=99 mock:gap_ms=60000"])
def test_a_client_that_says_no_more_and_leaves_later(server, stream, wish):
    connection = send_request(server.port, wish, stream)
    connection.shutdown(socket.SHUT_WR)
    connection.recv(9)  # it has been asked whether it is there
    claude = until(lambda: list(server.server.backend.keeper.live))[0]
    assert claude.process.poll() is None
    connection.close()
    until(lambda: claude.process.poll() is not None, 5)


def test_a_cli_that_closes_its_stdin_is_not_written_to_for_ever(tmp_path):
    cli = script(tmp_path / "claude", "#!/bin/sh\nexec 0<&-\nsleep 60\n")
    program = proxy.Program(cli, (2, 1, 330), ())
    (tmp_path / proxy.CWD).mkdir()
    claude = proxy.Claude(program, "x", str(tmp_path))
    claude.tell(proxy.Conversation("x", json.dumps(["x" * 3_000_000, []])))
    until(lambda: claude.write() or not claude.outbox)
    claude.stop(signal.SIGKILL)
    until(claude.is_gone)


def test_what_can_not_be_told_is_a_400(server, monkeypatch):
    def too_deep(turn, version):
        raise RecursionError

    monkeypatch.setattr(proxy, "query_line", too_deep)
    assert server.chat("hi").status == 400


def test_a_line_without_an_end(server, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_LINE", 200_000)
    assert server.chat("mock:line=100000").status == 200
    assert server.chat("mock:line=900000").status == 502


def test_when_descriptors_or_threads_run_out():
    def fails(error):
        def fail(*_):
            raise error

        return fail

    server, dropped = proxy.Server(proxy.Settings(port=0)), []
    server.shutdown_request = dropped.append
    server.get_request = fails(OSError(24, ""))
    server.accept()
    server.get_request = lambda: ("connection", "address")
    server.process_request = fails(RuntimeError())
    server.accept()
    assert dropped == ["connection"]
    server.drain()


def test_a_client_that_left_before_accept_stops_nobody():
    server = proxy.Server(proxy.Settings(port=0))
    assert not server.socket.getblocking()  # as if it had been reset meanwhile:
    server.accept()
    server.drain()


def test_a_stubborn_cli_and_its_children_are_killed(server):
    with send_request(
        server.port, "mock:stubborn mock:child mock:gap_ms=60000", True
    ) as connection:
        child = child_of(connection)
    until(lambda: gone(child), 5)
    until(server.quiet, 5)


def gone(pid):
    """Whether no such process runs (a zombie of someone else's counts as gone)."""
    if not os.path.exists("/proc/self/stat"):
        out = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
        return out.stdout.strip()[:1] in ("", "Z")
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "Z"
    return True


def test_requests_wait_in_order_when_all_places_are_taken(make):
    one = make(max_concurrency=1)
    first = send_request(one.port, "mock:gap_ms=60000", False)
    until(lambda: one.server.backend.gate.active == 1)
    second = send_request(one.port, "second", False)
    until(lambda: len(one.server.backend.gate.queue) == 1)
    third = send_request(one.port, "third", False)
    until(lambda: len(one.server.backend.gate.queue) == 2)
    second.close()  # gives up its place
    until(lambda: len(one.server.backend.gate.queue) == 1)
    first.close()
    with third:
        read_until(third, b"You said: third")


def test_some_hundreds_may_wait():
    gate, (near, far) = proxy.Gate(1), socket.socketpair()
    with near, far:
        for _ in range(300):
            gate.queue.append(object())
        waiting = gate.enter(1, proxy.TimedReader(near, None))
        with contextlib.closing(waiting):
            assert next(waiting) is None


def test_a_full_queue_is_429(make, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_WAITING", 0)
    reply = make().chat("hi")
    assert reply.status == 429 and reply.headers["Retry-After"] == "5"
    assert reply.error["code"] == "queue_full"


# ── Tools ──────────────────────────────────────────────────────────────────────────


def tool(name="get_weather", description="Weather of a city", parameters=None):
    parameters = parameters or {"type": "object", "properties": {"city": {"type": "string"}}}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def call(name="get_weather", arguments='{"city":"Paris"}', id="call_1"):
    function = {"name": name, "arguments": arguments}
    return {"id": id, "type": "function", "function": function}


def calling(*calls, content=None):
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def tool_result(content="sunny", id="call_1"):
    return {"role": "tool", "tool_call_id": id, "content": content}


WISH = "mock:tool=get_weather,get_time mock:tokens=1"


def test_tool_calls(server):
    tools = [tool(), tool("get_time")]
    for reply in answered(WISH, tools=tools), server.chat(WISH, tools=tools, stream=True):
        assert reply.finish == "tool_calls" and reply.content == "tok0 "
        functions = [function for _, function in reply.calls]
        names = [function["name"] for function in functions]
        assert names == ["get_weather", "get_time"] and len(dict(reply.calls)) == 2
        assert {function["arguments"] for function in functions} == {'{"city":"Paris"}'}


def test_streamed_tool_calls_are_name_first_then_arguments():
    stream, reply = streamed("mock:tool=get_weather mock:notext", tools=[tool()])
    deltas = [chunk["choices"][0]["delta"].get("tool_calls") for chunk in stream.chunks]
    first, *rest = [delta[0] for delta in deltas if delta]
    assert first.pop("id").startswith("toolu_")
    function = {"name": "get_weather", "arguments": ""}
    assert first == {"index": 0, "type": "function", "function": function}
    texts = ['{"city"', ':"Paris', '"}']
    assert rest == [{"index": 0, "function": {"arguments": text}} for text in texts]
    assert reply.completion()["choices"][0]["message"]["content"] is None


def test_a_call_without_arguments_has_an_empty_object():
    reply = answered("mock:tool=get_weather mock:input=none", tools=[tool()])
    assert reply.calls[0][1]["arguments"] == "{}"


def test_tools_reach_the_cli(server):
    told = server.told("x", tools=[tool(), tool("b", "", {"type": "object"})])
    assert told["initialize"]["sdkMcpServers"] == ["c"]
    first = {"name": "get_weather", "description": "Weather of a city"}
    assert told["tools"][0] == {**first, "inputSchema": tool()["function"]["parameters"]}
    assert "sdkMcpServers" not in server.told("x")["initialize"]


def test_history_of_calls():
    calls = calling(call(), call(id="call_2"), content="b")
    results = [tool_result(), tool_result("rain", "call_2")]
    messages = [user("a"), calls, *results, user("c")]
    use = {"type": "tool_use", "name": "get_weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": "sunny"}
    assert [t["content"] for t in ask_of(messages, tools=[tool()]).turns] == [
        text_blocks("a"),
        [*text_blocks("b"), {**use, "id": "call_1"}, {**use, "id": "call_2"}],
        [result, {**result, "tool_use_id": "call_2", "content": "rain"}, *text_blocks("c")],
    ]


@pytest.mark.parametrize("content, blocks", [
    ("", None),
    ([], None),
    (text_blocks("a", "b"), text_blocks("a", "b")),
    (text_blocks("a"), "a"),
    ([{"type": "image_url", "image_url": {"url": "https://x/y.png"}}],
     [{"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}]),
])  # fmt: skip
def test_tool_results(content, blocks):
    ask = ask_of([user("a"), calling(call()), tool_result(content)], tools=[tool()])
    assert ask.turns[-1]["content"][0].get("content") == blocks


@pytest.mark.parametrize("messages, param", [
    ([user("a"), tool_result()], "messages[1].tool_call_id"),
    ([user("a"), calling(call()), user("b")], "messages[1].tool_calls[0].function"),
    ([user("a"), calling(call())], "messages[1].tool_calls[0].function"),
    ([user("a"), calling(call()), tool_result(id="other")], "messages[2].tool_call_id"),
    ([user("a"), calling(call()), tool_result(), tool_result()], "messages[3].tool_call_id"),
    ([user("a"), calling(call(), call()), tool_result()], "messages[1].tool_calls[1].function"),
])  # fmt: skip
def test_calls_and_results_must_match(messages, param):
    assert fault(ask_of, messages, tools=[tool()]) == (400, param)


@pytest.mark.parametrize("arguments, value", [
    ("", {}),
    ("{}", {}),
    ('{"a":1}', {"a": 1}),
    ('{"a', {"arguments": '{"a'}),
    ("5", {"arguments": "5"}),
])  # fmt: skip
def test_arguments_become_an_object(arguments, value):
    assert proxy.call_input(proxy.Field({"arguments": arguments})) == value


def test_names_and_ids_that_the_api_refuses():
    odd, id = "functions.get weather:0", "call:1/2"
    wish = f"mock:tool={proxy.api_name(odd)}"
    reply = answered(wish, tools=[tool(odd), tool("plain")])
    assert reply.calls[0][1]["name"] == odd
    ask = ask_of([user("a"), calling(call(odd, id=id)), tool_result(id=id)], tools=[tool(odd)])
    use, result = ask.turns[1]["content"][0], ask.turns[2]["content"][0]
    assert use["name"] == ask.setup.tools[0]["name"] == proxy.api_name(odd)
    assert use["id"] == result["tool_use_id"] == proxy.api_name(id)
    assert proxy.API_NAME.fullmatch(use["name"]) and proxy.API_NAME.fullmatch(use["id"])
    assert proxy.api_name("Bash") == "Bash" and proxy.api_name("ToolSearch") != "ToolSearch"
    assert proxy.api_name("a.b") != proxy.api_name("a:b")


@pytest.mark.parametrize("choice, parallel, native", [
    ("auto", None, {}),
    ("auto", True, {}),
    ("auto", False, {"type": "auto", "disable_parallel_tool_use": True}),
    ("none", False, {"type": "none"}),
    ("required", None, {"type": "any"}),
    ({"type": "function", "function": {"name": "get_weather"}}, False,
     {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}),
])  # fmt: skip
def test_tool_choice(choice, parallel, native):
    options = ask_of(tools=[tool()], tool_choice=choice, parallel_tool_calls=parallel).options
    assert json.loads(options.tool_choice or "{}") == native
    assert options.thinking == (native.get("type") not in ("any", "tool"))


def test_tool_choice_reaches_the_cli(server):
    told = server.told("x", tools=[tool()], tool_choice="required")
    assert json.loads(told["env"]["CLAUDE_CODE_EXTRA_BODY"]) == {"tool_choice": {"type": "any"}}
    assert told["env"]["CLAUDE_CODE_DISABLE_THINKING"] == "1"


@pytest.mark.parametrize("parameters, param", [
    ({"tools": [5]}, "tools[0]"),
    ({"tools": [{"type": "custom"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function.name"),
    ({"tools": [{"function": {}}]}, "tools[0].function.name"),
    ({"tools": [tool("")]}, "tools[0].function.name"),
    ({"tools": [tool(), tool()]}, "tools[1].function.name"),
    ({"tools": [tool(parameters={"type": "array"})]}, "tools[0].function.parameters"),
    ({"tools": [tool(parameters={"properties": []})]}, "tools[0].function.parameters.properties"),
    ({"tools": [tool(parameters={"properties": {"a": 5}})]},
     "tools[0].function.parameters.properties.a"),
    ({"tools": [tool(parameters={"required": [5]})]}, "tools[0].function.parameters.required[0]"),
    ({"tools": [tool(parameters={"anyOf": 5})]}, "tools[0].function.parameters.anyOf"),
    ({"tools": [tool(parameters={"anyOf": [5]})]}, "tools[0].function.parameters.anyOf[0]"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [tool()], "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "x"}}},
     "tool_choice"),
])  # fmt: skip
def test_tools_refused(parameters, param):
    assert fault(ask_of, **parameters) == (400, param)


def fixed(schema):
    """-> (the schema as the API gets it, whether the input is wrapped)."""
    return proxy.object_schema(proxy.Field(schema, "x"))


def test_schemas_are_made_acceptable():
    assert fixed({}) == fixed({"type": ["object", "null"]}) == ({"type": "object"}, False)
    booleans = fixed({"properties": {"a": True, "b": False}})[0]
    assert booleans["properties"] == {"a": {}, "b": {"not": {}}}


@pytest.mark.parametrize("odd", [
    {"anyOf": [{"properties": {"a": {}}}, {"$ref": "#/$defs/x"}], "description": "d"},
    {"properties": {"a b": {}}, "required": ["a b"]},
])  # fmt: skip
def test_what_can_not_stand_at_the_top_is_wrapped(odd):
    definitions = {"$defs": {"x": {"type": "string"}}}
    schema, wrapped = fixed({**odd, **definitions})
    inner = {"type": "object", "properties": {"input": {**odd, "type": "object"}}}
    assert wrapped and schema == {**inner, "required": ["input"], **definitions}


@pytest.mark.parametrize("old, new", [
    ({"items": [{"type": "any"}, True]}, {"prefixItems": [{}, {}]}),
    ({"minimum": 0, "exclusiveMinimum": True}, {"minimum": 0}),
    ({"maximum": 0, "exclusiveMaximum": False}, {"maximum": 0}),
    ({"type": "file", "$id": "#x"}, {}),
    ({"required": ["a", "a"], "type": ["null", "null"]}, {"required": ["a"], "type": ["null"]}),
    ({"items": [], "anyOf": []}, {}),
    ({"minimum": "0", "maxLength": "9" * 5000}, {}),
    ({"additionalProperties": "false"}, {}),
    ({"type": ["string", "null"]}, {"type": ["string", "null"]}),
    ({"items": {"properties": {"a": True}}}, {"items": {"properties": {"a": {}}}}),
    ({"allOf": [{"type": "string"}]}, {"allOf": [{"type": "string"}]}),
])  # fmt: skip
def test_schemas_of_older_drafts(old, new):
    assert fixed({"properties": {"p": old}})[0]["properties"]["p"] == new


@pytest.mark.parametrize("depth, status", [(20, 200), (5000, 400)])
def test_a_deep_schema_is_a_bad_request(server, depth, status):
    inside = '{"type":"object","properties":{"a":' * depth + "{}" + "}}" * depth
    body = json.dumps({"model": "opus", "messages": [user("x")], "tools": [tool()]})
    reply = server.post(body.replace('{"type": "string"}', inside))
    assert reply.status == status
    assert status == 200 or "nested too deeply" in reply.error["message"]


def test_types_of_a_schema_that_are_no_types():
    assert refused(tools=[tool(parameters={"type": [{}]})])["status"] == 400
    odd = ask_of(tools=[tool(parameters={"properties": {"a": {"type": [{}]}}})])
    assert odd.setup.tools[0]["inputSchema"]["properties"] == {"a": {}}


def test_no_messages():
    assert refused([])["param"] == "messages"


def test_long_descriptions_move_where_they_are_not_cut():
    made = proxy.mcp_tool("a", "x" * 5000, {"description": "inner"})
    assert len(made["description"]) < 2048
    assert made["inputSchema"]["description"] == "x" * 5000 + "\n\ninner"


def test_history_with_calls_but_without_tools():
    ask = ask_of([user("a"), calling(call()), tool_result()])
    assert [t["name"] for t in ask.setup.tools] == ["get_weather"]
    assert json.loads(ask.options.tool_choice) == {"type": "none"}


# Signed thinking in a tool loop.

SIGNED = {"type": "thinking", "thinking": "thought0 ", "signature": "c2lnbmVk"}


def test_thinking_comes_back_in_a_tool_loop(make):
    one = make()
    wish = "mock:think=1 mock:tool=get_weather mock:tokens=1"
    first = one.chat(wish, model="claude-haiku-4-5", tools=[tool()])
    asked = first.message["tool_calls"][0]
    history = [user("x"), first.message, tool_result(id=asked["id"])]
    reply = one.chat([*history, user("mock:show")], model="claude-haiku-4-5", tools=[tool()])
    told = json.loads(reply.content)
    assert told["turns"][1]["content"][0] == SIGNED
    assert told["turns"][1]["model"] == "claude-claude-haiku-4-5-mock"
    assert "CLAUDE_CODE_DISABLE_THINKING" not in told["env"]
    told = json.loads(one.chat([*history, user("mock:show")], tools=[tool()]).content)
    assert (told["turns"][1]["content"][0]["type"] == "text")  # another model can't use it


@pytest.mark.parametrize("model, thinking", [
    ("haiku", False),
    ("claude-sonnet-4-5", False),
    ("claude-opus-4-1", False),
    ("claude-sonnet-4-20250514", False),
    ("sonnet", True),
    ("claude-opus-4-7", True),
    ("claude-sonnet-5-5", True),
])  # fmt: skip
def test_unknown_thinking_in_a_tool_loop_turns_it_off_where_it_must(model, thinking):
    loop = [user("a"), calling(call()), tool_result()]
    assert ask_of(loop, model=model, tools=[tool()]).options.thinking is thinking
    assert ask_of([*loop, assistant("b"), user("c")], model=model).options.thinking


def test_a_call_id_used_again_gets_a_fresh_one():
    step = [calling(call(id="call_0")), tool_result(id="call_0")]
    turns = ask_of([user("x"), *step, *step, *step], tools=[tool()]).turns
    ids = [b["id"] for t in turns for b in t["content"] if b["type"] == "tool_use"]
    results = [b["tool_use_id"] for t in turns for b in t["content"] if "tool_use_id" in b]
    assert ids == results and len(set(ids)) == 3 and ids[0] == "call_0"


ODD_PROPERTIES = ["$filter", "@type", "ids[]", "a b", "名前", "x" * 65, "plain"]


ODD = {"properties": {name: {} for name in ODD_PROPERTIES}, "required": ["a b"]}
BARE = json.dumps({name: 1 for name in ODD_PROPERTIES}, separators=(",", ":"))
BARE = BARE.replace("a b", r"a\u0020b")  # a mock: word has no space


@pytest.mark.parametrize("model_says, arguments", [
    ('{"input":%s}' % BARE, json.dumps(json.loads(BARE), ensure_ascii=False)),
    (BARE, BARE),  # not as it was asked to
    ('{"input":1,"mode":2}', '{"input":1,"mode":2}'),
    ('{"input":{"$fil', '{"input":{"$fil'),  # cut
])  # fmt: skip
def test_a_wrapped_input_comes_back_bare(model_says, arguments):
    reply = answered(f"mock:tool=look mock:input={model_says}", tools=[tool("look", parameters=ODD)])
    assert reply.calls[0][1]["arguments"] == arguments


def test_references_move_with_a_wrapped_schema():
    refs = {"a": {"$ref": "#"}, "b": {"$ref": "#/properties/a"}, "c": {"$ref": "#/$defs/x"}}
    schema = fixed({"anyOf": [{}], "properties": refs, "$defs": {"x": {"$ref": "#"}}})[0]
    inner = schema["properties"]["input"]
    moved = [inner["properties"][name]["$ref"] for name in "abc"]
    assert moved == ["#/properties/input", "#/properties/input/properties/a", "#/$defs/x"]
    assert schema["$defs"]["x"]["$ref"] == "#/properties/input"


def test_a_wrapped_input_in_the_history():
    history = [user("x"), calling(call("look", BARE)), tool_result()]
    use = ask_of(history, tools=[tool("look", parameters=ODD)]).turns[1]["content"][0]
    assert use["input"] == {"input": json.loads(BARE)}


def test_a_spare_knows_a_wrapped_input(sparing):
    history, tools = [user('mock:tool=look mock:input={"input":{"$filter":1}}')], [tool("look", parameters=ODD)]
    asked = sparing.chat(history, tools=tools).message
    history += [asked, tool_result("mock:show", asked["tool_calls"][0]["id"])]
    reply, spare = ask_spare(sparing, history, tools=tools)
    use = json.loads(reply.content)["turns"][1]["content"][-1]
    assert spare and use["input"] == {"input": {"$filter": 1}}


def test_a_structured_answer_may_be_wrapped():
    form = json_schema({"anyOf": [{"properties": {"a b": {"type": "integer"}}}]})
    reply = answered(r'mock:input={"input":{"a\u0020b":1}}', response_format=form)
    assert json.loads(reply.content) == {"a b": 1}


def test_a_tool_that_the_cli_drops_is_a_400_that_names_it(server):
    reply = server.chat("x", tools=[tool("odd.name", "dropped")], stream=True)
    assert reply.status == 400 and "'odd.name'" in reply.error["message"]


@pytest.mark.parametrize("name", ["Edit", "ExitPlanMode", "ToolSearch"])
def test_names_that_mean_something_to_the_cli(name):
    assert ask_of(tools=[tool(name)]).names[proxy.api_name(name)] == name
    assert proxy.api_name(name) != name


THINK, SAID = {"type": "thinking", "thinking": "A", "signature": "s"}, text_blocks("t")[0]


def remembered(messages, blocks, model="claude-haiku-4-5", asked="claude-haiku-4-5"):
    """The turn of an answer whose blocks are known, and whether thinking stays on."""
    thoughts = {"call_1": proxy.Thought(model, "signer", blocks)}
    body = {"model": asked, "messages": messages, "tools": [tool()]}
    ask = proxy.parse_chat(body, thoughts)
    return ask.turns[1], ask.options.thinking


USE = {"type": "tool_use", "id": "call_1", "name": "get_weather", "input": {}}


@pytest.mark.parametrize("told, content, kinds", [
    ([THINK, SAID, THINK, USE], "t", ["thinking", "text", "thinking", "tool_use"]),
    ([SAID, THINK, USE], "t", ["text", "thinking", "tool_use"]),
    ([THINK, SAID, THINK, USE], "u", ["thinking", "thinking", "text", "tool_use"]),
    ([THINK, USE], None, ["thinking", "tool_use"]),
])  # fmt: skip
def test_blocks_go_back_in_their_own_order(told, content, kinds):
    messages = [user("x"), calling(call(), content=content), tool_result()]
    turn, thinking = remembered(messages, told)
    assert [block["type"] for block in turn["content"]] == kinds
    assert turn["model"] == "signer" and thinking is (kinds[0] == "thinking")


def test_a_text_and_its_calls_in_two_messages_begin_with_the_thinking():
    messages = [user("x"), assistant("t"), calling(call()), tool_result()]
    turn, thinking = remembered(messages, [THINK, SAID, USE])
    assert turn["content"][0] == THINK and len(turn["content"]) == 3 and thinking


@pytest.mark.parametrize("asked", ["sonnet", "claude-haiku-4", "claude-haiku-4-5[1m]"])
def test_a_thought_is_good_for_the_model_that_was_asked(asked):
    messages = [user("x"), calling(call()), tool_result()]
    turn, thinking = remembered(messages, [THINK, USE], asked=asked)
    assert turn["content"][0]["type"] == "tool_use"
    assert thinking is (asked == "sonnet")
    turn, thinking = remembered(messages, [THINK, USE], proxy.cli_model(asked), asked)
    assert turn["content"][0] == THINK and thinking


def test_thinking_stays_off_while_the_last_turn_holds_a_result():
    loop = [user("x"), calling(call()), tool_result(), user("and?")]
    for messages, thinking in ((loop, False), ([*loop, assistant("a"), user("b")], True)):
        ask = ask_of(messages, model="claude-haiku-4-5", tools=[tool()])
        assert ask.options.thinking is thinking


@pytest.mark.parametrize("model, tokens, thinking", [
    ("claude-haiku-4-5", 3000, False), ("claude-haiku-4-5", 5000, True),
    ("claude-sonnet-4-5[1m]", 3000, False), ("opus", 3000, True),
])  # fmt: skip
def test_a_thought_leaves_room_for_the_answer(model, tokens, thinking):
    assert ask_of(model=model, max_tokens=tokens).options.thinking is thinking


def answer_to(*lines, **parameters):
    """These lines of a CLI through Answer -> the deltas."""
    answer = proxy.Answer(ask_of(**parameters))
    return [delta for line in lines for delta in answer.feed(line)]


def test_a_second_structured_output_is_never_told():
    wish = {"tool": "StructuredOutput,StructuredOutput", "notext": "", "input": '{"a":1}'}
    lines = [{"type": "stream_event", "event": event} for event in events(wish)]
    deltas = answer_to(*lines, response_format=json_schema())
    assert "".join(delta.text for delta in deltas) == '{"a":1}'


def test_a_failure_of_the_clis_own_is_no_answer():
    """As 2.1.112 refuses an image: status 200, to the look of its lines."""
    said = {"model": "<synthetic>", "stop_reason": "stop_sequence"}
    said["content"] = text_blocks("Image base64 size exceeds API limit")
    result = {"type": "result", "is_error": False, "result": ""}
    with pytest.raises(proxy.APIError) as caught:
        answer_to({"type": "assistant", "message": said}, result)
    assert caught.value.status == 400 and "Image base64" in str(caught.value)


def test_a_403_of_the_login_is_a_401():
    error = proxy.failure(["authentication_failed"], "x", 0, 0)
    assert error.status == 401 and error.error["code"] == "not_logged_in"


def test_the_cure_of_a_refused_token():
    env = {"STAND_IN_LOGIN": "no", "CLAUDE_CODE_OAUTH_TOKEN": "x"}
    done = command("--check", "--port", "0", "--claude", STAND_IN, **env)
    assert done.returncode == 1 and "claude setup-token" in done.stdout


def test_repeated_arguments_may_hold_any_character():
    whole = {"type": "tool_use", "id": "t", "name": "get_weather", "input": {"c": "Zürich"}}
    lines = [{"type": "stream_event", "event": event}
             for event in events({"tool": "get_weather", "notext": "", "input": '{"c": "Zü'})]
    usage = {"output_tokens": 1}
    message = {"model": "m", "usage": usage, "content": [whole], "stop_reason": "tool_use"}
    deltas = answer_to(*lines[:-3], {"type": "assistant", "message": message}, tools=[tool()])
    assert "".join(delta.text for delta in deltas) == '{"c": "Zürich"}'


@pytest.mark.parametrize("kinds, marked", [
    (["text", "image"], 0), (["image", "text"], 1), (["image"], 0), (["text", "text"], 1),
])  # fmt: skip
def test_the_cache_mark_is_on_no_image(kinds, marked):
    content = [{"type": kind, "text": "x"} for kind in kinds]
    line = proxy.query_line({"role": "user", "content": content}, (2, 1, 330))
    marks = ["cache_control" in block for block in line["message"]["content"]]
    assert marks.index(True) == marked and marks.count(True) == 1


def test_thoughts_are_bounded(make, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_MEMORY", 2)
    one = make()
    for _ in range(4):
        one.chat("mock:think=1 mock:tool=get_weather", tools=[tool()])
    assert len(one.server.backend.memory) == 2


# ── Images and files ───────────────────────────────────────────────────────────────

PNG = "iVBORw0KGgo="


def data_url(kind, data=PNG):
    return f"data:{kind};base64,{data}"


def image(url):
    return {"type": "image_url", "image_url": {"url": url, "detail": "high"}}


def file(data, **fields):
    return {"type": "file", "file": {"file_data": data, **fields}}


BASE64 = {"type": "base64", "data": PNG}
PDF = {"type": "document", "source": {**BASE64, "media_type": "application/pdf"}}


@pytest.mark.parametrize("part, block", [
    (image(data_url("image/png")),
     {"type": "image", "source": {**BASE64, "media_type": "image/png"}}),
    (image(data_url("image/jpg")),
     {"type": "image", "source": {**BASE64, "media_type": "image/jpeg"}}),
    (image("http://x/y"), {"type": "image", "source": {"type": "url", "url": "http://x/y"}}),
    ({"type": "image_url", "image_url": "https://x/y"},
     {"type": "image", "source": {"type": "url", "url": "https://x/y"}}),
    (file(data_url("application/pdf"), filename="a.pdf"), {**PDF, "title": "a.pdf"}),
    (file(PNG), PDF),
    (file(data_url("text/csv", "YSxi")),
     {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "a,b"}}),
])  # fmt: skip
def test_media(part, block):
    assert turns_of(user([part])) == [("user", [block])]


@pytest.mark.parametrize("part, param", [
    ({"type": "image_url"}, ".image_url"),
    (image("ftp://x"), ".image_url.url"),
    (image("data:image/png,abc"), ".image_url.url"),
    (image(data_url("image/png", "?!")), ".image_url.url"),
    (image(data_url("image/png", "")), ".image_url.url"),
    (image(data_url("image/tiff")), ".image_url.url"),
    (image(data_url("image/jpeg2000")), ".image_url.url"),
    ({"type": "file", "file": {"file_id": "file-1"}}, ".file"),
    (file(data_url("application/zip")), ".file.file_data"),
    (file("%%%"), ".file.file_data"),
])  # fmt: skip
def test_media_refused(part, param):
    assert fault(ask_of, [user([part])]) == (400, "messages[0].content[0]" + param)


# ── Structured output ──────────────────────────────────────────────────────────────

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def json_schema(schema=None):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema or SCHEMA}}


def test_structured_output(server):
    wish, form = 'mock:input={"a":1}', json_schema()
    for reply in (
        answered(wish, response_format=form),
        server.chat(wish, response_format=form, stream=True),
    ):
        assert reply.content == '{"a":1}' and reply.finish == "stop"
        assert "tool_calls" not in reply.message


def test_structured_output_is_forced():
    ask = ask_of(response_format=json_schema())
    assert ask.setup.tools[0]["inputSchema"] == SCHEMA and not ask.options.thinking
    choice = {"type": "tool", "name": "StructuredOutput", "disable_parallel_tool_use": True}
    assert json.loads(ask.options.tool_choice) == choice
    assert ask_of(response_format={"type": "text"}) == ask_of()
    json_object = ask_of(response_format={"type": "json_object"})
    schema = json_object.setup.tools[0]["inputSchema"]
    assert schema == {"type": "object", "additionalProperties": True}


def test_structured_output_with_tools():
    both = {"tools": [tool()], "response_format": json_schema()}
    any_one = {"type": "any", "disable_parallel_tool_use": True}
    assert json.loads(ask_of(**both).options.tool_choice) == any_one
    forced = ask_of(**both, tool_choice="required")
    assert [t["name"] for t in forced.setup.tools] == ["get_weather"]
    assert answered("mock:tool=get_weather mock:notext", **both).finish == "tool_calls"
    reply = answered('mock:tool=StructuredOutput mock:notext mock:input={"a":1}', **both)
    assert reply.finish == "stop" and reply.content == '{"a":1}'


@pytest.mark.parametrize("value, param", [
    ({}, "response_format.type"),
    ({"type": "xml"}, "response_format.type"),
    ({"type": "json_schema"}, "response_format.json_schema.schema"),
    ({"type": "json_schema", "json_schema": {}}, "response_format.json_schema.schema"),
    (json_schema({"type": "array"}), "response_format.json_schema.schema"),
])  # fmt: skip
def test_response_format_refused(value, param):
    assert fault(ask_of, response_format=value) == (400, param)


# ── Responses ──────────────────────────────────────────────────────────────────────


def response_of(input="hi", texts={}, **parameters):
    body = {"model": "sonnet", "input": input, **parameters}
    return proxy.parse_response(body, texts)


def response_refused(input="hi", **parameters):
    return error_of(response_of, input, **parameters)


def item(type, **fields):
    return {"type": type, **fields}


def function(name="get_weather", **fields):
    return {"type": "function", "name": name, "parameters": CITY, **fields}


def call_item(id="call_1", arguments='{"city":"Paris"}', name="get_weather", **fields):
    return item("function_call", call_id=id, name=name, arguments=arguments, **fields)


def output_item(id="call_1", output="sunny", type="function_call_output"):
    return item(type, call_id=id, output=output)


CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
NAMESPACE = {"type": "namespace", "name": "mcp__w", "tools": [function("look")]}
CUSTOM = {"type": "custom", "name": "patch", "format": {"type": "text"}}


def test_response(server):
    reply = server.respond("mock:tokens=2", metadata={"a": "b"}, tools=[function()])
    body = reply.json
    assert reply.status == 200 and re.fullmatch("resp_[0-9a-f]{24}", body.pop("id"))
    assert abs(body.pop("created_at") - time.time()) < 60
    (message,) = body.pop("output")
    part = {"type": "output_text", "text": "tok0 tok1 ", "annotations": [], "logprobs": []}
    assert message.pop("id").startswith("msg_")
    assert message == item("message", role="assistant", status="completed", content=[part])
    usage = {"input_tokens": 10, "output_tokens": 2, "total_tokens": 12}
    usage["input_tokens_details"] = {"cached_tokens": 0}
    usage["output_tokens_details"] = {"reasoning_tokens": 0}
    echo = {**proxy.ECHO, "metadata": {"a": "b"}, "tools": [function()]}
    assert body == {
        "object": "response", "status": "completed", "model": "claude-sonnet-mock",
        "error": None, "incomplete_details": None, "usage": usage, **echo,
        "previous_response_id": None, "store": False,
    }  # fmt: skip


def fed(said, **parameters):
    """A ResponseReply for what a model says, and its events."""
    reply = proxy.ResponseReply(response_of(**parameters), "0", 0)
    answer, lines = reply.answers[0], transcript(said)
    sent = "".join(reply.event(delta) for line in lines for delta in answer.feed(line))
    return reply, sent + reply.end()


def shown(text):
    """SSE events -> "type place index: what it brings", checked for what each has."""
    found, items = [], {}
    for number, block in enumerate(filter(None, text.split("\n\n"))):
        head, data = block.split("\n")
        event = json.loads(data[len("data: ") :])
        kind = event["type"]
        assert head == f"event: {kind}" and event["sequence_number"] == number
        if kind == "response.output_item.added":
            items[event["output_index"]] = event["item"]["id"]
            assert event["item"].get("status", "in_progress") == "in_progress"
        if "item_id" in event:
            assert event["item_id"] == items[event["output_index"]]
        keys = ("delta", "text", "arguments", "input")
        new = [event[key] for key in keys if key in event]
        new += [event["item"].get("name", event["item"]["type"])] if "item" in event else []
        new += [event["response"]["status"]] if "response" in event else []
        new += [event["error"]["code"]] if "error" in event else []
        index = [k[0] for k in ("content_index", "summary_index") if event.get(k) == 0]
        words = [kind.replace("response.", ""), str(event.get("output_index", "")), *index]
        found.append(" ".join(filter(None, words)) + (f": {new[0]}" if new else ""))
    return found


BEGUN = ["created: in_progress", "in_progress: in_progress"]


def message_events(place, *texts):
    return [
        f"output_item.added {place}: message", f"content_part.added {place} c",
        *(f"output_text.delta {place} c: {text}" for text in texts),
        f"output_text.done {place} c: {''.join(texts)}", f"content_part.done {place} c",
        f"output_item.done {place}: message",
    ]  # fmt: skip


def thought_events(place, *texts):
    part, text = "reasoning_summary_part", "reasoning_summary_text"
    return [
        f"output_item.added {place}: reasoning", f"{part}.added {place} s",
        *(f"{text}.delta {place} s: {thought}" for thought in texts),
        f"{text}.done {place} s: {''.join(texts)}", f"{part}.done {place} s",
        f"output_item.done {place}: reasoning",
    ]  # fmt: skip


def call_events(place, name, *texts):
    return [
        f"output_item.added {place}: {name}",
        *(f"function_call_arguments.delta {place}: {text}" for text in texts),
        f"function_call_arguments.done {place}: {''.join(texts)}",
        f"output_item.done {place}: {name}",
    ]  # fmt: skip


SHOWN = {"reasoning": {"summary": "auto"}}
PARIS = ('{"city"', ':"Paris', '"}')
ONE, TWO = message_events(0, "tok0 "), message_events(0, "tok0 ", "tok1 ")


@pytest.mark.parametrize("text, parameters, expected", [
    ("mock:tokens=2", {}, [*TWO, "completed: completed"]),
    ("mock:think=1 mock:tokens=1", {}, [*ONE, "completed: completed"]),
    ("mock:think=1 mock:tokens=1", SHOWN,
     [*thought_events(0, "thought0 "), *message_events(1, "tok0 "), "completed: completed"]),
    ("mock:tool=f,g mock:notext", {},
     [*call_events(0, "f", *PARIS), *call_events(1, "g", *PARIS), "completed: completed"]),
    ("mock:tokens=1 mock:tool=f mock:input={}", {},
     [*ONE, *call_events(1, "f", "{}"), "completed: completed"]),
    ("mock:tool=f mock:notext mock:input=none", {},
     [*call_events(0, "f", "{}"), "completed: completed"]),
    ("mock:tokens=2 mock:stop=max_tokens", {}, [*TWO, "incomplete: incomplete"]),
    ("mock:tokens=1 mock:stop=refusal", {}, [*ONE, "error: invalid_prompt", "failed: failed"]),
    ("mock:tool=mcp__w__look mock:notext", {"tools": [NAMESPACE]},
     [*call_events(0, "look", *PARIS), "completed: completed"]),
    ('mock:tool=patch mock:notext mock:input={"input":"+a"}', {"tools": [CUSTOM]},
     ["output_item.added 0: patch", "custom_tool_call_input.delta 0: +a",
      "custom_tool_call_input.done 0: +a", "output_item.done 0: patch", "completed: completed"]),
])  # fmt: skip
def test_response_events(text, parameters, expected):
    reply, sent = fed(text, **parameters)
    assert shown(sent) == BEGUN + expected
    last = json.loads(sent.rstrip("\n").rpartition("\ndata: ")[2])["response"]
    assert last == reply.completion()


def test_response_events_of_structured_output():
    form = {"format": {"type": "json_schema", "name": "x", "schema": CITY}}
    text = "mock:tool=StructuredOutput mock:notext"
    expected = [*message_events(0, *PARIS), "completed: completed"]
    assert shown(fed(text, text=form)[1]) == BEGUN + expected


def test_items_of_calls_are_as_codex_wants_them():
    reply, _ = fed("mock:tool=mcp__w__look,patch mock:notext", tools=[NAMESPACE, CUSTOM])
    one, other = reply.completion()["output"]
    assert (one["type"], one["name"], one["namespace"]) == ("function_call", "look", "mcp__w")
    assert one["arguments"] == '{"city":"Paris"}' and one["id"].startswith("fc_")
    assert (other["type"], other["name"]) == ("custom_tool_call", "patch")
    assert "arguments" not in other and other["call_id"].startswith("toolu_")


def test_a_cut_answer_is_incomplete():
    reply, _ = fed("mock:tokens=1 mock:stop=max_tokens")
    body = reply.completion()
    assert body["status"] == "incomplete" and body["output"][0]["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_refusal_is_a_failed_response(server):
    body = server.respond("mock:tokens=1 mock:stop=refusal").json
    assert body["status"] == "failed" and body["error"]["code"] == "invalid_prompt"


@pytest.mark.parametrize("status, code, ours", [
    (503, "server_is_overloaded", "server_is_overloaded"), (400, None, "invalid_prompt"),
    (400, "context_length_exceeded", "context_length_exceeded"), (502, None, "server_error"),
])  # fmt: skip
def test_failures_inside_a_response(status, code, ours):
    reply = proxy.ResponseReply(response_of(), "0", 0)
    begun = reply.alive()
    sent = reply.fail(proxy.APIError(status, "why", code))
    assert shown(begun + sent)[-2:] == [f"error: {code}", "failed: failed"]
    body = reply.completion()
    assert body["error"] == {"code": ours, "message": "why"} and not body["usage"]


def test_a_restart_with_more_before_a_call_is_an_error():
    reply = proxy.ResponseReply(response_of(), "0", 0)
    lines = transcript("mock:tokens=1 mock:tool=f")[:-5] + transcript("mock:tokens=2 mock:tool=f")
    with pytest.raises(proxy.APIError, match="began another answer"):
        for line in lines:
            for delta in reply.answers[0].feed(line):
                reply.event(delta)


def test_a_failure_inside_a_stream_of_a_response(server):
    reply = server.respond("mock:cut=1 mock:else=Other", stream=True)
    error, failed = reply.chunks[-2:]
    assert reply.status == 200 and error["error"]["code"] == "stream_interrupted"
    assert failed["response"]["error"]["code"] == "stream_interrupted"
    assert failed["response"]["status"] == "failed" and failed["type"] == "response.failed"


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_a_response(server, stream):
    reply = server.respond("mock:status=529", stream=stream)
    assert (reply.status, reply.json["error"]["code"]) == (503, "server_is_overloaded")


def test_the_plans_limit_tells_when_it_ends(server):
    reply = server.respond("mock:limit=300 mock:status=429")
    error = reply.json["error"]
    assert reply.status == 429 and error["type"] == "usage_limit_reached"
    assert 290 <= error["resets_at"] - time.time() <= 310 and "Retry-After" in reply.headers
    assert server.respond("mock:status=429").json["error"]["type"] == "rate_limit_error"


def test_a_silent_response_is_kept_alive(silent):
    reply = silent.respond("mock:delay_ms=200 mock:tokens=1", stream=True)
    kinds = [event["type"] for event in reply.chunks]
    assert kinds.count("response.in_progress") > 2 and kinds[0] == "response.created"
    assert [e["sequence_number"] for e in reply.chunks] == list(range(len(kinds)))


@pytest.mark.parametrize("wish", ["mock:think=2 mock:tool=f,g", "mock:stop=max_tokens"])
def test_both_endpoints_give_the_same_answer(server, wish):
    tools = [function("f"), function("g")]
    whole = server.respond(wish, tools=tools, **SHOWN).json
    streamed = server.respond(wish, tools=tools, stream=True, **SHOWN).chunks[-1]["response"]
    chat = server.chat(wish, tools=[tool("f"), tool("g")])
    message, usage = chat.message, chat.json["usage"]
    for body in (whole, streamed):
        texts = {i["type"]: i.get("content") or i.get("summary") for i in body["output"]}
        calls = [i for i in body["output"] if i["type"] == "function_call"]
        assert texts["message"][0]["text"] == message["content"]
        thoughts = [part["text"] for part in texts.get("reasoning", [])]
        assert "".join(thoughts) == message.get("reasoning_content", "")
        assert [(c["name"], c["arguments"]) for c in calls] == [
            (c["function"]["name"], c["function"]["arguments"])
            for c in message.get("tool_calls", [])
        ]
        assert body["usage"]["input_tokens"] == usage["prompt_tokens"]
        assert body["usage"]["output_tokens"] == usage["completion_tokens"]


IMAGE = "data:image/png;base64,iVBORw0KGgo="
CHAT = [
    system("S"), user("a"), {"role": "assistant", "content": "b", "tool_calls": [
        {"id": "i", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}},
        {"id": "k", "type": "function", "function": {"name": "get_weather", "arguments": "{"}}]},
    {"role": "tool", "tool_call_id": "i", "content": "r"},
    {"role": "tool", "tool_call_id": "k", "content": [
        {"type": "text", "text": "q"}, {"type": "image_url", "image_url": {"url": IMAGE}}]},
    user("c"), system("late"), assistant("d"), user("e"),
]  # fmt: skip
INPUT = [
    item("message", role="developer", content=[item("input_text", text="S")]),
    user("a"), item("reasoning", id="rs_1", summary=[], encrypted_content="x"),
    call_item("i", "{}"), item("message", role="assistant", id="msg_1", status="completed",
                               phase=None, content=[item("output_text", text="b", annotations=[])]),
    call_item("k", "{"), output_item("i", "r"),
    output_item("k", [item("input_text", text="q"), item("input_image", image_url=IMAGE)]),
    user("c"), system("late"), item("item_reference", id="rs_1"),
    item("item_reference", id="msg_2"), user("e"),
]  # fmt: skip


def test_both_endpoints_ask_the_same():
    ours = response_of(INPUT, {"msg_2": "d"}, tools=[function(description="Weather of a city")],
                       reasoning={"effort": "low"}, max_output_tokens=5, tool_choice="required")
    theirs = ask_of(CHAT, tools=[tool(parameters=CITY)], reasoning_effort="low", max_tokens=5,
                    tool_choice="required")
    assert ours._replace(echo={}) == theirs


def test_instructions_come_first():
    assert response_of(INPUT, {"msg_2": "d"}, instructions="I").setup.system == "I\n\nS"


@pytest.mark.parametrize("form, chat", [
    ({}, None),
    ({"verbosity": "low"}, None),
    ({"format": {"type": "text"}}, {"type": "text"}),
    ({"format": {"type": "json_object"}}, {"type": "json_object"}),
    ({"format": {"type": "json_schema", "name": "x", "strict": True, "schema": CITY}},
     {"type": "json_schema", "json_schema": {"schema": CITY}}),
])  # fmt: skip
def test_text_formats(form, chat):
    assert response_of(text=form)._replace(echo={}) == ask_of(response_format=chat)


def test_tools_of_responses():
    tools = [function(), NAMESPACE, CUSTOM, {"type": "web_search", "x": 1}, {"type": "tool_search"}]
    ask = response_of(tools=tools, tool_choice={"type": "function", "name": "get_weather"})
    names = [t["name"] for t in ask.setup.tools]
    assert names == ["get_weather", "mcp__w__look", "patch"]
    assert ask.setup.tools[2]["inputSchema"]["required"] == ["input"]
    assert json.loads(ask.options.tool_choice)["name"] == "get_weather"
    assert ask.origins["mcp__w__look"] == {"name": "look", "namespace": "mcp__w"}


def test_calls_of_custom_and_namespace_tools_go_back():
    calls = [call_item("a", "{}", "look", namespace="mcp__w"), output_item("a"),
             item("custom_tool_call", call_id="b", name="patch", input="+a"),
             output_item("b", "done", "custom_tool_call_output")]  # fmt: skip
    blocks = [b for t in response_of(calls, tools=[NAMESPACE, CUSTOM]).turns for b in t["content"]]
    uses = [(b["name"], b["input"]) for b in blocks if b["type"] == "tool_use"]
    assert uses == [("mcp__w__look", {}), ("patch", {"input": "+a"})]


@pytest.mark.parametrize("name", list(proxy.RESPONSE_PARAMETERS))
def test_each_response_parameter(name):
    row = proxy.RESPONSE_PARAMETERS[name]
    wrong = next(value for kind, value in WRONG.items() if type(value) not in row.kinds)
    error = response_refused(**{name: wrong})
    assert (error["status"], error["param"], error["code"]) == (400, name, "invalid_type")
    right = {"prompt": {"id": "x"}, "background": True, "top_logprobs": 1}
    value = right.get(name, RIGHT[row.kinds[0]])
    if row.use == proxy.IGNORED:
        plain = response_of(unheard_of=1)._replace(echo={})
        assert response_of(**{name: value})._replace(echo={}) == plain
    elif row.use == proxy.REFUSED:
        error = response_refused(**{name: value})
        assert (error["status"], error["param"], error["code"]) == (400, name, row.code)


@pytest.mark.parametrize("input, parameters, param", [
    ([], {}, "input"),
    ([5], {}, "input[0]"),
    ([item("computer_call")], {}, "input[0].type"),
    ([item("message", role="x", content="")], {}, "input[0].role"),
    ([item("message", role="user", content=[item("input_audio")])], {}, "input[0].content[0].type"),
    ([user([item("input_file", file_id="f")])], {}, "input[0].content[0]"),
    ([call_item(None)], {}, "input[0].call_id"),
    ([call_item()], {}, "input[0]"),
    ([output_item()], {}, "input[0].call_id"),
    ([call_item(), output_item(output=None)], {}, "input[1].output"),
    ([item("custom_tool_call", call_id="a", name="b")], {}, "input[0].input"),
    ("x", {"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    ("x", {"text": {"format": {"type": "x"}}}, "text.format.type"),
    ("x", {"reasoning": {"effort": "x"}}, "reasoning.effort"),
    ("x", {"max_output_tokens": 0}, "max_output_tokens"),
    ("x", {"tools": [{"type": "mcp"}]}, "tools[0].type"),
    ("x", {"tools": [function(None)]}, "tools[0].name"),
    ("x", {"tools": [function(parameters={"type": "string"})]}, "tools[0].parameters"),
    ("x", {"tools": [{**NAMESPACE, "tools": [{}]}]}, "tools[0].tools[0].name"),
    ("x", {"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
    ("x", {"tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
])  # fmt: skip
def test_what_responses_refuse(input, parameters, param):
    assert fault(response_of, input, **parameters) == (400, param)


def test_an_item_can_be_referred_to(make, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_MEMORY", 2)
    one = make()
    id = one.respond("mock:say=before").json["output"][0]["id"]
    history = [user("x"), item("item_reference", id=id), user("mock:show")]
    shown = json.loads(one.respond(history).json["output"][0]["content"][0]["text"])
    assert "before" in json.dumps(shown)
    for _ in range(2):
        one.respond()
    reply = one.respond(history)
    assert (reply.status, reply.json["error"]["param"]) == (404, "input[1].id")
    assert "store: false" in reply.json["error"]["message"]
    assert len(one.server.backend.memory) == 2


def test_a_websocket_is_told_to_post(server):
    reply = server.request("GET", "/v1/responses", headers={"Upgrade": "websocket"})
    assert reply.status == 426 and reply.headers["Upgrade"]
    assert server.request("GET", "/v1/responses").headers["Allow"] == "POST, OPTIONS"


def test_signed_thinking_comes_back_in_a_response_loop(make):
    one, ask = make(), {"tools": [function()], "model": "claude-haiku-4-5"}
    output = one.respond("mock:think=1 mock:tool=get_weather", **ask).json["output"]
    call = next(i for i in output if i["type"] == "function_call")
    history = [user("q"), *output, output_item(call["call_id"], "sunny"), user("mock:show")]
    said = one.respond(history, **ask).json["output"][0]["content"][0]["text"]
    assert "c2lnbmVk" in said


# ── stop and n ─────────────────────────────────────────────────────────────────────


def pieces(*texts):
    return "mock:json=" + json.dumps(texts).replace(" ", "")


@pytest.mark.parametrize("texts, stop, content", [
    (["ab", "STOP", "cd"], "STOP", "ab"),
    (["abST", "OPcd"], "STOP", "ab"),
    (["a", "S", "T", "O", "P"], ["x", "STOP"], "a"),
    (["abST", "ART"], "STOP", "abSTART"),
    (["abST"], "STOP", "abST"),
    (["SSTOP"], "STOP", "S"),
    (["aXbY"], ["Y", "X"], "a"),
    (["a\nb"], "\n", "a"),
    (["ab"], ["", "b"], "a"),
    (["STOP"], "STOP", ""),
])  # fmt: skip
def test_stop(texts, stop, content):
    reply = answered(pieces(*texts), stop=stop)
    assert (reply.content, reply.finish) == (content, "stop")


@pytest.mark.parametrize("stream", [False, True])
def test_stop_ends_the_cli_at_once(server, stream):
    wish = pieces("aSTOP", "never") + " mock:gap_ms=600000"
    assert server.chat(wish, stop="STOP", stream=stream).content == "a"
    until(server.quiet, 5)


def test_stop_refused():
    assert refused(stop=["a"] * 5)["param"] == "stop"
    assert refused(stop=[5])["param"] == "stop[0]"


@pytest.mark.parametrize("stream", [False, True])
def test_n(server, stream):
    options = {"stream_options": {"include_usage": True}} if stream else {}
    reply = server.chat("mock:tokens=2", n=3, stream=stream, **options)
    assert [choice["index"] for choice in reply.choices] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in reply.choices} == {"tok0 tok1 "}
    usage = (reply.json or reply.chunks[-1])["usage"]
    assert usage["completion_tokens"] == 6


def test_n_fails_as_one(server):
    assert server.chat("mock:status=429", n=2).status == 429
    assert refused(n=9)["param"] == refused(n=0)["param"] == "n"


def test_n_beyond_the_servers_width(make):
    reply = make(max_concurrency=2).chat("hi", n=3)
    assert reply.status == 400 and reply.error["param"] == "n"


# ── Spares ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def sparing(make):
    """A server with two spares."""
    return settling(make(spares=2))


def settling(one):
    """A server whose spares are as it wants them between requests."""
    one.keeper = one.server.backend.keeper

    ticks, tick = [], one.keeper.tick
    one.keeper.tick = lambda: ticks.append(tick())

    def settle():
        until(one.quiet)
        for _ in range(2):  # the first one may have begun before
            count = len(ticks)
            until(lambda: one.server.backend.keeper.wake() or len(ticks) > count)
        until(lambda: one.quiet() and not unsettled(one.keeper))

    one.settle = settle
    return one


def unsettled(keeper):
    fed = not any(c.todo or c.outbox or c.waiting for c in keeper.spares)
    return keeper.wishes or keeper.filling or not fed


BLANK, INITIALIZED = (False, 0), (True, 0)


def spares_of(one):
    """What each has been told, the most first: (whether a setup, how many turns)."""
    one.settle()
    told = [claude.conversation for claude in one.keeper.spares]
    return sorted([(bool(c.setup), len(c.turns)) for c in told], reverse=True)


def pids_of(one):
    one.settle()
    return {c.process.pid for c in one.keeper.spares}


def ask_spare(one, messages, **parameters):
    """Ask -> (reply, whether a spare answered)."""
    before = pids_of(one)
    reply = one.chat(messages, **parameters)
    assert reply.status == 200
    return reply, bool(before - pids_of(one))


def test_spares_start_with_the_server(sparing, capsys):
    proxy.announce(sparing.server)
    assert spares_of(sparing) == [BLANK, BLANK]
    assert ask_spare(sparing, "a")[1]


def test_one_shot_requests(sparing):
    assert ask_spare(sparing, "a")[1] is False
    assert spares_of(sparing) == [BLANK, BLANK]
    reply, spare = ask_spare(sparing, "b")
    assert spare and reply.content == "You said: b "
    assert spares_of(sparing) == [INITIALIZED, BLANK]  # the same setup came again
    assert ask_spare(sparing, "c")[1]


def test_a_new_conversation_finds_an_initialized_spare(sparing):
    for spares in ([], [BLANK] * 2, [INITIALIZED, BLANK]):
        assert spares_of(sparing) == spares
        told = sparing.told([system("s")])
        assert told["initialize"]["systemPrompt"] == ["s"]
        assert [t["content"][0]["text"] for t in told["turns"]] == ["mock:show"]


def test_a_conversation_finds_a_primed_spare(sparing):
    history = [system("s"), user("a"), assistant("b"), user("c")]
    reply = sparing.chat(history)
    assert spares_of(sparing) == [(True, 4), BLANK]
    history += [reply.message, user("mock:show")]
    reply, spare = ask_spare(sparing, history)
    turns = json.loads(reply.content)["turns"]
    roles = ["user", "assistant", "user", "assistant", "user"]
    assert spare and [turn["role"] for turn in turns] == roles
    assert turns[3]["content"] == text_blocks("You said: c ")


def test_a_tool_loop_finds_a_primed_spare(sparing):
    history = [user("mock:think=1 mock:tool=get_weather mock:tokens=1")]
    for _ in range(3):
        reply, spare = ask_spare(sparing, history, tools=[tool()])
        asked = reply.message["tool_calls"][0]
        result = tool_result("mock:tool=get_weather mock:tokens=1", asked["id"])
        history += [reply.message, result]
    assert spare and spares_of(sparing) == [(True, 6), BLANK]
    primed = max(sparing.keeper.spares, key=proxy.Claude.readiness)
    answer = json.loads(primed.conversation.turns[1])["message"]
    kinds = [block["type"] for block in answer["content"]]
    assert kinds == ["thinking", "text", "tool_use"]


@pytest.mark.parametrize("alive", [10, 0])
def test_the_next_process_starts_when_the_answer_begins(sparing, alive, monkeypatch):
    """It has taken in the request's turns before the answer is out; also behind a
    delta that only kept the stream alive."""
    monkeypatch.setattr(proxy, "ALIVE_SECONDS", alive)
    monkeypatch.setattr(proxy, "TICK_SECONDS", 0.01)
    wish = "mock:delay_ms=100 mock:tokens=2 mock:gap_ms=60000"
    messages = [user("a"), assistant("b"), user(wish)]
    connection = send_request(sparing.port, messages[2]["content"], True, messages[:2])
    told = [(True, 3), BLANK]
    spares = sparing.keeper.spares
    until(lambda: len(spares) == 2 and any(c.conversation.turns for c in spares))
    until(lambda: not any(c.todo or c.waiting for c in spares))
    connection.close()
    assert spares_of(sparing) == told  # a cut answer is no part of what it is told
    asked = {claude.process.pid for claude in sparing.keeper.spares}
    told = sparing.told([*messages, assistant("half of")], model="opus")
    assert [t["content"][0]["text"] for t in told["turns"][2:4]] == [
        messages[2]["content"], "half of",
    ]  # fmt: skip
    assert asked - pids_of(sparing)


@pytest.mark.parametrize("wish", ["mock:stop=refusal", "mock:cut=2 mock:else=other"])
def test_one_of_several_or_a_failed_answer_primes_nothing_wrong(sparing, wish):
    history = [user("a"), assistant("b"), user(wish)]
    reply = sparing.chat(history, n=1 + ("stop" in wish))
    assert reply.status == (200 if "stop" in wish else 502)
    sparing.settle()
    told = [claude.conversation.turns for claude in sparing.keeper.spares]
    texts = [[json.loads(t)["message"]["content"][0]["text"] for t in turns] for turns in told]
    assert sorted(texts) == [[], [] if "stop" in wish else ["a", "b", wish]]


DIFFERENT = {
    "another system prompt": lambda h: [system("other"), *h[1:]],
    "an edited earlier turn": lambda h: [h[0], user("edited"), *h[2:]],
    "an edited answer": lambda h: [*h[:-2], assistant("edited"), h[-1]],
    "another conversation": lambda h: [h[0], user("z"), assistant("y"), user("x")],
    "a shorter one": lambda h: h[:2],
}


@pytest.mark.parametrize("difference", list(DIFFERENT))
def test_a_spare_that_does_not_fit_is_not_used(sparing, difference):
    history = [system("s"), user("a"), assistant("b"), user("c")]
    history += [sparing.chat(history).message, user("d")]
    assert spares_of(sparing) == [(True, 4), BLANK]
    messages = DIFFERENT[difference](history)
    told = sparing.told([*messages, assistant("ok")])
    texts = [b["text"] for t in told["turns"] for b in t["content"]]
    wanted = [m["content"] for m in messages if m["role"] != "system"]
    assert texts == [*wanted, "ok", "mock:show"]
    assert told["initialize"]["systemPrompt"] == [messages[0]["content"]]


BOTH = {"CLAUDE_CODE_MAX_OUTPUT_TOKENS": "9000", "CLAUDE_CODE_EFFORT_LEVEL": "low"}


@pytest.mark.parametrize("parameters, env", [
    ({"max_tokens": 9000, "reasoning_effort": "low"}, BOTH),
    ({"reasoning_effort": "none"}, {"CLAUDE_CODE_DISABLE_THINKING": "1"}),
    ({"tool_choice": "none"}, {"CLAUDE_CODE_EXTRA_BODY": '{"tool_choice":{"type": "none"}}'}),
])  # fmt: skip
def test_a_primed_spare_serves_whatever_the_options(sparing, parameters, env):
    history = [user("a"), assistant("b"), user("c")]
    history.append(sparing.chat(history, tools=[tool()]).message)
    history.append(user("mock:show"))
    reply, spare = ask_spare(sparing, history, tools=[tool()], **parameters)
    told = json.loads(reply.content)
    assert spare and told["settings"] == [{"env": env}]
    assert len(told["turns"]) == 5


@pytest.mark.parametrize("version, late", [("2.1.330", True), ("2.1.328", False)])
def test_the_model_is_told_before_the_first_turn(make, monkeypatch, version, late):
    monkeypatch.setenv("STAND_IN_VERSION", version)
    one = settling(make(spares=2))
    proxy.announce(one.server)
    assert spares_of(one) == [BLANK, BLANK]
    history = [user("a"), assistant("b"), user("mock:show")]
    told = json.loads(one.chat(history, model="opus").content)
    assert ("opus" in told["argv"]) is not late
    assert ({"model": "opus"} in told["settings"]) is late
    assert spares_of(one) == [(True, 4), BLANK]
    told = json.loads(one.chat(history, model="haiku").content)  # by a blank one
    assert ("haiku" in told["argv"]) is not late


def test_true_is_not_1(sparing):
    def asked(value):
        return [user("a"), calling(call(arguments=json.dumps({"x": value}))),
                tool_result(), user("mock:show")]  # fmt: skip

    told = sparing.chat(asked(1), tools=[tool()]).message
    history = [*asked(True), told, user("mock:show")]
    shown = json.loads(sparing.chat(history, tools=[tool()]).content)
    assert shown["turns"][1]["content"][0]["input"] == {"x": True}
    assert shown["turns"][1]["content"][0]["input"]["x"] is True


def test_of_equal_spares_the_older_one_is_up(sparing):
    sparing.chat("a")
    sparing.settle()
    births = [claude.born for claude in sparing.keeper.spares]
    wanted = proxy.Conversation("sonnet")
    claude = sparing.keeper.take(wanted, sparing.server.backend.installation.program())
    assert claude.born == min(births) < max(births)
    sparing.keeper.retire(claude)


def test_a_dead_spare_is_not_used(sparing):
    sparing.chat("a")
    sparing.settle()
    spare = sparing.keeper.spares[0]
    spare.process.kill()
    spare.process.wait()
    assert sparing.chat("b").status == 200
    until(lambda: spare not in sparing.keeper.spares)


def test_spares_that_die_at_once_are_not_started_for_ever(make, tmp_path):
    starts = tmp_path / "starts"
    text = f'#!/bin/sh\n[ "$1" = -p ] && echo x >>{starts}\necho 2.1.330\n'
    one = settling(make(spares=2, claude=script(tmp_path / "claude", text)))
    proxy.announce(one.server)
    until(lambda: starts.exists() and starts.read_text() == "x\n" * 2)
    until(lambda: not one.keeper.spares and not one.keeper.dying)
    one.keeper.tick()
    assert not one.keeper.spares


def test_an_old_spare_is_renewed(sparing, monkeypatch):
    sparing.chat([user("a"), assistant("b"), user("c")])
    before = pids_of(sparing)
    monkeypatch.setattr(proxy, "STARTED_SECONDS", 0.1)
    monkeypatch.setattr(proxy, "SPARE_SECONDS", 0.2)
    counts = []
    until(lambda: counts.append(len(sparing.keeper.spares)) or sparing.server.backend.keeper.wake()
          or not before & {c.process.pid for c in sparing.keeper.spares})  # fmt: skip
    assert min(counts) >= 1 and max(counts) == 2  # one after the other
    assert spares_of(sparing) == [BLANK, BLANK]


def test_a_server_that_nobody_asks_holds_no_spares(sparing, monkeypatch):
    sparing.chat("a")
    sparing.settle()
    for name in ("STARTED_SECONDS", "SPARE_SECONDS", "REST_SECONDS"):
        monkeypatch.setattr(proxy, name, 0)
    until(lambda: sparing.server.backend.keeper.wake() or not sparing.keeper.spares)
    assert spares_of(sparing) == []
    assert sparing.chat("b").status == 200


def test_spares_of_a_replaced_cli_end(sparing):
    sparing.chat("a")
    before, installation = pids_of(sparing), sparing.server.backend.installation
    assert len(before) == 2
    installation.found = installation.found._replace(stamp=("old",))
    sparing.server.backend.keeper.wake()
    until(lambda: not sparing.keeper.spares)
    assert sparing.chat("b").status == 200
    assert len(pids_of(sparing)) == 2


def test_a_spare_is_taken_once(sparing):
    sparing.chat("a")
    sparing.settle()
    program, wanted = sparing.server.backend.installation.program(), proxy.Conversation("sonnet")
    taken = in_threads(*[lambda: sparing.keeper.take(wanted, program)] * 8)
    found = [claude for claude in taken if claude]
    assert len(found) == len({id(claude) for claude in found}) == 2
    for claude in found:
        sparing.keeper.retire(claude)


@pytest.mark.parametrize("most", [1, 3])
def test_the_number_of_spares_is_bounded(make, monkeypatch, most):
    one = settling(make(spares=most))
    for text in "abcd":
        one.chat([user(text), assistant("x"), user("y")])
        one.settle()
        assert len(one.keeper.spares) == most
    assert spares_of(one) == [(True, 4)] * most
    monkeypatch.setattr(proxy, "STARTED_SECONDS", 0)
    monkeypatch.setattr(proxy, "PAUSE_SECONDS", 0)
    wanted = [(True, 4)] * max(1, most - 1) + [BLANK] * (most > 1)
    until(lambda: spares_of(one) == wanted)
    last = one.keeper.spares[-1 if most == 1 else -2].conversation.turns
    assert "d" in json.loads(last[0])["message"]["content"][0]["text"]


def test_both_endpoints_share_a_primed_spare(sparing):
    history = [user("a"), assistant("x"), user("b mock:say=two")]
    said = assistant(sparing.chat(history).content)
    sparing.settle()
    history = [{"type": "message", **m} for m in [*history, said, user("c")]]
    before = pids_of(sparing)
    assert sparing.respond(history).status == 200
    assert before - pids_of(sparing)
    assert max(len(c.conversation.turns) for c in sparing.keeper.spares) >= 5


def test_a_spare_knows_a_custom_call(sparing):
    body = {"tools": [CUSTOM, NAMESPACE], "input": [user('mock:tool=patch,mcp__w__look mock:input={"input":"*"}')]}
    output = sparing.respond(**body).json["output"]
    assert [(i["name"], i.get("input")) for i in output[1:]] == [("patch", "*"), ("look", None)]
    body["input"] += output
    for call, text in zip(output[1:], ("done", "mock:show")):
        body["input"].append(output_item(call["call_id"], text, call["type"] + "_output"))
    before = pids_of(sparing)
    shown = sparing.respond(**body).json["output"][0]["content"][0]["text"]
    uses = [b for b in json.loads(shown)["turns"][1]["content"] if b["type"] == "tool_use"]
    assert before - pids_of(sparing) and [use["input"] for use in uses] == [{"input": "*"}] * 2


def test_two_agents_by_turns_find_their_own_spares(sparing):
    loops = [[user(x), assistant("x"), user("y")] for x in "ab"]
    for step in range(3):
        for history in loops:
            reply, spare = ask_spare(sparing, history)
            history += [reply.message, user("next")]
            assert not step or spare
    assert spares_of(sparing) == [(True, 8), (True, 8)]


def test_what_can_not_be_told_ahead_stops_nothing(sparing, monkeypatch):
    def too_deep(*arguments):
        raise RecursionError

    monkeypatch.setattr(sparing.keeper, "prepare", too_deep)
    assert [sparing.chat("a").status, sparing.chat("b").status] == [200, 200]


def test_a_cleaned_temporary_directory_is_made_anew(sparing):
    assert sparing.chat("a").status == 200
    sparing.settle()
    shutil.rmtree(sparing.keeper.home)
    sparing.keeper.drop(sparing.keeper.spares[:])
    assert os.listdir(sparing.told([])["cwd"]) == []


def test_temporary_files_of_a_cli_go_with_it(server):
    told = server.told([])
    until(server.quiet)
    home = server.server.backend.keeper.home
    assert os.path.dirname(told["env"]["CLAUDE_CODE_TMPDIR"]) == home
    assert os.listdir(home) == [proxy.CWD]


def test_many_at_once_are_not_mixed_up(make):
    one, numbers = make(spares=2, max_concurrency=16), range(16)

    def ask(i):
        messages = [user(f"q{i}"), assistant("x"), user(f"text{i}")]
        return one.chat(messages, stream=bool(i % 2)).content

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, numbers)) == [f"You said: text{i} " for i in numbers]


# ── Who may ask, and how ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("headers, status", [
    ({"Host": "localhost:3456"}, 200),
    ({"Host": "[::1]:3456"}, 200),
    ({"Host": "127.0.0.2"}, 200),
    ({"Host": "[0:0:0:0:0:0:0:1]"}, 200),
    ({"Host": "127.999.0.1"}, 403),
    ({"Host": "evil.example"}, 403),
    ({"Host": "localhost.evil.example"}, 403),
    ({"Origin": "http://localhost:8080"}, 200),
    ({"Origin": "https://127.0.0.1"}, 200),
    ({"Origin": "app://obsidian.md"}, 200),
    ({"Origin": "http://tauri.localhost"}, 200),
    ({"Origin": "https://evil.example"}, 403),
    ({"Origin": "http://localhost.evil.example"}, 403),
    ({"Origin": "null"}, 403),
    ({"Sec-Fetch-Site": "cross-site"}, 403),
    ({"Sec-Fetch-Site": "same-origin"}, 200),
    ({"Sec-Fetch-Site": "cross-site", "Origin": "app://x"}, 200),
])  # fmt: skip
def test_guards(server, headers, status):
    reply = server.request("GET", "/v1/models", headers=headers)
    assert reply.status == status
    allowed = reply.headers.get("Access-Control-Allow-Origin")
    assert allowed == (headers.get("Origin") if status == 200 else None)


def test_a_request_has_one_host(server):
    for hosts, status in ((0, 400), (1, 200), (2, 400)):
        head = b"GET /health HTTP/1.1\r\n" + b"Host: localhost\r\n" * hosts
        assert server.raw(head + b"\r\n").startswith(b"HTTP/1.1 %d " % status)


def test_allowed_origins(make):
    named = ["https://a.example", "https://b.example", "file://", "null"]
    one, other = make(allow_origin=", ".join(named)), make()
    for origin in [*named, "https://c.example"]:
        reply = one.request("GET", "/health", headers={"Origin": origin})
        assert reply.status == (200 if origin in named else 403)
        allowed = reply.headers.get("Access-Control-Allow-Origin")
        assert allowed == (origin if origin in named else None)
        assert other.request("GET", "/health", headers={"Origin": origin}).status == 403


def test_preflight(make):
    wanted = "authorization,x-stainless-os"
    headers = {"Origin": "http://localhost:1", "Access-Control-Request-Headers": wanted}
    one = make(api_key="KEY")
    reply = one.request("OPTIONS", "/v1/chat/completions", headers=headers)
    assert reply.status == 204 and "Content-Length" not in reply.headers
    assert reply.headers["Access-Control-Allow-Origin"] == "http://localhost:1"
    assert reply.headers["Access-Control-Allow-Headers"] == wanted
    headers["Origin"] = "https://evil.example"
    assert one.request("OPTIONS", "/v1/chat/completions", headers=headers).status == 403


@pytest.mark.parametrize("headers, status", [
    ({}, 401),
    ({"Authorization": "Bearer WRONG"}, 401),
    ({"Authorization": "Basic KEYÜ"}, 401),
    ({"Authorization": "KEYÜ"}, 401),
    ({"Authorization": "Bearer KEYÜ"}, 200),
    ({"Authorization": "bEARER  KEYÜ"}, 200),
    ({"X-Api-Key": "KEYÜ"}, 200),
])  # fmt: skip
def test_api_key(make, headers, status):
    headers = {name: value.encode().decode("latin-1") for name, value in headers.items()}
    reply = make(api_key="KEYÜ").request("GET", "/v1/models", headers=headers)
    assert reply.status == status
    assert (reply.json.get("error") or {}).get("code") == {401: "invalid_api_key"}.get(status)


def test_content_type_matters_in_browsers_alone(server):
    body = json.dumps({"model": "sonnet", "messages": [user("x")]})
    simple = {"Content-Type": "text/plain"}
    assert server.request("POST", "/v1/chat/completions", body, simple).status == 200
    simple["Origin"] = "http://localhost"
    assert server.request("POST", "/v1/chat/completions", body, simple).status == 415


@pytest.mark.parametrize("request_, status", [
    (POST + b"Connection: close\r\n\r\n", 400),
    (POST + b"Content-Length: x\r\n\r\n", 400),
    (POST + b"Content-Length: -1\r\n\r\n", 400),
    (POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", 400),
    (POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: gzip\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    (POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}xx\r\n", 400),
    (POST + b"Content-Length: 99999999999\r\n\r\n", 413),
    (POST + b"Transfer-Encoding: chunked\r\n\r\nffffffff\r\n", 413),
    (b"GET /" + b"x" * 70000 + b" HTTP/1.1\r\n\r\n", 414),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431),
    (b"GET / HTTP/3.0\r\n\r\n", 505),
    (POST + b"Broken line\r\nContent-Length: 2\r\n\r\n{}", 400),
    (POST + b"Origin: app://x\r\n Set-Cookie: a=b\r\n\r\n", 400),
    (POST + b"Origin: app://x\r Set-Cookie: a=b\r\n\r\n", 400),
    (POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n", 400),
    (POST + b"Transfer-Encoding:\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    (b"nonsense\r\n\r\n", 400),
    (b"GET http://localhost/health HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
    (b"GET http://localhost/health HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n", 400),
    (b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close, TE\r\n\r\n", 404),
    (b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nContent-Length: 5\r\n\r\nGET /", 404),
])  # fmt: skip
def test_malformed_requests(server, request_, status):
    with server.connect() as connection:
        connection.sendall(request_)
        reply = read_all(connection)
    head, _, body = reply.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert json.loads(body)["error"]["message"]


def test_chunked_bodies_and_pipelining(server):
    body = json.dumps({"model": "sonnet", "messages": [user("x")]}).encode()
    parts = [body[i : i + 9] for i in range(0, len(body), 9)]
    request = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    request += b"".join(b"%x;ext=1\r\n%b\r\n" % (len(part), part) for part in parts)
    request += b"0\r\nTrailer: x\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(request + LAST)
        reply = read_all(connection)
    assert reply.count(b"HTTP/1.1 200 OK") == 2 and b"You said: x" in reply


def test_empty_lines_before_a_request_are_skipped(server):
    assert server.raw(b"\r\n\n" + LAST).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("uri, host, status", [
    ("http://localhost:3456/v1/models?x=y", "localhost", 200),
    ("HTTP://LOCALHOST/health", "elsewhere.example", 200),
    ("http://evil.example/v1/models", "localhost", 403),
    ("http://localhost", "localhost", 404),
])  # fmt: skip
def test_a_uri_with_its_host(server, uri, host, status):
    head = f"GET {uri} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    assert server.raw(head.encode()).startswith(b"HTTP/1.1 %d " % status)


def test_a_request_that_comes_during_an_answer_is_kept(server):
    with send_request(server.port, "mock:tokens=5 mock:gap_ms=20", True) as connection:
        seen = connection.recv(1000)
        connection.sendall(LAST)
        seen += read_all(connection)
    assert seen.index(b"[DONE]") < seen.index(b'"spares"')


def test_a_client_that_sends_much_ahead_has_not_left():
    near, far = socket.socketpair()
    with near, far:
        near.sendall(b"x" * (proxy.MAX_AHEAD + 9))
        reader = proxy.TimedReader(far, lambda: far.send(b"x"))
        until(lambda: reader.has_left() or reader.is_full())
        assert not reader.has_left() and not reader.has_left()
        near.shutdown(socket.SHUT_WR)
        whole = io.BufferedReader(reader).read()
        assert whole == b"x" * (proxy.MAX_AHEAD + 9) and not reader.has_left()
        near.close()
        reader.poke_at = 0.0  # the next time it is asked
        assert reader.has_left()


def test_expect_100_continue(server):
    body = json.dumps({"model": "sonnet", "messages": [user("x")]}).encode()
    head = POST + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(body)
    with server.connect() as connection:
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        assert b" 200 " in connection.recv(100)
    refused_ = head.replace(b"localhost", b"evil.example")
    with server.connect() as connection:
        connection.sendall(refused_)
        assert connection.recv(100).startswith(b"HTTP/1.1 403 ")


def test_slow_senders_are_dropped(make, monkeypatch):
    """Of a body that does not come, and of headers that come a byte at a time."""
    monkeypatch.setattr(proxy, "REQUEST_SECONDS", 0.3)
    one = make()
    with one.connect() as body, one.connect() as headers:
        body.sendall(POST + b"Content-Length: 100\r\n\r\n{")
        assert one.request("GET", "/health").status == 200
        with contextlib.suppress(ConnectionError):
            for byte in POST * 9:
                headers.sendall(bytes([byte]))
                if select.select([headers], [], [], 0.02)[0]:
                    break
            else:
                raise AssertionError("it was never dropped")
            assert headers.recv(100) == b""
        assert body.recv(100) == b""


def test_a_refused_request_does_not_poison_its_connection(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    with contextlib.closing(connection):
        for method, path, body, status in [
            ("POST", "/v1/chat/completions", b"{", 400),
            ("GET", "/v1/nothing", None, 404),
            ("DELETE", "/v1/models", None, 405),
            ("POST", "/v1/nothing", b"x" * 5_000_000, 404),  # read, not reset
            ("GET", "/v1/models", b"", 200),
            ("GET", "/v1/models", None, 200),
        ]:
            connection.request(method, path, body)
            assert result_of(connection).status == status


def test_a_body_too_large_is_refused_before_it_is_sent(server):
    head = POST + b"Content-Length: 40000000\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head + b"x" * 1_000_000)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_ipv6_loopback(make):
    try:
        one = make(host="::1")
    except OSError:
        pytest.skip("needs IPv6")
    with socket.create_connection(("::1", one.port), timeout=10) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: [::1]:%d\r\n\r\n" % one.port)
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


def test_many_idle_connections_do_not_stop_others(server):
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(server.connect())
        assert server.request("GET", "/v1/models").status == 200


# ── The CLI found or not ───────────────────────────────────────────────────────────


def test_no_cli_and_then_there_is_one(make, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(proxy, "PLACES", ["~/.local/bin"])
    one = make(claude="")
    reply = one.chat("hi")
    assert reply.status == 503 and "npm install" in reply.error["message"]
    assert one.request("GET", "/health").status == 503
    home = tmp_path / ".local" / "bin"
    home.mkdir(parents=True)
    text = f'#!/bin/sh\nexec {sys.executable} {__file__} "$@"\n'  # this file as `claude`
    cli = script(home / "claude", text)
    assert one.chat("hi").content == "You said: hi "
    assert one.request("GET", "/health").json["claude"]["path"] == cli


def test_an_old_cli(make, monkeypatch):
    monkeypatch.setenv("STAND_IN_VERSION", "2.1.86")
    reply = make().chat("hi")
    assert reply.status == 503 and "claude update" in reply.error["message"]


def test_not_logged_in(make, monkeypatch):
    monkeypatch.setenv("STAND_IN_LOGIN", "no")
    reply = make().request("GET", "/health")
    assert reply.status == 503 and "claude auth login" in reply.json["message"]


def test_the_cli_is_looked_for_where_installers_put_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    for version in ("v9.1.0", "v22.1.0", "v20.3.0"):
        home = tmp_path / ".nvm" / "versions" / "node" / version / "bin"
        home.mkdir(parents=True)
        script(home / "claude", "#!/bin/sh\n")
    monkeypatch.setattr(proxy, "PLACES", [p for p in proxy.PLACES if p.startswith("~")])
    assert "v22.1.0" in proxy.find_claude("")


def test_a_cli_of_a_relative_path_entry(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    shutil.copy(STAND_IN, tmp_path / "bin" / "claude")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "bin")
    assert proxy.find_claude("") == str(tmp_path / "bin" / "claude")


def test_a_cli_finds_the_node_beside_it(make, monkeypatch, tmp_path):
    cli = script(tmp_path / "claude", "#!/usr/bin/env node-of-nvm\n")
    script(tmp_path / "node-of-nvm", f'#!/bin/sh\nshift\nexec {STAND_IN} "$@"\n')
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert make(claude=cli).chat("hi").content == "You said: hi "


# ── The command ────────────────────────────────────────────────────────────────────


def command(*arguments, **env):
    """Run the script -> CompletedProcess."""
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **env}
    argv = [sys.executable, proxy.__file__, *arguments]
    return subprocess.run(argv, capture_output=True, text=True, env=env, timeout=30)


@contextlib.contextmanager
def running(*arguments, closed=""):
    """The script as a process of its own -> (process, port)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = f"import claude_max_proxy as p; vars(p).update({SHORT}); p.main()"
    argv = [sys.executable, "-c", code, "--port", str(port), "--claude", STAND_IN]
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh"]
    argv = [*shell, *argv, *arguments]
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, cwd=HERE)
    try:
        until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        yield process, port
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def complaint(capsys, *arguments):
    """What parse_arguments() says before it exits -> (exit code, stdout, stderr)."""
    with pytest.raises(SystemExit) as caught:
        proxy.parse_arguments(list(arguments))
    return (caught.value.code, *capsys.readouterr())


def test_version_names_the_file(capsys):
    out = complaint(capsys, "--version")[1]
    assert re.fullmatch(r"claude_max_proxy \d+\.\d+\.\d+ \([0-9a-f]{12}\)\n", out)


@pytest.mark.parametrize("arguments, env, message", [
    (["--port", "x"], {}, "--port"),
    (["--port", "70000"], {}, "--port"),
    (["--timeout", "-1"], {}, "--timeout"),
    (["--nonsense"], {}, "--nonsense"),
    (["--host", "0.0.0.0"], {}, "--api-key"),
    ([], {"CLAUDE_MAX_PROXY_PORT": "many"}, "--port"),
])  # fmt: skip
def test_bad_options_are_one_line_and_exit_2(arguments, env, message, capsys, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    code, out, error = complaint(capsys, *arguments)
    assert code == 2 and message in error and not out
    assert len(error.splitlines()) == 1


def test_options_from_the_environment(monkeypatch):
    monkeypatch.setenv("CLAUDE_MAX_PROXY_PORT", "1234")
    monkeypatch.setenv("CLAUDE_MAX_PROXY_VERBOSE", "1")
    assert proxy.parse_arguments([])[0] == proxy.Settings(port=1234, verbose=True)
    assert proxy.parse_arguments(["--port", "99"])[0].port == 99


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        out = command("--port", str(taken.getsockname()[1]))
    assert out.returncode == 2 and "in use" in out.stderr
    assert len(out.stderr.splitlines()) == 1


def checked(capsys, **settings):
    """--check -> (exit code, what it prints)."""
    settings = {"port": 0, "claude": STAND_IN, **settings}
    return proxy.run_checks(proxy.Settings(**settings)), capsys.readouterr().out


def test_check_knows_a_server_that_runs_already(server, capsys):
    code, out = checked(capsys, port=server.port)
    assert code == 0 and "serves on port" in out
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        code, out = checked(capsys, port=taken.getsockname()[1])
    assert code == 1 and "in use" in out


def test_problems_with_the_cli_say_what_to_do(tmp_path, capsys):
    path = tmp_path / "claude"
    path.write_text("#!/bin/sh\necho what\n")
    path.chmod(0o644)
    code, out = checked(capsys, claude=str(path))
    assert code == 1 and "chmod" in out
    path.chmod(0o755)
    assert "--version" in checked(capsys, claude=str(path))[1]
    assert "is no file" in checked(capsys, claude="/nowhere")[1]
    assert "is no file" in checked(capsys, claude=str(tmp_path))[1]


def test_an_old_python_is_told_what_is_needed(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 8, 18))
    with pytest.raises(SystemExit, match="3.9 is needed"):
        proxy.main()
    ast.parse(read("claude_max_proxy.py"), feature_version=(3, 7))  # it gets that far


def test_check(capsys):
    code, out = checked(capsys)
    assert code == 0 and "2.1.330" in out and "logged in" in out


def test_check_says_what_is_wrong(capsys, monkeypatch):
    monkeypatch.setenv("STAND_IN_LOGIN", "no")
    code, out = checked(capsys)
    assert code == 1 and "claude auth login" in out
    monkeypatch.setenv("ANTHROPIC_API_KEY", "x")
    code, out = checked(capsys, claude="/nowhere")
    assert code == 1 and "ANTHROPIC_API_KEY" in out


def child_of(connection):
    """The pid that a mock:child answer tells."""
    return int(read_until(connection, rb'content": "(\d+)"')[1])


def test_stopping_ends_an_answer_in_flight(make):
    one = make(spares=2)
    one.chat("leave a spare")
    with send_request(one.port, "mock:child mock:gap_ms=60000", True) as connection:
        child = child_of(connection)
        one.close()
        rest = read_until(connection, rb"0\r\n\r\n$").string
        assert b'"code": "stopping"' in rest and b"[DONE]" not in rest
        assert one.quiet() and not one.server.backend.keeper.spares
        until(lambda: gone(child), 5)


STATES = {  # (the last text, what comes before it) of each request
    "idle": [],
    "answering": [("mock:child mock:gap_ms=60000", [])],
    "stubborn": [("mock:stubborn mock:hang", [])],
    "replaying": [("x", [user("mock:deaf"), assistant("y")])],
    "waiting": [("mock:hang", [])] * 3,
    "a spare starts": [("x", [])],
}


def stopped_in(state):
    """A signal in a state -> exit code. Its children must be gone soon afterwards."""
    with contextlib.ExitStack() as stack:
        process, port = stack.enter_context(running("--max-concurrency", "1"))
        requests = [send_request(port, text, True, before) for text, before in STATES[state]]
        for request in requests:
            stack.enter_context(request)
        if state == "a spare starts":
            read_until(requests[0], b"DONE")
        elif requests:
            counts = {"active": 1, "waiting": len(requests) - 1}
            until(lambda: counts.items() <= health_of(port).items())
        pids = list(children(process.pid))
        process.send_signal(signal.SIGHUP if state == "idle" else signal.SIGTERM)
        code = process.wait(10)
        until(lambda: all(map(gone, pids)), 5)
        return code


def test_a_signal_stops_the_server_in_every_state(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert dict(zip(STATES, pool.map(stopped_in, STATES))) == dict.fromkeys(STATES, 0)
    assert not list(tmp_path.glob("claude-max-*"))


def health_of(port):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    with contextlib.closing(connection):
        connection.request("GET", "/health")
        return result_of(connection).json


@pytest.mark.parametrize("wish", ["mock:tokens=99 mock:gap_ms=100", "mock:hang"])
def test_an_answer_cut_short_by_stopping_is_503(make, wish):
    one, replies = make(), []
    thread = threading.Thread(target=lambda: replies.append(one.chat(wish)))
    thread.start()
    until(lambda: one.server.backend.keeper.live)
    one.close()
    thread.join()
    assert (replies[0].status, replies[0].error["code"]) == (503, "stopping")


def test_a_client_that_does_not_read_does_not_stop_the_stopping(make, monkeypatch):
    monkeypatch.setattr(proxy, "TERM_SECONDS", 0.1)
    one = make()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", one.port))
        ask_on(connection, "mock:say=" + "x" * 4_000_000, True)
        until(lambda: one.server.busy and connection.recv(1))
        begun = time.monotonic()
        one.close()
        assert time.monotonic() - begun < 10  # WRITE_SECONDS are 60
    keeper = one.server.backend.keeper  # nobody reaps for a server that has stopped
    until(lambda: keeper.tick() or not (keeper.live or keeper.dying))


def test_a_signal_ends_a_server_whose_cli_hangs_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    cli = script(tmp_path / "claude", "#!/bin/sh\nexec sleep 60\n")
    with running("--claude", cli) as (process, _):
        until(lambda: children(process.pid))
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert not list(tmp_path.glob("claude-max-*"))


def test_a_second_signal_ends_the_server_at_once():
    with running() as (process, port):
        with send_request(port, "mock:child mock:gap_ms=60000", True) as connection:
            child = child_of(connection)
            process.send_signal(signal.SIGTERM)
            until(lambda: socket.socket().connect_ex(("127.0.0.1", port)))
            process.send_signal(signal.SIGTERM)
            assert process.wait(2) == 1
            until(lambda: gone(child))


def test_the_log_has_a_line_for_each_request_and_no_prompt(server, monkeypatch, capsys):
    monkeypatch.setattr(proxy, "log", LOG)
    assert "SECRET" in server.chat("SECRET").content
    lines = until(lambda: capsys.readouterr().err.splitlines())
    assert len(lines) == 1 and re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d 200 POST /v1/chat/completions "
        r"model=claude-sonnet-mock first=\d\.\d{3} in=10 cached=0 out=\d+ total=\d\.\d{3}",
        lines[0],
    ), lines


# ── Fuzz and load ──────────────────────────────────────────────────────────────────

JUNK = [None, True, -1, 10**30, 1.5, "x", "", "\ud800", [], {}, [[]], {"type": 1}]


def mutated(value, rng):
    """A copy with some things dropped, put in, wrapped, or copied from elsewhere."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randrange(1, 4)):
        paths = list(places(value))[1:]
        if not paths:
            return rng.choice(JUNK)
        path = rng.choice(paths)
        holder, key, change = at(value, path[:-1]), path[-1], rng.randrange(4)
        if change == 0:
            del holder[key]
        elif change == 1:
            holder[key] = rng.choice(JUNK)
        elif change == 2:
            holder[key] = [holder[key]]
        else:
            holder[key] = json.loads(json.dumps(at(value, rng.choice(paths))))
    return value


def gnawed(raw, rng):
    """Bytes with a few of them changed, dropped or doubled."""
    raw = bytearray(raw)
    for _ in range(rng.randrange(1, 4)):
        place, any_byte = rng.randrange(len(raw)), bytes([rng.randrange(256)])
        new = [b"", any_byte, raw[place : place + 1] * 2, b'"', b"\r\n"]
        raw[place : place + 1] = rng.choice(new)
    return bytes(raw)


WHOLE_RESPONSE = {
    "model": "sonnet", "input": INPUT[:-2] + [
        item("custom_tool_call", call_id="b", name="patch", input="+a"),
        output_item("b", "done", "custom_tool_call_output"), user("e")],
    "tools": [function(), NAMESPACE, CUSTOM, {"type": "web_search"}], "instructions": "I",
    "tool_choice": {"type": "function", "name": "get_weather"}, "max_output_tokens": 5,
    "text": {"format": {"type": "json_schema", "name": "x", "schema": CITY}},
    "reasoning": {"effort": "low", "summary": "auto"}, "stream": True,
}  # fmt: skip


@pytest.mark.parametrize("whole", [WHOLE, WHOLE_RESPONSE], ids=["chat", "responses"])
def test_mutated_requests_are_understood_or_refused(whole):
    """And what is understood can be told to the CLI."""
    outcomes = set()
    for seed in range(800):
        rng = random.Random(seed)
        raw = json.dumps(mutated(whole, rng)).encode()
        try:
            value = proxy.parse_json(gnawed(raw, rng) if seed % 5 == 0 else raw)
            parse = proxy.parse_response if whole is WHOLE_RESPONSE else proxy.parse_chat
            ask = parse(value, {})
        except proxy.APIError as error:
            assert error.status in (400, 404), seed
            outcomes.add(error.status)
            continue
        version = (2, 1, 112)
        lines = [proxy.initialize_line(ask.setup), proxy.query_line(ask.turns[-1], version)]
        lines += [proxy.turn_line(turn, i, version) for i, turn in enumerate(ask.turns)]
        json.dumps([lines, ask.setup.tools], allow_nan=False).encode()
        outcomes.add(200)
    assert outcomes == {200, 400, 404}


WHOLE_MESSAGE = {
    "model": "m", "usage": {"input_tokens": 1, "output_tokens": 1},
    "stop_reason": "end_turn",
    "content": [{"type": "thinking", "thinking": "t", "signature": "s"},
                {"type": "text", "text": "x"},
                {"type": "tool_use", "id": "i", "name": "f", "input": {}}],
}  # fmt: skip
ALLOWED = {"status": "allowed", "resetsAt": 5}
RETRY = {"type": "system", "subtype": "api_retry", "error_status": 529, "retry_delay_ms": 5}
TRANSCRIPTS = [
    transcript("mock:think=2 mock:tokens=4"),
    transcript("mock:tool=f,g"),
    transcript("mock:tokens=2", ["StructuredOutput"]),
    transcript("mock:tokens=3")[:4] + transcript("mock:tokens=5"),  # told again
    [{"type": "rate_limit_event", "rate_limit_info": ALLOWED}, RETRY, *transcript("mock:say=x")],
    [{"type": "assistant", "message": WHOLE_MESSAGE}],
    printed("mock:status=529")[1:],
]


def test_mutated_transcripts_are_an_answer_or_an_error():
    outcomes = set()
    for seed in range(600):
        rng = random.Random(seed)
        lines = mutated(rng.choice(TRANSCRIPTS), rng)
        lines = lines if isinstance(lines, list) else [lines]
        raws = [json.dumps(line).encode() for line in lines]
        if seed % 5 == 0 and raws:
            raws.append(gnawed(raws.pop(), rng))
        form = json_schema() if seed % 3 == 0 else None
        ask = ask_of(stop=["tok2"], stream=True, response_format=form)
        outcomes.add(told_by(raws, proxy.Reply(ask, "id", 1)))
    assert outcomes == {200, 502, 503}


def told_by(raws, reply):
    """The status of an answer made of these lines; its chunks and whole are sound."""
    try:
        for line in proxy.parse_lines(raws):
            for delta in reply.answers[0].feed(line):
                text = reply.event(delta)
                (choice,) = json.loads(text[6:])["choices"] if text else [{"delta": {}}]
                texts = [choice["delta"].get(k) for k in ("content", "reasoning_content")]
                assert all(text is None or isinstance(text, str) for text in texts)
        if reply.is_complete:
            json.dumps(reply.completion(), allow_nan=False)
        return 200
    except proxy.APIError as error:
        return error.status


def test_mutated_http_is_answered_or_dropped(server):
    """What comes back is well-formed, and no fault of ours."""
    body = json.dumps({"model": "gpt-4", "messages": [user("x")]}).encode()
    size, origin = len(body), b"Origin: http://localhost\r\nContent-Type: application/json\r\n"
    chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (size, body)
    whole = [
        POST + b"Content-Length: %d\r\n\r\n%b" % (size, body), POST + chunked,
        POST + origin + chunked,
        b"GET /v1/models/sonnet?x=1 HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: x\r\n\r\n",
        b"OPTIONS /v1/models HTTP/1.0\r\nOrigin: app://x\r\n\r\n",
    ]  # fmt: skip
    outcomes = set()
    for seed in range(400):
        rng = random.Random(seed)
        reply = server.raw(gnawed(rng.choice(whole), rng))
        while reply:
            head, _, reply = reply.partition(b"\r\n\r\n")
            status = int(re.match(rb"HTTP/1\.1 (\d+) ", head)[1])
            outcomes.add(status)
            assert status < 500 or status in (501, 505), seed
            if status not in (100, 204):
                size = int(re.search(rb"Content-Length: (\d+)", head)[1])
                payload, reply = reply[:size], reply[size:]
                assert not payload or json.loads(payload), seed
    assert outcomes >= {200, 204, 400, 403, 404, 405, 505}


# What a client may do: the text, parameters, and the status that it gets, or None if it
# leaves in the middle.
LOAD = [
    ("mock:tokens=20", {"stream": True}, 200),
    ("mock:tokens=20", {}, 200),
    ("mock:tool=f", {"tools": [{"type": "function", "function": {"name": "f"}}]}, 200),
    ("mock:tokens=1", {"n": 2}, 200),
    ("mock:tokens=99 mock:gap_ms=50", {"stream": True}, None),
    ("mock:hang", {}, None),
    ("mock:stubborn mock:hang", {"stream": True}, None),
    ("mock:exit=1", {}, 502),
    ("mock:garbage", {"stream": True}, 200),
    ("mock:status=529", {}, 503),
    ("x", {"model": "gpt-4"}, 404),
    ("x", {"temperature": "hot"}, 400),
    ("x", {"messages": []}, 400),
]


def load(port, count, outcomes, seed=1):
    """`count` requests of a client that is not always polite."""
    rng = random.Random(seed)
    for _ in range(count):
        text, parameters, wanted = rng.choice(LOAD)
        messages = [system(f"s{rng.randrange(3)}"), user("a"), assistant("b"), user(text)]
        messages = messages[rng.choice([0, 1, 3]) :]
        body = {"model": "sonnet", "messages": messages, **parameters}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            if wanted is None:
                time.sleep(rng.random() / 10)
                outcomes.append((None, None))
                continue
            reply = result_of(connection)
            outcomes.append((reply.status, wanted))
            if "tokens=20" in text:
                assert reply.content == "".join(f"tok{i} " for i in range(20))


def state_of(pid):
    """What a process holds: children, descriptors, threads (as far as can be seen), and
    RSS in MB."""
    size = subprocess.check_output(["ps", "-o", "rss=", "-p", str(pid)])
    proc = f"/proc/{pid}/"
    paths = [proc + "fd", proc + "task"] if os.path.exists(proc) else []
    return (len(children(pid)), *(len(os.listdir(p)) for p in paths)), int(size) / 1024


def test_load_leaves_nothing_behind(tmp_path, monkeypatch):
    """LOAD_REQUESTS=500 of them; fewer by default, for speed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    count, outcomes = int(os.environ.get("LOAD_REQUESTS", 30)), []
    with running("--spares", "2") as (process, port):
        drained = threading.Thread(target=process.stderr.read)
        drained.start()
        load(port, 10, [])
        before, size = until(lambda: idle(process.pid, port))
        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            list(pool.map(lambda seed: load(port, count // 10, outcomes, seed), range(10)))
        until(lambda: (idle(process.pid, port) or [None])[0] == before)
        grown = state_of(process.pid)[1] - size
        print(f"{len(outcomes)} requests {collections.Counter(outcomes)}; "
              f"{before} (children, descriptors, threads) before and after; "
              f"{size:.1f} MB, {grown:+.1f}")  # fmt: skip
        process.terminate()
        assert process.wait(5) == 0
        drained.join()
    assert len(outcomes) == count // 10 * 10
    assert all(status == wanted for status, wanted in outcomes), outcomes
    assert grown < 8 and not list(tmp_path.glob("claude-max-*"))


def idle(pid, port):
    """state_of() a server that has two spares, no other child, and no connection any more;
    the same twice, for it may be about to start a process."""
    states = []
    for _ in range(2):
        spares = health_of(port)["spares"]
        (count, *counts), size = state_of(pid)
        states.append((count, *counts))
        if (spares, count) != (2, 2) or counts[1:] > [1] or states[-1] != states[0]:
            return None
        time.sleep(0.05)
    return states[0], size


# ── Secrets ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("wish, status", [
    ("exit=1", 502),
    ("status=500", 502),
    ("shape", 502),
    ("retry=401", 401),
    ("hang", 504),
    ("stderr=99 mock:exit=1", 502),
])  # fmt: skip
def test_errors_and_log_hold_no_secret(make, logged, wish, status, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "SECRET")
    one = make(timeout=0.1 if wish == "hang" else 30, api_key="SECRET", verbose=True)
    body = {"model": "sonnet", "messages": [system("SECRET"), user(f"SECRET mock:{wish}")]}
    headers = {"Authorization": "Bearer SECRET"}
    for reply in in_threads(
        lambda: one.post(body, headers=headers),
        lambda: one.post({**body, "stream": True}, headers=headers),
    ):
        assert reply.status == status
        seen = reply.text + str(reply.headers) + "".join(logged)
        home = os.path.expanduser("~")
        secrets = ("SECRET", HERE, home, tempfile.gettempdir(), "Traceback")
        assert not [secret for secret in secrets if secret in seen]
    until(lambda: len([line for line in logged if " POST " in line]) == 2)


def test_a_bug_of_ours_in_a_stream_ends_it(server, monkeypatch):
    monkeypatch.setattr(server.server.backend, "learn", lambda answers: {}["SECRET"])
    with send_request(server.port, "x", True) as connection:
        seen = read_all(connection)
    assert seen.count(b"HTTP/1.1") == 1 and b"[DONE]" not in seen


def test_a_bug_of_ours_behind_an_answer_is_not_told(server, monkeypatch):
    monkeypatch.setattr(server.server.backend, "expect_next_turn", lambda reply: {}["SECRET"])
    before = [user("a"), assistant("b")]
    with send_request(server.port, "x", False, before) as connection:
        seen = read_all(connection)
    assert seen.count(b"HTTP/1.1") == 1 and b"You said: x" in seen


def test_a_bug_of_ours_is_a_500_without_details(server, logged, monkeypatch):
    monkeypatch.setattr(proxy, "parse_chat", lambda body, memory: {}["SECRET"])
    reply = server.chat("SECRET")
    assert reply.status == 500 and reply.error["type"] == "api_error"
    assert "SECRET" not in reply.text + "".join(logged) and "KeyError, line" in logged[0]


def test_the_plans_limit_is_logged_when_it_warns(make, logged):
    one = make()
    for _ in range(2):
        one.chat("mock:limit=99 mock:tokens=1")
    warnings = [line for line in logged if line.startswith("limit ")]
    assert len(warnings) == 1 and "status=rejected resetsAt=" in warnings[0]
    assert one.request("GET", "/health").json["rate_limit"]["status"] == "rejected"


def test_a_refused_login_ends_the_spares(sparing):
    sparing.chat("leave a spare")
    assert spares_of(sparing)
    sparing.chat("mock:status=401")
    assert not sparing.keeper.spares and sparing.chat("hi").status == 200


def test_health_believes_a_refused_login(server):
    server.chat("mock:status=401")
    assert server.request("GET", "/health").status == 503
    server.chat("hi")
    assert server.request("GET", "/health").status == 200


def test_health_asks_the_cli_once(make, tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN_LOGIN", "no")
    asked = tmp_path / "asked"
    text = f'#!/bin/sh\necho >>{asked}\nexec {STAND_IN} "$@"\n'
    one = make(claude=script(tmp_path / "claude", text))
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        list(pool.map(lambda _: one.request("GET", "/health"), range(9)))
    assert len(asked.read_text()) == 2  # its version, and its login


def test_a_model_name_can_not_forge_the_log(server, logged):
    server.chat("mock:exit=1", model="x\n2026 200 GET /forged\x1b[31m/sonnet")
    until(lambda: logged)
    assert "model=x?2026?200?GET" in logged[0] and "\n" not in logged[0]


def test_the_banner_says_what_to_try(capsys, make):
    proxy.announce(make(api_key="SECRET").server)
    banner = capsys.readouterr().err.splitlines()
    assert banner[1].startswith("Claude Code 2.1.330 at ") and banner[2] == "logged in"
    assert "claude-opus-4" in banner[-2] and banner[-1].startswith("try: curl http://localhost:")
    assert "SECRET" not in "".join(banner) and "Bearer $KEY" in banner[-1]


def test_the_log_shows_no_control_characters(capsys):
    LOG("405 \x1b[31mGET\x07 /x \x85\n\ttotal=0.1")
    line = capsys.readouterr().err
    assert line.endswith(" 405 ?[31mGET? /x total=0.1\n") and line.count("\n") == 1


def test_without_stderr_there_is_no_log_and_all_else(tmp_path):
    with running(closed="2>&-") as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(connection):
            for _ in range(2):  # one connection
                connection.request("GET", "/health", headers={"Connection": "x"})
                assert result_of(connection).status == 200
                assert connection.sock
        process.terminate()
        assert process.wait(10) == 0


# ── Documents ──────────────────────────────────────────────────────────────────────


def read(name):
    if not os.path.exists(os.path.join(HERE, name)):
        pytest.skip(f"{name} was not copied")
    with open(os.path.join(HERE, name), encoding="utf-8") as document:
        return document.read()


def test_readme_lists_every_option_and_parameter():
    readme = read("README.md")
    for name, row in proxy.OPTIONS.items():
        flag, variable = name.replace("_", "-"), proxy.ENVIRONMENT + name.upper()
        default = f"`{row.default}`" if row.default else ""
        assert f"| `--{flag}` | `{variable}` | {default} | {row.help} |" in readme
    known = {id(row) for row in proxy.PARAMETERS.values()}
    shared = [n for n, row in proxy.RESPONSE_PARAMETERS.items() if id(row) in known]
    assert ", ".join(f"`{name}`" for name in shared) + " as above" in " ".join(readme.split())
    other = {n: r for n, r in proxy.RESPONSE_PARAMETERS.items() if n not in shared}
    for head, table in [("", proxy.PARAMETERS), ("", other), ("tools: ", proxy.TOOL_TYPES),
                        ("items: ", proxy.ITEM_TYPES)]:  # fmt: skip
        alike = {}
        for name, row in table.items():
            alike.setdefault((row.use, row.why), []).append(f"`{name}`")
        rows = [f"| {head}{', '.join(n)} | {use} | {why} |" for (use, why), n in alike.items()]
        assert "\n".join(rows) in readme
    assert len(re.findall(r"^\| `--", readme, re.M)) == len(proxy.OPTIONS)
    assert len(readme.splitlines()) <= 250


def test_help_lists_every_option_with_its_default(capsys):
    out = complaint(capsys, "--help")[1]
    for name, row in proxy.OPTIONS.items():
        assert "--" + name.replace("_", "-") in out
        assert not row.default or f"(default: {row.default})" in " ".join(out.split())


def test_readmes_first_request_works(server):
    curl = re.search(r"^curl http://localhost:3456(\S+) -d '(.*)'$", read("README.md"), re.M)
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    reply = server.request("POST", curl[1], curl[2], form)
    assert reply.status == 200 and reply.content == "You said: Hello! "


def test_readme_json_and_python_blocks_are_valid():
    blocks = re.findall(r"```(python|json)\n(.*?)```", read("README.md"), re.S)
    assert {language for language, _ in blocks} == {"python", "json"}
    for language, block in blocks:
        json.loads(block) if language == "json" else compile(block, "README.md", "exec")


@pytest.mark.parametrize("words", [
    "Download `claude_max_proxy.py`", "mkdir -p ~/.local/bin ~/Library/LaunchAgents",
    "launchctl kickstart -k gui/$UID/com.claude-max-api", "loginctl enable-linger",
    "journalctl --user -u claude-max-proxy", "`claude setup-token`", "`CLAUDE_CODE_OAUTH_TOKEN`",
    "`HTTPS_PROXY`", "`127.0.0.1` there", "`DISABLE_TELEMETRY=1`", '`dirname "$(llm logs path)"`',
])  # fmt: skip
def test_readme_tells_a_newcomer(words):
    assert words in read("README.md")


def test_the_plist_starts_the_server(tmp_path):
    plist = plistlib.loads(read("com.claude-max-api.plist").encode())
    assert plist["Label"] == "com.claude-max-api"
    assert plist["RunAtLoad"] is True and plist["KeepAlive"] is True
    home = tmp_path / "home with space"
    (home / ".local" / "bin").mkdir(parents=True)
    shutil.copy(proxy.__file__, home / ".local" / "bin")
    paths = plist["EnvironmentVariables"]["PATH"].split(":")
    assert "/opt/homebrew/bin" in paths and "/usr/local/bin" in paths
    env = {"HOME": str(home), "CLAUDE_MAX_PROXY_PORT": "70000"}
    env["PATH"] = os.path.dirname(sys.executable) + ":" + plist["EnvironmentVariables"]["PATH"]
    assert subprocess.run(plist["ProgramArguments"], env=env, timeout=30).returncode == 2
    log = (home / "Library" / "Logs" / "claude-max-api.log").read_text()
    assert "--port" in log


def test_the_file_stands_alone():
    nodes = list(ast.walk(ast.parse(read("claude_max_proxy.py"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    homes = {name: importlib.util.find_spec(name).origin for name in names}
    library = os.path.dirname(os.__file__)
    assert len(homes) > 20 and not [
        home for home in homes.values()
        if home not in ("built-in", "frozen")
        and (not home.startswith(library) or "site-packages" in home)
    ]  # fmt: skip


# ── The contract with the real CLI ─────────────────────────────────────────────────


def real_clis():
    named = os.environ.get("CLAUDE_CLIS", "")
    found = shutil.which("claude")
    return [p for p in named.split(os.pathsep) if p] or ([found] if found else [])


@pytest.fixture(
    scope="module",
    params=real_clis() or [None],
    ids=os.path.basename if real_clis() else None,
)
def real(request, tmp_path_factory):
    """The server with a real CLI that asks a MessagesAPI, in a home full of traps."""
    if request.param is None:
        pytest.skip("no real `claude` on PATH (and none named by CLAUDE_CLIS)")
    home = tmp_path_factory.mktemp("home")
    (home / ".claude").mkdir()
    (home / ".claude" / "CLAUDE.md").write_text("TRAP: memory")
    hook = {"type": "command", "command": "echo TRAP: hook"}
    settings = {"hooks": {"UserPromptSubmit": [{"hooks": [hook]}]}, "model": "opus"}
    (home / ".claude" / "settings.json").write_text(json.dumps(settings))
    trap = {"mcpServers": {"trap": {"command": "echo", "args": ["TRAP: mcp"]}}}
    (home / ".claude.json").write_text(json.dumps(trap))
    (home / "trap.txt").write_text("TRAP: file")
    api = MessagesAPI()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proxy, "log", lambda text: None)
        for name, value in api.environment(home).items():
            patch.setenv(name, value)
        one = Proxy(claude=request.param)
        one.api, one.home = api, home
        version = one.request("GET", "/health").json["claude"]["version"]
        one.version = tuple(map(int, version.split(".")))
        yield one
        one.close()
        api.close()


def sent(real):
    """The one request that reached the API since the last call."""
    log, real.api.log[:] = real.api.log[:], []
    assert len(log) == 1, [entry["wrong"] for entry in log]
    assert not log[0]["wrong"]
    assert "TRAP" not in json.dumps(log[0]["body"])
    return log[0]["body"]


def client_turns(body):
    """The API request's turns without what the CLI adds: reminders and cache marks.
    Neighbouring texts are joined: old CLIs get some in two pieces (untyped)."""
    turns = []
    for message in body["messages"]:
        blocks = []
        for block in [] if message["role"] == "system" else api_blocks(message):
            block = {k: v for k, v in block.items() if k != "cache_control"}
            text = block.get("text", "")
            if text.startswith("<system-reminder>"):
                continue
            if text and blocks and blocks[-1]["type"] == "text":
                blocks[-1]["text"] += text
            else:
                blocks.append(block)
        if blocks:
            turns.append((message["role"], blocks))
    return turns


def dialogue(*texts):
    return [(assistant if i % 2 else user)(text) for i, text in enumerate(texts)]


TYPED = ["@/etc/passwd", "/clear", "/compact now", "!ls", "# x", "@trap.txt", "//", "ultrathink"]
CONVERSATIONS = {
    "1 turn": dialogue("Hello!"),
    "2 turns": dialogue("Hello!", "Hi.", "How are you?"),
    "10 turns": dialogue(*(f"text {i}" for i in range(19))),
    "60 turns": dialogue(*(f"text {i}" for i in range(119))),
    "parts": [
        user(text_blocks("a", "b")),
        assistant(text_blocks("c", "d")),
        user(text_blocks("e", "f")),
    ],
    "system in the middle": [system("s"), *dialogue("a", "b"), system("be brief"), user("c")],
    "long system": [system("s" * 300000), user("Hello!")],
    "long text": dialogue("u" * 1000000, "ok", "v" * 1000000),
    "unicode": dialogue("emoji 😀 é \x00 \u2028 \r\n end ", " ja\t", " 日本語\n"),
    "lone surrogate": dialogue("a\ud800b"),
    "typed, earlier": dialogue(*(t for text in TYPED for t in (text, "ok")), "end"),
    **{f"typed, last: {text}": dialogue("first", "ok", text) for text in TYPED},
    "begins with an assistant": [assistant("Hi."), user("Hello!")],
}


@pytest.mark.parametrize("name", list(CONVERSATIONS))
def test_conversations_reach_the_api(real, name):
    messages = CONVERSATIONS[name]
    reply = real.chat(messages)
    assert reply.status == 200, reply.text
    assert reply.content == "tok0 tok1 tok2 tok3 tok4 "
    body = sent(real)
    raw = json.dumps({"model": "opus", "messages": messages}).encode()
    ask = proxy.parse_chat(proxy.parse_json(raw), {})
    wanted = []
    for turn in ask.turns:
        texts = "".join(block["text"] for block in turn["content"])
        wanted.append((turn["role"], texts))
    got = [(role, "".join(b["text"] for b in blocks)) for role, blocks in client_turns(body)]
    assert [(r, t.lstrip("\n")) for r, t in got] == [(r, t.lstrip("\n")) for r, t in wanted]
    prompt = [block["text"] for block in body["system"]][-1]
    assert not ask.setup.system or prompt == ask.setup.system


def test_a_small_request_is_small(real):
    real.chat("Hello!")
    assert len(json.dumps(sent(real))) < 3000


def test_cache_marks_have_one_lifetime(real):
    real.chat([system("s"), *dialogue("a", "b", "c")])
    marks = re.findall(r'"cache_control": ({[^}]*})', json.dumps(sent(real)))
    assert 2 < len(marks) <= 4 and set(marks) == {'{"type": "ephemeral", "ttl": "1h"}'}


def test_real_streams_and_failures(real):
    reply = real.chat("mock:tokens=3", stream=True, stream_options={"include_usage": True})
    assert reply.content == "tok0 tok1 tok2 " and reply.done
    assert reply.chunks[-1]["usage"]["completion_tokens"] == 3
    sent(real)
    for status, ours in ((400, 400), (401, 401), (404, 404), (429, 429)):
        assert real.chat(f"mock:status={status}", stream=True).status == ours
    del real.api.log[:]


@pytest.mark.parametrize(
    "reason, finish", [("max_tokens", "length"), ("refusal", "content_filter")]
)
def test_real_answers_end_with_the_first_message(real, reason, finish):
    reply = real.chat(f"mock:stop={reason}", max_tokens=4000)
    assert reply.finish == finish and reply.content == "tok0 tok1 tok2 tok3 tok4 "
    until(real.quiet)
    assert sent(real)["max_tokens"] == 4000


def test_a_real_broken_stream_is_completed(real):
    reply = real.chat("mock:tokens=6 mock:cut=3", stream=True)
    assert reply.content == "tok0 tok1 tok2 tok3 tok4 tok5 " and reply.done
    del real.api.log[:]


def test_nothing_is_left_in_the_users_home(real):
    real.chat("mock:stop=max_tokens")
    real.chat("Hello!")
    del real.api.log[:]
    until(real.quiet)
    left = [p for p in glob.glob(f"{real.home}/.claude/sessions/*")]
    assert not left and not glob.glob(f"{real.home}/.claude/projects/*")


def wanted_turns(messages, **parameters):
    """The turns that must reach the API, as client_turns() tells them."""
    turns = []
    for turn in ask_of(messages, **parameters).turns:
        turns.append({"role": turn["role"], "content": turn["content"]})
    return client_turns({"messages": turns})


def run_tool_loop(real, rounds, **parameters):
    """A tool loop with parallel calls; every request must reach the API once."""
    tools = [tool(), tool("Bash"), tool("odd.name")]
    names = {"get_weather", "Bash", proxy.api_name("odd.name")}
    again = "mock:tool=get_weather,Bash mock:tokens=1"
    history = [system("s"), user(again + " mock:think=1")]
    for number in range(rounds):
        reply = real.chat(history, tools=tools, stream=bool(number % 2), **parameters)
        assert reply.finish == "tool_calls", reply.text
        body = sent(real)
        assert [t["name"] for t in body["tools"]] == sorted(names, key=str.lower)
        told = [(role, [b for b in blocks if b["type"] != "thinking"])
                for role, blocks in client_turns(body)]  # fmt: skip
        assert told == wanted_turns(history, tools=tools)
        history.append(reply.message)
        for i, asked in enumerate(reply.message["tool_calls"]):
            history.append(tool_result(again if i else text_blocks("a", "b"), asked["id"]))
        history.append(user(again + " mock:think=1"))
    return history


def test_a_real_tool_loop(real):
    run_tool_loop(real, 3)


def test_a_real_tool_loop_with_spares_and_signed_thinking(real, make):
    one = make(claude=real.server.settings.claude, spares=2)
    one.api, one.home = real.api, real.home
    run_tool_loop(one, 4, model="claude-haiku-4-5")


REAL_OPTIONS = {
    "plain": {},
    "max_tokens": {"max_tokens": 5000},
    "effort": {"reasoning_effort": "high"},
    "no thinking": {"reasoning_effort": "none"},
    "tools": {"tools": [tool()]},
    "tool_choice": {"tools": [tool()], "tool_choice": "required"},
}


@pytest.mark.parametrize("model", ["opus", "claude-haiku-4-5"])
@pytest.mark.parametrize("name", list(REAL_OPTIONS))
def test_a_real_spare_asks_as_a_cold_process_does(real, make, name, model):
    """Blank, then initialized, then primed while the answer before came, with late
    model and options: the bodies of cold processes."""
    one = settling(make(claude=real.server.settings.claude, spares=2))
    one.keeper.home = real.server.backend.keeper.directory()  # its name stands in the bodies
    first = [system("s"), user("/how are you doing today? mock:tokens=2")]
    plain = {"tools": [tool()]} if "tool" in name else {}
    cold, warm = [], []
    proxy.announce(one.server)
    bodies = {id(real): cold, id(one): warm}
    for server in (real, one):
        for parameters in (plain, REAL_OPTIONS[name]):
            for _ in range(2):
                (server is one) and one.settle()
                reply = server.chat(first, model=model, **parameters)
                assert reply.status == 200, reply.text
                bodies[id(server)].append({**sent(real), "metadata": None})
        history = [*first, assistant("tok0 tok1 "), user("go on")]
        history += [server.chat(history, model=model, **plain).message, user("on")]
        sent(real)
        (server is one) and one.settle()
        assert server.chat(history, model=model, **REAL_OPTIONS[name]).status == 200
        bodies[id(server)].append({**sent(real), "metadata": None})
    one.keeper.home = ""  # the other one's to remove
    assert cold == warm


def test_real_both_endpoints_ask_the_same(real):
    """Byte for byte, at the API."""
    assert real.chat(CHAT, tools=[tool(description=None, parameters=CITY)]).status == 200
    ours = {**sent(real), "metadata": None}
    items = [dict(i, id="rs_0") if i.get("id") == "msg_2" else i for i in INPUT]
    items.insert(-1, assistant("d"))
    assert real.respond(items, tools=[function()]).status == 200
    assert json.dumps({**sent(real), "metadata": None}) == json.dumps(ours)


def test_real_tools_are_all_there(real):
    names = ["Read", "Task", "Agent", "ToolSearch", "StructuredOutput", "Skill", "a" * 128]
    tools = [tool(name, "x" * 5000) for name in names] + [tool(f"t{i}") for i in range(121)]
    tools[0]["function"]["parameters"] = {"anyOf": [{"properties": {"q": True}}]}
    tools[1]["function"]["parameters"] = {"properties": {"q": True}}
    reply = real.chat("Hello!", tools=tools)
    assert reply.status == 200, reply.text
    body = sent(real)
    texts = {t["name"]: json.dumps(t) for t in body["tools"]}
    assert set(texts) == {proxy.api_name(t["function"]["name"]) for t in tools}
    assert all("x" * 5000 in texts[proxy.api_name(name)] for name in names)
    texts = [b["text"] for b in api_blocks(body["messages"][0]) if b["type"] == "text"]
    assert not any("Attribution" in text or "agent types" in text for text in texts)


ODD_SCHEMAS = [
    {"properties": {name: {"type": "string"} for name in ODD_PROPERTIES}},
    {"properties": {"a": {"type": "array", "items": []}}},
    {"properties": {"a": {}}, "required": ["a", "a"]},
    {"properties": {"a": {"type": ["string", "string"]}}},
    {"properties": {"a": {"type": "integer", "minimum": "0"}}},
    {"properties": {"a": {"anyOf": []}}},
    {"properties": {}, "additionalProperties": "false"},
    {"properties": {"a": {"$id": "#x"}}, "$id": "#x"},
    {"oneOf": [{"properties": {"a": {"const": c}}} for c in "xy"]},
    {"anyOf": [{"$ref": "#/$defs/x"}, {"not": {}}], "$defs": {"x": {"required": ["a b"]}}},
]


@pytest.mark.parametrize("structured", [False, True])
def test_real_odd_schemas_are_all_there(real, structured):
    tools = [tool(f"t{i}", parameters=schema) for i, schema in enumerate(ODD_SCHEMAS)]
    more = {"response_format": json_schema(ODD_SCHEMAS[0])} if structured else {}
    reply = real.chat("x", tools=tools, **more)
    assert reply.status == 200, reply.text
    until(real.quiet)
    assert len(sent(real)["tools"]) == len(tools) + structured


def test_a_real_wrapped_input_there_and_back(real):
    tools = [tool("look", parameters=ODD)]
    history = [user('mock:tool=look mock:notext mock:input={"input":{"$filter":1}}')]
    asked = real.chat(history, tools=tools, stream=True).message
    assert json.loads(asked["tool_calls"][0]["function"]["arguments"]) == {"$filter": 1}
    sent(real)
    history += [asked, tool_result(id=asked["tool_calls"][0]["id"])]
    assert real.chat(history, tools=tools).status == 200
    use = client_turns(sent(real))[1][1][0]
    assert (use["type"], use["input"]) == ("tool_use", {"input": {"$filter": 1}})


def test_a_real_tool_that_is_dropped_is_a_400(real, monkeypatch):
    monkeypatch.setattr(proxy, "API_PROPERTY", re.compile(".*"))
    odd = tool("odd", parameters={"properties": {"$filter": {}}})
    reply = real.chat("x", tools=[tool(), odd])
    if real.version >= (2, 1, 330):
        assert reply.status == 400 and "'odd'" in reply.error["message"]
    else:  # it drops none
        assert reply.status == 200
    until(real.quiet)
    del real.api.log[:]


def test_a_real_conversation_with_one_id_for_all_calls(real):
    step = [calling(call(id="call_0")), tool_result(id="call_0")]
    history = [user("x"), *step, *step, *step]
    assert real.chat(history, tools=[tool()]).status == 200
    assert client_turns(sent(real)) == wanted_turns(history, tools=[tool()])


def test_a_real_picture_keeps_the_cache_mark(real):
    shown = [*text_blocks("look"), image(data_url("image/png"))]
    assert real.chat([user(shown)]).status == 200
    blocks = api_blocks(client_user(sent(real)))
    assert [b for b in blocks if b.get("text") == "look"][0]["cache_control"]


def client_user(body):
    return [message for message in body["messages"] if message["role"] == "user"][-1]


def test_a_real_budget_loop_with_a_text_behind_the_result(real):
    loop = [user("x"), calling(call()), tool_result(), user("and?")]
    for history in (loop, [*loop, assistant("a"), user("b")]):
        reply = real.chat(history, model="claude-haiku-4-5", tools=[tool()])
        assert reply.status == 200, reply.text
        sent(real)


def test_real_tool_choice(real):
    one = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("none", "required", one):
        more = {"tools": [tool()], "tool_choice": choice, "parallel_tool_calls": False}
        real.chat("mock:tool=get_weather", **more)
        assert sent(real)["tool_choice"] == json.loads(ask_of(**more).options.tool_choice)


def test_real_structured_output(real):
    reply = real.chat('mock:input={"a":1}', response_format=json_schema(), stream=True)
    assert reply.content == '{"a":1}' and reply.finish == "stop"
    until(real.quiet)
    assert sent(real)["tools"][0]["input_schema"] == SCHEMA
    odd = {"$schema": "https://json-schema.org/draft/2020-12/schema", "x-foo": 1}
    odd["properties"] = {"a": {"type": "integer", "example": 5, "exclusiveMinimum": True}}
    assert real.chat('mock:input={"a":1}', response_format=json_schema(odd)).content == '{"a":1}'
    until(real.quiet)
    sent(real)
    reply = real.chat('mock:input={"b":2}', response_format={"type": "json_object"})
    assert reply.content == '{"b":2}'
    until(real.quiet)
    sent(real)
    both = {"tools": [tool()], "response_format": json_schema()}
    assert real.chat("mock:tool=get_weather mock:notext", **both).finish == "tool_calls"
    until(real.quiet)
    any_one = {"type": "any", "disable_parallel_tool_use": True}
    assert sent(real)["tool_choice"] == any_one


def test_real_media(real):
    table = file(data_url("text/csv", "YSxi"), filename="a.csv")
    parts = [image("https://example.com/x.png"), table, *text_blocks("look")]
    real.chat([user(parts), assistant("ok"), user(parts)])
    assert client_turns(sent(real)) == wanted_turns([user(parts), assistant("ok"), user(parts)])


@pytest.mark.parametrize("model", ["claude-haiku-4-5", "sonnet"])
def test_real_thinking(real, model):
    reply = real.chat("mock:think=2 mock:tokens=1", model=model)
    assert reply.message["reasoning_content"] == "thought0 thought1 "
    assert sent(real)["thinking"]["type"] in ("enabled", "adaptive")
    for parameters in ({"max_tokens": 10}, {"max_tokens": 1500}, {"reasoning_effort": "none"}):
        assert real.chat("x", model=model, **parameters).status == 200
        assert (sent(real).get("thinking") or {"type": "disabled"})["type"] == "disabled"
    loop = [user("x"), calling(call()), tool_result("x")]
    assert real.chat(loop, model=model, tools=[tool()]).status == 200
    sent(real)


def test_real_stop_and_n(real):
    assert real.chat("mock:tokens=9", stop="k2", n=2).content == "tok0 tok1 to"
    del real.api.log[:]
