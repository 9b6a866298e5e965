# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0
#
# lib.sh - what the scripts share: messages, cache, locks, packages.
# Source it; it runs nothing.

set -euo pipefail
shopt -s inherit_errexit

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Everything that is downloaded, unpacked or built goes here, never into the
# repository.  LINUX_SPF_CACHE moves it (it wants about 25 GB).
CACHE=${LINUX_SPF_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/linux-spf}
JOBS=${JOBS:-$(($(nproc) + 1))}

# The base.  The series is written against BASE_TAG; the tarball is the first
# 6.12 tree that the Debian archive carries.
BASE=v6.12
# shellcheck disable=SC2034
{
BASE_COMMIT=adc218676eef25575469234709c2d87185ca223a
TARBALL_VERSION=6.12.8
TARBALL=linux_6.12.8.orig.tar.xz
TARBALL_SOURCE=linux=6.12.8-1
TARBALL_SUITE=trixie
TARBALL_SHA256=3f258de1f486f02871255d100e8cdf0b9daec4d14994b9fe46184d984120f254
}
PATCHES=$REPO/patches/$BASE

say()  { printf '%s\n' "$*" >&2; }
die()  { printf '%s: error: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# usage: print the comment block at the top of the calling script
usage() { sed -n '/^# Usage:/,/^$/{/^#/{s/^# \{0,1\}//;p}}' "$0"; }

# need_space DIR GB: die unless DIR's file system has that much free
need_space() {
	local free
	mkdir -p "$1" 2>/dev/null || die "cannot create $1; set LINUX_SPF_CACHE to a writable directory"
	free=$(df --output=avail -BG "$1" | tail -1 | tr -dc 0-9)
	((free >= $2)) || die "$1 has ${free} GB free, $2 GB needed; free some or set LINUX_SPF_CACHE to another file system"
}

# need_packages PKG...: install what is missing (root), or say what to type
need_packages() {
	local p missing=()
	for p; do
		[[ $(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null) == installed ]] || missing+=("$p")
	done
	((${#missing[@]})) || return 0
	[[ $(id -u) == 0 ]] || die "packages are missing; as root: apt-get install --no-install-recommends ${missing[*]}"
	say "installing packages: ${missing[*]}"
	mkdir -p "$CACHE"
	(
		flock 9
		export DEBIAN_FRONTEND=noninteractive
		apt-get -qq update &&
		apt-get -qq install -y --no-install-recommends "${missing[@]}"
	) 9>"$CACHE/.apt.lock" >"$CACHE/apt.log" 2>&1 ||
		die "apt-get could not install ${missing[*]} (is the Debian mirror reachable? log: $CACHE/apt.log)"
}

# The packages that building a kernel needs.
need_build_packages() {
	need_packages gcc make flex bison bc libelf-dev libssl-dev ccache xz-utils \
		git rsync cpio python3 libc6-dev
}

# locked NAME CMD...: run CMD while holding the cache's lock NAME
locked() {
	local name=$1
	shift
	mkdir -p "$CACHE"
	(
		flock 8
		"$@"
	) 8>"$CACHE/.$name.lock"
}

# debian_mirror: print the URI of the Debian mirror that apt is configured with
debian_mirror() {
	local uri query
	# shellcheck disable=SC2016
	query='/^Debian\|Debian\|[a-z]*\|[a-z]+:\// { print $4; exit }'
	# shellcheck disable=SC2016
	indextargets() {
		apt-get indextargets --format \
			'$(ORIGIN)|$(LABEL)|$(CODENAME)|$(REPO_URI)' 'Created-By: Packages'
	}
	uri=$(indextargets | awk -F'|' "$query")
	if [[ ! $uri && $(id -u) == 0 ]]; then
		say "apt has no package lists yet: apt-get update"
		locked apt apt-get -qq update >&2 || true
		uri=$(indextargets | awk -F'|' "$query")
	fi
	[[ $uri ]] || die "apt knows no Debian mirror; add one to /etc/apt/sources.list and run: apt-get update"
	printf '%s\n' "$uri"
}

# source_tree base|series: bring $CACHE/src/NAME up to date and print its path.
# Only files that differ are written, so that make rebuilds no more than it must.
source_tree() {
	case $1 in
	base | series) locked src "_$1_tree" ;;
	*) die "no source tree is called $1" ;;
	esac
}

# patched_tree NAME PATCH...: the same for the base with just these patches
patched_tree() { locked src _patched_tree "$@"; }

_patched_tree() {
	local base commit name=$1
	shift
	base=$("$REPO/scripts/base") || exit
	commit=$(_patched_commit "$base" "$@") || exit
	_src_tree "$name" "$commit"
}

_base_tree() {
	local base
	base=$("$REPO/scripts/base") || exit
	_src_tree base "$(git -C "$base" rev-parse 'base^{commit}')"
}

_series_tree() {
	local base commit
	base=$("$REPO/scripts/base") || exit
	commit=$(_series_commit "$base") || exit
	_src_tree series "$commit"
}

# _src_tree NAME COMMIT: have COMMIT checked out at $CACHE/src/NAME; print the path
_src_tree() {
	local dir=$CACHE/src/$1 ok=$CACHE/src/.$1.complete head
	head=$(git -C "$dir" rev-parse HEAD 2>/dev/null) || head=
	if [[ ! $head || ! -e $ok ]]; then
		need_space "$CACHE" 5
		say "checking out $dir"
		rm -rf "$dir" "$ok"
		git -C "$CACHE/linux" worktree prune
		git -C "$CACHE/linux" worktree add -q --detach "$dir" "$2" >&2 ||
			die "could not check out $dir (is the disk full?)"
	elif [[ $head != "$2" ]]; then
		say "updating $dir"
		rm -f "$ok"
		git -C "$dir" checkout -q --force --detach "$2" >&2 ||
			die "could not update $dir (is the disk full?)"
	fi
	touch "$ok"
	printf '%s\n' "$dir"
}

# _series_commit BASE: print the id of the commit that is base + the series
_series_commit() {
	local list=$PATCHES/series patch
	local patches=()
	if [[ -e $list ]]; then
		mapfile -t patches < <(sed 's/[[:space:]]*#.*//; s/[[:space:]]*$//; /^$/d' "$list")
	fi
	for patch in "${patches[@]}"; do
		[[ -e $PATCHES/$patch ]] || die "$list names $patch, which does not exist"
	done
	_patched_commit "$1" "${patches[@]/#/$PATCHES/}"
}

# _patched_commit BASE PATCH...: print the id of the commit that is base + patches
_patched_commit() {
	local git=(git -C "$1") key ref patch tree base log
	local index=$CACHE/.series-index
	shift
	base=$("${git[@]}" rev-parse 'base^{commit}')
	(($#)) || { printf '%s\n' "$base"; return; }
	key=$({ echo "$base"; cat "$@"; } | sha256sum | cut -c1-40)
	ref=refs/spf/$key
	if ! "${git[@]}" rev-parse -q --verify "$ref^{commit}"; then
		rm -f "$index"
		export GIT_INDEX_FILE=$index
		"${git[@]}" read-tree base
		for patch; do
			log=$("${git[@]}" apply --cached "$patch" 2>&1 | sed -n 1p) || {
				rm -f "$index"
				die "${patch##*/} does not apply: $log"
			}
		done
		tree=$("${git[@]}" write-tree)
		unset GIT_INDEX_FILE
		rm -f "$index"
		"${git[@]}" update-ref "$ref" "$(fixed_identity "${git[@]}" commit-tree \
			-p "$base" -m 'base + patches' "$tree")"
		"${git[@]}" rev-parse "$ref"
	fi
}

# fixed_identity CMD...: run CMD so that the commits it makes always get the same id
fixed_identity() {
	local -x GIT_AUTHOR_NAME=base GIT_AUTHOR_EMAIL=base@localhost
	local -x GIT_AUTHOR_DATE='1735830000 +0000'
	local -x GIT_COMMITTER_NAME=base GIT_COMMITTER_EMAIL=base@localhost
	local -x GIT_COMMITTER_DATE='1735830000 +0000'
	local -x GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null
	"$@"
}
