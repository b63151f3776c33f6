"""More chains from the given ones: paraphrased, reordered, expanded and simplified; each is checked, no duplicates.

A new record keeps the picture, question and answer of its origin, so it falls into the same split.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from embervlm import run_dir
from embervlm.config import ConfigError
from embervlm.config_data import AUGMENTATION_STRATEGIES, AugmentationConfig
from embervlm.curate.duplicates import ChainIndex
from embervlm.curate.strategies import PARALLEL, STRATEGIES, Origin, Paraphrase, Row, fault_of, paraphraser
from embervlm.data.domain import Domain
from embervlm.data.facts import reader_of
from embervlm.data.record_pictures import pictures_beside
from embervlm.data.records import DataError, ReasoningRecord, read_records, write_records
from embervlm.data.splits import split_records
from embervlm.progress import progress_bar
from embervlm.words.chain_text import format_reasoning, parse_reasoning_text
from embervlm.words.claims import content_words

GIVE_UP_AFTER = 12
"""Draws refused in a row after which an origin is not asked for more by that strategy."""
MAX_FROM_ONE = 256
"""New records for each origin at most, on average: what is drawn beyond is a mix of what there is."""


@dataclass(kw_only=True)
class StrategyReport:
    asked: int = 0
    made: int = 0
    distinct_chains: int = 0
    """Different chains among those made, whatever their picture and question; function words do not count."""
    refused: dict[str, int] = field(default_factory=dict)
    """Why draws were refused, or origins could not be drawn from, and how often."""

    def refuse(self, reason: str) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + 1


@dataclass(kw_only=True)
class AugmentationReport:
    """The result of an augmentation. Distinct: differs in more than function words, case and punctuation."""

    origins: int = 0
    wanted: int = 0
    """New records asked for."""
    made: int = 0
    distinct_chains: int = 0
    """Different chains among origins and new records together, whatever their picture and question."""
    distinct_origins: int = 0
    """The same among the origins alone."""
    strategies: dict[str, StrategyReport] = field(
        default_factory=lambda: {name: StrategyReport() for name in AUGMENTATION_STRATEGIES}
    )
    refused_origins: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> ids of the records that nothing was made from."""

    def text(self) -> str:
        """The report as lines for people."""
        lines = [
            f"distinct chains for training: {self.distinct_chains}, of which {self.distinct_origins} were given",
            f"{'strategy':<12}{'asked':>8}{'made':>8}{'distinct':>10}  refused",
        ]
        for name, one in self.strategies.items():
            refused = ", ".join(f"{reason} {number}" for reason, number in sorted(one.refused.items())) or "-"
            lines.append(f"{name:<12}{one.asked:>8}{one.made:>8}{one.distinct_chains:>10}  {refused}")
        for reason, ids in sorted(self.refused_origins.items()):
            more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
            lines.append(f"nothing was made from {len(ids)} records, {reason}: {', '.join(ids[:5])}{more}")
        return "\n".join(lines)


def _said(steps: Sequence[str]) -> int:
    """What tells distinct chains apart, whatever their question."""
    return hash(tuple(content_words(step) for step in steps))


# ---- the whole


def augment(
    records: Sequence[ReasoningRecord],
    num_new: int,
    *,
    validate: bool = True,
    seed: int = 0,
    teacher: Paraphrase | None = None,
    shares: Mapping[str, float] = AUGMENTATION_STRATEGIES,
) -> tuple[list[ReasoningRecord], AugmentationReport]:
    """Up to `num_new` distinct records made from `records`, and what was made and refused; same seed, same records.

    Strategies get their `shares`; what one cannot reach is asked of the others that have one. Fewer come back where
    there are no more distinct chains. Nothing is made from records that are augmentations themselves, nor is any made
    again.

    Args:
        validate: check that claims are unchanged and none is contradicted, and that the conclusion fits the answer.
        teacher: words chains anew, in place of the rules.
    Raises:
        DataError: two records of one id, since a new record names its origin by that.
    """
    maker = _Maker(records, validate, seed, teacher)
    report = maker.report
    report.wanted = max(0, num_new)
    rng = random.Random(f"augment:{seed}")
    shares = {name: share for name, share in shares.items() if share > 0}
    open_to = {name: list(maker.origins) for name in shares}
    made: list[ReasoningRecord] = []
    goal = min(report.wanted, MAX_FROM_ONE * len(maker.origins))
    for name, asked in _split(report.wanted, shares).items():
        report.strategies[name].asked = asked
    with progress_bar(total=goal, desc="augmenting", unit="chain") as bar:
        while len(made) < goal and any(open_to.values()):
            quotas = _split(goal - len(made), {name: shares[name] for name, left in open_to.items() if left})
            wanted: dict[int, dict[str, int]] = defaultdict(dict)
            for name, quota in quotas.items():
                rng.shuffle(open_to[name])
                each, more = divmod(quota, len(open_to[name]))
                for place, number in enumerate(open_to[name]):
                    if count := each + (place < more):
                        wanted[number][name] = count
            exhausted: dict[str, set[int]] = defaultdict(set)
            for number in sorted(wanted):
                for name, found in maker.make(number, wanted[number]):
                    made += found
                    bar.update(len(found))
                    if len(found) < wanted[number][name]:
                        exhausted[name].add(number)
            open_to = {
                name: [number for number in left if number not in exhausted[name]] for name, left in open_to.items()
            }
    maker.finish(made)
    return made, report


def _split(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """`total` as whole numbers in the proportion of `shares`."""
    whole = sum(shares.values())
    out = {name: int(total * share / whole) for name, share in shares.items()}
    for name in sorted(shares, key=lambda name: out[name] - total * shares[name] / whole)[: total - sum(out.values())]:
        out[name] += 1
    return out


class _Maker:
    """Makes new records out of single ones and keeps account."""

    def __init__(
        self, records: Sequence[ReasoningRecord], validate: bool, seed: int, teacher: Paraphrase | None
    ) -> None:
        self._records, self._validate, self._seed = records, validate, seed
        ids = Counter(record.record_id for record in records)
        if repeated := [name for name, count in ids.items() if count > 1]:
            raise DataError.of(
                [f"record {name}: id: appears {ids[name]} times; give each record its own" for name in repeated]
            )
        self._taken = set(ids)
        self._chains = ChainIndex()
        self._distinct: set[int] = set()
        for record in records:
            if record.steps:
                self._chains.refusal(record, record.steps)
                self._distinct.add(_said(record.steps))
        self._reader = reader_of(records)
        self._max_steps = max((record.num_steps for record in records), default=0)
        self._strategies = {**STRATEGIES, "paraphrase": paraphraser(teacher, self._reader)}
        self._rounds: Counter[int] = Counter()
        self.origins = [i for i, record in enumerate(records) if "augmentation" not in record.metadata]
        self.report = AugmentationReport(origins=len(self.origins), distinct_origins=len(self._distinct))

    def make(self, number: int, wanted: Mapping[str, int]) -> Iterator[tuple[str, list[ReasoningRecord]]]:
        """For each strategy as many new records as are wanted of it, or all that it can give."""
        record = self._records[number]
        # built anew every time: kept for all records, the graphs would take more memory than the records
        origin = Origin(record, self._reader, self._max_steps)
        if (reason := origin.why_not(self._validate)) is not None:
            ids = self.report.refused_origins.setdefault(reason, [])
            if record.record_id not in ids:
                ids.append(record.record_id)
            yield from ((name, []) for name in wanted)
            return
        self._rounds[number] += 1
        for name, number_wanted in wanted.items():
            rng = random.Random(f"{self._seed}:{record.record_id}:{name}:{self._rounds[number]}")
            yield name, list(islice(self._draws(origin, name, rng), number_wanted))

    def _draws(self, origin: Origin, name: str, rng: random.Random) -> Iterator[ReasoningRecord]:
        account = self.report.strategies[name]
        in_a_row = 0
        while in_a_row < GIVE_UP_AFTER:
            rows = self._strategies[name](origin, rng)
            if isinstance(rows, str):
                account.refuse(rows)
                return
            steps = tuple(text for text, _ in (*rows, *origin.ending))
            reason = None
            if parse_reasoning_text(format_reasoning(steps)) != steps:
                reason = "does not read back as it was written"
            elif self._validate:
                reason = fault_of(origin, rows, name)
            reason = reason or self._chains.refusal(origin.record, steps)
            if reason is not None:
                account.refuse(reason)
                in_a_row += 1
                continue
            in_a_row = 0
            account.made += 1
            yield self._record(origin, name, rows)

    def _record(self, origin: Origin, name: str, rows: Sequence[Row]) -> ReasoningRecord:
        record = origin.record
        whole = [*rows, *origin.ending]
        metadata = {key: value for key, value in record.metadata.items() if key not in PARALLEL}
        metadata |= {key: [extra[key] for _, extra in whole] for key in whole[0][1]}
        metadata |= {"origin": record.record_id, "augmentation": name, "validated": self._validate}
        numbers = (f"{record.record_id}-{name}-{number}" for number in count(1))
        record_id = next(found for found in numbers if found not in self._taken)
        self._taken.add(record_id)
        return replace(record, record_id=record_id, steps=tuple(text for text, _ in whole), metadata=metadata)

    def finish(self, made: Sequence[ReasoningRecord]) -> None:
        said: dict[str, set[int]] = defaultdict(set)
        for record in made:
            said[record.metadata["augmentation"]].add(_said(record.steps))
        for name, account in self.report.strategies.items():
            account.distinct_chains = len(said[name])
        self.report.made = len(made)
        self.report.distinct_chains = len(self._distinct.union(*said.values()))


# ---- files


def augment_file(
    input: Path,
    output_file: Path,
    *,
    domain: Domain,
    target_samples: int,
    validate_reasoning: bool = True,
    seed: int = 0,
) -> AugmentationReport:
    """Write the records of `input` and new ones made from its train split, `target_samples` in total; print a summary.

    Beside it goes `<output_file's stem>.augmentation.json`, the report. Validation and test records are kept as they
    are: a metric over near copies of one question would say less than it seems to.
    """
    if output_file.suffix not in (".json", ".jsonl"):
        raise ConfigError(f"--output_file {output_file}: must end in .json or .jsonl")
    if target_samples < 1:
        raise ConfigError(f"--target_samples {target_samples}: must be at least 1")
    records = read_records(input, candidates=domain.candidates, unpack_dir=pictures_beside(output_file))
    train = split_records(records)["train"]
    if not train:
        raise DataError(f"{input}: none of its {len(records)} records is in the train split; add records")
    made, report = augment(train, target_samples - len(records), validate=validate_reasoning, seed=seed)
    write_records(output_file, chain(records, made))
    path = output_file.with_name(f"{output_file.stem}.augmentation.json")
    run_dir.write_json_atomic(path, asdict(report))
    total = len(records) + len(made)
    print(
        f"{output_file}: {total} records, {len(records)} given and {len(made)} new from {len(train)} of the train split"
    )
    print(report.text())
    if total < target_samples:
        print(
            f"stopped {target_samples - total} below --target_samples {target_samples}: these records give no more "
            f"distinct chains, or gave {MAX_FROM_ONE} each; add more records"
        )
    print(f"Report: {path}")
    return report


def augment_cached(
    records: Sequence[ReasoningRecord], config: AugmentationConfig, folder: Path, seed: int, *, make: bool
) -> Sequence[ReasoningRecord]:
    """`records` and the new ones that `config` asks for, `config.target_samples` in all.

    The new ones are kept in `folder` under a name that depends on the records and the settings. `make`: make them
    where they are not there yet; without it they must be.
    """
    if len(records) >= config.target_samples:
        return records
    digest = hashlib.blake2b(repr((asdict(config), seed)).encode(), digest_size=8)
    for record in records:
        digest.update(repr(record).encode())
    path = folder / f"augmented-{digest.hexdigest()}.jsonl"
    if make and not path.exists():
        made, report = augment(
            records,
            config.target_samples - len(records),
            validate=config.validate_reasoning,
            seed=seed,
            shares=config.augmentation_strategies,
        )
        print(f"augmentation: {len(records)} training records and {len(made)} new ones\n{report.text()}")
        if len(made) < report.wanted:
            print(
                f"reasoning_augmentation.target_samples: {config.target_samples} cannot be reached with distinct chains"
            )
        # all else is the origin's; without it the file, and what reading it takes, stays small
        write_records(path, (replace(record, metadata=_own_metadata(record.metadata)) for record in made))
    if not path.exists() or not path.stat().st_size:
        return records
    origins = {record.record_id: record.metadata for record in records}
    new = read_records(path, candidates=records[0].default_candidates, allow_outside=True)
    inherited = ({k: v for k, v in origins[r.metadata["origin"]].items() if k not in PARALLEL} for r in new)
    return [*records, *(replace(r, metadata={**base, **r.metadata}) for r, base in zip(new, inherited, strict=True))]


def _own_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    own = ("origin", "augmentation", "validated", "candidates", *PARALLEL)
    return {key: metadata[key] for key in own if key in metadata}
