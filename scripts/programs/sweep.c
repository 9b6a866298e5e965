// SPDX-License-Identifier: GPL-2.0
/*
 * What an allocator leaves behind that gives memory back with MADV_DONTNEED and
 * goes on elsewhere: touches so many GiB, 2 MiB at a time, gives each back
 * before it goes on, and prints VmPTE in kB before and after.
 *
 * Usage: sweep [GIB [STEP]]
 *
 * With STEP it prints "GIB VMPTE" each time it has touched so many GiB.
 */
#include <err.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define CHUNK	(2UL << 20)

static long vm_pte(void)
{
	FILE *f = fopen("/proc/self/status", "r");
	char line[128];
	long val = -1;

	if (!f)
		err(1, "/proc/self/status");
	while (fgets(line, sizeof(line), f))
		if (sscanf(line, "VmPTE: %ld", &val) == 1)
			break;
	fclose(f);
	return val;
}

int main(int argc, char **argv)
{
	unsigned long size = (argc > 1 ? strtoul(argv[1], NULL, 0) : 50) << 30;
	unsigned long step = (argc > 2 ? strtoul(argv[2], NULL, 0) : 0) << 30;
	long before;
	char *p;

	p = mmap(NULL, size + CHUNK, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p == MAP_FAILED)
		err(1, "mmap");
	p = (char *)(((uintptr_t)p + CHUNK - 1) & ~(CHUNK - 1));
	madvise(p, size, MADV_NOHUGEPAGE);

	before = vm_pte();
	for (char *q = p; q < p + size; q += CHUNK) {
		if (step && (q - p) % step == 0)
			printf("%lu %ld\n", (q - p) >> 30, vm_pte());
		*(volatile char *)q = 1;
		if (madvise(q, CHUNK, MADV_DONTNEED))
			err(1, "madvise");
	}
	if (step)
		printf("%lu %ld\n", size >> 30, vm_pte());
	else
		printf("%ld %ld\n", before, vm_pte());
	return 0;
}
