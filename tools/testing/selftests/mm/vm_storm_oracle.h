/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the pages of the storm may contain.
 *
 * A page has one thread that writes to it.  Two words of it get the number of
 * the write, and of the page.  Any thread may read them, without a lock.  What
 * it may find follows from the state of the page, which is in memory that the
 * storm leaves alone:
 *
 *  - the last write that had ended before the read began, or one that has begun
 *    since
 *  - zero, if some operation that drops pages ended after that write had begun,
 *    and began before the read ended
 *  - but no write that ended before such an operation began, which ended before
 *    the read began.
 *
 * Who drops pages steps the counts of each page before and after; that, and what
 * makes pages inaccessible, is serialized for each region by a lock that those
 * who read and write do not take.
 */
#ifndef _SELFTESTS_MM_VM_STORM_ORACLE_H
#define _SELFTESTS_MM_VM_STORM_ORACLE_H

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#include "anon_util.h"

#define NR_OWNERS	8
#define NR_DISRUPTORS	6
#define NR_OPS_MAX	40

/* What may happen to a region, beside all that keeps its contents */
#define DROPS		1	/* its pages go */
#define MOVES		2	/* it is moved to another address */
#define SAME		4	/* pages have the same contents, for KSM */
#define FILLS		8	/* userfaultfd fills missing pages */

/* Where a region may be: at home, some whole tables away, some pages more. */
#define NR_SLOTS	3
/* It is moved in pieces of this size, so that tables are moved in part, too. */
#define PIECE		(NR_PAGES / 2)

struct region {
	const char *name;
	int flags;
	int nr;			/* pages */
	int first;		/* number of the first of them */
	char *home;
	pthread_mutex_t lock;	/* of those who drop, move, protect */
	uint32_t holes_begun;	/* times that some of it was inaccessible */
	uint32_t holes_ended;
	uint32_t armed;		/* time for which userfaultfd has had it */
	uint8_t slot[16];	/* where each piece is */
};

/*
 * One after the other, with neighbours that share page tables: those that begin
 * or end in the middle of one.
 */
static struct region regions[] = {
	{ .name = "kept", .nr = 4 * NR_PAGES },
	{ .name = "dropped", .flags = DROPS, .nr = 7 * PIECE },
	{ .name = "moved", .flags = MOVES, .nr = 8 * PIECE },
	{ .name = "dropped too", .flags = DROPS, .nr = 9 * PIECE },
	{ .name = "filled", .flags = DROPS | FILLS, .nr = 2 * NR_PAGES },
	{ .name = "same", .flags = SAME, .nr = 2 * NR_PAGES },
};

#define NR_REGIONS	((int)ARRAY_SIZE(regions))
#define REGION_PAGES	(9 * PIECE)		/* of the largest */
#define ALL_PAGES	(20 * NR_PAGES)		/* of all */
#define SLOT_SIZE	((ALL_PAGES + 2 * NR_PAGES) * PAGE)
#define ODD_PAGES	37

struct page_state {
	uint32_t next;		/* the last write that has begun */
	uint32_t cur;		/* the last write that has ended */
	uint32_t fin;		/* drops that had ended when it began */
	uint32_t beg;		/* drops that had begun when it ended */
	uint32_t begun;		/* drops that have begun */
	uint32_t ended;		/* drops that have ended */
	uint32_t forced;	/* the last that ended and left nothing */
	uint32_t armed;		/* dropped while userfaultfd had it */
	uint32_t gone[2];	/* the write that was seen to be gone */
};

/* What is looked at before a page is read */
struct look {
	uint32_t forced;
	uint32_t cur;
	uint32_t fin;
	uint32_t beg;
	uint32_t armed;
	uint32_t gone[2];
	bool still;		/* nobody was writing */
};

struct mismatch {
	const char *what;
	const char *region;
	struct look look;
	uint64_t value;
	uint64_t again;
	uint32_t next;
	uint32_t begun;
	int page;
	int word;
	int cpu;
	bool child;
};

#define MISMATCHES_SHOWN	8

struct op_count {
	long done;
	long failed;
	long ms;		/* that all of them took */
	long unexpected;	/* failed for no reason */
	int error;		/* of the last that failed */
};

#define NR_THREADS	(NR_OWNERS + NR_DISRUPTORS + 1)
#define SIGNAL_STACK	(16 << 10)

/* Shared with children */
static struct storm {
	struct page_state pages[ALL_PAGES];
	struct op_count ops[NR_OPS_MAX];
	long mismatches;
	long signals;
	long child_died;
	struct mismatch first[MISMATCHES_SHOWN];
	uint32_t limits_begun;	/* times that the cgroup was short of memory */
	uint32_t limits_ended;
	bool stop;
	bool errors_allowed;
	uint64_t seed;
	char signal_stacks[NR_THREADS][SIGNAL_STACK];
} *storm;

static bool in_child;

/*
 * Who gets a signal must have a page for it.  fork() takes those of an ordinary
 * stack away until they are copied, and allocations may be made to fail.
 */
static void use_signal_stack(char *p)
{
	stack_t stack = { .ss_sp = p, .ss_size = SIGNAL_STACK };

	sigaltstack(&stack, NULL);
}

static void become_child(void)
{
	static char signal_stack[SIGNAL_STACK];

	in_child = true;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	memset(signal_stack, 1, SIGNAL_STACK);
	use_signal_stack(signal_stack);
}

#define get(x)		__atomic_load_n(&(x), __ATOMIC_SEQ_CST)
#define set(x, val)	__atomic_store_n(&(x), val, __ATOMIC_SEQ_CST)
#define add(x, val)	__atomic_fetch_add(&(x), val, __ATOMIC_SEQ_CST)

/* Numbers that depend on nothing else than where they begin */
struct rng {
	uint64_t state;
};

static inline uint64_t mix(uint64_t x)
{
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
	x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
	return x ^ (x >> 31);
}

static inline struct rng rng_of(uint64_t thread, uint64_t op)
{
	struct rng rng;

	rng.state = mix(mix(storm->seed + thread) + op);
	return rng;
}

static inline int below(struct rng *rng, int n)
{
	rng->state += 0x9e3779b97f4a7c15;
	return (mix(rng->state) >> 33) % n;
}

static inline char *page_at(struct region *r, int page, int slot)
{
	return r->home + page * PAGE + slot * SLOT_SIZE +
	       (slot == 2) * ODD_PAGES * PAGE;
}

static inline struct page_state *page_state(struct region *r, int page)
{
	return &storm->pages[r->first + page];
}

/* A different place in each page, so that no page is taken for another */
static inline uint64_t *word_at(struct region *r, int page, int word, int slot)
{
	int at = r->flags & SAME ? 0 : (page * 7) % 256;

	return (uint64_t *)page_at(r, page, slot) + at + word * 256;
}

#define FILL_VALUE	0xf111f111f111f111
#define CHILD_MARK	0x80000000ULL

static inline uint64_t value_of(struct region *r, int page, uint32_t write)
{
	if (!write)
		return 0;
	if (r->flags & SAME)
		return 0x5a3e00 + write % 4;
	return (uint64_t)write << 32 | 0x600d << 16 | (r->first + page);
}

static void mismatch(const char *what, struct region *r, int page, int word,
		     uint64_t value, const struct look *look, uint64_t again)
{
	struct page_state *s = page_state(r, page);
	long nr = add(storm->mismatches, 1);

	if (nr >= MISMATCHES_SHOWN)
		return;
	storm->first[nr] = (struct mismatch){
		.region = r->name,
		.page = page,
		.word = word,
		.value = value,
		.again = again,
		.next = get(s->next),
		.begun = get(s->begun),
		.cpu = sched_getcpu(),
		.child = in_child,
	};
	if (look)
		storm->first[nr].look = *look;
	set(storm->first[nr].what, what);
}

static __thread sigjmp_buf segv_jmp;
static __thread int segv_expected;

static void on_segv(int sig)
{
	if (get(segv_expected))
		siglongjmp(segv_jmp, 1);
	signal(sig, SIG_DFL);
}

/* False if it gets a signal */
static bool access_word(uint64_t *p, uint64_t *value, bool write)
{
	if (sigsetjmp(segv_jmp, 0)) {
		set(segv_expected, 0);
		return false;
	}
	set(segv_expected, 1);
	if (write)
		set(*p, *value);
	else
		*value = get(*p);
	set(segv_expected, 0);
	return true;
}

/*
 * Wherever the page is.  It gets a signal only if someone has moved, unmapped or
 * protected some of the region.
 */
static bool access_page(struct region *r, int page, int word, uint64_t *value,
			bool write)
{
	int nr = r->flags & MOVES ? NR_SLOTS : 1;
	time_t end = 0;

	for (;;) {
		uint32_t ended = get(r->holes_ended);
		int first = get(r->slot[page / PIECE]);
		int i;

		for (i = 0; i < nr; i++) {
			if (access_word(word_at(r, page, word,
						(first + i) % nr),
					value, write))
				return true;
		}
		if (in_child)
			return false;
		add(storm->signals, 1);
		/* Some know only afterwards that they have left a hole. */
		if (get(r->holes_begun) == ended) {
			pthread_mutex_lock(&r->lock);
			pthread_mutex_unlock(&r->lock);
		}
		if (get(r->holes_begun) == ended) {
			mismatch("signal", r, page, word, 0, NULL, write);
			return false;
		}
		if (!end)
			end = time(NULL) + 120;
		if (time(NULL) > end) {
			mismatch("inaccessible", r, page, word, 0, NULL, write);
			return false;
		}
		usleep(100);
	}
}

static void look_at(struct region *r, int page, struct look *look)
{
	struct page_state *s = page_state(r, page);

	look->armed = get(s->armed);
	if (look->armed != get(r->armed))
		look->armed = 0;
	look->gone[0] = get(s->gone[0]);
	look->gone[1] = get(s->gone[1]);
	look->forced = get(s->forced);
	look->cur = get(s->cur);
	look->fin = get(s->fin);
	look->beg = get(s->beg);
	look->still = get(s->next) == look->cur;
}

/* Is there anything wrong with what was found, next and begun read since? */
static const char *judge(struct region *r, int page, uint64_t value,
			 const struct look *look, uint32_t next, uint32_t begun)
{
	uint32_t write;

	if (!value || (r->flags & FILLS && value == FILL_VALUE)) {
		if (!look->still || !look->cur || begun > look->fin)
			return NULL;
		return "lost";
	}
	/* Not before the first, which is nothing. */
	for (write = look->cur ?: 1; write <= next; write++)
		if (value_of(r, page, write) == value)
			break;
	if (write > next)
		return "wrong";
	if (write == look->cur && look->still && look->forced > look->beg)
		return "back again";
	return NULL;
}

/* Any thread of the storm may do that. */
static void check_page(struct region *r, int page)
{
	struct page_state *s = page_state(r, page);
	uint64_t value, again;
	struct look look;
	const char *what;
	int word;

	for (word = 0; word < 2; word++) {
		look_at(r, page, &look);
		if (!access_page(r, page, word, &value, false))
			continue;
		what = judge(r, page, value, &look, get(s->next),
			     get(s->begun));
		/* Pages that a drop has left missing are filled. */
		if (!value && look.armed && look.armed == get(r->armed))
			what = "not filled";
		if (!what && look.still) {
			/* MADV_FREE takes a page later, but only once. */
			if (!value && get(s->next) == look.cur)
				set(s->gone[word], look.cur);
			else if (value && look.cur &&
				 value == value_of(r, page, look.cur) &&
				 look.gone[word] == look.cur)
				what = "back again after zero";
		}
		if (what) {
			again = 0;
			access_page(r, page, word, &again, false);
			mismatch(what, r, page, word, value, &look, again);
		}
	}
}

/* Only its owner may do that. */
static void write_page(struct region *r, int page)
{
	struct page_state *s = page_state(r, page);
	uint32_t write = s->cur + 1;
	uint64_t value = value_of(r, page, write);
	int word;

	set(s->next, write);
	set(s->fin, get(s->ended));
	for (word = 0; word < 2; word++)
		access_page(r, page, word, &value, true);
	set(s->beg, get(s->begun));
	set(s->cur, write);
}

/* The rest is for those who hold the lock. */
static void drop_begin(struct region *r, int from, int nr)
{
	int i;

	for (i = from; i < from + nr; i++)
		add(page_state(r, i)->begun, 1);
}

static void drop_end(struct region *r, int from, int nr, bool forced)
{
	int i;

	for (i = from; i < from + nr; i++) {
		struct page_state *s = page_state(r, i);

		if (forced)
			set(s->forced, s->begun);
		add(s->ended, 1);
	}
}

static void print_mismatches(void)
{
	const struct mismatch *m;
	long i;

	ksft_print_msg("%ld mismatches\n", storm->mismatches);
	for (i = 0; i < storm->mismatches && i < MISMATCHES_SHOWN; i++) {
		m = &storm->first[i];
		ksft_print_msg("%s%s: %s, page %d.%d, %#lx, again %#lx, CPU %d\n",
			       m->child ? "in a child: " : "", m->what,
			       m->region, m->page, m->word, m->value, m->again,
			       m->cpu);
		ksft_print_msg("  writes: %u ended, %u begun%s\n", m->look.cur,
			       m->next, m->look.still ? "" : ", one going on");
		ksft_print_msg("  drops: %u to %u around it, %u begun, %u forced, armed %u\n",
			       m->look.fin, m->look.beg, m->begun,
			       m->look.forced, m->look.armed);
	}
}

#endif /* _SELFTESTS_MM_VM_STORM_ORACLE_H */
