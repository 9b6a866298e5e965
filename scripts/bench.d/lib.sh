# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0
#
# bench.d/lib.sh - what the benchmarks of scripts/bench share.  A benchmark is
# written as a part of scripts/test is, see tests/lib.sh, whose functions it has.
# Its figures go to $RESULTS/*.csv.  It must not invent any: what could not be
# measured is not there.

# shellcheck source=scripts/tests/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../tests/lib.sh"

SHARE=$SCRATCH/share	# the guest's /share
mkdir "$SHARE"
# shellcheck disable=SC2034
TINY=${BENCH_TINY:-}
HERE=	# not empty: there is no guest, and nothing is installed

# next: the first release that has some of the same
NEXT=7.2
NEXT_SUITES=(sid testing trixie-backports)

# program NAME [OPTION...]: compile it for the guest, to $SHARE
program() {
	[[ $HERE ]] || need_packages gcc libc6-dev
	gcc -O2 -Wall -Wextra "${@:2}" -o "$SHARE/$1" "$REPO/scripts/programs/$1.c" -lpthread
}

# next_tree: print where the sources of the next release are
next_tree() { locked next get_next; }

get_next() {
	local dir=$CACHE/next tmp suite tarball=''
	if [[ ! -e $dir/Makefile ]]; then
		need_space "$CACHE" 5
		tmp=$(mktemp -d "$CACHE/.next.XXXXXX")
		# shellcheck disable=SC2064
		trap "rm -rf '$tmp'" EXIT
		for suite in "${NEXT_SUITES[@]}"; do
			say "looking for the source of Linux $NEXT in $suite (160 MB)"
			mkdir "$tmp/$suite"
			! tarball=$(debian_source "$tmp/$suite" "$suite" linux "^${NEXT//./[.]}[.]") || break
		done
		[[ $tarball ]] || die "the mirror does not have the source of Linux $NEXT"
		say "unpacking ${tarball##*/}"
		mkdir "$tmp/tree"
		tar -xf "$tarball" -C "$tmp/tree" --strip-components=1
		mv "$tmp/tree" "$dir"
	fi
	printf '%s\n' "$dir"
}

# kernels DEFAULT...: those to compare, as $KERNELS
# shellcheck disable=SC2034
kernels() { read -ra KERNELS <<<"${BENCH_KERNELS:-$*}"; }

# kernel NAME: build it, and set BUILD to the directory, OPTIONS to those that
# scripts/guest wants for it, and SWITCH to what the guest has to do first.  If
# it cannot be had, say so, and return 1.
kernel() {
	local config=plain tree=series on='' known=$SCRATCH/kernel.$1
	if [[ ! -e $known ]]; then
		case $1 in
		base) tree=base ;;
		out) config=without ;;
		off) on='0 0' ;;
		reclaim) on='0 1' ;;
		on) on='1 1' ;;
		next)
			config=next
			tree=$(next_tree 2>"$SCRATCH/next.log") || {
				skip "$1" "$(tail -1 "$SCRATCH/next.log")"
				return 1
			} ;;
		esac
		BUILD=$("$REPO/scripts/build" "$config" --tree "$tree") || {
			not_ok "kernel $1 builds"
			return 1
		}
		SWITCH=:
		[[ ! $on ]] || SWITCH="echo ${on% *} >/proc/sys/vm/speculative_page_fault && echo ${on#* } >/proc/sys/vm/pt_reclaim"
		# for the next time: to find out that nothing is to be built takes long
		printf 'BUILD=%q SWITCH=%q OPTIONS=(--config %q --tree %q --no-build)\n' \
			"$BUILD" "$SWITCH" "$config" "$tree" >"$known"
	fi
	# shellcheck source=/dev/null
	. "$known"
}

# in_guest NAME [OPTION...] -- COMMAND...: let the kernel run the shell commands;
# OPTIONs are those of scripts/guest
in_guest() {
	# shellcheck disable=SC2034
	local name=$1 options=() BUILD OPTIONS SWITCH
	shift
	while [[ $1 != -- ]]; do
		options+=("$1")
		shift
	done
	shift
	kernel "$name" || return
	"$REPO/scripts/guest" "${OPTIONS[@]}" "${options[@]}" --share "$SHARE" \
		-- "set -e
		$SWITCH
		$*"
}

# caption: what to write below a plot
caption() {
	local base=$BASE
	! grep -qs ^tarball "$CACHE/linux/base-source" || base=v$TARBALL_VERSION
	printf 'base: Linux %s, QEMU TCG, %s' "$base" "$(date +%F)"
}

# colour KERNEL: the number of its line type
colour() {
	case $1 in
	base) echo 1 ;; out) echo 2 ;; off) echo 3 ;; on) echo 4 ;; next) echo 5 ;; reclaim) echo 7 ;;
	*) echo 6 ;;
	esac
}

# curves FILE USING [WITH]: for gnuplot's plot command, one curve for each kernel
# in the head of FILE, always in the same colour; N in USING is its column
curves() {
	local i=1 name names sep=''
	IFS=, read -ra names < <(sed -n 1p "$1")
	for name in "${names[@]:1}"; do
		printf '%s"%s" skip 1 using %s title "%s" %s lt %d' "$sep" "$1" "${2//N/$((++i))}" \
			"$name" "${3:-}" "$(colour "$name")"
		sep=', '
	done
}

# plot NAME [text]: draw $RESULTS/NAME.svg and .png as the gnuplot commands on the
# standard input say; they are kept, too.  With "text" also NAME.plot, for pages
# that are nothing else; it has the first line only of what is below the plot, and
# the commands find "text" to exist.
plot() {
	{
		cat <<-'END'
		set datafile separator ","
		set key outside top center horizontal noenhanced
		set grid ytics lt 1 lc rgb "#dddddd"
		set border 3
		set tics nomirror noenhanced
		set style fill solid 0.9 noborder
		set linetype 1 lc rgb "#888888" lw 2 pt 7
		set linetype 2 lc rgb "#d08020" lw 2 pt 5
		set linetype 3 lc rgb "#4477cc" lw 2 pt 9
		set linetype 4 lc rgb "#228844" lw 2 pt 13
		set linetype 5 lc rgb "#aa4499" lw 2 pt 11
		set linetype 6 lc rgb "#000000" lw 2 pt 4
		set linetype 7 lc rgb "#66bbcc" lw 2 pt 6
		END
		cat
	} >"$RESULTS/$1.gp"
	if [[ $HERE ]] && ! command -v gnuplot >/dev/null; then
		skip "plot $1" "no gnuplot here; elsewhere: gnuplot -e 'set term svg; set output \"$1.svg\"' $1.gp"
	else
		check "plot $1" draw "$@"
	fi
}

draw() {
	local type
	command -v gnuplot >/dev/null || need_packages gnuplot-nox
	cd "$RESULTS"
	for type in 'svg size 960,560 background "#ffffff" font "sans,13"' 'pngcairo size 1200,700 font "sans,11"'; do
		# gnuplot goes on after a warning
		gnuplot -e "set terminal $type; set output '$1.${type:0:3}'" "$1.gp" 2>&1 | tee "$SCRATCH/gnuplot"
		[[ ! -s $SCRATCH/gnuplot && -s $1.${type:0:3} ]] || return
	done
	[[ ${2-} ]] || return 0
	# text does not go upwards, so gnuplot leaves out what is beside the y axis
	sed '/^set grid/d; /^set xlabel/s/\\n.*/"/
		s/^set ylabel \("[^"]*"\)/set label \1 at screen 0, screen 0.99/' "$1.gp" | gnuplot -e 'text = 1; set terminal dumb noenhanced 74 26' - |
		sed 's/^\f//; s/ *$//' | cat -s >"$1.plot"
	[[ -s $1.plot ]]
}

# pivot FILE ROW COLUMN VALUE [WHERE]: of a CSV file with a head, a table with a
# row for each value of the field ROW, a column for each of COLUMN, in the order
# they come; fields by name.  WHERE is an awk condition of f["NAME"].
pivot() {
	awk -F, -v row="$2" -v column="$3" -v value="$4" '
	NR == 1 { for (i = 1; i <= NF; i++) name[i] = $i; next }
	{
		for (i = 1; i <= NF; i++) f[name[i]] = $i
		if (!('"${5:-1}"')) next
		if (!(f[row] in r)) { r[f[row]]; rows[++n] = f[row] }
		if (!(f[column] in c)) { c[f[column]]; columns[++m] = f[column] }
		v[f[row], f[column]] = f[value]
	}
	END {
		printf "%s", row
		for (j = 1; j <= m; j++) printf ",%s", columns[j]
		print ""
		for (i = 1; i <= n; i++) {
			printf "%s", rows[i]
			for (j = 1; j <= m; j++) printf ",%s", v[rows[i], columns[j]]
			print ""
		}
	}' "$1"
}

# spread KEYS VALUE: of CSV with a head, mean and standard deviation of the field
# VALUE over the lines that agree in the fields KEYS (with commas between); lines
# without a value count for nothing
spread() {
	awk -F, -v keys="$1" -v value="$2" '
	NR == 1 {
		for (i = 1; i <= NF; i++) column[$i] = i
		nkeys = split(keys, key, ",")
		print keys ",mean,deviation,n"
		next
	}
	$column[value] != "" {
		k = $column[key[1]]
		for (i = 2; i <= nkeys; i++) k = k "," $column[key[i]]
		if (!(k in n)) order[++m] = k
		x = $column[value]; n[k]++; sum[k] += x; squares[k] += x * x
	}
	END {
		for (i = 1; i <= m; i++) {
			k = order[i]; mean = sum[k] / n[k]
			var = n[k] > 1 ? (squares[k] - n[k] * mean * mean) / (n[k] - 1) : 0
			printf "%s,%.6g,%.6g,%d\n", k, mean, (var > 0 ? sqrt(var) : 0), n[k]
		}
	}'
}

# table: CSV as a table for people, as comment; what is a number goes to the right
table() {
	awk -F, '
	{
		nf[NR] = NF
		for (i = 1; i <= NF; i++) {
			s[NR, i] = $i
			if (length($i) > width[i]) width[i] = length($i)
			if (NR > 1 && $i !~ /^[-+(]?[0-9]/ && $i != "") text[i] = 1
		}
	}
	END {
		for (r = 1; r <= NR; r++) {
			line = "#"
			for (i = 1; i <= nf[r]; i++)
				line = line sprintf(text[i] ? " %-*s" : " %*s", width[i] + (i > 1), s[r, i])
			sub(/ +$/, "", line)
			print line
		}
	}'
}

# figures_of BENCHMARK CSV: print the path of what it has measured in the same
# run of scripts/bench; measure it now if it has not, the same kernels on 2 CPUs
figures_of() {
	local dir=$RESULTS/../$1
	if [[ ! -s $dir/$2 ]]; then
		dir=$RESULTS/$1
		mkdir -p "$dir"
		RESULTS=$dir BENCH_KERNELS="${KERNELS[*]}" BENCH_CPUS=2 "$REPO/scripts/bench.d/$1" >&2 || return
	fi
	[[ -s $dir/$2 ]] && printf '%s\n' "$dir/$2"
}
