// SPDX-License-Identifier: GPL-2.0
/*
 * The rules that speculative page faults are safe by, one by one: each test
 * does what goes wrong if its rule is not kept.
 *
 * Most of it takes a race.  Where the kernel has CONFIG_DEBUG_MM_RACES tests
 * make faults wait at the point in question; elsewhere they are left to chance.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/membarrier.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <mm/gup_test.h>

#include "../kselftest_harness.h"
#include "anon_util.h"
#include "spf_rules.h"
#include "vmstat_sysctl.h"

#define DEVICE		"/dev/hmm_dmirror0"

FIXTURE(rules)
{
	struct settings settings;
	struct counts was;
};

FIXTURE_SETUP(rules)
{
	if (!switch_spf_on(&self->settings))
		SKIP(return, "needs root");
	catch_access_signals();
	self->was = counts();
}

/* By the parent, so that it happens whatever becomes of the test. */
FIXTURE_TEARDOWN_PARENT(rules)
{
	settings_restore(&self->settings);
}

/*
 * The gate.  Threads write to the pages of a VMA all the time, and one other
 * changes that VMA so that they may not any more.  Page tables stay, as there
 * are neighbours in the same one, so that only the count, or the VMA's own,
 * tells.  Then the gate is closed: when all faults have come to their end, one
 * that took what it knew before for what is true now has left a page where
 * there must be none, or one that can be written to; or what was written where
 * nothing has changed is lost.
 *
 * Without a look at the count with the lock of the table held, or with an even
 * one taken for the same, faults that wait at spf_lock while all of the change
 * goes on leave such a page; with a count that was read after the VMA, those
 * that wait at spf_copy; with a VMA that is found again while it is
 * write-locked, or not compared, those that wait at spf_memory.
 */
FIXTURE(gate)
{
	struct settings settings;
	struct gate gate;
};

FIXTURE_VARIANT(gate)
{
	bool beside;		/* others who make the count change */
};

FIXTURE_VARIANT_ADD(gate, alone) { .beside = false };
FIXTURE_VARIANT_ADD(gate, beside_others) { .beside = true };

FIXTURE_SETUP(gate)
{
	/* The first pages, and the last, of two tables */
	const int neighbour[] = { 0, 511, 512, 1023 };
	struct gate *g = &self->gate;
	char what[PAGE], *table;
	int i;

	if (!switch_spf_on(&self->settings))
		SKIP(return, "needs root");
	/* Where the changes have to happen, more often than elsewhere */
	setting_change(&self->settings, DELAY "spf_copy", "2000");
	setting_change(&self->settings, DELAY "spf_memory", "2000");
	setting_change(&self->settings, DELAY "spf_lock", "2000");
	catch_access_signals();
	g->was = counts();
	g->pagemap = open("/proc/self/pagemap", O_RDONLY);
	ASSERT_GE(g->pagemap, 0);
	g->uffd = uffd_open(UFFD_FEATURE_SIGBUS);

	table = reserve(2 * TABLE);
	ASSERT_NE(table, NULL);
	for (i = 0; i < 4; i++) {
		char *p = table + neighbour[i] * PAGE;

		ASSERT_NE(map_at(p, PAGE, MAP_PRIVATE | MAP_ANONYMOUS, -1),
			  NULL);
		poke(p, 1);
	}
	g->p = table + 100 * PAGE;
	g->away = table + TABLE + 50 * PAGE;
	g->elsewhere = map_anon(PAGE);
	ASSERT_NE(g->elsewhere, NULL);
	g->fd = memfd_create("spf_rules", 0);
	ASSERT_GE(g->fd, 0);
	memset(what, 'f', PAGE);
	for (i = 0; i < NR_AREA; i++)
		ASSERT_EQ(write(g->fd, what, PAGE), PAGE);
}

FIXTURE_TEARDOWN_PARENT(gate)
{
	settings_restore(&self->settings);
}

static void run_gate(struct __test_metadata *_metadata, struct gate *g,
		     bool beside, int (*change)(struct gate *g),
		     int (*look)(struct gate *g))
{
	long writes = 0, refused = 0;
	time_t start = time(NULL);
	int i, wrong = 0;

	atomic_store(&g->gen, 1);
	for (i = 0; i < NR_FAULTERS; i++) {
		g->faulter[i].gate = g;
		g->faulter[i].nr = i;
		ASSERT_EQ(pthread_create(&g->faulter[i].thread, NULL,
					 faulter_fn, &g->faulter[i]), 0);
	}
	if (beside)
		ASSERT_EQ(pthread_create(&g->writer, NULL, elsewhere_fn, g), 0);

	while (!wrong && race_is_on(start, GATE_SECONDS, 20, &g->was)) {
		ASSERT_NE(map_at(g->p, NR_AREA * PAGE,
				 MAP_PRIVATE | MAP_ANONYMOUS, -1), NULL);
		/* What has to be zapped makes the change take longer. */
		ASSERT_EQ(madvise(g->p + NR_GATE * PAGE,
				  (NR_AREA - NR_GATE) * PAGE,
				  MADV_POPULATE_WRITE), 0);
		atomic_fetch_add(&g->gen, 1);
		usleep(rand() % 3000);
		ASSERT_EQ(change(g), 0);
		gate_close(g);
		wrong = look(g);
		g->rounds++;
	}
	atomic_store(&g->stop, true);
	for (i = 0; i < NR_FAULTERS; i++) {
		pthread_join(g->faulter[i].thread, NULL);
		writes += g->faulter[i].writes;
		refused += g->faulter[i].refused;
	}
	if (beside)
		pthread_join(g->writer, NULL);
	TH_LOG("%ld rounds, %ld writes, %ld refused, %ld speculative, %ld lost to writers",
	       g->rounds, writes, refused, counts_since(&g->was).success,
	       counts_since(&g->was).lost);
	EXPECT_EQ(wrong, 0);
	EXPECT_GE(g->rounds, 5);
	EXPECT_GREW(&g->was, lost, 1);
}

/* All of the VMA, or its middle: then both ends stay, and what is there. */
#define MIDDLE		8
#define NR_MIDDLE	16

static int change_munmap(struct gate *g)
{
	if (g->rounds % 2)
		return munmap(g->p + MIDDLE * PAGE, NR_MIDDLE * PAGE);
	if (munmap(g->p, NR_AREA * PAGE))
		return -1;
	if (g->rounds % 4)
		put_nothing(g->p, NR_AREA);
	return 0;
}

static int some_present(struct gate *g)
{
	const int end = MIDDLE + NR_MIDDLE;

	if (g->rounds % 2 == 0) {
		put_nothing(g->p, NR_AREA);
		return count_present(g->pagemap, g->p, NR_GATE);
	}
	put_nothing(g->p + MIDDLE * PAGE, NR_MIDDLE);
	return count_present(g->pagemap, g->p + MIDDLE * PAGE, NR_MIDDLE) +
	       gate_lost(g, g->p, 0, MIDDLE) +
	       gate_lost(g, g->p, end, NR_GATE);
}

TEST_F_TIMEOUT(gate, munmap, 600)
{
	run_gate(_metadata, &self->gate, variant->beside,
		 change_munmap, some_present);
}

/* A file, memory that is mlocked, or that userfaultfd is to be told about */
static int change_replace(struct gate *g)
{
	const unsigned long size = NR_AREA * PAGE;
	const int kind = g->rounds % 3;

	if (!kind)
		return mmap(g->p, size, PROT_READ, MAP_PRIVATE | MAP_FIXED,
			    g->fd, 0) != g->p;
	if (mmap(g->p, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS |
		 MAP_NORESERVE | MAP_FIXED, -1, 0) != g->p)
		return -1;
	if (kind == 1)
		return madvise(g->p, size, MADV_DONTFORK) ||
		       mlock2(g->p, size, MLOCK_ONFAULT);
	return g->uffd >= 0 && (arm(g->uffd, g->p, size) ||
				mprotect(g->p, size, PROT_READ | PROT_WRITE));
}

static int replacement_present(struct gate *g)
{
	if (g->rounds % 3)
		return count_present(g->pagemap, g->p, NR_GATE);
	return wrong_pages(g->p, NR_GATE, 'f');
}

TEST_F_TIMEOUT(gate, replaced, 600)
{
	run_gate(_metadata, &self->gate, variant->beside,
		 change_replace, replacement_present);
}

static int change_mprotect(struct gate *g)
{
	if (g->rounds % 2)
		return mprotect(g->p, NR_AREA * PAGE, PROT_READ);
	return mprotect(g->p + MIDDLE * PAGE, NR_MIDDLE * PAGE, PROT_READ);
}

static int some_writable(struct gate *g)
{
	int first = g->rounds % 2 ? 0 : MIDDLE;
	int nr = g->rounds % 2 ? NR_GATE : NR_MIDDLE;
	int i, wrong = gate_lost(g, g->p, 0, NR_GATE);

	for (i = first; i < first + nr; i++) {
		char *p = g->p + i * PAGE;

		if (count_present(g->pagemap, p, 1))
			wrong += write_signal(p, 0) != SIGSEGV;
	}
	return wrong;
}

TEST_F_TIMEOUT(gate, mprotect, 600)
{
	run_gate(_metadata, &self->gate, variant->beside,
		 change_mprotect, some_writable);
}

static int change_mremap(struct gate *g)
{
	const unsigned long size = NR_AREA * PAGE;

	if (mremap(g->p, size, size, MREMAP_MAYMOVE | MREMAP_FIXED,
		   g->away) != g->away)
		return -1;
	if (g->rounds % 2)
		put_nothing(g->p, NR_AREA);
	return 0;
}

static int some_left_behind(struct gate *g)
{
	int wrong;

	put_nothing(g->p, NR_AREA);
	wrong = count_present(g->pagemap, g->p, NR_GATE) +
		gate_lost(g, g->away, 0, NR_GATE);
	munmap(g->away, NR_AREA * PAGE);
	return wrong;
}

TEST_F_TIMEOUT(gate, mremap, 600)
{
	run_gate(_metadata, &self->gate, variant->beside,
		 change_mremap, some_left_behind);
}

/* Nothing is taken away: split and merged, grown and shrunk. */
static int change_grow(struct gate *g)
{
	char *middle = g->p + MIDDLE * PAGE, *end = g->p + NR_AREA * PAGE;

	return mprotect(middle, NR_MIDDLE * PAGE, PROT_READ) ||
	       mprotect(middle, NR_MIDDLE * PAGE, PROT_READ | PROT_WRITE) ||
	       !map_at(end, 4 * PAGE, MAP_PRIVATE | MAP_ANONYMOUS, -1) ||
	       madvise(middle, NR_AREA / 2 * PAGE, MADV_DONTFORK) ||
	       madvise(middle, NR_AREA / 2 * PAGE, MADV_DOFORK) ||
	       munmap(end, 4 * PAGE);
}

static int some_lost(struct gate *g)
{
	return gate_lost(g, g->p, 0, NR_GATE);
}

TEST_F_TIMEOUT(gate, split_and_merged, 600)
{
	run_gate(_metadata, &self->gate, variant->beside,
		 change_grow, some_lost);
}

/*
 * Two who write to one page at the same time: the second to take the lock of
 * the table must not put a page of his own over that of the first.
 */
enum shared_page { SHARED_NONE, SHARED_ZERO, SHARED_FORKED, NR_SHARED };

TEST_F_TIMEOUT(rules, threads_share_pages, 600)
{
	long at_once = 0, rounds = 0, lost = 0;
	char *p = map_ready();
	time_t start = time(NULL);
	int i;

	ASSERT_NE(p, NULL);
	while (!lost && time(NULL) < start + at_least(12)) {
		enum shared_page kind = rounds++ % NR_SHARED;
		struct sharer s[2] = { };
		atomic_int together = 0;
		pid_t pid = 0;

		ASSERT_EQ(drop_pages(p), 0);
		if (kind == SHARED_ZERO)
			read_pages(p, NR_TOGETHER);
		if (kind == SHARED_FORKED) {
			write_pages(p, NR_TOGETHER, 'o');
			pid = fork_sharer();
			ASSERT_GT(pid, 0);
		}
		for (i = 0; i < 2; i++) {
			s[i].p = p;
			s[i].nr = i + 1;
			s[i].together = &together;
			ASSERT_EQ(pthread_create(&s[i].thread, NULL, sharer_fn,
						 &s[i]), 0);
		}
		for (i = 0; i < 2; i++) {
			pthread_join(s[i].thread, NULL);
			at_once += s[i].faults;
		}
		at_once -= NR_TOGETHER;
		for (i = 0; i < 2; i++)
			lost += wrong_pages(p + 1 + i, NR_TOGETHER, 'b' + i);
		lost += wrong_pages(p, NR_TOGETHER,
				    kind == SHARED_FORKED ? 'o' : 0);
		if (pid) {
			kill(pid, SIGKILL);
			waitpid(pid, NULL, 0);
		}
	}
	TH_LOG("%ld rounds, %ld pages faulted by both, %ld lost", rounds,
	       at_once, lost);
	EXPECT_EQ(lost, 0);
	EXPECT_GE(at_once, 10);
	EXPECT_GREW(&self->was, success, NR_TOGETHER);
}

/*
 * A fault that replaces the zero page waits with the lock of the table held,
 * and mremap() moves that table.  If it does not wait, too, the fault flushes
 * the old address, and who has read at the new one goes on to see the zero
 * page, whatever is written there.
 */
TEST_F_TIMEOUT(rules, moved_table_is_left_alone, 600)
{
	char *area = reserve(4 * TABLE), *p = area, *q = area + 2 * TABLE;
	long rounds = 0, stale = 0;
	bool delays = delay_only(&self->settings, "commit", "2000");
	time_t start = time(NULL);
	struct mover m = { };

	ASSERT_NE(area, NULL);
	if (sysconf(_SC_NPROCESSORS_ONLN) < 2 || !run_on(0))
		SKIP(return, "needs two CPUs");
	ASSERT_NE(map_at(p, TABLE, MAP_PRIVATE | MAP_ANONYMOUS, -1), NULL);
	poke(p + TABLE - PAGE, 1);
	ASSERT_EQ(pthread_create(&m.thread, NULL, moved_fn, &m), 0);
	while (!stale && race_is_on(start, 10, 30, &self->was)) {
		/* The last page stays, and so does the table. */
		ASSERT_EQ(madvise(p, TABLE / 2, MADV_DONTNEED), 0);
		read_pages(p, NR_MOVED);
		m.from = p;
		m.to = q;
		m.what = rounds % 100 + 1;
		atomic_store(&m.page, -1);
		atomic_fetch_add(&m.step, 1);
		wait_until_at(&m.page, NR_MOVED, delays);
		ASSERT_EQ(mremap(p, TABLE, TABLE, MREMAP_MAYMOVE | MREMAP_FIXED,
				 q), q);
		read_pages(q, NR_MOVED);
		mover_wait(&m, 0);
		atomic_fetch_add(&m.step, 1);
		mover_wait(&m, 0);
		stale = wrong_pages(q, NR_MOVED, m.what);
		m.from = q;
		q = p;
		p = m.from;
		rounds++;
	}
	atomic_store(&m.stop, true);
	pthread_join(m.thread, NULL);
	TH_LOG("%ld moves, %ld of them under a writer, %ld lost to writers",
	       rounds, m.refused, counts_since(&self->was).lost);
	EXPECT_EQ(stale, 0);
	EXPECT_GE(m.refused, 1);
	EXPECT_GREW(&self->was, lost, 1);
}

/*
 * When UFFDIO_REGISTER has returned, no page comes without an event.  Only who
 * looks without the lock of the table, which a fault may hold still, sees that
 * it comes later.
 */
#define NR_ARMED	32

TEST_F_TIMEOUT(rules, no_page_behind_userfaultfd, 600)
{
	int walk = open(DEBUGFS "pgtable_walk_test", O_RDWR);
	int pagemap = open("/proc/self/pagemap", O_RDONLY);
	bool delays = delay_only(&self->settings, "commit", "2000");
	long rounds = 0, empty = 0, behind = 0;
	char *p = map_ready();
	time_t start = time(NULL);
	int uffd = uffd_open(UFFD_FEATURE_SIGBUS);

	if (uffd < 0)
		SKIP(return, "userfaultfd: %s", strerror(errno));
	if (walk < 0)
		SKIP(return, "needs root, CONFIG_PGTABLE_WALK_TEST");
	ASSERT_NE(p, NULL);
	ASSERT_GE(pagemap, 0);
	while (!behind && race_is_on(start, 10, 30, &self->was)) {
		struct uffdio_range range = { (uintptr_t)p, TABLE };
		struct writer w;
		int there, page;

		ASSERT_EQ(drop_pages(p), 0);
		ASSERT_EQ(writer_start(&w, p, NR_ARMED, 1), 0);
		wait_until_at(&w.page, NR_ARMED, delays);
		ASSERT_EQ(arm(uffd, p, TABLE), 0);
		page = atomic_load(&w.page);
		there = entry_is_there(walk, p + page * PAGE);
		ASSERT_GE(there, 0);
		pthread_join(w.thread, NULL);
		if (page < NR_ARMED && !there) {
			empty++;
			behind += count_present(pagemap, p + page * PAGE, 1);
		}
		ASSERT_EQ(ioctl(uffd, UFFDIO_UNREGISTER, &range), 0);
		rounds++;
	}
	TH_LOG("%ld rounds, %ld of them with no page yet, %ld lost to writers",
	       rounds, empty, counts_since(&self->was).lost);
	EXPECT_EQ(behind, 0);
	if (delays)
		EXPECT_GE(empty, 1);
	EXPECT_GREW(&self->was, lost, 1);
}

/*
 * A device has pages mapped that are replaced when the CPU writes: it has to be
 * told, which a speculative fault does not do.
 */
TEST_F(rules, page_of_notifier_is_not_copied)
{
	int fd = open(DEVICE, O_RDWR);
	char *p = map_ready(), *q = map_ready();
	pid_t pid;

	if (fd < 0)
		SKIP(return, DEVICE " of test_hmm: %s", strerror(errno));
	ASSERT_NE(p, NULL);
	ASSERT_NE(q, NULL);
	/* The zero page, and pages that are shared with a child */
	read_pages(p, NR_PAGES);
	write_pages(q, NR_PAGES, 'o');
	pid = fork_sharer();
	ASSERT_GT(pid, 0);
	EXPECT_EQ(device_wrong(fd, p, NR_PAGES, 0), 0);
	EXPECT_EQ(device_wrong(fd, q, NR_PAGES, 'o'), 0);
	write_pages(p, NR_PAGES, 'n');
	write_pages(q, NR_PAGES, 'n');
	EXPECT_EQ(device_wrong(fd, p, NR_PAGES, 'n'), 0);
	EXPECT_EQ(device_wrong(fd, q, NR_PAGES, 'n'), 0);
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	TH_LOG("%ld faults were left to others because of the notifier",
	       counts_since(&self->was).notifier);
	EXPECT_GREW(&self->was, notifier, NR_PAGES);
	close(fd);
}

/*
 * The same with a fault that waits, having found no notifier, while one comes
 * and maps the old page.  That is the first one of an address space once only,
 * so each round is a process.
 */
#define NR_NEW		4

static int new_notifier(void)
{
	struct writer w[2];
	char *p[2];
	int i, fd, wrong = 0;

	for (i = 0; i < 2; i++) {
		p[i] = map_ready();
		if (!p[i])
			return 2;
		read_pages(p[i], NR_NEW);
	}
	for (i = 0; i < 2; i++)
		if (writer_start(&w[i], p[i], NR_NEW, 'n'))
			return 2;
	usleep(rand() % 15000);
	fd = open(DEVICE, O_RDWR);
	if (fd < 0)
		return 2;
	/* Whatever is there now */
	for (i = 0; i < 2; i++)
		if (device_wrong(fd, p[i], NR_NEW, 0) < 0)
			return 2;
	for (i = 0; i < 2; i++)
		pthread_join(w[i].thread, NULL);
	for (i = 0; i < 2; i++)
		wrong += device_wrong(fd, p[i], NR_NEW, 'n');
	return wrong ? 1 : 0;
}

TEST_F_TIMEOUT(rules, page_of_new_notifier_is_not_copied, 600)
{
	time_t start = time(NULL);
	int status = 0;
	long rounds = 0;

	if (access(DEVICE, R_OK | W_OK))
		SKIP(return, DEVICE " of test_hmm: %s", strerror(errno));
	delay_only(&self->settings, "commit", "2000");
	while (!status && race_is_on(start, 40, 60, &self->was)) {
		unsigned int seed = rand();
		pid_t pid = fork();

		ASSERT_GE(pid, 0);
		if (!pid) {
			srand(seed);
			_exit(new_notifier());
		}
		ASSERT_EQ(waitpid(pid, &status, 0), pid);
		rounds++;
	}
	TH_LOG("%ld notifiers, %ld lost to writers", rounds,
	       counts_since(&self->was).lost);
	EXPECT_EQ(status, 0);
	EXPECT_GREW(&self->was, lost, 1);
}

/*
 * While a page is copied, the child that it was shared with drops it, and it is
 * pinned.  If the one who copies had no reference to it, it would become ours
 * as it is, with the same entry, and the copy would replace it all the same.
 */
#define NR_PINNED	64

static void pin_child(char *p, atomic_int *drop)
{
	int i;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (i = 0; i < NR_PINNED; i++) {
		while (atomic_load(drop) != 2 * i + 1)
			usleep(20);
		madvise(p + i * PAGE, PAGE, MADV_DONTNEED);
		atomic_fetch_add(drop, 1);
	}
	_exit(0);
}

TEST_F_TIMEOUT(rules, pinned_while_copied, 600)
{
	int fd = open(DEBUGFS "gup_test", O_RDWR);
	char *p = map_ready(), seen[PAGE];
	long rounds = 0, while_copied = 0, stale = 0;
	time_t start = time(NULL);
	atomic_int *drop;
	bool delays;
	int i;

	if (fd < 0)
		SKIP(return, "needs root, CONFIG_GUP_TEST");
	/* Twice in each of these faults, the second time with the copy made */
	delays = delay_only(&self->settings, "memory", "20000");
	ASSERT_NE(p, NULL);
	drop = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
		    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(drop, MAP_FAILED);
	while (!stale && time(NULL) < start + at_least(15)) {
		pid_t pid;

		ASSERT_EQ(drop_pages(p), 0);
		write_pages(p, NR_PINNED, 'o');
		atomic_store(drop, 0);
		pid = fork();
		ASSERT_GE(pid, 0);
		if (!pid)
			pin_child(p, drop);
		for (i = 0; i < NR_PINNED; i++) {
			struct pin_longterm_test pin = {
				.addr = (uintptr_t)p + i * PAGE, .size = PAGE,
			};
			uint64_t to = (uintptr_t)seen;
			struct writer w;

			ASSERT_EQ(writer_start(&w, p + i * PAGE, 1, 'w'), 0);
			usleep(rand() % (delays ? 20000 : 100));
			atomic_fetch_add(drop, 1);
			while (atomic_load(drop) % 2)
				usleep(20);
			ASSERT_EQ(ioctl(fd, PIN_LONGTERM_TEST_START, &pin), 0);
			while_copied += !atomic_load(&w.page);
			pthread_join(w.thread, NULL);
			poke(p + i * PAGE, 'n');
			ASSERT_EQ(ioctl(fd, PIN_LONGTERM_TEST_READ, &to), 0);
			stale += seen[0] != 'n';
			ASSERT_EQ(ioctl(fd, PIN_LONGTERM_TEST_STOP), 0);
			rounds++;
		}
		waitpid(pid, NULL, 0);
	}
	TH_LOG("%ld pages, %ld of them pinned before the writer was done, %ld stale",
	       rounds, while_copied, stale);
	EXPECT_EQ(stale, 0);
	if (delays)
		EXPECT_GE(while_copied, 1);
	EXPECT_GREW(&self->was, success, NR_PINNED);
	close(fd);
}

/*
 * Pages that are ours alone, and write-protected, are written to as they are,
 * because somebody may have them in use: here it is a pipe.
 */
TEST_F(rules, page_in_use_is_not_copied)
{
	struct iovec iov = { .iov_len = PAGE };
	char *p = map_ready(), seen[PAGE];
	int fd[2], i;

	ASSERT_NE(p, NULL);
	ASSERT_EQ(pipe(fd), 0);
	write_pages(p, NR_PAGES, 'o');
	/* To see them written to */
	if (!file_write("/proc/self/clear_refs", "4"))
		SKIP(return, "needs CONFIG_MEM_SOFT_DIRTY");
	self->was = counts();
	for (i = 0; i < NR_PAGES; i++) {
		iov.iov_base = p + i * PAGE;
		ASSERT_EQ(vmsplice(fd[1], &iov, 1, 0), (ssize_t)PAGE);
		poke(p + i * PAGE, 'n');
		ASSERT_EQ(read(fd[0], seen, PAGE), (ssize_t)PAGE);
		EXPECT_EQ(seen[0], 'n');
	}
	TH_LOG("%ld speculative faults", counts_since(&self->was).success);
	EXPECT_GREW(&self->was, success, NR_PAGES);
}

/*
 * While a fault sleeps, to get memory, its tables are freed: by munmap() with
 * new memory at the same place afterwards, or by mremap() to another place and
 * back again, which makes the VMA look as if nothing had happened.  KASAN
 * reports those who go on with the old tables.
 */
TEST_F_TIMEOUT(rules, tables_gone_meanwhile, 600)
{
	long rounds = 0, asleep = 0, lost = 0;
	char *p = LONELY, *away = LONELY - (1UL << 40);
	time_t start = time(NULL);

	if (!delay_only(&self->settings, "memory", "200000"))
		SKIP(return, "needs root, CONFIG_DEBUG_MM_RACES");
	while (!lost && race_is_on(start, 15, 40, &self->was)) {
		struct writer w;

		ASSERT_NE(map_lonely(), NULL);
		poke(p, 1);
		ASSERT_EQ(writer_start(&w, p + PAGE, 1, 'w'), 0);
		usleep(rand() % 10000);
		if (rounds % 2) {
			ASSERT_EQ(munmap(p, TABLE), 0);
			ASSERT_NE(map_lonely(), NULL);
		} else {
			ASSERT_EQ(mremap(p, TABLE, TABLE,
					 MREMAP_MAYMOVE | MREMAP_FIXED, away),
				  away);
			ASSERT_EQ(mremap(away, TABLE, TABLE,
					 MREMAP_MAYMOVE | MREMAP_FIXED, p), p);
		}
		/* One for the tables, and one for what has to free them */
		grace_period();
		grace_period();
		asleep += !atomic_load(&w.page);
		pthread_join(w.thread, NULL);
		if (rounds++ % 2 == 0 && !w.sig)
			lost += peek(p + PAGE) != 'w';
		ASSERT_EQ(munmap(p, TABLE), 0);
	}
	TH_LOG("%ld rounds, %ld of them with the fault still asleep, %ld lost to writers",
	       rounds, asleep, counts_since(&self->was).lost);
	EXPECT_EQ(lost, 0);
	if (self->was.success >= 0)
		EXPECT_GE(asleep, 5);
	EXPECT_GREW(&self->was, lost, 5);
}

/* The policy of a VMA may go at any time: its faults are left to others. */
TEST_F(rules, memory_policy)
{
	unsigned long nodes = 1UL << last_node();
	char *p = map_ready();

	ASSERT_NE(p, NULL);
	if (syscall(__NR_mbind, p, TABLE, MPOL_BIND, &nodes, 64, 0))
		SKIP(return, "mbind: %s", strerror(errno));
	self->was = counts();
	write_pages(p, NR_PAGES, 1);
	TH_LOG("%d pages on node %d, %ld faults left to others, %ld speculative",
	       pages_on_node(p, NR_PAGES, last_node()), last_node(),
	       counts_since(&self->was).vma, counts_since(&self->was).success);
	EXPECT_EQ(pages_on_node(p, NR_PAGES, last_node()), NR_PAGES);
	EXPECT_GREW(&self->was, vma, NR_PAGES);
}

/*
 * What a thread has kept of a VMA must go when it leaves the address space by
 * exec().  If that is one that lives on, as that of the parent after vfork(),
 * and the new one comes to have the same count, the next fault there would fill
 * in a page of the old, and come again for ever.
 */
#define MAX_ARGS	120

/* In a process of its own, whose count is not much more than after exec() */
static int exec_and_look(int fd)
{
	char *argv[MAX_ARGS + 1] = { }, *env[] = { NULL }, *p = map_lonely();
	unsigned char there;
	int i;
	pid_t pid;

	if (!p)
		return 2;
	poke(p, 1);
	for (i = 0; i < MAX_ARGS / 2; i++)
		mprotect(p, TABLE, PROT_READ | PROT_WRITE);
	for (i = 0; i < MAX_ARGS; i++) {
		argv[i] = "";
		madvise(p, PAGE, MADV_DONTNEED);
		pid = vfork();
		if (!pid) {
			poke(p, 1);
			fexecve(fd, argv, env);
			_exit(3);
		}
		if (pid < 0 || exit_status(pid))
			return 4;
		if (mincore(p + PAGE, PAGE, &there) || there)
			return 5;
	}
	return 0;
}

TEST_F_TIMEOUT(rules, exec_forgets, 600)
{
	int status, fd = exec_program();
	pid_t pid;

	ASSERT_GE(fd, 0);
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid)
		_exit(exec_and_look(fd));
	ASSERT_EQ(waitpid(pid, &status, 0), pid);
	TH_LOG("%d programs, %ld speculative faults", MAX_ARGS,
	       counts_since(&self->was).success);
	EXPECT_EQ(status, 0);
	EXPECT_GREW(&self->was, success, MAX_ARGS / 2);
	close(fd);
}

/*
 * Threads are asleep in faults when their process is killed and its memory
 * reaped, as the OOM reaper does it.  They wake up one by one; those that do not
 * look whether it is being reaped fill in a page, which can be seen until the
 * last of them is gone.
 */
#define NR_REAPED	8	/* threads, and pages that each touches */

static void *reaped_fn(void *data)
{
	do {
		write_pages(data, NR_REAPED, 1);
	} while (!madvise(data, NR_REAPED * PAGE, MADV_DONTNEED));
	return NULL;
}

static void reaped_child(char *p, int ready)
{
	pthread_t thread;
	int i;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (i = 0; i < NR_REAPED; i++)
		if (pthread_create(&thread, NULL, reaped_fn, p + i * TABLE))
			_exit(1);
	if (write(ready, "", 1) == 1)
		pause();
	_exit(1);
}

TEST_F_TIMEOUT(rules, reaped, 600)
{
	char *p = map_anon(NR_REAPED * TABLE), path[64], c;
	long rounds = 0, looks = 0, back = 0;
	bool delays = delay_only(&self->settings, "memory", "200000");
	time_t start = time(NULL);
	int i, ready[2];

	ASSERT_NE(p, NULL);
	ASSERT_EQ(pipe(ready), 0);
	/* The child gets page tables, and an anon_vma. */
	for (i = 0; i < NR_REAPED; i++)
		poke(p + (i + 1) * TABLE - PAGE, 1);
	while (!back && time(NULL) < start + at_least(10)) {
		int pagemap, pidfd, there, ret;
		pid_t pid = fork();

		ASSERT_GE(pid, 0);
		if (!pid)
			reaped_child(p, ready[1]);
		ASSERT_EQ(read(ready[0], &c, 1), 1);
		snprintf(path, sizeof(path), "/proc/%d/pagemap", pid);
		pagemap = open(path, O_RDONLY);
		ASSERT_GE(pagemap, 0);
		pidfd = syscall(__NR_pidfd_open, pid, 0);
		ASSERT_GE(pidfd, 0);
		usleep(rand() % (delays ? 50000 : 1000));
		kill(pid, SIGKILL);
		while ((ret = syscall(__NR_process_mrelease, pidfd, 0)) &&
		       errno == EAGAIN)
			usleep(100);
		/* Reaped, or gone already */
		ASSERT_TRUE(!ret || errno == ESRCH);
		/* Until there is no address space any more */
		do {
			there = 0;
			for (i = 0; i < NR_REAPED && there >= 0; i++) {
				there = count_present(pagemap, p + i * TABLE,
						      NR_REAPED);
				looks += there >= 0;
				back += there > 0;
			}
		} while (there >= 0);
		ASSERT_EQ(waitpid(pid, NULL, 0), pid);
		close(pagemap);
		close(pidfd);
		rounds++;
	}
	TH_LOG("%ld rounds, %ld looks, %ld pages, %ld faults too late",
	       rounds, looks, back, counts_since(&self->was).unstable);
	EXPECT_EQ(back, 0);
	if (delays) {
		EXPECT_GE(looks, 1);
		EXPECT_GREW(&self->was, unstable, 1);
	}
}

TEST_HARNESS_MAIN
