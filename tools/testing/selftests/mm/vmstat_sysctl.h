/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Events of /proc/vmstat, and switches below /proc/sys.
 */
#ifndef _SELFTESTS_MM_VMSTAT_SYSCTL_H
#define _SELFTESTS_MM_VMSTAT_SYSCTL_H

#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* The sum of all whose names begin with these n bytes; -1 if there are none. */
static inline long __vmstat_sum(const char *name, size_t n)
{
	FILE *f = fopen("/proc/vmstat", "r");
	char line[128], key[64];
	long val, sum = -1;

	if (!f)
		return -1;
	while (fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%63s %ld", key, &val) == 2 &&
		    !strncmp(key, name, n))
			sum = (sum < 0 ? 0 : sum) + val;
	}
	fclose(f);
	return sum;
}

static inline long vmstat_sum(const char *prefix)
{
	return __vmstat_sum(prefix, strlen(prefix));
}

/* The value of one: the end of its name is compared, too. */
static inline long vmstat_read(const char *name)
{
	return __vmstat_sum(name, strlen(name) + 1);
}

/* What has been counted between begin and end, of all with this prefix */
struct vmstat_events {
	const char *prefix;
	char text[512];		/* "3 this_event, 4 that_event" */
	long was[32];
};

static inline void __vmstat_events(struct vmstat_events *events, bool begin)
{
	FILE *f = fopen("/proc/vmstat", "r");
	char line[128], key[64];
	int nr = 0, len = 0;
	long val;

	if (!f)
		return;
	events->text[0] = '\0';
	while (nr < 32 && fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%63s %ld", key, &val) != 2 ||
		    strncmp(key, events->prefix, strlen(events->prefix)))
			continue;
		if (begin)
			events->was[nr] = val;
		else if (val != events->was[nr] && len < 400)
			len += sprintf(events->text + len, "%s%ld %s",
				       len ? ", " : "", val - events->was[nr],
				       key);
		nr++;
	}
	fclose(f);
}

static inline void vmstat_events_begin(struct vmstat_events *events)
{
	__vmstat_events(events, true);
}

static inline void vmstat_events_end(struct vmstat_events *events)
{
	__vmstat_events(events, false);
}

/* A switch of one digit, 0 for off; -1 if there is none. */
static inline int switch_get(const char *path)
{
	int fd = open(path, O_RDONLY);
	char c = '0';

	if (fd < 0)
		return -1;
	if (read(fd, &c, 1) != 1)
		c = '0';
	close(fd);
	return c - '0';
}

static inline bool switch_set(const char *path, int to)
{
	int fd = open(path, O_WRONLY);
	char c = '0' + to;
	bool ok;

	if (fd < 0)
		return false;
	ok = write(fd, &c, 1) == 1;
	close(fd);
	return ok;
}

#endif /* _SELFTESTS_MM_VMSTAT_SYSCTL_H */
