#define _GNU_SOURCE
#include "tinyserve_version.h"
#include "tsbench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

/* The processor's name as Linux has it; where it has none, the architecture's. */
static void processor_name(char *name, size_t bytes)
{
    struct utsname system;
    char *line = NULL;
    size_t size = 0;
    snprintf(name, bytes, "%s", uname(&system) == 0 ? system.machine : "unknown");
    FILE *file = fopen("/proc/cpuinfo", "re");
    while (file != NULL && getline(&line, &size, file) > 0) {
        const char *colon = strchr(line, ':');
        if (colon == NULL || strncmp(line, "model name", strlen("model name")) != 0)
            continue;
        snprintf(name, bytes, "%.*s", (int)strcspn(colon + 2, "\n"), colon + 2);
        break;
    }
    free(line);
    if (file != NULL)
        (void)fclose(file); /* only read */
}

json_t *bench_report(const char *benchmark, int argc, char *const *argv, double load, json_t *rows)
{
    char processor[128], date[32];
    time_t now = time(NULL);
    struct tm utc;
    json_t *command = json_array();
    processor_name(processor, sizeof processor);
    strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
    json_array_append_new(command, json_string("tsbench"));
    for (int i = 1; i < argc; i++)
        json_array_append_new(command, json_string(argv[i]));
    return json_pack("{s:s, s:s, s:s, s:{s:s, s:I, s:I, s:f}, s:o, s:O}", "benchmark", benchmark,
                     "version", TS_VERSION, "date", date, "machine", "processor", processor,
                     "processors", (json_int_t)sysconf(_SC_NPROCESSORS_ONLN), "memory_GiB",
                     (json_int_t)sysconf(_SC_PHYS_PAGES) * sysconf(_SC_PAGESIZE) >> 30,
                     "load_before", load, "command", command, "rows", rows);
}
