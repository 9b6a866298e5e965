/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the tests of the rules of speculative page faults are made of.
 */
#ifndef _SELFTESTS_MM_SPF_RULES_H
#define _SELFTESTS_MM_SPF_RULES_H

#include <elf.h>
#include <linux/userfaultfd.h>
#include <lib/test_hmm_uapi.h>
#include <mm/pgtable_walk_test.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>

#include "anon_util.h"
#include "vmstat_sysctl.h"

#define DEBUGFS		"/sys/kernel/debug/"
#define DELAY		DEBUGFS "mm_race_delay/"

/* Nothing else is near: page tables of all levels come and go with a VMA. */
#define LONELY		((char *)(1UL << 45))

/* The signal that writing to p gets, or 0. */
static int write_signal(char *p, char what)
{
	unsigned long val = (unsigned char)what;

	return try_access((unsigned long *)p, &val, true);
}

/* A thread that writes to pages, one after the other, until it is stopped. */
struct writer {
	pthread_t thread;
	char *p;
	int nr;
	char what;
	atomic_int page;	/* where it is; nr: it is done */
	int sig;		/* what has stopped it */
};

static void *writer_fn(void *data)
{
	struct writer *w = data;
	int i;

	for (i = 0; i < w->nr && !w->sig; i++) {
		atomic_store(&w->page, i);
		w->sig = write_signal(w->p + i * PAGE, w->what);
	}
	atomic_store(&w->page, w->nr);
	return NULL;
}

static int writer_start(struct writer *w, char *p, int nr, char what)
{
	*w = (struct writer){ .p = p, .nr = nr, .what = what, .page = -1 };
	if (pthread_create(&w->thread, NULL, writer_fn, w))
		return -1;
	while (atomic_load(&w->page) < 0)
		sched_yield();
	return 0;
}

/* If there is a switch */
static bool switch_spf_on(struct settings *settings)
{
	const char *path = "/proc/sys/vm/speculative_page_fault";

	return switch_get(path) < 0 || setting_change(settings, path, "1");
}

/* Have faults wait at one point, and at no other; is it there? */
static bool delay_only(struct settings *settings, const char *where,
		       const char *us)
{
	static const char * const point[] = {
		"copy", "walk", "memory", "lock", "commit"
	};
	bool there = false;
	char path[64];
	int i;

	for (i = 0; i < 5; i++) {
		bool here = !strcmp(point[i], where);

		snprintf(path, sizeof(path), DELAY "spf_%s", point[i]);
		if (setting_change(settings, path, here ? us : "0"))
			there |= here;
	}
	return there;
}

/* Until somebody is at some page of these, and a while longer, in the fault */
static void wait_until_at(atomic_int *page, int nr, bool delays)
{
	int to = rand() % nr;

	while (atomic_load(page) < to)
		sched_yield();
	if (delays)
		usleep(rand() % 6000);
}

static void read_pages(const char *p, int nr)
{
	int i;

	for (i = 0; i < nr; i++)
		peek(p + i * PAGE);
}

static int wrong_pages(const char *p, int nr, char what)
{
	return nr - count_pages(p, nr, what);
}

/* Pages that are there, or swapped out: bits 63 and 62 in /proc/PID/pagemap */
static int count_present(int pagemap, const char *p, int nr)
{
	uint64_t entry[NR_PAGES];
	int i, there = 0;

	nr = pread(pagemap, entry, nr * 8, (uintptr_t)p / PAGE * 8) / 8;
	for (i = 0; i < nr; i++)
		there += !!(entry[i] >> 62);
	return nr ? there : -1;
}

static int arm(int uffd, char *p, unsigned long size)
{
	struct uffdio_register reg = {
		.range = { (uintptr_t)p, size },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};

	return ioctl(uffd, UFFDIO_REGISTER, &reg);
}

/* Counters, where there are some; lost are those who have met a writer. */
struct counts {
	long success, lost, vma, notifier, unstable;
};

static struct counts counts(void)
{
	return (struct counts){
		.success = vmstat_read("spf_success"),
		.lost = vmstat_read("spf_abort_seq") +
			vmstat_read("spf_abort_pmd") +
			vmstat_read("spf_abort_writer"),
		.vma = vmstat_read("spf_abort_vma"),
		.notifier = vmstat_read("spf_abort_notifier"),
		.unstable = vmstat_read("spf_abort_unstable"),
	};
}

static struct counts counts_since(const struct counts *was)
{
	struct counts now = counts();

	return (struct counts){
		.success = now.success - was->success,
		.lost = now.lost - was->lost,
		.vma = now.vma - was->vma,
		.notifier = now.notifier - was->notifier,
		.unstable = now.unstable - was->unstable,
	};
}

/* More time for each race: SPF_RULE_SECONDS in the environment. */
static int at_least(int seconds)
{
	const char *wanted = getenv("SPF_RULE_SECONDS");

	return wanted && atoi(wanted) > seconds ? atoi(wanted) : seconds;
}

/* Has it not taken long enough?  Nor too long: a race has to happen first. */
static bool race_is_on(time_t start, int least, int most,
		       const struct counts *was)
{
	time_t now = time(NULL);

	return now < start + at_least(least) ||
	       (now < start + most && was->success >= 0 &&
		!counts_since(was).lost);
}

/* The test was none if this has not happened. */
#define EXPECT_GREW(was, field, by)					\
do {									\
	const struct counts *__was = (was);				\
									\
	if (__was->success < 0)						\
		TH_LOG("no speculative faults: nothing to count");	\
	else								\
		EXPECT_GE(counts_since(__was).field, by);		\
} while (0)

/* What the device sees: of each page, the first byte has to be what is said. */
static int device_wrong(int fd, const char *p, int nr, char what)
{
	static char seen[NR_PAGES * PAGE];
	struct hmm_dmirror_cmd cmd = {
		.addr = (uintptr_t)p, .ptr = (uintptr_t)seen, .npages = nr,
	};
	int ret;

	do {
		ret = ioctl(fd, HMM_DMIRROR_READ, &cmd);
	} while (ret && errno == EINTR);
	return ret ? -1 : wrong_pages(seen, nr, what);
}

static int entry_is_there(int fd, const char *p)
{
	struct pgtable_walk_test t = { .addr = (uintptr_t)p, .nr_walks = 1 };

	return ioctl(fd, PGTABLE_WALK_TEST, &t) ? -1 : t.nr_filled;
}

#define FLAGS_LONELY	(MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE |	\
			 MAP_FIXED_NOREPLACE)

static char *map_lonely(void)
{
	char *p = mmap(LONELY, TABLE, PROT_READ | PROT_WRITE, FLAGS_LONELY,
		       -1, 0);

	if (p == LONELY)
		madvise(p, TABLE, MADV_NOHUGEPAGE);
	return p == LONELY ? p : NULL;
}

static void grace_period(void)
{
	syscall(__NR_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0);
}

static int exit_status(pid_t pid)
{
	int i, status;

	for (i = 0; i < 500; i++) {
		if (waitpid(pid, &status, WNOHANG) == pid)
			return status;
		usleep(10000);
	}
	kill(pid, SIGKILL);
	waitpid(pid, &status, 0);
	return -1;
}

/* Where nothing is: memory that nobody may touch. */
static void put_nothing(char *p, int nr)
{
	mmap(p, nr * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS |
	     MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
}

#define NR_FAULTERS	2
#define NR_GATE		32	/* pages that they write to ... */
#define NR_AREA		48	/* ... in a VMA of so many, to be zapped */
#define GATE_SECONDS	5

struct gate;

struct faulter {
	pthread_t thread;
	struct gate *gate;
	int nr;
	atomic_ulong idle;	/* the gen that it has seen to be odd */
	unsigned long done[NR_GATE];	/* the gen in which it has written */
	long writes;
	long refused;
};

struct gate {
	struct counts was;
	char *p;		/* the VMA */
	char *away;		/* where there is room for one more */
	char *elsewhere;	/* a VMA that has nothing to do with it */
	int fd;			/* a file full of 'f', to be mapped instead */
	int uffd, pagemap;
	atomic_ulong gen;	/* odd: closed */
	atomic_bool stop;
	long rounds;
	struct faulter faulter[NR_FAULTERS];
	pthread_t writer;
};

static char mark(unsigned long gen)
{
	return gen / 2 % 100 + 1;
}

static void *faulter_fn(void *data)
{
	struct faulter *f = data;
	struct gate *g = f->gate;
	unsigned long gen;
	int i = f->nr;

	while (!atomic_load(&g->stop)) {
		gen = atomic_load(&g->gen);
		if (gen & 1) {
			atomic_store(&f->idle, gen);
			usleep(20);
			continue;
		}
		if (write_signal(g->p + i * PAGE, mark(gen))) {
			f->refused++;
		} else {
			f->done[i] = gen;
			f->writes++;
		}
		i = (i + NR_FAULTERS) % NR_GATE;
	}
	return NULL;
}

/* One who makes the count change, so that it tells nothing about this VMA. */
static void *elsewhere_fn(void *data)
{
	struct gate *g = data;
	int n = 0;

	while (!atomic_load(&g->stop)) {
		mprotect(g->elsewhere, PAGE, n++ % 2 ? PROT_READ : PROT_NONE);
		usleep(rand() % 300);
	}
	return NULL;
}

static void gate_close(struct gate *g)
{
	unsigned long gen = atomic_fetch_add(&g->gen, 1) + 1;
	int i;

	for (i = 0; i < NR_FAULTERS; i++)
		while (atomic_load(&g->faulter[i].idle) != gen)
			usleep(20);
}

/* Pages of this generation, from one to another, that are not at p any more */
static int gate_lost(struct gate *g, const char *p, int from, int to)
{
	unsigned long gen = atomic_load(&g->gen) - 1;
	int i, lost = 0;

	for (i = from; i < to; i++)
		if (g->faulter[i % NR_FAULTERS].done[i] == gen)
			lost += peek(p + i * PAGE) != mark(gen);
	return lost;
}

/*
 * A program that makes the count of its address space go on by argc - 1, writes
 * to the second page of its bss, which is at LONELY, and exits.
 */
#define EXEC_TEXT	0x400000
#define NR_KEPT		16

asm(".pushsection .rodata\n"
	".globl exec_code, exec_code_end\n"
	"exec_code:\n"
	"	mov	(%rsp), %ebx\n"
	"1:	dec	%ebx\n"
	"	jz	2f\n"
	"	mov	$10, %eax\n"		/* mprotect(), to what it is */
	"	mov	$0x400000, %edi\n"
	"	mov	$0x1000, %esi\n"
	"	mov	$5, %edx\n"
	"	syscall\n"
	"	jmp	1b\n"
	"2:	movabs	$0x200000001000, %rax\n"
	"	movb	$1, (%rax)\n"
	"	xor	%edi, %edi\n"
	"	mov	$60, %eax\n"		/* exit(0) */
	"	syscall\n"
	"exec_code_end:\n"
	".popsection\n");
extern const char exec_code[], exec_code_end[];

static int exec_program(void)
{
	struct {
		Elf64_Ehdr ehdr;
		Elf64_Phdr phdr[2];
		char code[256];
	} elf = {
		.ehdr = {
			.e_ident = ELFMAG "\2\1\1",
			.e_type = ET_EXEC,
			.e_machine = EM_X86_64,
			.e_version = 1,
			.e_entry = EXEC_TEXT + sizeof(elf) - 256,
			.e_phoff = sizeof(Elf64_Ehdr),
			.e_ehsize = sizeof(Elf64_Ehdr),
			.e_phentsize = sizeof(Elf64_Phdr),
			.e_phnum = 2,
		},
		.phdr = { {
			.p_type = PT_LOAD,
			.p_flags = PF_R | PF_X,
			.p_vaddr = EXEC_TEXT,
			.p_filesz = sizeof(elf),
			.p_memsz = sizeof(elf),
			.p_align = PAGE,
		}, {
			.p_type = PT_LOAD,
			.p_flags = PF_R | PF_W,
			.p_vaddr = (uintptr_t)LONELY,
			.p_memsz = NR_KEPT * PAGE,
			.p_align = PAGE,
		} },
	};
	int fd = memfd_create("spf_rules", MFD_CLOEXEC);

	memcpy(elf.code, exec_code, exec_code_end - exec_code);
	return write(fd, &elf, sizeof(elf)) == sizeof(elf) ? fd : -1;
}

/* A child that has the same pages, until it is killed */
static pid_t fork_sharer(void)
{
	pid_t pid = fork();

	if (!pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		pause();
		_exit(0);
	}
	return pid;
}

#define NR_TOGETHER	64

/* One of two who write to the same pages, to each at the same time */
struct sharer {
	pthread_t thread;
	char *p;
	int nr;
	atomic_int *together;
	long faults;
};

static void *sharer_fn(void *data)
{
	struct sharer *s = data;
	struct rusage before, after;
	int i;

	getrusage(RUSAGE_THREAD, &before);
	for (i = 0; i < NR_TOGETHER; i++) {
		atomic_fetch_add(s->together, 1);
		while (atomic_load(s->together) < 2 * (i + 1))
			;
		poke(s->p + i * PAGE + s->nr, 'a' + s->nr);
	}
	getrusage(RUSAGE_THREAD, &after);
	s->faults = after.ru_minflt - before.ru_minflt;
	return NULL;
}

#define NR_MOVED	4

/*
 * One who writes to pages that are moved meanwhile, and after that to where
 * they are.  He has a CPU of his own, and so has the other one.
 */
struct mover {
	pthread_t thread;
	atomic_int step;	/* odd: the writer's turn */
	atomic_bool stop;
	atomic_int page;	/* where it is, first */
	char *from, *to;
	char what;
	long refused;
};

/* With no sleep: a CPU that is idle flushes its TLB later, all of it. */
static void mover_wait(struct mover *m, int odd)
{
	while (atomic_load(&m->step) % 2 != odd && !atomic_load(&m->stop))
		;
}

static void *moved_fn(void *data)
{
	struct mover *m = data;
	int i;

	run_on(1);
	for (;;) {
		mover_wait(m, 1);
		if (atomic_load(&m->stop))
			return NULL;
		for (i = 0; i < NR_MOVED; i++) {
			atomic_store(&m->page, i);
			if (write_signal(m->from + i * PAGE, 'w'))
				break;
		}
		atomic_store(&m->page, NR_MOVED);
		m->refused += i < NR_MOVED;
		atomic_fetch_add(&m->step, 1);
		/* The other one has moved and read it meanwhile. */
		mover_wait(m, 1);
		write_pages(m->to, NR_MOVED, m->what);
		atomic_fetch_add(&m->step, 1);
	}
}

#endif /* _SELFTESTS_MM_SPF_RULES_H */
