"""The checkpoint the package ships: small, whole, and trained."""

from importlib import resources
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np

from pyagent_kv_jax.models import load_model, load_tokenizer
from tests.models.prompt_attention import PromptAttention, prompt_metadata

FOLDER = Path(str(resources.files("pyagent_kv_jax"))) / "serving" / "demo_model"


def test_size():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 4 * 2**20


def test_tokenizer_fits_the_model_and_loses_nothing():
    tokenizer, (_, config) = load_tokenizer(FOLDER), load_model(FOLDER)
    assert tokenizer.get_vocab_size() == config.vocab_size
    assert [tokenizer.id_to_token(token) for token in config.eos_token_ids] == ["<|end|>"]
    text = "Any text: naïve ☃, tabs\tand\n\n   blank lines."
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_it_has_learnt_the_reference_manual():
    """A uniform guess costs log(1024) = 6.9 nats a token; single-token frequencies alone about 5.9."""
    model, _ = load_model(FOLDER, dtype=jnp.float32)
    tokens = np.array(load_tokenizer(FOLDER).encode(topics["if"] + topics["while"]).ids[:400])
    meta = prompt_metadata([tokens.size - 1], tokens.size - 1)
    logits, _ = jax.jit(model)(tokens[:-1], PromptAttention(), meta)
    losses = -jax.nn.log_softmax(logits)[jnp.arange(tokens.size - 1), tokens[1:]]
    assert float(losses.mean()) < 2.5
