"""tests/parity.py in one precision, with a verdict that bf16 can have.

    python -m tests.gpu.parity CASES --dtype float32|bfloat16 [--grouped] [--lora]

fp32 has tests/parity.py's own tolerances. In bf16 some tokens go to other experts than in fp32, so single numbers say
little and one small case can be far off: the medians over all cases and coins have to be small, every number finite.
"""

import argparse
import re
import statistics
import subprocess
import sys

from tests.gpu import ROOT

ROW = re.compile(r"^\S+\s+(?:none|all|mixed)\s+(.*)")
PARAMETER = re.compile(r"^    \S+\s+(\S+)$")
# medians; rounding alone gives 2e-2, 1e-2 (nats, losses of 5 to 10) and 3e-2 (relative)
BF16_MEDIANS = {"diffusion loss": 5e-2, "AR loss": 3e-2, "gradient norms": 1e-1}


def main() -> int:
    """Run, print one line of figures, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--grouped", action="store_true")
    parser.add_argument("--lora", action="store_true")
    args = parser.parse_args()
    command = [sys.executable, "tests/parity.py", args.cases, "--dtype", args.dtype, "--verbose"]
    command += [f"--{option}" for option in ("grouped", "lora") if getattr(args, option)]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sys.stderr.write(run.stdout)
    lines = run.stdout.splitlines()
    rows = [[float(cell) for cell in m[1].split()[:5]] for line in lines if (m := ROW.match(line))]
    norms = [float(m[1]) for line in lines if (m := PARAMETER.match(line))]
    if run.returncode or not rows or not norms:
        return 1
    names, columns = tuple(BF16_MEDIANS), [[row[0] for row in rows], [row[1] for row in rows], norms]
    figures = [
        f"{name} {statistics.median(column):.1e} (largest {max(column):.1e})"
        for name, column in zip(names, columns, strict=True)
    ]
    print(f"FIGURE median difference over {len(rows)} runs: {', '.join(figures)}")
    medians = dict(zip(names, map(statistics.median, columns), strict=True))
    return int(args.dtype == "bfloat16" and any(medians[name] > limit for name, limit in BF16_MEDIANS.items()))


if __name__ == "__main__":
    sys.exit(main())
