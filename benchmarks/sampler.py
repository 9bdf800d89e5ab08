"""The image-level stream at any size: time of a draw, of a step's batch, of a start in mid-run; memory.

    python benchmarks/sampler.py [--repeats 7]

Sizes take turns; microseconds a draw are the median of the repeats (min .. max), each over 20,000 draws. The
memory is what `tracemalloc` sees of building the sampler and drawing. A step is LVIS's: 16 items of 16.
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from collections.abc import Callable, Sequence

from clis.data.sampling import BlockSampler, JointSampler, Sampler, UniformSampler

SIZES = (10**5, 10**6, 10**7, 10**8, 10**9)
DRAWS = 20_000
STREAMS: dict[str, Callable[[int], Sampler]] = {
    "shuffle": lambda n: UniformSampler(n, seed=0),
    "shuffle in blocks of 4,096": lambda n: BlockSampler(n, 4096, seed=0),
}


def microseconds(work: Callable[[int], object], first: int, count: int) -> float:
    began = time.perf_counter()
    for k in range(first, first + count):
        work(k)
    return (time.perf_counter() - began) / count * 1e6


def kilobytes(make: Callable[[int], Sampler], n: int) -> float:
    tracemalloc.start()
    sampler = make(n)
    for k in range(1000):
        sampler.draw(k)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / 1e3


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args(argv)
    print(
        "| stream | images | draw, us | step 0, us | step 80,000, us | peak kB |\n|---|--:|--:|--:|--:|--:|"
    )
    kinds = [(name, n) for n in SIZES for name in STREAMS]
    samplers = {(name, n): STREAMS[name](n) for name, n in kinds}
    times: dict[tuple[str, int], list[list[float]]] = {kind: [[], [], []] for kind in kinds}
    for _ in range(arguments.repeats):
        for kind in kinds:
            joint = JointSampler(samplers[kind], samplers[kind], images_per_step=16, s=16, seed=0)
            times[kind][0].append(microseconds(samplers[kind].draw, 7 * kind[1], DRAWS))
            for place, step in enumerate((0, 80_000), start=1):
                times[kind][place].append(microseconds(joint.items, step, 20))
    for name, n in kinds:
        cells = [
            f"{statistics.median(values):.1f} ({min(values):.1f} .. {max(values):.1f})"
            for values in times[name, n]
        ]
        print(f"| {name} | {n:,} | {' | '.join(cells)} | {kilobytes(STREAMS[name], n):.0f} |", flush=True)


if __name__ == "__main__":
    main()
