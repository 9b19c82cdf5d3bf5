"""The argument `optimize` of an `execute_program`, checked as far as that goes without DSPy."""

from __future__ import annotations

from typing import Any, Literal, get_args

import pydantic
from pydantic import Field

from dspy_bridge.errors import InvalidArgs, refuse_unknown
from dspy_bridge.signatures import validation_errors

Optimizer = Literal["labeled_few_shot", "bootstrap_few_shot", "random_search", "copro", "mipro_v2", "simba", "gepa"]
OPTIMIZERS = get_args(Optimizer)
# The LMs that an optimizer asks for itself, next to that of the program.
LM_ROLES = ("prompt_lm", "teacher_lm", "reflection_lm")
# numpy's generators take no more.
MAX_SEED = 2**32 - 1


class _Strict(pydantic.BaseModel):
    """Nothing is converted."""

    model_config = pydantic.ConfigDict(strict=True)


class Budget(_Strict):
    """The limits of a run; None: none."""

    lm_calls: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=1)
    seconds: float | None = Field(default=None, gt=0, le=10**9)


class Valset(_Strict):
    """What candidates are scored on. `expected`: one object for each of the inputs."""

    inputs: list[Any] = Field(min_length=1)
    expected: list[Any] | None = None


class Optimize(_Strict):
    """What is to be run. `options` are not checked yet; nor the LMs."""

    optimizer: Optimizer
    options: dict[str, Any] = {}
    valset: Valset | None = None
    num_threads: int = Field(default=8, ge=1, le=64)
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    prompt_lm: Any = None
    teacher_lm: Any = None
    reflection_lm: Any = None
    budget: Budget = Budget()

    @property
    def lms(self) -> dict[str, Any]:
        given = {role: getattr(self, role) for role in LM_ROLES}
        return {role: lm for role, lm in given.items() if lm is not None}


def read(value: object) -> Optimize:
    """The argument `optimize`. A key that is null counts as absent. Raises `InvalidArgs`."""
    if not isinstance(value, dict):
        raise InvalidArgs("optimize: expected an object with optimizer")
    for given, model, where in (
        (value, Optimize, "optimize"),
        (value.get("valset"), Valset, "optimize.valset"),
        (value.get("budget"), Budget, "optimize.budget"),
    ):
        if isinstance(given, dict):
            refuse_unknown(given, model.model_fields, where)
    try:
        read = Optimize.model_validate({key: of_key for key, of_key in value.items() if of_key is not None})
    except pydantic.ValidationError as error:
        raise validation_errors.describe("optimize", error) from None
    valset = read.valset
    if valset is not None and valset.expected is not None and len(valset.expected) != len(valset.inputs):
        raise InvalidArgs(
            f"optimize.valset.expected: expected {len(valset.inputs)} objects, one for each of the inputs, "
            f"got {len(valset.expected)}"
        )
    return read
