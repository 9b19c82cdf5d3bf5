"""program_registry: the programs of ids, in the order of the frames."""

from __future__ import annotations

from dspy_bridge.commands.program_registry import Registry

DEFINITION = {"signature": "q -> a"}


def listed(registry: Registry) -> list[str]:
    return [entry.id for entry in registry.answered()]


def test_a_failed_replacement_brings_back_what_was_before() -> None:
    registry = Registry()
    first = registry.add("x", DEFINITION)
    registry.confirm(first)
    second = registry.add("x", DEFINITION)
    third = registry.add("x", DEFINITION)
    assert listed(registry) == ["x"], "a list still shows the answered one"
    registry.discard(second)
    assert registry.get("x") is third
    registry.discard(third)
    assert registry.get("x") is first
    registry.discard(third)
    assert registry.get("x") is first, "discarding twice changes nothing"


def test_what_was_cleaned_up_does_not_come_back() -> None:
    """A cleanup also removes a program whose create is not answered, and the earlier one that it would replace."""
    registry = Registry()
    registry.confirm(registry.add("x", DEFINITION))
    pending = registry.add("x", DEFINITION)
    assert registry.remove(None) == 1
    registry.discard(pending)
    assert registry.get("x") is None
    registry.confirm(pending)
    assert listed(registry) == []


def test_a_replaced_program_counts_as_new_and_keeps_no_predecessor() -> None:
    registry = Registry()
    for id in ("a", "b"):
        registry.confirm(registry.add(id, DEFINITION))
    entry = registry.add("a", DEFINITION)
    registry.discard(entry)
    assert listed(registry) == ["a", "b"], "a failed replacement leaves it where it was"
    entry = registry.add("a", DEFINITION)
    registry.confirm(entry)
    assert listed(registry) == ["b", "a"]
    registry.discard(entry)
    assert registry.get("a") is None


def test_a_lazy_definition_replaces_at_once_and_for_good() -> None:
    registry = Registry()
    first = registry.add("x", DEFINITION)
    registry.add_lazy("x", DEFINITION)
    entry = registry.get("x")
    assert entry is not None and entry.lazy and listed(registry) == ["x"]
    registry.discard(first)
    assert registry.get("x") is entry
    later = registry.add("x", DEFINITION)
    registry.discard(later)
    assert registry.get("x") is entry, "a plain definition that fails brings it back"
