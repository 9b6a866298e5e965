# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0
#
# tests/lib.sh - what the parts of scripts/test, and of scripts/bench, share.  A
# part sources it with its own arguments, reports with ok, not_ok, skip or check,
# and ends.  What its head tells about it is in runner.sh.
#
# A part may use $SCRATCH (a directory that goes away), $RESULTS (one that
# stays), ${FULL:-} (not empty: take the time it needs) and ${DEADLINE:-} (not
# empty: the second since the epoch from which on to leave out what can be).

# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../lib.sh"

case ${1-} in
'') ;;
-h | --help)
	usage
	exit ;;
*) die "unknown argument $1 (--help tells)" ;;
esac

RESULTS=${RESULTS:-$CACHE/results/single/$(basename "${0%/*}")/${0##*/}}
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

# one_at_a_time NAME: until this part ends, no other goes on that says that name
one_at_a_time() {
	mkdir -p "$CACHE/build"
	exec 7>"$CACHE/build/.$1.lock"
	flock 7
}

# benchmark NAME [KERNEL...]: have the figures of that benchmark of scripts/bench
# in $RESULTS; what it reports is reported here, too
benchmark() {
	RESULTS=$RESULTS BENCH_KERNELS="${*:2}" "$REPO/scripts/bench.d/$1" || : >"$SCRATCH/.failed"
}

# figure CSV WHAT NAME=VALUE...: that field of the line that has these values
figure() {
	awk -F, -v what="$2" -v want="${*:3}" '
	NR == 1 { for (i = 1; i <= NF; i++) column[$i] = i; n = split(want, w, "[ =]"); next }
	{ for (i = 1; i < n; i += 2) if ($column[w[i]] != w[i + 1]) next; print $column[what]; exit }' "$1"
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

# kunit_run TREE BUILD-DIR [OPTION-OF-KUNIT.PY...]: run the series' KUnit suites
# under QEMU with two CPUs.  What the console says goes to BUILD-DIR/test.log,
# which is not there if it did not get that far.
kunit_run() {
	local tree=$1 build=$2
	shift 2
	use_ccache
	mkdir -p "$build"
	rm -f "$build/test.log"
	locked "build-${build##*/}" env -C "$tree" PYTHONDONTWRITEBYTECODE=1 \
		tools/testing/kunit/kunit.py run --arch x86_64 --kunitconfig "$KUNITCONFIG" \
		--build_dir "$build" --jobs "$JOBS" \
		--make_options 'CC=ccache gcc' --make_options 'HOSTCC=ccache gcc' \
		--qemu_args '-smp 2' --timeout 600 "$@"
}
KUNITCONFIG=mm/tests/.kunitconfig

# kselftest NAME: build the series' selftests/mm/NAME.c, for these two
kselftest() {
	local tree
	KSELFTEST=$1
	[[ ! -e $SCRATCH/share/$1 ]] || return 0
	need_build_packages
	tree=$(source_tree series)
	mkdir -p "$SCRATCH/share"
	# The headers of the system do not have the latest ioctls.
	[[ -e $SCRATCH/headers/usr ]] ||
		make -s -C "$tree" O="$SCRATCH/headers" ARCH=x86_64 headers_install >"$RESULTS/headers.log" 2>&1
	gcc -O2 -Wall -static -isystem "$SCRATCH/headers/usr/include" -I "$tree" \
		-o "$SCRATCH/share/$1" "$tree/tools/testing/selftests/mm/$1.c" \
		"$tree/tools/testing/selftests/mm/vm_util.c" -lpthread
}

# what a guest does to have compressed memory to swap to
SWAP_ON='echo 256M >/sys/block/zram0/disksize && mkswap /dev/zram0 >/dev/null && swapon /dev/zram0'

# kselftest_run NAME [GUEST-OPTION...] [--swap] [--dax] [--delays US]
# [--module NAME] [--setup CMD] [--test ARGS]: run it in a guest, with compressed
# memory to swap to, with a file system whose storage is mapped directly, with
# random delays where operations race, with a module loaded, after CMD; its output
# goes to NAME.tap
kselftest_run() {
	local name=$1 rc=0 args='' setup=':' options=()
	shift
	while (($#)); do
		case $1 in
		--test) args=$2; shift ;;
		--setup) setup+="; $2"; shift ;;
		--swap) setup+="; $SWAP_ON" ;;
		--dax)
			options+=(--append 'memmap=64M!1G')
			setup+='; mkfs.ext4 -q -b 4096 -E stride=512,stripe_width=512 /dev/pmem0 && mount -o dax=always /dev/pmem0 /mnt' ;;
		--delays) setup+="; for f in /sys/kernel/debug/mm_race_delay/*; do echo $2 >\$f; done"; shift ;;
		--module) setup+="; modprobe $2"; shift ;;
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
# passes, and the kernel has nothing to say.  With KERNELS="CONFIG...", only on these.
kselftest_passes() {
	local name=$1 what=$2 rc=0 test
	shift 2
	if [[ ${KERNELS:-} && $* =~ --config\ ([a-z+]+) && " $KERNELS " != *" ${BASH_REMATCH[1]} "* ]]; then
		skip "$what" "KERNELS asks for others only: $KERNELS"
		return
	fi
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

# functions_of_series: the names of the functions that the series adds
functions_of_series() {
	cat "$PATCHES"/*.patch | sed -nE '
		/^\+\+\+ b\/(tools|Documentation)\//,/^diff /d
		s/^\+(static |inline |__always_inline |noinline |const |struct |unsigned |bool |int |void |long |[a-z_]+_t )*\**([a-z_0-9]+)\([^;]*$/\2/p' | sort -u
}

# kselftest_under_kcsan NAME [GUEST-OPTION...]: it passes on a kernel that
# watches for data races, and none of them is in a function of the series.  The
# base has some of its own; they are counted.
kselftest_under_kcsan() {
	local name=$1 races ours
	shift
	kselftest_passes "$name" "$KSELFTEST, KCSAN" --config kcsan --allow-splat "$@"
	[[ -s $RESULTS/$name.console ]] || return 0
	races=$({ grep -aoE 'BUG: KCSAN: .*' "$RESULTS/$name.console" || true; } | sort | uniq -c | sort -rn)
	ours=$(grep -wFf <(functions_of_series) <<<"$races" || true)
	if [[ $ours ]]; then
		printf '%s\n' "$ours" >"$SCRATCH/races"
		not_ok "KCSAN: no data race in a function of the series" "$SCRATCH/races"
	else
		ok "KCSAN: no data race in a function of the series ($(grep -c . <<<"$races") reports of others)"
	fi
	splats "$RESULTS/$name.console" | grep -v KCSAN >"$SCRATCH/splats" || true
	[[ ! -s $SCRATCH/splats ]] || not_ok "KCSAN: nothing else on the console" "$SCRATCH/splats"
}

# ---- small trees, for tests of the scripts themselves

makefile() { printf 'VERSION = %s\nPATCHLEVEL = %s\nSUBLEVEL = %s\nEXTRAVERSION = %s\n' "$@"; }

# own_git: from now on git has an identity, and no other settings but those that
# are added to $GIT_CONFIG_GLOBAL
own_git() {
	unset LINUX_SPF_CLONE
	me='A Tester <tester@example.org>'
	export GIT_CONFIG_GLOBAL=$SCRATCH/gitconfig GIT_CONFIG_SYSTEM=/dev/null
	export GIT_CONFIG_NOSYSTEM=1
	git config --global user.name "${me% <*}"
	git config --global user.email tester@example.org
	git config --global init.defaultBranch main
}

# new_kernel DIR: of four files
new_kernel() {
	git init -q "$1"
	mkdir -p "$1/mm" "$1/Documentation/mm" "$1/tools/mm"
	makefile 6 12 8 '' >"$1/Makefile"
	seq -f 'line %g' 60 >"$1/mm/a.c"
	seq -f 'text %g' 60 >"$1/mm/b.c"
	echo old >"$1/tools/mm/old.c"
	git -C "$1" add .
	git -C "$1" commit -qm base
	git -C "$1" tag base
}

# on_other_kernels [GUEST-OPTION...]: with --full, run it on kernels of other kinds
on_other_kernels() {
	if [[ -z ${FULL:-} ]]; then
		skip "$KSELFTEST with no PARAVIRT and NR_CPUS=2, KCSAN, PREEMPT_RT" \
			"three more kernels to build: scripts/test --full ${0##*/}"
		return
	fi
	kselftest_passes "$KSELFTEST-small" "$KSELFTEST, no PARAVIRT, NR_CPUS=2" --config small "$@"
	kselftest_passes "$KSELFTEST-rt" "$KSELFTEST, PREEMPT_RT" --config rt --cpus 4 --delays 100 "$@"
	kselftest_under_kcsan "$KSELFTEST-kcsan" --cpus 3 --delays 100 "$@"
}
