// SPDX-License-Identifier: GPL-2.0
/*
 * Which cache lines page faults write, and where their instructions go: a
 * plugin for QEMU's TCG (plugin API 1, x86-64 guest with nokaslr).
 *
 * faultload.c marks what is to be measured with a no-op that has a magic
 * displacement.  Between MARK_BEGIN and MARK_END on a vCPU, each fault counts
 * from the first instruction of asm_exc_page_fault to its iretq.  Interrupts
 * that come in between are kept apart.  A fault that gets to the scheduler ends
 * there and is told as "cut": what follows is of other tasks, and of the switch.
 *
 * Each access to a kernel address is filed under its physical 64-byte line, for
 * each vCPU with the number of faults that stored to it or loaded from it.  A
 * line is shared when at least two vCPUs each stored to it in at least 1 % of
 * their faults.  Whether and how the vCPUs ran at the same time has no
 * influence on that.
 *
 * MARK_REPORT writes OUT.N.lines (shared lines written per fault, each with its
 * name and who stores to it), OUT.N.symbols and OUT.N.addresses (instructions
 * per fault), and OUT.N.vcpus (each vCPU's by symbol), N being 0, 1, ..., and
 * begins anew.  Lines get names from the guest's own memory, read at that
 * moment: from the image's and the per-CPU symbols, or from the slab cache that
 * the page belongs to.  With slab_nomerge a cache holds nothing
 * but what its name says.
 *
 * Arguments: map=System.map, out=PREFIX, ram=FILE (the guest's memory, shared),
 * layout=FILE with lines "NAME NUMBER", see layout[], and, for names only,
 * "field STRUCT MEMBER OFFSET SIZE".
 */
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include "qemu-plugin.h"

QEMU_PLUGIN_EXPORT int qemu_plugin_version = QEMU_PLUGIN_VERSION;

#define MAX_CPUS	64
#define LINE_SHIFT	6
#define SHARED_PERCENT	1

/* nopl DISP32(%rax), see faultload.c */
#define MARK_OPCODE	"\x0f\x1f\x80"
enum { MARK_BEGIN = 0x5be0fa01, MARK_END, MARK_REPORT };

/* ---- the guest's symbols */

struct symbol {
	uint64_t addr;
	const char *name;
};

struct symbols {
	struct symbol *sym;
	size_t n;
};

/* Of the kernel's image, and of the per-CPU area, which begins at 0. */
static struct symbols image, percpu;
/* Where sections begin and end: that names nothing. */
static struct symbols bounds;
static uint64_t percpu_end;

static void __attribute__((format(printf, 1, 2), noreturn)) fail(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	fputs("traffic-plugin: ", stderr);
	vfprintf(stderr, format, args);
	fputc('\n', stderr);
	va_end(args);
	_exit(1);
}

static void *alloc(size_t n, size_t size)
{
	void *p = calloc(n, size);

	if (!p)
		fail("out of memory");
	return p;
}

static bool is_kernel(uint64_t addr)
{
	return addr >> 63;
}

static void add_symbol(struct symbols *s, uint64_t addr, const char *name)
{
	if (!(s->n & (s->n - 1))) {
		s->sym = realloc(s->sym, (s->n ? 2 * s->n : 1) * sizeof(*s->sym));
		if (!s->sym)
			fail("out of memory");
	}
	s->sym[s->n].addr = addr;
	s->sym[s->n++].name = strdup(name);
}

static bool is_bound(const char *name)
{
	const char *end = strrchr(name, '_');

	return !strncmp(name, "__", 2) && end &&
	       (!strcmp(end, "_start") || !strcmp(end, "_end"));
}

/* System.map is sorted; of symbols with one address the first is taken. */
static void read_map(const char *path)
{
	char type, name[512], line[600];
	FILE *f = fopen(path, "r");
	uint64_t addr;

	if (!f)
		fail("cannot read %s", path);
	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%" SCNx64 " %c %511s", &addr, &type, name) != 3)
			continue;
		if (!strcmp(name, "__per_cpu_end"))
			percpu_end = addr;
		if (!strncmp(name, "__pfx_", 6))
			continue;
		if (is_bound(name))
			add_symbol(&bounds, addr, name);
		else if (is_kernel(addr))
			add_symbol(&image, addr, name);
		else if (!percpu_end)
			add_symbol(&percpu, addr, name);
	}
	fclose(f);
	if (!image.n || !percpu_end)
		fail("%s is no System.map of an SMP kernel", path);
}

static const struct symbol *symbol_at(const struct symbols *s, uint64_t addr)
{
	size_t low = 0, high = s->n;

	while (low < high) {
		size_t mid = (low + high) / 2;

		if (s->sym[mid].addr <= addr)
			low = mid + 1;
		else
			high = mid;
	}
	if (!low)
		return NULL;
	while (--low && s->sym[low - 1].addr == s->sym[low].addr)
		;
	return &s->sym[low];
}

static uint64_t address_of(const char *name)
{
	for (size_t i = 0; i < image.n; i++)
		if (!strcmp(image.sym[i].name, name))
			return image.sym[i].addr;
	for (size_t i = 0; i < bounds.n; i++)
		if (!strcmp(bounds.sym[i].name, name))
			return bounds.sym[i].addr;
	fail("System.map has no %s", name);
}

static const char *function_at(uint64_t pc)
{
	const struct symbol *sym = symbol_at(&image, pc);

	return sym ? sym->name : "?";
}

/* ---- the guest's memory */

static const char *ram;
static uint64_t ram_size;

/* What the headers of the kernel say; all of it must be given. */
enum {
	PAGE_SIZE_OF, PAGE_COMPOUND_HEAD, PAGE_PAGE_TYPE, SLAB_TYPE, SLAB_SLAB_CACHE,
	CACHE_NAME, CACHE_SIZE, NODE_SIZE, MEMCG_SIZE, MEMCG_NODEINFO, MEMCG_NODE_SIZE,
};

static struct {
	const char *name;
	uint64_t value;
	bool given;
} layout[] = {
	[PAGE_SIZE_OF] = { .name = "page_size_of" },
	[PAGE_COMPOUND_HEAD] = { .name = "page_compound_head" },
	[PAGE_PAGE_TYPE] = { .name = "page_page_type" },
	[SLAB_TYPE] = { .name = "slab_type" },
	[SLAB_SLAB_CACHE] = { .name = "slab_slab_cache" },
	[CACHE_NAME] = { .name = "cache_name" },
	[CACHE_SIZE] = { .name = "cache_size" },
	[NODE_SIZE] = { .name = "node_size" },
	[MEMCG_SIZE] = { .name = "memcg_size" },
	[MEMCG_NODEINFO] = { .name = "memcg_nodeinfo" },
	[MEMCG_NODE_SIZE] = { .name = "memcg_node_size" },
};

static struct field {
	char in[32], member[48];
	uint64_t offset, size;
} fields[128];
static size_t n_fields;

static void read_layout(const char *path)
{
	char line[256], name[64];
	FILE *f = fopen(path, "r");
	uint64_t value;

	if (!f)
		fail("cannot read %s", path);
	while (fgets(line, sizeof(line), f)) {
		struct field *field = &fields[n_fields];

		if (n_fields < sizeof(fields) / sizeof(*fields) &&
		    sscanf(line, "field %31s %47s %" SCNu64 " %" SCNu64, field->in,
			   field->member, &field->offset, &field->size) == 4) {
			n_fields++;
			continue;
		}
		if (sscanf(line, "%63s %" SCNu64, name, &value) != 2)
			continue;
		for (size_t i = 0; i < sizeof(layout) / sizeof(*layout); i++)
			if (!strcmp(layout[i].name, name)) {
				layout[i].value = value;
				layout[i].given = true;
			}
	}
	fclose(f);
	for (size_t i = 0; i < sizeof(layout) / sizeof(*layout); i++)
		if (!layout[i].given)
			fail("%s lacks %s", path, layout[i].name);
}

static bool read_physical(uint64_t pa, void *to, size_t len)
{
	if (pa + len > ram_size || pa + len < pa)
		return false;
	memcpy(to, ram + pa, len);
	return true;
}

static uint64_t page_tables, direct_map, vmemmap, image_start, image_end;

/* Walk the kernel's page tables. */
static bool translate(uint64_t va, uint64_t *pa)
{
	uint64_t entry = page_tables;
	/* The direct map begins lower with 5 levels. */
	int shift = direct_map < 0xffff800000000000 ? 48 : 39;

	for (;; shift -= 9) {
		uint64_t table = entry & 0xffffffffff000;

		if (!read_physical(table + (va >> shift & 511) * 8, &entry, 8) ||
		    !(entry & 1))
			return false;
		if (shift == 12 || (shift <= 30 && (entry & 0x80))) {
			uint64_t mask = (1UL << shift) - 1;

			*pa = (entry & 0xffffffffff000 & ~mask) | (va & mask);
			return true;
		}
	}
}

static bool read_virtual(uint64_t va, void *to, size_t len)
{
	uint64_t pa;

	return translate(va, &pa) && read_physical(pa, to, len);
}

static uint64_t read_pointer(uint64_t va)
{
	uint64_t value;

	return read_virtual(va, &value, sizeof(value)) ? value : 0;
}

#define IMAGE_MAP	0xffffffff80000000	/* __START_KERNEL_map */

static void find_guest(void)
{
	/* Without KASLR the image is where it was linked to. */
	uint64_t offset = address_of("page_offset_base") - IMAGE_MAP;

	if (!read_physical(offset, &direct_map, 8) || !is_kernel(direct_map))
		fail("the guest's memory is not what System.map says (KASLR?)");
	page_tables = address_of("init_top_pgt") - IMAGE_MAP;
	vmemmap = read_pointer(address_of("vmemmap_base"));
	image_start = address_of("_text");
	image_end = address_of("_end");
}

/* ---- names of addresses */

struct name {
	char s[160];
};

/* STRUCT.MEMBER, or STRUCT+OFFSET */
static struct name name_field(const char *in, uint64_t offset)
{
	struct name name;

	for (size_t i = 0; i < n_fields; i++)
		if (!strcmp(fields[i].in, in) && offset - fields[i].offset < fields[i].size) {
			snprintf(name.s, sizeof(name.s), "%s.%s", in, fields[i].member);
			return name;
		}
	snprintf(name.s, sizeof(name.s), "%s+%" PRIu64, in, offset);
	return name;
}

static bool name_percpu(uint64_t va, int cpus, struct name *name)
{
	uint64_t offsets = address_of("__per_cpu_offset");
	uint32_t unit = read_pointer(address_of("pcpu_unit_size"));

	for (int i = 0; i < cpus; i++) {
		uint64_t addr = va - read_pointer(offsets + i * 8);
		const struct symbol *sym = symbol_at(&percpu, addr);

		if (addr >= unit)
			continue;
		if (addr >= percpu_end || !sym)
			snprintf(name->s, sizeof(name->s), "cpu%d:dynamic+%" PRIu64,
				 i, addr - percpu_end);
		else
			snprintf(name->s, sizeof(name->s), "cpu%d:%s+%" PRIu64,
				 i, sym->name, addr - sym->addr);
		return true;
	}
	return false;
}

/* Those that no slab cache is named after. */
static bool name_object(uint64_t va, struct name *name)
{
	uint64_t nodes = address_of("node_data");
	uint64_t memcg = read_pointer(address_of("root_mem_cgroup"));

	if (memcg && va - memcg < layout[MEMCG_SIZE].value) {
		*name = name_field("mem_cgroup", va - memcg);
		return true;
	}
	for (int i = 0; i < 64; i++) {
		uint64_t node = read_pointer(nodes + i * 8);
		uint64_t info;

		if (!is_kernel(node))
			break;
		if (va - node < layout[NODE_SIZE].value) {
			*name = name_field("pglist_data", va - node);
			return true;
		}
		info = memcg ? read_pointer(memcg + layout[MEMCG_NODEINFO].value + i * 8) : 0;
		if (info && va - info < layout[MEMCG_NODE_SIZE].value) {
			*name = name_field("mem_cgroup_per_node", va - info);
			return true;
		}
	}
	return false;
}

/* slab:CACHE+OFFSET, when the page belongs to one */
static bool name_slab(uint64_t pa, struct name *name)
{
	uint64_t page = vmemmap + (pa >> 12) * layout[PAGE_SIZE_OF].value;
	uint64_t head = read_pointer(page + layout[PAGE_COMPOUND_HEAD].value);
	struct name cache_name = { "" };
	uint64_t cache, start;
	uint32_t type, size;

	/* In newer kernels the head may be told by a mask; the image is up there, no page. */
	if (head & 1 && head >> 32 == 0xffffffff)
		page &= head - 1;
	else if (head & 1)
		page = head - 1;
	if (!read_virtual(page + layout[PAGE_PAGE_TYPE].value, &type, 4) ||
	    type >> 24 != layout[SLAB_TYPE].value)
		return false;
	cache = read_pointer(page + layout[SLAB_SLAB_CACHE].value);
	if (!read_virtual(cache + layout[CACHE_SIZE].value, &size, 4) || !size)
		return false;
	/* Byte by byte: the string may end right before a page that is not there. */
	start = read_pointer(cache + layout[CACHE_NAME].value);
	for (size_t i = 0; i < 32; i++)
		if (!read_virtual(start + i, &cache_name.s[i], 1) || !cache_name.s[i])
			break;
	start = (page - vmemmap) / layout[PAGE_SIZE_OF].value << 12;
	cache_name = name_field(cache_name.s, (pa - start) % size);
	snprintf(name->s, sizeof(name->s), "slab:%.150s", cache_name.s);
	return true;
}

static struct name name_address(uint64_t pa, uint64_t va, int cpus)
{
	const struct symbol *sym;
	struct name name;

	if (va >= image_start && va < image_end) {
		sym = symbol_at(&image, va);
		snprintf(name.s, sizeof(name.s), "%.100s+%" PRIu64, sym->name, va - sym->addr);
	} else if (va - vmemmap < (ram_size >> 12) * layout[PAGE_SIZE_OF].value) {
		name = name_field("page", va % layout[PAGE_SIZE_OF].value);
	} else if (!name_percpu(va, cpus, &name) && !name_object(va, &name) &&
		   !name_slab(pa, &name)) {
		/* Of the page allocator or of before it, and no slab. */
		snprintf(name.s, sizeof(name.s), "memory");
	}
	return name;
}

/* ---- what is counted */

/* In a fault, and in an interrupt that came during one. */
enum { STORED, LOADED, STORED_BY_IRQ, HOWS };

struct site {
	struct site *next;
	uint64_t pc;
	uint64_t va;			/* of its last store */
	uint64_t n;
};

struct line {
	uint64_t key;			/* physical address >> LINE_SHIFT */
	struct site *sites;		/* instructions that stored */
	uint32_t faults[HOWS];		/* in how many faults */
	uint32_t last[HOWS];		/* number of the last of them */
};

static struct cpu {
	bool measured;
	int depth;			/* 1: in the fault, more: interrupts */
	uint64_t faults;
	uint64_t cut;
	struct line *lines;
	size_t used, size;		/* size: a power of two, or 0 */
} __attribute__((aligned(128))) cpus[MAX_CPUS];

struct block {
	struct block *next;
	enum { ORDINARY, FAULT_ENTRY, OTHER_ENTRY, SCHEDULE, USER } kind;
	uint64_t *n;			/* for each vCPU */
	size_t insns;
	uint64_t pc[];
};

static int max_cpus;
static struct block *blocks;
static pthread_mutex_t blocks_lock = PTHREAD_MUTEX_INITIALIZER;

static struct line *slot(struct line *lines, size_t size, uint64_t key)
{
	size_t i = key * 0x9e3779b97f4a7c15 >> 20 & (size - 1);

	while (lines[i].key && lines[i].key != key)
		i = (i + 1) & (size - 1);
	return &lines[i];
}

static struct line *find_line(struct cpu *cpu, uint64_t key)
{
	struct line *line;

	if (2 * cpu->used >= cpu->size) {
		size_t size = cpu->size ? 2 * cpu->size : 1 << 14;
		struct line *lines = alloc(size, sizeof(*lines));

		for (size_t i = 0; i < cpu->size; i++)
			if (cpu->lines[i].key)
				*slot(lines, size, cpu->lines[i].key) = cpu->lines[i];
		free(cpu->lines);
		cpu->lines = lines;
		cpu->size = size;
	}
	line = slot(cpu->lines, cpu->size, key);
	if (!line->key) {
		line->key = key;
		cpu->used++;
	}
	return line;
}

static void count_site(struct line *line, uint64_t pc, uint64_t va)
{
	struct site *site = line->sites;

	while (site && site->pc != pc)
		site = site->next;
	if (!site) {
		site = alloc(1, sizeof(*site));
		site->pc = pc;
		site->next = line->sites;
		line->sites = site;
	}
	site->va = va;
	site->n++;
}

static void clear_counts(void)
{
	for (int i = 0; i < max_cpus; i++) {
		for (size_t j = 0; j < cpus[i].size; j++)
			for (struct site *s = cpus[i].lines[j].sites, *next; s; s = next) {
				next = s->next;
				free(s);
			}
		free(cpus[i].lines);
		memset(&cpus[i], 0, sizeof(cpus[i]));
	}
	for (struct block *b = blocks; b; b = b->next)
		memset(b->n, 0, max_cpus * sizeof(*b->n));
}

/* ---- the report */

static const char *out;

static FILE *open_out(int section, const char *what)
{
	char path[4096];
	FILE *f;

	snprintf(path, sizeof(path), "%s.%d.%s", out, section, what);
	f = fopen(path, "w");
	if (!f)
		fail("cannot write %s", path);
	return f;
}

static const struct line *line_of(int cpu, uint64_t key)
{
	const struct line *line;

	if (!cpus[cpu].size)
		return NULL;
	line = slot(cpus[cpu].lines, cpus[cpu].size, key);
	return line->key ? line : NULL;
}

/* On how many vCPUs is it touched in at least SHARED_PERCENT of the faults? */
static int sharers(uint64_t key, int how)
{
	int n = 0;

	for (int i = 0; i < max_cpus; i++) {
		const struct line *line = line_of(i, key);

		n += line && line->faults[how] &&
		     line->faults[how] * 100UL >= cpus[i].faults * SHARED_PERCENT;
	}
	return n;
}

static uint64_t in_faults(uint64_t key, int how)
{
	uint64_t n = 0;

	for (int i = 0; i < max_cpus; i++) {
		const struct line *line = line_of(i, key);

		n += line ? line->faults[how] : 0;
	}
	return n;
}

struct count {
	const char *name;
	uint64_t pc;
	uint64_t va;
	uint64_t n;
};

static int by_count(const void *a, const void *b)
{
	const struct count *x = a, *y = b;

	if (x->n != y->n)
		return x->n < y->n ? 1 : -1;
	return x->pc < y->pc ? -1 : x->pc > y->pc;
}

static int by_pc(const void *a, const void *b)
{
	const struct count *x = a, *y = b;

	return x->pc < y->pc ? -1 : x->pc > y->pc;
}

/* The functions that store to it, most often first; their number. */
static size_t storers(uint64_t key, struct count *count, size_t max)
{
	size_t n = 0, j;

	for (int i = 0; i < max_cpus; i++) {
		const struct line *line = line_of(i, key);

		for (struct site *s = line ? line->sites : NULL; s; s = s->next) {
			const char *name = function_at(s->pc);

			for (j = 0; j < n && count[j].name != name; j++)
				;
			if (j == max)
				continue;
			if (j == n)
				count[n++] = (struct count){ name, s->pc, s->va, 0 };
			count[j].n += s->n;
		}
	}
	qsort(count, n, sizeof(*count), by_count);
	return n;
}

struct found {
	uint64_t key;
	int how;
	double written;
};

static int by_written(const void *a, const void *b)
{
	const struct found *x = a, *y = b;

	if (x->how != y->how)
		return x->how - y->how;
	if (x->written != y->written)
		return x->written < y->written ? 1 : -1;
	return x->key < y->key ? -1 : x->key > y->key;
}

/*
 * shared: the definition at the top.  irq: the same for what interrupts store
 * during faults.  read: stored to by one vCPU, loaded from by several.  An
 * atomic operation counts as a store only: the plugin API does not tell.
 */
static void report_lines(FILE *f, uint64_t faults, int n_cpus)
{
	static const char *const hows[HOWS] = { "shared", "read", "irq" };
	double sum[HOWS] = { 0 }, loaded = 0;
	struct found *found = NULL;
	size_t n = 0;

	for (int i = 0; i < n_cpus; i++)
		for (size_t j = 0; j < cpus[i].size; j++) {
			const struct line *line = &cpus[i].lines[j];
			uint64_t key = line->key;
			int how, before;

			if (!key)
				continue;
			/* once, whoever else has it */
			for (before = 0; before < i && !line_of(before, key); before++)
				;
			if (before < i)
				continue;
			if (sharers(key, STORED) >= 2)
				how = STORED;
			else if (sharers(key, STORED_BY_IRQ) >= 2)
				how = STORED_BY_IRQ;
			else if (sharers(key, STORED) == 1 && sharers(key, LOADED) >= 2)
				how = LOADED;
			else
				continue;
			if (!(n & (n - 1)))
				found = realloc(found, (n ? 2 * n : 1) * sizeof(*found));
			if (!found)
				fail("out of memory");
			found[n++] = (struct found){ key, how,
				(double)in_faults(key, how == LOADED ? STORED : how) / faults };
		}
	qsort(found, n, sizeof(*found), by_written);
	for (size_t i = 0; i < n; i++) {
		sum[found[i].how] += found[i].written;
		if (found[i].how == STORED)
			loaded += (double)in_faults(found[i].key, LOADED) / faults;
	}
	for (int i = 0; i < n_cpus; i++)
		if (cpus[i].faults)
			fprintf(f, "cpu %d faults %" PRIu64 " cut %" PRIu64 "\n",
				i, cpus[i].faults, cpus[i].cut);
	fprintf(f, "written %.3f\nloaded %.3f\nby-interrupts %.3f\n",
		sum[STORED], loaded, sum[STORED_BY_IRQ]);
	fputs("# how written loaded physical virtual name function=stores...\n", f);
	for (size_t i = 0; i < n; i++) {
		uint64_t pa = found[i].key << LINE_SHIFT, va;
		struct count count[64];
		size_t m = storers(found[i].key, count, 64);

		va = m ? count[0].va : 0;
		fprintf(f, "%s %.3f %.3f 0x%" PRIx64 " 0x%" PRIx64 " %s",
			hows[found[i].how], found[i].written,
			(double)in_faults(found[i].key, LOADED) / faults, pa, va,
			name_address(pa + va % (1 << LINE_SHIFT), va, n_cpus).s);
		for (size_t j = 0; j < m; j++)
			fprintf(f, " %s=%.3f", count[j].name, (double)count[j].n / faults);
		fputc('\n', f);
	}
	free(found);
}

static void report_profile(FILE *symbols, FILE *addresses, uint64_t faults)
{
	struct count *count;
	size_t n = 0, m = 0;
	uint64_t sum = 0;

	for (struct block *b = blocks; b; b = b->next)
		n += b->insns;
	count = alloc(n, sizeof(*count));
	for (struct block *b = blocks; b; b = b->next) {
		uint64_t times = 0;

		for (int i = 0; i < max_cpus; i++)
			times += b->n[i];
		for (size_t i = 0; times && i < b->insns; i++)
			count[m++] = (struct count){ function_at(b->pc[i]), b->pc[i], 0, times };
		sum += times * b->insns;
	}
	/* One address can be in several blocks. */
	qsort(count, m, sizeof(*count), by_pc);
	for (size_t i = n = 0; i < m; i++) {
		if (n && count[n - 1].pc == count[i].pc)
			count[n - 1].n += count[i].n;
		else
			count[n++] = count[i];
	}
	for (size_t i = 0; i < n; i++)
		fprintf(addresses, "%16" PRIx64 " %10.3f %s+0x%" PRIx64 "\n",
			count[i].pc, (double)count[i].n / faults, count[i].name,
			count[i].pc - symbol_at(&image, count[i].pc)->addr);
	for (size_t i = m = 0; i < n; i++) {
		if (m && count[m - 1].name == count[i].name)
			count[m - 1].n += count[i].n;
		else
			count[m++] = count[i];
	}
	qsort(count, m, sizeof(*count), by_count);
	fprintf(symbols, "%10.2f total\n", (double)sum / faults);
	for (size_t i = 0; i < m; i++)
		fprintf(symbols, "%10.2f %s\n", (double)count[i].n / faults, count[i].name);
	free(count);
}

/* Instructions of each vCPU per fault, where there are any to speak of. */
static void report_vcpus(FILE *f, int n_cpus)
{
	uint64_t *n = alloc(image.n, sizeof(*n));

	for (int i = 0; i < n_cpus; i++) {
		memset(n, 0, image.n * sizeof(*n));
		for (struct block *b = blocks; b; b = b->next)
			for (size_t j = 0; b->n[i] && j < b->insns; j++) {
				const struct symbol *sym = symbol_at(&image, b->pc[j]);

				if (sym)
					n[sym - image.sym] += b->n[i];
			}
		for (size_t j = 0; j < image.n; j++)
			if (n[j] && n[j] * 10 >= cpus[i].faults)
				fprintf(f, "%d %s %.2f\n", i, image.sym[j].name,
					(double)n[j] / cpus[i].faults);
	}
	free(n);
}

/* The other vCPUs must not be measured any more. */
static void report(void)
{
	static int section;
	FILE *lines = open_out(section, "lines");
	FILE *symbols = open_out(section, "symbols");
	FILE *addresses = open_out(section, "addresses");
	FILE *vcpus = open_out(section, "vcpus");
	uint64_t faults = 0;
	int n_cpus = 0;

	find_guest();
	for (int i = 0; i < max_cpus; i++) {
		faults += cpus[i].faults;
		if (cpus[i].faults)
			n_cpus = i + 1;
	}
	pthread_mutex_lock(&blocks_lock);
	if (faults) {
		report_lines(lines, faults, n_cpus);
		report_profile(symbols, addresses, faults);
		report_vcpus(vcpus, n_cpus);
	}
	clear_counts();
	pthread_mutex_unlock(&blocks_lock);
	if (fclose(lines) || fclose(symbols) || fclose(addresses) || fclose(vcpus))
		fail("cannot write %s.%d.*", out, section);
	section++;
}

/* ---- callbacks */

static void on_mark(unsigned int index, void *mark)
{
	struct cpu *cpu = &cpus[index];

	switch ((uintptr_t)mark) {
	case MARK_BEGIN:
		cpu->measured = true;
		break;
	case MARK_END:
		cpu->measured = false;
		break;
	case MARK_REPORT:
		report();
		break;
	}
}

static void on_block(unsigned int index, void *data)
{
	struct cpu *cpu = &cpus[index];
	struct block *block = data;

	switch (block->kind) {
	case FAULT_ENTRY:
		if (!cpu->depth && cpu->measured) {
			cpu->depth = 1;
			cpu->faults++;
			break;
		}
		/* fall through */
	case OTHER_ENTRY:
		if (cpu->depth)
			cpu->depth++;
		break;
	case SCHEDULE:
		cpu->cut += cpu->depth > 0;
		cpu->depth = 0;
		break;
	case USER:
		cpu->depth = 0;
		return;
	case ORDINARY:
		break;
	}
	if (cpu->depth == 1)
		block->n[index]++;
}

static void on_iret(unsigned int index, void *data)
{
	(void)data;
	if (cpus[index].depth)
		cpus[index].depth--;
}

static void on_access(unsigned int index, qemu_plugin_meminfo_t info,
		      uint64_t va, void *pc)
{
	struct cpu *cpu = &cpus[index];
	struct qemu_plugin_hwaddr *hwaddr;
	struct line *line;
	bool store;
	int how;

	if (!cpu->depth || !is_kernel(va))
		return;
	hwaddr = qemu_plugin_get_hwaddr(info, va);
	if (!hwaddr || qemu_plugin_hwaddr_is_io(hwaddr))
		return;
	line = find_line(cpu, qemu_plugin_hwaddr_phys_addr(hwaddr) >> LINE_SHIFT);
	store = qemu_plugin_mem_is_store(info);
	if (cpu->depth > 1) {
		if (!store)
			return;
		how = STORED_BY_IRQ;
	} else {
		how = store ? STORED : LOADED;
	}
	if (store)
		count_site(line, (uintptr_t)pc, va);
	if (line->last[how] != cpu->faults) {
		line->last[how] = cpu->faults;
		line->faults[how]++;
	}
}

static uint64_t fault_entry, entries, entries_end, schedule;

static void on_translate(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
	size_t n = qemu_plugin_tb_n_insns(tb);
	uint64_t start = qemu_plugin_tb_vaddr(tb);
	struct block *block;

	(void)id;
	if (!is_kernel(start)) {
		static struct block user = { .kind = USER };

		qemu_plugin_register_vcpu_tb_exec_cb(tb, on_block,
						     QEMU_PLUGIN_CB_NO_REGS, &user);
		for (size_t i = 0; i < n; i++) {
			struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
			const void *code = qemu_plugin_insn_data(insn);
			uint32_t mark;

			if (qemu_plugin_insn_size(insn) != 7 || memcmp(code, MARK_OPCODE, 3))
				continue;
			memcpy(&mark, (const char *)code + 3, 4);
			if (mark >= MARK_BEGIN && mark <= MARK_REPORT)
				qemu_plugin_register_vcpu_insn_exec_cb(insn, on_mark,
					QEMU_PLUGIN_CB_NO_REGS, (void *)(uintptr_t)mark);
		}
		return;
	}

	block = alloc(1, sizeof(*block) + n * sizeof(*block->pc));
	block->n = alloc(max_cpus, sizeof(*block->n));
	block->insns = n;
	if (start == fault_entry)
		block->kind = FAULT_ENTRY;
	else if (start == schedule)
		block->kind = SCHEDULE;
	else if (start >= entries && start < entries_end &&
		 symbol_at(&image, start)->addr == start)
		block->kind = OTHER_ENTRY;
	qemu_plugin_register_vcpu_tb_exec_cb(tb, on_block, QEMU_PLUGIN_CB_NO_REGS, block);
	for (size_t i = 0; i < n; i++) {
		struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
		uint64_t pc = qemu_plugin_insn_vaddr(insn);

		block->pc[i] = pc;
		if (qemu_plugin_insn_size(insn) == 2 &&
		    !memcmp(qemu_plugin_insn_data(insn), "\x48\xcf", 2))
			qemu_plugin_register_vcpu_insn_exec_cb(insn, on_iret,
				QEMU_PLUGIN_CB_NO_REGS, NULL);
		qemu_plugin_register_vcpu_mem_cb(insn, on_access, QEMU_PLUGIN_CB_NO_REGS,
			QEMU_PLUGIN_MEM_RW, (void *)(uintptr_t)pc);
	}
	pthread_mutex_lock(&blocks_lock);
	block->next = blocks;
	blocks = block;
	pthread_mutex_unlock(&blocks_lock);
}

static void map_ram(const char *path)
{
	int fd = open(path, O_RDONLY);
	struct stat st;

	if (fd < 0 || fstat(fd, &st))
		fail("cannot read %s", path);
	ram_size = st.st_size;
	ram = mmap(NULL, ram_size, PROT_READ, MAP_SHARED, fd, 0);
	if (ram == MAP_FAILED)
		fail("cannot map %s", path);
	close(fd);
}

QEMU_PLUGIN_EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info,
					   int argc, char **argv)
{
	if (!info->system_emulation || strcmp(info->target_name, "x86_64") ||
	    info->system.max_vcpus > MAX_CPUS)
		fail("only for x86_64 with up to %d CPUs", MAX_CPUS);
	max_cpus = info->system.max_vcpus;
	for (int i = 0; i < argc; i++) {
		char *value = strchr(argv[i], '=');

		if (!value)
			fail("what is %s?", argv[i]);
		*value++ = '\0';
		if (!strcmp(argv[i], "map")) {
			read_map(value);
		} else if (!strcmp(argv[i], "out")) {
			out = strdup(value);
		} else if (!strcmp(argv[i], "ram")) {
			map_ram(value);
		} else if (!strcmp(argv[i], "layout")) {
			read_layout(value);
		} else {
			fail("what is %s?", argv[i]);
		}
	}
	if (!image.n || !out || !ram || !layout[0].given)
		fail("map=, out=, ram= and layout= are needed");
	fault_entry = address_of("asm_exc_page_fault");
	entries = address_of("__irqentry_text_start");
	entries_end = address_of("__irqentry_text_end");
	schedule = address_of("__schedule");
	qemu_plugin_register_vcpu_tb_trans_cb(id, on_translate);
	return 0;
}
