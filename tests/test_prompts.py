"""Tokenizers of pretrained language models: BOS, spaces as SentencePiece puts them, and chat templates."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from embervlm.config import ConfigError
from embervlm.data.dataset import encode_captions, encode_direct, encode_reasoning
from embervlm.data.records import ReasoningRecord
from embervlm.data.samples import Grid
from embervlm.data.tokenizer import DIRECT_PROMPT, FIRST_FORMAT, TEXT_FORMAT, ReasoningTokenizer
from embervlm.model.embervlm import EmberVLM, build_model
from embervlm.model.writer import Writer

TEXTS = ["Which robot flies over the wet cliff?", "It is wet, so the drone flies.", "user assistant Answer Drone"] * 3
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}{{ m['role'] | capitalize }}:{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %} {{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}Assistant:"
)
CHAT_TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def pretrained(kind="llama", template=None):
    """A small tokenizer as Llama's (SentencePiece, with BOS), T5's (Metaspace) or GPT-2's (bytes) are built."""
    found = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True) if kind == "llama" else models.BPE())
    if kind == "llama":
        found.pre_tokenizer = pre_tokenizers.Metaspace()  # to train with: no token reaches over a space
        found.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    elif kind == "metaspace":
        found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", *CHAT_TOKENS], initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(TEXTS, trainer)
    if kind == "llama":
        found.pre_tokenizer = None
        found.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        found.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    out = PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>")
    out.chat_template = template
    return out


def words(kind="llama", template=None, text_format=TEXT_FORMAT):
    out = ReasoningTokenizer(pretrained(kind, template))
    out.use(text_format, out.chat_prompt())
    return out


def record(instruction="Which robot flies?"):
    steps = ("It is wet.", "Conclusion: the drone flies.")
    return ReasoningRecord(record_id="r", image=None, instruction=instruction, steps=steps, answer=("Drone",))


@pytest.mark.parametrize("kind", ["llama", "metaspace", "bytes"])
def test_a_word_is_the_same_token_at_a_steps_start_as_within(kind):
    tokenizer = words(kind)
    whole = tokenizer.encode("It is wet, so the drone flies.")
    start = tokenizer.encode("It is wet, so")
    assert whole[: len(start)] == start
    assert tokenizer.following(["the drone flies."]) == [whole[len(start) :]]
    (sample,) = encode_reasoning([record()], tokenizer, Grid(1, 1), 512)
    steps = [[*sample.prompt, *sample.target][first:last] for first, last in sample.step_spans]
    assert steps == tokenizer.following(["It is wet.", "the drone flies."])
    assert tokenizer.parse_generated(sample.target) == (list(record().steps), "Drone")


def test_older_models_keep_the_doubled_space_and_no_bos():
    old, new = words(text_format=FIRST_FORMAT), words()
    assert old.prompts(["wet"]) == [old.encode("wet")]
    assert old.following(["wet"]) == [old.encode(" wet")] != new.following(["wet"])
    assert new.prompts(["wet"]) == [[1, *new.encode("wet")]] == [pretrained()("wet")["input_ids"]]
    assert old.digest() == ReasoningTokenizer(pretrained()).digest() != new.digest()
    ours = words("bytes")
    assert ours.digest() == ReasoningTokenizer(pretrained("bytes")).digest()  # nothing changes for one without either


@pytest.mark.parametrize("kind", ["llama", "bytes"])
@pytest.mark.parametrize("template", [CHATML, PARTS])
def test_a_question_stands_in_the_chat_template_as_transformers_puts_it(kind, template):
    base, tokenizer = pretrained(kind, template), words(kind, template)
    for question in ("Which robot flies?", "  over the cliff? "):
        content = question if template == CHATML else [{"type": "text", "text": question}]
        wanted = base.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        assert tokenizer.prompts([question]) == [wanted["input_ids"]]
    (reasoning,) = encode_reasoning([record()], tokenizer, Grid(1, 1), 512)
    (direct,) = encode_direct([record()], tokenizer)
    assert [reasoning.prompt] == tokenizer.prompts(["Which robot flies?"])
    assert [direct.prompt] == tokenizer.prompts(["Which robot flies?" + DIRECT_PROMPT])
    assert len(encode_captions([record()], tokenizer)) == 0


def test_a_special_token_in_a_question_stays_text_in_the_template():
    tokenizer = words("bytes", CHATML)
    ids = tokenizer.prompts(["wet<|im_end|><|step|>"])[0]
    end, step = tokenizer.hugging_face.convert_tokens_to_ids(["<|im_end|>", "<|step|>"])
    assert ids.count(end) == 1 and step not in ids
    assert "wet<|im_end|><|step|>" in tokenizer.decode(ids)


def test_a_template_that_takes_no_question_is_told():
    tokenizer = ReasoningTokenizer(pretrained(template="{{ raise_exception('only tools') }}"))
    with pytest.raises(ConfigError, match=r"no prompt of a user's question \(only tools\); set chat_template: false"):
        tokenizer.chat_prompt()


def test_training_generation_and_a_loaded_checkpoint_use_the_same_prompt(tiny_settings, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        Writer,
        "__init__",
        lambda self, model, visual, mask, prompts, *settings, start=Writer.__init__: (
            asked.append(prompts),
            start(self, model, visual, mask, prompts, *settings),
        )[1],
    )
    model = build_model(tiny_settings).eval()
    model.adopt_tokenizer(ReasoningTokenizer(pretrained("llama", CHATML)))
    model.save_pretrained(tmp_path / "new")
    assert json.loads(Path(tmp_path, "new", "config.json").read_text())["prompt"] == [
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ]
    for found in (model, EmberVLM.from_pretrained(tmp_path / "new")):
        found.generate_with_reasoning(None, "Which robot flies?", max_new_tokens=2)
        (sample,) = encode_reasoning([record()], found.tokenizer, found.grid, 512)
        start = found.tokenizer.ids["<|reasoning_start|>"]
        assert (
            asked.pop()
            == [[*sample.prompt, start]]
            == [[*words(template=CHATML).prompts(["Which robot flies?"])[0], start]]
        )


def test_the_template_can_be_left_out_and_older_checkpoints_stay_as_they_were(tiny_settings, tmp_path):
    model = build_model({**tiny_settings, "chat_template": False})
    model.adopt_tokenizer(ReasoningTokenizer(pretrained("llama", CHATML)))
    assert model.tokenizer.prompts(["wet"]) == [[1, *model.tokenizer.encode("wet")]]
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({key: value for key, value in values.items() if key not in ("text_format", "prompt")}))
    old = EmberVLM.from_pretrained(tmp_path).tokenizer
    assert old.prompts(["wet"]) == [old.encode("wet")]
    assert old.following(["wet"]) == [old.encode(" wet")]
