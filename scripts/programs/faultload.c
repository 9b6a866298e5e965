// SPDX-License-Identifier: GPL-2.0
/*
 * Page faults of several threads in one VMA, marked for traffic-plugin.c.
 *
 * Usage: faultload THREADS KIND[=VMAS]...
 *
 * Each thread, on a CPU of its own, faults a range of 16 MiB of one anonymous
 * VMA, whose page tables are there.  KIND: read (the zero page), write, over-zero
 * (write where the zero page is), cow (copy what a child shares), reuse (write
 * what a child that is gone has shared).
 *
 * Each kind is done in one VMA after the other, VMAS of them (1), made in a row:
 * how the kernel's objects lie in cache lines is a matter of luck.
 */
#define _GNU_SOURCE
#include <err.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "measure.h"

#define RANGE	(16UL << 20)
#define AREAS	(1UL << 44)		/* an address where nothing is */
#define FILLERS	512

/* No-ops to everything but the plugin. */
#define MARK(n)		asm volatile("nopl " #n "(%%rax)" ::: "memory")
#define MARK_BEGIN	MARK(0x5be0fa01)
#define MARK_END	MARK(0x5be0fa02)
#define MARK_REPORT	MARK(0x5be0fa03)

static char *area;
static int threads;
static int writes;
static pthread_barrier_t barrier;

static void touch(char *p, size_t len, int write)
{
	for (char *end = p + len; p < end; p += PAGE) {
		if (write)
			*(volatile char *)p = 1;
		else
			(void)*(volatile char *)p;
	}
}

static void pin(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		err(1, "CPU %d", cpu);
}

static void *fault(void *arg)
{
	uintptr_t n = (uintptr_t)arg;

	pin(n);
	pthread_barrier_wait(&barrier);
	MARK_BEGIN;
	touch(area + n * RANGE, RANGE, writes);
	MARK_END;
	pthread_barrier_wait(&barrier);
	return NULL;
}

static void measure(const char *kind)
{
	size_t len = threads * RANGE;
	pthread_t thread[threads];
	int pipe_end;
	pid_t pid = 0;

	/* As one writable VMA with an anon_vma and page tables, but no pages. */
	touch(area, len, 1);
	writes = strcmp(kind, "read") != 0;
	if (!strcmp(kind, "cow") || !strcmp(kind, "reuse")) {
		pid = fork_child(&pipe_end);
		if (!strcmp(kind, "reuse")) {
			end_child(pid, pipe_end);
			pid = 0;
		}
	} else {
		drop_pages(area, len);
		if (!strcmp(kind, "over-zero"))
			touch(area, len, 0);
		else if (strcmp(kind, "read") && strcmp(kind, "write"))
			errx(1, "there is no %s", kind);
	}

	for (intptr_t i = 0; i < threads; i++)
		if (pthread_create(&thread[i], NULL, fault, (void *)i))
			errx(1, "no thread");
	for (int i = 0; i < threads; i++)
		pthread_join(thread[i], NULL);
	MARK_REPORT;
	if (pid)
		end_child(pid, pipe_end);
	drop_pages(area, len);
}

static char *map(char *addr, size_t len)
{
	char *p = mmap(addr, len, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);

	if (p == MAP_FAILED)
		err(1, "mmap");
	return p;
}

int main(int argc, char **argv)
{
	char *addr = (char *)AREAS;
	int vmas[argc], most = 1;

	if (argc < 3 || (threads = atoi(argv[1])) < 1)
		errx(1, "usage: faultload THREADS KIND[=VMAS]...");
	for (int i = 2; i < argc; i++) {
		char *number = strchr(argv[i], '=');

		vmas[i] = number ? atoi(number + 1) : 1;
		if (number)
			*number = '\0';
		if (most < vmas[i])
			most = vmas[i];
	}
	/* A larger page would make one fault of many. */
	prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
	pthread_barrier_init(&barrier, NULL, threads);

	/*
	 * With gaps, since neighbours would become one.  The first ones use up
	 * what slabs have left over, so that those of interest are in a row;
	 * they go again, since the tree of VMAs would be deeper with them.
	 */
	pin(0);
	for (int i = 0; i < FILLERS; i++, addr += 2 * PAGE)
		map(addr, PAGE);
	addr = (char *)(AREAS + FILLERS * TABLE);
	for (int i = 0; i < most; i++)
		map(addr + i * (threads * RANGE + TABLE), threads * RANGE);
	if (munmap((char *)AREAS, FILLERS * 2 * PAGE))
		err(1, "munmap");
	for (int i = 2; i < argc; i++)
		for (int j = 0; j < vmas[i]; j++) {
			area = addr + j * (threads * RANGE + TABLE);
			measure(argv[i]);
		}
	return 0;
}
