/* Reading and writing float32 or bfloat16; arithmetic is float32. */

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE float load(const void *data, int64_t i, int bf16) {
    if (!bf16) return ((const float *)data)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)data)[i] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

INLINE void store(void *data, int64_t i, float value, int bf16) {
    if (!bf16) {
        ((float *)data)[i] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16; /* to nearest, ties to even */
    ((uint16_t *)data)[i] = (uint16_t)(value != value ? 0x7fc0u : rounded);
}
