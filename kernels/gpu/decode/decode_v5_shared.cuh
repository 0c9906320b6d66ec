/*
 * Pieces that several sequences have in common ("team", sharing.h): a chunk of the context whose K
 * and V are the same blocks for all of them. A block of threads copies these once and multiplies
 * them by all members' rows, where decode_v5.cuh would copy them for each sequence.
 *
 * A row's bits are those that it has alone: a chunk's tiles are the same warps', the products have
 * the same operands in the same roles and order, and warps and chunks come together as they do
 * there. What is loaded of K and V serves several products, each with 8 rows; of a product, a
 * column doesn't depend on the others; and what a row's weights are measured from is its own.
 *
 * Nothing is hidden from any row here, and nothing is appended here: a team's chunks end before its
 * members' new tokens. Where there is a window, tiles begin elsewhere for each member; then they
 * are worked on one after the other.
 */
#ifndef TS_GPU_DECODE_V5_SHARED_CUH
#define TS_GPU_DECODE_V5_SHARED_CUH

#include "decode_v5.cuh"

namespace v5
{

/* GROUPS: of 8 rows. */
template <typename T, int DIM, int GROUPS, int MORE> struct team_kernel {
    typedef narrow_kernel<T, DIM, MORE> narrow;
    /* Other teams may read the same: the cache is told nothing of it. */
    typedef ring<narrow::PITCH, narrow::TOKENS, narrow::STAGES, false> tiles;
    typedef typename narrow::q_rows q_rows;
    typedef typename narrow::lane_sums lane_sums;
    typedef typename narrow::M M;
    static const uint32_t EACH = narrow::ROWS, ROWS = GROUPS * EACH, TOKENS = narrow::TOKENS;
    static const uint32_t PIECES = DIM / 8; /* of a row of q */
    static const uint32_t Q_BYTES = GROUPS * narrow::Q_BYTES, BYTES = Q_BYTES + narrow::RING_BYTES;
    static const uint32_t SUM_PITCH = narrow::SUM_PITCH;
    static const int STEPS = narrow::STEPS;
    static_assert(WARPS * ROWS * SUM_PITCH * sizeof(float) <= narrow::RING_BYTES,
                  "sums take its place");

    /* Who has which rows. */
    struct team {
        uint32_t members, each, rows; /* of a member, and of all */
        const plan_seq *seqs;

        /* Row r's sequence; r becomes its row there. */
        __device__ const plan_seq &seq_of_row(uint32_t &r) const
        {
            const plan_seq &seq = seqs[r / each];
            r %= each;
            return seq;
        }
    };

    /* Row r's place among its sequence's; also the sequence. */
    template <typename C>
    __device__ static const plan_seq &place_of_row(const C &c, const job &j, const team &t,
                                                   uint32_t r, uint32_t *place, uint32_t *query)
    {
        const plan_seq &seq = t.seq_of_row(r);
        *query = query_of(c, r);
        *place = *query * c.heads + j.kv_head * c.group + r - *query * c.group;
        return seq;
    }

    /* Where a row of q lies, and what a row's record of this chunk is made of beside the sums. */
    struct row {
        size_t q;
        float *record;
        row_state state;
        float factors[WARPS];
    };

    template <typename C>
    __device__ static void find_row(const C &c, const job &j, const team &t, uint32_t r, row *to)
    {
        const uint32_t record = c.head_dim + 4;
        uint32_t place, query;
        const plan_seq &seq = place_of_row(c, j, t, r, &place, &query);
        to->q = ((size_t)seq.first_row * c.heads + place) * c.head_dim;
        to->record = records_of(*j.run, seq, record) +
                     ((size_t)j.chunk * seq.q_tokens * c.heads + place) * record;
    }

    /* All rows of q, turned if the run asks for it; those past the last are 0. As load_q has it. */
    template <typename C>
    __device__ static void load_rows(const C &c, const job &j, const team &t, const row *rows,
                                     unsigned char *q)
    {
        const int TOGETHER = scaled<T>::value ? 2 : 8;
        const uint32_t ABREAST = ROWS * PIECES / THREADS;
        if (!scaled<T>::value && !turns_rows(c)) { /* as it is: all are asked for at once */
            uint4 x[ABREAST];
#pragma unroll
            for (uint32_t a = 0; a < ABREAST; a++) {
                uint32_t i = threadIdx.x + a * THREADS, r = i / PIECES, piece = i % PIECES;
                x[a] = make_uint4(0, 0, 0, 0);
                if (r < t.rows && piece * 8 < c.head_dim)
                    x[a] = *(const uint4 *)((const T *)j.run->q + rows[r].q + piece * 8);
            }
#pragma unroll
            for (uint32_t a = 0; a < ABREAST; a++) {
                uint32_t i = threadIdx.x + a * THREADS;
                *(uint4 *)(q + q_rows::place(i / PIECES, i % PIECES)) = x[a];
            }
            return;
        }
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < ROWS * PIECES; i += THREADS) {
            uint32_t r = i / PIECES, piece = i % PIECES, place, query;
            uint4 x = make_uint4(0, 0, 0, 0);
            if (r < t.rows && piece * 8 < c.head_dim) {
                const plan_seq &seq = place_of_row(c, j, t, r, &place, &query);
                uint32_t position = seq.kv_tokens - seq.q_tokens + query;
                float y[8];
#pragma unroll
                for (int e = 0; e < 8; e += TOGETHER)
                    load_turned<T, TOGETHER>(c, j.run->q, rows[r].q, q_source<T>(piece, e),
                                             position, y + e);
                x = make_uint4(pack<M>(y[0], y[1]), pack<M>(y[2], y[3]), pack<M>(y[4], y[5]),
                               pack<M>(y[6], y[7]));
            }
            *(uint4 *)(q + q_rows::place(r, piece)) = x;
        }
    }

    /* Scores of a tile: in each group of rows, as narrow_kernel's `score`. k and q: where the
     * lane's loads start. */
    __device__ static void score(uint32_t k, uint32_t q, float (*s)[4], float (*odd)[4])
    {
#pragma unroll
        for (int pair = 0; pair < STEPS / 2; pair++) {
            uint32_t a[2][4];
            operands<T>::template load<false>(a, k, pair, true);
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                uint32_t b[4];
                load_matrices(b, turn(q + g * narrow::Q_BYTES, pair * 4));
                multiply<M>(s[g], a[0], b[0], b[1]);
                multiply<M>(odd[g], a[1], b[2], b[3]);
            }
        }
    }

    /* What happens to scores beside scaling. */
    template <typename C>
    __device__ static void vary(const C &c, const job &j, const team &t, uint32_t tile,
                                float (*s)[4])
    {
        uint32_t lane = threadIdx.x % 32;
#pragma unroll
        for (uint32_t i = 0; i < GROUPS * 2; i++) {
            uint32_t place, query;
            const uint32_t e = i % 2, r = min(i / 2 * 8 + lane % 4 * 2 + e, t.rows - 1);
            const plan_seq &seq = place_of_row(c, j, t, r, &place, &query);
            float slope = slope_of(j.s, place % c.heads);
            uint32_t position = seq.kv_tokens - seq.q_tokens + query, token = tile + lane / 4;
            s[i / 2][e] = modify_score(c, s[i / 2][e], slope, token, position);
            s[i / 2][e + 2] = modify_score(c, s[i / 2][e + 2], slope, token + 8, position);
        }
    }

    /* A warp's tiles of the chunk. */
    template <typename C>
    __device__ static void add_tiles(const C &c, const job &j, const team &t, tiles &ring,
                                     uint32_t q, lane_sums *l)
    {
        uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        bool varied = is_varied(c, j.s.alibi);
        float scale = score_scale<T>(c, j);
        uint32_t to_k = narrow::k_place(), to_v = narrow::v_place();
        q += q_rows::place(lane % 8, lane / 8);
        for (uint32_t tile = j.begin + warp * TOKENS; tile < j.end; tile += WARPS * TOKENS) {
            uint32_t k = ring.take_k(c, j), v = ring.take_v(c, j, k), p[GROUPS][4];
            float s[GROUPS][4] = {}, odd[GROUPS][4] = {};
            score(k + to_k, q, s, odd);
#pragma unroll
            for (int i = 0; i < GROUPS * 4; i++)
                s[i / 4][i % 4] = __fmul_rn(s[i / 4][i % 4] + odd[i / 4][i % 4], scale);
            if (varied)
                vary(c, j, t, tile, s);
            bool passes = false;
#pragma unroll
            for (int i = 0; i < GROUPS * 4; i++)
                passes |= !(s[i / 4][i % 4] <= l[i / 4].max[i % 2] + SLACK);
            if (__any_sync(~0u, passes))
#pragma unroll
                for (int g = 0; g < GROUPS; g++)
                    l[g].raise(s[g]);
#pragma unroll
            for (int g = 0; g < GROUPS; g++)
                l[g].weigh(s[g], p[g]);
#pragma unroll
            for (int pair = 0; pair < STEPS / 2; pair++) {
                uint32_t a[2][4];
                operands<T>::template load<true>(a, v + to_v, pair, false);
#pragma unroll
                for (int g = 0; g < GROUPS; g++)
                    l[g].add(pair, a, p[g]);
            }
        }
    }

    /* Writes the rows' records of this chunk. */
    template <typename C>
    __device__ static void store_records(const C &c, const team &t, row *rows,
                                         const row_state (*states)[ROWS], const float *sums)
    {
        const uint32_t QUADS = DIM / 4, r = threadIdx.x;
        if (r < t.rows)
            rows[r].state = add_states<ROWS, WARPS>(states, r, rows[r].factors);
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < t.rows * QUADS; i += THREADS) {
            const uint32_t d = i % QUADS * 4;
            const row &its = rows[i / QUADS];
            if (d >= c.head_dim)
                continue;
            float x[4] = {};
            add_sums<ROWS, WARPS>(sums, SUM_PITCH, i / QUADS, d, its.factors, x);
            store_record(c, its.record, d, its.state, x);
        }
    }

    /* Counts the chunk for each member, and merges those of which it was the last. */
    template <typename C>
    __device__ static void end(const C &c, const job &j, const team &t, float *scratch)
    {
        __shared__ bool last[ROWS];
        __shared__ uint32_t places[EACH];
        __shared__ row_state total[EACH];
        __syncthreads(); /* all records are written, and sums are read */
        if (threadIdx.x < t.members) {
            const plan_seq &seq = t.seqs[threadIdx.x];
            uint32_t *counter = j.run->counters + seq.counter + j.kv_head;
            last[threadIdx.x] = arrive(counter) == seq.num_chunks - 1;
            if (last[threadIdx.x])
                *counter = 0; /* for the next launch */
        }
        __syncthreads();
#pragma unroll 1
        for (uint32_t m = 0; m < t.members; m++) {
            if (!last[m])
                continue;
            job its;
            make_job(c, *j.run, plan_piece{t.seqs[m], 0, j.chunk, 0, 0}, j.kv_head, EACH, its);
            if (threadIdx.x < its.rows)
                places[threadIdx.x] = place_of(c, its, threadIdx.x);
            __syncthreads();
            merge<T, DIM, EACH, true, false>(c, its, THREADS, places, scratch, total);
            __syncthreads();
        }
    }

    /* members: their numbers among the run's sequences. */
    template <typename C>
    __device__ static void work(const C &c, const job &j, const uint32_t *members, uint32_t count,
                                unsigned char *shared)
    {
        __shared__ plan_seq seqs[ROWS];
        __shared__ row rows[ROWS];
        __shared__ row_state states[WARPS][ROWS];
        uint32_t warp = threadIdx.x / 32;
        uint32_t member = members[min(threadIdx.x, count - 1)]; /* asked for before the tiles */
        unsigned char *rings = shared + Q_BYTES;
        tiles ring;
        ring.start(c, j, rings);
        team t;
        t.members = count;
        t.seqs = seqs;
        if (threadIdx.x < count)
            seqs[threadIdx.x] = j.run->seqs[member];
        __syncthreads();
        t.each = seqs[0].q_tokens * c.group;
        t.rows = t.members * t.each;
        if (threadIdx.x < t.rows)
            find_row(c, j, t, threadIdx.x, &rows[threadIdx.x]);
        __syncthreads();
        load_rows(c, j, t, rows, shared);
        __syncthreads();
        lane_sums l[GROUPS];
#pragma unroll
        for (int g = 0; g < GROUPS; g++)
            l[g].begin();
        add_tiles(c, j, t, ring, shared_address(shared), l);
        await_copies<0>();
        __syncthreads(); /* the rings are used up */
        float *sums = (float *)rings;
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            l[g].add_up_weights();
            l[g].lay_out(states[warp] + g * EACH, sums + (warp * ROWS + g * EACH) * SUM_PITCH);
        }
        __syncthreads();
        store_records(c, t, rows, states, sums);
        end(c, j, t, sums);
    }

    /* Runs' pieces are taken by turns, as far as all of them have some: so runs that share a prefix
     * read the same blocks at about the same time. */
    template <typename C>
    __device__ static const gpu_run &find_piece_by_turns(const C &c, uint32_t block,
                                                         plan_piece &piece)
    {
        uint32_t index = block / c.kv_heads, r = 0;
        if (index < c.least_items * c.num_runs) {
            r = index % c.num_runs;
            index /= c.num_runs;
        } else { /* behind those: run after run */
            index -= c.least_items * c.num_runs;
            uint32_t before = 0;
            for (uint32_t rest; index >= (rest = c.runs[r].end - before - c.least_items); r++) {
                index -= rest;
                before = c.runs[r].end;
            }
            index += c.least_items;
        }
        piece = ((const plan_piece *)c.runs[r].items)[index];
        return c.runs[r];
    }

    template <typename C>
    __device__ static void run(const C &c, uint32_t block, unsigned char *shared)
    {
        plan_piece piece;
        const gpu_run &run = find_piece_by_turns(c, block, piece);
        const uint32_t *members = NULL; /* of a team whose members are worked on in turn */
        uint32_t count = 1;
        job j;
        if (piece.tile & TEAM_PIECE) {
            members = run.tables + TEAM_LIST(piece.tile);
            count = TEAM_SIZE(piece.tile);
            piece.tile = 0;
            make_job(c, run, piece, block % c.kv_heads, EACH, j);
            if (C::PLAIN || c.window == 0) {
                work(c, j, members, count, shared);
                return;
            }
        }
        for (uint32_t m = 0; m < count; m++) {
            if (m > 0)
                __syncthreads();
            if (members != NULL)
                piece.seq = run.seqs[members[m]];
            make_job(c, run, piece, block % c.kv_heads, EACH, j);
            narrow::work(c, j, shared);
        }
    }
};

/* How much a block takes on: of 16-bit caches, two of them fill a processor's registers. */
template <typename T> struct team_size {
    static const int GROUPS = scaled<T>::value ? 2 : 4, BLOCKS = scaled<T>::value ? 3 : 2;
};

template <typename T, int DIM> using team_kernel_of = team_kernel<T, DIM, team_size<T>::GROUPS, 1>;

template <typename T, int DIM, typename C>
__global__ void __launch_bounds__(THREADS, team_size<T>::BLOCKS)
    decode_v5_shared(const __grid_constant__ C c)
{
    extern __shared__ __align__(128) unsigned char shared[];
    run_blocks<team_kernel_of<T, DIM>>(c, shared);
}

template <typename T, int DIM, typename C> ts_gpu_kernel team_kernel_dim()
{
    return ts_gpu_kernel{(const void *)decode_v5_shared<T, DIM, C>, THREADS,
                         team_kernel_of<T, DIM>::BYTES, 0};
}

/* For q of 16 bits and rows of up to 128 dimensions. */
template <typename T, typename C> ts_gpu_kernel shared_of(uint32_t head_dim, ts_dtype io)
{
    return head_dim > 128 || io == TS_DTYPE_FP32 ? ts_gpu_kernel{}
           : head_dim <= least<T>::DIM           ? team_kernel_dim<T, least<T>::DIM, C>()
                                                 : team_kernel_dim<T, 128, C>();
}

} // namespace v5

#endif
