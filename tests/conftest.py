"""What many tests share: a small generated data set and a model that is tiny, but has every part.

Nothing heavy is imported before a fixture is asked for, so that tests of light modules stay light.
"""

from __future__ import annotations

import os
import signal

import hypothesis
import pytest

from embervlm.robots.rules import ROBOT_ORDER as ROBOTS

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import of the hub client: no test goes to the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads cost a tiny model more than they give
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup: what a test starts would ignore it too
    signal.signal(signal.SIGHUP, lambda *_: None)  # a handler is undone in what is started

hypothesis.settings.register_profile("shared machine", deadline=None)  # others slow a test down at any moment
hypothesis.settings.load_profile("shared machine")

VOCAB_SIZE = 600
LONGEST_FIRST = (
    "test_slurm_scenarios.py",
    "test_engine.py",
    "test_whole_run.py",
    "test_train_cli.py",
    "test_resume.py",
    "test_guide_snippets.py",
    "test_quickstart.py",
)
"""Files that take the longest: `make test` hands files out in this order, so that none is still running at the end."""


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def scene_data(tmp_path_factory):
    """A folder with `reasoning_data.json`: 48 records, three about each of 16 pictures; no split is empty."""
    from embervlm.robots.generate import generate_scenes

    folder = tmp_path_factory.mktemp("scenes")
    generate_scenes(
        folder / "reasoning_data.json", num_samples=48, questions_per_picture=3, seed=11, workers=1, progress=False
    )
    return folder


@pytest.fixture(scope="session")
def records(scene_data):
    from embervlm.data.records import read_records

    return read_records(scene_data / "reasoning_data.json", candidates=ROBOTS)


@pytest.fixture(scope="session")
def tiny_settings():
    """Settings of an `EmberVLMConfig` with about 0.1 million parameters and nine visual tokens."""

    return {
        "vision": {
            "config": {
                "model_type": "vit",
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "image_size": 36,
                "patch_size": 12,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            }
        },
        "language": {
            "config": {
                "model_type": "llama",
                "vocab_size": VOCAB_SIZE,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 1024,
                "tie_word_embeddings": True,
            }
        },
        "image_size": 36,
        "projection_hidden_size": 48,
        "reasoning_width": 32,
        "reasoning_ffn": 48,
        "reasoning_heads": 2,
        "validator_width": 16,
        "validator_ffn": 32,
        "validator_heads": 2,
        "candidates": list(ROBOTS),
    }


@pytest.fixture(scope="session")
def tokenizer(records):
    """The Stage 4 tokenizer, trained on the texts of the records. Nothing changes it, so tests share it."""
    from embervlm.data.tokenizer import ReasoningTokenizer, train_tokenizer
    from embervlm.words.chain_text import format_reasoning

    texts = [text for r in records for text in (r.instruction, format_reasoning(r.steps), " " + ", ".join(r.answer))]
    return ReasoningTokenizer(train_tokenizer(texts, VOCAB_SIZE))


@pytest.fixture
def tiny_model(tiny_settings, tokenizer):
    """A new model with the same weights in every test, in eval mode."""
    return make_tiny(tiny_settings, tokenizer)


def make_tiny(settings, tokenizer):
    import torch

    from embervlm.model.embervlm import build_model

    torch.manual_seed(0)
    model = build_model(settings)
    model.attach_tokenizer(tokenizer)
    return model.eval()


@pytest.fixture
def lively_model(tiny_model):
    """The tiny model with every part switched on, as after some training: no part's output is zero."""
    return enliven(tiny_model)


def enliven(model):
    import torch

    torch.manual_seed(1)
    head = model.reasoning_module.reasoning_head
    torch.nn.init.normal_(head.output.weight, std=2.0)
    torch.nn.init.normal_(head.token_embedding.weight, std=0.05)
    torch.nn.init.normal_(head.nothing_seen, std=0.5)
    for block in model.language_model.backbone.base_model.layers:
        for weight in block.parameters():
            weight.data.mul_(4)
    return model


@pytest.fixture(scope="session")
def tiny_model_yaml(tiny_settings, tmp_path_factory):
    """Those settings as a file, for `--model`."""
    import yaml

    settings = {key: value for key, value in tiny_settings.items() if key != "candidates"}
    path = tmp_path_factory.mktemp("model") / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pictures(records):
    """The records' pictures at the tiny model's size."""
    from embervlm.data.images import PictureCache

    return PictureCache([record.image for record in records], 36)


@pytest.fixture(scope="session")
def samples(records, tokenizer):
    """The records as reasoning samples for the tiny model's 3 x 3 grid."""
    from embervlm.data.dataset import encode_reasoning
    from embervlm.data.samples import Grid

    return encode_reasoning(records, tokenizer, grid=Grid(3, 3), max_length=512)


@pytest.fixture(scope="session")
def make_collator(records, tokenizer, pictures):
    """`make_collator(**options)`: a collator over the records as a run builds it."""
    from embervlm.data.collate import Collator

    def make(own_records=None, **options):
        options = {"seed": 0, "image_size": 36, **options}
        return Collator(own_records or records, tokenizer, pictures, **options)

    return make
