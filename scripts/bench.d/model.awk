# SPDX-License-Identifier: GPL-2.0
#
# model.awk - page faults a second on 1 to MOST CPUs that fault in one VMA.
#
# Input: "NAME NS VISITS..." lines: NS that a fault takes on a CPU that has all it
# needs in its caches, and for each cache line that several CPUs write how often
# a fault has to fetch it when another CPU has had it in between.
# Variables: local and remote (ns to fetch a line from another CPU of the same
# and of another socket), sockets (1 or 2, with half of the CPUs each), most.
# Output: "NAME,SOCKETS,CPUS,FAULTS A SECOND".
#
# A line is a server that one CPU at a time has, for as long as the transfer
# takes; all else is done in parallel.  That is a closed queueing network, with
# NS as the time to think, solved exactly by mean value analysis:
#
#   time at a line = transfers * (1 + those that are waiting there already)
#
# The CPU that had a line last is any of them.  So on N CPUs a visit is a transfer
# in (N - 1) / N of the cases, half of them from the other socket if there are two.
#
# Not in it: the time for which locks are held, retries of atomic operations,
# prefetches (the base fetches mmap_lock for each fault), lines that are only read,
# bandwidth, and what siblings of a core take from each other.

function transfer_ns(cpus,  far) {
	if (cpus < 2)
		return 0
	far = 1 - 1 / sockets
	return ((cpus - 1) / cpus - far) * local + far * remote
}

function faults(cpus,  i, n, ns, time, rate, waiting) {
	ns = transfer_ns(cpus)
	for (i = 3; i <= NF; i++)
		waiting[i] = 0
	for (n = 1; n <= cpus; n++) {
		time = $2
		for (i = 3; i <= NF; i++)
			time += $i * ns * (1 + waiting[i])
		rate = n / time
		for (i = 3; i <= NF; i++)
			waiting[i] = rate * $i * ns * (1 + waiting[i])
	}
	return rate * 1e9
}

{
	for (cpus = 1; cpus <= most; cpus++)
		printf "%s,%d,%d,%.0f\n", $1, sockets, cpus, faults(cpus)
}
