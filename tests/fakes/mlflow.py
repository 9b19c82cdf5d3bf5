"""A stand-in for MLflow in the test of docs/guide/lms.md: it records the calls that would start the tracing."""

from __future__ import annotations

import os


def set_experiment(name: str) -> None:
    with open(os.environ["MLFLOW_RECORD"], "a") as record:
        record.write(f"experiment {name}\n")


class dspy:
    @staticmethod
    def autolog() -> None:
        with open(os.environ["MLFLOW_RECORD"], "a") as record:
            record.write("autolog\n")
