"""`embervlm export`: a checkpoint as a folder that the Auto classes of transformers open, in floats or in int8; or as
graphs for onnxruntime."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi

from embervlm import __version__, run_dir
from embervlm.config import ConfigError
from embervlm.model.config import STAGE3
from embervlm.model.embervlm import EmberVLM
from embervlm.model.int8 import holds_int8, to_int8
from embervlm.model.known import known_path
from embervlm.model.storage import resolve_folder, save_safetensors
from embervlm.report.model_card import model_card
from embervlm.run.export_onnx import RUNNER, write_onnx
from embervlm.run.import_checkpoint import refuse_existing, write_folder

HF, INT8, ONNX, ONNX_INT8 = "hf", "int8", "onnx", "onnx-int8"
FORMATS = (HF, INT8, ONNX, ONNX_INT8)


def export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type="path", metavar="CHECKPOINT", help="checkpoint folder or hub id")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default=HF,
        help="hf: as it is, for the Auto classes of transformers; int8: the same with weights of 8 bits, a quarter as "
        "large; onnx: graphs for onnxruntime and a program that asks them without torch; onnx-int8: these with weights "
        "of 8 bits (docs/quantization.md)",
    )
    parser.add_argument(
        "--push_to_hub",
        metavar="OWNER/NAME",
        help="upload the folder to this repository of the Hugging Face hub, with the token of `hf auth login` or "
        "HF_TOKEN",
    )
    parser.add_argument("--public", action="store_true", help="let everybody see a repository that is made for it")


def export(checkpoint: str, out: Path, format: str = HF, push_to_hub: str | None = None, public: bool = False) -> None:
    """Write `out`: the model (`config.json` and `model.safetensors`, or graphs), its tokenizer, how its confidence is
    calibrated and known questions are told, and a model card. Adapters are merged in every checkpoint, so they are
    here."""
    refuse_existing(out)
    if public and push_to_hub is None:
        raise ConfigError("--public: nothing is uploaded without --push_to_hub OWNER/NAME")
    if push_to_hub is not None:
        _create_repository(push_to_hub, public)  # a wrong name or token is known before anything is written
    folder = resolve_folder(checkpoint)
    model = EmberVLM.from_pretrained(folder)
    model.config.architectures = [type(model).__name__]
    if format in (INT8, ONNX_INT8):
        if holds_int8(model.state_dict()):
            raise ConfigError(f"{folder}: holds int8 weights already; export the checkpoint they were made from")
    if format == INT8:
        to_int8(model)

    def save(part: Path) -> None:
        (part / "README.md").write_text(_card(model, folder, out.name, format), encoding="utf-8")
        if format in (ONNX, ONNX_INT8):
            write_onnx(model, part, int8=format == ONNX_INT8)
            return
        model.config.save_pretrained(str(part))
        save_safetensors(model.state_dict(), part, with_reasoning=model.config.stage != STAGE3)
        model.tokenizer.save(part)
        for path_of in (run_dir.calibration_path, known_path):
            if (fitted := path_of(folder)).exists():
                path_of(part).parent.mkdir(exist_ok=True)
                shutil.copy(fitted, path_of(part))

    write_folder(save, out)
    if format in (ONNX, ONNX_INT8):
        print(f'{out}: written; `python {out / RUNNER} picture.jpg "question"` asks it, with numpy, onnxruntime,')
        print("tokenizers and Pillow alone: copy the folder to a board that has these")
    else:
        print(f"{out}: written; `from embervlm import EmberVLM` makes it known to the Auto classes and to")
        print(f'pipeline("image-text-to-text"), and EmberVLM.from_pretrained("{out}") opens it as well')
    if push_to_hub is not None:
        with _telling_what_the_hub_refused(push_to_hub):
            print(f"uploaded: {HfApi().upload_folder(repo_id=push_to_hub, folder_path=out).commit_url}")


def _create_repository(name: str, public: bool) -> None:
    with _telling_what_the_hub_refused(name):
        HfApi().create_repo(name, private=not public, exist_ok=True)


@contextmanager
def _telling_what_the_hub_refused(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the hub's client or of its HTTP library, which is another one by version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"--push_to_hub {name}: not uploaded ({reason}); the name is OWNER/NAME, and `hf auth login` stores a "
            "token that may write there"
        ) from error


def _card(model: EmberVLM, checkpoint: Path, name: str, format: str) -> str:
    """The model card, with what the checkpoint's own evaluations found: on the test split if there is one, else val."""
    found = [path for split in ("test", "val") if (path := run_dir.eval_path(checkpoint, split)).exists()]
    return model_card(
        name,
        config=model.config.to_dict(),
        parts=model.parameter_counts(),
        version=__version__,
        evaluations=[run_dir.read_object(path, "metrics", "intervals", "split", "num_samples") for path in found[:1]],
        refuses=model.known is not None,
        is_int8=format in (INT8, ONNX_INT8),
        runner=RUNNER if format in (ONNX, ONNX_INT8) else None,
    )
