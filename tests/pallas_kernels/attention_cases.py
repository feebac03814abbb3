"""The one table of cases of ``paged_attention``: every form runs all of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.paged_attention.shapes import SHAPES


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """What one call looks like; the arrays are made from it by ``attention_inputs``.

    ``query_lens`` None is the decode form. ``num_padding_*`` are added after the real ones. ``positions``: None,
    "shuffled" (columns in random order) or "trimmed" (only columns that some query sees). ``holes`` are (sequence,
    column) set to -1. Scales: None, "tensor" or "head". ``stored_as`` None: ``kv_dtype`` itself.
    """

    name: str
    kv_lens: tuple[int, ...]
    query_lens: tuple[int, ...] | None = None
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    v_head_dim: int | None = None
    storage_head_dim: int | None = None
    v_storage_head_dim: int | None = None
    block_size: int = 8
    num_padding_sequences: int = 0
    num_padding_tokens: int = 0
    num_padding_columns: int = 1
    causal: bool = True
    sliding_window: int | None = None
    chunk_size: int | None = None
    positions: str | None = None
    holes: tuple[tuple[int, int], ...] = ()
    context_parallel: tuple[int, int, int] | None = None
    scale: float | None = None
    logits_soft_cap: float | None = None
    sinks: bool = False
    k_scale: str | None = None
    v_scale: str | None = None
    q_dtype: str = "float32"
    kv_dtype: str = "float32"
    stored_as: str | None = None
    max_query_len: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The options that are passed on as they are."""
        names = ("causal", "sliding_window", "chunk_size", "logits_soft_cap", "context_parallel", "max_query_len")
        return {name: getattr(self, name) for name in names}


def _vary(name: str, values: dict[str, dict[str, Any]], **base: Any) -> list[AttentionCase]:
    return [AttentionCase(f"{name}-{key}", **{**base, **changes}) for key, changes in values.items()]


_DECODE: dict[str, Any] = {"kv_lens": (1, 7, 8, 9, 40)}
_MIXED: dict[str, Any] = {"kv_lens": (5, 33, 20, 64, 16), "query_lens": (5, 1, 20, 3, 1)}
_LONG: dict[str, Any] = {"kv_lens": (700, 1300, 512), "query_lens": (1, 70, 9), "block_size": 16}

LENGTHS = [
    AttentionCase("decode", **_DECODE),
    AttentionCase("decode-one-sequence", kv_lens=(23,)),
    AttentionCase("decode-one-token", kv_lens=(1,)),
    AttentionCase("decode-empty-sequences", kv_lens=(0, 12, 0, 5, 0)),
    AttentionCase("decode-all-empty", kv_lens=(0, 0)),
    AttentionCase("decode-long", kv_lens=(1025, 256, 255, 257, 3), block_size=16),
    AttentionCase("decode-padding-sequences", num_padding_sequences=3, **_DECODE),
    AttentionCase("prefill", kv_lens=(19,), query_lens=(19,)),
    AttentionCase("prefill-two-tiles", kv_lens=(100, 65), query_lens=(100, 65)),
    AttentionCase("prefill-exact-tiles", kv_lens=(128, 64), query_lens=(128, 64)),
    AttentionCase("prefill-chunked", kv_lens=(150, 90), query_lens=(70, 33)),
    AttentionCase("mixed", **_MIXED),
    AttentionCase("mixed-long", **_LONG),
    AttentionCase("mixed-empty-queries", kv_lens=(9, 14, 0, 21, 8), query_lens=(0, 14, 0, 1, 0)),
    AttentionCase("mixed-padding-tokens", num_padding_tokens=13, num_padding_sequences=2, **_MIXED),
    AttentionCase("only-padding", kv_lens=(0, 0), query_lens=(0, 0), num_padding_tokens=9),
    AttentionCase("speculative", kv_lens=(30, 31, 44), query_lens=(4, 3, 4), max_query_len=4),
    AttentionCase("ragged-single-queries", kv_lens=(30, 31, 44), query_lens=(1, 1, 1), max_query_len=1),
    AttentionCase("hint-on-queries", max_query_len=20, **_MIXED),
    AttentionCase("more-queries-than-keys", kv_lens=(3, 10, 0), query_lens=(5, 30, 4)),
    AttentionCase("wide-table", num_padding_columns=40, **_MIXED),
    AttentionCase("no-spare-column", num_padding_columns=0, **_MIXED),
    *_vary("block-size", {str(b): {"block_size": b} for b in (1, 2, 16, 32, 128, 256)}, **_MIXED),
]

SIZES = [
    *_vary(
        "heads",
        {f"{q}q{kv}kv": {"q_heads": q, "kv_heads": kv} for q, kv in ((1, 1), (6, 6), (8, 1), (14, 2), (6, 2))},
        **_MIXED,
    ),
    *_vary("head-dim", {str(d): {"head_dim": d} for d in (1, 64, 80, 96, 128, 256)}, **_MIXED),
    AttentionCase("v-head-dim-smaller", v_head_dim=8, v_storage_head_dim=8, **_MIXED),
    AttentionCase("v-head-dim-larger", v_head_dim=24, v_storage_head_dim=24, **_MIXED),
    AttentionCase("storage-padded", head_dim=10, storage_head_dim=16, v_storage_head_dim=16, **_MIXED),
    AttentionCase("storage-padded-decode", head_dim=10, storage_head_dim=16, v_storage_head_dim=16, **_DECODE),
    AttentionCase("storage-padded-v", v_head_dim=5, v_storage_head_dim=32, storage_head_dim=20, **_LONG),
    *[
        AttentionCase(
            f"shape-{name}",
            kv_lens=(40, 17),
            query_lens=(3, 1),
            q_heads=shape.q_heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            scale=shape.scale,
            logits_soft_cap=shape.logits_soft_cap,
            sinks=shape.has_sinks,
            sliding_window=shape.sliding_window and 16,
        )
        for name, shape in SHAPES.items()
        if name in ("Llama-3-8B", "Qwen2.5-0.5B", "Gemma-2-9B", "Gemma-3-1B", "gpt-oss-20b")
    ],
]

MASKS = [
    AttentionCase("not-causal", causal=False, **_MIXED),
    AttentionCase("not-causal-long", causal=False, **_LONG),
    *_vary("window", {str(w): {"sliding_window": w} for w in (1, 7, 8, 1000, 2**31 - 1)}, **_MIXED),
    *_vary("window-long", {str(w): {"sliding_window": w} for w in (1, 40, 300)}, **_LONG),
    AttentionCase("window-decode", sliding_window=5, **_DECODE),
    AttentionCase("window-decode-long", kv_lens=(1025, 256, 600), block_size=16, sliding_window=260),
    AttentionCase("window-not-causal", sliding_window=6, causal=False, **_MIXED),
    *_vary("chunk", {str(c): {"chunk_size": c} for c in (1, 8, 12, 1000)}, **_MIXED),
    AttentionCase("chunk-long", chunk_size=320, **_LONG),
    AttentionCase("chunk-decode", chunk_size=8, **_DECODE),
    AttentionCase("chunk-not-causal", chunk_size=12, causal=False, **_MIXED),
    AttentionCase("chunk-and-window", chunk_size=12, sliding_window=5, **_MIXED),
    AttentionCase("holes", holes=((1, 0), (1, 2), (3, 7), (0, 0)), **_MIXED),
    AttentionCase("holes-long", holes=((0, 3), (1, 20), (1, 0), (2, 31)), **_LONG),
    AttentionCase("holes-everywhere", kv_lens=(9, 12), holes=((0, 0), (0, 1))),
    AttentionCase("shuffled", positions="shuffled", **_MIXED),
    AttentionCase("shuffled-long", positions="shuffled", **_LONG),
    AttentionCase("shuffled-window", positions="shuffled", sliding_window=9, **_MIXED),
    AttentionCase("shuffled-holes", positions="shuffled", holes=((1, 1), (3, 2)), **_MIXED),
    AttentionCase("shuffled-decode", positions="shuffled", **_DECODE),
    AttentionCase("trimmed-window", positions="trimmed", sliding_window=9, **_MIXED),
    AttentionCase("trimmed-window-long", positions="trimmed", sliding_window=100, **_LONG),
]

CONTEXT_PARALLEL = [
    *[
        AttentionCase(f"context-{c}-{r}-{i}", context_parallel=(c, r, i), **_MIXED)
        for c, r, i in ((1, 0, 4), (2, 0, 1), (2, 1, 1), (2, 1, 8), (3, 2, 4), (4, 3, 2), (8, 7, 8))
    ],
    AttentionCase("context-long", context_parallel=(2, 1, 4), **_LONG),
    AttentionCase("context-decode", context_parallel=(3, 1, 2), **_DECODE),
    AttentionCase("context-window", context_parallel=(2, 0, 2), sliding_window=7, **_MIXED),
    AttentionCase("context-window-sees-nothing", context_parallel=(4, 2, 8), sliding_window=3, **_DECODE),
    AttentionCase("context-sinks", context_parallel=(4, 0, 8), sliding_window=3, sinks=True, **_DECODE),
    AttentionCase("context-not-causal", context_parallel=(2, 1, 1), causal=False, **_MIXED),
    AttentionCase("context-shuffled", context_parallel=(2, 1, 4), positions="shuffled", **_MIXED),
]

NUMBERS = [
    AttentionCase("scale", scale=0.7, **_MIXED),
    AttentionCase("soft-cap", logits_soft_cap=1.5, **_MIXED),
    AttentionCase("soft-cap-long", logits_soft_cap=0.5, scale=2.0, **_LONG),
    AttentionCase("sinks", sinks=True, **_MIXED),
    AttentionCase("sinks-decode", sinks=True, kv_lens=(0, 1, 40)),
    AttentionCase("sinks-long-window", sinks=True, sliding_window=64, **_LONG),
    AttentionCase("k-scale-tensor", k_scale="tensor", **_MIXED),
    AttentionCase("k-scale-head", k_scale="head", **_MIXED),
    AttentionCase("v-scale-head", v_scale="head", **_MIXED),
    AttentionCase("large-logits", scale=60.0, **_LONG),
    *[
        AttentionCase(
            f"{dtype}-as-{stored or dtype}-{k}-{v}", kv_dtype=dtype, stored_as=stored, k_scale=k, v_scale=v, **lengths
        )
        for dtype, stored, k, v, lengths in (
            ("bfloat16", None, None, None, _MIXED),
            ("bfloat16", "uint16", None, None, _LONG),
            ("float16", "uint16", None, None, _MIXED),
            ("float16", None, None, None, _DECODE),
            ("int8", None, "tensor", "tensor", _MIXED),
            ("int8", "uint8", "head", "head", _LONG),
            ("float8_e4m3fn", "uint8", "tensor", "head", _MIXED),
            ("float8_e4m3fn", "uint8", None, None, _LONG),
            ("float8_e4m3fn", None, "head", "tensor", _DECODE),
            ("float8_e5m2", "uint8", "head", "head", _MIXED),
        )
    ],
    AttentionCase("q-bfloat16", q_dtype="bfloat16", kv_dtype="bfloat16", stored_as="uint16", **_MIXED),
    AttentionCase("q-float16", q_dtype="float16", **_MIXED),
    AttentionCase(
        "everything",
        kv_dtype="float8_e4m3fn",
        stored_as="uint8",
        k_scale="head",
        v_scale="head",
        sinks=True,
        logits_soft_cap=2.0,
        sliding_window=50,
        chunk_size=400,
        holes=((1, 77),),
        num_padding_tokens=5,
        num_padding_sequences=2,
        head_dim=10,
        storage_head_dim=16,
        v_storage_head_dim=16,
        **_LONG,
    ),
]

CASES = LENGTHS + SIZES + MASKS + CONTEXT_PARALLEL + NUMBERS
