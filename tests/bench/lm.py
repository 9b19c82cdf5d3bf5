"""The LM of the benchmarks: a loopback server of the OpenAI chat API in a process of its own.

Argument: the delay of each answer in seconds. Prints its port. Ends with its stdin. The model has a known name, as
users' models mostly have: DSPy looks an unknown one up in its whole price list, twice a call.

An agent that asks gets seven tool calls and then the end; a request for a stream gets `TOKENS` tokens, each in a packet
of its own.
"""

import asyncio
import json
import sys
from collections.abc import Iterator
from typing import Any

TOKENS = 300
STEPS = 8


def http(kind: str, more: str = "") -> str:
    return f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n{more}"


def completion(content: str) -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
    head = {"id": "c1", "object": "chat.completion", "created": 0, "model": "gpt-4o-mini"}
    body = json.dumps({**head, "choices": [choice], "usage": usage})
    # Headers and body in one write, else delayed ACKs add 40 ms to every answer.
    return (http("application/json", f"Content-Length: {len(body)}\r\n\r\n") + body).encode()


def fields(**values: Any) -> str:
    parts = [f"[[ ## {name} ## ]]\n{value}" for name, value in values.items()]
    return "\n\n".join([*parts, "[[ ## completed ## ]]"])


def step(number: int, tool: str, **args: Any) -> bytes:
    thought = f"I should look number {number} up, it may be in the list."
    return completion(fields(next_thought=thought, next_tool_name=tool, next_tool_args=json.dumps(args)))


ANSWER = completion(fields(answer="Paris"))
THOUGHT = completion(fields(reasoning="It was there.", answer="Paris"))
# Of some 100 tokens.
LONG = completion(fields(reasoning=" ".join(f"word{n % 10}" for n in range(100)), answer="Paris"))
AGENT = [*(step(n, "search", query=f"number {n}", limit=3) for n in range(STEPS - 1)), step(STEPS - 1, "finish")]


def events() -> Iterator[bytes]:
    """A streamed answer, one event after the other."""
    head = {"id": "c1", "object": "chat.completion.chunk", "created": 0, "model": "gpt-4o-mini"}
    usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}

    def event(delta: dict[str, str], **more: Any) -> bytes:
        finish = "stop" if more else None
        data = json.dumps({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more})
        return f"data: {data}\n\n".encode()

    for text in (
        "[[ ##",
        " answer",
        " ## ]]",
        "\n",
        *(f" word{n % 10}" for n in range(TOKENS)),
        "\n\n[[ ## completed ## ]]",
    ):
        yield event({"content": text})
    yield event({}, usage=usage)
    yield b"data: [DONE]\n\n"


STREAM = [b"%x\r\n%b\r\n" % (len(event), event) for event in events()] + [b"0\r\n\r\n"]
STREAM_HEAD = http("text/event-stream", "Transfer-Encoding: chunked\r\n\r\n").encode()


def reply(request: bytes) -> bytes:
    """The answer to a request that asks for no stream."""
    if b"next_tool_name" in request:
        taken = 0
        while b"observation_%d ##" % taken in request:
            taken += 1
        return AGENT[min(taken, STEPS - 1)]
    if b"trajectory" in request:
        return THOUGHT
    return LONG if b"reasoning" in request else ANSWER


class Connection(asyncio.Protocol):
    """One keep-alive connection; requests come one after another."""

    def __init__(self, delay: float) -> None:
        self.delay = delay
        self.data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data
        while (end := self.data.find(b"\r\n\r\n")) >= 0:
            head = self.data[:end].lower()
            at = head.index(b"content-length:") + 15
            length = int(head[at:].split(b"\r\n", 1)[0])
            if len(self.data) < end + 4 + length:
                return
            request, self.data = self.data[end + 4 : end + 4 + length], self.data[end + 4 + length :]
            asyncio.get_running_loop().call_later(self.delay, self.answer, request)

    def answer(self, request: bytes) -> None:
        if b'"stream":true' in request.replace(b": ", b":"):
            self.write(STREAM_HEAD)
            self.stream(iter(STREAM))
        else:
            self.write(reply(request))

    def stream(self, left: Iterator[bytes]) -> None:
        if (event := next(left, None)) is not None:
            self.write(event)
            asyncio.get_running_loop().call_soon(self.stream, left)

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)


async def main() -> None:
    delay = float(sys.argv[1])
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(delay), "127.0.0.1", 0, backlog=4096)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await loop.run_in_executor(None, sys.stdin.read)


asyncio.run(main())
