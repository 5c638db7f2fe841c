#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes .venv ready to run and test the package: system libraries, the virtual environment, pinned
# requirements, the package itself. Every step is skipped when it is done already, so a second run
# neither installs nor asks the network for anything.
#
#   PYTHON    the interpreter to build .venv with (python3)
#   PIP_ARGS  further arguments for pip install, for instance an index that holds a CPU-only torch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
PIP_ARGS=${PIP_ARGS:-}
VENV=.venv
STATE=$VENV/.setup    # one file per finished step, holding what the step was done for
PACKAGE=tts_policy

say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 1; }

is_done() { [ -f "$STATE/$1" ] && [ "$(cat "$STATE/$1")" = "$2" ]; }
mark_done() { mkdir -p "$STATE" && echo "$2" > "$STATE/$1"; }

# Sets version (3.11), ros (the distribution whose rclpy is used, or wheels) and sim (yes or no).
look_around() {
    command -v "$PYTHON" > /dev/null || die "$PYTHON is not on this machine: install Python 3.10 or newer"
    # Where a virtual environment is active (this one, even), the interpreter below it is meant.
    PYTHON=$("$PYTHON" -c 'import sys; print(sys._base_executable)')
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "$PYTHON is Python $version, but 3.10 or newer is needed: make setup PYTHON=python3.12"

    ros=wheels
    if [ -n "${ROS_DISTRO:-}" ] && [ -n "${AMENT_PREFIX_PATH:-}" ]; then
        "$PYTHON" -c 'import rclpy, lifecycle_msgs, trajectory_msgs' 2> /dev/null ||
            die "ROS $ROS_DISTRO is sourced, but $PYTHON ($version) cannot import its rclpy and" \
                "messages: use its Python, or a shell in which it is not sourced"
        ros=$ROS_DISTRO
    elif ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info >= (3, 14))'; then
        die "there are no rclpy wheels for Python $version: use 3.10 to 3.13, or source a ROS installation"
    fi

    sim=yes
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info >= (3, 13))'; then
        sim=no
    fi
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    else
        sudo "$@"
    fi
}

install_system_packages() {
    local missing=() install
    "$PYTHON" -c 'import ensurepip, venv' 2> /dev/null || missing+=("python$version-venv")
    if [ "$sim" = yes ] && ! PATH=$PATH:/sbin:/usr/sbin ldconfig -p | grep -q 'libOSMesa\.so\.8'; then
        missing+=(libosmesa6)    # draws the simulated camera without a screen or a GPU
    fi
    [ ${#missing[@]} -gt 0 ] || return 0

    install="apt-get install --yes --no-install-recommends ${missing[*]}"
    command -v apt-get > /dev/null ||
        die "missing here: ${missing[*]} (Debian's names); install them and run this again"
    if [ "$(id -u)" != 0 ]; then
        command -v sudo > /dev/null && { sudo -n true 2> /dev/null || [ -t 0 ]; } ||
            die "system packages are missing; as root, run: apt-get update && $install"
    fi
    say "installing system packages: ${missing[*]}"
    as_root apt-get update -qq || say 'apt-get update failed; going on with the lists that are here'
    # shellcheck disable=SC2086  # one word per package
    as_root env DEBIAN_FRONTEND=noninteractive $install ||
        die "system packages could not be installed; as root, run: apt-get update && $install"
}

make_venv() {
    local want
    want="$("$PYTHON" -c 'import sys; print(sys.version.split()[0], sys.base_prefix)') ros=$ros"
    is_done venv "$want" && [ -x $VENV/bin/python ] && return 0
    if [ -f $STATE/venv ]; then
        say "$VENV was made for $(cat $STATE/venv); making it anew for $want"
        rm -rf $VENV
    fi
    say "making $VENV ($want)"
    if [ "$ros" = wheels ]; then
        "$PYTHON" -m venv $VENV
    else
        "$PYTHON" -m venv --system-site-packages $VENV
    fi
    mark_done venv "$want"
}

pip_install() {
    $VENV/bin/python -m pip install --disable-pip-version-check "$@"
}

install_requirements() {
    local want args=()
    local files=(requirements/{base,build,sim,datasets,test}.txt)
    [ "$ros" != wheels ] || files+=(requirements/ros.txt)
    want=$(cat requirements/*.txt | sha256sum)
    is_done requirements "$want $PIP_ARGS" && return 0
    [ "$sim" = yes ] ||
        say "Python $version: the simulator is left out (its numpy 1.26 ends at Python 3.12)"
    say 'installing pinned requirements (some minutes, mostly torch)'
    for file in "${files[@]}"; do
        args+=(--requirement "$file")
    done
    # shellcheck disable=SC2086  # PIP_ARGS is a list of words
    pip_install $PIP_ARGS --constraint requirements/constraints.txt "${args[@]}"
    # shellcheck disable=SC2086
    pip_install $PIP_ARGS --no-deps --requirement requirements/robosuite.txt
    mark_done requirements "$want $PIP_ARGS"
}

# The package is installed as links to the working tree, as colcon's --symlink-install does: what
# runs is what stands in the editor, and only a change of the build files installs it again.
install_package() {
    local want share=$VENV/share index
    want=$(cat setup.py setup.cfg pyproject.toml package.xml scripts/setup.sh | sha256sum)
    is_done package "$want $PWD" && return 0
    say "installing $PACKAGE"
    $VENV/bin/python -m pip install --disable-pip-version-check --quiet --no-deps \
        --no-build-isolation --editable .

    index=$share/ament_index/resource_index/packages
    mkdir -p $index $share/$PACKAGE $VENV/lib/$PACKAGE
    cp resource/$PACKAGE $index/
    for entry in package.xml launch config models; do
        ln -sfn "$PWD/$entry" "$share/$PACKAGE/$entry"
    done
    # `ros2 run` looks for a package's commands in lib/PACKAGE.
    $VENV/bin/python -c "
from importlib.metadata import distribution
print(*(entry.name for entry in distribution('$PACKAGE').entry_points), sep='\\n')
" | while read -r command; do
        ln -sfn "../../bin/$command" "$VENV/lib/$PACKAGE/$command"
    done
    mark_done package "$want $PWD"
}

look_around
install_system_packages
make_venv
install_requirements
install_package
