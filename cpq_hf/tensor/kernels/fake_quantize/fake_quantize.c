/* Forward and backward of the grid, each one pass over memory. The mathematics is that of fake_quantize.py.

   Layouts of x against alpha (`layout`):
     ROWS     x [rows, columns], alpha [rows]:     a step size per row
     COLUMNS  x [rows, columns], alpha [columns]:  a step size per column (weights stored [in, out])
     ONE      x [rows * columns], alpha [1]

   `types` says what is float32 and what is bfloat16; arithmetic is float32:
     PLAIN    x and grad_x float32, out and g float32
     HALF     x and grad_x bfloat16, out and g bfloat16
     CASTING  x and grad_x float32, out and g bfloat16, which is what a product under autocast asks for

   `last` is NULL or, under DropBits, the last level of each element's own grid, whose step is the wider the fewer
   levels it has. No sum is split among threads, so results do not depend on their number.

   A level is found by clamping first and rounding then, which for whole bounds is the same as the other way round;
   rounding to even adds and subtracts 1.5 * 2^23. NaN stays NaN: every comparison with it is false. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../values.h"

#define BLOCK 1024
#define CHUNK 8192
#define STRIP 256

enum layout { ROWS = 0, COLUMNS = 1, ONE = 2 };
enum types { PLAIN = 0, HALF = 1, CASTING = 2 };

typedef struct {
    const void *x;
    const float *alpha;
    const uint8_t *last;
    const void *g;
    void *out; /* x_hat, or grad_x */
    float lo, hi;
    float offset;      /* added to each level */
    float centered_hi; /* under DropBits: the offset is 1/2 on grids up to this last level; -1 for none */
    int is_signed;
    /* backward only: 1/s and, for each pair of boundaries, c = cosh(o/s) and 1/c^2 - 1 */
    float inverse, c[2], curvature[2];
} task;

INLINE float round_even(float v) { return (v + 12582912.0f) - 12582912.0f; }

INLINE float clamp(float v, float lo, float hi) {
    v = v < lo ? lo : v;
    return v > hi ? hi : v;
}

/* exp(-t) for t >= 0: 2^k * polynomial, 2 units in the last place; 0 where it would be below 2^-125. */
INLINE float exp_negative(float t) {
    float y = -(t > 87.0f ? 87.0f : t);
    float shifted = y * 1.44269504f + 12582912.0f;
    float k = shifted - 12582912.0f;
    float f = y - k * 0.693359375f + k * 2.12194440e-4f; /* ln 2 in two parts */
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    int32_t exponent;
    memcpy(&exponent, &shifted, 4);
    int32_t scale_bits = (int32_t)(((uint32_t)exponent + 127u) << 23); /* the low bits of `shifted` hold k */
    float scale;
    memcpy(&scale, &scale_bits, 4);
    return t > 87.0f ? 0.0f : p * scale;
}

/* Steps of the full grid in one step of the grid whose last level is `last`: a power of two. */
INLINE float coarser(float hi, float last) { return (hi + 1.0f) / (last + 1.0f); }

INLINE float element_forward(const task *job, int64_t i, float alpha, int types, int dropped) {
    float hi = dropped ? (float)job->last[i] : job->hi;
    float lo = dropped ? (job->is_signed ? -1.0f - hi : 0.0f) : job->lo;
    float offset = dropped ? (hi <= job->centered_hi ? 0.5f : 0.0f) : job->offset;
    alpha = dropped ? alpha * coarser(job->hi, hi) : alpha;
    return (round_even(clamp(load(job->x, i, types == HALF) / alpha - offset, lo, hi)) + offset) * alpha;
}

/* Stores grad_x and returns the element's share of grad_alpha. */
INLINE float element_backward(const task *job, int64_t i, float alpha, int types, int dropped, int narrow) {
    float hi = dropped ? (float)job->last[i] : job->hi;
    float lo = dropped ? (job->is_signed ? -1.0f - hi : 0.0f) : job->lo;
    float ratio = dropped ? coarser(job->hi, hi) : 1.0f;
    float offset = dropped ? (hi <= job->centered_hi ? 0.5f : 0.0f) : job->offset;
    float v = clamp(load(job->x, i, types == HALF) / (alpha * ratio) - offset, lo - 3.0f, hi + 3.0f);
    float n = round_even(v);
    float half = narrow && !dropped ? 1.5f : 2.0f;
    float t = (v - clamp(n, lo + half, hi - half)) * job->inverse;
    float e = exp_negative(fabsf(t));
    float square = 1.0f + e * e;
    float density = 0.0f;
    if (narrow && !dropped) {
        density = e / (square + 2.0f * e);
    } else {
        float u = 2.0f * job->c[1] * e;
        u = u / (square + u);
        density = u + u * u * job->curvature[1];
    }
    float u = 2.0f * job->c[0] * e;
    u = u / (square + u);
    density += u + u * u * job->curvature[0];
    if (narrow && dropped) { /* an element of 2 bits has one boundary less than its window */
        float outside = exp_negative(fabsf(t + 1.5f * job->inverse));
        float sum = 1.0f + outside;
        density -= hi - lo == 3.0f ? outside / (sum * sum) : 0.0f;
    }
    density *= job->inverse;
    float g = load(job->g, i, types != PLAIN);
    store(job->out, i, density * g, types == HALF);
    return ((clamp(n, lo, hi) + offset) - (v + offset) * density) * g * ratio;
}

/* The spans below are written once and compiled once for each combination of their last arguments, which is what lets
   the compiler turn each into straight vector code. They work on a copy of the task, so that no store to memory can
   change it. */

INLINE void forward_span(const task *shared, int64_t start, int64_t end, const float *alpha, int varies, int types,
                         int dropped) {
    const task job = *shared;
#pragma omp simd
    for (int64_t i = start; i < end; i++)
        store(job.out, i, element_forward(&job, i, alpha[varies ? i - start : 0], types, dropped), types != PLAIN);
}

/* One step size: the sum of grad_alpha over the span. */
INLINE float backward_span(const task *shared, int64_t start, int64_t end, float alpha, int types, int dropped,
                           int narrow) {
    const task job = *shared;
    double total = 0.0;
    for (int64_t block = start; block < end; block += BLOCK) {
        int64_t stop = block + BLOCK < end ? block + BLOCK : end;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = block; i < stop; i++) sum += element_backward(&job, i, alpha, types, dropped, narrow);
        total += sum;
    }
    return (float)total;
}

/* A step size per column: all rows of `size` <= STRIP columns from `first` on. */
INLINE void backward_strip(const task *shared, int64_t rows, int64_t columns, int64_t first, int64_t size,
                           float *grad_alpha, int types, int dropped, int narrow) {
    const task job = *shared;
    float sums[STRIP] = {0};
    for (int64_t row = 0; row < rows; row++) {
#pragma omp simd
        for (int64_t j = 0; j < size; j++)
            sums[j] += element_backward(&job, row * columns + first + j, job.alpha[first + j], types, dropped, narrow);
    }
    memcpy(grad_alpha + first, sums, sizeof(float) * (size_t)size);
}

typedef void (*forward_function)(const task *, int64_t, int64_t, const float *);
typedef float (*span_function)(const task *, int64_t, int64_t, float);
typedef void (*strip_function)(const task *, int64_t, int64_t, int64_t, int64_t, float *);

#define FORWARD(T, D, V)                                                                                      \
    static void forward_##T##D##V(const task *job, int64_t start, int64_t end, const float *alpha) {          \
        forward_span(job, start, end, alpha, V, T, D);                                                        \
    }
#define BACKWARD(T, D, N)                                                                                     \
    static float span_##T##D##N(const task *job, int64_t start, int64_t end, float alpha) {                   \
        return backward_span(job, start, end, alpha, T, D, N);                                                \
    }                                                                                                         \
    static void strip_##T##D##N(const task *job, int64_t rows, int64_t columns, int64_t first, int64_t size,  \
                                float *grad_alpha) {                                                          \
        backward_strip(job, rows, columns, first, size, grad_alpha, T, D, N);                                 \
    }
#define EACH_OF(M, T) M(T, 0, 0) M(T, 0, 1) M(T, 1, 0) M(T, 1, 1)
#define EACH(M) EACH_OF(M, 0) EACH_OF(M, 1) EACH_OF(M, 2)
EACH(FORWARD)
EACH(BACKWARD)
#define TABLE_OF(P, T) {{P##T##00, P##T##01}, {P##T##10, P##T##11}}
#define TABLE(P) {TABLE_OF(P, 0), TABLE_OF(P, 1), TABLE_OF(P, 2)}
static const forward_function forward_table[3][2][2] = TABLE(forward_);
static const span_function span_table[3][2][2] = TABLE(span_);
static const strip_function strip_table[3][2][2] = TABLE(strip_);

static void set_offsets(task *job, int centered_hi) {
    job->centered_hi = (float)centered_hi;
    job->offset = job->hi <= job->centered_hi ? 0.5f : 0.0f;
}

void cpq_forward(const void *x, const float *alpha, const uint8_t *last, void *out, int64_t rows, int64_t columns,
                 int layout, int lo, int hi, int centered_hi, int types, int threads) {
    task job = {.x = x, .alpha = alpha, .last = last, .out = out, .lo = lo, .hi = hi, .is_signed = lo < 0};
    set_offsets(&job, centered_hi);
    forward_function forward = forward_table[types][last != NULL][layout == COLUMNS];
    int64_t total = rows * columns, size = layout == ONE ? CHUNK : columns, parts = (total + size - 1) / size;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t part = 0; part < parts; part++) {
        int64_t start = part * size, end = start + size < total ? start + size : total;
        forward(&job, start, end, alpha + (layout == ROWS ? part : 0));
    }
}

/* `narrow`: the grid has 3 boundaries, or may have for single elements under DropBits. Returns 0, or 1 for want of
   memory. */
int cpq_backward(const void *x, const float *alpha, const uint8_t *last, const float *noise, const void *g,
                 void *grad_x, float *grad_alpha, int64_t rows, int64_t columns, int layout, int lo, int hi,
                 int centered_hi, int narrow, int types, int threads) {
    task job = {.x = x, .alpha = alpha, .last = last, .g = g, .out = grad_x, .lo = lo, .hi = hi, .is_signed = lo < 0};
    set_offsets(&job, centered_hi);
    double inverse = 1.0 / (double)noise[0];
    job.inverse = (float)inverse;
    for (int pair = 0; pair < 2; pair++) {
        double c = cosh((narrow && !last ? 1.0 : pair + 0.5) * inverse);
        job.c[pair] = (float)c;
        job.curvature[pair] = (float)(1.0 / (c * c) - 1.0);
    }
    if (layout == COLUMNS) {
        strip_function strip = strip_table[types][last != NULL][narrow];
        int64_t strips = (columns + STRIP - 1) / STRIP;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
        for (int64_t part = 0; part < strips; part++) {
            int64_t first = part * STRIP, size = first + STRIP < columns ? STRIP : columns - first;
            strip(&job, rows, columns, first, size, grad_alpha);
        }
        return 0;
    }
    span_function span = span_table[types][last != NULL][narrow];
    int64_t total = rows * columns, size = layout == ONE ? CHUNK : columns, parts = (total + size - 1) / size;
    float *sums = layout == ONE ? malloc(sizeof(float) * (size_t)parts) : grad_alpha;
    if (sums == NULL) return 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t part = 0; part < parts; part++) {
        int64_t start = part * size, end = start + size < total ? start + size : total;
        sums[part] = span(&job, start, end, alpha[layout == ROWS ? part : 0]);
    }
    if (layout == ONE) {
        double sum = 0.0;
        for (int64_t part = 0; part < parts; part++) sum += sums[part];
        grad_alpha[0] = (float)sum;
        free(sums);
    }
    return 0;
}

/* --- DropBits: the bit-width of each element ------------------------------------------------------------------------

   Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): 128 random bits from a counter
   and a key, 16 bits for an element. Lanes are counters that go through the rounds side by side. */

#define LANES 16
#define DRAWN (8 * LANES) /* elements of a block */

INLINE void philox(uint64_t key, uint64_t counter, uint32_t words[4][LANES]) {
    uint32_t key0 = (uint32_t)key, key1 = (uint32_t)(key >> 32);
    uint32_t a[LANES], b[LANES], c[LANES] = {0}, d[LANES] = {0};
    for (int k = 0; k < LANES; k++) a[k] = (uint32_t)(counter + k), b[k] = (uint32_t)((counter + k) >> 32);
    for (int round = 0; round < 10; round++) {
#pragma omp simd
        for (int k = 0; k < LANES; k++) {
            uint64_t one = (uint64_t)a[k] * 0xD2511F53u, two = (uint64_t)c[k] * 0xCD9E8D57u;
            a[k] = (uint32_t)(two >> 32) ^ b[k] ^ key0;
            c[k] = (uint32_t)(one >> 32) ^ d[k] ^ key1;
            b[k] = (uint32_t)two, d[k] = (uint32_t)one;
        }
        key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    memcpy(words[0], a, sizeof a), memcpy(words[1], b, sizeof b);
    memcpy(words[2], c, sizeof c), memcpy(words[3], d, sizeof d);
}

/* levels[j] is the last level of an element of which bits 1 .. j are kept; bit j + 1 is if its 16 bits are below
   thresholds[j]. */
void cpq_draw(uint64_t key, const int32_t *thresholds, const uint8_t *levels, int count, uint8_t *last, int64_t total,
              int threads) {
    int64_t blocks = (total + DRAWN - 1) / DRAWN;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t block = 0; block < blocks; block++) {
        uint32_t words[4][LANES];
        uint16_t u[DRAWN];
        uint8_t drawn[DRAWN];
        philox(key, (uint64_t)block * LANES, words);
        memcpy(u, words, sizeof u);
        memset(drawn, levels[0], sizeof drawn);
        for (int j = 0; j < count; j++) {
            if (thresholds[j] <= 0) break;
            const uint16_t below = (uint16_t)(thresholds[j] - 1);
            const uint8_t more = (uint8_t)(levels[j + 1] - levels[j]);
#pragma omp simd
            for (int i = 0; i < DRAWN; i++) drawn[i] = (uint8_t)(drawn[i] + (u[i] <= below ? more : 0));
        }
        int64_t left = total - block * DRAWN;
        memcpy(last + block * DRAWN, drawn, (size_t)(left < DRAWN ? left : DRAWN));
    }
}

/* One bit-width: the levels of its grid in steps of the full grid, the difference to one bit less. */
INLINE float at_width(float v, float ratio, float lo, float hi, float offset) {
    return (round_even(clamp(v / ratio - offset, lo, hi)) + offset) * ratio;
}

/* dL/dP_j for the bits j = min_bits+1 .. bits: keep_gradient[count]. keep[count] holds P_j, kept within [rarest,
   1 - rarest]. Returns 0, or 1 for want of memory. */
int cpq_keep_gradient(const void *x, const float *alpha, const uint8_t *last, const void *g, const float *keep,
                      float *keep_gradient, int64_t rows, int64_t columns, int layout, int lo, int hi, int centered_hi,
                      int count, float rarest, int types, int threads) {
    int64_t total = rows * columns, parts = (total + CHUNK - 1) / CHUNK;
    double *sums = malloc(sizeof(double) * (size_t)(parts * count));
    if (sums == NULL) return 1;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t part = 0; part < parts; part++) {
        int64_t start = part * CHUNK, end = start + CHUNK < total ? start + CHUNK : total;
        for (int j = 0; j < count; j++) sums[part * count + j] = 0.0;
        for (int64_t block = start; block < end; block += BLOCK) {
            int64_t size = block + BLOCK < end ? BLOCK : end - block;
            float v[BLOCK], g_alpha[BLOCK], below[BLOCK];
            int64_t row = block / columns, column = block % columns;
            for (int64_t i = 0; i < size; i++) {
                float a = alpha[layout == ONE ? 0 : layout == ROWS ? row : column];
                v[i] = load(x, block + i, types == HALF) / a;
                g_alpha[i] = load(g, block + i, types != PLAIN) * a;
                if (++column == columns) column = 0, row++;
            }
            for (int j = 0; j <= count; j++) {
                float ratio = (float)(1 << (count - j)), last_level = ((float)hi + 1.0f) / ratio - 1.0f;
                float first_level = lo < 0 ? -1.0f - last_level : 0.0f, sum = 0.0f;
                float offset = last_level <= (float)centered_hi ? 0.5f : 0.0f;
                float p = j == 0 ? 0.5f : clamp(keep[j - 1], rarest, 1.0f - rarest);
                float kept = 0.5f / p, dropped = 0.5f / (1.0f - p);
#pragma omp simd reduction(+ : sum)
                for (int64_t i = 0; i < size; i++) {
                    float here = at_width(v[i], ratio, first_level, last_level, offset);
                    float weight = (float)last[block + i] >= last_level ? kept : dropped;
                    sum += j == 0 ? 0.0f : g_alpha[i] * (here - below[i]) * weight;
                    below[i] = here;
                }
                if (j > 0) sums[part * count + j - 1] += sum;
            }
        }
    }
    for (int j = 0; j < count; j++) {
        double sum = 0.0;
        for (int64_t part = 0; part < parts; part++) sum += sums[part * count + j];
        keep_gradient[j] = (float)sum;
    }
    free(sums);
    return 0;
}

/* For each of `tries` step sizes a row: the squared rounding error, and the step size that fits the levels best. */
void cpq_try_steps(const float *x, const float *alpha, double *error, double *refit, int64_t rows, int64_t columns,
                   int64_t tries, int lo_level, int hi_level, float offset, int threads) {
    float lo = (float)lo_level, hi = (float)hi_level;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t number = 0; number < tries; number++) {
            const float *values = x + row * columns;
            float step = alpha[row * tries + number];
            double errors = 0.0, products = 0.0, squares = 0.0;
            for (int64_t start = 0; start < columns; start += BLOCK) { /* sums of a block in float32, of blocks in double */
                int64_t end = start + BLOCK < columns ? start + BLOCK : columns;
                float e = 0.0f, p = 0.0f, s = 0.0f;
#pragma omp simd reduction(+ : e, p, s)
                for (int64_t i = start; i < end; i++) {
                    float n = round_even(clamp(values[i] / step - offset, lo, hi)) + offset;
                    float d = values[i] - n * step;
                    e += d * d;
                    p += values[i] * n;
                    s += n * n;
                }
                errors += e, products += p, squares += s;
            }
            error[row * tries + number] = errors;
            refit[row * tries + number] = products / (squares < 1.0 ? 1.0 : squares);
        }
    }
}
