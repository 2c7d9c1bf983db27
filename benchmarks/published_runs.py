"""Training runs whose speed was published, by the width of the model: what a report's cost is set against."""

from dataclasses import dataclass

FP32 = {"A100": 19.5e12, "H100": 67e12}
"""Multiplications and additions a second in float32 without TF32, by NVIDIA's data sheets; of H100 the SXM card's."""


@dataclass(frozen=True)
class PublishedRun:
    """One run, and where its numbers stand."""

    name: str
    width: int
    card: str
    cards: int
    tokens_per_step: float
    seconds_per_step: float
    source: str
    how: str
    """How tokens and seconds follow from what is written there."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.seconds_per_step

    def products_share(self, layers: int, num_tokens: int, every_n_steps: int) -> float:
        """Share of training that the products of a report's rows take, at the card's full rate, rows on all cards."""
        seconds = 2 * layers * num_tokens * self.width**2 / FP32[self.card] / self.cards
        return seconds / (every_n_steps * self.seconds_per_step)

    def share(self, seconds: float, every_n_steps: int) -> float:
        """Share of training that something takes for which all cards wait, once in so many steps."""
        return seconds / (every_n_steps * self.seconds_per_step)


LLM_C = "https://github.com/karpathy/llm.c/blob/master/scripts"

RUNS = (
    PublishedRun(
        "modded-nanogpt, record of 2025-01-04",
        768,
        "H100",
        8,
        0.73e9 / 1390,
        3.4 * 60 / 1390,
        "https://github.com/KellerJordan/modded-nanogpt/tree/0006a9cde0c019d45fc052c0b73f81e2f7814114",
        "0.73B tokens in 1,390 steps and 3.4 minutes",
    ),
    PublishedRun(
        "llm.c, GPT-2 124M",
        768,
        "A100",
        8,
        524288,
        0.3,
        f"{LLM_C}/run_gpt2_124M.sh",
        "524,288 tokens a step, about 300 ms",
    ),
    PublishedRun(
        "nanoGPT, GPT-2 124M",
        768,
        "A100",
        8,
        491520,
        4 * 86400 / 600000,
        "https://github.com/karpathy/nanoGPT",
        "600,000 steps of 491,520 tokens (config/train_gpt2.py) in about 4 days (README)",
    ),
    PublishedRun(
        "llm.c, GPT-2 350M",
        1024,
        "A100",
        8,
        524288,
        0.82,
        f"{LLM_C}/run_gpt2_350M.sh",
        "524,288 tokens a step, about 820 ms",
    ),
    PublishedRun(
        "llm.c, GPT-2 1558M",
        1600,
        "H100",
        8,
        1048576,
        2.8,
        f"{LLM_C}/run_gpt2_1558M.sh",
        "1,048,576 tokens a step, 2.80 s",
    ),
    PublishedRun(
        "TinyLlama 1.1B",
        2048,
        "A100",
        16,
        2048 * 1024,
        2048 * 1024 / (16 * 24000),
        "https://github.com/jzhang38/TinyLlama",
        "2M tokens a step, 24k tokens a second and card, 16 cards",
    ),
    PublishedRun(
        "torchtitan, Llama 3.1 8B",
        4096,
        "H100",
        8,
        16 * 8192,
        16 * 8192 / (8 * 6667),
        "https://github.com/pytorch/torchtitan/blob/main/benchmarks/llama3_h100_202412_torchtitan.md",
        "16 sequences a step (of 8,192 tokens, the default), 6,667 tokens a second and card by FSDP and torch.compile",
    ),
    PublishedRun(
        "LLaMA 65B",
        8192,
        "A100",
        2048,
        4e6,
        4e6 / (2048 * 380),
        "https://arxiv.org/abs/2302.13971",
        "batches of 4M tokens (table 2), 380 tokens a second and card on 2,048 of them (section 2.4)",
    ),
)
