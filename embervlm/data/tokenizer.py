"""Text <-> token ids, with the structure tokens of Stage 4 set by position, never by text.

A user's instruction that contains `<|reasoning_end|>` is text like any other: special tokens are only ever put in by
this module.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from embervlm.config import ConfigError
from embervlm.data.facts import fact_domains
from embervlm.data.records import ReasoningRecord
from embervlm.errors import UserError
from embervlm.paths import closest_path, names_a_path
from embervlm.run_dir import read_object
from embervlm.words.chain_text import format_reasoning

SPECIAL_TOKENS = (
    "<|reasoning_start|>",
    "<|reasoning_end|>",
    "<|step|>",
    "<|conclusion|>",
    "<|answer_start|>",
    "<|answer_end|>",
)
"""Tokens that Stage 4 adds; their ids follow the base vocabulary in this order."""

FIRST_FORMAT, TEXT_FORMAT = 1, 2
"""`text_format` of older models, and of new ones."""
CONCLUSION = "Conclusion: "
DIRECT_PROMPT = "\nAnswer:"
END_OF_TEXT = "<|endoftext|>"
_QUESTION = "QUESTION"
MAX_TOKEN_CHARACTERS = 19
MAX_TOKENIZER_RECORDS = 20_000
"""Records, evenly spaced, that a tokenizer of our own is trained on: its memory grows with the text."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, atoms: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `texts` with at most `vocab_size` tokens; any text can be encoded with it.

    Merges may cross spaces, but not punctuation (SuperBPE; Liu et al. 2025): set phrases such as robot names become
    one token, which shortens a chain by a third. `atoms` (the values that facts can take, the answers) never merge with
    their neighbours: a value is then the same token wherever it stands, and repeating it is copying a token.
    """
    tokenizer = Tokenizer(models.BPE())
    whole = "|".join(re.escape(atom) for atom in sorted(set(atoms), key=lambda atom: (-len(atom), atom)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *([pre_tokenizers.Split(Regex(rf" ?\b(?:{whole})\b"), "isolated")] if whole else []),
            pre_tokenizers.Split(Regex(r"[.,:;?!\n]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        max_token_length=MAX_TOKEN_CHARACTERS,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def tokenizer_of(
    records: Sequence[ReasoningRecord], vocab_size: int, glossary: Sequence[str] = ()
) -> ReasoningTokenizer:
    """One of our own for `records` and the texts of `glossary`: a run trains it where its language model has none."""
    some = list(records[:: -(-len(records) // MAX_TOKENIZER_RECORDS)])
    texts = [
        text
        for record in some
        for text in (record.instruction, format_reasoning(record.steps), " " + ", ".join(record.answer))
    ]
    texts += [" " + record.metadata["caption"] for record in some if record.metadata.get("caption")]
    atoms = {value for values in fact_domains(records).values() for value in values}
    atoms |= {name for record in some for name in record.default_candidates}
    return ReasoningTokenizer(train_tokenizer([*texts, *(list(glossary) * 5)], vocab_size, atoms))


class ReasoningTokenizer:
    """A Hugging Face tokenizer and the ids of the Stage 4 tokens behind it.

    Attributes:
        base_vocab_size: Number of the base tokenizer's tokens; Stage 4's ids follow.
        ids: Special token -> id.
    """

    def __init__(self, base: PreTrainedTokenizerFast) -> None:
        known = [token for token in SPECIAL_TOKENS if token in base.get_added_vocab()]
        if 0 < len(known) < len(SPECIAL_TOKENS):  # another model's tokens of the same names
            base, known = _renamed(base, known), []
        self.base_vocab_size = len(base) - len(known)
        self.hugging_face = base
        if not known:
            base.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
        self.ids = {token: self.base_vocab_size + index for index, token in enumerate(SPECIAL_TOKENS)}
        if [base.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] != list(self.ids.values()):
            raise ConfigError(f"tokenizer: the Stage 4 tokens {SPECIAL_TOKENS} are not at its end in this order")
        self._backend = _without_limits(base)
        self._backend.encode_special_tokens = True  # text never becomes a special token
        eos = base.eos_token_id
        self.end_of_text: int = eos if eos is not None else self.ids["<|answer_end|>"]
        self.use(FIRST_FORMAT, None)

    def use(self, text_format: int, prompt: Sequence[str] | None) -> None:
        """Encode as a model does whose configuration has these; see `EmberVLMConfig`."""
        self._prompt = (prompt[0], prompt[1]) if prompt else None
        self._bos, self._space = list[int](), " "
        if self._prompt is not None:
            self._templated = _without_limits(self.hugging_face)
            self._added = tuple(self.hugging_face.get_added_vocab())
        if text_format == FIRST_FORMAT:
            return
        both, first = self.encode("a b"), self.encode("a")
        behind = both[len(first) :]
        if behind != self.encode(" b") and behind == self.encode("b"):
            self._space = ""  # like SentencePiece, it puts one there itself
        whole = self._backend.encode("a").ids
        self._bos = whole[: whole.index(first[0])] if first and first[0] in whole else []

    def __len__(self) -> int:
        return self.base_vocab_size + len(SPECIAL_TOKENS)

    @classmethod
    def from_folder(cls, path: str | Path) -> ReasoningTokenizer:
        if names_a_path(path) and not Path(path).exists():
            raise ConfigError(f"{path}: no such tokenizer folder{closest_path(path)}")
        try:
            found = AutoTokenizer.from_pretrained(str(path))
            file = Path(path) / "chat_template.json"  # where processors of transformers 4 kept it
            if not found.chat_template and file.is_file():
                found.chat_template = read_object(file, "chat_template")["chat_template"]
            return cls(found)
        except UserError:
            raise
        except Exception as error:  # of damage in tokenizer.json the library raises bare Exceptions
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"{path}: contains no readable tokenizer ({reason})") from error

    def check_rows(self, num_rows: int) -> None:
        """ConfigError where a language model that embeds `num_rows` tokens has none for some of these."""
        if self.base_vocab_size > num_rows:
            raise ConfigError(
                f"the tokenizer has {self.base_vocab_size} tokens, but the language model embeds only {num_rows}; "
                "use the tokenizer that belongs to this language model"
            )

    def save(self, path: str | Path) -> None:
        self.hugging_face.save_pretrained(str(path))

    def spelled(self) -> str:
        """The text of a `tokenizer.json` that encodes as this one does, for readers without transformers."""
        return str(self._backend.to_str())

    def settings(self) -> dict[str, Any]:
        """What such a reader has to know beside it: the ids of the Stage 4 tokens, and how a question is put."""
        return {
            "ids": self.ids,
            "base_vocab_size": self.base_vocab_size,
            "end_of_text": self.end_of_text,
            "bos": self._bos,
            "prompt": self._prompt,
            "added_tokens": list(self.hugging_face.get_added_vocab()),
        }

    def digest(self) -> str:
        """Changes with anything that changes how text is encoded."""
        own = [self._bos, self._space, self._prompt] if self._bos or not self._space or self._prompt else ""
        return hashlib.blake2b(f"{self._backend.to_str()}{own}".encode(), digest_size=12).hexdigest()

    def chat_prompt(self) -> tuple[str, str] | None:
        """Text before and behind a user's question, by the tokenizer's chat template; None where it has none.

        Raises:
            ConfigError: the template does not take a single question of a user.
        """
        if not self.hugging_face.chat_template:
            return None
        reason = "the question is not in what it gives"
        for content in (_QUESTION, [{"type": "text", "text": _QUESTION}]):
            try:
                text = self.hugging_face.apply_chat_template(
                    [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
                )
            except Exception as error:  # templates are programs, and raise what they like
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                continue
            if text.count(_QUESTION) == 1:
                before, _, behind = text.partition(_QUESTION)
                return before, behind
        raise ConfigError(
            f"tokenizer: its chat template makes no prompt of a user's question ({reason}); set chat_template: false"
        )

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        if len(texts) < 64:  # waking the threads of `encode_batch` would take longer than the work
            return [self.encode(text) for text in texts]
        return [found.ids for found in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def following(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts that stand behind others: with a space in front, so that a word is the same token at the
        start of a step as within it."""
        return self.encode_many([self._space + text for text in texts])

    def prompts(self, questions: Sequence[str]) -> list[list[int]]:
        """The ids of everything that stands between the picture and what the model writes.

        A question alone, behind BOS where the tokenizer puts one in front of a text; or in its chat template, whose
        special tokens count while those in a question stay text.
        """
        if self._prompt is None:
            return [[*self._bos, *ids] for ids in self.encode_many(questions)]
        before, behind = self._prompt
        out = []
        for question in questions:
            if any(token in question for token in self._added):
                ids = [*self._with_special(before), *self.encode(question), *self._with_special(behind)]
            else:
                ids = self._with_special(before + question + behind)
            out.append(ids)
        return out

    def _with_special(self, text: str) -> list[int]:
        return self._templated.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; Stage 4 tokens are left out."""
        return self._backend.decode([token for token in ids if token < self.base_vocab_size])

    def chain_ids(self, steps: Sequence[Sequence[int]], conclusion: Sequence[int] | None) -> list[int]:
        """`steps` (already encoded) with the tokens that mark them, from reasoning start to reasoning end."""
        out = [self.ids["<|reasoning_start|>"]]
        for step in steps:
            out += [self.ids["<|step|>"], *step]
        if conclusion is not None:
            out += [self.ids["<|conclusion|>"], *conclusion]
        return [*out, self.ids["<|reasoning_end|>"]]

    def step_ids(self, steps: Sequence[str]) -> list[list[int]]:
        """Each step's ids, with the token that marks it as a step or as the conclusion."""
        marks = [self.ids["<|conclusion|>" if step.startswith(CONCLUSION) else "<|step|>"] for step in steps]
        texts = self.following([step.removeprefix(CONCLUSION) for step in steps])
        return [[mark, *text] for mark, text in zip(marks, texts)]

    def parse_generated(self, ids: Sequence[int]) -> tuple[list[str], str | None]:
        """Steps (the conclusion last, as 'Conclusion: ...') and answer text of generated ids; never fails."""
        steps: list[str] = []
        answer: list[int] | None = None
        part: list[int] | None = None
        marker = ""
        names = {token_id: token for token, token_id in self.ids.items()}

        def close() -> None:
            if part is not None and (text := self.decode(part).strip()):
                steps.append(CONCLUSION + text if marker == "<|conclusion|>" else text)

        for token in ids:
            name = names.get(token)
            if name in ("<|step|>", "<|conclusion|>"):
                close()
                part, marker = [], name
            elif name in ("<|reasoning_end|>", "<|answer_start|>"):
                close()
                part = None
                answer = [] if name == "<|answer_start|>" else answer
            elif name == "<|answer_end|>" or token == self.end_of_text:
                break
            elif answer is not None:
                answer.append(token)
            elif part is not None:
                part.append(token)
        close()
        return steps, None if answer is None else self.decode(answer).strip()


def _without_limits(base: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of what encodes, without padding and truncation."""
    backend = getattr(base, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError("tokenizer: needs a fast tokenizer (a folder with tokenizer.json)")
    out = Tokenizer.from_str(backend.to_str())
    out.no_padding()
    out.no_truncation()
    return out


def _renamed(base: PreTrainedTokenizerFast, tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """`base` with the same ids, and with `tokens` under other names."""
    spelled = json.loads(base.backend_tokenizer.to_str())
    for token in spelled["added_tokens"]:
        if token["content"] in tokens:
            token["content"] = f"{token['content'][:-2]}_of_before|>"
    kept = {name: value for name, value in base.special_tokens_map.items() if isinstance(value, str)}
    out = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spelled)), **kept)
    out.chat_template = base.chat_template
    return out
