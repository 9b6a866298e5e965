// SPDX-License-Identifier: GPL-2.0
/*
 * Everything that races with page faults at once: threads that write to memory
 * and know what they have to find there, while others do to it whatever can be
 * done to memory.
 *
 * The operations of each thread follow from the seed and its number, so that a
 * run can be repeated, except for who is faster.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <getopt.h>
#include <malloc.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "../kselftest.h"
#include "anon_util.h"
#include "vm_storm_oracle.h"
#include "vm_storm_disruptors.h"
#include "vm_util.h"
#include "vmstat_sysctl.h"

#define SPF_SYSCTL	"/proc/sys/vm/speculative_page_fault"
#define RECLAIM_SYSCTL	"/proc/sys/vm/pt_reclaim"

static struct settings settings;
static char *arena;
static long checks, writes;

/* What is counted in /proc/vmstat */
#define MAX_COUNTERS	32

struct counters {
	int nr;
	struct {
		char name[48];
		long val;
	} one[MAX_COUNTERS];
};

static void read_counters(struct counters *c)
{
	FILE *f = fopen("/proc/vmstat", "r");
	char line[128];

	c->nr = 0;
	while (f && c->nr < MAX_COUNTERS && fgets(line, sizeof(line), f)) {
		if (strncmp(line, "spf_", 4) && strncmp(line, "pt_reclaim_", 11))
			continue;
		if (sscanf(line, "%47s %ld", c->one[c->nr].name,
			   &c->one[c->nr].val) == 2)
			c->nr++;
	}
	if (f)
		fclose(f);
}

/* The sum of all whose names begin like that */
static long counted(const struct counters *c, const char *prefix)
{
	long sum = 0;
	int i;

	for (i = 0; i < c->nr; i++)
		if (!strncmp(c->one[i].name, prefix, strlen(prefix)))
			sum += c->one[i].val;
	return sum;
}

static void *own(int thread)
{
	unsigned long i, nr_checks = 0, nr_writes = 0;

	for (i = 0; !get(storm->stop); i++) {
		struct rng rng = rng_of(thread, i);
		struct region *r = &regions[below(&rng, NR_REGIONS)];
		bool write = below(&rng, 3);
		int page, end;

		page = below(&rng, r->nr);
		end = page + 1 + below(&rng, 128);
		for (; page < end && page < r->nr && !get(storm->stop); page++) {
			if (write && page % NR_OWNERS == thread) {
				write_page(r, page);
				nr_writes++;
			}
			check_page(r, page);
			nr_checks++;
		}
	}
	add(checks, nr_checks);
	add(writes, nr_writes);
	return NULL;
}

static void for_all_pages(void (*fn)(struct region *r, int page))
{
	struct region *r;
	int page;

	for (r = regions; r < regions + NR_REGIONS; r++)
		for (page = 0; page < r->nr; page++)
			fn(r, page);
}

/* Those of the kernel, for which the storm only provides */
static struct settings daemons;

static const struct daemon {
	const char *name;
	const char *rounds;
	const char *effect;
	const char *what;
} all_daemons[] = {
	{ "ksmd", KSM "full_scans", KSM "pages_sharing",
	  "pages are shared at the end" },
	{ "khugepaged", THP "khugepaged/full_scans",
	  THP "khugepaged/pages_collapsed", "huge pages since boot" },
};

#define NR_DAEMONS	((int)ARRAY_SIZE(all_daemons))

static long rounds_before[NR_DAEMONS];

/* They leave some of the CPUs to others. */
static void start_daemons(void)
{
	int i;

	ksm_hurries(&daemons);
	file_write(KSM "sleep_millisecs", "100");
	khugepaged_hurries(&daemons);
	file_write(THP "khugepaged/scan_sleep_millisecs", "50");
	for (i = 0; i < NR_DAEMONS; i++)
		rounds_before[i] = file_number(all_daemons[i].rounds);
}

/* The stacks of the threads are there from the beginning. */
#define STACK_SIZE	(128 << 10)

static char stacks[NR_THREADS][STACK_SIZE];
static pthread_t threads[NR_THREADS];

static void *run_thread(void *arg)
{
	int nr = (intptr_t)arg;

	/* They never wait, others do much more at a time. */
	if (nr < NR_OWNERS)
		setpriority(PRIO_PROCESS, 0, 5);
	use_signal_stack(storm->signal_stacks[nr]);
	if (storm->errors_allowed)
		file_write("/proc/thread-self/make-it-fail", "1");
	if (nr < NR_OWNERS)
		return own(nr);
	return nr < NR_OWNERS + NR_DISRUPTORS ? disrupt(nr - NR_OWNERS) :
						serve();
}

static long rounds_of(int daemon)
{
	return file_number(all_daemons[daemon].rounds) - rounds_before[daemon];
}

static bool all_had_their_turn(void)
{
	bool all = true;
	int i;

	for (i = 0; i < NR_OPS; i++)
		all &= get(storm->ops[i].done) || (ops[i].can && !*ops[i].can);
	for (i = 0; i < NR_DAEMONS; i++)
		all &= rounds_before[i] < 0 || rounds_of(i) > 0;
	return all;
}

static void run_storm(long seconds)
{
	int nr = NR_THREADS - !have_uffd;
	pthread_attr_t attr;
	int i;

	for (i = 0; i < nr; i++) {
		pthread_attr_init(&attr);
		pthread_attr_setstack(&attr, stacks[i], STACK_SIZE);
		errno = pthread_create(&threads[i], &attr, run_thread,
				       (void *)(intptr_t)i);
		if (errno)
			ksft_exit_fail_perror("pthread_create");
	}

	/* Longer on slow machines */
	for (i = 0; i < seconds || (i < 3 * seconds && !all_had_their_turn());
	     i++)
		sleep(1);

	/* Disruptors need the last one until the end. */
	set(storm->stop, true);
	for (i = 0; i < nr; i++) {
		if (i == NR_OWNERS + NR_DISRUPTORS)
			set(serve_stop, true);
		pthread_join(threads[i], NULL);
	}
}

#define ARENA_SIZE	(NR_SLOTS * SLOT_SIZE + 2 * TABLE)

static void map_regions(void)
{
	struct region *r;
	int first = 0;

	arena = mmap(NULL, ARENA_SIZE, PROT_NONE,
		     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (arena == MAP_FAILED)
		ksft_exit_fail_perror("mmap");
	for (r = regions; r < regions + NR_REGIONS; r++) {
		r->first = first;
		r->home = arena + (-(uintptr_t)arena & (TABLE - 1)) +
			  first * PAGE;
		pthread_mutex_init(&r->lock, NULL);
		if (!map_again(r->home, r->nr * PAGE))
			ksft_exit_fail_perror("mmap");
		first += r->nr;
	}
}

/* The cgroup that this process comes from */
static char cgroup_before[256];

static bool enter_cgroup(void)
{
	char buf[200];

	if (!setting_read("/proc/self/cgroup", buf, sizeof(buf)) ||
	    strncmp(buf, "0::", 3))
		return false;
	snprintf(cgroup_before, sizeof(cgroup_before),
		 "/sys/fs/cgroup%s/cgroup.procs", buf + 3);
	file_write("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
	snprintf(buf, sizeof(buf), "%lu", SMALL);
	mkdir(STORM_CGROUP, 0755);
	mkdir(SMALL_CGROUP, 0755);
	file_write(SMALL_CGROUP "/memory.swap.max", "0");
	return file_write(SMALL_CGROUP "/memory.max", buf) &&
	       file_write(STORM_CGROUP "/memory.max", "max") &&
	       file_write(STORM_CGROUP "/cgroup.procs", "0") &&
	       /* It may be short of memory, but is not killed for that. */
	       file_write("/proc/self/oom_score_adj", "-1000");
}

static void leave_cgroup(void)
{
	int i;

	if (!cgroup_before[0])
		return;
	file_write(cgroup_before, "0");
	for (i = 0; i < 50 && rmdir(STORM_CGROUP) && errno == EBUSY; i++)
		usleep(100000);
	for (i = 0; i < 50 && rmdir(SMALL_CGROUP) && errno == EBUSY; i++)
		usleep(100000);
}

static void look_around(void)
{
	uffd = uffd_open(0);
	have_uffd = uffd >= 0;
	node_last = last_node();
	have_nodes = node_last;
	have_policies = !syscall(__NR_get_mempolicy, NULL, NULL, 0, NULL, 0);
	have_swap = swap_is_on();
	have_thp = !access(THP "enabled", F_OK);
	have_ksm = !access(KSM "run", F_OK);
	have_compaction = !access(COMPACT, F_OK);
	have_monitor = !access("/proc/self/clear_refs", F_OK);
	have_cgroup = enter_cgroup();
}

static bool print_ops(void)
{
	const struct op_count *count;
	bool ok = true;
	int i;

	for (i = 0; i < NR_OPS; i++) {
		count = &storm->ops[i];
		if (ops[i].can && !*ops[i].can) {
			ksft_print_msg("%s: skipped, %s\n", ops[i].name,
				       ops[i].why);
			continue;
		}
		ksft_print_msg("%s: %ld operations, %ld failed, %ld ms",
			       ops[i].name, count->done, count->failed,
			       count->ms);
		if (count->failed)
			printf(", last: %s", strerror(count->error));
		if (count->unexpected)
			printf("; %ld for no reason", count->unexpected);
		printf("\n");
		ok &= !count->unexpected;
	}
	for (i = 0; i < NR_DAEMONS; i++) {
		if (rounds_before[i] < 0)
			ksft_print_msg("%s: skipped, not in this kernel\n",
				       all_daemons[i].name);
		else
			ksft_print_msg("%s: %ld rounds, %ld %s\n",
				       all_daemons[i].name, rounds_of(i),
				       file_number(all_daemons[i].effect),
				       all_daemons[i].what);
	}
	return all_had_their_turn() && ok;
}

/*
 * All pages can be reached by rmap.
 *
 * There are many legal reasons why a page cannot be moved, or paged out, for
 * some time: it waits in a list of some CPU to be added to an LRU list, someone
 * has isolated it, the mm of a child that has been reaped is still there because
 * ksmd or the OOM reaper looks at it, it is in the swap cache or is written
 * back.  All of them pass when nothing goes on any more.  Those that do not are
 * made impossible before: pages are not merged, not locked in memory, not the
 * zero page, and have been written to since there were children.
 */
#define TRIES	20

static void make_movable(struct region *r, int page)
{
	char *p = page_at(r, page, r->slot[page / PIECE]);

	if (!(page % PIECE)) {
		munlock(p, PIECE * PAGE);
		madvise(p, PIECE * PAGE, MADV_UNMERGEABLE);
		undo_mbind(p, PIECE * PAGE);
	}
	write_page(r, page);
}

static uint64_t number_at(const char *path, uint64_t index)
{
	int fd = open(path, O_RDONLY);
	uint64_t val = ~0ULL;

	if (fd < 0)
		return val;
	if (pread(fd, &val, 8, index * 8) != 8)
		val = ~0ULL;
	close(fd);
	return val;
}

static void explain(struct region *r, int page, int status)
{
	char *p = page_at(r, page, r->slot[page / PIECE]);
	uint64_t entry = number_at("/proc/self/pagemap", (uintptr_t)p / PAGE);
	uint64_t pfn = PAGEMAP_PRESENT(entry) ? PAGEMAP_PFN(entry) : 0;

	ksft_print_msg("not reached: region %s, page %d at %p, status %d\n",
		       r->name, page, p, status);
	ksft_print_msg("  pagemap %#lx, kpageflags %#lx, kpagecount %ld\n",
		       entry, number_at("/proc/kpageflags", pfn),
		       (long)number_at("/proc/kpagecount", pfn));
}

#define EXPLAINED	4

/* How many of all pages are not on this node after they have been moved there? */
static int left_behind(int node, bool tell)
{
	static int nodes[ALL_PAGES], status[ALL_PAGES], errors[ALL_PAGES];
	static void *pages[ALL_PAGES];
	struct region *r;
	int i, n = 0;

	for (r = regions; r < regions + NR_REGIONS; r++) {
		for (i = 0; i < r->nr; i++, n++) {
			pages[n] = page_at(r, i, r->slot[i / PIECE]);
			nodes[n] = node;
			/* It is not moved while it is in swap. */
			check_page(r, i);
		}
	}
	if (syscall(__NR_move_pages, 0, n, pages, nodes, errors,
		    MPOL_MF_MOVE_ALL) < 0 ||
	    syscall(__NR_move_pages, 0, n, pages, NULL, status, 0) < 0) {
		ksft_perror("move_pages");
		return n;
	}
	n = 0;
	for (r = regions; r < regions + NR_REGIONS; r++) {
		for (i = 0; i < r->nr; i++) {
			if (status[r->first + i] == node)
				continue;
			if (tell && n < EXPLAINED) {
				ksft_print_msg("move_pages had said %d\n",
					       errors[r->first + i]);
				explain(r, i, status[r->first + i]);
			}
			n++;
		}
	}
	return n;
}

/* How many are not in swap after all were to go there? */
static int left_in_memory(int unused, bool tell)
{
	int fd = open("/proc/self/pagemap", O_RDONLY);
	struct region *r;
	int i, n = 0;
	char *p;

	for (r = regions; r < regions + NR_REGIONS; r++)
		for (i = 0; i < r->nr; i += PIECE)
			madvise(page_at(r, i, r->slot[i / PIECE]), PIECE * PAGE,
				MADV_PAGEOUT);
	for (r = regions; r < regions + NR_REGIONS; r++) {
		for (i = 0; i < r->nr; i++) {
			p = page_at(r, i, r->slot[i / PIECE]);
			if (pagemap_is_swapped(fd, p))
				continue;
			if (tell && n < EXPLAINED)
				explain(r, i, 0);
			n++;
		}
	}
	close(fd);
	return n;
}

static bool all_reached(int (*left)(int node, bool tell), int node,
			const char *how)
{
	int i, n = 0;

	for (i = 1; i <= TRIES; i++) {
		/* The LRU lists get what is on its way to them. */
		file_write(COMPACT, "1");
		n = left(node, i == TRIES);
		if (!n)
			break;
		usleep(i * 50000);
	}
	ksft_print_msg("%s: %d of %d pages not reached, %d tries\n", how, n,
		       ALL_PAGES, i > TRIES ? TRIES : i);
	return !n;
}

static void test_rmap(void)
{
	const char *what = "all pages can be reached by rmap";
	bool ok = true;

	if (!have_nodes && !have_swap) {
		ksft_test_result_skip("%s: needs two NUMA nodes or swap\n", what);
		return;
	}
	if (have_nodes) {
		ok &= all_reached(left_behind, node_last, "to the last node");
		ok &= all_reached(left_behind, 0, "to node 0");
	}
	if (have_swap)
		ok &= all_reached(left_in_memory, 0, "to swap");
	for_all_pages(check_page);
	if (storm->mismatches)
		print_mismatches();
	ksft_test_result(ok && !storm->mismatches, "%s\n", what);
}

struct memory {
	long anon;
	long swap;
	long tables;
};

static struct memory memory_now(void)
{
	return (struct memory){
		.anon = field_read("/proc/self/status", "RssAnon:"),
		.swap = field_read("/proc/self/status", "VmSwap:"),
		.tables = vm_pte(),
	};
}

static void print_memory(const char *when, const struct memory *m)
{
	ksft_print_msg("%s: RssAnon %ld kB, VmSwap %ld kB, VmPTE %ld kB\n",
		       when, m->anon, m->swap, m->tables);
}

/*
 * All of it is counted exactly.  But stack and heap may have grown, and the page
 * tables of the stack and the vDSO may have come in the meantime.
 */
static void test_given_back(const struct memory *before)
{
	const long slack = 256;
	struct memory full, now;
	long grown;

	full = memory_now();
	munmap(arena, ARENA_SIZE);
	now = memory_now();
	grown = now.anon + now.swap - before->anon - before->swap;
	print_memory("before", before);
	print_memory("with the regions", &full);
	print_memory("after", &now);
	ksft_test_result(grown <= slack && now.tables <= before->tables + 8,
			 "RSS, swap and page tables are given back\n");
}

/*
 * For the tests of counters nothing may go on any more: no other faults of this
 * kind begin, and those that have begun end.
 */
static void test_counters(const struct counters *before)
{
	struct counters now, grown;
	long races;
	int i;

	switch_set(SPF_SYSCTL, 0);
	for (i = 0; i < 50; i++) {
		read_counters(&now);
		if (counted(&now, "spf_attempt") ==
		    counted(&now, "spf_success") + counted(&now, "spf_abort_"))
			break;
		usleep(100000);
	}
	grown = now;
	for (i = 0; i < now.nr; i++) {
		grown.one[i].val -= before->one[i].val;
		ksft_print_msg("vmstat: %s %ld\n", grown.one[i].name,
			       grown.one[i].val);
	}
	if (switch_get(SPF_SYSCTL) < 0) {
		ksft_test_result_skip("speculative faults: none here\n");
		ksft_test_result_skip("aborts: no speculative faults\n");
		ksft_test_result_skip("counters: no speculative faults\n");
		return;
	}
	ksft_test_result(counted(&grown, "spf_success"),
			 "speculative faults happened\n");
	/* By writers, and by those who are none */
	races = counted(&grown, "spf_abort_seq") +
		counted(&grown, "spf_abort_pmd");
	ksft_test_result(races && counted(&grown, "spf_abort_writer"),
			 "aborts were provoked\n");
	ksft_test_result(counted(&now, "spf_attempt") ==
			 counted(&now, "spf_success") +
			 counted(&now, "spf_abort_"), "counters add up\n");
}

static void print_faults(void)
{
	struct rusage self, children;

	getrusage(RUSAGE_SELF, &self);
	getrusage(RUSAGE_CHILDREN, &children);
	ksft_print_msg("%ld faults, %ld of children, %ld filled\n",
		       self.ru_minflt + self.ru_majflt,
		       children.ru_minflt + children.ru_majflt, filled);
	ksft_print_msg("%ld pages written, %ld checked, %ld times to wait\n",
		       writes, checks, storm->signals);
	if (storm->child_died)
		ksft_print_msg("%ld children died\n", storm->child_died);
}

static void parse(int argc, char **argv, long *seconds)
{
	static const struct option options[] = {
		{ "seconds", required_argument, NULL, 's' },
		{ "seed", required_argument, NULL, 'r' },
		{ "errors-allowed", no_argument, NULL, 'e' },
		{}
	};
	int c;

	storm->seed = time(NULL);
	while ((c = getopt_long(argc, argv, "", options, NULL)) != -1) {
		switch (c) {
		case 's':
			*seconds = atol(optarg);
			break;
		case 'r':
			storm->seed = strtoull(optarg, NULL, 0);
			break;
		case 'e':
			storm->errors_allowed = true;
			break;
		default:
			ksft_exit_fail_msg("--seconds N, --seed N, --errors-allowed\n");
		}
	}
	/*
	 * The kernel writes to memory that is registered for restartable
	 * sequences; it kills those for whom it does not get a page then.
	 */
	if (storm->errors_allowed && !getenv("GLIBC_TUNABLES")) {
		setenv("GLIBC_TUNABLES", "glibc.pthread.rseq=0", 1);
		execv("/proc/self/exe", argv);
		ksft_exit_fail_perror("exec");
	}
}

int main(int argc, char **argv)
{
	struct sigaction sa = {
		.sa_handler = on_segv,
		.sa_flags = SA_NODEFER | SA_ONSTACK,
	};
	struct counters counters;
	struct memory before;
	long seconds = 120;

	/* Whatever this process needs itself it does not map between others. */
	mallopt(M_ARENA_MAX, 1);
	mallopt(M_MMAP_MAX, 0);
	mallopt(M_TOP_PAD, 1 << 20);

	storm = mmap(NULL, sizeof(*storm), PROT_READ | PROT_WRITE,
		     MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (storm == MAP_FAILED)
		ksft_exit_fail_perror("mmap");
	parse(argc, argv, &seconds);
	ksft_print_header();
	if (geteuid())
		ksft_exit_skip("needs root\n");
	ksft_set_plan(7);
	ksft_print_msg("seed %lu, %ld seconds\n", storm->seed, seconds);

	sigaction(SIGSEGV, &sa, NULL);

	look_around();
	if (switch_get(SPF_SYSCTL) >= 0)
		setting_change(&settings, SPF_SYSCTL, "1");
	/* With and without page tables that are kept as they are in use. */
	setting_change(&settings, RECLAIM_SYSCTL, storm->seed & 1 ? "1" : "2");
	setting_change(&settings, "/proc/sys/vm/oom_dump_tasks", "0");
	start_daemons();

	read_counters(&counters);
	/*
	 * What the storm needs itself is there before it is measured, and stays
	 * when memory is short.
	 */
	if (mlockall(MCL_CURRENT))
		ksft_exit_fail_perror("mlockall");
	before = memory_now();
	map_regions();
	run_storm(seconds);
	for_all_pages(check_page);

	print_faults();
	print_mismatches();
	ksft_test_result(!storm->mismatches &&
			 (storm->errors_allowed || !storm->child_died),
			 "contents are as expected\n");
	ksft_test_result(print_ops(), "every disruptor has had its turn\n");

	/* Mismatches until here have been judged. */
	storm->mismatches = 0;
	settings_restore(&daemons);
	for_all_pages(make_movable);
	test_rmap();
	test_given_back(&before);
	test_counters(&counters);

	settings_restore(&settings);
	leave_cgroup();
	ksft_finished();
}
