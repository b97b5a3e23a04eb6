# Packages from Debian's archive without changing the machine's apt configuration; sourced after
# session.sh. The archive's address is that of the machine's own apt sources: a mirror, proxy or
# keyring that was set up there is used here too, but for suites that it may not list.
# shellcheck shell=bash

APT_ROOT=$CACHE/apt

# The address of the archive that the machine's sources give for a suite ending in $1
# ("" for the main archive, "-security" for the security archive); empty if there is none.
archive_of() {
    local suffix=$1 codename
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
    apt-get indextargets --format '$(IDENTIFIER) $(RELEASE) $(COMPONENT) $(REPO_URI)' 2>/dev/null |
        awk -v release="$codename$suffix" \
            '$1 == "Packages" && $2 == release && $3 == "main" { print $4; exit }'
}

# Writes the private sources for the given suites, e.g. `private_sources bookworm trixie-backports`.
# Suites that the archive does not carry are skipped by private_update.
private_sources() {
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
        die "this needs apt and dpkg: the machine is not Debian or like it."
    [[ $(. /etc/os-release && printf '%s' "${ID:-}") == debian ]] ||
        die "this takes packages from Debian's archive, which the machine's apt sources do not name: run it on Debian."
    local main security suite uri keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    main=$(archive_of "")
    security=$(archive_of "-security")
    [[ -n $main ]] ||
        die "the machine's apt sources name no Debian archive for its own release: add one to /etc/apt/sources.list."
    [[ -r $keyring ]] || die "$keyring is missing: install debian-archive-keyring."
    mkdir -p "$APT_ROOT"/{etc,lists/partial,cache/archives/partial}
    : >"$APT_ROOT/status"
    rm -f "$APT_ROOT"/etc/*.sources
    for suite in "$@"; do
        uri=$main
        [[ $suite != *-security ]] || uri=$security
        [[ -n $uri ]] || continue
        printf '%s\n' "Types: deb" "URIs: $uri" "Suites: $suite" "Components: main" \
            "Architectures: amd64" "Languages: none" "Targets: Packages" "Signed-By: $keyring" \
            >"$APT_ROOT/etc/$suite.sources"
    done
}

# An apt command that sees only the private sources. /etc/apt/apt.conf.d still applies (proxies).
private_apt() {
    local command=$1
    shift
    "$command" -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$APT_ROOT/etc" \
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null \
        -o Dir::State="$APT_ROOT" -o Dir::State::lists="$APT_ROOT/lists" \
        -o Dir::State::status="$APT_ROOT/status" -o Dir::Cache="$APT_ROOT/cache" \
        -o APT::Sandbox::User="$(id -un)" -o APT::Architecture=amd64 \
        -o Acquire::Retries=2 -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 "$@"
}

# Fetches the lists of the private sources; fails with apt's own words if nothing answers.
private_update() {
    quietly "$APT_ROOT/update.log" private_apt apt-get update ||
        die "apt could not fetch the package lists above: is there a network, and does the mirror carry these suites?"
    if grep -q '^E:\|^W: Failed to fetch' "$APT_ROOT/update.log"; then
        grep '^[EW]:' "$APT_ROOT/update.log" >&2
        die "apt could not fetch the package lists above: is there a network, and does the mirror carry these suites?"
    fi
}

# Downloads package $1 (a name, or name=version) and unpacks it into folder $2.
private_unpack() {
    local package=$1 into=$2 scratch
    scratch=$(mktemp -d "$CACHE/.download.XXXXXX")
    if ! (cd "$scratch" && quietly "$APT_ROOT/download.log" private_apt apt-get download "$package"); then
        rm -rf "$scratch"
        die "apt could not download $package: is there a network?"
    fi
    mkdir -p "$into"
    dpkg-deb --extract "$scratch"/*.deb "$into"
    rm -rf "$scratch"
}
