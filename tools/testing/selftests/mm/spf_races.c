// SPDX-License-Identifier: GPL-2.0
/*
 * Page faults, speculative ones above all, against everything that changes the
 * address space or the pages in it.
 *
 * Some threads, the owners, have a few page tables' worth of anonymous memory
 * between them.  They visit their pages one after the other: give them back,
 * read, write, and look at those of the others.  Main disturbs them, in another
 * way in each variant.  In between it waits for them, by their number of visits
 * and not for a time.
 *
 * The generation is odd while main is changing something.  By it, owners can
 * tell whether all was as it is now since they began.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kernel-page-flags.h>
#include <linux/magic.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
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

#define SYSCTL		"/proc/sys/vm/speculative_page_fault"
#define PT_RECLAIM	"/proc/sys/vm/pt_reclaim"
#define NR_OWNERS	4
#define NR_TABLES	4
#define MAX_PAGES	(NR_TABLES * NR_PAGES)
#define GIB		(1024UL << 20)
#define HOP		131	/* from page to page: tables alternate */
#define SLOT		512	/* for an owner in a page, or for O_DIRECT */
#define HANG_SECONDS	100
#define EXTRA_SECONDS	300	/* until what has to happen has happened */

#define get(x)		__atomic_load_n(&(x), __ATOMIC_SEQ_CST)
#define set(x, to)	__atomic_store_n(&(x), to, __ATOMIC_SEQ_CST)
#define count(x)	__atomic_add_fetch(&(x), 1, __ATOMIC_SEQ_CST)

enum denied { NOTHING, WRITES, ACCESS, NEW_PAGES };

/* What an owner knows about his part of a page */
struct slot {
	unsigned long version;	/* odd while he is at it */
	unsigned long value;	/* what he has written last */
	unsigned long begin;	/* the generation before that, and after */
	unsigned long end;
};

struct race;

struct owner {
	struct race *race;
	pthread_t thread;
	unsigned int nr, seed;
	unsigned long visits;
	unsigned long begun, done;	/* what he writes, and has written */
};

FIXTURE_VARIANT(spf_races)
{
	const char *name;
	const char *needs;		/* for prepare() to succeed */
	bool (*prepare)(struct race *race);
	/* change something and change it back, or only change something */
	bool (*round)(struct race *race);
	bool (*change)(struct race *race);
	/* in place of what owners do */
	void (*visit)(struct owner *owner, unsigned long s);
	/* has main's change worked on a page that was just written? */
	bool (*written)(struct race *race, char *page, bool dropped);
	void (*finish)(struct race *race);
	const char *abort, *event;	/* these have to happen */
	unsigned long align, span, stride;
	unsigned int flags;
	int advice;
};

#define DROPS	1	/* main drops pages, */
#define LAZILY	2	/* some time later; */
#define MOVES	4	/* moves them, */
#define LEAVES	8	/* and leaves something where they were; */
#define DENIES	16	/* denies access */
#define SHARED	32	/* each owner has a slot in each page */
#define SAME	64	/* pages have the same contents */
#define RAW	128	/* pages are not used like that */
#define ALONE	256	/* no owners */
#define NODES	512	/* needs two of them */
#define SWAP	1024	/* needs some */

struct race {
	const FIXTURE_VARIANT(spf_races) *op;
	struct settings *settings;
	unsigned long span, stride;
	unsigned int nr_owners, slots;	/* slots of each owner */
	char *home, *away, *base;	/* base: one of the two */
	unsigned long gen;
	enum denied denied;
	bool start, stop, hung;
	unsigned long rounds, accesses, checks, failures;
	char first[128];		/* of the failures */
	int fd, pagemap, node;
	struct child *child;
	struct owner owner[NR_OWNERS];
	struct slot slot[NR_OWNERS][MAX_PAGES];
};

static struct race the_race;

static bool stable(struct race *race, unsigned long gen)
{
	return !(gen & 1) && get(race->gen) == gen;
}

/* Main does so before and after; denied is what owners must not get then. */
static void change(struct race *race)
{
	count(race->gen);
}

static bool changed(struct race *race, enum denied denied, bool ok)
{
	set(race->denied, denied);
	count(race->gen);
	return ok;
}

static void failed(struct race *race, const char *how, void *p,
		   unsigned long found, unsigned long wanted)
{
	if (count(race->failures) == 1)
		snprintf(race->first, sizeof(race->first),
			 "%s: at %p 0x%lx, not 0x%lx, in generation %lu",
			 how, p, found, wanted, get(race->gen));
}

/* An access that began in this generation: does it get the right signal? */
static int access_slot(struct race *race, unsigned long gen, void *p,
		       unsigned long *x, bool write, bool elsewhere)
{
	int sig = try_access(p, x, write);
	enum denied denied = elsewhere ? ACCESS : get(race->denied);
	bool forbidden = denied == ACCESS || (denied == WRITES && write);
	bool sure = stable(race, gen);

	if (sig && (!(race->op->flags & DENIES) ||
		    (sure && !forbidden && denied != NEW_PAGES)))
		failed(race, "signal", p, sig, 0);
	if (!sig && sure && forbidden)
		failed(race, "no signal", p, *x, 0);
	return sig;
}

static char *page_at(struct race *race, char *base, int owner, unsigned long k)
{
	return base + race->stride *
		(race->op->flags & SHARED ? k : k * NR_OWNERS + owner);
}

/*
 * Anybody may look at any slot, as long as its owner leaves it alone:
 *
 *  - if nothing was dropped since, what has been written has to be there;
 *  - if all was dropped since, there has to be a zero page;
 *  - in between either will do, and nothing else, ever.
 */
static void check(struct race *race, int owner, unsigned long k)
{
	struct slot now, *slot = &race->slot[owner][k];
	unsigned long gen = get(race->gen), x;
	unsigned int flags = race->op->flags;
	char *p;

	now.version = get(slot->version);
	now.value = get(slot->value);
	now.begin = get(slot->begin);
	now.end = get(slot->end);
	p = page_at(race, get(race->base), owner, k) + owner * SLOT;
	if (access_slot(race, gen, p, &x, false, false) || now.version & 1 ||
	    get(slot->version) != now.version ||
	    (flags & LEAVES && !stable(race, gen)))
		return;

	count(race->checks);
	if (x == now.value) {
		/* After the first whole change since? */
		if (x && (flags & (DROPS | LAZILY)) == DROPS &&
		    stable(race, gen) && gen >= ((now.end + 1) & ~1UL) + 2)
			failed(race, "back", p, x, 0);
	} else if (x) {
		failed(race, "wrong", p, x, now.value);
	} else if (!(flags & DROPS) ||
		   (now.begin == gen && stable(race, gen))) {
		failed(race, "lost", p, x, now.value);
	}
}

/* Of slots there is a power of two, so that each has its turn. */
static unsigned long slot_of(struct race *race, unsigned long s)
{
	return s * HOP % race->slots;
}

static void visit(struct owner *owner, unsigned long s)
{
	struct race *race = owner->race;
	unsigned int flags = race->op->flags;
	unsigned long gen = get(race->gen), k = slot_of(race, s);
	unsigned long x, value = flags & SAME ? 1 + s / race->slots / 4 : s;
	struct slot *slot = &race->slot[owner->nr][k];
	/* To each page in each way, some day */
	int how = (s + s / race->slots) % 4, sig;
	bool elsewhere = (flags & (MOVES | LEAVES)) == MOVES && !(s % 16);
	bool dropped = false;
	char *page, *p = get(race->base);

	if (elsewhere)
		p = p == race->home ? race->away : race->home;
	page = page_at(race, p, owner->nr, k);
	p = page + owner->nr * SLOT;

	set(slot->version, slot->version | 1);
	set(owner->begun, s);
	if (how < 2)
		dropped = !madvise(page, PAGE, MADV_DONTNEED);
	count(race->accesses);
	if (!how || (flags & DROPS && how == 3)) {
		sig = access_slot(race, gen, p, &x, false, elsewhere);
		if (!sig && x && dropped &&
		    (!(flags & LEAVES) || stable(race, gen)))
			failed(race, "back", p, x, 0);
		/* If it comes again from now on, something is wrong. */
		if (!sig && !x && flags & LAZILY && slot->begin != gen)
			set(slot->value, 0);
	}
	sig = -1;
	if (how != 3 || !(flags & DROPS))
		sig = access_slot(race, gen, p, &value, true, elsewhere);
	if (!sig || dropped) {
		set(slot->value, sig ? 0 : value);
		set(slot->begin, gen);
		set(slot->end, get(race->gen));
	}
	if (!sig) {
		set(owner->done, s);
		if (race->op->written && stable(race, gen) &&
		    !race->op->written(race, page, dropped) &&
		    stable(race, gen))
			failed(race, "no effect", p, value, value);
	}
	/* This may have been at the old place: nobody can tell. */
	if (!(flags & LEAVES) || stable(race, gen))
		count(slot->version);
}

static void *own(void *arg)
{
	struct owner *owner = arg;
	struct race *race = owner->race;
	unsigned long s;

	while (!get(race->start))
		usleep(1000);
	for (s = 1; !get(race->stop); s++) {
		(race->op->visit ?: visit)(owner, s);
		if (!(race->op->flags & RAW))
			check(race, rand_r(&owner->seed) % NR_OWNERS,
			      rand_r(&owner->seed) % race->slots);
		count(owner->visits);
	}
	return NULL;
}

/* Each of them gets that many visits from now on, or else he hangs. */
static bool let_them(struct race *race, unsigned long visits)
{
	unsigned long until[NR_OWNERS];
	time_t end = time(NULL) + HANG_SECONDS;
	int i;

	for (i = 0; i < race->nr_owners; i++)
		until[i] = get(race->owner[i].visits) + visits;
	for (i = 0; i < race->nr_owners; i++) {
		while (get(race->owner[i].visits) < until[i] && !race->hung) {
			race->hung = time(NULL) > end;
			usleep(100);
		}
	}
	return !race->hung;
}

/* What main does next often begins when a fault has just begun. */
static bool let_some(struct race *race)
{
	bool ok = let_them(race, rand() % 4 ? rand() % 16 : 0);
	unsigned long now = get(race->accesses);
	int i;

	for (i = rand() % 200000; i && get(race->accesses) == now; i--)
		;
	return ok;
}

static bool map_again(struct race *race)
{
	return mmap(race->base, race->span, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
		    -1, 0) == race->base;
}

static bool round_munmap(struct race *race)
{
	bool ok;

	change(race);
	ok = changed(race, ACCESS, !munmap(race->base, race->span));
	let_some(race);
	change(race);
	return changed(race, NOTHING, map_again(race)) && ok;
}

/* If that is all there is to it */
static bool round_change(struct race *race)
{
	change(race);
	return changed(race, NOTHING, race->op->change(race));
}

static bool protect(struct race *race, int prot, enum denied denied)
{
	change(race);
	return changed(race, denied, !mprotect(race->base, race->span, prot)) &&
	       let_some(race);
}

static bool round_mprotect(struct race *race)
{
	return protect(race, PROT_READ, WRITES) &&
	       protect(race, PROT_NONE, ACCESS) &&
	       protect(race, PROT_READ, WRITES) &&
	       protect(race, PROT_READ | PROT_WRITE, NOTHING);
}

static bool round_mremap(struct race *race)
{
	char *from = race->base;
	char *to = from == race->home ? race->away : race->home;
	int flags = MREMAP_MAYMOVE | MREMAP_FIXED;

	if (race->op->flags & LEAVES)
		flags |= MREMAP_DONTUNMAP;
	change(race);
	set(race->base, to);
	return changed(race, NOTHING, mremap(from, race->span, race->span,
					     flags, to) == to);
}

/* What parent and child tell each other */
struct child {
	unsigned long go;
	unsigned long newest[NR_OWNERS];
};

static bool prepare_fork(struct race *race)
{
	race->child = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
			   MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	return race->child != MAP_FAILED;
}

static unsigned long *slot_at(struct race *race, int owner, unsigned long k)
{
	return (unsigned long *)(page_at(race, race->base, owner, k) +
				 owner * SLOT);
}

/*
 * As an owner writes one number after the other, the last of them tells what
 * has to be in each of his slots.  He may have given back the next page.
 */
static bool all_of_one_moment(struct race *race, int owner,
			      unsigned long *newest)
{
	unsigned long j, k, s, x, last = 0;

	for (k = 0; k < race->slots; k++) {
		x = *slot_at(race, owner, k);
		last = x > last ? x : last;
	}
	*newest = last;
	for (j = 0; j < race->slots; j++) {
		s = last - j;
		x = *slot_at(race, owner, slot_of(race, s));
		if (x != (s <= last ? s : 0) && (x || j < race->slots - 1))
			return false;
	}
	return true;
}

static int in_child(struct race *race)
{
	static unsigned long at_fork[NR_OWNERS][MAX_PAGES];
	struct child *child = race->child;
	unsigned long k;
	int i;

	for (i = 0; i < NR_OWNERS; i++) {
		for (k = 0; k < race->slots; k++)
			at_fork[i][k] = *slot_at(race, i, k);
		if (!(race->op->flags & SHARED) &&
		    !all_of_one_moment(race, i, &child->newest[i]))
			return 1;
	}
	while (!get(child->go))
		usleep(1000);
	/* What the parent has written since is not for us, and vice versa. */
	for (i = 0; i < NR_OWNERS; i++) {
		for (k = 0; k < race->slots; k++) {
			if (*slot_at(race, i, k) != at_fork[i][k])
				return 2;
			/* Not to all: what counts is the number of forks. */
			if (k % 8 == 0)
				*slot_at(race, i, k) = -1UL;
		}
	}
	return 0;
}

static bool round_fork(struct race *race)
{
	unsigned long done[NR_OWNERS], begun[NR_OWNERS];
	struct child *child = race->child;
	int i, status;
	pid_t pid;

	memset(child, 0, sizeof(*child));
	for (i = 0; i < NR_OWNERS; i++)
		done[i] = get(race->owner[i].done);
	pid = fork();
	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		_exit(in_child(race));
	}
	for (i = 0; i < NR_OWNERS; i++)
		begun[i] = get(race->owner[i].begun);
	let_some(race);
	set(child->go, 1);
	if (pid < 0 || waitpid(pid, &status, 0) != pid)
		return false;
	if (status)
		failed(race, "child", NULL, status, 0);
	for (i = 0; i < NR_OWNERS && !(race->op->flags & SHARED); i++)
		if (child->newest[i] < done[i] || child->newest[i] > begun[i])
			failed(race, "newest", NULL,
			       child->newest[i], done[i]);
	return true;
}

/*
 * Pages into which a device writes while they are copied.  Half of the owners
 * write to their slots by reading a file past the page cache.
 */
#define NR_BLOCKS	64
#define PIN_VALUE(nr)	(0x5000000000000000UL + (nr))

static bool prepare_pins(struct race *race)
{
	unsigned long *block = aligned_alloc(SLOT, SLOT);
	char path[] = "spf_races.XXXXXX";
	struct statfs fs;
	int i;

	race->fd = mkostemp(path, O_DIRECT);
	unlink(path);
	/* Tmpfs has it, but copies. */
	if (race->fd < 0 || fstatfs(race->fd, &fs) ||
	    fs.f_type == TMPFS_MAGIC || !block)
		return false;
	memset(block, 0, SLOT);
	for (i = 0; i < NR_BLOCKS; i++) {
		block[0] = PIN_VALUE(i);
		if (pwrite(race->fd, block, SLOT, i * SLOT) != SLOT)
			return false;
	}
	free(block);
	return prepare_fork(race);
}

/* After a fork the pages are soon copied: have faults all the time. */
static void have_fault(struct race *race, char *page)
{
	madvise(page, PAGE, MADV_DONTNEED);
	count(race->accesses);
	poke(page, 1);
}

static void visit_pin(struct owner *owner, unsigned long s)
{
	struct race *race = owner->race;
	unsigned long k = slot_of(race, s), x = s;
	struct slot *slot = &race->slot[owner->nr][k];
	unsigned long *p = slot_at(race, owner->nr, k);

	count(slot->version);
	if (owner->nr % 2) {
		x = PIN_VALUE(s % NR_BLOCKS);
		if (pread(race->fd, p, SLOT, s % NR_BLOCKS * SLOT) != SLOT)
			failed(race, "unread", p, errno, 0);
	} else {
		set(*p, x);
	}
	/* There is room behind the page. */
	have_fault(race, page_at(race, race->base, owner->nr, k) +
		   (1 + owner->nr / 2) * PAGE);
	set(slot->value, x);
	count(slot->version);
}

/* Who holds, or waits for, a lock in a page that is copied has to get on. */
static void visit_mutex(struct owner *owner, unsigned long s)
{
	char *table = owner->race->base + s % NR_TABLES * TABLE;
	unsigned long *counter = (unsigned long *)(table + (1 + s % 61) * PAGE);

	pthread_mutex_lock((pthread_mutex_t *)table);
	++*counter;
	pthread_mutex_unlock((pthread_mutex_t *)table);
	have_fault(owner->race, table + (64 + owner->nr) * PAGE);
}

static bool round_mutex(struct race *race)
{
	pid_t pid = fork();

	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		pause();
		_exit(0);
	}
	let_some(race);
	return pid > 0 && !kill(pid, SIGKILL) && waitpid(pid, NULL, 0) == pid;
}

static void finish_mutex(struct race *race)
{
	unsigned long off, counted = 0, visits = 0;
	int i;

	for (off = 0; off < race->span; off += PAGE)
		if (off % TABLE && off % TABLE < 64 * PAGE)
			counted += *(unsigned long *)(race->base + off);
	for (i = 0; i < NR_OWNERS; i++)
		visits += race->owner[i].visits;
	if (counted != visits)
		failed(race, "lost", race->base, counted, visits);
}

static bool advise(struct race *race)
{
	return !madvise(race->base, race->span, race->op->advice);
}

static bool round_free(struct race *race)
{
	bool ok = round_change(race) && let_some(race);

	/* Free them now, but not those that were written since. */
	return ok && !madvise(race->base, race->span, MADV_PAGEOUT);
}

static bool prepare_collapse(struct race *race)
{
	return !madvise(race->base, race->span, MADV_HUGEPAGE);
}

/* It gives up if there are pages that are in use. */
static bool round_collapse(struct race *race)
{
	advise(race);
	return true;
}

static bool prepare_khugepaged(struct race *race)
{
	return prepare_collapse(race) && khugepaged_hurries(race->settings);
}

static bool prepare_ksm(struct race *race)
{
	return advise(race) && ksm_hurries(race->settings);
}

static bool round_migrate(struct race *race)
{
	int i, there = 0;

	for (i = 0; i < NR_TABLES && there >= 0; i++)
		there = move_to_node(race->base + i * TABLE, NR_PAGES,
				     race->rounds % 2 ? 0 : last_node());
	return there >= 0;
}

static bool round_compact(struct race *race)
{
	return file_write("/proc/sys/vm/compact_memory", "1");
}

static void read_pagemap(struct race *race, uint64_t *entries)
{
	memset(entries, 0, MAX_PAGES * sizeof(*entries));
	pread(race->pagemap, entries, MAX_PAGES * sizeof(*entries),
	      (uintptr_t)race->base / PAGE * sizeof(*entries));
}

/* A signal takes the place of the event, so that nobody waits. */
static bool prepare_uffd(struct race *race)
{
	race->fd = uffd_open(UFFD_FEATURE_SIGBUS);
	return race->fd >= 0;
}

static bool round_uffd(struct race *race)
{
	static uint64_t before[MAX_PAGES], after[MAX_PAGES];
	bool ok;
	int i;

	change(race);
	ok = changed(race, NEW_PAGES,
		     !uffd_register(race->fd, race->base, race->span, true,
				    false, false));
	/* Faults that began before will have ended. */
	read_pagemap(race, before);
	let_them(race, 2);
	read_pagemap(race, after);
	for (i = 0; ok && i < MAX_PAGES; i++)
		if (after[i] & PM_PRESENT && !(before[i] & PM_PRESENT))
			failed(race, "filled", race->base + i * PAGE, 1, 0);
	let_some(race);
	change(race);
	ok &= !uffd_unregister(race->fd, race->base, race->span);
	return changed(race, NOTHING, ok);
}

static bool written_uffd(struct race *race, char *page, bool dropped)
{
	return !dropped || get(race->denied) != NEW_PAGES;
}

/* The name of the first, KPF_MLOCKED, is not for user space. */
#define LOCKED_OR_ZERO	(BIT_ULL(33) | BIT_ULL(KPF_ZERO_PAGE))

static bool prepare_mlock(struct race *race)
{
	race->fd = open("/proc/kpageflags", O_RDONLY);
	return race->fd >= 0;
}

/* All pages that are there are locked ones, but for the zero page. */
static bool round_mlock(struct race *race)
{
	static uint64_t before[MAX_PAGES], flags[MAX_PAGES], after[MAX_PAGES];
	int i, how = race->rounds % 2 ? 0 : MLOCK_ONFAULT;

	if (mlock2(race->base, race->span, how) || !let_them(race, 2))
		return false;
	read_pagemap(race, before);
	for (i = 0; i < MAX_PAGES; i++)
		pread(race->fd, &flags[i], 8, PAGEMAP_PFN(before[i]) * 8);
	read_pagemap(race, after);
	for (i = 0; i < MAX_PAGES; i++)
		if (!(after[i] & PM_PRESENT) ? !how : after[i] == before[i] &&
		    !(flags[i] & LOCKED_OR_ZERO))
			failed(race, "not locked", race->base + i * PAGE,
			       flags[i], after[i]);
	let_some(race);
	return !munlock(race->base, race->span);
}

static bool clear_soft_dirty(struct race *race)
{
	return file_write("/proc/self/clear_refs", "4");
}

static bool written_soft_dirty(struct race *race, char *page, bool dropped)
{
	return pagemap_get_entry(race->pagemap, page) & PM_SOFT_DIRTY;
}

static bool prepare_soft_dirty(struct race *race)
{
	poke(race->base, 0);
	return clear_soft_dirty(race) &&
	       !written_soft_dirty(race, race->base, false);
}

static bool bind_to(struct race *race, int node)
{
	change(race);
	set(race->node, node);
	return changed(race, NOTHING,
		       bind_range(race->base, race->span, node, 0));
}

static bool round_mbind(struct race *race)
{
	return bind_to(race, race->rounds % 2 ? 0 : last_node()) &&
	       let_some(race) && bind_to(race, -1);
}

static bool written_mbind(struct race *race, char *page, bool dropped)
{
	int node = get(race->node);

	return !dropped || node < 0 || pages_on_node(page, 1, node) == 1;
}

#define CGROUP		"/sys/fs/cgroup/spf_races"
#define FOOD		(8 * TABLE)

static bool prepare_oom(struct race *race)
{
	file_write("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	mkdir(CGROUP, 0755);
	file_write(CGROUP "/memory.swap.max", "0");
	return file_write(CGROUP "/memory.max", "16777216");
}

static void finish_oom(struct race *race)
{
	rmdir(CGROUP);
}

static void *eat(void *arg)
{
	unsigned long off;

	for (off = 0;; off = (off + PAGE) % FOOD)
		poke((char *)arg + off, 1);
	return NULL;
}

static void oom_child(void)
{
	char *p = map_anon(NR_OWNERS * FOOD);
	pthread_t thread;
	int i;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (!p || !file_write(CGROUP "/cgroup.procs", "0"))
		_exit(1);
	for (i = 0; i < NR_OWNERS; i++)
		if (pthread_create(&thread, NULL, eat, p + i * FOOD))
			_exit(2);
	for (;;)
		pause();
}

/* The reaper is in no hurry, so do what it does. */
static bool round_oom(struct race *race)
{
	time_t end = time(NULL) + HANG_SECONDS;
	int fd, status = 0;
	pid_t pid = fork();

	if (!pid)
		oom_child();
	fd = syscall(__NR_pidfd_open, pid, 0);
	while (!waitpid(pid, &status, WNOHANG) && !race->hung) {
		syscall(__NR_process_mrelease, fd, 0);
		race->hung = time(NULL) > end;
		sched_yield();
	}
	close(fd);
	return WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
}

FIXTURE(spf_races)
{
	struct settings settings;
};

FIXTURE_SETUP(spf_races)
{
	setting_change(&self->settings, SYSCTL, "1");
	setting_change(&self->settings, PT_RECLAIM, "2");
	setting_change(&self->settings, THP "enabled", "madvise");
}

/* By the parent, so that it happens whatever becomes of the test. */
FIXTURE_TEARDOWN_PARENT(spf_races)
{
	settings_restore(&self->settings);
}

#define SEQ		"spf_abort_seq"
#define PMD		"spf_abort_pmd"
#define PTE		"spf_abort_pte"
#define UNSTABLE	"spf_abort_unstable"

#define FIXTURE_RACE(variant, ...)					\
	FIXTURE_VARIANT_ADD(spf_races, variant)				\
	{ .name = #variant, __VA_ARGS__ }

FIXTURE_RACE(munmap, .round = round_munmap, .flags = DROPS | DENIES,
	     .abort = SEQ);
FIXTURE_RACE(map_fixed, .round = round_change, .change = map_again,
	     .flags = DROPS, .abort = SEQ);
FIXTURE_RACE(mprotect, .round = round_mprotect, .flags = DENIES, .abort = SEQ);
FIXTURE_RACE(mremap_tables, .round = round_mremap, .flags = MOVES | DENIES,
	     .abort = SEQ);
FIXTURE_RACE(mremap_pmd_tables, .round = round_mremap, .flags = MOVES | DENIES,
	     .align = GIB, .span = GIB, .stride = GIB / MAX_PAGES,
	     .abort = SEQ);
FIXTURE_RACE(mremap_unaligned, .round = round_mremap, .flags = MOVES | DENIES,
	     .align = PAGE, .abort = SEQ);
FIXTURE_RACE(mremap_dontunmap, .round = round_mremap,
	     .flags = MOVES | LEAVES | DENIES, .abort = SEQ);
FIXTURE_RACE(fork, .needs = "shared memory", .prepare = prepare_fork,
	     .round = round_fork, .abort = SEQ);
FIXTURE_RACE(fork_mutex, .round = round_mutex, .visit = visit_mutex,
	     .finish = finish_mutex, .flags = RAW, .abort = SEQ);
FIXTURE_RACE(pins, .needs = "O_DIRECT in /var/tmp, not on tmpfs",
	     .prepare = prepare_pins, .round = round_fork, .visit = visit_pin,
	     .stride = 4 * PAGE, .flags = SHARED,
	     .event = "nr_foll_pin_acquired", .abort = SEQ);
FIXTURE_RACE(dontneed, .round = round_change, .change = advise,
	     .advice = MADV_DONTNEED, .flags = DROPS, .abort = PMD);
FIXTURE_RACE(free, .round = round_free, .change = advise, .advice = MADV_FREE,
	     .flags = DROPS | LAZILY, .event = "pglazyfreed", .abort = PTE);
FIXTURE_RACE(collapse, .needs = "transparent huge pages",
	     .prepare = prepare_collapse, .round = round_collapse,
	     .advice = MADV_COLLAPSE, .event = "thp_collapse_alloc",
	     .abort = SEQ);
FIXTURE_RACE(khugepaged, .needs = "khugepaged", .prepare = prepare_khugepaged,
	     .round = let_some, .event = "thp_collapse_alloc", .abort = SEQ);
/* What KSM write-protects is copied speculatively, too: nothing has to abort. */
FIXTURE_RACE(ksm, .needs = "KSM", .prepare = prepare_ksm, .round = let_some,
	     .advice = MADV_MERGEABLE, .flags = SAME, .event = "cow_ksm");
FIXTURE_RACE(migrate, .round = round_migrate, .flags = NODES,
	     .event = "pgmigrate_success", .abort = PTE);
FIXTURE_RACE(compact, .needs = "/proc/sys/vm/compact_memory",
	     .prepare = round_compact, .round = round_compact,
	     .event = "pgmigrate_success", .abort = PTE);
FIXTURE_RACE(pageout, .round = advise, .advice = MADV_PAGEOUT, .flags = SWAP,
	     .event = "pswpout", .abort = PTE);
FIXTURE_RACE(uffd, .needs = "userfaultfd with UFFD_FEATURE_SIGBUS",
	     .prepare = prepare_uffd, .round = round_uffd,
	     .written = written_uffd, .flags = DENIES, .abort = SEQ);
FIXTURE_RACE(mlock, .needs = "/proc/kpageflags", .prepare = prepare_mlock,
	     .round = round_mlock, .abort = SEQ);
FIXTURE_RACE(soft_dirty, .needs = "soft-dirty bits",
	     .prepare = prepare_soft_dirty, .round = round_change,
	     .change = clear_soft_dirty, .written = written_soft_dirty,
	     .abort = SEQ);
FIXTURE_RACE(mbind, .round = round_mbind, .written = written_mbind,
	     .abort = SEQ);
FIXTURE_RACE(oom_reaper, .needs = "a cgroup with memory.max",
	     .prepare = prepare_oom, .round = round_oom, .finish = finish_oom,
	     .flags = ALONE, .event = "oom_kill", .abort = UNSTABLE);

static bool race_setup(struct race *race)
{
	unsigned long align = race->op->align ?: TABLE, room;

	race->span = race->op->span ?: NR_TABLES * TABLE;
	race->stride = race->op->stride ?: PAGE;
	race->slots = race->span / race->stride;
	if (!(race->op->flags & SHARED))
		race->slots /= NR_OWNERS;
	race->nr_owners = race->op->flags & ALONE ? 0 : NR_OWNERS;
	race->node = -1;
	/* If aligned to pages only, the two are at odds with each other. */
	room = race->span + 2 * align;
	race->home = reserve_aligned(2 * room, align);
	race->away = race->home + room;
	race->base = race->home;
	race->pagemap = open("/proc/self/pagemap", O_RDONLY);
	catch_access_signals();
	return race->home && map_again(race) && race->pagemap >= 0;
}

static bool race_start(struct race *race)
{
	int i;

	for (i = 0; i < race->nr_owners; i++) {
		struct owner *owner = &race->owner[i];

		owner->race = race;
		owner->nr = i;
		owner->seed = i;
		if (pthread_create(&owner->thread, NULL, own, owner))
			return false;
	}
	return true;
}

/* Returns the number of visits. */
static unsigned long race_stop(struct race *race)
{
	unsigned long visits = 0, k;
	int i;

	set(race->stop, true);
	for (i = 0; i < race->nr_owners; i++) {
		pthread_join(race->owner[i].thread, NULL);
		visits += race->owner[i].visits;
	}
	for (i = 0; i < race->nr_owners; i++)
		for (k = 0; k < race->slots && !(race->op->flags & RAW); k++)
			check(race, i, k);
	return visits;
}

static long event_count(const char *name)
{
	return name ? vmstat_read(name) : 0;
}

TEST_F_TIMEOUT(spf_races, race, 600)
{
	const char *seconds = getenv("SPF_RACE_SECONDS");
	bool spf = vmstat_read("spf_attempt") >= 0, ok, happened;
	const char *wanted = spf ? variant->abort : NULL;
	const char *event = variant->event;
	struct race *race = &the_race;
	struct vmstat_events each = { .prefix = "spf_" };
	long aborts, events, rss, tables;
	unsigned long visits;
	time_t end;

	if (spf && switch_get(SYSCTL) != 1)
		SKIP(return, "needs root");
	/* Nobody else unlinks page tables. */
	if (wanted && !strcmp(wanted, PMD) && switch_get(PT_RECLAIM) < 1)
		wanted = NULL;
	race->settings = &self->settings;
	race->op = variant;
	ASSERT_TRUE(race_setup(race));
	if (variant->flags & NODES && !last_node())
		SKIP(return, "needs two NUMA nodes");
	if (variant->flags & SWAP && !swap_is_on())
		SKIP(return, "needs swap");
	if (variant->prepare && !variant->prepare(race))
		SKIP(return, "needs %s", variant->needs);
	ASSERT_TRUE(race_start(race));

	rss = field_read("/proc/self/status", "RssAnon:");
	tables = vm_pte();
	aborts = event_count(wanted);
	events = event_count(event);
	vmstat_events_begin(&each);

	set(race->start, true);
	end = time(NULL) + (seconds ? atoi(seconds) : 2);
	do {
		ok = variant->round(race) && let_some(race);
		race->rounds++;
		happened = (!wanted || event_count(wanted) > aborts) &&
			   (!event || event_count(event) > events);
	} while (ok && (time(NULL) < end ||
			(!happened && time(NULL) < end + EXTRA_SECONDS)));
	ASSERT_FALSE(race->hung);
	visits = race_stop(race);
	if (variant->finish)
		variant->finish(race);

	vmstat_events_end(&each);
	TH_LOG("%s: %lu rounds, %lu visits, %lu checks, %ld %s, %s",
	       variant->name, race->rounds, visits, race->checks,
	       event_count(event) - events, event ?: "other events",
	       spf ? each.text : "nothing to count");
	EXPECT_TRUE(ok);
	EXPECT_TRUE(happened);
	EXPECT_EQ(race->failures, 0) {
		TH_LOG("the first: %s", race->first);
	}

	EXPECT_TRUE(rmap_finds_all(race->base, race->span, race->stride));

	/* But for stacks and heap that have grown. */
	munmap(race->home, race->span);
	munmap(race->away, race->span);
	EXPECT_LE(field_read("/proc/self/status", "RssAnon:"), rss + 512);
	EXPECT_LE(vm_pte(), tables + 16);
}

TEST_HARNESS_MAIN
