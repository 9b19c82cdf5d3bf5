"""Subclasses of DSPy's adapters: quoted field markers in inputs are made harmless, contradicting answers are refused.

Adapters mark fields with plain text and take the first field of each name in an answer. So text that quotes a marker,
of an input or of an LM that repeats it, could begin the next field in the middle of another.

Prompts whose inputs have no markers are DSPy's to the byte. Adapters of any other class are left as they are. What
DSPy builds anew for each value or call is built once for each type or signature: its signature for each step of a
ReAct, a `TypeAdapter` for each value, system messages, response schemas.
"""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Any

import dspy
import pydantic

from dspy_bridge.errors import OutputInvalid
from dspy_bridge.lm import dspy_internals, lm_call, prompts
from dspy_bridge.lm.adapters import choice, corrections, field_markers, json_answers
from dspy_bridge.runtime import event_loop

Signature = type[dspy.Signature]

# Types of all programs together, some KB each. Past it all are built again.
_MOST = 1_000
# Signatures of trajectories, one for each number of steps: of 60 steps they take some 25 MB.
_MOST_STEPS = 64
# Large, and not text in a prompt.
_MEDIA = (dspy.Image, dspy.Audio, dspy.File)


def guarded(adapter: dspy.Adapter, *, strict: bool) -> dspy.Adapter:
    """A guarded copy of one of DSPy's adapters; `strict`: answers that contradict themselves are refused."""
    kind = GUARDED.get(type(adapter))
    if kind is None:
        return adapter
    made = kind.__new__(kind)
    made.__dict__.update(adapter.__dict__, strict=strict)
    return made


class _Guarded:
    """Cleans the values of fields before they are written into a prompt, and asks again.

    DSPy's notation for images and the like is cleaned, too: it may come from an LM, by the trajectory of an agent.
    """

    strict = True
    # Splits an answer into the names and values of its fields.
    _sections: Callable[[str], Iterable[tuple[str, Any]]]
    _clean_output: field_markers.Change = staticmethod(str)
    # Whether text that was formatted before (an agent's trajectory) is cleaned once more.
    _formatted_is_cleaned = False

    def __init_subclass__(cls) -> None:
        """Without DSPy's wrapper of `format` and `parse`: callbacks would get each call twice."""

    def __call__(self, lm: Any, lm_kwargs: dict[str, Any], signature: Signature, *args: Any, **options: Any) -> Any:
        event_loop.refuse_sync_call()
        with corrections.calling() as again:
            while True:
                try:
                    answers = super().__call__(lm, dict(lm_kwargs), signature, *args, **options)  # type: ignore[misc]
                    corrections.check_calls(type(self), signature, answers)
                    return answers
                except Exception as error:
                    if not again(type(self), error):
                        raise

    async def acall(self, lm: Any, lm_kwargs: dict[str, Any], signature: Signature, *args: Any, **options: Any) -> Any:
        with corrections.calling() as again:
            while True:
                try:
                    answers = await super().acall(lm, dict(lm_kwargs), signature, *args, **options)  # type: ignore[misc]
                    corrections.check_calls(type(self), signature, answers)
                    return answers
                except Exception as error:
                    if not again(type(self), error):
                        raise
                await asyncio.sleep(0)  # what was said goes first

    def _clean_input(self, _signature: Signature, text: str) -> str:
        return self._clean_output(text)

    def format(self, signature: Signature, demos: Any, inputs: Any) -> Any:
        messages = prompts.plain(super().format(signature, demos, inputs))  # type: ignore[misc]
        return corrections.add_to(messages, type(self), signature)

    def format_system_message(self, signature: Signature) -> Any:
        return _system_message(type(self), signature, signature.instructions)  # type: ignore[arg-type]

    def format_user_message_content(self, signature: Signature, inputs: Any, *args: Any, **options: Any) -> Any:
        clean = functools.partial(self._clean_input, signature)
        inputs = _cleaned(signature.input_fields, inputs, clean, clean if self._formatted_is_cleaned else str)
        return prompts.Formatted(super().format_user_message_content(signature, inputs, *args, **options))  # type: ignore[misc]

    def format_assistant_message_content(self, signature: Signature, outputs: Any, *args: Any, **options: Any) -> Any:
        outputs = _cleaned(signature.output_fields, outputs, self._clean_output)
        return super().format_assistant_message_content(signature, outputs, *args, **options)  # type: ignore[misc]

    def parse(self, signature: Signature, completion: str) -> Any:
        try:
            fields = self._read(signature, completion)
            corrections.check(signature, fields)
            return fields
        except Exception as error:
            # DSPy may catch it, and ask in JSON.
            corrections.did_not_fit(type(self), completion, error)
            raise

    def _read(self, signature: Signature, completion: str) -> Any:
        fields = super().parse(signature, completion)  # type: ignore[misc]
        if self.strict:
            _refuse_contradictions(signature.output_fields, self._sections(completion))
        return fields


@functools.lru_cache(_MOST)
def _system_message(kind: Any, signature: Signature, _instructions: str) -> Any:
    return super(_Guarded, kind()).format_system_message(signature)  # it depends on nothing else


class ChatAdapter(_Guarded, dspy.ChatAdapter):  # type: ignore[misc]  # DSPy ships no types
    _clean_output = staticmethod(field_markers.without_headers)
    _sections = staticmethod(field_markers.headed)


class XMLAdapter(_Guarded, dspy.XMLAdapter):  # type: ignore[misc]
    # The tags of a trajectory are its inputs'; the outputs of the next step are known only here.
    _formatted_is_cleaned = True

    def _clean_input(self, signature: Signature, text: str) -> str:
        # DSPy reads an `entry` as the field that its attribute names.
        return field_markers.without_tags(text, {*signature.output_fields, "entry"})

    def _read(self, signature: Signature, completion: str) -> Any:
        if self.strict:
            # Before DSPy reads it: DSPy makes a list of a repeated field and refuses that as the wrong type.
            found = field_markers.tagged(completion)
            counts = Counter(name for name, _ in found)
            outputs = signature.output_fields.items()
            once = {name for name, info in outputs if counts[name] > 1 and not _is_list(info.annotation)}
            _refuse_contradictions(once, found)
        return dspy.XMLAdapter.parse(self, signature, completion)


class JSONAdapter(_Guarded, dspy.JSONAdapter):  # type: ignore[misc]
    """JSON quotes text, so text begins no field; only a key may come twice."""

    _sections = staticmethod(field_markers.keyed)

    def _read(self, signature: Signature, completion: str) -> Any:
        return super()._read(signature, json_answers.object_in(completion))


GUARDED: dict[type, Any] = {
    dspy.ChatAdapter: ChatAdapter,
    dspy.JSONAdapter: JSONAdapter,
    dspy.XMLAdapter: XMLAdapter,
}


@dspy_internals.JSON_FALLBACK.replace
def _in_json(adapter: Any) -> dspy.Adapter:
    """Guards and counts the adapter that DSPy goes on to where an answer could not be read."""
    if (meter := lm_call.run().meter) is not None:
        meter.fell_back()
    made = dspy_internals.JSON_FALLBACK.value(adapter)
    return guarded(made, strict=adapter.strict) if isinstance(adapter, _Guarded) else made


def _refuse_contradictions(fields: Collection[str], sections: Iterable[tuple[str, Any]]) -> None:
    # An empty `completed` ends an answer in chat, also if a field has that name.
    name = field_markers.contradicted(pair for pair in sections if pair[0] in fields and pair != ("completed", ""))
    if name is not None:
        raise OutputInvalid(f"the LM's answer did not fit the signature: it has {name} twice, with different values")


def _is_list(annotation: Any) -> bool:
    """Whether DSPy reads each element as one item of a list."""
    schema = pydantic.TypeAdapter(annotation).json_schema()
    return "array" in (schema.get("type"), *(choice.get("type") for choice in schema.get("anyOf", ())))


def _cleaned(
    fields: Any, values: Any, clean: field_markers.Change, clean_formatted: Callable[[str], str] = str
) -> dict[str, Any]:
    """The values of a signature's fields, without the markers that `clean` removes."""
    made = dict(values)
    for name, info in fields.items():
        if name in made:
            made[name] = _clean_field(info, made[name], clean, clean_formatted)
    return made


def _clean_field(info: Any, value: Any, clean: field_markers.Change, clean_formatted: Callable[[str], str]) -> Any:
    if type(value) is prompts.Formatted:
        return clean_formatted(str(value))
    return field_markers.changed(
        value, lambda text: clean(field_markers.without_types(text)), functools.partial(_clean_object, info, clean)
    )


def _clean_object(info: Any, clean: field_markers.Change, value: Any) -> Any:
    """As it stands in the prompt: for instance what RLM's code has printed."""
    if not isinstance(value, pydantic.BaseModel) or isinstance(value, _MEDIA) or not dspy_internals.FORMAT_VALUE.there:
        return value
    text = dspy_internals.FORMAT_VALUE.value(field_info=info, value=value)
    # In DSPy's notation, of whose marks its texts have none.
    noted = isinstance(value, dspy.Type) and isinstance(value.format(), list)
    cleaned = clean(text if noted else field_markers.without_types(text))
    return value if cleaned == text else cleaned


def per_type(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`make`, called once for each type, by its identity: `int | str` equals `str | int`, but has another schema."""
    # With the type, as its id belongs to another one after its end.
    made: dict[int, tuple[Any, Any]] = {}

    def get(kind: Any) -> Any:
        found = made.get(id(kind))
        if found is None:
            if len(made) >= _MOST:
                made.clear()
            found = made[id(kind)] = kind, make(kind)
        return found[1]

    return get


for _name in dspy_internals.TYPE_ADAPTERS:
    _name.replace(per_type(pydantic.TypeAdapter))


@dspy_internals.RESPONSE_MODEL.replace
@functools.lru_cache(_MOST)
def _response_model(*args: Any, **options: Any) -> Any:
    return dspy_internals.RESPONSE_MODEL.value(*args, **options)


# The signature only says in which order the fields are written.
_trajectory = functools.lru_cache(_MOST_STEPS)(lambda fields: dspy.Signature(f"{fields} -> x"))


@dspy_internals.FORMAT_TRAJECTORY.replace
def format_trajectory(_agent: Any, trajectory: Any) -> Any:
    """The steps of a ReAct as text, in the format of the run's adapter."""
    return choice.default().format_user_message_content(_trajectory(", ".join(trajectory)), trajectory)
