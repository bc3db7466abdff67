# Sourced by the other scripts: a virtual environment in .venv with requant and the extras
# named in $1. Installs again only when what was installed from has changed: an editable
# install remembers which file holds which module, so a moved module counts too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=$1
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
stamp=.venv/requant-$extras.stamp
sources=$(find pyproject.toml CMakeLists.txt src/native -type f | sort)
state=$( (cat $sources && find src/requant -name '*.py' | sort) | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$state" ]; then
  echo "Installing requant[$extras] into .venv ..."
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
  echo "$state" >"$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
