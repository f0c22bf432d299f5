"""All benchmarks, one after the other, each in a process of its own; their figures as Markdown.

python -m benchmarks.run
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def figures(name: str) -> dict:
    result = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(result.stdout[result.stdout.index("{") :])


if __name__ == "__main__":
    print("| benchmark | figure | |\n| --- | --- | --- |")
    for name in ("fit", "second_moments", "align", "encode", "train", "serve"):
        for label, value in figures(name).items():
            print(f"| {name} | {label} | {value} |", flush=True)
