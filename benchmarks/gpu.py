"""Checks omninorm on a GPU: `PYTHONPATH=src python3 benchmarks/gpu.py [--quick] [--json FILE]`, or `make gpu`.

The check needs only Python, torch >= 2.10 and Triton. It runs unattended in at most 8 minutes (4 with --quick), and
writes the JSON file after every measurement. The parts, the most valuable first:

    numerics   every kernel against float64
    speed      forward, backward and add-norm against torch, torch.compile, Liger, quack and copy bandwidth
    training   tokens/s of a Thinker of 124 million weights in bfloat16, with our norms and torch's, compiled and not
    watch      the overhead of monitoring, the waits of the host for the device, CUDA graphs
    tests      statements about layers, models and training on the device, then the test suite if pytest is installed
    trace      a profile of a few training steps

The work runs in a separate process. If it crashes or hangs, the item is recorded as failed, and the check continues
with the next one. If the command is run again with the same options, it continues with the missing items.
`python benchmarks/gpu_page.py FILE` turns the file into a page.

Without a GPU, `--device cpu` with TRITON_INTERPRET=1, or `--device simgpu`, runs all parts on tiny sizes. This only
checks the script; the times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]  # for gpu_check, and for helpers shared with the tests

PARTS = ("numerics", "speed", "training", "watch", "tests", "trace")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="fewer sizes, and only the first four parts")
    parser.add_argument("--device", choices=["cuda", "cpu", "simgpu"], default="cuda")
    parser.add_argument("--parts", help=f"run only these parts, comma-separated: {','.join(PARTS)}")
    parser.add_argument("--json", type=Path, help="the file of the results (default: a new temporary file)")
    parser.add_argument("--peers", type=Path, help="a folder with wheels of Liger, quack and their dependencies")
    # Internal options of the processes that the check starts: the time at which the process that measures must end, the
    # folder with the jobs of one that only compiles, and the variant that one trains.
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--warm", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.parts = tuple(options.parts.split(",")) if options.parts else None
    for name in options.parts or ():
        if name not in PARTS:
            parser.error(f"--parts must be some of {', '.join(PARTS)}, got {name!r}")
    if options.peers is not None and not options.peers.is_dir():
        parser.error(f"--peers must be a folder of wheels, got {str(options.peers)!r}")
    if options.json is None:
        options.json = Path(tempfile.mkdtemp(prefix="omninorm-gpu-")) / "gpu.json"
    return options


def main() -> int:
    options = parse()
    if options.warm:
        from gpu_check.warming import warm

        return warm(options)
    if options.variant:
        from gpu_check.variants import run_variant

        return run_variant(options)
    if options.worker:
        from gpu_check.worker import work

        return work(options)
    from gpu_check.supervisor import supervise

    return supervise(options)


if __name__ == "__main__":
    raise SystemExit(main())
