"""The Triton programs that a function lowers to, read as Triton will read them; wants no GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax._src.lib.mlir import ir
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from jaxlib.triton import dialect

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
A100 = AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu")


class Offset(NamedTuple):
    """A pointer that some kernel makes: into an array of ``size`` elements, at an offset of ``bits`` bits, signed."""

    kernel: str
    size: int
    bits: int

    @property
    def reaches_all(self) -> bool:
        return self.size <= 1 << (self.bits - 1)


def offsets(function: Callable[..., Any], *arguments: Any, device: AbstractDevice = H100) -> list[Offset]:
    """Of every kernel of ``function``, lowered for ``device``; ``arguments`` are trees of ``ShapeDtypeStruct``."""
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    calls = [op for op in _within(lowered.compiler_ir().operation) if "triton" in str(_target(op))]
    return [offset for call in calls for offset in _offsets_of(call)]


def _target(op: Any) -> Any:
    return op.attributes["call_target_name"] if op.name == "stablehlo.custom_call" else None


def _within(op: Any) -> Iterator[Any]:
    for region in op.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from _within(inner.operation)


def _offsets_of(call: Any) -> Iterator[Offset]:
    """The arguments of a kernel are the operands of its call, then the results."""
    sizes = [math.prod(ir.RankedTensorType(x.type).shape) for x in (*call.operands, *call.results)]
    config = ir.DictAttr(call.attributes["mhlo.backend_config"])
    with ir.Context() as context:
        dialect.register_dialect(context)
        context.load_all_available_dialects()
        program = ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes)
        for op in _within(program.operation):
            if op.name == "tt.addptr":
                kind = op.operands[1].type
                element = kind.element_type if isinstance(kind, ir.RankedTensorType) else kind
                yield Offset(ir.StringAttr(config["name"]).value, sizes[_argument(op)], ir.IntegerType(element).width)


def _argument(op: Any) -> int:
    """Which argument of its kernel the pointer that ``op`` makes leads to."""
    while not isinstance(op, ir.Block):
        value = op.operands[0]
        op = value.owner if isinstance(value.owner, ir.Block) else value.owner.operation
    return ir.BlockArgument(value).arg_number
