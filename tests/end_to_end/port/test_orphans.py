"""No process that a peer started outlives it, and no peer outlives its owner, however they end and in any state."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from peer import PATIENCE, ROOT, Peer, payloads, until

# The promise, in seconds.
SOON = 1.0

# Children that no signal but SIGKILL ends, one in its peer's session and one, with a child, in its own.
CHILDREN = """
import subprocess
def start_children():
    subprocess.Popen(["sh", "-c", "trap '' TERM INT HUP; exec sleep 60"])
    subprocess.Popen(["sh", "-c", "trap '' TERM INT HUP; sleep 60 & exec sleep 60"], start_new_session=True)
"""

HOST = f"""
import ctypes, dspy, time
{CHILDREN}
class Starts(dspy.Module):
    def forward(self, question):
        start_children()
        if question == "sleeps":
            time.sleep(30)
        while question == "is busy":
            pass
        if question == "holds the interpreter":
            ctypes.PyDLL(None).sleep(30)
        return "idle"
"""

# What needs no DSPy: a peer that has children from the start, and whose interpreter stands still from SIGUSR1 on.
STARTS = f"""
import atexit, ctypes, os, runpy, signal, sys
from dspy_bridge.port import reader, stdio, watchdog
{CHILDREN}
sleep = ctypes.PyDLL(None).sleep
signal.signal(signal.SIGUSR1, lambda *_: sleep(30))
serve = reader.serve
def start_and_serve(*arguments):
    start_children()
    AFTER
    serve(*arguments)
reader.serve = start_and_serve
BEFORE
sys.argv = ["dspy_bridge"]
runpy.run_module("dspy_bridge", run_name="__main__")
"""

Tree = list[psutil.Process]


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def all_gone(tree: Tree) -> None:
    """Fails unless all are within 1 s. The clock starts here."""
    end = time.monotonic() + SOON
    while left := [process for process in tree if not is_gone(process)]:
        assert time.monotonic() < end, [(process.pid, process.cmdline()) for process in left]
        time.sleep(0.002)


def is_child(process: psutil.Process) -> bool:
    try:
        return bool(process.name() == "sleep")
    except psutil.NoSuchProcess:
        return False


def close(peer: Peer, *names: str) -> None:
    for name in names:
        getattr(peer.process, name).close()


def holds_the_interpreter(peer: Peer) -> bool:
    """No ping is answered any more."""
    peer.request("ping")
    assert peer.process.stdout is not None
    if select.select([peer.process.stdout], [], [], 0.2)[0]:
        peer.receive()
        return False
    return True


@pytest.fixture
def tree() -> Iterator[Callable[[int], Tree]]:
    """Waits for a peer's three children and gives it, its watchdog and them. What a test leaves ends with it."""
    found: Tree = []

    def of(pid: int, watchdogs: int = 1) -> Tree:
        def all_there() -> Tree:
            below = psutil.Process(pid).children(recursive=True)
            return below if sum(map(is_child, below)) == 3 and len(below) == 3 + watchdogs else []

        all_of = [psutil.Process(pid), *until(all_there)]
        found.extend(all_of)
        return all_of

    yield of
    for process in found:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


@pytest.fixture
def start() -> Iterator[Callable[..., Peer]]:
    """Starts peers with children: `before` is run at the start of such a peer, `after` once it has its children."""
    peers = []

    def start(before: str = "", after: str = "pass") -> Peer:
        code = STARTS.replace("BEFORE", before).replace("AFTER", after)
        peers.append(Peer(command=[sys.executable, "-c", code]))
        # It serves: its signals are handled, and `after` has run.
        assert peers[-1].call("ping")["success"]
        return peers[-1]

    yield start
    for peer in peers:
        peer.__exit__()


def group_of(tree: Tree, size: int) -> Tree:
    """What is in its peer's process group, once that are so many."""
    group = [process for process in tree if os.getpgid(process.pid) == tree[0].pid]
    return group if len(group) == size else []


def watchdog_of(tree: Tree) -> psutil.Process:
    (watchdog,) = [process for process in tree[1:] if not is_child(process)]
    return watchdog


@pytest.fixture
def host(tmp_path: Path) -> dict[str, str]:
    """Settings of a peer that may load `host:Starts`."""
    (tmp_path / "host.py").write_text(HOST)
    return {"DSPY_BRIDGE_ALLOW_MODULES": "host", "DSPY_BRIDGE_LM": "offline/echo", "PYTHONPATH": f"{ROOT}:{tmp_path}"}


CREATE = {"id": "starts", "signature": "question -> answer", "program_type": "host:Starts"}
DOINGS = ["is idle", "is busy", "holds the interpreter"]


@pytest.mark.parametrize("doing", DOINGS)
def test_its_owner_is_gone(host: dict[str, str], tree: Any, doing: str) -> None:
    """Both ends of the pipes close at once: peer and watchdog, children and theirs are gone within 1 s."""
    with Peer(env=host) as peer:
        assert peer.call("create_program", CREATE)["success"]
        peer.request("execute_program", {"program_id": "starts", "inputs": {"question": doing}})
        if doing == "is idle":
            assert peer.receive()["success"]
        if doing == "holds the interpreter":
            until(lambda: holds_the_interpreter(peer))
        everything = tree(peer.process.pid)
        close(peer, "stdin", "stdout")
        all_gone(everything)


OWNER = """
import os, subprocess, sys
peer = subprocess.Popen([os.environ["PYTHON"], "-m", "dspy_bridge"], stdin=-1, stdout=-1, bufsize=0)
for request in (os.environb[b"CREATE"], os.environb[b"ASK"]):
    peer.stdin.write(len(request).to_bytes(4, "big") + request)
print(peer.pid, flush=True)
sys.stdin.read()
"""

BEAM = """
Port = open_port({spawn_executable, os:getenv("PYTHON")}, [{packet, 4}, binary, {args, ["-m", "dspy_bridge"]}]),
{os_pid, Pid} = erlang:port_info(Port, os_pid),
port_command(Port, os:getenv("CREATE")),
port_command(Port, os:getenv("ASK")),
io:format("~b~n", [Pid]),
receive never -> ok end.
"""


@pytest.mark.parametrize(
    "command",
    [
        pytest.param([sys.executable, "-c", OWNER], id="Python"),
        pytest.param(
            ["erl", "-noshell", "-noinput", "-eval", BEAM],
            id="BEAM",
            marks=pytest.mark.skipif(shutil.which("erl") is None, reason="no Erlang here"),
        ),
    ],
)
@pytest.mark.parametrize("doing", ["is idle", "holds the interpreter"])
def test_its_owner_is_killed(host: dict[str, str], tree: Any, command: list[str], doing: str) -> None:
    """`kill -9` of a real owner."""
    ask = {"program_id": "starts", "inputs": {"question": doing}}
    env = {
        **{name: text for name, text in os.environ.items() if not name.startswith("DSPY_BRIDGE_")},
        **host,
        "PYTHON": sys.executable,
        "CREATE": json.dumps({"id": 1, "command": "create_program", "args": CREATE}),
        "ASK": json.dumps({"id": 2, "command": "execute_program", "args": ask}),
    }
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as owner:
        try:
            assert owner.stdout is not None
            everything = tree(int(owner.stdout.readline()))
        finally:
            owner.kill()
        all_gone(everything)


@pytest.mark.parametrize("first", ["stdin", "stdout"])
def test_one_pipe_alone_is_no_death_of_an_owner(start: Any, tree: Any, first: str) -> None:
    """The watchdog leaves the peer alone, and sleeps, until the other closes, too."""
    peer = start()
    everything = tree(peer.process.pid)
    peer.process.send_signal(signal.SIGUSR1)
    until(lambda: holds_the_interpreter(peer))
    watchdog = watchdog_of(everything)
    before = sum(watchdog.cpu_times()[:2])
    close(peer, first)
    with pytest.raises(subprocess.TimeoutExpired):
        peer.process.wait(0.6)
    assert sum(watchdog.cpu_times()[:2]) - before < 0.1
    close(peer, "stdin", "stdout")
    all_gone(everything)


def test_its_reader_is_gone(start: Any, tree: Any) -> None:
    """A reply that cannot be written ends the peer and all that it started, while its input is open."""
    peer = start()
    everything = tree(peer.process.pid)
    close(peer, "stdout")
    peer.request("ping")
    all_gone(everything)
    assert peer.process.wait() == 0


AT_EXIT = (
    "atexit.register(lambda: stdio.log('children at exit: ' + os.popen('pgrep -c -P %d sleep' % os.getpid()).read()))"
)


def test_the_end_of_input(start: Any, tree: Any) -> None:
    """What was received is answered, exit handlers run with their children, then none is left; exit 0."""
    peer = start(after=AT_EXIT)
    everything = tree(peer.process.pid)
    peer.request("ping")
    # Children have the log's descriptor: this returns when they are gone.
    code, rest, log = peer.finish(patience=5)
    all_gone(everything)
    assert code == 0 and payloads(rest)[0]["success"]
    assert "children at exit: 2" in log


def test_a_sigterm_for_all(start: Any, tree: Any) -> None:
    """As the end of input, though the whole group gets it."""
    peer = start()
    everything = tree(peer.process.pid)
    os.killpg(peer.process.pid, signal.SIGTERM)
    assert peer.process.wait(PATIENCE) == 0
    all_gone(everything)


FORKS = """
    if (child := os.fork()) == 0:
        sys.exit()
    os.waitpid(child, 0)
    if os.fork() == 0:
        os.setsid()
        sleep(30)
"""


@pytest.mark.parametrize(
    ("after", "forks", "kill"),
    [("pass", 0, os.kill), ("pass", 0, os.killpg), (FORKS.strip(), 1, os.kill)],
    ids=["", "of its group", "forks"],
)
def test_a_sigkill(start: Any, tree: Any, after: str, forks: int, kill: Any) -> None:
    """Its owner sees the end of its output, and all that it started is gone, whatever the watchdog was sent.

    Nor is that changed by forks of the peer that execute nothing: one that runs its exit handlers, one that stays, in
    a session of its own. That one, which has no environment of its own either, is all that is left.
    """
    peer = start(after=after)
    everything = tree(peer.process.pid, 1 + forks)
    group = until(lambda: group_of(everything, 2))
    # A fork that stays has a session of its own.
    session = os.getsid(peer.process.pid)
    (watchdog,) = [p for p in everything if not is_child(p) and p not in group and os.getsid(p.pid) == session]
    expected = [process for process in everything if process in [watchdog, *group] or is_child(process)]
    assert len(expected) == len(everything) - forks
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        watchdog.send_signal(number)
    kill(peer.process.pid, signal.SIGKILL)
    assert select.select([peer.process.stdout], [], [], SOON)[0] and peer.process.stdout.read() == b""
    all_gone(expected)


NO_GROUP = "def refuse(*_): raise OSError\nos.setpgid = refuse"


@pytest.mark.parametrize("own_group", [True, False])
@pytest.mark.parametrize("end", ["owner", "peer"])
def test_what_the_peer_did_not_start_is_left_alone(own_group: bool, end: str) -> None:
    """It makes a group of its own; where it cannot, it was started in one that is somebody else's."""
    code = STARTS.replace("start_children()\n    AFTER", "pass").replace("BEFORE", "" if own_group else NO_GROUP)
    session = "import os, sys\nos.setsid()\nos.execvp('sh', sys.argv)"
    shell = ["-c", 'sleep 60 & "$@"; exec sleep 60', "sh", sys.executable, "-c", code]
    with Peer(command=[sys.executable, "-c", session, *shell]) as peer:
        assert peer.call("ping")["success"]
        outer = psutil.Process(peer.process.pid)
        ours = [process for process in outer.children(recursive=True) if not is_child(process)]
        (sibling,) = [process for process in outer.children() if is_child(process)]
        try:
            assert len(ours) == 2 and os.getpgid(sibling.pid) == outer.pid
            assert (os.getpgid(ours[0].pid) != outer.pid) == own_group
            if end == "owner":
                ours[0].send_signal(signal.SIGUSR1)
                until(lambda: holds_the_interpreter(peer))
                close(peer, "stdin", "stdout")
            else:
                ours[0].kill()
            all_gone(ours)
            assert not is_gone(sibling) and not is_gone(outer)
        finally:
            sibling.kill()


@pytest.mark.parametrize("holds", [False, True])
def test_with_a_poll_that_tells_less(start: Any, tree: Any, holds: bool) -> None:
    """As on macOS."""
    peer = start(before="watchdog.POLL_TELLS_ENDS = False")
    everything = tree(peer.process.pid)
    if holds:
        peer.process.send_signal(signal.SIGUSR1)
        until(lambda: holds_the_interpreter(peer))
    close(peer, "stdin", "stdout")
    all_gone(everything)


UNMARKED = "import subprocess; subprocess.Popen(['sh', '-c', 'env -i setsid sleep 61; true'])"


@pytest.mark.skipif(shutil.which("setsid") is None, reason="no setsid here")
@pytest.mark.parametrize("end", ["end of input", "owner", "peer"])
def test_the_child_of_a_child_is_gone_too_without_environment_and_in_its_own_session(start: Any, end: str) -> None:
    peer = start(after=UNMARKED)
    below = until(
        lambda: [one for one in psutil.Process(peer.process.pid).children(recursive=True) if is_unmarked(one)]
    )
    try:
        assert os.getsid(below[0].pid) == below[0].pid
        if end == "end of input":
            close(peer, "stdin")
        elif end == "owner":
            close(peer, "stdin", "stdout")
        else:
            peer.process.kill()
        until(lambda: is_gone(below[0]), PATIENCE if end == "end of input" else SOON)
    finally:
        for process in below:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def is_unmarked(process: psutil.Process) -> bool:
    try:
        return process.cmdline() == ["sleep", "61"]
    except psutil.NoSuchProcess:
        return False
