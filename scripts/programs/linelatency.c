// SPDX-License-Identifier: GPL-2.0
/*
 * How long a cache line takes from one CPU to another: two threads, on the first
 * two CPUs there are, take turns in writing to it.  Prints ns per transfer, the
 * median of CHUNKS, as one of the two may have to wait for its CPU.
 */
#define _GNU_SOURCE
#include <err.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "measure.h"

#define CHUNKS	1000
#define CHUNK	2000UL			/* turns */

static _Atomic uint64_t turn __attribute__((aligned(128)));

static void pin(int n)
{
	cpu_set_t allowed, set;

	sched_getaffinity(0, sizeof(allowed), &allowed);
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
		if (CPU_ISSET(cpu, &allowed) && !n--) {
			CPU_ZERO(&set);
			CPU_SET(cpu, &set);
			if (!sched_setaffinity(0, sizeof(set), &set))
				return;
		}
	errx(1, "there are no two CPUs");
}

static uint64_t began[CHUNKS + 1];

static void *play(void *arg)
{
	uint64_t mine = (uintptr_t)arg;

	pin(mine);
	for (; mine < CHUNKS * CHUNK; mine += 2) {
		if (mine % CHUNK == 0)
			began[mine / CHUNK] = now();
		while (atomic_load_explicit(&turn, memory_order_acquire) != mine)
			;
		atomic_fetch_add(&turn, 1);
	}
	began[CHUNKS] = now();
	return NULL;
}

int main(void)
{
	pthread_t thread[2];

	for (uintptr_t i = 0; i < 2; i++)
		if (pthread_create(&thread[i], NULL, play, (void *)i))
			errx(1, "no thread");
	for (int i = 0; i < 2; i++)
		pthread_join(thread[i], NULL);
	for (int i = 0; i < CHUNKS; i++)
		began[i] = began[i + 1] - began[i];
	qsort(began, CHUNKS, sizeof(*began), compare);
	printf("%.1f\n", (double)began[CHUNKS / 2] / CHUNK);
	return 0;
}
