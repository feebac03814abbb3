"""The Mosaic GPU form of ``paged_attention``, interpreted here on a few cases; compiled on all of them on a GPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import paged_attention
from pallas_kernels.interpret import interpret_pallas
from pallas_kernels.paged_attention import mosaic_gpu, triton
from pallas_kernels.paged_attention.context_parallel import WHOLE_CONTEXT
from pallas_kernels.paged_attention.mosaic_gpu_tiles import tiles_of_long
from pallas_kernels.paged_attention.visibility import Visibility
from pallas_kernels.paged_attention.work_items import Sequences, Tables
from tests.pallas_kernels.attention_cases import AttentionCase
from tests.pallas_kernels.attention_inputs import make_inputs
from tests.pallas_kernels.form_checks import check_attention, check_nan
from tests.pallas_kernels.gpu import needs_gpu
from tests.pallas_kernels.mosaic_gpu_checks import ALL, DEFAULT, MINUTES, check, interpreted

MOSAIC: dict[str, Any] = {"implementation": "mosaic_gpu"}
PREFILL = AttentionCase(
    "prefill", kv_lens=(100,), query_lens=(100,), head_dim=64, q_dtype="bfloat16", kv_dtype="bfloat16"
)
H100 = ("NVIDIA H100 80GB HBM3", 132)


@pytest.mark.parametrize("name", DEFAULT)
def test_against_float64_interpreted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(ALL[name], monkeypatch)


def test_nan_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    with interpreted(monkeypatch):
        check_nan(mosaic_gpu.paged_attention)


ON_A_GPU = [(name, "bfloat16", 128) for name in ALL] + [(name, "float16", 64) for name in DEFAULT + MINUTES]


@needs_gpu
@pytest.mark.parametrize(("name", "dtype", "head_dim"), ON_A_GPU)
def test_against_float64_on_a_gpu(name: str, dtype: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared cases, in the sizes and formats that this form has."""
    monkeypatch.setattr(triton, "FEW_ROWS", 0)
    sizes = {"head_dim": head_dim, "v_head_dim": None, "storage_head_dim": None, "v_storage_head_dim": None}
    formats = {"q_dtype": dtype, "kv_dtype": dtype, "stored_as": None}
    case = AttentionCase(**{**vars(ALL[name]), **sizes, **formats})
    try:
        check_attention(mosaic_gpu.paged_attention, case)
    except NotImplementedError as error:
        pytest.skip(str(error))


def traced_for(kind: str, cores: int, case: AttentionCase = PREFILL, **form: Any) -> None:
    """``paged_attention`` traced for a GPU that is not there."""
    arguments = {**make_inputs(case).arguments, **(form or MOSAIC)}
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        jax.jit(lambda: paged_attention(**arguments)).trace()


def test_refuses_what_it_cannot_with_the_reason() -> None:
    arguments = make_inputs(PREFILL).arguments
    refused = pytest.raises
    with refused(NotImplementedError, match="this program is for 'cpu'"):
        paged_attention(**arguments, **MOSAIC)
    for mode in (True, pltpu.InterpretParams()):
        with interpret_pallas(mode), refused(NotImplementedError, match="interpreted by InterpretGPUParams"):
            paged_attention(**arguments, **MOSAIC)
    with refused(NotImplementedError, match="B200 has compute capability 10.0"):
        traced_for("NVIDIA B200", 148)
    with refused(NotImplementedError, match="A100-SXM4-80GB has compute capability 8.0"):
        traced_for("NVIDIA A100-SXM4-80GB", 108)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 80}, "head_dim 80"),
        ({"q_dtype": "float32"}, "q of float32 and pages of bfloat16"),
        ({"q_dtype": "float32", "kv_dtype": "float32"}, "products are of bfloat16 or float16"),
        ({"kv_dtype": "int8"}, "q of bfloat16 and pages of int8"),
        ({"block_size": 4}, "block_size 4"),
        ({"storage_head_dim": 72, "v_storage_head_dim": 72}, "pieces of 64 numbers"),
        ({"block_size": 24}, "block_size 24 neither divides nor is divided by 128"),
        ({"query_lens": (16,)}, "16 queries a sequence at most"),
        ({"query_lens": None}, "1 queries a sequence at most"),
    ],
    ids=str,
)
def test_says_which_sizes_it_has_not(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        traced_for(*H100, AttentionCase(**{**vars(PREFILL), **changes}))


def test_pools_of_2_to_31_rows_are_left_to_others() -> None:
    given = make_inputs(PREFILL).arguments
    lengths = {name: given[name] for name in ("block_tables", "kv_lens", "query_start_loc")}
    q, pages = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((100, 8, 64), (2**22, 8, 64, 64)))
    device = AbstractDevice(device_kind=H100[0], num_cores=H100[1], platform="gpu")
    refused = pytest.raises(NotImplementedError, match="rows of tokens in 31 bits")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)), refused:
        jax.eval_shape(lambda q, k, v: paged_attention(q, k, v, **lengths, **MOSAIC), q, pages, pages)


def test_runs_only_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(mosaic_gpu, "paged_attention", asked)
    traced_for(*H100, implementation=None)
    with pytest.raises(AssertionError, match="asked"):
        traced_for(*H100, implementation=("mosaic_gpu", "triton"))


def test_decode_goes_on_to_the_next_form(monkeypatch: pytest.MonkeyPatch) -> None:
    with interpreted(monkeypatch, few_rows=64), pytest.raises(NotImplementedError, match="decode is what the Triton"):
        paged_attention(**make_inputs(ALL["decode"]).arguments, **MOSAIC)
    arguments = make_inputs(ALL["decode"]).arguments
    assert paged_attention(**arguments, implementation=("mosaic_gpu", "xla")).shape == arguments["q"].shape


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("queries", [64, 128])
def test_tiles_start_at_whole_groups_of_rows_and_hold_every_token_once(queries: int, seed: int) -> None:
    """What the interpreter cannot tell: TMA would lose rows of a tile that started elsewhere."""
    rng = np.random.default_rng(seed)
    lens = rng.integers(0, (9, 90, 300)[seed], rng.integers(1, 9))
    before, after = rng.integers(0, 20, 2)
    loc = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32) + np.int32(before)
    tokens, kv_lens = int(loc[-1] + after), (lens + rng.integers(0, 50, lens.size)).astype(np.int32)
    sequences = Sequences.create(jnp.asarray(loc), jnp.asarray(kv_lens), tokens)
    blocks = jnp.zeros((lens.size, 64), jnp.int32)
    tables = Tables.create(blocks, None, step=8, num_pages=1, block_size=16, context=WHOLE_CONTEXT)
    visibility = Visibility(True, None, None)
    tiles = tiles_of_long(sequences, tables, visibility, tokens, more_than=1, queries=queries, keys=128)
    held = np.zeros(tokens, int)
    for row, token, number in zip(*(np.asarray(x) for x in (tiles.row, tiles.token, tiles.num_queries)), strict=True):
        if number:
            assert row % 8 == 0
            assert row <= token < token + number <= row + queries
            held[token : token + number] += 1
    single = np.concatenate([np.zeros(before, bool), np.repeat(lens == 1, lens), np.zeros(after, bool)])
    np.testing.assert_array_equal(held, ~single)
