"""Paired timing: both sides in one process, turn by turn, so that a slow spell of the machine falls on both."""

import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np


def paired(sides: Mapping[str, Callable[[], object]], *, rounds: int = 15, warmup: int = 3) -> dict[str, np.ndarray]:
    """Seconds of every side in each round; sides take turns, and the order alternates from round to round.

    Each callable must return only when its work is done (call `block_until_ready`).
    """
    for _ in range(warmup):
        for run in sides.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds):
        names = list(sides) if round_ % 2 == 0 else list(sides)[::-1]
        for name in names:
            start = time.perf_counter()
            sides[name]()
            times[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in times.items()}


def report(title: str, times: Mapping[str, np.ndarray], *, ours: str, target: str, units: float | None = None, unit: str = "tok/s") -> float:
    """Print a line for each side and one for the ratio other / ours (above 1: ours is faster); return its median."""
    print(title)
    for name, values in times.items():
        p10, median, p90 = np.percentile(values, [10, 50, 90])
        rate = f"  {units / median:12,.0f} {unit}" if units else ""
        print(f"  {name:<28} median {median * 1e3:9.2f} ms   p10 {p10 * 1e3:9.2f}   p90 {p90 * 1e3:9.2f}{rate}")
    other = next(name for name in times if name != ours)
    ratios = times[other] / times[ours]
    print(
        f"  {other} / {ours}: median {np.median(ratios):.2f} (p10 {np.percentile(ratios, 10):.2f}, "
        f"p90 {np.percentile(ratios, 90):.2f}); target {target}"
    )
    return float(np.median(ratios))


def header(script: str) -> None:
    """Print where this was measured."""
    import jax

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor()
    )
    print(
        f"{script}: {time.strftime('%Y-%m-%d')}, {cpu}, {len(jax.devices())} x {jax.devices()[0].device_kind}, "
        f"jax {jax.__version__}, python {platform.python_version()}"
    )
