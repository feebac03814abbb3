"""What reserving blocks ahead saves: ``generate()`` over one traffic, with and without ``prediction_horizon``.

    python -m benchmarks.prediction --json FILE

256 requests at once, prompts and answers log-normal with medians 512 and 256 and sigma 1.0, both together cut at 4,096
tokens; prefix cache on, every prompt of its own. First with a model that computes nothing, so that only the library is
left: steps, round trips (calls of the control plane's programs), blocks out of the pool, in reserve or not, averaged
over the steps, refusals, and the time of the whole loop. Then tokens per second with the tiny Llama that ships with the
package, prompts and answers cut at 1,024 tokens. Times are medians of passes that take turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import traffic
from benchmarks.report import Row, argument_parser, publish
from pyagent_kv_jax import KVCacheConfig, KVCacheManager, ManagerOptions
from pyagent_kv_jax.manager import control_plane
from pyagent_kv_jax.models import load_model
from pyagent_kv_jax.serving import SamplingParams
from pyagent_kv_jax.serving.demo import demo_model_directory
from pyagent_kv_jax.serving.engine import Engine, EngineConfig
from pyagent_kv_jax.serving.generate import serve

REQUESTS, BUDGET, SEED = 256, 2_048, 0
HORIZON = 16
LONGEST_OF_NOTHING, LONGEST_OF_LLAMA = 4_096, 1_024
PASSES_OF_NOTHING, PASSES_OF_LLAMA = 7, 4
PROGRAMS = (
    "packed_step",
    "_admit",
    "_free",
    "_truncate",
    "_give_back",
    "_advance",
    "_fork",
    "_mark_cached",
    "_uncache",
)


class Nothing(nnx.Module):
    """A model that computes nothing, and always chooses token 1."""

    def __call__(self, tokens: Any, cache: Any, meta: Any, logits_at: Any = None) -> tuple[jax.Array, Any]:
        """Logits for four tokens."""
        rows = tokens.shape[0] if logits_at is None else logits_at.shape[0]
        return jnp.zeros((rows, 4)).at[:, 1].set(1.0), cache


class Run:
    """One engine over its own cache, warm."""

    def __init__(self, model: Any, make_config: Callable[..., KVCacheConfig], longest: int, horizon: int) -> None:
        lengths = traffic.lengths(REQUESTS, SEED, longest)
        num_blocks = int((-(-(lengths.prompts + lengths.outputs) // 16)).sum()) + REQUESTS
        config = make_config(num_blocks=num_blocks, max_num_reqs=REQUESTS, max_model_len=longest)
        self.horizon = horizon
        self.manager = KVCacheManager(config, ManagerOptions(prediction_horizon=horizon))
        self.engine = Engine(model, self.manager, EngineConfig(REQUESTS, BUDGET, token_buckets=(REQUESTS, BUDGET)))
        rng = np.random.default_rng(SEED)
        self.prompts = [rng.integers(0, 256, n).tolist() for n in lengths.prompts]
        self.sampling = [SamplingParams(max_tokens=int(n), ignore_eos=True) for n in lengths.outputs]
        self.engine.warm_up()

    def serve(self) -> tuple[float, dict[str, float]]:
        """Tokens per second of one pass over the traffic, the prefix cache empty; and the pass in counts."""
        self.manager.reset_prefix_cache()
        held: list[int] = []
        control, scheduled = self.manager._state._control, self.engine.scheduler.stats
        self.engine.on_step = lambda *_: held.append(self.manager.config.pool_blocks - control.num_free())
        before, refusals = self.manager.stats(), scheduled.num_refusals
        with Calls() as calls:
            began = time.perf_counter()
            results = serve(self.engine, self.prompts, self.sampling)
            seconds = time.perf_counter() - began
        after = self.manager.stats()
        return sum(len(result.token_ids) for result in results) / seconds, {
            "horizon": self.horizon,
            "steps": len(held),
            "round_trips": calls.number,
            "mean_blocks_held": round(statistics.mean(held), 1),
            "most_blocks_held": max(held),
            "refusals": scheduled.num_refusals - refusals,
            "prediction_hits": after.num_prediction_hits - before.num_prediction_hits,
            "prediction_misses": after.num_prediction_misses - before.num_prediction_misses,
        }


class Calls:
    """Counts calls of the control plane's programs while it is entered."""

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> Calls:
        self._patches = [mock.patch.object(control_plane, name, self._counted(name)) for name in PROGRAMS]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()

    def _counted(self, name: str) -> Any:
        program = getattr(control_plane, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.number += 1
            return program(*args, **kwargs)

        return call


def compare(model: Any, make_config: Callable[..., KVCacheConfig], longest: int, passes: int) -> tuple[Row, list[Any]]:
    """A token of the loop, with and without; and both passes in counts."""
    runs = [Run(model, make_config, longest, horizon) for horizon in (0, HORIZON)]
    speeds: dict[int, list[float]] = {run.horizon: [] for run in runs}
    counts: dict[int, dict[str, float]] = {}
    for number in range(passes):
        for run in runs if number % 2 else runs[::-1]:
            speed, counts[run.horizon] = run.serve()
            speeds[run.horizon].append(speed)
    plain, ahead = (1e6 / statistics.median(speeds[run.horizon]) for run in runs)
    case = f"a token of generate(), {type(model).__name__}, {REQUESTS} requests, reserving for {HORIZON} steps"
    return Row(case, ahead, "the same without", plain), [counts[run.horizon] for run in runs]


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    args: Any = argument_parser(__doc__).parse_args(argv)
    sizes = partial(KVCacheConfig, num_layers=1, num_heads=1, head_dim=1)
    row, (plain, ahead) = compare(Nothing(), sizes, LONGEST_OF_NOTHING, PASSES_OF_NOTHING)
    for count in (plain, ahead):
        print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in count.items()))
    trips = plain["round_trips"] / ahead["round_trips"]
    more = ahead["mean_blocks_held"] / plain["mean_blocks_held"] - 1
    print(f"{trips:.1f} times fewer round trips, {more:+.2%} blocks held")
    with demo_model_directory() as directory:
        model, _ = load_model(directory)
    llama, _ = compare(model, model.config.kv_cache_config, LONGEST_OF_LLAMA, PASSES_OF_LLAMA)
    publish([row, llama], args.json, counts=[plain, ahead], times_fewer_round_trips=round(trips, 1))


if __name__ == "__main__":
    main()
