"""How far the instruction alone goes: what a guesser that sees no picture gets right."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from embervlm.words.claims import all_words

MAX_ANSWERS = 200
"""Answers that the guesser by words chooses from: the most common ones."""
MAX_WORDS = 5000

Example = tuple[str, str, str, str]
"""Split, what is asked (equal for other wordings of it), instruction, answer."""


def blind_guess(examples: Iterable[Example]) -> dict[str, float]:
    """Accuracy on the test split, in [0, 1], of guessers that see the instruction alone; NaN without a test split.

    Fitted on the training split: `most_common` gives one answer to everything, `fitted_on_train` gives each
    question the answer it had most often (one that training did not have is wrong), `words` is naive Bayes over the
    instruction's words. `in_hindsight` is the best that any guesser of one answer per question could have done on
    the test split itself.
    """
    examples = list(examples)
    train = [(asked, answer) for split, asked, _, answer in examples if split == "train"]
    test = [(asked, answer) for split, asked, _, answer in examples if split == "test"]
    if not test:
        return dict.fromkeys(("most_common", "fitted_on_train", "words", "in_hindsight"), math.nan)
    answers = Counter(answer for _, answer in train)
    favourite = answers.most_common(1)[0][0] if answers else None
    best = {asked: counter.most_common(1)[0][0] for asked, counter in _by_question(train).items()}
    right = {
        "most_common": sum(answer == favourite for _, answer in test),
        "fitted_on_train": sum(answer == best.get(asked) for asked, answer in test),
        "words": sum(guess == answer for guess, (_, answer) in zip(_guess_by_words(*_texts(examples)), test)),
        "in_hindsight": sum(counter.most_common(1)[0][1] for counter in _by_question(test).values()),
    }
    return {name: count / len(test) for name, count in right.items()}


def best_guess(accuracies: dict[str, float]) -> float:
    """The best of the guessers that did not see the test split."""
    return max(accuracies[name] for name in ("most_common", "fitted_on_train", "words"))


def _texts(examples: Sequence[Example]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Instruction and answer of the training and of the test split."""
    train, test = ([(text, answer) for own, _, text, answer in examples if own == split] for split in ("train", "test"))
    return train, test


def _by_question(pairs: Iterable[tuple[str, str]]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for asked, answer in pairs:
        found[asked][answer] += 1
    return found


def _guess_by_words(train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]) -> list[str | None]:
    """Multinomial naive Bayes with add-one smoothing."""
    names = [name for name, _ in Counter(answer for _, answer in train).most_common(MAX_ANSWERS)]
    if not names:
        return [None] * len(test)
    column = {name: place for place, name in enumerate(names)}
    counts = Counter(word for text, _ in train for word in set(all_words(text)))
    row = {word: place for place, (word, _) in enumerate(counts.most_common(MAX_WORDS))}
    seen = np.ones((len(row), len(names)))
    prior = np.zeros(len(names))
    for text, answer in train:
        if answer in column:
            prior[column[answer]] += 1
            seen[[row[word] for word in set(all_words(text)) if word in row], column[answer]] += 1
    log_words = np.log(seen) - np.log(prior + 2)
    guessed: dict[str, str] = {}
    for text in {text for text, _ in test}:
        scores = np.log(prior) + log_words[[row[word] for word in set(all_words(text)) if word in row]].sum(axis=0)
        guessed[text] = names[int(scores.argmax())]
    return [guessed[text] for text, _ in test]
