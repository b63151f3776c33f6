"""Plan a mission with a model behind a port: look, ask which robot should go, send it, look again. Needs no ROS.

    embervlm serve --checkpoint CHECKPOINT &
    python examples/plan_with_a_port.py PICTURES_FOLDER [ADDRESS]

Each picture of the folder is a place that the mission comes to. A robot goes only where the model is sure enough of it;
otherwise a person is asked.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

from openai import OpenAI

TASK = "Take the load to the flag and inspect the site there. Which robots are suited?"
SURE = 0.8


def ask(client: OpenAI, picture: Path) -> tuple[list[str], float, str]:
    """Robots, how sure the model is of exactly these, and its reasons; no robot where it does not know."""
    data = base64.b64encode(picture.read_bytes()).decode()
    content = [
        {"type": "text", "text": TASK},
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}},
    ]
    reply = client.chat.completions.create(model="embervlm", messages=[{"role": "user", "content": content}])
    choice = reply.choices[0]
    if choice.message.content is None:
        return [], 0.0, choice.message.refusal
    return choice.answer_set, choice.confidence, choice.message.reasoning_content


def main(pictures: str, address: str = "http://127.0.0.1:8000") -> None:
    client = OpenAI(base_url=f"{address}/v1", api_key="none", timeout=30)
    free = {"Drone", "Underwater Robot", "Humanoid", "Robot with Wheels", "Robot with Legs"}
    for picture in sorted(Path(pictures).glob("*.jpg"))[:8]:
        robots, confidence, reasons = ask(client, picture)
        able = [robot for robot in robots if robot in free]
        if not able or confidence < SURE:
            said = ", ".join(robots) or "none"
            print(f"{picture.name}: a person decides (the model: {said}, {confidence:.0%})")
            print(f"  {reasons.rpartition(chr(10))[2]}")
            continue
        free.remove(able[0])  # here the robot would get its order, and come back free when it is done
        print(f"{picture.name}: {able[0]} goes ({confidence:.0%}); {len(free)} robots are free")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
