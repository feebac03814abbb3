"""``pyagent-kv``: generate from a model directory, or see the demo."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyagent_kv_jax.errors import InvalidArgumentError, KVCacheError
from pyagent_kv_jax.serving.sampling import SamplingParams


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 after an error of this library, 130 when interrupted."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except (KVCacheError, OSError) as error:
        print(f"pyagent-kv: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pyagent-kv: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pyagent-kv", description="Text from a Flax model through a paged KV cache.")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_generate(commands)
    demo = commands.add_parser("demo", help="serve 48 prompts densely and paged, at equal memory; needs no download")
    demo.add_argument("--out", default=".", help="folder for kv_cache_blocks.png, or the name of a .png")
    demo.set_defaults(run=_demo)
    return parser


def _add_generate(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "generate", help="answer prompts", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.add_argument("--model", required=True, help="Hugging Face directory: config, safetensors, tokenizer.json")
    prompts = command.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    prompts.add_argument("--prompts", metavar="FILE", help="a file with one prompt a line")
    command.add_argument("--max-tokens", type=int, default=128, help="tokens to generate for each prompt")
    command.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    command.add_argument("--top-k", type=int, default=None, help="sample among the k best tokens")
    command.add_argument("--top-p", type=float, default=1.0, help="sample among the best tokens of this share")
    command.add_argument("-n", "--samples", type=int, default=1, help="answers to each prompt, which they share")
    command.add_argument("--seed", type=int, default=None, help="makes sampling repeatable")
    command.add_argument("--ignore-eos", action="store_true", help="go on after the model's end token")
    command.add_argument("--stream", action="store_true", help="show text as it comes (one prompt only)")
    command.add_argument("--max-num-seqs", type=int, default=64, help="prompts served at once")
    command.add_argument("--token-budget", type=int, default=256, help="tokens computed in one step with prefill")
    command.add_argument("--num-blocks", type=int, default=None, help="blocks of the cache (default: as many as used)")
    command.add_argument("--block-size", type=int, default=16, help="tokens of one block, on each dcp rank")
    command.add_argument(
        "--mesh",
        metavar="AXES",
        help="spread weights and cache over devices: dcp=2,tp=2 (tokens over dcp, heads over tp)",
    )
    command.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> None:
    sampling = SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        max_tokens=args.max_tokens,
        ignore_eos=args.ignore_eos,
        n=args.samples,
    )
    prompts = args.prompt if args.prompts is None else _read_prompts(Path(args.prompts))
    if args.stream and len(prompts) * sampling.n != 1:
        raise InvalidArgumentError(f"--stream: got {len(prompts)} prompts, {sampling.n} answers each, want 1 and 1")

    from pyagent_kv_jax.distributed import CacheSharding
    from pyagent_kv_jax.serving.generate import fitting_cache_config
    from pyagent_kv_jax.serving.text import LLM

    sharding = None if args.mesh is None else CacheSharding.of(_mesh(args.mesh))
    llm = LLM.load(args.model, sharding=sharding)
    lengths = [len(llm.encode(prompt)) + sampling.max_tokens for prompt in prompts for _ in range(sampling.n)]
    max_num_seqs = min(args.max_num_seqs, len(lengths))
    ranks = 1 if sharding is None else sharding.context_size
    config = fitting_cache_config(
        llm.model,
        lengths,
        max_num_seqs=max_num_seqs,
        sharding=sharding,
        num_blocks=args.num_blocks,
        block_size=args.block_size * ranks,
    )
    results = llm.generate(
        prompts,
        sampling,
        on_text=(lambda _, piece: print(piece, end="", flush=True)) if args.stream else None,
        cache_config=config,
        mesh=sharding,
        max_num_seqs=max_num_seqs,
        token_budget=args.token_budget,
        progress=not args.stream and sys.stderr.isatty(),
    )
    if args.stream:
        print()
        return
    for prompt, result in zip(prompts, results, strict=True):
        if len(prompts) > 1:
            print(f">>> {prompt}")
        for number, answer in enumerate((result, *result.other_samples), 1):
            print(f"[{number}] {answer.text}" if sampling.n > 1 else answer.text)


def _mesh(text: str) -> Any:
    """The mesh of ``dcp=2,tp=2``, of this process's first devices (those of all processes, where there are several)."""
    import jax

    try:
        pairs = [(name.strip(), int(size)) for name, size in (part.split("=") for part in text.split(","))]
    except ValueError:
        raise InvalidArgumentError(f"--mesh: got {text!r}, want axes and their sizes, as in dcp=2,tp=2") from None
    sizes = dict(pairs)
    if len(sizes) < len(pairs):
        raise InvalidArgumentError(f"--mesh: got {text!r}, want each axis once")
    count, devices = math.prod(sizes.values()), jax.devices()
    if min(sizes.values()) < 1 or count > len(devices):
        hint = f"; on CPUs, JAX_NUM_CPU_DEVICES={count} makes as many" if devices[0].platform == "cpu" else ""
        raise InvalidArgumentError(f"--mesh: got {text!r}, want sizes of at least 1, of {len(devices)} devices{hint}")
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=auto, devices=devices[:count])


def _read_prompts(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    empty = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if empty or not lines:
        where = f"line {empty[0]} is empty" if empty else "no line at all"
        raise InvalidArgumentError(f"{path}: {where}, want one prompt a line")
    return lines


def _demo(args: argparse.Namespace) -> None:
    from pyagent_kv_jax.serving.demo import run_demo

    run_demo(args.out)


if __name__ == "__main__":
    sys.exit(main())
