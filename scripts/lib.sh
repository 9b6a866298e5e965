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

# head_of NAME PATCH: what the head of a patch in scripts/mutations says
head_of() { sed -n "/^diff /q; s/^$1: *//p" "$2"; }

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

# scratch: make $SCRATCH, a directory that goes away when this (sub)shell ends
scratch() {
	SCRATCH=$(mktemp -d)
	trap 'rm -rf "$SCRATCH"' EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM HUP
}

# kgit ARG...: git with nobody's settings: what it writes must not depend on them
kgit() {
	GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_SYSTEM=/dev/null git \
		-c core.abbrev=auto -c core.quotePath=true -c core.autocrlf=false \
		-c core.hooksPath=/dev/null -c core.attributesFile=/dev/null \
		-c core.commitGraph=false -c gc.auto=0 -c maintenance.auto=false \
		-c commit.gpgSign=false -c am.threeWay=false -c am.messageId=false \
		-c apply.whitespace=nowarn -c apply.ignoreWhitespace=no \
		-c i18n.commitEncoding=UTF-8 -c i18n.logOutputEncoding=UTF-8 \
		-c tar.umask=0022 -c advice.detachedHead=false "$@"
}

# patch_names: the file names in the quilt series, in order
patch_names() {
	[[ -e $PATCHES/series ]] || return 0
	sed 's/[[:space:]]*#.*//; /^[[:space:]]*$/d' "$PATCHES/series"
}

# read_series: set LIST to the patches, as absolute paths
read_series() {
	local n
	LIST=()
	while read -r n; do
		[[ -f $PATCHES/$n ]] || die "patches/$BASE/series names $n, which is not there"
		LIST+=("$PATCHES/$n")
	done < <(patch_names)
}

# header FIELD FILE: a header of a mail, unfolded
header() {
	sed '/^$/q' "$2" |
		awk -v f="$1" '
			/^[ \t]/ { if (on) { sub(/^[ \t]+/, " "); s = s $0 } next }
			{ on = 0 }
			!seen && index($0, f ": ") == 1 { s = substr($0, length(f) + 3); on = seen = 1 }
			END { print s }'
}

# subject FILE: without the [PATCH n/m]
subject() { header Subject "$1" | sed 's/^\[[^]]*\] *//'; }

# touched FILE...: the paths that patches change, create or remove
touched() {
	sed -nE 's,^(---|\+\+\+) [ab]/([^\t]*).*,\2,p; s,^(rename|copy) (from|to) (.*),\3,p;
		s,^diff --git a/(.*) b/\1$,\1,p' "$@" | LC_ALL=C sort -u
}

# dirty DIR: does git see uncommitted changes to tracked files?
dirty() { [[ -n $(git -C "$1" status --porcelain --untracked-files=no) ]]; }

# at_rest DIR: die if DIR has changes that are not committed, or git has been
# interrupted there
at_rest() {
	local f
	! dirty "$1" || die "$1 has changes that are not committed; commit or stash them first"
	for f in rebase-apply rebase-merge MERGE_HEAD CHERRY_PICK_HEAD; do
		[[ ! -e $(git -C "$1" rev-parse --path-format=absolute --git-path "$f") ]] ||
			die "$1 is in the middle of a git am, rebase, merge or cherry-pick; finish that first"
	done
}

# outside DIR: die unless DIR is outside of the repository, and new or empty
outside() {
	case $1/ in "$REPO"/*) die "$1 is inside the repository; name a directory outside" ;; esac
	[[ ! -e $1 ]] || [[ -d $1 && -z $(ls -A "$1") ]] || die "$1 exists already; name a new directory"
}

# What get_maintainer.pl, and b4, want to see of a kernel tree
# shellcheck disable=SC2034
FOR_MAINTAINERS=(/COPYING /CREDITS /Kbuild /Kconfig /MAINTAINERS /README
	/.get_maintainer.ignore /scripts/get_maintainer.pl /arch/Kconfig /drivers/Kconfig
	/fs/Kconfig /init/Kconfig /ipc/Makefile /kernel/Makefile /lib/Kconfig)

# sparse_clone REPO DIR COMMIT [PATTERN...]: a repository that borrows REPO's
# objects and has no files but those the patches touch, and PATTERN
sparse_clone() {
	local gitdir=$2/.git f
	kgit init -q "$2"
	git -C "$1" rev-parse --path-format=absolute --git-path objects >"$gitdir/objects/info/alternates"
	f=$(git -C "$1" rev-parse --path-format=absolute --git-path shallow)
	[[ ! -e $f ]] || cp "$f" "$gitdir/shallow"
	{
		printf '%s\n' /.gitattributes /.mailmap /Makefile "${@:4}"
		((${#LIST[@]} == 0)) || touched "${LIST[@]}" | sed 's,^,/,'
	} >"$gitdir/sparse"
	kgit -C "$2" sparse-checkout set --no-cone --stdin <"$gitdir/sparse"
	kgit -C "$2" checkout -q --detach "$3"
}

# suite_apt DIR deb|deb-src SUITE: set APT to an apt-get for SUITE of MIRROR, the
# one that this machine uses.  It knows of no other source and of no installed
# package, and keeps its lists and downloads in DIR.
suite_apt() {
	MIRROR=$(debian_mirror) || exit
	need_packages debian-archive-keyring
	mkdir -p "$1/lists/partial" "$1/cache/archives/partial"
	: >"$1/status"
	echo "$2 [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $MIRROR $3 main" >"$1/sources.list"
	# shellcheck disable=SC2034
	APT=(apt-get -q -o Dir::Etc::sourcelist="$1/sources.list"
		-o Dir::Etc::sourceparts=/dev/null -o Dir::State::status="$1/status"
		-o Dir::State::lists="$1/lists" -o Dir::Cache="$1/cache"
		-o Acquire::Languages=none
		-o Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false
		-o Acquire::IndexTargets::deb-src::Contents-dsc::DefaultEnabled=false
		-o Acquire::Retries=2 -o Acquire::http::Timeout=30 -o Debug::NoLocking=1
		-o APT::Sandbox::User=root -o APT::Update::Error-Mode=any)
}

# debian_source DIR SUITE PACKAGE [VERSIONS]: download the upstream tarball of a
# source package to DIR, and print its path; of the versions that the regular
# expression matches the latest that the mirror has.  DIR/apt.log says more.
debian_source() {
	local tarball version
	suite_apt "$1" deb-src "$2"
	"${APT[@]}" update >"$1/apt.log" 2>&1 || return
	for version in $("${APT[@]/%apt-get/apt-cache}" showsrc --only-source "$3" 2>>"$1/apt.log" |
		sed -n 's/^Version: //p' | grep -E "${4:-.}" | sort -rVu); do
		(cd "$1" && "${APT[@]}" source --download-only --tar-only "$3=$version") >>"$1/apt.log" 2>&1 || continue
		for tarball in "$1"/*.orig.tar.*; do
			[[ ! -e $tarball ]] || { printf '%s\n' "$tarball"; return; }
		done
	done
	return 1
}

# source_tree base|series: bring $CACHE/src/NAME up to date and print its path.
# Only files that differ are written, so that make rebuilds no more than it must.
source_tree() {
	case $1 in
	base | series) locked src "_$1_tree" ;;
	*) die "no source tree is called $1" ;;
	esac
}

# patched_tree NAME base|series PATCH...: the same for one of these with patches on top
patched_tree() { locked src _patched_tree "$@"; }

_patched_tree() {
	local base commit=base name=$1 on=$2
	shift 2
	base=$("$REPO/scripts/base") || exit
	[[ $on == base ]] || commit=$(_series_commit "$base") || exit
	commit=$(_patched_commit "$base" "$commit" "$@") || exit
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
	local LIST
	read_series
	_patched_commit "$1" base "${LIST[@]}"
}

# _patched_commit REPO COMMIT PATCH...: print the id of the commit that is COMMIT + patches
_patched_commit() {
	local git=(git -C "$1") key ref patch tree base log
	local index=$CACHE/.series-index
	base=$("${git[@]}" rev-parse "$2^{commit}")
	shift 2
	(($#)) || { printf '%s\n' "$base"; return; }
	key=$({ echo "$base"; cat "$@"; } | sha256sum | cut -c1-40)
	ref=refs/spf/$key
	if ! "${git[@]}" rev-parse -q --verify "$ref^{commit}"; then
		rm -f "$index"
		export GIT_INDEX_FILE=$index
		"${git[@]}" read-tree "$base"
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

# ---- reStructuredText

# rst_text TEXT: print it so that nothing in it is markup
rst_text() { printf '%s\n' "$1" | sed 's/[*`|\\]/\\&/g; s/\([[:alnum:]]\)_\([^[:alnum:]_]\|$\)/\1\\_\2/g'; }

# rst_heading TITLE CHARACTER
rst_heading() { printf '\n%s\n%s\n\n' "$1" "${1//?/$2}"; }
