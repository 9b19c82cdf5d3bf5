"""An HTTP sidecar as DSPy's deployment page shows it: FastAPI on uvicorn.

Arguments: options of dspy.LM as JSON, the port.
"""

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "true")

import dspy
import uvicorn
from fastapi import FastAPI, Request
from pydantic import BaseModel

dspy.configure(lm=dspy.LM("openai/gpt-4o-mini", **json.loads(sys.argv[1])))
program = dspy.Predict("question -> answer")
app = FastAPI()


class Question(BaseModel):
    question: str


@app.post("/ping")
async def ping(request: Request) -> dict[str, Any]:
    await request.json()
    return {"status": "ok", "timestamp": time.time()}


@app.post("/predict")
async def predict(question: Question) -> dict[str, Any]:
    prediction = await program.acall(question=question.question)
    return {"status": "success", "data": prediction.toDict()}


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error")
