"""Whether an imported Stage 3 checkpoint of euhidaman/EmberVLM computes what its own code does, with random weights.

    git clone https://github.com/euhidaman/EmberVLM origin
    python benchmarks/origin_parity.py origin

Its code runs in a process of its own, because its package has the name of ours. Both need timm, and that torchvision.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

THEIRS = """
import sys
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from embervlm.models import EmberVLM, EmberVLMConfig

out = sys.argv[1]
torch.manual_seed(0)
GPT2LMHeadModel(GPT2Config(n_embd=384, n_layer=6, n_head=6)).save_pretrained(out + "/language")
model = EmberVLM(EmberVLMConfig(vision_pretrained=False, pretrained_language_model=out + "/language")).eval()
model.language_model.resize_token_embeddings(50262)
for name, buffer in model.named_buffers():
    if name.endswith("running_mean"):
        buffer.normal_()
model.save_pretrained(out + "/checkpoint")
model = model.float()
pictures, ids = torch.randn(2, 3, 224, 224), torch.randint(50262, (2, 12))
with torch.no_grad():
    with_picture = model(input_ids=ids, pixel_values=pictures, attention_mask=torch.ones_like(ids))["logits"]
    without = model(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
torch.save({"pictures": pictures, "ids": ids, "with": with_picture[:, -12:], "without": without}, out + "/logits.pt")
"""


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="a clone of euhidaman/EmberVLM")
    clone = parser.parse_args().clone.resolve()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(clone)}
        subprocess.run([sys.executable, "-c", THEIRS, folder], check=True, env=environment, cwd=folder)
        compare(Path(folder))


def compare(folder: Path) -> None:
    from embervlm.model.importing import import_folder
    from embervlm.run.import_checkpoint import reasoning_sizes

    theirs = torch.load(folder / "logits.pt")
    found = import_folder(folder / "checkpoint", reasoning_sizes())
    model = found.model.eval()
    words = model.language_model.embed(theirs["ids"])
    visual = model.projection(model.vision_encoder(theirs["pictures"]))
    for name, embeds in (("with", torch.cat([visual, words], dim=1)), ("without", words)):
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        states = model.language_model(embeds, mask, mask.cumsum(1) - 1)[:, -words.shape[1] :]
        ours = model.language_model.logits(states)
        difference = (ours - theirs[name]).abs().max()
        spread = float(theirs[name].std())
        print(f"{name} a picture: {ours.numel():,} logits (deviation {spread:.2f}) differ by at most {difference:.1e}")
        if not difference <= 1e-4 * spread:
            sys.exit(1)
    print(f"the picture changes them by up to {float((theirs['with'] - theirs['without']).abs().max()):.2f}")
    print(f"taken: { {part: len(pairs) for part, pairs in found.taken.items()} }, dropped: {len(found.dropped)}")


if __name__ == "__main__":
    main()
