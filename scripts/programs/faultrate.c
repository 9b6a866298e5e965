// SPDX-License-Identifier: GPL-2.0
/*
 * How many page faults a second several threads or processes get done.
 *
 * Usage: faultrate [OPTION]... KIND
 *
 *   -n TASKS   threads, each on a CPU of its own as far as there are any (1)
 *   -p         processes instead
 *   -m MIB     memory of each (16)
 *   -t MS      measure for so long (1000), after
 *   -w MS      of warm-up (200)
 *   -W WRITER  with one more thread that changes the address space all the time
 *   -P US      and waits after each change
 *
 * KIND:
 *   write, read   of the pages of one anonymous VMA, each task in its own part,
 *                 whose page tables are there.  Only the faults are timed.
 *   page_fault1   map anonymous memory, write to each page, unmap it
 *   page_fault2   the same with a private mapping of a file
 *   page_fault3   with a shared mapping of a file.  These are what the tests of
 *                 will-it-scale with these names do.
 *
 * WRITER:
 *   other         maps, protects and unmaps memory that nobody else uses
 *   same          protects and unprotects the end of the VMA that the tasks use
 *   brk           has the heap grow and shrink
 *   threads       starts and ends threads, 8 at a time
 *
 * Prints "NAME NUMBER" lines: rate (faults a second, all tasks together), faults,
 * changes (by the writer, a second), and by how much some counters of
 * /proc/vmstat grew.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

#include "measure.h"

#define MAX_TASKS	1024
#define STEP		(64UL << 10)	/* by which the writers change something */

enum { WARM_UP, MEASURE, STOP };

static struct shared {
	volatile int phase;
	volatile int phase_of_pass;
	pthread_barrier_t barrier;
	struct {
		uint64_t faults, ns;
	} __attribute__((aligned(128))) task[MAX_TASKS];
} *shared;

static int tasks = 1, processes, pause_us;
static size_t len = 16UL << 20;
static const char *kind, *writer;
static char *area;
static volatile uint64_t changes;

static void pin(int n)
{
	static cpu_set_t allowed;
	cpu_set_t set;

	if (!CPU_COUNT(&allowed))
		sched_getaffinity(0, sizeof(allowed), &allowed);
	n %= CPU_COUNT(&allowed);
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
		if (CPU_ISSET(cpu, &allowed) && !n--) {
			CPU_ZERO(&set);
			CPU_SET(cpu, &set);
			if (sched_setaffinity(0, sizeof(set), &set))
				err(1, "CPU %d", cpu);
			return;
		}
}

static char *map(size_t size, int flags, int fd)
{
	char *p = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);

	if (p == MAP_FAILED)
		err(1, "mmap");
	return p;
}

static void touch(char *p, int write)
{
	for (char *end = p + len; p < end; p += PAGE) {
		if (write)
			*(volatile char *)p = 1;
		else
			(void)*(volatile char *)p;
	}
}

static int is(const char *name)
{
	return !strcmp(kind, name);
}

/* A pass is of the phase in which it began. */
static void count(int id, int phase, uint64_t start)
{
	if (phase == MEASURE) {
		shared->task[id].ns += now() - start;
		shared->task[id].faults += len / PAGE;
	}
}

/* All begin each pass at the same time, or else some run alone in the end. */
static void fault_in_area(int id)
{
	char *p = area + id * len;
	uint64_t start;
	int phase;

	for (;;) {
		if (!id)
			shared->phase_of_pass = shared->phase;
		pthread_barrier_wait(&shared->barrier);
		phase = shared->phase_of_pass;
		if (phase == STOP)
			return;
		start = now();
		touch(p, is("write"));
		count(id, phase, start);
		pthread_barrier_wait(&shared->barrier);
		drop_pages(p, len);
	}
}

static void map_and_fault(int id)
{
	char name[] = "/tmp/faultrate.XXXXXX", *p;
	int flags = MAP_PRIVATE | MAP_ANONYMOUS, fd = -1, phase;
	uint64_t start;

	if (!is("page_fault1")) {
		fd = mkstemp(name);
		if (fd < 0 || unlink(name) || ftruncate(fd, len))
			err(1, "%s", name);
		flags = is("page_fault2") ? MAP_PRIVATE : MAP_SHARED;
	}
	while ((phase = shared->phase) != STOP) {
		start = now();
		p = map(len, flags, fd);
		touch(p, 1);
		if (munmap(p, len))
			err(1, "munmap");
		count(id, phase, start);
	}
}

static void *task(void *arg)
{
	intptr_t id = (intptr_t)arg;

	pin(id);
	if (area)
		fault_in_area(id);
	else
		map_and_fault(id);
	return NULL;
}

static void change_other(void)
{
	char *p = map(2 * STEP, MAP_PRIVATE | MAP_ANONYMOUS, -1);

	*(volatile char *)p = 1;
	mprotect(p, STEP, PROT_READ);
	munmap(p, 2 * STEP);
}

static void change_same(void)
{
	mprotect(area + tasks * len, PAGE,
		 changes % 2 ? PROT_READ | PROT_WRITE : PROT_READ);
}

static void change_brk(void)
{
	static int up = 1;
	char *p = sbrk(up * (long)STEP);

	if (p != (char *)-1 && up > 0)
		*(volatile char *)p = 1;
	if (p == (char *)-1 || changes % 256 == 255)
		up = -up;
}

static void *nothing(void *arg)
{
	return arg;
}

static void change_threads(void)
{
	pthread_t thread[8];

	for (int i = 0; i < 8; i++)
		if (pthread_create(&thread[i], NULL, nothing, NULL))
			errx(1, "no thread");
	for (int i = 0; i < 8; i++)
		pthread_join(thread[i], NULL);
}

static void *write_all_the_time(void *arg)
{
	void (*change)(void) = arg;

	pin(tasks);
	while (shared->phase != STOP) {
		change();
		changes++;
		if (pause_us)
			usleep(pause_us);
	}
	return NULL;
}

static const struct {
	const char *name;
	void (*change)(void);
} writers[] = {
	{ "other", change_other },
	{ "same", change_same },
	{ "brk", change_brk },
	{ "threads", change_threads },
};

#define MAX_COUNTERS	64

struct counters {
	int n;
	char name[MAX_COUNTERS][40];
	uint64_t value[MAX_COUNTERS];
};

static void read_counters(struct counters *c)
{
	static const char *const prefixes[] = { "pgfault", "spf_", "vma_lock_", "pt_reclaim_" };
	FILE *f = fopen("/proc/vmstat", "r");

	c->n = 0;
	while (f && c->n < MAX_COUNTERS &&
	       fscanf(f, "%39s %lu", c->name[c->n], &c->value[c->n]) == 2)
		for (size_t i = 0; i < sizeof(prefixes) / sizeof(*prefixes); i++)
			if (!strncmp(c->name[c->n], prefixes[i], strlen(prefixes[i]))) {
				c->n++;
				break;
			}
	if (f)
		fclose(f);
}

static void sleep_ms(int ms)
{
	usleep(ms * 1000L);
}

int main(int argc, char **argv)
{
	int ms = 1000, warm_up = 200, opt;
	struct counters before, after;
	pthread_t thread[MAX_TASKS], writer_thread;
	pthread_barrierattr_t attr;
	void (*change)(void) = NULL;
	uint64_t start, changes_before, faults = 0;
	double rate = 0, seconds;

	while ((opt = getopt(argc, argv, "n:pm:t:w:W:P:")) != -1) {
		switch (opt) {
		case 'n': tasks = atoi(optarg); break;
		case 'p': processes = 1; break;
		case 'm': len = strtoul(optarg, NULL, 0) << 20; break;
		case 't': ms = atoi(optarg); break;
		case 'w': warm_up = atoi(optarg); break;
		case 'W': writer = optarg; break;
		case 'P': pause_us = atoi(optarg); break;
		default: return 2;
		}
	}
	if (optind != argc - 1 || tasks < 1 || tasks > MAX_TASKS || !len)
		errx(2, "usage: faultrate [-n TASKS] [-p] [-m MIB] [-t MS] [-w MS] [-W WRITER] [-P US] KIND");
	kind = argv[optind];
	for (size_t i = 0; writer && i < sizeof(writers) / sizeof(*writers); i++)
		if (!strcmp(writer, writers[i].name))
			change = writers[i].change;
	if (writer && (!change || processes))
		errx(2, "no such writer: %s", writer);

	/* A larger page would make one fault of many. */
	prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
	shared = (void *)map(sizeof(*shared), MAP_SHARED | MAP_ANONYMOUS, -1);
	pthread_barrierattr_init(&attr);
	pthread_barrierattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
	pthread_barrier_init(&shared->barrier, &attr, tasks);
	if (is("read") || is("write")) {
		/* One VMA, with room for change_same() and to begin at a table. */
		area = map((tasks + 1) * len + TABLE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
		area = (char *)(((uintptr_t)area + TABLE - 1) & ~(TABLE - 1));
		for (int i = 0; i < tasks; i++)
			for (size_t off = 0; off < len; off += TABLE / 2)
				area[i * len + off] = 1;
		drop_pages(area, tasks * len);
	} else if (!is("page_fault1") && !is("page_fault2") && !is("page_fault3")) {
		errx(2, "no such kind: %s", kind);
	} else if (change == change_same) {
		errx(2, "%s has no VMA that all use", kind);
	}

	for (intptr_t i = 0; i < tasks; i++) {
		if (processes) {
			pid_t pid = fork();

			if (pid < 0)
				err(1, "fork");
			if (!pid) {
				prctl(PR_SET_PDEATHSIG, SIGKILL);
				task((void *)i);
				_exit(0);
			}
		} else if (pthread_create(&thread[i], NULL, task, (void *)i)) {
			errx(1, "no thread");
		}
	}
	if (change && pthread_create(&writer_thread, NULL, write_all_the_time, change))
		errx(1, "no thread");

	sleep_ms(warm_up);
	read_counters(&before);
	changes_before = changes;
	start = now();
	shared->phase = MEASURE;
	sleep_ms(ms);
	shared->phase = STOP;
	seconds = (now() - start) / 1e9;
	changes_before = changes - changes_before;
	read_counters(&after);

	if (change)
		pthread_join(writer_thread, NULL);
	for (int i = 0; i < tasks; i++) {
		int status = 0;

		if (!processes)
			pthread_join(thread[i], NULL);
		else if (wait(&status) < 0 || status)
			errx(1, "a task has died");
	}
	for (int i = 0; i < tasks; i++) {
		if (!shared->task[i].ns)
			errx(1, "task %d got nothing done in %d ms", i, ms);
		faults += shared->task[i].faults;
		rate += shared->task[i].faults * 1e9 / shared->task[i].ns;
	}
	printf("rate %.0f\nfaults %lu\nchanges %.0f\n", rate, faults, changes_before / seconds);
	for (int i = 0; i < after.n && i < before.n; i++)
		printf("%s %lu\n", after.name[i], after.value[i] - before.value[i]);
	return 0;
}
