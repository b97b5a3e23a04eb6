# What the setup scripts share; sourced, not run. Needs bash 4.4 or later.
# shellcheck shell=bash

set -euo pipefail

# Everything that is downloaded or built once lives here, outside of the checkout.
CACHE=${KEELSON_CACHE:-${HOME:?HOME is not set: set it, or KEELSON_CACHE, to a folder that may be written}/.cache/keelson}

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
    say "$*"
    exit 1
}

# Runs a command with its output in a log, which is shown only if the command fails.
quietly() {
    local log=$1
    shift
    if ! "$@" >"$log" 2>&1 </dev/null; then
        tail -n 30 "$log" >&2
        return 1
    fi
}

# Lets one script at a time prepare the given part of the cache; the lock ends with the script.
lock() {
    mkdir -p "$CACHE" || die "cannot make $CACHE: set KEELSON_CACHE to a folder that may be written."
    exec 9>"$CACHE/.$1.lock"
    flock --wait 1800 9 || die "another run has held $CACHE/.$1.lock for half an hour: is it stuck?"
}
