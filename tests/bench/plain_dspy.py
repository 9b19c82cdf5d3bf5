"""DSPy in one process, without any bridge: what the LM calls themselves cost.

Arguments: options of dspy.LM as JSON, the number of calls, how many at once. Prints `{"seconds", "rss"}` as JSON.
"""

import asyncio
import json
import os
import sys
import time

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "true")

import dspy
import psutil

options, count, at_once = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
dspy.configure(lm=dspy.LM("openai/gpt-4o-mini", **options))
program = dspy.Predict("question -> answer")


async def main() -> float:
    places = asyncio.Semaphore(at_once)

    async def one(number: int) -> None:
        async with places:
            await program.acall(question=f"question {number}")

    await asyncio.gather(*(one(number) for number in range(at_once)))
    begin = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(count)))
    return time.perf_counter() - begin


seconds = asyncio.run(main())
sys.stdout.write(json.dumps({"seconds": seconds, "rss": psutil.Process().memory_info().rss}) + "\n")
