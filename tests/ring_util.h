/* A client's rings from inside: entries that are submitted without the library's calls. */
#ifndef TS_TEST_RING_UTIL_H
#define TS_TEST_RING_UTIL_H

#include "execution_util.h"
#include "ring_client.h"

/* Submits an entry without waiting. */
static inline void submit(ts_client *c, const ts_ring_entry *entry)
{
    c->rings->submitted[c->ring_submitted++ % TS_RING_ENTRIES] = *entry;
    __atomic_store_n(&c->rings->submissions.tail, c->ring_submitted, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&c->rings->submissions.sleeps, __ATOMIC_SEQ_CST) != 0)
        assert_int_equal(write(c->doorbell, &(uint64_t){1}, 8), 8);
}

static inline void await(const uint32_t *word, uint32_t value)
{
    while (__atomic_load_n(word, __ATOMIC_SEQ_CST) != value)
        ;
}

/* A session whose rings are open. */
static inline ts_client *with_rings(const daemon_process *d)
{
    bool use;
    ts_client *c = connect_by(d, TS_TRANSPORT_RING, 0, 0);
    OK(ts_rings_use(c, &use));
    assert_true(use);
    return c;
}

#endif
