"""A test bed whose judge is a simulator: what to do next in a one-room mission of BabyAI (`pip install minigrid`).

    python examples/babyai.py records OUT/records.jsonl --episodes 300
    python launch/train.py --stages 3 4 baseline --reasoning_data OUT/records.jsonl --output_dir OUT/run ...
    python examples/babyai.py episodes OUT/run --episodes 50

`records` lets the bot that comes with minigrid play, and writes what it sees and does: picture of the room, mission, a
chain made by rule, next action. `episodes` lets the trained model play rooms that no record shows, to the end of each
mission: with chains, and without. In phase 3 the simulator rewards answers (`nearer`). docs/babyai.md has the figures.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import embervlm
from embervlm.data.records import write_dataset
from embervlm.report.drawing import wilson
from embervlm.run_dir import COMPLETE, checkpoint_path, phase_dir

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
try:
    import gymnasium
    from minigrid.utils.baby_ai_bot import BabyAIBot
except ImportError:
    gymnasium = None

LEVELS = ("GoToRedBall", "GoToObj", "GoToLocal", "PickupDist")
"""Missions in one room, where one picture says what to do. PickupLoc is left out: its "the ball behind you" is said of
where the mission began."""
LOOKS = ("right", "down", "left", "up")
ACTIONS = ("turn left", "turn right", "go forward", "pick up")
"""By their numbers in the simulator. With "drop", the bot moves what is in its way; such episodes are left out."""
TILE, CELLS = 12, 6
"""Pixels a cell, and cells that a picture shows: 72 x 72 pixels. A room of 8 x 8 cells has so many inside its walls."""
TEST_SEED = 10_000_000
"""Rooms of test records and played episodes count from here, those of training and val from 0."""
BATCH = 64
"""Episodes that are played at a time."""
Ask = Callable[[Sequence[np.ndarray], Sequence[str]], Sequence[str]]
"""Pictures and missions -> what to do in each room."""


def room(level: str, seed: int) -> Any:
    env = gymnasium.make(f"BabyAI-{level}-v0").unwrapped
    with redirect_stdout(io.StringIO()):  # it tells of every room that it draws again
        env.reset(seed=seed)
    return env


def picture(env: Any) -> np.ndarray:
    """Columns and rows 1 to 6; nothing shows what the agent itself would see of them. A room of 7 x 7 cells has a wall
    on the right and below."""
    frame: np.ndarray = env.get_frame(highlight=False, tile_size=TILE)
    return frame[TILE : (CELLS + 1) * TILE, TILE : (CELLS + 1) * TILE]


def bot_for(env: Any) -> BabyAIBot:
    """The bot, which knows the whole room, as the picture shows it: what it does then depends on the picture alone."""
    bot = BabyAIBot(env)
    bot.vis_mask[:] = True
    return bot


# ---- records


def chain(env: Any, target: np.ndarray, first: np.ndarray, action: str) -> list[str]:
    """From the picture to the action by small steps: where I am, where it is, how far, what is in the way.

    Args:
        target, first: `[column, row]` of the thing, and of the first cell on the way to it.
    """
    column, row = map(int, env.agent_pos)
    looks = LOOKS[env.agent_dir]
    thing = env.grid.get(*target)
    name = f"the {thing.color} {thing.type}"
    across, along = int(target[0]) - column, int(target[1]) - row
    offset = target - np.array(env.agent_pos)
    ahead, right = int(offset @ env.dir_vec), int(offset @ env.right_vec)
    ways = {"ahead": env.dir_vec, "left": -env.right_vec, "right": env.right_vec, "behind": -env.dir_vec}
    beside = [f"{where}: {_cell(env, way)}" for where, way in ways.items() if where != "behind"]
    start = next(where for where, way in ways.items() if np.array_equal(way, first - np.array(env.agent_pos)))
    return [
        f"Step 1: I am in column {column}, row {row}, and look {looks}.",
        f"Step 2: {name.capitalize()} is in column {int(target[0])}, row {int(target[1])}.",
        f"Step 3: Next to me, {', '.join(beside)}.",
        f"Step 4: From me it is {_far(across, 'to the right', 'to the left')} and {_far(along, 'down', 'up')}.",
        f"Step 5: Looking {looks}, that is {_far(ahead, 'ahead', 'behind')} and {_far(right, 'right', 'left')}.",
        f"Step 6: The shortest free way starts {start}.",
        f"Conclusion: {action}.",
    ]


def known_of(env: Any, target: np.ndarray) -> dict[str, Any]:
    """What the simulator knows of the picture: each thing and where it is, in words and as boxes."""
    inside = range(1, env.width - 1)
    things = [(x, y, found) for y in inside for x in inside if (found := env.grid.get(x, y)) is not None]
    column, row = map(int, env.agent_pos)

    def box(kind: str, label: str, x: int, y: int) -> dict[str, Any]:
        return {"kind": kind, "label": label, "box": [(x - 1) / CELLS, (y - 1) / CELLS, x / CELLS, y / CELLS]}

    boxes = [box("agent", LOOKS[env.agent_dir], column, row), box("target", "target", *map(int, target))]
    for x, y, found in things:
        boxes += [box("color", found.color, x, y), box("type", found.type, x, y)]
    told = " ".join(f"{found.color} {found.type} in column {x}, row {y}." for x, y, found in things)
    me = f"I am in column {column}, row {row}, and look {LOOKS[env.agent_dir]}."
    return {
        "caption": f"{me} {told}",
        "boxes": boxes,
        "scene": {"agent": me, "color": told, "type": told},
        "seen": [["agent"], ["target"], ["agent"], [], [], ["agent"], []],
    }


def _far(cells: int, positive: str, negative: str) -> str:
    return f"{abs(cells)} {positive if cells >= 0 else negative}"


def _cell(env: Any, way: np.ndarray) -> str:
    found = env.grid.get(*(np.array(env.agent_pos) + way))
    if found is None:
        return "free"
    return "wall" if found.type == "wall" else f"{found.color} {found.type}"


def way_of(bot: BabyAIBot, env: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """`[column, row]` of where the bot goes (of several things that fit, the nearest) and of the first cell there; None
    where no free way leads there."""
    _, target = bot._find_obj_pos(env.instrs.desc)
    path, _, _ = bot._shortest_path(lambda cell, _: cell == target)
    return (np.array(target), np.array(path[0])) if path else None


@dataclass
class Moment:
    """One step of the bot."""

    frame: np.ndarray
    mission: str
    steps: list[str]
    action: str
    known: dict[str, Any]


def episode(level: str, seed: int) -> list[Moment] | None:
    """What the bot saw and did; None where it moved what was in its way."""
    env = room(level, seed)
    bot, action, out, over = bot_for(env), None, [], False
    while not over:
        action = bot.replan(action)
        if action >= len(ACTIONS) or (way := way_of(bot, env)) is None:
            return None
        target, first = way
        name = ACTIONS[action]
        out.append(Moment(picture(env), env.mission, chain(env, target, first, name), name, known_of(env, target)))
        over = any(env.step(action)[2:4])  # ended or truncated
    return None if "pick up" in {m.action for m in out[:-1]} else out


def records_of(folder: Path, levels: Sequence[str], episodes: int, per_episode: int) -> Iterator[dict[str, Any]]:
    """Test and val first: a picture that they show is left out of training."""
    shown: dict[str, str] = {}
    counts: Counter[str] = Counter()
    seeds = [("test", TEST_SEED + number) for number in range(max(1, episodes // 10))]
    seeds += sorted((("train", "val")[number % 10 == 9], number) for number in range(episodes))[::-1]
    for split, seed in seeds:
        for level in levels:
            moments = episode(level, seed)
            if moments is None:
                counts["episodes left out because the bot moves what is in its way"] += 1
                continue
            rng = random.Random(f"{level} {seed}")
            for number in sorted(rng.sample(range(len(moments)), min(per_episode, len(moments)))):
                moment = moments[number]
                digest = hashlib.blake2b(moment.frame.tobytes(), digest_size=12).hexdigest()
                if shown.setdefault(digest, split) != split:
                    counts["records left out because a record of another split shows the same picture"] += 1
                    continue
                if not (file := folder / f"{digest}.png").exists():
                    Image.fromarray(moment.frame).save(file)
                counts[f"{split} records"] += 1
                yield {
                    "id": f"{level}-{seed}-{number}",
                    "image": f"{folder.name}/{file.name}",
                    "instruction": moment.mission,
                    "reasoning": "\n".join(moment.steps),
                    "answer": moment.action,
                    "metadata": {"split": split, "split_group": f"{level}-{seed}", **moment.known},
                }
    print(", ".join(f"{count} {name}" for name, count in counts.items()))


def make_records(output_file: Path, levels: Sequence[str], episodes: int, per_episode: int) -> None:
    folder = output_file.with_name(f"{output_file.stem}-pictures")
    folder.mkdir(parents=True, exist_ok=True)
    write_dataset(output_file, records_of(folder, levels, episodes, per_episode))
    print(f"{output_file}: written")


# ---- the simulator's reward


def nearer(records: Sequence[Mapping[str, Any]], chains: Sequence[Mapping[str, Any]]) -> list[float]:
    """A reward for phase 3: 1 where the answer is an action that brings the mission nearer to its end."""
    return [float(chain["answer"] in good_actions(record["id"])) for record, chain in zip(records, chains)]


@lru_cache(maxsize=1 << 14)
def good_actions(record_id: str) -> frozenset[str]:
    """The actions in the moment of a record after which the bot needs fewer steps than before them."""
    level, seed, number = record_id.rsplit("-", 2)
    env, action = room(level, int(seed)), None
    bot = bot_for(env)
    for _ in range(int(number)):
        env.step(action := bot.replan(action))
    now = steps_left(env)
    return frozenset(name for name in ACTIONS if steps_left(env, ACTIONS.index(name)) < now)


def steps_left(env: Any, first: int | None = None) -> float:
    """Steps that the bot needs to fulfil the mission, behind the action `first`; infinite where it cannot any more."""
    env = copy.deepcopy(env)
    ended, reward, action, steps = False, 0.0, None, 0
    if first is not None:
        _, reward, ended, _, _ = env.step(first)
        if not ended and env.carrying is not None:  # the wrong thing, and the bot does not know what to do then
            return math.inf
    bot, most = bot_for(env), env.max_steps
    while not ended and steps < most:
        action, steps = bot.replan(action), steps + 1
        _, reward, ended, _, _ = env.step(action)
    return steps if ended and reward > 0 else math.inf


# ---- episodes


def play(ask: Ask, level: str, seeds: Sequence[int]) -> list[bool]:
    """Whether each mission was fulfilled. An episode ends without success at the simulator's limit of steps, at an
    answer that is no action, and where a room looks as it did before: an answer depends on the picture alone."""
    rooms = [room(level, seed) for seed in seeds]
    success = dict.fromkeys(range(len(rooms)), False)
    seen: list[set[bytes]] = [set() for _ in rooms]
    playing = list(success)
    while playing:
        frames = [picture(rooms[place]) for place in playing]
        answers = ask(frames, [rooms[place].mission for place in playing])
        still = []
        for place, frame, answer in zip(playing, frames, answers):
            if answer not in ACTIONS or frame.tobytes() in seen[place]:
                continue
            seen[place].add(frame.tobytes())
            _, reward, ended, truncated, _ = rooms[place].step(ACTIONS.index(answer))
            success[place] = bool(ended and reward > 0)
            if not (ended or truncated):
                still.append(place)
        playing = still
    return list(success.values())


def asking(checkpoint: Path, form: str) -> Ask:
    model = embervlm.EmberVLM.from_pretrained(checkpoint, device_map="auto")

    def ask(frames: Sequence[np.ndarray], missions: Sequence[str]) -> list[str]:
        results = model.generate_with_reasoning(list(frames), list(missions), form=form, min_known=0)  # always act
        return [result["answer"] or "" for result in results]

    return ask


def by_chance(frames: Sequence[np.ndarray], _: Sequence[str]) -> list[str]:
    return [random.Random(frame.tobytes()).choice(ACTIONS) for frame in frames]


def players(run: Path) -> dict[str, Ask]:
    """Those that `run` has trained, beside chance."""
    asked = {
        "with chains": (checkpoint_path(phase_dir(run, 2), None), "reasoning"),
        "with chains, after phase 3": (checkpoint_path(phase_dir(run, 3), None), "reasoning"),
        "the same model, asked without a chain": (checkpoint_path(phase_dir(run, 2), None), "direct"),
        "direct, trained on as many samples": (checkpoint_path(run / "baseline" / "same_samples", None), "direct"),
        "direct, trained for the same time": (checkpoint_path(run / "baseline" / "same_time", None), "direct"),
    }
    found: dict[str, Ask] = {"chance": by_chance}
    for name, (checkpoint, form) in asked.items():
        if (checkpoint / COMPLETE).exists():
            found[name] = asking(checkpoint, form)
        else:
            print(f"{name}: not trained ({checkpoint} is missing)")
    return found


def play_episodes(run: Path, levels: Sequence[str], episodes: int) -> None:
    """Success rates with 95% intervals (Wilson)."""
    for name, ask in players(run).items():
        began, all_won, told = time.monotonic(), [], []
        for level in levels:
            won = []
            for first in range(0, episodes, BATCH):
                won += play(ask, level, range(TEST_SEED + first, TEST_SEED + min(first + BATCH, episodes)))
            told.append(f"{level} {np.mean(won):.3f}")
            all_won += won
        low, high = wilson(float(np.mean(all_won)), len(all_won))
        print(f"{name}: {np.mean(all_won):.3f} [{low:.3f}, {high:.3f}] of {len(all_won)} missions", end="")
        print(f" ({', '.join(told)}; {time.monotonic() - began:.0f} s)", flush=True)


def main(*arguments: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, path, number, text in (
        ("records", "output_file", 300, "episodes of each level that the bot plays, and a tenth as many for test"),
        ("episodes", "run", 50, "episodes of each level"),
    ):
        command = commands.add_parser(name)
        command.add_argument(path, type=Path)
        command.add_argument("--episodes", type=int, default=number, help=f"{text} ({number})")
        command.add_argument("--levels", nargs="+", choices=LEVELS, default=LEVELS)
    commands.choices["records"].add_argument(
        "--per_episode", type=int, default=3, help="at most this many records of an episode, drawn at random (3)"
    )
    args = vars(parser.parse_args(arguments or None))
    if gymnasium is None:
        sys.exit("this example needs BabyAI: pip install minigrid")
    make_records(**args) if args.pop("command") == "records" else play_episodes(**args)


if __name__ == "__main__":
    main()
