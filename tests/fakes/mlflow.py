"""A stand-in for MLflow in the test of docs/guide/lms.md: it records the calls that would start the tracing."""

from __future__ import annotations

import os


def set_experiment(name: str) -> None:
    with open(os.environ["MLFLOW_TOLD"], "a") as told:
        told.write(f"experiment {name}\n")


class dspy:
    @staticmethod
    def autolog() -> None:
        with open(os.environ["MLFLOW_TOLD"], "a") as told:
            told.write("autolog\n")
