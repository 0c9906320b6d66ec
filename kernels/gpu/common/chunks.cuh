/*
 * What v5 and mma share: how a block finds its work, and how K and V come in. How chunks come
 * together is in chunk_sums.cuh.
 *
 * A block serves one chunk of one sequence's context for one KV head and a tile of rows (query
 * token x head of the group). How a context is cut depends on the sequence's own lengths (plan.cu),
 * so its bits are the same in any company.
 *
 * Where there are few rows, the chunk's tokens go to 4 warps in tiles of 16, in turn (8 where rows
 * are very long): every warp has a ring of tiles of its own in shared memory, filled by
 * asynchronous copies, and a softmax of its own, so no warp waits for another before the end.
 */
#ifndef TS_GPU_CHUNKS_CUH
#define TS_GPU_CHUNKS_CUH

#include "tile_shapes.cuh"

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
    /* For wgmma: */
    bool all_new;        /* it stores the sequence */
    uint32_t box_tokens; /* that tiles come in; 1: no boxes */
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

/* Counts one more that has written something: the whole block, before a barrier. Returns how many
 * there were, and what those wrote can be read then. */
__device__ inline uint32_t arrive(uint32_t *counter)
{
    uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(counter)
                 : "memory");
    return before;
}

/* What this thread wrote, or saw another's word of, is seen by whoever sees what it writes next. */
__device__ inline void fence_system()
{
    asm volatile("fence.acq_rel.sys;" ::: "memory");
}

/* Behind a barrier, by the block's first warp. In the last block to come here, each run's words get
 * its number, and then the launch's own: what all blocks wrote is seen by whoever sees a word, in
 * any process. */
__device__ inline void tell_end(const gpu_call &c)
{
    bool last = threadIdx.x == 0 && arrive(c.arrived) == gridDim.x - 1;
    if (!__any_sync(~0u, last))
        return;
    if (last)
        *c.arrived = 0; /* for the next launch */
    __syncwarp();
    fence_system();
    if (threadIdx.x < c.num_told) {
        const gpu_run &run = c.runs[threadIdx.x];
        for (uint32_t i = 0; i < 2; i++) {
            if (i > 0)
                fence_system(); /* in their order */
            if (run.words[i] != NULL)
                *(volatile uint32_t *)run.words[i] = run.number;
        }
    }
    __syncwarp();
    if (last && c.end_word != NULL) {
        fence_system();
        *(volatile uint32_t *)c.end_word = c.end_value;
    }
}
static_assert(GPU_RUNS <= 32, "a warp has a lane for each");

/* Works off a launch's pieces, one for each block of threads; those of a persistent plan, and has
 * others when the launch is repeated, in turn. */
template <typename K, typename C>
__device__ inline void run_blocks(const C &c, unsigned char *shared)
{
    const bool tells = c.arrived != NULL; /* such a launch is of no persistent plan */
    for (uint32_t block = blockIdx.x; c.items_there == NULL || block < *c.items_there * c.kv_heads;
         block += gridDim.x) {
        K::run(c, block, shared);
        if (c.items_there == NULL && !tells)
            break;
        __syncthreads(); /* nobody uses what the next piece takes; what the block wrote is told */
        if (!tells)
            continue;
        if (threadIdx.x < 32)
            tell_end(c);
        break;
    }
}

/* Writes the new tokens' K and V that lie in this piece's chunks. Every tile of rows does: the same
 * bytes, and each reads only what it wrote itself. */
template <typename T, typename C> __device__ void append(const C &c, const job &j, uint32_t threads)
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
 * further by n is found by turning bits 4 to 6 of the address: see `turn`. EARLY: see look_up.
 */
template <int PITCH, int TOKENS, bool EARLY = false> struct loader {
    static const uint32_t PIECES = PITCH / 16, LOADS = TOKENS * PIECES / 32; /* of a lane */
    static const bool IN_BLOCKS =
        PIECES <= 32; /* can take rows of one block without looking up each */

    const unsigned char *base; /* of the head's K in block 0 */
    uint32_t block, offset;    /* of the next tokens: where this lane's first one lies; tokens */
    size_t found;              /* EARLY: behind `base` */
    uint32_t pieces, place_of_lane;
    bool in_block; /* TOKENS tokens lie in one block */

    __device__ static uint32_t place(uint32_t token, uint32_t piece)
    {
        return token * PITCH + (piece ^ (token & 7)) * 16;
    }

    template <typename C> __device__ void start(const C &c, const job &j)
    {
        uint32_t lane = threadIdx.x % 32;
        pieces = c.head_dim * c.cache_bytes / 16;
        base = c.base + j.s.layer * 2 * c.plane_bytes + j.kv_head * c.head_stride;
        in_block = C::PLAIN || (IN_BLOCKS && c.block_tokens.d % TOKENS == 0);
        place_of_lane = place(lane / PIECES, lane % PIECES);
    }

    /* Behind `base`: this lane's first copy of what was looked up. */
    template <typename C> __device__ size_t row(const C &c) const
    {
        size_t at = block * c.block_bytes + offset * c.token_stride;
        return in_block ? at + threadIdx.x % 32 % PIECES * 16 : at;
    }

    /* Finds the rows of the TOKENS tokens from `token` on, a multiple of TOKENS; `end` is past the
     * last that is wanted. The block's number is used when they are copied, so nobody waits for it
     * here; EARLY: it is used at once. */
    template <typename C>
    __device__ void look_up(const C &c, const job &j, uint32_t token, uint32_t end)
    {
        uint32_t lane = threadIdx.x % 32;
        uint32_t t = in_block ? token : min(token + lane % TOKENS, end - 1); /* the last again */
        uint32_t entry = divide(t, c.block_tokens);
        offset = t - entry * c.block_tokens.d;
        if (in_block)
            offset += lane / PIECES;
        block = j.s.blocks[entry];
        if (EARLY)
            found = row(c);
    }

    /* A lane's pieces of tokens that lie in one block, ABREAST of them at once. K, V: see issue. */
    template <uint32_t ABREAST, bool ONCE, bool K, bool V>
    __device__ static void copy_rows(const gpu_call &c, uint32_t to, uint32_t plane,
                                     const unsigned char *k, const unsigned char *v, bool mine)
    {
#pragma unroll
        for (uint32_t i = 0; i < LOADS; i++) {
            uint32_t at = (to ^ (i * ABREAST & 7) * 16) + i * ABREAST * PITCH;
            if (K && mine)
                cache_hints::copy_async(at, k, ONCE);
            if (V && mine)
                cache_hints::copy_async(at + plane, v, ONCE);
            k += ABREAST * c.token_stride;
            v += ABREAST * c.token_stride;
        }
    }

    /* Copies what was looked up to `to`, and V `plane` bytes further; or K alone, or V. What of a
     * block lies past the end comes along. HINTS: the second-level cache may be told that it is
     * read once; only where that is worth the registers. */
    template <bool HINTS, bool K = true, bool V = true, typename C>
    __device__ void issue(const C &c, const job &j, uint32_t to, uint32_t plane) const
    {
        uint32_t lane = threadIdx.x % 32;
        const size_t row = EARLY ? found : this->row(c);
        if (in_block) {
            const uint32_t ABREAST =
                IN_BLOCKS ? 32 / PIECES : 1; /* rows that a warp copies at once */
            const unsigned char *k = base + row, *v = k + c.plane_bytes;
            bool mine = lane % PIECES < pieces;
            to += place_of_lane;
            if (HINTS && j.once)
                copy_rows<ABREAST, true, K, V>(c, to, plane, k, v, mine);
            else
                copy_rows<ABREAST, false, K, V>(c, to, plane, k, v, mine);
            return;
        }
#pragma unroll 4
        for (uint32_t i = 0; i < LOADS; i++) {
            uint32_t token = (i * 32 + lane) / PIECES, piece = (i * 32 + lane) % PIECES;
            const unsigned char *from = base + __shfl_sync(~0u, row, (int)token) + piece * 16;
            if (piece < pieces) {
                uint32_t at = to + place(token, piece);
                if (K)
                    cache_hints::copy_async(at, from, HINTS && j.once);
                if (V)
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

/* A warp's way through its own tiles of the chunk: every WARPS-th. HINTS: see loader's issue;
 * EARLY: its look_up. */
template <int PITCH, int TOKENS, int STAGES, bool HINTS = true, bool EARLY = false> struct ring {
    typedef loader<PITCH, TOKENS, EARLY> rows;
    static const uint32_t PLANE = TOKENS * PITCH, TILE = 2 * PLANE, BYTES = TILE * STAGES;

    rows r;
    uint32_t first, last; /* places in shared memory */
    uint32_t from, to;    /* where the next is taken from, copied to */
    uint32_t next, end;   /* tokens */

    __device__ uint32_t after(uint32_t at) const
    {
        return at == last ? first : at + TILE;
    }

    template <typename C> __device__ void issue(const C &c, const job &j)
    {
        if (next < end) {
            r.template issue<HINTS>(c, j, to, PLANE);
            to = after(to);
            next += WARPS * TOKENS;
            if (next < end)
                r.look_up(c, j, next, end);
        }
        commit_copies();
    }

    template <typename C> __device__ void start(const C &c, const job &j, unsigned char *shared)
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

    /* Waits for the next tile, whose K lies at the returned address, and asks for one more. */
    template <typename C> __device__ uint32_t take_k(const C &c, const job &j)
    {
        await_copies<STAGES - 2>();
        __syncwarp(); /* all lanes' copies are there, and nobody reads the tile before this one */
        issue(c, j);
        uint32_t at = from;
        from = after(from);
        return at;
    }

    /* Where the V is of the tile whose K is at `k`. */
    template <typename C> __device__ uint32_t take_v(const C &, const job &, uint32_t k) const
    {
        return k + PLANE;
    }
};

/* The same in less room: three places, each of a tile's K or of its V, which are asked for and
 * waited for one after the other. While one is worked on, the next two are under way. */
template <int PITCH, int TOKENS> struct plane_ring {
    typedef loader<PITCH, TOKENS> rows;
    static const uint32_t PLANE = TOKENS * PITCH, BYTES = 3 * PLANE;

    rows r;
    uint32_t first, last; /* places in shared memory */
    uint32_t from, to;    /* where the next is taken from, copied to */
    uint32_t next, end;   /* tokens */

    __device__ uint32_t after(uint32_t at) const
    {
        return at == last ? first : at + PLANE;
    }

    template <typename C> __device__ void issue_k(const C &c, const job &j)
    {
        if (next < end) {
            r.template issue<true, true, false>(c, j, to, 0);
            to = after(to);
        }
        commit_copies();
    }

    template <typename C> __device__ void issue_v(const C &c, const job &j)
    {
        if (next < end) {
            r.template issue<true, false, true>(c, j, to, 0);
            to = after(to);
            next += WARPS * TOKENS;
            if (next < end)
                r.look_up(c, j, next, end);
        }
        commit_copies();
    }

    template <typename C> __device__ void start(const C &c, const job &j, unsigned char *shared)
    {
        uint32_t warp = threadIdx.x / 32;
        r.start(c, j);
        r.clear(shared + warp * BYTES, BYTES, threadIdx.x % 32, 32);
        __syncwarp();
        from = to = first = shared_address(shared + warp * BYTES);
        last = first + BYTES - PLANE;
        next = j.begin / TOKENS * TOKENS + warp * TOKENS;
        end = j.end;
        if (next < end)
            r.look_up(c, j, next, end);
        issue_k(c, j);
        issue_v(c, j);
    }

    /* Wait for the next tile's K, which lies at the returned address, or its V, and ask for the
     * one behind it. */
    template <typename C> __device__ uint32_t take_k(const C &c, const job &j)
    {
        await_copies<1>();
        __syncwarp();
        issue_k(c, j);
        uint32_t at = from;
        from = after(from);
        return at;
    }
    template <typename C> __device__ uint32_t take_v(const C &c, const job &j, uint32_t)
    {
        await_copies<1>();
        __syncwarp();
        issue_v(c, j);
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

} // namespace chunks

#endif
