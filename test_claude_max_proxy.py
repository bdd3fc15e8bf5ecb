#!/usr/bin/env python3
"""The tests of claude_max_proxy, and two programs that they need.

    python3 test_claude_max_proxy.py            run the tests (pytest's options work)
    python3 test_claude_max_proxy.py -k tools   run some of the tests
    python3 test_claude_max_proxy.py --help     print the mock: words and variables
    python3 test_claude_max_proxy.py --bench    measure the server beside the bare CLI
    python3 claude_max_proxy.py --claude ./test_claude_max_proxy.py
                                                try the server without a subscription

This file is three programs:

1. The tests. They run under pytest. If it is not installed, it is installed into a
   virtual environment in the user's cache directory.
2. The stand-in CLI. Executed with the arguments of `claude`, this file speaks Claude
   Code's control protocol and obeys commands of the form mock:WORD=VALUE in the last
   user message. MOCK_WORDS lists them all; mock:show returns all that it received.
3. The benchmark. It drives a real `claude` that talks to the small Messages API below.

The small Messages API (`MessagesAPI`) is also what the tests of the contract with the
real CLI use. They run if `claude` is on PATH or if CLAUDE_CLIS names some (paths,
separated as in PATH). It obeys the mock: words that MOCK_WORDS marks with "both".

How to add a test:

1. Find its section (they follow claude_max_proxy.py); name it test_<unit>_<case>.
2. If the unit is a pure function, call it. Start a server only for what needs one.
3. Make the model answer, or the CLI fail, with mock: words in the last user message.
4. Is there no word for it? Add a row to MOCK_WORDS and the lines that obey it.
5. Wait for a condition, never for a time, and leave no process, thread or file behind.
"""

# The stand-in CLI is started for almost every test, so it imports no more than this.
import json
import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))


# ── The mock: words ────────────────────────────────────────────────────────────────

EITHER = "both"  # the stand-in CLI and the small Messages API
CLI = "stand-in"

# To support a new word, add a row. A word that has no row here is an error, so that a
# typo in a test cannot silently mean "no fault".
MOCK_WORDS = {
    # word: (its value, who obeys it, what it does)
    #
    # What the model answers
    "tokens": ("N", EITHER, "answer with N text deltas (default: 5)"),
    "say": ("TEXT", EITHER, 'answer with this text in one delta; "~" is a space'),
    "json": ("LIST", EITHER, "answer with these text deltas, a JSON list of strings"),
    "notext": ("", EITHER, "answer without a text block"),
    "think": ("N", EITHER, "begin with a thinking block of N deltas"),
    "tool": ("NAME,NAME", EITHER, "call these tools after the text"),
    "input": ("JSON", EITHER, 'the input of each call; "none": send no input delta'),
    "stop": ("REASON", EITHER, "the stop_reason; the stand-in then goes on answering"),
    "delay_ms": ("N", EITHER, "wait before the first event"),
    "gap_ms": ("N", EITHER, "wait after each delta"),
    "show": ("", CLI, "answer with all that was received, as JSON"),
    # The limits of the plan
    "plan": ("A,B", EITHER, "report A of the 5-hour, B of the 7-day window as used"),
    "plan_reset": ("SECONDS", EITHER, "when both windows end (else 2 h and 3 days)"),
    "overage": ("1", CLI, "with plan: report that overage is being used"),
    "limit": ("SECONDS", CLI, "report a limit that ends in SECONDS"),
    # Failures of the API
    "status": ("N", EITHER, "fail with this HTTP status"),
    "category": ("NAME", CLI, "fail with this error category"),
    "reason": ("NAME", CLI, "the terminal_reason of that failure"),
    "retry": ("N", CLI, "print an api_retry line with this status, then wait"),
    "retries": ("N", CLI, "print N such lines before it, 0.1 s apart"),
    "pause": ("SECONDS", CLI, "how long retry waits at the end (default: 60)"),
    "cut": ("N", EITHER, "end the stream after N deltas; the stand-in answers again"),
    "else": ("TEXT", CLI, "with cut: say this the second time"),
    "whole": ("", CLI, "with cut: answer again in one message, not streamed"),
    # What else the CLI prints
    "line": ("N", CLI, "print a line with N bytes of padding first"),
    "stderr": ("N", CLI, "write N bytes to stderr first"),
    "garbage": ("", CLI, "print lines first that are not JSON"),
    "bytes": ("HEX", CLI, "print these bytes first"),
    "shape": ("", CLI, "print a message_start first that has no message"),
    "empty": ("", CLI, "print a result first, as after a slash command"),
    "halves": ("", CLI, "print each line in two pieces"),
    "late_call": ("", CLI, "send tools/call after the answer, as 2.1.112 does"),
    # Processes
    "exit": ("N", CLI, "exit with this code instead of answering"),
    "hang": ("", CLI, "do nothing for 60 s before answering"),
    "deaf": ("", CLI, "in an earlier turn: take 60 s to read that turn"),
    "stubborn": ("", CLI, "ignore SIGTERM"),
    "child": ("", CLI, "fork a child that ignores SIGTERM; answer its pid"),
}

STAND_IN_VARIABLES = {
    "STAND_IN_VERSION": "the version to report (default: 2.1.332)",
    "STAND_IN_VERSION_SECONDS": "how long `--version` takes",
    "STAND_IN_LOGIN": '"no": nobody is logged in',
    "STAND_IN_AUTH": "a JSON object, merged into what `auth status` prints",
    "STAND_IN_AUTH_SECONDS": "how long `auth status` takes",
    "STAND_IN_MODELS": "a JSON list: the models that `initialize` answers with",
    "STAND_IN_DIES": '"1": `-p` exits at once with code 1',
    "STAND_IN_LOG": "a file to which each `-p` appends a line, its pid",
}


def mock_words(text, double=CLI):
    """Return the mock: words of a text: {word: value}, with "" for no value.

    Raises ValueError if `double` obeys no such word.
    """
    words = {}
    for part in text.split("mock:")[1:]:
        if not part.strip():
            raise ValueError('"mock:" without a word')
        word, _, value = part.split()[0].partition("=")
        if word not in MOCK_WORDS:
            raise ValueError(f"unknown mock: word {word!r} (see MOCK_WORDS)")
        if MOCK_WORDS[word][1] not in (EITHER, double):
            raise ValueError(f"mock: word {word!r} is for the stand-in CLI only")
        words[word] = value
    return words


# ── What the model answers ─────────────────────────────────────────────────────────


def events(words, tools=(), model="claude-mock-1", prompt=(10, 0, 0)):
    """Yield the Messages API's stream events for an answer as `words` describe it.

    `tools` are the names of the tools on offer, `prompt` the prompt's tokens: not
    cached, read from the cache, written to it.
    """
    time.sleep(float(words.get("delay_ms", 0)) / 1000)
    usage = {
        "input_tokens": prompt[0],
        "cache_read_input_tokens": prompt[1],
        "cache_creation_input_tokens": prompt[2],
        "output_tokens": 1,
    }
    message = {
        "id": f"msg_{time.time_ns()}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "usage": usage,
    }
    yield {"type": "message_start", "message": message}
    calls = called_tools(words, tools)
    count = 0
    for index, (block, deltas) in enumerate(answer_blocks(words, calls)):
        yield {"type": "content_block_start", "index": index, "content_block": block}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
            count += 1
            time.sleep(float(words.get("gap_ms", 0)) / 1000)
        yield {"type": "content_block_stop", "index": index}
    stop = words.get("stop")
    if not stop:
        stop = "tool_use" if calls else "end_turn"
    delta = {"stop_reason": stop, "stop_sequence": None}
    yield {"type": "message_delta", "delta": delta, "usage": {"output_tokens": count}}
    yield {"type": "message_stop"}


def called_tools(words, tools):
    """Return the names of the tools that the model calls."""
    if words.get("tool"):
        return words["tool"].split(",")
    if "StructuredOutput" in tools and "tool" not in words:
        return ["StructuredOutput"]
    return []


def answer_blocks(words, calls):
    """Return the content blocks of an answer: a list of (block, its deltas)."""
    blocks = []
    if "think" in words:
        blocks.append(thinking_block(int(words["think"])))
    structured = calls == ["StructuredOutput"] and "tool" not in words
    if not structured and "notext" not in words:
        blocks.append(text_block(answer_texts(words)))
    for number, name in enumerate(calls):
        blocks.append(tool_block(number, name, words.get("input", '{"city":"Paris"}')))
    return blocks


def answer_texts(words):
    """Return the text deltas of an answer."""
    if "json" in words:
        return json.loads(words["json"])
    if "say" in words:
        return [words["say"].replace("~", " ")]
    return [f"tok{number} " for number in range(int(words.get("tokens", 5)))]


def thinking_block(count):
    deltas = []
    for number in range(count):
        deltas.append({"type": "thinking_delta", "thinking": f"thought{number} "})
    deltas.append({"type": "signature_delta", "signature": "c2lnbmVk"})
    return {"type": "thinking", "thinking": "", "signature": ""}, deltas


def text_block(texts):
    deltas = [{"type": "text_delta", "text": text} for text in texts]
    return {"type": "text", "text": ""}, deltas


def tool_block(number, name, text):
    """A call whose input is sent in pieces of 7 characters, after an empty one."""
    call_id = f"toolu_{time.time_ns()}{number}"
    block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
    pieces = [""]  # the API begins with an empty delta
    if text != "none":
        for start in range(0, len(text), 7):
            pieces.append(text[start : start + 7])
    deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
    return block, deltas


# ── The plan's limits ──────────────────────────────────────────────────────────────

PLAN_RESETS = {"five_hour": 2 * 3600, "seven_day": 3 * 86400}  # seconds from now


def plan_windows(words):
    """Return the windows of the plan as `plan` and `plan_reset` describe them."""
    windows = {}
    for name, used in zip(PLAN_RESETS, words["plan"].split(",")):
        utilization = float(used)
        status = "allowed"
        if utilization >= 0.9:
            status = "allowed_warning"
        if utilization >= 1:
            status = "rejected"
        seconds = float(words.get("plan_reset", PLAN_RESETS[name]))
        windows[name] = {
            "utilization": utilization,
            "resetsAt": int(time.time() + seconds),
            "status": status,
        }
    return windows


def fullest_window(windows):
    """Return the name of the window of which the most is used."""
    return max(windows, key=lambda name: windows[name]["utilization"])


def plan_status(words, windows):
    """Return whether the plan as a whole allows the request."""
    if words.get("status") == "429":
        return "rejected"
    return windows[fullest_window(windows)]["status"]


def plan_event(words):
    """Return the line in which the CLI (2.1.332) reports the plan's limits."""
    windows = plan_windows(words)
    name = fullest_window(windows)
    info = {
        "status": plan_status(words, windows),
        "resetsAt": windows[name]["resetsAt"],
        "rateLimitType": name,
        "isUsingOverage": words.get("overage") == "1",
        "unifiedWindows": windows,
    }
    return {"type": "rate_limit_event", "rate_limit_info": info}


def plan_headers(words):
    """Return the headers in which the API reports the plan's limits."""
    if "plan" not in words:
        return {}
    windows = plan_windows(words)
    name = fullest_window(windows)
    headers = {
        "status": plan_status(words, windows),
        "reset": windows[name]["resetsAt"],
        "representative-claim": name,
    }
    for short, name in (("5h", "five_hour"), ("7d", "seven_day")):
        headers[f"{short}-utilization"] = windows[name]["utilization"]
        headers[f"{short}-reset"] = windows[name]["resetsAt"]
        headers[f"{short}-status"] = windows[name]["status"]
    return {
        f"anthropic-ratelimit-unified-{key}": str(value)
        for key, value in headers.items()
    }


# ── The stand-in CLI ───────────────────────────────────────────────────────────────

# mock:show returns the environment variables whose names begin like this.
SHOWN_VARIABLES = ("CLAUDE", "ANTHROPIC", "DISABLE", "ENABLE", "MAX_")

ACCOUNT = {"subscriptionType": "Claude Max", "apiProvider": "firstParty"}
AUTH_STATUS = {
    "loggedIn": True,
    "authMethod": "claude.ai",
    "apiProvider": "firstParty",
    "subscriptionType": "max",
    "planTier": "max_20x",
}
LOGGED_OUT = {"loggedIn": False, "authMethod": "none", "apiProvider": "firstParty"}


def model_row(value, resolved, name, description):
    """A model as the answer to `initialize` lists it."""
    return {
        "value": value,
        "resolvedModel": resolved,
        "displayName": name,
        "description": description,
        "supportsEffort": True,
        "supportedEffortLevels": ["low", "medium", "high", "xhigh", "max"],
        "supportsAdaptiveThinking": True,
    }


# As 2.1.332 lists them for a Max login (2026-11-25), without some of the flags.
OPUS = "Opus 5.5 · Best for everyday, complex tasks"
FABLE = "Fable 5.2 · Most capable for your hardest and longest-running tasks"
SONNET = "Sonnet 5.5 · Efficient for routine tasks"
HAIKU = "Haiku 5.5 · Fastest for quick answers"
MODELS = [
    model_row("default", "claude-opus-5-5", "Default (recommended)", OPUS),
    model_row("opus", "claude-opus-5-5", "Opus", OPUS),
    model_row("fable", "claude-fable-5-2", "Fable", FABLE),
    model_row("sonnet", "claude-sonnet-5-5", "Sonnet", SONNET),
    model_row("haiku", "claude-haiku-5-5", "Haiku", HAIKU),
]


def offered_models():
    """Return MODELS, or what STAND_IN_MODELS names instead."""
    text = os.environ.get("STAND_IN_MODELS")
    if text is None:
        return MODELS
    known = {row["value"]: row for row in MODELS}
    rows = []
    for value in json.loads(text):
        row = known.get(value)
        if row is None:
            row = model_row(value, value, value, "")
        rows.append(row)
    return rows


class StandIn:
    """`claude -p` as the server drives it: JSON lines on stdin and stdout.

    `received` is what mock:show returns.
    """

    def __init__(self, argv):
        env = {k: v for k, v in os.environ.items() if k.startswith(SHOWN_VARIABLES)}
        self.received = {
            "argv": argv,
            "env": env,
            "cwd": os.getcwd(),
            "turns": [],
            "settings": [],
        }
        self.tools = []
        self.postponed = []  # lines that came while an answer was awaited
        self.in_halves = False  # mock:halves
        self.late_calls = None  # mock:late_call: the calls to send after the answer

    # Input and output

    def lines(self):
        """Yield the lines of stdin, first those that `mcp` put aside."""
        while True:
            if self.postponed:
                line = self.postponed.pop(0)
            else:
                line = sys.stdin.readline()
            if not line:
                return
            yield line

    def emit(self, line):
        """Print a line: a string as it is, anything else as JSON."""
        text = line if isinstance(line, str) else json.dumps(line)
        text += "\n"
        if not self.in_halves:
            self.write(text)
            return
        for half in (text[:40], text[40:]):
            self.write(half)
            time.sleep(0.005)

    def write(self, text):
        sys.stdout.write(text)
        sys.stdout.flush()

    def emit_result(
        self, text="", error=False, status=None, turns=1, reason="completed"
    ):
        line = {
            "type": "result",
            "subtype": "success",
            "is_error": error,
            "result": text,
            "api_error_status": status,
            "num_turns": turns,
            "terminal_reason": reason,
        }
        self.emit(line)

    # What the server sends

    def run(self):
        for raw in self.lines():
            line = json.loads(raw)
            kind = line["type"]
            if kind == "control_request":
                self.control(line)
            elif kind in ("user", "assistant"):
                self.turn(line)

    def control(self, line):
        request = line["request"]
        if request["subtype"] == "initialize":
            self.initialize(line)
        else:
            settings = request["settings"]
            self.received["settings"].append(settings)
            self.received["env"].update(settings.get("env", {}))

    def initialize(self, line):
        self.received["initialize"] = line["request"]
        if line["request"].get("sdkMcpServers"):
            params = {"protocolVersion": "2025-11-25", "capabilities": {}}
            self.mcp("initialize", params)
            self.mcp("notifications/initialized")
            self.tools = self.mcp("tools/list")["tools"]
            self.received["tools"] = self.tools
        answer = {"commands": [], "models": offered_models(), "account": ACCOUNT}
        response = {
            "subtype": "success",
            "request_id": line["request_id"],
            "response": answer,
        }
        self.emit({"type": "control_response", "response": response})

    def mcp(self, method, params=None):
        """Send an MCP message to the server and return the result.

        tools/call is not waited for: the server answers it with a later request.
        """
        message = {"jsonrpc": "2.0", "method": method, "params": params or {}}
        if not method.startswith("notifications/"):
            message["id"] = 1
        request = {"subtype": "mcp_message", "server_name": "c", "message": message}
        line = {"type": "control_request", "request_id": "r1", "request": request}
        self.emit(line)
        while method != "tools/call":
            raw = sys.stdin.readline()
            if '"mcp_response"' in raw:
                response = json.loads(raw)["response"]["response"]
                return response["mcp_response"]["result"]
            self.postponed.append(raw)
        return None

    def turn(self, line):
        """Take a turn of the conversation, and answer it if it asks for that."""
        message = line["message"]
        rest = {key: value for key, value in line.items() if key != "message"}
        self.received["turns"].append(message)
        self.received.setdefault("lines", []).append(rest)
        if line["type"] == "assistant":
            return
        if line.get("shouldQuery", True):
            self.answer(message)
            return
        if "mock:deaf" in json.dumps(message):
            time.sleep(60)
        self.emit_result(turns=0)

    # The answer

    def answer(self, message):
        text = said_text(message["content"])
        words = mock_words(text)
        if not words:
            pieces = [word + " " for word in f"You said: {text}".split()]
            words = {"json": json.dumps(pieces)}
        if "show" in words:
            words["json"] = json.dumps([json.dumps(self.received)])
        names = [tool["name"] for tool in self.tools if "dropped" not in str(tool)]
        self.emit({"type": "system", "subtype": "init", "tools": names})
        misbehave(self, words)
        if "late_call" in words:
            self.late_calls = []
        self.stream(words, names)
        if "plan" in words:
            time.sleep(0.005)  # the real one prints it up to 15 ms after message_delta
            self.emit(plan_event(words))
        for name in self.late_calls or []:
            self.mcp("tools/call", {"name": name})
        if "stop" in words:
            self.go_on(names)
        self.emit_result("done")

    def go_on(self, names):
        """Like the real CLI after most stop reasons: keep answering until killed."""
        while True:
            self.stream({"say": "AFTER"}, names)
            time.sleep(0.01)

    def stream(self, words, names):
        """Print an answer: its events, and an assistant line for each full block."""
        model = self.model()
        remaining = int(words.get("cut") or 0)  # deltas up to mock:cut
        block = {}
        has_text = False
        for event in events(words, names, f"claude-{model}-mock"):
            kind = event["type"]
            if kind == "content_block_start":
                block = dict(event["content_block"])
                has_text = False
            if kind == "content_block_delta" and event["delta"].get("text"):
                has_text = True
            if kind == "content_block_stop":
                self.finish_block(block, model, names)
            line = {"type": "stream_event", "event": event}
            line["parent_tool_use_id"] = None
            self.emit(line)
            if remaining and has_text and kind == "content_block_delta":
                remaining -= 1
                if not remaining:
                    self.answer_again(words)
                    return

    def model(self):
        """Return the model that the arguments or a later setting name."""
        argv = self.received["argv"]
        model = argv[argv.index("--model") + 1]
        for settings in self.received["settings"]:
            model = settings.get("model", model)
        return model

    def finish_block(self, block, model, names):
        """Print the assistant line of a block, and call its tool."""
        message = {"content": [block], "model": model, "stop_reason": None}
        self.emit({"type": "assistant", "message": message})
        if block["type"] != "tool_use" or block["name"] not in names:
            return
        if self.late_calls is None:
            self.mcp("tools/call", {"name": block["name"]})
        else:
            self.late_calls.append(block["name"])

    def answer_again(self, words):
        """The stream broke: repeat the answer, streamed or as one message."""
        words = dict(words)
        del words["cut"]
        if "whole" not in words:
            if "else" in words:
                words["say"] = words["else"]
            self.stream(words, [])
            return
        text = ""
        for event in events(words):
            if "delta" in event:
                text += event["delta"].get("text", "")
        message = {
            "model": "claude-mock-1",
            "usage": {"input_tokens": 10, "output_tokens": 5},
            "stop_reason": "end_turn",
            "content": [{"type": "text", "text": text}],
        }
        self.emit({"type": "assistant", "message": message})


def said_text(content):
    """Return the texts of a user message, then those of its tool results."""
    texts = [block.get("text", "") for block in content if block["type"] == "text"]
    text = " ".join(texts)
    for block in content:
        if block["type"] == "tool_result":
            result = block.get("content")
            if not isinstance(result, str):
                result = json.dumps(result)
            text += " " + result
    return text


# Faults of the stand-in CLI


def misbehave(cli, words):
    """Do what `words` ask for before the answer, or instead of it."""
    if "stubborn" in words:
        ignore_sigterm()
    if "child" in words:
        words["json"] = json.dumps([str(fork_child())])
    if "limit" in words:
        resets_at = time.time() + int(words["limit"])
        info = {"status": "rejected", "resetsAt": resets_at}
        cli.emit({"type": "rate_limit_event", "rate_limit_info": info})
    if "retry" in words:
        emit_retries(cli, words)
    if "status" in words or "category" in words:
        fail(cli, words)
    emit_noise(cli, words)
    if "exit" in words:
        sys.exit(int(words["exit"]))
    if "hang" in words:
        time.sleep(60)


def ignore_sigterm():
    import signal as signals  # not at the top, because it takes time to load

    signals.signal(signals.SIGTERM, signals.SIG_IGN)


def fork_child():
    """Start a child process that ignores SIGTERM, and return its pid."""
    pid = os.fork()
    if pid == 0:
        ignore_sigterm()
        time.sleep(60)
        os._exit(0)
    return pid


def emit_retries(cli, words):
    retry = {
        "type": "system",
        "subtype": "api_retry",
        "error": "rate_limit",
        "error_status": json.loads(words["retry"]),
        "retry_delay_ms": 7100,
    }
    for _ in range(int(words.get("retries", 0))):
        cli.emit(retry)
        time.sleep(0.1)
    cli.emit(retry)
    time.sleep(float(words.get("pause", 60)))


def fail(cli, words):
    """End as the real CLI does after an error of the API."""
    if "plan" in words:
        cli.emit(plan_event(words))
    category = words.get("category", "unknown")
    message = {"model": "<synthetic>", "content": [], "stop_reason": "stop_sequence"}
    cli.emit({"type": "assistant", "error": category, "message": message})
    cli.emit_result(
        "API Error: mock failure",
        error=True,
        status=json.loads(words.get("status", "null")),
        reason=words.get("reason"),
    )
    sys.exit(1)


def emit_noise(cli, words):
    """Print what is no part of the answer."""
    if "stderr" in words:
        sys.stderr.write("x" * int(words["stderr"]))
        sys.stderr.flush()
    if "line" in words:
        cli.emit({"type": "system", "subtype": "x", "pad": "x" * int(words["line"])})
    if "garbage" in words:
        cli.emit("plain words\n\xff\xfe")
        cli.emit('{"type": no json')
    if "bytes" in words:
        os.write(1, bytes.fromhex(words["bytes"]))
    cli.in_halves = "halves" in words
    if "shape" in words:
        cli.emit({"type": "stream_event", "event": {"type": "message_start"}})
    if "empty" in words:
        cli.emit_result("a command")


# Commands of the stand-in CLI


def stand_in(argv):
    """Run as `claude`."""
    if argv[0] == "--version":
        print_version()
    elif argv[0] == "auth":
        print_auth_status()
    else:
        stand_in_print(argv)


def print_version():
    time.sleep(float(os.environ.get("STAND_IN_VERSION_SECONDS", 0)))
    version = os.environ.get("STAND_IN_VERSION", "2.1.332")
    print(f"{version} (stand-in)")


def print_auth_status():
    """Print the login, and exit with code 1 if there is none."""
    time.sleep(float(os.environ.get("STAND_IN_AUTH_SECONDS", 0)))
    status = dict(AUTH_STATUS)
    if os.environ.get("STAND_IN_LOGIN", "yes") != "yes":
        status = dict(LOGGED_OUT)
    status.update(json.loads(os.environ.get("STAND_IN_AUTH", "{}")))
    print(json.dumps(status))
    if not status["loggedIn"]:
        sys.exit(1)


def stand_in_print(argv):
    """Run as `claude -p`."""
    log = os.environ.get("STAND_IN_LOG")
    if log:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
    if os.environ.get("STAND_IN_DIES") == "1":
        sys.exit(1)
    StandIn(argv).run()


if __name__ == "__main__" and sys.argv[1:2] in (["-p"], ["--version"], ["auth"]):
    stand_in(sys.argv[1:])
    sys.exit()


# The stand-in CLI ends here: the tests cut this file at the next line that imports, and
# compile what is above it as a program of its own, which starts faster.
import ast
import atexit
import collections
import concurrent.futures
import contextlib
import functools
import glob
import hashlib
import http.client
import http.server
import importlib.util
import io
import plistlib
import py_compile
import random
import re
import select
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import threading

# ── The small Messages API ─────────────────────────────────────────────────────────


def api_blocks(message):
    """Return the content of a message as blocks."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return content


def said_blocks(message):
    """Yield the text blocks of a message, also those inside tool results."""
    for block in api_blocks(message):
        if block["type"] == "text":
            yield block
        if block["type"] == "tool_result":
            yield from api_blocks({"content": block.get("content") or []})


def violations(body):
    """Yield a message for each thing to which the real API would answer 400."""
    messages = [m for m in body["messages"] if m["role"] != "system"]
    yield from thinking_violations(body)
    yield from tool_violations(body.get("tools") or [])
    blocks = [block for message in messages for block in api_blocks(message)]
    blocks += body.get("system") or []
    if sum("cache_control" in block for block in blocks) > 4:
        yield "A maximum of 4 blocks with cache_control may be provided."
    if not messages or messages[0]["role"] != "user":
        yield "messages: first message must use the user role"
    thinking = thinking_type(body) == "enabled"
    calls = []
    in_loop = False  # whether the last user message held tool results
    for number, message in enumerate(messages):
        for wrong in message_violations(message, calls):
            yield f"messages.{number}: {wrong}"
        blocks = api_blocks(message)
        calls = [block["id"] for block in blocks if block["type"] == "tool_use"]
        if message["role"] == "user":
            in_loop = has_results(message)
        if thinking and calls and is_last_loop(messages[number + 1 :]):
            kind = blocks[0]["type"]
            if "thinking" not in kind:
                yield f"messages.{number}: Expected `thinking`, but found `{kind}`"
    if (calls or in_loop) and not body.get("tools"):
        yield "Requests which include tool_use or tool_result blocks must define tools"


def thinking_type(body):
    return (body.get("thinking") or {}).get("type", "disabled")


def thinking_violations(body):
    thinking = thinking_type(body)
    choice = (body.get("tool_choice") or {}).get("type")
    if thinking != "disabled" and choice in ("any", "tool"):
        yield "Thinking may not be enabled when tool_choice forces tool use."
    if thinking == "enabled":
        budget = body["thinking"].get("budget_tokens", 0)
        if not 1024 <= budget < body["max_tokens"]:
            yield f"thinking.budget_tokens: {budget} of {body['max_tokens']}"


def tool_violations(tools):
    names = [tool["name"] for tool in tools]
    if len(set(names)) != len(names):
        yield "tools: Tool names must be unique."
    for tool in tools:
        schema = tool["input_schema"]
        if not re.fullmatch("[a-zA-Z0-9_-]{1,128}", tool["name"]):
            yield f"tools.name: {tool['name']}"
        if schema.get("type") != "object" or {"anyOf", "oneOf", "allOf"} & set(schema):
            yield f"tools.input_schema: {schema}"


def message_violations(message, calls):
    """`calls` are the ids of the tool calls in the message before this one."""
    blocks = api_blocks(message)
    results = [b["tool_use_id"] for b in blocks if b["type"] == "tool_result"]
    if sorted(results) != sorted(calls):
        yield f"tool_result {results} for tool_use {calls}"
    texts = [block["text"] for block in blocks if block["type"] == "text"]
    if not blocks or not all(text.strip() for text in texts):
        yield "text content blocks must be non-empty"
    for block in blocks:
        if block["type"] == "tool_use":
            if not re.fullmatch("[a-zA-Z0-9_-]+", block["id"]):
                yield f"tool_use.id {block['id']}"


def has_results(message):
    return any(block["type"] == "tool_result" for block in api_blocks(message))


def is_last_loop(later):
    """Return whether the user turns that follow a call are all tool results."""
    return all(has_results(message) for message in later if message["role"] == "user")


class PromptCache:
    """The API's prompt cache, counted in tokens of 4 characters.

    Entries are written at cache_control marks. A read takes the longest entry at a
    mark, or up to 20 blocks before one.
    """

    def __init__(self):
        self.entries = set()

    def account(self, body):
        """Return the prompt's tokens: not cached, read, and written."""
        start = repr([body["model"], body.get("tool_choice")])
        digest = hashlib.sha256(start.encode())
        prefixes = []  # for each block, the hash of all up to its end
        sizes = []  # and its tokens
        marks = []  # the places of the marked blocks
        size = 0
        for role, block in self.parts(body):
            if "cache_control" in block:
                marks.append(len(sizes))
            plain = {k: v for k, v in block.items() if k != "cache_control"}
            text = json.dumps([role, plain], sort_keys=True)
            size += max(1, len(text) // 4)
            digest.update(text.encode())
            prefixes.append(digest.hexdigest())
            sizes.append(size)
        read = 0
        written = 0
        for mark in marks:
            written = max(written, sizes[mark])
            for place in range(max(0, mark - 20), mark + 1):
                if prefixes[place] in self.entries:
                    read = max(read, sizes[place])
        self.entries.update(prefixes[mark] for mark in marks)
        return size - max(read, written), read, max(0, written - read)

    def parts(self, body):
        """Yield (role, block) in the order in which the API caches them."""
        for tool in body.get("tools") or []:
            yield "tool", tool
        for block in body.get("system") or []:
            yield "system", block
        for message in body["messages"]:
            for block in api_blocks(message):
                yield message["role"], block


class APIHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        """Log nothing."""

    def send_json(self, status, body, headers=None):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.send_json(200, {"data": []})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "messages" not in body or "count_tokens" in self.path:
            self.send_json(200, {"input_tokens": 7})
            return
        wrong = list(violations(body))
        words = {}
        try:
            words = mock_words(self.typed_text(body), EITHER)
        except ValueError as error:
            wrong.append(str(error))
        usage = self.server.cache.account(body)
        self.server.log.append({"body": body, "wrong": wrong, "usage": usage})
        if wrong:
            self.fail(400, str(wrong), words)
        elif "status" in words:
            self.fail(int(words["status"]), "mock failure", words)
        else:
            self.answer(body, words, usage)

    def typed_text(self, body):
        """Return the last user message without what the CLI adds to it."""
        users = [m for m in body["messages"] if m["role"] == "user"]
        if not users:
            return ""
        texts = [block.get("text", "") for block in said_blocks(users[-1])]
        return " ".join(t for t in texts if not t.startswith("<system-reminder>"))

    def fail(self, status, message, words):
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error")
        error = {"type": kind, "message": message}
        self.send_json(status, {"type": "error", "error": error}, plan_headers(words))

    def answer(self, body, words, usage):
        names = [tool["name"] for tool in body.get("tools") or []]
        answer = events(words, names, body["model"], usage)
        if "gap_ms" not in words:
            answer = list(answer)
        if body.get("stream"):
            with contextlib.suppress(OSError):  # the CLI was killed
                self.stream(answer, words)
            return
        answer = list(answer)
        text = ""
        for event in answer:
            if "delta" in event:
                text += event["delta"].get("text", "")
        message = {
            **answer[0]["message"],
            "stop_reason": answer[-2]["delta"]["stop_reason"],
            "content": [{"type": "text", "text": text}],
        }
        self.send_json(200, message, plan_headers(words))

    def stream(self, answer, words):
        remaining = int(words.get("cut") or 0)  # deltas up to mock:cut
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        for name, value in plan_headers(words).items():
            self.send_header(name, value)
        self.end_headers()
        for event in answer:
            data = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
            if remaining and event["type"] == "content_block_delta":
                remaining -= 1
                if not remaining:
                    self.close_connection = True
                    return
        self.wfile.write(b"0\r\n\r\n")


class MessagesAPI(http.server.ThreadingHTTPServer):
    """A strict Messages API on loopback, for the real CLI.

    `log` has an entry for each request: its body, what is wrong with it, and the
    prompt's tokens as PromptCache counts them.
    """

    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), APIHandler)
        self.log = []
        self.cache = PromptCache()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self.thread.start()

    def handle_error(self, request, client_address):
        """Print nothing: a CLI that was killed has broken its connection."""

    def close(self):
        self.shutdown()
        self.thread.join()
        self.server_close()

    def environment(self, home):
        """Return the variables that make a CLI use this API only."""
        return {
            "HOME": str(home),
            "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{self.server_port}",
            "CLAUDE_CODE_ASSUME_FIRST_PARTY_BASE_URL": "1",
            "CLAUDE_CODE_OAUTH_TOKEN": "sk-ant-oat01-mock",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_TELEMETRY": "1",
        }


# ── Help, and running the tests ────────────────────────────────────────────────────


def print_help():
    """Print how to run this file, the mock: words and the stand-in's variables."""
    usage = __doc__.partition("\n\n")[2].partition("\n\nThis file")[0]
    print("Usage:\n")
    print(usage)
    print("\nOptions of the benchmark:\n")
    for option, text in BENCH_OPTIONS.items():
        print(f"    {option:16} {text}")
    print(
        "\nWords for the last user message, as mock:WORD or mock:WORD=VALUE (no spaces)."
    )
    print(
        '"stand-in": only the stand-in CLI obeys it; "both": the Messages API, too.\n'
    )
    for word, (value, double, text) in MOCK_WORDS.items():
        example = f"{word}={value}" if value else word
        print(f"    {example:18} {double:9} {text}")
    print("\nEnvironment variables of the stand-in CLI:\n")
    for name, text in STAND_IN_VARIABLES.items():
        print(f"    {name:25} {text}")
    print("\nFor pytest's own options: python3 -m pytest --help")


def run_tests():
    """Use the installed pytest, or install one into a venv in the cache directory."""
    try:
        import pytest
    except ImportError:
        run_in_venv()
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", HERE]
    sys.exit(pytest.main([__file__, *options, *sys.argv[1:]]))


def run_in_venv():
    """Start this program again with the Python of a venv that has pytest."""
    import venv

    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = "venv-{}.{}".format(*sys.version_info)
    home = os.path.join(cache, "claude_max_proxy", name)
    python = os.path.join(home, "bin", "python")
    if not has_pytest(python):
        venv.create(home, with_pip=True, clear=True)
        subprocess.check_call([python, "-m", "pip", "-q", "install", "pytest"])
    os.execv(python, [python, *sys.argv])


def has_pytest(python):
    if not os.path.exists(python):
        return False
    argv = [python, "-c", "import pytest"]
    return subprocess.run(argv, stderr=subprocess.DEVNULL).returncode == 0


# ── A client ───────────────────────────────────────────────────────────────────────


def fold(chunks):
    """Return the choices that the chunks of a chat completion add up to."""
    choices = {}
    for chunk in chunks:
        for piece in chunk["choices"]:
            choice = choices.setdefault(piece["index"], {"message": {}})
            choice["index"] = piece["index"]
            choice["finish_reason"] = piece["finish_reason"]
            fold_delta(choice["message"], piece["delta"])
    return [choices[index] for index in sorted(choices)]


def fold_delta(message, delta):
    for key, value in delta.items():
        if key == "tool_calls":
            fold_calls(message.setdefault("tool_calls", []), value)
        else:
            message[key] = message.get(key, "") + value


def fold_calls(calls, deltas):
    for delta in deltas:
        if delta["index"] == len(calls):
            function = {**delta["function"], "arguments": ""}
            calls.append({**delta, "function": function})
        call = calls[delta["index"]]
        call["function"]["arguments"] += delta["function"]["arguments"]


# ── The benchmark ──────────────────────────────────────────────────────────────────
#
# It runs a real CLI, a Messages API on loopback that answers at once, and the server as
# a process of its own. So it measures what stands between a client and the API. It
# knows the server by its path only, and can compare two versions of it (--against).
# Everything is measured by turns, so that other load on the machine affects all alike.

BENCH_OPTIONS = {
    "--claude PATH": "the real CLI (default: `claude` on PATH)",
    "--against FILE": "compare with another claude_max_proxy.py, by turns",
    "--spares N": "passed on to the server",
}

RUNS = 5  # of each measurement; the median counts
PAUSE_SECONDS = 0.6  # before a request of "next turn", as a person would pause
START_SECONDS = 1.5  # more than a CLI needs to start
SPARES_SECONDS = 3  # more than a server needs to start its spare processes
BATCH_PAUSE_SECONDS = 0.3  # between the requests of a workload
WARM_REQUESTS = 3  # their median is what a workload is compared with

API_MS = 500  # a step of an agent or a chat: the API's time to the first token
GAP_MS = 20  # … and between two tokens
STEP_PAUSE_SECONDS = 0.05  # from an answer to the next step
STEP = f"mock:delay_ms={API_MS} mock:gap_ms={GAP_MS} mock:tokens=40"
STEPS = 3  # measured in each of two rounds

LOOK = {"name": "look", "description": "", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": LOOK}]

# The CLI without a server gets the flags and variables that the server gives it, so
# that the two differ in nothing else.
DIRECT_ARGUMENTS = [
    "-p",
    "--input-format",
    "stream-json",
    "--output-format",
    "stream-json",
    "--verbose",
    "--include-partial-messages",
    "--no-session-persistence",
    "--tools",
    "",
    "--strict-mcp-config",
    "--setting-sources",
    "",
    "--disable-slash-commands",
    "--allowedTools",
    "mcp__c",
    "--settings",
    '{"attribution":{"commit":"","pr":""},"includeCoAuthoredBy":false}',
    "--model",
    "sonnet",
]
DIRECT_VARIABLES = {
    "CLAUDE_CODE_DISABLE_ATTACHMENTS": "1",
    "CLAUDE_CODE_DISABLE_FILE_MENTIONS": "1",
    "CLAUDE_AGENT_SDK_MCP_NO_PREFIX": "1",
    "CLAUDE_AGENT_SDK_DISABLE_BUILTIN_AGENTS": "1",
    "ENABLE_TOOL_SEARCH": "false",
    "CLAUDE_CODE_MAX_RETRIES": "2",
    "CLAUDE_CODE_DISABLE_REFUSAL_RETRY": "1",
    "DISABLE_AUTO_COMPACT": "1",
    "ENABLE_PROMPT_CACHING_1H": "1",
    "CLAUDE_CODE_SKIP_MCP_DEBUG_LOG_FILES": "1",
    "DISABLE_AUTOUPDATER": "1",
}


class DirectCLI:
    """A CLI fed by hand: up before it is asked, and never started again."""

    def __init__(self, bench, with_tool=False):
        self.tools = []
        if with_tool:
            schema = LOOK["parameters"]
            self.tools = [{"name": "look", "description": "", "inputSchema": schema}]
        self.call = None  # the last tools/call
        self.process = subprocess.Popen(
            [bench.claude, *DIRECT_ARGUMENTS],
            env={**bench.environment, **DIRECT_VARIABLES},
            cwd=bench.home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        time.sleep(START_SECONDS)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.communicate()

    def write(self, *lines):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def read_until(self, wanted):
        """Read to the line that contains `wanted`; answer the CLI's MCP requests."""
        for raw in self.process.stdout:
            line = json.loads(raw)
            if line["type"] == "control_request":
                self.serve(line)
            if wanted in raw:
                return
        raise RuntimeError(f"the CLI ended before it printed {wanted}")

    def serve(self, line):
        """Answer an MCP request; remember a tool call, the next step answers it."""
        message = line["request"]["message"]
        if message["method"] == "tools/call":
            self.call = line
            return
        result = {
            "protocolVersion": message.get("params", {}).get("protocolVersion"),
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "c", "version": "1"},
            "tools": self.tools,
        }
        self.write(self.mcp_response(line, result))

    def mcp_response(self, line, result):
        message_id = line["request"]["message"].get("id", 0)
        reply = {"jsonrpc": "2.0", "id": message_id, "result": result}
        response = {
            "subtype": "success",
            "request_id": line["request_id"],
            "response": {"mcp_response": reply},
        }
        return {"type": "control_response", "response": response}

    def initialize_line(self, system):
        request = {"subtype": "initialize", "systemPrompt": [system]}
        if self.tools:
            request["sdkMcpServers"] = ["c"]
        return {"type": "control_request", "request_id": "1", "request": request}

    def query_line(self, text):
        content = [{"type": "text", "text": text}]
        return {
            "type": "user",
            "session_id": "",
            "parent_tool_use_id": None,
            "text_not_typed": True,
            "message": {"role": "user", "content": content},
        }

    def first_text(self, *lines):
        """Write these lines; return the seconds to the first text."""
        begun = time.perf_counter()
        self.write(*lines)
        self.read_until(b'"text_delta"')
        return time.perf_counter() - begun

    def steps(self):
        """Return the seconds of the steps of an agent or chat, less the API's."""
        self.write(self.initialize_line("agent"))
        text = STEP
        answered = b'"type":"result"'
        if self.tools:
            text += " mock:tool=look"
            answered = b'"tools/call"'
        seconds = []
        for number in range(1 + STEPS):
            line = self.query_line(text)
            if number > 0 and self.tools:
                content = [{"type": "text", "text": text}]
                line = self.mcp_response(self.call, {"content": content})
            seconds.append(self.first_text(line) - API_MS / 1000)
            self.read_until(answered)
            time.sleep(STEP_PAUSE_SECONDS)
        return seconds[1:]


class BenchServer:
    """A version of the server, started for some of the rows."""

    def __init__(self, bench, path):
        self.bench = bench
        self.path = path
        self.process = None
        self.port = None

    @contextlib.contextmanager
    def running(self, *arguments):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        argv = [sys.executable, self.path, "--port", str(self.port)]
        argv += ["--claude", self.bench.claude, *arguments]
        self.process = subprocess.Popen(
            argv, env=self.bench.environment, stderr=subprocess.DEVNULL
        )
        try:
            self.wait_until_up()
            yield self
        finally:
            self.process.terminate()
            self.process.wait()

    def wait_until_up(self):
        while self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                time.sleep(0.05)
        raise RuntimeError(f"{self.path} did not start")

    def ask(self, messages, **parameters):
        """Return the Answer to messages, or to one text."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        body = {"model": "sonnet", "messages": messages, "stream": True, **parameters}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.connect()
            begun = time.perf_counter()
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            return Answer(begun, connection.getresponse())

    def cpu_seconds(self):
        """Return the seconds of CPU that the server has used."""
        with contextlib.suppress(OSError):  # no /proc on macOS
            with open(f"/proc/{self.process.pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        minutes, _, seconds = self.ps("time").rpartition(":")
        return int(minutes or 0) * 60 + float(seconds)

    def ps(self, column):
        argv = ["ps", "-o", f"{column}=", "-p", str(self.process.pid)]
        return subprocess.check_output(argv, text=True).strip()


class Answer:
    """A streamed chat completion: the time of each text delta, and the message."""

    def __init__(self, begun, response):
        chunks = []
        self.text_times = []
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[len(b"data: ") :])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            chunks.append(chunk)
            if chunk["choices"][0]["delta"].get("content"):
                self.text_times.append(time.perf_counter())
        if not self.text_times:
            raise RuntimeError(f"no text in an answer with status {response.status}")
        self.message = fold(chunks)[0]["message"]
        self.first_text = self.text_times[0] - begun


class Conversation:
    """A chat, or an agent with a tool, that is asked the same text in each step."""

    def __init__(self, text, system=None, with_tool=False):
        self.text = text
        self.parameters = {}
        if with_tool:
            self.text += " mock:tool=look"
            self.parameters["tools"] = TOOLS
        self.messages = []
        if system:
            self.messages.append({"role": "system", "content": system})
        self.messages.append({"role": "user", "content": self.text})

    def step(self, ask):
        answer = ask(self.messages, **self.parameters)
        self.messages.append(answer.message)
        calls = answer.message.get("tool_calls", [])
        for call in calls:
            result = {"role": "tool", "tool_call_id": call["id"], "content": self.text}
            self.messages.append(result)
        if not calls:
            self.messages.append({"role": "user", "content": self.text})
        return answer


# Workloads. Each is a function that calls `ask(messages, **parameters)` for each of its
# requests. To add one, add a row to WORKLOADS.


def one_agent(ask):
    agent = Conversation("go on", "You are an agent.", with_tool=True)
    for _ in range(10):
        agent.step(ask)


def two_agents(ask):
    first = Conversation("go on", "You are an agent.", with_tool=True)
    second = Conversation("look again", "You are another.", with_tool=True)
    for _ in range(6):
        first.step(ask)
        second.step(ask)


def chat_with_titles(ask):
    chat = Conversation("Tell me more.", "You are a helpful assistant.")
    for number in range(6):
        chat.step(ask)
        system = {"role": "system", "content": "Write a title for this conversation."}
        user = {"role": "user", "content": f"Part {number} of the conversation."}
        ask([system, user], model="haiku")


def few_shot_prompts(ask):
    examples = [
        {"role": "system", "content": "Say whether a review is positive."},
        {"role": "user", "content": "I like it."},
        {"role": "assistant", "content": "positive"},
        {"role": "user", "content": "It broke at once."},
        {"role": "assistant", "content": "negative"},
    ]
    for number in range(12):
        ask([*examples, {"role": "user", "content": f"Review number {number}."}])


def tool_prompts(ask):
    system = {"role": "system", "content": "Use the tool if you must."}
    for number in range(12):
        question = {"role": "user", "content": f"Question number {number}."}
        ask([system, question], tools=TOOLS)


WORKLOADS = {
    "an agent's tool loop, 10 steps": one_agent,
    "two agents by turns, 6 steps each": two_agents,
    "a chat of 6 turns, a title after each": chat_with_titles,
    "12 few-shot prompts": few_shot_prompts,
    "12 prompts with a tool": tool_prompts,
}


class Bench:
    """Measures a CLI and one or two versions of the server; prints a table.

    `arguments` are passed on to the servers. What a method measures is in seconds.
    """

    def __init__(self, claude, paths, arguments):
        self.claude = claude
        self.arguments = arguments
        self.api = MessagesAPI()
        self.home = tempfile.mkdtemp()
        self.environment = self.api.environment(self.home)
        for name in ("PATH", "LANG", "TMPDIR"):
            if name in os.environ:
                self.environment[name] = os.environ[name]
        self.servers = [BenchServer(self, path) for path in paths]

    def close(self):
        self.api.close()
        shutil.rmtree(self.home, ignore_errors=True)

    @contextlib.contextmanager
    def all_running(self, *arguments):
        """All versions of the server, up at the same time."""
        with contextlib.ExitStack() as stack:
            for server in self.servers:
                stack.enter_context(server.running(*arguments))
            yield

    # Measuring

    def by_turns(self, measures, pause=0.0):
        """Call the CLI by hand and each of `measures` RUNS times, by turns.

        Returns their medians, first that of the CLI by hand.
        """
        measures = [self.direct, *measures]
        values = [[] for _ in measures]
        for _ in range(RUNS):
            for measure, measured in zip(measures, values):
                time.sleep(pause)
                measured.append(measure())
        return [statistics.median(measured) for measured in values]

    def of_servers(self, measure):
        """Return `measure` for each server, to be called without arguments."""
        return [functools.partial(measure, server) for server in self.servers]

    def bare(self):
        """`claude -p` as a user would run it."""
        argv = [self.claude, "-p", "hi", "--output-format", "stream-json", "--verbose"]
        argv += ["--include-partial-messages", "--model", "sonnet"]
        begun = time.perf_counter()
        with subprocess.Popen(
            argv,
            env=self.environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        ) as process:
            first = None
            for line in process.stdout:
                if first is None and b'"text_delta"' in line:
                    first = time.perf_counter()
        if first is None:
            raise RuntimeError("`claude -p` printed no text")
        return first - begun

    def direct(self):
        """A CLI that is already up and gets all it needs in one write."""
        with DirectCLI(self) as cli:
            system = f"system {time.time()}"
            return cli.first_text(cli.initialize_line(system), cli.query_line("hi"))

    def cold(self, server):
        """A request for which a CLI must be started."""
        return server.ask(f"cold {time.time()}").first_text

    def fresh(self, server):
        """The first request of a server that has been up for a while."""
        with server.running(*self.arguments):
            time.sleep(SPARES_SECONDS)
            return server.ask("first").first_text

    def next_turn(self, server):
        """Return a measure: one more turn of a conversation of 10."""
        history = []
        for number in range(10):
            history.append({"role": "user", "content": f"text {number}"})
            history.append({"role": "assistant", "content": f"answer {number}"})

        def measure():
            question = f"next {len(history)}"
            history.append({"role": "user", "content": question})
            answer = server.ask(history)
            history.append(answer.message)
            return answer.first_text

        measure()  # the first is a conversation that the server has not seen
        return measure

    def direct_steps(self, with_tool):
        with DirectCLI(self, with_tool) as cli:
            return cli.steps()

    def server_steps(self, with_tool, server):
        """Return the seconds of the steps of an agent or chat, less the API's."""
        conversation = Conversation(STEP, with_tool=with_tool)
        seconds = []
        for _ in range(2 + STEPS):
            answer = conversation.step(server.ask)
            seconds.append(answer.first_text - API_MS / 1000)
            time.sleep(STEP_PAUSE_SECONDS)
        return seconds[2:]

    def steps(self, with_tool):
        """Two rounds of steps by turns -> medians, as by_turns()."""
        direct = functools.partial(self.direct_steps, with_tool)
        servers = self.of_servers(functools.partial(self.server_steps, with_tool))
        measures = [direct, *servers]
        values = [[] for _ in measures]
        for _ in range(2):
            for measure, measured in zip(measures, values):
                measured.extend(measure())
        return [statistics.median(measured) for measured in values]

    def workload(self, server, workload):
        """Return the median of warm requests, and the seconds of each request.

        A warm one is a plain request to a server all of whose spare processes are up.
        """
        seconds = []

        def ask(messages, **parameters):
            time.sleep(BATCH_PAUSE_SECONDS)
            answer = server.ask(messages, **parameters)
            seconds.append(answer.first_text)
            return answer

        with server.running(*self.arguments):
            warm = []
            for number in range(WARM_REQUESTS):
                time.sleep(SPARES_SECONDS)
                warm.append(server.ask(f"warm {number}").first_text)
            time.sleep(SPARES_SECONDS)
            workload(ask)
        return statistics.median(warm), seconds

    def longest_gap(self, server):
        answer = server.ask(f"mock:gap_ms={GAP_MS} mock:tokens=100")
        times = answer.text_times
        return max(after - before for before, after in zip(times, times[1:]))

    def cpu_per_token(self, server):
        count = 20000
        before = server.cpu_seconds()
        server.ask(f"mock:tokens={count}")
        return (server.cpu_seconds() - before) / count

    def paid(self, server):
        """A conversation of 10 turns: tokens paid for, and the share from the cache."""
        self.api.log.clear()
        self.api.cache.entries.clear()
        history = [{"role": "system", "content": "system " * 285}]
        for number in range(10):
            history.append({"role": "user", "content": f"{number} " + "word " * 400})
            history.append(server.ask(history).message)
        paid = 0
        cached = 0
        for entry in self.api.log:
            uncached, read, written = entry["usage"]
            paid += uncached + written
            cached += read
        return paid, cached / (paid + cached)

    # Printing

    def run(self):
        self.print_versions()
        self.bare()  # the first reads the CLI from the disk
        bare = statistics.median(self.bare() for _ in range(RUNS))
        with self.all_running("--spares", "0"):
            for server in self.servers:
                server.ask("warm up")
            cold = self.by_turns(self.of_servers(self.cold))
        print(f"\n{'to the first text':44} {'':>10} {'/ bare':>8} {'/ by hand':>10}")
        self.print_row("bare `claude -p`", bare)
        self.print_row("a CLI already up, fed by hand", cold[0], bare)
        self.print_rows("server, cold", bare, cold)
        fresh = self.by_turns(self.of_servers(self.fresh))
        self.print_rows("first request of a fresh server", bare, fresh)
        with self.all_running(*self.arguments):
            for server in self.servers:
                server.ask("warm up")
            turns = [self.next_turn(server) for server in self.servers]
            turn = self.by_turns(turns, pause=PAUSE_SECONDS)
            self.print_rows("next turn of a conversation of 10", bare, turn)
            chat = self.steps(with_tool=False)
            self.print_rows("step of a chat, less the API's time", bare, chat)
            agent = self.steps(with_tool=True)
            self.print_rows("step of an agent with a tool, the same", bare, agent)
            self.print_costs()
        self.print_workloads()

    def print_versions(self):
        argv = [self.claude, "--version"]
        output = subprocess.check_output(argv, env=self.environment, text=True)
        python = sys.version.split()[0]
        date = time.strftime("%Y-%m-%d")
        print(f"Claude Code {output.split()[0]}, Python {python}, {date}")
        for server in self.servers:
            argv = [sys.executable, server.path, "--version"]
            version = subprocess.check_output(argv, text=True).strip()
            print(f"{self.label(server)}{version}, {server.path}")
        print(f"medians of {RUNS}, arguments {self.arguments}")

    def label(self, server):
        """Return the letter of a version, or nothing if there is only one."""
        if len(self.servers) == 1:
            return ""
        return "AB"[self.servers.index(server)] + ": "

    def print_row(self, name, seconds, *others):
        ratios = [f"{seconds / other:8.2f}" for other in others]
        print(f"{name:44} {seconds * 1000:7.0f} ms {'   '.join(ratios)}", flush=True)

    def print_rows(self, name, bare, medians):
        """Print a row for each server. The first median is that of the CLI by hand."""
        direct = medians[0]
        for server, seconds in zip(self.servers, medians[1:]):
            self.print_row(self.label(server) + name, seconds, bare, direct)

    def print_costs(self):
        print()
        for server in self.servers:
            gap = self.longest_gap(server) * 1000
            cpu = self.cpu_per_token(server) * 1000 * 1000
            memory = int(server.ps("rss")) / 1024
            paid, share = self.paid(server)
            print(
                f"{self.label(server)}longest gap between tokens {GAP_MS} ms apart "
                f"{gap:.0f} ms; server CPU per 1,000 tokens {cpu:.1f} ms; "
                f"RSS {memory:.1f} MB\n"
                f"{self.label(server)}10 turns of 2,000 characters: {paid} input tokens "
                f"paid for, {share:.0%} read from the cache",
                flush=True,
            )

    def print_workloads(self):
        """Each workload has a server of its own, and the warm requests before it."""
        print(f"\n{'to the first text, in ms':44} warm   median (/ warm)    worst")
        for name, workload in WORKLOADS.items():
            for server in self.servers:
                warm, seconds = self.workload(server, workload)
                row = f"{self.label(server) + name:44} {warm * 1000:4.0f}"
                for value in (statistics.median(seconds), max(seconds)):
                    row += f"   {value * 1000:6.0f} ({value / warm:4.1f})"
                print(row, flush=True)


def run_benchmark():
    import argparse

    parser = argparse.ArgumentParser(prog="test_claude_max_proxy.py")
    parser.add_argument("--bench", action="store_true")
    parser.add_argument("--claude", default="claude")
    parser.add_argument("--against")
    parser.add_argument("--spares")
    options = parser.parse_args()
    claude = shutil.which(options.claude)
    if claude is None:
        sys.exit(f"The benchmark needs a real `claude`; there is no {options.claude}.")
    paths = [os.path.join(HERE, "claude_max_proxy.py")]
    if options.against:
        paths.append(os.path.abspath(options.against))
    arguments = []
    if options.spares:
        arguments = ["--spares", options.spares]
    bench = Bench(os.path.abspath(claude), paths, arguments)
    try:
        bench.run()
    finally:
        bench.close()


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    if "-h" in sys.argv or "--help" in sys.argv:
        print_help()
    elif "--bench" in sys.argv:
        run_benchmark()
    else:
        run_tests()
    sys.exit()

import pytest

sys.path.insert(0, HERE)
import claude_max_proxy as proxy

# ── Helpers ──────────────────────────────────────────────────────────────────────
# The tests reach the server's internals through the helpers here and through the
# functions and tables of the module that they test. In the order of this block:
# waiting, HTTP responses, messages and tools, parsing, CLI lines and what is written
# for them, servers and their processes, the command, fixtures.

# In this process, and in the servers that server_process() starts.
SHORT_TIMES = {
    "POLL_SECONDS": 0.05,
    "TERMINATE_SECONDS": 0.3,
    "DRAIN_SECONDS": 0.1,
    "RATE_LIMIT_EVENT_SECONDS": 0.02,
    "NEW_SPARE_SECONDS": 0.0,
    "PROBE_SECONDS": 0.0,
}
REAL_LOG = proxy.log  # the fixture log_lines replaces it

# Waiting, sockets, threads.


def wait_until(condition, seconds=30.0):
    """Wait until `condition()` is true, and return its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.001)
    raise AssertionError(f"not within {seconds} s: {condition}")


def read_all(connection):
    """Read up to the end of a connection."""
    data = b""
    while True:
        piece = connection.recv(65536)
        if not piece:
            return data
        data += piece


def read_until(connection, pattern):
    """Read until the data matches a regular expression, and return the match."""
    data = b""
    while True:
        match = re.search(pattern, data)
        if match:
            return match
        piece = connection.recv(65536)
        if not piece:
            pytest.fail(f"the connection ended after {data}")
        data += piece


def run_in_threads(*functions):
    """Call each function in a thread of its own, and return their results in order."""
    with concurrent.futures.ThreadPoolExecutor(len(functions)) as executor:
        futures = [executor.submit(function) for function in functions]
        return [future.result() for future in futures]


def write_script(path, text):
    """Write an executable file, and return its path."""
    with open(path, "w") as file:
        file.write(text)
    os.chmod(path, 0o755)
    return str(path)


# Responses.


class Response:
    """An HTTP response; `chunks` are the events of a stream."""

    def __init__(self, status, headers, raw):
        self.status = status
        self.headers = headers
        self.raw = raw
        self.text = raw.decode()
        self.json = None
        self.chunks = []
        self.done = False
        if "event-stream" in headers.get("Content-Type", ""):
            self.read_events()
        elif raw:
            self.json = json.loads(raw)

    def read_events(self):
        for block in self.text.split("\n\n"):
            if not block:
                continue
            line = block.split("\n")[-1]
            assert line.startswith("data: "), self.text
            self.done = line == "data: [DONE]"
            if not self.done:
                self.chunks.append(json.loads(line[len("data: ") :]))

    @property
    def error(self):
        return (self.json or self.chunks[-1])["error"]

    @property
    def choices(self):
        return self.json["choices"] if self.json else fold(self.chunks)

    @property
    def deltas(self):
        """The delta of each chunk of a stream with one choice."""
        return [chunk["choices"][0]["delta"] for chunk in self.chunks]

    @property
    def message(self):
        return self.choices[0]["message"]

    @property
    def content(self):
        return self.message["content"]

    @property
    def finish_reason(self):
        return self.choices[0]["finish_reason"]

    @property
    def tool_calls(self):
        return self.message.get("tool_calls", [])

    @property
    def functions(self):
        """The name and the arguments of each tool call."""
        return [call["function"] for call in self.tool_calls]


def read_response(connection):
    """Read the response to the last request of an HTTPConnection."""
    response = connection.getresponse()
    return Response(response.status, response.headers, response.read())


# Messages, tools, and items of Responses requests.

CITY_SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
PARIS = '{"city":"Paris"}'


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def dialogue(*texts):
    """Messages of the user and the assistant by turns."""
    messages = []
    for index, text in enumerate(texts):
        messages.append(assistant(text) if index % 2 else user(text))
    return messages


def text_blocks(*texts):
    return [{"type": "text", "text": text} for text in texts]


def tool(name="get_weather", description="Weather of a city", parameters=None):
    """A tool of a chat completion request."""
    parameters = parameters or CITY_SCHEMA
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def tool_call(name="get_weather", arguments=PARIS, call_id="call_1"):
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def assistant_calls(*calls, content=None):
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def tool_message(content="sunny", call_id="call_1"):
    """The result of a tool call."""
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def tool_loop():
    """A question, a tool call and its result."""
    return [user("a"), assistant_calls(tool_call()), tool_message()]


PNG_DATA = "iVBORw0KGgo="


def data_url(media_type, data=PNG_DATA):
    return f"data:{media_type};base64,{data}"


def image_part(url):
    return {"type": "image_url", "image_url": {"url": url, "detail": "high"}}


def file_part(data, **fields):
    return {"type": "file", "file": {"file_data": data, **fields}}


INTEGER_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
}


def json_schema_format(schema=None):
    """A response_format."""
    schema = schema or INTEGER_SCHEMA
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def item(item_type, **fields):
    """An item of the input of a Responses request."""
    return {"type": item_type, **fields}


def function_tool(name="get_weather", **fields):
    """A tool of a Responses request."""
    return {"type": "function", "name": name, "parameters": CITY_SCHEMA, **fields}


def function_call_item(call_id="call_1", arguments=PARIS, name="get_weather", **fields):
    fields = {"name": name, "arguments": arguments, **fields}
    return item("function_call", call_id=call_id, **fields)


def call_output_item(
    call_id="call_1", output="sunny", item_type="function_call_output"
):
    return item(item_type, call_id=call_id, output=output)


NAMESPACE_TOOL = {
    "type": "namespace",
    "name": "mcp__w",
    "tools": [function_tool("look")],
}
CUSTOM_TOOL = {"type": "custom", "name": "patch", "format": {"type": "text"}}

# The same conversation as messages and as items. In the items, the last answer is a
# reference to ANSWER_ID.
IMAGE_URL = data_url("image/png")
ANSWER_ID = "msg_2"
CHAT_MESSAGES = [
    system("S"),
    user("a"),
    assistant_calls(
        tool_call(arguments="{}", call_id="i"),
        tool_call(arguments="{", call_id="k"),
        content="b",
    ),
    tool_message("r", "i"),
    tool_message(
        [*text_blocks("q"), {"type": "image_url", "image_url": {"url": IMAGE_URL}}], "k"
    ),
    user("c"),
    system("late"),
    assistant("d"),
    user("e"),
]
INPUT_ITEMS = [
    item("message", role="developer", content=[item("input_text", text="S")]),
    user("a"),
    item("reasoning", id="rs_1", summary=[], encrypted_content="x"),
    function_call_item("i", "{}"),
    item(
        "message",
        role="assistant",
        id="msg_1",
        status="completed",
        phase=None,
        content=[item("output_text", text="b", annotations=[])],
    ),
    function_call_item("k", "{"),
    call_output_item("i", "r"),
    call_output_item(
        "k", [item("input_text", text="q"), item("input_image", image_url=IMAGE_URL)]
    ),
    user("c"),
    system("late"),
    item("item_reference", id="rs_1"),
    item("item_reference", id=ANSWER_ID),
    user("e"),
]


# An answer that fails after its beginning was streamed, but not at once.
FAILS_IN_STREAM = "mock:cut=2 mock:gap_ms=200 mock:else=Other"


def mock_texts(*texts):
    """Words for the stand-in CLI: say these pieces of text."""
    return "mock:json=" + json.dumps(texts).replace(" ", "")


# JSON values as trees.


def paths_in(value, path=()):
    """The paths of all values in a JSON value, its own path () first."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths_in(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from paths_in(inner, (*path, index))


def value_at(value, path):
    for key in path:
        value = value[key]
    return value


def dotted_path(path, index="[%d]"):
    """A path as errors write it: messages[0].content."""
    text = ""
    for key in path:
        if isinstance(key, int):
            text += index.replace("%d", str(key))
        else:
            text += "." + key
    return text.lstrip(".")


def deep_copy(value):
    """A copy of a JSON value that shares nothing with it."""
    return json.loads(json.dumps(value))


# Parsing of requests.


class ParsedRequest:
    """What the server understood of a request."""

    def __init__(self, request):
        self.request = request

    def __eq__(self, other):
        return self.request == other.request

    def asks_the_same_as(self, other):
        """Whether the CLI gets the same for both, whatever the client gets."""
        mine = (self.request.prompt, self.request.decoding)
        return mine == (other.request.prompt, other.request.decoding)

    @property
    def system(self):
        return self.request.prompt.system

    @property
    def tools(self):
        """The tools as MCP lists them."""
        return self.request.prompt.tools

    @property
    def tool_names(self):
        return [tool["name"] for tool in self.tools]

    @property
    def client_names(self):
        """The client's name of each tool, by its name at the API."""
        return self.request.decoding.tool_names

    @property
    def call_fields(self):
        """What the item of a call has instead of the tool's name (Responses)."""
        return self.request.output.call_fields

    @property
    def turns(self):
        return self.request.prompt.turns

    @property
    def contents(self):
        return [turn["content"] for turn in self.turns]

    @property
    def blocks(self):
        return [block for content in self.contents for block in content]

    @property
    def tool_choice(self):
        return self.request.prompt.options.tool_choice

    @property
    def thinking(self):
        return self.request.prompt.options.thinking


def context(cache=None):
    """What parsing a request may refer to."""
    return proxy.Context(proxy.ModelCatalog(), cache or proxy.AnswerCache())


def parse_chat_body(body, cache=None):
    return ParsedRequest(proxy.parse_chat(body, context(cache)))


def parse_chat(messages="hi", cache=None, **parameters):
    if isinstance(messages, str):
        messages = [user(messages)]
    return parse_chat_body(
        {"model": "sonnet", "messages": messages, **parameters}, cache
    )


def parse_responses_body(body, cache=None):
    return ParsedRequest(proxy.parse_response(body, context(cache)))


def parse_responses(input_="hi", cache=None, **parameters):
    return parse_responses_body(
        {"model": "sonnet", "input": input_, **parameters}, cache
    )


def turns_of(*messages):
    """The role and the content of each turn that chat messages become."""
    turns = parse_chat(list(messages)).turns
    return [(turn["role"], turn["content"]) for turn in turns]


def error_of(parse, *arguments, **parameters):
    """The error body and the status of a request that is refused."""
    with pytest.raises(proxy.APIError) as caught:
        parse(*arguments, **parameters)
    return {"status": caught.value.status, **caught.value.to_json()}


def bad_parameter(parse, *arguments, **parameters):
    """The parameter that the 400 for a request names."""
    error = error_of(parse, *arguments, **parameters)
    assert error["status"] == 400
    return error["param"]


def parse_arguments_of_call(arguments):
    """The input of a tool call at the API, for what the client calls arguments."""
    return proxy.parse_arguments(proxy.JsonValue(arguments))


def cache_with_text(item_id, text):
    """The server's cache of an answer with this text, for an item_reference."""
    cache = proxy.AnswerCache()
    cache.add_item_text(item_id, text)
    return cache


def remembered_answer(blocks, model="claude-haiku-4-5"):
    """The server's cache of an answer with the tool call call_1."""
    cache = proxy.AnswerCache()
    answer = proxy.SignedAnswer(model, "signer", blocks)
    cache.add_signed_answer(["call_1"], answer)
    return cache


def lines_for_cli(parsed, version=(2, 1, 112)):
    """All lines that the CLI gets for a request."""
    prompt = parsed.request.prompt
    state = proxy.state_before_query(prompt, version)
    lines = [state.initialize.line(), *state.turns]
    lines += proxy.query_lines(prompt, version)
    return [json.loads(line.text) for line in lines]


# What a CLI prints, and what the server makes of it, without a process.


class InProcessCLI(StandIn):
    """The stand-in CLI within this process; `printed` holds its lines."""

    def __init__(self, tools):
        super().__init__(["--model", "sonnet"])
        self.tools = [{"name": name} for name in tools]
        self.printed = []

    def emit(self, line):
        self.printed.append(line)

    def go_on(self, names):
        self.stream({"say": "AFTER"}, names)


def cli_lines(words, tools=()):
    """All lines that the CLI prints for a text of mock: words."""
    cli = InProcessCLI(tools)
    with contextlib.suppress(SystemExit):
        cli.answer(user(text_blocks(words)))
    return cli.printed


def answer_lines(words, tools=()):
    """The lines of the answer, without the init line before and the result behind."""
    return cli_lines(words, tools)[1:-1]


def event_line(event_type, **fields):
    """A line with an event of the Messages API."""
    return {"type": "stream_event", "event": {"type": event_type, **fields}}


def message_start(**fields):
    return event_line("message_start", message={"model": "m", "usage": {}, **fields})


class Conversion:
    """From CLI lines to the response: the decoders of the answers, and the writer."""

    def __init__(self, parsed, writer_class):
        request = parsed.request
        answers = [proxy.Answer() for _ in range(request.output.choices)]
        now = time.time()
        self.answers = answers
        self.decoders = [proxy.AnswerDecoder(request, one, now) for one in answers]
        self.writer = writer_class(request, answers, "0", lambda: 0)

    def write(self, lines, index=0):
        """Give CLI lines to an answer; return the events that the client gets."""
        sent = ""
        for line in lines:
            for event in self.decoders[index].decode(line):
                sent += self.writer.write(index, event)
        return sent

    def fail(self, status, message, code):
        """The events of a response that fails."""
        return self.writer.error(proxy.APIError(status, message, code))


def chat_conversion(parsed):
    return Conversion(parsed, proxy.ChatWriter)


def responses_conversion(parsed):
    return Conversion(parsed, proxy.ResponseWriter)


def decoded_text(*lines, **parameters):
    """All text and arguments that a client gets for lines of a CLI."""
    conversion = chat_conversion(parse_chat(**parameters))
    text = ""
    for line in lines:
        for event in conversion.decoders[0].decode(line):
            if isinstance(event, proxy.ToolCallDelta):
                text += event.arguments
            else:
                text += getattr(event, "text", "")
    return text


def ids_and_functions(response):
    """The tool calls of a response, without the index that only a stream has."""
    return [(call["id"], call["function"]) for call in response.tool_calls]


def answer_of(lines, parsed):
    """The completion for lines of a CLI; its stream must add up to the same."""
    conversion = chat_conversion(parsed)
    events = conversion.write(lines) + conversion.writer.end()
    headers = {"Content-Type": "text/event-stream"}
    stream = Response(200, headers, events.encode())
    whole = Response(200, {}, json.dumps(conversion.writer.body()).encode())
    assert stream.done
    assert (stream.content or None) == (whole.content or None)
    assert ids_and_functions(stream) == ids_and_functions(whole)
    thoughts = whole.message.get("reasoning_content")
    assert stream.message.get("reasoning_content") == thoughts
    assert stream.finish_reason == whole.finish_reason
    return stream, whole


def chat_stream(words, **parameters):
    """The stream of a chat completion for mock: words."""
    parsed = parse_chat(stream=True, **parameters)
    return answer_of(cli_lines(words, parsed.tool_names), parsed)[0]


def chat_answer(words, **parameters):
    """The chat completion for mock: words."""
    parsed = parse_chat(stream=True, **parameters)
    return answer_of(cli_lines(words, parsed.tool_names), parsed)[1]


def chat_failure(words, **parameters):
    """The APIError that is raised for mock: words."""
    with pytest.raises(proxy.APIError) as caught:
        chat_answer(words, **parameters)
    return caught.value


def responses_stream(words, **parameters):
    """The events for mock: words at /v1/responses, and the response itself."""
    conversion = responses_conversion(parse_responses(**parameters))
    events = conversion.write(answer_lines(words)) + conversion.writer.end()
    return events, conversion.writer.body()


def decode_bytes(raw_lines, conversion):
    """Decode lines as bytes, check what is written for them, and return a status."""
    try:
        for raw_line in raw_lines:
            line = proxy.parse_cli_line(raw_line)
            if line is not None:
                check_chunks(conversion.write([line]))
        if all(answer.finish_reason for answer in conversion.answers):
            json.dumps(conversion.writer.body(), allow_nan=False)
        return 200
    except proxy.APIError as error:
        return error.status


def check_chunks(text):
    """Chunks hold one choice, and their texts are strings."""
    for event in text.split("\n\n"):
        if not event:
            continue
        (choice,) = json.loads(event[len("data: ") :])["choices"]
        for channel in ("content", "reasoning_content"):
            assert isinstance(choice["delta"].get(channel, ""), str)


# The stand-in CLI as a program.

CLI_VERSION = "2.1.332"


def install_stand_in():
    """Install this file as `claude`, and return its path.

    It is compiled and runs without `site`, because each answer of a server starts it.
    The script answers --version itself, for the same reason.
    """
    directory = tempfile.mkdtemp(prefix="stand-in-")
    atexit.register(shutil.rmtree, directory)
    compiled = os.path.join(directory, "stand_in.pyc")
    py_compile.compile(__file__, cfile=compiled)
    script = f"""#!/bin/sh
[ "$1" = --version ] && exec echo "${{STAND_IN_VERSION:-{CLI_VERSION}}} (stand-in)"
exec {sys.executable} -S -E {compiled} "$@"
"""
    return write_script(os.path.join(directory, "claude"), script)


STAND_IN = install_stand_in()


# Servers and their processes.

POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
# A request that ends its connection.
LAST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

# What a spare has been sent: whether system prompt and tools, and how many turns.
BLANK = (False, 0)


def prepared(turns):
    return (True, turns)


class LocalServer:
    """A server in this process, on a port of its own."""

    def __init__(self, **settings):
        settings = {"port": 0, "claude": STAND_IN, "spares": 0, **settings}
        self.server = proxy.Server(proxy.Settings(**settings))
        self.port = self.server.server_port
        self.service = self.server.service
        self.pool = self.service.pool
        self.ticks = 0
        self.count_ticks()
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()

    def count_ticks(self):
        tick = self.pool.tick

        def counted_tick():
            tick()
            self.ticks += 1

        self.pool.tick = counted_tick

    def announce(self):
        """Print the banner, and start the spares."""
        proxy.announce(self.server)

    def close(self):
        if self.service.is_stopping:
            return
        self.service.is_stopping = True
        self.wake()
        self.thread.join()
        self.server.drain()

    # Requests.

    def request(self, method, path, body=None, headers=None, timeout=30):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            return read_response(connection)

    def post(self, body, path="/v1/chat/completions", headers=None):
        raw = body if isinstance(body, (bytes, str)) else json.dumps(body)
        headers = {"Content-Type": "application/json", **(headers or {})}
        return self.request("POST", path, raw, headers)

    def chat(self, messages="hi", model="sonnet", **parameters):
        if isinstance(messages, str):
            messages = [user(messages)]
        return self.post({"model": model, "messages": messages, **parameters})

    def respond(self, input_="hi", **parameters):
        body = {"model": "sonnet", "input": input_, **parameters}
        return self.post(body, "/v1/responses")

    def health(self):
        return self.request("GET", "/health").json

    def received(self, messages, **parameters):
        """What the stand-in CLI received for these messages and a last one."""
        if isinstance(messages, str):
            messages = [user(messages)]
        last = user(text_blocks("mock:show"))
        response = self.chat([*messages, last], **parameters)
        assert response.status == 200, response.text
        return json.loads(response.content)

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def send_raw(self, data):
        """Send bytes and no more, and return all that comes back."""
        with self.connect() as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return read_all(connection)

    # State.

    def active(self):
        """The number of processes that answer."""
        return self.service.queue.counts()[0]

    def waiting(self):
        """The number of requests in the queue."""
        return self.service.queue.counts()[1]

    def is_busy(self):
        """Whether a request is not answered yet."""
        return self.server.is_busy()

    def answering(self):
        """The processes that answer."""
        return list(self.pool.live)

    def has_processes(self):
        """Whether a process answers, or has been stopped and not been reaped."""
        return self.pool.counts()[1] > 0

    def is_idle(self):
        """Whether all requests are answered and their processes reaped."""
        self.wake()
        return not (self.is_busy() or self.active() or self.has_processes())

    def remembered(self):
        """The number of answers that the server remembers."""
        return len(self.service.cache.entries)

    def limit_memory(self, size):
        """Let it remember so many bytes of answers."""
        self.service.cache.max_bytes = size

    def memory_size(self):
        return self.service.cache.size

    def record_plan(self, **info):
        """Have the server believe that the CLI reported these limits."""
        self.service.plan.record(info, time.time())

    def knows_models(self):
        """Whether the CLI has been asked which models there are."""
        self.wake()
        return self.service.models.are_known()

    def use_models(self, *models):
        """Have the server believe that the CLI offers these models."""
        self.service.models.catalog = proxy.ModelCatalog(models)

    def may_ask_for_models(self):
        """Pretend that the pause between two questions is over."""
        self.service.models.next_query = 0.0

    # The process pool.

    def wake(self):
        """Have the main thread look after the processes now."""
        self.pool.wake()

    def tick(self):
        """Look after the processes, for a server whose main thread has ended."""
        self.pool.tick()

    def settle(self):
        """Wait until the spares are as the pool wants them between requests."""
        wait_until(self.is_idle)
        for _ in range(2):  # a tick may have begun before
            self.wait_for_tick()
        wait_until(lambda: self.is_idle() and self.is_settled())

    def wait_for_tick(self):
        count = self.ticks

        def has_ticked():
            self.wake()
            return self.ticks > count

        wait_until(has_ticked)

    def is_settled(self):
        if self.pool.requested or self.pool.refill_is_due:
            return False
        return all(has_sent_all(process) for process in self.spares())

    def spares(self):
        """The spare processes, the one used least recently first."""
        return list(self.pool.spares.processes)

    def spare_pids(self):
        return {process.process.pid for process in self.spares()}

    def spare_states(self):
        """What each spare has been sent, the most first."""
        self.settle()
        states = []
        for process in self.spares():
            is_initialized = process.sent.initialize is not None
            states.append((is_initialized, len(process.sent.turns)))
        return sorted(states, reverse=True)

    def uses_spare(self, ask):
        """Call `ask()`; return its result, and whether a spare has answered."""
        self.settle()
        before = self.spare_pids()
        response = ask()
        assert response.status == 200, response.text
        self.settle()
        return response, not before <= self.spare_pids()

    def chat_with_spare(self, messages, **parameters):
        """A chat request; its response, and whether a spare has answered."""
        return self.uses_spare(lambda: self.chat(messages, **parameters))

    def take_spare(self):
        """Take a spare that fits a new conversation with the model sonnet, if any."""
        binary = self.service.installation.find_binary()
        return self.pool.take(binary, proxy.SentState("sonnet"))

    def retire(self, process):
        self.pool.retire(process, signal.SIGTERM)

    def drop_spares(self):
        self.pool.retire_spares()

    def cli_directory(self):
        """The directory that holds the directories of all processes."""
        return self.pool.directory.ensure()

    def share_cli_directory(self, other):
        """Use the directory of another server, which removes it."""
        self.pool.directory = other.pool.directory

    def leave_cli_directory(self):
        self.pool.directory = proxy.ServerDirectory()

    def replace_cli(self):
        """Have the server believe that the CLI's file was replaced."""
        installation = self.service.installation
        binary = installation.binary
        installation.binary = proxy.CliBinary(binary.path, binary.version, (0,))
        self.wake()

    def pretend_no_request_for(self, seconds):
        self.pool.last_request_at -= seconds


def has_sent_all(process):
    """Whether a process has been sent all lines, and has taken in its turns."""
    return not (process.unsent or process.write_buffer or process.awaits_result)


def pid_of(process):
    return process.process.pid


def is_running(process):
    return process.process.poll() is None


def turns_sent_to(process):
    """The turns that a process has been sent before its query, as messages."""
    return [json.loads(line.text)["message"] for line in process.sent.turns]


def texts_sent_to(process):
    """The first text of each of these turns."""
    return [turn["content"][0]["text"] for turn in turns_sent_to(process)]


def start_cli_process(path, directory):
    """Start a CLI without a server around it."""
    os.mkdir(os.path.join(directory, proxy.CLI_WORKDIR))
    binary = proxy.CliBinary(path, (2, 1, 332), ())
    return proxy.CliProcess(binary, "x", str(directory))


def send_system_prompt(process, text):
    process.send(proxy.SentState("x", proxy.initialize_options(text, [])))


def acquires_behind(waiting):
    """Whether a request in a queue behind `waiting` others gets a place at once."""
    queue = proxy.RequestQueue(1)
    tickets = [queue.join(1) for _ in range(waiting + 1)]
    return queue.try_acquire(tickets[-1], 1)


def send_chat(connection, text, stream, before=(), model="opus"):
    """Send a chat request on an open connection, and do not read the response."""
    messages = [*before, user(text)]
    body = json.dumps({"model": model, "stream": stream, "messages": messages})
    length = b"Content-Length: %d\r\n\r\n" % len(body)
    connection.sendall(POST + length + body.encode())


def open_request(port, text, stream, before=(), model="opus"):
    """Send a chat request on a new connection, and return the connection."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    send_chat(connection, text, stream, before, model)
    return connection


def health_of(port):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    with contextlib.closing(connection):
        connection.request("GET", "/health")
        return read_response(connection).json


def list_processes():
    """(pid, parent's pid, command) of each process."""
    argv = ["ps", "-A", "-o", "pid=,ppid=,args="]
    output = subprocess.run(argv, capture_output=True, text=True).stdout
    for line in output.splitlines():
        pid, parent, command = line.split(None, 2)
        if "ps -A" not in command:
            yield int(pid), int(parent), command


def child_processes(parent):
    """The pids of the child processes of a process."""
    return [pid for pid, ppid, _ in list_processes() if ppid == parent]


def has_exited(pid):
    """Whether no such process runs. (A zombie of another process counts as gone.)"""
    if not os.path.exists("/proc/self/stat"):
        argv = ["ps", "-o", "stat=", "-p", str(pid)]
        output = subprocess.run(argv, capture_output=True, text=True).stdout
        return output.strip()[:1] in ("", "Z")
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def read_child_pid(connection):
    """Read the pid that an answer to mock:child tells."""
    return int(read_until(connection, rb'content": "(\d+)"')[1])


# The command.


def run_command(*arguments, **env):
    """Run the script, and return the CompletedProcess."""
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **env}
    argv = [sys.executable, proxy.__file__, *arguments]
    return subprocess.run(argv, capture_output=True, text=True, env=env, timeout=30)


def can_connect(port):
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def server_process(*arguments, redirection=""):
    """The server as a process of its own; yields the process and its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = f"import claude_max_proxy as p; vars(p).update({SHORT_TIMES}); p.main()"
    argv = [sys.executable, "-c", code, "--port", str(port), "--claude", STAND_IN]
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh"]
    process = subprocess.Popen(
        [*shell, *argv, *arguments], stderr=subprocess.PIPE, cwd=HERE
    )
    try:
        wait_until(lambda: can_connect(port))
        yield process, port
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def parse_arguments_exit(capsys, *arguments):
    """Arguments that end the program: its exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as caught:
        proxy.parse_options(list(arguments))
    return (caught.value.code, *capsys.readouterr())


def run_check(capsys, **settings):
    """The exit code of --check, and what it prints."""
    settings = {"port": 0, "claude": STAND_IN, **settings}
    code = proxy.run_checks(proxy.Settings(**settings))
    return code, capsys.readouterr().out


def read_document(name):
    path = os.path.join(HERE, name)
    if not os.path.exists(path):
        pytest.skip(f"{name} was not copied")
    with open(path, encoding="utf-8") as document:
        return document.read()


# Fixtures.


def has_child_processes():
    """Whether this process has any child, be it a zombie."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


@pytest.fixture(autouse=True, scope="module")
def short_times():
    """Short waits of the server, for fast tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name, seconds in SHORT_TIMES.items():
            patch.setattr(proxy, name, seconds)
        yield


@pytest.fixture(autouse=True, scope="module")
def nothing_left_at_the_end(short_times, tmp_path_factory):
    """No more child process, thread or temporary directory than before the tests."""
    before = set(threading.enumerate())
    directory = tmp_path_factory.mktemp("tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(directory))
        patch.setenv("TMPDIR", str(directory))
        yield
    wait_until(lambda: set(threading.enumerate()) <= before)
    assert not child_processes(os.getpid())
    assert not list(directory.glob("claude-max-*"))


@pytest.fixture(autouse=True)
def no_process_left():
    """No child process after each test, where waitid() can tell."""
    yield
    if hasattr(os, "waitid"):
        wait_until(lambda: not has_child_processes())


@pytest.fixture(autouse=True)
def log_lines(monkeypatch):
    """The lines that are logged during a test."""
    lines = []
    monkeypatch.setattr(proxy, "log", lines.append)
    return lines


@pytest.fixture(scope="module")
def shared_server(nothing_left_at_the_end):
    running = LocalServer()
    yield running
    running.close()


@pytest.fixture
def server(shared_server):
    """A server without spares that many tests share."""
    yield shared_server
    wait_until(shared_server.is_idle)


@pytest.fixture
def start_server():
    """A function that starts servers with settings of their own."""
    running = []

    def start(**settings):
        running.append(LocalServer(**settings))
        return running[-1]

    yield start
    for one in running:
        one.close()


@pytest.fixture
def spare_server(start_server):
    """A server with up to two spares."""
    return start_server(spares=2)


@pytest.fixture
def eager_server(server, monkeypatch):
    """A server that keeps a stream alive after 20 ms of silence."""
    monkeypatch.setattr(proxy, "KEEPALIVE_SECONDS", 0.02)
    monkeypatch.setattr(proxy, "POLL_SECONDS", 0.02)
    return server


# ── Errors and settings ──────────────────────────────────────────────────────────


def test_log_escapes_control_characters(capsys):
    REAL_LOG("405 \x1b[31mGET\x07 /x \x85\n\ttotal=0.1")
    line = capsys.readouterr().err
    assert line.endswith(" 405 ?[31mGET? /x total=0.1\n")
    assert line.count("\n") == 1


def test_settings_from_environment(monkeypatch):
    monkeypatch.setenv("CLAUDE_MAX_PROXY_PORT", "1234")
    monkeypatch.setenv("CLAUDE_MAX_PROXY_VERBOSE", "1")
    settings = proxy.parse_options([])[0]
    assert settings == proxy.Settings(port=1234, verbose=True)
    assert proxy.parse_options(["--port", "99"])[0].port == 99


@pytest.mark.parametrize(
    "arguments, env, message",
    [
        (["--port", "x"], {}, "--port"),
        (["--port", "70000"], {}, "--port"),
        (["--timeout", "-1"], {}, "--timeout"),
        (["--nonsense"], {}, "--nonsense"),
        (["--host", "0.0.0.0"], {}, "--api-key"),
        ([], {"CLAUDE_MAX_PROXY_PORT": "many"}, "CLAUDE_MAX_PROXY_PORT"),
    ],
)
def test_settings_invalid(arguments, env, message, capsys, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    code, out, error = parse_arguments_exit(capsys, *arguments)
    assert code == 2
    assert message in error
    assert len(error.splitlines()) == 1
    assert not out


def test_version_includes_hash_of_file(capsys):
    out = parse_arguments_exit(capsys, "--version")[1]
    assert re.fullmatch(r"claude_max_proxy \d+\.\d+\.\d+ \([0-9a-f]{12}\)\n", out)


@pytest.mark.parametrize("word", ["no", "off", "0", "false", "NO", "False", " off "])
def test_settings_verbose_off(monkeypatch, word):
    monkeypatch.setenv("CLAUDE_MAX_PROXY_VERBOSE", word)
    assert proxy.parse_options([])[0].verbose is False
    assert proxy.parse_options(["--verbose"])[0].verbose is True


@pytest.mark.parametrize("word", ["yes", "on", "1", "true", "TRUE", "On"])
def test_settings_verbose_on(monkeypatch, word):
    monkeypatch.setenv("CLAUDE_MAX_PROXY_VERBOSE", word)
    assert proxy.parse_options([])[0].verbose is True


@pytest.mark.parametrize("word", ["maybe", "2", "-1"])
def test_settings_verbose_unknown(monkeypatch, capsys, word):
    monkeypatch.setenv("CLAUDE_MAX_PROXY_VERBOSE", word)
    code, _, error = parse_arguments_exit(capsys)
    assert code == 2
    assert "CLAUDE_MAX_PROXY_VERBOSE" in error


@pytest.mark.parametrize("percent", ["-1", "101", "nan", "all", ""])
def test_settings_plan_limit_invalid(capsys, percent):
    code, _, error = parse_arguments_exit(capsys, "--plan-limit", percent)
    assert code == 2
    assert "--plan-limit" in error


@pytest.mark.parametrize("percent", ["0", "80", "99.5", "100"])
def test_settings_plan_limit(monkeypatch, percent):
    monkeypatch.setenv("CLAUDE_MAX_PROXY_PLAN_LIMIT", percent)
    assert proxy.parse_options([])[0].plan_limit == float(percent)


def test_settings_allow_host_requires_a_key(capsys):
    code, _, error = parse_arguments_exit(capsys, "--allow-host", "box.tail1.ts.net")
    assert code == 2
    assert "--api-key" in error
    arguments = ["--allow-host", "box.tail1.ts.net", "--api-key", "k"]
    assert proxy.parse_options(arguments)[0].allow_host == "box.tail1.ts.net"


# ── JSON values ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "body",
    [
        "[]",
        "5",
        '"x"',
        "null",
        "{",
        "",
        "{'a':1}",
        '{"a":NaN}',
        "[" * 100000,
        '{"a":"\xff"}'.encode("latin-1"),
    ],
)
def test_json_invalid_body(server, body):
    response = server.post(body)
    assert response.status == 400
    assert response.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "member, status",
    [
        ('"user":"u"', 200),
        ('"temperature":1e999', 400),
        ('"max_tokens":' + "9" * 400, 400),
        ('"max_tokens":' + "9" * 9999, 400),
        ('"seed":' + "9" * 300, 200),
        ('"seed":' + "9" * 400, 400),
        ('"metadata":' + "[" * 10000 + "]" * 10000, 400),
    ],
    ids=["plain", "infinite", "large", "huge", "ignored", "ignored and large", "deep"],
)
def test_json_odd_values(server, member, status):
    body = '{"model":"sonnet","messages":[{"role":"user","content":"x"}],%s}'
    assert server.post(body % member).status == status


def test_json_last_of_equal_names_counts(server):
    body = '{"model":"x","model":"sonnet","messages":[{"role":"user","content":"x"}]}'
    assert server.post(body).status == 200


def test_json_lone_surrogate_is_replaced(server):
    body = '{"model":"opus","messages":[{"role":"user","content":%s}]}'
    response = server.post(body % r'"a\ud800b"')
    assert response.content == "You said: a\ufffdb "
    response = server.post(body % r'"a\ud800b \ud83d\ude00"')
    assert response.content == "You said: a\ufffdb 😀 "


# ── Tool schemas ─────────────────────────────────────────────────────────────────

ODD_PROPERTIES = ["$filter", "@type", "ids[]", "a b", "名前", "x" * 65, "plain"]
ODD_SCHEMA = {
    "properties": dict.fromkeys(ODD_PROPERTIES, {}),
    "required": ["a b"],
}


def tool_schema(schema):
    return proxy.to_tool_schema(proxy.JsonValue(schema, "x"))


def property_schema(schema):
    """What becomes of the schema of a property."""
    return tool_schema({"properties": {"p": schema}}).json["properties"]["p"]


@pytest.mark.parametrize(
    "schema",
    [
        None,
        {},
        {"type": None},
        {"type": "OBJECT"},
        {"type": ["object", "null"]},
        {"type": "object", "$schema": "http://json-schema.org/draft-07/schema#"},
    ],
)
def test_tool_schema_of_an_object(schema):
    assert tool_schema(schema) == ({"type": "object"}, False)


def test_tool_schema_leaves_the_request_alone():
    schema = {
        "$id": "a",
        "anyOf": [{"$ref": "#"}],
        "properties": {"a b": {"type": "X"}},
    }
    before = json.dumps(schema)
    assert tool_schema(schema).is_wrapped
    assert json.dumps(schema) == before


@pytest.mark.parametrize(
    "schema, code",
    [
        ({"type": "string"}, "invalid_schema"),
        ({"type": ["string", "null"]}, "invalid_schema"),
        ("object", "invalid_type"),
        (True, "invalid_type"),
        ([], "invalid_type"),
    ],
)
def test_tool_schema_that_describes_no_object(schema, code):
    with pytest.raises(proxy.APIError) as raised:
        tool_schema(schema)
    assert raised.value.status == 400
    assert (raised.value.param, raised.value.code) == ("x", code)


@pytest.mark.parametrize(
    "schema, converted",
    [
        ({"items": [{"type": "any"}, True]}, {"prefixItems": [{}, {}]}),
        (
            {"items": [{}], "additionalItems": False},
            {"prefixItems": [{}], "items": False},
        ),
        ({"items": [], "additionalItems": {"type": "FILE"}}, {"items": {}}),
        (
            {"items": {}, "additionalItems": False},
            {"items": {}, "additionalItems": False},
        ),
        ({"minimum": 0, "exclusiveMinimum": True}, {"minimum": 0}),
        ({"maximum": 0, "exclusiveMaximum": False}, {"maximum": 0}),
        ({"properties": {"a": {"required": True}}}, {"properties": {"a": {}}}),
        ({"$id": "#x", "id": "#x"}, {"id": "#x"}),
        ({"$recursiveAnchor": True, "$recursiveRef": "#"}, {"$recursiveRef": "#"}),
        (
            {"dependencies": {"a": ["b", "b"], "c": {"$id": "x"}, "d": 1}},
            {"dependencies": {"a": ["b"], "c": {}}},
        ),
    ],
)
def test_tool_schema_of_an_older_draft(schema, converted):
    assert property_schema(schema) == converted


@pytest.mark.parametrize(
    "types, converted",
    [
        ("STRING", "string"),
        (["Integer", "integer", "NULL"], ["integer", "null"]),
        (["string", "null"], ["string", "null"]),
    ],
)
def test_tool_schema_type_names(types, converted):
    assert property_schema({"type": types}) == {"type": converted}


# By what the value of a keyword must be: values that fit, and values that do not.
KEYWORD_VALUES = {
    "no_value": ([], ["http://x/y", "#x", 1]),
    "any_value": ([None, 0, "x", [], {"$ref": 5}], []),
    "string_value": (["", "x"], [None, 1, True, [], {}]),
    "boolean_value": ([True, False], [None, 0, "true", [], {}]),
    "array_value": ([[], [1, 1], [None]], [None, "x", 1, True, {}]),
    "number_value": ([0, -1, 1.5], [None, True, "1", "9" * 5000, []]),
    "positive_number": ([1, 0.01], [None, 0, -1, True, "1"]),
    "non_negative_integer": ([0, 5, 5.0], [None, -1, 1.5, True, "5", []]),
    "anchor_value": (["a", "_a-1.b"], [None, "", "1", "a b", "#a", True]),
    "type_value": (["null", ["array"]], [None, [], "any", ["string", "any"], [{}], 1]),
    "unique_strings": ([[], ["a", "b"]], [None, "a", [1], ["a", None], True]),
    "schema_value": ([{}, True, False, {"type": "null"}], [None, "string", 1, []]),
    "schema_list": ([[{}], [{"type": "null"}]], [None, [], {}, "x", 1, True]),
    "schema_map": ([{}, {"a": {"type": "null"}}], [None, [], "x", 1, True]),
    "string_list_map": ([{}, {"a": [], "b": ["c"]}], [None, [], "x", True]),
    "boolean_map": ([{}, {"http://x/y": True}], [None, [], "x", True]),
    "dependency_map": ([{}, {"a": ["b"], "c": {}, "d": False}], [None, [], "x", True]),
}


@pytest.mark.parametrize("keyword", proxy.KEYWORDS)
def test_tool_schema_keyword(keyword):
    convert = proxy.KEYWORDS[keyword]
    fitting, wrong = next(
        values
        for kind, values in KEYWORD_VALUES.items()
        if getattr(proxy, kind) is convert
    )
    for value in fitting:
        expected = json.dumps({keyword: value})  # 1 == True in Python
        assert json.dumps(property_schema({keyword: value})) == expected
    for value in wrong:
        assert property_schema({keyword: value}) == {}


PLACES = [
    {"items": "HERE"},
    {"contains": "HERE"},
    {"additionalProperties": "HERE"},
    {"propertyNames": "HERE"},
    {"if": "HERE"},
    {"then": "HERE"},
    {"else": "HERE"},
    {"not": "HERE"},
    {"unevaluatedItems": "HERE"},
    {"unevaluatedProperties": "HERE"},
    {"contentSchema": "HERE"},
    {"prefixItems": ["HERE"]},
    {"allOf": [{}, "HERE"]},
    {"anyOf": ["HERE"]},
    {"oneOf": ["HERE"]},
    {"properties": {"a": "HERE"}},
    {"patternProperties": {"^a": "HERE"}},
    {"dependentSchemas": {"a": "HERE"}},
    {"$defs": {"a": "HERE"}},
    {"definitions": {"a": "HERE"}},
    {"dependencies": {"a": "HERE"}},
    {"properties": {"type": {"not": "HERE"}}},
]


def put_in(place, schema):
    return json.loads(json.dumps(place).replace('"HERE"', json.dumps(schema)))


@pytest.mark.parametrize("place", PLACES, ids=json.dumps)
@pytest.mark.parametrize(
    "schema, converted",
    [
        ({"type": "STRING", "minLength": -1, "enum": "x"}, {"type": "string"}),
        (
            {"examples": "x", "items": [True], "x-unknown": 1},
            {"prefixItems": [{}], "x-unknown": 1},
        ),
    ],
)
def test_tool_schema_at_every_depth(place, schema, converted):
    assert property_schema(put_in(place, schema)) == put_in(place, converted)
    assert tool_schema(put_in(place, schema)) == tool_schema(put_in(place, converted))


@pytest.mark.parametrize(
    "value", [None, 5, "x", [5], {"type": 5, "$ref": 5, "items": "x"}]
)
@pytest.mark.parametrize("keyword", ["x-unknown", "nullable", "const", "default"])
def test_tool_schema_keeps_what_is_no_schema(keyword, value):
    schema = {keyword: value, "enum": [value], "examples": [value]}
    assert property_schema(schema) == schema


def test_tool_schema_wrong_members_keep_their_names_and_places():
    wrong = {"prefixItems": [5, {"type": "null"}], "properties": {"a": "string"}}
    assert property_schema(wrong) == {
        "prefixItems": [{}, {"type": "null"}],
        "properties": {"a": {}},
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"properties": []},
        {"required": [5]},
        {"required": "a"},
        {"anyOf": 5},
        {"oneOf": []},
        {"additionalProperties": "false"},
        {"type": 5},
        {"type": []},
        {"type": [{}]},
        {"type": "any"},
        {"description": 5},
        {"$defs": [], "$id": 5},
    ],
)
def test_tool_schema_wrong_values_at_the_top(wrong):
    assert tool_schema(wrong) == ({"type": "object"}, False)


def test_tool_schema_booleans():
    schema = {"properties": {"a": True, "b": False}, "additionalProperties": False}
    converted = {"a": {}, "b": {"not": {}}}
    assert tool_schema(schema).json == {
        **schema,
        "type": "object",
        "properties": converted,
    }


@pytest.mark.parametrize(
    "schema",
    [
        {"anyOf": [{"properties": {"a": {}}}], "description": "d"},
        {"oneOf": [{}]},
        {"allOf": [{}]},
        {"properties": {"a b": {}}, "required": ["a b"]},
        {"properties": {"": {}}},
        {"properties": {"名": {}}},
        {"properties": {"x" * 65: {}}},
        {"properties": {"constructor": {}}},
    ],
)
def test_tool_schema_is_wrapped(schema):
    definitions = {"$defs": {"x": {"type": "string"}}, "definitions": {"y": {}}}
    inner = {**schema, "type": "object"}
    outer = {**definitions, **proxy.wrap_schema(inner)}
    assert tool_schema({**schema, **definitions}) == (outer, True)
    assert not tool_schema({"properties": {"p": schema}}).is_wrapped


def test_wrap_schema():
    wrapped = {
        "type": "object",
        "properties": {"input": {"a": 1}},
        "required": ["input"],
    }
    assert proxy.wrap_schema({"a": 1}) == wrapped


@pytest.mark.parametrize(
    "reference, moved",
    [
        ("#", "#/properties/input"),
        ("#/properties/a", "#/properties/input/properties/a"),
        ("#/$defs/x", "#/$defs/x"),
        ("#/definitions/x/items", "#/definitions/x/items"),
        ("#anchor", "#anchor"),
        (
            "https://example.org/schema#/properties/a",
            "https://example.org/schema#/properties/a",
        ),
    ],
)
@pytest.mark.parametrize("place", PLACES, ids=json.dumps)
def test_tool_schema_references_move(place, reference, moved):
    wrapped = {"anyOf": [{}], "properties": {"a": put_in(place, {"$ref": reference})}}
    inner = tool_schema(wrapped).json["properties"]["input"]
    assert inner["properties"]["a"] == put_in(place, {"$ref": moved})
    assert property_schema(put_in(place, {"$ref": reference})) == put_in(
        place, {"$ref": reference}
    )


def test_tool_schema_references_of_definitions_move():
    schema = {"anyOf": [{}], "$defs": {"x": {"$ref": "#"}}, "$ref": "#/properties/a"}
    wrapped = tool_schema(schema).json
    assert wrapped["$defs"]["x"]["$ref"] == "#/properties/input"
    assert wrapped["properties"]["input"]["$ref"] == "#/properties/input/properties/a"


@pytest.mark.parametrize(
    "keyword", ["const", "default", "enum", "examples", "x-unknown"]
)
def test_tool_schema_references_in_values_stay(keyword):
    value = [{"$ref": "#", "a": '"$ref": "#/b"'}]
    schema = tool_schema({"anyOf": [{}], "properties": {"$ref": {keyword: value}}}).json
    assert schema["properties"]["input"]["properties"] == {"$ref": {keyword: value}}


@pytest.mark.parametrize("depth, status", [(20, 200), (5000, 400)])
def test_schema_depth(server, depth, status):
    deep = '{"type":"object","properties":{"a":' * depth + "{}" + "}}" * depth
    body = json.dumps({"model": "opus", "messages": [user("x")], "tools": [tool()]})
    response = server.post(body.replace('{"type": "string"}', deep))
    assert response.status == status
    if status == 400:
        assert "nested too deeply" in response.error["message"]


def test_tool_long_description_moves_into_schema():
    accepted = proxy.mcp_tool("a", "x" * 5000, {"description": "inner"})
    assert len(accepted["description"]) < 2048
    assert accepted["inputSchema"]["description"] == "x" * 5000 + "\n\ninner"


@pytest.mark.parametrize("name", ["Edit", "ExitPlanMode", "ToolSearch"])
def test_tool_name_reserved_by_cli_is_changed(name):
    assert proxy.api_name(name) != name
    assert parse_chat(tools=[tool(name)]).client_names[proxy.api_name(name)] == name


def test_tool_name_and_call_id_that_the_api_refuses():
    name = "functions.get weather:0"
    call_id = "call:1/2"
    api_name = proxy.api_name(name)
    answer = chat_answer(f"mock:tool={api_name}", tools=[tool(name), tool("plain")])
    assert answer.functions[0]["name"] == name
    parsed = parse_chat(
        [
            user("a"),
            assistant_calls(tool_call(name, call_id=call_id)),
            tool_message(call_id=call_id),
        ],
        tools=[tool(name)],
    )
    use = parsed.contents[1][0]
    result = parsed.contents[2][0]
    assert use["name"] == api_name
    assert parsed.tool_names == [api_name]
    assert use["id"] == result["tool_use_id"] == proxy.api_name(call_id)
    assert proxy.API_NAME.fullmatch(use["name"])
    assert proxy.API_NAME.fullmatch(use["id"])


def test_tool_names_stay_different_and_plain_ones_stay():
    assert proxy.api_name("a.b") != proxy.api_name("a:b")
    assert proxy.api_name("Bash") == "Bash"


# ── Request parsing: parameters of chat completions ──────────────────────────────

# A value of a wrong type, and a value of the right type, for each type of JSON.
WRONG = {str: 5, int: "5", float: "x", bool: "yes", list: {}, dict: []}
RIGHT = {str: "auto", int: 1, float: 0.5, bool: False, list: [], dict: {}}
# A value of each refused parameter that asks for something.
REFUSED = {
    "logprobs": True,
    "top_logprobs": 2,
    "modalities": ["text", "audio"],
    "audio": {},
    "functions": [{}],
    "function_call": "auto",
    "web_search_options": {},
}


def names_of(table, use):
    """The parameters of a table that are honoured, ignored or refused."""
    return [name for name, row in table.items() if row.treatment == use]


def wrong_value(row):
    """A value that has none of the types that a parameter may have."""
    for value in WRONG.values():
        if type(value) not in row.types:
            return value
    raise AssertionError("the parameter may have any type")


@pytest.mark.parametrize("name", list(proxy.CHAT_PARAMETERS))
def test_parameter_of_wrong_type(name):
    row = proxy.CHAT_PARAMETERS[name]
    assert row.reason
    assert row.treatment in (proxy.HONOURED, proxy.IGNORED, proxy.REFUSED)
    body = {"model": "sonnet", "messages": [user("x")], name: wrong_value(row)}
    error = error_of(parse_chat_body, body)
    assert (error["status"], error["param"]) == (400, name)
    assert error["code"] == "invalid_type"


@pytest.mark.parametrize("name", names_of(proxy.CHAT_PARAMETERS, proxy.IGNORED))
def test_parameter_ignored_changes_nothing(name):
    value = RIGHT[proxy.CHAT_PARAMETERS[name].types[0]]
    assert parse_chat(**{name: value}) == parse_chat()
    assert parse_chat(**{name: None}) == parse_chat()


def test_parameter_unknown_is_ignored():
    assert parse_chat(unheard_of=1) == parse_chat()


@pytest.mark.parametrize("name", names_of(proxy.CHAT_PARAMETERS, proxy.REFUSED))
def test_parameter_refused(name):
    error = error_of(parse_chat, **{name: REFUSED[name]})
    assert (error["status"], error["param"]) == (400, name)
    assert error["code"] == "unsupported_parameter"


@pytest.mark.parametrize("name", names_of(proxy.CHAT_PARAMETERS, proxy.REFUSED))
def test_parameter_refused_with_harmless_value(name):
    for value in proxy.DEFAULT_VALUES:
        if type(value) in proxy.CHAT_PARAMETERS[name].types:
            assert parse_chat(**{name: value}) == parse_chat()


@pytest.mark.parametrize("name", ["model", "messages"])
def test_parameter_required(name):
    body = {"model": "sonnet", "messages": [user("x")]}
    del body[name]
    assert bad_parameter(parse_chat_body, body) == name


def test_parameter_messages_empty():
    assert bad_parameter(parse_chat, []) == "messages"


def test_parameter_named_is_the_first_bad_one_in_the_body():
    names = ["temperature", "seed", "stop", "user", "n"]
    for _ in names:
        bad = dict.fromkeys(names, {})
        chat = {**bad, "model": "sonnet", "messages": [user("x")]}
        assert bad_parameter(parse_chat_body, chat) == names[0]
        names.append(names.pop(0))
    names = ["temperature", "instructions", "max_output_tokens", "user"]
    for _ in names:
        bad = dict.fromkeys(names, [])
        responses = {**bad, "model": "sonnet", "input": "x"}
        assert bad_parameter(parse_responses_body, responses) == names[0]
        names.append(names.pop(0))


# A request with something at every place that is looked at.
WHOLE_CHAT = {
    "model": "sonnet",
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "stop": ["a"],
    "n": 1,
    "parallel_tool_calls": True,
    "reasoning_effort": "low",
    "temperature": 1,
    "seed": 1,
    "logit_bias": {"1": 1},
    "user": "u",
    "metadata": {"a": "b"},
    "store": False,
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "f",
                "description": "d",
                "strict": True,
                "parameters": {
                    "type": "object",
                    "required": ["a"],
                    "properties": {"a": {"type": "string"}},
                },
            },
        }
    ],
    "response_format": {
        "type": "json_schema",
        "json_schema": {
            "name": "n",
            "strict": True,
            "schema": {
                "type": "object",
                "properties": {"b": {"anyOf": [{"type": "string"}]}},
            },
        },
    },
    "messages": [
        {"role": "system", "name": "n", "content": [{"type": "text", "text": "s"}]},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "t"},
                {
                    "type": "image_url",
                    "image_url": {"url": "https://x/y", "detail": "low"},
                },
                {"type": "file", "file": {"filename": "a", "file_data": "AAAA"}},
            ],
        },
        {
            "role": "assistant",
            "content": "c",
            "refusal": None,
            "tool_calls": [
                {
                    "id": "i",
                    "type": "function",
                    "function": {"name": "f", "arguments": "{}"},
                },
            ],
        },
        {"role": "tool", "tool_call_id": "i", "content": "r"},
    ],
}
# What is taken at a place besides a value of the same type: null, bool, int, float, str,
# list, dict by their first letters, "*" where nothing is refused. (After
# `messages[].tool_calls: null` there is a result whose call was not made.)
ACCEPTED = {
    "stop": "ns",
    "temperature": "nf",
    "tool_choice": "n",
    "response_format": "n",
    "tools[].function.description": "n",
    "tools[].function.strict": "*",
    "tools[].function.parameters": "n",
    "tools[].function.parameters.required": "*",
    "tools[].function.parameters.required[]": "*",
    "tools[].function.parameters.properties": "*",
    "tools[].function.parameters.type": "*",
    "response_format.json_schema.schema.type": "*",
    "tools[].function.parameters.properties.a": "*",
    "tools[].function.parameters.properties.a.type": "*",
    "response_format.json_schema.name": "*",
    "response_format.json_schema.strict": "*",
    "response_format.json_schema.schema.properties": "*",
    "response_format.json_schema.schema.properties.b": "*",
    "response_format.json_schema.schema.properties.b.anyOf": "*",
    "response_format.json_schema.schema.properties.b.anyOf[]": "*",
    "response_format.json_schema.schema.properties.b.anyOf[].type": "*",
    "logit_bias.1": "*",
    "metadata.a": "*",
    "messages[].name": "*",
    "messages[].content": "nsl",
    "messages[].content[]": "s",
    "messages[].content[].image_url": "s",
    "messages[].content[].image_url.detail": "*",
    "messages[].content[].file.filename": "n",
    "messages[].refusal": "*",
    "messages[].tool_calls[].type": "*",
    "tools[].type": "n",
    "tool_choice.type": "n",
    "messages[].tool_calls[].function.arguments": "n",
    "stream": "n",
    "stream_options": "n",
    "stream_options.include_usage": "n",
    "max_tokens": "n",
    "max_completion_tokens": "n",
    "n": "n",
    "seed": "n",
    "user": "n",
    "parallel_tool_calls": "n",
    "reasoning_effort": "n",
    "store": "n",
    "logit_bias": "n",
    "metadata": "n",
}
# A value of each type, by its letter.
SAMPLES = {"n": None, "b": True, "i": 7, "f": 1.5, "s": "https://x", "l": [[]], "d": {}}
LETTERS = {
    type(None): "n",
    bool: "b",
    int: "i",
    float: "f",
    str: "s",
    list: "l",
    dict: "d",
}


@pytest.mark.parametrize("path", list(paths_in(WHOLE_CHAT))[1:], ids=dotted_path)
def test_parameter_wrong_types_at_every_place(path):
    accepted = ACCEPTED.get(dotted_path(path, "[]"), "")
    if accepted == "*":
        return
    accepted += LETTERS[type(value_at(WHOLE_CHAT, path))]
    for letter, sample in SAMPLES.items():
        if letter in accepted:
            continue
        body = deep_copy(WHOLE_CHAT)
        value_at(body, path[:-1])[path[-1]] = sample
        named = re.split(r"[.\[]", bad_parameter(parse_chat_body, body))[0]
        # Where a tool is wrong, tool_choice may name one that is not there.
        assert named == path[0] or (named, path[0]) == ("tool_choice", "tools")


@pytest.mark.parametrize(
    "parameters, param",
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [5]}, "stop[0]"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
    ],
)
def test_parameter_value_out_of_range(parameters, param):
    assert bad_parameter(parse_chat, **parameters) == param


@pytest.mark.parametrize(
    "model, tokens, thinking",
    [
        ("claude-haiku-4-5", 3000, False),
        ("claude-haiku-4-5", 5000, True),
        ("claude-sonnet-4-5[1m]", 3000, False),
        ("opus", 3000, True),
    ],
)
def test_max_tokens_leaves_room_for_thinking(model, tokens, thinking):
    assert parse_chat(model=model, max_tokens=tokens).thinking is thinking


@pytest.mark.parametrize("value", [64.0, 1e2, 2048.0])
def test_parameter_whole_number_with_a_fraction_of_zero(value):
    options = parse_chat(max_tokens=value).request.prompt.options
    assert repr(options.max_tokens) == repr(int(value))
    assert parse_chat(max_completion_tokens=value) == parse_chat(max_tokens=value)
    parsed = parse_responses(max_output_tokens=value)
    assert parsed.request.prompt.options == options


def test_parameter_whole_number_is_echoed_as_an_integer():
    echo = parse_responses(max_output_tokens=64.0).request.output.echo
    assert repr(echo["max_output_tokens"]) == "64"


@pytest.mark.parametrize("name", ["max_tokens", "n", "seed"])
def test_parameter_number_with_a_fraction_is_no_integer(name):
    assert bad_parameter(parse_chat, **{name: 1.5}) == name


@pytest.mark.parametrize(
    "parameters",
    [
        {"function_call": "none"},
        {"function_call": "none", "functions": []},
        {"function_call": None},
    ],
)
def test_parameter_function_call_none_asks_for_nothing(parameters):
    assert parse_chat(**parameters) == parse_chat()


# ── Request parsing: models ──────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "name, cli",
    [
        ("claude-opus-4", "opus"),
        ("claude-sonnet-4", "sonnet"),
        ("haiku", "haiku"),
        ("claude-opus-4-1-20250805", "claude-opus-4-1-20250805"),
        ("claude-sonnet-4-5[1m]", "claude-sonnet-4-5[1m]"),
        ("claude-max/claude-opus-4", "opus"),
        ("a/b/sonnet", "sonnet"),
    ],
)
def test_model_name(name, cli):
    assert proxy.ModelCatalog().find(name).cli_name == cli


@pytest.mark.parametrize(
    "name",
    [
        "gpt-4o",
        "",
        "-p",
        "claude-x y",
        "claude-\n",
        "claude-;ls",
        "--model",
        "x/",
        "claude-" + "x" * 200,
    ],
)
def test_model_name_unknown(name):
    error = error_of(parse_chat, model=name)
    assert error["status"] == 404
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert "claude-opus-4" in error["message"]


OFFERED = {
    "models": [
        {"value": "default", "resolvedModel": "claude-opus-5-5"},
        {"value": "opus[1m]", "displayName": "Opus (1M)", "description": "Long"},
        {"value": "fable", "resolvedModel": "claude-fable-5-2"},
    ]
}


@pytest.mark.parametrize(
    "name", ["default", "opus[1m]", "fable", "claude-fable-5-2", "claude-opus-5-5"]
)
def test_model_that_the_cli_offers(name):
    catalog = proxy.ModelCatalog(proxy.offered_models(OFFERED))
    assert catalog.find(name).cli_name == name
    assert catalog.find(f"openai/{name}").cli_name == name
    assert name in [model.id for model in catalog.models]


def test_models_are_those_of_the_readme_then_those_of_the_cli():
    catalog = proxy.ModelCatalog(proxy.offered_models(OFFERED))
    assert [model.id for model in catalog.models] == [
        "claude-opus-4",
        "claude-sonnet-4",
        "claude-haiku-4",
        "default",
        "claude-opus-5-5",
        "opus[1m]",
        "fable",
        "claude-fable-5-2",
    ]
    model = catalog.find("opus[1m]").to_json()
    assert (model["display_name"], model["description"]) == ("Opus (1M)", "Long")
    assert catalog.find("fable").display_name == "fable"


def test_model_unknown_names_all_that_the_cli_offers():
    catalog = proxy.ModelCatalog(proxy.offered_models(OFFERED))
    with pytest.raises(proxy.APIError, match=r"default, .*opus\[1m\], fable"):
        catalog.find("gpt-4o")


@pytest.mark.parametrize("name", ["opus", "sonnet", "haiku", "claude-haiku-4"])
def test_model_of_the_readme_works_though_the_cli_does_not_list_it(name):
    catalog = proxy.ModelCatalog(proxy.offered_models(OFFERED))
    assert catalog.find(name).cli_name in ("opus", "sonnet", "haiku")


@pytest.mark.parametrize("value", ["--help", "-p", "a b", "x\n", "", "$(ls)", "a/b"])
def test_model_that_is_no_plain_name_is_not_taken_over(value):
    entry = {"value": value, "resolvedModel": value}
    assert proxy.offered_models({"models": [entry]}) == []


# ── Request parsing: messages ────────────────────────────────────────────────────


def test_messages_system_at_the_head_is_the_system_prompt():
    developer = {"role": "developer", "content": text_blocks("b")}
    parsed = parse_chat([system("a"), developer, user("c")])
    assert parsed.system == "a\n\nb"
    assert len(parsed.turns) == 1


@pytest.mark.parametrize(
    "messages, turns",
    [
        (
            [user("a"), assistant("b"), user("c")],
            [("user", ["a"]), ("assistant", ["b"]), ("user", ["c"])],
        ),
        ([user("a"), user("b")], [("user", ["a", "b"])]),
        (
            [user("a"), assistant("b"), assistant("c"), user("d")],
            [("user", ["a"]), ("assistant", ["b", "c"]), ("user", ["d"])],
        ),
        ([user(text_blocks("a", "", " \n", "b"))], [("user", ["a", "b"])]),
        ([user("a"), assistant(""), user("b")], [("user", ["a", "b"])]),
        (
            [assistant("a"), user("b")],
            [("user", ["Begin."]), ("assistant", ["a"]), ("user", ["b"])],
        ),
        (
            [user("a"), assistant("b")],
            [("user", ["a"]), ("assistant", ["b"]), ("user", ["Continue."])],
        ),
        (
            [user("a"), system("be nice"), user("b")],
            [("user", ["a", "<system>\nbe nice\n</system>", "b"])],
        ),
        ([user(["a", "b"])], [("user", ["a", "b"])]),
        ([system("a")], [("user", ["Begin."])]),
        ([user("")], [("user", ["Begin."])]),
        (
            [user("a"), assistant([{"type": "refusal", "refusal": "no"}]), user("b")],
            [("user", ["a"]), ("assistant", ["no"]), ("user", ["b"])],
        ),
    ],
)
def test_messages_become_turns(messages, turns):
    expected = [(role, text_blocks(*texts)) for role, texts in turns]
    assert turns_of(*messages) == expected


@pytest.mark.parametrize(
    "message, param",
    [
        (5, "messages[0]"),
        ({}, "messages[0].role"),
        ({"role": "wizard"}, "messages[0].role"),
        ({"role": "function", "name": "f", "content": "x"}, "messages[0].role"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": [5]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{}]}, "messages[0].content[0].type"),
        (
            {"role": "user", "content": [{"type": "text"}]},
            "messages[0].content[0].text",
        ),
        (
            {"role": "user", "content": [{"type": "input_audio"}]},
            "messages[0].content[0].type",
        ),
        (
            {"role": "system", "content": [{"type": "image_url"}]},
            "messages[0].content[0].image_url",
        ),
        (
            {"role": "system", "content": [{"type": "input_audio"}]},
            "messages[0].content[0].type",
        ),
        (
            {"role": "assistant", "content": [{"text": "a"}]},
            "messages[0].content[0].type",
        ),
        ({"role": "assistant", "tool_calls": 5}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": [5]}, "messages[0].tool_calls[0]"),
        (
            {"role": "assistant", "tool_calls": [{"id": "a"}]},
            "messages[0].tool_calls[0].function.name",
        ),
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "system", "content": None}, "messages[0].content"),
        ({"role": "developer"}, "messages[0].content"),
    ],
)
def test_messages_invalid(message, param):
    assert bad_parameter(parse_chat, [message]) == param


def test_messages_image_of_the_system_goes_to_the_user():
    """The system prompt takes no images."""
    image = image_part("https://x/y")
    block = {"type": "image", "source": {"type": "url", "url": "https://x/y"}}
    parsed = parse_chat([system([*text_blocks("a"), image]), user("b")])
    assert parsed.system == "a"
    assert parsed.contents == [[block, *text_blocks("b")]]
    parsed = parse_chat([user("b"), system([*text_blocks("a"), image])])
    texts = text_blocks("b", "<system>\na\n</system>")
    assert parsed.contents == [[*texts, block]]


def test_messages_audio_of_the_assistant_is_left_out():
    answer = {**assistant("b"), "audio": {"id": "a"}}
    assert turns_of(user("a"), answer) == turns_of(user("a"), assistant("b"))


def test_messages_tool_result_needs_content_and_a_call_does_not():
    call = {"id": "a", "type": "function", "function": {"name": "f"}}
    messages = [user("x"), assistant_calls(call), tool_message(None, "a")]
    assert bad_parameter(parse_chat, messages) == "messages[2].content"
    messages[-1] = tool_message("", "a")
    assert len(turns_of(*messages)) == 3


LATE_MESSAGES = [user("late"), system("late"), {"role": "developer", "content": "late"}]


@pytest.mark.parametrize("late", LATE_MESSAGES)
def test_messages_between_a_call_and_its_result_wait_behind_it(late):
    call = assistant_calls(tool_call())
    expected = turns_of(user("a"), call, tool_message(), late)
    assert turns_of(user("a"), call, late, tool_message()) == expected
    kinds = [block["type"] for block in expected[-1][1]]
    assert kinds == ["tool_result", "text"]


@pytest.mark.parametrize("late", LATE_MESSAGES)
def test_messages_between_parallel_calls_and_results_wait_behind_all(late):
    calls = assistant_calls(tool_call(call_id="i"), tool_call(call_id="k"))
    first, second = tool_message("1", "i"), tool_message("2", "k")
    expected = turns_of(user("a"), calls, first, second, late, user("b"))
    for results in (
        [late, first, second, user("b")],
        [first, late, second, user("b")],
        [late, first, user("b"), second],
    ):
        assert turns_of(user("a"), calls, *results) == expected


def test_messages_of_the_assistant_between_a_call_and_its_result():
    call = assistant_calls(tool_call())
    turns = turns_of(user("a"), call, assistant("late"), tool_message())
    assert [role for role, _ in turns] == ["user", "assistant", "user"]
    assert [block["type"] for block in turns[1][1]] == ["text", "tool_use"]
    assert [block["type"] for block in turns[2][1]] == ["tool_result"]


def test_messages_that_waited_stay_in_their_order():
    call = assistant_calls(tool_call())
    late = [user("1"), system("2"), assistant("3"), user("4")]
    expected = turns_of(user("a"), call, tool_message(), *late)
    assert turns_of(user("a"), call, *late, tool_message()) == expected


@pytest.mark.parametrize(
    "kind", ["thinking", "redacted_thinking", "reasoning", "tool_use", "server_news"]
)
def test_messages_assistant_parts_that_ask_for_nothing_are_left_out(kind):
    call = assistant_calls(tool_call(), content=[{"type": kind}, *text_blocks("b")])
    parsed = parse_chat([user("a"), call, tool_message()], tools=[tool()])
    kinds = [block["type"] for block in parsed.contents[1]]
    assert kinds == ["text", "tool_use"]
    assert parsed.request.output.ignored_kinds == (kind,)


# ── Request parsing: tools ───────────────────────────────────────────────────────


def test_tools_history_of_calls():
    calls = assistant_calls(tool_call(), tool_call(call_id="call_2"), content="b")
    results = [tool_message(), tool_message("rain", "call_2")]
    parsed = parse_chat([user("a"), calls, *results, user("c")], tools=[tool()])
    use = {"type": "tool_use", "name": "get_weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": "sunny"}
    other_result = {**result, "tool_use_id": "call_2", "content": "rain"}
    assert parsed.contents == [
        text_blocks("a"),
        [*text_blocks("b"), {**use, "id": "call_1"}, {**use, "id": "call_2"}],
        [result, other_result, *text_blocks("c")],
    ]


def test_tools_history_of_calls_without_tools():
    parsed = parse_chat(tool_loop())
    assert parsed.tool_names == ["get_weather"]
    assert parsed.tool_choice == {"type": "none"}


@pytest.mark.parametrize(
    "content, blocks",
    [
        ("", None),
        ([], None),
        (text_blocks("a", "b"), text_blocks("a", "b")),
        (text_blocks("a"), "a"),
        (
            [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}],
            [{"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}],
        ),
    ],
)
def test_tool_result_content(content, blocks):
    messages = [user("a"), assistant_calls(tool_call()), tool_message(content)]
    parsed = parse_chat(messages, tools=[tool()])
    assert parsed.contents[-1][0].get("content") == blocks


@pytest.mark.parametrize(
    "messages, param",
    [
        ([user("a"), tool_message()], "messages[1].tool_call_id"),
        (
            [user("a"), assistant_calls(tool_call()), user("b")],
            "messages[1].tool_calls[0].function",
        ),
        (
            [user("a"), assistant_calls(tool_call())],
            "messages[1].tool_calls[0].function",
        ),
        (
            [user("a"), assistant_calls(tool_call()), tool_message(call_id="other")],
            "messages[2].tool_call_id",
        ),
        (
            [user("a"), assistant_calls(tool_call()), tool_message(), tool_message()],
            "messages[3].tool_call_id",
        ),
        (
            [user("a"), assistant_calls(tool_call(), tool_call()), tool_message()],
            "messages[1].tool_calls[1].id",
        ),
    ],
)
def test_tool_calls_and_results_must_match(messages, param):
    assert bad_parameter(parse_chat, messages, tools=[tool()]) == param


@pytest.mark.parametrize(
    "arguments, value",
    [
        ("", {}),
        ("{}", {}),
        ('{"a":1}', {"a": 1}),
        ('{"a', {"arguments": '{"a'}),
        ("5", {"arguments": "5"}),
        ("[]", {"arguments": "[]"}),
    ],
)
def test_tool_call_arguments_become_an_object(arguments, value):
    assert parse_arguments_of_call(arguments) == value


def test_tool_call_id_used_again_gets_a_new_one():
    step = [assistant_calls(tool_call(call_id="c")), tool_message(call_id="c")]
    parsed = parse_chat([user("x"), *step, *step, *step], tools=[tool()])
    ids = [block["id"] for block in parsed.blocks if block["type"] == "tool_use"]
    results = [b["tool_use_id"] for b in parsed.blocks if b["type"] == "tool_result"]
    assert ids == results
    assert ids[0] == "c"
    assert len(set(ids)) == 3


def test_tool_call_input_in_the_history_is_wrapped():
    arguments = json.dumps(dict.fromkeys(ODD_PROPERTIES, 1))
    history = [user("x"), assistant_calls(tool_call("look", arguments)), tool_message()]
    parsed = parse_chat(history, tools=[tool("look", parameters=ODD_SCHEMA)])
    assert parsed.contents[1][0]["input"] == {"input": json.loads(arguments)}


@pytest.mark.parametrize(
    "choice, parallel, native",
    [
        ("auto", None, {}),
        ("auto", True, {}),
        ("auto", False, {"type": "auto", "disable_parallel_tool_use": True}),
        ("none", False, {"type": "none"}),
        ("required", None, {"type": "any"}),
        (
            {"type": "function", "function": {"name": "get_weather"}},
            False,
            {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True},
        ),
    ],
)
def test_tool_choice(choice, parallel, native):
    parsed = parse_chat(
        tools=[tool()], tool_choice=choice, parallel_tool_calls=parallel
    )
    assert parsed.tool_choice == native
    assert parsed.thinking == (native.get("type") not in ("any", "tool"))


@pytest.mark.parametrize(
    "parameters, param",
    [
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function.name"),
        ({"tools": [{"function": {}}]}, "tools[0].function.name"),
        ({"tools": [tool("")]}, "tools[0].function.name"),
        (
            {"tools": [tool(parameters={"type": "array"})]},
            "tools[0].function.parameters",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": "sometimes"}, "tool_choice"),
        (
            {
                "tools": [tool()],
                "tool_choice": {"type": "function", "function": {"name": "x"}},
            },
            "tool_choice",
        ),
    ],
)
def test_tools_invalid(parameters, param):
    assert bad_parameter(parse_chat, **parameters) == param


def input_of_call(arguments):
    """The input at the API of a call with these arguments."""
    history = [user("x"), assistant_calls(tool_call(arguments=arguments))]
    parsed = parse_chat([*history, tool_message()], tools=[tool()])
    return parsed.contents[1][0]["input"]


@pytest.mark.parametrize(
    "arguments",
    [
        '{"a":NaN}',
        '{"a":Infinity}',
        '{"a":[{"b":-Infinity}]}',
        '{"a":1e999}',
        '{"a":-1E+400}',
        '{"a":' + "9" * 400 + "}",
    ],
    ids=["NaN", "Infinity", "-Infinity", "1e999", "-1E+400", "400 digits"],
)
def test_tool_call_arguments_that_are_no_json_are_text(arguments):
    assert input_of_call(arguments) == {"arguments": arguments}


@pytest.mark.parametrize(
    "arguments, value",
    [
        (r'{"a":"\ud800"}', {"a": "\ufffd"}),
        (r'{"\udc00":["\udfffx"]}', {"\ufffd": ["\ufffdx"]}),
        (r'{"a":"\ud83d\ude00"}', {"a": "😀"}),
        ('{"a":"\ud800"}', {"a": "\ufffd"}),
        ('{"a":"\ud800', {"arguments": '{"a":"\ufffd'}),
    ],
)
def test_tool_call_arguments_with_half_a_surrogate(arguments, value):
    assert input_of_call(arguments) == value


@pytest.mark.parametrize(
    "tools",
    [
        [tool(), tool()],
        [tool(), tool("other"), tool()],
        [tool(), deep_copy(tool()), tool()],
    ],
)
def test_tools_declared_twice_among_others_count_once(tools):
    parsed = parse_chat(tools=tools)
    assert sorted(parsed.tool_names) == sorted(set(parsed.tool_names))


@pytest.mark.parametrize("one", [function_tool(), NAMESPACE_TOOL, CUSTOM_TOOL])
def test_tools_of_any_type_declared_twice_alike_count_once(one):
    parsed = parse_responses(tools=[one, one])
    assert parsed.asks_the_same_as(parse_responses(tools=[one]))


@pytest.mark.parametrize(
    "other",
    [tool(description="Other"), tool(parameters={"type": "object", "required": []})],
)
def test_tools_of_one_name_that_differ_are_a_400(other):
    param = "tools[1].function.name"
    assert bad_parameter(parse_chat, tools=[tool(), other]) == param


def allowed(mode, *names):
    """A tool_choice of chat completions that allows only some tools."""
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    choice = {"mode": mode, "tools": tools}
    return {"type": "allowed_tools", "allowed_tools": choice}


def allowed_in_response(mode, *names):
    """The same for /v1/responses."""
    tools = [{"type": "function", "name": name} for name in names]
    return {"type": "allowed_tools", "mode": mode, "tools": tools}


@pytest.mark.parametrize("mode, native", [("auto", {}), ("required", {"type": "any"})])
@pytest.mark.parametrize("names", [["a"], ["a", "c"], ["c", "b", "a"]])
def test_tool_choice_allowed_tools(mode, native, names):
    tools = [tool("a"), tool("b"), tool("c")]
    parsed = parse_chat(tools=tools, tool_choice=allowed(mode, *names))
    assert sorted(parsed.tool_names) == sorted(names)
    assert parsed.tool_choice == native
    parsed = parse_responses(
        tools=[function_tool("a"), function_tool("b"), function_tool("c")],
        tool_choice=allowed_in_response(mode, *names),
    )
    assert sorted(parsed.tool_names) == sorted(names)
    assert parsed.tool_choice == native


def test_tool_choice_allowed_tools_keep_the_calls_of_the_others():
    choice = allowed("auto", "other")
    tools = [tool(), tool("other")]
    parsed = parse_chat(tool_loop(), tools=tools, tool_choice=choice)
    assert parsed.tool_names == ["other"]
    assert parsed.contents[1][0]["name"] == "get_weather"


@pytest.mark.parametrize(
    "choice",
    [
        allowed("auto"),
        allowed("auto", "unknown"),
        allowed("sometimes", "get_weather"),
        {"type": "allowed_tools"},
        {"type": "allowed_tools", "allowed_tools": []},
        allowed_in_response("required", "get_weather", "unknown"),
    ],
)
def test_tool_choice_allowed_tools_invalid(choice):
    param = bad_parameter(parse_chat, tools=[tool()], tool_choice=choice)
    assert param.startswith("tool_choice")


@pytest.mark.parametrize(
    "choice, name",
    [
        ({"type": "function", "name": "look", "namespace": "mcp__w"}, "mcp__w__look"),
        ({"type": "function", "name": "mcp__w__look"}, "mcp__w__look"),
        ({"type": "custom", "name": "patch"}, "patch"),
        ({"type": "function", "name": "look"}, "look"),
    ],
)
def test_tool_choice_of_a_namespace(choice, name):
    tools = [NAMESPACE_TOOL, CUSTOM_TOOL, function_tool("look")]
    parsed = parse_responses(tools=tools, tool_choice=choice)
    assert parsed.tool_choice == {"type": "tool", "name": name}


def test_tool_choice_allowed_tools_of_a_namespace():
    choice = allowed_in_response("required")
    choice["tools"] = [{"type": "function", "name": "look", "namespace": "mcp__w"}]
    tools = [NAMESPACE_TOOL, function_tool("look")]
    parsed = parse_responses(tools=tools, tool_choice=choice)
    assert parsed.tool_names == ["mcp__w__look"]


# ── Request parsing: thinking in a tool loop ─────────────────────────────────────

THINKING = {"type": "thinking", "thinking": "A", "signature": "s"}
TEXT = text_blocks("t")[0]
TOOL_USE = {"type": "tool_use", "id": "call_1", "name": "get_weather", "input": {}}


def parse_with_memory(messages, cache, model="claude-haiku-4-5"):
    return parse_chat(messages, cache, model=model, tools=[tool()])


@pytest.mark.parametrize(
    "model, thinking",
    [
        ("haiku", False),
        ("claude-sonnet-4-5", False),
        ("claude-opus-4-1", False),
        ("claude-sonnet-4-20250514", False),
        ("sonnet", True),
        ("claude-opus-4-7", True),
        ("claude-sonnet-5-5", True),
    ],
)
def test_thinking_is_off_where_the_api_wants_an_unknown_thought(model, thinking):
    loop = tool_loop()
    assert parse_chat(loop, model=model, tools=[tool()]).thinking is thinking
    assert parse_chat([*loop, assistant("b"), user("c")], model=model).thinking


def test_thinking_is_off_while_the_last_turn_holds_a_result():
    loop = [*tool_loop(), user("and?")]
    assert parse_with_memory(loop, None).thinking is False
    ended = [*loop, assistant("a"), user("b")]
    assert parse_with_memory(ended, None).thinking is True


@pytest.mark.parametrize(
    "received, content, kinds",
    [
        (
            [THINKING, TEXT, THINKING, TOOL_USE],
            "t",
            ["thinking", "text", "thinking", "tool_use"],
        ),
        ([TEXT, THINKING, TOOL_USE], "t", ["text", "thinking", "tool_use"]),
        (
            [THINKING, TEXT, THINKING, TOOL_USE],
            "u",
            ["thinking", "thinking", "text", "tool_use"],
        ),
        ([THINKING, TOOL_USE], None, ["thinking", "tool_use"]),
    ],
)
def test_thinking_blocks_go_back_in_their_order(received, content, kinds):
    loop = [user("x"), assistant_calls(tool_call(), content=content), tool_message()]
    parsed = parse_with_memory(loop, remembered_answer(received))
    turn = parsed.turns[1]
    assert [block["type"] for block in turn["content"]] == kinds
    assert turn["model"] == "signer"
    assert parsed.thinking is (kinds[0] == "thinking")


def test_thinking_goes_before_a_text_and_calls_in_two_messages():
    loop = [user("x"), assistant("t"), assistant_calls(tool_call()), tool_message()]
    cache = remembered_answer([THINKING, TEXT, TOOL_USE])
    parsed = parse_with_memory(loop, cache)
    assert len(parsed.contents[1]) == 3
    assert parsed.contents[1][0] == THINKING
    assert parsed.thinking


@pytest.mark.parametrize("model", ["sonnet", "claude-haiku-4", "claude-haiku-4-5[1m]"])
def test_thinking_is_good_for_the_requested_model_alone(model):
    blocks = [THINKING, TOOL_USE]
    other = remembered_answer(blocks, "claude-haiku-4-5")
    parsed = parse_with_memory(tool_loop(), other, model)
    assert parsed.contents[1][0]["type"] == "tool_use"
    assert parsed.thinking is (model == "sonnet")
    same = remembered_answer(blocks, proxy.ModelCatalog().find(model).cli_name)
    parsed = parse_with_memory(tool_loop(), same, model)
    assert parsed.contents[1][0] == THINKING
    assert parsed.thinking


PARALLEL_IDS = ["call_1", "call_2", "call_3"]


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0)])
def test_thinking_stays_with_parallel_calls_in_any_order(order):
    uses = [{**TOOL_USE, "id": call_id} for call_id in PARALLEL_IDS]
    cache = proxy.AnswerCache()
    answer = proxy.SignedAnswer("claude-haiku-4-5", "signer", [THINKING, *uses])
    cache.add_signed_answer(PARALLEL_IDS, answer)
    ids = [PARALLEL_IDS[place] for place in order]
    calls = assistant_calls(*(tool_call(call_id=one) for one in ids))
    results = [tool_message(call_id=one) for one in ids]
    parsed = parse_with_memory([user("x"), calls, *results], cache)
    kinds = [block["type"] for block in parsed.contents[1]]
    assert kinds == ["thinking", "tool_use", "tool_use", "tool_use"]
    assert parsed.thinking


# ── Request parsing: images and files ────────────────────────────────────────────

BASE64_SOURCE = {"type": "base64", "data": PNG_DATA}
PDF_BLOCK = {
    "type": "document",
    "source": {**BASE64_SOURCE, "media_type": "application/pdf"},
}


@pytest.mark.parametrize(
    "part, block",
    [
        (
            image_part(data_url("image/png")),
            {"type": "image", "source": {**BASE64_SOURCE, "media_type": "image/png"}},
        ),
        (
            image_part(data_url("image/jpg")),
            {"type": "image", "source": {**BASE64_SOURCE, "media_type": "image/jpeg"}},
        ),
        (
            image_part("http://x/y"),
            {"type": "image", "source": {"type": "url", "url": "http://x/y"}},
        ),
        (
            {"type": "image_url", "image_url": "https://x/y"},
            {"type": "image", "source": {"type": "url", "url": "https://x/y"}},
        ),
        (
            file_part(data_url("application/pdf"), filename="a.pdf"),
            {**PDF_BLOCK, "title": "a.pdf"},
        ),
        (file_part(PNG_DATA), PDF_BLOCK),
        (
            file_part(data_url("text/csv", "YSxi")),
            {
                "type": "document",
                "source": {"type": "text", "media_type": "text/plain", "data": "a,b"},
            },
        ),
    ],
)
def test_media_part(part, block):
    assert turns_of(user([part])) == [("user", [block])]


@pytest.mark.parametrize(
    "part, param",
    [
        ({"type": "image_url"}, ".image_url"),
        (image_part("ftp://x"), ".image_url.url"),
        (image_part("data:image/png,abc"), ".image_url.url"),
        (image_part(data_url("image/png", "?!")), ".image_url.url"),
        (image_part(data_url("image/png", "")), ".image_url.url"),
        (image_part(data_url("image/tiff")), ".image_url.url"),
        (image_part(data_url("image/jpeg2000")), ".image_url.url"),
        ({"type": "file", "file": {"file_id": "file-1"}}, ".file"),
        (file_part(data_url("application/zip")), ".file.file_data"),
        (file_part("%%%"), ".file.file_data"),
    ],
)
def test_media_part_invalid(part, param):
    expected = "messages[0].content[0]" + param
    assert bad_parameter(parse_chat, [user([part])]) == expected


PDF_URL = "https://example.com/a.pdf"
PDF_URL_BLOCK = {"type": "document", "source": {"type": "url", "url": PDF_URL}}


@pytest.mark.parametrize("fields", [{}, {"filename": "a.pdf"}, {"file_data": None}])
def test_media_file_url_is_a_document(fields):
    part = item("input_file", file_url=PDF_URL, **fields)
    block = dict(PDF_URL_BLOCK)
    if "filename" in fields:
        block["title"] = "a.pdf"
    assert parse_responses([user([part])]).contents == [[block]]
    items = [function_call_item(), call_output_item(output=[part])]
    (result,) = parse_responses(items, tools=[function_tool()]).contents[-1]
    assert result["content"] == [block]


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://x/y", "javascript:x", "", "x"]
)
def test_media_file_url_invalid(url):
    part = item("input_file", file_url=url)
    param = "input[0].content[0].file_url"
    assert bad_parameter(parse_responses, [user([part])]) == param


# ── Request parsing: structured output ───────────────────────────────────────────


def test_structured_output_is_a_forced_tool():
    parsed = parse_chat(response_format=json_schema_format())
    assert parsed.tools[0]["inputSchema"] == INTEGER_SCHEMA
    assert not parsed.thinking
    assert parsed.tool_choice == {
        "type": "tool",
        "name": "StructuredOutput",
        "disable_parallel_tool_use": True,
    }


def test_structured_output_type_text_changes_nothing():
    assert parse_chat(response_format={"type": "text"}) == parse_chat()


def test_structured_output_type_json_object():
    (accepted,) = parse_chat(response_format={"type": "json_object"}).tools
    schema = {"type": "object", "additionalProperties": True}
    assert accepted["inputSchema"] == schema


def test_structured_output_with_tools():
    both = {"tools": [tool()], "response_format": json_schema_format()}
    assert parse_chat(**both).tool_choice == {
        "type": "any",
        "disable_parallel_tool_use": True,
    }
    forced = parse_chat(**both, tool_choice="required")
    assert forced.tool_names == ["get_weather"]


@pytest.mark.parametrize(
    "value, param",
    [
        ({}, "response_format.type"),
        ({"type": "xml"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema.schema"),
        (
            {"type": "json_schema", "json_schema": {}},
            "response_format.json_schema.schema",
        ),
        (json_schema_format({"type": "array"}), "response_format.json_schema.schema"),
    ],
)
def test_structured_output_invalid(value, param):
    assert bad_parameter(parse_chat, response_format=value) == param


# ── Request parsing: Responses requests ──────────────────────────────────────────


def test_responses_request_asks_the_same_as_chat():
    responses = parse_responses(
        INPUT_ITEMS,
        cache_with_text(ANSWER_ID, "d"),
        tools=[function_tool(description="Weather of a city")],
        reasoning={"effort": "low"},
        max_output_tokens=5,
        tool_choice="required",
    )
    chat = parse_chat(
        CHAT_MESSAGES,
        tools=[tool()],
        reasoning_effort="low",
        max_tokens=5,
        tool_choice="required",
    )
    assert responses.asks_the_same_as(chat)


def test_responses_instructions_come_first():
    parsed = parse_responses(
        INPUT_ITEMS, cache_with_text(ANSWER_ID, "d"), instructions="I"
    )
    assert parsed.system == "I\n\nS"


@pytest.mark.parametrize(
    "form, chat",
    [
        ({}, None),
        ({"verbosity": "low"}, None),
        ({"format": {"type": "text"}}, {"type": "text"}),
        ({"format": {"type": "json_object"}}, {"type": "json_object"}),
        (
            {
                "format": {
                    "type": "json_schema",
                    "name": "x",
                    "strict": True,
                    "schema": CITY_SCHEMA,
                }
            },
            {"type": "json_schema", "json_schema": {"schema": CITY_SCHEMA}},
        ),
    ],
)
def test_responses_text_format(form, chat):
    assert parse_responses(text=form).asks_the_same_as(parse_chat(response_format=chat))


def test_responses_tools():
    parsed = parse_responses(
        tools=[
            function_tool(),
            NAMESPACE_TOOL,
            CUSTOM_TOOL,
            {"type": "web_search", "x": 1},
            {"type": "tool_search"},
        ],
        tool_choice={"type": "function", "name": "get_weather"},
    )
    assert parsed.tool_names == ["get_weather", "mcp__w__look", "patch"]
    assert parsed.tools[2]["inputSchema"]["required"] == ["input"]
    assert parsed.tool_choice["name"] == "get_weather"
    fields = {"name": "look", "namespace": "mcp__w"}
    assert parsed.call_fields["mcp__w__look"] == fields


def test_responses_calls_of_custom_and_namespace_tools_go_back():
    items = [
        function_call_item("a", "{}", "look", namespace="mcp__w"),
        call_output_item("a"),
        item("custom_tool_call", call_id="b", name="patch", input="+a"),
        call_output_item("b", "done", "custom_tool_call_output"),
    ]
    blocks = parse_responses(items, tools=[NAMESPACE_TOOL, CUSTOM_TOOL]).blocks
    uses = [(b["name"], b["input"]) for b in blocks if b["type"] == "tool_use"]
    assert uses == [("mcp__w__look", {}), ("patch", {"input": "+a"})]


# A value of some refused or ignored parameters that asks for something.
RESPONSES_VALUES = {"prompt": {"id": "x"}, "background": True, "top_logprobs": 1}


def responses_value(name):
    row = proxy.RESPONSE_PARAMETERS[name]
    return RESPONSES_VALUES.get(name, RIGHT[row.types[0]])


@pytest.mark.parametrize("name", list(proxy.RESPONSE_PARAMETERS))
def test_responses_parameter_of_wrong_type(name):
    body = {"model": "sonnet", "input": "x"}
    body[name] = wrong_value(proxy.RESPONSE_PARAMETERS[name])
    error = error_of(parse_responses_body, body)
    assert (error["status"], error["param"]) == (400, name)
    assert error["code"] == "invalid_type"


@pytest.mark.parametrize("name", names_of(proxy.RESPONSE_PARAMETERS, proxy.IGNORED))
def test_responses_parameter_ignored_changes_nothing(name):
    parsed = parse_responses(**{name: responses_value(name)})
    assert parsed.asks_the_same_as(parse_responses())


def test_responses_parameter_unknown_is_ignored():
    assert parse_responses(unheard_of=1) == parse_responses()


@pytest.mark.parametrize("name", names_of(proxy.RESPONSE_PARAMETERS, proxy.REFUSED))
def test_responses_parameter_refused(name):
    error = error_of(parse_responses, **{name: responses_value(name)})
    assert (error["status"], error["param"]) == (400, name)
    assert error["code"] == "unsupported_parameter"


@pytest.mark.parametrize(
    "input_, parameters, param",
    [
        (None, {}, "input"),
        ([5], {}, "input[0]"),
        ([item("compaction_trigger")], {}, "input[0].type"),
        ([item(5)], {}, "input[0].type"),
        ([item("message", role="x", content="")], {}, "input[0].role"),
        (
            [item("message", role="user", content=[item("input_audio")])],
            {},
            "input[0].content[0].type",
        ),
        ([user([item("input_file", file_id="f")])], {}, "input[0].content[0]"),
        ([function_call_item(None)], {}, "input[0].call_id"),
        ([function_call_item()], {}, "input[0]"),
        ([call_output_item()], {}, "input[0].call_id"),
        ([function_call_item(), call_output_item(output=None)], {}, "input[1].output"),
        ([item("custom_tool_call", call_id="a", name="b")], {}, "input[0].input"),
        ("x", {"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ("x", {"text": {"format": {"type": "x"}}}, "text.format.type"),
        ("x", {"reasoning": {"effort": "x"}}, "reasoning.effort"),
        ("x", {"max_output_tokens": 0}, "max_output_tokens"),
        ("x", {"tools": [{"type": "mcp"}]}, "tools[0].type"),
        ("x", {"tools": [function_tool(None)]}, "tools[0].name"),
        (
            "x",
            {"tools": [function_tool(parameters={"type": "string"})]},
            "tools[0].parameters",
        ),
        ("x", {"tools": [{**NAMESPACE_TOOL, "tools": [{}]}]}, "tools[0].tools[0].name"),
        (
            "x",
            {"tool_choice": {"type": "mcp", "server_label": "x"}},
            "tool_choice.type",
        ),
        ("x", {"tool_choice": {"type": "allowed_tools"}}, "tool_choice.tools"),
        ("x", {"tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
    ],
)
def test_responses_request_invalid(input_, parameters, param):
    assert bad_parameter(parse_responses, input_, **parameters) == param


@pytest.mark.parametrize("input_", ["", " ", [], [user("")], [user([])]])
def test_responses_empty_input_begins_a_conversation(input_):
    parsed = parse_responses(input_, instructions="Say hello.")
    assert parsed.turns == [user(text_blocks("Begin."))]
    assert parsed.system == "Say hello."


@pytest.mark.parametrize("role", ["developer", "system", "user"])
def test_responses_message_between_a_call_and_its_output(role):
    late = item("message", role=role, content=[item("input_text", text="late")])
    call, output = function_call_item(), call_output_item()
    tools = [function_tool()]
    expected = parse_responses([user("a"), call, output, late], tools=tools)
    parsed = parse_responses([user("a"), call, late, output], tools=tools)
    assert parsed.asks_the_same_as(expected)
    chat = parse_chat(
        [
            user("a"),
            assistant_calls(tool_call()),
            {"role": role, "content": "late"},
            tool_message(),
        ],
        tools=[tool(description=None)],
    )
    assert parsed.turns == chat.turns


@pytest.mark.parametrize(
    "output_type", ["function_call_output", "custom_tool_call_output"]
)
def test_responses_message_between_parallel_calls_and_outputs(output_type):
    calls = [function_call_item("i"), function_call_item("k")]
    outputs = [call_output_item("i"), call_output_item("k", "rain", output_type)]
    late = system("late")
    expected = parse_responses([user("a"), *calls, *outputs, late])
    for items in (
        [*calls, late, *outputs],
        [*calls, outputs[0], late, outputs[1]],
        [calls[0], late, calls[1], *outputs],
    ):
        assert parse_responses([user("a"), *items]).turns == expected.turns


@pytest.mark.parametrize(
    "items, param",
    [
        ([user("a"), function_call_item(), system("late")], "input[1]"),
        (
            [
                function_call_item("i"),
                function_call_item("k"),
                user("b"),
                call_output_item("i"),
            ],
            "input[1]",
        ),
        ([item("custom_tool_call", call_id="a", name="b", input="")], "input[0]"),
    ],
)
def test_responses_call_without_any_output_is_a_400(items, param):
    assert bad_parameter(parse_responses, items) == param


def agent_message(*content):
    return item("agent_message", author="/root", recipient="/a", content=list(content))


def encrypted(text):
    return item("encrypted_content", encrypted_content=text)


@pytest.mark.parametrize(
    "content, texts",
    [
        ([item("input_text", text="do it")], ["do it"]),
        ([encrypted("do it")], ["do it"]),
        ([item("input_text", text="a"), encrypted("b")], ["a", "b"]),
        ([item("input_text", text="a"), encrypted("gAAAAABo3x_secret")], ["a"]),
        ([item("input_text", text="a"), encrypted(None)], ["a"]),
        ([item("input_text", text="a"), encrypted(" ")], ["a"]),
    ],
)
def test_responses_agent_message_is_a_text_of_the_user(content, texts):
    assert parse_responses([agent_message(*content)]).contents == [text_blocks(*texts)]


def test_responses_agent_message_between_a_call_and_its_output():
    late = agent_message(encrypted("late"))
    items = [function_call_item(), late, call_output_item()]
    kinds = [block["type"] for block in parse_responses(items).contents[-1]]
    assert kinds == ["tool_result", "text"]


FOREIGN_ITEMS = [
    "web_search_call",
    "file_search_call",
    "code_interpreter_call",
    "computer_call",
    "computer_call_output",
    "image_generation_call",
    "local_shell_call",
    "local_shell_call_output",
    "mcp_call",
    "mcp_list_tools",
    "mcp_approval_request",
    "tool_search_call",
    "tool_search_output",
    "compaction",
    "compaction_summary",
    "news_of_2027",
    "news_call",
    "news_call_output",
]


@pytest.mark.parametrize("kind", FOREIGN_ITEMS)
def test_responses_item_of_another_provider_is_left_out(kind):
    foreign = item(kind, id="x_1", call_id="c", output="o", status="completed")
    parsed = parse_responses([user("a"), foreign, user("b")])
    assert parsed.asks_the_same_as(parse_responses([user("a"), user("b")]))
    assert parsed.request.output.ignored_kinds == (kind,)
    between = [function_call_item(), foreign, call_output_item()]
    assert len(parse_responses(between).turns) == 3


def test_responses_reasoning_is_left_out_without_a_word():
    parsed = parse_responses([item("reasoning", id="rs_1", summary=[]), user("a")])
    assert parsed.request.output.ignored_kinds == ()


def test_responses_compaction_trigger_is_a_400():
    items = [user("a"), item("compaction_trigger")]
    error = error_of(parse_responses, items)
    assert (error["status"], error["param"]) == (400, "input[1].type")
    assert error["code"] == "unsupported_type"


@pytest.mark.parametrize(
    "kind",
    [
        "web_search",
        "web_search_preview",
        "web_search_2025_08_26",
        "web_search_preview_2025_03_11",
    ],
)
def test_responses_web_search_under_all_its_names(kind):
    parsed = parse_responses(tools=[{"type": kind, "search_context_size": "low"}])
    assert parsed.asks_the_same_as(parse_responses())


@pytest.mark.parametrize(
    "kind", ["computer_use_preview", "mcp", "web_search_x", "file_search", "2025_08_26"]
)
def test_responses_tool_type_that_asks_for_something_is_a_400(kind):
    assert bad_parameter(parse_responses, tools=[{"type": kind}]) == "tools[0].type"


def cache_of_responses(*responses):
    """A cache of (id, id of the one before, items)."""
    cache = proxy.AnswerCache()
    for response_id, previous_id, items in responses:
        response = proxy.StoredResponse(previous_id, json.dumps(items))
        cache.add_response(response_id, response)
    return cache


def test_responses_previous_response_continues_the_conversation():
    cache = cache_of_responses(
        ("resp_1", None, [user("a"), assistant("b")]),
        ("resp_2", "resp_1", [user("c"), assistant("d")]),
    )
    parsed = parse_responses("e", cache, previous_response_id="resp_2")
    whole = parse_responses(dialogue("a", "b", "c", "d", "e"))
    assert parsed.asks_the_same_as(whole)
    # Another branch of the same conversation.
    parsed = parse_responses("x", cache, previous_response_id="resp_1")
    assert parsed.asks_the_same_as(parse_responses(dialogue("a", "b", "x")))


def test_responses_previous_response_in_a_tool_loop():
    cache = cache_of_responses(("resp_1", None, [user("a"), function_call_item()]))
    tools = [function_tool()]
    parsed = parse_responses(
        [call_output_item()], cache, previous_response_id="resp_1", tools=tools
    )
    items = [user("a"), function_call_item(), call_output_item()]
    assert parsed.asks_the_same_as(parse_responses(items, tools=tools))


@pytest.mark.parametrize("response_id", ["resp_unknown", "", "resp_2", "x" * 5000])
def test_responses_previous_response_not_found(response_id):
    cache = cache_of_responses(("resp_2", "resp_forgotten", []))
    error = error_of(parse_responses, "x", cache, previous_response_id=response_id)
    assert (error["status"], error["param"]) == (400, "previous_response_id")
    assert error["code"] == "previous_response_not_found"
    assert "whole conversation" in error["message"]
    assert len(error["message"]) < 500


def test_responses_memory_is_bounded_over_all_tables():
    cache = proxy.AnswerCache(max_bytes=10_000)
    for number in range(50):
        name = str(number)
        cache.add_item_text(name, "x" * 1000)
        response = proxy.StoredResponse(None, json.dumps([user("x" * 1000)]))
        cache.add_response(name, response)
        blocks = [{**THINKING, "thinking": "x" * 1000}]
        cache.add_signed_answer([name], proxy.SignedAnswer("m", "m", blocks))
    count = len(cache.item_texts) + len(cache.responses) + len(cache.signed_answers)
    assert 8 <= count <= 10
    assert cache.find_item_text("46") is None
    assert cache.find_item_text("49") is not None
    assert cache.find_conversation("49") is not None
    assert cache.find_signed_answer(["49"]) is not None


@pytest.mark.parametrize("letter", ["x", "é", "€", "😀"])
def test_responses_memory_is_bounded_in_bytes(letter):
    cache = proxy.AnswerCache(max_bytes=10_000)
    for number in range(50):
        cache.add_item_text(str(number), letter * 1000)
    assert cache.find_item_text("49") is not None
    size = sum(len(text.encode()) for text in cache.item_texts.values())
    assert 5_000 < size <= 10_000


def test_responses_memory_forgets_one_that_is_too_large_alone():
    cache = proxy.AnswerCache(max_bytes=1000)
    cache.add_item_text("a", "x" * 2000)
    assert cache.find_item_text("a") is None
    cache.add_item_text("b", "x")
    assert cache.find_item_text("b") == "x"


# ── CLI protocol ─────────────────────────────────────────────────────────────────


def test_protocol_history_reaches_the_cli_turn_for_turn(server):
    messages = [system("s"), *dialogue("a", "b", "c", "d")]
    received = server.received(messages)
    assert received["initialize"]["systemPrompt"] == ["s"]
    turns = [(turn["role"], turn["content"]) for turn in received["turns"][:-1]]
    assert turns == [
        ("user", text_blocks("a")),
        ("assistant", text_blocks("b")),
        ("user", text_blocks("c")),
        ("assistant", text_blocks("d")),
    ]
    should_query = [line.get("shouldQuery") for line in received["lines"]]
    assert should_query == [False, None, False, None, None]
    ids = [turn["id"] for turn in received["turns"] if turn["role"] == "assistant"]
    assert len(set(ids)) == 2


def test_protocol_last_turn_has_a_cache_mark(server):
    block = server.received("x")["turns"][-1]["content"][-1]
    assert block == {**text_blocks("mock:show")[0], "cache_control": proxy.CACHE_MARK}


@pytest.mark.parametrize(
    "kinds, marked",
    [
        (["text", "image"], 0),
        (["image", "text"], 1),
        (["image"], 0),
        (["text", "text"], 1),
    ],
)
def test_protocol_cache_mark_is_on_no_image(kinds, marked):
    content = [{"type": kind, "text": "x"} for kind in kinds]
    turn = {"role": "user", "content": content}
    line = json.loads(proxy.query_line(turn, (2, 1, 330)).text)
    marks = ["cache_control" in block for block in line["message"]["content"]]
    assert marks.index(True) == marked
    assert marks.count(True) == 1


@pytest.mark.parametrize(
    "text, old, new",
    [
        ("/clear", ["/", "clear"], ["/clear"]),
        ("//a", ["//", "a"], ["//a"]),
        ("/", ["\n/"], ["/"]),
        ("a/b", ["a/b"], ["a/b"]),
        ("@/etc/passwd", ["@/etc/passwd"], ["@/etc/passwd"]),
    ],
)
def test_protocol_typed_command_is_text(text, old, new):
    content = text_blocks("first", text)
    assert proxy.protect_slash_commands(content, (2, 1, 197)) == text_blocks(
        "first", *old
    )
    assert proxy.protect_slash_commands(content, (2, 1, 330)) == text_blocks(
        "first", *new
    )
    line = proxy.turn_message({"role": "user", "content": content}, 0, (2, 1, 330))
    assert line["text_not_typed"]


def test_protocol_argv_and_environment_hold_nothing_of_a_request(server):
    messages = [system("SECRET"), user("SECRET"), assistant("SECRET")]
    received = server.received(messages, user="SECRET")
    assert "SECRET" not in json.dumps([received["argv"], received["env"]])
    assert received["argv"][:3] == ["-p", "--input-format", "stream-json"]


def test_protocol_environment_is_closed(start_server, monkeypatch):
    removed = [*proxy.BILLING_VARIABLES, *proxy.REMOVED_VARIABLES]
    for name in ["CLAUDE_MAX_PROXY_API_KEY", *removed]:
        monkeypatch.setenv(name, "LEAK")
    monkeypatch.setenv("CLAUDE_CODE_OAUTH_TOKEN", "kept")
    env = start_server().received("x")["env"]
    assert "LEAK" not in env.values()
    assert env["CLAUDE_CODE_OAUTH_TOKEN"] == "kept"
    assert env["CLAUDE_CODE_DISABLE_ATTACHMENTS"] == "1"


def test_protocol_long_prompts(server):
    messages = [system("s" * 300_000), user("u" * 1_000_000), assistant("ok")]
    received = server.received(messages)
    assert len(received["initialize"]["systemPrompt"][0]) == 300_000
    assert len(received["turns"][0]["content"][0]["text"]) == 1_000_000


def test_protocol_unicode(server):
    text = "emoji 😀 nul \x00 crlf \r\n sep \u2028 end"
    received = server.received([user(text), assistant("ok")])
    assert received["turns"][0]["content"][0]["text"] == text


def test_protocol_max_tokens(server):
    env = server.received("x", max_tokens=5000)["env"]
    assert env["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == "5000"
    assert "CLAUDE_CODE_DISABLE_THINKING" not in env


def test_protocol_max_completion_tokens_wins_over_max_tokens(server):
    env = server.received("x", max_completion_tokens=100, max_tokens=5000)["env"]
    assert env["CLAUDE_CODE_MAX_OUTPUT_TOKENS"] == "100"
    assert env["CLAUDE_CODE_DISABLE_THINKING"] == "1"


@pytest.mark.parametrize(
    "effort, level", [("minimal", "low"), ("low", "low"), ("max", "max")]
)
def test_protocol_reasoning_effort(server, effort, level):
    env = server.received("x", reasoning_effort=effort)["env"]
    assert env["CLAUDE_CODE_EFFORT_LEVEL"] == level


def test_protocol_reasoning_effort_none(server):
    env = server.received("x", reasoning_effort="none")["env"]
    assert env["CLAUDE_CODE_DISABLE_THINKING"] == "1"
    assert "CLAUDE_CODE_EFFORT_LEVEL" not in env


def test_protocol_tools(server):
    tools = [tool(), tool("b", "", {"type": "object"})]
    received = server.received("x", tools=tools)
    assert received["initialize"]["sdkMcpServers"] == ["c"]
    assert received["tools"][0] == {
        "name": "get_weather",
        "description": "Weather of a city",
        "inputSchema": CITY_SCHEMA,
    }


def test_protocol_without_tools_there_is_no_mcp_server(server):
    assert "sdkMcpServers" not in server.received("x")["initialize"]


def test_protocol_tool_choice(server):
    env = server.received("x", tools=[tool()], tool_choice="required")["env"]
    extra_body = json.loads(env["CLAUDE_CODE_EXTRA_BODY"])
    assert extra_body == {"tool_choice": {"type": "any"}}
    assert env["CLAUDE_CODE_DISABLE_THINKING"] == "1"


def test_protocol_signed_thinking_comes_back_in_a_tool_loop(start_server):
    server = start_server()
    model = "claude-haiku-4-5"
    words = "mock:think=1 mock:tool=get_weather mock:tokens=1"
    first = server.chat(words, model, tools=[tool()])
    call_id = first.tool_calls[0]["id"]
    history = [user("x"), first.message, tool_message(call_id=call_id)]
    received = server.received(history, model=model, tools=[tool()])
    turn = received["turns"][1]
    assert turn["content"][0] == {
        "type": "thinking",
        "thinking": "thought0 ",
        "signature": "c2lnbmVk",
    }
    assert turn["model"] == "claude-claude-haiku-4-5-mock"
    assert "CLAUDE_CODE_DISABLE_THINKING" not in received["env"]
    # Another model can't use it.
    received = server.received(history, tools=[tool()])
    assert received["turns"][1]["content"][0]["type"] == "text"


def test_protocol_signed_thinking_comes_back_in_a_responses_loop(start_server):
    server = start_server()
    parameters = {"tools": [function_tool()], "model": "claude-haiku-4-5"}
    words = "mock:think=1 mock:tool=get_weather"
    output = server.respond(words, **parameters).json["output"]
    (call,) = [one for one in output if one["type"] == "function_call"]
    result = call_output_item(call["call_id"])
    history = [user("q"), *output, result, user("mock:show")]
    response = server.respond(history, **parameters)
    assert "c2lnbmVk" in response.json["output"][0]["content"][0]["text"]


def test_cache_of_a_server_is_bounded(start_server):
    server = start_server()
    server.limit_memory(1000)
    for _ in range(9):
        server.chat("mock:think=1 mock:tool=get_weather", tools=[tool()])
    assert 0 < server.remembered() < 9
    assert server.memory_size() <= 1000


def test_protocol_item_reference(start_server):
    server = start_server()
    server.limit_memory(4000)
    item_id = server.respond("mock:say=before").json["output"][0]["id"]
    history = [user("x"), item("item_reference", id=item_id), user("mock:show")]
    output = server.respond(history).json["output"]
    assert "before" in output[0]["content"][0]["text"]
    server.respond("x" * 5000)  # now it is forgotten
    response = server.respond(history)
    assert response.status == 404
    assert response.error["param"] == "input[1].id"
    assert "store: false" in response.error["message"]


# ── Decoding: events ─────────────────────────────────────────────────────────────

WEATHER_AND_TIME = "mock:tool=get_weather,get_time mock:tokens=1"


def check_weather_and_time(response):
    assert response.finish_reason == "tool_calls"
    assert response.content == "tok0 "
    assert [function["name"] for function in response.functions] == [
        "get_weather",
        "get_time",
    ]
    assert {function["arguments"] for function in response.functions} == {PARIS}
    assert len({call["id"] for call in response.tool_calls}) == 2


def test_decoding_tool_calls():
    tools = [tool(), tool("get_time")]
    check_weather_and_time(chat_answer(WEATHER_AND_TIME, tools=tools))


def test_decoding_tool_call_without_arguments():
    answer = chat_answer("mock:tool=get_weather mock:input=none", tools=[tool()])
    assert answer.functions[0]["arguments"] == "{}"


FINISH_REASONS = {**proxy.FINISH_REASONS, "new_reason": "stop"}
del FINISH_REASONS["tool_use"]


@pytest.mark.parametrize("stop_reason, finish_reason", list(FINISH_REASONS.items()))
def test_decoding_finish_reason(stop_reason, finish_reason):
    answer = chat_answer(f"mock:stop={stop_reason} mock:tokens=1")
    assert answer.finish_reason == finish_reason
    assert answer.content == "tok0 "  # and nothing of what the CLI says afterwards


def test_decoding_many_tokens():
    text = "".join(f"tok{number} " for number in range(500))
    assert chat_answer("mock:tokens=500").content == text


def test_decoding_split_emoji_is_joined():
    words = mock_texts("a\ud83d", "\ude00b", "\ud83d")
    texts = [delta.get("content") for delta in chat_stream(words).deltas]
    assert texts == ["", "a", "😀b", "\ud83d", None]
    assert chat_answer(words).content == "a😀b\ud83d"


# The input of a tool with ODD_SCHEMA. (A mock: word has no space.)
ODD_INPUT = json.dumps(dict.fromkeys(ODD_PROPERTIES, 1), separators=(",", ":"))
ODD_INPUT = ODD_INPUT.replace("a b", r"a\u0020b")


@pytest.mark.parametrize(
    "model_says, arguments",
    [
        (
            '{"input":' + ODD_INPUT + "}",
            json.dumps(json.loads(ODD_INPUT), ensure_ascii=False),
        ),
        (ODD_INPUT, ODD_INPUT),  # not as it was asked to
        ('{"input":1,"mode":2}', '{"input":1,"mode":2}'),
        ('{"input":{"$fil', '{"input":{"$fil'),  # cut short
    ],
    ids=["wrapped", "not wrapped", "more beside it", "cut short"],
)
def test_decoding_wrapped_input(model_says, arguments):
    words = f"mock:tool=look mock:input={model_says}"
    answer = chat_answer(words, tools=[tool("look", parameters=ODD_SCHEMA)])
    assert answer.functions[0]["arguments"] == arguments


def test_decoding_structured_output():
    response_format = json_schema_format()
    answer = chat_answer('mock:input={"a":1}', response_format=response_format)
    assert answer.content == '{"a":1}'
    assert answer.finish_reason == "stop"
    assert "tool_calls" not in answer.message


def test_decoding_structured_output_wrapped():
    schema = {"anyOf": [{"properties": {"a b": {"type": "integer"}}}]}
    words = r'mock:input={"input":{"a\u0020b":1}}'
    answer = chat_answer(words, response_format=json_schema_format(schema))
    assert json.loads(answer.content) == {"a b": 1}


def test_decoding_structured_output_with_tools():
    both = {"tools": [tool()], "response_format": json_schema_format()}
    answer = chat_answer("mock:tool=get_weather mock:notext", **both)
    assert answer.finish_reason == "tool_calls"
    words = 'mock:tool=StructuredOutput mock:notext mock:input={"a":1}'
    answer = chat_answer(words, **both)
    assert answer.finish_reason == "stop"
    assert answer.content == '{"a":1}'


def test_decoding_second_structured_output_is_left_out():
    words = 'mock:tool=StructuredOutput,StructuredOutput mock:notext mock:input={"a":1}'
    response_format = json_schema_format()
    text = decoded_text(*answer_lines(words), response_format=response_format)
    assert text == '{"a":1}'


@pytest.mark.parametrize(
    "line",
    [{}, {"type": None}, {"type": 5}, {"type": []}, {"type": {}}, {"type": "news"}],
    ids=str,
)
def test_decoding_line_without_a_known_type_is_noise(line):
    lines = cli_lines("mock:tokens=1")
    assert decoded_text(line, *lines[:-1]) == "tok0 "
    assert decoded_text(*lines[:3], line, *lines[3:-1]) == "tok0 "


@pytest.mark.parametrize(
    "model_says, text",
    [
        ('{"input":"+a', "+a"),
        ('{"input":"+a\\', "+a"),
        ('{"input":"+a\\u00', "+a"),
        ('{"input":"+a\\n', "+a\n"),
        ('{"input":"+a"', "+a"),
        ('{"input":"', ""),
        ('{"input":', ""),
        ('{"inp', ""),
        ('{"input":"+a"}', "+a"),
    ],
)
def test_decoding_input_of_a_custom_tool_that_was_cut_is_text(model_says, text):
    words = f"mock:tool=patch mock:notext mock:stop=max_tokens mock:input={model_says}"
    _, body = responses_stream(words, tools=[CUSTOM_TOOL])
    assert body["output"][0]["input"] == text
    assert body["status"] == "incomplete"


# ── Decoding: stop strings ───────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "texts, stop, content",
    [
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
    ],
)
def test_decoding_stop_string(texts, stop, content):
    answer = chat_answer(mock_texts(*texts), stop=stop)
    assert answer.content == content
    assert answer.finish_reason == "stop"


# ── Decoding: restarts ───────────────────────────────────────────────────────────
# If the stream from the API breaks, the CLI starts the answer again. answer_lines()[:-3]
# are the lines of an answer whose last block has not ended.


@pytest.mark.parametrize("words", ["mock:cut=2", "mock:cut=2 mock:whole", "mock:cut=5"])
def test_decoding_restart_completes_the_answer(words):
    answer = chat_answer(f"{words} mock:tokens=6")
    assert answer.content == "tok0 tok1 tok2 tok3 tok4 tok5 "


@pytest.mark.parametrize(
    "first, again",
    [
        ("mock:tool=f,g", "mock:tool=f"),
        ("mock:tokens=5", "mock:tokens=3"),
        ("mock:tokens=5", "mock:tool=f mock:notext"),
        ("mock:tool=f", "mock:tool=g"),
    ],
    ids=["fewer calls", "less text", "no text", "another tool"],
)
def test_decoding_restart_with_another_answer(first, again):
    with pytest.raises(proxy.APIError) as caught:
        decoded_text(*answer_lines(first)[:-3], *answer_lines(again))
    assert caught.value.status == 502
    assert caught.value.code == "stream_interrupted"


def test_decoding_restart_arguments_may_hold_any_character():
    call = {"type": "tool_use", "id": "t", "name": "get_weather", "input": {}}
    delta = {"type": "input_json_delta", "partial_json": '{"c": "Zü'}
    broken = [
        message_start(),
        event_line("content_block_start", index=0, content_block=call),
        event_line("content_block_delta", index=0, delta=delta),
    ]
    message = {
        "model": "m",
        "usage": {"output_tokens": 1},
        "content": [{**call, "input": {"c": "Zürich"}}],
        "stop_reason": "tool_use",
    }
    whole_answer = {"type": "assistant", "message": message}
    text = decoded_text(*broken, whole_answer, tools=[tool()])
    assert text == '{"c": "Zürich"}'


# ── Decoding: thinking ───────────────────────────────────────────────────────────


def test_decoding_thinking():
    answer = chat_answer("mock:think=2 mock:tokens=1")
    assert answer.message["reasoning_content"] == "thought0 thought1 "
    assert answer.content == "tok0 "


def test_decoding_restart_does_not_repeat_thinking():
    answer = chat_answer("mock:think=2 mock:tokens=4 mock:cut=2")
    assert answer.message["reasoning_content"] == "thought0 thought1 "
    assert answer.content == "tok0 tok1 tok2 tok3 "


def test_decoding_restart_with_other_thinking_keeps_the_first():
    broken = answer_lines("mock:think=1 mock:tokens=2")[:-3]
    again = answer_lines("mock:think=3 mock:tokens=3")
    _, answer = answer_of([*broken, *again], parse_chat(stream=True))
    assert answer.message["reasoning_content"] == "thought0 "
    assert answer.content == "tok0 tok1 tok2 "


# ── Decoding: failures ───────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "api_status, status",
    [
        (400, 400),
        (401, 401),
        (403, 403),
        (404, 404),
        (413, 413),
        (418, 502),
        (429, 429),
        (500, 502),
        (503, 503),
        (504, 504),
        (529, 503),
    ],
)
def test_failure_status_of_the_api(api_status, status):
    assert chat_failure(f"mock:status={api_status}").status == status


@pytest.mark.parametrize(
    "words, status, code",
    [
        ("mock:category=authentication_failed", 401, "not_logged_in"),
        ("mock:status=403 mock:category=authentication_failed", 401, "not_logged_in"),
        ("mock:category=billing_error", 429, "insufficient_quota"),
        ("mock:category=model_not_found", 404, "model_not_found"),
        ("mock:category=overloaded", 503, "server_is_overloaded"),
        ("mock:category=news", 502, "upstream_error"),
        ("mock:status=400 mock:reason=prompt_too_long", 400, "context_length_exceeded"),
        ("mock:retry=401 mock:pause=0", 401, "not_logged_in"),
        ("mock:retry=429 mock:pause=0", 429, "rate_limit_exceeded"),
        ("mock:shape", 502, "unexpected_line"),
        ("mock:empty", 502, "upstream_error"),
    ],
)
def test_failure_reported_by_the_cli(words, status, code):
    error = chat_failure(words)
    assert error.status == status
    assert error.code == code


@pytest.mark.parametrize("words", ["mock:status=401", "mock:retry=401 mock:pause=0"])
def test_failure_401_says_how_to_log_in(words):
    assert "claude auth login" in chat_failure(words).message


def test_failure_429_of_the_plan_says_when_to_retry():
    error = chat_failure("mock:limit=300 mock:status=429")
    assert 290 <= int(error.headers["Retry-After"]) <= 310
    assert "Retry-After" not in chat_failure("mock:status=429").headers


@pytest.mark.parametrize("status", ["529", "null"])
def test_failure_of_the_api_itself_is_retried_by_the_cli(status):
    answer = chat_answer(f"mock:retry={status} mock:pause=0 mock:tokens=1")
    assert answer.content == "tok0 "


def test_failure_of_the_clis_own_is_400():
    """2.1.112 refuses an image with lines that look like a success."""
    message = {
        "model": "<synthetic>",
        "stop_reason": "stop_sequence",
        "content": text_blocks("Image base64 size exceeds API limit"),
    }
    refusal = {"type": "assistant", "message": message}
    result = {"type": "result", "is_error": False, "result": ""}
    with pytest.raises(proxy.APIError, match="Image base64") as caught:
        decoded_text(refusal, result)
    assert caught.value.status == 400


def test_failure_tool_that_the_cli_drops_is_named(server):
    response = server.chat("x", tools=[tool("odd.name", "dropped")], stream=True)
    assert response.status == 400
    assert "'odd.name'" in response.error["message"]


@pytest.mark.parametrize(
    "words",
    ["mock:status=403", "mock:status=403 mock:category=authentication_failed"],
)
def test_failure_403_keeps_the_words_of_the_api(words):
    assert "mock failure" in chat_failure(words).message


def test_failure_403_of_the_login_says_how_to_log_in():
    words = "mock:status=403 mock:category=authentication_failed"
    error = chat_failure(words)
    assert error.status == 401
    assert "claude auth login" in error.message


# ── Writers: chunks of chat completions ──────────────────────────────────────────


def test_chunk_tool_call_begins_with_its_name():
    stream = chat_stream("mock:tool=get_weather mock:notext", tools=[tool()])
    calls = [delta["tool_calls"] for delta in stream.deltas if "tool_calls" in delta]
    (first,), *rest = calls
    assert first.pop("id").startswith("toolu_")
    function = {"name": "get_weather", "arguments": ""}
    assert first == {"index": 0, "type": "function", "function": function}
    assert rest == [
        [{"index": 0, "function": {"arguments": '{"city"'}}],
        [{"index": 0, "function": {"arguments": ':"Paris'}}],
        [{"index": 0, "function": {"arguments": '"}'}}],
    ]


def test_completion_of_tool_calls_alone_has_null_content():
    answer = chat_answer("mock:tool=get_weather mock:notext", tools=[tool()])
    assert answer.content is None


def test_completion_usage_counts_cached_and_thinking_tokens():
    conversion = chat_conversion(parse_chat(n=2))
    usage = {
        "input_tokens": 1001,
        "cache_read_input_tokens": 20,
        "cache_creation_input_tokens": 300,
        "output_tokens": 5,
        "output_tokens_details": {"thinking_tokens": 4},
    }
    lines = [
        message_start(usage={"output_tokens": 1}),
        event_line("message_delta", delta={}, usage=usage),
        event_line("message_delta", delta={}, usage={"output_tokens": None}),
    ]
    conversion.write(lines, index=0)
    conversion.write([message_start(usage={"input_tokens": 0})], index=1)
    assert conversion.writer.body()["usage"] == {
        "prompt_tokens": 1321,
        "completion_tokens": 5,
        "total_tokens": 1326,
        "prompt_tokens_details": {"cached_tokens": 20},
        "completion_tokens_details": {"reasoning_tokens": 4},
    }


# ── Writers: events of Responses ─────────────────────────────────────────────────


def describe_events(text):
    """Server-sent events as "type place index: what it brings".

    Checks what all of them must have: sequence numbers, and the id of their item.
    """
    described = []
    item_ids = {}
    for number, block in enumerate(text.rstrip("\n").split("\n\n")):
        head, data = block.split("\n")
        event = json.loads(data[len("data: ") :])
        assert head == f"event: {event['type']}"
        assert event["sequence_number"] == number
        place = event.get("output_index")
        if event["type"] == "response.output_item.added":
            item_ids[place] = event["item"]["id"]
            assert event["item"].get("status", "in_progress") == "in_progress"
        if "item_id" in event:
            assert event["item_id"] == item_ids[place]
        described.append(describe_event(event))
    return described


def describe_event(event):
    words = [event["type"].replace("response.", "")]
    if "output_index" in event:
        words.append(str(event["output_index"]))
    if event.get("content_index") == 0:
        words.append("content")
    if event.get("summary_index") == 0:
        words.append("summary")
    text = " ".join(words)
    brings = what_event_brings(event)
    return f"{text}: {brings}" if brings else text


def what_event_brings(event):
    for key in ("delta", "text", "arguments", "input"):
        if key in event:
            return event[key]
    if "item" in event:
        return event["item"].get("name", event["item"]["type"])
    if "response" in event:
        return event["response"]["status"]
    if "error" in event:
        return str(event["error"]["code"])
    return ""


BEGUN = ["created: in_progress", "in_progress: in_progress"]
COMPLETED = "completed: completed"


def message_events(place, *texts):
    deltas = [f"output_text.delta {place} content: {text}" for text in texts]
    return [
        f"output_item.added {place}: message",
        f"content_part.added {place} content",
        *deltas,
        f"output_text.done {place} content: {''.join(texts)}",
        f"content_part.done {place} content",
        f"output_item.done {place}: message",
    ]


def reasoning_events(place, *texts):
    kind = "reasoning_summary"
    deltas = [f"{kind}_text.delta {place} summary: {text}" for text in texts]
    return [
        f"output_item.added {place}: reasoning",
        f"{kind}_part.added {place} summary",
        *deltas,
        f"{kind}_text.done {place} summary: {''.join(texts)}",
        f"{kind}_part.done {place} summary",
        f"output_item.done {place}: reasoning",
    ]


def call_events(place, name, *texts):
    deltas = [f"function_call_arguments.delta {place}: {text}" for text in texts]
    return [
        f"output_item.added {place}: {name}",
        *deltas,
        f"function_call_arguments.done {place}: {''.join(texts)}",
        f"output_item.done {place}: {name}",
    ]


WITH_SUMMARY = {"reasoning": {"summary": "auto"}}
PARIS_PIECES = ('{"city"', ':"Paris', '"}')
ONE_TOKEN = message_events(0, "tok0 ")
TWO_TOKENS = message_events(0, "tok0 ", "tok1 ")


@pytest.mark.parametrize(
    "words, parameters, expected",
    [
        ("mock:tokens=2", {}, [*TWO_TOKENS, COMPLETED]),
        ("mock:think=1 mock:tokens=1", {}, [*ONE_TOKEN, COMPLETED]),
        (
            "mock:think=1 mock:tokens=1",
            WITH_SUMMARY,
            [*reasoning_events(0, "thought0 "), *message_events(1, "tok0 "), COMPLETED],
        ),
        (
            "mock:tool=f,g mock:notext",
            {},
            [
                *call_events(0, "f", *PARIS_PIECES),
                *call_events(1, "g", *PARIS_PIECES),
                COMPLETED,
            ],
        ),
        (
            "mock:tokens=1 mock:tool=f mock:input={}",
            {},
            [*ONE_TOKEN, *call_events(1, "f", "{}"), COMPLETED],
        ),
        (
            "mock:tool=f mock:notext mock:input=none",
            {},
            [*call_events(0, "f", "{}"), COMPLETED],
        ),
        (
            "mock:tokens=2 mock:stop=max_tokens",
            {},
            [*TWO_TOKENS, "incomplete: incomplete"],
        ),
        (
            "mock:tokens=1 mock:stop=refusal",
            {},
            [*ONE_TOKEN, "error: invalid_prompt", "failed: failed"],
        ),
        (
            "mock:tool=mcp__w__look mock:notext",
            {"tools": [NAMESPACE_TOOL]},
            [*call_events(0, "look", *PARIS_PIECES), COMPLETED],
        ),
        (
            'mock:tool=patch mock:notext mock:input={"input":"+a"}',
            {"tools": [CUSTOM_TOOL]},
            [
                "output_item.added 0: patch",
                "custom_tool_call_input.delta 0: +a",
                "custom_tool_call_input.done 0: +a",
                "output_item.done 0: patch",
                COMPLETED,
            ],
        ),
        (
            "mock:tool=StructuredOutput mock:notext",
            {
                "text": {
                    "format": {
                        "type": "json_schema",
                        "name": "x",
                        "schema": CITY_SCHEMA,
                    }
                }
            },
            [*message_events(0, *PARIS_PIECES), COMPLETED],
        ),
    ],
    ids=[
        "text",
        "thinking without summary",
        "thinking with summary",
        "calls",
        "text and call",
        "call without arguments",
        "cut short",
        "refusal",
        "namespace",
        "custom tool",
        "structured output",
    ],
)
def test_responses_events(words, parameters, expected):
    events, body = responses_stream(words, **parameters)
    assert describe_events(events) == BEGUN + expected
    last_data = events.rstrip("\n").rpartition("\ndata: ")[2]
    assert json.loads(last_data)["response"] == body


def test_responses_items_of_calls():
    """The fields that Codex reads."""
    words = "mock:tool=mcp__w__look,patch mock:notext"
    _, body = responses_stream(words, tools=[NAMESPACE_TOOL, CUSTOM_TOOL])
    function, custom = body["output"]
    assert function["type"] == "function_call"
    assert function["name"] == "look"
    assert function["namespace"] == "mcp__w"
    assert function["arguments"] == PARIS
    assert function["id"].startswith("fc_")
    assert custom["type"] == "custom_tool_call"
    assert custom["name"] == "patch"
    assert custom["call_id"].startswith("toolu_")
    assert "arguments" not in custom


def test_responses_answer_cut_short_is_incomplete():
    _, body = responses_stream("mock:tokens=1 mock:stop=max_tokens")
    assert body["status"] == "incomplete"
    assert body["output"][0]["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}


@pytest.mark.parametrize(
    "status, code, code_of_response",
    [
        (503, "server_is_overloaded", "server_is_overloaded"),
        (400, None, "invalid_prompt"),
        (400, "context_length_exceeded", "context_length_exceeded"),
        (502, None, "server_error"),
    ],
)
def test_responses_failure_inside_a_stream(status, code, code_of_response):
    conversion = responses_conversion(parse_responses())
    events = conversion.writer.keep_alive() + conversion.fail(status, "why", code)
    assert describe_events(events)[-2:] == [f"error: {code}", "failed: failed"]
    body = conversion.writer.body()
    assert body["error"] == {"code": code_of_response, "message": "why"}
    assert not body["usage"]


def test_responses_restart_with_more_before_a_call_is_an_error():
    conversion = responses_conversion(parse_responses())
    broken = answer_lines("mock:tokens=1 mock:tool=f")[:-5]
    again = answer_lines("mock:tokens=2 mock:tool=f")
    with pytest.raises(proxy.APIError) as caught:
        conversion.write([*broken, *again])
    assert caught.value.code == "stream_interrupted"


def events_of(text):
    """The events of a stream of /v1/responses."""
    data = [block.rpartition("\ndata: ")[2] for block in text.split("\n\n") if block]
    return [json.loads(one) for one in data]


@pytest.mark.parametrize(
    "usage, cached, written",
    [
        ({"cache_read_input_tokens": 20, "cache_creation_input_tokens": 300}, 20, 300),
        ({"cache_creation_input_tokens": 7}, 0, 7),
        ({}, 0, 0),
    ],
)
def test_responses_usage_tells_what_was_written_to_the_cache(usage, cached, written):
    conversion = responses_conversion(parse_responses())
    conversion.write([message_start(usage={"input_tokens": 1, **usage})])
    conversion.write(answer_lines("mock:tokens=1")[-2:])
    told = conversion.writer.body()["usage"]
    details = {"cached_tokens": cached, "cache_write_tokens": written}
    assert told["input_tokens_details"] == details
    assert told["input_tokens"] == 1 + cached + written


@pytest.mark.parametrize("words", ["mock:tokens=2", "mock:think=1 mock:tokens=1"])
def test_responses_text_events_have_logprobs(words):
    events = events_of(responses_stream(words, reasoning={"summary": "auto"})[0])
    for event in events:
        is_text = event["type"].startswith("response.output_text.")
        assert event.get("logprobs") == ([] if is_text else None)
    assert "response.output_text.done" in [event["type"] for event in events]


@pytest.mark.parametrize(
    "status, code, type_",
    [
        (503, "server_is_overloaded", "overloaded_error"),
        (429, "rate_limit_exceeded", "rate_limit_error"),
        (400, None, "invalid_request_error"),
    ],
)
def test_responses_error_event_is_flat_and_nested(status, code, type_):
    conversion = responses_conversion(parse_responses())
    events = events_of(
        conversion.writer.keep_alive() + conversion.fail(status, "w", code)
    )
    error = events[-2]
    flat = {"message": "w", "code": code, "param": None}
    assert {name: error[name] for name in flat} == flat
    assert error["error"] == {**flat, "type": type_}
    assert error["type"] == "error"


# OpenAI's own, and one that Codex knows.
CODES_OF_FAILED = {
    "server_error",
    "rate_limit_exceeded",
    "invalid_prompt",
    "context_length_exceeded",
    "insufficient_quota",
    "server_is_overloaded",
}


@pytest.mark.parametrize(
    "status, code, told",
    [
        (401, "not_logged_in", "invalid_prompt"),
        (403, "permission_denied", "invalid_prompt"),
        (404, "model_not_found", "invalid_prompt"),
        (413, "request_too_large", "invalid_prompt"),
        (429, "rate_limit_exceeded", "rate_limit_exceeded"),
        (429, "insufficient_quota", "insufficient_quota"),
        (500, None, "server_error"),
        (502, "stream_interrupted", "server_error"),
        (502, "cli_died", "server_error"),
        (502, "upstream_error", "server_error"),
        (503, "stopping", "server_error"),
        (503, "no_cli", "server_error"),
        (504, "timeout", "server_error"),
        (504, "upstream_timeout", "server_error"),
    ],
)
def test_responses_code_of_a_failed_response_is_one_of_openais(status, code, told):
    conversion = responses_conversion(parse_responses())
    conversion.fail(status, "why", code)
    assert conversion.writer.body()["error"]["code"] == told
    assert told in CODES_OF_FAILED


def response_for(**parameters):
    """The body of a response to a request with these parameters."""
    return responses_stream("mock:tokens=1", **parameters)[1]


def test_responses_body_has_all_that_the_open_responses_suite_asks_for():
    body = response_for()
    assert body["completed_at"] == 0  # the clock of these tests
    defaults = {
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "top_logprobs": 0,
        "max_tool_calls": None,
        "background": False,
        "service_tier": "default",
        "safety_identifier": None,
        "prompt_cache_key": None,
        "temperature": 1.0,
        "top_p": 1.0,
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": None, "summary": None},
        "tool_choice": "auto",
        "truncation": "disabled",
    }
    assert {name: body[name] for name in defaults} == defaults


@pytest.mark.parametrize(
    "name, given, echoed",
    [
        ("temperature", 0.5, 0.5),
        (
            "text",
            {"verbosity": "low"},
            {"format": {"type": "text"}, "verbosity": "low"},
        ),
        ("text", {"format": None}, {"format": {"type": "text"}}),
        ("reasoning", {"effort": "low"}, {"effort": "low", "summary": None}),
        ("reasoning", {"summary": "auto"}, {"effort": None, "summary": "auto"}),
        ("metadata", None, {}),
        ("tools", None, []),
        ("prompt_cache_key", "k", "k"),
        ("parallel_tool_calls", False, False),
    ],
)
def test_responses_echo_is_completed_by_its_defaults(name, given, echoed):
    assert response_for(**{name: given})[name] == echoed


@pytest.mark.parametrize("given", [{}, {"strict": True}, {"description": "d"}])
def test_responses_echoed_tool_is_completed_by_its_defaults(given):
    one = {"type": "function", "name": "f", **given}
    defaults = {"description": None, "parameters": None, "strict": False}
    conversion = responses_conversion(parse_responses(tools=[one, CUSTOM_TOOL]))
    assert conversion.writer.body()["tools"] == [{**defaults, **one}, CUSTOM_TOOL]


@pytest.mark.parametrize("given, told", [(None, True), (True, True), (False, False)])
def test_responses_store_tells_the_truth(given, told):
    conversion = responses_conversion(parse_responses(store=given))
    conversion.write(answer_lines("mock:tokens=1"))
    cache = proxy.AnswerCache()
    conversion.writer.remember(cache)
    assert conversion.writer.body()["store"] is told
    assert (cache.find_conversation(conversion.writer.body()["id"]) is not None) is told


@pytest.mark.parametrize(
    "words", ["mock:stop=refusal mock:tokens=1", "mock:stop=max_tokens mock:tokens=1"]
)
def test_responses_store_of_an_answer_that_is_not_complete(words):
    conversion = responses_conversion(parse_responses())
    conversion.write(answer_lines(words))
    conversion.writer.end()
    cache = proxy.AnswerCache()
    conversion.writer.remember(cache)
    body = conversion.writer.body()
    assert (cache.find_conversation(body["id"]) is not None) is body["store"]


# ── Installation ─────────────────────────────────────────────────────────────────


def test_installation_is_found_once_it_is_there(start_server, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(proxy, "CLI_INSTALL_DIRECTORIES", ["~/.local/bin"])
    monkeypatch.setattr(proxy, "PROBE_SECONDS", 0)
    server = start_server(claude="")
    response = server.chat("hi")
    assert response.status == 503
    assert "npm install" in response.error["message"]
    assert server.request("GET", "/health").status == 503
    directory = tmp_path / ".local" / "bin"
    directory.mkdir(parents=True)
    # This file itself as `claude`, as a user may try it.
    text = f'#!/bin/sh\nexec {sys.executable} {__file__} "$@"\n'
    path = write_script(directory / "claude", text)
    response = server.chat("hi")
    assert response.status == 200, response.text
    assert response.content == "You said: hi "
    assert server.health()["claude"]["path"] == path


def test_installation_too_old(start_server, monkeypatch):
    monkeypatch.setenv("STAND_IN_VERSION", "2.1.86")
    response = start_server().chat("hi")
    assert response.status == 503
    assert "claude update" in response.error["message"]


def test_installation_newest_node_version_wins(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    for version in ("v9.1.0", "v22.1.0", "v20.3.0"):
        directory = tmp_path / ".nvm" / "versions" / "node" / version / "bin"
        directory.mkdir(parents=True)
        write_script(directory / "claude", "#!/bin/sh\n")
    at_home = [
        place for place in proxy.CLI_INSTALL_DIRECTORIES if place.startswith("~")
    ]
    monkeypatch.setattr(proxy, "CLI_INSTALL_DIRECTORIES", at_home)
    assert "v22.1.0" in proxy.find_cli("")


def test_installation_relative_path_entry(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    shutil.copy(STAND_IN, tmp_path / "bin" / "claude")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "bin")
    assert proxy.find_cli("") == str(tmp_path / "bin" / "claude")


def test_installation_cli_finds_the_node_beside_it(start_server, monkeypatch, tmp_path):
    path = write_script(tmp_path / "claude", "#!/usr/bin/env node-of-nvm\n")
    node = f'#!/bin/sh\nshift\nexec {STAND_IN} "$@"\n'
    write_script(tmp_path / "node-of-nvm", node)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert start_server(claude=path).chat("hi").content == "You said: hi "


def test_login_missing(start_server, monkeypatch):
    monkeypatch.setenv("STAND_IN_LOGIN", "no")
    response = start_server().request("GET", "/health")
    assert response.status == 503
    assert "claude auth login" in response.json["message"]


def test_login_refused_by_the_api_shows_in_health(server):
    server.chat("mock:status=401")
    assert server.request("GET", "/health").status == 503
    server.chat("hi")
    assert server.request("GET", "/health").status == 200


def test_login_is_looked_up_once(start_server, tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN_LOGIN", "no")
    calls = tmp_path / "calls"
    text = f'#!/bin/sh\necho >>{calls}\nexec {STAND_IN} "$@"\n'
    server = start_server(claude=write_script(tmp_path / "claude", text))
    run_in_threads(*[server.health] * 9)
    assert len(calls.read_text()) == 2  # its version, and its login


BILLING = [
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


def test_billing_variables_are_kept_from_the_cli(start_server, monkeypatch):
    for name in BILLING:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CLAUDE_CODE_OAUTH_TOKEN", "t")
    env = start_server().received("x")["env"]
    assert not set(BILLING) & set(env)
    assert env["CLAUDE_CODE_OAUTH_TOKEN"] == "t"


@pytest.mark.parametrize("name", BILLING)
def test_billing_variable_is_named_once(capsys, monkeypatch, start_server, name):
    monkeypatch.setenv(name, "1")
    code, out = run_check(capsys)
    assert code == 0
    assert out.count(name) == 1
    start_server().announce()
    assert capsys.readouterr().err.count(name) == 1


def test_billing_variables_that_are_empty_are_not_named(capsys, monkeypatch):
    for name in BILLING:
        monkeypatch.setenv(name, "")
    assert "billed" not in run_check(capsys)[1]


@pytest.fixture(params=["api_key", "third_party"])
def billed_login(request, monkeypatch):
    """A login that does not use the subscription."""
    auth = {"authMethod": request.param, "subscriptionType": None}
    monkeypatch.setenv("STAND_IN_AUTH", json.dumps(auth))


def test_billed_login_is_a_problem_of_the_check(capsys, billed_login):
    code, out = run_check(capsys)
    assert code == 1
    assert "every token is billed" in out
    assert "claude auth login" in out


def test_billed_login_is_a_problem_of_the_banner(capsys, billed_login, start_server):
    start_server().announce()
    (line,) = re.findall(".*every token is billed.*", capsys.readouterr().err)
    assert line.startswith("problem: ")
    assert "claude auth login" in line


def test_billed_login_is_a_problem_of_health(billed_login, start_server):
    response = start_server().request("GET", "/health")
    assert response.status == 503
    assert "every token is billed" in response.json["message"]


@pytest.mark.parametrize("words", ["hi", "mock:status=401"])
def test_billed_login_stays_a_problem_after_an_answer(
    billed_login, start_server, words
):
    server = start_server()
    server.chat(words)
    server.chat("hi")
    assert server.request("GET", "/health").status == 503


@pytest.mark.parametrize("method", ["claude.ai", "oauth_token"])
def test_login_of_a_subscription_is_no_problem(capsys, monkeypatch, method):
    monkeypatch.setenv("STAND_IN_AUTH", json.dumps({"authMethod": method}))
    code, out = run_check(capsys)
    assert code == 0
    assert method in out


@pytest.mark.parametrize("words", ["hi", "mock:status=401"])
def test_login_tells_type_and_tier_of_the_plan(start_server, words):
    server = start_server()
    server.chat(words)
    server.chat("hi")
    plan = server.health()["plan"]
    assert (plan["type"], plan["tier"]) == ("max", "max_20x")


@pytest.mark.parametrize("auth", [{"planTier": None}, {"subscriptionType": 5}])
def test_login_that_tells_less_has_null(start_server, monkeypatch, auth):
    monkeypatch.setenv("STAND_IN_AUTH", json.dumps(auth))
    plan = start_server().health()["plan"]
    assert None in (plan["type"], plan["tier"])


def is_asking_for(server, word):
    """Whether the CLI is being asked for its version or its login."""
    process = server.service.installation.running_command
    return process is not None and word in process.args


@pytest.mark.parametrize("path", ["/health", "/status"])
def test_login_that_is_slow_to_tell_delays_no_answer(start_server, monkeypatch, path):
    monkeypatch.setenv("STAND_IN_AUTH_SECONDS", "60")
    server = start_server()
    with server.connect() as asking:
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"
        asking.sendall(head.encode())
        wait_until(lambda: is_asking_for(server, "auth"))
        assert server.chat("hi", stream=True).done
        assert server.respond("hi").json["status"] == "completed"
        assert not select.select([asking], [], [], 0)[0]
        server.close()


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/sonnet", "/"])
def test_installation_cli_that_hangs_keeps_nothing_else_waiting(
    start_server, tmp_path, path
):
    script = write_script(tmp_path / "claude", "#!/bin/sh\nexec sleep 60\n")
    server = start_server(claude=script)
    with open_request(server.port, "hi", False) as asking:
        wait_until(lambda: is_asking_for(server, "--version"))
        with server.connect() as connection:
            head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"
            connection.sendall(head.encode())
            assert read_until(connection, b"HTTP/1.1 (...)")[1] == b"200"
        assert not select.select([asking], [], [], 0)[0]
        server.close()


# The models of the CLI.

README_MODELS = ["claude-opus-4", "claude-sonnet-4", "claude-haiku-4"]


def listed_models(server):
    return [one["id"] for one in server.request("GET", "/v1/models").json["data"]]


def server_that_knows_models(start_server, **settings):
    """A server that has asked the CLI for its models."""
    server = start_server(**settings)
    server.health()
    wait_until(server.knows_models)
    return server


def test_models_are_those_of_the_cli(start_server):
    server = server_that_knows_models(start_server)
    assert listed_models(server) == [
        *README_MODELS,
        "default",
        "claude-opus-5-5",
        "opus",
        "fable",
        "claude-fable-5-2",
        "sonnet",
        "claude-sonnet-5-5",
        "haiku",
        "claude-haiku-5-5",
    ]
    model = server.request("GET", "/v1/models/fable").json
    assert model["display_name"] == "Fable"
    assert model["description"] == FABLE


def test_models_until_the_cli_is_known(start_server):
    server = start_server(claude="/nowhere")
    assert listed_models(server) == [*README_MODELS, "opus", "sonnet", "haiku"]
    assert server.chat("hi", "fable").status == 404


OFFERS = ["default", "opus[1m]", "fable", "saga-of-2028"]


@pytest.mark.parametrize("name", OFFERS)
def test_models_that_the_cli_offers_are_accepted(start_server, monkeypatch, name):
    monkeypatch.setenv("STAND_IN_MODELS", json.dumps(OFFERS))
    server = server_that_knows_models(start_server)
    argv = server.received("x", model=f"openai/{name}")["argv"]
    assert argv[argv.index("--model") + 1] == name
    assert server.respond("x", model=name).status == 200
    path = "/v1/models/" + name.replace("[", "%5B").replace("]", "%5D")
    assert server.request("GET", path).json["id"] == name
    assert name in server.chat("hi", "gpt-4o").error["message"]


def changed_cli(path):
    """Change the file of a CLI, as an update does."""
    with open(path, "a") as script:
        script.write("\n# changed\n")


@pytest.mark.parametrize("change", ["CLI", "login"])
def test_models_are_asked_again_after_a_change(
    start_server, monkeypatch, tmp_path, change
):
    log = tmp_path / "log"
    monkeypatch.setenv("STAND_IN_LOG", str(log))
    path = shutil.copy(STAND_IN, tmp_path / "claude")
    server = server_that_knows_models(start_server, claude=str(path))
    wait_until(server.is_idle)
    assert len(log.read_text().split()) == 1  # it was asked once
    server.may_ask_for_models()
    monkeypatch.setenv("STAND_IN_MODELS", '["saga"]')
    if change == "CLI":
        changed_cli(path)
    else:
        server.chat("mock:status=401")
    server.chat("hi")

    def offers_saga():
        server.wake()
        return "saga" in listed_models(server)

    wait_until(offers_saga)
    assert "fable" not in listed_models(server)


@pytest.mark.parametrize("models", ["[]", "[5]", '["-p"]', "{}"])
def test_models_of_an_odd_list_leave_those_of_today(start_server, monkeypatch, models):
    monkeypatch.setenv("STAND_IN_MODELS", models)
    server = server_that_knows_models(start_server)
    assert listed_models(server)[:3] == README_MODELS
    assert server.chat("hi", "opus").status == 200


def test_models_are_not_asked_for_in_the_way_of_a_request(
    start_server, tmp_path, monkeypatch
):
    log = tmp_path / "log"
    monkeypatch.setenv("STAND_IN_LOG", str(log))
    server = start_server()
    with open_request(server.port, "mock:gap_ms=60000 mock:tokens=2", True) as client:
        read_until(client, b"tok0")
        server.health()
        server.wait_for_tick()
        server.wait_for_tick()
        assert len(log.read_text().split()) == 1
    wait_until(server.is_idle)
    wait_until(server.knows_models)


def test_banner_and_check_name_the_models(capsys, start_server):
    code, out = run_check(capsys)
    assert code == 0
    assert "fable" in out
    start_server().announce()
    assert "fable" in capsys.readouterr().err


# ── CLI process ──────────────────────────────────────────────────────────────────


def test_process_directory_is_empty_and_private(start_server):
    server = start_server()
    directory = server.received("x")["cwd"]
    assert os.listdir(directory) == []
    assert os.stat(directory).st_mode & 0o777 == 0o700
    server.close()
    assert not os.path.exists(directory)


def test_process_temporary_files_are_removed(server):
    received = server.received([])
    directory = server.cli_directory()
    assert os.path.dirname(received["env"]["CLAUDE_CODE_TMPDIR"]) == directory
    rest = {proxy.CLI_WORKDIR, proxy.LOCK_FILE}
    wait_until(lambda: set(os.listdir(directory)) == rest)


@pytest.mark.parametrize(
    "words",
    [
        "mock:line=5000000",
        "mock:stderr=2000000",
        "mock:halves",
        "mock:garbage",
        "mock:bytes=" + b'{"type":"result","result":"\xff"}\n'.hex(),
        "mock:bytes=" + b'{"type":"rate_limit_event"}\n'.hex(),
    ],
    ids=[
        "long line",
        "long stderr",
        "lines in halves",
        "garbage",
        "not UTF-8",
        "limit",
    ],
)
def test_process_noise_is_no_fault(server, words):
    assert server.chat(words).content == "tok0 tok1 tok2 tok3 tok4 "


INCOMPLETE_LINE = b'{"type":"stream_ev'.hex()
STRANGE_REQUEST = b'{"type":"control_request","request":[]}\n'.hex()


@pytest.mark.parametrize(
    "stream, words, status, code",
    [
        (True, "mock:exit=3", 502, "cli_died"),
        (False, "mock:exit=0", 502, "cli_died"),
        (True, f"mock:bytes={INCOMPLETE_LINE} mock:exit=0", 502, "cli_died"),
        (True, f"mock:bytes={STRANGE_REQUEST}", 502, "unexpected_line"),
        (True, "mock:retry=429", 429, "rate_limit_exceeded"),  # while the CLI waits
    ],
    ids=[
        "exit 3",
        "exit 0",
        "incomplete line",
        "strange request",
        "retry",
    ],
)
def test_process_failure(server, stream, words, status, code):
    response = server.chat(words, stream=stream)
    assert response.status == status
    assert response.error["code"] == code


def test_process_line_without_an_end(server, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_CLI_LINE_BYTES", 200_000)
    assert server.chat("mock:line=100000").status == 200
    assert server.chat("mock:line=900000").status == 502


def test_process_that_cannot_be_started_is_a_503(start_server, tmp_path):
    path = shutil.copy(STAND_IN, tmp_path / "claude")
    server = start_server(claude=str(path))
    assert server.chat("a").status == 200
    os.chmod(path, 0o644)
    response = server.chat("a")
    os.chmod(path, 0o755)
    assert response.status == 503
    assert response.error["code"] == "no_cli"
    assert "can't be started" in response.error["message"]
    assert server.chat("b").status == 200


def test_process_that_closes_its_stdin_is_not_written_to_for_ever(tmp_path):
    path = write_script(tmp_path / "claude", "#!/bin/sh\nexec 0<&-\nsleep 60\n")
    process = start_cli_process(path, tmp_path)
    send_system_prompt(process, "x" * 3_000_000)

    def has_given_up():
        process.write()
        return not process.write_buffer

    wait_until(has_given_up)
    process.stop(signal.SIGKILL)
    wait_until(process.reap)


def test_process_stubborn_and_its_children_are_killed(server):
    words = "mock:stubborn mock:child mock:gap_ms=60000"
    with open_request(server.port, words, True) as connection:
        child = read_child_pid(connection)
    wait_until(lambda: has_exited(child), 5)
    wait_until(server.is_idle, 5)


# ── Process pool ─────────────────────────────────────────────────────────────────
# First the rules of SparePool, on made-up processes; then the pool of a server.


class MadeUpProcess:
    """What SparePool looks at of a process."""

    fits = proxy.CliProcess.fits

    def __init__(self, *turns, system="s", age=10.0, idle=0.0, version=(2, 1, 332)):
        self.binary = proxy.CliBinary("claude", version, (1,))
        self.sent = sent_state(*turns, system=system) if turns else BLANK_STATE
        self.born = 100.0 - age
        self.last_activity = 100.0 - idle
        self.unsent = []


BLANK_STATE = proxy.SentState("sonnet")
NEWEST_CLI = proxy.CliBinary("claude", (2, 1, 332), (1,))


def sent_state(*turns, system="s", model="sonnet"):
    lines = tuple(proxy.CliLine(turn) for turn in turns)
    return proxy.SentState(model, proxy.initialize_options(system, []), lines)


def spare_pool(*processes, capacity=3):
    pool = proxy.SparePool(capacity)
    pool.processes = list(processes)
    return pool


def test_spare_pool_chooses_the_process_that_is_ready_first():
    blank = MadeUpProcess(age=10)
    prepared_with_one = MadeUpProcess("a", age=5)
    prepared_with_two = MadeUpProcess("a", "b", age=5)
    pool = spare_pool(blank, prepared_with_one, prepared_with_two)
    wanted = sent_state("a", "b", "c")
    assert pool.choose(NEWEST_CLI, wanted, 100.0) is prepared_with_two
    wanted = sent_state("a", "z")
    assert pool.choose(NEWEST_CLI, wanted, 100.0) is prepared_with_one
    wanted = sent_state("z")
    assert pool.choose(NEWEST_CLI, wanted, 100.0) is blank


def test_spare_pool_prefers_a_started_process_to_a_starting_one():
    blank = MadeUpProcess(age=10)
    starting = MadeUpProcess("a", "b", age=0)
    pool = spare_pool(starting, blank)
    assert pool.choose(NEWEST_CLI, sent_state("a", "b"), 100.0) is blank
    long_conversation = [str(number) for number in range(100)]
    starting = MadeUpProcess(*long_conversation, age=0)
    pool = spare_pool(starting, blank)
    wanted = sent_state(*long_conversation)
    assert pool.choose(NEWEST_CLI, wanted, 100.0) is starting


def test_spare_pool_of_equal_spares_the_older_is_chosen():
    older = MadeUpProcess(age=0.4)
    younger = MadeUpProcess(age=0.1)
    pool = spare_pool(younger, older)
    assert pool.choose(NEWEST_CLI, sent_state("a"), 100.0) is older


def test_spare_pool_does_not_choose_what_does_not_fit():
    other_system = MadeUpProcess("a", system="other")
    other_turn = MadeUpProcess("z")
    pool = spare_pool(other_system, other_turn)
    assert pool.choose(NEWEST_CLI, sent_state("a", "b"), 100.0) is None
    pool = spare_pool(MadeUpProcess())
    replaced_cli = proxy.CliBinary("claude", (2, 1, 332), (2,))
    assert pool.choose(replaced_cli, sent_state("a"), 100.0) is None


@pytest.mark.parametrize(
    "version, turns, fits",
    [((2, 1, 329), [], True), ((2, 1, 328), [], False), ((2, 1, 329), ["a"], False)],
)
def test_spare_pool_another_model_fits_up_to_the_first_turn(version, turns, fits):
    process = MadeUpProcess(*turns, version=version)
    wanted = sent_state("a", "b", model="opus")
    chosen = spare_pool(process).choose(process.binary, wanted, 100.0)
    assert chosen is (process if fits else None)


def test_spare_pool_keeps_one_without_a_conversation():
    wanted = sent_state("a")
    one = spare_pool(MadeUpProcess(), MadeUpProcess("z"))
    assert one.choose_for_conversation(NEWEST_CLI, wanted, 100.0) is None
    blank = MadeUpProcess()
    two = spare_pool(blank, MadeUpProcess())
    assert two.choose_for_conversation(NEWEST_CLI, wanted, 100.0) is blank
    begun = MadeUpProcess("a")
    pool = spare_pool(MadeUpProcess(), begun)
    chosen = pool.choose_for_conversation(NEWEST_CLI, sent_state("a", "b"), 100.0)
    assert chosen is begun


def test_spare_pool_gives_up_the_conversation_used_least_recently():
    least_recent = MadeUpProcess("a")
    pool = spare_pool(least_recent, MadeUpProcess("b"), MadeUpProcess(), capacity=3)
    assert pool.choose_to_give_up() is least_recent
    pool = spare_pool(MadeUpProcess("a"), MadeUpProcess(), capacity=3)
    assert pool.choose_to_give_up() is None


@pytest.mark.parametrize(
    "ages, expired",
    [
        ([700, 10], 0),  # older than SPARE_SECONDS
        ([10, 700], 1),
        ([700, 0], None),  # the newest is still starting
        ([10, 10], None),
    ],
)
def test_spare_pool_old_spares_expire_when_the_newest_has_started(ages, expired):
    processes = [MadeUpProcess(age=age) for age in ages]
    chosen = spare_pool(*processes).choose_expired(100.0)
    assert chosen is (None if expired is None else processes[expired])


def test_spare_pool_paused_conversation_expires():
    paused = MadeUpProcess("a", idle=2 * proxy.IDLE_CONVERSATION_SECONDS)
    idle_blank = MadeUpProcess(idle=2 * proxy.IDLE_CONVERSATION_SECONDS)
    assert spare_pool(idle_blank, paused).choose_expired(100.0) is paused
    assert spare_pool(idle_blank).choose_expired(100.0) is None


def test_pool_starts_with_the_server(spare_server):
    spare_server.announce()
    assert spare_server.spare_states() == [BLANK, BLANK]
    _, used_spare = spare_server.chat_with_spare("a")
    assert used_spare


@pytest.mark.parametrize(
    "messages, parameters",
    [
        ([user("a")], {}),
        (dialogue("a", "b", "c"), {}),  # examples in front
        ([user("a")], {"tools": [tool()]}),
    ],
    ids=["one turn", "few-shot", "tools"],
)
def test_pool_first_request_is_no_reason_to_prepare_its_next_turn(
    spare_server, messages, parameters
):
    spare_server.announce()
    for _ in range(2):
        _, used_spare = spare_server.chat_with_spare(messages, **parameters)
        assert used_spare
        assert spare_server.spare_states() == [BLANK, BLANK]


def begin_conversation(server, first="a", system_text="s"):
    """Ask twice; return the history. A spare then holds the conversation."""
    history = [system(system_text), user(first)]
    for text in ("b", "c"):
        server.settle()
        history += [server.chat(history).message, user(text)]
    return history


def test_pool_continued_conversation_is_prepared(spare_server):
    spare_server.announce()
    history = begin_conversation(spare_server)
    assert spare_server.spare_states() == [prepared(4), BLANK]
    history[-1] = user("mock:show")
    response, used_spare = spare_server.chat_with_spare(history)
    assert used_spare
    turns = json.loads(response.content)["turns"]
    roles = [turn["role"] for turn in turns]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
    assert turns[3]["content"] == text_blocks("You said: b ")


def test_pool_prepared_spare_serves_the_next_turn_of_the_other_endpoint(spare_server):
    spare_server.announce()
    history = begin_conversation(spare_server)
    items = [{"type": "message", **message} for message in history]
    _, used_spare = spare_server.uses_spare(lambda: spare_server.respond(items))
    assert used_spare
    assert spare_server.spare_states() == [prepared(6), BLANK]


def test_pool_tool_loop_is_prepared_from_its_first_call(spare_server):
    spare_server.announce()
    words = "mock:tool=get_weather mock:tokens=1"
    history = [user(f"mock:think=1 {words}")]
    for step in range(3):
        response, used_spare = spare_server.chat_with_spare(history, tools=[tool()])
        assert used_spare
        assert spare_server.spare_states() == [prepared(2 * step + 2), BLANK]
        call_id = response.tool_calls[0]["id"]
        history += [response.message, tool_message(words, call_id)]
    first_answers = []
    for process in spare_server.spares():
        turns = turns_sent_to(process)
        if turns:
            first_answers.append([block["type"] for block in turns[1]["content"]])
    assert first_answers == [["thinking", "text", "tool_use"]]


@pytest.mark.parametrize("keepalive_seconds", [10, 0])
def test_pool_prepares_a_spare_when_the_answer_begins(
    spare_server, keepalive_seconds, monkeypatch
):
    """It takes in the turns of the request while the answer comes.

    Also if a chunk that only kept the stream alive came first.
    """
    spare_server.announce()
    monkeypatch.setattr(proxy, "KEEPALIVE_SECONDS", keepalive_seconds)
    monkeypatch.setattr(proxy, "POLL_SECONDS", 0.01)
    before = [user("a"), spare_server.chat("a").message]
    spare_server.settle()
    words = "mock:delay_ms=100 mock:tokens=2 mock:gap_ms=60000"
    connection = open_request(spare_server.port, words, True, before)

    def has_prepared_spare():
        return any(turns_sent_to(process) for process in spare_server.spares())

    wait_until(has_prepared_spare)
    wait_until(lambda: all(map(has_sent_all, spare_server.spares())))
    connection.close()
    # An answer that was cut short is not sent to it.
    assert spare_server.spare_states() == [prepared(3), BLANK]
    history = [*before, user(words), assistant("half of")]
    received = spare_server.received(history, model="opus")
    texts = [turn["content"][0]["text"] for turn in received["turns"][2:4]]
    assert texts == [words, "half of"]


def test_pool_failed_answer_is_not_sent_to_a_spare(spare_server):
    spare_server.announce()
    history = [user("a"), spare_server.chat("a").message]
    # Slowly, so that the answer has begun when it fails.
    history.append(user("mock:cut=2 mock:else=other mock:gap_ms=200"))
    spare_server.settle()
    assert spare_server.chat(history).status == 502
    assert spare_server.spare_states() == [prepared(3), BLANK]


def test_pool_one_of_several_answers_is_not_sent_to_a_spare(spare_server):
    spare_server.announce()
    history = [user("a"), spare_server.chat("a").message, user("b")]
    assert spare_server.chat(history, n=2).status == 200
    assert spare_server.spare_states() == [BLANK, BLANK]


OTHER_CONVERSATIONS = {
    "another system prompt": lambda history: [system("other"), *history[1:]],
    "an edited earlier turn": lambda history: [
        history[0],
        user("edited"),
        *history[2:],
    ],
    "an edited answer": lambda history: [
        *history[:-2],
        assistant("edited"),
        history[-1],
    ],
    "another conversation": lambda history: [history[0], *dialogue("z", "y", "x")],
    "a shorter one": lambda history: history[:2],
}


@pytest.mark.parametrize("difference", list(OTHER_CONVERSATIONS))
def test_pool_prepared_spare_does_not_serve_another_conversation(
    spare_server, difference
):
    spare_server.announce()
    history = begin_conversation(spare_server)
    assert spare_server.spare_states() == [prepared(4), BLANK]
    messages = OTHER_CONVERSATIONS[difference](history)
    received = spare_server.received([*messages, assistant("ok")])
    texts = []
    for turn in received["turns"]:
        texts += [block["text"] for block in turn["content"]]
    wanted = [message["content"] for message in messages[1:]]
    assert texts == [*wanted, "ok", "mock:show"]
    assert received["initialize"]["systemPrompt"] == [messages[0]["content"]]


@pytest.mark.parametrize(
    "parameters, env",
    [
        (
            {"max_tokens": 9000, "reasoning_effort": "low"},
            {
                "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "9000",
                "CLAUDE_CODE_EFFORT_LEVEL": "low",
            },
        ),
        ({"reasoning_effort": "none"}, {"CLAUDE_CODE_DISABLE_THINKING": "1"}),
        (
            {"tool_choice": "none"},
            {"CLAUDE_CODE_EXTRA_BODY": '{"tool_choice": {"type": "none"}}'},
        ),
    ],
    ids=["max_tokens and effort", "no thinking", "tool_choice"],
)
def test_pool_prepared_spare_takes_any_options(spare_server, parameters, env):
    spare_server.announce()
    history = [user("mock:tool=get_weather")]
    response = spare_server.chat(history, tools=[tool()])
    call_id = response.tool_calls[0]["id"]
    history += [response.message, tool_message("mock:show", call_id)]
    assert spare_server.spare_states() == [prepared(2), BLANK]
    response, used_spare = spare_server.chat_with_spare(
        history, tools=[tool()], **parameters
    )
    assert used_spare
    received = json.loads(response.content)
    assert received["settings"] == [{"env": env}]
    assert len(received["turns"]) == 3


@pytest.mark.parametrize("version, late", [("2.1.330", True), ("2.1.328", False)])
def test_pool_spare_takes_another_model(start_server, monkeypatch, version, late):
    """Newer CLIs take another model up to the first turn."""
    monkeypatch.setenv("STAND_IN_VERSION", version)
    server = start_server(spares=2)
    server.announce()
    assert server.spare_states() == [BLANK, BLANK]
    history = dialogue("a", "b", "mock:show")
    received = json.loads(server.chat(history, model="opus").content)
    assert ("opus" in received["argv"]) is not late
    assert ({"model": "opus"} in received["settings"]) is late


def test_pool_true_is_not_1(spare_server):
    """To Python they are equal; to the API they are not."""
    first = sent_state("a")
    other = proxy.SentState("sonnet", proxy.initialize_options("s", [{"x": True}]))
    same = proxy.SentState("sonnet", proxy.initialize_options("s", [{"x": 1}]))
    assert first.initialize != other.initialize
    assert other.initialize != same.initialize

    def history(value):
        arguments = json.dumps({"x": value})
        call = assistant_calls(tool_call(arguments=arguments))
        return [user("a"), call, tool_message(), user("mock:show")]

    answer = spare_server.chat(history(1), tools=[tool()]).message
    messages = [*history(True), answer, user("mock:show")]
    received = json.loads(spare_server.chat(messages, tools=[tool()]).content)
    assert received["turns"][1]["content"][0]["input"]["x"] is True


def test_pool_spare_knows_a_wrapped_input(spare_server):
    spare_server.announce()
    tools = [tool("look", parameters=ODD_SCHEMA)]
    history = [user('mock:tool=look mock:input={"input":{"$filter":1}}')]
    message = spare_server.chat(history, tools=tools).message
    assert spare_server.spare_states() == [prepared(2), BLANK]
    call_id = message["tool_calls"][0]["id"]
    history += [message, tool_message("mock:show", call_id)]
    response, used_spare = spare_server.chat_with_spare(history, tools=tools)
    assert used_spare
    turns = json.loads(response.content)["turns"]
    assert turns[1]["content"][-1]["input"] == {"input": {"$filter": 1}}


def test_pool_spare_knows_custom_calls(spare_server):
    spare_server.announce()
    tools = [CUSTOM_TOOL, NAMESPACE_TOOL]
    words = 'mock:tool=patch,mcp__w__look mock:input={"input":"*"}'
    items = [user(words)]
    output = spare_server.respond(items, tools=tools).json["output"]
    assert spare_server.spare_states() == [prepared(2), BLANK]
    _, custom, function = output
    assert (custom["name"], custom["input"]) == ("patch", "*")
    assert function["name"] == "look"
    items += [
        *output,
        call_output_item(custom["call_id"], "done", "custom_tool_call_output"),
        call_output_item(function["call_id"], "mock:show"),
    ]
    response, used_spare = spare_server.uses_spare(
        lambda: spare_server.respond(items, tools=tools)
    )
    assert used_spare
    text = response.json["output"][0]["content"][0]["text"]
    blocks = json.loads(text)["turns"][1]["content"]
    inputs = [block["input"] for block in blocks if block["type"] == "tool_use"]
    assert inputs == [{"input": "*"}, {"input": "*"}]


def test_pool_two_conversations_by_turns_keep_their_spares(start_server):
    server = start_server(spares=3)
    server.announce()
    histories = [[user("a")], [user("b")]]
    for step in range(4):
        for history in histories:
            response, used_spare = server.chat_with_spare(history)
            assert used_spare
            if step > 1:
                texts = [texts_sent_to(process) for process in server.spares()]
                assert sorted(text[0] for text in texts if text) == ["a", "b"]
            history += [response.message, user("next")]
    assert server.spare_states() == [prepared(8), prepared(8), BLANK]


@pytest.mark.parametrize("spares", [1, 2, 3])
def test_pool_size_is_bounded_and_one_is_always_blank(start_server, spares):
    server = start_server(spares=spares)
    server.announce()
    for text in "abc":
        begin_conversation(server, text)
        server.settle()
        assert len(server.spares()) == spares
        assert BLANK in server.spare_states()
    states = server.spare_states()
    assert states == [prepared(4)] * (spares - 1) + [BLANK]


def test_pool_spare_is_taken_once(spare_server):
    spare_server.chat("a")
    spare_server.settle()
    taken = run_in_threads(*[spare_server.take_spare] * 8)
    processes = [process for process in taken if process]
    assert len(processes) == 2
    assert processes[0] is not processes[1]
    for process in processes:
        spare_server.retire(process)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_pool_spare_that_is_dead_or_stopped_is_replaced_unseen(
    spare_server, monkeypatch, number
):
    monkeypatch.setattr(proxy, "SPARE_SILENCE_SECONDS", 0.2)
    spare_server.announce()
    spare_server.settle()
    # The main thread must not see it before the request does.
    with spare_server.pool.lock:
        for spare in spare_server.spares():
            os.kill(pid_of(spare), number)
    assert spare_server.chat("b").content == "You said: b "


def test_pool_dead_spare_is_replaced_at_once(spare_server, monkeypatch):
    monkeypatch.setattr(proxy, "STARTUP_SECONDS", 0)
    spare_server.announce()
    spare_server.settle()
    before = spare_server.spare_pids()
    for spare in spare_server.spares():
        os.kill(pid_of(spare), signal.SIGKILL)

    def are_replaced():
        pids = spare_server.spare_pids()
        return len(pids) == 2 and not before & pids

    wait_until(are_replaced)


def test_pool_cli_that_dies_at_its_start_is_not_started_for_ever(
    start_server, tmp_path, monkeypatch
):
    monkeypatch.setattr(proxy, "STARTUP_SECONDS", 1000)  # even on a slow machine
    starts = tmp_path / "starts"
    text = f'#!/bin/sh\n[ "$1" = -p ] && echo x >>{starts}\necho 2.1.332\n'
    server = start_server(spares=1, claude=write_script(tmp_path / "claude", text))
    server.service.installation.check()
    server.pool.request_refill()
    wait_until(lambda: server.pool.early_deaths == 1 and not server.has_processes())
    for _ in range(3):
        server.wait_for_tick()
    assert starts.read_text() in ("x\n", "x\n" * 2)  # one asked for the models
    server.pool.next_start_at = 0.0  # the pause is over
    wait_until(lambda: server.pool.early_deaths >= 2)


def test_pool_goes_on_when_a_spare_cannot_be_started(spare_server, monkeypatch):
    assert spare_server.chat("a").status == 200
    spare_server.settle()
    with monkeypatch.context() as patch:
        patch.setattr(proxy, "make_server_directory", raise_os_error)
        shutil.rmtree(spare_server.cli_directory())
        spare_server.drop_spares()
        spare_server.pool.request_refill()
        spare_server.wait_for_tick()
        spare_server.wait_for_tick()
        assert not spare_server.spares()
        health = spare_server.health()
        assert health["status"] == "error"
        assert "TMPDIR" in health["message"]
        response = spare_server.chat("b")
        assert response.status == 503
        assert response.error["code"] == "no_temporary_directory"
    assert spare_server.chat("c").status == 200


def raise_os_error():
    raise FileNotFoundError


def test_pool_looks_for_another_directory_when_its_own_is_gone(
    spare_server, monkeypatch, tmp_path
):
    gone = tmp_path / "gone"
    monkeypatch.setattr(tempfile, "tempdir", str(gone))
    assert spare_server.chat("c").status == 200


def test_pool_directory_of_a_killed_server_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left_behind = proxy.make_server_directory()
    os.close(proxy.lock_directory(left_behind))
    in_use = proxy.make_server_directory()
    lock = proxy.lock_directory(in_use)
    foreign = tmp_path / "claude-max-notes"
    foreign.mkdir()
    proxy.remove_stale_directories()
    os.close(lock)
    assert not os.path.exists(left_behind)
    assert os.path.exists(in_use)
    assert foreign.exists()


def test_pool_old_spares_are_replaced_one_after_the_other(spare_server, monkeypatch):
    spare_server.chat(dialogue("a", "b", "c"))
    spare_server.settle()
    before = spare_server.spare_pids()
    monkeypatch.setattr(proxy, "STARTUP_SECONDS", 0.1)
    monkeypatch.setattr(proxy, "SPARE_SECONDS", 0.2)
    counts = []

    def are_replaced():
        spare_server.wake()
        pids = spare_server.spare_pids()
        counts.append(len(pids))
        return not before & pids

    wait_until(are_replaced)
    assert min(counts) >= 1
    assert max(counts) == 2


def test_pool_without_requests_for_long_holds_no_spares(spare_server, monkeypatch):
    spare_server.chat("a")
    spare_server.settle()
    for name in ("STARTUP_SECONDS", "SPARE_SECONDS", "NO_REQUEST_SECONDS"):
        monkeypatch.setattr(proxy, name, 0)

    def holds_none():
        spare_server.wake()
        return not spare_server.spares()

    wait_until(holds_none)
    assert spare_server.spare_states() == []
    assert spare_server.chat("b").status == 200


def test_pool_request_within_the_rest_period_keeps_spares_going(
    spare_server, monkeypatch
):
    spare_server.pretend_no_request_for(2 * proxy.NO_REQUEST_SECONDS)
    spare_server.chat("a")
    spare_server.settle()
    before = spare_server.spare_pids()
    monkeypatch.setattr(proxy, "STARTUP_SECONDS", 0)
    monkeypatch.setattr(proxy, "SPARE_SECONDS", 0.2)

    def are_replaced():
        spare_server.wake()
        pids = spare_server.spare_pids()
        return len(pids) == 2 and not before & pids

    wait_until(are_replaced)


def test_pool_spares_of_a_replaced_cli_end(spare_server):
    spare_server.chat("a")
    spare_server.settle()
    assert len(spare_server.spares()) == 2
    before = spare_server.spare_pids()
    spare_server.replace_cli()
    wait_until(lambda: not before & spare_server.spare_pids())
    assert spare_server.chat("b").status == 200
    spare_server.settle()
    assert len(spare_server.spares()) == 2


def test_pool_spares_end_when_the_login_is_refused(spare_server):
    spare_server.chat("leave a spare")
    spare_server.settle()
    before = spare_server.spare_pids()
    assert before
    spare_server.chat("mock:status=401")
    assert not before & spare_server.spare_pids()
    assert spare_server.chat("hi").status == 200


def test_pool_removed_directory_is_made_again(spare_server):
    assert spare_server.chat("a").status == 200
    spare_server.settle()
    shutil.rmtree(spare_server.cli_directory())
    spare_server.drop_spares()
    assert os.listdir(spare_server.received([])["cwd"]) == []


# ── Generation: answers ──────────────────────────────────────────────────────────


def test_generation_tool_calls(server):
    tools = [tool(), tool("get_time")]
    response = server.chat(WEATHER_AND_TIME, tools=tools, stream=True)
    check_weather_and_time(response)


def test_generation_structured_output(server):
    words = 'mock:input={"a":1}'
    response_format = json_schema_format()
    response = server.chat(words, response_format=response_format, stream=True)
    assert response.content == '{"a":1}'
    assert response.finish_reason == "stop"
    assert "tool_calls" not in response.message


@pytest.mark.parametrize("stream", [False, True])
def test_generation_leaves_out_what_comes_after_the_answer(server, stream):
    response = server.chat("mock:stop=max_tokens mock:tokens=1", stream=stream)
    assert response.content == "tok0 "
    assert response.finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_generation_large_answer(server, stream):
    response = server.chat("mock:say=" + "x" * 500_000, stream=stream)
    assert response.content == "x" * 500_000


@pytest.mark.parametrize("stream", [False, True])
def test_generation_stop_string_ends_the_process_at_once(server, stream):
    words = mock_texts("aSTOP", "never") + " mock:gap_ms=600000"
    assert server.chat(words, stop="STOP", stream=stream).content == "a"
    wait_until(server.is_idle, 5)


def test_generation_many_at_once_are_not_mixed_up(start_server):
    server = start_server(spares=2, max_concurrency=16)

    def ask(number):
        messages = dialogue(f"q{number}", "x", f"text{number}")
        return server.chat(messages, stream=bool(number % 2)).content

    with concurrent.futures.ThreadPoolExecutor(16) as executor:
        contents = list(executor.map(ask, range(16)))
    assert contents == [f"You said: text{number} " for number in range(16)]


def check_same_answer(body, chat):
    """A response of /v1/responses says what a chat completion says."""
    texts = {"message": "", "reasoning": ""}
    calls = []
    for one in body["output"]:
        for part in one.get("content") or one.get("summary") or []:
            texts[one["type"]] += part["text"]
        if one["type"] == "function_call":
            calls.append({"name": one["name"], "arguments": one["arguments"]})
    assert texts["message"] == chat.content
    assert texts["reasoning"] == chat.message.get("reasoning_content", "")
    assert calls == chat.functions
    usage = chat.json["usage"]
    assert body["usage"]["input_tokens"] == usage["prompt_tokens"]
    assert body["usage"]["output_tokens"] == usage["completion_tokens"]


@pytest.mark.parametrize(
    "words", ["mock:think=2 mock:tool=f,g", "mock:stop=max_tokens"]
)
def test_generation_both_endpoints_give_the_same_answer(server, words):
    tools = [function_tool("f"), function_tool("g")]
    whole = server.respond(words, tools=tools, **WITH_SUMMARY)
    stream = server.respond(words, tools=tools, stream=True, **WITH_SUMMARY)
    chat = server.chat(words, tools=[tool("f"), tool("g")])
    for body in (whole.json, stream.chunks[-1]["response"]):
        check_same_answer(body, chat)


@pytest.mark.parametrize("line", ["{}", '{"type":null}', '{"type":[]}', "[]", "null"])
@pytest.mark.parametrize("stream", [False, True])
def test_generation_line_without_a_type_is_noise(server, line, stream):
    words = f"mock:bytes={(line.encode() + bytes([10])).hex()} mock:tokens=1"
    assert server.chat(words, stream=stream).content == "tok0 "


@pytest.mark.parametrize("stream", [False, True])
def test_generation_empty_input_is_answered(server, stream):
    assert server.respond("", stream=stream).status == 200


# ── Generation: responses that are continued ─────────────────────────────────────


def received_response(server, input_="mock:show", **parameters):
    """What the CLI received for a response, and the response."""
    body = server.respond(input_, **parameters).json
    return json.loads(body["output"][-1]["content"][0]["text"]), body


def texts_received(received):
    texts = []
    for turn in received["turns"]:
        for block in turn["content"]:
            texts.append(block.get("text", block["type"]))
    return texts


@pytest.mark.parametrize("stream", [False, True])
def test_previous_response_chain_of_three(start_server, stream):
    server = start_server()
    previous_id = None
    for text in ("one", "two", "three"):
        response = server.respond(text, previous_response_id=previous_id, stream=stream)
        body = response.chunks[-1]["response"] if stream else response.json
        assert body["previous_response_id"] == previous_id
        assert body["store"] is True
        previous_id = body["id"]
    received, _ = received_response(server, previous_response_id=previous_id)
    answers = ["You said: one ", "You said: two ", "You said: three "]
    texts = texts_received(received)
    assert texts[0::2] == ["one", "two", "three", "mock:show"]
    assert texts[1::2] == answers


@pytest.mark.parametrize("model", ["sonnet", "claude-haiku-4-5"])
def test_previous_response_in_a_tool_loop(start_server, model):
    server = start_server()
    parameters = {"tools": [function_tool()], "model": model}
    first = server.respond("mock:think=1 mock:tool=get_weather", **parameters).json
    call = first["output"][-1]
    output = [call_output_item(call["call_id"], "mock:show")]
    received, _ = received_response(
        server, output, previous_response_id=first["id"], **parameters
    )
    kinds = [block["type"] for block in received["turns"][1]["content"]]
    assert kinds == ["thinking", "text", "tool_use"]
    assert received["turns"][2]["content"][0]["type"] == "tool_result"


def test_previous_response_of_a_tool_loop_with_a_custom_tool(start_server):
    server = start_server()
    words = 'mock:tool=patch mock:notext mock:input={"input":"+a"}'
    first = server.respond(words, tools=[CUSTOM_TOOL]).json
    output_type = "custom_tool_call_output"
    call_id = first["output"][0]["call_id"]
    output = [call_output_item(call_id, "mock:show", output_type)]
    received, _ = received_response(
        server, output, previous_response_id=first["id"], tools=[CUSTOM_TOOL]
    )
    assert received["turns"][1]["content"][0]["input"] == {"input": "+a"}


@pytest.mark.parametrize("instructions", [None, "second"])
def test_previous_response_does_not_carry_instructions_and_tools_over(
    start_server, instructions
):
    server = start_server()
    first = server.respond("a", instructions="first", tools=[function_tool()]).json
    received, body = received_response(
        server, previous_response_id=first["id"], instructions=instructions
    )
    assert received["initialize"]["systemPrompt"] == [instructions or ""]
    assert "tools" not in received
    assert (body["instructions"], body["tools"]) == (instructions, [])


@pytest.mark.parametrize("stream", [False, True])
def test_previous_response_that_was_not_to_be_stored(start_server, stream):
    server = start_server()
    response = server.respond("a", store=False, stream=stream)
    body = response.chunks[-1]["response"] if stream else response.json
    assert body["store"] is False
    response = server.respond("b", previous_response_id=body["id"])
    assert response.status == 400
    assert response.error["code"] == "previous_response_not_found"


def test_previous_response_of_a_failure_is_not_found(start_server):
    server = start_server()
    events = server.respond(FAILS_IN_STREAM, stream=True).chunks
    response = server.respond("b", previous_response_id=events[-1]["response"]["id"])
    assert response.error["code"] == "previous_response_not_found"


def test_previous_response_is_forgotten_when_the_memory_is_full(start_server):
    server = start_server()
    server.limit_memory(5000)
    ids = []
    for _ in range(20):
        ids.append(server.respond("x" * 500).json["id"])
    wait_until(server.is_idle)
    assert server.memory_size() <= 5000
    assert server.respond("b", previous_response_id=ids[0]).status == 400
    assert server.respond("b", previous_response_id=ids[-1]).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_previous_response_is_known_when_its_last_byte_arrives(
    start_server, monkeypatch, stream
):
    server = start_server()
    chained = threading.Event()
    remember = proxy.ResponseWriter.remember

    def remember_late(writer, cache):
        chained.wait(1)  # if the client can be faster than this, it is
        remember(writer, cache)

    monkeypatch.setattr(proxy.ResponseWriter, "remember", remember_late)
    response = server.respond("a", stream=stream)
    body = response.chunks[-1]["response"] if stream else response.json
    try:
        response = server.respond("b", previous_response_id=body["id"])
    finally:
        chained.set()
    assert response.status == 200, response.text


# ── Generation: several answers ──────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
def test_n(server, stream):
    parameters = {"stream_options": {"include_usage": True}} if stream else {}
    response = server.chat("mock:tokens=2", n=3, stream=stream, **parameters)
    assert [choice["index"] for choice in response.choices] == [0, 1, 2]
    contents = [choice["message"]["content"] for choice in response.choices]
    assert contents == ["tok0 tok1 "] * 3
    body = response.chunks[-1] if stream else response.json
    assert body["usage"]["completion_tokens"] == 6


def test_n_fails_as_one(server):
    assert server.chat("mock:status=429", n=2).status == 429


def test_n_beyond_max_concurrency(start_server):
    response = start_server(max_concurrency=2).chat("hi", n=3)
    assert response.status == 400
    assert response.error["param"] == "n"


# ── Generation: failures ─────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
def test_generation_failure_before_the_answer(server, stream):
    response = server.chat("mock:status=529", stream=stream)
    assert response.status == 503
    assert response.error["code"] == "server_is_overloaded"
    assert set(response.error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("stream", [False, True])
def test_generation_failure_before_a_response(server, stream):
    response = server.respond("mock:status=529", stream=stream)
    assert response.status == 503
    assert response.error["code"] == "server_is_overloaded"


def test_generation_failure_inside_a_stream(server):
    response = server.chat(FAILS_IN_STREAM, stream=True)
    assert response.status == 200
    assert not response.done
    assert response.error["code"] == "stream_interrupted"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in response.chunks[:-1]]
    assert set(reasons) == {None}


def test_generation_failure_inside_a_stream_of_a_response(server):
    response = server.respond(FAILS_IN_STREAM, stream=True)
    error, failed = response.chunks[-2:]
    assert response.status == 200
    assert error["error"]["code"] == "stream_interrupted"
    assert failed["type"] == "response.failed"
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"]["code"] == "server_error"


def test_generation_refusal_is_a_failed_response(server):
    body = server.respond("mock:tokens=1 mock:stop=refusal").json
    assert body["status"] == "failed"
    assert body["error"]["code"] == "invalid_prompt"


def test_generation_retry_after(server):
    assert server.chat("mock:retry=429").headers["Retry-After"] == "8"


def test_generation_limit_of_the_plan(server):
    response = server.respond("mock:limit=300 mock:status=429")
    assert response.status == 429
    assert response.error["type"] == "usage_limit_reached"
    assert 290 <= response.error["resets_at"] - time.time() <= 310
    assert "Retry-After" in response.headers


def test_generation_limit_that_is_not_the_plans(server):
    response = server.respond("mock:status=429")
    assert response.error["type"] == "rate_limit_error"


def test_generation_state_of_the_plan_is_logged_when_it_changes(
    start_server, log_lines
):
    server = start_server()
    for plan in ("0.5,0.1", "0.95,0.1", "0.95,0.1", "0.96,0.2"):
        assert server.chat(f"mock:plan={plan} mock:tokens=1").status == 200
        wait_until(server.is_idle)
    changes = [line for line in log_lines if line.startswith("plan: ")]
    wanted = "plan: status=allowed_warning window=five_hour used=95%/10%"
    assert changes == [wanted]
    window = server.health()["plan"]["windows"]["five_hour"]
    assert (window["used"], window["status"]) == (0.96, "allowed_warning")


# ── Generation: the plan's limits ────────────────────────────────────────────────


@pytest.fixture
def patient_server(start_server, monkeypatch):
    """A server that reads on for the plan's limits as long as it takes."""
    monkeypatch.setattr(proxy, "RATE_LIMIT_EVENT_SECONDS", 30)
    return start_server()


def wait_for_plan(server):
    """Wait until the windows of the plan are known; return the plan."""
    wait_until(lambda: server.health()["plan"]["windows"])
    return server.health()["plan"]


def test_plan_is_not_known_at_first(start_server):
    plan = start_server().health()["plan"]
    assert plan["windows"] == {}
    assert plan["extra_usage"] is None
    assert plan["updated_at"] is None
    assert plan["limit_percent"] == 100


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("words", ["", "mock:tool=get_weather", "mock:status=529"])
def test_plan_shows_in_health(patient_server, words, stream):
    words += " mock:plan=0.37,0.12 mock:plan_reset=1000"
    patient_server.chat(words, tools=[tool()], stream=stream)
    plan = wait_for_plan(patient_server)
    assert plan["windows"]["five_hour"]["used"] == 0.37
    week = plan["windows"]["seven_day"]
    assert (week["used"], week["status"]) == (0.12, "allowed")
    assert 0 < week["resets_at"] - time.time() <= 1000
    assert plan["extra_usage"] is False
    assert abs(plan["updated_at"] - time.time()) < 60
    wait_until(patient_server.is_idle)


@pytest.mark.parametrize(
    "words, parameters",
    [
        ("mock:stop=max_tokens", {}),
        ("mock:stop=refusal", {}),
        ("mock:stop=pause_turn", {}),
        ("mock:stop=model_context_window_exceeded", {}),
        ("mock:tokens=9", {"stop": "k2"}),
        ("mock:notext", {}),
    ],
)
def test_plan_is_not_waited_for_where_the_cli_would_ask_again(
    patient_server, words, parameters
):
    words += " mock:plan=0.37,0.12"
    assert patient_server.chat(words, **parameters).status == 200
    wait_until(patient_server.is_idle)
    assert patient_server.health()["plan"]["windows"] == {}


def test_plan_keeps_neither_the_client_nor_the_queue_waiting(start_server, monkeypatch):
    monkeypatch.setattr(proxy, "RATE_LIMIT_EVENT_SECONDS", 60)
    server = start_server(max_concurrency=1)
    for stream in (False, True, False):
        response = server.chat("hi", stream=stream)  # no limits come behind it
        assert response.content == "You said: hi "
        assert server.active() == 0
    assert server.has_processes()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ["chat", "respond"])
def test_plan_headers_of_codex(patient_server, endpoint, stream):
    ask = getattr(patient_server, endpoint)
    response = ask("mock:plan=0.375,0.12", stream=stream)
    assert not [name for name in response.headers if name.startswith("x-codex")]
    windows = wait_for_plan(patient_server)["windows"]
    headers = ask("hi", stream=stream).headers
    assert headers["x-codex-primary-used-percent"] == "37.5"
    assert headers["x-codex-primary-window-minutes"] == "300"
    reset = windows["five_hour"]["resets_at"]
    assert headers["x-codex-primary-reset-at"] == str(reset)
    assert headers["x-codex-secondary-used-percent"] == "12"
    assert headers["x-codex-secondary-window-minutes"] == "10080"
    reset = windows["seven_day"]["resets_at"]
    assert headers["x-codex-secondary-reset-at"] == str(reset)


def test_plan_shows_in_the_log(patient_server, log_lines):
    patient_server.chat("mock:plan=0.37,0.12")
    wait_for_plan(patient_server)
    patient_server.respond("hi")
    line = wait_until(lambda: [one for one in log_lines if "/responses" in one])[0]
    assert " plan=37%/12% " in line


@pytest.mark.parametrize("endpoint", ["chat", "respond"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("plan", ["0.8,0.12", "0.12,0.85", "1,1"])
def test_plan_limit_reached(start_server, monkeypatch, endpoint, stream, plan):
    monkeypatch.setattr(proxy, "RATE_LIMIT_EVENT_SECONDS", 30)
    server = start_server(plan_limit=80)
    ask = getattr(server, endpoint)
    assert ask(f"mock:plan={plan} mock:plan_reset=1000").status == 200
    windows = wait_for_plan(server)["windows"]
    response = ask("hi", stream=stream)
    assert response.status == 429
    assert response.error["type"] == "usage_limit_reached"
    resets = [window["resets_at"] for window in windows.values()]
    assert response.error["resets_at"] in resets
    assert 0 < int(response.headers["Retry-After"]) <= 1001
    assert "80%" in response.error["message"]
    assert server.request("GET", "/v1/models").status == 200


@pytest.mark.parametrize(
    "limit, words",
    [
        (80, "mock:plan=0.79,0.79"),
        (80, "mock:plan=0.9,0.9 mock:plan_reset=-5"),
        (100, "mock:plan=0.99,0.99"),
        (0, "mock:plan=1,1"),
        (80, "mock:plan=0.5,0.5 mock:overage=1"),
        (0, "mock:plan=1,1 mock:overage=1"),
    ],
)
def test_plan_limit_not_reached_ended_or_off(start_server, monkeypatch, limit, words):
    monkeypatch.setattr(proxy, "RATE_LIMIT_EVENT_SECONDS", 30)
    server = start_server(plan_limit=limit)
    server.chat(words)
    wait_for_plan(server)
    assert server.chat("hi").status == 200


def plan_of(now=1000.0, **info):
    """A plan of which the CLI has told this."""
    plan = proxy.Plan()
    plan.record(info, now)
    return plan


def stops_at(plan, limit, model="sonnet", now=1000.0):
    """Whether the plan refuses a request."""
    try:
        plan.check(limit, model, now)
    except proxy.APIError as error:
        assert (error.status, error.type) == (429, "usage_limit_reached")
        return True
    return False


def window_of(used, resets_at=2000, status="allowed"):
    return {"utilization": used, "resetsAt": resets_at, "status": status}


@pytest.mark.parametrize("percent", range(1, 101))
def test_plan_limit_is_reached_at_that_percentage(percent):
    plan = plan_of(unifiedWindows={"five_hour": window_of(percent / 100)})
    assert stops_at(plan, percent)
    assert not stops_at(plan, percent + 1)


@pytest.mark.parametrize(
    "info",
    [
        {"status": "rejected", "rateLimitType": "five_hour", "resetsAt": 2000},
        {"rateLimitType": "overage", "utilization": 1.0, "resetsAt": 2000},
        {"isUsingOverage": True},
        {"unifiedWindows": {"overage": window_of(1.0)}, "isUsingOverage": True},
        {"unifiedWindows": {"five_hour": window_of(1.0, resets_at=999)}},
        {"unifiedWindows": {"five_hour": window_of(None)}},
        {"unifiedWindows": {}},
        {},
    ],
)
def test_plan_limit_needs_a_window_that_is_known_to_be_used(info):
    assert not stops_at(plan_of(**info), 1)


@pytest.mark.parametrize("used", ["much", [], {}])
def test_plan_of_an_unknown_format_changes_nothing(used):
    plan = plan_of(unifiedWindows={"five_hour": window_of(0.37)})
    plan.record({"unifiedWindows": {"five_hour": window_of(used)}}, 1001)
    assert plan.used_percentages(1000.0) == "37%/?"


def test_plan_of_an_old_cli_tells_one_window():
    plan = plan_of(
        status="allowed_warning",
        rateLimitType="seven_day",
        utilization=0.9,
        resetsAt=2000,
    )
    assert plan.used_percentages(1000.0) == "?/90%"
    assert stops_at(plan, 90)
    assert "x-codex-primary-used-percent" not in plan.headers(1000.0)


@pytest.mark.parametrize(
    "window, model, stops",
    [
        ("seven_day_opus", "opus", True),
        ("seven_day_opus", "claude-opus-4-8", True),
        ("seven_day_opus", "opus[1m]", True),
        ("seven_day_opus", "sonnet", False),
        ("seven_day_opus", "claude-haiku-4-5", False),
        ("seven_day_sonnet", "sonnet", True),
        ("seven_day_sonnet", "opus", False),
        ("seven_day_saga", "saga", True),
    ],
)
def test_plan_limit_of_one_model(window, model, stops):
    plan = plan_of(unifiedWindows={window: window_of(0.9)})
    assert stops_at(plan, 80, model) is stops


@pytest.mark.parametrize("model", ["opus", "claude-opus-4", "default"])
def test_plan_limit_of_one_model_under_each_of_its_names(start_server, model):
    """The stand-in's `default` is Opus."""
    server = server_that_knows_models(start_server, plan_limit=80)
    window = window_of(0.9, int(time.time() + 1000))
    info = {"unifiedWindows": {"seven_day_opus": window}}
    server.record_plan(**info)
    assert server.chat("hi", "sonnet").status == 200
    assert server.chat("hi", model).status == 429


def test_plan_extra_usage_is_told_once_and_stops_nothing(patient_server, log_lines):
    for _ in range(2):
        patient_server.chat("mock:plan=0.5,0.5 mock:overage=1")
        wait_for_plan(patient_server)
        wait_until(patient_server.is_idle)
    assert patient_server.health()["plan"]["extra_usage"] is True
    told = [line for line in log_lines if "extra usage" in line]
    assert len(told) == 1
    assert patient_server.chat("hi").status == 200
    patient_server.chat("mock:plan=0.5,0.5")
    wait_until(lambda: patient_server.health()["plan"]["extra_usage"] is False)


# ── Generation: time-outs ────────────────────────────────────────────────────────


def test_timeout_of_silence_is_504(start_server):
    server = start_server(timeout=0.3)
    words = "mock:tokens=2 mock:gap_ms=60000"
    hanging, retrying, stream = run_in_threads(
        lambda: server.chat("mock:hang"),
        lambda: server.chat("mock:retry=529 mock:retries=99"),
        lambda: server.chat(words, stream=True),
    )
    assert hanging.status == 504
    assert retrying.status == 504
    assert stream.status == 200
    assert stream.error["code"] == "timeout"


def test_timeout_does_not_end_an_answer_whose_tokens_keep_coming(start_server):
    server = start_server(timeout=1)
    response = server.chat("mock:tokens=13 mock:gap_ms=100")
    assert response.status == 200
    assert response.content.endswith("tok12 ")


def test_keep_alive_chunks_of_a_silent_stream(eager_server):
    stream = eager_server.chat("mock:delay_ms=500 mock:tokens=1", stream=True)
    assert stream.content == "tok0 "
    assert stream.deltas[0] == {"role": "assistant", "content": ""}
    assert stream.deltas[1] == {"content": ""}
    assert stream.deltas[2] == {"content": ""}
    roles = [delta["role"] for delta in stream.deltas if "role" in delta]
    assert roles == ["assistant"]
    assert len({(chunk["id"], chunk["created"]) for chunk in stream.chunks}) == 1


def test_keep_alive_events_of_a_silent_response(eager_server):
    stream = eager_server.respond("mock:delay_ms=500 mock:tokens=1", stream=True)
    types = [event["type"] for event in stream.chunks]
    assert types[0] == "response.created"
    assert types.count("response.in_progress") > 2
    numbers = [event["sequence_number"] for event in stream.chunks]
    assert numbers == list(range(len(types)))


# ── Generation: disconnects ──────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("words", ["mock:hang", "mock:tokens=99 mock:gap_ms=60000"])
@pytest.mark.parametrize("early", [b"", b"\r\n"], ids=["", "sent ahead"])
def test_disconnect_ends_the_process(server, stream, words, early, monkeypatch):
    monkeypatch.setattr(proxy, "POLL_SECONDS", 60)  # so that no tick can notice it
    connection = open_request(server.port, words, stream)
    connection.sendall(early)
    (process,) = wait_until(server.answering)
    wait_until(lambda: has_sent_all(process))
    connection.close()
    wait_until(lambda: not is_running(process), 5)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("words", ["mock:delay_ms=60", "mock:gap_ms=15"])
def test_half_close_client_gets_its_answer(server, stream, words, monkeypatch):
    monkeypatch.setattr(proxy, "POLL_SECONDS", 0.01)
    with open_request(server.port, words, stream) as connection:
        connection.shutdown(socket.SHUT_WR)
        response = read_all(connection)
    assert b" 200 OK" in response
    assert b"tok4 " in response
    end = b"[DONE]\n\n\r\n0\r\n\r\n" if stream else b"}\n"
    assert response.endswith(end)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("words", ["mock:hang", "mock:tokens=99 mock:gap_ms=60000"])
def test_half_close_then_disconnect_ends_the_process(server, stream, words):
    connection = open_request(server.port, words, stream)
    connection.shutdown(socket.SHUT_WR)
    connection.recv(9)  # the server has asked whether the client is there
    (process,) = wait_until(server.answering)
    assert is_running(process)
    connection.close()
    wait_until(lambda: not is_running(process), 5)


def test_disconnect_of_a_client_that_does_not_read(server, monkeypatch):
    monkeypatch.setattr(proxy, "WRITE_SECONDS", 0.2)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        send_chat(connection, "mock:say=" + "x" * 8_000_000, True)
        wait_until(server.is_busy)
        wait_until(server.is_idle, 10)


# ── Generation: queue ────────────────────────────────────────────────────────────


def test_queue_is_served_in_order(start_server, tmp_path):
    """The processes start in the order in which their requests came."""
    starts = tmp_path / "starts"
    text = f'#!/bin/sh\n[ "$1" = -p ] && echo "$@" >>{starts}\nexec {STAND_IN} "$@"\n'
    path = write_script(tmp_path / "claude", text)
    server = start_server(max_concurrency=1, claude=path)
    first = open_request(server.port, "mock:hang", False, model="claude-0")
    wait_until(lambda: server.active() == 1)
    waiting = []
    for number in range(1, 7):
        model = f"claude-{number}"
        waiting.append(open_request(server.port, "hi", False, model=model))
        wait_until(lambda: server.waiting() == len(waiting))
    first.close()
    for connection in waiting:
        read_until(connection, b"You said: hi")
        connection.close()
    models = [line.split()[-1] for line in starts.read_text().splitlines()]
    models = [model for model in models if model != "sonnet"]  # asked for the models
    assert models == [f"claude-{number}" for number in range(7)]


def test_queue_client_that_leaves_gives_up_its_place(start_server):
    server = start_server(max_concurrency=1)
    first = open_request(server.port, "mock:gap_ms=60000", False)
    wait_until(lambda: server.active() == 1)
    second = open_request(server.port, "second", False)
    wait_until(lambda: server.waiting() == 1)
    third = open_request(server.port, "third", False)
    wait_until(lambda: server.waiting() == 2)
    second.close()
    wait_until(lambda: server.waiting() == 1)
    first.close()
    with third:
        read_until(third, b"You said: third")


def test_queue_takes_some_hundreds():
    assert not acquires_behind(300)
    assert acquires_behind(0)


def test_queue_full_is_429(start_server, monkeypatch):
    monkeypatch.setattr(proxy, "MAX_WAITING", 0)
    response = start_server().chat("hi")
    assert response.status == 429
    assert response.headers["Retry-After"] == "5"
    assert response.error["code"] == "queue_full"


# ── HTTP: endpoints ──────────────────────────────────────────────────────────────


def test_chat_completion(server):
    response = server.chat("mock:tokens=2")
    assert response.status == 200
    body = response.json
    assert re.fullmatch("chatcmpl-[0-9a-f]{24}", body["id"])
    assert body["object"] == "chat.completion"
    assert abs(body["created"] - time.time()) < 60
    assert body["model"] == "claude-sonnet-mock"
    message = {"role": "assistant", "content": "tok0 tok1 ", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    assert body["choices"] == [choice]
    assert body["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 2,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_chat_stream(server):
    response = server.chat("mock:tokens=2", stream=True)
    assert response.status == 200
    assert response.done
    assert response.headers["Content-Type"] == "text/event-stream"
    heads = {
        (chunk["id"], chunk["created"], chunk["model"]) for chunk in response.chunks
    }
    assert len(heads) == 1
    assert response.deltas == [
        {"role": "assistant", "content": ""},
        {"content": "tok0 "},
        {"content": "tok1 "},
        {},
    ]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in response.chunks]
    assert reasons == [None, None, None, "stop"]
    assert not any("usage" in chunk for chunk in response.chunks)


def test_chat_stream_include_usage(server):
    response = server.chat("hi", stream=True, stream_options={"include_usage": True})
    *chunks, last = response.chunks
    assert {chunk["usage"] for chunk in chunks} == {None}
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == 10


def test_chat_stream_sends_each_token_at_once(server):
    words = "mock:tokens=2 mock:gap_ms=600000"
    with open_request(server.port, words, True) as connection:
        read_until(connection, b"tok0")  # the second comes in ten minutes


# A response, without what is different in each.
RESPONSE_BODY = {
    "access_programs": None,
    "object": "response",
    "status": "completed",
    "model": "claude-sonnet-mock",
    "error": None,
    "incomplete_details": None,
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {"a": "b"},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "default",
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [{**function_tool(), "description": None, "strict": False}],
    "top_logprobs": 0,
    "top_p": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "truncation": "disabled",
}


def test_response(server):
    response = server.respond(
        "mock:tokens=2", metadata={"a": "b"}, tools=[function_tool()]
    )
    assert response.status == 200
    body = response.json
    assert re.fullmatch("resp_[0-9a-f]{24}", body.pop("id"))
    assert abs(body.pop("created_at") - time.time()) < 60
    (message,) = body.pop("output")
    assert message.pop("id").startswith("msg_")
    part = {
        "type": "output_text",
        "text": "tok0 tok1 ",
        "annotations": [],
        "logprobs": [],
    }
    assert message == item(
        "message", role="assistant", status="completed", content=[part]
    )
    assert abs(body.pop("completed_at") - time.time()) < 60
    assert body.pop("usage") == {
        "input_tokens": 10,
        "output_tokens": 2,
        "total_tokens": 12,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }
    assert body == RESPONSE_BODY


FAMILY_IDS = ["claude-opus-4", "claude-sonnet-4", "claude-haiku-4"]


@pytest.mark.parametrize(
    "path", ["/v1/models", "/models", "/v1/models/", "/models?x=1"]
)
def test_models(server, path):
    body = server.request("GET", path).json
    assert body["object"] == "list"
    ids = [model["id"] for model in body["data"]]
    assert ids[:3] == FAMILY_IDS
    assert {"opus", "sonnet", "haiku"} <= set(ids)
    assert len(set(ids)) == len(ids)
    assert {model["object"] for model in body["data"]} == {"model"}


@pytest.mark.parametrize(
    "name", ["claude-opus-4", "sonnet", "claude-opus-4-1", "openai/haiku"]
)
def test_model(server, name):
    assert server.request("GET", f"/v1/models/{name}").json["id"] == name


def test_model_unknown(server):
    response = server.request("GET", "/v1/models/gpt-4")
    assert response.status == 404
    assert response.error["code"] == "model_not_found"


def test_health(server):
    body = server.health()
    assert body["status"] == "ok"
    assert body["version"] == proxy.__version__
    assert body["claude"]["version"] == CLI_VERSION
    assert body["claude"]["logged_in"] is True
    assert body["active"] == 0
    assert body["uptime"] >= 0


@pytest.mark.parametrize(
    "path",
    [
        "/chat/completions",
        "/v1/chat/completions/",
        "/v1/chat/completions?api-version=1",
    ],
)
def test_path_of_chat(server, path):
    body = {"model": "sonnet", "messages": [user("x")]}
    assert server.post(body, path).status == 200


@pytest.mark.parametrize("path", ["/foo/models/opus", "/v1/embeddings"])
def test_path_unknown(server, path):
    response = server.request("GET", path)
    assert response.status == 404
    assert path in response.error["message"]


@pytest.mark.parametrize(
    "method, path, allowed",
    [
        ("GET", "/v1/chat/completions", "POST, OPTIONS"),
        ("GET", "/v1/responses", "POST, OPTIONS"),
        ("DELETE", "/v1/models", "GET, HEAD, OPTIONS"),
        ("BREW", "/v1/models", "GET, HEAD, OPTIONS"),
    ],
)
def test_method_not_allowed(server, method, path, allowed):
    response = server.request(method, path)
    assert response.status == 405
    assert response.headers["Allow"] == allowed


def test_method_head(server):
    response = server.request("HEAD", "/health")
    assert response.status == 200
    assert int(response.headers["Content-Length"]) > 10
    assert response.raw == b""


def test_websocket_is_told_to_post(server):
    response = server.request("GET", "/v1/responses", headers={"Upgrade": "websocket"})
    assert response.status == 426
    assert response.headers["Upgrade"]


def test_json_response_ends_with_a_newline(server):
    response = server.request("GET", "/v1/models")
    assert response.text.endswith("}\n")
    assert int(response.headers["Content-Length"]) == len(response.raw)


@pytest.mark.parametrize(
    "path",
    [
        "//v1/chat/completions",
        "/v1//chat//completions//",
        "/v1/v1/chat/completions",
        "/v1//v1/chat/completions",
        "/v1/v1/v1/chat/completions/",
        "//chat/completions",
    ],
)
def test_path_with_a_slash_or_a_version_too_many(server, path):
    body = {"model": "sonnet", "messages": [user("x")]}
    assert server.post(body, path).content == "You said: x "


@pytest.mark.parametrize("path", ["//v1/models", "/v1/v1/models/", "/v1//models//opus"])
def test_path_of_models_with_a_slash_or_a_version_too_many(server, path):
    assert server.request("GET", path).status == 200


@pytest.mark.parametrize("path", ["/v2/v1/models", "/v1models", "/v1", "/x/v1/models"])
def test_path_that_only_looks_like_it(server, path):
    assert server.request("GET", path).status == 404


@pytest.mark.parametrize("endpoint", ["chat", "respond"])
@pytest.mark.parametrize("stream", [False, True])
def test_stream_is_not_to_be_buffered_by_a_proxy(server, endpoint, stream):
    headers = getattr(server, endpoint)("hi", stream=stream).headers
    assert headers.get("X-Accel-Buffering") == ("no" if stream else None)


# ── HTTP: the status page and its data ───────────────────────────────────────────


@pytest.mark.parametrize("path", ["/", "/?x=1", "//"])
def test_page_needs_no_key(start_server, path):
    response = page_response(start_server(api_key="SECRET"), path)
    assert response.status == 200
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "SECRET" not in response.read().decode()


def page_response(server, path="/", **headers):
    """The response to a request for the page, not read yet."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", path, headers={"Connection": "close", **headers})
    return connection.getresponse()


def test_page_policy_allows_its_own_style_and_script_alone(server):
    response = page_response(server)
    page = response.read().decode()
    policy = {}
    for directive in response.headers["Content-Security-Policy"].split(";"):
        name, _, value = directive.strip().partition(" ")
        policy[name] = value
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = proxy.base64.b64encode(hashlib.sha256(content.encode()).digest())
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest.decode()}'"
    assert policy == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


def test_page_has_no_outside_resource_and_no_inline_attribute(server):
    page = page_response(server).read().decode()
    assert re.findall(r"https?://(?!www\.w3\.org/)[^$]", page) == []
    assert re.findall(r"<[^>]+\s(on\w+|style|src)=", page) == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Origin": "https://evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
@pytest.mark.parametrize("path", ["/", "/status"])
def test_page_is_guarded_as_everything_is(server, path, headers):
    assert page_response(server, path, **headers).status == 403


@pytest.mark.parametrize("path", ["/status", "/v1/status", "//status", "/status/?"])
def test_status_demands_the_key(start_server, path):
    server = start_server(api_key="KEY")
    assert server.request("GET", path).status == 401
    headers = {"Authorization": "Bearer KEY"}
    response = server.request("GET", path, headers=headers)
    assert response.status == 200
    assert "KEY" not in response.text


def status_of(server):
    return server.request("GET", "/status").json


def test_status_shows_requests_and_tokens(start_server):
    server = start_server(plan_limit=80)
    server.chat("mock:tokens=3")
    server.respond("mock:status=529", stream=True)
    server.chat("x", "gpt-4o")
    wait_until(server.is_idle)
    told = status_of(server)
    unknown, failed, answered = told["requests"]
    assert answered["endpoint"] == "/v1/chat/completions"
    assert answered["model"] == "claude-sonnet-mock"
    assert (answered["status"], answered["output_tokens"]) == (200, 3)
    assert (answered["input_tokens"], answered["cached_tokens"]) == (10, 0)
    assert 0 < answered["first_token_seconds"] <= answered["total_seconds"] + 0.001
    assert (failed["status"], failed["output_tokens"]) == (503, None)
    assert (unknown["status"], unknown["model"]) == (404, None)
    (hour,) = told["hours"]
    assert (hour["model"], hour["requests"]) == ("claude-sonnet-mock", 1)
    assert (hour["input_tokens"], hour["output_tokens"]) == (10, 3)
    assert hour["start"] % 3600 == 0
    assert told["plan"]["limit_percent"] == 80
    assert told["processes"]["max_concurrency"] == 8
    assert told["status"] == "ok"


def test_status_counts_no_requests_that_ask_nothing(start_server):
    server = start_server()
    for path in ("/", "/health", "/status", "/v1/models", "/nothing"):
        page_response(server, path).read()
    assert status_of(server)["requests"] == []


def test_status_holds_no_text_of_a_request(start_server):
    server = start_server()
    server.chat([system("SECRET"), user("SECRET")])
    server.chat("SECRET mock:status=500", user="SECRET", metadata={"a": "SECRET"})
    server.respond("SECRET mock:tool=SECRET", tools=[function_tool("SECRET")])
    server.chat("x", "SECRET")
    server.post('{"SECRET', "/v1/responses?SECRET=SECRET")
    wait_until(server.is_idle)
    told = server.request("GET", "/status")
    assert len(told.json["requests"]) == 5
    assert "SECRET" not in told.text


def request_record(age=0.0, model="m"):
    """A request as the history records it."""
    return {
        "time": 1_000_000 * 3600 - age,
        "endpoint": "/v1/responses",
        "model": model,
        "status": 200,
        "input_tokens": 2,
        "cached_tokens": 1,
        "output_tokens": 3,
    }


def history_of(*records):
    """What the page is told of these requests."""
    history = proxy.UsageHistory()
    for record in records:
        history.add(record)
    return history, history.to_json(1_000_000 * 3600)


def test_status_keeps_the_last_50_requests():
    records = [request_record(model=str(number)) for number in range(60)]
    _, told = history_of(*records)
    assert [one["model"] for one in told["requests"]] == [
        str(number) for number in range(59, 9, -1)
    ]


@pytest.mark.parametrize("hours, count", [(0, 1), (23, 1), (24, 0), (100, 0)])
def test_status_keeps_the_tokens_of_24_hours(hours, count):
    _, told = history_of(request_record(age=hours * 3600))
    assert len(told["hours"]) == count


def test_status_adds_up_the_tokens_of_an_hour_and_a_model():
    _, told = history_of(request_record(), request_record(), request_record(model="n"))
    rows = [
        (row["model"], row["requests"], row["output_tokens"]) for row in told["hours"]
    ]
    assert rows == [("m", 2, 6), ("n", 1, 3)]


@pytest.mark.parametrize("step", [0, 3600])
def test_status_is_bounded_whatever_models_are_named(step):
    records = []
    for number in range(3000):
        records.append(request_record(age=-number * step, model=str(number)))
    history, _ = history_of(*records)
    assert len(history.hours) <= 500
    assert len(history.requests) == 50


# ── The page in a browser ────────────────────────────────────────────────────────
# These tests need a `chromium` on PATH.

CHROMIUM = shutil.which("chromium")
CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",  # it refuses to run as root otherwise
    "--disable-gpu",
    "--disable-dev-shm-usage",  # a container's /dev/shm is small
    "--disable-quic",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-breakpad",  # no crash handler that would outlive the browser
    "--disable-component-update",
    "--disable-sync",
]
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")


@contextlib.contextmanager
def chromium(*arguments):
    """A browser with a fresh profile, which is gone afterwards with all its parts."""
    with tempfile.TemporaryDirectory() as home:
        # Its own HOME, too: Chromium keeps certificates and font caches there.
        environment = {**os.environ, "HOME": home, "TMPDIR": home}
        environment["DBUS_SESSION_BUS_ADDRESS"] = "disabled:"
        # In pipe mode Chromium reads from descriptor 3 and writes to 4.
        shell = ["sh", "-c", 'exec "$@" 3<&0 4>&1', "sh"]
        profile = f"--user-data-dir={home}/p"
        process = subprocess.Popen(
            [*shell, CHROMIUM, *CHROMIUM_FLAGS, profile, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # Its children hold the other end of stdout: at its end, all have ended.
            if not process.stdout.closed:
                process.stdout.read()
                process.stdout.close()
            process.stdin.close()
            process.wait()


def dump_dom(server):
    """The page as HTML, after at most four seconds of the page's own time.

    That clock stands still while the page waits for the network, so a slow machine
    does not matter, and jumps ahead when there is nothing to wait for.
    """
    url = f"http://127.0.0.1:{server.port}/"
    with chromium("--virtual-time-budget=4000", "--dump-dom", url) as process:
        out, _ = process.communicate(timeout=60)
    return out.decode()


PAGE_STEPS = """(async () => {
    const until = async (holds) => {
        while (!holds()) await new Promise((done) => setTimeout(done, 20));
    };
    const shown = (id) => document.getElementById(id).textContent;
    await until(() => document.readyState === "complete");
    await until(() => shown("state") !== "");
    %s
})()"""


def drive(server, steps):
    """Open the page, run the steps (JavaScript), and return what they return.

    They may await `until(() => condition)`; nothing is awaited for a fixed time.
    """
    url = f"http://127.0.0.1:{server.port}/"
    with chromium("--remote-debugging-pipe") as process:
        browser = Browser(process)
        page = browser.call("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.call("Target.attachToTarget", targetId=page, flatten=True)
        browser.session = attached["sessionId"]
        browser.call("Page.enable")
        browser.call("Page.navigate", url=url)
        answer = browser.call(
            "Runtime.evaluate",
            expression=PAGE_STEPS % steps,
            awaitPromise=True,
            returnByValue=True,
        )
    assert "exceptionDetails" not in answer, answer
    return answer["result"].get("value")


class Browser:
    """Speaks the DevTools protocol with a browser in pipe mode."""

    def __init__(self, process):
        self.process = process
        self.session = None
        self.last_id = 0

    def call(self, method, **params):
        self.last_id += 1
        message = {"id": self.last_id, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while True:
            answer = json.loads(self.read_message())
            if answer.get("id") == self.last_id:
                return answer["result"]

    def read_message(self):
        """What comes before the next zero byte."""
        message = bytearray()
        while True:
            byte = self.process.stdout.read(1)
            if byte == b"":
                raise EOFError("the browser has ended")
            if byte == b"\0":
                return bytes(message)
            message += byte


@needs_chromium
def test_page_shows_answers_limits_and_a_failure(start_server, monkeypatch):
    monkeypatch.setattr(proxy, "RATE_LIMIT_EVENT_SECONDS", 30)
    server = server_that_knows_models(start_server, plan_limit=80)
    server.chat("mock:plan=0.37,0.12 mock:tokens=4321")
    wait_for_plan(server)
    server.respond("hi")
    server.chat("mock:status=529")
    wait_until(server.is_idle)
    page = dump_dom(server)
    assert "Ready" in page
    assert "5-hour window: 37% used" in page
    assert "Week: 12% used" in page
    assert page.count('role="meter"') == 2
    assert page.count("/v1/chat/completions</td>") == 2
    assert page.count("/v1/responses</td>") == 1
    assert "<td>503</td>" in page
    assert "4,321" in page
    assert "claude-sonnet-mock: " in page
    assert f"http://127.0.0.1:{server.port}/v1</code>" in page
    assert "<code>fable</code>" in page
    assert "at 80% of a limit" in page
    assert "max 20x" in page
    assert "extra usage" not in page


@needs_chromium
def test_page_shows_that_the_limit_is_reached_and_extra_usage(start_server):
    server = start_server(plan_limit=80)
    window = window_of(0.9, int(time.time() + 1000))
    info = {"unifiedWindows": {"seven_day": window}, "isUsingOverage": True}
    server.record_plan(**info)
    page = dump_dom(server)
    assert "Week: 90% used, requests are refused" in page
    assert '<p class="warning">Extra usage is in use.' in page


@needs_chromium
def test_page_shows_what_is_wrong_and_its_cure(start_server, monkeypatch):
    monkeypatch.setenv("STAND_IN_LOGIN", "no")
    assert "run `claude auth login`" in dump_dom(start_server())


@needs_chromium
def test_page_shows_a_hostile_name_as_text(start_server):
    name = "<img src=x onerror=alert(1)>"
    server = start_server()
    record = request_record(model=name)
    record.update({"time": time.time(), "endpoint": name})
    record.update({"first_token_seconds": 1, "total_seconds": 1})
    server.service.history.add(record)
    model = proxy.Model(name, "x", name, name)
    server.use_models(model)
    info = {"unifiedWindows": {name: window_of(0.5, None, name)}}
    server.record_plan(**info)
    page = dump_dom(server)
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") >= 5
    assert "<img" not in page
    assert page.count("<script>") == 1


@needs_chromium
def test_page_asks_for_the_key(start_server):
    steps = """
        const give = (key) => {
            document.querySelector("input").value = key;
            document.querySelector("form").requestSubmit();
        };
        const asked = shown("state");
        give("wrong");
        await until(() => shown("state") !== asked);
        const refused = shown("state");
        give("secret");
        await until(() => !document.querySelector("main").hidden);
        return [asked, refused, shown("client"), sessionStorage.getItem("key")];
    """
    asked, refused, client, key = drive(start_server(api_key="secret"), steps)
    assert asked == "Enter the server's API key."
    assert "Incorrect API key" in refused
    assert "the key you started the server with" in client
    assert key == "secret"


@needs_chromium
@pytest.mark.parametrize("what", ["script", "style", "image"])
def test_page_policy_allows_nothing_else(server, what):
    steps = """
        const seen = [];
        addEventListener("securitypolicyviolation", (event) =>
            seen.push(event.effectiveDirective));
        const node = document.createElement({ image: "img" }["%s"] ?? "%s");
        node.textContent = "document.title = 'changed'";
        if (node.tagName === "IMG") node.src = "/favicon.ico";
        document.body.append(node);
        await until(() => seen.length > 0);
        return [document.title, ...seen];
    """
    title, directive = drive(server, steps % (what, what))
    assert title == "claude_max_proxy"
    expected = {"script": "script-src-elem", "style": "style-src-elem"}
    assert directive == expected.get(what, "img-src")


@needs_chromium
def test_page_renews_itself(start_server):
    server = start_server()
    steps = "await until(() => shown('requests').includes('/v1/responses')); return 1;"
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        future = executor.submit(drive, server, steps)

        def was_asked():
            return server.page_was_asked or future.done()

        server.page_was_asked = False
        add = server.service.status

        def noted_status():
            server.page_was_asked = True
            return add()

        server.service.status = noted_status
        wait_until(was_asked)
        server.respond("hi")
        assert future.result() == 1


# ── HTTP: access ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "headers, status",
    [
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
    ],
)
def test_access_by_host_and_origin(server, headers, status):
    response = server.request("GET", "/v1/models", headers=headers)
    assert response.status == status
    allowed = response.headers.get("Access-Control-Allow-Origin")
    assert allowed == (headers.get("Origin") if status == 200 else None)


@pytest.mark.parametrize("hosts, status", [(0, 400), (1, 200), (2, 400)])
def test_access_needs_one_host(server, hosts, status):
    head = b"GET /health HTTP/1.1\r\n" + b"Host: localhost\r\n" * hosts
    assert server.send_raw(head + b"\r\n").startswith(b"HTTP/1.1 %d " % status)


NAMED_ORIGINS = ["https://a.example", "https://b.example", "file://", "null"]


@pytest.mark.parametrize("origin", [*NAMED_ORIGINS, "https://c.example"])
def test_access_by_allow_origin(start_server, origin):
    headers = {"Origin": origin}
    server = start_server(allow_origin=", ".join(NAMED_ORIGINS))
    response = server.request("GET", "/health", headers=headers)
    is_named = origin in NAMED_ORIGINS
    assert response.status == (200 if is_named else 403)
    allowed = response.headers.get("Access-Control-Allow-Origin")
    assert allowed == (origin if is_named else None)


@pytest.mark.parametrize("origin", NAMED_ORIGINS)
def test_access_without_allow_origin(server, origin):
    headers = {"Origin": origin}
    assert server.request("GET", "/health", headers=headers).status == 403


def test_access_preflight(start_server):
    wanted = "authorization,x-stainless-os"
    headers = {
        "Origin": "http://localhost:1",
        "Access-Control-Request-Headers": wanted,
    }
    server = start_server(api_key="KEY")
    response = server.request("OPTIONS", "/v1/chat/completions", headers=headers)
    assert response.status == 204
    assert "Content-Length" not in response.headers
    assert response.headers["Access-Control-Allow-Origin"] == "http://localhost:1"
    assert response.headers["Access-Control-Allow-Headers"] == wanted
    headers["Origin"] = "https://evil.example"
    response = server.request("OPTIONS", "/v1/chat/completions", headers=headers)
    assert response.status == 403


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 401),
        ({"Authorization": "Bearer WRONG"}, 401),
        ({"Authorization": "Basic KEYÜ"}, 401),
        ({"Authorization": "KEYÜ"}, 401),
        ({"Authorization": "Bearer KEYÜ"}, 200),
        ({"Authorization": "bEARER  KEYÜ"}, 200),
        ({"X-Api-Key": "KEYÜ"}, 200),
    ],
)
def test_access_by_api_key(start_server, headers, status):
    headers = {
        name: value.encode().decode("latin-1") for name, value in headers.items()
    }
    server = start_server(api_key="KEYÜ")
    response = server.request("GET", "/v1/models", headers=headers)
    assert response.status == status
    if status == 401:
        assert response.error["code"] == "invalid_api_key"


def test_access_browser_must_send_json(server):
    body = json.dumps({"model": "sonnet", "messages": [user("x")]})
    headers = {"Content-Type": "text/plain"}
    response = server.request("POST", "/v1/chat/completions", body, headers)
    assert response.status == 200
    headers["Origin"] = "http://localhost"
    response = server.request("POST", "/v1/chat/completions", body, headers)
    assert response.status == 415


def test_access_ipv6_loopback(start_server):
    try:
        server = start_server(host="::1")
    except OSError:
        pytest.skip("needs IPv6")
    head = b"GET /v1/models HTTP/1.1\r\nHost: [::1]:%d\r\n\r\n" % server.port
    with socket.create_connection(("::1", server.port), timeout=10) as connection:
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "host, status",
    [
        ("host.docker.internal", 200),
        ("host.docker.internal:3456", 200),
        ("HOST.Docker.Internal", 200),
        ("host.containers.internal:80", 200),
        ("evil.docker.internal", 403),
        ("host.docker.internal.evil.example", 403),
        ("host.docker.internal@evil.example", 403),
        ("evil.com/.localhost", 403),
        ("evil.com#.localhost", 403),
        ("evil.com?.localhost", 403),
        ("evil.com\\.localhost", 403),
        ("evil.com:80.localhost", 403),
        ("localhost:evil", 403),
        (".localhost", 403),
        ("", 403),
        ("a.b-c.localhost", 200),
    ],
)
def test_access_by_host(server, host, status):
    headers = {"Host": host}
    assert server.request("GET", "/v1/models", headers=headers).status == status


@pytest.mark.parametrize(
    "origin, status",
    [
        ("http://evil.com/.localhost", 403),
        ("http://evil.com#.localhost", 403),
        ("http://evil.com?.localhost", 403),
        ("http://evil.com\\.localhost", 403),
        ("http://evil.com@localhost", 403),
        ("http://localhost@evil.com", 403),
        ("http://localhost:80.evil.com", 403),
        ("ws://localhost", 403),
        ("wss://localhost", 403),
        ("ftp://localhost", 403),
        ("://evil", 403),
        ("://localhost", 403),
        ("http://", 403),
        ("localhost", 403),
        ("", 403),
        ("1app://x", 403),
        ("HTTP://LOCALHOST:80", 200),
        ("http://[::1]:80", 200),
        ("vscode-webview://x", 200),
    ],
)
def test_access_by_origin(server, origin, status):
    headers = {"Origin": origin}
    assert server.request("GET", "/v1/models", headers=headers).status == status


@pytest.mark.parametrize(
    "origins",
    [
        [b"http://localhost", b"https://evil.example"],
        [b"https://evil.example", b"http://localhost"],
        [b"http://localhost", b"http://localhost"],
        [b"http://localhost", b""],
    ],
)
def test_access_of_two_origins(server, origins):
    head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
    head += b"".join(b"Origin: %b\r\n" % origin for origin in origins)
    assert server.send_raw(head + b"\r\n").startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "host, status",
    [
        ("box.tail1.ts.net", 200),
        ("BOX.tail1.ts.net:443", 200),
        ("proxy.example", 200),
        ("other.tail1.ts.net", 403),
        ("x.box.tail1.ts.net", 403),
        ("localhost", 200),
    ],
)
def test_access_by_allow_host(start_server, host, status):
    names = "Box.tail1.ts.net, proxy.example"
    server = start_server(allow_host=names, api_key="KEY")
    headers = {"Host": host, "Authorization": "Bearer KEY"}
    assert server.request("GET", "/v1/models", headers=headers).status == status
    if status == 200:
        response = server.request("GET", "/v1/models", headers={"Host": host})
        assert response.status == 401


@pytest.mark.parametrize("key", ["clà", "à", "ключ", "k\u00a0"])
@pytest.mark.parametrize("name", ["Authorization: Bearer ", "X-Api-Key: "])
def test_access_by_api_key_with_an_odd_last_byte(start_server, name, key):
    server = start_server(api_key=key)
    for given, status in ((key, 200), (key[:-1], 401), (key + "x", 401)):
        head = f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n{name}{given}\r\n\r\n"
        assert server.send_raw(head.encode()).startswith(b"HTTP/1.1 %d " % status)


# ── HTTP: parsing of requests ────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "request_, status",
    [
        (POST + b"Connection: close\r\n\r\n", 400),
        (POST + b"Content-Length: x\r\n\r\n", 400),
        (POST + b"Content-Length: -1\r\n\r\n", 400),
        (POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", 400),
        (
            POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
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
        (
            b"GET http://localhost/health HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n",
            400,
        ),
        (
            b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close, TE\r\n\r\n",
            404,
        ),
        (
            b"GET /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nContent-Length: 5\r\n\r\nGET /",
            404,
        ),
    ],
)
def test_http_malformed_request(server, request_, status):
    with server.connect() as connection:
        connection.sendall(request_)
        response = read_all(connection)
    head, _, body = response.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert json.loads(body)["error"]["message"]


def test_http_chunked_body_and_pipelining(server):
    body = json.dumps({"model": "sonnet", "messages": [user("x")]}).encode()
    request = POST + b"Transfer-Encoding: chunked\r\n\r\n"
    for start in range(0, len(body), 9):
        piece = body[start : start + 9]
        request += b"%x;ext=1\r\n%b\r\n" % (len(piece), piece)
    request += b"0\r\nTrailer: x\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(request + LAST)
        response = read_all(connection)
    assert response.count(b"HTTP/1.1 200 OK") == 2
    assert b"You said: x" in response


def test_http_empty_lines_before_a_request_are_skipped(server):
    assert server.send_raw(b"\r\n\n" + LAST).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize(
    "uri, host, status",
    [
        ("http://localhost:3456/v1/models?x=y", "localhost", 200),
        ("HTTP://LOCALHOST/health", "elsewhere.example", 200),
        ("http://evil.example/v1/models", "localhost", 403),
        ("http://localhost", "localhost", 200),
        ("http://localhost/nothing", "localhost", 404),
    ],
)
def test_http_absolute_uri(server, uri, host, status):
    head = f"GET {uri} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    response = server.send_raw(head.encode())
    assert response.startswith(b"HTTP/1.1 %d " % status)


def test_http_expect_100_continue(server):
    body = json.dumps({"model": "sonnet", "messages": [user("x")]}).encode()
    head = POST + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(body)
    with server.connect() as connection:
        connection.sendall(head)
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(body)
        assert b" 200 " in connection.recv(100)


def test_http_expect_100_continue_refused(server):
    head = POST + b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head.replace(b"localhost", b"evil.example"))
        assert connection.recv(100).startswith(b"HTTP/1.1 403 ")


def test_http_too_large_body_is_refused_before_it_is_sent(server):
    head = POST + b"Content-Length: 40000000\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head + b"x" * 1_000_000)
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_http_1_0_gets_no_chunked_body(server):
    body = json.dumps({"model": "sonnet", "stream": True, "messages": [user("x")]})
    head = "POST /v1/chat/completions HTTP/1.0\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n{body}"
    with server.connect() as connection:
        connection.sendall(request.encode())
        response = read_all(connection)
    head, _, rest = response.partition(b"\r\n\r\n")
    assert b"Transfer-Encoding" not in head
    assert rest.startswith(b"data: {")
    assert rest.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("wanted", ["Keep-Alive", ""])
def test_http_1_0_connection_is_closed(server, wanted):
    request = f"GET /health HTTP/1.0\r\nConnection: {wanted}\r\n\r\n"
    head = server.send_raw(request.encode()).partition(b"\r\n\r\n")[0]
    assert b"\r\nConnection: close" in head


ODD_HEADERS = [
    b"X: a\rb",
    b"X: a\x00b",
    b"X\x00: a",
    b"X: a\r\r",
    b"Transfer-Encoding: \x0bchunked",
    b"Transfer-Encoding: chunked\x0c",
    b"Content-Length: \x0b2",
    b"X: a\x1fb",
    b"X: a\x7fb",
    b"\rX: a",
]


@pytest.mark.parametrize("header", ODD_HEADERS)
@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_http_control_character_in_a_header(server, header, method):
    head = method + b" /v1/models HTTP/1.1\r\nHost: localhost\r\n"
    response = server.send_raw(head + header + b"\r\n\r\n")
    assert response.startswith(b"HTTP/1.1 400 ")
    assert response.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("header", [b"X: a\tb", b"X:\ta", "X: é".encode(), b"X: \xff"])
def test_http_header_that_is_only_unusual(server, header):
    head = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
    assert server.send_raw(head + header + b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")


def compressed(body, coding):
    """A request body in a Content-Encoding."""
    if coding == "raw deflate":
        compressor = proxy.zlib.compressobj(wbits=-15)
    else:
        wbits = 15 if coding == "deflate" else 31
        compressor = proxy.zlib.compressobj(wbits=wbits)
    return compressor.compress(body) + compressor.flush()


CHAT_BODY = json.dumps({"model": "sonnet", "messages": [user("x")]}).encode()


@pytest.mark.parametrize(
    "coding", ["gzip", "x-gzip", "GZip", "deflate", "identity", ""]
)
def test_http_content_encoding(server, coding):
    body = CHAT_BODY
    if coding not in ("identity", ""):
        body = compressed(body, coding.lower())
    headers = {"Content-Encoding": coding}
    assert server.post(body, headers=headers).content == "You said: x "


def test_http_content_encoding_deflate_without_the_zlib_header(server):
    """RFC 9110, 8.4.1.2: some send it so."""
    headers = {"Content-Encoding": "deflate"}
    body = compressed(CHAT_BODY, "raw deflate")
    assert server.post(body, headers=headers).content == "You said: x "


def test_http_content_encoding_twice(server):
    body = compressed(compressed(CHAT_BODY, "deflate"), "gzip")
    headers = {"Content-Encoding": "deflate, gzip"}
    assert server.post(body, headers=headers).content == "You said: x "
    headers = {"Content-Encoding": "gzip, deflate"}
    assert server.post(body, headers=headers).status in (200, 400)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda body: body[:-9],
        lambda body: b"",
        lambda body: b"{}",
        lambda body: body[3:],
    ],
    ids=["truncated", "empty", "plain", "no head"],
)
def test_http_content_encoding_that_is_damaged(server, coding, damage):
    body = damage(compressed(CHAT_BODY * 9, coding))
    response = server.post(body, headers={"Content-Encoding": coding})
    assert response.status == 400


@pytest.mark.parametrize("codings", [["gzip"], ["deflate"], ["gzip", "gzip"]])
def test_http_content_encoding_bomb(server, monkeypatch, codings):
    monkeypatch.setattr(proxy, "MAX_BODY_BYTES", 100_000)
    body = b" " * 50_000_000
    for coding in codings:
        body = compressed(body, coding)
    assert len(body) < 100_000
    headers = {"Content-Encoding": ", ".join(codings)}
    assert server.post(body, headers=headers).status == 413


@pytest.mark.parametrize("size, status", [(100_000, 200), (100_001, 413)])
def test_http_content_encoding_is_bounded_by_the_body_limit(
    server, monkeypatch, size, status
):
    monkeypatch.setattr(proxy, "MAX_BODY_BYTES", 100_000)
    body = compressed(CHAT_BODY.ljust(size), "gzip")
    headers = {"Content-Encoding": "gzip"}
    assert server.post(body, headers=headers).status == status


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, br", "x" * 500])
def test_http_content_encoding_unknown(server, coding):
    response = server.post(CHAT_BODY, headers={"Content-Encoding": coding})
    assert response.status == 415
    assert coding.split(", ")[-1][:50] in response.error["message"]


# ── HTTP: connections ────────────────────────────────────────────────────────────


def test_connection_serves_one_request_after_another(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with contextlib.closing(connection):
        for stream in (False, True, False):
            messages = [user("x")]
            body = {"model": "sonnet", "stream": stream, "messages": messages}
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            assert read_response(connection).content == "You said: x "


def test_connection_survives_refused_requests(server):
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
            assert read_response(connection).status == status


def test_connection_keeps_a_request_that_comes_during_an_answer(server):
    words = "mock:tokens=5 mock:gap_ms=20"
    with open_request(server.port, words, True) as connection:
        response = connection.recv(1000)
        connection.sendall(LAST)
        response += read_all(connection)
    assert response.index(b"[DONE]") < response.index(b'"spares"')


def test_connection_keeps_a_large_request_that_comes_during_an_answer(server):
    """More than the server reads ahead."""
    words = "mock:tokens=5 mock:gap_ms=20"
    text = "x" * (3 * proxy.MAX_READ_AHEAD_BYTES)
    with open_request(server.port, words, True) as connection:
        response = connection.recv(1000)
        send_chat(connection, text, False)
        connection.sendall(LAST)
        response += read_all(connection)
    positions = [response.index(text.encode()), response.index(b'"spares"')]
    assert response.index(b"[DONE]") < positions[0] < positions[1]


def test_connection_of_a_client_that_sends_much_ahead_is_not_lost():
    client, server_side = socket.socketpair()
    with client, server_side:
        data = b"x" * (proxy.MAX_READ_AHEAD_BYTES + 9)
        client.sendall(data)
        reader = proxy.ClientConnection(server_side)
        reader.ignored_bytes = b"x"

        def is_full():
            reader.check_connected()
            return reader.is_full()

        wait_until(is_full)
        client.shutdown(socket.SHUT_WR)
        assert io.BufferedReader(reader).read() == data
        reader.check_connected()
        assert reader.input_has_ended
        client.close()
        reader.next_probe = 0.0  # so that it asks the client again
        with pytest.raises(proxy.DisconnectedError):
            reader.check_connected()


def test_connection_without_bytes_to_ignore_ends_with_its_input():
    """Where nothing can be sent in between, a client that has closed is gone."""
    client, server_side = socket.socketpair()
    with client, server_side:
        reader = proxy.ClientConnection(server_side)
        reader.check_connected()
        client.shutdown(socket.SHUT_WR)
        with pytest.raises(proxy.DisconnectedError):
            reader.check_connected()


def test_connection_of_a_slow_body_is_closed(start_server, monkeypatch):
    monkeypatch.setattr(proxy, "REQUEST_SECONDS", 0.3)
    server = start_server()
    with server.connect() as connection:
        connection.sendall(POST + b"Content-Length: 100\r\n\r\n{")
        assert server.request("GET", "/health").status == 200
        assert connection.recv(100) == b""


def test_connection_of_slow_headers_is_closed(start_server, monkeypatch):
    """A byte now and then does not keep it open."""
    monkeypatch.setattr(proxy, "REQUEST_SECONDS", 0.3)
    server = start_server()
    with server.connect() as connection, contextlib.suppress(ConnectionError):
        for byte in POST * 9:
            connection.sendall(bytes([byte]))
            readable, _, _ = select.select([connection], [], [], 0.02)
            if readable:
                break
        assert readable, "it was never closed"
        assert connection.recv(100) == b""


def test_connection_idle_before_a_request_is_closed(server, monkeypatch):
    monkeypatch.setattr(proxy, "IDLE_CONNECTION_SECONDS", 0.1)
    with server.connect() as connection:
        connection.settimeout(10)
        assert connection.recv(100) == b""


def test_connection_idle_after_a_request_is_closed(server, monkeypatch):
    monkeypatch.setattr(proxy, "IDLE_CONNECTION_SECONDS", 0.5)
    with server.connect() as connection:
        connection.settimeout(10)
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_connections_idle_do_not_stop_others(server):
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(server.connect())
        assert server.request("GET", "/v1/models").status == 200


def test_accept_without_a_free_thread_closes_the_connection(server, monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with server.connect() as connection:
            assert read_all(connection) == b""
    assert server.request("GET", "/v1/models").status == 200


def test_accept_without_a_free_descriptor_is_tried_again(server, monkeypatch):
    get_request = server.server.get_request
    failures = []

    def fail_once():
        if failures:
            return get_request()
        failures.append(OSError(24, "Too many open files"))
        raise failures[0]

    monkeypatch.setattr(server.server, "get_request", fail_once)
    assert server.request("GET", "/v1/models").status == 200
    assert failures


def test_accept_without_a_connection_does_not_wait():
    """As if the client had left meanwhile."""
    server = proxy.Server(proxy.Settings(port=0))
    assert not server.socket.getblocking()
    server.accept()
    server.drain()


# ── HTTP: logging and internal errors ────────────────────────────────────────────


def test_log_has_a_line_for_each_request_and_no_prompt(server, monkeypatch, capsys):
    monkeypatch.setattr(proxy, "log", REAL_LOG)
    assert "SECRET" in server.chat("SECRET").content
    (line,) = wait_until(lambda: capsys.readouterr().err.splitlines())
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d 200 POST /v1/chat/completions "
        r"model=claude-sonnet-mock first=\d\.\d{3} in=10 cached=0 out=\d+ total=\d\.\d{3}",
        line,
    )


def test_log_first_is_the_time_to_the_first_token(server, log_lines):
    server.chat("mock:delay_ms=300 mock:tokens=1")
    (line,) = wait_until(lambda: log_lines)
    first = float(re.search(r" first=(\S+) ", line)[1])
    total = float(re.search(r" total=(\S+)$", line)[1])
    assert 0.3 <= first <= total


def test_log_model_cannot_forge_a_line(server, log_lines):
    server.chat("mock:exit=1", model="x\n2026 200 GET /forged\x1b[31m/sonnet")
    (line,) = wait_until(lambda: log_lines)
    assert "model=x?2026?200?GET" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "words, status",
    [
        ("mock:exit=1", 502),
        ("mock:status=500", 502),
        ("mock:shape", 502),
        ("mock:retry=401", 401),
        ("mock:hang", 504),
        ("mock:stderr=99 mock:exit=1", 502),
    ],
)
def test_log_and_errors_hold_no_secret(
    start_server, log_lines, words, status, monkeypatch
):
    monkeypatch.setenv("SOME_TOKEN", "SECRET")
    timeout = 0.1 if words == "mock:hang" else 30
    server = start_server(timeout=timeout, api_key="SECRET", verbose=True)
    body = {"model": "sonnet", "messages": [system("SECRET"), user(f"SECRET {words}")]}
    headers = {"Authorization": "Bearer SECRET"}
    responses = run_in_threads(
        lambda: server.post(body, headers=headers),
        lambda: server.post({**body, "stream": True}, headers=headers),
    )
    wait_until(lambda: len([line for line in log_lines if " POST " in line]) == 2)
    home = os.path.expanduser("~")
    for response in responses:
        assert response.status == status
        seen = response.text + str(response.headers) + "".join(log_lines)
        for secret in ("SECRET", HERE, home, tempfile.gettempdir(), "Traceback"):
            assert secret not in seen


# It repeats on stderr what it reads, and ends at the prompt.
ECHOING_CLI = """#!/bin/sh
[ "$1" = -p ] || exec %s "$@"
while read -r line; do
    printf '%%s\\n' "$line" >&2
    case "$line" in *SECRET*) exit 1;; esac
done
"""


def test_log_verbose_holds_no_prompt(start_server, log_lines, tmp_path):
    path = write_script(tmp_path / "claude", ECHOING_CLI % STAND_IN)
    server = start_server(claude=path, verbose=True)
    assert server.chat("SECRET").status == 502
    wait_until(lambda: any(" POST " in line for line in log_lines))
    assert "SECRET" not in "".join(log_lines)
    (line,) = [line for line in log_lines if line.startswith("claude: ")]
    assert "status=502 code=cli_died" in line
    assert re.search(r" (running|exit=1) stderr=[1-9]\d*_bytes$", line)


def raise_bug(*arguments):
    """Raise an exception that no code expects, with text of a request in it."""
    raise KeyError("SECRET")


def test_internal_error_is_a_500_without_details(server, log_lines, monkeypatch):
    monkeypatch.setattr(proxy, "parse_chat", raise_bug)
    response = server.chat("SECRET")
    assert response.status == 500
    assert response.error["type"] == "api_error"
    assert "SECRET" not in response.text + "".join(log_lines)
    assert re.fullmatch(
        r"internal error: KeyError in post_chat, line \d+", log_lines[0]
    )


def test_internal_error_in_a_stream_ends_it(server, monkeypatch):
    monkeypatch.setattr(server.service, "record_success", raise_bug)
    with open_request(server.port, "x", True) as connection:
        response = read_all(connection)
    assert response.count(b"HTTP/1.1") == 1
    assert b"[DONE]" not in response


def test_internal_error_after_the_answer_is_not_sent(server, monkeypatch):
    monkeypatch.setattr(server.service, "finish", raise_bug)
    with open_request(server.port, "x", False, dialogue("a", "b")) as connection:
        response = read_all(connection)
    assert response.count(b"HTTP/1.1") == 1
    assert b"You said: x" in response


def test_internal_error_outside_of_a_request_is_logged(server, log_lines, monkeypatch):
    monkeypatch.setattr(proxy.Handler, "parse_request", raise_bug)
    with server.connect() as connection:
        connection.sendall(LAST)
        assert read_all(connection) == b""
    (line,) = log_lines
    assert "KeyError" in line
    assert "SECRET" not in line


def test_internal_error_in_the_main_loop_is_logged(
    start_server, log_lines, monkeypatch
):
    server = start_server()
    tick = server.pool.tick
    failures = []

    def fail_once():
        if failures:
            return tick()
        failures.append(True)
        raise KeyError("SECRET")

    monkeypatch.setattr(server.pool, "tick", fail_once)
    server.wake()
    wait_until(lambda: failures)
    wait_until(lambda: log_lines or not server.thread.is_alive())
    (line,) = log_lines
    assert "KeyError" in line
    assert "SECRET" not in line
    assert server.chat("hi").status == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "kinds, shown",
    [
        (["web_search_call"], "web_search_call"),
        (["mcp_call", "compaction", "mcp_call"], "compaction,mcp_call"),
        (["a b\nPOST /forged\x1b"], "a?b?POST?/forged?"),
    ],
)
def test_log_names_what_was_left_out(server, log_lines, kinds, shown, stream):
    items = [*(item(kind) for kind in kinds), user("hi")]
    assert server.respond(items, stream=stream).status == 200
    (line,) = wait_until(lambda: log_lines)
    assert f" ignored={shown} " in line


def test_log_names_the_parts_of_an_assistant_that_were_left_out(server, log_lines):
    message = assistant([{"type": "thinking", "thinking": "SECRET"}, {"type": "x"}])
    server.chat([user("a"), message, user("b")])
    (line,) = wait_until(lambda: log_lines)
    assert " ignored=thinking,x " in line
    assert "SECRET" not in line


def test_log_names_nothing_where_nothing_was_left_out(server, log_lines):
    server.respond([item("reasoning", id="rs_1", summary=[]), user("hi")])
    (line,) = wait_until(lambda: log_lines)
    assert "ignored" not in line


# ── Main ─────────────────────────────────────────────────────────────────────────


def test_main_banner(capsys, start_server):
    start_server(api_key="SECRET").announce()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"claude_max_proxy {proxy.__version__} is listening on ")
    assert lines[1].startswith(f"Claude Code {CLI_VERSION} at ")
    assert lines[2] == "logged in (claude.ai, max_20x)"
    assert lines[3].startswith("status page: http://localhost:")
    assert lines[4].startswith("try: curl http://localhost:")
    assert "Bearer $KEY" in lines[4]
    assert lines[5].startswith("models: claude-opus-4, ")
    assert "SECRET" not in "".join(lines)


def test_main_old_python_is_told(monkeypatch):
    """By the statements up to the check, which come before any other."""
    tree = ast.parse(read_document("claude_max_proxy.py"), feature_version=(3, 7))
    kinds = [type(statement) for statement in tree.body]
    end = kinds.index(ast.If) + 1
    assert set(kinds[: end - 1]) <= {ast.Expr, ast.Import, ast.ImportFrom}
    beginning = ast.Module(tree.body[:end], [])
    monkeypatch.setattr(sys, "version_info", (3, 8, 18))
    with pytest.raises(SystemExit, match="Python 3.9 or newer is required"):
        exec(compile(beginning, "claude_max_proxy.py", "exec"), {})


@pytest.mark.parametrize("can_write", [True, False])
def test_main_runs_from_bytecode_if_it_can_be_written(tmp_path, can_write):
    cache = tmp_path / "cache"
    if not can_write:
        cache.write_text("a file, where a directory is needed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, proxy.__file__, "--port", str(port), "--claude", STAND_IN]
    env = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL, env=env)
    try:
        wait_until(lambda: can_connect(port))
        assert health_of(port)["status"] == "ok"
        assert len(list(cache.glob("*/server-*.pyc"))) == int(can_write)
    finally:
        process.terminate()
        assert process.wait() == 0


def test_main_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run_command("--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "in use" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_check_all_right(capsys):
    code, out = run_check(capsys)
    assert code == 0
    assert CLI_VERSION in out
    assert "logged in" in out


def test_check_not_logged_in(capsys, monkeypatch):
    monkeypatch.setenv("STAND_IN_LOGIN", "no")
    code, out = run_check(capsys)
    assert code == 1
    assert "claude auth login" in out


def test_check_token_refused():
    env = {"STAND_IN_LOGIN": "no", "CLAUDE_CODE_OAUTH_TOKEN": "x"}
    done = run_command("--check", "--port", "0", "--claude", STAND_IN, **env)
    assert done.returncode == 1
    assert "claude setup-token" in done.stdout


def test_check_api_key_in_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", "x")
    code, out = run_check(capsys, claude="/nowhere")
    assert code == 1
    assert re.search(r"^note .*ANTHROPIC_API_KEY", out, re.M)


def test_check_server_that_runs_already(server, capsys):
    code, out = run_check(capsys, port=server.port)
    assert code == 0
    assert f"already running on port {server.port}" in out


def test_check_port_in_use(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        code, out = run_check(capsys, port=taken.getsockname()[1])
    assert code == 1
    assert "in use" in out


@pytest.mark.parametrize(
    "mode, problem",
    [(0o644, "chmod"), (0o755, "--version")],
    ids=["not executable", "no version"],
)
def test_check_file_that_is_no_cli(tmp_path, capsys, mode, problem):
    path = tmp_path / "claude"
    path.write_text("#!/bin/sh\necho what\n")
    path.chmod(mode)
    code, out = run_check(capsys, claude=str(path))
    assert code == 1
    assert problem in out


def test_check_path_that_is_no_file(tmp_path, capsys):
    for path in ("/nowhere", str(tmp_path)):
        code, out = run_check(capsys, claude=path)
        assert code == 1
        assert "there is no such file" in out


def test_stop_ends_an_answer_in_flight(start_server):
    server = start_server(spares=2)
    server.chat("leave a spare")
    words = "mock:child mock:gap_ms=60000"
    with open_request(server.port, words, True) as connection:
        child = read_child_pid(connection)
        server.close()
        rest = read_until(connection, rb"0\r\n\r\n$").string
    assert b'"code": "stopping"' in rest
    assert b"[DONE]" not in rest
    assert server.is_idle()
    assert not server.spares()
    wait_until(lambda: has_exited(child), 5)


@pytest.mark.parametrize("words", ["mock:tokens=99 mock:gap_ms=100", "mock:hang"])
def test_stop_makes_an_unfinished_answer_a_503(start_server, words):
    server = start_server()
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        future = executor.submit(server.chat, words)
        wait_until(server.answering)
        server.close()
        response = future.result()
    assert response.status == 503
    assert response.error["code"] == "stopping"


def test_stop_does_not_wait_for_a_client_that_does_not_read(start_server, monkeypatch):
    monkeypatch.setattr(proxy, "TERMINATE_SECONDS", 0.1)
    server = start_server()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        send_chat(connection, "mock:say=" + "x" * 8_000_000, True)
        read_until(connection, b"xxx")
        server.close()
        assert server.is_busy()  # it still writes, for up to WRITE_SECONDS

    def is_reaped():
        server.tick()
        return not server.has_processes()

    wait_until(is_reaped)  # the server, which does that, has stopped


# The requests of each state of a server with one place: the last text, and the messages
# before it.
STATES = {
    "idle": [],
    "answering": [("mock:child mock:gap_ms=60000", [])],
    "stubborn process": [("mock:stubborn mock:hang", [])],
    "earlier turn": [("x", dialogue("mock:deaf", "y"))],
    "waiting requests": [("mock:hang", [])] * 3,
    "spare that starts": [("x", [])],
}


def active_and_waiting(port):
    health = health_of(port)
    return health["active"], health["waiting"]


def stop_in_state(state):
    """Send a signal to a server in a state, and return its exit code."""
    with contextlib.ExitStack() as stack:
        process, port = stack.enter_context(server_process("--max-concurrency", "1"))
        connections = []
        for text, before in STATES[state]:
            connection = open_request(port, text, True, before)
            connections.append(stack.enter_context(connection))
        if state == "spare that starts":
            read_until(connections[0], b"DONE")
        elif connections:
            wanted = (1, len(connections) - 1)
            wait_until(lambda: active_and_waiting(port) == wanted)
        pids = child_processes(process.pid)
        number = signal.SIGHUP if state == "idle" else signal.SIGTERM
        process.send_signal(number)
        code = process.wait(10)
        wait_until(lambda: all(map(has_exited, pids)), 5)
        return code


def test_signal_stops_the_server_in_every_state(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with concurrent.futures.ThreadPoolExecutor() as executor:
        codes = list(executor.map(stop_in_state, STATES))
    assert dict(zip(STATES, codes)) == dict.fromkeys(STATES, 0)
    assert not list(tmp_path.glob("claude-max-*"))


def test_signal_while_the_cli_hangs_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    path = write_script(tmp_path / "claude", "#!/bin/sh\nexec sleep 60\n")
    with server_process("--claude", path) as (process, _):
        wait_until(lambda: child_processes(process.pid))
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert not list(tmp_path.glob("claude-max-*"))


def test_signal_twice_ends_the_server_at_once():
    words = "mock:child mock:gap_ms=60000"
    with server_process() as (process, port):
        with open_request(port, words, True) as connection:
            child = read_child_pid(connection)
            process.send_signal(signal.SIGTERM)
            wait_until(lambda: not can_connect(port))
            process.send_signal(signal.SIGTERM)
            assert process.wait(2) == 1
            wait_until(lambda: has_exited(child))


def test_main_without_stderr(tmp_path):
    """Without a log, and with all else."""
    with server_process(redirection="2>&-") as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(connection):
            for _ in range(2):
                connection.request("GET", "/health", headers={"Connection": "x"})
                assert read_response(connection).status == 200
                assert connection.sock  # it is one connection
        process.terminate()
        assert process.wait(10) == 0


@pytest.mark.parametrize("host", ["::1", "127.0.0.1", "localhost", "0:0:0:0:0:0:0:1"])
def test_check_host(capsys, host):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("needs IPv6")
    code, out = run_check(capsys, host=host)
    assert code == 0, out


@pytest.mark.parametrize("host", ["::1", "127.0.0.1"])
def test_check_host_where_a_server_runs_already(capsys, start_server, host):
    try:
        server = start_server(host=host)
    except OSError:
        pytest.skip("needs IPv6")
    code, out = run_check(capsys, host=host, port=server.port)
    assert code == 0
    assert "already running" in out


@pytest.mark.parametrize("host, shown", [("::", "[::]"), ("::1", "localhost")])
def test_banner_url_of_an_ipv6_address(capsys, host, shown):
    proxy.print_banner(proxy.Settings(host=host, api_key="k"), 3456, [])
    assert f"listening on http://{shown}:3456/v1" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["k", "clà", "ключ"])
def test_check_beside_a_running_server_prints_the_plan(capsys, start_server, key):
    server = start_server(api_key=key)
    window = {"utilization": 0.37, "resetsAt": int(time.time() + 1000)}
    info = {"unifiedWindows": {"five_hour": window, "seven_day": window}}
    server.record_plan(**info, isUsingOverage=True)
    code, out = run_check(capsys, port=server.port, api_key=key)
    assert code == 0
    assert "37% of the 5-hour limit used" in out
    assert "37% of the weekly limit used" in out
    assert "extra usage" in out


def test_check_beside_a_running_server_that_knows_no_plan(capsys, server):
    code, out = run_check(capsys, port=server.port)
    assert code == 0
    assert "limit used" not in out


needs_dev_full = pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="no /dev/full"
)


@needs_dev_full
def test_main_with_a_full_stderr_ends_with_0():
    with server_process(redirection="2>/dev/full") as (process, port):
        with open_request(port, "hi", False) as connection:
            read_until(connection, b"You said: hi")
        process.terminate()
        assert process.wait(10) == 0


@needs_dev_full
@pytest.mark.parametrize(
    "arguments",
    [["--nonsense"], ["--port", "70000"], ["--host", "0.0.0.0"], ["--port", "TAKEN"]],
    ids=" ".join,
)
def test_main_with_a_full_stderr_ends_with_2(arguments):
    with socket.socket() as taken, open("/dev/full", "w") as full:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        argv = [sys.executable, proxy.__file__]
        argv += [port if one == "TAKEN" else one for one in arguments]
        done = subprocess.run(argv, stderr=full, timeout=30)
    assert done.returncode == 2


@pytest.mark.parametrize("key", ["clà", "plain"])
def test_main_api_key_under_another_locale(monkeypatch, key):
    """Python then decodes the environment as ASCII."""
    monkeypatch.setenv("CLAUDE_MAX_PROXY_API_KEY", key)
    for name, value in {
        "LANG": "C",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }.items():
        monkeypatch.setenv(name, value)
    with server_process() as (_, port):
        for given, status in ((key, b"200"), (key[:-1], b"401"), ("", b"401")):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
                head = "GET /v1/models HTTP/1.1\r\nHost: localhost\r\n"
                head += f"Authorization: Bearer {given}\r\n\r\n"
                client.sendall(head.encode())
                assert read_until(client, b"HTTP/1.1 (...)")[1] == status


# ── Fuzz and load ────────────────────────────────────────────────────────────────

JUNK = [None, True, -1, 10**30, 1.5, "x", "", "\ud800", [], {}, [[]], {"type": 1}]


def mutate_value(value, rng):
    """A copy of a JSON value in which some things are dropped, replaced or moved."""
    value = deep_copy(value)
    for _ in range(rng.randrange(1, 4)):
        paths = list(paths_in(value))[1:]
        if not paths:
            return rng.choice(JUNK)
        path = rng.choice(paths)
        holder = value_at(value, path[:-1])
        key = path[-1]
        change = rng.choice(["drop", "replace", "wrap", "copy"])
        if change == "drop":
            del holder[key]
        elif change == "replace":
            holder[key] = rng.choice(JUNK)
        elif change == "wrap":
            holder[key] = [holder[key]]
        else:
            holder[key] = deep_copy(value_at(value, rng.choice(paths)))
    return value


def mutate_bytes(raw, rng):
    """Bytes of which a few are changed, dropped or doubled."""
    raw = bytearray(raw)
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(raw))
        any_byte = bytes([rng.randrange(256)])
        doubled = raw[place : place + 1] * 2
        raw[place : place + 1] = rng.choice([b"", any_byte, doubled, b'"', b"\r\n"])
    return bytes(raw)


WHOLE_RESPONSES_REQUEST = {
    "model": "sonnet",
    "input": [
        *INPUT_ITEMS[:-2],
        item("custom_tool_call", call_id="b", name="patch", input="+a"),
        call_output_item("b", "done", "custom_tool_call_output"),
        user("e"),
    ],
    "tools": [function_tool(), NAMESPACE_TOOL, CUSTOM_TOOL, {"type": "web_search"}],
    "instructions": "I",
    "tool_choice": {"type": "function", "name": "get_weather"},
    "max_output_tokens": 5,
    "text": {"format": {"type": "json_schema", "name": "x", "schema": CITY_SCHEMA}},
    "reasoning": {"effort": "low", "summary": "auto"},
    "stream": True,
}


@pytest.mark.parametrize(
    "parse, body",
    [(parse_chat_body, WHOLE_CHAT), (parse_responses_body, WHOLE_RESPONSES_REQUEST)],
    ids=["chat", "responses"],
)
def test_fuzz_requests_are_parsed_or_refused(parse, body):
    """And what is parsed can be sent to the CLI."""
    statuses = set()
    for seed in range(800):
        rng = random.Random(seed)
        raw = json.dumps(mutate_value(body, rng)).encode()
        if seed % 5 == 0:
            raw = mutate_bytes(raw, rng)
        try:
            parsed = parse(proxy.parse_body(raw))
        except proxy.APIError as error:
            assert error.status in (400, 404), seed
            statuses.add(error.status)
            continue
        json.dumps(lines_for_cli(parsed), allow_nan=False).encode()
        json.dumps(parsed.tools, allow_nan=False).encode()
        statuses.add(200)
    assert statuses == {200, 400, 404}


WHOLE_ANSWER = {
    "model": "m",
    "usage": {"input_tokens": 1, "output_tokens": 1},
    "stop_reason": "end_turn",
    "content": [
        {"type": "thinking", "thinking": "t", "signature": "s"},
        {"type": "text", "text": "x"},
        {"type": "tool_use", "id": "i", "name": "f", "input": {}},
    ],
}
RATE_LIMIT = {
    "type": "rate_limit_event",
    "rate_limit_info": {"status": "allowed", "resetsAt": 5},
}
RETRY = {
    "type": "system",
    "subtype": "api_retry",
    "error_status": 529,
    "retry_delay_ms": 5,
}
TRANSCRIPTS = [
    answer_lines("mock:think=2 mock:tokens=4"),
    answer_lines("mock:tool=f,g"),
    answer_lines("mock:tokens=2", ["StructuredOutput"]),
    [*answer_lines("mock:tokens=3")[:4], *answer_lines("mock:tokens=5")],  # a restart
    [RATE_LIMIT, RETRY, *answer_lines("mock:say=x")],
    [{"type": "assistant", "message": WHOLE_ANSWER}],
    cli_lines("mock:status=529")[1:],
]


def test_fuzz_cli_lines_are_an_answer_or_an_error():
    statuses = set()
    for seed in range(600):
        rng = random.Random(seed)
        lines = mutate_value(rng.choice(TRANSCRIPTS), rng)
        if not isinstance(lines, list):
            lines = [lines]
        raw_lines = [json.dumps(line).encode() for line in lines]
        if seed % 5 == 0 and raw_lines:
            raw_lines[-1] = mutate_bytes(raw_lines[-1], rng)
        response_format = json_schema_format() if seed % 3 == 0 else None
        parsed = parse_chat(stop=["tok2"], stream=True, response_format=response_format)
        statuses.add(decode_bytes(raw_lines, chat_conversion(parsed)))
    assert statuses == {200, 502, 503}


def http_requests():
    """Requests of different forms, none of which reaches a CLI."""
    body = json.dumps({"model": "gpt-4", "messages": [user("x")]}).encode()
    size = len(body)
    origin = b"Origin: http://localhost\r\nContent-Type: application/json\r\n"
    chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (size, body)
    return [
        POST + b"Content-Length: %d\r\n\r\n%b" % (size, body),
        POST + chunked,
        POST + origin + chunked,
        b"GET /v1/models/sonnet?x=1 HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: x\r\n\r\n",
        b"OPTIONS /v1/models HTTP/1.0\r\nOrigin: app://x\r\n\r\n",
    ]


def split_responses(data):
    """The status and the body of each response in the bytes of a connection."""
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        status = int(re.match(rb"HTTP/1\.1 (\d+) ", head)[1])
        size = 0
        if status not in (100, 204):
            size = int(re.search(rb"Content-Length: (\d+)", head)[1])
        yield status, data[:size]
        data = data[size:]


def test_fuzz_http_is_answered_or_dropped(server):
    """The responses are well-formed, and none is an error of the server."""
    statuses = set()
    for seed in range(400):
        rng = random.Random(seed)
        data = server.send_raw(mutate_bytes(rng.choice(http_requests()), rng))
        for status, body in split_responses(data):
            statuses.add(status)
            assert status < 500 or status in (501, 505), seed
            if body:
                json.loads(body)
    assert statuses >= {200, 204, 400, 403, 404, 405, 505}


# What a client may do: a text, parameters, and the status that it gets, or None if it
# leaves in the middle.
LOAD = [
    ("mock:tokens=20", {"stream": True}, 200),
    ("mock:tokens=20", {}, 200),
    ("mock:tool=f", {"tools": [tool("f")]}, 200),
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


def send_load(port, count, seed=1):
    """Send requests of a client that is not always polite.

    Returns (status, expected status) of each; a client that left has no status.
    """
    outcomes = []
    rng = random.Random(seed)
    for _ in range(count):
        text, parameters, expected = rng.choice(LOAD)
        messages = [system(f"s{rng.randrange(3)}"), *dialogue("a", "b", text)]
        messages = messages[rng.choice([0, 1, 3]) :]
        body = {"model": "sonnet", "messages": messages, **parameters}
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            if expected is None:
                time.sleep(rng.random() / 10)  # to leave at some other moment
                outcomes.append((None, None))
                continue
            response = read_response(connection)
        outcomes.append((response.status, expected))
        if text == "mock:tokens=20":
            assert response.content == "".join(f"tok{i} " for i in range(20))
    return outcomes


def resources_of(pid):
    """How many children, descriptors and threads a process has, and its RSS in MB.

    Descriptors and threads only where they can be seen.
    """
    counts = [len(child_processes(pid))]
    if os.path.exists(f"/proc/{pid}/"):
        counts.append(len(os.listdir(f"/proc/{pid}/fd")))
        counts.append(len(os.listdir(f"/proc/{pid}/task")))
    size = subprocess.check_output(["ps", "-o", "rss=", "-p", str(pid)])
    return counts, int(size) / 1024


def resources_when_idle(pid, port):
    """The resources of a server that has two spares and no connection, else None.

    They must be the same twice, for it may be about to start a process.
    """
    before = None
    for _ in range(2):
        spares = health_of(port)["spares"]
        counts, size = resources_of(pid)
        children, *others = counts
        if spares != 2 or children != 2:
            return None
        if others and others[1] > 1:  # a connection has a thread
            return None
        if before is not None and counts != before:
            return None
        before = counts
        time.sleep(0.05)
    return counts, size


def test_load_leaves_nothing_behind(tmp_path, monkeypatch):
    """LOAD_REQUESTS=500 sends so many requests; fewer by default, for speed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    clients = 10
    count = int(os.environ.get("LOAD_REQUESTS", 30)) // clients
    outcomes = []
    with server_process("--spares", "2") as (process, port):
        log_reader = threading.Thread(target=process.stderr.read)
        log_reader.start()
        send_load(port, 10)
        before, size = wait_until(lambda: resources_when_idle(process.pid, port))
        with concurrent.futures.ThreadPoolExecutor(clients) as executor:
            seeds = range(clients)
            for some in executor.map(lambda seed: send_load(port, count, seed), seeds):
                outcomes += some

        def is_as_before():
            resources = resources_when_idle(process.pid, port)
            return resources and resources[0] == before

        wait_until(is_as_before)
        grown = resources_of(process.pid)[1] - size
        print(f"{len(outcomes)} requests: {collections.Counter(outcomes)}")
        print(f"children, descriptors, threads before and after: {before}")
        print(f"{size:.1f} MB, {grown:+.1f}")
        process.terminate()
        assert process.wait(5) == 0
        log_reader.join()
    assert len(outcomes) == clients * count
    for status, expected in outcomes:
        assert status == expected
    assert grown < 8
    assert not list(tmp_path.glob("claude-max-*"))


# ── Documents ────────────────────────────────────────────────────────────────────


def default_text(field):
    """The default of an option as --help prints it; empty if there is none."""
    if field.default is False or field.default == "":
        return ""
    return f"{field.default:g}" if type(field.default) is float else str(field.default)


def option_row(name):
    """The row of README's table for an option of the command line."""
    field = proxy.OPTIONS[name]
    default = default_text(field)
    flag = "--" + name.replace("_", "-")
    cells = [f"`{flag}`", default and f"`{default}`", field.metadata["help"]]
    return f"| {' | '.join(cells)} |"


def table_rows(table, prefix=""):
    """The rows of README for a table of the code."""
    return [
        f"| {prefix}`{name}` | {row.treatment} | {row.reason} |"
        for name, row in table.items()
    ]


def response_rows():
    """The rows of README for /v1/responses. What it shares with chat is left out."""
    others = {}
    for name, row in proxy.RESPONSE_PARAMETERS.items():
        if row is not proxy.CHAT_PARAMETERS.get(name):
            others[name] = row
    rows = table_rows(others)
    rows += table_rows(proxy.TOOL_TYPES, "tools: ")
    return rows + table_rows(proxy.ITEM_TYPES, "items: ")


def readme_rows():
    """The rows that README must have, as text. To print them:

    python3 -c "import test_claude_max_proxy as t; print(t.readme_rows())"
    """
    tables = [
        [option_row(name) for name in proxy.OPTIONS],
        table_rows(proxy.CHAT_PARAMETERS),
        response_rows(),
    ]
    return "\n\n".join("\n".join(rows) for rows in tables)


def readme_tables():
    """README's tables below these headings: {first column's heading: rows}."""
    tables = {}
    for table in re.findall(r"(?:^\|.*\n)+", read_document("README.md"), re.M):
        heading, _, *rows = table.splitlines()
        tables[heading.split("|")[1].strip()] = rows
    return tables


def test_readme_lists_every_option():
    assert readme_tables()["Flag"] == [option_row(name) for name in proxy.OPTIONS]


def test_readme_lists_every_parameter():
    tables = readme_tables()
    assert tables["Parameter"] == table_rows(proxy.CHAT_PARAMETERS)
    heading = "Parameter, tool type, or item of `input`"
    assert tables[heading] == response_rows()
    *names, last = [f"`{name}`" for name in proxy.SHARED_PARAMETERS]
    shared = f"{', '.join(names)} and {last} as above"
    assert shared in " ".join(read_document("README.md").split())


def code_blocks(language):
    """The code blocks of README in this language."""
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, read_document("README.md"), re.M | re.S)


def test_readme_first_request_works(server):
    pattern = r"^curl -s http://localhost:3456(\S+) \\\n  -d '(.*?)' \|"
    command = re.search(pattern, read_document("README.md"), re.M)
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    response = server.request("POST", command[1], command[2], form)
    assert response.status == 200
    assert response.content == "You said: Hello! "


def test_readme_code_blocks_are_valid():
    assert code_blocks("python")
    for block in code_blocks("python"):
        compile(block, "README.md", "exec")
    assert code_blocks("json")
    for block in code_blocks("json"):
        json.loads(block)


def test_readme_links_to_its_own_headings():
    readme = read_document("README.md")
    text = re.sub(r"^```.*?^```$", "", readme, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    anchors = set()
    for heading in headings:
        anchors.add(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    assert len(anchors) == len(headings)
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= anchors


def test_readme_lines_fit_on_a_screen():
    """Whoever reads README in a terminal or a diff sees whole lines."""
    lines = read_document("README.md").splitlines()
    assert [line for line in lines if len(line) > 120] == []


def test_help_lists_every_option_with_its_default(capsys):
    out = " ".join(parse_arguments_exit(capsys, "--help")[1].split())
    for name, field in proxy.OPTIONS.items():
        description = " ".join(field.metadata["help"].split())
        default = default_text(field)
        if default:
            description += f" (default: {default})"
        assert "--" + name.replace("_", "-") in out
        assert description in out


def test_plist_starts_the_server(tmp_path):
    plist = plistlib.loads(read_document("com.claude-max-api.plist").encode())
    assert plist["Label"] == "com.claude-max-api"
    assert plist["RunAtLoad"] is True
    assert plist["KeepAlive"] is True
    path = plist["EnvironmentVariables"]["PATH"]
    assert "/opt/homebrew/bin" in path.split(":")
    assert "/usr/local/bin" in path.split(":")
    home = tmp_path / "home with space"
    (home / ".local" / "bin").mkdir(parents=True)
    shutil.copy(proxy.__file__, home / ".local" / "bin")
    env = {
        "HOME": str(home),
        "CLAUDE_MAX_PROXY_PORT": "70000",  # it starts, and refuses that
        "PATH": os.path.dirname(sys.executable) + ":" + path,
    }
    done = subprocess.run(plist["ProgramArguments"], env=env, timeout=30)
    assert done.returncode == 2
    log = (home / "Library" / "Logs" / "claude-max-api.log").read_text()
    assert "CLAUDE_MAX_PROXY_PORT" in log


def test_imports_are_of_the_standard_library():
    names = set()
    for node in ast.walk(ast.parse(read_document("claude_max_proxy.py"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    assert len(names) > 20
    library = os.path.dirname(os.__file__)
    for name in names:
        origin = importlib.util.find_spec(name).origin
        if origin not in ("built-in", "frozen"):
            assert origin.startswith(library)
            assert "site-packages" not in origin


# ── The contract with the real CLI ───────────────────────────────────────────────
# These tests need a `claude` on PATH, or CLAUDE_CLIS, which names some.


def real_clis():
    named = [
        path for path in os.environ.get("CLAUDE_CLIS", "").split(os.pathsep) if path
    ]
    if named:
        return named
    found = shutil.which("claude")
    return [found] if found else []


def make_home_with_traps(home):
    """Settings, cache and files of a user, none of which may reach the API."""
    (home / ".claude").mkdir()
    (home / ".claude" / "CLAUDE.md").write_text("TRAP: cache")
    hook = {"type": "command", "command": "echo TRAP: hook"}
    settings = {"hooks": {"UserPromptSubmit": [{"hooks": [hook]}]}, "model": "opus"}
    (home / ".claude" / "settings.json").write_text(json.dumps(settings))
    mcp_servers = {"trap": {"command": "echo", "args": ["TRAP: mcp"]}}
    (home / ".claude.json").write_text(json.dumps({"mcpServers": mcp_servers}))
    (home / "trap.txt").write_text("TRAP: file")


class RealServer(LocalServer):
    """A server with a real CLI, which asks a small Messages API."""

    def __init__(self, claude, api, home, **settings):
        super().__init__(claude=claude, **settings)
        self.claude = claude
        self.api = api
        self.home = home

    def version(self):
        """The version of the CLI."""
        version = self.health()["claude"]["version"]
        return tuple(map(int, version.split(".")))

    def api_request(self):
        """The body of the one request that reached the API since the last call."""
        entries = self.api.log[:]
        self.forget_requests()
        assert len(entries) == 1, [entry["wrong"] for entry in entries]
        (entry,) = entries
        assert not entry["wrong"]
        assert "TRAP" not in json.dumps(entry["body"])
        return entry["body"]

    def forget_requests(self):
        del self.api.log[:]


@pytest.fixture(
    scope="module",
    params=real_clis() or [None],
    ids=os.path.basename if real_clis() else None,
)
def real(request, nothing_left_at_the_end, tmp_path_factory):
    """A RealServer without spares, in a home full of traps."""
    if request.param is None:
        pytest.skip("no real `claude` on PATH (and none named by CLAUDE_CLIS)")
    home = tmp_path_factory.mktemp("home")
    make_home_with_traps(home)
    api = MessagesAPI()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in api.environment(home).items():
            patch.setenv(name, value)
        server = RealServer(request.param, api, home)
        yield server
        server.close()
        api.close()


@pytest.fixture
def real_with_spares(real):
    """The same with two spares, which share the first one's directory.

    The directory's name stands in the requests.
    """
    server = RealServer(real.claude, real.api, real.home, spares=2)
    server.share_cli_directory(real)
    yield server
    server.leave_cli_directory()
    server.close()


def turns_at_api(body):
    """The turns of an API request, without the CLI's reminders and cache marks.

    Neighbouring texts are joined: older CLIs get some in two pieces.
    """
    turns = []
    for message in body["messages"]:
        if message["role"] == "system":
            continue
        blocks = []
        for block in api_blocks(message):
            block = {
                key: value for key, value in block.items() if key != "cache_control"
            }
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


def wanted_turns(messages, **parameters):
    """The turns that must reach the API for these messages."""
    turns = parse_chat(messages, **parameters).turns
    plain = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    return turns_at_api({"messages": plain})


def texts_of(turns):
    """The text of each turn. Older CLIs put a newline before some."""
    texts = []
    for role, blocks in turns:
        text = "".join(block["text"] for block in blocks)
        texts.append((role, text.lstrip("\n")))
    return texts


def without_metadata(body):
    """A body of the API without the part that names the session."""
    return {**body, "metadata": None}


# Texts that mean something where a user types.
TYPED = [
    "@/etc/passwd",
    "/clear",
    "/compact now",
    "!ls",
    "# x",
    "@trap.txt",
    "//",
    "ultrathink",
]
CONVERSATIONS = {
    "1 turn": dialogue("Hello!"),
    "2 turns": dialogue("Hello!", "Hi.", "How are you?"),
    "10 turns": dialogue(*(f"text {number}" for number in range(19))),
    "60 turns": dialogue(*(f"text {number}" for number in range(119))),
    "parts": [
        user(text_blocks("a", "b")),
        assistant(text_blocks("c", "d")),
        user(text_blocks("e", "f")),
    ],
    "system in the middle": [
        system("s"),
        *dialogue("a", "b"),
        system("be brief"),
        user("c"),
    ],
    "long system": [system("s" * 300_000), user("Hello!")],
    "long text": dialogue("u" * 1_000_000, "ok", "v" * 1_000_000),
    "unicode": dialogue("emoji 😀 é \x00 \u2028 \r\n end ", " ja\t", " 日本語\n"),
    "lone surrogate": dialogue("a\ud800b"),
    "typed, earlier": [
        *(message for text in TYPED for message in dialogue(text, "ok")),
        user("end"),
    ],
    "begins with an assistant": [assistant("Hi."), user("Hello!")],
}
for typed_text in TYPED:
    CONVERSATIONS[f"typed, last: {typed_text}"] = dialogue("first", "ok", typed_text)


@pytest.mark.parametrize("name", list(CONVERSATIONS))
def test_real_conversation_reaches_the_api(real, name):
    messages = CONVERSATIONS[name]
    response = real.chat(messages)
    assert response.status == 200, response.text
    assert response.content == "tok0 tok1 tok2 tok3 tok4 "
    body = real.api_request()
    raw = json.dumps({"model": "opus", "messages": messages}).encode()
    parsed = parse_chat_body(proxy.parse_body(raw))
    wanted = [(turn["role"], turn["content"]) for turn in parsed.turns]
    assert texts_of(turns_at_api(body)) == texts_of(wanted)
    if parsed.system:
        assert body["system"][-1]["text"] == parsed.system


def test_real_request_is_small(real):
    real.chat("Hello!")
    assert len(json.dumps(real.api_request())) < 3000


def test_real_cache_marks_have_one_lifetime(real):
    real.chat([system("s"), *dialogue("a", "b", "c")])
    body = json.dumps(real.api_request())
    marks = re.findall(r'"cache_control": ({[^}]*})', body)
    assert 2 < len(marks) <= 4
    assert set(marks) == {'{"type": "ephemeral", "ttl": "1h"}'}


def test_real_stream(real):
    response = real.chat(
        "mock:tokens=3", stream=True, stream_options={"include_usage": True}
    )
    assert response.content == "tok0 tok1 tok2 "
    assert response.done
    assert response.chunks[-1]["usage"]["completion_tokens"] == 3
    real.api_request()


@pytest.mark.parametrize("status", [400, 401, 404, 429])
def test_real_failure(real, status):
    response = real.chat(f"mock:status={status}", stream=True)
    assert response.status == status
    real.forget_requests()


@pytest.mark.parametrize(
    "stop_reason, finish_reason",
    [("max_tokens", "length"), ("refusal", "content_filter")],
)
def test_real_answer_ends_with_the_first_message(real, stop_reason, finish_reason):
    response = real.chat(f"mock:stop={stop_reason}", max_tokens=4000)
    assert response.finish_reason == finish_reason
    assert response.content == "tok0 tok1 tok2 tok3 tok4 "
    wait_until(real.is_idle)
    assert real.api_request()["max_tokens"] == 4000


def test_real_restart_completes_the_answer(real):
    response = real.chat("mock:tokens=6 mock:cut=3", stream=True)
    assert response.content == "tok0 tok1 tok2 tok3 tok4 tok5 "
    assert response.done
    real.forget_requests()


def test_real_home_holds_nothing_afterwards(real):
    real.chat("mock:stop=max_tokens")
    real.chat("Hello!")
    real.forget_requests()
    wait_until(real.is_idle)
    assert not glob.glob(f"{real.home}/.claude/sessions/*")
    assert not glob.glob(f"{real.home}/.claude/projects/*")


def run_tool_loop(server, rounds, **parameters):
    """A tool loop with parallel calls; each request must reach the API as it was."""
    tools = [tool(), tool("Bash"), tool("odd.name")]
    names = ["Bash", "get_weather", proxy.api_name("odd.name")]
    words = "mock:tool=get_weather,Bash mock:tokens=1"
    question = user(words + " mock:think=1")
    history = [system("s"), question]
    for number in range(rounds):
        stream = bool(number % 2)
        response = server.chat(history, tools=tools, stream=stream, **parameters)
        assert response.finish_reason == "tool_calls", response.text
        body = server.api_request()
        assert [one["name"] for one in body["tools"]] == names
        turns = []
        for role, blocks in turns_at_api(body):
            turns.append((role, [b for b in blocks if b["type"] != "thinking"]))
        assert turns == wanted_turns(history, tools=tools)
        first, second = response.tool_calls
        history += [
            response.message,
            tool_message(text_blocks("a", "b"), first["id"]),
            tool_message(words, second["id"]),
            question,
        ]


def test_real_tool_loop(real):
    run_tool_loop(real, 3)


def test_real_tool_loop_with_spares_and_signed_thinking(real_with_spares):
    run_tool_loop(real_with_spares, 4, model="claude-haiku-4-5")


OPTIONS = {
    "plain": {},
    "max_tokens": {"max_tokens": 5000},
    "effort": {"reasoning_effort": "high"},
    "no thinking": {"reasoning_effort": "none"},
    "tools": {"tools": [tool()]},
    "tool_choice": {"tools": [tool()], "tool_choice": "required"},
}


def bodies_of_a_conversation(server, model, plain, parameters):
    """What reaches the API of single requests, and of a conversation's third turn.

    A server with spares uses a blank one, an initialized one and a prepared one.
    """
    bodies = []

    def ask(messages, options):
        server.settle()
        response = server.chat(messages, model=model, **options)
        assert response.status == 200, response.text
        bodies.append(without_metadata(server.api_request()))
        return response.message

    first = [system("s"), user("/how are you doing today? mock:tokens=2")]
    for options in (plain, plain, parameters, parameters):
        ask(first, options)
    history = [*first, assistant("tok0 tok1 "), user("go on")]
    answer = ask(history, plain)
    ask([*history, answer, user("on")], parameters)
    return bodies


@pytest.mark.parametrize("model", ["opus", "claude-haiku-4-5"])
@pytest.mark.parametrize("name", list(OPTIONS))
def test_real_spare_asks_as_a_new_process_does(real, real_with_spares, name, model):
    plain = {"tools": [tool()]} if "tool" in name else {}
    expected = bodies_of_a_conversation(real, model, plain, OPTIONS[name])
    real_with_spares.announce()
    bodies = bodies_of_a_conversation(real_with_spares, model, plain, OPTIONS[name])
    assert bodies == expected


def test_real_both_endpoints_ask_the_same(real):
    tools = [tool(description=None)]
    assert real.chat(CHAT_MESSAGES, tools=tools).status == 200
    expected = without_metadata(real.api_request())
    items = list(INPUT_ITEMS)
    items[-2] = assistant("d")  # the answer itself instead of a reference to it
    assert real.respond(items, tools=[function_tool()]).status == 200
    body = without_metadata(real.api_request())
    assert json.dumps(body) == json.dumps(expected)


def test_real_tools_are_all_there(real):
    names = [
        "Read",
        "Task",
        "Agent",
        "ToolSearch",
        "StructuredOutput",
        "Skill",
        "a" * 128,
    ]
    tools = [tool(name, "x" * 5000) for name in names]
    tools += [tool(f"t{number}") for number in range(121)]
    tools[0]["function"]["parameters"] = {"anyOf": [{"properties": {"q": True}}]}
    tools[1]["function"]["parameters"] = {"properties": {"q": True}}
    response = real.chat("Hello!", tools=tools)
    assert response.status == 200, response.text
    body = real.api_request()
    descriptions = {one["name"]: json.dumps(one) for one in body["tools"]}
    wanted = {proxy.api_name(one["function"]["name"]) for one in tools}
    assert set(descriptions) == wanted
    for name in names:
        assert "x" * 5000 in descriptions[proxy.api_name(name)]
    for block in api_blocks(body["messages"][0]):
        assert "Attribution" not in block.get("text", "")
        assert "agent types" not in block.get("text", "")


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
    {
        "anyOf": [{"$ref": "#/$defs/x"}, {"not": {}}],
        "$defs": {"x": {"required": ["a b"]}},
    },
]


@pytest.mark.parametrize("structured", [False, True])
def test_real_odd_schemas_are_all_there(real, structured):
    tools = []
    for number, schema in enumerate(ODD_SCHEMAS):
        tools.append(tool(f"t{number}", parameters=schema))
    parameters = {}
    if structured:
        parameters["response_format"] = json_schema_format(ODD_SCHEMAS[0])
    response = real.chat("x", tools=tools, **parameters)
    assert response.status == 200, response.text
    wait_until(real.is_idle)
    assert len(real.api_request()["tools"]) == len(tools) + structured


def test_real_wrapped_input_there_and_back(real):
    tools = [tool("look", parameters=ODD_SCHEMA)]
    history = [user('mock:tool=look mock:notext mock:input={"input":{"$filter":1}}')]
    response = real.chat(history, tools=tools, stream=True)
    (call,) = response.tool_calls
    assert json.loads(call["function"]["arguments"]) == {"$filter": 1}
    real.api_request()
    history += [response.message, tool_message(call_id=call["id"])]
    assert real.chat(history, tools=tools).status == 200
    _, blocks = turns_at_api(real.api_request())[1]
    assert blocks[0]["type"] == "tool_use"
    assert blocks[0]["input"] == {"input": {"$filter": 1}}


def test_real_tool_that_the_cli_drops_is_a_400(real, monkeypatch):
    monkeypatch.setattr(proxy, "API_PROPERTY", re.compile(".*"))
    odd = tool("odd", parameters={"properties": {"$filter": {}}})
    response = real.chat("x", tools=[tool(), odd])
    if real.version() >= (2, 1, 330):
        assert response.status == 400
        assert "'odd'" in response.error["message"]
    else:  # it drops none
        assert response.status == 200
    wait_until(real.is_idle)
    real.forget_requests()


def test_real_conversation_with_one_id_for_all_calls(real):
    step = [assistant_calls(tool_call(call_id="c")), tool_message(call_id="c")]
    history = [user("x"), *step, *step, *step]
    assert real.chat(history, tools=[tool()]).status == 200
    turns = turns_at_api(real.api_request())
    assert turns == wanted_turns(history, tools=[tool()])


def test_real_cache_mark_stays_beside_an_image(real):
    parts = [*text_blocks("look"), image_part(data_url("image/png"))]
    assert real.chat([user(parts)]).status == 200
    messages = real.api_request()["messages"]
    last_user = [message for message in messages if message["role"] == "user"][-1]
    (text,) = [b for b in api_blocks(last_user) if b.get("text") == "look"]
    assert text["cache_control"]


def test_real_budget_model_with_a_text_behind_the_result(real):
    loop = [*tool_loop(), user("and?")]
    for history in (loop, [*loop, assistant("a"), user("b")]):
        response = real.chat(history, model="claude-haiku-4-5", tools=[tool()])
        assert response.status == 200, response.text
        real.api_request()


@pytest.mark.parametrize(
    "choice",
    ["none", "required", {"type": "function", "function": {"name": "get_weather"}}],
    ids=["none", "required", "function"],
)
def test_real_tool_choice(real, choice):
    parameters = {
        "tools": [tool()],
        "tool_choice": choice,
        "parallel_tool_calls": False,
    }
    real.chat("mock:tool=get_weather", **parameters)
    wanted = parse_chat(**parameters).tool_choice
    assert real.api_request()["tool_choice"] == wanted


def test_real_structured_output(real):
    response_format = json_schema_format()
    words = 'mock:input={"a":1}'
    response = real.chat(words, response_format=response_format, stream=True)
    assert response.content == '{"a":1}'
    assert response.finish_reason == "stop"
    wait_until(real.is_idle)
    assert real.api_request()["tools"][0]["input_schema"] == INTEGER_SCHEMA


def test_real_structured_output_with_an_odd_schema(real):
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "x-foo": 1,
        "properties": {
            "a": {"type": "integer", "example": 5, "exclusiveMinimum": True}
        },
    }
    response_format = json_schema_format(schema)
    response = real.chat('mock:input={"a":1}', response_format=response_format)
    assert response.content == '{"a":1}'
    wait_until(real.is_idle)
    real.api_request()


def test_real_structured_output_of_any_object(real):
    response_format = {"type": "json_object"}
    response = real.chat('mock:input={"b":2}', response_format=response_format)
    assert response.content == '{"b":2}'
    wait_until(real.is_idle)
    real.api_request()


def test_real_structured_output_with_tools(real):
    both = {"tools": [tool()], "response_format": json_schema_format()}
    response = real.chat("mock:tool=get_weather mock:notext", **both)
    assert response.finish_reason == "tool_calls"
    wait_until(real.is_idle)
    wanted = {"type": "any", "disable_parallel_tool_use": True}
    assert real.api_request()["tool_choice"] == wanted


def test_real_media(real):
    table = file_part(data_url("text/csv", "YSxi"), filename="a.csv")
    parts = [image_part("https://example.com/x.png"), table, *text_blocks("look")]
    messages = [user(parts), assistant("ok"), user(parts)]
    real.chat(messages)
    assert turns_at_api(real.api_request()) == wanted_turns(messages)


@pytest.mark.parametrize("model", ["claude-haiku-4-5", "sonnet"])
def test_real_thinking(real, model):
    response = real.chat("mock:think=2 mock:tokens=1", model=model)
    assert response.message["reasoning_content"] == "thought0 thought1 "
    assert real.api_request()["thinking"]["type"] in ("enabled", "adaptive")


@pytest.mark.parametrize(
    "parameters",
    [{"max_tokens": 10}, {"max_tokens": 1500}, {"reasoning_effort": "none"}],
)
@pytest.mark.parametrize("model", ["claude-haiku-4-5", "sonnet"])
def test_real_thinking_off(real, model, parameters):
    assert real.chat("x", model=model, **parameters).status == 200
    thinking = real.api_request().get("thinking") or {"type": "disabled"}
    assert thinking["type"] == "disabled"


@pytest.mark.parametrize("model", ["claude-haiku-4-5", "sonnet"])
def test_real_thinking_unknown_in_a_tool_loop(real, model):
    assert real.chat(tool_loop(), model=model, tools=[tool()]).status == 200
    real.api_request()


def test_real_stop_string_and_n(real):
    response = real.chat("mock:tokens=9", stop="k2", n=2)
    assert response.content == "tok0 tok1 to"
    real.forget_requests()


@pytest.fixture
def patient_real(real, monkeypatch):
    """A server with the real CLI that reads on for the plan's limits."""
    monkeypatch.setattr(proxy, "RATE_LIMIT_EVENT_SECONDS", 5)
    server = RealServer(real.claude, real.api, real.home)
    yield server
    server.close()
    server.forget_requests()


def test_real_models(real):
    server = RealServer(real.claude, real.api, real.home)
    try:
        server.health()
        wait_until(server.knows_models)
        wait_until(server.is_idle)
        ids = listed_models(server)
        assert ids[:3] == README_MODELS
        aliases = ids[3:]
        assert {"default", "haiku"} <= set(aliases)
        for name in aliases:
            model = server.request("GET", "/v1/models/" + quoted(name)).json
            assert model["display_name"]
        if server.version() >= (2, 1, 332):
            assert "fable" in aliases
            assert [name for name in aliases if name.startswith("claude-fable-")]
        assert not real.api.log  # the model was not asked
    finally:
        server.close()


def quoted(name):
    return name.replace("[", "%5B").replace("]", "%5D")


def test_real_models_are_accepted(real):
    server = RealServer(real.claude, real.api, real.home)
    try:
        server.health()
        wait_until(server.knows_models)
        families = {"opus", "sonnet", "haiku"}
        for name in set(listed_models(server)) - families - set(README_MODELS):
            if name.startswith("claude-") and "fable" not in name:
                continue
            assert server.chat("mock:tokens=1", name).content == "tok0 ", name
            body = server.api_request()
            if name.startswith("claude-"):
                assert body["model"] == name
    finally:
        server.close()


@pytest.mark.parametrize("words", ["mock:tokens=1", "mock:tool=get_weather"])
def test_real_plan_shows_in_health(patient_real, words):
    server = patient_real
    tells_all = server.version() >= (2, 1, 330)
    used = "0.37,0.12" if tells_all else "0.95,0.12"  # old ones tell near the limit
    response = server.chat(f"{words} mock:plan={used}", tools=[tool()])
    assert response.status == 200
    plan = wait_for_plan(server)
    wait_until(server.is_idle)
    server.api_request()  # one, as without the limits
    window = plan["windows"]["five_hour"]
    if tells_all:
        assert window["used"] == 0.37
        assert plan["windows"]["seven_day"]["used"] == 0.12
    assert 0 < window["resets_at"] - time.time() <= 2 * 3600
    assert window["status"] in ("allowed", "allowed_warning")


def test_real_plan_of_a_cut_answer_is_not_waited_for(patient_real):
    server = patient_real
    words = "mock:plan=0.95,0.12 mock:stop=max_tokens mock:tokens=1"
    assert server.chat(words).finish_reason == "length"
    wait_until(server.is_idle)
    server.api_request()  # the CLI did not ask again
    assert server.health()["plan"]["windows"] == {}


def test_real_plan_limit(real, monkeypatch):
    monkeypatch.setattr(proxy, "RATE_LIMIT_EVENT_SECONDS", 5)
    server = RealServer(real.claude, real.api, real.home, plan_limit=90)
    try:
        server.chat("mock:plan=0.95,0.12 mock:tokens=1")
        windows = wait_for_plan(server)["windows"]
        wait_until(server.is_idle)
        server.api_request()
        if windows["five_hour"]["used"] is None:
            pytest.skip("this CLI does not tell how much is used")
        response = server.chat("hi")
        assert response.error["type"] == "usage_limit_reached"
        assert not real.api.log
    finally:
        server.close()


@pytest.mark.parametrize("role", ["user", "developer"])
def test_real_message_between_a_call_and_its_output(real, role):
    late = item("message", role=role, content=[item("input_text", text="late")])
    items = [user("a"), function_call_item(), late, call_output_item()]
    response = real.respond(items, tools=[function_tool()])
    assert response.status == 200, response.text
    _, content = turns_at_api(real.api_request())[-1]
    assert [block["type"] for block in content] == ["tool_result", "text"]
    assert "late" in content[1]["text"]


def test_real_message_between_parallel_calls_and_outputs(real):
    calls = [function_call_item("i"), function_call_item("k")]
    outputs = [call_output_item("i", "1"), call_output_item("k", "2")]
    items = [user("a"), *calls, outputs[0], system("late"), outputs[1]]
    assert real.respond(items, tools=[function_tool()]).status == 200
    _, content = turns_at_api(real.api_request())[-1]
    kinds = [block["type"] for block in content]
    assert kinds == ["tool_result", "tool_result", "text"]


@pytest.mark.parametrize(
    "arguments",
    ['{"a":NaN}', '{"a":-Infinity}', '{"a":1e999}', r'{"a":"\ud800"}'],
)
def test_real_arguments_that_are_no_json(real, arguments):
    history = [user("a"), assistant_calls(tool_call(arguments=arguments))]
    history += [tool_message(), assistant("b"), user("c")]
    response = real.chat(history, tools=[tool()])
    assert response.status == 200, response.text
    wanted = wanted_turns(history, tools=[tool()])
    assert turns_at_api(real.api_request()) == wanted


def test_real_file_url(real):
    part = item("input_file", file_url="https://example.com/a.pdf")
    items = [
        user([part, item("input_text", text="read")]),
        function_call_item(),
        call_output_item(output=[part]),
        user([part, item("input_text", text="again")]),
    ]
    response = real.respond(items, tools=[function_tool()])
    assert response.status == 200, response.text
    turns = turns_at_api(real.api_request())
    document = {
        "type": "document",
        "source": {"type": "url", "url": "https://example.com/a.pdf"},
    }
    assert turns[0][1][0] == document
    result = turns[2][1][0]
    assert result["content"] == [document]
    assert document in turns[-1][1]


def test_real_failure_403_keeps_the_words_of_the_api(real):
    response = real.chat("mock:status=403")
    assert response.status in (401, 403)
    assert "mock failure" in response.error["message"]
    real.forget_requests()
