# Sourced by quickstart, test and check: find a Python, make .venv once, and install the extras that the caller names.
#
# A stamp of pyproject.toml, constraints.txt and the extras shows whether an installation is needed, so a second run starts
# at once. All paths are relative to the checkout, so the scripts work from any directory.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3.14 python3 python; do
        [ -n "$candidate" ] || continue
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    echo "ncclbench needs Python 3.11 or later with venv (tested: 3.11 to 3.13); none was found. Name one with PYTHON=/path/to/python" >&2
    return 3
}

# prepare EXTRAS: a .venv with the checkout (editable) and these extras.
prepare() {
    local extras="$1" stamp python
    if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c 'import pip' >/dev/null 2>&1; then
        python="$(find_python)" || return $?
        echo "making $venv with $python" >&2
        "$python" -m venv --clear "$venv"
    fi
    stamp="$(cat "$root/pyproject.toml" "$root/constraints.txt" | "$venv/bin/python" -c '
import hashlib, sys
print(hashlib.sha256(sys.stdin.buffer.read() + sys.argv[1].encode()).hexdigest())' "$root $extras")"
    if ! grep -qsx "$stamp" "$venv/ncclbench-installed"; then
        echo "installing ncclbench[$extras] (a few minutes the first time)" >&2
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            --constraint "$root/constraints.txt" --editable "$root[$extras]"
        echo "$stamp" >>"$venv/ncclbench-installed"
    fi
    export PATH="$venv/bin:$PATH"
}

# prepare_mpich: a second environment with MPICH and without torch. Two MPI libraries cannot share one environment.
prepare_mpich() {
    local other="$root/.venv-mpich"
    if [ ! -x "$other/bin/mpiexec" ]; then
        echo "making $other" >&2
        "$venv/bin/python" -m venv --clear "$other"
        "$other/bin/python" -m pip install --quiet --disable-pip-version-check \
            --constraint "$root/constraints.txt" mpi4py mpich click defusedxml ml_dtypes msgspec numpy packaging pandas \
            psutil pyarrow pyyaml rich scipy ||
            { rm -rf "$other"; return 1; }
    fi
    export NCCLBENCH_MPICH_PYTHON="$other/bin/python"
}

# prepare_chromium: the browser of tests/browser, from Debian's packages. It is installed on the system, so only with
# NCCLBENCH_INSTALL_CHROMIUM=1. Without a browser those tests are skipped with the reason.
prepare_chromium() {
    if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then
        return
    fi
    if [ "${NCCLBENCH_INSTALL_CHROMIUM:-0}" != 1 ]; then
        echo "no chromium: the browser tests are skipped (NCCLBENCH_INSTALL_CHROMIUM=1 installs it, as root on Debian)" >&2
        return
    fi
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "chromium can only be installed by root on Debian: the browser tests are skipped" >&2
        return
    fi
    apt-get update -qq >&2 &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            chromium chromium-driver fonts-dejavu-core poppler-utils >&2 ||
        echo "chromium could not be installed: the browser tests are skipped" >&2
}
