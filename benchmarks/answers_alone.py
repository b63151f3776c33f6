"""Few chains and many answers: what do reinforcement (phase 3), rejection sampling and voting make of the answers?

    python benchmarks/answers_alone.py --data outputs/quickstart/data/reasoning_data.json \
        --stage3 outputs/quickstart/stage3/checkpoint-final --output_dir outputs/answers_alone

Of a share of the training records (a tenth) the chains are kept; of the others nothing but question, picture and
answer, without facts or boxes. Arms, each from the same Stage 3 checkpoint:

- `few`: phases 1 and 2 on the records with chains;
- `phase3`: phase 3 from `few`, on the answers of the rest;
- `rejection`: from `few`, chains of its own with the right answer, from as many drawn tokens as phase 3 drew, and
  phase 2 on them and the given chains;
- `voting`: `few` with 20 chains that vote;
- `all`: phases 1 and 2 on all chains;
- `direct`: `few`'s Stage 3 start, trained further on all answers without chains, for as many records as `all`.

An arm that is there already is not trained again, so the same call continues. Prints for each: accuracy on the test
split with its 95% interval (Wilson), soundness (share of steps without a fault by the judge's rules and the facts),
tokens of a chain, share of distinct chains among 4 drawn, tokens that were drawn in training, and minutes of training.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny_run import REPOSITORY
from voting import wilson

from embervlm import run_dir
from embervlm.data.facts import fact_domains
from embervlm.data.images import PictureCache
from embervlm.data.record_fields import FieldRules
from embervlm.data.records import ReasoningRecord, read_record, read_records
from embervlm.data.splits import split_records
from embervlm.evaluation.asked import load_model
from embervlm.evaluation.batches import BATCH_SIZE, answer, see
from embervlm.evaluation.eval_data import EvalData, Evaluation, load_eval_data
from embervlm.judge.metrics import is_right
from embervlm.judge.rewards import answer_reward, soundness_reward
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM
from embervlm.robots.domain import domain_named
from embervlm.training.rollouts import draw
from embervlm.words.chain_text import format_reasoning

ARMS = ("few", "phase3", "rejection", "voting", "all", "direct")
OF_CHAINS = ("facts", "seen", "scene", "boxes", "caption", "step_types", "details", "num_steps")
"""Metadata that say more than the answer."""
VOTES = 20
DRAWN = 4
BUNDLE = 32
"""Questions that rejection sampling asks at a time."""


class Arms:
    """The data and the runs of the comparison, below one folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, Path(args.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.partial = self.folder / "partial.json"
        if not self.partial.exists():
            self._write_partial()

    def _write_partial(self) -> None:
        source, given = Path(self.args.data), json.loads(Path(self.args.data).read_text(encoding="utf-8"))
        records = read_records(source, candidates=domain_named(self.args.domain).candidates)
        splits = {r.record_id: name for name, some in split_records(records).items() for r in some}
        train = [value["id"] for value in given if splits[value["id"]] == "train"]
        kept = set(random.Random(self.args.seed).sample(train, round(self.args.share * len(train))))
        for value in given:
            value["image"] = str((source.parent / value["image"]).resolve())
            value["metadata"]["split"] = splits[value["id"]]
            if splits[value["id"]] == "train" and value["id"] not in kept:
                del value["reasoning"]
                value["metadata"] = {k: v for k, v in value["metadata"].items() if k not in OF_CHAINS}
        run_dir.write_json_atomic(self.partial, given)
        print(f"{len(kept):,} of {len(train):,} training records keep their chain")

    def checkpoint(self, arm: str) -> Path:
        """The final checkpoint of an arm, which is trained if it is not there."""
        if arm == "voting":
            return self.checkpoint("few")
        make: Mapping[str, Callable[[Path], Path]] = {
            "few": lambda output: self._supervised(output, self.partial, few=True),
            "all": lambda output: self._supervised(output, Path(self.args.data), few=False),
            "phase3": self._phase3,
            "rejection": self._rejection,
            "direct": self._direct,
        }
        return make[arm](self.folder / arm)

    def _train(self, output: Path, data: Path, *flags: str) -> None:
        argv = [sys.executable, "launch/train.py", "--config", self.args.config, "--engine", "torch"]
        argv += ["--output_dir", str(output), "--reasoning_data", str(data), "--seed", str(self.args.seed)]
        argv += ["--domain", self.args.domain, "--allow_outside", *flags]
        print(" ".join(argv[1:]), flush=True)
        with open(self.folder / f"{output.name}.log", "a", encoding="utf-8") as log:
            subprocess.run(argv, cwd=REPOSITORY, check=True, stdout=log, stderr=log)

    def _supervised(self, output: Path, data: Path, *, few: bool) -> Path:
        epochs = self.args.few_epochs if few else (1, 2)
        final = run_dir.checkpoint_path(run_dir.phase_dir(output, 2), None)
        if not final.exists():
            admit = ["--set", "stage4.phase3={}"] if few else []
            for phase, start in ((1, Path(self.args.stage3)), (2, output / "stage4" / "phase1" / run_dir.FINAL_NAME)):
                flags = ["--stages", "4", "--phase", str(phase), f"--phase{phase}_epochs", str(epochs[phase - 1])]
                self._train(output, data, *flags, "--resume_from", str(start), *admit)
        return final

    def _phase3(self, output: Path) -> Path:
        final = run_dir.checkpoint_path(run_dir.phase_dir(output, 3), None)
        if not final.exists():
            settings = [f"stage4.phase3.{key}={value}" for key, value in PHASE3.items()]
            steps = ["--max_steps", str(self.args.steps)]
            start = ["--resume_from", str(self.checkpoint("few"))]
            self._train(output, self.partial, "--stages", "4", "--phase", "3", *start, *steps, "--set", *settings)
        return final

    def _rejection(self, output: Path) -> Path:
        final = run_dir.checkpoint_path(run_dir.phase_dir(output, 2), None)
        if final.exists():
            return final
        few, wanted = self.checkpoint("few"), self.args.drawn or tokens_drawn(self.checkpoint("phase3"))
        given = json.loads(self.partial.read_text(encoding="utf-8"))
        asked = [v for v in given if v["metadata"]["split"] == "train" and "reasoning" not in v]
        random.Random(self.args.seed).shuffle(asked)
        kept, drawn = right_chains(few, asked, wanted, self.args.domain, self.partial)
        print(f"rejection sampling: {len(kept):,} chains of {drawn:,} tokens drawn have the right answer")
        mixed = [value for value in given if "reasoning" in value] + kept
        run_dir.write_json_atomic(self.folder / "mixed.json", mixed)
        flags = ["--stages", "4", "--phase", "2", "--phase2_epochs", "2", "--resume_from", str(few)]
        self._train(output, self.folder / "mixed.json", *flags)
        return final

    def _direct(self, output: Path) -> Path:
        final = run_dir.checkpoint_path(output / "baseline" / "same_samples", None)
        if not final.exists():
            self.checkpoint("all")  # what the baseline is matched to
            shutil.copytree(self.folder / "all" / "stage4", output / "stage4", dirs_exist_ok=True)
            off = ["--set", "baseline.same_time=false"]
            self._train(output, Path(self.args.data), "--stages", "baseline", "--resume_from", self.args.stage3, *off)
        return final


@torch.inference_mode()
def right_chains(
    checkpoint: Path, asked: list[dict[str, Any]], wanted: int, domain: str, data: Path
) -> tuple[list[dict[str, Any]], int]:
    """Records with chains of the model's own whose answer is right by the answer reward, from about `wanted` drawn
    tokens, and their number; of equal chains of a question one is kept.

    `embervlm data generate --source self` asks rules and step validator as well; a validator that saw few chains lets
    next to none through, so it would say little here.
    """
    model = load_model(checkpoint)
    decoding = Decoding(temperature=1.0, num_chains=DRAWN).for_model(model.config)
    rules = FieldRules(
        image_root="/", candidates=domain_named(domain).candidates, require_reasoning=False, allow_outside=True
    )
    kept: list[dict[str, Any]] = []
    drawn = 0
    for start in range(0, len(asked), BUNDLE):
        if drawn >= wanted:
            break
        values = asked[start : start + BUNDLE]
        records = [record for value in values if (record := read_record(value, value["id"], rules, print)) is not None]
        pictures = PictureCache([r.image for r in records if r.image], model.config.image_size, fill=model.config.fill)
        prompts = model.tokenizer.prompts([record.instruction for record in records])
        keys = [record.record_id for record in records]
        groups = draw(model, *see(model, pictures, records), prompts, [r.candidates for r in records], decoding, keys)
        for value, record, chains in zip(values, records, groups):
            drawn += sum(len(chain.ids) for chain in chains)
            right = {tuple(c.result["reasoning_steps"]) for c in chains if answer_reward(record, c.result)}
            kept += [
                {**value, "id": f"{value['id']}-own{number}", "reasoning": format_reasoning(steps)}
                for number, steps in enumerate(sorted(right))
            ]
    return kept, drawn


PHASE3 = {
    "prompts_per_rollout": 16,
    "num_generations": 8,
    "num_iterations": 2,
    "rollout_batch_size": 16,
    "learning_rate": 5e-4,
    "warmup_steps": 4,
}


def tokens_drawn(checkpoint: Path) -> int:
    return int(run_dir.read_state(checkpoint).get("tokens_drawn", 0))


def minutes(checkpoint: Path) -> float:
    return float(run_dir.read_state(checkpoint).get("elapsed_s", 0.0)) / 60


def measure(arm: str, checkpoint: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy, soundness, length and variety of an arm on the test split."""
    model = load_model(checkpoint)
    job = Evaluation(
        checkpoint=checkpoint, split="test", num_samples=args.num_samples, compare=False, reasoning_data=args.data
    )
    data = load_eval_data(job, model.config.image_size, tuple(model.config.candidates), model.config.fill)
    form = "direct" if arm == "direct" else "reasoning"
    votes = Decoding(num_chains=VOTES, temperature=0.7) if arm == "voting" else Decoding(form=form)
    results = ask(model, data, data.records, votes)
    right = sum(is_right(result["answer_set"], record) for result, record in zip(results, data.records))
    out: dict[str, Any] = {"arm": arm, "right": right, "asked": len(results)}
    out["tokens"] = sum(result["num_tokens"] for result in results) / len(results)
    if form == "reasoning":
        domains = fact_domains(data.records)
        sound = [soundness_reward(record, result, domains) for record, result in zip(data.records, results)]
        out["soundness"] = sum(sound) / len(sound)
        out["distinct"] = variety(model, data)
    out |= {"drawn": tokens_drawn(checkpoint), "minutes": minutes(checkpoint)}
    return out


def ask(model: EmberVLM, data: EvalData, records: list[ReasoningRecord], decoding: Decoding) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for start in range(0, len(records), BATCH_SIZE):
        results += answer(model, data.pictures, records[start : start + BATCH_SIZE], decoding)
    return results


def variety(model: EmberVLM, data: EvalData) -> float:
    """Share of distinct chains among `DRAWN` drawn for a question at temperature 1."""
    some = data.records[:32]
    found = [ask(model, data, some, Decoding(temperature=1.0, seed=seed)) for seed in range(DRAWN)]
    chains = [{tuple(result["reasoning_steps"]) for result in of} for of in zip(*found)]
    return sum(map(len, chains)) / (DRAWN * len(chains))


def shown(row: Mapping[str, Any]) -> str:
    low, high = wilson(row["right"], row["asked"])
    rest = "  ".join(
        f"{'-':>9}" if row.get(name) is None else f"{row[name]:>9.3f}" for name in ("soundness", "distinct")
    )
    share = row["right"] / row["asked"]
    return (
        f"{row['arm']:<10} {share:.3f} ({low:.3f} to {high:.3f})  {rest}  {row['tokens']:>7.0f}  {row['drawn']:>10,}  "
        f"{row['minutes']:>7.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="records with chains")
    parser.add_argument("--stage3", required=True, help="the checkpoint that all arms start from")
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--output_dir", default="outputs/answers_alone")
    parser.add_argument("--domain", default="robots")
    parser.add_argument("--share", type=float, default=0.1, help="of the training records that keep their chain")
    parser.add_argument("--few_epochs", type=int, nargs=2, default=(4, 8), help="of phases 1 and 2 on these")
    parser.add_argument("--steps", type=int, default=120, help="updates of phase 3")
    parser.add_argument("--drawn", type=int, help="tokens of rejection sampling; default: as many as phase 3 drew")
    parser.add_argument("--num_samples", type=int, default=500, help="test records")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    args = parser.parse_args()
    arms = Arms(args)
    print(
        f"{'arm':<10} {'accuracy (95%)':<24} {'soundness':>9}  {'distinct':>9}  {'tokens':>7}  {'drawn':>10}  "
        f"{'minutes':>7}"
    )
    rows = []
    for arm in args.arms:
        rows.append(measure(arm, arms.checkpoint(arm), args))
        print(shown(rows[-1]), flush=True)
        run_dir.write_json_atomic(arms.folder / "results.json", rows)
    print(f"{yaml.safe_dump(PHASE3, default_flow_style=True).strip()}: settings of phase 3")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
