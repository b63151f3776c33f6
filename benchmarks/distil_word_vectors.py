"""Make `embervlm/words/word_vectors.npz` from a sentence encoder: one small vector for each common English word.

    python benchmarks/distil_word_vectors.py --model FOLDER_OR_ID

Each whole word of the encoder's vocabulary is encoded by itself, the mean is taken off, and the 64 directions with the
most variance are kept as int8 (the way of Model2Vec). The shipped file was made from sentence-transformers/
all-MiniLM-L6-v2 (Apache-2.0). A WordPiece vocabulary is in order of frequency, and so are the words of the file.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

OUTPUT = Path(__file__).resolve().parent.parent / "embervlm" / "words" / "word_vectors.npz"
DIMENSIONS = 64


def encode(model_name: str, batch_size: int = 128) -> tuple[list[str], np.ndarray]:
    """The words of the vocabulary, and `[word, dimension]`."""
    tokenizer, model = AutoTokenizer.from_pretrained(model_name), AutoModel.from_pretrained(model_name).eval()
    vocabulary = sorted((place, word) for word, place in tokenizer.get_vocab().items())
    words = [word for _, word in vocabulary if re.fullmatch(r"[a-z]{2,}", word)]
    found = []
    with torch.inference_mode():
        for start in range(0, len(words), batch_size):
            batch = tokenizer(words[start : start + batch_size], padding=True, return_tensors="pt")
            mask = batch["attention_mask"].unsqueeze(-1)
            found.append(((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)).numpy())
    return words, np.concatenate(found)


def reduce(vectors: np.ndarray, dimensions: int = DIMENSIONS) -> np.ndarray:
    """`[word, dimension]` as int8, each row scaled to its own largest value."""
    centred = vectors - vectors.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    reduced = centred @ directions[:dimensions].T
    return np.round(reduced / np.abs(reduced).max(axis=1, keepdims=True) * 127).astype(np.int8)


def write(words: list[str], vectors: np.ndarray, output: Path = OUTPUT) -> None:
    np.savez_compressed(output, words=np.array(" ".join(words)), vectors=reduce(vectors))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    write(*encode(parser.parse_args().model))
