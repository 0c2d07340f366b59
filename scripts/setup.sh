# Sourced by serve.sh and test.sh: virtual environments with SGLang and this package, made once and then reused.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\n== %s\n' "$*"; }

# What a bare Debian or Ubuntu lacks: a compiler, the library that SGLang's kernels link to, what makes uv's environment,
# and what asks the server.
install_system_packages() {
  local packages=()
  command -v c++ >/dev/null || packages+=(g++)
  command -v uv >/dev/null || python3 -c 'import ensurepip' 2>/dev/null || packages+=(python3-venv)
  command -v curl >/dev/null || packages+=(curl)
  /sbin/ldconfig -p | grep -q 'libnuma\.so\.1' || packages+=(libnuma1)
  [ ${#packages[@]} -eq 0 ] && return
  say "Installing ${packages[*]}"
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "This machine lacks ${packages[*]}. Install them (Debian: sudo apt-get install ${packages[*]}), then run this again." >&2
    exit 1
  fi
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y "${packages[@]}"
}

# Prints the path of uv: the machine's own, or one installed under .cache.
find_uv() {
  if ! command -v uv; then
    [ -x .cache/uv/bin/uv ] || { python3 -m venv .cache/uv && .cache/uv/bin/pip install --quiet uv; } >&2
    echo .cache/uv/bin/uv
  fi
}

# Prints the path of nvcc: the machine's, or the one that SGLang's dependencies bring as a wheel; nothing if none.
find_nvcc() {
  command -v nvcc || ls /usr/local/cuda/bin/nvcc "$1"/lib/python3*/site-packages/nvidia/cu13/bin/nvcc 2>/dev/null | head -n 1
}

# make_environment VENV SGLANG_VERSION EXTRAS: creates VENV unless it is there complete, then builds what has changed of
# this package into it. The build needs torch, so it is not isolated; its tools lie outside the environments because
# their place is part of the build's cache: so build/editable serves all of them, and nothing is compiled twice.
make_environment() {
  local venv=$PWD/$1 wanted="sglang==$2" tools=$PWD/.cache/build-tools uv nvcc
  install_system_packages
  uv=$(find_uv)
  if [ "$(cat "$venv/.complete" 2>/dev/null)" != "$wanted" ]; then
    say "Installing $wanted into $1"
    rm -rf "$venv"
    "$uv" venv --quiet --python '>=3.10,<3.14' "$venv"
    "$uv" pip install --quiet --python "$venv" "$wanted"
    echo "$wanted" >"$venv/.complete"
  fi
  [ -x "$tools/bin/ninja" ] ||
    "$uv" pip install --quiet --python "$venv" --target "$tools" 'cmake>=3.24,<4' 'scikit-build-core>=0.11' ninja
  nvcc=${CUDACXX:-$(find_nvcc "$venv")}
  say "Building flashcore-sglang into $1 (${nvcc:-no nvcc: CPU kernels only})"
  PATH="$tools/bin:$PATH" PYTHONPATH=$tools CUDACXX=$nvcc TORCH_PYTHON=${TORCH_PYTHON:-$venv/bin/python} \
    "$uv" pip install --quiet --python "$venv" --no-build-isolation --reinstall-package flashcore-sglang --editable ".$3"
}
