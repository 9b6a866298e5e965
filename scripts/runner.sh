# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0
#
# runner.sh - what scripts/test and scripts/bench share: they list parts, run
# them one after the other, and sum up.  Source it, and set PARTS to the
# directory of the parts.
#
# A part is a script whose head tells about it:
#   # Part: what it does, one line
#   # Time: minutes [minutes with --full]
#   # Run: default, or when it is run
#   # Order: N

# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

FULL='' STOPPED='' PART_PID='' DIR='' MINUTES='' DEADLINE=''

# field PART NAME: from the head of a part
field() { sed -n "/^[^#]/q; s/^# $2: *//p" "$PARTS/$1"; }

# all_parts: in the order they run
all_parts() {
	local f
	for f in "$PARTS"/*; do
		[[ -x $f && -f $f ]] || continue
		f=${f##*/}
		printf '%s %s\n' "$(field "$f" Order)" "$f"
	done | sort -n | cut -d' ' -f2
}

# part_exists NAME: die if there is none
part_exists() {
	[[ $1 != */* && -f $PARTS/$1 && -x $PARTS/$1 ]] ||
		die "no part is called $1; there are: $(all_parts | tr '\n' ' ')"
}

# list: all parts, and how long each takes
list() {
	local p t
	while read -r p; do
		read -ra t <<<"$(field "$p" Time)"
		printf '%-10s %-8s %4s min  %s\n' "$p" "$(field "$p" Run)" "${t[0]}" "$(field "$p" Part)"
	done < <(all_parts)
}

count() { grep -c "^$1 - " "$2" || true; }

# stop_part: end the part that runs, with all its processes
stop_part() {
	[[ -n $PART_PID ]] || return 0
	kill -TERM -- "-$PART_PID" 2>/dev/null || return 0
	local i
	for ((i = 0; i < 20; i++)); do
		kill -0 -- "-$PART_PID" 2>/dev/null || return 0
		sleep 0.5
	done
	kill -KILL -- "-$PART_PID" 2>/dev/null || true
}

# run_part NAME: leaves a log and a line in $DIR/summary
run_part() {
	local name=$1 log=$DIR/$1.log rc=0 t start=$SECONDS limit why='' tee_pid
	read -ra t <<<"$(field "$name" Time)"
	limit=$((${t[0]:-10} * 5 + 15))
	[[ -z $FULL ]] || limit=$((${t[1]:-${t[0]:-10}} * 5 + 15))
	printf '\n# %s: %s\n' "$name" "$(field "$name" Part)"
	mkdir -p "$DIR/$name"
	mkfifo "$DIR/.out"
	# Ctrl-C must not take the log away before the part has had its last word.
	(trap '' INT TERM HUP; exec tee "$log" <"$DIR/.out") &
	tee_pid=$!
	RESULTS=$DIR/$name FULL=$FULL DEADLINE=$DEADLINE setsid timeout --foreground -k 30 "${limit}m" \
		"$PARTS/$name" </dev/null >"$DIR/.out" 2>&1 &
	PART_PID=$!
	wait "$PART_PID" || rc=$?
	stop_part
	PART_PID=
	( sleep 10; kill "$tee_pid" ) 2>/dev/null &
	wait "$tee_pid" || true
	kill $! 2>/dev/null || true
	rm "$DIR/.out"
	rmdir "$DIR/$name" 2>/dev/null || true
	if [[ -n $STOPPED ]]; then
		why="was interrupted"
	elif ((SECONDS - start >= limit * 60)); then
		why="was ended after $limit minutes"
	elif ((rc != 0 && rc != 3)); then
		why="died with exit code $rc"
	elif ! grep -qE '^(ok|not ok|skip) - ' "$log"; then
		why="printed no result"
	elif ((rc == 3)) && [[ $(count 'not ok' "$log") == 0 ]]; then
		why="exit code says failure, output does not"
	fi
	[[ -z $why ]] || echo "not ok - part $name $why" | tee -a "$log"
	printf '%s %d %d %d %d\n' "$name" "$(count ok "$log")" "$(count 'not ok' "$log")" \
		"$(count skip "$log")" $((SECONDS - start)) >>"$DIR/summary"
}

# time_for NAME: can it end within $MINUTES, on a machine like that of its head?
time_for() {
	local t
	read -ra t <<<"$(field "$1" Time)"
	((SECONDS + t[0] * 60 <= MINUTES * 60))
}

# leave_part NAME: there is no time for it
leave_part() {
	printf '\n# %s: %s\n' "$1" "$(field "$1" Part)"
	echo "skip - part $1: $((SECONDS / 60)) of $MINUTES minutes had passed before it; scripts/test $1 runs it" | tee "$DIR/$1.log"
	printf '%s 0 0 1 0\n' "$1" >>"$DIR/summary"
}

# summary PART...: what the parts that ran said; those named were not run
summary() {
	printf '\n%-10s %7s %7s %7s %7s\n' part passed failed skipped minutes
	awk -v not_run="$*" '
		{ printf "%-10s %7d %7d %7d %7d%s\n", $1, $2, $3, $4, ($5 + 30) / 60, $3 ? "  FAILED" : ""
		  ok += $2; bad += $3; skip += $4 }
		END {
			n = split(not_run, name, " ")
			for (i = 1; i <= n; i++) {
				printf "%-10s %7s %7d %7s %7s  NOT RUN\n", name[i], "-", 1, "-", "-"
				bad++
			}
			printf "\n%d passed, %d failed, %d skipped\n", ok, bad, skip
			exit bad > 0 || ok + skip == 0
		}' "$DIR/summary"
}

# results_directory NAME: a new one in the cache, as $DIR
results_directory() {
	mkdir -p "$CACHE/results" 2>/dev/null ||
		die "cannot write to $CACHE; set LINUX_SPF_CACHE to a writable directory"
	DIR=$CACHE/results/$1
	mkdir "$DIR" 2>/dev/null || DIR=$(mktemp -d "$DIR-XXX")
}

# about COMMAND: show, and leave in $DIR, what the results of the command depend
# on, beside the sources
about() {
	{
		echo "command: $1"
		echo "date: $(date -u '+%Y-%m-%d %H:%M UTC')"
		echo "series: $(git -c safe.directory='*' -C "$REPO" describe --always --dirty 2>/dev/null || echo unknown)"
		echo "base: $(cat "$CACHE/linux/base-source" 2>/dev/null || echo 'not there yet')"
		echo "machine: $(sed -n 's/^model name[^:]*: //p;' /proc/cpuinfo | sed -n 1p), $(nproc) CPUs, Linux $(uname -r)"
		echo "QEMU: $(qemu-system-x86_64 --version 2>/dev/null | sed -n 's/^QEMU emulator version //p')"
		echo "compiler: $(gcc --version 2>/dev/null | sed -n 1p)"
	} | tee "$DIR/about.txt" | sed 's/^/# /'
}

# run_parts PART...: run them, and sum up.  With $MINUTES, those for which there is
# no time are left out.
run_parts() {
	local i not_run
	[[ ! $MINUTES ]] || DEADLINE=$((EPOCHSECONDS - SECONDS + MINUTES * 60))
	: >"$DIR/summary"
	trap 'STOPPED=1; stop_part' INT TERM HUP
	for ((i = 1; i <= $#; i++)); do
		[[ -z $STOPPED ]] || break
		if [[ $MINUTES ]] && ! time_for "${!i}"; then
			leave_part "${!i}"
		else
			run_part "${!i}"
		fi
	done
	not_run=("${@:i}")
	"$REPO/scripts/results" "$DIR" "${not_run[@]}"
	printf '\nlogs: %s\n' "$DIR"
	summary "${not_run[@]}"
}
