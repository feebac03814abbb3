"""Prefill in one process, decode in another: two processes on this machine, and what travels between them.

    python examples/handoff.py

The prefill process computes prompts and keeps their KV blocks; the decode process fetches the blocks it lacks, computes
what follows the last full one, and generates. Its tokens are compared with those of one instance that does it all.
Needs the extra ``handoff``: ``pip install "pyagent-kv-jax[handoff]"``.
"""

from __future__ import annotations

import multiprocessing
import secrets
from multiprocessing.connection import Connection

import jax

from pyagent_kv_jax.manager.kv_cache_manager import KVCacheManager
from pyagent_kv_jax.models import load_model, load_tokenizer
from pyagent_kv_jax.serving.demo import demo_model_directory
from pyagent_kv_jax.serving.engine import Engine, EngineConfig
from pyagent_kv_jax.serving.generate import GenerationResult, serve
from pyagent_kv_jax.serving.handoff import DecodeInstance, PrefillServer, RemoteLink, model_fingerprint
from pyagent_kv_jax.serving.sampling import SamplingParams
from pyagent_kv_jax.serving.token_equality import compare_tokens

SYSTEM = "The if statement is used for conditional execution. It selects exactly one of the suites by evaluating "
PROMPTS = [
    SYSTEM + "the expressions one by one until one is found to be true",
    SYSTEM + "the expressions; then that suite is executed",
    "The while statement is used for repeated execution as long as an expression is true",
    SYSTEM + "the expressions one by one until one is found to be true, and no other part of it is evaluated",
]
ANSWER = SamplingParams(max_tokens=24, ignore_eos=True)


def make_engine() -> tuple[Engine, str]:
    """An engine of the demo model, and the name of its weights: the same in both processes."""
    with demo_model_directory() as directory:
        model, config = load_model(directory)
    sizes = EngineConfig(max_num_seqs=4, token_budget=64, with_margins=True)
    # Four rows more than the engine uses: each transfer under way takes one.
    cache = KVCacheManager(config.kv_cache_config(num_blocks=128, block_size=16, max_num_reqs=8, max_model_len=256))
    return Engine(model, cache, sizes), model_fingerprint(model)


def prefill(to_parent: Connection, token: str) -> None:
    """The prefill process: serves until it is ended."""
    server = PrefillServer(*make_engine(), token)
    to_parent.send(server.address)
    server.serve(until=to_parent.poll)  # anything from the parent, or its end
    server.close()
    to_parent.send(f"{server.instance.stats}, leases left open: {len(server.instance.leases)}")


def decode(to_parent: Connection, token: str) -> None:
    """The decode process: answers all prompts by handoff, then once more by itself."""
    engine, name = make_engine()
    address = to_parent.recv()
    with demo_model_directory() as directory:
        tokenizer = load_tokenizer(directory)
    prompts = [tokenizer.encode(text).ids for text in PROMPTS]
    instance = DecodeInstance(engine, RemoteLink(address, token, engine), name, on_failure="fail")
    # One after another, so that later prompts find what earlier ones brought.
    requests = [instance.generate([prompt], ANSWER)[0] for prompt in prompts]
    instance.close()
    lines = [
        f"prompt of {len(prompt):3} tokens: {request.num_fetched} blocks sent, {request.num_present} already there"
        f" -> {tokenizer.decode(request.token_ids)[:48]!r}"
        for prompt, request in zip(prompts, requests, strict=True)
    ]
    engine.backend.reset_prefix_cache()
    reference = serve(engine, prompts, ANSWER)  # as a single instance does it
    answers = [GenerationResult(request.token_ids, "length", 0) for request in requests]

    def regenerate(known: list[list[int]], lengths: list[int]) -> list[GenerationResult]:
        return serve(engine, known, [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths])

    comparison = compare_tokens(prompts, reference, answers, regenerate)
    block_bytes = engine.backend.config.block_size_bytes()
    sent = sum(request.num_fetched for request in requests)
    spared = sum(request.num_present for request in requests)
    lines.append(f"{sent} blocks ({sent * block_bytes / 1024:.0f} KiB) sent, {spared} spared because they were there")
    lines.append(f"beside a single instance: {comparison}")
    to_parent.send((lines, comparison.equal))


def main() -> None:
    """Start both, print what they tell, and end them whatever happens."""
    context, token = multiprocessing.get_context("spawn"), secrets.token_hex()
    from_prefill, to_prefill = context.Pipe()
    from_decode, to_decode = context.Pipe()
    processes = [
        context.Process(target=prefill, args=(to_prefill, token), daemon=True),
        context.Process(target=decode, args=(to_decode, token), daemon=True),
    ]
    for process, its_end in zip(processes, (to_prefill, to_decode), strict=True):
        process.start()
        its_end.close()  # so that the process's end is noticed here
    try:
        address = from_prefill.recv()
        from_decode.send(address)
        print(f"prefill process {processes[0].pid} at {address}, on {jax.default_backend()}")
        lines, equal = from_decode.recv()
        print(f"decode process {processes[1].pid}", *lines, sep="\n")
        from_prefill.send("enough")
        print("prefill process:", from_prefill.recv())
    finally:
        for process in processes:
            process.kill()
            process.join()
    if not equal:
        raise SystemExit("the tokens differ")


if __name__ == "__main__":
    main()
