/*
 * What v5 and mma share: how a block finds its work, how K and V come in, and how chunks come
 * together.
 *
 * A block serves one chunk of one sequence's context for one KV head and a tile of rows (query
 * token x head of the group). How a context is cut depends on the sequence's own lengths (plan.cu),
 * so its bits are the same in any company. Warps' results are added up in order; if the sequence
 * has other chunks, the sums go to memory, and whichever block comes last adds up all chunks in
 * order.
 *
 * Where there are few rows, the chunk's tokens go to 4 warps in tiles of 16, in turn (8 where rows
 * are very long): every warp has a ring of tiles of its own in shared memory, filled by
 * asynchronous copies, and a softmax of its own, so no warp waits for another before the end.
 */
#ifndef TS_GPU_CHUNKS_CUH
#define TS_GPU_CHUNKS_CUH

#include "common.cuh"

namespace chunks
{

const uint32_t WARPS = 4, THREADS = WARPS * 32;

__device__ inline uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}
__device__ inline void commit_copies()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int LATER> __device__ inline void await_copies()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}

/* What a block works on. */
struct job {
    gpu_seq s;
    const gpu_run *run;
    plan_seq p;
    uint32_t kv_head, tile, chunk;
    uint32_t chunks;                 /* of the piece: 1, or all of the sequence's */
    uint32_t first, rows;            /* of q, in this tile */
    uint32_t past;                   /* position of query token 0 */
    uint32_t begin, end;             /* tokens of the chunk that some row sees */
    uint32_t clear_begin, clear_end; /* ... that all rows see */
    bool once;                       /* nobody else reads these K and V in this launch */
};

/* What scores are multiplied by: an fp8 cache's K has a scale of its own. */
template <typename T> __device__ inline float score_scale(const gpu_call &c, const job &j)
{
    return scaled<T>::value ? c.scale_log2 * key_scale<T>(j.s, j.kv_head) : c.scale_log2;
}

/* Row r of the sequence: which query token, which head. QUICK: by a multiplication, where it is
 * done for many rows; decode's kernels, which need it once, are 2 % slower by that. */
template <bool QUICK = false> __device__ inline uint32_t query_of(const gpu_call &c, uint32_t row)
{
    return QUICK ? divide(row, c.groups) : row / c.group;
}
__device__ inline uint32_t head_of(const gpu_call &c, const job &j, uint32_t row)
{
    return j.kv_head * c.group + row % c.group;
}

/* Row r of this tile among all of the sequence's: query token * heads + head. */
template <bool QUICK = false>
__device__ inline uint32_t place_of(const gpu_call &c, const job &j, uint32_t r)
{
    uint32_t query = query_of<QUICK>(c, j.first + r);
    return query * c.heads + j.kv_head * c.group + j.first + r - query * c.group;
}

/* A piece of the run's and a KV head. RUNS: a piece may have several chunks. */
template <bool QUICK = false, bool RUNS = false>
__device__ inline void make_job(const gpu_call &c, const gpu_run &run, const plan_piece &piece,
                                uint32_t kv_head, uint32_t rows, job &j)
{
    j.kv_head = kv_head;
    j.run = &run;
    j.p = piece.seq;
    j.s = seq_of(c, *j.run, j.p);
    j.chunk = piece.chunk;
    j.tile = piece.tile;
    j.first = j.tile * rows;
    j.rows = min(rows, j.s.q_tokens * c.group - j.first);
    j.past = j.s.kv_tokens - j.s.q_tokens;
    j.chunks = RUNS ? chunks_of(piece) : 1;
    uint32_t from = j.chunk * j.p.chunk_tokens;
    uint32_t to = min(from + j.chunks * j.p.chunk_tokens, j.s.kv_tokens);
    uint32_t lowest = j.past + query_of<QUICK>(c, j.first);
    uint32_t highest = j.past + query_of<QUICK>(c, j.first + j.rows - 1);
    j.begin = max(from, first_key(c, lowest));
    j.end = min(to, highest + 1);
    j.clear_begin = first_key(c, highest);
    j.clear_end = lowest + 1;
    j.once = c.alone && is_alone(piece);
}

/* block: a piece's and a KV head's. */
__device__ inline const gpu_run &find_piece(const gpu_call &c, uint32_t block, plan_piece &piece)
{
    uint32_t index = block / c.kv_heads;
    const gpu_run &run = run_of(c, &index);
    piece = ((const plan_piece *)run.items)[index];
    return run;
}
template <bool RUNS = false>
__device__ inline void find_job(const gpu_call &c, uint32_t block, uint32_t rows, job &j)
{
    plan_piece piece;
    const gpu_run &run = find_piece(c, block, piece);
    make_job<false, RUNS>(c, run, piece, block % c.kv_heads, rows, j);
}

/* Works off a launch's pieces, one for each block of threads; those of a persistent plan, and has
 * others when the launch is repeated, in turn. */
template <typename K> __device__ inline void run_blocks(const gpu_call &c, unsigned char *shared)
{
    for (uint32_t block = blockIdx.x; c.items_there == NULL || block < *c.items_there * c.kv_heads;
         block += gridDim.x) {
        K::run(c, block, shared);
        if (c.items_there == NULL)
            break;
        __syncthreads(); /* nobody uses what the next piece takes */
    }
}

/* Writes the new tokens' K and V that lie in this piece's chunks. Every tile of rows does: the same
 * bytes, and each reads only what it wrote itself. */
template <typename T> __device__ void append(const gpu_call &c, const job &j, uint32_t threads)
{
    uint32_t from = max(j.chunk * j.p.chunk_tokens, j.past);
    uint32_t to = min((j.chunk + j.chunks) * j.p.chunk_tokens, j.s.kv_tokens);
    if (j.s.k == NULL || from >= to)
        return;
    for (uint32_t i = threadIdx.x; i < (to - from) * c.head_dim; i += threads) {
        uint32_t t = from + i / c.head_dim, d = i % c.head_dim;
        size_t row = ((size_t)(t - j.past) * c.kv_heads + j.kv_head) * c.head_dim;
        T *k = (T *)key_of(c, j.s, t, j.kv_head) + d;
        *k = to_cache<T>(turned<T>(c, j.s.k, row, d, t), key_scale<T>(j.s, j.kv_head));
        *(T *)((unsigned char *)k + c.plane_bytes) =
            to_cache<T>(io_load<T>(c, j.s.v, row + d), value_scale<T>(c, j.s, j.kv_head));
    }
    __syncthreads();
}

/* The address of a row's piece p + n (see loader) where `at` is that of piece p, whose lowest bits
 * n doesn't have. */
__device__ inline uint32_t turn(uint32_t at, uint32_t n)
{
    return (at ^ (n & 7) * 16) + n / 8 * 128;
}

/*
 * How a warp copies TOKENS tokens' rows of K and V, of PITCH bytes each, into shared memory. The
 * 16-byte pieces of a row are swizzled (piece p of token t lies at p ^ (t & 7)) so that neither
 * copies nor matrix loads have bank conflicts. Places are multiples of 128 bytes, so a piece
 * further by n is found by turning bits 4 to 6 of the address: see `turn`.
 */
template <int PITCH, int TOKENS> struct loader {
    static const uint32_t PIECES = PITCH / 16, LOADS = TOKENS * PIECES / 32; /* of a lane */
    static const bool IN_BLOCKS =
        PIECES <= 32; /* can take rows of one block without looking up each */

    const unsigned char *base; /* of the head's K in block 0 */
    size_t row;                /* behind it: this lane's first copy of the next tokens */
    uint32_t pieces, place_of_lane;
    bool in_block; /* TOKENS tokens lie in one block */

    __device__ static uint32_t place(uint32_t token, uint32_t piece)
    {
        return token * PITCH + (piece ^ (token & 7)) * 16;
    }

    __device__ void start(const gpu_call &c, const job &j)
    {
        uint32_t lane = threadIdx.x % 32;
        pieces = c.head_dim * c.cache_bytes / 16;
        base = c.base + j.s.layer * 2 * c.plane_bytes + j.kv_head * c.head_stride;
        in_block = IN_BLOCKS && c.block_tokens.d % TOKENS == 0;
        place_of_lane = place(lane / PIECES, lane % PIECES);
    }

    /* Finds the rows of the TOKENS tokens from `token` on, a multiple of TOKENS; `end` is past the
     * last that is wanted. */
    __device__ void look_up(const gpu_call &c, const job &j, uint32_t token, uint32_t end)
    {
        uint32_t lane = threadIdx.x % 32;
        uint32_t t = in_block ? token : min(token + lane % TOKENS, end - 1); /* the last again */
        uint32_t entry = divide(t, c.block_tokens), offset = t - entry * c.block_tokens.d;
        if (in_block)
            offset += lane / PIECES;
        row = j.s.blocks[entry] * c.block_bytes + offset * c.token_stride;
        if (in_block)
            row += lane % PIECES * 16;
    }

    /* A lane's pieces of tokens that lie in one block, ABREAST of them at once. */
    template <uint32_t ABREAST, bool ONCE>
    __device__ static void copy_rows(const gpu_call &c, uint32_t to, uint32_t plane,
                                     const unsigned char *k, const unsigned char *v, bool mine)
    {
#pragma unroll
        for (uint32_t i = 0; i < LOADS; i++) {
            uint32_t at = (to ^ (i * ABREAST & 7) * 16) + i * ABREAST * PITCH;
            if (mine) {
                cache_hints::copy_async(at, k, ONCE);
                cache_hints::copy_async(at + plane, v, ONCE);
            }
            k += ABREAST * c.token_stride;
            v += ABREAST * c.token_stride;
        }
    }

    /* Copies what was looked up to `to`, and V `plane` bytes further. What of a block lies past the
     * end comes along. HINTS: the second-level cache may be told that it is read once; only where
     * that is worth the registers. */
    template <bool HINTS>
    __device__ void issue(const gpu_call &c, const job &j, uint32_t to, uint32_t plane) const
    {
        uint32_t lane = threadIdx.x % 32;
        if (in_block) {
            const uint32_t ABREAST =
                IN_BLOCKS ? 32 / PIECES : 1; /* rows that a warp copies at once */
            const unsigned char *k = base + row, *v = k + c.plane_bytes;
            bool mine = lane % PIECES < pieces;
            to += place_of_lane;
            if (HINTS && j.once)
                copy_rows<ABREAST, true>(c, to, plane, k, v, mine);
            else
                copy_rows<ABREAST, false>(c, to, plane, k, v, mine);
            return;
        }
#pragma unroll 4
        for (uint32_t i = 0; i < LOADS; i++) {
            uint32_t token = (i * 32 + lane) / PIECES, piece = (i * 32 + lane) % PIECES;
            const unsigned char *from = base + __shfl_sync(~0u, row, (int)token) + piece * 16;
            if (piece < pieces) {
                uint32_t at = to + place(token, piece);
                cache_hints::copy_async(at, from, HINTS && j.once);
                cache_hints::copy_async(at + plane, from + c.plane_bytes, HINTS && j.once);
            }
        }
    }

    /* What lies in rows from `first` up to `end` of a plane is of no sequence's: it is to be 0, so
     * that it shows in no bit, whatever it was. */
    __device__ static void clear_rows(uint32_t plane, uint32_t first, uint32_t end, uint32_t thread,
                                      uint32_t threads)
    {
        for (uint32_t i = first * PIECES + thread; i < end * PIECES; i += threads)
            asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(plane + i * 16), "r"(0)
                         : "memory");
    }

    /* Where rows are shorter than PITCH, what lies behind them is to be 0. False: they are not. */
    __device__ bool clear(unsigned char *shared, uint32_t bytes, uint32_t thread, uint32_t threads)
    {
        if (pieces == PIECES)
            return false;
        for (uint32_t i = thread; i < bytes / 16; i += threads)
            *(uint4 *)(shared + i * 16) = make_uint4(0, 0, 0, 0);
        return true;
    }
};

/* A warp's way through its own tiles of the chunk: every WARPS-th. */
template <int PITCH, int TOKENS, int STAGES> struct ring {
    typedef loader<PITCH, TOKENS> rows;
    static const uint32_t PLANE = TOKENS * PITCH, TILE = 2 * PLANE, BYTES = TILE * STAGES;

    rows r;
    uint32_t first, last; /* places in shared memory */
    uint32_t from, to;    /* where the next is taken from, copied to */
    uint32_t next, end;   /* tokens */

    __device__ uint32_t after(uint32_t at) const
    {
        return at == last ? first : at + TILE;
    }

    __device__ void issue(const gpu_call &c, const job &j)
    {
        if (next < end) {
            r.template issue<true>(c, j, to, PLANE);
            to = after(to);
            next += WARPS * TOKENS;
            if (next < end)
                r.look_up(c, j, next, end);
        }
        commit_copies();
    }

    __device__ void start(const gpu_call &c, const job &j, unsigned char *shared)
    {
        uint32_t warp = threadIdx.x / 32;
        r.start(c, j);
        r.clear(shared + warp * BYTES, BYTES, threadIdx.x % 32, 32);
        __syncwarp();
        from = to = first = shared_address(shared + warp * BYTES);
        last = first + BYTES - TILE;
        next = j.begin / TOKENS * TOKENS + warp * TOKENS;
        end = j.end;
        if (next < end)
            r.look_up(c, j, next, end);
        for (int i = 0; i < STAGES - 1; i++)
            issue(c, j);
    }

    /* Waits for the next tile, whose K lies at the returned address and V one PLANE further, and
     * asks for one more. */
    __device__ uint32_t take(const gpu_call &c, const job &j)
    {
        await_copies<STAGES - 2>();
        __syncwarp(); /* all lanes' copies are there, and nobody reads the tile before this one */
        issue(c, j);
        uint32_t at = from;
        from = after(from);
        return at;
    }
};

/* 2^x, 0 for -infinity. */
__device__ inline float power(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* One row's state of one warp, or of one chunk. */
struct row_state {
    float max, sum;
};

/* Counts one chunk more, whose records the whole block has written, before a barrier; returns how
 * many there were, whose records can be read then. */
__device__ inline uint32_t arrive(uint32_t *counter)
{
    uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(counter)
                 : "memory");
    return before;
}

/*
 * How chunks' sums come together one after the other (`finish`'s RUNNING, and mma.cuh's pieces of
 * several chunks, which are to give the same bits). A factor is the next chunk's, or, if its sign
 * is set, that of what there is so far; the other one is 1. max: of what there is so far.
 */
__device__ inline float fold_factor(float max, float next)
{
    return next > max ? -rescale(max, next) : rescale(next, max);
}
__device__ inline float fold(float x, float next, float factor)
{
    bool rises = signbit(factor);
    return __fmaf_rn(rises ? x : next, fabsf(factor), rises ? next : x);
}

/* __syncthreads; but for ALL of the block's first threads alone. */
template <bool ALL> __device__ inline void sync_first(uint32_t threads)
{
    if (ALL)
        __syncthreads();
    else
        asm volatile("barrier.sync.aligned 0, %0;" ::"r"(threads) : "memory");
}

/* Four of a row's sums, from dimension d on, become output. */
template <typename T>
__device__ inline void store_sums(const gpu_call &c, const job &j, uint32_t place, uint32_t d,
                                  const row_state &row, float *x)
{
    float factor =
        finish_place(c, j.s, place, row.max, row.sum); /* all of the row write the same */
    factor *= value_scale<T>(c, j.s, j.kv_head);
    for (uint32_t e = 0; e < 4; e++)
        x[e] *= factor;
    io_store_four<T>(c, j.s.out, place * (size_t)c.head_dim + d, x, c.keeps_out);
}

/* The factors of a row's chunks for `fold`, by `width` lanes of which this is one. first: chunk 0's
 * record; stride: floats to the next one's. Returns the whole row's state. */
__device__ inline row_state fold_factors(const float *first, size_t stride, uint32_t num_chunks,
                                         uint32_t width, uint32_t lane, float *factors)
{
    row_state all = {-CUDART_INF_F, 0};
    for (uint32_t base = 0; base < num_chunks; base += width) {
        uint32_t i = base + lane;
        float2 part = make_float2(-CUDART_INF_F, 0);
        if (i < num_chunks)
            part = __ldcg((const float2 *)(first + i * stride));
        float upto = part.x; /* the highest of this chunk's and the earlier ones' */
        for (uint32_t step = 1; step < width; step *= 2) {
            float other = __shfl_up_sync(~0u, upto, step, width);
            upto = lane >= step ? fmaxf(upto, other) : upto;
        }
        float before = __shfl_up_sync(~0u, upto, 1, width);
        before = lane == 0 ? all.max : fmaxf(all.max, before);
        float factor = fold_factor(before, part.x);
        if (i < num_chunks)
            factors[i] = factor;
        for (uint32_t k = 0; k < width && base + k < num_chunks; k++)
            all.sum = fold(all.sum, __shfl_sync(~0u, part.y, k, width),
                           __shfl_sync(~0u, factor, k, width));
        all.max = fmaxf(all.max, __shfl_sync(~0u, upto, width - 1, width));
    }
    return all;
}

/* Where a sequence's partial rows lie, a record for each of its rows and chunks. */
__device__ inline float *records_of(const gpu_run &run, const plan_seq &p, uint32_t record)
{
    return run.partials + p.slot * (size_t)record;
}

/*
 * Adds up all chunks of a tile's rows, in order, and writes the output; by a block of `threads`
 * threads that share scratch, places and total: see `finish`. ALL, RUNNING: likewise.
 */
template <typename T, int DIM, int ROWS, bool ALL, bool RUNNING>
__device__ inline void merge(const gpu_call &c, const job &j, uint32_t threads,
                             const uint32_t *places, float *scratch, row_state *total)
{
    const uint32_t QUADS = DIM / 4, record = c.head_dim + 4, num_chunks = j.p.num_chunks;
    uint32_t all = j.s.q_tokens * c.heads; /* records of a chunk */
    const float *records = records_of(*j.run, j.p, record);
    /* Of few chunks, what this thread is to add up first is asked for now, before the factors are
     * known, where there are registers for it. */
    const int EARLY = ROWS * QUADS >= 512 || scaled<T>::value ? 0 : 4; /* chunks */
    bool few = num_chunks <= (uint32_t)EARLY;
    float4 early[EARLY + 1];
    if (few) {
        uint32_t quad = min(threadIdx.x, j.rows * QUADS - 1), d = quad % QUADS * 4;
        const float *from =
            records + places[quad / QUADS] * (size_t)record + 4 + (d < c.head_dim ? d : 0);
#pragma unroll
        for (int n = 0; n < EARLY; n++)
            if ((uint32_t)n < num_chunks)
                early[n] = __ldcg((const float4 *)(from + (size_t)n * all * record));
    }
    /* Each chunk's factor: a row is a few lanes', so that many rows' loads are under way. */
    uint32_t width = num_chunks <= 4 ? 4 : num_chunks <= 8 ? 8 : num_chunks <= 16 ? 16 : 32;
    uint32_t lane = threadIdx.x % width;
    for (uint32_t first = 0; first < j.rows; first += threads / width) {
        uint32_t r = min(first + threadIdx.x / width, j.rows - 1); /* the last again */
        const float *from = records + places[r] * (size_t)record;
        if (RUNNING) {
            row_state row = fold_factors(from, (size_t)all * record, num_chunks, width, lane,
                                         scratch + r * num_chunks);
            if (lane == 0)
                total[r] = row;
            continue;
        }
        float max = -CUDART_INF_F, sum = 0;
        for (uint32_t i = lane; i < num_chunks; i += width)
            max = fmaxf(max, __ldcg(from + (size_t)i * all * record));
        for (uint32_t step = width / 2; step > 0; step /= 2)
            max = fmaxf(max, __shfl_xor_sync(~0u, max, step));
        for (uint32_t i = lane; i < num_chunks; i += width) {
            float2 part = __ldcg((const float2 *)(from + (size_t)i * all * record));
            float factor = rescale(part.x, max);
            scratch[r * num_chunks + i] = factor;
            sum = __fmaf_rn(part.y, factor, sum);
        }
        for (uint32_t step = width / 2; step > 0; step /= 2)
            sum += __shfl_xor_sync(~0u, sum, step);
        if (lane == 0)
            total[r] = row_state{max, sum};
    }
    sync_first<ALL>(threads);
    /* Then the sums. A thread adds up some quads of different rows at once, for the same reason. */
    const uint32_t ABREAST = ROWS * QUADS >= 512 ? 4 : 1;
    for (uint32_t i = threadIdx.x; i < j.rows * QUADS; i += threads * ABREAST) {
        float x[ABREAST][4] = {};
        const float *from[ABREAST];
        uint32_t quad[ABREAST];
#pragma unroll
        for (uint32_t a = 0; a < ABREAST; a++) {
            quad[a] = min(i + a * threads, j.rows * QUADS - 1); /* the last again */
            uint32_t d = quad[a] % QUADS * 4;
            from[a] =
                records + places[quad[a] / QUADS] * (size_t)record + 4 + (d < c.head_dim ? d : 0);
        }
        auto add = [&](uint32_t a, uint32_t n, const float4 &y) {
            float factor = scratch[quad[a] / QUADS * num_chunks + n];
            if (RUNNING) {
                x[a][0] = fold(x[a][0], y.x, factor);
                x[a][1] = fold(x[a][1], y.y, factor);
                x[a][2] = fold(x[a][2], y.z, factor);
                x[a][3] = fold(x[a][3], y.w, factor);
                return;
            }
            x[a][0] = __fmaf_rn(y.x, factor, x[a][0]);
            x[a][1] = __fmaf_rn(y.y, factor, x[a][1]);
            x[a][2] = __fmaf_rn(y.z, factor, x[a][2]);
            x[a][3] = __fmaf_rn(y.w, factor, x[a][3]);
        };
        if (few && i == threadIdx.x) {
#pragma unroll
            for (int n = 0; n < EARLY; n++)
                if ((uint32_t)n < num_chunks)
                    add(0, (uint32_t)n, early[n]);
        } else {
#pragma unroll(16 / ABREAST)
            for (uint32_t n = 0; n < num_chunks; n++)
#pragma unroll
                for (uint32_t a = 0; a < ABREAST; a++)
                    add(a, n, __ldcg((const float4 *)(from[a] + (size_t)n * all * record)));
        }
#pragma unroll
        for (uint32_t a = 0; a < ABREAST; a++) {
            uint32_t r = quad[a] / QUADS, d = quad[a] % QUADS * 4;
            if (i + a * threads >= j.rows * QUADS || d >= c.head_dim)
                continue;
            store_sums<T>(c, j, places[r], d, total[r], x[a]);
        }
    }
}

/* What PARTS warps have of row r comes together, in order: its state, and its sums from dimension d
 * on. See `finish`. */
template <int ROWS, int PARTS>
__device__ inline row_state add_parts(const row_state (*states)[ROWS], const float *sums,
                                      uint32_t pitch, uint32_t r, uint32_t d, float *x)
{
    row_state row = {-CUDART_INF_F, 0};
#pragma unroll
    for (uint32_t w = 0; w < PARTS; w++)
        row.max = fmaxf(row.max, states[w][r].max);
    for (uint32_t w = 0; w < PARTS; w++) {
        float factor = rescale(states[w][r].max, row.max);
        float4 y = *(const float4 *)&sums[((size_t)w * ROWS + r) * pitch + d];
        row.sum = __fmaf_rn(states[w][r].sum, factor, row.sum); /* told whole: mma.cuh has it too */
        x[0] = __fmaf_rn(y.x, factor, x[0]);
        x[1] = __fmaf_rn(y.y, factor, x[1]);
        x[2] = __fmaf_rn(y.z, factor, x[2]);
        x[3] = __fmaf_rn(y.w, factor, x[3]);
    }
    return row;
}

/* A row's record: its state, and four of its sums. */
__device__ inline void store_record(const gpu_call &c, float *to, uint32_t d, const row_state &row,
                                    const float *x)
{
    cache_hints::store(to + 4 + d, make_float4(x[0], x[1], x[2], x[3]), c.keeps_partials);
    if (d == 0)
        cache_hints::store(to, make_float4(row.max, row.sum, 0, 0), c.keeps_partials);
}

/*
 * The end of a block of `threads` threads: states[w][r] and sums[w][r][d] (rows of `pitch` floats,
 * a multiple of 4) in shared memory are what PARTS warps have for each of ROWS rows. scratch has
 * room for a float for every row and chunk of the sequence; `total` for every row. ALL: they are
 * all of the block's threads; else the first of them. RUNNING: chunks are added up by `fold`; else
 * each is multiplied by a factor that comes from the highest maximum of all.
 */
template <typename T, int DIM, int ROWS, int PARTS, bool ALL = true, bool RUNNING = false>
__device__ void finish(const gpu_call &c, const job &j, uint32_t threads,
                       const row_state (*states)[ROWS], const float *sums, uint32_t pitch,
                       float *scratch, row_state *total)
{
    __shared__ bool last;
    __shared__ uint32_t places[ROWS];
    const uint32_t QUADS = DIM / 4, record = c.head_dim + 4, num_chunks = j.p.num_chunks;
    for (uint32_t r = threadIdx.x; r < j.rows; r += threads)
        places[r] = place_of(c, j, r);
    sync_first<ALL>(threads);
    uint32_t all = j.s.q_tokens * c.heads; /* records of a chunk */
    float *ours = records_of(*j.run, j.p, record) + (size_t)j.chunk * all * record;
    for (uint32_t i = threadIdx.x; i < j.rows * QUADS; i += threads) {
        uint32_t r = i / QUADS, d = i % QUADS * 4;
        if (d >= c.head_dim)
            continue;
        float x[4] = {};
        row_state row = add_parts<ROWS, PARTS>(states, sums, pitch, r, d, x);
        if (num_chunks == 1) {
            store_sums<T>(c, j, places[r], d, row, x);
            continue;
        }
        store_record(c, ours + places[r] * (size_t)record, d, row, x);
    }
    if (num_chunks == 1)
        return;
    sync_first<ALL>(threads);
    if (threadIdx.x == 0) {
        uint32_t tiles = (j.s.q_tokens * c.group + ROWS - 1) / ROWS;
        uint32_t *counter = j.run->counters + j.p.counter + j.kv_head * tiles + j.tile;
        last = arrive(counter) == num_chunks - 1;
        if (last)
            *counter = 0; /* for the next launch */
    }
    sync_first<ALL>(threads);
    if (last)
        merge<T, DIM, ROWS, ALL, RUNNING>(c, j, threads, places, scratch, total);
}

} // namespace chunks

#endif
