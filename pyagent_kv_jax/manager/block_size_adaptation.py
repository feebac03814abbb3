"""Which block size the traffic wants: small blocks waste less memory, large ones are read and named at less cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from pallas_kernels.tuning import parameters
from pyagent_kv_jax.config import DeviceType, KVCacheConfig
from pyagent_kv_jax.errors import ConfigError, InvalidArgumentError

_PERCENT = {"8": 120, "16": 111, "32": 106, "64": 104, "128": 100}
"""Attention time of a token by block size, where the tuning table knows none: decode on a CPU of 2 cores, pages of 8.

The kernel reads the same pages whatever a block is; those of one block stand side by side, which is what helps.
"""
_IMPLEMENTATION = {DeviceType.CPU: "xla", DeviceType.CUDA: "triton", DeviceType.TPU: "mosaic_tpu"}
_TABLE_ENTRY_BYTES = 4


def attention_times(config: KVCacheConfig) -> dict[int, float]:
    """Attention time of a token by block size, relative to blocks of 128: from the tuning table, or a rule.

    The table has it as percentages, under the operation ``attention_time``.
    """
    kind = config.device_type.devices()[0].device_kind
    shape = {"head_dim": config.head_dim, "itemsize": config.kv_dtype.itemsize}
    percent = parameters("attention_time", _IMPLEMENTATION[config.device_type], kind, shape, _PERCENT)
    return {int(size): value / 100 for size, value in percent.items()}


class BlockSizeChooser:
    """Weighs block sizes by the lengths of requests it has seen, recent ones more. On the host; not thread-safe.

    A size costs bytes times seconds: the memory that a request takes (its blocks with the empty ends of the last ones,
    and its tables), which limits how many run at once, times the attention time of a token.

        cost(size) = mean over requests of [blocks * block bytes + table bytes] * time(size)

    Attributes:
        block_size: the one in use. Whoever carries out a change sets it.
    """

    def __init__(
        self,
        config: KVCacheConfig,
        *,
        largest: int = 128,
        relative_times: Mapping[int, float] | None = None,
        sparse_entry_bytes: float | None = None,
        half_life: int = 4096,
        least_gain: float = 0.02,
    ) -> None:
        """Nothing seen yet.

        Args:
            config: of the cache; its block size is the one in use.
            largest: the largest candidate.
            relative_times: attention time of a token by block size, in any unit; between those given it is interpolated
                over the logarithm, beyond them it is as at the last. Where blocks are kept in runs
                (``KVCacheManager.defragment(runs=True, below=...)``) all take the same: ``{1: 1.0}``. None:
                ``attention_times(config)``.
            sparse_entry_bytes: bytes of table a block held takes. None: tables are dense, and a request takes a row of
                ``max_model_len`` tokens, 4 bytes a block.
            half_life: lengths after which one counts half.
            least_gain: share of the cost that another size must save to be chosen, so that the choice does not flap.

        Raises:
            ConfigError: a bound, a time or a share that cannot be.
        """
        page = config.page_size
        if not isinstance(largest, int) or largest < 1:
            raise ConfigError(f"largest: got {largest!r}, want an integer of at least 1")
        if not half_life > 0 or not 0 <= least_gain < 1:
            raise ConfigError(f"got half_life {half_life!r}, least_gain {least_gain!r}, want > 0 and 0 <= gain < 1")
        times = attention_times(config) if relative_times is None else dict(relative_times)
        if not times or min(times) < 1 or min(times.values()) <= 0:
            raise ConfigError(f"relative_times: got {times}, want positive times of positive sizes")
        self.block_size = config.block_size
        self._candidates = range(page, min(largest, config.pages_per_layer * page) + 1, page)
        self._config = config
        self._entry_bytes = sparse_entry_bytes
        self._half_life, self._least_gain = half_life, least_gain
        self._times = sorted(times.items())
        self._seen = np.zeros(-(-config.max_model_len // page) + 1)  # by pages, which all candidates are multiples of

    def observe(self, lengths: Iterable[int] | np.ndarray) -> None:
        """Take note of the tokens that requests hold, or held at their end; of 0 nothing is to be learned.

        Raises:
            InvalidArgumentError: not integers from 0 to ``max_model_len``.
        """
        values = np.asarray(lengths if isinstance(lengths, np.ndarray) else list(lengths))
        most = self._config.max_model_len
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
            raise InvalidArgumentError(f"lengths: got {values.dtype}{list(values.shape)}, want integers [n]")
        wrong = values[(values < 0) | (values > most)]
        if len(wrong):
            raise InvalidArgumentError(f"lengths: got {wrong[:5].tolist()}, want 0 to {most}")
        values = values[values > 0].astype(np.int64)
        pages = np.bincount(-(-values // self._config.page_size), minlength=len(self._seen))
        self._seen = self._seen * 0.5 ** (len(values) / self._half_life) + pages

    @property
    def sizes(self) -> list[int]:
        """The candidates, ascending: multiples of the kernel block size, and the size in use."""
        return sorted({*self._candidates, self.block_size})

    def costs(self) -> dict[int, float]:
        """Bytes of a request times relative seconds of a token, by candidate; empty before anything was seen."""
        if not self._seen.any():
            return {}
        return {size: self._bytes(size) * self._time(size) for size in self.sizes}

    def choose(self) -> int:
        """The size that costs least; the one in use unless it saves at least ``least_gain``."""
        costs = self.costs()
        best = min(costs, key=lambda size: costs[size], default=self.block_size)
        if best == self.block_size or costs[best] > (1 - self._least_gain) * costs[self.block_size]:
            return self.block_size
        return best

    def _time(self, size: int) -> float:
        known, times = zip(*self._times, strict=True)
        return float(np.interp(np.log2(size), np.log2(known), times))

    def _bytes(self, size: int) -> float:
        """Of blocks and tables of a request, on the average."""
        config, pages = self._config, np.flatnonzero(self._seen)
        columns = -(-pages // (size // config.page_size))
        blocks = np.zeros(len(pages))
        for group in config.groups:
            span = group.sliding_window or group.chunk_size
            # n tokens in a row touch (n - 1) / size + 1 blocks, on the average over where they begin.
            blocks += columns if span is None else np.minimum(columns, (span - 1) / size + 1)
        if self._entry_bytes is None:
            table = np.full(len(pages), len(config.groups) * -(-config.max_model_len // size) * _TABLE_ENTRY_BYTES)
        else:
            table = blocks * self._entry_bytes
        block_bytes = config.block_size_bytes() * size / config.block_size
        return float(np.average(blocks * block_bytes + table, weights=self._seen[pages]))
