// SPDX-License-Identifier: GPL-2.0
/*
 * Reclaim of empty page tables by MADV_DONTNEED: which ones go, which ones
 * stay, and does nobody lose or see again what he should not?
 *
 * Page tables of one process are counted by its VmPTE, which does not wait for
 * the grace period.  The events in /proc/vmstat are of the whole system: a test
 * asks for at least as many as it has caused.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "../kselftest_harness.h"
#include "anon_util.h"
#include "vm_util.h"
#include "vmstat_sysctl.h"

#define SYSCTL		"/proc/sys/vm/pt_reclaim"
#define SPF_SYSCTL	"/proc/sys/vm/speculative_page_fault"
#define GIB		(1UL << 30)
#define RACE_SECONDS	3

/* A file with this in its first byte of each page. */
static bool fill_file(int fd, unsigned long size, char what)
{
	unsigned long off;

	if (fd < 0 || ftruncate(fd, size))
		return false;
	for (off = 0; off < size; off += PAGE)
		if (pwrite(fd, &what, 1, off) != 1)
			return false;
	return true;
}

static int make_file(unsigned long size, char what)
{
	int fd = memfd_create("pt_reclaim", 0);

	return fill_file(fd, size, what) ? fd : -1;
}

FIXTURE(reclaim)
{
	struct settings settings;
	long scanned;
	long freed;
	long busy;
	long flush;
};

/* All tables are to go, also those that are in use all the time. */
FIXTURE_SETUP(reclaim)
{
	if (switch_get(SYSCTL) < 0)
		SKIP(return, "no " SYSCTL);
	if (!setting_change(&self->settings, SYSCTL, "2"))
		SKIP(return, "cannot write " SYSCTL);
	self->scanned = vmstat_read("pt_reclaim_scanned");
	self->freed = vmstat_read("pt_reclaim_freed");
	self->busy = vmstat_read("pt_reclaim_busy");
	self->flush = vmstat_read("pt_reclaim_flush");
}

/* By the parent, so that it happens whatever becomes of the test. */
FIXTURE_TEARDOWN_PARENT(reclaim)
{
	settings_restore(&self->settings);
}

#define freed_by_now()	(vmstat_read("pt_reclaim_freed") - self->freed)
#define busy_by_now()	(vmstat_read("pt_reclaim_busy") - self->busy)

/* What it is for: 50 GiB touched and returned, 2 MiB by 2 MiB. */
TEST_F_TIMEOUT(reclaim, sweep, 300)
{
	const unsigned long size = 50 * GIB;
	unsigned long off;
	long before;
	char *p;

	ASSERT_TRUE(switch_set(SYSCTL, 1));
	p = map_anon(size);
	ASSERT_NE(p, NULL);
	before = vm_pte();
	for (off = 0; off < size; off += TABLE) {
		poke(p + off, 1);
		ASSERT_EQ(madvise(p + off, TABLE, MADV_DONTNEED), 0);
	}
	TH_LOG("VmPTE grew by %ld kB, pt_reclaim_freed by %ld",
	       vm_pte() - before, freed_by_now());
	EXPECT_LE(vm_pte() - before, 208);
	EXPECT_GE(freed_by_now(), (long)(size / TABLE));
	munmap(p, size);
}

/* All at once: the tables are in one batch and one flush. */
TEST_F_TIMEOUT(reclaim, many_tables_at_once, 120)
{
	const unsigned long size = GIB;
	unsigned long off;
	long before;
	char *p;
	int i;

	p = map_anon(size);
	ASSERT_NE(p, NULL);
	before = vm_pte();
	for (i = 1; i <= 3; i++) {
		for (off = 0; off < size; off += TABLE)
			poke(p + off, i);
		EXPECT_GE(vm_pte() - before, (long)(size / TABLE * 4));
		ASSERT_EQ(madvise(p, size, MADV_DONTNEED), 0);
		EXPECT_LE(vm_pte() - before, 16);
		for (off = 0; off < size; off += TABLE)
			ASSERT_EQ(peek(p + off), 0);
		ASSERT_EQ(madvise(p, size, MADV_DONTNEED), 0);
	}
	munmap(p, size);
}

TEST_F_TIMEOUT(reclaim, switched_off, 120)
{
	long before;
	char *p;

	p = map_anon(TABLE);
	ASSERT_NE(p, NULL);
	ASSERT_TRUE(switch_set(SYSCTL, 0));
	write_pages(p, NR_PAGES, 1);
	before = vm_pte();
	ASSERT_EQ(madvise(p, TABLE, MADV_DONTNEED), 0);
	EXPECT_EQ(vm_pte(), before);
	EXPECT_EQ(count_pages(p, NR_PAGES, 0), NR_PAGES);

	/* Tables that were emptied before are found when switched on. */
	ASSERT_EQ(madvise(p, TABLE, MADV_DONTNEED), 0);
	ASSERT_TRUE(switch_set(SYSCTL, 1));
	ASSERT_EQ(madvise(p, TABLE, MADV_DONTNEED), 0);
	EXPECT_LE(vm_pte() - before, -4);
	munmap(p, TABLE);
}

TEST_F_TIMEOUT(reclaim, partly_covered_stays, 120)
{
	long scanned, before;
	char *p;

	p = map_anon(2 * TABLE);
	ASSERT_NE(p, NULL);
	write_pages(p, 2 * NR_PAGES, 1);
	before = vm_pte();
	scanned = vmstat_read("pt_reclaim_scanned");
	/* All but the first page, all but the last, around the border. */
	ASSERT_EQ(madvise(p + PAGE, TABLE - PAGE, MADV_DONTNEED), 0);
	ASSERT_EQ(madvise(p, TABLE - PAGE, MADV_DONTNEED), 0);
	ASSERT_EQ(madvise(p + TABLE / 2, TABLE, MADV_DONTNEED), 0);
	EXPECT_EQ(vm_pte(), before);
	EXPECT_EQ(vmstat_read("pt_reclaim_scanned"), scanned);
	EXPECT_EQ(count_pages(p, NR_PAGES + NR_PAGES / 2, 0),
		  NR_PAGES + NR_PAGES / 2);
	EXPECT_EQ(count_pages(p + TABLE + TABLE / 2, NR_PAGES / 2, 1),
		  NR_PAGES / 2);
	munmap(p, 2 * TABLE);
}

/* Two VMAs in one page table: it belongs to neither. */
TEST_F_TIMEOUT(reclaim, shared_with_neighbour_stays, 120)
{
	long before;
	char *p;

	p = reserve(TABLE);
	ASSERT_NE(p, NULL);
	ASSERT_NE(map_at(p, TABLE / 2, MAP_PRIVATE | MAP_ANONYMOUS, -1), NULL);
	ASSERT_NE(map_at(p + TABLE / 2, TABLE / 2, MAP_SHARED | MAP_ANONYMOUS,
			 -1), NULL);
	write_pages(p, NR_PAGES, 1);
	before = vm_pte();
	ASSERT_EQ(madvise(p, TABLE / 2, MADV_DONTNEED), 0);
	EXPECT_EQ(vm_pte(), before);
	EXPECT_EQ(count_pages(p + TABLE / 2, NR_PAGES / 2, 1), NR_PAGES / 2);
	ASSERT_EQ(madvise(p, TABLE, MADV_DONTNEED), 0);
	EXPECT_EQ(vm_pte(), before);
	EXPECT_EQ(count_pages(p, NR_PAGES / 2, 0), NR_PAGES / 2);
	munmap(p, TABLE);
}

/* Copies go, as they do without reclaim, and the file shows again. */
static void check_private_file(struct __test_metadata *_metadata, int fd,
			       bool swap)
{
	long before;
	char *p;

	p = reserve(TABLE);
	ASSERT_NE(p, NULL);
	ASSERT_NE(map_at(p, TABLE, MAP_PRIVATE, fd), NULL);
	EXPECT_EQ(count_pages(p, NR_PAGES, 'f'), NR_PAGES);
	write_pages(p, NR_PAGES / 2, 'c');
	if (swap)
		EXPECT_TRUE(swaps_all(p, TABLE));
	before = vm_pte();
	ASSERT_EQ(madvise(p, TABLE, MADV_DONTNEED), 0);
	EXPECT_EQ(vm_pte() - before, -4);
	EXPECT_EQ(count_pages(p, NR_PAGES, 'f'), NR_PAGES);
	munmap(p, TABLE);
}

TEST_F_TIMEOUT(reclaim, private_file, 120)
{
	int fd = make_file(TABLE, 'f');

	ASSERT_GE(fd, 0);
	check_private_file(_metadata, fd, false);
	EXPECT_GE(freed_by_now(), 1);
	close(fd);
}

/* Of a disk, and with the copies swapped out, if there is swap. */
TEST_F_TIMEOUT(reclaim, private_file_on_disk, 120)
{
	char path[] = "pt_reclaim.XXXXXX";
	int fd = mkstemp(path);
	struct statfs fs;

	if (fd < 0)
		SKIP(return, "no file here: %s", strerror(errno));
	unlink(path);
	if (fstatfs(fd, &fs) || fs.f_type == TMPFS_MAGIC)
		SKIP(return, "this directory is not on a disk");
	ASSERT_TRUE(fill_file(fd, TABLE, 'f'));
	check_private_file(_metadata, fd, false);
	if (swap_is_on()) {
		/* Dirty pages stay. */
		ASSERT_EQ(fsync(fd), 0);
		check_private_file(_metadata, fd, true);
	}
	EXPECT_GE(freed_by_now(), 1);
	close(fd);
}

/* A directory on a file system that maps its storage directly, or NULL */
static const char *dax_dir(void)
{
	static char line[512], dir[256];
	FILE *f = fopen("/proc/mounts", "r");
	bool found = false;

	while (f && !found && fgets(line, sizeof(line), f))
		found = sscanf(line, "%*s %255s", dir) == 1 &&
			(strstr(line, ",dax=always") || strstr(line, ",dax "));
	if (f)
		fclose(f);
	return found ? dir : NULL;
}

/* There, with a block for all of it that a huge page can map */
static int make_dax_file(const char *dir, unsigned long size, char what)
{
	char path[300];
	int fd;

	snprintf(path, sizeof(path), "%s/pt_reclaim.XXXXXX", dir);
	fd = mkstemp(path);
	if (fd < 0)
		return -1;
	unlink(path);
	if (!fallocate(fd, 0, 0, size) && fill_file(fd, size, what))
		return fd;
	close(fd);
	return -1;
}

TEST_F_TIMEOUT(reclaim, private_file_on_dax, 120)
{
	const char *dir = dax_dir();
	int fd;

	if (!dir)
		SKIP(return, "no file system is mounted with dax");
	fd = make_dax_file(dir, TABLE, 'f');
	ASSERT_GE(fd, 0);
	check_private_file(_metadata, fd, false);
	close(fd);
}

TEST_F_TIMEOUT(reclaim, shared_file, 120)
{
	long before;
	char *p;
	int fd;

	fd = make_file(TABLE, 'f');
	ASSERT_GE(fd, 0);
	p = reserve(TABLE);
	ASSERT_NE(p, NULL);
	ASSERT_NE(map_at(p, TABLE, MAP_SHARED, fd), NULL);
	write_pages(p, NR_PAGES, 's');
	before = vm_pte();
	ASSERT_EQ(madvise(p, TABLE, MADV_DONTNEED), 0);
	EXPECT_EQ(vm_pte() - before, -4);
	EXPECT_EQ(count_pages(p, NR_PAGES, 's'), NR_PAGES);
	munmap(p, TABLE);
	close(fd);
}

/*
 * Who empties a page table with no mmap_lock held leaves it where it is: the
 * table must not go before the TLB is flushed, and only mmap_lock holds up those
 * who would put something else there.
 */
static void check_truncated(struct __test_metadata *_metadata, int flags,
			    bool punch)
{
	int fd = make_file(TABLE, 'f');
	long scanned, before;
	char *p;

	ASSERT_GE(fd, 0);
	p = reserve(TABLE);
	ASSERT_NE(p, NULL);
	ASSERT_NE(map_at(p, TABLE, flags, fd), NULL);
	EXPECT_EQ(count_pages(p, NR_PAGES, 'f'), NR_PAGES);
	before = vm_pte();
	scanned = vmstat_read("pt_reclaim_scanned");
	if (punch) {
		ASSERT_EQ(fallocate(fd, FALLOC_FL_PUNCH_HOLE |
				    FALLOC_FL_KEEP_SIZE, 0, TABLE), 0);
	} else {
		ASSERT_EQ(ftruncate(fd, 0), 0);
		ASSERT_EQ(ftruncate(fd, TABLE), 0);
	}
	EXPECT_EQ(vm_pte(), before);
	EXPECT_EQ(vmstat_read("pt_reclaim_scanned"), scanned);
	EXPECT_EQ(count_pages(p, NR_PAGES, 0), NR_PAGES);
	munmap(p, TABLE);
	close(fd);
}

TEST_F_TIMEOUT(reclaim, truncated_stays, 120)
{
	check_truncated(_metadata, MAP_SHARED, false);
	check_truncated(_metadata, MAP_SHARED, true);
	check_truncated(_metadata, MAP_PRIVATE, false);
	check_truncated(_metadata, MAP_PRIVATE, true);
}

TEST_F_TIMEOUT(reclaim, swapped_out, 120)
{
	long before;
	char *p;

	if (!swap_is_on())
		SKIP(return, "no swap");

	p = map_anon(TABLE);
	ASSERT_NE(p, NULL);
	write_pages(p, NR_PAGES, 1);
	ASSERT_TRUE(swaps_all(p, TABLE));
	before = vm_pte();
	ASSERT_EQ(madvise(p, TABLE, MADV_DONTNEED), 0);
	EXPECT_EQ(vm_pte() - before, -4);
	EXPECT_EQ(count_pages(p, NR_PAGES, 0), NR_PAGES);
	munmap(p, TABLE);
}

TEST_F_TIMEOUT(reclaim, mlocked, 120)
{
	long before;
	char *p;

	p = map_anon(TABLE);
	ASSERT_NE(p, NULL);
	if (mlock(p, TABLE))
		SKIP(return, "mlock: %s", strerror(errno));
	write_pages(p, NR_PAGES, 1);
	EXPECT_EQ(madvise(p, TABLE, MADV_DONTNEED), -1);
	EXPECT_EQ(count_pages(p, NR_PAGES, 1), NR_PAGES);
	before = vm_pte();
	ASSERT_EQ(madvise(p, TABLE, MADV_DONTNEED_LOCKED), 0);
	EXPECT_EQ(vm_pte() - before, -4);
	EXPECT_EQ(count_pages(p, NR_PAGES, 0), NR_PAGES);
	munmap(p, TABLE);
}

TEST_F_TIMEOUT(reclaim, forked, 120)
{
	int status;
	char *p;
	pid_t pid;
	int go[2];
	char c;

	ASSERT_EQ(pipe(go), 0);
	p = map_anon(TABLE);
	ASSERT_NE(p, NULL);
	write_pages(p, NR_PAGES, 1);
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (read(go[0], &c, 1) != 1)
			_exit(2);
		_exit(count_pages(p, NR_PAGES, 1) != NR_PAGES);
	}
	ASSERT_EQ(madvise(p, TABLE, MADV_DONTNEED), 0);
	EXPECT_GE(freed_by_now(), 1);
	EXPECT_EQ(count_pages(p, NR_PAGES, 0), NR_PAGES);
	write_pages(p, NR_PAGES, 2);
	ASSERT_EQ(write(go[1], "x", 1), 1);
	ASSERT_EQ(waitpid(pid, &status, 0), pid);
	EXPECT_EQ(status, 0);
	EXPECT_EQ(count_pages(p, NR_PAGES, 2), NR_PAGES);
	munmap(p, TABLE);
	close(go[0]);
	close(go[1]);
}

/* Write protection of userfaultfd leaves markers in mappings of files. */
TEST_F_TIMEOUT(reclaim, uffd_wp_stays, 120)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
	};
	struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_WP };
	struct uffdio_writeprotect wp = { .mode = UFFDIO_WRITEPROTECT_MODE_WP };
	uint64_t entries[NR_PAGES] = { };
	int uffd, fd, pm, i, markers = 0;
	long before;
	char *p;

	uffd = syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (uffd < 0)
		SKIP(return, "no userfaultfd: %s", strerror(errno));
	if (ioctl(uffd, UFFDIO_API, &api))
		SKIP(return, "no write protection of files: %s",
		     strerror(errno));

	fd = make_file(TABLE, 'f');
	ASSERT_GE(fd, 0);
	p = reserve(TABLE);
	ASSERT_NE(p, NULL);
	ASSERT_NE(map_at(p, TABLE, MAP_SHARED, fd), NULL);
	write_pages(p, NR_PAGES, 's');
	reg.range.start = (uintptr_t)p;
	reg.range.len = TABLE;
	ASSERT_EQ(ioctl(uffd, UFFDIO_REGISTER, &reg), 0);
	wp.range = reg.range;
	ASSERT_EQ(ioctl(uffd, UFFDIO_WRITEPROTECT, &wp), 0);
	before = vm_pte();
	ASSERT_EQ(madvise(p, TABLE, MADV_DONTNEED), 0);
	EXPECT_EQ(vm_pte(), before);

	/* Bit 57 of pagemap: still write-protected, though nothing is there. */
	pm = open("/proc/self/pagemap", O_RDONLY);
	ASSERT_GE(pm, 0);
	ASSERT_EQ(pread(pm, entries, sizeof(entries), (uintptr_t)p / PAGE * 8),
		  sizeof(entries));
	for (i = 0; i < NR_PAGES; i++)
		markers += entries[i] >> 57 & 1;
	EXPECT_EQ(markers, NR_PAGES);
	close(pm);
	close(uffd);
	munmap(p, TABLE);
	close(fd);
}

/* A huge page is not ours, and what is deposited for it is not counted here. */
TEST_F_TIMEOUT(reclaim, huge_page, 120)
{
	int i, collapsed = 0;
	char *p;

	p = map_anon(TABLE);
	ASSERT_NE(p, NULL);
	if (madvise(p, TABLE, MADV_HUGEPAGE))
		SKIP(return, "no transparent huge pages");
	for (i = 1; i < 50; i++) {
		/* Small pages, one huge page, split, gone. */
		poke(p, i);
		write_pages(p, NR_PAGES, i);
		madvise(p, TABLE, MADV_COLLAPSE);
		collapsed += smaps_read(p, "AnonHugePages:") == TABLE / 1024;
		EXPECT_EQ(count_pages(p, NR_PAGES, i), NR_PAGES);
		ASSERT_EQ(madvise(p + PAGE, PAGE, MADV_DONTNEED), 0);
		EXPECT_EQ(peek(p + PAGE), 0);
		EXPECT_EQ(count_pages(p, NR_PAGES, i), NR_PAGES - 1);
		ASSERT_EQ(madvise(p, TABLE, MADV_DONTNEED), 0);
		EXPECT_EQ(count_pages(p, NR_PAGES, 0), NR_PAGES);
		ASSERT_EQ(madvise(p, TABLE, MADV_DONTNEED), 0);
	}
	TH_LOG("%d huge pages, %ld tables freed", collapsed, freed_by_now());
	EXPECT_GE(collapsed, 1);
	EXPECT_GE(freed_by_now(), collapsed);
	munmap(p, TABLE);
}

TEST_F_TIMEOUT(reclaim, hugetlb_stays, 120)
{
	const char *nr = "/proc/sys/vm/nr_hugepages";
	long scanned;
	char *p;

	if (!setting_change(&self->settings, nr, "1") || file_number(nr) < 1)
		SKIP(return, "no page of hugetlb");
	p = map_at(reserve(TABLE), TABLE,
		   MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1);
	ASSERT_NE(p, NULL);
	scanned = vmstat_read("pt_reclaim_scanned");
	write_pages(p, NR_PAGES, 1);
	ASSERT_EQ(madvise(p, TABLE, MADV_DONTNEED), 0);
	EXPECT_EQ(count_pages(p, NR_PAGES, 0), NR_PAGES);
	EXPECT_EQ(vmstat_read("pt_reclaim_scanned"), scanned);
	munmap(p, TABLE);
}

/*
 * With the switch at 1, the default, the tables of a thread that returns to
 * them are kept: the last eight that it has reclaimed.
 */
#define MAX_KEPT	8

static bool touch_and_zap(char *p, int tables)
{
	int i;

	for (i = 0; i < tables; i++) {
		if (peek(p + i * TABLE))
			return false;
		poke(p + i * TABLE, i + 1);
	}
	return !madvise(p, tables * TABLE, MADV_DONTNEED);
}

/* One by one, each reclaimed the first time, and kept the second */
static bool have_kept(char *p, int tables)
{
	int i, n;

	for (i = 0; i < tables; i++)
		for (n = 0; n < 2; n++)
			if (!touch_and_zap(p + i * TABLE, 1))
				return false;
	return true;
}

TEST_F_TIMEOUT(reclaim, in_use_is_kept, 120)
{
	long before, kept, freed;
	char *p;
	int i;

	ASSERT_TRUE(switch_set(SYSCTL, 1));
	p = map_anon(MAX_KEPT * TABLE);
	ASSERT_NE(p, NULL);
	before = vm_pte();
	kept = vmstat_read("pt_reclaim_kept");
	ASSERT_TRUE(touch_and_zap(p, MAX_KEPT));
	EXPECT_LE(vm_pte() - before, 8);
	freed = freed_by_now();
	for (i = 0; i < 10; i++) {
		ASSERT_TRUE(touch_and_zap(p, MAX_KEPT));
		EXPECT_GE(vm_pte() - before, 4 * MAX_KEPT);
	}
	EXPECT_GE(vmstat_read("pt_reclaim_kept") - kept, 10 * MAX_KEPT);
	TH_LOG("%ld tables freed while %d were in use", freed_by_now() - freed,
	       MAX_KEPT);

	/* And not with the switch at 2. */
	ASSERT_TRUE(switch_set(SYSCTL, 2));
	ASSERT_TRUE(touch_and_zap(p, MAX_KEPT));
	EXPECT_LE(vm_pte() - before, 8);
	munmap(p, MAX_KEPT * TABLE);
}

/* What was kept goes when others are. */
TEST_F_TIMEOUT(reclaim, kept_are_few, 120)
{
	long before, kept = vmstat_read("pt_reclaim_kept");
	const int nr = 64;
	char *p;
	int i;

	ASSERT_TRUE(switch_set(SYSCTL, 1));
	p = map_anon(2 * nr * TABLE);
	ASSERT_NE(p, NULL);
	before = vm_pte();
	for (i = 0; i < nr; i++) {
		ASSERT_TRUE(have_kept(p + i * TABLE, 1));
		EXPECT_LE(vm_pte() - before, 4 * MAX_KEPT + 8);
	}
	EXPECT_GE(vm_pte() - before, 4 * MAX_KEPT);
	for (i = nr; i < nr + MAX_KEPT; i++)
		ASSERT_TRUE(touch_and_zap(p + i * TABLE, 1));
	EXPECT_LE(vm_pte() - before, 8);
	EXPECT_GE(freed_by_now(), 2 * nr + MAX_KEPT);
	kept = vmstat_read("pt_reclaim_kept") - kept;
	EXPECT_GE(kept, nr);
	EXPECT_EQ(vmstat_read("pt_reclaim_scanned") - self->scanned,
		  freed_by_now() + busy_by_now() + kept);
	munmap(p, 2 * nr * TABLE);
}

/* It goes only if it is empty, and if all of it belongs to one VMA still. */
TEST_F_TIMEOUT(reclaim, kept_is_looked_at_again, 120)
{
	long before;
	char *p, *q;
	int i;

	ASSERT_TRUE(switch_set(SYSCTL, 1));
	p = map_anon(MAX_KEPT * TABLE);
	q = map_anon(MAX_KEPT * TABLE);
	ASSERT_NE(p, NULL);
	ASSERT_NE(q, NULL);
	ASSERT_TRUE(touch_and_zap(q, MAX_KEPT));
	ASSERT_TRUE(have_kept(p, MAX_KEPT));
	before = vm_pte();

	/* The first is in use, the second gone, the third divided, ... */
	write_pages(p + TABLE - PAGE, 1, 'a');
	ASSERT_EQ(munmap(p + TABLE, TABLE), 0);
	ASSERT_EQ(mprotect(p + 2 * TABLE, TABLE / 2, PROT_READ), 0);
	/* ... the fourth that of others, and in use by them. */
	ASSERT_NE(map_at(p + 3 * TABLE, TABLE,
			 MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1), NULL);
	write_pages(p + 3 * TABLE, NR_PAGES, 'b');

	ASSERT_TRUE(touch_and_zap(q, MAX_KEPT));
	EXPECT_GE(busy_by_now(), 1);
	/* The second had gone, the last four are gone now. */
	EXPECT_EQ(vm_pte() - before, -5 * 4);
	EXPECT_EQ(peek(p + TABLE - PAGE), 'a');
	EXPECT_EQ(peek(p + 2 * TABLE), 0);
	EXPECT_EQ(count_pages(p + 3 * TABLE, NR_PAGES, 'b'), NR_PAGES);
	for (i = 4; i < MAX_KEPT; i++)
		EXPECT_EQ(count_pages(p + i * TABLE, NR_PAGES, 0), NR_PAGES);
	munmap(p, MAX_KEPT * TABLE);
	munmap(q, MAX_KEPT * TABLE);
}

TEST_F_TIMEOUT(reclaim, traced, 120)
{
	char event[64];
	char *p;

	if (!trace_begin(&self->settings, "pt_reclaim/pt_reclaim"))
		SKIP(return, "no tracepoints");
	ASSERT_TRUE(switch_set(SYSCTL, 1));
	p = map_anon(TABLE);
	ASSERT_NE(p, NULL);
	snprintf(event, sizeof(event), "pt_reclaim: addr=0x%lx freed=1",
		 (unsigned long)p);
	EXPECT_FALSE(trace_shows(event));
	ASSERT_TRUE(touch_and_zap(p, 1));
	EXPECT_TRUE(trace_shows(event));

	/* The second time it is kept. */
	*strrchr(event, '1') = '0';
	EXPECT_FALSE(trace_shows(event));
	ASSERT_TRUE(touch_and_zap(p, 1));
	EXPECT_TRUE(trace_shows(event));
	munmap(p, TABLE);
}

/* Others begin with no tables that they keep. */
TEST_F_TIMEOUT(reclaim, kept_by_nobody_else, 120)
{
	long before;
	int status;
	char *p;
	pid_t pid;

	ASSERT_TRUE(switch_set(SYSCTL, 1));
	p = map_anon(TABLE);
	ASSERT_NE(p, NULL);
	ASSERT_TRUE(have_kept(p, 1));
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid) {
		/* fork() has given us a table there, empty as it is. */
		before = vm_pte();
		_exit(!touch_and_zap(p, 1) || vm_pte() >= before);
	}
	ASSERT_EQ(waitpid(pid, &status, 0), pid);
	EXPECT_EQ(status, 0);
	munmap(p, TABLE);
}

#define KEPT_ADDR	((char *)(1UL << 45))
#define KEPT_CHECK	"PT_RECLAIM_TEST_KEPT_CHECK"

static bool map_kept(void)
{
	/* The next table keeps those of higher levels out of VmPTE. */
	if (!map_at(KEPT_ADDR, 2 * TABLE, MAP_PRIVATE | MAP_ANONYMOUS, -1))
		return false;
	poke(KEPT_ADDR + TABLE, 1);
	return true;
}

/* After exec(), before main() */
static void __attribute__((constructor)) kept_check(void)
{
	long before;

	if (!getenv(KEPT_CHECK))
		return;
	if (!map_kept())
		_exit(2);
	before = vm_pte();
	_exit(!touch_and_zap(KEPT_ADDR, 1) || vm_pte() > before);
}

TEST_F_TIMEOUT(reclaim, kept_not_over_exec, 120)
{
	int status;
	pid_t pid;

	ASSERT_TRUE(switch_set(SYSCTL, 1));
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid) {
		if (!map_kept() || !have_kept(KEPT_ADDR, 1))
			_exit(3);
		setenv(KEPT_CHECK, "1", 1);
		execl("/proc/self/exe", "pt_reclaim", NULL);
		_exit(4);
	}
	ASSERT_EQ(waitpid(pid, &status, 0), pid);
	EXPECT_EQ(status, 0);
}

enum { IDLE, BUSY, STOP };

static void *hog(void *arg)
{
	atomic_int *mode = arg;

	while (atomic_load(mode) != STOP)
		if (atomic_load(mode) == IDLE)
			usleep(1000);
	return NULL;
}

/* A zap that has to make way for others reclaims all the same. */
TEST_F_TIMEOUT(reclaim, rescheduled, 180)
{
	const unsigned long size = 16 * TABLE;
	pthread_t thread[2];
	atomic_int mode = IDLE;
	struct rusage usage;
	long before, switches;
	char *p;
	int i, round;

	ASSERT_TRUE(run_on(0));
	p = map_anon(size);
	ASSERT_NE(p, NULL);
	for (i = 0; i < 2; i++)
		ASSERT_EQ(pthread_create(&thread[i], NULL, hog, &mode), 0);
	before = vm_pte();
	switches = 0;
	for (round = 0; round < 2 || (round < 40 && switches < 8); round++) {
		for (i = 0; i < size / PAGE; i += 8)
			poke(p + i * PAGE, 1);
		atomic_store(&mode, BUSY);
		getrusage(RUSAGE_THREAD, &usage);
		switches -= usage.ru_nivcsw;
		ASSERT_EQ(madvise(p, size, MADV_DONTNEED), 0);
		getrusage(RUSAGE_THREAD, &usage);
		switches += usage.ru_nivcsw;
		atomic_store(&mode, IDLE);
		EXPECT_LE(vm_pte() - before, 8);
	}
	TH_LOG("made way %ld times in %d zaps", switches, round);
	EXPECT_GE(switches, 1);
	EXPECT_GE(freed_by_now(), round * 16);
	atomic_store(&mode, STOP);
	for (i = 0; i < 2; i++)
		pthread_join(thread[i], NULL);
	munmap(p, size);
}

/*
 * The oracle.  One thread zaps the whole range over and over; the generation is
 * odd while it does.  Others write to pages, each to its own, and read them
 * back.  For each page its owner knows
 *
 *  - what he has written last, and the generation before and after that;
 *  - so: if no zap has begun since before the write, it has to be there;
 *  - and if a zap has begun, and ended, after the write, it must be zero.
 *
 * In between either will do.
 */
#define NR_OWNERS	3
#define MIN_FREED	10
#define MIN_KEPT	10
#define MAX_RANGE	(16 * NR_PAGES)

struct race {
	char *p;
	int pages;
	atomic_ulong gen;
	atomic_bool stop;
	atomic_long zaps;
	atomic_long lost;
	atomic_long back;
	atomic_long wrong;
	atomic_long checks;
	bool huge;
	bool same;	/* pages with the same contents */
	bool in_turn;	/* a zap is of one table only */
	int fd;
	bool (*ready)(struct race *race);	/* for the next zap */
	atomic_long times_ready;	/* because of that */
	const char *event;	/* in /proc/vmstat; has to happen */
};

struct owner {
	struct race *race;
	int nr;
};

struct page_state {
	unsigned long value;
	unsigned long begin;
	unsigned long end;
};

static void check_page(struct race *race, char *addr, struct page_state *state)
{
	unsigned long gen, val;

	gen = atomic_load(&race->gen);
	val = __atomic_load_n((unsigned long *)addr, __ATOMIC_SEQ_CST);
	if (gen & 1 || atomic_load(&race->gen) != gen)
		return;

	atomic_fetch_add(&race->checks, 1);
	if (val && val != state->value)
		atomic_fetch_add(&race->wrong, 1);
	if (!val && state->value && state->begin == gen)
		atomic_fetch_add(&race->lost, 1);
	/* The first even number after the first whole zap after the write */
	if (!race->in_turn && val && gen >= ((state->end + 1) & ~1UL) + 2)
		atomic_fetch_add(&race->back, 1);
}

static void *own(void *arg)
{
	struct owner *owner = arg;
	struct race *race = owner->race;
	static __thread struct page_state states[MAX_RANGE];
	unsigned long value = 0;
	unsigned int seed = owner->nr;
	int i, n;

	while (!atomic_load(&race->stop)) {
		for (n = 0; n < 64; n++) {
			struct page_state *state;
			char *addr;

			i = rand_r(&seed) % (race->pages / NR_OWNERS);
			i = i * NR_OWNERS + owner->nr;
			state = &states[i];
			addr = race->p + i * PAGE;
			if (rand_r(&seed) & 1) {
				state->begin = atomic_load(&race->gen);
				state->value = race->same ? state->begin + 1 :
					++value * NR_OWNERS + owner->nr;
				__atomic_store_n((unsigned long *)addr,
						 state->value,
						 __ATOMIC_SEQ_CST);
				state->end = atomic_load(&race->gen);
			}
			check_page(race, addr, state);
		}
	}
	return NULL;
}

/* Let the others do what the race is with, if they get round to it. */
static void wait_until_ready(struct race *race)
{
	int i;

	for (i = 0; i < 20 && !atomic_load(&race->stop); i++) {
		if (race->ready(race)) {
			atomic_fetch_add(&race->times_ready, 1);
			break;
		}
		usleep(10000);
	}
}

static void *zap(void *arg)
{
	const unsigned long huge = 1;
	struct race *race = arg;
	unsigned long n = 0;

	while (!atomic_load(&race->stop)) {
		/* The other way round only after all is gone: see below. */
		if (race->huge)
			madvise(race->p, race->pages * PAGE,
				n++ & huge ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
		atomic_fetch_add(&race->gen, 1);
		if (madvise(race->p, race->pages * PAGE, MADV_DONTNEED))
			atomic_fetch_add(&race->wrong, 1);
		atomic_fetch_add(&race->gen, 1);
		atomic_fetch_add(&race->zaps, 1);
		/* Let the others fill some of it. */
		usleep(rand() % 2000);
		if (race->ready)
			wait_until_ready(race);
	}
	return NULL;
}

static void zap_table(struct race *race, int nr)
{
	atomic_fetch_add(&race->gen, 1);
	if (madvise(race->p + nr * TABLE, TABLE, MADV_DONTNEED))
		atomic_fetch_add(&race->wrong, 1);
	atomic_fetch_add(&race->gen, 1);
}

/*
 * Table by table: one that is kept is emptied, and makes room for the next one
 * at once, while the owners may be filling it.
 */
static void *zap_in_turn(void *arg)
{
	struct race *race = arg;
	int i, nr = race->pages / NR_PAGES;

	for (i = 0; !atomic_load(&race->stop); i++) {
		zap_table(race, (i + nr - MAX_KEPT) % nr);
		zap_table(race, i % nr);
		usleep(rand() % 1000);
		zap_table(race, i % nr);
		atomic_fetch_add(&race->zaps, 1);
	}
	return NULL;
}

static bool run_race(struct race *race, void *(*disrupt)(void *))
{
	pthread_t thread[NR_OWNERS], zapper, disruptor;
	struct owner owner[NR_OWNERS];
	long freed = vmstat_read("pt_reclaim_freed");
	long events = race->event ? vmstat_read(race->event) : 0;
	long kept = vmstat_read("pt_reclaim_kept");
	int i, seconds;

	if (pthread_create(&zapper, NULL, race->in_turn ? zap_in_turn : zap,
			   race))
		return false;
	for (i = 0; i < NR_OWNERS; i++) {
		owner[i] = (struct owner){ .race = race, .nr = i };
		if (pthread_create(&thread[i], NULL, own, &owner[i]))
			return false;
	}
	if (disrupt && pthread_create(&disruptor, NULL, disrupt, race))
		return false;
	/* Longer on slow machines, until there has been a race */
	for (seconds = 0; seconds < 60; seconds++) {
		sleep(1);
		if (seconds >= RACE_SECONDS && atomic_load(&race->zaps) >= 20 &&
		    vmstat_read("pt_reclaim_freed") - freed >= MIN_FREED &&
		    (!race->in_turn ||
		     vmstat_read("pt_reclaim_kept") - kept >= MIN_KEPT) &&
		    (!race->event || vmstat_read(race->event) > events) &&
		    (!race->ready || atomic_load(&race->times_ready)))
			break;
	}
	atomic_store(&race->stop, true);
	for (i = 0; i < NR_OWNERS; i++)
		pthread_join(thread[i], NULL);
	pthread_join(zapper, NULL);
	if (disrupt)
		pthread_join(disruptor, NULL);
	return true;
}

#define race_went_well(which)						\
do {									\
	struct race *__r = (which);					\
									\
	TH_LOG("%ld zaps, %ld pages checked, %ld tables freed, %ld busy, %ld flushes", \
	       atomic_load(&__r->zaps), atomic_load(&__r->checks),	\
	       freed_by_now(), busy_by_now(),				\
	       vmstat_read("pt_reclaim_flush") - self->flush);		\
	EXPECT_EQ(atomic_load(&__r->lost), 0);				\
	EXPECT_EQ(atomic_load(&__r->back), 0);				\
	EXPECT_EQ(atomic_load(&__r->wrong), 0);				\
	EXPECT_GE(atomic_load(&__r->checks), 100);			\
	EXPECT_GE(atomic_load(&__r->zaps), 10);				\
	EXPECT_GE(freed_by_now(), MIN_FREED);				\
} while (0)

/*
 * Historical: a table that was refilled after its lock had been dropped was
 * freed.  A zap of several tables gives the others time to do so.
 */
TEST_F_TIMEOUT(reclaim, refilled_table, 120)
{
	struct race race = { .pages = 8 * NR_PAGES };

	race.p = map_anon(race.pages * PAGE);
	ASSERT_NE(race.p, NULL);
	ASSERT_TRUE(run_race(&race, NULL));
	race_went_well(&race);
	munmap(race.p, race.pages * PAGE);
}

TEST_F_TIMEOUT(reclaim, one_table_refilled, 120)
{
	struct race race = { .pages = NR_PAGES };

	race.p = map_anon(race.pages * PAGE);
	ASSERT_NE(race.p, NULL);
	ASSERT_TRUE(run_race(&race, NULL));
	race_went_well(&race);
	munmap(race.p, race.pages * PAGE);
}

static void check_kept_tables(struct __test_metadata *_metadata,
			      struct _test_data_reclaim *self,
			      const char *event)
{
	struct race race = {
		.pages = 2 * MAX_KEPT * NR_PAGES, .in_turn = true,
		.event = event,
	};
	long kept = vmstat_read("pt_reclaim_kept");

	ASSERT_TRUE(switch_set(SYSCTL, 1));
	race.p = map_anon(race.pages * PAGE);
	ASSERT_NE(race.p, NULL);
	ASSERT_TRUE(run_race(&race, NULL));
	race_went_well(&race);
	kept = vmstat_read("pt_reclaim_kept") - kept;
	TH_LOG("%ld tables kept", kept);
	EXPECT_GE(kept, MIN_KEPT);
	munmap(race.p, race.pages * PAGE);
}

TEST_F_TIMEOUT(reclaim, kept_tables_refilled, 120)
{
	check_kept_tables(_metadata, self, NULL);
}

/* By faults that hold the lock of the table, and no other. */
TEST_F_TIMEOUT(reclaim, kept_tables_refilled_speculatively, 120)
{
	if (!setting_change(&self->settings, SPF_SYSCTL, "1"))
		SKIP(return, "no " SPF_SYSCTL);
	check_kept_tables(_metadata, self, "spf_success");
}

/*
 * A range that is mapped by small pages and by huge ones in turn: no one may
 * see the old pages through what is left in his TLB.
 */
TEST_F_TIMEOUT(reclaim, small_and_huge_in_turn, 120)
{
	struct race race = {
		.pages = 2 * NR_PAGES, .huge = true, .event = "thp_fault_alloc"
	};
	long huge = vmstat_read("thp_fault_alloc");

	race.p = map_anon(race.pages * PAGE);
	ASSERT_NE(race.p, NULL);
	if (madvise(race.p, race.pages * PAGE, MADV_HUGEPAGE))
		SKIP(return, "no transparent huge pages");
	setting_change(&self->settings, THP "enabled", "madvise");
	ASSERT_TRUE(run_race(&race, NULL));
	race_went_well(&race);
	huge = vmstat_read("thp_fault_alloc") - huge;
	TH_LOG("%ld huge pages", huge);
	EXPECT_GE(huge, 1);
	/* Pages and tables came to where a table had not been flushed yet. */
	EXPECT_GE(vmstat_read("pt_reclaim_flush") - self->flush, 1);
	munmap(race.p, race.pages * PAGE);
}

static void read_all(const char *path)
{
	char buf[4096];
	int fd = open(path, O_RDONLY);

	if (fd < 0)
		return;
	while (read(fd, buf, sizeof(buf)) > 0)
		;
	close(fd);
}

/* Those who walk page tables of a process. */
static void *disrupt_walks(void *arg)
{
	struct race *race = arg;
	unsigned char vec[MAX_RANGE];
	uint64_t buf[NR_PAGES];
	int pm = open("/proc/self/pagemap", O_RDONLY);

	while (!atomic_load(&race->stop)) {
		read_all("/proc/self/smaps_rollup");
		read_all("/proc/self/smaps");
		read_all("/proc/self/numa_maps");
		pread(pm, buf, sizeof(buf), (uintptr_t)race->p / PAGE * 8);
		mincore(race->p, race->pages * PAGE, vec);
		madvise(race->p, race->pages * PAGE, MADV_PAGEOUT);
		madvise(race->p, race->pages * PAGE, MADV_COLD);
	}
	close(pm);
	return NULL;
}

TEST_F_TIMEOUT(reclaim, page_table_walks, 120)
{
	struct race race = { .pages = 4 * NR_PAGES };

	race.p = map_anon(race.pages * PAGE);
	ASSERT_NE(race.p, NULL);
	ASSERT_TRUE(run_race(&race, disrupt_walks));
	race_went_well(&race);
	munmap(race.p, race.pages * PAGE);
}

/* Those who copy and collapse. */
static void *disrupt_changes(void *arg)
{
	struct race *race = arg;
	int status, n = 0;
	pid_t pid;

	while (!atomic_load(&race->stop)) {
		madvise(race->p, race->pages * PAGE, MADV_COLLAPSE);
		if (n++ % 8)
			continue;
		pid = fork();
		if (!pid)
			_exit(0);
		if (pid > 0)
			waitpid(pid, &status, 0);
	}
	return NULL;
}

TEST_F_TIMEOUT(reclaim, fork_and_collapse, 120)
{
	struct race race = {
		.pages = 4 * NR_PAGES, .event = "thp_collapse_alloc"
	};
	long collapsed = vmstat_read("thp_collapse_alloc");

	race.p = map_anon(race.pages * PAGE);
	ASSERT_NE(race.p, NULL);
	/* No huge pages in faults, but where MADV_COLLAPSE asks for them */
	setting_change(&self->settings, THP "enabled", "never");
	if (madvise(race.p, race.pages * PAGE, MADV_HUGEPAGE))
		SKIP(return, "no huge pages in this kernel");
	ASSERT_TRUE(run_race(&race, disrupt_changes));
	race_went_well(&race);
	collapsed = vmstat_read("thp_collapse_alloc") - collapsed;
	TH_LOG("%ld huge pages", collapsed);
	EXPECT_GT(collapsed, 0);
	munmap(race.p, race.pages * PAGE);
}

/* Any table, which goes the first time, and is kept the second */
static void *zap_any(void *arg)
{
	struct race *race = arg;
	unsigned int seed = gettid();
	int n;

	while (!atomic_load(&race->stop)) {
		char *p = race->p +
			  rand_r(&seed) % (race->pages / NR_PAGES) * TABLE;

		for (n = 0; n < 2; n++) {
			poke(p, 1);
			if (madvise(p, TABLE, MADV_DONTNEED))
				atomic_fetch_add(&race->wrong, 1);
		}
		atomic_fetch_add(&race->zaps, 1);
	}
	return NULL;
}

/*
 * Zaps of the same tables.  Who reclaims one that was kept takes the lock of the
 * pmd, and then that of the table; who has just emptied it has the latter, and
 * wants the former.
 */
TEST_F_TIMEOUT(reclaim, zaps_of_the_same, 120)
{
	struct race race = { .pages = 2 * MAX_KEPT * NR_PAGES };
	long kept = vmstat_read("pt_reclaim_kept");
	pthread_t thread[3];
	int i;

	ASSERT_TRUE(switch_set(SYSCTL, 1));
	race.p = map_anon(race.pages * PAGE);
	ASSERT_NE(race.p, NULL);
	for (i = 0; i < 3; i++)
		ASSERT_EQ(pthread_create(&thread[i], NULL, zap_any, &race), 0);
	for (i = 0; i < 60; i++) {
		sleep(1);
		if (i >= RACE_SECONDS && atomic_load(&race.zaps) >= 200 &&
		    freed_by_now() >= MIN_FREED &&
		    vmstat_read("pt_reclaim_kept") - kept >= MIN_KEPT)
			break;
	}
	atomic_store(&race.stop, true);
	for (i = 0; i < 3; i++)
		pthread_join(thread[i], NULL);
	kept = vmstat_read("pt_reclaim_kept") - kept;
	TH_LOG("%ld zaps, %ld tables freed, %ld kept", atomic_load(&race.zaps),
	       freed_by_now(), kept);
	EXPECT_EQ(atomic_load(&race.wrong), 0);
	EXPECT_GE(kept, MIN_KEPT);
	EXPECT_GE(freed_by_now(), MIN_FREED);
	munmap(race.p, race.pages * PAGE);
}

/* ksmd, which replaces pages by one that all of them share */
static bool ksm_has_merged(struct race *race)
{
	return file_number(KSM "pages_sharing") >= 16;
}

TEST_F_TIMEOUT(reclaim, ksm, 120)
{
	struct race race = {
		.pages = NR_PAGES, .same = true, .ready = ksm_has_merged
	};

	race.p = map_anon(race.pages * PAGE);
	ASSERT_NE(race.p, NULL);
	if (madvise(race.p, race.pages * PAGE, MADV_MERGEABLE) ||
	    !ksm_hurries(&self->settings))
		SKIP(return, "no KSM");
	ASSERT_TRUE(run_race(&race, NULL));
	race_went_well(&race);
	EXPECT_GT(race.times_ready, 0);
	munmap(race.p, race.pages * PAGE);
}

/*
 * khugepaged, which replaces the page table by a huge page.  It is let in when
 * there are small pages, or else it has nothing to do.
 */
static bool khugepaged_has_collapsed(struct race *race)
{
	madvise(race->p, race->pages * PAGE, MADV_HUGEPAGE);
	if (smaps_read(race->p, "AnonHugePages:") <= 0)
		return false;
	madvise(race->p, race->pages * PAGE, MADV_NOHUGEPAGE);
	return true;
}

TEST_F_TIMEOUT(reclaim, khugepaged, 120)
{
	struct race race = {
		.pages = 2 * NR_PAGES, .ready = khugepaged_has_collapsed
	};
	long collapsed = vmstat_read("thp_collapse_alloc");

	race.p = map_anon(race.pages * PAGE);
	ASSERT_NE(race.p, NULL);
	if (!khugepaged_hurries(&self->settings))
		SKIP(return, "no transparent huge pages");
	ASSERT_TRUE(run_race(&race, NULL));
	race_went_well(&race);
	EXPECT_GT(vmstat_read("thp_collapse_alloc"), collapsed);
	munmap(race.p, race.pages * PAGE);
}

/* Migration, which goes to page tables by way of the pages */
static void *disrupt_migration(void *arg)
{
	struct race *race = arg;
	int i, n, last = last_node();

	for (n = 0; !atomic_load(&race->stop); n++)
		for (i = 0; i < race->pages; i += NR_PAGES)
			move_to_node(race->p + i * PAGE, NR_PAGES,
				     n % 2 ? 0 : last);
	return NULL;
}

TEST_F_TIMEOUT(reclaim, migration, 120)
{
	long migrated = vmstat_read("pgmigrate_success");
	struct race race = {
		.pages = 2 * NR_PAGES, .event = "pgmigrate_success"
	};

	if (!last_node())
		SKIP(return, "needs two NUMA nodes");
	race.p = map_anon(race.pages * PAGE);
	ASSERT_NE(race.p, NULL);
	ASSERT_TRUE(run_race(&race, disrupt_migration));
	race_went_well(&race);
	EXPECT_GT(vmstat_read("pgmigrate_success"), migrated);
	munmap(race.p, race.pages * PAGE);
}

/*
 * The page tables of a file, which khugepaged takes away as well.  Every seventh
 * page is looked at; one in between is punched out of each huge page, which
 * splits it.
 */
static void *disrupt_file(void *arg)
{
	struct race *race = arg;

	while (!atomic_load(&race->stop)) {
		char c;
		int i;

		for (i = 0; i < race->pages; i += 7) {
			c = peek(race->p + i * PAGE);
			if (c != 'f')
				atomic_fetch_add(&race->wrong, 1);
		}
		madvise(race->p, race->pages * PAGE, MADV_DONTNEED);
	}
	return NULL;
}

static void collapse_table(struct race *race, char *p)
{
	if (!madvise(p, TABLE, MADV_COLLAPSE))
		atomic_fetch_add(&race->checks, 1);
}

/* Have a huge page mapped by a page table. */
static void map_by_table(struct race *race, char *p)
{
	madvise(race->p, race->pages * PAGE, MADV_NOHUGEPAGE);
	madvise(p, TABLE, MADV_DONTNEED);
	count_pages(p, NR_PAGES / 8, 'f');
	madvise(race->p, race->pages * PAGE, MADV_HUGEPAGE);
}

static void *collapse_file(void *arg)
{
	struct race *race = arg;
	int i, n;

	for (n = 0; !atomic_load(&race->stop); n++) {
		for (i = 0; i < race->pages; i += NR_PAGES) {
			collapse_table(race, race->p + i * PAGE);
			if (n & 1) {
				map_by_table(race, race->p + i * PAGE);
				collapse_table(race, race->p + i * PAGE);
				continue;
			}
			fallocate(race->fd, FALLOC_FL_PUNCH_HOLE |
				  FALLOC_FL_KEEP_SIZE,
				  (i + 3 - i % 7) * PAGE, PAGE);
		}
	}
	return NULL;
}

TEST_F_TIMEOUT(reclaim, collapse_of_file, 120)
{
	/* Who reads may have to wait for the collapse, who zaps has not. */
	void *(*fn[])(void *) = { collapse_file, disrupt_file, zap };
	struct race race = { .pages = 4 * NR_PAGES };
	pthread_t thread[3];
	int i;

	race.fd = make_file(race.pages * PAGE, 'f');
	ASSERT_GE(race.fd, 0);
	race.p = reserve(race.pages * PAGE);
	ASSERT_NE(race.p, NULL);
	ASSERT_EQ(mmap(race.p, race.pages * PAGE, PROT_READ | PROT_WRITE,
		       MAP_SHARED | MAP_FIXED, race.fd, 0), race.p);
	if (madvise(race.p, race.pages * PAGE, MADV_COLLAPSE) && errno == EINVAL)
		SKIP(return, "no huge pages of files");
	for (i = 0; i < 3; i++)
		ASSERT_EQ(pthread_create(&thread[i], NULL, fn[i], &race), 0);
	for (i = 0; i < 60; i++) {
		sleep(1);
		if (i >= RACE_SECONDS && atomic_load(&race.checks) >= 8 &&
		    freed_by_now())
			break;
	}
	atomic_store(&race.stop, true);
	for (i = 0; i < 3; i++)
		pthread_join(thread[i], NULL);
	TH_LOG("%ld collapses, %ld tables freed, %ld busy",
	       atomic_load(&race.checks), freed_by_now(), busy_by_now());
	EXPECT_EQ(atomic_load(&race.wrong), 0);
	EXPECT_GE(atomic_load(&race.checks), 8);
	EXPECT_GE(freed_by_now(), 1);
	munmap(race.p, race.pages * PAGE);
	close(race.fd);
}

/*
 * A page table of a file is emptied by MADV_COLLAPSE, which then waits for locks
 * to unlink it.  Meanwhile it is reclaimed.
 */
#define RESCAN_DELAY	"/sys/kernel/debug/mm_race_delay/pt_rescan"

struct emptied {
	struct race race;
	int pagemap;
	int mapped;		/* that many pages */
	useconds_t wait;	/* before the zap, at most */
	long enough;		/* tables taken */
	atomic_bool armed;
	atomic_long rounds;
	atomic_bool collapsing;
	atomic_long taken;	/* meanwhile */
};

static bool still_mapped(struct emptied *e)
{
	return pagemap_get_entry(e->pagemap, e->race.p +
				 (e->mapped - 1) * PAGE) & PM_PRESENT;
}

static void *zap_emptied(void *arg)
{
	struct emptied *e = arg;
	long freed, round;

	while (!atomic_load(&e->race.stop)) {
		freed = vmstat_read("pt_reclaim_freed");
		round = atomic_load(&e->rounds);
		atomic_store(&e->armed, true);
		while (atomic_load(&e->rounds) == round &&
		       !atomic_load(&e->race.stop))
			sched_yield();
		while (atomic_load(&e->collapsing) && still_mapped(e))
			;
		if (e->wait)
			usleep(rand() % e->wait);
		madvise(e->race.p, TABLE, MADV_DONTNEED);
		if (atomic_load(&e->collapsing) &&
		    vmstat_read("pt_reclaim_freed") > freed)
			atomic_fetch_add(&e->taken, 1);
		while (atomic_load(&e->collapsing) &&
		       !atomic_load(&e->race.stop))
			sched_yield();
	}
	return NULL;
}

/*
 * @split: there is no huge page yet.  Then all of the table's entries go before
 * the pages are copied, and the table after that.
 */
static void check_emptied(struct __test_metadata *_metadata,
			  struct settings *settings, bool split)
{
	time_t now, end = time(NULL) + RACE_SECONDS;
	struct emptied e = {
		.race.pages = NR_PAGES, .mapped = NR_PAGES / 8,
		.wait = split ? 20000 : 0, .enough = split ? 30 : 8,
	};
	struct race *race = &e.race;
	pthread_t thread;
	int i;

	if (!setting_change(settings, RESCAN_DELAY, "2000"))
		SKIP(return, "cannot write " RESCAN_DELAY);
	e.pagemap = open("/proc/self/pagemap", O_RDONLY);
	ASSERT_GE(e.pagemap, 0);
	race->fd = make_file(TABLE, 'f');
	ASSERT_GE(race->fd, 0);
	race->p = reserve(TABLE);
	ASSERT_NE(race->p, NULL);
	ASSERT_NE(map_at(race->p, TABLE, MAP_SHARED, race->fd), NULL);
	if (madvise(race->p, TABLE, MADV_HUGEPAGE) ||
	    (madvise(race->p, TABLE, MADV_COLLAPSE) && errno == EINVAL))
		SKIP(return, "no huge pages of files");
	ASSERT_EQ(pthread_create(&thread, NULL, zap_emptied, &e), 0);
	do {
		while (!atomic_load(&e.armed))
			sched_yield();
		atomic_store(&e.armed, false);
		if (split)
			ASSERT_EQ(fallocate(race->fd, FALLOC_FL_PUNCH_HOLE |
					    FALLOC_FL_KEEP_SIZE,
					    TABLE - PAGE, PAGE), 0);
		map_by_table(race, race->p);
		atomic_store(&e.collapsing, true);
		atomic_fetch_add(&e.rounds, 1);
		collapse_table(race, race->p);
		atomic_store(&e.collapsing, false);
		for (i = 0; i < e.mapped; i++)
			race->wrong += peek(race->p + i * PAGE) != 'f';
		now = time(NULL);
	} while (now < end ||
		 (atomic_load(&e.taken) < e.enough && now < end + 60));
	atomic_store(&race->stop, true);
	pthread_join(thread, NULL);

	TH_LOG("%ld collapses, %ld tables reclaimed meanwhile",
	       atomic_load(&race->checks), atomic_load(&e.taken));
	EXPECT_EQ(atomic_load(&race->wrong), 0);
	EXPECT_GE(atomic_load(&e.taken), 8);
	munmap(race->p, TABLE);
	close(race->fd);
	close(e.pagemap);
}

TEST_F_TIMEOUT(reclaim, collapse_of_emptied, 120)
{
	check_emptied(_metadata, &self->settings, false);
}

TEST_F_TIMEOUT(reclaim, collapse_of_emptied_and_copied, 120)
{
	check_emptied(_metadata, &self->settings, true);
}

/*
 * UFFDIO_MOVE and UFFDIO_COPY into a table that is being reclaimed: a page that
 * has been moved or copied there is there, unless it was zapped afterwards.
 */
static void *zap_around(void *arg)
{
	struct race *race = arg;

	while (!atomic_load(&race->stop)) {
		atomic_fetch_add(&race->gen, 1);
		madvise(race->p, TABLE, MADV_DONTNEED);
		atomic_fetch_add(&race->gen, 1);
		atomic_fetch_add(&race->zaps, 1);
		usleep(rand() % 200);
	}
	return NULL;
}

/* What was moved or copied to a page, and the generation after that */
struct placed {
	unsigned long val, gen;
};

static int place(int uffd, char *dst, char *src, bool move)
{
	struct uffdio_move m = {
		.dst = (uintptr_t)dst, .src = (uintptr_t)src, .len = PAGE,
	};
	struct uffdio_copy c = {
		.dst = (uintptr_t)dst, .src = (uintptr_t)src, .len = PAGE,
	};

	return move ? ioctl(uffd, UFFDIO_MOVE, &m) : ioctl(uffd, UFFDIO_COPY, &c);
}

TEST_F_TIMEOUT(reclaim, uffd_move_and_copy, 120)
{
	struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	time_t end = time(NULL) + RACE_SECONDS, last = end + 60;
	struct placed placed[NR_PAGES] = { };
	struct race race = { .pages = NR_PAGES };
	long times[2] = { }, again = 0;
	unsigned long gen, val;
	pthread_t zapper;
	char *src, *dst;
	int uffd, n, i, ret, sig;
	bool absent;

	/* A page that is not there is a signal. */
	uffd = uffd_open(UFFD_FEATURE_MOVE | UFFD_FEATURE_SIGBUS);
	if (uffd < 0)
		SKIP(return, "no UFFDIO_MOVE: %s", strerror(errno));
	catch_access_signals();

	src = map_anon(TABLE);
	race.p = map_anon(TABLE);
	ASSERT_NE(src, NULL);
	ASSERT_NE(race.p, NULL);
	reg.range.start = (uintptr_t)race.p;
	reg.range.len = TABLE;
	ASSERT_EQ(ioctl(uffd, UFFDIO_REGISTER, &reg), 0);
	ASSERT_EQ(pthread_create(&zapper, NULL, zap_around, &race), 0);

	for (n = 0; time(NULL) < last; n++) {
		if (time(NULL) >= end && times[0] >= 10 && times[1] >= 10 &&
		    freed_by_now() >= 10)
			break;
		i = n % NR_PAGES;
		dst = race.p + i * PAGE;

		/* What a whole zap has taken must not be there again. */
		gen = atomic_load(&race.gen);
		sig = try_access((unsigned long *)dst, &val, false);
		absent = sig;
		if (!sig) {
			EXPECT_EQ(val, placed[i].val);
			EXPECT_LT(gen, ((placed[i].gen + 1) & ~1UL) + 2);
		}

		*(unsigned long *)(src + i * PAGE) = n + 1;
		gen = atomic_load(&race.gen);
		ret = place(uffd, dst, src + i * PAGE, n & 1);
		if (!ret) {
			times[n & 1]++;
			placed[i].val = n + 1;
			placed[i].gen = atomic_load(&race.gen);
		} else if (errno == EAGAIN) {
			again++;
			continue;
		} else {
			ASSERT_EQ(errno, EEXIST);
			/* A table that goes is not a page that is there. */
			EXPECT_FALSE(absent);
		}

		/* If there has been no zap since, something is there. */
		sig = try_access((unsigned long *)dst, &val, false);
		if (!sig)
			EXPECT_EQ(val, placed[i].val);
		if (sig && !(gen & 1))
			EXPECT_NE(atomic_load(&race.gen), gen);
	}
	atomic_store(&race.stop, true);
	pthread_join(zapper, NULL);
	TH_LOG("%ld zaps, %ld moved, %ld copied, %ld times EAGAIN, %ld tables freed",
	       atomic_load(&race.zaps), times[1], times[0], again, freed_by_now());
	EXPECT_GE(times[1], 10);
	EXPECT_GE(times[0], 10);
	EXPECT_GE(freed_by_now(), 10);
	close(uffd);
	munmap(src, TABLE);
	munmap(race.p, TABLE);
}

/* mremap() moves what is in page tables next to those that come and go. */
TEST_F_TIMEOUT(reclaim, mremap_next_to_it, 120)
{
	time_t end = time(NULL) + RACE_SECONDS;
	struct race race = { .pages = NR_PAGES };
	char *area, *home, *away;
	pthread_t zapper;
	long moves = 0;

	/* One page table each: the zapped one, and those of the other VMA */
	area = reserve(4 * TABLE);
	ASSERT_NE(area, NULL);
	race.p = map_at(area, TABLE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	home = map_at(area + TABLE, TABLE / 2, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	away = area + 2 * TABLE + TABLE / 2;
	ASSERT_NE(race.p, NULL);
	ASSERT_NE(home, NULL);
	write_pages(home, NR_PAGES / 2, 'm');
	ASSERT_EQ(pthread_create(&zapper, NULL, zap, &race), 0);
	/* Where faults are slow, until it has happened often enough */
	while (time(NULL) < end || (moves < 10 && time(NULL) < end + 60)) {
		write_pages(race.p, NR_PAGES / 16, 1);
		ASSERT_EQ(mremap(home, TABLE / 2, TABLE / 2,
				 MREMAP_MAYMOVE | MREMAP_FIXED, away), away);
		ASSERT_EQ(count_pages(away, NR_PAGES / 2, 'm'), NR_PAGES / 2);
		ASSERT_EQ(mremap(away, TABLE / 2, TABLE / 2,
				 MREMAP_MAYMOVE | MREMAP_FIXED, home), home);
		ASSERT_EQ(count_pages(home, NR_PAGES / 2, 'm'), NR_PAGES / 2);
		moves += 2;
	}
	atomic_store(&race.stop, true);
	pthread_join(zapper, NULL);
	TH_LOG("%ld moves, %ld tables freed", moves, freed_by_now());
	EXPECT_GE(moves, 10);
	EXPECT_GE(freed_by_now(), 10);
	munmap(area, 4 * TABLE);
}

/* Zap the first table of where it may be, and of where it may go to. */
static void *zap_both(void *arg)
{
	struct race *race = arg;

	while (!atomic_load(&race->stop)) {
		madvise(race->p, TABLE, MADV_DONTNEED);
		madvise(race->p + 2 * TABLE, TABLE, MADV_DONTNEED);
		atomic_fetch_add(&race->zaps, 1);
		usleep(rand() % 200);
	}
	return NULL;
}

/*
 * mremap() moves whole page tables, to where one has just been reclaimed, while
 * the first of them is zapped where it is at the time.  The second is not.
 */
TEST_F_TIMEOUT(reclaim, mremap_of_it, 120)
{
	time_t end = time(NULL) + RACE_SECONDS;
	struct race race = { };
	pthread_t zapper;
	long moves = 0;
	char *from, *to;
	int n;

	race.p = reserve(4 * TABLE);
	ASSERT_NE(race.p, NULL);
	from = map_at(race.p, 2 * TABLE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	ASSERT_NE(from, NULL);
	write_pages(from + TABLE, NR_PAGES, 'm');
	ASSERT_EQ(pthread_create(&zapper, NULL, zap_both, &race), 0);
	while (time(NULL) < end || (time(NULL) < end + 60 &&
				    (moves < 10 || freed_by_now() < 10))) {
		to = race.p + (from == race.p ? 2 * TABLE : 0);
		write_pages(from, NR_PAGES / 16, 'z');
		ASSERT_EQ(mremap(from, 2 * TABLE, 2 * TABLE,
				 MREMAP_MAYMOVE | MREMAP_FIXED, to), to);
		ASSERT_EQ(count_pages(to + TABLE, NR_PAGES, 'm'), NR_PAGES);
		/* As it was, or zapped: at different times, as zaps go on. */
		for (n = 0; n < NR_PAGES / 16; n++) {
			char c = peek(to + n * PAGE);

			ASSERT_TRUE(c == 'z' || !c);
		}
		from = to;
		moves++;
	}
	atomic_store(&race.stop, true);
	pthread_join(zapper, NULL);
	TH_LOG("%ld moves, %ld zaps, %ld tables freed", moves,
	       atomic_load(&race.zaps), freed_by_now());
	EXPECT_GE(moves, 10);
	EXPECT_GE(freed_by_now(), 10);
	munmap(race.p, 4 * TABLE);
}

/* The same number of page tables in the system, after the grace period */
TEST_F_TIMEOUT(reclaim, tables_are_given_back, 120)
{
	const int nr = 2000;
	long before, after = 0;
	char *p;
	int i;

	p = map_anon(nr * TABLE);
	ASSERT_NE(p, NULL);
	before = vmstat_read("nr_page_table_pages");
	for (i = 0; i < nr; i++)
		poke(p + i * TABLE, 1);
	EXPECT_GE(vmstat_read("nr_page_table_pages"), before + nr / 2);
	ASSERT_EQ(madvise(p, nr * TABLE, MADV_DONTNEED), 0);
	EXPECT_GE(freed_by_now(), nr);
	for (i = 0; i < 300; i++) {
		after = vmstat_read("nr_page_table_pages");
		if (after <= before + nr / 10)
			break;
		usleep(100000);
	}
	TH_LOG("%ld page tables before, %ld after %d ms", before, after, i * 100);
	EXPECT_LE(after, before + nr / 10);
	munmap(p, nr * TABLE);
}

/* What is freed waits for a grace period, and is charged for until then. */
#define CGROUP		"/sys/fs/cgroup/pt_reclaim_test"

TEST_F_TIMEOUT(reclaim, small_cgroup_does_not_run_out, 120)
{
	time_t end = time(NULL) + RACE_SECONDS;
	int status, i, n;
	pid_t pid;

	file_write("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	if (mkdir(CGROUP, 0755) && errno != EEXIST)
		SKIP(return, "cannot make " CGROUP ": %s", strerror(errno));
	if (!file_write(CGROUP "/memory.max", "33554432")) {
		rmdir(CGROUP);
		SKIP(return, "cannot set memory.max of a cgroup");
	}
	pid = fork();
	ASSERT_GE(pid, 0);
	if (!pid) {
		char *p;

		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (!file_write(CGROUP "/cgroup.procs", "0"))
			_exit(2);
		p = map_anon(GIB);
		if (!p)
			_exit(3);
		for (n = 1; time(NULL) < end; n++) {
			for (i = 0; i < 64; i++)
				poke(p + i * TABLE, 1);
			if (madvise(p, GIB, MADV_DONTNEED))
				_exit(1);
			/* Now and then the VMA goes, too. */
			if (n % 8 == 0 &&
			    (munmap(p, GIB) ||
			     !map_at(p, GIB, MAP_PRIVATE | MAP_ANONYMOUS, -1)))
				_exit(4);
			usleep(10000);
		}
		_exit(0);
	}
	ASSERT_EQ(waitpid(pid, &status, 0), pid);
	EXPECT_EQ(status, 0);
	EXPECT_GE(freed_by_now(), 64);
	EXPECT_EQ(field_read(CGROUP "/memory.events", "oom"), 0);
	for (i = 0; i < 50 && rmdir(CGROUP); i++)
		usleep(100000);
}

/* In a process of one thread nobody has to flush for anybody. */
TEST_F_TIMEOUT(reclaim, no_flush_without_concurrency, 120)
{
	time_t end = time(NULL) + 30;
	char *p;
	int i;

	p = map_anon(4 * TABLE);
	ASSERT_NE(p, NULL);
	for (i = 0; i < 100 && (i < 4 || time(NULL) < end); i++) {
		write_pages(p, 4 * NR_PAGES, 1);
		ASSERT_EQ(madvise(p, 4 * TABLE, MADV_DONTNEED), 0);
		madvise(p, 4 * TABLE, i & 1 ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	}
	TH_LOG("%ld tables freed", freed_by_now());
	EXPECT_GE(freed_by_now(), 4);
	EXPECT_EQ(vmstat_read("pt_reclaim_flush"), self->flush);
	munmap(p, 4 * TABLE);
}

static void *fault_and_unmap(void *arg)
{
	struct race *race = arg;

	while (!atomic_load(&race->stop)) {
		char *p = map_anon(4 * TABLE);

		if (!p) {
			atomic_fetch_add(&race->wrong, 1);
			break;
		}
		for (int i = 0; i < 4; i++)
			poke(p + i * TABLE, 1);
		munmap(p, 4 * TABLE);
		atomic_fetch_add(&race->checks, 1);
	}
	return NULL;
}

/* Nor for those who do not reclaim: these come by new tables all the time. */
TEST_F_TIMEOUT(reclaim, no_flush_without_reclaim, 120)
{
	struct race race = { };
	pthread_t thread[3];
	int i;

	for (i = 0; i < 3; i++)
		ASSERT_EQ(pthread_create(&thread[i], NULL, fault_and_unmap,
					 &race), 0);
	for (i = 0; i < 30; i++) {
		sleep(1);
		if (atomic_load(&race.checks) >= 30)
			break;
	}
	atomic_store(&race.stop, true);
	for (i = 0; i < 3; i++)
		pthread_join(thread[i], NULL);
	TH_LOG("%ld times four tables", atomic_load(&race.checks));
	EXPECT_EQ(atomic_load(&race.wrong), 0);
	EXPECT_GE(atomic_load(&race.checks), 30);
	EXPECT_EQ(vmstat_read("pt_reclaim_flush"), self->flush);
}

/*
 * What is in the TLB of others when a table has been unlinked, but not flushed
 * yet.  One thread reads a page all the time, one discards it with its table, and
 * one puts something else there as soon as the page has gone, which nobody may do
 * without a flush: from then on, the first must not see the old page any more.
 */
#define FLUSH_DELAY	"/sys/kernel/debug/mm_race_delay/pt_flush"
#define MIN_FLUSHES	8

struct tlb {
	bool (*replace)(struct tlb *tlb);
	char *p, *src;		/* one table each */
	int uffd;
	int pagemap;
	atomic_ulong seen;		/* what the reader has */
	/* How far the page of a round has come */
	atomic_ulong going;		/* is to be discarded */
	atomic_ulong gone;		/* has been, and flushed */
	atomic_ulong replaced;
	atomic_long stale;		/* times it was seen after that */
	atomic_long failures;
	atomic_bool stop;
};

FIXTURE(flush)
{
	struct settings settings;
	struct tlb tlb;
};

FIXTURE_VARIANT(flush)
{
	bool huge;	/* what comes is a huge page */
	bool file;	/* of a file, which the old page was a copy of */
	bool dax;	/* one whose storage is mapped directly */
	bool hole;	/* with nothing in it */
	bool uffd;
	bool (*replace)(struct tlb *tlb);
};

static bool replace_by_write(struct tlb *tlb)
{
	poke(tlb->p, 0);
	return true;
}

static bool replace_by_read(struct tlb *tlb)
{
	return !__atomic_load_n((unsigned long *)tlb->p, __ATOMIC_SEQ_CST);
}

static bool replace_by_move(struct tlb *tlb)
{
	struct uffdio_move move = {
		.dst = (uintptr_t)tlb->p, .src = (uintptr_t)tlb->src,
		.len = TABLE,
	};

	/* The zap may have had the lock of the pmd. */
	while (ioctl(tlb->uffd, UFFDIO_MOVE, &move)) {
		if (errno != EAGAIN)
			return false;
		move.move = 0;
	}
	return true;
}

FIXTURE_VARIANT_ADD(flush, page)
{
	.replace = replace_by_write,
};

FIXTURE_VARIANT_ADD(flush, zero_page)
{
	.replace = replace_by_read,
};

FIXTURE_VARIANT_ADD(flush, huge_page)
{
	.huge = true, .replace = replace_by_write,
};

FIXTURE_VARIANT_ADD(flush, huge_zero_page)
{
	.huge = true, .replace = replace_by_read,
};

FIXTURE_VARIANT_ADD(flush, huge_page_of_file)
{
	.huge = true, .file = true, .replace = replace_by_read,
};

FIXTURE_VARIANT_ADD(flush, huge_page_of_dax)
{
	.huge = true, .dax = true, .replace = replace_by_read,
};

FIXTURE_VARIANT_ADD(flush, huge_hole_of_dax)
{
	.huge = true, .dax = true, .hole = true, .replace = replace_by_read,
};

FIXTURE_VARIANT_ADD(flush, moved_huge_page)
{
	.huge = true, .uffd = true, .replace = replace_by_move,
};

FIXTURE_SETUP(flush)
{
	if (!setting_change(&self->settings, SYSCTL, "2"))
		SKIP(return, "cannot write " SYSCTL);
	if (!setting_change(&self->settings, FLUSH_DELAY, "2000"))
		SKIP(return, "cannot write " FLUSH_DELAY);
	if (sysconf(_SC_NPROCESSORS_ONLN) < 3)
		SKIP(return, "needs three CPUs");
	if (variant->huge &&
	    !setting_change(&self->settings, THP "enabled", "madvise"))
		SKIP(return, "no transparent huge pages");
	if (variant->file &&
	    !setting_change(&self->settings, THP "shmem_enabled", "always"))
		SKIP(return, "no transparent huge pages of files");
	if (variant->dax && !dax_dir())
		SKIP(return, "no file system is mounted with dax");
}

FIXTURE_TEARDOWN_PARENT(flush)
{
	settings_restore(&self->settings);
}

static void *read_page(void *arg)
{
	struct tlb *tlb = arg;

	run_on(1);
	while (!atomic_load(&tlb->stop)) {
		unsigned long replaced = atomic_load(&tlb->replaced), val;

		if (try_access((unsigned long *)tlb->p, &val, false))
			continue;
		if (val && val == replaced)
			atomic_fetch_add(&tlb->stale, 1);
		atomic_store(&tlb->seen, val);
	}
	return NULL;
}

static void *replace_page(void *arg)
{
	struct tlb *tlb = arg;
	struct timespec wait = { };
	unsigned long going;

	run_on(2);
	while (!atomic_load(&tlb->stop)) {
		going = atomic_load(&tlb->going);
		if (going == atomic_load(&tlb->replaced)) {
			sched_yield();
			continue;
		}
		/* The reader may fill the place as well. */
		while (pagemap_get_entry(tlb->pagemap, tlb->p + TABLE - PAGE) &
		       PM_PRESENT && atomic_load(&tlb->gone) != going)
			;
		/* At one time or another before the flush */
		wait.tv_nsec = going % 4 * 500000;
		if (wait.tv_nsec)
			nanosleep(&wait, NULL);
		if (!tlb->replace(tlb))
			atomic_fetch_add(&tlb->failures, 1);
		atomic_store(&tlb->replaced, going);
	}
	return NULL;
}

/* Small pages with this in the first and the last */
static bool fill_ends(struct tlb *tlb, unsigned long value)
{
	static unsigned long page[PAGE / sizeof(value)];
	int i;

	/* In this order: the reader must not get a huge page. */
	madvise(tlb->p, TABLE, MADV_NOHUGEPAGE);
	if (madvise(tlb->p, TABLE, MADV_DONTNEED))
		return false;
	for (i = 0; i < 2; i++) {
		unsigned long *to = (void *)(tlb->p + i * (TABLE - PAGE));
		struct uffdio_copy copy = {
			.dst = (uintptr_t)to, .src = (uintptr_t)page, .len = PAGE,
		};

		if (tlb->uffd < 0) {
			__atomic_store_n(to, value, __ATOMIC_SEQ_CST);
			continue;
		}
		page[0] = value;
		if (ioctl(tlb->uffd, UFFDIO_COPY, &copy))
			return false;
	}
	return true;
}

TEST_F_TIMEOUT(flush, nothing_old_is_seen, 180)
{
	struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	time_t now, end = time(NULL) + RACE_SECONDS;
	struct tlb *tlb = &self->tlb;
	long freed, flushes, rounds = 0, times = 0, stale = 0;
	unsigned long value = 0;	/* of the page, another one each round */
	pthread_t thread[2];
	int fd = -1;
	bool huge;

	tlb->replace = variant->replace;
	tlb->uffd = -1;
	tlb->pagemap = open("/proc/self/pagemap", O_RDONLY);
	ASSERT_GE(tlb->pagemap, 0);
	tlb->p = map_anon(TABLE);
	ASSERT_NE(tlb->p, NULL);
	if (variant->file || variant->dax) {
		fd = variant->dax ? make_dax_file(dax_dir(), TABLE, 0) :
				    make_file(TABLE, 0);
		ASSERT_GE(fd, 0);
		ASSERT_NE(map_at(tlb->p, TABLE, MAP_PRIVATE, fd), NULL);
	}
	if (variant->dax) {
		/* Where small pages have been, there are no huge ones later. */
		ASSERT_EQ(madvise(tlb->p, TABLE, MADV_HUGEPAGE), 0);
		ASSERT_TRUE(replace_by_read(tlb));
	}
	if (variant->uffd) {
		tlb->uffd = uffd_open(UFFD_FEATURE_MOVE | UFFD_FEATURE_SIGBUS);
		if (tlb->uffd < 0)
			SKIP(return, "no UFFDIO_MOVE: %s", strerror(errno));
		tlb->src = map_anon(TABLE);
		ASSERT_NE(tlb->src, NULL);
		ASSERT_EQ(madvise(tlb->src, TABLE, MADV_HUGEPAGE), 0);
		reg.range.start = (uintptr_t)tlb->p;
		reg.range.len = TABLE;
		ASSERT_EQ(ioctl(tlb->uffd, UFFDIO_REGISTER, &reg), 0);
	}
	catch_access_signals();
	run_on(0);
	ASSERT_EQ(pthread_create(&thread[0], NULL, read_page, tlb), 0);
	ASSERT_EQ(pthread_create(&thread[1], NULL, replace_page, tlb), 0);

	do {
		value++;
		ASSERT_TRUE(fill_ends(tlb, value));
		if (tlb->src)
			poke(tlb->src, 0);
		if (variant->hole) {
			/* Nor holes: forget it.  Copies stay. */
			ASSERT_EQ(fallocate(fd, FALLOC_FL_PUNCH_HOLE |
					    FALLOC_FL_KEEP_SIZE, 0, TABLE), 0);
		}
		if (variant->huge)
			ASSERT_EQ(madvise(tlb->p, TABLE, MADV_HUGEPAGE), 0);
		while (atomic_load(&tlb->seen) != value)
			;
		flushes = vmstat_read("pt_reclaim_flush");
		freed = vmstat_read("pt_reclaim_freed");
		atomic_store(&tlb->stale, 0);
		atomic_store(&tlb->going, value);
		ASSERT_EQ(madvise(tlb->p, TABLE, MADV_DONTNEED), 0);
		atomic_store(&tlb->gone, value);
		while (atomic_load(&tlb->replaced) != value ||
		       atomic_load(&tlb->seen) == value)
			sched_yield();
		rounds++;
		/*
		 * Only if the table went.  If it did not, there was no need to
		 * flush before madvise() returns.  Where nobody has been, there
		 * is what a huge page has.
		 */
		huge = pagemap_get_entry(tlb->pagemap, tlb->p + TABLE / 2) &
		       PM_PRESENT;
		if (vmstat_read("pt_reclaim_freed") > freed &&
		    huge == variant->huge) {
			stale += atomic_load(&tlb->stale);
			times += vmstat_read("pt_reclaim_flush") > flushes;
		}
		now = time(NULL);
	} while (now < end || (times < MIN_FLUSHES && now < end + 60));
	atomic_store(&tlb->stop, true);
	pthread_join(thread[0], NULL);
	pthread_join(thread[1], NULL);

	TH_LOG("%ld rounds, %ld of them with a flush, %ld times the old page",
	       rounds, times, stale);
	EXPECT_EQ(stale, 0);
	EXPECT_EQ(atomic_load(&tlb->failures), 0);
	EXPECT_GE(times, MIN_FLUSHES);
	if (fd >= 0)
		close(fd);
	if (tlb->uffd >= 0)
		close(tlb->uffd);
	close(tlb->pagemap);
}

TEST_HARNESS_MAIN
