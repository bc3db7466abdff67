# Sourced by the other scripts: a virtual environment in .venv with requant and the extras
# named in $1. Installs again only when what was installed from has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=$1
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
stamp=.venv/requant-$extras.stamp
state=$(find pyproject.toml CMakeLists.txt src/native -type f | sort | xargs cat | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$state" ]; then
  echo "Installing requant[$extras] into .venv ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
  echo "$state" >"$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
