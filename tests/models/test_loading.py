"""Directories that load, and directories that say what is wrong with them."""

import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from pyagent_kv_jax.errors import ModelLoadError
from pyagent_kv_jax.models import LlamaConfig, LlamaForCausalLM, load_model, load_tokenizer, save_model

GOLDEN = Path(__file__).parent / "golden"
SINGLE, SHARDED = "llama3", "qwen2_two_shards"
SECOND_SHARD = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def single(tmp_path):
    return Path(shutil.copytree(GOLDEN / SINGLE, tmp_path / SINGLE))


@pytest.fixture
def sharded(tmp_path):
    return Path(shutil.copytree(GOLDEN / SHARDED, tmp_path / SHARDED))


def rewrite(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def parameters(model):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def test_each_tensor_is_in_its_place():
    tensors = load_file(GOLDEN / SINGLE / "model.safetensors")
    model, config = load_model(GOLDEN / SINGLE, dtype=jnp.float32)
    assert config.eos_token_ids == (2,)
    for layer in range(config.num_layers):
        theirs = tensors[f"model.layers.{layer}.mlp.down_proj.weight"].astype(np.float32)
        chex.assert_trees_all_equal(np.asarray(model.layers.mlp.down_proj.kernel[layer]), theirs.T)
        theirs = tensors[f"model.layers.{layer}.post_attention_layernorm.weight"].astype(np.float32)
        chex.assert_trees_all_equal(np.asarray(model.layers.post_attention_layernorm.weight[layer]), theirs)
    theirs = tensors["lm_head.weight"].astype(np.float32)
    chex.assert_trees_all_equal(np.asarray(model.lm_head.kernel[...]), theirs.T)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtype_is_the_callers(dtype):
    model, _ = load_model(GOLDEN / SHARDED, dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters(model))} == {jnp.dtype(dtype)}


def test_shards_hold_the_same_as_one_file(sharded):
    tensors = {}
    for shard in sharded.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    save_file(tensors, sharded / "model.safetensors")
    whole, _ = load_model(sharded, dtype=jnp.float32)
    chex.assert_trees_all_equal(parameters(whole), parameters(load_model(GOLDEN / SHARDED, dtype=jnp.float32)[0]))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path, dtype, tied):
    config = LlamaConfig(
        40, 24, 36, 2, 4, 2, 8, qk_norm=True, architecture="Qwen3ForCausalLM", tie_word_embeddings=tied
    )
    model = LlamaForCausalLM(config, dtype=dtype, rngs=nnx.Rngs(3))
    save_model(model, tmp_path / "new")
    loaded, loaded_config = load_model(tmp_path / "new", dtype=dtype)
    assert loaded_config == config
    chex.assert_trees_all_equal(parameters(loaded), parameters(model))


def test_a_saved_model_has_the_tensors_transformers_wrote(tmp_path):
    model, _ = load_model(GOLDEN / SINGLE, dtype=jnp.bfloat16)
    save_model(model, tmp_path)
    theirs, ours = (load_file(path / "model.safetensors") for path in (GOLDEN / SINGLE, tmp_path))
    chex.assert_trees_all_equal(ours, theirs)


def test_tensors_that_follow_from_others_may_be_there(single):
    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    rewrite(single, change)
    load_model(single)


def test_missing_directory(tmp_path):
    with pytest.raises(ModelLoadError, match=r"got '.*nowhere', which is no directory; want"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_missing_file(single, missing):
    (single / missing).unlink()
    with pytest.raises(ModelLoadError, match=missing):
        load_model(single)


def test_broken_files(single):
    (single / "model.safetensors").write_bytes(b"not a tensor in sight")
    with pytest.raises(ModelLoadError, match="want a safetensors file"):
        load_model(single)
    (single / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="want JSON"):
        load_model(single)
    (single / "config.json").write_text("[]")
    with pytest.raises(ModelLoadError, match="got a list, want a JSON object"):
        load_model(single)


def test_missing_shard(sharded):
    (sharded / SECOND_SHARD).unlink()
    with pytest.raises(ModelLoadError, match=f"got no shard {SECOND_SHARD}, want all 2"):
        load_model(sharded)


def test_shard_without_a_promised_tensor(sharded):
    tensors = load_file(sharded / SECOND_SHARD)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, sharded / SECOND_SHARD)
    with pytest.raises(ModelLoadError, match=rf"got no {lost}, want them in {SECOND_SHARD}"):
        load_model(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, {"a": "../elsewhere.safetensors"}])
def test_useless_index(sharded, weight_map):
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelLoadError, match=r"want (tensor to file name|names of files beside the index)"):
        load_model(sharded)


def test_missing_tensor(single):
    rewrite(single, lambda tensors: tensors.pop(Q_PROJ))
    with pytest.raises(ModelLoadError, match=f"got no tensor {Q_PROJ}, want all 30"):
        load_model(single)


def test_leftover_tensor(single):
    rewrite(single, lambda tensors: tensors.update({"model.extra": np.ones(3, np.float32)}))
    with pytest.raises(ModelLoadError, match=r"got tensors model\.extra, want none"):
        load_model(single)


def test_wrong_shape(single):
    rewrite(single, lambda tensors: tensors.update({Q_PROJ: np.ones((64, 63), np.float32)}))
    with pytest.raises(ModelLoadError, match=rf"{Q_PROJ}: got shape \(64, 63\), want \(64, 64\)"):
        load_model(single)


def test_wrong_dtype(single):
    rewrite(single, lambda tensors: tensors.update({Q_PROJ: np.ones((64, 64), np.int8)}))
    with pytest.raises(ModelLoadError, match=f"{Q_PROJ}: got dtype int8, want one of float16"):
        load_model(single)


def test_tokenizer(tmp_path):
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json: got no such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="want a tokenizer of the tokenizers library"):
        load_tokenizer(tmp_path)
    Tokenizer(models.WordLevel({"one": 0, "two": 1}, unk_token="one")).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("two").ids == [1]
