# Shared by .ci/run and .ci/full. Sourced, not run.

venvs=${CI_VENVS:-$(mktemp -d)}
[ -n "${CI_VENVS:-}" ] || trap 'rm -rf "$venvs"' EXIT

unset PYTHONDONTWRITEBYTECODE  # each process would compile what is tested, and pytest rewrite it, again

say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

# find_python X.Y: a working interpreter of that version, from PATH or from pyenv.
find_python() {
  local candidate
  for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python python3; do
    if [ "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$1" ]; then
      echo "$candidate"
      return
    fi
  done
  echo "no Python $1 here: install it, or put it on PATH" >&2
  return 1
}

# make_venv X.Y: sets $venv to the folder of an environment that does not have shardlab in it yet.
make_venv() {
  local python
  python=$(find_python "$1")
  venv="$venvs/py$1"
  rm -rf "$venv"
  "$python" -m venv "$venv"
}

# need_chromium: the distribution's browser and its driver, for the tests marked `browser`.
need_chromium() {
  if command -v chromedriver >/dev/null && { command -v chromium || command -v google-chrome; } >/dev/null; then
    return
  fi
  local root=()
  [ "$(id -u)" = 0 ] || root=(sudo)
  "${root[@]}" apt-get update -q
  "${root[@]}" apt-get install -q -y --no-install-recommends chromium chromium-driver
}

# wire_tests VENV: the tests marked `wire`, as root, with iproute2.
wire_tests() {
  local root=()
  [ "$(id -u)" = 0 ] || root=(sudo)
  if ! { command -v ip && command -v tc; } >/dev/null; then
    "${root[@]}" apt-get update -q
    "${root[@]}" apt-get install -q -y --no-install-recommends iproute2
  fi
  "${root[@]}" "$1/bin/pytest" -p no:cacheprovider -m wire
}

# lint VENV: rules, format, types.
lint() { "$1/bin/ruff" check . && "$1/bin/ruff" format --check . && "$1/bin/mypy"; }

# readme_command VENV: the command that the README gives, in VENV instead of .venv.
readme_command() {
  local command
  command=$(sed -n 's/^\(python3 -m venv .*pytest.*\)$/\1/p' README.md | head -n 1)
  [ -n "$command" ] || { echo "README.md has no line that sets up and runs pytest" >&2; return 1; }
  command=${command//python3 -m venv .venv/true}
  echo "${command//.venv/$1}"
}

# set_up_beside X.Y: an environment with what the README's command installs, while another is set up; from a copy of
# the tree, so that two builds do not meet in one.
set_up_beside() {
  local copy command
  copy=$(mktemp -d)
  cp -r pyproject.toml README.md LICENSE shardlab .ci "$copy"
  make_venv "$1"
  command=$(readme_command "$venv")
  (cd "$copy" && eval "${command%% && "$venv"/bin/pytest*}")
  rm -rf "$copy"
}

# readme_test_command VENV [pytest arguments]: all of it.
readme_test_command() {
  local venv=$1 command
  shift
  command=$(readme_command "$venv")
  [ $# -eq 0 ] || command+=$(printf ' %q' "$@")
  echo "+ $command"
  eval "$command"
}
