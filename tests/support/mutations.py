"""Good frames and broken ones, mutated: what `fuzz` sends. A seed always gives the same row of them."""

from __future__ import annotations

import collections
import json
import random
import re
from collections.abc import Iterator
from typing import Any

from expected import LIMIT, MAX_DIGITS, TRACEPARENT
from peer import vector_payload, vectors

ECHO = "offline/echo"


def fields(inputs: dict[str, Any], outputs: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A signature of fields with these types."""
    both = {"inputs": inputs, "outputs": outputs}
    return {side: [{"name": name, "type": it} for name, it in of.items()] for side, of in both.items()} | more


PROPERTIES = {"first-name": {"type": "string", "default": "x"}, "n": {"type": ["integer", "null"], "minimum": 1}}
ORDER = {"$ref": "#/$defs/o", "$defs": {"o": {"type": "object", "properties": PROPERTIES, "required": ["n"]}}}
ROWS = {"type": "array", "items": {"anyOf": [{"enum": ["a", 1]}, {"const": 2}]}}
TEXTS = {"type": "array", "items": {"type": "string", "pattern": "^[ab]*a[ab]{0,500}$"}}
CODE = {"type": "string", "pattern": r"^\w+: [^\d]{1,40}(?:\p{Greek}|$)", "examples": ["echo: code"]}
SEARCH = {"name": "search", "args": {"query": {"type": "str", "desc": "what"}, "n": "int"}}
ADD = {"name": "add", "args": {"xs": {"type": {"type": "array", "items": {"type": "number"}}}}}
REWARDS: list[dict[str, Any]] = [{"tool": "judge"}, {"field": "answer", "equals": "x"}]
PREFIXES = [{"prefix": "Question:", "description": "what"}, {"prefix": "Answer:", "description": "so"}]
STATE = {
    "traces": [],
    "train": [],
    "demos": [{"augmented": True, "question": "q", "answer": "a"}],
    "lm": None,
    "signature": {"instructions": "Answer.", "fields": PREFIXES},
    "metadata": {"dependency_versions": {"dspy": "3.4.1"}},
}
QA: dict[str, Any] = {"signature": "question -> answer"}
PROGRAMS: dict[str, dict[str, Any]] = {
    "qa": QA,
    "cot": {"signature": "context: list[str], question -> answer: int", "program_type": "chain_of_thought"},
    "typed": {
        "signature": fields(
            {"n": "int", "tags": "list[str]", "maybe": "Optional[dict[str, float]]"},
            {"pick": "Literal['a', 'b', 3]", "sure": "probability", "table": "map"},
            instructions="Pick one. žluťoučký 🐎",
        ),
        "adapter": "json",
        "config": {"temperature": 0.5, "max_tokens": 100},
    },
    "media": {"signature": "picture: Image, past: History -> text, day: date", "adapter": "xml"},
    "own": {"signature": "q: Any -> a: tuple[int, str]", "lm": {"model": ECHO, "api_key": "sk-fuzzed-key-1"}},
    "agent": {**QA, "program_type": "react", "options": {"max_iters": 3}, "tools": [SEARCH, ADD]},
    "tooled": {**QA, "tools": [SEARCH]},
    "best": {**QA, "program_type": "best_of_n", "options": {"n": 2, "threshold": 0.9, "reward": REWARDS[0]}},
    "refined": {**QA, "program_type": "refine", "options": {"n": 2, "reward": REWARDS[1]}},
    "judge": {**QA, "program_type": "multi_chain_comparison", "options": {"m": 2}},
    "schema": {
        "signature": fields({"order": ORDER}, {"rows": ROWS}),
        "adapter": {"name": "two_step", "extraction_model": {"model": ECHO}},
    },
    "patterned": {"signature": fields({"texts": TEXTS}, {"code": CODE})},
    "learned": {**QA, "demos": [{"question": "q", "answer": "a"}], "state": STATE},
}
INPUTS: dict[str, dict[str, Any]] = {
    "qa": {"question": "What is 日本語 [[ ## answer ## ]] <x>?"},
    "cot": {"context": ["a", "b\u0000\n"], "question": "Why?"},
    "typed": {"n": 10**30, "tags": ["x", "\U0001f40e"], "maybe": {"k": 1.5e300}},
    "media": {"picture": "https://example.org/a.png", "past": {"messages": [{"text": "x", "day": "2026-01-01"}]}},
    "own": {"q": [[[{"deep": [None, True, -0.0]}]]]},
    "agent": {"question": "Why?"},
    "tooled": {"question": "Why?"},
    "best": {"question": "Why?"},
    "refined": {"question": "Why?"},
    "judge": {"question": "Why?", "completions": [{"reasoning": "r", "answer": "a"}, {"rationale": "s", "answer": 2}]},
    "schema": {"order": {"first-name": "A", "n": 5, "more": [1]}},
    "patterned": {"texts": ["ab", "a"]},
    "learned": {"question": "Why?"},
}
MORE: list[dict[str, Any]] = [
    {"config": {"temperature": 1.0}, "lm": {"model": ECHO}},
    {"inputs": [INPUTS["qa"], {}, INPUTS["qa"]]},
    {"inputs": [INPUTS["qa"]] * 2, "attempts": 2, "max_concurrency": 1, "item_timeout_ms": 500.5},
]
ARGS: list[tuple[str, dict[str, Any]]] = [
    ("ping", {"any": ["thing", 1, None]}),
    ("get_stats", {}),
    ("list_programs", {"details": True}),
    ("list_programs", {"program_ids": ["qa", "cot", "nobody"], "details": False}),
    ("list_programs", {"program_ids": ["qa", "learned"], "state": True}),
    ("cleanup", {"program_ids": ["nobody", "media"]}),
    ("frobnicate", {"a": {"b": {"c": [{}, [], ""]}}}),
    ("execute_program", {"program_id": "nobody", "inputs": {}}),
    *(("create_program", {"id": id, **program}) for id, program in PROGRAMS.items()),
    *(("execute_program", {"program_id": id, "inputs": given}) for id, given in INPUTS.items()),
    *(("execute_program", {"program_id": "qa", "inputs": INPUTS["qa"], **more}) for more in MORE),
]
REQUESTS = [{"command": command, "args": args} for command, args in ARGS]
# What empties the registry comes rarely, and what costs most.
WEIGHTS = [1 if request["command"] in ("cleanup", "get_stats") else 4 for request in REQUESTS]
ENVELOPES: list[dict[str, Any]] = [
    {},
    {},
    {"meta": True},
    {"timeout_ms": 60_000},
    {"timeout_ms": 5, "meta": True},
    {"timeout_ms": 0.001},
    {"stream": True, "meta": False, "timestamp": "2026-01-01T00:00:00Z"},
    {"stream": True, "meta": True},
    {"traceparent": TRACEPARENT},
]
BROKEN = [payload for payload in map(vector_payload, vectors("malformed")) if len(payload) < 10_000]
# Values of every kind that is wrong somewhere, and strings that are not JSON.
ODD = [
    *("null", "true", "false", "0", "-0", "1", "-1", "1.5", "1e999", "-1e-999", "0.001", "20", "4e4"),
    *("9" * 30, "9" * MAX_DIGITS, "-" + "9" * MAX_DIGITS, '"' + "x" * 5000 + '"', '"' + "\\u0001" * 3000 + '"'),
    *('""', '"\\u0000"', '"\\ud83d\\udc0e"', '"é\u2028 \x85 x"', '"a\\nb"', '"id"', '"x y"', '"str"', '"json"'),
    *('"qa"', '"typed"', '"ping"', '"execute_program"', '"cleanup"', '"os:system"', '"offline/echo"', '"openai/x"'),
    *('"int | None"', '"list[list[int]]"', '"Literal[1, 2]"', '"q, q -> a"', '"(" -> "', '"q -> a: dict[Any, Any]"'),
    *('"q -> a: bool, b: set[date]"', '"Union[int, History]"', '"predict"', '"embedding"', '"file"', '"data:,x"'),
    *("[]", "{}", "[null]", '{"": []}', '{"id":1}', '[{"name":"q"},{"name":"q"}]', '{"name":"q","type":"set[dict]"}'),
    *('{"type":"object"}', '{"$ref":"#"}', '{"anyOf":[{"type":"string"},{"type":"null"}]}', '{"tool":"t"}'),
    *('{"base64":"AAAA","mime":"image/png"}', '"data:image/png;base64,AAAA"', '{"field":"answer","equals":1}'),
    *('{"name":"two_step","extraction_model":{"model":"offline/echo"}}', '"react"', '"refine"', '"rlm"'),
    *('[{"name":"q"}]', '{"inputs":[],"outputs":[{"name":"a"}]}', '{"question":"x"}', "[" * 150 + "]" * 150),
]
BAD = [
    *("9" * (MAX_DIGITS + 1), "NaN", "-Infinity", "nul", "'x'", "01", "1.", "+1", '"\x01"', '"\\x"', '"\\ud800"'),
    *("[" * 400 + "]" * 400, '{"a":' * 1200, "\x00", "[1,]", '{"a"}', "//"),
]
KEYS = [
    *("id", "command", "args", "timeout_ms", "meta", "stream", "traceparent", "cancel", "program_id", "inputs", "lm"),
    *("config", "attempts", "max_concurrency", "item_timeout_ms", "answers"),
    *("signature", "program_type", "adapter", "outputs", "name", "type", "desc", "description", "instructions", "n"),
    *("options", "tools", "demos", "state", "state_path", "args", "reward", "n", "completions", "$ref", "properties"),
    *("tool_result", "call_id", "success", "result", "items", "required", "enum", "default", "traces", "fields"),
    *("details", "program_ids", "temperature", "max_tokens", "cache", "rollout_id", "api_key", "model", "question"),
    *("", "\u0000", "two\n lines \u2028 of it", "k" * 3000),
]
# What a careless expression, or a guard before one, takes long for: the beginning of a pattern, and what goes on.
STARTS = ["", "{", "[", "(", r"a\p{", "(?", "(?P<", "[^", "a{", "(?i:"]
UNITS = [
    *(" ", "{", "(", "[", "(?", "1", "{1,", r"\p{", r"\pL", "a{99}", "(a{9}", "(a|b)*"),
    *("[ab]{500}", "a?", r"\\", "|", "é"),
]
ENDS = ["", "}", ")", "]", "){99}", "c", " !", ")" * 50]


class Frames:
    """An endless row of payloads; the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._recent: collections.deque[Any] = collections.deque(["nobody"], maxlen=50)

    def next(self) -> bytes:
        """A good or a broken frame, mutated in one of two ways, or as it is."""
        rng = self._random
        if rng.random() < 0.0005:
            return b"x" * (LIMIT + rng.randrange(1, 1000))
        if rng.random() < 0.005:
            return self._slow()
        if rng.random() < 0.05:
            payload = re.sub(rb'("id":\s*)[17]\b', rb"\g<1>%d" % self._number(), rng.choice(BROKEN))
            return self._bytes(payload)
        message = self._message()
        way = rng.random()
        if way < 0.1:
            return self._write(message)
        if way < 0.65:
            for _ in range(self._times()):
                message = self._values(message)
            return self._write(message)
        return self._bytes(self._write(message))

    def _slow(self) -> bytes:
        """Frames made to take long: patterns, strings for them, strings for a regular expression, runs of digits."""
        rng = self._random
        way = rng.randrange(4)
        if way == 0:
            size = rng.choice((200, 1000, 1001, 20_000))
            unit = rng.choice(UNITS)
            pattern = (rng.choice(STARTS) + unit * (size // len(unit)))[:size] + rng.choice(ENDS)
            field = {"name": "a", "type": {"type": "string", "pattern": pattern}}
            args = {"id": "slow", "signature": {"inputs": [], "outputs": [field]}}
            return self._write({"id": self._id(), "command": "create_program", "args": args})
        if way == 1:
            size = rng.choice((100, 5000, 40_000))
            texts = ["".join(rng.choices("ab", k=size)) for _ in range(40_000 // size)]
            args = {"program_id": "patterned", "inputs": {"texts": texts}}
            return self._write({"id": self._id(), "command": "execute_program", "args": args, "timeout_ms": 60_000})
        if way == 2:
            text = rng.choice(("https://", "data:", "data:a/b;")) + rng.choice("a/;. =") * 40_000 + rng.choice(" \n,x")
            args = {"program_id": "media", "inputs": {"picture": text, "past": []}}
            return self._write({"id": self._id(), "command": "execute_program", "args": args})
        run = b"7" * rng.choice((1, 100, MAX_DIGITS - 1, MAX_DIGITS)) + rng.choice((b" ", b",", b".", b"e", b"-"))
        start = rng.choice((b"", b'{"id":%d,"x":' % self._number(), b'{"id":', b'{"id":"%d","x":[' % self._number()))
        return start + run * (50_000 // len(run)) + rng.choice((b"", b"!", b"}", b"1]}"))

    def _message(self) -> dict[str, Any]:
        rng = self._random
        if rng.random() < 0.05:
            return {"cancel": rng.choice(self._recent)}
        if rng.random() < 0.02:
            return {"tool_result": {"call_id": -1, "success": rng.random() < 0.5, "result": 1, "error": "e"}}
        request = rng.choices(REQUESTS, WEIGHTS)[0]
        return {"id": self._id(), **request, **rng.choice(ENVELOPES)}

    def _id(self) -> int | str:
        # Far apart, so that a mutated one is nobody else's.
        number = self._number()
        id = self._random.choice((number, number, -number, number * 10**30, f"id-{number}", f'ž🐎"\\{number}\n'))
        self._recent.append(id)
        return id

    def _number(self) -> int:
        return self._random.randrange(10**11, 10**12)

    def _times(self) -> int:
        return self._random.choice((1, 1, 1, 2, 2, 4))

    def _odd(self) -> str:
        return self._random.choice(BAD if self._random.random() < 0.05 else ODD)

    def _write(self, message: Any) -> bytes:
        """JSON in one of the spellings that it has. An `_Odd` is written as it stands."""
        rng = self._random
        separators = rng.choice(((",", ":"), (", ", ": "), (" ,\n", "\t:\r")))
        texts: dict[str, str] = {}

        def odd(value: _Odd) -> str:
            mark = f"odd mark {len(texts)}"
            texts[json.dumps(mark)] = value.text
            return mark

        text = json.dumps(message, ensure_ascii=rng.random() < 0.3, separators=separators, default=odd)
        for mark, own in texts.items():
            text = text.replace(mark, own)
        return text.encode("utf-8", "surrogatepass")

    def _values(self, message: Any) -> Any:
        """One value, somewhere, of another type, gone, renamed, doubled or nested."""
        rng = self._random
        copy = json.loads(json.dumps(message, default=lambda odd: {"odd": odd.text}), object_hook=_Odd.revive)
        # Mostly inside the arguments: a wrong envelope is found early.
        places = list(_places(copy.get("args") if rng.random() < 0.7 else copy)) or list(_places(copy))
        if not places:
            return copy
        holder, key = rng.choice(places)
        change = rng.randrange(6)
        if change < 3:
            holder[key] = _Odd(self._odd())
        elif change == 3:
            del holder[key]
        elif change == 4 and isinstance(holder, dict):
            holder[rng.choice(KEYS)] = holder.pop(key) if rng.random() < 0.5 else holder[key]
        else:
            holder[key] = [holder[key]] * rng.randrange(3)
        return copy

    def _bytes(self, payload: bytes) -> bytes:
        rng = self._random
        data = bytearray(payload)
        for _ in range(self._times()):
            at = rng.randrange(len(data) + 1)
            end = min(len(data), at + rng.choice((1, 1, 2, 8, 40)))
            change = rng.randrange(8)
            if change == 0 and at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            elif change == 1:
                data[at:at] = bytes([rng.randrange(256)])
            elif change == 2:
                del data[at:end]
            elif change == 3:
                data[at:at] = data[at:end] * rng.choice((1, 1, 2, 50))
            elif change == 4:
                data[at:at] = rng.choice((b"\x00", b"\x00" * 9, b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xef\xbb\xbf"))
            elif change == 5:
                other = self._write(self._message())
                data[at:] = other[rng.randrange(len(other)) :]
            elif change == 6:
                del data[at:]
            else:
                data[at:end] = rng.choice(b'"\\{}[]:,0-. \n').to_bytes(1, "big") * (end - at)
        return bytes(data)


class _Odd:
    """A value in a message that is written as this text, JSON or not."""

    def __init__(self, text: str) -> None:
        self.text = text

    @classmethod
    def revive(cls, value: dict[str, Any]) -> Any:
        return cls(value["odd"]) if value.keys() == {"odd"} else value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in `value` with each of its keys or places."""
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield value, key
            yield from _places(item)
