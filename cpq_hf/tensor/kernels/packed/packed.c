/* Packed weights on the CPU: the arithmetic of packing.py and nn/packed.py, straight from the words.

   A row of `columns` values of `bits` bits is a bit stream, least significant bit first, in 32-bit words (packing.py).
   Read on a little-endian machine, value i is the bits [i*bits, (i+1)*bits) of the row's bytes.

   cpq_dequantize writes the weights out: (level + offset) * scale, the same numbers as torch operations give.

   cpq_linear multiplies without writing them out, in tiles (tile.h). Columns are cut into blocks, so that the inputs
   of a tile stay in the first-level cache while the rows of a band pass by. Every output is summed in the same order
   whatever the batch and the number of threads, so it does not depend on them. */

#define _DEFAULT_SOURCE /* madvise */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "tile.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "words are read as bytes, least significant first"
#endif

#define BLOCK 2048         /* columns at most of a block; BATCH inputs of so many stay in the first-level cache */
#define LARGEST_BAND 256   /* rows that a thread takes at a time; a block of them stays in its second-level cache */
#define INPUTS_AT_ONCE 256 /* inputs that are arranged before the threads begin */

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

/* Inputs of the next tile, where so many are left. */
INLINE int tile_inputs(int64_t left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

/* A chunk of an input, from memory's order into that of the windows: `step` floats from one vector to the next. */
INLINE void transpose(const float *from, float *out, int64_t step, int values) {
    for (int n = 0; n < values; n++)
        for (int k = 0; k < LANES; k++) out[n * step + k] = from[k * values + n];
}

/* The inputs of one tile, in the order in which it reads them, padded with zeros. */
static void arrange(const task *job, const void *x, int64_t input, int inputs) {
    const int values = values_of(job->bits);
    const int64_t width = (int64_t)values * LANES;
    float here[16 * LANES]; /* a chunk */
    for (int64_t chunk = 0; chunk < job->chunks; chunk++) {
        const int64_t start = chunk / job->block * job->block,
                      size = start + job->block < job->chunks ? job->block : job->chunks - start;
        float *out = job->x + (start * job->count + input * size + (chunk - start) * inputs) * width;
        const int64_t left = job->columns - chunk * width, count = left < width ? left : width;
        for (int b = 0; b < inputs; b++, out += LANES) {
            const int64_t from = (job->first + input + b) * job->columns + chunk * width;
            memset(here, 0, sizeof here);
            if (job->bf16)
                for (int64_t i = 0; i < count; i++) here[i] = load(x, from + i, 1);
            else
                memcpy(here, (const float *)x + from, sizeof(float) * (size_t)count);
            if (values == 4) transpose(here, out, inputs * LANES, 4);
            if (values == 8) transpose(here, out, inputs * LANES, 8);
            if (values == 16) transpose(here, out, inputs * LANES, 16);
        }
    }
}

/* The rows of a band by all inputs that are arranged. */
static void band(const task *job, int64_t first_row, int64_t last_row, const tile_function *tiles) {
    for (int64_t start = 0; start < job->chunks; start += job->block) {
        int64_t stop = start + job->block < job->chunks ? start + job->block : job->chunks;
        for (int64_t i = 0; i < job->count; i += tile_inputs(job->count - i))
            for (int64_t row = first_row; row < last_row; row += ROWS)
                tiles[tile_inputs(job->count - i) / 2](job, row, i, start, stop);
    }
    if (job->bf16)
        for (int64_t i = 0; i < job->count; i++)
            for (int64_t row = first_row; row < last_row; row++)
                store(job->out, (job->first + i) * job->rows + row, job->sums[i * job->rows + row], 1);
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
                .groups = groups, .half = offset, .bits = bits, .bf16 = bf16};
    job.row_bytes = (columns * bits + 31) / 32 * 4;
    job.chunks = (columns + width - 1) / width;
    int64_t blocks = (job.chunks * width + BLOCK - 1) / BLOCK;
    job.block = (job.chunks + blocks - 1) / blocks;
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
    float *arranged = aligned_alloc(64, (sizeof(float) * (size_t)(at_once * job.chunks * width) + 63) / 64 * 64);
    float *sums = bf16 ? malloc(sizeof(float) * (size_t)(at_once * rows)) : (float *)out;
    int failed = last == NULL || group_of == NULL || arranged == NULL || (bf16 && sums == NULL);
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
        job.count = batch - job.first < at_once ? batch - job.first : at_once;
        job.sums = bf16 ? sums : sums + job.first * rows;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && job.count > BATCH)
        for (int64_t i = 0; i < job.count; i += BATCH)
            for (int64_t k = i; k < i + BATCH && k < job.count; k += tile_inputs(job.count - k))
                arrange(&job, x, k, tile_inputs(job.count - k));
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
        for (int64_t row = 0; row < rows; row += size)
            band(&job, row, row + size < rows ? row + size : rows, tile_table[bits - 2]);
    }
    free(last);
    free(group_of);
    free(arranged);
    if (bf16) free(sums);
    return failed;
}
