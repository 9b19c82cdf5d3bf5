"""DSPy in one process, without any bridge: what the LM calls themselves cost.

Arguments: what to run (`predict`, `react`, `stream`, `image`), options of dspy.LM as JSON, the number of runs, how many
at once. Prints `{"seconds", "cpu_seconds", "rss"}` as JSON.
"""

import asyncio
import base64
import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "true")

import dspy
import psutil

what, options, count, at_once = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
dspy.configure(lm=dspy.LM("openai/gpt-4o-mini", **options))
IMAGE = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(7_500_000)).decode()


async def search(query: str, limit: int) -> dict[str, Any]:
    """Looks something up."""
    return {"found": [query, "some text of a document"], "limit": limit}


question = dspy.Predict("question -> answer")
picture = dspy.Predict("picture: dspy.Image, question -> answer")
agent = dspy.ReAct("question -> answer", tools=[search], max_iters=10)


async def run(number: int) -> None:
    inputs = {"question": f"question {number}"}
    if what == "stream":
        # A listener belongs to one stream.
        listeners = [dspy.streaming.StreamListener(signature_field_name="answer")]
        chunks = 0
        async for item in dspy.streamify(dspy.Predict("question -> answer"), stream_listeners=listeners)(**inputs):
            chunks += isinstance(item, dspy.streaming.StreamResponse)
        assert chunks >= 300
    elif what == "react":
        assert len((await agent.acall(**inputs)).trajectory) == 32
    elif what == "image":
        await picture.acall(picture=dspy.Image(IMAGE), **inputs)
    else:
        await question.acall(**inputs)


async def main() -> tuple[float, float]:
    places = asyncio.Semaphore(at_once)

    async def one(number: int) -> None:
        async with places:
            await run(number)

    await asyncio.gather(*(one(number) for number in range(at_once)))
    begin, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(one(number) for number in range(count)))
    return time.perf_counter() - begin, time.process_time() - cpu


seconds, cpu_seconds = asyncio.run(main())
rss = psutil.Process().memory_info().rss
sys.stdout.write(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "rss": rss}) + "\n")
