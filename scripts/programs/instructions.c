// SPDX-License-Identifier: GPL-2.0
/*
 * What a command costs, in instructions: see cost.c for how they are counted.
 *
 * Usage: instructions REPEATS NAME TIMES COMMAND [ARG]...
 *
 * Counts REPEATS times what it takes to run it TIMES times, after once for
 * nothing, without address randomization, its output going nowhere.  Prints
 *
 *   NAME MEDIAN LEAST MOST ALL
 *
 * MEDIAN, LEAST and MOST are of the time that its processes ran, user and kernel.
 * ALL is the median of the whole time, in which the CPU may have been idle, and
 * have worked for the kernel's own threads.
 */
#include <err.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/personality.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include <x86intrin.h>

#include "measure.h"

#define MAX_REPEATS	1000

/* ns, and so instructions, with a precision of 1000 */
static uint64_t ran(void)
{
	struct rusage usage;

	if (getrusage(RUSAGE_CHILDREN, &usage))
		err(1, "getrusage");
	return (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000000UL +
	       (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1000UL;
}

static void run(char **command)
{
	pid_t pid = fork();
	int status;

	if (pid < 0)
		err(1, "fork");
	if (!pid) {
		int fd = open("/dev/null", O_RDWR);

		if (fd < 0 || dup2(fd, 0) < 0 || dup2(fd, 1) < 0)
			err(127, "/dev/null");
		execvp(*command, command);
		err(127, "%s", *command);
	}
	if (waitpid(pid, &status, 0) < 0 || status)
		errx(1, "%s failed (status 0x%x)", *command, status);
}

int main(int argc, char **argv)
{
	uint64_t time[MAX_REPEATS], all[MAX_REPEATS];
	int repeats = argc > 4 ? atoi(argv[1]) : 0;

	if (repeats < 1 || repeats > MAX_REPEATS)
		errx(2, "usage: instructions REPEATS NAME TIMES COMMAND [ARG]...");
	personality(ADDR_NO_RANDOMIZE);
	run(argv + 4);
	for (int i = 0; i < repeats; i++) {
		uint64_t before = ran(), start = __rdtsc();

		for (int j = 0; j < atoi(argv[3]); j++)
			run(argv + 4);
		all[i] = __rdtsc() - start;
		time[i] = ran() - before;
	}
	qsort(time, repeats, sizeof(*time), compare);
	qsort(all, repeats, sizeof(*all), compare);
	printf("%s %lu %lu %lu %lu\n", argv[2], time[repeats / 2], time[0],
	       time[repeats - 1], all[repeats / 2]);
	return 0;
}
