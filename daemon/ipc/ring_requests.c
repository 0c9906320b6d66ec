/* What is done with a ring's entries: taken, checked, handed to the engine and the kernels,
 * completed. */
#define _GNU_SOURCE
#include "clock.h"
#include "codec.h"
#include "log.h"
#include "parked.h"
#include "refusals.h"
#include "ring_server.h"
#include "slab_supply.h"
#include "step_work.h"
#include "stream_runs.h"
#include "test_point.h"

#include <limits.h>
#include <linux/futex.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ENTRIES_PER_TURN 8u /* entries that a ring gives in one turn */
#define MASK (TS_RING_ENTRIES - 1)

static void complete(ts_ring *r, const ts_ring_completion *c, uint64_t taken_ns)
{
    ts_latency_add(&r->rings->service->ring_times, ts_now_ns() - taken_ns);
    ts_point("answering", 0);
    r->shared->completed[r->posted & MASK] = *c;
    r->posted++;
    __atomic_store_n(&r->shared->completions.tail, r->posted, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&r->shared->completions.sleeps, __ATOMIC_SEQ_CST) != 0)
        syscall(SYS_futex, &r->shared->completions.tail, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    ts_point("answered", 0);
}

/* The kernels are done with what an entry asked for. */
static void on_done(const ts_completion *completion, const ts_step_result *result)
{
    ts_ring *r = completion->context;
    ts_ring_completion c = {.tag = completion->tag};
    if (r->begun.step != 0 && r->begun.tag == completion->tag && !result->run &&
        result->status == TS_OK)
        c = r->begun;
    if (!result->run && r->begun.tag == completion->tag)
        r->begun.step = 0;
    c.status = (uint32_t)result->status;
    if (result->status != TS_OK)
        snprintf(c.message, sizeof c.message, "%s", result->why);
    ts_refused_step(r->rings->service,
                    result->run ? TSPB__REQUEST__BODY_STEP_RUN : TSPB__REQUEST__BODY_STEP_BEGIN,
                    result->step, result->status);
    complete(r, &c, completion->taken_ns);
    ts_ring_release(r);
}

static void submit(const ts_completion *completion, ts_job *job)
{
    const ts_ring *r = completion->context;
    ts_rings_submit(r->rings, job);
}

/* What the client has written that can't be ends its rings; its session goes on with messages. */
static void refuse_ring(ts_ring *r, const char *what, uint32_t value)
{
    ts_log(TS_LOG_WARNING, "the rings of connection %u are closed: %s is %u", r->pipe, what, value);
    ts_ring_end(r);
}

/* Copies the arrays of a begin or a commit, so that they stay as they are checked. */
static void copy_batch(ts_ring *r, uint32_t count, bool seqs)
{
    if (seqs)
        memcpy(r->rings->seqs, r->shared->batch_seqs, count * sizeof *r->rings->seqs);
    memcpy(r->rings->words, r->shared->batch_words, count * sizeof *r->rings->words);
}

/* Copies the ids of the tokens that the batch's words add up to, as copy_batch does. False, and the
 * answer refuses: there are more tokens than room. */
static bool copy_ids(ts_ring *r, uint32_t count, const uint32_t **ids, ts_answer *answer)
{
    uint64_t tokens = 0;
    for (uint32_t i = 0; i < count; i++)
        tokens += r->rings->words[i];
    if (tokens > r->max_ids) {
        ts_refuse(answer, TS_EINVAL, "%llu token ids on a ring that has room for %u",
                  (unsigned long long)tokens, r->max_ids);
        return false;
    }
    memcpy(r->rings->ids, ts_rings_ids(r->shared, r->max_blocks, r->max_slabs),
           tokens * sizeof *r->rings->ids);
    *ids = r->rings->ids;
    return true;
}

static bool decode_begin(ts_ring *r, ts_connection *c, const ts_ring_entry *entry,
                         ts_command *command, ts_answer *answer)
{
    const ts_service *s = r->rings->service;
    const ts_session *session = ts_engine_session(s->exec.engine, c->session);
    char kernel[sizeof entry->begin.kernel + 1] = "";
    uint64_t blocks = 0;
    uint32_t count = entry->begin.count, pool = entry->begin.pool;
    command->op = TS_OP_STEP_BEGIN;
    command->pool = pool;
    memcpy(kernel, entry->begin.kernel, sizeof entry->begin.kernel);
    if (!ts_decode_kernel(kernel, &command->step_begin.kernel, answer))
        return false;
    if (count > TS_RING_BATCH) {
        ts_refuse(answer, TS_EINVAL, "a begin of %u sequences on a ring; it takes %u", count,
                  TS_RING_BATCH);
        return false;
    }
    if (pool < s->exec.engine->num_pools &&
        s->exec.engine->pools[pool].books.num_slabs > r->max_slabs) {
        ts_refuse(answer, TS_EINVAL, "a begin on a ring in a pool of %u slabs; it can tell of %u",
                  s->exec.engine->pools[pool].books.num_slabs, r->max_slabs);
        return false;
    }
    if (session == NULL || pool >= s->exec.engine->num_pools ||
        !(session->opened_pools >> pool & 1))
        return true; /* the engine refuses it */
    copy_batch(r, count, true);
    for (uint32_t i = 0; i < count; i++)
        blocks += ts_ring_blocks(r->rings->words[i],
                                 s->exec.engine->pools[pool].config.geometry.block_tokens);
    if (blocks > r->max_blocks) {
        ts_refuse(answer, TS_EINVAL,
                  "a begin that touches up to %llu blocks on a ring; it takes %u",
                  (unsigned long long)blocks, r->max_blocks);
        return false;
    }
    if ((entry->begin.flags & TS_RING_TOKENS) &&
        !copy_ids(r, count, &command->step_begin.tokens, answer))
        return false;
    command->step_begin.seqs = r->rings->seqs;
    command->step_begin.new_tokens = r->rings->words;
    command->step_begin.count = count;
    command->step_begin.heads = entry->begin.heads;
    command->step_begin.io_dtype = entry->begin.io_dtype;
    command->step_begin.scale = entry->begin.scale;
    command->step_begin.wait = entry->begin.wait_ms > 0;
    command->step_begin.priority = entry->begin.priority;
    command->step_begin.by_worker = entry->begin.flags & TS_RING_TABLES;
    return true;
}

static bool decode_select(ts_ring *r, const ts_ring_entry *entry, ts_command *command,
                          ts_answer *answer)
{
    const uint32_t of = entry->seqs.length, picked = entry->seqs.count;
    if (of > TS_RING_BATCH) {
        ts_refuse(answer, TS_EINVAL, "a selection of %u sequences on a ring; it takes %u", of,
                  TS_RING_BATCH);
        return false;
    }
    copy_batch(r, of > picked ? of : picked, true);
    command->op = TS_OP_SEQ_SELECT;
    command->seq_select.seqs = r->rings->seqs;
    command->seq_select.count = of;
    command->seq_select.from = r->rings->words;
    command->seq_select.picked = picked;
    return true;
}

static bool decode_match(ts_ring *r, const ts_ring_entry *entry, ts_command *command,
                         ts_answer *answer)
{
    copy_batch(r, entry->seqs.count, false);
    command->op = TS_OP_SEQ_MATCH;
    command->seq_match.counts = r->rings->words;
    command->seq_match.count = entry->seqs.count;
    command->seq_match.space = (ts_space_name){entry->seqs.space, entry->seqs.space_bytes};
    command->seq_match.dry = entry->seqs.flags & TS_RING_DRY;
    command->seq_match.wait = entry->seqs.wait_ms > 0;
    return copy_ids(r, entry->seqs.count, &command->seq_match.tokens, answer);
}

/* What is done to sequences. */
static bool decode_seqs(ts_ring *r, const ts_ring_entry *entry, ts_command *command,
                        ts_answer *answer)
{
    const ts_space_name space = {entry->seqs.space, entry->seqs.space_bytes};
    const uint32_t count = entry->seqs.count;
    command->pool = entry->seqs.pool;
    if (count > TS_RING_BATCH || space.count > sizeof entry->seqs.space) {
        ts_refuse(answer, TS_EINVAL,
                  "%u sequences and a namespace of %zu bytes on a ring; it takes %u and %zu", count,
                  space.count, TS_RING_BATCH, sizeof entry->seqs.space);
        return false;
    }
    switch (entry->op) {
    case TS_RING_SEQ_CREATE:
        command->op = TS_OP_SEQ_CREATE;
        command->seq_create.count = count;
        command->seq_create.space = space;
        return true;
    case TS_RING_SEQ_FORK:
        command->op = TS_OP_SEQ_FORK;
        command->seq_fork.parent = entry->seqs.parent;
        command->seq_fork.count = count;
        command->seq_fork.length = entry->seqs.length;
        command->seq_fork.has_length = entry->seqs.flags & TS_RING_HAS_LENGTH;
        return true;
    case TS_RING_SEQ_SELECT:
        return decode_select(r, entry, command, answer);
    case TS_RING_SEQ_MATCH:
        return decode_match(r, entry, command, answer);
    default:
        copy_batch(r, count, true);
        command->op = entry->op == TS_RING_SEQ_FREE ? TS_OP_SEQ_FREE : TS_OP_SEQ_TRUNCATE;
        command->seq_batch.seqs = r->rings->seqs;
        command->seq_batch.lengths = r->rings->words;
        command->seq_batch.count = count;
        command->seq_batch.forget = entry->seqs.flags & TS_RING_FORGET;
        command->seq_batch.by_counts = entry->seqs.flags & TS_RING_BY_COUNTS;
        return true;
    }
}

/* Lays out what was answered. */
static void encode_seqs(ts_ring *r, const ts_command *command, const ts_answer *answer)
{
    ts_rings_memory *m = r->shared;
    if (command->op == TS_OP_SEQ_CREATE || command->op == TS_OP_SEQ_FORK ||
        command->op == TS_OP_SEQ_SELECT) {
        memcpy(m->batch_seqs, answer->seqs.seqs, answer->seqs.count * sizeof *m->batch_seqs);
    } else if (command->op == TS_OP_SEQ_MATCH) {
        const uint32_t count = answer->matched.count;
        memcpy(m->begun_starts, answer->matched.lengths, count * sizeof *m->begun_starts);
        if (answer->matched.twins != NULL)
            memcpy(m->begun_counts, answer->matched.twins, count * sizeof *m->begun_counts);
        if (answer->matched.seqs != NULL)
            memcpy(m->batch_seqs, answer->matched.seqs, count * sizeof *m->batch_seqs);
    }
}

static bool decode(ts_ring *r, ts_connection *c, const ts_ring_entry *entry, ts_command *command,
                   ts_answer *answer)
{
    *command = (ts_command){.session = c->session, .call = entry->call};
    switch (entry->op) {
    case TS_RING_BEGIN:
        return decode_begin(r, c, entry, command, answer);
    case TS_RING_RUN:
        command->op = TS_OP_STEP_RUN;
        command->step_run.step = entry->step;
        command->step_run.run = entry->run;
        return true;
    case TS_RING_COMMIT:
        command->op = TS_OP_STEP_COMMIT;
        command->step_end.step = entry->step;
        if (entry->commit.count > TS_RING_BATCH) {
            ts_refuse(answer, TS_EINVAL, "%u accepted counts on a ring; it takes %u",
                      entry->commit.count, TS_RING_BATCH);
            return false;
        }
        copy_batch(r, entry->commit.count, false);
        command->step_end.accepted = entry->commit.count > 0 ? r->rings->words : NULL;
        command->step_end.count = entry->commit.count;
        return true;
    case TS_RING_ABORT:
        command->op = TS_OP_STEP_ABORT;
        command->step_end.step = entry->step;
        return true;
    case TS_RING_SEQ_CREATE:
    case TS_RING_SEQ_FORK:
    case TS_RING_SEQ_MATCH:
    case TS_RING_SEQ_FREE:
    case TS_RING_SEQ_TRUNCATE:
    case TS_RING_SEQ_SELECT:
        return decode_seqs(r, entry, command, answer);
    default:
        ts_refuse(answer, TS_EPROTO, "a ring has no operation %u", entry->op);
        return false;
    }
}

static uint32_t table_end(const ts_step_seq *part, const ts_sequences *seqs)
{
    return ts_blocks_for((uint64_t)part->start + part->new_tokens, seqs->block_tokens);
}

/* Copies what the client lacks of the step's block tables to rings->tables: of each from entry
 * rings->firsts on, rings->words of them; nothing of a sequence without new tokens. Returns the
 * sum; if it is too much, not all was copied.
 */
static uint64_t copy_tables(const ts_ring *r, const ts_step *step, const ts_sequences *seqs)
{
    ts_rings *rings = r->rings;
    uint64_t all = 0;
    for (uint32_t i = 0; i < step->num_seqs; i++) {
        const ts_step_seq *part = &step->seqs[i];
        rings->firsts[i] = rings->words[i] = 0;
        if (part->new_tokens == 0)
            continue;
        uint64_t told = __atomic_load_n(&r->shared->batch_known_step[i], __ATOMIC_RELAXED);
        uint32_t known = ts_sequence_known(&seqs->all[part->seq], told);
        uint32_t touched = (uint32_t)ts_whole_blocks(part->start, seqs->block_tokens);
        uint32_t first = known < touched ? known : touched;
        uint32_t n = table_end(part, seqs) - first;
        if (all + n <= r->max_blocks)
            memcpy(rings->tables + all, part->table + first, n * sizeof *rings->tables);
        rings->firsts[i] = first;
        rings->words[i] = n;
        all += n;
    }
    return all;
}

/* The client knows the step's block tables now. */
static void note_told(const ts_step *step, ts_sequences *seqs)
{
    for (uint32_t i = 0; i < step->num_seqs; i++)
        if (step->seqs[i].new_tokens > 0)
            ts_sequence_tell(&seqs->all[step->seqs[i].seq], step->id,
                             table_end(&step->seqs[i], seqs));
}

/* Lays out what a begin has to tell. False, and the answer refuses: it can't. */
static bool encode_begin_reply(ts_ring *r, const ts_ring_entry *entry, ts_answer *answer,
                               ts_ring_completion *done)
{
    ts_service *s = r->rings->service;
    const ts_step *step = answer->begun.step;
    ts_sequences *seqs = &s->exec.engine->pools[step->pool].seqs;
    const uint32_t *blocks = answer->begun.blocks, *counts = answer->begun.counts;
    uint64_t num_blocks = answer->begun.num_blocks;
    bool tables = entry->begin.flags & TS_RING_TABLES;
    if (tables) {
        num_blocks = copy_tables(r, step, seqs);
        blocks = r->rings->tables;
        counts = r->rings->words;
    }
    if (num_blocks > r->max_blocks) {
        ts_refuse(answer, TS_EINVAL, "block tables of %llu entries; a ring can tell of %u",
                  (unsigned long long)num_blocks, r->max_blocks);
        return false;
    }
    if (!ts_slab_list_fill(&s->slab_list, &s->exec, step->pool, blocks, num_blocks)) {
        ts_refuse(answer, TS_ENOMEM, "no memory for the answer");
        return false;
    }
    memcpy(r->shared->begun_starts, answer->begun.starts,
           answer->begun.num_seqs * sizeof(uint32_t));
    memcpy(r->shared->begun_counts, counts, answer->begun.num_seqs * sizeof(uint32_t));
    memcpy(r->blocks, blocks, num_blocks * sizeof(uint32_t));
    if (tables) {
        memcpy(r->shared->begun_firsts, r->rings->firsts,
               answer->begun.num_seqs * sizeof(uint32_t));
        note_told(step, seqs);
    }
    for (size_t i = 0; i < s->slab_list.count; i++) {
        const Tspb__Slab *slab = s->slab_list.pointers[i];
        r->slabs[i] = (ts_ring_slab){slab->slab, slab->generation};
    }
    done->step = step->id;
    done->num_blocks = (uint32_t)num_blocks;
    done->num_slabs = (uint32_t)s->slab_list.count;
    return true;
}

static void count_refusal(ts_service *s, const ts_ring_entry *entry, ts_status status)
{
    static const Tspb__Request__BodyCase operations[] = {
        [TS_RING_BEGIN] = TSPB__REQUEST__BODY_STEP_BEGIN,
        [TS_RING_RUN] = TSPB__REQUEST__BODY_STEP_RUN,
        [TS_RING_COMMIT] = TSPB__REQUEST__BODY_STEP_COMMIT,
        [TS_RING_ABORT] = TSPB__REQUEST__BODY_STEP_ABORT,
        [TS_RING_SEQ_CREATE] = TSPB__REQUEST__BODY_SEQ_CREATE,
        [TS_RING_SEQ_FORK] = TSPB__REQUEST__BODY_SEQ_FORK,
        [TS_RING_SEQ_MATCH] = TSPB__REQUEST__BODY_SEQ_MATCH,
        [TS_RING_SEQ_FREE] = TSPB__REQUEST__BODY_SEQ_FREE,
        [TS_RING_SEQ_TRUNCATE] = TSPB__REQUEST__BODY_SEQ_TRUNCATE,
        [TS_RING_SEQ_SELECT] = TSPB__REQUEST__BODY_SEQ_SELECT,
    };
    bool known = entry->op < sizeof operations / sizeof *operations;
    if (entry->op == TS_RING_BEGIN)
        ts_refused_in(s, TSPB__REQUEST__BODY_STEP_BEGIN, entry->begin.pool, status);
    else if (known && entry->op >= TS_RING_SEQ_CREATE)
        ts_refused_in(s, operations[entry->op], entry->seqs.pool, status);
    else
        ts_refused_step(s, known ? operations[entry->op] : TSPB__REQUEST__BODY__NOT_SET,
                        entry->step, status);
}

/* How long the entry may wait. */
static uint32_t wait_of(const ts_ring_entry *entry)
{
    if (entry->op == TS_RING_BEGIN)
        return entry->begin.wait_ms;
    return entry->op == TS_RING_SEQ_MATCH ? entry->seqs.wait_ms : 0;
}

static void go_on(ts_parked *parked);
static void drop(ts_parked *parked);

/* The entry waits, and what follows it. */
static void park(ts_ring *r, ts_connection *c, const ts_ring_entry *entry)
{
    r->parked = true;
    r->wait.go_on = go_on;
    r->wait.drop = drop;
    ts_parked_add(r->rings->service, c, &r->wait, wait_of(entry));
}

/* An entry on its way to its completion. */
typedef struct entry_call {
    ts_ring *ring;
    ts_connection *connection;
    const ts_ring_entry *entry;
    ts_command command;
    ts_answer answer;
    ts_completion completion;
    ts_ring_completion done;
    bool known; /* a run that the kernels have: its answer was lost with an earlier daemon */
    bool waits; /* for the kernels, which complete it */
} entry_call;

/* A run that its worker doesn't wait for. */
static bool is_posted(const ts_ring_entry *entry)
{
    const uint32_t both = TS_RUN_ON_STREAM | TS_RUN_POSTED;
    return entry->op == TS_RING_RUN && (entry->run.flags & both) == both;
}

/* Applies what the entry asks for, or refuses it. False: it must wait. */
static bool apply(entry_call *call)
{
    ts_ring *r = call->ring;
    ts_connection *c = call->connection;
    const ts_ring_entry *entry = call->entry;
    ts_service *s = r->rings->service;
    ts_command *command = &call->command;
    ts_answer *answer = &call->answer;
    if (!decode(r, c, entry, command, answer) ||
        !ts_parked_prepare(s, c, &r->wait, wait_of(entry), command, answer))
        return true;
    if (ts_step_work_must_wait(&s->exec, command))
        return false;
    const bool run = entry->op == TS_RING_RUN;
    call->known = run && ts_engine_run_is_known(s->exec.engine, command);
    if (!call->known && (!run || ts_step_work_check_run(&s->exec, &c->memory, command, answer)))
        ts_exec_supply(&s->exec, command, answer);
    if (answer->status == TS_WAITS)
        park(r, c, entry);
    if (answer->status != TS_OK && is_posted(entry) && ts_stream_run_refusal_waits(&c->memory))
        return false;
    return answer->status != TS_NEED_SWEEP && answer->status != TS_WAITS;
}

/* Hands what was accepted to the kernels, and lays out what it is answered. Without memory it is
 * undone and refused. */
static void hand_on(entry_call *call)
{
    ts_ring *r = call->ring;
    ts_exec *x = &r->rings->service->exec;
    const ts_ring_entry *entry = call->entry;
    ts_answer *answer = &call->answer;
    bool well = true;
    uint64_t step = 0;
    if (entry->op == TS_RING_RUN && !call->known) {
        step = answer->step->id;
        call->waits = !(call->command.step_run.run.flags & TS_RUN_ON_STREAM);
        well = ts_step_work_run(x, &call->connection->memory, &call->completion, &call->command,
                                answer->step);
    } else if (entry->op == TS_RING_BEGIN) {
        step = answer->begun.step->id;
        call->waits = answer->begun.num_copies > 0;
        well = encode_begin_reply(r, entry, answer, &call->done);
        if (well && call->waits) {
            r->begun = call->done;
            well = ts_step_work_copy(x, &call->completion, answer);
        }
    } else if (entry->op >= TS_RING_SEQ_CREATE) {
        encode_seqs(r, &call->command, answer);
    }
    if (well)
        return;
    ts_step_work_undo(x, &call->command, step);
    if (answer->status == TS_OK)
        ts_refuse(answer, TS_ENOMEM, "no memory for the answer");
    call->done = (ts_ring_completion){.tag = entry->tag};
    call->waits = false;
}

/* Does what one entry asks for. False: it must wait. */
static bool execute(ts_ring *r, ts_connection *c, const ts_ring_entry *entry)
{
    entry_call call;
    call.ring = r;
    call.connection = c;
    call.entry = entry;
    call.answer = (ts_answer){0};
    call.completion = (ts_completion){.done = on_done,
                                      .submit = submit,
                                      .context = r,
                                      .taken_ns = ts_now_ns(),
                                      .tag = entry->tag};
    call.done = (ts_ring_completion){.tag = entry->tag};
    call.known = call.waits = false;
    if (!apply(&call))
        return false;
    r->wait.deadline_ms = 0;
    if (call.answer.status == TS_OK)
        hand_on(&call);
    if (call.answer.status != TS_OK && is_posted(entry))
        ts_stream_run_refuse(&r->rings->service->exec, &c->memory, &call.command, &call.answer);
    c->requests++;
    r->rings->service->requests++;
    count_refusal(r->rings->service, entry, call.answer.status);
    if (call.waits) {
        (void)ts_ring_use(r); /* until on_done */
        return true;
    }
    const ts_amounts *amounts = &call.answer.amounts;
    ts_ring_completion *done = &call.done;
    done->status = (uint32_t)call.answer.status;
    done->needed = amounts->needed;
    done->free = amounts->free;
    done->limit = amounts->limit;
    done->cached = amounts->cached;
    done->pinned = amounts->pinned;
    done->others = amounts->others;
    memcpy(done->message, call.answer.message, sizeof done->message);
    complete(r, done, call.completion.taken_ns);
    return true;
}

static void take(ts_ring *r)
{
    ts_connection *c = ts_service_connection(r->rings->service, r->pipe);
    if (c == NULL || c->session == 0 || atomic_load(&r->closed) || atomic_load(&r->blocked))
        return;
    ts_rings_memory *m = r->shared;
    for (uint32_t i = 0; i < ENTRIES_PER_TURN; i++) {
        uint32_t taken = atomic_load(&r->taken);
        uint32_t tail = __atomic_load_n(&m->submissions.tail, __ATOMIC_ACQUIRE);
        uint32_t head = __atomic_load_n(&m->completions.head, __ATOMIC_ACQUIRE);
        if (tail - taken > TS_RING_ENTRIES)
            return refuse_ring(r, "what is submitted and not taken", tail - taken);
        if (taken - head > TS_RING_ENTRIES)
            return refuse_ring(r, "what is taken and not seen completed", taken - head);
        if (tail == taken || taken - head == TS_RING_ENTRIES)
            return;
        ts_ring_entry entry;
        memcpy(&entry, &m->submitted[taken & MASK], sizeof entry);
        __asm__ volatile("" ::: "memory"); /* checks below look at the copy */
        r->taking = true;
        const bool done = execute(r, c, &entry);
        r->taking = false;
        if (!done) {
            atomic_store(&r->blocked, true);
            r->rings->num_blocked++;
            return;
        }
        atomic_store(&r->taken, taken + 1);
        __atomic_store_n(&m->submissions.head, taken + 1, __ATOMIC_RELEASE);
        if (entry.op == TS_RING_RUN)
            return;
    }
}

void ts_ring_take_all(ts_ring *r)
{
    const uint32_t tail = __atomic_load_n(&r->shared->submissions.tail, __ATOMIC_ACQUIRE);
    for (uint32_t taken = tail + 1; !r->taking && taken != atomic_load(&r->taken);) {
        taken = atomic_load(&r->taken);
        if ((int32_t)(tail - taken) > 0)
            take(r);
    }
}

void ts_ring_take(ts_work *work, void *service)
{
    ts_ring *r = (ts_ring *)((char *)work - offsetof(ts_ring, work));
    (void)service;
    atomic_store(&r->queued, false);
    take(r);
}

static ts_ring *no_longer_parked(ts_parked *parked)
{
    ts_ring *r = (ts_ring *)((char *)parked - offsetof(ts_ring, wait));
    r->parked = false;
    atomic_store(&r->blocked, false);
    r->rings->num_blocked--;
    return r;
}

static void go_on(ts_parked *parked)
{
    ts_ring *r = no_longer_parked(parked);
    take(r);
    ts_ring_look(r); /* the thread may sleep: for what is left */
}

static void drop(ts_parked *parked)
{
    (void)no_longer_parked(parked);
}
