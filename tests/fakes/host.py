"""User modules, for tests in which they end the peer. They call no LM."""

import asyncio
import os
import subprocess
import time

import dspy


def _note(name):
    """One line a call in FAKE_LOG: the caller cannot count what it does not hear of."""
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write(f"{name} {os.getpid()}\n")


class Nap(dspy.Module):
    """Takes 0.3 s."""

    async def aforward(self, question):
        await asyncio.sleep(0.3)
        return dspy.Prediction(answer=question)


class Sleep(dspy.Module):
    """Takes as many seconds as its question says."""

    async def aforward(self, question):
        await asyncio.sleep(float(question))
        return dspy.Prediction(answer=question)


class Slow(Sleep):
    """The same, and tells when it begins."""

    async def aforward(self, question):
        _note("slow")
        return await super().aforward(question)


class Blocks(dspy.Module):
    """Blocks the event loop, for an hour."""

    async def aforward(self, question):
        time.sleep(3600)  # noqa: ASYNC251  # it is meant to block


class Deadly(dspy.Module):
    """Ends the peer each time."""

    async def aforward(self, question):
        _note("deadly")
        await asyncio.sleep(float(question))
        os._exit(9)


class Spoilable(dspy.Module):
    """Loads as long as the file FAKE_FILE is not there; then raises."""

    def __init__(self):
        super().__init__()
        if os.path.exists(os.environ["FAKE_FILE"]):
            raise ValueError("spoilt")

    async def aforward(self, question):
        return dspy.Prediction(answer=question)


class Parent(dspy.Module):
    """Has two children for as long as the peer lives, one of them in a session of its own."""

    def __init__(self):
        super().__init__()
        for new_session in (False, True):
            subprocess.Popen(["sleep", "3600"], start_new_session=new_session)

    async def aforward(self, question):
        return dspy.Prediction(answer=question)
