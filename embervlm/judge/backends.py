"""Who says how alike two texts are, and whether one follows from or contradicts another.

The default is embedded: word vectors that ship with the package, rarities fitted on training chains. Any
sentence-transformers model and any NLI cross-encoder can stand in, by Hugging Face id or local folder. None of them is
the checkpoint under test or its validator: a judge that is being trained does not rank itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from embervlm.config import ConfigError
from embervlm.errors import UNREADABLE
from embervlm.paths import closest_path, names_a_path
from embervlm.run_dir import read_object
from embervlm.words.wording import Rarity, Reading, ramp

EMBEDDED = "embedded"
EMBEDDED_VERSION = "7"
"""Changes whenever the same chain would get another score."""
SAID = (0.45, 0.75)
"""Share of a text said by another: from none of it to all of it."""
SAME_STATEMENT = (0.55, 0.85)
"""Share of a clause said by another: below the first they speak of different things, from the second of the same."""
SAME_TEXT = (0.85, 0.95)
"""The same of a whole text."""
Array = NDArray[np.float32]


class Similarity(Protocol):
    """Cosine similarity of texts."""

    name: str
    version: str

    def matrix(self, texts: Sequence[str]) -> Array:
        """`[text, text]` in [0, 1], symmetric."""
        ...


class Entailment(Protocol):
    """Whether one text follows from another, or cannot be true beside it."""

    name: str
    version: str

    def judge(self, texts: Sequence[str], pairs: Sequence[tuple[int, int]]) -> tuple[Array, Array]:
        """For each (premise, hypothesis): how sure it is entailed, and how sure it is contradicted, in [0, 1]."""
        ...


@dataclass(frozen=True)
class Backends:
    similarity: Similarity
    entailment: Entailment

    @property
    def record(self) -> dict[str, dict[str, str]]:
        """As it stands in a results file."""
        return {
            "similarity": {"name": self.similarity.name, "version": self.similarity.version},
            "entailment": {"name": self.entailment.name, "version": self.entailment.version},
        }


def make_backends(
    similarity: str = EMBEDDED, entailment: str = EMBEDDED, *, chains: Sequence[Sequence[str]] = ()
) -> Backends:
    """Backends by name: `embedded`, fitted on `chains`, or the id or folder of a model."""
    shared = EmbeddedBackend(chains)
    return Backends(
        shared if similarity == EMBEDDED else SentenceEncoder(similarity),
        shared if entailment == EMBEDDED else CrossEncoder(entailment),
    )


class EmbeddedBackend:
    """Similarity and entailment from words alone, clause by clause; reads no model."""

    name = EMBEDDED

    def __init__(self, chains: Sequence[Sequence[str]] = ()) -> None:
        self.rarity = Rarity(" ".join(chain) for chain in chains)
        self.version = EMBEDDED_VERSION
        if chains:
            digest = hashlib.blake2b(json.dumps([list(chain) for chain in chains]).encode(), digest_size=4).hexdigest()
            self.version += f", fitted on {len(chains):,} chains ({digest})"
        self._last: tuple[tuple[str, ...], Reading] | None = None

    def reading(self, texts: Sequence[str]) -> Reading:
        """The words of `texts`; the same texts again are not read twice."""
        key = tuple(texts)
        if self._last is None or self._last[0] != key:
            self._last = key, Reading(key, self.rarity)
        return self._last[1]

    def matrix(self, texts: Sequence[str]) -> Array:
        """Geometric mean of what each says of the other."""
        share, _, _ = self.reading(texts).text_cover
        out = np.sqrt(share * share.T)
        np.fill_diagonal(out, [1.0 if places else 0.0 for places in self.reading(texts).text_places])
        return out.astype(np.float32)  # type: ignore[no-any-return]

    def judge(self, texts: Sequence[str], pairs: Sequence[tuple[int, int]]) -> tuple[Array, Array]:
        """Entailed: the share of its words that the premise says. Contradicted: it has a clause that the premise says
        with the opposite negation, or is the premise with one negation more or less."""
        reading = self.reading(texts)
        entailed = ramp(reading.text_cover[0], *SAID)
        opposed = np.zeros((len(texts), len(texts)), np.float32)
        filled = [number for number, span in enumerate(reading.spans) if len(span)]
        if filled:
            starts = [reading.spans[number].start for number in filled]
            opposes = np.maximum.reduceat(self._opposing_clauses(reading), starts, axis=0)
            opposed[np.ix_(filled, filled)] = np.maximum.reduceat(opposes, starts, axis=1)
            # "Anna: ..., so Anna is not": where a text opposes itself, one of its clauses states nothing.
            itself = np.diag(opposed)
            opposed = np.maximum(opposed * (1 - np.maximum(itself[:, None], itself)), self._opposing_texts(reading))
        rows, columns = [a for a, _ in pairs], [b for _, b in pairs]
        contradicted = opposed[rows, columns]
        return entailed[rows, columns] * (1 - contradicted), contradicted

    def _opposing_texts(self, reading: Reading) -> Array:
        """`[text, text]`: how sure both say the same, one of them with an odd number of negations more."""
        odd = np.array([sum(reading.clauses[n].negated for n in span) % 2 == 1 for span in reading.spans], dtype=bool)
        long_enough = np.array([len(places) > 1 for places in reading.text_places], dtype=bool)
        comparable = (odd[:, None] != odd) & long_enough[:, None] & long_enough
        if not comparable.any():
            return np.zeros(comparable.shape, dtype=np.float32)
        share = reading.text_words_shared
        same = ramp(np.minimum(share, share.T), *SAME_TEXT)
        return np.where(comparable & ~reading.texts_of_others, same, 0).astype(np.float32)  # type: ignore[no-any-return]

    def _opposing_clauses(self, reading: Reading) -> Array:
        """`[clause, clause]`: how sure both speak of the same thing, one of them with a negation."""
        negated = np.array([clause.negated for clause in reading.clauses], dtype=bool)
        long_enough = np.array(
            [len(set(clause.words)) > 1 and not clause.supposed for clause in reading.clauses], dtype=bool
        )
        comparable = (negated[:, None] != negated) & long_enough[:, None] & long_enough
        if not comparable.any():
            return np.zeros(comparable.shape, dtype=np.float32)
        share, (_, least) = reading.clause_words_shared, reading.clause_cover
        said = ramp(share, *SAME_STATEMENT)
        # One inside the other: "the pace is not slow" against "the pace is slow on the long way up".
        inside = said * (least > 0.5) * (share.T > 0.4)
        same = np.maximum(np.minimum(said, said.T), 0.9 * np.maximum(inside, inside.T))
        return np.where(comparable & ~reading.of_others, same, 0).astype(np.float32)  # type: ignore[no-any-return]


# ---- models of others


class SentenceEncoder:
    """Cosine of what a sentence-transformers model says of each text: its token states, pooled as the model wants."""

    def __init__(self, model: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer, self._model, self.version = _load(model, AutoTokenizer, AutoModel, "similarity")
        self.name = model
        self._pooling = _pooling_of(model)
        self._embed = lru_cache(maxsize=1 << 15)(self._embed_one)

    def matrix(self, texts: Sequence[str]) -> Array:
        if not texts:
            return np.zeros((0, 0), np.float32)
        vectors = np.stack([self._embed(text) for text in texts])
        return np.clip(vectors @ vectors.T, 0, 1).astype(np.float32)  # type: ignore[no-any-return]

    def _embed_one(self, text: str) -> Array:
        import torch

        with torch.inference_mode():
            batch = self._tokenizer([text or " "], truncation=True, max_length=256, return_tensors="pt")
            states = self._model(**batch.to(self._model.device)).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            pooled = states[:, 0] if self._pooling == "cls" else (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            return torch.nn.functional.normalize(pooled, dim=1)[0].float().cpu().numpy()  # type: ignore[no-any-return]


class CrossEncoder:
    """An NLI sequence classifier; its configuration names the labels `entailment` and `contradiction`."""

    BATCH = 64

    def __init__(self, model: str) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._tokenizer, self._model, self.version = _load(
            model, AutoTokenizer, AutoModelForSequenceClassification, "entailment"
        )
        self.name = model
        labels = {str(name).casefold(): int(place) for name, place in (self._model.config.label2id or {}).items()}
        try:
            self._entailment = next(place for name, place in labels.items() if name.startswith("entail"))
            self._contradiction = next(place for name, place in labels.items() if name.startswith("contradict"))
        except StopIteration:
            raise ConfigError(
                f"entailment backend {model}: its labels are {sorted(labels)}, none is entailment or contradiction; "
                "use an NLI model, or set id2label in its config.json"
            ) from None

    def judge(self, texts: Sequence[str], pairs: Sequence[tuple[int, int]]) -> tuple[Array, Array]:
        import torch

        found = []
        for start in range(0, len(pairs), self.BATCH):
            part = pairs[start : start + self.BATCH]
            with torch.inference_mode():
                batch = self._tokenizer(
                    [texts[a] for a, _ in part],
                    [texts[b] for _, b in part],
                    truncation=True,
                    max_length=256,
                    padding=True,
                    return_tensors="pt",
                )
                found.append(self._model(**batch.to(self._model.device)).logits.float().softmax(-1).cpu().numpy())
        if not found:
            return np.zeros(0, np.float32), np.zeros(0, np.float32)
        shares = np.concatenate(found)
        return shares[:, self._entailment], shares[:, self._contradiction]


def _pooling_of(model: str) -> str:
    """`mean` or `cls`, as the model's folder says; `mean` where it says nothing."""
    from transformers.utils.hub import cached_file

    found = cached_file(
        model,
        "1_Pooling/config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    settings = read_object(found) if found else {}
    modes = [name for name, on in settings.items() if name.startswith("pooling_mode_") and on is True]
    mode = settings.get("pooling_mode") or (" and ".join(modes) if modes else "mean")
    mode = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}.get(mode, mode)
    if mode not in ("mean", "cls"):
        raise ConfigError(f"similarity backend {model}: pools by {mode}; use a model that pools by mean or cls")
    return str(mode)


def _load(model: str, tokenizer_class: Any, model_class: Any, kind: str) -> tuple[Any, Any, str]:
    import torch

    if names_a_path(model) and not Path(model).exists():
        raise ConfigError(f"{kind} backend {model}: no such folder{closest_path(model)}")
    try:
        tokenizer = tokenizer_class.from_pretrained(model)
        loaded = model_class.from_pretrained(model).eval()
    except UNREADABLE as error:
        raise ConfigError(
            f"{kind} backend {model}: cannot be loaded ({str(error).splitlines()[0]}); give a model's folder or id, "
            f"or use {EMBEDDED}"
        ) from error
    if torch.cuda.is_available():
        loaded = loaded.to("cuda")
    return tokenizer, loaded, _version_of(model, loaded)


def _version_of(model: str, loaded: Any) -> str:
    """The commit of a model from the hub; of a folder, a digest over its weights."""
    if commit := getattr(loaded.config, "_commit_hash", None):
        return str(commit)
    from hashlib import sha256

    digest = sha256()
    for path in sorted(Path(model).glob("*.safetensors")) or sorted(Path(model).glob("*.bin")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()[:16]}"
