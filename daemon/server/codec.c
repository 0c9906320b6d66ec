#include "codec.h"

#include "plain_text.h"

#include <stdio.h>
#include <string.h>

static bool counts_agree(const char *what, size_t a, size_t b, ts_answer *answer)
{
    if (a == b)
        return true;
    ts_refuse(answer, TS_EINVAL, "%zu sequences, but %zu %s", a, b, what);
    return false;
}

bool ts_decode_kernel(const char *name, ts_kernel *kernel, ts_answer *a)
{
    *kernel = name[0] == '\0' ? TS_KERNEL_AUTO : ts_kernel_find(name);
    if (*kernel != TS_KERNEL_COUNT)
        return true;
    char known[64] = "";
    for (int i = 0; i < TS_KERNEL_COUNT; i++) {
        size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, "%s%s", i == 0 ? "" : ", ",
                 ts_kernel_name((ts_kernel)i));
    }
    ts_refuse(a, TS_EINVAL, "there is no kernel '%.32s'; known are %s", name, known);
    return false;
}

bool ts_decode_plain(const Tspb__Request *r, ts_answer *a)
{
    const char *string, *field = NULL;
    char shown[160];
    if (r->body_case != TSPB__REQUEST__BODY_SESSION_OPEN)
        field = ts_text_find_not_plain(&r->base, &string);
    if (field != NULL)
        ts_refuse(a, TS_EINVAL,
                  "%s '%s' has control characters, or isn't UTF-8: it must be plain text", field,
                  ts_text_escape(string, shown, sizeof shown));
    return field == NULL;
}

bool ts_decode(const Tspb__Request *r, uint64_t session, ts_command *c, ts_answer *a)
{
    *c = (ts_command){.session = session};
    a->status = TS_OK;
    switch (r->body_case) {
    case TSPB__REQUEST__BODY_EXCHANGE_OPEN:
        c->op = TS_OP_EXCHANGE_OPEN;
        c->exchange_open.bytes = r->exchange_open->bytes;
        return true;
    case TSPB__REQUEST__BODY_POOL_OPEN:
        c->op = TS_OP_POOL_OPEN;
        c->pool_open.name = r->pool_open->name;
        c->pool_open.writable = r->pool_open->writable;
        return true;
    case TSPB__REQUEST__BODY_POOL_CLOSE:
        c->op = TS_OP_POOL_CLOSE;
        c->pool = r->pool_close->pool;
        return true;
    case TSPB__REQUEST__BODY_SEQ_CREATE:
        c->op = TS_OP_SEQ_CREATE;
        c->pool = r->seq_create->pool;
        c->seq_create.count = r->seq_create->count;
        return true;
    case TSPB__REQUEST__BODY_SEQ_FORK:
        c->op = TS_OP_SEQ_FORK;
        c->pool = r->seq_fork->pool;
        c->seq_fork.parent = r->seq_fork->parent;
        c->seq_fork.count = r->seq_fork->count;
        c->seq_fork.length = r->seq_fork->length;
        c->seq_fork.has_length = r->seq_fork->has_length;
        return true;
    case TSPB__REQUEST__BODY_SEQ_FREE:
        c->op = TS_OP_SEQ_FREE;
        c->pool = r->seq_free->pool;
        c->seq_batch.seqs = r->seq_free->seqs;
        c->seq_batch.count = (uint32_t)r->seq_free->n_seqs;
        return true;
    case TSPB__REQUEST__BODY_SEQ_TRUNCATE:
        c->op = TS_OP_SEQ_TRUNCATE;
        c->pool = r->seq_truncate->pool;
        c->seq_batch.seqs = r->seq_truncate->seqs;
        c->seq_batch.lengths = r->seq_truncate->lengths;
        c->seq_batch.count = (uint32_t)r->seq_truncate->n_seqs;
        return counts_agree("lengths", r->seq_truncate->n_seqs, r->seq_truncate->n_lengths, a);
    case TSPB__REQUEST__BODY_SEQ_KEEP:
        c->op = TS_OP_SEQ_KEEP;
        c->pool = r->seq_keep->pool;
        c->seq_keep.seq = r->seq_keep->seq;
        c->seq_keep.name = r->seq_keep->name;
        return true;
    case TSPB__REQUEST__BODY_SEQ_ATTACH:
        c->op = TS_OP_SEQ_ATTACH;
        c->pool = r->seq_attach->pool;
        c->seq_keep.name = r->seq_attach->name;
        return true;
    case TSPB__REQUEST__BODY_SEQ_LENGTHS:
        c->op = TS_OP_SEQ_LENGTHS;
        c->pool = r->seq_lengths->pool;
        c->seq_batch.seqs = r->seq_lengths->seqs;
        c->seq_batch.count = (uint32_t)r->seq_lengths->n_seqs;
        return true;
    case TSPB__REQUEST__BODY_SEQ_BLOCKS:
        c->op = TS_OP_SEQ_BLOCKS;
        c->pool = r->seq_blocks->pool;
        c->seq_blocks.seq = r->seq_blocks->seq;
        c->seq_blocks.first = r->seq_blocks->first;
        c->seq_blocks.count = r->seq_blocks->count;
        return true;
    case TSPB__REQUEST__BODY_STEP_BEGIN:
        c->op = TS_OP_STEP_BEGIN;
        c->pool = r->step_begin->pool;
        c->step_begin.seqs = r->step_begin->seqs;
        c->step_begin.new_tokens = r->step_begin->new_tokens;
        c->step_begin.count = (uint32_t)r->step_begin->n_seqs;
        c->step_begin.heads = r->step_begin->heads;
        c->step_begin.io_dtype = r->step_begin->io_dtype;
        c->step_begin.scale = r->step_begin->scale;
        c->step_begin.append = r->step_begin->append;
        return ts_decode_kernel(r->step_begin->kernel, &c->step_begin.kernel, a) &&
               counts_agree("new_tokens", r->step_begin->n_seqs, r->step_begin->n_new_tokens, a);
    case TSPB__REQUEST__BODY_STEP_RUN:
        c->op = TS_OP_STEP_RUN;
        c->step_run.step = r->step_run->step;
        c->step_run.layer = r->step_run->layer;
        c->step_run.q = r->step_run->q;
        c->step_run.k = r->step_run->k;
        c->step_run.v = r->step_run->v;
        c->step_run.out = r->step_run->out;
        c->step_run.sinks = r->step_run->sinks;
        c->step_run.scales = r->step_run->scales;
        c->step_run.has_scales = r->step_run->has_scales;
        c->step_run.alibi = r->step_run->alibi;
        c->step_run.lse = r->step_run->lse;
        c->step_run.has_sinks = r->step_run->has_sinks;
        c->step_run.has_alibi = r->step_run->has_alibi;
        c->step_run.has_lse = r->step_run->has_lse;
        c->step_run.variant =
            (ts_attention_variant){.scale = r->step_run->scale,
                                   .soft_cap = r->step_run->soft_cap,
                                   .window = r->step_run->window,
                                   .rope = {r->step_run->rope_theta, r->step_run->rope_dims,
                                            r->step_run->rope_interleaved}};
        c->step_run.ordered = r->step_run->ordered;
        c->step_run.order = r->step_run->order;
        return true;
    case TSPB__REQUEST__BODY_STEP_COMMIT:
        c->op = TS_OP_STEP_COMMIT;
        c->step_end.step = r->step_commit->step;
        c->step_end.accepted = r->step_commit->n_accepted > 0 ? r->step_commit->accepted : NULL;
        c->step_end.count = (uint32_t)r->step_commit->n_accepted;
        return true;
    case TSPB__REQUEST__BODY_STEP_ABORT:
        c->op = TS_OP_STEP_ABORT;
        c->step_end.step = r->step_abort->step;
        return true;
    default:
        return false;
    }
}

static void encode_pool(const ts_engine *e, uint32_t index, Tspb__PoolOpened *p)
{
    const ts_pool_config *config = &e->pools[index].config;
    tspb__pool_opened__init(p);
    p->pool = index;
    p->layers = config->geometry.layers;
    p->kv_heads = config->geometry.kv_heads;
    p->head_dim = config->geometry.head_dim;
    p->block_tokens = config->geometry.block_tokens;
    p->dtype = config->geometry.dtype;
    p->layout = config->geometry.layout;
    p->num_blocks = config->num_blocks;
    p->max_blocks = e->pools[index].books.max_blocks;
    p->slab_blocks = config->slab_blocks;
    p->memory = (char *)config->memory;
    p->kernel = (char *)ts_kernel_name(config->kernel);
    p->device = (char *)config->device;
    p->sequence_tokens_max = config->sequence_tokens_max;
    if (config->on_gpu) {
        p->device_uuid.data = (uint8_t *)config->device_uuid;
        p->device_uuid.len = sizeof config->device_uuid;
    }
}

void ts_encode(const ts_engine *e, const ts_command *c, const ts_answer *a, Tspb__Reply *reply,
               ts_reply_body *body)
{
    reply->status = (uint32_t)a->status;
    reply->message = (char *)a->message;
    if (a->status != TS_OK)
        return;
    switch (c->op) {
    case TS_OP_POOL_OPEN:
        encode_pool(e, a->pool, &body->pool_opened);
        reply->body_case = TSPB__REPLY__BODY_POOL_OPENED;
        reply->pool_opened = &body->pool_opened;
        break;
    case TS_OP_SEQ_CREATE:
    case TS_OP_SEQ_FORK:
    case TS_OP_SEQ_ATTACH:
        tspb__seqs__init(&body->seqs);
        body->seqs.seqs = (uint64_t *)a->seqs.seqs;
        body->seqs.n_seqs = a->seqs.count;
        body->seqs.length = a->seqs.length;
        reply->body_case = TSPB__REPLY__BODY_SEQS;
        reply->seqs = &body->seqs;
        break;
    case TS_OP_SEQ_LENGTHS:
        tspb__lengths__init(&body->lengths);
        body->lengths.lengths = (uint32_t *)a->lengths.lengths;
        body->lengths.n_lengths = a->lengths.count;
        reply->body_case = TSPB__REPLY__BODY_LENGTHS;
        reply->lengths = &body->lengths;
        break;
    case TS_OP_SEQ_BLOCKS:
        tspb__blocks__init(&body->blocks);
        body->blocks.length = a->blocks.length;
        body->blocks.blocks = (uint32_t *)a->blocks.blocks;
        body->blocks.n_blocks = a->blocks.count;
        reply->body_case = TSPB__REPLY__BODY_BLOCKS;
        reply->blocks = &body->blocks;
        break;
    case TS_OP_STEP_BEGIN:
        tspb__step_begun__init(&body->step_begun);
        body->step_begun.step = c->step_begin.append ? 0 : a->begun.step->id;
        body->step_begun.starts = (uint32_t *)a->begun.starts;
        body->step_begun.n_starts = a->begun.num_seqs;
        body->step_begun.counts = (uint32_t *)a->begun.counts;
        body->step_begun.n_counts = a->begun.num_seqs;
        body->step_begun.blocks = (uint32_t *)a->begun.blocks;
        body->step_begun.n_blocks = a->begun.num_blocks;
        body->step_begun.copied_blocks = a->begun.num_copies;
        reply->body_case = TSPB__REPLY__BODY_STEP_BEGUN;
        reply->step_begun = &body->step_begun;
        break;
    default:
        break;
    }
}
