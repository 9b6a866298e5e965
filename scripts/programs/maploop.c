// SPDX-License-Identifier: GPL-2.0
/*
 * Changes its address space ROUNDS times, as programs do that map much: each
 * round maps, uses, protects, moves, shrinks and unmaps memory of several sizes.
 *
 * Usage: maploop ROUNDS
 */
#define _GNU_SOURCE
#include <stdlib.h>

#include "measure.h"

#define MAPS	16

static char *check(char *p)
{
	if (p == MAP_FAILED)
		err(1, "no memory");
	return p;
}

int main(int argc, char **argv)
{
	long rounds = argc > 1 ? atol(argv[1]) : 0;
	char *p[MAPS];

	for (long round = 0; round < rounds; round++) {
		for (int i = 0; i < MAPS; i++) {
			p[i] = check(mmap(NULL, (i + 1) * 4 * PAGE, PROT_READ | PROT_WRITE,
					  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
			for (int j = 0; j <= i; j++)
				p[i][j * PAGE] = 1;
		}
		for (int i = 0; i < MAPS; i++) {
			size_t len = (i + 1) * 4 * PAGE;

			if (mprotect(p[i], PAGE, PROT_READ) ||
			    mprotect(p[i], PAGE, PROT_READ | PROT_WRITE))
				err(1, "mprotect");
			drop(p[i] + PAGE, PAGE);
			p[i] = check(mremap(p[i], len, 2 * len, MREMAP_MAYMOVE));
			p[i] = check(mremap(p[i], 2 * len, PAGE, 0));
		}
		for (int i = 0; i < MAPS; i++)
			if (munmap(p[i], PAGE))
				err(1, "munmap");
	}
	return 0;
}
