"""Write the API reference as HTML pages, from the docstrings: every name that a public module exports, and no other.

    pip install -e '.[docs]' && python scripts/build_api_reference.py docs/api

Then open ``docs/api/index.html``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

PUBLIC_MODULES = (
    "pyagent_kv_jax",
    "pyagent_kv_jax.flax",
    "pyagent_kv_jax.flax.linen",
    "pyagent_kv_jax.tables",
    "pyagent_kv_jax.pool",
    "pyagent_kv_jax.cache",
    "pyagent_kv_jax.distributed",
    "pyagent_kv_jax.distributed.handoff",
    "pyagent_kv_jax.manager",
    "pyagent_kv_jax.models",
    "pyagent_kv_jax.serving",
    "pyagent_kv_jax.serving.handoff",
    "pyagent_kv_jax.pictures",
    "pallas_kernels",
)


def main() -> None:
    """Write the pages into the folder named on the command line."""
    from pdoc import pdoc, render

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the pages; index.html is the first")
    out = parser.parse_args().out
    render.configure(docformat="google", footer_text="pyagent_kv_jax", show_source=True)
    # Modules with a function of their own name in them (serving.generate, paged_attention) would else get pages too.
    beside = [rf"!{package}\.(?!handoff)" for package in ("pyagent_kv_jax.serving", "pyagent_kv_jax.pictures")]
    pdoc(*PUBLIC_MODULES, *beside, r"!pallas_kernels\.", output_directory=out)
    print(f"{out / 'index.html'}: {len(list(out.rglob('*.html')))} pages")


if __name__ == "__main__":
    main()
