// SPDX-License-Identifier: GPL-2.0
/*
 * What operations on memory cost, in instructions.
 *
 * Under QEMU with one CPU and -icount shift=0 the time stamp counter advances
 * by one per instruction, so that the difference of two readings is an exact
 * count.  Elsewhere it is in ticks of the counter.
 *
 * Prints "name median mean p99 max" for each operation, in the order below.
 */
#define _GNU_SOURCE
#include <err.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>
#include <x86intrin.h>

#include "measure.h"

#define OPS	4096

static uint64_t sample[OPS], zapped[OPS];
static uint64_t overhead;
static volatile char sink;

static void report(const char *name, int n)
{
	uint64_t sum = 0;

	for (int i = 0; i < n; i++) {
		sample[i] -= overhead < sample[i] ? overhead : sample[i];
		sum += sample[i];
	}
	qsort(sample, n, sizeof(*sample), compare);
	printf("%s %lu %.1f %lu %lu\n", name, sample[n / 2],
	       (double)sum / n, sample[n * 99 / 100], sample[n - 1]);
	fflush(stdout);
}

#define MEASURE(i, op) do {			\
	uint64_t start = __rdtsc();		\
	op;					\
	sample[i] = __rdtsc() - start;		\
} while (0)

static char *map(size_t len)
{
	/* Room to align, so that page tables are not shared with others. */
	char *p = mmap(NULL, len + TABLE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		err(1, "mmap");
	return (char *)(((uintptr_t)p + TABLE - 1) & ~(TABLE - 1));
}

static void write_all(const char *name, char *p)
{
	for (int i = 0; i < OPS; i++)
		MEASURE(i, *(volatile char *)(p + i * PAGE) = 1);
	if (name)
		report(name, OPS);
}

static void read_all(const char *name, char *p)
{
	for (int i = 0; i < OPS; i++)
		MEASURE(i, sink = *(volatile char *)(p + i * PAGE));
	if (name)
		report(name, OPS);
}

int main(void)
{
	size_t len = OPS * PAGE;
	char *p, *q, *sparse;
	int pipe_end;
	pid_t pid;

	/* A larger page would make one fault of many. */
	prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
	memset(sample, 0, sizeof(sample));
	for (int i = 0; i < OPS; i++)
		MEASURE(i, (void)0);
	qsort(sample, OPS, sizeof(*sample), compare);
	overhead = sample[OPS / 2];

	p = map(len);
	write_all("write_fault_first_touch", p);
	drop_pages(p, len);
	write_all("write_fault", p);
	drop_pages(p, len);
	read_all("read_fault_zero_page", p);
	write_all("write_over_zero_page", p);

	pid = fork_child(&pipe_end);
	write_all("cow_copy", p);
	end_child(pid, pipe_end);

	pid = fork_child(&pipe_end);
	end_child(pid, pipe_end);
	write_all("cow_reuse", p);

	for (int i = 0; i < OPS; i++)
		MEASURE(i, drop(p + i * PAGE, PAGE));
	report("madvise_dontneed_page", OPS);

	sparse = map(512 * TABLE);
	for (int i = 0; i < 512; i++)
		MEASURE(i, *(volatile char *)(sparse + i * TABLE) = 1);
	report("write_fault_no_table", 512);
	/*
	 * As many as of the others, so that the means have their share of what
	 * RCU does with the page tables.
	 */
	for (int i = 0; i < OPS; i += 512) {
		for (int k = 0; k < 512; k++)
			MEASURE(i + k, drop(sparse + k * TABLE, TABLE));
		memcpy(zapped + i, sample + i, 512 * sizeof(*sample));
		for (int k = 0; k < 512; k++)
			MEASURE(i + k, *(volatile char *)(sparse + k * TABLE) = 1);
	}
	report("refault_after_2m", OPS);
	memcpy(sample, zapped, sizeof(sample));
	report("madvise_dontneed_2m", OPS);

	/* Splits the VMA in three and makes it one again. */
	q = map(3 * PAGE);
	memset(q, 1, 3 * PAGE);
	for (int i = 0; i < OPS; i++)
		MEASURE(i, mprotect(q + PAGE, PAGE, i % 2 ?
				    PROT_READ | PROT_WRITE : PROT_READ));
	report("mprotect_page", OPS);

	for (int i = 0; i < OPS; i++)
		MEASURE(i, {
			q = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			munmap(q, PAGE);
		});
	report("mmap_munmap_page", OPS);

	/* In a table of its own, which goes with it. */
	for (int i = 0; i < OPS; i++)
		MEASURE(i, {
			q = mmap((void *)(1UL << 45), PAGE, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE,
				 -1, 0);
			*(volatile char *)q = 1;
			munmap(q, PAGE);
		});
	report("mmap_touch_munmap_tables", OPS);
	return 0;
}
