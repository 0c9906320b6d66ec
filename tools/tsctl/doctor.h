/*
 * tsctl doctor: what may be wrong with a daemon's surroundings, and what to do about it. It changes
 * nothing.
 */
#ifndef TSCTL_DOCTOR_H
#define TSCTL_DOCTOR_H

#include "options.h"

typedef enum finding_level { FINDING_OK, FINDING_WARNING, FINDING_FAULT } finding_level;

typedef struct finding {
    finding_level level;
    char about[16]; /* "socket" */
    char text[360];
    char advice[360]; /* empty: there is nothing to do */
} finding;

#define FINDINGS_MAX 24

typedef struct findings {
    finding all[FINDINGS_MAX];
    size_t count;
} findings;

/* The next finding; its advice follows by doctor_advise. More than FINDINGS_MAX aren't kept. */
__attribute__((format(printf, 4, 5))) void doctor_found(findings *f, finding_level level,
                                                        const char *about, const char *format, ...);
__attribute__((format(printf, 2, 3))) void doctor_advise(findings *f, const char *format, ...);

/* What the machine is asked with. */
typedef struct doctor_facts {
    uint64_t pid;        /* of the daemon, 0: none was reached */
    uint64_t host_bytes; /* of its pools in host memory */
    uint64_t host_slabs, slabs;
    bool on_gpu, mps; /* a pool is on a GPU; which is shared by MPS */
} doctor_facts;

/* Limits of this process and of the daemon's, memory, GPUs. `root` is "" but for tests: /proc and
 * /sys are looked for below it. */
void doctor_machine(findings *f, const char *root, const doctor_facts *facts);

/* The descriptors that a process may have: this one, and the daemon. */
void doctor_descriptors(findings *f, const char *root, const doctor_facts *facts);

/* The socket that clients of this user take, and who may connect. */
void doctor_socket(findings *f, const char *url);

/* Whether the memory outlives the daemon, and whether the last restart found all of it right. */
void doctor_store(findings *f, const Tspb__StatusReply *status);

/* Asks all of it, and prints; an exit status. */
int doctor_run(const options *o);

#endif
