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
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../kselftest_harness.h"
#include "anon_util.h"
#include "vmstat_sysctl.h"

#define SYSCTL		"/proc/sys/vm/speculative_page_fault"

static void write_table(char *p, char what)
{
	write_pages(p, NR_PAGES, what);
}

static int wrong_pages(const char *p, char what)
{
	return NR_PAGES - count_pages(p, NR_PAGES, what);
}

static sigjmp_buf fault_jmp;

static void on_segv(int sig)
{
	siglongjmp(fault_jmp, sig);
}

/* The signal that an access to p gets, or 0. */
static int access_signal(char *p, bool write)
{
	struct sigaction sa = { .sa_handler = on_segv }, segv, bus;
	int sig;

	sigaction(SIGSEGV, &sa, &segv);
	sigaction(SIGBUS, &sa, &bus);
	sig = sigsetjmp(fault_jmp, 1);
	if (!sig) {
		if (write)
			poke(p, 1);
		else
			peek(p);
	}
	sigaction(SIGSEGV, &segv, NULL);
	sigaction(SIGBUS, &bus, NULL);
	return sig;
}

static int write_signal(char *p)
{
	return access_signal(p, true);
}

static int read_signal(char *p)
{
	return access_signal(p, false);
}

FIXTURE(spf)
{
	int was;
	char *p;
};

FIXTURE_SETUP(spf)
{
	self->was = switch_get(SYSCTL);
	if (self->was < 0)
		SKIP(return, "needs CONFIG_SPECULATIVE_PAGE_FAULT");
	if (!switch_set(SYSCTL, 1))
		SKIP(return, "needs root");
	self->p = map_ready();
	ASSERT_NE(self->p, NULL);
}

FIXTURE_TEARDOWN(spf)
{
	if (self->was >= 0)
		switch_set(SYSCTL, self->was);
}

#define COUNT(name)	long name = vmstat_read(#name)
#define COUNT_AGAIN(name)	(name = vmstat_read(#name))
#define GREW(name, by)	EXPECT_GE(vmstat_read(#name) - (name), by)

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
	write_table(self->p, 2);
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
	write_table(self->p, 3);
	GREW(spf_success, NR_PAGES);
	EXPECT_EQ(wrong_pages(self->p, 3), 0);
}

TEST_F(spf, cow_after_fork)
{
	int to_child[2], status;
	pid_t pid;
	char c;

	write_table(self->p, 4);
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
	write_table(self->p, 5);
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

	write_table(self->p, 6);
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid)
		_exit(0);
	ASSERT_EQ(waitpid(pid, &status, 0), pid);

	COUNT(spf_success);
	write_table(self->p, 7);
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
	write_table(self->p, 1);
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
	write_table(self->p, 8);
	if (madvise(self->p, TABLE, MADV_PAGEOUT))
		SKIP(return, "MADV_PAGEOUT: %s", strerror(errno));
	EXPECT_EQ(wrong_pages(self->p, 8), 0);
}

TEST_F(spf, forbidden_access_gets_its_signal)
{
	write_table(self->p, 9);
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
	ASSERT_TRUE(switch_set(SYSCTL, 0));
	COUNT(spf_attempt);
	write_table(self->p, 1);
	EXPECT_EQ(vmstat_read("spf_attempt"), spf_attempt);
	EXPECT_EQ(wrong_pages(self->p, 1), 0);
}

/* What a thread keeps of a VMA for its next fault */

#define KEPT_ADDR	((char *)(1UL << 45))
#define KEPT_CHECK	"SPF_TEST_KEPT_CHECK"
#define MAX_WRITERS	4000

/* Have a speculative fault in the VMA at p. */
static void keep(char *p)
{
	madvise(p, PAGE, MADV_DONTNEED);
	poke(p, 1);
}

static char *map_there(char *p, size_t len, int prot)
{
	return mmap(p, len, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE |
		    MAP_FIXED_NOREPLACE, -1, 0);
}

/*
 * The page at p is there, and may not be written.  What another address space
 * had at p, where it may, is good for one value of the count of writers, so
 * have all values that it may have been.
 */
static int writes_that_got_through(char *p)
{
	char *q = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int i, bad = 0;

	if (q == MAP_FAILED)
		return -1;
	for (i = 0; i < MAX_WRITERS; i++) {
		bad += write_signal(p) != SIGSEGV;
		if (mprotect(q, PAGE, i % 2 ? PROT_READ : PROT_NONE))
			return -1;
	}
	return bad;
}

/* After exec(), before main() */
static void __attribute__((constructor)) kept_check(void)
{
	char *p;

	if (!getenv(KEPT_CHECK))
		return;
	p = map_there(KEPT_ADDR, TABLE, PROT_READ);
	if (p != KEPT_ADDR || peek(p))
		_exit(2);
	_exit(writes_that_got_through(p) ? 1 : 0);
}

TEST_F(spf, kept_not_by_child)
{
	pid_t pid;
	int status;

	write_table(self->p, 1);
	keep(self->p);
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid) {
		if (mprotect(self->p, TABLE, PROT_READ))
			_exit(2);
		_exit(writes_that_got_through(self->p) ? 1 : 0);
	}
	ASSERT_EQ(waitpid(pid, &status, 0), pid);
	EXPECT_EQ(status, 0);
	/* What the child did to its VMA is nothing to this one. */
	EXPECT_EQ(write_signal(self->p), 0);
}

TEST_F(spf, kept_not_over_exec)
{
	int status, i;
	pid_t pid;

	COUNT(spf_success);
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid) {
		char *argv[] = { "spf", NULL }, *env[] = { KEPT_CHECK "=1", NULL };

		if (map_there(KEPT_ADDR, TABLE, PROT_READ | PROT_WRITE) != KEPT_ADDR)
			_exit(3);
		madvise(KEPT_ADDR, TABLE, MADV_NOHUGEPAGE);
		for (i = 0; i < 32; i++)
			poke(KEPT_ADDR + i * PAGE, 1);
		execve("/proc/self/exe", argv, env);
		_exit(4);
	}
	ASSERT_EQ(waitpid(pid, &status, 0), pid);
	EXPECT_EQ(status, 0);
	GREW(spf_success, 16);
}

TEST_F(spf, kept_without_anon_vma)
{
	char *p = map_table();
	int i;

	ASSERT_NE(p, NULL);
	EXPECT_EQ(peek(p), 0);
	COUNT(spf_success);
	COUNT(spf_abort_anon_vma);

	/* Reading needs none, so the VMA is kept without one. */
	for (i = 1; i < 32; i++)
		EXPECT_EQ(peek(p + i * PAGE), 0);
	GREW(spf_success, 31);

	poke(p + PAGE, 1);
	GREW(spf_abort_anon_vma, 1);

	/* Now it has one, and nobody has taken mmap_lock for write. */
	COUNT_AGAIN(spf_success);
	COUNT_AGAIN(spf_abort_anon_vma);
	write_table(p, 2);
	GREW(spf_success, NR_PAGES - 2);
	EXPECT_LT(vmstat_read("spf_abort_anon_vma") - spf_abort_anon_vma,
		  NR_PAGES / 2);
	EXPECT_EQ(wrong_pages(p, 2), 0);
}

TEST_F(spf, kept_ends_where_the_vma_does)
{
	const int first = 100, behind = 200;
	char *p = self->p;
	int i;

	write_table(p, 3);
	ASSERT_EQ(mprotect(p, first * PAGE, PROT_READ), 0);
	ASSERT_EQ(mprotect(p + behind * PAGE, 100 * PAGE, PROT_READ), 0);
	ASSERT_EQ(madvise(p + first * PAGE, (behind - first) * PAGE,
			  MADV_DONTNEED), 0);

	COUNT(spf_success);
	COUNT(spf_abort_access);
	for (i = first + 1; i < behind - 1; i++) {
		/* Keeps the VMA in between */
		poke(p + i * PAGE, 4);
		EXPECT_EQ(write_signal(p + (first - 1) * PAGE), SIGSEGV);
		poke(p + i * PAGE, 5);
		EXPECT_EQ(write_signal(p + behind * PAGE), SIGSEGV);
	}
	EXPECT_EQ(write_signal(p + first * PAGE), 0);
	EXPECT_EQ(write_signal(p + behind * PAGE - 1), 0);
	GREW(spf_success, behind - first);
	GREW(spf_abort_access, 2 * (behind - first - 2));
	EXPECT_EQ(peek(p + (first - 1) * PAGE), 3);
	EXPECT_EQ(peek(p + behind * PAGE), 3);

	/* The same with nothing at both ends */
	ASSERT_EQ(munmap(p, first * PAGE), 0);
	ASSERT_EQ(munmap(p + behind * PAGE, 100 * PAGE), 0);
	ASSERT_EQ(madvise(p + first * PAGE, (behind - first) * PAGE,
			  MADV_DONTNEED), 0);
	poke(p + (first + 1) * PAGE, 6);
	EXPECT_EQ(read_signal(p + first * PAGE - 1), SIGSEGV);
	poke(p + (first + 2) * PAGE, 6);
	EXPECT_EQ(read_signal(p + behind * PAGE), SIGSEGV);
}

TEST_F(spf, kept_not_after_mprotect)
{
	char *p = self->p;
	int i;

	for (i = 0; i < 100; i++) {
		keep(p);
		ASSERT_EQ(mprotect(p, TABLE, PROT_READ), 0);
		EXPECT_EQ(write_signal(p), SIGSEGV);
		EXPECT_EQ(write_signal(p + PAGE), SIGSEGV);
		EXPECT_EQ(read_signal(p + 2 * PAGE), 0);
		ASSERT_EQ(mprotect(p, TABLE, PROT_NONE), 0);
		EXPECT_EQ(read_signal(p), SIGSEGV);
		ASSERT_EQ(mprotect(p, TABLE, PROT_READ | PROT_WRITE), 0);
		EXPECT_EQ(write_signal(p), 0);
	}
}

TEST_F(spf, kept_not_after_mlock)
{
	char *p = self->p;
	int i;

	keep(p);
	if (mlock2(p, TABLE, MLOCK_ONFAULT))
		SKIP(return, "mlock2: %s", strerror(errno));
	COUNT(spf_abort_vma);
	for (i = 1; i < 32; i++)
		poke(p + i * PAGE, 1);
	GREW(spf_abort_vma, 31);

	ASSERT_EQ(munlock(p, TABLE), 0);
	COUNT(spf_success);
	for (i = 32; i < 64; i++)
		poke(p + i * PAGE, 1);
	GREW(spf_success, 32);
}

TEST_F(spf, kept_not_after_userfaultfd)
{
	struct uffdio_api api = {
		.api = UFFD_API, .features = UFFD_FEATURE_SIGBUS
	};
	struct uffdio_register reg = {
		.range = { (uintptr_t)self->p, TABLE },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	int fd = syscall(__NR_userfaultfd, O_CLOEXEC);

	if (fd < 0)
		SKIP(return, "userfaultfd: %s", strerror(errno));
	ASSERT_EQ(ioctl(fd, UFFDIO_API, &api), 0);
	keep(self->p);
	ASSERT_EQ(ioctl(fd, UFFDIO_REGISTER, &reg), 0);
	EXPECT_EQ(write_signal(self->p + PAGE), SIGBUS);
	EXPECT_EQ(read_signal(self->p + 2 * PAGE), SIGBUS);
	ASSERT_EQ(ioctl(fd, UFFDIO_UNREGISTER, &reg.range), 0);
	EXPECT_EQ(write_signal(self->p + PAGE), 0);
	close(fd);
}

TEST_F(spf, kept_over_dontneed)
{
	char *p = self->p;
	int i;

	/* No writer: the VMA is kept, the pages are not. */
	write_table(p, 1);
	ASSERT_EQ(drop_pages(p), 0);
	COUNT(spf_success);
	for (i = 0; i < NR_PAGES; i++)
		EXPECT_EQ(peek(p + i * PAGE), 0);
	GREW(spf_success, NR_PAGES);
}

TEST_F(spf, kept_not_after_map_fixed)
{
	char *p = self->p;
	int i, fd = memfd_create("spf", 0);

	ASSERT_GE(fd, 0);
	ASSERT_EQ(ftruncate(fd, TABLE), 0);
	ASSERT_EQ(pwrite(fd, "x", 1, 7 * PAGE), 1);
	for (i = 0; i < 20; i++) {
		/* From anonymous to file ... */
		keep(p);
		ASSERT_EQ(mmap(p, TABLE, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_FIXED, fd, 0), p);
		EXPECT_EQ(peek(p + 7 * PAGE), 'x');
		EXPECT_EQ(peek(p + 8 * PAGE), 0);
		/* ... and back: that there was a file must not be kept, either. */
		ASSERT_EQ(mmap(p, TABLE, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED |
			       MAP_NORESERVE, -1, 0), p);
		madvise(p, TABLE, MADV_NOHUGEPAGE);
		poke(p, 1);
		COUNT(spf_success);
		EXPECT_EQ(peek(p + 7 * PAGE), 0);
		poke(p + 7 * PAGE, 2);
		EXPECT_EQ(peek(p + 7 * PAGE), 2);
		GREW(spf_success, 2);
	}
	close(fd);
}

TEST_F(spf, kept_beside_file)
{
	int i, fd = memfd_create("spf", 0);
	char *f, *p = self->p;

	ASSERT_GE(fd, 0);
	ASSERT_EQ(ftruncate(fd, TABLE), 0);
	f = mmap(NULL, TABLE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	ASSERT_NE(f, MAP_FAILED);

	COUNT(spf_success);
	COUNT(spf_abort_vma);
	for (i = 0; i < NR_PAGES; i++) {
		poke(f + i * PAGE, i);
		poke(p + i * PAGE, i + 1);
	}
	GREW(spf_success, NR_PAGES);
	GREW(spf_abort_vma, NR_PAGES);
	for (i = 0; i < NR_PAGES; i++) {
		EXPECT_EQ(peek(f + i * PAGE), (char)i);
		EXPECT_EQ(peek(p + i * PAGE), (char)(i + 1));
	}
	close(fd);
}

#define NR_KEEPERS	8

struct keeper {
	pthread_t thread;
	char *own, *shared;
	int nr, wrong;
};

static void *keeper_fn(void *data)
{
	struct keeper *k = data;
	int i;

	/* Back and forth between two VMAs, one of them that of all threads. */
	for (i = k->nr; i < NR_PAGES; i += NR_KEEPERS) {
		poke(k->own + i * PAGE, i);
		poke(k->shared + i * PAGE, k->nr);
	}
	for (i = k->nr; i < NR_PAGES; i += NR_KEEPERS) {
		k->wrong += peek(k->own + i * PAGE) != (char)i;
		k->wrong += peek(k->shared + i * PAGE) != k->nr;
	}
	return NULL;
}

TEST_F_TIMEOUT(spf, kept_by_many_threads, 120)
{
	struct keeper k[NR_KEEPERS] = { };
	int i, round;

	for (i = 0; i < NR_KEEPERS; i++) {
		k[i].own = map_ready();
		ASSERT_NE(k[i].own, NULL);
		k[i].shared = self->p;
		k[i].nr = i;
	}
	COUNT(spf_success);
	for (round = 0; round < 20; round++) {
		for (i = 0; i < NR_KEEPERS; i++)
			ASSERT_EQ(pthread_create(&k[i].thread, NULL, keeper_fn,
						 &k[i]), 0);
		for (i = 0; i < NR_KEEPERS; i++) {
			pthread_join(k[i].thread, NULL);
			EXPECT_EQ(k[i].wrong, 0);
			drop_pages(k[i].own);
		}
		drop_pages(self->p);
	}
	/* Threads that begin and end take mmap_lock for write, too. */
	GREW(spf_success, 20 * NR_PAGES);
}

struct protector {
	char *p;
	int step;		/* even: it is the protector's turn */
};

static void *protector_fn(void *data)
{
	struct protector *w = data;
	int step = 0;

	while (step < 2000) {
		while (__atomic_load_n(&w->step, __ATOMIC_ACQUIRE) != step)
			sched_yield();
		mprotect(w->p, TABLE, step % 4 ? PROT_READ | PROT_WRITE : PROT_READ);
		step += 2;
		__atomic_store_n(&w->step, step - 1, __ATOMIC_RELEASE);
	}
	return NULL;
}

TEST_F_TIMEOUT(spf, kept_not_after_other_thread, 120)
{
	struct protector w = { .p = self->p };
	pthread_t thread;
	int step = 0, wrong = 0;

	keep(self->p);
	ASSERT_EQ(pthread_create(&thread, NULL, protector_fn, &w), 0);
	while (step < 2000) {
		while (__atomic_load_n(&w.step, __ATOMIC_ACQUIRE) != step + 1)
			sched_yield();
		/* mprotect() has returned, over there. */
		wrong += write_signal(self->p + (step / 2 % NR_PAGES) * PAGE) !=
			 (step % 4 ? 0 : SIGSEGV);
		step += 2;
		__atomic_store_n(&w.step, step, __ATOMIC_RELEASE);
	}
	pthread_join(thread, NULL);
	EXPECT_EQ(wrong, 0);
}

TEST_HARNESS_MAIN
