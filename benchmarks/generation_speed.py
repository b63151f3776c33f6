"""Tokens per second of chains, beside `transformers`' own `generate` on the bare language model.

    python benchmarks/generation_speed.py [--models quickstart embervlm-39m] [--batch_sizes 1 32] [--json FILE]

Both write the same number of tokens behind the same number of positions (visual tokens and question), greedily, with
weights that were never trained and nothing that ends a text early. Ours also runs the reasoning head and follows the
chain's structure. Runs alternate, so that other work on the machine slows both; the ratio is the median over pairs of
neighbouring runs, of the time the process kept a processor busy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from embervlm.config_file import model_preset
from embervlm.data.tokenizer import ReasoningTokenizer, train_tokenizer
from embervlm.model.decoding import Decoding
from embervlm.model.embervlm import EmberVLM, build_model
from embervlm.model.writer import Writer


def build(preset: str) -> EmberVLM:
    torch.manual_seed(0)
    model = build_model(model_preset(preset), load_pretrained=False)
    head = model.reasoning_module.reasoning_head.output
    torch.nn.init.normal_(head.weight, std=0.02)  # an untrained one gives nothing, which could be skipped
    tokenizer = ReasoningTokenizer(train_tokenizer(["Which robot should go?"], 300))
    tokenizer.base_vocab_size = model.language_model.vocab_size  # every id may be written
    for number, name in enumerate(tokenizer.ids):
        tokenizer.ids[name] = model.language_model.vocab_size + number
    model.attach_tokenizer(tokenizer)
    return model.eval()


@torch.inference_mode()
def ours(model: EmberVLM, batch: int, prompt: int, new: int) -> None:
    visual = torch.randn(batch, model.num_visual_tokens, model.language_model.hidden_size)
    prompts = torch.randint(1, 250, (batch, prompt)).tolist()
    writer = Writer(model, visual, torch.ones(batch, dtype=torch.bool), prompts, Decoding(max_new_tokens=new))
    writer.end_ids = ()  # nothing ends a text
    writer.run()
    assert all(len(row.ids) == new for row in writer.everyone)


@torch.inference_mode()
def theirs(model: EmberVLM, batch: int, prompt: int, new: int) -> None:
    backbone = model.language_model.backbone
    ids = torch.randint(1, 250, (batch, model.num_visual_tokens + prompt))
    backbone.generation_config.eos_token_id = None
    out = backbone.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    assert out.shape[1] == ids.shape[1] + new


def timed(run: Callable[..., None], *args: Any) -> tuple[float, float]:
    """Seconds on the clock and of a processor."""
    clock, busy = time.perf_counter(), time.process_time()
    run(*args)
    return time.perf_counter() - clock, time.process_time() - busy


def compare(preset: str, batch: int, prompt: int, new: int, rounds: int) -> dict[str, Any]:
    model = build(preset)
    args = (model, batch, prompt, new)
    for run in (ours, theirs):
        run(model, batch, prompt, 4)
    pairs = [(timed(ours, *args), timed(theirs, *args)) for _ in range(rounds)]
    tokens = batch * new
    return {
        "model": preset,
        "batch": batch,
        "positions_before": model.num_visual_tokens + prompt,
        "new_tokens": new,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "tokens_per_s": tokens / min(own[0] for own, _ in pairs),
        "tokens_per_s_bare": tokens / min(other[0] for _, other in pairs),
        "speed_ratio": statistics.median(other[1] / own[1] for own, other in pairs),
        "speed_ratio_clock": statistics.median(other[0] / own[0] for own, other in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["quickstart", "embervlm-39m"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = []
    for preset in args.models:
        for batch in args.batch_sizes:
            found.append(compare(preset, batch, args.prompt_tokens, args.new_tokens, args.rounds))
            print(
                "{model}, batch {batch}: {tokens_per_s:.0f} tokens/s, bare language model {tokens_per_s_bare:.0f}; "
                "ratio {speed_ratio:.2f} of processor time, {speed_ratio_clock:.2f} on the clock".format(**found[-1]),
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
