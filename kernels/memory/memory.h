/*
 * A memory provider: slabs of one pool, mapped one after another into an address range that is
 * reserved once, so that `base + slab * slab_bytes` holds for as long as the pool lives. Slabs can
 * be exported to other processes as file descriptors.
 *
 * A slab that goes to another tenant is *renewed*: it gets new, zeroed memory, so that whoever
 * still maps the old one sees none of what comes after. This header has the provider of host
 * memory; gpu.h has those of device memory.
 *
 * Thread: one at a time (the engine's); the memory itself may be used by any. A slab that has none
 * may be renewed, and dropped again, by another thread meanwhile.
 */
#ifndef TS_MEMORY_H
#define TS_MEMORY_H

#include "tinyserve_types.h"

#include <stdbool.h>

typedef struct ts_memory ts_memory;

typedef struct ts_memory_ops {
    const char *name;
    ts_status (*renew)(ts_memory *, uint32_t slab, char *why, size_t why_bytes);
    ts_status (*drop)(ts_memory *, uint32_t slab, char *why,
                      size_t why_bytes); /* NULL: it keeps what it has */
    ts_status (*export_fd)(ts_memory *, uint32_t slab, bool writable, int *fd, char *why,
                           size_t why_bytes);
    ts_status (*adopt)(ts_memory *, uint32_t slab, int fd, char *why,
                       size_t why_bytes); /* NULL: its memory dies with its maker */
    void (*free)(ts_memory *);
} ts_memory_ops;

struct ts_memory {
    const ts_memory_ops *ops;
    unsigned char *base;
    size_t slab_bytes;         /* from one slab to the next */
    size_t export_bytes;       /* of the memory behind a slab's descriptor: at least slab_bytes */
    const uint8_t *ipc_handle; /* of the only slab, where there is no descriptor; else NULL */
    uint32_t num_slabs;
    bool outlives; /* set before the first slab: another process will adopt them after this one */
};

/*
 * Reserves address space for num_slabs slabs of slab_bytes (a multiple of 4096) of host memory,
 * none of them backed yet. TS_ENOMEM with a sentence in `why` if that can't be had.
 */
ts_status ts_memory_host_new(uint32_t num_slabs, size_t slab_bytes, ts_memory **out, char *why,
                             size_t why_bytes);

/*
 * Gives the slab new memory, all zero. Host memory: the old memory is given back to the system at
 * once, even if another process still maps it. TS_ENOMEM leaves the slab as it was.
 */
static inline ts_status ts_memory_renew(ts_memory *m, uint32_t slab, char *why, size_t why_bytes)
{
    return m->ops->renew(m, slab, why, why_bytes);
}

/*
 * Gives the slab the memory behind a descriptor that an earlier process's ts_memory_export gave
 * (writable, of a provider that outlives). The descriptor is the provider's then, or is closed.
 * TS_EINVAL: it is none of this size. TS_ENOMEM. TS_EDEVICE: the memory can't outlive its maker.
 */
ts_status ts_memory_adopt(ts_memory *memory, uint32_t slab, int fd, char *why, size_t why_bytes);

/* Gives the slab's memory back: a GPU's as far as nobody else maps it, the host's in any case. The
 * slab can be renewed, also after an error, which is told in `why`. */
__attribute__((warn_unused_result)) static inline ts_status
ts_memory_drop(ts_memory *m, uint32_t slab, char *why, size_t why_bytes)
{
    return m->ops->drop == NULL ? TS_OK : m->ops->drop(m, slab, why, why_bytes);
}

/* A new descriptor of the slab's memory, which the caller closes. Read-only unless `writable`: of
 * host memory only the daemon's user and root can make it more. */
static inline ts_status ts_memory_export(ts_memory *m, uint32_t slab, bool writable, int *fd,
                                         char *why, size_t why_bytes)
{
    return m->ops->export_fd(m, slab, writable, fd, why, why_bytes);
}

static inline void ts_memory_free(ts_memory *m)
{
    if (m != NULL)
        m->ops->free(m);
}

/*
 * A memfd of `bytes` whose size is sealed, mapped here read-write: a session's exchange. The caller
 * unmaps and closes.
 */
ts_status ts_memory_shared_new(const char *name, size_t bytes, int *fd, void **address, char *why,
                               size_t why_bytes);

#endif
