/* What AVX-512 has for attention_kernel.inc.h, in 64-byte vectors. */
#include <immintrin.h>
#define VL 16
#define FMA(a, b, c) ((vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define LOAD_FP16(p) ((vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p))))
#define LOAD_UINT16(p) ((vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))))
#define MAXIMUM(a, b) ((vf)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define SCALE_BY_EXP2(p, n, x)                                                                     \
    ((vf)_mm512_maskz_scalef_ps(                                                                   \
        _mm512_cmp_ps_mask((__m512)(x), _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), (__m512)(p),        \
        (__m512)(n)))
