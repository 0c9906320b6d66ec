/*
 * How chunks come together, in v5 and mma: a block's warps' results are added up in order; if the
 * sequence has other chunks, the sums go to memory, and whichever block comes last adds up all
 * chunks in order.
 */
#ifndef TS_GPU_CHUNK_SUMS_CUH
#define TS_GPU_CHUNK_SUMS_CUH

#include "chunks.cuh"

namespace chunks
{

/* One row's state of one warp, or of one chunk. */
struct row_state {
    float max, sum;
};

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
template <typename T, typename C>
__device__ inline void store_sums(const C &c, const job &j, uint32_t place, uint32_t d,
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
template <typename T, int DIM, int ROWS, bool ALL, bool RUNNING, typename C>
__device__ inline void merge(const C &c, const job &j, uint32_t threads, const uint32_t *places,
                             float *scratch, row_state *total)
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

/* What PARTS warps have of row r comes together, in order: its state, and what each warp's sums are
 * multiplied by. */
template <int ROWS, int PARTS>
__device__ inline row_state add_states(const row_state (*states)[ROWS], uint32_t r, float *factors)
{
    row_state row = {-CUDART_INF_F, 0};
#pragma unroll
    for (uint32_t w = 0; w < PARTS; w++)
        row.max = fmaxf(row.max, states[w][r].max);
#pragma unroll
    for (uint32_t w = 0; w < PARTS; w++) {
        factors[w] = rescale(states[w][r].max, row.max);
        row.sum =
            __fmaf_rn(states[w][r].sum, factors[w], row.sum); /* told whole: mma.cuh has it too */
    }
    return row;
}

/* And its sums from dimension d on, by these factors. See `finish`. */
template <int ROWS, int PARTS>
__device__ inline void add_sums(const float *sums, uint32_t pitch, uint32_t r, uint32_t d,
                                const float *factors, float *x)
{
#pragma unroll
    for (uint32_t w = 0; w < PARTS; w++) {
        float4 y = *(const float4 *)&sums[((size_t)w * ROWS + r) * pitch + d];
        x[0] = __fmaf_rn(y.x, factors[w], x[0]);
        x[1] = __fmaf_rn(y.y, factors[w], x[1]);
        x[2] = __fmaf_rn(y.z, factors[w], x[2]);
        x[3] = __fmaf_rn(y.w, factors[w], x[3]);
    }
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
template <typename T, int DIM, int ROWS, int PARTS, bool ALL = true, bool RUNNING = false,
          typename C>
__device__ void finish(const C &c, const job &j, uint32_t threads, const row_state (*states)[ROWS],
                       const float *sums, uint32_t pitch, float *scratch, row_state *total)
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
        float x[4] = {}, factors[PARTS];
        row_state row = add_states<ROWS, PARTS>(states, r, factors);
        add_sums<ROWS, PARTS>(sums, pitch, r, d, factors, x);
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
