"""Ask a trained model a question about a picture, check its chain, and ask a follow-up.

    python examples/ask_a_model.py CHECKPOINT PICTURE "Which robots should carry the load to the flag?"

`make quickstart` leaves a checkpoint in outputs/quickstart/stage4/phase2/checkpoint-final and pictures in
outputs/quickstart/data/images/.
"""

from __future__ import annotations

import sys

from embervlm import EmberVLM


def main(checkpoint: str, picture: str, question: str) -> None:
    model = EmberVLM.from_pretrained(checkpoint)
    reasoning = model.generate_reasoning(picture, question)
    for number, step in enumerate(reasoning.steps, 1):
        print(f"Step {number}: {step}")
    print(f"Answer: {reasoning.answer}")

    # the model's own opinion of its chain: by form, and by the step validator
    faults = model.reasoning_faults(reasoning)
    print("It finds no fault with the chain." if not faults else "It finds fault: " + " ".join(faults))

    # a follow-up starts from the steps that the validator lets pass after the new question too
    second = model.reason(picture, "What if it rains?", previous_reasoning=reasoning)
    print(f"Answer to the follow-up: {second['answer']} ({second['confidence']:.0%} by the answer head)")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
