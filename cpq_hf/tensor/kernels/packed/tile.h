/* A tile of a product with packed weights: ROWS rows by up to BATCH inputs, over one block of columns.

   A vector is unpacked for 4 inputs at most, with as few instructions as there can be: values are not shuffled into
   order. V consecutive values (16 of 2 bits, 8 of 3 or 4 bits, 4 of more) lie in a window of 32 bits. LANES windows,
   one in each lane, are a chunk of the row; shifting all lanes by n*bits gives the n-th value of each window. The
   inputs were brought into that order before (packed.c), padded with zeros. Beside the multiplications for 4 inputs
   unpacking costs next to nothing: unpacking once into a cache for all inputs made hundreds of them no faster.

   Levels are multiplied and added up in float32, each lane by itself, in registers. A lane is scaled where its scale
   ends, once a block or once a group; then the lanes of each output are added up, those of all outputs at once. */

#include <stdint.h>
#include <string.h>

#include "../values.h"

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

#define BATCH 4
#define WINDOW_BYTES (4 * LANES)
#define UNROLL _Pragma("GCC unroll 16")

typedef float floats __attribute__((vector_size(WINDOW_BYTES)));
typedef int32_t ints __attribute__((vector_size(WINDOW_BYTES)));
typedef uint32_t words __attribute__((vector_size(WINDOW_BYTES)));

typedef struct {
    const uint8_t *packed, *last; /* the rows, and copies of the last ones with room behind them */
    const float *scale, *bias;
    float *x;    /* `count` inputs from `first` on, arranged: [block][tile][vector][input of the tile][LANES] */
    float *sums; /* [count][rows] */
    void *out;   /* [batch][rows] */
    int64_t rows, columns, first, count, row_bytes, groups;
    int64_t chunks, block; /* chunks of a row, and of a block */
    int64_t inside;        /* rows behind which WINDOW_BYTES can be read: all but the last ones */
    int64_t segment;       /* chunks that share the scales of their lanes */
    const int32_t *group_of; /* [chunks][LANES], or NULL where all lanes of a chunk have one scale */
    float half;              /* what is added to a level */
    int bits, bf16;
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
    const float *scale = job->scale + (row < job->rows ? row : job->rows - 1) * job->groups;
    floats scales = {0};
    if (job->group_of == NULL) return scales + scale[segment];
    const int32_t *group_of = job->group_of + segment * LANES;
#if defined(__AVX512F__)
    const __m512i lane = _mm512_sub_epi32(_mm512_loadu_si512(group_of), _mm512_set1_epi32(group_of[0]));
    const unsigned used = (2u << (group_of[LANES - 1] - group_of[0])) - 1; /* no more is read: it may not be there */
    scales = (floats)_mm512_permutexvar_ps(lane, _mm512_maskz_loadu_ps((__mmask16)used, scale + group_of[0]));
#else
    for (int k = 0; k < LANES; k++) scales[k] = scale[group_of[k]];
#endif
    return scales;
}

#if defined(__AVX512F__)
/* Adds up halves of what is left of each vector. */
INLINE floats fold(floats one, floats other, int step) {
    const __m512 a = (__m512)one, b = (__m512)other;
    const __m512d c = (__m512d)one, d = (__m512d)other;
    if (step == 0) return (floats)(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
    if (step == 1) return (floats)_mm512_unpacklo_pd(c, d) + (floats)_mm512_unpackhi_pd(c, d);
    return (floats)(_mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd));
}
#endif

/* The sum of the lanes of each vector, in one order whatever their number. */
INLINE void sums_of(floats *vectors, int count, float *sums) {
#if defined(__AVX512F__)
    UNROLL for (int step = 0, left = count; step < 4; step++, left = (left + 1) / 2)
        UNROLL for (int i = 0; i < left; i += 2)
            vectors[i / 2] = fold(vectors[i], vectors[i + 1 < left ? i + 1 : i], step);
    memcpy(sums, vectors, sizeof(float) * (size_t)count); /* after four steps a lane holds the sum of one vector */
#else
    UNROLL for (int i = 0; i < count; i++) {
        UNROLL for (int width = LANES / 2; width > 0; width /= 2)
            UNROLL for (int k = 0; k < width; k++) vectors[i][k] += vectors[i][k + width];
        sums[i] = vectors[i][0];
    }
#endif
}

/* Where a chunk of a row is; the rows of a tile that there are not are the last one. */
INLINE const uint8_t *chunk_of_row(const task *job, int64_t row, int64_t chunk, int bits) {
    if (row >= job->rows) row = job->rows - 1;
    return chunk * chunk_bytes(bits) +
           (row < job->inside ? job->packed + row * job->row_bytes
                              : job->last + (row - job->inside) * (job->chunks * chunk_bytes(bits) + WINDOW_BYTES));
}

INLINE floats level_table(const task *job, int bits) {
    floats table = {0};
    for (int k = 0; k < LANES; k++) table[k] = (float)((k & ((1 << bits) - 1)) - (1 << (bits - 1))) + job->half;
    return table;
}

/* The next chunk of a row, ready for `levels`. */
INLINE words next_windows(const uint8_t **from, int64_t row_bytes, int bits) {
    __builtin_prefetch(*from + ROWS * row_bytes); /* the row of the next tile */
    words window = windows(*from, bits);
    *from += chunk_bytes(bits);
#if defined(__AVX512F__)
    if (bits <= 4) return window;
#endif
    return window ^ top_bits(bits);
}

/* Into a register: without `volatile` gcc loads a vector again for each use of it, as operand of an instruction. */
INLINE floats load_once(const float *from) { return *(const volatile floats *)from; }

/* Where the next chunk is, of the inputs and of the rows of a tile. */
typedef struct {
    const float *x;
    const uint8_t *rows[ROWS];
} position;

/* Levels times inputs of the next `chunks`, which share the scales of their lanes: sums[input][row]. */
INLINE void multiply(const task *job, position *at, int64_t chunks, floats table, floats *sums, int bits, int count) {
    const int64_t row_bytes = job->row_bytes;
    const float half = job->half;
    UNROLL for (int i = 0; i < count * ROWS; i++) sums[i] = (floats){0};
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        words window[ROWS];
        UNROLL for (int r = 0; r < ROWS; r++) window[r] = next_windows(&at->rows[r], row_bytes, bits);
        UNROLL for (int n = 0; n < values_of(bits); n++) {
            floats x[BATCH];
            UNROLL for (int b = 0; b < count; b++, at->x += LANES) x[b] = load_once(at->x);
            UNROLL for (int r = 0; r < ROWS; r++) {
                floats weight = levels(window[r], n, bits, half, table);
                UNROLL for (int b = 0; b < count; b++) sums[b * ROWS + r] += weight * x[b];
            }
        }
    }
}

/* ROWS rows from `row` on by `count` inputs from `input` on, chunks `start` to `stop`: the sums of the first block are
   put on the biases, those of the others on what is there. */
INLINE void tile(const task *shared, int64_t row, int64_t input, int64_t start, int64_t stop, int bits, int count) {
    const task job = *shared;
    position at = {.x = job.x + (start * job.count + input * (stop - start)) * values_of(bits) * LANES};
    UNROLL for (int r = 0; r < ROWS; r++) at.rows[r] = chunk_of_row(&job, row + r, start, bits);
    floats total[BATCH * ROWS], table = level_table(&job, bits);
    int64_t segment = start / job.segment, end = (segment + 1) * job.segment;
    multiply(&job, &at, (end < stop ? end : stop) - start, table, total, bits, count);
    UNROLL for (int r = 0; r < ROWS; r++) {
        floats scales = lane_scales(&job, row + r, segment);
        UNROLL for (int b = 0; b < count; b++) total[b * ROWS + r] *= scales;
    }
    for (; end < stop; end += job.segment) {
        floats part[BATCH * ROWS];
        multiply(&job, &at, end + job.segment < stop ? job.segment : stop - end, table, part, bits, count);
        segment++;
        UNROLL for (int r = 0; r < ROWS; r++) {
            floats scales = lane_scales(&job, row + r, segment);
            UNROLL for (int b = 0; b < count; b++) total[b * ROWS + r] += part[b * ROWS + r] * scales;
        }
    }
    static const float zeros[ROWS];
    float sums[BATCH * ROWS];
    sums_of(total, count * ROWS, sums);
    UNROLL for (int b = 0; b < count; b++) {
        float *out = job.sums + (input + b) * job.rows + row;
        const float *before = start > 0 ? out : job.bias == NULL ? zeros : job.bias + row;
        if (row + ROWS <= job.rows)
            UNROLL for (int r = 0; r < ROWS; r++) out[r] = before[r] + sums[b * ROWS + r];
        else
            for (int r = 0; row + r < job.rows; r++) out[r] = before[r] + sums[b * ROWS + r];
    }
}

typedef void (*tile_function)(const task *, int64_t, int64_t, int64_t, int64_t);
#define TILE(B, C)                                                                                                \
    static void tile_##B##C(const task *job, int64_t row, int64_t input, int64_t start, int64_t stop) {           \
        tile(job, row, input, start, stop, B, C);                                                                 \
    }
#define TILES(B) TILE(B, 1) TILE(B, 2) TILE(B, 4)
TILES(2) TILES(3) TILES(4) TILES(5) TILES(6) TILES(7) TILES(8)
#define ENTRY(B) {tile_##B##1, tile_##B##2, tile_##B##4}
static const tile_function tile_table[][3] = {ENTRY(2), ENTRY(3), ENTRY(4), ENTRY(5), ENTRY(6), ENTRY(7), ENTRY(8)};
