// SPDX-License-Identifier: GPL-2.0
/*
 * What a heap that grows and shrinks keeps: objects of 64 KiB to 4 MiB, of which
 * one page in 16 is used, are allocated until they have PEAK MiB, then freed until
 * a tenth is left, then some come and go for REST seconds; all of that ROUNDS
 * times.  The allocator is the C library's, or what LD_PRELOAD brings.
 *
 * Usage: heap PEAK ROUNDS REST
 *
 * Prints "SECONDS ALLOCATED VMRSS VMPTE" now and then, in kB, and more often while
 * the heap changes.
 */
#include <err.h>
#include <malloc.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "measure.h"

#define USED	(16 * PAGE)		/* one page in these */
#define SLOTS	65536

static struct {
	char *p;
	size_t size;
} slot[SLOTS];
static int used;
static size_t allocated;

/* Always the same numbers. */
static uint64_t number(void)
{
	static uint64_t x = 88172645463325252;

	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	return x;
}

static void report(void)
{
	static uint64_t start;
	long rss = 0, pte = 0;
	char line[128];
	FILE *f = fopen("/proc/self/status", "r");

	if (!f)
		err(1, "/proc/self/status");
	while (fgets(line, sizeof(line), f)) {
		sscanf(line, "VmRSS: %ld", &rss);
		sscanf(line, "VmPTE: %ld", &pte);
	}
	fclose(f);
	if (!start)
		start = now();
	printf("%.3f %zu %ld %ld\n", (now() - start) / 1e9, allocated >> 10, rss, pte);
}

static void get(void)
{
	size_t size = (64UL << 10) << number() % 7;
	char *p = malloc(size);

	if (!p || used == SLOTS)
		err(1, "malloc");
	for (size_t off = 0; off < size; off += USED)
		*(volatile char *)(p + off) = 1;
	slot[used].p = p;
	slot[used++].size = size;
	allocated += size;
}

static void put(void)
{
	int i = number() % used;

	allocated -= slot[i].size;
	free(slot[i].p);
	slot[i] = slot[--used];
}

int main(int argc, char **argv)
{
	size_t peak, step;
	uint64_t until;
	double rest;

	if (argc != 4)
		errx(1, "usage: heap PEAK ROUNDS REST");
	peak = strtoul(argv[1], NULL, 0) << 20;
	rest = atof(argv[3]);
	step = peak / 20;
	report();
	for (int round = 0; round < atoi(argv[2]); round++) {
		for (size_t next = 0; allocated < peak; next = allocated + step) {
			while (allocated < next && allocated < peak)
				get();
			report();
		}
		for (size_t next = peak; allocated > peak / 10; next = allocated - step) {
			while (allocated > next && allocated > peak / 10)
				put();
			report();
		}
		/* The C library returns what is free inside only when told to. */
		malloc_trim(0);
		report();
		/* Allocators do their work in the background when they are called. */
		for (until = now() + rest * 1e9; now() < until; report())
			for (int i = 0; i < 10; i++) {
				put();
				get();
				usleep(10000);
			}
	}
	return 0;
}
