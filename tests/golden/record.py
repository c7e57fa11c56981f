"""Write down the first steps of the tiny run: its completions, and the losses they gave.

    python tests/golden/record.py tests/golden/demo.json

`tests/test_golden.py` trains on these completions and compares. demo.json was recorded at 5ef90c7,
with every prompt computed once a completion; to record it again is to say that the mathematics
have changed.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from virft_fast import train

STEPS = 4
METRICS = ("loss", "grad_norm", "kl", "reward", "entropy")
CONFIG = Path(__file__).parents[2] / "virft_fast/demo.yaml"
ARGUMENTS = ["--config", str(CONFIG), "--max_steps", str(STEPS), "--eval_samples", "8"]


def main(path: str) -> None:
    steps = []
    train_step = train.train_step

    def recording(state, prompts):
        drawn = []
        generate = state.rollout.generate

        def keep(*args, **kwargs):
            drawn.append(generate(*args, **kwargs))
            return drawn[-1]

        state.rollout.generate = keep
        metrics, records = train_step(state, prompts)
        del state.rollout.generate
        (rollouts,) = drawn
        rows = zip(rollouts.completion_ids, rollouts.completion_mask, strict=True)
        steps.append(
            {name: metrics[name] for name in METRICS}
            | {"completions": [ids[mask].tolist() for ids, mask in rows]}
        )
        return metrics, records

    train.train_step = recording
    with tempfile.TemporaryDirectory() as folder:
        assert train.main([*ARGUMENTS, "--output_dir", folder]) == 0
    Path(path).write_text(json.dumps(steps, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
