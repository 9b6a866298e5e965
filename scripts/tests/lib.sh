# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0
#
# tests/lib.sh - what the parts of scripts/test share.  A part sources it with
# its own arguments, reports with ok, not_ok, skip or check, and ends.
#
# The head of a part tells scripts/test about it:
#   # Part: what it tests, one line
#   # Time: minutes [minutes with --full]
#   # Run: default|full
#   # Order: N
# A part may use $SCRATCH (a directory that goes away), $RESULTS (one that
# stays) and ${FULL:-} (not empty: take the time it needs).

# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

case ${1-} in
'') ;;
-h | --help)
	usage
	exit ;;
*) die "unknown argument $1 (--help tells)" ;;
esac

RESULTS=${RESULTS:-$CACHE/results/single/${0##*/}}
mkdir -p "$RESULTS"
SCRATCH=$(mktemp -d)

# A part that got to its end exits 0 if all was ok, 3 if not.  With any other
# status it died.
part_ends() {
	local status=$?
	cd /
	((status != 0)) || [[ ! -e $SCRATCH/.failed ]] || status=3
	rm -rf "$SCRATCH"
	exit $status
}
trap part_ends EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

one_line() { tr '\n' ' ' <<<"$*" | sed 's/ *$//'; }

# ok WHAT, not_ok WHAT [FILE]: FILE's end is shown.  skip WHAT REASON
ok() { printf 'ok - %s\n' "$(one_line "$1")"; }
not_ok() {
	: >"$SCRATCH/.failed"
	printf 'not ok - %s\n' "$(one_line "$1")"
	[[ -z ${2-} ]] || show "$2"
}
skip() { printf 'skip - %s: %s\n' "$(one_line "$1")" "$(one_line "$2")"; }

# show FILE: as comment
show() { tail -n "${SHOW:-40}" "$1" | sed 's/^/#   /'; }

# check WHAT CMD...: ok if CMD succeeds, else not ok, with what it said
check() {
	local what=$1 log
	shift
	log=$(mktemp "$SCRATCH/check.XXXXXX")
	if ("$@") >"$log" 2>&1 </dev/null; then
		ok "$what"
	else
		not_ok "$what" "$log"
	fi
	rm -f "$log"
}

# refuses WHAT WORDS CMD...: ok if CMD fails with one line on stderr, which
# matches the regular expression WORDS
refuses() {
	local what=$1 words=$2 log rc=0
	shift 2
	log=$(mktemp "$SCRATCH/refuses.XXXXXX")
	("$@") >"$log.out" 2>"$log" </dev/null || rc=$?
	if ((rc == 0)); then
		echo "(it succeeded)" >>"$log"
		not_ok "$what" "$log"
	elif [[ $(wc -l <"$log") != 1 ]] || ! grep -qE -- "$words" "$log"; then
		echo "(one line that matches '$words' was expected)" >>"$log"
		not_ok "$what" "$log"
	else
		ok "$what"
	fi
	rm -f "$log" "$log.out"
}

# use_ccache: the same cache and paths as scripts/build
use_ccache() {
	export CCACHE_DIR=$CACHE/ccache CCACHE_MAXSIZE=5G CCACHE_BASEDIR=$CACHE CCACHE_NOHASHDIR=1
	export KBUILD_BUILD_TIMESTAMP='Thu Jan  2 09:32:00 UTC 2025'
	export KBUILD_BUILD_USER=build KBUILD_BUILD_HOST=localhost
}

# splats FILE: what a healthy kernel does not say; the patterns are scripts/guest's
splats() {
	local SPLAT NO_SPLAT
	eval "$(grep -E '^(NO_)?SPLAT\+?=' "$REPO/scripts/guest")"
	grep -aE "$SPLAT" "$1" | grep -avE "$NO_SPLAT"
}

# kselftest NAME: build the series' selftests/mm/NAME.c, for these two
kselftest() {
	local tree
	need_build_packages
	tree=$(source_tree series)
	KSELFTEST=$1
	mkdir -p "$SCRATCH/share"
	# The headers of the system do not have the latest ioctls.
	make -s -C "$tree" O="$SCRATCH/headers" ARCH=x86_64 headers_install >"$RESULTS/headers.log" 2>&1
	gcc -O2 -Wall -static -isystem "$SCRATCH/headers/usr/include" -I "$tree" \
		-o "$SCRATCH/share/$1" "$tree/tools/testing/selftests/mm/$1.c" -lpthread
}

# kselftest_run NAME [GUEST-OPTION...] [--swap] [--delays US] [--test ARGS]: run
# it in a guest, with compressed memory to swap to, with random delays where
# operations race; its output goes to NAME.tap
kselftest_run() {
	local name=$1 rc=0 args='' setup=':' options=()
	shift
	while (($#)); do
		case $1 in
		--test) args=$2; shift ;;
		--swap) setup+='; echo 256M >/sys/block/zram0/disksize && mkswap /dev/zram0 >/dev/null && swapon /dev/zram0' ;;
		--delays) setup+="; for f in /sys/kernel/debug/mm_race_delay/*; do echo $2 >\$f; done"; shift ;;
		*) options+=("$1") ;;
		esac
		shift
	done
	"$REPO/scripts/guest" --share "$SCRATCH/share" --console "$RESULTS/$name.console" \
		"${options[@]}" -- "$setup; /share/$KSELFTEST $args >/share/$name.tap 2>&1" \
		>"$RESULTS/$name.log" 2>&1 || rc=$?
	cp "$SCRATCH/share/$name.tap" "$RESULTS/" 2>/dev/null || true
	return $rc
}

# kselftest_passes NAME WHAT [GUEST-OPTION...]: each of its tests that can run
# passes, and the kernel has nothing to say
kselftest_passes() {
	local name=$1 what=$2 rc=0 test
	shift 2
	kselftest_run "$name" "$@" || rc=$?
	if ((rc)) || ! grep -q '^ok ' "$RESULTS/$name.tap"; then
		cat "$RESULTS/$name.tap" >>"$RESULTS/$name.log" 2>/dev/null || true
		SHOW=80 not_ok "$what (exit code $rc)" "$RESULTS/$name.log"
		return
	fi
	while read -r test; do
		case $test in
		*'# SKIP '*) skip "$what: ${test%% # SKIP*}" "${test#*# SKIP }" ;;
		*) ok "$what: $test" ;;
		esac
	done < <(sed -nE 's/^ok [0-9]+ //p' "$RESULTS/$name.tap")
	# what the tests counted
	sed -nE 's/^# [^ ]*\.c:[0-9]+:([^:]*):(.*[0-9].*)/#   \1: \2/p' "$RESULTS/$name.tap"
}
