/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What tests of anonymous memory share: mappings of whole page tables, what the
 * kernel says about them, NUMA nodes, and settings that are put back.
 */
#ifndef _SELFTESTS_MM_ANON_UTIL_H
#define _SELFTESTS_MM_ANON_UTIL_H

#include <errno.h>
#include <fcntl.h>
#include <linux/mempolicy.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE		4096UL
#define TABLE		(2UL << 20)
#define NR_PAGES	512

/* Headers of the system may be older. */
#ifndef MADV_COLD
#define MADV_COLD 20
#endif
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

/* Accesses that the compiler leaves alone. */
static inline void poke(char *p, char what)
{
	__atomic_store_n(p, what, __ATOMIC_RELAXED);
}

static inline char peek(const char *p)
{
	return __atomic_load_n(p, __ATOMIC_RELAXED);
}

static inline void write_pages(char *p, int nr, char what)
{
	int i;

	for (i = 0; i < nr; i++)
		poke(p + i * PAGE, what);
}

/* Those of them that have it */
static inline int count_pages(const char *p, int nr, char what)
{
	int i, found = 0;

	for (i = 0; i < nr; i++)
		found += peek(p + i * PAGE) == what;
	return found;
}

static __thread sigjmp_buf access_jmp;
static __thread bool in_access;

static inline void on_access_signal(int sig)
{
	if (__atomic_load_n(&in_access, __ATOMIC_SEQ_CST))
		siglongjmp(access_jmp, sig);
	signal(sig, SIG_DFL);
}

/* From now on try_access() returns the signals of bad accesses. */
static inline void catch_access_signals(void)
{
	struct sigaction sa = {
		.sa_handler = on_access_signal, .sa_flags = SA_NODEFER
	};

	sigaction(SIGSEGV, &sa, NULL);
	sigaction(SIGBUS, &sa, NULL);
}

/* The signal that an access gets, or 0; in any number of threads at once */
static inline int try_access(unsigned long *p, unsigned long *val, bool write)
{
	int sig = sigsetjmp(access_jmp, 0);

	if (!sig) {
		__atomic_store_n(&in_access, true, __ATOMIC_SEQ_CST);
		if (write)
			__atomic_store_n(p, *val, __ATOMIC_SEQ_CST);
		else
			*val = __atomic_load_n(p, __ATOMIC_SEQ_CST);
	}
	__atomic_store_n(&in_access, false, __ATOMIC_SEQ_CST);
	return sig;
}

/* Address space, aligned to align, with nothing mapped around it. */
static inline char *reserve_aligned(unsigned long size, unsigned long align)
{
	char *p = mmap(NULL, size + 2 * align, PROT_NONE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		return NULL;
	return (char *)(((uintptr_t)p + align) & ~(align - 1));
}

/* The same for some page tables. */
static inline char *reserve(unsigned long size)
{
	return reserve_aligned(size, TABLE);
}

/* Small pages at this address. */
static inline char *map_at(char *at, unsigned long size, int flags, int fd)
{
	char *p = mmap(at, size, PROT_READ | PROT_WRITE,
		       flags | MAP_FIXED | MAP_NORESERVE, fd, 0);

	if (p == MAP_FAILED)
		return NULL;
	if (madvise(p, size, MADV_NOHUGEPAGE) && errno != EINVAL)
		return NULL;
	return p;
}

static inline char *map_anon(unsigned long size)
{
	char *p = reserve(size);

	return p ? map_at(p, size, MAP_PRIVATE | MAP_ANONYMOUS, -1) : NULL;
}

/* One page table's worth. */
static inline char *map_table(void)
{
	return map_anon(TABLE);
}

/*
 * Give its pages back and keep the page table, which is not reclaimed if it is
 * covered in part only.
 */
static inline int drop_pages(char *p)
{
	return madvise(p, TABLE / 2, MADV_DONTNEED) ||
	       madvise(p + TABLE / 2, TABLE / 2, MADV_DONTNEED);
}

/* The same with a page table and an anon_vma, but no pages. */
static inline char *map_ready(void)
{
	char *p = map_table();

	if (!p)
		return NULL;
	poke(p, 1);
	return drop_pages(p) ? NULL : p;
}

/* The number behind a name, which begins a line; -1 if there is none. */
static inline long field_read(const char *path, const char *name)
{
	FILE *f = fopen(path, "r");
	char line[256], key[64];
	long val, found = -1;

	if (!f)
		return -1;
	while (found < 0 && fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%63s %ld", key, &val) == 2 &&
		    !strcmp(key, name))
			found = val;
	}
	fclose(f);
	return found;
}

/* The same in kB, of the mapping at p; name is as in smaps, with the colon. */
static inline long smaps_read(const char *p, const char *name)
{
	FILE *f = fopen("/proc/self/smaps", "r");
	unsigned long start, end;
	char line[512], key[64];
	long val, found = -1;
	bool here = false;

	if (!f)
		return -1;
	while (found < 0 && fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
			here = start <= (uintptr_t)p && (uintptr_t)p < end;
		else if (here && sscanf(line, "%63s %ld", key, &val) == 2 &&
			 !strcmp(key, name))
			found = val;
	}
	fclose(f);
	return found;
}

/* Page tables of this process in kB. */
static inline long vm_pte(void)
{
	return field_read("/proc/self/status", "VmPTE:");
}

static inline bool file_write(const char *path, const char *what)
{
	int fd = open(path, O_WRONLY);
	bool ok;

	if (fd < 0)
		return false;
	ok = write(fd, what, strlen(what)) == (ssize_t)strlen(what);
	close(fd);
	return ok;
}

/* The line in a file, or the word in it that is in brackets. */
static inline bool setting_read(const char *path, char *buf, int size)
{
	FILE *f = fopen(path, "r");
	char *from;
	bool ok;

	if (!f)
		return false;
	ok = fgets(buf, size, f);
	fclose(f);
	if (!ok)
		return false;
	from = strchr(buf, '[');
	if (from) {
		from++;
		memmove(buf, from, strlen(from) + 1);
	}
	buf[strcspn(buf, from ? "]" : "\n")] = '\0';
	return true;
}

/* The number that a file begins with; -1 if there is none. */
static inline long file_number(const char *path)
{
	char buf[64];

	return setting_read(path, buf, sizeof(buf)) ? atol(buf) : -1;
}

/* What a test has changed, and has to put back. */
#define MAX_SETTINGS	16

struct settings {
	int nr;
	struct {
		char path[128];
		char was[128];
	} one[MAX_SETTINGS];
};

static inline bool setting_change(struct settings *all, const char *path,
				  const char *to)
{
	int i = all->nr;

	if (i == MAX_SETTINGS ||
	    !setting_read(path, all->one[i].was, sizeof(all->one[i].was)) ||
	    !file_write(path, to))
		return false;
	snprintf(all->one[i].path, sizeof(all->one[i].path), "%s", path);
	all->nr++;
	return true;
}

static inline void settings_restore(struct settings *all)
{
	while (all->nr) {
		all->nr--;
		file_write(all->one[all->nr].path, all->one[all->nr].was);
	}
}

static inline bool run_on(int cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	return !sched_setaffinity(0, sizeof(set), &set);
}

#define TRACING	"/sys/kernel/tracing/"

/* Have the events of a tracepoint, "SYSTEM/EVENT", in an empty trace. */
static inline bool trace_begin(struct settings *settings, const char *event)
{
	char path[128];
	int fd;

	snprintf(path, sizeof(path), TRACING "events/%s/enable", event);
	if (!setting_change(settings, path, "1"))
		return false;
	fd = open(TRACING "trace", O_WRONLY | O_TRUNC);
	close(fd);
	return fd >= 0;
}

static inline bool trace_shows(const char *event)
{
	FILE *f = fopen(TRACING "trace", "r");
	bool shows = false;
	char line[256];

	if (!f)
		return false;
	while (!shows && fgets(line, sizeof(line), f))
		shows = strstr(line, event);
	fclose(f);
	return shows;
}

static inline bool swap_is_on(void)
{
	FILE *f = fopen("/proc/swaps", "r");
	char line[256];
	int lines = 0;

	if (!f)
		return false;
	while (fgets(line, sizeof(line), f))
		lines++;
	fclose(f);
	return lines > 1;
}

#define KSM	"/sys/kernel/mm/ksm/"

/* Have ksmd do nothing but merge pages. */
static inline bool ksm_hurries(struct settings *settings)
{
	setting_change(settings, KSM "sleep_millisecs", "0");
	setting_change(settings, KSM "pages_to_scan", "1000");
	setting_change(settings, KSM "smart_scan", "0");
	return setting_change(settings, KSM "run", "1");
}

#define THP	"/sys/kernel/mm/transparent_hugepage/"

/* The same for khugepaged, where MADV_HUGEPAGE asks for it */
static inline bool khugepaged_hurries(struct settings *settings)
{
	setting_change(settings, THP "khugepaged/scan_sleep_millisecs", "0");
	setting_change(settings, THP "khugepaged/alloc_sleep_millisecs", "0");
	setting_change(settings, THP "khugepaged/pages_to_scan", "4096");
	setting_change(settings, THP "khugepaged/max_ptes_none", "511");
	return setting_change(settings, THP "enabled", "madvise");
}

/* With UFFD_FEATURE_SIGBUS there is a signal where there would be an event. */
static inline int uffd_open(unsigned long features)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	int fd = syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd >= 0 && ioctl(fd, UFFDIO_API, &api)) {
		close(fd);
		return -1;
	}
	return fd;
}

/* The last of the nodes that have memory: 0 if there is one only. */
static inline int last_node(void)
{
	char buf[128], *last;

	if (!setting_read("/sys/devices/system/node/has_memory", buf, sizeof(buf)))
		return 0;
	last = strpbrk(buf, "-,");
	while (last && strpbrk(last + 1, "-,"))
		last = strpbrk(last + 1, "-,");
	return last ? atoi(last + 1) : 0;
}

static inline int __move_pages(char *p, int nr, const int *nodes, int node)
{
	void *pages[NR_PAGES];
	int status[NR_PAGES];
	int i, there = 0;

	for (i = 0; i < nr; i++)
		pages[i] = p + i * PAGE;
	if (syscall(__NR_move_pages, 0, nr, pages, nodes, status,
		    MPOL_MF_MOVE) < 0)
		return -1;
	for (i = 0; i < nr; i++)
		there += status[i] == node;
	return there;
}

/* How many of these pages are on this node? */
static inline int pages_on_node(char *p, int nr, int node)
{
	return __move_pages(p, nr, NULL, node);
}

/* Move them there first. */
static inline int move_to_node(char *p, int nr, int node)
{
	int nodes[NR_PAGES], i;

	for (i = 0; i < nr; i++)
		nodes[i] = node;
	return __move_pages(p, nr, nodes, node);
}

/* Where pages of this range are to be; -1: anywhere */
static inline bool bind_range(char *p, unsigned long size, int node, int flags)
{
	unsigned long nodes = node < 0 ? 0 : 1UL << node;

	return !syscall(__NR_mbind, p, size,
			node < 0 ? MPOL_DEFAULT : MPOL_BIND,
			node < 0 ? NULL : &nodes, node < 0 ? 0 : 64, flags);
}

/* Move all pages there; some may be in use, or on their way to the LRU. */
static inline bool moves_all(char *p, unsigned long size, int node)
{
	bool ok = false;
	int tries;

	for (tries = 0; tries < 50 && !ok; tries++) {
		if (tries)
			usleep(20000);
		ok = bind_range(p, size, node, MPOL_MF_MOVE | MPOL_MF_STRICT);
	}
	return ok && bind_range(p, size, -1, 0);
}

static inline bool swaps_all(char *p, unsigned long size)
{
	int fd = open("/proc/self/pagemap", O_RDONLY), tries, i, there = 1;
	uint64_t entries[NR_PAGES];
	unsigned long off;

	for (tries = 0; tries < 50 && there; tries++) {
		if (tries)
			usleep(20000);
		file_write("/proc/sys/vm/compact_memory", "1");
		madvise(p, size, MADV_PAGEOUT);
		there = 0;
		for (off = 0; off < size; off += NR_PAGES * PAGE) {
			memset(entries, -1, sizeof(entries));
			pread(fd, entries, sizeof(entries),
			      (uintptr_t)(p + off) / PAGE * 8);
			for (i = 0; i < NR_PAGES; i++)
				there += entries[i] >> 63;
		}
	}
	close(fd);
	return !there;
}

/*
 * Write to a page every stride bytes.  Do those who look for them by rmap find
 * all of them, and is what was written there afterwards?
 */
static inline bool rmap_finds_all(char *p, unsigned long size,
				  unsigned long stride)
{
	unsigned long off;
	bool ok = true;

	for (off = 0; off < size; off += stride)
		*(unsigned long *)(p + off) = off + 1;
	if (last_node())
		ok = moves_all(p, size, last_node()) && moves_all(p, size, 0);
	if (swap_is_on())
		ok &= swaps_all(p, size);
	for (off = 0; off < size; off += stride)
		ok &= *(unsigned long *)(p + off) == off + 1;
	return ok;
}

#endif /* _SELFTESTS_MM_ANON_UTIL_H */
