# shellcheck shell=bash
# SPDX-License-Identifier: GPL-2.0
#
# objects.sh - what the parts share that compile what the patches touch, and
# compare what is said about it with what is said about the base.  They source
# it after lib.sh, and set $linux (the repository with the commits) and $out (where
# it is built).
# shellcheck disable=SC2154

# tree COMMIT: have it checked out
tree() {
	src=$(locked src _src_tree bisect "$1" 2>/dev/null) && [[ -n $src ]]
}

# enabled FILE.c: does this configuration build it?
enabled() {
	local dir=${1%/*} object makefile option
	object=${1##*/}
	object=${object%.c}.o
	[[ -e $src/$1 ]] || return 1
	makefile=$src/$dir/Makefile
	[[ -e $src/$dir/Kbuild ]] && makefile=$src/$dir/Kbuild
	[[ -e $makefile ]] || return 1
	option=$(sed -e ':a' -e '/\\$/{N;s/\\\n/ /;ba' -e '}' "$makefile" |
		awk -v o="$object" '
			{ for (i = 2; i <= NF; i++) if ($i == o) { print $1; exit } }')
	[[ $option == *CONFIG_* ]] || return 0
	option=${option#*\(}
	grep -q "^${option%%)*}=[ym]" "$out/.config"
}

# touched_by COMMIT ARCH: the files that it changes, without those that are no
# part of a kernel for that architecture
touched_by() {
	git -C "$linux" diff --name-only --no-renames "$1^" "$1" |
		sed -E "/^(tools|Documentation|samples|scripts)\//d; \,^arch/$2/,b; /^arch\//d"
}

# objects FILE.c...: those that this configuration builds, as targets for make
objects() {
	local f
	for f; do
		! enabled "$f" || printf '%s\n' "${f%.c}.o"
	done
}

# complaints LOG: of compiler, sparse and kernel-doc, without line numbers
complaints() {
	sed -nE 's,^([^ ]*/)?src/bisect/,,
		/(warning|error): /{s/:[0-9]+(:[0-9]+)?:/:/g; s/ at line [0-9]+//; p}' "$1" | sort -u
}

# errors LOG: what make failed for
errors() { grep -E 'error: |\*\*\*|undefined' "$1" || tail -20 "$1"; }
