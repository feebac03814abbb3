"""Train the checkpoint of ``pyagent-kv demo``: a small Llama on the reference text that every Python carries.

    python scripts/train_demo_model.py --output pyagent_kv_jax/serving/demo_model

Writes config.json, model.safetensors (bfloat16) and tokenizer.json. Needs ``optax``, which the package itself
does not. On one CPU core it takes about a quarter of an hour. The seed is fixed; when ``--steps`` are done
before ``--time-budget`` is spent, the same machine, Python and jax give the same weights. The text differs a
little between Python versions.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pyagent_kv_jax.cache.attention_metadata import AttentionMetadata
from pyagent_kv_jax.models import LlamaConfig, LlamaForCausalLM, save_model

END = "<|end|>"  # between topics; token 0, and the model's end of text
CONFIG = LlamaConfig(
    vocab_size=1024,
    hidden_size=192,
    intermediate_size=512,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    eos_token_ids=(0,),
)
# Sequences x tokens of a step: mostly short ones, which cost least; long ones for the positions up to 2047.
BATCHES = ((4, 256), (4, 256), (4, 256), (1, 1024), (4, 256), (4, 256), (4, 256), (1, 2048))
PEAK_RATE, FINAL_RATE, WARMUP = 3e-3, 1e-4, 0.03
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.98), optax.add_decayed_weights(0.05))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WholeSequence:
    """A cache that keeps nothing: each call brings one sequence from its first token on."""

    def attend(
        self, layer: Any, q: jax.Array, k: jax.Array, v: jax.Array, meta: AttentionMetadata, **_: Any
    ) -> tuple[jax.Array, WholeSequence]:
        """``LayerCache.attend``. Scores are computed again in the backward pass: they would fill memory."""
        causal = jax.checkpoint(partial(jax.nn.dot_product_attention, is_causal=True))
        return causal(q[None], k[None], v[None])[0], self


def whole_sequence(length: int) -> AttentionMetadata:
    """Metadata of one sequence of ``length`` tokens that touches no block."""
    return AttentionMetadata(
        block_tables=jnp.full((1, 1), -1),
        kv_lens=jnp.array([length]),
        query_start_loc=jnp.array([0, length]),
        slot_mapping=jnp.full((length,), -1),
        positions=jnp.arange(length),
        ok=jnp.ones((1,), bool),
    )


def prose(text: str) -> str:
    """The topic without its ASCII tables, of which a small model would learn nothing but to draw bars."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("|", "+-", "+="))]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: any text can be encoded, and decoding gives it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def learning_rate(progress: float) -> float:
    """Linear warm-up, then half a cosine; ``progress`` goes from 0 to 1."""
    if progress < WARMUP:
        return PEAK_RATE * (progress + 1e-3) / WARMUP
    falling = 0.5 * (1 + np.cos(np.pi * (progress - WARMUP) / (1 - WARMUP)))
    return FINAL_RATE + (PEAK_RATE - FINAL_RATE) * falling


def make_step(graph: Any) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """One optimizer step on ``batch`` i32[B, T + 1]; returns the mean loss in nats a token."""

    def loss_of(params: Any, batch: jax.Array) -> jax.Array:
        model, meta = nnx.merge(graph, params), whole_sequence(batch.shape[1] - 1)
        logits = jax.vmap(lambda tokens: model(tokens, WholeSequence(), meta)[0])(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: jax.Array, rate: float) -> tuple[Any, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(loss_of)(params, batch)
        direction, state = OPTIMIZER.update(gradient, state, params)
        return jax.tree.map(lambda p, d: p - rate * d, params, direction), state, loss

    return step


def train(tokens: np.ndarray, steps: int, budget_s: float, seed: int) -> tuple[Any, Any]:
    """Graph and parameters after ``steps`` steps, or fewer when ``budget_s`` seconds are spent before."""
    graph, params = nnx.split(LlamaForCausalLM(CONFIG, rngs=nnx.Rngs(seed)))
    print(
        f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters, {tokens.size:,} tokens",
        flush=True,
    )
    state, step, draw = OPTIMIZER.init(params), make_step(graph), np.random.default_rng(seed)
    started, recent, done, progress = time.monotonic(), [], 0, 0.0
    while progress < 1.0:
        rows, length = BATCHES[done % len(BATCHES)]
        starts = draw.integers(0, tokens.size - length, rows)
        batch = tokens[starts[:, None] + np.arange(length + 1)]
        params, state, loss = step(params, state, batch, learning_rate(progress))
        recent, done = [*recent[-99:], float(loss)], done + 1
        progress = max(done / steps, (time.monotonic() - started) / budget_s)
        if done % 100 == 0 or progress >= 1.0:
            seconds = time.monotonic() - started
            print(
                f"step {done:5d}  {seconds:6.0f} s  loss {np.mean(recent):.3f} (mean of {len(recent)})",
                flush=True,
            )
    return graph, params


def show_samples(model: LlamaForCausalLM, tokenizer: Tokenizer, prompts: list[str], new_tokens: int = 96) -> None:
    """Print greedy continuations, and how often the two best logits are nearly equal."""
    length = 256
    logits_of = jax.jit(lambda tokens: model(tokens, WholeSequence(), whole_sequence(length))[0])
    margins = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt).ids
        for _ in range(new_tokens):
            logits = np.asarray(logits_of(jnp.array(ids + [0] * (length - len(ids)))))[len(ids) - 1]
            second, first = np.sort(logits)[-2:]
            margins.append(first - second)
            ids.append(int(logits.argmax()))
        print(f"--- {tokenizer.decode(ids, skip_special_tokens=False)}", flush=True)
    for limit in (1e-3, 1e-2, 1e-1):
        print(f"top-2 logit margin under {limit}: {np.mean(np.array(margins) < limit):.4f} of {len(margins)}")


def main() -> None:
    """Tokenizer, training, files, samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of 1,024 or 2,048 tokens")
    parser.add_argument("--time-budget", type=float, default=30.0, help="minutes after which training ends early")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    texts = [prose(topics[name]) for name in sorted(topics)]
    tokenizer = train_tokenizer(texts)
    tokens = np.array([i for text in texts for i in [0, *tokenizer.encode(text).ids]], np.int32)
    graph, params = train(tokens, args.steps, args.time_budget * 60, args.seed)

    model = nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    save_model(model, args.output)
    tokenizer.save(str(args.output / "tokenizer.json"))
    print(f"{args.output}: {sum(file.stat().st_size for file in args.output.iterdir()):,} bytes")
    as_loaded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)
    prompts = ["The ", "A class definition", "The following exceptions are", "An expression", "Modules"]
    show_samples(nnx.merge(graph, as_loaded), tokenizer, prompts)


if __name__ == "__main__":
    main()
