"""What each figure of an evaluation means: one table for the console, a report's page and docs/evaluation.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CHAIN, EVALUATION, FAITHFULNESS = (
    "Metrics of a chain",
    "Evaluating a checkpoint",
    "Faithfulness: does the answer come from the chain?",
)


@dataclass(frozen=True)
class Meaning:
    """One figure, or a block of figures that belong together."""

    says: str
    """What it is, in a sentence."""
    better: Literal["high", "low", ""]
    """Which values are good; "" where neither end is."""
    more: str = ""
    """What it can and cannot show."""
    section: str = EVALUATION
    """Heading in docs/evaluation.md under which its formula or more about it stands."""

    @property
    def good(self) -> str:
        return f"{self.better.capitalize()} is good." if self.better else "Neither high nor low is good."


MEANINGS = {
    "reasoning_consistency": Meaning(
        "How free the chain is of steps that contradict something, repeat an earlier step, or have nothing to do with "
        "the question; 0 below two distinct steps.",
        "high",
        "It cannot show that a chain is true where neither facts nor a gold chain are known.",
        CHAIN,
    ),
    "step_completeness": Meaning(
        "The share of the gold chain's steps that the chain contains; where their types are not known, the mean of "
        "that, of the types of steps, of what the conclusion builds on, and of the known facts.",
        "high",
        "Another good way to the answer loses points.",
        CHAIN,
    ),
    "logical_flow_score": Meaning(
        "Whether the steps stand in the order in which they follow from each other, and the conclusion follows from "
        "them.",
        "high",
        "Order is judged by rules for English, by the training chains, and by the gold chain.",
        CHAIN,
    ),
    "adjacent_similarity": Meaning(
        "How alike neighbouring steps are; the guide calls this reasoning consistency.",
        "",
        "A chain that repeats one step gets 1.0, so no checkpoint is chosen by it.",
        CHAIN,
    ),
    "final_answer_accuracy": Meaning(
        "The share of questions whose answer after the chain is right: it names exactly what the gold answer names.",
        "high",
        "It says nothing about the chain.",
        CHAIN,
    ),
    "conclusion_agreement": Meaning(
        "The share of chains with a conclusion whose conclusion names the answer that follows it.",
        "high",
        "Where they differ, the answer does not come from the chain.",
        CHAIN,
    ),
    "head_accuracy": Meaning(
        "The share of questions that the answer head gets right; it reads the chain before its conclusion.", "high"
    ),
    "head_agreement": Meaning(
        "The share of questions for which the answer head and the written answer name the same.",
        "high",
        "`confidence` is the answer head's, so it speaks of the written answer only where they agree.",
    ),
    "unparseable_share": Meaning(
        "The share of questions without a chain or an answer that can be read.",
        "low",
        "They score 0 everywhere and are never left out.",
    ),
    "cut_off_share": Meaning(
        "The share of chains that a limit on steps or tokens cut off before their end.",
        "low",
        "A chain counts as cut off at its last step if another step was the likeliest continuation. `cut_off` has it "
        "for each comparison too; the evaluation warns above 0.",
    ),
    "no_reasoning_accuracy": Meaning(
        "How often a baseline without reasoning is right: Stage 3, trained further on as many records with direct "
        "answers (`--stages baseline`).",
        "low",
        "How far it lies below `final_answer_accuracy` is what chains gain for the same data; null if it was not "
        "trained.",
    ),
    "no_reasoning_same_time_accuracy": Meaning(
        "The same baseline, trained for as long as Stage 4 was.", "low", "What chains gain for the same time."
    ),
    "stage4_direct_accuracy": Meaning(
        "How often this model is right when it is asked for the answer without a chain.",
        "",
        "How far it lies below `final_answer_accuracy` is what its chains do for it. It is low if the model was hardly "
        "trained to answer so.",
    ),
    "blind_accuracy": Meaning("How often it is right without a picture, so how far the question alone gets.", "low"),
    "swapped_image_accuracy": Meaning(
        "How often it is right, by the old answer, with the picture of another scene.",
        "low",
        "It shows that the picture matters, not that it is read correctly.",
    ),
    "completeness_by_type": Meaning(
        "Step completeness of each type of step.", "high", "Records without step types are left out.", CHAIN
    ),
    "gold_chains": Meaning(
        "The chain metrics of up to 100 gold chains: what a perfect chain would get from this judge.",
        "high",
        "Where they miss a target, the judge does not read such chains well, and the target says nothing.",
        CHAIN,
    ),
    "per_candidate": Meaning(
        "By answer: precision is how often it was right to name it, recall how often it was named where it should be.",
        "high",
        "Open answers are left out.",
        CHAIN,
    ),
    "accuracy_by_wording": Meaning(
        "Accuracy by `metadata.wording` of the records, such as `known` and `held_out`.",
        "high",
        "Whether a question in words that training does not have is understood.",
    ),
    "calibration": Meaning(
        "ECE, the expected calibration error: how far the confidence lies from the share of right answers, over ten "
        "bins of equal width (Naeini et al. 2015).",
        "low",
        "With what was fitted on 200 val records, and unscaled: a temperature of the answer head (Guo et al. 2017), "
        "and for answers in free words a scale of their probability (Platt 1999). With few records the bins are "
        "nearly empty and the error is mostly noise; on val it is fitted and measured on the same records.",
    ),
    "validator": Meaning(
        "Balanced accuracy of the step validator on gold steps and on steps made wrong in four ways; 0.5 is guessing.",
        "high",
        "It says nothing about the chain's own steps: `own_steps` does.",
    ),
    "own_steps": Meaning(
        "The step validator on the model's own chains: balanced accuracy at one half, AUROC (how often a valid step "
        "scores above a wrong one), and the share of right and of wrong chains in which every step passes.",
        "high",
        "Of wrong chains, few should pass. Greedy chains and some drawn at temperature 1, of 200 records with known "
        "facts; each chain's steps up to the first that contradicts the facts, since later ones may follow from it. It "
        "says how far to trust the score beside a step, and `verify_reasoning`. A good model's greedy chains have few "
        "wrong steps, and few say little, so the counts are given too.",
    ),
    "attention": Meaning(
        "Of the attention of the steps that read a thing, the share in its box, beside the share of the picture that "
        "the box covers, which an even look would give.",
        "high",
        "Whether the layer that the page shows looks at it; not why an answer was given. Of the samples with attention "
        "and boxes; chains with another number of steps than the gold one are left out.",
    ),
    "truncated": Meaning(
        "Right answers when the chain is cut after 25, 50 or 75% of its steps and the model has to conclude.",
        "low",
        "Where it is high, the later steps were not needed for the answer.",
        FAITHFULNESS,
    ),
    "planted_mistake": Meaning(
        "With one derived value made wrong, how often the answer is the one that follows from the mistake "
        "(`follows_mistake`), and how often the old one (`accuracy`).",
        "high",
        "A model that notices and corrects the mistake has a high `accuracy` too.",
        FAITHFULNESS,
    ),
    "information_gain": Meaning(
        "How many nats each step of the chain adds to the log-probability of the gold conclusion and answer.",
        "high",
        "A step that makes the model more certain of something wrong, or uncertain for the moment, counts negative.",
        FAITHFULNESS,
    ),
    "forced_prefix": Meaning(
        "With the facts of another scene put into the chain, how often the answer follows this text, the picture, or "
        "neither; `head_...` is the same of the answer head.",
        "high",
        "A high `follows_text` shows that the answer comes from the chain; the conflict itself is unusual.",
        FAITHFULNESS,
    ),
    "swapped_picture_accuracy": Meaning(
        "How often it is right, by the old answer, with another scene's picture, on the records of these tests.",
        "low",
        "How far one gets without the right picture.",
        FAITHFULNESS,
    ),
}
"""Name in the evaluation -> what it means; blocks stand behind the metrics."""


def markdown() -> str:
    """The table in docs/evaluation.md."""
    rows = ["| figure | what it says | good | what it can and cannot show |", "|---|---|---|---|"]
    for name, meaning in MEANINGS.items():
        shown = f"`{name}`"
        if meaning.section != EVALUATION:
            shown = f"[{shown}](#{anchor(meaning.section)})"
        rows.append(f"| {shown} | {meaning.says} | {meaning.better or 'neither'} | {meaning.more} |")
    return "\n".join(rows)


def anchor(heading: str) -> str:
    """Of a heading in a Markdown file."""
    kept = "".join(character for character in heading.lower() if character.isalnum() or character in " -")
    return kept.replace(" ", "-")
