"""The facts that the records of a data set state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from embervlm.data.records import ReasoningRecord
from embervlm.data.store import with_fields
from embervlm.words.claims import ClaimReader


def fact_domains(records: Sequence[ReasoningRecord]) -> dict[str, frozenset[str]]:
    """Fact name -> every value that `records` give it."""
    values: dict[str, set[str]] = defaultdict(set)
    for record in with_fields(records, "facts"):
        for name, value in record.metadata["facts"].items():
            values[name].add(value)
    return {name: frozenset(found) for name, found in values.items()}


def known_facts(record: ReasoningRecord) -> dict[str, str]:
    """The facts of a record's scene: `metadata.scene` and `metadata.facts`, as far as they are text."""
    out: dict[str, str] = {}
    for key in ("scene", "facts"):
        values = record.metadata.get(key)
        if isinstance(values, Mapping):
            out |= {name: value for name, value in values.items() if isinstance(value, str) and value.strip()}
    return out


def reader_of(records: Sequence[ReasoningRecord]) -> ClaimReader:
    """Reads every name that the scenes and facts of `records` have."""
    domains: dict[str, set[str]] = defaultdict(set)
    for record in with_fields(records, "scene", "facts"):
        for name, value in known_facts(record).items():
            domains[name].add(value)
    return ClaimReader.of(domains)
