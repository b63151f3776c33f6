"""Several processes prepare their data: the first does the work, the others wait for it, an error reaches all."""

from functools import partial

import torch
import torch.multiprocessing
from torch import distributed

from embervlm.data.records import DataError
from embervlm.data.store import prepare
from embervlm.errors import UserError
from embervlm.robots.domain import ROBOTS
from embervlm.run.run_data import first_on_rank_0
from embervlm.world import World

GOOD = '{"instruction": "Which robot flies?", "reasoning": "Step 1: Only the drone has rotors.", "answer": "Drone"}\n'


def prepare_on(rank, folder):
    """What process `rank` of three sees, in the file of its name."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    world = World(rank=rank, size=3, device=torch.device("cpu"))
    seen = []
    for name in ("good", "bad"):
        try:
            path, cache = folder / f"{name}.jsonl", folder / f"cache-{name}"
            store = first_on_rank_0(world, partial(prepare, path, cache, candidates=ROBOTS.candidates))
            seen.append(f"{len(store)} {(store.folder / 'store.json').stat().st_ino}")
        except DataError as error:
            seen.append(str(error))
    (folder / str(rank)).write_text("\n".join(seen))
    try:
        path = folder / ("gone.jsonl" if rank == 2 else "good.jsonl")
        first_on_rank_0(world, partial(prepare, path, folder / f"cache-{rank}"))
    except UserError as error:
        (folder / "alone").write_text(f"{error.is_of_one_process} {error}")
    distributed.destroy_process_group()


def test_the_first_process_prepares_the_others_open_it_and_errors_are_said_by_who_has_to(tmp_path):
    (tmp_path / "good.jsonl").write_text(GOOD * 300)
    (tmp_path / "bad.jsonl").write_text(GOOD + GOOD.replace("Drone", "Boat"))
    torch.multiprocessing.spawn(prepare_on, (tmp_path,), nprocs=3)
    first, *others = ((tmp_path / str(rank)).read_text() for rank in range(3))
    assert others == [first, first] and first.startswith("300 ") and 'record 2: answer "Boat" is not one of' in first
    alone = (tmp_path / "alone").read_text()  # what one node does not see is said by that process, and not by the first
    assert alone.startswith("True only process 2 on ") and "gone.jsonl" in alone
