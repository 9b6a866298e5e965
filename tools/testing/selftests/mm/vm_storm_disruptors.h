/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the storm does to memory while others access it.
 *
 * An operation returns 0 or an error.  Those that keep the contents take no
 * lock; they may meet holes that others make.  What an operation does depends
 * on its random numbers only.
 */
#ifndef _SELFTESTS_MM_VM_STORM_DISRUPTORS_H
#define _SELFTESTS_MM_VM_STORM_DISRUPTORS_H

#include <errno.h>
#include <linux/fs.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "vm_storm_oracle.h"

static struct disruptor {
	struct rng rng;
	struct look looks[REGION_PAGES];
	uint32_t next[REGION_PAGES];
	uint32_t begun[REGION_PAGES];
	uint64_t seen[REGION_PAGES][2];
} disruptors[NR_DISRUPTORS];

struct range {
	struct region *r;
	int from;
	int nr;
	char *p;		/* where it was when this was filled in */
	size_t len;
};

/* What there is in this kernel, on this machine */
static bool have_swap, have_nodes, have_policies, have_thp, have_ksm;
static bool have_compaction, have_monitor, have_uffd, have_cgroup;
static int node_last, uffd = -1;

#define STORM_CGROUP	"/sys/fs/cgroup/vm_storm"
#define SMALL_CGROUP	"/sys/fs/cgroup/vm_storm_small"
#define COMPACT		"/proc/sys/vm/compact_memory"

static int result(long ret)
{
	return ret < 0 ? errno : 0;
}

static void locate(struct range *g)
{
	g->p = page_at(g->r, g->from, get(g->r->slot[g->from / PIECE]));
	g->len = g->nr * PAGE;
}

/* Some of a region: all, whole tables, many pages or few. */
static struct range some(struct disruptor *d, int flags)
{
	struct range g;
	int how, end;

	do {
		g.r = &regions[below(&d->rng, NR_REGIONS)];
	} while ((g.r->flags & flags) != flags);

	how = below(&d->rng, 4);
	g.from = how ? below(&d->rng, g.r->nr) : 0;
	end = how ? g.from + 1 + below(&d->rng, how > 2 ? 16 : g.r->nr / 2) :
		    g.r->nr;
	if (how == 1) {
		/* Regions begin at a table, or in the middle of one. */
		g.from -= ((uintptr_t)g.r->home / PAGE + g.from) % NR_PAGES;
		end = g.from + (1 + below(&d->rng, 3)) * NR_PAGES;
	}
	g.from = g.from < 0 ? 0 : g.from;
	g.nr = (end < g.r->nr ? end : g.r->nr) - g.from;
	locate(&g);
	return g;
}

/*
 * What of *g is in one place, from the first page on, and in one table if asked
 * for; *g keeps the rest.  Only those who have the lock know the place of a
 * region that moves.
 */
static bool next_run(struct range *g, struct range *run, bool tables)
{
	int end = (g->from / PIECE + 1) * PIECE, last = g->from + g->nr;

	if (!g->nr)
		return false;
	while (end < last && !(tables && end / PIECE % 2) &&
	       g->r->slot[end / PIECE] == g->r->slot[g->from / PIECE])
		end += PIECE;
	*run = *g;
	run->nr = (end < last ? end : last) - g->from;
	locate(run);
	g->from += run->nr;
	g->nr -= run->nr;
	return true;
}

/* Wherever that is by now; in pieces, because each stops at a hole. */
static void everywhere(const struct range *g, void (*fn)(char *p, size_t len))
{
	int page, slot;

	for (page = g->from; page < g->from + g->nr; page += PIECE) {
		int nr = g->from + g->nr - page;

		for (slot = 0; slot < NR_SLOTS; slot++)
			fn(page_at(g->r, page, slot),
			   (nr < PIECE ? nr : PIECE) * PAGE);
	}
}

/*
 * Kept contents: these need no lock.
 */

static int advise(struct disruptor *d, int advice)
{
	struct range g = some(d, 0);

	return result(madvise(g.p, g.len, advice));
}

/* Whole regions, or else there would be more and more VMAs */
static int advise_region(struct disruptor *d, int advice)
{
	struct region *r = some(d, 0).r;
	bool undo = below(&d->rng, 2);

	if (undo && advice == MADV_HUGEPAGE)
		advice = MADV_NOHUGEPAGE;
	else if (undo && advice == MADV_MERGEABLE)
		advice = MADV_UNMERGEABLE;
	return result(madvise(page_at(r, 0, get(r->slot[0])), r->nr * PAGE,
			      advice));
}

/* One table after the other, since one that fails is enough for an error */
static int collapse(struct disruptor *d, int unused)
{
	struct region *r = some(d, 0).r;
	char *p = page_at(r, 0, get(r->slot[0]));
	char *end = p + r->nr * PAGE;
	int err = 0, done = 0;

	p += -(uintptr_t)p & (TABLE - 1);
	for (; p + TABLE <= end; p += TABLE) {
		if (madvise(p, TABLE, MADV_COLLAPSE))
			err = errno;
		else
			done++;
	}
	return done ? 0 : err;
}

static void undo_mlock(char *p, size_t len)
{
	munlock(p, len);
}

static int lock_memory(struct disruptor *d, int flags)
{
	struct range g = some(d, 0);
	int err = result(mlock2(g.p, g.len, flags));

	usleep(below(&d->rng, 3000));
	everywhere(&g, undo_mlock);
	return err;
}

static void undo_mbind(char *p, size_t len)
{
	syscall(__NR_mbind, p, len, MPOL_DEFAULT, NULL, 0, 0);
}

static int bind_memory(struct disruptor *d, int mode)
{
	struct range g = some(d, 0);
	unsigned long mask = 1UL << (below(&d->rng, 2) ? node_last : 0);
	int err = result(syscall(__NR_mbind, g.p, g.len, mode, &mask,
				 8 * sizeof(mask),
				 below(&d->rng, 2) ? MPOL_MF_MOVE : 0));

	usleep(below(&d->rng, 3000));
	everywhere(&g, undo_mbind);
	return err;
}

static int migrate(struct disruptor *d, int unused)
{
	struct range g = some(d, 0);

	return result(move_to_node(g.p, g.nr < NR_PAGES ? g.nr : NR_PAGES,
				   below(&d->rng, 2) ? node_last : 0));
}

static int compact(struct disruptor *d, int unused)
{
	return file_write(COMPACT, "1") ? 0 : EIO;
}

static int clear_bits(struct disruptor *d, int unused)
{
	/* Mostly the soft-dirty bits, sometimes those for accessed */
	return file_write("/proc/self/clear_refs",
			  below(&d->rng, 3) ? "4" : "1") ? 0 : EIO;
}

static int scan(struct disruptor *d, int unused)
{
	struct range g = some(d, 0);
	struct page_region regs[32];
	struct pm_scan_arg arg = {
		.size = sizeof(arg),
		.start = (uintptr_t)g.p,
		.end = (uintptr_t)g.p + g.len,
		.vec = (uintptr_t)regs,
		.vec_len = ARRAY_SIZE(regs),
		.category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
		.return_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
	};
	int fd = open("/proc/self/pagemap", O_RDONLY);
	int err = result(pread(fd, d->seen, g.nr * 8, arg.start / PAGE * 8));

	ioctl(fd, PAGEMAP_SCAN, &arg);
	mincore(g.p, g.len, (unsigned char *)d->seen);
	close(fd);
	return err;
}

static int read_all(struct disruptor *d, int unused)
{
	static const char * const paths[] = {
		"/proc/self/smaps", "/proc/self/smaps_rollup",
		"/proc/self/numa_maps",
	};
	int fd = open(paths[below(&d->rng, have_policies ? 3 : 2)], O_RDONLY);
	char buf[4096];
	long n;

	do {
		n = read(fd, buf, sizeof(buf));
	} while (n > 0);
	close(fd);
	return result(n);
}

/*
 * Short of memory
 */

static int limit(struct disruptor *d, int unused)
{
	static const char * const paths[] = {
		STORM_CGROUP "/memory.high", STORM_CGROUP "/memory.max",
		STORM_CGROUP "/memory.reclaim",
	};
	/* Who is much above memory.high has to wait for long. */
	static const int part[] = { 15, 12, 2 };
	long now = file_number(STORM_CGROUP "/memory.current") / 16;
	/* Without swap there is nothing to reclaim. */
	int how = have_swap ? below(&d->rng, 3) : 0;
	char buf[32];
	bool ok;

	snprintf(buf, sizeof(buf), "%ld", part[how] * now);
	add(storm->limits_begun, 1);
	ok = file_write(paths[how], buf);
	if (how < 2)
		file_write(paths[how], "max");
	add(storm->limits_ended, 1);
	/* It may get less than it asks for. */
	return ok || how == 2 ? 0 : EIO;
}

#define SMALL		(12UL << 20)
#define NR_HOGS		3

/* Until it is killed: nobody may see what the OOM reaper leaves. */
static void *hog(void *arg)
{
	unsigned long i, j, nr = 2 * SMALL / PAGE, back = 1;
	uint64_t *p = arg;

	for (i = 0; i < nr; i++) {
		set(p[i * 512], i + 1);
		back = back * 5 + 1;
		j = back % (i + 1);
		if (get(p[j * 512]) != j + 1)
			mismatch("lost when out of memory", regions, 0, 0,
				 j + 1, NULL, get(p[j * 512]));
	}
	return NULL;
}

static void be_hog(void)
{
	pthread_t thread;
	char *p;
	int i;

	alarm(60);
	p = mmap(NULL, NR_HOGS * 2 * SMALL, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p == MAP_FAILED || !file_write("/proc/self/oom_score_adj", "1000") ||
	    !file_write(SMALL_CGROUP "/cgroup.procs", "0"))
		return;
	/* Most of them by speculative faults */
	madvise(p, NR_HOGS * 2 * SMALL, MADV_NOHUGEPAGE);
	for (i = 1; i < NR_HOGS; i++)
		pthread_create(&thread, NULL, hog, p + i * 2 * SMALL);
	hog(p);
}

static int out_of_memory(struct disruptor *d, int unused)
{
	int status;
	pid_t pid = fork();

	if (!pid) {
		become_child();
		be_hog();
		_exit(1);
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid)
		return errno;
	return WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL ? 0 : ENOMSG;
}

static void look_at_all(struct disruptor *d, const struct range *g)
{
	int i;

	for (i = g->from; i < g->from + g->nr; i++) {
		look_at(g->r, i, &d->looks[i]);
		d->begun[i] = get(page_state(g->r, i)->begun);
	}
}

static void judge_word(struct disruptor *d, struct region *r, int page,
		       int word, uint64_t value)
{
	const char *what = judge(r, page, value, &d->looks[page],
				 d->next[page], d->begun[page]);

	if (what)
		mismatch(what, r, page, word, value, &d->looks[page], 0);
	d->seen[page][word] = value;
}

/* Is it the same as last time?  It may have been freed in the meantime. */
static void see_again(struct disruptor *d, struct region *r, int page,
		      int word, uint64_t value, const char *what)
{
	if (value == d->seen[page][word])
		return;
	if (value || !(r->flags & DROPS))
		mismatch(what, r, page, word, value, &d->looks[page],
			 d->seen[page][word]);
	d->seen[page][word] = value;
}

/*
 * A child of fork() has what was there then.  What it writes, the parent must
 * not see.  It has no one who makes its pages accessible again.
 */
static void be_child(struct disruptor *d, const struct range *g)
{
	static const int advice[] = { MADV_COLD, MADV_PAGEOUT, MADV_COLLAPSE };
	int how = below(&d->rng, 3), i, n;
	struct region *r = g->r;
	uint64_t value;

	for (i = g->from; i < g->from + g->nr; i++) {
		d->next[i] = get(page_state(r, i)->next);
		d->begun[i] = get(page_state(r, i)->begun);
	}
	for (n = 0; n < 2 * g->nr; n++) {
		i = g->from + n / 2;
		d->seen[i][n % 2] = 0;
		if (access_page(r, i, n % 2, &value, false))
			judge_word(d, r, i, n % 2, value);
		if (i % 3 != how)
			continue;
		value = value_of(r, i, 1) | CHILD_MARK;
		if (access_page(r, i, n % 2, &value, true))
			d->seen[i][n % 2] = value;
	}
	usleep(below(&d->rng, 3000));
	madvise(g->p, g->len, advice[how]);
	for (n = 0; n < 2 * g->nr; n++) {
		i = g->from + n / 2;
		if (access_page(r, i, n % 2, &value, false))
			see_again(d, r, i, n % 2, value, "changed");
	}
	madvise(g->p, g->len, MADV_DONTNEED);
}

static int fork_child(struct disruptor *d, int unused)
{
	struct range g = some(d, 0);
	int status;
	pid_t pid;

	look_at_all(d, &g);
	pid = fork();
	if (!pid) {
		become_child();
		be_child(d, &g);
		_exit(0);
	}
	if (pid < 0 || waitpid(pid, &status, 0) != pid)
		return errno;
	if (status)
		add(storm->child_died, 1);
	return 0;
}

/*
 * From here on with the lock of the region.
 */

/* Does not give up: without it the region cannot be accessed any more. */
static void insist(bool (*fn)(char *p, size_t len), const struct range *g)
{
	while (!fn(g->p, g->len))
		usleep(1000);
}

static bool unprotect(char *p, size_t len)
{
	return !mprotect(p, len, PROT_READ | PROT_WRITE);
}

/* Nobody writes once mprotect() has returned, or accesses it at all. */
static void check_protected(struct disruptor *d, const struct range *g,
			    int prot)
{
	int slot = g->r->slot[g->from / PIECE], i, n;
	bool may = prot != PROT_NONE;
	int nr = may ? 2 * (g->nr < 64 ? g->nr : 64) : 1;
	uint64_t value = 0;

	for (n = 0; n < nr; n++) {
		i = g->from + n / 2;
		if (access_word(word_at(g->r, i, n % 2, slot), &value, false) !=
		    may)
			mismatch("wrong rights", g->r, i, n % 2, prot, NULL, 0);
		d->seen[i][n % 2] = value;
	}
	usleep(below(&d->rng, 2000));
	for (n = 0; may && n < nr; n++) {
		i = g->from + n / 2;
		if (access_word(word_at(g->r, i, n % 2, slot), &value, false))
			see_again(d, g->r, i, n % 2, value,
				  "changed though protected");
	}
}

static int protect(struct disruptor *d, int prot)
{
	struct range g = some(d, 0), rest = g, run;
	int err = 0;

	pthread_mutex_lock(&g.r->lock);
	add(g.r->holes_begun, 1);
	while (!err && next_run(&rest, &run, false)) {
		err = result(mprotect(run.p, run.len, prot));
		if (!err)
			check_protected(d, &run, prot);
	}
	while (next_run(&g, &run, false))
		insist(unprotect, &run);
	add(g.r->holes_ended, 1);
	pthread_mutex_unlock(&g.r->lock);
	return err;
}

/* It begins in the middle of a table, and goes in tables and halves of them. */
static int move_region(struct disruptor *d, int tables)
{
	struct range g = some(d, MOVES), run;
	int i, to = below(&d->rng, NR_SLOTS);
	int err = 0;

	g.nr += g.from % PIECE + PIECE - 1;
	g.nr -= g.nr % PIECE;
	g.from -= g.from % PIECE;

	pthread_mutex_lock(&g.r->lock);
	add(g.r->holes_begun, 1);
	while (next_run(&g, &run, tables)) {
		if (run.r->slot[run.from / PIECE] == to)
			continue;
		if (mremap(run.p, run.len, run.len,
			   MREMAP_MAYMOVE | MREMAP_FIXED,
			   page_at(run.r, run.from, to)) == MAP_FAILED) {
			err = errno;
			continue;
		}
		for (i = run.from; i < run.from + run.nr; i += PIECE)
			set(run.r->slot[i / PIECE], to);
	}
	add(g.r->holes_ended, 1);
	pthread_mutex_unlock(&g.r->lock);
	return err;
}

/*
 * The pages go elsewhere, where they must all be, and nobody else writes to
 * them any more.
 */
static int move_pages_only(struct disruptor *d, int slot)
{
	struct range g = some(d, DROPS);
	char *to = page_at(g.r, g.from, slot);
	int i, n, err;
	uint64_t value;

	pthread_mutex_lock(&g.r->lock);
	look_at_all(d, &g);
	drop_begin(g.r, g.from, g.nr);
	err = mremap(g.p, g.len, g.len, MREMAP_MAYMOVE | MREMAP_FIXED |
		     MREMAP_DONTUNMAP, to) == MAP_FAILED ? errno : 0;
	drop_end(g.r, g.from, g.nr, !err);
	if (err)
		goto out;
	for (n = 0; n < 2 * g.nr; n++) {
		i = g.from + n / 2;
		d->next[i] = get(page_state(g.r, i)->next);
		value = CHILD_MARK;
		access_word(word_at(g.r, i, n % 2, slot), &value, false);
		judge_word(d, g.r, i, n % 2, value);
	}
	usleep(below(&d->rng, 2000));
	for (n = 0; n < 2 * g.nr; n++) {
		i = g.from + n / 2;
		if (access_word(word_at(g.r, i, n % 2, slot), &value, false))
			see_again(d, g.r, i, n % 2, value,
				  "changed after it was moved");
	}
	while (munmap(to, g.len))
		usleep(1000);
out:
	pthread_mutex_unlock(&g.r->lock);
	return err;
}

static bool map_again(char *p, size_t len)
{
	return mmap(p, len, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
		    -1, 0) == p;
}

/* With a hole in between, or without; but if it fails there may be one. */
static int map_new(struct disruptor *d, int hole)
{
	struct range g = some(d, DROPS);
	bool gone = true;
	int err = 0;

	pthread_mutex_lock(&g.r->lock);
	add(g.r->holes_begun, hole);
	drop_begin(g.r, g.from, g.nr);
	if (hole) {
		err = result(munmap(g.p, g.len));
		gone = !err;
		usleep(below(&d->rng, 200));
	}
	if (gone && !map_again(g.p, g.len)) {
		err = errno;
		add(g.r->holes_begun, 1);
		insist(map_again, &g);
		add(g.r->holes_ended, 1);
	}
	drop_end(g.r, g.from, g.nr, gone);
	add(g.r->holes_ended, hole);
	pthread_mutex_unlock(&g.r->lock);
	return err;
}

static int drop_range(const struct range *g, int advice)
{
	int err;

	drop_begin(g->r, g->from, g->nr);
	err = result(madvise(g->p, g->len, advice));
	drop_end(g->r, g->from, g->nr, !err && advice != MADV_FREE);
	return err;
}

static int drop(struct disruptor *d, int advice)
{
	struct range g = some(d, DROPS);
	int err;

	pthread_mutex_lock(&g.r->lock);
	err = drop_range(&g, advice);
	pthread_mutex_unlock(&g.r->lock);
	return err;
}

static bool disarm(char *p, size_t len)
{
	struct uffdio_range range = { .start = (uintptr_t)p, .len = len };

	return !ioctl(uffd, UFFDIO_UNREGISTER, &range);
}

/* Once it is registered, each page that is dropped is filled by serve(). */
static int userfault(struct disruptor *d, int unused)
{
	struct uffdio_register reg = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	struct range part, all = some(d, FILLS);
	static uint32_t last_armed;
	int i, j, err;

	all.from = 0;
	all.nr = all.r->nr;
	pthread_mutex_lock(&all.r->lock);
	locate(&all);
	reg.range.start = (uintptr_t)all.p;
	reg.range.len = all.len;
	err = result(ioctl(uffd, UFFDIO_REGISTER, &reg));
	if (!err)
		set(all.r->armed, ++last_armed);
	for (i = 0; !err && i < 4; i++) {
		part = some(d, FILLS);
		if (!drop_range(&part, MADV_DONTNEED))
			for (j = part.from; j < part.from + part.nr; j++)
				set(page_state(part.r, j)->armed, last_armed);
		usleep(below(&d->rng, 4000));
	}
	set(all.r->armed, 0);
	/* If there was an error, some of it may be registered. */
	insist(disarm, &all);
	pthread_mutex_unlock(&all.r->lock);
	return err;
}

static bool serve_stop;
static long filled;

/* The thread that fills pages which are missing */
static void *serve(void)
{
	static uint64_t page[PAGE / 8];
	struct pollfd pfd = { .fd = uffd, .events = POLLIN };
	struct uffd_msg msg;
	int i;

	for (i = 0; i < (int)ARRAY_SIZE(page); i++)
		page[i] = FILL_VALUE;
	while (!get(serve_stop)) {
		struct uffdio_copy copy = { .len = PAGE };
		struct uffdio_range range = { .len = PAGE };

		if (poll(&pfd, 1, 20) != 1 ||
		    read(uffd, &msg, sizeof(msg)) != sizeof(msg) ||
		    msg.event != UFFD_EVENT_PAGEFAULT)
			continue;
		range.start = msg.arg.pagefault.address & ~(PAGE - 1);
		copy.dst = range.start;
		copy.src = (uintptr_t)page;
		/* If that fails, they fault again. */
		if (ioctl(uffd, UFFDIO_COPY, &copy))
			ioctl(uffd, UFFDIO_WAKE, &range);
		else
			filled++;
	}
	return NULL;
}

static const struct op {
	const char *name;
	int (*run)(struct disruptor *d, int arg);
	int arg;
	int weight;		/* how often, of all */
	const bool *can;
	const char *why;	/* if it cannot */
	bool strict;		/* does not fail for lack of memory */
} ops[] = {
	{ "munmap", map_new, true, 3, .strict = true },
	{ "MAP_FIXED", map_new, false, 3, .strict = true },
	{ "MADV_DONTNEED", drop, MADV_DONTNEED, 4, .strict = true },
	{ "MADV_DONTNEED_LOCKED", drop, MADV_DONTNEED_LOCKED, 1 },
	{ "MADV_FREE", drop, MADV_FREE, 2, .strict = true },
	{ "mremap", move_region, false, 3, .strict = true },
	{ "mremap by tables", move_region, true, 3, .strict = true },
	{ "MREMAP_DONTUNMAP", move_pages_only, 1, 2, .strict = true },
	{ "MREMAP_DONTUNMAP, unaligned", move_pages_only, 2, 1,
	  .strict = true },
	{ "PROT_READ", protect, PROT_READ, 3, .strict = true },
	{ "PROT_NONE", protect, PROT_NONE, 1, .strict = true },
	{ "userfaultfd", userfault, 0, 3, &have_uffd, "no userfaultfd" },
	{ "fork", fork_child, 0, 3, .strict = true },
	{ "MADV_COLD", advise, MADV_COLD, 1 },
	{ "MADV_PAGEOUT", advise, MADV_PAGEOUT, 3, &have_swap, "no swap" },
	{ "MADV_COLLAPSE", collapse, 0, 3, &have_thp, "no THP" },
	{ "MADV_HUGEPAGE", advise_region, MADV_HUGEPAGE, 2, &have_thp,
	  "no THP" },
	{ "MADV_MERGEABLE", advise_region, MADV_MERGEABLE, 2, &have_ksm,
	  "no KSM" },
	{ "MADV_POPULATE_READ", advise, MADV_POPULATE_READ, 1 },
	{ "MADV_POPULATE_WRITE", advise, MADV_POPULATE_WRITE, 1 },
	{ "mlock", lock_memory, 0, 1 },
	{ "MLOCK_ONFAULT", lock_memory, MLOCK_ONFAULT, 1 },
	{ "MPOL_BIND", bind_memory, MPOL_BIND, 1, &have_policies, "no NUMA" },
	{ "MPOL_INTERLEAVE", bind_memory, MPOL_INTERLEAVE, 1, &have_policies,
	  "no NUMA" },
	{ "move_pages", migrate, 0, 2, &have_nodes, "one node only" },
	{ "compaction", compact, 0, 1, &have_compaction, "no compaction" },
	{ "clear_refs", clear_bits, 0, 2, &have_monitor, "no clear_refs" },
	{ "pagemap", scan, 0, 1, &have_monitor, "no pagemap" },
	{ "smaps", read_all, 0, 1, &have_monitor, "no smaps" },
	{ "memory limit", limit, 0, 1, &have_cgroup, "no cgroup" },
	{ "out of memory", out_of_memory, 0, 1, &have_cgroup, "no cgroup" },
};

#define NR_OPS		((int)ARRAY_SIZE(ops))
#define MAX_DECK	64

/*
 * Each has its turn: the operations of a thread are like cards that are
 * shuffled, played, and shuffled again.
 */
static int new_deck(int thread, unsigned long nr, unsigned char *deck)
{
	struct rng rng = rng_of(1000 + thread, nr);
	int i, j, n = 0;

	for (i = 0; i < NR_OPS; i++)
		for (j = 0; j < ops[i].weight; j++)
			deck[n++] = i;
	for (i = n - 1; i > 0; i--) {
		unsigned char card = deck[i];

		j = below(&rng, i + 1);
		deck[i] = deck[j];
		deck[j] = card;
	}
	return n;
}

static void run_op(struct disruptor *d, int nr)
{
	struct op_count *count = &storm->ops[nr];
	uint32_t ended = get(storm->limits_ended);
	const struct op *op = &ops[nr];
	struct timespec from, to;
	int err;

	if (op->can && !*op->can)
		return;
	clock_gettime(CLOCK_MONOTONIC, &from);
	err = op->run(d, op->arg);
	clock_gettime(CLOCK_MONOTONIC, &to);
	add(count->ms, (to.tv_sec - from.tv_sec) * 1000 +
	    (to.tv_nsec - from.tv_nsec) / 1000000);
	if (!err) {
		add(count->done, 1);
		return;
	}
	add(count->failed, 1);
	set(count->error, err);
	/* Page tables are charged, too, so a limit may stop anything. */
	if (op->strict && err == ENOMEM && !storm->errors_allowed &&
	    get(storm->limits_begun) == ended)
		add(count->unexpected, 1);
}

static void *disrupt(int thread)
{
	struct disruptor *d = &disruptors[thread];
	unsigned char deck[MAX_DECK];
	int nr_cards = 0;
	unsigned long i;

	for (i = 0; !get(storm->stop); i++) {
		if (!nr_cards || !(i % nr_cards))
			nr_cards = new_deck(thread, i, deck);
		d->rng = rng_of(2000 + thread, i);
		run_op(d, deck[i % nr_cards]);
	}
	return NULL;
}

#endif /* _SELFTESTS_MM_VM_STORM_DISRUPTORS_H */
