"""The demo for several seeds: docs/demo_curves.png and docs/demo_curves.json.

python scripts/demo_curves.py --out docs
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from virft_fast.report import write_curves
from virft_fast.train import main as train

ROOT = Path(__file__).parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of figure and figures")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/demo_curves")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    args, more = parser.parse_known_args()
    curves, figures = {}, {}
    for seed in args.seeds:
        run = args.runs / f"seed{seed}"
        config = ["--config", str(ROOT / "virft_fast/demo.yaml"), "--output_dir", str(run)]
        status = train([*config, "--seed", str(seed), *more])
        if status:
            return status
        lines = (run / "metrics.jsonl").read_text().splitlines()
        curves[f"seed {seed}"] = [json.loads(line) for line in lines]
        figures[f"seed {seed}"] = json.loads((run / "summary.json").read_text())
    write_curves(args.out / "demo_curves.png", curves, "rewards/accuracy_iou")
    (args.out / "demo_curves.json").write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
