// SPDX-License-Identifier: GPL-2.0
/*
 * Do page tables, and their locks, outlive the RCU read-side critical section
 * of a walker that met them?
 *
 * Some threads ask the kernel (CONFIG_PGTABLE_WALK_TEST) to walk to an address
 * with no protection but rcu_read_lock(), and to dawdle on the way.  Another
 * one makes the tables there come and go.  Each way a user page table can be
 * freed has a variant.  The walker must never find that a table has been torn
 * down, and it must have met some that were unlinked meanwhile, or else the
 * test has tested nothing.
 *
 * Locks that are allocated apart from the table (lockdep, spinlock debugging)
 * need KASAN to show that they are used after they were freed: look at the
 * kernel log as well.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <mm/pgtable_walk_test.h>

#include "../kselftest_harness.h"
#include "anon_util.h"
#include "vmstat_sysctl.h"

#define DEBUGFS		"/sys/kernel/debug/"
#define PT_RECLAIM	"/proc/sys/vm/pt_reclaim"
#define FAIL_PAGE_ALLOC	DEBUGFS "fail_page_alloc/"
#define NR_WALKERS	2
#define WALKS_PER_CALL	20
#define RUN_SECONDS	3
#define MIN_UNLINKED	50
#define PMD_SIZE	(2UL << 20)

/*
 * Nothing else is near, so that unmapping it frees tables of all levels up to
 * PUD, and of p4d as well if there are five and the address is high enough.
 */
#define ADDR_LOW	0x200000000000UL
#define ADDR_HIGH	0x40000000000000UL

/* Map len bytes at addr for small pages, and touch one per page table. */
static bool map_and_touch(char *addr, size_t len)
{
	char *p = mmap(addr, len, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE |
		       MAP_FIXED_NOREPLACE, -1, 0);
	size_t i;

	if (p != addr)
		return false;
	/* EINVAL: this kernel has no huge pages anyway. */
	if (madvise(p, len, MADV_NOHUGEPAGE) && errno != EINVAL)
		return false;
	for (i = 0; i < len; i += PMD_SIZE)
		p[i] = 1;
	return true;
}

static bool munmap_round(char *addr)
{
	return map_and_touch(addr, PMD_SIZE) && !munmap(addr, PMD_SIZE);
}

/*
 * Collapse puts the PTE page aside behind the huge page that replaces it.
 * Zapping the huge page frees the PTE page without it ever being mapped again.
 */
static bool deposit_round(char *addr)
{
	bool ok = map_and_touch(addr, PMD_SIZE) &&
		  !madvise(addr, PMD_SIZE, MADV_HUGEPAGE) &&
		  !madvise(addr, PMD_SIZE, MADV_COLLAPSE) &&
		  !madvise(addr, PMD_SIZE, MADV_DONTNEED);

	return !munmap(addr, PMD_SIZE) && ok;
}

/* Zapping all of a page table frees it, with the VMA still there. */
static bool reclaim_round(char *addr)
{
	bool ok = map_and_touch(addr, PMD_SIZE) &&
		  !madvise(addr, PMD_SIZE, MADV_DONTNEED);

	return !munmap(addr, PMD_SIZE) && ok;
}

FIXTURE(pgtable_walk)
{
	int fd;
	char *addr;
	bool (*round)(char *addr);
	unsigned int delay_us;
	bool fail_alloc;
	struct settings settings;
	atomic_bool stop;
	atomic_int broken;
	atomic_uint nr_locked, nr_unlinked;
	atomic_uint nr_freed_pte, nr_freed_pmd, nr_freed_pud, nr_freed_p4d;
	atomic_uint nr_rounds;
};

FIXTURE_VARIANT(pgtable_walk)
{
	unsigned long addr;
	bool (*round)(char *addr);
	unsigned int delay_us;	/* about as long as a round takes */
	bool fail_alloc;	/* of the pages that list the freed tables */
};

/* Tables are listed in a page that is freed with them after a grace period. */
FIXTURE_VARIANT_ADD(pgtable_walk, munmap)
{
	.addr = ADDR_LOW,
	.round = munmap_round,
	.delay_us = 300,
};

/* No memory for that page: each table goes on its own. */
FIXTURE_VARIANT_ADD(pgtable_walk, munmap_no_memory)
{
	.addr = ADDR_LOW,
	.round = munmap_round,
	.delay_us = 300,
	.fail_alloc = true,
};

FIXTURE_VARIANT_ADD(pgtable_walk, munmap_five_levels)
{
	.addr = ADDR_HIGH,
	.round = munmap_round,
	.delay_us = 300,
};

FIXTURE_VARIANT_ADD(pgtable_walk, munmap_five_levels_no_memory)
{
	.addr = ADDR_HIGH,
	.round = munmap_round,
	.delay_us = 300,
	.fail_alloc = true,
};

FIXTURE_VARIANT_ADD(pgtable_walk, zap_deposited)
{
	.addr = ADDR_LOW,
	.round = deposit_round,
	.delay_us = 6000,
};

FIXTURE_VARIANT_ADD(pgtable_walk, reclaimed)
{
	.addr = ADDR_LOW,
	.round = reclaim_round,
	.delay_us = 300,
};

FIXTURE_SETUP(pgtable_walk)
{
	self->fd = open(DEBUGFS "pgtable_walk_test", O_RDWR);
	if (self->fd < 0)
		SKIP(return, "needs root, debugfs, CONFIG_PGTABLE_WALK_TEST: %s",
		     strerror(errno));
	if (sysconf(_SC_NPROCESSORS_ONLN) < 2)
		SKIP(return, "needs two CPUs for a race");

	self->addr = (char *)variant->addr;
	self->round = variant->round;
	self->delay_us = variant->delay_us;
	self->fail_alloc = variant->fail_alloc;

	if (!map_and_touch(self->addr, PMD_SIZE))
		SKIP(return, "cannot map at %p", self->addr);
	ASSERT_EQ(munmap(self->addr, PMD_SIZE), 0);

	if (variant->round == deposit_round && !deposit_round(self->addr))
		SKIP(return, "MADV_COLLAPSE does not work here");

	/* Each time, and not just the first */
	if (variant->round == reclaim_round &&
	    !setting_change(&self->settings, PT_RECLAIM, "2"))
		SKIP(return, "page tables are not reclaimed here");

	if (variant->fail_alloc) {
		if (access(FAIL_PAGE_ALLOC "probability", W_OK))
			SKIP(return, "needs CONFIG_FAIL_PAGE_ALLOC and its debugfs");
		/* Fail whatever may not wait for memory, in one thread. */
		ASSERT_TRUE(file_write(FAIL_PAGE_ALLOC "task-filter", "Y"));
		ASSERT_TRUE(file_write(FAIL_PAGE_ALLOC "ignore-gfp-wait", "Y"));
		ASSERT_TRUE(file_write(FAIL_PAGE_ALLOC "min-order", "0"));
		ASSERT_TRUE(file_write(FAIL_PAGE_ALLOC "verbose", "0"));
		ASSERT_TRUE(file_write(FAIL_PAGE_ALLOC "interval", "1"));
		ASSERT_TRUE(file_write(FAIL_PAGE_ALLOC "times", "1000000000"));
		ASSERT_TRUE(file_write(FAIL_PAGE_ALLOC "probability", "100"));
	}
}

FIXTURE_TEARDOWN(pgtable_walk)
{
	if (self->fail_alloc)
		file_write(FAIL_PAGE_ALLOC "probability", "0");
	settings_restore(&self->settings);
	if (self->fd >= 0)
		close(self->fd);
}

static void *walker_fn(void *data)
{
	FIXTURE_DATA(pgtable_walk) *self = data;
	struct pgtable_walk_test t = {
		.addr = (unsigned long)self->addr,
		.nr_walks = WALKS_PER_CALL,
	};
	unsigned int round = 0;

	while (!self->stop) {
		/* Some walks find the window narrow, others wide open. */
		t.delay_us = round++ % 4 * self->delay_us / 3;
		if (ioctl(self->fd, PGTABLE_WALK_TEST, &t)) {
			self->broken = errno;
			break;
		}
		self->nr_locked += t.nr_locked;
		self->nr_unlinked += t.nr_unlinked;
		self->nr_freed_pte += t.nr_freed_pte;
		self->nr_freed_pmd += t.nr_freed_pmd;
		self->nr_freed_pud += t.nr_freed_pud;
		self->nr_freed_p4d += t.nr_freed_p4d;
		sched_yield();
	}
	return NULL;
}

static void *mutator_fn(void *data)
{
	FIXTURE_DATA(pgtable_walk) *self = data;

	if (self->fail_alloc && !file_write("/proc/thread-self/make-it-fail", "1"))
		self->broken = errno;

	while (!self->stop) {
		/* A huge page, or any memory, may not be there this time. */
		if (self->round(self->addr))
			self->nr_rounds++;
		else
			sched_yield();
	}
	return NULL;
}

TEST_F_TIMEOUT(pgtable_walk, tables_outlive_walkers, 120)
{
	long failures = file_number(FAIL_PAGE_ALLOC "times");
	pthread_t walker[NR_WALKERS], mutator;
	time_t now, end;
	int i;

	for (i = 0; i < NR_WALKERS; i++)
		ASSERT_EQ(pthread_create(&walker[i], NULL, walker_fn, self), 0);
	ASSERT_EQ(pthread_create(&mutator, NULL, mutator_fn, self), 0);

	/* They may not meet often where CPUs have other things to do. */
	end = time(NULL) + RUN_SECONDS;
	do {
		usleep(100000);
		now = time(NULL);
	} while (now < end ||
		 (self->nr_unlinked < MIN_UNLINKED && now < end + 60));
	self->stop = true;
	for (i = 0; i < NR_WALKERS; i++)
		pthread_join(walker[i], NULL);
	pthread_join(mutator, NULL);

	failures -= file_number(FAIL_PAGE_ALLOC "times");

	TH_LOG("%u rounds; %u tables locked, %u of these unlinked meanwhile",
	       self->nr_rounds, self->nr_locked, self->nr_unlinked);
	TH_LOG("torn down too early: %u PTE, %u PMD, %u PUD, %u P4D pages",
	       self->nr_freed_pte, self->nr_freed_pmd, self->nr_freed_pud,
	       self->nr_freed_p4d);

	EXPECT_EQ(self->broken, 0);
	EXPECT_EQ(self->nr_freed_pte, 0);
	EXPECT_EQ(self->nr_freed_pmd, 0);
	EXPECT_EQ(self->nr_freed_pud, 0);
	EXPECT_EQ(self->nr_freed_p4d, 0);
	/* Without these nothing was tested. */
	EXPECT_GT(self->nr_rounds, 0);
	EXPECT_GT(self->nr_locked, 0);
	EXPECT_GT(self->nr_unlinked, 0);
	if (self->fail_alloc) {
		TH_LOG("%ld allocations were made to fail", failures);
		EXPECT_GT(failures, 0);
	}
}

/* Tables that nobody needs any more are given back before long. */

#define NR_TABLES	1000
#define GIVEN_BACK_MS	3000
#define TABLES		"nr_page_table_pages"

/* Make nr page tables with one page each, and unmap them: all, or one by one. */
static bool tables_come_and_go(int nr, bool alone)
{
	size_t len = nr * PMD_SIZE, step = alone ? PMD_SIZE : len, i;
	char *addr = (char *)ADDR_LOW;

	if (!map_and_touch(addr, len))
		return false;
	/* The first in each GiB stays, or the last takes higher levels along. */
	for (i = 0; i < len; i += step) {
		if ((!alone || i % (1UL << 30)) && munmap(addr + i, step))
			return false;
	}
	return true;
}

/* What others have just freed must not count as being in use. */
static long settled_nr_tables(void)
{
	long last, now = vmstat_read(TABLES);
	int i;

	for (i = 0; i < 20; i++) {
		usleep(100000);
		last = now;
		now = vmstat_read(TABLES);
		if (now >= last)
			break;
	}
	return now;
}

static void check_given_back(struct __test_metadata *_metadata, bool alone)
{
	long before = settled_nr_tables(), after = 0;
	int ms;

	if (before < 0)
		SKIP(return, "no nr_page_table_pages in /proc/vmstat");

	ASSERT_TRUE(tables_come_and_go(NR_TABLES, alone));

	/* The rest of the system moves by less than a tenth of that. */
	for (ms = 0; ms < GIVEN_BACK_MS; ms += 100) {
		after = vmstat_read(TABLES);
		if (after - before < NR_TABLES / 10)
			break;
		usleep(100000);
	}
	TH_LOG("%ld pages before, %ld after %d ms", before, after, ms);
	EXPECT_LT(after - before, NR_TABLES / 10);
}

TEST(unmapped_tables_are_given_back)
{
	check_given_back(_metadata, false);
}

TEST(tables_unmapped_alone_are_given_back)
{
	check_given_back(_metadata, true);
}

/*
 * The same where each of them counts: in a memory cgroup of little size.  The
 * rounds are paced so that grace periods can keep up with them, but not if
 * something sits on the tables for seconds.  With CONFIG_RCU_LAZY that is the
 * case on CPUs that offload their callbacks: boot with rcu_nocbs=all to test
 * that.
 */

#define CGROUP		"/sys/fs/cgroup/pgtable_walk_test"
#define CGROUP_MAX	"33554432"
#define CGROUP_SECONDS	6
#define CGROUP_TABLES	64
#define CGROUP_PAUSE_US	10000

static long oom_kills(void)
{
	FILE *f = fopen(CGROUP "/memory.events", "r");
	long val = -1;
	char line[128];

	if (!f)
		return -1;
	while (fgets(line, sizeof(line), f))
		if (sscanf(line, "oom_kill %ld", &val) == 1)
			break;
	fclose(f);
	return val;
}

TEST(small_cgroup_does_not_run_out)
{
	time_t end = time(NULL) + CGROUP_SECONDS;
	int status, i, rounds = 0;
	long kills;
	pid_t pid;

	file_write("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	if (mkdir(CGROUP, 0755) && errno != EEXIST)
		SKIP(return, "cannot make " CGROUP ": %s", strerror(errno));
	if (!file_write(CGROUP "/memory.max", CGROUP_MAX)) {
		rmdir(CGROUP);
		SKIP(return, "cannot set memory.max of a cgroup");
	}

	kills = oom_kills();

	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (!file_write(CGROUP "/cgroup.procs", "0"))
			_exit(2);
		while (time(NULL) < end) {
			if (!tables_come_and_go(CGROUP_TABLES, rounds++ & 1))
				_exit(1);
			usleep(CGROUP_PAUSE_US);
			/* What unmapping them one by one has left. */
			if (munmap((char *)ADDR_LOW, PMD_SIZE))
				_exit(1);
		}
		_exit(0);
	}
	ASSERT_EQ(waitpid(pid, &status, 0), pid);
	EXPECT_TRUE(WIFEXITED(status));
	EXPECT_EQ(WEXITSTATUS(status), 0);
	EXPECT_EQ(oom_kills(), kills);

	for (i = 0; i < 50 && rmdir(CGROUP); i++)
		usleep(100000);
}

TEST_HARNESS_MAIN
