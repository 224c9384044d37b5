// CRC-32 (that of zlib) of long data: carry-less products fold 64 bytes at a time into the next 64.
//
// A message is a polynomial over GF(2), and its CRC-32 the remainder by P = 0x104c11db7. 128 bits that lie d bits before
// others may be replaced by their product with x^d mod P, added to those: the remainder is the same. The constants are
// x^(512+32), x^(512-32), x^(128+32) and x^(128-32) mod P with bits reversed, as in Gopal et al., "Fast CRC Computation
// for Generic Polynomials Using PCLMULQDQ Instruction" (Intel, 2009). What is left is 16 bytes, whose remainder any
// CRC-32 takes.

#include <stddef.h>
#include <stdint.h>

#ifdef __PCLMUL__
#include <immintrin.h>

static __m128i fold(__m128i x, __m128i constants, __m128i next) {
    __m128i low = _mm_clmulepi64_si128(x, constants, 0x00), high = _mm_clmulepi64_si128(x, constants, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

// Folds the first bytes of `data` into `folded`, 16 bytes; `start` is the CRC of what came before. Returns how many bytes
// it took, a multiple of 64.
size_t cpq_fold(const uint8_t *data, size_t size, uint32_t start, uint8_t *folded) {
    if (size < 64) return 0;
    const __m128i *at = (const __m128i *)data, *end = at + size / 64 * 4;
    const __m128i by512 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);
    const __m128i by128 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
    __m128i x[4];
    for (int i = 0; i < 4; i++) x[i] = _mm_loadu_si128(at + i);
    x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128((int)~start));
    for (at += 4; at < end; at += 4)
        for (int i = 0; i < 4; i++) x[i] = fold(x[i], by512, _mm_loadu_si128(at + i));
    for (int i = 1; i < 4; i++) x[i] = fold(x[i - 1], by128, x[i]);
    _mm_storeu_si128((__m128i *)folded, x[3]);
    return size / 64 * 64;
}

#else

size_t cpq_fold(const uint8_t *data, size_t size, uint32_t start, uint8_t *folded) { return 0; }

#endif
