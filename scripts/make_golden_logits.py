"""Make the golden files of ``tests/models``: tiny random checkpoints and their logits by ``transformers``.

    python scripts/make_golden_logits.py            # writes tests/models/golden/<name>/

Needs ``torch`` and ``transformers`` (made with 2.13 and 5.23), no network. Each folder is a Hugging Face
model directory plus ``golden.npz``: for two sequences, ``tokens_<i>`` int32 [prompt + 32], the last 32 chosen
greedily, and ``logits_<i>`` float32 [prompt + 32, vocab] for what follows each of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

PROMPT_LENGTHS, DECODE_STEPS = (45, 19), 32
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Short original context, so that at 77 tokens all three bands (kept, blended, divided) are at work.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def models() -> dict[str, tuple[PreTrainedModel, torch.dtype, str]]:
    """Name: model, type of the stored weights, size of a shard."""
    untied, tied = SIZES | {"tie_word_embeddings": False}, SIZES | {"tie_word_embeddings": True}
    biased = LlamaConfig(**tied, attention_bias=True, mlp_bias=True, rope_parameters=LINEAR_ROPE)
    window = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}
    return {
        "llama3": (
            LlamaForCausalLM(LlamaConfig(**untied, rope_parameters=LLAMA3_ROPE)),
            torch.bfloat16,
            "1GB",
        ),
        "llama_biased_tied": (LlamaForCausalLM(biased), torch.float16, "1GB"),
        "qwen2_two_shards": (Qwen2ForCausalLM(Qwen2Config(**tied)), torch.float32, "250KB"),
        "qwen2_sliding": (Qwen2ForCausalLM(Qwen2Config(**untied, **window)), torch.bfloat16, "1GB"),
        "qwen3": (Qwen3ForCausalLM(Qwen3Config(**untied, head_dim=32)), torch.float16, "1GB"),
    }


@torch.no_grad()
def randomize(model: PreTrainedModel, stored: torch.dtype, generator: torch.Generator) -> None:
    """Weights large enough that every part matters in the logits, and exact in the ``stored`` type."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            value = 0.5 * noise
        elif parameter.ndim == 1:
            value = 1 + 0.2 * noise
        elif "embed_tokens" in name:
            value = noise if not model.config.tie_word_embeddings else 0.3 * noise
        else:
            value = noise * (2.0 if "q_proj" in name or "k_proj" in name else 1.0) / parameter.shape[1] ** 0.5
        parameter.copy_(value.to(stored))


@torch.no_grad()
def golden(model: PreTrainedModel, generator: torch.Generator) -> dict[str, np.ndarray]:
    """Greedy tokens, then the logits of the whole sequence in one float32 pass without any cache."""
    arrays = {}
    for index, length in enumerate(PROMPT_LENGTHS):
        tokens = torch.randint(3, SIZES["vocab_size"], (1, length), generator=generator)
        for _ in range(DECODE_STEPS):
            following = model(tokens, use_cache=False).logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, following], dim=1)
        arrays[f"tokens_{index}"] = tokens[0].to(torch.int32).numpy()
        arrays[f"logits_{index}"] = model(tokens, use_cache=False).logits[0].numpy()
    return arrays


def main() -> None:
    """Write every folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("tests/models/golden"))
    output = parser.parse_args().output
    for seed, (name, (model, stored, shard_size)) in enumerate(models().items()):
        generator = torch.Generator().manual_seed(seed)
        model = model.float().eval()
        model.set_attn_implementation("eager")
        randomize(model, stored, generator)
        arrays = golden(model, generator)
        model.to(stored).save_pretrained(output / name, max_shard_size=shard_size)
        np.savez(output / name / "golden.npz", **arrays)
        files = [file.stat().st_size for file in (output / name).iterdir()]
        spread = np.std(arrays["logits_0"])
        print(f"{name}: {len(files)} files, {sum(files):,} bytes, logits' standard deviation {spread:.2f}")


if __name__ == "__main__":
    main()
