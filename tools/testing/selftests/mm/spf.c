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
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <linux/kernel-page-flags.h>
#include <linux/perf_event.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../kselftest_harness.h"
#include "anon_util.h"
#include "vm_util.h"
#include "vmstat_sysctl.h"

#define SYSCTL		"/proc/sys/vm/speculative_page_fault"
#define NUMA_BALANCING	"/proc/sys/kernel/numa_balancing"
#define PATIENCE	20	/* seconds, for what is bound to happen */

/* Headers of the system may be older. */
#ifndef MAP_DROPPABLE
#define MAP_DROPPABLE 0x08
#endif
#ifndef __NR_map_shadow_stack
#define __NR_map_shadow_stack 453
#endif

static void write_table(char *p, char what)
{
	write_pages(p, NR_PAGES, what);
}

static int wrong_pages(const char *p, char what)
{
	return NR_PAGES - count_pages(p, NR_PAGES, what);
}

static sigjmp_buf fault_jmp;
static siginfo_t fault_info;

static void on_fault(int sig, siginfo_t *info, void *context)
{
	fault_info = *info;
	siglongjmp(fault_jmp, sig);
}

static void do_read(char *p)
{
	peek(p);
}

static void do_write(char *p)
{
	poke(p, 1);
}

static void do_call(char *p)
{
	((void (*)(void))p)();
}

/* The signal that an access to p gets, or 0; fault_info tells more. */
static int access_signal(char *p, void (*access)(char *))
{
	struct sigaction segv, bus, sa = {
		.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO
	};
	int sig;

	sigaction(SIGSEGV, &sa, &segv);
	sigaction(SIGBUS, &sa, &bus);
	sig = sigsetjmp(fault_jmp, 1);
	if (!sig)
		access(p);
	sigaction(SIGSEGV, &segv, NULL);
	sigaction(SIGBUS, &bus, NULL);
	return sig;
}

static int write_signal(char *p)
{
	return access_signal(p, do_write);
}

static int read_signal(char *p)
{
	return access_signal(p, do_read);
}

/* A child that shares the pages, and looks at them when it is to end. */
struct sharer {
	pid_t pid;
	int end;
};

static bool sharer_begins(struct sharer *s, const char *p, char what)
{
	int fds[2];
	char c;

	if (pipe(fds))
		return false;
	s->pid = fork();
	if (!s->pid) {
		close(fds[1]);
		if (read(fds[0], &c, 1) < 0)
			_exit(1);
		_exit(wrong_pages(p, what) ? 2 : 0);
	}
	close(fds[0]);
	s->end = fds[1];
	return s->pid > 0;
}

/* 0 if it still has what was there. */
static int sharer_ends(struct sharer *s)
{
	int status;

	close(s->end);
	return waitpid(s->pid, &status, 0) == s->pid ? status : -1;
}

/* A thread that does the same thing to p again and again. */
struct other {
	pthread_t thread;
	bool (*once)(char *p, long nr);
	char *p;
	atomic_bool stop;
	atomic_long done;
	long failed;
};

static void *other_fn(void *data)
{
	struct other *o = data;

	while (!o->stop) {
		o->failed += !o->once(o->p, o->done);
		o->done++;
	}
	return NULL;
}

static bool other_begins(struct other *o, bool (*once)(char *p, long nr),
			 char *p)
{
	o->once = once;
	o->p = p;
	if (pthread_create(&o->thread, NULL, other_fn, o))
		return false;
	while (o->done < 2)
		sched_yield();
	return true;
}

static void other_ends(struct other *o)
{
	o->stop = true;
	pthread_join(o->thread, NULL);
}

/* Without, tests look at everything else. */
static bool counting;

/*
 * Have speculative faults, unless the kernel knows none, and none of NUMA
 * balancing, which come at any time.
 */
static bool spf_on(struct __test_metadata *_metadata, struct settings *settings)
{
	counting = vmstat_read("spf_attempt") >= 0;
	if (!counting)
		TH_LOG("no speculative page faults: nothing to count");
	setting_change(settings, NUMA_BALANCING, "0");
	return switch_get(SYSCTL) < 0 || setting_change(settings, SYSCTL, "1");
}

FIXTURE(spf)
{
	struct settings settings;
	char *p;
};

FIXTURE_SETUP(spf)
{
	self->p = map_ready();
	ASSERT_NE(self->p, NULL);
	if (!spf_on(_metadata, &self->settings))
		SKIP(return, "needs root");
}

/* By the parent, so that it happens whatever becomes of the test. */
FIXTURE_TEARDOWN_PARENT(spf)
{
	settings_restore(&self->settings);
}

/* What is not counted has always grown enough. */
static long grown(const char *name, long since)
{
	return counting ? vmstat_read(name) - since : LONG_MAX;
}

#define COUNT(name)	long name = vmstat_read(#name)
#define COUNT_AGAIN(name)	(name = vmstat_read(#name))
#define GREW(name, by)	EXPECT_GE(grown(#name, name), by)

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
	struct sharer child;

	write_table(self->p, 4);
	ASSERT_TRUE(sharer_begins(&child, self->p, 4));
	COUNT(spf_success);
	write_table(self->p, 5);
	GREW(spf_success, NR_PAGES);
	EXPECT_EQ(wrong_pages(self->p, 5), 0);
	EXPECT_EQ(sharer_ends(&child), 0);
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

TEST_F(spf, traced)
{
	char *p = self->p;
	char event[64];

	if (!trace_begin(&self->settings, "spf/spf_fault"))
		SKIP(return, "no tracepoints");
	/* With a page table, and without */
	poke(p, 1);
	snprintf(event, sizeof(event), "spf_fault: address=0x%lx abort=none",
		 (unsigned long)p + PAGE);
	EXPECT_FALSE(trace_shows(event));
	poke(p + PAGE, 1);
	EXPECT_TRUE(trace_shows(event));

	p = map_table();
	ASSERT_NE(p, NULL);
	snprintf(event, sizeof(event), "spf_fault: address=0x%lx abort=table",
		 (unsigned long)p);
	EXPECT_FALSE(trace_shows(event));
	poke(p, 1);
	EXPECT_TRUE(trace_shows(event));
	munmap(p, TABLE);
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
	long out;

	write_table(self->p, 8);
	if (!swap_is_on())
		SKIP(return, "needs swap");
	ASSERT_EQ(madvise(self->p, TABLE, MADV_PAGEOUT), 0);
	out = smaps_read(self->p, "Swap:") * 1024 / PAGE;
	TH_LOG("%ld of %d pages swapped out", out, NR_PAGES);
	EXPECT_GE(out, NR_PAGES / 2);
	COUNT(spf_abort_pte);
	EXPECT_EQ(wrong_pages(self->p, 8), 0);
	/* Readahead may bring some that are not asked for, but not map them. */
	GREW(spf_abort_pte, out);
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
	if (!switch_set(SYSCTL, 0))
		SKIP(return, "no " SYSCTL);
	COUNT(spf_attempt);
	write_table(self->p, 1);
	EXPECT_EQ(vmstat_read("spf_attempt"), spf_attempt);
	EXPECT_EQ(wrong_pages(self->p, 1), 0);
}

/* What is left to the path with locks, and why */

/* A huge page at p, unless there is none. */
static bool make_huge(struct settings *settings, char *p, void (*touch)(char *))
{
	if (!setting_change(settings, THP "enabled", "madvise") ||
	    madvise(p, TABLE, MADV_HUGEPAGE))
		return false;
	touch(p);
	return true;
}

TEST_F(spf, huge_page)
{
	char *p = map_table();
	struct sharer child;

	ASSERT_NE(p, NULL);
	COUNT(spf_abort_table);
	if (!make_huge(&self->settings, p, do_write) ||
	    smaps_read(p, "AnonHugePages:") != TABLE / 1024)
		SKIP(return, "no huge page");
	GREW(spf_abort_table, 1);

	write_table(p, 2);
	ASSERT_TRUE(sharer_begins(&child, p, 2));
	COUNT_AGAIN(spf_abort_table);
	COUNT(spf_success);
	/* Copying splits it, and there is a page table then. */
	poke(p, 3);
	GREW(spf_abort_table, 1);
	write_table(p, 3);
	GREW(spf_success, NR_PAGES - 1);
	EXPECT_EQ(wrong_pages(p, 3), 0);
	EXPECT_EQ(sharer_ends(&child), 0);
}

TEST_F(spf, huge_zero_page)
{
	char *p = map_table();

	ASSERT_NE(p, NULL);
	COUNT(spf_abort_table);
	if (!make_huge(&self->settings, p, do_read))
		SKIP(return, "no huge pages");
	GREW(spf_abort_table, 1);
	EXPECT_EQ(wrong_pages(p, 0), 0);
	COUNT_AGAIN(spf_abort_table);
	poke(p, 1);
	GREW(spf_abort_table, 1);
	EXPECT_EQ(peek(p), 1);
	EXPECT_EQ(wrong_pages(p, 0), 1);
}

#define MTHP		THP "hugepages-64kB/"
#define MTHP_PAGES	16

static bool mthp_enable(struct settings *settings)
{
	/* khugepaged must not make huge pages of them. */
	return setting_change(settings, THP "hugepages-2048kB/enabled", "never") &&
	       setting_change(settings, MTHP "enabled", "madvise");
}

TEST_F(spf, mthp)
{
	long mthps;

	if (!mthp_enable(&self->settings) ||
	    madvise(self->p, TABLE, MADV_HUGEPAGE))
		SKIP(return, "no huge pages of 64 kB");
	mthps = file_number(MTHP "stats/anon_fault_alloc");

	/* Zero pages are small ones anyway. */
	COUNT(spf_success);
	EXPECT_EQ(wrong_pages(self->p, 0), 0);
	GREW(spf_success, NR_PAGES);

	ASSERT_EQ(drop_pages(self->p), 0);
	COUNT(spf_abort_vma);
	write_table(self->p, 2);
	GREW(spf_abort_vma, NR_PAGES / MTHP_PAGES);
	EXPECT_EQ(wrong_pages(self->p, 2), 0);
	mthps = file_number(MTHP "stats/anon_fault_alloc") - mthps;
	EXPECT_GE(mthps, NR_PAGES / MTHP_PAGES);
}

TEST_F(spf, memory_policy)
{
	unsigned long nodes = 1UL << last_node();

	if (syscall(__NR_mbind, self->p, TABLE, MPOL_BIND, &nodes,
		    8 * sizeof(nodes), 0))
		SKIP(return, "mbind: %s", strerror(errno));
	COUNT(spf_abort_vma);
	write_table(self->p, 2);
	GREW(spf_abort_vma, NR_PAGES);
	EXPECT_EQ(wrong_pages(self->p, 2), 0);
	EXPECT_EQ(pages_on_node(self->p, NR_PAGES, last_node()), NR_PAGES);

	ASSERT_EQ(syscall(__NR_mbind, self->p, TABLE, MPOL_DEFAULT, NULL, 0, 0),
		  0);
	ASSERT_EQ(drop_pages(self->p), 0);
	COUNT(spf_success);
	write_table(self->p, 3);
	GREW(spf_success, NR_PAGES);
}

/* That of the thread is not left to others: it is followed. */
TEST_F(spf, memory_policy_of_thread)
{
	unsigned long nodes;
	int node;

	for (node = 0; node <= last_node(); node += last_node() ?: 1) {
		nodes = 1UL << node;
		if (syscall(__NR_set_mempolicy, MPOL_BIND, &nodes,
			    8 * sizeof(nodes)))
			SKIP(return, "set_mempolicy: %s", strerror(errno));
		ASSERT_EQ(drop_pages(self->p), 0);
		COUNT(spf_success);
		write_table(self->p, node + 1);
		GREW(spf_success, NR_PAGES);
		EXPECT_EQ(pages_on_node(self->p, NR_PAGES, node), NR_PAGES);
	}
}

TEST_F(spf, userfaultfd_missing)
{
	struct uffdio_register reg = {
		.range = { (uintptr_t)self->p, TABLE },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	int i, fd = uffd_open(UFFD_FEATURE_SIGBUS);

	if (fd < 0)
		SKIP(return, "userfaultfd: %s", strerror(errno));
	ASSERT_EQ(ioctl(fd, UFFDIO_REGISTER, &reg), 0);
	COUNT(spf_abort_vma);
	for (i = 0; i < NR_PAGES; i += 2) {
		EXPECT_EQ(read_signal(self->p + i * PAGE), SIGBUS);
		EXPECT_EQ(write_signal(self->p + (i + 1) * PAGE), SIGBUS);
	}
	GREW(spf_abort_vma, NR_PAGES);
	close(fd);
	COUNT(spf_success);
	write_table(self->p, 2);
	GREW(spf_success, NR_PAGES);
}

TEST_F(spf, userfaultfd_wp)
{
	struct uffdio_register reg = {
		.range = { (uintptr_t)self->p, TABLE },
		.mode = UFFDIO_REGISTER_MODE_WP,
	};
	struct uffdio_writeprotect wp = {
		.range = reg.range,
		.mode = UFFDIO_WRITEPROTECT_MODE_WP,
	};
	int i, fd = uffd_open(UFFD_FEATURE_SIGBUS |
			     UFFD_FEATURE_PAGEFAULT_FLAG_WP);

	if (fd < 0)
		SKIP(return, "userfaultfd: %s", strerror(errno));
	write_table(self->p, 2);
	ASSERT_EQ(ioctl(fd, UFFDIO_REGISTER, &reg), 0);
	ASSERT_EQ(ioctl(fd, UFFDIO_WRITEPROTECT, &wp), 0);
	COUNT(spf_abort_vma);
	for (i = 0; i < NR_PAGES; i++)
		EXPECT_EQ(write_signal(self->p + i * PAGE), SIGBUS);
	GREW(spf_abort_vma, NR_PAGES);
	EXPECT_EQ(wrong_pages(self->p, 2), 0);
	close(fd);
	write_table(self->p, 3);
	EXPECT_EQ(wrong_pages(self->p, 3), 0);
}

TEST_F(spf, stack_grows)
{
	const int grow = 64;
	char *p = reserve(TABLE);
	int i;

	ASSERT_NE(p, NULL);
	ASSERT_EQ(munmap(p, TABLE), 0);
	p += TABLE - PAGE;
	ASSERT_NE(map_at(p, PAGE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN,
			 -1), NULL);
	poke(p, 0);
	COUNT(spf_abort_vma);
	for (i = 1; i <= grow; i++)
		poke(p - i * PAGE, i);
	GREW(spf_abort_vma, grow);
	for (i = 0; i <= grow; i++)
		EXPECT_EQ(peek(p - i * PAGE), i);

	/* What has grown is like any other memory. */
	ASSERT_EQ(madvise(p - grow * PAGE, grow * PAGE, MADV_DONTNEED), 0);
	COUNT(spf_success);
	for (i = 1; i <= grow; i++)
		poke(p - i * PAGE, 1);
	GREW(spf_success, grow);
}

TEST_F(spf, kernel_mode)
{
	int i, fd = memfd_create("spf", 0);
	struct rusage before, after;
	long attempts[2];

	ASSERT_GE(fd, 0);
	for (i = 0; i < NR_PAGES; i++)
		ASSERT_EQ(pwrite(fd, "x", 1, i * PAGE), 1);
	ASSERT_EQ(ftruncate(fd, TABLE), 0);

	getrusage(RUSAGE_THREAD, &before);
	COUNT(spf_attempt);
	ASSERT_EQ(pread(fd, self->p, TABLE, 0), TABLE);
	attempts[0] = vmstat_read("spf_attempt") - spf_attempt;
	getrusage(RUSAGE_THREAD, &after);
	EXPECT_EQ(wrong_pages(self->p, 'x'), 0);
	EXPECT_GE(after.ru_minflt - before.ru_minflt, NR_PAGES);

	ASSERT_EQ(drop_pages(self->p), 0);
	COUNT_AGAIN(spf_attempt);
	ASSERT_EQ(madvise(self->p, TABLE, MADV_POPULATE_WRITE), 0);
	attempts[1] = vmstat_read("spf_attempt") - spf_attempt;
	TH_LOG("%ld attempts in read(), %ld in madvise(), for %d pages",
	       attempts[0], attempts[1], NR_PAGES);
	/* Others have some, too. */
	EXPECT_LT(attempts[0], NR_PAGES / 4);
	EXPECT_LT(attempts[1], NR_PAGES / 4);
	close(fd);
}

#define NOTHING		-1	/* instead of a protection */

static const struct {
	int prot;
	void (*access)(char *p);
	int code;
	const char *counter;
} forbidden[] = {
	{ PROT_NONE, do_read, SEGV_ACCERR, "spf_abort_access" },
	{ PROT_NONE, do_write, SEGV_ACCERR, "spf_abort_access" },
	{ PROT_READ, do_write, SEGV_ACCERR, "spf_abort_access" },
	{ PROT_READ | PROT_EXEC, do_write, SEGV_ACCERR, "spf_abort_access" },
	{ PROT_READ | PROT_WRITE, do_call, SEGV_ACCERR, "spf_abort_access" },
	{ NOTHING, do_read, SEGV_MAPERR, "spf_abort_vma" },
	{ NOTHING, do_write, SEGV_MAPERR, "spf_abort_vma" },
	{ NOTHING, do_call, SEGV_MAPERR, "spf_abort_vma" },
};

/* With speculation and without */
TEST_F(spf, signals)
{
	char *there = self->p + PAGE + 123, *none = self->p + 2 * PAGE + 321;
	int i, on, nr = ARRAY_SIZE(forbidden);
	long since;

	for (on = 0; on < 2; on++) {
		if (!switch_set(SYSCTL, on) && counting)
			SKIP(return, "needs root");
		for (i = 0; i < nr; i++) {
			ASSERT_NE(map_at(self->p, TABLE, MAP_PRIVATE |
					 MAP_ANONYMOUS, -1), NULL);
			poke(there, 7);
			if (forbidden[i].prot == NOTHING)
				munmap(self->p, TABLE);
			else
				mprotect(self->p, TABLE, forbidden[i].prot);

			since = vmstat_read(forbidden[i].counter);
			EXPECT_EQ(access_signal(there, forbidden[i].access),
				  SIGSEGV);
			EXPECT_EQ(fault_info.si_code, forbidden[i].code);
			EXPECT_EQ(fault_info.si_addr, there);
			EXPECT_EQ(access_signal(none, forbidden[i].access),
				  SIGSEGV);
			EXPECT_EQ(fault_info.si_code, forbidden[i].code);
			EXPECT_EQ(fault_info.si_addr, none);
			EXPECT_GE(grown(forbidden[i].counter, since), 2 * on);
			if (forbidden[i].prot == NOTHING)
				continue;
			mprotect(self->p, TABLE, PROT_READ);
			EXPECT_EQ(peek(there), 7);
			EXPECT_EQ(peek(none), 0);
		}
	}
}

TEST_F(spf, protection_key)
{
	char *there = self->p, *none = self->p + TABLE / 2;
	int key = pkey_alloc(0, 0), i;

	if (key < 0)
		SKIP(return, "pkey_alloc: %s", strerror(errno));
	ASSERT_EQ(pkey_mprotect(self->p, TABLE, PROT_READ | PROT_WRITE, key),
		  0);
	COUNT(spf_success);
	for (i = 0; i < NR_PAGES / 2; i++)
		poke(there + i * PAGE, 7);
	GREW(spf_success, NR_PAGES / 2);

	/* The handler, which is left by a jump, changes the rights. */
	COUNT(spf_abort_access);
	for (i = 0; i < 8; i++) {
		bool write = i & 1, only_write = i & 2;
		char *p = i & 4 ? none : there;

		pkey_set(key, only_write ? PKEY_DISABLE_WRITE :
					   PKEY_DISABLE_ACCESS);
		if (only_write && !write) {
			EXPECT_EQ(read_signal(p), 0);
			continue;
		}
		EXPECT_EQ(access_signal(p, write ? do_write : do_read),
			  SIGSEGV);
		EXPECT_EQ(fault_info.si_code, SEGV_PKUERR);
		EXPECT_EQ(fault_info.si_addr, p);
		EXPECT_EQ(fault_info.si_pkey, (unsigned int)key);
	}
	GREW(spf_abort_access, 6);

	pkey_set(key, 0);
	EXPECT_EQ(peek(there), 7);
	EXPECT_EQ(peek(none), 0);
	pkey_free(key);
}

/* Where others watch the address space, they are told before a page goes. */
TEST_F(spf, mmu_notifier)
{
	struct sharer child;
	int fd;

	write_table(self->p, 4);
	ASSERT_TRUE(sharer_begins(&child, self->p, 4));
	fd = open("/dev/hmm_dmirror0", O_RDWR);
	if (fd < 0) {
		sharer_ends(&child);
		SKIP(return, "needs test_hmm: /dev/hmm_dmirror0: %s",
		     strerror(errno));
	}
	COUNT(spf_abort_notifier);
	write_table(self->p, 5);
	GREW(spf_abort_notifier, NR_PAGES);
	EXPECT_EQ(wrong_pages(self->p, 5), 0);
	EXPECT_EQ(sharer_ends(&child), 0);

	/* Where there was none, none goes. */
	ASSERT_EQ(drop_pages(self->p), 0);
	COUNT(spf_success);
	write_table(self->p, 6);
	GREW(spf_success, NR_PAGES);
	close(fd);
}

/*
 * Do that to the pages for a second, and then until there was such an abort.
 * Returns the number of pages that had something else in them.
 */
static int faults_until(const char *counter, char *p,
			int (*round)(char *p, char what))
{
	time_t now, begin = time(NULL);
	long since = vmstat_read(counter);
	int wrong = 0;
	char what = 0;

	do {
		wrong += round(p, ++what);
		now = time(NULL);
	} while (now < begin + 2 || (now < begin + PATIENCE && counting &&
				     vmstat_read(counter) == since));
	return wrong;
}

static int write_and_drop(char *p, char what)
{
	int wrong;

	write_table(p, what);
	wrong = wrong_pages(p, what);
	drop_pages(p);
	return wrong;
}

static int write_next(char *p, char what)
{
	int wrong = wrong_pages(p, what - 1);

	write_table(p, what);
	return wrong;
}

/* While somebody else drops them */
static int write_and_lose(char *p, char what)
{
	int i, wrong = 0;
	char c;

	for (i = 0; i < NR_PAGES; i++) {
		poke(p + i * PAGE, what);
		c = peek(p + i * PAGE);
		wrong += c && c != what;
	}
	return wrong;
}

static bool protect_once(char *p, long nr)
{
	return !mprotect(p, TABLE, PROT_READ | PROT_WRITE |
			 (nr % 2 ? PROT_EXEC : 0));
}

TEST_F_TIMEOUT(spf, writer_in_vma, 3 * PATIENCE)
{
	struct other writer = { };
	int wrong;

	if (sysconf(_SC_NPROCESSORS_ONLN) < 2)
		SKIP(return, "needs two CPUs");
	COUNT(spf_abort_writer);
	COUNT(spf_abort_seq);
	ASSERT_TRUE(other_begins(&writer, protect_once, self->p));
	wrong = faults_until("spf_abort_writer", self->p, write_and_drop);
	wrong += faults_until("spf_abort_seq", self->p, write_and_drop);
	other_ends(&writer);
	TH_LOG("%ld faults met the writer, %ld found that there was one",
	       vmstat_read("spf_abort_writer") - spf_abort_writer,
	       vmstat_read("spf_abort_seq") - spf_abort_seq);
	EXPECT_EQ(wrong, 0);
	EXPECT_EQ(writer.failed, 0);
	GREW(spf_abort_writer, 1);
	GREW(spf_abort_seq, 1);
}

static bool migrate_once(char *p, long nr)
{
	return move_to_node(p, NR_PAGES, nr % 2 ? last_node() : 0) >= 0;
}

TEST_F_TIMEOUT(spf, migration_entry, 2 * PATIENCE)
{
	struct other mover = { };
	int wrong;

	if (!last_node() || sysconf(_SC_NPROCESSORS_ONLN) < 2)
		SKIP(return, "needs two nodes, and two CPUs");
	COUNT(spf_abort_pte);
	write_table(self->p, 0);
	ASSERT_TRUE(other_begins(&mover, migrate_once, self->p));
	wrong = faults_until("spf_abort_pte", self->p, write_next);
	other_ends(&mover);
	TH_LOG("%ld faults met migration entries",
	       vmstat_read("spf_abort_pte") - spf_abort_pte);
	EXPECT_EQ(wrong, 0);
	EXPECT_EQ(mover.failed, 0);
	GREW(spf_abort_pte, 1);
}

/* Entries that nobody may access, so that it shows who does */
TEST_F_TIMEOUT(spf, numa_hinting, 2 * PATIENCE)
{
	const char *debug = "/sys/kernel/debug/sched/numa_balancing/";
	char path[128];
	int wrong;

	if (!last_node() ||
	    !setting_change(&self->settings, NUMA_BALANCING, "1"))
		SKIP(return, "needs two nodes, and CONFIG_NUMA_BALANCING");
	snprintf(path, sizeof(path), "%sscan_delay_ms", debug);
	setting_change(&self->settings, path, "10");
	snprintf(path, sizeof(path), "%sscan_period_min_ms", debug);
	setting_change(&self->settings, path, "10");
	COUNT(spf_abort_pte);
	wrong = faults_until("spf_abort_pte", self->p, write_next);
	TH_LOG("%ld faults met such entries",
	       vmstat_read("spf_abort_pte") - spf_abort_pte);
	EXPECT_EQ(wrong, 0);
	GREW(spf_abort_pte, 1);
}

static bool reclaim_once(char *p, long nr)
{
	return !madvise(p, TABLE, MADV_DONTNEED);
}

TEST_F_TIMEOUT(spf, page_table_goes, 2 * PATIENCE)
{
	struct other zapper = { };
	int wrong;

	if (sysconf(_SC_NPROCESSORS_ONLN) < 2 ||
	    !setting_change(&self->settings, "/proc/sys/vm/pt_reclaim", "2"))
		SKIP(return, "needs two CPUs, and CONFIG_PT_RECLAIM");
	COUNT(spf_abort_pmd);
	COUNT(pt_reclaim_freed);
	ASSERT_TRUE(other_begins(&zapper, reclaim_once, self->p));
	wrong = faults_until("spf_abort_pmd", self->p, write_and_lose);
	other_ends(&zapper);
	TH_LOG("%ld faults lost their page table, %ld page tables went",
	       vmstat_read("spf_abort_pmd") - spf_abort_pmd,
	       vmstat_read("pt_reclaim_freed") - pt_reclaim_freed);
	EXPECT_EQ(wrong, 0);
	EXPECT_EQ(zapper.failed, 0);
	GREW(spf_abort_pmd, 1);
}

/* Memory of kinds that are not handled: at least so many faults each */

FIXTURE(spf_kind)
{
	struct settings settings;
	char *p;
};

FIXTURE_VARIANT(spf_kind)
{
	char *(*map)(struct settings *settings);
	int reads;
	int writes;	/* after these */
};

FIXTURE_SETUP(spf_kind)
{
	if (!spf_on(_metadata, &self->settings))
		SKIP(return, "needs root");
}

FIXTURE_TEARDOWN_PARENT(spf_kind)
{
	settings_restore(&self->settings);
}

static char *map_dev_zero(struct settings *settings)
{
	int fd = open("/dev/zero", O_RDWR);

	return fd < 0 ? NULL : map_at(reserve(TABLE), TABLE, MAP_PRIVATE, fd);
}

FIXTURE_VARIANT_ADD(spf_kind, dev_zero)
{
	.map = map_dev_zero,
	.reads = NR_PAGES,
	.writes = NR_PAGES,
};

static char *map_file(struct settings *settings)
{
	int fd = memfd_create("spf", 0);

	if (fd < 0 || ftruncate(fd, TABLE))
		return NULL;
	return map_at(reserve(TABLE), TABLE, MAP_PRIVATE, fd);
}

FIXTURE_VARIANT_ADD(spf_kind, private_file)
{
	.map = map_file,
	.reads = NR_PAGES / 16,		/* faults bring their neighbours */
	.writes = NR_PAGES,
};

static char *map_droppable(struct settings *settings)
{
	return map_at(reserve(TABLE), TABLE, MAP_DROPPABLE | MAP_ANONYMOUS, -1);
}

FIXTURE_VARIANT_ADD(spf_kind, droppable)
{
	.map = map_droppable,
	.reads = NR_PAGES,
	.writes = NR_PAGES,
};

static char *map_hugetlb(struct settings *settings)
{
	const char *nr = "/proc/sys/vm/nr_hugepages";

	if (!setting_change(settings, nr, "1"))
		return NULL;
	if (file_number(nr) < 1) {
		errno = ENOMEM;
		return NULL;
	}
	return map_at(reserve(TABLE), TABLE, MAP_PRIVATE | MAP_ANONYMOUS |
		      MAP_HUGETLB, -1);
}

FIXTURE_VARIANT_ADD(spf_kind, hugetlb)
{
	.map = map_hugetlb,
	.reads = 1,
	.writes = 1,
};

static char *map_shadow_stack(struct settings *settings)
{
	long p = syscall(__NR_map_shadow_stack, NULL, TABLE, 0);

	return p < 0 ? NULL : (char *)p;
}

FIXTURE_VARIANT_ADD(spf_kind, shadow_stack)
{
	.map = map_shadow_stack,
	.reads = NR_PAGES,
};

TEST_F(spf_kind, falls_back)
{
	char *p = variant->map(&self->settings);

	if (!p)
		SKIP(return, "cannot have it: %s", strerror(errno));
	COUNT(spf_abort_vma);
	EXPECT_EQ(wrong_pages(p, 0), 0);
	GREW(spf_abort_vma, variant->reads);
	if (!variant->writes)
		return;
	COUNT_AGAIN(spf_abort_vma);
	write_table(p, 2);
	GREW(spf_abort_vma, variant->writes);
	EXPECT_EQ(wrong_pages(p, 2), 0);
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
	struct uffdio_register reg = {
		.range = { (uintptr_t)self->p, TABLE },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	int fd = uffd_open(UFFD_FEATURE_SIGBUS);

	if (fd < 0)
		SKIP(return, "userfaultfd: %s", strerror(errno));
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
		/* Now and then long enough for the old VMA to be freed */
		if (i % 4 == 3)
			usleep(200000);
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

/*
 * The same faults, in a process and a memory cgroup of their own, once without
 * speculation and once with it: what they leave behind must be the same.
 */

#define MAX_TRACES	200
#define CGROUP		"/sys/fs/cgroup/spf_test"
#define SAMPLE_PAGES	8	/* a power of two, twice what is needed */

/* Numbers by name */
struct traces {
	int nr;
	struct {
		char name[40];
		long val;
	} one[MAX_TRACES];
};

static void note(struct traces *t, const char *of, const char *name, long val)
{
	int i = t->nr;

	if (i == MAX_TRACES)
		return;
	snprintf(t->one[i].name, sizeof(t->one[i].name), "%s %s", of, name);
	t->one[i].val = val;
	t->nr++;
}

/* What a process is looked at with */
struct lens {
	char *p;
	bool in_cgroup;
	int faults, minor, major;	/* perf events, or -1 */
	struct perf_event_mmap_page *samples;
	int pagemap, flags, count;
	char *scratch;
};

static int perf_open(int config, bool sample)
{
	struct perf_event_attr attr = {
		.type = PERF_TYPE_SOFTWARE,
		.size = sizeof(attr),
		.config = config,
		.sample_period = sample,
		.sample_type = sample ? PERF_SAMPLE_ADDR : 0,
	};

	return syscall(__NR_perf_event_open, &attr, 0, -1, -1, 0);
}

static void lens_open(struct lens *l)
{
	l->pagemap = open("/proc/self/pagemap", O_RDONLY);
	l->flags = open("/proc/kpageflags", O_RDONLY);
	l->count = open("/proc/kpagecount", O_RDONLY);

	l->faults = perf_open(PERF_COUNT_SW_PAGE_FAULTS, false);
	l->major = perf_open(PERF_COUNT_SW_PAGE_FAULTS_MAJ, false);
	l->minor = perf_open(PERF_COUNT_SW_PAGE_FAULTS_MIN, true);
	if (l->minor < 0)
		return;
	l->samples = mmap(NULL, (1 + SAMPLE_PAGES) * PAGE,
			  PROT_READ | PROT_WRITE, MAP_SHARED, l->minor, 0);
	if (l->samples == MAP_FAILED)
		l->samples = NULL;
}

static long perf_count(int fd)
{
	long val;

	return read(fd, &val, sizeof(val)) == sizeof(val) ? val : -1;
}

/* Faults here by their addresses, all of them and those of the next page. */
static void note_samples(struct traces *t, struct lens *l)
{
	char *data = (char *)l->samples + PAGE;
	unsigned long pos, first = (uintptr_t)l->p;
	long here = 0, next = 0;
	struct {
		struct perf_event_header header;
		unsigned long addr;
	} *one;

	for (pos = 0; pos < l->samples->data_head; pos += sizeof(*one)) {
		one = (void *)(data + pos % (SAMPLE_PAGES * PAGE));
		if (one->header.type != PERF_RECORD_SAMPLE ||
		    one->addr - first >= TABLE)
			continue;
		next += one->addr == first + here * PAGE;
		here++;
	}
	note(t, "perf", "samples", here);
	note(t, "perf", "samples in order", next);
}

static void note_fields(struct traces *t, const char *path, const char *of,
			const char * const *names)
{
	for (; *names; names++)
		note(t, of, *names, field_read(path, *names));
}

static const char * const memcg_fields[] = {
	"anon", "file", "shmem", "pagetables", "swapcached", "anon_thp",
	"active_anon", "inactive_anon", "unevictable", "pgfault", "pgmajfault",
	"pgactivate", "pgdeactivate", "pglazyfree", "pgscan", "pgsteal",
	"thp_fault_alloc", "thp_collapse_alloc", NULL
};

static const char * const event_fields[] = {
	"low", "high", "max", "oom", "oom_kill", NULL
};

static const char * const smaps_fields[] = {
	"Rss:", "Pss:", "Pss_Dirty:", "Shared_Clean:", "Shared_Dirty:",
	"Private_Clean:", "Private_Dirty:", "Referenced:", "Anonymous:",
	"KSM:", "LazyFree:", "AnonHugePages:", "Swap:", "Locked:", NULL
};

#define MTHP_STATS	MTHP "stats/"

static const char * const mthp_files[] = {
	"anon_fault_alloc", "anon_fault_fallback",
	"anon_fault_fallback_charge", NULL
};

static void note_memcg(struct traces *t)
{
	/* Brings all numbers of the cgroup up to date */
	field_read(CGROUP "/cpu.stat", "usage_usec");
	note_fields(t, CGROUP "/memory.stat", "memory.stat", memcg_fields);
	note_fields(t, CGROUP "/memory.events", "memory.events", event_fields);
}

/* How many pages, and entries, have each of these bits */
static void note_bits(struct traces *t, const char *of, const long *nr,
		      int first)
{
	char name[16];
	int i;

	for (i = first; i < 64; i++) {
		snprintf(name, sizeof(name), "bit %d", i);
		if (nr[i])
			note(t, of, name, nr[i]);
	}
}

static void note_pages(struct traces *t, struct lens *l)
{
	long entries[64] = { }, pages[64] = { }, maps = 0;
	unsigned long entry, pfn, flags, count;
	int i, bit;

	for (i = 0; i < NR_PAGES; i++) {
		pfn = (uintptr_t)l->p / PAGE + i;
		if (pread(l->pagemap, &entry, 8, pfn * 8) != 8)
			continue;
		for (bit = 55; bit < 64; bit++)
			entries[bit] += entry >> bit & 1;
		pfn = PAGEMAP_PFN(entry);
		if (!PAGEMAP_PRESENT(entry) || !pfn ||
		    pread(l->flags, &flags, 8, pfn * 8) != 8 ||
		    pread(l->count, &count, 8, pfn * 8) != 8)
			continue;
		for (bit = 0; bit < 64; bit++)
			pages[bit] += flags >> bit & 1;
		/* Everybody else maps the zero page, too. */
		if (!(flags >> KPF_ZERO_PAGE & 1))
			maps += count;
	}
	note_bits(t, "pagemap", entries, 55);
	note_bits(t, "kpageflags", pages, 0);
	note(t, "kpagecount", "sum", maps);
}

static void note_stat(struct traces *t)
{
	FILE *f = fopen("/proc/self/stat", "r");
	long min = -1, maj = -1;

	if (!f)
		return;
	if (fscanf(f, "%*d (%*[^)]) %*c %*d %*d %*d %*d %*d %*u %ld %*u %ld",
		   &min, &maj) != 2)
		min = -1;
	fclose(f);
	note(t, "stat", "minflt", min);
	note(t, "stat", "majflt", maj);
}

/* The faults of the process first: looking may cause some. */
static void look_at_counters(struct traces *t, struct lens *l)
{
	const char * const *name;
	struct rusage usage;
	long faults, minor, major;

	t->nr = 0;
	faults = perf_count(l->faults);
	minor = perf_count(l->minor);
	major = perf_count(l->major);
	getrusage(RUSAGE_SELF, &usage);
	note(t, "rusage", "minflt", usage.ru_minflt);
	note(t, "rusage", "majflt", usage.ru_majflt);
	note(t, "perf", "faults", faults);
	note(t, "perf", "minor faults", minor);
	note(t, "perf", "major faults", major);
	note_stat(t);

	/* What waits to be put on the LRU lists gets there. */
	mlock(l->scratch, PAGE);
	munlock(l->scratch, PAGE);
	if (l->in_cgroup)
		note_memcg(t);
	for (name = mthp_files; *name; name++) {
		char path[128];

		snprintf(path, sizeof(path), MTHP_STATS "%s", *name);
		note(t, "mthp", *name, file_number(path));
	}
	note(t, "status", "RssAnon", field_read("/proc/self/status", "RssAnon:"));
	note(t, "status", "VmPTE", vm_pte());
}

static void look_at_pages(struct traces *t, struct lens *l)
{
	const char * const *name;

	for (name = smaps_fields; *name; name++)
		note(t, "smaps", *name, smaps_read(l->p, *name));
	note_pages(t, l);
	if (l->samples)
		note_samples(t, l);
}

FIXTURE(spf_same)
{
	struct settings settings;
};

FIXTURE_VARIANT(spf_same)
{
	/* Returns the pages, ready for the faults. */
	char *(*prepare)(struct settings *settings);
	bool write;
	int faults;
	int speculative;
};

FIXTURE_SETUP(spf_same)
{
	if (!spf_on(_metadata, &self->settings))
		SKIP(return, "needs root");
}

FIXTURE_TEARDOWN_PARENT(spf_same)
{
	settings_restore(&self->settings);
}

static char *prepare_none(struct settings *settings)
{
	return map_ready();
}

FIXTURE_VARIANT_ADD(spf_same, read)
{
	.prepare = prepare_none,
	.faults = NR_PAGES,
	.speculative = NR_PAGES,
};

FIXTURE_VARIANT_ADD(spf_same, write)
{
	.prepare = prepare_none,
	.write = true,
	.faults = NR_PAGES,
	.speculative = NR_PAGES,
};

static char *prepare_zero_pages(struct settings *settings)
{
	char *p = map_ready();

	return !p || wrong_pages(p, 0) ? NULL : p;
}

FIXTURE_VARIANT_ADD(spf_same, write_over_zero_page)
{
	.prepare = prepare_zero_pages,
	.write = true,
	.faults = NR_PAGES,
	.speculative = NR_PAGES,
};

static char *prepare_written(struct settings *settings)
{
	char *p = map_ready();

	if (p)
		write_table(p, 1);
	return p;
}

/* The child ends with this process, which has the other end of its pipe. */
static char *prepare_shared(struct settings *settings)
{
	char *p = prepare_written(settings);
	struct sharer child;

	return p && sharer_begins(&child, p, 1) ? p : NULL;
}

FIXTURE_VARIANT_ADD(spf_same, cow)
{
	.prepare = prepare_shared,
	.write = true,
	.faults = NR_PAGES,
	.speculative = NR_PAGES,
};

static char *prepare_once_shared(struct settings *settings)
{
	char *p = prepare_written(settings);
	struct sharer child;

	return p && sharer_begins(&child, p, 1) && !sharer_ends(&child) ?
	       p : NULL;
}

FIXTURE_VARIANT_ADD(spf_same, reuse)
{
	.prepare = prepare_once_shared,
	.write = true,
	.faults = NR_PAGES,
	.speculative = NR_PAGES,
};

static char *prepare_clean(struct settings *settings)
{
	char *p = prepare_written(settings);

	return p && file_write("/proc/self/clear_refs", "4") ? p : NULL;
}

FIXTURE_VARIANT_ADD(spf_same, soft_dirty)
{
	.prepare = prepare_clean,
	.write = true,
	.faults = NR_PAGES,
	.speculative = NR_PAGES,
};

static char *prepare_no_table(struct settings *settings)
{
	return map_table();
}

FIXTURE_VARIANT_ADD(spf_same, first_touch)
{
	.prepare = prepare_no_table,
	.write = true,
	.faults = NR_PAGES,
	.speculative = NR_PAGES - 1,
};

static char *prepare_huge(struct settings *settings)
{
	char *p = map_table();

	return p && setting_change(settings, THP "enabled", "madvise") &&
	       !madvise(p, TABLE, MADV_HUGEPAGE) ? p : NULL;
}

FIXTURE_VARIANT_ADD(spf_same, huge_page)
{
	.prepare = prepare_huge,
	.write = true,
	.faults = 1,
};

static char *prepare_mthp(struct settings *settings)
{
	char *p = map_ready();

	return p && mthp_enable(settings) &&
	       !madvise(p, TABLE, MADV_HUGEPAGE) ? p : NULL;
}

FIXTURE_VARIANT_ADD(spf_same, mthp)
{
	.prepare = prepare_mthp,
	.write = true,
	.faults = NR_PAGES / MTHP_PAGES,
};

/* Shared by those who run the faults and those who compare */
struct run {
	char *(*prepare)(struct settings *settings);
	bool write;
	struct traces counters[2], pages;
	long speculative;
	int wrong;
	bool in_cgroup, perf;
	struct settings settings;
};

static int have_faults(const struct run *run, char *p)
{
	if (!run->write)
		return wrong_pages(p, 0);
	write_table(p, 2);
	return 0;
}

/* Never returns. */
static void run_faults(struct run *run)
{
	struct lens lens = { };
	cpu_set_t cpu;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	/* What a CPU holds back it holds back of all of them. */
	CPU_ZERO(&cpu);
	CPU_SET(sched_getcpu(), &cpu);
	sched_setaffinity(0, sizeof(cpu), &cpu);

	lens.p = run->prepare(&run->settings);
	if (!lens.p)
		_exit(KSFT_SKIP);
	lens.scratch = map_table();
	if (!lens.scratch)
		_exit(KSFT_FAIL);
	/* Children that were needed for that stay outside. */
	lens.in_cgroup = file_write(CGROUP "/cgroup.procs", "0");
	lens_open(&lens);
	run->in_cgroup = lens.in_cgroup;
	run->perf = lens.samples;

	/* Once for nothing, so that all that it takes is there. */
	have_faults(run, lens.scratch);
	look_at_counters(&run->counters[1], &lens);
	look_at_counters(&run->counters[0], &lens);
	run->speculative = -vmstat_read("spf_success");
	run->wrong = have_faults(run, lens.p);
	look_at_counters(&run->counters[1], &lens);
	run->speculative += vmstat_read("spf_success");
	look_at_pages(&run->pages, &lens);
	run->wrong += wrong_pages(lens.p, run->write ? 2 : 0);
	_exit(0);
}

static int run_alone(struct run *run)
{
	int i, status = -1;
	pid_t pid;

	file_write("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	mkdir(CGROUP, 0755);
	pid = fork();
	if (!pid)
		run_faults(run);
	if (pid > 0)
		waitpid(pid, &status, 0);
	settings_restore(&run->settings);
	/* It may take a while until it has left. */
	for (i = 0; i < 50 && rmdir(CGROUP) && errno == EBUSY; i++)
		usleep(100000);
	return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/* The number of differences; values are those after less those before. */
static int differences(struct __test_metadata *_metadata,
		       const struct traces *before[2],
		       const struct traces *after[2])
{
	int i, found = 0;
	long val[2];

	if (after[0]->nr != after[1]->nr)
		found++;
	for (i = 0; i < after[0]->nr; i++) {
		val[0] = after[0]->one[i].val;
		val[1] = after[1]->one[i].val;
		if (before) {
			val[0] -= before[0]->one[i].val;
			val[1] -= before[1]->one[i].val;
		}
		if (!strcmp(after[0]->one[i].name, after[1]->one[i].name) &&
		    val[0] == val[1])
			continue;
		TH_LOG("%s: %ld without, %s: %ld with", after[0]->one[i].name,
		       val[0], after[1]->one[i].name, val[1]);
		found++;
	}
	return found;
}

TEST_F(spf_same, traces)
{
	struct run *run = mmap(NULL, 2 * sizeof(*run), PROT_READ | PROT_WRITE,
			       MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	const struct traces *before[] = {
		&run[0].counters[0], &run[1].counters[0]
	};
	const struct traces *after[] = {
		&run[0].counters[1], &run[1].counters[1]
	};
	const struct traces *pages[] = { &run[0].pages, &run[1].pages };
	int on, ret;
	long faults;

	ASSERT_NE(run, MAP_FAILED);
	for (on = 0; on < 2; on++) {
		if (!switch_set(SYSCTL, on) && counting)
			SKIP(return, "needs root");
		run[on].prepare = variant->prepare;
		run[on].write = variant->write;
		ret = run_alone(&run[on]);
		if (ret == KSFT_SKIP)
			SKIP(return, "cannot prepare that");
		ASSERT_EQ(ret, 0);
		EXPECT_EQ(run[on].wrong, 0);
		/* That of rusage comes first; a few are of the test itself. */
		faults = after[on]->one[0].val - before[on]->one[0].val;
		EXPECT_GE(faults, variant->faults);
		EXPECT_LT(faults, variant->faults + 20);
	}
	EXPECT_EQ(run[0].speculative, 0);
	EXPECT_GE(run[1].speculative, counting ? variant->speculative : 0);
	EXPECT_EQ(differences(_metadata, before, after), 0);
	EXPECT_EQ(differences(_metadata, NULL, pages), 0);
	TH_LOG("%d numbers compared, %ld faults, %ld speculative; %s memory cgroup, %s perf",
	       after[0]->nr + pages[0]->nr, faults, run[1].speculative,
	       run[1].in_cgroup ? "with" : "no",
	       run[1].perf ? "with" : "no");
}

/* What others do elsewhere in the address space is nothing to these faults. */

#define NR_FAULTS	(40 * NR_PAGES)
#define NOT_JUDGED	0

FIXTURE(spf_beside)
{
	struct settings settings;
	char *p;
};

FIXTURE_VARIANT(spf_beside)
{
	const char *what;
	bool (*once)(char *p, long nr);	/* gets a page that is its own */
	int least;		/* how many of 1000 have to be speculative */
};

FIXTURE_SETUP(spf_beside)
{
	if (sysconf(_SC_NPROCESSORS_ONLN) < 2)
		SKIP(return, "needs two CPUs");
	self->p = map_ready();
	ASSERT_NE(self->p, NULL);
	if (!spf_on(_metadata, &self->settings))
		SKIP(return, "needs root");
}

FIXTURE_TEARDOWN_PARENT(spf_beside)
{
	settings_restore(&self->settings);
}

static bool yield_once(char *p, long nr)
{
	sched_yield();
	return true;
}

FIXTURE_VARIANT_ADD(spf_beside, no_writer)
{
	.what = "sched_yield()",
	.once = yield_once,
	.least = 995,
};

static bool map_once(char *p, long nr)
{
	char *q = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return q != MAP_FAILED && !munmap(q, 16 * PAGE);
}

FIXTURE_VARIANT_ADD(spf_beside, map)
{
	.what = "mmap() and munmap()",
	.once = map_once,
	.least = 950,
};

static bool change_once(char *p, long nr)
{
	return !mprotect(p, PAGE, nr % 2 ? PROT_READ | PROT_WRITE : PROT_READ);
}

FIXTURE_VARIANT_ADD(spf_beside, protect)
{
	.what = "mprotect()",
	.once = change_once,
	.least = 950,
};

/* There and back, with what is in it */
static bool move_once(char *p, long nr)
{
	char *from = nr % 2 ? p + TABLE / 2 : p;
	char *to = nr % 2 ? p : p + TABLE / 2;

	if (!nr)
		poke(from, 5);
	return mremap(from, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) ==
	       to && peek(to) == 5;
}

FIXTURE_VARIANT_ADD(spf_beside, move)
{
	.what = "mremap()",
	.once = move_once,
	.least = 950,
};

/* All of the heap is one VMA: 64 pages up, and down again. */
static bool grow_once(char *p, long nr)
{
	return sbrk(nr % 128 < 64 ? PAGE : -PAGE) != (void *)-1;
}

FIXTURE_VARIANT_ADD(spf_beside, grow)
{
	.what = "brk()",
	.once = grow_once,
	.least = NOT_JUDGED,
};

static void *no_fn(void *data)
{
	return data;
}

static bool thread_once(char *p, long nr)
{
	pthread_t thread;

	return !pthread_create(&thread, NULL, no_fn, NULL) &&
	       !pthread_join(thread, NULL);
}

FIXTURE_VARIANT_ADD(spf_beside, threads)
{
	.what = "pthread_create() and pthread_join()",
	.once = thread_once,
	.least = 950,
};

/* Where there are delays, faults take so long that others get in between. */
static bool delays_are_off(void)
{
	const char *dir = "/sys/kernel/debug/mm_race_delay";
	struct dirent *entry;
	DIR *d = opendir(dir);
	bool off = true;
	char path[512];

	while (d && (entry = readdir(d))) {
		snprintf(path, sizeof(path), "%s/%s", dir, entry->d_name);
		if (entry->d_name[0] != '.' && file_number(path) > 0)
			off = false;
	}
	if (d)
		closedir(d);
	return off;
}

TEST_F_TIMEOUT(spf_beside, speculative, 120)
{
	char *page = map_table();
	struct other other = { };
	const bool judged = counting && delays_are_off();
	time_t end = time(NULL) + (judged ? 2 * PATIENCE : 5);
	long success, aborts, got, faults = 0;
	int wrong = 0;
	char what = 0;

	ASSERT_NE(page, NULL);
	ASSERT_TRUE(other_begins(&other, variant->once, page));
	success = vmstat_read("spf_success");
	aborts = vmstat_sum("spf_abort_");
	for (; faults < NR_FAULTS && time(NULL) < end; faults += NR_PAGES)
		wrong += write_and_drop(self->p, ++what);
	success = vmstat_read("spf_success") - success;
	aborts = vmstat_sum("spf_abort_") - aborts;
	other_ends(&other);

	/* The other one may have some that succeed: do not count these. */
	got = success < faults - aborts ? success : faults - aborts;
	TH_LOG("%ld of %ld beside %s, which ran %ld times", got, faults,
	       variant->what, other.done);
	EXPECT_EQ(wrong, 0);
	EXPECT_EQ(other.failed, 0);
	EXPECT_GE(other.done, 20);
	if (!judged)
		return;
	EXPECT_EQ(faults, NR_FAULTS);
	EXPECT_GE(got * 1000, variant->least * faults);
}

TEST_HARNESS_MAIN
