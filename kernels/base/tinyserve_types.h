/*
 * The words that every part of TinyServe shares: status codes, element types and the geometry of a
 * paged KV cache. Plain data, no functions with state; installed beside tinyserve.h.
 */
#ifndef TINYSERVE_TYPES_H
#define TINYSERVE_TYPES_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Of functions whose status must be looked at: the compiler warns where it isn't. */
#if defined(__GNUC__)
#define TS_WARN_UNUSED __attribute__((warn_unused_result))
#else
#define TS_WARN_UNUSED
#endif

/* What a call came to. The numbers are part of the wire protocol: append only. */
typedef enum ts_status {
    TS_OK = 0,
    TS_EINVAL = 1,  /* an argument is malformed or out of range */
    TS_ENOENT = 2,  /* no such pool, sequence, step, name or session */
    TS_EEXIST = 3,  /* the name is taken */
    TS_ENOSPC = 4,  /* the pool has too few free blocks; nothing was taken */
    TS_EQUOTA = 5,  /* a limit of this session or tenant would be passed; nothing was taken */
    TS_EBUSY = 6,   /* the sequence is in an open step, the step has a run in flight, or another
                       thread is inside a call on the client */
    TS_EPERM = 7,   /* it belongs to somebody else, or the configuration forbids it */
    TS_ESTALE = 8,  /* a repeated request whose first answer is no longer kept */
    TS_EPROTO = 9,  /* the message could not be understood, or a protocol version is not spoken */
    TS_ENOMEM = 10, /* memory or another system resource ran out */
    TS_ECONN = 11,  /* the daemon can't be reached, or went away: the session is over */
    TS_ETIMEOUT =
        12, /* no answer within the timeout; the request may or may not have been applied */
    TS_EDEVICE = 13,  /* the device (or its memory) failed */
    TS_EINTERNAL = 14 /* a bug in TinyServe */
} ts_status;

/* Element type of a cache, or of q, k, v and out in the exchange. */
typedef enum ts_dtype {
    TS_DTYPE_FP32 = 0,
    TS_DTYPE_FP16 = 1,
    TS_DTYPE_BF16 = 2,
    TS_DTYPE_FP8_E4M3 = 3 /* of a cache alone: up to 448, no infinity; what is beyond becomes 448 */
} ts_dtype;

/* Order of one layer's K (or V) inside a block. */
typedef enum ts_layout {
    TS_LAYOUT_NHD = 0, /* [block_tokens][kv_heads][head_dim] */
    TS_LAYOUT_HND = 1  /* [kv_heads][block_tokens][head_dim] */
} ts_layout;

#define TS_TICKET_BYTES 16u /* of what hands a sequence on: ts_seq_ticket */

#define TS_LAYERS_MAX 256u
#define TS_HEADS_MAX 1024u
#define TS_HEAD_DIM_MIN 32u
#define TS_HEAD_DIM_MAX 256u
#define TS_BLOCK_TOKENS_MAX 256u

/*
 * Shape of one model's cache. A block is [layers][2 (K,V)][one layer's tokens in `layout`],
 * contiguous, and of some sizes a little more; see ts_geometry_* for sizes and strides.
 */
typedef struct ts_geometry {
    uint32_t layers;       /* 1..256 */
    uint32_t kv_heads;     /* 1..1024 */
    uint32_t head_dim;     /* 32..256 */
    uint32_t block_tokens; /* 1..256 */
    ts_dtype dtype;
    ts_layout layout;
} ts_geometry;

/* Bytes of one element of a type that ts_dtype_name knows. */
static inline size_t ts_dtype_bytes(ts_dtype dtype)
{
    return dtype == TS_DTYPE_FP32 ? 4 : dtype == TS_DTYPE_FP8_E4M3 ? 1 : 2;
}

/* Bytes of one layer's K (or V) in one block. */
static inline size_t ts_geometry_plane_bytes(const ts_geometry *g)
{
    return (size_t)g->block_tokens * g->kv_heads * g->head_dim * ts_dtype_bytes(g->dtype);
}

/*
 * Bytes of one block, and so from one block to the next: all layers, K and V. Of 40 layers, say,
 * one layer's parts would lie multiples of 320 KiB apart, and an H100, whose memory is five stacks,
 * reads those at 0.8 of its rate: multiples of 80 KiB, and of 376 KiB for an H200's sake, are made
 * 1/64 to 1/32 longer, seldom twice that (kernels/doc/ has what was measured).
 */
static inline size_t ts_geometry_block_bytes(const ts_geometry *g)
{
    size_t bytes = ts_geometry_plane_bytes(g) * 2 * g->layers, more = 1;
    while (more * 64 <= bytes)
        more *= 2;
    while (bytes % (80 << 10) == 0 || bytes % (376 << 10) == 0)
        bytes += more;
    return bytes;
}

/* Bytes from one token's row to the next inside a plane, for one KV head. */
static inline size_t ts_geometry_token_stride(const ts_geometry *g)
{
    size_t row = (size_t)g->head_dim * ts_dtype_bytes(g->dtype);
    return g->layout == TS_LAYOUT_NHD ? row * g->kv_heads : row;
}

/* Bytes from one KV head to the next inside a plane, for one token. */
static inline size_t ts_geometry_head_stride(const ts_geometry *g)
{
    size_t row = (size_t)g->head_dim * ts_dtype_bytes(g->dtype);
    return g->layout == TS_LAYOUT_NHD ? row : row * g->block_tokens;
}

/*
 * Blocks in one slab: as many whole blocks as come near `slab_bytes`, at least one, and so many
 * that the slab is a multiple of `granule` bytes (a power of two: a page, say) and can be mapped on
 * its own.
 */
uint32_t ts_geometry_slab_blocks(const ts_geometry *g, size_t slab_bytes, size_t granule);

/*
 * TS_OK, or TS_EINVAL with a sentence in `why` (`why_bytes` long) that names the field, its value
 * and the limit.
 */
TS_WARN_UNUSED ts_status ts_geometry_check(const ts_geometry *g, char *why, size_t why_bytes);

/* "TS_ENOSPC", and so on; never NULL. */
const char *ts_status_name(ts_status status);

/* Whether q, k, v and out in the exchange may be of type `io` where the cache is of type `cache`:
 * fp32, the cache's own, and beside an fp8 cache either 16-bit type. */
int ts_dtype_is_io(ts_dtype io, ts_dtype cache);

/* "fp32", "fp16", "bf16", "fp8_e4m3"; NULL if there is none. */
const char *ts_dtype_name(ts_dtype dtype);

#ifdef __cplusplus
}
#endif
#endif
