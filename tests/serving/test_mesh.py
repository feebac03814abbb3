"""Generating on a mesh: the same tokens as on one device, from weights and a cache spread over eight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pyagent_kv_jax import ConfigError, InvalidArgumentError, KVCacheManager, ManagerOptions
from pyagent_kv_jax.distributed import CacheSharding, ShardedKVPages
from pyagent_kv_jax.models.sharding import shard_model
from pyagent_kv_jax.serving import SamplingParams, command_line, generate
from pyagent_kv_jax.serving.engine import Engine, EngineConfig
from pyagent_kv_jax.serving.generate import fitting_cache_config, serve
from pyagent_kv_jax.serving.sampling import SamplingArrays
from pyagent_kv_jax.serving.token_equality import compare_tokens
from tests.distributed.hlo import collectives
from tests.distributed.meshes import cpu_mesh, explicit_mesh
from tests.serving.serving_models import CONFIG, answers_of, gemma_model, ragged_prompts, small_model

PROMPTS = ragged_prompts(10)
SAMPLING = SamplingParams(max_tokens=16, ignore_eos=True)


def engine_for(model: nnx.Module, mesh: object = None, num_blocks: int | None = None, **options: object) -> Engine:
    sharding = None if mesh is None else CacheSharding.of(mesh)
    lengths = [len(prompt) + 16 for prompt in PROMPTS]
    config = fitting_cache_config(
        model, lengths, max_num_seqs=4, sharding=sharding, num_blocks=num_blocks, max_model_len=128, **options
    )
    manager = KVCacheManager(config, ManagerOptions(prediction_horizon=8), sharding=sharding)
    return Engine(model, manager, EngineConfig(4, 32, row_buckets=(), token_buckets=(), with_margins=True))


@pytest.fixture(scope="module")
def on_one_device():
    """Answers, with margins, of the small Llama."""
    return serve(engine_for(small_model()), PROMPTS, SAMPLING)


def equal(reference, answers, model) -> None:
    def regenerate(prompts, lengths):
        params = [dataclasses.replace(SAMPLING, max_tokens=n) for n in lengths]
        return serve(engine_for(model), prompts, params)

    comparison = compare_tokens(PROMPTS, reference, answers, regenerate)
    print(comparison)
    assert comparison.equal, comparison


@pytest.mark.parametrize(
    ("sizes", "preempts"),
    [({"dcp": 2, "tp": 4}, False), ({"dcp": 4}, False), ({"tp": 2}, True), ({"dcp": 3, "tp": 2}, True)],
    ids=str,
)
def test_a_mesh_gives_the_tokens_of_one_device(sizes, preempts, on_one_device) -> None:
    """Two KV heads over four tensor ranks; four query heads that twelve ranks do not divide; room for 128 tokens."""
    num_blocks = 128 // (16 * sizes.get("dcp", 1))
    engine = engine_for(small_model(), cpu_mesh(**sizes), num_blocks=num_blocks)
    answers = serve(engine, PROMPTS, SAMPLING)
    equal(on_one_device, answers, small_model())
    assert (sum(answer.num_preemptions for answer in answers) > 0) == preempts  # in small blocks requests outgrow it
    assert isinstance(engine.backend.pages, ShardedKVPages)
    engine.backend.check_invariants()
    assert engine.backend.get_num_free_blocks() == num_blocks


def test_no_page_travels_in_a_step_of_the_model() -> None:
    """The largest thing any rank receives is a row of logits or weights; the pages are many times that, and donated."""
    engine = engine_for(small_model(), cpu_mesh(dcp=2, tp=2), num_blocks=2048)
    nobody = engine.backend.step([], [], num_rows=4).metadata
    nobody = dataclasses.replace(nobody, max_kv_len=engine.backend.config.max_model_len)
    arguments = np.zeros(4, np.int32), nobody, None, SamplingArrays.from_rows([], [], [], 4)
    program = engine._step.run.lower(engine._weights, engine.backend.pages, *arguments, False).compile()
    on_a_device = engine.backend.pages.nbytes // 4
    assert max(received for _, received in collectives(program)) < on_a_device / 100
    assert program.memory_analysis().alias_size_in_bytes >= on_a_device
    assert program.memory_analysis().temp_size_in_bytes < on_a_device / 10


@pytest.mark.parametrize("sizes", [None, {"dcp": 2}], ids=str)
def test_scales_outlive_a_step_that_breaks_off(sizes, monkeypatch) -> None:
    """They go with the donated pages, and zeros in their place would quantise all that follows to nothing."""
    engine = engine_for(small_model(), sizes and cpu_mesh(**sizes), dtype="int8")
    engine.backend.pages = engine.backend.pages.with_scales(*np.full((2, CONFIG.num_layers, CONFIG.num_kv_heads), 0.05))
    want = serve(engine, PROMPTS[:3], SAMPLING)

    def broken(*_) -> None:
        jax.tree.map(lambda leaf: leaf.delete(), engine.backend.pages)
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_dispatch", broken)
            with pytest.raises(KeyboardInterrupt):
                serve(engine, PROMPTS[:3], SAMPLING)
        assert [a.token_ids for a in serve(engine, PROMPTS[:3], SAMPLING)] == [a.token_ids for a in want]


def test_gemma_on_a_mesh() -> None:
    """Two kinds of layers, with tables of their own; forks copy blocks of the pages; the prefix cache is hit.

    The axes are of the type that ``jax.make_mesh`` gives them, which is Explicit; and the caller has set the mesh.
    """
    model, _ = gemma_model()
    prompts, sampling = ragged_prompts(4, seed=3), SamplingParams(max_tokens=8, n=2, temperature=1.0, seed=5)
    config = model.config.kv_cache_config(num_blocks=256, block_size=8, max_num_reqs=8, max_model_len=128)
    options = {"sampling": sampling, "cache_config": config, "max_num_seqs": 8}
    first, mesh = generate(model, prompts, **options), explicit_mesh(dcp=2, tp=2)
    with jax.set_mesh(mesh):
        second = generate(model, prompts, mesh=mesh, **options)
    assert [a.token_ids for a in answers_of(first)] == [a.token_ids for a in answers_of(second)]


def test_weights_are_spread() -> None:
    """Heads and hidden units over both axes, K and V over the tensor axis as far as there are heads."""
    sharding = CacheSharding.of(cpu_mesh(dcp=2, tp=2))
    params = dict(nnx.to_flat_state(nnx.state(shard_model(small_model(), sharding), nnx.Param)))
    attention = ("layers", "self_attn")
    spec = {path: param[...].sharding.spec for path, param in params.items()}
    assert spec[(*attention, "q_proj", "kernel")] == P(None, None, ("tp", "dcp"))
    assert spec[(*attention, "k_proj", "kernel")] == P(None, None, ("tp",))
    assert spec[(*attention, "o_proj", "kernel")] == P(None, ("tp", "dcp"), None)
    assert spec[("layers", "mlp", "down_proj", "kernel")] == P(None, ("tp", "dcp"), None)
    assert spec[("embed_tokens", "weight")] == P(None, None)  # 97 tokens: no axis divides them
    assert spec[("norm", "weight")] == P()
    per_device = sum(param[...].addressable_shards[0].data.nbytes for param in params.values())
    assert per_device < 0.6 * sum(param[...].nbytes for param in params.values())


@pytest.mark.parametrize("make_mesh", [cpu_mesh, explicit_mesh])
def test_other_models_say_where_their_weights_go(make_mesh: Callable[..., Mesh]) -> None:
    """By ``nnx.with_partitioning``; what says nothing is the same everywhere, and arrays need no Variable."""

    class Model(nnx.Module):
        def __init__(self, mesh: Mesh) -> None:
            init = nnx.with_partitioning(nnx.initializers.ones, (None, "tp"), mesh=mesh)
            self.named = nnx.Param(init(jax.random.key(0), (4, 8)), out_sharding=(None, "tp"), mesh=mesh)
            self.plain = nnx.Param(np.ones((4, 8), np.float32))
            self.array = nnx.data(jnp.arange(3))

    mesh = make_mesh(dcp=2, tp=2)
    sharding = CacheSharding.of(mesh)
    model = shard_model(Model(mesh), sharding)
    assert model.named[...].sharding == sharding.named(P(None, "tp"))
    assert model.plain[...].sharding == model.array.sharding == sharding.replicated


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"data": 2}, "axes 'dcp' and 'tp'"),
        ({"tp": 3}, "num_heads: got 2 KV heads over 3 ranks"),
        ({"tp": 8}, "q heads: got 4, want a multiple of 8"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, message) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(small_model(), PROMPTS, mesh=cpu_mesh(**mesh))


def test_what_a_mesh_cannot_do_is_refused() -> None:
    config = CONFIG.kv_cache_config(num_blocks=16, block_size=8)
    sharding = CacheSharding.of(cpu_mesh(dcp=2))
    with pytest.raises(ConfigError, match="num_host_blocks: got 4"):
        KVCacheManager(config, ManagerOptions(num_host_blocks=4), sharding=sharding)
    manager = KVCacheManager(config, sharding=sharding)
    with pytest.raises(InvalidArgumentError, match="want a cache on one device"):
        manager.change_block_size(4)
    with pytest.raises(InvalidArgumentError, match="want the one or the others"):
        generate(small_model(), PROMPTS, backend=manager, mesh=sharding)
    with pytest.raises(ConfigError, match="interleave: got 8"):
        KVCacheManager(config, sharding=dataclasses.replace(sharding, interleave=8))


def test_the_command_line_takes_a_mesh(capsys) -> None:
    """The same text from the shipped model; sizes that are none, and more devices than there are, are refused."""
    command = [
        "generate",
        "--model",
        "pyagent_kv_jax/serving/demo_model",
        "--prompt",
        "import os",
        "--max-tokens",
        "12",
    ]
    assert command_line.main(command) == 0
    plain = capsys.readouterr().out
    assert command_line.main([*command, "--mesh", "dcp=2,tp=2"]) == 0
    assert capsys.readouterr().out == plain
    for text, message in [
        ("dcp", "want axes and their sizes"),
        ("dcp=16", "of 8 devices; on CPUs"),
        ("x=2", "axes 'dcp'"),
        ("dcp=2,dcp=2", "want each axis once"),
    ]:
        assert command_line.main([*command, "--mesh", text]) == 2
        assert message in capsys.readouterr().err
