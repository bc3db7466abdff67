# Sourced by the other scripts: a virtual environment in .venv with requant and the extras
# named in $1. Reinstalls only if its sources changed, or a Python module was added, moved or
# removed: an editable install records the file of each module.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=$1
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
pip() { .venv/bin/python -m pip --quiet --disable-pip-version-check "$@"; }
installed=.venv/requant.stamp with_extras=.venv/requant-$extras.stamp
sources=$(find pyproject.toml CMakeLists.txt src/native -type f | sort)
state=$( (cat $sources && find src/requant -name '*.py' | sort) | cksum)
if [ "$(cat "$installed" 2>/dev/null)" != "$state" ]; then
  echo "Installing requant[$extras] into .venv ..."
  rm -f .venv/requant*.stamp
  pip install --upgrade pip
  pip install --editable ".[$extras]"
  echo "$state" >"$installed"
  touch "$with_extras"
elif [ ! -e "$with_extras" ]; then
  echo "Installing what requant[$extras] needs into .venv ..."
  pip install "requant[$extras]" # requant is there: only what its extras name is fetched
  touch "$with_extras"
fi
export PATH="$PWD/.venv/bin:$PATH"
