/* SPDX-License-Identifier: GPL-2.0 */
/* What the programs that measure have in common. */
#include <err.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE	4096UL
#define TABLE	(2UL << 20)		/* what one page table maps */

/* For qsort(), of uint64_t. */
static inline int compare(const void *a, const void *b)
{
	uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

	return x < y ? -1 : x > y;
}

/* ns */
static inline uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000UL + t.tv_nsec;
}

/* A child that shares all pages until it is told to go. */
static inline pid_t fork_child(int *pipe_end)
{
	int fd[2];
	pid_t pid;
	char c;

	if (pipe(fd))
		err(1, "pipe");
	pid = fork();
	if (pid < 0)
		err(1, "fork");
	if (!pid) {
		close(fd[1]);
		_exit(read(fd[0], &c, 1) != 0);
	}
	close(fd[0]);
	*pipe_end = fd[1];
	return pid;
}

static inline void end_child(pid_t pid, int pipe_end)
{
	close(pipe_end);
	waitpid(pid, NULL, 0);
}

static inline void drop(char *p, size_t len)
{
	if (madvise(p, len, MADV_DONTNEED))
		err(1, "madvise");
}

/* Give the pages back; the page tables stay, as none is covered completely. */
static inline void drop_pages(char *p, size_t len)
{
	for (char *end = p + len; p < end; p += TABLE / 2)
		drop(p, TABLE / 2);
}
