"""Measured kernels beside what the device allows: its memory bandwidth, and its arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from pyagent_kv_jax.errors import InvalidArgumentError
from pyagent_kv_jax.pictures import style

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")


class KernelPoint(NamedTuple):
    """One measured call.

    Attributes:
        label: what was run.
        microseconds: of one call.
        num_bytes: that it has to read and write.
        flops: floating-point operations that it has to do; 0 of a copy.
    """

    label: str
    microseconds: float
    num_bytes: float
    flops: float = 0.0

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.num_bytes

    @property
    def bytes_a_second(self) -> float:
        """Reached."""
        return self.num_bytes / self.microseconds * 1e6

    @property
    def flops_a_second(self) -> float:
        """Reached."""
        return self.flops / self.microseconds * 1e6


def kernel_points(report: Mapping[str, Any]) -> list[KernelPoint]:
    """The points of a report of ``benchmarks.kernels`` (its JSON): each case once, those of other cases left out.

    Its rows say ``num_bytes`` and ``flops``; those that do not are left out.
    """
    points = {}
    for row in report["rows"]:
        if row.get("num_bytes"):
            points[row["case"]] = KernelPoint(row["case"], row["ours_us"], row["num_bytes"], row.get("flops") or 0.0)
    return list(points.values())


def roofline(
    points: Iterable[KernelPoint],
    bytes_a_second: float,
    flops_a_second: float | None = None,
    *,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw kernels under the roof of what the device allows, both axes logarithmic.

    The roof is the bandwidth of a copy as measured, times operations a byte, and flat at the measured rate of a matrix
    product. Calls that compute nothing (copies, gathers) stand in a strip on the left, by their bandwidth.

    Args:
        points: measured calls.
        bytes_a_second: of a copy, read and written, as measured on the device.
        flops_a_second: of a matrix product, as measured. None: the roof has no flat part.
        title: above the picture.
        ax: where to draw. None: a new ``style.Picture``.

    Raises:
        InvalidArgumentError: no points, or a number that is not positive.
    """
    points = list(points)
    numbers = [bytes_a_second, *([] if flops_a_second is None else [flops_a_second])]
    numbers += [value for point in points for value in (point.microseconds, point.num_bytes)]
    if not points or not all(np.isfinite(value) and value > 0 for value in numbers):
        raise InvalidArgumentError("roofline: want points, and times, bytes and rates above 0")
    figure, ax = style.panel(ax, 8.0, 4.2 + 0.19 * (len(points) + 2))
    computing = [point for point in points if point.flops > 0]
    lowest, highest = _range(computing, bytes_a_second, flops_a_second)
    _draw_roof(ax, lowest, highest, bytes_a_second, flops_a_second)
    strip = lowest / 2.2
    copies = iter(strip * np.geomspace(1 / 1.4, 1.4, max(len(points) - len(computing), 1)))
    for i, point in enumerate(points):
        computes = point.flops > 0
        x = point.intensity if computes else next(copies)
        reached = point.flops_a_second if computes else point.bytes_a_second * lowest
        allowed = _allowed(point, bytes_a_second, flops_a_second)
        ax.plot(
            [x],
            [reached],
            linestyle="none",
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=8,
            markerfacecolor=style.owner_color(i),
            markeredgecolor=style.INK,
            zorder=4,
            label=f"{point.label}: {point.microseconds:,.4g} µs, {allowed / point.microseconds:.0%} of the limit",
        )
    style.plain(ax, grid="both")
    ax.set(xscale="log", yscale="log")
    ax.set_xlabel("operations a byte moved", fontsize=style.TEXT_SIZE)
    ax.set_ylabel("operations a second", fontsize=style.TEXT_SIZE)
    if len(computing) < len(points):
        ax.axvspan(strip / 1.6, strip * 1.6, color=style.EMPTY, zorder=0)
        ax.text(
            strip,
            -0.025,
            "copies:\nbandwidth only",
            transform=ax.get_xaxis_transform(),
            ha="center",
            va="top",
            fontsize=style.SMALL_SIZE,
        )
        ax.xaxis.set_minor_locator(NullLocator())
        ax.plot([strip / 1.6, strip * 1.6], [bytes_a_second * lowest] * 2, color=style.INK, linewidth=2)
        ax.set_xlim(strip / 1.6, highest)
    else:
        ax.set_xlim(lowest, highest)
    reached_all = [p.flops_a_second if p.flops > 0 else p.bytes_a_second * lowest for p in points]
    ax.set_ylim(min([*reached_all, bytes_a_second * lowest]) / 2, ax.get_ylim()[1])
    style.titled(ax, title or "Kernels under what the device allows")
    ax.legend(loc="upper left", bbox_to_anchor=(0, -0.13), frameon=False, fontsize=style.SMALL_SIZE)
    return figure


def _range(computing: list[KernelPoint], bytes_a_second: float, flops_a_second: float | None) -> tuple[float, float]:
    """Operations a byte, from and to, so that all points and the corner of the roof are seen."""
    seen = [point.intensity for point in computing] or [1.0]
    if flops_a_second is not None:
        seen.append(flops_a_second / bytes_a_second)
    return 10 ** np.floor(np.log10(min(seen) / 1.5)), max(seen) * 6


def _draw_roof(ax: Axes, lowest: float, highest: float, bytes_a_second: float, flops_a_second: float | None) -> None:
    x = np.geomspace(lowest, highest, 200)
    roof = x * bytes_a_second
    ax.plot(x, np.minimum(roof, flops_a_second or np.inf), color=style.INK, linewidth=2, zorder=3)
    name = f"copy, measured: {_rate(bytes_a_second)}B/s"
    ax.plot([], [], color=style.INK, linewidth=2, label=name)
    if flops_a_second is not None:
        ax.plot(x, np.full(len(x), flops_a_second), color=style.INK, linewidth=1, linestyle=":", zorder=2)
        ax.plot(
            [], [], color=style.INK, linestyle=":", label=f"matrix product, measured: {_rate(flops_a_second)}FLOP/s"
        )


def _allowed(point: KernelPoint, bytes_a_second: float, flops_a_second: float | None) -> float:
    """Microseconds that the device would need at least."""
    seconds = point.num_bytes / bytes_a_second
    return 1e6 * max(seconds, point.flops / flops_a_second if flops_a_second else 0.0)


def _rate(value: float) -> str:
    for power, letter in ((12, "T"), (9, "G"), (6, "M")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {letter}"
    return f"{value:.3g} "
