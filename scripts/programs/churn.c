// SPDX-License-Identifier: GPL-2.0
/*
 * What an allocator's habit of returning memory costs, in instructions: gets a
 * chunk from malloc(), touches it, and frees it, over and over.  Counts as
 * cost.c does.  The allocator is the C library's, or what LD_PRELOAD brings.
 *
 * Usage: churn NAME
 *
 * Prints "NAME_WHAT median mean p99 max" for chunks of 4 MiB of which each page
 * is touched, and of which one page in 512 is.
 */
#include <err.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <x86intrin.h>

#include "measure.h"

#define CHUNK	(4UL << 20)
#define ROUNDS	64

static uint64_t sample[ROUNDS];

static void churn(const char *name, const char *what, size_t stride)
{
	uint64_t sum = 0, start;

	for (int i = -4; i < ROUNDS; i++) {
		start = __rdtsc();
		char *p = malloc(CHUNK);

		if (!p)
			err(1, "malloc");
		for (size_t off = 0; off < CHUNK; off += stride)
			*(volatile char *)(p + off) = 1;
		free(p);
		/* after a few, to have the allocator settled */
		if (i >= 0)
			sum += sample[i] = __rdtsc() - start;
	}
	qsort(sample, ROUNDS, sizeof(*sample), compare);
	printf("%s_%s %lu %.1f %lu %lu\n", name, what, sample[ROUNDS / 2],
	       (double)sum / ROUNDS, sample[ROUNDS * 99 / 100],
	       sample[ROUNDS - 1]);
}

int main(int argc, char **argv)
{
	const char *name = argc > 1 ? argv[1] : "malloc";

	churn(name, "full_4m", PAGE);
	churn(name, "sparse_4m", 512 * PAGE);
	return 0;
}
