"""The scripts of docs/how-to/several-machines.md, run by stand-in schedulers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import requant
from tests.support.checkpoints import MICRO_LLAMA, ROOT, tree

PAGE = (ROOT / "docs" / "how-to" / "several-machines.md").read_text()
BLOCKS = {
    title: re.findall(r"^```(?:bash|yaml)\n(.*?)^```", text, re.M | re.S)
    for title, text in re.findall(r"^## ([\w ]+)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
}
# A job array whose tasks run one after another, in another order than their numbers.
SBATCH = """#!/bin/bash
for word in "$@"; do
  case $word in
    --export=ALL,*) for pair in ${word#--export=ALL,}; do export ${pair//,/ }; done ;;
    --wrap=*) eval "${word#--wrap=}"; exit ;;
    --dependency=*|--parsable) ;;
    *) script=$word ;;
  esac
done
range=$(sed -n 's/^#SBATCH --array=//p' "$script")
export SLURM_ARRAY_TASK_COUNT=$(( ${range#*-} - ${range%-*} + 1 )) SLURM_CPUS_PER_TASK=1
for SLURM_ARRAY_TASK_ID in $(seq "${range#*-}" -1 "${range%-*}"); do
  export SLURM_ARRAY_TASK_ID
  bash "$script" || exit
done
echo 4711
"""
REQUANT = f"""#!/bin/sh
exec {sys.executable} -m requant "$@"
"""
SSH = """#!/bin/sh
shift
exec "$@"
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """An environment with the commands, a source and an output."""
    (tmp_path / "bin").mkdir()
    for name, text in {"sbatch": SBATCH, "requant": REQUANT, "ssh": SSH}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    paths = {"SOURCE": str(MICRO_LLAMA), "OUTPUT": str(tmp_path / "out")}
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **paths, "PATH": path, "HOSTS": "one two three"}


def run(script: str, env: dict[str, str], cwd: Path) -> None:
    done = subprocess.run(["bash", "-e", "-c", script], env=env, cwd=cwd, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def check(tmp_path: Path, **options: object) -> None:
    requant.convert(MICRO_LLAMA, tmp_path / "one", bits=4, **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


def test_slurm(env: dict[str, str], tmp_path: Path) -> None:
    script, submission = BLOCKS["SLURM"]
    (tmp_path / "parts.sh").write_text(script)
    run(submission, env, tmp_path)
    check(tmp_path, search="best")


def test_slurm_with_a_budget(env: dict[str, str], tmp_path: Path) -> None:
    """The array is submitted twice: parts measure, then they convert."""
    script, _ = BLOCKS["SLURM"]
    (submission,) = BLOCKS["A budget"]
    (tmp_path / "budget.sh").write_text(script.replace("--bits 4 --search best", "--budget 4.5"))
    run(submission, env, tmp_path)
    requant.convert(MICRO_LLAMA, tmp_path / "one", budget=4.5)
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


def test_statistics(env: dict[str, str], tmp_path: Path) -> None:
    (script,) = BLOCKS["Statistics and GPTQ"]
    script = script.replace("--hessian", "--hessian --tokens 4096")
    statistics = tmp_path / "stats.safetensors"
    run(script, {**env, "STATISTICS": str(statistics)}, tmp_path)
    requant.calibrate(MICRO_LLAMA, tmp_path / "one.safetensors", hessian=True, tokens=4096)
    assert statistics.read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    requant.convert(MICRO_LLAMA, tmp_path / "one", bits=3, gptq=True, statistics=statistics)
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


def test_kubernetes(env: dict[str, str], tmp_path: Path) -> None:
    (text,) = BLOCKS["Kubernetes"]
    job = yaml.safe_load(text)["spec"]
    assert job["completionMode"] == "Indexed"
    (container,) = job["template"]["spec"]["containers"]
    named = {entry["name"] for entry in container["env"]}
    assert named == {"SOURCE", "OUTPUT"}
    for index in reversed(range(job["completions"])):
        command = [*container["command"], *container["args"]]
        subprocess.run(command, env={**env, "JOB_COMPLETION_INDEX": str(index)}, check=True)
    run('requant join "$OUTPUT" --quiet', env, tmp_path)
    check(tmp_path, search="best")


def test_ssh(env: dict[str, str], tmp_path: Path) -> None:
    (script,) = BLOCKS["ssh"]
    run(script, env, tmp_path)
    check(tmp_path)
