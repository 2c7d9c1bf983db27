"""The text that every machine has as shards of byte-pair tokens, for studies of models that learn words.

    python -m benchmarks.findings.byte_pairs --vocab-size 2048

A tenth of the files, chosen at random, is held out. Of the training tokens a second set of shards is made in which
those of a tenth of all sequences are shuffled: data of which a tenth teaches nothing but frequencies. Takes a minute;
what is there is kept.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import tokenizers

from benchmarks.harness import console
from lightning_spectral.nanogpt import write_shard
from lightning_spectral.nanogpt.data import text_files

FOLDER = Path("findings_runs/tokens")
SMALL = Path("findings_runs/tokens_512")
"""Of 512 tokens, for small models."""
HELD_OUT = 0.1
SHUFFLED = 0.1
"""Share of sequences whose tokens are shuffled in the second set."""
SEED = 0
END = "<|endoftext|>"


def make(folder: Path, vocab_size: int, block_size: int) -> dict[str, int]:
    """Write the shards, unless they are there.

    Args:
        folder: Gets ``clean`` and ``noisy``, with a training and a validation shard each.
        vocab_size: Number of tokens, with that which begins a document, 0.
        block_size: Tokens of a sequence.

    Returns:
        Numbers of files, bytes and tokens.
    """
    facts_path = folder / "facts.json"
    if facts_path.exists():
        found: dict[str, int] = json.loads(facts_path.read_text())
        if (found["vocab_size"], found["block_size"]) != (vocab_size, block_size):
            raise ValueError(f"vocab_size and block_size must be those of {facts_path}, or take a new folder")
        return found
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in text_files(None)]
    rng = np.random.default_rng(SEED)
    order = rng.permutation(len(texts))
    sizes = np.cumsum([len(texts[index]) for index in order])
    num_held_out = int(np.searchsorted(sizes, HELD_OUT * sizes[-1])) + 1
    parts = {"val": order[:num_held_out], "train": order[num_held_out:]}

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((texts[index] for index in parts["train"]), trainer)
    tokens = {
        name: np.concatenate([[0, *tokenizer.encode(texts[index]).ids] for index in indices])
        for name, indices in parts.items()
    }
    noisy = tokens["train"].copy()
    for start in np.flatnonzero(rng.random(len(noisy) // block_size) < SHUFFLED) * block_size:
        rng.shuffle(noisy[start : start + block_size])
    for name, train in (("clean", tokens["train"]), ("noisy", noisy)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_shard(folder / name / "text_train_0.bin", train)
        write_shard(folder / name / "text_val_0.bin", tokens["val"])
    facts = {
        "vocab_size": vocab_size,
        "block_size": block_size,
        "files": len(texts),
        "characters": int(sizes[-1]),
        "train_tokens": len(noisy),
        "val_tokens": len(tokens["val"]),
    }
    facts_path.write_text(json.dumps(facts))
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where shards go; those that are there are kept")
    parser.add_argument("--vocab-size", type=int, default=2048, help="number of tokens")
    parser.add_argument("--block-size", type=int, default=128, help="tokens of a sequence")
    arguments = parser.parse_args()
    try:
        facts = make(arguments.folder, arguments.vocab_size, arguments.block_size)
    except ValueError as error:
        parser.error(str(error))
    console.print(", ".join(f"{value:,} {name}" for name, value in facts.items()), highlight=False)


if __name__ == "__main__":
    main()
