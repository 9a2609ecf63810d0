"""Small deterministic texts for the tests of the data room."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

AWKWARD = [
    "<|endoftext|> spelled <|endoftext|><|endoftext|>\n",
    "\ufeffbyte order mark, Windows lines\r\n\r\n\tand tabs \t\r\n",
    "naïve café 東京 🙂🙂 Ωmega e\u0301 \u00a0\u2028 \x00\x1c\x85 end",
    " leading and trailing spaces   ",
    "\n\n\n    x",
    "0123456789 3.14159 0xdeadbeef _name__ __init__(self):\n        return None\n",
]


def prose(seed: int, num_words: int) -> str:
    """Lines of words drawn by a fixed generator; different seeds share words but hardly any run of five."""
    generator = random.Random(seed)
    syllables = ["ka", "lo", "mi", "ter", "so", "un", "ve", "ra", "quo", "the"]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(num_words)]
    return "\n".join(" ".join(words[start : start + 9]) for start in range(0, num_words, 9)) + "\n"


def write_folder(root: Path, num_files: int = 24, num_words: int = 160) -> Path:
    """A folder of num_files prose files, one of awkward text, one empty, and a near-duplicate of the first."""
    (root / "sub").mkdir(parents=True)
    for index in range(num_files):
        folder = root / "sub" if index % 3 == 0 else root
        folder.joinpath(f"doc{index:02d}.txt").write_bytes(prose(index, num_words + 37 * (index % 5)).encode())
    (root / "awkward.txt").write_bytes("".join(AWKWARD).encode())
    (root / "empty.txt").write_bytes(b"")
    (root / "zz_copy.txt").write_bytes(prose(0, num_words).encode() + b"one more line\n")
    (root / "ignored.md").write_bytes(b"not matched by the pattern")
    return root


def write_large(root: Path, num_bytes: int) -> Path:
    """A folder with num_bytes of text in files of about 20 kB, the last five of them copies with a changed end."""
    generator = np.random.Generator(np.random.PCG64(7))
    words = np.array(prose(11, 3000).split())
    written = number = 0
    while written < num_bytes:
        text = " ".join(words[generator.integers(len(words), size=3000)].tolist()) + "\n"
        (root / f"{number:04d}.txt").write_text(text)
        written += len(text)
        number += 1
    for copy in range(5):
        text = (root / f"{copy:04d}.txt").read_text()
        (root / f"z{copy}.txt").write_text(text[:-9] + "changed\n")
    return root
