/* The client's side of the rings (proto/rings.h). */
#define _GNU_SOURCE
#include "ring_client.h"

#include "clock.h"
#include "error.h"
#include "fd_client.h"
#include "host_memory.h"
#include "rpc.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MASK (TS_RING_ENTRIES - 1)
#define SPIN_LUCK_MAX 16
#define SPIN_SELDOM 251 /* calls: a prime, so that it isn't the same layer each time */
#define SLICE_MS 100    /* of a sleep: a wake-up that came too early costs no more */

/*
 * The room for what begins in the open pools are answered: the block tables that a session may own
 * by default, and more than the new tokens of any step touch.
 */
static void find_room(const ts_client *c, uint32_t *blocks, uint32_t *slabs)
{
    uint64_t most = 4u * TS_RING_BATCH;
    *slabs = 1;
    for (const ts_pool *p = c->pools; p != NULL; p = p->next) {
        most = p->num_blocks * 16ull > most ? p->num_blocks * 16ull : most;
        *slabs = p->num_slabs > *slabs ? p->num_slabs : *slabs;
    }
    *blocks = most < TS_RING_BLOCKS ? (uint32_t)most : TS_RING_BLOCKS;
    *slabs = *slabs < TS_RING_SLABS ? *slabs : TS_RING_SLABS;
}

static void fill_in(ts_rings_memory *m, uint32_t max_blocks, uint32_t max_slabs, uint32_t max_ids)
{
    m->magic = TS_RING_MAGIC;
    m->version = TS_PROTOCOL;
    m->max_blocks = max_blocks;
    m->max_slabs = max_slabs;
    m->max_ids = max_ids;
}

/* Fills the memory, and takes the doorbell. The new rings take the place of those that are open, if
 * any are. An error leaves those, unless the daemon may have the new ones for all that: no answer
 * came, or this process can't receive the doorbell. */
static ts_status open_rings(ts_client *c, uint32_t max_blocks, uint32_t max_slabs, uint32_t max_ids)
{
    size_t bytes = ts_rings_bytes(max_blocks, max_slabs, max_ids);
    ts_handle_reply reply;
    void *memory;
    int bell;
    ts_status status = ts_memory_fill(c, TS_HANDLE_NEW_RINGS, "rings", bytes, &memory);
    if (status != TS_OK)
        return status;
    ts_rings_memory *m = memory;
    fill_in(m, max_blocks, max_slabs, max_ids);
    status = ts_handle_get(c, TS_HANDLE_DOORBELL, 0, 0, true, &reply, &bell);
    if (status == TS_OK || reply.status == TS_OK) /* else the daemon keeps what it has */
        ts_rings_close(c);
    if (status != TS_OK) {
        munmap(memory, bytes);
        return status;
    }
    c->doorbell = bell;
    c->ring_blocks = max_blocks;
    c->ring_slabs = max_slabs;
    c->ring_ids = max_ids;
    c->ring_submitted = c->ring_seen = 0;
    __atomic_store_n(&c->rings, m, __ATOMIC_SEQ_CST); /* ts_rings_wake may be looking */
    return TS_OK;
}

/* Submits the entry, and sets its tag. */
static void put(ts_client *c, ts_ring_entry *entry)
{
    ts_rings_memory *m = c->rings;
    entry->tag = ++c->ring_tag;
    m->submitted[c->ring_submitted & MASK] = *entry;
    c->ring_submitted++;
    __atomic_store_n(&m->submissions.tail, c->ring_submitted, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&m->submissions.sleeps, __ATOMIC_SEQ_CST) != 0) {
        uint64_t one = 1;
        while (write(c->doorbell, &one, sizeof one) < 0 && errno == EINTR)
            ;
    }
}

ts_status ts_rings_reopen(ts_client *c)
{
    const uint32_t max_blocks = c->ring_blocks, max_slabs = c->ring_slabs, max_ids = c->ring_ids;
    const size_t bytes = ts_rings_bytes(max_blocks, max_slabs, max_ids);
    ts_handle_reply reply;
    void *memory = NULL;
    int bell;
    ts_rings_memory *was = c->rings;
    if (was == NULL || c->rings_lost)
        return TS_OK;
    ts_status status = ts_memory_fill(c, TS_HANDLE_NEW_RINGS, "rings", bytes, &memory);
    if (status != TS_OK) {
        c->rings_lost = status != TS_ECONN;
        return status;
    }
    ts_rings_memory *m = memory;
    fill_in(m, max_blocks, max_slabs, max_ids);
    /* What was asked for, and what was answered: a caller may not have read all of it yet. */
    const size_t head = offsetof(ts_rings_memory, batch_seqs);
    memcpy((unsigned char *)m + head, (unsigned char *)was + head, bytes - head);
    status = ts_handle_get(c, TS_HANDLE_DOORBELL, 0, 0, true, &reply, &bell);
    /* Callers have pointers into it. */
    if (status == TS_OK &&
        mremap(memory, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, was) == MAP_FAILED) {
        close(bell);
        status = ts_fail(c, TS_ENOMEM, "the rings' memory can't be put in place");
    }
    if (status != TS_OK) {
        munmap(memory, bytes);
        c->rings_lost = status != TS_ECONN;
        return status;
    }
    close(c->doorbell);
    c->doorbell = bell;
    c->ring_submitted = c->ring_seen = c->ring_late_ms = 0;
    if (c->posted.op != 0)
        put(c, &c->posted);
    return TS_OK;
}

static bool has_ended(const ts_rings_memory *m)
{
    return __atomic_load_n(&m->ended, __ATOMIC_ACQUIRE) != TS_RINGS_GO_ON;
}

/* Whether there are rings that were opened with the open pools. */
static bool fit_pools(const ts_client *c)
{
    return c->rings != NULL && !c->pools_are_new;
}

/* Opens rings with room for the open pools, unless there are such. */
static ts_status find_rings(ts_client *c)
{
    uint32_t blocks, slabs;
    if (fit_pools(c))
        return TS_OK;
    find_room(c, &blocks, &slabs);
    bool enough = c->rings != NULL && blocks <= c->ring_blocks && slabs <= c->ring_slabs &&
                  c->ids_wanted <= c->ring_ids;
    ts_status status = enough ? TS_OK : open_rings(c, blocks, slabs, c->ids_wanted);
    if (status != TS_OK && status != TS_ECONN && status != TS_ETIMEOUT && c->rings != NULL &&
        !has_ended(c->rings))
        status = TS_OK; /* larger ones can't be had: what doesn't fit goes as a message */
    c->pools_are_new = status != TS_OK;
    return status;
}

void ts_rings_want_ids(ts_client *c, uint32_t count)
{
    uint32_t room = c->ids_wanted == 0 ? 1024 : c->ids_wanted;
    while (room < count && room < TS_RING_IDS)
        room *= 2;
    c->pools_are_new = c->pools_are_new || room != c->ids_wanted; /* the room is looked at again */
    c->ids_wanted = room;
}

/* Looks whether what the rings owe has come. An error: the session has ended, of which who waits
 * for the rings alone would learn nowhere else. */
static ts_status look_for_late(ts_client *c)
{
    ts_ring_completion late;
    if (c->ring_late_ms == 0)
        return TS_OK;
    const ts_status status = ts_may_ask(c); /* undoes what is to be undone */
    if (status == TS_OK && !c->ring_unanswered)
        (void)ts_ring_take_late(c, &late);
    return status;
}

static ts_status await_posted(ts_client *c);

static bool needs_rings(const ts_client *c)
{
    return c->transport == TS_TRANSPORT_RING || c->exec == TS_EXEC_LOCAL;
}

/* Sends one message more behind the one that wasn't answered, for whoever sends none otherwise: its
 * answer says that rings may go on. */
static void follow_unanswered(ts_client *c)
{
    Tspb__Status body = TSPB__STATUS__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    request.body_case = TSPB__REQUEST__BODY_STATUS;
    request.status = &body;
    (void)ts_call_briefly(c, &request); /* no answer: the caller is told so */
}

ts_status ts_rings_use(ts_client *c, bool *use)
{
    *use = false;
    if (c->transport == TS_TRANSPORT_MESSAGES || c->rings_lost || c->pid != getpid())
        return TS_OK;
    ts_status looked = look_for_late(c);
    if (looked == TS_OK && c->posted.op != 0 && c->ring_late_ms == 0)
        looked = await_posted(c);
    if (looked == TS_OK && c->ring_late_ms == 0 && !c->rings_lost && c->unanswered_message &&
        c->exec == TS_EXEC_LOCAL && !ts_is_brief(c))
        follow_unanswered(c);
    if (looked != TS_OK || c->ring_late_ms != 0 || c->rings_lost || c->unanswered_message)
        return looked; /* what comes behind a message that is yet to be answered is one, too */
    if (fit_pools(c)) {
        *use = true;
        return TS_OK;
    }
    /* Local execution, or one who wants rings alone, has nothing else to be heard by. */
    if (ts_only_tells(c) || (c->unheard && !needs_rings(c)))
        return TS_OK;
    const uint64_t until_ms = ts_call_end_ms(c);
    ts_status status;
    const ts_last_error last = c->error;
    do
        status = find_rings(c);
    while (ts_goes_on(c, status, until_ms));
    *use = status == TS_OK;
    if (status != TS_OK && (c->transport == TS_TRANSPORT_RING || status == TS_ECONN))
        return status;
    if (status != TS_OK && status != TS_ETIMEOUT) /* else they are tried at the next call */
        c->rings_lost = true;
    c->error = last; /* messages do the same */
    return TS_OK;
}

void ts_rings_wake(ts_client *c)
{
    ts_rings_memory *m = __atomic_load_n(&c->rings, __ATOMIC_SEQ_CST);
    if (m != NULL)
        syscall(SYS_futex, &m->completions.tail, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

void ts_rings_close(ts_client *c)
{
    if (c->rings == NULL)
        return;
    munmap(c->rings, ts_rings_bytes(c->ring_blocks, c->ring_slabs, c->ring_ids));
    close(c->doorbell);
    c->rings = NULL;
}

/*
 * Whether polling is worth it. Where answers take longer than that, because the kernels do or
 * because other processes want the processor, it only keeps them from it: then it is tried seldom,
 * until it was worth it again.
 */
static bool polls(const ts_client *c)
{
    return c->spin_us != TS_SPIN_NONE && (c->spin_luck >= 0 || c->ring_tag % SPIN_SELDOM == 0);
}

static void note_poll(ts_client *c, bool worth_it)
{
    if (!worth_it)
        c->spin_luck = c->spin_luck >= 2 ? c->spin_luck - 2 : -1;
    else if (c->spin_luck < SPIN_LUCK_MAX)
        c->spin_luck++;
}

/* Polls for a while. False: there is no completion yet. */
static bool poll_completions(const ts_client *c, uint64_t until_ns)
{
    const ts_rings_memory *m = c->rings;
    for (uint32_t turn = 1; turn % 16 != 0 || (!has_ended(m) && ts_now_ns() < until_ns); turn++) {
        ts_pause();
        if (__atomic_load_n(&m->completions.tail, __ATOMIC_ACQUIRE) != c->ring_seen)
            return true;
    }
    return false;
}

/* Waits until there is a completion: polls for a while, then sleeps. */
static ts_status await_completion(ts_client *c)
{
    ts_rings_memory *m = c->rings;
    uint32_t seen = c->ring_seen;
    const uint64_t patience_ms = ts_call_patience(c);
    uint64_t start = ts_now_ns(), until = start + patience_ms * 1000000ull;
    if (__atomic_load_n(&m->completions.tail, __ATOMIC_ACQUIRE) != seen)
        return TS_OK;
    if (polls(c)) {
        const bool worth_it = poll_completions(c, start + c->spin_us * 1000ull);
        note_poll(c, worth_it);
        if (worth_it)
            return TS_OK;
    }
    ts_status status = TS_OK;
    __atomic_store_n(&m->completions.sleeps, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&m->completions.tail, __ATOMIC_SEQ_CST) == seen) {
        uint64_t now = ts_now_ns();
        if (atomic_load(&c->broken) || ts_device_failed(c)) {
            status = ts_gone(c);
            break;
        }
        if (has_ended(m)) {
            c->rings_lost = true;
            status = ts_fail(c, TS_ECONN, "the daemon has ended the session's rings");
            break;
        }
        if (now >= until) {
            c->ring_late_ms = patience_ms;
            c->unheard = true;
            status = ts_fail(c, TS_ETIMEOUT, "no answer from %s within %llu ms", c->path,
                             (unsigned long long)patience_ms);
            break;
        }
        struct timespec slice = {.tv_nsec = SLICE_MS * 1000000};
        if (until - now < (uint64_t)slice.tv_nsec)
            slice.tv_nsec = (long)(until - now);
        syscall(SYS_futex, &m->completions.tail, FUTEX_WAIT, seen, &slice, NULL, 0);
    }
    __atomic_store_n(&m->completions.sleeps, 0, __ATOMIC_SEQ_CST);
    return status;
}

bool ts_ring_take(ts_client *c, ts_ring_completion *done)
{
    ts_rings_memory *m = c->rings;
    if (__atomic_load_n(&m->completions.tail, __ATOMIC_ACQUIRE) == c->ring_seen)
        return false;
    ts_note_heard(c);
    *done = m->completed[c->ring_seen & MASK];
    c->ring_seen++;
    __atomic_store_n(&m->completions.head, c->ring_seen, __ATOMIC_RELEASE);
    done->message[sizeof done->message - 1] = '\0';
    return true;
}

/* The posted run is answered. */
static void note_posted(ts_client *c, const ts_ring_completion *done)
{
    if (done->status != TS_OK) {
        c->refused_step = c->posted.step;
        c->refusal = *done;
    }
    c->posted.op = 0;
}

bool ts_ring_take_late(ts_client *c, ts_ring_completion *done)
{
    if (c->ring_late_ms == 0 || !ts_ring_take(c, done))
        return false;
    c->ring_late_ms = 0;
    c->rings_lost = c->rings_lost || done->tag != c->ring_tag;
    if (c->posted.op != 0)
        note_posted(c, done);
    return true;
}

/* Waits for the completion of the entry that was submitted last. */
static ts_status get(ts_client *c, ts_ring_completion *done)
{
    ts_status status = await_completion(c);
    if (status != TS_OK)
        return status;
    done->tag = c->ring_tag - 1;
    if (ts_ring_take(c, done) && done->tag == c->ring_tag)
        return TS_OK;
    c->rings_lost = true; /* what is answered next can't be told */
    return ts_fail(c, TS_EPROTO, "the daemon answers entry %u of the ring in place of %u",
                   done->tag, c->ring_tag);
}

static ts_status submit(ts_client *c, ts_ring_entry *entry, ts_ring_completion *done)
{
    put(c, entry);
    return get(c, done);
}

static ts_status fail_as(ts_client *c, const ts_ring_completion *done)
{
    return ts_fail_refused(c,
                           &(ts_error_info){.status = (ts_status)done->status,
                                            .needed = done->needed,
                                            .free = done->free,
                                            .limit = done->limit,
                                            .cached = done->cached,
                                            .pinned = done->pinned,
                                            .others = done->others},
                           done->message);
}

/* The rings have ended. Why, a message is told, if the session has, too: one that changes nothing,
 * since no call of the session's waits now. */
static ts_status say_why(ts_client *c)
{
    Tspb__WaitEnd body = TSPB__WAIT_END__INIT;
    Tspb__Request request = TSPB__REQUEST__INIT;
    request.body_case = TSPB__REQUEST__BODY_WAIT_END;
    request.wait_end = &body;
    const bool brief = c->brief;
    c->brief = true;
    const ts_status status = ts_call_plain(c, &request);
    c->brief = brief;
    return status == TS_ECONN ? status
                              : ts_fail(c, TS_ECONN, "the daemon has ended the session's rings");
}

ts_status ts_ring_call(ts_client *c, ts_ring_entry *entry, ts_ring_completion *done)
{
    const uint64_t until_ms = ts_call_end_ms(c);
    ts_status status = ts_may_ask(c);
    if (status != TS_OK)
        return status;
    entry->call = c->ring_call = atomic_fetch_add(&c->next_id, 1);
    do
        status = submit(c, entry, done);
    while (ts_goes_on(c, status, until_ms) && !c->rings_lost); /* the same call: see rpc.c */
    ts_give_up(c, status, c->ring_call);
    if (status == TS_ECONN && c->rings_lost && !atomic_load(&c->broken))
        return say_why(c);
    if (status == TS_OK && done->status != TS_OK)
        status = fail_as(c, done);
    return status;
}

/* ---- posted runs ---- */

/* Whether the daemon knows what that is. */
static bool takes_posted(const ts_client *c)
{
    return __atomic_load_n(&c->rings->posts, __ATOMIC_RELAXED) != 0;
}

ts_status ts_ring_post(ts_client *c, const ts_ring_entry *run, bool *posted)
{
    ts_posted_run *there = &c->signals->posted;
    *posted = false;
    const ts_status status = ts_may_ask(c);
    if (status != TS_OK || c->rings_lost || !takes_posted(c))
        return status;
    *posted = true;
    c->posted = *run;
    c->posted.run.flags |= TS_RUN_POSTED;
    c->posted.call = c->ring_call = atomic_fetch_add(&c->next_id, 1);
    there->step = c->posted.step;
    there->call = c->posted.call;
    there->run = c->posted.run;
    __atomic_store_n(&there->number, c->posted.run.number, __ATOMIC_RELEASE);
    put(c, &c->posted);
    return TS_OK;
}

/* Waits until the posted run is answered. TS_ETIMEOUT: the rings are late. Where they are lost, the
 * daemon finds it in the page of signals, and the commit says what came of it. */
static ts_status await_posted(ts_client *c)
{
    const uint64_t until_ms = ts_call_end_ms(c);
    ts_ring_completion done;
    ts_status status;
    if (c->rings_lost) {
        c->posted.op = 0;
        return TS_OK;
    }
    do
        status = get(c, &done);
    while (ts_goes_on(c, status, until_ms) && !c->rings_lost);
    if (status == TS_OK)
        note_posted(c, &done);
    else if (status == TS_ETIMEOUT)
        return ts_fail(c, TS_ETIMEOUT, "no answer from %s to run %u within %llu ms", c->path,
                       c->posted.run.number, (unsigned long long)c->ring_late_ms);
    else if (c->rings_lost)
        c->posted.op = 0;
    return status == TS_ECONN && c->rings_lost && !atomic_load(&c->broken) ? TS_OK : status;
}

ts_status ts_ring_posted_status(ts_client *c, uint64_t step)
{
    const bool hears = c->posted.op != 0 || c->refused_step == step;
    if (!hears || c->pid != getpid()) /* a child's call is refused */
        return TS_OK;
    if (c->posted.op != 0) { /* it was late before this call */
        c->ring_late_ms = 0;
        const ts_status status = await_posted(c);
        if (status != TS_OK)
            return status;
    }
    if (c->refused_step != step)
        return TS_OK;
    c->refused_step = 0;
    return fail_as(c, &c->refusal);
}
