"""A decode step's attention with the context spread over ranks: bytes exchanged and time, beside a gather of the KV.

    python -m benchmarks.dcp --json FILE

One layer of Llama-3-8B's heads, 4 sequences, context axis alone, by context length, number of ranks and form of
combining. The baseline leaves the cache spread as ours does and brings K and V to where the queries are: each rank
all-gathers those of every sequence and attends with its own heads. On CPUs the ranks are virtual devices that share the
same cores, so times there compare the two, and say nothing of how either would scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks.report import Row, argument_parser, median_us, medians_us, publish
from pallas_kernels import paged_attention, paged_gather
from pallas_kernels.paged_attention.shapes import SHAPES
from pyagent_kv_jax import AttentionMetadata, KVCacheConfig
from pyagent_kv_jax.distributed import CacheSharding, Combine, ShardedKVPages
from pyagent_kv_jax.distributed.batch import DCPPlanConfig, collectives_of

MODEL, SEQUENCES, SLOTS = SHAPES["Llama-3-8B"], 4, 16
CONTEXTS, RANKS = (512, 2048, 8192), (2, 4, 8)
_VIRTUAL_DEVICES = 8


@dataclasses.dataclass(frozen=True)
class Step:
    """A decode step over full contexts of ``context`` tokens, blocks scattered over the pool."""

    context: int
    sharding: CacheSharding

    @property
    def config(self) -> KVCacheConfig:
        """One layer; ``SLOTS`` slots of a block on each rank."""
        size = SLOTS * self.sharding.context_size
        return KVCacheConfig(
            num_layers=1,
            num_heads=MODEL.kv_heads,
            head_dim=MODEL.head_dim,
            num_blocks=SEQUENCES * self.context // size,
            block_size=size,
            max_num_reqs=SEQUENCES,
            max_model_len=self.context,
        )

    def inputs(self) -> tuple[Any, ...]:
        """(pages, q, k, v, meta), each where it belongs."""
        config, sharding, keys = self.config, self.sharding, jax.random.split(jax.random.key(0), 5)
        dtype = config.kv_dtype.jax_dtype
        heads = sharding.named(P(None, sharding.q_head_axes(MODEL.q_heads)))

        def random(key: Any, shape: tuple[int, ...], place: Any) -> jax.Array:
            return jax.jit(lambda: jax.random.normal(key, shape, dtype), out_shardings=place)()

        pages = ShardedKVPages.create(config, sharding)
        k_pages, v_pages = (
            random(key, stored.shape, stored.sharding)
            for key, stored in zip(keys, (pages.k_pages, pages.v_pages), strict=False)
        )
        q = random(keys[2], (SEQUENCES, MODEL.q_heads, MODEL.head_dim), heads)
        k, v = (random(key, (SEQUENCES, MODEL.kv_heads, MODEL.head_dim), sharding.replicated) for key in keys[3:])
        tables = np.random.default_rng(0).permutation(config.pool_blocks).reshape(SEQUENCES, -1).astype(np.int32)
        last = tables[:, -1] * config.block_size + config.block_size - 1
        meta = AttentionMetadata(
            block_tables=tables,
            kv_lens=np.full(SEQUENCES, self.context, np.int32),
            query_start_loc=None,
            slot_mapping=last.astype(np.int32),
            positions=np.full(SEQUENCES, self.context - 1, np.int32),
            ok=np.ones(SEQUENCES, bool),
            max_query_len=1,
            max_kv_len=self.context,
        )
        meta = jax.device_put(meta, sharding.replicated)
        return dataclasses.replace(pages, k_pages=k_pages, v_pages=v_pages), q, k, v, meta

    def ours(self, arguments: tuple[Any, ...]) -> Callable[[], Any]:
        """``ShardedKVPages.attend``, the pages donated as in a model's step."""
        pages, *others = arguments
        attend = jax.jit(lambda pages, *args: pages.attend(0, *args), donate_argnums=0)

        def call() -> jax.Array:
            nonlocal pages
            out, pages = attend(pages, *others)
            return out

        return call

    def gather_kv(self, arguments: tuple[Any, ...]) -> Callable[[], Any]:
        """K and V gathered, then each rank's own heads."""
        pages, q, _, _, meta = arguments
        sharding, ranks = self.sharding, self.sharding.context_size
        heads, page = P(None, sharding.q_head_axes(MODEL.q_heads)), sharding.page_spec()
        own = MODEL.q_heads // ranks
        kv_own = max(MODEL.kv_heads // ranks, 1)

        def attend(k_pages: Any, v_pages: Any, q: Any, tables: Any, kv_lens: Any) -> jax.Array:
            first = lax.axis_index("dcp") * own // (MODEL.q_heads // MODEL.kv_heads)
            k, v = (self._whole(stored, tables, first, kv_own) for stored in (k_pages, v_pages))
            columns = jnp.arange(tables.size, dtype=jnp.int32).reshape(tables.shape)
            return paged_attention(q, k, v, columns, kv_lens, max_kv_len=self.context)

        mapped = jax.jit(
            jax.shard_map(
                attend, mesh=sharding.mesh, in_specs=(page, page, heads, P(), P()), out_specs=heads, check_vma=False
            )
        )
        return lambda: mapped(pages.k_pages, pages.v_pages, q, meta.block_tables, meta.kv_lens)

    def _whole(self, pages: Any, tables: Any, first: Any, heads: int) -> Any:
        """Pages [columns, heads, block_size, d] of all ranks' tokens, in order, of the KV heads that are wanted."""
        parts = lax.all_gather(paged_gather(pages, tables.ravel()), "dcp")  # [C, columns, heads, slots, d]
        parts = lax.dynamic_slice_in_dim(parts, first, heads, axis=2)
        in_order = jnp.moveaxis(parts, 0, 3)  # interleave 1: slot i of rank r is token i * C + r
        return in_order.reshape(*in_order.shape[:2], -1, in_order.shape[-1])

    def bytes_of_kv(self) -> int:
        """Bytes that a rank receives to have all K and V."""
        ranks, itemsize = self.sharding.context_size, self.config.kv_dtype.itemsize
        whole = 2 * SEQUENCES * self.context * MODEL.kv_heads * MODEL.head_dim * itemsize
        return whole * (ranks - 1) // ranks

    def bytes_of_states(self) -> int:
        """Bytes that a rank receives in ours."""
        plan = DCPPlanConfig(self.config, self.sharding, MODEL.q_heads)
        return sum(each.received_bytes for each in collectives_of(plan, SEQUENCES, has_context=True))


def rows() -> Iterator[tuple[Row, dict[str, Any]]]:
    """A row for each context length, number of ranks and form; and its bytes."""
    for ranks in (size for size in RANKS if size <= len(jax.devices())):
        mesh = jax.make_mesh((ranks,), ("dcp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:ranks])
        for context in CONTEXTS:
            steps = {form: Step(context, CacheSharding(mesh, "dcp", combine=form)) for form in Combine}
            step = steps[Combine.ALL_TO_ALL]
            calls = {str(form): each.ours(each.inputs()) for form, each in steps.items()}
            np.testing.assert_allclose(calls["all_to_all"](), calls["reduce_scatter"](), atol=1e-4)
            times = medians_us(calls, repeats=15)
            # By itself: giving its memory back would slow down whichever call came next.
            times["gather"] = median_us(step.gather_kv(step.inputs()), repeats=5, warmup=1)
            for form, each in steps.items():
                received = {"bytes_received": each.bytes_of_states(), "bytes_of_gathered_kv": each.bytes_of_kv()}
                case = f"{ranks} ranks, {context} tokens, {form}: {_size(received['bytes_received'])}"
                baseline = f"gather of K and V: {_size(received['bytes_of_gathered_kv'])}"
                yield Row(case, times[str(form)], baseline, times["gather"]), {"case": case, **received}


def _size(count: int) -> str:
    power = min(int(math.log2(max(count, 1)) // 10), 3)
    return f"{count / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def main() -> None:
    """Run them all."""
    args = argument_parser(__doc__).parse_args()
    jax.config.update("jax_num_cpu_devices", _VIRTUAL_DEVICES)
    found = list(rows())
    publish([row for row, _ in found], args.json, exchanged=[exchanged for _, exchanged in found])


if __name__ == "__main__":
    main()
