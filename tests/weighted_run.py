"""finetune.py with samples whose tokens weigh: weighted_run.py WEIGHTS and finetune.py's flags (see steps/test_weighted_on_ranks.py).

WEIGHTS: "uneven", or a number that every token weighs. Of uneven samples the first weighs 200, ten times as much as all others
together, so that the ranks of its step are far from alike; tokens of the others weigh from 0.1 to 0.5, and of every sixth sample 1.
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from finetune.samples import rendered_samples  # noqa: E402

IGNORE = -100


def weighted(kind: str) -> type:
    class Weighted(rendered_samples.Samples):
        def __init__(self, *given):
            super().__init__(*given)
            self.weight_sums = np.array([self.weight_sum(i) for i in range(len(self))])

        def token_weights(self, i):
            length = len(self[i][0])
            if kind != "uneven":
                return np.full(length, float(kind), np.float32)
            if i == 0:
                return np.full(length, 200, np.float32)
            return None if i % 6 == 1 else np.linspace(0.1, 0.5, length, dtype=np.float32)

        def weight_sum(self, i) -> float:
            counts, weights = self[i][1][1:] != IGNORE, self.token_weights(i)
            return float(counts.sum() if weights is None else weights[1:][counts].sum(dtype=np.float64))

    return Weighted


if __name__ == "__main__":
    import runpy

    kind = sys.argv.pop(1)
    rendered_samples.Samples = weighted(kind)
    sys.argv[0] = str(ROOT / "finetune.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
