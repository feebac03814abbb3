"""Make the golden files of ``tests/models``: tiny random checkpoints and their logits by ``transformers``.

    python scripts/make_golden_logits.py            # writes tests/models/golden/<name>/ for each name

Needs ``torch`` and ``transformers`` (made with 2.13 and 5.23), no network. Each folder is a Hugging Face
model directory plus ``golden.npz``: for two sequences, ``tokens_<i>`` int32 [prompt + 32], the last 32 from the model,
and ``logits_<i>`` float32 [prompt + 32, vocab] for what follows each of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
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
# Gemma 3 as published, but small: every size another number, so that none can stand in for another. The factor of 8
# needs a short base, or at 77 tokens the scaled waves would hardly turn.
GEMMA3 = SIZES | {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 6,
    "head_dim": 24,
    "query_pre_attn_scalar": 18,
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": True,
    "sliding_window": 10,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 2000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
# The switches that published Gemma 3 leaves off, and layers in another order.
GEMMA3_SWITCHES = GEMMA3 | {
    "num_hidden_layers": 4,
    "tie_word_embeddings": False,
    "sliding_window": 16,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "attention_bias": True,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 4.0,
}


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
        "gemma3": (Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA3)), torch.float16, "1GB"),
        "gemma3_switches": (Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA3_SWITCHES)), torch.bfloat16, "1GB"),
    }


@torch.no_grad()
def randomize(model: PreTrainedModel, stored: torch.dtype, generator: torch.Generator) -> None:
    """Weights large enough that every part matters in the logits, and exact in the ``stored`` type."""
    is_gemma3 = model.config.model_type == "gemma3_text"  # adds 1 to norm weights itself, multiplies embeddings
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            value = 0.5 * noise
        elif parameter.ndim == 1:
            value = (0 if is_gemma3 else 1) + 0.2 * noise
        elif "embed_tokens" in name:
            value = (0.3 if is_gemma3 else 1.0) * (0.3 if model.config.tie_word_embeddings else 1.0) * noise
        else:
            value = noise * (2.0 if "q_proj" in name or "k_proj" in name else 1.0) / parameter.shape[1] ** 0.5
        parameter.copy_(value.to(stored))


def following(model: PreTrainedModel, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The next token [1, 1]. Gemma's are drawn: greedily it repeats itself, and equal tokens hide a window's edge."""
    if model.config.model_type == "gemma3_text":
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)
    return logits.argmax(-1, keepdim=True)


@torch.no_grad()
def golden(model: PreTrainedModel, generator: torch.Generator) -> dict[str, np.ndarray]:
    """Tokens, then the logits of the whole sequence in one float32 pass without any cache."""
    # Gemma3Attention keeps its soft cap to itself, but hands options of the call on to the attention function.
    cap = getattr(model.config, "attn_logit_softcapping", None)
    options = {"use_cache": False} | ({"softcap": cap} if cap else {})
    arrays = {}
    for index, length in enumerate(PROMPT_LENGTHS):
        tokens = torch.randint(3, SIZES["vocab_size"], (1, length), generator=generator)
        for _ in range(DECODE_STEPS):
            logits = model(tokens, **options).logits[:, -1]
            tokens = torch.cat([tokens, following(model, logits, generator)], dim=1)
        arrays[f"tokens_{index}"] = tokens[0].to(torch.int32).numpy()
        arrays[f"logits_{index}"] = model(tokens, **options).logits[0].numpy()
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
