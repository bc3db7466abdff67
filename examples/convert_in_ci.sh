#!/usr/bin/env bash
# Convert in CI on Linux: no Mac, no GPU, no MLX needed.
#
#     examples/convert_in_ci.sh SOURCE OUTPUT [what requant convert takes]
#
# A first job may print the plan for review; this one stops at the first thing that is wrong. Run
# again after a stop, it resumes. For GitHub Actions: examples/convert-workflow.yml.
set -euo pipefail
source=$1 output=$2
shift 2

requant plan "$source" "$@" --json >"$output.plan.json"  # every problem, before data is read
requant convert "$source" "$output" "$@" --max-memory 2GB --json >"$output.report.json"
requant verify "$output"            # every tensor against the record written with it
requant verify "$source" "$output"  # and against the conversion done again
python - "$output.plan.json" "$output.report.json" <<'PYTHON'
import json, sys
plan, report = (json.load(open(path)) for path in sys.argv[1:])
assert plan["hash"] == report["plan_hash"], "the plan that was reviewed is not the one executed"
worst = max((x["error"]["relative_rms"] for x in report["layers"] if x["error"]), default=0)
print(f"{report['bits_per_weight']:.2f} bits per weight, worst layer off by {worst:.1%}")
sys.exit("the error of a layer is over 25 %" if worst > 0.25 else 0)  # a threshold of your own
PYTHON
