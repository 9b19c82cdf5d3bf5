"""The peer as a port program: frames and nothing else on its stdout, and an end when its owner wants or is gone."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import lm_env
from peer import PATIENCE, ROOT, Peer, frame, payloads, until

CREATE = {"id": "qa", "signature": "question -> answer"}
ASK = {"program_id": "qa", "inputs": {"question": "x"}}


@pytest.fixture(scope="module")
def peer() -> Any:
    """A peer that stays, as it should, whatever these tests send to it."""
    with Peer(env={"DSPY_BRIDGE_LM": "offline/echo"}) as peer:
        yield peer


@pytest.mark.skipif(sys.platform != "linux", reason="no other kernel has it")
def test_where_memory_runs_out_it_is_taken_before_its_owner_and_its_watchdog(peer: Peer) -> None:
    def score(pid: int) -> int:
        return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

    assert peer.call("ping")["success"]
    own = score(os.getpid())
    assert score(peer.process.pid) == max(own, 500)
    (watchdog,) = psutil.Process(peer.process.pid).children()
    assert score(watchdog.pid) == own


def test_nothing_heavy_is_imported_before_the_first_ping_is_answered(tmp_path: Path) -> None:
    """Neither DSPy nor what costs more than a millisecond or two; see messages for orjson."""
    code = (
        "import os, sys, runpy; record = sys.argv[1]; sys.argv = ['dspy_bridge']\n"
        "from dspy_bridge.dispatch.dispatcher import Dispatcher\n"
        "def start(_dispatcher):\n"
        "    with open(record + '.part', 'w') as file: file.write(' '.join(sys.modules))\n"
        "    os.rename(record + '.part', record)\n"
        # It is called right after the answer.
        "Dispatcher.start = start\n"
        "runpy.run_module('dspy_bridge', run_name='__main__')\n"
    )
    record = tmp_path / "record"
    with Peer(command=[sys.executable, "-c", code, str(record)]) as peer:
        assert peer.call("ping")["success"]
        until(record.exists)
    imported = record.read_text()
    assert "dspy_bridge.port.frame_writer" in imported
    heavy = {"dspy", "pydantic", "asyncio", "logging", "orjson", "json", "typing", "dataclasses", "argparse", "psutil"}
    assert heavy & set(imported.split()) == set()


def test_dspy_is_imported_after_the_first_answer_without_a_program(tmp_path: Path) -> None:
    """The first program, which may have little time, finds that begun. The end of input does not wait for it."""
    (tmp_path / "dspy.py").write_text(
        "import os, time\nopen(os.environ['RECORD'], 'w').close()\nwhile True:\n    time.sleep(0.1)\n"
    )
    record = tmp_path / "record"
    with Peer(env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "RECORD": str(record)}) as peer:
        assert not record.exists()
        assert peer.call("ping")["success"]
        until(lambda: peer.call("ping")["success"] and record.exists())
        assert peer.call("list_programs")["result"] == {"programs": []}
        assert peer.finish() == (0, b"", "")


def test_a_truncated_frame_at_the_end_of_input_is_logged(fresh_echo_peer: Peer) -> None:
    fresh_echo_peer.send({"id": 1, "command": "ping"})
    assert fresh_echo_peer.receive()["success"]
    fresh_echo_peer.send_bytes((100).to_bytes(4, "big") + b"only this")
    code, rest, log = fresh_echo_peer.finish()
    assert (code, rest) == (0, b"")
    assert "inside a frame" in log and "only this" not in log


def test_a_frame_over_the_limit_is_read_past_and_the_next_one_served() -> None:
    with Peer("--max-frame-bytes", "1000") as peer:
        for length in (1001, 5_000_000):
            peer.send(b"x" * length, {"id": 1, "command": "ping"})
            refused, served = peer.receive(), peer.receive()
            assert (refused["id"], refused["error_type"]) == (None, "frame_too_large")
            assert str(length) in refused["error"] and "1000" in refused["error"]
            assert served["success"]


def test_a_reply_over_the_limit_becomes_an_error_with_its_id() -> None:
    with Peer("--max-frame-bytes", "600", "--lm", "offline/echo") as peer:
        peer.call("create_program", {"id": "qa", "signature": "question -> answer, again"})
        reply = peer.call("execute_program", {"program_id": "qa", "inputs": {"question": "x" * 400}})
        assert reply["error_type"] == "frame_too_large"
        assert peer.call("ping")["success"]


PRINTS = """
import os, subprocess, sys
PROBE = '''
import os
for fd in range(3, 64):
    try:
        os.write(fd, b"stray")
    except OSError:
        pass
'''
def init():
    print("python print")
    os.write(1, b"raw write")
    os.system("echo from a child")
    subprocess.run([sys.executable, "-c", PROBE], check=False, close_fds=False)
    child = os.fork()
    if child == 0:
        exec(PROBE)
        os._exit(0)
    os.waitpid(child, 0)
    sys.stdout.flush()
    assert sys.stdin.read() == ""
"""


def test_stray_output_never_reaches_the_frames(tmp_path: Any) -> None:
    """Python, C-level and child-process output all land on stderr; children inherit no frame descriptor."""
    (tmp_path / "printer.py").write_text(PRINTS)
    env = {"DSPY_BRIDGE_INIT": "printer:init", "DSPY_BRIDGE_LM": "offline/echo", "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    with Peer(env=env) as peer:
        assert peer.call("create_program", CREATE)["success"]
        assert peer.call("execute_program", ASK)["success"]
        code, rest, log = peer.finish()
    assert (code, rest) == (0, b"")
    assert all(text in log for text in ("python print", "raw write", "from a child")) and "stray" not in log


def test_what_was_received_is_answered_after_the_end_of_input() -> None:
    """One write of all requests, then end of input: every request has its reply, then exit 0."""
    # A busy machine takes longer than the default to import DSPy.
    with Peer("--drain-ms", "60000", env={"DSPY_BRIDGE_LM": "offline/echo"}) as peer:
        create = {"id": 1, "command": "create_program", "args": CREATE}
        asks = [{"id": n, "command": "execute_program", "args": ASK} for n in range(2, 22)]
        peer.send(create, *asks)
        code, rest, _ = peer.finish()
    replies = payloads(rest)
    assert code == 0
    assert sorted(reply["id"] for reply in replies) == list(range(1, 22))
    assert all(reply["success"] for reply in replies)


def test_a_reply_that_the_pipe_does_not_hold_is_written_before_the_exit() -> None:
    """However late its owner reads it. What waits is less than would keep the end of input from being seen."""
    size = 1_600_000
    with Peer("--drain-ms", "60000") as peer:
        peer.send({"id": "x" * size, "command": "ping"})
        assert peer.process.stdin is not None and peer.process.stdout is not None
        assert select.select([peer.process.stdout], [], [], PATIENCE)[0], "it has begun to answer"
        peer.process.stdin.close()
        # Far more than an exit takes.
        with pytest.raises(subprocess.TimeoutExpired):
            peer.process.wait(1)
        assert len(peer.receive()["id"]) == size
        assert peer.process.wait(PATIENCE) == 0


def test_draining_ends_at_its_limit(start_lm: Any) -> None:
    server = start_lm()
    server.gate.clear()
    with Peer(env={**lm_env(server), "DSPY_BRIDGE_DRAIN_MS": "200"}) as peer:
        peer.call("create_program", CREATE)
        peer.request("execute_program", ASK)
        assert server.arrived.acquire(timeout=PATIENCE)
        code, rest, log = peer.finish()
    assert (code, rest) == (0, b"")
    assert "1 requests were still running" in log


def test_sigterm_is_like_the_end_of_input(start_lm: Any) -> None:
    server = start_lm()
    server.gate.clear()
    with Peer(env=lm_env(server)) as peer:
        peer.call("create_program", CREATE)
        peer.request("execute_program", ASK)
        assert server.arrived.acquire(timeout=PATIENCE)
        peer.terminate()
        server.gate.set()
        assert peer.receive()["result"] == {"answer": "Paris"}
        assert peer.process.wait(PATIENCE) == 0


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-"])
def test_closed_standard_descriptors(closed: str) -> None:
    """Without input or output there is nothing to serve; without a log there is."""
    script = f'printf \'\\000\\000\\000\\031{{"id":1,"command":"ping"}}\' | {sys.executable} -m dspy_bridge {closed}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, cwd=ROOT, check=False)
    if closed.startswith("2"):
        assert done.returncode == 0 and payloads(done.stdout)[0]["success"]
    else:
        assert done.returncode == 2 and b"is closed" in done.stderr and done.stdout == b""


def test_sigint_is_ignored_where_stdin_is_a_pipe(fresh_echo_peer: Peer) -> None:
    """A Ctrl-C in iex reaches the whole process group."""
    assert fresh_echo_peer.call("ping")["success"]
    fresh_echo_peer.process.send_signal(2)
    assert fresh_echo_peer.call("ping")["success"]


def test_an_owner_that_does_not_read_stops_being_read_from() -> None:
    """The pipe's own backpressure: writing blocks after a bounded amount, and all is served once replies are read."""
    with Peer() as peer:
        assert peer.process.stdin is not None
        fd = peer.process.stdin.fileno()
        os.set_blocking(fd, False)
        one = frame(json.dumps({"id": "x" * 50_000, "command": "ping"}).encode())
        data, sent = one * 200, 0
        stuck = 0
        while sent < len(data) and stuck < 20:
            try:
                sent += os.write(fd, data[sent : sent + 65536])
                stuck = 0
            except BlockingIOError:
                # Half a second without any room, in steps: the peer has stopped reading.
                stuck += 1
                with pytest.raises(subprocess.TimeoutExpired):
                    peer.process.wait(0.025)
        # 1 MiB each: both pipes, the read under way, replies below the mark, and those of one read past it.
        assert sent <= 5 << 20
        os.set_blocking(fd, True)
        whole = -(-sent // len(one))
        for _ in range(sent // len(one)):
            assert peer.receive()["success"]
        peer.send_bytes(data[sent : whole * len(one)])
        peer.send({"id": "last", "command": "ping"})
        while peer.receive()["id"] != "last":
            pass


def test_an_interpreter_without_dspys_packages_ends_with_a_line_that_names_them(tmp_path: Path) -> None:
    """The commonest mistake. Else pings would be answered, and everything else end the peer."""
    code = "import sys; sys.path = [path for path in sys.path if 'site-packages' not in path]"
    code += f"; sys.path.insert(0, {str(ROOT)!r}); from dspy_bridge import __main__ as peer; sys.exit(peer.main())"
    done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.PIPE, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "jiter and orjson cannot be imported by" in done.stderr


def test_a_terminal_is_told_what_this_is() -> None:
    import pty

    master, terminal = pty.openpty()
    command = [sys.executable, "-m", "dspy_bridge"]
    done = subprocess.run(command, stdin=terminal, capture_output=True, cwd=ROOT, check=False)
    os.close(master)
    os.close(terminal)
    assert done.returncode == 2 and b"--help" in done.stderr and done.stdout == b""


@pytest.mark.slow
def test_frames_of_64_mib_both_ways_whose_memory_is_given_back(fresh_echo_peer: Peer) -> None:
    text = "x" * ((64 << 20) - 100)
    data = b'{"id":"%b","command":"ping"}' % text.encode()
    # Both import what they need.
    fresh_echo_peer.call("create_program", CREATE)
    fresh_echo_peer.call("get_stats")
    before = fresh_echo_peer.call("get_stats")["result"]["memory_usage"]["rss"]
    for _ in range(10):
        fresh_echo_peer.send(data)
        payload = fresh_echo_peer.receive_payload()
        assert payload.startswith(b'{"id":"xxx') and len(payload) > len(text)
    until(lambda: fresh_echo_peer.call("get_stats")["result"]["memory_usage"]["rss"] <= 1.3 * before)
