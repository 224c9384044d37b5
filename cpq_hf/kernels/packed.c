/* Packed weights on the CPU: the arithmetic of packing.py and nn/packed.py, straight from the words.

   A row of `columns` values of `bits` bits is a bit stream, least significant bit first, in 32-bit words (packing.py).
   Read on a little-endian machine, value i is the bits [i*bits, (i+1)*bits) of the row's bytes.

   cpq_dequantize writes the weights out: (level + offset) * scale, the same numbers as torch operations give.

   cpq_linear multiplies without writing them out. The time of a small product is unpacking and reading memory, so a
   vector is unpacked with as few instructions as there can be: values are not shuffled into order. V consecutive values
   (16 of 2 bits, 8 of 3 or 4 bits, 4 of more) lie in a window of 32 bits. LANES windows, one in each lane, are a chunk
   of the row; shifting all lanes by n*bits gives the n-th value of each window. The inputs are brought into that order
   once, `x[chunk][n][lane]`, padded with zeros. Levels are multiplied and added up in float32, each lane by itself; a
   lane is scaled where its scale ends, once a row or once a group.

   A tile is ROWS rows by up to BATCH inputs, the sums of which stay in registers. Every output is summed in the same
   order whatever the batch and the number of threads, so it does not depend on them. */

#define _DEFAULT_SOURCE /* madvise */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "values.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define ROWS 4
#elif defined(__AVX__)
#define LANES 8
#define ROWS 2
#else
#define LANES 4
#define ROWS 4
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words are read as bytes, least significant first"
#endif

#define BATCH 4
#define LARGEST_BAND 256   /* rows that a thread takes at a time */
#define INPUTS_NEAR 32     /* by so many inputs, which stay in its second-level cache */
#define INPUTS_AT_ONCE 256 /* inputs that are arranged before the threads begin */
#define WINDOW_BYTES (4 * LANES)
#define UNROLL _Pragma("GCC unroll 16")

typedef float floats __attribute__((vector_size(WINDOW_BYTES)));
typedef int32_t ints __attribute__((vector_size(WINDOW_BYTES)));
typedef uint32_t words __attribute__((vector_size(WINDOW_BYTES)));

/* --- writing weights out --------------------------------------------------------------------------------------------

   8 values take `bits` bytes, whatever the width. */

INLINE void dequantize_values(const uint8_t *bytes, int count, float *out, int bits, float zero, float scale) {
    uint64_t stream = 0;
    memcpy(&stream, bytes, (size_t)((count * bits + 7) / 8));
    for (int i = 0; i < count; i++)
        out[i] = ((float)(int32_t)((stream >> (i * bits)) & ((1u << bits) - 1)) - zero) * scale;
}

typedef float floats8 __attribute__((vector_size(32)));
typedef int32_t ints8 __attribute__((vector_size(32)));
typedef uint32_t words8 __attribute__((vector_size(32)));

INLINE void dequantize_eight(const uint8_t *bytes, float *out, int bits, float zero, float scale) {
    uint64_t stream = 0;
    memcpy(&stream, bytes, bits <= 4 ? 4 : 8);
    uint32_t a = (uint32_t)stream, b = (uint32_t)(stream >> (4 * bits));
    const uint32_t s = (uint32_t)bits, mask = (1u << bits) - 1;
    words8 window = {a, a, a, a, b, b, b, b}, shift = {0, s, 2 * s, 3 * s, 0, s, 2 * s, 3 * s};
    floats8 value = (__builtin_convertvector((ints8)((window >> shift) & mask), floats8) - zero) * scale;
    memcpy(out, &value, sizeof value);
}

/* One row, float32, with one scale for each `group` columns. `end`: of the memory that may be read. */
INLINE void dequantize_row(const uint8_t *bytes, const uint8_t *end, const float *scale, float *out, int64_t columns,
                           int64_t group, int bits, float zero) {
    int whole = group % 8 == 0 || group == columns;
    float own = group == columns ? scale[0] : 1.0f;
    for (int64_t i = 0; i < columns; i += 8) {
        const uint8_t *here = bytes + i / 8 * bits;
        float s = whole && group != columns ? scale[i / group] : own;
        if (i + 8 <= columns && here + 8 <= end)
            dequantize_eight(here, out + i, bits, zero, s);
        else
            dequantize_values(here, (int)(columns - i < 8 ? columns - i : 8), out + i, bits, zero, s);
    }
    if (!whole)
        for (int64_t i = 0; i < columns; i++) out[i] *= scale[i / group];
}

typedef void (*row_function)(const uint8_t *, const uint8_t *, const float *, float *, int64_t, int64_t, float);
#define ROW(B)                                                                                                        \
    static void row_##B(const uint8_t *bytes, const uint8_t *end, const float *scale, float *out, int64_t columns,    \
                        int64_t group, float zero) {                                                                  \
        dequantize_row(bytes, end, scale, out, columns, group, B, zero);                                              \
    }
ROW(2) ROW(3) ROW(4) ROW(5) ROW(6) ROW(7) ROW(8)
static const row_function row_table[] = {row_2, row_3, row_4, row_5, row_6, row_7, row_8};

/* A large weight lands in memory that is new each time: in pages of 4 kB their faults cost ten times the arithmetic. */
static void prefer_large_pages(void *data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 4096, first = ((uintptr_t)data + page - 1) / page * page,
                    end = (uintptr_t)data + (size_t)bytes;
    if (bytes >= 1 << 23) (void)madvise((void *)first, (size_t)(end - first) / page * page, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

/* `groups`: scales a row, or 0 where one scale is for all rows. Returns 0, or 1 for want of memory. */
int cpq_dequantize(const uint8_t *packed, const float *scale, void *out, int64_t rows, int64_t columns, int64_t groups,
                   int bits, float offset, int bf16, int threads) {
    int64_t row_bytes = (columns * bits + 31) / 32 * 4, group = groups > 0 ? columns / groups : columns;
    const uint8_t *end = packed + rows * row_bytes;
    float zero = (float)(1 << (bits - 1)) - offset;
    row_function dequantize = row_table[bits - 2];
    int failed = 0;
    prefer_large_pages(out, rows * columns * (bf16 ? 2 : 4));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *row_buffer = bf16 ? malloc(sizeof(float) * (size_t)columns) : NULL;
        if (bf16 && row_buffer == NULL) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            float *target = bf16 ? row_buffer : (float *)out + row * columns;
            if (target == NULL) continue;
            dequantize(packed + row * row_bytes, end, scale + row * groups, target, columns, group, zero);
            if (bf16)
                for (int64_t i = 0; i < columns; i++) store(out, row * columns + i, target[i], 1);
        }
        free(row_buffer);
    }
    return failed;
}

/* --- multiplying straight from the words ---------------------------------------------------------------------------*/

typedef struct {
    const uint8_t *packed, *last; /* the rows, and copies of the last ones with room behind them */
    const float *scale, *bias;
    const float *x; /* inputs from `first` on: [input][chunks][V][LANES] */
    void *out;      /* [batch][rows] */
    int64_t rows, columns, first, row_bytes, groups, chunks, x_size;
    int64_t inside;  /* rows behind which WINDOW_BYTES can be read: all but the last ones */
    int64_t segment; /* chunks that share the scales of their lanes */
    const int32_t *group_of; /* [chunks][LANES], or NULL where all lanes of a chunk have one scale */
    float half;      /* what is added to a level */
    int bf16;
} task;

/* Values in a window of 32 bits. */
INLINE int values_of(int bits) { return bits == 2 ? 16 : bits <= 4 ? 8 : 4; }
INLINE int64_t chunk_bytes(int bits) { return (int64_t)LANES * values_of(bits) * bits / 8; }

/* LANES windows, one in each lane. WINDOW_BYTES may be read. */
INLINE words windows(const uint8_t *bytes, int bits) {
    words window = {0};
    const int size = values_of(bits) * bits; /* 32, 24, 32, 20, 24, 28, 32 bits */
    if (size == 32) {
        memcpy(&window, bytes, sizeof window);
        return window;
    }
#if defined(__AVX512VBMI__)
    uint8_t index[WINDOW_BYTES];
    UNROLL for (int k = 0; k < LANES; k++)
        for (int i = 0; i < 4; i++) index[4 * k + i] = (uint8_t)(k * size / 8 + i);
    window = (words)_mm512_permutexvar_epi8(_mm512_loadu_si512(index), _mm512_loadu_si512(bytes));
#else
    UNROLL for (int k = 0; k < LANES; k++) {
        uint32_t one;
        memcpy(&one, bytes + k * size / 8, 4);
        window[k] = one;
    }
#endif
    if (size % 8) {
        words shift = {0};
        UNROLL for (int k = 0; k < LANES; k++) shift[k] = (uint32_t)(k * size % 8);
        window >>= shift;
    }
    return window;
}

/* The level of the n-th value of each window, `half` added. */
INLINE floats levels(words window, int n, int bits, float half, floats table) {
#if defined(__AVX512F__)
    if (bits <= 4) return (floats)_mm512_permutexvar_ps((__m512i)(window >> (n * bits)), (__m512)table);
#endif
    (void)table;
    ints level = (ints)(window << (32 - bits * (n + 1))) >> (32 - bits); /* the top bit is flipped: two's complement */
    floats value = __builtin_convertvector(level, floats);
    return bits == 2 ? value + half : value;
}

/* The top bits of all values of a window: flipped, they make an offset level one in two's complement. */
INLINE uint32_t top_bits(int bits) {
    uint32_t top = 0;
    for (int n = 0; n < values_of(bits); n++) top |= 1u << (n * bits + bits - 1);
    return top;
}

/* The scale of each lane in a segment. */
INLINE floats lane_scales(const task *job, int64_t row, int64_t segment) {
    const float *scale = job->scale + row * job->groups;
    floats scales = {0};
    if (job->group_of == NULL) return scales + scale[segment];
    for (int k = 0; k < LANES; k++) scales[k] = scale[job->group_of[segment * LANES + k]];
    return scales;
}

INLINE float sum_of(floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    UNROLL for (int width = LANES / 2; width > 0; width /= 2)
        UNROLL for (int k = 0; k < width; k++) v[k] += v[k + width];
    return v[0];
#endif
}

/* ROWS rows from `row` on by `count` inputs from `input` on. */
INLINE void tile(const task *shared, int64_t row, int64_t input, int bits, int count) {
    const task job = *shared;
    const int values = values_of(bits);
    const int64_t bytes = chunk_bytes(bits);
    const uint32_t top = top_bits(bits);
    int64_t rows[ROWS];
    const uint8_t *from[ROWS];
    floats total[ROWS][BATCH], table = {0};
    for (int k = 0; k < LANES; k++) table[k] = (float)((k & ((1 << bits) - 1)) - (1 << (bits - 1))) + job.half;
    UNROLL for (int r = 0; r < ROWS; r++) {
        rows[r] = row + r < job.rows ? row + r : job.rows - 1;
        from[r] = rows[r] < job.inside ? job.packed + rows[r] * job.row_bytes
                                       : job.last + (rows[r] - job.inside) * (job.chunks * bytes + WINDOW_BYTES);
        UNROLL for (int b = 0; b < count; b++) total[r][b] = (floats){0};
    }
    const float *x = job.x + input * job.x_size;
    int64_t segment = 0;
    for (int64_t start = 0; start < job.chunks; start += job.segment, segment++) {
        int64_t stop = start + job.segment < job.chunks ? start + job.segment : job.chunks;
        floats part[ROWS][BATCH];
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int b = 0; b < count; b++) part[r][b] = (floats){0};
        for (int64_t chunk = start; chunk < stop; chunk++) {
            words window[ROWS];
            UNROLL for (int r = 0; r < ROWS; r++) {
                __builtin_prefetch(from[r] + ROWS * job.row_bytes + chunk * bytes); /* the rows of the next tile */
                window[r] = windows(from[r] + chunk * bytes, bits);
#if defined(__AVX512F__)
                if (bits > 4)
#endif
                    window[r] ^= top;
            }
            UNROLL for (int n = 0; n < values; n++) {
                floats values_in[BATCH];
                UNROLL for (int b = 0; b < count; b++)
                    memcpy(&values_in[b], x + b * job.x_size + (chunk * values + n) * LANES, sizeof(floats));
                UNROLL for (int r = 0; r < ROWS; r++) {
                    floats weight = levels(window[r], n, bits, job.half, table);
                    UNROLL for (int b = 0; b < count; b++) part[r][b] += weight * values_in[b];
                }
            }
        }
        UNROLL for (int r = 0; r < ROWS; r++) {
            floats scales = lane_scales(&job, rows[r], segment);
            UNROLL for (int b = 0; b < count; b++) total[r][b] += part[r][b] * scales;
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int b = 0; b < count; b++) {
            if (row + r >= job.rows) continue;
            float bias = job.bias == NULL ? 0.0f : job.bias[row + r];
            store(job.out, (job.first + input + b) * job.rows + row + r, sum_of(total[r][b]) + bias, job.bf16);
        }
}

typedef void (*tile_function)(const task *, int64_t, int64_t);
#define TILE(B, C)                                                                 \
    static void tile_##B##C(const task *job, int64_t row, int64_t input) { tile(job, row, input, B, C); }
#define TILES(B) TILE(B, 1) TILE(B, 2) TILE(B, 4)
TILES(2) TILES(3) TILES(4) TILES(5) TILES(6) TILES(7) TILES(8)
#define ENTRY(B) {tile_##B##1, tile_##B##2, tile_##B##4}
static const tile_function tile_table[][3] = {ENTRY(2), ENTRY(3), ENTRY(4), ENTRY(5), ENTRY(6), ENTRY(7), ENTRY(8)};

/* Inputs of the next tile, where so many are left. */
INLINE int tile_inputs(int64_t left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

/* One input in the order of the windows, padded with zeros. */
static void arrange(const task *job, const void *x, int64_t input, float *out, int values) {
    const int64_t width = (int64_t)values * LANES;
    for (int64_t chunk = 0; chunk < job->chunks; chunk++) {
        const int64_t from = input * job->columns + chunk * width, left = job->columns - chunk * width;
        for (int n = 0; n < values; n++)
            for (int k = 0; k < LANES; k++)
                out[chunk * width + n * LANES + k] =
                    k * values + n < left ? load(x, from + k * values + n, job->bf16) : 0.0f;
    }
}

/* Rows of one band by `count` inputs. */
static void band(const task *job, int64_t first_row, int64_t stop, int64_t count, const tile_function *tiles) {
    for (int64_t near = 0; near < count; near += INPUTS_NEAR) {
        int64_t end = near + INPUTS_NEAR < count ? near + INPUTS_NEAR : count;
        for (int64_t row = first_row; row < stop; row += ROWS) {
            for (int64_t i = near; i < end; i += tile_inputs(end - i)) tiles[tile_inputs(end - i) / 2](job, row, i);
        }
    }
}

/* out[batch, rows] = x[batch, columns] * weight + bias. `groups` as above; a group must hold whole windows. Returns 0,
   1 for want of memory, or 2 if groups do not hold whole windows. */
int cpq_linear(const void *x, const uint8_t *packed, const float *scale, const float *bias, void *out, int64_t batch,
               int64_t rows, int64_t columns, int64_t groups, int bits, float offset, int bf16, int threads) {
    const int values = values_of(bits);
    const int64_t bytes = chunk_bytes(bits), width = (int64_t)values * LANES;
    const int64_t group = groups > 0 ? columns / groups : columns;
    if (groups > 1 && group % values) return 2;
    task job = {.packed = packed, .scale = scale, .bias = bias, .out = out, .rows = rows, .columns = columns,
                .groups = groups, .half = offset, .bf16 = bf16};
    job.row_bytes = (columns * bits + 31) / 32 * 4;
    job.chunks = (columns + width - 1) / width;
    job.x_size = job.chunks * width;
    int mixed = groups > 1 && group % width;
    job.segment = groups <= 1 ? job.chunks : mixed ? 1 : group / width;
    int64_t room = job.chunks * bytes + WINDOW_BYTES, all = rows * job.row_bytes;
    job.inside = all < room ? 0 : (all - room) / job.row_bytes + 1;
    if (job.inside > rows) job.inside = rows;
    int64_t size = (rows + 4 * threads - 1) / (4 * threads); /* of a band: a few for each thread, of whole tiles */
    size = size < LARGEST_BAND ? (size + ROWS - 1) / ROWS * ROWS : LARGEST_BAND;
    int64_t at_once = batch < INPUTS_AT_ONCE ? batch : INPUTS_AT_ONCE;
    uint8_t *last = calloc((size_t)(rows - job.inside) + 1, (size_t)room);
    int32_t *group_of = malloc(sizeof(int32_t) * (size_t)(mixed ? job.chunks * LANES : 1));
    float *arranged = aligned_alloc(64, (sizeof(float) * (size_t)(at_once * job.x_size) + 63) / 64 * 64);
    int failed = last == NULL || group_of == NULL || arranged == NULL;
    if (!failed) {
        job.last = last;
        job.x = arranged;
        job.group_of = mixed ? group_of : NULL;
        for (int64_t i = 0; mixed && i < job.chunks * LANES; i++) {
            int64_t column = i * values < columns ? i * values : columns - 1;
            group_of[i] = (int32_t)(column / group);
        }
        for (int64_t row = job.inside; row < rows; row++)
            memcpy(last + (row - job.inside) * room, packed + row * job.row_bytes, (size_t)job.row_bytes);
    }
    for (; !failed && job.first < batch; job.first += at_once) {
        int64_t count = batch - job.first < at_once ? batch - job.first : at_once;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && count > BATCH)
        for (int64_t i = 0; i < count; i++) arrange(&job, x, job.first + i, arranged + i * job.x_size, values);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
        for (int64_t row = 0; row < rows; row += size)
            band(&job, row, row + size < rows ? row + size : rows, count, tile_table[bits - 2]);
    }
    free(last);
    free(group_of);
    free(arranged);
    return failed;
}
