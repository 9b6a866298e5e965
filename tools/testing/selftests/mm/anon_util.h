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
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

#endif /* _SELFTESTS_MM_ANON_UTIL_H */
