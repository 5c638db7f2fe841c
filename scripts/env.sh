# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
# Source this file (bash) to run the package's commands by hand, as the Makefile does: it puts
# .venv/bin on the path and sets what ROS needs to find the package and to carry images.
# A value that is already set is kept.
_tts_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

case ":$PATH:" in
    *":$_tts_root/.venv/bin:"*) ;;
    *) export PATH="$_tts_root/.venv/bin:$PATH" ;;
esac
case ":${AMENT_PREFIX_PATH:-}:" in
    *":$_tts_root/.venv:"*) ;;
    *) export AMENT_PREFIX_PATH="$_tts_root/.venv${AMENT_PREFIX_PATH:+:$AMENT_PREFIX_PATH}" ;;
esac
export ROS_AUTOMATIC_DISCOVERY_RANGE="${ROS_AUTOMATIC_DISCOVERY_RANGE:-LOCALHOST}"
# Fast DDS 2 (Jazzy) reads the first name, Fast DDS 3 (Kilted) the second.
export FASTRTPS_DEFAULT_PROFILES_FILE="${FASTRTPS_DEFAULT_PROFILES_FILE:-$_tts_root/config/fastdds.xml}"
export FASTDDS_DEFAULT_PROFILES_FILE="${FASTDDS_DEFAULT_PROFILES_FILE:-$_tts_root/config/fastdds.xml}"
# rclpy refuses to start when it finds no folder for its logs.
if [ -z "${HOME:-}" ] && [ -z "${ROS_LOG_DIR:-}" ]; then
    export ROS_LOG_DIR="$_tts_root/out/log"
fi
unset _tts_root
