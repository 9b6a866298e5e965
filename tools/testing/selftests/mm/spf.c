// SPDX-License-Identifier: GPL-2.0
/*
 * Speculative page faults: do they happen, is what they do right, and do they
 * leave to others what is not theirs?
 *
 * Each test looks at the effect and at the counters in /proc/vmstat.  These are
 * of the whole system, so others may add to them: a test asks for at least as
 * many as it has caused.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../kselftest_harness.h"

#define SYSCTL		"/proc/sys/vm/speculative_page_fault"
#define PAGE		4096UL
#define TABLE		(2UL << 20)
#define NR_PAGES	512
#define RACE_SECONDS	3
#define NR_TOUCHERS	3

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

static long counter(const char *name)
{
	FILE *f = fopen("/proc/vmstat", "r");
	char line[128], key[64];
	long val, found = -1;

	if (!f)
		return -1;
	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%63s %ld", key, &val) == 2 &&
		    !strcmp(key, name)) {
			found = val;
			break;
		}
	}
	fclose(f);
	return found;
}

/* The sum over all reasons. */
static long all_aborts(void)
{
	FILE *f = fopen("/proc/vmstat", "r");
	char line[128], key[64];
	long val, sum = 0;

	if (!f)
		return -1;
	while (fgets(line, sizeof(line), f))
		if (sscanf(line, "%63s %ld", key, &val) == 2 &&
		    !strncmp(key, "spf_abort_", 10))
			sum += val;
	fclose(f);
	return sum;
}

static int sysctl_get(void)
{
	char c = 0;
	int fd = open(SYSCTL, O_RDONLY);

	if (fd < 0)
		return -1;
	if (read(fd, &c, 1) != 1)
		c = '0';
	close(fd);
	return c == '1';
}

static bool sysctl_set(int on)
{
	int fd = open(SYSCTL, O_WRONLY);
	bool ok;

	if (fd < 0)
		return false;
	ok = write(fd, on ? "1" : "0", 1) == 1;
	close(fd);
	return ok;
}

/* Accesses that the compiler leaves alone. */
static void poke(char *p, char what)
{
	__atomic_store_n(p, what, __ATOMIC_RELAXED);
}

static char peek(const char *p)
{
	return __atomic_load_n(p, __ATOMIC_RELAXED);
}

/* One page table's worth, aligned, for small pages. */
static char *map_table(void)
{
	char *p = mmap(NULL, 3 * TABLE, PROT_NONE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	char *q;

	if (p == MAP_FAILED)
		return NULL;
	q = (char *)(((uintptr_t)p + TABLE - 1) & ~(TABLE - 1));
	if (mmap(q, TABLE, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
		 -1, 0) != q)
		return NULL;
	if (madvise(q, TABLE, MADV_NOHUGEPAGE) && errno != EINVAL)
		return NULL;
	return q;
}

/* The same with a page table and an anon_vma, but no pages. */
static char *map_ready(void)
{
	char *p = map_table();

	if (!p)
		return NULL;
	poke(p, 1);
	return madvise(p, TABLE, MADV_DONTNEED) ? NULL : p;
}

static void write_pages(char *p, char what)
{
	int i;

	for (i = 0; i < NR_PAGES; i++)
		poke(p + i * PAGE, what);
}

static int wrong_pages(const char *p, char what)
{
	int i, wrong = 0;

	for (i = 0; i < NR_PAGES; i++)
		wrong += peek(p + i * PAGE) != what;
	return wrong;
}

static sigjmp_buf fault_jmp;

static void on_segv(int sig)
{
	siglongjmp(fault_jmp, sig);
}

/* The signal that a write to p gets, or 0. */
static int write_signal(char *p)
{
	struct sigaction sa = { .sa_handler = on_segv }, old;
	int sig;

	sigaction(SIGSEGV, &sa, &old);
	sig = sigsetjmp(fault_jmp, 1);
	if (!sig)
		poke(p, 1);
	sigaction(SIGSEGV, &old, NULL);
	return sig;
}

FIXTURE(spf)
{
	int was;
	char *p;
};

FIXTURE_SETUP(spf)
{
	self->was = sysctl_get();
	if (self->was < 0)
		SKIP(return, "needs CONFIG_SPECULATIVE_PAGE_FAULT");
	if (!sysctl_set(1))
		SKIP(return, "needs root");
	self->p = map_ready();
	ASSERT_NE(self->p, NULL);
}

FIXTURE_TEARDOWN(spf)
{
	if (self->was >= 0)
		sysctl_set(self->was);
}

#define COUNT(name)	long name = counter(#name)
#define GREW(name, by)	EXPECT_GE(counter(#name) - (name), by)

TEST_F(spf, read_gets_zero_page)
{
	COUNT(spf_success);

	EXPECT_EQ(wrong_pages(self->p, 0), 0);
	GREW(spf_success, NR_PAGES);
}

TEST_F(spf, write_gets_page)
{
	struct rusage before, after;

	COUNT(spf_success);

	getrusage(RUSAGE_THREAD, &before);
	write_pages(self->p, 2);
	getrusage(RUSAGE_THREAD, &after);
	GREW(spf_success, NR_PAGES);
	EXPECT_EQ(wrong_pages(self->p, 2), 0);
	/* One fault a page, and none of them major. */
	EXPECT_GE(after.ru_minflt - before.ru_minflt, NR_PAGES);
	EXPECT_LT(after.ru_minflt - before.ru_minflt, NR_PAGES + 20);
	EXPECT_EQ(after.ru_majflt, before.ru_majflt);
}

TEST_F(spf, write_over_zero_page)
{
	EXPECT_EQ(wrong_pages(self->p, 0), 0);
	COUNT(spf_success);
	write_pages(self->p, 3);
	GREW(spf_success, NR_PAGES);
	EXPECT_EQ(wrong_pages(self->p, 3), 0);
}

TEST_F(spf, cow_after_fork)
{
	int to_child[2], status;
	pid_t pid;
	char c;

	write_pages(self->p, 4);
	ASSERT_EQ(pipe(to_child), 0);
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid) {
		close(to_child[1]);
		if (read(to_child[0], &c, 1) < 0)
			_exit(1);
		_exit(wrong_pages(self->p, 4) ? 2 : 0);
	}
	close(to_child[0]);

	COUNT(spf_success);
	write_pages(self->p, 5);
	GREW(spf_success, NR_PAGES);
	EXPECT_EQ(wrong_pages(self->p, 5), 0);

	/* The child still has what was there. */
	close(to_child[1]);
	ASSERT_EQ(waitpid(pid, &status, 0), pid);
	EXPECT_EQ(status, 0);
}

TEST_F(spf, reuse_when_child_is_gone)
{
	pid_t pid;
	int status;

	write_pages(self->p, 6);
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid)
		_exit(0);
	ASSERT_EQ(waitpid(pid, &status, 0), pid);

	COUNT(spf_success);
	write_pages(self->p, 7);
	GREW(spf_success, NR_PAGES);
	EXPECT_EQ(wrong_pages(self->p, 7), 0);
}

TEST_F(spf, no_page_table)
{
	char *p = map_table();

	ASSERT_NE(p, NULL);
	COUNT(spf_abort_table);
	poke(p, 1);
	GREW(spf_abort_table, 1);
}

TEST_F(spf, no_anon_vma)
{
	char *p = map_table();

	ASSERT_NE(p, NULL);
	/* Reading makes the table but no anon_vma. */
	EXPECT_EQ(p[0], 0);
	COUNT(spf_abort_anon_vma);
	poke(p + PAGE, 1);
	GREW(spf_abort_anon_vma, 1);
}

TEST_F(spf, mlocked)
{
	if (mlock2(self->p, TABLE, MLOCK_ONFAULT))
		SKIP(return, "mlock2: %s", strerror(errno));
	COUNT(spf_abort_vma);
	write_pages(self->p, 1);
	GREW(spf_abort_vma, NR_PAGES);
}

TEST_F(spf, shared)
{
	char *p = mmap(NULL, TABLE, PROT_READ | PROT_WRITE,
		       MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	ASSERT_NE(p, MAP_FAILED);
	COUNT(spf_abort_vma);
	p[0] = 1;
	GREW(spf_abort_vma, 1);
}

TEST_F(spf, swapped_out)
{
	write_pages(self->p, 8);
	if (madvise(self->p, TABLE, MADV_PAGEOUT))
		SKIP(return, "MADV_PAGEOUT: %s", strerror(errno));
	EXPECT_EQ(wrong_pages(self->p, 8), 0);
}

TEST_F(spf, forbidden_access_gets_its_signal)
{
	write_pages(self->p, 9);
	ASSERT_EQ(mprotect(self->p, PAGE, PROT_READ), 0);
	COUNT(spf_abort_access);
	EXPECT_EQ(write_signal(self->p), SIGSEGV);
	GREW(spf_abort_access, 1);
	EXPECT_EQ(self->p[0], 9);
	ASSERT_EQ(mprotect(self->p, PAGE, PROT_READ | PROT_WRITE), 0);
	EXPECT_EQ(write_signal(self->p), 0);
}

TEST_F(spf, switched_off)
{
	ASSERT_TRUE(sysctl_set(0));
	COUNT(spf_attempt);
	write_pages(self->p, 1);
	EXPECT_EQ(counter("spf_attempt"), spf_attempt);
	EXPECT_EQ(wrong_pages(self->p, 1), 0);
}

/* Races.  Touchers write their page with a number that only grows, and check
 * that it is the one they have written, or 0 where the disruptor drops pages.
 */

FIXTURE(spf_race)
{
	int was;
	char *p, *q;
	void (*disrupt)(struct _test_data_spf_race *self);
	bool may_drop, may_return;
	atomic_bool stop;
	atomic_ulong rounds, faults, wrong;
};

FIXTURE_VARIANT(spf_race)
{
	void (*disrupt)(struct _test_data_spf_race *self);
	bool may_drop;		/* pages may read as zero */
	bool may_return;	/* pages may read as what they were before */
	bool no_writer;		/* of mmap_lock: nothing has to abort */
};

#define DISRUPTOR(name) static void name(struct _test_data_spf_race *self)

DISRUPTOR(other_vmas)
{
	char *p = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	munmap(p, PAGE);
}

DISRUPTOR(dontneed)
{
	madvise(self->p, TABLE, MADV_DONTNEED);
}

DISRUPTOR(map_fixed)
{
	if (mmap(self->p, TABLE, PROT_READ | PROT_WRITE, MAP_PRIVATE |
		 MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) != self->p)
		self->wrong++;
	madvise(self->p, TABLE, MADV_NOHUGEPAGE);
}

DISRUPTOR(protect_and_allow)
{
	/* Splits the VMA and merges it; the access is never forbidden. */
	mprotect(self->p + TABLE / 2, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC);
	mprotect(self->p + TABLE / 2, PAGE, PROT_READ | PROT_WRITE);
}

DISRUPTOR(fork_and_exit)
{
	pid_t pid = fork();

	if (!pid)
		_exit(0);
	waitpid(pid, NULL, 0);
}

DISRUPTOR(move_table)
{
	/*
	 * Away and back.  Touchers that come meanwhile find the mapping that
	 * MREMAP_DONTUNMAP leaves behind, empty.
	 */
	if (mremap(self->p, TABLE, TABLE, MREMAP_MAYMOVE | MREMAP_FIXED |
		   MREMAP_DONTUNMAP, self->q) != self->q)
		self->wrong++;
	if (mremap(self->q, TABLE, TABLE, MREMAP_MAYMOVE | MREMAP_FIXED,
		   self->p) != self->p)
		self->wrong++;
}

DISRUPTOR(collapse)
{
	madvise(self->p, TABLE, MADV_HUGEPAGE);
	madvise(self->p, TABLE, 25 /* MADV_COLLAPSE */);
	madvise(self->p, TABLE, MADV_NOHUGEPAGE);
	madvise(self->p, PAGE, MADV_DONTNEED);
}

FIXTURE_VARIANT_ADD(spf_race, other_vmas) { .disrupt = other_vmas };
FIXTURE_VARIANT_ADD(spf_race, dontneed) {
	.disrupt = dontneed, .may_drop = true, .no_writer = true
};

FIXTURE_VARIANT_ADD(spf_race, map_fixed) { .disrupt = map_fixed, .may_drop = true };
FIXTURE_VARIANT_ADD(spf_race, mprotect) { .disrupt = protect_and_allow };
FIXTURE_VARIANT_ADD(spf_race, fork) { .disrupt = fork_and_exit };
FIXTURE_VARIANT_ADD(spf_race, mremap) {
	.disrupt = move_table, .may_drop = true, .may_return = true
};

FIXTURE_VARIANT_ADD(spf_race, collapse) { .disrupt = collapse, .may_drop = true };

FIXTURE_SETUP(spf_race)
{
	self->was = sysctl_get();
	if (self->was < 0)
		SKIP(return, "needs CONFIG_SPECULATIVE_PAGE_FAULT");
	if (!sysctl_set(1))
		SKIP(return, "needs root");
	self->p = map_ready();
	self->q = map_ready();
	ASSERT_NE(self->p, NULL);
	ASSERT_NE(self->q, NULL);
	self->disrupt = variant->disrupt;
	self->may_drop = variant->may_drop;
	self->may_return = variant->may_return;
}

FIXTURE_TEARDOWN(spf_race)
{
	if (self->was >= 0)
		sysctl_set(self->was);
}

struct toucher {
	struct _test_data_spf_race *self;
	pthread_t thread;
	int first;
};

static bool expected(struct _test_data_spf_race *self, uint64_t is, uint64_t last)
{
	return is == last || (self->may_drop && !is) ||
	       (self->may_return && is < last);
}

static void *toucher_fn(void *data)
{
	struct toucher *t = data;
	struct _test_data_spf_race *self = t->self;
	static __thread uint64_t last[NR_PAGES];
	uint64_t n = 0;
	int i;

	while (!self->stop) {
		n++;
		for (i = t->first; i < NR_PAGES; i += NR_TOUCHERS) {
			uint64_t *word = (uint64_t *)(self->p + i * PAGE);
			uint64_t is = __atomic_load_n(word, __ATOMIC_RELAXED);

			self->wrong += !expected(self, is, last[i]);
			__atomic_store_n(word, n, __ATOMIC_RELAXED);
			last[i] = n;
			is = __atomic_load_n(word, __ATOMIC_RELAXED);
			self->wrong += !expected(self, is, n);
			self->faults++;
		}
		/* Have something to fault on. */
		if (self->may_drop && n % 4 == 0)
			for (i = t->first; i < NR_PAGES; i += NR_TOUCHERS)
				madvise(self->p + i * PAGE, PAGE, MADV_DONTNEED);
	}
	return NULL;
}

TEST_F_TIMEOUT(spf_race, contents_are_right, 120)
{
	struct toucher t[NR_TOUCHERS];
	long success = counter("spf_success"), aborts = all_aborts();
	time_t end = time(NULL) + RACE_SECONDS;
	int i;

	for (i = 0; i < NR_TOUCHERS; i++) {
		t[i].self = self;
		t[i].first = i;
		ASSERT_EQ(pthread_create(&t[i].thread, NULL, toucher_fn, &t[i]), 0);
	}
	while (time(NULL) < end) {
		self->disrupt(self);
		self->rounds++;
	}
	self->stop = true;
	for (i = 0; i < NR_TOUCHERS; i++)
		pthread_join(t[i].thread, NULL);

	success = counter("spf_success") - success;
	aborts = all_aborts() - aborts;
	TH_LOG("%lu rounds, %lu accesses: %ld speculative faults, %ld aborted, %lu words wrong",
	       self->rounds, self->faults, success, aborts, self->wrong);
	EXPECT_EQ(self->wrong, 0);
	EXPECT_GT(self->rounds, 0);
	EXPECT_GT(success, 0);
	if (!variant->no_writer)
		EXPECT_GT(aborts, 0);
}

TEST_HARNESS_MAIN
