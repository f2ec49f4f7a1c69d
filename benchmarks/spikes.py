"""Which steps of finished runs `watch.spike` would have reported.

python benchmarks/spikes.py runs/*/metrics.jsonl
python benchmarks/spikes.py --spike 6 runs/quickstart/metrics.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gemma_xla.config_watch import WatchSection
from gemma_xla.train.metrics import read_metrics
from gemma_xla.train.spikes import spikes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="METRICS")
    parser.add_argument("--spike", type=float, default=WatchSection().spike, help="deviations (default: %(default)s)")
    args = parser.parse_args()
    for file in args.files:
        steps = [record for record in read_metrics(file) if "loss" in record]
        found = {record["step"]: spikes(record, steps[:i], args.spike) for i, record in enumerate(steps)}
        found = {step: marks for step, marks in found.items() if marks}
        print(f"{file}: {len(found)} of {len(steps)} steps")
        for step, marks in found.items():
            print(f"    {step}: {', '.join(f'{name} {far:.1f}' for name, far in marks.items())}")


if __name__ == "__main__":
    main()
