"""Which part of a chain needs which: what may change places, and what the conclusion does not need.

A unit is a sentence of a step, or a line where the step has several. A unit depends on an earlier one that introduces
what it uses: that is the first to claim something about a name, the first to use a content word or a number that the
question does not hold, and every one whose sum results in a number that it uses. The words of a unit's own claims are
not looked for elsewhere. Works on any text: names and values come from the data set, the word lists are English
function words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from functools import cached_property

from embervlm.words.claims import ClaimReader, content_words, named_candidates
from embervlm.words.english import POINTS_BACK, sentences, strip_numbering
from embervlm.words.numbers import numbers_in

_BULLET = re.compile(r"\s*[-*\u2022]\s")
_COUNTS_ALOUD = re.compile(
    r"^(?:[-*\u2022]\s+)?(?:first|second|third|fourth|fifth|next|then|after that|afterwards|finally|last)(?:ly)?\b"
    r"|\bsteps?\s+(?:\d|one\b|two\b|three\b|four\b|above\b|before\b)|\b(?:previous|next|last|earlier) step\b",
    re.IGNORECASE | re.MULTILINE,
)


def split_units(step: str) -> tuple[str, ...]:
    """The lines of a step of several lines, else its sentences."""
    return tuple(step.split("\n")) if "\n" in step else sentences(step)


def points_back(unit: str) -> bool:
    """Whether `unit` opens with a word such as "so" or "this"."""
    return POINTS_BACK.match(strip_numbering(unit)) is not None


def join_units(units: Sequence[str], step: str) -> str:
    """Units of `step` as one text again."""
    return ("\n" if "\n" in step else " ").join(units)


class ChainGraph:
    """The units of a chain's numbered steps, in order, and what each depends on."""

    def __init__(
        self,
        steps: Sequence[str],
        conclusion: str,
        *,
        instruction: str,
        reader: ClaimReader,
        names: Collection[str],
        step_types: Sequence[str] = (),
    ) -> None:
        """`names`: what a conclusion may name; `step_types`: one for each step, or none."""
        self.steps = [split_units(step) for step in steps]
        self.counts_aloud = any(_COUNTS_ALOUD.search(step) for step in steps)
        """Whether the chain speaks of the number or place of its own steps: then none may move."""
        self._types = step_types
        self._known = set(content_words(instruction))
        self._known_numbers = frozenset().union(*numbers_in(instruction))
        self.needs: list[set[int]] = []
        """Unit -> earlier units it depends on directly."""
        self.glued: list[bool] = []
        """Unit -> it opens with a word such as "so" or "this", which points at the unit right before."""
        self.names: list[frozenset[str]] = []
        """Unit -> names it claims something about."""
        self._words: list[frozenset[str]] = []
        self._numbers: list[tuple[frozenset[Fraction], frozenset[Fraction]]] = []
        """Unit -> numbers that it uses, and its results."""
        first_name: dict[str, int] = {}
        first_word: dict[str, int] = {}
        for units in self.steps:
            header = len(self.needs)
            for place, unit in enumerate(units):
                number = len(self.needs)
                claims = reader.read(unit)
                own = {word for claim in claims for text in (claim.name, claim.value) for word in content_words(text)}
                claimed = frozenset(claim.name for claim in claims)
                all_words = frozenset(content_words(unit))
                words = all_words - self._known
                needs = {first_name[name] for name in claimed if name in first_name}
                needs |= {first_word[word] for word in words - own if word in first_word}
                numbers = numbers_in(unit)
                needs |= self._computes(numbers[0])
                glued = number > 0 and points_back(unit)
                if glued:
                    needs.add(number - 1)
                if place and _BULLET.match(unit):
                    needs.add(header)
                for name in claimed:
                    first_name.setdefault(name, number)
                for word in words:
                    first_word.setdefault(word, number)
                self.needs.append(needs)
                self.glued.append(glued)
                self.names.append(claimed)
                self._words.append(all_words)
                self._numbers.append(numbers)
        self.concludes_from = self._evidence(conclusion, reader, names)
        """Units that the conclusion depends on directly: all that speak of what it names."""

    def _computes(self, used: Collection[Fraction]) -> set[int]:
        """Units so far that bring in one of the numbers `used`: by a sum, or first of all where it is not given."""
        found = {place for place, (_, results) in enumerate(self._numbers) if not results.isdisjoint(used)}
        for value in set(used) - self._known_numbers:
            found.update([place for place, both in enumerate(self._numbers) if value in both[0] | both[1]][:1])
        return found

    def _evidence(self, conclusion: str, reader: ClaimReader, names: Collection[str]) -> set[int]:
        named = named_candidates(conclusion, names) | {claim.name for claim in reader.read(conclusion)}
        own = {word for name in named for word in content_words(name)}
        words = set(content_words(conclusion)) - self._known
        computing = self._computes(frozenset().union(*numbers_in(conclusion)))
        claimed = {name for unit in self.names for name in unit}
        spoken_of = {word for name in named - claimed for word in content_words(name)} | (words - own)
        return {
            number
            for number, (unit_names, unit_words) in enumerate(zip(self.names, self._words, strict=True))
            if unit_names & named or unit_words & spoken_of or number in computing
        }

    @cached_property
    def unit_numbers(self) -> list[range]:
        """Step -> its units' numbers."""
        ends = [0]
        for units in self.steps:
            ends.append(ends[-1] + len(units))
        return [range(start, end) for start, end in zip(ends, ends[1:])]

    @cached_property
    def spare(self) -> frozenset[int]:
        """Units that the conclusion does not need, not even by way of others; none where it needs no unit at all."""
        needed: set[int] = set()
        found = set(self.concludes_from)
        while found:
            needed |= found
            found = {earlier for number in found for earlier in self.needs[number]} - needed
        return frozenset(range(len(self.needs))) - needed if needed else frozenset()

    def with_dependants(self, units: Collection[int]) -> set[int]:
        """`units` and all that depends on any of them."""
        out = set(units)
        for number, needs in enumerate(self.needs):  # what a unit depends on stands before it
            if needs & out:
                out.add(number)
        return out

    def new_order(self, rng: random.Random) -> tuple[list[int], list[list[int]]] | None:
        """A random free order: of the steps, and of the units within each; None where only one order is free."""
        if self.counts_aloud:
            return None
        inner = [self._order_units(numbers, rng) for numbers in self.unit_numbers]
        outer = self._order_steps(rng)
        one_way = all(order is None for order in inner) and outer is None
        if one_way:
            return None
        steps = outer or list(range(len(self.steps)))
        return steps, [order or list(numbers) for order, numbers in zip(inner, self.unit_numbers, strict=True)]

    def _order_units(self, numbers: range, rng: random.Random) -> list[int] | None:
        blocks = _blocks(numbers, lambda number: self.glued[number])
        needs = [{other for unit in block for other in self.needs[unit]} for block in blocks]
        return _random_order(blocks, needs, rng)

    def _order_steps(self, rng: random.Random) -> list[int] | None:
        numbers = self.unit_numbers
        step_of = {unit: step for step, units in enumerate(numbers) for unit in units}
        blocks = _blocks(range(len(self.steps)), lambda step: self.glued[numbers[step][0]])
        needs = []
        for block in blocks:
            own = {step_of[other] for step in block for unit in numbers[step] for other in self.needs[unit]}
            if self._types:  # a constraint is checked after the problem is analysed, whatever the words
                own |= {step for step in range(block[0]) if self._types[step] != self._types[block[0]]}
            needs.append(own)
        return _random_order(blocks, needs, rng)


def _blocks(numbers: range, glued: Callable[[int], bool]) -> list[list[int]]:
    blocks: list[list[int]] = []
    for number in numbers:
        if blocks and glued(number):
            blocks[-1].append(number)
        else:
            blocks.append([number])
    return blocks


def _random_order(blocks: list[list[int]], needs: list[set[int]], rng: random.Random) -> list[int] | None:
    """The blocks' members in a random order in which each block follows what it needs; None where that is one only."""
    place = {number: index for index, block in enumerate(blocks) for number in block}
    waits = [{place[other] for other in own if other in place} - {index} for index, own in enumerate(needs)]
    left, order, free_choice = list(range(len(blocks))), [], False
    while left:
        ready = [index for index in left if not waits[index].intersection(left)]
        free_choice |= len(ready) > 1
        left.remove(chosen := rng.choice(ready))
        order.append(chosen)
    return [number for index in order for number in blocks[index]] if free_choice else None
