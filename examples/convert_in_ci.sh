#!/usr/bin/env bash
# Convert in CI on Linux: no Mac, no GPU, no MLX needed.
#
#     examples/convert_in_ci.sh SOURCE OUTPUT [options of requant convert]
#
# Stops at the first problem. After an interruption the same command resumes. For GitHub Actions: examples/convert-workflow.yml.
set -euo pipefail
source=$1 output=$2
shift 2

requant plan "$source" "$@" --json >"$output.plan.json"  # reports every problem before data is read
requant convert "$source" "$output" "$@" --max-memory 2GB --json >"$output.report.json"
requant verify "$output"            # compares every tensor with the record in OUTPUT
requant verify "$source" "$output"  # and with a repeated conversion
python - "$output.plan.json" "$output.report.json" <<'PYTHON'
import json, sys
plan, report = (json.load(open(path)) for path in sys.argv[1:])
assert plan["hash"] == report["plan_hash"], "the plan that was reviewed is not the one executed"
worst = max((x["error"]["relative_rms"] for x in report["layers"] if x["error"]), default=0)
print(f"{report['bits_per_weight']:.2f} bits per weight, largest relative error of a layer {worst:.1%}")
sys.exit("the error of a layer is over 25 %" if worst > 0.25 else 0)  # choose your own threshold
PYTHON
